"""Tests of nanoseek/settings.py: what a command line and config files may say, and how a user's
mistake ends."""
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from typing import Literal

import pytest

import train
from conftest import ROOT, run
from model import Config
from nanoseek import settings


@dataclass
class Kinds:
    """Of every type that a setting may have"""
    count: int = 1
    rate: float = 0.5
    flag: bool = False
    name: str = 'x'
    maybe: int | None = 3
    table: dict | None = None
    mode: Literal['auto', True, False] = 'auto'
    either: str | dict = 'x'


def load(*argv):
    return settings.load(Kinds, argv=argv)[0]


@pytest.mark.parametrize('text, value', [
    ('count=1e4', 10000), ('rate=1', 1.0), ('rate=3e-4', 3e-4),
    ('flag=true', True), ('flag=False', False), ('name=none', 'none'), ('name=-3', '-3'),
    ('name=', ''), ('name=a=b --c', 'a=b --c'), ('maybe=none', None), ('maybe=1e3', 1000),
    ('table=none', None), ("table={'factor': 4.0}", {'factor': 4.0}), ('either=12', '12'),
    ("either={'a': 0.7, 'b': 3}", {'a': 0.7, 'b': 3}), ('mode=auto', 'auto'),
    ('mode=true', True)])
def test_values_get_the_type_of_their_setting_in_both_spellings(text, value):
    name, _, word = text.partition('=')
    for given in (load(f'--{text}'), load(f'--{name}', word)):
        assert given == {name: value}
        assert type(given[name]) is type(value)


@pytest.mark.parametrize('text', [
    'count=1.5', 'count=true', 'count=none', 'count=inf', 'count=', 'rate=fast', 'rate=true',
    'flag=1', 'maybe=x', 'table=3', 'mode=2', 'mode=never'])
def test_a_value_of_another_type_is_refused(text):
    name, _, word = text.partition('=')
    with pytest.raises(ValueError, match=f'^{name}={word!r} on the command line: must be '):
        load(f'--{text}')


def test_no_number_is_below_0():
    for text in ('count=-3', 'rate=-0.5', 'maybe=-1'):
        with pytest.raises(ValueError, match=f'^{text} on the command line: must be at least 0'):
            load(f'--{text}')


@pytest.mark.parametrize('argument, words', [
    ('--cout=1', "unknown setting 'cout' on the command line, did you mean 'count'?"),
    ('--qqq=1', "unknown setting 'qqq' on the command line, did you mean '--help'?"),
    ('--count', '--count needs a value'), ('word', "unexpected argument 'word'"),
    ('my.p.py', "no config file 'my.p.py'")])
