"""How fast, how much memory, against whom.

    python bench.py config/shakespeare.py                       # a model, on random tokens
    python bench.py config/shakespeare.py --vs=transformers     # beside the same weights there
    python bench.py config/shakespeare.py --vs=../nanoGPT       # beside a GPT of its size there
    python bench.py --corpus_mb=2000                            # prepare.py, on made-up text
    python bench.py --gpu --out=docs/gpu-h100.md                # all that a GPU has to show

Everything is measured in turn, after a warm-up. What is printed are medians and ratios. Run
nothing else meanwhile.
"""
import nanoseek.tuning  # noqa: F401  # first: it acts before torch is loaded

import contextlib
import importlib.util
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import config
import train
from model import (ATTENTION, MLP, MTP, Cache, Config, Embedding, Experts, MoE, RMSNorm, Router,
                   Transformer)
from nanoseek import folders, gpu, tokens
from nanoseek.device import (check_fp8, compiled, matmul_rate, peak_memory, pick_device, to_device,
                             to_fp8, wants_compile)
from nanoseek.estimate import (architecture, cache_rows, flops_per_token, memory_estimate,
                               parameter_table)
from nanoseek.ops import decoding_kernels
from nanoseek.optim import make_optimizer
from nanoseek.parts import (ATTEND, DATA, DENSE, EXPERTS, HEAD, OPTIMIZER, ORDER, REST, ROUTER,
                            Parts)
from nanoseek.proofs import Proofs
from nanoseek.speculate import Drafts
from nanoseek.tokenizer import load_tokenizer
from sample import compile_decoding

HERE = Path(__file__).resolve().parent
KINDS = {**dict.fromkeys(ATTENTION.values(), ATTEND), MLP: DENSE, RMSNorm: REST, Embedding: REST,
         MoE: ROUTER, Router: ROUTER, Experts: EXPERTS}         # parts of a step


@dataclass
class Settings:
    """Settings of bench.py"""
    vs: str = ''                    # also measure there: transformers, or the path of nanoGPT
    memory: bool = True             # also measure a step's memory, in a process of its own
    rounds: int = 5                 # of each measurement
    new_tokens: int = 32            # that are decoded
    contexts: str = '64,512,2048'   # numbers of tokens before them, at most what the model can have
    batch_sizes: str = '1,8'        # numbers of sequences that are decoded together
    json: bool = False              # print one JSON object in the place of tables
    gpu: bool = False               # all that a GPU has to show, as a table, by many commands
    out: str = 'docs/gpu.md'        # gpu: the file of that table
    minutes: float = 9.0            # gpu: it ends by then
    parts: str = ''                 # gpu: only these of its parts, such as proofs,fp8
    small: bool = False             # gpu: in miniature; always so without a GPU
    text: str = ''                  # gpu: tinyshakespeare's; if empty the project's own text
    weights: str = ''               # gpu: SmolLM2-135M's folder, to be converted and healed
    only: Literal['', 'proofs', 'profile', 'memory', 'decoding'] = ''  # only this, as JSON
    corpus_mb: int = 0              # not a model, but prepare.py, on so many megabytes of text
    tokenizer: str = 'gpt2'         # what prepare.py gets as --tokenizer
    work_dir: str = ''              # for its files; if empty a temporary folder, removed at the end

    def __post_init__(self):
        if self.vs not in ('', 'transformers') and not Path(self.vs, 'model.py').is_file():
            raise ValueError(f"vs={self.vs}: neither transformers nor a folder with nanoGPT's "
                             'model.py')
        for name, least in (('rounds', 1), ('new_tokens', 2)):
            if getattr(self, name) < least:
                raise ValueError(f'{name}={getattr(self, name)}: must be at least {least}')
        for name in ('contexts', 'batch_sizes'):
            if not re.fullmatch(r'[1-9]\d*(,[1-9]\d*)*', getattr(self, name)):
                raise ValueError(f'{name}={getattr(self, name)}: wanted numbers such as 1,8')

    def numbers(self, name):
        return [int(n) for n in getattr(self, name).split(',')]


# ------------------------------------------------------------------------- machine, clock


def machine(device, dtype):
    """What was measured on, and its ceilings: FLOP/s of a large matmul, bytes/s of a large copy"""
    name = platform.processor()
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    elif sys.platform == 'linux':
        text = Path('/proc/cpuinfo').read_text(encoding='utf-8')
        found = re.search(r'model name\s*: (.*)', text)
        if found:
            name = found[1]
    return {
        'device': device.type,
        'name': name,
        'cores': os.cpu_count(),
        'torch': torch.__version__,
        'dtype': str(dtype).removeprefix('torch.'),
        'matmul_flops': matmul_rate(device, dtype),
        'copy_bytes': copy_rate(device),
    }


