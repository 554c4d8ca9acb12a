"""A run's state on disk: written whole or not at all, never damaged without a word, found again."""
import math
import os
import shutil

import pytest
import torch

import train
from conftest import ROOT, run
from model import Config, Transformer
from nanoseek import checkpoint
from nanoseek.tokenizer import load_tokenizer
from nanoseek.tokens import open_data


class Training:
    """A tiny model that has taken a step, and its checkpoints in a folder"""

    def __init__(self, dataset, out, seed=1):
        self.out = out
        self.data = open_data(str(dataset))
        torch.manual_seed(seed)
        model = Transformer(Config(
            vocab_size=self.data.vocab_size, hidden_size=16, intermediate_size=24,
            num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32))
        optimizer = torch.optim.AdamW(model.parameters())
        x, y = self.data.batch('train', range(2), 32, 0)
        model(torch.from_numpy(x), torch.from_numpy(y))[1].backward()
        optimizer.step()
        self.run = checkpoint.Run(model, optimizer, torch.amp.GradScaler('cpu', 2.0 ** seed),
                                  {'seed': seed})

    def settings(self, resume='auto', keep=0):
        return train.Settings(dataset=str(self.data.directory), out_dir=str(self.out),
                              device='cpu', resume=str(resume), keep_checkpoints=keep)

    def save(self, step, val_loss=None, keep=0):
        """Save, and return the line about it."""
        s = self.settings(keep=keep)
        self.run.step = step
        tokenizer = load_tokenizer(self.data.directory)
        return checkpoint.save(self.run, s, tokenizer, train.OneDevice(s), val_loss)

    def find(self, resume='auto'):
        return checkpoint.find(self.settings(resume), {})


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    text = (ROOT / 'data/shakespeare/input.txt').read_text(encoding='utf-8')
    (folder / 'small.txt').write_text(text[:1000], encoding='utf-8')
    run(folder, 'prepare.py', 'small.txt', '--out_dir=small').check_returncode()
    return folder / 'small'


@pytest.fixture
def training(dataset, tmp_path):
    return Training(dataset, tmp_path / 'out')


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------ a round trip

def test_what_was_saved_is_found_and_comes_back_bit_for_bit(training, dataset):
    original = training.run
    original.skipped = 5
    original.bad = 2
    original.losses = {'training': 1.5}
    assert training.save(3) == f'saved {training.out}/step-000003'
    assert names(training.out) == ['step-000003']
    folder = training.find()
    random = torch.rand(3)
    other = Training(dataset, training.out, seed=2).run
    other.load(folder)
    assert torch.equal(torch.rand(3), random)
    torch.testing.assert_close(other.state(), original.state(), rtol=0, atol=0)
    weights = Transformer.from_pretrained(folder).state_dict()
    torch.testing.assert_close(weights, original.model.state_dict(), rtol=0, atol=0)


def test_nothing_in_a_state_is_executed(training, tmp_path):
    class Opens:
        def __reduce__(self):
            return open, (str(tmp_path / 'marker'), 'w')
    training.save(3)
    file = training.out / 'step-000003/trainer/state.pt'
    torch.save({**torch.load(file), 'losses': Opens()}, file)
    with pytest.raises(Exception, match='Weights only load failed'):
        training.run.load(training.out / 'step-000003')
    assert not (tmp_path / 'marker').exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / 'marker').exists()


# ------------------------------------------------------------------------ what stays, what goes

def test_the_newest_and_the_best_stay(training):
    for step, loss in enumerate([3.0, 1.0, 2.0, None, math.nan, 2.5], 1):
        training.save(step, loss, keep=2)
    assert names(training.out) == ['step-000002', 'step-000005', 'step-000006']
    (training.out / 'step-000002/trainer/settings.json').write_text('{"val')    # ends no run
    training.save(7, 2.7, keep=2)
    assert names(training.out) == ['step-000006', 'step-000007']


