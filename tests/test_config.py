"""Tests of config/__init__.py: what is printed, and mistakes in settings. Most run a script of a
few lines that needs no torch."""
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

import config

HERE = Path(config.__file__).resolve().parents[1]

RUN = """
import sys
sys.path.insert(0, {here!r})
import config
from tqdm import tqdm
with config.user_errors(needs_stdout={needed}):
    bar = tqdm(total=3, file=sys.stdout, disable=None)
    for i in range(3):
        print('Gr\u00fc\u00dfe \u65e5\u672c', flush=True)
        print('a word', file=sys.stderr, flush=True)
        bar.update()
        sys.stdin.readline()
    bar.close()
print('the end')
open('done', 'w').close()
"""


def start(folder, stdout, needed=False, stderr=subprocess.PIPE, **settings):
    """Starts RUN in a folder; a line on its stdin, and it goes on."""
    file = folder / 'script.py'
    file.write_text(RUN.format(here=str(HERE), needed=needed), encoding='utf-8')
    return subprocess.Popen([sys.executable, file], cwd=folder, stdin=subprocess.PIPE,
                            stdout=stdout, stderr=stderr, **settings)


def lost(folder, how, needed=False):
    """Runs RUN with a stdout that is lost, for a pipe and a terminal after its first line"""
    if how == 'disk':
        with open('/dev/full', 'w') as full:
            process = start(folder, full, needed)
    elif how == 'closed':
        process = start(folder, None, needed, preexec_fn=lambda: os.close(1))
    else:
        ours, theirs = pty.openpty() if how == 'terminal' else os.pipe()
        process = start(folder, theirs, needed)
        os.close(theirs)
        os.read(ours, 1)
        os.close(ours)
    _, stderr = process.communicate(b'\n' * 3, timeout=60)
    return process.returncode, stderr.decode().splitlines()


# ----------------------------------------------------------------------------------- printing

@pytest.mark.parametrize('how', ['disk', 'closed', 'pipe', 'terminal'])
def test_a_stdout_that_is_lost_ends_no_run(tmp_path, how):
    assert lost(tmp_path, how) == (0, ['a word'] * 3)
    assert (tmp_path / 'done').exists()


@pytest.mark.parametrize('how, status, line', [
    ('disk', 2, 'script.py: stdout cannot be written: No space left on device'),
    ('closed', 2, 'script.py: stdout cannot be written: closed from the start'),
    ('pipe', 141, None),
    ('terminal', 2, 'script.py: stdout cannot be written: Input/output error')])
def test_a_stdout_that_is_needed_and_lost_is_one_line_or_for_a_closed_pipe_none(
        tmp_path, how, status, line):
    code, lines = lost(tmp_path, how, needed=True)
    assert code == status
    assert [text for text in lines if text != 'a word'] == [line] * (line is not None)
    assert not (tmp_path / 'done').exists()


def test_a_lost_stderr_ends_no_run_either(tmp_path):
    with open('/dev/full', 'w') as full:
        process = start(tmp_path, subprocess.PIPE, stderr=full)
    stdout, _ = process.communicate(b'\n' * 3, timeout=60)
    assert process.returncode == 0
    assert stdout.endswith(b'the end\n')


