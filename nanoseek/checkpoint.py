"""A run's state on disk: written whole or not at all, found again, pruned.

A checkpoint is a folder step-N: a Hugging Face model, and in trainer/ what only training needs.
    trainer/state.pt        optimizer, scaler, random numbers, progress
    trainer/settings.json   the run's settings, and what must not change when it continues
It gets this name when all of it is on disk. Reading it executes nothing.
"""
import contextlib
import logging
import math
import os
import shutil
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError

from nanoseek import hf
from nanoseek.optim import shard_like, whole

log = logging.getLogger(__name__)

PROGRESS = ('step', 'skipped', 'rollbacks', 'bad', 'losses')


class Run:
    """What a checkpoint keeps of a run. identity: what must not change when it continues. folders:
    whose companions it hands on, if not None: of the model it started from, and of the data"""
    def __init__(self, model, optimizer, scaler, identity, *folders):
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        self.companions = {}        # files beside the weights, see hf.read_companions
        for folder in filter(None, folders):
            self.companions.update(hf.read_companions(folder))
        self.step = 0               # optimizer steps taken
        self.skipped = 0            # steps whose data was passed over after a rollback
        self.rollbacks = 0
        self.bad = 0                # steps in a row, up to now, that were not finite
        self.losses = {}            # of the last evaluation, for the model card
        self.card = {}              # its other lines, {name: text}
        self.identity = identity
        self.id = os.urandom(4).hex()       # for Weights & Biases
        self.lr = math.inf          # of the last step, if loaded

    def state(self):
        device = self.model.head.device
        random = {'cpu': torch.get_rng_state()}
        if device.type != 'cpu':
            random[device.type] = torch.get_device_module(device).get_rng_state()
        progress = {name: getattr(self, name) for name in PROGRESS}
        return {**progress, 'optimizer': self.optimizer.state_dict(),
                'scaler': self.scaler.state_dict(), 'rng': random}

    def load(self, checkpoint):
        """Continue from a checkpoint, whose weights the model has already."""
        state = torch.load(checkpoint / 'trainer' / 'state.pt', map_location='cpu',
                           weights_only=True)                           # executes nothing
        groups = self.optimizer.param_groups
        parameters = [p for group in groups for p in group['params']]
        for i, tensors in state['optimizer']['state'].items():
            for name, tensor in tensors.items():
                tensors[name] = shard_like(tensor, parameters[i])
        first = state['optimizer']['param_groups'][0]
        self.lr = first['lr'] / first.get('scale', 1.0)
        for saved, group in zip(state['optimizer']['param_groups'], groups):
            saved.update({**group, 'params': saved['params']})      # the settings are this run's
        self.optimizer.load_state_dict(state['optimizer'])
        if state['scaler']:                         # empty, unless the dtype was float16
            self.scaler.load_state_dict(state['scaler'])
        for device_type, numbers in state['rng'].items():
            if device_type == 'cpu':
                torch.set_rng_state(numbers)
            elif device_type == self.model.head.device.type:
                torch.get_device_module(device_type).set_rng_state(numbers)
        for name in PROGRESS:
            setattr(self, name, state.get(name, getattr(self, name)))
        self.id = read_settings(checkpoint).get('wandb_id', self.id)

    @torch.no_grad()
    def roll_back(self, checkpoint):
        """Return to a checkpoint, but continue with the data that would have come next."""
        position = self.step + self.skipped
        rollbacks = self.rollbacks + 1
        weights = hf.from_pretrained(checkpoint).state_dict()
        for name, tensor in self.model.state_dict().items():
            tensor.copy_(shard_like(weights[name], tensor))
        self.load(checkpoint)
        self.skipped = position - self.step
        self.rollbacks = rollbacks
        self.bad = 0


def checkpoints(out_dir):
    """Return a run's checkpoints, whole or damaged, oldest first."""
    folders = [f for f in Path(out_dir).glob('step-*') if f.name[5:].isdigit() and f.is_dir()]
    return sorted(folders, key=step_of)


def step_of(checkpoint):
    return int(checkpoint.name[5:])


def newest(out_dir):
    for checkpoint in reversed(checkpoints(out_dir)):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        log.warning(f'{checkpoint} is damaged ({problem}): trying the one before')
    return None


def damage(checkpoint):
    """Return what is wrong with a checkpoint's files, or None."""
    state = checkpoint / 'trainer' / 'state.pt'
    try:
        hf.read_config(checkpoint)
        read_settings(checkpoint)
        for file in set(hf.tensor_files(checkpoint).values()):
            with hf.open_safetensors(file):         # compares the file's length with its header
                pass
        with zipfile.ZipFile(state) as parts:
            broken = parts.testzip()                # compares checksums
    except (OSError, ValueError) as e:
        return str(e)
    except (zipfile.BadZipFile, RuntimeError) as e:     # RuntimeError: a broken flag
        broken = e
    if broken:
        return f'{state} is damaged: {broken}'
    return None


