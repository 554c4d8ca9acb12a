"""Hugging Face's format: a folder that is a model.

    config.json                     the architecture
    model.safetensors               the weights by name
    model.safetensors.index.json    the file of each tensor, if there are several files
    tokenizer.json, ...             the tokenizer, and how to generate
    README.md                       the model card

The models are transformers' Llama, Glm4Moe and DeepseekV3. Nothing in a folder is executed.
"""
import json
import re
import shutil
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from model import Config, Transformer
from nanoseek import settings
from nanoseek.tokenizer import COMPANIONS

MODEL_FILES = ['config.json', 'model*.safetensors*', 'tokenizer.json', *COMPANIONS]


def hub_folder(name, files=MODEL_FILES):
    """Return the Path of a folder; download the files if name is a repository on the Hub."""
    if Path(name).is_dir():
        return Path(name)
    import huggingface_hub
    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=files))
    except Exception as e:                          # huggingface_hub has errors of many kinds
        raise ValueError(f"'{name}' is not a folder, and not available on the Hub: {e}") from e


def read_json(file):
    """Return the dict in a JSON file. ValueError names a damaged file."""
    try:
        return json.loads(Path(file).read_text(encoding='utf-8'))
    except ValueError as e:
        raise ValueError(f'{file} is damaged: {e}') from e


def write_json(file, values):
    text = json.dumps(values, indent=2, ensure_ascii=False)
    Path(file).write_text(f'{text}\n', encoding='utf-8')


CLASSES = {'llama': 'LlamaForCausalLM', 'glm4_moe': 'Glm4MoeForCausalLM',
           'deepseek_v3': 'DeepseekV3ForCausalLM'}      # model_type: its class in transformers
OURS = 'nanoseek_'      # prefix of the model_type if transformers does not have the attention

MLA_KEYS = {'q_lora_rank', 'kv_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim'}
MOE_KEYS = {'n_routed_experts', 'n_shared_experts', 'num_experts_per_tok',
            'moe_intermediate_size', 'first_k_dense_replace', 'n_group', 'topk_group',
            'norm_topk_prob', 'routed_scaling_factor'}

# Keys, and the only value they have in our models
FIXED = {'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False,
         'attention_dropout': 0.0}                  # these are also written
ONLY = {**FIXED, 'use_qk_norm': False, 'partial_rotary_factor': 1.0, 'scoring_func': 'sigmoid',
        'topk_method': 'noaux_tc', 'moe_layer_freq': 1, 'sliding_window': None, 'truncate': True,
        'rope_interleave': True, 'quantization_config': None}


def model_type(config):
    if config.attention == 'mla':
        return 'deepseek_v3'
    if config.attention != 'gqa':
        return OURS + config.attention
    return 'glm4_moe' if config.n_routed_experts else 'llama'


def architecture_class(config):
    """Return the model's class in transformers, or our model_type if it has none."""
    kind = model_type(config)
    return CLASSES.get(kind, kind)


def config_json(config):
    """Return the dict of config.json, as transformers 4 and 5, vLLM and llama.cpp read it."""
    kind = model_type(config)
    rope = {'rope_type': 'default', **(config.rope_scaling or {}), 'rope_theta': config.rope_theta}
    values = {**asdict(config), **FIXED, 'model_type': kind,
              'architectures': [architecture_class(config)], 'rope_parameters': rope}
    absent = MLA_KEYS if config.n_routed_experts else MLA_KEYS | MOE_KEYS
    if kind == 'glm4_moe':
        rope['partial_rotary_factor'] = values['partial_rotary_factor'] = 1.0   # default: a half
    if kind == 'deepseek_v3':
        absent = {'head_dim'}
        values['num_key_value_heads'] = config.num_attention_heads
        if not config.n_routed_experts:             # experts would start after the last layer
            layers = config.num_hidden_layers + config.num_nextn_predict_layers
            values.update(first_k_dense_replace=layers, n_routed_experts=2)
    if 'n_routed_experts' not in absent:            # vLLM and llama.cpp have other defaults
        values.update(scoring_func='sigmoid', topk_method='noaux_tc', moe_layer_freq=1)
    return {name: value for name, value in values.items() if name not in absent}


