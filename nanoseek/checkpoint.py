"""A run's state on the disk: written whole or not at all, found again, pruned.

A checkpoint is a folder step-N: a Hugging Face model, and in trainer/ what only training needs.
    trainer/state.pt         optimizer, scaler, random numbers, progress
    trainer/settings.json    of the run, and what must be the same to go on from it
    trainer/manifest.json    sizes and checksums of all files
It has its name only when all of it is on the disk. Nothing in it is executed when it is read.
"""
import json
import logging
import shutil
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError

from nanoseek import files, folders

log = logging.getLogger(__name__)

VERSION = 2                         # 1 had no manifest.json


# --------------------------------------------------------------------------------- finding

def checkpoints(out_dir):
    """The checkpoints of a run by their steps, oldest first, whole or damaged."""
    found = []
    for folder in Path(out_dir).glob('step-*'):
        if folder.name[5:].isdigit() and folder.is_dir():
            found.append(folder)
    return sorted(found, key=step_of)


def step_of(checkpoint):
    return int(Path(checkpoint).name[5:])


def newest(out_dir, say):
    """The newest whole checkpoint, or None. say hears of damaged ones"""
    for checkpoint in reversed(checkpoints(out_dir)):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        say(f'{checkpoint} is damaged ({problem}): going back to the one before')
    return None


def damage(checkpoint):
    """What is wrong with a checkpoint's files, or None; reads all of them."""
    folder = checkpoint / 'trainer'
    try:
        version = read_settings(checkpoint).get('version', 1)
        if version > VERSION:
            return f'its version is {version}, and {VERSION} the newest that is known here'
        if version == 1:
            if (folder / 'state.pt').is_file():
                return None
            return 'no trainer/state.pt'
        manifest = json.loads((folder / 'manifest.json').read_text(encoding='utf-8'))
        needed = {'config.json', 'trainer/state.pt', 'trainer/settings.json'}
        if not needed <= manifest.keys() or '..' in str(manifest):
            return 'trainer/manifest.json is not ours'
        for name, wanted in manifest.items():
            found = checksum(checkpoint / name)
            if found != wanted:
                return (f'{name} has {found[0]:,} bytes and checksum {found[1]}, not '
                        f'{wanted[0]:,} and {wanted[1]}')
    except (OSError, ValueError, AttributeError, TypeError, LookupError) as e:
        return str(e)
    return None


def checksum(file):
    """-> [size, CRC-32]"""
    value = 0
    with open(file, 'rb') as f:
        while block := f.read(2**20):
            value = zlib.crc32(block, value)
        return [f.tell(), value]


def read_settings(checkpoint):
    return folders.read_json(Path(checkpoint) / 'trainer' / 'settings.json')


def find(resume, out_dir, identity, say):
    """The setting resume -> the checkpoint to go on from, or None. identity: {name: value} of
    what must be the same as it was there. ValueError"""
    found = None
    if resume == 'auto':
        found = newest(out_dir, say)
        if found is None and checkpoints(out_dir):
            raise ValueError(f'no checkpoint in {out_dir} is whole: start over with '
                             '--resume=never')
    elif resume != 'never':
        found = Path(resume)
        if not (found / 'trainer' / 'state.pt').is_file():
            raise ValueError(f'resume={resume}: no such checkpoint (a step-N folder with '
                             'trainer/state.pt in it)')
        problem = damage(found)
        if problem is not None:
            raise ValueError(f'resume={found}: damaged: {problem}')
    if found is not None:
        saved = read_settings(found)
        for name, value in identity.items():
            check_same(found, name, saved.get(name, value), value)
    return found


def check_same(found, name, old, new):
    if old != new:
        raise ValueError(f'{found} was trained with {name}={old}, now it is {new}: go back, '
                         f'take another out_dir (--init_from={found} starts from its weights), '
                         'or start over with --resume=never')


def of_run(name):
    """A run's folder -> its newest whole checkpoint; any other name as it is. For settings that
    name a model"""
    if (Path(name) / 'config.json').is_file() or not checkpoints(name):
        return name
    found = newest(name, log.warning)
    if found is None:
        raise ValueError(f'no checkpoint in {name} is whole')
    return found


# -------------------------------------------------------------------------------- removing

def clear(out_dir, found, step):
    """Removes what a run that goes on from found at step would repeat; all of it without a
    checkpoint that is found."""
    for old in checkpoints(out_dir):
        if found is None or step_of(old) > step:
            files.remove_folder(old)
    for half in Path(out_dir).glob('.step-*.tmp'):
        shutil.rmtree(half, ignore_errors=True)     # it has no name that anything reads
    if found is None:
        (Path(out_dir) / 'metrics.jsonl').unlink(missing_ok=True)


def prune(out_dir, keep):
    """Leaves the newest checkpoints, so many (0: all), and of those that were evaluated the
    one with the lowest validation loss. -> what could not be removed, as where another program
    reads it on a network drive or on Windows: [OSError, ...]"""
    problems = []
    if keep == 0:
        return problems
    found = checkpoints(out_dir)
    best = None
    lowest = None
    for checkpoint in found:
        with suppress(OSError, ValueError):     # an old one that is damaged does not end a run
            loss = read_settings(checkpoint).get('val_loss')
            if loss is not None and (lowest is None or loss <= lowest):
                best = checkpoint
                lowest = loss
    for old in found[:-keep]:
        if old != best:
            try:
                files.remove_folder(old)
            except OSError as e:
                problems.append(e)
    return problems


