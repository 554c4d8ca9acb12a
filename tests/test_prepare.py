"""Tests of prepare.py. Those that need SmolLM2's tokenizer, tiktoken's cache or
tinyshakespeare.txt look in the folder $NANOSEEK_ASSETS (smollm2/, tiktoken/, tinyshakespeare.txt)
and are skipped without it."""

import csv, gzip, hashlib, json, math, os, random, re, shutil, signal, subprocess, sys, time, zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import prepare
from prepare import Settings
from nanoseek.tokens import TokenData, open_data, permute, schedule, scramble, whole_counts
from model import Config
from nanoseek import pieces, sources
from nanoseek.folders import write_companions
from nanoseek.tokenizer import byte_level, cut, decode, encode, load_tokenizer
from support import asset

HERE = Path(prepare.__file__).parent
# What a careless reader or tokenizer would change: newlines, NUL, accents in two spellings,
# special tokens as text.
NASTY = (
    'One\ufeff\r\ntwo\rthree\n\n\n  four\t\x00five <|endoftext|> caf\u00e9 cafe\u0301 \u65e5\u672c\u8a9e'
    " \u0645\u0631 \U0001f642\U0001f468\u200d\U0001f469 <|im_start|><unk></s> \u00a0 x = 12345;   don't \u2028"
    ' end \n '
) * 6


@pytest.fixture(params=['char', 'bpe:300', 'gpt2', pytest.param('smollm2', marks=pytest.mark.slow)])
def spec(request, monkeypatch):
    if request.param == 'gpt2':
        monkeypatch.setenv('TIKTOKEN_CACHE_DIR', asset('tiktoken'))
    return asset('smollm2') if request.param == 'smollm2' else request.param


def make(folder, text, tokenizer=''):
    """Prepare text in folder -> TokenData"""
    (folder / 'mine.txt').write_bytes(text.encode())
    return TokenData(
        prepare.prepare(Settings(str(folder / 'mine.txt'), tokenizer, out_dir=str(folder / 'data')))
    )


def run(folder, *args):
    return subprocess.run(
        [sys.executable, HERE / 'prepare.py', *args],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, 'HF_HUB_OFFLINE': '1'},
    )


def files(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in Path(folder).rglob('*')
        if p.is_file() and p.name != '.lock'
    }  # which a killed process leaves, and nobody holds


# ------------------------------------------------------------------------------------------------
# Corpora and files


def test_shakespeare_needs_one_command_and_loses_no_character(tmp_path):
    if not sources.TEXTS['shakespeare'][0].is_file():
        pytest.skip('data/shakespeare/input.txt is not there')
    done = run(tmp_path, 'shakespeare')
    assert (
        done.returncode == 0 and not done.stderr and 'train.py config/shakespeare.py' in done.stdout
    )
    data, raw = (
        TokenData(tmp_path / 'data/shakespeare'),
        sources.TEXTS['shakespeare'][0].read_bytes(),
    )
    tokenizer = load_tokenizer(data.directory)
    assert (
        ''.join(
            decode(tokenizer, data.splits[split]) for split in ('train', 'val', 'test')
        ).encode()
        == raw
    )
    assert data.meta['source']['sha256'] == hashlib.sha256(raw).hexdigest() and data.eot_id is None
    n = len(raw.decode())
    assert [data.tokens(s) for s in data.splits] == [
        int(n * 0.9),
        int(n * 0.95) - int(n * 0.9),
        n - int(n * 0.95),
    ]


def test_tinyshakespeare_is_nanogpts(tmp_path):
    done = run(tmp_path, 'tinyshakespeare', '--path', asset('tinyshakespeare.txt'))
    assert done.returncode == 0, done.stderr
    text = Path(asset('tinyshakespeare.txt')).read_text()
    letters = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = np.array([letters[c] for c in text], '<u2')
    folder = tmp_path / 'data/tinyshakespeare'
    assert sorted(files(folder)) == ['meta.json', 'tokenizer.json', 'train.bin', 'val.bin']
    assert (folder / 'train.bin').read_bytes() == ids[
        :1003854
    ].tobytes()  # nanoGPT prints these counts
    assert (folder / 'val.bin').read_bytes() == ids[1003854:].tobytes()
    assert TokenData(folder).vocab_size == 65


def test_every_tokenizer_gives_the_same_splits_back_byte_for_byte(tmp_path, spec):
    data = make(tmp_path, NASTY, spec)
    tokenizer, n = load_tokenizer(tmp_path / 'data'), len(NASTY)
    parts = {
        'train': NASTY[: int(n * 0.9)],
        'val': NASTY[int(n * 0.9) : int(n * 0.95)],
        'test': NASTY[int(n * 0.95) :],
    }
    for split, part in parts.items():
        assert decode(tokenizer, data.splits[split]) == part
        assert encode(tokenizer, part) == data.splits[split].tolist()
        assert data.bytes_per_token(split) == len(part.encode()) / data.tokens(split)
        assert (
            data.eot_id not in data.splits[split]
        )  # '<|endoftext|>' in a text is not the end of it
    assert data.vocab_size > max(data.splits['train']) and data.dtype == '<u2'


def test_more_than_65536_tokens_are_uint32(tmp_path):
    text = ''.join(map(chr, range(0x20000, 0x20000 + 70000)))
    data = make(tmp_path, text)
    assert data.meta['dtype'] == 'uint32' and data.vocab_size == 70000
    assert np.concatenate(list(data.splits.values())).tolist() == list(range(70000))


def test_preparing_twice_is_byte_identical_and_leaves_nothing_else(tmp_path):
    for name in 'ab':
        (tmp_path / name).mkdir()
        (tmp_path / name / 'mine.txt').write_text(NASTY * 3, encoding='utf-8', newline='')
        assert run(tmp_path / name, 'mine.txt', '--tokenizer=bpe:400').returncode == 0
    assert files(tmp_path / 'a') == files(tmp_path / 'b')
    assert (
        ' '.join(sorted(files(tmp_path / 'a/data/mine')))
        == 'meta.json test.bin tokenizer.json train.bin val.bin'
    )


def test_a_failed_preparation_leaves_the_earlier_one_whole(tmp_path):
    from tokenizers import normalizers

    make(tmp_path, NASTY)
    before = files(tmp_path / 'data')
    (tmp_path / 'data/.partial').write_text('')  # in the way of the new one
    with pytest.raises(OSError):
        make(tmp_path, NASTY + 'new', 'bpe:300')
    (tmp_path / 'data/.partial').unlink()
    with pytest.raises(ValueError, match='becomes'):
        make(tmp_path, NASTY + 'new', own_tokenizer(tmp_path, normalizer=normalizers.Lowercase()))
    assert files(tmp_path / 'data') == before
    TokenData(tmp_path / 'data')


def test_a_new_preparation_takes_away_splits_it_does_not_have(tmp_path):
    make(tmp_path, NASTY)
    prepare.prepare(
        Settings(
            'tinyshakespeare', path=asset('tinyshakespeare.txt'), out_dir=str(tmp_path / 'data')
        )
    )
    assert not (tmp_path / 'data/test.bin').exists() and list(
        TokenData(tmp_path / 'data').splits
    ) == ['train', 'val']


# ------------------------------------------------------------------------------------------------
# Documents


ODD = [
    '',
    ' ',
    'one\r\ntwo\rthree\n\nfour\n',
    'nul \x00 nul',
    '\ufeffBOM',
    '\U0001f468\u200d\U0001f469\u200d\U0001f467 family',
    'line\u2028separator\u0085next',
    '\u65e5\u672c\u8a9e\u3002\u4e2d\u6587\uff0c\u6ca1\u6709\u7a7a\u683c',
    '<|endoftext|>',
    'a<|endoftext|>b</s>',
    '"quoted", with a comma\tand \'that\'',
    '  ',
    '\n',
    'caf\u00e9 cafe\u0301',
    NASTY,
    '{"text": 1}',
]
FORMATS = ('jsonl', 'jsonl.gz', 'jsonl.zst', 'csv', 'parquet')


def write_corpus(path, documents):
    """Documents in the format that path's name ends in, by the libraries that have it"""
    rows = [{'id': i, 'text': document} for i, document in enumerate(documents)]
    lines = ''.join(json.dumps(row, ensure_ascii=row['id'] % 2 > 0) + '\n' for row in rows).encode()
    if path.name.endswith('.parquet'):
        import pyarrow, pyarrow.parquet

        pyarrow.parquet.write_table(
            pyarrow.table({'id': list(range(len(documents))), 'text': documents}),
            path,
            row_group_size=7,
        )
    elif path.name.endswith('.csv'):
        with open(path, 'w', encoding='utf-8', newline='') as f:
            csv.writer(f).writerows([('id', 'text'), *enumerate(documents)])
    elif path.name.endswith('.zst'):
        import pyarrow

        with pyarrow.CompressedOutputStream(str(path), 'zstd') as f:
            f.write(lines)
    else:
        path.write_bytes(gzip.compress(lines) if path.name.endswith('.gz') else lines)
    return path