def test_a_pipe_that_is_not_stdout_breaks_with_a_word(tmp_path):
    (tmp_path / 'script.py').write_text(
        f'import sys; sys.path.insert(0, {str(HERE)!r}); import config\n'
        'with config.user_errors(needs_stdout=True): raise BrokenPipeError(32, "a worker died")')
    done = subprocess.run([sys.executable, tmp_path / 'script.py'], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == 'script.py: [Errno 32] a worker died\n'


@pytest.mark.parametrize('encoding, shown', [
    ('ascii', 'Gr\\xfc\\xdfe \\u65e5\\u672c'), ('cp1252', 'Gr\u00fc\u00dfe \\u65e5\\u672c'),
    ('utf-8', 'Gr\u00fc\u00dfe \u65e5\u672c')])
def test_letters_that_an_encoding_lacks_are_escapes(tmp_path, encoding, shown):
    process = start(tmp_path, subprocess.PIPE, env={**os.environ, 'PYTHONIOENCODING': encoding})
    stdout, _ = process.communicate(b'\n' * 3, timeout=60)
    assert process.returncode == 0
    assert stdout.decode(encoding).splitlines().count(shown) == 3


# A run of training

@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp('dataset')
    (folder / 'mine.txt').write_text('the king and his men go to Rome. ' * 200)
    subprocess.run([sys.executable, HERE / 'prepare.py', 'mine.txt'], cwd=folder, check=True,
                   capture_output=True)
    return folder / 'data' / 'mine'


def train(dataset, **settings):
    args = ['--hidden_size=32', '--num_hidden_layers=1', '--attention=gqa', '--block_size=16',
            '--batch_size=2', '--max_steps=60', '--log_interval=1', '--device=cpu',
            '--sample_interval=60', '--sample_prompt=the', '--out_dir=out', f'--dataset={dataset}']
    return subprocess.Popen([sys.executable, HERE / 'train.py', *args], **settings)


@pytest.mark.slow
@pytest.mark.parametrize('how', ['pipe', 'terminal'])
def test_training_goes_on_without_a_terminal_and_its_log_says_so(dataset, tmp_path, how):
    ours, theirs = pty.openpty() if how == 'terminal' else os.pipe()
    process = train(dataset, cwd=tmp_path, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b''
    while b'| loss' not in seen and process.poll() is None:
        seen += os.read(ours, 1 << 16)
    os.close(ours)
    assert b'| loss' in seen, seen
    assert process.wait(120) == 0
    log = (tmp_path / 'out/train.log').read_text(encoding='utf-8')
    assert log.count('stdout cannot be written') == 1
    assert re.findall(r'^step +(\d+)/60 \| loss', log, re.M) == [str(i) for i in range(1, 61)]
    assert (tmp_path / 'out/step-000060/config.json').is_file()


# ----------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize('text, line', [
    ('rate = 1\nsize = 1 / 0\n', 'my.py, line 2: ZeroDivisionError: division by zero'),
    ('def half(x):\n    return x / 2\nrate = half("a")\n', 'my.py, line 2: TypeError: '),
    ('import no_such_module\n', 'my.py, line 1: ModuleNotFoundError: No module named'),
    ('import json\njson.loads("{")\n', 'my.py, line 2: JSONDecodeError: '),
    ('a = 1\nb = = 2\n', 'my.py, line 2: invalid syntax'),
    (b'# caf\xe9\n', 'my.py is not UTF-8 text')])
def test_a_config_that_raises_is_named_with_its_line(tmp_path, monkeypatch, text, line):
    monkeypatch.chdir(tmp_path)
    if isinstance(text, str):
        text = text.encode()
    (tmp_path / 'my.py').write_bytes(text)
    with pytest.raises(ValueError, match=re.escape(line)):
        config.load(argv=['my.py'])


@pytest.mark.parametrize('locale, words', [('C', ['ascii', 'PYTHONUTF8=1']),
                                           ('C.UTF-8', ['not UTF-8'])])
def test_an_argument_that_is_no_text_is_refused_in_words(tmp_path, locale, words):
    argument = b'--out_dir=caf\xe9'
    if locale == 'C':
        argument = '--out_dir=caf\u00e9'.encode()
    code = (f'import sys; sys.path.insert(0, {str(HERE)!r}); import config\n'
            'with config.user_errors(): config.load()')
    env = {**os.environ, 'LC_ALL': locale, 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
    done = subprocess.run([sys.executable, '-c', code, argument], env=env, capture_output=True)
    assert done.returncode == 2
    stderr = done.stderr.decode()
    assert stderr.count('\n') == 1
    assert all(word in stderr for word in ['--out_dir=caf', *words])