def copy_rate(device):
    """Bytes/s of a large copy, each byte counted twice, as it is read and written"""
    size = 2**28
    if device.type == 'cuda':
        size = 2**30
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source).copy_(source)

    def copy():
        target.copy_(source)
        target[0].item()            # waits for it
    return 2 * size / min(seconds(copy) for _ in range(5))


def seconds(job):
    began = time.perf_counter()
    job()
    return time.perf_counter() - began


def measured(jobs, rounds):
    """{name: function -> list of numbers} -> {name: for each number all that were found}. The jobs
    take turns, and the first two rounds, which warm up, do not count"""
    found = {name: [] for name in jobs}
    for number in range(rounds + 2):
        for name, job in jobs.items():
            numbers = job()
            if number >= 2:
                found[name].append(numbers)
    return {name: list(zip(*rows)) for name, rows in found.items()}


def medians(jobs, rounds):
    """As measured, but of each number the median"""
    middles = {}
    for name, columns in measured(jobs, rounds).items():
        middles[name] = [statistics.median(column) for column in columns]
    return middles


# ------------------------------------------------------------------------------- training


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def adamw(model, device):
    return torch.optim.AdamW(model.parameters(), 1e-5, fused=device.type in ('cpu', 'cuda'))


def nothing(part=None):
    """In the place of what marks a part of a step, or fetches its data"""


def trainer(model, loss_of, vocab_size, t, device, dtype, optimizer, mark=nothing, fetch=nothing):
    """-> a function that takes an optimizer step on random tokens, and waits until it is done.
    loss_of: inputs and targets (B, T) -> the loss; t: the settings of train.py"""
    def step():
        mark(DATA)
        fetch()
        mark(REST)
        size = (t.batch_size, t.block_size + 1)
        idx = torch.randint(0, vocab_size, size, device=device)
        with autocast(device, dtype):
            loss = loss_of(idx[:, :-1], idx[:, 1:])
        mark(HEAD)
        loss.backward()
        mark(OPTIMIZER)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mark(None)
        loss.item()
    return step


def plain_loss(model):
    """-> the loss of one of our models, without torch.compile"""
    def loss_of(x, y):
        _, loss = model(x, y)
        return loss
    return loss_of


def own_loss(model, t, device, dtype):
    """-> the loss of one of our models as train.py computes it"""
    model.gradient_checkpointing = t.gradient_checkpointing
    model.doc_attention_mask = t.doc_attention_mask
    forward, problem = compiled(model, model, t, device, partial(autocast, device, dtype))
    if problem:             # going on would measure something else than what the table says
        raise ValueError(f'compile={t.compile}: {problem}: take --compile=false')
    return plain_loss(forward)


def dense(c):
    """The Config without experts and with the same FLOPs in the MLPs of all layers together"""
    active = c.moe_intermediate_size * (c.num_experts_per_tok + c.n_shared_experts)
    layers = c.num_hidden_layers + c.num_nextn_predict_layers
    leading = min(c.first_k_dense_replace, layers)
    width = (leading * c.intermediate_size + (layers - leading) * active) / layers
    return replace(c, n_routed_experts=0, first_k_dense_replace=0, intermediate_size=round(width))


def parts_of_step(s, t, model, device, dtype):
    """-> the parts of a step by the config's optimizer, without torch.compile; the time of such a
    step without marks; where its data are from. A batch is fetched where the dataset is prepared,
    but the step trains on random tokens"""
    fetch = nothing
    source = 'random tokens'
    with contextlib.suppress(tokens.NoDataset):
        fetch = fetcher(t, tokens.open_data(t.dataset), device)
        source = t.dataset
        if isinstance(source, dict):
            source = ' + '.join(source)
    parts = Parts(model, device, KINDS)
    optimizer = make_optimizer(t, model, dtype)
    step = partial(trainer, model, plain_loss(model), model.config.vocab_size, t, device, dtype,
                   optimizer, fetch=fetch)
    marked = step(mark=parts.mark)
    unmarked = step()
    first = parts.times(marked)
    names = [part for part in ORDER if part in first]

    def times_of_parts():
        found = parts.times(marked)
        return [found[name] for name in names]

    def time_of_step():
        return [seconds(unmarked)]
    times = medians({'parts': times_of_parts, 'step': time_of_step}, s.rounds)
    whole, = times['step']
    rows = [{'part': name, 'ms': 1e3 * spent} for name, spent in zip(names, times['parts'])]
    return {'parts': rows, 'step_of_parts_ms': 1e3 * whole, 'data': source}


def fetcher(t, data, device):
    """-> a function that fetches one batch after the other, and drops it"""
    starts = itertools.count(0, t.batch_size)

    def fetch():
        start = next(starts)
        rows = range(start, start + t.batch_size)
        to_device(data.batch('train', rows, t.block_size, t.seed), device)
    return fetch


# --------------------------------------------------------------------------------- memory


