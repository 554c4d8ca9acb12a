"""Train a model on one device: a CPU, one GPU, or Apple's.

    python train.py config/shakespeare.py --max_steps=500
    python train.py config/smol135.py --max_steps=0       # prints the model and the memory it needs, and stops

Config files are Python and are executed; settings given later win. The run is in out_dir: settings.json, metrics.jsonl,
train.log and step-N/ directories, each a Hugging Face model. The same command again goes on where the run stopped.
"""
import nanoseek.tuning  # noqa: F401  # first: it acts before torch is loaded

import importlib.util, json, math, os, platform, shutil, signal, subprocess, sys, time, zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
from safetensors import SafetensorError

import config
from model import Config, Transformer
from nanoseek import folders, hf, monitor
from nanoseek.device import check_fp8, compiled, matmul_rate, memory_limit, peak_memory, pick_device, to_device, to_fp8
from nanoseek.estimate import advice, architecture, describe, flops_per_token, memory_estimate, parameter_table
from nanoseek.monitor import Log, Silence, culprit
from nanoseek.optim import learning_rate_at, make_optimizer
from nanoseek.tokens import NoDataset, open_data
from nanoseek.tokenizer import decode, encode, load_tokenizer

STARTED = time.time()
VERSION = 2     # of step-N/trainer/; 1 had no manifest.json

@dataclass
class Settings:
    """Training settings"""
    out_dir: str = 'out/run'            # where the run is written
    dataset: str | dict = 'shakespeare'  # what prepare.py made, in data/ or a path; a mixture: {'a': 0.7, 'b': 0.3}
    seed: int = 1337                    # of the initial weights, the order of the data and dropout
    device: str = 'auto'                # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'bfloat16', 'float16', 'float32'] = 'auto'  # of the matmuls; the weights are float32
    fp8: Literal['', 'tensorwise', 'rowwise'] = ''  # FP8 in attention, dense and shared MLPs; needs torchao
    compile: Literal['auto', True, False] = 'auto'  # torch.compile; auto: on a GPU
    batch_size: int = 16                # sequences per device and micro-step
    block_size: int = 256               # tokens per sequence
    doc_attention_mask: bool = False    # tokens attend to their own document only
    global_batch_size: int = 0          # sequences per optimizer step over all ranks; 0: one micro-step
    max_steps: int = 1000               # optimizer steps of the whole run; 0: print the model and stop
    optimizer: Literal['adamw', 'muon'] = 'adamw'  # muon: for matrices; embedding, head, norms, routers on AdamW
    learning_rate: float = 1e-3         # its peak
    min_lr_frac: float = 0.1            # where it ends, a fraction of learning_rate
    warmup_steps: int = 100             # steps of linear warm-up
    schedule: Literal['cosine', 'wsd'] = 'cosine'  # after warm-up; wsd: constant, at the end linear
    decay_frac: float = 0.2             # wsd: the last fraction of max_steps, where it falls
    weight_decay: float = 0.1           # on matrices
    beta1: float = 0.9                  # AdamW's
    beta2: float = 0.95                 # AdamW's
    eps: float = 1e-8                   # AdamW's
    grad_clip: float = 1.0              # largest norm of the gradient; 0: no limit
    gradient_checkpointing: bool = False  # compute layers again in the backward pass: less memory, a third slower
    log_interval: int = 10              # steps between progress lines
    eval_interval: int = 250            # steps between evaluations
    eval_steps: int = 0                 # micro-batches of a dataset's evaluation over all ranks; 0: the whole val split
    sample_interval: int = 0            # steps between text samples; 0: none
    sample_prompt: str = '\n'           # what they begin with
    checkpoint_interval: int = 500      # steps between checkpoints; there is always one at the end
    keep_checkpoints: int = 2           # the newest ones stay, and the best by validation loss; 0: all
    max_minutes: float | None = None    # stop after this time with a checkpoint; none: no limit
    max_bad_steps: int = 5              # so many non-finite steps in a row, and the run goes back to a checkpoint
    max_rollbacks: int = 3              # so often; then it stops
    resume: str = 'auto'                # auto: from out_dir's newest checkpoint; never: start over; or a checkpoint
    init_from: str | None = None        # start from the weights of this Hugging Face folder or Hub id
    wandb: bool = False                 # also log to Weights & Biases
    tensorboard: bool = False           # also log for TensorBoard, in out_dir/tensorboard

    def __post_init__(self):
        for name in ('batch_size', 'block_size', 'log_interval', 'eval_interval', 'checkpoint_interval',
                     'max_bad_steps'):
            self.check(name, getattr(self, name) >= 1, 'at least 1')
        for name in ('global_batch_size', 'max_steps', 'warmup_steps', 'eval_steps', 'sample_interval',
                     'keep_checkpoints', 'max_rollbacks', 'grad_clip', 'weight_decay'):
            self.check(name, getattr(self, name) >= 0, 'at least 0')
        for name in ('learning_rate', 'eps'):
            self.check(name, getattr(self, name) > 0, 'above 0')
        for name in ('min_lr_frac', 'decay_frac'):
            self.check(name, 0 <= getattr(self, name) <= 1, 'at least 0 and at most 1')
        for name in ('beta1', 'beta2'):
            self.check(name, 0 <= getattr(self, name) < 1, 'at least 0 and below 1')

    def check(self, name, holds, limit):
        if not holds:
            raise ValueError(f'{name}={getattr(self, name)}: must be {limit}')