def words(count, seed, longest=60):
    """Documents, all different"""
    rng = random.Random(seed)
    word = lambda: ''.join(rng.choices('abcde\u00e9', k=rng.randint(1, 7)))
    return [
        f'{i} ' + ' '.join(word() for _ in range(rng.randint(0, longest))) for i in range(count)
    ]


def prep(source, out, tokenizer='bpe:300', **settings):
    return prepare.prepare(
        Settings(str(source), tokenizer, out_dir=str(out), **{'workers': 1, **settings})
    )


def split_of(document, val=0.005, test=0.005):
    """By its hash as a share of 2**64: first val, then test"""
    at = int.from_bytes(hashlib.blake2b(document.encode(), digest_size=8).digest(), 'big') / 2**64
    return 'val' if at < val else 'test' if at < val + test else 'train'


def by_split(documents, *shares):
    found = {'train': [], 'val': [], 'test': []}
    for document in documents:
        found[split_of(document, *shares)].append(document)
    return {split: of for split, of in found.items() if of}


def raw_ids(folder):
    """split -> ids, read with nothing but numpy"""
    meta = json.loads((folder / 'meta.json').read_text())
    kind = {'uint16': '<u2', 'uint32': '<u4'}[meta['dtype']]
    return {
        split: np.concatenate(
            [
                np.fromfile(f, kind)
                for f in [folder / f'{split}.bin', *sorted(folder.glob(f'{split}-*.bin'))]
            ]
        )
        for split in meta['splits']
    }


def read_back(folder):
    """split -> documents, by the end-of-text token and tokenizer.json"""
    from tokenizers import Tokenizer

    tokenizer, found = Tokenizer.from_file(str(folder / 'tokenizer.json')), {}
    eot = json.loads((folder / 'meta.json').read_text())['eot_id']
    for split, ids in raw_ids(folder).items():
        *parts, rest = np.split(ids, np.flatnonzero(ids == eot) + 1)
        assert not len(rest)
        found[split] = tokenizer.decode_batch(
            [part[:-1].tolist() for part in parts], skip_special_tokens=False
        )
    return found


def bins(folder):
    return {name: data for name, data in files(folder).items() if name.endswith('.bin')}


@pytest.fixture
def small(monkeypatch):
    """Batches of a few documents, and a note behind every one"""
    monkeypatch.setattr(prepare, 'BATCH', 5000)
    monkeypatch.setattr(sources, 'WHOLE', 80_000)
    monkeypatch.setattr(prepare, 'SAVE_SECONDS', 0)


def huge(count, seed=0):
    rng = random.Random(seed)
    parts = (
        'word',
        ' ',
        ' ',
        '\n',
        '\r\n',
        '12',
        '\u65e5\u672c\u3002',
        '<|endoftext|>',
        "it's",
        '_',
        '   ',
        '\U0001f642',
    )
    return ''.join(rng.choice(parts) for _ in range(count))


@pytest.mark.slow
def test_documents_come_back_exactly_in_order_and_in_the_split_of_their_hash(tmp_path, spec, small):
    documents = (
        ODD + words(300, 1, 20) + [huge(250_000)] + ODD[::-1] + ['x' * 70_000 + ' ' * 70_000]
    )
    wanted = by_split(documents, 0.1, 0.2)
    folder = prep(
        write_corpus(tmp_path / 'mine.jsonl', documents),
        tmp_path / 'out',
        spec,
        val_frac=0.1,
        test_frac=0.2,
    )
    assert read_back(folder) == wanted and len(wanted) == 3
    meta = json.loads((folder / 'meta.json').read_text())
    for split, of in wanted.items():
        assert meta['splits'][split] == {
            'tokens': len(raw_ids(folder)[split]),
            'documents': len(of),
            'bytes': sum(len(d.encode()) for d in of),
        }
    tokenizer = load_tokenizer(folder)  # and each has the ids that the whole of it has
    ends = np.split(
        raw_ids(folder)['train'], np.flatnonzero(raw_ids(folder)['train'] == meta['eot_id']) + 1
    )
    assert all(
        ids[:-1].tolist() == encode(tokenizer, d)
        for ids, d in zip(ends, wanted['train'])
        if len(d) < 10**5
    )


@pytest.mark.slow
def test_files_of_a_folder_are_documents_also_one_that_is_read_in_pieces(tmp_path, spec, small):
    texts = dict(zip([f'{i:02}/{i}.{"md" if i % 2 else "txt"}' for i in range(len(ODD))], ODD))
    texts['05/long.txt'], texts['07/long.md'] = (
        '\ufeff' + huge(60_000, 1),
        huge(40_000, 2) + 'no end',
    )
    for name, text in texts.items():
        (tmp_path / 'mine' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'mine' / name).write_bytes(text.encode())
    assert (tmp_path / 'mine/07/long.md').stat().st_size > sources.WHOLE
    (tmp_path / 'mine/.hidden').mkdir()
    (tmp_path / 'mine/.hidden/no.txt').write_text('not this')
    (tmp_path / 'mine/no.py').write_text('nor this')
    write_corpus(tmp_path / 'mine/zz.jsonl.gz', words(20, 5))
    documents = [texts[name].removeprefix('\ufeff') for name in sorted(texts, key=Path)] + words(
        20, 5
    )
    folder = prep(tmp_path / 'mine', tmp_path / 'out', spec, val_frac=0.2)
    assert read_back(folder) == by_split(documents, 0.2, 0.2)
    meta = json.loads((folder / 'meta.json').read_text())
    assert sum(of['bytes'] for of in meta['splits'].values()) == sum(
        len(d.encode()) for d in documents
    )
    one = prep(
        write_corpus(tmp_path / 'one.jsonl', documents), tmp_path / 'one', spec, val_frac=0.2
    )
    assert bins(one) == bins(folder)  # in pieces or not


def test_all_formats_give_the_same_files(tmp_path, small):
    documents, made = ODD + words(200, 2), []
    for name in FORMATS:
        made.append(
            prep(write_corpus(tmp_path / f'mine.{name}', documents), tmp_path / name, val_frac=0.1)
        )
        assert read_back(made[-1]) == by_split(documents, 0.1, 0.1)
        assert bins(made[-1]) == bins(made[0])
        assert files(made[-1])['tokenizer.json'] == files(made[0])['tokenizer.json']
    (tmp_path / 'mine.txt').write_bytes(NASTY.encode())
    for name in ('jsonl', 'csv', 'txt'):
        data = (tmp_path / f'mine.{name}').read_bytes()
        done = subprocess.run(
            [
                sys.executable,
                HERE / 'prepare.py',
                '-',
                f'--format={name}',
                '--tokenizer=bpe:300',
                '--val_frac=0.1',
                '--workers=1',
            ],
            cwd=tmp_path,
            capture_output=True,
            input=data,
        )
        assert done.returncode == 0 and not done.stderr, done.stderr
        if name != 'txt':
            assert bins(tmp_path / 'data/stdin') == bins(made[0])
        else:  # one text
            assert bins(tmp_path / 'data/stdin') == bins(
                prep(tmp_path / 'mine.txt', tmp_path / 'txt', val_frac=0.1)
            )


@pytest.mark.parametrize('field', ['content', 'a b'])
def test_the_text_field_can_have_another_name(tmp_path, field):
    path = tmp_path / 'mine.jsonl'
    path.write_text(''.join(json.dumps({'text': 'no', field: d}) + '\n\n' for d in words(50, 3)))
    assert read_back(prep(path, tmp_path / 'a', text_field=field, val_frac=0.1)) == by_split(
        words(50, 3), 0.1, 0.1
    )


def test_a_corpus_that_grows_moves_no_document_between_splits(tmp_path):
    documents, before = words(400, 4), {}
    for n in (100, 250, 400):
        found = read_back(
            prep(
                write_corpus(tmp_path / 'mine.jsonl', documents[:n]),
                tmp_path / f'{n}',
                val_frac=0.05,
            )
        )
        for split, of in before.items():
            assert found[split][: len(of)] == of
        before = found
    assert len(before) == 3


