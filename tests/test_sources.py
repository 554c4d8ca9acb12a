"""Tests of nanoseek/sources.py: nothing malformed becomes a part of a text, and every bad document
is named by its file and line. Inputs are small files made here; what should come out is counted by
hand."""
import csv
import gzip
import json
import os

import pytest

import config
import prepare
from nanoseek import sources
from nanoseek.sources import Files, list_files

pa = pytest.importorskip('pyarrow')


def read(path, field='text', at=None):
    """-> [(place, text or problem)] of a file's documents"""
    source = Files('mine', [path], field, str(path))
    found = []
    for document in source.read(at):
        value = document.text
        if document.problem:
            value = document.problem
        found.append((document.where.removeprefix(f'{path}, '), value))
    return found


def problems(path, **options):
    return {place: str(value) for place, value in read(path, **options)
            if isinstance(value, ValueError)}


def texts(path, **options):
    return [value for _, value in read(path, **options) if isinstance(value, str)]


# ------------------------------------------------------------------------------------- CSV

@pytest.mark.parametrize('ending, comma', [('csv', ','), ('tsv', '\t'), ('CSV', ',')])
def test_a_row_with_another_number_of_fields_is_bad_and_named(tmp_path, ending, comma):
    path = tmp_path / f'a.{ending}'
    rows = [['id', 'text'], ['1', 'one'], ['2', 'two', 'and more'], ['3'], ['4', 'four']]
    path.write_text(''.join(comma.join(row) + '\n' for row in rows))
    assert texts(path) == ['one', 'four']
    found = problems(path)
    assert list(found) == ['line 3', 'line 4']
    assert '3 fields, and 2 in the header' in found['line 3']


def test_a_quote_that_is_never_closed_spoils_its_own_line_only(tmp_path, monkeypatch):
    path = tmp_path / 'a.csv'
    lines = ['id,text', '1,"one\nand a half"', '2,two', '3,"never closed', '4,four', '5,"five"']
    path.write_text('\n'.join(lines) + '\n')
    assert texts(path) == ['one\nand a half', 'two', 'four', 'five']
    assert list(problems(path)) == ['line 5']
    assert 'quote that is opened here is never closed' in problems(path)['line 5']
    path.write_text('\n'.join(lines[:4]) + '\n4,four\n5,five\n')       # to the end of the file
    assert texts(path) == ['one\nand a half', 'two', 'four', 'five']
    path.write_text('\n'.join([*lines, *['6,more'] * 30]) + '\n')
    monkeypatch.setattr(sources, 'LINES_OF_A_ROW', 20)
    assert texts(path) == ['one\nand a half', 'two', 'four', 'five'] + ['more'] * 30


def test_many_open_quotes_do_not_cost_the_square(tmp_path):
    path = tmp_path / 'a.csv'
    path.write_text('id,text\n' + ''.join(f'{i},"open {i}\n' for i in range(3001)))
    found = read(path)                                  # each quote is closed by the next row's
    assert all(isinstance(value, ValueError) for _, value in found)


@pytest.mark.parametrize('row, words', [('1,"a"b', 'not CSV'), ('1', '1 fields')])
def test_other_malformed_rows_are_named(tmp_path, row, words):
    path = tmp_path / 'a.csv'
    path.write_text(f'id,text\n0,zero\n{row}\n2,two\n')
    assert texts(path) == ['zero', 'two']
    assert words in problems(path)['line 3']


def test_quoted_fields_come_back_as_pythons_csv_wrote_them(tmp_path):
    path = tmp_path / 'a.csv'
    wanted = ['a,b', 'say "x"', 'two\nlines', 'crlf\r\nhere', '', 'Grüße', ' ']
    with open(path, 'w', newline='', encoding='utf-8-sig') as f:
        writer = csv.writer(f)
        writer.writerow(['n', 'text'])
        writer.writerows(enumerate(wanted))
    assert texts(path) == wanted
    assert not problems(path)


def test_a_header_that_names_the_text_twice_is_refused(tmp_path):
    path = tmp_path / 'a.csv'
    path.write_text('text,text\na,b\n')
    with pytest.raises(ValueError, match="names the field 'text' 2 times"):
        read(path)


@pytest.mark.parametrize('ending', ['csv', 'jsonl', 'jsonl.gz', 'json', 'parquet'])
def test_reading_goes_on_at_every_position(tmp_path, ending):
    path = tmp_path / f'a.{ending}'
    write(path, ending, [f'document {i}\nand "more"' for i in range(7)])
    source = Files('mine', [path], 'text', str(path))
    positions = []
    for _ in source.read(None):
        positions.append(json.loads(json.dumps(source.position())))
    whole = read(path)
    assert len(whole) == 7
    for i, position in enumerate(positions):
        assert read(path, at=position) == whole[i + 1:]


