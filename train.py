"""Train a model on one device: a CPU, one GPU, or Apple's.

    python train.py config/shakespeare.py --max_steps=500
    python train.py config/smol135.py --max_steps=0     # print the model and its memory, no more
    python train.py --depth=4 --dataset=mybook          # one number sets model, batch and steps

Config files are Python and are executed; settings given later win. A run lives in out_dir:
settings.json, metrics.jsonl, train.log, and step-N/ folders, each a Hugging Face model. The same
command continues where the run stopped.
"""
import os
os.environ.setdefault('GOMP_SPINCOUNT', '3000')     # idle threads must not slow the busy ones

import math
import signal
import sys
from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from model import Config, Transformer
from nanoseek import checkpoint, cost, dial, hf, settings
from nanoseek.device import (autocast, compile_model, keep_freed_memory, matmul_rate, memory_limit,
                             pick_device, to_device, to_fp8)
from nanoseek.log import (Log, Meter, culprit, elapsed, load_entry, progress_line,
                          validation_line, versions)
from nanoseek.optim import learning_rate_at, make_optimizer, set_learning_rate, whole
from nanoseek.tokenizer import decode, encode, load_tokenizer
from nanoseek.tokens import NoDataset, describe, open_data


@dataclass
class Settings:
    """Training settings"""
    depth: int = 0                      # layers; other settings follow from it; 0: off
    tokens: int = 0                     # with depth: of the whole run; 0: compute-optimal
    out_dir: str = 'out/run'            # where the run is written
    dataset: str | dict = 'shakespeare'  # of prepare.py, or a mixture: {'a': 0.7, 'b': 0.3}
    seed: int = 1337                    # of the initial weights, the order of the data and dropout
    device: str = 'auto'                # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'bfloat16', 'float16', 'float32'] = 'auto'  # of matmuls, not of weights
    fp8: Literal['', 'tensorwise', 'rowwise'] = ''  # FP8 outside routed experts; needs torchao
    compile: Literal['auto', True, False] = 'auto'  # torch.compile; auto: on a GPU
    batch_size: int = 16                # sequences per device and micro-step; 0: as many as fit
    block_size: int = 256               # tokens per sequence
    doc_attention_mask: bool = False    # tokens attend to their own document only
    global_batch_size: int = 0          # sequences per step, over all ranks; 0: one micro-step
    max_steps: int = 1000               # steps of the whole run; 0: print the model and stop
    optimizer: Literal['adamw', 'muon'] = 'adamw'  # muon: for matrices; AdamW for everything else
    learning_rate: float = 1e-3         # its peak
    embedding_lr: float = 1.0           # embedding and head: times learning_rate
    min_lr_frac: float = 0.1            # the final learning rate, a fraction of the peak
    warmup_steps: int = 100             # steps of linear warm-up
    schedule: Literal['cosine', 'wsd'] = 'cosine'  # after warm-up; wsd: constant, then linear
    decay_frac: float = 0.2             # wsd: the last fraction of max_steps, which decays
    weight_decay: float = 0.1           # on matrices
    beta1: float = 0.9                  # AdamW's
    beta2: float = 0.95                 # AdamW's
    eps: float = 1e-8                   # AdamW's
    grad_clip: float = 1.0              # largest norm of the gradient; 0: no limit
    gradient_checkpointing: bool = False  # compute layers twice: less memory, a third slower
    log_interval: int = 10              # steps between progress lines; 0: none
    eval_interval: int = 250            # steps between evaluations; 0: none
    eval_steps: int = 0                 # micro-batches of an evaluation; 0: the whole val split
    sample_interval: int = 0            # steps between text samples; 0: none
    sample_prompt: str = '\n'           # what they begin with
    checkpoint_interval: int = 500      # steps between checkpoints; 0: only one at the end
    keep_checkpoints: int = 2           # newest ones to keep, besides the best; 0: all
    max_minutes: float | None = None    # stop after this time with a checkpoint; none: no limit
    max_bad_steps: int = 5              # non-finite steps in a row, then back to a checkpoint
    max_rollbacks: int = 3              # how often to go back before giving up
    resume: str = 'auto'                # auto: from out_dir's newest; never; or a checkpoint
    init_from: str | None = None        # weights to start from: a Hugging Face folder or Hub id
    wandb: bool = False                 # also log to Weights & Biases
    tensorboard: bool = False           # also log for TensorBoard, in out_dir/tensorboard

    def __post_init__(self):
        settings.require(self, 'block_size', self.block_size >= 1, 'at least 1')
        settings.require(self, 'tokens', not self.tokens or self.depth,
                         'used with --depth; otherwise max_steps sets the length of a run')
        settings.require(self, 'batch_size', self.batch_size or self.global_batch_size,
                         'above 0; or 0 with a global_batch_size, to take as many of its '
                         'sequences at a time as fit')


