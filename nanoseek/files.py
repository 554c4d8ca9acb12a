"""Files and folders on a disk that may be any: written whole or not at all, by one process at
a time, and read where the file system cannot map them.

What a file system cannot do (fsync of a folder, locks, mmap: network drives and FUSE often
cannot) is done without where that is safe, with one warning.
"""
import contextlib
import errno
import json
import logging
import os
import shutil
import socket
import time
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:             # Windows
    fcntl = None
    import msvcrt

log = logging.getLogger(__name__)
warned = set()

CANNOT = {errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP,
          errno.ENODEV, errno.ENOLCK, errno.ENOTTY, errno.EISDIR}
DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT}


def warn_once(line):
    if line not in warned:
        warned.add(line)
        log.warning(line)


# --------------------------------------------------------------------------------- writing

def sync(path):
    """Waits until a file's bytes, or the names in a folder, are on the disk. OSError where
    the disk says that they are not"""
    path = Path(path)
    folder = path.is_dir()
    if folder and os.name == 'nt':          # where a folder cannot be opened
        return
    flags = os.O_RDONLY
    if not folder and os.access(path, os.W_OK):
        flags = os.O_RDWR                   # some systems sync nothing through a reader
    try:
        descriptor = os.open(path, flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as e:
        without = CANNOT
        if folder:
            without = CANNOT | {errno.EACCES, errno.EPERM}
        if e.errno not in without:
            raise OSError(e.errno, f'{os.strerror(e.errno)}, while it was flushed to the disk',
                          str(path)) from e
        warn_once('this file system cannot flush to the disk what is written: after a power '
                  'failure, the newest files may be missing')


def write_file(path, data):
    """Writes bytes: all of them or nothing."""
    path = Path(path)
    tmp = path.with_name(f'{path.name}.tmp')
    with open(tmp, 'wb') as f:
        f.write(data)
    sync(tmp)
    os.replace(tmp, path)


def put_in_place(tmp, final):
    """A folder that is complete gets its final name, in the place of an older one."""
    for path in (*tmp.rglob('*'), tmp):
        sync(path)
    remove_folder(final)
    os.replace(tmp, final)
    sync(final.parent)


def remove_folder(folder):
    """Under another name first: whenever this is interrupted, no half folder stays."""
    if folder.exists():
        gone = folder.with_name(f'.{folder.name}.old.tmp')
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(folder, gone)
        shutil.rmtree(gone)


def why(error, folder):
    """An error of writing in words: what the system said, and of a full disk how full it is.
    Libraries put an OSError into words of their own: then their words."""
    text = str(error)
    full = getattr(error, 'errno', None) in DISK_IS_FULL or 'No space left' in text
    if full or 'Disk quota exceeded' in text:
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(folder).free // 2**20
            text += f' ({free:,} MB are free there)'
    return text


# ---------------------------------------------------------------------------------- a lock

@contextlib.contextmanager
def lock(folder):
    """One writer in a folder at a time, which is made if need be: a context. The system
    releases the lock when the process ends, however it ends. ValueError that names the process
    that has it"""
    folder = Path(folder)
    if folder.is_dir() and not os.access(folder, os.W_OK):
        yield                       # nobody can write there
        return
    made = missing_parents(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / '.lock'
    descriptor = None
    try:
        while descriptor is None:
            descriptor = take(path)
        about = {'pid': os.getpid(), 'host': socket.gethostname(),
                 'since': time.strftime('%Y-%m-%d %H:%M:%S')}
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(about).encode())
        yield
    finally:
        if descriptor is not None:
            if os.name != 'nt':
                path.unlink(missing_ok=True)
            os.close(descriptor)
            if os.name == 'nt':
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
        for new in made:                            # nothing was written: no trace
            with contextlib.suppress(OSError):
                new.rmdir()


def missing_parents(folder):
    """The folder and those above it that do not exist, the deepest first"""
    found = []
    while not folder.exists() and folder != folder.parent:
        found.append(folder)
        folder = folder.parent
    return found


def take(path):
    """-> descriptor of the locked file, None where its owner has just removed it: try again"""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(descriptor, 2**20, os.SEEK_SET)        # what is locked cannot be read
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
    except OSError as e:
        if e.errno in CANNOT:
            warn_once(f'{path.parent} is on a file system without locks: nothing keeps a '
                      'second run from writing there')
            return descriptor
        os.close(descriptor)
        raise ValueError(f'{path.parent} is being written by {owner(path)}: wait for it, stop '
                         'it, or take another out_dir') from e
    same = path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path))
    if not same:
        os.close(descriptor)
        return None
    return descriptor


def owner(path):
    try:
        about = json.loads(path.read_text(encoding='utf-8'))
        return f'process {about["pid"]} on {about["host"]} since {about["since"]}'
    except (OSError, ValueError, LookupError, TypeError):
        return 'another process'


# --------------------------------------------------------------------------------- reading

def open_array(path, dtype):
    """A file of numbers -> what is sliced like an array (N,) and stays on the disk."""
    try:
        return np.memmap(path, dtype, 'r').view(np.ndarray)     # whose slices are made faster
    except OSError as e:
        if e.errno not in CANNOT:
            raise
        return FileArray(path, dtype)


class FileArray:
    """The numbers of a file that cannot be mapped: a slice reads its part."""

    def __init__(self, path, dtype):
        self.path = path
        self.dtype = np.dtype(dtype)
        self.size = os.path.getsize(path) // self.dtype.itemsize

    def __len__(self):
        return self.size

    def __getitem__(self, where):
        start, stop, step = where.indices(self.size)
        assert step == 1, 'only slices without a step'
        return np.fromfile(self.path, self.dtype, max(stop - start, 0),
                           offset=start * self.dtype.itemsize)
