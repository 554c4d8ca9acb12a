"""Train a model on one device: a CPU, one GPU, or Apple's.

    python train.py config/shakespeare.py --max_steps=500
    python train.py config/smol135.py --max_steps=0       # prints the model and the memory it needs, and stops

Config files are Python and are executed; settings given later win. The run is in out_dir: settings.json, metrics.jsonl,
train.log and step-N/ directories, each a Hugging Face model. The same command again goes on where the run stopped.
"""
import importlib.util, json, math, os, platform, shutil, signal, subprocess, sys, time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

# Idle OpenMP threads spin for long by default: with one other busy process on the machine, a training step on the CPU
# then takes ten times as long and more (see the README). Read when torch is loaded.
os.environ.setdefault('GOMP_SPINCOUNT', '1000')

import torch

import config
from model import Config, Transformer
from prepare import TokenData, decode, encode, load_tokenizer, save_tokenizer

STARTED = time.time()

@dataclass
class Settings:
    """Training settings"""
    out_dir: str = 'out/run'            # where the run is written
    dataset: str = 'shakespeare'        # a folder under data/, or a path, that prepare.py made
    seed: int = 1337                    # of the initial weights, the order of the data and dropout
    device: str = 'auto'                # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'bfloat16', 'float16', 'float32'] = 'auto'  # of the matmuls; the weights are float32
    compile: Literal['auto', True, False] = 'auto'  # torch.compile; auto: on a GPU
    batch_size: int = 16                # sequences per device and micro-step
    block_size: int = 256               # tokens per sequence
    global_batch_size: int = 0          # sequences per optimizer step over all ranks; 0: one micro-step
    max_steps: int = 1000               # optimizer steps of the whole run; 0: print the model and stop
    optimizer: Literal['adamw'] = 'adamw'  # optimizer
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
    eval_steps: int = 0                 # micro-batches of an evaluation; 0: the whole val split
    sample_interval: int = 0            # steps between text samples; 0: none
    sample_prompt: str = '\n'           # what they begin with
    checkpoint_interval: int = 500      # steps between checkpoints; there is always one at the end
    keep_checkpoints: int = 2           # the newest ones stay; 0: all
    resume: str = 'auto'                # auto: from out_dir's newest checkpoint; never: start over; or a checkpoint
    init_from: str | None = None        # start from the weights of this Hugging Face folder
    wandb: bool = False                 # also log to Weights & Biases
    tensorboard: bool = False           # also log for TensorBoard, in out_dir/tensorboard

    def __post_init__(self):
        rules = {'at least 1': (lambda v: v >= 1, 'batch_size block_size log_interval eval_interval '
                                                  'checkpoint_interval'),
                 'at least 0': (lambda v: v >= 0, 'global_batch_size max_steps warmup_steps eval_steps sample_interval '
                                                  'keep_checkpoints grad_clip weight_decay'),
                 'above 0': (lambda v: v > 0, 'learning_rate eps'),
                 'at least 0 and at most 1': (lambda v: 0 <= v <= 1, 'min_lr_frac decay_frac'),
                 'at least 0 and below 1': (lambda v: 0 <= v < 1, 'beta1 beta2')}
        for limit, (ok, names) in rules.items():
            for name in names.split():
                if not ok(getattr(self, name)):
                    raise ValueError(f'{name}={getattr(self, name)}: must be {limit}')

class OneDevice:
    """What the loop asks about distribution. train_ddp.py has another answer to the same questions."""
    rank, world = 0, 1

    def wrap(self, model):
        return model

    def accumulate(self, model, last):
        """The context of a micro-step, forward and backward: between ranks, gradients travel after the last one only"""
        return nullcontext()

    def sum(self, x):
        """x summed over ranks"""
        return x

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

def pick_device(s):
    """settings -> torch.device, dtype of the matmuls"""
    best = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = torch.device(best if s.device == 'auto' else s.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f'device={s.device}: not usable here ({str(e).splitlines()[0]}); --device={best} is') from e
    if s.dtype != 'auto':
        return device, getattr(torch, s.dtype)
    if device.type == 'cuda':       # older GPUs claim bfloat16 and emulate it
        return device, torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    fast = device.type == 'cpu' and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return device, torch.bfloat16 if fast else torch.float32

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

