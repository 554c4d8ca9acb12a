"""Token files as training reads them: one dataset or a mixture, in an order that is a pure
function of the seed.

    data/NAME/train.bin, train-00001.bin ...    token ids, little-endian uint16 or uint32
    data/NAME/meta.json                         what they mean; its absence says: not complete
    data/NAME/tokenizer.json                    what made them
"""
import functools
import hashlib
import json
import math
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np

from nanoseek import files

VERSION = 2                         # of the format, in meta.json; 1 had one file for a split
DTYPES = {'uint16': '<u2', 'uint32': '<u4'}
SPLITS = ('train', 'val', 'test')


class NoDataset(ValueError):
    """It has not been prepared."""


def file_name(split, shard):
    if shard == 0:
        return f'{split}.bin'
    return f'{split}-{shard:05d}.bin'


def open_data(dataset, root='data'):
    """A path, or a folder under root -> TokenData. {name: share, ...} -> Mixture. ValueError"""
    if isinstance(dataset, str):
        if Path(dataset, 'meta.json').is_file():
            return TokenData(dataset)
        return TokenData(Path(root, dataset))
    counts = whole_counts(dataset)
    opened = {name: open_data(name, root) for name in dataset}
    if len(opened) == 1:
        return opened.popitem()[1]
    return Mixture(opened, counts)


# ----------------------------------------------------------------------------- one dataset

class Shards:
    """Arrays that read like one, in order. Only slices without a step."""

    def __init__(self, parts):
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, where):
        begin, end, _ = where.indices(len(self))
        first = np.searchsorted(self.ends, begin, 'right')
        last = np.searchsorted(self.ends, max(end - 1, begin), 'right')
        pieces = []
        for i in range(first, min(last + 1, len(self.parts))):
            start = self.ends[i] - len(self.parts[i])
            pieces.append(self.parts[i][max(begin - start, 0):max(end - start, 0)])
        return np.concatenate(pieces)


def open_split(folder, split, tokens, dtype, shard_tokens):
    """-> the ids of a split (N,), left on the disk. ValueError where a file has another size"""
    parts = []
    for shard, start in enumerate(range(0, tokens, shard_tokens)):
        file = folder / file_name(split, shard)
        wanted = min(tokens - start, shard_tokens) * dtype.itemsize
        size = 0
        if file.is_file():
            size = file.stat().st_size
        if size != wanted:
            raise ValueError(f'{file} has {size:,} bytes, and {wanted:,} by its meta.json')
        parts.append(files.open_array(file, dtype))
    if len(parts) == 1:
        return parts[0]
    return Shards(parts)


