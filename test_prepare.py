"""Tests of prepare.py. Those that need SmolLM2's tokenizer, tiktoken's cache or tinyshakespeare.txt look in the folder
$NANOSEEK_ASSETS (smollm2/, tiktoken/, tinyshakespeare.txt) and are skipped without it."""
import hashlib, json, os, random, shutil, subprocess, sys, zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import prepare
from prepare import (Settings, TokenData, decode, encode, load_tokenizer, open_data, permute, save_tokenizer, schedule,
                     scramble, tokenize, whole_counts)

HERE = Path(prepare.__file__).parent
# What a careless reader or tokenizer would change: newlines, NUL, accents in two spellings, special tokens as text.
NASTY = ('\ufeffOne\r\ntwo\rthree\n\n\n  four\t\x00five <|endoftext|> caf\u00e9 cafe\u0301 \u65e5\u672c\u8a9e'
         ' \u0645\u0631 \U0001f642\U0001f468\u200d\U0001f469 <|im_start|><unk></s> \u00a0 x = 12345;   don\'t \u2028'
         ' end \n ') * 6


def asset(name):
    folder = os.environ.get('NANOSEEK_ASSETS')
    if not folder or not (Path(folder) / name).exists():
        pytest.skip(f'$NANOSEEK_ASSETS/{name} is not there')
    return str(Path(folder).resolve() / name)


@pytest.fixture(params=['char', 'bpe:300', 'gpt2', 'smollm2'])
def spec(request, monkeypatch):
    if request.param == 'gpt2':
        monkeypatch.setenv('TIKTOKEN_CACHE_DIR', asset('tiktoken'))
    return asset('smollm2') if request.param == 'smollm2' else request.param


def make(folder, text, tokenizer=''):
    """Prepare text in folder -> TokenData"""
    (folder / 'mine.txt').write_bytes(text.encode())
    return TokenData(prepare.prepare(Settings(str(folder / 'mine.txt'), tokenizer, out_dir=str(folder / 'data'))))


def run(folder, *args):
    return subprocess.run([sys.executable, HERE / 'prepare.py', *args], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, 'HF_HUB_OFFLINE': '1'})


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()}


# ----------------------------------------------------------------------------------------------------------------------
# Corpora and files


def test_shakespeare_needs_one_command_and_loses_no_character(tmp_path):
    if not prepare.KNOWN['shakespeare'][0].is_file():
        pytest.skip('data/shakespeare/input.txt is not there')
    done = run(tmp_path, 'shakespeare')
    assert done.returncode == 0 and not done.stderr and 'train.py config/shakespeare.py' in done.stdout
    data, raw = TokenData(tmp_path / 'data/shakespeare'), prepare.KNOWN['shakespeare'][0].read_bytes()
    tokenizer = load_tokenizer(data.directory)
    assert ''.join(decode(tokenizer, data.splits[split]) for split in ('train', 'val', 'test')).encode() == raw
    assert data.meta['source']['sha256'] == hashlib.sha256(raw).hexdigest() and data.eot_id is None
    n = len(raw.decode())
    assert [data.tokens(s) for s in data.splits] == [int(n * 0.9), int(n * 0.95) - int(n * 0.9), n - int(n * 0.95)]


def test_tinyshakespeare_is_nanogpts(tmp_path):
    done = run(tmp_path, 'tinyshakespeare', '--path', asset('tinyshakespeare.txt'))
    assert done.returncode == 0, done.stderr
    text = Path(asset('tinyshakespeare.txt')).read_text()
    letters = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = np.array([letters[c] for c in text], '<u2')
    folder = tmp_path / 'data/tinyshakespeare'
    assert sorted(files(folder)) == ['meta.json', 'tokenizer.json', 'train.bin', 'val.bin']
    assert (folder / 'train.bin').read_bytes() == ids[:1003854].tobytes()      # nanoGPT prints these counts
    assert (folder / 'val.bin').read_bytes() == ids[1003854:].tobytes()
    assert TokenData(folder).vocab_size == 65


def test_every_tokenizer_gives_the_same_splits_back_byte_for_byte(tmp_path, spec):
    data = make(tmp_path, NASTY, spec)
    tokenizer, n = load_tokenizer(tmp_path / 'data'), len(NASTY)
    parts = {'train': NASTY[:int(n * 0.9)], 'val': NASTY[int(n * 0.9):int(n * 0.95)], 'test': NASTY[int(n * 0.95):]}
    for split, part in parts.items():
        assert decode(tokenizer, data.splits[split]) == part
        assert encode(tokenizer, part) == data.splits[split].tolist()
        assert data.bytes_per_token(split) == len(part.encode()) / data.tokens(split)
        assert data.eot_id not in data.splits[split]        # '<|endoftext|>' in a text is not the end of it
    assert data.vocab_size > max(data.splits['train']) and data.dtype == '<u2'


