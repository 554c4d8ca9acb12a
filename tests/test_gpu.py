"""Tests of what a GPU will run, without one: bench.py --gpu in miniature, and the model on the meta
device, where a tensor has no values, so that whatever would wait for one fails."""
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import bench
import train
from model import Cache, Config, Transformer
from nanoseek import gpu, proofs

HERE = Path(__file__).resolve().parent.parent


def without_values(**settings):
    """A model on the meta device, in bfloat16"""
    model = Transformer(Config(**{**proofs.SIZES, **settings}))
    return model.to(torch.bfloat16).to('meta')


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('attention', ['mla', 'gqa'])
def test_a_training_step_waits_for_no_value(attention, masked):
    model = without_values(attention=attention).train()
    model.doc_attention_mask = masked
    idx = torch.zeros(4, 64, dtype=torch.int64, device='meta')
    _, loss = model(idx, idx)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises((RuntimeError, NotImplementedError)):
        loss.item()                     # this is how waiting shows


@pytest.mark.slow
@pytest.mark.parametrize('attention', ['mla', 'gqa'])
def test_a_training_step_and_decoding_are_one_graph_each(attention):
    model = without_values(attention=attention, num_hidden_layers=1).train()
    idx = torch.zeros(4, 64, dtype=torch.int64, device='meta')
    step = torch.compile(model, fullgraph=True, backend='aot_eager')
    _, loss = step(idx, idx)
    loss.backward()
    model.eval()
    decode = torch.compile(model.hidden, fullgraph=True, backend='aot_eager', dynamic=True)
    draft = torch.compile(model.mtp, fullgraph=True, backend='aot_eager', dynamic=True)
    with torch.no_grad():
        cache = Cache(model.config, 2, 64, idx, torch.bfloat16)
        h, _ = model.hidden(idx[:2, :8], cache)
        for tokens in (1, 2):
            h, _ = decode(idx[:2, :tokens], cache)
            assert h.shape == (2, tokens, 64)
        own = Cache(Config(**{**proofs.SIZES, 'attention': attention, 'num_hidden_layers': 1}), 2,
                    64, idx, torch.bfloat16)
        own.length = 8
        h, _ = draft(1, h, idx[:2, :2], own)
        assert h.shape == (2, 2, 64)


def problems():
    """What is wrong here with what must hold everywhere"""
    def make(**fields):
        return Transformer(Config(**fields))
    made = proofs.Proofs(make, train.Settings(), None, torch.device('cpu'), small=True)
    return {name: problem for name, _, problem in made.all()}


def test_what_must_hold_on_a_gpu_holds_here():
    found = problems()
    assert len(found) == 6 and set(found.values()) == {None}


def test_a_proof_fails_where_something_does_not_hold(monkeypatch):
    monkeypatch.setattr(proofs.ops, 'grouped_linear', lambda x, weight, ends: x @ weight[0].T)
    monkeypatch.setattr(proofs.ops, 'sort_by_expert', slow_sort)
    found = problems()
    assert found['grouped_matmul'].startswith('AssertionError: off by')
    assert found['one_graph'].startswith('AssertionError: ')
    assert found['document_mask'] is None


def slow_sort(ids, E, sort_by_expert=proofs.ops.sort_by_expert):
    """One that asks for a value, at which a graph breaks"""
    torch._dynamo.graph_break()
    return sort_by_expert(ids, E)


@pytest.mark.slow
@pytest.mark.xdist_group('gpu')
def test_the_miniature_measures_every_part(tmp_path):
    out = tmp_path / 'gpu.md'
    done = subprocess.run([sys.executable, HERE / 'bench.py', '--gpu', '--small', f'--out={out}'],
                          cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = out.read_text(encoding='utf-8')
    assert 'it failed' not in text and 'missed' not in text, done.stdout
    rows = [line.split(' | ') for line in text.splitlines() if line.startswith('| ')]
    head, *rows = rows
    assert {len(row) for row in rows} == {len(gpu.COLUMNS)} == {len(head)}
    measured = {row[0].removeprefix('| ') for row in rows}
    wanted = {part.name for part in gpu.Plan(bench.Settings(small=True), 'work').parts()}
    assert measured == wanted
    assert text.count('the same weights, bit for bit') == 1


def test_parts_are_chosen_by_name():
    parts = gpu.Plan(bench.Settings(small=True), 'work').parts()
    names = [part.name for part in gpu.choose(parts, 'fp8,race')]
    assert names == ['data', 'race', 'fp8: bfloat16', 'fp8: tensorwise', 'fp8: rowwise']
    with pytest.raises(ValueError, match="'races' is none of data, ddp, eager, fp8"):
        gpu.choose(parts, 'races')


def test_a_command_that_fails_or_hangs_is_a_row_and_the_next_goes_on(tmp_path):
    def nothing(lines):
        return [gpu.Row('it said', lines[-1])]

    crash = gpu.Part('crash', ['-c', 'import sys; sys.exit("no such card")'], nothing, 60)
    hang = gpu.Part('hang', ['-c', 'import time; time.sleep(60)'], nothing, 60)
    good = gpu.Part('good', ['-c', 'print("well")'], nothing, 60)
    with pytest.raises(gpu.Problem, match='status 1: no such card'):
        gpu.attempt(crash, tmp_path, 60)
    with pytest.raises(gpu.Problem, match='not done after 1 s'):
        gpu.attempt(hang, tmp_path, 1)
    row, = gpu.attempt(good, tmp_path, 60)
    assert row.found == 'well'


def test_the_children_of_a_command_end_with_it(tmp_path):
    left = tmp_path / 'left'
    child = f'import time; time.sleep(4); open({str(left)!r}, "w")'
    parent = (f'import subprocess, sys, time; subprocess.Popen([sys.executable, "-c", {child!r}]); '
              'time.sleep(60)')
    with pytest.raises(gpu.Problem):
        gpu.attempt(gpu.Part('parent', ['-c', parent], None, 60), tmp_path, 2)
    time.sleep(4)
    assert not left.exists()
