"""How fast, how much memory, against whom.

    python bench.py config/shakespeare.py                       # training and decoding of a model, on random tokens
    python bench.py config/shakespeare.py --vs=transformers     # the same weights there, with each kind of its experts
    python bench.py config/shakespeare.py --vs=../nanoGPT       # a GPT of the same depth and width there
    python bench.py --corpus_mb=2000        # prepare.py on made-up text, the tokenizers' libraries, and nanoGPT's way

Measures in turn, after a warm-up, and prints medians and ratios; run nothing else meanwhile.
"""
import nanoseek.tuning  # noqa: F401  # first: it acts before torch is loaded

import contextlib, functools, importlib.util, json, os, platform, re, shutil, statistics, subprocess, sys, tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import config, train
from model import ATTENTION, MLP, MTP, Config, Embedding, Experts, MoE, RMSNorm, Router, Transformer
from nanoseek.device import check_fp8, compiled, matmul_rate, peak_memory, pick_device, to_device, to_fp8, wants_compile
from nanoseek.estimate import architecture, flops_per_token, memory_estimate, parameter_table
from nanoseek.optim import make_optimizer
from nanoseek import folders, tokens
from nanoseek.tokenizer import load_tokenizer
from sample import compile_decoding

HERE = Path(__file__).resolve().parent


@dataclass
class Settings:
    """Settings of bench.py"""
    vs: str = ''                    # also measure there: transformers, or the path of nanoGPT
    rounds: int = 5                 # of each measurement
    new_tokens: int = 32            # that are decoded
    contexts: str = '64,512,2048'   # numbers of tokens before them, at most what the model can have
    batch_sizes: str = '1,8'        # numbers of sequences that are decoded together
    json: bool = False              # print one JSON object in the place of tables
    corpus_mb: int = 0              # not a model, but prepare.py, on so many megabytes of text
    tokenizer: str = 'gpt2'         # what prepare.py gets as --tokenizer
    work_dir: str = ''              # where text and token files go; if empty a temporary folder, removed afterwards

    def __post_init__(self):
        if self.vs not in ('', 'transformers') and not Path(self.vs, 'model.py').is_file():
            raise ValueError(f'vs={self.vs}: neither transformers nor a folder with nanoGPT\'s model.py')
        for name, least in (('rounds', 1), ('new_tokens', 2)):
            if getattr(self, name) < least:
                raise ValueError(f'{name}={getattr(self, name)}: must be at least {least}')
        for name in ('contexts', 'batch_sizes'):
            if not re.fullmatch(r'[1-9]\d*(,[1-9]\d*)*', getattr(self, name)):
                raise ValueError(f'{name}={getattr(self, name)}: wanted numbers such as 1,8')

    def numbers(self, name):
        return [int(n) for n in getattr(self, name).split(',')]

# ----------------------------------------------------------------------------------------------------- machine, clock

def machine(device, dtype):
    """What was measured on, and its ceilings: FLOP/s of a large matmul, bytes/s of a large copy"""
    cpu = re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text()) if sys.platform == 'linux' else None
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu[1] if cpu else platform.processor()
    return {'device': device.type, 'name': name, 'cores': os.cpu_count(), 'torch': torch.__version__,
            'dtype': str(dtype)[6:], 'matmul_flops': matmul_rate(device, dtype), 'copy_bytes': copy_rate(device)}

def copy_rate(device):
    """Bytes/s of a large copy, each byte counted twice, as it is read and written"""
    a = torch.zeros(2**30 if device.type == 'cuda' else 2**28, dtype=torch.uint8, device=device)
    b = torch.empty_like(a).copy_(a)
    return 2 * len(a) / min(seconds(lambda: (b.copy_(a), b[0].item()))[0] for _ in range(5))

def seconds(job):
    began = time.perf_counter()
    job()
    return [time.perf_counter() - began]