def step_memory(t, c):
    """Prints the bytes that three training steps need at most, without Python and torch: what
    those of a tiny model need"""
    device, dtype = pick_device(t)
    tiny = Config(vocab_size=64, hidden_size=64, num_hidden_layers=1, n_routed_experts=4)
    three_steps(tiny, replace(t, batch_size=2, block_size=64), device, dtype)
    before = 0
    if device.type != 'cuda':
        before = peak_bytes(device)
    three_steps(c, t, device, dtype)
    print(peak_bytes(device) - before)


def three_steps(c, t, device, dtype):
    model = Transformer(c).to(device).train()
    model.gradient_checkpointing = t.gradient_checkpointing
    optimizer = make_optimizer(t, model, dtype)
    step = trainer(model, plain_loss(model), c.vocab_size, t, device, dtype, optimizer)
    for _ in range(3):
        step()


def peak_bytes(device):
    file = Path('/proc/self/status')
    if device.type == 'cuda' or not file.exists():
        return int(peak_memory(device) * 2**20)
    # ru_maxrss, the portable way, begins with that of the process that started this one
    return int(re.search(r'VmHWM:\s*(\d+)', file.read_text(encoding='utf-8'))[1]) * 1024


def measured_memory(t, c):
    """-> step_memory's bytes, from a process of its own; None where it failed"""
    code = 'import bench, json, sys; bench.step_memory(*bench.from_json(sys.argv[1]))'
    about = json.dumps([asdict(t), asdict(c)])
    done = subprocess.run([sys.executable, '-c', code, about], cwd=HERE, text=True,
                          capture_output=True)
    if done.returncode != 0:
        return None
    return int(done.stdout)


def from_json(text):
    t, c = json.loads(text)
    return train.Settings(**t), Config(**c)


# ------------------------------------------------------------------------------- decoding


def weights_read(model):
    """Bytes of the weights that decoding a token at batch 1 reads"""
    c = model.config
    mtp = tuple(f'{name}.' for name, module in model.named_modules() if isinstance(module, MTP))
    total = 0
    for name, p in model.named_parameters():
        size = p.numel() * p.element_size()
        if '.experts.' in name:
            size *= c.num_experts_per_tok / c.n_routed_experts
        embedding = 'embed_tokens' in name and model.lm_head is not None
        if not name.startswith(mtp) and not embedding:
            total += size
    return total


class Times:
    """When tokens came: what transformers wants as a streamer. The prompt comes first"""

    def __init__(self):
        self.at = []

    def put(self, tokens):
        self.at.append(time.perf_counter())

    def end(self):
        pass


def decoder(stream):
    """stream: (prompt (B, T), n) -> n tokens (B, 1), one by one. -> a job that returns the seconds
    to the first token, and of one more"""
    def job(prompt, n):
        times = [time.perf_counter()]
        for token in stream(prompt, n):
            token.tolist()          # waits for the GPU
            times.append(time.perf_counter())
        return [times[1] - times[0], (times[-1] - times[1]) / (n - 1)]
    return job


@torch.no_grad()
def drafting_row(model, context, rounds):
    """What drafting costs behind so many tokens, at batch 1: a pass of one token, one of two, of
    which the second is a draft, and the making of a draft"""
    c = model.config
    prompt = torch.randint(0, c.vocab_size, (1, context), device=model.head.device)
    main = Cache(c, 1, context + 8, model.head, model.head.dtype)
    mtp = Cache(replace(c, num_hidden_layers=1), 1, context + 8, model.head, model.head.dtype)
    states, _ = model.hidden(prompt, main)
    model.mtp(1, states, prompt, mtp)
    state = states[:, -1:].clone()
    one = prompt[:, :1].clone()
    two = prompt[:, :2].clone()

    def pass_of(tokens):
        with decoding_kernels(tokens.shape[1]):
            main.length = context
            h, _ = model.hidden(tokens, main)
            F.linear(h, model.head).argmax(-1).tolist()

    def draft():
        with decoding_kernels(1):
            mtp.length = context
            h, _ = model.mtp(1, state, one, mtp)
            F.linear(h, model.head).argmax(-1).tolist()

    jobs = {
        'one_ms': partial(time_of, partial(pass_of, one)),
        'two_ms': partial(time_of, partial(pass_of, two)),
        'draft_ms': partial(time_of, draft),
    }
    row = {'context': context}
    for name, (spent,) in medians(jobs, 10 * rounds).items():
        row[name] = 1e3 * spent
    row['breaks_even_at'] = (row['two_ms'] + row['draft_ms']) / row['one_ms'] - 1
    return row


def time_of(job):
    return [seconds(job)]


def generated(model):
    """decoder's job for a model of transformers"""
    def job(prompt, n):
        times = Times()
        began = time.perf_counter()
        model.generate(prompt, do_sample=False, eos_token_id=None, max_new_tokens=n,
                       attention_mask=torch.ones_like(prompt), streamer=times)
        return [times.at[1] - began, (times.at[-1] - times.at[1]) / (n - 1)]
    return job


