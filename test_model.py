"""Tests of model.py, each named after what must hold.

References are independent of the model: float64, loops over heads, tokens and experts,
transformers, torch's FLOP counter, and numbers computed by hand.
"""
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from conftest import asset
from model import Block, Config, Experts, Transformer, rope_table
from nanoseek.cost import flops_per_token, parameter_table
from nanoseek.generate import Cache, compile_decoding

pytestmark = pytest.mark.filterwarnings('ignore:Initializing zero-element tensors')

# All dims differ, so that no two can be confused. B * T * 3 > 64 * 8: Experts pads rows
B, T, V = 5, 37, 97
SIZES = dict(vocab_size=V, hidden_size=48, intermediate_size=88, num_hidden_layers=3,
             num_attention_heads=6, max_position_embeddings=128, rms_norm_eps=1e-3)
YARN = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32,
        'beta_fast': 16, 'beta_slow': 2, 'mscale': 1.0, 'mscale_all_dim': 0.8}
GQA = dict(num_key_value_heads=2, head_dim=10)
MLA = dict(q_lora_rank=None, kv_lora_rank=20, qk_nope_head_dim=12, qk_rope_head_dim=8,
           v_head_dim=14)
MOE = dict(n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=40)
GROUPS = dict(MOE, n_shared_experts=2, first_k_dense_replace=1, n_group=4, topk_group=2,
              routed_scaling_factor=1.7)
ATTENTIONS = {
    'gqa': dict(GQA, attention='gqa'),
    'linear': dict(GQA, attention='linear'),
    'mla': dict(MLA, attention='mla'),
    'mla-qlora-yarn': dict(MLA, attention='mla', q_lora_rank=22, rope_scaling=YARN),
}
FEEDS = {'dense': {}, 'moe': MOE, 'groups': GROUPS}

attentions = pytest.mark.parametrize('attention', ATTENTIONS)
kinds = pytest.mark.parametrize('attention, feed', [(a, f) for a in ATTENTIONS for f in FEEDS])
needs_compiler = pytest.mark.skipif(not shutil.which('c++'), reason='no C++ compiler')


def make(attention='mla', feed='groups', device='cpu', **settings):
    """A model whose logits are far from flat, with norms and router biases that matter."""
    torch.manual_seed(1)
    fields = {**SIZES, **ATTENTIONS[attention], **FEEDS[feed], 'tie_word_embeddings': False}
    return shake(Transformer(Config(**{**fields, **settings}))).to(device)


@torch.no_grad()
def shake(model):
    for name, p in model.named_parameters():
        if 'norm' in name:
            p.copy_(1 + 0.2 * torch.randn_like(p))
        else:
            p.mul_(4)
    for name, bias in model.named_buffers():
        if name.endswith('e_score_correction_bias'):
            bias.copy_(0.3 * torch.randn_like(bias))
    return model.eval()


def tokens(rows=B, length=T, device='cpu'):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(V, (rows, length), generator=generator).to(device)


def batch(rows=B, length=T, device='cpu'):
    idx = tokens(rows, length + 1, device)
    return idx[:, :-1].contiguous(), idx[:, 1:].contiguous()


def gradients(model, idx, targets):
    """The loss, and {name: gradient} of what has any."""
    model.zero_grad()
    _, loss = model(idx, targets)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()
                           if p.grad is not None and p.numel()}


def close(a, b, tolerance=1e-5):
    """Equal up to tolerance times the largest value, on a GPU up to ten times that."""
    if a.device.type != 'cpu':
        tolerance *= 10
    a = a.detach().double().cpu()
    b = b.detach().double().cpu()
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max()


def refused(words, call, *args, **kwargs):
    with pytest.raises(ValueError) as error:
        call(*args, **kwargs)
    for word in words.split():
        assert word in str(error.value)


# ------------------------------------------------------------------------------- attention

