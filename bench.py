"""How fast, how much memory, against whom.

    python bench.py config/shakespeare.py                       # training and decoding of a model, on random tokens
    python bench.py config/shakespeare.py --vs=transformers     # the same weights there, with each kind of its experts
    python bench.py --corpus_mb=2000        # prepare.py on made-up text, the tokenizers' libraries, and nanoGPT's way

Measures in turn, after a warm-up, and prints medians and ratios; run nothing else meanwhile.
"""
import functools, json, math, os, re, shutil, statistics, subprocess, sys, tempfile, time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

import config, prepare, train
from model import Config, Transformer

HERE = Path(__file__).resolve().parent


@dataclass
class Settings:
    """Settings of bench.py"""
    vs: Literal['', 'transformers'] = ''  # also measure the same weights there
    rounds: int = 5                 # of each measurement
    new_tokens: int = 64            # that are decoded, at batch 1
    context: int = 64               # tokens before them
    corpus_mb: int = 0              # not a model, but prepare.py, on so many megabytes of text
    tokenizer: str = 'gpt2'         # what prepare.py gets as --tokenizer
    work_dir: str = ''              # where text and token files go; if empty a temporary folder, removed afterwards

# -------------------------------------------------------------------------------------------------------------- model

def trainer(model, loss_of, t, device, dtype):
    """-> a function that takes an optimizer step on random tokens, and waits until it is done"""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=device.type in ('cpu', 'cuda'))
    vocab_size = model.config.vocab_size

    def step():
        tokens = torch.randint(0, vocab_size, (t.batch_size, t.block_size + 1), device=device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()
    return step

def contenders(s, model, t, device, dtype, folder):
    """{name: (training step, decoding)}: ours, and those of transformers, which start from the weights in folder"""
    prompt = torch.randint(0, model.config.vocab_size, (1, s.context), device=device)
    forward, _ = train.compiled(model, model, t, device, lambda: torch.autocast(device.type, dtype,
                                                                                enabled=dtype != torch.float32))
    step = trainer(model, lambda x, y: forward(x, y)[1], t, device, dtype)
    own = Transformer.from_pretrained(folder, dtype=dtype).to(device).eval()
    found = {'nanoseek': (step, lambda: own.generate(prompt, s.new_tokens))}
    if s.vs:
        from transformers import AutoModelForCausalLM, logging
        logging.disable_progress_bar()
        load = functools.partial(AutoModelForCausalLM.from_pretrained, folder)
        for kind in ('eager', 'batched_mm', 'grouped_mm') if model.moe_layers else ('eager',):
            options = {'experts_implementation': kind} if model.moe_layers else {}
            other = load(dtype=torch.float32, **options).to(device).train()
            fast = load(dtype=dtype, **options).to(device).eval()
            loss_of = lambda x, y, other=other: F.cross_entropy(other(x).logits.float().flatten(0, 1), y.flatten())
            decode = functools.partial(fast.generate, prompt, do_sample=False, eos_token_id=None,
                                       attention_mask=torch.ones_like(prompt), max_new_tokens=s.new_tokens)
            step = trainer(other, loss_of, t, device, dtype) if kind != 'batched_mm' else None  # it is slow
            found[f'transformers, {kind}'] = step, decode
    return found

def medians(jobs, rounds):
    """{name: function} -> {name: median of the seconds it takes}, measured in turn"""
    times = {name: [] for name in jobs}
    for i in range(rounds + 2):
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            times[name] += [time.perf_counter() - began] * (i > 1)      # two for warming up
    return {name: statistics.median(found) for name, found in times.items()}

def bench_model(s, t, given, folder):
    device, dtype = train.pick_device(t)
    model = Transformer(Config(**{'vocab_size': 256, **{k: v for k, v in given.items() if k != 'vocab_size' or v}}))
    model.save_pretrained(folder)
    if t.fp8:
        train.check_fp8(t.fp8, device, dtype)
        train.to_fp8(model, t.fp8)
    model.to(device).train()
    estimate, rate = sum(train.memory_estimate(t, model.config, dtype)), train.matmul_rate(device, dtype)
    print(f'{device.type} {str(dtype)[6:]}, {t.batch_size} x {t.block_size} tokens; a matmul reaches {rate / 1e12:.2f} '
          f'TFLOP/s here\n{train.architecture(model.config)}')
    tokens, flops = t.batch_size * t.block_size, train.flops_per_token(model, t.block_size)
    jobs = contenders(s, model, t, device, dtype, folder)
    steps, decodes = (medians({name: found[i] for name, found in jobs.items() if found[i]}, s.rounds) for i in (0, 1))
    rows = [(name, steps.get(name, math.inf), decodes[name]) for name in jobs]
    print(f'{"":28}{"ms a step":>12}{"tokens/s":>12}{"MFU":>6}{"ours is":>9}{"decoded/s":>12}{"ours is":>9}')
    for name, step, decode in rows:
        trained = (f'{step * 1e3:12.1f}{tokens / step:12,.0f}{tokens * flops / step / rate:6.0%}'
                   f'{step / rows[0][1]:8.2f}x') if step < math.inf else f'{"-":>12}{"-":>12}{"-":>6}{"-":>9}'
        print(f'{name:28}{trained}{s.new_tokens / decode:12.1f}{decode / rows[0][2]:8.2f}x')
    print(f'memory: {estimate / 2**20:,.0f} MB by the estimate, without Python and torch')

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
        own = prepare.load_tokenizer(prepare.hub_folder(tokenizer, ['tokenizer.json']))
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
    with config.user_errors():
        own, training, model_settings = config.load(Settings, train.Settings, Config, usage=__doc__)
        main(Settings(**own), train.Settings(**training), model_settings)
