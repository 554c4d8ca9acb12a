"""Speculative decoding with a model's own MTP layers: they draft, the model checks all drafts in
one pass, and what comes out is distributed as if there had been no drafts.

References
  [1] DeepSeek-V3 Technical Report, arXiv 2412.19437v2, section 2.2: the chain of MTP layers
  [2] Fast Inference from Transformers via Speculative Decoding, arXiv 2211.17192, algorithm 1

Dims: B sequences, R rows of a pass, n drafts, D hidden size, V vocabulary
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanoseek import ops


@dataclass
class Drafts:
    """Counts of what was drafted, and of what was accepted"""
    made: int = 0
    accepted: int = 0

    @property
    def share(self):
        """Of the drafts that were accepted"""
        return self.accepted / max(self.made, 1)


class Drafter:
    """The MTP layers while text is generated, each with a cache. Depth k sees at position i the
    state of depth k - 1 there and token t_{i+k}, and guesses t_{i+k+1}. A cache keeps only what was
    made from confirmed tokens."""

    def __init__(self, model, make_cache):
        """make_cache(layers) -> a Cache of so many layers"""
        self.model = model
        depths = model.config.num_nextn_predict_layers
        self.caches = [make_cache(1) for _ in range(depths)]
        self.carried = [None] * depths              # the state of the last confirmed position

    def draft(self, h, after, count, pick):
        """h (B, R, D): the model's states of newly confirmed positions; after (B, R): the token
        behind each -> count drafts (B, count), and for each what pick says of it"""
        tokens = after
        notes = []
        start = self.caches[0].length               # the position of h's first row
        above = None                                # what the depth above had carried until now
        for k, cache in enumerate(self.caches[:count]):
            if cache.length < start:                # one position less is confirmed than above
                h = torch.cat((above, h), 1)
                start -= 1
            rows = h.shape[1]
            h, _ = self.model.mtp(k + 1, h, own(tokens[:, -rows:]), cache)          # (B, R, D)
            confirmed = max(rows - k, 0)            # the last k rows have drafts for tokens
            above = self.carried[k]
            if confirmed > 0:
                self.carried[k] = h[:, confirmed - 1:confirmed]
            cache.length += confirmed
            logits = F.linear(h[:, -1], self.model.head).float()                    # (B, V)
            token, note = pick(logits)
            tokens = torch.cat((tokens, token), 1)
            notes.append(note)
        return tokens[:, after.shape[1]:], notes


def stream(model, make_cache, idx, max_new_tokens, size, temperature, top_k, top_p, drafted):
    """model.stream with drafts: idx (B, T) -> yields the next tokens (B, 1). make_cache(layers) ->
    a Cache of size tokens; drafted: Drafts, which this counts"""
    rules = temperature, top_k, top_p

    def pick(logits):
        return choose(logits, *rules)

    cache = None
    left = max_new_tokens
    while left > 0:
        if cache is None or cache.length == size:   # at the start, and when the context is full
            kept = idx
            if cache is not None:
                kept = idx[:, -(size + 1) // 2:]
            cache = make_cache(model.config.num_hidden_layers)
            drafter = Drafter(model, make_cache)
            fresh = kept                            # (B, R), confirmed and not in the cache
            drafts = fresh[:, :0]                   # (B, n)
            notes = []

        rows = torch.cat((fresh, drafts), 1)
        with ops.decoding_kernels(rows.numel()):
            h, _ = model.hidden(rows, cache)                                    # (B, R + n, D)
            n = drafts.shape[1]
            logits = F.linear(h[:, -(n + 1):], model.head).float()              # (B, n + 1, V)
        accepted, token = check(logits, drafts, notes, *rules)
        new = torch.cat((drafts[:, :accepted], token), 1)
        cache.length -= n - accepted                # nothing of a rejected draft stays
        drafted.made += n
        drafted.accepted += accepted
        idx = torch.cat((idx, new), 1)
        for i in range(new.shape[1]):
            yield new[:, i:i + 1]
        left -= new.shape[1]

        depth = model.config.num_nextn_predict_layers
        count = min(depth, left - 1, size - cache.length - 1)
        after = torch.cat((fresh[:, 1:], new), 1)   # the tokens behind the confirmed states
        h = own(h[:, :h.shape[1] - (n - accepted)])
        fresh = token
        drafts = fresh[:, :0]
        notes = []
        if count > 0:
            with ops.decoding_kernels(h.shape[0] * h.shape[1]):
                drafts, notes = drafter.draft(h, after, count, pick)


def own(x):
    """A slice in memory of its own: torch.compile looks at what a tensor is a slice of, and would
    compile again"""
    return x.clone(memory_format=torch.contiguous_format)


def choose(logits, temperature, top_k, top_p):
    """logits (B, V) -> tokens (B, 1), and the probabilities (B, V) by which they were drawn; None
    at temperature 0, where it is the likeliest"""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True), None
    p = probabilities(logits, temperature, top_k, top_p)
    return p.multinomial(1), p


def probabilities(logits, temperature, top_k=None, top_p=None):
    """logits (..., V) -> what sampling draws from: the softmax at a temperature, of the top_k
    likeliest and of the fewest that make up the probability top_p"""
    logits, ids = likeliest(logits, temperature, top_k, top_p)
    p = logits.softmax(-1)
    return torch.zeros_like(p).scatter(-1, ids, p)


def likeliest(logits, temperature, top_k=None, top_p=None):
    """logits (..., V) -> the same at a temperature, the likeliest first, with -inf for what is not
    drawn from; and their tokens"""
    logits, ids = (logits / temperature).sort(-1, descending=True)
    if top_k is not None:
        logits[..., top_k:] = -math.inf
    if top_p is not None:
        p = logits.softmax(-1)
        before = p.cumsum(-1) - p                     # how much the likelier ones make up
        logits[before >= max(top_p, 1e-9)] = -math.inf
    return logits, ids


def check(logits, drafts, notes, temperature, top_k, top_p):
    """logits (B, n + 1, V) behind the last confirmed token and behind each draft (B, n); notes: the
    probabilities by which each draft was drawn -> how many drafts are accepted, in all sequences
    alike, and the token (B, 1) behind them"""
    n = drafts.shape[1]
    if temperature == 0:
        best = logits.argmax(-1)                                                # (B, n + 1)
        good = best[:, :n] == drafts
    else:
        p = probabilities(logits, temperature, top_k, top_p)                    # (B, n + 1, V)
        good = torch.zeros_like(drafts, dtype=torch.bool)
        for i, q in enumerate(notes):
            draft = drafts[:, i:i + 1]
            ratio = p[:, i].gather(1, draft) / q.gather(1, draft)               # (B, 1)
            good[:, i:i + 1] = torch.rand_like(ratio) < ratio
    leading = good.long().cumprod(1).sum(1)                                     # (B,)
    accepted = int(leading.min()) if n else 0
    if temperature == 0:
        return accepted, best[:, accepted:accepted + 1]
    token = p[:, accepted]
    if accepted < n:
        # [2]: a rejected draft's place is taken by what it came too seldom for
        rest = (p[:, accepted] - notes[accepted]).clamp(min=0)                  # (B, V)
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p[:, accepted])
        token = torch.where((leading > accepted)[:, None],
                            F.one_hot(drafts[:, accepted], p.shape[-1]).to(p.dtype), rest)
    return accepted, token.multinomial(1)
