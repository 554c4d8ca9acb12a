"""train_ddp.py: what several processes train is what train.py trains alone.

Real gloo processes, started by torchrun. Each runs WORKER, which runs train_ddp.py as it is,
several times over, and puts faults into it.
"""
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, hooks, run, train_here
from model import Transformer
from nanoseek import checkpoint, log

pytestmark = pytest.mark.slow

DENSE = ('--attention=gqa --num_key_value_heads=1 --hidden_size=32 --num_hidden_layers=2 '
         '--num_attention_heads=2 --max_position_embeddings=32 --initializer_range=0.1 '
         '--block_size=32 --batch_size=2 --global_batch_size=8 --max_steps=20 '
         '--learning_rate=1e-2 --warmup_steps=5 --log_interval=1 --eval_interval=5 '
         '--eval_steps=4 --checkpoint_interval=4 --keep_checkpoints=0 --device=cpu '
         '--dtype=float32 --max_minutes=1000 --max_bad_steps=3 --out_dir=run ')
MOE = DENSE + ('--attention=mla --kv_lora_rank=16 --qk_nope_head_dim=8 --qk_rope_head_dim=4 '
               '--v_head_dim=10 --n_routed_experts=8 --n_shared_experts=1 '
               '--num_experts_per_tok=2 --moe_intermediate_size=16 --first_k_dense_replace=1 '
               '--n_group=2 --topk_group=1 --seq_aux_loss_weight=1e-2 --bias_update_speed=0.01 '
               '--num_nextn_predict_layers=1 ')
KINDS = {
    'dense': DENSE,
    'moe': MOE,
    'linear': DENSE + '--attention=linear',
    'mixed': DENSE + "--dataset={'../small':0.7,'../other':0.3}",
    'moe_chat': MOE + '--dataset=../talks --block_size=100 --max_position_embeddings=100',
    'muon_moe': MOE + '--optimizer=muon',
}
CHAIN = MOE + '--eval_interval=100'                         # stops evaluate
UNEVEN = DENSE + '--eval_steps=0'                           # 9 sequences, 2 at a time
PAIRS = [*(f'{kind}-ddp-2' for kind in KINDS), 'moe-fsdp-2', 'muon_moe-fsdp-2', 'moe-fsdp-4']
TIMES = {'elapsed_s', 'step_ms', 'tok_per_s', 'mfu', 'memory_mb'}

WORKER = """
import json, os, runpy, signal, sys, time, zlib
import torch.distributed as dist
import train
from conftest import hooks
from nanoseek import checkpoint, log
from nanoseek.optim import whole

train.matmul_rate = lambda device, dtype: 1e11              # it takes seconds
main, catch_signals, destroy = train.main, train.catch_signals, dist.destroy_process_group
init = dist.init_process_group
dist.init_process_group = lambda *args, **kw: dist.is_initialized() or init(*args, **kw)
dist.destroy_process_group = lambda: None
rank = int(os.environ['RANK'])
restarted = int(os.environ['TORCHELASTIC_RESTART_COUNT']) > 0
caught, handles, runs = [], [], []

class Run(checkpoint.Run):
    def __init__(self, *args):
        super().__init__(*args)
        runs.append(self)

def is_due(at, *kinds):
    kind, who, *steps = job['fault']
    position = at.step + runs[-1].skipped                   # in the data: it does not go back
    return kind in kinds and rank == who and position in steps and not restarted

def start(at):
    kind = job['fault'][0]
    if is_due(at, 'SIGKILL'):
        os.kill(os.getpid(), signal.SIGKILL)
    if is_due(at, 'SIGINT', 'SIGTERM'):
        os.kill(os.getppid(), getattr(signal, kind))        # to torchrun, which passes it on
        while not caught[-1]:
            time.sleep(0.001)
    if is_due(at, 'minutes'):
        log.STARTED = 0
    if is_due(at, 'loss'):
        norm = at.model.model.norm
        handles.append(norm.register_forward_hook(lambda norm, x, out: out * float('nan')))

def backward(at):
    while handles:
        handles.pop().remove()
    if is_due(at, 'gradient'):                              # after all ranks have the mean
        next(at.model.parameters()).grad.mul_(float('nan'))

def catch():
    caught.append(catch_signals())
    return caught[-1]

def checksum(tensor):
    return zlib.crc32(whole(tensor.detach()).contiguous().numpy().tobytes())

def watched(s, given, ranks):
    main(s, given, ranks)
    run = runs[-1]
    moments = [t for state in run.optimizer.state.values() for t in state.values()]
    tensors = [*run.model.state_dict().values(), *moments]
    ends = [None] * ranks.world
    dist.all_gather_object(ends, [run.step, run.skipped, run.rollbacks, *map(checksum, tensors)])
    if rank == 0:
        open('ranks.json', 'w').write(json.dumps(ends))

train.main, train.catch_signals, checkpoint.Run = watched, catch, Run
for job in json.loads(sys.argv[1]):
    os.makedirs(job['folder'], exist_ok=True)
    os.chdir(job['folder'])
    sys.argv[1:] = job['args']
    log.STARTED = time.time()
    with hooks(start=start, backward=backward):
        runpy.run_module('train_ddp', run_name='__main__')
if dist.is_initialized():
    destroy()
"""


