"""train.py against what goes wrong: stops and kills, numbers that are not finite, damaged files.

Faults are put into real runs of a tiny model, and what remains is compared bit for bit with a run
that nothing happened to. NANOSEEK_KILLS=50 kills a run more often than 5 times.
"""
import copy
import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT, hooks, metrics, run, train_here
from model import Transformer
from nanoseek import checkpoint, log, settings
from nanoseek.tokens import open_data

DENSE = ('--attention=gqa --hidden_size=32 --num_hidden_layers=2 --num_attention_heads=2 '
         '--num_key_value_heads=1 --head_dim=16 --max_position_embeddings=64 --block_size=32 '
         '--initializer_range=0.1 --batch_size=4 --learning_rate=1e-2 --warmup_steps=5 '
         '--log_interval=1 --keep_checkpoints=0 --device=cpu --dtype=float32 --out_dir=out ')
MOE = DENSE + ('--attention=mla --kv_lora_rank=16 --qk_nope_head_dim=8 --qk_rope_head_dim=4 '
               '--v_head_dim=10 --n_routed_experts=4 --n_shared_experts=1 '
               '--num_experts_per_tok=2 --moe_intermediate_size=16 --bias_update_speed=0.01 '
               '--num_nextn_predict_layers=1 ')
TIMES = {'elapsed_s', 'step_ms', 'tok_per_s', 'mfu', 'memory_mb'}
RUN = '--max_steps=12 --checkpoint_interval=3'


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """A thousand characters: seven steps of four sequences are an epoch."""
    folder = tmp_path_factory.mktemp('data')
    text = (ROOT / 'data/shakespeare/input.txt').read_text(encoding='utf-8')
    for name, part in {'small': text[:1000], 'other': text[:1000].swapcase()}.items():
        (folder / f'{name}.txt').write_text(part, encoding='utf-8')
        run(folder, 'prepare.py', f'{name}.txt', f'--out_dir={name}').check_returncode()
    return folder / 'small'


@pytest.fixture
def go(capfd, data):
    """Return a function that trains in a folder -> exit status, out and err."""
    def go(folder, options, base=MOE):
        capfd.readouterr()
        status = train_here(folder, f'--dataset={data}', *base.split(), *options.split())
        out, err = capfd.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)
    return go


@pytest.fixture(scope='session')
def whole(tmp_path_factory, data):
    """A complete run"""
    folder = tmp_path_factory.mktemp('whole')
    assert train_here(folder, f'--dataset={data}', *MOE.split(), *RUN.split()) == 0
    return folder


@pytest.fixture
def part(whole, tmp_path):
    """The same run, as if it had been killed while step 12 was written"""
    folder = shutil.copytree(whole, tmp_path / 'part')
    shutil.rmtree(folder / 'out/step-000012')
    return folder


