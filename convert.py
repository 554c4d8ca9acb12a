"""Turn a dense Llama-like model into a DeepSeek-like one: GQA into MLA, and MLPs into experts.

    python convert.py HuggingFaceTB/SmolLM2-135M out/smol135-upcycled --attention=mla \\
        --n_routed_experts=3 --n_shared_experts=1 --calibration=data/tinyshakespeare-smollm2
    python convert.py HuggingFaceTB/SmolLM2-135M out/smol135-moe --n_routed_experts=4   # exact

The result is a Hugging Face folder (Glm4Moe or DeepseekV3) with a report, convert.json.
python train.py config/smol135_heal.py --init_from=FOLDER trains it further.

arXiv: [1] 2502.14837 (MHA2MLA)  [2] 2502.07864 (TransMLA)  [3] 2212.05055 (sparse upcycling)
Dims are those of model.py. A pair that RoPE turns is a complex number here, z = a + ib, turned by
exp(i w t), where w is its frequency. So keys and queries are complex rows (d/2, D), and a score is
Re sum_j conj(q_j) k_j exp(i w_j (s-t)). A complex factor on a pair commutes with RoPE.
"""
import os
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

os.environ.setdefault('GOMP_SPINCOUNT', '3000')

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import Transformer
from nanoseek import checkpoint, hf, settings
from nanoseek.cost import cache_line, parameter_table
from nanoseek.tokenizer import load_tokenizer
from nanoseek.tokens import open_data

KEY_WEIGHT = 20.0           # the cost of an error in the scores, relative to one in the outputs
ANCHOR = 20.0               # scale of the latent's constant dim, which fixes its norm
ROWS = 4                    # sequences at a time
FIT_LR = 1e-3               # of fit_steps
NOISE = 0.01                # on routers and routed experts, relative


@dataclass
class Settings:
    """Settings of convert.py"""
    model: str = ''                     # the dense model, a folder or Hub id; first bare argument
    out_dir: str = ''                   # where the result goes; second bare argument
    attention: Literal['gqa', 'mla'] = 'gqa'  # gqa keeps the attention as it is
    kv_lora_rank: int = 128             # R, rank of the latent
    qk_rope_head_dim: int = 32          # dr, dims that keep their position
    qk_nope_head_dim: int = 32          # dn, a head's dims without position
    fit_steps: int = 60                 # steps per layer that fit MLA's output to GQA's; 0: none
    n_routed_experts: int = 0           # E; 0: the MLPs stay dense
    n_shared_experts: int = 0           # experts that every token passes
    num_experts_per_tok: int = 2        # K
    calibration: str = ''               # datasets in the model's tokens to fit MLA to: one,another
    calibration_tokens: int = 16384     # tokens to fit to, in sequences of block_size
    eval_tokens: int = 8192             # tokens of each validation split that the report measures
    block_size: int = 256               # tokens per sequence
    dtype: Literal['bfloat16', 'float32'] = 'float32'  # of the file
    seed: int = 1337                    # of routers, noise and the order of the fit

    def __post_init__(self):
        if not self.model or not self.out_dir:
            raise ValueError('run python convert.py MODEL OUT_DIR --attention=mla ...')
        settings.require(self, 'block_size', self.block_size >= 1, 'at least 1')
        if self.attention == 'mla' and not self.calibration:
            raise ValueError('attention=mla is fitted to text: set --calibration=DATASET')


def check(s, c):
    """Raise ValueError if the settings do not fit the model of Config c, or out_dir is in use."""
    require = partial(settings.require, s)
    require('model', c.attention == 'gqa' and not c.n_routed_experts, 'a dense Llama-like model')
    if s.attention == 'mla':
        d = c.head_dim
        dn = s.qk_nope_head_dim
        dims = 2 * c.num_key_value_heads * d
        require('attention', not c.rope_scaling and not c.num_nextn_predict_layers,
                'gqa for a model with rope_scaling or MTP layers')
        require('kv_lora_rank', max(dn, 2) <= s.kv_lora_rank <= dims,
                f'at least 2 and qk_nope_head_dim={dn}, and at most {dims}')
        require('qk_nope_head_dim', 1 <= dn <= d, f'from 1 to {d}')
        require('qk_rope_head_dim', s.qk_rope_head_dim <= d, f'at most {d}')
    free = not Path(s.out_dir).exists() or Path(s.out_dir, 'convert.json').is_file()
    require('out_dir', free, 'a new folder, or one that convert.py wrote')


