"""Train a model on one device: a CPU, one GPU, or Apple's.

    python train.py config/shakespeare.py --max_steps=500
    python train.py config/smol135.py --max_steps=0       # prints the model and the memory it needs, and stops

Config files are Python and are executed; settings given later win. The run is in out_dir: settings.json, metrics.jsonl,
train.log and step-N/ directories, each a Hugging Face model. The same command again goes on where the run stopped.
"""
import ctypes, functools, importlib.util, json, math, os, platform, shutil, signal, statistics, subprocess, sys, time
import weakref, zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal
from unittest.mock import patch

# Idle OpenMP threads spin for long by default: with one other busy process on the machine, a training step on the CPU
# then takes ten times as long and more (see the README). Read when torch is loaded.
os.environ.setdefault('GOMP_SPINCOUNT', '3000')
# By default glibc returns much of what a step frees to the kernel, and the next step waits for new pages. Now it keeps
# what was in blocks of up to 8 MB: steps on a CPU are a tenth faster, and holes no larger (see the README), unless the
# environment has settings for malloc.
own = any(name.startswith('MALLOC_') for name in os.environ)
if sys.platform == 'linux' and not own and hasattr(libc := ctypes.CDLL(None), 'mallopt'):
    libc.mallopt(-3, 2**23), libc.mallopt(-1, 2**31 - 1)        # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import config
from model import Config, Transformer, read_folder
from prepare import MODEL_FILES, NoDataset, decode, encode, hub_folder, load_tokenizer, open_data, save_tokenizer

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
        rules = {'at least 1': (lambda v: v >= 1, 'batch_size block_size log_interval eval_interval '
                                                  'checkpoint_interval max_bad_steps'),
                 'at least 0': (lambda v: v >= 0, 'global_batch_size max_steps warmup_steps eval_steps sample_interval '
                                                  'keep_checkpoints max_rollbacks grad_clip weight_decay'),
                 'above 0': (lambda v: v > 0, 'learning_rate eps'),
                 'at least 0 and at most 1': (lambda v: 0 <= v <= 1, 'min_lr_frac decay_frac'),
                 'at least 0 and below 1': (lambda v: 0 <= v < 1, 'beta1 beta2')}
        for limit, (ok, names) in rules.items():
            for name in names.split():
                if not ok(getattr(self, name)):
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

def lr_at(step, s):
    """The learning rate of step 0, 1, ..."""
    if step < s.warmup_steps:
        return s.learning_rate * (step + 1) / s.warmup_steps
    left = max(s.max_steps - s.warmup_steps, 1)
    done = min((step - s.warmup_steps) / left, 1.0)
    if s.schedule == 'cosine':
        factor = 0.5 * (1 + math.cos(math.pi * done))
    else:
        factor = min((s.max_steps - step) / max(s.decay_frac * s.max_steps, 1), 1.0)
    return s.learning_rate * (s.min_lr_frac + (1 - s.min_lr_frac) * max(factor, 0.0))

def pick_device(s, own=None):
    """settings, and the rank's own device if it has one -> torch.device, dtype of the matmuls"""
    best = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = torch.device(best if s.device == 'auto' else s.device) if own is None else own
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f'device={s.device}: not usable here ({str(e).splitlines()[0]}); --device={best} is') from e
    if s.dtype != 'auto':
        return device, getattr(torch, s.dtype)
    if device.type == 'cuda':       # older GPUs claim bfloat16 and emulate it
        return device, torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    fast = device.type == 'cpu' and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return device, torch.bfloat16 if fast else torch.float32

def check_fp8(recipe, device, dtype):
    """ValueError where the matmuls cannot be in float8"""
    if device.type != 'cuda' or torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(f'fp8={recipe}: device={device} has no FP8: it takes a GPU of compute capability 8.9 or above')
    if dtype != torch.bfloat16:
        raise ValueError(f'fp8={recipe}: what is not FP8 must be bfloat16, not dtype={str(dtype)[6:]}')
    if importlib.util.find_spec('torchao') is None:
        raise ValueError(f'fp8={recipe} needs its package: pip install torchao')