def peak_memory(device):
    """MB that this process has needed at most, on the GPU or in RAM"""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == 'win32':
        return 0.0
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == 'darwin' else 2**10)

def build_model(s, model_settings, data):
    """-> the model in float32 on the CPU: fresh, or from init_from"""
    torch.manual_seed(s.seed)
    if s.init_from:
        if not Path(s.init_from).is_dir():
            raise ValueError(f'init_from={s.init_from}: no such folder; download the model first')
        model = Transformer.from_pretrained(s.init_from, **model_settings)
    else:
        model = Transformer(Config(**{'eos_token_id': data.eot_id, **model_settings,
                                      'vocab_size': model_settings.get('vocab_size') or data.vocab_size}))
    check_sizes(s, model.config, data)
    return model

def parameter_groups(model, weight_decay):
    """For AdamW: matrices decay, norms do not"""
    matrices, others = ([p for p in model.parameters() if (p.dim() > 1) == flag] for flag in (True, False))
    return [{'params': matrices, 'weight_decay': weight_decay}, {'params': others, 'weight_decay': 0.0}]

def check_sizes(s, c, data):
    if data.vocab_size > c.vocab_size:
        raise ValueError(f'the vocabulary of dataset={s.dataset} has {data.vocab_size:,} tokens, the model only '
                         f'vocab_size={c.vocab_size:,}: raise it, or set it to 0 to take the dataset\'s')
    if s.block_size <= c.num_nextn_predict_layers:
        raise ValueError(f'block_size={s.block_size}: must be above the MTP depth, {c.num_nextn_predict_layers}')
    if s.block_size > c.max_position_embeddings:
        raise ValueError(f'block_size={s.block_size} is above max_position_embeddings={c.max_position_embeddings}: '
                         'lower the one or raise the other')

@torch.no_grad()
def evaluate(model, data, s, device, amp, dist):
    """Mean next-token loss over the val split, or its first eval_steps micro-batches, in nats per token"""
    count = data.windows('val', s.block_size)
    if s.eval_steps:
        count = min(count, s.eval_steps * s.batch_size * dist.world)
    total = torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    for first in range(dist.rank * s.batch_size, count, dist.world * s.batch_size):
        x, y = to_device(data.eval_batch('val', first, min(s.batch_size, count - first), s.block_size), device)
        with amp():
            _, loss = model(x, y)
        total += torch.stack((loss.double() * len(x), loss.new_tensor(len(x)).double()))
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
        self.dir, self.wandb, self.tensorboard = Path(s.out_dir), None, None
        self.dir.mkdir(parents=True, exist_ok=True)
        metrics = self.dir / 'metrics.jsonl'
        if metrics.exists():    # a resumed run repeats no step
            lines = [line for line in metrics.read_text().splitlines() if line.endswith('}')]
            metrics.write_text(''.join(line + '\n' for line in lines if json.loads(line)['step'] <= step))
        self.metrics, self.text = open(metrics, 'a'), open(self.dir / 'train.log', 'a')
        if s.wandb:
            import wandb
            self.wandb = wandb.init(project='nanoseek', name=self.dir.name, id=f'{self.dir.name}-{s.seed}',
                                    resume='allow', dir=self.dir, config=resolved)
        if s.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.tensorboard = SummaryWriter(self.dir / 'tensorboard')

    def say(self, line):
        print(line, flush=True)
        self.text.write(line + '\n')
        self.text.flush()

    def add(self, **values):
        self.metrics.write(json.dumps(values) + '\n')
        self.metrics.flush()
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and k != 'step'}
        if self.wandb:
            self.wandb.log(numbers, step=values['step'])
        for k, v in numbers.items() if self.tensorboard else ():
            self.tensorboard.add_scalar(k, v, values['step'])

    def close(self):
        for f in (self.metrics, self.text, self.tensorboard):
            f and f.close()
        if self.wandb:
            self.wandb.finish()

