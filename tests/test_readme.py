"""Tests of what the README and docs/ show: changes to model.py work as they stand there, commands
have options that exist, links lead somewhere."""
import importlib
import re
import subprocess
import sys
from dataclasses import fields

import pytest

from conftest import ROOT
from model import Config

README = (ROOT / 'README.md').read_text(encoding='utf-8')
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
DIFFS = re.findall(r'```diff\n(.*?)```', README, re.S)


def replace(text, old, new):
    assert text.count(old) == 1, old
    return text.replace(old, new)


def applied(diff, text):
    """Put the lines of a diff that begin with + in the place of those that begin with -."""
    lines = diff.splitlines()
    assert all(line[0] in '+-' for line in lines)
    old, new = ([line[1:] for line in lines if line[0] == sign] for sign in '-+')
    return replace(text, '\n'.join(old), '\n'.join(new))


def check(folder, text, code):
    """Run code beside a model.py with this text."""
    (folder / 'model.py').write_text(text, encoding='utf-8')
    (folder / 'nanoseek').symlink_to(ROOT / 'nanoseek')
    done = subprocess.run([sys.executable, '-c', code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_another_attention_is_a_class_and_its_name(tmp_path):
    text = applied(DIFFS[0], (ROOT / 'model.py').read_text(encoding='utf-8'))
    text = replace(text, "'gqa', 'mla', 'linear']", "'gqa', 'mla', 'linear', 'sliding']")
    check(tmp_path, text, """
import torch
from model import Config, Transformer
torch.manual_seed(0)
model = Transformer(Config(vocab_size=50, hidden_size=32, num_hidden_layers=1,
                           num_attention_heads=2, attention='sliding', initializer_range=0.3,
                           max_position_embeddings=256))
model.eval()
idx = torch.randint(50, (1, 100))
other = idx.clone()
other[0, 20] = (idx[0, 20] + 1) % 50
difference = (model(idx)[0] - model(other)[0]).abs().amax(-1)[0]
seen = (difference > 0).nonzero()[:, 0].tolist()
assert seen == list(range(20, 20 + 64)), seen
slow = idx
for _ in range(8):
    slow = torch.cat((slow, model(slow)[0][:, -1:].argmax(-1)), 1)
assert model.generate(idx, 8).equal(slow)
""")


def test_another_balancing_rule_is_a_line(tmp_path):
    text = applied(DIFFS[1], (ROOT / 'model.py').read_text(encoding='utf-8'))
    check(tmp_path, text, """
import torch
from model import Config, Transformer
model = Transformer(Config(vocab_size=50, hidden_size=32, num_hidden_layers=1,
                           num_attention_heads=2, n_routed_experts=4, bias_update_speed=0.1))
model.update_router_bias(torch.tensor([[10, 10, 20, 0]]))
bias = model.moe_layers[0].gate.e_score_correction_bias
assert torch.allclose(bias, torch.tensor([0.0, 0.0, -0.1, 0.1])), bias
""")


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_commands_have_options_and_configs_that_exist(page):
    text = page.read_text(encoding='utf-8').replace('\\\n', ' ')
    for script, rest in re.findall(r'^    (?:python|torchrun) .*?\b(\w+)\.py(.*)', text, re.M):
        if (ROOT / f'{script}.py').is_file():           # not one of docs/
            classes = [importlib.import_module(script).Settings]
            if script.startswith(('train', 'bench')):
                classes.append(Config)
            names = {field.name for cls in classes for field in fields(cls)}
            assert set(re.findall(r'\s--(\w+)', rest)) <= names, rest
        for config in re.findall(r'config/\w+\.py', rest):
            assert (ROOT / config).is_file(), config


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r'\]\((?!http|#)([^)#]+)', page.read_text(encoding='utf-8')):
        assert (page.parent / link).exists(), link


def test_every_config_is_in_the_table():
    for file in (ROOT / 'config').glob('*.py'):
        assert f'(config/{file.name})' in README, file.name
