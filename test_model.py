"""Tests of model.py, each named after what must hold. What they compare with is independent of
it: float64, loops over tokens and experts, transformers (skipped where it is not installed),
torch's FLOP counter, numbers computed by hand."""

import json, math, os, shutil, subprocess, sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from nanoseek.estimate import flops_per_token, parameter_table
from nanoseek.hf import named_views
from model import Block, Cache, Config, Experts, Transformer, rope_table, sample
from sample import compile_decoding
from support import asset, why_not_compile

pytestmark = pytest.mark.filterwarnings(
    'ignore:Initializing zero-element tensors'
)  # no shared experts: width 0

# Dims are different numbers, so that no confused one goes unseen. B * T * 3 > 64 * 8: enough for
# Experts to pad rows.
B, T, V = 5, 37, 97
SIZES = dict(
    vocab_size=V,
    hidden_size=48,
    intermediate_size=88,
    num_hidden_layers=3,
    num_attention_heads=6,
    max_position_embeddings=128,
    rms_norm_eps=1e-3,
)
GQA = dict(num_key_value_heads=2, head_dim=10)
MLA = dict(
    q_lora_rank=None, kv_lora_rank=20, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=14
)
YARN = {
    'rope_type': 'yarn',
    'factor': 4.0,
    'original_max_position_embeddings': 32,
    'beta_fast': 16,
    'beta_slow': 2,
    'mscale': 1.0,
    'mscale_all_dim': 0.8,
}
ATTENTIONS = {
    'gqa': dict(GQA, attention='gqa'),
    'linear': dict(GQA, attention='linear'),
    'mla': dict(MLA, attention='mla'),
    'mla-qlora-yarn': {**MLA, 'attention': 'mla', 'q_lora_rank': 22, 'rope_scaling': YARN},
}
MOE = dict(n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=40)
GROUPS = dict(
    MOE,
    n_shared_experts=2,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=1.7,
)
FEEDS = {'dense': {}, 'moe': MOE, 'groups': GROUPS}

attentions = pytest.mark.parametrize('attention', ATTENTIONS)
kinds = pytest.mark.parametrize('attention, feed', [(a, f) for a in ATTENTIONS for f in FEEDS])


def make(attention='mla', feed='groups', **settings):
    torch.manual_seed(1)
    settings = {
        'tie_word_embeddings': False,
        **SIZES,
        **ATTENTIONS[attention],
        **FEEDS[feed],
        **settings,
    }
    return shake(Transformer(Config(**settings)))


@torch.no_grad()
def shake(model):
    """Makes logits far from flat, and norms and router biases that do something"""
    for name, p in model.named_parameters():
        p.copy_(1 + 0.2 * torch.randn_like(p) if 'norm' in name else 4 * p)
    for name, b in model.named_buffers():
        if name.endswith('e_score_correction_bias'):
            b.copy_(0.3 * torch.randn_like(b))
    return model.eval()


def tokens(rows=B, length=T):
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(2))


def batch(rows=B, length=T):
    idx = tokens(rows, length + 1)
    return idx[:, :-1].contiguous(), idx[:, 1:].contiguous()


def gradients(model, idx, targets):
    model.zero_grad()
    loss = model(idx, targets)[1]
    loss.backward()
    return loss.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def close(a, b, tolerance=1e-5):
    """Equal up to tolerance times the largest value"""
    a, b = a.detach().double(), b.detach().double()
    error, size = ((a - b).abs().max().item(), b.abs().max().item()) if a.numel() else (0, 0)
    assert a.shape == b.shape and error <= tolerance * size, (error, size)


def refused(words, call, *args, **kwargs):
    with pytest.raises(ValueError) as error:
        call(*args, **kwargs)
    assert all(word in str(error.value) for word in words.split()), error.value


# ---------------------------------------------------------------------------------------- Attention


