"""Tests of train.py, sample.py and config/, by running them as users do. Trained is a model of
34,000 parameters on a made-up text. What needs SmolLM2-135M looks in the folder $NANOSEEK_ASSETS
(smollm2/) and is skipped without it; NANOSEEK_SLOW=1 also takes a step with each of the larger
configurations, and compiles a model."""

import functools, json, math, os, pickle, random, re, runpy, shutil, signal, subprocess, sys
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import config, train
from model import Config, Transformer
from nanoseek import checkpoint
from nanoseek.device import to_fp8
from nanoseek.estimate import parameter_table
from support import asset, hooks, train_here

os.environ['HF_HUB_OFFLINE'] = '1'  # read when huggingface_hub is loaded, here and in processes
HERE = Path(train.__file__).resolve().parent
FROM = ('smol135_finetune', 'smol135_heal')  # which have no model of their own
CONFIGS = sorted(p.stem for p in (HERE / 'config').glob('[!_]*.py') if p.stem not in FROM)
STEPS, BLOCK, CONTEXT = 40, 32, 64
DENSE = [
    '--hidden_size=32',
    '--num_hidden_layers=2',
    '--num_attention_heads=2',
    f'--max_position_embeddings={CONTEXT}',
    '--initializer_range=0.1',
    f'--block_size={BLOCK}',
    '--batch_size=4',
    '--learning_rate=1e-2',
    '--warmup_steps=5',
    '--log_interval=1',
    '--checkpoint_interval=10',
    '--keep_checkpoints=0',
    '--out_dir=out/tiny',
    '--device=cpu',
    '--dtype=float32',
    f'--max_steps={STEPS}',
]
MLA = [
    '--attention=mla',
    '--kv_lora_rank=16',
    '--qk_nope_head_dim=8',
    '--qk_rope_head_dim=4',
    '--v_head_dim=10',
]
TINY = [
    *DENSE,
    *MLA,
    '--n_routed_experts=4',
    '--n_shared_experts=1',
    '--num_experts_per_tok=2',
    '--bias_update_speed=0.01',
    '--moe_intermediate_size=16',
    '--num_nextn_predict_layers=1',
]
SMALL = [
    '--batch_size=1',
    '--global_batch_size=1',
    '--max_steps=1',
    '--eval_steps=1',
    '--sample_interval=0',
]


def run(folder, script, *args, timeout=300, **settings):
    return subprocess.run(
        [sys.executable, HERE / script, *map(str, args)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        **settings,
    )


@pytest.fixture
def call(monkeypatch, capfd):
    """As run, but in this process: the same script, without the seconds that loading torch takes"""

    def call(folder, script, *args):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, 'argv', [str(HERE / script), *map(str, args)])
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)}
        status = 0
        capfd.readouterr()
        try:
            runpy.run_path(str(HERE / script), run_name='__main__')
        except SystemExit as e:
            status = e.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return SimpleNamespace(
            returncode=status, **dict(zip(('stdout', 'stderr'), capfd.readouterr()))
        )

    return call


@pytest.fixture(scope='session')
def home(tmp_path_factory):
    """A folder with data/mine, data/more of the same tokenizer and data/short, and in out/tiny a
    model trained on the first"""
    folder, rng = tmp_path_factory.mktemp('home'), random.Random(1)
    words = 'the king and his caf\u00e9 do not go to Rome before we proceed any further hear me speak\n'.split(
        ' '
    )
    (folder / 'mine.txt').write_text(
        ' '.join(rng.choices(words, k=12000)), encoding='utf-8', newline=''
    )
    (folder / 'short.txt').write_text('to be or not to be ' * 10)
    (folder / 'more.txt').write_text(
        ' '.join(rng.choices(words[:5], k=260)), encoding='utf-8', newline=''
    )
    for name, *args in (['mine'], ['more', '--tokenizer=data/mine'], ['short']):
        done = run(folder, 'prepare.py', f'{name}.txt', *args)
        assert done.returncode == 0, done.stderr
    done = run(folder, 'train.py', *TINY, '--dataset=mine')
    assert done.returncode == 0, done.stderr
    (folder / 'stdout').write_text(done.stdout)
    (folder / 'stderr').write_text(done.stderr)
    return folder


@pytest.fixture
def copy(home, tmp_path):
    """A copy of home, to be changed"""
    return shutil.copytree(home, tmp_path / 'copy')


def metrics(folder, out='out/tiny'):
    return [json.loads(line) for line in (folder / out / 'metrics.jsonl').read_text().splitlines()]


def losses(folder, out='out/tiny'):
    return {m['step']: m['loss'] for m in metrics(folder, out) if 'loss' in m}


@pytest.fixture
def trained(home, call):
    """Trains in folder as home was, but for args -> losses {step: loss}"""

    def trained(folder, *args, base=TINY, how=call):
        done = how(folder, 'train.py', *base, f'--dataset={home / "data/mine"}', *args)
        assert done.returncode == 0, done.stderr
        return losses(folder)

    return trained


def ids(home, split, dataset='mine'):
    return np.fromfile(home / f'data/{dataset}/{split}.bin', '<u2').astype(np.int64)


def files(folder):
    return {
        str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob('*') if p.is_file()
    }


def weights(folder, step=STEPS):
    return (folder / f'out/tiny/step-{step:06d}/model.safetensors').read_bytes()


# ------------------------------------------------------------------------------------------------
# config/


@dataclass
class Kinds:
    """Of every type that a setting may have"""

    count: int = 1  # an int
    rate: float = 0.5  # a float
    flag: bool = False  # a bool
    name: str = 'x'  # a str
    maybe: int | None = 3  # an int or none
    table: dict | None = None  # a dict or none
    mode: Literal['auto', True, False] = 'auto'  # a choice
    either: str | dict = 'x'  # a str or a dict


@pytest.mark.parametrize(
    'text, value',
    [
        ('count=1e4', 10000),
        ('count=12', 12),
        ('count=-3', -3),
        ('rate=1', 1.0),
        ('rate=3e-4', 3e-4),
        ('flag=true', True),
        ('flag=False', False),
        ('name=none', 'none'),
        ('name=12', '12'),
        ('name=', ''),
        ('name=a=b --c', 'a=b --c'),
        ('maybe=none', None),
        ('maybe=1e3', 1000),
        ('table=none', None),
        ("table={'factor': 4.0}", {'factor': 4.0}),
        ('either=a', 'a'),
        ('either=12', '12'),
        ("either={'a': 0.7, 'b': 3}", {'a': 0.7, 'b': 3}),
        ('mode=auto', 'auto'),
        ('mode=true', True),
        ('mode=false', False),
    ],
)
def test_values_get_the_type_of_their_setting_in_both_spellings(text, value):
    name, _, word = text.partition('=')
    for argv in ([f'--{text}'], [f'--{name}', word]):
        (given,) = config.load(Kinds, argv=argv)
        assert given == {name: value} and type(given[name]) is type(value)


