"""Tests of nanoseek/tokenizer.py and of how prepare.py treats a document that a tokenizer cannot
take: it is named, left out where that is asked for, and costs nothing that was done before."""
import json
import os
import random

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

import prepare
from nanoseek import sources
from nanoseek import tokenizer as own
from nanoseek.tokenizer import Encoder, cut, decode, encode, load_tokenizer, lost_bytes
from support import asset

WORDS = 'the cat sat on a mat while rain fell over quiet hills and nobody came'.split()


def words(count, seed=0):
    return ' '.join(random.Random(seed).choices(WORDS, k=count))


def bpe_of_bytes(folder, change=None):
    """A folder with the tokenizer.json of a BPE of bytes, changed by change(tokenizer)"""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = own.byte_level(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.add_special_tokens(['<|endoftext|>'])
    if change:
        change(tokenizer)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / 'tokenizer.json'))
    return folder


def write_corpus(path, documents):
    with open(path, 'w', encoding='utf-8') as f:
        for text in documents:
            f.write(json.dumps({'text': text}) + '\n')
    return path


def run(path, out, **settings):
    settings = {'source': str(path), 'val_frac': 0.2, 'out_dir': str(out), **settings}
    return prepare.TokenData(prepare.prepare(prepare.Settings(**settings)))


# ---------------------------------------------------------------------------- without spaces

@pytest.mark.parametrize('text', ['ACGT' * 300_000, ' ' * 700_000, '\n' * 300_000,
                                  'é' * 300_000 + ' ' + 'ü' * 300_000], ids=len)
@pytest.mark.parametrize('blocks', [1, 1000])
def test_a_text_without_a_place_to_cut_is_cut_all_the_same(text, blocks):
    size = len(text) // blocks + 1
    pieces = list(cut(None, [text[i:i + size] for i in range(0, len(text), size)]))
    assert ''.join(pieces) == text
    assert max(map(len, pieces)) <= own.LONGEST


def test_pieces_of_a_usual_text_give_the_ids_of_the_whole_in_any_blocks():
    text = words(40_000)
    tokenizer = own.train_bpe(300, [text[:50_000]])
    pieces = list(cut(tokenizer, [text]))
    assert len(pieces) > 4
    assert list(cut(tokenizer, [text[:100_001], text[100_001:]])) == pieces
    ids = [i for piece in pieces for i in encode(tokenizer, piece)]
    assert ids == encode(tokenizer, text)


def test_a_bpe_is_trained_on_short_words_and_usual_texts_are_as_they_were():
    chinese = '日本語中文' * 200 + '，' + '没有空格' * 300 + '。'    # no white space
    texts = [words(1000), 'a' * 999 + ' ' + 'b' * 999, chinese * 20, ('x' * 2000 + '\n') * 9]
    assert list(own.short_words(texts)) == texts
    dna = ''.join(random.Random(0).choices('ACGT', k=100_000))
    pieces = list(own.short_words([dna, ' ' * 5000]))
    assert ''.join(pieces) == dna + ' ' * 5000
    assert max(map(len, pieces)) == own.WORD
    assert own.train_bpe(512, [dna]).get_vocab_size() == 512


@pytest.mark.slow
@pytest.mark.parametrize('name', ['char', 'bpe:300', 'gpt2'])
@pytest.mark.parametrize('text', ['ACGT' * 100_000, 'word' + ' ' * 300_000 + 'word' * 100],
                         ids=['dna', 'spaces'])
def test_a_text_without_spaces_comes_back(tmp_path, monkeypatch, name, text):
    if name == 'gpt2':
        monkeypatch.setenv('TIKTOKEN_CACHE_DIR', asset('tiktoken'))
    (tmp_path / 'a.txt').write_text(text)
    data = run(tmp_path / 'a.txt', tmp_path / 'out', tokenizer=name, test_frac=0)
    tokenizer = load_tokenizer(tmp_path / 'out')
    assert ''.join(decode(tokenizer, data.splits[split][:]) for split in data.splits) == text


def test_ids_of_characters_are_those_of_the_tokenizer(tmp_path):
    text = 'Grüße, 日本語 \U0001f642\n\x00' * 50
    tokenizer = own.char_tokenizer(set(text))
    tokenizer.add_special_tokens(['<|endoftext|>'])
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    encoder = Encoder(tmp_path, 'char')
    ids, = encoder.encode([text], check=False)
    assert ids.tolist() == encode(tokenizer, text)
    for other in ('x', '\U0001f643', '\uffff'):
        with pytest.raises(ValueError, match=f'U\\+{ord(other):04X}'):
            encoder.encode([f'Grüße{other}'], check=False)


# --------------------------------------------------------------- what is known to lose nothing

def added(*tokens):
    def change(tokenizer):
        tokenizer.add_tokens(list(tokens))
    return change


def part(name, value):
    def change(tokenizer):
        setattr(tokenizer, name, value)
    return change


