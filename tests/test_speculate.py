"""Tests of nanoseek/speculate.py: drafts change how many passes it takes, and never what comes
out."""
from itertools import product

import pytest
import torch

from model import Config, Transformer
from nanoseek.speculate import Drafts, check, probabilities
from sample import compile_decoding
from support import why_not_compile

SIZES = {'vocab_size': 23, 'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 2,
         'num_key_value_heads': 1, 'kv_lora_rank': 12, 'qk_nope_head_dim': 8, 'qk_rope_head_dim': 4,
         'v_head_dim': 10, 'max_position_embeddings': 40, 'initializer_range': 0.3}


def trained(steps=25, seed=0, **settings):
    """A model that has partly learned to repeat seven tokens, so that some drafts are right"""
    torch.manual_seed(seed)
    model = Transformer(Config(**{**SIZES, **settings})).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    period = torch.randint(model.config.vocab_size, (1, 7))
    data = period.repeat(4, 5)
    for _ in range(steps):
        _, loss = model(data[:, :-1], data[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), period


@pytest.mark.parametrize('attention, experts, depth', [
    ('mla', 4, 1), ('gqa', 0, 2), ('mla', 0, 3),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ('mla', 0, 1), ('gqa', 4, 1), ('mla', 4, 2), ('gqa', 0, 3), ('gqa', 4, 3)))])
def test_the_greedy_text_is_the_same_with_and_without_drafts(attention, experts, depth):
    drafts = Drafts()
    for seed in range(2):
        model, period = trained(seed=seed, attention=attention, n_routed_experts=experts,
                                num_nextn_predict_layers=depth)
        for rows, length in ((1, 1), (1, 2), (3, 5), (2, 9), (1, 39), (2, 40)):
            idx = torch.randint(model.config.vocab_size, (rows, length))
            idx[0] = period.repeat(1, 6)[0, :length]
            with torch.no_grad():
                plain = model.generate(idx, 60)             # through a full context
                assert model.generate(idx, 60, drafts=drafts).equal(plain)
    assert 0 < drafts.accepted < drafts.made


def test_a_stop_token_in_the_middle_of_a_draft_ends_the_text_there():
    model, period = trained(steps=60, num_nextn_predict_layers=3)
    idx = period.repeat(1, 2)
    ends = set()
    for stop in period[0].tolist():
        plain = model.generate(idx, 30, stop=stop)
        drafts = Drafts()
        assert model.generate(idx, 30, stop=stop, drafts=drafts).equal(plain)
        assert drafts.accepted > 0 or plain.shape[1] < idx.shape[1] + 3
        ends.add(plain.shape[1])
    assert len(ends) > 3


@pytest.mark.parametrize('new', [1, 2, 3, 4, 5])
def test_as_many_tokens_come_as_are_asked_for(new):
    model, period = trained(num_nextn_predict_layers=2)
    assert model.generate(period, new, drafts=Drafts()).shape[1] == period.shape[1] + new


def test_good_drafts_save_passes():
    model, period = trained(steps=120, num_nextn_predict_layers=2)
    passes = []
    hidden = model.hidden

    def counted(*args):
        passes.append(1)
        return hidden(*args)
    model.hidden = counted
    drafts = Drafts()
    model.generate(period, 30, drafts=drafts)
    assert drafts.share > 0.8
    assert len(passes) == 30 - drafts.accepted


def test_without_mtp_layers_or_with_linear_attention_nothing_is_drafted():
    for settings in ({}, {'attention': 'linear', 'num_nextn_predict_layers': 1}):
        model, period = trained(steps=3, **settings)
        drafts = Drafts()
        assert model.generate(period, 9, drafts=drafts).equal(model.generate(period, 9))
        assert drafts.made == 0


def test_a_pass_with_drafts_uses_only_the_experts_that_it_chose():
    model, period = trained(steps=60, n_routed_experts=12, num_nextn_predict_layers=1)
    chosen = [set() for _ in model.moe_layers]

    def note(layer):
        def hook(gate, args, out):
            _, ids, _ = out
            chosen[layer].update(ids.flatten().tolist())
        return hook
    hooks = [moe.gate.register_forward_hook(note(layer))
             for layer, moe in enumerate(model.moe_layers)]
    text = model.generate(period, 20, drafts=Drafts())
    for hook in hooks:
        hook.remove()
    for experts, moe in zip(chosen, model.moe_layers):
        others = [e for e in range(12) if e not in experts]
        assert others
        moe.experts.down_proj.data[others] = float('nan')
    assert model.generate(period, 20, drafts=Drafts()).equal(text)


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not_compile()), reason=why_not_compile())
@pytest.mark.parametrize('attention, depth', [('mla', 1), ('gqa', 2)])
def test_compiled_drafting_gives_the_same_text_and_compiles_at_the_start_only(attention, depth):
    model, period = trained(steps=4, attention=attention, n_routed_experts=4,
                            num_nextn_predict_layers=depth)
    with torch.no_grad():
        plain = model.generate(period, 80)
    torch._dynamo.reset()       # the models of other tests count against the limit of compilations
    assert compile_decoding(model, Drafts()) is None
    with torch._dynamo.config.patch(error_on_recompile=True):
        drafts = Drafts()
        assert model.generate(period, 80, drafts=drafts).equal(plain)
    assert 0 < drafts.accepted < drafts.made


