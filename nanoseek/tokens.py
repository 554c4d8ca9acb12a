"""Token files as training reads them: a dataset or a mixture, ordered by the seed alone.

    data/NAME/train.bin, val.bin, test.bin      token ids, little-endian uint16 or uint32
    data/NAME/train.mask.bin, ...               of conversations: 1 for tokens that count, uint8
    data/NAME/meta.json                         what they mean; without it, the files are unfinished
    data/NAME/tokenizer.json                    the tokenizer that made them
"""
import functools
import json
import math
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np

VERSION = 2                         # of the format, in meta.json
DTYPES = {'uint16': '<u2', 'uint32': '<u4'}
SPLITS = ('train', 'val', 'test')
LONGEST_PERIOD = 100_000            # of a mixture, in sequences


class NoDataset(ValueError):
    """It has not been prepared."""


def open_data(dataset):
    """Open a path or a folder under data/ as TokenData, {name: share, ...} as a Mixture."""
    if isinstance(dataset, str):
        if Path(dataset, 'meta.json').is_file():
            return TokenData(dataset)
        return TokenData(Path('data', dataset))
    counts = whole_counts(dataset)
    opened = {name: open_data(name) for name in dataset}
    if len(opened) == 1:
        return opened.popitem()[1]
    return Mixture(opened, counts)


class TokenData:
    """A folder that prepare.py wrote: meta, vocab_size, dtype, eot_id, and splits, which maps
    names to ids (N,) that stay on the disk. ValueError if the files do not match meta.json."""

    def __init__(self, directory):
        self.directory = Path(directory)
        again = f"run 'python prepare.py {self.directory.name}'"
        file = self.directory / 'meta.json'
        if not file.is_file():
            raise NoDataset(f'no dataset in {directory}: {again}')
        self.meta = json.loads(file.read_bytes())
        self.pack = self.meta.get('pack', 0)        # of conversations: a row has one token more
        if self.meta['version'] != VERSION:
            raise ValueError(f'{file} is of another version: {again} again')
        self.dtype = np.dtype(DTYPES[self.meta['dtype']])
        self.eot_id = self.meta['eot_id']
        self.vocab_size = self.meta['vocab_size']
        self.splits = {}
        self.masks = {}
        for split, counts in self.meta['splits'].items():
            path = self.directory / f'{split}.bin'
            size = path.stat().st_size
            if size != counts['tokens'] * self.dtype.itemsize:
                raise ValueError(f'{path} has {size:,} bytes, which are not the '
                                 f'{counts["tokens"]:,} tokens of meta.json: {again} again')
            # a plain view: slices of a memmap are slower
            self.splits[split] = np.memmap(path, self.dtype, 'r').view(np.ndarray)      # (N,)
            if self.pack:
                path = self.directory / f'{split}.mask.bin'
                self.masks[split] = np.memmap(path, np.uint8, 'r').view(np.ndarray)     # (N,)
        self.starts = functools.lru_cache(64)(self.compute_starts)

    @property
    def sources(self):
        """{name: (TokenData, share)}, as a Mixture has several."""
        return {self.directory.name: (self, 1.0)}

    def fingerprint(self):
        """Return the name and a checksum of text, tokenizer and splits."""
        text = self.meta['source'].get('sha256') or self.meta['crc32']
        splits = {split: {'tokens': counts['tokens'], 'bytes': counts['bytes']}
                  for split, counts in self.meta['splits'].items()}
        parts = json.dumps([self.meta['tokenizer'], splits, self.meta['dtype'], text],
                           sort_keys=True)
        return f'{self.meta["source"]["name"]} {zlib.crc32(parts.encode()):08x}'

    def bytes_per_token(self, split):
        counts = self.meta['splits'][split]
        return counts['bytes'] / counts.get('targets', counts['tokens'])

    def windows(self, split, block_size):
        """Return how many sequences fit side by side, each with a next token. ValueError: none."""
        tokens = len(self.splits[split])
        if self.pack:
            if self.pack != block_size:
                raise ValueError(f'block_size={block_size}: must be {self.pack}, as the rows of '
                                 f'{self.directory}; prepare.py --pack={block_size} makes others')
            return tokens // (self.pack + 1)
        if tokens <= block_size:
            raise ValueError(f"split '{split}' of {self.directory} has {tokens:,} tokens, and "
                             f'block_size={block_size} needs {block_size + 1:,}: use a smaller '
                             'block_size or a longer text')
        return (tokens - 1) // block_size

    def batch(self, split, indices, block_size, seed):
        """Return sequences number `indices` (B,) of an endless stream: x, y (B, T) int64, y one
        token ahead, the same in any batch, on any rank, after any restart. Every epoch has each
        window once, in another order and shifted by another phase."""
        places = [divmod(int(i), 4096) for i in indices]
        starts = [self.starts(split, part, block_size, seed)[at] for part, at in places]
        return self.sequences(split, starts, block_size)

    def compute_starts(self, split, part, block_size, seed):
        """Return where sequences 4096 * part and on begin: many cost little more than one."""
        windows = self.windows(split, block_size)
        epoch, k = np.divmod(np.arange(4096 * part, 4096 * part + 4096, dtype=np.uint64), windows)
        key = scramble(np.array([seed % 2**64], np.uint64)) ^ zlib.crc32(split.encode())
        key = scramble(scramble(key) ^ epoch)                                         # (4096,)
        if self.pack:
            return permute(k, windows, key).astype(np.int64) * (self.pack + 1)
        starts = scramble(key) % block_size + permute(k, windows, key) * block_size   # (4096,)
        last = len(self.splits[split]) - 1 - block_size
        return np.minimum(starts, last).astype(np.int64)

    def eval_batch(self, split, first, count, block_size):
        """Return windows first ... first + count - 1 of the text: x, y (count, T) int64."""
        length = self.pack + 1 if self.pack else block_size
        return self.sequences(split, length * np.arange(first, first + count), block_size)

    def sequences(self, split, starts, block_size):
        ids = self.splits[split]
        both = np.stack([ids[a:a + block_size + 1] for a in starts]).astype(np.int64)
        x, y = both[:, :-1], both[:, 1:]                                         # (B, T) each
        if self.pack:
            mask = np.stack([self.masks[split][a + 1:a + block_size + 1] for a in starts])
            y = np.where(mask, y, -100)
        return x, y


