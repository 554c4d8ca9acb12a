"""Documents in pieces, on their way from a source to the token files: split, without duplicates,
and encoded."""
import functools
import hashlib
import json
from typing import NamedTuple

import numpy as np

from nanoseek.sources import LongText
from nanoseek.tokenizer import PIECE, Encoder, cut, in_words, is_of_text

SHARES = (0.005, 0.005)             # of val and test, where the settings do not say otherwise


class BadDocument(ValueError):
    """The one that ends a preparation; what came before it stays."""


class Piece(NamedTuple):
    """A document, or a part of a long one"""
    split: str
    text: str
    last: bool                      # it ends its document
    where: str                      # the document, for errors
    problem: str | None = None      # the rest of the document cannot be had


class Seen:
    """A set of 64-bit numbers in 8 bytes each and a little"""

    def __init__(self, numbers):
        self.sorted = np.unique(numbers)
        self.recent = set()

    def add(self, number):
        """-> whether it is new"""
        i = np.searchsorted(self.sorted, np.uint64(number))
        if number in self.recent or (i < len(self.sorted) and self.sorted[i] == number):
            return False
        self.recent.add(number)
        if len(self.recent) > 10_000 + len(self.sorted) // 16:
            recent = np.fromiter(self.recent, np.uint64)
            self.sorted = np.sort(np.concatenate((self.sorted, recent)))
            self.recent = set()
        return True


def start_of_source():
    """What documents() keeps: where the source goes on, and within a document in pieces; how
    many were left out; the lowest hash of a document, as a share"""
    return {'at': None, 'within': [0, 0], 'left_out': {'bad': 0, 'duplicates': 0},
            'lowest': 1.0, 'first_bad': None}


def documents(source, s, encoder, state, seen=None):
    """Yields the Pieces of all documents that are to be taken, and keeps in state what is needed
    to go on behind the last one. encoder: None, where any cut is good enough"""
    for document in source.read(state['at']):
        usable = document.text is not None and s.bad_documents == 'replace'
        if document.problem and not usable:
            leave_out(s, state, document.where, document.problem)
            state['left_out']['bad'] += 1
            continue
        long = isinstance(document.text, LongText)
        if long:
            digest = document.text.digest
        else:
            data = document.text.encode()
            digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), 'big')
        if seen and state['within'] == [0, 0]:
            if not seen.add(digest):
                state['left_out']['duplicates'] += 1
                continue
            state['hashes'].append(digest)
        at = digest / 2**64                     # the same for every run and order of documents
        state['lowest'] = min(state['lowest'], at)
        split = split_at(at, *s.shares(SHARES))
        if long:
            yield from long_document(source, document, split, encoder, state)
        else:
            yield Piece(split, document.text, True, document.where)


def split_at(at, val, test):
    if at < val:
        return 'val'
    if at < val + test:
        return 'test'
    return 'train'


def long_document(source, document, split, encoder, state):
    """Yields the Pieces of a LongText, and keeps in state what is needed to go on"""
    long = document.text
    cutter = functools.partial(cut, None)
    if encoder is not None:
        cutter = encoder.cut
    pieces = long.pieces(cutter, *state['within'])
    while True:
        try:
            piece = next(pieces, None)
        except BaseException as e:
            if isinstance(e, OSError) or not is_of_text(e):
                raise
            state['at'] = long.at
            state['within'] = [0, 0]
            yield Piece(split, '', True, document.where, in_words(e))
            return
        if piece is None:
            return
        text, own_split, last, within = piece
        state['at'] = long.at
        state['within'] = within
        if last and not source.text:
            state['within'] = [0, 0]
        yield Piece(own_split or split, text, last, document.where)


def leave_out(s, state, where, problem):
    """BadDocument, or where such documents are to be skipped a note of the first one"""
    text = str(problem)
    if not text.startswith(where):
        text = f'{where}: {text}'
    if s.bad_documents == 'stop':
        raise BadDocument(f'{text}; leave such documents out with --bad_documents=skip')
    state['first_bad'] = state['first_bad'] or text


def batches(source, s, encoder, progress, seen, size):
    """Yields lists of Pieces of about so many characters, and what of the progress's state is
    other behind them"""
    ahead = copy_of({key: progress.state[key] for key in start_of_source()})
    ahead['hashes'] = progress.hashes
    pieces = []
    characters = 0

    def behind():
        if ahead['within'] == [0, 0]:
            ahead['at'] = source.position()
        state = {key: ahead[key] for key in start_of_source()}
        state['seen'] = progress.kept + len(progress.hashes)
        return copy_of(state)

    for piece in documents(source, s, encoder, ahead, seen):
        pieces.append(piece)
        characters += len(piece.text) + 16
        if characters > size:
            yield pieces, behind()
            pieces = []
            characters = 0
    yield pieces, behind()


def copy_of(state):
    return json.loads(json.dumps(state))


def texts_to_learn(source, s, most, splits=('train',)):
    """Yields up to `most` characters of the documents of these splits"""
    for piece in documents(source, s, None, start_of_source()):
        if piece.split in splits:
            if len(piece.text) <= 2 * PIECE:
                yield piece.text
            else:
                yield from cut(None, [piece.text])
            most -= len(piece.text)
        if most <= 0:
            break


# -------------------------------------------------------------------------- in the workers

@functools.lru_cache(1)
def encoder_of(folder, name, special_in_text):
    """The Encoder of a folder, made once in each process"""
    return Encoder(folder, name, special_in_text)


def encode_pieces(encoder_args, pieces, check):
    """-> for each piece its ids (n,) uint32 and bytes, or the problem with it in words"""
    texts = [piece.text for piece in pieces]
    made = encoder_of(*encoder_args).encode_each(texts, check)
    found = []
    for piece, (ids, problem) in zip(pieces, made):
        problem = piece.problem or problem
        if problem is None:
            found.append((ids, len(piece.text.encode()), None))
        else:
            found.append((None, 0, problem))
    return found
