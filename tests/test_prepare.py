"""Tests of prepare.py: what it writes is read back with numpy and tokenizers alone, and splits
are computed again from a hash. $NANOSEEK_ASSETS has SmolLM2's tokenizer, tiktoken's cache and
tinyshakespeare.txt; tests that need them are skipped without."""
import csv
import gzip
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

import prepare
from conftest import ROOT, asset, run

# What a careless reader or tokenizer would change: line ends, NUL, accents in two spellings,
# special tokens as text.
NASTY = ('One\ufeff\r\ntwo\rthree\n\n\n  four\t\x00five <|endoftext|> caf\u00e9 cafe\u0301 '
         '\u65e5\u672c\u8a9e \u0645\u0631 \U0001f642\U0001f468\u200d\U0001f469 <|im_start|><unk> '
         "\u00a0 x = 12345;   don't \u2028 end \n ") * 6
ODD = ['', ' ', 'one\r\ntwo\rthree\n\nfour\n', 'nul \x00 nul', '\ufeffBOM', 'line\u2028end\u0085',
       '\u65e5\u672c\u8a9e\u3002\u6ca1\u6709\u7a7a\u683c', '<|endoftext|>', 'a<|endoftext|>b</s>',
       '"quoted", with a comma\tand \'that\'', '  ', '\n', 'caf\u00e9 cafe\u0301', NASTY,
       '{"text": 1}', 'NA', 'null', '1.50', '2020-01-01']
ENDINGS = ('jsonl', 'jsonl.gz', 'jsonl.zst', 'json', 'csv', 'tsv', 'parquet')


def words(count, seed):
    """Return documents that are all different."""
    rng = random.Random(seed)
    documents = []
    for i in range(count):
        letters = ''.join(rng.choices('abcde\u00e9   ', k=rng.randint(0, 300)))
        documents.append(f'{i} {letters}')
    return documents


def write_corpus(path, documents):
    """Write documents in the format that the file's name ends in, by the library for it."""
    import pyarrow.parquet
    rows = [{'id': i, 'text': document} for i, document in enumerate(documents)]
    lines = [json.dumps(row, ensure_ascii=row['id'] % 2 > 0) + '\n' for row in rows]
    data = ''.join(lines).encode()
    kind = path.name.partition('.')[2]
    if kind in ('csv', 'tsv'):
        with open(path, 'w', encoding='utf-8', newline='') as f:
            writer = csv.writer(f, delimiter={'csv': ',', 'tsv': '\t'}[kind])
            writer.writerows([('id', 'text'), *enumerate(documents)])
    elif kind == 'parquet':
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    else:
        path.write_bytes({'json': json.dumps(rows, indent=1).encode(), 'jsonl': data,
                          'jsonl.gz': gzip.compress(data),
                          'jsonl.zst': pyarrow.compress(data, 'zstd', asbytes=True)}[kind])
    return path


def prep(source, out, tokenizer='bpe:300', **given):
    return prepare.prepare(prepare.Settings(str(source), tokenizer, out_dir=str(out), **given))


def by_split(documents, val, test):
    """Return {split: documents}, by their hashes as shares of 2**64: first val, then test."""
    splits = {'train': [], 'val': [], 'test': []}
    for document in documents:
        digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
        place = int.from_bytes(digest, 'big') / 2**64
        split = 'val' if place < val else 'test' if place < val + test else 'train'
        splits[split].append(document)
    return {split: texts for split, texts in splits.items() if texts}


def meta_of(folder):
    return json.loads((Path(folder) / 'meta.json').read_text(encoding='utf-8'))


def ids_of(folder):
    """Return {split: ids (n,)}."""
    meta = meta_of(folder)
    dtype = {'uint16': '<u2', 'uint32': '<u4'}[meta['dtype']]
    return {split: np.fromfile(folder / f'{split}.bin', dtype) for split in meta['splits']}