def to_fp8(model, recipe, emulate=False):
    """Linears of attention, dense and shared MLPs multiply in float8 from now on, forward and backward: those with
    widths that are multiples of 16. Weights and names stay. emulate: rounds as float8 does, on any device"""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    fits = lambda m, name: isinstance(m, torch.nn.Linear) and ('.self_attn.' in name or '.mlp.' in name) and all(
        n and n % 16 == 0 for n in m.weight.shape)
    if not any(fits(m, name) for name, m in model.named_modules()):
        raise ValueError(f'fp8={recipe}: no linear layer of this model has widths that are multiples of 16')
    options = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate, pad_inner_dim=True)  # any batch
    convert_to_float8_training(model, config=options, module_filter_fn=fits)

def matmul_rate(device, dtype):
    """FLOP/s that this device reaches in a large matrix product, measured: what MFU is a fraction of"""
    n = 8192 if device.type == 'cuda' else 1024
    a, b = torch.randn(2, n, n, generator=torch.Generator()).to(device, dtype)      # the run's own stays as it is
    times = []
    while len(times) < 8 and sum(times) < 0.5:
        t = time.perf_counter()
        (a @ b)[0, 0].item()
        times.append(time.perf_counter() - t)
    return 2 * n ** 3 / min(times)

def parameter_table(model):
    """Counts of parameters, all of them, those that one token meets, and by kind"""
    parts = {'norm': 'norms', 'self_attn': 'attention', 'experts': 'moe', 'mlp.gate.': 'moe', 'mlp.': 'mlp',
             'eh_proj': 'mtp', '': 'embedding'}             # the first one that the name contains
    table, c = dict.fromkeys(('total', 'active', *parts.values()), 0), model.config
    for name, p in model.named_parameters():
        met = c.num_experts_per_tok / c.n_routed_experts if '.experts.' in name else 1
        table[next(part for mark, part in parts.items() if mark in name)] += p.numel()
        table['total'], table['active'] = table['total'] + p.numel(), table['active'] + round(p.numel() * met)
    return table

def flops_per_token(model, T):
    """FLOPs per token of a training step at context T, attention counted as if not causal (the PaLM convention)"""
    c, table, d = model.config, parameter_table(model), model.config.head_dim
    heads = model.head.numel() * (1 + c.num_nextn_predict_layers)
    weights = table['active'] - table['norms'] - table['embedding'] + heads
    attention = {'gqa': 4 * d * T, 'mla': 2 * T * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim),
                 'linear': 2 * (min(64, T) * (2 * d + 1) + 2 * d * (d + 1))}[c.attention]   # its chunk, its state
    return 6 * weights + 3 * len(model.model.layers) * c.num_attention_heads * attention

def peak_memory(device):
    """MB that this process has needed at most, on the GPU or in RAM"""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == 'win32':
        return 0.0
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == 'darwin' else 2**10)

def plan(given, folder, data):
    """-> the Config that is asked for: the given settings, on top of those of the model in folder where there is one"""
    if folder:
        return read_folder(Path(folder), **given)[0]
    own = {'vocab_size': 256}
    if data:
        own = {'vocab_size': data.vocab_size, 'bos_token_id': data.eot_id, 'eos_token_id': data.eot_id}
    return Config(**{**own, **given})

def build_model(s, given, found, data):
    """-> the model in float32 on the CPU: that of the checkpoint found, else init_from's, else a fresh one"""
    folder = found or s.init_from and hub_folder(s.init_from, MODEL_FILES)
    config = plan(given, folder, data)
    check_sizes(s, config, data)
    torch.manual_seed(s.seed)
    if not folder:
        return Transformer(config)
    if not found:
        check_tokenizer(s, folder, data)
        theirs = read_folder(Path(folder))[0].rope_theta
        if config.rope_theta != theirs:             # as no other one that fits, it makes the weights worthless
            print(f'rope_theta={config.rope_theta:g}, but {folder} was trained with {theirs:g}', file=sys.stderr)
        return Transformer.from_pretrained(folder, **given)
    model = Transformer.from_pretrained(found)
    for name in given:
        check_same(found, name, getattr(model.config, name), getattr(config, name))
    return model

