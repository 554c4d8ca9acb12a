"""Tests of nanoseek/dial.py"""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import train
from model import ATTENTION, Config, Transformer
from nanoseek import dial
from nanoseek.estimate import cache_rows

HERE = Path(__file__).parent.parent
DENSE = {'attention': 'gqa', 'n_routed_experts': 0}


def turn(depth, model=None, vocab_size=1024, **given):
    given, model = dial.turn({'depth': depth, **given}, model or {}, vocab_size, Transformer,
                             Config)
    return train.Settings(**given), Config(**{'vocab_size': vocab_size, **model})


def counted_flops(c, T=32):
    """FLOPs of a forward pass for each token, counted by torch on tensors without data. A model
    with experts is counted as the dense one that a token meets"""
    width = c.intermediate_size
    if c.n_routed_experts:
        width = c.moe_intermediate_size * (c.n_shared_experts + c.num_experts_per_tok)
    same = {**vars(c), 'n_routed_experts': 0, 'n_shared_experts': 0, 'intermediate_size': width}
    with FakeTensorMode(), FlopCounterMode(display=False) as counter, torch.no_grad():
        model = Transformer(Config(**same))
        model(torch.zeros(1, T, dtype=torch.int64))
    return counter.get_total_flops() / T


@pytest.mark.parametrize('depth', range(1, 13))
def test_the_forms_of_a_depth_cost_the_same_and_the_latent_is_at_most_half_a_cache(depth):
    _, c = turn(depth)
    _, dense = turn(depth, DENSE)
    assert c.num_hidden_layers == dense.num_hidden_layers == depth
    assert c.num_attention_heads * c.v_head_dim == c.hidden_size
    near = 0.05
    if c.num_attention_heads % 2:           # then no key/value heads can be saved
        near = 0.12
    assert counted_flops(c) == pytest.approx(counted_flops(dense), rel=near)
    latent, *_ = cache_rows(ATTENTION, c, torch.float32)
    gqa, *_ = cache_rows(ATTENTION, dense, torch.float32)
    most = 0.5
    if depth == 1:
        most = 0.75
    assert latent['bytes_per_token'] <= most * gqa['bytes_per_token']


@pytest.mark.parametrize('depth, model', [(1, {}), (3, {}), (3, DENSE), (8, {})])
def test_a_run_has_so_many_tokens_for_each_weight(depth, model):
    s, c = turn(depth, model)
    weights = counted_flops(c, T=1) / 2             # attention to one token is next to nothing
    taken = s.max_steps * s.global_batch_size * s.block_size
    assert s.tokens / weights == pytest.approx(dial.TOKENS_PER_WEIGHT, rel=0.03)
    assert taken == pytest.approx(s.tokens, rel=0.01)


def test_deeper_models_get_lower_rates_and_larger_steps():
    runs = [turn(depth)[0] for depth in range(1, 13)]
    rates = [s.learning_rate for s in runs]
    steps = [s.global_batch_size * s.block_size for s in runs]
    assert rates == sorted(rates, reverse=True)
    assert steps == sorted(steps)
    assert turn(4, tokens=10 ** 10)[0].global_batch_size > turn(4)[0].global_batch_size


@pytest.mark.parametrize('depth, best', [(1, 1.7e-2), (2, 9.4e-3), (3, 7.7e-3)])
def test_the_learning_rate_is_near_the_best_of_the_sweeps_in_the_docs(depth, best):
    s, _ = turn(depth)
    assert 1 / 1.4 < s.learning_rate / best < 1.4


def test_what_was_given_stays_and_the_rest_follows_from_it():
    s, c = turn(4, {'hidden_size': 512, 'n_routed_experts': 24}, learning_rate=1e-4, max_steps=7,
                out_dir='out/mine')
    assert (s.learning_rate, s.max_steps, s.out_dir) == (1e-4, 7, 'out/mine')
    assert (c.num_hidden_layers, c.hidden_size, c.n_routed_experts) == (4, 512, 24)
    _, wide = turn(8)                               # whose width it is
    assert c.num_attention_heads == wide.num_attention_heads
    assert c.kv_lora_rank == wide.kv_lora_rank
    assert s.tokens == 7 * s.global_batch_size * s.block_size
    assert turn(4, tokens=0, global_batch_size=0) == turn(4)
    twice, _ = turn(2, tokens=turn(2)[0].tokens * 2)
    assert twice.max_steps > 1.2 * turn(2)[0].max_steps


