"""Tests of convert.py, each named after what must hold. The reference is the dense model, and
transformers where it is installed. What needs SmolLM2-135M and a text looks in the folder
$NANOSEEK_ASSETS and is skipped without it."""

import json, math, resource, subprocess, sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import config
import convert
import prepare
from nanoseek.tokenizer import encode
from convert import Settings, check, compressed_mla, exact_mla, fit, perturb, rows, to_moe
from model import Config, Transformer
from support import asset

HERE = Path(convert.__file__).parent
pytestmark = pytest.mark.filterwarnings('ignore:Initializing zero-element tensors')
B, T, V = 3, 41, 97
DENSE = dict(
    vocab_size=V,
    hidden_size=48,
    intermediate_size=120,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    rope_theta=500.0,
    attention='gqa',
    initializer_range=0.15,
)
LAYOUTS = {
    'copies': dict(n_routed_experts=5, num_experts_per_tok=2),
    'copies, shared ones too': dict(n_routed_experts=3, n_shared_experts=2, num_experts_per_tok=2),
    'shards': dict(n_routed_experts=12, num_experts_per_tok=6, moe_intermediate_size=40),
    'shards, a shared one': dict(
        n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=40
    ),
}
FITS = ('--kv_lora_rank=30', '--qk_rope_head_dim=6', '--qk_nope_head_dim=12')
layouts = pytest.mark.parametrize('layout', LAYOUTS)


def dense(**settings):
    torch.manual_seed(1)
    model = Transformer(Config(**{**DENSE, **settings})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if 'norm' in name:
                p.copy_(1 + 0.3 * torch.randn_like(p))
    return model


def settings(**given):
    return Settings(
        **{
            'model': 'm',
            'out_dir': 'o',
            'attention': 'mla',
            'calibration': 'text',
            'kv_lora_rank': 30,
            'qk_nope_head_dim': 12,
            'qk_rope_head_dim': 6,
            'block_size': T,
            'fit_steps': 0,
            **given,
        }
    )


def tokens(rows=B, vocabulary=V, length=T):
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def same(a, b, idx, most=1e-4):
    torch.testing.assert_close(a(idx)[0], b(idx)[0], atol=most, rtol=0)


def in_transformers(folder, idx):
    auto = pytest.importorskip('transformers').AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32)(idx).logits


@pytest.fixture
def folder(tmp_path):
    """A dense model in a folder, with a tokenizer of one token per character, and a text"""
    text = ''.join(chr(33 + i * i * 7 % 94) + ' \n'[i % 9 == 0] for i in range(6000))
    (tmp_path / 'text.txt').write_text(text)
    prepare.prepare(prepare.Settings(str(tmp_path / 'text.txt'), out_dir=str(tmp_path / 'data')))
    dense().save_pretrained(tmp_path / 'dense')
    (tmp_path / 'dense/tokenizer.json').write_bytes((tmp_path / 'data/tokenizer.json').read_bytes())
    return tmp_path


def run(*args):
    """convert.py in this process -> the stages of its report"""
    s = Settings(**config.load(Settings, argv=list(map(str, args)), positional='model out_dir')[0])
    convert.main(s, *convert.plan(s))
    return {
        row['stage']: row
        for row in json.loads(Path(s.out_dir, 'convert.json').read_text())['stages']
    }


# -------------------------------------------------------------------------------------- exact forms
@layouts
@pytest.mark.parametrize('seed', [1, 2])
def test_experts_equal_the_dense_model(layout, seed):
    model, s = dense(), settings(attention='gqa', **LAYOUTS[layout])
    check(s, model.config)
    torch.manual_seed(seed)
    new = to_moe(model, s)
    same(model, new, tokens())
    new(tokens(), tokens())
    new.train()(tokens(), tokens())
    assert new.expert_load.sum() == B * T * 3 * s.num_experts_per_tok
    assert 0 < new.expert_load.double().std()  # the router does choose, it is not one tie


@layouts
def test_noise_makes_equal_experts_differ_and_little_else(layout):
    model = dense()
    new = to_moe(model, settings(attention='gqa', **LAYOUTS[layout]))
    each = 1 if layout.startswith('copies') else 2 if 'shared' in layout else 3
    first, second = (new.moe_layers[0].experts.down_proj[i] for i in (0, each))
    assert torch.equal(first, second)
    state = {name: t.clone() for name, t in new.state_dict().items()}
    torch.manual_seed(3)
    perturb(new, 0.01)
    assert not torch.equal(first, second)
    for name, t in new.state_dict().items():
        moved = (t - state[name]).norm()
        assert (
            moved == 0
            if 'gate.weight' not in name and 'experts.' not in name.replace('shared_experts', '')
            else 0 < moved < 0.02 * state[name].norm()
        )