class OneDevice:
    """What the loop needs to know about distribution. train_ddp.Ranks is the same for several
    processes ("ranks") with a device each: it sums over them, or asks the first."""
    rank = 0                    # of this process
    world = 1                   # number of ranks
    sharded = False             # whether a rank has only a shard of each parameter
    shardings = [False]         # the values that sharded may have

    def __init__(self, s):
        self.device, self.dtype = pick_device(s)
        self.limit = memory_limit(self.device)      # bytes

    def autocast(self):
        return autocast(self.device, self.dtype)

    def wrap(self, model):
        return model

    def accumulate(self, last):
        """The context of a micro-step. Gradients travel between ranks in the last one only."""
        return nullcontext()

    def sum(self, x):
        return x.clone()

    def any(self, flag):
        return flag

    def first(self, function, *args):
        return function(*args)


def load_settings(settings_class, usage):
    """Return a settings_class from the command line, and the model's settings that were given.
    Both with what --depth sets."""
    given, model_given = settings.load(settings_class, Config, usage=usage)
    if model_given.get('vocab_size') == 0:          # it follows from the dataset
        del model_given['vocab_size']
    s = settings_class(**given)
    if s.depth:
        vocab_size = 256
        with suppress(NoDataset):
            vocab_size = open_data(s.dataset).vocab_size
        given, model_given = dial.turn(given, model_given, vocab_size)
        s = settings_class(**given)
    return s, model_given


def starting_folder(s, start):
    if start is None and s.init_from:
        return hf.hub_folder(checkpoint.of_run(s.init_from))
    return start


def model_config(given, folder, data):
    """The Config that is asked for: the model's in `folder`, if any, with the given settings"""
    if folder:
        c = hf.read_config(folder, **given)
    elif data is None:
        c = Config(**{'vocab_size': 256, **given})
    else:
        c = Config(**{'vocab_size': data.vocab_size, 'bos_token_id': data.eot_id, **given})
    if data is not None and data.eot_id is not None:    # the model stops where its documents end
        others = [i for i in c.stop_ids if i != data.eot_id]
        c.eos_token_id = data.eot_id
        if others:
            c.eos_token_id = [data.eot_id, *others]
    return c


def make_model(s, given, c, start, folder):
    """Return the model, on the CPU: the checkpoint's, init_from's, or a fresh one."""
    torch.manual_seed(s.seed)
    if start:
        saved = hf.read_config(start)
        asked = Config(**hf.config_fields(hf.config_json(c)))   # drops fields the kind ignores
        for name in given:
            checkpoint.check_same(start, name, getattr(saved, name), getattr(asked, name))
        return Transformer.from_pretrained(start)
    if not folder:
        return Transformer(c)
    return Transformer.from_pretrained(folder, **{**given, 'eos_token_id': c.eos_token_id})


def check(s, c, data, dist, folder):
    """Raise ValueError for settings that do not fit together. folder: init_from's, or None"""
    rows = max(s.batch_size, 1) * dist.world
    settings.require(s, 'global_batch_size', s.global_batch_size % rows == 0,
                     f'a multiple of {rows}, which is batch_size x devices')
    for split in ('train', 'val'):
        data.windows(split, s.block_size)           # raises if the split is too short
    settings.require(c, 'vocab_size', c.vocab_size >= data.vocab_size,
                     f'at least {data.vocab_size}, the vocabulary of dataset={s.dataset}, or 0 '
                     'for that')
    settings.require(s, 'block_size', s.block_size > c.num_nextn_predict_layers,
                     f'above the number of MTP layers, {c.num_nextn_predict_layers}')
    settings.require(s, 'block_size', s.block_size <= c.max_position_embeddings,
                     f'at most max_position_embeddings={c.max_position_embeddings}')
    if s.doc_attention_mask or data.pack:
        settings.require(c, 'attention', c.attention != 'linear',
                         'gqa or mla with doc_attention_mask or conversations')
        settings.require(s, 'dataset', data.eot_id is not None,
                         'one with an end-of-text token if doc_attention_mask is on: prepare it '
                         'with a tokenizer that has one, such as bpe:1024')
    if folder and (Path(folder) / 'tokenizer.json').is_file():
        vocab = load_tokenizer(data.directory).get_vocab()
        settings.require(s, 'dataset', vocab.items() <= load_tokenizer(folder).get_vocab().items(),
                         "prepared with the model's tokenizer: run prepare.py with "
                         f'--tokenizer={s.init_from}')


