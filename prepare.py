"""Text -> token files.

    python prepare.py shakespeare                       # a known corpus, characters as tokens
    python prepare.py mybook.txt --tokenizer=bpe:1024   # a text -> data/mybook/
    python prepare.py corpus/                           # documents: .txt .md .jsonl[.gz|.zst] .json
                                                        # .csv .tsv .parquet; -: stdin
    python prepare.py cosmopedia --tokens=1e9           # a dataset of the Hugging Face Hub
    python prepare.py --inspect=data/mybook             # shows what is in there

writes data/NAME/{train,val,test}.bin (token ids, little-endian), tokenizer.json (Hugging Face's
format, whichever tokenizer made the ids) and meta.json (what the rest means). The same command
goes on where it was interrupted. nanoseek/tokens.py reads what this writes.
"""
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

import config
from nanoseek import files, signals, sources
from nanoseek.inspection import inspect
from nanoseek.pieces import (BadDocument, Seen, batches, copy_of, encode_pieces, encoder_of,
                             leave_out, start_of_source, texts_to_learn)
from nanoseek.sources import HUB, open_source, source_name
from nanoseek.tokenizer import (CODE_TOKENS, EOT, EOT_NAMES, char_tokenizer, gpt2_tokenizer,
                                load_tokenizer, other_tokenizer, parse_tokenizer, train_bpe)
from nanoseek.tokenizer import decode, encode  # noqa: F401  # scripts import them from here
from nanoseek.tokens import SPLITS, VERSION, TokenData
from nanoseek.workers import Workers
from nanoseek.writing import Progress, move, pack

SMOLLM2 = 'HuggingFaceTB/SmolLM2-135M'
BATCH = 1 << 20             # characters that are encoded at a time
BPE_TEXT = 1 << 28          # characters that bpe:N is trained on
SAVE_SECONDS = 5.0          # between two notes of how far a preparation has come


@dataclass
class Settings:
    """Settings of prepare.py"""
    source: str = ''            # a known corpus, file, folder, - or Hub id; also without the name
    tokenizer: str = ''         # char, bpe:N (trained here), gpt2, gpt2+code, Hub id, folder, file
    path: str = ''              # take a known corpus from this local file or folder
    out_dir: str = ''           # where to write; if empty data/NAME
    text_field: str = ''        # where documents have their text; if empty 'text'
    subset: str = ''            # of a Hub dataset (its "config")
    split: str = ''             # of a Hub dataset; if empty train
    format: str = 'txt'         # what stdin is: txt, jsonl, json, csv, tsv
    tokens: int | None = None   # stop after the document that makes it so many; none: take all
    val_frac: float | None = None       # share of the documents for validation; none: 0.005
    test_frac: float | None = None      # share for testing; none: as much
    end_of_text: bool = True            # end every document with the end-of-text token
    special_in_text: bool = False       # a special token that a text spells is that token
    deduplicate: bool = False           # leave out what has come before, byte for byte
    pack: int = 0                       # rows of so many tokens, from documents' starts; 0: none
    bad_documents: Literal['stop', 'skip', 'replace'] = 'stop'  # replace: bytes that are no UTF-8
    shard_tokens: int = 100_000_000     # tokens of a file
    workers: int = 0                    # processes; 0: one per core
    resume: Literal['auto', 'never'] = 'auto'   # auto: where it was interrupted
    inspect: str = ''                   # show what is in this folder instead

    def __post_init__(self):
        val, test = self.shares((0.1, 0.1))
        if self.tokens is not None and self.tokens < 1:
            self.refuse('tokens', 'at least 1, or none')
        if not 0 < val < 1:
            self.refuse('val_frac', 'above 0 and below 1')
        if test < 0 or val + test >= 1:
            self.refuse('test_frac', 'at least 0, and with val_frac below 1 (none is as much as '
                                     'that)')
        if self.format not in sources.FORMATS:
            self.refuse('format', 'one of ' + ', '.join(sources.FORMATS))
        if self.pack != 0 and (self.pack < 2 or not self.end_of_text):
            self.refuse('pack', 'above 1, with end_of_text')
        if self.shard_tokens < 1:
            self.refuse('shard_tokens', 'at least 1')
        if self.workers < 0:
            self.refuse('workers', 'at least 0')

    def refuse(self, name, limit):
        raise ValueError(f'{name}={getattr(self, name)}: must be {limit}')

    def shares(self, default):
        """-> shares of val and test, where the settings do not say otherwise those of default"""
        if self.val_frac is None:
            val, test = default
        else:
            val = self.val_frac
            test = val
        if self.test_frac is not None:
            test = self.test_frac
        return val, test


