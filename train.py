"""Train a model on one device: a CPU, one GPU, or Apple's.

    python train.py config/shakespeare.py --max_steps=500
    python train.py config/smol135.py --max_steps=0     # the model and the memory it needs, no more
    python train.py --depth=4 --dataset=mybook          # all from one number: model, batch, steps

Config files are Python and are executed; settings given later win. The run is in out_dir:
settings.json, metrics.jsonl, train.log and step-N/ folders, each a Hugging Face model. The same
command again goes on where the run stopped.
"""
import nanoseek.tuning  # noqa: F401  # first: it acts before torch is loaded

import json
import math
import sys
import time
from collections import Counter
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Literal

import torch

import config
from model import Config, Transformer
from nanoseek import checkpoint, dial, files, folders, hf, monitor, signals
from nanoseek.card import model_card
from nanoseek.checkpoint import checkpoints, damage  # noqa: F401  # scripts import them from here
from nanoseek.checks import check_batch, check_logs, check_sizes, check_tokenizer
from nanoseek.device import (check_fp8, compiled, is_out_of_memory, matmul_rate, memory_limit,
                             pick_device, to_device, to_fp8, wants_compile)
from nanoseek.estimate import describe, flops_per_token
from nanoseek.fit import Room, Way, advice, fit
from nanoseek.optim import learning_rate_at, make_optimizer, set_learning_rate
from nanoseek.tokenizer import decode, encode, load_tokenizer
from nanoseek.tokens import NoDataset, open_data

STARTED = time.time()


@dataclass
class Settings:
    """Training settings"""
    depth: int = 0                      # the dial: model and training follow from it; 0: as given
    tokens: int = 0                     # with depth: those of the whole run; 0: compute-optimal
    out_dir: str = 'out/run'            # where the run is written
    dataset: str | dict = 'shakespeare'  # of prepare.py, or a mixture: {'a': 0.7, 'b': 0.3}
    seed: int = 1337                    # of the first weights, the order of the data and dropout
    device: str = 'auto'                # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'bfloat16', 'float16', 'float32'] = 'auto'  # of matmuls, not of weights
    fp8: Literal['', 'tensorwise', 'rowwise'] = ''  # FP8 outside routed experts; needs torchao
    compile: Literal['auto', True, False] = 'auto'  # torch.compile; auto: on a GPU
    batch_size: int = 16                # sequences per device and micro-step; 0: as many as fit
    block_size: int = 256               # tokens per sequence
    doc_attention_mask: bool = False    # tokens attend to their own document only
    global_batch_size: int = 0          # sequences per step, over all ranks; 0: one micro-step
    max_steps: int = 1000               # steps of the whole run; 0: print the model and stop
    optimizer: Literal['adamw', 'muon'] = 'adamw'  # muon: for matrices; AdamW for all else
    learning_rate: float = 1e-3         # its peak
    embedding_lr: float = 1.0           # embedding and head: times learning_rate
    min_lr_frac: float = 0.1            # where it ends, a fraction of learning_rate
    warmup_steps: int = 100             # steps of linear warm-up
    schedule: Literal['cosine', 'wsd'] = 'cosine'  # after warm-up; wsd: constant, at the end linear
    decay_frac: float = 0.2             # wsd: the last fraction of max_steps, where it falls
    weight_decay: float = 0.1           # on matrices
    beta1: float = 0.9                  # AdamW's
    beta2: float = 0.95                 # AdamW's
    eps: float = 1e-8                   # AdamW's
    grad_clip: float = 1.0              # largest norm of the gradient; 0: no limit
    gradient_checkpointing: bool = False  # layers are computed twice: less memory, a third slower
    log_interval: int = 10              # steps between progress lines
    eval_interval: int = 250            # steps between evaluations; 0: none
    eval_steps: int = 0                 # micro-batches of an evaluation; 0: the whole val split
    sample_interval: int = 0            # steps between text samples; 0: none
    sample_prompt: str = '\n'           # what they begin with
    checkpoint_interval: int = 500      # steps between checkpoints; 0: only one at the end
    keep_checkpoints: int = 2           # newest ones that stay, and the best; 0: all
    max_minutes: float | None = None    # stop after this time with a checkpoint; none: no limit
    max_bad_steps: int = 5              # non-finite steps in a row, then back to a checkpoint
    max_rollbacks: int = 3              # so often; then it stops
    resume: str = 'auto'                # auto: from out_dir's newest; never; or a checkpoint
    init_from: str | None = None        # weights to start from: a Hugging Face folder or Hub id
    wandb: bool = False                 # also log to Weights & Biases
    tensorboard: bool = False           # also log for TensorBoard, in out_dir/tensorboard

    def __post_init__(self):
        for name in ('block_size', 'log_interval', 'max_bad_steps'):
            self.require(name, getattr(self, name) >= 1, 'at least 1')
        for name in ('depth', 'tokens', 'batch_size', 'global_batch_size', 'max_steps',
                     'warmup_steps', 'eval_interval', 'eval_steps', 'sample_interval',
                     'checkpoint_interval', 'keep_checkpoints', 'max_rollbacks', 'grad_clip',
                     'weight_decay'):
            self.require(name, getattr(self, name) >= 0, 'at least 0')
        if self.tokens and not self.depth:
            raise ValueError(f'tokens={self.tokens}: is for runs with a depth; in others max_steps '
                             'says how long they are')
        for name in ('learning_rate', 'embedding_lr', 'eps'):
            self.require(name, getattr(self, name) > 0, 'above 0')
        for name in ('min_lr_frac', 'decay_frac'):
            self.require(name, 0 <= getattr(self, name) <= 1, 'at least 0 and at most 1')
        for name in ('beta1', 'beta2'):
            self.require(name, 0 <= getattr(self, name) < 1, 'at least 0 and below 1')
        if self.batch_size == 0 and self.global_batch_size == 0:
            raise ValueError('batch_size=0: as many sequences as fit, of those that '
                             'global_batch_size must say, such as --global_batch_size=32')

    def require(self, name, holds, limit):
        if not holds:
            raise ValueError(f'{name}={getattr(self, name)}: must be {limit}')


