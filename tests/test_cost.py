"""Tests of nanoseek/cost.py. test_model.py counts FLOPs."""
import re
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import Config, Transformer
from nanoseek import cost
from train import Settings

MODEL = Config(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
               kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=6, v_head_dim=5,
               n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=3,
               moe_intermediate_size=10, first_k_dense_replace=1, intermediate_size=20,
               num_nextn_predict_layers=1)


class Live(TorchDispatchMode):
    """While this lasts, peak is the most bytes in tensors other than the known ones."""
    def __init__(self, known):
        super().__init__()
        self.peak = 0
        self.sizes = {t.untyped_storage()._cdata: 0 for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        storages = [t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        for storage in storages:
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


@pytest.mark.parametrize('attention, experts', [('gqa', 0), ('linear', 0), ('mla', 0), ('mla', 6)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_activations_are_those_of_a_step(attention, experts, dtype, checkpointing):
    """The step is on a CPU, with so many tokens that attention is fused as on a GPU."""
    c = Config(vocab_size=4096, hidden_size=96, num_hidden_layers=5, num_attention_heads=3,
               attention=attention, q_lora_rank=48, kv_lora_rank=40, n_routed_experts=experts,
               n_shared_experts=1, moe_intermediate_size=64)
    s = Settings(batch_size=2, block_size=640, gradient_checkpointing=checkpointing)
    model = Transformer(c).train()
    model.gradient_checkpointing = checkpointing
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    idx = torch.zeros(s.batch_size, s.block_size, dtype=torch.int64)
    with Live([*model.parameters(), *(p.grad for p in model.parameters())]) as live:
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            _, loss = model(idx, idx)
        loss.backward()
    _, activations = cost.memory_estimate(model, s, dtype, 'cuda')
    assert activations == pytest.approx(live.peak, rel=0.15)


def test_states_are_weights_gradients_and_moments():
    model = Transformer(MODEL)
    count = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for name, p in model.named_parameters() if '_proj' in name)
    states, _ = cost.memory_estimate(model, Settings(), torch.float32, 'cpu')
    assert states == 16 * count
    muon = Settings(optimizer='muon')
    assert cost.memory_estimate(model, muon, torch.float32, 'cpu')[0] == states - 4 * matrices


def fit(limit, shardings=(False,), world=1, **given):
    """Let MODEL fit a GPU with so many bytes. Return its Settings, dist and the line."""
    s = Settings(**{'batch_size': 0, 'global_batch_size': 12, 'block_size': 64, **given})
    dist = SimpleNamespace(world=world, limit=limit / 0.9 + 1, shardings=shardings,
                           dtype=torch.float32, device=torch.device('cuda'))
    _, line = cost.fit(s, MODEL, dist)
    return s, dist, line


def need(batch_size, checkpointing=False):
    s = Settings(batch_size=batch_size, block_size=64, gradient_checkpointing=checkpointing)
    return sum(cost.memory_estimate(cost.on_meta(MODEL), s, torch.float32, 'cuda'))


def test_the_largest_micro_batch_that_fits_and_divides_a_step_is_chosen():
    for size in (1, 2, 3, 4, 6, 12):
        s, _, _ = fit(need(size), eval_steps=5)
        assert s.batch_size == size and not s.gradient_checkpointing
        assert s.eval_steps * size == 5 * 12                # as many sequences as with 12
    assert fit(need(5))[0].batch_size == 4
    assert fit(need(12), world=4)[0].batch_size == 3        # a rank's share
    assert fit(0, batch_size=12)[0].batch_size == 12        # was given


def test_gradient_checkpointing_and_shards_are_for_what_does_not_fit_otherwise():
    s, dist, line = fit(need(12), (False, True), 2)
    assert not s.gradient_checkpointing and not dist.sharded and 'fit' not in line
    s, _, line = fit(need(1) - 2)
    assert s.gradient_checkpointing and need(s.batch_size, True) < need(1)
    assert line.endswith('with gradient_checkpointing=True, fsdp=False')
    _, dist, line = fit(0.95 * need(1, True), (False, True), 12)
    assert dist.sharded and line.endswith('fsdp=True')


def test_what_does_not_fit_is_refused_or_warned_of():
    problem = '1 x 64 tokens need about .* try a smaller --block_size'
    with pytest.raises(ValueError, match=problem):
        fit(0)
    assert re.match(f'this may not fit: {problem}', fit(0, max_steps=0)[2])
    assert fit(0, batch_size=12)[2].startswith('this may not fit: 12 x 64 tokens')


def test_an_architecture_and_its_cache_in_a_line():
    assert cost.architecture(MODEL) == ('MLA + MoE (1 shared, 3 of 4 routed experts of width 10), '
                                        '2 layers + 1 MTP, hidden 32, 2 heads, vocabulary 50')
    linear = replace(MODEL, attention='linear', n_routed_experts=0, num_nextn_predict_layers=0)
    assert cost.architecture(linear) == ('linear attention, 2 layers, hidden 32, 2 heads, '
                                         'vocabulary 50')
    assert cost.cache_line(MODEL, torch.bfloat16) == (      # 2 layers x 2 bytes x (8 + 6)
        'cache: 56 bytes a token, as MHA 80')
