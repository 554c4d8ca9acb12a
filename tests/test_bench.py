"""Tests of bench.py, as users run it, on a model of a few thousand parameters; and of train.py's estimate of memory,
against what the steps of a larger one take."""
import json, os, subprocess, sys
from pathlib import Path

import pytest
import torch

import bench, train
from model import Cache, Config
from nanoseek import ops
from nanoseek.device import pick_device
from nanoseek.estimate import memory_estimate

HERE = Path(bench.__file__).resolve().parent
TINY = ['--hidden_size=64', '--num_hidden_layers=2', '--num_attention_heads=4', '--n_routed_experts=4',
        '--n_shared_experts=1', '--moe_intermediate_size=64', '--num_nextn_predict_layers=1', '--batch_size=4',
        '--block_size=128', '--max_position_embeddings=256', '--device=cpu', '--rounds=3', '--contexts=16,512',
        '--batch_sizes=1,2', '--new_tokens=8']
GPT = """
import torch
class GPTConfig:
    def __init__(self, block_size, vocab_size, n_layer, n_head, n_embd, bias):
        self.block_size, self.vocab_size, self.n_embd = block_size, vocab_size, n_embd
class GPT(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        print('number of parameters')
        self.table = torch.nn.Embedding(c.vocab_size, c.vocab_size)
    def forward(self, idx, targets):
        return None, torch.nn.functional.cross_entropy(self.table(idx).float().view(-1, 256), targets.view(-1))
    def configure_optimizers(self, decay, rate, betas, device):
        return torch.optim.AdamW(self.parameters(), rate, betas)
    def get_num_params(self):
        return self.table.weight.numel()
    def generate(self, idx, n):
        return torch.cat((idx, idx[:, -1:]), 1)
"""


def run(folder, *args, **env):
    return subprocess.run([sys.executable, HERE / 'bench.py', *args], cwd=folder, capture_output=True, text=True,
                          env=os.environ | env)


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp('bench')
    (folder / 'model.py').write_text(GPT)           # nanoGPT's interface
    done = run(folder, *TINY, '--json', f'--vs={folder}', '--optimizer=muon')
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_json_has_every_row(found):
    assert found['machine']['device'] == 'cpu' and found['settings']['optimizer'] == 'muon'
    rows = [r['name'] for r in found['training']]
    assert rows == ['nanoseek', 'nanoseek, muon', 'nanoseek, dense, same active FLOPs', 'nanoGPT']
    for r in found['training']:
        assert r['ms'] > 0 and r['mfu'] > 0 and r['tokens_per_s'] == pytest.approx(512e3 / r['ms'])
    assert found['training'][2]['flops_per_token'] == pytest.approx(found['training'][0]['flops_per_token'], rel=0.02)
    assert {(r['name'], r['context'], r['batch']) for r in found['decoding']} == {
        (name, context, batch) for name in ('nanoseek', 'nanoGPT') for context in (16, 248) for batch in (1, 2)}
    assert all(r['ms_per_token'] > 0 and r['first_ms'] > 0 for r in found['decoding'])
    assert found['memory']['measured_bytes'] > 0 and found['data'] == 'random tokens'


def test_the_parts_of_a_step_are_all_there_and_add_up_to_it(found):
    parts = {r['part']: r['ms'] for r in found['parts']}
    assert set(parts) == set(bench.ORDER) and all(v > 0 for v in parts.values())
    assert 0.7 < sum(parts.values()) / found['step_of_parts_ms'] < 1.4


class Sleep(torch.autograd.Function):
    """Takes 40 ms forward and 80 ms backward"""
    @staticmethod
    def forward(ctx, x):
        bench.time.sleep(0.04)
        return x.clone()
    @staticmethod
    def backward(ctx, grad):
        bench.time.sleep(0.08)
        return grad