# -------------------------------------------------------------------- ours and the others


@dataclass
class Contender:
    """What is measured beside the others"""
    name: str
    step: object        # takes a training step, or None
    decode: object      # decoder's job, or None
    parameters: int
    flops: float        # of a training step, per token


def our_contenders(s, t, model, own, device, dtype):
    """Yields ours with AdamW; with the config's optimizer, if that is another; without experts but
    with the same active FLOPs. own: the same model for decoding"""
    c = model.config
    loss_of = own_loss(model, t, device, dtype)

    def contender(name, model, loss_of, optimizer, decode=None):
        step = trainer(model, loss_of, c.vocab_size, t, device, dtype, optimizer)
        return Contender(name, step, decode, parameter_table(model)['total'],
                         flops_per_token(model, t.block_size))

    yield contender('nanoseek', model, loss_of, adamw(model, device), decoder(own.stream))
    if t.optimizer != 'adamw':
        optimizer = make_optimizer(t, model, dtype)
        yield contender(f'nanoseek, {t.optimizer}', model, loss_of, optimizer)
    if model.moe_layers:
        other = Transformer(dense(c)).to(device).train()
        loss_of = own_loss(other, t, device, dtype)
        yield contender('nanoseek, dense, same active FLOPs', other, loss_of, adamw(other, device))


def decoding_model(t, folder, device, dtype):
    """-> the model in folder, for decoding, with drafts or without, compiled where the settings say
    so"""
    model = Transformer.from_pretrained(folder, dtype=dtype).to(device).eval()
    drafts = None
    if model.can_draft:
        drafts = Drafts()
    if wants_compile(t, device):
        problem = compile_decoding(model, drafts)
        if problem:
            raise ValueError(f'compile={t.compile}: {problem}: take --compile=false')
    return model


def transformers_contenders(model, t, device, dtype, folder):
    """Yields transformers with the weights in folder, with each kind of its experts"""
    from transformers import AutoModelForCausalLM, logging
    logging.disable_progress_bar()
    total = parameter_table(model)['total']
    flops = flops_per_token(model, t.block_size)
    kinds = ['eager']
    if model.moe_layers:
        kinds = ['eager', 'batched_mm', 'grouped_mm']
    for kind in kinds:
        options = {}
        if model.moe_layers:
            options = {'experts_implementation': kind}
        load = partial(AutoModelForCausalLM.from_pretrained, folder, **options)
        step = None
        if kind != 'batched_mm':    # training with it is slow
            other = load(dtype=torch.float32).to(device).train()
            step = trainer(other, loss_of_logits(other), model.config.vocab_size, t, device, dtype,
                           adamw(other, device))
        decode = generated(load(dtype=dtype).to(device).eval())
        yield Contender(f'transformers, {kind}', step, decode, total, flops)


def loss_of_logits(model):
    def loss_of(x, y):
        return F.cross_entropy(model(x).logits.float().flatten(0, 1), y.flatten())
    return loss_of


def nanogpt_contender(path, longest, c, t, device, dtype):
    """nanoGPT's GPT of the same depth, width, heads and vocabulary, with its own optimizer.
    longest: the longest context of decoding"""
    if c.hidden_size % c.num_attention_heads:
        raise ValueError(f'vs={path}: num_attention_heads={c.num_attention_heads} must divide '
                         'hidden_size there')
    spec = importlib.util.spec_from_file_location('nanogpt_model', Path(path, 'model.py'))
    theirs = importlib.util.module_from_spec(spec)
    sys.modules['nanogpt_model'] = theirs
    with contextlib.redirect_stdout(sys.stderr):        # it prints
        spec.loader.exec_module(theirs)
        size = theirs.GPTConfig(max(t.block_size, longest), c.vocab_size, c.num_hidden_layers,
                                c.num_attention_heads, c.hidden_size, bias=False)
        model = theirs.GPT(size).to(device).train()
        fast = theirs.GPT(size).to(device).to(dtype).eval()
        optimizer = model.configure_optimizers(0.1, 1e-5, (0.9, 0.95), device.type)
    forward = model
    if wants_compile(t, device):
        forward = torch.compile(model)

    def loss_of(x, y):
        _, loss = forward(x, y.contiguous())
        return loss

    def stream(idx, n):             # it has no cache: a call for n tokens is n calls for one
        for _ in range(n):
            idx = fast.generate(idx, 1)
            yield idx[:, -1:]

    step = trainer(model, loss_of, c.vocab_size, t, device, dtype, optimizer)
    parameters = sum(p.numel() for p in model.parameters())
    attention = 12 * c.num_hidden_layers * c.hidden_size * t.block_size
    flops = 6 * model.get_num_params() + attention
    return Contender('nanoGPT', step, decoder(stream), parameters, flops)


