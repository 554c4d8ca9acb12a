"""Text -> token files, and the reading of them: the one place that knows their format and the tokenizers.

    python prepare.py shakespeare                       # a known corpus, characters as tokens
    python prepare.py mybook.txt --tokenizer=bpe:1024   # a text -> data/mybook/
    python prepare.py corpus/                           # documents: .txt .md .jsonl[.gz|.zst] .parquet .csv; -: stdin
    python prepare.py cosmopedia --tokens=1e9           # from the Hugging Face Hub, any dataset there by its id
    python prepare.py --inspect=data/mybook             # shows what is in there

writes data/NAME/{train,val,test}.bin (token ids, little-endian), tokenizer.json (Hugging Face tokenizers format,
whichever tokenizer made the ids) and meta.json (what the rest means). Read back with open_data and load_tokenizer.
The same command goes on where it was interrupted.
"""
import atexit, codecs, csv, functools, gzip, hashlib, http.client, io, json, math, multiprocessing, os, re, shutil
import signal, sys, tempfile, threading, time, urllib.request, zlib
from bisect import bisect_right
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

import config
from nanoseek import files, signals
from nanoseek.hf import hub_folder
from nanoseek.tokens import DTYPES, SPLITS, VERSION, TokenData, file_name, open_split

EOT = '<|endoftext|>'
EOT_NAMES = (EOT, '<|end_of_text|>', '</s>', '<eos>', '<｜end▁of▁sentence｜>')  # in other people's tokenizers
CODE_TOKENS = [f'<|im_{x}|>' for x in ('start', 'end')] + [f'<{x}>' for x in (
    'repo_name reponame file_sep filename gh_stars issue_start issue_comment issue_closed jupyter_start jupyter_text '
    'jupyter_code jupyter_output empty_output').split()]

SMOLLM2 = 'HuggingFaceTB/SmolLM2-135M'

HERE = Path(__file__).resolve().parent
CHAR_RNN = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
TEXTS = {   # a single text: where, its sha256 if it may not change, shares of val and test, license
    'shakespeare': (HERE / 'data/shakespeare/input.txt', None, (0.05, 0.05), 'public domain'),
    'tinyshakespeare': (CHAR_RNN, '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed',
                        (0.1, 0), "public domain text; nanoGPT's shakespeare_char"),
}
HUB = {     # many documents, in parquet files: Hub id, subset, split, text field, license
    'cosmopedia': ('HuggingFaceTB/smollm-corpus', 'cosmopedia-v2', 'train', 'text', 'odc-by'),
    'cosmopedia-100k': ('HuggingFaceTB/cosmopedia-100k', '', 'train', 'text', 'apache-2.0'),
    'fineweb-edu': ('HuggingFaceTB/smollm-corpus', 'fineweb-edu-dedup', 'train', 'text', 'odc-by'),
    'fineweb-edu-10bt': ('HuggingFaceFW/fineweb-edu', 'sample-10BT', 'train', 'text', 'odc-by'),
    'python-edu': ('Avelina/python-edu', '', 'train', 'text', 'odc-by'),     # smollm-corpus itself has ids only
    'tinystories': ('roneneldan/TinyStories', '', 'train', 'text', 'cdla-sharing-1.0'),
    'openwebtext': ('Skylion007/openwebtext', '', 'train', 'text', 'cc0-1.0'),
}
KNOWN = [*TEXTS, *HUB]
PIECE, BATCH = 1 << 15, 1 << 20     # characters: longer documents are cut; what a worker gets at a time
BPE_TEXT = 1 << 28                  # characters that bpe:N is trained on
SAVE_SECONDS = 5.0                  # between two notes of how far a preparation has come

@dataclass
class Settings:
    """Settings of prepare.py"""
    source: str = ''        # what to prepare, also without its name: a known corpus, file, folder, - or Hub dataset
    tokenizer: str = ''     # char, bpe:N (trained here, N tokens), gpt2, gpt2+code, Hub id, folder or tokenizer.json;
                            # if empty: char for a text, bpe:8192 for documents, SmolLM2's for known ones of the Hub
    path: str = ''          # take a known corpus from this local file or folder
    out_dir: str = ''       # where to write; if empty data/NAME
    text_field: str = ''    # where documents have their text; if empty: text, or what a known corpus has
    subset: str = ''        # of a Hub dataset (its "config")
    split: str = ''         # of a Hub dataset; if empty: train
    format: str = 'txt'     # what stdin is: txt, jsonl, csv
    tokens: int | None = None           # stop after the document that makes it so many; none: take all
    val_frac: float | None = None       # share of the documents for validation; none: 0.005, of a single text 0.05
    test_frac: float | None = None      # share for testing; none: as much
    end_of_text: bool = True            # end every document with the end-of-text token
    special_in_text: bool = False       # where a text spells a special token, it is that token and not its letters
    deduplicate: bool = False           # leave out documents that have come before, byte for byte
    pack: int = 0                       # rows of so many tokens for training, each from a document's start; 0: a stream
    bad_documents: Literal['stop', 'skip', 'replace'] = 'stop'  # not UTF-8, no text; replace: bad bytes by U+FFFD
    shard_tokens: int = 100_000_000     # tokens of a file
    workers: int = 0                    # processes; 0: one per core
    resume: Literal['auto', 'never'] = 'auto'  # auto: go on where the same command was interrupted; never: start over
    inspect: str = ''       # show what is in this folder instead

    def __post_init__(self):
        for name, ok, limit in (
                ('tokens', self.tokens is None or self.tokens > 0, 'at least 1, or none'),
                ('val_frac', 0 < (0.1 if self.val_frac is None else self.val_frac) < 1, 'above 0 and below 1'),
                ('test_frac', 0 <= self.shares((0, 0))[1] < 1 - self.shares((0, 0))[0],
                 'at least 0, and with val_frac below 1 (none is as much as that)'),
                ('format', self.format in ('txt', 'jsonl', 'csv'), 'txt, jsonl or csv'),
                ('pack', self.pack == 0 or self.pack > 1 and self.end_of_text, 'above 1, with end_of_text'),
                ('shard_tokens', self.shard_tokens > 0, 'at least 1'), ('workers', self.workers >= 0, 'at least 0')):
            if not ok:
                raise ValueError(f'{name}={getattr(self, name)}: must be {limit}')

    def shares(self, default):
        """-> shares of val and test"""
        val = default[0] if self.val_frac is None else self.val_frac
        return val, self.test_frac if self.test_frac is not None else default[1] if self.val_frac is None else val

# ----------------------------------------------------------------------------------------------------------------------
# Sources: they yield documents, each a str, a LongText, or a ValueError that says what is wrong with it

LONE = re.compile('[\ud800-\udfff]')        # stands for a byte that is not UTF-8, and in JSON for half a character

class BadDocument(ValueError):
    """The one that ends a preparation"""

