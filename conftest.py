"""What the tests share: the device they run on, commands, a run's metrics, the real models.

    python -m pytest                        # the quick tests, on the CPU
    python -m pytest -m "slow or not slow"  # all of them
    python -m pytest --device=cuda          # those that compute, on a GPU; also mps
"""
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent


def pytest_addoption(parser):
    parser.addoption('--device', default='cpu', help='where tests with a device run')


@pytest.fixture(scope='session')
def device(request):
    return torch.device(request.config.getoption('--device'))


def pytest_collection_modifyitems(config, items):
    """On a GPU, only the tests that use it are worth running."""
    if config.getoption('--device') != 'cpu':
        items[:] = [item for item in items if 'device' in item.fixturenames]


def asset(name):
    """Return the path of a real model or tokenizer; skip the test if it is not there."""
    path = Path(os.environ.get('NANOSEEK_ASSETS', 'no-assets')).resolve() / name
    if not path.exists():
        pytest.skip(f'$NANOSEEK_ASSETS/{name} does not exist')
    return str(path)


def run(folder, script, *args, timeout=300, **env):
    """Run a script of the project in a folder. Return the CompletedProcess, with text."""
    return subprocess.run([sys.executable, ROOT / script, *map(str, args)], cwd=folder,
                          env={**os.environ, **env}, capture_output=True, text=True,
                          encoding='utf-8', timeout=timeout)


def metrics(out_dir, name='loss'):
    """Return {step: value} of one metric from a run's metrics.jsonl."""
    lines = (Path(out_dir) / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    rows = [json.loads(line) for line in lines]
    return {row['step']: row[name] for row in rows if name in row}


def train_here(folder, *args):
    """Run train.py in this process, so that a test can interfere. Return its exit status."""
    import train
    from nanoseek import log, settings
    folder.mkdir(exist_ok=True, parents=True)
    names = ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1')
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, 'argv', ['train.py', *map(str, args)])
        patch.setattr(log, 'STARTED', time.time())
        patch.setattr(train, 'matmul_rate', lambda device, dtype: 1e11)     # it takes seconds
        try:
            with settings.user_errors(train.OUT_OF_MEMORY):
                s, given = train.load_settings(train.Settings, '')
                train.main(s, given, train.OneDevice(s))
        except SystemExit as e:
            return e.code
        finally:
            for name, handler in handlers.items():
                signal.signal(getattr(signal, name), handler)
    return 0


@contextlib.contextmanager
def hooks(start=None, backward=None, end=None):
    """While this lasts, train.py's loop calls these with its step (from 1), model and optimizer.
    start: before the batch; backward: between the gradients and the step; end: after the step"""
    import train
    now = SimpleNamespace(step=0, model=None, optimizer=None)
    originals = train.make_optimizer, train.set_learning_rate, train.gradient_norm
    make_optimizer, set_learning_rate, gradient_norm = originals

    def made(s, model, dtype):
        now.model = model
        now.optimizer = make_optimizer(s, model, dtype)
        zero_grad = now.optimizer.zero_grad

        def at_end(**options):
            if end:
                end(now)
            zero_grad(**options)
        now.optimizer.zero_grad = at_end
        return now.optimizer

    def at_start(optimizer, step, s):
        now.step = step + 1
        if start:
            start(now)
        return set_learning_rate(optimizer, step, s)

    def at_backward(model):
        if backward:
            backward(now)
        return gradient_norm(model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'make_optimizer', made)
        patch.setattr(train, 'set_learning_rate', at_start)
        patch.setattr(train, 'gradient_norm', at_backward)
        yield now
