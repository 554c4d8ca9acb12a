"""Conversations: a chat template (Jinja) makes them text, and a tokenizer makes this tokens.

Messages are a list of {'role': 'user', 'content': 'Hello!'}, as in transformers.
"""
import functools
import json
import re
from datetime import datetime
from pathlib import Path

import numpy as np

from nanoseek import hf
from nanoseek.tokenizer import encode, encoding

# For tokenizers without a template of their own
CHATML = """\
{%- for message in messages %}
{%- if message.role not in ('system', 'user', 'assistant') %}
{{- raise_exception('unknown role ' + message.role) }}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}
{{- message.content + '<|im_end|>' }}
{%- endgeneration %}
{%- else %}
{{- message.content + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
BREAK = '\ufdd0'            # within special tokens that a message spells: no character of a text


class Chat:
    """The chat template in a folder. ValueError if there is none"""

    def __init__(self, folder, tokenizer):
        from tokenizers import Tokenizer
        self.folder = folder
        files = hf.read_companions(folder)
        values = json.loads(files.get('tokenizer_config.json', '{}'))
        self.source = files.get('chat_template.jinja', values.get('chat_template'))
        if self.source is None:
            raise ValueError(f'{folder} has no chat template: give a prompt without --chat')
        self.special_tokens = {}                    # {'bos_token': '<s>', ...}
        for name, token in values.items():
            if isinstance(token, dict):             # with the settings of an AddedToken
                token = token.get('content')
            if name.endswith('_token') and isinstance(token, str):      # neither null nor a flag
                self.special_tokens[name] = token
        added = tokenizer.get_added_tokens_decoder().values()
        names = [re.escape(token.content) for token in added if token.special]
        self.special = re.compile('|'.join(names) or '(?!)')
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.add_special_tokens([BREAK])

    @functools.cached_property
    def template(self):
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message):
            raise ValueError(message)

        environment = ImmutableSandboxedEnvironment(    # templates come from strangers
            trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols'])
        environment.filters['tojson'] = functools.partial(json.dumps, ensure_ascii=False)
        environment.globals.update(raise_exception=raise_exception,
                                   strftime_now=datetime.now().strftime)
        source = self.source
        for tag, same in (('endgeneration', 'endif'), ('generation', 'if true')):
            source = re.sub(rf'({{%[-+]?\s*){tag}\b', rf'\1{same}', source)  # transformers' marks
        return environment.from_string(source)

    def render(self, messages, add_generation_prompt=False):
        """Return messages as one text, as transformers renders them."""
        try:
            return self.template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None,
                documents=None, **self.special_tokens)
        except Exception as e:                      # a template may do anything
            raise ValueError(f'the chat template of {self.folder} does not accept this: '
                             f'{type(e).__name__}: {e}') from e

    def escape(self, messages):
        """Break the special tokens that messages spell: they stay text."""
        def broken(match):
            return match[0][0] + BREAK + match[0][1:]

        return [{**message, 'content': self.special.sub(broken, message['content'])}
                for message in messages]

    def prompt(self, messages):
        """Return the ids that the assistant's next turn follows, a list."""
        text = self.render(self.escape(messages), add_generation_prompt=True)
        ids = encode(self.tokenizer, text, whole=False)
        return [i for i in ids if i != self.tokenizer.token_to_id(BREAK)]

    def encode(self, messages):
        """Return the ids of a conversation, and which of them count: the assistant's, with the
        token that ends a turn. (2, n) uint32. ValueError if this cannot be told."""
        messages = self.escape(messages)
        text = self.render(messages)
        tokens = encoding(self.tokenizer, text, whole=False)
        ids = np.array(tokens.ids, np.uint32)
        counts = np.zeros_like(ids)
        begin, end = np.array(tokens.offsets).T             # (n,) each, in characters
        for i, message in enumerate(messages):
            if message['role'] == 'assistant':
                before = self.render(messages[:i], add_generation_prompt=True)
                whole = self.render(messages[:i + 1]).rstrip()
                if not (text.startswith(whole) and whole.startswith(before)):
                    raise ValueError('the chat template does not render these turns one after the '
                                     'other')
                counts[(begin < len(whole)) & (end > len(before))] = 1
        if not counts.any():
            raise ValueError('the assistant has no turn')
        kept = ids != self.tokenizer.token_to_id(BREAK)
        return np.stack((ids[kept], counts[kept]))


def write_companions(folder, name, tokenizer):
    """Make a tokenizer one for chats, and write the files that say how: those of the model that
    `name` names, if it is a folder or a Hub id, with ChatML if there is no template."""
    files = {}
    if Path(name).is_dir() or ('/' in name and not name.endswith('.json')):
        files = hf.read_companions(hf.hub_folder(name, hf.COMPANIONS))
    if 'chat_template' not in json.loads(files.get('tokenizer_config.json', '{}')):
        files.setdefault('chat_template.jinja', CHATML)
    if files.get('chat_template.jinja') == CHATML:
        tokenizer.add_special_tokens(['<|im_start|>', '<|im_end|>'])
        values = json.loads(files.get('generation_config.json', '{}'))
        values['eos_token_id'] = tokenizer.token_to_id('<|im_end|>')
        files['generation_config.json'] = json.dumps(values)
    for file, text in files.items():
        (folder / file).write_text(text, encoding='utf-8')
