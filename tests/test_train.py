"""Tests of train.py, run as users run it: a model of 34,000 parameters on a made-up text."""
import json
import math
import random
import re
import shutil
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import train
from conftest import ROOT, asset, metrics, run, train_here
from model import Config, Transformer
from nanoseek import cost

STEPS, BLOCK = 20, 32
DENSE = ('--attention=gqa --hidden_size=32 --num_hidden_layers=2 --num_attention_heads=2 '
         '--max_position_embeddings=64 --initializer_range=0.1 --dataset=mine --block_size=32 '
         '--batch_size=4 --learning_rate=1e-2 --warmup_steps=5 --log_interval=1 --max_steps=20 '
         '--checkpoint_interval=10 --keep_checkpoints=0 --out_dir=out --device=cpu '
         '--dtype=float32')
TINY = (f'{DENSE} --attention=mla --kv_lora_rank=16 --qk_nope_head_dim=8 --qk_rope_head_dim=4 '
        '--v_head_dim=10 --n_routed_experts=4 --n_shared_experts=1 --num_experts_per_tok=2 '
        '--bias_update_speed=0.01 --moe_intermediate_size=16 --num_nextn_predict_layers=1')
UNIFORM = math.log(24)                  # the loss in nats of a guess among 24 characters
TIMES = {'elapsed_s', 'step_ms', 'tok_per_s', 'mfu', 'memory_mb'}


@pytest.fixture(scope='session')
def home(tmp_path_factory):
    """A folder with datasets (more: of the tokenizer of mine; docs: documents), and in out a model
    trained on the first by a process of its own"""
    folder = tmp_path_factory.mktemp('home')
    rng = random.Random(1)
    words = 'the king and his caf\u00e9 do not go to Rome before we proceed any further hear me '
    words = f'{words}speak\n'.split(' ')
    documents = [json.dumps({'text': ' '.join(rng.choices(words, k=20))}) for _ in range(200)]
    texts = {
        'mine.txt': ' '.join(rng.choices(words, k=12000)),
        'more.txt': ' '.join(rng.choices(words[:5], k=260)),
        'short.txt': 'to be or not to be ' * 10,
        'docs.jsonl': '\n'.join(documents),
        'russian.txt': 'Мороз и солнце; день чудесный!\nЕщё ты дремлешь, друг прелестный...\n' * 60,
    }
    options = {'more.txt': ['--tokenizer=data/mine'], 'docs.jsonl': ['--tokenizer=bpe:300']}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding='utf-8', newline='')
        done = run(folder, 'prepare.py', name, *options.get(name, []))
        assert done.returncode == 0, done.stderr
    done = run(folder, 'train.py', *TINY.split())
    assert done.returncode == 0, done.stderr
    assert done.stderr == ''
    (folder / 'stdout').write_text(done.stdout, encoding='utf-8')
    return folder


@pytest.fixture
def folder(home, tmp_path):
    """An empty folder with home's datasets"""
    (tmp_path / 'data').symlink_to(home / 'data')
    return tmp_path


@pytest.fixture
def copy(home, folder):
    """home's run, to be changed"""
    shutil.copytree(home / 'out', folder / 'out')
    return folder


def trained(folder, options='', base=TINY):
    """Train in this process. Return {step: loss}."""
    assert train_here(folder, *base.split(), *options.split()) == 0
    return metrics(folder / 'out')


def weights(folder, step=STEPS):
    return (folder / f'out/step-{step:06d}/model.safetensors').read_bytes()


def rows(folder, without=()):
    """Return the lines of metrics.jsonl as dicts."""
    lines = (folder / 'out/metrics.jsonl').read_text(encoding='utf-8').splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in without} for line in lines]


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob('*') if path.is_file()}


def tokens(folder, split, dataset='mine'):
    return np.fromfile(folder / f'data/{dataset}/{split}.bin', '<u2').astype(np.int64)


@torch.no_grad()
def validation_loss(model, ids):
    """The mean over windows side by side; the rest is left out."""
    windows = (len(ids) - 1) // BLOCK
    x, y = torch.from_numpy(np.stack((ids[:-1], ids[1:])))[:, :windows * BLOCK]
    out = model(x.view(windows, BLOCK))
    logits = out[0] if isinstance(out, tuple) else out.logits
    return F.cross_entropy(logits.flatten(0, 1).double(), y).item()


# --------------------------------------------------------------------------------- configs

FROM = ('smol135_finetune', 'smol135_heal', 'smol135_chat')    # they have no model of their own
CONFIGS = sorted(f.stem for f in (ROOT / 'config').glob('*.py')
                 if f.stem not in FROM and not f.stem.startswith('grpo'))


