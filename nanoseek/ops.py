"""Operations that have one plain meaning and a fast form.

The indented line in a docstring is the operation in plain PyTorch; tests/test_ops.py compares
both. Special cases for a device, a dtype or torch.compile are here only. Dims are model.py's.
"""
import contextlib
import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


def compute_dtype(x):
    """Return the dtype that autocast would give x, for operations that autocast does not know."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def without_autocast(x):
    """Return a context in which operations on tensors like x keep their dtype."""
    if x.is_meta:               # autocast does not know meta tensors
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def decoding_kernels(rows):
    """A context for a forward pass of so many tokens: on a CPU, oneDNN is slow for one."""
    enabled = False if rows == 1 else None      # None: unchanged
    return torch.backends.mkldnn.flags(enabled, None, None, None)


QUERIES_OF_A_BLOCK = 128
FEW_QUERIES = 8                     # a token and its drafts
SHORT_CONTEXT = 512                 # up to here, matmuls beat the fused kernel on a CPU


def attention(q, k, v, scale, mask=None):
    """Softmax attention, causal unless a mask from document_mask is given.

        (q @ k.mT * scale + mask).softmax(-1) @ v

    q (B, H, T, d), k (B, G, S, d), v (B, G, S, dv) -> (B, H, T, dv). Each key head serves H / G
    consecutive query heads. Queries are the last T of S positions: query t sees keys up to
    S - T + t. With old keys (T < S), the mask must be None.
    """
    T, d = q.shape[-2:]
    S, dv = v.shape[-2:]
    grouped = q.shape[1] != k.shape[1]
    if callable(mask):
        return mask(q, k, v, scale=scale, enable_gqa=grouped)
    if T <= FEW_QUERIES and (T == 1 or T < S) and d == dv:
        return attention_of_few_queries(q, k, v, scale)
    if T < S or (q.device.type == 'cpu' and S <= SHORT_CONTEXT):
        return attention_in_blocks(q, k, v, scale, mask)
    v = F.pad(v, (0, max(d - dv, 0)))           # flash kernels want one size for q, k and v
    y = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)
    return y[..., :dv]


def attention_of_few_queries(q, k, v, scale):
    """attention() for a few tokens: the H / G heads that share a key become queries of one head."""
    B, H, T, d = q.shape
    G, S = k.shape[1:3]
    mask = None
    if T > 1:
        mask = torch.full((T, S), -math.inf, dtype=q.dtype, device=q.device).triu(S - T + 1)
        mask = mask.repeat(H // G, 1)                                         # (H/G*T, S)
    q = q.reshape(B, G, -1, d)                                             # (B, G, H/G*T, d)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).view(B, H, T, d)


def attention_in_blocks(q, k, v, scale, mask=None):
    """attention() by matmuls: a block of queries takes only the keys that its last query sees."""
    B, H, T, d = q.shape
    G, S = k.shape[1:3]
    if mask is None:
        mask = torch.full((T, S), -math.inf, dtype=q.dtype, device=q.device).triu(S - T + 1)
    block = QUERIES_OF_A_BLOCK if T == S else T
    softmax_dtype = None if T == S else torch.float32       # costs too much in training
    q = q * scale
    outputs = []
    for i, (queries, rows_mask) in enumerate(zip(q.split(block, 2), mask.split(block, -2))):
        end = S - T + (i + 1) * block
        queries = queries.reshape(B, G, -1, d)                         # (B, G, H/G*block, d)
        scores = (queries @ k[:, :, :end].mT).view(B, H, -1, min(end, S))
        scores = scores + rows_mask[..., :end]                             # (B, H, block, end)
        weights = scores.softmax(-1, dtype=softmax_dtype).to(v.dtype).view(B, G, -1, min(end, S))
        outputs.append((weights @ v[:, :, :end]).view(B, H, -1, v.shape[-1]))
    return torch.cat(outputs, 2)                                              # (B, H, T, dv)


def document_mask(documents, dtype):
    """Return the mask that makes attention() see the past of each token's document only.

        same = documents[:, None, :, None] == documents[:, None, None, :]
        torch.where(same.tril(), 0.0, -math.inf)

    documents (B, T): the number of each token's document -> additive (B, 1, T, T) in dtype. On a
    GPU it is a FlexAttention function, which never makes the square.
    """
    if documents.is_cuda:
        return flex_document_mask(documents)
    same = documents[:, None, :, None] == documents[:, None, None, :]         # (B, 1, T, T)
    return torch.where(same.tril(), 0.0, -math.inf).to(dtype)


def flex_document_mask(documents):
    """document_mask() as a function of q, k, v that attention() calls"""
    def visible(b, h, t, s):
        return (s <= t) & (documents[b, t] == documents[b, s])

    B, T = documents.shape
    block_mask = create_block_mask(visible, B, None, T, T, documents.device)
    eager = documents.is_cuda and not torch.compiler.is_compiling()
    call = torch.compile(flex_attention) if eager else flex_attention   # eager, it makes the square
    return functools.partial(call, block_mask=block_mask)


class Dispatch(NamedTuple):
    """The N * K choices of N tokens, sorted by expert into M rows. M is N * K, or more if there are
    gaps between the experts."""
    source: torch.Tensor    # (M,) the choice in each row, token * K + k; 0 in a gap
    row: torch.Tensor       # (N, K) the row of each choice
    ends: torch.Tensor      # (E,) int32, the end of each expert's rows
    load: torch.Tensor      # (E,) how many tokens chose each expert

    def gather(self, x):
        """x (N, D) -> its rows (M, D):

            x[source // K]
        """
        return GatherRows.apply(x, self.source // self.row.shape[1], self.row)

    def gather_weights(self, weights):
        """weights (N, K) -> (M, 1), 0 in gaps:

            zeros(M).scatter(0, row.flatten(), weights.flatten())
        """
        zeros = weights.new_zeros(len(self.source))
        return zeros.scatter(0, self.row.flatten(), weights.flatten())[:, None]

    def combine(self, rows):
        """rows (M, D) -> the sum over each token's choices (N, D):

            rows[row].sum(1)
        """
        N, K = self.row.shape
        rows = GatherRows.apply(rows, self.row.flatten(), self.source[:, None])   # (N*K, D)
        return sum(rows.view(N, K, -1).unbind(1))


def sort_by_expert(ids, E):
    """ids (N, K) of the chosen experts -> Dispatch. Shapes depend on N, K and E only, so nothing
    waits for a GPU."""
    N, K = ids.shape
    expert, order = ids.flatten().sort(stable=True)                            # (N*K,) each
    ends = torch.searchsorted(expert, torch.arange(E, device=ids.device), right=True)       # (E,)
    load = ends.diff(prepend=ends.new_zeros(1))
    multiple = rows_multiple(ids, E)
    M = (N * K + E * (multiple - 1)) // multiple * multiple
    rows = (load + multiple - 1) // multiple * multiple            # (E,) load and gap of each
    row_ends = rows.cumsum(0)
    shift = row_ends - rows - (ends - load)             # (E,) how far gaps move its first row
    slot = torch.arange(N * K, device=ids.device) + shift[expert]                   # (N*K,)
    row_ends[-1] = M
    row = torch.empty_like(order).scatter_(0, order, slot)
    source = order.new_zeros(M).scatter_(0, slot, order)
    return Dispatch(source, row.view(N, K), row_ends.int(), load)


def rows_multiple(ids, E):
    """Return a number of which each expert's rows are a multiple. On a CPU, oneDNN compiles a
    matmul for every new number of rows, which takes half a millisecond and half a megabyte."""
    if ids.device.type == 'cpu' and ids.numel() > 64 * E:
        return 64 * max(ids.numel() // E // 512, 1)
    return 1


class GatherRows(torch.autograd.Function):
    """x[index]. copies (len(x), n): where each row of x went, so that the gradient is a gather too.
    Autograd's would add into rows: slow on a CPU, in no fixed order on a GPU."""
    @staticmethod
    def forward(ctx, x, index, copies):
        ctx.save_for_backward(copies)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        copies, = ctx.saved_tensors
        return sum(grad.index_select(0, places) for places in copies.unbind(1)), None, None


def grouped_linear(x, weight, ends):
    """A linear layer for each group of rows.

        torch.cat([F.linear(rows, w) for rows, w in zip(x.tensor_split(ends[:-1]), weight)])

    x (M, in) sorted by group, weight (E, out, in), ends (E,) int32: the end of each group's rows,
    M for the last -> (M, out)
    """
    aligned = all(n * x.element_size() % 16 == 0 for n in weight.shape[1:])
    known = x.device.type in ('cpu', 'cuda', 'meta')
    eager_or_bfloat16 = x.dtype == torch.bfloat16 or not torch.compiler.is_compiling()
    if aligned and known and eager_or_bfloat16:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    groups = zip(x.tensor_split(ends[:-1].cpu().long()), weight)
    return torch.cat([F.linear(rows, w) for rows, w in groups])


def few_choices(ids, E):
    """Return whether decoding goes expert by expert: faster than sorting if there are no more
    choices than experts, and if an expert's weights can be read without a copy."""
    return ids.numel() <= E and (ids.device.type == 'cpu' or torch.compiler.is_compiling())


def experts_one_by_one(x, weights, ids, gate_up_proj, down_proj):
    """The experts for a few tokens; reads the weights of the chosen experts only.

        sum(w * F.linear(F.silu(gate) * up, down_proj[e]) for each choice e, w of a token)

    x (N, D), weights and ids (N, K), gate_up_proj (E, 2I, D), down_proj (E, D, I) -> (N, D)
    """
    N, K = ids.shape
    dtype = compute_dtype(x)
    rows = x.repeat_interleave(K, 0).to(dtype)                                    # (N*K, D)
    gate, up = chosen_linear(rows, gate_up_proj, ids.flatten()).chunk(2, -1)      # (N*K, I)
    rows = F.silu(gate) * up * weights.to(dtype).view(-1, 1)
    return chosen_linear(rows, down_proj, ids.flatten()).view(N, K, -1).sum(1)


def chosen_linear(rows, weight, chosen):
    """A linear layer of its own for each row.

        torch.cat([F.linear(row, weight[e]) for row, e in zip(rows.split(1), chosen)])

    rows (n, in), weight (E, out, in), chosen (n,) -> (n, out)
    """
    if torch.compiler.is_compiling():           # fuses weight[chosen], does not copy it
        return (weight[chosen] @ rows[..., None])[..., 0]
    pairs = zip(rows.split(1), chosen.tolist())
    return torch.cat([F.linear(row, weight[e]) for row, e in pairs])


def dropout(x, p, training):
    """Dropout of x (...), with probability p in steps of 1/65536.

        F.dropout(x, p, training)

    A CPU would draw one number at a time. Here four elements share one of 64 bits, or if compiled,
    the bits are a hash of the element's position, which fuses with the operations around it.
    """
    if not training or p == 0 or x.device.type != 'cpu':
        return F.dropout(x, p, training)
    if torch.compiler.is_compiling():
        seed = torch.randint(-2**31, 2**31, (), dtype=torch.int32)
        bits = mixed_bits(torch.arange(x.numel(), dtype=torch.int32) + seed)
    else:
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2**63, None)
        bits = bits.view(torch.int16)[:x.numel()]
    dropped = round(2**16 * p)
    kept = bits.view(x.shape) >= dropped - 2**15
    return x * kept.to(x.dtype).mul_(2**16 / (2**16 - dropped))