def read_back(folder):
    """Return {split: documents}."""
    tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))
    eot = meta_of(folder)['eot_id']
    splits = {}
    for split, ids in ids_of(folder).items():
        *documents, rest = np.split(ids, np.flatnonzero(ids == eot) + 1)
        assert len(rest) == 0
        documents = [document[:-1].tolist() for document in documents]
        splits[split] = tokenizer.decode_batch(documents, skip_special_tokens=False)
    return splits


def files(folder):
    """Return {path: bytes} of all files but the lock, which a killed process leaves."""
    paths = [path for path in sorted(Path(folder).rglob('*')) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths
            if path.name != '.lock'}


@pytest.fixture
def tiktoken_cache(monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', asset('tiktoken'))


@pytest.fixture(params=['char', 'bpe:300', 'gpt2', 'smollm2'])
def kind(request, tiktoken_cache):
    if request.param == 'smollm2':
        return asset('smollm2')
    return request.param


# --------------------------------------------------------------------------- a single text

def test_shakespeare_needs_one_command_and_is_what_earlier_versions_wrote(tmp_path):
    done = run(tmp_path, 'prepare.py', 'shakespeare', PYTHONPROFILEIMPORTTIME='1')
    assert done.returncode == 0
    assert not re.search(r'\| +(torch|datasets|pyarrow)$', done.stderr, re.M)      # slow ones
    folder = tmp_path / 'data/shakespeare'
    made = files(folder)
    assert ' '.join(made) == 'meta.json test.bin tokenizer.json train.bin val.bin'
    assert hashlib.sha256(made['meta.json']).hexdigest() == META_OF_SHAKESPEARE
    text = (ROOT / 'data/shakespeare/input.txt').read_bytes()
    tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))
    ids = np.concatenate(list(ids_of(folder).values()))
    assert tokenizer.decode(ids.tolist()).encode() == text


META_OF_SHAKESPEARE = 'f80194fc4bb0a3d1752f17ce424c6407378a76dc8125115f8d19575516ea9abe'


def test_tinyshakespeare_is_nanogpts(tmp_path):
    path = asset('tinyshakespeare.txt')
    folder = prep('tinyshakespeare', tmp_path, '', path=path)
    text = Path(path).read_text()
    letters = sorted(set(text))
    ids = np.array([letters.index(c) for c in text], '<u2')
    assert (folder / 'train.bin').read_bytes() == ids[:1003854].tobytes()   # as nanoGPT prints
    assert (folder / 'val.bin').read_bytes() == ids[1003854:].tobytes()
    assert not (folder / 'test.bin').exists()


def test_every_tokenizer_gives_the_same_splits_back_byte_for_byte(tmp_path, kind):
    (tmp_path / 'mine.txt').write_bytes(NASTY.encode())
    folder = prep(tmp_path / 'mine.txt', tmp_path / 'out', kind)
    n = len(NASTY)
    parts = {'train': NASTY[:int(n * 0.9)], 'val': NASTY[int(n * 0.9):int(n * 0.95)],
             'test': NASTY[int(n * 0.95):]}
    tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))
    for split, ids in ids_of(folder).items():
        assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == parts[split]
        assert meta_of(folder)['eot_id'] not in ids         # '<|endoftext|>' is text here
        counts = meta_of(folder)['splits'][split]
        assert counts['bytes'] == len(parts[split].encode())
        assert counts['tokens'] == len(ids)


@pytest.mark.parametrize('count, dtype', [(65535, 'uint16'), (65536, 'uint32')])
def test_65536_tokens_with_the_end_of_text_are_the_most_for_uint16(tmp_path, count, dtype):
    letters = ''.join(map(chr, range(0x20000, 0x20000 + count)))
    documents = [letters[i:i + 100] for i in range(0, count, 100)]
    folder = prep(write_corpus(tmp_path / 'a.jsonl', documents), tmp_path / 'out', 'char',
                  val_frac=0.1)
    assert (meta_of(folder)['dtype'], meta_of(folder)['eot_id']) == (dtype, count)
    assert read_back(folder) == by_split(documents, 0.1, 0.1)