def write(path, ending, documents):
    rows = [{'text': text} for text in documents]
    if ending == 'csv':
        with open(path, 'w', newline='') as f:
            writer = csv.DictWriter(f, ['text'])
            writer.writeheader()
            writer.writerows(rows)
    elif ending == 'jsonl':
        path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    elif ending == 'jsonl.gz':
        with gzip.open(path, 'wt') as f:
            f.write(''.join(json.dumps(row) + '\n' for row in rows))
    elif ending == 'json':
        path.write_text(json.dumps(rows, indent=1))
    else:
        import pyarrow.parquet
        pyarrow.parquet.write_table(pa.table({'text': documents}), path)


# -------------------------------------------------------------------------- JSON, compressed

def test_json_is_an_array_or_one_object_a_line(tmp_path):
    array = tmp_path / 'a.json'
    array.write_text(json.dumps([{'text': 'one'}, {'other': 1}, 'no', {'text': 'two'}]))
    assert texts(array) == ['one', 'two']
    assert list(problems(array)) == ['object 2', 'object 3']
    lines = tmp_path / 'b.json'
    lines.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert texts(lines) == ['one', 'two']


def test_a_line_that_is_no_json_is_named_and_the_next_is_read(tmp_path):
    path = tmp_path / 'a.jsonl'
    path.write_text('{"text": "one"}\n{"text": "two"} more\n\n{"text": 3}\n{"text": "four"}\n'
                    '{"text": "cut off')
    assert texts(path) == ['one', 'four']
    assert list(problems(path)) == ['line 2', 'line 4', 'line 6']


def test_several_members_of_a_gzip_file_are_one_text_and_half_a_one_an_error(tmp_path):
    path = tmp_path / 'a.JSONL.GZ'                      # endings in capitals, too
    first, second = (gzip.compress(f'{{"text": "{i}"}}\n'.encode() * 99) for i in (1, 2))
    path.write_bytes(first + second)
    assert texts(path) == ['1'] * 99 + ['2'] * 99
    path.write_bytes(first + second[:-9])
    with pytest.raises(ValueError, match='a.JSONL.GZ cannot be read to its end'):
        read(path)


def test_several_frames_of_a_zstd_file_are_one_text(tmp_path):
    path = tmp_path / 'a.jsonl.zst'
    frames = [pa.compress(f'{{"text": "{i}"}}\n'.encode() * 99, 'zstd', asbytes=True)
              for i in (1, 2)]
    path.write_bytes(b''.join(frames))
    assert texts(path) == ['1'] * 99 + ['2'] * 99


# --------------------------------------------------------------------------------- parquet

def strings(values, kind):
    """An array of a string type whose bytes nobody has looked at"""
    binary = pa.array(values, pa.large_binary() if kind == pa.large_string() else pa.binary())
    return pa.Array.from_buffers(kind, len(values), binary.buffers())


@pytest.mark.parametrize('kind', ['string', 'large_string', 'dictionary', 'binary', 'view'])
def test_every_type_of_text_is_read_and_a_bad_byte_named(tmp_path, kind):
    import pyarrow.parquet
    values = [b'R\xc9UNION' if i == 7 else b'place %d' % i for i in range(20)]
    if kind == 'binary':
        column = pa.array(values, pa.binary())
    elif kind == 'large_string':
        column = strings(values, pa.large_string())
    else:
        column = strings(values, pa.string())
    if kind == 'dictionary':
        column = pa.DictionaryArray.from_arrays(pa.array(range(20), pa.int32()), column)
    if kind == 'view':
        column = pa.array(values, pa.binary_view())
    path = tmp_path / 'a.parquet'
    pyarrow.parquet.write_table(pa.table({'text': column}), path)
    assert texts(path) == [f'place {i}' for i in range(20) if i != 7]
    assert 'not UTF-8' in problems(path)['row 8']


@pytest.mark.parametrize('column', [[['a'], ['b']], [1, 2], [{'a': 1}, {'a': 2}]])
def test_a_column_that_is_no_text_is_refused(tmp_path, column):
    import pyarrow.parquet
    path = tmp_path / 'a.parquet'
    pyarrow.parquet.write_table(pa.table({'text': column}), path)
    with pytest.raises(ValueError, match="the column 'text' is .*, not text"):
        read(path)


def test_a_missing_value_is_a_bad_document(tmp_path):
    import pyarrow.parquet
    path = tmp_path / 'a.parquet'
    pyarrow.parquet.write_table(pa.table({'text': ['a', None]}), path)
    assert "'text' is NoneType" in problems(path)['row 2']


# ------------------------------------------------------------------------------- encodings

@pytest.mark.parametrize('ending', ['txt', 'md', 'jsonl', 'csv', 'json', 'tsv'])
@pytest.mark.parametrize('encoding', ['utf-16', 'utf-32'])
def test_utf_16_is_named_with_the_way_out(tmp_path, ending, encoding):
    path = tmp_path / f'a.{ending}'
    path.write_bytes('text\n'.encode(encoding))
    with pytest.raises(ValueError, match=f'{encoding.upper()} text.*iconv -f {encoding}'):
        read(path)


