"""Where documents come from: files of several formats, stdin, the Hugging Face Hub.

A source yields Documents. What is malformed is a document with a problem, named by its file and
line, and never a part of a text. (datasets reads such files as well, but its csv, json and parquet
builders stop at the first bad row without its line, or fill in nulls without a word: so files have
readers of our own, and the Hub, where files are clean, goes through datasets.)
"""
import atexit
import codecs
import csv
import functools
import gzip
import hashlib
import http.client
import io
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import urllib.request
import zlib
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
CHAR_RNN = ('https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/'
            'input.txt')

# A single text: where, its sha256 if it may not change, shares of val and test, license
TEXTS = {
    'shakespeare': (HERE / 'data/shakespeare/input.txt', None, (0.05, 0.05), 'public domain'),
    'tinyshakespeare': (CHAR_RNN,
                        '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed',
                        (0.1, 0), "public domain text; nanoGPT's shakespeare_char"),
}
# Many documents, in parquet files: Hub id, subset, split, text field, license
HUB = {
    'cosmopedia': ('HuggingFaceTB/smollm-corpus', 'cosmopedia-v2', 'train', 'text', 'odc-by'),
    'cosmopedia-100k': ('HuggingFaceTB/cosmopedia-100k', '', 'train', 'text', 'apache-2.0'),
    'fineweb-edu': ('HuggingFaceTB/smollm-corpus', 'fineweb-edu-dedup', 'train', 'text', 'odc-by'),
    'fineweb-edu-10bt': ('HuggingFaceFW/fineweb-edu', 'sample-10BT', 'train', 'text', 'odc-by'),
    # smollm-corpus itself has the ids of its files only
    'python-edu': ('Avelina/python-edu', '', 'train', 'text', 'odc-by'),
    'tinystories': ('roneneldan/TinyStories', '', 'train', 'text', 'cdla-sharing-1.0'),
    'openwebtext': ('Skylion007/openwebtext', '', 'train', 'text', 'cc0-1.0'),
}
KNOWN = [*TEXTS, *HUB]
ALONE = (0.05, 0.05)                # shares of val and test of a single text
WHOLE = 1 << 24                     # bytes: larger text files are read in pieces
LINES_OF_A_ROW = 100_000            # of a CSV file; then a quote was forgotten

LONE = re.compile('[\ud800-\udfff]')    # a byte that is not UTF-8, in JSON half a character


@dataclass
class Document:
    """A text, or what is wrong with it (then text is None, or what is left of it)."""
    where: str
    text: 'str | LongText | None' = None
    problem: ValueError | None = None


# ------------------------------------------------------------------------------- plain text

class LongText:
    """A text that need not fit into memory: a file, in parts [(split or None, characters)] that
    follow each other. at: the position of a source behind it"""

    def __init__(self, path, scanned, parts=None, at=None):
        self.path = path
        self.characters, self.digest, self.sha256, self.problem = scanned
        self.parts = parts or [(None, self.characters)]
        self.at = at

    def pieces(self, cut, part=0, done=0):
        """Yields a piece, its split, whether it ends its part, and [part, done]: where the next
        one begins. cut: blocks of text -> pieces"""
        with open(self.path, encoding='utf-8-sig', errors='surrogateescape', newline='') as f:
            before = sum(characters for _, characters in self.parts[:part])
            deque(blocks(f, before + done), 0)
            for number in range(part, len(self.parts)):
                split, characters = self.parts[number]
                clean = (LONE.sub('\ufffd', block) for block in blocks(f, characters - done))
                for piece in cut(clean):
                    done += len(piece)
                    yield piece, split, done == characters, [number, done]
                done = 0


def blocks(f, count, size=1 << 20):
    """Yields so many characters or bytes of a file, a million at a time"""
    while count > 0:
        block = f.read(min(size, count))
        if not block:
            break
        count -= len(block)
        yield block


def scan(path):
    """A text file -> its characters, 64-bit hash, sha256, and what is wrong with it, if
    anything. A byte-order mark at its start is no text."""
    decoder = codecs.getincrementaldecoder('utf-8-sig')('surrogateescape')
    digest = hashlib.blake2b(digest_size=8)
    sha256 = hashlib.sha256()
    characters = 0
    problem = None
    with open(path, 'rb') as f:
        while True:
            first = f.tell() == 0
            data = f.read(1 << 20)
            sha256.update(data)
            if first:
                digest.update(data.removeprefix(codecs.BOM_UTF8))
            else:
                digest.update(data)
            text = decoder.decode(data, not data)
            characters += len(text)
            if problem is None and not text.isascii() and LONE.search(text):
                problem = bad_byte(path)
            if not data:
                break
    return characters, int.from_bytes(digest.digest(), 'big'), sha256.hexdigest(), problem


