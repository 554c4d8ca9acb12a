"""Tests of nanoseek/optim.py: the learning rate by hand, Muon against torch's and against the
SVD."""

import pytest
import torch

from model import Config, Transformer
from nanoseek import optim
from nanoseek.optim import learning_rate_at, make_optimizer, orthogonal, set_learning_rate
from train import Settings


def test_lr_at_is_what_was_computed_by_hand():
    cosine = Settings(learning_rate=2.0, warmup_steps=10, max_steps=110, min_lr_frac=0.1)
    for step, lr in {
        0: 0.2,
        4: 1.0,
        9: 2.0,
        10: 2.0,
        35: 1.73639610306789,
        60: 1.1,
        110: 0.2,
        200: 0.2,
    }.items():
        assert learning_rate_at(step, cosine) == pytest.approx(lr, rel=1e-12)
    wsd = Settings(
        learning_rate=2.0,
        warmup_steps=0,
        max_steps=100,
        min_lr_frac=0.0,
        schedule='wsd',
        decay_frac=0.2,
    )
    for step, lr in {0: 2.0, 50: 2.0, 80: 2.0, 90: 1.0, 99: 0.1, 100: 0.0}.items():
        assert learning_rate_at(step, wsd) == pytest.approx(lr, abs=1e-12)


def svd_step(x):
    """U V^T in float64"""
    u, _, v = torch.linalg.svd(x.double(), full_matrices=False)
    return u @ v


@pytest.mark.parametrize('shape', [(3, 8, 8), (2, 5, 40), (2, 3, 40, 7), (1, 1, 64)])
def test_newton_schulz_is_about_the_orthogonal_factor_of_the_svd(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y, wanted = orthogonal(x, torch.float32), svd_step(x)
    values = torch.linalg.svdvals(y.double())
    assert 0.69 < values.min() and values.max() < 1.31 and y.shape == x.shape
    cosine = (y * wanted).flatten(-2).sum(-1) / (
        y.flatten(-2).norm(dim=-1) * wanted.flatten(-2).norm(dim=-1)
    )
    assert cosine.min() > 0.96


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_newton_schulz_brings_singular_values_of_all_sizes_near_1(dtype):
    """From 0.003 of the norm on, and one that is all of the norm: a gradient of rank 1"""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0] for _ in range(2))
    spread = torch.logspace(0, -2.5, 64, dtype=torch.float64)
    single = torch.zeros(64, dtype=torch.float64)
    single[0] = 1.0
    for sizes, count in ((spread, 50), (single, 1)):
        sizes = sizes / sizes.norm()
        y = orthogonal((u * sizes @ v)[None].float(), dtype)
        values = (u.T @ y[0].double() @ v.T).diagonal()
        large = values[sizes > 0.003]
        assert len(large) >= count
        assert 0.66 < large.min() and large.max() < 1.34


def muon(model):
    s = Settings(optimizer='muon', learning_rate=0.02, weight_decay=0.1)
    return make_optimizer(s, model, torch.bfloat16)  # in which torch's computes