class OneDevice:
    """What the loop asks about distribution. train_ddp.py has another answer to the same questions."""
    rank, world, sharded, device = 0, 1, False, None

    def wrap(self, model):
        """-> what is called in the place of the model"""
        return model

    def accumulate(self, last):
        """The context of a micro-step, forward and backward: between ranks, gradients travel after the last one only"""
        return nullcontext()

    def sum(self, x):
        """x summed over ranks"""
        return x

    def all(self, flag):
        """Whether it is true on all ranks"""
        return flag

    def any(self, flag):
        """Whether it is true on any rank"""
        return flag

    def first(self, f):
        """What f() is on rank 0"""
        return f()

    def whole(self, x):
        """A tensor of which every rank may have a part only"""
        return x

    def part(self, x, like):
        """The part of x that this rank has of the tensor like"""
        return x

    def costs(self, s, c, dtype):
        """Lines about distribution for --max_steps=0"""
        return []

# ------------------------------------------------------------------------------------------------------------ pieces

def plan(given, folder, data):
    """-> the Config that is asked for: the given settings, on top of those of the model in folder where there is one"""
    if folder:
        return hf.read_config(Config, folder, **given)
    own = {'vocab_size': 256}
    if data:
        own = {'vocab_size': data.vocab_size, 'bos_token_id': data.eot_id, 'eos_token_id': data.eot_id}
    return Config(**{**own, **given})

def build_model(s, given, found, data):
    """-> the model in float32 on the CPU: that of the checkpoint found, else init_from's, else a fresh one"""
    folder = found or s.init_from and folders.hub_folder(s.init_from, folders.MODEL_FILES)
    config = plan(given, folder, data)
    check_sizes(s, config, data)
    torch.manual_seed(s.seed)
    if not folder:
        return Transformer(config)
    if not found:
        check_tokenizer(s, folder, data)
        theirs = hf.read_config(Config, folder).rope_theta
        if config.rope_theta != theirs:             # as no other one that fits, it makes the weights worthless
            print(f'rope_theta={config.rope_theta:g}, but {folder} was trained with {theirs:g}', file=sys.stderr)
        return Transformer.from_pretrained(folder, **given)
    model = Transformer.from_pretrained(found)
    for name in given:
        check_same(found, name, getattr(model.config, name), getattr(config, name))
    return model

def check_sizes(s, c, data):
    if data.vocab_size > c.vocab_size:
        raise ValueError(f'the vocabulary of dataset={s.dataset} has {data.vocab_size:,} tokens, the model only '
                         f'vocab_size={c.vocab_size:,}: raise it, or set it to 0 to take the dataset\'s')
    if s.block_size <= c.num_nextn_predict_layers:
        raise ValueError(f'block_size={s.block_size}: must be above the MTP depth, {c.num_nextn_predict_layers}')
    if s.block_size > c.max_position_embeddings:
        raise ValueError(f'block_size={s.block_size} is above max_position_embeddings={c.max_position_embeddings}: '
                         'lower the one or raise the other')
    if s.doc_attention_mask and c.attention == 'linear':
        raise ValueError('doc_attention_mask=true: attention=linear has no mask: take gqa or mla')
    if s.doc_attention_mask and data.eot_id is None:
        raise ValueError(f'doc_attention_mask=true: dataset={s.dataset} has no end-of-text token: prepare it with a '
                         'tokenizer that has one, such as bpe:1024')
    if s.doc_attention_mask and data.eot_id not in c.stop_ids[:1]:
        raise ValueError(f'doc_attention_mask=true: a text of dataset={s.dataset} ends with token {data.eot_id}, for '
                         f'the model with eos_token_id={c.eos_token_id}: set --eos_token_id={data.eot_id}')