def dropout(tokenizer):
    tokenizer.model.dropout = 0.5


CHANGES = {
    'strips': (added(AddedToken('<|user|>', rstrip=True, special=False)), '<|user|>\n\n  hello'),
    'no bytes': (added(AddedToken('đem', special=False)), 'the đem was there'),
    'special strips': (lambda t: t.add_special_tokens([AddedToken('<|x|>', lstrip=True)]), 'a'),
    'lowercase': (part('normalizer', normalizers.Lowercase()), 'Some Words'),
    'whitespace': (part('pre_tokenizer', pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)])),
        'some  words'),
    'prefix': (part('pre_tokenizer', pre_tokenizers.ByteLevel(add_prefix_space=True)), 'word'),
    'decoder': (part('decoder', decoders.Fuse()), 'Grüße'),
    'twice': (part('pre_tokenizer', pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False)] * 2)), 'Grüße'),
    'dropout': (dropout, 'a')}


@pytest.mark.parametrize('name', CHANGES)
def test_every_text_is_checked_where_anything_may_lose_some(tmp_path, name):
    change, text = CHANGES[name]
    assert lost_bytes(load_tokenizer(bpe_of_bytes(tmp_path / 'plain'))) == b''
    folder = bpe_of_bytes(tmp_path / 'changed', change)
    assert lost_bytes(load_tokenizer(folder)) is None
    encoder = Encoder(folder, 'mine')
    tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if tokenizer.decode(ids, skip_special_tokens=False) != text:
        with pytest.raises(ValueError, match='does not give the text back'):
            encoder.encode([text], check=False)


def test_text_that_an_added_token_would_lose_behind_the_first_megabyte_is_named(tmp_path):
    folder = bpe_of_bytes(tmp_path / 'tok', CHANGES['strips'][0])
    documents = [words(400, i) for i in range(1000)]
    documents[900] = '<|user|>\n\n    ' + documents[900]
    path = write_corpus(tmp_path / 'a.jsonl', documents)
    with pytest.raises(ValueError, match='a.jsonl, line 901: .*does not give the text back'):
        run(path, tmp_path / 'out', tokenizer=str(folder), workers=1)


# ---------------------------------------------------------- documents that a tokenizer refuses

@pytest.fixture
def few_letters(tmp_path):
    """A tokenizer of the letters of WORDS, and 300 documents, of which two have others."""
    tokenizer = own.char_tokenizer(set(' '.join(WORDS)))
    tokenizer.add_special_tokens(['<|endoftext|>'])
    (tmp_path / 'tok').mkdir()
    tokenizer.save(str(tmp_path / 'tok/tokenizer.json'))
    documents = [words(300, i) for i in range(300)]
    documents[170] += ' Z'
    documents[250] += ' Q'
    return tmp_path / 'tok', documents, write_corpus(tmp_path / 'a.jsonl', documents)