# ---------------------------------------------------------------------------------- model


def measure(s, t, given, folder):
    """-> all that is measured of a model, as JSON has it. t: train.py's settings; given: the
    model's; folder: for its weights"""
    device, dtype = pick_device(t)
    if t.fp8:
        check_fp8(t.fp8, device, dtype)
    c = model_config(t, given, device, dtype)
    contexts = fitting_contexts(s, c)
    found = {
        'machine': machine(device, dtype),
        'settings': {**asdict(s), **asdict(t), **asdict(c)},
        'model': architecture(c),
        'memory': memory_row(t, c, device, dtype, s.memory),
        'cache': cache_rows(ATTENTION, c, dtype),
    }
    torch.manual_seed(t.seed)
    model = Transformer(c)
    model.save_pretrained(folder)
    if t.fp8:
        to_fp8(model, t.fp8)
    model.to(device).train()
    own = decoding_model(t, folder, device, dtype)
    contenders = list(our_contenders(s, t, model, own, device, dtype))
    if s.vs == 'transformers':
        contenders += transformers_contenders(model, t, device, dtype, folder)
    elif s.vs:
        longest = contexts[-1] + s.new_tokens
        contenders.append(nanogpt_contender(s.vs, longest, c, t, device, dtype))
    found['training'] = training_rows(s, t, contenders, found['machine']['matmul_flops'])
    found['decoding'] = decoding_rows(s, contenders, contexts, c.vocab_size, device)
    read = weights_read(model) / 4 * dtype.itemsize     # the model is float32, decoding in dtype
    add_share_of_copy(found['decoding'], read, found['machine']['copy_bytes'])
    found['drafting'] = None
    if own.can_draft:
        found['drafting'] = drafting_row(own, contexts[0], s.rounds)
    found.update(parts_of_step(s, t, model, device, dtype))
    return found


def model_config(t, given, device, dtype):
    """-> the Config; settles batch_size=0"""
    source = None
    if t.init_from:
        source = train.init_folder(t)
    c = train.model_config(train.chosen(given), source, None)
    alone = train.OneDevice()
    train.fit_settings(t, c, dtype, alone.room(device), alone)
    return c


def fitting_contexts(s, c):
    """The setting contexts, each at most what leaves room for the new tokens"""
    most = c.max_position_embeddings - s.new_tokens
    if most < 1:
        raise ValueError(f'new_tokens={s.new_tokens}: must be below max_position_embeddings='
                         f'{c.max_position_embeddings}')
    return sorted({min(n, most) for n in s.numbers('contexts')})


def memory_row(t, c, device, dtype, measure=True):
    estimate = sum(memory_estimate(Transformer, c, t, dtype, device.type))
    measured = None
    if measure:
        measured = measured_memory(t, c)
    ratio = None
    if measured:
        ratio = estimate / measured
    return {'estimate_bytes': estimate, 'measured_bytes': measured, 'ratio': ratio}


def training_rows(s, t, contenders, matmul_flops):
    those = [contender for contender in contenders if contender.step is not None]
    jobs = {contender.name: partial(time_of, contender.step) for contender in those}
    times = measured(jobs, s.rounds)
    count = t.batch_size * t.block_size
    first = statistics.median(times['nanoseek'][0])
    rows = []
    for contender in those:
        column, = times[contender.name]
        spent = statistics.median(column)
        rows.append({
            'name': contender.name,
            'ms': 1e3 * spent,
            'ms_range': [1e3 * min(column), 1e3 * max(column)],
            'tokens_per_s': count / spent,
            'mfu': count * contender.flops / spent / matmul_flops,
            'parameters': contender.parameters,
            'flops_per_token': contender.flops,
            'ratio': spent / first,
        })
    return rows


def decoding_rows(s, contenders, contexts, vocab_size, device):
    those = [contender for contender in contenders if contender.decode is not None]
    rows = []
    for context, batch in itertools.product(contexts, s.numbers('batch_sizes')):
        prompt = torch.randint(0, vocab_size, (batch, context), device=device)
        jobs = {contender.name: partial(contender.decode, prompt, s.new_tokens)
                for contender in those}
        times = measured(jobs, s.rounds)
        ours = statistics.median(times['nanoseek'][1])
        for name, (firsts, column) in times.items():
            first = statistics.median(firsts)
            each = statistics.median(column)
            rows.append({
                'name': name,
                'context': context,
                'batch': batch,
                'first_ms': 1e3 * first,
                'ms_per_token': 1e3 * each,
                'ms_range': [1e3 * min(column), 1e3 * max(column)],
                'tokens_per_s': batch / each,
                'ratio': each / ours,
            })
    return rows


