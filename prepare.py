"""Text -> token files.

    python prepare.py shakespeare                       # a known corpus, characters as tokens
    python prepare.py mybook.txt --tokenizer=bpe:1024   # a text -> data/mybook/
    python prepare.py corpus/                           # documents: .txt .md .jsonl[.gz|.zst]
                                                        # .json .csv .tsv .parquet
    python prepare.py cosmopedia --tokens=1e9           # a dataset of the Hugging Face Hub
    python prepare.py chats.jsonl                       # rows with "messages": conversations
    python prepare.py --inspect=data/mybook             # shows what is in there

writes data/NAME/{train,val,test}.bin (token ids, little-endian), tokenizer.json (Hugging Face's
format, whichever tokenizer made the ids) and meta.json (what the rest means). The same command
goes on where it was interrupted. nanoseek/tokens.py reads what this writes. Conversations are
rendered by the tokenizer's chat template (ChatML if it has none) and laid side by side in rows;
*.mask.bin says which tokens are the assistant's.
"""
import bisect
import hashlib
import json
import math
import os
import shutil
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from nanoseek import settings
from nanoseek.sources import HUB, open_source, source_name
from nanoseek.tokenizer import (CODE_TOKENS, COMPANIONS, EOT, EOT_NAMES, Encoder, batches,
                                char_tokenizer, decode, encode, gpt2_tokenizer, load_tokenizer,
                                train_bpe)
from nanoseek.tokens import DTYPES, SPLITS, VERSION, TokenData

BPE_TEXT = 1 << 28          # characters that bpe:N is trained on
SHARES = (0.005, 0.005)     # of val and test, if the settings do not say otherwise
SAVE_SECONDS = 5.0          # between saves of progress.json
# meta.json records the settings behind the files
RECIPE = ('source tokenizer text_field subset split tokens val_frac test_frac special_in_text '
          'deduplicate bad_documents').split()


@dataclass
class Settings:
    """Settings of prepare.py"""
    source: str = ''            # a known corpus, file, folder or Hub id; also without the name
    tokenizer: str = ''         # char, bpe:N (trained here), gpt2, gpt2+code, Hub id, folder, file
    path: str = ''              # read the source from this local file or folder
    out_dir: str = ''           # where to write; if empty data/NAME
    text_field: str = ''        # the field of documents that has their text; if empty 'text'
    subset: str = ''            # of a Hub dataset (its "config")
    split: str = ''             # of a Hub dataset; if empty train
    tokens: int | None = None   # stop after the document that reaches it; none: all
    val_frac: float | None = None       # share of documents for validation; none: 0.005
    test_frac: float | None = None      # share for testing; none: the same
    pack: int = 2048            # of conversations: tokens of a row, which is train.py's block_size
    special_in_text: bool = False       # a special token spelled in a text is that token
    deduplicate: bool = False           # leave out copies of earlier documents, byte for byte
    bad_documents: Literal['stop', 'skip'] = 'stop'     # skip: leave them out, and count them
    resume: Literal['auto', 'never'] = 'auto'   # auto: where it was interrupted
    inspect: str = ''                   # show what is in this folder instead

    def __post_init__(self):
        val, test = self.shares((0.1, 0.1))
        settings.require(self, 'tokens', self.tokens is None or self.tokens >= 1,
                         'at least 1, or none')
        settings.require(self, 'val_frac', 0 < val < 1, 'above 0 and below 1')
        settings.require(self, 'test_frac', 0 <= test and val + test < 1,
                         'at least 0, and below 1 when added to val_frac (none: val_frac)')

    def shares(self, default):
        """Return the shares of val and test. default: both, if val_frac is not given."""
        val, test = default
        if self.val_frac is not None:
            val = test = self.val_frac
        if self.test_frac is not None:
            test = self.test_frac
        return val, test


def prepare(s):
    """Read, split, tokenize, check, write. Return the folder."""
    out = Path(s.out_dir or Path('data') / source_name(s))
    work = out / '.partial'                         # where the files are until all is there
    note = None                                     # of an interrupted preparation
    if s.resume == 'auto' and (work / 'progress.json').exists():
        note = json.loads((work / 'progress.json').read_bytes())
    source = open_source(s, note and note['meta']['source'].get('revision'))
    recipe = make_recipe(s, source)
    settings.require(s, 'tokens', not (s.tokens and source.is_one_text), 'none for a single text')
    with settings.lock(out):
        if (work / 'meta.json').exists():           # stopped while it moved its files
            move(work, out)
        if s.resume == 'auto' and is_complete(out, recipe, source):
            print(f'{out} is complete for these settings and this text: --resume=never '
                  'rebuilds it')
            return out
        if note:
            different = differences(note['meta'], work / 'progress.json', recipe, source)
            if different or note['files'] != source.files:
                different = ', '.join(different) or 'another text'
                raise ValueError(f'{work} has an interrupted preparation with {different}: go on '
                                 'with that, or drop it with --resume=never')
            note['meta']['recipe'] = recipe
        else:
            note = begin(s, source, recipe, work)
        output = Output(work, note)
        print(f'reading {source.origin["path"]} after {output.tokens():,} tokens; if this is '
              'interrupted, the same command goes on')
        fill(s, source, output)
        finish(output)
        move(work, out)
    print(f'written to {out}; next: python train.py --dataset={out}')
    return out