def test_deduplicate_leaves_out_what_came_before_byte_for_byte(tmp_path, small, capsys):
    rng, documents = random.Random(0), words(300, 6)
    documents = (
        documents
        + rng.choices(documents, k=200)
        + ['', 'A', 'a', '', 'a ', 'cafe\u0301', 'caf\u00e9', 'a']
    )
    rng.shuffle(documents)
    folder = prep(
        write_corpus(tmp_path / 'mine.jsonl', documents),
        tmp_path / 'out',
        deduplicate=True,
        val_frac=0.1,
    )
    assert read_back(folder) == by_split(dict.fromkeys(documents), 0.1, 0.1)
    count = len(documents) - len(set(documents))
    assert json.loads((folder / 'meta.json').read_text())['left_out'] == {
        'bad': 0,
        'duplicates': count,
    }
    assert f'left out: {count} duplicates' in capsys.readouterr().out


def test_the_set_of_hashes_is_a_set():
    rng, seen, known = (
        random.Random(0),
        pieces.Seen(np.array([5, 7, 2**64 - 1], np.uint64)),
        {5, 7, 2**64 - 1},
    )
    for number in (rng.choice((rng.getrandbits(64), rng.randrange(20000))) for _ in range(60000)):
        assert seen.add(number) == (number not in known)
        known.add(number)


def test_tokens_ends_with_the_document_that_makes_them(tmp_path, small):
    documents = words(150, 7) + [huge(3000)] + words(50, 8)
    path = write_corpus(tmp_path / 'mine.jsonl', documents)
    tokenizer = load_tokenizer(prep(path, tmp_path / 'all', val_frac=0.1))
    total = np.cumsum([len(encode(tokenizer, d)) + 1 for d in documents])
    for tokens in (
        int(total[70]) - 1,
        int(total[70]),
        int(total[70]) + 1,
        int(total[150]) - 9,
        int(total[-1]),
        10**9,
    ):
        folder = prep(
            path, tmp_path / f'{tokens}', str(tmp_path / 'all'), tokens=tokens, val_frac=0.1
        )
        count = min(int(np.searchsorted(total, tokens)) + 1, len(documents))
        assert read_back(folder) == by_split(documents[:count], 0.1, 0.1)


def test_an_empty_val_is_an_error_with_a_share_that_works(tmp_path):
    for n in range(3, 60, 4):
        path = write_corpus(tmp_path / f'{n}.jsonl', words(n, n))
        if 'val' in by_split(words(n, n)):
            continue
        with pytest.raises(ValueError, match='val got no document: .*--val_frac') as e:
            prep(path, tmp_path / f'{n}')
        assert not (tmp_path / f'{n}').exists()
        advice = dict(re.findall(r'--(\w+)=([\d.]+)', str(e.value)))
        folder = prep(path, tmp_path / f'{n}', **{k: float(v) for k, v in advice.items()})
        assert read_back(folder)['val']
        with pytest.raises(ValueError, match='val got no document'):
            prep(path, tmp_path / 'no', val_frac=float(advice['val_frac']) - 3e-4, test_frac=0.0)


def test_a_tokenizer_without_an_end_of_text_token_is_for_a_single_stream(tmp_path):
    make(tmp_path, ''.join(words(100, 9)))  # its characters alone
    path = write_corpus(tmp_path / 'mine.jsonl', words(100, 9))
    with pytest.raises(ValueError, match=r'no end-of-text token.*--end_of_text=false'):
        prep(path, tmp_path / 'out', str(tmp_path / 'data'))
    assert not (tmp_path / 'out').exists()
    folder = prep(path, tmp_path / 'out', str(tmp_path / 'data'), end_of_text=False, val_frac=0.1)
    tokenizer = load_tokenizer(folder)
    assert {split: decode(tokenizer, ids) for split, ids in raw_ids(folder).items()} == {
        split: ''.join(of) for split, of in by_split(words(100, 9), 0.1, 0.1).items()
    }


@pytest.mark.parametrize('count, dtype', [(65535, 'uint16'), (65536, 'uint32')])
def test_65536_tokens_with_the_end_of_text_are_the_most_for_uint16(tmp_path, count, dtype):
    documents = [chr(0x20000 + i) for i in range(0, count)]
    documents = [''.join(documents[i : i + 100]) for i in range(0, count, 100)]
    folder = prep(
        write_corpus(tmp_path / 'mine.jsonl', documents), tmp_path / 'out', 'char', val_frac=0.1
    )
    meta = json.loads((folder / 'meta.json').read_text())
    assert (meta['dtype'], meta['vocab_size'], meta['eot_id']) == (dtype, count + 1, count)
    assert read_back(folder) == by_split(documents, 0.1, 0.1)


CODE = (
    '<|im_start|> <|im_end|> <repo_name> <reponame> <file_sep> <filename> <gh_stars> <issue_start> <issue_comment> '
    '<issue_closed> <jupyter_start> <jupyter_text> <jupyter_code> <jupyter_output> <empty_output>'
).split()


@pytest.mark.slow
@pytest.mark.parametrize('special', [False, True])
def test_gpt2_with_code_tokens_has_them_from_50257_on(tmp_path, monkeypatch, special, small):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', asset('tiktoken'))
    import tiktoken

    gpt2 = tiktoken.get_encoding('gpt2')
    documents = [
        f'{a} x={b}<|im_{c}' for a, b, c in zip(CODE, CODE[1:] + CODE[:1], 'se' * 8)
    ] + words(40, 1)
    path = tmp_path / 'mine'
    path.mkdir()
    documents.append(
        ''.join(f'word{" ," * (i % 3)}<jupyter_output>' for i in range(20_000))
    )  # read in pieces
    (path / 'a.txt').write_text(documents[-1])
    write_corpus(path / 'b.jsonl', documents[:-1])
    documents = documents[-1:] + documents[:-1]
    folder = prep(path, tmp_path / 'out', 'gpt2+code', special_in_text=special, val_frac=0.2)
    tokenizer, meta = load_tokenizer(folder), json.loads((folder / 'meta.json').read_text())
    assert [tokenizer.token_to_id(t) for t in CODE] == list(range(50257, 50272))
    assert (meta['vocab_size'], meta['eot_id'], meta['dtype']) == (50272, 50256, 'uint16')
    assert read_back(folder) == by_split(documents, 0.2, 0.2)
    ids = {t: i for i, t in enumerate(CODE, 50257)}
    for split, of in by_split(documents, 0.2, 0.2).items():
        wanted = []
        for document in of:
            for part in (
                re.split(f'({"|".join(map(re.escape, CODE))})', document) if special else [document]
            ):
                wanted += [ids[part]] if special and part in ids else gpt2.encode_ordinary(part)
            wanted.append(50256)
        assert raw_ids(folder)[split].tolist() == wanted


# ------------------------------------------------------------------------------------------------
# Shards, workers


def test_any_number_of_workers_makes_the_same_files(tmp_path, small):
    path = tmp_path / 'mine'
    path.mkdir()
    (path / 'a.txt').write_bytes(huge(40_000).encode())
    write_corpus(path / 'b.jsonl.gz', ODD + words(300, 1))
    one, two = (
        files(
            prep(path, tmp_path / f'{n}', workers=n, val_frac=0.1, deduplicate=True, tokens=60000)
        )
        for n in (1, 2)
    )
    assert one == two


