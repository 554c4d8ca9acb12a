"""What a run tells: its log, its metrics, its progress, and where numbers stop being finite."""
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from nanoseek.device import peak_memory

# --------------------------------------------------------------------------- log


class Log:
    """The terminal and train.log; metrics.jsonl; Weights & Biases and TensorBoard where asked for.
    s: the settings; step: where the run begins; about: what describes the run there"""

    def __init__(self, s, step, about):
        self.dir = Path(s.out_dir)
        self.metrics = None
        self.wandb = None
        self.tensorboard = None
        self.alone = False              # whether train.log alone has the lines
        self.dir.mkdir(parents=True, exist_ok=True)
        self.text = open(self.dir / 'train.log', 'a', encoding='utf-8',
                         errors='backslashreplace')
        self.bar = tqdm(initial=step, total=s.max_steps, file=sys.stdout, disable=None,
                        leave=False, unit='step')      # none where there is no terminal
        self.rewind(step)
        if s.wandb:
            import wandb
            name = self.dir.name
            self.wandb = wandb.init(project='nanoseek', name=name, id=f'{name}-{s.seed}',
                                    resume='allow', dir=self.dir, config=about)
        if s.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.tensorboard = SummaryWriter(self.dir / 'tensorboard')

    def say(self, line):
        """A line for the terminal, above its progress bar, and for train.log"""
        problem = self.show(line)
        self.text.write(line + '\n')
        if problem and not self.alone:
            self.alone = True
            self.text.write(f'stdout cannot be written ({problem.strerror}): the run goes on, '
                            'its lines are in this file alone\n')
        self.text.flush()

    def show(self, line):
        """Prints a line -> what is wrong with stdout, or None. It must not end a run"""
        try:
            self.bar.write(line, file=sys.stdout)
            sys.stdout.flush()
        except OSError as e:
            return e
        return getattr(sys.stdout, 'problem', None)     # of the scripts' own, which raises none

    def add(self, **values):
        """A line of metrics.jsonl, with step; what is not finite becomes null"""
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[name] = None
        self.metrics.write(json.dumps(values, allow_nan=False) + '\n')
        self.metrics.flush()
        step = values.pop('step')
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
        if self.wandb:
            self.wandb.log(numbers, step=step)
        if self.tensorboard:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, step)

    def rewind(self, step, keep_events=False):
        """Back to a step: metrics.jsonl without what came later, which will be repeated. Events
        (skipped steps, spikes) may stay"""
        path = self.dir / 'metrics.jsonl'
        lines = []
        if path.exists():
            lines = path.read_text(encoding='utf-8').splitlines()
        kept = [line for line in lines if stays(line, step, keep_events)]
        new = path.with_name('.metrics.tmp')
        new.write_text(''.join(line + '\n' for line in kept), encoding='utf-8')
        if self.metrics:
            self.metrics.close()
        os.replace(new, path)
        self.metrics = open(path, 'a', encoding='utf-8')
        self.bar.n = step
        self.bar.refresh()

    def advance(self):
        """The progress bar, a step further"""
        self.bar.update()

    def close(self):
        self.bar.close()
        self.metrics.close()
        self.text.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def stays(line, step, keep_events):
    """Whether a line of metrics.jsonl belongs to a run that goes on from a step"""
    try:
        entry = json.loads(line)
        return entry['step'] <= step or keep_events and 'event' in entry
    except (ValueError, KeyError, TypeError):   # cut off when the process was killed
        return False


class Silence:
    """The log of the other ranks"""

    def say(self, line):
        pass

    def add(self, **values):
        pass

    def rewind(self, step, keep_events=False):
        pass

    def advance(self):
        pass

    def close(self):
        pass


def versions():
    """What settings.json says besides the settings"""
    try:
        git = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=Path(__file__).parent,
                             text=True, capture_output=True)
        commit = git.stdout.strip()
    except OSError:         # no git here
        commit = None
    return {
        'python': platform.python_version(),
        'torch': torch.__version__,
        'git': commit,
        'machine': platform.machine(),
        'cpus': os.cpu_count(),
        'command': ' '.join(sys.argv),
    }


# ---------------------------------------------------------------------- progress


def clock(seconds):
    """Seconds -> h:mm:ss"""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}'


def progress_line(entry, max_steps, is_compiling=False):
    """entry: a step's line of metrics.jsonl -> the line for people. is_compiling: its time says
    nothing about that of the other steps"""
    seconds_left = (max_steps - entry['step']) * entry['step_ms'] / 1e3
    eta = clock(seconds_left)
    if is_compiling and seconds_left > 0:
        eta = '-:--:--'
    parts = [
        f'step {entry["step"]:6d}/{max_steps}',
        f'loss {entry["loss"]:.4f}',
        f'lr {entry["lr"]:.2e}',
        f'norm {entry["grad_norm"]:.2f}',
        f'{entry["step_ms"]:.0f} ms',
        f'{entry["tok_per_s"] / 1e3:.1f}k tok/s',
        f'mfu {entry["mfu"]:.0%}',
        f'{entry["memory_mb"]:.0f} MB',
    ]
    if 'moe/load_min' in entry:
        parts.append(f'load {entry["moe/load_min"]:.2f}-{entry["moe/load_max"]:.2f}')
    parts.append(f'eta {eta}')
    return ' | '.join(parts)