class LongText:
    """A text that need not fit into memory: a file, in parts [(split or None, characters)] that follow each other"""

    def __init__(self, path, scanned, parts, at):
        (self.characters, self.digest, self.sha256, self.problem), self.path, self.at = scanned, path, at
        self.parts = parts or [(None, self.characters)]

    def pieces(self, tokenizer, part=0, done=0):
        """Yields a piece, its split, whether it ends its part, and [part, done]: where the next one begins"""
        with open(self.path, encoding='utf-8', errors='surrogateescape', newline='') as f:
            deque(blocks(f, sum(n for _, n in self.parts[:part]) + done), 0)
            for part in range(part, len(self.parts)):
                split, characters = self.parts[part]
                for piece in cut(tokenizer, (LONE.sub('\ufffd', block) for block in blocks(f, characters - done))):
                    done += len(piece)
                    yield piece, split, done == characters, [part, done]
                done = 0

def blocks(f, count, size=1 << 20):
    while count > 0 and (block := f.read(min(size, count))):
        count -= len(block)
        yield block

def scan(path):
    """A text file -> its characters, 64-bit hash, sha256, and what is wrong with it, if anything"""
    decoder, characters, size, problem = codecs.getincrementaldecoder('utf-8')('surrogateescape'), 0, 0, None
    digest, sha256 = hashlib.blake2b(digest_size=8), hashlib.sha256()
    with open(path, 'rb') as f:
        while True:
            data = f.read(1 << 20)
            digest.update(data), sha256.update(data)
            text, size = decoder.decode(data, not data), size + len(data)
            if not problem and not text.isascii() and (bad := LONE.search(text)):
                rest = text[bad.start():].encode('utf-8', 'surrogateescape')
                offset = size - len(decoder.getstate()[0]) - len(rest)
                problem = ValueError(f'{path} is not UTF-8 text: byte 0x{rest[0]:02x} at offset {offset}; convert it '
                                     'to UTF-8 first, or see --bad_documents')
            characters += len(text)
            if not data:
                return characters, int.from_bytes(digest.digest(), 'big'), sha256.hexdigest(), problem

def pick(row, field):
    """A document of a row {field: value}"""
    if not isinstance(row, dict) or field not in row:
        has = ', '.join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        return ValueError(f"no field '{field}' (--text_field=NAME names another), but {has[:200]}")
    text = row[field]
    return text if isinstance(text, str) else ValueError(f"'{field}' is {type(text).__name__}, not text")

def read_jsonl(path, at, field):
    line, offset = at or (0, 0)
    with open(path, 'rb') as raw:
        f = raw
        if path.suffix == '.gz':
            f = gzip.open(raw)
        elif path.suffix == '.zst':
            import pyarrow
            f = io.BufferedReader(pyarrow.CompressedInputStream(raw, 'zstd'))
        if f is raw:
            f.seek(offset)
        else:
            deque(blocks(f, offset), 0)
        for data in f:
            line, offset = line + 1, offset + len(data)
            if data.strip():
                try:
                    document = pick(json.loads(data.decode('utf-8-sig', 'surrogateescape')), field)
                except (ValueError, RecursionError) as e:
                    document = ValueError(f'not JSON: {e}')
                yield [line, offset], raw.tell(), document

def read_csv(path, at, field):
    csv.field_size_limit(2**31 - 1)
    with open(path, encoding='utf-8-sig', errors='surrogateescape', newline='') as f:
        for n, row in enumerate(csv.DictReader(f), 1):
            if n > (at or 0):
                yield n, f.buffer.tell(), pick(row, field)

def read_parquet(path, at, field):
    import pyarrow.parquet
    file, n, size = pyarrow.parquet.ParquetFile(path), 0, path.stat().st_size
    if field not in file.schema_arrow.names:
        raise pick(dict.fromkeys(file.schema_arrow.names), field)
    for group in range(file.num_row_groups):
        if n + file.metadata.row_group(group).num_rows <= (at or 0):
            n += file.metadata.row_group(group).num_rows
            continue
        for batch in file.iter_batches(1000, [group], [field]):
            try:
                values = batch.column(0).to_pylist()
            except UnicodeDecodeError:
                values = [v.as_buffer().to_pybytes().decode('utf-8', 'surrogateescape') if v.is_valid else None
                          for v in batch.column(0)]
            for value in values:
                n += 1
                if n > (at or 0):
                    yield n, size * n // file.metadata.num_rows, pick({field: value}, field)

def read_text(path, at, field):
    if at is None:
        if path.stat().st_size > 16 * BATCH:
            yield 1, 0, LongText(path, scan(path), None, None)
        else:
            yield 1, path.stat().st_size, path.read_bytes().decode('utf-8', 'surrogateescape')

READERS = {'.txt': read_text, '.md': read_text, '.jsonl': read_jsonl, '.jsonl.gz': read_jsonl,
           '.jsonl.zst': read_jsonl, '.parquet': read_parquet, '.csv': read_csv}

def kind(path):
    return next((k for k in READERS if path.name.lower().endswith(k)), None)

def identify(paths):
    return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]

class Files:
    """Documents of files, or the one text of a single one; text is its LongText"""
    unit = 'B'

    def __init__(self, name, paths, s, field='text', license='unknown', shares=None, where=None):
        self.name, self.paths, self.field = name, paths, s.text_field or field
        self.sizes, self.at, self.done = [p.stat().st_size for p in paths], None, 0
        self.about = {'name': name, 'path': where or s.path or s.source, 'license': license}
        self.total, self.text = sum(self.sizes), None
        self.identity = identify(paths)
        self.changed = max(changed for _, _, changed in self.identity)
        if shares:
            self.open_text(s.shares(shares), s)
        elif s.source == '-':
            self.identity = scan(paths[0])[2]
        if not self.text:
            self.about |= {'files': len(paths), 'bytes': self.total}

    def open_text(self, shares, s):
        """Splits by position: the same for every tokenizer"""
        scanned = characters, _, sha256, problem = scan(self.paths[0])
        if problem and s.bad_documents != 'replace':
            raise problem
        if s.tokens:
            raise ValueError(f'tokens={s.tokens}: goes with documents; {self.name} is one text')
        if characters < 100:
            raise ValueError(f'{self.paths[0]} has {characters} characters: at least 100 are needed for a train and a '
                             'val split')
        at = [0, *(int(characters * round(1 - n, 9)) for n in (sum(shares), shares[1])), characters]
        parts = [(split, b - a) for split, a, b in zip(SPLITS, at, at[1:]) if b > a]
        self.text, self.identity, self.changed = LongText(self.paths[0], scanned, parts, None), sha256, 0
        self.about['sha256'] = sha256

    def describe(self):
        if self.text:
            return f'{self.text.characters:,} characters from {self.about["path"]}'
        count = len(self.paths)
        return f'{count:,} file{"s" * (count > 1)} of {self.total / 1e6:,.1f} MB from {self.about["path"]}'

    def position(self):
        return self.at

    def read(self, at):
        """Yields documents, from the one at which position() was `at`"""
        if self.text:
            yield self.text
            return
        first, inner = self.at = at or [0, None]
        for i, path in enumerate(self.paths[first:], first):
            before, label = sum(self.sizes[:i]), path if len(self.paths) > 1 else self.about['path']
            try:
                for after, done, document in READERS[kind(path)](path, inner, self.field):
                    if isinstance(document, LongText):
                        document.at = [i, None]
                    self.here = f'{label}, ' + (f'line {after[0]}' if isinstance(after, list) else f'document {after}')
                    self.at, self.done = [i, after], before + done
                    yield document
            except (EOFError, OSError, zlib.error, csv.Error, ValueError) as e:
                raise ValueError(f'{label} cannot be read to its end: {e}') from e
            inner = None

