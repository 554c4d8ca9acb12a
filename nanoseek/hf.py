"""Hugging Face's format: config.json <-> Config, safetensors <-> parameters. (What else is in a
model's folder is in folders.py, which needs no torch.)

Three classes of transformers are what our models are there: Llama, Glm4Moe and DeepseekV3; more
can be read (kinds.py). Nothing in a folder is executed, and pickles are not read.
"""
import logging
import re
import shutil
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nanoseek.folders import read_json, write_json
from nanoseek.kinds import (ALIASES, CLASSES, DIFFERENT, EVERY_DEFAULT, INDEXED, OURS,
                            READABLE)
from nanoseek.unmapped import UnmappedSafetensors

log = logging.getLogger(__name__)               # a warning is a line on stderr

# ------------------------------------------------------------------------------ config.json

MLA_KEYS = {'q_lora_rank', 'kv_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim'}
MOE_KEYS = {'n_routed_experts', 'n_shared_experts', 'num_experts_per_tok',
            'moe_intermediate_size', 'first_k_dense_replace', 'n_group', 'topk_group',
            'norm_topk_prob', 'routed_scaling_factor'}

# null says: none, or what follows from the rest
NULLABLE = {'head_dim', 'num_key_value_heads', 'q_lora_rank', 'rope_scaling', 'bos_token_id',
            'eos_token_id', 'num_nextn_predict_layers'}

# What our models are, whatever their settings
FIXED = {'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False,
         'attention_dropout': 0.0}

# What a config.json may say of a model that ours can represent
ONLY = {**FIXED, 'use_qk_norm': False, 'partial_rotary_factor': 1.0, 'scoring_func': 'sigmoid',
        'topk_method': 'noaux_tc', 'sliding_window': None, 'truncate': True}


def config_json(config):
    """Config -> the dict of config.json, with the keys that transformers 4 and 5, vLLM and
    llama.cpp read."""
    mla = config.attention == 'mla'
    moe = config.n_routed_experts > 0
    values = asdict(config)
    if mla:
        del values['head_dim']
        values['num_key_value_heads'] = config.num_attention_heads
        values['rope_interleave'] = True
        if not moe:                         # a dense one has nothing but leading dense layers
            layers = config.num_hidden_layers + config.num_nextn_predict_layers
            values['first_k_dense_replace'] = layers
            values['n_routed_experts'] = 2
    else:
        for name in MLA_KEYS:
            del values[name]
        if not moe:
            for name in MOE_KEYS:
                del values[name]
    if mla or moe:                          # vLLM and llama.cpp route otherwise without these
        values['scoring_func'] = 'sigmoid'
        values['topk_method'] = 'noaux_tc'
    kind = model_type(config)
    rope = {'rope_type': 'default'}
    if config.rope_scaling:
        rope.update(config.rope_scaling)
    rope['rope_theta'] = config.rope_theta
    if kind == 'glm4_moe':                  # whose default is a half
        rope['partial_rotary_factor'] = 1.0
        values['partial_rotary_factor'] = 1.0
    values.update(FIXED)
    values['model_type'] = kind
    values['architectures'] = [architecture_class(config)]
    values['rope_parameters'] = rope
    return values


def model_type(config):
    if config.attention == 'mla':
        return 'deepseek_v3'
    if config.attention != 'gqa':
        return OURS + config.attention
    if config.n_routed_experts:
        return 'glm4_moe'
    return 'llama'


def architecture_class(config):
    """The class of transformers that the model is, or for linear attention a name of ours."""
    return CLASSES.get(model_type(config), OURS)


def config_fields(values, names):
    """config.json's dict -> {name: value} for the fields of Config that names lists, where it
    says them. ValueError that names what our models cannot represent."""
    kind = values.get('model_type')
    attention, defaults = readable(kind)
    rope = rope_settings(values)
    values = {**defaults, **with_our_names(values), **rope}
    refuse_quantised(values)
    for name, value in ONLY.items():
        if values.get(name, value) != value:
            raise ValueError(f'{name}={values[name]!r}: this model can represent {value!r} only')
    found = {}
    for name in names:
        if values.get(name) is not None:
            found[name] = values[name]
        elif name in values and name not in NULLABLE:
            raise ValueError(f'{name} is null')
    for name in ('vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads'):
        if name not in found:                       # of a kind of ours, which has no defaults
            raise ValueError(f'{name} is missing')
    found['attention'] = attention
    if values.get('mlp_layer_types'):
        found['first_k_dense_replace'] = leading_dense(values['mlp_layer_types'])
    layers = found['num_hidden_layers'] + found.get('num_nextn_predict_layers', 0)
    if found.get('first_k_dense_replace', 0) >= layers:
        found['n_routed_experts'] = 0
    if found.get('n_routed_experts', 0) == 0:
        found['first_k_dense_replace'] = 0
    found.pop('rope_scaling', None)
    scaling = rope_scaling(rope, found.get('max_position_embeddings'))
    if scaling:
        found['rope_scaling'] = scaling
    if kind in INDEXED and values['index_topk'] < found['max_position_embeddings']:
        found['max_position_embeddings'] = values['index_topk']     # from there on it is another
    return found