def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def attention_reference(attn, x, rope, kind):
    """x (B, T, D) float64 -> (B, T, D), head by head; MLA by eq. 1-11 of DeepSeek-V3's report"""
    w = {name.removesuffix('.weight'): p.detach().double() for name, p in attn.named_parameters()}
    H, dn, R, phase, heads = 6, 12, 20, torch.complex(*rope.double()), []
    if 'mla' in kind:
        q = x @ w['q_a_proj' if 'qlora' in kind else 'q_proj'].T
        q = rms(q, w['q_a_layernorm'], 1e-6) @ w['q_b_proj'].T if 'qlora' in kind else q
        latent = x @ w['kv_a_proj_with_mqa'].T
        kv = rms(latent[..., :R], w['kv_a_layernorm'], 1e-6) @ w['kv_b_proj'].T
        turn = lambda x: torch.view_as_real(
            torch.complex(x[..., ::2], x[..., 1::2]) * phase
        ).flatten(-2)  # pairs
        q = [torch.cat((q[..., :dn], turn(q[..., dn:])), -1) for q in q.chunk(H, -1)]
        k = [torch.cat((kv[..., :dn], turn(latent[..., R:])), -1) for kv in kv.chunk(H, -1)]
        v = [kv[..., dn:] for kv in kv.chunk(H, -1)]
    else:
        turn = lambda x: torch.view_as_real(torch.complex(*x.chunk(2, -1)) * phase).flatten(
            -2
        )  # halves
        q, k, v = ((x @ w[name].T).split(10, -1) for name in ('q_proj', 'k_proj', 'v_proj'))
        q, k, v = (
            [turn(q) for q in q],
            [turn(k[h // 3]) for h in range(H)],
            [v[h // 3] for h in range(H)],
        )
    for q, k, v in zip(q, k, v):
        if kind == 'linear':
            a = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
        else:
            m = 0.1 * 0.8 * math.log(4) + 1 if 'yarn' in kind else 1
            a = (q @ k.mT * m * m / q.shape[-1] ** 0.5).exp().tril()
        heads.append(a @ v / a.sum(-1, keepdim=True))
    return torch.cat(heads, -1) @ w['o_proj'].T


@attentions
@pytest.mark.parametrize(
    'pieces',
    [(T,), (300,), (530,), (20, 1, 9, 70, 430), (1,) * 530],
    ids=['T', '300', '530', 'cut', 'decode'],
)
def test_attention_equals_float64_reference_however_it_is_cut(attention, pieces):
    model, x, out = (
        make(attention, 'dense', max_position_embeddings=530),
        torch.randn(2, sum(pieces), 48),
        [],
    )
    attn, cache = (
        model.model.layers[1].self_attn,
        Cache(model.config, 2, sum(pieces), x, torch.float32),
    )
    for piece in x.split(pieces, 1):
        end = cache.length + piece.shape[1]
        out.append(attn(piece, model.rope[:, cache.length : end], cache, 1))
        cache.length = end
    close(torch.cat(out, 1), attention_reference(attn, x.double(), model.rope[:, :end], attention))


@attentions
@pytest.mark.parametrize('length', [T, 70, 300, 530])
def test_attention_gradient_equals_float64_reference(attention, length):
    model, x = (
        make(attention, 'dense', max_position_embeddings=530),
        torch.randn(2, length, 48, requires_grad=True),
    )
    attn, rope, wanted = (
        model.model.layers[1].self_attn,
        model.rope[:, :length],
        x.detach().double().requires_grad_(),
    )
    up = torch.randn(2, length, 48)
    (attn(x, rope) * up).sum().backward()
    (attention_reference(attn, wanted, rope, attention) * up).sum().backward()
    close(x.grad, wanted.grad, 1e-4)


@pytest.mark.parametrize('new', [1, 9, T])
def test_absorbed_mla_equals_expanded(new):
    attn = make('mla-qlora-yarn', 'dense').model.layers[0].self_attn
    inputs = [torch.randn(shape) for shape in ((B, 6, new, 12), (B, 6, new, 8), (B, T, 28))]
    *queries, kv = inputs
    close(
        attn.attend_absorbed(*queries, kv), attn.attend_expanded(*queries, *kv.split((20, 8), -1))
    )


def test_linear_attention_costs_linear_in_length():
    def growth(attention):  # up to 512 the others are matmuls, which the counter knows
        flops, model = [], make(attention, 'dense', max_position_embeddings=512)
        for length in (128, 512):
            with FlopCounterMode(display=False) as counter:
                model(tokens(1, length))
            flops.append(counter.get_total_flops())
        return flops[1] / flops[0]

    assert growth('linear') <= 4.2 < 6 < growth('gqa')


@kinds
def test_no_token_sees_the_future_and_all_see_the_past(attention, feed):
    model, idx = make(attention, feed), tokens()
    future, past = idx.clone(), idx.clone()
    future[:, 20:], past[:, 0] = (idx[:, 20:] + 1) % V, (idx[:, 0] + 1) % V
    future, past = (model(idx)[0] - model(changed)[0] for changed in (future, past))
    assert future[:, :20].abs().max() < 1e-5 and (future[:, 20:].abs().amax(-1) > 1e-3).all()
    assert (past.abs().amax((0, 2)) > 1e-4).all()


@kinds
def test_chunks_on_a_cache_equal_one_forward(attention, feed):
    model, idx = make(attention, feed), tokens()
    cache = Cache(model.config, B, T, model.head, torch.float32)
    h = torch.cat([model.hidden(piece, cache)[0] for piece in idx.split((11, 1, 1, 17, 7), 1)], 1)
    close(model.lm_head(h), model(idx)[0])


# ----------------------------------------------------------------------------------- Document masks

EOS = 11
PACKED = {
    'short': [(9, 1, 20, 1, 6), (37,), (1, 1, 35)],
    'middle': [(128, 1, 100, 71), (1, 299), (300,)],
    'long': [(300, 1, 200, 59), (1, 520, 39), (560,)],
}
packings = pytest.mark.parametrize('packing', PACKED)
masked = pytest.mark.parametrize(
    'attention, feed', [('gqa', 'dense'), ('mla', 'dense'), ('mla-qlora-yarn', 'groups')]
)


def pack(packing):
    """-> tokens (3, T), and (row, begin, end) of their documents: each ends with EOS, but for the
    last one of a row"""
    rows, documents = PACKED[packing], []
    idx = tokens(len(rows), sum(rows[0]))
    idx[idx == EOS] = EOS + 1
    for row, lengths in enumerate(rows):
        ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
        documents += [(row, end - length, end) for length, end in zip(lengths, ends)]
        idx[row, [end - 1 for end in ends[:-1]]] = EOS
    return idx, documents


def make_masked(attention, feed='dense', **settings):
    model = make(
        attention, feed, **{'eos_token_id': EOS, 'max_position_embeddings': 600, **settings}
    )
    model.doc_attention_mask = True
    return model


@packings
@masked
def test_packed_documents_equal_each_alone(attention, feed, packing):
    model, (idx, documents) = make_masked(attention, feed), pack(packing)
    targets, packed, losses = tokens(len(idx), idx.shape[1] + 1)[:, 1:], model(idx)[0], []
    loss, grads = gradients(model, idx, targets)
    model.doc_attention_mask = False
    model.zero_grad()
    for row, begin, end in documents:
        alone, wanted = idx[row : row + 1, begin:end], targets[row : row + 1, begin:end]
        close(packed[row : row + 1, begin:end], model(alone)[0], 1e-4)  # RoPE's angles are rounded
        losses.append(model(alone, wanted)[1] * alone.numel() / idx.numel())
    sum(losses).backward()
    close(loss, sum(losses))
    for name, p in model.named_parameters():
        if p.grad is not None:
            close(grads[name], p.grad, 3e-4)


@pytest.mark.parametrize('amp', [False, True])
@packings
@masked
def test_no_document_sees_another(attention, feed, packing, amp):
    model, (idx, documents) = make_masked(attention, feed), pack(packing)
    changed, (row, begin, end) = idx.clone(), documents[0]
    changed[row, begin : end - 1] = (idx[row, begin : end - 1] + 1) % V
    changed[changed == EOS] = EOS + 1  # what ended a document still does, and nothing else
    changed[idx == EOS] = EOS
    with torch.autocast('cpu', torch.bfloat16, enabled=amp), torch.no_grad():
        difference = (model(changed)[0] - model(idx)[0]).abs().amax(-1)
        assert difference[row, end:].max() < 1e-5 < 1e-2 < difference[row, begin:end].max()
        model.doc_attention_mask = False
        assert (model(changed)[0] - model(idx)[0]).abs().amax(-1)[row, end:].max() > 1e-2


@masked
def test_document_mask_equals_transformers_with_that_mask(attention, feed, tmp_path):
    transformers = pytest.importorskip('transformers')
    ours, (idx, documents) = make_masked(attention, feed), pack('short')
    mask = torch.full((len(idx), 1, *[idx.shape[1]] * 2), torch.finfo(torch.float32).min)
    for row, begin, end in documents:
        for t in range(begin, end):
            mask[row, 0, t, begin : t + 1] = 0
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation='eager'
    ).eval()
    close(ours(idx)[0], theirs(idx, attention_mask=mask).logits)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:flex_attention called without')
@pytest.mark.parametrize('compiled', [False, True])
@packings
@pytest.mark.parametrize('attention', ['gqa', 'mla-qlora-yarn'])
@torch.no_grad()
def test_flex_attention_equals_the_additive_mask(attention, packing, compiled):
    model, (idx, _) = make_masked(attention), pack(packing)  # no T is a multiple of 128
    x, rope, layer = (
        model.model.embed_tokens(idx),
        model.rope[:, : idx.shape[1]],
        model.model.layers[1],
    )
    flex = lambda idx: layer(x, rope, mask=model.document_mask(idx, flex=True))[0]
    flex = (
        torch.compile(flex, backend='eager', fullgraph=True) if compiled else flex
    )  # fullgraph: can be traced
    close(flex(idx), layer(x, rope, mask=model.document_mask(idx))[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('checkpointed', [False, True])
@packings
@pytest.mark.parametrize('attention', ['gqa', 'mla'])
def test_document_mask_on_a_gpu_equals_the_one_on_a_cpu(attention, packing, checkpointed, compiled):
    size = (
        dict(head_dim=16) if attention == 'gqa' else dict(qk_nope_head_dim=16, v_head_dim=20)
    )  # at least 16
    model, (idx, _) = (
        make_masked(attention, num_nextn_predict_layers=1, **size).train(),
        pack(packing),
    )
    loss, grads = gradients(model, idx, idx.roll(-1, 1))
    model.cuda().gradient_checkpointing = checkpointed
    forward = torch.compile(model) if compiled else model
    model.zero_grad()
    again = forward(idx.cuda(), idx.roll(-1, 1).cuda())[1]
    again.backward()
    close(again.cpu(), loss, 1e-4)
    for name, p in model.named_parameters():
        close(p.grad.cpu(), grads[name], 2e-3)


@packings
@masked
def test_document_mask_with_gradient_checkpointing_changes_nothing(attention, feed, packing):
    model, (idx, _) = (
        make_masked(attention, feed, num_nextn_predict_layers=2).train(),
        pack(packing),
    )
    loss, grads = gradients(model, idx, idx.roll(-1, 1))
    model.gradient_checkpointing = True
    again, grads2 = gradients(model, idx, idx.roll(-1, 1))
    assert torch.equal(loss, again) and all(
        torch.equal(grads[name], grads2[name]) for name in grads
    )


@masked
def test_mtp_of_packed_documents_equals_its_attention_over_each_alone(attention, feed):
    model, (idx, documents) = (
        make_masked(attention, feed, num_nextn_predict_layers=2).train(),
        pack('short'),
    )
    targets, losses, embed = idx.roll(-1, 1), [], model.model.embed_tokens
    h, rows = model.hidden(idx)[0], range(len(idx))
    for k in (1, 2):
        mtp, last = model.model.layers[2 + k], idx.shape[1] - k
        x = (
            torch.cat(
                (
                    rms(embed(targets[:, k - 1 : -1]), mtp.enorm.weight, 1e-3),
                    rms(h[:, :last], mtp.hnorm.weight, 1e-3),
                ),
                -1,
            )
            @ mtp.eh_proj.weight.T
        )
        h = x.clone()
        for row, begin, end in documents:  # no mask, but no more than the document's own rows
            if begin < last:
                own = slice(begin, min(end, last))
                h[row, own] = Block.forward(mtp, x[row : row + 1, own], model.rope[:, own])[0][0]
        h = rms(h, mtp.shared_head['norm'].weight, 1e-3)
        p = (h @ model.lm_head.weight.T).double().log_softmax(-1)
        losses.append(
            -sum(p[b, i, targets[b, i + k]] for b in rows for i in range(last)) / (len(rows) * last)
        )
    model(idx, targets)
    close(model.losses['mtp'], sum(losses) / 2)
    packed = model.losses['mtp']
    model.doc_attention_mask = False
    model(idx, targets)
    assert abs(model.losses['mtp'] - packed) > 1e-3


def test_document_mask_is_refused_where_it_cannot_be():
    for attention, eos, words in (
        ('linear', EOS, 'attention=linear'),
        ('mla', None, 'eos_token_id=None'),
    ):
        model = make_masked(attention, eos_token_id=eos)
        refused(f'doc_attention_mask=True {words}', model, tokens())
        refused(
            f'doc_attention_mask=True {words}', model.document_mask, tokens(1, 1)
        )  # what a script can ask first
        model.doc_attention_mask = False
        assert model.document_mask(tokens()) is None and model(tokens())[0].isfinite().all()


@masked
def test_generation_takes_no_notice_of_the_document_mask(attention, feed):
    model, idx = make_masked(attention, feed), tokens(length=7)
    idx[idx == EOS] = EOS + 1
    found = model.generate(idx, 30)
    model.doc_attention_mask = False
    assert torch.equal(found, model.generate(idx, 30))


# --------------------------------------------------------------------------------------- Generation


def check_greedy(model, out, prompt, room):
    """Each token is the likeliest behind those before it, by a forward without a cache; but for
    ties"""
    begin = 0
    for t in range(prompt, out.shape[1]):
        begin = t - (room + 1) // 2 if t - begin > room else begin  # full: from the last half
        logits = model(out[:, begin:t])[0][:, -1]
        assert (logits.amax(-1) - logits.gather(1, out[:, t : t + 1])[:, 0]).max() < 1e-4
    assert out[:, prompt:].unique().numel() > 5  # a model that repeats itself would prove little


@pytest.mark.slow
@kinds
@pytest.mark.parametrize('room, prompt, new', [(128, 7, 20), (23, 7, 45), (23, 23, 20)])
def test_cached_generation_equals_uncached(attention, feed, room, prompt, new):
    model, idx = make(attention, feed, max_position_embeddings=room), tokens(length=prompt)
    out = model.generate(idx, new)
    assert out.shape == (B, prompt + new) and torch.equal(out[:, :prompt], idx)
    check_greedy(model, out, prompt, room)


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not_compile()), reason=why_not_compile())
@pytest.mark.parametrize('attention, feed', [('mla', 'moe'), ('gqa', 'dense')])
def test_compiled_decoding_gives_the_same_text_and_compiles_once(attention, feed):
    model, idx = (
        make(attention, feed, max_position_embeddings=23, num_hidden_layers=1),
        tokens(1, 7),
    )
    assert compile_decoding(model) is None
    with torch._dynamo.config.patch(error_on_recompile=True):
        out = model.generate(idx, 45)  # beyond the context's end, twice
    check_greedy(model, out, 7, 23)


@pytest.mark.parametrize('rows', [1, B])
def test_stop_token_ends_rows_and_repeats(rows):
    model, idx = make('mla', 'moe'), tokens(rows, 7)
    free = model.generate(idx, 40)
    for stop in free[0, 7:].unique().tolist():
        ends = [7 + row.tolist().index(stop) + 1 if stop in row else 47 for row in free[:, 7:]]
        want = free[:, : max(ends)].clone()
        for row, end in zip(want, ends):
            row[end:] = stop
        assert torch.equal(model.generate(idx, 40, stop=stop), want)


def test_narrowest_sampling_is_greedy():
    model, idx = make('gqa', 'moe'), tokens(length=7)
    greedy, narrow, nucleus, free = (
        model.generate(idx, 20, **settings)
        for settings in (
            {},
            dict(temperature=1.0, top_k=1),
            dict(temperature=1.0, top_p=1e-6),
            dict(temperature=1.0),
        )
    )
    assert (
        torch.equal(narrow, greedy)
        and torch.equal(nucleus, greedy)
        and not torch.equal(free, greedy)
    )


@pytest.mark.parametrize(
    'top_k, top_p', [(None, None), (5, None), (None, 0.8), (12, 0.8), (500, 1.0)]
)
def test_sampling_follows_the_truncated_distribution(top_k, top_p, n=40000):
    torch.manual_seed(3)
    logits, kept, mass = 2 * torch.randn(V), {}, 0.0
    p = {i: math.exp(logits[i] / 0.7) for i in logits.argsort(descending=True).tolist()[:top_k]}
    for i in p:  # the fewest tokens that make up top_p
        if top_p is None or mass < top_p * sum(p.values()):
            kept[i], mass = p[i], mass + p[i]
    count = torch.bincount(
        sample(logits.expand(n, V), 0.7, top_k, top_p)[:, 0], minlength=V
    ).tolist()
    for i in range(V):
        want = kept.get(i, 0.0) / mass
        assert abs(count[i] / n - want) <= 5 * (want * (1 - want) / n) ** 0.5  # exactly 0 outside


# ----------------------------------------------------------------------- Experts, router, balancing


def experts_reference(x, weights, ids, gate_up, down):
    y = torch.zeros_like(x)
    for e in range(len(down)):
        row, choice = (ids == e).nonzero(as_tuple=True)
        gate, up = (x[row] @ gate_up[e].T).chunk(2, -1)
        y = y.index_add(
            0, row, weights[row, choice, None] * ((gate * gate.sigmoid() * up) @ down[e].T)
        )
    return y


@pytest.mark.parametrize(
    'hidden, width', [(48, 40), (50, 40), (48, 42)]
)  # 50, 42: unaligned, a loop
@pytest.mark.parametrize('n', [3000, B * T, 19, 1])  # gaps to multiples of 128, of 64, no gaps
@pytest.mark.parametrize('routing', ['random', 'idle', 'same'])
def test_experts_equal_a_loop_and_drop_nothing(hidden, width, n, routing):
    torch.manual_seed(4)
    experts = Experts(
        Config(**{**SIZES, **MOE, 'hidden_size': hidden, 'moe_intermediate_size': width})
    )
    score = torch.rand(n, 8) * torch.tensor([1.0, 1, 1, 1, 1, routing != 'idle', 1, 1])
    ids = (score[:1].expand(n, 8) if routing == 'same' else score).topk(3, -1).indices
    inputs = (
        torch.randn(n, hidden),
        torch.rand(n, 3) + 0.1,
        *(torch.randn(p.shape) * 0.3 for p in experts.parameters()),
    )
    ours, theirs = (
        [x.to(dtype).requires_grad_() for x in inputs] for dtype in (torch.float32, torch.float64)
    )
    parameters = dict(zip(('gate_up_proj', 'down_proj'), ours[2:]))
    y, load = torch.func.functional_call(experts, parameters, (ours[0], ours[1], ids))
    want = experts_reference(theirs[0], theirs[1], ids, *theirs[2:])
    close(y, want)
    assert torch.equal(load, torch.bincount(ids.flatten(), minlength=8)) and load.sum() == n * 3
    direction = torch.randn(n, hidden)
    for a, b in zip(
        torch.autograd.grad(y, ours, direction),
        torch.autograd.grad(want, theirs, direction.double()),
    ):
        close(a, b)


@pytest.mark.parametrize('norm', [True, False])
@pytest.mark.parametrize('groups, keep', [(1, 1), (4, 2), (2, 1)])
def test_router_equals_reference_and_its_bias_chooses_but_never_weighs(groups, keep, norm):
    model = make(
        'mla',
        'moe',
        n_group=groups,
        topk_group=keep,
        norm_topk_prob=norm,
        routed_scaling_factor=2.5,
    )
    gate, x, size = model.moe_layers[0].gate, torch.randn(60, 48), 8 // groups
    assert not gate.e_score_correction_bias.requires_grad
    gate.e_score_correction_bias -= 1  # below zero too, groups that are out must stay out
    bias, (weights, ids, affinity) = gate.e_score_correction_bias.tolist(), gate(x)
    for n, row in enumerate((x.double() @ gate.weight.detach().double().T).tolist()):
        s = [1 / (1 + math.exp(-z)) for z in row]  # eq. 15
        choice = [a + b for a, b in zip(s, bias)]
        worth = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
        allowed = [
            e for e in range(8) if e // size in sorted(range(groups), key=worth.__getitem__)[-keep:]
        ]
        chosen = sorted(allowed, key=choice.__getitem__)[-3:]  # eq. 14, 16
        total = sum(s[e] for e in chosen) if norm else 1.0
        got = dict(zip(ids[n].tolist(), weights[n].tolist()))
        assert got == pytest.approx({e: 2.5 * s[e] / total for e in chosen}, rel=1e-5)  # eq. 13
        assert affinity[n].tolist() == pytest.approx(s, rel=1e-5)


def test_router_is_float32_under_autocast_and_in_a_bfloat16_model():
    model, x = make('mla-qlora-yarn'), torch.randn(60, 48).bfloat16()
    gate, logits, kept = (
        model.moe_layers[0].gate,
        model(tokens())[0],
        {n: b.clone() for n, b in model.named_buffers()},
    )
    want = gate(x.float())
    with torch.autocast('cpu', torch.bfloat16):
        got = gate(x)
    assert got[0].dtype == torch.float32 and all(torch.equal(a, b) for a, b in zip(got, want))
    assert 'rope' in kept and sum('bias' in n for n in kept) == 2
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model.to(dtype)
        assert all(
            b.dtype == kept[n].dtype and torch.equal(b, kept[n]) for n, b in model.named_buffers()
        )
        assert gate(x.to(dtype))[0].dtype == torch.float32 and model.lm_head.weight.dtype == dtype
        close(model(tokens())[0], logits, 0.2)


def test_balance_loss_equals_reference_and_moves_only_the_affinities():
    moe = make('mla', seq_aux_loss_weight=0.7).moe_layers[0]
    affinity, ids, want = (
        torch.rand(B * T, 8, requires_grad=True),
        torch.rand(B * T, 8).topk(3, -1).indices,
        0,
    )
    s = affinity.detach().double().requires_grad_()
    for rows in torch.arange(B * T).view(B, T):
        for e in range(8):
            f = 8 / (3 * T) * sum(e in ids[t] for t in rows)  # eq. 18
            want = (
                want + 0.7 / B * f * sum(s[t, e] / s[t].sum() for t in rows) / T
            )  # eq. 17, 19, 20
    loss = moe.balance_loss(affinity, ids, B)
    close(loss, want)
    close(torch.autograd.grad(loss, affinity)[0], torch.autograd.grad(want, s)[0])


def test_router_bias_steps_against_the_load_until_it_is_balanced():
    model = make('mla', 'moe', num_hidden_layers=1, bias_update_speed=0.01)
    gate, x = model.moe_layers[0].gate, torch.randn(400, 48) + 2 * torch.randn(48)
    bias, spread, start = gate.e_score_correction_bias, [], gate.e_score_correction_bias.clone()
    for load, step in (
        ([10] + [20] * 6 + [30], [1.0] + [0] * 6 + [-1]),
        ([80] + [0] * 7, [-1.75] + [0.25] * 7),
    ):
        before = bias.clone()
        model.update_router_bias(torch.tensor([load]))
        close(bias - before, 0.01 * torch.tensor(step))
    for _ in range(150):
        load = torch.bincount(gate(x)[1].flatten(), minlength=8)
        model.update_router_bias(load[None])
        spread.append(load.max().item() / load.float().mean().item())
    assert spread[0] > 2 and spread[-1] < 1.2 and abs(bias.mean() - start.mean()) < 1e-6


@pytest.mark.parametrize('mtp', [0, 2])
def test_load_counts_every_choice_once_in_training_only(mtp):
    model, seen = make('mla', num_nextn_predict_layers=mtp), []
    for m in model.moe_layers:
        m.gate.register_forward_hook(
            lambda gate, args, out: seen.append(torch.bincount(out[1].flatten(), minlength=8))
        )
    model(*batch()), model(tokens()), model.generate(tokens(length=3), 4)
    assert model.expert_load.shape == (2 + mtp, 8) and not model.expert_load.any()
    seen.clear()
    model.train()(*batch())
    assert model.expert_load.sum(1).tolist() == [B * n * 3 for n in (T, T, T - 1, T - 2)[: 2 + mtp]]
    assert torch.equal(model.expert_load, torch.stack(seen))
    model(*batch())
    assert torch.equal(
        model.expert_load, 2 * torch.stack(seen[: 2 + mtp])
    )  # adds up over micro-batches


@attentions
@pytest.mark.parametrize('mtp', [0, 1])
def test_training_step_is_deterministic_also_with_gradient_checkpointing(attention, mtp):
    model, results, passes = make(attention, num_nextn_predict_layers=mtp).train(), [], []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *args: passes.append(1))
    for model.gradient_checkpointing in (False, False, True):
        results.append((*gradients(model, *batch()), model.expert_load.clone()))
        model.expert_load.zero_()
    loss, grads, load = results[0]
    for loss2, grads2, load2 in results[1:]:
        assert torch.equal(loss, loss2) and torch.equal(load, load2) and load.any()
        assert all(torch.equal(grads[n], grads2[n]) for n in grads)
    assert len(passes) == 1 + 1 + 2  # recomputed, where asked for


# ------------------------------------------------------------------------------------------- Losses


def test_a_batch_with_nothing_to_predict_is_no_nan():
    model, (idx, targets) = make('mla', num_nextn_predict_layers=2).train(), batch()
    loss, grads = gradients(model, idx, targets.fill_(-100))
    assert loss.isfinite() and all(g.isfinite().all() for g in grads.values())
    assert model.losses['main'] == 0 and model.losses['mtp'] == 0


@kinds
@pytest.mark.parametrize('depth', [1, 2])
def test_mtp_loss_equals_reference(attention, feed, depth):
    model, sequence = (
        make(attention, feed, num_nextn_predict_layers=depth).train(),
        tokens(length=T + 1),
    )
    h, losses, embed = model.hidden(sequence[:, :T])[0], [], model.model.embed_tokens
    for k in range(1, depth + 1):
        mtp, rows = model.model.layers[2 + k], range(T - k)
        x = [
            (
                rms(embed(sequence[:, i + k]), mtp.enorm.weight, 1e-3),
                rms(h[:, i], mtp.hnorm.weight, 1e-3),
            )
            for i in rows
        ]
        x = torch.stack([torch.cat(pair, -1) for pair in x], 1) @ mtp.eh_proj.weight.T  # eq. 21
        h = Block.forward(mtp, x, model.rope[:, : T - k])[0]  # eq. 22
        h = rms(h, mtp.shared_head['norm'].weight, 1e-3)
        p = (h @ model.lm_head.weight.T).double().log_softmax(-1)  # eq. 23
        losses.append(
            -sum(p[b, i, sequence[b, i + k + 1]] for b in range(B) for i in rows) / (B * (T - k))
        )  # eq. 24
    model(sequence[:, :T], sequence[:, 1:])
    close(model.losses['mtp'], sum(losses) / depth)  # eq. 25


@kinds
def test_training_loss_is_the_sum_of_its_parts_and_eval_the_plain_one(attention, feed):
    model = make(
        attention, feed, num_nextn_predict_layers=1, mtp_loss_weight=0.4, seq_aux_loss_weight=0.05
    )
    idx, targets = batch()
    targets[:, ::5] = -100
    logits, none = model(idx)
    assert none is None and logits.shape == (B, T, V) and logits.dtype == torch.float32
    plain = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten())
    close(model(idx, targets)[1], plain)
    loss, parts = model.train()(idx, targets)[1], model.losses
    close(parts['main'], plain)
    close(loss, parts['main'] + 0.4 * parts['mtp'] + parts.get('balance', torch.zeros(())))
    assert parts['mtp'] > 1 and parts.get('balance', 0) >= 0.05 * 0.9 * len(
        model.moe_layers
    )  # about alpha a layer


@pytest.mark.slow
def test_small_model_overfits_one_batch():
    torch.manual_seed(7)
    model = Transformer(
        Config(**{**SIZES, **MLA, **GROUPS, 'num_nextn_predict_layers': 1, 'num_hidden_layers': 2})
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(200):
        model.train()(*batch(rows=3))[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.update_router_bias(model.expert_load)
        model.expert_load.zero_()
    assert model.losses['main'] < 0.1 and model.losses['mtp'] < 0.2


# -------------------------------------------------------------------------------- Positions, counts


@pytest.mark.parametrize(
    'drop', [(), ('mscale', 'mscale_all_dim'), ('mscale',), ('beta_fast', 'beta_slow')]
)
@pytest.mark.parametrize(
    'more', [{}, {'attention_factor': 1.3}, {'original_max_position_embeddings': 32}]
)
def test_yarn_equals_transformers(drop, more):
    transformers = pytest.importorskip('transformers')
    yarn = {
        k: v
        for k, v in {**YARN, 'original_max_position_embeddings': 4096, **more}.items()
        if k not in drop
    }
    config = transformers.LlamaConfig(head_dim=64, rope_parameters={**yarn, 'rope_theta': 5000.0})
    freq, scale = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS['yarn'](config, 'cpu')
    cos, sin = rope_table(Config(**SIZES, rope_theta=5000.0, rope_scaling=yarn), 64)
    angle = torch.arange(128).double()[:, None] * freq.double()
    assert (cos - angle.cos() * scale).abs().max() < 3e-5 and (
        sin - angle.sin() * scale
    ).abs().max() < 3e-5


def test_positions_by_hand():
    cos, sin = rope_table(Config(**SIZES, **ATTENTIONS['gqa'], rope_theta=500.0), 10)
    angle = (
        torch.arange(128).double()[:, None]
        * torch.tensor([500.0 ** (-2 * i / 10) for i in range(5)]).double()
    )
    assert (cos - angle.cos()).abs().max() < 2e-5 and (sin - angle.sin()).abs().max() < 2e-5
    yarn = YARN | {
        'factor': 40,
        'original_max_position_embeddings': 4096,
        'mscale': 1.0,
        'mscale_all_dim': 1.0,
    }  # V3's
    model = make('mla', 'dense', rope_scaling=yarn)
    assert model.model.layers[0].self_attn.scale * 20**0.5 == pytest.approx(1.87385, abs=1e-5)
    assert model.rope.abs().max() == 1  # the two mscales cancel in cos and sin


def test_parameter_counts_by_hand():
    smollm2 = Config(
        attention='gqa',
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    with torch.device('meta'):
        table = parameter_table(Transformer(smollm2))
    assert table['total'] == table['active'] == 134_515_008  # as published
    model, expert = make('mla-qlora-yarn', num_nextn_predict_layers=1), 3 * 48 * 40
    parts = dict(
        attention=4 * (48 * 22 + 22 * 6 * 20 + 48 * (20 + 8) + 20 * 6 * (12 + 14) + 6 * 14 * 48),
        norms=4 * (2 * 48 + 22 + 20) + 48 + 3 * 48,
        moe=3 * (8 * 48 + (8 + 2) * expert),
        mlp=3 * 48 * 88,
        embedding=2 * V * 48,
        mtp=2 * 48 * 48,
    )
    total = sum(p.numel() for p in model.parameters())
    assert total == sum(parts.values())
    assert parameter_table(model) == parts | {
        'total': total,
        'active': total - 3 * (8 - 3) * expert,
    }


@attentions
@pytest.mark.parametrize('feed, mtp', [('dense', 0), ('dense', 1), ('moe', 0), ('groups', 1)])
@pytest.mark.parametrize('tied', [True, False])
def test_flops_per_token_equal_the_counted_ones(attention, feed, mtp, tied):
    """A training step, forward and backward. Short on a CPU, so that attention is plain matmuls
    over T * T; hidden_size is none that grouped_mm takes, as the counter knows plain matmuls
    only; 128 tokens are too few to be padded"""
    model = make(
        attention, feed, hidden_size=50, num_nextn_predict_layers=mtp, tie_word_embeddings=tied
    ).train()
    with FlopCounterMode(display=False) as counter:
        gradients(model, *batch(1, 128))
    assert flops_per_token(model, 128) == pytest.approx(counter.get_total_flops() / 128, rel=0.02)


# -------------------------------------------------------------------------- Files, and transformers

BASE = {'rope_type': 'default', 'rope_theta': 10000.0, 'partial_rotary_factor': 1.0}
LLAMA_YARN = {k: v for k, v in YARN.items() if 'mscale' not in k} | {'rope_theta': 5000.0}
HF = {
    'llama': ('Llama', GQA),
    'llama-tied-yarn': (
        'Llama',
        dict(num_key_value_heads=3, tie_word_embeddings=True, rope_parameters=LLAMA_YARN),
    ),
    'glm4': ('Glm4Moe', dict(GROUPS, **GQA, rope_parameters=BASE)),
    'deepseek': ('DeepseekV3', dict(GROUPS, **MLA)),
    'deepseek-yarn': (
        'DeepseekV3',
        {
            **GROUPS,
            **MLA,
            'q_lora_rank': 22,
            'tie_word_embeddings': True,
            'rope_parameters': {**YARN, 'rope_theta': 5000.0},
        },
    ),
    'deepseek-dense': (
        'DeepseekV3',
        {**GROUPS, **MLA, 'first_k_dense_replace': 3, 'num_nextn_predict_layers': 0},
    ),
    'deepseek-unshared': ('DeepseekV3', {**GROUPS, **MLA, 'n_shared_experts': 0}),
}
HF |= {
    f'{k}-halves': ('DeepseekV3', {**HF[k][1], 'rope_interleave': False})
    for k in ('deepseek', 'deepseek-yarn')
}


def load_theirs(directory, ours):
    """-> transformers' model, whose logits are those of ours, and the keys that are wrong"""
    transformers = pytest.importorskip('transformers')
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True
    )
    close(ours(tokens())[0], theirs.eval()(tokens()).logits)
    return theirs, {kind: keys for kind, keys in info.items() if keys}


def greedy(theirs, idx):
    theirs.generation_config.eos_token_id = None  # or rows would end and be padded
    mask = torch.ones_like(idx)
    return theirs.generate(
        idx, attention_mask=mask, max_new_tokens=64, do_sample=False, pad_token_id=0
    )


def paired(name, rows, dr=8):
    """Rows that transformers turns as halves, of one head or six: of the last dr, i goes to 2i, i
    + dr/2 to 2i + 1"""
    if not any(part in name for part in ('q_proj', 'q_b_proj', 'kv_a_proj_with_mqa')):
        return rows
    out, size = rows.clone(), len(rows) // (1 if 'kv_a' in name else 6)
    for first in range(size - dr, len(rows), size):
        for i in range(dr // 2):
            out[first + 2 * i], out[first + 2 * i + 1] = rows[first + i], rows[first + i + dr // 2]
    return out


@pytest.mark.parametrize('kind', HF)
def test_transformers_models_load_with_equal_logits_and_gradients_and_go_back(
    kind, tmp_path, caplog
):
    transformers, (name, settings), (idx, targets) = (
        pytest.importorskip('transformers'),
        HF[kind],
        batch(),
    )
    torch.manual_seed(8)
    config = getattr(transformers, f'{name}Config')(**SIZES, **settings)
    theirs = shake(getattr(transformers, f'{name}ForCausalLM')(config))
    theirs.save_pretrained(tmp_path / 'theirs')
    caplog.clear()
    ours, said = Transformer.from_pretrained(tmp_path / 'theirs').eval(), caplog.messages
    promised = config.to_dict().get('num_nextn_predict_layers')
    assert len(said) == bool(promised) and all('MTP layers' in line for line in said)
    assert not ours.config.num_nextn_predict_layers
    if promised:  # and asked for, they are missed by name
        refused(
            'model.layers.3. (48,)',
            Transformer.from_pretrained,
            tmp_path / 'theirs',
            num_nextn_predict_layers=1,
        )
    close(ours(tokens())[0], theirs(tokens()).logits)
    grads = {name: g for name, g in gradients(ours, idx, targets)[1].items() if g.numel()}
    F.cross_entropy(theirs(idx).logits.flatten(0, 1), targets.flatten()).backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.numel()}
    assert wanted.keys() == grads.keys()  # transformers stacks the experts too
    for name in wanted:
        close(grads[name], paired(name, wanted[name]) if 'halves' in kind else wanted[name], 1e-4)
    ours.save_pretrained(tmp_path / 'ours')
    again, wrong = load_theirs(tmp_path / 'ours', ours)
    interleave = json.loads((tmp_path / 'ours/config.json').read_text()).get('rope_interleave')
    assert interleave is (True if 'deepseek' in kind else None)
    assert type(again) is type(theirs) and not wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    'attention, feed', [(a, f) for a in ATTENTIONS if a != 'linear' for f in FEEDS]
)
@pytest.mark.parametrize(
    'tied, mtp, lengths', [(True, 0, [7]), (False, 0, [1, 30]), (True, 1, [7]), (False, 2, [7])]
)
def test_our_models_load_in_transformers_and_generate_the_same(
    attention, feed, tied, mtp, lengths, tmp_path
):
    ours = make(
        attention, feed, tie_word_embeddings=tied, num_nextn_predict_layers=mtp, eos_token_id=11
    )
    ours.save_pretrained(tmp_path)
    theirs, wrong = load_theirs(tmp_path, ours)
    assert {name.split('.')[2] for name in wrong.pop('unexpected_keys', ())} == set(
        '34'[:mtp]
    ) and not wrong
    for idx in (tokens(length=length) for length in lengths):
        assert torch.equal(ours.generate(idx, 64), greedy(theirs, idx))


@pytest.mark.parametrize('attention', ['gqa', 'mla', 'mla-qlora-yarn'])
def test_config_json_has_two_spellings_and_either_is_enough(attention, tmp_path):
    yarn = ATTENTIONS[attention].get('rope_scaling')
    ours = make(attention, 'groups', rope_theta=500.0, bos_token_id=3, eos_token_id=11)
    ours.save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    old, new = (
        dict(rope_theta=500.0, rope_scaling=yarn, torch_dtype='float32'),
        ('rope_parameters', 'dtype'),
    )
    wanted = dict(
        old,
        dtype='float32',
        num_nextn_predict_layers=0,
        scoring_func='sigmoid',
        topk_method='noaux_tc',
        bos_token_id=3,
        eos_token_id=11,
    )
    assert wanted.items() <= config.items()
    assert (yarn or {'rope_type': 'default'}).items() | {('rope_theta', 500.0)} <= config[
        'rope_parameters'
    ].items()
    for gone in (old, new):
        (tmp_path / 'config.json').write_text(
            json.dumps({k: v for k, v in config.items() if k not in gone})
        )
        assert torch.equal(
            Transformer.from_pretrained(tmp_path).eval()(tokens())[0], ours(tokens())[0]
        )
        assert not load_theirs(tmp_path, ours)[1]


@kinds
@pytest.mark.parametrize('mtp', [0, 2])
def test_saving_and_loading_is_exact(attention, feed, mtp, tmp_path):
    model = make(attention, feed, num_nextn_predict_layers=mtp, bos_token_id=3, eos_token_id=11)
    model.save_pretrained(tmp_path / 'a')
    again = Transformer.from_pretrained(tmp_path / 'a').eval()
    assert torch.equal(again(tokens())[0], model(tokens())[0])
    assert torch.equal(
        again.train()(*batch())[1], model.train()(*batch())[1]
    )  # MTP's layers as well
    again.save_pretrained(tmp_path / 'b')
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in 'ab')
    assert a.keys() == b.keys() == {'config.json', 'model.safetensors'}
    assert a['model.safetensors'] == b['model.safetensors'] and a['config.json'] == b['config.json']


def test_shards_load_like_one_file_and_never_outlive_it(tmp_path):
    ours, other = make('mla-qlora-yarn'), make('mla-qlora-yarn')
    ours.save_pretrained(tmp_path, shard_bytes=100_000)
    sizes = [f.stat().st_size for f in tmp_path.glob('model-*.safetensors')]
    assert len(sizes) > 3 and max(sizes) < 120_000
    assert torch.equal(Transformer.from_pretrained(tmp_path).eval()(tokens())[0], ours(tokens())[0])
    assert not load_theirs(tmp_path, ours)[1]
    torch.nn.init.normal_(other.lm_head.weight)
    other.save_pretrained(tmp_path)  # one file, over the shards
    assert torch.equal(
        Transformer.from_pretrained(tmp_path).eval()(tokens())[0], other(tokens())[0]
    )


def test_bfloat16_files_keep_float32_router_biases(tmp_path):
    safetensors, model = pytest.importorskip('safetensors.torch'), make('mla')
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    again = Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, saved in safetensors.load_file(tmp_path / 'model.safetensors').items():
        assert saved.dtype == (torch.float32 if 'bias' in name else torch.bfloat16)
    saved, loaded = dict(named_views(model)), dict(named_views(again))
    assert all(torch.equal(loaded[name], saved[name].to(loaded[name].dtype)) for name in saved)
    assert all(
        torch.equal(b, dict(again.named_buffers())[name]) for name, b in model.named_buffers()
    )


# ----------------------------------------------------------------------------- SmolLM2-135M, itself


@pytest.mark.slow
def test_smollm2_has_its_known_loss_and_goes_on_as_in_transformers():
    transformers, tokenizers = (
        pytest.importorskip('transformers'),
        pytest.importorskip('tokenizers'),
    )
    folder, text = (
        asset('smollm2'),
        Path(asset('tinyshakespeare.txt')).read_bytes().decode()[-111_540:],
    )
    tokenizer = tokenizers.Tokenizer.from_file(f'{folder}/tokenizer.json')
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours, losses, both = (
        Transformer.from_pretrained(folder).eval(),
        [],
        8 if os.environ.get('NANOSEEK_SLOW') else 2,
    )
    with torch.no_grad():
        for x, y in zip(
            ids[:8192].split(1024), ids[1:8193].split(1024)
        ):  # windows, each on its own
            losses.append(ours(x[None], y[None])[1].item())
            if len(losses) <= both:
                assert losses[-1] == pytest.approx(
                    F.cross_entropy(theirs(x[None]).logits[0], y).item(), abs=1e-4
                )
    assert sum(losses) / 8 == pytest.approx(3.396, abs=1e-3)  # theirs: 3.39587
    assert torch.equal(ours.generate(ids[None, :9], 64), greedy(theirs, ids[None, :9]))


@pytest.mark.slow
def test_smollm2_goes_through_files_unchanged(tmp_path):
    load_file, dtypes = (
        pytest.importorskip('safetensors.torch').load_file,
        (torch.float32, torch.bfloat16),
    )
    wanted = load_file(Path(asset('smollm2')) / 'model.safetensors')
    for dtype in dtypes:
        Transformer.from_pretrained(asset('smollm2')).save_pretrained(tmp_path / 'a', dtype=dtype)
        saved, again = (
            load_file(tmp_path / 'a/model.safetensors'),
            Transformer.from_pretrained(tmp_path / 'a', dtype),
        )
        assert saved.keys() == wanted.keys() and all(
            torch.equal(saved[n], t.to(dtype)) for n, t in wanted.items()
        )
        assert all(
            torch.equal(t, saved[n]) and t.dtype == dtype for n, t in again.state_dict().items()
        )
        again.save_pretrained(tmp_path / 'b')
        assert (tmp_path / 'a/model.safetensors').read_bytes() == (
            tmp_path / 'b/model.safetensors'
        ).read_bytes()
    for name in 'ab':
        shutil.rmtree(tmp_path / name)


MEMORY = """import sys, torch
from model import Transformer
status = lambda key: next(
    int(line.split()[1]) * 1024
    for line in open('/proc/self/status')
    if line.startswith(key)
)
before = status('VmRSS')
model = Transformer.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print((status('VmHWM') - before) / sum(p.nbytes for p in model.parameters()))"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='/proc is of Linux')
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_loading_needs_the_memory_of_the_weights_alone(dtype):
    """In a process of its own, by its peak; not by ru_maxrss, which begins at that of the process
    which started it"""
    done = subprocess.run(
        [sys.executable, '-c', MEMORY, asset('smollm2'), dtype],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert not done.returncode and 0.98 < float(done.stdout) <= 1.15, done


# ------------------------------------------------------------------------ What a user may get wrong


@pytest.mark.parametrize(
    'settings, words',
    [
        (dict(attention='gqa', head_dim=0, num_attention_heads=7), 'num_attention_heads=7 48'),
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
        *(
            ({name: 0}, f'{name}=0 1')
            for name in (
                'hidden_size',
                'num_hidden_layers',
                'num_attention_heads',
                'max_position_embeddings',
                'kv_lora_rank',
                'qk_nope_head_dim',
                'qk_rope_head_dim',
                'v_head_dim',
                'num_experts_per_tok',
                'n_group',
                'topk_group',
            )
        ),
        *(
            ({name: -1}, f'{name}=-1 0')
            for name in (
                'vocab_size',
                'intermediate_size',
                'num_key_value_heads',
                'head_dim',
                'n_routed_experts',
                'n_shared_experts',
                'moe_intermediate_size',
                'first_k_dense_replace',
                'num_nextn_predict_layers',
            )
        ),
    ],
    ids=str,
)
def test_impossible_settings_are_named(settings, words):
    refused(words, Config, **{**SIZES, **GQA, **MLA, **settings})


def test_no_vocabulary_and_too_long_an_input_are_refused():
    refused('vocab_size=0', lambda: Transformer(Config(**{**SIZES, 'vocab_size': 0})))
    model = make('mla', 'dense', max_position_embeddings=23)
    assert model(tokens(length=23))[0].shape == (B, 23, V)
    refused('24 max_position_embeddings=23', model, tokens(length=24))
    refused('24 max_position_embeddings=23', model.generate, tokens(length=24), 1)


@pytest.mark.parametrize(
    'attention, change, words',
    [
        *(
            ('mla', {name: None}, name)
            for name in ('vocab_size', 'hidden_size', 'kv_lora_rank', 'norm_topk_prob')
        ),
        ('gqa', {'n_group': None}, 'n_group'),
        ('gqa', {'num_experts_per_tok': None}, 'num_experts_per_tok'),
        ('mla', {'model_type': 'mamba'}, 'mamba deepseek_v3 llama'),
        ('mla', {'model_type': None}, 'model_type None'),
        ('mla', {'quantization_config': {'quant_method': 'fp8'}}, 'quantization_config fp8'),
        ('gqa', {'attention_bias': True}, 'attention_bias=True'),
        ('gqa', {'sliding_window': 4096}, 'sliding_window=4096'),
        ('gqa', {'use_qk_norm': True}, 'use_qk_norm'),
        ('mla', {'hidden_act': 'gelu'}, 'hidden_act gelu silu'),
    ],
    ids=str,
)
def test_a_config_json_that_cannot_be_represented_is_refused(attention, change, words, tmp_path):
    make(attention).save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text()) | change
    (tmp_path / 'config.json').write_text(json.dumps(config))
    refused(words, Transformer.from_pretrained, tmp_path)


def test_damaged_files_are_refused_by_name(tmp_path):
    safetensors = pytest.importorskip('safetensors.torch')
    make('mla').save_pretrained(tmp_path)
    file, name = tmp_path / 'model.safetensors', 'model.layers.1.mlp.experts.5.up_proj.weight'
    whole, tensors = file.read_bytes(), safetensors.load_file(file)
    safetensors.save_file(tensors | {name: torch.zeros(41, 48)}, file)
    refused(f'{name} (41, 48) (40, 48)', Transformer.from_pretrained, tmp_path)
    del tensors[name]
    safetensors.save_file(tensors, file)
    refused(f'{name} (40, 48)', Transformer.from_pretrained, tmp_path)
    for size in (len(whole) - 1, len(whole) // 2, 4, 0):
        file.write_bytes(whole[:size])
        refused(f'damaged {tmp_path}', Transformer.from_pretrained, tmp_path)