class Hub:
    """Documents of a dataset on the Hugging Face Hub, or of a folder of that form: streamed, never on the disk"""
    unit, text, changed = ' documents', None, 0             # a revision does not change, a folder does

    def __init__(self, name, where, subset, split, field, license, revision):
        import datasets, huggingface_hub
        self.name, self.where, self.field, self.done = name, where, field, 0
        datasets.config.TORCH_AVAILABLE = False             # its import takes longer than all else here
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        huggingface_hub.logging.set_verbosity_error()
        for kind in ('READ', 'OPEN'):                       # after a minute, the same command again is the better way
            setattr(datasets.config, f'STREAMING_{kind}_MAX_RETRIES', 2)
        try:
            if not Path(where).is_dir():                    # what comes later is from the same revision
                patience = 3 * huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT    # by itself it waits for ever
                revision = revision or huggingface_hub.HfApi().dataset_info(where, timeout=patience).sha
            builder = datasets.load_dataset_builder(where, subset or None, revision=revision)
            columns = {'columns': [field]} if hasattr(builder.config, 'columns') else {}    # parquet: no others
            load = functools.partial(datasets.load_dataset, where, subset or None, split=split, revision=revision,
                                     streaming=True)
            features, splits = builder.info.features or load().features or {field: None}, builder.info.splits or {}
            if field not in features:
                raise pick(dict.fromkeys(features), field)
            self.data = load(**columns)
        except Exception as e:                              # whatever its layers raise
            it = '' if Path(where).is_dir() else ' is no file or folder here, and the Hugging Face Hub did not give it'
            raise ValueError(f"'{where}'{it}: {brief(e)}") from e
        self.total = splits[split].num_examples if split in splits else None
        self.identity = {'id': where, 'subset': subset, 'split': split, 'revision': revision}
        if Path(where).is_dir():
            found = identify(p for p in sorted(Path(where).rglob('*')) if p.is_file())
            self.identity['files'], self.changed = found, max(changed for _, _, changed in found)
        self.about = {'name': name, 'path': where, 'subset': subset, 'split': split, 'revision': revision,
                      'license': license or builder.info.license or 'unknown'}

    def describe(self):
        return ' '.join(f'{k} {self.identity[k]}' for k in ('id', 'subset', 'split', 'revision') if self.identity[k])

    def position(self):
        return [self.data.state_dict(), self.done]

    def read(self, at):
        if at:
            self.data.load_state_dict(at[0])
        self.done = at[1] if at else 0
        try:
            for row in self.data:
                self.done += 1
                self.here = f'{self.where}, document {self.done:,}'
                yield pick(row, self.field)
        except Exception as e:
            raise ConnectionError(f'{self.where}: no more came after document {self.done:,} ({brief(e)})') from e

def brief(e):
    e = e.__cause__ if str(e) == 'Server Disconnected' and e.__cause__ else e
    return ' '.join(str(e).split())[:300] or type(e).__name__

def source_name(s):
    """What the folder under data/ is called"""
    path = Path(s.source)
    if s.source in KNOWN or s.source == '-' or not s.source:
        return s.source.replace('-', 'stdin') if s.source == '-' else s.source
    name = path.name[:-len(kind(path))] if kind(path) and not path.is_dir() else path.resolve().name
    if name in KNOWN and path.exists() and not s.out_dir:
        raise ValueError(f"'{s.source}' has the name of a known corpus, whose data it would replace: rename it, or "
                         'give --out_dir')
    return name

def open_source(s, revision=None):
    """--source -> Files or Hub"""
    source, name, path, alone = s.source, source_name(s), Path(s.path or s.source), (0.05, 0.05)
    if s.path and source not in KNOWN:
        raise ValueError(f"'{source}': --path goes with a known corpus ({', '.join(KNOWN)}) only")
    if source in TEXTS:
        where, sha256, shares, license = TEXTS[source]
        file = Path(s.path) if s.path else download(where) if where == CHAR_RNN else where
        where = s.path or (where if where == CHAR_RNN else where.relative_to(HERE).as_posix())
        found = Files(name, [must_exist(file)], s, license=license, shares=shares, where=where)
        if sha256 and found.about['sha256'] != sha256:
            raise ValueError(f'{where} is not the text of {source}: its sha256 is {found.about["sha256"]}, should be '
                             f'{sha256}')
        return found
    where, subset, split, field, license = HUB.get(source, (source, '', '', 'text', 'unknown'))
    if s.path:
        where, subset, split = s.path, '', ''
    where, subset, split, field = where, s.subset or subset, s.split or split, s.text_field or field
    if source == '-':
        return Files(name, [spool(s.format)], s, where='stdin', shares=alone if s.format == 'txt' else None)
    folder = bool(source) and path.is_dir()                 # Path('') is a folder, too
    if folder and not subset and not split:
        paths = sorted(p for p in path.rglob('*') if p.is_file() and kind(p) and '/.' not in f'/{p.relative_to(path)}')
        if not paths:
            raise ValueError(f"folder '{path}' has no file that ends in {', '.join(READERS)}")
        return Files(name, paths, s, field, license)
    if kind(path) and (s.path or source not in HUB):
        return Files(name, [must_exist(path)], s, field, license, alone if kind(path) in ('.txt', '.md') else None)
    if folder or source in HUB or re.fullmatch(r'[\w.-]+/[\w.-]+', where) and not path.parent.is_dir():
        return Hub(name, where, subset, split or 'train', field, license, revision)
    raise ValueError((f"unknown source '{source}'" + config.near(source, KNOWN) if source else 'nothing to prepare') +
                     f': give {", ".join(KNOWN)}, a file that ends in {", ".join(READERS)}, a folder of them, - or a '
                     'Hub id')

def must_exist(path):
    if not Path(path).is_file():
        raise ValueError(f"no file '{path}'")
    return Path(path)

