"""Tests of nanoseek/checkpoint.py: written whole or not at all, never silently missing, found
again; and of runs of train.py that lose their terminal, their disk or their writer."""
import errno
import fcntl
import math
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models

import prepare
from model import Config, Transformer
from nanoseek import checkpoint, files

HERE = Path(prepare.__file__).resolve().parent
CPU = torch.device('cpu')


class Written:
    """A tiny model with an optimizer that has taken a step, and what checkpoint.write takes."""

    def __init__(self, seed=1):
        torch.manual_seed(seed)
        config = Config(vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                        num_attention_heads=2, max_position_embeddings=32)
        self.model = Transformer(config)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.scaler = torch.amp.GradScaler('cpu', enabled=False)
        self.model(torch.arange(10)[None], torch.arange(1, 11)[None])[1].backward()
        self.optimizer.step()
        self.tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(11)}, '0'))

    def arguments(self, final, keep=2, **settings):
        state = checkpoint.training_state({'step': 3}, self.optimizer, self.scaler, CPU)
        state = checkpoint.cpu_copy(state, whole=lambda x: x, keep=True)
        settings = {'seed': 7, 'version': checkpoint.VERSION, **settings}
        return (Path(final), self.model, self.model.snapshot(), state, settings, '# A card\n',
                self.tokenizer, {}, keep)

    def write(self, final, **more):
        return checkpoint.write(*self.arguments(final, **more))


@pytest.fixture
def run():
    return Written()


def no(line):
    raise AssertionError(line)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def same(a, b):
    """Dicts and lists of the same tensors, bit for bit"""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def load(folder, run):
    return checkpoint.load_training_state(folder, run.optimizer, run.scaler, CPU,
                                          lambda x, like: x)


# ------------------------------------------------------------------------------ a round trip

@pytest.mark.parametrize('name', ['run', 'a b', b'r\xff\xfe', '\u540d'.encode()])
def test_what_was_written_is_found_whole_and_comes_back_bit_for_bit(tmp_path, run, name):
    out = tmp_path / os.fsdecode(name)
    line = run.write(out / 'step-000003')
    assert line.startswith(f'saved {out / "step-000003"} in ')
    assert names(out) == ['step-000003']
    assert checkpoint.newest(out, no) == out / 'step-000003'
    random = torch.rand(3)
    other = Written(seed=2)
    assert load(out / 'step-000003', other) == {'step': 3}
    assert same(other.optimizer.state_dict(), run.optimizer.state_dict())
    assert torch.equal(torch.rand(3), random)
    weights = Transformer.from_pretrained(out / 'step-000003').state_dict()
    assert same(dict(weights), dict(run.model.state_dict()))


@pytest.mark.parametrize('mask', [0o022, 0o077, 0o002])
def test_whoever_may_read_one_file_of_a_checkpoint_may_read_all(tmp_path, run, mask):
    before = os.umask(mask)
    try:
        run.write(tmp_path / 'step-000003')
    finally:
        os.umask(before)
    modes = {p.stat().st_mode & 0o777 for p in tmp_path.rglob('*') if p.is_file()}
    assert modes == {0o666 & ~mask}


def test_a_copy_does_not_change_with_its_original(run):
    state = checkpoint.training_state({}, run.optimizer, run.scaler, CPU)
    copy = checkpoint.cpu_copy(state, lambda x: x, keep=True)
    before = checkpoint.cpu_copy(copy, lambda x: x, keep=True)
    run.optimizer.step()
    assert same(copy, before)
    assert not same(copy['optimizer'], run.optimizer.state_dict())


def test_weights_that_are_not_finite_are_not_written(tmp_path, run):
    run.model.model.norm.weight.data[2] = math.inf
    assert 'is not written: model.norm.weight is not finite' in run.write(tmp_path / 'step-000003')
    assert names(tmp_path) == []


def test_the_newest_and_the_best_stay(tmp_path, run):
    for step, loss in {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 2.5}.items():
        run.write(tmp_path / f'step-{step:06d}', val_loss=loss)
    assert names(tmp_path) == ['step-000002', 'step-000004', 'step-000005']
    (tmp_path / 'step-000002/trainer/settings.json').write_text('[]')
    run.write(tmp_path / 'step-000006', val_loss=2.2)
    assert names(tmp_path) == ['step-000005', 'step-000006']


# ------------------------------------------------------------------ nothing is silently missing

@pytest.mark.parametrize('error', [MemoryError('no memory'), KeyError('a bug'),
                                   RuntimeError('a bug'), AssertionError('a bug')])
