"""Tests of nanoseek/fit.py: what is chosen fits by the estimate, and nothing larger does."""
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import train
from model import Config, Transformer
from nanoseek import fit as fitting
from nanoseek.fit import SAFE, Room, Way, advice, checkpoint_copy, fit, sharded_memory
from support import remembered, train_here

HERE = Path(train.__file__).resolve().parent
CPU = torch.device('cpu')
ENOUGH = 1e15
GPU = torch.device('cuda')          # only its name is looked at
MODEL = Config(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
               attention='gqa')
AUTO = train.Settings(batch_size=0, global_batch_size=12, block_size=64)


@pytest.fixture(autouse=True)
def estimated_once(monkeypatch):
    monkeypatch.setattr(fitting, 'memory_estimate', remembered)


def alone(batch_size, twice=False, settings=AUTO, device='cuda'):
    """Bytes of a rank without others, without a margin"""
    s = replace(settings, batch_size=batch_size, gradient_checkpointing=twice)
    return remembered(Transformer, MODEL, s, torch.float32, device)


def chosen(limit, s=AUTO, device=GPU, shardings=(False,), **ranks):
    room = Room((limit + 0.5) / SAFE, device, **ranks)
    way, memory, line = fit(Transformer, MODEL, s, torch.float32, room, shardings)
    assert memory == alone(way.batch_size, way.twice, s, device.type)
    return way, line


@pytest.mark.slow
def test_the_largest_micro_batch_that_divides_a_step_and_fits_is_taken():
    for size in (1, 2, 3, 4, 6, 12):
        exact = sum(alone(size))
        assert chosen(exact)[0] == Way(size, False, False)
        assert chosen(exact - 1)[0] != Way(size, False, False)
    assert chosen(ENOUGH)[0].batch_size == 12
    assert chosen(ENOUGH, world=4)[0].batch_size == 3         # a rank's share
    between = sum(alone(5))
    assert chosen(between)[0].batch_size == 4


def test_layers_are_computed_twice_only_where_nothing_fits_otherwise():
    least = sum(alone(1))
    way, line = chosen(least - 1)
    assert way.twice and way.batch_size >= 1
    assert 'gradient_checkpointing=true: nothing fits without it' in line
    assert sum(alone(way.batch_size, True)) < least
    asked = replace(AUTO, gradient_checkpointing=True)
    way, line = chosen(ENOUGH, asked)
    assert way == Way(12, True, False) and 'gradient_checkpointing' not in line


def test_a_model_is_shared_only_where_a_whole_one_does_not_fit():
    model = {**asdict(MODEL), 'hidden_size': 256, 'vocab_size': 10, 'num_hidden_layers': 4}
    c = Config(**model)
    s = train.Settings(batch_size=0, global_batch_size=8, block_size=8)
    states, activations = remembered(Transformer, c, replace(s, batch_size=1), torch.float32,
                                     'cuda')
    part = sharded_memory(Transformer, c, torch.float32, states, activations, 4)
    assert part < states + activations
    for limit, sharded in ((states + activations, False), (part, True)):
        room = Room((limit + 0.5) / SAFE, GPU, world=4, local=4)
        way, _, line = fit(Transformer, c, s, torch.float32, room, (False, True))
        assert way.sharded == sharded
        assert ('parallel=fsdp: a whole model does not fit' in line) == sharded
    _, _, line = fit(Transformer, c, s, torch.float32, room, (True,))
    assert 'parallel' not in line                       # it was asked for


def test_on_a_cpu_the_copy_that_a_checkpoint_is_written_from_counts():
    parameters = sum(p.numel() for p in Transformer(MODEL).parameters())
    copy = checkpoint_copy(Transformer, MODEL, AUTO)
    assert copy == 12 * parameters          # weights and two moments, in float32
    exact = sum(alone(3, device='cpu'))
    assert chosen(exact + copy, device=CPU)[0].batch_size == 3
    assert chosen(exact + copy - 1, device=CPU)[0].batch_size == 2
    assert chosen(exact + copy / 2, device=CPU, world=2, local=2)[0].batch_size == 3


def test_where_nothing_fits_a_line_says_what_is_needed_what_there_is_and_what_would_fit():
    smallest = sum(alone(1, True))
    enough = sum(alone(1, True, replace(AUTO, block_size=16)))
    assert enough < 0.8 * smallest
    with pytest.raises(ValueError) as e:
        chosen(enough)
    text = str(e.value)
    found = re.fullmatch(r'1 x 64 tokens need about (\d+) MB of the (\d+) MB that cuda has; less: '
                         r'--block_size=(\d+) \(\d+ MB\)', text)
    assert found, text
    assert int(found[1]) == round(smallest / 2**20)
    assert found[3] == '16'