def spool(format):
    """stdin -> a file, because it is read twice"""
    with tempfile.NamedTemporaryFile(suffix=f'.{format}', delete=False) as f:
        atexit.register(os.unlink, f.name)
        shutil.copyfileobj(sys.stdin.buffer, f)
    return Path(f.name)

def download(url):
    print(f'downloading {url}')
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, tempfile.NamedTemporaryFile(delete=False) as f:
            atexit.register(os.unlink, f.name)
            shutil.copyfileobj(answer, f)
        return Path(f.name)
    except (OSError, http.client.HTTPException) as e:
        raise ValueError(f"could not download {url}: {e}; give its text with --path=FILE, or prepare 'shakespeare', "
                         'which needs no network') from e

# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers: each becomes a tokenizers.Tokenizer, which makes the ids here and reads prompts later

def make_tokenizer(spec, source, s, eot):
    """--tokenizer -> the bytes of tokenizer.json. `char` has all characters of the source and eot, if there is one;
    `bpe:N` is trained on train documents"""
    if spec == 'char':
        if isinstance(source, Hub):
            raise ValueError("tokenizer 'char' would read all of the dataset for its characters first: take bpe:N")
        tokenizer = char_tokenizer(set().union(*texts_to_learn(source, s, math.inf, SPLITS)))
        tokenizer.add_special_tokens([eot] if eot else [])
    elif spec.startswith('bpe:'):
        tokenizer = train_bpe(spec, texts_to_learn(source, s, BPE_TEXT))
    elif spec in ('gpt2', 'gpt2+code'):
        tokenizer = gpt2_tokenizer()
        tokenizer.add_special_tokens(CODE_TOKENS if spec == 'gpt2+code' else [])
    else:
        here = Path(spec).exists() or spec.endswith('.json')
        tokenizer = load_tokenizer(spec if here else hub_folder(spec, ['tokenizer.json']))
        if tokenizer.num_special_tokens_to_add(is_pair=False):
            tokenizer.post_processor = None     # no <bos> in the token files, so none before the model's prompts
    return tokenizer.to_str(pretty=True).encode()

def char_tokenizer(characters):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    vocab = {c: i for i, c in enumerate(sorted(characters))}
    # BPE would drop a new character silently; WordLevel whose unknown token is not in the vocabulary refuses it.
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token='<unk>'))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
    tokenizer.decoder = decoders.Fuse()
    return tokenizer

def byte_level(model):
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)      # splits by GPT-2's regex
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer

def train_bpe(spec, texts):
    from tokenizers import models, pre_tokenizers, trainers
    size = config.literal(spec.removeprefix('bpe:'))
    if type(size) not in (int, float) or size != size // 1 or size < 257:
        raise ValueError(f"tokenizer '{spec}': N of bpe:N is the size of the vocabulary, a whole number of at least "
                         f'257 (256 bytes and {EOT}), such as bpe:1024')
    tokenizer = byte_level(models.BPE())
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=int(size), min_frequency=2, special_tokens=[EOT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if tokenizer.get_vocab_size() < size:
        print(f'no pair of tokens is left that comes twice: a vocabulary of {int(size):,} is not reached')
    return tokenizer

def gpt2_tokenizer():
    """tiktoken's GPT-2. It has each token's rank, where the tokenizers format has merges."""
    import tiktoken
    from tokenizers import models
    try:
        encoding = tiktoken.get_encoding('gpt2')
    except OSError as e:
        raise ValueError(f"tokenizer 'gpt2': tiktoken could not download its vocabulary ({type(e).__name__}) and has "
                         'none in TIKTOKEN_CACHE_DIR; --tokenizer=bpe:N needs no network') from e
    ranks = encoding._mergeable_ranks                                   # {token's bytes: id}, ids in order of merging
    letters, merges = gpt2_letters(), []
    spell = lambda token: ''.join(letters[b] for b in token)
    for token in sorted((t for t in ranks if len(t) > 1), key=ranks.get):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:                                           # the last merge is of the two that remain
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        merges.append((spell(parts[0]), spell(parts[1])))
    tokenizer = byte_level(models.BPE({spell(token): i for token, i in ranks.items()}, merges))
    tokenizer.add_special_tokens([EOT])
    return tokenizer

def gpt2_letters():
    """{byte: the character that stands for it in the vocabulary of a BPE of bytes}"""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]   # themselves; the others U+0100 and on
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}

# ----------------------------------------------------------------------------------------------------------------------
# Text -> ids, in worker processes

CUT = re.compile(r'(?<=\S)\s(?=\S)|(?<=\w)(?=[^\w\s])')     # a lone white space, or before punctuation

def cut(tokenizer, blocks, size=PIECE, context=200):
    """Blocks of a text -> pieces of it, that give the same ids as the whole: it is cut about every `size` characters,
    where both sides make the same tokens together and apart. Depends on the text behind the last cut alone."""
    blocks, text, at, more = iter(blocks), '', 0, True
    while True:
        found = CUT.search(text, at + size, len(text) - context * more)
        if not found and more:
            block = next(blocks, None)
            text, more = text + (block or ''), block is not None
        elif not found:
            break
        else:
            at = found.start()
            left, right = text[max(0, at - context):at], text[at:at + context]
            if not tokenizer or encode(tokenizer, left + right) == encode(tokenizer, left) + encode(tokenizer, right):
                yield text[:at]
                text, at = text[at:], 0
    if text:
        yield text

@functools.lru_cache(1)
def engine(file, spec, special_in_text):
    """-> tokenizer, what makes arrays of ids (uint32) of texts, the bytes that it loses, None where nobody knows"""
    tokenizer = load_tokenizer(file)
    tokenizer.encode_special_tokens = not special_in_text
    lost = None if special_in_text else lost_bytes(tokenizer)
    if spec in ('gpt2', 'gpt2+code'):
        import tiktoken
        gpt2 = tiktoken.get_encoding('gpt2')
        special = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items()}
        own = tiktoken.Encoding(spec, pat_str=gpt2._pat_str, mergeable_ranks=gpt2._mergeable_ranks,
                                special_tokens=special)
        options = {'allowed_special': set(special) if special_in_text else set(), 'disallowed_special': ()}
        return tokenizer, lambda texts: [own.encode_to_numpy(text, **options) for text in texts], lost
    thread = ThreadPoolExecutor(1)      # with a heap of its own: a fifth faster than in Python's, full of holes
    return tokenizer, lambda texts: thread.submit(encode_texts, tokenizer, texts).result(), lost

