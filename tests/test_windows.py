"""The scripts where there is no Linux: with everything taken away that Python has on POSIX alone,
and with Windows's ways put in its place. A simulation: no Windows has run this."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import train

HERE = Path(train.__file__).resolve().parent

AWAY = """
import errno, os, signal, sys, types
import fcntl
import subprocess                   # which takes msvcrt for a sign of Windows

for name in ('pthread_sigmask', 'sigwait', 'SIGHUP', 'SIGUSR1', 'SIGUSR2', 'SIGKILL', 'SIGPIPE',
             'SIGALRM', 'SIGCHLD', 'SIGQUIT', 'alarm', 'setitimer'):
    if hasattr(signal, name):
        delattr(signal, name)
for name in ('sysconf', 'sched_getaffinity', 'fork', 'geteuid', 'getpgid', 'setsid',
             'killpg', 'mkfifo', 'statvfs', 'getloadavg'):
    if hasattr(os, name):
        delattr(os, name)

system_open, system_fsync, system_rename = os.open, os.fsync, os.rename
flags_of = fcntl.fcntl


def open_no_folder(path, flags, *args, **kwargs):
    if not isinstance(path, int) and os.path.isdir(path):
        raise PermissionError(errno.EACCES, 'Permission denied', path)
    return system_open(path, flags, *args, **kwargs)


def fsync_what_is_written(descriptor):
    if flags_of(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, 'Bad file descriptor')
    system_fsync(descriptor)


def rename_over_nothing(old, new, **kwargs):
    if os.path.exists(new):
        raise FileExistsError(errno.EEXIST, 'File exists', old, None, new)
    system_rename(old, new, **kwargs)


def locking(descriptor, mode, count):
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise OSError(errno.EDEADLK, 'Resource deadlock avoided') from None


os.open, os.fsync, os.rename = open_no_folder, fsync_what_is_written, rename_over_nothing
msvcrt = types.ModuleType('msvcrt')
msvcrt.locking = locking
msvcrt.LK_NBLCK = 2
sys.modules['msvcrt'] = msvcrt
sys.modules['fcntl'] = None
sys.modules['resource'] = None
"""
TINY = ['--hidden_size=32', '--num_hidden_layers=1', '--num_attention_heads=2', '--block_size=32',
        '--max_position_embeddings=64', '--batch_size=2', '--eval_steps=1', '--log_interval=1',
        '--device=cpu', '--compile=false', '--dtype=float32', '--out_dir=out', '--dataset=data',
        '--sample_interval=4', '--checkpoint_interval=2']


@pytest.fixture
def run(tmp_path):
    """-> what runs a script of ours in a folder, as on Windows with a terminal of cp1252"""
    (tmp_path / 'site').mkdir()
    (tmp_path / 'site/sitecustomize.py').write_text(AWAY, encoding='utf-8')
    env = {**os.environ, 'PYTHONPATH': str(tmp_path / 'site'), 'PYTHONUTF8': '0', 'LC_ALL': 'C',
           'PYTHONCOERCECLOCALE': '0', 'PYTHONIOENCODING': 'cp1252', 'OMP_NUM_THREADS': '1'}

    def run(*args, status=0):
        done = subprocess.run([sys.executable, *args], cwd=tmp_path, env=env, capture_output=True,
                              text=True, encoding='cp1252', timeout=300)
        assert done.returncode == status, done.stderr
        assert 'Traceback' not in done.stderr
        return done
    return run


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, 'pthread_sigmask'), reason='this is it')
def test_from_text_to_text(tmp_path, run):
    with open(tmp_path / 'corpus.jsonl', 'w', encoding='utf-8') as f:
        for i in range(4000):
            text = f'{i} тёплый хлеб 😀 ' * 100
            f.write(json.dumps({'text': text}, ensure_ascii=False) + '\n')
    prepare = [HERE / 'prepare.py', 'corpus.jsonl', '--tokenizer=bpe:300', '--workers=2',
               '--out_dir=data', '--val_frac=0.01']
    assert 'written to data' in run(*prepare).stdout
    assert 'checks' in run(HERE / 'prepare.py', '--inspect=data').stdout

    train_it = [HERE / 'train.py', *TINY]
    done = run(*train_it, '--max_steps=4')
    assert 'step      4/4' in done.stdout
    assert 'going on from' in run(*train_it, '--max_steps=6').stdout
    assert sorted(path.name for path in (tmp_path / 'out').glob('step-*')) == ['step-000004',
                                                                              'step-000006']
    log = (tmp_path / 'out/train.log').read_text(encoding='utf-8')
    assert 'step      6/6' in log and 'stdout cannot be written' not in log

    done = run(HERE / 'sample.py', '--checkpoint=out', '--prompt=1', '--max_new_tokens=20')
    assert '20 tokens' not in done.stdout and done.stdout.startswith('1')
    done = run(HERE / 'train.py', *TINY, '--learning_rat=1', status=2)
    assert done.stderr.count('\n') == 1 and "did you mean 'learning_rate'?" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, 'pthread_sigmask'), reason='this is it')
def test_where_nobody_says_how_much_memory_there_is_the_smallest_micro_batch_is_taken(run):
    done = run(HERE / 'train.py', HERE / 'config/smol135_dense.py', '--num_hidden_layers=1',
               '--max_steps=0')
    assert done.stdout.splitlines()[-1].startswith('batch_size=1: nothing here says how much ')
