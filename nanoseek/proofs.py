"""What must hold on every device, as functions of one: they need no test runner, raise
AssertionError where something does not hold, and run on a machine that has little more than torch.
"""
import copy
import time
from dataclasses import replace

import torch
import torch.nn.functional as F

from nanoseek import ops
from nanoseek.device import compiled, in_a_line
from nanoseek.speculate import Drafts

SIZES = {'vocab_size': 97, 'hidden_size': 64, 'num_hidden_layers': 3, 'num_attention_heads': 4,
         'kv_lora_rank': 32, 'qk_nope_head_dim': 16, 'qk_rope_head_dim': 16, 'v_head_dim': 32,
         'n_routed_experts': 8, 'n_shared_experts': 1, 'moe_intermediate_size': 64,
         'num_nextn_predict_layers': 1, 'max_position_embeddings': 128, 'initializer_range': 0.1,
         'eos_token_id': 0}


class Proofs:
    """make: Config's fields -> a Transformer on the CPU; s: settings as train.py's, for compiling;
    compile_decoding: sample.py's; device: where it is all to hold; small: nothing is compiled,
    which takes minutes on a CPU"""

    def __init__(self, make, s, compile_decoding, device, small):
        self.make = make
        self.s = replace(s, batch_size=4, block_size=64, compile=True)
        self.compile_decoding = compile_decoding
        self.device = device
        self.small = small

    def all(self):
        """Yields of each proof its name, its seconds, and what is wrong or None"""
        names = ['bfloat16', 'float16', 'one_graph', 'document_mask', 'grouped_matmul', 'decoding']
        if self.device.type == 'cuda':
            names.append('no_waiting')
        if not self.small:
            names += ['compiled_step', 'compiled_decoding']
        for name in names:
            began = time.perf_counter()
            torch.manual_seed(0)
            problem = None
            try:
                getattr(self, name)()
            except Exception as e:          # whatever a device's layers raise: the others go on
                problem = f'{type(e).__name__}: {in_a_line(e)}'
            yield name, time.perf_counter() - began, problem

    def model(self, **settings):
        torch.manual_seed(1)
        return self.make(**{**SIZES, **settings}).to(self.device)

    def batch(self):
        idx = torch.randint(97, (4, 65), device=self.device)
        return idx[:, :-1], idx[:, 1:]

    def amp(self, dtype=torch.bfloat16):
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def step(self, model, batch, dtype):
        """-> loss and gradient norm of a training step"""
        x, y = batch
        with self.amp(dtype):
            _, loss = model(x, y)
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return loss.item(), torch.nn.utils.get_total_norm(grads).item()

    def close_to_float32(self, dtype):
        exact = self.model().cpu().train()
        batch = self.batch()
        wanted = self.step(exact, [part.cpu() for part in batch], torch.float32)
        found = self.step(self.model().train(), batch, dtype)
        for a, b in zip(found, wanted):
            assert abs(a - b) <= 0.03 * abs(b), f'{found} where float32 has {wanted}'

    def bfloat16(self):
        self.close_to_float32(torch.bfloat16)

    def float16(self):
        self.close_to_float32(torch.float16)

    def one_graph(self):
        """torch.compile takes the step as one graph"""
        model = self.model(num_hidden_layers=1).train()     # with the MTP layer behind it
        x, y = self.batch()
        with self.amp():
            breaks = torch._dynamo.explain(model)(x, y).graph_break_count
        assert breaks == 0, f'{breaks} graph breaks'

    def compiled_step(self):
        """The step compiled as train.py has it equals the eager one"""
        torch._dynamo.reset()
        model = self.model().train()
        batch = self.batch()
        eager = self.step(copy.deepcopy(model), batch, torch.bfloat16)
        fast, problem = compiled(model, model, self.s, self.device, self.amp)
        assert problem is None, problem
        found = self.step(fast, batch, torch.bfloat16)
        for a, b in zip(found, eager):
            assert abs(a - b) <= 0.02 * abs(b), f'{found} compiled, {eager} eager'

    def no_waiting(self):
        """Forward and backward never wait for the GPU"""
        model = self.model().train()
        x, y = self.batch()
        self.step(model, (x, y), torch.bfloat16)
        torch.cuda.set_sync_debug_mode('error')
        try:
            with self.amp():
                _, loss = model(x, y)
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode('default')

    def document_mask(self):
        """FlexAttention's mask and the additive one give the same"""
        documents = (torch.rand(2, 128, device=self.device) < 0.1).cumsum(1)
        q, k, v = (torch.randn(2, 4, 128, 32, device=self.device) for _ in range(3))
        flex = ops.document_mask(documents, torch.float32, True)
        plain = ops.document_mask(documents, torch.float32, False)
        found = ops.attention(q, k, v, 0.2, flex)
        wanted = F.scaled_dot_product_attention(q, k, v, plain, scale=0.2)
        assert torch.allclose(found, wanted, atol=2e-2), (found - wanted).abs().max().item()

    def grouped_matmul(self):
        """Forward and backward at odd sizes, an empty group among them, against a loop"""
        dtype = torch.float32
        if self.device.type == 'cuda':
            dtype = torch.bfloat16
        counts = (5, 0, 131, 1, 77)
        x = torch.randn(sum(counts), 48, device=self.device, dtype=dtype, requires_grad=True)
        weight = torch.randn(5, 72, 48, device=self.device, dtype=dtype, requires_grad=True)
        ends = torch.tensor(counts, device=self.device).cumsum(0).int()
        grad = torch.randn(sum(counts), 72, device=self.device, dtype=dtype)
        found = ops.grouped_linear(x, weight, ends)
        of_found = torch.autograd.grad(found, (x, weight), grad)
        parts = [F.linear(rows, w) for rows, w in zip(x.split(counts), weight)]
        wanted = torch.cat(parts)
        of_wanted = torch.autograd.grad(wanted, (x, weight), grad)
        for a, b in zip((found, *of_found), (wanted, *of_wanted)):
            error = (a - b).float().norm() / b.float().norm()
            assert error < 1e-2, f'off by {error.item():.2g}'

    def texts(self, model):
        """-> greedy texts of a prompt, without drafts and with them"""
        torch.manual_seed(2)
        prompt = torch.randint(97, (1, 7), device=self.device)
        with torch.no_grad():
            plain = model.generate(prompt, 60)
            drafted = model.generate(prompt, 60, drafts=Drafts())
        return plain, drafted

    def decoding(self):
        """The text is that of one pass without a cache, with drafts as well"""
        model = self.model(max_position_embeddings=40).eval()
        plain, drafted = self.texts(model)
        assert plain.equal(drafted)
        text = plain[:, :40]
        with torch.no_grad():
            logits, _ = model(text)
        best = logits.topk(2).values[0, 6:-1]
        sure = best[:, 0] - best[:, 1] > 1e-3       # of two that are alike, either may come
        agree = logits.argmax(-1)[0, 6:-1] == text[0, 7:]
        assert agree[sure].all()

    def compiled_decoding(self):
        """The text is that of eager passes"""
        model = self.model(max_position_embeddings=40).eval()
        eager, _ = self.texts(model)
        problem = self.compile_decoding(model, Drafts())
        assert problem is None, problem
        plain, drafted = self.texts(model)
        assert plain.equal(eager) and drafted.equal(eager)