class OneDevice:
    """What the loop asks about distribution. train_ddp.py answers the same questions for many
    processes, the ranks, of one device each"""
    rank = 0            # of this process
    world = 1           # number of ranks
    device = None       # the rank's own; None: as the settings say
    sharded = False     # whether a rank has only a part of each parameter
    shardings = [False]     # what sharded may be

    def room(self, device):
        """The memory that the rank may use"""
        return Room(memory_limit(device), device)

    def wrap(self, model):
        """-> what is called in the model's place"""
        return model

    def accumulate(self, last):
        """The context of a micro-step, forward and backward: between ranks, gradients travel in the
        last one only"""
        return nullcontext()

    def sum(self, x):
        """A tensor summed over ranks"""
        return x

    def mean(self, x):
        """A number's mean over ranks; x is a tensor"""
        return x.item()

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
        """A tensor of which every rank may have only a part"""
        return x

    def part(self, x, like):
        """The part of x that this rank has of the tensor like"""
        return x


@dataclass
class Progress:
    """Where a run stands, which its checkpoints keep"""
    step: int = 0           # optimizer steps that were taken
    skipped: int = 0        # steps whose data were passed over, when the run went back
    rollbacks: int = 0      # how often it went back
    bad: int = 0            # steps in a row, the last ones, that were not finite
    history: list = field(default_factory=list)  # the last losses, for spikes
    about: dict = field(default_factory=dict)    # the last evaluation, for the model card


# --------------------------------------------------------- how the parts of a run are made


def load_settings(settings_class, usage):
    """The command line -> a settings_class, and what was given of the model's settings; both with
    what --depth says"""
    given, model = config.load(settings_class, Config, usage=usage)
    return turn_dial(settings_class, given, model)