def parameter_groups(model, s):
    """Matrices decay, norms do not. rows: for Muon, the heights of the blocks of rows that are matrices of their own (a
    head's, the gate's and the up projection's), again and again; () for AdamW: embedding, head, norms, routers"""
    groups, c = {}, model.config
    dn, dr = c.qk_nope_head_dim, c.qk_rope_head_dim
    head = (dn + dr,) if c.attention == 'mla' else (c.head_dim,)
    blocks = {'q_proj': head, 'q_b_proj': head, 'k_proj': head, 'v_proj': head, 'kv_b_proj': (dn, c.v_head_dim),
              'kv_a_proj_with_mqa': (c.kv_lora_rank, dr), 'gate_up_proj': (c.moe_intermediate_size,)}
    for name, p in model.named_parameters():
        kind = name.removesuffix('.weight').split('.')[-1]
        muon = s.optimizer == 'muon' and kind.endswith(('_proj', '_mqa')) and p.numel()
        rows = blocks.get(kind, (p.shape[-2],)) if muon else ()
        groups.setdefault((rows, s.weight_decay if p.dim() > 1 else 0.0), []).append(p)
    return [{'params': found, 'weight_decay': decay, 'rows': list(rows)} for (rows, decay), found in groups.items()]

def orthogonal(x, dtype):
    """x (..., A, B) -> as float32 its U V^T, about: five steps of Newton-Schulz make all singular values 0.7 to 1.2"""
    y = x.flatten(0, -3).to(dtype)
    y = y.mT if x.shape[-2] > x.shape[-1] else y
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), y, beta=3.4445)
    return (y.mT if x.shape[-2] > x.shape[-1] else y).float().view_as(x)