def readable(kind):
    """model_type -> the attention of such a model, what its config.json means without a key"""
    if str(kind).startswith(OURS):
        return kind.removeprefix(OURS), EVERY_DEFAULT
    if kind in DIFFERENT:
        raise ValueError(f'model_type={kind!r} is another model: {DIFFERENT[kind]}')
    if kind not in READABLE:
        known = ', '.join(READABLE)
        raise ValueError(f'model_type={kind!r}: must be one of {known}')
    return READABLE[kind]


def with_our_names(values):
    """A config.json's dict, with our keys for those of other names"""
    found = {}
    for name, value in values.items():
        if ALIASES.get(name, name) not in values:
            name = ALIASES[name]
        found[name] = value
    return found


def leading_dense(kinds):
    """mlp_layer_types, 'dense' or 'sparse' for each layer -> how many dense ones lead"""
    count = kinds.count('dense')
    if kinds != ['dense'] * count + ['sparse'] * (len(kinds) - count):
        raise ValueError('mlp_layer_types: dense layers behind sparse ones are not supported')
    return count


def refuse_quantised(values):
    quantised = values.get('quantization_config')
    if quantised is not None:
        method = quantised.get('quant_method')
        raise ValueError(f'quantization_config: quantised weights ({method}) are not read: '
                         'convert them to bfloat16 first')


def rope_settings(values):
    """What config.json says of RoPE: in rope_scaling as transformers 4 wrote it, which comes first
    in transformers 5 too, or in rope_parameters. original_max_position_embeddings may be beside."""
    rope = dict(values.get('rope_scaling') or values.get('rope_parameters') or {})
    for name, value in rope.items():
        if isinstance(value, dict):
            raise ValueError(f'RoPE of its own for {name}: in this model all layers have the same')
    if rope.get('mrope_section') is not None:
        raise ValueError('mrope_section: RoPE over images and videos is not supported')
    beside = values.get('original_max_position_embeddings')
    if beside is not None:
        rope['original_max_position_embeddings'] = beside
    return rope


def rope_scaling(rope, context):
    """rope_settings' dict, max_position_embeddings -> Config.rope_scaling, or None for the
    default RoPE."""
    kind = rope.get('rope_type') or rope.get('type') or 'default'
    if kind == 'default':
        return None
    if kind == 'deepseek_yarn':                     # as Sarvam's first config.json calls it
        kind = 'yarn'
    other = ('rope_theta', 'partial_rotary_factor', 'type')
    scaling = {**{k: v for k, v in rope.items() if k not in other}, 'rope_type': kind}
    if kind in ('llama3', 'yarn') and context is not None:
        scaling.setdefault('original_max_position_embeddings', context)     # as transformers does
    return scaling


def read_config(config_class, directory, **overrides):
    """A model's folder -> its Config. overrides: fields that are to be others"""
    file = Path(directory) / 'config.json'
    values = read_json(file)
    try:
        found = config_fields(values, [field.name for field in fields(config_class)])
        return config_class(**{**found, **overrides})
    except (ValueError, TypeError, AttributeError) as e:
        raise ValueError(f'{file}: {e}') from e


# ------------------------------------------------------------------------------ safetensors

INDEX = 'model.safetensors.index.json'