def read_tokens(name, split, count, s, folder):
    """Return idx and targets (B, T), about count tokens spread evenly over a split of a dataset.
    ValueError if the dataset has another tokenizer than the model in the folder."""
    data = open_data(name)
    if load_tokenizer(data.directory).get_vocab() != load_tokenizer(folder).get_vocab():
        raise ValueError(f"{data.directory} does not have the model's tokens: run prepare.py "
                         f'again with --tokenizer={folder}')
    room = data.windows(split, s.block_size)
    B = min(max(count // s.block_size, 1), room)
    parts = [data.eval_batch(split, i * (room // B), 1, s.block_size) for i in range(B)]
    return [torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts)]


def like(model, c):
    """Return a model of Config c with the model's weights, where name and shape are the same."""
    new = Transformer(c).eval()
    state = model.state_dict()
    for name, tensor in new.state_dict().items():
        if name in state and state[name].shape == tensor.shape:
            tensor.copy_(state[name])
    return new


def to_moe(model, s):
    """Return the model with experts in place of its MLPs: copies, whose weights sum to 1 [3]."""
    E = s.n_routed_experts
    new = like(model, replace(
        model.config, n_routed_experts=E, n_shared_experts=s.n_shared_experts,
        num_experts_per_tok=s.num_experts_per_tok))
    for dense, block in zip(model.model.layers, new.model.layers):
        gate = dense.mlp.gate_proj.weight                                               # (I, D)
        up = dense.mlp.up_proj.weight                                                   # (I, D)
        down = dense.mlp.down_proj.weight * (1 / (s.n_shared_experts + 1))              # (D, I)
        shared = block.mlp.shared_experts
        shared.gate_proj.weight.copy_(gate.repeat(s.n_shared_experts, 1))
        shared.up_proj.weight.copy_(up.repeat(s.n_shared_experts, 1))
        shared.down_proj.weight.copy_(down.repeat(1, s.n_shared_experts))
        block.mlp.experts.gate_up_proj.copy_(torch.cat((gate, up)).expand(E, -1, -1))
        block.mlp.experts.down_proj.copy_(down.expand(E, -1, -1))
    return new


def perturb(model):
    """Add noise to routers and routed experts: equal experts would get equal gradients."""
    for moe in model.moe_layers:
        for p in (moe.gate.weight, moe.experts.gate_up_proj, moe.experts.down_proj):
            p += NOISE * p.std() * torch.randn_like(p)


def pairs(weight, heads):
    """Turn rows in Llama's order (heads d, D) -> complex (heads, d/2, D)."""
    return torch.complex(*weight.unflatten(0, (heads, 2, -1)).unbind(1))


def rows(z):
    """Turn complex (..., n, D) -> real (..., 2n, D), in DeepSeek's order: a pair side by side."""
    return torch.stack((z.real, z.imag), -2).flatten(-3, -2)


def root(S):
    """Return the square root of a positive semidefinite Hermitian matrix, and its inverse."""
    e, U = torch.linalg.eigh(S)
    e = e.clamp(min=max(e.max().item() * 1e-9, 1e-30)).sqrt()
    return (U * e) @ U.mH, (U / e) @ U.mH


def rope_part(q, k, S, theta, dr):
    """q (H, d/2, D), k (G, d/2, D), covariance S (D, D) of the inputs -> the shared key (dr/2, D),
    its queries (H, dr/2, D), and the rest of the keys without position (G, d/2, D). At each of the
    dr/2 highest frequencies, the pairs of the G heads are a vector in C^G. The shared key is its
    principal direction, weighted by the size of the queries, as in [2] but in complex numbers."""
    G, half, D = k.shape
    each = len(q) // G                                                  # queries of a key head
    size = torch.einsum('hjd,de,hje->hj', q, S, q.conj()).real                        # (H, d/2)
    size = size.view(G, each, half).sum(1).sqrt() + 1e-9                              # (G, d/2)
    keys = []
    queries = []
    rest = k.clone()
    for j in range(dr // 2):
        weighted = size[:, j, None] * k[:, j]                                            # (G, D)
        direction = torch.linalg.eigh(weighted @ S @ weighted.mH)[1][:, -1]                # (G,)
        keys.append(direction.conj() @ weighted)                                           # (D,)
        back = direction / size[:, j]                       # k[g, j] is nearly back[g] * key
        queries.append(back.conj().repeat_interleave(each)[:, None] * q[:, j])           # (H, D)
        rest[:, j] -= back[:, None] * keys[j]
    # The rest loses its position. Slow pairs hardly turn: use the mean turn of 64 tokens
    w = theta ** (-torch.arange(half, dtype=torch.float64) / half)                        # (d/2,)
    mean_turn = torch.exp(-1j * w[:, None] * torch.arange(64)).mean(1)
    return torch.stack(keys), torch.stack(queries, 1), rest * mean_turn[:, None]


def latent_part(k, v, o, by_q, S, rank):
    """Return rows (rank, D) that make the best latents for keys k and values v (G, d, D), by a
    joint SVD [1]. An error in a key costs its effect on the scores, by_q (H, d, d); an error in a
    value costs its effect behind o_proj, o (D, G, H/G, d)."""
    G, d, D = k.shape
    by_k = KEY_WEIGHT ** 2 / d * by_q.view(G, -1, d, d).sum(1)                        # (G, d, d)
    by_o = torch.einsum('dgei,dgej->gij', o, o)                                       # (G, d, d)
    Y = torch.cat([root(cost)[0] @ head for cost, head in zip((*by_k, *by_o), (*k, *v))])
    e, U = torch.linalg.eigh(Y @ S @ Y.T)       # squares of the singular values, U; Y (2 G d, D)
    scale = e[-rank:, None].clamp(min=e[-1] * 1e-12).sqrt()     # makes the latents white
    return (U.T @ Y)[-rank:] / scale


def head_part(q, k, by_q, roots, from_latent, dn):
    """Return queries (H, dn, D) and keys (H, dn, R) of rank dn with the best scores for q (H, d, D)
    and k (G, d, D). roots: of the latents' covariance, and its inverse; from_latent (D, R)."""
    C, C_inverse = roots                                                           # (R, R) each
    queries = []
    keys = []
    for h in range(len(q)):
        half, half_inverse = root(by_q[h])
        scores = half @ k[h * len(k) // len(q)] @ from_latent @ C                          # (d, R)
        U, e, Vh = torch.linalg.svd(scores, full_matrices=False)
        scale = e[:dn, None].sqrt()
        queries.append(scale * U[:, :dn].T @ half_inverse @ q[h])                         # (dn, D)
        keys.append(scale * Vh[:dn] @ C_inverse)                                          # (dn, R)
    return torch.stack(queries), torch.stack(keys)


def layer_to_mla(gqa, x, c, s):
    """Return the weights of the MLA with the least mean error over a GQA's inputs x (N, D)."""
    S = (x.T @ x / len(x)).double()                                                      # (D, D)
    S += 1e-5 * S.trace() / len(S) * torch.eye(len(S), dtype=S.dtype)
    q = pairs(gqa.q_proj.weight.double(), c.num_attention_heads)
    k = pairs(gqa.k_proj.weight.double(), c.num_key_value_heads)
    key, query, rest = rope_part(q, k, S.to(q.dtype), c.rope_theta, s.qk_rope_head_dim)
    q = rows(q)                                                                       # (H, d, D)
    k = rows(rest)                                                                    # (G, d, D)
    G, d, D = k.shape
    v = gqa.v_proj.weight.double().view(G, d, D)
    o = gqa.o_proj.weight.double().view(D, G, -1, d)
    by_q = torch.einsum('hid,de,hje->hij', q, S, q)                                   # (H, d, d)
    # x @ ones is nearly 1, as the output of RMSNorm has a large mean. It is a dim of the latent,
    # which fixes the norm and gives values a bias. Keys need none: the softmax ignores it.
    mean = x.double().mean(0)                                                              # (D,)
    ones = torch.linalg.solve(S, mean)                                                     # (D,)
    k = k - (k @ mean)[..., None] * ones
    centered_v = v - (v @ mean)[..., None] * ones
    a = latent_part(k, centered_v, o, by_q, S, s.kv_lora_rank - 1)                      # (R-1, D)
    a = torch.cat((a, ANCHOR * ones[None])).float()                                      # (R, D)
    a = a / (x @ a.T).pow(2).mean(1).sqrt().mean()
    latent = F.rms_norm(x @ a.T, (len(a),), eps=1e-6)               # (N, R), as MLA computes it
    C, C_inverse = root((latent.T @ latent / len(x)).double())                           # (R, R)
    from_latent = (x.T @ latent / len(x)).double() @ C_inverse @ C_inverse  # (D, R) least squares
    q_nope, k_nope = head_part(q, k, by_q, (C, C_inverse), from_latent, s.qk_nope_head_dim)
    v = (v @ from_latent).repeat_interleave(len(q) // G, 0)                           # (H, d, R)
    q = torch.cat((q_nope, rows(query)), 1)                                       # (H, dn+dr, D)
    return {'q_proj.weight': (q * (q.shape[1] / d) ** 0.5).flatten(0, 1),
            'kv_a_proj_with_mqa.weight': torch.cat((a, rows(key))),
            'kv_a_layernorm.weight': torch.ones(len(a)),
            'kv_b_proj.weight': torch.cat((k_nope, v), 1).flatten(0, 1),
            'o_proj.weight': gqa.o_proj.weight}


def to_mla(model, s, idx):
    """Return the model with MLA in place of GQA, fitted to its activations on idx (B, T): in
    closed form, then by gradient descent, which also makes up for the errors of earlier layers."""
    c = model.config
    theta = c.rope_theta ** (s.qk_rope_head_dim / c.head_dim)       # the highest dr/2 frequencies
    new = like(model, replace(
        c, attention='mla', kv_lora_rank=s.kv_lora_rank, qk_nope_head_dim=s.qk_nope_head_dim,
        qk_rope_head_dim=s.qk_rope_head_dim, v_head_dim=c.head_dim, rope_theta=theta))
    old_rope = model.rope[:, :idx.shape[1]]                                     # (2, T, d/2)
    new_rope = new.rope[:, :idx.shape[1]]                                       # (2, T, dr/2)
    h = model.model.embed_tokens(idx)                   # the dense model's stream (B, T, D)
    g = h                                               # the new model's
    for dense, block in tqdm(list(zip(model.model.layers, new.model.layers)), disable=None):
        x = dense.input_layernorm(h)                                                  # (B, T, D)
        block.self_attn.load_state_dict(layer_to_mla(dense.self_attn, x.flatten(0, 1), c, s))
        goal = h + in_parts(lambda part: dense.self_attn(part, old_rope), x)
        fit(block.self_attn, block.input_layernorm(g), goal - g, goal.pow(2).mean(-1), new_rope, s)
        h = in_parts(lambda part: dense(part, old_rope)[0], h)
        g = in_parts(lambda part: block(part, new_rope)[0], g)
    return new


def amp():
    return torch.autocast('cpu', torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


def fit(mla, x, goal, size, rope, s):
    """Train an MLA to turn x (B, T, D) into goal (B, T, D). Errors are relative to size (B, T), and
    at most 1: else a token whose streams differ by a massive activation drowns out all others."""
    order = torch.Generator().manual_seed(s.seed)
    adam = torch.optim.AdamW(mla.parameters(), FIT_LR, (0.9, 0.95), weight_decay=0, fused=True)
    for step in range(s.fit_steps):
        some = torch.randperm(len(x), generator=order)[:ROWS]
        with torch.enable_grad():
            with amp():
                y = mla(x[some], rope)
            error = (y.float() - goal[some]).pow(2).mean(-1) / size[some]                # (B, T)
            (error / (error + 1)).mean().backward()
        adam.param_groups[0]['lr'] = FIT_LR * (1 - 0.9 * step / s.fit_steps)
        adam.step()
        adam.zero_grad()


def in_parts(f, x):
    """Return f(x) in float32, computed for ROWS sequences at a time."""
    with amp():
        return torch.cat([f(part).float() for part in x.split(ROWS)])


def measure(stage, model, texts):
    means = {}                                          # next-token losses in nats
    for name, (idx, targets) in texts.items():
        parts = zip(idx.split(ROWS), targets.split(ROWS))
        with amp():
            means[name] = sum(model(x, y)[1].item() * len(x) for x, y in parts) / len(idx)
    losses = [f', loss {loss:.4f} on {name}' for name, loss in means.items()]
    table = parameter_table(model)
    print(f'{stage:15}{table["total"]:13,} parameters,{table["active"]:13,} active, '
          f'{cache_line(model.config, torch.bfloat16)}', *losses, sep='', flush=True)
    return {'stage': stage, 'parameters': table['total'], 'active': table['active'], 'loss': means}


@torch.no_grad()
def main(s):
    source = hf.hub_folder(checkpoint.of_run(s.model))
    check(s, hf.read_config(source))
    names = s.calibration.split(',') if s.calibration else []
    texts = {name: read_tokens(name, 'val', s.eval_tokens, s, source) for name in names}
    model = Transformer.from_pretrained(source).eval()
    torch.manual_seed(s.seed)
    report = [measure('dense model', model, texts)]
    if s.attention == 'mla':
        each = s.calibration_tokens // len(names)
        idx = torch.cat([read_tokens(name, 'train', each, s, source)[0] for name in names])
        model = to_mla(model, s, idx)
        report.append(measure('MLA', model, texts))
    if s.n_routed_experts:
        model = to_moe(model, s)
        report.append(measure('MoE', model, texts))
        perturb(model)
        report.append(measure('MoE with noise', model, texts))
    with checkpoint.whole_folder(s.out_dir) as folder:
        hf.save_pretrained(model, folder, getattr(torch, s.dtype))
        hf.write_companions(folder, load_tokenizer(source), model.config,
                            hf.read_companions(source))
        hf.write_json(folder / 'convert.json', {'settings': asdict(s), 'stages': report})
    print(f'next: python train.py config/smol135_heal.py --init_from={s.out_dir}')


if __name__ == '__main__':
    with settings.user_errors('use a smaller model'):
        given, = settings.load(Settings, positional='model out_dir', usage=__doc__)
        main(Settings(**given))