def check_tokenizer(s, folder, data):
    """A model knows its own tokens only: the same ids that mean something else would train, and badly"""
    if not (folder / 'tokenizer.json').is_file():
        return
    theirs = load_tokenizer(folder)
    for token, i in load_tokenizer(data.directory).get_vocab().items():
        if theirs.token_to_id(token) != i:
            raise ValueError(f'dataset={s.dataset} was made with another tokenizer than init_from={s.init_from}, where '
                             f'{token!r} is not {i} but {theirs.token_to_id(token)}: run python prepare.py '
                             f'{" and ".join(d.meta["source"]["name"] for d, _ in data.sources.values())} '
                             f'--tokenizer={s.init_from} --out_dir=data/NAME')

@torch.no_grad()
def evaluate(model, data, s, device, amp, dist):
    """Mean next-token loss over a source's val split, or its first eval_steps micro-batches, in nats per token"""
    count = data.windows('val', s.block_size)
    if s.eval_steps:
        count = min(count, s.eval_steps * s.batch_size)     # the same for any number of ranks
    total = torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    for first in range(0, count, dist.world * s.batch_size):
        mine = first + dist.rank * s.batch_size
        rows = max(min(s.batch_size, count - mine), 0)      # with none left, window 0 with no weight: all ranks compute
        x, y = to_device(data.eval_batch('val', mine if rows else 0, max(rows, 1), s.block_size), device)
        with amp():
            _, loss = model(x, y)
        total += torch.stack((loss.double() * rows, loss.new_tensor(rows).double()))
    model.train()
    loss, rows = dist.sum(total).tolist()
    return loss / rows

def sample_text(model, tokenizer, s, device, amp):
    """256 tokens from the model as it stands, without a trace in the run's random numbers"""
    prompt = torch.tensor([encode(tokenizer, s.sample_prompt)], device=device)
    model.eval()
    with torch.random.fork_rng(), amp():
        torch.manual_seed(s.seed)
        ids = model.generate(prompt, 256, temperature=0.8, top_k=50, stop=model.config.stop_ids)
    model.train()
    return decode(tokenizer, ids[0].tolist())

# ------------------------------------------------------------------------------------------------------- checkpoints

def checkpoints(out_dir):
    """The checkpoints of a run by their steps, oldest first, whole or damaged"""
    found = [p for p in Path(out_dir).glob('step-*') if p.name[5:].isdigit() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name[5:]))

def checksum(file):
    """-> size, CRC-32"""
    value = 0
    with open(file, 'rb') as f:
        while block := f.read(2**20):
            value = zlib.crc32(block, value)
        return [f.tell(), value]

def damage(checkpoint):
    """What is wrong with a checkpoint's files, or None; reads all of them"""
    try:
        folder = checkpoint / 'trainer'
        version = json.loads((folder / 'settings.json').read_text()).get('version', 1)
        if version > VERSION:
            return f'its version is {version}, this train.py knows {VERSION}'
        if version == 1:
            return None if (folder / 'state.pt').is_file() else 'no trainer/state.pt'
        manifest = json.loads((folder / 'manifest.json').read_text())
        if not {'config.json', 'trainer/state.pt', 'trainer/settings.json'} <= manifest.keys() or '..' in str(manifest):
            return 'trainer/manifest.json is not ours'
        for name, wanted in manifest.items():
            if (found := checksum(checkpoint / name)) != wanted:
                return f'{name} has {found[0]:,} bytes and checksum {found[1]}, not {wanted[0]:,} and {wanted[1]}'
    except (OSError, ValueError, AttributeError, TypeError, LookupError) as e:
        return str(e)

def newest(out_dir, say):
    """The newest whole checkpoint, or None; say hears of damaged ones"""
    for checkpoint in reversed(checkpoints(out_dir)):
        if (problem := damage(checkpoint)) is None:
            return checkpoint
        say(f'{checkpoint} is damaged ({problem}): going back to the one before')