# --------------------------------------------------------------------------------- documents

def test_all_formats_give_the_same_files(tmp_path):
    documents = ODD + words(200, 2)
    made = []
    for ending in ENDINGS:
        folder = prep(write_corpus(tmp_path / f'a.{ending}', documents), tmp_path / ending,
                      val_frac=0.1)
        assert read_back(folder) == by_split(documents, 0.1, 0.1), ending
        made.append({**files(folder), 'meta.json': meta_of(folder)['crc32']})
        assert made[-1] == made[0], ending


def test_a_folder_has_the_documents_of_its_files_in_order(tmp_path):
    """A .txt or .md is one document, byte for byte but for a byte-order mark."""
    texts = {f'{i:02}/{i}.{("txt", "md")[i % 2]}': text for i, text in enumerate(ODD)}
    texts['05/long.txt'] = '\ufeff' + ' '.join(words(2000, 1))
    for name, text in texts.items():
        (tmp_path / 'mine' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'mine' / name).write_bytes(text.encode())
    (tmp_path / 'mine/.hidden.txt').write_text('not this')
    (tmp_path / 'mine/no.py').write_text('nor this')
    more = words(20, 5)
    write_corpus(tmp_path / 'mine/zz.parquet', more)
    documents = [texts[name].removeprefix('\ufeff') for name in sorted(texts, key=Path)] + more
    folder = prep(tmp_path / 'mine', tmp_path / 'out', val_frac=0.2)
    assert read_back(folder) == by_split(documents, 0.2, 0.2)
    for split, texts in by_split(documents, 0.2, 0.2).items():
        assert meta_of(folder)['splits'][split] == {
            'tokens': len(ids_of(folder)[split]), 'documents': len(texts),
            'bytes': sum(len(text.encode()) for text in texts)}


def test_deduplicate_leaves_out_what_came_before_byte_for_byte(tmp_path):
    documents = [*words(300, 6), *words(300, 6)[::2], '', 'A', 'a', '', 'a ', 'cafe\u0301', 'a']
    random.Random(0).shuffle(documents)
    path = write_corpus(tmp_path / 'a.jsonl', documents)
    folder = prep(path, tmp_path / 'out', deduplicate=True, val_frac=0.1)
    assert read_back(folder) == by_split(dict.fromkeys(documents), 0.1, 0.1)
    count = len(documents) - len(set(documents))
    assert meta_of(folder)['left_out'] == {'bad': 0, 'duplicates': count}


def test_tokens_ends_with_the_document_that_makes_them(tmp_path):
    path = write_corpus(tmp_path / 'a.jsonl', words(150, 7))
    tokenizer = prepare.load_tokenizer(prep(path, tmp_path / 'all', val_frac=0.1))
    total = np.cumsum([len(tokenizer.encode(text).ids) + 1 for text in words(150, 7)])
    for tokens in (total[70] - 1, total[70], total[70] + 1, total[-1], 10**9):
        folder = prep(path, tmp_path / f'{tokens}', str(tmp_path / 'all'), tokens=int(tokens),
                      val_frac=0.1)
        count = int(np.searchsorted(total, tokens)) + 1
        assert read_back(folder) == by_split(words(150, 7)[:count], 0.1, 0.1)


def test_documents_need_a_token_that_ends_them(tmp_path):
    (tmp_path / 'a.txt').write_text(''.join(words(100, 9)))
    letters = str(prep(tmp_path / 'a.txt', tmp_path / 'letters', 'char'))
    path = write_corpus(tmp_path / 'a.jsonl', words(100, 9))
    with pytest.raises(ValueError, match='must be one with an end-of-text token'):
        prep(path, tmp_path / 'out', letters)


