"""Tests of bench.py, as users run it, on a model of a few thousand parameters; and of train.py's
estimate of memory, against what the steps of a larger one take."""
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench
import train
from model import ATTENTION, Cache, Config
from nanoseek import ops, parts
from nanoseek.device import pick_device
from nanoseek.estimate import memory_estimate

HERE = Path(bench.__file__).resolve().parent
TINY = ['--hidden_size=64', '--num_hidden_layers=2', '--num_attention_heads=4',
        '--n_routed_experts=4', '--n_shared_experts=1', '--moe_intermediate_size=64',
        '--num_nextn_predict_layers=1', '--batch_size=4', '--block_size=128',
        '--max_position_embeddings=256', '--device=cpu', '--rounds=3', '--contexts=16,512',
        '--batch_sizes=1,2', '--new_tokens=8']
GPT = """
import torch
class GPTConfig:
    def __init__(self, block_size, vocab_size, n_layer, n_head, n_embd, bias):
        self.vocab_size = vocab_size
class GPT(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        print('number of parameters')
        self.table = torch.nn.Embedding(c.vocab_size, c.vocab_size)
    def forward(self, idx, targets):
        logits = self.table(idx).float().view(-1, 256)
        return None, torch.nn.functional.cross_entropy(logits, targets.view(-1))
    def configure_optimizers(self, decay, rate, betas, device):
        return torch.optim.AdamW(self.parameters(), rate, betas)
    def get_num_params(self):
        return self.table.weight.numel()
    def generate(self, idx, n):
        return torch.cat((idx, idx[:, -1:]), 1)
"""


def run(folder, *args, **env):
    return subprocess.run([sys.executable, HERE / 'bench.py', *args], cwd=folder,
                          capture_output=True, text=True, env=os.environ | env)


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp('bench')
    (folder / 'model.py').write_text(GPT, encoding='utf-8')     # nanoGPT's interface
    done = run(folder, *TINY, '--json', f'--vs={folder}', '--optimizer=muon')
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_json_has_every_row(found):
    assert found['machine']['device'] == 'cpu'
    assert found['settings']['optimizer'] == 'muon'
    assert found['data'] == 'random tokens'
    assert found['memory']['measured_bytes'] > 0
    rows = found['training']
    assert [row['name'] for row in rows] == [
        'nanoseek', 'nanoseek, muon', 'nanoseek, dense, same active FLOPs', 'nanoGPT']
    for row in rows:
        assert row['ms'] > 0 and row['mfu'] > 0
        assert row['tokens_per_s'] == pytest.approx(512e3 / row['ms'])
    assert rows[2]['flops_per_token'] == pytest.approx(rows[0]['flops_per_token'], rel=0.02)
    drafting = found['drafting']
    assert 0 < drafting['draft_ms'] < drafting['one_ms'] + drafting['two_ms']
    assert (1 + drafting['breaks_even_at']) * drafting['one_ms'] == pytest.approx(
        drafting['two_ms'] + drafting['draft_ms'])
    decoded = set()
    for row in found['decoding']:
        decoded.add((row['name'], row['context'], row['batch']))
        assert row['ms_per_token'] > 0 and row['first_ms'] > 0
    assert decoded == set(itertools.product(('nanoseek', 'nanoGPT'), (16, 248), (1, 2)))


@pytest.mark.slow
def test_the_parts_of_a_step_are_all_there_and_add_up_to_it(found):
    times = {row['part']: row['ms'] for row in found['parts']}
    assert set(times) == set(parts.ORDER)
    assert min(times.values()) > 0
    assert 0.7 < sum(times.values()) / found['step_of_parts_ms'] < 1.4


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


def slowed(inner):
    """A function that sleeps as well: in its result, or the first of several"""
    def outer(*args):
        result = inner(*args)
        if isinstance(result, tuple):
            first, *others = result
            return Sleep.apply(first), *others
        return Sleep.apply(result)
    return outer


@pytest.mark.parametrize('again', (False, True))
@pytest.mark.parametrize('name, part', (
    ('o_proj', parts.ATTEND), ('gate', parts.ROUTER), ('mlp', parts.DENSE),
    ('shared_experts', parts.DENSE), ('norm', parts.REST), ('grouped_linear', parts.EXPERTS)))