def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def attention_reference(attn, x, rope, kind):
    """x (B, T, D) float64 -> (B, T, D), head by head; MLA by eq. 1-11 of DeepSeek-V3's report"""
    w = {name.removesuffix('.weight'): p.detach().double().cpu()
         for name, p in attn.named_parameters()}
    H, dn, R = 6, 12, 20
    phase = torch.complex(*rope[:, :x.shape[1]].double().cpu())

    def turn_pairs(x):
        return torch.view_as_real(torch.complex(x[..., ::2], x[..., 1::2]) * phase).flatten(-2)

    def turn_halves(x):
        return torch.view_as_real(torch.complex(*x.chunk(2, -1)) * phase).flatten(-2)

    if 'mla' in kind:
        if 'qlora' in kind:
            q = rms(x @ w['q_a_proj'].T, w['q_a_layernorm'], 1e-6) @ w['q_b_proj'].T
        else:
            q = x @ w['q_proj'].T
        latent = x @ w['kv_a_proj_with_mqa'].T
        kv = rms(latent[..., :R], w['kv_a_layernorm'], 1e-6) @ w['kv_b_proj'].T
        k_pe = turn_pairs(latent[..., R:])
        q = [torch.cat((q[..., :dn], turn_pairs(q[..., dn:])), -1) for q in q.chunk(H, -1)]
        k = [torch.cat((kv[..., :dn], k_pe), -1) for kv in kv.chunk(H, -1)]
        v = [kv[..., dn:] for kv in kv.chunk(H, -1)]
    else:
        q, k, v = ((x @ w[name].T).split(10, -1) for name in ('q_proj', 'k_proj', 'v_proj'))
        q = [turn_halves(q) for q in q]
        k = [turn_halves(k[h // 3]) for h in range(H)]
        v = [v[h // 3] for h in range(H)]
    mscale = 1.0
    if 'yarn' in kind:
        mscale = 0.1 * 0.8 * math.log(4) + 1
    heads = []
    for q, k, v in zip(q, k, v):
        if kind == 'linear':
            a = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
        else:
            a = (q @ k.mT * mscale**2 / q.shape[-1] ** 0.5).exp().tril()
        heads.append(a @ v / a.sum(-1, keepdim=True))
    return torch.cat(heads, -1) @ w['o_proj'].T


@attentions
@pytest.mark.parametrize('pieces', [(T,), (300,), (530,), (20, 1, 9, 70, 430), (1,) * 530],
                         ids=['T', '300', '530', 'cut', 'decode'])
@torch.no_grad()
def test_attention_equals_float64_reference_however_it_is_cut(attention, pieces, device):
    model = make(attention, 'dense', device, max_position_embeddings=530)
    attn = model.model.layers[1].self_attn
    x = torch.randn(2, sum(pieces), 48)
    cache = Cache(model, 2, sum(pieces))
    outputs = []
    for piece in x.to(device).split(pieces, 1):
        end = cache.length + piece.shape[1]
        rope = model.rope[:, cache.length:end].to(device)
        outputs.append(attn(piece, rope, cache, 1))
        cache.length = end
    close(torch.cat(outputs, 1), attention_reference(attn, x.double(), model.rope, attention))


@attentions
@pytest.mark.parametrize('length', [T, 70, 300, 530])
def test_attention_gradient_equals_float64_reference(attention, length, device):
    model = make(attention, 'dense', device, max_position_embeddings=530)
    attn = model.model.layers[1].self_attn
    x = torch.randn(2, length, 48).to(device).requires_grad_()
    exact = x.detach().double().cpu().requires_grad_()
    direction = torch.randn(2, length, 48)
    y = attn(x, model.rope[:, :length].to(device))
    (y * direction.to(device)).sum().backward()
    (attention_reference(attn, exact, model.rope, attention) * direction).sum().backward()
    close(x.grad, exact.grad, 1e-4)


@pytest.mark.parametrize('new', [1, 9, T])
def test_absorbed_mla_equals_expanded(new, device):
    attn = make('mla-qlora-yarn', 'dense', device).model.layers[0].self_attn
    q_nope, q_pe, cached = (torch.randn(shape).to(device) for shape in (
        (B, 6, new, 12), (B, 6, new, 8), (B, T, 28)))
    close(attn.attend_absorbed(q_nope, q_pe, cached),
          attn.attend_expanded(q_nope, q_pe, *cached.split((20, 8), -1)))


def test_linear_attention_costs_linear_in_length():
    def growth(attention):      # up to 512 tokens the others are matmuls, which the counter knows
        flops = []
        model = make(attention, 'dense', max_position_embeddings=512)
        for length in (128, 512):
            with FlopCounterMode(display=False) as counter:
                model(tokens(1, length))
            flops.append(counter.get_total_flops())
        return flops[1] / flops[0]

    assert growth('linear') <= 4.2 < 6 < growth('gqa')


@kinds
@torch.no_grad()
def test_no_token_sees_the_future(attention, feed):
    model = make(attention, feed)
    idx = tokens()
    logits, _ = model(idx)
    changed = idx.clone()
    changed[:, 20:] = (idx[:, 20:] + 1) % V
    future = (model(changed)[0] - logits).abs()
    assert future[:, :20].max() < 1e-5 and (future[:, 20:].amax(-1) > 1e-3).all()


@kinds
@torch.no_grad()
def test_chunks_on_a_cache_equal_one_forward(attention, feed, device):
    model = make(attention, feed, device)
    idx = tokens(device=device)
    cache = Cache(model, B, T)
    chunks = [model.hidden(chunk, cache)[0] for chunk in idx.split((11, 1, 1, 17, 7), 1)]
    close(model.lm_head(torch.cat(chunks, 1)), model(idx)[0])


# -------------------------------------------------------------------------- document masks

EOS = 11
PACKED = {
    'short': [(9, 1, 20, 1, 6), (37,), (1, 1, 35)],
    'middle': [(128, 1, 100, 71), (1, 299), (300,)],
    'long': [(300, 1, 200, 59), (1, 520, 39), (560,)],
}
packings = pytest.mark.parametrize('packing', PACKED)
masked = pytest.mark.parametrize('attention, feed', [
    ('gqa', 'dense'), ('mla', 'dense'), ('mla-qlora-yarn', 'groups')])


def pack(packing, device='cpu'):
    """Tokens (3, T), and (row, begin, end) of each document. EOS ends all but a row's last one."""
    rows = PACKED[packing]
    idx = tokens(len(rows), sum(rows[0]), device)
    idx[idx == EOS] = EOS + 1
    documents = []
    for row, lengths in enumerate(rows):
        begin = 0
        for length in lengths:
            documents.append((row, begin, begin + length))
            begin += length
            idx[row, begin - 1] = EOS
        idx[row, begin - 1] = EOS + 1
    return idx, documents


def make_masked(attention, feed='dense', device='cpu', **settings):
    """Heads of at least 16 dims, as FlexAttention wants them on a GPU"""
    wide = dict(head_dim=16, qk_nope_head_dim=16, v_head_dim=20)
    model = make(attention, feed, device, eos_token_id=EOS, max_position_embeddings=600, **wide,
                 **settings)
    model.doc_attention_mask = True
    return model


@packings
@masked
def test_packed_documents_equal_each_alone(attention, feed, packing, device):
    model = make_masked(attention, feed, device)
    idx, documents = pack(packing, device)
    targets = tokens(len(idx), idx.shape[1] + 1, device)[:, 1:]
    packed, _ = model(idx)
    loss, grads = gradients(model, idx, targets)
    model.doc_attention_mask = False
    model.zero_grad()
    losses = []
    for row, begin, end in documents:
        alone = idx[row:row + 1, begin:end]
        close(packed[row:row + 1, begin:end], model(alone)[0], 1e-4)    # RoPE's angles are rounded
        _, loss_alone = model(alone, targets[row:row + 1, begin:end])
        losses.append(loss_alone * alone.numel() / idx.numel())
    sum(losses).backward()
    close(loss, sum(losses))
    for name, grad in grads.items():
        close(grad, model.get_parameter(name).grad, 3e-4)


# ------------------------------------------------------------------------------ generation

def check_greedy(model, out, prompt, room):
    """Every token is the likeliest one by a forward without a cache, except for ties."""
    begin = 0
    for t in range(prompt, out.shape[1]):
        if t - begin > room:                # full: it goes on from the last half
            begin = t - (room + 1) // 2
        logits = model(out[:, begin:t])[0][:, -1]
        assert (logits.amax(-1) - logits.gather(1, out[:, t:t + 1])[:, 0]).max() < 1e-4
    assert out[:, prompt:].unique().numel() > 5     # repetition would prove little


@pytest.mark.slow
@kinds
@pytest.mark.parametrize('room, prompt, new', [(128, 7, 20), (23, 7, 45), (23, 23, 20)])
@torch.no_grad()
def test_cached_generation_equals_uncached(attention, feed, room, prompt, new, device):
    model = make(attention, feed, device, max_position_embeddings=room)
    idx = tokens(length=prompt, device=device)
    out = model.generate(idx, new)
    assert out.shape == (B, prompt + new)
    assert torch.equal(out[:, :prompt], idx)
    check_greedy(model, out, prompt, room)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize('attention, feed', [('mla', 'moe'), ('gqa', 'dense')])
@torch.no_grad()
def test_compiled_decoding_gives_the_same_text_and_compiles_once(attention, feed, device):
    model = make(attention, feed, device, max_position_embeddings=23, num_hidden_layers=1)
    assert compile_decoding(model) is None
    with torch._dynamo.config.patch(error_on_recompile=True):
        out = model.generate(tokens(1, 7, device), 45)      # beyond the context's end, twice
    check_greedy(model, out, 7, 23)


# ----------------------------------------------------------------------- experts and router

def experts_reference(x, weights, ids, gate_up, down):
    y = torch.zeros_like(x)
    for e in range(len(down)):
        row, choice = (ids == e).nonzero(as_tuple=True)
        gate, up = (x[row] @ gate_up[e].T).chunk(2, -1)
        rows = F.silu(gate) * up @ down[e].T
        y = y.index_add(0, row, weights[row, choice, None] * rows)
    return y


@pytest.mark.parametrize('hidden, width', [(48, 40), (50, 40), (48, 42)])   # 50, 42: unaligned
@pytest.mark.parametrize('n', [3000, B * T, 19, 1])     # rows padded to 128, to 64, not padded
@pytest.mark.parametrize('routing', ['random', 'idle', 'same'])
def test_experts_equal_a_loop_and_drop_nothing(hidden, width, n, routing, device):
    torch.manual_seed(4)
    sizes = {**SIZES, **MOE, 'hidden_size': hidden, 'moe_intermediate_size': width}
    experts = Experts(Config(**sizes))
    score = torch.rand(n, 8)
    if routing == 'idle':
        score[:, 5] = 0
    if routing == 'same':
        score = score[:1].expand(n, 8)
    ids = score.topk(3, -1).indices
    shapes = [p.shape for p in experts.parameters()]
    inputs = [torch.randn(n, hidden), torch.rand(n, 3) + 0.1,
              *(0.3 * torch.randn(shape) for shape in shapes)]
    ours = [x.to(device).requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    parameters = dict(zip(('gate_up_proj', 'down_proj'), ours[2:]))
    y, load = torch.func.functional_call(experts, parameters, (*ours[:2], ids.to(device)))
    expected = experts_reference(*exact[:2], ids, *exact[2:])
    close(y, expected)
    assert load.tolist() == [(ids == e).sum() for e in range(8)]
    direction = torch.randn(n, hidden)
    grads = torch.autograd.grad(y, ours, direction.to(device))
    exact_grads = torch.autograd.grad(expected, exact, direction.double())
    for grad, exact_grad in zip(grads, exact_grads):
        close(grad, exact_grad)


@pytest.mark.parametrize('norm', [True, False])
@pytest.mark.parametrize('groups, keep', [(1, 1), (4, 2), (2, 1)])
def test_router_equals_reference_and_its_bias_chooses_but_never_weighs(groups, keep, norm, device):
    gate = make('mla', 'moe', device, n_group=groups, topk_group=keep, norm_topk_prob=norm,
                routed_scaling_factor=2.5).moe_layers[0].gate
    assert not gate.e_score_correction_bias.requires_grad
    gate.e_score_correction_bias -= 1       # below zero too, groups that are out must stay out
    bias = gate.e_score_correction_bias.tolist()
    x = torch.randn(60, 48)
    weights, ids, affinity = gate(x.to(device))
    size = 8 // groups
    for n, row in enumerate((x.double() @ gate.weight.detach().double().cpu().T).tolist()):
        s = [1 / (1 + math.exp(-z)) for z in row]                               # eq. 15
        choice = [a + b for a, b in zip(s, bias)]
        score = [sum(sorted(choice[g * size:(g + 1) * size])[-2:]) for g in range(groups)]
        best = sorted(range(groups), key=score.__getitem__)[-keep:]
        reach = [e for e in range(8) if e // size in best]
        chosen = sorted(reach, key=choice.__getitem__)[-3:]                     # eq. 14, 16
        total = 1.0
        if norm:
            total = sum(s[e] for e in chosen)
        routed = dict(zip(ids[n].tolist(), weights[n].tolist()))
        assert routed == pytest.approx({e: 2.5 * s[e] / total for e in chosen}, rel=1e-5)  # eq. 13
        assert affinity[n].tolist() == pytest.approx(s, rel=1e-5)


@torch.no_grad()
def test_router_and_positions_are_float32_under_autocast_and_in_a_bfloat16_model(device):
    model = make('mla-qlora-yarn', device=device)
    gate = model.moe_layers[0].gate
    bias = gate.e_score_correction_bias.clone()
    idx = tokens(device=device)
    logits, _ = model(idx)
    rope = model.rope.clone()
    x = torch.randn(60, 48, device=device).bfloat16()
    exact = gate(x.float())
    with torch.autocast(device.type, torch.bfloat16):
        for a, b in zip(gate(x), exact):
            assert torch.equal(a, b)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model.to(dtype)
        assert model.lm_head.weight.dtype == dtype
        assert gate(x.to(dtype))[0].dtype == torch.float32
        assert torch.equal(gate.e_score_correction_bias, bias)
        assert model.rope.dtype == torch.float32 and torch.equal(model.rope, rope)
        close(model(idx)[0], logits, 0.2)


def test_balance_loss_equals_reference_and_moves_only_the_affinities(device):
    moe = make('mla', seq_aux_loss_weight=0.7).moe_layers[0]
    affinity = torch.rand(B * T, 8)
    ids = torch.rand(B * T, 8).topk(3, -1).indices
    ours = affinity.to(device).requires_grad_()
    s = affinity.double().requires_grad_()
    expected = 0.0
    for rows in torch.arange(B * T).view(B, T):
        for e in range(8):
            f = 8 / (3 * T) * sum(e in ids[t] for t in rows)                    # eq. 18
            p = sum(s[t, e] / s[t].sum() for t in rows) / T                     # eq. 19, 20
            expected = expected + 0.7 / B * f * p                               # eq. 17
    loss = moe.balance_loss(ours, ids.to(device), B)
    close(loss, expected)
    close(torch.autograd.grad(loss, ours)[0], torch.autograd.grad(expected, s)[0])


def test_router_bias_steps_against_the_load_until_it_is_balanced(device):
    model = make('mla', 'moe', device, num_hidden_layers=1, bias_update_speed=0.01)
    gate = model.moe_layers[0].gate
    bias = gate.e_score_correction_bias
    start = bias.mean().item()
    for load, step in (([10, *[20] * 6, 30], [1.0, *[0] * 6, -1]),
                       ([80, *[0] * 7], [-1.75, *[0.25] * 7])):
        before = bias.clone()
        model.update_router_bias(torch.tensor([load], device=device))
        close(bias - before, 0.01 * torch.tensor(step))
    x = (torch.randn(400, 48) + 2 * torch.randn(48)).to(device)
    spread = []
    for _ in range(150):
        load = torch.bincount(gate(x)[1].flatten(), minlength=8)
        model.update_router_bias(load[None])
        spread.append(load.max().item() / load.float().mean().item())
    assert spread[0] > 2 and spread[-1] < 1.2
    assert bias.mean().item() == pytest.approx(start, abs=1e-6)


@pytest.mark.parametrize('mtp', [0, 2])
def test_load_counts_every_choice_once_in_training_only(mtp, device):
    model = make('mla', 'groups', device, num_nextn_predict_layers=mtp)
    seen = []

    def count(gate, args, out):
        seen.append(torch.bincount(out[1].flatten(), minlength=8))

    for moe in model.moe_layers:
        moe.gate.register_forward_hook(count)
    idx, targets = batch(device=device)
    model(idx, targets)
    model(idx)
    model.generate(idx[:, :3], 4)
    assert model.expert_load.shape == (2 + mtp, 8)
    assert not model.expert_load.any()
    seen.clear()
    model.train()(idx, targets)
    assert torch.equal(model.expert_load, torch.stack(seen))
    model(idx, targets)                                 # micro-batches add up
    assert torch.equal(model.expert_load, 2 * torch.stack(seen[:2 + mtp]))


@pytest.mark.parametrize('mtp', [0, 1])
@pytest.mark.parametrize('attention, documents', [
    ('gqa', False), ('linear', False), ('mla', True), ('mla-qlora-yarn', True)])
def test_training_is_deterministic_also_with_gradient_checkpointing(attention, documents, mtp,
                                                                    device):
    model = make_masked(attention, 'groups', device, num_nextn_predict_layers=mtp).train()
    model.doc_attention_mask = documents
    passes = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *args: passes.append(1))
    idx, _ = pack('short', device)
    results = []
    for model.gradient_checkpointing in (False, False, True):
        loss, grads = gradients(model, idx, idx.roll(-1, 1))
        results.append([loss, model.expert_load.clone(), *grads.values()])
        model.expert_load.zero_()
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
    assert len(passes) == 1 + 1 + 2                     # computed again where asked for
    assert results[0][1].any()


# ---------------------------------------------------------------------------------- losses

def test_a_batch_with_nothing_to_predict_is_no_nan(device):
    model = make('mla', device=device, num_nextn_predict_layers=2).train()
    idx, targets = batch(device=device)
    loss, grads = gradients(model, idx, targets.fill_(-100))
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads.values())
    assert model.losses['loss'] == 0 and model.losses['mtp_loss'] == 0


def mtp_reference(model, sequence, documents):
    """sequence (B, n + 1) -> the MTP loss by eq. 21-25, with blocks that run on each document."""
    depth = model.config.num_nextn_predict_layers
    n = sequence.shape[1] - 1
    h, _ = model.hidden(sequence[:, :n])
    losses = []
    for k in range(1, depth + 1):
        mtp = model.model.layers[2 + k]
        embedded = rms(model.model.embed_tokens(sequence[:, k:n]), mtp.enorm.weight, 1e-3)
        state = rms(h[:, :n - k], mtp.hnorm.weight, 1e-3)
        x = torch.cat((embedded, state), -1) @ mtp.eh_proj.weight.T             # eq. 21
        h = x.clone()
        for row, begin, end in documents:
            end = min(end, n - k)
            if begin < end:
                rope = model.rope[:, begin:end].to(x.device)
                y, _ = Block.forward(mtp, x[row:row + 1, begin:end], rope)      # eq. 22
                h[row, begin:end] = y[0]
        h = rms(h, mtp.shared_head['norm'].weight, 1e-3)
        log_p = (h @ model.lm_head.weight.T).double().log_softmax(-1)           # eq. 23
        losses.append(-log_p.gather(2, sequence[:, k + 1:, None]).mean())       # eq. 24
    return sum(losses) / depth                                                  # eq. 25


@kinds
@pytest.mark.parametrize('depth', [1, 2])
@torch.no_grad()
def test_mtp_loss_equals_reference(attention, feed, depth, device):
    model = make(attention, feed, device, num_nextn_predict_layers=depth).train()
    sequence = tokens(length=T + 1, device=device)
    model(sequence[:, :-1], sequence[:, 1:])
    documents = [(row, 0, T) for row in range(B)]
    close(model.losses['mtp_loss'], mtp_reference(model, sequence, documents))


@masked
@torch.no_grad()
def test_mtp_loss_of_packed_documents_equals_reference_over_each(attention, feed, device):
    model = make_masked(attention, feed, device, num_nextn_predict_layers=2).train()
    idx, documents = pack('short', device)
    sequence = torch.cat((idx, idx[:, :1]), 1)
    model(idx, sequence[:, 1:])
    packed = model.losses['mtp_loss']
    close(packed, mtp_reference(model, sequence, documents))
    model.doc_attention_mask = False
    model(idx, sequence[:, 1:])
    assert abs(model.losses['mtp_loss'] - packed) > 1e-3


@kinds
@torch.no_grad()
def test_training_loss_is_the_sum_of_its_parts_and_eval_the_plain_one(attention, feed, device):
    model = make(attention, feed, device, num_nextn_predict_layers=1, mtp_loss_weight=0.4,
                 seq_aux_loss_weight=0.05)
    idx, targets = batch(device=device)
    targets[:, ::5] = -100
    logits, loss = model(idx)
    assert loss is None and logits.shape == (B, T, V) and logits.dtype == torch.float32
    plain = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten())
    close(model(idx, targets)[1], plain)
    _, loss = model.train()(idx, targets)
    balance = model.losses.get('balance_loss', 0)
    close(model.losses['loss'], plain)
    close(loss, model.losses['loss'] + 0.4 * model.losses['mtp_loss'] + balance)
    assert model.losses['mtp_loss'] > 1
    assert balance >= 0.05 * 0.9 * len(model.moe_layers)        # about alpha a layer


@pytest.mark.slow
def test_small_model_overfits_one_batch(device):
    torch.manual_seed(7)
    sizes = {**SIZES, **MLA, **GROUPS, 'num_hidden_layers': 2}
    model = Transformer(Config(**sizes, num_nextn_predict_layers=1)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(200):
        _, loss = model(*batch(3, device=device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.update_router_bias(model.expert_load)
        model.expert_load.zero_()
    assert model.losses['loss'] < 0.1 and model.losses['mtp_loss'] < 0.2


# ----------------------------------------------------------------------- positions and counts

@pytest.mark.parametrize('drop', [(), ('mscale', 'mscale_all_dim'), ('beta_fast', 'beta_slow')])
@pytest.mark.parametrize('more', [{}, {'attention_factor': 1.3}, {'factor': 40.0}])
def test_yarn_equals_transformers(drop, more):
    transformers = pytest.importorskip('transformers')
    scaling = YARN | {'original_max_position_embeddings': 4096} | more
    scaling = {name: value for name, value in scaling.items() if name not in drop}
    config = transformers.LlamaConfig(head_dim=64, rope_parameters={**scaling, 'rope_theta': 5e3})
    yarn = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS['yarn']
    freq, scale = yarn(config, 'cpu')
    angle = torch.outer(torch.arange(128).double(), freq.double())
    cos, sin = rope_table(Config(**SIZES, rope_theta=5e3, rope_scaling=scaling), 64)
    assert (cos - angle.cos() * scale).abs().max() < 3e-5
    assert (sin - angle.sin() * scale).abs().max() < 3e-5


def test_parameter_counts_by_hand():
    smollm2 = Config(attention='gqa', vocab_size=49152, hidden_size=576, intermediate_size=1536,
                     num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3)
    with torch.device('meta'):
        table = parameter_table(Transformer(smollm2))
    assert table['total'] == table['active'] == 134_515_008     # as published
    model = make('mla-qlora-yarn', num_nextn_predict_layers=1)
    expert = 3 * 48 * 40
    parts = {
        'attention': 4 * (48 * 22 + 22 * 6 * 20 + 48 * (20 + 8) + 20 * 6 * (12 + 14) + 6 * 14 * 48),
        'norms': 4 * (2 * 48 + 22 + 20) + 48 + 3 * 48,
        'experts and MLPs': 3 * (8 * 48 + (8 + 2) * expert) + 3 * 48 * 88 + 2 * 48 * 48,
        'embedding': 2 * V * 48,
    }
    total = sum(p.numel() for p in model.parameters())
    assert total == sum(parts.values())
    active = total - 3 * (8 - 3) * expert
    assert parameter_table(model) == {**parts, 'total': total, 'active': active}


@attentions
@pytest.mark.parametrize('feed, mtp', [('dense', 0), ('dense', 1), ('moe', 0), ('groups', 1)])
@pytest.mark.parametrize('tied', [True, False])
def test_flops_per_token_equal_the_counted_ones(attention, feed, mtp, tied):
    """Short on a CPU, so that attention is plain matmuls over T * T. The counter does not know
    grouped_mm, which does not accept this hidden_size. 128 tokens are too few to be padded."""
    model = make(attention, feed, hidden_size=50, num_nextn_predict_layers=mtp,
                 tie_word_embeddings=tied).train()
    with FlopCounterMode(display=False) as counter:
        gradients(model, *batch(1, 128))
    assert flops_per_token(model, 128) == pytest.approx(counter.get_total_flops() / 128, rel=0.02)


# ----------------------------------------------------------------- transformers and its files

def generate_there(theirs, idx):
    theirs.generation_config.eos_token_id = None        # or rows would end and be padded
    return theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=64,
                           do_sample=False, pad_token_id=0)


@pytest.mark.slow
@pytest.mark.parametrize('attention', ['gqa', 'mla', 'mla-qlora-yarn'])
@pytest.mark.parametrize('feed', ['dense', 'groups'])
@pytest.mark.parametrize('tied, mtp, lengths', [
    (True, 0, [7]), (False, 0, [1, 30]), (True, 1, [7]), (False, 2, [7])])
def test_our_models_load_in_transformers_and_generate_the_same(attention, feed, tied, mtp, lengths,
                                                               tmp_path):
    transformers = pytest.importorskip('transformers')
    ours = make(attention, feed, tie_word_embeddings=tied, num_nextn_predict_layers=mtp,
                eos_token_id=EOS)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    close(ours(tokens())[0], theirs.eval()(tokens()).logits)
    for length in lengths:
        idx = tokens(length=length)
        assert torch.equal(ours.generate(idx, 64), generate_there(theirs, idx))


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_has_its_known_loss_and_goes_on_as_in_transformers():
    transformers = pytest.importorskip('transformers')
    tokenizers = pytest.importorskip('tokenizers')
    folder = asset('smollm2')
    with open(asset('tinyshakespeare.txt'), encoding='utf-8', newline='') as f:
        text = f.read()[-111_540:]
    tokenizer = tokenizers.Tokenizer.from_file(f'{folder}/tokenizer.json')
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = Transformer.from_pretrained(folder).eval()
    _, loss = ours(ids[:8192].view(8, 1024), ids[1:8193].view(8, 1024))
    assert loss.item() == pytest.approx(3.396, abs=1e-3)        # theirs: 3.39587
    assert torch.equal(ours.generate(ids[None, :9], 64), generate_there(theirs, ids[None, :9]))


# --------------------------------------------------------------------- mistakes of the user

@pytest.mark.parametrize('settings, words', [
    (dict(attention='gqa', num_key_value_heads=4), 'num_key_value_heads=4 6'),
    (dict(MOE, num_experts_per_tok=9), 'num_experts_per_tok=9 8'),
    (dict(GROUPS, num_experts_per_tok=5), 'num_experts_per_tok=5 4'),
    (dict(qk_rope_head_dim=7), 'qk_rope_head_dim=7 even'),
    (dict(attention='gqa', head_dim=9), 'head_dim=9 even'),
    (dict(MOE, n_group=3), 'n_group=3 8'),
    (dict(MOE, n_group=8), 'n_group=8'),
    (dict(MOE, n_group=2, topk_group=3), 'topk_group=3 2'),
    (dict(rope_scaling={'rope_type': 'longrope', 'factor': 2.0}), 'rope_scaling longrope yarn'),
    (dict(rope_scaling={'rope_type': 'yarn'}), 'rope_scaling factor'),
    (dict(q_lora_rank=-3), 'q_lora_rank=-3'),
    (dict(num_attention_heads=0), 'num_attention_heads=0 1'),
    (dict(kv_lora_rank=0), 'kv_lora_rank=0 1'),
    (dict(n_routed_experts=-1), 'n_routed_experts=-1 0'),
], ids=str)
def test_impossible_settings_are_named(settings, words):
    refused(words, Config, **{**SIZES, **GQA, **MLA, **settings})


def test_too_long_an_input_is_refused():
    model = make('mla', 'dense', max_position_embeddings=23)
    assert model(tokens(length=23))[0].shape == (B, 23, V)
    refused('24 max_position_embeddings=23', model, tokens(length=24))
    refused('24 max_position_embeddings=23', model.generate, tokens(length=24), 1)
