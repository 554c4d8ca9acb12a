"""What a model costs, computed before it is trained: parameters, FLOPs and memory."""
import itertools
import math
from bisect import bisect

import torch
from torch import nn

from model import ATTENTION, LinearAttention, Transformer
from nanoseek import ops
from nanoseek.hf import architecture_class
from nanoseek.optim import parameter_groups

PARTS = {       # a part of a parameter's name -> its kind; the first match counts
    'norm': 'norms', 'self_attn': 'attention', 'layers': 'experts and MLPs', '': 'embedding'}
CPU_HEAP = 1.5              # bytes of glibc's heap for a byte that autograd keeps, measured
CPU_KERNELS = 48 * 2**20    # bytes of the bfloat16 kernels that oneDNN compiles, measured
EXPERT_KERNELS = 13 * 2**20  # and for each expert, as its number of rows varies
KINDS = ('total', 'active', *PARTS.values())


def on_meta(c):
    """Return a model whose tensors have no values."""
    with torch.device('meta'):
        return Transformer(c)


def parameter_table(model):
    """Return {kind: number of parameters}; active: those that one token uses."""
    c = model.config
    table = dict.fromkeys(KINDS, 0)
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
    """Return the FLOPs per token of a training step at context T. Attention counts as if it were
    not causal, as in the PaLM paper."""
    c = model.config
    table = parameter_table(model)
    heads = model.head.numel() * (1 + c.num_nextn_predict_layers)
    weights = table['active'] - table['norms'] - table['embedding'] + heads
    attention = 4 * c.head_dim * T
    if c.attention == 'mla':
        attention = 2 * T * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    elif c.attention == 'linear':   # within a chunk, and with the state that it passes on
        chunk = min(LinearAttention.CHUNK, T) * (2 * c.head_dim + 1)
        state = 2 * c.head_dim * (c.head_dim + 1)
        attention = 2 * (chunk + state)
    return 6 * weights + 3 * len(model.model.layers) * c.num_attention_heads * attention


