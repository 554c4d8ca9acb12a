"""Tests of demo.py, in a real browser: Debian's chromium, through playwright. They are skipped
where gradio, playwright or chromium are missing. And of nanoseek/insight.py, which needs none."""
import contextlib
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import demo
from model import Config, Transformer
from nanoseek import folders
from nanoseek.insight import favourites, look_at, write
from nanoseek.speculate import Drafts
from nanoseek.tokenizer import char_tokenizer

HERE = Path(__file__).resolve().parent.parent
LETTERS = '\n abcdefghij'
CHROMIUM = shutil.which('chromium')
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
         '--disable-background-networking', '--disable-component-update']


def model_of(seed=0, **settings):
    torch.manual_seed(seed)
    sizes = {'vocab_size': len(LETTERS), 'hidden_size': 32, 'num_hidden_layers': 2,
             'num_attention_heads': 2, 'kv_lora_rank': 8, 'n_routed_experts': 4,
             'num_nextn_predict_layers': 1, 'max_position_embeddings': 600,
             'initializer_range': 0.3}
    return Transformer(Config(**{**sizes, **settings})).eval()


# --------------------------------------------------------------------------------- insight

def test_probabilities_are_those_of_the_model_at_each_place():
    model = model_of()
    ids = torch.randint(len(LETTERS), (30,)).tolist()
    insight = look_at(model, ids)
    assert math.isnan(insight.probability[0]) and insight.likeliest[0] == []
    for i in range(1, 30):
        with torch.no_grad():
            logits, _ = model(torch.tensor([ids[:i]]))
        p = logits[0, -1].softmax(-1)
        assert insight.probability[i] == pytest.approx(p[ids[i]].item(), rel=1e-4)
        for token, probability in insight.likeliest[i]:
            assert probability == pytest.approx(p[token].item(), rel=1e-4)
        assert len(insight.likeliest[i]) == 5
        assert insight.likeliest[i][0][0] == p.argmax().item()


def test_experts_are_those_that_the_routers_chose():
    model = model_of()
    ids = torch.randint(len(LETTERS), (30,)).tolist()
    inputs = []
    hook = model.model.layers[1].mlp.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0][0]))
    insight = look_at(model, ids)
    hook.remove()
    assert len(insight.experts) == len(insight.load) == 2
    counts = [0] * 4
    for x, experts in zip(inputs[0], insight.experts[1]):
        affinity = torch.sigmoid(model.model.layers[1].mlp.gate.weight @ x)
        best = sorted(range(4), key=lambda e: affinity[e].item(), reverse=True)
        assert experts == best[:2]
        for e in experts:
            counts[e] += 1
    assert insight.load[1] == pytest.approx([count / 60 for count in counts])


def test_favourites_are_what_an_expert_gets_more_often_than_the_others():
    pieces = ['a', 'b', 'a', '\n', 'a']
    experts = [[0, 1], [1, 2], [0, 2], [2, 1], [0, 1]]
    assert favourites(pieces, experts, 3) == [['a'], ['b', '\n'], ['b', '\n']]


def test_writers_that_take_turns_write_what_each_would_alone():
    model = model_of()
    alone = []
    for seed in (1, 2):
        alone.append([token for token, _ in write(model, [3, 4], 40, 1.0, None, seed, Drafts())])
    writers = [write(model, [3, 4], 40, 1.0, None, seed, Drafts()) for seed in (1, 2)]
    together = [[], []]
    for one, two in zip(*writers):
        together[0].append(one[0])
        together[1].append(two[0])
    assert together == alone and alone[0] != alone[1]


def test_what_is_said_to_be_drafted_is_as_much_as_was_accepted():
    model = model_of(vocab_size=3, initializer_range=0.02)
    drafts = Drafts()
    told = [drafted for _, drafted in write(model, [1, 2], 100, 1.0, None, 5, drafts)]
    assert len(told) == 100 and sum(told) == drafts.accepted > 10


# ---------------------------------------------------------------------------------- the page

@pytest.mark.parametrize('name, text, settings, words', [
    ('step-000001', '', (5, 0.8, 50, 1), '0 tokens'),
    ('step-000001', 'abc€', (5, 0.8, 50, 1), "'€' (U+20AC) is not in the vocabulary"),
    ('step-000001', 'abc', (5, 0.8, 50, None), 'must be numbers'),
    ('step-000009', 'abc', (5, 0.8, 50, 1), 'no such folder'),
    ('damaged', 'abc', (5, 0.8, 50, 1), 'is damaged')])
