"""Tests of nanoseek/checkpoint.py: written whole or not at all, never silently missing, found again;
and of runs of train.py that lose their terminal, their disk or their writer."""
import errno
import math
import os
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models

import prepare
from model import Config, Transformer
from nanoseek import checkpoint, files

HERE = Path(prepare.__file__).resolve().parent
CPU = torch.device('cpu')


class Written:
    """A tiny model with an optimizer that has taken a step, and what checkpoint.write takes."""

    def __init__(self, seed=1):
        torch.manual_seed(seed)
        config = Config(vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                        num_attention_heads=2, max_position_embeddings=32)
        self.model = Transformer(config)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.scaler = torch.amp.GradScaler('cpu', enabled=False)
        self.model(torch.arange(10)[None], torch.arange(1, 11)[None])[1].backward()
        self.optimizer.step()
        self.tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(11)}, '0'))

    def arguments(self, final, keep=2, **settings):
        state = checkpoint.training_state({'step': 3}, self.optimizer, self.scaler, CPU)
        state = checkpoint.cpu_copy(state, whole=lambda x: x, keep=True)
        settings = {'seed': 7, 'version': checkpoint.VERSION, **settings}
        return (Path(final), self.model, self.model.snapshot(), state, settings, '# A card\n',
                self.tokenizer, {}, keep)

    def write(self, final, **more):
        return checkpoint.write(*self.arguments(final, **more))


@pytest.fixture
def run():
    return Written()


def no(line):
    raise AssertionError(line)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def same(a, b):
    """Dicts and lists of the same tensors, bit for bit"""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def load(folder, run):
    return checkpoint.load_training_state(folder, run.optimizer, run.scaler, CPU,
                                          lambda x, like: x)


# ------------------------------------------------------------------------------ a round trip

@pytest.mark.parametrize('name', ['run', 'a b', b'r\xff\xfe', '\u540d'])
def test_what_was_written_is_found_whole_and_comes_back_bit_for_bit(tmp_path, run, name):
    out = tmp_path / os.fsdecode(name)
    line = run.write(out / 'step-000003')
    assert line.startswith(f'saved {out / "step-000003"} in ')
    assert names(out) == ['step-000003']
    assert checkpoint.newest(out, no) == out / 'step-000003'
    random = torch.rand(3)
    other = Written(seed=2)
    assert load(out / 'step-000003', other) == {'step': 3}
    assert same(other.optimizer.state_dict(), run.optimizer.state_dict())
    assert torch.equal(torch.rand(3), random)
    weights = Transformer.from_pretrained(out / 'step-000003').state_dict()
    assert same(dict(weights), dict(run.model.state_dict()))


def test_a_copy_does_not_change_with_its_original(run):
    state = checkpoint.training_state({}, run.optimizer, run.scaler, CPU)
    copy = checkpoint.cpu_copy(state, lambda x: x, keep=True)
    before = checkpoint.cpu_copy(copy, lambda x: x, keep=True)
    run.optimizer.step()
    assert same(copy, before)
    assert not same(copy['optimizer'], run.optimizer.state_dict())


def test_weights_that_are_not_finite_are_not_written(tmp_path, run):
    run.model.model.norm.weight.data[2] = math.inf
    assert 'is not written: model.norm.weight is not finite' in run.write(tmp_path / 'step-000003')
    assert names(tmp_path) == []


def test_the_newest_and_the_best_stay(tmp_path, run):
    for step, loss in {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 2.5}.items():
        run.write(tmp_path / f'step-{step:06d}', val_loss=loss)
    assert names(tmp_path) == ['step-000002', 'step-000004', 'step-000005']
    (tmp_path / 'step-000002/trainer/settings.json').write_text('[]')
    run.write(tmp_path / 'step-000006', val_loss=2.2)
    assert names(tmp_path) == ['step-000005', 'step-000006']


# ------------------------------------------------------------------ nothing is silently missing

@pytest.mark.parametrize('error', [MemoryError('no memory'), KeyError('a bug'),
                                   RuntimeError('a bug'), AssertionError('a bug')])
def test_whatever_ends_the_writer_is_raised_as_it_is(tmp_path, run, error):
    def fails(*args, **kwargs):
        raise error
    run.model.save_pretrained = fails
    writer = checkpoint.Writer()
    writer.start(*run.arguments(tmp_path / 'step-000003'))
    with pytest.raises(type(error)) as raised:
        writer.finish()
    assert raised.value is error
    assert raised.traceback[-1].name == 'fails'
    assert names(tmp_path) == []
    assert writer.finish() is None


def test_the_end_waits_for_the_writer_and_hears_of_its_error(tmp_path, run, caplog):
    save = run.model.save_pretrained

    def slow(*args, **kwargs):
        time.sleep(0.2)
        save(*args, **kwargs)
    run.model.save_pretrained = slow
    with checkpoint.Writer() as writer:
        writer.start(*run.arguments(tmp_path / 'step-000001'))
    assert names(tmp_path) == ['step-000001']
    with pytest.raises(ZeroDivisionError), checkpoint.Writer() as writer:
        writer.start(*run.arguments(tmp_path / 'step-000002'))
        raise ZeroDivisionError
    assert names(tmp_path) == ['step-000001', 'step-000002']
    run.tokenizer = None
    with pytest.raises(AttributeError), checkpoint.Writer() as writer:
        writer.start(*run.arguments(tmp_path / 'step-000003'))
    assert caplog.text == ''
    with pytest.raises(ZeroDivisionError), checkpoint.Writer() as writer:
        writer.start(*run.arguments(tmp_path / 'step-000003'))
        raise ZeroDivisionError
    assert "AttributeError: 'NoneType'" in caplog.text
    assert names(tmp_path) == ['step-000001', 'step-000002']