def test_shards_are_the_stream_cut_every_so_many_tokens(tmp_path, small):
    path = write_corpus(tmp_path / 'mine.jsonl', ODD + words(200, 1))
    whole = TokenData(prep(path, tmp_path / 'whole', val_frac=0.1))
    ids = raw_ids(whole.directory)
    for size in (1000, 997, len(ids['train']), len(ids['train']) - 1, len(ids['val'])):
        folder = prep(path, tmp_path / f'{size}', val_frac=0.1, shard_tokens=size)
        sizes = {name: len(data) // 2 for name, data in bins(folder).items()}
        for split in ids:
            names = [
                f'{split}-{i:05}.bin' if i else f'{split}.bin'
                for i in range(math.ceil(len(ids[split]) / size))
            ]
            assert [sizes.pop(name) for name in names] == [size] * (len(names) - 1) + [
                (len(ids[split]) - 1) % size + 1
            ]
            assert raw_ids(folder)[split].tolist() == ids[split].tolist()
        assert not sizes
        data = TokenData(folder)
        data.check(checksums=True)
        for T in (7, 300):
            numbers = np.arange(3 * whole.windows('train', T))
            for a, b in (
                (whole.batch('train', numbers, T, 5), data.batch('train', numbers, T, 5)),
                (
                    whole.eval_batch('val', 0, whole.windows('val', T), T),
                    data.eval_batch('val', 0, data.windows('val', T), T),
                ),
            ):
                assert (
                    (a[0] == b[0]).all()
                    and (a[1] == b[1]).all()
                    and (a[0][:, 1:] == a[1][:, :-1]).all()
                )
        for a, b in (
            (0, 1),
            (size - 1, size + 1),
            (0, len(ids['train'])),
            (size, size + 1),
            (5, 5),
        ):
            assert data.splits['train'][a:b].tolist() == ids['train'][a:b].tolist()


# ------------------------------------------------------------------------------------------------
# Interruptions


DRIVER = """
import os, signal, sys, time, prepare
prepare.SAVE_SECONDS, prepare.BATCH, settings, die_at = 0, *eval(sys.argv[1])
replace, count = os.replace, 0
def deadly(a, b):
    global count
    if b.name == 'meta.json' or b.parent.name == 'out':     # when all is made, and only moves
        if count == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
    replace(a, b)
    time.sleep(0.01)                                        # as if the disk were slow: more to interrupt
    if die_at == 'note' and b.name == 'progress.json':
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = deadly
with prepare.config.user_errors():
    try:
        prepare.prepare(prepare.Settings(**settings))
    except KeyboardInterrupt:
        sys.exit(130)
"""


def start(settings, die_at=-1, batch=3000):
    return subprocess.Popen(
        [sys.executable, '-c', DRIVER, repr((batch, settings, die_at))],
        cwd=HERE,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, 'NANOSEEK_TEST': settings['out_dir']},
    )


def go(settings, **kwargs):
    process = start(settings, **kwargs)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def orphans(settings):
    """Processes of this preparation that are there still, after at most 10 seconds"""
    mark, deadline = f'NANOSEEK_TEST={settings["out_dir"]}\0'.encode(), time.time() + 10
    while True:
        found = []
        for file in Path('/proc').glob('[0-9]*/environ'):
            try:
                found += [file.parent.name] * (mark in file.read_bytes())
            except OSError:
                pass
        if not found or time.time() > deadline:
            return found
        time.sleep(0.05)


def mixed(folder):
    """A text that is read in pieces, and documents that come again, in many formats"""
    path = folder / 'mine'
    path.mkdir()
    (path / 'a.txt').write_bytes(huge(30_000).encode())
    (path / 'b.md').write_bytes(huge(30_000).encode())
    (path / 'c.txt').write_text('short')
    for i, name in enumerate(FORMATS):
        write_corpus(path / f'd{i}.{name}', ODD + words(150, i % 3))
    return path


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    """name -> settings, the files that they make"""
    folder, found = tmp_path_factory.mktemp('undisturbed'), {}
    settings = {'tokenizer': 'bpe:300', 'workers': 2, 'val_frac': 0.1}
    (folder / 'mine.txt').write_bytes(huge(150_000).encode())
    found['text'] = {**settings, 'source': str(folder / 'mine.txt')}
    found['stream'] = {
        **settings,
        'source': str(mixed(folder)),
        'deduplicate': True,
        'shard_tokens': 20_000,
    }
    found['pack'] = {**found['stream'], 'pack': 64}
    return {
        name: (
            of,
            files(prepare.prepare(Settings(**{**of, 'workers': 1, 'out_dir': str(folder / name)}))),
        )
        for name, of in found.items()
    }


def wait_for(process, condition):
    while process.poll() is None and not condition():
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize(
    'name, times',
    [
        ('stream', 3),
        *(
            pytest.param(*of, marks=pytest.mark.slow)
            for of in (('stream', 20), ('pack', 5), ('text', 5))
        ),
    ],
)
def test_killed_at_any_time_it_makes_the_same_files_in_the_end(undisturbed, tmp_path, name, times):
    rng, out, kills = random.Random(0), tmp_path / 'out', 0
    settings, wanted = {**undisturbed[name][0], 'out_dir': str(out)}, undisturbed[name][1]
    for _ in range(times):
        process, note = start(settings, batch=300), out / '.partial/progress.json'
        before = note.read_bytes() if note.exists() else b''
        wait_for(process, lambda: note.exists() and note.read_bytes() != before)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if not note.exists():
            break
    assert kills > times // 2, kills
    code, told, err = go(settings)
    assert code == 0 and not err
    assert files(out) == wanted and not orphans(settings)


def test_killed_behind_every_note_of_its_progress_it_makes_the_same_files_in_the_end(tmp_path):
    documents = words(100, 1)
    settings = {
        'source': str(write_corpus(tmp_path / 'mine.jsonl', documents)),
        'tokenizer': 'bpe:300',
        'workers': 1,
        'val_frac': 0.1,
        'out_dir': str(tmp_path / 'out'),
    }
    for _ in range(4):  # the last ones when there is nothing left to read
        assert go(settings, die_at='note', batch=5000)[0] == -signal.SIGKILL
    assert go(settings, batch=5000)[0] == 0
    assert read_back(tmp_path / 'out') == by_split(documents, 0.1, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['stream', 'pack'])
def test_killed_while_its_files_move_it_makes_the_same_files_in_the_end(
    undisturbed, tmp_path, name
):
    settings, wanted = (
        {**undisturbed[name][0], 'out_dir': str(tmp_path / 'out'), 'workers': 1},
        undisturbed[name][1],
    )
    for others in (False, True):  # to an empty place, and to that of an earlier dataset
        kills = 0
        while (done := go(settings, die_at=kills % 4, batch=50_000))[0] == -signal.SIGKILL:
            kills += 1
            assert kills < 40
            if (tmp_path / 'out/meta.json').exists():  # then all the rest is there
                TokenData(tmp_path / 'out').check(checksums=True)
        assert done[0] == 0 and kills > 3, done
        assert files(tmp_path / 'out') == wanted
        if not others:
            assert (
                go({**settings, 'tokenizer': 'bpe:270', 'resume': 'never', 'shard_tokens': 9999})[0]
                == 0
            )
            assert files(tmp_path / 'out') != wanted


@pytest.mark.slow
@pytest.mark.parametrize(
    'name, number',
    [
        ('stream', signal.SIGINT),
        *(
            pytest.param(*of, marks=pytest.mark.slow)
            for of in (('pack', signal.SIGTERM), ('text', signal.SIGINT))
        ),
    ],
)
def test_ctrl_c_ends_it_in_one_line_and_the_same_command_goes_on(
    undisturbed, tmp_path, name, number
):
    out, stopped = tmp_path / 'out', 0
    settings, wanted = {**undisturbed[name][0], 'out_dir': str(out)}, undisturbed[name][1]
    for delay in (0, 0.1, 0.2):  # also while the workers start
        process, note = start(settings, batch=300), out / '.partial/progress.json'
        before = note.read_bytes() if note.exists() else b''
        wait_for(process, lambda: note.exists() and note.read_bytes() != before)
        time.sleep(delay)
        if process.poll() is None:
            os.killpg(process.pid, number)  # what the terminal does, and a cluster
        told, err = process.communicate(timeout=60)
        if (out / 'meta.json').exists():  # complete, and clearing up; -2: Python was on its way out
            assert process.returncode in (0, 130, -number)
            break
        assert (process.returncode, err) == (
            130,
            f'the same command goes on from what is in {out}/.partial\n',
        )
        stopped += 1
        if stopped > 1:
            assert 'going on behind token' in told
    assert stopped and not orphans(settings)
    code, told, err = go(settings)
    assert code == 0 and not err and files(out) == wanted


def test_the_same_command_on_a_complete_dataset_does_nothing_until_something_changes(
    tmp_path, capsys
):
    path = tmp_path / 'mine'
    path.mkdir()
    for i in range(3):
        write_corpus(path / f'{i}.jsonl', words(30, i))
        os.utime(path / f'{i}.jsonl', (10**9, 10**9))
    folder = prep(path, tmp_path / 'out', val_frac=0.2)
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.iterdir()}

    def done(**settings):
        capsys.readouterr()
        prep(path, folder, **{'val_frac': 0.2, **settings})
        return 'is complete' not in capsys.readouterr().out

    assert not done() and not done(workers=2)
    assert {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.iterdir()} == before
    assert done(resume='never') and done(val_frac=0.3) and done()
    (path / '2.jsonl').touch()
    assert done() and not done()
    (path / '2.jsonl').unlink()
    assert done() and not done()
    assert read_back(folder) == by_split(words(30, 0) + words(30, 1), 0.2, 0.2)
    write_corpus(path / '3.jsonl', words(30, 3))  # one with an old date
    os.utime(path / '3.jsonl', (10**9, 10**9))
    assert done() and not done()
    assert done(deduplicate=True) and done(tokenizer='bpe:299') and done(pack=8)
    assert not done(tokenizer='bpe:300', pack=8)
    (folder / 'val.bin').write_bytes(b'')
    assert done(pack=8)


