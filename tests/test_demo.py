"""Tests of demo.py: its functions are called as the page calls them."""

import pytest
import torch

import demo
from conftest import run
from model import Config, Transformer
from nanoseek.tokenizer import char_tokenizer

LETTERS = '\n abcdefghij'
TOKENIZER = char_tokenizer(LETTERS)


def make(**fields):
    torch.manual_seed(0)
    fields = {'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 2,
              'kv_lora_rank': 8, 'n_routed_experts': 4, 'num_nextn_predict_layers': 1,
              'max_position_embeddings': 60, 'initializer_range': 0.3, **fields}
    return Transformer(Config(vocab_size=len(LETTERS), **fields)).eval()


@torch.no_grad()
def test_probabilities_are_the_model_s_in_each_place():
    model = make()
    ids = torch.randint(len(LETTERS), (30,)).tolist()
    probabilities, likeliest, _ = demo.look_at(model, TOKENIZER, ids)
    assert len(probabilities) == 29 and likeliest[0] == []
    for i in range(1, 30):
        p = model(torch.tensor([ids[:i]]))[0][0, -1].softmax(-1)                        # (V,)
        assert probabilities[i - 1] == pytest.approx(p[ids[i]].item(), rel=1e-4)
        best = p.sort(descending=True)
        assert [p for _, p in likeliest[i]] == pytest.approx(best.values[:5].tolist(), rel=1e-4)
        assert likeliest[i][0][0] == demo.piece_of(TOKENIZER, best.indices[0].item())


@torch.no_grad()
def test_experts_are_those_that_the_router_chose():
    model = make()
    ids = torch.randint(len(LETTERS), (30,)).tolist()
    moe = model.model.layers[1].mlp
    inputs = []
    with moe.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0])):
        _, _, experts = demo.look_at(model, TOKENIZER, ids)
    assert len(experts) == 2
    best = (inputs[0] @ moe.gate.weight.T).sort(descending=True).indices                # (T, E)
    assert experts[1] == best[:, 0].tolist()


def test_a_text_is_written():
    model = make(initializer_range=0.02)
    text, line, tokens, insight = demo.write(('folder', model, TOKENIZER), 'abc', 100, 1.0, 3)
    pieces, _, _ = insight
    assert len(text) == 103 and text.startswith('abc')
    assert len(tokens) == len(pieces) == 60         # the model's context
    assert line.startswith('100 tokens, ')


@pytest.mark.parametrize('prompt, problem', [
    ('abc€', "'€' is not in the vocabulary"), ('', '0 tokens'), ('a' * 60, '60 tokens')])
def test_a_mistake_on_the_page_is_a_line(prompt, problem):
    shown = demo.write(('folder', make(), TOKENIZER), prompt, 5, 0.8, 50)
    assert shown[1].startswith('**') and problem in shown[1]
    assert shown[2:] == ([], None)


@pytest.mark.parametrize('experts', [0, 4])
def test_the_page_has_experts_if_the_model_has(experts):
    gr = pytest.importorskip('gradio')
    page = demo.build(gr, ('folder', make(n_routed_experts=experts), TOKENIZER), 'abc')
    labels = [getattr(block, 'label', None) for block in page.blocks.values()]
    assert ('Experts of layer' in labels) == (experts > 0)


def test_a_missing_checkpoint_is_one_line_and_status_2(tmp_path):
    pytest.importorskip('gradio')
    result = run(tmp_path, 'demo.py', '--checkpoint=./nowhere')
    assert (result.returncode, result.stderr.count('\n')) == (2, 1)
    assert result.stderr.startswith('demo.py: ')
