"""Token files that grow, in a folder of their own until all is there, with a note of how far they
have come.
"""
import json
import os
import re
import shutil
import time
import zlib

import numpy as np

from nanoseek import files, packing
from nanoseek.tokenizer import decode
from nanoseek.tokens import DTYPES, SPLITS, file_name, open_split


class Progress:
    """Token files that grow, and progress.json with state, which says how much of them counts."""

    def __init__(self, folder, state, dtype, shard_tokens):
        self.folder = folder
        self.state = state
        self.dtype = np.dtype(DTYPES[dtype])
        self.shard = shard_tokens
        self.touched = set()
        self.hashes = []
        self.kept = state['seen']
        self.began = time.time()
        self.first = self.tokens()

    def go_on(self):
        """Cuts the files to what counts -> hashes of the documents until then. OSError where
        there is less"""
        self.cut_files()
        return np.fromfile(self.folder / 'seen.bin', np.uint64)

    def cut_files(self):
        sizes = {'seen.bin': 8 * self.kept}
        for split, of_split in self.state['splits'].items():
            for shard in range(len(of_split['crc'])):
                tokens = min(of_split['tokens'] - shard * self.shard, self.shard)
                sizes[file_name(split, shard)] = tokens * self.dtype.itemsize
        for file in self.folder.glob('*.bin'):
            if file.name not in sizes:
                file.unlink()
                self.touched.discard(file)
        for name, size in sizes.items():
            with open(self.folder / name, 'ab') as f:
                if f.tell() < size:
                    raise OSError(f'{name} has {f.tell()} bytes, not {size}')
                f.truncate(size)

    def of_split(self, split):
        """{tokens, bytes, documents, crc: checksum of each file} of a split, to be changed"""
        nothing = {'tokens': 0, 'bytes': 0, 'documents': 0, 'crc': []}
        return self.state['splits'].setdefault(split, nothing)

    def append(self, split, ids, size, documents):
        """ids (n,) of so many documents, whose text has size bytes"""
        of_split = self.of_split(split)
        while len(ids):
            shard, used = divmod(of_split['tokens'], self.shard)
            part = ids[:self.shard - used].astype(self.dtype).tobytes()
            ids = ids[self.shard - used:]
            file = self.folder / file_name(split, shard)
            with open(file, 'ab') as f:
                f.write(part)
            self.touched.add(file)
            if shard == len(of_split['crc']):
                of_split['crc'].append(0)
            of_split['crc'][shard] = zlib.crc32(part, of_split['crc'][shard])
            of_split['tokens'] += len(part) // self.dtype.itemsize
        of_split['bytes'] += size
        of_split['documents'] += documents

    def save(self):
        count = self.state['seen'] - self.kept
        seen = self.folder / 'seen.bin'
        with open(seen, 'ab') as f:
            f.write(np.array(self.hashes[:count], np.uint64).tobytes())
        del self.hashes[:count]                 # the same list, to which documents() appends
        self.kept = self.state['seen']
        self.touched.add(seen)
        self.sync()
        files.write_file(self.folder / 'progress.json', json.dumps(self.state).encode())

    def sync(self):
        """Waits until what was appended is on the disk"""
        for file in self.touched:
            files.sync(file)
        self.touched = set()

    def tokens(self):
        return sum(of_split['tokens'] for of_split in self.state['splits'].values())


def move(folder, out):
    """A complete preparation to its place; can be interrupted and repeated. meta.json goes
    first, and comes last"""
    meta = json.loads((folder / 'meta.json').read_bytes())
    names = set()
    for split, sums in meta['crc32'].items():
        for shard in range(len(sums)):
            names.add(file_name(split, shard))
    (out / 'meta.json').unlink(missing_ok=True)
    for file in out.glob('*.bin'):
        ours = re.fullmatch(rf'({"|".join(SPLITS)})(-\d+)?\.bin', file.name)
        if ours and file.name not in names:
            file.unlink()
    for name in (*names, 'tokenizer.json', 'meta.json'):
        if (folder / name).exists():
            os.replace(folder / name, out / name)


def pack(progress, eot, row, tokenizer):
    """Token files with documents one behind the other -> others with rows of so many tokens, and
    {split: the share of its tokens that did not fit}"""
    folder = progress.folder / 'packed'
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shares = {}
    rows = Progress(folder, {'splits': {}, 'seen': 0}, progress.dtype.name, progress.shard)
    for split, of_split in progress.state['splits'].items():
        lost = {'tokens': 0, 'bytes': 0, 'documents': 0}

        def lose(ids, whole):
            text = decode(tokenizer, ids[ids != eot])
            lost['tokens'] += len(ids)
            lost['bytes'] += len(text.encode('utf-8', 'replace'))
            lost['documents'] += whole

        tokens = open_split(progress.folder, split, of_split['tokens'], progress.dtype,
                            progress.shard)
        for block in packing.best_fit(packing.split_at(tokens, eot), row, lose):
            rows.append(split, block, 0, 0)
        rows.append(split, np.zeros(0), of_split['bytes'] - lost['bytes'],
                    of_split['documents'] - lost['documents'])
        shares[split] = lost['tokens'] / of_split['tokens']
    return rows, shares