def cpu_copy(x, dist):
    """A copy on the CPU of all tensors in dicts and lists, which training cannot change any more; on rank 0, whole"""
    if isinstance(x, dict):
        return {k: cpu_copy(v, dist) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [cpu_copy(v, dist) for v in x]
    if not isinstance(x, torch.Tensor):
        return x
    x = dist.whole(x.detach())
    return x.to('cpu', copy=True) if dist.rank == 0 else None

def save_checkpoint(run, evaluated):
    """Copies the state, and writes it as out_dir/step-N in the background. evaluated: the validation loss is of now"""
    finish_writing(run)
    s, c, dist, began = run.s, run.model.config, run.dist, time.perf_counter()
    if dist.rank and not dist.sharded:
        return
    state = {'version': VERSION, 'step': run.step, 'skipped': run.skipped, 'rollbacks': run.rollbacks,
             'history': run.history, 'about': run.about, 'optimizer': run.optimizer.state_dict(),
             'scaler': run.scaler.state_dict(), 'rng': {'cpu': torch.get_rng_state()}}
    if run.device.type != 'cpu':
        state['rng'][run.device.type] = torch.get_device_module(run.device).get_rng_state()
    loss = run.about['validation'] if evaluated and math.isfinite(run.about['validation']) else None
    settings = {**asdict(s), **asdict(c), **run.identity, 'version': VERSION, 'val_loss': loss}
    card = model_card(run)
    state, weights = cpu_copy(state, dist), cpu_copy(run.model.state_dict(), dist) if dist.sharded else None
    final = Path(s.out_dir) / f'step-{run.step:06d}'
    if dist.rank == 0:
        weights = run.model.snapshot(state=weights)
        run.writing = run.pool.submit(write_checkpoint, final, run, state, weights, settings, card)
    run.paused = time.perf_counter() - began

def write_checkpoint(final, run, state, weights, settings, card):
    """-> a line that says so. A folder has its final name only when all of it is on the disk"""
    began, tmp, c = time.perf_counter(), final.with_name(f'.{final.name}.tmp'), run.model.config
    if broken := [name for name, t in weights.items() if not t.isfinite().all()]:
        return f'{final} is not written: {broken[0]} is not finite'
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        run.model.save_pretrained(tmp, state=weights)
        folders.write_companions(tmp, load_tokenizer(run.data.directory), c, run.companions, run.data.special_in_text)
        texts = {'README.md': card, 'trainer/settings.json': json.dumps(settings, indent=1) + '\n'}
        (tmp / 'trainer').mkdir()
        for name, text in texts.items():
            (tmp / name).write_text(text, encoding='utf-8')
        with open(tmp / 'trainer' / 'state.pt', 'wb') as f:
            torch.save(state, f)
        files = [p for p in sorted(tmp.rglob('*')) if p.is_file()]
        manifest = {p.relative_to(tmp).as_posix(): checksum(p) for p in files}
        (tmp / 'trainer' / 'manifest.json').write_text(json.dumps(manifest, indent=1) + '\n')
        for path in (*tmp.rglob('*'), tmp):
            flush(path)
        remove(final)
        os.replace(tmp, final)
        flush(final.parent)
        prune(final.parent, run.s.keep_checkpoints)
    except (OSError, RuntimeError, SafetensorError) as e:       # a full disk, as the three libraries put it
        free = shutil.disk_usage(final.parent).free >> 20
        shutil.rmtree(tmp, ignore_errors=True)
        raise OSError(f'{final} could not be written with {free:,} MB free there ({e}): the checkpoints before it are '
                      'whole, and the same command goes on from them') from e
    return f'saved {final} in {time.perf_counter() - began:.1f} s'

def flush(path):
    """Waits until a file, or the names in a folder, are on the disk"""
    if path.is_dir() and os.name == 'nt':
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)

def remove(checkpoint):
    """Under another name first: whenever this is interrupted, no half checkpoint stays"""
    if checkpoint.exists():
        gone = checkpoint.with_name(f'.{checkpoint.name}.old.tmp')
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(checkpoint, gone)
        shutil.rmtree(gone)

def prune(out_dir, keep):
    """Leaves the newest checkpoints, and of those that were evaluated the one with the lowest validation loss"""
    found, losses = checkpoints(out_dir) if keep else [], {}
    for checkpoint in found:
        with suppress(OSError, ValueError):     # an old one that is damaged does not end the run
            loss = json.loads((checkpoint / 'trainer' / 'settings.json').read_text()).get('val_loss')
            losses |= {loss: checkpoint} if loss is not None else {}
    for old in found[:-keep]:
        if not losses or old != losses[min(losses)]:
            remove(old)

def finish_writing(run):
    """Waits for the checkpoint that is being written; OSError where that failed"""
    if run.writing:
        run.log.say(f'{run.writing.result()}; the loop paused for {run.paused:.2f} s')
        run.writing = None

def model_card(run):
    s, c, data, about, table = run.s, run.model.config, run.data, run.about, parameter_table(run.model)
    kind, script = hf.architecture_class(c), 'python' if run.dist.world == 1 else 'torchrun'
    texts = [f'{f"{share:.4g} " * (share < 1)}{d.meta["source"]["name"]} ({d.meta["source"]["license"]})'
             for d, share in data.sources.values()]
    base = f'\nbase_model: {s.init_from}' if s.init_from and not Path(s.init_from).is_dir() else ''
    return f"""---
library_name: {'nanoseek' if kind.startswith('nanoseek') else 'transformers'}
pipeline_tag: text-generation
tags: [nanoseek]{base}
---
# {Path(s.out_dir).name}, step {run.step:,}

{kind}: {architecture(c)}, context {c.max_position_embeddings:,}.
{table['total']:,} parameters, {table['active']:,} active per token, trained with nanoseek.

- started from: {s.init_from or 'random weights'}
- data: {' + '.join(texts)}, tokenizer {next(d.meta['tokenizer']['name'] for d, _ in data.sources.values())}
- tokens seen: {run.step * run.batch * s.block_size:,}
- losses: {', '.join(f'{k} {v:.4f}' for k, v in about.items()) or 'not evaluated yet'}
- command: `{script} {' '.join(sys.argv)}`, {run.dist.world} process{'es' * (run.dist.world > 1)}
"""