def test_more_than_65536_tokens_are_uint32(tmp_path):
    text = ''.join(map(chr, range(0x20000, 0x20000 + 70000)))
    data = make(tmp_path, text)
    assert data.meta['dtype'] == 'uint32' and data.vocab_size == 70000
    assert np.concatenate(list(data.splits.values())).tolist() == list(range(70000))


def test_preparing_twice_is_byte_identical_and_leaves_nothing_else(tmp_path):
    for name in 'ab':
        (tmp_path / name).mkdir()
        (tmp_path / name / 'mine.txt').write_text(NASTY * 3, newline='')
        assert run(tmp_path / name, 'mine.txt', '--tokenizer=bpe:400').returncode == 0
    assert files(tmp_path / 'a') == files(tmp_path / 'b')
    assert ' '.join(sorted(files(tmp_path / 'a/data/mine'))) == 'meta.json test.bin tokenizer.json train.bin val.bin'


def test_a_failed_preparation_leaves_the_earlier_one_whole(tmp_path):
    make(tmp_path, NASTY)
    before = files(tmp_path / 'data')
    (tmp_path / 'data/test.bin.tmp').mkdir()                # in the way of the new test.bin
    with pytest.raises(OSError):
        make(tmp_path, NASTY + 'new', 'bpe:300')
    assert files(tmp_path / 'data') == before
    TokenData(tmp_path / 'data')


def test_a_new_preparation_takes_away_splits_it_does_not_have(tmp_path):
    make(tmp_path, NASTY)
    prepare.prepare(Settings('tinyshakespeare', path=asset('tinyshakespeare.txt'), out_dir=str(tmp_path / 'data')))
    assert not (tmp_path / 'data/test.bin').exists() and list(TokenData(tmp_path / 'data').splits) == ['train', 'val']


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


def test_gpt2_ids_are_tiktokens_for_any_character(tmp_path, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', asset('tiktoken'))
    import tiktoken
    rng = random.Random(1)
    points = [c for c in range(0x110000) if not 0xd800 <= c < 0xe000]
    text = ''.join(rng.choice(('', ' ', 'a', '1', '.', '\n', '  ')) + chr(c) for c in rng.sample(points, 20000)) + NASTY
    make(tmp_path, NASTY, 'gpt2')
    tokenizer, reference = load_tokenizer(tmp_path / 'data'), tiktoken.get_encoding('gpt2')
    assert encode(tokenizer, text) == reference.encode_ordinary(text)
    assert tokenizer.token_to_id('<|endoftext|>') == reference.eot_token == TokenData(tmp_path / 'data').eot_id


def test_smollm2_ids_are_transformers(tmp_path):
    transformers = pytest.importorskip('transformers')
    folder = asset('smollm2')
    text = NASTY.replace('<|endoftext|>', '').replace('<|im_start|>', '')     # transformers takes these for themselves
    data = make(tmp_path, text, folder)
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text[:int(len(text) * 0.9)], add_special_tokens=False)
    assert data.splits['train'].tolist() == ids['input_ids'] and data.vocab_size == 49152


def test_tokenizing_in_pieces_equals_the_whole(tmp_path, spec):
    text = Path(asset('tinyshakespeare.txt')).read_text()[:60000] + NASTY + ' ' * 999 + 'x' * 999 + '\n' * 999 + NASTY
    make(tmp_path, text, spec)
    tokenizer = load_tokenizer(tmp_path / 'data')
    assert tokenize(tokenizer, text, size=50).tolist() == encode(tokenizer, text)


def test_a_character_without_a_token_is_an_error_that_names_it(tmp_path):
    make(tmp_path, 'abc ' * 50)
    with pytest.raises(ValueError, match=r"'é' \(U\+00E9\)"):
        encode(load_tokenizer(tmp_path / 'data'), 'abé')
    with pytest.raises(ValueError, match=r"'!' \(U\+0021\)"):
        make(tmp_path, 'abc!' * 50, str(tmp_path / 'data'))          # another text's characters