def turn_dial(settings_class, given, model):
    """The same for what was read already"""
    asked = settings_class(**given)
    if asked.depth:
        vocab_size = 256
        with suppress(NoDataset):
            vocab_size = open_data(asked.dataset).vocab_size
        given, model = dial.turn(given, chosen(model), vocab_size, Transformer, Config)
    return settings_class(**given), model


def model_config(given, folder, data):
    """The Config that is asked for: the given settings, on top of those of the model in folder
    where there is one; data may be None"""
    if folder:
        return hf.read_config(Config, folder, **given)
    if data is None:
        return Config(**{'vocab_size': 256, **given})
    tokens = {'vocab_size': data.vocab_size, 'bos_token_id': data.eot_id,
              'eos_token_id': data.eot_id}
    return Config(**{**tokens, **given})


def build_model(s, given, c, found, data):
    """-> the model in float32 on the CPU: that of the checkpoint found, else init_from's, else a
    fresh one. c: the Config that is asked for"""
    torch.manual_seed(s.seed)
    if found:
        model = Transformer.from_pretrained(found)
        for name in given:
            checkpoint.check_same(found, name, getattr(model.config, name), getattr(c, name))
        return model
    if not s.init_from:
        return Transformer(c)
    folder = init_folder(s)
    check_tokenizer(s, folder, data)
    own = hf.read_config(Config, folder).rope_theta
    if c.rope_theta != own:     # weights are worthless with another one
        warn(f'rope_theta={c.rope_theta:g}, but {folder} was trained with {own:g}')
    return Transformer.from_pretrained(folder, **given)


def init_folder(s):
    """The setting init_from -> a folder: of a run, its newest checkpoint"""
    return folders.hub_folder(checkpoint.of_run(s.init_from), folders.MODEL_FILES)


def fit_settings(s, c, dtype, room, dist):
    """Settles batch_size=0 and parallel=auto, before any work -> what a step of one rank needs, as
    memory_estimate has it, and a line about it or None. ValueError where nothing fits"""
    way, memory, line = dist.first(partial(fit, Transformer, c, s, dtype, room, dist.shardings))
    if s.batch_size == 0:       # an evaluation's micro-batches are of global_batch_size then
        s.eval_steps *= s.global_batch_size // way.batch_size
    s.batch_size = way.batch_size
    s.gradient_checkpointing = way.twice
    dist.sharded = way.sharded
    return memory, line


def open_checked(s, dist):
    """-> the dataset. ValueError where it is damaged, or too short for block_size"""
    data = open_data(s.dataset)
    for split in ('train', 'val'):
        data.windows(split, s.block_size)
    if dist.rank == 0:
        data.check()
    return data


def settle_prompt(s, data):
    """A config's sample_prompt may be in letters that the dataset does not have: then samples begin
    as the validation split does -> a line that says so, or None. ValueError where the prompt was
    given on the command line"""
    if s.sample_interval == 0:
        return None
    tokenizer = load_tokenizer(data.directory)
    try:
        encode(tokenizer, s.sample_prompt)
        return None
    except ValueError as e:
        problem = f'sample_prompt={s.sample_prompt!r}: {e}'
    if config.on_command_line('sample_prompt'):
        raise ValueError(problem)
    source, _ = next(iter(data.sources.values()))
    ids, _ = source.eval_batch('val', 0, 1, s.block_size)
    text = decode(tokenizer, ids[0, :64].tolist())
    lines = [line for line in text.splitlines() if line.strip()]
    s.sample_prompt = '\n'
    if lines:
        s.sample_prompt = lines[0]
    return f'{problem}; samples begin with {s.sample_prompt!r}, from the validation split'


# ------------------------------------------------------------------- what the loop looks at