@pytest.fixture(scope='session')
def place(tmp_path_factory):
    """A dataset of 6,000 characters, another one to mix with it, and the worker"""
    folder = tmp_path_factory.mktemp('ddp')
    text = (ROOT / 'data/shakespeare/input.txt').read_text(encoding='utf-8')[:6000]
    for name, part, options in (('small', text, ''), ('other', text[::-2], '--tokenizer=small')):
        (folder / f'{name}.txt').write_text(part, encoding='utf-8')
        command = f'{name}.txt --out_dir={name} {options}'
        run(folder, 'prepare.py', *command.split()).check_returncode()
    with open(folder / 'talks.jsonl', 'w') as f:
        for i in range(60):                             # answers of very different lengths
            talk = [{'role': 'user', 'content': f'{i}'},
                    {'role': 'assistant', 'content': 'a' * (40 if i % 3 else 1)}]
            f.write(json.dumps({'messages': talk}) + '\n')
    command = 'talks.jsonl --out_dir=talks --pack=100 --tokenizer=bpe:300 --val_frac=0.3'
    run(folder, 'prepare.py', *command.split()).check_returncode()
    (folder / 'worker.py').write_text(WORKER, encoding='utf-8')
    return folder


def job(place, name, options, *fault):
    """A run for torchrun. fault: its kind, a rank, and steps of the data at which it occurs"""
    args = [f'--dataset={place / "small"}', '--timeout_minutes=3', *options.split()]
    return {'folder': str(place / name), 'args': args, 'fault': fault or ['none', 0]}


def torchrun(place, world, *jobs, restarts=0):
    """Run jobs one after the other. Return the CompletedProcess, with its seconds."""
    options = f'--standalone --nproc_per_node={world} --max-restarts={restarts}'
    began = time.time()
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', *options.split(), place / 'worker.py',
         json.dumps(jobs)], capture_output=True, text=True, timeout=600,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)})
    done.seconds = time.time() - began
    return done


def alone(place, name, options, stop=None):
    """Run train.py, here. It stops after the step `stop`."""
    def start(at):
        if at.step == stop:
            log.STARTED = 0
    with hooks(start=start):
        dataset = f'--dataset={place / "small"}'
        assert train_here(place / name, dataset, *options.split()) == 0
    return place / name


@pytest.fixture(scope='session')
def single(place):
    """What one process makes of each kind, and the first steps of a run that others continue"""
    alone(place, 'chain', CHAIN, stop=5)
    alone(place, 'unbroken', CHAIN)
    alone(place, 'uneven', UNEVEN)
    return {kind: alone(place, f'{kind}-1', options) for kind, options in KINDS.items()}