@pytest.mark.parametrize('workers', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_document_that_cannot_be_tokenized_is_named_or_skipped(tmp_path, few_letters, workers):
    tok, documents, path = few_letters
    settings = {'tokenizer': str(tok), 'workers': workers}
    with pytest.raises(ValueError, match=r"a.jsonl, line 171: character 'Z' .U\+005A.*skip"):
        run(path, tmp_path / 'out', **settings)
    data = run(path, tmp_path / 'out', **settings, bad_documents='skip')
    assert data.meta['left_out'] == {'bad': 2, 'duplicates': 0}
    tokenizer = load_tokenizer(tmp_path / 'out')
    found = ''.join(decode(tokenizer, data.splits[split][:]) for split in data.splits)
    good = [text for i, text in enumerate(documents) if i not in (170, 250)]
    assert sorted(found.split('<|endoftext|>')[:-1]) == sorted(good)
    good_path = write_corpus(tmp_path / 'good.jsonl', good)
    clean = run(good_path, tmp_path / 'clean', **settings)
    for split in clean.splits:
        assert np.array_equal(data.splits[split][:], clean.splits[split][:])


def test_what_was_done_before_such_a_document_is_kept(tmp_path, few_letters, monkeypatch):
    tok, _, path = few_letters
    monkeypatch.setattr(prepare, 'SAVE_SECONDS', 0)
    monkeypatch.setattr(prepare, 'BATCH', 50_000)
    settings = {'tokenizer': str(tok), 'workers': 1}
    with pytest.raises(ValueError, match='line 171.*with that it goes on'):
        run(path, tmp_path / 'out', **settings)
    kept = json.loads((tmp_path / 'out/.partial/progress.json').read_text())
    assert sum(of_split['tokens'] for of_split in kept['splits'].values()) > 150_000
    data = run(path, tmp_path / 'out', **settings, bad_documents='skip')
    whole = run(path, tmp_path / 'whole', **settings, bad_documents='skip')
    assert data.meta['crc32'] == whole.meta['crc32']
    assert data.meta['left_out']['bad'] == 2


def test_an_error_of_a_library_is_one_of_its_text(tmp_path, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', asset('tiktoken'))
    import tiktoken
    own.gpt2_tokenizer().save(str(tmp_path / 'tokenizer.json'))
    encoder = Encoder(tmp_path, 'gpt2')
    gpt2 = tiktoken.get_encoding('gpt2')
    encoder.tiktoken = tiktoken.Encoding(               # which tries all ways to read 100 a's
        'slow', pat_str=r'(?:a|aa)+(?=c)b|[^a]+|a', special_tokens={},
        mergeable_ranks=gpt2._mergeable_ranks)
    texts = ['one', 'a' * 100, 'two']
    (one, _), (nothing, problem), (two, _) = encoder.encode_each(texts, check=False)
    assert (one.tolist(), two.tolist()) == (gpt2.encode('one'), gpt2.encode('two'))
    assert nothing is None and 'backtracking' in problem
    with pytest.raises(BaseException) as e:             # a panic in Rust is no Exception
        gpt2.encode_ordinary('a' + ' ' * 1_200_000 + 'b')
    assert own.is_of_text(e.value)


def test_a_lack_of_memory_is_no_error_of_a_text():
    assert not own.is_of_text(MemoryError())
    assert not own.is_of_text(KeyboardInterrupt())
    assert own.is_of_text(RecursionError()) and own.is_of_text(ValueError())


@pytest.mark.slow
@pytest.mark.parametrize('die_at', [None, 1, 3, 5])
def test_a_long_document_that_cannot_be_tokenized_to_its_end_is_left_out_whole(
        tmp_path, few_letters, monkeypatch, die_at):
    """It comes in pieces, of which some are in the files by then. die_at: it is stopped behind so
    many notes, and goes on"""
    tok, documents, _ = few_letters
    monkeypatch.setattr(prepare, 'SAVE_SECONDS', 0)
    monkeypatch.setattr(prepare, 'BATCH', 60_000)
    monkeypatch.setattr(sources, 'WHOLE', 100_000)
    folders = []
    for name in ('with', 'without'):
        folders.append(tmp_path / name / 'corpus')
        folders[-1].mkdir(parents=True)
        for i, text in enumerate(documents[:20]):
            if i == 7:
                text = words(80_000, 7) + (' Z ' * (name == 'with'))
            if i != 9 or name == 'with':
                (folders[-1] / f'{i:02}.txt').write_text(text if i != 9 else words(60_000) + ' Z')
    os.remove(folders[1] / '07.txt')
    settings = {'tokenizer': str(tok), 'workers': 1, 'shard_tokens': 100_000,
                'bad_documents': 'skip'}
    if die_at:
        save, notes = prepare.Progress.save, []

        def deadly(progress):
            save(progress)
            notes.append(1)
            if len(notes) == die_at:
                raise KeyboardInterrupt
        with monkeypatch.context() as patch:
            patch.setattr(prepare.Progress, 'save', deadly)
            with pytest.raises(KeyboardInterrupt):
                run(folders[0], tmp_path / 'out', **settings)
    data = run(folders[0], tmp_path / 'out', **settings)
    clean = run(folders[1], tmp_path / 'clean', **settings)
    assert data.meta['left_out'] == {'bad': 2, 'duplicates': 0}
    assert data.meta['crc32'] == clean.meta['crc32']
    assert data.meta['splits'] == clean.meta['splits']
    data.check(checksums=True)


def test_a_document_behind_the_wanted_tokens_is_of_no_interest(tmp_path, few_letters):
    tok, documents, path = few_letters
    tokens = sum(len(text) + 1 for text in documents[:160])
    data = run(path, tmp_path / 'out', tokenizer=str(tok), workers=1, tokens=tokens)
    assert sum(data.tokens(split) for split in data.splits) == tokens


# -------------------------------------------------------------- a last resort keeps the text

def test_a_tokenizer_that_adds_a_space_to_every_piece_is_never_given_one_too_few(tmp_path):
    """As Llama 2's: both sides of any cut would come back with a space between them"""
    letters = {letter: i for i, letter in enumerate('\u2581ACGT')}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend('\u2581'), normalizers.Replace(' ', '\u2581')])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace('\u2581', ' '), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    text = ''.join(random.Random(0).choices('ACGT', k=600_000))
    pieces = list(cut(tokenizer, [text[:1000], text[1000:]]))
    assert ''.join(pieces) == text
    ids = [i for piece in pieces for i in encode(tokenizer, piece)]
    assert decode(tokenizer, ids) == text


def test_a_tokenizer_gets_no_more_than_so_many_characters_at_a_time():
    texts = [f'{i}' * 30_000 for i in range(10)] * 10
    found = list(own.groups(texts))
    assert [text for group in found for text in group] == texts
    assert max(sum(map(len, group)) for group in found) < own.GROUP + 30_001