def bad_byte(path):
    """-> ValueError with the place of a file's first byte that is not UTF-8"""
    decoder = codecs.getincrementaldecoder('utf-8')()
    offset = 0
    with open(path, 'rb') as f:
        while True:
            data = f.read(1 << 20)
            kept = len(decoder.getstate()[0])
            try:
                decoder.decode(data, not data)
            except UnicodeDecodeError as e:
                at = offset - kept + e.start
                return ValueError(f'{path} is not UTF-8 text: byte 0x{e.object[e.start]:02x} at '
                                  f'offset {at}; convert it to UTF-8 first, or see '
                                  '--bad_documents')
            offset += len(data)


def refuse_utf16(path):
    """ValueError for a file in another Unicode encoding than UTF-8."""
    with open(path, 'rb') as f:
        start = f.read(4)
    for mark, name in ((codecs.BOM_UTF32_LE, 'utf-32'), (codecs.BOM_UTF32_BE, 'utf-32'),
                       (codecs.BOM_UTF16_LE, 'utf-16'), (codecs.BOM_UTF16_BE, 'utf-16')):
        if start.startswith(mark):
            raise ValueError(f'{path} is {name.upper()} text: convert it to UTF-8 first, such as '
                             f'by iconv -f {name} -t utf-8')


# ------------------------------------------------------- readers of files, one for each format
#
# A reader yields (position, bytes done, place in the file, text or ValueError) from the document
# behind the position `at` on, or all where it is None.

def pick(row, field):
    """A row {field: value} -> its text, or a ValueError"""
    if not isinstance(row, dict):
        return ValueError(f"it is {type(row).__name__}, not an object with a '{field}'")
    if field not in row:
        has = ', '.join(map(str, row))[:200]
        return ValueError(f"no field '{field}' (--text_field=NAME names another), but {has}")
    text = row[field]
    if not isinstance(text, str):
        return ValueError(f"'{field}' is {type(text).__name__}, not text")
    return text


def open_compressed(raw, kind):
    if kind.endswith('.gz'):
        return gzip.open(raw)
    if kind.endswith('.zst'):
        import pyarrow
        return io.BufferedReader(pyarrow.CompressedInputStream(raw, 'zstd'))
    return raw


def read_jsonl(path, at, field):
    line, offset = at or (0, 0)
    with open(path, 'rb') as raw:
        f = open_compressed(raw, file_kind(path))
        if f is raw:
            f.seek(offset)
        else:
            deque(blocks(f, offset), 0)
        for data in f:
            line += 1
            offset += len(data)
            if not data.strip():
                continue
            try:
                found = pick(json.loads(data.decode('utf-8-sig', 'surrogateescape')), field)
            except (ValueError, RecursionError) as e:
                found = ValueError(f'not JSON: {e}')
            yield [line, offset], raw.tell(), f'line {line}', found


def read_json(path, at, field):
    """An array of objects, which is read as a whole, or one object a line."""
    with open(path, 'rb') as f:
        start = f.read(1 << 16).decode('utf-8-sig', 'replace').lstrip()
    if not start.startswith('['):
        yield from read_jsonl(path, at, field)
        return
    text = path.read_bytes().decode('utf-8-sig', 'surrogateescape')
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f'not JSON: {e}') from e
    for n, row in enumerate(rows, 1):
        if n > (at or 0):
            yield n, path.stat().st_size, f'object {n}', pick(row, field)


def read_csv(path, at, field):
    delimiter = ','
    if file_kind(path) == '.tsv':
        delimiter = '\t'
    rows = csv_rows(path, delimiter)
    _, _, header = next(rows, (1, 0, []))
    if isinstance(header, ValueError):
        raise header
    if header.count(field) > 1:
        raise ValueError(f"line 1 names the field '{field}' {header.count(field)} times")
    n = 0
    for line, done, row in rows:
        n += 1
        if n <= (at or 0):
            continue
        if isinstance(row, ValueError):
            found = row
        elif len(row) != len(header):
            found = ValueError(f'{len(row)} fields, and {len(header)} in the header: a text with '
                               f'{delimiter!r} in it must be in quotes')
        else:
            found = pick(dict(zip(header, row)), field)
        yield n, done, f'line {line}', found


