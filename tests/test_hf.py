"""Tests of nanoseek/hf.py: what a folder says of itself decides what is loaded, and what a model
brings beside its weights is kept. References are transformers' own classes."""
import json
import shutil
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from model import Config, Transformer
from nanoseek import folders, hf, kinds
from support import asset

transformers = pytest.importorskip('transformers')

SIZES = {'vocab_size': 61, 'hidden_size': 48, 'intermediate_size': 88, 'num_hidden_layers': 2,
         'num_attention_heads': 6, 'max_position_embeddings': 64}
MOE = {'n_routed_experts': 8, 'num_experts_per_tok': 3, 'moe_intermediate_size': 40,
       'first_k_dense_replace': 1, 'n_group': 1, 'topk_group': 1}
MLA = {'q_lora_rank': 22, 'kv_lora_rank': 20, 'qk_nope_head_dim': 12, 'qk_rope_head_dim': 8,
       'v_head_dim': 14}
KINDS = {'Llama': {'num_key_value_heads': 2},
         'Glm4Moe': {**MOE, 'num_key_value_heads': 2, 'head_dim': 8,
                     'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e4,
                                         'partial_rotary_factor': 1.0}},
         'DeepseekV3': {**MOE, **MLA}}


def make_theirs(kind, seed=0, **settings):
    torch.manual_seed(seed)
    config = getattr(transformers, f'{kind}Config')(**{**SIZES, **KINDS[kind], **settings})
    model = getattr(transformers, f'{kind}ForCausalLM')(config).eval()
    for name, p in model.named_parameters():
        p.data.mul_(3)                                      # logits far from flat
    return model


def logits_of(model):
    idx = torch.arange(20)[None]
    with torch.no_grad():
        out = model(idx)
    if isinstance(out, tuple):
        return out[0]
    return out.logits


def check_equal(ours, theirs):
    wanted = logits_of(theirs)
    assert (logits_of(ours.eval()) - wanted).abs().max() < 1e-4 * wanted.abs().max()


def edit(file, **changes):
    values = json.loads(file.read_text(encoding='utf-8'))
    for name, value in changes.items():
        if value is ...:
            values.pop(name, None)
        else:
            values[name] = value
    file.write_text(json.dumps(values), encoding='utf-8')


# ------------------------------------------------------------------- which file has a tensor

@pytest.fixture
def sharded(tmp_path):
    """A folder with the shards of two models of transformers, whose index is the second's."""
    make_theirs('Llama', 0).save_pretrained(tmp_path / 'old', max_shard_size='30KB')
    new = make_theirs('Llama', 1)
    new.save_pretrained(tmp_path / 'mixed', max_shard_size='60KB')
    for file in (tmp_path / 'old').glob('*.safetensors'):
        shutil.copy(file, tmp_path / 'mixed')
    return tmp_path / 'mixed', new


def test_the_index_decides_which_file_has_a_tensor(sharded):
    folder, new = sharded
    check_equal(Transformer.from_pretrained(folder), new)
    check_equal(transformers.AutoModelForCausalLM.from_pretrained(folder), new)


def test_several_sets_of_files_without_an_index_are_refused(sharded):
    folder, _ = sharded
    (folder / hf.INDEX).unlink()
    with pytest.raises(ValueError, match='files of several models.*no model.safetensors.index'):
        Transformer.from_pretrained(folder)


def test_a_file_that_the_index_names_and_that_is_missing_is_an_error(sharded):
    folder, _ = sharded
    weight_map = json.loads((folder / hf.INDEX).read_text())['weight_map']
    (folder / weight_map['model.norm.weight']).unlink()
    with pytest.raises(ValueError, match='index.json names model-.*, which is missing'):
        Transformer.from_pretrained(folder)


def test_a_tensor_that_the_index_promises_and_that_is_missing_is_an_error(sharded):
    folder, _ = sharded
    weight_map = json.loads((folder / hf.INDEX).read_text())['weight_map']
    other = next(file for file in weight_map.values() if file != weight_map['model.norm.weight'])
    edit(folder / hf.INDEX, weight_map={**weight_map, 'model.norm.weight': other})
    with pytest.raises(ValueError, match='has no model.norm.weight'):
        Transformer.from_pretrained(folder)


