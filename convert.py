"""Turn a dense Llama-like model into a DeepSeek-like one with its weights: GQA into MLA, the MLPs
into experts.

    python convert.py HuggingFaceTB/SmolLM2-135M out/smol135-upcycled --attention=mla \\
        --n_routed_experts=3 --n_shared_experts=1 --calibration=data/tinyshakespeare-smollm2
    python convert.py HuggingFaceTB/SmolLM2-135M out/smol135-moe --n_routed_experts=4   # exact
    python convert.py HuggingFaceTB/SmolLM2-135M out/smol135-mla --attention=mla --exact

The result is a Hugging Face folder (Glm4Moe or DeepseekV3) with its tokenizer and convert.json,
the report. python train.py --init_from=FOLDER trains on; config/smol135_heal.py has the settings.

References
  [1] MHA2MLA, arXiv 2502.14837      [2] TransMLA, arXiv 2502.07864
  [3] sparse upcycling, arXiv 2212.05055
Dims are those of model.py. A pair that RoPE turns is written as a complex number here: z = a + ib,
turned by exp(i w t) with its frequency w. So keys and queries are complex rows (d/2, D), and a
score is Re sum_j conj(q_j) k_j exp(i w_j (s-t)). What maps a pair to a pair by a complex factor
commutes with RoPE.
"""
import nanoseek.tuning  # noqa: F401  # first: it acts before torch is loaded

import os
import shutil
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError

import config
from model import Config, Transformer
from nanoseek import files, folders, hf
from nanoseek.checkpoint import of_run
from nanoseek.estimate import parameter_table
from nanoseek.tokenizer import encode, load_tokenizer
from nanoseek.tokens import open_data


@dataclass
class Settings:
    """Settings of convert.py"""
    model: str = ''                     # the dense model, a folder or Hub id; also without its name
    out_dir: str = ''                   # where to write; also without its name
    attention: Literal['gqa', 'mla'] = 'gqa'  # gqa: as it is
    exact: bool = False                 # MLA that loses and saves nothing, for transformers alone
    kv_lora_rank: int = 128             # R, rank of the latent
    qk_rope_head_dim: int = 32          # dr, dims that keep their position
    qk_nope_head_dim: int = 32          # dn, a head's dims without position
    rope_stride: float = 1.0            # distance of the frequencies that are kept
    rope_heads: Literal['pca', 'norm', 'cycle'] = 'pca'  # which key of a frequency's is kept
    svd: Literal['scores', 'activations', 'weights'] = 'scores'  # where errors count
    key_weight: float = 20.0            # svd=scores: weight of errors in scores over outputs
    anchor: float = 20.0                # scale of the latent's constant dim, which holds its norm
    fit_steps: int = 60                 # steps per layer of fitting MLA's output to GQA's; 0: none
    fit_lr: float = 1e-3                # their learning rate
    n_routed_experts: int = 0           # E; 0: the MLPs stay dense
    n_shared_experts: int = 0           # experts that every token passes
    num_experts_per_tok: int = 2        # K
    moe_intermediate_size: int = 0      # I; 0: experts are copies of the MLP; narrower: its shards
    perturb: float = 0.01               # noise on routers and routed experts, relative: breaks ties
    calibration: str | None = None      # texts or datasets to fit to, with commas
    held_out: str | None = None         # further ones, for the losses of the report only
    calibration_tokens: int = 16384     # of them, in sequences of block_size
    eval_tokens: int = 8192             # of each held-out text
    block_size: int = 256               # tokens per sequence
    batch_size: int = 4                 # sequences at a time
    compare: bool = False               # also measure the other methods, at the same cache
    dtype: Literal['bfloat16', 'float32'] = 'float32'  # of the file
    seed: int = 1337                    # of routers, noise and the order of the fit

    def __post_init__(self):
        for name in ('kv_lora_rank', 'qk_nope_head_dim', 'num_experts_per_tok',
                     'calibration_tokens', 'eval_tokens', 'block_size', 'batch_size'):
            self.require(name, getattr(self, name) >= 1, 'must be at least 1')
        for name in ('anchor', 'fit_steps', 'n_routed_experts', 'n_shared_experts',
                     'moe_intermediate_size', 'perturb'):
            self.require(name, getattr(self, name) >= 0, 'must be at least 0')
        for name in ('rope_stride', 'key_weight', 'fit_lr'):
            self.require(name, getattr(self, name) > 0, 'must be above 0')
        if not self.model or not self.out_dir:
            raise ValueError('convert what, and where to? python convert.py MODEL OUT_DIR '
                             '--attention=mla ...')
        if self.attention == 'gqa' and not self.n_routed_experts:
            raise ValueError('nothing to convert: set attention=mla, n_routed_experts, or both')
        if self.attention == 'mla' and not self.exact and not self.calibration:
            raise ValueError('attention=mla: a latent is fitted to text: give one, '
                             '--calibration=FILE or a dataset folder, or take --exact, which needs '
                             'none')

    def require(self, name, holds, limit):
        if not holds:
            raise ValueError(f'{name}={getattr(self, name)}: {limit}')


