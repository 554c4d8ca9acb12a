"""What several test files share."""
import contextlib
import functools
import json
import locale
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

import config
import train
from model import Config, Transformer
from nanoseek import fit, monitor
from nanoseek.estimate import memory_estimate


def why_not_compile():
    """Why torch.compile cannot work here, or an empty text"""
    if not shutil.which('c++'):
        return 'no C++ compiler'
    if locale.getpreferredencoding(False).lower() not in ('utf-8', 'utf8'):
        return "torch's Inductor reads its own templates in the locale's encoding"
    return ''


def asset(name):
    folder = os.environ.get('NANOSEEK_ASSETS')
    if not folder or not (Path(folder) / name).exists():
        pytest.skip(f'$NANOSEEK_ASSETS/{name} is not there')
    return str(Path(folder).resolve() / name)


@functools.cache
def estimate(c, s, dtype, kind):
    return memory_estimate(Transformer, Config(**json.loads(c)), train.Settings(**json.loads(s)),
                           dtype, kind)


def remembered(model_class, c, s, dtype, kind):
    """memory_estimate, the longest part of a start, once for all runs of a model"""
    names = ('batch_size', 'block_size', 'gradient_checkpointing', 'doc_attention_mask',
             'optimizer')
    s = {name: getattr(s, name) for name in names}
    return estimate(json.dumps(asdict(c)), json.dumps(s), dtype, kind)


@contextlib.contextmanager
def signals_as_they_were():
    names = ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGPIPE')
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train_here(folder, *args):
    """train.py in this process, as its last lines have it, so that faults can be put in -> exit
    status"""
    folder.mkdir(exist_ok=True, parents=True)
    with pytest.MonkeyPatch.context() as patch, signals_as_they_were():
        patch.chdir(folder)
        patch.setattr(sys, 'argv', ['train.py', *map(str, args)])
        patch.setattr(train, 'STARTED', time.time())
        patch.setattr(fit, 'memory_estimate', remembered)
        patch.setattr(train, 'matmul_rate', lambda device, dtype: 1e11)     # seconds in float16
        try:
            with config.user_errors():
                settings, model_settings = train.load_settings(train.Settings, '')
            train.main(settings, model_settings, train.OneDevice())
        except SystemExit as e:
            return e.code
    return 0


@contextlib.contextmanager
def hooks(start=None, backward=None, end=None):
    """While this lasts, the loop of train.py calls these with what it is at: its step, counted from
    1, the model and the optimizer. start: before the batch; backward: between the gradients and the
    step; end: after the step"""
    at = SimpleNamespace(step=0, model=None, optimizer=None)
    make_optimizer = train.make_optimizer
    learning_rate_at = train.learning_rate_at
    gradient_norm = train.gradient_norm
    advance = monitor.Log.advance

    def made(s, model, *args):
        at.model = model
        at.optimizer = make_optimizer(s, model, *args)
        return at.optimizer

    def at_start(step, s):
        at.step = step + 1
        if start:
            start(at)
        return learning_rate_at(step, s)

    def at_backward(model):
        if backward:
            backward(at)
        return gradient_norm(model)

    def at_end(log):
        if end:
            end(at)
        advance(log)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'make_optimizer', made)
        patch.setattr(train, 'learning_rate_at', at_start)
        patch.setattr(train, 'gradient_norm', at_backward)
        patch.setattr(monitor.Log, 'advance', at_end)
        yield at