def medians(jobs, rounds):
    """{name: function -> list of seconds} -> {name: their medians}, measured in turn"""
    found = {name: [] for name in jobs}
    for i in range(rounds + 2):
        for name, job in jobs.items():
            times = job()
            found[name] += [times] if i > 1 else []         # two for warming up
    return {name: [statistics.median(column) for column in zip(*rows)] for name, rows in found.items()}

# ----------------------------------------------------------------------------------------------------------- training

ATTEND, EXPERTS, ROUTER, DENSE = 'attention', 'experts and dispatch', 'router', 'dense and shared MLP'
REST, HEAD, OPTIMIZER, DATA = 'embedding, norms and rest', 'head and loss', 'optimizer', 'data'
ORDER = ATTEND, EXPERTS, ROUTER, DENSE, REST, HEAD, OPTIMIZER, DATA

def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

def adamw(model, device):
    return torch.optim.AdamW(model.parameters(), 1e-5, fused=device.type in ('cpu', 'cuda'))

def trainer(model, loss_of, vocab_size, t, device, dtype, optimizer, mark=lambda part: None, fetch=lambda: None):
    """-> a function that takes an optimizer step on random tokens, and waits until it is done"""
    def step():
        mark(DATA)
        fetch()
        mark(REST)
        tokens = torch.randint(0, vocab_size, (t.batch_size, t.block_size + 1), device=device)
        with autocast(device, dtype):
            loss = loss_of(tokens[:, :-1], tokens[:, 1:])
        mark(HEAD)
        loss.backward()
        mark(OPTIMIZER)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mark(None)
        loss.item()
    return step

def own_loss(model, t, device, dtype):
    model.gradient_checkpointing, model.doc_attention_mask = t.gradient_checkpointing, t.doc_attention_mask
    forward, problem = compiled(model, model, t, device, lambda: autocast(device, dtype))
    if problem:                     # going on would measure something else than what the table says
        raise ValueError(f'compile={t.compile}: {problem}: take --compile=false')
    return lambda x, y: forward(x, y)[1]

def dense(c):
    """The Config without experts and with the same FLOPs in the MLPs of all layers together"""
    active = c.moe_intermediate_size * (c.num_experts_per_tok + c.n_shared_experts)
    layers = c.num_hidden_layers + c.num_nextn_predict_layers
    leading = min(c.first_k_dense_replace, layers)
    width = (leading * c.intermediate_size + (layers - leading) * active) / layers
    return replace(c, n_routed_experts=0, first_k_dense_replace=0, intermediate_size=round(width))

# -------------------------------------------------------------------------------------------------------------- parts

KINDS = {**dict.fromkeys(ATTENTION.values(), ATTEND), MLP: DENSE, RMSNorm: REST, Embedding: REST,
         MoE: ROUTER, Router: ROUTER, Experts: EXPERTS}


class Parts:
    """Where the time of a training step goes: a mark begins a part, which lasts until the next mark.
    Forward, modules set one when they begin and when they end; backward, their outputs set one when
    the gradient arrives there, as autograd goes back in the opposite order. What follows the final
    norm, and that of an MTP layer, is head and loss. On a GPU a mark is an event, nothing waits."""

    def __init__(self, model, device):
        self.model = model
        self.device = device
        self.marks = []

    def watch(self):
        """-> handles of hooks on the modules that begin a part"""
        part = {'': REST}
        hooks = []
        for name, module in self.model.named_modules():
            outer = part[name.rpartition('.')[0]]
            own = KINDS.get(type(module), outer)
            if outer == ATTEND:                             # with its norms
                own = ATTEND
            part[name] = own
            after = outer
            if name == 'model.norm' or name.endswith('shared_head.norm'):
                after = HEAD
            if type(module) in KINDS:
                hooks += self.hooks(module, own, after)
        return hooks

    def hooks(self, module, own, after):
        def begin(module, inputs):
            self.mark(own)

        def end(module, inputs, outputs):
            self.leave(outputs, own, after)

        return module.register_forward_pre_hook(begin), module.register_forward_hook(end)

    def mark(self, part):
        now = time.perf_counter()
        if self.device.type == 'cuda':
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.append((part, now))

    def leave(self, outputs, part, after):
        if isinstance(outputs, torch.Tensor):
            outputs = (outputs,)
        for tensor in outputs:
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda grad: self.mark(part))
        self.mark(after)

    def times(self, step):
        """-> {part: seconds} of a step"""
        self.marks = []
        hooks = self.watch()
        step()
        for hook in hooks:
            hook.remove()
        found = {}
        for (part, began), (_, ended) in zip(self.marks, self.marks[1:]):
            if self.device.type == 'cuda':
                spent = began.elapsed_time(ended) / 1e3
            else:
                spent = ended - began
            found[part] = found.get(part, 0.0) + spent
        return found