def load_trainer(run, checkpoint):
    """Puts back what a step depends on besides the weights"""
    file = checkpoint / 'trainer' / 'state.pt'
    try:
        state = torch.load(file, map_location='cpu', weights_only=True)     # tensors and plain values, nothing executed
    except Exception as e:          # whatever its layers raise
        raise OSError(f'{file} cannot be read: {str(e).strip().splitlines()[0]}') from e
    for i, p in enumerate(p for group in run.optimizer.param_groups for p in group['params']):
        own = state['optimizer']['state'].get(i, {})
        own |= {name: run.dist.part(t, p) for name, t in own.items() if t.shape == p.shape}
    run.optimizer.load_state_dict(state['optimizer'])
    run.scaler.load_state_dict(state['scaler'])
    torch.set_rng_state(state['rng']['cpu'])
    if run.device.type in state['rng'] and run.device.type != 'cpu':
        torch.get_device_module(run.device).set_rng_state(state['rng'][run.device.type])
    run.step = state['step']
    for name in ('skipped', 'rollbacks', 'history', 'about'):       # version 1 had none of these
        setattr(run, name, state.get(name, getattr(run, name)))

def find_resume(s, identity):
    """settings -> the checkpoint to go on from, or None. ValueError where its data are others"""
    found, say = Path(s.resume), lambda line: print(line, file=sys.stderr)
    if s.resume in ('auto', 'never'):
        found = newest(s.out_dir, say) if s.resume == 'auto' else None
        if not found and s.resume == 'auto' and checkpoints(s.out_dir):
            raise ValueError(f'no checkpoint in {s.out_dir} is whole: start over with --resume=never')
    elif not (found / 'trainer' / 'state.pt').is_file():
        raise ValueError(f'resume={s.resume}: no such checkpoint (a step-N folder with trainer/state.pt in it)')
    elif problem := damage(found):
        raise ValueError(f'resume={found}: damaged: {problem}')
    if found:
        saved = json.loads((found / 'trainer' / 'settings.json').read_text())
        for name in identity:
            check_same(found, name, saved.get(name, identity[name]), identity[name])
    return found

def check_same(found, name, old, new):
    if old != new:
        raise ValueError(f'{found} was trained with {name}={old}, now it is {new}: go back, take another out_dir '
                         f'(--init_from={found} starts from its weights), or start over with --resume=never')

# ----------------------------------------------------------------------------------------------------------- the run

def catch_signals():
    """-> a list that is empty until the first Ctrl-C or SIGTERM; a second Ctrl-C ends at once"""
    caught = []

    def handle(number, frame):
        caught.append(signal.Signals(number).name)
        if caught.count('SIGINT') > 1:
            os._exit(130)           # not waiting for a checkpoint that is being written: it has no name yet
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return caught

def versions():
    try:
        git = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = git.stdout.strip() or None
    except OSError:     # no git here
        commit = None
    return {'python': platform.python_version(), 'torch': torch.__version__, 'git': commit,
            'machine': platform.machine(), 'cpus': os.cpu_count(), 'command': ' '.join(sys.argv)}

