"""Tests of train.py against what goes wrong: stops and kills, numbers that are not finite,
damaged files, full disks and memories. Faults are put into real runs of a tiny model, in this
process where that is possible, and what is left is compared bit for bit with a run that nothing
happened to. NANOSEEK_KILLS=50 kills a run more often than 5 times."""

import contextlib, fcntl, functools, json, os, pty, random, re, resource, runpy, shutil, signal, struct, subprocess
import sys, termios, time, zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import prepare, train
from model import Transformer
from support import hooks, train_here

HERE = Path(train.__file__).resolve().parent
DENSE = [
    '--attention=gqa',
    '--hidden_size=32',
    '--num_hidden_layers=2',
    '--num_attention_heads=2',
    '--max_position_embeddings=64',
    '--initializer_range=0.1',
    '--block_size=32',
    '--batch_size=4',
    '--learning_rate=1e-2',
    '--warmup_steps=5',
    '--log_interval=1',
    '--keep_checkpoints=0',
    '--device=cpu',
    '--dtype=float32',
    '--out_dir=out/tiny',
]
MOE = [
    *DENSE,
    '--n_routed_experts=4',
    '--n_shared_experts=1',
    '--num_experts_per_tok=2',
    '--moe_intermediate_size=16',
    '--bias_update_speed=0.01',
]
TINY = [
    *MOE,
    '--attention=mla',
    '--kv_lora_rank=16',
    '--qk_nope_head_dim=8',
    '--qk_rope_head_dim=4',
    '--v_head_dim=10',
    '--num_nextn_predict_layers=1',
]
TIMES = {'elapsed_s', 'step_ms', 'tok_per_s', 'mfu', 'memory_mb'}


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """A thousand characters: an epoch is seven steps of four sequences"""
    folder = tmp_path_factory.mktemp('data')
    (folder / 'small.txt').write_text((HERE / 'data/shakespeare/input.txt').read_text()[:1000])
    prepare.prepare(prepare.Settings(str(folder / 'small.txt'), out_dir=str(folder / 'small')))
    return folder / 'small'


def call(folder, data, *args, base=DENSE):
    return train_here(folder, *base, f'--dataset={data}', *args)


@pytest.fixture
def go(capfd, data):
    """call -> exit status, and what was printed"""

    def go(folder, *args, base=DENSE):
        capfd.readouterr()
        status = call(folder, data, *args, base=base)
        return SimpleNamespace(
            returncode=status, **dict(zip(('stdout', 'stderr'), capfd.readouterr()))
        )

    return go


def stopping(step, how):
    """A signal, or the end of max_minutes, in a step"""

    def stop(at):
        if at.step == step and how == 'max_minutes':
            train.STARTED = 0
        elif at.step == step:
            signal.raise_signal(getattr(signal, how))

    return hooks(start=stop)


def refuse(word):
    raise AssertionError(f'{word} is not JSON')


def metrics(folder):
    lines = (folder / 'out/tiny/metrics.jsonl').read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def numbers(folder):
    """Of metrics.jsonl all but times: {(step, kind of line): entry}, each once"""
    entries = [{k: v for k, v in m.items() if k not in TIMES} for m in metrics(folder)]
    found = {(m['step'], 'val' if 'val_loss' in m else m.get('event', 'train')): m for m in entries}
    assert len(found) == len(entries)
    return found


def events(folder, *names):
    return [m for m in metrics(folder) if m.get('event') in names]


def steps(folder, kind='train'):
    return [step for step, k in numbers(folder) if k == kind]


def checkpoint(folder, step):
    return folder / f'out/tiny/step-{step:06d}'


def names(folder):
    """Of all checkpoints, and of what is left of them"""
    return sorted(p.name for p in (folder / 'out/tiny').iterdir() if 'step' in p.name)


