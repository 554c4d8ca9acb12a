"""Tests of nanoseek/ops.py: each operation equals the line of plain PyTorch that its docstring
promises, computed in float64 on the CPU, forward and backward. Those of the experts are compared
as a whole, in test_model.py."""
import math
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nanoseek import ops

B, H, G, D, E, K = 2, 6, 3, 40, 8, 3        # all different, so that no two can be confused

compiled = partial(torch.compile, fullgraph=True)
also_compiled = pytest.mark.parametrize('wrapper', [
    lambda operation: operation,
    pytest.param(compiled, marks=[
        pytest.mark.slow,
        pytest.mark.skipif(not shutil.which('c++'), reason='no C++ compiler')])])


def close(a, b, tolerance=1e-5):
    """Equal up to tolerance times the largest value (on a GPU ten times that), or a millionth."""
    if a.device.type != 'cpu':
        tolerance *= 10
    a = a.detach().double().cpu()
    b = b.detach().double().cpu()
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max() + 1e-6


def leaves(device, *shapes):
    """Random tensors with gradients on a device, and their copies in float64 on the CPU."""
    exact = [torch.randn(shape).double().requires_grad_() for shape in shapes]
    return [x.detach().float().to(device).requires_grad_() for x in exact], exact


def check(inputs, out, exact, expected):
    """Compare a result and its gradients."""
    close(out, expected)
    direction = torch.randn(out.shape)
    grads = torch.autograd.grad(out, inputs, direction.to(out.device))
    exact_grads = torch.autograd.grad(expected, exact, direction.double())
    for grad, exact_grad in zip(grads, exact_grads):
        close(grad, exact_grad, 1e-4)


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
def test_attention_equals_its_line(T, S, d, dv, kv_heads, device):
    if dv > d and T == S > ops.SHORT_CONTEXT:
        pytest.skip('the fused kernel pads values up to the keys, as DeepSeek has them')
    torch.manual_seed(1)
    inputs, exact = leaves(device, (B, H, T, d), (B, kv_heads, S, d), (B, kv_heads, S, dv))
    mask = torch.full((T, S), -math.inf).triu(S - T + 1)
    check(inputs, ops.attention(*inputs, 0.3), exact, attention_line(*exact, 0.3, mask))


@pytest.mark.slow
@pytest.mark.parametrize('T', [37, 300, 560])
@pytest.mark.parametrize('mask_of', [
    partial(ops.document_mask, dtype=torch.float32), ops.flex_document_mask])
@pytest.mark.parametrize('fullgraph', [False, True])
@pytest.mark.filterwarnings('ignore:flex_attention called without')
def test_attention_under_a_document_mask_equals_its_line(T, mask_of, fullgraph, device):
    def attend(q, k, v, documents):
        return ops.attention(q, k, v, 0.3, mask_of(documents))

    if fullgraph:
        attend = torch.compile(attend, backend='eager', fullgraph=True)
    torch.manual_seed(2)
    documents = (torch.rand(B, T) < 0.1).cumsum(1)
    inputs, exact = leaves(device, (B, H, T, 16), (B, G, T, 16), (B, G, T, 16))
    same = documents[:, None, :, None] == documents[:, None, None, :]
    exact_mask = torch.where(same.tril(), 0.0, -math.inf)
    q, k, v = (x.detach() for x in inputs)      # on a CPU, FlexAttention has no gradients
    close(attend(q, k, v, documents.to(device)), attention_line(*exact, 0.3, exact_mask))


# --------------------------------------------------------------------------------- experts

def choices(n, routing):
    """-> ids (n, K) of different experts: random ones, never expert 5, or always the same"""
    score = torch.rand(n, E)
    if routing == 'idle':
        score[:, 5] = 0
    if routing == 'same':
        score = score[:1].expand(n, E)
    return score.topk(K, -1).indices


@pytest.mark.parametrize('n', [1, 19, 185, 3000])       # on a CPU without gaps, and with gaps
@pytest.mark.parametrize('routing', ['random', 'idle', 'same'])
def test_each_choice_has_a_row_among_those_of_its_expert(n, routing, device):
    torch.manual_seed(3)
    ids = choices(n, routing)
    dispatch = ops.sort_by_expert(ids.to(device), E)
    row = dispatch.row.cpu()
    assert torch.equal(dispatch.source.cpu()[row], torch.arange(n * K).view(n, K))
    ends = dispatch.ends.tolist()
    for e, (begin, end) in enumerate(zip([0, *ends], ends)):
        assert torch.equal((begin <= row) & (row < end), ids == e)
        assert dispatch.load[e] == (ids == e).sum()


