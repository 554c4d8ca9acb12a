"""Tests of nanoseek/log.py: what a log keeps and drops, its lines by hand, and which number is
named as the first that is not finite."""
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

import train
from model import Config, Transformer
from nanoseek import log

CPU = torch.device('cpu')


def test_expert_load_is_relative_to_the_mean_of_its_layer():
    load = torch.tensor([[0, 2, 4, 2], [1, 1, 1, 9]])                       # means 2 and 3
    assert log.load_entry(load) == {'moe/load_max': 3, 'moe/load_min': 0}
    assert log.load_entry(torch.zeros(0, 0)) == {}


def test_speed_is_a_mean_over_the_steps_since_the_last_entry():
    meter = log.Meter(tokens=1000, flops=5e8, peak=1e12, device=CPU)
    meter.start(3)
    meter.began -= 8                    # seconds
    entry = meter.entry(7)
    assert (entry['tokens'], entry['flops']) == (7000, 35e8)
    assert entry['step_ms'] == pytest.approx(2000, rel=0.01)
    assert entry['tok_per_s'] == pytest.approx(500, rel=0.01)
    assert entry['mfu'] == pytest.approx(2.5e-4, abs=1e-4)
    assert meter.step == 7


# ------------------------------------------------------------------------------------- a log

@pytest.fixture
def start(tmp_path):
    """Open a log in tmp_path; close the one before."""
    logs = []

    def start(step=0, quiet=False, **given):
        for open_log in logs:
            open_log.close()
        s = train.Settings(out_dir=str(tmp_path / 'out'), max_steps=9, **given)
        logs[:] = [log.Log(s, SimpleNamespace(step=step, id='abc'), {'seed': 1}, quiet)]
        return logs[0]
    yield start
    for open_log in logs:
        open_log.close()


def rows(folder):
    rows = [json.loads(line) for line in open(folder / 'out/metrics.jsonl', encoding='utf-8')]
    seconds = [row.pop('elapsed_s') for row in rows]
    assert seconds == sorted(seconds)                       # it goes on where a run continues
    return rows


def test_metrics_are_json_with_null_for_what_is_not_finite(tmp_path, start):
    start().add(step=1, loss=math.nan, lr=math.inf, text='caf\u00e9', many=[1, 2])
    assert rows(tmp_path) == [{'step': 1, 'loss': None, 'lr': None, 'text': 'caf\u00e9',
                               'many': [1, 2]}]


def test_a_resumed_log_drops_what_will_be_repeated(tmp_path, start):
    first = start()
    for step in (1, 2, 3):
        first.add(step=step, loss=1.0)
        first.add(step=step, event='skipped')
    with open(tmp_path / 'out/metrics.jsonl', 'a') as file:
        file.write('{"step": 2, "lo')                       # the process was killed
    start(step=2).add(step=3, loss=2.0)
    assert [(row['step'], row.get('loss')) for row in rows(tmp_path)] == [
        (1, 1.0), (1, None), (2, 1.0), (2, None), (3, 2.0)]


def test_tensorboard_shows_a_resumed_run_once(tmp_path, start):
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    first = start(tensorboard=True)
    for step in (1, 2, 3, 4):
        first.add(step=step, loss=1.0)
    start(step=2, tensorboard=True).add(step=3, loss=2.0)

    def shown():
        events = accumulator.EventAccumulator(str(tmp_path / 'out/tensorboard')).Reload()
        return [(event.step, event.value) for event in events.Scalars('loss')]
    start(step=3)
    assert shown() == [(1, 1), (2, 1), (3, 2)]
    start(tensorboard=True).add(step=1, loss=3.0)           # from nothing
    start()
    assert shown() == [(1, 3)]


def test_wandb_gets_the_step_as_a_metric(monkeypatch, start):
    calls = []

    def init(**given):
        calls.append(given['id'])
        return SimpleNamespace(log=calls.append, define_metric=lambda *args, step_metric: None,
                               finish=lambda: None)
    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(init=init))
    start(wandb=True).add(step=1, loss=1.0)
    assert calls[0] == 'abc' and (calls[1]['step'], calls[1]['loss']) == (1, 1.0)


def test_train_log_is_what_the_terminal_shows_and_is_continued(tmp_path, start, capsys):
    for line in ('caf\u00e9 \u4e2d', 'second'):
        start().say(line)
    assert (tmp_path / 'out/train.log').read_text('utf-8') == 'caf\u00e9 \u4e2d\nsecond\n'
    assert capsys.readouterr().out == 'caf\u00e9 \u4e2d\nsecond\n'


def test_one_process_writes_to_a_folder(start):
    start()
    with pytest.raises(ValueError, match='another process is writing to'):
        log.Log(train.Settings(out_dir=start().dir), None, {})


# ----------------------------------------------------------------------------------- culprit

def spoil_weight(model):
    model.model.layers[1].self_attn.o_proj.weight.data[0, 0] = math.nan


def spoil_output(model):
    model.model.layers[0].self_attn.register_forward_hook(lambda module, args, out: out * math.inf)


def spoil_gradient(model):
    model.model.norm.weight.register_hook(lambda gradient: gradient * math.nan)


@pytest.mark.parametrize('spoil, name', [
    (spoil_weight, 'the weight model.layers.1.self_attn.o_proj.weight'),
    (spoil_output, 'the output of model.layers.0.self_attn'),
    (spoil_gradient, 'the gradient of model.norm.weight'),
    (lambda model: None, 'the loss')])
def test_the_first_number_that_is_not_finite_is_named(spoil, name):
    torch.manual_seed(1)
    model = Transformer(Config(vocab_size=9, hidden_size=16, num_hidden_layers=2,
                               n_routed_experts=4, num_attention_heads=2))
    idx = torch.arange(16).view(2, 8) % 9
    spoil(model)
    model(idx, idx)[1].backward()
    dist = train.OneDevice(train.Settings(device='cpu', dtype='float32'))
    assert log.culprit(model, [(idx, idx)], dist) == name
