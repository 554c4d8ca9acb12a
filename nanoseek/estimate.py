"""What a model costs, before it is trained: its parameters, FLOPs and memory, in numbers and words.

Where a model has to be made, model_class (model.Transformer) is what makes it from a Config."""
import math
import weakref
from dataclasses import replace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanoseek.hf import architecture_class
from nanoseek.optim import make_optimizer

PARTS = {       # a part of a parameter's name -> its kind; the first one that is found counts
    'norm': 'norms',
    'self_attn': 'attention',
    'experts': 'moe',
    'mlp.gate.': 'moe',
    'mlp.': 'mlp',
    'eh_proj': 'mtp',
    '': 'embedding',
}
KINDS = ('attention', 'moe', 'mlp', 'embedding', 'norms', 'mtp')
OPTIMIZERS = {'adamw': 'AdamW', 'muon': 'Muon'}


def parameter_table(model):
    """-> {kind: number of parameters}, with total, and active: those that one token meets"""
    c = model.config
    table = dict.fromkeys(('total', 'active', *PARTS.values()), 0)
    for name, p in model.named_parameters():
        kind = next(kind for part, kind in PARTS.items() if part in name)
        active = p.numel()
        if '.experts.' in name:
            active = round(p.numel() * c.num_experts_per_tok / c.n_routed_experts)
        table[kind] += p.numel()
        table['total'] += p.numel()
        table['active'] += active
    return table


def flops_per_token(model, T):
    """FLOPs per token of a training step at context T, attention counted as if it were not causal
    (the PaLM convention)"""
    c = model.config
    table = parameter_table(model)
    heads = model.head.numel() * (1 + c.num_nextn_predict_layers)
    weights = table['active'] - table['norms'] - table['embedding'] + heads
    if c.attention == 'gqa':
        attention = 4 * c.head_dim * T
    elif c.attention == 'mla':
        attention = 2 * T * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    else:           # linear: within its chunk of 64, and with the state that it carries on
        chunk = min(64, T) * (2 * c.head_dim + 1)
        state = 2 * c.head_dim * (c.head_dim + 1)
        attention = 2 * (chunk + state)
    return 6 * weights + 3 * len(model.model.layers) * c.num_attention_heads * attention


# ------------------------------------------------------------------------ memory


class Live(TorchDispatchMode):
    """Within it, now and peak are the bytes of the tensors that exist, each storage counted once"""

    def __init__(self, *tensors):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.known = set()
        self.add(tensors)

    def add(self, tensors):
        for t in tree_leaves(tensors):
            if isinstance(t, torch.Tensor):
                self.add_storage(t.untyped_storage())
        self.peak = max(self.peak, self.now)
        return tensors

    def add_storage(self, storage):
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())

    def free(self, key, size):
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if kwargs is None:
            kwargs = {}
        return self.add(func(*args, **kwargs))


def same_for_all_experts(x, weight, ends):
    """The shapes of a grouped matmul, without the numbers of rows, which a fake tensor has not"""
    return F.linear(x, weight[0])


def memory_estimate(model_class, c, s, dtype, device_type):
    """-> bytes of weights, gradients and the optimizer's state; bytes that a step needs beside them
    at most. Counted, not guessed: it is a step on fake tensors, which have shapes and no storage.
    On a GPU the optimizer takes the place of the activations; a CPU's heap is full of holes by
    then, so that both add up."""
    grouped = 'nanoseek.ops.grouped_linear'
    with FakeTensorMode(), patch(grouped, same_for_all_experts), torch.random.fork_rng():
        model = model_class(c).train()
        model.gradient_checkpointing = s.gradient_checkpointing
        model.doc_attention_mask = s.doc_attention_mask and bool(c.stop_ids)
        for p in model.parameters():
            p.grad = torch.empty_like(p)        # of the micro-step before
        gradients = [p.grad for p in model.parameters()]
        with Live(*model.parameters(), *model.buffers(), *gradients) as live:
            optimizer = make_optimizer(s, model, dtype)
            optimizer.step()
            states = live.now
            update = live.peak - states
            live.peak = states
            idx = torch.zeros(s.batch_size, s.block_size, dtype=torch.int64)
            with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
                _, loss = model(idx, idx)
            loss.backward()
            activations = live.peak - states
    if device_type == 'cpu':
        return states, activations + update
    return states, max(activations, update)


# ------------------------------------------------------------------------- words


def architecture(c):
    """Config -> a line for people"""
    names = {'mla': 'MLA', 'gqa': 'GQA'}
    kind = names.get(c.attention, f'{c.attention} attention')
    if c.n_routed_experts:
        kind += (f' + MoE ({c.n_shared_experts} shared, {c.num_experts_per_tok} of '
                 f'{c.n_routed_experts} routed experts of width {c.moe_intermediate_size})')
    layers = f'{c.num_hidden_layers} layers'
    if c.num_nextn_predict_layers:
        layers += f' + {c.num_nextn_predict_layers} MTP'
    return (f'{kind}, {layers}, hidden {c.hidden_size}, {c.num_attention_heads} heads, '
            f'vocabulary {c.vocab_size:,}')


def describe(model_class, c, s, memory):
    """Lines that say what the model is, its parameters, and what a training step needs; memory is
    what memory_estimate returned"""
    with torch.device('meta'):
        model = model_class(c)
    table = parameter_table(model)
    counts = [f'{kind} {table[kind]:,}' for kind in ('total', 'active', *KINDS) if table[kind]]
    mflop = flops_per_token(model, s.block_size) / 1e6
    states, activations = (n / 2**20 for n in memory)
    yield f'{architecture_class(c)}: {architecture(c)}'
    yield f'parameters: {" | ".join(counts)}'
    yield (f'a training step: {mflop:,.1f} MFLOP per token, about {states + activations:,.0f} MB: '
           f'{states:,.0f} for weights, gradients and {OPTIMIZERS[s.optimizer]}, '
           f'{activations:,.0f} for activations of {s.batch_size} x {s.block_size} tokens and '
           'temporaries')

def cache_rows(attentions, c, dtype):
    """Bytes that decoding keeps for each further token: the model's; those of a GQA with its
    key/value heads (where these are not fewer than its heads: one for up to four of them); those
    of MHA. attentions: model.ATTENTION"""
    heads = c.num_attention_heads
    width = c.head_dim
    if c.attention == 'mla':
        width = c.v_head_dim
    groups = c.num_key_value_heads
    if groups >= heads:     # MLA has no use for the setting, which may be anything there
        groups = min(g for g in range(1, heads + 1) if heads % g == 0 and heads <= 4 * g)
    gqa = replace(c, attention='gqa', num_key_value_heads=groups, head_dim=width)
    mha = replace(c, attention='gqa', num_key_value_heads=heads, head_dim=width)
    rows = []
    for name, other in ((c.attention, c), (f'gqa, {groups} key/value heads', gqa), ('mha', mha)):
        shapes = attentions[other.attention].cache_shapes
        numbers = cache_numbers(shapes(other, 2048)) - cache_numbers(shapes(other, 1024))
        layer = numbers // 1024 * dtype.itemsize
        rows.append({'attention': name, 'bytes_per_token_and_layer': layer,
                     'bytes_per_token': layer * c.num_hidden_layers})
    return rows


def cache_numbers(shapes):
    return sum(math.prod(shape) for shape in shapes)


def cache_line(attentions, c, dtype):
    """cache_rows in words"""
    own, gqa, mha = (f'{row["bytes_per_token"]:,}' for row in cache_rows(attentions, c, dtype))
    return f'cache: {own} bytes a token, as GQA {gqa}, as MHA {mha}'