def add_share_of_copy(rows, read, copy_bytes):
    """How fast our decoding reads the weights, as a share of what a copy reaches. read: bytes for
    a token at batch 1; copy_bytes: bytes/s. None in the rows of which it says nothing"""
    for row in rows:
        row['of_copy'] = None
        if row['name'] == 'nanoseek' and row['batch'] == 1:
            bytes_per_s = read / row['ms_per_token'] * 1e3
            row['of_copy'] = bytes_per_s / copy_bytes


# --------------------------------------------------------------------------------- tables


def print_row(widths, cells):
    """A line of a table: its first cell is set left, the others right; the last may be missing"""
    line = f'{cells[0]:{widths[0]}}'
    for width, cell in zip(widths[1:], cells[1:]):
        line += f'{cell:>{width}}'
    print(line)


def show(found, optimizer):
    """Prints what measure found, as tables"""
    m = found['machine']
    print(f'{m["name"]}, {m["cores"]} cores, {m["device"]} {m["dtype"]}, torch {m["torch"]}: '
          f'a matmul reaches {m["matmul_flops"] / 1e12:.2f} TFLOP/s, a copy '
          f'{m["copy_bytes"] / 1e9:.1f} GB/s read and written')
    print(found['model'])
    show_training(found)
    show_parts(found, optimizer)
    show_memory(found)
    show_decoding(found)
    show_drafting(found['drafting'])
    others = [row for row in found['training'] if not row['name'].startswith('nanoseek')]
    if others:
        best = min(others, key=lambda row: row['ms'])
        print(f'\na training step of {best["name"]}, the best there, takes {best["ratio"]:.2f} '
              'times as long as ours')


def show_training(found):
    t = found['settings']
    print(f'\ntraining, {t["batch_size"]} x {t["block_size"]} random tokens, AdamW unless it says '
          f'otherwise, compile={t["compile"]}')
    widths = (36, 10, 11, 6, 14, 13, 9)
    print_row(widths, ('', 'ms a step', 'tokens/s', 'MFU', 'parameters', 'MFLOP/token', 'time'))
    for row in found['training']:
        print_row(widths, (
            row['name'],
            f'{row["ms"]:.1f}',
            f'{row["tokens_per_s"]:,.0f}',
            f'{row["mfu"]:.0%}',
            f'{row["parameters"]:,}',
            f'{row["flops_per_token"] / 1e6:.1f}',
            f'{row["ratio"]:.2f}x',
        ))


def show_parts(found, optimizer):
    total = sum(row['ms'] for row in found['parts'])
    rows = [*found['parts'],
            {'part': 'together', 'ms': total},
            {'part': 'such a step without marks', 'ms': found['step_of_parts_ms']}]
    widths = (60, 10, 7)
    print()
    print_row(widths, (f'a step by part ({optimizer}; data: {found["data"]})', 'ms', 'share'))
    for row in rows:
        print_row(widths, (row['part'], f'{row["ms"]:.2f}', f'{row["ms"] / total:.0%}'))


def show_memory(found):
    memory = found['memory']
    known = 'unknown'
    if memory['ratio']:
        known = f'{memory["measured_bytes"] / 2**20:,.0f} MB, {memory["ratio"]:.2f}'
    print('\nmemory of a step without Python and torch: estimated '
          f'{memory["estimate_bytes"] / 2**20:,.0f} MB, measured {known}')
    widths = (36, 27, 15)
    print()
    print_row(widths, ('cache', 'bytes per token and layer', 'in all layers'))
    for row in found['cache']:
        print_row(widths, (
            row['attention'],
            f'{row["bytes_per_token_and_layer"]:,}',
            f'{row["bytes_per_token"]:,}',
        ))


def show_decoding(found):
    widths = (28, 8, 6, 10, 11, 10, 9, 25)
    print()
    print_row(widths, ('decoding', 'context', 'batch', 'first ms', 'ms a token', 'tokens/s', 'time',
                       'weights read, of a copy'))
    for row in found['decoding']:
        cells = [
            row['name'],
            row['context'],
            row['batch'],
            f'{row["first_ms"]:.1f}',
            f'{row["ms_per_token"]:.2f}',
            f'{row["tokens_per_s"]:.1f}',
            f'{row["ratio"]:.2f}x',
        ]
        if row['of_copy']:
            cells.append(f'{row["of_copy"]:.0%}')
        print_row(widths, cells)


def show_drafting(row):
    if row is None:
        return
    cost = 1 + row['breaks_even_at']
    print(f'\ndrafting behind {row["context"]} tokens: a pass of one token takes '
          f'{row["one_ms"]:.2f} ms, of two {row["two_ms"]:.2f}, a draft {row["draft_ms"]:.2f}: '
          f'decoding is (1 + accepted) / {cost:.2f} times as fast, '
          f'{1.5 / cost:.2f} where half of the drafts are accepted, {1.9 / cost:.2f} with 90%')


# --------------------------------------------------------------------------------- corpus


