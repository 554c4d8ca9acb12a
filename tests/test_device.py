"""Tests of nanoseek/device.py"""
from dataclasses import replace

import pytest
import torch

from model import Config, Transformer
from nanoseek.device import fast_dtype, fits_fp8, memory_limit, pick_device, to_fp8
from train import Settings

CPU = torch.device('cpu')


@pytest.mark.parametrize('capability, dtype', [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_a_gpu_gets_a_dtype_that_it_runs_natively(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    assert fast_dtype(torch.device('cuda')) == dtype


def test_a_missing_device_is_refused_with_one_that_is_there():
    with pytest.raises(ValueError, match='^device=quantum cannot be used here; --device='):
        pick_device(Settings(device='quantum'))
    assert pick_device(Settings(device='cpu', dtype='float16')) == (CPU, torch.float16)
    assert pick_device(Settings(device='quantum', dtype='float32'), CPU) == (CPU, torch.float32)


def test_memory_is_shared_by_ranks():
    assert memory_limit(CPU, 4) < memory_limit(CPU) / 4


def test_linear_layers_train_in_fp8():
    """torchao rounds as float8 does; routed experts, router and head stay as they are."""
    float8 = pytest.importorskip('torchao.float8')
    torch.manual_seed(1)
    model = Transformer(Config(vocab_size=64, hidden_size=64, num_hidden_layers=2, kv_lora_rank=40,
                               n_routed_experts=4, n_shared_experts=1, moe_intermediate_size=32))
    options = float8.Float8LinearConfig.from_recipe_name('tensorwise')
    options = replace(options, emulate=True, pad_inner_dim=True)
    float8.convert_to_float8_training(model, config=options, module_filter_fn=fits_fp8)
    names = [name for name, module in model.named_modules() if 'Float8' in type(module).__name__]
    of_a_layer = ('q_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj')     # 40: no multiple
    assert [name.split('.')[-1] for name in names] == 2 * list(of_a_layer)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    idx = torch.randint(64, (4, 17))
    losses = []
    for _ in range(30):
        _, loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_fp8_without_its_gpu_is_refused():
    with pytest.raises(ValueError, match='fp8=rowwise needs .* 8.9 or above'):
        to_fp8(None, 'rowwise', CPU)