@pytest.mark.parametrize('special', [False, True])
def test_gpt2_with_code_tokens_has_them_from_50257_on(tmp_path, tiktoken_cache, special):
    documents = [f'{token} x={i}' for i, token in enumerate(prepare.CODE_TOKENS)] + words(40, 1)
    path = write_corpus(tmp_path / 'a.jsonl', documents)
    folder = prep(path, tmp_path / 'out', 'gpt2+code', special_in_text=special, val_frac=0.2)
    assert (meta_of(folder)['vocab_size'], meta_of(folder)['eot_id']) == (50272, 50256)
    assert read_back(folder) == by_split(documents, 0.2, 0.2)
    ids = np.concatenate(list(ids_of(folder).values()))
    assert sorted(ids[ids > 50256]) == list(range(50257, 50272)) * special


def test_a_document_begins_with_what_its_tokenizer_puts_there(tmp_path):
    tokenizer = prepare.train_bpe(300, words(100, 2))
    tokenizer.add_special_tokens(['<s>'])
    begin = tokenizer.token_to_id('<s>')
    tokenizer.post_processor = processors.TemplateProcessing(
        single='<s> $A', special_tokens=[('<s>', begin)])
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    path = write_corpus(tmp_path / 'a.jsonl', words(100, 1))
    folder = prep(path, tmp_path / 'out', str(tmp_path), val_frac=0.2)
    for ids in ids_of(folder).values():
        starts = np.flatnonzero(ids == begin).tolist()
        ends = np.flatnonzero(ids == meta_of(folder)['eot_id']).tolist()
        assert starts == [0, *(end + 1 for end in ends[:-1])]


def test_separators_that_become_letters_are_counted(tmp_path, capsys):
    (tmp_path / 'a.txt').write_text('A story.\n<|endoftext|>\n' * 100)
    prep(tmp_path / 'a.txt', tmp_path / 'out', 'bpe:300')
    assert '<|endoftext|> is spelled 100 times' in capsys.readouterr().out
    prep(tmp_path / 'a.txt', tmp_path / 'out', 'bpe:300', special_in_text=True)
    assert 'spelled' not in capsys.readouterr().out


# ------------------------------------------------------------------------------ interruptions

SLOWLY = """
import json, sys, time, prepare
from nanoseek import tokenizer
prepare.SAVE_SECONDS = 0
tokenizer.BATCH = 2000
save = prepare.Output.save
prepare.Output.save = lambda output: (save(output), time.sleep(0.02))
with prepare.settings.user_errors():
    prepare.prepare(prepare.Settings(**json.loads(sys.argv[1])))
"""


