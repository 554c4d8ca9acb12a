"""Tests of nanoseek/optim.py: the learning rate by hand, Newton-Schulz against the SVD, Muon
against torch's."""
import pytest
import torch

from model import Config, Transformer
from nanoseek import optim
from nanoseek.optim import learning_rate_at, make_optimizer, orthogonal, set_learning_rate
from train import Settings


@pytest.mark.parametrize('schedule, rates', [
    ({'warmup_steps': 10, 'max_steps': 110, 'min_lr_frac': 0.1},
     {0: 0.2, 4: 1.0, 9: 2.0, 10: 2.0, 35: 1.73639610306789, 60: 1.1, 110: 0.2, 200: 0.2}),
    ({'warmup_steps': 0, 'max_steps': 100, 'min_lr_frac': 0.0, 'schedule': 'wsd',
      'decay_frac': 0.2}, {0: 2.0, 50: 2.0, 80: 2.0, 90: 1.0, 99: 0.1, 100: 0.0}),
])
def test_learning_rate_is_what_was_computed_by_hand(schedule, rates):
    s = Settings(learning_rate=2.0, **schedule)
    for step, rate in rates.items():
        assert learning_rate_at(step, s) == pytest.approx(rate, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('shape, sizes', [
    ((3, 8, 8), None), ((2, 5, 40), None), ((2, 3, 40, 7), None), ((1, 1, 64), None),
    ((1, 64, 64), torch.logspace(0, -2.5, 64)), ((1, 64, 64), torch.eye(64)[0])])
def test_newton_schulz_brings_all_but_tiny_singular_values_near_1(shape, sizes, dtype, device):
    """Those from 0.003 of the norm on, also of a matrix of rank 1, and keeps their vectors."""
    torch.manual_seed(0)
    u, random_sizes, vh = torch.linalg.svd(torch.randn(shape).double(), full_matrices=False)
    if sizes is None:
        sizes = random_sizes
    x = u * sizes[..., None, :] @ vh
    y = orthogonal(x.float().to(device), dtype).double().cpu()
    assert y.shape == x.shape
    large = (sizes > 0.003 * sizes.norm(dim=-1, keepdim=True)).double()
    expected = torch.diag_embed(large)
    y = u.mT @ y @ vh.mT * large[..., None, :] * large[..., None]
    assert (y - expected).abs().max() < 0.34


def muon(model):
    s = Settings(optimizer='muon', learning_rate=0.02, weight_decay=0.1)
    return make_optimizer(s, model, torch.bfloat16)     # torch's computes in it too


def heights(name, p, c):
    """Rows of the matrices that a parameter consists of, written out again. None: AdamW's"""
    kind = name.removesuffix('.weight').rpartition('.')[2]
    dn, dr, dv = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
    rows = {'gate_up_proj': [c.moe_intermediate_size] * 2}
    if c.attention == 'mla':
        rows['q_b_proj'] = [dn + dr] * c.num_attention_heads
        rows['kv_a_proj_with_mqa'] = [c.kv_lora_rank, dr]
        rows['kv_b_proj'] = [dn, dv] * c.num_attention_heads
    else:
        for heads in ('q_proj', 'k_proj', 'v_proj'):
            rows[heads] = [c.head_dim] * (len(p) // c.head_dim)
    if p.dim() == 1 or kind in ('embed_tokens', 'lm_head', 'gate'):
        return None
    return rows.get(kind, [p.shape[-2]])


def pieces(x, rows):
    """The matrices of x (A, B) or (E, A, B), copied."""
    if rows is None:
        return [x.clone()]
    return [block.clone() for matrix in x.view(-1, *x.shape[-2:]) for block in matrix.split(rows)]


@pytest.mark.parametrize('kind', [
    dict(attention='gqa', num_key_value_heads=2),
    dict(attention='mla', q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=6, qk_rope_head_dim=4,
         v_head_dim=5, n_routed_experts=4, n_shared_experts=1, moe_intermediate_size=9,
         num_nextn_predict_layers=1, first_k_dense_replace=1)])
@torch.no_grad()
def test_muon_is_torchs_on_every_matrix_and_adamw_on_the_rest(kind, device, monkeypatch):
    """With the polynomial that torch's applies five times"""
    monkeypatch.setattr(optim, 'POLYNOMIALS', ((3.4445, -4.7750, 2.0315),) * 5)
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = Transformer(Config(**sizes, **kind)).to(device)
    ours = muon(model)
    rows = {name: heights(name, p, model.config) for name, p in model.named_parameters()}
    copies = {name: pieces(p, rows[name]) for name, p in model.named_parameters()}
    matrices, vectors, others = [], [], []
    for name, parts in copies.items():
        if rows[name]:
            matrices += parts
        elif 'norm' in name:
            vectors += parts
        else:
            others += parts
    theirs = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True,
                         adjust_lr_fn='match_rms_adamw'),
        torch.optim.AdamW(others, lr=0.02, weight_decay=0.1, betas=(0.9, 0.95)),
        torch.optim.AdamW(vectors, lr=0.02, weight_decay=0.0, betas=(0.9, 0.95))]
    for step in range(3):
        before = {name: p.clone() for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            # random: bfloat16 rounds away the small singular values of a real gradient
            p.grad = torch.randn(p.shape).to(device)
            for copy, grad in zip(copies[name], pieces(p.grad, rows[name]), strict=True):
                copy.grad = grad
        for optimizer in (ours, *theirs):
            optimizer.step()
        for name, p in model.named_parameters():
            expected = torch.cat([copy.flatten() for copy in copies[name]]).view_as(p)
            tolerance = 0.06 if rows[name] else 1e-5
            assert (p - expected).norm() <= tolerance * (p - before[name]).norm(), name
            p.copy_(expected)


def test_muon_leaves_an_idle_expert_where_it_is(device):
    torch.manual_seed(0)
    sizes = dict(vocab_size=9, hidden_size=16, num_hidden_layers=1, n_routed_experts=4)
    model = Transformer(Config(**sizes)).to(device).train()
    moe, = model.moe_layers
    optimizer = muon(model)
    for group in optimizer.param_groups:
        group['weight_decay'] = 0.0
    idx = torch.randint(0, 9, (4, 8)).to(device)
    for bias in (0.0, -100.0):              # all have momentum once the third one is left out
        moe.gate.e_score_correction_bias[2] = bias
        before = [p.detach().clone() for p in moe.experts.parameters()]
        model.zero_grad()
        _, loss = model(idx, idx)
        loss.backward()
        optimizer.step()
    for p, old in zip(moe.experts.parameters(), before):
        assert (p != old).flatten(1).any(1).tolist() == [True, True, False, True]


@pytest.mark.parametrize('kind', ['adamw', 'muon'])
@pytest.mark.parametrize('tied', [True, False])
def test_embedding_and_head_move_so_many_times_as_far_and_nothing_else_does(kind, tied):
    def steps(embedding_lr):
        torch.manual_seed(0)
        model = Transformer(Config(vocab_size=9, hidden_size=16, num_hidden_layers=1,
                                   tie_word_embeddings=tied)).train()
        s = Settings(optimizer=kind, weight_decay=0.0, embedding_lr=embedding_lr)
        optimizer = make_optimizer(s, model, torch.float32)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        idx = torch.arange(8).view(1, 8)
        _, loss = model(idx, idx)
        loss.backward()
        set_learning_rate(optimizer, 100, s)
        optimizer.step()
        return {name: p.detach() - before[name] for name, p in model.named_parameters()}

    one, three = steps(1.0), steps(3.0)
    for name in one:
        times = 1.0
        if 'embed_tokens' in name or 'lm_head' in name:
            times = 3.0
        assert one[name].abs().max() > 0
        torch.testing.assert_close(three[name], times * one[name], atol=1e-6, rtol=1e-3)
