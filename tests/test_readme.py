"""What the README shows: its changes to model.py work as they stand there, and its links lead
somewhere."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

import train

HERE = Path(train.__file__).resolve().parent
README = (HERE / 'README.md').read_text(encoding='utf-8')
DIFFS = re.findall(r'```diff\n(.*?)```', README, re.S)


def applied(diff, text):
    """text with the lines of a diff that begin with + in the place of those that begin with -"""
    old = []
    new = []
    for line in diff.splitlines():
        if line.startswith('-'):
            old.append(line[1:])
        else:
            assert line.startswith('+'), line
            new.append(line[1:])
    old = '\n'.join(old)
    assert text.count(old) == 1
    return text.replace(old, '\n'.join(new))


@pytest.fixture
def changed(tmp_path):
    """-> what runs code beside a model.py with a diff of the README applied"""
    def changed(diff, *replacements, code):
        text = applied(diff, (HERE / 'model.py').read_text(encoding='utf-8'))
        for old, new in replacements:
            assert text.count(old) == 1
            text = text.replace(old, new)
        (tmp_path / 'model.py').write_text(text, encoding='utf-8')
        (tmp_path / 'nanoseek').symlink_to(HERE / 'nanoseek')
        done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr
    return changed


def test_another_attention_is_a_class_and_its_name(changed):
    changed(DIFFS[0], ("Literal['gqa', 'mla', 'linear']", "Literal['gqa', 'mla', 'linear', 'sliding']"),
            code="""
import torch
from model import Config, Transformer
torch.manual_seed(0)
model = Transformer(Config(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                           attention='sliding', max_position_embeddings=256, initializer_range=0.3))
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


def test_another_balancing_rule_is_a_line(changed):
    changed(DIFFS[1], code="""
import torch
from model import Config, Transformer
model = Transformer(Config(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                           n_routed_experts=4, bias_update_speed=0.1))
model.update_router_bias(torch.tensor([[10, 10, 20, 0]]))
bias = model.moe_layers[0].gate.e_score_correction_bias
assert torch.allclose(bias, torch.tensor([0.0, 0.0, -0.1, 0.1])), bias
""")


def test_links_lead_somewhere():
    for page in (HERE / 'README.md', *(HERE / 'docs').glob('*.md')):
        text = page.read_text(encoding='utf-8')
        for link in re.findall(r'\]\((?!http|#)([^)]+)\)', text):
            assert (page.parent / link).exists(), (page.name, link)


def test_every_config_is_in_the_table():
    for file in (HERE / 'config').glob('[!_]*.py'):
        assert f'(config/{file.name})' in README, file.name
