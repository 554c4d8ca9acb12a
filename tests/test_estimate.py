"""Tests of nanoseek/estimate.py. What the estimates of a step's memory are worth is in
tests/test_bench.py, and FLOPs are counted in test_model.py."""
from dataclasses import replace

import pytest
import torch

from model import Config, Transformer
from nanoseek import estimate
from nanoseek.estimate import Live, memory_estimate, parameter_table
from train import Settings

MODEL = Config(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
               kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=6, v_head_dim=5,
               n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=3,
               moe_intermediate_size=10, first_k_dense_replace=1, intermediate_size=20,
               num_nextn_predict_layers=1)


def test_parameters_are_those_counted_by_hand():
    heads, layers = 2, 3                                # with the MTP one
    attention = 32 * (4 + 6) * heads + 32 * (8 + 6) + 8 * (4 + 5) * heads + 5 * heads * 32
    expert = 3 * 32 * 10
    table = parameter_table(Transformer(MODEL))
    wanted = {
        'attention': layers * attention,
        'mlp': 3 * 32 * 20,
        'moe': 2 * (4 * expert + expert + 4 * 32),      # routed, shared, the router
        'embedding': 50 * 32,
        'mtp': 2 * 32 * 32,
        'norms': layers * (2 * 32 + 8) + 32 + 3 * 32,   # enorm, hnorm and its head's
    }
    assert {kind: table[kind] for kind in wanted} == wanted
    assert table['total'] == sum(wanted.values())
    assert table['active'] == table['total'] - 2 * (4 - 3) * expert


def test_live_bytes_count_each_storage_once_and_while_it_is_there():
    with Live() as live:
        a = torch.zeros(100)                            # 400 bytes
        b = a.view(10, 10)
        c = a + 1
        assert live.now == live.peak == 800
        del a, c
        assert live.now == 400
        del b
        assert live.now == 0 and live.peak == 800


def memory(**changes):
    s = Settings(batch_size=8, block_size=64)
    return memory_estimate(Transformer, MODEL, replace(s, **changes), torch.float32, 'cpu')


def test_memory_of_states_is_that_of_parameters_gradients_and_moments():
    model = Transformer(MODEL)
    count = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    states, _ = memory()
    steps = 4 * len(list(model.parameters()))           # AdamW's counters
    assert states == 4 * 4 * count + buffers + steps
    fewer, _ = memory(optimizer='muon')                 # one moment in the place of two
    assert 0.6 * states < fewer < states


def test_an_estimate_leaves_random_numbers_alone_and_is_smaller_for_less():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    _, activations = memory()
    assert torch.get_rng_state().equal(before)
    for changes in (dict(batch_size=4), dict(block_size=32), dict(gradient_checkpointing=True)):
        assert memory(**changes)[1] < activations


@pytest.mark.parametrize('changes, text', [
    ({}, 'MLA + MoE (1 shared, 3 of 4 routed experts of width 10), 2 layers + 1 MTP, hidden 32, 2 '
         'heads, vocabulary 50'),
    ({'attention': 'gqa', 'n_routed_experts': 0, 'num_nextn_predict_layers': 0},
     'GQA, 2 layers, hidden 32, 2 heads, vocabulary 50'),
    ({'attention': 'linear', 'n_routed_experts': 0, 'num_nextn_predict_layers': 0},
     'linear attention, 2 layers, hidden 32, 2 heads, vocabulary 50')])
def test_an_architecture_in_a_line(changes, text):
    assert estimate.architecture(replace(MODEL, **changes)) == text