def lost_bytes(tokenizer):
    """Of a BPE of bytes with nothing before it that changes a text: the bytes that it has no token for. Else None"""
    parts = json.loads(tokenizer.to_str())
    steps = (lambda p: p.get('pretokenizers', [p]))(parts['pre_tokenizer'] or {'type': None})
    if (parts['model']['type'] == 'BPE' and not parts['normalizer'] and steps[-1]['type'] == 'ByteLevel'
            and (parts['decoder'] or {}).get('type') == 'ByteLevel'
            and {p['type'] for p in steps} <= {'ByteLevel', 'Digits'}
            and not any(p.get('add_prefix_space') for p in steps)):
        return bytes(b for b, letter in gpt2_letters().items() if tokenizer.token_to_id(letter) is None)

def encode_texts(tokenizer, texts):
    try:
        found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    except Exception:
        for text in texts:
            encode(tokenizer, text)                     # its error names the character
        raise
    return [np.array(piece.ids, np.uint32) for piece in found]

def tokenize(file, spec, special_in_text, eot, pieces, check):
    """pieces: (split, text, whether it ends a document) -> {split: [ids, bytes, documents]}, tokens of each piece.
    eot: id that ends a document, or None. ValueError unless the ids give the text back; for gpt2 also unless they are
    what tokenizer.json makes. A text that cannot lose anything is checked only where check is set."""
    tokenizer, run, lost = engine(file, spec, special_in_text)
    texts = [[text] if len(text) <= 2 * PIECE else list(cut(tokenizer, [text])) for _, text, _ in pieces]
    flat = [text for parts in texts for text in parts]
    made, sizes = run(flat), []
    for text, ids in zip(flat, made):
        data = text.encode()
        sizes.append(len(data))
        if check or lost is None or len(data.translate(None, lost)) < len(data):
            check_round_trip(tokenizer, spec, text, ids.tolist())
    found, lengths, end = {}, [], [] if eot is None else [np.array([eot], np.uint32)]
    made, sizes = iter(made), iter(sizes)
    for (split, _, last), parts in zip(pieces, texts):
        ids = [next(made) for _ in parts] + end * last
        lengths.append(sum(map(len, ids)))
        of = found.setdefault(split, [[], 0, 0])
        of[0] += ids
        of[1] += sum(next(sizes) for _ in parts)
        of[2] += last
    for of in found.values():
        of[0] = np.concatenate(of[0]) if of[0] else np.zeros(0, np.uint32)
    return found, lengths

def check_round_trip(tokenizer, spec, text, ids):
    back = decode(tokenizer, ids)
    if back != text:
        at = len(os.path.commonprefix([text, back]))
        raise ValueError(f"tokenizer '{spec}' does not give the text back: behind {text[max(at - 20, 0):at]!r} "
                         f'{text[at:at + 20]!r} becomes {back[at:at + 20]!r}; take another, such as bpe:1024')
    if spec in ('gpt2', 'gpt2+code') and encode(tokenizer, text) != ids:
        raise ValueError(f"tokenizer '{spec}': tokenizer.json and tiktoken disagree on {text[:80]!r}")

def worker():
    """A worker ends with its parent, however that ends, and leaves Ctrl-C and SIGTERM to it"""
    for name in signals.STOPPING:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()

class Seen:
    """A set of 64-bit numbers in 8 bytes each and a little"""

    def __init__(self, numbers):
        self.sorted, self.recent = np.unique(numbers), set()

    def add(self, number):
        """-> whether it is new"""
        i = np.searchsorted(self.sorted, np.uint64(number))
        if number in self.recent or i < len(self.sorted) and self.sorted[i] == number:
            return False
        self.recent.add(number)
        if len(self.recent) > 10_000 + len(self.sorted) // 16:
            self.sorted = np.sort(np.concatenate((self.sorted, np.fromiter(self.recent, np.uint64))))
            self.recent = set()
        return True

def documents(source, s, tokenizer, state, seen=None):
    """Yields the pieces (split, text, whether it ends a document) of all documents that are to be taken, and keeps in
    state what is needed to go on behind the last one"""
    val, test = s.shares((0.005, 0.005))
    for document in source.read(state['at']):
        long = document if isinstance(document, LongText) else None
        problem = long.problem if long else document if isinstance(document, ValueError) else None
        if not long and not problem:
            try:
                data = document.encode()
            except UnicodeEncodeError as e:
                problem = ValueError(f'not UTF-8 text: {document[e.start:e.start + 1]!r} after '
                                     f'{document[max(e.start - 20, 0):e.start]!r}')
                document = LONE.sub('\ufffd', document)
                data = document.encode()
                problem = None if s.bad_documents == 'replace' else problem
        if problem and not (long and s.bad_documents == 'replace'):
            if s.bad_documents == 'stop':
                where = '' if long else f'{source.here}: '
                raise BadDocument(f'{where}{problem}; leave such documents out with --bad_documents=skip')
            state['left_out']['bad'] += 1
            continue
        digest = long.digest if long else int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), 'big')
        if seen and state['within'] == [0, 0]:
            if not seen.add(digest):
                state['left_out']['duplicates'] += 1
                continue
            state['hashes'].append(digest)
        at = digest / 2**64
        state['lowest'] = min(state['lowest'], at)
        split = 'val' if at < val else 'test' if at < val + test else 'train'
        if not long:
            yield split, document, True
            continue
        for text, own, last, within in long.pieces(tokenizer, *state['within']):
            state['at'], state['within'] = long.at, within if source.text or not last else [0, 0]
            yield own or split, text, last

def batches(source, s, tokenizer, progress, seen):
    """Yields batches of pieces of about BATCH characters, and what the progress's state is behind them"""
    ahead = {k: json.loads(json.dumps(progress.state[k])) for k in ('at', 'within', 'left_out', 'lowest', 'seen')}
    ahead['hashes'], pieces, size = progress.hashes, [], 0

    def batch():
        ahead['seen'] = progress.kept + len(progress.hashes)
        return pieces, json.loads(json.dumps({k: v for k, v in ahead.items() if k != 'hashes'}))
    for piece in documents(source, s, tokenizer, ahead, seen):
        pieces.append(piece)
        size += len(piece[1]) + 16
        if size > BATCH:
            if ahead['within'] == [0, 0]:
                ahead['at'] = source.position()
            yield batch()
            pieces, size = [], 0
    if ahead['within'] == [0, 0]:
        ahead['at'] = source.position()
    yield batch()

def texts_to_learn(source, s, most, splits=('train',)):
    """Yields up to `most` characters of the documents of these splits"""
    state = {'at': None, 'within': [0, 0], 'left_out': {'bad': 0, 'duplicates': 0}, 'lowest': 1.0}
    for split, text, _ in documents(source, s, None, state):
        if split in splits:
            yield from [text] if len(text) <= 2 * PIECE else cut(None, [text])
            most -= len(text)
        if most <= 0:
            break

# ----------------------------------------------------------------------------------------------------------------------
# Writing: in data/NAME/.partial, with a note of how far it has come, until all is there