@pytest.mark.parametrize('change', [{'weight_map': ...}, {'weight_map': {'a': '../b'}},
                                    {'weight_map': {'a': 3}}])
def test_an_index_that_is_damaged_is_refused(sharded, change):
    folder, _ = sharded
    edit(folder / hf.INDEX, **change)
    with pytest.raises(ValueError, match=hf.INDEX):
        Transformer.from_pretrained(folder)


def test_one_whole_set_of_files_needs_no_index_and_half_a_set_is_refused(tmp_path):
    theirs = make_theirs('Llama')
    theirs.save_pretrained(tmp_path, max_shard_size='60KB')
    (tmp_path / hf.INDEX).unlink()
    check_equal(Transformer.from_pretrained(tmp_path), theirs)
    sorted(tmp_path.glob('*.safetensors'))[1].unlink()
    with pytest.raises(ValueError, match='file 2 of the .* is missing'):
        Transformer.from_pretrained(tmp_path)


def test_a_single_file_comes_before_shards_as_in_transformers(sharded):
    folder, _ = sharded
    single = make_theirs('Llama', 2)
    single.save_pretrained(folder / 'single')
    shutil.copy(folder / 'single/model.safetensors', folder)
    check_equal(transformers.AutoModelForCausalLM.from_pretrained(folder), single)
    check_equal(Transformer.from_pretrained(folder), single)


def test_saving_over_other_shards_leaves_none_of_them(sharded):
    folder, _ = sharded
    ours = Transformer(Config(**SIZES, attention='gqa', num_key_value_heads=2))
    ours.save_pretrained(folder)
    assert [file.name for file in folder.glob('*.safetensors*')] == ['model.safetensors']
    check_equal(ours, transformers.AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize('file, words', [('pytorch_model.bin', 'pickles are not read'),
                                         ('adapter_model.safetensors', 'adapter'),
                                         ('a.gguf', 'GGUF')])
def test_other_kinds_of_weights_are_named(tmp_path, file, words):
    make_theirs('Llama').save_pretrained(tmp_path)
    (tmp_path / 'model.safetensors').rename(tmp_path / file)
    with pytest.raises(ValueError, match=words):
        Transformer.from_pretrained(tmp_path)


# ------------------------------------------------------------- tensors that have no place

def add_tensor(folder, name, tensor):
    tensors = load_file(folder / 'model.safetensors')
    tensors[name] = tensor
    save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})


@pytest.mark.parametrize('name', ['model.layers.1.self_attn.k_norm.weight',
                                  'model.layers.0.pre_feedforward_layernorm.weight',
                                  'model.layers.2.input_layernorm.weight', 'score.weight'])
@pytest.mark.parametrize('kind', KINDS)
def test_a_tensor_that_the_model_has_no_place_for_is_refused(tmp_path, kind, name):
    make_theirs(kind).save_pretrained(tmp_path)
    Transformer.from_pretrained(tmp_path)
    add_tensor(tmp_path, name, torch.ones(48))
    with pytest.raises(ValueError, match=f'{name} has no place in a {kind}ForCausalLM'):
        Transformer.from_pretrained(tmp_path)


def test_known_leftovers_are_no_reason_to_refuse(tmp_path):
    theirs = make_theirs('Llama', tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    add_tensor(tmp_path, 'model.layers.1.self_attn.rotary_emb.inv_freq', torch.ones(4))
    add_tensor(tmp_path, 'lm_head.weight', theirs.lm_head.weight.detach().clone())
    check_equal(Transformer.from_pretrained(tmp_path), theirs)


def test_mtp_layers_that_are_not_asked_for_are_left_out(tmp_path):
    ours = Transformer(Config(**SIZES, **MLA, **MOE, num_nextn_predict_layers=1)).eval()
    ours.save_pretrained(tmp_path)
    edit(tmp_path / 'config.json', num_nextn_predict_layers=0)
    again = Transformer.from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(again), logits_of(ours))
    assert len(again.model.layers) == 2


def test_a_model_may_be_cut_on_purpose(tmp_path):
    make_theirs('Llama').save_pretrained(tmp_path)
    assert len(Transformer.from_pretrained(tmp_path, num_hidden_layers=1).model.layers) == 1