# --------------------------------------------------------------------------------- writing

def training_state(progress, optimizer, scaler, device):
    """-> what a step depends on besides the weights. progress: plain values of the loop"""
    random_numbers = {'cpu': torch.get_rng_state()}
    if device.type != 'cpu':
        random_numbers[device.type] = torch.get_device_module(device).get_rng_state()
    return {'version': VERSION, **progress, 'optimizer': optimizer.state_dict(),
            'scaler': scaler.state_dict(), 'rng': random_numbers}


def cpu_copy(x, whole, keep):
    """A copy on the CPU of all tensors in dicts and lists, which training cannot change any
    more. whole: gathers a tensor of which each rank has a part; keep: whether this rank needs
    the result, as all of them must take part"""
    if isinstance(x, dict):
        return {k: cpu_copy(v, whole, keep) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [cpu_copy(v, whole, keep) for v in x]
    if not isinstance(x, torch.Tensor):
        return x
    x = whole(x.detach())
    if not keep:
        return None
    return x.to('cpu', copy=True)


def write(final, model, weights, state, settings, card, tokenizer, companions, keep,
          special_in_text=False):
    """Writes out_dir/step-N -> a line that says so. weights: model.snapshot(); card: the text
    of README.md; companions: see folders.write_companions; keep: see prune. OSError where the
    disk does not take it"""
    began = time.perf_counter()
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            return f'{final} is not written: {name} is not finite'
    tmp = final.with_name(f'.{final.name}.tmp')
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        model.save_pretrained(tmp, state=weights)
        folders.write_companions(tmp, tokenizer, model.config, companions, special_in_text)
        (tmp / 'README.md').write_text(card, encoding='utf-8', errors='backslashreplace')
        (tmp / 'trainer').mkdir()
        folders.write_json(tmp / 'trainer' / 'settings.json', settings)
        save_state(tmp / 'trainer' / 'state.pt', state)
        manifest = {}
        for file in sorted(tmp.rglob('*')):
            if file.is_file():
                manifest[file.relative_to(tmp).as_posix()] = checksum(file)
        folders.write_json(tmp / 'trainer' / 'manifest.json', manifest)
        files.put_in_place(tmp, final)
    except (OSError, SafetensorError) as e:
        reason = files.why(e, final.parent)
        raise OSError(f'{final} could not be written: {reason}; the checkpoints before it are '
                      'whole, and the same command goes on from them') from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    line = f'saved {final} in {time.perf_counter() - began:.1f} s'
    for problem in prune(final.parent, keep):
        line += f'; an older one could not be removed: {problem}'
    return line


def save_state(file, state):
    """torch.save, which has a RuntimeError for what a disk does not take. OSError"""
    try:
        with open(file, 'wb') as f:
            torch.save(state, f)
    except RuntimeError as e:
        raise OSError(f'{file}: {e}') from e


class Writer:
    """Writes in the background, one checkpoint at a time. As a context it waits at the end for
    the one that is being written, however the end came."""

    def __init__(self):
        self.pool = ThreadPoolExecutor(1)
        self.job = None

    def start(self, *args):
        """write(*args), after the one before"""
        assert self.job is None, 'finish the one before first'
        self.job = self.pool.submit(write, *args)

    def finish(self):
        """Waits -> the line of write, or None where nothing was being written. Raises what the
        writing raised, whatever it was: a checkpoint that is missing is never silent"""
        if self.job is None:
            return None
        job = self.job
        self.job = None
        return job.result()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        try:
            self.finish()
        except Exception as e:
            if error is None:
                raise
            log.warning(f'{type(e).__name__}: {e}')     # what ended the run comes first
        finally:
            self.pool.shutdown()


# --------------------------------------------------------------------------------- reading

def load_training_state(checkpoint, optimizer, scaler, device, part):
    """Puts back what training_state had -> the progress. part: cuts a whole tensor to what
    this rank has of another one"""
    file = checkpoint / 'trainer' / 'state.pt'
    try:
        state = torch.load(file, map_location='cpu', weights_only=True)     # executes nothing
    except Exception as e:                                  # whatever its layers raise
        reason = str(e).strip().split('\n')[0]
        raise OSError(f'{file} cannot be read: {type(e).__name__}: {reason}') from e
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    for i, p in enumerate(parameters):
        own = state['optimizer']['state'].get(i, {})
        for name, tensor in own.items():
            if tensor.shape == p.shape:
                own[name] = part(tensor, p)
    optimizer.load_state_dict(state.pop('optimizer'))
    scaler.load_state_dict(state.pop('scaler'))
    random_numbers = state.pop('rng')
    torch.set_rng_state(random_numbers['cpu'])
    if device.type in random_numbers and device.type != 'cpu':
        torch.get_device_module(device).set_rng_state(random_numbers[device.type])
    state.pop('version', None)
    return state