@pytest.mark.parametrize('heads', [(6, 2), (6, 3), (4, 1), (4, 4)])
def test_exact_mla_equals_the_dense_model(heads):
    model = dense(num_attention_heads=heads[0], num_key_value_heads=heads[1])
    new = exact_mla(model, settings(exact=True))
    same(model, new, tokens())
    assert (
        new.config.kv_lora_rank + new.config.qk_rope_head_dim == 2 * heads[1] * 12
    )  # nothing is saved
    out = new.generate(tokens(), 20)  # absorbed
    assert torch.equal(out, model.generate(tokens(), 20))


@pytest.mark.parametrize(
    'args, kind',
    [
        (['--n_routed_experts=4'], 'Glm4Moe'),
        (['--n_routed_experts=8', '--n_shared_experts=1', '--moe_intermediate_size=40'], 'Glm4Moe'),
        (['--attention=mla', '--exact'], 'DeepseekV3'),
        (
            ['--attention=mla', '--exact', '--n_routed_experts=3', '--n_shared_experts=1'],
            'DeepseekV3',
        ),
    ],
)
def test_exact_folders_are_equal_in_transformers(folder, args, kind):
    stages = run(folder / 'dense', folder / 'new', *args, '--perturb=0')
    about = json.loads((folder / 'new/config.json').read_text())
    assert about['architectures'] == [f'{kind}ForCausalLM']
    idx, model = tokens(), Transformer.from_pretrained(folder / 'dense').eval()
    torch.testing.assert_close(
        in_transformers(folder / 'new', idx), model(idx)[0], atol=1e-4, rtol=0
    )
    if kind == 'Glm4Moe':
        same(Transformer.from_pretrained(folder / 'new').eval(), model, idx)
    else:  # a table that repeats is not in our model
        with pytest.raises(ValueError, match='rope_scaling'):
            Transformer.from_pretrained(folder / 'new')
    assert all(row['logits_moved'] < 1e-4 for row in [*stages.values()][1:])


def test_exact_mla_of_a_single_key_head_loads_everywhere(folder):
    model = dense(num_attention_heads=4, num_key_value_heads=1)
    model.save_pretrained(folder / 'dense')
    run(folder / 'dense', folder / 'new', '--attention=mla', '--exact')
    same(Transformer.from_pretrained(folder / 'new').eval(), model, tokens())
    torch.testing.assert_close(
        in_transformers(folder / 'new', tokens()), model(tokens())[0], atol=1e-4, rtol=0
    )


# ---------------------------------------------------------------------------------- compressed form
def test_a_constant_dimension_undoes_the_norm_of_the_latent():
    """A single key head and all of its dims: that norm is all that is left to err. Where inputs
    have a large mean, as language models' have, the constant holds it"""
    model, idx, errors = dense(num_attention_heads=4, num_key_value_heads=1), tokens(40), []
    model.model.embed_tokens.weight += torch.randn(48)
    for anchor in (0.0, 20.0):
        s = settings(kv_lora_rank=13, qk_rope_head_dim=12, anchor=anchor)
        check(s, model.config)
        errors.append(F.mse_loss(compressed_mla(model, s, idx)(idx)[0], model(idx)[0]).item())
    assert errors[1] < 0.1 * errors[0] and errors[1] < 0.01 * model(idx)[0].var()


def test_the_more_rank_the_smaller_the_error():
    model, idx, last = dense(), tokens(40), math.inf
    for rank in (4, 12, 30, 48):
        new = compressed_mla(model, settings(kv_lora_rank=rank), idx)
        error = F.mse_loss(new(idx)[0], model(idx)[0])
        assert error < last
        last = error


def test_complex_rows_turn_as_pairs_of_rows():
    """A complex factor on a pair commutes with RoPE, in DeepSeek's order of rows"""
    from model import rope_table, rotate_pairs

    c, x = Config(vocab_size=V, max_position_embeddings=T), torch.randn(T, 48)
    z = torch.randn(4, 48, dtype=torch.complex64)
    factor, turn = (
        torch.randn(4, 1, dtype=torch.complex64),
        torch.complex(*rope_table(c, 8)),
    )  # (T, 4)
    got = rotate_pairs(x @ rows(factor * z).T, rope_table(c, 8))  # (T, 8)
    want = factor[:, 0] * (x.to(z.dtype) @ z.T) * turn
    torch.testing.assert_close(got, torch.cat((want.real, want.imag), -1))


def test_the_fit_brings_the_outputs_closer():
    model, idx = dense(), tokens(16)
    s = settings(fit_steps=40, fit_lr=3e-3)
    new = compressed_mla(model, s, idx)
    before = F.mse_loss(new(idx)[0], model(idx)[0])
    fit(model, new, s, idx)
    assert F.mse_loss(new(idx)[0], model(idx)[0]) < 0.8 * before