# ------------------------------------------------------------------- defaults of their classes

@pytest.mark.parametrize('kind', KINDS)
def test_a_config_json_without_a_key_means_its_class_default(kind):
    config_class = getattr(transformers, f'{kind}Config')
    defaults = config_class().to_dict()
    names = [field.name for field in fields(Config)]
    values = config_class(**{**SIZES, **KINDS[kind], 'rms_norm_eps': 1e-3, 'eos_token_id': 5,
                             'tie_word_embeddings': True}).to_dict()
    whole = hf.config_fields(values, names)
    for key in values.keys() & set(names):
        less = {name: value for name, value in values.items() if name != key}
        found = hf.config_fields(less, names)
        if key in ('head_dim', 'num_key_value_heads') and kind != 'Glm4Moe':
            assert key not in found                         # it follows from the others
        elif kind == 'Glm4Moe' and key == 'num_nextn_predict_layers':
            assert key not in found                         # no class there loads GLM's MTP layers
        elif key not in ('head_dim', 'first_k_dense_replace', 'num_hidden_layers'):
            assert found.get(key) == defaults[key], key
        for name in found.keys() - {key, 'n_routed_experts', 'first_k_dense_replace'}:
            assert found[name] == whole[name], (key, name)


@pytest.mark.parametrize('kind', KINDS)
def test_without_rope_parameters_theta_is_the_class_default(kind):
    values = getattr(transformers, f'{kind}Config')(**SIZES, **KINDS[kind]).to_dict()
    del values['rope_parameters']
    names = [field.name for field in fields(Config)]
    if kind == 'Glm4Moe':                                   # which turns half of the dims
        with pytest.raises(ValueError, match='partial_rotary_factor=0.5'):
            hf.config_fields(values, names)
    else:
        assert hf.config_fields(values, names)['rope_theta'] == 10000.0


def test_an_old_llama_that_relies_on_defaults_loads_with_equal_logits(tmp_path):
    theirs = make_theirs('Llama', num_key_value_heads=6, max_position_embeddings=2048)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    for key in ('num_key_value_heads', 'rope_parameters', 'rms_norm_eps', 'head_dim',
                'max_position_embeddings', 'tie_word_embeddings', 'attention_bias', 'mlp_bias'):
        config.pop(key, None)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    check_equal(Transformer.from_pretrained(tmp_path), theirs)
    check_equal(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), theirs)


# ------------------------------------------------------------- what travels beside the weights

def test_all_stop_ids_are_kept_and_generation_ends_at_each(tmp_path):
    model = Transformer(Config(**SIZES, attention='gqa', eos_token_id=[2, 30])).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / 'config.json').read_text())['eos_token_id'] == [2, 30]
    again = Transformer.from_pretrained(tmp_path).eval()
    assert again.config.stop_ids == [2, 30]
    folders.write_json(tmp_path / 'generation_config.json', {'eos_token_id': [30, 7]})
    assert folders.stop_ids(tmp_path, again.config) == [2, 30, 7]

    prompt = torch.tensor([[5, 6]])
    free = again.generate(prompt, 30, temperature=2.0, top_k=None)[0, 2:].tolist()
    torch.manual_seed(0)
    free = again.generate(prompt, 30, temperature=2.0)[0, 2:].tolist()
    first, second = sorted(set(free), key=free.index)[1:3]
    end = free.index(first) + 1
    torch.manual_seed(0)
    stopped = again.generate(prompt, 30, temperature=2.0, stop=[second, first])[0, 2:].tolist()
    assert stopped == free[:end]