def make_corpus(path, megabytes, seed=0):
    """A .jsonl file of documents: words in Shakespeare's frequencies, one in ten made up, as new
    texts bring them"""
    rng = np.random.default_rng(seed)
    text = (HERE / 'data/shakespeare/input.txt').read_text(encoding='utf-8')
    words = text.split()
    pool = words + made_up(words, rng)
    size = 0
    with open(path, 'w', encoding='utf-8') as f:
        while size < megabytes * 10**6:
            for length in rng.lognormal(6, 1, 1000).astype(int):
                chosen = rng.integers(0, len(pool), length + 1).tolist()
                document = ' '.join([pool[i] for i in chosen])
                size += f.write(json.dumps({'text': document}) + '\n')


def made_up(words, rng):
    """New words of old beginnings and ends, a ninth as many. Some come often, most do not"""
    letters = [word for word in words if word.isalpha()]
    heads = [word[:3] for word in letters]
    tails = [word[-4:] for word in letters]
    pairs = rng.integers(0, len(letters), (200_000, 2)).tolist()
    new = [heads[i] + tails[j] for i, j in pairs]
    often = rng.random(len(words) // 9) ** 3
    return [new[int(i)] for i in len(new) * often]


def read_corpus(path):
    with open(path, encoding='utf-8') as f:
        return [json.loads(line)['text'] for line in f]


def tree_mb(pid):
    """MB of a process and all below it, what they share counted once (Linux)"""
    children = Path(f'/proc/{pid}/task/{pid}/children')
    rollup = Path(f'/proc/{pid}/smaps_rollup')
    try:
        below = children.read_text(encoding='utf-8').split()
        pss = re.search(r'^Pss: +(\d+)', rollup.read_text(encoding='utf-8'), re.M)
        return int(pss[1]) / 1024 + sum(tree_mb(child) for child in below)
    except (OSError, TypeError):        # it has ended
        return 0.0


def timed(*command, memory=False):
    """-> seconds of a command, and with memory its peak in MB (to ask costs a little)"""
    began = time.perf_counter()
    peak = 0.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               cwd=HERE)
    while memory and process.poll() is None:
        peak = max(peak, tree_mb(process.pid))
        time.sleep(1)
    if process.wait() != 0:
        words = ' '.join(map(str, command))
        raise OSError(f'{words} ended with status {process.returncode}')
    return time.perf_counter() - began, peak


def library_seconds(tokenizer, texts):
    """Of the tokenizer's own library on all cores, without anything around it"""
    if tokenizer == 'gpt2':
        import tiktoken
        encoding = tiktoken.get_encoding('gpt2')
        encode = partial(encoding.encode_ordinary_batch, num_threads=os.cpu_count())
    else:
        own = load_tokenizer(folders.hub_folder(tokenizer, ['tokenizer.json']))
        encode = partial(own.encode_batch_fast, add_special_tokens=False)
    began = time.perf_counter()
    for i in range(0, len(texts), 1000):
        encode(texts[i:i + 1000])
    return time.perf_counter() - began


NANOGPT = '''
import sys
import numpy as np
import tiktoken
from datasets import load_dataset

if __name__ == '__main__':
    source, target, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
    encoding = tiktoken.get_encoding('gpt2')

    def process(example):
        ids = encoding.encode_ordinary(example['text']) + [encoding.eot_token]
        return {'ids': ids, 'len': len(ids)}

    data = load_dataset('json', data_files=source, split='train', cache_dir=target,
                        num_proc=workers)
    data = data.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    data = data.map(process, remove_columns=['text'], num_proc=workers)
    for split, part in data.items():
        total = int(np.sum(part['len'], dtype=np.uint64))
        out = np.memmap(f'{target}/{split}.bin', np.uint16, 'w+', shape=(total,))
        at = 0
        parts = min(1024, len(part))
        for i in range(parts):
            shard = part.shard(parts, i, contiguous=True).with_format('numpy')
            block = np.concatenate(shard['ids'])
            out[at:at + len(block)] = block
            at += len(block)
        out.flush()
'''


def bench_prepare(s, folder):
    """prepare.py beside its tokenizer's library, and on a large corpus beside nanoGPT's way"""
    tenth = folder / 'tenth.jsonl'
    small = folder / 'small.jsonl'
    large = folder / 'large.jsonl'
    most = min(s.corpus_mb, 200)
    make_corpus(small, most)
    make_corpus(tenth, most / 10)
    make_corpus(large, s.corpus_mb)
    compare_rates(s, small, tenth, folder)
    size = large.stat().st_size / 1e6
    jobs = {'prepare.py': prepare_command(s, large, folder)}
    if s.tokenizer == 'gpt2':
        script = folder / 'nanogpt.py'
        script.write_text(NANOGPT, encoding='utf-8')
        jobs["nanoGPT's way"] = (sys.executable, script, large, folder / 'cache',
                                 str(os.cpu_count()))
    for name, command in jobs.items():
        spent, peak = timed(*command, memory=True)
        print(f'{size:,.0f} MB, {name}: {spent:,.0f} s, {size / spent:.2f} MB/s, '
              f'{peak:,.0f} MB of memory')