@also_compiled
@pytest.mark.parametrize('n', [1, 2])
@torch.no_grad()
def test_experts_one_by_one_equal_their_line(n, wrapper, device):
    torch.manual_seed(5)
    inputs, exact = leaves(device, (n, D), (n, K), (E, 2 * 24, D), (E, D, 24))
    ids = choices(n, 'random')
    x, weights, gate_up, down = exact
    gate, up = torch.einsum('nkid, nd -> nki', gate_up[ids], x).chunk(2, -1)
    expected = torch.einsum('nk, nkdi, nki -> nd', weights, down[ids], F.silu(gate) * up)
    x, weights, gate_up, down = inputs
    operation = wrapper(ops.experts_one_by_one)
    close(operation(x, weights, ids.to(device), gate_up, down), expected)


# ------------------------------------------------------------------------------------ loss

@pytest.mark.slow
@also_compiled
@pytest.mark.parametrize('n, vocab, tolerance', [(37, 97, 1e-5), (300, 2**18, 1e-3)])
def test_linear_cross_entropy_equals_its_line_in_one_and_in_two_chunks(n, vocab, tolerance,
                                                                       wrapper, device):
    torch.manual_seed(6)
    operation = wrapper(ops.linear_cross_entropy)
    (h, weight), (exact_h, exact_weight) = leaves(device, (n, 4), (vocab, 4))
    targets = torch.randint(vocab, (n,))
    targets[::7] = -100
    loss = operation(h, weight, targets.to(device))
    loss.backward()
    with torch.no_grad():
        close(operation(h, weight, targets.to(device)), loss, 1e-6)
    expected = 0.0
    for rows in torch.arange(n).split(100):         # in other pieces, as float64 is large
        logits = F.linear(exact_h[rows], exact_weight)
        part = F.cross_entropy(logits, targets[rows], ignore_index=-100, reduction='sum')
        part = part / (targets >= 0).sum()
        part.backward()
        expected += part.detach()
    close(loss, expected, 1e-6)
    close(h.grad, exact_h.grad, tolerance)
    close(weight.grad, exact_weight.grad, tolerance)


class Largest(TorchDispatchMode):
    """Notes the largest size of a tensor that an operation returns."""
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.slow
def test_logits_are_computed_once_and_never_as_a_whole():
    (h, weight), _ = leaves('cpu', (1024, 4), (2**18, 4))
    targets = torch.randint(2**18, (1024,))
    with FlopCounterMode(display=False) as counter, Largest() as largest:
        ops.linear_cross_entropy(h, weight, targets).backward()
    assert counter.get_total_flops() == 3 * 2 * 1024 * 4 * 2**18
    assert largest.numel == 1024 * 2**18 / 4            # four chunks
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ops.linear_cross_entropy(h, weight, targets)
    assert counter.get_total_flops() == 2 * 1024 * 4 * 2**18


# --------------------------------------------------------------------------------- dropout

@also_compiled
@pytest.mark.parametrize('p', [0.1, 0.5, 0.99])
def test_dropout_drops_a_share_at_random_and_scales_the_rest(p, wrapper):
    torch.manual_seed(9)
    x = torch.rand(1001, 503).add(1).requires_grad_()
    two = wrapper(lambda x: (ops.dropout(x, p, True), ops.dropout(x, p, True)))
    y, other = two(x)
    kept = y != 0
    z = (kept.double() - (1 - p)) / (p * (1 - p)) ** 0.5            # mean 0, variance 1
    again = ((other != 0).double() - (1 - p)) / (p * (1 - p)) ** 0.5
    for a, b in ((z, again), (z[1:], z[:-1]), (z[:, 1:], z[:, :-1]), (z[:, 64:], z[:, :-64])):
        assert abs((a * b).sum().item()) <= 4.5 * a.numel() ** 0.5  # no element tells another
    share = kept.double().mean().item()
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(share - (1 - p)) <= 4 * deviation + 2**-16
    close(y[kept], x[kept] / (1 - p), 1e-3)
    y.sum().backward()
    close(x.grad * x.detach(), y)
    assert ops.dropout(x, p, False) is x


# ---------------------------------------------------------------------------------- dtypes

def test_compute_dtype_is_what_autocast_gives_a_matmul(device):
    x = torch.randn(3, 3, device=device)
    assert ops.compute_dtype(x) == (x @ x).dtype == torch.float32
    with torch.autocast(device.type, torch.bfloat16):
        assert ops.compute_dtype(x) == (x @ x).dtype == torch.bfloat16
        with ops.without_autocast(x):
            assert ops.compute_dtype(x) == (x @ x).dtype == torch.float32