# ------------------------------------------------------------------------- the whole of it

def prepare(s):
    """Read, split, tokenize, check, write; -> the directory"""
    out = Path(s.out_dir or Path('data') / source_name(s.source, s.out_dir))
    with files.lock(out):
        return prepare_in(out, s)


def prepare_in(out, s):
    began = time.time()
    work = out / '.partial'
    before = read_progress(work, s)
    revision = None
    if before and before['recipe'].get('source') == s.source:
        revision = before['revision']
    source = open_source(s, config.near, revision)
    recipe = make_recipe(s, source)
    for folder in (work, work / 'packed'):      # one that was stopped while it moved its files
        if (folder / 'meta.json').exists():
            move(folder, out)
    if s.resume == 'auto' and is_complete(out, recipe, source):
        if before and before['recipe'] == recipe:
            shutil.rmtree(work)
        print(f'{out} is complete, by the same settings and from the same text: --resume=never '
              'makes it again')
        return out
    if before:
        check_same(work, before, recipe, source)
    print(f'{source.name}: {source.describe()}')
    for note in source.notes:
        print(note)
    try:
        meta, progress, seen = begin(s, source, recipe, work, before)
    except BadDocument:
        shutil.rmtree(work, ignore_errors=True)
        raise
    except BaseException:                       # of the settings: there is nothing to go on with
        if not (work / 'progress.json').exists():
            shutil.rmtree(work, ignore_errors=True)
        raise
    fill_or_keep(s, source, meta, progress, seen)
    try:
        finish(s, source, meta, progress, out)
    except ValueError:                          # other settings are needed
        shutil.rmtree(work, ignore_errors=True)
        raise
    dataset = str(out)
    if out.parent == Path('data'):
        dataset = out.name
    command = f'--dataset={dataset}'
    if dataset == 'shakespeare':
        command = 'config/shakespeare.py'
    print(f'written to {out} in {time.time() - began:.1f} s; next: python train.py {command}')
    return out


def fill_or_keep(s, source, meta, progress, seen):
    """fill(), and if that ends early, a word about what is there to go on with"""
    work = progress.folder
    if progress.state['complete']:
        return
    try:
        fill(s, source, meta, progress, seen)
    except BaseException as e:
        if not (work / 'progress.json').exists():
            shutil.rmtree(work, ignore_errors=True)
            raise
        note = f'the same command goes on from what is in {work}'
        if '--bad_documents' in str(e):         # it says what would leave the document out
            note = f'with that it goes on from what is in {work}'
        if isinstance(e, (OSError, ValueError)):
            raise type(e)(f'{e}; {note}') from e
        print(note, file=sys.stderr)
        raise


def make_recipe(s, source):
    """What the token files follow from, besides the text"""
    other = ('workers', 'resume', 'out_dir', 'inspect', 'path')
    recipe = {name: value for name, value in asdict(s).items() if name not in other}
    recipe['version'] = VERSION
    if not s.tokenizer:
        recipe['tokenizer'] = 'bpe:8192'
        if s.source in HUB:
            recipe['tokenizer'] = SMOLLM2
        elif source.text:
            recipe['tokenizer'] = 'char'
    return recipe


def read_progress(work, s):
    """-> what an interrupted preparation has noted of itself, or None"""
    if s.resume == 'auto':
        with suppress(OSError, ValueError):
            return json.loads((work / 'progress.json').read_bytes())
    return None


def check_same(work, before, recipe, source):
    """ValueError unless what is in work was begun by the same command, of the same text"""
    old = before['recipe']
    if old['bad_documents'] == 'stop':          # there was none so far
        old['bad_documents'] = recipe['bad_documents']
    problem = None
    for name, value in recipe.items():
        if problem is None and old.get(name) != value:
            problem = f'with {name}={old.get(name)!r}, now {value!r}'
    if problem is None and before['identity'] != source.identity:
        problem = 'of another text'
    if problem:
        raise ValueError(f'{work} has an interrupted preparation {problem}: go on with that, '
                         'give another --out_dir, or drop it with --resume=never')


