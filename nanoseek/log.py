"""What a run reports: its log, its metrics, its speed, and where numbers stop being finite."""
import contextlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from nanoseek import settings
from nanoseek.device import peak_memory

STARTED = time.time()


def elapsed():
    return round(time.time() - STARTED, 2)


class Log:
    """The terminal, train.log, metrics.jsonl, Weights & Biases, TensorBoard. While it exists, no
    other process can write to out_dir. A quiet one, for ranks above 0, does nothing."""

    def __init__(self, s, run, description, quiet=False):
        """run: a checkpoint.Run. description: the settings and more, {name: value}"""
        self.s = s
        self.quiet = quiet
        if quiet:
            return
        self.dir = Path(s.out_dir)
        self.lock = contextlib.ExitStack()
        self.lock.enter_context(settings.lock(self.dir))
        self.metrics = self.dir / 'metrics.jsonl'
        self.wandb = None
        self.tensorboard = None
        self.rewind(run.step)
        self.before = max((entry.get('elapsed_s', 0) for entry in self.entries()), default=0)
        (self.dir / 'settings.json').write_text(json.dumps(description, indent=1) + '\n',
                                                encoding='utf-8')
        if s.wandb:
            import wandb
            self.wandb = wandb.init(project='nanoseek', name=self.dir.name, id=run.id,
                                    resume='allow', dir=self.dir, config=description)
            self.wandb.define_metric('*', step_metric='step')       # may go back, as a resume does

    def say(self, line):
        if self.quiet:
            return
        with open(self.dir / 'train.log', 'a', encoding='utf-8') as f:
            f.write(line + '\n')
        with contextlib.suppress(OSError):                  # a terminal that is gone ends no run
            print(line, flush=True)

    def add(self, **values):
        """Append a line to metrics.jsonl. Infinity and nan become null."""
        if self.quiet:
            return
        values['elapsed_s'] = round(self.before + elapsed(), 2)
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[name] = None
        with open(self.metrics, 'a', encoding='utf-8') as f:
            f.write(json.dumps(values, allow_nan=False) + '\n')
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
        if self.wandb:
            self.wandb.log(numbers)
        if self.tensorboard:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, values['step'])

    def entries(self):
        """Return the lines of metrics.jsonl as dicts."""
        entries = []
        for line in self.metrics.read_text(encoding='utf-8').splitlines():
            with contextlib.suppress(ValueError):           # cut off when the process was killed
                entries.append(json.loads(line))
        return entries

    def rewind(self, step, keep_events=False):
        """Drop what was logged after a step: it will be repeated. Events may stay."""
        if self.quiet:
            return
        self.metrics.touch()
        new = self.dir / '.metrics.tmp'
        with open(new, 'w', encoding='utf-8') as f:
            for entry in self.entries():
                if entry['step'] <= step or keep_events and 'event' in entry:
                    f.write(json.dumps(entry) + '\n')
        os.replace(new, self.metrics)
        if self.s.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            folder = self.dir / 'tensorboard'
            if self.tensorboard:
                self.tensorboard.close()
            if step == 0:
                shutil.rmtree(folder, ignore_errors=True)
            self.tensorboard = SummaryWriter(folder, purge_step=step + 1)

    def close(self):
        if self.quiet:
            return
        self.lock.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def versions():
    """Return what settings.json says besides the settings."""
    commit = None
    with contextlib.suppress(OSError):                      # git is not installed
        command = ['git', '-C', Path(__file__).parent, 'rev-parse', 'HEAD']
        commit = subprocess.run(command, text=True, capture_output=True).stdout.strip()
    return {'python': platform.python_version(), 'torch': torch.__version__, 'git': commit,
            'command': ' '.join(sys.argv)}


class Meter:
    """How fast a run is. tokens, flops: of a step; peak: FLOP/s of a matmul on all devices"""
    def __init__(self, tokens, flops, peak, device):
        self.tokens = tokens
        self.flops = flops
        self.peak = peak
        self.device = device

    def start(self, step):
        """Start over, so that evaluations and checkpoints do not count."""
        self.step = step
        self.began = time.perf_counter()

    def entry(self, step):
        """Return means per step since the last call, for metrics.jsonl."""
        seconds = (time.perf_counter() - self.began) / (step - self.step)
        self.start(step)
        return {'tokens': step * self.tokens, 'flops': step * self.flops,
                'step_ms': round(seconds * 1e3, 3),
                'tok_per_s': round(self.tokens / seconds, 1),
                'mfu': round(self.flops / self.peak / seconds, 4),
                'memory_mb': round(peak_memory(self.device), 1)}


def progress_line(entry, max_steps):
    """entry: a step's line of metrics.jsonl"""
    seconds = round((max_steps - entry['step']) * entry['step_ms'] / 1e3)
    load = ''
    if 'moe/load_min' in entry:
        load = f' | load {entry["moe/load_min"]:.2f}-{entry["moe/load_max"]:.2f}'
    return (f'step {entry["step"]:6d}/{max_steps} | loss {entry["loss"]:.4f} | '
            f'lr {entry["lr"]:.2e} | norm {entry["grad_norm"]:.2f} | {entry["step_ms"]:.0f} ms | '
            f'{entry["tok_per_s"] / 1e3:.1f}k tok/s | mfu {entry["mfu"]:.0%} | '
            f'{entry["memory_mb"]:.0f} MB{load} | '
            f'eta {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}')


def validation_line(step, results):
    return (f'step {step:6d} | validation loss {results["val_loss"]:.4f} | '
            f'{results["val_bpb"]:.4f} bits per byte')


def load_entry(load):
    """Expert counts (MoE layers, E) -> their extremes, over their layer's mean, for metrics.jsonl;
    nothing without experts"""
    if len(load) == 0:
        return {}
    mean = load.double().mean(-1, keepdim=True)                                # (MoE layers, 1)
    relative = (load / mean).round(decimals=3)
    return {'moe/load_max': relative.max().item(), 'moe/load_min': relative.min().item()}


@torch.no_grad()
def culprit(model, batches, dist):
    """Return where the first number that is not finite is: in a weight, in the output of a module
    (the forward passes are repeated), or in a gradient. batches: the step's (x, y)"""
    for name, p in model.named_parameters():
        if not is_finite(p):
            return f'the weight {name}'

    broken = []

    def watch(name):
        def look(module, args, out):
            if not is_finite(out):
                broken.append(name)
        return look
    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    with torch.random.fork_rng(), dist.autocast():
        for x, y in batches:
            model(x, y)
    for hook in hooks:
        hook.remove()
    if broken:
        return f'the output of {broken[0] or "the model"}'

    for name, p in reversed(list(model.named_parameters())):    # as the backward pass goes
        if not is_finite(p.grad):
            return f'the gradient of {name}'
    return 'the loss'


def is_finite(x):
    """x: a tensor, or a tuple that has tensors in it"""
    if isinstance(x, tuple):
        return all(is_finite(part) for part in x)
    return not isinstance(x, torch.Tensor) or bool(x.isfinite().all())