@torch.no_grad()
def evaluate(model, data, s, device, amp, dist):
    """-> {name: mean} over a source's val split, or its first eval_steps micro-batches: val_loss,
    the next-token loss in nats per token; val_accept, how often the first choice of an MTP layer is
    right, val_accept_2 of the second layer. The same for any number of ranks: they take turns"""
    count = data.windows('val', s.block_size)
    if s.eval_steps:
        count = min(count, s.eval_steps * s.batch_size)
    names = ['val_loss']
    for depth in range(1, model.config.num_nextn_predict_layers + 1):
        name = 'val_accept'
        if depth > 1:
            name += f'_{depth}'
        names.append(name)
    total = torch.zeros(1 + len(names), dtype=torch.float64, device=device)
    model.eval()
    for first in range(0, count, dist.world * s.batch_size):
        mine = first + dist.rank * s.batch_size
        rows = min(s.batch_size, count - mine)
        if rows > 0:
            windows = data.eval_batch('val', mine, rows, s.block_size)
        else:       # none is left for this rank, which computes with the others all the same
            windows = data.eval_batch('val', 0, 1, s.block_size)
            rows = 0
        x, y = to_device(windows, device)
        with amp():
            _, loss = model(x, y)
        means = torch.stack([torch.ones_like(loss), loss, *model.mtp_accuracy])
        total += rows * means.double()
    model.train()
    sequences, *sums = dist.sum(total).tolist()
    return {name: value / sequences for name, value in zip(names, sums)}


def validate(model, data, s, device, amp, dist):
    """-> {name: number} for metrics.jsonl: what evaluate returns, and val_bpb in bits per byte; of
    a mixture these are means by share, and every source's own follow"""
    of_sources = {name: evaluate(model, source, s, device, amp, dist)
                  for name, (source, _) in data.sources.items()}
    found = Counter()
    for name, (_, share) in data.sources.items():
        for key, mean in of_sources[name].items():
            found[key] += mean * share
    found['val_bpb'] = found['val_loss'] / math.log(2) / data.bytes_per_token('val')
    if len(of_sources) > 1:
        for name, means in of_sources.items():
            source, _ = data.sources[name]
            for key, mean in means.items():
                found[f'{key}/{name}'] = mean
            loss = means['val_loss']
            found[f'val_bpb/{name}'] = loss / math.log(2) / source.bytes_per_token('val')
    return found


def sample_text(model, tokenizer, s, device, amp):
    """256 tokens from the model as it stands, without a trace in the run's random numbers"""
    prompt = torch.tensor([encode(tokenizer, s.sample_prompt)], device=device)
    model.eval()
    with torch.random.fork_rng(), amp():
        torch.manual_seed(s.seed)
        ids = model.generate(prompt, 256, temperature=0.8, top_k=50, stop=model.config.stop_ids)
    model.train()
    return decode(tokenizer, ids[0].tolist())


def sequences_per_step(s, dist):
    """Over all ranks and micro-steps"""
    if s.global_batch_size:
        return s.global_batch_size
    return s.batch_size * dist.world


def micro_batches(data, s, dist, step, device):
    """This rank's share of a step: yields x, y (batch_size, block_size) on the device. step: of the
    data, which are ahead of the optimizer's steps where a run has passed some over"""
    batch = sequences_per_step(s, dist)
    first = step * batch + dist.rank * s.batch_size
    for start in range(first, (step + 1) * batch, dist.world * s.batch_size):
        rows = range(start, start + s.batch_size)
        yield to_device(data.batch('train', rows, s.block_size, s.seed), device)


def elapsed():
    """Seconds since the process began"""
    return round(time.time() - STARTED, 2)


def gradient_norm(model):
    """The norm of all gradients as one vector; where a rank has parts of them, a part of it"""
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def reason_to_stop(s, caught):
    """What asks for the end of the run, or None. caught: names of signals"""
    if caught:
        return caught[0]
    if s.max_minutes is not None and elapsed() > 60 * s.max_minutes:
        return f'max_minutes={s.max_minutes:g}'
    return None