class Mixture:
    """Datasets of one tokenizer, opened {name: TokenData}, read as one: of every sum(counts)
    sequences, counts (k,) are from each. Order and folders make no difference."""

    def __init__(self, opened, counts):
        prints = {name: data.fingerprint() for name, data in opened.items()}
        names = sorted(opened, key=prints.get)
        counts = dict(zip(opened, counts))
        self.counts = np.array([counts[name] for name in names])                         # (k,)
        self.source, self.rank = schedule(self.counts.tolist())                 # (period,) each
        period = len(self.source)
        self.sources = {name: (opened[name], counts[name] / period) for name in names}
        self.keys = [zlib.crc32(prints[name].encode()) << 32 for name in names]  # of the seeds
        self.prints = [f'{counts[name]}/{period} {prints[name]}' for name in names]
        first = opened[names[0]]
        for data in opened.values():
            if data.meta['tokenizer']['sha256'] != first.meta['tokenizer']['sha256']:
                raise ValueError(f'{first.directory} and {data.directory} have different '
                                 'tokenizers: prepare the second again with '
                                 f'--tokenizer={first.directory} --out_dir={data.directory}')
        self.directory = first.directory
        self.vocab_size = first.vocab_size
        self.eot_id = first.eot_id
        self.pack = max(data.pack for data in opened.values())

    def fingerprint(self):
        return ' + '.join(self.prints)

    def windows(self, split, block_size):
        return sum(data.windows(split, block_size) for data, _ in self.sources.values())

    def bytes_per_token(self, split):
        return sum(share * data.bytes_per_token(split) for data, share in self.sources.values())

    def batch(self, split, indices, block_size, seed):
        """Like TokenData's. Each source has a stream and a seed, so that two of one size have
        different orders; sequence i of the mixture is number within[i] of one of them."""
        period, at = np.divmod(np.asarray(indices), len(self.source))              # (B,) each
        source = self.source[at]
        within = period * self.counts[source] + self.rank[at]                           # (B,)
        x, y = np.empty((2, len(at), block_size), np.int64)                      # (B, T) each
        for i, (data, _) in enumerate(self.sources.values()):
            rows = source == i
            if rows.any():
                x[rows], y[rows] = data.batch(split, within[rows], block_size, seed ^ self.keys[i])
        return x, y


def describe(data):
    """Return a line about a TokenData or a Mixture, for model cards."""
    names = []
    for name, (source, share) in data.sources.items():
        names.append(f'{share:.1%} {name} ({source.meta["source"]["license"]})')
    return f'{" + ".join(names)}, tokenizer {source.meta["tokenizer"]["name"]}'


def whole_counts(shares):
    """Return how many sequences of a period are from each of {name: share}: of the shortest
    period with exactly these shares, or of about the longest one, with shares rounded."""
    for share in shares.values() or [None]:
        if type(share) not in (int, float) or not 0 < share < math.inf:
            raise ValueError(f'dataset={shares}: each name needs a share above 0, as in '
                             "{'shakespeare': 0.7, 'mybook': 0.3}")
    exact = [Fraction(str(share)) for share in shares.values()]
    total = sum(exact)
    period = min(math.lcm(*((share / total).denominator for share in exact)), LONGEST_PERIOD)
    return [max(round(share / total * period), 1) for share in exact]


def schedule(counts):
    """Return the source of each sequence of a period and its rank in that source, (period,) both,
    for counts of k sources. Among any first n, a source has n times its share within
    1 - 1/(2k - 2), the best possible (Tijdeman, The chairman assignment problem, 1980)."""
    period = sum(counts)
    m = 2 * len(counts) - 2
    drawn = [0] * len(counts)
    order = []
    for n in range(1, period + 1):
        not_too_early = [i for i, count in enumerate(counts)
                         if m * (n * count - drawn[i] * period) >= period]
        # the one that must come next, at the latest
        i = min(not_too_early, key=lambda i: (m * drawn[i] + m - 1) * period // (m * counts[i]))
        order.append((i, drawn[i]))
        drawn[i] += 1
    return np.array(order).T


def scramble(x):
    """Map uint64 (N,) one to one to what looks random: a SplitMix64 step (Steele et al., 2014)."""
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9
    x = (x ^ x >> 27) * 0x94D049BB133111EB
    return x ^ x >> 31


def permute(k, size, key, rounds=8):
    """Return the places of k (N,) in a permutation of range(size) by key (N,), uint64 all. A
    Feistel network permutes the smallest 4**half >= size; what leaves range(size) walks on."""
    half = ((size - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    round_keys = [scramble(key + i) for i in range(rounds)]
    out = k.copy()
    todo = np.arange(len(k))
    while len(todo):
        left = out[todo] >> half
        right = out[todo] & mask
        for round_key in round_keys:
            left, right = right, left ^ scramble(round_key[todo] ^ right) & mask
        out[todo] = left << half | right
        todo = todo[out[todo] >= size]
    return out