class Muon(torch.optim.AdamW):
    """AdamW, but for groups with rows Nesterov's momentum made orthogonal, in steps as large as AdamW's. Jordan et al.,
    kellerjordan.github.io/posts/muon; the factor 0.2 sqrt(max(A, B)) is that of arXiv 2502.16982"""
    def __init__(self, groups, *args, dist, dtype, momentum=0.95, **kwargs):
        super().__init__(groups, *args, **kwargs)
        self.dist, self.dtype, self.momentum, self._step_supports_amp_scaling = dist, dtype, momentum, False

    @torch.no_grad()
    def step(self):
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group['rows']]
        super().step()
        self.param_groups = groups
        for group in groups:
            shapes = {}
            for p in group['params'] if group['rows'] else ():
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():        # many at a time, but not everything at once
                most = max(2**26 // shape.numel(), 1)
                for i in range(0, len(params), most):
                    self.move(params[i:i + most], group['rows'], group['lr'], group['weight_decay'])

    def move(self, params, rows, lr, decay):
        """params (A, B) or (E, A, B) each, of one shape"""
        steps = torch.stack([self.dist.whole(self.direction(p)) for p in params])
        for block in steps.unflatten(-2, (-1, sum(rows))).split(rows, -2):              # (..., A / sum(rows), row, B)
            block.copy_(orthogonal(block, self.dtype) * 0.2 * max(block.shape[-2:]) ** 0.5)
        for p, step in zip(params, steps):
            p.mul_(1 - lr * decay).add_(self.dist.part(step, p), alpha=-lr)

    def direction(self, p):
        state = self.state[p]
        if not state:               # step: AdamW looks for it when a state is loaded
            state['step'], state['momentum_buffer'] = torch.zeros(()), torch.zeros_like(p)
        state['momentum_buffer'].mul_(self.momentum).add_(p.grad)
        step = p.grad.add(state['momentum_buffer'], alpha=self.momentum)
        return step * (p.grad != 0).any(-1, True).any(-2, True) if p.dim() > 2 else step    # an idle expert stays

def make_optimizer(s, model, dtype, dist):
    kind = torch.optim.AdamW if s.optimizer == 'adamw' else functools.partial(
        Muon, dist=dist, dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    return kind(parameter_groups(model, s), s.learning_rate, (s.beta1, s.beta2), s.eps,
                fused=model.head.device.type in ('cpu', 'cuda'))

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
    if s.doc_attention_mask and data.eot_id != c.eos_token_id:
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

def to_device(arrays, device):
    tensors = (torch.from_numpy(a) for a in arrays)
    return [t.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else t.to(device) for t in tensors]

def sample_text(model, tokenizer, s, device, amp):
    """256 tokens from the model as it stands, without a trace in the run's random numbers"""
    prompt = torch.tensor([encode(tokenizer, s.sample_prompt)], device=device)
    model.eval()
    with torch.random.fork_rng(), amp():
        torch.manual_seed(s.seed)
        ids = model.generate(prompt, 256, temperature=0.8, top_k=50, stop=model.config.eos_token_id)
    model.train()
    return decode(tokenizer, ids[0].tolist())

class Log:
    """The terminal and train.log, metrics.jsonl, and Weights & Biases and TensorBoard where asked for"""
    def __init__(self, s, step, resolved):
        self.dir, self.wandb, self.tensorboard, self.metrics = Path(s.out_dir), None, None, None
        self.dir.mkdir(parents=True, exist_ok=True)
        self.rewind(step)
        self.text = open(self.dir / 'train.log', 'a')
        self.bar = tqdm(total=s.max_steps, initial=step, file=sys.stdout, disable=None, leave=False, unit='step')
        if s.wandb:
            import wandb
            self.wandb = wandb.init(project='nanoseek', name=self.dir.name, id=f'{self.dir.name}-{s.seed}',
                                    resume='allow', dir=self.dir, config=resolved)
        if s.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.tensorboard = SummaryWriter(self.dir / 'tensorboard')

    def rewind(self, step, events=False):
        """metrics.jsonl without what comes after step, which a run that goes on from there repeats; events may stay"""
        kept, path = [], self.dir / 'metrics.jsonl'
        if self.metrics:
            self.metrics.close()
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                entry = json.loads(line)
                kept += [line + '\n'] if entry['step'] <= step or events and 'event' in entry else []
            except ValueError:      # cut off when the process was killed
                pass
        tmp = path.with_name('.metrics.tmp')
        tmp.write_text(''.join(kept))
        os.replace(tmp, path)
        self.metrics = open(path, 'a')

    def say(self, line):
        self.bar.write(line, file=sys.stdout)       # above the progress bar, which only a terminal has
        sys.stdout.flush()
        self.text.write(line + '\n')
        self.text.flush()

    def add(self, **values):
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.metrics.write(json.dumps(values, allow_nan=False) + '\n')
        self.metrics.flush()
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and k != 'step'}
        if self.wandb:
            self.wandb.log(numbers, step=values['step'])
        for k, v in numbers.items() if self.tensorboard else ():
            self.tensorboard.add_scalar(k, v, values['step'])

    def close(self):
        for f in (self.bar, self.metrics, self.text, self.tensorboard):
            f and f.close()
        if self.wandb:
            self.wandb.finish()

class Silence:
    """The log of the other ranks"""
    def __getattr__(self, name):
        return self
    def __call__(self, *args, **kwargs):
        return self

class Live(TorchDispatchMode):
    """Within it, now and peak are the bytes of the tensors that exist, each storage counted once"""
    def __init__(self, *tensors):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()
        self.add(tensors)

    def add(self, tensors):
        for t in tree_leaves(tensors):
            storage = t.untyped_storage() if isinstance(t, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
                self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return tensors

    def free(self, key, size):
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.add(func(*args, **(kwargs or {})))

def memory_estimate(s, c, dtype):
    """-> bytes for weights, gradients and the optimizer's state; bytes that a step needs beside them at most. Counted,
    not guessed: a step on fake tensors, which have shapes and no storage. On a GPU the optimizer takes the place of the
    activations; a CPU's heap is full of holes by then, so that both add up."""
    add_up = pick_device(s)[0].type == 'cpu'
    rows = lambda x, weight, ends: F.linear(x, weight[0])   # as many for every expert: a grouped matmul wants numbers
    with FakeTensorMode(), patch('model.grouped_linear', rows), torch.random.fork_rng():
        model = Transformer(c).train()
        model.gradient_checkpointing = s.gradient_checkpointing
        model.doc_attention_mask = s.doc_attention_mask and c.eos_token_id is not None
        for p in model.parameters():        # those of the micro-step before
            p.grad = torch.empty_like(p)
        with Live(*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())) as live:
            optimizer = make_optimizer(s, model, dtype, OneDevice())
            optimizer.step()
            idx = torch.zeros(s.batch_size, s.block_size, dtype=torch.int64)
            states, update = live.now, live.peak - live.now
            live.peak = live.now
            with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
                loss = model(idx, idx)[1]
            loss.backward()
            activations = live.peak - states
    return states, activations + update if add_up else max(activations, update)

def memory_limit(device):
    """Bytes that this process may have on the device"""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[1]
    if sys.platform == 'win32':
        return math.inf
    import resource
    group, limit = Path('/sys/fs/cgroup/memory.max'), resource.getrlimit(resource.RLIMIT_AS)[0]
    text = group.read_text().strip() if group.exists() else ''      # a container's limit
    return min(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'), limit if limit > 0 else math.inf,
               int(text) if text.isdigit() else math.inf) - 2**29   # Python and torch themselves

def smaller(s, c, dtype, device):
    """Settings that would need less memory, and how much, by memory_estimate"""
    mb = lambda **changes: sum(memory_estimate(replace(s, **changes), c, dtype)) / 2**20
    now, have = mb(), memory_limit(device) / 2**20
    enough, found = min(0.9 * have, 0.8 * now), []
    for name, least in (('batch_size', 1), ('block_size', 1 + c.num_nextn_predict_layers)):
        sizes = [n for i in range(1, 20) if (n := getattr(s, name) >> i) >= least]
        if sizes:
            n = next((n for n in sizes if mb(**{name: n}) <= enough), sizes[-1])
            same = f' --global_batch_size={s.global_batch_size or s.batch_size}' if name == 'batch_size' else ''
            found.append(f'--{name}={n}{same} ({mb(**{name: n}):,.0f} MB)')
    if not s.gradient_checkpointing:
        found.append(f'--gradient_checkpointing=true ({mb(gradient_checkpointing=True):,.0f} MB)')
    return (f'{s.batch_size} x {s.block_size} tokens need about {now:,.0f} MB, {device} has {have:,.0f}; less: '
            + ', '.join(found or ['a smaller model']))

def architecture(c):
    """Config -> a line for people"""
    kind = {'mla': 'MLA', 'gqa': 'GQA'}.get(c.attention, f'{c.attention} attention')
    if c.n_routed_experts:
        kind += (f' + MoE ({c.n_shared_experts} shared, {c.num_experts_per_tok} of {c.n_routed_experts} routed experts '
                 f'of width {c.moe_intermediate_size})')
    mtp = f' + {c.num_nextn_predict_layers} MTP' if c.num_nextn_predict_layers else ''
    return (f'{kind}, {c.num_hidden_layers} layers{mtp}, hidden {c.hidden_size}, {c.num_attention_heads} heads, '
            f'vocabulary {c.vocab_size:,}')

def describe(s, c, estimate):
    """Lines that say what the model is, its parameters, and the memory that a training step needs"""
    with torch.device('meta'):
        model = Transformer(c)
    table, order = parameter_table(model), ('total', 'active', 'attention', 'moe', 'mlp', 'embedding', 'norms', 'mtp')
    states, activations = estimate
    yield f'{c.to_hf()["architectures"][0]}: {architecture(c)}'
    yield 'parameters: ' + ' | '.join(f'{k} {table[k]:,}' for k in order if table[k])
    yield (f'a training step: {flops_per_token(model, s.block_size) / 1e6:,.1f} MFLOP per token, about '
           f'{(states + activations) / 2**20:,.0f} MB: {states / 2**20:,.0f} for weights, gradients and '
           f'{ {"adamw": "AdamW", "muon": "Muon"}[s.optimizer]}, {activations / 2**20:,.0f} for activations of '
           f'{s.batch_size} x {s.block_size} tokens and temporaries')

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
        save_tokenizer(run.data.directory, tmp, c.bos_token_id, c.eos_token_id, c.max_position_embeddings)
        ids = {k: v for k in ('bos_token_id', 'eos_token_id') if (v := getattr(c, k)) is not None}
        texts = {'README.md': card, 'trainer/settings.json': json.dumps(settings, indent=1) + '\n',
                 'generation_config.json': json.dumps({**ids, 'do_sample': True, 'temperature': 0.8}) + '\n'}
        (tmp / 'trainer').mkdir()
        for name, text in texts.items():
            (tmp / name).write_text(text)
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
    kind, script = c.to_hf()['architectures'][0], 'python' if run.dist.world == 1 else 'torchrun'
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

def wants_compile(s, device):
    return s.compile is True or s.compile == 'auto' and device.type == 'cuda'

def compiled(model, forward, s, device, amp):
    """forward compiled where that is wanted and works, else as it is, and a line that says so"""
    if not wants_compile(s, device):
        return forward, None
    try:
        fast, idx = torch.compile(forward), torch.zeros(s.batch_size, s.block_size, dtype=torch.int64, device=device)
        with torch.random.fork_rng():
            with amp():
                loss = fast(idx, idx)[1]
            loss.backward()
        problem = None
    except Exception as e:      # no compiler, or one that cannot: whatever its layers raise
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:100]
        fast, problem = forward, f'torch.compile does not work here ({reason})'
    model.zero_grad(set_to_none=True)
    model.expert_load.zero_()
    return fast, problem

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
        folder, data = s.init_from and hub_folder(s.init_from, MODEL_FILES), None
        with suppress(NoDataset):
            data = open_data(s.dataset)
        c = plan(given, folder, data)
        print(*describe(s, c, memory_estimate(s, c, dtype)), *dist.costs(s, c, dtype), sep='\n')
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
    return SimpleNamespace(s=s, dist=dist, data=data, model=model, device=device, dtype=dtype, found=found,
                           identity=identity, batch=batch, step=0, skipped=0, rollbacks=0, bad=0, history=[], losses={},
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
    run.optimizer = make_optimizer(s, model, dtype, run.dist)
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
        (run.log.dir / 'settings.json').write_text(json.dumps(resolved, indent=1) + '\n')
    run.first, estimate = run.step, memory_estimate(s, model.config, dtype)
    for line in (*describe(s, model.config, estimate), *([f'going on from {found}'] if found else [])):
        run.log.say(line)
    if not run.dist.sharded and sum(estimate) > memory_limit(device):
        run.log.say(f'this may not fit: {smaller(s, model.config, dtype, device)}')
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

def micro_steps(run):
    """Forward and backward of a global batch -> its losses by their names, means over this rank's micro-steps"""
    s, losses = run.s, {}
    for micro in range(run.accumulation):
        x, y = to_device(run.data.batch('train', rows(run, micro), s.block_size, s.seed), run.device)
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
        group['lr'] = lr_at(run.step, s)
    if s.max_minutes is not None and time.time() - STARTED > 60 * s.max_minutes:
        run.caught.append(f'max_minutes={s.max_minutes:g}')
    scaler.unscale_(run.optimizer)
    total = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    whole = dist.whole(total).float()
    caught = whole.new_tensor(float(len(run.caught)))
    loss, stop, doubt = dist.sum(torch.stack((losses['main'] / dist.world, caught, 0 * whole))).tolist()
    norm = whole.item() + doubt     # 0, or nan where it is not finite on any rank
    run.stop = stop > 0         # for all ranks in the same step
    load = dist.sum(model.expert_load.clone())
    overflow = scaler.is_enabled() and scaler.get_scale() > 1       # float16: so it finds its scale
    good = math.isfinite(loss) and (math.isfinite(norm) or overflow)
    if good:
        if s.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), s.grad_clip, total)
        scaler.step(run.optimizer)
        if math.isfinite(norm):
            model.update_router_bias(load)
        note_spike(run, loss)
        run.bad = 0
    else:
        run.bad, where = run.bad + 1, culprit(run)
        run.log.say(f'step {run.step + 1}: loss {loss:.4g}, gradient norm {norm:.4g}: skipped; the first that is not '
                    f'finite is {where}')
        run.log.add(step=run.step + 1, event='skipped', loss=str(loss), grad_norm=str(norm), where=where)
    scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    model.expert_load.zero_()
    run.log.bar.update()
    return norm, load, good