# ------------------------------------------------------------------ what fits the dense model

def check(s, c):
    """What of the settings does not fit the model of Config c, or the disk. ValueError"""
    dense = c.attention == 'gqa' and not c.n_routed_experts
    s.require('model', dense, 'must be a dense Llama-like model')
    if s.attention == 'mla':
        s.require('attention', not c.rope_scaling, 'a model with rope_scaling is not converted')
    if s.attention == 'mla' and not s.exact:
        check_mla(s, c)
    if s.n_routed_experts:
        check_moe(s, c)
    out = Path(s.out_dir)
    if out.exists():
        taken = not out.is_dir() or out.resolve() == Path(s.model).resolve()
        if not taken and any(out.iterdir()):
            taken = not (out / 'convert.json').is_file()
        if taken:
            raise ValueError(f'out_dir={s.out_dir}: there is something else already: take another')


def check_mla(s, c):
    d = c.head_dim
    dims = 2 * c.num_key_value_heads * d
    s.require('kv_lora_rank', s.kv_lora_rank <= dims, f'keys and values have only {dims} dims')
    s.require('qk_nope_head_dim', s.qk_nope_head_dim <= d,
              f'must be at most {d}, the dims of a head')
    most = int((d // 2 - 1) // s.rope_stride + 1) * 2
    dr = s.qk_rope_head_dim
    s.require('qk_rope_head_dim', dr % 2 == 0 and 0 < dr <= most,
              f'must be even and at most {most}, as there are {d // 2} frequencies and '
              f'rope_stride={s.rope_stride:g}')


def check_moe(s, c):
    width = c.intermediate_size
    I = s.moe_intermediate_size or width
    s.require('moe_intermediate_size', I <= width and width % I == 0,
              f'must divide {width}, the width of the MLP, as {width // 2} and {width // 4} do')
    shards, each = shards_of_mlp(s, c)
    s.require('n_shared_experts', each > 0, f'must be below {shards}, the shards of an MLP')
    s.require('n_routed_experts', s.n_routed_experts % each == 0,
              f'must be a multiple of {each}, the routed shards')
    K = s.num_experts_per_tok
    s.require('num_experts_per_tok', K % each == 0 and K <= s.n_routed_experts,
              f'must be a multiple of {each}, the routed shards of an MLP, and at most '
              f'n_routed_experts={s.n_routed_experts}')


def shards_of_mlp(s, c):
    """-> how many experts make up an MLP, and how many of these are routed"""
    I = s.moe_intermediate_size or c.intermediate_size
    shards = c.intermediate_size // I
    if shards == 1:                             # experts are copies, shared ones as well
        return 1, 1
    return shards, shards - s.n_shared_experts


# ----------------------------------------------------------------------------------- texts

def read_tokens(name, folder):
    """A dataset's folder, or a text file -> its tokens for calibration, its held-out ones.
    ValueError"""
    tokenizer = load_tokenizer(folder)
    if Path(name, 'meta.json').is_file() or Path('data', name, 'meta.json').is_file():
        data = open_data(name)
        if load_tokenizer(data.directory).get_vocab() != tokenizer.get_vocab():
            raise ValueError(f"{name} was made with another tokenizer than the model's: run python "
                             f'prepare.py for it again with --tokenizer={folder}')
        return data.splits['train'], data.splits.get('val', data.splits['train'])
    if not Path(name).is_file():
        raise ValueError(f"no text '{name}': must be a file, or a dataset that prepare.py made")
    try:
        text = Path(name).read_text(encoding='utf-8')
    except UnicodeDecodeError as e:
        raise ValueError(f'{name} is not UTF-8 text: {e}') from e
    ids = np.array(encode(tokenizer, text), dtype=np.int64)
    held_out = len(ids) * 9 // 10
    return ids[:held_out], ids[held_out:]


def windows(ids, count, T, name):
    """ids (N,) -> idx (rows, T), targets (rows, T) of about count tokens, spread over the text"""
    room = (len(ids) - 1) // T
    rows = min(max(count // T, 1), room)
    if rows < 1:
        raise ValueError(f'{name} has {len(ids):,} tokens, and block_size={T} needs {T + 1:,}: '
                         'take a longer text')
    starts = [i * (room // rows) * T for i in range(rows)]
    both = np.stack([ids[start:start + T + 1] for start in starts]).astype(np.int64)
    both = torch.from_numpy(both)
    return both[:, :-1], both[:, 1:]


def names_in(setting):
    """'a, b' -> ['a', 'b']"""
    names = [name.strip() for name in (setting or '').split(',')]
    return [name for name in names if name]


def texts(s, folder):
    """-> idx (B, T) to calibrate on, or None; {name: (idx, targets)} of the held-out texts"""
    to_fit = []
    held = {}
    calibration = names_in(s.calibration)
    for name in calibration:
        train, val = read_tokens(name, folder)
        idx, _ = windows(train, s.calibration_tokens // len(calibration), s.block_size, name)
        to_fit.append(idx)
        held[Path(name).stem] = windows(val, s.eval_tokens, s.block_size,
                                        f'the held-out part of {name}')
    for name in names_in(s.held_out):
        _, val = read_tokens(name, folder)
        held[Path(name).stem] = windows(val, s.eval_tokens, s.block_size, name)
    if not to_fit:
        return None, held
    return torch.cat(to_fit), held


def plan(s):
    """Everything that a user's mistake can stop -> the model's folder, and texts(s)"""
    folder = folders.hub_folder(of_run(s.model), folders.MODEL_FILES)
    check(s, hf.read_config(Config, folder))
    return folder, *texts(s, folder)


# ---------------------------------------------------------------------------- dense -> MoE

def like(model, c):
    """-> a model of Config c, with the weights that have the same name and shape in model"""
    new = Transformer(c).eval()
    old = model.state_dict()
    for name, tensor in new.state_dict().items():
        if name in old and old[name].shape == tensor.shape:
            tensor.copy_(old[name])
    if c.attention == model.config.attention:
        new.rope = model.rope
    return new


def to_moe(model, s):
    """Exact. Copies [3]: a token's experts are all the MLP itself, at weights that sum to 1.
    Shards: an MLP's output is the sum of its shards'; the router's rows are the same for the
    routed shards of a replica, so that a token takes all of them or none, each at 1/each of the
    replica's weight, which routed_scaling_factor makes up for."""
    c = model.config
    I = s.moe_intermediate_size or c.intermediate_size
    shards, each = shards_of_mlp(s, c)
    new = like(model, replace(
        c, n_routed_experts=s.n_routed_experts, n_shared_experts=s.n_shared_experts,
        moe_intermediate_size=I, num_experts_per_tok=s.num_experts_per_tok,
        routed_scaling_factor=float(each)))
    for dense, block in zip(model.model.layers, new.model.layers):
        shared, routed = experts_of_mlp(dense.mlp, I, shards, s.n_shared_experts)
        moe = block.mlp
        if shared:
            gates, ups, downs = zip(*shared)
            moe.shared_experts.gate_proj.weight.copy_(torch.cat(gates))
            moe.shared_experts.up_proj.weight.copy_(torch.cat(ups))
            moe.shared_experts.down_proj.weight.copy_(torch.cat(downs, 1))
        for e in range(s.n_routed_experts):
            gate, up, down = routed[e % each]
            moe.experts.gate_up_proj[e].copy_(torch.cat((gate, up)))
            moe.experts.down_proj[e].copy_(down)
        router = moe.gate.weight
        router.copy_(router[::each].repeat_interleave(each, 0))
    return new


def experts_of_mlp(mlp, I, shards, n_shared):
    """-> the shared and the routed experts that make up an MLP, each as the weights of gate (I, D),
    up (I, D) and down (D, I)"""
    down = mlp.down_proj.weight
    if shards == 1:                             # copies: shared ones have their part in the sum
        down = down * (1 / (n_shared + 1))
    pieces = list(zip(mlp.gate_proj.weight.split(I), mlp.up_proj.weight.split(I), down.split(I, 1)))
    if shards == 1:
        return pieces * n_shared, pieces
    return pieces[:n_shared], pieces[n_shared:]


def perturb(model, size):
    """Noise on routers and routed experts, in place: equal experts with equal gradients would stay
    equal."""
    for moe in model.moe_layers:
        for p in (moe.gate.weight, moe.experts.gate_up_proj, moe.experts.down_proj):
            p += size * p.std() * torch.randn_like(p)


# ---------------------------------------------------------------------- GQA -> MLA, exact

NEUTRAL = 2.0 ** -27        # so small a latent that its norm divides by the epsilon, 1e-6, alone


def exact_mla(model, s):
    """All key heads side by side are the shared rotated key, dr = G d, and a query is zero outside
    its own; all values are the latent. RoPE's table repeats once per key head: DeepseekV3 in
    transformers can be told so (longrope), our model cannot load it, but for a single key head,
    where the table is its own."""
    c = model.config
    H = c.num_attention_heads
    G = c.num_key_value_heads
    d = c.head_dim
    dn = s.qk_nope_head_dim
    new = like(model, replace(c, attention='mla', kv_lora_rank=G * d, qk_nope_head_dim=dn,
                              qk_rope_head_dim=G * d, v_head_dim=d))
    new.rope = model.rope.repeat(1, 1, G)                                         # (2, S, G d/2)
    own = torch.eye(G).repeat_interleave(H // G, 0)                                      # (H, G)
    for dense, block in zip(model.model.layers, new.model.layers):
        old = dense.self_attn
        mla = block.self_attn
        q = pairs(old.q_proj.weight, H) * ((dn + G * d) / d) ** 0.5                 # (H, d/2, D)
        q = rows(own[:, :, None, None] * q[:, None]).flatten(1, 2)                  # (H, G d, D)
        mla.q_proj.weight.copy_(F.pad(q, (0, 0, dn, 0)).flatten(0, 1))         # (H (dn+G d), D)
        k = rows(pairs(old.k_proj.weight, G)).flatten(0, 1)                            # (G d, D)
        mla.kv_a_proj_with_mqa.weight.copy_(torch.cat((old.v_proj.weight * NEUTRAL, k)))
        mla.kv_a_layernorm.weight.fill_(1e-3 / NEUTRAL)
        v = own[:, None, :, None] * torch.eye(d)[None, :, None]                    # (H, d, G, d)
        v = F.pad(v.flatten(2), (0, 0, dn, 0)).flatten(0, 1)                  # (H (dn+d), G d)
        mla.kv_b_proj.weight.copy_(v)
        mla.o_proj.weight.copy_(old.o_proj.weight)
    return new


def longrope(c, G):
    """rope_parameters with which transformers' table of G heads' frequencies is that of one head,
    G times"""
    dr = c.qk_rope_head_dim
    i = torch.arange(dr // 2, dtype=torch.float64)
    wanted = 2 * (i % (dr // 2 // G)) * G / dr                      # exponents of 1 / rope_theta
    factors = (c.rope_theta ** (wanted - 2 * i / dr)).tolist()
    return {'rope_type': 'longrope', 'rope_theta': c.rope_theta, 'factor': 1.0,
            'attention_factor': 1.0, 'short_factor': factors, 'long_factor': factors,
            'original_max_position_embeddings': c.max_position_embeddings}


def pairs(weight, heads):
    """Rows in Llama's order, (heads d, D) -> complex (heads, d/2, D)"""
    a, b = weight.unflatten(0, (heads, 2, -1)).unbind(1)
    return torch.complex(a, b)


def rows(z):
    """complex (..., n, D) -> real (..., 2n, D), a pair's rows one after the other, as DeepSeek has
    them"""
    return torch.stack((z.real, z.imag), -2).flatten(-3, -2)


# ----------------------------------------------------------------- GQA -> MLA, compressed

def root(S, least=1e-9):
    """Hermitian S, at least 0 -> its square root, and that one's inverse"""
    e, U = torch.linalg.eigh(S)
    e = e.clamp(min=max(e.max().item() * least, 1e-30)).sqrt()
    return (U * e) @ U.mH, (U / e) @ U.mH


def rope_part(q, k, S, s, each):
    """q (H, d/2, D), k (G, d/2, D), S (D, D) of the inputs -> the shared key (dr/2, D), its queries
    (H, dr/2, D), and what is left of the keys (G, d/2, D). Within one frequency the G heads' pairs
    are a vector in C^G, of which one direction is kept: the principal one where queries are large
    (as in [2], but in complex numbers), or one head. each: queries of a key head"""
    G, half, D = k.shape
    size = torch.einsum('hjd,de,hje->hj', q, S, q.conj()).real                        # (H, d/2)
    size = size.view(G, each, half).sum(1).sqrt() + 1e-9                              # (G, d/2)
    keys = []
    queries = []
    rest = k.clone()
    for i in range(s.qk_rope_head_dim // 2):
        j = round(i * s.rope_stride)
        weighted = size[:, j, None] * k[:, j]                                            # (G, D)
        direction = kept_direction(weighted @ S @ weighted.mH, i, s.rope_heads)            # (G,)
        key = direction.conj() @ weighted                                                  # (D,)
        back = direction / size[:, j]                       # k[g, j] is about back[g] key
        queries.append(back.conj().repeat_interleave(each)[:, None] * q[:, j])           # (H, D)
        keys.append(key)
        rest[:, j] -= back[:, None] * key
    return torch.stack(keys), torch.stack(queries, 1), rest


def kept_direction(M, i, rope_heads):
    """M (G, G), what the key heads' pairs of frequency number i have in common -> the direction
    that is kept (G,)"""
    if rope_heads == 'pca':
        return torch.linalg.eigh(M)[1][:, -1]
    head = M.diagonal().real.argmax()
    if rope_heads == 'cycle':
        head = i % len(M)
    return torch.eye(len(M), dtype=M.dtype)[head]


def latent_part(k, v, o, by_q, S, s):
    """Rows (top, D) of the latents that keys k and values v (G, d, D) are best made from: joint SVD
    [1], where keys are measured by what they do to the scores of their queries, and values by what
    o_proj makes of them. o (D, G, H/G, d), by_q (H, d, d)"""
    G, d, D = k.shape
    if s.svd == 'scores':
        by_k = s.key_weight ** 2 / d * by_q.view(G, -1, d, d).sum(1)                  # (G, d, d)
        by_o = torch.einsum('dgei,dgej->gij', o, o)                                   # (G, d, d)
    else:
        by_k = torch.eye(d, dtype=S.dtype).expand(G, d, d)
        by_o = by_k
    if s.svd == 'weights':
        S = torch.eye(D, dtype=S.dtype)
    weighted = []
    for measure, rows_of_head in zip((*by_k, *by_o), (*k, *v)):
        weighted.append(root(measure)[0] @ rows_of_head)
    Y = torch.cat(weighted)                                                          # (2 G d, D)
    e, U = torch.linalg.eigh(Y @ S @ Y.T)                       # U and squares of the SVD's values
    top = s.kv_lora_rank
    if s.anchor:                                                # one dim is the constant
        top -= 1
    scale = e[-top:, None].clamp(min=e[-1] * 1e-12).sqrt()      # so that latents are white
    return (U.T @ Y)[-top:] / scale


def head_part(q, k, v, by_q, x, latent, dn):
    """Each head's queries and keys at rank dn, (H, dn, D) and (H, dn, R), and values (H, d, R),
    from latents (N, R)"""
    H, _, D = q.shape
    R = latent.shape[1]
    each = H // len(k)
    C, C_inverse = root((latent.T @ latent / len(x)).double())                           # (R, R)
    from_latent = (x.T @ latent / len(x)).double() @ C_inverse @ C_inverse  # (D, R) least squares
    q_nope = torch.zeros(H, dn, D, dtype=q.dtype)
    k_nope = torch.zeros(H, dn, R, dtype=q.dtype)
    for h in range(H):
        half, half_inverse = root(by_q[h])
        scores = half @ k[h // each] @ from_latent @ C
        U, e, Vh = torch.linalg.svd(scores, full_matrices=False)
        rank = min(dn, len(e))
        scale = e[:dn, None].sqrt()
        q_nope[h, :rank] = scale * U[:, :rank].T @ half_inverse @ q[h]
        k_nope[h, :rank] = scale * Vh[:rank] @ C_inverse
    return q_nope, k_nope, (v @ from_latent).repeat_interleave(each, 0)


def without_position(rest, c):
    """What is left of the keys (G, d/2, D), without position: the turn is replaced by its mean over
    the last 64 tokens. Slow pairs hardly change."""
    half = rest.shape[1]
    w = c.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)                 # (d/2,)
    mean_turn = torch.exp(-1j * w[:, None] * torch.arange(64)).mean(1)
    return rest * mean_turn[:, None]


def compressed_layer(old, x, c, s):
    """A layer's GQA, its inputs x (N, D) on calibration text -> MLA's weights {name: tensor}, with
    errors least on average over x"""
    H = c.num_attention_heads
    G = c.num_key_value_heads
    d = c.head_dim
    D = c.hidden_size
    dn = s.qk_nope_head_dim
    mean = x.double().mean(0)                                                              # (D,)
    S = (x.T @ x / len(x)).double()                                                      # (D, D)
    S += 1e-5 * S.trace() / D * torch.eye(D, dtype=S.dtype)
    q = pairs(old.q_proj.weight.double(), H)
    k = pairs(old.k_proj.weight.double(), G)
    key, query, rest = rope_part(q, k, S.to(q.dtype), s, H // G)
    q = rows(q)                                                                       # (H, d, D)
    k = rows(without_position(rest, c))                                               # (G, d, D)
    v = old.v_proj.weight.double().view(G, d, D)
    by_q = torch.einsum('hid,de,hje->hij', q, S, q)                                   # (H, d, d)
    # x @ ones is 1 within a few percent, as RMSNorm's output has a large mean: the norm of the
    # latent is held by it, values have a bias from it, and keys, of which the softmax sees
    # differences only, do not need it
    ones = torch.linalg.solve(S, mean)                                                     # (D,)
    centred_v = v
    if s.anchor:
        k = k - (k @ mean)[..., None] * ones
        centred_v = v - (v @ mean)[..., None] * ones
    o = old.o_proj.weight.double().view(D, G, -1, d)
    a = latent_part(k, centred_v, o, by_q, S, s)                                         # (R, D)
    if s.anchor:
        a = torch.cat((a, s.anchor * ones[None]))
    a = a.float()
    a = a / (x @ a.T).pow(2).mean(1).sqrt().mean()
    latent = F.rms_norm(x @ a.T, (len(a),), eps=1e-6)                     # (N, R), as it will be
    q_nope, k_nope, v = head_part(q, k, v, by_q, x, latent, dn)
    q = torch.cat((q_nope, rows(query)), 1) * ((dn + s.qk_rope_head_dim) / d) ** 0.5
    return {'q_proj.weight': q.flatten(0, 1),
            'kv_a_proj_with_mqa.weight': torch.cat((a, rows(key).float())),
            'kv_a_layernorm.weight': torch.ones(len(a)),
            'kv_b_proj.weight': torch.cat((k_nope, v), 1).flatten(0, 1),
            'o_proj.weight': old.o_proj.weight}


def compressed_mla(model, s, idx):
    """Closed form: each layer from the dense model's own activations on idx (B, T)"""
    c = model.config
    dr = s.qk_rope_head_dim
    # its dr/2 frequencies are the first ones of d/2, by stride
    theta = c.rope_theta ** (s.rope_stride * dr / c.head_dim)
    new = like(model, replace(
        c, attention='mla', kv_lora_rank=s.kv_lora_rank, qk_nope_head_dim=s.qk_nope_head_dim,
        qk_rope_head_dim=dr, v_head_dim=c.head_dim, rope_theta=theta))
    rope = model.rope[:, :idx.shape[1]]
    h = model.model.embed_tokens(idx)                                                 # (B, T, D)
    for i, (old, block) in enumerate(zip(model.model.layers, new.model.layers)):
        x = old.input_layernorm(h).flatten(0, 1)                                         # (N, D)
        found = compressed_layer(old.self_attn, x, c, s)
        block.self_attn.load_state_dict({name: t.float() for name, t in found.items()})
        h = through(old, h, rope, s)
        show(f'layer {i + 1} of {c.num_hidden_layers}')
    return new


# ---------------------------------------------------------------------- fitting the MLA

def fit(model, new, s, idx):
    """Layer by layer, a few steps of gradient descent on MLA, on the activations of the layers
    fitted before: the residual stream behind the attention is to be the dense model's. So a layer
    also makes up for those before it."""
    h = model.model.embed_tokens(idx)                   # the dense model's stream (B, T, D)
    g = h                                               # the new model's
    old_rope = model.rope[:, :idx.shape[1]]
    new_rope = new.rope[:, :idx.shape[1]]
    for i, (old, block) in enumerate(zip(model.model.layers, new.model.layers)):
        def attention(x):
            return old.self_attn(old.input_layernorm(x), old_rope)

        goal = h + in_parts(attention, h, s)
        size = goal.pow(2).mean(-1)                                                      # (B, T)
        fit_layer(block.self_attn, block.input_layernorm(g), goal - g, size, new_rope, s)
        h = through(old, h, old_rope, s)
        g = through(block, g, new_rope, s)
        show(f'fitting layer {i + 1} of {len(new.model.layers)}')


def fit_layer(mla, x, goal, size, rope, s):
    """Trains mla so that of x (B, T, D) it makes goal (B, T, D); errors are relative to size
    (B, T), and no token counts for more than 1: where the streams have parted (a massive
    activation too many) it would drown all others."""
    order = torch.Generator().manual_seed(s.seed)
    optimizer = torch.optim.AdamW(mla.parameters(), s.fit_lr, (0.9, 0.95), weight_decay=0,
                                  fused=True)
    for step in range(s.fit_steps):
        some = torch.randperm(len(x), generator=order)[:s.batch_size]
        with torch.enable_grad():
            with amp():
                y = mla(x[some], rope)
            error = (y.float() - goal[some]).pow(2).mean(-1) / size[some]                # (B, T)
            (error / (error + 1)).mean().backward()
        optimizer.param_groups[0]['lr'] = s.fit_lr * (1 - 0.9 * step / s.fit_steps)
        optimizer.step()
        optimizer.zero_grad()


def through(block, x, rope, s):
    """The residual stream x (B, T, D) behind a block"""
    return in_parts(lambda part: block(part, rope)[0], x, s)


def in_parts(f, x, s):
    """f(x) in float32, batch_size sequences at a time"""
    with amp():
        return torch.cat([f(part).float() for part in x.split(s.batch_size)])


def amp():
    """bfloat16 where the CPU has it"""
    return torch.autocast('cpu', torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


def show(line):
    if sys.stderr.isatty():
        print(f'\r{line} ', end='', file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------- report

def losses(model, s, held):
    """{name: next-token loss in nats} on the held-out texts"""
    found = {}
    for name, (x, y) in held.items():
        total = 0.0
        for a, b in zip(x.split(s.batch_size), y.split(s.batch_size)):
            with amp():
                _, loss = model(a, b)
            total += loss.item() * len(a)
        found[name] = total / len(x)
    return found


def probe(model):
    """-> logits (1, T, V) on tokens that are always the same, in float32"""
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(model.config.vocab_size, (1, 64), generator=generator)
    logits, _ = model(idx)
    return logits


def cache_bytes(c):
    """Of a token in all layers, in bfloat16; an MLA's are the latent and the shared key"""
    values = 2 * c.num_key_value_heads * c.head_dim
    if c.attention == 'mla':
        values = c.kv_lora_rank + c.qk_rope_head_dim
    return 2 * values * c.num_hidden_layers


class Report:
    """A row per stage, on the terminal as it comes and for convert.json."""

    def __init__(self, s, held):
        self.s = s
        self.held = held
        self.rows = []
        self.last = None
        names = ' '.join(f'{name[:24]:>12}' for name in held)
        print(f'{"stage":38} {"parameters":>12} {"active":>12} {"cache B/token":>13} '
              f'{"logits moved":>12} {names}')

    def add(self, stage, model, follows=True):
        """model after a stage. logits moved: the largest difference to those of the stage before"""
        table = parameter_table(model)
        logits = probe(model)
        moved = None
        if follows and self.last is not None:
            moved = (logits - self.last).abs().max().item()
        if follows:
            self.last = logits
        row = {'stage': stage, 'parameters': table['total'], 'active': table['active'],
               'cache_bytes_per_token': cache_bytes(model.config), 'logits_moved': moved,
               'loss': losses(model, self.s, self.held)}
        self.rows.append(row)
        show(' ' * 30 + '\r')
        told = ''
        if moved is not None:
            told = f'{moved:.2e}'
        columns = []
        for name, loss in row['loss'].items():
            columns.append(f'{loss:{max(12, len(name[:24]))}.4f}')
        print(f'{stage:38} {row["parameters"]:12,} {row["active"]:12,} '
              f'{row["cache_bytes_per_token"]:13,} {told:>12} {" ".join(columns)}', flush=True)


METHODS = {
    'frequencies from the whole range': {'rope_stride': 'all'},
    'key heads in turn': {'rope_heads': 'cycle'},
    'the key head of the largest norm': {'rope_heads': 'norm'},
    'SVD of keys and values': {'svd': 'activations'},
    'SVD of weights': {'svd': 'weights'},
    'keys weigh as values do': {'key_weight': 1.0},
    'no constant in the latent': {'anchor': 0.0}}


def compare(model, s, idx, report):
    """Rows of the report for other methods at the same cache, in closed form: each differs in one
    setting."""
    report.add('- exact: no rank is lost, nothing saved', exact_mla(model, s), follows=False)
    for name, changes in METHODS.items():
        if changes.get('rope_stride') == 'all':
            changes = {'rope_stride': model.config.head_dim / s.qk_rope_head_dim}
        report.add(f'- {name}', compressed_mla(model, replace(s, **changes), idx), follows=False)


def for_transformers_alone(s, dense_config):
    """Whether RoPE's table repeats, which our own model has not"""
    return s.attention == 'mla' and s.exact and dense_config.num_key_value_heads > 1


def write(model, s, source, report, dense_config, began):
    """The Hugging Face folder: under its own name only when it is complete. OSError"""
    out = Path(s.out_dir)
    tmp = out.with_name(f'.{out.name}.tmp')
    shutil.rmtree(tmp, ignore_errors=True)
    loads_in = 'nanoseek, transformers'
    try:
        model.save_pretrained(tmp, dtype=getattr(torch, s.dtype))
        if for_transformers_alone(s, dense_config):
            loads_in = 'transformers'
            values = folders.read_json(tmp / 'config.json')
            values['rope_parameters'] = longrope(model.config, dense_config.num_key_value_heads)
            folders.write_json(tmp / 'config.json', values, indent=2)
        folders.write_companions(tmp, load_tokenizer(source), model.config,
                                 folders.read_companions(source))
        folders.write_json(tmp / 'convert.json', {
            'settings': asdict(s), 'stages': report.rows,
            'seconds': round(time.perf_counter() - began, 1), 'loads_in': loads_in})
    except (OSError, RuntimeError, SafetensorError) as e:   # a full disk, as the libraries put it
        reason = files.why(e, out.parent)
        shutil.rmtree(tmp, ignore_errors=True)
        raise OSError(f'{out} could not be written: {reason}') from e
    if out.exists():
        shutil.rmtree(out)
    os.replace(tmp, out)


@torch.no_grad()
def main(s, source, idx, held):
    """source: the dense model's folder; idx and held: of texts()"""
    began = time.perf_counter()
    model = Transformer.from_pretrained(source).eval()
    dense_config = model.config
    torch.manual_seed(s.seed)
    report = Report(s, held)
    if held:
        report.add('random weights', Transformer(dense_config).eval(), follows=False)
    report.add('as it was', model)
    if s.attention == 'mla' and s.exact:
        model = exact_mla(model, s)
        report.add('MLA, exact', model)
    elif s.attention == 'mla':
        if s.compare:
            compare(model, s, idx, report)
        dense = model
        model = compressed_mla(dense, s, idx)
        report.add('MLA, closed form', model)
        if s.fit_steps:
            fit(dense, model, s, idx)
            report.add(f'MLA, fitted in {s.fit_steps} steps a layer', model)
        del dense
    if s.n_routed_experts:
        model = to_moe(model, s)
        report.add('MoE', model)
        if s.perturb:
            perturb(model, s.perturb)
            report.add(f'MoE, perturbed by {s.perturb:g}', model)
    with config.user_errors():
        write(model, s, source, report, dense_config, began)
    following = f'python train.py config/smol135_heal.py --init_from={s.out_dir}'
    if for_transformers_alone(s, dense_config):
        following = 'load it with transformers'
    print(f'written to {s.out_dir} in {time.perf_counter() - began:.0f} s; next: {following}')


if __name__ == '__main__':
    with ExitStack() as held:
        with config.user_errors():
            given, = config.load(Settings, positional='model out_dir', usage=__doc__)
            settings = Settings(**given)
            planned = plan(settings)
            held.enter_context(files.lock(settings.out_dir))
        main(settings, *planned)
