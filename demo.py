"""A page in your browser that shows a model at work. Needs `pip install gradio`.

    python demo.py                                          # the newest checkpoint under out/
    python demo.py --checkpoint=HuggingFaceTB/SmolLM2-135M
    python demo.py --compare=out/shakespeare/step-000250    # beside it, on the same prompt
    python demo.py --space=my-space     # a folder to upload as a Hugging Face Space

It takes whatever sample.py takes. Only this machine sees the page, unless --host says more.
"""
import os
import time
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

os.environ.setdefault('GOMP_SPINCOUNT', '10000')        # as in sample.py
os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')

import config  # noqa: E402
import sample  # noqa: E402
from model import ATTENTION  # noqa: E402
from nanoseek import checkpoint  # noqa: E402
from nanoseek.estimate import architecture, cache_line  # noqa: E402
from nanoseek.insight import (LIKELY, distinct, favourites, in_a_line, likely_name, look_at,
                              visible, write)  # noqa: E402
from nanoseek.space import write_space  # noqa: E402
from nanoseek.speculate import Drafts  # noqa: E402
from nanoseek.tokenizer import decode, encode  # noqa: E402

COLOURS = ('#4477aa', '#ee6677', '#228833', '#ccbb44', '#66ccee', '#aa3377', '#999999', '#ee8866')
CSS = '.token, .token-container {margin: 0 !important; padding: 0 1px !important}'
ORIGINS = {True: 'an accepted draft', False: 'the model itself'}
INTRO = """# nanoseek at work
Write: the text goes on from the prompt. Click one of its tokens to see what else was likely in its
place. Change the text, and go on from there."""


@dataclass
class Settings:
    """Settings of demo.py"""
    checkpoint: str = ''            # a model's folder or Hub id; if empty the newest one under out/
    compare: str = ''               # another one, which is shown beside it
    prompt: str = 'Before we proceed'   # what the page begins with
    host: str = '127.0.0.1'         # who sees the page: this machine; 0.0.0.0: the network
    port: int | None = None         # of the page; none: the first free one from 7860 on
    space: str = ''                 # no page, but a folder that is a Hugging Face Space
    device: str = 'auto'            # auto, cpu, cuda, mps
    dtype: Literal['float32', 'bfloat16', 'float16'] = 'float32'  # of the weights and the cache


@dataclass
class Visit:
    """What a visitor sees of a model"""
    name: str = ''                  # of the checkpoint that wrote the text
    stopped: bool = False
    pieces: list = field(default_factory=list)      # the text of each token
    insight: object = None          # insight.Insight of these tokens


@lru_cache(maxsize=4)
def load(name, device, dtype):
    """-> the folder of a model, the model, its tokenizer"""
    folder = sample.find_checkpoint(name)
    return folder, *sample.load(folder, Settings(device=device, dtype=dtype))


# -------------------------------------------------------------------------------- writing


def generate(s, text, name, visit, length, temperature, top_k, seed):
    """Yields what a panel shows: the text, a line about it, the visit, and the tokens by their
    probability and by their origin"""
    visit.stopped = False
    visit.insight = None
    yield text, 'reading the prompt', visit, [], []
    try:
        yield from written(s, text, name, visit, length, temperature, top_k, seed)
    except (ValueError, OSError, RuntimeError) as e:
        problem = sample.in_words(e)
        if problem is None:
            problem = e
        yield text, f'**{problem}**', visit, [], []


def written(s, text, name, visit, length, temperature, top_k, seed):
    if None in (length, temperature, top_k, seed):
        raise ValueError('length, temperature, top k and seed must be numbers')
    folder, model, tokenizer = load(name, s.device, s.dtype)
    ids = encode(tokenizer, text)
    note = ''
    limit = model.config.max_position_embeddings - 1
    if len(ids) > limit:
        note = f'; of {len(ids):,} tokens it read the last {limit:,}, which are its context'
    prompt = ids[-limit:]
    sample.check_prompt(prompt, folder, model.config)
    stop = sample.stop_ids(sample.Settings(), folder, model, tokenizer)
    drafts = Drafts()
    origins = [None] * len(ids)
    began = time.perf_counter()
    shown = began
    if top_k == 0:
        top_k = None
    for token, was_drafted in write(model, prompt, length, temperature, top_k, seed, drafts):
        if visit.stopped or token in stop:
            break
        ids.append(token)
        origins.append(ORIGINS[was_drafted])
        if time.perf_counter() - shown > 0.1:
            yield decode(tokenizer, ids), 'writing', visit, [], []
            shown = time.perf_counter()
    count = len(origins) - origins.count(None)
    speed = count / (time.perf_counter() - began)
    line = f'{count} tokens, {speed:.0f} a second'
    if drafts.made > 0:
        line += f'; {drafts.accepted} of {drafts.made} drafts accepted'
    line += f'; {cache_line(ATTENTION, model.config, model.head.dtype)}{note}'

    read = ids[-limit - 1:]
    visit.name = name
    visit.pieces = [decode(tokenizer, [token]) for token in read]
    visit.insight = look_at(model, read)
    pieces = [visible(piece) for piece in visit.pieces]
    likely = [likely_name(p) for p in visit.insight.probability]
    yield (decode(tokenizer, ids), line, visit, list(zip(pieces, likely)),
           list(zip(pieces, origins[-limit - 1:])))


def end(visit):
    visit.stopped = True


# ------------------------------------------------------------------------------- the page