def test_whatever_ends_the_writer_is_raised_as_it_is(tmp_path, run, error):
    def fails(*args, **kwargs):
        raise error
    run.model.save_pretrained = fails
    writer = checkpoint.Writer()
    writer.start(*run.arguments(tmp_path / 'step-000003'))
    with pytest.raises(type(error)) as raised:
        writer.finish()
    assert raised.value is error
    assert raised.traceback[-1].name == 'fails'
    assert names(tmp_path) == []
    assert writer.finish() is None


def test_the_end_waits_for_the_writer_and_hears_of_its_error(tmp_path, run, caplog):
    save = run.model.save_pretrained

    def slow(*args, **kwargs):
        time.sleep(0.2)
        save(*args, **kwargs)
    run.model.save_pretrained = slow
    with checkpoint.Writer() as writer:
        writer.start(*run.arguments(tmp_path / 'step-000001'))
    assert names(tmp_path) == ['step-000001']
    with pytest.raises(ZeroDivisionError), checkpoint.Writer() as writer:
        writer.start(*run.arguments(tmp_path / 'step-000002'))
        raise ZeroDivisionError
    assert names(tmp_path) == ['step-000001', 'step-000002']
    run.tokenizer = None
    with pytest.raises(AttributeError), checkpoint.Writer() as writer:
        writer.start(*run.arguments(tmp_path / 'step-000003'))
    assert caplog.text == ''
    with pytest.raises(ZeroDivisionError), checkpoint.Writer() as writer:
        writer.start(*run.arguments(tmp_path / 'step-000003'))
        raise ZeroDivisionError
    assert "AttributeError: 'NoneType'" in caplog.text
    assert names(tmp_path) == ['step-000001', 'step-000002']


# ---------------------------------------------------------------------------------- odd disks

@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO,
                                    errno.ESTALE, errno.ENOTCONN])
def test_a_disk_that_fails_is_named_with_its_reason(tmp_path, monkeypatch, run, number):
    def fsync(descriptor):
        raise OSError(number, os.strerror(number))
    run.write(tmp_path / 'step-000001')
    monkeypatch.setattr(os, 'fsync', fsync)
    with pytest.raises(OSError) as raised:
        run.write(tmp_path / 'step-000002')
    text = str(raised.value)
    assert f'{tmp_path}/step-000002 could not be written: ' in text
    assert os.strerror(number) in text
    assert ('are free there' in text) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert names(tmp_path) == ['step-000001']


@pytest.mark.parametrize('size', ['12k', '28k', '44k'])
def test_whichever_file_fills_the_disk_the_reason_is_that(disk, run, size):
    """config.json, the weights (which a library writes), what torch.save writes"""
    folder = disk(size)
    with pytest.raises(OSError) as raised:
        run.write(folder / 'step-000001')
    assert 'step-000001 could not be written: ' in str(raised.value)
    assert 'MB are free there' in str(raised.value)
    assert names(folder) == []


@pytest.mark.parametrize('missing', ['fsync of folders', 'fsync of readers', 'locks'])
def test_what_a_file_system_does_not_have_is_done_without(tmp_path, monkeypatch, run, missing):
    real = os.fsync

    def fsync(descriptor):
        if missing == 'fsync of folders' and os.path.isdir(f'/proc/self/fd/{descriptor}'):
            raise OSError(errno.EINVAL, 'Invalid argument')
        mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        folder = os.path.isdir(f'/proc/self/fd/{descriptor}')
        if missing == 'fsync of readers' and mode == os.O_RDONLY and not folder:
            raise OSError(errno.EBADF, 'Bad file descriptor')
        real(descriptor)
    monkeypatch.setattr(os, 'fsync', fsync)
    if missing == 'locks':
        def flock(descriptor, operation):
            raise OSError(errno.ENOTSUP, 'Operation not supported')
        monkeypatch.setattr(fcntl, 'flock', flock)
    with files.lock(tmp_path):
        for step in range(1, 5):
            assert 'could not' not in run.write(tmp_path / f'step-{step:06d}')
    assert names(tmp_path) == ['step-000003', 'step-000004']
    assert checkpoint.damage(tmp_path / 'step-000003') is None


def test_an_old_checkpoint_that_cannot_be_removed_is_said_and_ends_nothing(tmp_path, monkeypatch,
                                                                          run):
    """As on Windows, or on a network drive, while another program reads it"""
    real = os.replace

    def replace(old, new):
        if str(old).endswith('step-000001'):
            raise PermissionError(errno.EACCES, 'Permission denied', str(old))
        real(old, new)
    monkeypatch.setattr(os, 'replace', replace)
    for step in (1, 2, 3):
        line = run.write(tmp_path / f'step-{step:06d}', keep=2)
    assert line.startswith('saved ')
    assert 'an older one could not be removed: ' in line and "step-000001'" in line
    assert names(tmp_path) == ['step-000001', 'step-000002', 'step-000003']