@pytest.mark.parametrize('args, problem', [
    (['--tokens=5'], 'tokens=5: is for runs with a depth'),
    (['--depth=-1'], 'depth=-1: must be at least 0'),
    (['--depth=2', '--init_from=out/a'], 'init_from brings one'),
    (['--depth=2', '--num_attention_heads=0'], 'num_attention_heads=0'),
    (['--depht=2'], "did you mean 'depth'"),
])
def test_what_cannot_be_is_one_line(args, problem, tmp_path):
    done = subprocess.run([sys.executable, HERE / 'train.py', *args], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and problem in done.stderr and done.stderr.count('\n') == 1


@pytest.mark.parametrize('script', ['train.py', 'train_ddp.py'])
def test_max_steps_0_prints_the_run(script, tmp_path):
    done = subprocess.run([sys.executable, HERE / script, '--depth=1', '--max_steps=0'],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    s, _ = turn(1, vocab_size=256)
    found = re.search(r'depth 1: ([\d,]+) tokens, 20 for each of .* in ([\d,]+) steps', done.stdout)
    tokens, steps = (int(text.replace(',', '')) for text in found.groups())
    assert (tokens, steps) == (s.tokens, s.max_steps)
    assert 'at 40% of the rate of a matmul here' in done.stdout


@pytest.mark.slow
def test_two_ranks_share_its_step(tmp_path):
    text = tmp_path / 'abc.txt'
    text.write_text('abcdefgh' * 2000)
    go = [sys.executable, HERE / 'prepare.py', text, '--out_dir=data/abc']
    subprocess.run(go, cwd=tmp_path, check=True, capture_output=True)
    go = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
          HERE / 'train_ddp.py', '--depth=1', '--dataset=abc', '--tokens=20000', '--device=cpu']
    done = subprocess.run([sys.executable, *go], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'out/depth-1/metrics.jsonl').is_file()


def test_a_run_of_the_dial_is_trained_shown_and_goes_on(tmp_path):
    text = tmp_path / 'abc.txt'
    text.write_text('abcdefgh' * 2000)
    go = [sys.executable, HERE / 'prepare.py', text, '--out_dir=data/abc']
    subprocess.run(go, cwd=tmp_path, check=True, capture_output=True)
    go = [sys.executable, HERE / 'train.py', '--depth=1', '--dataset=abc', '--tokens=20000']
    first = subprocess.run(go, cwd=tmp_path, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    settings = json.loads((tmp_path / 'out/depth-1/settings.json').read_text())
    s, c = turn(1, vocab_size=settings['vocab_size'], tokens=20000)
    for name in ('depth', 'tokens', 'max_steps', 'learning_rate', 'global_batch_size'):
        assert settings[name] == getattr(s, name), name
    for name in ('hidden_size', 'kv_lora_rank', 'moe_intermediate_size'):
        assert settings[name] == getattr(c, name), name
    assert 'times the training split' not in first.stdout
    again = subprocess.run(go, cwd=tmp_path, capture_output=True, text=True)
    assert 'is complete' in again.stdout
    go[-1] = '--max_steps=0'
    often = subprocess.run(go, cwd=tmp_path, capture_output=True, text=True)
    count = json.loads((tmp_path / 'data/abc/meta.json').read_text())['splits']['train']['tokens']
    times, allowed = re.search(r'tokens are (\d+) times .*--tokens=(\d+)', often.stdout).groups()
    assert int(times) == pytest.approx(turn(1, vocab_size=9)[0].tokens / count, rel=0.05)
    assert int(allowed) <= 4 * count
