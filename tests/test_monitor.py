"""Tests of nanoseek/monitor.py: what a log keeps and forgets, clocks and spikes by hand, and who is
named where numbers are not finite."""

import contextlib
import json
import math

import pytest
import torch

from model import Config, Transformer
from nanoseek import monitor
from train import Settings


@pytest.mark.parametrize(
    'seconds, text',
    [
        (0, '0:00:00'),
        (0.4, '0:00:00'),
        (59.4, '0:00:59'),
        (59.6, '0:01:00'),
        (179.7, '0:03:00'),
        (3599.5, '1:00:00'),
        (3661, '1:01:01'),
        (86400 * 30 + 59, '720:00:59'),
    ],
)
def test_minutes_and_seconds_end_at_59(seconds, text):
    assert monitor.clock(seconds) == text


ENTRY = {
    'step': 7,
    'loss': 1.25,
    'lr': 1e-3,
    'grad_norm': 0.5,
    'step_ms': 1500.1,
    'tok_per_s': 5678.9,
    'mfu': 0.254,
    'memory_mb': 99.6,
}


def test_a_progress_line_is_always_built_alike():
    line = 'step      7/90 | loss 1.2500 | lr 1.00e-03 | norm 0.50 | 1500 ms | 5.7k tok/s | mfu 25% | 100 MB'
    assert monitor.progress_line(ENTRY, 90, False) == f'{line} | eta 0:02:05'  # 83 steps
    experts = {**ENTRY, 'moe/load_min': 0.5, 'moe/load_max': 1.75, 'moe/dead': 0}
    assert monitor.progress_line(experts, 90, False) == f'{line} | load 0.50-1.75 | eta 0:02:05'


def test_nobody_is_told_how_long_all_takes_by_a_step_that_was_compiling():
    assert monitor.progress_line(ENTRY, 90, True).endswith('| 100 MB | eta -:--:--')
    assert monitor.progress_line(ENTRY, 7, True).endswith('| 100 MB | eta 0:00:00')


def test_a_validation_line_names_the_sources_of_a_mixture():
    one = {'val_loss': 1.5, 'val_bpb': 2.25}
    two = {'val_loss/a': 1.0, 'val_bpb/a': 3.0, 'val_loss/b': 2.0, 'val_bpb/b': 1.5}
    line = 'step     12 | validation loss 1.5000 | 2.2500 bits per byte'
    assert monitor.validation_line(12, one) == line
    assert monitor.validation_line(12, {**one, **two}) == f'{line} | a 1.0000 | b 2.0000'


def test_expert_load_is_relative_to_the_mean_of_its_layer():
    load = torch.tensor([[0, 2, 4, 2], [1, 1, 1, 9]])  # means 2 and 3
    assert monitor.relative_load(load).tolist() == [[0, 1, 2, 1], [0.333, 0.333, 0.333, 3]]
    assert monitor.load_entry(load) == {'moe/load_max': 3, 'moe/load_min': 0, 'moe/dead': 1}
    assert monitor.load_entry(torch.zeros(0, 0)) == {}


def test_a_spike_is_six_deviations_above_the_median():
    history = [1.0, 2.0, 3.0] * 11  # median 2, median absolute deviation 1
    assert monitor.spike(history, 2 + 5.9 * 1.4826) is None
    z, median = monitor.spike(history, 2 + 6.1 * 1.4826)
    assert median == 2 and z == pytest.approx(6.1)
    assert monitor.spike(history, -100.0) is None  # below is no spike
    assert monitor.spike(history[:31], 100.0) is None  # too few to tell
    assert monitor.spike([1.0] * 50, 1.005) is None  # a deviation is 0.001 at least


@pytest.fixture
def log(tmp_path):
    made = []

    def log(step=0, **given):
        for old in made:
            old.close()
        made[:] = [monitor.Log(Settings(out_dir=str(tmp_path), max_steps=9, **given), step, {})]
        return made[0]

    yield log
    for old in made:
        old.close()