# ---------------------------------------------------------------------------------- odd disks

@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO,
                                    errno.ESTALE, errno.ENOTCONN])
def test_a_disk_that_fails_is_named_with_its_reason(tmp_path, monkeypatch, run, number):
    def fsync(descriptor):
        raise OSError(number, os.strerror(number))
    run.write(tmp_path / 'step-000001')
    monkeypatch.setattr(os, 'fsync', fsync)
    with pytest.raises(OSError) as raised:
        run.write(tmp_path / 'step-000002')
    text = str(raised.value)
    assert f'{tmp_path}/step-000002 could not be written: ' in text
    assert os.strerror(number) in text
    assert ('are free there' in text) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert names(tmp_path) == ['step-000001']


@pytest.mark.parametrize('size', ['12k', '28k', '44k'])
def test_whichever_file_fills_the_disk_the_reason_is_that(disk, run, size):
    """config.json, the weights (which a library writes), what torch.save writes"""
    folder = disk(size)
    with pytest.raises(OSError) as raised:
        run.write(folder / 'step-000001')
    assert 'step-000001 could not be written: ' in str(raised.value)
    assert 'MB are free there' in str(raised.value)
    assert names(folder) == []


@pytest.mark.parametrize('missing', ['fsync of folders', 'fsync of readers', 'locks'])
def test_what_a_file_system_does_not_have_is_done_without(tmp_path, monkeypatch, run, missing):
    import fcntl
    real = os.fsync

    def fsync(descriptor):
        if missing == 'fsync of folders' and os.path.isdir(f'/proc/self/fd/{descriptor}'):
            raise OSError(errno.EINVAL, 'Invalid argument')
        mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        folder = os.path.isdir(f'/proc/self/fd/{descriptor}')
        if missing == 'fsync of readers' and mode == os.O_RDONLY and not folder:
            raise OSError(errno.EBADF, 'Bad file descriptor')
        real(descriptor)
    monkeypatch.setattr(os, 'fsync', fsync)
    if missing == 'locks':
        def flock(descriptor, operation):
            raise OSError(errno.ENOTSUP, 'Operation not supported')
        monkeypatch.setattr(fcntl, 'flock', flock)
    with files.lock(tmp_path):
        for step in range(1, 5):
            assert 'could not' not in run.write(tmp_path / f'step-{step:06d}')
    assert names(tmp_path) == ['step-000003', 'step-000004']
    assert checkpoint.damage(tmp_path / 'step-000003') is None


def test_an_old_checkpoint_that_cannot_be_removed_is_said_and_ends_nothing(tmp_path, monkeypatch,
                                                                          run):
    """As on Windows, or on a network drive, while another program reads it"""
    real = os.replace

    def replace(old, new):
        if str(old).endswith('step-000001'):
            raise PermissionError(errno.EACCES, 'Permission denied', str(old))
        real(old, new)
    monkeypatch.setattr(os, 'replace', replace)
    for step in (1, 2, 3):
        line = run.write(tmp_path / f'step-{step:06d}', keep=2)
    assert line.startswith('saved ')
    assert 'an older one could not be removed: ' in line and "step-000001'" in line
    assert names(tmp_path) == ['step-000001', 'step-000002', 'step-000003']


def test_a_folder_that_vanishes_is_made_again(tmp_path, run):
    import shutil
    run.write(tmp_path / 'out/step-000001')
    shutil.rmtree(tmp_path / 'out')
    run.write(tmp_path / 'out/step-000002')
    assert checkpoint.newest(tmp_path / 'out', no) == tmp_path / 'out/step-000002'


def test_half_checkpoints_are_cleared_and_what_cannot_be_is_no_reason_to_stop(tmp_path, run,
                                                                             monkeypatch):
    import shutil
    for step in (1, 2):
        run.write(tmp_path / f'step-{step:06d}')
    shutil.copytree(tmp_path / 'step-000001', tmp_path / '.step-000003.tmp')
    checkpoint.clear(tmp_path, tmp_path / 'step-000001', 1)
    assert names(tmp_path) == ['step-000001']
    shutil.copytree(tmp_path / 'step-000001', tmp_path / '.step-000003.tmp')

    def rmdir(*args, **kwargs):
        raise OSError(errno.ENOTEMPTY, 'Directory not empty')
    monkeypatch.setattr(os, 'rmdir', rmdir)
    checkpoint.clear(tmp_path, tmp_path / 'step-000001', 1)
    assert names(tmp_path)[-1] == 'step-000001'


@pytest.mark.parametrize('data', [b'', b'PK', b'not a checkpoint'])
def test_a_state_that_cannot_be_read_is_named(tmp_path, run, data):
    run.write(tmp_path / 'step-000001')
    (tmp_path / 'step-000001/trainer/state.pt').write_bytes(data)
    with pytest.raises(OSError, match='state.pt cannot be read: ..'):
        load(tmp_path / 'step-000001', run)
    assert 'state.pt has' in checkpoint.damage(tmp_path / 'step-000001')