def note_spike(run, loss):
    """A line for a loss that stands out from the last 128 by a robust z-score (median, median absolute deviation)"""
    if len(run.history) >= 32:
        median = statistics.median(run.history)
        deviation = 1.4826 * statistics.median(abs(v - median) for v in run.history)
        if (z := (loss - median) / max(deviation, 1e-3)) > 6:
            run.log.say(f'step {run.step + 1}: loss {loss:.4f} is a spike, {z:.1f} deviations above {median:.4f}')
            run.log.add(step=run.step + 1, event='spike', loss=loss, z=round(z, 2))
    run.history = [*run.history[-127:], loss]

@torch.no_grad()
def culprit(run):
    """Where what is not finite appeared first: in a parameter, in a module's output (the forward pass is repeated), or
    in a gradient (the backward pass begins at the end of the model)"""
    def finite(x):
        return all(map(finite, x)) if isinstance(x, tuple) else not isinstance(x, torch.Tensor) or x.isfinite().all()
    for name, p in run.model.named_parameters():
        if not finite(p):
            return f'the weight {name}'
    found, hooks = [], []
    for name, module in run.model.named_modules():
        watch = lambda m, _, out, name=name: None if finite(out) else found.append(name)
        hooks.append(module.register_forward_hook(watch))
    with torch.random.fork_rng(), run.amp():
        for micro in range(run.accumulation):
            run.model(*to_device(run.data.batch('train', rows(run, micro), run.s.block_size, run.s.seed), run.device))
    for hook in hooks:
        hook.remove()
    broken = [name for name, p in run.model.named_parameters() if p.grad is not None and not finite(p.grad)]
    if found:
        return f'the output of {found[0] or "the model"}'
    return f'the gradient of {broken[-1]}' if broken else 'the loss'

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
    log.rewind(run.step, events=True)
    log.bar.reset(s.max_steps)
    log.bar.update(run.step)
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
                **{'moe/load': relative(load).tolist()} if len(load) else {})
    if s.sample_interval and (run.step % s.sample_interval == 0 or last):
        log.say(f'--- sample\n{sample_text(run.model, run.tokenizer, s, run.device, run.amp)}\n---')
    if run.step % s.checkpoint_interval == 0 or last:
        save_checkpoint(run, evaluated)
    elif run.writing and run.writing.done():
        finish_writing(run)