def test_a_folder_that_becomes_read_only_is_named_and_keeps_what_it_has(run):
    out = Path(tempfile.mkdtemp())          # pytest's own are closed to other users
    try:
        run.write(out / 'step-000001')
        out.chmod(0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)               # root may write anywhere
        with pytest.raises(OSError, match='step-000002 could not be written: .*denied.*step-'):
            run.write(out / 'step-000002')
        assert checkpoint.newest(out, no) == out / 'step-000001'
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        shutil.rmtree(out, ignore_errors=True)


def test_a_folder_that_vanishes_is_made_again(tmp_path, run):
    run.write(tmp_path / 'out/step-000001')
    shutil.rmtree(tmp_path / 'out')
    run.write(tmp_path / 'out/step-000002')
    assert checkpoint.newest(tmp_path / 'out', no) == tmp_path / 'out/step-000002'


def test_half_checkpoints_are_cleared_and_what_cannot_be_is_no_reason_to_stop(tmp_path, run,
                                                                             monkeypatch):
    for step in (1, 2):
        run.write(tmp_path / f'step-{step:06d}')
    shutil.copytree(tmp_path / 'step-000001', tmp_path / '.step-000003.tmp')
    checkpoint.clear(tmp_path, tmp_path / 'step-000001', 1)
    assert names(tmp_path) == ['step-000001']
    shutil.copytree(tmp_path / 'step-000001', tmp_path / '.step-000003.tmp')

    def rmdir(*args, **kwargs):
        raise OSError(errno.ENOTEMPTY, 'Directory not empty')
    monkeypatch.setattr(os, 'rmdir', rmdir)
    checkpoint.clear(tmp_path, tmp_path / 'step-000001', 1)
    assert names(tmp_path)[-1] == 'step-000001'


@pytest.mark.parametrize('data', [b'', b'PK', b'not a checkpoint'])
def test_a_state_that_cannot_be_read_is_named(tmp_path, run, data):
    run.write(tmp_path / 'step-000001')
    (tmp_path / 'step-000001/trainer/state.pt').write_bytes(data)
    with pytest.raises(OSError, match='state.pt cannot be read: ..'):
        load(tmp_path / 'step-000001', run)
    assert 'state.pt has' in checkpoint.damage(tmp_path / 'step-000001')


# --------------------------------------------------------------------------- runs of train.py

TINY = ['--hidden_size=32', '--num_hidden_layers=1', '--num_attention_heads=2', '--block_size=32',
        '--max_position_embeddings=64', '--batch_size=2', '--eval_steps=1', '--log_interval=1',
        '--device=cpu', '--compile=false', '--dtype=float32', '--out_dir=out']
START = """
import runpy, sys, time
sys.path.insert(0, {here!r})
{patch}
sys.argv[0] = 'train.py'
runpy.run_path({here!r} + '/train.py', run_name='__main__')
"""
SLOWLY = """
from nanoseek import monitor
add = monitor.Log.add
def slow_add(self, **values):
    time.sleep(0.05)
    add(self, **values)
monitor.Log.add = slow_add
"""


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    text = (HERE / 'data/shakespeare/input.txt').read_text(encoding='utf-8')
    (folder / 'small.txt').write_text(text[:3000], encoding='utf-8')
    prepare.prepare(prepare.Settings(str(folder / 'small.txt'), out_dir=str(folder / 'small')))
    return folder / 'small'


def begin(folder, data, *args, patch='', **how):
    """train.py in a process of its own, with a patch of what it stands on"""
    code = START.format(here=str(HERE), patch=patch)
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    return subprocess.Popen([sys.executable, '-c', code, *TINY, f'--dataset={data}', *args],
                            cwd=folder, **{**pipes, **how})


def end(process, seconds=120):
    """-> exit status, stdout, stderr"""
    out, error = process.communicate(timeout=seconds)
    return process.returncode, out, error


def wait_for(file, process, seconds=120):
    limit = time.time() + seconds
    while not file.exists():
        assert process.poll() is None, process.communicate()
        assert time.time() < limit
        time.sleep(0.01)


