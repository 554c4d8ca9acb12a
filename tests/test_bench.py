"""Tests of bench.py, as users run it, on a model of a few thousand parameters."""
from itertools import product

import pytest

import bench
import train
from conftest import run
from model import Config, Transformer

TINY = ('--hidden_size=64 --num_hidden_layers=2 --num_attention_heads=4 --n_routed_experts=4 '
        '--n_shared_experts=1 --moe_intermediate_size=64 --num_nextn_predict_layers=1 '
        '--batch_size=4 --block_size=128 --max_position_embeddings=256 --device=cpu --rounds=1 '
        '--contexts=16,512 --batch_sizes=1,2 --new_tokens=8').split()


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Call bench.py's measure with a command line."""
    def measure(*options):
        monkeypatch.setattr('sys.argv', ['bench.py', *options])
        monkeypatch.chdir(tmp_path)
        return bench.measure(*train.load_settings(bench.Settings, ''), tmp_path / 'weights')
    return measure


@pytest.mark.slow
def test_a_model_trains_and_decodes_beside_the_others(tmp_path, measure):
    result = measure(*TINY, '--optimizer=muon')
    rows = {row['training']: row for row in result['training']}
    assert list(rows) == ['nanoseek', 'nanoseek, muon']
    for row in rows.values():
        assert row['tokens/s'] == pytest.approx(512e3 / row['ms'], rel=0.01)
        assert row['MFU'] > 0
    decoded = [(row['decoding'], row['context'], row['batch']) for row in result['decoding']]
    names = ('nanoseek', 'nanoseek, drafting')
    assert sorted(decoded) == sorted(product(names, (16, 248), (1, 2)))


@pytest.mark.slow
def test_a_folder_says_what_is_measured_and_the_batch_fits_itself(tmp_path, measure):
    model = Transformer(Config(vocab_size=64, hidden_size=32, num_hidden_layers=1,
                               n_routed_experts=4))
    model.save_pretrained(tmp_path / 'model')
    options = ('--init_from=model --batch_size=0 --global_batch_size=3 --block_size=16 --rounds=1 '
               '--contexts=8 --batch_sizes=1 --new_tokens=4 --device=cpu').split()
    result = measure(*options, '--vs=transformers')
    assert 'hidden 32' in result['model'] and '3 x 16 tokens' in result['model']
    assert 'transformers, eager' in {row['training'] for row in result['training']}
    assert 'transformers, batched_mm' in {row['decoding'] for row in result['decoding']}


@pytest.mark.slow
@pytest.mark.parametrize('options, words', [
    ('--vs=nowhere', "vs='nowhere'"), ('--contexts=8,', 'invalid literal'),
    ('--compile=true --n_routed_experts=0 --num_nextn_predict_layers=0 --num_hidden_layers=1',
     'torch.compile does not work here')])
def test_a_mistake_is_one_line(tmp_path, options, words):
    done = run(tmp_path, 'bench.py', *TINY, *options.split(), CXX='no-such-compiler',
               TORCHINDUCTOR_CACHE_DIR=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert words in done.stderr.splitlines()[-1]