def memory_estimate(model, s, dtype, device_type):
    """Return the bytes of weights, gradients and moments, and what a step needs on top of them:
    the peak of activations and temporaries. docs/devices.md has how close this comes."""
    c = model.config
    states = update = 0
    for group in parameter_groups(model, s):
        count = sum(p.numel() for p in group['params'])
        states += 16 * count            # weight, gradient and two moments, in float32
        if group['rows']:               # Muon: one moment, and it moves matrices in stacks
            states -= 4 * count
            update = max(update, 14 * min(count, 2**26))

    tokens = s.batch_size * s.block_size
    stream = 4 * tokens * c.hidden_size                     # what passes between layers
    heap = CPU_HEAP if device_type == 'cpu' else 1
    kept = [heap * kept_bytes(layer, c, s, dtype, device_type) for layer in model.model.layers]
    gradient = 4 * model.head.numel() * (1 + c.num_nextn_predict_layers)
    rows = min(max(ops.LOGITS_OF_A_CHUNK // c.vocab_size, 256), tokens)
    loss = gradient + 8 * rows * c.vocab_size               # logits and their log-softmax
    activations = sum(kept) + loss
    if s.gradient_checkpointing:        # each layer's input, and all of one layer at a time
        linears = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
        copies = 2 * (dtype != torch.float32) * sum(m.weight.numel() for m in linears)
        activations = len(kept) * stream + max(copies + loss, max(kept) + gradient)
    activations += 3 * stream           # the final norm, the gradient on its way back
    if device_type != 'cpu':            # the update reuses the activations' memory
        return states, max(activations, update)
    if dtype != torch.float32:
        activations += CPU_KERNELS
        if tokens * c.num_experts_per_tok > 64 * c.n_routed_experts:    # see ops.rows_multiple
            activations += EXPERT_KERNELS * c.n_routed_experts
    return states, activations + update


def kept_bytes(layer, c, s, dtype, device_type):
    """Return the bytes that autograd keeps of a layer's forward pass: each norm's input, raw
    and normalized, and inputs and outputs of linear layers. In float32, linear layers behind
    a norm share their input. In other dtypes, autocast copies it, and the weights, for each."""
    T = s.block_size
    tokens = s.batch_size * T
    low = dtype != torch.float32
    floats = numbers = weights = 0      # per token in float32, per token in dtype, in dtype
    for name, module in layer.named_modules():
        if isinstance(module, nn.RMSNorm):
            floats += (3 - low) * module.weight.numel()
        elif isinstance(module, nn.Linear):
            weights += low * module.weight.numel()
            if name.endswith(('o_proj', 'down_proj')):      # the input, and what it came from
                numbers += 2 * module.in_features
            else:
                numbers += module.out_features + low * module.in_features
    if c.attention == 'linear':
        floats += c.num_attention_heads * (3 * c.head_dim + min(LinearAttention.CHUNK, T))
    elif device_type == 'cpu' and T <= ops.SHORT_CONTEXT:   # the softmax, in blocks
        numbers += c.num_attention_heads * (T + min(ops.QUERIES_OF_A_BLOCK, T)) / 2
    if c.dropout:
        numbers += 2 * c.hidden_size                        # masks
    if layer.is_moe:
        rows = tokens * c.num_experts_per_tok
        if device_type == 'cpu' and rows > 64 * c.n_routed_experts:     # ops.rows_multiple's gaps
            rows += max(64 * c.n_routed_experts, rows / 8)
        numbers += rows / tokens * (c.hidden_size + 6 * c.moe_intermediate_size)
        floats += low * c.hidden_size                       # the router's input
        weights += low * sum(p.numel() for p in layer.mlp.experts.parameters())
    return tokens * (4 * floats + dtype.itemsize * numbers) + dtype.itemsize * weights


def rank_memory(model, s, dist):
    """Return the bytes of one rank at its peak: with FSDP its shard of the states, activations, two
    whole layers, embedding and head, and on a CPU the weights and moments of a checkpoint."""
    states, activations = memory_estimate(model, s, dist.dtype, dist.device.type)
    if not dist.sharded:
        return states + activations
    layer = max(sum(p.numel() for p in layer.parameters()) for layer in model.model.layers)
    ends = model.head.numel() * (2 - model.config.tie_word_embeddings)
    whole = (dist.dtype.itemsize + 4) * (2 * layer + ends)  # with gradients
    if dist.device.type == 'cpu':
        states += states - 4 * parameter_table(model)['total']
    return states / dist.world + activations + whole


def fit(s, c, dist):
    """Choose batch_size and gradient_checkpointing if batch_size=0; dist.sharded if auto.
    Return memory_estimate's numbers, and a line about the choice.

    The first choice that fits wins: a whole model, else shards; without gradient checkpointing,
    else with it; the largest micro-batch that divides the rank's share of a step. ValueError if
    nothing fits, except with --max_steps=0, which shows how much is missing.
    """
    automatic = s.batch_size == 0
    sizes = [s.batch_size]
    checkpointing = [s.gradient_checkpointing]
    if automatic:
        share = s.global_batch_size // dist.world
        sizes = [size for size in range(1, share + 1) if share % size == 0]
        checkpointing = sorted({s.gradient_checkpointing, True})

    model = on_meta(c)

    def need(size):
        s.batch_size = size
        return rank_memory(model, s, dist)

    for choice in itertools.product(dist.shardings, checkpointing):
        dist.sharded, s.gradient_checkpointing = choice
        fitting = bisect(sizes, 0.9 * dist.limit, key=need)
        if fitting:
            break
    megabytes = need(sizes[max(fitting - 1, 0)]) / 2**20
    memory = memory_estimate(model, s, dist.dtype, dist.device.type)
    if automatic:                       # eval_steps counted global batches until here
        s.eval_steps *= s.global_batch_size // s.batch_size
    line = (f'{s.batch_size} x {s.block_size} tokens need about {megabytes:,.0f} MB of the '
            f'{dist.limit / 2**20:,.0f} MB that {dist.device} has for a rank, with '
            f'gradient_checkpointing={s.gradient_checkpointing}, fsdp={dist.sharded}')
    if not fitting:
        line += ': try a smaller --block_size, --gradient_checkpointing=true or --parallel=fsdp'
        if automatic and s.max_steps:
            raise ValueError(line)
        return memory, f'this may not fit: {line}'
    return memory, line


def architecture(c):
    """Return a Config in one line."""
    kind = {'mla': 'MLA', 'gqa': 'GQA'}.get(c.attention, f'{c.attention} attention')
    if c.n_routed_experts:
        kind += (f' + MoE ({c.n_shared_experts} shared, {c.num_experts_per_tok} of '
                 f'{c.n_routed_experts} routed experts of width {c.moe_intermediate_size})')
    layers = f'{c.num_hidden_layers} layers'
    if c.num_nextn_predict_layers:
        layers += f' + {c.num_nextn_predict_layers} MTP'
    return (f'{kind}, {layers}, hidden {c.hidden_size}, {c.num_attention_heads} heads, '
            f'vocabulary {c.vocab_size:,}')


def describe(c, s, memory):
    """Return three lines: the architecture, its parameters, what a training step needs."""
    model = on_meta(c)
    counts = [f'{kind} {count:,}' for kind, count in parameter_table(model).items() if count]
    mflop = flops_per_token(model, s.block_size) / 1e6
    states, activations = (size / 2**20 for size in memory)
    return [f'{architecture_class(c)}: {architecture(c)}',
            f'parameters: {" | ".join(counts)}',
            f'a training step: {mflop:,.1f} MFLOP per token, about {states + activations:,.0f} MB: '
            f'{states:,.0f} for weights, gradients and {s.optimizer}, {activations:,.0f} for '
            f'activations of {s.batch_size} x {s.block_size} tokens and temporaries']


def cache_line(c, dtype):
    """Return a line: the bytes that decoding keeps of each token, and what MHA would keep."""
    width = c.v_head_dim if c.attention == 'mla' else c.head_dim
    mha = 2 * c.num_attention_heads * width
    shapes = ATTENTION[c.attention].cache_shapes
    one, two = (sum(math.prod(shape) for shape in shapes(c, size)) for size in (1, 2))
    each = c.num_hidden_layers * dtype.itemsize
    return f'cache: {each * (two - one):,} bytes a token, as MHA {each * mha:,}'
