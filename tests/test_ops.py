"""Tests of nanoseek/ops.py: each operation equals the line of plain PyTorch that its docstring
promises, computed in float64, forward and backward."""
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from nanoseek import ops
from nanoseek.estimate import Live
from support import why_not_compile

# all different, so that no two dims can be confused
B, H, G, D, E, K = 2, 6, 3, 40, 8, 3

compiled = pytest.mark.parametrize('compiled', [False, pytest.param(True, marks=[
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not_compile()), reason=why_not_compile())])])


def close(a, b, tolerance=1e-5):
    """Equal up to tolerance times the largest value, or where all are 0, a millionth."""
    a = a.detach().double()
    b = b.detach().double()
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max() + 1e-6


def doubles(*tensors):
    """Copies in float64, with gradients where the originals have them."""
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def check_gradients(inputs, out, exact_inputs, exact_out, tolerance=1e-4, where=1.0):
    """where: 0 for outputs whose gradient is always 0"""
    close(out, exact_out)
    direction = torch.randn(out.shape) * where
    grads = torch.autograd.grad(out, inputs, direction)
    exact_grads = torch.autograd.grad(exact_out, exact_inputs, direction.double())
    for grad, exact in zip(grads, exact_grads):
        close(grad, exact, tolerance)


# ------------------------------------------------------------------------------- attention

