"""Tests of train_ddp.py: what several processes train is what train.py trains alone. Real gloo
processes, started by torchrun, each through WORKER, which runs train_ddp.py as it is, several
times over, and puts faults into it."""

import json, os, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import prepare, train
from nanoseek import checkpoint
from nanoseek.hf import named_views
from model import Transformer
from support import hooks, train_here

# One process takes all, as they share the torchruns of the fixtures
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group('ddp')]

HERE = Path(train.__file__).resolve().parent
TINY = [
    '--hidden_size=32',
    '--num_hidden_layers=2',
    '--num_attention_heads=2',
    '--max_position_embeddings=32',
    '--initializer_range=0.1',
    '--block_size=32',
    '--batch_size=2',
    '--global_batch_size=8',
    '--max_steps=20',
    '--learning_rate=1e-2',
    '--warmup_steps=5',
    '--log_interval=1',
    '--eval_interval=5',
    '--eval_steps=4',
    '--checkpoint_interval=4',
    '--keep_checkpoints=0',
    '--device=cpu',
    '--dtype=float32',
    '--max_minutes=1000',
    '--max_bad_steps=3',
]
DENSE = [*TINY, '--attention=gqa', '--num_key_value_heads=1']
MOE = [
    *TINY,
    '--attention=mla',
    '--kv_lora_rank=16',
    '--qk_nope_head_dim=8',
    '--qk_rope_head_dim=4',
    '--v_head_dim=10',
    '--n_routed_experts=8',
    '--n_shared_experts=1',
    '--num_experts_per_tok=2',
    '--moe_intermediate_size=16',
    '--first_k_dense_replace=1',
    '--n_group=2',
    '--topk_group=1',
    '--seq_aux_loss_weight=1e-2',
    '--bias_update_speed=0.01',
    '--num_nextn_predict_layers=1',
]
KINDS = {
    'dense': DENSE,
    'moe': MOE,
    'linear': [*TINY, '--attention=linear'],
    'mixed': [*DENSE, "--dataset={'../small': 0.7, '../other': 0.3}"],
    'muon_moe': [*MOE, '--optimizer=muon'],
}
TIMES = {'elapsed_s', 'step_ms', 'tok_per_s', 'mfu', 'memory_mb'}

WORKER = f"""
import json, os, runpy, signal, sys, time, zlib
sys.path[:0] = [{str(HERE)!r}, {str(HERE / 'tests')!r}]
import torch
import torch.distributed as dist
import train
from nanoseek import fit
from support import hooks
fit.memory_estimate, train.matmul_rate = lambda *_: (1, 1), lambda *_: 1e11        # seconds of every start
loop, catch, init, destroy = train.train, train.signals.catch, dist.init_process_group, dist.destroy_process_group
dist.init_process_group = lambda *args, **kw: dist.is_initialized() or init(*args, **kw)
dist.destroy_process_group = lambda: None
rank, again = int(os.environ['RANK']), int(os.environ['TORCHELASTIC_RESTART_COUNT'])
caught, position, handles = [], [0], []

def faulty(at, kinds):
    if 'fault' not in job or again:
        return None
    kind, who, *steps = job['fault']
    return kind if rank == who and kind in kinds and position[0] in steps else None

def start(at):
    position[0] += 1                                        # of the data: it does not go back
    kind = faulty(at, ('SIGKILL', 'SIGINT', 'SIGTERM', 'minutes', 'loss'))
    if kind == 'SIGKILL':
        os.kill(os.getpid(), signal.SIGKILL)
    if kind in ('SIGINT', 'SIGTERM'):
        os.kill(os.getppid(), getattr(signal, kind))        # to torchrun, which hands it on
        while not caught[-1]:
            time.sleep(0.001)
    if kind == 'minutes':
        train.STARTED = 0
    if kind == 'loss':                                      # not finite on this rank, forward and backward
        handles.append(at.model.model.norm.register_forward_hook(lambda norm, x, out: out * float('nan')))

def backward(at):
    while handles:
        handles.pop().remove()
    if faulty(at, ('gradient',)):                           # here alone, after all ranks have the mean
        next(at.model.parameters()).grad.mul_(float('nan'))

def catch_signals():
    found, before = catch()
    caught.append(found)
    return found, before

def checksums(ranks, model, optimizer):
    whole = lambda t: zlib.crc32(ranks.whole(t.detach()).contiguous().numpy().tobytes())
    moments = (t for state in optimizer.state.values() for t in state.values())
    return [[whole(t) for t in group] for group in (model.state_dict().values(), moments)]

def watched(**given):
    ranks, progress = given['dist'], given['progress']
    position[0] = progress.step + progress.skipped
    progress = loop(**given)
    found, end = [None] * ranks.world, [progress.step, progress.skipped, progress.rollbacks]
    dist.all_gather_object(found, [*end, checksums(ranks, given['model'], given['optimizer'])])
    if rank == 0:
        open('ranks.json', 'w').write(json.dumps(found))

train.train, train.signals.catch = watched, catch_signals
for job in json.loads(sys.argv[1]):
    os.makedirs(job['folder'], exist_ok=True)
    os.chdir(job['folder'])
    sys.argv[1:], train.STARTED = job['args'], time.time()
    with hooks(start=start, backward=backward):
        runpy.run_path({str(HERE / 'train_ddp.py')!r}, run_name='__main__')
dist.is_initialized() and destroy()
"""


