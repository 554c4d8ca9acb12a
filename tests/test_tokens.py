"""Tests of nanoseek/tokens.py that need no prepare.py: datasets that change while they are opened,
and file systems that cannot map files. (The order of windows and mixtures: test_prepare.py.)"""
import errno
import hashlib
import json
import mmap
import os
import shutil

import numpy as np
import pytest

from nanoseek import tokens


def write_dataset(folder, first, count=600, shard_tokens=250):
    """As prepare.py has it: ids count up from first. meta.json comes last"""
    folder.mkdir(exist_ok=True)
    (folder / 'meta.json').unlink(missing_ok=True)
    (folder / 'tokenizer.json').write_text('{}')
    splits = {}
    for split in ('train', 'val'):
        ids = np.arange(first, first + count, dtype='<u2')
        for shard, start in enumerate(range(0, count, shard_tokens)):
            ids[start:start + shard_tokens].tofile(folder / tokens.file_name(split, shard))
        splits[split] = {'tokens': count, 'bytes': 2 * count, 'documents': 1}
    about = {'version': 2, 'dtype': 'uint16', 'eot_id': None, 'vocab_size': 5000,
             'shard_tokens': shard_tokens, 'source': {'name': 'numbers', 'sha256': str(first)},
             'tokenizer': {'name': 'none', 'sha256': hashlib.sha256(b'{}').hexdigest()},
             'splits': splits}
    (folder / 'meta.json').write_text(json.dumps(about))


@pytest.fixture
def dataset(tmp_path):
    write_dataset(tmp_path / 'a', 0)
    return tmp_path / 'a'


def all_ids(data):
    return {split: ids[:].tolist() for split, ids in data.splits.items()}


def test_a_dataset_that_changes_while_it_is_opened_is_refused(dataset, monkeypatch):
    """Of the same sizes, as of the same text in another order."""
    original = tokens.open_split
    calls = []

    def open_split(folder, split, *args):
        calls.append(split)
        if split == 'val' and len(calls) == 2:
            write_dataset(dataset, 1000)
        return original(folder, split, *args)
    monkeypatch.setattr(tokens, 'open_split', open_split)
    with pytest.raises(ValueError, match='is being prepared again'):
        tokens.TokenData(dataset)
    assert all_ids(tokens.TokenData(dataset))['val'] == list(range(1000, 1600))


@pytest.mark.parametrize('step', ['meta.json gone', 'one file new', 'all but meta.json'])
def test_a_dataset_that_is_being_prepared_again_is_no_dataset(dataset, tmp_path, step):
    write_dataset(tmp_path / 'new', 1000)
    (dataset / 'meta.json').unlink()
    if step != 'meta.json gone':
        shutil.copy(tmp_path / 'new/train.bin', dataset)
    if step == 'all but meta.json':
        for file in (tmp_path / 'new').glob('*.bin'):
            shutil.copy(file, dataset)
    with pytest.raises(tokens.NoDataset, match='no dataset in .*a: run'):
        tokens.TokenData(dataset)


@pytest.mark.parametrize('mapped', [True, False])
def test_a_dataset_that_is_open_stays_what_it_was(dataset, tmp_path, monkeypatch, mapped):
    """Files get their places by renaming, as prepare.py has it."""
    class Unmappable(mmap.mmap):
        def __new__(cls, *args, **kwargs):
            raise OSError(errno.ENODEV, 'No such device')
    if not mapped:
        monkeypatch.setattr(mmap, 'mmap', Unmappable)
    data = tokens.TokenData(dataset)
    before = data.batch('train', range(8), 32, 1)
    write_dataset(tmp_path / 'new', 1000)
    for file in (tmp_path / 'new').iterdir():
        file.replace(dataset / file.name)
    assert all_ids(data) == {'train': list(range(600)), 'val': list(range(600))}
    after = data.batch('train', range(8), 32, 1)
    assert np.array_equal(before, after)
    assert all_ids(tokens.TokenData(dataset))['train'] == list(range(1000, 1600))


@pytest.mark.parametrize('name', ['a b', b'a\xff', 'a\n'])
def test_a_folder_may_have_any_name(dataset, tmp_path, name):
    folder = tmp_path / os.fsdecode(name)
    shutil.copytree(dataset, folder)
    assert all_ids(tokens.open_data(str(folder)))['val'] == list(range(600))


def test_a_window_over_three_files_is_one(tmp_path):
    write_dataset(tmp_path / 'a', 0, 600, 100)
    data = tokens.TokenData(tmp_path / 'a')
    x, y = data.eval_batch('train', 0, 2, 250)
    assert np.array_equal(x, np.arange(500).reshape(2, 250))
    assert np.array_equal(y, x + 1)