@pytest.mark.parametrize('large', [False, True])
def test_a_byte_order_mark_at_the_start_is_no_text(tmp_path, monkeypatch, large):
    if large:
        monkeypatch.setattr(sources, 'WHOLE', 10)
    content = {'a.txt': 'Grüße \ufeff und mehr', 'b.jsonl': '{"text": "Grüße \ufeff und mehr"}',
               'c.csv': 'text\nGrüße \ufeff und mehr\n',
               'd.json': '[{"text": "Grüße \ufeff und mehr"}]'}
    for name, text in content.items():
        path = tmp_path / name
        path.write_bytes(b'\xef\xbb\xbf' + text.encode())
        (_, found), = read(path)
        if not isinstance(found, str):
            assert found.characters == len('Grüße \ufeff und mehr')
            found = ''.join(piece for piece, _, _, _ in found.pieces(iter))
        assert found == 'Grüße \ufeff und mehr'


def test_the_first_byte_that_is_not_utf8_is_found_across_blocks(tmp_path):
    path = tmp_path / 'a.txt'
    for before in (0, 5, (1 << 20) - 1, (1 << 20) + 3):
        path.write_bytes(b'a' * before + b'\xc3\xa4 \xe4 more')
        assert f'byte 0xe4 at offset {before + 3};' in str(sources.scan(path)[3])
    path.write_bytes(b'a' * ((1 << 20) - 1) + '\u65e5'.encode())
    assert sources.scan(path)[3] is None


# --------------------------------------------------------------------------------- folders

def test_what_is_left_out_of_a_folder_is_said(tmp_path):
    for name in ('a.TXT', 'b c.jsonl', 'd.pdf', 'e.PDF', 'f', '.hidden.txt', '.git/g.txt'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('x')
    (tmp_path / 'gone.txt').symlink_to(tmp_path / 'nowhere')
    paths, (note,) = list_files(tmp_path)
    assert [path.name for path in paths] == ['a.TXT', 'b c.jsonl']
    assert note.startswith('left out: 4 files')
    for words in ('.pdf (1)', '.PDF (1)', 'without an ending (1)', 'links to nothing (1)'):
        assert words in note


def test_links_to_folders_are_followed_and_a_circle_ends(tmp_path):
    (tmp_path / 'real/inner').mkdir(parents=True)
    (tmp_path / 'real/inner/a.txt').write_text('x')
    (tmp_path / 'top').mkdir()
    (tmp_path / 'top/link').symlink_to(tmp_path / 'real')
    (tmp_path / 'real/back').symlink_to(tmp_path / 'top')
    paths, notes = list_files(tmp_path / 'top')
    assert [path.name for path in paths] == ['a.txt']
    assert not notes


def test_a_clone_of_a_hub_dataset_asks_for_the_split(tmp_path):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'README.md').write_text('---\nlicense: mit\n---\n# Card')
    for name in ('train-00000-of-00002.jsonl', 'train-00001-of-00002.jsonl',
                 'test-00000-of-00001.jsonl'):
        (tmp_path / 'data' / name).write_text(json.dumps({'text': name}) + '\n')
    with pytest.raises(ValueError, match=r'several splits \(test, train\).*--split=train'):
        list_files(tmp_path)
    source = sources.open_source(prepare.Settings(str(tmp_path), split='train'), config.near)
    found = [document.text for document in source.read(None)]
    assert found == ['train-00000-of-00002.jsonl', 'train-00001-of-00002.jsonl']
    (tmp_path / 'data/test-00000-of-00001.jsonl').unlink()
    paths, (note,) = list_files(tmp_path)
    assert len(paths) == 2
    assert 'the card README.md (1)' in note


@pytest.mark.skipif(os.name == 'nt', reason='names are text there')
def test_names_that_are_not_utf8_go_through(tmp_path):
    folder = tmp_path / os.fsdecode(b'b\xfccher und mehr')
    folder.mkdir()
    documents = [f'document {i} of some words' for i in range(200)]
    write(folder / 'a.jsonl', 'jsonl', documents)
    out = prepare.prepare(prepare.Settings(str(folder), 'bpe:300', val_frac=0.2,
                                           out_dir=str(tmp_path / 'out')))
    data = prepare.TokenData(out)
    assert sum(about['documents'] for about in data.meta['splits'].values()) == 200
    assert data.meta['source']['path'] == str(folder)


def test_many_files_cost_no_more_than_in_proportion(tmp_path):
    """Operations are counted, not seconds: each file's begin is looked up, not summed up"""
    for i in range(300):
        (tmp_path / f'{i:03}.txt').write_text(f'text {i}')
    paths, _ = list_files(tmp_path)
    source = Files('mine', paths, 'text', str(tmp_path))
    assert source.begins[-1] == sum(path.stat().st_size for path in paths)
    done = []
    for _ in source.read(None):
        done.append(source.done)
    assert done == source.begins[1:]