def build(s, gr):
    with gr.Blocks(title='nanoseek', analytics_enabled=False) as page:
        gr.Markdown(INTRO)
        with gr.Row():
            prompt = gr.Textbox(s.prompt, label='Prompt', lines=3, scale=3, elem_id='prompt')
            with gr.Column(scale=1, min_width=240):
                start = gr.Button('Write', variant='primary', elem_id='write')
                with gr.Row():
                    go_on = gr.Button('Go on', min_width=80, elem_id='go-on')
                    stop = gr.Button('Stop', min_width=80, elem_id='stop')
        with gr.Row():
            settings = [
                gr.Slider(1, 1000, 200, step=1, label='Length', info='tokens', min_width=150),
                gr.Slider(0, 2, 0.8, step=0.05, label='Temperature', info='0: the likeliest',
                          min_width=150),
                gr.Slider(0, 200, 50, step=1, label='Top k', info='0: all', min_width=150),
                gr.Number(1337, label='Seed', precision=0, minimum=0, min_width=100),
            ]
        with gr.Row():
            names = [s.checkpoint]
            if s.compare:
                names.append(s.compare)
            for name, key in zip(names, 'ab'):
                with gr.Column(min_width=330):
                    add_panel(s, gr, name, key, prompt, settings, start, go_on, stop)
    return page


def add_panel(s, gr, name, key, prompt, settings, start, go_on, stop):
    """A model on the page. key: a letter in the names of its elements"""
    folder, model, _ = load(name, s.device, s.dtype)
    others = [str(other) for other in checkpoint.checkpoints(Path(folder).parent)]
    visit = gr.State(Visit())
    chosen = gr.Dropdown(sorted({str(folder), *others}), value=str(folder), label='Checkpoint',
                         info=architecture(model.config), elem_id=f'checkpoint-{key}')
    text = gr.Textbox('', label='Text', lines=6, max_lines=14, elem_id=f'text-{key}')
    said = gr.Markdown('', elem_id=f'said-{key}')
    colours = {name: colour for _, name, colour in LIKELY}
    tokens = highlighted(gr, 'How likely each token was', colours, f'tokens-{key}')
    instead = gr.Label(label='Likely in its place', visible=False, elem_id=f'instead-{key}')
    colours = {ORIGINS[True]: '#8fd19e', ORIGINS[False]: '#e8e8e8'}
    drafted = highlighted(gr, 'Who wrote it', colours, f'drafted-{key}', model.can_draft)
    writing = []
    for button, source in ((start, prompt), (go_on, text)):
        writing.append(button.click(partial(generate, s), [source, chosen, visit, *settings],
                                    [text, said, visit, tokens, drafted], concurrency_limit=8))
    stop.click(end, visit)

    def show_instead(visit, event: gr.SelectData):
        _, _, tokenizer = load(visit.name, s.device, s.dtype)
        found = {}
        for token, p in visit.insight.likeliest[event.index]:
            found[distinct(decode(tokenizer, [token]), token, found)] = p
        return gr.Label(found, visible=bool(found))

    tokens.select(show_instead, visit, instead)
    layers = [i for i in range(model.config.num_hidden_layers) if model.model.layers[i].is_moe]
    if layers:
        add_experts(gr, key, visit, layers, model.config.n_routed_experts, writing)


def add_experts(gr, key, visit, layers, count, writing):
    """What a panel shows of the experts. layers: the numbers of those that have any; count: of a
    layer's experts; writing: the events behind which there is something new"""
    layer = gr.Radio(layers, value=layers[-1], label='Experts of layer', elem_id=f'layer-{key}')
    colours = {f'expert {e}': COLOURS[e % len(COLOURS)] for e in range(count)}
    first = highlighted(gr, 'The expert with the largest weight', colours, f'experts-{key}')
    table = gr.Dataframe(headers=['expert', 'load', 'favourite tokens'], wrap=True,
                         label='Load of each expert over the ideal')

    def show(visit, layer):
        if visit.insight is None:
            return [], []
        number = layers.index(layer)
        experts = visit.insight.experts[number]
        load = visit.insight.load[number]
        names = [f'expert {first}' for first, *_ in experts]
        parts = list(zip(map(visible, visit.pieces), names))
        rows = []
        for expert, liked in enumerate(favourites(visit.pieces, experts, count)):
            likes = '  '.join(in_a_line(piece) for piece in liked)
            rows.append([expert, f'{load[expert] * count:.2f}', likes])
        return parts, rows

    layer.change(show, [visit, layer], [first, table])
    for event in writing:
        event.then(show, [visit, layer], [first, table])


def highlighted(gr, label, colours, name, visible=True):
    return gr.HighlightedText([], label=label, color_map=colours, show_legend=True, elem_id=name,
                              show_inline_category=False, visible=visible)


def main(s):
    try:
        import gradio as gr
    except ImportError as e:
        raise ValueError(f'demo.py needs gradio ({e}): pip install gradio') from e
    folder, model, _ = load(s.checkpoint, s.device, s.dtype)    # so that mistakes end it here
    about = architecture(model.config)
    print(f'{folder}: {about}')
    if s.space:
        write_space(s.space, folder, s.checkpoint, about, gr.__version__)
        print(f'{s.space}: upload it as a Space, or run python app.py there')
        return
    theme = gr.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['monospace'])
    build(s, gr).launch(server_name=s.host, server_port=s.port, theme=theme, css=CSS,
                        footer_links=[])


if __name__ == '__main__':
    with config.user_errors():
        settings, = config.load(Settings, usage=__doc__)
        main(Settings(**settings))
