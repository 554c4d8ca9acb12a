"""What must be set before torch is loaded. A script imports this first, for what the import does.

    import nanoseek.tuning  # noqa: F401  # before torch

It is the one module that acts when it is imported: OpenMP reads its settings once, when torch
loads it. What the environment already says wins.
"""
import ctypes
import os
import sys

SPINS = 3000                # about the length of a pause between two parallel parts of a step
LARGEST_KEPT = 2 ** 23      # bytes of a block that glibc keeps rather than gives back
M_TRIM_THRESHOLD = -1       # names and numbers of glibc's malloc.h
M_MMAP_THRESHOLD = -3


def let_idle_threads_sleep():
    """Threads of GNU's OpenMP spin for long while they wait. Beside one other busy process, a
    training step on a CPU then takes ten times as long and more."""
    os.environ.setdefault('GOMP_SPINCOUNT', str(SPINS))


def keep_freed_memory():
    """glibc gives much of what a step frees back to the kernel, and the next step waits for new
    pages. Kept, in blocks of up to 8 MB, steps on a CPU are a tenth faster, and the holes in
    the heap no larger."""
    has_own_settings = any(name.startswith('MALLOC_') for name in os.environ)
    if sys.platform != 'linux' or has_own_settings:
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, 'mallopt'):        # musl has none
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)


let_idle_threads_sleep()
keep_freed_memory()
