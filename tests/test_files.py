"""Tests of nanoseek/files.py and nanoseek/signals.py, with real processes and file systems that
lack what Linux's own have."""
import errno
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nanoseek import files, signals

HERE = Path(files.__file__).resolve().parent.parent

HOLD = '''
import sys, time
sys.path.insert(0, sys.argv[2])
from nanoseek import files
with files.lock(sys.argv[1]):
    print('locked', flush=True)
    time.sleep(60)
'''


def hold(folder):
    """A process that has the lock of a folder."""
    process = subprocess.Popen([sys.executable, '-c', HOLD, folder, HERE], text=True,
                               stdout=subprocess.PIPE)
    assert process.stdout.readline() == 'locked\n'
    return process


@pytest.fixture(autouse=True)
def no_warnings_yet():
    files.warned.clear()


def test_a_second_writer_is_refused_by_the_name_of_the_first(tmp_path):
    process = hold(tmp_path / 'a b')
    try:
        with pytest.raises(ValueError) as error, files.lock(tmp_path / 'a b'):
            pass
        assert f'a b is being written by process {process.pid} on ' in str(error.value)
        with files.lock(tmp_path / 'other'):
            pass
    finally:
        process.kill()
        process.wait()


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    process = hold(tmp_path / 'a')
    process.kill()
    process.wait()
    with files.lock(tmp_path / 'a'):
        (tmp_path / 'a' / 'file').touch()
    with files.lock(tmp_path / 'a'):
        pass
    assert [p.name for p in (tmp_path / 'a').iterdir()] == ['file']


def test_a_lock_under_which_nothing_was_written_leaves_no_trace(tmp_path):
    with pytest.raises(KeyError), files.lock(tmp_path / 'a/b'):
        raise KeyError
    assert not (tmp_path / 'a').exists()


def test_a_child_process_does_not_keep_the_lock(tmp_path):
    with files.lock(tmp_path):
        child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],
                                 close_fds=False)
    try:
        with files.lock(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()


def test_where_nothing_can_be_locked_one_warning_is_enough(tmp_path, monkeypatch, caplog):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr(files.fcntl, 'flock', flock)
    for _ in range(2):
        with files.lock(tmp_path):
            (tmp_path / 'file').touch()
    assert caplog.text.count('without locks') == 1


@pytest.mark.parametrize('number', [errno.EINVAL, errno.EBADF, errno.EACCES])
def test_a_folder_that_cannot_be_flushed_is_no_reason_to_stop(tmp_path, monkeypatch, caplog,
                                                             number):
    real = os.fsync

    def fsync(descriptor):
        if os.path.isdir(f'/proc/self/fd/{descriptor}'):
            raise OSError(number, os.strerror(number))
        real(descriptor)
    monkeypatch.setattr(os, 'fsync', fsync)
    files.write_file(tmp_path / 'file', b'all of it')
    (tmp_path / '.new').mkdir()
    (tmp_path / '.new/file').touch()
    files.put_in_place(tmp_path / '.new', tmp_path / 'new')
    assert (tmp_path / 'file').read_bytes() == b'all of it'
    assert (tmp_path / 'new/file').exists()
    assert caplog.text.count('flush') == 1


def test_files_are_flushed_through_a_writer(tmp_path, monkeypatch):
    """As Windows wants it."""
    import fcntl
    real = os.fsync
    flushed = []

    def fsync(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, 'Bad file descriptor')
        flushed.append(descriptor)
        real(descriptor)
    monkeypatch.setattr(os, 'fsync', fsync)
    files.write_file(tmp_path / 'file', b'x')
    assert flushed


def test_a_disk_that_fails_is_named_and_not_guessed_at(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr(os, 'fsync', fsync)
    with pytest.raises(OSError, match='Input/output error.*file.tmp') as error:
        files.write_file(tmp_path / 'file', b'x')
    assert 'free' not in files.why(error.value, tmp_path)
    full = OSError(errno.ENOSPC, 'No space left on device')
    assert 'MB are free there' in files.why(full, tmp_path)


@pytest.mark.parametrize('dtype', ['<u2', '<u4'])
def test_a_file_that_cannot_be_mapped_is_read_all_the_same(tmp_path, monkeypatch, dtype):
    wanted = np.arange(1000, dtype=dtype)
    wanted.tofile(tmp_path / 'a.bin')
    mapped = files.open_array(tmp_path / 'a.bin', dtype)

    class Unmappable(mmap.mmap):
        def __new__(cls, *args, **kwargs):
            raise OSError(errno.ENODEV, 'No such device')
    monkeypatch.setattr(mmap, 'mmap', Unmappable)
    read = files.open_array(tmp_path / 'a.bin', dtype)
    assert isinstance(read, files.FileArray)
    for array in (mapped, read):
        assert len(array) == 1000
        for where in (slice(None), slice(3, 8), slice(990, 2000), slice(8, 3), slice(-5, None)):
            assert np.array_equal(array[where], wanted[where])


@pytest.mark.parametrize('name', signals.STOPPING)
def test_each_stopping_signal_is_caught_unless_it_was_ignored(name):
    number = getattr(signal, name)
    old = signal.signal(number, signal.SIG_DFL)
    try:
        caught, before = signals.catch()
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert caught == [name]
        signals.restore(before)
        assert signal.getsignal(number) == signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)           # as nohup does
        caught, before = signals.catch()
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert caught == []
        signals.restore(before)
    finally:
        signal.signal(number, old)
