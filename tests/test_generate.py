"""Tests of nanoseek/generate.py: sampling by the distribution that was asked for, and drafts that
change how many passes it takes, but never the result."""
import math
import shutil
from itertools import product

import pytest
import torch

from model import Config, Transformer
from nanoseek.generate import Drafts, Sampling, compile_decoding, probabilities, sample

SIZES = dict(vocab_size=23, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4,
             v_head_dim=10, max_position_embeddings=40, initializer_range=0.3)


def count_passes(module):
    """Return a list that grows by one item with each call of a module."""
    passes = []
    module.register_forward_hook(lambda *args: passes.append(1))
    return passes


def trained(steps=25, device='cpu', **settings):
    """A model that has partly learned to repeat seven tokens, so that some drafts are right; and
    these tokens (1, 7)"""
    torch.manual_seed(0)
    model = Transformer(Config(**{**SIZES, **settings})).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    period = torch.randint(model.config.vocab_size, (1, 7)).to(device)
    data = period.repeat(4, 5)
    for _ in range(steps):
        _, loss = model(data[:, :-1], data[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), period


def is_sample(counts, p, total):
    """Whether counts are those of total draws with probabilities p, within five deviations."""
    expected = total * p
    return ((counts - expected).abs() <= 5 * (expected * (1 - p)).sqrt() + 3).all()


# --------------------------------------------------------------------------- without drafts

@pytest.mark.parametrize('rows', [1, 3])
def test_rows_end_at_a_stop_token_and_repeat_it(rows):
    model, period = trained(steps=8)
    idx = torch.cat((period.repeat(rows, 1), torch.arange(rows)[:, None]), 1)
    free = model.generate(idx, 30)
    for stop in free[0, 8:].unique().tolist():
        expected = free.clone()
        for row in expected:
            places = (row[8:] == stop).nonzero()
            if len(places):
                row[8 + places[0]:] = stop
        length = 38 - (expected[:, 8:] == stop).all(0).sum() + 1    # until all rows have come to it
        assert torch.equal(model.generate(idx, 30, stop=[stop, 99]), expected[:, :length])


@pytest.mark.parametrize('top_k, top_p', [
    (None, None), (1, None), (5, None), (None, 1e-6), (None, 0.8), (12, 0.8), (500, 1.0)])
def test_sampling_follows_the_truncated_distribution(top_k, top_p):
    torch.manual_seed(3)
    logits = 2 * torch.randn(97)
    p = {i: math.exp(logits[i] / 0.7) for i in logits.argsort(descending=True).tolist()[:top_k]}
    expected = torch.zeros(97)
    for i in p:                     # the fewest tokens that make up top_p
        if top_p is None or expected.sum() < top_p * sum(p.values()):
            expected[i] = p[i]
    expected /= expected.sum()
    sampling = Sampling(0.7, top_k, top_p)
    assert torch.allclose(probabilities(logits, sampling), expected, atol=1e-6)
    counts = torch.bincount(sample(logits.expand(40_000, 97), sampling)[:, 0], minlength=97)
    assert is_sample(counts, expected, 40_000)
    assert not counts[expected == 0].any()


# ------------------------------------------------------------------------------ with drafts

@pytest.mark.parametrize('attention, experts, depth', [
    ('mla', 4, 1), ('gqa', 0, 2), ('mla', 0, 3),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ('mla', 0, 1), ('gqa', 4, 1), ('mla', 4, 2), ('gqa', 0, 3), ('gqa', 4, 3)))])
def test_the_greedy_text_is_the_same_with_and_without_drafts(attention, experts, depth, device):
    drafts = Drafts()
    model, period = trained(device=device, attention=attention, n_routed_experts=experts,
                            num_nextn_predict_layers=depth)
    for rows, length, new in ((1, 1, 60), (1, 2, 3), (3, 5, 60), (2, 9, 1), (2, 40, 60)):
        idx = torch.randint(model.config.vocab_size, (rows, length)).to(device)
        idx[0] = period.repeat(1, 6)[0, :length]
        plain = model.generate(idx, new)                # 60: through a full context
        assert plain.shape == (rows, length + new)
        assert model.generate(idx, new, drafts=drafts).equal(plain)
    assert 0 < drafts.accepted < drafts.made