@pytest.mark.parametrize('again', (False, True))
@pytest.mark.parametrize('name, part', (('o_proj', bench.ATTEND), ('gate', bench.ROUTER), ('mlp', bench.DENSE),
                                        ('shared_experts', bench.DENSE), ('norm', bench.REST),
                                        ('grouped_linear', bench.EXPERTS)))
def test_time_is_that_of_the_part_where_it_was_spent(monkeypatch, name, part, again):
    """again: with gradient checkpointing, which goes through the layer a second time"""
    c = Config(vocab_size=64, hidden_size=64, num_hidden_layers=2, n_routed_experts=4, n_shared_experts=1,
               first_k_dense_replace=1)
    t, cpu, model = train.Settings(batch_size=2, block_size=16), torch.device('cpu'), bench.Transformer(c).train()
    (first, layer), calls = model.model.layers, 1
    model.gradient_checkpointing = again
    parts = bench.Parts(model, cpu)
    modules = {'o_proj': layer.self_attn.o_proj, 'gate': layer.mlp.gate, 'norm': model.model.norm,
               'shared_experts': layer.mlp.shared_experts.up_proj, 'mlp': first.mlp.up_proj}
    if name in modules:
        inner = modules[name].forward
        slow = lambda x: (Sleep.apply(y[0]), *y[1:]) if isinstance(y := inner(x), tuple) else Sleep.apply(y)
        monkeypatch.setattr(modules[name], 'forward', slow)
    else:
        calls = 2
        inner = ops.grouped_linear
        monkeypatch.setattr(ops, name, lambda *args: Sleep.apply(inner(*args)))
    step = bench.trainer(model, lambda x, y: model(x, y)[1], 64, t, cpu, torch.float32, bench.adamw(model, cpu),
                         parts.mark)
    found = [parts.times(step) for _ in range(4)][1:]
    wanted = calls * (0.16 if again and name != 'norm' else 0.12)
    assert wanted < min(f[part] for f in found) < wanted + 0.08


def test_cache_bytes_are_those_of_a_cache():
    c = Config(vocab_size=64, num_attention_heads=4, num_hidden_layers=3, kv_lora_rank=24, v_head_dim=32)
    rows = bench.cache_rows(c, torch.bfloat16)
    others = c, bench.replace(c, attention='gqa', num_key_value_heads=1), bench.replace(c, attention='gqa')
    for row, other in zip(rows, others, strict=True):
        cache = Cache(other, 1, 128, torch.empty(0), torch.bfloat16)
        assert row['bytes_per_token'] * 128 == sum(b.numel() * 2 for layer in cache.layers for b in layer)


@pytest.mark.slow
@pytest.mark.parametrize('option, words', (('--vs=nowhere', 'vs=nowhere'), ('--contexts=8,', 'contexts=8,'),
                                           ('--new_tokens=1', 'at least 2')))
def test_a_mistake_is_one_line(tmp_path, option, words):
    done = run(tmp_path, option)
    assert done.returncode == 2 and not done.stdout and len(done.stderr.splitlines()) == 1 and words in done.stderr


@pytest.mark.slow
def test_nothing_is_called_compiled_that_is_not(tmp_path):
    done = run(tmp_path, *TINY, '--compile=true', CXX='no-such-compiler', TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines()[-1].startswith('bench.py: compile=True: torch.compile does not work here (')


@pytest.mark.slow
@pytest.mark.parametrize('optimizer', ('adamw', 'muon'))
def test_a_step_takes_the_memory_of_the_estimate(optimizer):
    c = Config(vocab_size=4096, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, n_shared_experts=1,
               n_routed_experts=4, moe_intermediate_size=1024, kv_lora_rank=128)
    t = train.Settings(batch_size=2, block_size=256, optimizer=optimizer, device='cpu')
    estimate = sum(memory_estimate(bench.Transformer, c, t, pick_device(t)[1], 'cpu'))
    assert 0.9 < estimate / bench.measured_memory(t, c) < 1.1