def steps_taken(folder, process):
    """Waits for the first"""
    file = folder / 'out/metrics.jsonl'
    wait_for(file, process)
    while file.read_text() == '':
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def stopped_at(folder):
    """The step of the last checkpoint, which is whole; train.log says what stopped the run"""
    found = checkpoint.newest(folder / 'out', no)
    log = (folder / 'out/train.log').read_text(encoding='utf-8')
    name, step = re.findall(r'^(\w+): stopped after step (\d+);', log, re.M)[-1]
    assert checkpoint.step_of(found) == int(step)
    return name, int(step)


@pytest.mark.slow
def test_a_run_that_loses_its_terminal_stops_with_a_checkpoint(tmp_path, data):
    ours, theirs = pty.openpty()
    process = begin(tmp_path, data, '--max_steps=100000', patch=SLOWLY, stdin=theirs,
                    stdout=theirs, stderr=theirs, start_new_session=True,
                    preexec_fn=lambda: fcntl.ioctl(0, 0x540E, 0))       # TIOCSCTTY
    os.close(theirs)
    os.set_blocking(ours, False)
    steps_taken(tmp_path, process)
    os.close(ours)
    assert process.wait(60) == 0
    assert stopped_at(tmp_path)[0] == 'SIGHUP'


@pytest.mark.slow
@pytest.mark.parametrize('name', ['SIGHUP', 'SIGUSR1', 'SIGTERM'])
def test_signals_stop_a_run_with_a_checkpoint_unless_ignored_from_the_start(tmp_path, data, name):
    process = begin(tmp_path, data, '--max_steps=100000', patch=SLOWLY)
    steps_taken(tmp_path, process)
    process.send_signal(getattr(signal, name))
    status, out, error = end(process)
    assert (status, error) == (0, '')
    assert stopped_at(tmp_path)[0] == name
    step = stopped_at(tmp_path)[1]
    if name != 'SIGTERM':
        ignored = f'import signal; signal.signal(signal.{name}, signal.SIG_IGN)'
        process = begin(tmp_path, data, f'--max_steps={step + 20}', patch=ignored + SLOWLY)
        time.sleep(3)
        for _ in range(20):
            process.send_signal(getattr(signal, name))
            time.sleep(0.05)
        assert end(process)[0] == 0
        assert checkpoint.step_of(checkpoint.newest(tmp_path / 'out', no)) == step + 20


@pytest.mark.slow
def test_a_second_run_in_the_same_out_dir_is_refused_and_a_killed_one_is_not_in_the_way(tmp_path,
                                                                                       data):
    first = begin(tmp_path, data, '--max_steps=100000', '--checkpoint_interval=5',
                  '--keep_checkpoints=0', patch=SLOWLY)
    wait_for(tmp_path / 'out/step-000005', first)
    status, out, error = end(begin(tmp_path, data, '--max_steps=9', '--resume=never'))
    assert (status, out) == (2, '')
    assert re.fullmatch(rf'train.py: out is being written by process {first.pid} on \S+ since '
                        r'[-\d]+ [:\d]+: wait for it, stop it, or take another out_dir\n', error)
    assert (tmp_path / 'out/step-000005').exists()
    first.kill()
    first.communicate()
    found = checkpoint.step_of(checkpoint.newest(tmp_path / 'out', no))
    status, out, error = end(begin(tmp_path, data, f'--max_steps={found + 2}'))
    assert (status, error) == (0, '')
    assert not (tmp_path / 'out/.lock').exists()
    assert f'going on from out/step-{found:06d}' in out


WRITER_DIES = """
from nanoseek import folders
def dies(*args):
    raise {error}
folders.write_companions = dies
"""


@pytest.mark.slow
@pytest.mark.parametrize('error', [
    'KeyError("of a writer")', pytest.param('MemoryError("of a writer")', marks=pytest.mark.slow)])
def test_a_run_whose_writer_dies_ends_and_says_why(tmp_path, data, error):
    process = begin(tmp_path, data, '--max_steps=500', '--checkpoint_interval=5',
                    patch=WRITER_DIES.format(error=error))
    status, out, text = end(process)
    assert status != 0
    if 'KeyError' in error:
        assert "KeyError: 'of a writer'" in text
        assert 'in dies' in text
    else:
        assert (status, text.count('\n')) == (2, 1)
        assert text.startswith('train.py: out of memory: ')
    assert 'stopped' not in out
    assert list((tmp_path / 'out').glob('*step*')) == []


ODD = """
import errno, fcntl, os
real = os.fsync
def fsync(descriptor):
    if os.path.isdir(f'/proc/self/fd/{descriptor}'):
        raise OSError(errno.EINVAL, 'Invalid argument')
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, 'Bad file descriptor')
    real(descriptor)
os.fsync = fsync
def flock(descriptor, operation):
    raise OSError(errno.ENOLCK, 'No locks available')
fcntl.flock = flock
"""