def test_bpe_says_when_the_text_yields_a_smaller_vocabulary(tmp_path, capsys):
    assert make(tmp_path, 'abab' * 50, 'bpe:5000').vocab_size < 300
    assert '5,000 is not reached' in capsys.readouterr().out


def own_tokenizer(folder, **parts):
    """A byte-level tokenizer.json with other parts set"""
    from tokenizers import models, pre_tokenizers
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = prepare.byte_level(models.BPE({c: i for i, c in enumerate(letters)}, []))
    tokenizer.add_special_tokens(['<s>', '</s>'])
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.enable_truncation(7)
    tokenizer.save(str(folder / 'own.json'))
    return str(folder / 'own.json')


def test_a_tokenizer_that_changes_the_text_is_refused(tmp_path):
    from tokenizers import normalizers
    with pytest.raises(ValueError, match=r"at character 104 of train, 'Xbab' becomes 'xbab'"):
        make(tmp_path, 'ab' * 52 + 'Xb' + 'ab' * 7, own_tokenizer(tmp_path, normalizer=normalizers.Lowercase()))
    assert not (tmp_path / 'data').exists()


def test_a_tokenizers_own_bos_and_truncation_stay_out(tmp_path):
    from tokenizers import processors
    bos = processors.TemplateProcessing(single='<s> $A', pair='<s> $A $B', special_tokens=[('<s>', 256)])
    data = make(tmp_path, NASTY, own_tokenizer(tmp_path, post_processor=bos))
    train = NASTY[:int(len(NASTY) * 0.9)]
    assert data.tokens('train') == len(train.encode()) and data.eot_id == 257
    assert len(load_tokenizer(tmp_path / 'data').encode(train).ids) == len(train.encode())     # also in the saved one


def test_saved_tokenizer_is_transformers_own(tmp_path, spec):
    transformers = pytest.importorskip('transformers')
    data, tokenizer = make(tmp_path, NASTY, spec), load_tokenizer(tmp_path / 'data')
    text = NASTY.replace('<|endoftext|>', '').replace('<|im_start|>', '')
    for model_type in ('', 'llama', 'glm4_moe', 'deepseek_v3'):      # transformers looks at the model's type, too
        folder = tmp_path / f'model-{model_type}'
        folder.mkdir()
        if model_type:
            (folder / 'config.json').write_text(json.dumps({'model_type': model_type}))
        save_tokenizer(data.directory, folder, 1, data.eot_id, 123)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert theirs(text)['input_ids'] == encode(tokenizer, text)
        assert theirs.decode(theirs(text)['input_ids']) == text
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.model_max_length) == (1, data.eot_id, 123)
        assert len(theirs) == data.vocab_size
        assert encode(load_tokenizer(folder), NASTY) == encode(tokenizer, NASTY)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


@pytest.fixture
def ramp(tmp_path):
    """A dataset in which token number i of train is i, so that a token tells where it is from"""
    return make(tmp_path, ''.join(map(chr, range(0x4e00, 0x4e00 + 2000))))      # 1800, 100 and 100 tokens


@pytest.mark.parametrize('size', [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1000, 5000])
def test_permutation_is_a_bijection(size):
    for seed in range(5):
        key = scramble(np.full(size, seed, np.uint64))
        assert sorted(permute(np.arange(size).astype(np.uint64), size, key).tolist()) == list(range(size))