@pytest.fixture(scope='session')
def two(place, single):
    """All that two ranks do, in one torchrun, which SIGTERM ends"""
    jobs = [job(place, 'chain', CHAIN, 'minutes', 1, 10)]
    for name in PAIRS:
        kind, parallel, world = name.split('-')
        if world == '2':
            jobs.append(job(place, name, f'{KINDS[kind]} --parallel={parallel}'))
    for name in ('loss-fsdp', 'gradient-ddp'):
        fault, parallel = name.split('-')
        jobs.append(job(place, name, f'{DENSE} --parallel={parallel}', fault, 1, 7, 12, 13, 14))
    jobs.append(job(place, 'uneven-2', UNEVEN + ' --sample_interval=20 --parallel=fsdp'))
    jobs.append(job(place, 'story', DENSE, 'SIGTERM', 0, 6))
    return torchrun(place, 2, *jobs)


@pytest.fixture(scope='session')
def four(place, two):
    """A run from its beginning to its end, then a part of the chain, until Ctrl-C"""
    return torchrun(place, 4, job(place, 'moe-fsdp-4', f'{MOE} --parallel=fsdp'),
                    job(place, 'chain', f'{CHAIN} --parallel=fsdp', 'SIGINT', 3, 15))


@pytest.fixture(scope='session')
def chain(place, four):
    return alone(place, 'chain', CHAIN)


@pytest.fixture(scope='session')
def story(place, two):
    """The run that SIGTERM ended: until rank 1 is killed, then with rank 0 killed and replaced"""
    return [torchrun(place, 2, job(place, 'story', DENSE, 'SIGKILL', 1, 15)),
            torchrun(place, 2, job(place, 'story', DENSE, 'SIGKILL', 0, 18), restarts=2)]


def numbers(folder):
    """{(step, kind of line): line} of metrics.jsonl, each once, without times"""
    entries = {}
    for line in map(json.loads, (folder / 'run/metrics.jsonl').open()):
        kind = line.get('event', 'val' if 'val_loss' in line else 'train')
        assert (line['step'], kind) not in entries
        entries[line['step'], kind] = {k: v for k, v in line.items() if k not in TIMES}
    return entries


def final(folder, step=20):
    return folder / f'run/step-{step:06d}'


def weights(folder):
    return load_file(final(folder) / 'model.safetensors')


def moments(folder):
    return torch.load(final(folder) / 'trainer/state.pt')['optimizer']['state']


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*'))


def end(folder):
    """All ranks ended with the same weights and moments -> step, skipped, rollbacks"""
    ranks = json.loads((folder / 'ranks.json').read_text())
    assert all(rank == ranks[0] for rank in ranks)
    return ranks[0][:3]


def assert_close(a, b, rtol=0.0, atol=0.0):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def assert_near(a, b, most):
    """Tensors by name: the norm of the difference over that of b"""
    assert a.keys() == b.keys()
    for name in b:
        assert (a[name] - b[name]).norm() <= most * b[name].norm(), name


# ----------------------------------------------------------------------------- the same training

@pytest.fixture(params=PAIRS)
def pair(request, place, single, two):
    """The folder of a run of several ranks, and train.py's"""
    name = request.param
    done = request.getfixturevalue('four') if name.endswith('4') else two
    assert final(place / name).exists(), done.stderr[-3000:]
    return place / name, single[name.split('-')[0]]


def test_losses_norms_loads_and_validation_are_those_of_one_process(pair):
    many, one = map(numbers, pair)
    assert_close(many, one, rtol=1e-5, atol=1e-6)
    first = [{key: lines[key] for key in lines if key[0] <= 5} for lines in (many, one)]
    assert len(first[1]) == 6
    assert_close(*first, atol=1e-6)


def test_weights_moments_and_router_biases_are_those_of_one_process(pair):
    many, one = map(weights, pair)
    assert_close(many, one, atol=2e-4)
    assert_near(many, one, 5e-5)
    biases = [name for name in one if name.endswith('e_score_correction_bias')]
    assert len(biases) == ('moe' in pair[0].name) * 2
    for name in biases:
        assert one[name].any()
        assert torch.equal(many[name], one[name])
    many, one = map(moments, pair)
    assert many.keys() == one.keys()
    for i in one:
        assert_near(many[i], one[i], 1e-4)


def test_all_ranks_end_alike_and_the_first_alone_writes_the_same_files(pair):
    many, one = pair
    assert end(many) == [20, 0, 0]
    assert files(many) == ['ranks.json', *files(one)]
    Transformer.from_pretrained(final(many))
    assert checkpoint.damage(final(many)) is None
    text = (many / 'run/train.log').read_text()
    counts = {'parameters: ': 1, 'validation loss': 4, 'saved ': 5, '/20 | loss': 20}
    assert {words: text.count(words) for words in counts} == counts