def parts_of_step(s, t, model, device, dtype):
    """-> {part: seconds} of a step by the config's optimizer, without torch.compile; seconds of such a step without
    marks; where data are from: a batch is fetched where the dataset is prepared, trained is on random tokens"""
    fetch, source = lambda: None, 'random tokens'
    with contextlib.suppress(tokens.NoDataset):
        data, number = tokens.open_data(t.dataset), iter(range(0, 2**62, t.batch_size))
        rows = lambda: range(n := next(number), n + t.batch_size)
        fetch = lambda: to_device(data.batch('train', rows(), t.block_size, t.seed), device)
        source = t.dataset if isinstance(t.dataset, str) else ' + '.join(t.dataset)
    parts, optimizer = Parts(model, device), make_optimizer(t, model, dtype)
    own_step = functools.partial(trainer, model, lambda x, y: model(x, y)[1], model.config.vocab_size, t, device, dtype,
                                 optimizer, fetch=fetch)
    step = own_step(mark=parts.mark)
    names = [part for part in ORDER if part in parts.times(step)]
    job = lambda: [found[name] for found in [parts.times(step)] for name in names]
    times = medians({'parts': job, 'step': functools.partial(seconds, own_step())}, s.rounds)
    return dict(zip(names, times['parts'])), times['step'][0], source

# ------------------------------------------------------------------------------------------------------------- memory

def step_memory(t, c):
    """Prints the bytes that three training steps need at most, without Python and torch: what a tiny model's need"""
    device, dtype = pick_device(t)
    tiny = Config(vocab_size=64, hidden_size=64, num_hidden_layers=1, n_routed_experts=4, num_experts_per_tok=2)
    for model_config, settings in ((tiny, replace(t, batch_size=2, block_size=64)), (c, t)):
        before = 0 if device.type == 'cuda' or model_config is tiny else peak_bytes(device)
        model = Transformer(model_config).to(device).train()
        loss, optimizer = (lambda x, y: model(x, y)[1]), make_optimizer(t, model, dtype)
        model.gradient_checkpointing = t.gradient_checkpointing
        step = trainer(model, loss, model_config.vocab_size, settings, device, dtype, optimizer)
        for _ in range(3):
            step()
    print(peak_bytes(device) - before)

def peak_bytes(device):
    file = Path('/proc/self/status')        # ru_maxrss begins with that of the process that started this one
    if device.type == 'cuda' or not file.exists():
        return int(peak_memory(device) * 2**20)
    return int(re.search(r'VmHWM:\s*(\d+)', file.read_text())[1]) * 1024

def measured_memory(t, c):
    """-> step_memory's bytes, from a process of its own"""
    code = 'import bench, json, sys; bench.step_memory(*bench.from_json(sys.argv[1]))'
    done = subprocess.run([sys.executable, '-c', code, json.dumps([asdict(t), asdict(c)])], cwd=HERE, text=True,
                          capture_output=True)
    return int(done.stdout) if done.returncode == 0 else None

def from_json(text):
    t, c = json.loads(text)
    return train.Settings(**t), Config(**c)

