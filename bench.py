"""Measure how fast a model trains and decodes, how much memory it needs, and against whom.

    python bench.py config/shakespeare.py                       # a model, on random tokens
    python bench.py config/shakespeare.py --vs=transformers     # beside the same weights there

It has all settings of train.py and of the model. Contenders take turns, after two rounds of
warm-up, and the tables have medians. Run nothing else meanwhile.
"""
import os
os.environ.setdefault('GOMP_SPINCOUNT', '3000')     # idle threads must not slow the busy ones

import itertools
import tempfile
import time
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Literal

import torch
import torch.nn.functional as F

import train
from model import Transformer
from nanoseek import cost, settings
from nanoseek.device import compile_model, matmul_rate, peak_memory, to_fp8, wants_compile
from nanoseek.generate import Drafts, compile_decoding
from nanoseek.optim import make_optimizer


@dataclass
class Settings(train.Settings):
    """Settings of train.py, and of bench.py (the last ones)"""
    vs: Literal['', 'transformers'] = ''  # also measure the same weights there
    rounds: int = 5                 # of each measurement
    new_tokens: int = 32            # tokens to decode
    contexts: str = '64,512,2048'   # lengths of their prompts, cut to what the model can have
    batch_sizes: str = '1,8'        # numbers of sequences to decode together


@dataclass
class Contender:
    """A model that trains or decodes beside others"""
    name: str
    flops: float = 0.0          # of a training step, per token
    step: object = None         # function that does one training step
    generate: object = None     # function: prompt (B, T), max_new_tokens -> prompt and new tokens
    drafts: Drafts = field(default_factory=Drafts)


def trainer(model, forward, optimizer, s, dist):
    """Return a function that does one step on random tokens and waits for it. forward: inputs
    (B, T), targets (B, T) -> anything, loss."""
    def step():
        size = (s.batch_size, s.block_size + 1)
        idx = torch.randint(model.config.vocab_size, size, device=dist.device)
        with dist.autocast():
            _, loss = forward(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
    return step


def adamw(model, dist):
    return torch.optim.AdamW(model.parameters(), 1e-5, fused=dist.device.type in ('cpu', 'cuda'))


def flops(c, s):
    return cost.flops_per_token(cost.on_meta(c), s.block_size)


def our_trainers(model, s, dist):
    """Yield the model with AdamW, and with the config's optimizer."""
    def contender(name, model, optimizer):
        model.gradient_checkpointing = s.gradient_checkpointing
        forward, problem = compile_model(model, model, s, dist.device, dist.dtype)
        refuse(problem)
        return Contender(name, flops(model.config, s),
                         trainer(model, forward, optimizer, s, dist))

    yield contender('nanoseek', model, adamw(model, dist))
    if s.optimizer != 'adamw':
        yield contender(f'nanoseek, {s.optimizer}', model, make_optimizer(s, model, dist.dtype))


def our_decoders(folder, s, dist):
    """Yield the model in folder: eager and, if wanted, compiled; without and with drafts."""
    kinds = [False, True] if wants_compile(s, dist.device) else [False]
    for compiled, drafting in itertools.product(kinds, [False, True]):
        model = Transformer.from_pretrained(folder, dtype=dist.dtype).to(dist.device).eval()
        if drafting and not model.can_draft:
            continue
        drafts = Drafts() if drafting else None
        if compiled:
            refuse(compile_decoding(model, drafts))
        name = f'nanoseek{", compiled" if compiled else ""}{", drafting" if drafting else ""}'
        yield Contender(name, generate=partial(model.generate, drafts=drafts),
                        drafts=drafts or Drafts())


def refuse(problem):
    if problem:                     # no row may claim to be compiled without being it
        raise ValueError(f'{problem}; try --compile=false')


def transformers(folder, c, s, dist):
    """Yield the weights in folder in transformers, with each implementation of experts there."""
    from transformers import AutoModelForCausalLM, logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for kind in ['eager', 'grouped_mm', 'batched_mm'] if c.n_routed_experts else ['eager']:
        load = partial(AutoModelForCausalLM.from_pretrained, folder, experts_implementation=kind)
        model = load(dtype=torch.float32).to(dist.device).train()
        step = trainer(model, partial(loss_there, model), adamw(model, dist), s, dist)
        if kind == 'batched_mm':            # for decoding only
            step = None
        fast = load(dtype=dist.dtype).to(dist.device).eval()
        flops_there = flops(replace(c, num_nextn_predict_layers=0), s)
        yield Contender(f'transformers, {kind}', flops_there, step,
                        partial(fast.generate, do_sample=False, eos_token_id=None))


def loss_there(model, x, y):
    logits = model(x).logits.float()
    return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten())