def process(folder, data, options, patch=''):
    """Start train.py in a process of its own, after a line of Python."""
    folder.mkdir(exist_ok=True)
    code = f'import os, runpy, time\n{patch}\nrunpy.run_module("train", run_name="__main__")'
    args = [f'--dataset={data}', *MOE.split(), *options.split()]
    return subprocess.Popen([sys.executable, '-c', code, *args], cwd=folder, text=True,
                            env={**os.environ, 'PYTHONPATH': str(ROOT)},
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait(condition, p):
    while not condition() and p.poll() is None:
        time.sleep(0.005)


def saved(folder):
    return [checkpoint.step_of(path) for path in checkpoint.checkpoints(folder / 'out')]


def numbers(folder):
    """{(step, kind of line): line} of metrics.jsonl, each once, without times"""
    entries = {}
    for line in map(json.loads, (folder / 'out/metrics.jsonl').open()):
        kind = line.get('event', 'val' if 'val_loss' in line else 'train')
        assert (line['step'], kind) not in entries
        entries[line['step'], kind] = {k: v for k, v in line.items() if k not in TIMES}
    return entries


def state(folder, step):
    return torch.load(folder / f'out/step-{step:06d}/trainer/state.pt')


def assert_same_end(a, b, step):
    """Two runs in folders a and b have the same checkpoint, bit for bit."""
    file = f'out/step-{step:06d}/model.safetensors'
    assert (a / file).read_bytes() == (b / file).read_bytes()
    torch.testing.assert_close(state(a, step), state(b, step), rtol=0, atol=0)


def tree(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


# ------------------------------------------------------------------------------ stops and kills

def stopping(step, how):
    """A signal, or the end of max_minutes, during a step"""
    def stop(at):
        if at.step == step and how == 'max_minutes':
            log.STARTED = 0
        elif at.step == step:
            signal.raise_signal(getattr(signal, how))
    return hooks(start=stop)


@pytest.mark.slow
@pytest.mark.parametrize('base', [
    MOE, MOE + '--dtype=float16', DENSE + '--dtype=bfloat16 --dropout=0.1',
    DENSE + '--attention=linear --batch_size=2 --global_batch_size=4'],
    ids=['moe-mtp', 'float16', 'bfloat16-dropout', 'linear-accumulation'])
def test_a_run_stopped_three_times_is_the_undisturbed_one(tmp_path, monkeypatch, go, base):
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0 ** 24, growth_interval=7)
    monkeypatch.setattr(torch.amp, 'GradScaler', scaler)            # overflows at first
    options = ('--max_steps=20 --checkpoint_interval=100 --eval_interval=6 --max_minutes=1000 '
               '--max_bad_steps=1')
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)      # as nohup has it
    with stopping(10, 'SIGHUP'):
        assert go(whole, options, base).status == 0
    signal.signal(signal.SIGHUP, ignored)
    stops = {4: 'SIGINT', 9: 'SIGTERM', 15: 'max_minutes'}      # epochs end after 7 and 14 steps
    for step, how in stops.items():
        with stopping(step, how):
            done = go(parts, options, base)
        assert done.status == 0
        assert how in done.out
        assert f'stopped after step {step};' in done.out
    assert go(parts, options, base).status == 0
    assert saved(parts) == [*stops, 20]
    assert_same_end(parts, whole, 20)
    lines = numbers(parts)
    for step in stops:
        del lines[step, 'val']
    assert lines == numbers(whole)
    if base.endswith('=float16'):           # the first steps change nothing but the scale
        first = Transformer.from_pretrained(parts / 'out/step-000004')
        assert not first.moe_layers[0].gate.e_score_correction_bias.any()
        assert state(parts, 4)['scaler']['scale'] == 2.0 ** 20


def last_step(folder):
    file = folder / 'out/metrics.jsonl'
    return file.read_text().count('"loss"') if file.exists() else 0


@pytest.mark.slow
def test_a_run_killed_at_random_instants_ends_as_if_it_had_not_been(tmp_path, data, go):
    """After some steps; every other time while the next checkpoint is written"""
    kills = int(os.environ.get('NANOSEEK_KILLS', 5))
    rng = random.Random(1)
    options = f'--max_steps={14 * kills} --checkpoint_interval=5 --eval_interval=9'
    hit, whole = tmp_path / 'hit', tmp_path / 'whole'
    halves = 0
    for i in range(kills):
        goal = last_step(hit) + rng.randint(1, 8)
        with process(hit, data, options) as p:
            wait(lambda: last_step(hit) >= goal, p)
            if i % 2 == 0:
                wait(lambda: list(hit.glob('out/.step-*.tmp')), p)
            time.sleep(0.04 * rng.random() ** 2)
            p.kill()
            assert p.stderr.read() == ''                # no checkpoint was ever damaged
        assert p.returncode == -signal.SIGKILL
        assert last_step(hit) - max([0, *saved(hit)]) <= 5
        halves += len(list(hit.glob('out/.step-*.tmp')))
    assert halves > 0
    assert go(hit, options).status == 0
    assert go(whole, options).status == 0
    assert saved(hit) == saved(whole)
    assert numbers(hit) == numbers(whole)
    assert_same_end(hit, whole, 14 * kills)