def relative(load):
    """Expert counts (MoE layers, E) over the ideal, a layer's mean"""
    return (load / load.double().mean(-1, keepdim=True).clamp(min=1)).round(decimals=3)

def log_step(run, load, norm, ms):
    """The progress line, and its numbers in metrics.jsonl"""
    s, step, losses, tokens = run.s, run.step, run.losses, run.batch * run.s.block_size
    rate, lr = tokens / ms * 1e3, run.optimizer.param_groups[0]['lr']
    mfu, memory = rate * flops_per_token(run.model, s.block_size) / run.peak, peak_memory(run.device)
    entry = {'step': step, 'tokens': step * tokens, 'elapsed_s': round(time.time() - STARTED, 2),
             'loss': losses['main'], 'lr': lr, 'grad_norm': norm, 'step_ms': round(ms, 3), 'tok_per_s': round(rate, 1),
             'mfu': round(mfu, 4), 'memory_mb': round(memory, 1)}
    entry |= {f'{k}_loss': v for k, v in losses.items() if k != 'main'}
    if len(sources := run.data.sources) > 1:        # of their data, that of skipped steps is gone as well
        for name, count in run.data.drawn((step + run.skipped) * run.batch).items():
            entry |= {f'data/{name}/tokens': count * s.block_size,
                      f'data/{name}/epochs': round(count / sources[name][0].windows('train', s.block_size), 4)}
    experts, eta = '', (s.max_steps - step) * ms / 1e3
    if len(load):
        r = relative(load)
        entry |= {'moe/load_max': r.max().item(), 'moe/load_min': r.min().item(), 'moe/dead': (load == 0).sum().item()}
        experts = f' | load {entry["moe/load_min"]:.2f}-{entry["moe/load_max"]:.2f}'
    run.log.say(f'step {step:6d}/{s.max_steps} | loss {losses["main"]:.4f} | lr {lr:.2e} | norm {norm:.2f} | '
                f'{ms:.0f} ms | {rate / 1e3:.1f}k tok/s | mfu {mfu:.0%} | {memory:.0f} MB{experts} | '
                f'eta {eta // 3600:.0f}:{eta % 3600 // 60:02.0f}:{eta % 60:02.0f}')
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
        problem = f'out of memory: {smaller(s, c, dtype, device)}'
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
