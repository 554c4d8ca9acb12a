"""Tests of nanoseek/tokenizer.py against tiktoken, transformers and tokenizers themselves."""
import functools
import random

import pytest
from tokenizers import (AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers,
                        processors)

from conftest import asset
from nanoseek import tokenizer as ours
from nanoseek.tokenizer import Encoder, cut, decode, encode, load_tokenizer

WORDS = 'the cat sat on a mat, while rain fell over quiet hills and _nobody_ came.\n'.split(' ')
NASTY = ('One\ufeff\r\ntwo\rthree\n\n\n  four\t\x00five caf\u00e9 cafe\u0301 \u65e5\u672c\u8a9e '
         "\U0001f642\U0001f468\u200d\U0001f469 \u00a0 x = 12345;   don't \u2028 end \n ")


def words(count, seed=0):
    return ' '.join(random.Random(seed).choices(WORDS, k=count))


def bpe_of_bytes(change=None):
    """Return a BPE of bytes, changed by change(tokenizer)."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = ours.byte_level(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.add_special_tokens(['<|endoftext|>'])
    if change:
        change(tokenizer)
    return tokenizer


@functools.cache
def load(name):
    if name == 'gpt2':
        return ours.gpt2_tokenizer()
    if name == 'smollm2':
        return load_tokenizer(asset('smollm2'))
    return ours.train_bpe(400, [words(40_000), NASTY])


@pytest.fixture(autouse=True)
def tiktoken_cache(monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', asset('tiktoken'))


# -------------------------------------------------------------------------- the right ids

def test_gpt2_ids_are_tiktokens_for_any_character():
    import tiktoken
    rng = random.Random(1)
    points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    joints = ('', ' ', 'a', '1', '.', '\n', '  ')
    parts = [rng.choice(joints) + chr(c) for c in rng.sample(points, 20000)]
    text = ''.join(parts) + NASTY
    reference = tiktoken.get_encoding('gpt2')
    tokenizer = load('gpt2')
    assert encode(tokenizer, text) == reference.encode_ordinary(text)
    assert tokenizer.token_to_id('<|endoftext|>') == reference.eot_token



@pytest.mark.parametrize('name', ['bpe', 'gpt2', 'smollm2'])
def test_a_long_text_in_pieces_has_the_ids_of_the_whole(name):
    tokenizer = load(name)
    texts = [words(40_000), NASTY * 1500, '\u65e5\u672c\u8a9e\u3002\u4e2d\u6587' * 30_000,
             'x = foo_(bar_1)._2;\n' * 6000]
    made = Encoder(tokenizer, name).encode(texts)
    for text, ids in zip(texts, made):
        assert len(list(cut(text))) > 2
        assert ids.tolist() == encode(tokenizer, text)


@pytest.mark.parametrize('name', ['bpe', 'gpt2', 'smollm2', 'char'])
@pytest.mark.parametrize('text', ['ACGT' * 50_000, 'word' + ' ' * 300_000 + 'word', '\n' * 100_000],
                         ids=['dna', 'spaces', 'lines'])
def test_a_text_without_a_place_to_cut_comes_back(name, text):
    tokenizer = ours.char_tokenizer(set(text)) if name == 'char' else load(name)
    assert ''.join(cut(text)) == text
    ids, = Encoder(tokenizer, name).encode([text])
    assert decode(tokenizer, ids) == text


def test_ids_of_characters_are_those_of_the_tokenizer():
    text = 'Grüße, 日本語 \U0001f642\n\x00' * 50
    tokenizer = ours.char_tokenizer(set(text))
    tokenizer.add_special_tokens(['<|endoftext|>'])
    ids, = Encoder(tokenizer, 'char').encode([text])
    assert ids.tolist() == encode(tokenizer, text)
    ids, problem, same = Encoder(tokenizer, 'char').encode([text, 'Grüx', text])
    assert ids.tolist() == same.tolist()
    assert "character 'x' is not in the vocabulary" in str(problem)
    with pytest.raises(ValueError, match="character 'x' is not in the vocabulary"):
        encode(tokenizer, 'Grüx')



# ------------------------------------------------------------------ a text that does not come back

def added(*tokens):
    return lambda tokenizer: tokenizer.add_tokens(list(tokens))


def part(name, value):
    return lambda tokenizer: setattr(tokenizer, name, value)


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
CHANGES = {
    'strips': (added(AddedToken('<|user|>', rstrip=True, special=False)), '<|user|>\n\n  hello'),
    'no bytes': (added(AddedToken('đem', special=False)), 'the đem was there'),
    'lowercase': (part('normalizer', normalizers.Lowercase()), 'Some Words'),
    'whitespace': (part('pre_tokenizer', pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), BYTES])), 'some  words'),
    'decoder': (part('decoder', decoders.Fuse()), 'Grüße'),
    'few bytes': (part('model', models.BPE({'a': 0, 'b': 1}, [])), 'abc')}


@pytest.mark.parametrize('name', CHANGES)
def test_a_text_that_does_not_come_back_is_a_problem_of_its_own(name):
    change, text = CHANGES[name]
    encoder = Encoder(bpe_of_bytes(change), 'mine')
    problem, = encoder.encode([text])
    assert 'does not give the text back' in str(problem)
    if name != 'whitespace':                    # it changes every text: the first shows it
        good, bad = encoder.encode(['a', text], check=False)
        assert len(good) and isinstance(bad, ValueError)


def test_a_tokenizer_that_adds_a_space_gets_whole_texts():
    """Llama 2's: both sides of any cut would come back with a space between them."""
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate('\u2581ACGT')}, []))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend('\u2581'), normalizers.Replace(' ', '\u2581')])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace('\u2581', ' '), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    text = ''.join(random.Random(0).choices('ACGT', k=200_000))
    ids, = Encoder(tokenizer, 'llama').encode([text])
    assert decode(tokenizer, ids) == text


# ------------------------------------------------------------------------------ what is loaded

def test_a_whole_text_gets_what_its_tokenizer_adds_and_is_not_cut_off(tmp_path):
    tokenizer = bpe_of_bytes()
    tokenizer.post_processor = processors.TemplateProcessing(
        single='<|endoftext|> $A', pair='$A $B', special_tokens=[('<|endoftext|>', 256)])
    tokenizer.enable_truncation(7)
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    ids = encode(load_tokenizer(tmp_path), 'twelve bytes')
    assert (len(ids), ids[0]) == (13, 256)
    assert encode(load_tokenizer(tmp_path), 'twelve bytes', whole=False) == ids[1:]


@pytest.mark.parametrize('name', ['bpe', 'gpt2'])
def test_transformers_reads_our_tokenizers(tmp_path, name):
    transformers = pytest.importorskip('transformers')
    tokenizer = load(name)
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / 'tokenizer.json'))
    assert theirs(NASTY)['input_ids'] == encode(tokenizer, NASTY)
    assert theirs.decode(theirs(NASTY)['input_ids']) == NASTY
