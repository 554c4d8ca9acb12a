"""Tests of nanoseek/sources.py: nothing malformed becomes a part of a text, and every bad row is
named. Files are made here; what should come out is counted by hand."""
import json
import re

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

import prepare
from conftest import run
from nanoseek.sources import open_source

pq = pyarrow.parquet


def open_it(source, **given):
    return open_source(prepare.Settings(str(source), **given))


def read(path, **given):
    """Return the texts, and {row: problem}."""
    texts = []
    problems = {}
    for document in open_it(path, **given).read():
        if document.problem:
            problems[int(document.where.rpartition('row ')[2])] = document.problem
        else:
            texts.append(document.text)
    return texts, problems


# ------------------------------------------------------------------------------------- CSV

@pytest.mark.parametrize('ending, comma', [('csv', ','), ('tsv', '\t'), ('CSV', ',')])
def test_a_row_with_another_number_of_fields_is_bad(tmp_path, ending, comma):
    rows = [['id', 'text'], ['1', 'one'], ['2', 'two', 'and more'], ['3'], ['4', 'four']]
    path = tmp_path / f'a.{ending}'
    path.write_text(''.join(comma.join(row) + '\n' for row in rows))
    texts, problems = read(path)
    assert texts == ['one', 'four']
    assert list(problems) == [2, 3]
    assert 'not the 2 fields of the header' in problems[2]



@pytest.mark.parametrize('row', ['3,"never closed', '3,"a"b'])
def test_a_quote_that_is_not_closed_ends_the_file_with_its_row(tmp_path, row):
    (tmp_path / 'a.csv').write_text(f'id,text\n1,"one\nand a half"\n2,two\n{row}\n4,four\n')
    with pytest.raises(ValueError, match='a.csv cannot be read beyond row 2: '):
        read(tmp_path / 'a.csv')


# -------------------------------------------------------------------------- JSON, compressed

def test_json_is_an_array_or_one_object_a_line(tmp_path):
    array = tmp_path / 'a.json'
    array.write_bytes(b'\xef\xbb\xbf\n' + json.dumps(
        [{'text': 'one'}, {'other': 1}, 'no', {'text': 'two', 'key': 2}], indent=1).encode())
    texts, problems = read(array)
    assert (texts, list(problems)) == (['one', 'two'], [2, 3])
    array.write_text('[{"text": "one"}, {"text": ')
    with pytest.raises(ValueError, match='a.json cannot be read beyond row 0: '):
        read(array)
    (tmp_path / 'b.json').write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert read(tmp_path / 'b.json') == (['one', 'two'], {})


# --------------------------------------------------------------------------------- parquet


def unchecked(values):
    """Return an array of strings whose bytes nobody has looked at."""
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values).buffers())


@pytest.mark.parametrize('make', [unchecked, pa.array,
                                  lambda values: unchecked(values).dictionary_encode()])
def test_every_type_of_text_is_read_and_a_bad_byte_named(tmp_path, make):
    values = [b'R\xc9UNION' if i == 7 else b'place %d' % i for i in range(20)]
    column = make(values)
    pq.write_table(pa.table({'text': column, 'id': range(20)}), tmp_path / 'a[1].parquet')
    texts, problems = read(tmp_path / 'a[1].parquet')
    assert texts == [f'place {i}' for i in range(20) if i != 7]
    assert 'decode byte 0xc9' in problems[8]


@pytest.mark.parametrize('column', [[['a'], ['b']], [1, 2]])
def test_a_column_that_is_no_text_or_missing_is_refused(tmp_path, column):
    pq.write_table(pa.table({'text': column}), tmp_path / 'a.parquet')
    with pytest.raises(ValueError, match='a.parquet cannot be read beyond row 0: '):
        read(tmp_path / 'a.parquet')
    with pytest.raises(ValueError, match='beyond row 0: .*story'):
        read(tmp_path / 'a.parquet', text_field='story')
    pq.write_table(pa.table({'text': ['a', None]}), tmp_path / 'a.parquet')
    assert read(tmp_path / 'a.parquet') == (['a'], {2: "'text' is NoneType, not text"})


# ---------------------------------------------------------------------------- the Hub's form

CARD = '---\nlicense: mit\nconfigs:\n'
CONFIG = '- config_name: {0}\n  data_files:\n  - split: train\n    path: {0}/train-*\n'


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """Return a folder as of a dataset on the Hub: two subsets of three files each."""
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    folder = tmp_path / 'clone'
    for subset in ('de', 'en'):
        (folder / subset).mkdir(parents=True)
        for i in range(3):
            texts = [f'{subset} {i} {j}' for j in range(10)]
            pq.write_table(pa.table({'id': range(10), 'story': texts}),
                           folder / subset / f'train-0000{i}-of-00003.parquet', row_group_size=4)
    configs = ''.join(CONFIG.format(subset) for subset in ('de', 'en'))
    (folder / 'README.md').write_text(f'{CARD}{configs}---\n# Stories\n')
    return folder


TEXTS = [f'en {i} {j}' for i in range(3) for j in range(10)]


def test_a_subset_of_a_dataset_streams_and_goes_on_after_every_document(clone):
    source = open_it(clone, subset='en', text_field='story')
    assert source.origin['split'] == 'train'
    for number, document in enumerate(source.read(), 1):
        assert (document.text, document.where) == (TEXTS[number - 1], f'{clone}, row {number}')
        position = json.loads(json.dumps(source.position()))
        rest = open_it(clone, subset='en', text_field='story').read(position)
        assert [document.text for document in rest] == TEXTS[number:]
    assert number == 30


@pytest.mark.parametrize('given, line', [
    ({'subset': 'fr'}, 'datasets cannot open it: .*fr.*de'),
    ({'subset': 'en', 'split': 'test'}, 'datasets cannot open it: .*test.*train')])
def test_what_a_dataset_lacks_is_one_line(clone, given, line):
    args = [f'--{name}={value}' for name, value in given.items()]
    done = run(clone.parent, 'prepare.py', 'clone', *args)
    assert (done.returncode, done.stderr.count('\n')) == (2, 1)
    assert re.search(line, done.stderr), done.stderr
    assert not (clone.parent / 'data').exists()