def test_drafts_save_passes_and_a_stop_token_among_them_ends_the_text():
    model, period = trained(steps=60, num_nextn_predict_layers=3)
    passes = count_passes(model.model.layers[0])
    drafts = Drafts()
    model.generate(period, 30, drafts=drafts)
    assert len(passes) == 30 - drafts.accepted < 20
    idx = period.repeat(1, 2)
    lengths = set()
    for stop in period[0].tolist():
        plain = model.generate(idx, 30, stop=stop)
        assert model.generate(idx, 30, stop=stop, drafts=Drafts()).equal(plain)
        lengths.add(plain.shape[1])
    assert len(lengths) > 3


def test_without_mtp_layers_or_with_linear_attention_nothing_is_drafted():
    for settings in ({}, {'attention': 'linear', 'num_nextn_predict_layers': 1}):
        model, period = trained(steps=3, **settings)
        drafts = Drafts()
        assert model.generate(period, 9, drafts=drafts).equal(model.generate(period, 9))
        assert drafts.made == 0


def test_a_pass_with_drafts_uses_only_the_experts_that_it_chose():
    model, period = trained(steps=60, n_routed_experts=12, num_nextn_predict_layers=1)
    chosen = {moe.gate: set() for moe in model.moe_layers}

    def note(gate, args, out):
        chosen[gate].update(out[1].flatten().tolist())

    for gate in chosen:
        gate.register_forward_hook(note)
    text = model.generate(period, 20, drafts=Drafts())
    for moe in model.moe_layers:
        others = sorted(set(range(12)) - chosen[moe.gate])
        assert others
        moe.experts.down_proj.data[others] = float('nan')
    assert model.generate(period, 20, drafts=Drafts()).equal(text)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('c++'), reason='no C++ compiler')
@pytest.mark.parametrize('attention, depth', [('mla', 1), ('gqa', 2)])
def test_compiled_drafting_gives_the_same_text_and_compiles_at_the_start_only(attention, depth,
                                                                              device):
    model, period = trained(steps=4, device=device, attention=attention, n_routed_experts=4,
                            num_nextn_predict_layers=depth)
    plain = model.generate(period, 80)
    torch._dynamo.reset()       # the models of other tests count against the limit of compilations
    assert compile_decoding(model, Drafts()) is None
    with torch._dynamo.config.patch(error_on_recompile=True):
        drafts = Drafts()
        assert model.generate(period, 80, drafts=drafts).equal(plain)
    assert 0 < drafts.accepted < drafts.made


@pytest.mark.slow
def test_sampled_texts_have_the_probabilities_that_the_model_gives_them():
    model, period = trained(steps=8, vocab_size=4, num_nextn_predict_layers=2)
    prompt = period[:, :3]
    texts = torch.tensor(list(product(range(4), repeat=3)))                         # (64, 3)
    with torch.no_grad():
        logits, _ = model(torch.cat((prompt.expand(64, -1), texts), 1))
    p = probabilities(logits[:, 2:-1], Sampling(0.9, 3, 0.95))                      # (64, 3, 4)
    exact = p.gather(2, texts[:, :, None]).prod(1)[:, 0]
    assert exact.sum().item() == pytest.approx(1, abs=1e-4)
    drafts = Drafts()
    torch.manual_seed(5)
    counts = torch.zeros(64)
    for _ in range(700):
        out = model.generate(prompt.expand(4, -1), 3, temperature=0.9, top_k=3, top_p=0.95,
                             drafts=drafts)
        counts += (out[:, None, 3:] == texts).all(2).sum(0)
    assert drafts.accepted > 50
    assert is_sample(counts, exact, 2800)


def test_text_and_accepted_drafts_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip('transformers')
    if not hasattr(transformers.GenerationConfig(), 'use_mtp'):
        pytest.skip('this transformers does not draft with MTP layers')
    ours, period = trained(steps=60, n_routed_experts=4, num_nextn_predict_layers=1,
                           max_position_embeddings=200, num_key_value_heads=2)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    theirs._keys_to_ignore_on_load_unexpected = [r'model\.layers\.2\.']
    passes = count_passes(theirs.model)
    for length in (3, 10):
        idx = period.repeat(1, 3)[:, :length]
        drafts = Drafts()
        text = ours.generate(idx, 100, drafts=drafts)
        passes.clear()
        other = theirs.generate(idx, max_new_tokens=100, do_sample=False, use_mtp=True,
                                pad_token_id=0)
        assert other.equal(text)
        assert len(passes) == 100 - drafts.accepted
        assert drafts.accepted > 20