def cache_rows(c, dtype):
    """Bytes that decoding keeps for each further token, from the shapes of the attentions' own caches: the model's, and
    the same with a GQA of its key/value heads (for as many as heads: of groups of up to four) and with MHA"""
    H, width = c.num_attention_heads, c.v_head_dim if c.attention == 'mla' else c.head_dim
    groups = min(g for g in range(1, H + 1) if H % g == 0 and H <= 4 * g)
    groups = c.num_key_value_heads if c.num_key_value_heads < H else groups
    gqa = lambda g: replace(c, attention='gqa', num_key_value_heads=g, head_dim=width)
    rows = []
    for name, other in ((c.attention, c), (f'gqa, {groups} key/value heads', gqa(groups)), ('mha', gqa(H))):
        numbers = [sum(map(torch.Size.numel, map(torch.Size, ATTENTION[other.attention].cache_shapes(other, n))))
                   for n in (1024, 2048)]
        layer = (numbers[1] - numbers[0]) // 1024 * dtype.itemsize
        rows.append({'attention': name, 'bytes_per_token_and_layer': layer,
                     'bytes_per_token': layer * c.num_hidden_layers})
    return rows

# ----------------------------------------------------------------------------------------------------------- decoding

def weights_read(model):
    """Bytes of the weights that decoding a token at batch 1 reads"""
    c, mtp = model.config, tuple(n for n, m in model.named_modules() if isinstance(m, MTP))
    return sum(p.numel() * p.element_size() * (c.num_experts_per_tok / c.n_routed_experts if '.experts.' in n else 1)
               for n, p in model.named_parameters()
               if not (mtp and n.startswith(mtp)) and (model.lm_head is None or 'embed_tokens' not in n))

class Times:
    """When tokens came: what transformers wants as a streamer. The prompt comes first"""
    def __init__(self):
        self.at = []
    def put(self, tokens):
        self.at.append(time.perf_counter())
    def end(self):
        pass

def decoder(stream):
    """stream: (prompt (B, T), n) -> n tokens (B, 1), one by one. -> a job: seconds to the first and of one more"""
    def job(prompt, n):
        times = [time.perf_counter()]
        for token in stream(prompt, n):
            token.tolist()          # waits for the GPU
            times.append(time.perf_counter())
        return [times[1] - times[0], (times[-1] - times[1]) / (n - 1)]
    return job

def generated(model):
    """decoder's job for a model of transformers"""
    def job(prompt, n):
        began, times = time.perf_counter(), Times()
        model.generate(prompt, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(prompt),
                       max_new_tokens=n, streamer=times)
        return [times.at[1] - began, (times.at[-1] - times.at[1]) / (n - 1)]
    return job

# -------------------------------------------------------------------------------------------------- ours and the others

def transformers_contenders(model, t, device, dtype, folder):
    """{name: (training step, decoding, parameters, FLOPs per token)} of transformers with the weights in folder"""
    from transformers import AutoModelForCausalLM, logging
    logging.disable_progress_bar()
    load = functools.partial(AutoModelForCausalLM.from_pretrained, folder)
    total, flops = parameter_table(model)['total'], flops_per_token(model, t.block_size)
    for kind in ('eager', 'batched_mm', 'grouped_mm') if model.moe_layers else ('eager',):
        options, step = {'experts_implementation': kind} if model.moe_layers else {}, None
        if kind != 'batched_mm':    # training with it is slow
            other = load(dtype=torch.float32, **options).to(device).train()
            loss_of = lambda x, y, other=other: F.cross_entropy(other(x).logits.float().flatten(0, 1), y.flatten())
            step = trainer(other, loss_of, model.config.vocab_size, t, device, dtype, adamw(other, device))
        yield f'transformers, {kind}', step, generated(load(dtype=dtype, **options).to(device).eval()), total, flops