def is_complete(out, recipe, source):
    """Whether a folder has what this command would write"""
    try:
        meta = TokenData(out).meta
    except (ValueError, OSError):
        return False
    theirs = {k: v for k, v in meta['source'].items() if k != 'revision'}
    own = {k: v for k, v in source.about.items() if k != 'revision'}
    newer = source.changed < (out / 'meta.json').stat().st_mtime_ns
    return meta.get('recipe') == recipe and theirs == own and newer


def begin(s, source, recipe, work, before):
    """-> what meta.json says of the tokens, the Progress there is, hashes of the documents so
    far"""
    name = recipe['tokenizer']
    if before:
        saved = (work / 'tokenizer.json').read_bytes()
    else:
        saved = make_tokenizer(name, source, s)
    tokenizer = parse_tokenizer(saved, name)    # the ids are from what tokenizer.json will hold
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    eot = None
    for token in EOT_NAMES:
        if eot is None:
            eot = tokenizer.token_to_id(token)
    if eot is None and s.end_of_text and not source.text:
        raise ValueError(f"tokenizer '{name}' has no end-of-text token (none of "
                         f'{", ".join(EOT_NAMES)}): take another, or --end_of_text=false')
    print(f'tokenizer {name}: a vocabulary of {vocab_size:,}')
    dtype = 'uint32'
    if vocab_size <= 1 << 16:
        dtype = 'uint16'
    meta = {'version': VERSION, 'dtype': dtype, 'vocab_size': vocab_size, 'eot_id': eot,
            'tokenizer': {'name': name, 'sha256': hashlib.sha256(saved).hexdigest()}}
    state = before
    if before is None:
        state = {'recipe': recipe, 'identity': source.identity,
                 'revision': source.about.get('revision'), 'seen': 0, 'splits': {},
                 'complete': False}
    for key, value in {**start_of_source(), **NOTHING_OPEN}.items():
        state.setdefault(key, value)
    progress = Progress(work, state, dtype, s.shard_tokens)
    if before:
        with suppress(OSError):
            seen = progress.go_on()
            print(f'going on behind token {progress.tokens():,}')
            return meta, progress, seen
        print('the interrupted preparation is damaged: starting over')
        return begin(s, source, recipe, work, None)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    files.write_file(work / 'tokenizer.json', saved)
    return meta, progress, np.zeros(0, np.uint64)


def make_tokenizer(name, source, s):
    """The setting tokenizer -> the bytes of tokenizer.json. `char` has all characters of the
    source; `bpe:N` is trained on train documents"""
    if name == 'char':
        if isinstance(source, sources.Hub):
            raise ValueError("tokenizer 'char' would read all of the dataset for its characters "
                             'first: take bpe:N')
        characters = set()
        for text in texts_to_learn(source, s, math.inf, SPLITS):
            characters.update(text)
        tokenizer = char_tokenizer(characters)
        if s.end_of_text and not source.text:
            tokenizer.add_special_tokens([EOT])
    elif name.startswith('bpe:'):
        size = config.literal(name.removeprefix('bpe:'))
        if type(size) not in (int, float) or size != size // 1 or size < 257:
            raise ValueError(f"tokenizer '{name}': N of bpe:N is the size of the vocabulary, a "
                             f'whole number of at least 257 (256 bytes and {EOT}), such as '
                             'bpe:1024')
        tokenizer = train_bpe(int(size), texts_to_learn(source, s, BPE_TEXT))
        if tokenizer.get_vocab_size() < size:
            print('no pair of tokens is left that comes twice: a vocabulary of '
                  f'{int(size):,} is not reached')
    elif name in ('gpt2', 'gpt2+code'):
        tokenizer = gpt2_tokenizer()
        if name == 'gpt2+code':
            tokenizer.add_special_tokens(CODE_TOKENS)
    else:
        tokenizer = other_tokenizer(name)
    return tokenizer.to_str(pretty=True).encode()


# --------------------------------------------------- text -> documents -> ids -> token files