def setup(s, model_settings, dist):
    """Everything that a user's mistake can stop -> the run, as far as it is known by then"""
    for package in ('wandb', 'tensorboard'):
        if getattr(s, package) and importlib.util.find_spec(package) is None:
            raise ValueError(f'{package}=true needs its package: pip install {package}')
    if Path(s.out_dir).exists() and not Path(s.out_dir).is_dir():
        raise ValueError(f'out_dir={s.out_dir}: a file has this name')
    device, dtype = pick_device(s, dist.device)
    given = {k: v for k, v in model_settings.items() if k != 'vocab_size' or v}
    if s.max_steps == 0:
        folder, data = s.init_from and folders.hub_folder(s.init_from, folders.MODEL_FILES), None
        with suppress(NoDataset):
            data = open_data(s.dataset)
        c = plan(given, folder, data)
        print(*describe(Transformer, c, s, memory_estimate(Transformer, c, s, dtype, device.type)), *dist.costs(s, c, dtype), sep='\n')
        sys.exit(0)
    if s.fp8:
        check_fp8(s.fp8, device, dtype)
    data = open_data(s.dataset)
    for split in ('train', 'val'):
        data.windows(split, s.block_size)
    if s.global_batch_size % (rows := s.batch_size * dist.world):
        near = sorted({max(s.global_batch_size // rows, 1) * rows, (s.global_batch_size // rows + 1) * rows})
        raise ValueError(f'global_batch_size={s.global_batch_size}: must be a multiple of batch_size={s.batch_size} '
                         f'x {dist.world} {"device" if dist.world == 1 else "devices"}, such as '
                         f'{" or ".join(map(str, near))}')
    if s.sample_interval:
        encode(load_tokenizer(data.directory), s.sample_prompt)
    if dist.rank == 0:
        data.check()
    batch = s.global_batch_size or s.batch_size * dist.world
    identity = {'seed': s.seed, 'block_size': s.block_size, 'batch': batch, 'optimizer': s.optimizer,
                'data': data.fingerprint()}
    found = dist.first(lambda: find_resume(s, identity))
    model = build_model(s, given, found, data)
    if s.fp8:
        to_fp8(model, s.fp8)
    companions = {}                     # what the model that this one comes from brings beside its weights
    if found or s.init_from:
        companions = folders.read_companions(found or folders.hub_folder(s.init_from, folders.MODEL_FILES))
    return SimpleNamespace(s=s, dist=dist, data=data, model=model, device=device, dtype=dtype, found=found,
                           identity=identity, batch=batch, companions=companions, step=0, skipped=0, rollbacks=0, bad=0, history=[], losses={},
                           about={}, writing=None, caught=[], stop=False)

def clear(s, found, step):
    """Removes what comes after the checkpoint found, or all: by now no mistake of the user's can stop the run"""
    for old in checkpoints(s.out_dir):
        if int(old.name[5:]) > step or not found:
            remove(old)
    for old in Path(s.out_dir).glob('.step-*.tmp'):
        shutil.rmtree(old)
    if not found:
        (Path(s.out_dir) / 'metrics.jsonl').unlink(missing_ok=True)

def start(run):
    """Moves the model to its device, and prepares all that the loop works with; False where the run is complete"""
    s, model, device, dtype, found = run.s, run.model, run.device, run.dtype, run.found
    model.to(device).train()
    model.gradient_checkpointing, model.doc_attention_mask = s.gradient_checkpointing, s.doc_attention_mask
    forward = run.dist.wrap(model)
    run.amp = lambda: torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    run.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    run.optimizer = make_optimizer(s, model, dtype, run.dist.whole, run.dist.part)
    if found:
        load_trainer(run, found)
    if run.step >= s.max_steps:
        if run.dist.rank == 0:
            print(f'{found} is complete: go on with --max_steps={run.step + 1000}, or start over with --resume=never')
        return False
    run.dist.first(lambda: clear(s, found, run.step))
    resolved = {**asdict(s), **asdict(model.config), **versions()}
    run.log, run.pool = Log(s, run.step, resolved) if run.dist.rank == 0 else Silence(), ThreadPoolExecutor(1)
    if run.dist.rank == 0:
        (run.log.dir / 'settings.json').write_text(json.dumps(resolved, indent=1) + '\n', encoding='utf-8')
    run.first, estimate = run.step, memory_estimate(Transformer, model.config, s, dtype, device.type)
    for line in (*describe(Transformer, model.config, s, estimate), *([f'going on from {found}'] if found else [])):
        run.log.say(line)
    if not run.dist.sharded and sum(estimate) > memory_limit(device):
        run.log.say(f'this may not fit: {advice(Transformer, model.config, s, dtype, device)}')
    run.forward, problem = compiled(model, forward, s, device, run.amp)
    if problem:
        run.log.say(f'{problem}: going on without it')
    rate, run.accumulation = matmul_rate(device, dtype), run.batch // (s.batch_size * run.dist.world)
    run.peak, run.tokenizer = rate * run.dist.world, load_tokenizer(run.data.directory)
    run.log.say(f'{device.type} {str(dtype)[6:]}{s.fp8 and f", fp8 {s.fp8}"}, {run.accumulation} x {s.batch_size} x '
                f'{s.block_size} = {run.batch * s.block_size:,} tokens a step, {s.max_steps - run.step:,} steps; '
                f'a matmul reaches {rate / 1e12:.2f} TFLOP/s here')
    return True

def train(run):
    s, clock, since = run.s, time.perf_counter(), run.step
    run.caught = catch_signals()
    while run.step < s.max_steps:
        losses = micro_steps(run)
        norm, load, good = update(run, losses)
        run.step += 1
        if run.bad == s.max_bad_steps:
            roll_back(run)
            clock, since = time.perf_counter(), run.step
            continue
        last = run.step == s.max_steps or run.stop
        if good and (run.step % s.log_interval == 0 or run.step == run.first + 1 or last):
            run.losses = {k: (run.dist.sum(v) / run.dist.world).item() for k, v in losses.items()}
            log_step(run, load, norm, (time.perf_counter() - clock) * 1e3 / (run.step - since))
            clock, since = time.perf_counter(), run.step
        pause = time.perf_counter()
        look(run, load, last)
        clock += time.perf_counter() - pause        # step_ms is of steps alone
        if run.stop:
            break
    finish_writing(run)
    if run.stop:
        why = run.caught[0] if run.caught else 'another rank'
        run.log.say(f'{why}: stopped after step {run.step}; the same command goes on from here')
    run.log.close()

def rows(run, micro):
    """The numbers of this rank's sequences in a micro-step of the present step"""
    first = (run.step + run.skipped) * run.batch + (micro * run.dist.world + run.dist.rank) * run.s.batch_size
    return range(first, first + run.s.batch_size)

def batch(run, micro):
    """-> x, y (batch_size, block_size) of a micro-step, on the device"""
    return to_device(run.data.batch('train', rows(run, micro), run.s.block_size, run.s.seed), run.device)

def micro_steps(run):
    """Forward and backward of a global batch -> its losses by their names, means over this rank's micro-steps"""
    losses = {}
    for micro in range(run.accumulation):
        x, y = batch(run, micro)
        with run.dist.accumulate(last=micro == run.accumulation - 1):
            with run.amp():
                _, loss = run.forward(x, y)
            run.scaler.scale(loss / run.accumulation).backward()
        losses = {k: losses.get(k, 0) + v / run.accumulation for k, v in run.model.losses.items()}
    return losses

def update(run, losses):
    """The optimizer's step and the routers', unless loss or gradient are not finite -> norm of the gradient, expert
    load (MoE layers, E) in the whole global batch, whether the step was taken"""
    s, model, scaler, dist = run.s, run.model, run.scaler, run.dist
    for group in run.optimizer.param_groups:
        group['lr'] = learning_rate_at(run.step, s)
    if s.max_minutes is not None and time.time() - STARTED > 60 * s.max_minutes:
        run.caught.append(f'max_minutes={s.max_minutes:g}')
    scaler.unscale_(run.optimizer)
    total = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    norm = dist.whole(total).item()

    # All ranks decide alike
    loss = dist.sum(losses['main'] / dist.world).item()
    load = dist.sum(model.expert_load.clone())
    run.stop = dist.any(bool(run.caught))
    finite = dist.all(math.isfinite(norm))
    if not finite:
        norm = math.nan
    overflow = scaler.is_enabled() and scaler.get_scale() > 1       # float16: so it finds its scale
    good = math.isfinite(loss) and (finite or overflow)
    if good:
        if s.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), s.grad_clip, total)
        scaler.step(run.optimizer)
        if finite:
            model.update_router_bias(load)
        if found := monitor.spike(run.history, loss):
            z, median = found
            run.log.say(f'step {run.step + 1}: loss {loss:.4f} is a spike, {z:.1f} deviations above {median:.4f}')
            run.log.add(step=run.step + 1, event='spike', loss=loss, z=round(z, 2))
        run.history = [*run.history[-127:], loss]
        run.bad = 0
    else:
        batches = (batch(run, micro) for micro in range(run.accumulation))
        where = culprit(model, batches, run.amp)
        run.bad += 1
        run.log.say(f'step {run.step + 1}: loss {loss:.4g}, gradient norm {norm:.4g}: skipped; the first that is not '
                    f'finite is {where}')
        run.log.add(step=run.step + 1, event='skipped', loss=str(loss), grad_norm=str(norm), where=where)
    scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    model.expert_load.zero_()
    run.log.advance()
    return norm, load, good

def roll_back(run):
    """Back to the last good checkpoint, and on from there with the data that would have come now"""
    s, log, found = run.s, run.log, None
    finish_writing(run)
    if run.rollbacks < s.max_rollbacks:
        found = run.dist.first(lambda: newest(s.out_dir, log.say))
        if run.found and (not found or int(found.name[5:]) < run.first):    # it may be in another folder
            found = None if damage(run.found) else run.found
    if not found:
        why = f'also after going back {run.rollbacks} times' if run.rollbacks else 'and no checkpoint is whole yet'
        log.say(f'{run.bad} steps in a row were not finite, {why}: stopping. Try a lower learning_rate (now '
                f'{s.learning_rate:g}) or a longer warmup_steps ({s.warmup_steps})')
        sys.exit(1)
    position, bad, times = run.step + run.skipped, run.bad, run.rollbacks + 1
    fresh = Transformer.from_pretrained(found).state_dict()
    with torch.no_grad():
        for name, t in run.model.state_dict().items():
            t.copy_(run.dist.part(fresh[name], t))
    load_trainer(run, found)
    run.skipped, run.rollbacks, run.bad = position - run.step, times, 0
    log.rewind(run.step, keep_events=True)
    log.say(f'{bad} steps in a row were not finite: back to {found}, and on without the data that led here '
            f'({run.skipped} steps)')
    log.add(step=run.step + 1, event='rollback', checkpoint=str(found), skipped=run.skipped, rollbacks=times)

def validate(run):
    """-> loss in nats per token, bits per byte, and for metrics.jsonl those of every source where there are several, of
    which the first two are then the means by share"""
    sources, bits = run.data.sources, lambda loss, data: loss / math.log(2) / data.bytes_per_token('val')
    losses = {name: evaluate(run.model, data, run.s, run.device, run.amp, run.dist)
              for name, (data, _) in sources.items()}
    loss, each = sum(losses[name] * share for name, (_, share) in sources.items()), {}
    if len(sources) > 1:
        each |= {f'val_loss/{name}': losses[name] for name in sources}
        each |= {f'val_bpb/{name}': bits(losses[name], data) for name, (data, _) in sources.items()}
    return loss, bits(loss, run.data), each

def look(run, load, last):
    """Evaluation, text samples and checkpoints, each at its interval and at the end"""
    s, log, evaluated = run.s, run.log, run.step % run.s.eval_interval == 0 or last
    if evaluated:
        val, bpb, each = validate(run)
        run.about = {'training': run.losses.get('main', math.nan), 'validation': val, 'bits per byte': bpb}
        log.say(f'step {run.step:6d} | validation loss {val:.4f} | {bpb:.4f} bits per byte' + ''.join(
            f' | {k[9:]} {v:.4f}' for k, v in each.items() if k.startswith('val_loss/')))
        log.add(step=run.step, elapsed_s=round(time.time() - STARTED, 2), val_loss=val, val_bpb=bpb, **each,
                **{'moe/load': monitor.relative_load(load).tolist()} if len(load) else {})
    if s.sample_interval and (run.step % s.sample_interval == 0 or last):
        log.say(f'--- sample\n{sample_text(run.model, run.tokenizer, s, run.device, run.amp)}\n---')
    if run.step % s.checkpoint_interval == 0 or last:
        save_checkpoint(run, evaluated)
    elif run.writing and run.writing.done():
        finish_writing(run)

def log_step(run, load, norm, ms):
    """The progress line, and its numbers in metrics.jsonl"""
    s, step, losses, tokens = run.s, run.step, run.losses, run.batch * run.s.block_size
    rate = tokens / ms * 1e3
    entry = {'step': step, 'tokens': step * tokens, 'elapsed_s': round(time.time() - STARTED, 2),
             'loss': losses['main'], 'lr': run.optimizer.param_groups[0]['lr'], 'grad_norm': norm,
             'step_ms': round(ms, 3), 'tok_per_s': round(rate, 1),
             'mfu': round(rate * flops_per_token(run.model, s.block_size) / run.peak, 4),
             'memory_mb': round(peak_memory(run.device), 1)}
    entry |= {f'{k}_loss': v for k, v in losses.items() if k != 'main'}
    if len(sources := run.data.sources) > 1:        # of their data, that of skipped steps is gone as well
        for name, count in run.data.drawn((step + run.skipped) * run.batch).items():
            entry |= {f'data/{name}/tokens': count * s.block_size,
                      f'data/{name}/epochs': round(count / sources[name][0].windows('train', s.block_size), 4)}
    entry |= monitor.load_entry(load)
    left = (s.max_steps - step) * ms / 1e3
    if step == run.first + 1 and left > 0:
        left = None                                 # the first step's time is also that of what is done once
    run.log.say(monitor.progress_line(entry, s.max_steps, left))
    run.log.add(**entry)

def main(s, model_settings, dist):
    with config.user_errors():
        run = setup(s, model_settings, dist)
    try:
        if start(run):
            train(run)
        return
    except OSError as e:            # a full disk
        problem = str(e)
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and 'allocate memory' not in str(e):
            raise
        c, problem = run.model.config, None
    if not problem:
        del run                     # with all that fills the memory
        device, dtype = pick_device(s, dist.device)
        problem = f'out of memory: {advice(Transformer, c, s, dtype, device)}'
    print(f'{Path(sys.argv[0]).name}: {problem}', file=sys.stderr)
    sys.exit(2)

if __name__ == '__main__':
    with config.user_errors():
        given, model_settings = config.load(Settings, Config, usage=__doc__)
        settings = Settings(**given)
    try:
        main(settings, model_settings, OneDevice())
    except KeyboardInterrupt:       # before the loop, which has its own way to stop
        sys.exit(130)