def test_time_is_that_of_the_part_where_it_was_spent(monkeypatch, name, part, again):
    """again: with gradient checkpointing, which goes through the layer a second time"""
    c = Config(vocab_size=64, hidden_size=64, num_hidden_layers=2, n_routed_experts=4,
               n_shared_experts=1, first_k_dense_replace=1)
    cpu = torch.device('cpu')
    model = bench.Transformer(c).train()
    model.gradient_checkpointing = again
    first, layer = model.model.layers
    modules = {'o_proj': layer.self_attn.o_proj, 'gate': layer.mlp.gate, 'norm': model.model.norm,
               'shared_experts': layer.mlp.shared_experts.up_proj, 'mlp': first.mlp.up_proj}
    if name in modules:
        calls = 1
        monkeypatch.setattr(modules[name], 'forward', slowed(modules[name].forward))
    else:
        calls = 2
        monkeypatch.setattr(ops, name, slowed(ops.grouped_linear))
    watched = parts.Parts(model, cpu, bench.KINDS)
    step = bench.trainer(model, bench.plain_loss(model), 64,
                         train.Settings(batch_size=2, block_size=16), cpu, torch.float32,
                         bench.adamw(model, cpu), watched.mark)
    watched.times(step)                     # warms up
    found = [watched.times(step)[part] for _ in range(3)]
    wanted = calls * 0.12
    if again and name != 'norm':
        wanted = calls * 0.16
    assert wanted < min(found) < wanted + 0.08


@pytest.mark.parametrize('unused', (0, 8))
def test_cache_bytes_are_those_of_a_cache(unused):
    """unused: a num_key_value_heads that MLA ignores, and no GQA could have"""
    c = Config(vocab_size=64, num_attention_heads=4, num_hidden_layers=3, kv_lora_rank=24,
               v_head_dim=32, num_key_value_heads=unused)
    gqa = bench.replace(c, attention='gqa', num_key_value_heads=1)
    mha = bench.replace(c, attention='gqa', num_key_value_heads=4)
    rows = bench.cache_rows(ATTENTION, c, torch.bfloat16)
    for row, other in zip(rows, (c, gqa, mha), strict=True):
        cache = Cache(other, 1, 128, torch.empty(0), torch.bfloat16)
        buffers = itertools.chain.from_iterable(cache.layers)
        numbers = sum(buffer.numel() for buffer in buffers)
        assert row['bytes_per_token'] * 128 == 2 * numbers


@pytest.mark.slow
@pytest.mark.parametrize('option, words', (
    ('--vs=nowhere', 'vs=nowhere'), ('--contexts=8,', 'contexts=8,'),
    ('--new_tokens=1', 'at least 2')))
def test_a_mistake_is_one_line(tmp_path, option, words):
    done = run(tmp_path, option)
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr


@pytest.mark.slow
def test_a_folder_says_what_is_measured_and_the_batch_fits_itself(tmp_path):
    model = bench.Transformer(Config(vocab_size=64, hidden_size=32, num_hidden_layers=1))
    model.save_pretrained(tmp_path / 'model')
    done = run(tmp_path, f'--init_from={tmp_path}/model', '--json', '--batch_size=0', '--rounds=1',
               '--global_batch_size=3', '--block_size=16', '--contexts=8', '--batch_sizes=1',
               '--new_tokens=4', '--device=cpu', '--compile=false')
    assert done.returncode == 0, done.stderr
    settings = json.loads(done.stdout)['settings']
    assert settings['hidden_size'] == 32 and settings['num_hidden_layers'] == 1
    assert settings['batch_size'] == 3


@pytest.mark.slow
def test_nothing_is_called_compiled_that_is_not(tmp_path):
    done = run(tmp_path, *TINY, '--compile=true', CXX='no-such-compiler',
               TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert done.returncode == 2 and not done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith('bench.py: compile=True: torch.compile does not work here (')


@pytest.mark.slow
@pytest.mark.parametrize('optimizer', ('adamw', 'muon'))
def test_a_step_takes_the_memory_of_the_estimate(optimizer):
    c = Config(vocab_size=4096, hidden_size=512, num_hidden_layers=6, num_attention_heads=8,
               n_shared_experts=1, n_routed_experts=4, moe_intermediate_size=1024,
               kv_lora_rank=128)
    t = train.Settings(batch_size=2, block_size=256, optimizer=optimizer, device='cpu')
    _, dtype = pick_device(t)
    estimate = sum(memory_estimate(bench.Transformer, c, t, dtype, 'cpu'))
    assert 0.9 < estimate / bench.measured_memory(t, c) < 1.1