def mixed_bits(n):
    """n (...) int32 -> int16, a hash: neighbors get unrelated bits. Products wrap around."""
    for _ in range(2):
        n = (n ^ (n >> 16 & 0xffff)) * 0x45d9f3b        # masked: >> copies the sign
    return (n ^ (n >> 16)).to(torch.int16)              # the low half


LOGITS_OF_A_CHUNK = 2**26


def linear_cross_entropy(h, weight, targets, count=None):
    """The mean cross-entropy of a linear head, in nats.

        F.cross_entropy(F.linear(h, weight).float(), targets, ignore_index=-100)

    h (N, D), weight (V, D), targets (N,), ignored if below 0; the loss is 0 if all are. count: what
    the sum is divided by, if not their number. Logits exist for a chunk of rows at a time, which
    turns into gradients at once.
    """
    total = LinearCrossEntropy.apply(h, weight, targets, torch.is_grad_enabled())
    if count is None:
        count = (targets >= 0).sum()
    return total / count.clamp(min=1)


class LinearCrossEntropy(torch.autograd.Function):
    """The sum. Gradients are scaled in place, so autograd refuses a second backward pass."""
    @staticmethod
    def forward(ctx, h, weight, targets, with_gradients):
        dtype = compute_dtype(h)
        weight = weight.to(dtype)
        chunk = max(LOGITS_OF_A_CHUNK // len(weight), 256)
        loss = 0.0
        grads_h = []
        grad_weight = None
        for x, target in zip(h.to(dtype).split(chunk), targets[:, None].split(chunk)):
            counts = target >= 0                                                  # (rows, 1)
            target = target.clamp(min=0)
            log_p = F.linear(x, weight).float().log_softmax(-1)                   # (rows, V)
            loss = loss - (log_p.gather(1, target) * counts).sum()
            if with_gradients:
                grad = softmax_less_one_hot(log_p, target, counts).to(dtype)
                grads_h.append(grad @ weight * counts)
                of_chunk = grad.mT @ (x * counts)                                    # (V, D)
                if grad_weight is None:
                    grad_weight = of_chunk.float()
                else:
                    grad_weight.add_(of_chunk)
                del grad, of_chunk
            del log_p               # before the next chunk's is made
        if with_gradients:
            ctx.save_for_backward(torch.cat(grads_h), grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad):
        grad_h, grad_weight = ctx.saved_tensors
        return grad_h.mul_(grad), grad_weight.mul_(grad), None, None


def softmax_less_one_hot(log_p, target, counts):
    """log_p (rows, V), target and counts (rows, 1) -> the gradient of the logits (rows, V), right
    in rows that count. Eager code overwrites log_p."""
    if torch.compiler.is_compiling():           # this form fuses
        return log_p.exp() - F.one_hot(target[:, 0], log_p.shape[1])
    return log_p.exp_().scatter_add_(1, target, -counts.float())