def fill(s, source, meta, progress, seen):
    """All documents, or as many as s.tokens wants, into the token files. This process reads and
    writes, others encode"""
    state = progress.state
    encoder_of.cache_clear()                            # of an earlier call for the same folder
    encoder_args = str(progress.folder), meta['tokenizer']['name'], s.special_in_text
    encoder = encoder_of(*encoder_args)
    eot = None
    if s.end_of_text and not source.text:
        eot = meta['eot_id']
    if s.deduplicate:
        seen = Seen(seen)
    else:
        seen = None
    todo = batches(source, s, encoder, progress, seen, BATCH)
    count = s.workers or cores()
    little = source.unit == 'B' and source.total < 4 * BATCH    # not worth a worker's start
    workers = Workers(count, inline=little or count == 1)
    stop, handlers = signals.catch()
    bar = progress_bar(s, source)
    problem = None
    saved = time.time()
    try:
        for pieces, behind, made in encoded(todo, workers, count, encoder_args):
            if stop:
                break
            take(s, source, progress, eot, pieces, made)
            state.update(behind)
            show(bar, s, source, progress)
            if state['complete']:
                break
            if time.time() - saved > SAVE_SECONDS:
                progress.save()
                saved = time.time()
        state['complete'] = state['complete'] or not stop
    except (ConnectionError, ValueError) as e:              # what came before it is kept
        problem = e
    finally:
        bar.close()
        workers.close()
        signals.restore(handlers)
    early = isinstance(problem, ValueError) and not (progress.folder / 'progress.json').exists()
    if not early or progress.tokens() > 10_000_000:     # little is sooner made than explained
        progress.save()
    if not state['complete']:
        raise problem or KeyboardInterrupt


def encoded(todo, workers, count, encoder_args):
    """Yields (pieces, what of the state is other behind them, what encode_pieces makes of them)
    in the order of todo, of which up to 2 * count are in work. An error of todo's is raised when
    all that came before it is out"""
    jobs = deque()
    problem = None
    more = True
    number = 0
    while more or jobs:
        batch = None
        if more:
            try:
                batch = next(todo, None)
            except (ConnectionError, ValueError) as e:
                problem = e
            more = batch is not None
        if more:
            checked = number % 16 == 0
            job = workers.submit(encode_pieces, encoder_args, batch[0], checked)
            jobs.append((job, batch))
            number += 1
        while jobs and (not more or len(jobs) > 2 * count or jobs[0][0].done()):
            job, (pieces, behind) = jobs.popleft()
            yield pieces, behind, workers.result(job)
    if problem:
        raise problem


def cores():
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


# Of a document whose pieces are on their way: what its split had before it, and whether it is
# left out. Of all documents: how many could not be encoded, and the first of them
NOTHING_OPEN = {'before': None, 'dropped': False, 'unreadable': 0, 'first_unreadable': None}


def take(s, source, progress, eot, pieces, made):
    """The ids of a batch into the files; with the document that makes s.tokens, the state is
    complete. BadDocument where one is not to be left out: then the state is as it was"""
    state = progress.state
    keys = ('splits', *NOTHING_OPEN)
    as_it_was = copy_of({key: state[key] for key in keys})
    begun_earlier = state['before'] is not None
    end = []
    if eot is not None:
        end = [np.array([eot], np.uint32)]
    waiting = Waiting(progress)
    for piece, (ids, size, problem) in zip(pieces, made):
        if not piece.last and state['before'] is None:
            waiting.write()
            state['before'] = copy_of(progress.of_split(piece.split))
        if problem and not state['dropped']:
            try:
                refuse(s, source, state, piece, problem)
            except BadDocument:
                state.update(as_it_was)
                raise
            state['dropped'] = True
            if state['before'] is not None:
                waiting.write()
                state['splits'][piece.split] = copy_of(state['before'])
                if begun_earlier:           # before the files have less than the last note says
                    progress.save()
                progress.cut_files()
        if not state['dropped']:
            arrays = [ids]
            if piece.last:
                arrays += end
            waiting.add(piece.split, arrays, size, piece.last)
        if piece.last:
            state['before'] = None
            state['dropped'] = False
            begun_earlier = False
            if s.tokens and progress.tokens() + waiting.tokens >= s.tokens:
                state['complete'] = True
                break
    waiting.write()


def refuse(s, source, state, piece, problem):
    """BadDocument, or one more that is left out"""
    if source.text:
        raise BadDocument(f'{piece.where}: {problem}')
    note = {'first_bad': state['first_unreadable']}
    leave_out(s, note, piece.where, problem)
    state['first_unreadable'] = note['first_bad']
    state['unreadable'] += 1


