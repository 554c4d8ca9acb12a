"""Tests of sample.py and nanoseek/chat.py. What needs SmolLM2-135M-Instruct looks in the folder
$NANOSEEK_ASSETS (smollm2/) and is skipped without it."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import sample
from model import Config, Transformer
from nanoseek import chat, folders
from support import asset

HERE = Path(sample.__file__).resolve().parent

TEMPLATES = {
    'roles': "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}"
             '{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}',
    'blocks': '{{ bos_token }}\n{%- for m in messages %}\n  {% if m.role == "user" %}\n'
              '[INST] {{ m.content | trim }} [/INST]\n  {% endif %}\n{% endfor %}\n',
    'json': '{{ messages | tojson }}{{ messages | tojson(indent=2) }}',
    'loop': '{% for m in messages %}{% if m.content == "" %}{% break %}{% endif %}'
            '{{ m.content }}{% endfor %}',
    'generation': "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
                  '\n{%- endfor %}'}


def run(*args, **settings):
    return subprocess.run([sys.executable, HERE / 'sample.py', *map(str, args)], text=True,
                          capture_output=True, timeout=120, **settings)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A model of bytes with random weights, and two special tokens."""
    folder = tmp_path_factory.mktemp('model')
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(['<s>', '</s>'])
    torch.manual_seed(1)
    config = Config(vocab_size=258, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                    attention='gqa', max_position_embeddings=64, bos_token_id=256,
                    eos_token_id=257)
    Transformer(config).save_pretrained(folder)
    folders.write_companions(folder, tokenizer, config, {})
    return folder


# ------------------------------------------------------------------------------------- chat

@pytest.mark.parametrize('template', TEMPLATES)
@pytest.mark.parametrize('place', ['file', 'tokenizer_config', 'list'])
def test_templates_are_rendered_as_in_transformers(folder, tmp_path, template, place):
    transformers = pytest.importorskip('transformers')
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    text = TEMPLATES[template]
    values = json.loads((tmp_path / 'tokenizer_config.json').read_text())
    if place == 'file':
        (tmp_path / 'chat_template.jinja').write_text(text)
    elif place == 'tokenizer_config':
        values['chat_template'] = text
    else:
        values['chat_template'] = [{'name': 'tool_use', 'template': 'no'},
                                   {'name': 'default', 'template': text}]
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(values))
    messages = [{'role': 'user', 'content': ' Grüße & <b>"quotes"</b>\n'}]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    wanted = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat.render(tmp_path, messages) == wanted


@pytest.mark.slow
def test_smollm2_is_asked_by_its_own_template():
    transformers = pytest.importorskip('transformers')
    folder = asset('smollm2')
    messages = [{'role': 'user', 'content': 'What is the capital of France?'}]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True)['input_ids']
    settings = sample.Settings(prompt=messages[0]['content'], chat=True)
    tokenizer = sample.load_tokenizer(folder)
    assert sample.encode_prompt(settings, folder, tokenizer) == wanted
    done = run(f'--checkpoint={folder}', '--chat', '--temperature=0', '--max_new_tokens=20',
               f'--prompt={messages[0]["content"]}')
    assert done.stdout == 'The capital of France is Paris.\n'


@pytest.mark.parametrize('template, words', [(None, 'has no chat template'),
                                             ('{{ raise_exception("no system") }}', 'no system'),
                                             ('{{ messages[0].content + 1 }}', 'TypeError'),
                                             ('{{ messages[9].content }}', 'UndefinedError'),
                                             ('{{ messages.append(1) }}', 'SecurityError'),
                                             ('{% for %}', 'chat template of')])
def test_a_chat_that_cannot_be_is_refused_in_words(tmp_path, template, words):
    if template:
        (tmp_path / 'chat_template.jinja').write_text(template)
    with pytest.raises(ValueError, match=words):
        chat.render(tmp_path, [{'role': 'user', 'content': 'Hello'}])


def test_a_model_without_a_template_is_one_line(folder):
    done = run(f'--checkpoint={folder}', '--chat')
    assert done.returncode == 2
    assert 'has no chat template' in done.stderr
    assert done.stderr.count('\n') == 1


@pytest.mark.parametrize('template, wanted', [
    ("{% for m in messages %}{{ m.content }}</s>\n{% endfor %}", [257]),
    ("{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s><s>{% endfor %}", [257]),
    ("{% for m in messages %}{{ m.content }}{% endfor %}", []),
    ("{% if messages[1] %}{{ raise_exception('one') }}{% endif %}", [])])
def test_an_answer_ends_where_the_template_ends_one(folder, tmp_path, template, wanted):
    (tmp_path / 'chat_template.jinja').write_text(template)
    tokenizer = sample.load_tokenizer(folder)
    tokenizer.encode_special_tokens = False
    assert chat.end_of_answer(tmp_path, tokenizer) == wanted


# ----------------------------------------------------- what goes wrong while text is generated