class TokenData:
    """A folder that prepare.py wrote: meta, vocab_size, dtype, eot_id, and splits {name: ids
    (N,), left on the disk}. ValueError where it is not there, or not what meta.json says"""

    def __init__(self, directory):
        self.directory = Path(directory)
        again = f"run 'python prepare.py {self.directory.name}'"
        file = self.directory / 'meta.json'
        if not file.is_file():
            raise NoDataset(f'no dataset in {directory}: {again}')
        try:
            self.meta = json.loads(file.read_text(encoding='utf-8'))
            if self.meta['version'] not in (1, VERSION):
                raise ValueError(f'version {self.meta["version"]}, not {VERSION}')
            self.dtype = np.dtype(DTYPES[self.meta['dtype']])
            self.eot_id = self.meta['eot_id']
            self.vocab_size = int(self.meta['vocab_size'])
            self.row = self.meta.get('pack', 0)         # tokens of a packed row; 0: a stream
            shard_tokens = self.meta.get('shard_tokens', 1 << 62)
            tokenizer_sha256 = self.meta['tokenizer']['sha256']
            counts = {}
            for split, about in self.meta['splits'].items():
                if about['bytes'] > 0:
                    counts[split] = about['tokens']
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f'{file} is not what this version writes ({e!r}): {again} '
                             'again') from e
        file = self.directory / 'tokenizer.json'
        if not file.is_file():
            raise ValueError(f"no file '{file}': {again} again")
        if hashlib.sha256(file.read_bytes()).hexdigest() != tokenizer_sha256:
            raise ValueError(f'{file} is not the one that made the tokens: {again} again')
        try:
            self.splits = {split: open_split(self.directory, split, n, self.dtype, shard_tokens)
                           for split, n in counts.items()}
        except ValueError as e:
            raise ValueError(f'{e}: {again} again') from e
        self.starts = functools.lru_cache(64)(self.compute_starts)

    @property
    def sources(self):
        """{name: (TokenData, share)}, as a Mixture has several"""
        return {self.directory.name: (self, 1.0)}

    def check(self, checksums=False):
        """Reads all tokens. ValueError for one that is not in the vocabulary, and where a
        checksum is wrong"""
        for split in self.splits:
            self.check_ids(split)
            if checksums:
                self.check_sums(split)

    def check_ids(self, split, block_size=1 << 24):
        ids = self.splits[split]
        for start in range(0, len(ids), block_size):
            block = ids[start:start + block_size]
            if block.max() >= self.vocab_size:
                i = int((block >= self.vocab_size).argmax())
                raise ValueError(f'{self.directory / split}.bin: token {block[i]} at byte '
                                 f'{(start + i) * self.dtype.itemsize:,} is not in the '
                                 f'vocabulary of {self.vocab_size:,}: run prepare.py again')

    def check_sums(self, split):
        for shard, wanted in enumerate(self.meta.get('crc32', {}).get(split, [])):
            file = self.directory / file_name(split, shard)
            found = 0
            with open(file, 'rb') as f:
                while block := f.read(1 << 20):
                    found = zlib.crc32(block, found)
            if found != wanted:
                raise ValueError(f'{file} is damaged: its checksum is {found}, should be '
                                 f'{wanted}: run prepare.py again')

    def fingerprint(self):
        """What tells datasets apart: the name, and a checksum of text, tokenizer and splits"""
        text = self.meta['source'].get('sha256') or self.meta['crc32']
        splits = {}
        for split, about in self.meta['splits'].items():
            splits[split] = {'tokens': about['tokens'], 'bytes': about['bytes']}
        parts = json.dumps([self.meta['tokenizer'], splits, self.meta['dtype'], text],
                           sort_keys=True)
        return f'{self.meta["source"]["name"]} {zlib.crc32(parts.encode()):08x}'

    def tokens(self, split):
        if split not in self.splits:
            raise ValueError(f"{self.directory} has no split '{split}', only "
                             f'{", ".join(self.splits)}')
        return len(self.splits[split])

    def bytes_per_token(self, split):
        return self.meta['splits'][split]['bytes'] / self.tokens(split)

    def windows(self, split, block_size):
        """How many sequences of block_size tokens fit side by side, each with the token that
        follows it. ValueError for none"""
        tokens = self.tokens(split)
        if self.row and block_size != self.row:
            raise ValueError(f'{self.directory} is packed in rows of {self.row} tokens: '
                             f'block_size={block_size} must be that, or run prepare.py with '
                             'another --pack')
        if self.row:
            count = tokens // (self.row + 1)
        else:
            count = (tokens - 1) // block_size
        if count < 1:
            raise ValueError(f"split '{split}' of {self.directory} has {tokens:,} tokens, and "
                             f'block_size={block_size} needs {block_size + 1:,}: take a '
                             'smaller block_size or a longer text')
        return count

    def batch(self, split, indices, block_size, seed):
        """Sequences number `indices` (B,) of an endless stream -> x, y (B, T) int64, y one
        token ahead. A pure function: the same in any batch, on any rank, after any restart.
        Every epoch has each window once, in an order of its own, and shifted by a phase of its
        own, so that windows do not always begin at the same tokens."""
        starts = []
        for i in indices:
            part, within = divmod(int(i), 4096)
            starts.append(self.starts(split, part, block_size, seed)[within])
        return self.sequences(split, starts, block_size)

    def compute_starts(self, split, part, block_size, seed):
        """Where sequences 4096 * part and on begin: many cost little more than one"""
        windows = self.windows(split, block_size)
        numbers = np.arange(4096 * part, 4096 * part + 4096, dtype=np.uint64)
        epoch, k = np.divmod(numbers, windows)                                        # (4096,)
        key = scramble(np.array([seed % 2**64], np.uint64)) ^ zlib.crc32(split.encode())
        key = scramble(scramble(key) ^ epoch)                                         # (4096,)
        order = permute(k, windows, key)
        if self.row:
            return (order * (self.row + 1)).astype(np.int64)
        phase = scramble(key) % block_size
        last = self.tokens(split) - 1 - block_size
        return np.minimum(phase + order * block_size, last).astype(np.int64)

    def eval_batch(self, split, first, count, block_size):
        """Windows first ... first + count - 1 in the order of the text -> x, y (count, T)
        int64. The end of the split that fills no window is left out."""
        assert 0 <= first and first + count <= self.windows(split, block_size), 'no such windows'
        step = block_size
        if self.row:
            step += 1
        return self.sequences(split, range(first * step, (first + count) * step, step),
                              block_size)

    def sequences(self, split, starts, block_size):
        ids = self.splits[split]
        both = np.stack([ids[a:a + block_size + 1] for a in starts]).astype(np.int64)
        return both[:, :-1], both[:, 1:]                                         # (B, T) each


# ------------------------------------------------------------------------------- a mixture