@pytest.fixture(scope='session')
def place(tmp_path_factory):
    """A dataset of 6,000 characters, whose val split is 9 sequences, another to mix with it, and
    the worker"""
    folder, text = (
        tmp_path_factory.mktemp('ddp'),
        (HERE / 'data/shakespeare/input.txt').read_text()[:6000],
    )
    for name, part, tokenizer in (
        ('small', text, ''),
        ('other', text[::-2], str(folder / 'small')),
    ):
        (folder / f'{name}.txt').write_text(part)
        prepare.prepare(
            prepare.Settings(str(folder / f'{name}.txt'), tokenizer, out_dir=str(folder / name))
        )
    (folder / 'worker.py').write_text(WORKER)
    return folder


def job(place, name, *args, fault=None):
    args = [f'--dataset={place / "small"}', '--out_dir=run', '--timeout_minutes=0.3', *args]
    return {'folder': str(place / name), 'args': args, **({'fault': fault} if fault else {})}


def torchrun(place, world, *jobs, restarts=0, timeout=300):
    """All jobs, one after the other -> the ended torchrun, with its seconds"""
    command = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        f'--nproc_per_node={world}',
        f'--max-restarts={restarts}',
        str(place / 'worker.py'),
        json.dumps(jobs),
    ]
    env, began = os.environ | {'OMP_NUM_THREADS': '1', 'GOMP_SPINCOUNT': '1000'}, time.time()
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)
    done.seconds = time.time() - began
    return done


def alone(place, name, *args, stop=None):
    """train.py in this process; it stops after the step stop"""

    def start(at):
        if at.step == stop:
            train.STARTED = 0

    with hooks(start=start):
        assert train_here(place / name, f'--dataset={place / "small"}', '--out_dir=run', *args) == 0
    return place / name


CHAIN = [*MOE, '--eval_interval=100']  # stops evaluate


@pytest.fixture(scope='session')
def single(place):
    """What one process makes of each kind, {kind: folder}, and the first steps of a run that
    others take on"""
    alone(place, 'chain', *CHAIN, stop=5)
    alone(place, 'unbroken', *CHAIN)
    alone(place, 'uneven', *DENSE, '--eval_steps=0')
    return {kind: alone(place, f'{kind}-1', *args) for kind, args in KINDS.items()}