class Weights:
    """The tensors of a model's folder: shapes {name: shape}, and their values."""

    def __init__(self, directory):
        self.directory = Path(directory)
        self.files = find_tensors(self.directory)                           # {name: file}
        self.shapes = {}
        for file in sorted(set(self.files.values())):
            with open_safetensors(file) as f:
                for name in f.keys():
                    if self.files.get(name) == file:
                        self.shapes[name] = tuple(f.get_slice(name).get_shape())
        for name, file in self.files.items():
            if name not in self.shapes:
                raise ValueError(f'{file} has no {name}, which {self.directory / INDEX} says '
                                 'it has')

    def copy_into(self, tensor, name):
        """Fills tensor with the values of that name. In pieces, from a file opened anew: what
        it has mapped counts as memory until it is closed."""
        if self.shapes.get(name) != tuple(tensor.shape):
            where = self.shapes.get(name, 'in no model*.safetensors')
            raise ValueError(f'{self.directory}: {name} is {where}, the model wants '
                             f'{tuple(tensor.shape)}')
        row = max(tensor.numel() // max(len(tensor), 1), 1)
        rows = max(2**22 // row, 1)
        for first in range(0, len(tensor), rows):
            with open_safetensors(self.files[name]) as f:
                piece = f.get_slice(name)[first:first + rows]
                tensor[first:first + rows].copy_(piece)


def open_safetensors(file):
    try:
        str(file).encode()
        return safe_open(file, 'pt')                    # raises if a byte is missing
    except SafetensorError as e:
        raise ValueError(f'{file} is damaged: {e}') from e
    except (OSError, UnicodeEncodeError):       # it is not there, or the library cannot open it
        return UnmappedSafetensors(file)


def find_tensors(directory):
    """-> {name: file} of a folder's tensors, as transformers finds them: in model.safetensors,
    else where the index says, else in a whole set of numbered files."""
    single = directory / 'model.safetensors'
    if single.is_file():
        return names_in([single])
    if (directory / INDEX).is_file():
        return names_by_index(directory)
    sets = {}
    for file in sorted(directory.glob('model-*-of-*.safetensors')):
        number = re.fullmatch(r'model-(\d+)-of-(\d+)\.safetensors', file.name)
        if number:
            sets.setdefault(int(number[2]), {})[int(number[1])] = file
    if not sets:
        raise ValueError(f'{directory} has no model*.safetensors{what_else(directory)}')
    if len(sets) > 1:
        raise ValueError(f'{directory} has files of several models (of {sorted(sets)} files '
                         f'each) and no {INDEX} that says which are meant')
    (total, files), = sets.items()
    missing = sorted(set(range(1, total + 1)) - files.keys())
    if missing:
        raise ValueError(f'{directory}: file {missing[0]} of the {total} of its model is missing')
    return names_in(files.values())


def what_else(directory):
    """A hint at what a folder without our kind of weights holds."""
    if any(directory.glob('adapter_model*')):
        return ': it holds an adapter, merge it into its model first'
    if any(directory.glob('*.bin')) or any(directory.glob('*.pt*')):
        return ', and pickles are not read: save it with safetensors'
    if any(directory.glob('*.gguf')):
        return ', and GGUF files are not read'
    return ''


def names_in(files):
    found = {}
    for file in files:
        with open_safetensors(file) as f:
            for name in f.keys():
                if name in found:
                    raise ValueError(f'{name} is in {found[name].name} and in {file.name}: '
                                     f'{file.parent} holds files of several models')
                found[name] = file
    return found


def names_by_index(directory):
    index = read_json(directory / INDEX)
    weight_map = index.get('weight_map')
    if not isinstance(weight_map, dict):
        raise ValueError(f'{directory / INDEX} is damaged: it has no weight_map')
    found = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f'{directory / INDEX}: {file!r} is no file beside it')
        found[name] = directory / file
    for file in sorted(set(found.values())):
        if not file.is_file():
            raise ValueError(f'{directory / INDEX} names {file.name}, which is missing')
    return found


def on_disk(name, tensor):
    """A tensor of Transformer.state_dict -> [(name in a file, view of the tensor)]: stacked
    experts are one tensor for each expert and matrix there."""
    stem, _, kind = name.rpartition('.')
    if not stem.endswith('mlp.experts'):
        return [(name, tensor)]
    found = []
    for e, weight in enumerate(tensor):
        if kind == 'gate_up_proj':
            gate, up = weight.chunk(2)
            found.append((f'{stem}.{e}.gate_proj.weight', gate))
            found.append((f'{stem}.{e}.up_proj.weight', up))
        else:
            found.append((f'{stem}.{e}.{kind}.weight', weight))
    return found


def named_views(model, state=None):
    """-> {name in a file: view of a tensor of state}, by default of the model's own"""
    if state is None:
        state = model.state_dict()
    found = {}
    for name, tensor in state.items():
        found.update(on_disk(name, tensor))
    return found


def from_pretrained(model_class, config_class, directory, dtype=torch.float32, **overrides):
    """A folder -> the model in dtype, with one copy of its weights in memory. overrides:
    fields of the config that are to be others; weights that then do not fit are named."""
    directory = Path(directory)
    config = read_config(config_class, directory, **overrides)
    own_config = read_config(config_class, directory)
    weights = Weights(directory)
    values = read_json(directory / 'config.json')
    if values.get('model_type') in INDEXED:
        log.warning(f'{directory}: equal to the original up to a context of '
                    f'{own_config.max_position_embeddings:,} tokens; above that the original '
                    'attends to some of them only')
    has_mtp = f'model.layers.{own_config.num_hidden_layers}.eh_proj.weight' in weights.shapes
    if own_config.num_nextn_predict_layers and not has_mtp:
        own_config = replace(own_config, num_nextn_predict_layers=0)
        if 'num_nextn_predict_layers' not in overrides:
            log.warning(f'{directory}: config.json promises MTP layers that no file has: loaded '
                        'without')
            config = replace(config, num_nextn_predict_layers=0)
    with torch.device('meta'):
        model = model_class(config)
    check_leftovers(model, own_config, model_class, weights)

    state = {}
    for name, empty in model.state_dict().items():
        own_dtype = dtype
        if name.endswith('e_score_correction_bias'):
            own_dtype = torch.float32
        state[name] = torch.empty(empty.shape, dtype=own_dtype)
        for disk_name, part in on_disk(name, state[name]):
            weights.copy_into(part, disk_name)
    if config.attention == 'mla' and not rope_is_interleaved(values):
        pair_rope_rows(state, config)
    model.load_state_dict(state, assign=True)
    return model


def rope_is_interleaved(values):
    """config.json's dict -> whether RoPE turns pairs (2i, 2i + 1). The indexed kinds always do,
    whatever their config.json says."""
    return values.get('model_type') in INDEXED or values.get('rope_interleave', True)


def pair_rope_rows(state, config):
    """Rows that RoPE turns as halves (i, i + dr/2) go to where it turns pairs (2i, 2i + 1)."""
    dr = config.qk_rope_head_dim
    for name, tensor in state.items():
        heads = config.num_attention_heads
        if name.endswith('kv_a_proj_with_mqa.weight'):
            heads = 1
        elif not name.endswith(('q_proj.weight', 'q_b_proj.weight')):
            continue
        turned = tensor.unflatten(0, (heads, -1))[:, -dr:]                  # (heads, dr, in)
        pairs = turned.unflatten(1, (2, dr // 2)).transpose(1, 2).flatten(1, 2)
        turned.copy_(pairs)


def check_leftovers(model, own_config, model_class, weights):
    """ValueError for a tensor that the folder's own model has no place for: it would be
    another model, and ours would give other logits without a word."""
    known = set(named_views(model))
    if own_config != model.config:                      # the caller asked for another model
        with torch.device('meta'):
            known |= set(named_views(model_class(own_config)))
    kind = read_json(weights.directory / 'config.json').get('model_type')
    indexed = kind in INDEXED
    for name in weights.shapes:
        layer = re.match(r'model\.layers\.\d+\.', name)
        mtp = layer is not None and f'{layer[0]}eh_proj.weight' in weights.shapes
        harmless = name == 'lm_head.weight' or name.endswith('rotary_emb.inv_freq')
        indexer = indexed and '.self_attn.indexer.' in name
        if name not in known and not mtp and not harmless and not indexer:
            raise ValueError(f'{weights.directory}: {name} has no place in a '
                             f'{architecture_class(own_config)}: this is another model')


def snapshot(model, dtype=None, state=None):
    """-> copies on the CPU of all that a folder's safetensors hold. dtype: theirs by default;
    the routers' biases stay float32. state: a state_dict in the place of the model's own"""
    views = named_views(model, state)
    if dtype is None:
        dtype = model.head.dtype
    embedding = views['model.embed_tokens.weight']
    head = views.get('lm_head.weight', embedding)
    for i in range(model.config.num_hidden_layers, len(model.model.layers)):
        # published MTP layers bring these two
        views[f'model.layers.{i}.embed_tokens.weight'] = embedding
        views[f'model.layers.{i}.shared_head.head.weight'] = head
    if model.config.attention == 'mla':
        views['lm_head.weight'] = head                  # for engines that tie nothing
    copies = {}
    for name, tensor in views.items():
        own_dtype = dtype
        if name.endswith('e_score_correction_bias'):
            own_dtype = tensor.dtype
        copies[name] = tensor.to('cpu', own_dtype, copy=True)
    return copies


def save_pretrained(model, directory, dtype=None, shard_bytes=5e9, state=None):
    """Writes config.json and safetensors, several above shard_bytes, and removes those of an
    earlier model. state: what snapshot returned before, which is written instead"""
    from huggingface_hub import save_torch_state_dict       # removes them
    directory = Path(directory)
    if state is None:
        state = snapshot(model, dtype)
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / INDEX).exists():
        (directory / INDEX).unlink()
    save_torch_state_dict(state, directory, max_shard_size=int(shard_bytes))
    values = config_json(model.config)
    saved_dtype = str(state['model.norm.weight'].dtype).removeprefix('torch.')
    values['dtype'] = saved_dtype
    values['torch_dtype'] = saved_dtype
    write_json(directory / 'config.json', values, indent=2)
    for file in directory.glob('model*.safetensors'):
        with suppress(OSError):         # a drive without modes; safetensors 0.8 leaves 0600
            shutil.copymode(directory / 'config.json', file)