def micro_batches(data, s, dist, batch, step):
    """Yield this rank's share of a step of the data: x, y (batch_size, block_size) each."""
    first = step * batch + dist.rank * s.batch_size
    for start in range(first, (step + 1) * batch, dist.world * s.batch_size):
        rows = range(start, start + s.batch_size)
        yield to_device(data.batch('train', rows, s.block_size, s.seed), dist.device)


def mean_counts(model, micros, dist):
    """Return the mean number of targets in the micro-batches of a step, over all ranks: what sums
    are divided by, so that each token of the step has the same weight. See model.target_counts."""
    counts = sum(model.target_counts(y) for _, y in micros)
    return dist.sum(counts) / (len(micros) * dist.world)


@torch.no_grad()
def evaluate(model, data, s, dist):
    """Return the mean loss in nats per token on one source's val split, or on its first eval_steps
    micro-batches. Ranks share the work; their number changes nothing."""
    count = data.windows('val', s.block_size)
    if s.eval_steps:
        count = min(count, s.eval_steps * s.batch_size)
    total = torch.zeros(2, dtype=torch.float64, device=dist.device)     # tokens, their losses
    model.eval()
    for first in range(0, count, dist.world * s.batch_size):
        mine = first + dist.rank * s.batch_size
        rows = max(min(s.batch_size, count - mine), 0)
        if rows == 0:       # none left for this rank, which must compute along with the others
            mine = 0
        windows = data.eval_batch('val', mine, max(rows, 1), s.block_size)
        x, y = to_device(windows, dist.device)
        with dist.autocast():
            _, loss = model(x, y)
        tokens = (y[:rows] >= 0).sum().double()
        total += torch.stack((tokens, tokens * loss))
    model.train()
    tokens, loss = dist.sum(total).tolist()
    return loss / max(tokens, 1)


def validate(model, data, s, dist):
    """Return {name: number} for metrics.jsonl: val_loss, val_bpb in bits per byte, and for a
    mixture, whose numbers are means by share, those of each source."""
    mean = 0.0
    by_source = {}
    for name, (source, share) in data.sources.items():
        loss = evaluate(model, source, s, dist)
        mean += share * loss
        by_source[f'val_loss/{name}'] = loss
        by_source[f'val_bpb/{name}'] = loss / math.log(2) / source.bytes_per_token('val')
    results = {'val_loss': mean, 'val_bpb': mean / math.log(2) / data.bytes_per_token('val')}
    if len(data.sources) > 1:
        results.update(by_source)
    return results


def sample_text(model, data, s, dist):
    """Return a prompt and 256 generated tokens; the random state stays as it was."""
    tokenizer = load_tokenizer(data.directory)
    try:
        prompt = encode(tokenizer, s.sample_prompt)
    except ValueError:      # the dataset lacks one of its letters: take the val split's first ones
        source, _ = next(iter(data.sources.values()))
        prompt = source.splits['val'][:16].tolist()
    idx = torch.tensor([prompt], device=dist.device)
    model.eval()
    with torch.random.fork_rng(), dist.autocast():
        torch.manual_seed(s.seed)
        ids = model.generate(idx, 256, temperature=0.8, top_k=50, stop=model.config.stop_ids)
    model.train()
    return decode(tokenizer, ids[0].tolist())


def gradient_norm(model):
    """The norm of all gradients as one vector; with shards, each rank has a part"""
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def catch_signals():
    """Return a list to which the name of each signal that asks the run to stop is appended:
    Ctrl-C, kill, a lost terminal, the end of a Slurm job. A second Ctrl-C ends it at once."""
    caught = []

    def handle(number, frame):
        caught.append(signal.Signals(number).name)
        if caught.count('SIGINT') > 1:
            os._exit(130)           # a checkpoint that is half written has no name yet

    for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1'):
        number = getattr(signal, name, None)                    # Windows has the first two
        if number and signal.getsignal(number) is not signal.SIG_IGN:      # as nohup has it
            signal.signal(number, handle)
    return caught


