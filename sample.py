"""Text from a checkpoint.

    python sample.py --prompt "Before we proceed"               # the newest checkpoint under out/
    python sample.py --checkpoint=out/shakespeare --temperature=0 --max_new_tokens=100
    python sample.py --checkpoint=HuggingFaceTB/SmolLM2-135M --prompt "The capital of France is"
    python sample.py --checkpoint=HuggingFaceTB/SmolLM2-135M-Instruct --chat --prompt "Hello!"
    cat scene.txt | python sample.py --prompt=-                 # - reads stdin, @scene.txt a file

A checkpoint is any Llama, Glm4Moe or DeepseekV3 model with its tokenizer.json, in a folder or on
the Hugging Face Hub; the folder of a run means its newest checkpoint. Text appears on stdout as it
is generated, everything else on stderr.
"""
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

# Idle OpenMP threads wait so long for work before they sleep: decoding has many short parallel
# parts. (See nanoseek/tuning.py; read when torch is loaded.)
os.environ.setdefault('GOMP_SPINCOUNT', '10000')

import torch  # noqa: E402

import config  # noqa: E402
from model import Cache, Transformer  # noqa: E402
from nanoseek import chat, checkpoint, folders  # noqa: E402
from nanoseek.device import in_a_line, is_out_of_memory, pick_device  # noqa: E402
from nanoseek.ops import compute_dtype, decoding_kernels  # noqa: E402
from nanoseek.speculate import Drafts  # noqa: E402
from nanoseek.tokenizer import decode, encode, load_tokenizer  # noqa: E402


Choice = Literal['auto', True, False]


@dataclass
class Settings:
    """Settings of sample.py"""
    prompt: str = '\n'              # text to go on from; -: stdin; @FILE: a file's
    checkpoint: str = ''            # a model's folder or Hub id; if empty the newest one under out/
    num_samples: int = 1            # how many texts, one after the other
    max_new_tokens: int = 500       # tokens of each
    temperature: float = 0.8        # 0: always the likeliest token; above 1: wilder
    top_k: int | None = 50          # only among the k likeliest; none: all
    top_p: float | None = None      # only among the likeliest that make up this much; none: all
    stop: str | None = None         # a token to stop at; none: those of the model, where it has any
    chat: bool = False              # put the prompt into the model's chat template, show the answer
    special_in_prompt: Choice = 'auto'  # '<|im_end|>' in it is that token; auto: as in the data
    speculate: Choice = 'auto'      # MTP layers draft, nothing is lost; auto: where it may pay
    seed: int = 1337                # of the choices
    device: str = 'auto'            # auto, cpu, cuda, mps
    dtype: Literal['float32', 'bfloat16', 'float16'] = 'float32'  # of the weights and the cache
    compile: bool = False           # torch.compile: a minute first, then up to 3 times as fast

    def __post_init__(self):
        if self.num_samples < 1:
            self.refuse('num_samples', 'at least 1')
        if self.max_new_tokens < 1:
            self.refuse('max_new_tokens', 'at least 1')
        if self.temperature < 0:
            self.refuse('temperature', 'at least 0')
        if self.top_k is not None and self.top_k < 1:
            self.refuse('top_k', 'at least 1, or none')
        if self.top_p is not None and not 0 < self.top_p <= 1:
            self.refuse('top_p', 'above 0 and at most 1, or none')

    def refuse(self, name, limit):
        raise ValueError(f'{name}={getattr(self, name)}: must be {limit}')


def find_checkpoint(name):
    """The setting checkpoint -> a folder with a model"""
    if name:
        return folders.hub_folder(checkpoint.of_run(name), folders.MODEL_FILES)
    found = list(Path('out').glob('**/step-*/config.json'))
    if not found:
        raise ValueError('no checkpoint under out/: train a model first, or give --checkpoint=DIR')
    return max(found, key=lambda file: file.stat().st_mtime).parent


def read_prompt(prompt):
    """The setting prompt -> the text that it means"""
    if prompt == '-':
        if sys.stdin is None:
            raise ValueError('prompt=-: stdin is closed')
        data = sys.stdin.buffer.read()
    elif prompt.startswith('@'):
        data = Path(prompt[1:]).read_bytes()
    else:
        return prompt
    try:
        return data.decode('utf-8')
    except UnicodeDecodeError as e:
        raise ValueError(f'prompt={prompt!r} is not UTF-8 text: byte 0x{data[e.start]:02x} at '
                         f'offset {e.start}') from e


def encode_prompt(s, folder, tokenizer):
    """-> the ids that the text goes on from"""
    text = read_prompt(s.prompt)
    if s.chat:
        text = chat.render(folder, [{'role': 'user', 'content': text}])
        tokenizer.encode_special_tokens = False         # what a template spells, it means
    elif s.special_in_prompt != 'auto':
        tokenizer.encode_special_tokens = not s.special_in_prompt
    return encode(tokenizer, text)


def stop_ids(s, folder, model, tokenizer):
    """-> the ids at which a text ends"""
    if s.stop is None:
        found = folders.stop_ids(folder, model.config)
        if s.chat:
            found = found + chat.end_of_answer(folder, tokenizer)
        return found
    stop = tokenizer.token_to_id(s.stop)
    if stop is None:
        raise ValueError(f"stop={s.stop!r} is not one token of this model's vocabulary")
    return [stop]


def drafts_of(s, model):
    """The setting speculate -> what counts the drafts, or None where there are none. auto: not
    where a CPU's compiled passes of one token are so quick that drafts cost more than they save"""
    if s.speculate is True and not model.can_draft:
        raise ValueError('speculate=true: this model has no MTP layers, or linear attention, which '
                         'cannot go back')
    if s.speculate is False or not model.can_draft:
        return None
    if s.speculate == 'auto' and s.compile and model.head.device.type == 'cpu':
        return None
    return Drafts()