@pytest.fixture(scope='session')
def two(place, single):
    """All that two ranks do, in one torchrun"""
    jobs = [job(place, 'chain', *CHAIN, fault=['minutes', 1, 10])]
    jobs += [
        job(place, f'{kind}-{parallel}-2', *args, f'--parallel={parallel}')
        for kind, args in KINDS.items()
        for parallel in ('ddp', 'fsdp')
    ]
    jobs += [
        job(
            place,
            f'{fault}-{parallel}',
            *DENSE,
            f'--parallel={parallel}',
            fault=[fault, 1, 7, 12, 13, 14],
        )
        for fault in ('loss', 'gradient')
        for parallel in ('fsdp', 'ddp')
    ]
    jobs += [
        job(place, 'uneven-ddp', *DENSE, '--eval_steps=0'),
        job(
            place,
            'uneven-fsdp',
            *DENSE,
            '--eval_steps=0',
            '--sample_interval=20',
            '--parallel=fsdp',
        ),
    ]
    return torchrun(place, 2, *jobs)


@pytest.fixture(scope='session')
def four(place, two):
    """Four ranks: one run from its begin to its end, then a part of the chain, until Ctrl-C"""
    return torchrun(
        place,
        4,
        job(place, 'moe-fsdp-4', *MOE, '--parallel=fsdp'),
        job(place, 'chain', *CHAIN, '--parallel=fsdp', fault=['SIGINT', 3, 15]),
    )


@pytest.fixture(scope='session')
def chain(place, four):
    return alone(place, 'chain', *CHAIN)


@pytest.fixture(scope='session')
def story(place):
    """The same command three times: until SIGTERM, until rank 1 is killed, and with rank 0 killed
    and replaced"""
    start = lambda *fault, **kw: torchrun(place, 2, job(place, 'story', *DENSE, fault=fault), **kw)
    return [start('SIGTERM', 0, 6), start('SIGKILL', 1, 15), start('SIGKILL', 0, 18, restarts=2)]


def numbers(folder):
    """Of metrics.jsonl all but times: {(step, kind of line): entry}, each once"""
    entries = [json.loads(line) for line in (folder / 'run/metrics.jsonl').read_text().splitlines()]
    entries = [{k: v for k, v in e.items() if k not in TIMES} for e in entries]
    found = {(e['step'], 'val' if 'val_loss' in e else e.get('event', 'train')): e for e in entries}
    assert len(found) == len(entries)
    return found


def final(folder, step=20):
    return folder / f'run/step-{step:06d}'


def weights(folder):
    return load_file(final(folder) / 'model.safetensors')


def moments(folder):
    return torch.load(final(folder) / 'trainer/state.pt', weights_only=True)['optimizer']['state']


def header(folder):
    data = (final(folder) / 'model.safetensors').read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], 'little')])


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*'))


def agreed(folder):
    """All ranks ended with the same step, faults, weights and moments -> the first three"""
    found = json.loads((folder / 'ranks.json').read_text())
    assert all(f == found[0] for f in found)
    return found[0][:3]


def close(found, wanted, rel, abs):
    """Two runs' numbers: the same lines, names and counts, floats within the tolerance"""
    assert found.keys() == wanted.keys()
    for key, entry in wanted.items():
        assert found[key].keys() == entry.keys()
        for name, value in entry.items():
            np.testing.assert_allclose(
                found[key][name], value, rtol=rel, atol=abs, err_msg=f'{key} {name}'
            )


def distance(a, b):
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def same_bits(a, b):
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x)
    p, q = moments(a), moments(b)
    assert p.keys() == q.keys() and all(torch.equal(p[i][n], q[i][n]) for i in p for n in p[i])


# ------------------------------------------------------------------------------------------------
# The same training

RUNS = [f'{kind}-{parallel}-2' for kind in KINDS for parallel in ('ddp', 'fsdp')] + ['moe-fsdp-4']


@pytest.fixture(params=RUNS)
def pair(request, place, single, two):
    """The folder of a run of several ranks, and that of train.py"""
    done = two if request.param.endswith('2') else request.getfixturevalue('four')
    assert final(place / request.param).exists(), done.stderr[-3000:]
    return place / request.param, single[request.param.split('-')[0]]