def test_a_compressed_folder_is_equal_in_transformers_and_trains(folder):
    args = (
        '--attention=mla',
        *FITS,
        '--fit_steps=3',
        '--n_routed_experts=3',
        '--n_shared_experts=1',
        f'--calibration={folder / "text.txt"}',
        '--block_size=32',
        '--calibration_tokens=512',
        '--eval_tokens=256',
    )
    stages = run(folder / 'dense', folder / 'new', *args)
    model, idx = Transformer.from_pretrained(folder / 'new').eval(), tokens()
    torch.testing.assert_close(
        in_transformers(folder / 'new', idx), model(idx)[0], atol=1e-4, rtol=0
    )
    assert list(stages) == [
        'random weights',
        'as it was',
        'MLA, closed form',
        'MLA, fitted in 3 steps a layer',
        'MoE',
        'MoE, perturbed by 0.01',
    ]
    assert stages['MoE']['logits_moved'] < 1e-4 < stages['MLA, closed form']['logits_moved']
    assert stages['as it was']['cache_bytes_per_token'] == 3 * 2 * 2 * 12 * 2
    assert stages['MoE']['cache_bytes_per_token'] == 3 * 36 * 2
    first = {name: t.clone() for name, t in model.state_dict().items()}
    run(folder / 'dense', folder / 'new', *args)  # the same again
    again = Transformer.from_pretrained(folder / 'new').state_dict()
    assert all(torch.equal(t, first[name]) for name, t in again.items())


# ---------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    'args, said',
    [
        ([], 'nothing to convert'),
        (['--attention=mla'], 'a latent is fitted to text'),
        (['--attention=mla', '--calibration=nowhere.txt', *FITS], "no text 'nowhere.txt'"),
        (
            ['--attention=mla', '--calibration=TEXT', *FITS, '--kv_lora_rank=49'],
            'kv_lora_rank=49: keys and',
        ),
        (
            ['--attention=mla', '--calibration=TEXT', *FITS, '--qk_rope_head_dim=14'],
            'qk_rope_head_dim=14',
        ),
        (
            ['--attention=mla', '--calibration=TEXT', *FITS, '--qk_nope_head_dim=13'],
            'qk_nope_head_dim=13: must be',
        ),
        (['--attention=mla', '--calibration=SHORT', *FITS], 'take a longer text'),
        (
            ['--n_routed_experts=4', '--moe_intermediate_size=50'],
            'moe_intermediate_size=50: must divide 120',
        ),
        (
            ['--n_routed_experts=4', '--moe_intermediate_size=60', '--n_shared_experts=2'],
            'experts=2: must be below 2',
        ),
        (
            ['--n_routed_experts=4', '--moe_intermediate_size=40', '--num_experts_per_tok=3'],
            'multiple of 3',
        ),
        (
            ['--n_routed_experts=6', '--moe_intermediate_size=40', '--num_experts_per_tok=2'],
            'multiple of 3',
        ),
        (['--n_routed_experts=1'], 'at most n_routed_experts=1'),
        (['--kv_lora_rnak=3'], "did you mean 'kv_lora_rank'"),
    ],
)
def test_mistakes_are_said(folder, args, said):
    (folder / 'short.txt').write_text('! " ')
    args = [
        a.replace('TEXT', str(folder / 'text.txt')).replace('SHORT', str(folder / 'short.txt'))
        for a in args
    ]
    with pytest.raises(ValueError, match=said):
        run(folder / 'dense', folder / 'new', *args)
    assert not (folder / 'new').exists()


def test_nothing_but_an_earlier_conversion_is_replaced(folder):
    (folder / 'mine').mkdir()
    (folder / 'mine/thesis.txt').write_text('all of it')
    for out in ('mine', 'dense', 'text.txt'):
        with pytest.raises(ValueError, match='something else already'):
            run(folder / 'dense', folder / out, '--n_routed_experts=4')
    for _ in range(2):
        run(folder / 'dense', folder / 'new', '--n_routed_experts=4')


@pytest.mark.slow
def test_a_mistake_is_one_line_and_status_2(folder):
    result = subprocess.run(
        [sys.executable, HERE / 'convert.py', folder / 'dense', folder / 'new', '--attention=mla'],
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout, result.stderr.count('\n')) == (2, '', 1)
    assert result.stderr.startswith('convert.py: attention=mla: a latent is fitted to text')