def bits(x):
    """Something that equals another only if all tensors in it are the same bit for bit"""
    if isinstance(x, dict):
        return {k: bits(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [bits(v) for v in x]
    return (x.dtype, x.shape, x.numpy().tobytes()) if isinstance(x, torch.Tensor) else x


def content(folder, step):
    """Weights, optimizer, random numbers and all else of a checkpoint that training goes on from"""
    path = checkpoint(folder, step)
    return bits(load_file(path / 'model.safetensors')), bits(
        torch.load(path / 'trainer/state.pt', weights_only=True)
    )


def whole(path):
    """A checkpoint has the files of its manifest and no others, with their checksums, and they
    load"""
    manifest = json.loads((path / 'trainer/manifest.json').read_text())
    files = {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob('*') if p.is_file()}
    del files['trainer/manifest.json']
    weights, state = (
        load_file(path / 'model.safetensors'),
        torch.load(path / 'trainer/state.pt', weights_only=True),
    )
    return (
        {name: [len(b), zlib.crc32(b)] for name, b in files.items()} == manifest
        and len(state['optimizer']) == 2
        and all(t.isfinite().all() for t in weights.values())
        and state['step'] == int(path.name[5:])
    )


def all_whole(folder):
    found = names(folder)
    return all(n.startswith('step-') and whole(folder / 'out/tiny' / n) for n in found)


def sign(path):
    """Puts the checksums of the files as they are into the manifest"""
    file = path / 'trainer/manifest.json'
    sums = {n: (path / n).read_bytes() for n in json.loads(file.read_text())}
    file.write_text(json.dumps({n: [len(b), zlib.crc32(b)] for n, b in sums.items()}))


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def process(folder, data, *args, base=DENSE, patch='', **settings):
    """train.py in a process of its own, with a line of Python before it begins"""
    code = (
        'import sys; sys.path.insert(0, {!r}); import os, time, config, train\n{}\n'
        'given, model = config.load(train.Settings, train.Config)\n'
        'train.main(train.Settings(**given), model, train.OneDevice())'
    )
    start = ['-c', code.format(str(HERE), patch)] if patch else [HERE / 'train.py']
    folder.mkdir(exist_ok=True, parents=True)
    return subprocess.Popen(
        [sys.executable, *start, *base, f'--dataset={data}', *map(str, args)],
        cwd=folder,
        **{'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True, **settings},
    )


def wait(true, process, seconds=60):
    """Until true() or the process has ended -> whether it is true"""
    end = time.time() + seconds
    while not (found := true()) and process.poll() is None and time.time() < end:
        time.sleep(0.001)
    return found


# ------------------------------------------------------------------------------------------------
# Going on

KINDS = {
    'moe-mtp-float32': TINY,
    'moe-mtp-bfloat16': [*TINY, '--dtype=bfloat16'],
    'float16': [*TINY, '--dtype=float16'],
    'dropout': [*DENSE, '--dropout=0.1'],
    'accumulation': [*DENSE, '--attention=linear', '--batch_size=2', '--global_batch_size=4'],
}


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_a_run_stopped_three_times_is_bit_for_bit_the_undisturbed_one(
    tmp_path, monkeypatch, go, kind
):
    scaler = functools.partial(
        torch.amp.GradScaler, init_scale=2.0**24, growth_interval=7
    )  # overflows at first
    monkeypatch.setattr(torch.amp, 'GradScaler', scaler)
    args = [
        '--max_steps=20',
        '--checkpoint_interval=100',
        '--eval_interval=6',
        '--max_minutes=1000',
    ]
    assert go(tmp_path / 'whole', *args, base=KINDS[kind]).returncode == 0
    stops = {4: 'SIGINT', 9: 'SIGTERM', 15: 'max_minutes'}  # epochs end after 7 and 14 steps
    for step, how in stops.items():
        with stopping(step, how):
            done = go(tmp_path / 'parts', *args, base=KINDS[kind])
        assert (
            done.returncode == 0
            and f'{how}' in done.stdout
            and f'stopped after step {step};' in done.stdout
        )
    assert go(tmp_path / 'parts', *args, base=KINDS[kind]).returncode == 0
    assert names(tmp_path / 'parts') == [f'step-{n:06d}' for n in (*stops, 20)]
    parts, undisturbed = numbers(tmp_path / 'parts'), numbers(tmp_path / 'whole')
    assert set(parts) - set(undisturbed) == {(step, 'val') for step in stops}
    assert {key: parts[key] for key in undisturbed} == undisturbed
    assert steps(tmp_path / 'parts') == list(range(1, 21))
    assert content(tmp_path / 'parts', 20) == content(tmp_path / 'whole', 20)
    if kind == 'float16':
        states = [content(tmp_path / 'parts', n)[1]['scaler'] for n in stops]
        assert states[0]['scale'] < 2.0**24 and len({str(s) for s in states}) == 3


def kill(command, folder, rng, step, mode):
    """Starts a run and kills it: some time after its start, some steps further than step, or
    while it writes a checkpoint"""
    end, goal, out = time.time() + rng.uniform(0, 4), step + rng.randint(1, 10), folder / 'out/tiny'
    with command() as p:
        if mode == 'start':
            wait(lambda: time.time() > end, p)
        elif wait(lambda: last_step(folder) >= goal, p) and mode == 'write':
            wait(lambda: list(out.glob('.step-*.tmp')), p)
        time.sleep(0.04 * rng.random() ** 2)
        p.kill()
    assert p.returncode == -signal.SIGKILL, 'the run was complete'


def last_step(folder):
    file = folder / 'out/tiny/metrics.jsonl'
    whole_lines = file.read_text().splitlines() if file.exists() else []
    return max((json.loads(line)['step'] for line in whole_lines if line.endswith('}')), default=0)


def newest(folder):
    return max((int(n[5:]) for n in names(folder) if n.startswith('step-')), default=0)


@pytest.mark.slow
def test_a_run_killed_at_random_instants_ends_as_if_it_had_not_been(tmp_path, data, capsys):
    kills, rng, every, began = (
        int(os.environ.get('NANOSEEK_KILLS', 5)),
        random.Random(1),
        5,
        time.time(),
    )
    args = [
        f'--max_steps={14 * kills}',
        f'--checkpoint_interval={every}',
        '--keep_checkpoints=2',
        '--eval_interval=9',
    ]
    folder, lost, written, log = tmp_path / 'killed', [], [], tmp_path / 'killed/out/tiny/train.log'
    errors = open(tmp_path / 'stderr', 'w')
    command = lambda: process(
        folder, data, *args, base=MOE, stdout=subprocess.DEVNULL, stderr=errors
    )
    log.parent.mkdir(parents=True)
    for i in range(kills):
        started = time.time()
        kill(
            command,
            folder,
            rng,
            newest(folder),
            ('write', 'step', 'write', 'write', 'start')[i % 5],
        )
        lost.append(last_step(folder) - newest(folder))
        left = [tmp for tmp in log.parent.glob('.step-*.tmp') if tmp.stat().st_mtime > started]
        written += [sum(p.is_file() for p in tmp.rglob('*')) for tmp in left]
        saved = re.findall(r'saved \S+/step-(\d+) in', log.read_text()) if log.exists() else []
        assert newest(folder) >= max(map(int, saved), default=0)
    with command() as p:
        assert p.wait(300) == 0
    with capsys.disabled():
        print(
            f'\n{kills} kills in {time.time() - began:.0f} s, {len(written)} while a checkpoint was written, with so '
            f'many of its files there: {written}; steps lost: {lost}'
        )
    assert call(tmp_path / 'undisturbed', data, *args, base=MOE) == 0
    assert (tmp_path / 'stderr').read_text() == ''  # no checkpoint was ever damaged
    assert (
        max(lost) <= 2 * every
    )  # every steps, and as many again where the next checkpoint is being written
    assert numbers(folder) == numbers(tmp_path / 'undisturbed') and names(folder) == names(
        tmp_path / 'undisturbed'
    )
    assert content(folder, 14 * kills) == content(tmp_path / 'undisturbed', 14 * kills)
    assert written and all_whole(folder) and steps(folder) == list(range(1, 14 * kills + 1))


# ------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.slow
def test_a_second_sigint_ends_at_once_and_the_next_run_clears_up_and_goes_on(
    tmp_path, data, go, stopped
):
    slow = 'from nanoseek import files; sync = files.sync; files.sync = lambda path: (time.sleep(0.5), sync(path))'
    with process(tmp_path, data, *RUN, patch=slow) as p:
        assert wait(lambda: list(tmp_path.glob('out/tiny/.step-000003.tmp')), p)
        while p.poll() is None:
            p.send_signal(signal.SIGINT)
            time.sleep(0.1)
    assert p.returncode == 130 and names(tmp_path) == ['.step-000003.tmp']
    assert go(tmp_path, *RUN).returncode == 0 and content(tmp_path, 12) == content(
        stopped / 'whole', 12
    )
    assert names(tmp_path) == [f'step-{n:06d}' for n in (3, 6, 9, 12)] and all_whole(tmp_path)


def test_max_minutes_stops_with_a_checkpoint_and_the_same_command_goes_on(tmp_path, go):
    args = ['--max_steps=3', '--max_minutes=0.000001']
    for step in (1, 2, 3):
        done = go(tmp_path, *args)
        assert (
            done.returncode == 0 and not done.stderr and names(tmp_path)[-1] == f'step-{step:06d}'
        )
        assert f'max_minutes=1e-06: stopped after step {step};' in done.stdout and all_whole(
            tmp_path
        )
    assert 'is complete' in go(tmp_path, *args).stdout and steps(tmp_path) == [1, 2, 3]


# ------------------------------------------------------------------------------------------------
# Numbers that are not finite


def once(step, action):
    """action(at) behind the backward pass of a step, counted from 1"""
    return hooks(backward=lambda at: action(at) if at.step == step else None)


def recording(states):
    """states[step]: (weights and biases, optimizer) before and after the optimizer's step"""

    def state(at):
        return bits([at.model.state_dict(), at.optimizer.state_dict()['state']])

    def before(at):
        states[at.step] = (state(at),)

    def after(at):
        states[at.step] += (state(at),)

    return hooks(backward=before, end=after)


@pytest.mark.slow
@pytest.mark.parametrize(
    'name',
    [
        'model.embed_tokens.weight',
        'model.layers.1.self_attn.o_proj.weight',
        'model.layers.1.mlp.experts.down_proj',
        'model.norm.weight',
    ],
)
def test_a_step_with_nan_in_one_gradient_is_skipped_and_named_and_changes_nothing(
    tmp_path, data, go, name
):
    def poison(at):
        dict(at.model.named_parameters())[name].grad.view(-1)[3] = torch.nan

    states, args = {}, ['--max_steps=8', '--checkpoint_interval=3']
    assert go(tmp_path / 'whole', *args, base=TINY).returncode == 0
    with once(4, poison), recording(states):
        done = go(tmp_path / 'hit', *args, base=TINY)
    (event,) = events(tmp_path / 'hit', 'skipped')
    assert (
        done.returncode == 0 and event['step'] == 4 and event['where'] == f'the gradient of {name}'
    )
    assert states[4][0] == states[4][1] == states[3][1] and all(
        a != b for n, (a, b) in states.items() if n != 4
    )
    assert steps(tmp_path / 'hit') == [1, 2, 3, 5, 6, 7, 8] and all_whole(tmp_path / 'hit')
    found, undisturbed = numbers(tmp_path / 'hit'), numbers(tmp_path / 'whole')
    assert all(found[n, 'train'] == undisturbed[n, 'train'] for n in (1, 2, 3))
    assert found[5, 'train']['tokens'] == undisturbed[5, 'train']['tokens']
    model = Transformer.from_pretrained(checkpoint(tmp_path / 'hit', 3)).train()
    x, y = map(
        torch.from_numpy, prepare.TokenData(data).batch('train', range(4 * 4, 5 * 4), 32, 1337)
    )
    model(x, y)
    assert found[5, 'train']['loss'] == pytest.approx(model.losses['main'].item(), rel=1e-6)
    assert found[5, 'train']['loss'] != pytest.approx(undisturbed[5, 'train']['loss'], rel=1e-4)


def test_a_gradient_that_breaks_in_a_layer_is_named_after_that_layer(tmp_path, go):
    """What comes later in the backward pass, the layers before it, breaks too"""
    handles = []

    def hook(module, args, out):
        out[0].register_hook(lambda g: g * torch.inf)

    def spoil(at):
        if at.step == 4:
            handles.append(at.model.model.layers[1].register_forward_hook(hook))

    def repair(at):
        while handles:
            handles.pop().remove()

    with hooks(start=spoil, backward=repair):
        assert go(tmp_path, '--max_steps=5', base=TINY).returncode == 0
    (event,) = events(tmp_path, 'skipped')
    assert event['step'] == 4 and event['where'].startswith('the gradient of model.layers.1.')


def broken_layer(name, step, value=torch.inf):
    """Something not finite in the output of a module for all batches of a step"""
    handles = []

    def hook(module, args, out):
        y = (out[0] if isinstance(out, tuple) else out).clone()
        y.view(-1)[5] = value
        return (y, *out[1:]) if isinstance(out, tuple) else y

    def spoil(at):
        if at.step == step:
            handles.append(at.model.get_submodule(name).register_forward_hook(hook))

    def repair(at):  # only now: the forward passes are repeated, to find it
        while handles:
            handles.pop().remove()

    return hooks(start=spoil, end=repair)


@pytest.mark.parametrize(
    'name',
    [
        'model.embed_tokens',
        'model.layers.0.self_attn',
        'model.layers.1.mlp.gate',
        'model.layers.1.mlp.experts',
        'model.layers.1.mlp',
        'model.layers.1',
        'model.norm',
    ],
)
def test_a_layer_whose_output_is_not_finite_is_named(tmp_path, go, name):
    with broken_layer(name, 3):
        assert go(tmp_path, '--max_steps=4', base=TINY).returncode == 0
    (event,) = events(tmp_path, 'skipped')
    assert event['step'] == 3 and event['where'] == f'the output of {name}'


def spoil_weight(at):
    with torch.no_grad():
        at.model.model.layers[1].self_attn.o_proj.weight[0, 0] = torch.nan


def test_a_broken_weight_takes_the_run_back_and_on_with_later_data(tmp_path, go):
    """The reference starts from a copy of that checkpoint, whose data are moved on by hand"""
    args = ['--max_steps=24', '--checkpoint_interval=5', '--eval_interval=5', '--max_bad_steps=5']
    done, hit = [], []

    def poison(at):
        hit.append(spoil_weight(at)) if not hit else None

    with once(13, poison):  # found at 13 by its gradient's absence, or at 14
        done = go(tmp_path / 'hit', *args, base=TINY)
    skipped, back = events(tmp_path / 'hit', 'skipped'), events(tmp_path / 'hit', 'rollback')
    first, last = skipped[0]['step'], skipped[-1]['step']
    assert (
        done.returncode == 0
        and [m['step'] for m in skipped] == list(range(first, first + 5))
        and first in (13, 14)
    )
    assert all(m['where'] == 'the weight model.layers.1.self_attn.o_proj.weight' for m in skipped)
    assert [(m['step'], m['skipped'], m['rollbacks']) for m in back] == [(11, last - 10, 1)]
    assert (
        back[0]['checkpoint'] == 'out/tiny/step-000010'
        and 'step-000015 is not written' in done.stdout
    )
    shutil.copytree(checkpoint(tmp_path / 'hit', 10), checkpoint(tmp_path / 'reference', 10))
    file = checkpoint(tmp_path / 'reference', 10) / 'trainer/state.pt'
    torch.save(torch.load(file, weights_only=True) | {'skipped': last - 10, 'rollbacks': 1}, file)
    sign(checkpoint(tmp_path / 'reference', 10))
    assert go(tmp_path / 'reference', *args, base=TINY).returncode == 0
    found, reference = numbers(tmp_path / 'hit'), numbers(tmp_path / 'reference')
    assert {k: v for k, v in found.items() if k[0] > 10 and k[1] in ('train', 'val')} == reference
    assert content(tmp_path / 'hit', 24) == content(tmp_path / 'reference', 24) and all_whole(
        tmp_path / 'hit'
    )
    assert steps(tmp_path / 'hit') == list(range(1, 25))


def test_a_run_that_was_taken_back_and_then_stopped_goes_on_as_if_not_stopped(tmp_path, go):
    args = ['--max_steps=12', '--checkpoint_interval=3', '--max_bad_steps=2']
    for to, stop in (('whole', 99), ('parts', 8)):
        hit = []
        poison = lambda at: None if hit else hit.append(spoil_weight(at))
        with once(5, poison), stopping(stop, 'SIGINT'):
            assert go(tmp_path / to, *args, base=TINY).returncode == 0
    assert (
        newest(tmp_path / 'parts') == 8 and go(tmp_path / 'parts', *args, base=TINY).returncode == 0
    )
    assert content(tmp_path / 'parts', 12) == content(tmp_path / 'whole', 12)
    assert content(tmp_path / 'parts', 12)[1]['skipped'] > 0
    assert {k: v for k, v in numbers(tmp_path / 'parts').items() if k != (8, 'val')} == numbers(
        tmp_path / 'whole'
    )


def always(first):
    """A weight breaks before each step from a certain one on"""
    return hooks(start=lambda at: spoil_weight(at) if at.step >= first else None)


def test_a_run_that_always_breaks_ends_with_status_1_advice_and_whole_checkpoints(tmp_path, go):
    args = [
        '--max_steps=30',
        '--checkpoint_interval=4',
        '--eval_interval=3',
        '--max_bad_steps=3',
        '--max_rollbacks=2',
    ]
    with always(10):
        done = go(tmp_path, *args, base=TINY)
    last = done.stdout.splitlines()[-1]
    assert (
        done.returncode == 1
        and not done.stderr
        and (tmp_path / 'out/tiny/train.log').read_text() == done.stdout
    )
    assert last.startswith(
        '3 steps in a row were not finite, also after going back 2 times: stopping. '
    )
    assert 'learning_rate (now 0.01)' in last and 'warmup_steps (5)' in last
    assert [m['rollbacks'] for m in events(tmp_path, 'rollback')] == [1, 2]
    assert names(tmp_path) == ['step-000004', 'step-000008'] and all_whole(tmp_path)


def test_a_run_that_breaks_before_its_first_checkpoint_ends_with_status_1_and_advice(tmp_path, go):
    with always(1):
        done = go(tmp_path, '--max_steps=30', '--checkpoint_interval=10', '--max_bad_steps=3')
    assert (
        done.returncode == 1
        and not done.stderr
        and names(tmp_path) == []
        and len(events(tmp_path, 'skipped')) == 3
    )
    assert done.stdout.splitlines()[-1].startswith(
        '3 steps in a row were not finite, and no checkpoint is whole yet: '
        'stopping. Try a lower learning_rate (now 0.01)'
    )


def test_a_run_whose_checkpoints_are_all_damaged_when_it_breaks_ends_in_one_line(tmp_path, go):
    def damage(at):
        while not checkpoint(tmp_path, 4).exists():  # it is written in the background
            time.sleep(0.01)
        for path in (tmp_path / 'out/tiny').glob('step-*'):
            (path / 'trainer/manifest.json').unlink()
        spoil_weight(at)

    with once(6, damage):
        done = go(tmp_path, '--max_steps=30', '--checkpoint_interval=2', '--max_bad_steps=3')
    assert done.returncode in (1, 2) and 'no checkpoint is whole' in done.stdout + done.stderr
    assert len(events(tmp_path, 'skipped')) == 3 and newest(tmp_path) == 4


def test_a_float16_gradient_that_overflows_is_no_bad_step(tmp_path, monkeypatch, go):
    monkeypatch.setattr(
        torch.amp, 'GradScaler', functools.partial(torch.amp.GradScaler, init_scale=2.0**60)
    )
    states = {}
    with recording(states):
        done = go(
            tmp_path,
            '--max_steps=60',
            '--dtype=float16',
            '--max_bad_steps=1',
            '--checkpoint_interval=100',
        )
    assert done.returncode == 0 and not events(tmp_path, 'skipped', 'rollback')
    still = [n for n, (before, after) in states.items() if before[0] == after[0]]  # the weights
    assert (
        still == list(range(1, len(still) + 1)) and 10 < len(still) < 59
    )  # the scale halves with each of them
    assert content(tmp_path, 60)[1]['scaler']['scale'] == 2.0 ** (60 - len(still)) and all_whole(
        tmp_path
    )
    assert steps(tmp_path) == list(range(1, 61))


def test_only_a_loss_that_is_far_off_is_a_spike(tmp_path, monkeypatch, go):
    args = [
        '--max_steps=80',
        '--checkpoint_interval=100',
        '--learning_rate=3e-3',
        '--warmup_steps=10',
    ]
    assert go(tmp_path / 'calm', *args).returncode == 0 and not events(
        tmp_path / 'calm', 'spike', 'skipped'
    )
    original, calls = prepare.TokenData.batch, []

    def batch(self, *a):
        x, y = original(self, *a)
        calls.append(1)
        return (x, np.full_like(y, 20)) if len(calls) == 70 else (x, y)

    monkeypatch.setattr(prepare.TokenData, 'batch', batch)
    done = go(tmp_path / 'hit', *args)
    (spike,) = events(tmp_path / 'hit', 'spike')
    found = numbers(tmp_path / 'hit')
    history = [found[n, 'train']['loss'] for n in range(1, 70)]
    median = np.median(history)
    z = (found[70, 'train']['loss'] - median) / (1.4826 * np.median(np.abs(history - median)))
    assert (
        done.returncode == 0 and spike['step'] == 70 and spike['loss'] == found[70, 'train']['loss']
    )
    assert spike['z'] == pytest.approx(z, abs=0.006) and z > 6 and 'step 70: loss' in done.stdout


# ------------------------------------------------------------------------------------------------
# Damaged files

RUN = ['--max_steps=12', '--checkpoint_interval=3']


@pytest.fixture(scope='session')
def stopped(tmp_path_factory, data):
    """whole/: a complete run. stopped/: it, as if it had been killed while step 12 was written"""
    home = tmp_path_factory.mktemp('stopped')
    assert call(home / 'whole', data, *RUN) == 0
    shutil.copytree(home / 'whole', home / 'stopped')
    shutil.rmtree(checkpoint(home / 'stopped', 12))
    assert names(home / 'stopped') == [f'step-{n:06d}' for n in (3, 6, 9)]
    return home


@pytest.fixture
def copy(stopped, tmp_path):
    return shutil.copytree(stopped / 'stopped', tmp_path / 'copy')


@pytest.fixture
def other(data, tmp_path):
    """The dataset's copy, to be changed: that names the run's data by its content, not by its
    path"""
    return shutil.copytree(data, tmp_path / 'small')


def cut(name):
    return lambda path: os.truncate(path / name, (path / name).stat().st_size // 2)


def flip(name):
    def flip(path):
        content = bytearray((path / name).read_bytes())
        content[len(content) // 2] ^= 1
        (path / name).write_bytes(content)

    return flip


def lose(name):
    return lambda path: (path / name).unlink()


def write(name, text):
    return lambda path: (path / name).write_text(text)


def outside(present):
    def change(path):
        file = path / 'trainer/manifest.json'
        file.write_text(
            json.dumps(json.loads(file.read_text()) | {'../../x': [2, zlib.crc32(b'hi')]})
        )
        present and (path.parent.parent / 'x').write_text('hi')

    return change


SUMS = r'{} has ([\d,]+) bytes and checksum \d+, not ([\d,]+) and \d+'
DAMAGES = {
    'weights cut': (cut('model.safetensors'), SUMS.format('model.safetensors')),
    'weights flipped': (flip('model.safetensors'), SUMS.format('model.safetensors')),
    'weights gone': (lose('model.safetensors'), r'.*No such file.*model\.safetensors.*'),
    'state cut': (cut('trainer/state.pt'), SUMS.format('trainer/state.pt')),
    'state flipped': (flip('trainer/state.pt'), SUMS.format('trainer/state.pt')),
    'state empty': (write('trainer/state.pt', ''), SUMS.format('trainer/state.pt')),
    'config flipped': (flip('config.json'), SUMS.format('config.json')),
    'manifest gone': (lose('trainer/manifest.json'), r'.*No such file.*manifest\.json.*'),
    'manifest no JSON': (write('trainer/manifest.json', '{"model'), '.+'),
    'manifest a list': (write('trainer/manifest.json', '[1]'), '.+'),
    'manifest empty': (write('trainer/manifest.json', '{}'), '.+'),
    'manifest leads outside': (outside(False), r'.+'),
    'manifest leads outside to a file': (outside(True), r'.+'),
    'settings no JSON': (write('trainer/settings.json', 'seed: 1'), '.+'),
    'settings a list': (write('trainer/settings.json', '[]'), '.+'),
    'settings gone': (lose('trainer/settings.json'), r'.*No such file.*settings\.json.*'),
    'of the future': (
        write('trainer/settings.json', '{"version": 99}'),
        r'its version is 99, and \d the newest that is known here',
    ),
}
BEFORE = r'out/tiny/step-00000{} is damaged \({}\): going back to the one before'


@pytest.mark.parametrize('name', DAMAGES)
def test_where_the_newest_checkpoint_is_damaged_the_one_before_is_taken_and_nothing_is_lost(
    copy, stopped, go, name
):
    spoil, problem = DAMAGES[name]
    spoil(checkpoint(copy, 9))
    done = go(copy, *RUN)
    assert done.returncode == 0 and 'going on from out/tiny/step-000006' in done.stdout, done.stderr
    assert re.fullmatch(BEFORE.format(9, problem) + '\n', done.stderr), done.stderr
    assert content(copy, 12) == content(stopped / 'whole', 12) and numbers(copy) == numbers(
        stopped / 'whole'
    )
    assert names(copy) == [f'step-{n:06d}' for n in (3, 6, 9, 12)] and all_whole(copy)


def test_where_all_checkpoints_are_damaged_the_run_is_refused_and_nothing_changes(copy, go):
    for step, name in ((3, 'state cut'), (6, 'manifest gone'), (9, 'weights gone')):
        DAMAGES[name][0](checkpoint(copy, step))
    before = tree(copy)
    done = go(copy, *RUN)
    *damaged, last = done.stderr.splitlines()
    assert done.returncode == 2
    assert last == 'train.py: no checkpoint in out/tiny is whole: start over with --resume=never'
    assert [
        re.fullmatch(BEFORE.format(n, '.+'), line) is not None
        for n, line in zip((9, 6, 3), damaged)
    ] == [True] * 3
    assert tree(copy) == before
    assert (
        go(copy, *RUN, '--resume=never').returncode == 0
        and all_whole(copy)
        and len(names(copy)) == 4
    )


class Opens:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, 'w')


def test_objects_in_a_checkpoint_are_refused_and_not_executed(copy, go, tmp_path):
    file, marker = checkpoint(copy, 9) / 'trainer/state.pt', tmp_path / 'marker'
    torch.save(torch.load(file, weights_only=True) | {'about': Opens(str(marker))}, file)
    sign(checkpoint(copy, 9))
    before, done = tree(copy), go(copy, *RUN)
    assert done.returncode == 2 and not marker.exists() and tree(copy) == before
    assert done.stderr.startswith(
        'train.py: out/tiny/step-000009/trainer/state.pt cannot be read: '
    )
    assert done.stderr.count('\n') == 1
    torch.load(file, weights_only=False)
    assert marker.exists()  # so it would have been


def meta(**values):
    def change(folder):
        file = folder / 'meta.json'
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def token(split, at, value):
    def change(folder):
        ids = np.fromfile(folder / f'{split}.bin', '<u2')
        ids[at] = value
        ids.tofile(folder / f'{split}.bin')

    return change


def renamed(folder):
    source = json.loads((folder / 'meta.json').read_text())['source']
    meta(source=source | {'name': 'other', 'sha256': '0' * 64})(folder)


nothing = lambda folder: None
AGAIN = "run 'python prepare.py small' again"
WITH = (
    'out/tiny/step-000009 was trained with {}={}, now it is {}: go back, take another out_dir '
    r'\(--init_from=out/tiny/step-000009 starts from its weights\), or start over with --resume=never'
)
MISTAKES = {
    'token': (
        token('train', 100, 60000),
        '',
        'SMALL/train.bin: token 60000 at byte 200 is not in the vocabulary of '
        r'\d+: run prepare.py again',
    ),
    'validation token': (
        token('val', 7, 65535),
        '',
        r'SMALL/val.bin: token 65535 at byte 14 is not in the vocab.*',
    ),
    'last token': (
        token('test', -1, 999),
        '',
        r'SMALL/test.bin: token 999 at byte \d+ is not in the vocabulary.*',
    ),
    'tokens cut': (
        cut('train.bin'),
        '',
        f'SMALL/train.bin has 900 bytes, and 1,800 by its meta.json: {AGAIN}',
    ),
    'tokens gone': (
        lose('val.bin'),
        '',
        f'SMALL/val.bin has 0 bytes, and 100 by its meta.json: {AGAIN}',
    ),
    'meta too small': (
        meta(vocab_size=5),
        '',
        r'SMALL/train.bin: token \d+ at byte \d+ is not in the vocabulary of 5: .*',
    ),
    'meta of other numbers': (
        meta(dtype='uint32'),
        '',
        f'SMALL/train.bin has 1,800 bytes, and 3,600 by its meta.json: {AGAIN}',
    ),
    'meta of the future': (
        meta(version=7),
        '',
        f'SMALL/meta.json is not what this version writes .*7, not 2.*{AGAIN}',
    ),
    'meta cut': (
        cut('meta.json'),
        '',
        f'SMALL/meta.json is not what this version writes .*: {AGAIN}',
    ),
    'tokenizer': (
        flip('tokenizer.json'),
        '',
        f'SMALL/tokenizer.json is not the one that made the tokens: {AGAIN}',
    ),
    'no dataset': (
        nothing,
        '--dataset=nosuch',
        "no dataset in data/nosuch: run 'python prepare.py nosuch'",
    ),
    'other seed': (nothing, '--seed=7', WITH.format('seed', 1337, 7)),
    'other block': (nothing, '--block_size=16', WITH.format('block_size', 32, 16)),
    'other batch': (nothing, '--batch_size=8', WITH.format('batch', 4, 8)),
    'other global batch': (nothing, '--global_batch_size=8', WITH.format('batch', 4, 8)),
    'other embedding rate': (nothing, '--embedding_lr=3', WITH.format('embedding_lr', 1.0, 3.0)),
    'other optimizer': (nothing, '--optimizer=muon', WITH.format('optimizer', 'adamw', 'muon')),
    'other data': (renamed, '', WITH.format('data', r'small [0-9a-f]{8}', r'other [0-9a-f]{8}')),
    'other depth': (nothing, '--num_hidden_layers=3', WITH.format('num_hidden_layers', 2, 3)),
    'other experts': (nothing, '--n_routed_experts=4', '.*n_routed_experts=.*4.*'),
    'other dropout': (nothing, '--dropout=0.2', '.*dropout=0.0.*0.2.*'),
    'no such checkpoint': (
        nothing,
        '--resume=out/tiny/step-000004',
        r'resume=out/tiny/step-000004: no such checkpoint.*',
    ),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_what_does_not_fit_is_refused_in_one_line_and_nothing_changes(copy, other, go, name):
    spoil, args, line = MISTAKES[name]
    spoil(other)
    before = tree(copy)
    done = go(copy, *RUN, f'--dataset={other}', *args.split())
    assert done.returncode == 2 and tree(copy) == before
    assert re.fullmatch(
        'train.py: ' + line.replace('SMALL', re.escape(str(other))) + '\n', done.stderr
    ), done.stderr
    assert not done.stdout


def test_the_same_batch_in_smaller_parts_goes_on(copy, go):
    done = go(copy, *RUN, '--batch_size=2', '--global_batch_size=4')
    assert done.returncode == 0 and newest(copy) == 12 and steps(copy) == list(range(1, 13))


def test_a_complete_run_is_left_as_it_is(stopped, go):
    before = tree(stopped / 'whole')
    done = go(stopped / 'whole', *RUN)
    assert done.returncode == 0 and not done.stderr and tree(stopped / 'whole') == before
    assert (
        done.stdout
        == 'out/tiny/step-000012 is complete: go on with --max_steps=1012, or start over with '
        '--resume=never\n'
    )


@pytest.mark.parametrize(
    'where', ['out/tiny/step-000006', 'out/tiny/step-000006/', 'best', 'out/tiny/best']
)
def test_resume_from_a_folder_goes_back_there_and_removes_only_what_comes_later(
    copy, stopped, go, where
):
    if 'best' in where:
        shutil.copytree(checkpoint(copy, 6), copy / where)
    with stopping(8, 'SIGTERM'):
        done = go(copy, *RUN, f'--resume={where}')
    assert done.returncode == 0 and not done.stderr and 'going on from' in done.stdout
    assert names(copy) == ['step-000003', 'step-000006', 'step-000008'] and all_whole(copy)
    assert go(copy, *RUN).returncode == 0 and content(copy, 12) == content(stopped / 'whole', 12)
    assert steps(copy) == list(range(1, 13))


@pytest.mark.parametrize('name', ['weights flipped', 'manifest gone', 'settings no JSON'])
def test_resume_from_a_damaged_folder_is_refused_and_nothing_changes(copy, go, name):
    DAMAGES[name][0](checkpoint(copy, 6))
    before, done = tree(copy), go(copy, *RUN, '--resume=out/tiny/step-000006')
    assert done.returncode == 2 and tree(copy) == before and done.stderr.count('\n') == 1
    assert re.fullmatch(
        rf'train.py: resume=out/tiny/step-000006: damaged: {DAMAGES[name][1]}\n', done.stderr
    )


# ------------------------------------------------------------------------------------------------
# What stays


def test_the_newest_and_the_best_checkpoints_stay(tmp_path, go):
    """The learning rate rises until all that was learnt is gone, so the best is an old one"""
    args = [
        '--max_steps=27',
        '--checkpoint_interval=3',
        '--eval_interval=3',
        '--warmup_steps=27',
        '--learning_rate=3',
    ]
    for to, keep in (('two', 2), ('one', 1), ('all', 0)):
        assert go(tmp_path / to, *args, f'--keep_checkpoints={keep}').returncode == 0
    losses = {m['step']: m['val_loss'] for m in metrics(tmp_path / 'all') if 'val_loss' in m}
    best = min(losses, key=losses.get)
    assert best < 24 and list(losses) == list(range(3, 28, 3))
    assert names(tmp_path / 'all') == [f'step-{n:06d}' for n in losses]
    assert names(tmp_path / 'two') == [f'step-{n:06d}' for n in (best, 24, 27)] and all_whole(
        tmp_path / 'two'
    )
    assert names(tmp_path / 'one') == [f'step-{n:06d}' for n in (best, 27)]


def test_sample_takes_the_newest_and_not_the_best(tmp_path, go, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = [
        '--max_steps=18',
        '--checkpoint_interval=3',
        '--eval_interval=3',
        '--warmup_steps=18',
        '--learning_rate=5',
    ]
    assert go(tmp_path, *args, '--keep_checkpoints=1').returncode == 0 and len(names(tmp_path)) == 2
    monkeypatch.setattr(sys, 'argv', ['sample.py', '--max_new_tokens=1'])
    handlers = {
        n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGPIPE)
    }  # both are sample.py's afterwards
    runpy.run_path(str(HERE / 'sample.py'), run_name='__main__')
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert capfd.readouterr().err.startswith('out/tiny/step-000018: ')


def test_an_old_damaged_checkpoint_does_not_end_a_run(tmp_path, go):
    args = ['--max_steps=8', '--checkpoint_interval=2', '--keep_checkpoints=2']
    with stopping(4, 'SIGTERM'):
        assert go(tmp_path, *args).returncode == 0
    (tmp_path / 'out/tiny/step-000002/trainer/settings.json').write_text('{')
    assert go(tmp_path, *args).returncode == 0 and names(tmp_path)[-2:] == [
        'step-000006',
        'step-000008',
    ]


def test_a_validation_loss_that_is_not_finite_is_never_the_best(tmp_path, go):
    """The first checkpoint's is nan, so that what is compared with it would win or lose by their
    order"""
    evaluate = train.evaluate

    def nan_at_first(*args):
        if not names(tmp_path):
            return {'val_loss': float('nan')}
        return evaluate(*args)

    train.evaluate = nan_at_first
    try:
        done = go(
            tmp_path,
            '--max_steps=15',
            '--checkpoint_interval=3',
            '--eval_interval=3',
            '--learning_rate=3',
            '--keep_checkpoints=1',
            '--warmup_steps=15',
        )
    finally:
        train.evaluate = evaluate
    lines = map(json.loads, (tmp_path / 'out/tiny/metrics.jsonl').read_text().splitlines())
    losses = {m['step']: m['val_loss'] for m in lines if 'val_loss' in m and m['step'] > 3}
    assert done.returncode == 0 and len(losses) == 4 and min(losses, key=losses.get) < 15
    assert names(tmp_path) == sorted({f'step-{n:06d}' for n in (min(losses, key=losses.get), 15)})
    assert metrics(tmp_path)  # strict JSON


# ------------------------------------------------------------------------------------------------
# A full disk, a full memory


FULL = (
    r'train\.py: \S*step-\d{6} could not be written: .+; the checkpoints before it are whole, and the same '
    'command goes on from them\n'
)


@pytest.mark.parametrize('room', [0.1, 0.3, 0.6, 0.85])
def test_a_full_disk_is_one_line_and_leaves_whole_checkpoints_and_no_others(
    stopped, disk, go, room
):
    """room: how much of another checkpoint fits"""
    size = sum(
        -(-p.stat().st_size // 4096) * 4
        for p in checkpoint(stopped / 'whole', 3).rglob('*')
        if p.is_file()
    )
    folder = disk(f'{int((1 + room) * size) + 24}k')
    done = go(folder, *RUN)
    assert done.returncode == 2 and re.fullmatch(FULL, done.stderr), done.stderr
    assert names(folder) == ['step-000003'] and all_whole(folder)
    disk(f'{10 * size}k')
    assert (
        go(folder, *RUN).returncode == 0
        and all_whole(folder)
        and steps(folder) == list(range(1, 13))
    )
    assert content(folder, 12) == content(stopped / 'whole', 12)


@pytest.mark.slow
def test_a_disk_that_fills_up_between_checkpoints_is_one_line_too(stopped, disk, data, go):
    """metrics.jsonl and train.log find no room; then all is as it would have been"""
    folder, args = disk('4000k'), ['--max_steps=40', '--checkpoint_interval=100']
    slow = 'rate = train.learning_rate_at; train.learning_rate_at = lambda *a: (time.sleep(0.05), rate(*a))[1]'
    with process(folder, data, *args, patch=slow) as p:
        assert wait(
            lambda: (
                last_step(folder) > 2 if folder.joinpath('out/tiny/metrics.jsonl').exists() else 0
            ),
            p,
        )
        with contextlib.suppress(OSError), open(folder / 'filler', 'wb') as f:
            f.write(bytes(1 << 23))
        out, errors = p.communicate(timeout=60)
    assert p.returncode == 2 and errors.count('\n') == 1 and 'No space left' in errors, errors
    (folder / 'filler').unlink()
    assert (
        go(folder, *args).returncode == 0
        and all_whole(folder)
        and steps(folder) == list(range(1, 41))
    )


@pytest.mark.parametrize('room', [0, 1])
def test_a_disk_without_room_for_names_is_one_line_too(disk, go, room):
    folder = disk(f'4000k,nr_inodes={7 + room}')  # /, out, tiny, the lock and three files
    done = go(folder, *RUN)
    assert done.returncode == 2 and re.fullmatch(FULL, done.stderr), done.stderr
    assert names(folder) == []


@pytest.mark.parametrize('name', ['model.safetensors', 'trainer/state.pt'])
def test_a_file_that_may_not_be_so_large_is_one_line_and_leaves_no_checkpoint(
    stopped, tmp_path, go, name
):
    before, size = (
        resource.getrlimit(resource.RLIMIT_FSIZE),
        (checkpoint(stopped / 'whole', 3) / name).stat().st_size,
    )
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (size - 5000, before[1])
    )  # its signal is ignored by Python
    try:
        done = go(tmp_path, *RUN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.returncode == 2 and re.fullmatch(FULL, done.stderr), done.stderr
    assert names(tmp_path) == [] and go(tmp_path, *RUN).returncode == 0 and all_whole(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(
    torch.version.cuda is not None, reason="a CUDA build's libraries alone take more address space"
)
def test_out_of_memory_is_one_line_with_settings_that_do_fit(tmp_path, data):
    limit, args, env = (
        5 << 29,
        ['--max_steps=1', '--eval_steps=1'],
        {**os.environ, 'OMP_NUM_THREADS': '2'},
    )
    start = lambda *more: process(
        tmp_path,
        data,
        *args,
        *more,
        env=env,  # a thread takes address space, too
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    with start('--batch_size=16000') as p:      # far too much, whatever the machine computes in
        out, errors = p.communicate(timeout=120)
    assert p.returncode == 2 and errors.count('\n') == 1 and not names(tmp_path), errors
    found = re.fullmatch(
        r'train\.py: out of memory: 16000 x 32 tokens need about ([\d,]+) MB of the 2,048 MB '
        r'that cpu has; less: '
        r'(--batch_size=\d+ --global_batch_size=16000) \(([\d,]+) MB\), '
        r'--block_size=\d+ \([\d,]+ MB\), --gradient_checkpointing=true \(([\d,]+) MB\)\n',
        errors,
    )
    assert found, errors
    needs, less, checkpointed = (int(found[i].replace(',', '')) for i in (1, 3, 4))
    assert less < needs and checkpointed < needs
    with start(*found[2].split()) as p:
        out, errors = p.communicate(timeout=100)
    assert p.returncode == 0 and names(tmp_path) == ['step-000001'], errors


# ------------------------------------------------------------------------------------------------
# What a run shows


def test_tensorboard_has_what_metrics_has(tmp_path, go):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = ['--max_steps=9', '--eval_interval=3', '--checkpoint_interval=100', '--tensorboard=true']
    poison = lambda at: at.model.model.norm.weight.grad.fill_(torch.nan)
    with stopping(4, 'SIGINT'):
        assert go(tmp_path, *args, base=TINY).returncode == 0
    with once(6, poison):
        assert go(tmp_path, *args, base=TINY).returncode == 0
    found = EventAccumulator(str(tmp_path / 'out/tiny/tensorboard'), {'scalars': 0}).Reload()
    read = {(tag, e.step): e.value for tag in found.Tags()['scalars'] for e in found.Scalars(tag)}
    told = {
        (k, m['step']): np.float32(v)
        for m in metrics(tmp_path)
        for k, v in m.items()
        if isinstance(v, (int, float)) and k not in ('step', 'elapsed_s')
    }  # a step may have two elapsed_s
    assert {key: v for key, v in read.items() if key[0] != 'elapsed_s'} == told
    assert (
        len(told) > 80
        and ('val_loss', 4) in told
        and ('loss', 6) not in told
        and ('mtp_loss', 9) in told
    )


def leveldb(content, at=7):
    """The records of a log in LevelDB's format, behind W&B's header"""
    parts = []
    while at + 7 <= len(content):
        if at % 32768 > 32768 - 7:
            at += -at % 32768
        size, kind = struct.unpack('<HB', content[at + 4 : at + 7])
        parts.append(content[at + 7 : at + 7 + size])
        at += 7 + size
        if kind in (1, 4):
            yield b''.join(parts)
            parts = []


def test_wandb_offline_writes_a_run(tmp_path, data):
    pytest.importorskip('wandb')
    from wandb.proto.wandb_internal_pb2 import Record

    env = {**os.environ, 'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true'}
    with process(tmp_path, data, '--max_steps=4', '--wandb=true', env=env) as p:
        out, errors = p.communicate(timeout=120)
    assert p.returncode == 0 and 'Traceback' not in errors, errors
    (file,) = (tmp_path / 'out/tiny/wandb').glob('offline-run-*/run-*.wandb')
    steps = {}
    for block in leveldb(file.read_bytes()):
        items = {
            i.key or '/'.join(i.nested_key): json.loads(i.value_json)
            for i in Record.FromString(block).history.item
        }
        steps |= {items['_step']: items} if items else {}
    told = {m['step']: m for m in metrics(tmp_path) if 'loss' in m}
    assert {n: i['loss'] for n, i in steps.items()} == {n: m['loss'] for n, m in told.items()}
    assert steps[4]['val_loss'] == metrics(tmp_path)[-1]['val_loss']


@pytest.mark.slow
def test_plots_of_one_run_and_of_two_are_drawn_also_where_something_went_wrong(
    tmp_path, go, monkeypatch, stopped
):
    plt = pytest.importorskip('matplotlib.pyplot')
    monkeypatch.chdir(tmp_path)
    poison = lambda at: at.model.model.norm.weight.grad.fill_(torch.nan)
    with once(3, poison):
        assert go(tmp_path, '--max_steps=6', '--eval_interval=2', base=TINY).returncode == 0
    file = tmp_path / 'out/tiny/metrics.jsonl'
    one, two = ['out/tiny'], ['out/tiny', stopped / 'whole/out/tiny']
    ladder = [*two, '--ladder', '--title=two runs']
    for name, runs in (('one', one), ('two', two), ('spike', one), ('ladder', ladder)):
        if name == 'spike':
            file.write_text(
                file.read_text() + '{"step": 6, "event": "spike", "loss": 9.0, "z": 7.0}\n'
            )
        monkeypatch.setattr(sys, 'argv', ['plot.py', *map(str, runs), f'--out={name}.png'])
        runpy.run_path(str(HERE / 'docs/plot.py'), run_name='__main__')
        image = plt.imread(tmp_path / f'{name}.png')[..., :3]
        white = (image == 1).all(-1).mean()
        assert (
            image.shape[0] > 300
            and image.shape[1] > 800
            and 0.3 < white < 0.98
            and image.std() > 0.05
        )


@pytest.mark.slow
def test_a_terminal_shows_a_progress_bar_and_the_log_plain_lines(tmp_path, data):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 100, 0, 0))
    slow = 'rate = train.learning_rate_at; train.learning_rate_at = lambda *a: (time.sleep(0.1), rate(*a))[1]'
    p = process(
        tmp_path,
        data,
        '--max_steps=8',
        '--log_interval=4',
        patch=slow,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b''
    with contextlib.suppress(OSError):  # EIO: the other side is closed
        while block := os.read(ours, 65536):
            shown += block
    os.close(ours)
    shown, log = shown.decode(), (tmp_path / 'out/tiny/train.log').read_text()
    assert p.wait(60) == 0
    bars = re.findall(r'\r *(\d+)%\|[^|]*\| (\d+)/8 \[\d\d:\d\d<(\d\d:\d\d|\?), ', shown)
    assert len({n for _, n, _ in bars}) > 3 and any(eta != '?' for *_, eta in bars)
    assert (
        '\r' not in log and '\x1b' not in log and '%|' not in log and 'step      8/8 | loss' in log
    )
    assert all(line in shown for line in log.splitlines())


def test_what_is_no_terminal_gets_plain_lines_only(tmp_path, go):
    done = go(tmp_path, '--max_steps=12', '--log_interval=4')
    assert (
        done.returncode == 0
        and not done.stderr
        and '\r' not in done.stdout
        and '%|' not in done.stdout
    )
    assert (
        done.stdout == (tmp_path / 'out/tiny/train.log').read_text()
        and done.stdout.count('| loss') == 4
    )