class Waiting:
    """Ids that are to be appended to the files of their splits, many documents at a time"""

    def __init__(self, progress):
        self.progress = progress
        self.splits = {}
        self.tokens = 0

    def add(self, split, arrays, size, documents):
        of_split = self.splits.setdefault(split, {'arrays': [], 'bytes': 0, 'documents': 0})
        of_split['arrays'] += arrays
        of_split['bytes'] += size
        of_split['documents'] += documents
        self.tokens += sum(map(len, arrays))

    def write(self):
        for split, of_split in self.splits.items():
            ids = np.concatenate(of_split['arrays'])
            self.progress.append(split, ids, of_split['bytes'], of_split['documents'])
        self.splits = {}
        self.tokens = 0


def progress_bar(s, source):
    total = source.total
    unit = source.unit
    if s.tokens:
        total = s.tokens
        unit = 'tok'
    seconds = 30
    if sys.stderr.isatty():
        seconds = 0.5
    return tqdm(total=total, unit=unit, unit_scale=True, leave=False, delay=0.5,
                mininterval=seconds)


def show(bar, s, source, progress):
    tokens = progress.tokens()
    done = source.done
    if s.tokens:
        done = tokens
    bar.update(done - bar.n)
    rate = (tokens - progress.first) / max(time.time() - progress.began, 1e-3)
    bar.set_postfix_str(f'{tokens / 1e6:,.1f}M tokens, {rate:,.0f} a second', False)


def finish(s, source, meta, progress, out):
    """meta.json, and all files to their places"""
    state = progress.state
    work = progress.folder
    if s.pack:
        progress, lost = pack(progress, meta['eot_id'], s.pack + 1, load_tokenizer(work))
        for split, share in lost.items():
            print(f'{split}: rows of {s.pack:,} tokens; {share:.1%} of all tokens did not fit')
    splits = progress.state['splits']
    for split in ('train', 'val'):
        if not splits.get(split, {}).get('tokens'):
            raise ValueError(too_little(s, split, state))
    left_out = {**state['left_out']}
    left_out['bad'] += state['unreadable']
    meta['splits'] = {}
    for split in SPLITS:
        if splits.get(split, {}).get('tokens'):
            meta['splits'][split] = {key: splits[split][key]
                                     for key in ('tokens', 'bytes', 'documents')}
    meta.update({
        'end_of_text': bool(s.end_of_text and not source.text), 'pack': s.pack,
        'left_out': left_out, 'shard_tokens': s.shard_tokens, 'source': source.about,
        'recipe': state['recipe'],
        'crc32': {split: splits[split]['crc'] for split in meta['splits']}})
    for split, of_split in meta['splits'].items():
        line = (f'{split:5} {of_split["tokens"]:14,} tokens, '
                f'{of_split["bytes"] / of_split["tokens"]:.2f} bytes per token')
        if not source.text:
            line += f', {of_split["documents"]:,} documents'
        print(line)
    for what, count in left_out.items():
        if count:
            print(f'left out: {count:,} {what}')
    if left_out['bad']:
        print(f'the first: {first_bad(state)}')
    if progress.folder != work:
        shutil.copy(work / 'tokenizer.json', progress.folder)
        progress.sync()
    files.write_file(progress.folder / 'meta.json', json.dumps(meta, indent=1).encode())
    move(progress.folder, out)
    shutil.rmtree(work)


def first_bad(state):
    return state['first_bad'] or state['first_unreadable']


def too_little(s, split, state):
    bad = state['left_out']['bad'] + state['unreadable']
    note = ''
    if bad:
        note = f'; {bad:,} were left out, the first: {first_bad(state)}'
    if s.pack:
        return (f'{split} got no row of {s.pack} tokens: take more documents or a smaller '
                f'--pack{note}')
    if split == 'train':
        return f'train got no document: take more{note}'
    least = math.ceil(state['lowest'] * 1e4 + 1) / 1e4
    way = f'--val_frac={least}'
    if least > 0.1:
        way += ' --test_frac=0'
    return f'val got no document: take more, or {way}, the least that has one{note}'


if __name__ == '__main__':
    with config.user_errors():
        given, = config.load(Settings, positional='source', usage=__doc__)
        settings = Settings(**given)
        try:
            if settings.inspect:
                with config.user_errors(needs_stdout=True):
                    for line in inspect(settings.inspect):
                        print(line)
            else:
                prepare(settings)
        except KeyboardInterrupt:
            sys.exit(130)