def test_losses_norms_loads_and_validation_are_those_of_one_process(pair):
    found, wanted = map(numbers, pair)
    close(found, wanted, rel=1e-5, abs=1e-6)
    early = [{k: v for k, v in n.items() if k[0] <= 5} for n in (found, wanted)]
    assert len(early[0]) == 6
    close(*early, rel=0, abs=1e-6)


def test_weights_moments_and_router_biases_are_those_of_one_process(pair):
    found, wanted = map(weights, pair)
    for name, w in wanted.items():
        torch.testing.assert_close(found[name], w, rtol=0, atol=2e-4)
        assert distance(found[name], w) < 5e-5, name
    biases = [name for name in wanted if name.endswith('e_score_correction_bias')]
    assert all(torch.equal(found[n], wanted[n]) and wanted[n].any() for n in biases)
    assert len(biases) == ('moe' in pair[0].name) * 2
    found, wanted = map(moments, pair)
    assert found.keys() == wanted.keys()
    for i, state in wanted.items():
        assert all(distance(found[i][name], m) < 1e-4 for name, m in state.items()), i


def test_checkpoints_have_the_same_files_names_and_shapes_and_load(pair):
    found, wanted = pair
    assert files(found / 'run') == files(wanted / 'run')
    assert header(found) == header(wanted)
    model, state = Transformer.from_pretrained(final(found)), weights(found)
    assert all(torch.equal(t, state[name]) for name, t in named_views(model).items())
    assert checkpoint.damage(final(found)) is None


def test_all_ranks_end_alike_and_the_first_alone_writes(pair):
    assert agreed(pair[0]) == [20, 0, 0]
    log = (pair[0] / 'run/train.log').read_text()
    assert all(log.count(f'step {step:6d}/20 ') == 1 for step in range(1, 21))
    assert (
        log.count('parameters: ') == 1
        and log.count('validation loss') == 4
        and log.count('saved ') == 5
    )
    assert sorted(p.name for p in pair[0].iterdir()) == ['ranks.json', 'run']


@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_validation_is_the_same_where_ranks_have_unequal_shares(place, two, parallel):
    assert final(place / f'uneven-{parallel}').exists(), two.stderr[-3000:]
    close(numbers(place / f'uneven-{parallel}'), numbers(place / 'uneven'), rel=1e-5, abs=1e-6)
    assert (place / f'uneven-{parallel}/run/train.log').read_text().count('--- sample') == (
        parallel == 'fsdp'
    )


# ------------------------------------------------------------------------------------------------
# Going on


def test_a_run_goes_from_one_rank_to_two_to_four_and_back_as_if_undisturbed(place, chain):
    found, wanted = numbers(chain), numbers(place / 'unbroken')
    assert files(chain / 'run') == sorted(
        {
            *files(place / 'unbroken/run'),
            *(
                f'step-{n:06d}{rest}'
                for n in (5, 10, 15)
                for rest in ('', *(f'/{f}' for f in files(final(chain))))
            ),
        }
    )
    stops = [found.pop((step, 'val')) for step in (5, 10, 15)]
    assert len(stops) == 3 and list(found) == [*((n, 'train') for n in range(1, 21)), (20, 'val')]
    close(found, wanted, rel=1e-5, abs=1e-5)
    log = (chain / 'run/train.log').read_text()
    assert all(
        f'stopped after step {n};' in log and f'going on from run/step-{n:06d}' in log
        for n in (5, 10, 15)
    )
    a, b = weights(chain), weights(place / 'unbroken')
    assert all(distance(a[n], b[n]) < 5e-5 for n in b) and all(
        torch.equal(a[n], b[n]) for n in b if n.endswith('bias')
    )