def memory_estimate(s, c, dtype):
    """-> bytes for weights, gradients and AdamW's moments (float32); bytes for what a micro-step keeps for its backward
    pass. Counted, not guessed: a forward pass on fake tensors, which have shapes and no storage."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    kept, B, T = {}, s.batch_size, s.block_size
    with FakeTensorMode():
        model = Transformer(c).train()
        model.gradient_checkpointing = s.gradient_checkpointing
        own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

        def keep(t):
            if (storage := t.untyped_storage())._cdata not in own:
                kept[storage._cdata] = storage
            return t
        idx = torch.zeros(B, T, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast('cpu', torch.bfloat16):
            model(idx, idx)
        activations = sum(storage.nbytes() for storage in kept.values()) * (2 if dtype == torch.float32 else 1)
        activations += len(model.model.layers) * B * T * c.hidden_size * 4 * s.gradient_checkpointing
        logits = min(B * T, max(2**26 // c.vocab_size, 256)) * c.vocab_size * 8     # a chunk's, and their gradient
        return 16 * sum(p.numel() for p in model.parameters()), activations + logits

def describe(s, c, dtype):
    """Lines that say what the model is, its parameters, and the memory that a training step needs"""
    with torch.device('meta'):
        model = Transformer(c)
    table, order = model.parameter_table(), ('total', 'active', 'attention', 'moe', 'mlp', 'embedding', 'norms', 'mtp')
    states, activations = memory_estimate(s, c, dtype)
    kind = {'mla': 'MLA', 'gqa': 'GQA'}.get(c.attention, f'{c.attention} attention')
    if c.n_routed_experts:
        kind += (f' + MoE ({c.n_shared_experts} shared, {c.num_experts_per_tok} of {c.n_routed_experts} routed experts '
                 f'of width {c.moe_intermediate_size})')
    yield (f'{c.to_hf()["architectures"][0]}: {kind}, {c.num_hidden_layers} layers'
           f'{f" + {c.num_nextn_predict_layers} MTP" if c.num_nextn_predict_layers else ""}, hidden {c.hidden_size}, '
           f'{c.num_attention_heads} heads, vocabulary {c.vocab_size:,}')
    yield 'parameters: ' + ' | '.join(f'{k} {table[k]:,}' for k in order if table[k])
    yield (f'a training step: {model.flops_per_token(s.block_size) / 1e6:,.1f} MFLOP per token, about '
           f'{(states + activations) / 2**20:,.0f} MB: {states / 2**20:,.0f} for weights, gradients and AdamW, '
           f'{activations / 2**20:,.0f} for {s.batch_size} x {s.block_size} tokens of activations')

# ------------------------------------------------------------------------------------------------------- checkpoints

def checkpoints(out_dir):
    """The complete checkpoints of a run, oldest first"""
    found = [p for p in Path(out_dir).glob('step-*') if p.name[5:].isdigit() and (p / 'trainer' / 'state.pt').is_file()]
    return sorted(found, key=lambda p: int(p.name[5:]))

def save_checkpoint(s, model, optimizer, scaler, step, data, about):
    """out_dir/step-N: a Hugging Face model and in trainer/ what only training needs. Complete before it has its name"""
    final = Path(s.out_dir) / f'step-{step:06d}'
    tmp = final.with_name(f'.{final.name}.tmp')
    shutil.rmtree(tmp, ignore_errors=True)
    model.save_pretrained(tmp)
    save_tokenizer(data.directory, tmp, model.config.eos_token_id, model.config.max_position_embeddings)
    ids = {k: v for k in ('bos_token_id', 'eos_token_id') if (v := getattr(model.config, k)) is not None}
    (tmp / 'generation_config.json').write_text(json.dumps({**ids, 'do_sample': True, 'temperature': 0.8}) + '\n')
    (tmp / 'README.md').write_text(model_card(s, model, step, data, about))
    (tmp / 'trainer').mkdir()
    rng = {'cpu': torch.get_rng_state(), **({'cuda': torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})}
    state = {'version': 1, 'step': step, 'optimizer': optimizer.state_dict(), 'scaler': scaler.state_dict(), 'rng': rng}
    torch.save(state, tmp / 'trainer' / 'state.pt')
    (tmp / 'trainer' / 'settings.json').write_text(json.dumps({**asdict(s), **asdict(model.config)}, indent=1) + '\n')
    shutil.rmtree(final, ignore_errors=True)
    os.replace(tmp, final)
    for old in checkpoints(s.out_dir)[:-s.keep_checkpoints or None] if s.keep_checkpoints else ():
        shutil.rmtree(old)
    return final

def model_card(s, model, step, data, about):
    kind = model.config.to_hf()['architectures'][0]
    table = model.parameter_table()
    tokens = step * (s.global_batch_size or s.batch_size) * s.block_size
    return f"""---
