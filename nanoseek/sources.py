"""Where documents come from: one text, files of several formats, the Hugging Face Hub.

A source has its origin, as meta.json has it, and files, by which a change is noticed.
read(position) yields Documents; position() is where to go on after the last one.
"""
import csv
import functools
import glob
import hashlib
import io
import itertools
import json
import re
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from nanoseek.settings import refuse_pointer

# A single text: where it is, shares of val and test, license
TEXTS = {
    'shakespeare': ('data/shakespeare/input.txt', (0.05, 0.05), 'public domain'),
    'tinyshakespeare': ('https://raw.githubusercontent.com/karpathy/char-rnn/master/data/'
                        'tinyshakespeare/input.txt', (0.1, 0),
                        "public domain text; nanoGPT's shakespeare_char"),
}
# Many documents, in parquet files: Hub id, subset, split, text field, license
HUB = {
    'cosmopedia': ('HuggingFaceTB/smollm-corpus', 'cosmopedia-v2', 'train', 'text', 'odc-by'),
    'cosmopedia-100k': ('HuggingFaceTB/cosmopedia-100k', '', 'train', 'text', 'apache-2.0'),
    'fineweb-edu': ('HuggingFaceTB/smollm-corpus', 'fineweb-edu-dedup', 'train', 'text', 'odc-by'),
    'fineweb-edu-10bt': ('HuggingFaceFW/fineweb-edu', 'sample-10BT', 'train', 'text', 'odc-by'),
    'python-edu': ('Avelina/python-edu', '', 'train', 'text', 'odc-by'),  # smollm-corpus: ids only
    'tinystories': ('roneneldan/TinyStories', '', 'train', 'text', 'cdla-sharing-1.0'),
    'smoltalk': ('HuggingFaceTB/smoltalk', 'all', 'train', 'messages', 'apache-2.0'),
    'smol-smoltalk': ('HuggingFaceTB/smol-smoltalk', '', 'train', 'messages', 'apache-2.0'),
    'openwebtext': ('Skylion007/openwebtext', '', 'train', 'text', 'cc0-1.0'),
}
MESSAGES = 'messages'               # the field of conversations
BYTE_ORDER_MARK = b'\xef\xbb\xbf'   # at the start of a file it is no text


@dataclass
class Document:
    """A text, or the problem with it"""
    where: str
    text: str = ''
    messages: list | None = None    # of a conversation, whose contents are the text
    problem: str = ''
    split: str = ''                 # if empty, a hash of the text decides


class Source:
    """Rows with a text in a field, from parts: {name: function that opens a file or a stream}. A
    position is the number of a part, how many of its rows are done, and the stream's state."""

    def __init__(self, origin, field, parts, paths=(), is_one_text=False):
        self.origin = origin
        self.field = field
        self.parts = list(parts.items())
        self.is_one_text = is_one_text              # whose splits are the documents
        self.files = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
        self.at = [0, 0]
        self.stream = None

    @functools.cached_property
    def is_chat(self):
        """Whether rows are conversations: by their field, or as the first has messages, no text"""
        first = next(self.read(), None)
        if first is not None and first.problem:
            given, self.field = self.field, MESSAGES
            if next(self.read()).problem:
                self.field = given
        return self.field == MESSAGES

    def position(self):
        if hasattr(self.stream, 'state_dict'):
            return [*self.at, self.stream.state_dict()]
        return self.at

    def read(self, position=None):
        first, done, *state = position or [0, 0]
        for number, (name, open_part) in enumerate(self.parts[first:], first):
            try:
                rows = self.stream = open_part()
                if state:
                    rows.load_state_dict(state.pop())
                else:
                    rows = itertools.islice(rows, done, None)
                for row in rows:
                    done += 1
                    self.at = [number, done]
                    yield make_document(f'{name}, row {done:,}', row, self.field)
            except Exception as e:              # of several libraries
                raise ValueError(f'{name} cannot be read beyond row {done:,}: {e}') from e
            done = 0


def make_document(where, row, field):
    if isinstance(row, Document):               # of one text
        return row
    if isinstance(row, ValueError):             # of a reader
        return Document(where, problem=str(row))
    if not isinstance(row, dict) or field not in row:
        return Document(where, problem=f"no field '{field}' (--text_field=NAME names another) in "
                        f'{row!r:.100}')
    text = row[field]
    messages = None
    if field == MESSAGES:
        messages = text
        try:
            text = '\n'.join(message['content'] for message in messages)
        except (TypeError, KeyError):
            return Document(where, problem=f'no roles with texts as content in {text!r:.100}')
    if not isinstance(text, (str, bytes)):
        return Document(where, problem=f"'{field}' is {type(text).__name__}, not text")
    try:
        if isinstance(text, bytes):
            text = text.decode()
        text.encode()                           # fails for half of a pair of surrogates
    except ValueError as e:
        return Document(where, problem=str(e))
    return Document(where, text, messages)


def read_text(path, field):
    return [{field: path.read_bytes().removeprefix(BYTE_ORDER_MARK)}]


def read_lines(path, field):
    import pyarrow
    with io.BufferedReader(pyarrow.input_stream(str(path))) as lines:   # also .gz and .zst
        for line in filter(bytes.strip, lines):
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as e:
                yield ValueError(f'not JSON: {e}')


def read_json(path, field):
    with open(path, 'rb') as f:
        if f.read(1000).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b'['):
            return json.loads(path.read_bytes())
    return read_lines(path, field)


def read_csv(path, field):
    csv.field_size_limit(2**31 - 1)
    delimiter = {'.csv': ',', '.tsv': '\t'}[ending(path)]
    with open(path, encoding='utf-8-sig', errors='surrogateescape', newline='') as f:
        rows = csv.DictReader(f, delimiter=delimiter, strict=True)
        for row in rows:
            if None in row or None in row.values():
                row = ValueError(f'not the {len(rows.fieldnames)} fields of the header: a text '
                                 f'with {delimiter!r} in it must be in quotes')
            yield row


