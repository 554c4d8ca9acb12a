"""Tests of nanoseek/hf.py. The references are the classes of transformers."""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from conftest import asset
from model import Config, Transformer
from nanoseek import hf

transformers = pytest.importorskip('transformers')
load_ours = Transformer.from_pretrained
load_theirs = transformers.AutoModelForCausalLM.from_pretrained

IDX = torch.arange(40)[None]
SIZES = {'vocab_size': 61, 'hidden_size': 48, 'intermediate_size': 88, 'num_hidden_layers': 2,
         'num_attention_heads': 6, 'max_position_embeddings': 64}
MOE = {'n_routed_experts': 8, 'num_experts_per_tok': 3, 'moe_intermediate_size': 40,
       'first_k_dense_replace': 1, 'n_shared_experts': 2, 'n_group': 4, 'topk_group': 2}
MLA = {'q_lora_rank': 22, 'kv_lora_rank': 20, 'qk_nope_head_dim': 12, 'qk_rope_head_dim': 8,
       'v_head_dim': 14}
GQA = {'attention': 'gqa', 'num_key_value_heads': 2, 'head_dim': 10}
OURS = {
    'Llama': {**GQA, 'tie_word_embeddings': False},
    'Glm4Moe': {**GQA, **MOE, 'routed_scaling_factor': 1.7},
    'DeepseekV3': {**MLA, **MOE, 'norm_topk_prob': False, 'tie_word_embeddings': False},
    'dense DeepseekV3': {**MLA, 'q_lora_rank': None},
    'DeepseekV3 with MTP': {**MLA, **MOE, 'num_nextn_predict_layers': 2},
    'linear': {'attention': 'linear', **MOE},
}
ROPE = {'rope_type': 'default', 'rope_theta': 1e4, 'partial_rotary_factor': 1.0}
THEIRS = {
    'Llama': {'num_key_value_heads': 2},
    'Glm4Moe': {**MOE, 'num_key_value_heads': 2, 'head_dim': 8, 'rope_parameters': ROPE},
    'DeepseekV3': {**MOE, **MLA},
    'dense DeepseekV3': {**MOE, **MLA, 'first_k_dense_replace': 2, 'q_lora_rank': None},
    'unshared DeepseekV3': {**MOE, **MLA, 'n_shared_experts': 0},
}


def varied(model):
    """Weights large enough for logits far from flat, and routers with biases"""
    for p in model.parameters():
        p.data.mul_(2 + 2 * torch.rand_like(p))
    for name, buffer in model.named_buffers():
        if name.endswith('e_score_correction_bias'):
            buffer.normal_(0, 0.2)
    return model.eval()


def make_ours(**settings):
    torch.manual_seed(0)
    return varied(Transformer(Config(**{**SIZES, **settings})))


def make_theirs(kind, seed=0, **settings):
    torch.manual_seed(seed)
    name = kind.split()[-1]
    config = getattr(transformers, f'{name}Config')(**{**SIZES, **THEIRS[kind], **settings})
    return varied(getattr(transformers, f'{name}ForCausalLM')(config))


@torch.no_grad()
def check_equal(model, reference):
    expected = reference.eval()(IDX)[0]                                     # logits (1, T, V)
    assert (model.eval()(IDX)[0] - expected).abs().max() < 1e-5 * expected.abs().max()


def check_gradients(model, reference):
    direction = torch.randn(1, 40, 61)
    for either in (model, reference):
        (either(IDX)[0] * direction).sum().backward()
    expected = dict(reference.named_parameters())
    for name, p in model.named_parameters():
        difference = (p.grad - expected[name].grad).norm()
        assert difference <= 1e-4 * expected[name].grad.norm(), name


def check_weights(model, state):
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def edit(file, **changes):
    """Change keys of a JSON file; ... removes one."""
    values = {**json.loads(file.read_text(encoding='utf-8')), **changes}
    values = {name: value for name, value in values.items() if value is not ...}
    file.write_text(json.dumps(values), encoding='utf-8')


def add_tensor(folder, name, tensor):
    tensors = {**load_file(folder / 'model.safetensors'), name: tensor}
    save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})


@pytest.mark.parametrize('kind', OURS)
def test_what_we_write_is_the_same_model_here_and_in_transformers(tmp_path, kind):
    ours = make_ours(**OURS[kind])
    ours.save_pretrained(tmp_path)
    again = load_ours(tmp_path)
    assert again.config == ours.config
    check_weights(again, ours.state_dict())
    if kind != 'linear':
        theirs = load_theirs(tmp_path)
        assert type(theirs).__name__ == hf.architecture_class(ours.config)
        check_equal(theirs, ours)