def read_config(folder, **overrides):
    """Return the Config of a model's folder, with overrides in place of some fields."""
    file = Path(folder) / 'config.json'
    values = read_json(file)
    try:
        return Config(**{**config_fields(values), **overrides})
    except (ValueError, TypeError) as e:
        raise ValueError(f'{file}: {e}') from e


def config_fields(values):
    """Turn the dict of config.json into Config's fields. null means the same as no key."""
    # transformers 5 has rope_parameters, with RoPE's theta; 4 had rope_scaling beside rope_theta
    rope = values.get('rope_scaling') or values.get('rope_parameters') or {}
    kind = str(values.get('model_type'))
    if kind not in CLASSES and not kind.startswith(OURS):
        raise ValueError(f'model_type={kind!r}: must be one of {", ".join(CLASSES)}')
    attention = {'llama': 'gqa', 'glm4_moe': 'gqa', 'deepseek_v3': 'mla'}.get(kind)
    values = {**values, **rope, 'attention': attention or kind.removeprefix(OURS)}
    for name, only in ONLY.items():
        if values.get(name, only) != only:
            raise ValueError(f'{name}={values[name]!r}: only {only!r} is supported')
    given = {'tie_word_embeddings': False}
    for field in fields(Config):
        if values.get(field.name) is not None:
            given[field.name] = values[field.name]
    for name in ('vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads'):
        if name not in given:
            raise ValueError(f'{name} is missing')
    kind = rope.get('rope_type') or rope.get('type') or 'default'
    other = ('type', 'rope_theta', 'partial_rotary_factor')
    scaling = {name: value for name, value in rope.items() if name not in other}
    original = 'original_max_position_embeddings'
    if kind in ('llama3', 'yarn'):
        scaling[original] = values.get(original) or values.get('max_position_embeddings')
    given['rope_scaling'] = None if kind == 'default' else {**scaling, 'rope_type': kind}
    layers = given['num_hidden_layers'] + given.get('num_nextn_predict_layers', 0)
    if given.get('first_k_dense_replace', 0) >= layers:
        given.update(n_routed_experts=0, first_k_dense_replace=0)
    return given


def disk_views(state):
    """Return {name on disk: view} of a state_dict's tensors. In memory, a layer's experts are
    stacked (E, ...), to be multiplied at once; on disk, each has three matrices."""
    views = {}
    for name, tensor in state.items():
        stem, _, matrix = name.rpartition('.')
        if not stem.endswith('mlp.experts'):
            views[name] = tensor
        elif matrix == 'down_proj':
            for e, down in enumerate(tensor):                                       # (D, I)
                views[f'{stem}.{e}.down_proj.weight'] = down
        else:
            for e, (gate, up) in enumerate(tensor.unflatten(1, (2, -1))):           # (I, D) each
                views[f'{stem}.{e}.gate_proj.weight'] = gate
                views[f'{stem}.{e}.up_proj.weight'] = up
    return views


def dtype_of(name, dtype):
    """Return dtype, or float32 for a router's bias: rounded, it would choose other experts."""
    return torch.float32 if name.endswith('e_score_correction_bias') else dtype


def open_safetensors(file):
    settings.refuse_pointer(file)
    try:
        return safe_open(file, 'pt')                # raises if a byte is missing
    except SafetensorError as e:
        raise ValueError(f'{file} is damaged: {e}') from e


def tensor_files(folder):
    """Return {tensor: file}. As in transformers, a single file precedes those of an index."""
    single = folder / 'model.safetensors'
    index = folder / 'model.safetensors.index.json'
    if single.is_file():
        with open_safetensors(single) as tensors:
            return dict.fromkeys(tensors.keys(), single)
    if index.is_file():
        return {name: folder / file for name, file in read_json(index)['weight_map'].items()}
    raise ValueError(f'{folder} has no {single.name} and no {index.name}: pickles are not read')


