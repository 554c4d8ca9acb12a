"""Tests of what a GPU needs besides right results: steps that wait for no value and are one graph
under torch.compile, and low precision. On the meta device, whatever waits for a value fails."""
from functools import partial

import pytest
import torch

from model import Config, Transformer
from nanoseek.generate import Cache

SIZES = dict(vocab_size=97, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
             kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32,
             n_routed_experts=8, n_shared_experts=1, moe_intermediate_size=64, eos_token_id=0,
             num_nextn_predict_layers=1, max_position_embeddings=128, initializer_range=0.1)


def make(device, **settings):
    torch.manual_seed(1)
    return Transformer(Config(**SIZES, **settings)).to(device).train()


def step(model, device, dtype=torch.float32):
    """Return the loss and the gradient's norm of a training step, as one tensor."""
    idx = torch.randint(97, (4, 65), generator=torch.Generator().manual_seed(2)).to(device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        _, loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    return torch.stack((loss, torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('attention', ['mla', 'gqa'])
def test_a_training_step_waits_for_no_value(attention, masked):
    model = make('meta', attention=attention).to(torch.bfloat16)
    model.doc_attention_mask = masked
    idx = torch.zeros(4, 64, dtype=torch.int64, device='meta')
    model(idx, idx)[1].backward()


def test_a_training_step_does_not_wait_for_a_gpu(device):
    if device.type != 'cuda':
        pytest.skip('needs a GPU')
    model = make(device)
    step(model, device, torch.bfloat16)
    torch.cuda.set_sync_debug_mode('error')
    try:
        step(model, device, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_a_step_in_low_precision_is_near_float32(dtype, device):
    exact = step(make('cpu'), torch.device('cpu'))
    torch.testing.assert_close(step(make(device), device, dtype).cpu(), exact, rtol=0.03, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize('attention', ['mla', 'gqa'])
def test_a_training_step_and_decoding_are_one_graph_each(attention):
    torch._dynamo.reset()
    model = make('meta', attention=attention).to(torch.bfloat16)
    idx = torch.zeros(4, 64, dtype=torch.int64, device='meta')
    compiled = partial(torch.compile, fullgraph=True, backend='aot_eager')
    step = compiled(model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            step(idx, idx)[1].backward()
    decode = compiled(model.eval().hidden, dynamic=True)
    draft = compiled(model.mtp, dynamic=True)
    with torch.no_grad():
        cache = Cache(model, 2, 64)
        model.hidden(idx[:2, :8], cache)
        for rows in (1, 2):
            h, _ = decode(idx[:2, :rows], cache)
            h, _ = draft(1, h, idx[:2, :rows], Cache(model, 2, 64, layers=1))
            assert h.shape == (2, rows, 64)