def make_recipe(s, source):
    recipe = {name: getattr(s, name) for name in RECIPE}
    recipe['pack'] = s.pack if source.is_chat else 0
    if not s.tokenizer:
        recipe['tokenizer'] = 'char' if source.is_one_text else 'bpe:8192'
        if s.source in HUB:
            recipe['tokenizer'] = 'HuggingFaceTB/SmolLM2-135M'
    return recipe | {'version': VERSION}


def is_complete(out, recipe, source):
    try:
        meta = TokenData(out).meta
    except (ValueError, OSError):
        return False
    return not differences(meta, out / 'meta.json', recipe, source)


def differences(meta, file, recipe, source):
    """List how meta, read from file, differs from what this command would write."""
    old = meta['recipe']
    different = [f'{name}={old[name]}' for name in recipe if recipe[name] != old[name]]
    if different == ['bad_documents=stop']:         # there was none so far
        different = []
    revision = {'revision': None}                   # of the Hub: old ones are good enough
    changed = max((changed for _, _, changed in source.files), default=0)
    if meta['source'] | revision != source.origin | revision or file.stat().st_mtime_ns < changed:
        different.append('another text')
    return different


def begin(s, source, recipe, work):
    """Make the tokenizer. Return a note: meta.json so far, and how much is done."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    name = recipe['tokenizer']
    tokenizer = make_tokenizer(name, source, s)
    if source.is_chat:
        from nanoseek.chat import write_companions
        write_companions(work, name, tokenizer)
    saved = tokenizer.to_str(pretty=True).encode()
    (work / 'tokenizer.json').write_bytes(saved)
    tokenizer = load_tokenizer(work)                # as everybody else will read it
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    print(f'tokenizer {name}: a vocabulary of {vocab_size:,}')
    dtype = 'uint16' if vocab_size <= 1 << 16 else 'uint32'
    eot = next((i for i in map(tokenizer.token_to_id, EOT_NAMES) if i is not None), None)
    settings.require(s, 'tokenizer', eot is not None or source.is_one_text,
                     'one with an end-of-text token, which ends every document')
    meta = {'version': VERSION, 'dtype': dtype, 'vocab_size': vocab_size, 'eot_id': eot,
            'tokenizer': {'name': name, 'sha256': hashlib.sha256(saved).hexdigest()},
            'splits': {split: {'tokens': 0, 'bytes': 0, 'documents': 0} for split in SPLITS},
            'pack': recipe['pack'],
            'left_out': {'bad': 0, 'duplicates': 0}, 'source': source.origin, 'recipe': recipe,
            'crc32': {split: [0] for split in SPLITS}}
    return {'meta': meta, 'files': source.files, 'position': None, 'sizes': {}}


def make_tokenizer(name, source, s):
    """Return the tokenizer: `char` of the source's characters, `bpe:N` of its train documents."""
    if name == 'char':
        settings.require(s, 'tokenizer', source.is_one_text or source.files,
                         'another one: char would read all of the dataset first')
        characters = set()
        for text in texts_to_learn(source, s, math.inf, SPLITS):
            characters.update(text)
        if source.is_chat:
            characters.update('system user assistant\n')        # ChatML's own
        tokenizer = char_tokenizer(characters)
        if not source.is_one_text:
            tokenizer.add_special_tokens([EOT])
        return tokenizer
    if name.startswith('bpe:'):
        size = name.removeprefix('bpe:')
        settings.require(s, 'tokenizer', size.isdecimal() and int(size) >= 257,
                         f'bpe:N with N of at least 257 (256 bytes and {EOT}), such as bpe:1024')
        return train_bpe(int(size), texts_to_learn(source, s, BPE_TEXT, ['train']))
    if name in ('gpt2', 'gpt2+code'):
        tokenizer = gpt2_tokenizer()
        tokenizer.add_special_tokens(CODE_TOKENS if name == 'gpt2+code' else [])
        return tokenizer
    return load_tokenizer(name)