def prepare_command(s, file, folder):
    return (sys.executable, HERE / 'prepare.py', file, f'--tokenizer={s.tokenizer}',
            '--resume=never', f'--out_dir={folder / file.stem}')


def compare_rates(s, small, tenth, folder):
    """Rates of the library and of prepare.py, the latter without its start: by what small takes
    more than the tenth of it"""
    texts = read_corpus(small)
    mb = megabytes(texts)
    more = mb - megabytes(texts[:len(read_corpus(tenth))])
    print(f'{os.cpu_count()} cores, tokenizer {s.tokenizer}; {mb:.0f} MB of text, medians of '
          f'{s.rounds}, in turn:')
    library = []
    ours = []
    for _ in range(s.rounds):
        library.append(mb / library_seconds(s.tokenizer, texts))
        whole, _ = timed(*prepare_command(s, small, folder))
        start, _ = timed(*prepare_command(s, tenth, folder))
        ours.append(more / (whole - start))
    print(f'{"library":12} {statistics.median(library):8.2f} MB/s')
    print(f'{"prepare.py":12} {statistics.median(ours):8.2f} MB/s')
    ratio = statistics.median(b / a for a, b in zip(library, ours))
    print(f'{"ratio":12} {ratio:8.2f}; prepare.py: by what the last nine tenths of the text take, '
          'without its start')


def megabytes(texts):
    return sum(len(text.encode()) for text in texts) / 1e6


# ------------------------------------------------------------------- what --gpu runs


def proofs(s, t):
    """Prints what holds on the device, a line of JSON each"""
    device, _ = pick_device(t)

    def make(**fields):
        return Transformer(Config(**fields))
    for name, spent, problem in Proofs(make, t, compile_decoding, device, s.small).all():
        print(json.dumps({'name': name, 'seconds': spent, 'problem': problem}), flush=True)


def profile(t, given):
    """Prints the ten kernels that take most of a training step, as JSON"""
    device, dtype = pick_device(t)
    c = model_config(t, given, device, dtype)
    model = Transformer(c).to(device).train()
    step = trainer(model, own_loss(model, t, device, dtype), c.vocab_size, t, device, dtype,
                   make_optimizer(t, model, dtype))
    for _ in range(3):
        step()
    with torch.profiler.profile() as profiler:
        step()
    rows = []
    for event in profiler.key_averages():
        spent = event.self_cpu_time_total
        if device.type == 'cuda':
            spent = event.self_device_time_total
        rows.append({'name': event.key, 'ms': spent / 1e3, 'calls': event.count})
    total = sum(row['ms'] for row in rows)
    rows.sort(key=itemgetter('ms'), reverse=True)
    print(json.dumps({'total_ms': total, 'kernels': rows[:10]}))


def memory(t, given):
    """Prints the estimate and the measurement of a step's memory, as JSON"""
    device, dtype = pick_device(t)
    c = model_config(t, given, device, dtype)
    print(json.dumps(memory_row(t, c, device, dtype)))


def decoding(s, t, given, folder):
    """Prints what decoding takes, and nothing else, as JSON"""
    device, dtype = pick_device(t)
    c = model_config(t, given, device, dtype)
    Transformer(c).save_pretrained(folder)
    model = decoding_model(t, folder, device, dtype)
    contender = Contender('nanoseek', None, decoder(model.stream), 0, 0.0)
    rows = decoding_rows(s, [contender], fitting_contexts(s, c), c.vocab_size, device)
    add_share_of_copy(rows, weights_read(model), copy_rate(device))
    print(json.dumps(rows))


def main(s, t, given):
    if s.gpu:
        small = s.small or not torch.cuda.is_available()
        gpu.measure(replace(s, small=small), HERE)
        return
    if s.only == 'proofs':
        proofs(s, t)
        return
    if s.only == 'profile':
        profile(t, given)
        return
    if s.only == 'memory':
        memory(t, given)
        return
    folder = Path(s.work_dir or tempfile.mkdtemp(prefix='nanoseek-bench-'))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if s.corpus_mb:
            bench_prepare(s, folder)
        elif s.only == 'decoding':
            decoding(s, t, given, folder)
        else:
            found = measure(s, t, given, folder)
            if s.json:
                print(json.dumps(found))
            else:
                show(found, t.optimizer)
    finally:
        if not s.work_dir:
            shutil.rmtree(folder)


if __name__ == '__main__':
    with config.user_errors(needs_stdout=True):
        own, training, model_settings = config.load(Settings, train.Settings, Config, usage=__doc__)
        t, model_settings = train.turn_dial(train.Settings, training, model_settings)
        main(Settings(**own), t, model_settings)