def start(given):
    """Start prepare.py, which notes its progress after every few documents."""
    return subprocess.Popen([sys.executable, '-c', SLOWLY, json.dumps(given)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def kill_after_a_note(given, seconds):
    """Return whether it still ran."""
    process = start(given)
    note = Path(given['out_dir']) / '.partial/progress.json'
    before = note.read_bytes() if note.exists() else b''
    while process.poll() is None and (not note.exists() or note.read_bytes() == before):
        time.sleep(0.002)
    time.sleep(seconds)
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


def test_killed_at_any_time_it_ends_with_the_same_files(tmp_path):
    """Also with files of several formats, documents that come again, and bad ones"""
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/a.txt').write_text(' '.join(words(1000, 3)))
    for i, ending in enumerate(ENDINGS):
        write_corpus(tmp_path / f'mine/{i}.{ending}', ODD + words(120, i % 4))
    (tmp_path / 'mine/bad.jsonl').write_text('not JSON\n' * 3)
    given = {'source': str(tmp_path / 'mine'), 'tokenizer': 'bpe:300', 'val_frac': 0.1,
             'deduplicate': True, 'bad_documents': 'skip', 'out_dir': str(tmp_path / 'whole')}
    prepare.prepare(prepare.Settings(**given))
    given['out_dir'] = str(tmp_path / 'out')
    rng = random.Random(0)
    for _ in range(3):
        assert kill_after_a_note(given, rng.uniform(0, 0.3))
    process = start(given)
    output, errors = process.communicate()
    assert (process.returncode, errors) == (0, '')
    assert 'after 0 tokens' not in output
    assert files(tmp_path / 'out') == files(tmp_path / 'whole')
    assert meta_of(tmp_path / 'out')['left_out']['bad'] == 3


@pytest.mark.parametrize('moved', [1, 3, 5])
def test_stopped_while_its_files_move_it_ends_with_the_same_files(tmp_path, monkeypatch, moved):
    path = write_corpus(tmp_path / 'a.jsonl', words(100, 1))
    whole = prep(path, tmp_path / 'whole', val_frac=0.1)
    prep(path, tmp_path / 'out', 'bpe:299', val_frac=0.2)       # an earlier dataset in the way
    replace = os.replace
    places = []

    def stop(old, new):
        places.append(Path(new).parent)
        if places.count(tmp_path / 'out') == moved:
            raise KeyboardInterrupt
        replace(old, new)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, 'replace', stop)
        prep(path, tmp_path / 'out', val_frac=0.1)
    assert not (tmp_path / 'out/meta.json').exists()
    prep(path, tmp_path / 'out', val_frac=0.1)
    assert files(tmp_path / 'out') == files(whole)


def test_the_same_command_does_nothing_until_something_changes(tmp_path, capsys):
    (tmp_path / 'mine').mkdir()
    for i in range(3):
        write_corpus(tmp_path / f'mine/{i}.jsonl', words(30, i))
        os.utime(tmp_path / f'mine/{i}.jsonl', (10**9, 10**9))

    def prepared_again(**given):
        capsys.readouterr()
        prep(tmp_path / 'mine', tmp_path / 'out', **{'val_frac': 0.2, **given})
        return 'is complete' not in capsys.readouterr().out
    assert prepared_again()
    assert not prepared_again()
    assert prepared_again(resume='never')
    assert prepared_again(val_frac=0.3)
    assert prepared_again(tokenizer='bpe:299')
    assert prepared_again()
    (tmp_path / 'mine/2.jsonl').touch()
    assert prepared_again()
    (tmp_path / 'mine/2.jsonl').unlink()
    assert prepared_again()
    assert read_back(tmp_path / 'out') == by_split(words(30, 0) + words(30, 1), 0.2, 0.2)
    (tmp_path / 'out/val.bin').write_bytes(b'')
    assert prepared_again()


def test_another_command_or_text_cannot_go_on(tmp_path):
    path = write_corpus(tmp_path / 'a.jsonl', words(300, 1))
    given = {'source': str(path), 'tokenizer': 'bpe:300', 'val_frac': 0.1,
             'out_dir': str(tmp_path / 'out')}
    assert kill_after_a_note(given, 0)
    before = files(tmp_path / 'out')
    with pytest.raises(ValueError, match='with val_frac=0.1: .*--resume=never'):
        prepare.prepare(prepare.Settings(**{**given, 'val_frac': 0.2}))
    write_corpus(path, words(299, 2))
    with pytest.raises(ValueError, match='with another text'):
        prepare.prepare(prepare.Settings(**given))
    assert files(tmp_path / 'out') == before
    prepare.prepare(prepare.Settings(**given, resume='never'))
    assert read_back(tmp_path / 'out') == by_split(words(299, 2), 0.1, 0.1)



# ------------------------------------------------------------------------------ bad documents

BAD = {'byte': (b'{"text": "caf\xe9 \xff"}', 'utf-8'),
       'half a pair': (b'{"text": "half \\ud83d x"}', 'surrogates not allowed'),
       'json': (b'{"text": "bro', 'not JSON'),
       'field': (b'{"id": 1, "txt": ""}', "no field 'text'.*'txt'"),
       'null': (b'{"text": null}', 'NoneType'),
       'list': (b'["text"]', 'no field'),
       'deep': (b'[' * 100_000, 'not JSON')}


@pytest.mark.parametrize('name', BAD)
def test_a_bad_document_is_named_or_left_out(tmp_path, name):
    line, message = BAD[name]
    good = words(60, 1)
    lines = [json.dumps({'text': text}).encode() for text in good]
    (tmp_path / 'a.jsonl').write_bytes(b'\n'.join([*lines[:40], line, *lines[40:], line]))
    with pytest.raises(ValueError, match=f'a.jsonl, row 41: .*{message}.*--bad_documents=skip'):
        prep(tmp_path / 'a.jsonl', tmp_path / 'out', val_frac=0.2)
    folder = prep(tmp_path / 'a.jsonl', tmp_path / 'out', val_frac=0.2, bad_documents='skip')
    assert read_back(folder) == by_split(good, 0.2, 0.2)
    assert meta_of(folder)['left_out'] == {'bad': 2, 'duplicates': 0}


# -------------------------------------------------------------------- looking at it, mistakes

def test_inspect_prints_what_is_there_and_finds_a_changed_byte(tmp_path):
    documents = ODD + words(300, 4)
    folder = prep(write_corpus(tmp_path / 'a.jsonl', documents), tmp_path / 'out', val_frac=0.2)
    done = run(tmp_path, 'prepare.py', '--inspect=out')
    assert (done.returncode, done.stderr) == (0, '')
    for split, ids in ids_of(folder).items():
        count = (ids == meta_of(folder)['eot_id']).sum()
        assert f'{split}: {len(ids):,} tokens, {len(ids) / count:.1f} per document' in done.stdout
    data = bytearray((folder / 'val.bin').read_bytes())
    data[500] ^= 1
    (folder / 'val.bin').write_bytes(data)
    done = run(tmp_path, 'prepare.py', '--inspect=out')
    assert done.returncode == 2 and 'val.bin is damaged' in done.stderr


MISTAKES = [
    ('', "nothing to prepare in ''.*shakespeare.*\\.txt"),
    ('missing.txt', "nothing to prepare in 'missing.txt'"),
    ('nobody/nothing', "'nobody/nothing' is no file here, and datasets cannot open it"),
    ('latin.txt', "latin.txt is not UTF-8 text: .*byte 0xe9 in position 203"),
    ('empty', "no file in 'empty' ends in .txt"),
    ('pointer', 'pointer/x.jsonl is a Git LFS pointer'),
    ('good.txt --tokens=100', 'tokens=100: must be none'),
    ('good.txt --tokenizer=bpe:256', 'tokenizer=bpe:256: .* at least 257'),
    ('good.txt --tokenizer=bpe:x', 'tokenizer=bpe:x: must be bpe:N'),
    ('good.txt --tokenizer=nosuch/hub-id', "no tokenizer in 'nosuch/hub-id'"),
    ('good.txt --tokenizer=no/tokenizer.json', "no tokenizer in 'no/tokenizer.json'"),
    ('good.txt --val_frac=1', 'val_frac=1.0: must be above 0 and below 1'),
    ('good.txt --val_frac=0.5 --test_frac=0.5', 'test_frac=0.5: must be'),
    ('good.csv --tokenizer=bpe:300', 'val got no document: .*--val_frac'),
    ('good.csv --text_field=story', "row 1: no field 'story'.*'text'")]


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp('place')
    (folder / 'pointer').mkdir()
    (folder / 'pointer/x.jsonl').write_text('version https://git-lfs.github.com/spec/v1')
    (folder / 'good.txt').write_text('a good text. ' * 20)
    (folder / 'latin.txt').write_bytes(b'\xc3\xa9' * 100 + b'caf\xe9 ' + b'x' * 100)
    (folder / 'good.csv').write_text('text\na good text\n')
    (folder / 'empty').mkdir()
    return folder


@pytest.mark.parametrize('args, line', MISTAKES)
def test_a_mistake_ends_in_one_line(place, args, line):
    done = run(place, 'prepare.py', *args.split(), HF_HUB_OFFLINE='1')
    assert done.returncode == 2
    assert done.stderr.startswith('prepare.py: ') and done.stderr.count('\n') == 1, done.stderr
    assert re.search(line, done.stderr), done.stderr