def texts_to_learn(source, s, most, splits):
    """Yield the texts of documents of these splits, until they have `most` characters."""
    for document in source.read():
        _, split = hash_and_split(document, s)
        if document.problem:
            leave_out(s, document, document.problem)
        elif split in splits:
            yield document.text
            most -= len(document.text)
            if most <= 0:
                break


def fill(s, source, output):
    """Write the ids of all documents, or of as many as have s.tokens."""
    note = output.note
    meta = note['meta']
    tokenizer = load_tokenizer(output.folder)
    encoder = Encoder(tokenizer, meta['tokenizer']['name'], s.special_in_text)
    begin = [i for i in encode(tokenizer, '') if i != meta['eot_id']]       # such as Llama's <s>
    begin = np.array(begin, np.uint32)
    end = np.array([] if source.is_one_text else [meta['eot_id']], np.uint32)
    if source.is_chat:
        from nanoseek.chat import Chat
        chat = Chat(output.folder, tokenizer)
        begin = np.zeros((2, 0), np.uint32)         # ids, and whether they count
        end = np.stack((end, 0 * end))
    seen = set(np.fromfile(output.folder / 'seen.bin', '<u8').tolist())
    saved = time.time()
    bar = tqdm(total=s.tokens, unit=' tokens', unit_scale=True, leave=False, disable=None)
    for number, batch in enumerate(batches(source.read(note['position']), lambda d: len(d.text))):
        if source.is_chat:
            encoded = [encode_chat(chat, document, meta) for document in batch]
        else:
            texts = [document.text for document in batch]
            encoded = encoder.encode(texts, check=number % 16 == 0)
        for document, ids in zip(batch, encoded):
            if s.tokens and output.tokens() >= s.tokens:
                return
            key, split = hash_and_split(document, s)
            if document.problem or isinstance(ids, ValueError):
                leave_out(s, document, document.problem or ids)
                meta['left_out']['bad'] += 1
            elif key in seen:
                meta['left_out']['duplicates'] += 1
            else:
                if EOT in document.text and not (s.special_in_text or source.is_chat):
                    note['spelled'] = note.get('spelled', 0) + document.text.count(EOT)
                output.append(split, np.concatenate((begin, ids, end), -1), learned(document))
                if s.deduplicate:
                    seen.add(key)
                    output.files['seen'].write(key.to_bytes(8, 'little'))
        output.lay_rows()
        bar.update(output.tokens() - bar.n)
        note['position'] = source.position()
        if time.time() - saved > SAVE_SECONDS:
            output.save()
            saved = time.time()


def learned(document):
    """Return the text that a model learns to write: a document, or what the assistant says."""
    if document.messages is None:
        return document.text
    return ''.join(m['content'] for m in document.messages if m['role'] == 'assistant')


def encode_chat(chat, document, meta):
    """Return a conversation's ids and which of them count (2, n), or a ValueError."""
    try:
        both = chat.encode(document.messages or [])
        length = both.shape[1]
        if length > meta['pack']:
            raise ValueError(f'{length:,} tokens do not fit into rows of --pack={meta["pack"]}')
        if meta['eot_id'] in both[0, :-1]:
            raise ValueError("the chat template ends turns with the token that ends a document")
        return both
    except ValueError as e:
        return e


def leave_out(s, document, problem):
    if s.bad_documents == 'stop':
        raise ValueError(f'{document.where}: {problem}; --bad_documents=skip leaves such '
                         'documents out')


def hash_and_split(document, s):
    """Return a hash of the text, and the split that follows from it in any run and any order."""
    key = int.from_bytes(hashlib.blake2b(document.text.encode(), digest_size=8).digest(), 'big')
    val, test = s.shares(SHARES)
    split = 'train'
    if key / 2**64 < val:
        split = 'val'
    elif key / 2**64 < val + test:
        split = 'test'
    return key, document.split or split