class Progress:
    """Token files that grow, and progress.json with state, which says how much of them counts"""

    def __init__(self, folder, state, dtype, shard_tokens):
        self.folder, self.state, self.dtype, self.shard = folder, state, np.dtype(DTYPES[dtype]), shard_tokens
        self.touched, self.hashes, self.kept = set(), [], state['seen']
        self.began, self.first = time.time(), self.tokens()

    def go_on(self):
        """Cuts the files to what counts -> hashes of the documents until then. OSError where there is less"""
        sizes = {'seen.bin': 8 * self.state['seen']}
        for split, of in self.state['splits'].items():
            for shard in range(len(of['crc'])):
                tokens = min(of['tokens'] - shard * self.shard, self.shard)
                sizes[file_name(split, shard)] = tokens * self.dtype.itemsize
        for file in self.folder.glob('*.bin'):
            if file.name not in sizes:
                file.unlink()
        for name, size in sizes.items():
            with open(self.folder / name, 'ab') as f:
                if f.tell() < size:
                    raise OSError(f'{name} has {f.tell()} bytes, not {size}')
                f.truncate(size)
        return np.fromfile(self.folder / 'seen.bin', np.uint64)

    def append(self, split, ids, size, documents):
        of = self.state['splits'].setdefault(split, {'tokens': 0, 'bytes': 0, 'documents': 0, 'crc': []})
        while len(ids):
            shard, used = divmod(of['tokens'], self.shard)
            part, ids = ids[:self.shard - used].astype(self.dtype).tobytes(), ids[self.shard - used:]
            with open(self.folder / file_name(split, shard), 'ab') as f:
                f.write(part)
            self.touched.add(f.name)
            of['crc'] += [0] * (shard == len(of['crc']))
            of['crc'][shard] = zlib.crc32(part, of['crc'][shard])
            of['tokens'] += len(part) // self.dtype.itemsize
        of['bytes'], of['documents'] = of['bytes'] + size, of['documents'] + documents

    def save(self):
        count = self.state['seen'] - self.kept
        with open(self.folder / 'seen.bin', 'ab') as f:
            f.write(np.array(self.hashes[:count], np.uint64).tobytes())
        del self.hashes[:count]                             # the same list, to which documents() appends
        self.kept = self.state['seen']
        for name in (*self.touched, f.name):
            files.sync(name)
        self.touched = set()
        files.write_file(self.folder / 'progress.json', json.dumps(self.state).encode())

    def tokens(self):
        return sum(of['tokens'] for of in self.state['splits'].values())

def prepare(s):
    """Read, split, tokenize, check, write; -> the directory"""
    out = Path(s.out_dir or Path('data') / source_name(s))
    with files.lock(out):
        return prepare_in(out, s)

def prepare_in(out, s):
    began, work = time.time(), out / '.partial'
    recipe = {k: v for k, v in asdict(s).items() if k not in ('workers', 'resume', 'out_dir', 'inspect', 'path')}
    recipe |= {'version': VERSION, 'tokenizer': s.tokenizer or ('bpe:8192' if s.source not in HUB else SMOLLM2)}
    try:
        before = json.loads((work / 'progress.json').read_bytes()) if s.resume == 'auto' else None
    except (OSError, ValueError):
        before = None
    source = open_source(s, before['revision'] if before and before['recipe'].get('source') == s.source else None)
    if source.text and not s.tokenizer:
        recipe['tokenizer'] = 'char'
    for folder in (work, work / 'packed'):                  # an earlier one that was stopped while it moved its files
        if (folder / 'meta.json').exists():
            move(folder, out)
    if s.resume == 'auto' and is_complete(out, recipe, source):
        if before and before['recipe'] == recipe:
            shutil.rmtree(work)
        print(f'{out} is complete, by the same settings and from the same text: --resume=never makes it again')
        return out
    if before:
        check_same(work, before, recipe, source)
    print(f'{source.name}: {source.describe()}')
    try:
        meta, progress, seen = begin(s, source, recipe, work, before)
        if not progress.state['complete']:
            fill(s, source, meta, progress, seen)
        finish(s, source, meta, progress, out)
    except BaseException as e:
        kept = (work / 'progress.json').exists()
        if kept and (isinstance(e, BadDocument) or not isinstance(e, ValueError)):
            same = 'with that it' if isinstance(e, BadDocument) else 'the same command'
            note = f'{same} goes on from what is in {work}'
            if isinstance(e, (OSError, BadDocument)):
                raise type(e)(f'{e}; {note}') from e
            print(note, file=sys.stderr)
        else:                                               # nothing to go on with, or to no other end: no trace
            shutil.rmtree(work, ignore_errors=True)
        raise
    dataset = out.name if out.parent == Path('data') else str(out)
    print(f'written to {out} in {time.time() - began:.1f} s; next: python train.py ' + (
        'config/shakespeare.py' if dataset == 'shakespeare' else f'--dataset={dataset}'))
    return out

def check_same(work, before, recipe, source):
    """ValueError unless what is in work was begun by the same command, of the same text"""
    old = before['recipe']
    if old['bad_documents'] == 'stop':          # there was none so far
        old['bad_documents'] = recipe['bad_documents']
    other = [f'{k}={old.get(k)!r}, now {v!r}' for k, v in recipe.items() if old.get(k) != v]
    if other or before['identity'] != source.identity:
        raise ValueError(f'{work} has an interrupted preparation {"with " + other[0] if other else "of another text"}: '
                         'go on with that, give another --out_dir, or drop it with --resume=never')

def is_complete(out, recipe, source):
    try:
        meta = TokenData(out).meta
    except (ValueError, OSError):
        return False
    without = lambda about: {k: v for k, v in about.items() if k != 'revision'}
    return (meta.get('recipe') == recipe and without(meta['source']) == without(source.about)
            and source.changed < (out / 'meta.json').stat().st_mtime_ns)

def begin(s, source, recipe, work, before):
    """-> what meta.json says of the tokens, the Progress there is, hashes of the documents so far"""
    spec = recipe['tokenizer']
    if before:
        saved = (work / 'tokenizer.json').read_bytes()
    else:
        documents = not source.text
        saved = make_tokenizer(spec, source, s, EOT if documents and s.end_of_text else None)
    tokenizer = parse_tokenizer(saved, spec)                # the ids are from what tokenizer.json will hold
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    eot = next((i for i in map(tokenizer.token_to_id, EOT_NAMES) if i is not None), None)
    if eot is None and s.end_of_text and not source.text:
        raise ValueError(f"tokenizer '{spec}' has no end-of-text token (none of {', '.join(EOT_NAMES)}): take another, "
                         'or --end_of_text=false')
    print(f'tokenizer {spec}: a vocabulary of {vocab_size:,}')
    engine.cache_clear()                                    # of an earlier call, for a file of the same name
    meta = {'version': VERSION, 'dtype': 'uint16' if vocab_size <= 1 << 16 else 'uint32', 'vocab_size': vocab_size,
            'eot_id': eot, 'tokenizer': {'name': spec, 'sha256': hashlib.sha256(saved).hexdigest()}}
    state = before or {'recipe': recipe, 'identity': source.identity, 'revision': source.about.get('revision'),
                       'at': None, 'within': [0, 0], 'left_out': {'bad': 0, 'duplicates': 0}, 'lowest': 1.0, 'seen': 0,
                       'splits': {}, 'complete': False}
    progress = Progress(work, state, meta['dtype'], s.shard_tokens)
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