def attention_line(q, k, v, scale, mask):
    """The line of the docstring, after each key head was repeated for its query heads."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return (q @ k.mT * scale + mask).softmax(-1) @ v


@pytest.mark.parametrize('T, S', [(1, 1), (1, 50), (3, 50), (9, 50), (37, 37), (300, 300),
                                  (560, 560), (2, 560), (9, 560)])
@pytest.mark.parametrize('d, dv', [(12, 12), (12, 10), (10, 12)])
@pytest.mark.parametrize('kv_heads', [G, H])
def test_attention_equals_its_line(T, S, d, dv, kv_heads):
    if dv > d and S > ops.SHORT_CONTEXT and T == S:
        pytest.skip('the fused kernel pads values up to the keys, as DeepSeek has them')
    torch.manual_seed(1)
    q = torch.randn(B, H, T, d, requires_grad=True)
    k = torch.randn(B, kv_heads, S, d, requires_grad=True)
    v = torch.randn(B, kv_heads, S, dv, requires_grad=True)
    mask = torch.full((T, S), -math.inf)
    for t in range(T):
        mask[t, :S - T + t + 1] = 0.0
    exact = doubles(q, k, v)
    check_gradients((q, k, v), ops.attention(q, k, v, 0.3),
                    exact, attention_line(*exact, 0.3, mask.double()))


@pytest.mark.slow
@pytest.mark.parametrize('T', [37, 300, 560])
@pytest.mark.parametrize('flex', [False, True])
@pytest.mark.filterwarnings('ignore:flex_attention called without')
def test_attention_under_a_document_mask_equals_its_line(T, flex):
    torch.manual_seed(2)
    documents = (torch.rand(B, T) < 0.1).cumsum(1)
    shapes = (B, H, T, 16), (B, G, T, 16), (B, G, T, 16)
    q, k, v = (torch.randn(shape) for shape in shapes)
    mask = torch.full((B, 1, T, T), -math.inf)
    for b in range(B):
        for t in range(T):
            for s in range(t + 1):
                if documents[b, s] == documents[b, t]:
                    mask[b, 0, t, s] = 0.0
    own = ops.document_mask(documents, torch.float32, flex)
    if not flex:
        assert torch.equal(own, mask)
    close(ops.attention(q, k, v, 0.3, own),
          attention_line(*doubles(q, k, v), 0.3, mask.double()))


# --------------------------------------------------------------------------------- experts

def choices(n, routing):
    """-> ids (n, K) of different experts: random ones, never expert 5, or always the same"""
    score = torch.rand(n, E)
    if routing == 'idle':
        score[:, 5] = 0
    if routing == 'same':
        score = score[:1].expand(n, E)
    return score.topk(K, -1).indices


routings = pytest.mark.parametrize('routing', ['random', 'idle', 'same'])
sizes = pytest.mark.parametrize('n', [1, 19, 185, 3000])    # without gaps, and with two kinds


@sizes
@routings
def test_sorting_by_expert_and_back_equals_plain_indexing(n, routing):
    torch.manual_seed(3)
    ids = choices(n, routing)
    dispatch = ops.sort_by_expert(ids, E)
    assert dispatch.load.tolist() == [(ids == e).sum().item() for e in range(E)]
    begin = 0
    for e, end in enumerate(dispatch.ends.tolist()):        # every row belongs to its expert
        for token in range(n):
            for k in range(K):
                inside = begin <= dispatch.row[token, k] < end
                assert inside == (ids[token, k] == e)
            if n > 200:
                break
        begin = end
    assert begin == len(dispatch.source)

    # a gap's row counts for nothing, which its weight of zero sees to in the model
    filled = torch.zeros(len(dispatch.source), 1)
    filled[dispatch.row.flatten()] = 1
    x = torch.randn(n, D, requires_grad=True)
    exact, = doubles(x)
    check_gradients((x,), dispatch.gather(x), (exact,), exact[dispatch.source // K],
                    where=filled)
    weights = torch.rand(n, K, requires_grad=True)
    exact, = doubles(weights)
    wanted = torch.zeros(len(dispatch.source)).double()
    wanted = wanted.scatter(0, dispatch.row.flatten(), exact.flatten())[:, None]
    check_gradients((weights,), dispatch.gather_weights(weights), (exact,), wanted)
    rows = torch.randn(len(dispatch.source), D, requires_grad=True)
    exact, = doubles(rows)
    close(dispatch.combine(rows), exact[dispatch.row].sum(1))
    direction = torch.randn(n, D)
    grad, = torch.autograd.grad(dispatch.combine(rows), rows, direction)
    wanted, = torch.autograd.grad(exact[dispatch.row].sum(1), exact, direction.double())
    close(grad * filled, wanted)


@pytest.mark.parametrize('n_in, n_out', [(40, 24), (50, 24), (40, 21)])  # 50, 21: unaligned
@pytest.mark.parametrize('loads', [[3, 0, 7, 1], [0, 0, 0, 11], [5, 5, 5, 5]])
def test_grouped_linear_equals_its_line(n_in, n_out, loads):
    torch.manual_seed(4)
    ends = torch.tensor(loads).cumsum(0).int()
    x = torch.randn(sum(loads), n_in, requires_grad=True)
    weight = torch.randn(4, n_out, n_in, requires_grad=True)
    exact = exact_x, exact_weight = doubles(x, weight)
    groups = exact_x.tensor_split(ends[:-1].long())
    wanted = torch.cat([F.linear(rows, w) for rows, w in zip(groups, exact_weight)])
    check_gradients((x, weight), ops.grouped_linear(x, weight, ends), exact, wanted)


@compiled
@pytest.mark.parametrize('n', [1, 2])
@torch.no_grad()
def test_experts_one_by_one_equal_their_line(n, compiled):
    torch.manual_seed(5)
    gate_up = torch.randn(E, 2 * 24, D)
    down = torch.randn(E, D, 24)
    x = torch.randn(n, D)
    weights = torch.rand(n, K)
    ids = choices(n, 'random')
    wanted = torch.zeros(n, D).double()
    for token in range(n):
        for k in range(K):
            e = ids[token, k]
            gate, up = (gate_up[e].double() @ x[token].double()).chunk(2)
            inner = gate * gate.sigmoid() * up
            wanted[token] += weights[token, k].double() * (down[e].double() @ inner)
    operation = ops.experts_one_by_one
    if compiled:
        operation = torch.compile(operation, fullgraph=True)
    assert ops.few_choices(ids, E)
    close(operation(x, weights, ids, gate_up, down), wanted)


# ------------------------------------------------------------------------------------ loss

@pytest.mark.slow
@compiled
@pytest.mark.parametrize('n, vocab, tolerance', [(37, 97, 1e-5), (300, 2**18, 1e-3)])
def test_linear_cross_entropy_equals_its_line_in_one_and_in_two_chunks(n, vocab, tolerance,
                                                                       compiled):
    torch.manual_seed(6)
    operation = ops.linear_cross_entropy
    if compiled:
        operation = torch.compile(operation, fullgraph=True)
    h = torch.randn(n, 4, requires_grad=True)
    weight = torch.randn(vocab, 4, requires_grad=True)
    targets = torch.randint(vocab, (n,))
    targets[::7] = -100
    with torch.no_grad():
        without_gradients = operation(h, weight, targets)
    loss = operation(h, weight, targets)
    loss.backward()
    wanted = 0.0
    grad_weight = 0.0
    for rows in torch.arange(n).split(100):         # in other pieces, as float64 is large
        x = h[rows].detach().double().requires_grad_()
        w = weight.detach().double().requires_grad_()
        part = F.cross_entropy(F.linear(x, w), targets[rows], ignore_index=-100, reduction='sum')
        part = part / (targets >= 0).sum()
        part.backward()
        wanted += part.detach()
        grad_weight += w.grad
        close(h.grad[rows], x.grad, tolerance)
    close(loss, wanted, 1e-6)
    close(without_gradients, wanted, 1e-6)
    close(weight.grad, grad_weight, tolerance)


@pytest.mark.slow
def test_logits_are_computed_once_and_never_in_memory_as_a_whole():
    h = torch.randn(1024, 4, requires_grad=True)
    weight = torch.randn(2**18, 4, requires_grad=True)
    targets = torch.randint(2**18, (1024,))
    product = 2 * 1024 * 4 * 2**18
    with FlopCounterMode(display=False) as counter, Live() as live:
        ops.linear_cross_entropy(h, weight, targets).backward()
    assert counter.get_total_flops() == 3 * product
    assert live.peak < 4 * 1024 * 2**18 * 0.6           # four chunks, two copies of one at once
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ops.linear_cross_entropy(h, weight, targets)
    assert counter.get_total_flops() == product


def test_a_loss_without_any_target_is_zero_and_so_are_its_gradients():
    h = torch.randn(5, 4, requires_grad=True)
    weight = torch.randn(9, 4, requires_grad=True)
    loss = ops.linear_cross_entropy(h, weight, torch.full((5,), -100))
    loss.backward()
    assert loss == 0
    assert not h.grad.any()
    assert not weight.grad.any()


# ---------------------------------------------------------------------------------- dtypes

def test_compute_dtype_is_what_autocast_gives_a_matmul():
    x = torch.randn(3, 3)
    assert ops.compute_dtype(x) == (x @ x).dtype == torch.float32
    with torch.autocast('cpu', torch.bfloat16):
        assert ops.compute_dtype(x) == (x @ x).dtype == torch.bfloat16
        with ops.without_autocast(x):
            assert ops.compute_dtype(x) == (x @ x).dtype == torch.float32