def test_validation_is_the_same_if_ranks_have_unequal_shares(place, two):
    assert final(place / 'uneven-2').exists(), two.stderr[-3000:]
    assert_close(numbers(place / 'uneven-2'), numbers(place / 'uneven'), rtol=1e-5, atol=1e-6)
    assert (place / 'uneven-2/run/train.log').read_text().count('--- sample') == 1


# ------------------------------------------------------------------------------------ continuing

def test_a_run_goes_from_one_rank_to_two_to_four_and_back_as_if_undisturbed(place, chain):
    many, one = numbers(chain), numbers(place / 'unbroken')
    text = (chain / 'run/train.log').read_text()
    for step in (5, 10, 15):
        assert f'stopped after step {step};' in text
        assert f'continuing from run/step-{step:06d}' in text
        assert files(final(chain, step)) == files(final(chain))
        del many[step, 'val']
    assert list(many) == [*((n, 'train') for n in range(1, 21)), (20, 'val')]
    assert_close(many, one, rtol=1e-5, atol=1e-5)
    many, one = weights(chain), weights(place / 'unbroken')
    assert_near(many, one, 5e-5)
    for name in one:
        assert torch.equal(many[name], one[name]) or 'bias' not in name


@pytest.mark.parametrize('torchrun, folder, step', [('two', 'story', 6), ('four', 'chain', 15)])
def test_a_signal_to_torchrun_ends_all_ranks_at_one_step(request, place, torchrun, folder, step):
    done = request.getfixturevalue(torchrun)
    assert done.stdout.count(f': stopped after step {step};') == 1
    assert done.stdout.count(f'saved run/step-{step:06d}') == 1
    assert checkpoint.damage(final(place / folder, step)) is None
    assert 'forcefully' not in done.stderr


def test_a_dead_rank_ends_the_others_soon_and_is_named(story):
    dead, _ = story
    assert dead.stdout.count('continuing from run/step-000006') == 1
    assert dead.returncode != 0
    assert dead.seconds < 150                   # less than timeout_minutes
    cause = dead.stderr.partition('Root Cause')[2]
    assert 'rank      : 1 ' in cause and 'Signal 9 (SIGKILL)' in cause


def test_replaced_workers_end_bit_for_bit_as_if_none_had_been_killed(place, two, story):
    _, done = story
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('continuing from run/step-') == 2
    assert end(place / 'story') == [20, 0, 0]
    assert_close(weights(place / 'story'), weights(place / 'dense-ddp-2'))
    assert_close(moments(place / 'story'), moments(place / 'dense-ddp-2'))
    lines = numbers(place / 'story')
    del lines[6, 'val']
    assert lines == numbers(place / 'dense-ddp-2')


# -------------------------------------------------------------------------------- what goes wrong

@pytest.mark.parametrize('name', ['loss-fsdp', 'gradient-ddp'])
def test_what_is_not_finite_on_one_rank_is_skipped_and_rolled_back_by_all(place, two, name):
    assert final(place / name).exists(), two.stderr[-3000:]
    events = [key for key in numbers(place / name) if key[1] not in ('train', 'val')]
    assert events == [(7, 'skipped'), (12, 'skipped'), (13, 'skipped'), (14, 'skipped'),
                      (13, 'rollback')]
    assert end(place / name) == [20, 2, 1]


def test_a_mistake_is_one_line_and_writes_nothing(place):
    done = torchrun(place, 2, job(place, 'mistake', DENSE + '--batch_size=3'))
    assert done.returncode != 0
    assert done.stderr.count('worker.py: ') == 1
    assert 'worker.py: global_batch_size=8: must be a multiple of 6' in done.stderr
    assert not (place / 'mistake/run').exists()


def test_without_torchrun_it_says_how_to_start_it(place):
    done = run(place, 'train_ddp.py', *DENSE.split())
    assert done.returncode == 2
    assert done.stdout == ''
    assert done.stderr.startswith('train_ddp.py: start it with torchrun: torchrun --standalone ')
