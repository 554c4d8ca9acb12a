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


def render(directory, messages, add_generation_prompt=True):
    """messages [{'role': ..., 'content': ...}] -> the text of a conversation, up to where the
    model answers. ValueError where there is no template, or it does not take them"""
    template = find_template(directory)
    if not isinstance(template, str):
        raise ValueError(f'{directory} has no chat template: the model was not made for chats, '
                         'give a prompt without --chat')
    try:
        return environment().from_string(template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, tools=None,
            documents=None, **special_tokens(directory))
    except Exception as e:                          # whatever a template does
        raise ValueError(f'the chat template of {directory} does not take this prompt: '
                         f'{type(e).__name__}: {e}') from e


def end_of_answer(directory, tokenizer):
    """-> [the id of the special token that the template puts behind an answer], or []"""
    messages = [{'role': 'user', 'content': 'question'}, {'role': 'assistant', 'content': 'answer'}]
    try:
        text = render(directory, messages, add_generation_prompt=False)
    except ValueError:                              # no template for what has been answered
        return []
    behind = text.rpartition('answer')[2]
    special = [i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    for i in tokenizer.encode(behind, add_special_tokens=False).ids:
        if i in special:
            return [i]
    return []


def environment():
    """Where templates run, which come from strangers: with no access to Python"""
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %} marks answers for training: only its body"""
        tags = {'generation'}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(['name:endgeneration'], drop_needle=True)

    found = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    found.filters['tojson'] = to_json
    found.globals['raise_exception'] = refuse
    found.globals['strftime_now'] = now
    return found


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
