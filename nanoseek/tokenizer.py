"""The kinds of tokenizers, made, loaded and checked. Each becomes a tokenizers.Tokenizer.

    char          every character of the text
    bpe:N         bytes and their N - 257 most frequent merges, trained here
    gpt2          GPT-2's, through tiktoken; gpt2+code has tokens for chats and code as well
    a name        any on the Hugging Face Hub, a folder, a tokenizer.json
"""
import functools
import itertools
import json
import os
import re
from pathlib import Path

import numpy as np

from nanoseek import settings

EOT = '<|endoftext|>'
EOT_NAMES = (EOT, '<|end_of_text|>', '</s>', '<eos>', '<｜end▁of▁sentence｜>')    # of others
CODE_TOKENS = ['<|im_start|>', '<|im_end|>', '<repo_name>', '<reponame>', '<file_sep>',
               '<filename>', '<gh_stars>', '<issue_start>', '<issue_comment>', '<issue_closed>',
               '<jupyter_start>', '<jupyter_text>', '<jupyter_code>', '<jupyter_output>',
               '<empty_output>']
# Files that a model hands on to the models made from it
COMPANIONS = ('tokenizer_config.json', 'special_tokens_map.json', 'generation_config.json',
              'chat_template.jinja')
GPT2_FILES = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main'
PIECE = 1 << 15             # characters: longer texts are encoded in pieces
BATCH = 1 << 20             # characters that a library gets at a time; 330 bytes of memory each
# Where a word ends, which no token of a BPE of bytes spans
CUT = re.compile(r'(?<=[^\W_])(?= \w|[^\w\s])')