def test_a_process_can_prepare_again_and_has_its_signals_back(tmp_path, small):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    for i, name in enumerate('aba'):  # the same place, another vocabulary
        documents = [f'{d}{name}' for d in words(100, i)]
        folder = prep(
            write_corpus(tmp_path / 'mine.jsonl', documents),
            tmp_path / 'out',
            val_frac=0.1,
            resume='never',
        )
        assert read_back(folder) == by_split(documents, 0.1, 0.1)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_other_settings_or_another_text_are_refused_until_what_was_interrupted_is_dropped(tmp_path):
    path = write_corpus(tmp_path / 'mine.jsonl', words(300, 1))
    settings = {
        'source': str(path),
        'tokenizer': 'bpe:300',
        'workers': 1,
        'val_frac': 0.1,
        'out_dir': str(tmp_path / 'out'),
    }
    process = start(settings)
    wait_for(process, (tmp_path / 'out/.partial/progress.json').exists)
    process.kill()
    assert process.communicate() and process.returncode == -signal.SIGKILL
    before = files(tmp_path / 'out')
    code, told, err = go({**settings, 'val_frac': 0.2})
    assert (
        code == 2
        and err.count('\n') == 1
        and 'val_frac=0.1, now 0.2' in err
        and '--resume=never' in err
    )
    write_corpus(path, words(299, 2))
    code, told, err = go(settings)
    assert (
        code == 2
        and err.count('\n') == 1
        and 'of another text' in err
        and files(tmp_path / 'out') == before
    )
    code, told, err = go({**settings, 'resume': 'never'})
    assert (
        code == 0
        and 'going on' not in told
        and read_back(tmp_path / 'out') == by_split(words(299, 2), 0.1, 0.1)
    )


def test_a_bad_document_after_hours_costs_nothing(tmp_path):
    path = write_corpus(tmp_path / 'mine.jsonl', words(300, 1))
    own = str(
        prep(path, tmp_path / 'own', val_frac=0.1)
    )  # a tokenizer that needs not read the text first
    good = path.read_text(encoding='utf-8')
    path.write_text(f'{good}no JSON\n{good}', encoding='utf-8')
    settings = {
        'source': str(path),
        'tokenizer': own,
        'workers': 1,
        'val_frac': 0.1,
        'out_dir': str(tmp_path / 'out'),
    }
    code, told, err = go(settings)
    assert code == 2 and err.count('\n') == 1 and 'line 301' in err
    assert '--bad_documents=skip; with that it goes on' in err
    code, told, err = go({**settings, 'bad_documents': 'skip'})
    tokens = int(re.search('going on behind token ([0-9,]+)', told)[1].replace(',', ''))
    assert (
        code == 0
        and tokens > 10_000
        and read_back(tmp_path / 'out') == by_split(words(300, 1) * 2, 0.1, 0.1)
    )
    assert go({**settings, 'bad_documents': 'skip', 'out_dir': str(tmp_path / 'fresh')})[0] == 0
    assert files(tmp_path / 'fresh') == files(tmp_path / 'out')


@pytest.mark.slow
@pytest.mark.parametrize('room', [pytest.param(20, marks=pytest.mark.slow), 200])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path, disk, room):
    """room: kilobytes; tokenizer.json has 15, the tokens 300"""
    path = write_corpus(tmp_path / 'mine.jsonl', words(2500, 1))
    settings = {
        'source': str(path),
        'tokenizer': 'bpe:300',
        'workers': 1,
        'val_frac': 0.1,
        'out_dir': str(tmp_path / 'whole'),
    }
    assert go(settings, batch=50_000)[0] == 0
    settings['out_dir'] = str(disk(f'{room}k') / 'out')
    code, told, err = go(settings, batch=50_000)
    assert (
        code == 2 and err.count('\n') == 1 and 'No space left' in err and 'Traceback' not in err
    ), err
    assert ('same command goes on' in err) == (
        tmp_path / 'disk/out/.partial/progress.json'
    ).exists()
    disk('2m')
    code, told, err = go(settings, batch=50_000)
    assert code == 0 and not err and files(tmp_path / 'disk/out') == files(tmp_path / 'whole')
    assert ('going on' in told) == (room > 20)


# ------------------------------------------------------------------------------------------------
# Bad documents


GOOD = words(60, 1)
BAD = {  # a line of JSON -> what replace makes of it
    'byte': (b'{"text": "caf\xe9 \xff\xfe b\xc3"}', 'caf\ufffd \ufffd\ufffd b\ufffd', 'not UTF-8'),
    'half': (b'{"text": "half \\ud83d x\\ude00"}', 'half \ufffd x\ufffd', 'not UTF-8'),
    'json': (b'{"text": "bro', None, 'not JSON'),
    'field': (b'{"id": 1, "txt": ""}', None, "no field 'text'.*id, txt"),
    'null': (b'{"text": null}', None, 'NoneType'),
    'number': (b'{"text": 12}', None, 'int'),
    'list': (b'["text"]', None, 'list'),
    'deep': (b'[' * 100_000, None, 'not JSON'),
}


@pytest.mark.parametrize('kind', BAD)
def test_a_bad_document_stops_is_skipped_or_replaced(tmp_path, kind):
    line, replaced, message = BAD[kind]
    lines = [json.dumps({'text': d}).encode() for d in GOOD]
    (tmp_path / 'mine.jsonl').write_bytes(b'\n'.join([*lines[:40], line, b'', *lines[40:], line]))
    with pytest.raises(
        ValueError, match=rf'mine\.jsonl, line 41: .*{message}.*--bad_documents=skip'
    ):
        prep(tmp_path / 'mine.jsonl', tmp_path / 'out', val_frac=0.2)
    assert not (tmp_path / 'out').exists()
    for choice in ('skip', 'replace'):
        folder = prep(tmp_path / 'mine.jsonl', tmp_path / 'out', val_frac=0.2, bad_documents=choice)
        more = [replaced] if replaced and choice == 'replace' else []
        assert read_back(folder) == by_split(GOOD[:40] + more + GOOD[40:] + more, 0.2, 0.2)
        assert json.loads((folder / 'meta.json').read_text())['left_out'] == {
            'bad': 0 if more else 2,
            'duplicates': 0,
        }


@pytest.mark.parametrize('name', ['a.csv', 'a.parquet', 'mine/040.txt', 'mine/long.txt'])
def test_bytes_that_are_not_utf8_stop_are_skipped_or_replaced(tmp_path, name, small):
    import pyarrow, pyarrow.parquet

    good = [document.encode() for document in GOOD]
    data = [*good[:40], b'caf\xe9 \xff"', *good[40:]]
    source = tmp_path / name
    if name == 'a.parquet':
        texts = pyarrow.array([*data, None], pyarrow.binary()).view(pyarrow.string())
        pyarrow.parquet.write_table(pyarrow.table({'text': texts}), source)
    elif name == 'a.csv':
        source.write_bytes(
            b'id,text\n' + b''.join(b'1,"%s"\n' % d.replace(b'"', b'""') for d in data)
        )
    else:
        if 'long' in name:
            data[40] = (huge(40_000).encode() + b'caf\xe9 b') * 2
            data.append(data.pop(40))
        source.parent.mkdir()
        for i, d in enumerate(data):
            (source.parent / ('long.txt' if len(d) > 80_000 else f'{i:03}.txt')).write_bytes(d)
        source = source.parent
    message = (
        'byte 0xe9 at offset'
        if 'long' in name
        else r"(, (line|row) \d+)?: not UTF-8 text: '\\udce9' after 'caf'"
    )
    with pytest.raises(ValueError, match=f'{name}.*{message}.*--bad_documents'):
        prep(source, tmp_path / 'out', val_frac=0.2)
    for choice in ('skip', 'replace'):
        folder = prep(source, tmp_path / 'out', val_frac=0.2, bad_documents=choice)
        texts = [d.decode(errors='surrogateescape') for d in data]
        if choice == 'skip':
            texts = [t for t in texts if not re.search('[\udc80-\udcff]', t)]
        wanted = by_split([re.sub('[\udc80-\udcff]', '\ufffd', t) for t in texts], 0.2, 0.2)
        if 'long' in name and choice == 'replace':  # its split is by its own bytes
            at = int.from_bytes(hashlib.blake2b(data[-1], digest_size=8).digest(), 'big') / 2**64
            of = 'val' if at < 0.2 else 'test' if at < 0.4 else 'train'
            text = next(of.pop() for of in wanted.values() if len(of[-1]) > 80_000)
            wanted[of].append(text)
        assert read_back(folder) == wanted
        bad = json.loads((folder / 'meta.json').read_text())['left_out']['bad']
        assert bad == (choice == 'skip') + (name == 'a.parquet')


