"""A model at work: text as it is written, how likely each token of it was, what else was likely in
its place, and which experts each token went to.

Dims: T tokens, L layers with experts, K experts per token
"""
import threading
from dataclasses import dataclass

import torch
import torch.nn.functional as F

LIKELY = (          # a probability of at least so much, its name, the colour of such tokens
    (0.5, 'above 50%', '#2f7ebc'),
    (0.2, '20 to 50%', '#7fb6dc'),
    (0.05, '5 to 20%', '#cfe1ec'),
    (0.01, '1 to 5%', '#f6c27a'),
    (0.0, 'below 1%', '#e0694a'),
)
ROWS = 256                          # of logits at a time
TURNS = threading.Lock()            # who uses a model at the same time takes turns, token by token


@dataclass
class Insight:
    """Of each token of a text. The first one has nothing before it: its probability is nan, and
    nothing is likely in its place"""
    probability: list       # T numbers
    likeliest: list         # T lists of (token, probability), the likeliest first
    experts: list           # L lists of T lists of K experts, those of the largest weights first
    load: list              # L lists: of all choices the share that each expert got


@torch.no_grad()
def look_at(model, ids, count=5):
    """ids: T of them, at most the model's context -> Insight, with count tokens in each place.
    One pass over the whole text; probabilities are those at temperature 1"""
    chosen = []

    def note(gate, args, out):
        chosen.append(out)
    idx = torch.tensor([ids], device=model.head.device)
    with TURNS:             # what others write must not be noted
        hooks = [moe.gate.register_forward_hook(note) for moe in model.moe_layers]
        try:
            h, _ = model.hidden(idx)                                                # (1, T, D)
        finally:
            for hook in hooks:
                hook.remove()

    found = Insight([float('nan')], [[]], [], [])
    states = h[0, :-1].split(ROWS)
    following = idx[0, 1:, None].split(ROWS)
    for rows, tokens in zip(states, following):
        p = F.linear(rows, model.head).float().softmax(-1)                          # (rows, V)
        found.probability += p.gather(1, tokens)[:, 0].tolist()
        best = p.topk(min(count, p.shape[1]))
        for likely, shares in zip(best.indices.tolist(), best.values.tolist()):
            found.likeliest.append(list(zip(likely, shares)))
    for weights, layer_ids, affinity in chosen:                     # (T, K), (T, K), (T, E)
        order = weights.argsort(-1, descending=True)
        found.experts.append(layer_ids.gather(1, order).tolist())
        counts = layer_ids.flatten().bincount(minlength=affinity.shape[1])
        found.load.append((counts / counts.sum()).tolist())
    return found


def favourites(pieces, experts, count, most=6):
    """pieces: T texts of tokens; experts: T lists of a layer's experts -> of each of count experts
    the pieces that go to it more often than to the others, the most telling first"""
    times = {}              # piece -> how often each expert got it
    for piece, chosen in zip(pieces, experts):
        of_piece = times.setdefault(piece, [0] * count)
        for expert in chosen:
            of_piece[expert] += 1
    liked = []
    for expert in range(count):
        excess = {}         # by how much it got more of a piece than its equal share
        for piece, of_piece in times.items():
            excess[piece] = of_piece[expert] - sum(of_piece) / count
        best = sorted(excess, key=excess.get, reverse=True)
        liked.append([piece for piece in best[:most] if excess[piece] > 0])
    return liked


def write(model, ids, length, temperature, top_k, seed, drafts):
    """model.stream with random numbers of its own, whoever else writes at the same time (on a GPU
    these are shared). drafts: speculate.Drafts -> yields a token, and whether it was drafted"""
    with TURNS:
        torch.manual_seed(seed)
        random = torch.get_rng_state()
    prompt = torch.tensor([ids], device=model.head.device)
    stream = model.stream(prompt, length, temperature, top_k, drafts=drafts)
    drafted = 0             # so many of the tokens that come were drafts
    while True:
        with TURNS:
            torch.set_rng_state(random)
            before = drafts.accepted
            token = next(stream, None)
            random = torch.get_rng_state()
        if token is None:
            return
        drafted += drafts.accepted - before
        yield token.item(), drafted > 0
        drafted = max(drafted - 1, 0)


def visible(piece):
    """A token's text, in which a line break can be seen and clicked"""
    return piece.replace('\n', '⏎\n')


def in_a_line(piece):
    return visible(piece).replace('\n', '').replace(' ', '␣')


def distinct(piece, token, others):
    """A token's text in a line, with its number where that is empty or among others, as those of
    parts of characters are"""
    piece = in_a_line(piece)
    if not piece or piece in others:
        piece += f' ({token})'
    return piece


def likely_name(probability):
    for least, name, _ in LIKELY:
        if probability >= least:
            return name
    return None                     # the first token's, which is nan