def nanogpt_contender(path, longest, c, t, device, dtype):
    """nanoGPT's GPT of the same depth, width, heads and vocabulary, with its own optimizer"""
    if c.hidden_size % c.num_attention_heads:
        raise ValueError(f'vs={path}: num_attention_heads={c.num_attention_heads} must divide hidden_size there')
    spec = importlib.util.spec_from_file_location('nanogpt_model', Path(path, 'model.py'))
    theirs = sys.modules['nanogpt_model'] = importlib.util.module_from_spec(spec)
    with contextlib.redirect_stdout(sys.stderr):        # it prints
        spec.loader.exec_module(theirs)
        build = lambda: theirs.GPT(theirs.GPTConfig(max(t.block_size, longest), c.vocab_size, c.num_hidden_layers,
                                                    c.num_attention_heads, c.hidden_size, bias=False)).to(device)
        model, fast = build().train(), build().to(dtype).eval()
        optimizer = model.configure_optimizers(0.1, 1e-5, (0.9, 0.95), device.type)
    forward = torch.compile(model) if wants_compile(t, device) else model
    step = trainer(model, lambda x, y: forward(x, y.contiguous())[1], c.vocab_size, t, device, dtype, optimizer)

    def stream(idx, n):             # it has no cache, so that one call for n tokens is n calls for one
        for _ in range(n):
            idx = fast.generate(idx, 1)
            yield idx[:, -1:]
    flops = 6 * model.get_num_params() + 12 * c.num_hidden_layers * c.hidden_size * t.block_size
    return 'nanoGPT', step, decoder(stream), sum(p.numel() for p in model.parameters()), flops

def contenders(s, t, model, longest, device, dtype, folder):
    """Yields name, training step, decoding, parameters, FLOPs per token: ours with AdamW; with the config's optimizer,
    if that is another; ours without experts but with the same active FLOPs; the others"""
    c = model.config
    own, loss_of = Transformer.from_pretrained(folder, dtype=dtype).to(device).eval(), own_loss(model, t, device, dtype)
    if wants_compile(t, device) and (problem := compile_decoding(own)):
        raise ValueError(f'compile={t.compile}: {problem}: take --compile=false')
    train_on = functools.partial(trainer, vocab_size=c.vocab_size, t=t, device=device, dtype=dtype)
    count = lambda m: (parameter_table(m)['total'], flops_per_token(m, t.block_size))
    yield 'nanoseek', train_on(model, loss_of, optimizer=adamw(model, device)), decoder(own.stream), *count(model)
    if t.optimizer != 'adamw':
        optimizer = make_optimizer(t, model, dtype)
        yield f'nanoseek, {t.optimizer}', train_on(model, loss_of, optimizer=optimizer), None, *count(model)
    if model.moe_layers:
        other = Transformer(dense(c)).to(device).train()
        step = train_on(other, own_loss(other, t, device, dtype), optimizer=adamw(other, device))
        yield 'nanoseek, dense, same active FLOPs', step, None, *count(other)
    if s.vs == 'transformers':
        yield from transformers_contenders(model, t, device, dtype, folder)
    elif s.vs:
        yield nanogpt_contender(s.vs, longest, c, t, device, dtype)

# -------------------------------------------------------------------------------------------------------------- model