@pytest.mark.parametrize('name', ['mine.jsonl.gz', 'mine.jsonl.zst', 'mine.parquet'])
def test_a_file_that_ends_too_early_is_one_line(tmp_path, name):
    path = write_corpus(tmp_path / name, words(3000, 1))
    path.write_bytes(path.read_bytes()[:-3000])
    before = files(tmp_path)
    done = run(tmp_path, name, '--tokenizer=bpe:300')
    assert done.returncode == 2 and done.stderr.count('\n') == 1, done.stderr
    assert f'{name} cannot be read' in done.stderr
    assert files(tmp_path) == before and not (tmp_path / 'data').exists()


def test_a_bad_document_behind_the_wanted_tokens_does_not_matter(tmp_path, small):
    lines = [json.dumps({'text': d}) for d in words(1000, 1)]
    (tmp_path / 'mine.jsonl').write_text('\n'.join([*lines[:400], 'bad', *lines[400:]]))
    texts = [
        prep(write_corpus(tmp_path / 'good.jsonl', words(400, 1)), tmp_path / 'good', val_frac=0.1)
    ]
    for workers in (1, 3):
        texts.append(
            prep(
                tmp_path / 'mine.jsonl',
                tmp_path / f'{workers}',
                str(texts[0]),
                tokens=20_000,
                val_frac=0.1,
                workers=workers,
            )
        )
    assert bins(texts[1]) == bins(texts[2])


# ------------------------------------------------------------------------------------------------
# Packing


@pytest.mark.parametrize('row', [16, 64, 300])
def test_packed_rows_begin_with_a_document_and_cut_none_that_fits(tmp_path, row, small):
    documents = [
        chr(0x4E00 + i) + d for i, d in enumerate(words(400, 3) + ['\u65e5\u672c\u8a9e ' * 300, ''])
    ]
    path = write_corpus(
        tmp_path / 'mine.jsonl', documents
    )  # a document's first character tells which it is
    data = TokenData(
        prep(
            path, tmp_path / 'out', 'char', pack=row, val_frac=0.3, test_frac=0.1, shard_tokens=1000
        )
    )
    tokenizer, eot, meta = load_tokenizer(data.directory), data.eot_id, data.meta
    for split, of in by_split(documents, 0.3, 0.1).items():
        left = {tuple(encode(tokenizer, d) + [eot]): d for d in of}  # those that are in no row yet
        rows, used, count = raw_ids(data.directory)[split].reshape(-1, row + 1), 0, 0
        for ids in rows.tolist():
            room = row + 1
            while room:
                part = ids[row + 1 - room :]
                part = tuple(part[: part.index(eot) + 1] if eot in part else part)
                whole = part if part in left else next(d for d in left if d[0] == part[0])
                if len(whole) > room:  # cut, for nothing that was left would fit
                    assert part == whole[:room] and min(map(len, left)) > room
                else:  # the longest that does
                    assert len(whole) == max(len(d) for d in left if len(d) <= room)
                used, count, room = used + len(part), count + 1, room - len(part)
                del left[whole]
        assert (
            meta['splits'][split]['documents'] == count and meta['splits'][split]['tokens'] == used
        )
        assert sum(map(len, left)) <= row  # the last ones, that fill no row
        size = sum(
            len(decode(tokenizer, [i for i in ids if i != eot]).encode()) for ids in rows.tolist()
        )
        assert meta['splits'][split]['bytes'] == size


def test_packed_rows_are_read_whole_and_in_any_order_once(tmp_path):
    path = write_corpus(tmp_path / 'mine.jsonl', words(300, 3))
    data = TokenData(prep(path, tmp_path / 'out', pack=32, val_frac=0.3, shard_tokens=100))
    rows = {split: ids.reshape(-1, 33).tolist() for split, ids in raw_ids(data.directory).items()}
    W = data.windows('train', 32)
    assert W == len(rows['train'])
    text = (data.directory / 'tokenizer.json').read_text(encoding='utf-8')
    vocab = json.loads(text)['model']['vocab']
    letters = {i: token for token, i in vocab.items()}  # one for each byte
    for split, of in rows.items():  # a cut within a character is not exact
        size = sum(len(letters[i]) for ids in of for i in ids if i != data.eot_id)
        assert abs(data.meta['splits'][split]['bytes'] - size) <= 3 * len(of)
    orders = set()
    for epoch in range(3):
        x, y = data.batch('train', np.arange(epoch * W, (epoch + 1) * W), 32, 1)
        both = np.concatenate([x, y[:, -1:]], 1).tolist()
        assert sorted(both) == sorted(rows['train']) and (x[:, 1:] == y[:, :-1]).all()
        orders.add(str(both))
    assert len(orders) == 3
    x, y = data.eval_batch('val', 0, len(rows['val']), 32)
    assert np.concatenate([x, y[:, -1:]], 1).tolist() == rows['val']
    for size in (31, 33, 16):
        with pytest.raises(ValueError, match=f'rows of 32 tokens: block_size={size}'):
            data.windows('val', size)
    with pytest.raises(ValueError, match='no row of 100000 tokens.*smaller --pack'):
        prep(path, tmp_path / 'no', pack=100_000, val_frac=0.3)
    with pytest.raises(ValueError, match='pack=8'):
        Settings('x', pack=8, end_of_text=False)


# ------------------------------------------------------------------------------------------------
# Looking at it


@pytest.mark.parametrize('row', [0, 40])
def test_inspect_prints_what_is_there(tmp_path, row, capsys):
    documents = ODD + words(300, 4) + ['x' * 999]
    path = write_corpus(tmp_path / 'mine.jsonl', documents)
    folder = prep(path, tmp_path / 'out', val_frac=0.2, test_frac=0.1, pack=row)
    capsys.readouterr()
    print(*prepare.inspect(folder), sep='\n')
    told, ids, tokenizer = capsys.readouterr().out, raw_ids(folder), load_tokenizer(folder)
    eot, meta = (
        tokenizer.token_to_id('<|endoftext|>'),
        json.loads((folder / 'meta.json').read_text()),
    )
    for split, of in by_split(documents, 0.2, 0.1).items():
        lengths, n = [], 0
        for i, token in enumerate(ids[split].tolist()):
            n += 1
            if token == eot or row and (i + 1) % (row + 1) == 0:
                lengths, n = lengths + [n], 0
        assert row or sorted(lengths) == sorted(len(encode(tokenizer, d)) + 1 for d in of)
        size = meta['splits'][split]['bytes']
        assert (
            f'\n{split}: {len(ids[split]):,} tokens, {size:,} bytes of text, '
            f'{size / len(ids[split]):.3f} bytes per token\n'
        ) in told
        assert (
            f'\n{len(lengths):,} documents of {min(lengths):,} to {max(lengths):,} tokens, end of text included; '
            f'median {np.median(lengths):,.0f}, mean {np.mean(lengths):,.1f}\n'
        ) in told
        bars = re.findall(r' to [\d,]+ +([\d,]+) #', told.split(f'\n{split}: ')[1].split('\n\n')[0])
        assert sum(int(n.replace(',', '')) for n in bars) == len(lengths)
    counts = np.bincount(np.concatenate(list(ids.values())))
    first = told.split('the most frequent:\n')[1].split('\n')[0].split()
    assert (
        counts[int(first[1])] == counts.max() and first[0] == f'{counts.max() / counts.sum():.2%}'
    )
    assert f'{(counts > 0).sum()} of 300 tokens occur' in told and 'checksums' in told


