"""Text from a checkpoint.

    python sample.py --prompt "Before we proceed"               # the newest checkpoint under out/
    python sample.py --checkpoint=out/shakespeare --temperature=0 --max_new_tokens=100
    python sample.py --checkpoint=HuggingFaceTB/SmolLM2-135M-Instruct --chat    # line by line

A checkpoint is a folder or Hub id of a Llama, Glm4Moe or DeepseekV3 model; a run's folder stands
for its newest one. Text goes to stdout while it is generated, everything else to stderr.
"""
import os
os.environ.setdefault('GOMP_SPINCOUNT', '10000')    # decoding is many short parallel parts
import glob
import itertools
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from model import Transformer
from nanoseek import checkpoint, hf, settings
from nanoseek.chat import Chat
from nanoseek.device import pick_device
from nanoseek.generate import Drafts, Sampling, compile_decoding, stream
from nanoseek.tokenizer import decode, encode, load_tokenizer


@dataclass
class Settings:
    """Settings of sample.py"""
    prompt: str | None = None       # the text to continue; special tokens in it are tokens
    checkpoint: str = ''            # a folder or Hub id; if empty the newest one under out/
    num_samples: int = 1            # how many texts, one after the other
    max_new_tokens: int = 500       # the most tokens of a text
    temperature: float = 0.8        # 0: always the likeliest token; above 1: wilder
    top_k: int | None = 50          # only among the k likeliest; none: all
    top_p: float | None = None      # only among the likeliest that make up this much; none: all
    chat: bool = False              # talk, by the model's chat template; with a prompt: one answer
    speculate: Literal['auto', True, False] = 'auto'  # MTP layers draft; auto: where it may pay
    seed: int = 1337                # of the random choices
    device: str = 'auto'            # auto, cpu, cuda, mps
    dtype: Literal['float32', 'bfloat16', 'float16'] = 'float32'  # of the weights and the cache
    compile: bool = False           # torch.compile: a minute first, then up to 3 times as fast

    def __post_init__(self):
        settings.require(self, 'top_k', self.top_k is None or self.top_k >= 1, 'at least 1')
        settings.require(self, 'top_p', self.top_p is None or 0 < self.top_p <= 1,
                         'above 0 and at most 1, or none')


def find_checkpoint(name):
    """Return the folder of a checkpoint, by default the newest one under out/."""
    if name:
        return hf.hub_folder(checkpoint.of_run(name))
    configs = glob.glob('out/**/step-*/config.json', recursive=True)    # also behind links
    if not configs:
        raise ValueError('no checkpoint under out/: train a model first, or give --checkpoint=DIR')
    return Path(max(configs, key=os.path.getmtime)).parent


def load(folder, s):
    """Return the model in a folder, on the device of the settings, and its tokenizer."""
    device, dtype = pick_device(s)
    model = Transformer.from_pretrained(folder, dtype).eval().to(device)
    return model, load_tokenizer(folder)


def check_length(ids, config):
    """Raise ValueError if the model cannot continue the prompt ids, a list."""
    limit = config.max_position_embeddings - 1
    if not 1 <= len(ids) <= limit:
        raise ValueError(f'the prompt has {len(ids):,} tokens: must be 1 to {limit:,}')


def complete_pieces(tokenizer, ids, tokens):
    """Yield the text that each of tokens adds to the text of ids, a list, which grows. Bytes wait
    until they are a character, or until tokens end."""
    begin = 0                                       # from here on, ids are decoded again
    before = decode(tokenizer, ids)
    for token in tokens:
        ids.append(token)
        text = decode(tokenizer, ids[begin:])
        is_byte = (tokenizer.id_to_token(token) or '').startswith('<0x')    # Llama 2's
        if not is_byte and not text.endswith('\ufffd'):
            yield text[len(before):]
            begin = len(ids) - 1
            before = decode(tokenizer, ids[begin:])
    yield decode(tokenizer, ids[begin:])[len(before):]


def prompts(s):
    """Yield the prompt num_samples times; without one, for a chat, the lines of a user."""
    if s.prompt is None and s.chat:
        with suppress(EOFError):
            while True:
                yield input('> ')
        return
    for _ in range(s.num_samples):
        yield s.prompt or '\n'


def main(s):
    folder = find_checkpoint(s.checkpoint)
    model, tokenizer = load(folder, s)
    stops = hf.stop_ids(folder, model.config)
    chat = Chat(folder, tokenizer) if s.chat else None
    talking = s.chat and s.prompt is None
    print(folder, file=sys.stderr)

    drafts = None
    speculate = s.speculate
    if speculate == 'auto':                         # no gain over compiled passes on a CPU
        speculate = not (s.compile and model.head.device.type == 'cpu')
    if speculate and model.can_draft:
        drafts = Drafts()
    if s.compile:
        problem = compile_decoding(model, drafts)
        if problem:
            print(f'{problem}: going on without it', file=sys.stderr)

    torch.manual_seed(s.seed)
    sampling = Sampling(s.temperature, s.top_k, s.top_p)
    count = 0
    seconds = 0.0
    messages = []
    for i, text in enumerate(prompts(s)):
        if i > 0 and not talking:
            print('\n---')
            messages = []
        if s.chat:
            messages.append({'role': 'user', 'content': text})
            ids = chat.prompt(messages)
        else:
            ids = encode(tokenizer, text)
        check_length(ids, model.config)
        if not s.chat:
            print(text, end='', flush=True)
        began = time.perf_counter()
        prompt = torch.tensor([ids], device=model.head.device)                        # (1, T)
        tokens = (t.item() for t in stream(model, prompt, s.max_new_tokens, sampling, drafts))
        written = list(ids)
        until_stop = itertools.takewhile(lambda token: token not in stops, tokens)
        answer = ''
        for piece in complete_pieces(tokenizer, written, until_stop):
            print(piece, end='', flush=True)
            answer += piece
        messages.append({'role': 'assistant', 'content': answer})
        count += len(written) - len(ids)
        seconds += time.perf_counter() - began
        if talking:
            print()
    print(flush=True)
    line = f'{count / max(seconds, 1e-9):.0f} tokens/s'
    if drafts:
        line += f', {drafts.share:.0%} of {drafts.made:,} drafts accepted'
    print(line, file=sys.stderr)


if __name__ == '__main__':
    with settings.user_errors('use a shorter prompt, fewer --max_new_tokens, or --dtype=bfloat16'):
        given, = settings.load(Settings, usage=__doc__)
        main(Settings(**given))
