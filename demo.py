"""A page in your browser that shows a model at work. Needs `pip install gradio`.

    python demo.py                                          # the newest checkpoint under out/
    python demo.py --checkpoint=HuggingFaceTB/SmolLM2-135M  # or whatever else sample.py loads
    GRADIO_SERVER_NAME=0.0.0.0 python demo.py               # seen by the network, not just here

Dims: T tokens, V vocabulary
"""
import os
import time
from bisect import bisect
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Literal

os.environ.setdefault('GOMP_SPINCOUNT', '10000')
os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')

import torch

import sample
from nanoseek import hf, settings
from nanoseek.cost import architecture
from nanoseek.tokenizer import decode, encode

BOUNDS = (0.01, 0.05, 0.2, 0.5)         # of the probabilities that LIKELY names
LIKELY = {'below 1%': '#e0694a', '1 to 5%': '#f6c27a', '5 to 20%': '#cfe1ec',
          '20 to 50%': '#7fb6dc', 'above 50%': '#2f7ebc'}
CSS = '.token, .token-container {margin: 0 !important; padding: 0 1px !important}'
LEGEND = {'show_legend': True, 'show_inline_category': False}


@dataclass
class Settings:
    """Settings of demo.py"""
    checkpoint: str = ''            # a model's folder or Hub id; if empty the newest one under out/
    prompt: str = 'Before we proceed'  # the prompt that the page begins with
    device: str = 'auto'            # auto, cpu, cuda, mps
    dtype: Literal['float32', 'bfloat16', 'float16'] = 'float32'  # of the weights and the cache


@torch.no_grad()
def look_at(model, tokenizer, ids):
    """Return the probabilities of all tokens but the first; the likeliest tokens in each place,
    [(piece, probability), ...]; and in each layer the expert with the largest weight (T,)."""
    idx = torch.tensor([ids], device=model.head.device)                         # (1, T)
    routing = []
    with ExitStack() as hooks:
        for moe in model.moe_layers:
            hooks.enter_context(moe.gate.register_forward_hook(
                lambda gate, inputs, output: routing.append(output)))
        h, _ = model.hidden(idx)                                                # (1, T, D)
    probabilities = []
    likeliest = [[]]
    for states, tokens in zip(h[0, :-1].split(256), idx[0, 1:, None].split(256)):
        p = (states @ model.head.T).float().softmax(-1)                         # (256, V)
        probabilities += p.gather(1, tokens)[:, 0].tolist()
        best = p.topk(5)
        for likely, shares in zip(best.indices.tolist(), best.values.tolist()):
            likeliest.append([(piece_of(tokenizer, i), p) for i, p in zip(likely, shares)])
    experts = [chosen.gather(1, weights.argmax(-1, keepdim=True))[:, 0].tolist()
               for weights, chosen, _ in routing]
    return probabilities, likeliest, experts


def piece_of(tokenizer, token):
    """Return the text of a token, with signs for line ends and for parts of characters."""
    piece = decode(tokenizer, [token]).replace('\n', '⏎\n')
    return f'({token})' if '\ufffd' in piece or not piece else piece


def write(loaded, prompt, length, temperature, top_k):
    """Return the text, a line about it, its tokens by probability, and (pieces, likeliest,
    experts). loaded: a model's folder, the model, its tokenizer."""
    folder, model, tokenizer = loaded
    try:
        ids = encode(tokenizer, prompt)
        sample.check_length(ids, model.config)
    except ValueError as e:
        return prompt, f'**{e}**', [], None
    stops = hf.stop_ids(folder, model.config)
    idx = torch.tensor([ids], device=model.head.device)                         # (1, T)
    start = time.perf_counter()
    ids = model.generate(idx, length, temperature, top_k or None, stop=stops)[0].tolist()
    count = len(ids) - idx.shape[1]
    line = f'{count} tokens, {count / (time.perf_counter() - start):.0f} a second'
    context = ids[-model.config.max_position_embeddings:]
    pieces = [piece_of(tokenizer, i) for i in context]
    probabilities, likeliest, experts = look_at(model, tokenizer, context)
    likely = [None] + [list(LIKELY)[bisect(BOUNDS, p)] for p in probabilities]
    return decode(tokenizer, ids), line, list(zip(pieces, likely)), (pieces, likeliest, experts)


def build(gr, loaded, prompt):
    """Return the page. gr: the module gradio. prompt: the one that the page begins with."""
    model = loaded[1]
    with gr.Blocks(title='nanoseek') as page:
        gr.Markdown('# nanoseek at work\nClick a token to see what else was likely in its place.')
        prompt = gr.Textbox(prompt, label='Prompt', lines=3)
        with gr.Row():
            choices = [gr.Slider(1, 1000, 200, step=1, label='Length'),
                       gr.Slider(0, 2, 0.8, step=0.05, label='Temperature'),
                       gr.Slider(0, 200, 50, step=1, label='Top k, 0: all')]
            button = gr.Button('Write', variant='primary')
        text = gr.Textbox(label='Text', info=architecture(model.config))
        line = gr.Markdown()
        insight = gr.State()                    # (pieces, likeliest, experts)
        tokens = gr.HighlightedText(label='How likely each token was', color_map=LIKELY, **LEGEND)
        instead = gr.Label(label='Likely in its place', visible=False)
        button.click(partial(write, loaded), [prompt, *choices],
                     [text, line, tokens, insight], concurrency_limit=1)

        def show_instead(insight, event: gr.SelectData):
            likeliest = reversed(insight[1][event.index])
            shares = {piece.replace(' ', '␣'): p for piece, p in likeliest}
            return gr.Label(shares, visible=bool(shares))

        tokens.select(show_instead, insight, instead)
        if not model.moe_layers:
            return page

        E = model.config.n_routed_experts
        layers = list(range(model.config.first_k_dense_replace, model.config.num_hidden_layers))
        layer = gr.Radio(layers, value=layers[-1], label='Experts of layer')
        hues = {f'expert {e}': f'hsl({137 * e} 65% 55%)' for e in range(E)}
        first = gr.HighlightedText(label='Expert with the largest weight', color_map=hues, **LEGEND)

        def show_experts(insight, layer):
            if insight is None:
                return []
            pieces, _, experts = insight
            names = [f'expert {e}' for e in experts[layers.index(layer)]]
            return list(zip(pieces, names))

        gr.on([insight.change, layer.change], show_experts, [insight, layer], first)
    return page


def main(s):
    import gradio as gr
    folder = sample.find_checkpoint(s.checkpoint)
    loaded = folder, *sample.load(folder, s)
    theme = gr.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['monospace'])
    build(gr, loaded, s.prompt).launch(theme=theme, css=CSS, footer_links=[])


if __name__ == '__main__':
    with settings.user_errors('use a smaller model or --dtype=bfloat16'):
        given, = settings.load(Settings, usage=__doc__)
        main(Settings(**given))