def fill(s, source, meta, progress, seen):
    """All documents, or as many as s.tokens wants, into the token files"""
    state, file, saved, number = progress.state, str(progress.folder / 'tokenizer.json'), time.time(), 0
    eot = meta['eot_id'] if s.end_of_text and not source.text else None
    call = functools.partial(tokenize, file, meta['tokenizer']['name'], s.special_in_text, eot)
    workers = s.workers or len(os.sched_getaffinity(0) if hasattr(os, 'sched_getaffinity') else range(os.cpu_count()))
    tokenizer = engine(file, meta['tokenizer']['name'], s.special_in_text)[0]
    todo = batches(source, s, tokenizer, progress, Seen(seen) if s.deduplicate else None)
    jobs, (stop, handlers), problem, batch = deque(), signals.catch(), None, True
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context('spawn'), worker)
    bar = tqdm(total=s.tokens or source.total, unit='tok' if s.tokens else source.unit, unit_scale=True, leave=False,
               delay=0.5, mininterval=0.5 if sys.stderr.isatty() else 30)
    try:
        while (batch or jobs) and not state['complete'] and not stop:
            try:
                batch = batch and next(todo, None)
            except (ConnectionError, ValueError) as e:      # what came until then counts
                batch, problem = None, e
            if batch:
                here = workers == 1 or source.unit == 'B' and source.total < 4 * BATCH      # not worth a worker's start
                jobs.append((now(call, batch[0], number % 16 == 0) if here else
                             submit(pool, call, batch[0], number % 16 == 0), *batch))
                number += 1
            while jobs and not state['complete'] and (not batch or len(jobs) > 2 * workers or jobs[0][0].done()):
                collect(s, call, progress, *jobs.popleft())
            show(bar, s, source, progress)
            if time.time() - saved > SAVE_SECONDS:
                progress.save()
                saved = time.time()
        state['complete'] = state['complete'] or not problem and not stop
        if not isinstance(problem, ValueError) or (progress.folder / 'progress.json').exists():
            progress.save()
    except BrokenProcessPool as e:
        raise OSError('a worker process died, perhaps for lack of memory; --workers=1 needs least') from e
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)
        signals.restore(handlers)
    if stop or problem and not state['complete']:
        raise problem or KeyboardInterrupt

def submit(pool, *args):
    """pool.submit. A process that it starts inherits blocked signals: they are its parent's, also before worker()"""
    if not hasattr(signal, 'pthread_sigmask'):      # Windows, where a started process inherits none
        return pool.submit(*args)
    theirs = [getattr(signal, name) for name in signals.STOPPING]
    signal.pthread_sigmask(signal.SIG_BLOCK, theirs)
    try:
        return pool.submit(*args)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, theirs)

def now(call, *args):
    """What pool.submit gives, done already"""
    job = Future()
    job.set_result(call(*args))
    return job

def collect(s, call, progress, job, pieces, behind):
    """The ids of a batch into the files; with the document that makes s.tokens, the state is complete"""
    (found, lengths), state = job.result(), progress.state
    if s.tokens:
        total = progress.tokens() + np.cumsum(lengths)
        enough = [i for i, (_, _, last) in enumerate(pieces) if last and total[i] >= s.tokens]
        if enough:
            found, state['complete'] = call(pieces[:enough[0] + 1], False)[0], True
    for split, (ids, size, documents) in found.items():
        progress.append(split, ids, size, documents)
    state.update(behind)

def show(bar, s, source, progress):
    tokens = progress.tokens()
    bar.update((tokens if s.tokens else source.done) - bar.n)
    bar.set_postfix_str(f'{tokens / 1e6:,.1f}M tokens, '
                        f'{(tokens - progress.first) / max(time.time() - progress.began, 1e-3):,.0f} a second', False)

def finish(s, source, meta, progress, out):
    """meta.json, and all files to their places"""
    state, work = progress.state, progress.folder
    if s.pack:
        progress = pack(progress, meta['eot_id'], s.pack + 1, load_tokenizer(work / 'tokenizer.json'))
    splits = progress.state['splits']
    for split in ('train', 'val'):
        if not splits.get(split, {}).get('tokens'):
            least = math.ceil(state['lowest'] * 1e4 + 1) / 1e4
            raise ValueError(f'{split} got no ' + (
                f'row of {s.pack} tokens: take more documents or a smaller --pack' if s.pack else
                'document: take more' + (f', or --val_frac={least}' + ' --test_frac=0' * (least > 0.1) +
                                         ', the least that has one') * (split == 'val')))
    meta['splits'] = {split: {k: splits[split][k] for k in ('tokens', 'bytes', 'documents')}
                      for split in SPLITS if splits.get(split, {}).get('tokens')}
    meta |= {'end_of_text': bool(s.end_of_text and not source.text), 'pack': s.pack, 'left_out': state['left_out'],
             'shard_tokens': s.shard_tokens, 'source': source.about, 'recipe': state['recipe'],
             'crc32': {split: splits[split]['crc'] for split in meta['splits']}}
    for split, of in meta['splits'].items():
        print(f'{split:5} {of["tokens"]:14,} tokens, {of["bytes"] / of["tokens"]:.2f} bytes per token' +
              f', {of["documents"]:,} documents' * (not source.text))
    for what, count in state['left_out'].items():
        print(*[f'left out: {count:,} {what}'] * (count > 0), end='\n' * (count > 0))
    if progress.folder != work:
        shutil.copy(work / 'tokenizer.json', progress.folder)
    files.write_file(progress.folder / 'meta.json', json.dumps(meta, indent=1, ensure_ascii=False).encode())
    move(progress.folder, out)
    shutil.rmtree(work)

def move(folder, out):
    """A complete preparation to its place; can be interrupted and repeated. meta.json goes first, and comes last"""
    meta = json.loads((folder / 'meta.json').read_bytes())
    names = {file_name(split, i) for split, crcs in meta['crc32'].items() for i in range(len(crcs))}
    (out / 'meta.json').unlink(missing_ok=True)
    for file in out.glob('*.bin'):
        if re.fullmatch(rf'({"|".join(SPLITS)})(-\d+)?\.bin', file.name) and file.name not in names:
            file.unlink()
    for name in (*names, 'tokenizer.json', 'meta.json'):
        if (folder / name).exists():
            os.replace(folder / name, out / name)