@pytest.mark.parametrize('step, left', [(0, []), (2, [1, 2])])
def test_what_a_run_will_write_again_goes(training, step, left):
    for n in (1, 2, 10):
        training.save(n)
    shutil.copytree(training.out / 'step-000001', training.out / '.step-000003.tmp')
    checkpoint.clear(training.out, step)
    assert names(training.out) == [f'step-{n:06d}' for n in left]


# ------------------------------------------------------------------------- whole or not at all

def test_a_folder_appears_whole_and_replaces_what_was_there(tmp_path):
    final = tmp_path / 'new/final'
    for text in ('old', 'new'):
        with checkpoint.whole_folder(final) as folder:
            (folder / text).mkdir()
            (folder / text / 'file').write_text(text)
            assert not (final / text).exists()
    assert names(final.parent) == ['final']
    assert names(final) == ['new']
    assert (final / 'new/file').read_text() == 'new'


@pytest.mark.parametrize('error, raised', [
    (KeyError, KeyError), (KeyboardInterrupt, KeyboardInterrupt), (OSError, OSError),
    (RuntimeError, OSError)])                           # torch.save's if the disk is full
def test_an_error_leaves_what_was_there(tmp_path, error, raised):
    with checkpoint.whole_folder(tmp_path / 'final') as folder:
        (folder / 'old').touch()
    with pytest.raises(raised), checkpoint.whole_folder(tmp_path / 'final') as folder:
        (folder / 'new').touch()
        raise error('a reason')
    assert names(tmp_path) == ['final']
    assert names(tmp_path / 'final') == ['old']


# -------------------------------------------------------------------------------- damaged files

def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def empty(file):
    os.truncate(file, 0)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def flip_flag(file):
    """Flip the bit of a zip file's directory that says that the last part is encrypted."""
    content = bytearray(file.read_bytes())
    content[content.rfind(b'PK\x01\x02') + 8] ^= 1
    file.write_bytes(content)


DAMAGES = {
    'model.safetensors': (cut, empty, os.remove),
    'trainer/state.pt': (cut, empty, os.remove, flip, flip_flag),
    'config.json': (cut, os.remove),
    'trainer/settings.json': (cut, os.remove),
}
CASES = [(name, spoil) for name, spoils in DAMAGES.items() for spoil in spoils]


@pytest.mark.parametrize('name, spoil', CASES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_newest(training, caplog, name, spoil):
    training.save(1)
    training.save(2)
    damaged = training.out / 'step-000002'
    spoil(damaged / name)
    assert training.find() == training.out / 'step-000001'
    (line,) = caplog.messages
    assert f'{damaged} is damaged' in line
    assert name in line
    with pytest.raises(ValueError, match=f'resume={damaged}'):
        training.find(resume=damaged)


# -------------------------------------------------------------------------------------- finding

def test_a_run_continues_from_its_newest_checkpoint_or_the_given_one(training, tmp_path):
    assert training.find() is None
    for step in (1, 999_999, 1_000_000):
        training.save(step)
    assert training.find() == training.out / 'step-1000000'
    assert training.find(resume='never') is None
    (tmp_path / 'link').symlink_to(training.out / 'step-000001')
    for folder in (training.out / 'step-000001', tmp_path / 'link'):
        assert training.find(resume=folder) == folder
    with pytest.raises(ValueError, match='resume=.*step-000005'):
        training.find(resume=training.out / 'step-000005')


def test_if_all_checkpoints_are_damaged_none_is_newest(training):
    training.save(3)
    cut(training.out / 'step-000003/trainer/state.pt')
    with pytest.raises(ValueError, match='all checkpoints in .* damaged: .*--resume=never'):
        training.find()
    assert checkpoint.of_run(training.out) == training.out      # which is no model's folder


def test_the_model_of_a_run_is_its_newest_checkpoint(training, tmp_path):
    training.save(1)
    training.save(2)
    (tmp_path / 'link').symlink_to(training.out)
    assert checkpoint.of_run(tmp_path / 'link') == tmp_path / 'link/step-000002'
    for name in (training.out / 'step-000001', str(tmp_path), 'HuggingFaceTB/SmolLM2-135M'):
        assert checkpoint.of_run(name) == name