def measure(s, t, given, folder):
    """-> all that is measured of a model, as JSON has it"""
    device, dtype = pick_device(t)
    if t.fp8:
        check_fp8(t.fp8, device, dtype)
    init = train.init_folder(t) if t.init_from else None
    c = train.model_config(train.chosen(given), init, None)
    alone = train.OneDevice()
    train.fit_settings(t, c, dtype, alone.room(device), alone)      # batch_size=0
    found = {'machine': machine(device, dtype), 'settings': {**asdict(s), **asdict(t), **asdict(c)},
             'model': architecture(c)}
    estimate, measured = sum(memory_estimate(Transformer, c, t, dtype, device.type)), measured_memory(t, c)
    found['memory'] = {'estimate_bytes': estimate, 'measured_bytes': measured,
                       'ratio': estimate / measured if measured else None}
    found['cache'] = cache_rows(c, dtype)
    torch.manual_seed(t.seed)
    model = Transformer(c)
    model.save_pretrained(folder)
    if t.fp8:
        to_fp8(model, t.fp8)
    model.to(device).train()
    contexts = sorted({min(n, c.max_position_embeddings - s.new_tokens) for n in s.numbers('contexts')})
    if contexts[0] < 1:
        raise ValueError(f'new_tokens={s.new_tokens}: must be below max_position_embeddings='
                         f'{c.max_position_embeddings}')
    jobs = list(contenders(s, t, model, contexts[-1] + s.new_tokens, device, dtype, folder))
    tokens, peak = t.batch_size * t.block_size, found['machine']['matmul_flops']
    steps = medians({name: functools.partial(seconds, step) for name, step, *_ in jobs if step}, s.rounds)
    found['training'] = [{'name': name, 'ms': 1e3 * steps[name][0], 'tokens_per_s': tokens / steps[name][0],
                          'mfu': tokens * flops / steps[name][0] / peak, 'parameters': total, 'flops_per_token': flops,
                          'ratio': steps[name][0] / steps['nanoseek'][0]}
                         for name, _, _, total, flops in jobs if name in steps]
    found['decoding'], read = [], weights_read(model) / 4 * dtype.itemsize
    for context in contexts:
        for batch in s.numbers('batch_sizes'):
            prompt = torch.randint(0, c.vocab_size, (batch, context), device=device)
            times = medians({name: functools.partial(decode, prompt, s.new_tokens)
                             for name, _, decode, *_ in jobs if decode}, s.rounds)
            for name, (first, each) in times.items():
                of_copy = read / each / found['machine']['copy_bytes'] if (name, batch) == ('nanoseek', 1) else None
                found['decoding'].append({'name': name, 'context': context, 'batch': batch, 'first_ms': 1e3 * first,
                                          'ms_per_token': 1e3 * each, 'tokens_per_s': batch / each,
                                          'ratio': each / times['nanoseek'][1], 'of_copy': of_copy})
    parts, step, source = parts_of_step(s, t, model, device, dtype)
    found |= {'parts': [{'part': name, 'ms': 1e3 * spent} for name, spent in parts.items()],
              'step_of_parts_ms': 1e3 * step, 'data': source}
    return found

def show(found, optimizer):
    """found -> tables on stdout"""
    m, t = found['machine'], found['settings']
    print(f'{m["name"]}, {m["cores"]} cores, {m["device"]} {m["dtype"]}, torch {m["torch"]}: a matmul reaches '
          f'{m["matmul_flops"] / 1e12:.2f} TFLOP/s, a copy {m["copy_bytes"] / 1e9:.1f} GB/s read and written\n'
          f'{found["model"]}\n\ntraining, {t["batch_size"]} x {t["block_size"]} random tokens, AdamW unless it says '
          f'otherwise, compile={t["compile"]}\n{"":36}{"ms a step":>10}{"tokens/s":>11}{"MFU":>6}{"parameters":>14}'
          f'{"MFLOP/token":>13}{"time":>9}')
    for r in found['training']:
        print(f'{r["name"]:36}{r["ms"]:10.1f}{r["tokens_per_s"]:11,.0f}{r["mfu"]:6.0%}{r["parameters"]:14,}'
              f'{r["flops_per_token"] / 1e6:13.1f}{r["ratio"]:8.2f}x')
    total, data = sum(r['ms'] for r in found['parts']), found['data']
    print(f'\n{f"a step by part ({optimizer}; data: {data})":60}{"ms":>10}{"share":>7}')
    rows = ({'part': 'together', 'ms': total}, {'part': 'such a step without marks', 'ms': found['step_of_parts_ms']})
    for r in (*found['parts'], *rows):
        print(f'{r["part"]:60}{r["ms"]:10.2f}{r["ms"] / total:7.0%}')
    memory = found['memory']
    known = f'{memory["measured_bytes"] / 2**20:,.0f} MB, {memory["ratio"]:.2f}' if memory['ratio'] else 'unknown'
    print(f'\nmemory of a step without Python and torch: estimated {memory["estimate_bytes"] / 2**20:,.0f} MB, '
          f'measured {known}\n\n{"cache":36}{"bytes per token and layer":>27}{"in all layers":>15}')
    for r in found['cache']:
        print(f'{r["attention"]:36}{r["bytes_per_token_and_layer"]:27,}{r["bytes_per_token"]:15,}')
    print(f'\n{"decoding":28}{"context":>8}{"batch":>6}{"first ms":>10}{"ms a token":>11}{"tokens/s":>10}{"time":>9}'
          f'{"weights read, of a copy":>25}')
    for r in found['decoding']:
        of_copy = f'{r["of_copy"]:25.0%}' if r['of_copy'] else ''
        print(f'{r["name"]:28}{r["context"]:8}{r["batch"]:6}{r["first_ms"]:10.1f}{r["ms_per_token"]:11.2f}'
              f'{r["tokens_per_s"]:10.1f}{r["ratio"]:8.2f}x{of_copy}')
    if t['vs']:
        best = min((r for r in found['training'] if not r['name'].startswith('nanoseek')), key=lambda r: r['ms'])
        print(f'\na training step of {best["name"]}, the best there, takes {best["ratio"]:.2f} times as long as ours')