def test_weights_that_are_not_finite_are_one_line(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    model = Transformer.from_pretrained(folder)
    with torch.no_grad():
        model.head[5] = torch.nan
    model.save_pretrained(tmp_path)
    done = run(f'--checkpoint={tmp_path}')
    assert done.returncode == 2
    assert 'not finite' in done.stderr.splitlines()[-1]
    assert 'Traceback' not in done.stderr


def test_a_tokenizer_of_another_model_is_one_line(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = Config(vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                    attention='gqa', max_position_embeddings=64)
    Transformer(config).save_pretrained(tmp_path)
    (tmp_path / 'prompt').write_text('\u00fc', encoding='utf-8')
    done = run(f'--checkpoint={tmp_path}', f'--prompt=@{tmp_path}/prompt')
    assert done.returncode == 2
    assert 'tokenizer.json is of another model' in done.stderr
    assert done.stderr.count('\n') == 1


def test_a_lack_of_memory_is_told_from_a_bug():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert 'out of memory' in sample.in_words(caught.value)
    assert 'out of memory' in sample.in_words(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2) @ torch.ones(3)
    assert sample.in_words(caught.value) is None


# ---------------------------------------------------------------- special tokens in a prompt

def test_a_prompt_is_read_by_the_rule_of_the_models_tokenizer(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)

    def ids(**settings):
        return sample.encode_prompt(sample.Settings(prompt='<s>a', **settings), tmp_path,
                                    sample.load_tokenizer(tmp_path))
    tokenizer = sample.load_tokenizer(tmp_path)
    letters = [tokenizer.token_to_id(letter) for letter in '<s>a']
    special = [256, letters[-1]]
    assert ids() == ids(special_in_prompt=False) == letters     # the data had letters
    assert ids(special_in_prompt=True) == special
    values = json.loads((tmp_path / 'tokenizer_config.json').read_text())
    del values['split_special_tokens']
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(values))
    assert ids() == special
    assert ids(special_in_prompt=False) == letters


# --------------------------------------------------------------------- terminals and pipes

@pytest.mark.slow
@pytest.mark.parametrize('encoding', ['cp1252', 'ascii', 'utf-8'])
def test_no_letter_ends_a_text_whatever_the_terminal(folder, tmp_path, encoding):
    (tmp_path / 'prompt').write_text('日本語 Grüße', encoding='utf-8')
    done = run(f'--checkpoint={folder}', f'--prompt=@{tmp_path}/prompt', '--max_new_tokens=30',
               env={**os.environ, 'PYTHONIOENCODING': encoding}, errors='replace')
    assert done.returncode == 0
    assert 'Traceback' not in done.stderr
    assert ('\\u65e5' in done.stdout) == (encoding != 'utf-8')


@pytest.mark.slow
def test_drafts_are_made_where_the_model_can_and_shown_beside_the_speed(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    torch.manual_seed(1)
    config = Config(vocab_size=258, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                    kv_lora_rank=8, n_routed_experts=4, num_nextn_predict_layers=2,
                    max_position_embeddings=64)
    Transformer(config).save_pretrained(tmp_path)
    options = '--temperature=0', '--max_new_tokens=40'
    with_drafts = run(f'--checkpoint={tmp_path}', *options)
    without = run(f'--checkpoint={tmp_path}', *options, '--speculate=false')
    assert with_drafts.stdout == without.stdout
    assert re.search(r'tokens/s, \d+% of \d+ drafts accepted$', with_drafts.stderr.strip())
    assert without.stderr.strip().endswith('tokens/s')
    refused = run(f'--checkpoint={folder}', '--speculate=true')
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith('sample.py: speculate=true: ')


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_a_closed_pipe_none(folder):
    command = f'{sys.executable} {HERE}/sample.py --checkpoint={folder} --max_new_tokens=2000'
    full = subprocess.run(f'{command} >/dev/full', shell=True, capture_output=True, text=True)
    assert full.returncode == 2
    assert 'No space left on device' in full.stderr
    assert full.stderr.count('\n') == 2                     # with the count of parameters
    closed = subprocess.run(f'{command} | head -c 1', shell=True, capture_output=True, text=True)
    assert closed.stderr.count('\n') == 1                   # that count alone


def test_the_folder_of_a_run_means_its_newest_whole_checkpoint(folder, tmp_path):
    for step in (1, 2, 10):
        checkpoint = tmp_path / f'step-{step:06d}'
        shutil.copytree(folder, checkpoint)
        (checkpoint / 'trainer').mkdir()
        (checkpoint / 'trainer/settings.json').write_text('{}')
        (checkpoint / 'trainer/state.pt').touch()
    (tmp_path / 'step-000010/trainer/state.pt').unlink()
    assert sample.find_checkpoint(str(tmp_path)) == tmp_path / 'step-000002'
    assert sample.find_checkpoint(str(folder)) == folder