@pytest.mark.parametrize('tie', [True, False])
@pytest.mark.parametrize('kind', THEIRS)
def test_what_transformers_writes_loads_and_goes_back(tmp_path, kind, tie):
    theirs = make_theirs(kind, tie_word_embeddings=tie, eos_token_id=[2, 30])
    theirs.save_pretrained(tmp_path / 'theirs', max_shard_size='60KB')
    ours = load_ours(tmp_path / 'theirs')
    check_equal(ours, theirs)
    check_gradients(ours, theirs)
    assert ours.config.stop_ids == [2, 30]
    ours.save_pretrained(tmp_path / 'ours', shard_bytes=60e3)
    assert len(list((tmp_path / 'ours').glob('model-*.safetensors'))) > 1
    check_equal(load_theirs(tmp_path / 'ours'), theirs)
    ours.save_pretrained(tmp_path / 'ours')
    file, = (tmp_path / 'ours').glob('*safetensors*')       # the shards are gone
    assert file.stat().st_mode & 0o044                      # others may read it


def test_a_bfloat16_folder_keeps_float32_router_biases_and_loads_in_float32(tmp_path):
    ours = make_ours(**MLA, **MOE)
    state = {name: 2 * tensor for name, tensor in ours.state_dict().items()}
    ours.save_pretrained(tmp_path, dtype=torch.bfloat16, state=state)
    saved = load_file(tmp_path / 'model.safetensors')
    assert saved.pop('model.layers.1.mlp.gate.e_score_correction_bias').dtype == torch.float32
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    for name, _ in ours.named_parameters():
        state[name] = state[name].bfloat16().float()
    check_weights(load_ours(tmp_path), state)


@torch.no_grad()
def test_mtp_layers_predict_the_same_in_transformers(tmp_path):
    ours = make_ours(**OURS['DeepseekV3 with MTP'])
    ours.save_pretrained(tmp_path)
    model = load_theirs(tmp_path).eval()
    model._keys_to_ignore_on_load_unexpected = [r'model\.layers\.[23]\.']   # see docs/convert.md
    theirs = transformers.modeling_layers.MtpModel.from_pretrained(model).eval()
    state, _ = ours.hidden(IDX)
    their_state = model.model(IDX).last_hidden_state
    for k in (1, 2):
        T = IDX.shape[1] - k
        state, _ = ours.mtp(k, state[:, :T], IDX[:, k:])
        their_state = theirs.forward_layer(k - 1, their_state[:, :T], torch.arange(T)[None], None,
                                           input_ids=IDX[:, k:])
        assert (state - their_state).abs().max() < 1e-5 * their_state.abs().max()


LINEAR = {'rope_type': 'linear', 'factor': 4.0}
YARN = {'rope_type': 'yarn', 'factor': 4.0}                 # the original context is the model's
LLAMA3 = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
          'original_max_position_embeddings': 16}
MSCALE = {**YARN, 'original_max_position_embeddings': 16, 'mscale': 1.0, 'mscale_all_dim': 0.7}


@pytest.mark.parametrize('scaling', [LINEAR, YARN, LLAMA3, MSCALE])
@pytest.mark.parametrize('kind', ['Llama', 'DeepseekV3'])
def test_scaled_rope_is_read_as_transformers_5_and_4_write_it(tmp_path, kind, scaling):
    theirs = make_theirs(kind, rope_parameters={**scaling, 'rope_theta': 500.0})
    theirs.save_pretrained(tmp_path)
    ours = load_ours(tmp_path)
    check_equal(ours, theirs)
    old = {('type' if key == 'rope_type' else key): value for key, value in scaling.items()}
    edit(tmp_path / 'config.json', rope_parameters=..., rope_theta=500.0, rope_scaling=old)
    assert load_ours(tmp_path).config == ours.config
    ours.save_pretrained(tmp_path)
    check_equal(load_theirs(tmp_path), theirs)


