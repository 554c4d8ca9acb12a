"""What is in a folder that prepare.py wrote, in words. All of it is read."""
import math

import numpy as np

from nanoseek.tokenizer import decode, load_tokenizer
from nanoseek.tokens import TokenData


def inspect(folder, top=20, samples=3):
    """Yields lines. ValueError where something is wrong"""
    data = TokenData(folder)
    tokenizer = load_tokenizer(folder)
    about = {**data.meta['source'], 'tokenizer': data.meta['tokenizer']['name'],
             'vocabulary': f'{data.vocab_size:,}', 'ids': data.meta['dtype']}
    for name, value in about.items():
        yield f'{name:12} {value}'
    data.check(checksums=True)
    counts = np.zeros(data.vocab_size, np.int64)
    for split, ids in data.splits.items():
        lengths = document_lengths(data, ids, counts)
        size = data.meta['splits'][split]['bytes']
        yield (f'\n{split}: {len(ids):,} tokens, {size:,} bytes of text, {size / len(ids):.3f} '
              'bytes per token')
        if len(lengths):
            yield from show_lengths(lengths)
    order = np.argsort(-counts, kind='stable')[:top]
    yield f'\n{(counts > 0).sum():,} of {data.vocab_size:,} tokens occur; the most frequent:'
    for i in order:
        if counts[i]:
            yield f'{counts[i] / counts.sum():7.2%} {i:7} {decode(tokenizer, [i])!r}'
    rng = np.random.default_rng(0)
    ids = data.splits['train']
    for at in rng.integers(0, max(len(ids) - 100, 1), samples):
        yield f'\n--- train, 100 tokens from {at:,}\n{decode(tokenizer, ids[at:at + 100])}'
    checked = 'the sizes of the files, all ids'
    if 'crc32' in data.meta:
        checked += ', the checksums'
    yield f'\nchecked and right: {checked}, and that tokenizer.json is the one that made them'


def document_lengths(data, ids, counts, size=1 << 22):
    """ids (N,) of a split -> the lengths of its documents; adds to the counts of all ids (V,)"""
    lengths = []
    begun = 0
    for start in range(0, len(ids), size):
        block = np.asarray(ids[start:start + size])
        counts += np.bincount(block, minlength=data.vocab_size)
        ends = np.zeros(len(block), bool)
        if data.meta.get('end_of_text'):
            ends = block == data.eot_id
        if data.row:                            # what is cut off at a row's end ends there, too
            ends |= np.arange(start + 1, start + len(block) + 1) % (data.row + 1) == 0
        ends = np.flatnonzero(ends) + start + 1
        lengths.append(np.diff(ends, prepend=begun))
        if len(ends):
            begun = ends[-1]
    return np.concatenate(lengths)


def show_lengths(lengths):
    yield (f'{len(lengths):,} documents of {lengths.min():,} to {lengths.max():,} tokens, end of '
          f'text included; median {np.median(lengths):,.0f}, mean {lengths.mean():,.1f}')
    bins = np.bincount(np.log2(lengths).astype(int))
    for n in range(np.flatnonzero(bins)[0], len(bins)):
        bar = '#' * math.ceil(50 * bins[n] / bins.max())
        yield f'{2**n:12,} to {2**(n + 1) - 1:<12,} {bins[n]:12,} {bar}'
