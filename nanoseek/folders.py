"""Folders of models on the Hugging Face Hub and here, without their weights: JSON files, what
travels beside the weights (tokenizer, generation settings, chat template), and the Hub itself.
"""
import json
import re
import sys
from pathlib import Path

# What we read of a model on the Hub
MODEL_FILES = ['config.json', 'model*.safetensors', 'model.safetensors.index.json',
               'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json',
               'generation_config.json', 'chat_template.jinja']


def read_json(file):
    """A dict from a JSON file. ValueError that names the file"""
    try:
        values = json.loads(file.read_text(encoding='utf-8'))
    except ValueError as e:
        raise ValueError(f'{file} is damaged: {e}') from e
    if not isinstance(values, dict):
        raise ValueError(f'{file} is damaged: it holds no JSON object')
    return values


def write_json(file, values, indent=1):
    """A name that is no UTF-8 is written as JSON's escape of it."""
    text = json.dumps(values, indent=indent, ensure_ascii=False)
    file.write_bytes(f'{text}\n'.encode('utf-8', 'backslashreplace'))


# ---------------------------------------------------------------- what travels beside weights

COMPANIONS = ('tokenizer_config.json', 'special_tokens_map.json', 'generation_config.json',
              'chat_template.jinja')


def read_companions(directory):
    """A model's folder -> {file: its text}, for write_companions of models that come from it"""
    found = {}
    for name in COMPANIONS:
        file = Path(directory) / name
        if file.is_file():
            found[name] = file.read_text(encoding='utf-8')
            if name.endswith('.json'):
                read_json(file)                         # damaged: say so now
    return found


def write_companions(directory, tokenizer, config, companions, special_in_text=False):
    """Writes the tokenizer's and the generation's files of a model. tokenizer: a
    tokenizers.Tokenizer; companions: those of the model that it was made from, or {}. What
    they say stays, but for what makes transformers 4 and 5 find other ids in a text.
    special_in_text: whether the data had a special token where a text spells one"""
    directory = Path(directory)
    (directory / 'tokenizer.json').write_text(tokenizer.to_str(pretty=True), encoding='utf-8')
    values = json.loads(companions.get('tokenizer_config.json', '{}'))
    if special_in_text:
        values.pop('split_special_tokens', None)
    elif 'tokenizer_config.json' not in companions:
        values['split_special_tokens'] = True
    values.update({
        'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False,
        'add_bos_token': False, 'add_eos_token': False,
        'model_max_length': config.max_position_embeddings,
        'added_tokens_decoder': added_tokens(tokenizer)})
    if config.bos_token_id is not None:
        values.setdefault('bos_token', tokenizer.id_to_token(config.bos_token_id))
    if config.stop_ids:
        values.setdefault('eos_token', tokenizer.id_to_token(config.stop_ids[0]))
    write_json(directory / 'tokenizer_config.json', values)

    values = json.loads(companions.get('generation_config.json', '{}'))
    values.setdefault('do_sample', True)
    values.setdefault('temperature', 0.8)
    if config.bos_token_id is not None:
        values['bos_token_id'] = config.bos_token_id
    stops = config.stop_ids + [i for i in as_list(values.get('eos_token_id'))
                               if i not in config.stop_ids]
    if len(stops) == 1:
        values['eos_token_id'] = stops[0]
    elif stops:
        values['eos_token_id'] = stops
    write_json(directory / 'generation_config.json', values)

    for name in ('special_tokens_map.json', 'chat_template.jinja'):
        if name in companions:
            (directory / name).write_text(companions[name], encoding='utf-8')


def added_tokens(tokenizer):
    keys = ('content', 'lstrip', 'normalized', 'rstrip', 'single_word', 'special')
    found = {}
    for i, token in tokenizer.get_added_tokens_decoder().items():
        found[i] = {key: getattr(token, key) for key in keys}
    return found


def special_in_text(directory):
    """Whether a special token that is spelled in a text is that token, for the tokenizer of a
    model's folder, as in transformers"""
    file = Path(directory) / 'tokenizer_config.json'
    if not file.is_file():
        return True
    return not read_json(file).get('split_special_tokens', False)


def as_list(value):
    """eos_token_id is a number, a list or null"""
    if value is None:
        return []
    if isinstance(value, int):
        return [value]
    return list(value)


def stop_ids(directory, config):
    """The ids at which generation with the model in a folder ends: those of its config.json
    and of its generation_config.json."""
    file = Path(directory) / 'generation_config.json'
    more = []
    if file.is_file():
        more = as_list(read_json(file).get('eos_token_id'))
    return config.stop_ids + [i for i in more if i not in config.stop_ids]


# ---------------------------------------------------------------------------------- the Hub

def hub_folder(name, files):
    """A folder here, or those files of a repository on the Hugging Face Hub -> Path"""
    name = str(name)
    if Path(name).is_dir():
        return Path(name)
    parent_is_here = '/' in name and Path(name).parent.is_dir()
    if not re.fullmatch(r'\w[\w.-]*(/[\w.-]+)?', name) or parent_is_here:
        raise ValueError(f"'{name}': no such folder, and not the form of a Hub id")
    import huggingface_hub
    huggingface_hub.logging.set_verbosity_error()       # its retries say the same five times
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
        if not folder.is_dir():
            raise FileNotFoundError(f'no {", ".join(files)} there')
    except Exception as e:                              # whatever its layers raise
        raise ValueError(f"'{name}' is no folder here, and the Hugging Face Hub did not give "
                         f'it: {e}') from e
    return folder