def test_a_batch_size_that_was_given_stays_and_is_warned_of():
    s = replace(AUTO, batch_size=12)
    way, line = chosen(sum(alone(3)), s)
    assert way == Way(12, False, False)
    assert line.startswith('this may not fit: 12 x 64 tokens need about ')
    way, line = chosen(ENOUGH, s)
    assert way == Way(12, False, False) and line is None


@pytest.mark.slow
def test_advice_names_settings_that_need_less():
    s = train.Settings(batch_size=64, block_size=64)
    way = Way(64, False, False)
    need = sum(alone(64, settings=s))
    room = Room(need / 3, GPU)
    text = advice(Transformer, MODEL, s, torch.float32, room, way)
    found = re.search(r'less: --batch_size=(\d+) --global_batch_size=64 \([\d,]+ MB\), '
                      r'--block_size=(\d+) \([\d,]+ MB\), --gradient_checkpointing=true '
                      r'\([\d,]+ MB\)$', text)
    limit = SAFE * room.limit
    batch_size = int(found[1])
    assert sum(alone(batch_size, settings=s)) <= limit < sum(alone(2 * batch_size, settings=s))
    block_size = int(found[2])
    shorter = replace(s, block_size=block_size)
    longer = replace(s, block_size=2 * block_size)
    assert sum(alone(64, settings=shorter)) <= limit < sum(alone(64, settings=longer))


def test_where_nothing_can_be_less_advice_is_a_smaller_model():
    s = train.Settings(batch_size=1, block_size=1)
    text = advice(Transformer, MODEL, s, torch.float32, Room(1.0, GPU), Way(1, True, False))
    assert text.endswith('; less: a smaller model')
    text = advice(Transformer, MODEL, s, torch.float32, Room(1.0, CPU, 2, 2), Way(1, True, True))
    assert text.endswith('of the 0 MB that each of 2 ranks has; less: fewer ranks')


TINY = ['--hidden_size=32', '--num_hidden_layers=2', '--num_attention_heads=2', '--block_size=32',
        '--max_position_embeddings=64', '--global_batch_size=8', '--eval_steps=2', '--max_steps=6',
        '--log_interval=1', '--eval_interval=3', '--dtype=float32', '--device=cpu',
        '--compile=false', '--out_dir=out']


def losses(folder):
    lines = (folder / 'out/metrics.jsonl').read_text(encoding='utf-8').splitlines()
    entries = [json.loads(line) for line in lines]
    return [entry.get('loss', entry.get('val_loss')) for entry in entries]


def test_losses_do_not_depend_on_the_micro_batch_that_fits(tmp_path):
    text = (HERE / 'data/shakespeare/input.txt').read_text(encoding='utf-8')[:20000]
    (tmp_path / 'text.txt').write_text(text, encoding='utf-8')
    subprocess.run([sys.executable, HERE / 'prepare.py', 'text.txt', '--out_dir=data'],
                   cwd=tmp_path, check=True, capture_output=True)
    found = []
    for batch_size in (0, 8, 2, 1):
        folder = tmp_path / str(batch_size)
        evaluated = 16 // max(batch_size, 1)        # as many sequences in each of the four
        if batch_size == 0:
            evaluated = 2                           # of global_batch_size
        status = train_here(folder, *TINY, f'--dataset={tmp_path}/data',
                            f'--batch_size={batch_size}', f'--eval_steps={evaluated}')
        assert status == 0
        found.append(losses(folder))
    settings = json.loads((tmp_path / '0/out/settings.json').read_text(encoding='utf-8'))
    assert settings['batch_size'] == 8 and settings['eval_steps'] == 2
    assert found[0] == found[1]
    for other in found[2:]:
        assert other == pytest.approx(found[0], rel=1e-5)


def test_without_a_global_batch_size_there_is_nothing_to_fit():
    with pytest.raises(ValueError, match='batch_size=0: as many .* --global_batch_size=32'):
        train.Settings(batch_size=0)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='ulimit is POSIX')
def test_a_run_in_little_memory_takes_a_smaller_micro_batch(tmp_path):
    command = [sys.executable, HERE / 'train.py', HERE / 'config/smol135_dense.py',
               '--num_hidden_layers=2', '--max_steps=0']
    sizes = []
    for gigabytes in (30, 5):
        limited = f'ulimit -v {gigabytes * 2**20}; exec "$@"'
        done = subprocess.run(['bash', '-c', limited, 'bash', *command], capture_output=True,
                              text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        line = done.stdout.splitlines()[-1]
        sizes.append(int(re.match(r'batch_size=(\d+): needs about ', line)[1]))
    assert sizes[0] > sizes[1] >= 1