def test_companions_travel_into_a_model_made_from_another(tmp_path):
    source = tmp_path / 'source'
    shutil.copytree(asset('smollm2'), source, ignore=shutil.ignore_patterns('*.safetensors'))
    edit(source / 'tokenizer_config.json', padding_side='left', pad_token='<|im_end|>')
    edit(source / 'generation_config.json', eos_token_id=[2, 30], repetition_penalty=1.1)
    config = hf.read_config(Config, source)
    tokenizer = Tokenizer.from_file(str(source / 'tokenizer.json'))
    out = tmp_path / 'out'
    out.mkdir()
    shutil.copy(source / 'config.json', out)
    folders.write_companions(out, tokenizer, config, folders.read_companions(source))

    theirs = transformers.AutoTokenizer.from_pretrained(out)
    original = transformers.AutoTokenizer.from_pretrained(source)
    messages = [{'role': 'user', 'content': 'Hello, <|im_end|> world'}]
    for name in ('chat_template', 'pad_token', 'eos_token', 'bos_token', 'padding_side'):
        assert getattr(theirs, name) == getattr(original, name)
    assert (theirs.apply_chat_template(messages, add_generation_prompt=True)['input_ids']
            == original.apply_chat_template(messages, add_generation_prompt=True)['input_ids'])
    generation = transformers.GenerationConfig.from_pretrained(out)
    assert generation.eos_token_id == [2, 30]
    assert generation.repetition_penalty == 1.1
    again = tmp_path / 'again'                              # and on into the next one
    again.mkdir()
    folders.write_companions(again, tokenizer, config, folders.read_companions(out))
    for name in folders.COMPANIONS:
        if (out / name).exists():
            assert (again / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.parametrize('special', [False, True])
def test_the_datas_rule_for_special_tokens_travels_as_transformers_has_it(tmp_path, special):
    tokenizer = Tokenizer.from_file(asset('smollm2') + '/tokenizer.json')
    config = Config(**SIZES, attention='gqa', bos_token_id=1, eos_token_id=2)
    folders.write_companions(tmp_path, tokenizer, config, {}, special_in_text=special)
    assert folders.special_in_text(tmp_path) == special
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs('<|im_start|>user')['input_ids']
    assert (1 in ids) == special
    tokenizer.encode_special_tokens = not special
    assert tokenizer.encode('<|im_start|>user').ids == ids


# ------------------------------------------------------------------------------ RoPE, scaled

LLAMA3 = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
          'original_max_position_embeddings': 32}
SCALED = {'linear': {'rope_type': 'linear', 'factor': 4.0}, 'llama3': LLAMA3}


def greedy(theirs, idx, new, **settings):
    theirs.generation_config.eos_token_id = None
    return theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=new,
                           do_sample=False, **settings)


