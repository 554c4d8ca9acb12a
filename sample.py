"""Text from a checkpoint.

    python sample.py --prompt "Before we proceed"               # the newest checkpoint under out/
    python sample.py --checkpoint=out/shakespeare --temperature=0 --max_new_tokens=100
    python sample.py --checkpoint=HuggingFaceTB/SmolLM2-135M-Instruct --chat --prompt "Hello!"

A checkpoint is a folder or Hub id of a Llama, Glm4Moe or DeepseekV3 model; a run's folder stands
for its newest one. Text goes to stdout while it is generated, everything else to stderr.
"""
import os
os.environ.setdefault('GOMP_SPINCOUNT', '10000')    # decoding is many short parallel parts
import glob
import itertools
import json
import re
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from model import Transformer
from nanoseek import checkpoint, hf, settings
from nanoseek.device import pick_device
from nanoseek.generate import Drafts, Sampling, compile_decoding, stream
from nanoseek.tokenizer import decode, encode, load_tokenizer


@dataclass
class Settings:
    """Settings of sample.py"""
    prompt: str = '\n'              # the text to continue; special tokens in it are tokens
    checkpoint: str = ''            # a folder or Hub id; if empty the newest one under out/
    num_samples: int = 1            # how many texts, one after the other
    max_new_tokens: int = 500       # the most tokens of a text
    temperature: float = 0.8        # 0: always the likeliest token; above 1: wilder
    top_k: int | None = 50          # only among the k likeliest; none: all
    top_p: float | None = None      # only among the likeliest that make up this much; none: all
    chat: bool = False              # put the prompt into the model's chat template, show the answer
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


def encode_prompt(tokenizer, text, config, whole=True):
    """Return the ids of a text, see encode. ValueError if the model cannot continue it."""
    ids = encode(tokenizer, text, whole)
    limit = config.max_position_embeddings - 1
    if not 1 <= len(ids) <= limit:
        raise ValueError(f'the prompt has {len(ids):,} tokens: must be 1 to {limit:,}')
    return ids


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


def chat_text(folder, messages):
    """Return messages [{'role': ..., 'content': ...}] as one text, as transformers renders it by
    the model's chat template (Jinja)."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    companions = hf.read_companions(folder)
    values = json.loads(companions.get('tokenizer_config.json', '{}'))
    template = companions.get('chat_template.jinja', values.get('chat_template'))
    if template is None:
        raise ValueError(f'{folder} has no chat template: give a prompt without --chat')
    special_tokens = {}                             # {'bos_token': '<s>', ...}
    for name, token in values.items():
        if isinstance(token, dict):                 # with the settings of an AddedToken
            token = token.get('content')
        if name.endswith('_token') and isinstance(token, str):      # neither null nor a flag
            special_tokens[name] = token

    def raise_exception(message):
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(    # templates come from strangers
        trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols'])
    environment.filters['tojson'] = partial(json.dumps, ensure_ascii=False)
    environment.globals.update(raise_exception=raise_exception,
                               strftime_now=datetime.now().strftime)
    for tag, same in (('endgeneration', 'endif'), ('generation', 'if true')):
        template = re.sub(rf'({{%[-+]?\s*){tag}\b', rf'\1{same}', template)      # only for training
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=True, tools=None, documents=None,
            **special_tokens)
    except Exception as e:                          # a template may do anything
        raise ValueError(f'the chat template of {folder} does not accept this prompt: '
                         f'{type(e).__name__}: {e}') from e


def main(s):
    folder = find_checkpoint(s.checkpoint)
    model, tokenizer = load(folder, s)
    text = s.prompt
    stops = hf.stop_ids(folder, model.config)
    if s.chat:
        text = chat_text(folder, [{'role': 'user', 'content': text}])
    ids = encode_prompt(tokenizer, text, model.config, whole=not s.chat)
    prompt = torch.tensor([ids], device=model.head.device)                            # (1, T)
    print(folder, file=sys.stderr)

    drafts = None
    speculate = s.speculate
    if speculate == 'auto':                         # no gain over compiled passes on a CPU
        speculate = not (s.compile and prompt.device.type == 'cpu')
    if speculate and model.can_draft:
        drafts = Drafts()
    if s.compile:
        problem = compile_decoding(model, drafts)
        if problem:
            print(f'{problem}: going on without it', file=sys.stderr)

    torch.manual_seed(s.seed)
    sampling = Sampling(s.temperature, s.top_k, s.top_p)
    count = 0
    began = time.perf_counter()
    for i in range(s.num_samples):
        if i > 0:
            print('\n---')
        if not s.chat:
            print(s.prompt, end='', flush=True)
        tokens = (t.item() for t in stream(model, prompt, s.max_new_tokens, sampling, drafts))
        written = list(ids)
        until_stop = itertools.takewhile(lambda token: token not in stops, tokens)
        for text in complete_pieces(tokenizer, written, until_stop):
            print(text, end='', flush=True)
        count += len(written) - len(ids)
    print(flush=True)
    line = f'{count / (time.perf_counter() - began):.0f} tokens/s'
    if drafts:
        line += f', {drafts.share:.0%} of {drafts.made:,} drafts accepted'
    print(line, file=sys.stderr)


if __name__ == '__main__':
    with settings.user_errors('use a shorter prompt, fewer --max_new_tokens, or --dtype=bfloat16'):
        given, = settings.load(Settings, usage=__doc__)
        main(Settings(**given))