@pytest.mark.parametrize('size', [2, 3, 5, 10, 100, 1000])
def test_permutation_is_uniform(size):
    keys = scramble(np.arange(20000).astype(np.uint64))
    for k in (0, size // 2, size - 1):                      # where each goes under 20,000 keys: chi-square, 5 sigma
        count = np.bincount(permute(np.full(len(keys), k, np.uint64), size, keys).astype(int), minlength=size)
        chi2, dof = ((count - len(keys) / size) ** 2).sum() * size / len(keys), size - 1
        assert abs(chi2 - dof) < 5 * (2 * dof) ** 0.5
    k = np.arange(size)
    out = np.array([permute(k.astype(np.uint64), size, np.full(size, key)) for key in keys[:300]]).astype(int)
    displacement = np.abs(out - k).mean()                   # (n^2 - 1) / 3n for a random permutation
    assert displacement == pytest.approx((size ** 2 - 1) / (3 * size), rel=0.15 if size < 10 else 0.05)


def test_an_epoch_has_every_window_once_and_its_own_order_and_phase(ramp):
    T, W = 50, ramp.windows('train', 50)
    assert W == 35
    orders, phases = set(), set()
    for epoch in range(20):
        x, y = ramp.batch('train', np.arange(epoch * W, (epoch + 1) * W), T, seed=7)
        assert x.dtype == y.dtype == np.int64 and x.shape == y.shape == (W, T)
        assert (y == x + 1).all() and (x == x[:, :1] + np.arange(T)).all()
        starts = sorted(x[:, 0].tolist())
        assert starts == [min(starts[0] + k * T, 1800 - 1 - T) for k in range(W)] and starts[0] < T
        orders.add(tuple(np.argsort(x[:, 0]))), phases.add(starts[0])
    assert len(orders) == 20 and len(phases) > 10


def test_a_sequence_depends_on_seed_split_and_number_alone(ramp):
    numbers = np.array([0, 5, 34, 35, 36, 1000, 123456789, 5, 2**40])
    x, y = ramp.batch('train', numbers, 50, seed=3)
    for i in np.random.default_rng(0).permutation(len(numbers)):
        x1, y1 = TokenData(ramp.directory).batch('train', numbers[i:i + 1], 50, seed=3)
        assert (x1[0] == x[i]).all() and (y1[0] == y[i]).all()
    assert (ramp.batch('train', numbers, 50, seed=4)[0] != x).any()
    n = np.arange(16)
    assert (ramp.batch('val', n, 6, seed=3)[0] - 1800 != ramp.batch('test', n, 6, seed=3)[0] - 1900).any()


def test_the_order_of_the_data_is_that_of_earlier_versions(ramp):
    x, _ = ramp.batch('train', np.array([0, 1, 2, 35, 10**6]), 50, seed=1337)
    assert x[:, 0].tolist() == [1107, 1307, 507, 164, 1615]


def test_evaluation_windows_cover_the_split_in_order(ramp):
    W = ramp.windows('val', 7)
    assert W == 14
    x, y = ramp.eval_batch('val', 0, W, 7)
    assert x.ravel().tolist() == list(range(1800, 1898)) and (y == x + 1).all()
    assert (np.concatenate([ramp.eval_batch('val', i, 2, 7)[0] for i in range(0, W, 2)]) == x).all()
    with pytest.raises(AssertionError):
        ramp.eval_batch('val', W, 1, 7)


def test_the_shortest_split_that_works_has_one_token_more_than_a_block(ramp):
    assert ramp.windows('val', 99) == 1
    assert ramp.batch('val', [0, 9], 99, 1)[0].tolist() == [list(range(1800, 1899))] * 2
    with pytest.raises(ValueError, match="'val'.* 100 tokens, and block_size=100 needs 101"):
        ramp.windows('val', 100)
    with pytest.raises(ValueError, match="no split 'dev', only train, val, test"):
        ramp.tokens('dev')


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no dataset in .*foo: run 'python prepare.py foo'"):
        TokenData(tmp_path / 'data/foo')
    folder = make(tmp_path, NASTY).directory
    good, meta = files(folder), json.loads((folder / 'meta.json').read_text())

    def refused(message, name, content):
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            TokenData(folder)
        (folder / name).write_bytes(good[name])

    size = len(good['val.bin'])
    refused(f'val.bin has {size - 1} bytes, and {size} by', 'val.bin', good['val.bin'][:-1])
    refused('val.bin has 0 bytes', 'val.bin', b'')
    refused('tokenizer.json is not the one', 'tokenizer.json', good['tokenizer.json'] + b' ')
    refused('meta.json is not what', 'meta.json', b'{"version": 1, ')
    refused('meta.json is not what', 'meta.json', b'[]')
    refused('version 2, not 1', 'meta.json', json.dumps({**meta, 'version': 2}).encode())
    refused('float32', 'meta.json', json.dumps({**meta, 'dtype': 'float32'}).encode())
    for key in ('dtype', 'vocab_size', 'eot_id', 'tokenizer', 'splits'):
        refused(key, 'meta.json', json.dumps({k: v for k, v in meta.items() if k != key}).encode())
    (folder / 'val.bin').unlink()
    with pytest.raises(ValueError, match='val.bin has 0 bytes'):
        TokenData(folder)


# ----------------------------------------------------------------------------------------------------------------------
# Mixtures


@pytest.mark.parametrize('shares', [
    (0.7, 0.3), (1, 1), (0.001, 0.999), (0.5, 0.3, 0.2), (0.333333,) * 3, (0.333333, 0.333333, 0.333334), (2, 3, 7),
    (0.001, 0.6, 0.399), (0.25, 0.25, 0.2, 0.2, 0.1), (0.001, 0.4, 0.3, 0.2, 0.099), (1, 2, 3, 5, 8, 13, 21)])
def test_any_stretch_of_a_mixture_has_its_shares(shares):
    k, exact = len(shares), [Fraction(str(share)) for share in shares]
    counts = whole_counts({str(i): share for i, share in enumerate(shares)})
    period, (source, rank) = sum(counts), schedule(counts)
    assert len(source) == period <= 100_000 and np.bincount(source).tolist() == counts
    for i in range(k):
        error = abs(Fraction(counts[i], period) - exact[i] / sum(exact))
        assert error == 0 if period < 100_000 else error < Fraction(1, period)
        assert rank[source == i].tolist() == list(range(counts[i]))
    seen = (np.tile(source, 3)[:, None] == np.arange(k)).cumsum(0)          # of each source in the first n
    seen = np.concatenate([np.zeros((1, k), int), seen])
    lengths = range(1, 2 * period) if period < 2000 else random.Random(1).sample(range(1, 2 * period), 100)
    for n in lengths:                       # all in integers: |count - n * share| times the period
        off = abs((seen[n:] - seen[:-n]) * period - n * np.array(counts))
        assert off.max() <= period if k == 2 else off.max() < 2 * period
    off = abs(seen * period - np.arange(len(seen))[:, None] * counts)
    assert off.max() * (2 * k - 2) <= period * (2 * k - 3)


@pytest.fixture
def slopes(tmp_path):
    """Datasets of one tokenizer in which a token is followed by the next one (up), the one before it (down), or the one
    three further on (third), so that two tokens tell where they are from"""
    text = ''.join(map(chr, range(0x4e00, 0x4e00 + 2000)))
    for name, part in (('up', text), ('down', text[::-1]), ('third', text[::3])):
        (tmp_path / name).mkdir()
        make(tmp_path / name, part, '' if name == 'up' else str(tmp_path / 'up/data'))
    return {name: str(tmp_path / name / 'data') for name in ('up', 'down', 'third')}


SLOPE = {'up': 1, 'down': -1, 'third': 3}


def test_a_mixture_is_what_a_counter_for_each_source_gives(slopes):
    shares = {'up': 0.5, 'down': 0.2, 'third': 0.3}
    mixture = open_data({slopes[name]: share for name, share in shares.items()})
    x, y = mixture.batch('train', range(500), 50, seed=7)
    assert x.dtype == y.dtype == np.int64 and x.shape == y.shape == (500, 50)
    counters = dict.fromkeys(shares, 0)
    for i in range(500):
        name = next(name for name, slope in SLOPE.items() if slope == y[i, 0] - x[i, 0])
        data = TokenData(slopes[name])
        seed = 7 ^ zlib.crc32(data.fingerprint().encode()) << 32
        x1, y1 = data.batch('train', [counters[name]], 50, seed)
        assert (x[i] == x1[0]).all() and (y[i] == y1[0]).all()
        counters[name] += 1
        assert mixture.drawn(i + 1) == {slopes[n]: count for n, count in counters.items()}
        assert all(abs(counters[n] - (i + 1) * share) < 1 for n, share in shares.items())
    assert counters == {'up': 250, 'down': 100, 'third': 150}


def test_a_sequence_of_a_mixture_depends_on_seed_and_number_alone(slopes, tmp_path):
    shares = {slopes['up']: 0.6, slopes['down']: 0.4}
    numbers, mixture = np.array([0, 5, 34, 35, 36, 1000, 123456789, 5, 2**40]), open_data(shares)
    x, y = mixture.batch('train', numbers, 50, seed=3)
    for i in np.random.default_rng(0).permutation(len(numbers)):
        x1, y1 = open_data(shares).batch('train', numbers[i:i + 1], 50, seed=3)
        assert (x1[0] == x[i]).all() and (y1[0] == y[i]).all()
    assert (mixture.batch('train', numbers, 50, seed=4)[0] != x).any()
    shutil.copytree(slopes['up'], tmp_path / 'data/other')          # other names, in another order
    same = open_data({slopes['down']: 2, 'other': 3}, root=tmp_path / 'data')
    assert (same.batch('train', numbers, 50, seed=3)[0] == x).all() and same.fingerprint() == mixture.fingerprint()
    assert open_data({**shares, slopes['up']: 0.5}).fingerprint() != mixture.fingerprint()
    one = open_data({slopes['up']: 0.1})                            # is that dataset itself
    assert (one.batch('train', numbers, 50, 3)[0] == TokenData(slopes['up']).batch('train', numbers, 50, 3)[0]).all()


def test_an_epoch_of_a_source_has_every_window_once_in_an_order_of_its_own(slopes):
    mixture, T, W, orders = open_data({slopes['up']: 0.6, slopes['down']: 0.4}), 50, 35, []
    x, y = mixture.batch('train', range(400), T, seed=7)
    for slope in (1, -1):
        own = x[y[:, 0] - x[:, 0] == slope][:, 0]
        own = own if slope == 1 else 1999 - own             # where in its text
        for epoch in own[:len(own) // W * W].reshape(-1, W):
            starts = sorted(epoch.tolist())
            assert starts == [min(starts[0] + k * T, 1800 - 1 - T) for k in range(W)] and starts[0] < T
        orders.append(np.argsort(np.argsort(own[:W])))
    assert abs(np.corrcoef(orders)[0, 1]) < 0.5             # 3 sigma


def test_a_mixture_of_several_tokenizers_is_refused(slopes, tmp_path):
    other = str(make(tmp_path, NASTY).directory)
    with pytest.raises(ValueError, match='different tokenizers.*--tokenizer=') as e:
        open_data({slopes['up']: 1, other: 1})
    assert slopes['up'] in str(e.value) and f'{other} ' in str(e.value)


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize('args, wanted', [
    ((), ['nothing to prepare', 'shakespeare', '.txt']),
    (('shakespear',), ["unknown source 'shakespear'", 'shakespeare, tinyshakespeare', '.txt']),
    (('missing.txt',), ["no file 'missing.txt'"]),
    (('empty.txt',), ['empty.txt', '0 characters', '100']),
    (('short.txt',), ['short.txt', '99 characters', '100']),
    (('latin.txt',), ['latin.txt', 'not UTF-8', '0xe9', 'offset 203']),
    (('good.txt', '--path=good.txt'), ['good.txt', '--path']),
    (('shakespeare.txt',), ['shakespeare.txt', 'known corpus']),
    (('tinyshakespeare', '--path=good.txt'), ['good.txt', 'sha256', '86c4e6aa']),
    (('tinyshakespeare', '--path=missing.txt'), ["no file 'missing.txt'"]),
    (('good.txt', '--tokenizer=bpe:0'), ["'bpe:0'", '257', 'bpe:1024']),
    (('good.txt', '--tokenizer=bpe:256'), ["'bpe:256'", '257']),
    (('good.txt', '--tokenizer=bpe:x'), ["'bpe:x'", 'whole number']),
    (('good.txt', '--tokenizer=nosuch/hub-id'), ["'nosuch/hub-id'", 'no folder', 'Hub']),
    (('good.txt', '--tokenizer=no/tokenizer.json'), ["no file 'no/tokenizer.json'"]),
    (('good.txt', '--tokenizer=.'), ['tokenizer.json']),
    (('good.txt', '--tokenizer=good.txt'), ["'good.txt' is not a tokenizer"]),
    (('good.txt', '--tokeniser=char'), ["unknown setting 'tokeniser'", "'tokenizer'"]),
    (('good.txt', '--out_dir=good.txt'), ['good.txt']),
    (('good.txt', 'short.txt'), ["unexpected argument 'short.txt'"]),
])
def test_a_mistake_ends_in_one_line_and_leaves_nothing(tmp_path, args, wanted):
    texts = {'empty': b'', 'short': b'x' * 99, 'good': b'a good text. ' * 20, 'shakespeare': b'x' * 200,
             'latin': b'\xc3\xa9' * 100 + b'caf\xe9 ' + b'x' * 100}
    for name, content in texts.items():
        (tmp_path / f'{name}.txt').write_bytes(content)
    before = files(tmp_path)
    done = run(tmp_path, *args)
    assert done.returncode == 2, done
    assert done.stderr.count('\n') == 1 and done.stderr.startswith('prepare.py: ') and 'Traceback' not in done.stderr
    assert all(part in done.stderr for part in wanted), done.stderr
    assert files(tmp_path) == before and not (tmp_path / 'data').exists()


def test_help_lists_every_setting(tmp_path):
    done = run(tmp_path, '--help')
    assert done.returncode == 0 and all(f'--{name}=' in done.stdout for name in Settings.__dataclass_fields__)