def test_what_is_not_a_setting_is_refused_with_a_suggestion(argument, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        load(argument)


def test_later_settings_win_in_files_and_on_the_command_line(tmp_path):
    a, b = str(tmp_path / 'a.py'), str(tmp_path / 'b.py')
    (tmp_path / 'a.py').write_text(
        'import math\n_half = 0.5\ncount = 1e3\nrate = _half * 2\nname = "a"')
    (tmp_path / 'b.py').write_text('from math import pi, sqrt\ndef half(x):\n    return x / 2\n'
                                   'name = "b"')
    assert load(a) == {'count': 1000, 'rate': 1.0, 'name': 'a'}
    assert load(a, b)['name'] == 'b'
    assert load(b, a, '--flag') == {**load(a), 'flag': True}
    assert load('--name=c', a)['name'] == 'a'
    assert load(a, '--name', 'c')['name'] == 'c'
    given, = settings.load(Kinds, argv=['word', a], positional='either')
    assert given == {**load(a), 'either': 'word'}


@pytest.mark.parametrize('text, words', [
    ('size = 1\n', "unknown setting 'size' in my.py"),
    ('count = "many"\n', "count='many' in my.py: must be int"),
    ('rate = 1\ncount = 1 / 0\n', 'my.py, line 2: ZeroDivisionError: division by zero'),
    ('def f(x):\n    return x / 2\nrate = f("a")\n', 'my.py, line 2: TypeError: '),
    ('import json\njson.loads("{")\n', 'my.py, line 2: JSONDecodeError: '),
    ('count = 1\nrate = = 2\n', 'my.py, line 2: SyntaxError: invalid'),
    ('count = 1\nname = "caf\xe9"\n', 'my.py, line 2: SyntaxError: (unicode error)')])
def test_a_mistake_in_a_config_file_names_its_line(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'my.py').write_text(text, encoding='latin-1')
    with pytest.raises(ValueError, match=re.escape(words)):
        load('my.py')


def test_a_path_may_begin_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    (tmp_path / 'a.py').write_text('either = "~/runs"')
    assert load('--name=~/a', str(tmp_path / 'a.py')) == {'name': '/home/me/a',
                                                          'either': '/home/me/runs'}
    assert load('--name=~') == {'name': '~'}


def test_help_has_a_line_for_every_setting(capsys):
    with pytest.raises(SystemExit) as end:
        settings.load(train.Settings, Config, argv=['--help'], usage=train.__doc__)
    assert end.value.code == 0
    rows = re.findall(r'^  --(\w+)=(.*?)  +(\S.*?)  +(\S.*)$', capsys.readouterr().out, re.M)
    names = [field.name for cls in (train.Settings, Config) for field in fields(cls)]
    assert [row[0] for row in rows] == names
    assert len(set(names)) == len(names)        # no setting of training is one of the model's


@pytest.mark.parametrize('given, words', [
    ('hidden_size=0', 'hidden_size=0 1'), ('q_lora_rank=0', 'q_lora_rank=0 none'),
    ('attention=gqa num_key_value_heads=3', 'num_key_value_heads=3 num_attention_heads=4'),
    ('attention=gqa head_dim=7', 'head_dim=7 even'), ('qk_rope_head_dim=7', '=7 even'),
    ('n_routed_experts=8 n_group=3', 'n_group=3 8'), ('n_routed_experts=4 n_group=4', 'n_group'),
    ('n_routed_experts=8 n_group=2 topk_group=3', 'topk_group=3 2'),
    ('n_routed_experts=8 n_group=4 num_experts_per_tok=3', 'num_experts_per_tok=3 2')])
def test_a_model_that_cannot_be_is_refused(given, words):
    values, = settings.load(Config, argv=[f'--{word}' for word in given.split()])
    with pytest.raises(ValueError) as refusal:
        Config(**values)
    assert all(word in str(refusal.value) for word in words.split())


# --------------------------------------------------------------------------- how a script ends

@pytest.mark.parametrize('line, status, stderr', [
    ('raise ValueError("a\\n b")', 2, 'x.py: a b\n'),
    ('open("nosuch")', 2, "x.py: [Errno 2] No such file or directory: 'nosuch'\n"),
    ('bytearray(1 << 60)', 2, 'x.py: out of memory: buy more\n'),
    ('raise RuntimeError("CUDA out of memory")', 2, 'x.py: out of memory: buy more\n'),
    ('import nosuch', 2, "x.py: No module named 'nosuch'\n"),
    ('raise KeyboardInterrupt', 130, ''),
    ('print("\\u65e5", end="")', 0, ''),
    ('raise RuntimeError("a bug")', 1, 'Traceback'),
    ('with settings.lock("out"): subprocess.run([sys.executable, "x.py"], check=True)', 1,
     'x.py: another process is writing to out: ')])
def test_a_mistake_is_one_line_and_a_bug_a_traceback(tmp_path, line, status, stderr):
    script = (f'import subprocess, sys\nsys.path.insert(0, {str(ROOT)!r})\n'
              f'from nanoseek import settings\nwith settings.user_errors("buy more"):\n    {line}')
    (tmp_path / 'x.py').write_text(script)
    done = run(tmp_path, tmp_path / 'x.py', PYTHONIOENCODING='ascii')
    assert (done.returncode, done.stdout) == (status, '\\u65e5' * (status == 0))
    if status == 1:
        assert done.stderr.startswith(stderr)
    else:
        assert done.stderr == stderr


def test_output_that_nobody_reads_ends_a_script_quietly(tmp_path):
    help_of = subprocess.Popen([sys.executable, ROOT / 'prepare.py', '--help'], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    help_of.stdout.close()
    assert help_of.stderr.read() == b''
    assert help_of.wait() == 141
