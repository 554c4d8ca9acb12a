"""Text -> token files, and the reading of them: the one place that knows their format and the tokenizers.

    python prepare.py shakespeare                       # a known corpus, characters as tokens
    python prepare.py mybook.txt --tokenizer=bpe:1024   # any UTF-8 text file -> data/mybook/

writes data/NAME/{train,val,test}.bin (token ids, little-endian), tokenizer.json (Hugging Face tokenizers format,
whichever tokenizer made the ids) and meta.json (what the rest means). Read back with open_data and load_tokenizer.
"""
import hashlib, http.client, json, math, os, re, time, urllib.request, zlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

import config

VERSION = 1                                     # of the files' format, in meta.json
DTYPES = {'uint16': '<u2', 'uint32': '<u4'}
SPLITS = ('train', 'val', 'test')
EOT = '<|endoftext|>'
EOT_NAMES = (EOT, '<|end_of_text|>', '</s>', '<eos>', '<｜end▁of▁sentence｜>')  # in other people's tokenizers

MODEL_FILES = ['config.json', 'model*.safetensors', 'tokenizer.json']   # what we read of a model on the Hub

HERE = Path(__file__).resolve().parent
CHAR_RNN = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
KNOWN = {   # name: its text, the text's sha256 if it may not change, where the splits are cut, license
    'shakespeare': (HERE / 'data/shakespeare/input.txt', None, (0.9, 0.95), 'public domain'),
    'tinyshakespeare': (CHAR_RNN, '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed',
                        (0.9,), "public domain text; nanoGPT's shakespeare_char"),
}


@dataclass
class Settings:
    """Settings of prepare.py"""
    source: str = ''        # what to prepare, also without its name: shakespeare, tinyshakespeare or a UTF-8 .txt file
    tokenizer: str = ''     # char (if empty), bpe:N (trained here, N tokens), gpt2, Hub id, folder or tokenizer.json
    path: str = ''          # take a known corpus's text from this local file
    out_dir: str = ''       # where to write; if empty data/NAME

# ----------------------------------------------------------------------------------------------------------------------
# Text


def read_source(source, path=''):
    """-> name, text, where its splits are cut (fractions of its characters), what meta.json says of it.
    Nothing is normalised: \\r\\n, NUL and a byte order mark are characters like others."""
    if source in KNOWN:
        name, (where, sha256, cuts, license) = source, KNOWN[source]
    elif source.lower().endswith('.txt'):
        name, where, sha256, cuts, license = Path(source).stem, source, None, (0.9, 0.95), 'unknown'
        if name in KNOWN or path:
            raise ValueError(f"'{source}': --path goes with a known corpus ({', '.join(KNOWN)}) only" if path else
                             f"'{source}' has the name of a known corpus, whose data it would replace: rename it")
    else:
        raise ValueError((f"unknown source '{source}'" if source else 'nothing to prepare') +
                         f': give {", ".join(KNOWN)}, or a UTF-8 text file whose name ends in .txt')
    where = path or where
    data = download(where) if where == CHAR_RNN else read_file(where)
    found = hashlib.sha256(data).hexdigest()
    if sha256 and found != sha256:
        raise ValueError(f'{where} is not the text of {source}: its sha256 is {found}, should be {sha256}')
    try:
        text = data.decode('utf-8')
    except UnicodeDecodeError as e:
        raise ValueError(f'{where} is not UTF-8 text: byte 0x{data[e.start]:02x} at offset {e.start}; '
                         'convert it to UTF-8 first') from e
    if len(text) < 100:
        raise ValueError(f'{where} has {len(text)} characters: at least 100 are needed for a train and a val split')
    where = where.relative_to(HERE).as_posix() if isinstance(where, Path) else where
    return name, text, cuts, {'name': name, 'path': where, 'sha256': found, 'license': license}


def read_file(path):
    if not Path(path).is_file():
        raise ValueError(f"no file '{path}'")
    return Path(path).read_bytes()