@pytest.mark.parametrize(
    'text',
    [
        'count=1.5',
        'count=true',
        'count=none',
        'count=inf',
        'rate=fast',
        'rate=true',
        'flag=1',
        'flag=maybe',
        'maybe=x',
        'table=3',
        'mode=1',
        'mode=never',
        'count=',
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name_and_value(text):
    name, _, word = text.partition('=')
    with pytest.raises(
        ValueError, match=re.escape(f'{name}={word!r} on the command line: wanted ')
    ):
        config.load(Kinds, argv=[f'--{text}'])


def test_later_settings_win_in_files_and_on_the_command_line(tmp_path):
    (tmp_path / 'a.py').write_text(
        'import math\n_half = 0.5\ncount = 1e3\nrate = _half * 2\nname = "a"'
    )
    (tmp_path / 'b.py').write_text('name = "b"')
    a, b = map(str, (tmp_path / 'a.py', tmp_path / 'b.py'))
    load = lambda *argv: config.load(Kinds, argv=argv)[0]
    assert load(a) == {'count': 1000, 'rate': 1.0, 'name': 'a'}
    assert load(a, b)['name'] == 'b' and load(b, a)['name'] == 'a'
    assert load(a, '--name=c')['name'] == 'c' and load('--name=c', a)['name'] == 'a'
    assert load('--count=1', '--count', '2') == {'count': 2}
    assert load('--flag', a)['flag'] is True


@pytest.mark.parametrize(
    'text, line',
    [
        (
            'learning_rte = 1',
            "train.py: unknown setting 'learning_rte' in my.py, did you mean 'learning_rate'?",
        ),
        ('max_steps = "many"', "train.py: max_steps='many' in my.py: wanted int"),
        ('a = 1\nmax_steps = = 2', 'train.py: my.py, line 2: invalid syntax'),
    ],
)
def test_a_mistake_in_a_config_file_is_one_line(tmp_path, call, text, line):
    (tmp_path / 'my.py').write_text(text)
    done = call(tmp_path, 'train.py', 'my.py')
    assert (done.returncode, done.stdout, done.stderr) == (2, '', line + '\n')
    assert list(files(tmp_path)) == ['my.py']


def test_help_has_a_line_for_every_setting(tmp_path):
    done = run(tmp_path, 'train.py', '--help')
    rows = re.findall(r'^  --(\w+)=(.*?)  +(\S.*?)  +(\S.*)$', done.stdout, re.M)
    assert done.returncode == 0 and not done.stderr
    assert [r[0] for r in rows] == [f.name for c in (train.Settings, Config) for f in fields(c)]


def test_no_setting_of_training_is_also_one_of_the_model():
    assert not {f.name for f in fields(train.Settings)} & {f.name for f in fields(Config)}


# ------------------------------------------------------------------------------------------------
# The files in config/

TOTALS = {
    'linear10': 10_095_744,
    'smol135': 372_896_448,
    'smol135_dense': 134_515_008,
    'smol774': 774_291_888,
}


def shape(name, **settings):
    """The model of a config file, on the meta device"""
    given = config.load(train.Settings, Config, argv=[str(HERE / f'config/{name}.py')])
    _, model_settings = train.turn_dial(train.Settings, *given)
    with torch.device('meta'):
        return Transformer(Config(**{'vocab_size': 65, **model_settings}))


@pytest.mark.parametrize('name', CONFIGS)
def test_a_config_file_says_how_many_parameters_it_has(name):
    table, text = parameter_table(shape(name)), (HERE / f'config/{name}.py').read_text()
    head = ' '.join(line.lstrip('# ') for line in text.partition('\nout_dir')[0].splitlines())
    told = re.findall(r'([\d.,]*\d)([MB]?) (parameters)', head) + re.findall(
        r'([\d.]+)([MB]) (active)', head
    )
    assert told[0][2] == 'parameters' and len(told) <= 2
    for (number, unit, _), count in zip(told, (table['total'], table['active'])):
        digits = len(number.partition('.')[2])
        assert float(number.replace(',', '')) == round(
            count / {'': 1, 'M': 1e6, 'B': 1e9}[unit], digits
        )
    assert (
        table['total']
        == sum(table.values()) - table['total'] - table['active']
        == TOTALS.get(name, table['total'])
    )


def test_the_counts_are_the_known_ones():
    table = parameter_table(shape('smol135'))
    parts = {'attention': 25_989_120, 'moe': 318_556_800, 'embedding': 28_311_552, 'norms': 38_976}
    assert {k: n for k, n in table.items() if n and k not in ('total', 'active')} == parts
    biases = [
        b.numel()
        for n, b in shape('linear10').named_buffers()
        if n.endswith('e_score_correction_bias')
    ]
    assert biases == [4] * 4
    names = 'v3_tiny', 'v3_mini', 'shakespeare'
    tiny, mini, shakespeare = (parameter_table(shape(name))['total'] / 1e9 for name in names)
    assert round(tiny, 2) == 0.14 and round(mini, 2) == 5.69 and shakespeare < 0.006


@pytest.mark.slow
@pytest.mark.parametrize('name', CONFIGS)
def test_max_steps_0_prints_the_model_without_a_dataset(tmp_path, call, name):
    done = call(tmp_path, 'train.py', HERE / f'config/{name}.py', '--max_steps=0')
    assert done.returncode == 0 and not done.stderr and not files(tmp_path)
    assert (
        re.search(r'^parameters: total [\d,]+ \| active [\d,]+', done.stdout, re.M)
        and ' MB' in done.stdout
    )
    assert f'total {TOTALS.get(name, 0):,} ' in done.stdout or name not in TOTALS


def slow(name):
    skip = pytest.mark.skipif(
        not os.environ.get('NANOSEEK_SLOW'), reason='NANOSEEK_SLOW is not set'
    )
    return pytest.param(name, marks=skip)


@pytest.mark.slow
@pytest.mark.parametrize('name', [slow(n) if 'smol' in n else n for n in CONFIGS if n != 'v3_mini'])
def test_a_config_file_takes_a_step(home, tmp_path, call, name):
    done = call(
        tmp_path,
        'train.py',
        HERE / f'config/{name}.py',
        *SMALL,
        f'--dataset={home / "data/mine"}',
        '--block_size=32',
        '--out_dir=out/tiny',
    )
    assert done.returncode == 0, done.stderr
    assert (
        0 < losses(tmp_path)[1] < 12
        and (tmp_path / 'out/tiny/step-000001/model.safetensors').is_file()
    )
    shutil.rmtree(tmp_path / 'out')


# ------------------------------------------------------------------------------------------------
# A run


def test_the_loss_falls(home):
    uniform = math.log(len(set(ids(home, 'train'))))
    assert losses(home)[1] > 0.9 * uniform and losses(home)[STEPS] < 0.75 * uniform
    assert metrics(home)[-1]['val_loss'] < 0.75 * uniform


def test_metrics_and_log_hold_what_was_promised(home):
    keys = {
        'step',
        'tokens',
        'flops',
        'elapsed_s',
        'loss',
        'lr',
        'grad_norm',
        'step_ms',
        'tok_per_s',
        'mfu',
        'memory_mb',
        'moe/load_max',
        'moe/load_min',
        'moe/dead',
        'mtp_loss',
        'balance_loss',
    }
    *steps, last = metrics(home)
    assert [m['step'] for m in steps] == list(range(1, STEPS + 1)) and all(
        keys <= set(m) for m in steps
    )
    assert [m['tokens'] for m in steps] == [4 * BLOCK * n for n in range(1, STEPS + 1)]
    assert last['step'] == STEPS and {'elapsed_s', 'val_loss', 'val_bpb'} <= set(last)
    assert 0 < last['val_accept'] <= 1
    assert all(
        0 < m['lr'] <= 1e-2 and 0 < m['grad_norm'] < 100 and 0 < m['memory_mb'] < 1e5 for m in steps
    )
    assert (home / 'out/tiny/train.log').read_text() == (home / 'stdout').read_text()


def test_a_run_in_which_nothing_is_wrong_has_nothing_on_stderr(home):
    assert (home / 'stderr').read_text() == ''


def test_settings_json_has_every_setting_and_the_versions(home):
    found = json.loads((home / 'out/tiny/settings.json').read_text())
    assert {f.name for c in (train.Settings, Config) for f in fields(c)} | {
        'python',
        'torch',
        'git',
    } <= set(found)
    assert found['learning_rate'] == 1e-2 and found['vocab_size'] == len(set(ids(home, 'train')))


def validation_loss(model, tokens):
    tokens, W = (
        torch.from_numpy(tokens),
        (len(tokens) - 1) // BLOCK,
    )  # windows side by side, the rest is left out
    x, y = (t[: W * BLOCK].view(W, BLOCK) for t in (tokens[:-1], tokens[1:]))
    with torch.no_grad():
        logits = model(x)[0] if isinstance(model, Transformer) else model(x).logits
    return F.cross_entropy(logits.double().flatten(0, 1), y.flatten()).item()


@pytest.mark.parametrize('loader', ['transformers', 'model'])
def test_the_validation_loss_is_that_of_the_saved_model(home, loader):
    if loader == 'transformers':
        auto = pytest.importorskip('transformers').AutoModelForCausalLM
    load = auto.from_pretrained if loader == 'transformers' else Transformer.from_pretrained
    model, tokens = load(home / f'out/tiny/step-{STEPS:06d}').eval(), ids(home, 'val')
    loss, found = validation_loss(model, tokens), metrics(home)[-1]
    assert abs(found['val_loss'] - loss) < 1e-5
    text = (home / 'mine.txt').read_text(encoding='utf-8')
    part = text[int(len(text) * 0.9) : int(len(text) * 0.95)]
    per_token = len(part.encode()) / len(tokens)
    assert (
        found['val_bpb'] == pytest.approx(loss / math.log(2) / per_token, abs=1e-4)
        and per_token > 1
    )


@pytest.mark.slow
def test_the_same_command_again_gives_the_same_numbers(home, copy, trained):
    assert trained(copy, '--resume=never', how=run) == losses(home)
    assert [m['val_loss'] for m in metrics(copy) if 'val_loss' in m] == [
        metrics(home)[-1]['val_loss']
    ]
    assert weights(copy) == weights(home)


@pytest.mark.slow
def test_bfloat16_repeats_and_is_near_float32(home, tmp_path, trained):
    first = trained(tmp_path, '--dtype=bfloat16')
    assert trained(tmp_path, '--dtype=bfloat16', '--resume=never') == first != losses(home)
    assert abs(first[STEPS] - losses(home)[STEPS]) < 0.1


@pytest.mark.slow
def test_float16_with_loss_scaling_is_near_float32(home, tmp_path, trained):
    assert abs(trained(tmp_path, '--dtype=float16')[STEPS] - losses(home)[STEPS]) < 0.1


@pytest.mark.slow
def test_another_seed_gives_other_numbers_and_only_the_newest_checkpoints_are_kept(
    home, tmp_path, trained
):
    found = trained(tmp_path, '--seed=2', '--keep_checkpoints=2')
    assert not set(found.values()) & set(losses(home).values())
    assert sorted(p.name for p in (tmp_path / 'out/tiny').glob('*step*')) == [
        'step-000030',
        'step-000040',
    ]


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(home, tmp_path, trained):
    found = trained(tmp_path, '--gradient_checkpointing=true')
    assert all(abs(found[step] - loss) < 1e-5 for step, loss in losses(home).items())


@pytest.mark.slow
def test_four_micro_steps_of_two_equal_one_of_eight(tmp_path, trained):
    dense = [*DENSE, '--attention=gqa', '--max_steps=20', '--resume=never']
    whole = trained(tmp_path, '--batch_size=8', base=dense)
    parts = trained(tmp_path, '--batch_size=2', '--global_batch_size=8', base=dense)
    assert len(whole) == 20 and all(abs(parts[step] - whole[step]) < 1e-5 for step in whole)


@pytest.mark.slow
def test_going_on_from_a_checkpoint_equals_never_having_stopped(home, copy, trained):
    for step in (30, 40):
        shutil.rmtree(copy / f'out/tiny/step-{step:06d}')
    (copy / 'out/tiny/.step-000030.tmp').mkdir()  # of a run that was killed while it saved
    assert trained(copy, how=run) == losses(home) and weights(copy) == weights(home)
    assert [m['step'] for m in metrics(copy)] == [m['step'] for m in metrics(home)]


def test_going_on_repeats_the_dropout_of_the_run_that_was_not_stopped(tmp_path, trained):
    base = [*DENSE, '--attention=gqa', '--max_steps=10', '--checkpoint_interval=5', '--dropout=0.3']
    whole = trained(tmp_path, base=base)
    shutil.rmtree(tmp_path / 'out/tiny/step-000010')
    assert trained(tmp_path, base=base) == whole


@pytest.mark.slow
@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM'])
def test_a_signal_ends_the_run_with_a_checkpoint_from_which_it_goes_on(
    home, tmp_path, name, trained
):
    command = [sys.executable, HERE / 'train.py', *TINY, f'--dataset={home / "data/mine"}']
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith('step     10/'):
                process.send_signal(getattr(signal, name))
                break
        rest, errors = process.communicate(timeout=100)
    assert process.returncode == 0 and f'{name}: stopped after step' in rest, errors
    last = max(losses(tmp_path))
    assert (
        10 <= last < STEPS and (tmp_path / f'out/tiny/step-{last:06d}/trainer/state.pt').is_file()
    )
    assert trained(tmp_path) == losses(home) and weights(tmp_path) == weights(home)


def test_a_finished_run_says_so_and_goes_on_with_more_steps(home, copy, call, trained):
    before = losses(home)
    done = call(copy, 'train.py', *TINY, '--dataset=mine')
    assert (
        done.returncode == 0
        and '--max_steps=' in done.stdout
        and losses(copy) == before
        and not done.stderr
    )
    assert list(trained(copy, f'--max_steps={STEPS + 3}')) == list(range(1, STEPS + 4))
    assert {step: losses(copy)[step] for step in before} == before


def test_another_model_is_refused_where_a_run_goes_on(copy, call):
    before = files(copy)
    done = call(copy, 'train.py', *TINY, '--dataset=mine', '--kv_lora_rank=24')
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and files(copy) == before
    assert all(
        words in done.stderr for words in ('step-000040', 'kv_lora_rank=16', '24', '--resume=never')
    )


# .ci/checkpoint-v1 is out/v1/step-000004 of
#   python prepare.py shakespeare && python train.py `what is in V1` --out_dir=out/v1
# by the train.py of the commit that added it; so are the numbers.
V1 = (
    '--hidden_size=16 --num_hidden_layers=2 --num_attention_heads=2 --q_lora_rank=4 --kv_lora_rank=6 '
    '--qk_nope_head_dim=2 --qk_rope_head_dim=4 --v_head_dim=4 --intermediate_size=8 --n_routed_experts=3 '
    '--n_shared_experts=1 --moe_intermediate_size=8 --first_k_dense_replace=1 --num_nextn_predict_layers=1 '
    '--max_position_embeddings=32 --initializer_range=0.1 --block_size=32 --batch_size=4 --warmup_steps=2 '
    '--learning_rate=1e-2 --max_steps=6 --checkpoint_interval=4 --eval_interval=4 --log_interval=1 --device=cpu '
    '--dtype=float32'
).split()
V1_LOSSES, V1_VAL_4, V1_VAL_6 = {5: 3.752951, 6: 3.714631}, 3.755566, 3.675756


@pytest.mark.slow
def test_a_checkpoint_of_version_1_is_read_and_goes_on(tmp_path, call):
    old = shutil.copytree(HERE / '.ci/checkpoint-v1', tmp_path / 'v1')
    assert call(tmp_path, 'prepare.py', 'shakespeare').returncode == 0
    loss = validation_loss(
        Transformer.from_pretrained(old).eval(), ids(tmp_path, 'val', 'shakespeare')
    )
    assert loss == pytest.approx(V1_VAL_4, abs=1e-3)
    done = call(tmp_path, 'train.py', *V1, '--out_dir=out/tiny', '--resume=v1')
    assert done.returncode == 0 and losses(tmp_path) == pytest.approx(V1_LOSSES, abs=1e-3), (
        done.stderr
    )
    assert metrics(tmp_path)[-1]['val_loss'] == pytest.approx(V1_VAL_6, abs=1e-3)


@pytest.mark.slow
def test_smollm2_is_fine_tuned_on_its_own_tokens_alone(home, tmp_path, call):
    folder, data, script = (
        asset('smollm2'),
        tmp_path / 'data/shakespeare-smollm2',
        HERE / 'config/smol135_finetune.py',
    )
    transformers, text = pytest.importorskip('transformers'), 'ROMEO:\nWherefore art thou?\n'
    args = [
        script,
        f'--init_from={folder}',
        '--out_dir=out/tiny',
        '--device=cpu',
        '--dtype=float32',
    ]
    small = [
        '--block_size=64',
        '--batch_size=2',
        '--eval_steps=2',
        '--log_interval=1',
        '--sample_interval=0',
    ]
    done = call(tmp_path, 'train.py', *args, '--max_steps=0')
    assert (
        done.returncode == 0
        and 'LlamaForCausalLM' in done.stdout
        and 'total 134,515,008 ' in done.stdout
    )
    assert (
        call(
            tmp_path, 'prepare.py', 'shakespeare', f'--tokenizer={folder}', f'--out_dir={data}'
        ).returncode
        == 0
    )
    done = call(
        tmp_path, 'train.py', *args, *small, f'--dataset={home / "data/mine"}', '--max_steps=3'
    )
    assert (
        done.returncode == 2 and done.stderr.count('\n') == 1 and not (tmp_path / 'out').exists()
    ), done
    assert all(
        words in done.stderr
        for words in (f'init_from={folder}', 'data/mine', 'prepare.py', '--tokenizer=')
    )
    done = call(tmp_path, 'train.py', *args, *small, '--max_steps=3')
    assert done.returncode == 0 and losses(tmp_path)[1] < 6, done  # ln(49152) = 10.8
    assert metrics(tmp_path)[-1]['val_loss'] < 4.5
    last = tmp_path / 'out/tiny/step-000003'
    theirs, ours = (
        transformers.AutoModelForCausalLM.from_pretrained(last),
        Transformer.from_pretrained(last),
    )
    idx, original = (
        transformers.AutoTokenizer.from_pretrained(f)(text)['input_ids'] for f in (last, folder)
    )
    assert idx == original
    with torch.no_grad():
        idx = torch.tensor([idx])
        a, b, before = ours(idx)[0], theirs(idx).logits, Transformer.from_pretrained(folder)(idx)[0]
    assert (a - b).abs().max() < 1e-3 < 1e-2 < (a - before).abs().max()
    shutil.rmtree(tmp_path / 'out')


@pytest.mark.slow
@pytest.mark.parametrize('cxx', [slow(None), 'no-such-compiler'])
def test_compile_gives_the_same_losses_or_goes_on_without_it(home, tmp_path, cxx, trained):
    base = [*DENSE, '--attention=gqa', '--num_hidden_layers=1', '--max_steps=3', '--resume=never']
    plain = trained(tmp_path, base=base)
    env = {
        **os.environ,
        'TORCHINDUCTOR_COMPILE_THREADS': '1',
        'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'cache'),
    }
    try:
        done = run(
            tmp_path,
            'train.py',
            *base,
            f'--dataset={home / "data/mine"}',
            '--compile=true',
            timeout=60,
            env={**env, 'CXX': cxx} if cxx else env,
        )
    except subprocess.TimeoutExpired:
        pytest.skip('compiling takes longer than 60 s here')
    assert done.returncode == 0, done.stderr
    assert not cxx or 'torch.compile does not work here' in done.stdout
    assert all(abs(loss - plain[step]) < 1e-4 for step, loss in losses(tmp_path).items())


# ------------------------------------------------------------------------------------------------
# A mixture of datasets

MIXED = [*DENSE, '--attention=gqa', "--dataset={'mine': 0.7, 'more': 0.3}", '--eval_interval=10']


@pytest.fixture(scope='session')
def mixed(home, tmp_path_factory):
    """A folder with home's data, and in out/tiny a model trained on two of them"""
    folder = tmp_path_factory.mktemp('mixed')
    shutil.copytree(home / 'data', folder / 'data')
    done = run(folder, 'train.py', *MIXED)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return folder


@pytest.mark.slow
def test_a_mixture_is_evaluated_and_logged_by_source(mixed):
    *steps, last = metrics(mixed)
    model, loss = Transformer.from_pretrained(mixed / f'out/tiny/step-{STEPS:06d}').eval(), {}
    W = {name: (len(ids(mixed, 'train', name)) - 1) // BLOCK for name in ('mine', 'more')}
    for m in (m for m in steps if 'loss' in m):
        count = {name: m[f'data/{name}/tokens'] / BLOCK for name in W}
        assert (
            sum(count.values()) * BLOCK == m['tokens']
            and abs(count['mine'] - m['tokens'] / BLOCK * 0.7) <= 0.5
        )
        assert all(
            m[f'data/{name}/epochs'] == pytest.approx(count[name] / W[name], abs=1e-4) for name in W
        )
    assert steps[-1]['data/more/epochs'] > 1
    for name in W:
        loss[name] = validation_loss(model, ids(mixed, 'val', name))
        split = json.loads((mixed / f'data/{name}/meta.json').read_text())['splits']['val']
        bits = last[f'val_bpb/{name}'] * split['bytes'] / split['tokens']
        assert (
            abs(last[f'val_loss/{name}'] - loss[name]) < 1e-5
            and abs(bits * math.log(2) - loss[name]) < 1e-5
        )
    assert last['val_loss'] == pytest.approx(
        0.7 * last['val_loss/mine'] + 0.3 * last['val_loss/more'], 1e-12
    )
    per_token = [last[f'val_loss/{name}'] / last[f'val_bpb/{name}'] for name in W]  # times ln 2
    assert last['val_bpb'] == pytest.approx(
        last['val_loss'] / (0.7 * per_token[0] + 0.3 * per_token[1]), 1e-9
    )
    line = f'bits per byte | mine {loss["mine"]:.4f} | more {loss["more"]:.4f}\n'
    assert line in (mixed / 'out/tiny/train.log').read_text() and loss['more'] < loss['mine']
    card = (mixed / f'out/tiny/step-{STEPS:06d}/README.md').read_text()
    assert '- data: 0.7 mine (unknown) + 0.3 more (unknown), tokenizer char\n' in card


@pytest.mark.slow
def test_going_on_with_a_mixture_equals_never_having_stopped(mixed, tmp_path, call):
    copy, times = (
        shutil.copytree(mixed, tmp_path / 'copy'),
        ('elapsed_s', 'step_ms', 'tok_per_s', 'mfu', 'memory_mb'),
    )
    for step in (20, 30, 40):
        shutil.rmtree(copy / f'out/tiny/step-{step:06d}')
    done = call(
        copy, 'train.py', *MIXED, "--dataset={'more': 3, 'mine': 7}"
    )  # the same, put otherwise
    assert done.returncode == 0 and 'going on from out/tiny/step-000010' in done.stdout, done.stderr
    assert losses(copy) == losses(mixed) and weights(copy) == weights(mixed)
    a, b = (
        [{k: v for k, v in m.items() if k not in times} for m in metrics(folder)]
        for folder in (copy, mixed)
    )
    assert a == b


@pytest.mark.slow
def test_the_data_of_skipped_steps_have_been_drawn(mixed, tmp_path, call):
    copy = shutil.copytree(mixed, tmp_path / 'copy')
    last = copy / f'out/tiny/step-{STEPS:06d}/trainer'
    torch.save(torch.load(last / 'state.pt', weights_only=True) | {'skipped': 3}, last / 'state.pt')
    manifest = json.loads((last / 'manifest.json').read_text())
    manifest['trainer/state.pt'] = checkpoint.checksum(last / 'state.pt')
    (last / 'manifest.json').write_text(json.dumps(manifest))
    assert call(copy, 'train.py', *MIXED, f'--max_steps={STEPS + 1}').returncode == 0
    count = {name: metrics(copy)[-2][f'data/{name}/tokens'] // BLOCK for name in ('mine', 'more')}
    assert (
        sum(count.values()) == 4 * (STEPS + 1 + 3)
        and abs(count['more'] - 0.3 * sum(count.values())) <= 0.5
    )


def test_another_mixture_is_refused_where_a_run_goes_on(mixed, call):
    before = files(mixed)
    for dataset, words in (
        ("{'mine': 0.6, 'more': 0.4}", '3/5 mine|2/5 more'),
        ('mine', 'now it is mine'),
    ):
        done = call(mixed, 'train.py', *MIXED, f'--dataset={dataset}')
        assert done.returncode == 2 and done.stderr.count('\n') == 1 and files(mixed) == before
        assert all(
            word in done.stderr
            for word in ('7/10 mine', '3/10 more', '--resume=never', *words.split('|'))
        )


def test_the_document_mask_is_switched_on_where_there_is_a_token_to_see(home, tmp_path, capfd):
    assert run(tmp_path, 'prepare.py', home / 'mine.txt', '--tokenizer=bpe:300').returncode == 0
    args = [*DENSE, '--attention=gqa', '--dataset=mine', '--max_steps=1', '--resume=never']
    for mask in ('true', 'false'):
        with hooks() as at:
            assert train_here(tmp_path, *args, f'--doc_attention_mask={mask}') == 0
        assert at.model.doc_attention_mask is (mask == 'true')
    assert train_here(tmp_path, *args, '--doc_attention_mask', '--eos_token_id=5') == 2
    assert 'eos_token_id=5: set --eos_token_id=0' in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------
# A checkpoint, and sample.py


def test_a_checkpoint_is_complete_and_its_router_biases_have_moved(home):
    from safetensors.torch import load_file

    folder = home / f'out/tiny/step-{STEPS:06d}'
    names = 'README.md config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json'
    assert sorted(p.name for p in folder.iterdir()) == [*names.split(), 'trainer']
    biases = [
        t
        for n, t in load_file(folder / 'model.safetensors').items()
        if n.endswith('e_score_correction_bias')
    ]
    assert len(biases) == 3 and all(
        b.dtype == torch.float32 and b.abs().max() >= 0.01 for b in biases
    )
    card = (folder / 'README.md').read_text()
    assert f'{STEPS * 4 * BLOCK:,}' in card and f'{metrics(home)[-1]["val_loss"]:.4f}' in card


def test_transformers_generates_what_sample_does(home, call):
    transformers = pytest.importorskip('transformers')
    folder = home / f'out/tiny/step-{STEPS:06d}'
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer('before we proceed', return_tensors='pt')['input_ids']
    text = tokenizer.decode(model.generate(prompt, do_sample=False, max_new_tokens=30)[0])
    done = call(
        home, 'sample.py', '--prompt=before we proceed', '--temperature=0', '--max_new_tokens=30'
    )
    assert done.returncode == 0 and done.stdout == text + '\n' and len(text) == 47


@pytest.mark.slow
def test_sample_goes_on_where_torch_cannot_compile(home, tmp_path):
    args = '--prompt=the king', '--temperature=0', '--max_new_tokens=20'
    env = {**os.environ, 'CXX': 'no-such-compiler', 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path)}
    found = [run(home, 'sample.py', *args, *more, env=env) for more in ([], ['--compile'])]
    assert (
        found[0].stdout == found[1].stdout
        and found[1].returncode == 0
        and len(found[1].stdout) == 29
    )
    assert (
        'torch.compile does not work here' in found[1].stderr and 'Traceback' not in found[1].stderr
    )


@pytest.mark.slow
def test_sample_repeats_itself_for_a_seed(home, call):
    def sample(*args):
        done = call(
            home, 'sample.py', '--prompt=the king', '--max_new_tokens=40', '--temperature=1', *args
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    first, two, stopped = (
        sample(),
        sample('--num_samples=2').split('\n---\n'),
        sample('--stop=e', '--seed=3'),
    )
    assert (
        first.startswith('the king')
        and len(first) == 8 + 40 + 1
        and sample() == first != sample('--seed=2')
    )
    assert (
        two[0] + '\n' == first
        and two[1].startswith('the king')
        and two[1] != first
        and len(two[1]) == 49
    )
    assert len(stopped) < 49 and stopped[8:-1] + 'e' == sample('--seed=3')[8 : len(stopped)]
    assert sample('--temperature=0') == sample('--temperature=0', '--seed=2') == sample('--top_k=1')
    assert (
        len(sample('--max_new_tokens', 3 * CONTEXT)) == 8 + 3 * CONTEXT + 1
    )  # further than the context
    assert (
        sample(f'--checkpoint=out/tiny/step-{STEPS:06d}')
        == first
        != sample('--checkpoint=out/tiny/step-000010')
    )


def test_a_prompt_comes_from_stdin_or_a_file_as_well(home, call):
    (home / 'prompt.txt').write_text('caf\u00e9\nwe', encoding='utf-8')
    args = ['--temperature=0', '--max_new_tokens=9']
    direct = call(home, 'sample.py', '--prompt=caf\u00e9\nwe', *args).stdout
    file = call(home, 'sample.py', '--prompt=@prompt.txt', *args).stdout
    stdin = run(
        home,
        'sample.py',
        '--prompt',
        '-',
        *args,
        input='caf\u00e9\nwe',
        encoding='utf-8',
        env={**os.environ, 'PYTHONUTF8': '1'},
    ).stdout
    assert direct.startswith('caf\u00e9\nwe') and direct == file == stdin


@pytest.mark.slow
def test_smollm2_goes_on_as_transformers_has_it(tmp_path, call):
    folder, transformers = asset('smollm2'), pytest.importorskip('transformers')
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer('The capital of France is', return_tensors='pt')['input_ids']
    text = tokenizer.decode(model.generate(prompt, do_sample=False, max_new_tokens=12)[0])
    args = [
        f'--checkpoint={folder}',
        '--prompt=The capital of France is',
        '--temperature=0',
        '--max_new_tokens=12',
    ]
    assert call(tmp_path, 'sample.py', *args).stdout == text + '\n'


# ------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    'script, args, words',
    [
        ('train.py', '--dataset=nosuch', 'data/nosuch|python prepare.py nosuch'),
        ('train.py', '--dataset=short', 'val|9 tokens|block_size=32|33'),
        ('train.py', '--dataset={}', 'dataset={}|at least one'),
        ('train.py', '--dataset={1:1}', 'dataset={1: 1}'),
        ('train.py', "--dataset={'mine':0,'more':1}", "'mine' is 0|above 0"),
        ('train.py', "--dataset={'mine':1,'more':-2.5}", "'more' is -2.5|above 0"),
        ('train.py', "--dataset={'mine':1,'more':1e999}", "'more' is inf|a number"),
        ('train.py', "--dataset={'mine':'half'}", "'mine' is 'half'|a number"),
        ('train.py', "--dataset={'mine':1,'more':True}", "'more' is True|a number"),
        ('train.py', "--dataset={'mine':1,'more':1e-9}", "'more'|100,000"),
        ('train.py', "--dataset={'mine':1,'nosuch':1}", 'data/nosuch|python prepare.py nosuch'),
        ('train.py', "--dataset={'mine':1,'short':1}", 'data/mine|data/short|--tokenizer=data/'),
        (
            'train.py',
            "--dataset={'mine':1,'more':1} --block_size=64",
            'val|data/more|block_size=64',
        ),
        (
            'train.py',
            '--doc_attention_mask',
            'doc_attention_mask=true|dataset=mine|no end-of-text token',
        ),
        (
            'train.py',
            '--doc_attention_mask --attention=linear',
            'doc_attention_mask=true|attention=linear',
        ),
        ('train.py', '--vocab_size=8', 'vocabulary|dataset=mine|vocab_size=8'),
        ('train.py', '--block_size=128', 'block_size=128|max_position_embeddings=64'),
        ('train.py', '--block_size=1', 'block_size=1|MTP'),
        ('train.py', '--block_size=100000', 'block_size=100000|tokens'),
        (
            'train.py',
            '--attention=gqa --num_attention_heads=3',
            'num_attention_heads=3|hidden_size=32',
        ),
        ('train.py', '--num_experts_per_tok=5', 'num_experts_per_tok=5|at most 4'),
        ('train.py', '--qk_rope_head_dim=7', 'qk_rope_head_dim=7|even'),
        ('train.py', '--n_group=3', 'n_group=3|4 experts'),
        ('train.py', '--global_batch_size=6', 'global_batch_size=6|multiple|batch_size=4'),
        ('train.py', '--device=cuda:99', 'device=cuda:99|--device='),
        ('train.py', '--device=quantum', 'device=quantum|--device='),
        ('train.py', '--dtype=int8', "dtype='int8'|float32"),
        ('train.py', '--fp8=int4', "fp8='int4'|rowwise"),
        ('train.py', '--fp8=tensorwise', 'fp8=tensorwise|device=cpu|8.9'),
        ('train.py', '--learning_rate=-1', 'learning_rate=-1|above 0'),
        (
            'train.py',
            '--learning_rte=1',
            "'learning_rte' on the command line, did you mean 'learning_rate'?",
        ),
        ('train.py', '--max_steps=-1', 'max_steps=-1|at least 0'),
        ('train.py', '--max_steps', '--max_steps needs a value'),
        ('train.py', '--log_interval=0', 'log_interval=0|at least 1'),
        ('train.py', 'shakespear', "'shakespear'|.py"),
        ('train.py', 'nosuch.py', "no config file 'nosuch.py'"),
        ('train.py', '--out_dir=mine.txt', 'mine.txt'),
        ('train.py', '--resume=nosuchdir', 'resume=nosuchdir'),
        ('train.py', '--init_from=nosuchdir', "'nosuchdir'|Hub"),
        ('train.py', '--init_from=out/nowhere', "'out/nowhere'"),
        (
            'train.py',
            '--dataset=short --block_size=4 --init_from=out/tiny/step-000040',
            'dataset=short|init_from=out/tiny',
        ),
        ('train.py', '--sample_interval=1 --sample_prompt=\u03a9', "'\u03a9'|U+03A9"),
        ('sample.py', '--checkpoint=nosuch/hub-id', "'nosuch/hub-id'|Hub"),
        ('sample.py', '--checkpoint=out/nowhere', "'out/nowhere'"),
        ('sample.py', '--checkpoint=data', 'config.json'),
        ('sample.py', f'--prompt={"a" * CONTEXT}', f'{CONTEXT} tokens|{CONTEXT - 1}'),
        ('sample.py', '--prompt=', '0 tokens'),
        ('sample.py', '--prompt=\u03a9', "'\u03a9'|U+03A9"),
        ('sample.py', '--prompt=@latin1', 'UTF-8|0xe9|offset 3'),
        ('sample.py', '--prompt=@nosuch', 'nosuch'),
        ('sample.py', '--top_p=2', 'top_p=2|at most 1'),
        ('sample.py', '--temperature=-1', 'temperature=-1|at least 0'),
        ('sample.py', '--top_k=0', 'top_k=0|at least 1'),
        ('sample.py', '--stop=king', "stop='king'"),
        ('sample.py', '--device=cuda:99', 'device=cuda:99'),
        ('sample.py', '--dtype=int8', "dtype='int8'|float32"),
    ],
)
def test_a_mistake_is_one_line_that_names_it_and_leaves_nothing(home, call, script, args, words):
    (home / 'latin1').write_bytes(b'caf\xe9')
    before = files(home)
    command = [*TINY, '--dataset=mine', '--out_dir=out/other'] if script == 'train.py' else []
    done = call(home, script, *command, *args.split(' '))
    assert (
        done.returncode == 2
        and done.stderr.startswith(f'{script}: ')
        and done.stderr.count('\n') == 1
    ), done.stderr
    assert all(word in done.stderr for word in words.split('|')), done.stderr
    assert not done.stdout and files(home) == before and not (home / 'out/other').exists()


class Executed:
    """What makes a file if it is unpickled"""

    def __reduce__(self):
        return open, ('executed', 'w')


def reshaped(content):
    from safetensors.torch import load, save

    return save({**load(content), 'model.norm.weight': torch.ones(33)})


@pytest.mark.parametrize(
    'name, change, words',
    [
        ('config.json', lambda b: b.replace(b'"hidden_size"', b'"size"'), 'the model wants'),
        ('config.json', lambda b: b[:-9], 'config.json|damaged'),
        ('config.json', lambda b: b'[]', 'config.json'),
        ('model.safetensors', lambda b: b[:-1000], 'model.safetensors|damaged'),
        ('model.safetensors', reshaped, 'model.norm.weight|(33,)|(32,)'),
        ('model.safetensors', lambda b: pickle.dumps(Executed()), 'model.safetensors|damaged'),
        ('pytorch_model.bin', lambda b: pickle.dumps(Executed()), 'safetensors'),
    ],
)
@pytest.mark.parametrize(
    'script, option', [('train.py', '--init_from'), ('sample.py', '--checkpoint')]
)
def test_a_damaged_folder_is_one_line_and_nothing_of_it_is_executed(
    copy, call, script, option, name, change, words
):
    folder = copy / f'out/tiny/step-{STEPS:06d}'
    old = folder / name.replace('pytorch_model.bin', 'model.safetensors')
    content = change(old.read_bytes())
    old.unlink()
    (folder / name).write_bytes(content)
    before = files(copy)
    command = [
        '--dataset=mine',
        '--out_dir=out/other',
        f'--block_size={BLOCK}',
        '--max_steps=1',
        '--device=cpu',
    ]
    done = call(copy, script, f'{option}={folder}', *(command if script == 'train.py' else []))
    assert (
        done.returncode == 2
        and done.stderr.startswith(f'{script}: ')
        and done.stderr.count('\n') == 1
    ), done.stderr
    assert all(word in done.stderr for word in words.split('|')), done.stderr
    assert not done.stdout and files(copy) == before


@pytest.mark.parametrize(
    'version, write, words',
    [
        (
            1,
            lambda f: pickle.dump(Executed(), f, 2),
            'state.pt cannot be read',
        ),  # 1 had no checksums
        (1, lambda f: torch.save(Executed(), f), 'state.pt cannot be read'),
        (1, lambda f: f.write(b'PK'), 'state.pt cannot be read'),
        (999, lambda f: None, 'version is 999|2 the newest'),
        (2, lambda f: f.write(b'PK'), 'damaged|trainer/state.pt'),
    ],
    ids=['pickle', 'saved', 'cut', 'version', 'checksum'],
)
def test_a_trainer_state_that_is_code_or_of_another_version_is_refused(
    copy, call, version, write, words
):
    folder = copy / f'out/tiny/step-{STEPS:06d}'
    settings = json.loads((folder / 'trainer/settings.json').read_text())
    (folder / 'trainer/settings.json').write_text(json.dumps({**settings, 'version': version}))
    manifest = json.loads((folder / 'trainer/manifest.json').read_text())
    manifest['trainer/settings.json'] = checkpoint.checksum(folder / 'trainer/settings.json')
    (folder / 'trainer/manifest.json').write_text(json.dumps(manifest))
    with open(folder / 'trainer/state.pt', 'wb') as f:
        write(f)
    before = files(copy)
    done = call(
        copy, 'train.py', *TINY, '--dataset=mine', f'--max_steps={STEPS + 1}', f'--resume={folder}'
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith('train.py: ')
        and done.stderr.count('\n') == 1
    ), done.stderr
    assert all(word in done.stderr for word in words.split('|')) and files(copy) == before, (
        done.stderr
    )


@pytest.mark.slow
def test_mistakes_end_a_real_process_with_status_2(tmp_path):
    unplugged = {
        **os.environ,
        'HF_HUB_OFFLINE': '0',
        'HF_ENDPOINT': 'http://127.0.0.1:9',
        'HF_HOME': str(tmp_path),
    }
    for script, args, word in (
        ('train.py', [], 'python prepare.py shakespeare'),
        ('sample.py', [], '--checkpoint=DIR'),
        ('sample.py', ['--checkpoint=HuggingFaceTB/SmolLM2-135M'], 'Connection refused'),
    ):
        done = run(tmp_path, script, *args, env=unplugged)
        assert (
            done.returncode == 2
            and done.stderr.count('\n') == 1
            and word in done.stderr
            and not files(tmp_path)
        )


# ------------------------------------------------------------------------------------------------
# What people type


@pytest.fixture(scope='session')
def russian(tmp_path_factory):
    """A folder with data/ru, which has no Latin letter"""
    folder = tmp_path_factory.mktemp('russian')
    text = 'Мороз и солнце; день чудесный!\nЕщё ты дремлешь, друг прелестный...\n' * 60
    (folder / 'ru.txt').write_text(text, encoding='utf-8')
    done = run(folder, 'prepare.py', 'ru.txt')
    assert done.returncode == 0, done.stderr
    return folder


CHEAP = [
    HERE / 'config/shakespeare.py',
    '--dataset=ru',
    '--hidden_size=16',
    '--num_hidden_layers=1',
    '--num_attention_heads=2',
    '--batch_size=1',
    '--block_size=16',
    '--max_steps=1',
    '--max_position_embeddings=32',
    '--out_dir=out',
    '--device=cpu',
    '--resume=never',
]


def test_the_prompt_of_a_config_gives_way_to_the_letters_of_the_dataset(russian, call):
    done = call(russian, 'train.py', *CHEAP, '--sample_interval=1')
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith('sample_prompt='))
    assert line.startswith("sample_prompt='Before we proceed': character 'B' (U+0042) is not in ")
    prompt = re.search("; samples begin with '(.+)', from the validation split$", line)[1]
    assert prompt in (russian / 'ru.txt').read_text(encoding='utf-8')
    assert f'--- sample\n{prompt}' in done.stdout


def test_a_prompt_that_was_typed_is_refused_by_name(russian, call):
    done = call(russian, 'train.py', *CHEAP, '--sample_interval=1', '--sample_prompt=Before')
    assert done.returncode == 2
    assert done.stderr.startswith(
        "train.py: sample_prompt='Before': character 'B' (U+0042) is not "
    )
    assert done.stderr.count('\n') == 1
    done = call(russian, 'train.py', *CHEAP, '--sample_interval=0', '--sample_prompt=Before')
    assert done.returncode == 0, done.stderr  # nobody asks for a sample


def test_an_interval_of_0_is_never(russian, call):
    done = call(
        russian,
        'train.py',
        *CHEAP,
        '--max_steps=3',
        '--sample_interval=0',
        '--eval_interval=0',
        '--checkpoint_interval=0',
    )
    assert done.returncode == 0, done.stderr
    assert 'validation' not in done.stdout and '--- sample' not in done.stdout
    assert [path.name for path in (russian / 'out').glob('step-*')] == ['step-000003']
    card = (russian / 'out/step-000003/README.md').read_text(encoding='utf-8')
    assert not re.search(r'\bnan\b', card)


def test_the_folder_of_a_run_is_its_newest_whole_checkpoint(home, copy, call):
    (copy / 'out/tiny/step-000050').mkdir()  # one that was not finished
    (copy / 'out/tiny/step-000050/config.json').write_text('{}')
    newest = call(copy, 'sample.py', '--checkpoint=out/tiny/step-000040', '--temperature=0')
    folder = call(copy, 'sample.py', '--checkpoint=out/tiny', '--temperature=0')
    assert folder.returncode == 0, folder.stderr
    assert folder.stdout == newest.stdout
    args = [*DENSE, '--dataset=mine', '--max_steps=1', '--resume=never']
    found = []
    for source in ('out/tiny', 'out/tiny/step-000040'):
        done = call(
            copy, 'train.py', *args, f'--init_from={source}', f'--out_dir=from-{len(found)}'
        )
        assert done.returncode == 0, done.stderr
        found.append(losses(copy, f'from-{len(found)}'))
    assert found[0] == found[1]


# ------------------------------------------------------------------------------------------------
# Muon


@pytest.mark.slow
def test_muon_resumes_bit_identically_and_learns(home, trained, tmp_path):
    (tmp_path / 'whole').mkdir()
    whole = trained(tmp_path / 'whole', '--optimizer=muon', '--dtype=bfloat16')
    shutil.copytree(tmp_path / 'whole', tmp_path / 'part')
    for step in (30, 40):
        shutil.rmtree(tmp_path / f'part/out/tiny/step-{step:06d}')
    assert trained(tmp_path / 'part', '--optimizer=muon', '--dtype=bfloat16') == whole
    assert weights(tmp_path / 'part') == weights(tmp_path / 'whole')
    assert whole[STEPS] < losses(home)[STEPS] + 0.3


# ------------------------------------------------------------------------------------------------
# FP8

FP8 = [
    '--dataset=shakespeare',
    '--device=cpu',
    '--dtype=bfloat16',
    '--max_position_embeddings=64',
    '--block_size=64',
    '--batch_size=8',
    '--hidden_size=64',
    '--num_hidden_layers=2',
    '--num_attention_heads=4',
    '--warmup_steps=20',
    '--initializer_range=0.06',
    '--learning_rate=3e-3',
    '--log_interval=1',
    '--eval_steps=4',
    '--out_dir=out/tiny',
]
FP8_GQA = [*FP8, '--attention=gqa', '--num_key_value_heads=2', '--max_steps=200']
FP8_MLA = [
    *FP8,
    '--attention=mla',
    '--q_lora_rank=40',
    '--kv_lora_rank=32',
    '--qk_nope_head_dim=16',
    '--qk_rope_head_dim=16',
    '--v_head_dim=16',
    '--n_routed_experts=4',
    '--n_shared_experts=1',
    '--moe_intermediate_size=32',
    '--first_k_dense_replace=1',
    '--num_nextn_predict_layers=1',
    '--batch_size=3',
    '--optimizer=muon',
    '--max_steps=8',
    '--checkpoint_interval=4',
    '--tie_word_embeddings=false',
]


@pytest.fixture(scope='session')
def torchao():
    return pytest.importorskip(
        'torchao.float8', reason='torchao is not installed: pip install torchao'
    )


@pytest.fixture
def emulated(call, tmp_path, monkeypatch):
    """Trains in a folder of its own as train.py does, its FP8 matmuls emulated -> losses {step:
    loss}, the model"""
    call(tmp_path, 'prepare.py', 'shakespeare')
    monkeypatch.setattr(train, 'check_fp8', lambda *args: None)
    monkeypatch.setattr(train, 'to_fp8', functools.partial(to_fp8, emulate=True))

    def emulated(recipe, *args, name='run'):
        with hooks() as at:
            args = [*args, f'--dataset={tmp_path}/data/shakespeare', f'--fp8={recipe}']
            assert train_here(tmp_path / name, *args) == 0
        return losses(tmp_path / name), at.model

    return emulated


def in_fp8(model):
    return [name for name, m in model.named_modules() if type(m).__name__ == 'Float8Linear']


@pytest.mark.slow
def test_200_steps_in_emulated_fp8_follow_bfloat16_within_a_percent(torchao, emulated):
    means = lambda found: [
        sum(found[step + i] for i in range(1, 11)) / 10 for step in range(0, 200, 10)
    ]
    plain, _ = emulated('', *FP8_GQA, name='plain')
    assert plain[200] < 0.6 * plain[1]  # it learns
    for recipe in ('tensorwise', 'rowwise'):
        found, _ = emulated(recipe, *FP8_GQA, name=recipe)
        assert len(found) == 200 and not set(found.values()) & set(plain.values())
        assert means(found) == pytest.approx(means(plain), rel=0.01) and found == pytest.approx(
            plain, rel=0.02
        )


@pytest.mark.slow
def test_a_run_in_fp8_goes_on_and_is_a_checkpoint_like_any_other(torchao, emulated, tmp_path):
    whole, model = emulated('rowwise', *FP8_MLA)
    plain, other = emulated('', *FP8_MLA, name='plain')
    assert in_fp8(model) and not in_fp8(other) and not set(whole.values()) & set(plain.values())
    shutil.rmtree(tmp_path / 'run/out/tiny/step-000008')
    shutil.copytree(tmp_path / 'run', tmp_path / 'left')
    shutil.copytree(tmp_path / 'plain', tmp_path / 'joined')
    shutil.rmtree(tmp_path / 'joined/out/tiny/step-000008')
    final = {n: t.clone() for n, t in model.state_dict().items()}
    again, model = emulated('rowwise', *FP8_MLA)
    assert again == whole and all(t.equal(final[n]) for n, t in model.state_dict().items())
    left, joined = (
        emulated('', *FP8_MLA, name='left')[0],
        emulated('rowwise', *FP8_MLA, name='joined')[0],
    )
    for found, before, after in ((left, whole, plain), (joined, plain, whole)):
        assert [found[i] == before[i] for i in range(1, 9)] == [True] * 4 + [False] * 4
        assert found == pytest.approx(after, rel=0.01)
    folders = [tmp_path / name / 'out/tiny/step-000008' for name in ('run', 'plain')]
    tensors, configs = (
        [f(folder) for folder in folders]
        for f in (
            lambda d: {
                k: (t.shape, t.dtype)
                for k, t in safetensors.torch.load_file(d / 'model.safetensors').items()
            },
            lambda d: json.loads((d / 'config.json').read_text()),
        )
    )
    assert tensors[0] == tensors[1] and configs[0] == configs[1]
    model = Transformer.from_pretrained(folders[0])
    assert not in_fp8(model) and all(t.equal(final[n]) for n, t in model.state_dict().items())
    reference = (
        pytest.importorskip('transformers').AutoModelForCausalLM.from_pretrained(folders[0]).eval()
    )
    idx = torch.arange(60)[None]
    with torch.no_grad():
        assert torch.allclose(model.eval()(idx)[0], reference(idx).logits, atol=1e-4)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason='needs a CUDA device with FP8 (compute capability 8.9)',
)
@pytest.mark.parametrize('recipe', ['tensorwise', 'rowwise'])
@pytest.mark.parametrize('compile', ['false', 'true'])
def test_50_steps_in_fp8_on_a_gpu_follow_bfloat16(torchao, tmp_path, call, recipe, compile):
    call(tmp_path, 'prepare.py', 'shakespeare')
    curves = []
    for extra in ([], [f'--fp8={recipe}', f'--compile={compile}']):
        done = run(
            tmp_path,
            'train.py',
            *FP8_MLA,
            '--device=cuda',
            '--max_steps=50',
            '--resume=never',
            '--compile=false',
            *extra,
        )
        assert done.returncode == 0 and 'does not work here' not in done.stdout, done.stderr
        curves.append(losses(tmp_path))
    assert curves[0] != curves[1] and curves[1] == pytest.approx(curves[0], rel=0.02)