class Output:
    """Growing files, and progress.json: how many bytes of each are valid."""

    def __init__(self, folder, note):
        self.folder = folder
        self.note = note
        self.files = {}
        self.waiting = {}           # conversations of each split, for rows
        names = ['train', 'val', 'test', 'seen']
        if note['meta']['pack']:
            self.waiting = {split: [] for split in SPLITS}
            names += ['train.mask', 'val.mask', 'test.mask']
        for name in names:
            self.files[name] = open(folder / f'{name}.bin', 'ab')
            self.files[name].truncate(note['sizes'].get(name, 0))
            self.files[name].seek(0, os.SEEK_END)

    def append(self, split, ids, text):
        """Add the ids (n,) of a document; or (2, n) of a conversation, with what counts."""
        counts = self.note['meta']['splits'][split]
        counts['tokens'] += ids.shape[-1]
        counts['bytes'] += len(text.encode())
        counts['documents'] += 1
        if ids.ndim == 1:
            self.write(split, ids)
        else:
            self.waiting[split].append(ids)

    def write(self, split, ids):
        meta = self.note['meta']
        data = ids.astype(DTYPES[meta['dtype']]).tobytes()
        self.files[split].write(data)
        meta['crc32'][split] = [zlib.crc32(data, meta['crc32'][split][0])]

    def lay_rows(self):
        """Write the conversations that wait. Each row takes the longest that fits, until none does,
        and is filled up with end-of-text tokens."""
        meta = self.note['meta']
        filler = np.array([[meta['eot_id']], [0]])
        for split, conversations in self.waiting.items():
            counts = meta['splits'][split]
            conversations.sort(key=np.size)
            lengths = [ids.shape[1] for ids in conversations]
            while conversations:
                row = []
                room = meta['pack'] + 1             # x and y of a sequence
                while (fitting := bisect.bisect_right(lengths, room)) > 0:
                    row.append(conversations.pop(fitting - 1))
                    room -= lengths.pop(fitting - 1)
                ids, mask = np.concatenate((*row, np.repeat(filler, room, 1)), 1)
                self.write(split, ids)
                self.files[f'{split}.mask'].write(mask.astype('u1').tobytes())
                counts['tokens'] += room
                counts['targets'] = counts.get('targets', 0) + int(mask.sum())

    def tokens(self):
        return sum(counts['tokens'] for counts in self.note['meta']['splits'].values())

    def save(self):
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            self.note['sizes'][name] = file.tell()
        write_json(self.folder / 'progress.json', self.note)


def write_json(path, value):
    """Write all of a file or nothing."""
    partial = path.with_suffix('.tmp')
    with open(partial, 'w', encoding='utf-8') as f:
        json.dump(value, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


def finish(output):
    output.lay_rows()
    meta = output.note['meta']
    for split, counts in list(meta['splits'].items()):
        if counts['tokens']:
            print(f'{split:5} {counts["tokens"]:14,} tokens, {counts["documents"]:,} documents')
        elif split == 'test':
            del meta['splits'][split], meta['crc32'][split]
        else:
            raise ValueError(f'{split} got no document: give more documents or another '
                             '--val_frac, such as 0.1, with --resume=never')
    print('left out: {bad:,} bad documents, {duplicates:,} duplicates'.format(**meta['left_out']))
    if spelled := output.note.get('spelled'):
        print(f'{EOT} is spelled {spelled:,} times, encoded as plain text each time: '
              '--special_in_text=true makes it the end of a text (char has none)')
    output.save()
    write_json(output.folder / 'meta.json', meta)


def move(work, out):
    """Move finished files in place; can be rerun: old meta.json goes first, new comes last."""
    if (work / 'progress.json').exists():               # nothing has been moved
        (out / 'meta.json').unlink(missing_ok=True)
        for name in ('test.bin', *(f'{split}.mask.bin' for split in SPLITS), *COMPANIONS):
            (out / name).unlink(missing_ok=True)        # of an earlier dataset
        (work / 'progress.json').unlink()
    splits = json.loads((work / 'meta.json').read_bytes())['splits']
    names = [f'{split}{kind}.bin' for split in splits for kind in ('', '.mask')]
    for name in (*names, *COMPANIONS, 'tokenizer.json', 'meta.json'):
        if (work / name).exists():
            os.replace(work / name, out / name)
    shutil.rmtree(work)


def inspect(folder):
    """Print what is in a folder that prepare.py wrote. ValueError if it is damaged."""
    data = TokenData(folder)
    tokenizer = load_tokenizer(folder)
    print(f'{data.meta["source"]}\ntokenizer {data.meta["tokenizer"]["name"]}')
    for split, ids in data.splits.items():
        documents = data.meta['splits'][split]['documents']
        print(f'{split}: {len(ids):,} tokens, {len(ids) / documents:,.1f} per document, '
              f'{data.bytes_per_token(split):.3f} bytes per token')
        if [zlib.crc32(ids)] != data.meta['crc32'][split]:
            raise ValueError(f'{folder}/{split}.bin is damaged: run prepare.py again')
    print(f'\nthe first 200 of train:\n{decode(tokenizer, data.splits["train"][:200])}')


if __name__ == '__main__':
    with settings.user_errors():
        s = Settings(**settings.load(Settings, positional='source', usage=__doc__)[0])
        if s.inspect:
            inspect(s.inspect)
        else:
            prepare(s)