def char_tokenizer(characters):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    vocab = {c: i for i, c in enumerate(sorted(characters))}
    # BPE would drop a new character silently; WordLevel without its unknown token refuses it
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token='<unk>'))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def byte_level(model):
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's regex
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_bpe(size, texts):
    """Return a BPE of bytes with `size` tokens, or fewer if no pair of them occurs twice."""
    from tokenizers import models, pre_tokenizers, trainers
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=2, special_tokens=[EOT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(itertools.chain.from_iterable(map(cut, texts)), trainer)
    return tokenizer


def gpt2_tokenizer():
    """Return GPT-2's, from the files that tiktoken downloads and keeps."""
    from tiktoken.load import read_file_cached
    from tokenizers import models
    vocab = json.loads(read_file_cached(f'{GPT2_FILES}/encoder.json'))
    del vocab[EOT]
    _, *merges = read_file_cached(f'{GPT2_FILES}/vocab.bpe').decode().splitlines()
    tokenizer = byte_level(models.BPE(vocab, [tuple(merge.split()) for merge in merges]))
    tokenizer.add_special_tokens([EOT])
    return tokenizer


def load_tokenizer(path):
    """Return the tokenizer of a tokenizer.json, a folder with one, or a repository on the Hub."""
    from tokenizers import Tokenizer
    file = Path(path)
    if file.is_dir():
        file = file / 'tokenizer.json'
    try:
        if file.suffix == '.json':
            settings.refuse_pointer(file)
            tokenizer = Tokenizer.from_file(str(file))
        else:
            tokenizer = Tokenizer.from_pretrained(str(path))
    except Exception as e:                          # tokenizers raises nothing more special
        raise ValueError(f"no tokenizer in '{path}': {e}") from e
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode(tokenizer, text, whole=True):
    """Return the ids of a text, a list. whole: with what the tokenizer puts around a whole text,
    as Llama's <s>; ours add nothing. ValueError for a character that has no id."""
    return encoding(tokenizer, text, whole).ids


def encoding(tokenizer, text, whole=True):
    """The same, with each token's place in the text: a tokenizers.Encoding"""
    try:
        return tokenizer.encode(text, add_special_tokens=whole)
    except Exception as e:                          # of char_tokenizer alone
        vocab = tokenizer.get_vocab()
        c = next((c for c in text if c not in vocab), '')
        raise ValueError(f'character {c!r} is not in the vocabulary of this tokenizer') from e


def decode(tokenizer, ids):
    """Return the text of ids, with special tokens spelled out."""
    return tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def batches(items, size_of):
    """Yield lists of consecutive items that have together BATCH characters or a little more."""
    batch = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_of(item) + 16                  # an empty one needs memory, too
        if size > BATCH:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def cut(text):
    """Yield pieces of a text that have the same tokens as the whole, as far as words end."""
    begin = 0
    while len(text) - begin > 2 * PIECE:
        end = begin + PIECE
        place = CUT.search(text, end, end + PIECE)
        if place:
            end = place.start()
        yield text[begin:end]
        begin = end
    yield text[begin:]


class Encoder:
    """Texts -> ids, by the fastest library and on all cores, checked. name: kind of tokenizer;
    special_in_text: whether '<|endoftext|>' in a text is that token and not its letters."""

    def __init__(self, tokenizer, name, special_in_text=False):
        tokenizer.encode_special_tokens = not special_in_text
        self.tokenizer = tokenizer
        self.name = name
        self.lossless = not special_in_text and (name == 'char' or is_lossless(tokenizer))
        self.encode_batch = self.by_tokenizers
        if name == 'char' and not special_in_text:
            self.vocab = tokenizer.get_vocab()
            self.encode_batch = self.by_characters
        elif name in ('gpt2', 'gpt2+code') and not special_in_text:
            import tiktoken
            gpt2 = tiktoken.get_encoding('gpt2')
            self.encode_batch = functools.partial(gpt2.encode_ordinary_batch,
                                                  num_threads=os.cpu_count())

    def encode(self, texts, check=True):
        """Return for each text its ids (n,) uint32, or a ValueError if it has none, or these do
        not give it back. check=False leaves the last out for a lossless tokenizer."""
        try:
            pieces = [[text] for text in texts]
            if self.lossless:                       # others may add a space to each piece
                pieces = [list(cut(text)) for text in texts]
            ids = (np.array(ids_of_piece, np.uint32)
                   for batch in batches(itertools.chain(*pieces), len)
                   for ids_of_piece in self.encode_batch(batch))
            ids_of_texts = [np.concatenate([next(ids) for _ in parts]) for parts in pieces]
            if check or not self.lossless:
                self.check(texts, ids_of_texts)
            return ids_of_texts
        except Exception as e:                      # tokenizers raises nothing more special
            if len(texts) == 1:
                return [ValueError(str(e))]
        return [self.encode([text], check)[0] for text in texts]

    def by_tokenizers(self, texts):
        return [e.ids for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def by_characters(self, texts):
        try:
            return [list(map(self.vocab.__getitem__, text)) for text in texts]
        except KeyError as e:
            raise ValueError(f'character {e} is not in the vocabulary of this tokenizer') from e

    def check(self, texts, ids_of_texts):
        lists = [ids.tolist() for ids in ids_of_texts]
        for text, back in zip(texts, self.tokenizer.decode_batch(lists, skip_special_tokens=False)):
            if back != text:
                at = len(os.path.commonprefix([text, back]))
                raise ValueError(f"tokenizer '{self.name}' does not give the text back: "
                                 f'{text[at:at + 20]!r} becomes {back[at:at + 20]!r}; use '
                                 'another, such as bpe:1024')


def is_lossless(tokenizer):
    """Return whether a tokenizer is a BPE that has all bytes, which changes nothing and looks for
    no added tokens in a text. Then it loses no text, and a text can be cut."""
    from tokenizers import decoders, pre_tokenizers
    added = tokenizer.get_added_tokens_decoder().values()
    return (isinstance(tokenizer.decoder, decoders.ByteLevel) and not tokenizer.normalizer
            and all(token.special and not token.lstrip and not token.rstrip for token in added)
            and set(pre_tokenizers.ByteLevel.alphabet()) <= tokenizer.get_vocab().keys())