@pytest.mark.slow
def test_a_run_on_an_odd_disk_goes_on_with_a_warning_each(tmp_path, data):
    for steps in (4, 8):
        process = begin(tmp_path, data, f'--max_steps={steps}', '--checkpoint_interval=2',
                        patch=ODD)
        status, out, error = end(process)
        assert status == 0
        assert len(error.splitlines()) == 2, error
        assert 'without locks' in error and 'cannot flush' in error
    assert 'going on from out/step-000004' in out
    assert checkpoint.newest(tmp_path / 'out', no).name == 'step-000008'


NO_MAPS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
typedef void *(*map)(void *, size_t, int, int, int, off_t);
static void *call(const char *name, void *at, size_t n, int prot, int flags, int fd, off_t off) {
    char link[64], path[4096];
    if (fd >= 0) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t size = readlink(link, path, sizeof path - 1);
        path[size > 0 ? size : 0] = 0;
        if (strstr(path, "/without-maps/")) {
            errno = ENODEV;
            return MAP_FAILED;
        }
    }
    return ((map)dlsym(RTLD_NEXT, name))(at, n, prot, flags, fd, off);
}
void *mmap(void *a, size_t n, int p, int f, int d, off_t o) {
    return call("mmap", a, n, p, f, d, o);
}
void *mmap64(void *a, size_t n, int p, int f, int d, off_t o) {
    return call("mmap64", a, n, p, f, d, o);
}
"""


@pytest.mark.slow
def test_a_folder_that_cannot_be_mapped_gives_the_same_run(tmp_path, data):
    """Everything is there: dataset, checkpoints, what a run goes on from, what is sampled"""
    compiler = shutil.which('cc')
    if compiler is None or sys.platform != 'linux':
        pytest.skip('needs a C compiler and LD_PRELOAD')
    (tmp_path / 'no_maps.c').write_text(NO_MAPS)
    library = tmp_path / 'no_maps.so'
    subprocess.run([compiler, '-shared', '-fPIC', '-o', library, tmp_path / 'no_maps.c', '-ldl'],
                   check=True)
    results = []
    for name, preload in {'with-maps': '', 'without-maps': library}.items():
        env = {**os.environ, 'LD_PRELOAD': str(preload)}
        folder = tmp_path / name
        folder.mkdir()
        shutil.copytree(data, folder / 'data')
        for steps in (3, 6):
            status, out, error = end(begin(folder, 'data', f'--max_steps={steps}', env=env))
            assert (status, error) == (0, '')
        sample = [sys.executable, HERE / 'sample.py', '--checkpoint=out', '--prompt=the',
                  '--device=cpu']
        done = subprocess.run(sample, cwd=folder, env=env, capture_output=True)
        assert done.returncode == 0, done.stderr
        weights = (folder / 'out/step-000006/model.safetensors').read_bytes()
        results.append((weights, done.stdout))
    assert results[0] == results[1]


@pytest.mark.slow
def test_an_out_dir_that_vanishes_in_a_run_is_made_again(tmp_path, data):
    process = begin(tmp_path, data, '--max_steps=40', '--checkpoint_interval=5', patch=SLOWLY)
    wait_for(tmp_path / 'out/step-000005', process)
    shutil.rmtree(tmp_path / 'out', ignore_errors=True)
    status, out, error = end(process)
    assert checkpoint.newest(tmp_path / 'out', no).name == 'step-000040', (out, error)
    assert status == 0


@pytest.mark.slow
def test_ranks_have_one_lock_and_a_signal_to_one_of_them_stops_all(tmp_path, data):
    start = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
             HERE / 'train_ddp.py', *TINY, f'--dataset={data}', '--log_interval=100']
    first = subprocess.Popen([*start, '--max_steps=10000000'], cwd=tmp_path, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    steps_taken(tmp_path, first)
    second = subprocess.run([*start, '--max_steps=9'], cwd=tmp_path, capture_output=True,
                            text=True, timeout=300)
    assert second.returncode != 0
    assert second.stderr.count('train_ddp.py: out is being written by process ') == 1
    children = Path(f'/proc/{first.pid}/task/{first.pid}/children').read_text().split()
    os.kill(int(children[-1]), signal.SIGUSR1)
    status, out, error = end(first)
    assert status == 0, error
    stopped_at_step = re.search(r'(SIGUSR1|another rank): stopped after step (\d+);', out)
    found = checkpoint.newest(tmp_path / 'out', no)
    assert checkpoint.step_of(found) == int(stopped_at_step[2])
    assert not (tmp_path / 'out/.lock').exists()