@pytest.mark.slow
def test_a_second_sigint_ends_at_once_and_the_next_run_clears_up(tmp_path, data, go, whole):
    hit = tmp_path / 'hit'
    with process(hit, data, RUN, 'os.fsync = lambda descriptor: time.sleep(0.5)') as p:
        wait(lambda: list(hit.glob('out/.step-000003.tmp')), p)
        while p.poll() is None:
            p.send_signal(signal.SIGINT)
            time.sleep(0.1)
    assert p.returncode == 130
    assert saved(hit) == []
    assert list(hit.glob('out/.step-000003.tmp'))
    assert go(hit, RUN).status == 0
    assert saved(hit) == [3, 6, 9, 12]
    assert not list(hit.glob('out/.*.tmp'))
    assert_same_end(hit, whole, 12)


# --------------------------------------------------------------------- numbers that are not finite

@pytest.mark.parametrize('name', ['model.embed_tokens.weight',
                                  'model.layers.1.mlp.experts.down_proj'])
def test_a_step_with_nan_in_a_gradient_is_skipped_and_changes_nothing(tmp_path, data, go, name):
    snapshots = []

    def snapshot(at):
        if at.step == 4:
            snapshots.append(copy.deepcopy([at.model.state_dict(), at.optimizer.state_dict()]))

    def spoil(at):
        snapshot(at)
        if at.step == 4:
            dict(at.model.named_parameters())[name].grad.view(-1)[3] = torch.nan
    with hooks(backward=spoil, end=snapshot):
        assert go(tmp_path, '--max_steps=6 --checkpoint_interval=3').status == 0
    assert metrics(tmp_path / 'out', 'where') == {4: f'the gradient of {name}'}
    torch.testing.assert_close(*snapshots, rtol=0, atol=0)

    losses = metrics(tmp_path / 'out')
    assert list(losses) == [1, 2, 3, 5, 6]
    assert losses[5] == pytest.approx(loss_on(data, tmp_path / 'out/step-000003', 5), rel=1e-6)


def loss_on(data, folder, step):
    """The loss of a checkpoint on the data of a step"""
    model = Transformer.from_pretrained(folder).train()
    x, y = open_data(str(data)).batch('train', range(4 * step - 4, 4 * step), 32, 1337)
    model(torch.from_numpy(x), torch.from_numpy(y))
    return model.losses['loss'].item()


def infinite_output(out):
    if isinstance(out, tuple):
        return infinite_output(out[0]), *out[1:]
    return out.index_fill(-1, torch.tensor(5), torch.inf)


def infinite_gradient(out):
    if out[0].requires_grad:
        out[0].register_hook(lambda gradient: gradient * torch.inf)


def spoil_weight(at):
    with torch.no_grad():
        at.model.model.layers[1].self_attn.o_proj.weight[0, 0] = torch.nan


def broken_once(step):
    """A weight that breaks between the gradient and the step"""
    hit = []

    def spoil(at):
        if at.step == step and not hit:
            hit.append(spoil_weight(at))
    return hooks(backward=spoil)


def test_a_broken_weight_brings_the_run_back_and_on_with_later_data(tmp_path, data, go):
    """The reference starts from a copy of that checkpoint, further on in the data."""
    options = '--max_steps=24 --checkpoint_interval=5 --eval_interval=5'
    hit, reference = tmp_path / 'hit', tmp_path / 'reference'
    with broken_once(13):
        done = go(hit, options)
    assert 'step-000015 is not written' in done.out
    where = 'the weight model.layers.1.self_attn.o_proj.weight'
    assert metrics(hit / 'out', 'where') == dict.fromkeys(range(14, 19), where)
    assert metrics(hit / 'out', 'checkpoint') == {11: 'out/step-000010'}
    loss = loss_on(data, hit / 'out/step-000010', 19)
    assert metrics(hit / 'out')[11] == pytest.approx(loss, rel=1e-6)

    shutil.copytree(hit / 'out/step-000010', reference / 'out/step-000010')
    moved_on = {**state(reference, 10), 'skipped': 8, 'rollbacks': 1}
    torch.save(moved_on, reference / 'out/step-000010/trainer/state.pt')
    assert go(reference, options).status == 0
    assert_same_end(hit, reference, 24)
    later = {key: line for key, line in numbers(hit).items() if key[0] > 10 and 'lr' in line}
    assert later.items() <= numbers(reference).items()
    assert [step for step, _ in later] == list(range(11, 25))