EMBEDDING, HEAD = 'model.embed_tokens.weight', 'lm_head.weight'


def copies(config):
    """Return {tensor: tensor that it repeats}, for those that a file may have and our models do
    not: a tied head, and what each MTP layer shares with the model."""
    repeated = {}
    head = HEAD
    if config.tie_word_embeddings:
        head = EMBEDDING
        repeated[HEAD] = EMBEDDING
    for i in range(config.num_nextn_predict_layers):
        layer = f'model.layers.{config.num_hidden_layers + i}'
        repeated[f'{layer}.embed_tokens.weight'] = EMBEDDING
        repeated[f'{layer}.shared_head.head.weight'] = head
    return repeated


def read_tensor(files, name):
    with open_safetensors(files[name]) as tensors:
        return tensors.get_tensor(name)


def from_pretrained(folder, dtype=torch.float32, **overrides):
    """Return the model in a folder. overrides: fields of Config to replace. A head that differs
    from the embedding is loaded, even if config.json says that they are tied. ValueError names a
    tensor that is missing, has another shape, or has no place in the model."""
    folder = Path(folder)
    files = tensor_files(folder)
    config = read_config(folder, **overrides)
    if config.tie_word_embeddings and HEAD in files and EMBEDDING in files:
        tied = torch.equal(read_tensor(files, HEAD), read_tensor(files, EMBEDDING))
        config = replace(config, tie_word_embeddings=tied)
    promised = config.num_nextn_predict_layers and 'num_nextn_predict_layers' not in overrides
    if promised and f'model.layers.{config.num_hidden_layers}.eh_proj.weight' not in files:
        print(f'{folder} lacks the MTP layers that its config.json names', file=sys.stderr)
        config = replace(config, num_nextn_predict_layers=0)
    with torch.device('meta'):
        model = Transformer(config)
    state = {name: torch.empty(tensor.shape, dtype=dtype_of(name, dtype))
             for name, tensor in model.state_dict().items()}
    places = disk_views(state)
    repeated = copies(config)
    for file in sorted(set(files.values())):
        with open_safetensors(file) as tensors:
            for name in tensors.keys():
                if is_unwanted(name, config, overrides):
                    continue
                tensor = tensors.get_tensor(name)
                if name in repeated:
                    if torch.equal(tensor, read_tensor(files, repeated[name])):
                        continue
                    raise ValueError(f'{file}: {name} differs from {repeated[name]}, but our MTP '
                                     "layers share the model's")
                if name not in places:
                    raise ValueError(f'{file}: {name} has no place in a '
                                     f'{architecture_class(config)}: this is another model')
                place = places.pop(name)
                if tensor.shape != place.shape:
                    raise ValueError(f'{file}: {name} is {tuple(tensor.shape)}, the model needs '
                                     f'{tuple(place.shape)}')
                place.copy_(tensor)
    if places:
        raise ValueError(f'{folder} lacks {min(places)}')
    model.load_state_dict(state, assign=True)
    return model


def is_unwanted(name, config, overrides):
    """Whether overrides drop this tensor's layer, or it is an old file's RoPE table."""
    fewer = overrides.keys() & {'num_hidden_layers', 'num_nextn_predict_layers'}
    layer = re.match(r'model\.layers\.(\d+)\.', name)
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    return fewer and layer and int(layer[1]) >= layers or name.endswith('rotary_emb.inv_freq')