def split_rows(model):
    """{name: the matrices that a parameter consists of}, written out again: heads, latent and
    rope rows, gate and up, experts; None: AdamW's"""
    c, found = model.config, {}
    dn, dr, dv = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
    for name, p in model.named_parameters():
        sizes = None
        if p.dim() > 1 and not name.endswith(
            ('embed_tokens.weight', 'lm_head.weight', 'gate.weight')
        ):
            sizes = [p.shape[-2]]
            if c.attention == 'mla':
                sizes = (
                    [dn + dr] * c.num_attention_heads
                    if 'q_proj' in name or 'q_b_proj' in name
                    else [dn, dv] * c.num_attention_heads
                    if 'kv_b' in name
                    else [c.kv_lora_rank, dr]
                    if 'kv_a' in name
                    else sizes
                )
            elif name.endswith(('q_proj.weight', 'k_proj.weight', 'v_proj.weight')):
                sizes = [c.head_dim] * (p.shape[0] // c.head_dim)
            if 'gate_up' in name:
                sizes = [c.moe_intermediate_size] * 2
        found[name] = sizes
    return found


@pytest.mark.parametrize(
    'kind',
    [
        dict(attention='gqa', num_key_value_heads=2),
        dict(
            attention='mla',
            q_lora_rank=12,
            kv_lora_rank=16,
            qk_nope_head_dim=6,
            qk_rope_head_dim=4,
            v_head_dim=5,
            n_routed_experts=4,
            n_shared_experts=1,
            moe_intermediate_size=9,
            num_nextn_predict_layers=1,
            first_k_dense_replace=1,
        ),
    ],
)
def test_muon_is_torchs_on_every_head_gate_up_and_expert_and_adamw_on_the_rest(kind, monkeypatch):
    """With the polynomial that torch's takes five times"""
    monkeypatch.setattr(optim, 'POLYNOMIALS', ((3.4445, -4.7750, 2.0315),) * 5)
    torch.manual_seed(0)
    model = Transformer(
        Config(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **kind)
    )
    ours, pieces, sizes_of = muon(model.train()), {}, split_rows(model)
    for name, sizes in sizes_of.items():
        p = model.get_parameter(name).detach()
        pieces[name] = (
            (
                [part.clone() for part in p.split(sizes, -2)]
                if p.dim() == 2
                else [part.clone() for e in p for part in e.split(sizes, -2)]
            )
            if sizes
            else [p.clone()]
        )
    flat = lambda wanted: [
        part for name, sizes in sizes_of.items() if wanted(sizes, name) for part in pieces[name]
    ]
    decay = {'lr': 0.02, 'weight_decay': 0.1}
    theirs = [
        torch.optim.Muon(
            flat(lambda sizes, _: sizes),
            momentum=0.95,
            nesterov=True,
            **decay,
            adjust_lr_fn='match_rms_adamw',
        ),
        torch.optim.AdamW(
            flat(lambda sizes, name: not sizes and 'norm' not in name), betas=(0.9, 0.95), **decay
        ),
        torch.optim.AdamW(
            flat(lambda sizes, name: not sizes and 'norm' in name),
            betas=(0.9, 0.95),
            lr=0.02,
            weight_decay=0.0,
        ),
    ]
    for step in range(3):
        for name, sizes in sizes_of.items():
            p = model.get_parameter(
                name
            )  # random: of a real gradient, bfloat16 rounds the small singular values
            p.grad = torch.randn_like(p)
            parts = (
                (
                    [*p.grad.split(sizes, -2)]
                    if p.dim() == 2
                    else [q for e in p.grad for q in e.split(sizes, -2)]
                )
                if sizes
                else [p.grad]
            )
            for piece, part in zip(pieces[name], parts, strict=True):
                piece.grad = part.clone()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        ours.step()
        for optimizer in theirs:
            optimizer.step()
        for name in pieces:
            now = model.get_parameter(name).detach()
            wanted = torch.cat([part.flatten() for part in pieces[name]]).view_as(now)
            assert (now - wanted).norm() <= (0.06 if sizes_of[name] else 1e-5) * (
                now - before[name]
            ).norm(), name
            now.copy_(wanted)


def test_muon_leaves_an_idle_expert_where_it_is():
    torch.manual_seed(0)
    model = Transformer(
        Config(vocab_size=9, hidden_size=16, num_hidden_layers=1, n_routed_experts=4)
    ).train()
    optimizer, idx = muon(model), torch.randint(0, 9, (4, 8))
    experts = model.moe_layers[0].experts
    for group in optimizer.param_groups:
        group['weight_decay'] = 0.0
    model(idx, idx)[1].backward()
    optimizer.step()  # all have momentum now
    model.zero_grad()
    model.moe_layers[0].gate.e_score_correction_bias[2] = -100.0
    before = [p.detach().clone() for p in (experts.gate_up_proj, experts.down_proj)]
    model(idx, idx)[1].backward()
    optimizer.step()
    for p, old in zip((experts.gate_up_proj, experts.down_proj), before):
        moved = (p != old).flatten(1).any(1).tolist()
        assert moved == [True, True, False, True]


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
        model(idx, idx)[1].backward()
        set_learning_rate(optimizer, 1e-3)
        optimizer.step()
        return {name: p.detach() - before[name] for name, p in model.named_parameters()}

    one, three = steps(1.0), steps(3.0)
    for name in one:
        times = 1.0
        if 'embed_tokens' in name or 'lm_head' in name:
            times = 3.0
            assert one[name].abs().max() > 0
        torch.testing.assert_close(three[name], times * one[name], atol=1e-6, rtol=1e-3)