def is_due(interval, step, last):
    """Whether something that comes every so many steps, and after the last one, comes now; with an
    interval of 0 it never does"""
    return interval > 0 and (step % interval == 0 or last)


# --------------------------------------------------------------------------------- the run


def train(s, dist, device, amp, data, model, forward, optimizer, scaler, progress, log, save,
          writer, found, caught, peak_flops):
    """The loop -> where the run stands at its end. amp: makes the context of a forward pass;
    forward: what is called in the model's place; save: hands a checkpoint to writer; found: the
    checkpoint that the run goes on from; caught: names of signals; peak_flops: FLOP/s of all
    devices together"""
    batch = sequences_per_step(s, dist)
    micro_steps = batch // (s.batch_size * dist.world)
    tokens = batch * s.block_size           # of a step
    flops = tokens * flops_per_token(model, s.block_size)
    tokenizer = load_tokenizer(data.directory)
    first_step = progress.step + 1
    compiles = wants_compile(s, device)     # the first step may still compile a part
    timed_from = progress.step      # ms of a step are a mean since then
    clock = time.perf_counter()
    means = {}                      # the losses of the last progress line
    pause = 0.0                     # seconds that the last checkpoint took of the loop's time
    while progress.step < s.max_steps:
        lr = learning_rate_at(progress.step, s)
        set_learning_rate(optimizer, lr)

        # Forward and backward: gradients add up over micro-steps, and are means over ranks
        position = progress.step + progress.skipped
        losses = Counter()
        for micro, (x, y) in enumerate(micro_batches(data, s, dist, position, device), 1):
            with dist.accumulate(last=micro == micro_steps):
                with amp():
                    _, loss = forward(x, y)
                scaler.scale(loss / micro_steps).backward()
            for name, value in model.losses.items():
                losses[name] += value / micro_steps
        scaler.unscale_(optimizer)

        # What all ranks must see alike, to do the same
        total = gradient_norm(model)
        norm = dist.whole(total).item()
        finite = dist.all(math.isfinite(norm))
        if not finite:
            norm = math.nan
        loss = dist.mean(losses['main'])
        load = dist.sum(model.expert_load.clone())  # (MoE layers, E)
        reason = reason_to_stop(s, caught)
        stop = dist.any(reason is not None)

        # The step. float16 may overflow until its scale is found: the scaler leaves that step out
        finding_scale = scaler.is_enabled() and scaler.get_scale() > 1
        good = math.isfinite(loss) and (finite or finding_scale)
        if good:
            if s.grad_clip > 0:
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), s.grad_clip, total)
            scaler.step(optimizer)
            if finite:
                model.update_router_bias(load)
            monitor.say_spike(log, progress.step + 1, loss, progress.history)
            progress.history = [*progress.history[-127:], loss]
            progress.bad = 0
        else:
            again = micro_batches(data, s, dist, position, device)
            where = monitor.culprit(model, again, amp)
            monitor.say_skipped(log, progress.step + 1, loss, norm, where)
            progress.bad += 1
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        model.expert_load.zero_()
        progress.step += 1
        log.advance()
        if progress.bad == s.max_bad_steps:
            say_written(log, writer, pause)
            back = last_good(s, dist, progress, log, found, first_step)
            progress = go_back(back, dist, device, model, optimizer, scaler, progress, log)
            timed_from = progress.step
            clock = time.perf_counter()
            continue

        # What is said and saved
        last = progress.step == s.max_steps or stop
        first = progress.step == first_step
        if good and (is_due(s.log_interval, progress.step, last) or first):
            ms = (time.perf_counter() - clock) * 1e3 / (progress.step - timed_from)
            means = {name: dist.mean(value) for name, value in losses.items()}
            entry = {
                'step': progress.step, 'tokens': progress.step * tokens,
                'flops': progress.step * flops, 'elapsed_s': elapsed(),
                'lr': lr, 'grad_norm': norm, **monitor.loss_entry(means),
                **monitor.speed_entry(ms, tokens, flops / peak_flops, device),
                **monitor.load_entry(load),
                **monitor.data_entry(data, s.block_size, batch * (position + 1))}
            log.say(monitor.progress_line(entry, s.max_steps, first and compiles))
            log.add(**entry)
            timed_from = progress.step
            clock = time.perf_counter()

        paused = time.perf_counter()
        val_loss = None
        if is_due(s.eval_interval, progress.step, last):
            evaluated = validate(model, data, s, device, amp, dist)
            val_loss = evaluated['val_loss']
            progress.about = {'training': means.get('main', math.nan), 'validation': val_loss,
                              'bits per byte': evaluated['val_bpb']}
            log.say(monitor.validation_line(progress.step, evaluated))
            log.add(step=progress.step, elapsed_s=elapsed(), **evaluated,
                    **monitor.all_loads(load))
        if is_due(s.sample_interval, progress.step, last):
            log.say(f'--- sample\n{sample_text(model, tokenizer, s, device, amp)}\n---')
        if is_due(s.checkpoint_interval, progress.step, last) or last:
            say_written(log, writer, pause)     # waits for the one before
            pause = save(progress, val_loss)
        elif writer.job is not None and writer.job.done():
            say_written(log, writer, pause)
        clock += time.perf_counter() - paused       # they are no part of a step
        if stop:
            break

    say_written(log, writer, pause)
    if stop:
        log.say(f'{reason or "another rank"}: stopped after step {progress.step}; the same command '
                'goes on from here')
    log.close()
    return progress


