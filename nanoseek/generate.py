"""Decoding: the cache, sampling, and drafts by a model's own MTP layer.

The first MTP layer drafts one token ahead, and the model checks the draft in its next pass. The
result is distributed exactly as if there were no drafts; plain decoding is the same loop without.

References
  [1] DeepSeek-V3 Technical Report, arXiv 2412.19437v2, section 2.2: multi-token prediction
  [2] Fast Inference from Transformers via Speculative Decoding, arXiv 2211.17192, algorithm 1

Dims: B sequences, T tokens, R rows of a pass, n drafts (0 or 1), D hidden size, V vocabulary
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanoseek import ops


class Cache:
    """What decoding keeps of the past: for each layer, buffers of a fixed size in the shapes that
    its attention names in cache_shapes."""
    def __init__(self, model, rows, size, layers=None):
        """rows: sequences. size: tokens that fit. layers: their number, by default all."""
        attention = model.model.layers[0].self_attn
        head = model.head
        self.length = 0
        self.layers = []
        for _ in range(layers or model.config.num_hidden_layers):
            shapes = attention.cache_shapes(model.config, size)
            self.layers.append([torch.zeros(rows, *shape, dtype=ops.compute_dtype(head),
                                            device=head.device) for shape in shapes])

    def extend(self, layer, *new):
        """Append each of new (..., T, d) to a layer's buffers. Return all of them (..., S, d)."""
        end = self.length + new[0].shape[-2]
        for buffer, x in zip(self.layers[layer], new):
            buffer[..., self.length:end, :] = x
        return [buffer[..., :end, :] for buffer in self.layers[layer]]


@dataclass
class Sampling:
    temperature: float = 0.0        # 0: always the likeliest
    top_k: int | None = None        # only among the k likeliest
    top_p: float | None = None      # only among the fewest that make up this probability


def likeliest(logits, sampling):
    """Sort logits (..., V) / temperature. Return them with -inf for tokens that are ruled out,
    and their ids (..., V)."""
    logits, ids = (logits / sampling.temperature).sort(-1, descending=True)
    if sampling.top_k is not None:
        logits[..., sampling.top_k:] = -math.inf
    if sampling.top_p is not None:
        p = logits.softmax(-1)
        before = p.cumsum(-1) - p                   # the probability of all likelier tokens
        logits[before >= max(sampling.top_p, 1e-9)] = -math.inf
    return logits, ids


def sample(logits, sampling):
    """Choose the next tokens (B, 1) from logits (B, V)."""
    if sampling.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits, ids = likeliest(logits, sampling)
    return ids.gather(1, logits.softmax(-1).multinomial(1))


def probabilities(logits, sampling):
    """Return the distribution (..., V) that sampling draws from."""
    if sampling.temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits, ids = likeliest(logits, sampling)
    p = logits.softmax(-1)
    return torch.zeros_like(p).scatter(-1, ids, p)


@dataclass
class Drafts:
    """Counts the drafts of a generation."""
    made: int = 0
    accepted: int = 0

    @property
    def share(self):
        return self.accepted / max(self.made, 1)


def check(logits, draft, q, sampling):
    """Compare a draft (B, 1), drawn from q, with the model's logits (B, 2, V): in its place and
    behind it. Return 1 if every sequence accepts it, else 0, and the next token (B, 1)."""
    p = probabilities(logits, sampling)                                              # (B, 2, V)
    ratio = p[:, 0].gather(1, draft) / q.gather(1, draft)                               # (B, 1)
    accepts = torch.rand_like(ratio) < ratio
    if accepts.all():
        return 1, p[:, 1].multinomial(1)
    # [2]: a rejected draft is replaced by a token that drafts propose too rarely
    rest = (p[:, 0] - q).clamp(min=0)                                                   # (B, V)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p[:, 0])
    return 0, torch.where(accepts, draft, rest.multinomial(1))