class Mixture:
    """Datasets of one tokenizer, opened {name: TokenData}, read as if they were one: of every
    sum(counts) sequences, counts (k,) are from each. Neither the order of the names nor where
    the folders are makes a difference."""

    def __init__(self, opened, counts):
        prints = {name: data.fingerprint() for name, data in opened.items()}
        names = sorted(opened, key=prints.get)
        counts = dict(zip(opened, counts))
        self.counts = np.array([counts[name] for name in names])                         # (k,)
        self.source, self.rank = schedule(self.counts.tolist())                 # (period,) each
        period = len(self.source)
        self.sources = {name: (opened[name], counts[name] / period) for name in names}
        self.keys = [zlib.crc32(prints[name].encode()) << 32 for name in names]  # of the seeds
        self.name = ' + '.join(f'{counts[name]}/{period} {prints[name]}' for name in names)
        first = opened[names[0]]
        for name in names[1:]:
            data = opened[name]
            if data.meta['tokenizer']['sha256'] != first.meta['tokenizer']['sha256']:
                raise ValueError(f'{first.directory} and {data.directory} were made with '
                                 'different tokenizers: run prepare.py again for one of them, '
                                 f'for the second with --tokenizer={first.directory} '
                                 f'--out_dir={data.directory}')
        self.directory = first.directory
        self.vocab_size = first.vocab_size
        self.eot_id = first.eot_id

    def check(self):
        for data, _ in self.sources.values():
            data.check()

    def fingerprint(self):
        return self.name

    def windows(self, split, block_size):
        return sum(data.windows(split, block_size) for data, _ in self.sources.values())

    def bytes_per_token(self, split):
        """A mean by share"""
        return sum(share * data.bytes_per_token(split) for data, share in self.sources.values())

    def drawn(self, n):
        """How many of the first n sequences are from each source, {name: count}"""
        period, rest = divmod(n, len(self.source))
        counts = period * self.counts
        counts += np.bincount(self.source[:rest], minlength=len(self.counts))
        return dict(zip(self.sources, counts.tolist()))

    def batch(self, split, indices, block_size, seed):
        """As TokenData's. Each source has its own endless stream, from a seed of its own, so
        that two of the same size are not in the same order; sequence i of the mixture is
        number own[i] of one of them."""
        period, at = np.divmod(np.asarray(indices), len(self.source))              # (B,) each
        source = self.source[at]
        own = period * self.counts[source] + self.rank[at]                              # (B,)
        x, y = np.empty((2, len(at), block_size), np.int64)                      # (B, T) each
        for i, (data, _) in enumerate(self.sources.values()):
            mine = source == i
            if mine.any():
                x[mine], y[mine] = data.batch(split, own[mine], block_size, seed ^ self.keys[i])
        return x, y


def whole_counts(shares, longest=100_000):
    """{name: share} -> how many sequences of a period are from each. It is the shortest period
    in which the shares, as they are written, come out exactly, or the longest one, where they
    are rounded (largest remainders)."""
    for name, share in shares.items():
        number = type(share) in (int, float) and 0 < share < math.inf
        if not isinstance(name, str) or not number:
            raise ValueError(f'dataset={shares}: the share of {name!r} is {share!r}, must be a '
                             'number above 0')
    if not shares:
        raise ValueError("dataset={}: must name at least one, as in {'shakespeare': 0.7, "
                         "'mybook': 0.3}")
    exact = [Fraction(str(share)) for share in shares.values()]
    total = sum(exact)
    exact = [share / total for share in exact]
    period = min(math.lcm(*(share.denominator for share in exact)), longest)
    counts = [int(share * period) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i] * period)
    for i in by_remainder[:period - sum(counts)]:
        counts[i] += 1
    if 0 in counts:
        name = list(shares)[counts.index(0)]
        raise ValueError(f'dataset={shares}: the share of {name!r} is below one sequence in '
                         f'{longest:,}: raise it')
    return counts


def schedule(counts):
    """How many sequences of a period are from each of k sources -> the source of each
    sequence, and its rank among those of that source, (period,) both. Among the first n, for
    any n, a source has n times its share within 1 - 1/(2k - 2): nothing smaller is always
    possible (Tijdeman, The chairman assignment problem, 1980)."""
    period = sum(counts)
    m = 2 * len(counts) - 2
    taken = [0] * len(counts)
    source = []
    rank = []

    def deadline(i):
        """When source i must come next, at the latest"""
        return (m * taken[i] + m - 1) * period // (m * counts[i])

    for n in range(1, period + 1):
        not_too_early = [i for i, count in enumerate(counts)
                         if m * (n * count - taken[i] * period) >= period]
        i = min(not_too_early, key=deadline)
        source.append(i)
        rank.append(taken[i])
        taken[i] += 1
    return np.array(source), np.array(rank)


# --------------------------------------------------------------------- an order without a table

def scramble(x):
    """uint64 (N,) -> uint64 (N,) that look random, one to one: a step of SplitMix64 (Steele et
    al., 2014)"""
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9
    x = (x ^ x >> 27) * 0x94D049BB133111EB
    return x ^ x >> 31


def permute(k, size, key, rounds=8):
    """k (N,) below size -> its places in a permutation of range(size) chosen by key (N,),
    uint64 all. A Feistel network permutes the smallest 4**half >= size; what leaves range(size)
    walks on until it is back."""
    half = ((size - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    round_keys = [scramble(key + i) for i in range(rounds)]
    out = k.copy()
    todo = np.arange(len(k))
    while len(todo):
        left = out[todo] >> half
        right = out[todo] & mask
        for round_key in round_keys:
            mixed = left ^ scramble(round_key[todo] ^ right) & mask
            left, right = right, mixed
        out[todo] = left << half | right
        todo = todo[out[todo] >= size]
    return out
