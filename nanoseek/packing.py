"""Rows of a fixed number of tokens that each begin where a document does."""
from bisect import bisect_right

import numpy as np

WAITING = 1024              # documents that wait for a row where they fit


def split_at(tokens, eot, size=1 << 22):
    """token ids (N,), of which every document ends with eot -> yields the documents"""
    begun = []                                          # of a document, its parts
    for start in range(0, len(tokens), size):
        block = np.asarray(tokens[start:start + size])
        ends = np.flatnonzero(block == eot) + 1
        *whole, rest = np.split(block, ends)
        if whole:
            yield np.concatenate([*begun, whole[0]])
            yield from whole[1:]
            begun = []
        begun.append(rest)


def best_fit(documents, row, lose):
    """Yields rows (row,): the longest document that fits, again and again; where none does, the
    shortest is cut. lose(ids, whole) gets what is left out, and whether that is a document from
    its beginning on"""
    lengths = []                                        # of held, sorted
    held = []
    parts = []                                          # of the present row
    room = row
    while True:
        while len(held) < WAITING:
            document = next(documents, None)
            if document is None:
                break
            i = bisect_right(lengths, len(document))
            lengths.insert(i, len(document))
            held.insert(i, document)
        if not held:
            break
        i = max(bisect_right(lengths, room) - 1, 0)
        document = held.pop(i)
        del lengths[i]
        if len(document) > room:
            lose(document[room:], False)
        parts.append(document[:room])
        room -= len(parts[-1])
        if room == 0:
            yield np.concatenate(parts)
            parts = []
            room = row
    for document in parts:
        lose(document, True)