def loads_and_goes_round(theirs, folder):
    """Their model loads with equal logits and says the same, and what we save of it loads there
    again"""
    theirs.save_pretrained(folder / 'theirs')
    ours = Transformer.from_pretrained(folder / 'theirs').eval()
    ours.save_pretrained(folder / 'ours')
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / 'ours').eval()
    wanted = logits_of(theirs)
    prompt = torch.arange(5)[None]
    said = greedy(theirs, prompt, 18)
    assert (logits_of(ours) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (logits_of(again) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert ours.generate(prompt, 18).equal(said)
    assert greedy(again, prompt, 18).equal(said)
    return ours


@pytest.mark.parametrize('kind', ['Llama', 'DeepseekV3'])
@pytest.mark.parametrize('scaling', SCALED)
def test_scaled_rope_is_that_of_transformers(tmp_path, kind, scaling):
    rope = {**SCALED[scaling], 'rope_theta': 500.0}
    theirs = make_theirs(kind, rope_parameters=rope, max_position_embeddings=256)
    plain = make_theirs(kind, rope_parameters={'rope_type': 'default', 'rope_theta': 500.0})
    difference = (logits_of(theirs) - logits_of(plain)).abs().max()
    assert difference > 0.01 * logits_of(plain).abs().max()
    ours = loads_and_goes_round(theirs, tmp_path)
    angles = theirs.model.rotary_emb.inv_freq * 200
    assert torch.allclose(ours.rope[0, 200], angles.cos(), atol=1e-5)


@pytest.mark.parametrize('scaling', SCALED)
def test_scaled_rope_is_read_in_its_old_spelling(tmp_path, scaling):
    rope = {**SCALED[scaling], 'rope_theta': 500.0}
    theirs = make_theirs('Llama', rope_parameters=rope)
    theirs.save_pretrained(tmp_path)
    old = {('type' if k == 'rope_type' else k): v for k, v in SCALED[scaling].items()}
    edit(tmp_path / 'config.json', rope_parameters=..., rope_theta=500.0, rope_scaling=old)
    check_equal(Transformer.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize('beside', [16, None])
@pytest.mark.parametrize('rope', [{'rope_type': 'yarn', 'factor': 4.0}, LLAMA3])
def test_the_original_context_may_be_beside_or_follow_as_in_transformers(tmp_path, rope, beside):
    make_theirs('Llama').save_pretrained(tmp_path)
    rope = {**rope, 'rope_theta': 500.0}
    rope.pop('original_max_position_embeddings', None)
    edit(tmp_path / 'config.json', rope_parameters=rope)
    if beside:
        edit(tmp_path / 'config.json', original_max_position_embeddings=beside)
    ours = Transformer.from_pretrained(tmp_path)
    check_equal(ours, transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    assert ours.config.rope_scaling['original_max_position_embeddings'] == (beside or 64)


def test_rope_scaling_comes_before_rope_parameters_as_in_transformers(tmp_path):
    Transformer(Config(**SIZES, attention='gqa', rope_theta=500.0)).save_pretrained(tmp_path)
    edit(tmp_path / 'config.json', rope_scaling=SCALED['linear'])       # in a folder of ours
    ours = Transformer.from_pretrained(tmp_path)
    assert ours.config.rope_scaling == SCALED['linear']
    check_equal(ours, transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval())


@pytest.mark.parametrize('rope, words', [
    ({'rope_type': 'dynamic', 'factor': 2.0},
     "rope_type='dynamic': RoPE of this kind is not supported; default, linear, llama3, yarn are"),
    ({'rope_type': 'longrope', 'factor': 2.0, 'long_factor': [1.0] * 4},
     "rope_type='longrope': RoPE of this kind is not supported"),
    ({'rope_type': 'default', 'mrope_section': [2, 1, 1]},
     'mrope_section: RoPE over images and videos is not supported'),
    ({'full_attention': {'rope_type': 'default'}}, 'RoPE of its own for full_attention'),
    ({'rope_type': 'llama3', 'factor': 2.0}, "of rope_type='llama3' lacks low_freq_factor"),
    ({'rope_type': 'yarn'}, "of rope_type='yarn' lacks factor"),
    ({'rope_type': 'yarn', 'factor': None}, 'factor=None: must be a number above 0'),
    ({'rope_type': 'linear', 'factor': '4'}, "factor='4': must be a number above 0"),
    ({'rope_type': 'linear', 'factor': 0}, 'factor=0: must be a number above 0'),
    ({**LLAMA3, 'high_freq_factor': 1.0},
     'high_freq_factor=1.0: must be above low_freq_factor=1.0')])
def test_rope_that_cannot_be_is_refused_in_words(tmp_path, rope, words):
    make_theirs('Llama').save_pretrained(tmp_path)
    edit(tmp_path / 'config.json', rope_parameters={**rope, 'rope_theta': 1e4})
    with pytest.raises(ValueError) as e:
        Transformer.from_pretrained(tmp_path)
    assert words in str(e.value)
    assert '{' not in str(e.value)
    assert 'damaged' not in str(e.value)


def test_quantised_weights_are_refused_without_all_that_is_said_of_them(tmp_path):
    make_theirs('DeepseekV3').save_pretrained(tmp_path)
    edit(tmp_path / 'config.json', quantization_config={'quant_method': 'fp8', 'fmt': 'e4m3'})
    with pytest.raises(ValueError, match=r'quantised weights \(fp8\) are not read: convert') as e:
        Transformer.from_pretrained(tmp_path)
    assert '{' not in str(e.value)


# ------------------------------------------------------- built like DeepSeek-V3, named otherwise

INDEXER = {'index_topk': 24, 'index_head_dim': 8, 'index_n_heads': 2}
DENSE_FIRST = {'mlp_layer_types': ['dense', 'sparse']}
ALIKE = {
    'Glm4MoeLite': {**MOE, **MLA, **DENSE_FIRST, 'rms_norm_eps': 1e-5},
    'SarvamMLA': {**MOE, **MLA, 'q_lora_rank': None},
    'Youtu': MLA,
    'DeepseekV32': {**MOE, **MLA, **INDEXER},
    'GlmMoeDsa': {**MOE, **MLA, **INDEXER},
}


def make_alike(kind, **settings):
    if not hasattr(transformers, f'{kind}Config'):
        pytest.skip(f'this transformers has no {kind}')
    torch.manual_seed(0)
    config = getattr(transformers, f'{kind}Config')(**{**SIZES, **ALIKE[kind], **settings})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, p in model.named_parameters():
        p.data.mul_(3)
    for name, bias in model.named_buffers():
        if name.endswith('e_score_correction_bias'):
            bias.normal_(0, 0.2)
    return model


@pytest.mark.parametrize('kind', ALIKE)
def test_models_like_deepseek_v3_load_under_their_own_names(tmp_path, kind):
    theirs = make_alike(kind)
    ours = loads_and_goes_round(theirs, tmp_path)
    assert ours.config.attention == 'mla'
    assert bool(ours.moe_layers) == (kind != 'Youtu')
    saved = json.loads((tmp_path / 'ours/config.json').read_text(encoding='utf-8'))
    assert saved['model_type'] == 'deepseek_v3'


@pytest.mark.parametrize('settings', [
    {'rope_interleave': False},                             # which the indexed ones do not heed
    {'n_group': 4, 'topk_group': 2, 'norm_topk_prob': False, 'routed_scaling_factor': 1.7},
    {'tie_word_embeddings': True, 'rope_parameters': {**LLAMA3, 'rope_theta': 500.0}}])
@pytest.mark.parametrize('kind', ALIKE)
def test_what_their_config_json_may_say_is_heeded(tmp_path, kind, settings):
    if kind == 'Youtu' and 'n_group' in settings:
        pytest.skip('it has no experts')
    loads_and_goes_round(make_alike(kind, **settings), tmp_path)


@pytest.mark.parametrize('kind', ['DeepseekV32', 'GlmMoeDsa'])
def test_an_indexed_model_is_read_up_to_the_context_in_which_it_is_equal(tmp_path, kind, caplog):
    theirs = make_alike(kind)
    theirs.save_pretrained(tmp_path)
    ours = Transformer.from_pretrained(tmp_path).eval()
    assert ours.config.max_position_embeddings == 24
    assert 'equal to the original up to a context of 24 tokens' in caplog.text
    idx = torch.arange(24)[None]
    with torch.no_grad():
        wanted = theirs(idx).logits
        assert (ours(idx)[0] - wanted).abs().max() < 1e-4 * wanted.abs().max()
        longer = Transformer.from_pretrained(tmp_path, max_position_embeddings=64).eval()
        idx = torch.arange(40)[None]
        assert (longer(idx)[0] - theirs(idx).logits).abs().max() > 1e-2


@pytest.mark.parametrize('kind', ['glm4_moe_lite', 'deepseek_v32', 'glm_moe_dsa', 'deepseek_v3'])
def test_their_mtp_layers_load_and_an_indexer_has_a_place_in_indexed_models_only(tmp_path, kind):
    ours = Transformer(Config(**SIZES, **MLA, **MOE, num_nextn_predict_layers=1)).eval()
    ours.save_pretrained(tmp_path)
    edit(tmp_path / 'config.json', model_type=kind, index_topk=40, **DENSE_FIRST)
    again = Transformer.from_pretrained(tmp_path)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    for layer in range(3):                                  # the last one is MTP's
        add_tensor(tmp_path, f'model.layers.{layer}.self_attn.indexer.wk.weight', torch.ones(8, 48))
    if kind in kinds.INDEXED:
        assert torch.equal(logits_of(Transformer.from_pretrained(tmp_path).eval()), logits_of(ours))
    else:
        with pytest.raises(ValueError, match='self_attn.indexer.wk.weight has no place'):
            Transformer.from_pretrained(tmp_path)


def test_kimi_k2_is_deepseek_v3_by_another_name(tmp_path):
    theirs = make_theirs('DeepseekV3')
    theirs.save_pretrained(tmp_path)
    edit(tmp_path / 'config.json', model_type='kimi_k2', architectures=['KimiK2ForCausalLM'])
    check_equal(Transformer.from_pretrained(tmp_path), theirs)


def test_sarvams_first_config_json_is_understood(tmp_path):
    rope = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 16,
            'mscale': 1.0, 'mscale_all_dim': 1.0, 'rope_theta': 1e4}
    theirs = make_alike('SarvamMLA', rope_parameters=rope)
    theirs.save_pretrained(tmp_path)
    old = {**rope, 'type': 'deepseek_yarn'}
    del old['rope_type'], old['rope_theta']
    edit(tmp_path / 'config.json', rope_parameters=..., rope_scaling=old, rope_theta=1e4,
         n_routed_experts=..., num_experts=8, n_shared_experts=..., num_shared_experts=1)
    check_equal(Transformer.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize('kind', ALIKE)
def test_their_config_json_without_a_key_means_their_class_default(tmp_path, kind):
    if not hasattr(transformers, f'{kind}Config'):
        pytest.skip(f'this transformers has no {kind}')
    whole = getattr(transformers, f'{kind}Config')()
    whole.save_pretrained(tmp_path)
    wanted = hf.read_config(Config, tmp_path)
    (tmp_path / 'config.json').write_text(json.dumps({'model_type': whole.model_type}))
    found = hf.read_config(Config, tmp_path)
    for field in fields(Config):
        if field.name not in ('initializer_range', 'head_dim'):     # which no weights depend on
            assert getattr(found, field.name) == getattr(wanted, field.name), field.name


@pytest.mark.parametrize('kind', kinds.DIFFERENT)
def test_what_only_looks_alike_is_refused_by_name(tmp_path, kind):
    make_theirs('DeepseekV3').save_pretrained(tmp_path)
    edit(tmp_path / 'config.json', model_type=kind)
    with pytest.raises(ValueError, match=f"model_type='{kind}' is another model: \\w+ "):
        Transformer.from_pretrained(tmp_path)


def test_dense_layers_behind_sparse_ones_are_refused(tmp_path):
    make_alike('Glm4MoeLite').save_pretrained(tmp_path)
    edit(tmp_path / 'config.json', mlp_layer_types=['sparse', 'dense'])
    with pytest.raises(ValueError, match='dense layers behind sparse ones are not supported'):
        Transformer.from_pretrained(tmp_path)


# ---------------------------------------------------------------- MTP layers in transformers

def mtp_drafter(folder, depth):
    """-> a model of ours with MTP layers, and the same in transformers, which drafts with them"""
    if not hasattr(transformers.GenerationConfig(), 'use_mtp'):
        pytest.skip('this transformers does not draft with MTP layers')
    torch.manual_seed(0)
    ours = Transformer(Config(**SIZES, **MLA, **MOE, num_nextn_predict_layers=depth,
                              initializer_range=0.2)).eval()
    ours.save_pretrained(folder)
    return ours, transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def tell_mtp_layers(model):
    first = model.config.num_hidden_layers                  # as docs/convert.md has it
    names = [rf'model\.layers\.{first + k}\.' for k in range(model.config.num_mtp_layers)]
    model._keys_to_ignore_on_load_unexpected = names


@pytest.mark.parametrize('depth', [1, 2])
def test_transformers_drafts_with_our_mtp_layers_once_it_is_told_which_they_are(tmp_path, depth):
    ours, model = mtp_drafter(tmp_path, depth)
    idx = torch.arange(12)[None]
    plain = greedy(model, idx, 40)
    assert ours.generate(idx, 40).equal(plain)
    with pytest.raises(RuntimeError, match='MtpModel weights are missing'):
        greedy(model, idx, 40, use_mtp=True)
    tell_mtp_layers(model)
    assert greedy(model, idx, 40, use_mtp=True).equal(plain)


def test_an_mtp_layer_predicts_the_same_in_transformers(tmp_path):
    ours, model = mtp_drafter(tmp_path, 2)
    tell_mtp_layers(model)
    theirs = transformers.modeling_layers.MtpModel.from_pretrained(model).eval()
    idx = torch.arange(12)[None]
    with torch.no_grad():
        state, _ = ours.hidden(idx)
        their_state = model.model(idx).last_hidden_state
        for k in (1, 2):
            T = 12 - k
            embedded = ours.model.embed_tokens(idx[:, k:])
            state, _ = ours.model.layers[1 + k](state[:, :T], embedded, ours.rope[:, :T])
            their_state = theirs.forward_layer(k - 1, their_state[:, :T], torch.arange(T)[None],
                                               None, input_ids=idx[:, k:])
            assert (state - their_state).abs().max() < 1e-5 * their_state.abs().max()