def lines(folder):
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text('utf-8').splitlines()]


def test_metrics_are_json_and_null_where_a_number_is_not_finite(tmp_path, log):
    log().add(step=1, loss=math.nan, lr=math.inf, text='caf\u00e9', many=[1, 2])
    assert lines(tmp_path) == [
        {'step': 1, 'loss': None, 'lr': None, 'text': 'caf\u00e9', 'many': [1, 2]}
    ]


def test_a_log_that_goes_on_forgets_what_will_be_repeated(tmp_path, log):
    first = log()
    for step in (1, 2, 3):
        first.add(step=step, loss=1.0)
        first.add(step=step, event='spike')
    file = tmp_path / 'metrics.jsonl'
    file.write_text(file.read_text('utf-8') + '{"step": 4, "lo', 'utf-8')  # a process was killed
    log(step=2).add(step=3, loss=2.0)
    assert [(m['step'], m.get('loss')) for m in lines(tmp_path)] == [
        (1, 1.0),
        (1, None),
        (2, 1.0),
        (2, None),
        (3, 2.0),
    ]


def test_a_log_that_goes_back_may_keep_events(tmp_path, log):
    new = log()
    for step in (1, 2, 3):
        new.add(step=step, loss=1.0)
    new.add(step=3, event='skipped')
    new.rewind(1, keep_events=True)
    new.add(step=2, event='rollback')
    assert [(m['step'], m.get('event')) for m in lines(tmp_path)] == [
        (1, None),
        (3, 'skipped'),
        (2, 'rollback'),
    ]


def test_train_log_is_utf8_and_goes_on(tmp_path, log, capfd):
    log().say('caf\u00e9 \u4e2d')
    log().say('second')
    assert (tmp_path / 'train.log').read_text('utf-8') == 'caf\u00e9 \u4e2d\nsecond\n'
    assert capfd.readouterr().out == 'caf\u00e9 \u4e2d\nsecond\n'


class Gone:
    """A stream whose other side is closed"""

    def write(self, text):
        raise BrokenPipeError

    flush = write


def test_a_terminal_that_is_gone_does_not_end_a_run(tmp_path, log, monkeypatch):
    new = log()
    monkeypatch.setattr('sys.stdout', Gone())
    new.say('still here')
    new.say('and here')
    first, note, last = (tmp_path / 'train.log').read_text('utf-8').splitlines()
    assert (first, last) == ('still here', 'and here')
    assert note.startswith('stdout cannot be written (')  # once


# ------------------------------------------------------------------------------- culprit


def step(spoil=None):
    """A small model after a backward pass, its batch, and the name of what is not finite in it"""
    torch.manual_seed(1)
    model = Transformer(
        Config(
            vocab_size=9,
            hidden_size=16,
            num_hidden_layers=2,
            n_routed_experts=4,
            num_attention_heads=2,
        )
    )
    idx = torch.arange(16).view(2, 8) % 9
    if spoil:
        spoil(model)
    model(idx, idx)[1].backward()
    return monitor.culprit(model, [(idx, idx)], contextlib.nullcontext)


def weight(model):
    model.model.layers[1].self_attn.o_proj.weight.data[0, 0] = math.nan


def output(model):
    model.model.layers[0].self_attn.register_forward_hook(lambda module, args, out: out * math.inf)


def gradient(model):
    model.model.norm.weight.register_hook(lambda grad: grad * math.nan)


@pytest.mark.parametrize(
    'spoil, name',
    [
        (weight, 'the weight model.layers.1.self_attn.o_proj.weight'),
        (output, 'the output of model.layers.0.self_attn'),
        (gradient, 'the gradient of model.norm.weight'),
        (None, 'the loss'),
    ],
)
def test_the_first_that_is_not_finite_is_named(spoil, name):
    assert step(spoil) == name