def save(s, dist, device, data, model, optimizer, scaler, identity, companions, writer, progress,
         val_loss):
    """Copies all that a checkpoint has; writer writes it in the background. val_loss: of this step,
    or None -> the seconds that it took here"""
    began = time.perf_counter()
    keep = dist.rank == 0
    if keep or dist.sharded:        # of shards, every rank gives its own
        state = checkpoint.training_state(asdict(progress), optimizer, scaler, device)
        state = checkpoint.cpu_copy(state, dist.whole, keep)
        weights = None
        if dist.sharded:
            weights = checkpoint.cpu_copy(model.state_dict(), dist.whole, keep)
    if keep:
        if val_loss is not None and not math.isfinite(val_loss):
            val_loss = None
        settings = {**asdict(s), **asdict(model.config), **identity, 'val_loss': val_loss,
                    'version': checkpoint.VERSION}
        tokens = progress.step * sequences_per_step(s, dist) * s.block_size
        card = model_card(s, model, data, progress.step, tokens, progress.about, dist.world)
        writer.start(Path(s.out_dir) / f'step-{progress.step:06d}', model,
                     model.snapshot(state=weights), state, settings, card,
                     load_tokenizer(data.directory), companions, s.keep_checkpoints,
                     data.special_in_text)
    return time.perf_counter() - began


def say_written(log, writer, pause):
    """Waits for the checkpoint that is being written, if one is. OSError where it could not be"""
    line = writer.finish()
    if line is not None:
        log.say(f'{line}; the loop paused for {pause:.2f} s')


def load(found, optimizer, scaler, device, dist):
    """A checkpoint's state but its weights -> Progress"""
    state = checkpoint.load_training_state(found, optimizer, scaler, device, dist.part)
    known = {f.name: state[f.name] for f in fields(Progress) if f.name in state}
    return Progress(**known)        # older checkpoints know less


def last_good(s, dist, progress, log, found, first_step):
    """-> the checkpoint to go back to. Ends the run where there is none, or where it went back
    often enough"""
    back = None
    if progress.rollbacks < s.max_rollbacks:
        back = dist.first(partial(checkpoint.newest, s.out_dir, log.say))
        of_this_run = back is not None and checkpoint.step_of(back) >= first_step
        if found is not None and not of_this_run:
            back = found        # which may be in another folder
            if checkpoint.damage(found) is not None:
                back = None
    if back is None:
        why = 'and no checkpoint is whole yet'
        if progress.rollbacks > 0:
            why = f'also after going back {progress.rollbacks} times'
        log.say(f'{progress.bad} steps in a row were not finite, {why}: stopping. Try a lower '
                f'learning_rate (now {s.learning_rate:g}) or a longer warmup_steps '
                f'({s.warmup_steps})')
        sys.exit(1)
    return back