def compile_decoding(model, drafts=None):
    """Passes of few tokens go through torch.compile from now on: compiled once for all lengths of
    the cache, and for good, as dtype, device and mode are not looked at again (checking every
    weight would cost half a millisecond a token). drafts: None where the MTP layers do not draft
    -> a line that says why it does not work here, or None
    """
    hidden = model.hidden
    mtp = model.mtp
    compiled_hidden = compiled(hidden)
    compiled_mtp = compiled(mtp)
    most = 1
    if drafts is not None:
        most += model.config.num_nextn_predict_layers

    def is_short(tokens, cache):
        return cache is not None and tokens.shape[1] <= most and cache.length > 1

    def hidden_of_few(idx, cache=None):
        if is_short(idx, cache):
            return compiled_hidden(idx, cache)
        return hidden(idx, cache)

    def mtp_of_few(k, h, tokens, cache=None, mask=None):
        if is_short(tokens, cache):
            return compiled_mtp(k, h, tokens, cache)
        return mtp(k, h, tokens, cache, mask)

    model.hidden = hidden_of_few
    model.mtp = mtp_of_few
    try:
        compile_all(model, most)
    except Exception as e:      # no compiler, or one that cannot: whatever its layers raise
        model.hidden = hidden
        model.mtp = mtp
        return f'torch.compile does not work here ({in_a_line(e)})'
    return None


@torch.no_grad()
def compile_all(model, most):
    """Goes once through what compile_decoding compiles: passes of 1 to most tokens"""
    dtype = compute_dtype(model.head)

    def cache_of(layers):
        config = replace(model.config, num_hidden_layers=layers)
        cache = Cache(config, 1, 64, model.head, dtype)         # with room to spare
        cache.length = 2
        return cache

    for rows in range(1, most + 1):
        few = torch.zeros(1, rows, dtype=torch.int64, device=model.head.device)
        with decoding_kernels(rows):
            h, _ = model.hidden(few, cache_of(model.config.num_hidden_layers))
            for depth in range(1, most):
                model.mtp(depth, h, few, cache_of(1))


def compiled(function):
    no_checks = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    return torch.compile(function, dynamic=True, fullgraph=True,
                         options={'guard_filter_fn': no_checks})


def stream_text(model, tokenizer, ids, stop, s, drafts):
    """Yields a text for every new token, empty while a character of several tokens is not
    complete."""
    from tokenizers.decoders import DecodeStream
    decoder = DecodeStream(ids=ids[0].tolist(), skip_special_tokens=False)
    for token in model.stream(ids, s.max_new_tokens, s.temperature, s.top_k, s.top_p, drafts):
        if token.item() in stop:
            break
        yield decoder.step(tokenizer, token.item()) or ''


def load(folder, s):
    """A folder with a model -> it on the settings' device, and its tokenizer"""
    device, dtype = pick_device(s)
    model = Transformer.from_pretrained(folder, dtype=dtype).eval()
    return model.to(device), load_tokenizer(folder)


def check_prompt(ids, folder, config):
    """ValueError where the model cannot go on from these ids"""
    limit = config.max_position_embeddings - 1
    if not 1 <= len(ids) <= limit:
        raise ValueError(f'the prompt has {len(ids):,} tokens: must be 1 to {limit:,}, one less '
                         'than the context')
    if max(ids) >= config.vocab_size:
        raise ValueError(f'{folder}: tokenizer.json is of another model: it has an id {max(ids):,} '
                         f'in this prompt, the model a vocabulary of {config.vocab_size:,}')


def main(s):
    folder = find_checkpoint(s.checkpoint)
    model, tokenizer = load(folder, s)
    ids = encode_prompt(s, folder, tokenizer)
    check_prompt(ids, folder, model.config)
    stop = stop_ids(s, folder, model, tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    print(f'{s.checkpoint or folder}: {parameters:,} parameters', file=sys.stderr)
    drafts = drafts_of(s, model)
    if s.compile:
        problem = compile_decoding(model, drafts)
        if problem:
            print(f'{problem}: going on without it', file=sys.stderr)

    torch.manual_seed(s.seed)
    prompt = torch.tensor([ids], device=model.head.device)                            # (1, T)
    count = 0
    began = time.perf_counter()
    for i in range(s.num_samples):
        if i > 0:
            print('\n---')
        if not s.chat:
            print(decode(tokenizer, ids), end='', flush=True)
        for text in stream_text(model, tokenizer, prompt, stop, s, drafts):
            print(text, end='', flush=True)
            count += 1
    print(flush=True)
    seconds = time.perf_counter() - began
    speed = f'{count / seconds:.0f} tokens/s'
    if drafts is not None:
        speed += f', {drafts.share:.0%} of {drafts.made:,} drafts accepted'
    print(speed, file=sys.stderr)


def in_words(error):
    """What torch raises where the machine or the model is at fault -> a line for the user. None
    for what may be a bug"""
    if is_out_of_memory(error):
        return ('out of memory: take a shorter prompt, fewer --max_new_tokens, or '
                '--dtype=bfloat16, which halves the weights and the cache')
    text = str(error)
    if 'probability tensor' in text or 'device-side assert' in text:
        return ("the model's output is not finite: its weights are damaged, or have no place in "
                'this dtype (--dtype=float32 has the widest range)')
    return None


if __name__ == '__main__':
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))      # quiet, also while torch compiles
    with config.user_errors(needs_stdout=True):
        settings, = config.load(Settings, usage=__doc__)
        try:
            main(Settings(**settings))
        except (MemoryError, RuntimeError) as e:
            reason = in_words(e)
            if reason is None:
                raise
            raise ValueError(reason) from e