@pytest.mark.parametrize('change, words', [
    ({'model_type': 'gpt2'}, "model_type='gpt2': must be one of llama, glm4_moe, deepseek_v3"),
    ({'hidden_size': ...}, 'hidden_size is missing'),
    ({'attention_bias': True}, 'attention_bias=True: only False is supported'),
    ({'rope_interleave': False}, 'rope_interleave=False: only True'),
    ({'quantization_config': {'quant_method': 'fp8'}}, "quantization_config={'quant_method'"),
    ({'rope_parameters': {**ROPE, 'partial_rotary_factor': 0.5}}, 'partial_rotary_factor=0.5'),
    ({'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, "rope_type='dynamic'")])
def test_what_our_models_cannot_be_is_refused_in_words(tmp_path, change, words):
    make_theirs('DeepseekV3').save_pretrained(tmp_path)
    edit(tmp_path / 'config.json', **change)
    with pytest.raises(ValueError) as e:
        load_ours(tmp_path)
    assert str(e.value).startswith(f'{tmp_path}/config.json: ')
    assert words in str(e.value)


def test_the_index_decides_which_shards_are_read_and_a_single_file_comes_first(tmp_path):
    new = make_theirs('Llama', 1)
    new.save_pretrained(tmp_path, max_shard_size='60KB')
    old = make_theirs('Llama', 2)
    old.save_pretrained(tmp_path / 'old', max_shard_size='30KB')
    for file in (tmp_path / 'old').glob('*.safetensors'):
        shutil.copy(file, tmp_path)
    check_equal(load_ours(tmp_path), new)
    old.save_pretrained(tmp_path / 'single')
    shutil.copy(tmp_path / 'single/model.safetensors', tmp_path)
    check_equal(load_ours(tmp_path), old)


def test_a_missing_tensor_a_wrong_shape_and_a_damaged_file_are_named(tmp_path):
    make_theirs('Llama').save_pretrained(tmp_path)
    file = tmp_path / 'model.safetensors'
    tensors = load_file(file)
    norm = tensors.pop('model.norm.weight')
    save_file(tensors, file)
    with pytest.raises(ValueError, match='lacks model.norm.weight'):
        load_ours(tmp_path)
    add_tensor(tmp_path, 'model.norm.weight', norm[1:])
    with pytest.raises(ValueError, match=r'model.norm.weight is \(47,\), the model needs \(48,\)'):
        load_ours(tmp_path)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match='model.safetensors is damaged'):
        load_ours(tmp_path)


def test_a_tensor_without_a_place_is_refused_unless_the_model_is_the_same(tmp_path):
    theirs = make_theirs('Llama', tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    add_tensor(tmp_path, 'model.layers.1.self_attn.rotary_emb.inv_freq', torch.ones(4))
    add_tensor(tmp_path, 'lm_head.weight', theirs.lm_head.weight.detach().clone())
    check_equal(load_ours(tmp_path), theirs)
    add_tensor(tmp_path, 'model.layers.1.self_attn.k_norm.weight', torch.ones(8))
    with pytest.raises(ValueError, match='k_norm.weight has no place in a LlamaForCausalLM'):
        load_ours(tmp_path)


def test_a_head_that_differs_from_the_embedding_is_untied_as_in_transformers(tmp_path):
    make_theirs('Llama', tie_word_embeddings=True).save_pretrained(tmp_path)
    add_tensor(tmp_path, 'lm_head.weight', torch.randn(61, 48))
    check_equal(load_ours(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize('name, shape, problem', [
    ('shared_head.head.weight', (61, 32), 'differs from lm_head.weight'),
    ('embed_tokens.weight', (61, 32), 'differs from model.embed_tokens.weight'),
    ('mlp.experts.9.up_proj.weight', (3, 3), 'has no place')])
def test_a_tensor_of_an_mtp_layer_is_a_copy_or_refused(tmp_path, name, shape, problem):
    make_ours(**OURS['DeepseekV3'], num_nextn_predict_layers=1).save_pretrained(tmp_path)
    assert hf.config_json(load_ours(tmp_path).config)['moe_layer_freq'] == 1
    add_tensor(tmp_path, f'model.layers.2.{name}', torch.randn(shape))
    with pytest.raises(ValueError, match=f'{name} {problem}'):
        load_ours(tmp_path)


def test_a_git_lfs_pointer_is_named(tmp_path):
    make_ours().save_pretrained(tmp_path)
    (tmp_path / 'model.safetensors').write_text('version https://git-lfs.github.com/spec/v1\n')
    with pytest.raises(ValueError, match='model.safetensors is a Git LFS pointer'):
        load_ours(tmp_path)


def test_mtp_layers_that_are_not_wanted_or_not_there_are_left_out(tmp_path, capsys):
    ours = make_ours(**OURS['DeepseekV3 with MTP'])
    ours.save_pretrained(tmp_path)
    without = load_ours(tmp_path, num_nextn_predict_layers=0)
    check_equal(without, ours)
    assert len(load_ours(tmp_path, num_hidden_layers=1).model.layers) == 1
    capsys.readouterr()
    without.save_pretrained(tmp_path)
    edit(tmp_path / 'config.json', num_nextn_predict_layers=1)
    assert load_ours(tmp_path).config == without.config
    assert 'lacks the MTP layers' in capsys.readouterr().err
    with pytest.raises(ValueError, match='lacks model.layers.2.'):
        load_ours(tmp_path, num_nextn_predict_layers=1)


def test_companions_travel_into_a_model_made_from_another(tmp_path):
    source = tmp_path / 'source'
    shutil.copytree(asset('smollm2'), source, ignore=shutil.ignore_patterns('*.safetensors'))
    edit(source / 'tokenizer_config.json', padding_side='left', pad_token='<|im_end|>')
    edit(source / 'generation_config.json', eos_token_id=[30, 7], repetition_penalty=1.1)
    config = hf.read_config(source)
    tokenizer = Tokenizer.from_file(str(source / 'tokenizer.json'))
    shutil.copy(source / 'config.json', tmp_path)
    hf.write_companions(tmp_path, tokenizer, config, hf.read_companions(source))
    original = transformers.AutoTokenizer.from_pretrained(source)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for name in ('chat_template', 'pad_token', 'eos_token', 'bos_token', 'padding_side'):
        assert getattr(theirs, name) == getattr(original, name)
    assert theirs('Hello, <|im_end|> world') == original('Hello, <|im_end|> world')
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert generation.eos_token_id == hf.stop_ids(tmp_path, config) == [2, 30, 7]
    assert generation.repetition_penalty == 1.1