def reason_to_stop(s, caught):
    if caught:
        return caught[0]
    if s.max_minutes is not None and elapsed() > 60 * s.max_minutes:
        return f'max_minutes={s.max_minutes:g}'
    return None


def is_due(interval, step, last):
    return interval > 0 and (step % interval == 0 or last)


def main(s, given, dist):
    """Train. given: the model's settings; dist: OneDevice or Ranks"""
    # A user's mistake ends the run here, in one line, before anything is written
    data = open_data(s.dataset)
    batch = s.global_batch_size or s.batch_size * dist.world            # sequences of a step
    identity = {'seed': s.seed, 'block_size': s.block_size, 'optimizer': s.optimizer,
                'embedding_lr': s.embedding_lr, 'batch': batch, 'data': data.fingerprint()}
    start = dist.first(checkpoint.find, s, identity)
    folder = starting_folder(s, start)
    c = model_config(given, folder, data)
    check(s, c, data, dist, folder)
    memory, memory_line = cost.fit(s, c, dist)                          # settles batch_size=0
    model = make_model(s, given, c, start, folder)

    # Model and optimizer
    model.to(dist.device).train()
    model.gradient_checkpointing = s.gradient_checkpointing
    model.doc_attention_mask = s.doc_attention_mask or data.pack > 0
    if s.fp8:
        to_fp8(model, s.fp8, dist.device)
    forward = dist.wrap(model)
    optimizer = make_optimizer(s, model, dist.dtype)
    scaler = torch.amp.GradScaler(dist.device.type, enabled=dist.dtype == torch.float16)
    run = checkpoint.Run(model, optimizer, scaler, identity, folder, data.directory)
    if start:
        run.load(start)
    if run.step >= s.max_steps:
        print(f'{start} is complete and its learning rate schedule has ended: use its '
              f'weights in a new run with --init_from={start} and another --out_dir, or start over '
              'with --resume=never')
        return

    # From here on, out_dir is this run's
    first_step = run.step + 1
    log = Log(s, run, {**asdict(s), **asdict(c), **versions()}, quiet=dist.rank > 0)
    dist.first(checkpoint.clear, s.out_dir, run.step)
    rate = matmul_rate(dist.device, dist.dtype)
    micro_steps = batch // (s.batch_size * dist.world)
    tokens = batch * s.block_size                                       # of a step
    flops = tokens * cost.flops_per_token(model, s.block_size)
    meter = Meter(tokens, flops, rate * dist.world, dist.device)
    lines = [*cost.describe(c, s, memory), memory_line]
    if start:
        lines.append(f'continuing from {start}')
        lr = learning_rate_at(run.step, s)
        if lr > 1.1 * run.lr and run.step > s.warmup_steps:
            lines.append(f'the learning rate rises from {run.lr:.1e} to {lr:.1e}, as the schedule '
                         f'now ends at step {s.max_steps}')
    log.say('\n'.join(lines))
    forward, problem = compile_model(model, forward, s, dist.device, dist.dtype)
    if problem:
        log.say(f'{problem}: going on without it')
    log.say(f'{dist.device.type} {str(dist.dtype)[6:]}, {micro_steps} x {s.batch_size} x '
            f'{s.block_size} = {tokens:,} tokens per step, {s.max_steps - run.step:,} steps; '
            f'{rate / 1e12:.2f} TFLOP/s in a matmul')
    caught = catch_signals()
    meter.start(run.step)

    while run.step < s.max_steps:
        lr = set_learning_rate(optimizer, run.step, s)

        # Forward and backward: gradients add up over micro-steps, and are means over ranks
        position = run.step + run.skipped                               # in the data
        losses = Counter()
        micros = list(micro_batches(data, s, dist, batch, position))
        counts = mean_counts(model, micros, dist)
        for micro, (x, y) in enumerate(micros, 1):
            with dist.accumulate(last=micro == micro_steps):
                with dist.autocast():
                    _, loss = forward(x, y, counts)
                scaler.scale(loss / micro_steps).backward()
            for name, value in model.losses.items():
                losses[name] += value / micro_steps
        scaler.unscale_(optimizer)

        # What all ranks must agree on
        total = gradient_norm(model)
        norm = whole(total).item()
        finite = not dist.any(not math.isfinite(norm))
        if not finite:
            norm = math.nan
        means = dist.sum(torch.stack(list(losses.values()))) / dist.world
        means = dict(zip(losses, means.tolist()))                       # {name: float}
        load = dist.sum(model.expert_load)                              # (MoE layers, E)
        reason = reason_to_stop(s, caught)
        stop = dist.any(reason is not None)

        # The step. float16 may overflow until its scale is found: the scaler skips such a step
        finding_scale = scaler.is_enabled() and scaler.get_scale() > 1
        good = math.isfinite(means['loss']) and (finite or finding_scale)
        if good:
            if s.grad_clip > 0:
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), s.grad_clip, total)
            scaler.step(optimizer)
            if finite:
                model.update_router_bias(load)
            run.bad = 0
        else:
            where = culprit(model, micro_batches(data, s, dist, batch, position), dist)
            log.say(f'step {run.step + 1}: loss {means["loss"]:.4g}, gradient norm {norm:.4g}: '
                    f'skipped; the first number that is not finite is in {where}')
            log.add(step=run.step + 1, event='skipped', where=where)
            run.bad += 1
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        model.expert_load.zero_()
        run.step += 1

        # Too many bad steps: return to a checkpoint, but continue with the next data
        if run.bad >= s.max_bad_steps:
            back = dist.first(checkpoint.newest, s.out_dir)
            if back is None or checkpoint.step_of(back) < first_step - 1:
                back = start
            if back is None or run.rollbacks == s.max_rollbacks:
                log.say(f'{run.bad} steps in a row were not finite, after {run.rollbacks} '
                        'rollbacks: stopping. Try a lower learning_rate (it is '
                        f'{s.learning_rate:g}) or more warmup_steps ({s.warmup_steps})')
                sys.exit(1)
            run.roll_back(back)
            log.rewind(run.step, keep_events=True)
            log.say(f'{s.max_bad_steps} steps in a row were not finite: back to {back}, without '
                    f'the data that led here ({run.skipped} steps)')
            log.add(step=run.step + 1, event='rollback', checkpoint=str(back),
                    skipped=run.skipped, rollbacks=run.rollbacks)
            meter.start(run.step)
            continue

        # Log, evaluate, sample, save
        last = stop or run.step == s.max_steps
        if good and (is_due(s.log_interval, run.step, last) or run.step == first_step):
            entry = {'step': run.step, 'lr': lr, 'grad_norm': norm, **means,
                     **meter.entry(run.step), **load_entry(load)}
            log.say(progress_line(entry, s.max_steps))
            log.add(**entry)
        val_loss = None
        if is_due(s.eval_interval, run.step, last):
            results = validate(model, data, s, dist)
            val_loss = results['val_loss']
            run.losses = {'training': means['loss'], 'validation': val_loss,
                          'bits per byte': results['val_bpb']}
            log.say(validation_line(run.step, results))
            log.add(step=run.step, **results)
            meter.start(run.step)
        if is_due(s.sample_interval, run.step, last):
            log.say(f'--- sample\n{sample_text(model, data, s, dist)}\n---')
            meter.start(run.step)
        if is_due(s.checkpoint_interval, run.step, last) or last:
            run.card = {'started from': s.init_from or 'random weights', 'data': describe(data),
                        'tokens seen': f'{run.step * tokens:,}'}
            log.say(checkpoint.save(run, s, load_tokenizer(data.directory), dist, val_loss))
            meter.start(run.step)
        if stop and run.step < s.max_steps:
            log.say(f'{reason or "another rank"}: stopped after step {run.step}; the same command '
                    'continues from here')
            break
    log.close()


def show(s, given):
    """Print the model and the memory that a step needs, for --max_steps=0."""
    data = None
    with suppress(NoDataset):
        data = open_data(s.dataset)
    c = model_config(given, starting_folder(s, None), data)
    dist = OneDevice(s)
    memory, memory_line = cost.fit(s, c, dist)
    lines = [*cost.describe(c, s, memory), memory_line]
    if s.depth:
        lines += dial.describe(c, s, matmul_rate(dist.device, dist.dtype))
    print(*lines, sep='\n')


OUT_OF_MEMORY = ('use a smaller --batch_size (with the same --global_batch_size), a smaller '
                 '--block_size, or --gradient_checkpointing=true')

if __name__ == '__main__':
    with settings.user_errors(OUT_OF_MEMORY):
        s, given = load_settings(Settings, __doc__)
        if s.max_steps == 0:
            show(s, given)
        else:
            keep_freed_memory()
            main(s, given, OneDevice(s))