library_name: {'nanoseek' if kind.startswith('nanoseek') else 'transformers'}
pipeline_tag: text-generation
tags: [nanoseek]
---
# {Path(s.out_dir).name}, step {step:,}

{kind}, {table['total']:,} parameters, {table['active']:,} active per token, trained with nanoseek.

- data: {data.meta['source']['name']} ({data.meta['source']['license']}), tokenizer {data.meta['tokenizer']['name']}
- tokens seen: {tokens:,}
- losses: {', '.join(f'{k} {v:.4f}' for k, v in about.items()) or 'not evaluated yet'}
- command: `python {' '.join(sys.argv)}`
"""

def load_trainer(directory, optimizer, scaler):
    """Puts optimizer, scaler and random numbers back -> step"""
    state = torch.load(directory / 'trainer' / 'state.pt', map_location='cpu', weights_only=True)
    optimizer.load_state_dict(state['optimizer'])
    scaler.load_state_dict(state['scaler'])
    torch.set_rng_state(state['rng']['cpu'])
    if torch.cuda.is_available() and 'cuda' in state['rng']:
        torch.cuda.set_rng_state(state['rng']['cuda'])
    return state['step']

def find_resume(s):
    """settings -> the checkpoint to go on from, or None"""
    if s.resume == 'never':
        for old in checkpoints(s.out_dir):
            shutil.rmtree(old)
        (Path(s.out_dir) / 'metrics.jsonl').unlink(missing_ok=True)
        return None
    if s.resume == 'auto':
        return next(reversed(checkpoints(s.out_dir)), None)
    if not (Path(s.resume) / 'trainer' / 'state.pt').is_file():
        raise ValueError(f'resume={s.resume}: no such checkpoint (a step-N folder with trainer/state.pt in it)')
    return Path(s.resume)

# ----------------------------------------------------------------------------------------------------------- the run

def compiled(model, forward, s, device, amp):
    """forward compiled where that is wanted and works, else as it is, and a line that says so"""
    if s.compile is False or s.compile == 'auto' and device.type != 'cuda':
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
        fast, problem = forward, f'torch.compile does not work here ({reason}): going on without it'
    model.zero_grad(set_to_none=True)
    model.expert_load.zero_()
    return fast, problem

def catch_signals():
    """-> a list that is empty until the first Ctrl-C or SIGTERM; a second Ctrl-C ends at once"""
    caught = []

    def handle(number, frame):
        caught.append(signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.default_int_handler)
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
    """Everything that a user's mistake can stop -> data, model, device, dtype, the checkpoint to go on from"""
    for package in ('wandb', 'tensorboard'):
        if getattr(s, package) and importlib.util.find_spec(package) is None:
            raise ValueError(f'{package}=true needs its package: pip install {package}')
    if Path(s.out_dir).exists() and not Path(s.out_dir).is_dir():
        raise ValueError(f'out_dir={s.out_dir}: a file has this name')
    device, dtype = pick_device(s)
    path = Path(s.dataset) if Path(s.dataset, 'meta.json').is_file() else Path('data', s.dataset)
    if s.max_steps == 0:
        ready = (path / 'meta.json').is_file()
        vocab_size = model_settings.get('vocab_size') or (TokenData(path).vocab_size if ready else 256)
        print(*describe(s, Config(**{**model_settings, 'vocab_size': vocab_size}), dtype), sep='\n')
        sys.exit(0)
    data = TokenData(path)
    for split in ('train', 'val'):
        data.windows(split, s.block_size)
    if s.global_batch_size % (s.batch_size * dist.world):
        raise ValueError(f'global_batch_size={s.global_batch_size}: must be a multiple of batch_size={s.batch_size} '
                         f'x {dist.world} {"device" if dist.world == 1 else "devices"}')
    if s.sample_interval:
        encode(load_tokenizer(path), s.sample_prompt)
    model, found = build_model(s, model_settings, data), find_resume(s)
    if found:
        saved = Transformer.from_pretrained(found)
        for name, value in asdict(saved.config).items():
            if name in model_settings and value != getattr(model.config, name):
                raise ValueError(f'{found} was trained with {name}={value}, now it is {getattr(model.config, name)}: '
                                 'go back, take another out_dir, or start over with --resume=never')
        model = saved
    return data, model, device, dtype, found

