"""A pool of processes for work that holds Python's lock."""
import multiprocessing
import os
import signal
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from nanoseek import signals


class Workers:
    """count processes, which start with the first job. Where inline is set there are none: a
    job is done when it is submitted."""

    def __init__(self, count, inline=False):
        self.inline = inline
        self.pool = ProcessPoolExecutor(count, multiprocessing.get_context('spawn'), begin)

    def submit(self, function, *args):
        """-> Future"""
        if self.inline:
            job = Future()
            job.set_result(function(*args))
            return job
        if not hasattr(signal, 'pthread_sigmask'):      # Windows, where signals stay at home
            return self.pool.submit(function, *args)
        # A process that this starts inherits what is blocked: signals are its parent's, also
        # before begin()
        blocked = [getattr(signal, name) for name in signals.STOPPING]
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        try:
            return self.pool.submit(function, *args)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)

    def result(self, job):
        try:
            return job.result()
        except (BrokenProcessPool, MemoryError) as e:
            raise OSError('the workers died, or had not enough memory; --workers=1 needs '
                          'least') from e

    def close(self):
        self.pool.shutdown(cancel_futures=True)


def begin():
    """A worker ends with its parent, however that ends, and leaves signals to it."""
    for name in signals.STOPPING:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'      # the processes are as many as the cores
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)