def csv_rows(path, delimiter):
    """Yields (line where a row begins, bytes done, its fields or a ValueError), without empty
    rows. A quote that is not closed as it should be spoils its own line only: what follows is
    read again from the line behind it. (One that another row's quote closes takes all between
    them; then the number of fields gives it away, unless that happens to be right.)"""
    csv.field_size_limit(2**31 - 1)
    with open(path, encoding='utf-8-sig', errors='surrogateescape', newline='') as f:
        lines = Lines(f)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            line = lines.number + 1
            lines.of_row = []
            try:
                row = next(reader, None)
            except csv.Error as e:
                problem = f'not CSV: {e}'
                if len(lines.of_row) > 1 or 'unexpected end' in str(e):
                    problem = ('a quote that is opened here is never closed, or not at the end '
                               'of its field')
                lines.go_back()
                reader = csv.reader(lines, delimiter=delimiter, strict=True)
                yield line, f.buffer.tell(), ValueError(problem)
                continue
            if row is None:
                return
            if row:
                yield line, f.buffer.tell(), row


class Lines:
    """The lines of a file, of which those behind a row's first one can be given back."""

    def __init__(self, f):
        self.f = f
        self.number = 0                     # of the last line
        self.of_row = []
        self.again = deque()

    def __iter__(self):
        return self

    def __next__(self):
        if self.again:
            line = self.again.popleft()
        else:
            line = next(self.f)
        self.number += 1
        self.of_row.append(line)
        if len(self.of_row) > LINES_OF_A_ROW:
            raise csv.Error(f'more than {LINES_OF_A_ROW:,} lines')
        return line

    def go_back(self):
        self.number -= len(self.of_row) - 1
        self.again.extendleft(reversed(self.of_row[1:]))


def read_parquet(path, at, field):
    import pyarrow.parquet
    file = pyarrow.parquet.ParquetFile(path)
    if field not in file.schema_arrow.names:
        raise pick(dict.fromkeys(file.schema_arrow.names), field)
    done = at or 0
    n = 0
    size = path.stat().st_size
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if n + rows <= done:
            n += rows
            continue
        for batch in file.iter_batches(1000, [group], [field]):
            for value in plain_texts(batch.column(0), field):
                n += 1
                if n > done:
                    position = size * n // file.metadata.num_rows
                    yield n, position, f'row {n}', pick({field: value}, field)


def plain_texts(column, field):
    """A pyarrow column -> list of str and None; a byte that is not UTF-8 becomes a surrogate.
    ValueError for a column that is no text"""
    import pyarrow
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_null(column.type):
        return column.to_pylist()
    try:
        column = column.cast(pyarrow.large_binary())
    except pyarrow.ArrowException as e:
        raise ValueError(f"the column '{field}' is {column.type}, not text") from e
    texts = []
    for value in column.to_pylist():
        if value is not None:
            value = value.decode('utf-8', 'surrogateescape')
        texts.append(value)
    return texts


def read_text(path, at, field):
    if at is not None:
        return
    if path.stat().st_size > WHOLE:
        yield 1, 0, '', LongText(path, scan(path))
    else:
        text = path.read_bytes().decode('utf-8-sig', 'surrogateescape')
        yield 1, path.stat().st_size, '', text


READERS = {'.txt': read_text, '.md': read_text, '.jsonl': read_jsonl, '.jsonl.gz': read_jsonl,
           '.jsonl.zst': read_jsonl, '.json': read_json, '.csv': read_csv, '.tsv': read_csv,
           '.parquet': read_parquet}
PACKED = ('.jsonl.gz', '.jsonl.zst', '.parquet')
FORMATS = ('txt', 'jsonl', 'json', 'csv', 'tsv')        # of stdin


def file_kind(path):
    """A path -> the ending that says how it is read, or None"""
    name = Path(path).name.lower()
    for ending in READERS:
        if name.endswith(ending):
            return ending
    return None


# ------------------------------------------------------------------------- files and folders