def start(s, model_settings, dist):
    """-> the run: all that the loop works with; None where the run is complete"""
    with config.user_errors():
        data, model, device, dtype, found = setup(s, model_settings, dist)
    model.to(device).train()
    model.gradient_checkpointing = s.gradient_checkpointing
    amp = lambda: torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    optimizer = torch.optim.AdamW(parameter_groups(model, s.weight_decay), s.learning_rate, (s.beta1, s.beta2), s.eps,
                                  fused=device.type in ('cpu', 'cuda'))
    first = load_trainer(found, optimizer, scaler) if found else 0
    resolved = {**asdict(s), **asdict(model.config), **versions()}
    with config.user_errors():
        log = Log(s, first, resolved)
    if first >= s.max_steps:
        log.say(f'{found} is complete: go on with --max_steps={first + 1000}, or start over with --resume=never')
        return None
    (log.dir / 'settings.json').write_text(json.dumps(resolved, indent=1) + '\n')
    for line in (*describe(s, model.config, dtype), *([f'going on from {found}'] if found else [])):
        log.say(line)
    forward, problem = compiled(model, dist.wrap(model), s, device, amp)
    if problem:
        log.say(problem)
    peak, batch = matmul_rate(device, dtype), s.global_batch_size or s.batch_size * dist.world
    accumulation = batch // (s.batch_size * dist.world)
    log.say(f'{device.type} {str(dtype)[6:]}, {accumulation} x {s.batch_size} x {s.block_size} = '
            f'{batch * s.block_size:,} tokens a step, {s.max_steps - first:,} steps; '
            f'a matmul reaches {peak / 1e12:.2f} TFLOP/s here')
    return SimpleNamespace(s=s, dist=dist, data=data, model=model, forward=forward, device=device, amp=amp,
                           scaler=scaler, optimizer=optimizer, first=first, log=log, peak=peak * dist.world,
                           batch=batch, accumulation=accumulation, tokenizer=load_tokenizer(data.directory),
                           losses={}, about={})

def train(s, model_settings, dist):
    run = start(s, model_settings, dist)
    if run is None:
        return
    model, optimizer, scaler = run.model, run.optimizer, run.scaler
    caught, clock, since = catch_signals(), time.perf_counter(), run.first
    for step in range(run.first, s.max_steps):
        for group in optimizer.param_groups:
            group['lr'] = lr_at(step, s)
        losses = {}
        for micro in range(run.accumulation):
            row = step * run.batch + (micro * dist.world + dist.rank) * s.batch_size
            x, y = to_device(run.data.batch('train', range(row, row + s.batch_size), s.block_size, s.seed), run.device)
            with dist.accumulate(model, last=micro == run.accumulation - 1):
                with run.amp():
                    _, loss = run.forward(x, y)
                scaler.scale(loss / run.accumulation).backward()
            losses = {k: losses.get(k, 0) + v / run.accumulation for k, v in model.losses.items()}
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        load = dist.sum(model.expert_load)          # (MoE layers, E): tokens per expert in the whole global batch
        model.update_router_bias(load)
        done, last = step + 1, step + 1 == s.max_steps or bool(caught)
        if done % s.log_interval == 0 or done == run.first + 1 or last:
            run.losses = {k: (dist.sum(v) / dist.world).item() for k, v in losses.items()}
            ms = (time.perf_counter() - clock) * 1e3 / (done - since)
            log_step(run, done, load, norm.item(), ms)
            clock, since = time.perf_counter(), done
        pause = time.perf_counter()
        look(run, done, load, last)
        model.expert_load.zero_()
        clock += time.perf_counter() - pause        # step_ms is of steps alone
        if caught:
            run.log.say(f'{caught[0]}: stopped after step {done}; the same command goes on from here')
            break
    run.log.close()

