"""Tests of nanoseek/device.py: dtypes and limits of devices that are made up where there is none,
and float8 against products of matrices that were rounded by hand."""
import math
import sys

import pytest
import torch

from model import Config, Transformer
from nanoseek import device as devices
from nanoseek.device import (check_fp8, container_limits, memory_limit, peak_memory, pick_device,
                             to_fp8)
from nanoseek.optim import parameter_groups
from train import Settings

CPU = torch.device('cpu')
RECIPES = pytest.mark.parametrize('recipe', ['tensorwise', 'rowwise'])


@pytest.mark.parametrize('capability, dtype', [
    ((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)])
def test_a_gpu_gets_a_dtype_that_it_does_not_emulate(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    assert devices.fast_dtype(torch.device('cuda')) == dtype


def test_a_device_that_is_not_there_is_refused_with_one_that_is():
    for name in ('cuda:99', 'quantum'):
        with pytest.raises(ValueError, match=f'^device={name}: not usable here .*; --device='):
            pick_device(Settings(device=name))
    assert pick_device(Settings(device='cpu', dtype='float16')) == (CPU, torch.float16)
    assert pick_device(Settings(device='quantum', dtype='float32'), CPU) == (CPU, torch.float32)


def tree(root, **files):
    """Files with their texts, in a folder that is taken for / ; __ in a name is /"""
    for name, text in files.items():
        path = root / name.replace('__', '/')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding='utf-8')


def test_limits_of_containers_count_wherever_they_are(tmp_path):
    assert container_limits(tmp_path) == []                     # not Linux
    v2 = tmp_path / 'v2'
    tree(v2, proc__self__cgroup='0::/job/step\n', sys__fs__cgroup__job__step__tasks='')
    assert container_limits(v2) == []
    (v2 / 'sys/fs/cgroup/memory.max').write_text('max\n')
    assert container_limits(v2) == []
    (v2 / 'sys/fs/cgroup/memory.max').write_text('9000\n')      # as a container sees its own
    assert container_limits(v2) == [9000]
    (v2 / 'sys/fs/cgroup/job/memory.max').write_text('8000\n')  # as Slurm has it
    (v2 / 'sys/fs/cgroup/job/step/memory.max').write_text('max\n')
    assert sorted(container_limits(v2)) == [8000, 9000]
    v1 = tmp_path / 'v1'
    tree(v1, proc__self__cgroup='5:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n1:name=systemd:/\n')
    memory = v1 / 'sys/fs/cgroup/memory'
    (memory / 'docker/1').mkdir(parents=True)
    (memory / 'memory.limit_in_bytes').write_text('7000\n')
    (memory / 'docker/1/memory.limit_in_bytes').write_text('6000\n')
    assert sorted(container_limits(v1)) == [6000, 7000]


def test_ranks_share_a_machine_and_its_container_but_not_their_address_spaces(monkeypatch):
    resource = pytest.importorskip('resource')
    monkeypatch.setattr(resource, 'getrlimit', lambda kind: (-1, -1))
    python = 2**29
    alone = memory_limit(CPU)
    assert memory_limit(CPU, 4) == pytest.approx((alone + python) / 4 - python)
    monkeypatch.setattr(devices, 'container_limits', lambda: [2**32])
    assert memory_limit(CPU) == 2**32 - python
    assert memory_limit(CPU, 4) == 2**30 - python
    monkeypatch.setattr(resource, 'getrlimit', lambda kind: (3 * 2**28, -1))
    assert memory_limit(CPU, 4) == 3 * 2**28 - python


def test_where_the_system_counts_no_memory_there_is_no_limit(monkeypatch):
    monkeypatch.setitem(sys.modules, 'resource', None)      # as on Windows
    assert memory_limit(CPU) == math.inf and peak_memory(CPU) == 0


# --------------------------------------------------------------------------------- float8


@pytest.fixture(scope='session')
def torchao():
    return pytest.importorskip('torchao.float8', reason='pip install torchao')


def in_fp8(model):
    return [name for name, m in model.named_modules() if type(m).__name__ == 'Float8Linear']


def rounded(x, dim, largest=448.0, bits=3, lowest=-6):
    """x, float64, to the nearest float8, by default e4m3, and back. Scaled so that the largest of a
    row (dim 1) or a column (dim 0) becomes at most the largest float8, by a power of two; or of all
    (None) becomes just that"""
    if dim is None:
        scale = largest / x.abs().max()
    else:
        scale = 2 ** (largest / x.abs().amax(dim, keepdim=True)).log2().floor()
    exponent = (x * scale).abs().clamp(min=2.0 ** lowest).log2().floor()
    unit = 2 ** (exponent - bits)
    return (x * scale / unit).round() * unit / scale        # halves to even


def error(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@RECIPES
def test_an_fp8_linear_is_the_product_of_rounded_matrices_forward_and_backward(torchao, recipe):
    torch.manual_seed(0)
    model = Transformer(Config(vocab_size=9, hidden_size=48, num_hidden_layers=1, attention='gqa',
                               num_attention_heads=2, head_dim=16))
    to_fp8(model, recipe, emulate=True)
    linear = model.model.layers[0].self_attn.q_proj         # 48 -> 32
    x = torch.randn(5, 48, requires_grad=True)
    grad = torch.randn(5, 32) * torch.logspace(-2, 1, 5)[:, None]
    y = linear(x)
    y.backward(grad)
    X, W, G = x.detach().double(), linear.weight.detach().double(), grad.double()

    def back(g, dim):
        if recipe == 'rowwise':
            return rounded(g, dim)
        return rounded(g, dim, 57344.0, 2, -14)             # e5m2
    rows, columns = (1, 0) if recipe == 'rowwise' else (None, None)
    for found, wanted, exact in (
            (y, rounded(X, rows) @ rounded(W, rows).T, X @ W.T),
            (x.grad, back(G, rows) @ rounded(W, columns), G @ W),
            (linear.weight.grad, back(G, columns).T @ rounded(X, columns), G.T @ X)):
        assert error(found, wanted) < 1e-3 and 0.01 < error(found, exact) < 0.1


MODEL = dict(vocab_size=64, max_position_embeddings=64, hidden_size=64, num_hidden_layers=2,
             num_attention_heads=4, attention='mla', q_lora_rank=40, kv_lora_rank=32,
             qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, n_routed_experts=4,
             n_shared_experts=1, moe_intermediate_size=32, first_k_dense_replace=1,
             num_nextn_predict_layers=1, tie_word_embeddings=False)


def test_fp8_is_in_attention_dense_and_shared_mlps_and_changes_no_name_or_weight(torchao):
    torch.manual_seed(1)
    plain = Transformer(Config(**MODEL))
    torch.manual_seed(1)
    model = Transformer(Config(**MODEL))
    parameters = dict(model.named_parameters())
    to_fp8(model, 'rowwise', emulate=True)
    attention = ('kv_a_proj_with_mqa', 'kv_b_proj', 'o_proj')       # rank 40 is no multiple of 16
    mlp = ('gate_proj', 'up_proj', 'down_proj')
    wanted = [f'model.layers.{i}.self_attn.{name}' for i in range(3) for name in attention]
    wanted += [f'model.layers.0.mlp.{name}' for name in mlp]
    wanted += [f'model.layers.{i}.mlp.shared_experts.{name}' for i in (1, 2) for name in mlp]
    assert sorted(in_fp8(model)) == sorted(wanted)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    ours, theirs = model.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[name].dtype == t.dtype and ours[name].equal(t) for name, t in theirs.items())
    names = {id(p): name for m in (model, plain) for name, p in m.named_parameters()}
    for s in (Settings(optimizer='muon'), Settings()):
        ours, theirs = ([{**group, 'params': [names[id(p)] for p in group['params']]}
                         for group in parameter_groups(m, s)] for m in (model, plain))
        assert ours == theirs


def test_fp8_where_no_layer_has_the_widths_is_refused(torchao):
    model = Transformer(Config(vocab_size=9, hidden_size=24, attention='gqa'))
    with pytest.raises(ValueError, match='fp8=rowwise.*multiples of 16'):
        to_fp8(model, 'rowwise', emulate=True)


@pytest.mark.parametrize('capability, dtype, words', [
    ((9, 0), torch.bfloat16, 'pip install torchao'), ((9, 0), torch.float16, 'dtype=float16'),
    ((8, 6), torch.bfloat16, 'device=cuda has no FP8.*8.9.*')])
def test_fp8_that_cannot_be_is_refused(monkeypatch, capability, dtype, words):
    monkeypatch.setitem(sys.modules, 'torchao', None)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    with pytest.raises(ValueError, match=f'^fp8=rowwise.*{words}$'):
        check_fp8('rowwise', torch.device('cuda'), dtype)
