"""Tests of nanoseek/dial.py"""
import json
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import train
from conftest import run
from model import ATTENTION, Config, Transformer
from nanoseek import dial

DENSE = {'attention': 'gqa', 'n_routed_experts': 0}


def turn(depth, model=None, vocab_size=1024, **given):
    given, model = dial.turn({'depth': depth, **given}, model or {}, vocab_size)
    return train.Settings(**given), Config(**{'vocab_size': vocab_size, **model})


def counted_flops(c, T=32):
    """FLOPs per token of a forward pass, counted by torch. Experts count as the dense MLP that a
    token meets."""
    width = c.intermediate_size
    if c.n_routed_experts:
        width = c.moe_intermediate_size * (c.n_shared_experts + c.num_experts_per_tok)
    same = {**vars(c), 'n_routed_experts': 0, 'n_shared_experts': 0, 'intermediate_size': width}
    with FakeTensorMode(), FlopCounterMode(display=False) as counter, torch.no_grad():
        Transformer(Config(**same))(torch.zeros(1, T, dtype=torch.int64))
    return counter.get_total_flops() / T


def cached_numbers(c):
    return c.num_hidden_layers * sum(map(math.prod, ATTENTION[c.attention].cache_shapes(c, 1)))


@pytest.mark.parametrize('depth', range(1, 13))
def test_forms_of_a_depth_cost_the_same_and_the_latent_is_at_most_half_a_cache(depth):
    _, c = turn(depth)
    _, dense = turn(depth, DENSE)
    assert c.num_hidden_layers == dense.num_hidden_layers == depth
    assert c.num_attention_heads * c.v_head_dim == c.hidden_size
    near = 0.05
    if c.num_attention_heads % 2:           # then GQA has as many key heads
        near = 0.12
    assert counted_flops(c) == pytest.approx(counted_flops(dense), rel=near)
    assert cached_numbers(c) <= (0.75 if depth == 1 else 0.5) * cached_numbers(dense)


@pytest.mark.parametrize('depth, model', [(1, {}), (3, {}), (3, DENSE), (8, {})])
def test_a_run_has_20_tokens_for_each_weight(depth, model):
    s, c = turn(depth, model)
    weights = counted_flops(c, T=1) / 2             # attention to one token is next to nothing
    assert s.tokens / weights == pytest.approx(20, rel=0.03)
    tokens = s.max_steps * s.global_batch_size * s.block_size
    assert tokens == pytest.approx(s.tokens, rel=0.01)


def test_deeper_models_get_lower_rates_and_larger_steps():
    runs = [turn(depth)[0] for depth in range(1, 13)]
    rates = [s.learning_rate for s in runs]
    steps = [s.global_batch_size * s.block_size for s in runs]
    assert rates == sorted(rates, reverse=True) and steps == sorted(steps)
    assert turn(4, tokens=10 ** 10)[0].global_batch_size > turn(4)[0].global_batch_size


@pytest.mark.parametrize('depth, best', [(1, 1.7e-2), (2, 9.4e-3), (3, 7.7e-3)])
def test_the_learning_rate_is_near_the_best_of_the_sweeps_in_the_docs(depth, best):
    assert 1 / 1.4 < turn(depth)[0].learning_rate / best < 1.4


def test_given_settings_stay_and_the_rest_follows_from_them():
    s, c = turn(4, {'hidden_size': 512, 'n_routed_experts': 24}, max_steps=7, out_dir='out/mine')
    assert (s.max_steps, s.out_dir, c.n_routed_experts) == (7, 'out/mine', 24)
    assert (c.num_hidden_layers, c.hidden_size) == (4, 512)
    _, wide = turn(8)                               # which has this width
    assert c.num_attention_heads == wide.num_attention_heads
    assert c.kv_lora_rank == wide.kv_lora_rank
    assert s.tokens == 7 * s.global_batch_size * s.block_size
    assert turn(4, tokens=0, global_batch_size=0) == turn(4)
    twice, _ = turn(2, tokens=turn(2)[0].tokens * 2)
    assert twice.max_steps > 1.2 * turn(2)[0].max_steps


@pytest.mark.parametrize('args, problem', [
    ('--tokens=5', 'tokens=5'), ('--depth=-1', 'depth=-1 on'),
    ('--depth=2 --init_from=out/a', 'init_from=out/a loads one'),
    ('--depth=2 --num_attention_heads=0', 'num_attention_heads=0')])
def test_a_mistake_is_one_line(args, problem, tmp_path):
    done = run(tmp_path, 'train.py', *args.split())
    assert done.returncode == 2 and problem in done.stderr and done.stderr.count('\n') == 1


def test_a_run_is_trained_and_shown(tmp_path):
    (tmp_path / 'abc.txt').write_text('abcdefgh' * 2000)
    run(tmp_path, 'prepare.py', 'abc.txt', '--out_dir=data/abc')
    done = run(tmp_path, 'train.py', '--depth=1', '--dataset=abc', '--tokens=20000')
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / 'out/depth-1/settings.json').read_text())
    s, c = turn(1, vocab_size=saved['vocab_size'], tokens=20000)
    for name in ('tokens', 'max_steps', 'learning_rate', 'global_batch_size'):
        assert saved[name] == getattr(s, name), name
    assert saved['kv_lora_rank'] == c.kv_lora_rank
    done = run(tmp_path, 'train.py', '--depth=1', '--dataset=abc', '--max_steps=0')
    assert "at 40% of a matmul's rate" in done.stdout