def list_files(folder):
    """A folder -> its files of kinds that are read, sorted; lines that say what is left out.
    Links to folders are followed. ValueError where it has several splits"""
    paths = []
    others = Counter()
    seen = set()
    for place, names, found in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:                                # a link to a folder above it
            names.clear()
            continue
        seen.add(real)
        names[:] = [name for name in names if not name.startswith('.')]
        for name in found:
            path = Path(place) / name
            if name.startswith('.'):
                continue
            if not path.exists():
                others['links to nothing'] += 1
            elif file_kind(path) is None:
                others[path.suffix or 'without an ending'] += 1
            else:
                paths.append(path)
    cards = [path for path in paths if is_card(path) and len(paths) > 1]
    for path in cards:
        paths.remove(path)
        others['the card README.md'] += 1
    splits = {split_of(path.relative_to(folder)) for path in paths} - {None}
    if len(splits) > 1:
        names = ', '.join(sorted(splits))
        raise ValueError(f"folder '{folder}' has files of several splits ({names}): say which "
                         'with --split=train, or name a file')
    left_out = ', '.join(f'{name} ({count})' for name, count in others.most_common(5))
    notes = []
    if others:
        notes.append(f'left out: {sum(others.values()):,} files of other kinds: {left_out}')
    return sorted(paths), notes


def split_of(path):
    """The split that a file of a dataset's folder belongs to by its name, or None."""
    for part in path.parts:
        found = re.match(r'(train|test|validation|valid|val|dev|eval)([-_.]|$)', part.lower())
        if found:
            return found[1]
    return None


def is_card(path):
    """Whether a file is the card of a dataset, with its YAML"""
    if path.name.lower() != 'readme.md':
        return False
    with open(path, 'rb') as f:
        return f.read(4).startswith(b'---')


def identify(paths):
    """What tells files apart: name, size, time of the last change"""
    found = []
    for path in paths:
        stat = path.stat()
        found.append([str(path), stat.st_size, stat.st_mtime_ns])
    return found


class Files:
    """Documents of files, or the one text of a single one; text is its LongText."""
    unit = 'B'

    def __init__(self, name, paths, field, where, license='unknown', notes=()):
        self.name = name
        self.paths = paths
        self.field = field
        self.notes = notes
        self.text = None
        self.at = None
        self.done = 0
        for path in paths:
            if file_kind(path) not in PACKED:
                refuse_utf16(path)
        self.identity = identify(paths)
        self.changed = max(changed for _, _, changed in self.identity)
        sizes = [size for _, size, _ in self.identity]
        self.begins = [0, *itertools.accumulate(sizes)]             # bytes in front of each file
        self.total = self.begins[-1]
        self.about = {'name': name, 'path': where, 'license': license, 'files': len(paths),
                      'bytes': self.total}

    def open_text(self, shares, replace_bad_bytes):
        """As one text, split by position: at the same places for every tokenizer. shares: of
        val and test"""
        scanned = scan(self.paths[0])
        characters, _, sha256, problem = scanned
        if problem and not replace_bad_bytes:
            raise problem
        if characters < 100:
            raise ValueError(f'{self.paths[0]} has {characters} characters: at least 100 are '
                             'needed for a train and a val split')
        val, test = shares
        train_ends = int(characters * round(1 - val - test, 9))
        val_ends = int(characters * round(1 - test, 9))
        parts = []
        for split, count in (('train', train_ends), ('val', val_ends - train_ends),
                             ('test', characters - val_ends)):
            if count > 0:
                parts.append((split, count))
        self.text = LongText(self.paths[0], scanned, parts)
        self.identity = sha256
        self.changed = 0
        self.about['sha256'] = sha256
        del self.about['files'], self.about['bytes']

    def describe(self):
        if self.text:
            return f'{self.text.characters:,} characters from {self.about["path"]}'
        count = len(self.paths)
        files = 'file'
        if count > 1:
            files = 'files'
        return f'{count:,} {files} of {self.total / 1e6:,.1f} MB from {self.about["path"]}'

    def position(self):
        return self.at

    def read(self, at):
        """Yields Documents, from the one at which position() was `at`"""
        if self.text:
            yield Document(str(self.text.path), self.text)
            return
        first, inner = at or [0, None]
        self.at = [first, inner]
        for i in range(first, len(self.paths)):
            path = self.paths[i]
            label = self.about['path']
            if len(self.paths) > 1:
                label = path
            try:
                reader = READERS[file_kind(path)]
                for after, done, place, found in reader(path, inner, self.field):
                    where = str(label)
                    if place:
                        where = f'{label}, {place}'
                    self.at = [i, after]
                    self.done = self.begins[i] + done
                    yield as_document(where, found, [i, None])
            except (EOFError, OSError, zlib.error, ValueError) as e:
                raise ValueError(f'{label} cannot be read to its end: {e}') from e
            inner = None