# ------------------------------------------------------------------------------ evaluation

@pytest.mark.parametrize('attention, depth', [('mla', 1), ('gqa', 3)])
def test_evaluation_counts_the_first_choices_that_are_right(attention, depth):
    model, period = trained(steps=15, attention=attention, num_nextn_predict_layers=depth)
    text = period.repeat(2, 3)
    text[1] = torch.randint(model.config.vocab_size, (21,))
    targets = text[:, 1:].clone()
    targets[0, -4:] = -100
    with torch.no_grad():
        model(text[:, :-1], targets)
        h, _ = model.hidden(text[:, :-1])
        wanted = []
        for k in range(1, depth + 1):
            T = 20 - k
            h, _ = model.mtp(k, h[:, :T], text[:, k:k + T])
            best = (h @ model.head.T).argmax(-1)                                    # (2, T)
            right = []
            for b in range(2):
                for i in range(T):
                    if targets[b, i + k] >= 0:
                        right.append(best[b, i].item() == text[b, i + k + 1].item())
            wanted.append(sum(right) / len(right))
    assert [x.item() for x in model.mtp_accuracy] == pytest.approx(wanted)
    assert 0 < wanted[0] < 1


# -------------------------------------------------------------------------------- sampling

def close(counts, p, total):
    """Whether counts are those of total draws with probabilities p: within five deviations"""
    expected = total * p
    return ((counts - expected).abs() <= 5 * (expected * (1 - p)).sqrt() + 3).all()


@pytest.mark.slow
@pytest.mark.parametrize('rules', [(1.0, None, None), (0.7, 3, None), (1.3, None, 0.8)])
def test_what_is_accepted_or_put_in_its_place_is_drawn_from_the_models_probabilities(rules):
    torch.manual_seed(1)
    V = 5
    logits = 1.5 * torch.randn(1, 3, V)
    guessed = 1.5 * torch.randn(2, V)
    p = probabilities(logits[0], *rules)                                            # (3, V)
    q = probabilities(guessed, *rules)                                              # (2, V)
    total = 10_000
    first = torch.zeros(V)
    second = torch.zeros(V)                 # where the first draft was accepted
    third = torch.zeros(V)                  # where both were
    for _ in range(total):
        drafts = q.multinomial(1).T                                                 # (1, 2)
        accepted, token = check(logits, drafts, [q[0:1], q[1:2]], *rules)
        text = [*drafts[0, :accepted].tolist(), token.item()]
        for counts, i in zip((first, second, third), text):
            counts[i] += 1
    assert close(first, p[0], total)
    assert close(second, p[1], second.sum())
    assert close(third, p[2], third.sum())
    # and as many first drafts are accepted as theory has it
    assert close(second.sum(), torch.minimum(p[0], q[0]).sum(), total)


def test_probabilities_are_those_that_sampling_without_drafts_has():
    torch.manual_seed(0)
    logits = torch.randn(4, 7)
    assert torch.allclose(probabilities(logits, 1.0), logits.softmax(-1))
    p = probabilities(logits, 0.5, top_k=2)
    for row, of_row in zip(logits, p):
        best = row.topk(2).indices
        wanted = torch.zeros(7)
        wanted[best] = (row[best] / 0.5).softmax(-1)
        assert torch.allclose(of_row, wanted)
    p = probabilities(logits, 1.0, top_p=0.6)
    for row, of_row in zip(logits.softmax(-1), p):
        kept = of_row > 0
        assert row[kept].sum() >= 0.6
        assert row[kept].sum() - row[kept].min() < 0.6
        assert torch.allclose(of_row[kept], row[kept] / row[kept].sum())


@pytest.mark.slow
def test_sampled_texts_have_the_probabilities_that_the_model_gives_them():
    model, period = trained(steps=8, vocab_size=4, num_nextn_predict_layers=2)
    prompt = period[:, :3] % 4
    texts = torch.tensor(list(product(range(4), repeat=3)))                         # (64, 3)
    whole = torch.cat((prompt.expand(64, -1), texts), 1)
    with torch.no_grad():
        p = probabilities(model(whole)[0][:, 2:-1], 0.9, 3)                         # (64, 3, 4)
    exact = p.gather(2, texts[:, :, None]).prod(1)[:, 0]
    assert exact.sum().item() == pytest.approx(1, abs=1e-4)
    counts = torch.zeros(64)
    drafts = Drafts()
    torch.manual_seed(5)
    total = 0
    for _ in range(700):
        out = model.generate(prompt.expand(4, -1), 3, temperature=0.9, top_k=3, drafts=drafts)
        for text in out[:, 3:]:
            counts[16 * text[0] + 4 * text[1] + text[2]] += 1
            total += 1
    assert drafts.accepted > 50
    assert close(counts, exact, total)


# ------------------------------------------------------------------------------ transformers

def test_text_and_accepted_drafts_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip('transformers')
    if not hasattr(transformers.GenerationConfig(), 'use_mtp'):
        pytest.skip('this transformers does not draft with MTP layers')
    ours, period = trained(steps=60, n_routed_experts=4, num_nextn_predict_layers=1,
                           max_position_embeddings=200, num_key_value_heads=2)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    theirs._keys_to_ignore_on_load_unexpected = [r'model\.layers\.2\.']
    passes = []
    theirs.model.register_forward_hook(lambda *args: passes.append(1))
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


