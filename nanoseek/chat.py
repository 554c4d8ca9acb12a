"""A model's own chat template, rendered as transformers renders it."""
import datetime
import json
from pathlib import Path

from nanoseek.folders import read_json


def find_template(directory):
    """A model's folder -> its chat template (Jinja), or None"""
    directory = Path(directory)
    file = directory / 'chat_template.jinja'
    if file.is_file():
        return file.read_text(encoding='utf-8')
    template = tokenizer_config(directory).get('chat_template')
    if isinstance(template, list):                  # several: [{'name': ..., 'template': ...}]
        named = {entry['name']: entry['template'] for entry in template}
        template = named.get('default')
    return template


def tokenizer_config(directory):
    file = Path(directory) / 'tokenizer_config.json'
    if file.is_file():
        return read_json(file)
    return {}


def render(directory, messages):
    """messages [{'role': ..., 'content': ...}] -> the text of a conversation, up to where the
    model answers. ValueError where there is no template, or it does not take them"""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox
    template = find_template(directory)
    if template is None:
        raise ValueError(f'{directory} has no chat template: the model was not made for chats')
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    environment.filters['tojson'] = to_json
    environment.globals['raise_exception'] = refuse
    environment.globals['strftime_now'] = now
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=True, tools=None, documents=None,
            **special_tokens(directory))
    except jinja2.TemplateError as e:
        raise ValueError(f'the chat template of {directory} does not take this prompt: '
                         f'{e}') from e


def special_tokens(directory):
    """-> {'bos_token': '<s>', ...}, which a template may name"""
    found = {}
    for name, value in tokenizer_config(directory).items():
        if name.endswith('_token'):
            if isinstance(value, dict):
                value = value.get('content')
            if isinstance(value, str):
                found[name] = value
    return found


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Jinja's own would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def refuse(message):
    import jinja2
    raise jinja2.TemplateError(message)


def now(format):
    return datetime.datetime.now().strftime(format)