@pytest.mark.slow
@pytest.mark.parametrize('bytes_that_fit', [100, 20_000])
def test_a_full_disk_is_one_line_and_leaves_what_there_was(folder, bytes_that_fit):
    run(folder / 'dense', folder / 'new', '--n_routed_experts=4')
    was = {p.name: p.read_bytes() for p in (folder / 'new').iterdir()}
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_that_fit, bytes_that_fit))
    result = subprocess.run(
        [
            sys.executable,
            HERE / 'convert.py',
            folder / 'dense',
            folder / 'new',
            '--n_routed_experts=2',
        ],
        capture_output=True,
        text=True,
        preexec_fn=full,
    )
    assert (
        result.returncode == 2
        and result.stderr.count('\n') == 1
        and 'could not be written' in result.stderr
    )
    assert {p.name: p.read_bytes() for p in (folder / 'new').iterdir()} == was
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith('.')) == []


def test_other_models_are_refused(folder):
    about = json.loads((folder / 'dense/config.json').read_text())
    for changes, said in (
        ({'model_type': 'gpt2'}, "model_type='gpt2'"),
        ({'attention_bias': True}, 'attention_bias'),
    ):
        (folder / 'dense/config.json').write_text(json.dumps(about | changes))
        with pytest.raises(ValueError, match=said):
            run(folder / 'dense', folder / 'new', '--n_routed_experts=4')
    (folder / 'dense/config.json').write_text(json.dumps(about))
    run(folder / 'dense', folder / 'moe', '--n_routed_experts=4')
    with pytest.raises(ValueError, match='must be a dense Llama-like model'):
        run(folder / 'moe', folder / 'new', '--n_routed_experts=4')


# ------------------------------------------------------------------------------------- real weights
@pytest.mark.slow
def test_smollm2_becomes_experts_and_exact_mla(tmp_path):
    model = Transformer.from_pretrained(asset('smollm2')).eval()
    text = Path(asset('tinyshakespeare.txt')).read_text()[:400]
    idx = torch.tensor([encode(prepare.load_tokenizer(asset('smollm2')), text)])
    want = model(idx)[0]
    for layout in (
        dict(n_routed_experts=3, n_shared_experts=1),
        dict(n_routed_experts=6, num_experts_per_tok=3, moe_intermediate_size=512),
        dict(n_routed_experts=4, n_shared_experts=1, moe_intermediate_size=512),
    ):
        s = settings(attention='gqa', **layout)
        check(s, model.config)
        got = to_moe(model, s)(idx)[0]
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    run(asset('smollm2'), tmp_path / 'exact', '--attention=mla', '--exact')
    torch.testing.assert_close(in_transformers(tmp_path / 'exact', idx), want, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_smollm2_survives_a_latent_of_128(tmp_path):
    """In closed form, on few tokens: nowhere near random weights' 10.9 nats, and near what it
    was"""
    stages = run(
        asset('smollm2'),
        tmp_path / 'mla',
        '--attention=mla',
        '--fit_steps=0',
        '--calibration_tokens=4096',
        '--eval_tokens=1024',
        f'--calibration={asset("tinyshakespeare.txt")}',
    )
    loss = {name: row['loss']['tinyshakespeare'] for name, row in stages.items()}
    assert loss['random weights'] > 10 > 5 > loss['as it was']
    assert loss['MLA, closed form'] < loss['as it was'] + 1.5
    assert (
        stages['MLA, closed form']['cache_bytes_per_token']
        / stages['as it was']['cache_bytes_per_token']
        < 0.42
    )


# ----------------------------------------------------------------------------------------- training
@pytest.mark.slow
def test_the_healing_config_trains_a_converted_model_on(folder):
    run(
        folder / 'dense',
        folder / 'new',
        '--attention=mla',
        *FITS,
        '--n_routed_experts=3',
        '--n_shared_experts=1',
        f'--calibration={folder / "text.txt"}',
        '--block_size=32',
        '--calibration_tokens=512',
        '--eval_tokens=256',
    )
    args = [
        HERE / 'config/smol135_heal.py',
        f'--init_from={folder / "new"}',
        '--device=cpu',
        f'--dataset={folder / "data"}',
        '--out_dir=out',
        '--block_size=32',
        '--dtype=float32',
        '--warmup_steps=0',
        '--log_interval=1',
        '--max_steps=4',
        '--learning_rate=1e-2',
    ]
    done = subprocess.run(
        [sys.executable, HERE / 'train.py', *args], cwd=folder, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    lines = (folder / 'out/metrics.jsonl').read_text(encoding='utf-8').splitlines()
    losses = [m['loss'] for m in map(json.loads, lines) if 'loss' in m]
    assert len(losses) == 4 and losses[3] < losses[0]
    config = json.loads((folder / 'out/step-000004/config.json').read_text(encoding='utf-8'))
    assert config['architectures'] == ['DeepseekV3ForCausalLM'] and config['kv_lora_rank'] == 30