# ----------------------------------------------------------------------------------------------------------------------
# Packing: rows that begin where a document does

def pack(progress, eot, row, tokenizer):
    """Token files with documents one behind the other -> others with rows of so many tokens"""
    folder = progress.folder / 'packed'
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rows = Progress(folder, {'splits': {}, 'seen': 0}, progress.dtype.name, progress.shard)
    for split, of in progress.state['splits'].items():
        lost = {'tokens': 0, 'bytes': 0, 'documents': 0}

        def lose(ids, whole):
            lost['tokens'] += len(ids)
            lost['bytes'] += len(decode(tokenizer, ids[ids != eot]).encode('utf-8', 'replace'))
            lost['documents'] += whole
        documents = split_at(open_split(progress.folder, split, of['tokens'], progress.dtype, progress.shard), eot)
        for block in best_fit(documents, row, lose):
            rows.append(split, block, 0, 0)
        rows.append(split, np.zeros(0), of['bytes'] - lost['bytes'], of['documents'] - lost['documents'])
        print(f'{split}: rows of {row - 1:,} tokens; {lost["tokens"] / of["tokens"]:.1%} of all tokens did not fit')
    return rows

def split_at(tokens, eot, size=1 << 22):
    """Yields documents, with the eot that ends them"""
    begun = np.zeros(0, tokens[:1].dtype)
    for start in range(0, len(tokens), size):
        block = np.concatenate((begun, tokens[start:start + size]))
        *whole, begun = np.split(block, np.flatnonzero(block == eot) + 1)
        yield from whole

def best_fit(documents, row, lose, waiting=1024):
    """Yields rows: the longest document that fits, again and again; where none does, the shortest is cut. lose gets
    what is cut off, and whether that is a document's beginning"""
    lengths, held, parts, room = [], [], [], row
    while True:
        while len(held) < waiting and (document := next(documents, None)) is not None:
            i = bisect_right(lengths, len(document))
            lengths.insert(i, len(document)), held.insert(i, document)
        if not held:
            break
        i = max(bisect_right(lengths, room) - 1, 0)
        document, _ = held.pop(i), lengths.pop(i)
        if len(document) > room:
            lose(document[room:], False)
        parts.append(document[:room])
        room -= len(parts[-1])
        if not room:
            yield np.concatenate(parts)
            parts, room = [], row
    for document in parts:
        lose(document, True)

# ----------------------------------------------------------------------------------------------------------------------
# Looking at it

def inspect(folder, top=20, samples=3):
    """Prints what is in a folder that prepare wrote, and reads all of it. ValueError where something is wrong"""
    data, tokenizer = TokenData(folder), load_tokenizer(folder)
    meta, counts = data.meta, np.zeros(data.vocab_size, np.int64)
    print(*(f'{k:12} {v}' for k, v in {**meta['source'], 'tokenizer': meta['tokenizer']['name'],
                                       'vocabulary': f'{data.vocab_size:,}', 'ids': meta['dtype']}.items()), sep='\n')
    data.check(checksums=True)
    for split, ids in data.splits.items():
        of, lengths, begun = meta['splits'][split], np.zeros(0, np.int64), 0
        for start in range(0, len(ids), 1 << 22):
            block = np.asarray(ids[start:start + (1 << 22)])
            counts += np.bincount(block, minlength=data.vocab_size)
            ends = block == data.eot_id if meta.get('end_of_text') else np.zeros(len(block), bool)
            if data.row:                                    # what is cut off at a row's end ends there, too
                ends |= np.arange(start + 1, start + len(block) + 1) % (data.row + 1) == 0
            ends = np.flatnonzero(ends) + start
            lengths = np.concatenate((lengths, np.diff(ends + 1, prepend=begun)))
            begun = ends[-1] + 1 if len(ends) else begun
        print(f'\n{split}: {len(ids):,} tokens, {of["bytes"]:,} bytes of text, {of["bytes"] / len(ids):.3f} bytes per '
              'token')
        if len(lengths):
            print(f'{len(lengths):,} documents of {lengths.min():,} to {lengths.max():,} tokens, end of text included; '
                  f'median {np.median(lengths):,.0f}, mean {lengths.mean():,.1f}')
            bins = np.bincount(np.log2(lengths).astype(int))
            for n in range(np.flatnonzero(bins)[0], len(bins)):
                bar = '#' * math.ceil(50 * bins[n] / bins.max())
                print(f'{2**n:12,} to {2**(n + 1) - 1:<12,} {bins[n]:12,} {bar}')
    order = np.argsort(-counts, kind='stable')[:top]
    print(f'\n{(counts > 0).sum():,} of {data.vocab_size:,} tokens occur; the most frequent:')
    print(*(f'{counts[i] / counts.sum():7.2%} {i:7} {decode(tokenizer, [i])!r}' for i in order if counts[i]), sep='\n')
    rng, ids = np.random.default_rng(0), data.splits['train']
    for at in rng.integers(0, max(len(ids) - 100, 1), samples):
        print(f'\n--- train, 100 tokens from {at:,}\n{decode(tokenizer, ids[at:at + 100])}')
    print('\nchecks: sizes, ids' + ', checksums' * ('crc32' in meta) + ' and the tokenizer are right')

# ----------------------------------------------------------------------------------------------------------------------
# Reading: tokenizers

def load_tokenizer(path):
    """A tokenizer.json, or a folder with one -> tokenizers.Tokenizer"""
    path = Path(path) / 'tokenizer.json' if Path(path).is_dir() else path
    return parse_tokenizer(must_exist(path).read_bytes(), path)

def parse_tokenizer(data, name):
    from tokenizers import Tokenizer
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as e:                                      # tokenizers raises nothing more special
        raise ValueError(f"'{name}' is not a tokenizer in Hugging Face's format: {e}") from e
    tokenizer.encode_special_tokens = True                      # '<|endoftext|>' in a text is text, not the end of it
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer

def encode(tokenizer, text):
    """text -> list of ids. ValueError for a character that has none."""
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    except Exception:
        unknown = next((c for c in text if tokenizer.token_to_id(c) is None), None)
        if unknown is None:
            raise
        raise ValueError(f'character {unknown!r} (U+{ord(unknown):04X}) is not in the vocabulary of this tokenizer, '
                         f'which has {tokenizer.get_vocab_size()} characters') from None

def decode(tokenizer, ids):
    """ids -> text, with special tokens spelled out"""
    return tokenizer.decode(list(map(int, ids)), skip_special_tokens=False)

if __name__ == '__main__':
    with config.user_errors():
        settings = Settings(**config.load(Settings, positional='source', usage=__doc__)[0])
        try:
            inspect(settings.inspect) if settings.inspect else prepare(settings)
        except KeyboardInterrupt:
            sys.exit(130)