def test_a_run_that_went_back_and_was_stopped_continues_as_if_not_stopped(tmp_path, go):
    options = '--max_steps=12 --checkpoint_interval=3 --max_bad_steps=2'
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    with broken_once(5):
        assert go(whole, options).status == 0
    with broken_once(5), stopping(8, 'SIGINT'):
        assert go(parts, options).status == 0
    assert saved(parts)[-1] == 8
    assert go(parts, options).status == 0
    assert state(parts, 12)['skipped'] > 0
    assert_same_end(parts, whole, 12)


@pytest.mark.parametrize('first, rollbacks, steps', [(10, {9: 2}, [4, 8]), (1, {}, [])])
def test_a_run_that_always_breaks_ends_with_advice(tmp_path, go, first, rollbacks, steps):
    def spoil(at):
        if at.step >= first:
            spoil_weight(at)
    with hooks(start=spoil):
        done = go(tmp_path, '--max_steps=30 --checkpoint_interval=4 --eval_interval=3 '
                            '--max_bad_steps=3 --max_rollbacks=2')
    assert done.status == 1
    assert '3 steps in a row were not finite' in done.out.splitlines()[-1]
    assert 'lower learning_rate (it is 0.01)' in done.out.splitlines()[-1]
    assert metrics(tmp_path / 'out', 'rollbacks') == rollbacks
    assert saved(tmp_path) == [*steps]


# ------------------------------------------------------------------------ damaged, or different

def test_if_the_newest_checkpoint_is_damaged_the_one_before_continues(part, whole, go, caplog):
    os.truncate(part / 'out/step-000009/model.safetensors', 1000)
    done = go(part, RUN)
    assert 'step-000009 is damaged' in caplog.text
    assert 'continuing from out/step-000006' in done.out
    assert saved(part) == [3, 6, 9, 12]
    assert numbers(part) == numbers(whole)
    assert_same_end(part, whole, 12)


@pytest.mark.parametrize('name, value, word', [
    ('seed', 7, 'seed=1337'), ('block_size', 16, 'block_size=32'), ('batch_size', 8, 'batch=4'),
    ('global_batch_size', 8, 'batch=4'), ('embedding_lr', 3, 'embedding_lr=1.0'),
    ('optimizer', 'muon', 'optimizer=adamw'), ('dataset', 'DATA/../other', 'data=small'),
    ('num_hidden_layers', 3, 'num_hidden_layers=2'), ('attention', 'gqa', 'was trained with'),
    ('dropout', 0.2, 'dropout=0.0'), ('resume', 'out/step-000004', 'resume=out/step-000004'),
    ('max_steps', 9, 'is complete')])
def test_what_does_not_continue_is_one_line_and_changes_nothing(part, go, data, name, value, word):
    before = tree(part)
    done = go(part, f'{RUN} --{name}={value}'.replace('DATA', str(data)))
    assert done.status == (0 if name == 'max_steps' else 2)
    line, end = (done.out + done.err).split('\n')
    assert word in line
    assert tree(part) == before


@pytest.mark.parametrize('options', ['--batch_size=2 --global_batch_size=4', '--dtype=float16',
                                     '--weight_decay=0.3'])
def test_what_may_change_counts_from_where_the_run_continues(part, go, options):
    assert go(part, f'{RUN} {options}').status == 0
    decay = state(part, 12)['optimizer']['param_groups'][0]['weight_decay']
    assert decay == pytest.approx(0.3 if '0.3' in options else 0.1)


def test_a_second_process_in_the_same_folder_is_refused(part, go):
    before = tree(part)
    with settings.lock(part / 'out'):
        done = go(part, RUN)
    assert done.status == 2
    assert 'another process is writing to out' in done.err
    assert tree(part) == before


def test_out_of_memory_is_one_line_with_what_helps(tmp_path, go):
    with hooks(start=lambda at: torch.empty(1 << 50)):
        done = go(tmp_path, RUN)
    assert done.status == 2
    assert done.err.count('\n') == 1
    assert 'out of memory: use a smaller --batch_size' in done.err


def test_a_file_that_cannot_be_written_is_one_line_and_no_checkpoint(tmp_path, go):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))     # state.pt is larger
    try:
        done = go(tmp_path, RUN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.status == 2
    assert done.err.count('\n') == 1
    assert 'out/step-000003 could not be written' in done.err
    assert saved(tmp_path) == []
