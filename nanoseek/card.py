"""The model card, README.md of a checkpoint: what the Hub shows of a model."""
import sys
from pathlib import Path

from nanoseek.estimate import architecture, parameter_table
from nanoseek.hf import architecture_class

CARD = """\
---
library_name: {library}
pipeline_tag: text-generation
tags: [nanoseek]{base_model}
---
# {name}, step {step:,}

{kind}: {architecture}, context {context:,}.
{total:,} parameters, {active:,} active per token, trained with nanoseek.

- started from: {origin}
- data: {data}, tokenizer {tokenizer}
- tokens seen: {tokens:,}
- losses: {losses}
- command: `{command}`, {processes}
"""


def model_card(s, model, data, step, tokens, losses, world):
    """tokens: that were seen; losses: {name: number}; world: number of ranks -> text"""
    c = model.config
    table = parameter_table(model)
    kind = architecture_class(c)
    library = 'transformers'
    if kind.startswith('nanoseek'):
        library = 'nanoseek'
    base_model = ''
    if s.init_from and not Path(s.init_from).is_dir():
        base_model = f'\nbase_model: {s.init_from}'
    sources = [source for source, _ in data.sources.values()]
    told = ', '.join(f'{name} {loss:.4f}' for name, loss in losses.items())
    if not losses:
        told = 'not evaluated yet'
    origin = s.init_from
    if not s.init_from:
        origin = 'random weights'
    program = 'python' if world == 1 else 'torchrun'
    return CARD.format(
        library=library, base_model=base_model, name=Path(s.out_dir).name, step=step, kind=kind,
        architecture=architecture(c), context=c.max_position_embeddings, total=table['total'],
        active=table['active'], origin=origin, data=data_line(data),
        tokenizer=sources[0].meta['tokenizer']['name'], tokens=tokens,
        losses=told, command=' '.join([program, *sys.argv]),
        processes='1 process' if world == 1 else f'{world} processes')


def data_line(data):
    """What the model was trained on: each source's name, license, and share of a mixture"""
    parts = []
    for source, share in data.sources.values():
        about = source.meta['source']
        part = f'{about["name"]} ({about["license"]})'
        if share < 1:
            part = f'{share:.4g} {part}'
        parts.append(part)
    return ' + '.join(parts)