def download(url):
    print(f'downloading {url}')
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.read()
    except (OSError, http.client.HTTPException) as e:
        raise ValueError(f"could not download {url}: {e}; give its text with --path=FILE, or prepare 'shakespeare', "
                         'which needs no network') from e

# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers: each becomes a tokenizers.Tokenizer, which makes the ids here and reads prompts later


def make_tokenizer(spec, text, train_text):
    """--tokenizer -> tokenizers.Tokenizer. `char` takes its vocabulary from text, `bpe:N` is trained on train_text."""
    if spec == 'char':
        return char_tokenizer(text)
    if spec.startswith('bpe:'):
        return train_bpe(spec, train_text)
    if spec == 'gpt2':
        return gpt2_tokenizer()
    here = Path(spec).exists() or spec.endswith('.json')
    tokenizer = load_tokenizer(spec if here else hub_folder(spec, ['tokenizer.json']))
    if tokenizer.num_special_tokens_to_add(is_pair=False):
        tokenizer.post_processor = None     # no <bos> in the token files, so none before a prompt of the model either
    return tokenizer


def char_tokenizer(text):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    vocab = {c: i for i, c in enumerate(sorted(set(text)))}
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


def train_bpe(spec, text):
    from tokenizers import models, pre_tokenizers, trainers
    size = config.literal(spec.removeprefix('bpe:'))
    if type(size) not in (int, float) or size != size // 1 or size < 257:
        raise ValueError(f"tokenizer '{spec}': N of bpe:N is the size of the vocabulary, a whole number of at least "
                         f'257 (256 bytes and {EOT}), such as bpe:1024')
    tokenizer = byte_level(models.BPE())
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(
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
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]   # bytes that GPT-2 spells as themselves, ...
    others = [b for b in range(256) if b not in printable]              # ... as U+0100 and on
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    spell = lambda token: ''.join(letters[b] for b in token)
    merges = []
    for token in sorted((t for t in ranks if len(t) > 1), key=ranks.get):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:                                           # the last merge is of the two that remain
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        merges.append((spell(parts[0]), spell(parts[1])))
    tokenizer = byte_level(models.BPE({spell(token): i for token, i in ranks.items()}, merges))
    tokenizer.add_special_tokens([EOT])
    return tokenizer


def tokenize(tokenizer, text, size=1 << 15):
    """text -> ids (N,) uint32 as from a single call, but without its 200 bytes of memory per character: the text is cut
    about every `size` characters at a lone white space where both sides make the same tokens together and apart."""
    lone, pieces, start, at = re.compile(r'(?<=\S)\s(?=\S)'), [], 0, 0
    while found := lone.search(text, at + size):
        at = found.start()
        left, right = text[max(start, at - 200):at], text[at:at + 200]
        if encode(tokenizer, left + right) == encode(tokenizer, left) + encode(tokenizer, right):
            pieces.append(text[start:at])
            start = at
    pieces.append(text[start:])
    ids = []
    for i in range(0, len(pieces), 64):
        try:
            batch = tokenizer.encode_batch_fast(pieces[i:i + 64], add_special_tokens=False)
        except Exception:
            encode(tokenizer, ''.join(pieces[i:i + 64]))        # its error names the character
            raise
        ids += [np.array(piece.ids, np.uint32) for piece in batch]
    return np.concatenate(ids)


def check_round_trip(spec, tokenizer, split, text, ids):
    """ValueError unless the ids give the text back; for gpt2 also unless they are tiktoken's."""
    back = decode(tokenizer, ids)
    if back != text:
        at = len(os.path.commonprefix([text, back]))
        raise ValueError(f"tokenizer '{spec}' does not give the text back: at character {at} of {split}, "
                         f'{text[at:at + 20]!r} becomes {back[at:at + 20]!r}; take another, such as bpe:1024')
    if spec == 'gpt2':
        import tiktoken
        if not np.array_equal(ids, tiktoken.get_encoding('gpt2').encode_ordinary(text)):
            raise ValueError(f"tokenizer 'gpt2': tokenizer.json and tiktoken disagree on {split}; take bpe:N")