def test_a_mistake_on_the_page_is_a_line(run, tmp_path, name, text, settings, words):
    shutil.copytree(run / 'step-000001', tmp_path / 'damaged')
    weights = tmp_path / 'damaged/model.safetensors'
    weights.write_bytes(weights.read_bytes()[:500])
    folder = run / name
    if name == 'damaged':
        folder = tmp_path / name
    *_, last = demo.generate(demo.Settings(), text, str(folder), demo.Visit(), *settings)
    _, line, _, tokens, origins = last
    assert line.startswith('**') and words in line
    assert tokens == origins == []


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run with two checkpoints"""
    folder = tmp_path_factory.mktemp('run')
    for step in (1, 2):
        model = model_of(step)
        to = folder / f'step-{step:06d}'
        model.save_pretrained(to)
        folders.write_companions(to, char_tokenizer(LETTERS), model.config, {})
    return folder


@contextlib.contextmanager
def served(*command, folder=HERE):
    """The address of a page while it is there"""
    env = os.environ | {'PYTHONUNBUFFERED': '1'}
    with subprocess.Popen([sys.executable, *map(str, command)], cwd=folder, text=True, env=env,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            said = ''
            for line in process.stdout:
                said += line
                found = re.search(r'http://[\d.]+:\d+', line)
                if found:
                    break
            assert found, said
            yield found[0].replace('0.0.0.0', '127.0.0.1')
        finally:
            process.terminate()


@pytest.fixture(scope='module')
def browser():
    pytest.importorskip('gradio')
    sync_api = pytest.importorskip('playwright.sync_api')
    if CHROMIUM is None:
        pytest.skip('no chromium')
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


@pytest.fixture(scope='module')
def address(run, browser):
    with served('demo.py', f'--checkpoint={run}/step-000002', '--prompt=abc') as url:
        yield url


def opened(browser, address):
    page = browser.new_context(viewport={'width': 1280, 'height': 900}).new_page()
    page.set_default_timeout(60_000)
    page.goto(address)
    page.wait_for_selector('#write')
    return page


def text_of(page):
    return page.input_value('#text-a textarea')


def wait_until(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def set_length(page, length):
    page.fill('input[aria-label="number input for Length"]', str(length))


def write_on(page, prompt, length):
    """-> the whole text, when it is written"""
    page.fill('#prompt textarea', prompt)
    set_length(page, length)
    page.click('#write')
    ended(page)
    return text_of(page)


def ended(page):
    """The line about the text, when it is written"""
    wait_until(lambda: ' a second' in page.inner_text('#said-a'))
    return page.inner_text('#said-a')


@pytest.mark.slow
@pytest.mark.xdist_group('demo')
def test_a_text_is_written_clicked_at_and_gone_on_from(browser, address):
    page = opened(browser, address)
    set_length(page, 400)
    page.click('#write')
    wait_until(lambda: len(text_of(page)) > 10)
    early = text_of(page)
    line = ended(page)
    text = text_of(page)
    assert early.startswith('abc') and text.startswith(early.rstrip('\ufffd'))
    assert len(early) < len(text) == 403        # it came bit by bit
    assert line.startswith('400 tokens') and 'drafts accepted' in line
    tokens = page.locator('#tokens-a .token')
    wait_until(lambda: tokens.count() == 403)
    tokens.nth(20).click()
    page.wait_for_selector('#instead-a')
    wait_until(lambda: page.inner_text('#instead-a').count('%') == 5)
    wait_until(lambda: page.locator('#experts-a .token').count() == 403)

    page.fill('#text-a textarea', 'jihg')
    set_length(page, 5)
    page.click('#go-on')
    wait_until(lambda: '5 tokens' in page.inner_text('#said-a'))
    assert text_of(page).startswith('jihg') and len(text_of(page)) == 9


@pytest.mark.slow
@pytest.mark.xdist_group('demo')
def test_stop_stops_and_mistakes_are_a_line(browser, address):
    page = opened(browser, address)
    set_length(page, 1000)
    page.click('#write')
    wait_until(lambda: len(text_of(page)) > 5)
    page.click('#stop')
    ended(page)
    assert 5 < len(text_of(page)) < 1003
    for prompt, words in (('abcX', 'X'), ('', '0 tokens')):
        page.fill('#prompt textarea', prompt)
        page.click('#write')
        wait_until(lambda: words in page.inner_text('#said-a'))
        assert 'Traceback' not in page.inner_text('body')
    page.fill('#prompt textarea', 'abcdefghij' * 70)
    set_length(page, 3)
    page.click('#write')
    assert 'of 700 tokens it read the last 599' in ended(page)


@pytest.mark.slow
@pytest.mark.xdist_group('demo')
def test_two_visitors_write_at_once_and_one_takes_another_checkpoint(browser, address):
    one = opened(browser, address)
    two = opened(browser, address)
    set_length(one, 1000)
    set_length(two, 60)
    one.click('#write')
    wait_until(lambda: len(text_of(one)) > 5)
    two.click('#write')
    ended(two)
    assert len(text_of(two)) == 63
    first = text_of(two)
    two.click('#stop')
    two.click('#checkpoint-a input')
    two.get_by_role('option').filter(has_text='step-000001').click()
    two.click('#write')
    wait_until(lambda: text_of(two) != first and len(text_of(two)) == 63)
    ended(one)
    assert len(text_of(one)) == 1003            # the other's stop did not stop it


@pytest.mark.slow
@pytest.mark.xdist_group('demo')
def test_a_space_is_a_folder_that_starts(run, browser, tmp_path):
    space = tmp_path / 'space'
    done = subprocess.run([sys.executable, HERE / 'demo.py', f'--checkpoint={run}/step-000001',
                           f'--space={space}'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    card = (space / 'README.md').read_text(encoding='utf-8')
    assert card.startswith('---\ntitle: ') and 'sdk: gradio' in card
    assert 'gradio==' in (space / 'requirements.txt').read_text(encoding='utf-8')
    with served('app.py', folder=space) as url:
        assert len(write_on(opened(browser, url), 'abc', 7)) == 10


@pytest.mark.slow
@pytest.mark.xdist_group('demo')
def test_two_checkpoints_write_side_by_side(run, browser):
    with served('demo.py', f'--checkpoint={run}/step-000001', f'--compare={run}/step-000002',
                '--prompt=abc') as url:
        page = opened(browser, url)
        text = write_on(page, 'abc', 30)
        wait_until(lambda: ' a second' in page.inner_text('#said-b'))
        other = page.input_value('#text-b textarea')
        assert len(other) == len(text) == 33 and other != text


@pytest.mark.slow
def test_what_cannot_be_shown_is_one_line(tmp_path):
    pytest.importorskip('gradio')
    done = subprocess.run([sys.executable, HERE / 'demo.py', f'--checkpoint={tmp_path}'],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert done.stderr.startswith('demo.py: ')