@pytest.mark.parametrize('name, step', [('SIGTERM', 6), ('SIGINT', 15)])
def test_signals_to_torchrun_end_all_ranks_at_one_step_with_a_checkpoint(
    request, place, name, step
):
    done, folder = (
        (request.getfixturevalue('story')[0], 'story')
        if name == 'SIGTERM'
        else (request.getfixturevalue('four'), 'chain')
    )
    why = [line for line in done.stdout.splitlines() if 'stopped after step' in line]
    assert len(why) == 1 and why[0].endswith(
        f': stopped after step {step}; the same command goes on from here'
    )
    assert (
        done.stdout.count(f'saved run/step-{step:06d}') == 1
        and checkpoint.damage(final(place / folder, step)) is None
    )
    assert 'forcefully' not in done.stderr and done.seconds < 60
    assert json.loads((place / folder / 'ranks.json').read_text())  # all came to the end


def test_a_dead_rank_ends_the_others_soon_and_is_named(story):
    done = story[1]
    assert done.stdout.count('going on from run/step-000006') == 1
    assert done.returncode != 0 and done.seconds < 45 and 'Signal 9 (SIGKILL)' in done.stderr
    assert 'rank      : 1 ' in done.stderr[done.stderr.index('Root Cause') :]


def test_killed_workers_are_replaced_and_the_run_is_bit_for_bit_the_undisturbed_one(
    place, two, story
):
    done = story[2]
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('going on from run/step-') == 2
    assert agreed(place / 'story') == [20, 0, 0]
    same_bits(place / 'story', place / 'dense-ddp-2')
    found, wanted = numbers(place / 'story'), numbers(place / 'dense-ddp-2')
    assert found.pop((6, 'val')) and found == wanted


# ------------------------------------------------------------------------------------------------
# What goes wrong


@pytest.mark.parametrize('run', ['loss-fsdp', 'loss-ddp', 'gradient-fsdp', 'gradient-ddp'])
def test_what_is_not_finite_on_one_rank_is_skipped_and_rolled_back_by_all(place, two, run):
    assert final(place / run).exists(), two.stderr[-3000:]
    events = [
        (step, kind) for step, kind in numbers(place / run) if kind in ('skipped', 'rollback')
    ]
    assert events == [(7, 'skipped'), *((n, 'skipped') for n in (12, 13, 14)), (13, 'rollback')]
    step, skipped, rollbacks = agreed(place / run)
    assert (step, skipped, rollbacks) == (20, 2, 1)
    assert all(t.isfinite().all() for t in weights(place / run).values())


def ours(done):
    return [line for line in done.stderr.splitlines() if 'train_ddp.py: ' in line]


def test_a_batch_that_the_ranks_cannot_share_is_refused_once_with_sizes_that_they_can(place):
    done = torchrun(
        place, 2, job(place, 'mistake', *DENSE, '--batch_size=8', '--global_batch_size=24')
    )
    assert done.returncode != 0 and done.seconds < 45
    assert len(ours(done)) == 1, done.stderr[-3000:]
    assert ours(done)[0] == (
        'train_ddp.py: global_batch_size=24: must be a multiple of batch_size=8 x 2 devices, '
        'such as 16 or 32'
    )
    assert not (place / 'mistake/run').exists()


def test_without_torchrun_it_says_how_to_start_it(place):
    env = {k: v for k, v in os.environ.items() if k != 'RANK'}
    command = [sys.executable, HERE / 'train_ddp.py', *DENSE]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and done.stdout == '' and done.stderr.count('\n') == 1
    assert done.stderr.startswith(
        'train_ddp.py: start it with torchrun: torchrun --standalone --nproc_per_node=2 '
    )


@pytest.mark.skipif('NANOSEEK_SLOW' not in os.environ, reason='needs 16 GB: NANOSEEK_SLOW=1')
def test_smol135_takes_a_step_on_two_ranks(place, tmp_path):
    command = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node=2',
        'train_ddp.py',
        'config/smol135.py',
        f'--dataset={place / "small"}',
        f'--out_dir={tmp_path / "run"}',
        '--block_size=64',
        '--batch_size=1',
        '--global_batch_size=2',
        '--max_steps=1',
        '--eval_steps=1',
    ]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    assert checkpoint.damage(tmp_path / 'run/step-000001') is None