def look(run, step, load, last):
    """Evaluation, text samples and checkpoints, each at its interval and at the end"""
    s, log = run.s, run.log
    if step % s.eval_interval == 0 or last:
        val = evaluate(run.model, run.data, s, run.device, run.amp, run.dist)
        bpb = val / math.log(2) / run.data.bytes_per_token('val')
        run.about = {'training': run.losses['main'], 'validation': val, 'bits per byte': bpb}
        log.say(f'step {step:6d} | validation loss {val:.4f} | {bpb:.4f} bits per byte')
        log.add(step=step, elapsed_s=round(time.time() - STARTED, 2), val_loss=val, val_bpb=bpb,
                **{'moe/load': relative(load).tolist()} if len(load) else {})
    if s.sample_interval and (step % s.sample_interval == 0 or last):
        log.say(f'--- sample\n{sample_text(run.model, run.tokenizer, s, run.device, run.amp)}\n---')
    if step % s.checkpoint_interval == 0 or last:
        log.say(f'saved {save_checkpoint(s, run.model, run.optimizer, run.scaler, step, run.data, run.about)}')

def relative(load):
    """Expert counts (MoE layers, E) over the ideal, a layer's mean"""
    return (load / load.double().mean(-1, keepdim=True).clamp(min=1)).round(decimals=3)

def log_step(run, step, load, norm, ms):
    """The progress line, and its numbers in metrics.jsonl. A loss that is not finite ends the run"""
    s, losses, tokens = run.s, run.losses, run.batch * run.s.block_size
    rate, lr = tokens / ms * 1e3, run.optimizer.param_groups[0]['lr']
    mfu, memory = rate * run.model.flops_per_token(s.block_size) / run.peak, peak_memory(run.device)
    entry = {'step': step, 'tokens': step * tokens, 'elapsed_s': round(time.time() - STARTED, 2),
             'loss': losses['main'], 'lr': lr, 'grad_norm': norm, 'step_ms': round(ms, 3), 'tok_per_s': round(rate, 1),
             'mfu': round(mfu, 4), 'memory_mb': round(memory, 1)}
    entry |= {f'{k}_loss': v for k, v in losses.items() if k != 'main'}
    experts, eta = '', (s.max_steps - step) * ms / 1e3
    if len(load):
        r = relative(load)
        entry |= {'moe/load_max': r.max().item(), 'moe/load_min': r.min().item(), 'moe/dead': (load == 0).sum().item()}
        experts = f' | load {entry["moe/load_min"]:.2f}-{entry["moe/load_max"]:.2f}'
    run.log.say(f'step {step:6d}/{s.max_steps} | loss {losses["main"]:.4f} | lr {lr:.2e} | norm {norm:.2f} | '
                f'{ms:.0f} ms | {rate / 1e3:.1f}k tok/s | mfu {mfu:.0%} | {memory:.0f} MB{experts} | '
                f'eta {eta // 3600:.0f}:{eta % 3600 // 60:02.0f}:{eta % 60:02.0f}')
    run.log.add(**entry)
    if not math.isfinite(losses['main']):
        run.log.say(f'the loss is {losses["main"]}: stopping; the last good checkpoint stays. Try a lower '
                    f'learning_rate (now {s.learning_rate:g}) or a longer warmup_steps ({s.warmup_steps})')
        sys.exit(1)

if __name__ == '__main__':
    with config.user_errors():
        given, model_settings = config.load(Settings, Config, usage=__doc__)
        settings = Settings(**given)
    train(settings, model_settings, OneDevice())
