"""Signals that ask a program to stop: it ends after what it is doing, with its work saved."""
import os
import signal

# Ctrl-C; kill; a terminal that is gone; Slurm before the end of an allocation
STOPPING = ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1')


def catch():
    """-> a list that is empty until the first of these signals, whose name it then has, and
    the handlers before, for restore. A second Ctrl-C ends the process at once. Signals that
    were ignored at the start, as nohup has it for SIGHUP, stay ignored."""
    caught = []
    before = {}

    def handle(number, frame):
        caught.append(signal.Signals(number).name)
        if caught.count('SIGINT') > 1:
            os._exit(130)           # waits for nothing: what is half written has no name yet

    for name in STOPPING:
        number = getattr(signal, name, None)            # Windows has the first two alone
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, handle)
    return caught, before


def restore(before):
    for number, handler in before.items():
        signal.signal(number, handler)