def go_back(back, dist, device, model, optimizer, scaler, progress, log):
    """To a checkpoint, and on from there with the data that would have come now -> Progress"""
    weights = Transformer.from_pretrained(back).state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(dist.part(weights[name], tensor))
    new = load(back, optimizer, scaler, device, dist)
    new.skipped = progress.step + progress.skipped - new.step
    new.rollbacks = progress.rollbacks + 1
    new.bad = 0
    log.rewind(new.step, keep_events=True)
    log.say(f'{progress.bad} steps in a row were not finite: back to {back}, and on without the '
            f'data that led here ({new.skipped} steps)')
    log.add(step=new.step + 1, event='rollback', checkpoint=str(back), skipped=new.skipped,
            rollbacks=new.rollbacks)
    return new


def start(s, dist, device, dtype, data, model, found, identity, companions, about):
    """Makes what the loop works with, and starts it. found: the checkpoint that model is from;
    about: lines that say what is trained"""
    model.to(device).train()
    model.gradient_checkpointing = s.gradient_checkpointing
    model.doc_attention_mask = s.doc_attention_mask
    forward = dist.wrap(model)
    optimizer = make_optimizer(s, model, dtype, dist.whole, dist.part)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    amp = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    progress = Progress()
    if found:
        progress = load(found, optimizer, scaler, device, dist)
    if progress.step >= s.max_steps:
        if dist.rank == 0:
            print(f'{found} is complete: go on with --max_steps={progress.step + 1000}, or start '
                  'over with --resume=never')
        return

    # No mistake of the user's can stop the run any more: what it replaces goes
    dist.first(partial(checkpoint.clear, s.out_dir, found, progress.step))
    log = open_log(s, dist, progress.step, model.config)
    for line in about:
        if line is not None:
            log.say(line)
    if found:
        log.say(f'going on from {found}')
    forward, problem = compiled(model, forward, s, device, amp)
    if problem:
        log.say(f'{problem}: going on without it')
    batch = sequences_per_step(s, dist)
    rate = matmul_rate(device, dtype)
    kind = f'{device.type} {str(dtype)[6:]}'
    if s.fp8:
        kind += f', fp8 {s.fp8}'
    log.say(f'{kind}, {batch // (s.batch_size * dist.world)} x {s.batch_size} x {s.block_size} = '
            f'{batch * s.block_size:,} tokens a step, {s.max_steps - progress.step:,} steps; '
            f'a matmul reaches {rate / 1e12:.2f} TFLOP/s here')
    caught, handlers = signals.catch()
    with checkpoint.Writer() as writer:
        save_now = partial(save, s, dist, device, data, model, optimizer, scaler, identity,
                           companions, writer)
        train(s=s, dist=dist, device=device, amp=amp, data=data, model=model, forward=forward,
              optimizer=optimizer, scaler=scaler, progress=progress, log=log, save=save_now,
              writer=writer, found=found, caught=caught, peak_flops=rate * dist.world)
    signals.restore(handlers)


def less_memory(s, c, dtype, room, dist):
    """What the run needs, what there is, and settings that need less"""
    way = Way(s.batch_size, s.gradient_checkpointing, dist.sharded)
    return advice(Transformer, c, s, dtype, room, way)


def open_log(s, dist, step, c):
    """Also writes settings.json, with all that is known by now"""
    if dist.rank > 0:
        return monitor.Silence()
    about = {**asdict(s), **asdict(c), **monitor.versions()}
    log = monitor.Log(s, step, about)
    text = json.dumps(about, indent=1) + '\n'
    (Path(s.out_dir) / 'settings.json').write_text(text, encoding='utf-8')
    return log


