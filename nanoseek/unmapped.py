"""Safetensors that the library cannot open: it maps all files, which the file systems of some
network drives and shared folders of virtual machines do not have, and wants names in UTF-8.
"""
import json

import numpy as np
import torch

from nanoseek.files import FileArray

DTYPES = {'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16,
          'BF16': torch.bfloat16}


class UnmappedSafetensors:
    """A file as safetensors.safe_open gives it, as far as we use it. Its format is the length of
    a JSON text (8 bytes), the text, and the numbers. ValueError where it is damaged"""

    def __init__(self, file):
        self.bytes = FileArray(file, np.uint8)
        try:
            length = int.from_bytes(self.bytes[:8].tobytes(), 'little')
            self.about = json.loads(self.bytes[8:8 + length].tobytes())
            self.about.pop('__metadata__', None)
            self.start = 8 + length
            ends = [tensor['data_offsets'][1] for tensor in self.about.values()]
            if self.start + max(ends, default=0) != len(self.bytes):
                raise ValueError(f'{len(self.bytes):,} bytes are not what its header says')
        except (ValueError, LookupError, TypeError, AttributeError) as e:
            raise ValueError(f'{file} is damaged: {e}') from e

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bytes.file.close()

    def keys(self):
        return self.about.keys()

    def get_slice(self, name):
        return UnmappedTensor(self.bytes, self.start, self.about[name])


class UnmappedTensor:
    """Rows of one are read when they are asked for."""

    def __init__(self, bytes, start, about):
        self.bytes = bytes
        self.start = start + about['data_offsets'][0]
        self.shape = about['shape']
        self.dtype = about['dtype']

    def get_shape(self):
        return self.shape

    def __getitem__(self, rows):
        if self.dtype not in DTYPES:
            raise ValueError(f'{self.bytes.path}: a tensor of {self.dtype}, must be one of '
                             f'{", ".join(DTYPES)}')
        dtype = DTYPES[self.dtype]
        first, last, _ = rows.indices(self.shape[0])
        size = dtype.itemsize
        for dim in self.shape[1:]:
            size *= dim                                                 # bytes of a row
        found = self.bytes[self.start + first * size:self.start + last * size]
        return torch.from_numpy(found).view(dtype).reshape(last - first, *self.shape[1:])
