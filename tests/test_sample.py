"""Tests of sample.py. The reference for chat templates is transformers."""
import random
import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import sample
from conftest import asset
from model import Config, Transformer
from nanoseek import hf, settings
from nanoseek.chat import Chat
from nanoseek.tokenizer import load_tokenizer

TEMPLATES = [
    '{% for m in messages %}<{{ m.role }}>{{ m["content"] }}{{ eos_token }}{{ pad_token }}'
    '{% endfor %}'
    '{% if add_generation_prompt %}<assistant>{% endif %}',
    '{{ bos_token }}\n{%- for m in messages %}\n  {% if m.role == "user" %}\n'
    '[INST] {{ m.content | trim }} [/INST]\n  {% endif %}\n{% endfor %}\n',
    '{% for m in messages %}{% generation %}{{ m | tojson(indent=2) }}\n{%- endgeneration %}\n'
    '{%- break %}{%- endfor %}{{ messages | tojson }}{{ strftime_now("%Y") }}']


def run(options, *more):
    given, = settings.load(sample.Settings, argv=[*options.split(), *more])
    sample.main(sample.Settings(**given))


@pytest.fixture
def folder(tmp_path):
    """A model of bytes with random weights and MTP layers"""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(['<s>', '</s>'])
    torch.manual_seed(1)
    model = Transformer(Config(vocab_size=258, hidden_size=32, num_hidden_layers=1,
                               num_attention_heads=2, max_position_embeddings=64, bos_token_id=256,
                               eos_token_id=257, num_nextn_predict_layers=2))
    model.save_pretrained(tmp_path)
    hf.write_companions(tmp_path, tokenizer, model.config, {})
    return tmp_path


@pytest.mark.parametrize('text', TEMPLATES)
def test_templates_are_rendered_as_in_transformers(folder, text):
    transformers = pytest.importorskip('transformers')
    messages = [{'role': 'user', 'content': ' Grüße & <b>"quotes"</b>\n'}]
    values = {**hf.read_json(folder / 'tokenizer_config.json'), 'pad_token': None}
    for template in (text, 'no'):
        hf.write_json(folder / 'tokenizer_config.json', {**values, 'chat_template': template})
        if template == 'no':                                # the file comes first
            (folder / 'chat_template.jinja').write_text(text)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        tokenizer = load_tokenizer(folder)
        assert Chat(folder, tokenizer).render(messages, True) == expected != 'no'


@pytest.mark.parametrize('template, words', [
    ('{{ raise_exception("no system") }}', 'no system'), ('{% for %}', 'TemplateSyntaxError'),
    ('{{ messages[0].content + 1 }}', 'TypeError'), ('{{ messages.append(1) }}', 'SecurityError')])
def test_a_template_that_fails_is_an_error_in_words(folder, template, words):
    (folder / 'chat_template.jinja').write_text(template)
    with pytest.raises(ValueError, match=f'chat template of .*{words}'):
        run(f'--checkpoint={folder} --chat --prompt=a')


def test_special_tokens_in_texts_are_tokens(folder):
    _, tokenizer = sample.load(folder, sample.Settings(device='cpu'))
    assert sample.encode(tokenizer, '<s>a')[0] == 256


@pytest.mark.slow
def test_smollm2_answers_by_its_own_template(capsys):
    run(f'--checkpoint={asset("smollm2")} --chat --temperature=0 --prompt',
        'What is the capital of France?')
    assert capsys.readouterr().out == 'The capital of France is Paris.\n'


@pytest.mark.parametrize('options, words', [
    ('--chat', 'has no chat template'),
    ('--temperature=-1', 'temperature=-1 on the command line: must be at least 0'),
    ('--top_k=0', 'top_k=0: must be at least 1'), (f'--prompt={"a" * 64}', 'must be 1 to 63'),
    ('--checkpoint=nobody/nothing', 'not a folder, and not available on the Hub')])
def test_mistakes_are_errors_in_words(folder, monkeypatch, options, words):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(ValueError, match=words):
        run(f'--checkpoint={folder} {options}')


def test_drafts_change_no_greedy_text(folder, capsys):
    options = f'--checkpoint={folder} --temperature=0 --max_new_tokens=40'
    run(options)
    drafted = capsys.readouterr()
    run(f'{options} --speculate=false')
    plain = capsys.readouterr()
    assert drafted.out == plain.out
    assert re.search(r'tokens/s, \d+% of \d+ drafts accepted\n$', drafted.err)
    assert plain.err.endswith('tokens/s\n')


def test_pieces_are_the_text_even_if_bytes_are_none():
    """By a tokenizer as Llama 2's: bytes become characters only if all of a row are UTF-8"""
    pieces = ['<unk>', *(f'<0x{b:02X}>' for b in range(256)), '▁', *'theword']
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token='<unk>', byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(' ', 1, 0)])
    rng = random.Random(0)
    for _ in range(200):
        ids = rng.choices(range(1, len(vocab)), k=30)
        ids[20:20] = [vocab[f'<0x{b:02X}>'] for b in '東'.encode()]
        assert ''.join(sample.complete_pieces(tokenizer, [], ids)) == sample.decode(tokenizer, ids)


def test_a_prompt_begins_as_in_transformers(folder):
    transformers = pytest.importorskip('transformers')
    model, tokenizer = sample.load(folder, sample.Settings(device='cpu'))
    tokenizer.post_processor = processors.TemplateProcessing(
        single='<s> $A', special_tokens=[('<s>', 256)])
    hf.write_companions(folder, tokenizer, model.config, {})
    assert hf.read_json(folder / 'tokenizer_config.json')['add_bos_token']
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    _, tokenizer = sample.load(folder, sample.Settings(device='cpu'))
    ids = sample.encode(tokenizer, 'abc')
    assert ids == theirs('abc')['input_ids'] and ids[0] == 256


def test_the_newest_checkpoint_under_out_is_the_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/a').symlink_to(tmp_path / 'disk')
    for name in ('out/b/step-000002', 'out/a/step-000001'):
        hf.save_pretrained(Transformer(Config(vocab_size=8)), name)
    assert str(sample.find_checkpoint('')) == 'out/a/step-000001'


def test_a_conversation_goes_on_line_by_line(folder, monkeypatch, capsys):
    (folder / 'chat_template.jinja').write_text(TEMPLATES[0])
    lines = ['One', 'Two']
    asked = []

    def user(prompt):
        if not lines:
            raise EOFError
        return lines.pop(0)

    def watched(chat, messages):
        asked.append([tuple(message.values()) for message in messages])
        return list(range(10))

    monkeypatch.setattr('builtins.input', user)
    monkeypatch.setattr(Chat, 'prompt', watched)
    run(f'--checkpoint={folder} --chat --max_new_tokens=5 --device=cpu')
    first, second = asked
    answer = second[1][1]
    assert first == [('user', 'One')]
    assert second == [('user', 'One'), ('assistant', answer), ('user', 'Two')]
    assert answer and capsys.readouterr().out.startswith(answer)