@pytest.mark.parametrize('name', CONFIGS)
def test_a_config_has_the_parameters_that_its_head_names(tmp_path, monkeypatch, capsys, name):
    file = ROOT / f'config/{name}.py'
    monkeypatch.chdir(tmp_path)                         # without a dataset
    options = ['--vocab_size=65', '--device=cpu', str(file), '--max_steps=0']
    monkeypatch.setattr(sys, 'argv', ['train.py', *options])
    s, given = train.load_settings(train.Settings, '')
    train.show(s, given)
    with torch.device('meta'):
        table = cost.parameter_table(Transformer(Config(**given)))
    assert f'{table["total"]:,}' in capsys.readouterr().out
    head = file.read_text(encoding='utf-8').partition('\nout_dir')[0].replace('\n# ', ' ')
    named = re.findall(r'([\d.,]*\d)([MB]?) (parameters|(?<=[MB] )active)', head)
    assert named[0][2] == 'parameters'
    for number, unit, kind in named:
        count = table['total' if kind == 'parameters' else 'active']
        digits = len(number.partition('.')[2])
        count = round(count / {'': 1, 'M': 1e6, 'B': 1e9}[unit], digits)
        assert float(number.replace(',', '')) == count


def test_max_steps_0_writes_nothing(folder):
    done = run(folder, 'train.py', ROOT / 'config/shakespeare.py', '--dataset=mine',
               '--max_steps=0')
    assert (done.returncode, done.stderr) == (0, '')
    assert 'parameters' in done.stdout
    assert list(folder.iterdir()) == [folder / 'data']


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in CONFIGS if 'smol' not in name
                                  and name != 'v3_mini'])
def test_a_config_trains(folder, name):
    options = ('--dataset=mine --block_size=32 --batch_size=1 --global_batch_size=1 --max_steps=1 '
               '--compile=false --eval_steps=1 --sample_interval=0 --device=cpu --out_dir=out')
    assert 0 < trained(folder, options, base=str(ROOT / f'config/{name}.py'))[1] < 12


# ----------------------------------------------------------------------------------- a run

def test_the_loss_falls(folder, device):
    losses = trained(folder, f'--device={device} --compile=false')
    assert losses[1] > 0.9 * UNIFORM
    assert losses[STEPS] < 0.65 * UNIFORM
    assert metrics(folder / 'out', 'val_loss')[STEPS] < 0.65 * UNIFORM


def test_a_run_leaves_what_the_readme_lists(home):
    out = home / 'out'
    names = {path.name for path in out.iterdir()} - {'.lock'}
    assert names == {'metrics.jsonl', 'settings.json', 'train.log', 'step-000010', 'step-000020'}
    assert (out / 'train.log').read_text('utf-8') == (home / 'stdout').read_text('utf-8')
    description = json.loads((out / 'settings.json').read_text('utf-8'))
    expected = {field.name for cls in (train.Settings, Config) for field in fields(cls)}
    assert expected | {'python', 'torch', 'git', 'command'} <= set(description)
    assert description['learning_rate'] == 1e-2
    assert description['vocab_size'] == 24
    checkpoint = out / 'step-000020'
    assert {path.name for path in checkpoint.iterdir()} == {
        'README.md', 'config.json', 'generation_config.json', 'model.safetensors',
        'tokenizer.json', 'tokenizer_config.json', 'trainer'}
    card = (checkpoint / 'README.md').read_text('utf-8')
    assert f'{STEPS * 4 * BLOCK:,}' in card
    assert f'{metrics(out, "val_loss")[STEPS]:.4f}' in card
    for name, tensor in load_file(checkpoint / 'model.safetensors').items():
        if name.endswith('e_score_correction_bias'):    # they have moved, without a gradient
            assert tensor.abs().max() >= 0.01


def test_metrics_have_their_keys(home):
    *steps, last = rows(home)
    assert [row['step'] for row in steps] == list(range(1, STEPS + 1))
    for row in steps:
        assert TIMES | {
            'step', 'tokens', 'flops', 'loss', 'lr', 'grad_norm', 'mtp_loss', 'balance_loss',
            'moe/load_max', 'moe/load_min'} <= set(row)
        assert row['tokens'] == 4 * BLOCK * row['step']
        assert 0 < row['lr'] <= 1e-2
        assert 0 < row['grad_norm'] < 100
    assert last['step'] == STEPS
    assert {'elapsed_s', 'val_loss', 'val_bpb'} <= set(last)


