"""Tests of nanoseek/tokens.py: every window once an epoch, the same on any rank and after any
restart; mixtures against a counter for each source."""
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from nanoseek.tokens import (NoDataset, TokenData, open_data, permute, schedule, scramble,
                             whole_counts)


def write_dataset(folder, ids, name='numbers'):
    """Write a dataset of 90, 5 and 5% of ids (N,), as prepare.py does. Return its folder."""
    folder.mkdir(parents=True)
    (folder / 'tokenizer.json').write_text('{}')
    ids = np.asarray(ids, '<u2')
    splits = {}
    bounds = [len(ids) * 18 // 20, len(ids) * 19 // 20]
    for split, part in zip(('train', 'val', 'test'), np.split(ids, bounds)):
        part.tofile(folder / f'{split}.bin')
        splits[split] = {'tokens': len(part), 'bytes': 3 * len(part), 'documents': 1}
    meta = {'version': 2, 'dtype': 'uint16', 'vocab_size': 3000, 'eot_id': None, 'pack': 0,
            'tokenizer': {'name': 'none', 'sha256': hashlib.sha256(b'{}').hexdigest()},
            'splits': splits, 'source': {'name': name, 'sha256': f'{ids[:9].tolist()}'}}
    (folder / 'meta.json').write_text(json.dumps(meta))
    return folder


@pytest.fixture
def ramp(tmp_path):
    """Return a dataset in which a token tells its place: 1800, 100 and 100 tokens."""
    return TokenData(write_dataset(tmp_path / 'ramp', range(2000)))


# ------------------------------------------------------------------------ an order for windows

@pytest.mark.parametrize('size', [1, 2, 3, 4, 5, 63, 64, 65, 5000])
def test_permutation_is_a_bijection(size):
    for seed in range(5):
        key = scramble(np.full(size, seed, np.uint64))
        places = permute(np.arange(size).astype(np.uint64), size, key)
        assert sorted(places.tolist()) == list(range(size))


def test_an_epoch_has_every_window_once_and_its_own_order_and_phase(ramp):
    T = 50
    W = ramp.windows('train', T)
    assert W == 35
    orders = set()
    phases = set()
    for epoch in range(20):
        x, y = ramp.batch('train', np.arange(epoch * W, (epoch + 1) * W), T, seed=7)
        assert x.dtype == y.dtype == np.int64 and x.shape == y.shape == (W, T)
        assert (y == x + 1).all() and (x == x[:, :1] + np.arange(T)).all()
        starts = sorted(x[:, 0].tolist())
        assert starts == [min(starts[0] + k * T, 1800 - 1 - T) for k in range(W)]
        assert starts[0] < T
        orders.add(tuple(np.argsort(x[:, 0])))
        phases.add(starts[0])
    assert len(orders) == 20 and len(phases) > 10


def test_a_sequence_depends_on_seed_split_and_number_alone(ramp):
    numbers = np.array([0, 5, 34, 35, 36, 1000, 123456789, 5, 2**40])
    x, y = ramp.batch('train', numbers, 50, seed=3)
    for i in np.random.default_rng(0).permutation(len(numbers)):
        x1, y1 = TokenData(ramp.directory).batch('train', numbers[i:i + 1], 50, seed=3)
        assert (x1[0] == x[i]).all() and (y1[0] == y[i]).all()
    assert (ramp.batch('train', numbers, 50, seed=4)[0] != x).any()
    val = ramp.batch('val', np.arange(16), 6, seed=3)[0] - 1800
    assert (val != ramp.batch('test', np.arange(16), 6, seed=3)[0] - 1900).any()


def test_order_and_fingerprint_are_those_of_earlier_versions(ramp):
    x, _ = ramp.batch('train', np.array([0, 1, 2, 35, 10**6]), 50, seed=1337)
    assert x[:, 0].tolist() == [1107, 1307, 507, 164, 1615]
    assert ramp.fingerprint() == 'numbers b76c5539'


def test_evaluation_windows_cover_the_split_in_order(ramp):
    assert ramp.windows('val', 7) == 14
    x, y = ramp.eval_batch('val', 0, 14, 7)
    assert x.ravel().tolist() == list(range(1800, 1898)) and (y == x + 1).all()


# ------------------------------------------------------------------------------ wrong folders

def change_meta(folder, **changes):
    meta = json.loads((folder / 'meta.json').read_text())
    (folder / 'meta.json').write_text(json.dumps({**meta, **changes}))


@pytest.mark.parametrize('damage, line', [
    # earlier versions began a new file every 100M tokens
    (lambda folder: (folder / 'val.bin').write_bytes(b'abc'), 'val.bin has 3 bytes, .*100 tokens'),
    (lambda folder: change_meta(folder, version=1), 'another version')])
def test_files_of_other_versions_or_datasets_are_refused(ramp, damage, line):
    damage(ramp.directory)
    with pytest.raises(ValueError, match=f"{line}.*run 'python prepare.py ramp' again"):
        TokenData(ramp.directory)


def test_what_is_not_there_is_no_dataset():
    with pytest.raises(NoDataset, match="no dataset in .*foo: run 'python prepare.py foo'"):
        open_data('foo')


# ------------------------------------------------------------------------------------ mixtures

SHARES = [(0.7, 0.3), (0.001, 0.999), (0.333333,) * 3, (0.123456, 0.654321),
          (1, 2, 3, 5, 8, 13, 21)]


@pytest.mark.parametrize('shares', SHARES)
def test_any_first_sequences_of_a_mixture_have_its_shares(shares):
    k = len(shares)
    counts = whole_counts({str(i): share for i, share in enumerate(shares)})
    period = sum(counts)
    assert counts == pytest.approx(np.array(shares) / sum(shares) * period, abs=1)
    source, _ = schedule(counts)
    assert np.bincount(source).tolist() == counts
    drawn = (source[:, None] == np.arange(k)).cumsum(0)         # of each source in the first n
    off = abs(drawn * period - np.arange(1, period + 1)[:, None] * counts)      # times period
    assert off.max() * (2 * k - 2) <= period * (2 * k - 3)


SLOPES = {'up': 1, 'down': -1, 'third': 3}


@pytest.fixture
def slopes(tmp_path):
    """Return {name: folder} of datasets in which two tokens tell where they are from."""
    ids = np.arange(2000)
    parts = {'up': ids, 'down': ids[::-1], 'third': ids[::3]}
    return {name: str(write_dataset(tmp_path / name, part)) for name, part in parts.items()}


def test_a_sequence_of_a_mixture_depends_on_seed_and_number_alone(slopes, tmp_path):
    shares = {slopes['up']: 0.6, slopes['down']: 0.4}
    numbers = np.array([0, 5, 34, 35, 36, 1000, 123456789, 5, 2**40])
    mixture = open_data(shares)
    x, _ = mixture.batch('train', numbers, 50, seed=3)
    for i in np.random.default_rng(0).permutation(len(numbers)):
        x1, _ = open_data(shares).batch('train', numbers[i:i + 1], 50, seed=3)
        assert (x1[0] == x[i]).all()
    assert (mixture.batch('train', numbers, 50, seed=4)[0] != x).any()
    other = str(tmp_path / 'other')                     # other names, in another order
    shutil.copytree(slopes['up'], other)
    same = open_data({slopes['down']: 2, other: 3})
    assert (same.batch('train', numbers, 50, seed=3)[0] == x).all()
    assert same.fingerprint() == mixture.fingerprint()
    assert open_data({**shares, slopes['up']: 0.5}).fingerprint() != mixture.fingerprint()
    assert open_data({slopes['up']: 0.1}).fingerprint() == TokenData(slopes['up']).fingerprint()


def test_the_order_of_a_mixture_is_that_of_earlier_versions(slopes):
    mixture = open_data({slopes['up']: 0.5, slopes['down']: 0.2, slopes['third']: 0.3})
    x, _ = mixture.batch('train', range(10), 50, seed=1337)
    assert x[:, 0].tolist() == [991, 1530, 587, 91, 1080, 1341, 1641, 1037, 930, 1291]
    assert mixture.fingerprint() == ('3/10 numbers 12693b18 + 2/10 numbers 1438ca6d + '
                                     '5/10 numbers b76c5539')


def test_a_mixture_of_several_tokenizers_or_of_no_shares_is_refused(slopes):
    other = Path(slopes['down'])
    (other / 'tokenizer.json').write_text('{ }')
    change_meta(other, tokenizer={'sha256': hashlib.sha256(b'{ }').hexdigest()})
    with pytest.raises(ValueError, match='different tokenizers.*--tokenizer=.* --out_dir='):
        open_data({slopes['up']: 1, slopes['down']: 1})
    for share in (0, -1, 'half', True, float('inf')):
        with pytest.raises(ValueError, match='each name needs a share above 0'):
            open_data({slopes['up']: share, slopes['third']: 1})