def as_document(where, found, at_start):
    """What a reader found -> Document"""
    if isinstance(found, ValueError):
        return Document(where, problem=found)
    if isinstance(found, LongText):
        found.at = at_start
        return Document(where, found, found.problem)
    lone = None
    if not found.isascii():
        lone = LONE.search(found)
    if lone is None:
        return Document(where, found)
    before = found[max(lone.start() - 20, 0):lone.start()]
    problem = ValueError(f'not UTF-8 text: {lone[0]!r} after {before!r}')
    return Document(where, LONE.sub('\ufffd', found), problem)


# --------------------------------------------------------------------------------- the Hub

class Hub:
    """Documents of a dataset on the Hugging Face Hub, or of a folder of that form: streamed,
    never on the disk."""
    unit = ' documents'
    text = None
    changed = 0                                 # a revision does not change, a folder does
    notes = ()

    def __init__(self, name, where, subset, split, field, license, revision):
        self.name = name
        self.where = where
        self.field = field
        self.done = 0
        here = Path(where).is_dir()
        quiet_libraries()
        try:
            if not here:                        # what comes later is from the same revision
                revision = revision or latest_revision(where)
            self.data, builder, count = open_stream(where, subset, split, field, revision)
        except Exception as e:                  # whatever its layers raise
            it = ''
            if not here:
                it = ' is no file or folder here, and the Hugging Face Hub did not give it'
            raise ValueError(f"'{where}'{it}: {brief(e)}") from e
        self.total = count
        self.identity = {'id': where, 'subset': subset, 'split': split, 'revision': revision}
        if here:
            found = identify(p for p in sorted(Path(where).rglob('*')) if p.is_file())
            self.identity['files'] = found
            self.changed = max(changed for _, _, changed in found)
        self.about = {'name': name, 'path': where, 'subset': subset, 'split': split,
                      'revision': revision,
                      'license': license or builder.info.license or 'unknown'}

    def describe(self):
        keys = ('id', 'subset', 'split', 'revision')
        return ' '.join(f'{key} {self.identity[key]}' for key in keys if self.identity[key])

    def position(self):
        return [self.data.state_dict(), self.done]

    def read(self, at):
        if at:
            self.data.load_state_dict(at[0])
            self.done = at[1]
        else:
            self.done = 0
        try:
            for row in self.data:
                self.done += 1
                where = f'{self.where}, document {self.done:,}'
                yield as_document(where, pick(row, self.field), None)
        except Exception as e:                  # whatever its layers raise
            raise ConnectionError(f'{self.where}: no more came after document {self.done:,} '
                                  f'({brief(e)})') from e


def quiet_libraries():
    import datasets
    import huggingface_hub
    datasets.config.TORCH_AVAILABLE = False     # its import takes longer than all else here
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    huggingface_hub.logging.set_verbosity_error()
    for kind in ('READ', 'OPEN'):               # then the same command again is the better way
        setattr(datasets.config, f'STREAMING_{kind}_MAX_RETRIES', 2)


def latest_revision(where):
    from huggingface_hub import HfApi, constants
    # three attempts; without a timeout it would wait for ever
    patience = 3 * constants.HF_HUB_DOWNLOAD_TIMEOUT
    return HfApi().dataset_info(where, timeout=patience).sha


def open_stream(where, subset, split, field, revision):
    """-> the dataset that streams, its builder, its number of documents or None"""
    import datasets
    builder = datasets.load_dataset_builder(where, subset or None, revision=revision)
    load = functools.partial(datasets.load_dataset, where, subset or None, split=split,
                             revision=revision, streaming=True)
    features = builder.info.features or load().features or {field: None}
    if field not in features:
        raise pick(dict.fromkeys(features), field)
    options = {}
    if hasattr(builder.config, 'columns'):      # parquet: no other columns are fetched
        options['columns'] = [field]
    splits = builder.info.splits or {}
    count = None
    if split in splits:
        count = splits[split].num_examples
    return load(**options), builder, count