def test_the_validation_loss_is_what_transformers_computes(home):
    auto = pytest.importorskip('transformers').AutoModelForCausalLM
    ids = tokens(home, 'val')
    loss = validation_loss(auto.from_pretrained(home / 'out/step-000020').eval(), ids)
    assert metrics(home / 'out', 'val_loss')[STEPS] == pytest.approx(loss, abs=1e-5)
    text = (home / 'mine.txt').read_text('utf-8')
    part = text[int(len(text) * 0.9):int(len(text) * 0.95)]
    bits = loss / math.log(2) * len(ids) / len(part.encode())
    assert metrics(home / 'out', 'val_bpb')[STEPS] == pytest.approx(bits, abs=1e-4)


@pytest.mark.parametrize('options, tolerance', [
    ('', 0), ('--gradient_checkpointing=true', 1e-5),
    ('--batch_size=1 --global_batch_size=4', 1e-5),
    pytest.param('--dtype=bfloat16', 0.1, marks=pytest.mark.slow),
    pytest.param('--dtype=float16', 0.1, marks=pytest.mark.slow)])
def test_losses_are_those_of_the_plain_run(home, folder, options, tolerance):
    assert trained(folder, options) == pytest.approx(metrics(home / 'out'), abs=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize('works, env', [
    (True, {}), (False, {'CXX': 'no-such-compiler', 'TORCHINDUCTOR_CACHE_DIR': 'cache'})])
def test_compiled_losses_are_the_same_and_a_missing_compiler_ends_no_run(folder, works, env):
    if not shutil.which('g++'):
        pytest.skip('no C++ compiler')
    options = '--num_hidden_layers=1 --max_steps=3 --resume=never'
    plain = trained(folder, options, base=DENSE)
    done = run(folder, 'train.py', *DENSE.split(), *options.split(), '--compile=true',
               timeout=900, TORCHINDUCTOR_COMPILE_THREADS='1', **env)
    assert done.returncode == 0, done.stderr
    assert ('does not work' in done.stdout) == (not works)
    assert metrics(folder / 'out') == pytest.approx(plain, abs=1e-4)


def test_samples_begin_with_the_text_where_it_lacks_a_letter_of_the_prompt(home, folder):
    options = '--max_steps=1 --sample_interval=1 --sample_prompt=king'
    for dataset, beginning in (('mine', 'king'), ('russian', '')):
        trained(folder, f'{options} --dataset={dataset} --resume=never', base=DENSE)
        log = (folder / 'out/train.log').read_text('utf-8')
        sample = re.findall('--- sample\n(.+)', log)[-1]
        assert sample.startswith(beginning)
    assert sample[:8] in (home / 'russian.txt').read_text('utf-8')


def test_samples_and_evaluations_leave_no_trace_in_dropout(folder):
    base = f'{DENSE} --dropout=0.3 --resume=never'
    losses = trained(folder, base=base)
    assert trained(folder, '--sample_interval=3 --eval_interval=4', base) == losses


NEUTRAL = """depth tokens out_dir dataset device dtype fp8 compile doc_attention_mask
gradient_checkpointing log_interval eval_interval eval_steps sample_interval sample_prompt
checkpoint_interval keep_checkpoints max_minutes max_bad_steps max_rollbacks resume init_from wandb
tensorboard"""


def test_every_setting_takes_effect_when_a_run_continues_or_is_refused(folder, capsys):
    base = f'{TINY} --warmup_steps=2 --eval_interval=0 --max_steps=6'
    trained(folder, '--checkpoint_interval=4 --keep_checkpoints=0', base)
    losses = trained(folder, '--out_dir=out/same --resume=out/step-000004', base)
    options = ('--seed=2 --batch_size=2 --block_size=16 --global_batch_size=8 --max_steps=9 '
               '--optimizer=muon --learning_rate=1e-3 --embedding_lr=2 --min_lr_frac=0.5 '
               '--warmup_steps=5 --schedule=wsd --decay_frac=0.9 --weight_decay=5 --beta1=0.5 '
               '--beta2=0.5 --eps=1e-2 --grad_clip=0.1').split()
    names = {option[2:].partition('=')[0] for option in options}
    assert names | set(NEUTRAL.split()) == {field.name for field in fields(train.Settings)}
    for option in (*options, '--dropout=0.1', '--mtp_loss_weight=0', '--bias_update_speed=1'):
        if option == '--decay_frac=0.9':
            option += ' --schedule=wsd'
        shutil.rmtree(folder / 'out/other', ignore_errors=True)
        done = train_here(folder, *f'{base} --out_dir=out/other --resume=out/step-000004 '
                          f'{option}'.split())
        if done:
            assert 'step-000004 was trained with' in capsys.readouterr().err, option
        else:
            assert metrics(folder / 'out/other') != losses, option


def test_the_document_mask_changes_the_loss(folder):
    options = '--max_steps=2 --resume=never --dataset=docs --doc_attention_mask'
    losses = [trained(folder, f'{options}={mask}') for mask in ('true', 'false')]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


def test_a_model_that_stops_elsewhere_also_stops_where_documents_end(folder):
    model = Transformer(Config(vocab_size=300, hidden_size=32, eos_token_id=5))
    model.save_pretrained(folder / 'model')
    options = '--dataset=docs --block_size=32 --max_steps=1 --device=cpu --out_dir=out'
    trained(folder, f'{options} --init_from=model', base='')
    for file in ('config.json', 'generation_config.json'):
        values = json.loads((folder / 'out/step-000001' / file).read_text())
        assert values['eos_token_id'] == [0, 5]


# ---------------------------------------------------------------------------------- resuming

@pytest.mark.parametrize('options', [
    '', '--optimizer=muon --dropout=0.3',
    pytest.param('--optimizer=muon --dtype=bfloat16', marks=pytest.mark.slow)])
def test_resumed_equals_never_stopped(folder, device, options):
    options = f'{options} --device={device} --compile=false'
    losses = trained(folder, options)
    before, end = rows(folder, TIMES), weights(folder)
    assert losses[STEPS] < 0.85 * UNIFORM
    shutil.rmtree(folder / 'out/step-000020')
    leftover = folder / 'out/.step-000015.tmp'          # of a run that was killed
    leftover.mkdir()
    again = trained(folder, options)
    assert not leftover.exists()
    if device.type == 'cpu':
        assert rows(folder, TIMES) == before
        assert weights(folder) == end
    else:                                               # atomics add in any order
        assert again == pytest.approx(losses, abs=1e-3)


def test_a_complete_run_says_so_and_continues_with_more_steps(copy, capsys):
    before = files(copy / 'out')
    losses = trained(copy)
    assert 'step-000020 is complete' in capsys.readouterr().out
    assert files(copy / 'out') == before
    more = trained(copy, '--max_steps=40 --warmup_steps=2')
    assert re.search(r'rate rises from 1\.\de-03 to', capsys.readouterr().out)
    assert list(more) == list(range(1, 41))
    assert losses.items() <= more.items()


def test_a_checkpoint_of_the_former_version_continues(home, copy):
    shutil.rmtree(copy / 'out/step-000020')
    trainer = copy / 'out/step-000010/trainer'
    state = torch.load(trainer / 'state.pt', weights_only=True)
    del state['losses']
    torch.save({**state, 'version': 2, 'history': [1.0], 'about': {'loss': 1.0}},
               trainer / 'state.pt')
    settings = json.loads((trainer / 'settings.json').read_text('utf-8'))
    text = json.dumps({**settings, 'version': 2})
    for name in ('settings.json', 'manifest.json'):     # nothing reads the second any more
        (trainer / name).write_text(text, encoding='utf-8')
    assert trained(copy) == metrics(home / 'out')
    assert weights(copy) == weights(home)


def test_weights_come_from_a_checkpoint_or_the_newest_of_a_run(home, folder):
    options = '--max_steps=1 --learning_rate=1e-9'
    final = metrics(home / 'out')[STEPS]
    for source in ('out', 'out/step-000020'):
        losses = trained(folder, f'{options} --resume=never --init_from={home / source}')
        assert losses[1] == pytest.approx(final, abs=0.2)
    earlier = trained(folder, f'{options} --resume=never --init_from={home}/out/step-000010')
    assert losses[1] < earlier[1] < 0.9 * UNIFORM


@pytest.mark.slow
def test_smollm2_is_fine_tuned_on_its_tokens(folder):
    transformers = pytest.importorskip('transformers')
    smollm2 = asset('smollm2')
    data = folder / 'smollm2'
    done = run(folder, 'prepare.py', 'shakespeare', f'--tokenizer={smollm2}', f'--out_dir={data}')
    assert done.returncode == 0, done.stderr
    base = f'{ROOT}/config/smol135_finetune.py --init_from={smollm2} --device=cpu --dtype=float32'
    losses = trained(folder, f'--dataset={data} --out_dir=out --block_size=64 --batch_size=2 '
                     '--eval_steps=2 --log_interval=1 --sample_interval=0 --max_steps=3', base)
    assert losses[1] < 6                                # ln 49152 is 10.8
    assert metrics(folder / 'out', 'val_loss')[3] < 4.5
    last = folder / 'out/step-000003'
    tokenizers = [transformers.AutoTokenizer.from_pretrained(name) for name in (last, smollm2)]
    ids, original = (tokenizer('ROMEO:\nWherefore')['input_ids'] for tokenizer in tokenizers)
    assert ids == original
    idx = torch.tensor([ids])
    reference = transformers.AutoModelForCausalLM.from_pretrained(last)
    with torch.no_grad():
        logits = Transformer.from_pretrained(last)(idx)[0]
        before = Transformer.from_pretrained(smollm2)(idx)[0]
        assert (logits - reference(idx).logits).abs().max() < 1e-3
    assert (logits - before).abs().max() > 1e-2


# --------------------------------------------------------------------------------- a mixture

def test_a_mixture_is_evaluated_by_source_and_resumes(folder):
    base = f"{DENSE} --eval_interval=10 --dataset={{'mine':0.7,'more':0.3}}"
    trained(folder, base=base)
    whole = rows(folder, TIMES)
    last = whole[-1]
    model = Transformer.from_pretrained(folder / 'out/step-000020').eval()
    for name in ('mine', 'more'):
        loss = validation_loss(model, tokens(folder, 'val', name))
        assert last[f'val_loss/{name}'] == pytest.approx(loss, abs=1e-5)
    mean = 0.7 * last['val_loss/mine'] + 0.3 * last['val_loss/more']
    assert last['val_loss'] == pytest.approx(mean)
    shutil.rmtree(folder / 'out/step-000020')
    trained(folder, "--dataset={'more':3,'mine':7}", base=base)     # the same in other words
    assert rows(folder, TIMES) == whole


# ---------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize('options, words', [
    ('--dataset=nosuch', 'data/nosuch prepare.py'),
    ('--dataset=short', 'val 9 block_size=32'),
    ("--dataset={'mine':0,'more':1}", 'mine 0'),
    ("--dataset={'mine':1,'nosuch':1}", 'data/nosuch prepare.py'),
    ("--dataset={'mine':1,'short':1}", 'data/mine data/short --tokenizer='),
    ('--doc_attention_mask', 'dataset=mine end-of-text'),
    ('--doc_attention_mask --attention=linear', 'attention=linear doc_attention_mask'),
    ('--vocab_size=8', 'vocab_size=8 24 dataset=mine'),
    ('--block_size=128', 'block_size=128 max_position_embeddings=64'),
    ('--block_size=1', 'block_size=1 MTP'),
    ('--block_size=100000', 'block_size=100000 tokens'),
    ('--global_batch_size=6', 'global_batch_size=6 multiple 4'),
    ('--batch_size=0', 'batch_size=0 global_batch_size'),
    ('--tokens=1e6', 'tokens=1000000 --depth'),
    ('--device=cuda:99', 'device=cuda:99 --device='),
    ('--device=quantum', 'device=quantum --device='),
    ('--fp8=tensorwise', 'fp8=tensorwise 8.9'),
    ('--learning_rate=-1', 'learning_rate=-1 at least 0'),
    ('--beta2=1', 'beta index 1: 1.0'),
    ('--learning_rte=1', "'learning_rte' did you mean 'learning_rate'?"),
    ('--num_experts_per_tok=5', 'num_experts_per_tok=5 4'),
    ('--out_dir=mine.txt', 'mine.txt'),
    ('--resume=nosuch', 'resume=nosuch checkpoint'),
    ('--init_from=no/such/model', 'no/such/model'),
    ('--init_from=out --kv_lora_rank=8', 'kv_a_layernorm (16,) (8,)'),
    ('--init_from=out --dataset=short --block_size=4', 'dataset=short --tokenizer=out'),
    # where home's run would continue
    ('--out_dir=out --max_steps=30 --kv_lora_rank=24', 'step-000020 kv_lora_rank=16 24'),
    ('--out_dir=out --max_steps=30 --dataset=more', 'step-000020 data=mine more --resume=never'),
    ('--out_dir=out --max_steps=30 --seed=2', 'seed=1337 2 --init_from='),
])
def test_a_mistake_is_one_line_that_names_it_and_writes_nothing(home, capsys, options, words):
    before = files(home)
    status = train_here(home, *f'{TINY} --out_dir=new {options}'.split())
    out, err = capsys.readouterr()
    assert status == 2, out
    assert err.startswith('train.py: ')
    assert err.count('\n') == 1
    for word in words.split():
        assert word in err
    assert out == ''
    assert files(home) == before
    assert not (home / 'new').exists()