def show_model(s, given):
    """Prints what --max_steps=0 asks for; needs no dataset. -> Config, dtype, memory_estimate's"""
    device, dtype = pick_device(s)
    folder = None
    if s.init_from:
        folder = init_folder(s)
    data = None
    with suppress(NoDataset):
        data = open_data(s.dataset)
    c = model_config(chosen(given), folder, data)
    alone = OneDevice()
    room = alone.room(device)
    try:
        memory, line = fit_settings(s, c, dtype, room, alone)
    except ValueError:          # nothing fits: then one sequence, to see how much is missing
        s.batch_size = 1
        memory, line = fit_settings(s, c, dtype, room, alone)
    print(*describe(Transformer, c, s, memory), sep='\n')
    if line is not None:
        print(line)
    if s.depth:
        print(*dial.describe(Transformer, c, s, matmul_rate(device, dtype)), sep='\n')
    if s.depth and data is not None:
        line = dial.repeats(s, data)
        if line is not None:
            print(line)
    return c, dtype, memory


def main(s, given, dist, errors=config.user_errors):
    """A run from its settings to its end. given: the model's settings; errors: makes the context in
    which a user's mistake ends the process"""
    with ExitStack() as held:
        with errors():
            check_logs(s)
            check_batch(s, dist.world)
            device, dtype = pick_device(s, dist.device)
            if s.fp8:
                check_fp8(s.fp8, device, dtype)
            data = open_checked(s, dist)
            prompt_line = settle_prompt(s, data)
            if dist.rank == 0:
                held.enter_context(files.lock(s.out_dir))
            identity = {'seed': s.seed, 'block_size': s.block_size, 'optimizer': s.optimizer,
                        'embedding_lr': s.embedding_lr,
                        'batch': sequences_per_step(s, dist), 'data': data.fingerprint()}
            find = partial(checkpoint.find, s.resume, s.out_dir, identity, warn)
            found = dist.first(find)
            folder = found
            if not found and s.init_from:
                folder = init_folder(s)
            c = model_config(chosen(given), folder, data)
            check_sizes(s, c, data)
            room = dist.room(device)
            memory, line = fit_settings(s, c, dtype, room, dist)
            model = build_model(s, chosen(given), c, found, data)
            if s.fp8:
                to_fp8(model, s.fp8)
            companions = read_companions(s, found)
            about = [*describe(Transformer, c, s, memory), line, prompt_line,
                     dial.repeats(s, data)]
        try:
            start(s, dist, device, dtype, data, model, found, identity, companions, about)
            return
        except OSError as e:        # a full disk
            problem = str(e)
            if e.filename is None and s.out_dir not in problem:
                problem = f'{s.out_dir}: {problem}'
        except (MemoryError, RuntimeError) as e:
            if not is_out_of_memory(e):
                raise
            problem = None
        if problem is None:
            del model               # with all that fills the memory
            problem = f'out of memory: {less_memory(s, c, dtype, room, dist)}'
        warn(f'{Path(sys.argv[0]).name}: {problem}')
        sys.exit(2)


def warn(line):
    print(line, file=sys.stderr)


def chosen(given):
    """The model's settings without vocab_size=0, which says no more than that it was not given"""
    return {name: value for name, value in given.items() if name != 'vocab_size' or value != 0}


def read_companions(s, found):
    """What the model that this one comes from brings beside its weights"""
    if found:
        return folders.read_companions(found)
    if s.init_from:
        return folders.read_companions(init_folder(s))
    return {}


if __name__ == '__main__':
    try:
        with config.user_errors():
            settings, model_settings = load_settings(Settings, __doc__)
            if settings.max_steps == 0:
                with config.user_errors(needs_stdout=True):
                    show_model(settings, model_settings)
                sys.exit(0)
        main(settings, model_settings, OneDevice())
    except KeyboardInterrupt:       # before the loop, which has its own way to stop
        sys.exit(130)