def read_settings(checkpoint):
    return hf.read_json(checkpoint / 'trainer' / 'settings.json')


def find(s, identity):
    """Return the checkpoint to continue from, or None to start from scratch. ValueError if it is
    damaged, or if a run with this identity cannot continue from it."""
    if s.resume == 'never':
        return None
    if s.resume == 'auto':
        checkpoint = newest(s.out_dir)
        if checkpoint is None and checkpoints(s.out_dir):
            raise ValueError(f'all checkpoints in {s.out_dir} are damaged: start over with '
                             '--resume=never')
    else:
        checkpoint = Path(s.resume)
        problem = damage(checkpoint)
        if problem:
            raise ValueError(f'resume={s.resume}: must be the step-N folder of a checkpoint that '
                             f'is whole: {problem}')
    if checkpoint is not None:
        saved = read_settings(checkpoint)
        for name, value in identity.items():
            check_same(checkpoint, name, saved.get(name, value), value)
    return checkpoint


def check_same(checkpoint, name, old, new):
    if old != new:
        raise ValueError(f'{checkpoint} was trained with {name}={old}, now it is {new}: change it '
                         f'back, use another out_dir (--init_from={checkpoint} starts from its '
                         'weights), or start over with --resume=never')


def of_run(name):
    """Return the newest checkpoint of a run's folder; any other name of a model unchanged."""
    if (Path(name) / 'config.json').is_file() or not checkpoints(name):
        return name
    return newest(name) or name


@contextlib.contextmanager
def whole_folder(final):
    """Yield a temporary folder, which is renamed to `final` when all of it is on disk. OSError
    if it cannot be written."""
    final = Path(final)
    tmp = final.with_name(f'.{final.name}.tmp')
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        yield tmp
        for path in (*tmp.rglob('*'), tmp):
            sync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(tmp, final)
        sync(final.parent)
    except (RuntimeError, SafetensorError) as e:    # the libraries' words for a full disk
        raise OSError(f'{final} could not be written: {e}') from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(run, s, tokenizer, dist, val_loss=None):
    """Write out_dir/step-N and prune older ones. All ranks call it, rank 0 writes. Return a line
    about it. val_loss: at this step, if it was evaluated; the best checkpoint stays"""
    state = gather(run.state(), dist.rank == 0)
    weights = gather(run.model.state_dict(), dist.rank == 0)
    if dist.rank > 0:
        return ''
    final = Path(s.out_dir) / f'step-{run.step:06d}'
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            return f'{final} is not written: {name} is not finite'
    with whole_folder(final) as folder:
        hf.save_pretrained(run.model, folder, state=weights)
        hf.write_companions(folder, tokenizer, run.model.config, run.companions)
        card = hf.model_card(run, Path(s.out_dir).name)
        (folder / 'README.md').write_text(card, encoding='utf-8')
        (folder / 'trainer').mkdir()
        torch.save(state, folder / 'trainer' / 'state.pt')
        hf.write_json(folder / 'trainer' / 'settings.json', {
            **asdict(s), **asdict(run.model.config), **run.identity,
            'val_loss': val_loss, 'wandb_id': run.id})
    prune(s.out_dir, s.keep_checkpoints)
    return f'saved {final}'


def gather(x, keep):
    """Return x, nested dicts and lists of tensors, with shards put together on the CPU. All ranks
    must take part; those that do not keep the result save its memory."""
    if isinstance(x, dict):
        return {name: gather(value, keep) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [gather(value, keep) for value in x]
    if not hasattr(x, 'full_tensor'):
        return x
    x = whole(x)
    if keep:
        return x.to('cpu', copy=True)               # its storage may have padding
    return None


def prune(out_dir, keep):
    """Keep the newest checkpoints (0: all), and the one with the lowest validation loss."""
    everything = checkpoints(out_dir)
    losses = {}
    for checkpoint in everything:
        with contextlib.suppress(OSError, ValueError):      # an old one that is damaged
            loss = read_settings(checkpoint).get('val_loss')
            if loss is not None and math.isfinite(loss):
                losses[checkpoint] = loss
    best = min(reversed(losses), key=losses.get, default=None)
    for checkpoint in everything[:-keep]:
        if checkpoint != best:
            shutil.rmtree(checkpoint)


def clear(out_dir, step):
    """Remove what a run that continues after this step will rewrite."""
    for checkpoint in checkpoints(out_dir):
        if step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)
    for leftover in Path(out_dir).glob('.step-*.tmp'):
        shutil.rmtree(leftover, ignore_errors=True)