def save_pretrained(model, folder, dtype=None, shard_bytes=5e9, state=None):
    """Write config.json and safetensors, several above shard_bytes, and replace those in the
    folder. dtype: by default the model's. state: a state_dict in place of the model's."""
    from huggingface_hub import save_torch_state_dict
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    dtype = dtype or model.head.dtype
    tensors = {}
    for name, view in disk_views(state or model.state_dict()).items():   # slices are refused
        tensors[name] = view.to('cpu', dtype_of(name, dtype), copy='.experts.' in name)
    for name, original in copies(config).items():
        if name != HEAD or config.attention == 'mla':       # MLA engines do not tie
            tensors[name] = tensors[original].clone()
    save_torch_state_dict(tensors, folder, max_shard_size=int(shard_bytes))
    name = str(dtype).removeprefix('torch.')
    values = {**config_json(config), 'dtype': name, 'torch_dtype': name}    # version 5's, 4's
    write_json(folder / 'config.json', values)
    for file in folder.glob('model*.safetensors'):
        shutil.copymode(folder / 'config.json', file)       # safetensors 0.8 leaves 0600


def read_companions(folder):
    files = [Path(folder) / name for name in COMPANIONS]
    return {file.name: file.read_text(encoding='utf-8') for file in files if file.is_file()}


def write_companions(folder, tokenizer, config, companions):
    """Write tokenizer.json, from a tokenizers.Tokenizer, and the files that say how to use a model.
    Companions are kept, except for keys that make transformers 4 and 5 encode differently."""
    folder = Path(folder)
    (folder / 'tokenizer.json').write_text(tokenizer.to_str(pretty=True), encoding='utf-8')
    for name, text in companions.items():           # two of them are written again below
        (folder / name).write_text(text, encoding='utf-8')
    added = tokenizer.get_added_tokens_decoder()
    tokenizer_config = {
        **json.loads(companions.get('tokenizer_config.json', '{}')),
        'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False,
        'add_bos_token': config.bos_token_id in tokenizer.encode('').ids, 'add_eos_token': False,
        'model_max_length': config.max_position_embeddings,
        'added_tokens_decoder': {i: token.__getstate__() for i, token in added.items()}}
    generation_config = {'do_sample': True, 'temperature': 0.8,
                         **json.loads(companions.get('generation_config.json', '{}'))}
    if config.bos_token_id is not None:
        tokenizer_config.setdefault('bos_token', tokenizer.id_to_token(config.bos_token_id))
        generation_config['bos_token_id'] = config.bos_token_id
    if config.stop_ids:
        tokenizer_config.setdefault('eos_token', tokenizer.id_to_token(config.stop_ids[0]))
    if stops := all_stop_ids(config, generation_config):
        generation_config['eos_token_id'] = stops
    write_json(folder / 'tokenizer_config.json', tokenizer_config)
    write_json(folder / 'generation_config.json', generation_config)


def stop_ids(folder, config):
    """Return the ids at which generation with the model in a folder ends."""
    file = Path(folder) / 'generation_config.json'
    return all_stop_ids(config, read_json(file) if file.is_file() else {})


def all_stop_ids(config, generation_config):
    other = replace(config, eos_token_id=generation_config.get('eos_token_id'))
    return list(dict.fromkeys(config.stop_ids + other.stop_ids))


def model_card(run, name):
    """Return the text of README.md for a checkpoint.Run."""
    from nanoseek.cost import architecture, parameter_table     # which imports this file
    config = run.model.config
    kind = architecture_class(config)
    table = parameter_table(run.model)
    results = ', '.join(f'{name} {loss:.4f}' for name, loss in run.losses.items())
    lines = {**run.card, 'results': results or 'not evaluated yet',
             'command': f'`{" ".join(sys.argv)}`'}
    lines = '\n'.join(f'- {name}: {text}' for name, text in lines.items())
    return f"""\
---
library_name: {'nanoseek' if kind.startswith(OURS) else 'transformers'}
tags: [nanoseek]
---
# {name}, step {run.step:,}

{kind}: {architecture(config)}, context {config.max_position_embeddings:,}.
{table['total']:,} parameters, {table['active']:,} active per token.

{lines}
"""