# ----------------------------------------------------------------------------------------------------------------------
# Writing


def prepare(s):
    """Read, split, tokenize, check, write; -> the directory"""
    began, spec = time.time(), s.tokenizer or 'char'
    name, text, cuts, source = read_source(s.source, s.path)
    print(f'{name}: {len(text):,} characters from {source["path"]}')
    at = [0, *(int(len(text) * cut) for cut in cuts), len(text)]    # before tokenizing: the same for every tokenizer
    parts = {split: text[a:b] for split, a, b in zip(SPLITS, at, at[1:])}
    saved = make_tokenizer(spec, text, parts['train']).to_str(pretty=True).encode()
    tokenizer = parse_tokenizer(saved, spec)                        # the ids are from what tokenizer.json will hold
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    print(f'tokenizer {spec}: a vocabulary of {vocab_size:,}')
    dtype = 'uint16' if vocab_size <= 1 << 16 else 'uint32'
    files, counts = {'tokenizer.json': saved}, {}
    for split, part in parts.items():
        ids = tokenize(tokenizer, part)     # no end-of-text token: a single text does not end where a split does
        check_round_trip(spec, tokenizer, split, part, ids)
        files[f'{split}.bin'] = ids.astype(DTYPES[dtype]).tobytes()
        counts[split] = {'tokens': len(ids), 'bytes': len(part.encode())}
        print(f'{split:5} {len(ids):12,} tokens, {counts[split]["bytes"] / len(ids):.2f} bytes per token')
    meta = {'version': VERSION, 'dtype': dtype, 'vocab_size': vocab_size,
            'eot_id': next((i for i in map(tokenizer.token_to_id, EOT_NAMES) if i is not None), None),
            'tokenizer': {'name': spec, 'sha256': hashlib.sha256(saved).hexdigest()},
            'splits': counts, 'source': source}
    files['meta.json'] = json.dumps(meta, indent=1, ensure_ascii=False).encode()
    out = Path(s.out_dir or Path('data') / name)
    write_files(out, files)
    dataset = out.name if out.parent == Path('data') else str(out)
    print(f'written to {out} in {time.time() - began:.1f} s; next: python train.py ' + (
        'config/shakespeare.py' if dataset == 'shakespeare' else f'--dataset={dataset}'))
    return out