def validation_line(step, found):
    """found: what train.validate returned"""
    parts = [
        f'step {step:6d}',
        f'validation loss {found["val_loss"]:.4f}',
        f'{found["val_bpb"]:.4f} bits per byte',
    ]
    if 'val_accept' in found:
        parts.append(f'drafts right {found["val_accept"]:.0%}')
    for name, value in found.items():
        if name.startswith('val_loss/'):        # of a mixture's sources
            parts.append(f'{name.removeprefix("val_loss/")} {value:.4f}')
    return ' | '.join(parts)


def loss_entry(losses):
    """{name: loss}, with main -> what metrics.jsonl calls them"""
    found = {'loss': losses['main']}
    for name, value in losses.items():
        if name != 'main':
            found[f'{name}_loss'] = value
    return found


def speed_entry(ms, tokens, ideal_seconds, device):
    """ms of a step, its tokens, the seconds that its FLOPs would take at the matmuls' rate"""
    seconds = ms / 1e3
    return {
        'step_ms': round(ms, 3),
        'tok_per_s': round(tokens / seconds, 1),
        'mfu': round(ideal_seconds / seconds, 4),
        'memory_mb': round(peak_memory(device), 1),
    }


def data_entry(data, block_size, sequences):
    """How much of each source of a mixture has been drawn, of so many sequences; nothing for one"""
    found = {}
    if len(data.sources) > 1:
        for name, count in data.drawn(sequences).items():
            source, _ = data.sources[name]
            found[f'data/{name}/tokens'] = count * block_size
            found[f'data/{name}/epochs'] = round(count / source.windows('train', block_size), 4)
    return found


def relative_load(load):
    """Expert counts (MoE layers, E) -> each over the ideal, its layer's mean"""
    ideal = load.double().mean(-1, keepdim=True).clamp(min=1)  # (MoE layers, 1)
    return (load / ideal).round(decimals=3)


def load_entry(load):
    """Expert counts (MoE layers, E) -> what metrics.jsonl says of them; nothing without experts"""
    if len(load) == 0:
        return {}
    relative = relative_load(load)
    return {
        'moe/load_max': relative.max().item(),
        'moe/load_min': relative.min().item(),
        'moe/dead': (load == 0).sum().item(),
    }


def all_loads(load):
    """Expert counts (MoE layers, E) -> all of them for metrics.jsonl; nothing without experts"""
    if len(load) == 0:
        return {}
    return {'moe/load': relative_load(load).tolist()}


# -------------------------------------------------------------------- what is odd


def spike(history, loss):
    """-> how many deviations the loss is above the median of the losses before it, and the median,
    where it stands out; else None. By a robust z-score: from the median absolute deviation"""
    if len(history) < 32:
        return None
    median = statistics.median(history)
    deviation = 1.4826 * statistics.median(abs(v - median) for v in history)
    z = (loss - median) / max(deviation, 1e-3)
    if z > 6:
        return z, median
    return None


def say_spike(log, step, loss, history):
    found = spike(history, loss)
    if found:
        z, median = found
        log.say(f'step {step}: loss {loss:.4f} is a spike, {z:.1f} deviations above {median:.4f}')
        log.add(step=step, event='spike', loss=loss, z=round(z, 2))


def say_skipped(log, step, loss, norm, where):
    """A step that was not taken; where: culprit's answer"""
    log.say(f'step {step}: loss {loss:.4g}, gradient norm {norm:.4g}: skipped; the first that is '
            f'not finite is {where}')
    log.add(step=step, event='skipped', loss=str(loss), grad_norm=str(norm), where=where)


def is_finite(x):
    """Of a tensor, or of all tensors in a tuple"""
    if isinstance(x, tuple):
        return all(is_finite(part) for part in x)
    if isinstance(x, torch.Tensor):
        return bool(x.isfinite().all())
    return True


@torch.no_grad()
def culprit(model, batches, amp):
    """Where what is not finite appeared first: in a parameter, in a module's output (the forward
    passes are repeated), or in a gradient (the backward pass begins at the end of the model).
    batches: the step's (x, y); amp: makes the context of a forward pass"""
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
    with torch.random.fork_rng(), amp():
        for x, y in batches:
            model(x, y)
    for hook in hooks:
        hook.remove()
    if broken and broken[0]:
        return f'the output of {broken[0]}'
    if broken:
        return 'the output of the model'

    gradients = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    for name, grad in reversed(gradients):
        if not is_finite(grad):
            return f'the gradient of {name}'
    return 'the loss'