def test_inspect_finds_a_changed_byte_in_any_shard(tmp_path):
    path = write_corpus(tmp_path / 'mine.jsonl', words(300, 4))
    folder = prep(path, tmp_path / 'out', val_frac=0.2, shard_tokens=3000)
    done = run(tmp_path, '--inspect=out')
    assert done.returncode == 0 and 'checked and right: ' in done.stdout and not done.stderr
    for name in ('val.bin', 'train-00001.bin'):
        data = bytearray((folder / name).read_bytes())
        data[500] ^= 1
        (folder / name).write_bytes(data)
        done = run(tmp_path, '--inspect=out')
        assert (
            done.returncode == 2
            and done.stderr.count('\n') == 1
            and f'{name} is damaged' in done.stderr
        )
        data[500] ^= 1
        (folder / name).write_bytes(data)
    assert run(tmp_path, '--inspect=nothing').returncode == 2


def test_datasets_of_version_1_are_read_and_have_their_old_fingerprint(tmp_path):
    tokenizer = b'{}'
    meta = {
        'version': 1,
        'dtype': 'uint16',
        'vocab_size': 300,
        'eot_id': None,
        'tokenizer': {'name': 'char', 'sha256': hashlib.sha256(tokenizer).hexdigest()},
        'splits': {
            'train': {'tokens': 200, 'bytes': 210},
            'val': {'tokens': 20, 'bytes': 20},
            'test': {'tokens': 0, 'bytes': 0},
        },
        'source': {'name': 'old', 'path': 'old.txt', 'sha256': '12ab', 'license': 'unknown'},
    }
    (tmp_path / 'tokenizer.json').write_bytes(tokenizer)
    (tmp_path / 'meta.json').write_text(json.dumps(meta))
    for split, n in (('train', 200), ('val', 20), ('test', 0)):
        (tmp_path / f'{split}.bin').write_bytes(np.arange(n, dtype='<u2').tobytes())
    data = TokenData(tmp_path)
    data.check(checksums=True)
    assert list(data.splits) == ['train', 'val'] and data.bytes_per_token('train') == 1.05
    x, y = data.eval_batch('train', 0, 3, 50)
    assert x.ravel().tolist() == list(range(150)) and (y == x + 1).all()
    assert data.fingerprint() == 'old 86650615'


def test_a_fingerprint_tells_texts_tokenizers_and_splits_apart(tmp_path):
    path, same = write_corpus(tmp_path / 'mine.jsonl', words(100, 1)), []
    for i, settings in enumerate(
        ({}, {'tokenizer': 'bpe:299'}, {'val_frac': 0.3}, {'deduplicate': True}, {'pack': 8})
    ):
        same.append(
            TokenData(prep(path, tmp_path / f'{i}', **{'val_frac': 0.2, **settings})).fingerprint()
        )
    write_corpus(path, words(99, 1) + ['something else'])
    same.append(TokenData(prep(path, tmp_path / 'other', val_frac=0.2)).fingerprint())
    assert (
        same[0] == same[3]
        and len(set(same)) == 5
        and all(name.startswith('mine ') for name in same)
    )


# ------------------------------------------------------------------------------------------------
# Tokenizers


