"""Generate text from a checkpoint.

    python sample.py --prompt "Before we proceed"           # the newest checkpoint under out/
    python sample.py --checkpoint=out/shakespeare/step-000750 --temperature=0 --max_new_tokens=100
    python sample.py --checkpoint=HuggingFaceTB/SmolLM2-135M --prompt "The capital of France is"
    cat scene.txt | python sample.py --prompt=-              # - reads stdin, @scene.txt a file

A checkpoint is any Llama, Glm4Moe or DeepseekV3 model with its tokenizer.json, in a folder or on the Hugging Face Hub.
Text appears as it is generated, on stdout; everything else goes to stderr.
"""
import os, signal, sys, time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault('GOMP_SPINCOUNT', '10000')    # see train.py; here short parallel parts follow fast

import torch

import config
from model import Transformer
from nanoseek import hf
from prepare import decode, encode, load_tokenizer

@dataclass
class Settings:
    """Settings of sample.py"""
    prompt: str = '\n'              # text to go on from; -: stdin; @FILE: a file's
    checkpoint: str = ''            # a model's folder or Hub id; if empty the newest checkpoint under out/
    num_samples: int = 1            # how many texts, one after the other
    max_new_tokens: int = 500       # tokens of each
    temperature: float = 0.8        # 0: always the likeliest token; above 1: wilder
    top_k: int | None = 50          # only among the k likeliest; none: all
    top_p: float | None = None      # only among the likeliest that make up this probability; none: all
    stop: str | None = None         # a token to stop at; none: the model's end-of-text token, where it has one
    seed: int = 1337                # of the choices
    device: str = 'auto'            # auto, cpu, cuda, mps
    dtype: Literal['float32', 'bfloat16', 'float16'] = 'float32'  # of the weights and the cache
    compile: bool = False           # torch.compile: some ten seconds to a minute first, then up to three times as fast

    def __post_init__(self):
        for name, ok, limit in (('num_samples', self.num_samples >= 1, 'at least 1'),
                                ('max_new_tokens', self.max_new_tokens >= 1, 'at least 1'),
                                ('temperature', self.temperature >= 0, 'at least 0'),
                                ('top_k', self.top_k is None or self.top_k >= 1, 'at least 1, or none'),
                                ('top_p', self.top_p is None or 0 < self.top_p <= 1, 'above 0 and at most 1, or none')):
            if not ok:
                raise ValueError(f'{name}={getattr(self, name)}: must be {limit}')

def newest_checkpoint(root='out'):
    found = sorted(Path(root).glob('**/step-*/config.json'), key=lambda p: p.stat().st_mtime)
    if not found:
        raise ValueError(f'no checkpoint under {root}/: train a model first, or give --checkpoint=DIR')
    return found[-1].parent

def read_prompt(prompt):
    if prompt != '-' and not prompt.startswith('@'):
        return prompt
    data = sys.stdin.buffer.read() if prompt == '-' else Path(prompt[1:]).read_bytes()
    try:
        return data.decode('utf-8')
    except UnicodeDecodeError as e:
        raise ValueError(f'prompt {prompt} is not UTF-8 text: byte 0x{data[e.start]:02x} at offset {e.start}') from e

def load(s):
    """-> model, tokenizer, prompt's ids (1, T), ids at which a text ends"""
    checkpoint = hf.hub_folder(s.checkpoint, hf.MODEL_FILES) if s.checkpoint else newest_checkpoint()
    best = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        torch.empty(1, device=best if s.device == 'auto' else s.device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f'device={s.device}: not usable here ({str(e).splitlines()[0]}); --device={best} is') from e
    model = Transformer.from_pretrained(checkpoint, dtype=getattr(torch, s.dtype)).eval()
    tokenizer = load_tokenizer(checkpoint)
    ids = encode(tokenizer, read_prompt(s.prompt))
    limit = model.config.max_position_embeddings - 1
    if not 1 <= len(ids) <= limit:
        raise ValueError(f'the prompt has {len(ids):,} tokens: must be 1 to {limit:,}, the context less one')
    stop = hf.stop_ids(checkpoint, model.config) if s.stop is None else [tokenizer.token_to_id(s.stop)]
    if stop == [None]:
        raise ValueError(f"stop={s.stop!r} is not one token of this model's vocabulary")
    print(f'{s.checkpoint or checkpoint}: {sum(p.numel() for p in model.parameters()):,} parameters', file=sys.stderr)
    model = model.to(best if s.device == 'auto' else s.device)
    if s.compile and (problem := compile_decoding(model)):
        print(f'{problem}: going on without it', file=sys.stderr)
    return model, tokenizer, torch.tensor([ids], device=model.head.device), stop

def compile_decoding(model):
    """Single tokens go through torch.compile from now on: compiled once for all lengths of the cache, and for good, as
    dtype, device and mode are not looked at again (checking every weight would cost half a millisecond a token).
    -> a line that says why it does not work here, or None"""
    eager, skip = model.hidden, torch.compiler.skip_guard_on_all_nn_modules_unsafe
    compiled = torch.compile(eager, dynamic=True, fullgraph=True, options={'guard_filter_fn': skip})
    single = lambda idx, cache: cache is not None and idx.shape[1] == 1 < cache.length
    model.hidden = lambda idx, cache=None: (compiled if single(idx, cache) else eager)(idx, cache)
    try:
        list(model.stream(torch.zeros(1, 2, dtype=torch.int64, device=model.head.device), 2))
    except Exception as e:      # no compiler, or one that cannot: whatever its layers raise
        model.hidden = eager
        return f'torch.compile does not work here ({(str(e).strip() or type(e).__name__).splitlines()[0][:100]})'

def stream_text(model, tokenizer, ids, stop, s):
    """Yields a text for every new token, empty while a character of several tokens is not complete"""
    from tokenizers.decoders import DecodeStream
    decoder = DecodeStream(ids=ids[0].tolist(), skip_special_tokens=False)
    for token in model.stream(ids, s.max_new_tokens, s.temperature, s.top_k, s.top_p):
        if token.item() in stop:
            break
        yield decoder.step(tokenizer, token.item()) or ''

def main(s):
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    if hasattr(signal, 'SIGPIPE'):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)   # `| head` is no error
    with config.user_errors():
        model, tokenizer, ids, stop = load(s)
    torch.manual_seed(s.seed)
    count, began = 0, time.perf_counter()
    for i in range(s.num_samples):
        print('\n---' * (i > 0), decode(tokenizer, ids[0].tolist()), sep='\n' * (i > 0), end='', flush=True)
        for text in stream_text(model, tokenizer, ids, stop, s):
            print(text, end='', flush=True)
            count += 1
    print()
    print(f'{count / (time.perf_counter() - began):.0f} tokens/s', file=sys.stderr)

if __name__ == '__main__':
    with config.user_errors():
        settings = Settings(**config.load(Settings, usage=__doc__)[0])
    main(settings)