def write_files(directory, files):
    """Write {name: bytes}. A reader finds the old files whole, or the new ones, or no meta.json, which comes last."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        for name, data in files.items():
            with open(directory / f'{name}.tmp', 'wb') as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
        for stale in ('meta.json', *(f'{split}.bin' for split in SPLITS)):      # there may have been more splits
            (directory / stale).unlink(missing_ok=True)
        for name in files:
            os.replace(directory / f'{name}.tmp', directory / name)
    finally:
        for name in files:
            (directory / f'{name}.tmp').unlink(missing_ok=True)

# ----------------------------------------------------------------------------------------------------------------------
# Reading: tokenizers


def load_tokenizer(path):
    """A tokenizer.json, or a folder with one -> tokenizers.Tokenizer"""
    path = Path(path) / 'tokenizer.json' if Path(path).is_dir() else path
    return parse_tokenizer(read_file(path), path)


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


def save_tokenizer(source, directory, bos_id, eos_id, model_max_length):
    """Put the tokenizer.json of source (a folder) into directory, and a tokenizer_config.json with which transformers
    4 and 5 make the same ids. bos_id and eos_id may be None; neither is added to a text."""
    tokenizer, directory = load_tokenizer(source), Path(directory)
    named = {'bos_token': bos_id, 'eos_token': eos_id}
    named = {name: tokenizer.id_to_token(i) for name, i in named.items() if i is not None}
    keys = ('content', 'lstrip', 'normalized', 'rstrip', 'single_word', 'special')
    added = {i: {key: getattr(t, key) for key in keys} for i, t in tokenizer.get_added_tokens_decoder().items()}
    about = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False,
             'add_bos_token': False, 'add_eos_token': False, 'model_max_length': model_max_length, **named,
             'added_tokens_decoder': added}
    (directory / 'tokenizer.json').write_text(tokenizer.to_str(pretty=True), encoding='utf-8')
    (directory / 'tokenizer_config.json').write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding='utf-8')

def hub_folder(name, files):
    """A folder here, or those files of a repository of the Hugging Face Hub -> Path"""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r'\w[\w.-]*(/[\w.-]+)?', name) or '/' in name and Path(name).parent.is_dir():
        raise ValueError(f"'{name}': no such folder, and not the form of a Hub id")
    import huggingface_hub
    huggingface_hub.logging.set_verbosity_error()               # its retries would say the same five times
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except Exception as e:                                      # whatever its layers raise
        raise ValueError(f"'{name}' is no folder here, and the Hugging Face Hub did not give it: {e}") from e

# ----------------------------------------------------------------------------------------------------------------------
# Reading: tokens


def open_data(dataset, root='data'):
    """A path, or a folder under root -> TokenData; {such a name: its share, ...} -> Mixture. ValueError"""
    if isinstance(dataset, str):
        return TokenData(dataset if Path(dataset, 'meta.json').is_file() else Path(root, dataset))
    counts = whole_counts(dataset)
    opened = {name: open_data(name, root) for name in dataset}
    return Mixture(opened, counts) if len(opened) > 1 else opened.popitem()[1]


class NoDataset(ValueError):
    """It has not been prepared"""


class TokenData:
    """data/NAME as prepare.py wrote it: meta, vocab_size, dtype, eot_id, splits {name: ids (N,), left on disk}.
    ValueError when it is not there, or not what its meta.json says."""

    def __init__(self, directory):
        self.directory = Path(directory)
        file, run = self.directory / 'meta.json', f"run 'python prepare.py {self.directory.name}'"
        if not file.is_file():
            raise NoDataset(f'no dataset in {directory}: {run}')
        try:
            self.meta = meta = json.loads(file.read_bytes())
            if meta['version'] != VERSION:
                raise ValueError(f'version {meta["version"]}, not {VERSION}')
            self.dtype, self.eot_id = np.dtype(DTYPES[meta['dtype']]), meta['eot_id']
            self.vocab_size, tokenizer_sha256 = int(meta['vocab_size']), meta['tokenizer']['sha256']
            sizes = {split: n['tokens'] * self.dtype.itemsize for split, n in meta['splits'].items() if n['bytes'] > 0}
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f'{file} is not what this prepare.py writes ({e!r}): {run} again') from e
        for split, size in sizes.items():
            file = self.directory / f'{split}.bin'
            found = file.stat().st_size if file.is_file() else 0
            if found != size or not size:
                raise ValueError(f'{file} has {found:,} bytes, and {size:,} by its meta.json: {run} again')
        file = self.directory / 'tokenizer.json'
        if hashlib.sha256(read_file(file)).hexdigest() != tokenizer_sha256:
            raise ValueError(f'{file} is not the one that made the tokens: {run} again')
        self.splits = {split: np.memmap(self.directory / f'{split}.bin', self.dtype, 'r') for split in sizes}

    @property
    def sources(self):
        """{name: (TokenData, share)}, as a Mixture has several"""
        return {self.directory.name: (self, 1.0)}

    def check(self, size=1 << 24):
        """Reads all tokens. ValueError for one that is not in the vocabulary"""
        for split, ids in self.splits.items():
            for start in range(0, len(ids), size):
                if (block := ids[start:start + size]).max() >= self.vocab_size:
                    at = start + int((block >= self.vocab_size).argmax())
                    raise ValueError(f'{self.directory / split}.bin: token {ids[at]} at byte '
                                     f'{at * self.dtype.itemsize:,} is not in the vocabulary of {self.vocab_size:,}: '
                                     'run prepare.py again')

    def fingerprint(self):
        """What tells datasets apart: the name, and a checksum of text, tokenizer and splits"""
        parts = [self.meta[k] for k in ('tokenizer', 'splits', 'dtype')] + [self.meta['source'].get('sha256')]
        return f'{self.meta["source"]["name"]} {zlib.crc32(json.dumps(parts, sort_keys=True).encode()):08x}'

    def tokens(self, split):
        if split not in self.splits:
            raise ValueError(f"{self.directory} has no split '{split}', only {', '.join(self.splits)}")
        return len(self.splits[split])

    def bytes_per_token(self, split):
        return self.meta['splits'][split]['bytes'] / self.tokens(split)

    def windows(self, split, block_size):
        """How many sequences of block_size tokens fit side by side, each with the token that follows it; at least 1"""
        count = (self.tokens(split) - 1) // block_size
        if count < 1:
            raise ValueError(f"split '{split}' of {self.directory} has {self.tokens(split):,} tokens, and block_size="
                             f'{block_size} needs {block_size + 1:,}: take a smaller block_size or a longer text')
        return count

    def batch(self, split, indices, block_size, seed):
        """Sequences number indices (B,) of an endless stream -> x, y (B, T) int64, y one token ahead. A pure function:
        the same in any batch, on any rank, after any restart. Every epoch has each window once, in an order of its own
        and shifted by a phase of its own, so that windows do not always begin at the same tokens."""
        W, last = self.windows(split, block_size), self.tokens(split) - 1 - block_size
        epoch, k = np.divmod(np.asarray(indices).astype(np.uint64), W)                      # (B,), (B,)
        key = scramble(np.array([seed % 2**64], np.uint64)) ^ zlib.crc32(split.encode())    # (1,)
        key = scramble(scramble(key) ^ epoch)                                               # (B,)
        start = scramble(key) % block_size + permute(k, W, key) * block_size
        return self.sequences(split, np.minimum(start, last).astype(np.int64), block_size)

    def eval_batch(self, split, first, count, block_size):
        """Windows first ... first + count - 1 in the order of the text -> x, y (count, T) int64. The end of the split
        that fills no window is left out."""
        assert 0 <= first and first + count <= self.windows(split, block_size), 'no such windows'
        return self.sequences(split, np.arange(first, first + count) * block_size, block_size)

    def sequences(self, split, start, block_size):
        at = start[:, None] + np.arange(block_size)                                         # (B, T)
        return self.splits[split][at].astype(np.int64), self.splits[split][at + 1].astype(np.int64)


class Mixture:
    """Datasets of one tokenizer, opened {name: TokenData}, read as if they were one: of every sum(counts) sequences,
    counts (k,) are from each. Neither the order of the names nor where the folders are makes a difference."""

    def __init__(self, opened, counts):
        prints = {name: data.fingerprint() for name, data in opened.items()}
        counts = dict(sorted(zip(opened, counts), key=lambda pair: prints[pair[0]]))
        self.counts = np.array([*counts.values()])                                          # (k,)
        self.source, self.rank = schedule([*counts.values()])                               # (period,), (period,)
        self.sources = {name: (opened[name], n / len(self.source)) for name, n in counts.items()}
        self.keys = [zlib.crc32(prints[name].encode()) << 32 for name in counts]            # of the seeds
        self.name = ' + '.join(f'{n}/{len(self.source)} {prints[name]}' for name, n in counts.items())
        first, *others = (data for data, _ in self.sources.values())
        for data in others:
            if data.meta['tokenizer']['sha256'] != first.meta['tokenizer']['sha256']:
                raise ValueError(f'{first.directory} and {data.directory} were made with different tokenizers: run '
                                 'prepare.py again for one of them, for the second with '
                                 f'--tokenizer={first.directory} --out_dir={data.directory}')
        self.directory, self.vocab_size, self.eot_id = first.directory, first.vocab_size, first.eot_id

    def check(self):
        for data, _ in self.sources.values():
            data.check()

    def fingerprint(self):
        return self.name

    def windows(self, split, block_size):
        return sum(data.windows(split, block_size) for data, _ in self.sources.values())

    def bytes_per_token(self, split):
        return sum(share * data.bytes_per_token(split) for data, share in self.sources.values())

    def drawn(self, n):
        """How many of the first n sequences are from each source, {name: count}"""
        period, rest = divmod(n, len(self.source))
        counts = period * self.counts + np.bincount(self.source[:rest], minlength=len(self.counts))
        return dict(zip(self.sources, counts.tolist()))

    def batch(self, split, indices, block_size, seed):
        """As TokenData's. Each source has its own endless stream, from a seed of its own, so that two of the same size
        are not in the same order; sequence i of the mixture is number own[i] of one of them."""
        period, at = np.divmod(np.asarray(indices), len(self.source))                       # (B,), (B,)
        source = self.source[at]
        own = period * self.counts[source] + self.rank[at]                                  # (B,)
        x, y = np.empty((2, len(at), block_size), np.int64)                                 # (B, T), (B, T)
        for i, (data, _) in enumerate(self.sources.values()):
            if (mine := source == i).any():
                x[mine], y[mine] = data.batch(split, own[mine], block_size, seed ^ self.keys[i])
        return x, y


def whole_counts(shares, longest=100_000):
    """{name: share} -> how many sequences of a period are from each. It is the shortest period in which the shares, as
    they are written, come out exactly, or the longest one, where they are rounded (largest remainders)."""
    for name, share in shares.items():
        if not isinstance(name, str) or type(share) not in (int, float) or not 0 < share < math.inf:
            raise ValueError(f'dataset={shares}: the share of {name!r} is {share!r}, must be a number above 0')
    if not shares:
        raise ValueError("dataset={}: must name at least one, as in {'shakespeare': 0.7, 'mybook': 0.3}")
    exact = [Fraction(str(share)) for share in shares.values()]
    exact = [share / sum(exact) for share in exact]
    period = min(math.lcm(*(share.denominator for share in exact)), longest)
    counts = [int(share * period) for share in exact]
    for i in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i] * period)[:period - sum(counts)]:
        counts[i] += 1
    if 0 in counts:
        raise ValueError(f'dataset={shares}: the share of {list(shares)[counts.index(0)]!r} is below one sequence in '
                         f'{longest:,}: raise it')
    return counts


def schedule(counts):
    """How many sequences of a period are from each of k sources -> the source of each sequence, and its rank among
    those of that source, (period,) both. Among the first n, for any n, a source has n times its share within
    1 - 1/(2k - 2): nothing smaller is always possible (Tijdeman, The chairman assignment problem, 1980)."""
    period, m, taken, source, rank = sum(counts), 2 * len(counts) - 2, [0] * len(counts), [], []
    for n in range(1, period + 1):
        may = [i for i, c in enumerate(counts) if m * (n * c - taken[i] * period) >= period]    # not too early
        i = min(may, key=lambda i: (m * taken[i] + m - 1) * period // (m * counts[i]))          # who must come first
        source.append(i), rank.append(taken[i])
        taken[i] += 1
    return np.array(source), np.array(rank)


def scramble(x):
    """uint64 (N,) -> uint64 (N,) that look random, one to one: a step of SplitMix64 (Steele et al., 2014)"""
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9
    x = (x ^ x >> 27) * 0x94D049BB133111EB
    return x ^ x >> 31


def permute(k, size, key, rounds=8):
    """k (N,) below size -> its places in a permutation of range(size) chosen by key (N,), uint64 all, without a table:
    a Feistel network permutes the smallest 4**half >= size; who leaves range(size) walks on until he is back."""
    half = ((size - 1).bit_length() + 1) // 2
    round_keys = [scramble(key + i) for i in range(rounds)]
    out, todo = k.copy(), np.arange(len(k))
    while len(todo):
        left, right = out[todo] >> half, out[todo] & (1 << half) - 1
        for round_key in round_keys:
            left, right = right, left ^ scramble(round_key[todo] ^ right) & (1 << half) - 1
        out[todo] = left << half | right
        todo = todo[out[todo] >= size]
    return out


if __name__ == '__main__':
    with config.user_errors():
        given, = config.load(Settings, positional='source', usage=__doc__)
        prepare(Settings(**given))