@torch.no_grad()
def stream(model, idx, max_new_tokens, sampling, drafts=None):
    """Yield the next tokens (B, 1) after idx (B, T), max_new_tokens times. When the context is
    full, the last half of it is kept. drafts: a Drafts that counts; None for plain decoding."""
    size = min(idx.shape[1] + max_new_tokens, model.config.max_position_embeddings)
    drafting = drafts is not None and model.can_draft
    cache = None
    q = None                                        # what a draft was drawn from
    left = max_new_tokens
    while left > 0:
        if cache is None or cache.length == size:   # at the start, and when the context is full
            fresh = idx                             # (B, R), confirmed and not in the cache
            if cache is not None:
                fresh = idx[:, -(size + 1) // 2:]
            cache = Cache(model, len(idx), size + 1)                                # never full
            mtp_cache = Cache(model, len(idx), size + 1, layers=1)
            draft = fresh[:, :0]                    # (B, n)

        n = draft.shape[1]
        h = states(model, 'hidden', torch.cat((fresh, draft), 1), cache)          # (B, R + n, D)
        logits = logits_of(model, h[:, -(n + 1):])                                # (B, n + 1, V)
        if n == 0:
            accepted = 0
            token = sample(logits[:, 0], sampling)
        else:
            accepted, token = check(logits, draft, q, sampling)
            cache.length -= 1 - accepted            # a rejected draft leaves no trace
            drafts.made += 1
            drafts.accepted += accepted
        new = torch.cat((draft[:, :accepted], token), 1)
        idx = torch.cat((idx, new), 1)
        yield from new.split(1, 1)
        left -= new.shape[1]

        after = contiguous(torch.cat((fresh[:, 1:], new), 1))   # behind each confirmed state
        fresh = token
        draft = token[:, :0]
        if drafting and left > 1 and cache.length + 1 < size:
            h = contiguous(h[:, :after.shape[1]])
            h = states(model, 'mtp', 1, h, after, mtp_cache)                           # (B, R, D)
            mtp_cache.length += after.shape[1]
            q = probabilities(logits_of(model, h[:, -1:])[:, 0], sampling)
            draft = q.multinomial(1)


def generate(model, idx, max_new_tokens, sampling, stop, drafts=None):
    """Return idx (B, T) with up to max_new_tokens more tokens (B, T + new). It ends early when
    every row has reached an id of stop (one, several or None), which the row then repeats."""
    if stop is None or isinstance(stop, int):
        stop = [stop]
    stops = [i for i in stop if i is not None]
    out = idx
    last = torch.full_like(idx[:, :1], -1)          # (B, 1), the row's stop token once it came
    for new in stream(model, idx, max_new_tokens, sampling, drafts):
        new = torch.where(last >= 0, last, new)
        out = torch.cat((out, new), 1)
        stopped = torch.isin(new, new.new_tensor(stops))
        last = torch.where(stopped, new, last)
        if stopped.all():
            break
    return out


def states(model, name, *args):
    """Return the states (B, R, D) that model.hidden(idx, cache) or model.mtp(k, h, tokens, cache)
    makes, by compiled code if there is some for so few tokens."""
    tokens, cache = args[-2:]
    function = getattr(model, name)
    if tokens.shape[1] <= model.compiled_tokens and cache.length > 1:
        function = model.compiled[name]
    with ops.decoding_kernels(tokens.numel()):
        return function(*args)[0]


def logits_of(model, h):
    """states (B, R, D) -> logits (B, R, V) float32"""
    with ops.decoding_kernels(h.shape[0] * h.shape[1]):
        return F.linear(h, model.head).float()


@torch.no_grad()
def compile_decoding(model, drafts=None):
    """Compile the passes of few tokens, once for all lengths of the cache. From now on, stream
    uses them. Return why torch.compile does not work here, or None.

    Compiled code is for good: dtype, device and mode are not checked again, because looking at
    every weight would cost half a millisecond a token. drafts: None if the MTP layers do not draft
    """
    no_checks = {'guard_filter_fn': torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    for name in ('hidden', 'mtp'):
        model.compiled[name] = torch.compile(getattr(model, name), dynamic=True, fullgraph=True,
                                             options=no_checks)
    model.compiled_tokens = 1 if drafts is None else 2
    try:
        for rows in range(1, model.compiled_tokens + 1):    # now, so that problems show here
            idx = torch.zeros(1, rows, dtype=torch.int64, device=model.head.device)
            h = states(model, 'hidden', idx, filled_cache(model))
            if drafts is not None:
                states(model, 'mtp', 1, h, idx, filled_cache(model, layers=1))
    except Exception as e:
        model.compiled_tokens = 0
        return f'torch.compile does not work here ({" ".join(str(e).split())[:120]})'


def filled_cache(model, layers=None):
    cache = Cache(model, 1, 64, layers)
    cache.length = 2
    return cache


def contiguous(x):
    """Copy a slice: torch.compile looks at what a tensor is a slice of, and would recompile."""
    return x.clone(memory_format=torch.contiguous_format)