def read_parquet(path, field):
    import datasets
    columns = None
    if field != MESSAGES:
        columns = datasets.Features({field: datasets.Value('binary')})  # a text may be no UTF-8
    return load_stream('parquet', field, 'train', data_files=glob.escape(str(path)),
                       features=columns)


def load_stream(where, field, split, **options):
    import datasets
    datasets.config.TORCH_AVAILABLE = False         # importing it would take seconds
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)       # its errors say as much
    builder = datasets.load_dataset_builder(where, **options)
    if hasattr(builder.config, 'columns'):          # parquet: read no other columns
        builder.config.columns = [field]
    return builder.as_streaming_dataset(split)


# datasets reads parquet and the Hub. Its readers of JSON and CSV refuse a key that the first
# 10 MB do not have, name no row for a bad byte, and read a missing field as an empty text.
READERS = {'.txt': read_text, '.md': read_text, '.jsonl': read_lines, '.jsonl.gz': read_lines,
           '.jsonl.zst': read_lines, '.json': read_json, '.csv': read_csv, '.tsv': read_csv,
           '.parquet': read_parquet}


def ending(path):
    """Return the ending of READERS that a file has, or an empty text."""
    name = Path(path).name.lower()
    return next((ending for ending in READERS if name.endswith(ending)), '')


def source_name(s):
    path = Path(s.source).resolve()
    if path.is_dir():
        return path.name
    return path.name[:len(path.name) - len(ending(path))]


def open_source(s, revision=None):
    """Return the Source that the settings name. revision: of a Hub dataset; if none the newest."""
    if s.source in TEXTS:
        return open_known_text(s)
    where, subset, split, field, license = HUB.get(s.source, (s.source, '', '', 'text', 'unknown'))
    field = s.text_field or field
    if s.path:
        where, subset, split = s.path, '', ''
    subset = s.subset or subset
    split = s.split or split
    path = Path(where)
    if path.is_file():
        refuse_pointer(path)
    is_folder = bool(where) and path.is_dir()               # Path('') is a folder, too
    origin = {'name': source_name(s), 'path': where, 'license': license}
    if path.is_file() and ending(path) in ('.txt', '.md'):
        return open_text(origin, path.read_bytes(), s.shares((0.05, 0.05)))
    if path.is_file() and ending(path) or is_folder and not subset and not split:
        return open_files(origin, field)
    if is_folder or not ending(path) and re.fullmatch(r'[\w.-]+/[\w.-]+', where):
        return open_stream(origin, field, subset, split or 'train', revision)
    raise ValueError(f"nothing to prepare in '{where}': give {', '.join(TEXTS | HUB)}, a file that "
                     f"ends in {', '.join(READERS)}, a folder of them, or a Hub id")


def open_known_text(s):
    where, shares, license = TEXTS[s.source]
    if s.path:
        where = s.path
        data = Path(where).read_bytes()
    elif where.startswith('https:'):
        print(f'downloading {where}; without a network, give its text with --path=FILE')
        data = urllib.request.urlopen(where, timeout=60).read()
    else:
        data = (Path(__file__).resolve().parent.parent / where).read_bytes()
    origin = {'name': s.source, 'path': where, 'license': license}
    return open_text(origin, data, s.shares(shares))


def open_text(origin, data, shares):
    """Return one text, split by position: at the same characters for every tokenizer."""
    where = origin['path']
    try:
        text = data.decode('utf-8-sig')
    except UnicodeDecodeError as e:
        raise ValueError(f'{where} is not UTF-8 text: {e}') from e
    val, test = shares
    train_ends = int(len(text) * round(1 - val - test, 9))
    val_ends = int(len(text) * round(1 - test, 9))
    documents = [Document(where, text[:train_ends], split='train'),
                 Document(where, text[train_ends:val_ends], split='val'),
                 Document(where, text[val_ends:], split='test')]
    origin = {**origin, 'sha256': hashlib.sha256(data).hexdigest()}
    return Source(origin, 'text', {where: lambda: documents}, is_one_text=True)


def open_files(origin, field):
    """Return a file, or all files in a folder that have a reader but hidden ones."""
    paths = [Path(origin['path'])]
    if paths[0].is_dir():
        names = glob.glob('**/*', root_dir=paths[0], recursive=True)
        paths = sorted(paths[0] / name for name in names if ending(name))
        paths = [path for path in paths if path.is_file()]
        for path in paths:
            refuse_pointer(path)
    if not paths:
        raise ValueError(f"no file in '{origin['path']}' ends in {', '.join(READERS)}")
    parts = {str(path): functools.partial(READERS[ending(path)], path, field) for path in paths}
    size = sum(path.stat().st_size for path in paths)
    return Source({**origin, 'files': len(paths), 'bytes': size}, field, parts, paths)


def open_stream(origin, field, subset, split, revision):
    """Return a dataset on the Hub, or a folder of that form."""
    where = origin['path']
    try:
        if not (revision or Path(where).is_dir()):      # one revision, also after a restart
            import huggingface_hub
            revision = huggingface_hub.HfApi().dataset_info(where).sha
        stream = load_stream(where, field, split, name=subset or None, revision=revision)
    except Exception as e:                      # of many layers
        raise ValueError(f"'{where}' is no file here, and datasets cannot open it: {e}") from e
    origin = {'name': origin['name'], 'path': where, 'subset': subset, 'split': split,
              'revision': revision, 'license': origin['license']}
    return Source(origin, field, {where: lambda: stream})