def measure(s, given, folder):
    """Return all measurements of a model. given: its settings; folder: for its weights."""
    dist = train.OneDevice(s)
    c = train.model_config(given, train.starting_folder(s, None), None)
    memory, _ = cost.fit(s, c, dist)
    torch.manual_seed(s.seed)
    model = Transformer(c)
    model.save_pretrained(folder)
    if s.fp8:
        to_fp8(model, s.fp8, dist.device)
    trainers = our_trainers(model.to(dist.device).train(), s, dist)
    ours = next(trainers)
    name = f'CPU with {torch.backends.cpu.get_cpu_capability()}'
    if dist.device.type == 'cuda':
        name = torch.cuda.get_device_name(dist.device)
    result = {
        'machine': f'{name}, {os.cpu_count()} cores, {dist.dtype}, torch {torch.__version__}',
        'matmul_tflops': round(matmul_rate(dist.device, dist.dtype) / 1e12, 3),
        'model': '\n'.join([*cost.describe(c, s, memory), cost.cache_line(c, dist.dtype)]),
    }
    if dist.device.type == 'cuda':
        for _ in range(3):
            ours.step()
        result['measured_mb'] = round(peak_memory(dist.device))
    contenders = [ours, *trainers, *our_decoders(folder, s, dist)]
    if s.vs:
        contenders += transformers(folder, c, s, dist)
    result['training'] = training_rows(contenders, s, result['matmul_tflops'])
    result['decoding'] = decoding_rows(contenders, s, c, dist)
    return result


def seconds(job, *args):
    start = time.perf_counter()
    job(*args)
    return time.perf_counter() - start


def in_turns(jobs, rounds):
    """Call the jobs in turns. Return for each its results, without those of two more rounds."""
    results = [[job() for job in jobs] for _ in range(rounds + 2)]
    return list(zip(*results[2:]))


def training_rows(contenders, s, matmul_tflops):
    contenders = [x for x in contenders if x.step]
    times = in_turns([partial(seconds, x.step) for x in contenders], s.rounds)
    rows = []
    for x, column in zip(contenders, times):
        rate = s.batch_size * s.block_size / median(column)
        rows.append({'training': x.name, 'ms': round(1e3 * median(column), 2),
                     'ratio': round(median(column) / median(times[0]), 3),
                     'tokens/s': round(rate, 1), 'MFLOP/token': round(x.flops / 1e6, 2),
                     'MFU': round(rate * x.flops / matmul_tflops / 1e12, 3)})
    return rows


def decoding_rows(contenders, s, c, dist):
    contenders = [x for x in contenders if x.generate]
    most = max(c.max_position_embeddings - s.new_tokens, 1)
    contexts = sorted({min(int(n), most) for n in s.contexts.split(',')})
    rows = []
    for context, batch in itertools.product(contexts, map(int, s.batch_sizes.split(','))):
        prompt = torch.randint(c.vocab_size, (batch, context), device=dist.device)
        jobs = [partial(decode, x.generate, prompt, s.new_tokens) for x in contenders]
        times = [list(map(median, zip(*column))) for column in in_turns(jobs, s.rounds)]
        for x, (first, each) in zip(contenders, times):
            rows.append({'decoding': x.name, 'context': context, 'batch': batch,
                         'first ms': round(1e3 * first, 2), 'ms': round(1e3 * each, 3),
                         'ratio': round(each / times[0][1], 3), 'tokens/s': round(batch / each, 1),
                         'accepted': round(x.drafts.share, 3)})
    return rows


def decode(generate, prompt, n):
    """Return the seconds of the first new token, and of each of the n - 1 after it."""
    def run(count):
        generate(prompt, max_new_tokens=count).tolist()     # waits for the GPU
    first = seconds(run, 1)
    return first, (seconds(run, n) - first) / max(n - 1, 1)


def main(s, given):
    with tempfile.TemporaryDirectory(prefix='nanoseek-bench-') as folder:
        result = measure(s, given, folder)
    for name, value in result.items():
        if not isinstance(value, list):
            print(f'{name}: {value}')
            continue
        print(f'\n{name:28}', *(f'{key:>11}' for key in list(value[0])[1:]))
        for row in value:
            label, *numbers = row.values()
            print(f'{label:28}', *(f'{number:11,}' for number in numbers))


if __name__ == '__main__':
    with settings.user_errors():
        main(*train.load_settings(Settings, __doc__))