def brief(e):
    """An error of many layers in one line"""
    if str(e) == 'Server Disconnected' and e.__cause__:
        e = e.__cause__
    return ' '.join(str(e).split())[:300] or type(e).__name__


# ----------------------------------------------------------------------- what a user names

def source_name(source, out_dir=''):
    """What the folder under data/ is called"""
    if source == '-':
        return 'stdin'
    if source in KNOWN or not source:
        return source
    path = Path(source)
    name = path.resolve().name
    ending = file_kind(path)
    if ending and not path.is_dir():
        name = path.name[:-len(ending)]
    if name in KNOWN and path.exists() and not out_dir:
        raise ValueError(f"'{source}' has the name of a known corpus, whose data it would "
                         'replace: rename it, or give --out_dir')
    return name


def open_source(s, near, revision=None):
    """prepare.py's settings -> Files or Hub. near: (name, names) -> a suggestion; revision: of a
    Hub dataset, the newest by default. ValueError, OSError"""
    if s.path and s.source not in KNOWN:
        raise ValueError(f"'{s.source}': --path goes with a known corpus ({', '.join(KNOWN)}) "
                         'only')
    if s.source in TEXTS:
        return open_known_text(s)
    name = source_name(s.source, s.out_dir)
    where, subset, split, field, license = HUB.get(s.source, (s.source, '', '', 'text', 'unknown'))
    if s.path:
        where, subset, split = s.path, '', ''
    subset = s.subset or subset
    split = s.split or split
    field = s.text_field or field
    path = Path(where)
    if s.source == '-':
        return open_stdin(s, name, field)
    folder = bool(where) and path.is_dir()              # Path('') is a folder, too
    if folder and not subset and not split:
        paths, notes = list_files(path)
        if not paths:
            raise ValueError(f"folder '{path}' has no file that ends in {', '.join(READERS)}")
        return Files(name, paths, field, where, license, notes)
    if file_kind(path) and (s.path or s.source not in HUB):
        found = Files(name, [must_exist(path)], field, where, license)
        if file_kind(path) in ('.txt', '.md'):
            as_one_text(found, s, ALONE)
        return found
    hub_id = re.fullmatch(r'[\w.-]+/[\w.-]+', where) and not path.parent.is_dir()
    if folder or s.source in HUB or hub_id:
        return Hub(name, where, subset, split or 'train', field, license, revision)
    problem = 'nothing to prepare'
    if s.source:
        problem = f"unknown source '{s.source}'" + near(s.source, KNOWN)
    raise ValueError(f'{problem}: give {", ".join(KNOWN)}, a file that ends in '
                     f'{", ".join(READERS)}, a folder of them, - or a Hub id')


def open_known_text(s):
    where, sha256, shares, license = TEXTS[s.source]
    if s.path:
        file = Path(s.path)
        where = s.path
    elif where == CHAR_RNN:
        file = download(where)
    else:
        file = where
        where = where.relative_to(HERE).as_posix()
    found = Files(s.source, [must_exist(file)], 'text', where, license)
    as_one_text(found, s, shares)
    if sha256 and found.about['sha256'] != sha256:
        raise ValueError(f'{where} is not the text of {s.source}: its sha256 is '
                         f'{found.about["sha256"]}, should be {sha256}')
    return found


def open_stdin(s, name, field):
    file = spool(s.format)
    found = Files(name, [file], field, 'stdin')
    if s.format == 'txt':
        as_one_text(found, s, ALONE)
    else:
        found.identity = scan(file)[2]                  # the file has another name each time
    return found


def as_one_text(found, s, shares):
    if s.tokens:
        raise ValueError(f'tokens={s.tokens}: goes with documents; {found.name} is one text')
    found.open_text(s.shares(shares), s.bad_documents == 'replace')


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
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            with tempfile.NamedTemporaryFile(suffix='.txt', delete=False) as f:
                atexit.register(os.unlink, f.name)
                shutil.copyfileobj(answer, f)
        return Path(f.name)
    except (OSError, http.client.HTTPException) as e:
        raise ValueError(f"could not download {url}: {e}; give its text with --path=FILE, or "
                         "prepare 'shakespeare', which needs no network") from e