def test_gpt2_ids_are_tiktokens_for_any_character(tmp_path, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', asset('tiktoken'))
    import tiktoken

    rng = random.Random(1)
    points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    text = (
        ''.join(
            rng.choice(('', ' ', 'a', '1', '.', '\n', '  ')) + chr(c)
            for c in rng.sample(points, 20000)
        )
        + NASTY
    )
    make(tmp_path, NASTY, 'gpt2')
    tokenizer, reference = load_tokenizer(tmp_path / 'data'), tiktoken.get_encoding('gpt2')
    assert encode(tokenizer, text) == reference.encode_ordinary(text)
    assert (
        tokenizer.token_to_id('<|endoftext|>')
        == reference.eot_token
        == TokenData(tmp_path / 'data').eot_id
    )


def test_smollm2_ids_are_transformers(tmp_path):
    transformers = pytest.importorskip('transformers')
    folder = asset('smollm2')
    text = NASTY.replace('<|endoftext|>', '').replace(
        '<|im_start|>', ''
    )  # transformers takes these for themselves
    data = make(tmp_path, text, folder)
    ids = transformers.AutoTokenizer.from_pretrained(folder)(
        text[: int(len(text) * 0.9)], add_special_tokens=False
    )
    assert data.splits['train'].tolist() == ids['input_ids'] and data.vocab_size == 49152


@pytest.mark.slow
def test_tokenizing_in_pieces_equals_the_whole(tmp_path, spec):
    text = (
        Path(asset('tinyshakespeare.txt')).read_text()[:25000]
        + NASTY
        + ' ' * 999
        + 'x' * 999
        + '\n' * 999
        + NASTY
    )
    make(tmp_path, text, spec)
    tokenizer = load_tokenizer(tmp_path / 'data')
    for block in (len(text), 777):  # wherever the text comes apart on its way
        pieces = list(
            cut(tokenizer, (text[i : i + block] for i in range(0, len(text), block)), size=50)
        )
        assert ''.join(pieces) == text and len(pieces) > 300
        assert [i for piece in pieces for i in encode(tokenizer, piece)] == encode(tokenizer, text)
        assert pieces == list(cut(tokenizer, [text], size=50))
    behind = ''.join(pieces[:100])
    assert (
        list(cut(tokenizer, [text[len(behind) :]], size=50)) == pieces[100:]
    )  # after a restart, too


def test_a_character_without_a_token_is_an_error_that_names_it(tmp_path):
    make(tmp_path, 'abc ' * 50)
    with pytest.raises(ValueError, match=r"'é' \(U\+00E9\)"):
        encode(load_tokenizer(tmp_path / 'data'), 'abé')
    with pytest.raises(ValueError, match=r"'!' \(U\+0021\)"):
        make(tmp_path, 'abc!' * 50, str(tmp_path / 'data'))  # another text's characters


def test_bpe_says_when_the_text_yields_a_smaller_vocabulary(tmp_path, capsys):
    assert make(tmp_path, 'abab' * 50, 'bpe:5000').vocab_size < 300
    assert '5,000 is not reached' in capsys.readouterr().out


def own_tokenizer(folder, **parts):
    """A byte-level tokenizer.json with other parts set"""
    from tokenizers import models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = byte_level(models.BPE({c: i for i, c in enumerate(letters)}, []))
    tokenizer.add_special_tokens(['<s>', '</s>'])
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.enable_truncation(7)
    tokenizer.save(str(folder / 'own.json'))
    return str(folder / 'own.json')


def test_a_tokenizer_that_changes_the_text_is_refused(tmp_path):
    from tokenizers import normalizers

    with pytest.raises(ValueError, match=r"behind 'ab.*ab' 'Xbab.*' becomes 'xbab.*'"):
        make(
            tmp_path,
            'ab' * 52 + 'Xb' + 'ab' * 7,
            own_tokenizer(tmp_path, normalizer=normalizers.Lowercase()),
        )
    assert not (tmp_path / 'data').exists()  # lossless BPE of bytes or not, it is looked at


def test_a_tokenizers_own_bos_and_truncation_stay_out(tmp_path):
    from tokenizers import processors

    bos = processors.TemplateProcessing(
        single='<s> $A', pair='<s> $A $B', special_tokens=[('<s>', 256)]
    )
    data = make(tmp_path, NASTY, own_tokenizer(tmp_path, post_processor=bos))
    train = NASTY[: int(len(NASTY) * 0.9)]
    assert data.tokens('train') == len(train.encode()) and data.eot_id == 257
    assert len(load_tokenizer(tmp_path / 'data').encode(train).ids) == len(
        train.encode()
    )  # also in the saved one


def test_a_tokenizer_that_is_called_like_gpt2_is_itself(tmp_path, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', asset('tiktoken'))
    monkeypatch.chdir(tmp_path)
    os.rename(own_tokenizer(tmp_path), 'gpt2-mine.json')
    data = make(tmp_path, NASTY, 'gpt2-mine.json')
    assert data.vocab_size == 258 and data.tokens('train') == len(
        NASTY[: int(len(NASTY) * 0.9)].encode()
    )


@pytest.mark.slow
def test_saved_tokenizer_is_transformers_own(tmp_path, spec):
    transformers = pytest.importorskip('transformers')
    data, tokenizer = make(tmp_path, NASTY, spec), load_tokenizer(tmp_path / 'data')
    text = NASTY.replace('<|endoftext|>', '').replace('<|im_start|>', '')
    for model_type in (
        '',
        'llama',
        'glm4_moe',
        'deepseek_v3',
    ):  # transformers looks at the model's type, too
        folder = tmp_path / f'model-{model_type}'
        folder.mkdir()
        if model_type:
            (folder / 'config.json').write_text(json.dumps({'model_type': model_type}))
        about = Config(bos_token_id=1, eos_token_id=data.eot_id, max_position_embeddings=123)
        write_companions(folder, tokenizer, about, {})
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert theirs(text)['input_ids'] == encode(tokenizer, text)
        assert theirs.decode(theirs(text)['input_ids']) == text
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.model_max_length) == (
            1,
            data.eot_id,
            123,
        )
        assert len(theirs) == data.vocab_size
        assert encode(load_tokenizer(folder), NASTY) == encode(tokenizer, NASTY)


# ------------------------------------------------------------------------------------------------
# Reading


@pytest.fixture
def ramp(tmp_path):
    """A dataset in which token number i of train is i, so that a token tells where it is from"""
    return make(
        tmp_path, ''.join(map(chr, range(0x4E00, 0x4E00 + 2000)))
    )  # 1800, 100 and 100 tokens


@pytest.mark.parametrize('size', [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1000, 5000])
def test_permutation_is_a_bijection(size):
    for seed in range(5):
        key = scramble(np.full(size, seed, np.uint64))
        assert sorted(permute(np.arange(size).astype(np.uint64), size, key).tolist()) == list(
            range(size)
        )


@pytest.mark.parametrize('size', [2, 3, 5, 10, 100, 1000])
def test_permutation_is_uniform(size):
    keys = scramble(np.arange(20000).astype(np.uint64))
    for k in (0, size // 2, size - 1):  # where each goes under 20,000 keys: chi-square, 5 sigma
        count = np.bincount(
            permute(np.full(len(keys), k, np.uint64), size, keys).astype(int), minlength=size
        )
        chi2, dof = ((count - len(keys) / size) ** 2).sum() * size / len(keys), size - 1
        assert abs(chi2 - dof) < 5 * (2 * dof) ** 0.5
    k = np.arange(size)
    out = np.array(
        [permute(k.astype(np.uint64), size, np.full(size, key)) for key in keys[:300]]
    ).astype(int)
    displacement = np.abs(out - k).mean()  # (n^2 - 1) / 3n for a random permutation
    assert displacement == pytest.approx(
        (size**2 - 1) / (3 * size), rel=0.15 if size < 10 else 0.05
    )


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
        x1, y1 = TokenData(ramp.directory).batch('train', numbers[i : i + 1], 50, seed=3)
        assert (x1[0] == x[i]).all() and (y1[0] == y[i]).all()
    assert (ramp.batch('train', numbers, 50, seed=4)[0] != x).any()
    n = np.arange(16)
    assert (
        ramp.batch('val', n, 6, seed=3)[0] - 1800 != ramp.batch('test', n, 6, seed=3)[0] - 1900
    ).any()


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
    refused('version 3, not 2', 'meta.json', json.dumps({**meta, 'version': 3}).encode())
    refused('float32', 'meta.json', json.dumps({**meta, 'dtype': 'float32'}).encode())
    for key in ('dtype', 'vocab_size', 'eot_id', 'tokenizer', 'splits'):
        refused(key, 'meta.json', json.dumps({k: v for k, v in meta.items() if k != key}).encode())
    (folder / 'val.bin').unlink()
    with pytest.raises(ValueError, match='val.bin has 0 bytes'):
        TokenData(folder)


# ------------------------------------------------------------------------------------------------
# Mixtures


@pytest.mark.parametrize(
    'shares',
    [
        (0.7, 0.3),
        (1, 1),
        (0.001, 0.999),
        (0.5, 0.3, 0.2),
        (0.333333,) * 3,
        (0.333333, 0.333333, 0.333334),
        (2, 3, 7),
        (0.001, 0.6, 0.399),
        (0.25, 0.25, 0.2, 0.2, 0.1),
        (0.001, 0.4, 0.3, 0.2, 0.099),
        (1, 2, 3, 5, 8, 13, 21),
    ],
)
def test_any_stretch_of_a_mixture_has_its_shares(shares):
    k, exact = len(shares), [Fraction(str(share)) for share in shares]
    counts = whole_counts({str(i): share for i, share in enumerate(shares)})
    period, (source, rank) = sum(counts), schedule(counts)
    assert len(source) == period <= 100_000 and np.bincount(source).tolist() == counts
    for i in range(k):
        error = abs(Fraction(counts[i], period) - exact[i] / sum(exact))
        assert error == 0 if period < 100_000 else error < Fraction(1, period)
        assert rank[source == i].tolist() == list(range(counts[i]))
    seen = (np.tile(source, 3)[:, None] == np.arange(k)).cumsum(0)  # of each source in the first n
    seen = np.concatenate([np.zeros((1, k), int), seen])
    lengths = (
        range(1, 2 * period)
        if period < 2000
        else random.Random(1).sample(range(1, 2 * period), 100)
    )
    for n in lengths:  # all in integers: |count - n * share| times the period
        off = abs((seen[n:] - seen[:-n]) * period - n * np.array(counts))
        assert off.max() <= period if k == 2 else off.max() < 2 * period
    off = abs(seen * period - np.arange(len(seen))[:, None] * counts)
    assert off.max() * (2 * k - 2) <= period * (2 * k - 3)


@pytest.fixture
def slopes(tmp_path):
    """Datasets of one tokenizer in which a token is followed by the next one (up), the one before
    it (down), or the one three further on (third), so that two tokens tell where they are from"""
    text = ''.join(map(chr, range(0x4E00, 0x4E00 + 2000)))
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
        x1, y1 = open_data(shares).batch('train', numbers[i : i + 1], 50, seed=3)
        assert (x1[0] == x[i]).all() and (y1[0] == y[i]).all()
    assert (mixture.batch('train', numbers, 50, seed=4)[0] != x).any()
    shutil.copytree(slopes['up'], tmp_path / 'data/other')  # other names, in another order
    same = open_data({slopes['down']: 2, 'other': 3}, root=tmp_path / 'data')
    assert (
        same.batch('train', numbers, 50, seed=3)[0] == x
    ).all() and same.fingerprint() == mixture.fingerprint()
    assert open_data({**shares, slopes['up']: 0.5}).fingerprint() != mixture.fingerprint()
    one = open_data({slopes['up']: 0.1})  # is that dataset itself
    assert (
        one.batch('train', numbers, 50, 3)[0]
        == TokenData(slopes['up']).batch('train', numbers, 50, 3)[0]
    ).all()


def test_an_epoch_of_a_source_has_every_window_once_in_an_order_of_its_own(slopes):
    mixture, T, W, orders = open_data({slopes['up']: 0.6, slopes['down']: 0.4}), 50, 35, []
    x, y = mixture.batch('train', range(400), T, seed=7)
    for slope in (1, -1):
        own = x[y[:, 0] - x[:, 0] == slope][:, 0]
        own = own if slope == 1 else 1999 - own  # where in its text
        for epoch in own[: len(own) // W * W].reshape(-1, W):
            starts = sorted(epoch.tolist())
            assert (
                starts == [min(starts[0] + k * T, 1800 - 1 - T) for k in range(W)] and starts[0] < T
            )
        orders.append(np.argsort(np.argsort(own[:W])))
    assert abs(np.corrcoef(orders)[0, 1]) < 0.5  # 3 sigma


def test_a_mixture_of_several_tokenizers_is_refused(slopes, tmp_path):
    other = str(make(tmp_path, NASTY).directory)
    with pytest.raises(ValueError, match='different tokenizers.*--tokenizer=') as e:
        open_data({slopes['up']: 1, other: 1})
    assert slopes['up'] in str(e.value) and f'{other} ' in str(e.value)


# ------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    'args, wanted',
    [
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
    ],
)
def test_a_mistake_ends_in_one_line_and_leaves_nothing(tmp_path, args, wanted):
    texts = {
        'empty': b'',
        'short': b'x' * 99,
        'good': b'a good text. ' * 20,
        'shakespeare': b'x' * 200,
        'latin': b'\xc3\xa9' * 100 + b'caf\xe9 ' + b'x' * 100,
    }
    for name, content in texts.items():
        (tmp_path / f'{name}.txt').write_bytes(content)
    before = files(tmp_path)
    done = run(tmp_path, *args)
    assert done.returncode == 2, done
    assert (
        done.stderr.count('\n') == 1
        and done.stderr.startswith('prepare.py: ')
        and 'Traceback' not in done.stderr
    )
    assert all(part in done.stderr for part in wanted), done.stderr
    assert files(tmp_path) == before and not (tmp_path / 'data').exists()


def test_help_lists_every_setting(tmp_path):
    done = run(tmp_path, '--help')
    assert done.returncode == 0 and all(
        f'--{name}=' in done.stdout for name in Settings.__dataclass_fields__
    )