def bench_model(s, t, given, folder):
    found = measure(s, t, given, folder)
    print(json.dumps(found)) if s.json else show(found, t.optimizer)

# ------------------------------------------------------------------------------------------------------------- corpus

def make_corpus(path, megabytes, seed=0):
    """A .jsonl file of documents: words in Shakespeare's frequencies, one in ten made up, as new texts bring them"""
    rng = np.random.default_rng(seed)
    words = (HERE / 'data/shakespeare/input.txt').read_text(encoding='utf-8').split()
    heads, tails = ([w[a:b] for w in words if w.isalpha()] for a, b in ((0, 3), (-4, None)))
    new = [heads[i] + tails[j] for i, j in rng.integers(0, len(heads), (200_000, 2)).tolist()]
    new = [new[int(i)] for i in len(new) * rng.random(len(words) // 9) ** 3]            # some come often, most do not
    pool, size = words + new, 0
    with open(path, 'w', encoding='utf-8') as f:
        while size < megabytes * 10**6:
            for n in rng.lognormal(6, 1, 1000).astype(int):
                text = ' '.join([pool[i] for i in rng.integers(0, len(pool), n + 1).tolist()])
                size += f.write(json.dumps({'text': text}) + '\n')

def read_corpus(path):
    with open(path, encoding='utf-8') as f:
        return [json.loads(line)['text'] for line in f]

# ------------------------------------------------------------------------------------------------ processes and memory

def tree_mb(pid):
    """MB of a process and all below it, what they share counted once (Linux)"""
    try:
        children = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
        pss = re.search(r'^Pss: +(\d+)', Path(f'/proc/{pid}/smaps_rollup').read_text(), re.M)
        return int(pss[1]) / 1024 + sum(map(tree_mb, children))
    except (OSError, TypeError):        # it has ended
        return 0.0

def timed(*command, memory=False):
    """-> seconds of a command, and the peak of its MB where that is wanted (to ask costs a little)"""
    began, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=HERE)
    while memory and process.poll() is None:
        peak = max(peak, tree_mb(process.pid))
        time.sleep(1)
    if process.wait():
        raise OSError(f'{" ".join(map(str, command))} ended with status {process.returncode}')
    return time.perf_counter() - began, peak

def library(tokenizer, texts):
    """Seconds of the tokenizer's own library on all cores, without anything around it"""
    if tokenizer == 'gpt2':
        import tiktoken
        encode = functools.partial(tiktoken.get_encoding('gpt2').encode_ordinary_batch, num_threads=os.cpu_count())
    else:
        own = load_tokenizer(folders.hub_folder(tokenizer, ['tokenizer.json']))
        encode = functools.partial(own.encode_batch_fast, add_special_tokens=False)
    began = time.perf_counter()
    for i in range(0, len(texts), 1000):
        encode(texts[i:i + 1000])
    return time.perf_counter() - began

NANOGPT = '''
import sys, numpy as np, tiktoken
from datasets import load_dataset
if __name__ == '__main__':
    source, target, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
    encoding = tiktoken.get_encoding('gpt2')

    def process(example):
        ids = encoding.encode_ordinary(example['text']) + [encoding.eot_token]
        return {'ids': ids, 'len': len(ids)}
    data = load_dataset('json', data_files=source, split='train', cache_dir=target, num_proc=workers)
    data = data.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    data = data.map(process, remove_columns=['text'], num_proc=workers)
    for split, part in data.items():
        total = int(np.sum(part['len'], dtype=np.uint64))
        out, at, parts = np.memmap(f'{target}/{split}.bin', np.uint16, 'w+', shape=(total,)), 0, min(1024, len(part))
        for i in range(parts):
            block = np.concatenate(part.shard(parts, i, contiguous=True).with_format('numpy')['ids'])
            out[at:at + len(block)] = block
            at += len(block)
        out.flush()
'''

def bench_prepare(s, folder):
    tenth, small, large, nanogpt = (folder / n for n in ('tenth.jsonl', 'small.jsonl', 'large.jsonl', 'nanogpt.py'))
    for file, megabytes in ((small, min(s.corpus_mb, 200)), (tenth, min(s.corpus_mb, 200) / 10), (large, s.corpus_mb)):
        make_corpus(file, megabytes)
    nanogpt.write_text(NANOGPT)
    texts = read_corpus(small)
    mb, more = (sum(len(text.encode()) for text in found) / 1e6 for found in (texts, texts[len(read_corpus(tenth)):]))
    ours = lambda file, *more: (sys.executable, HERE / 'prepare.py', file, f'--tokenizer={s.tokenizer}',
                                '--resume=never', f'--out_dir={folder / file.stem}', *more)
    theirs = lambda file: (sys.executable, nanogpt, file, folder / 'cache', str(os.cpu_count()))
    print(f'{os.cpu_count()} cores, tokenizer {s.tokenizer}; {mb:.0f} MB of text, medians of {s.rounds}, in turn:')
    rates = {'library': [], 'prepare.py': []}
    for _ in range(s.rounds):
        rates['library'].append(mb / library(s.tokenizer, texts))
        rates['prepare.py'].append(more / (timed(*ours(small))[0] - timed(*ours(tenth))[0]))    # the start is in both
    for name, found in rates.items():
        print(f'{name:12} {statistics.median(found):8.2f} MB/s')
    ratio = statistics.median(b / a for a, b in zip(*rates.values()))
    print(f'ratio        {ratio:8.2f}; prepare.py: by what the last nine tenths take, without its start')
    size = large.stat().st_size / 1e6
    for name, command in (('prepare.py', ours(large)), ("nanoGPT's way", theirs(large))):
        if s.tokenizer == 'gpt2' or name == 'prepare.py':
            seconds, peak = timed(*command, memory=True)
            print(f'{size:,.0f} MB, {name}: {seconds:,.0f} s, {size / seconds:.2f} MB/s, {peak:,.0f} MB of memory')

def main(s, t, given):
    folder = Path(s.work_dir or tempfile.mkdtemp(prefix='nanoseek-bench-'))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        bench_prepare(s, folder) if s.corpus_mb else bench_model(s, t, given, folder)
    finally:
        if not s.work_dir:
            shutil.rmtree(folder)

if __name__ == '__main__':
    with config.user_errors(needs_stdout=True):
        own, training, model_settings = config.load(Settings, train.Settings, Config, usage=__doc__)
        main(Settings(**own), train.Settings(**training), model_settings)
