"""Turn a dense Llama-like model into a DeepSeek-like one with its weights: GQA into MLA, the MLPs into experts.

    python convert.py HuggingFaceTB/SmolLM2-135M out/smol135-upcycled --attention=mla --n_routed_experts=3 \\
        --n_shared_experts=1 --calibration=data/tinyshakespeare-smollm2     # what config/smol135.py describes
    python convert.py HuggingFaceTB/SmolLM2-135M out/smol135-moe --n_routed_experts=4       # exact: four copies
    python convert.py HuggingFaceTB/SmolLM2-135M out/smol135-mla --attention=mla --exact    # exact, and as large

The result is a Hugging Face folder (Glm4Moe or DeepseekV3) with its tokenizer and convert.json, the report.
python train.py --init_from=FOLDER trains on; config/smol135_heal.py has the settings for it.

References: [1] MHA2MLA, arXiv 2502.14837   [2] TransMLA, arXiv 2502.07864   [3] sparse upcycling, arXiv 2212.05055
Dims are those of model.py. A pair that RoPE turns is written as a complex number here: z = a + ib, turned by exp(i w t)
with its frequency w; so keys and queries are complex rows, (d/2, D), and a score is Re sum_j conj(q_j) k_j exp(i w_j
(s-t)). What maps a pair to a pair by a complex factor commutes with RoPE.
"""
import nanoseek.tuning  # noqa: F401  # first: it acts before torch is loaded

import json, os, shutil, sys, time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError

import config
from model import Config, Transformer
from nanoseek import folders, hf
from nanoseek.checkpoint import of_run
from nanoseek.estimate import parameter_table
from nanoseek.tokens import open_data
from nanoseek.tokenizer import encode, load_tokenizer

@dataclass
class Settings:
    """Settings of convert.py"""
    model: str = ''                     # the dense model, a folder or Hub id; also without its name
    out_dir: str = ''                   # where to write; also without its name
    attention: Literal['gqa', 'mla'] = 'gqa'  # gqa: as it is
    exact: bool = False                 # MLA without any loss or saving, for transformers: a frequency table repeats
    kv_lora_rank: int = 128             # R, rank of the latent
    qk_rope_head_dim: int = 32          # dr, dims that keep their position
    qk_nope_head_dim: int = 32          # dn, a head's dims without position
    rope_stride: float = 1.0            # every so manieth frequency is kept, from the highest on; d/dr: all over
    rope_heads: Literal['pca', 'norm', 'cycle'] = 'pca'  # what stands for the key heads' pairs of one frequency: their
                                        # principal component, the pair that matters most, or one in turn
    svd: Literal['scores', 'activations', 'weights'] = 'scores'  # error of the latent measured in scores and outputs,
                                        # in keys and values, in weights
    key_weight: float = 20.0            # svd=scores: weight of an error in scores over one in outputs
    anchor: float = 20.0                # scale of the latent's constant dimension, which holds its norm; 0: none
    fit_steps: int = 60                 # steps per layer of fitting MLA's output to GQA's; 0: none
    fit_lr: float = 1e-3                # their learning rate
    n_routed_experts: int = 0           # E; 0: the MLPs stay dense
    n_shared_experts: int = 0           # experts that every token passes
    num_experts_per_tok: int = 2        # K
    moe_intermediate_size: int = 0      # I; 0: as wide as the MLP, the experts are copies; narrower: they are shards
    perturb: float = 0.01               # noise on routers and routed experts, in parts of their deviation: breaks ties
    calibration: str | None = None      # what it is fitted to: texts or dataset folders, with commas; their last tenth
                                        # (a dataset's val split) is held out, for the losses of the report
    held_out: str | None = None         # further texts or dataset folders for the losses only
    calibration_tokens: int = 16384     # of them, in sequences of block_size
    eval_tokens: int = 8192             # of each held-out text
    block_size: int = 256               # tokens per sequence
    batch_size: int = 4                 # sequences at a time
    compare: bool = False               # also measure the other methods, at the same cache
    dtype: Literal['bfloat16', 'float32'] = 'float32'  # of the file
    seed: int = 1337                    # of routers, noise and the order of the fit

    def __post_init__(self):
        for limit, ok, names in (('at least 1', lambda v: v >= 1, 'kv_lora_rank qk_nope_head_dim num_experts_per_tok '
                                  'calibration_tokens eval_tokens block_size batch_size'),
                                 ('at least 0', lambda v: v >= 0, 'anchor fit_steps n_routed_experts n_shared_experts '
                                  'moe_intermediate_size perturb'),
                                 ('above 0', lambda v: v > 0, 'rope_stride key_weight fit_lr')):
            for name in names.split():
                if not ok(getattr(self, name)):
                    raise ValueError(f'{name}={getattr(self, name)}: must be {limit}')
        if not self.model or not self.out_dir:
            raise ValueError('convert what, and where to? python convert.py MODEL OUT_DIR --attention=mla ...')
        if self.attention == 'gqa' and not self.n_routed_experts:
            raise ValueError('nothing to convert: set attention=mla, n_routed_experts, or both')
        if self.attention == 'mla' and not self.exact and not self.calibration:
            raise ValueError('attention=mla: a latent is fitted to text: give one, --calibration=FILE or a dataset '
                             'folder, or take --exact, which needs none')

def check(s, c):
    """What of the settings does not fit the model of Config c. ValueError"""
    width, d, dr, G = c.intermediate_size, c.head_dim, s.qk_rope_head_dim, c.num_key_value_heads
    I, S, E, K = s.moe_intermediate_size or width, s.n_shared_experts, s.n_routed_experts, s.num_experts_per_tok
    shards, most = max(width // I, 1), int((d // 2 - 1) // s.rope_stride + 1) * 2
    each = shards - S if shards > 1 else 1                  # routed shards that make up an MLP, with the shared ones
    mla, moe = s.attention == 'mla' and not s.exact, E > 0
    for name, ok, limit in (
            ('model', c.attention == 'gqa' and not c.n_routed_experts, 'must be a dense Llama-like model'),
            ('attention', s.attention == 'gqa' or not c.rope_scaling, 'a model with rope_scaling is not converted'),
            ('kv_lora_rank', not mla or s.kv_lora_rank <= 2 * G * d, f'keys and values have only {2 * G * d} dims'),
            ('qk_nope_head_dim', not mla or s.qk_nope_head_dim <= d, f'must be at most {d}, the dims of a head'),
            ('qk_rope_head_dim', not mla or dr % 2 == 0 and 0 < dr <= most,
             f'must be even and at most {most}, as there are {d // 2} frequencies and rope_stride={s.rope_stride:g}'),
            ('moe_intermediate_size', not moe or I <= width and width % I == 0, f'must divide {width}, the width of '
             f'the MLP, as {width // 2} and {width // 4} do'),
            ('n_shared_experts', not moe or each > 0, f'must be below {shards}, the shards of an MLP'),
            ('n_routed_experts', not moe or E % max(each, 1) == 0, f'must be a multiple of {each}, the routed shards'),
            ('num_experts_per_tok', not moe or K % max(each, 1) == 0 and K <= E, 'must be a multiple of '
             f'{each}, the routed shards of an MLP, and at most n_routed_experts={E}')):
        if not ok:
            raise ValueError(f'{name}={getattr(s, name)}: {limit}')
    out = Path(s.out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir()) and not (out / 'convert.json').is_file()
                         or out.resolve() == Path(s.model).resolve()):
        raise ValueError(f'out_dir={s.out_dir}: there is something else already: take another')

# ------------------------------------------------------------------------------------------------------------- texts
def read_tokens(name, folder):
    """A dataset's folder, or a text file -> its tokens for calibration, its held-out ones. ValueError"""
    tokenizer = load_tokenizer(folder)
    if Path(name, 'meta.json').is_file() or Path('data', name, 'meta.json').is_file():
        data = open_data(name)
        if load_tokenizer(data.directory).get_vocab() != tokenizer.get_vocab():
            raise ValueError(f'{name} was made with another tokenizer than the model\'s: run python prepare.py for it '
                             f'again with --tokenizer={folder}')
        return data.splits['train'], data.splits.get('val', data.splits['train'])
    if not Path(name).is_file():
        raise ValueError(f"no text '{name}': must be a file, or a dataset that prepare.py made")
    try:
        ids = np.array(encode(tokenizer, Path(name).read_text(encoding='utf-8')), dtype=np.int64)
    except UnicodeDecodeError as e:
        raise ValueError(f'{name} is not UTF-8 text: {e}') from e
    return ids[:len(ids) * 9 // 10], ids[len(ids) * 9 // 10:]

def windows(ids, count, T, name):
    """ids (N,) -> idx (rows, T), targets (rows, T) of about count tokens, spread over the text"""
    rows = min(max(count // T, 1), (len(ids) - 1) // T)
    if rows < 1:
        raise ValueError(f'{name} has {len(ids):,} tokens, and block_size={T} needs {T + 1:,}: take a longer text')
    starts = [i * ((len(ids) - 1) // T // rows) * T for i in range(rows)]
    both = torch.from_numpy(np.stack([ids[a:a + T + 1] for a in starts]).astype(np.int64))
    return both[:, :-1], both[:, 1:]

def texts(s, folder):
    """-> idx (B, T) to calibrate on, or None; {name: (idx, targets)} of the held-out texts"""
    names = lambda value: [name.strip() for name in (value or '').split(',') if name.strip()]
    fit, held, share = [], {}, len(names(s.calibration))
    for name in names(s.calibration):
        train, val = read_tokens(name, folder)
        fit.append(windows(train, s.calibration_tokens // share, s.block_size, name)[0])
        held[Path(name).stem] = windows(val, s.eval_tokens, s.block_size, f'the held-out part of {name}')
    for name in names(s.held_out):
        held[Path(name).stem] = windows(read_tokens(name, folder)[1], s.eval_tokens, s.block_size, name)
    return torch.cat(fit) if fit else None, held

def plan(s):
    """Everything that a user's mistake can stop -> the model's folder, and texts(s)"""
    folder = folders.hub_folder(of_run(s.model), folders.MODEL_FILES)
    check(s, hf.read_config(Config, folder))
    return folder, *texts(s, folder)

# ------------------------------------------------------------------------------------------------------ dense -> MoE
def like(model, c):
    """-> a model of Config c, with the weights that have the same name and shape in model"""
    new, old = Transformer(c).eval(), model.state_dict()
    for name, t in new.state_dict().items():
        if name in old and old[name].shape == t.shape:
            t.copy_(old[name])
    new.rope = model.rope if c.attention == model.config.attention else new.rope
    return new

def to_moe(model, s):
    """Exact. Copies [3]: a token's experts are all the MLP itself, at weights that sum to 1. Shards: an MLP's output is
    the sum of its shards'; the router's rows are the same for the routed shards of a replica, so that a token takes all
    of them or none, each at 1/each of the replica's weight, which routed_scaling_factor makes up for"""
    c, S = model.config, s.n_shared_experts
    I = s.moe_intermediate_size or c.intermediate_size
    shards = c.intermediate_size // I
    each = shards - S if shards > 1 else 1
    new = like(model, replace(c, n_routed_experts=s.n_routed_experts, n_shared_experts=S, moe_intermediate_size=I,
                              num_experts_per_tok=s.num_experts_per_tok, routed_scaling_factor=float(each)))
    share = 1 / (S + 1) if shards == 1 else 1               # shared copies have their part in the sum
    for dense, block in zip(model.model.layers, new.model.layers):
        gate, up, down = (getattr(dense.mlp, f'{name}_proj').weight for name in ('gate', 'up', 'down'))
        pieces = list(zip(gate.split(I), up.split(I), (down * share).split(I, 1)))  # (I, D), (I, D), (D, I) each
        shared, routed = (pieces[:S], pieces[S:]) if shards > 1 else (pieces * S, pieces)
        moe, shared = block.mlp, list(zip(*shared))
        for p, parts, dim in zip((moe.shared_experts.gate_proj, moe.shared_experts.up_proj,
                                  moe.shared_experts.down_proj), shared, (0, 0, 1)):
            p.weight.copy_(torch.cat(parts, dim))
        for e in range(s.n_routed_experts):
            gate, up, down = routed[e % each]
            moe.experts.gate_up_proj[e].copy_(torch.cat((gate, up)))
            moe.experts.down_proj[e].copy_(down)
        moe.gate.weight.copy_(moe.gate.weight[::each].repeat_interleave(each, 0))
    return new

def perturb(model, size):
    """Noise on routers and routed experts, in place: equal experts with equal gradients would stay equal"""
    for moe in model.moe_layers:
        for p in (moe.gate.weight, moe.experts.gate_up_proj, moe.experts.down_proj):
            p += size * p.std() * torch.randn_like(p)

# ------------------------------------------------------------------------------------------------- GQA -> MLA, exact
NEUTRAL = 2.0 ** -27        # so small a latent that the norm's epsilon, 1e-6, is all that it is divided by

def exact_mla(model, s):
    """All key heads side by side are the shared rotated key, dr = G d, and a query is zero outside its own; all values
    are the latent. RoPE's table repeats once per key head: DeepseekV3 in transformers can be told so (longrope), our
    model cannot load it, but for a single key head, where the table is its own"""
    c = model.config
    H, G, d, dn, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim, s.qk_nope_head_dim, c.hidden_size
    new = like(model, replace(c, attention='mla', kv_lora_rank=G * d, qk_nope_head_dim=dn, qk_rope_head_dim=G * d,
                              v_head_dim=d))
    new.rope = model.rope.repeat(1, 1, G)                                                   # (2, S, G d/2)
    own = torch.eye(G).repeat_interleave(H // G, 0)                                         # (H, G)
    for block, mla in zip(model.model.layers, (block.self_attn for block in new.model.layers)):
        old = block.self_attn
        q = pairs(old.q_proj.weight, H) * ((dn + G * d) / d) ** 0.5                         # (H, d/2, D)
        q = F.pad(rows(own[:, :, None, None] * q[:, None]).flatten(1, 2), (0, 0, dn, 0))     # (H, dn + G d, D)
        mla.q_proj.weight.copy_(q.flatten(0, 1))
        k = rows(pairs(old.k_proj.weight, G)).flatten(0, 1)                                 # (G d, D)
        mla.kv_a_proj_with_mqa.weight.copy_(torch.cat((old.v_proj.weight * NEUTRAL, k)))
        mla.kv_a_layernorm.weight.fill_(1e-3 / NEUTRAL)
        v = own[:, None, :, None] * torch.eye(d)[None, :, None]                             # (H, d, G, d)
        mla.kv_b_proj.weight.copy_(F.pad(v.flatten(2), (0, 0, dn, 0)).flatten(0, 1))        # (H (dn + d), G d)
        mla.o_proj.weight.copy_(old.o_proj.weight)
    return new

def longrope(c, G):
    """rope_parameters with which transformers' table of G heads' frequencies is that of one head, G times"""
    dr, i = c.qk_rope_head_dim, torch.arange(c.qk_rope_head_dim // 2, dtype=torch.float64)
    wanted = 2 * (i % (dr // 2 // G)) * G / dr              # exponents of 1 / rope_theta
    factors = (c.rope_theta ** (wanted - 2 * i / dr)).tolist()
    return {'rope_type': 'longrope', 'rope_theta': c.rope_theta, 'factor': 1.0, 'attention_factor': 1.0,
            'short_factor': factors, 'long_factor': factors,
            'original_max_position_embeddings': c.max_position_embeddings}

def pairs(weight, heads):
    """Rows in Llama's order, (heads d, D) -> complex (heads, d/2, D)"""
    a, b = weight.unflatten(0, (heads, 2, -1)).unbind(1)
    return torch.complex(a, b)

def rows(z):
    """complex (..., n, D) -> real (..., 2n, D), a pair's rows one after the other, as DeepSeek has them"""
    return torch.stack((z.real, z.imag), -2).flatten(-3, -2)

# -------------------------------------------------------------------------------------------- GQA -> MLA, compressed
def root(S, least=1e-9):
    """Hermitian S, at least 0 -> its square root, and that one's inverse"""
    e, U = torch.linalg.eigh(S)
    e = e.clamp(min=max(e.max().item() * least, 1e-30)).sqrt()
    return (U * e) @ U.mH, (U / e) @ U.mH

def rope_part(q, k, S, s, each):
    """q (H, d/2, D), k (G, d/2, D), S (D, D) of the inputs -> the shared key (dr/2, D), its queries (H, dr/2, D), and
    what is left of the keys (G, d/2, D). Within one frequency the G heads' pairs are a vector in C^G, of which one
    direction is kept: the principal one where queries are large (as in [2], but in complex numbers), or one head"""
    G, half = k.shape[:2]
    size = torch.einsum('hjd,de,hje->hj', q, S, q.conj()).real.view(G, each, half).sum(1).sqrt() + 1e-9     # (G, d/2)
    key, query, rest = [], [], k.clone()
    for i, j in enumerate(round(i * s.rope_stride) for i in range(s.qk_rope_head_dim // 2)):
        weighted = size[:, j, None] * k[:, j]                                               # (G, D)
        M = weighted @ S @ weighted.mH                                                      # (G, G)
        v = torch.eye(G, dtype=q.dtype)[i % G if s.rope_heads == 'cycle' else M.diagonal().real.argmax()]
        if s.rope_heads == 'pca':
            v = torch.linalg.eigh(M)[1][:, -1]
        key.append(v.conj() @ weighted)                                                     # (D,)
        back = v / size[:, j]                                # k[g, j] is about back[g] key
        query.append(back.conj().repeat_interleave(each)[:, None] * q[:, j])                # (H, D)
        rest[:, j] -= back[:, None] * key[-1]
    return torch.stack(key), torch.stack(query, 1), rest

def latent_part(k, v, o, by_q, S, s):
    """Rows (top, D) of the latents that keys k and values v (G, d, D) are best made from: joint SVD [1], where keys are
    measured by what they do to the scores of their queries, and values by what o_proj makes of them"""
    G, d, D = k.shape
    eye = torch.eye(d, dtype=S.dtype).expand(G, d, d)
    by_k, by_o = s.key_weight ** 2 / d * by_q.view(G, -1, d, d).sum(1), torch.einsum('dgei,dgej->gij', o, o)
    by_k, by_o = (by_k, by_o) if s.svd == 'scores' else (eye, eye)
    Y = torch.cat([root(m)[0] @ y for m, y in zip((*by_k, *by_o), (*k, *v))])              # (2 G d, D)
    e, U = torch.linalg.eigh(Y @ (torch.eye(D, dtype=S.dtype) if s.svd == 'weights' else S) @ Y.T)  # U, s^2 of the SVD
    top = s.kv_lora_rank - bool(s.anchor)
    return (U.T @ Y)[-top:] / e[-top:, None].clamp(min=e[-1] * 1e-12).sqrt()                # latents are white

def head_part(q, k, v, by_q, x, latent, dn):
    """Each head's queries and keys at rank dn, (H, dn, D) and (H, dn, R), and values (H, d, R), from latents (N, R)"""
    (H, _, D), R, each = q.shape, latent.shape[1], len(q) // len(k)
    Ch, Ci = root((latent.T @ latent / len(x)).double())
    fit = (x.T @ latent / len(x)).double() @ Ci @ Ci                                        # (D, R): least squares
    q_nope, k_nope = torch.zeros(H, dn, D, dtype=q.dtype), torch.zeros(H, dn, R, dtype=q.dtype)
    for h in range(H):
        qh, qi = root(by_q[h])
        U, e, Vh = torch.linalg.svd(qh @ k[h // each] @ fit @ Ch, full_matrices=False)
        r, scale = min(dn, len(e)), e[:dn, None].sqrt()
        q_nope[h, :r], k_nope[h, :r] = scale * U[:, :r].T @ qi @ q[h], scale * Vh[:r] @ Ci
    return q_nope, k_nope, (v @ fit).repeat_interleave(each, 0)

def compressed_layer(old, x, c, s):
    """A layer's GQA, its inputs x (N, D) on calibration text -> MLA's weights, with errors least on average over x"""
    H, G, d, D, dn = c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.hidden_size, s.qk_nope_head_dim
    S, mean = (x.T @ x / len(x)).double(), x.double().mean(0)                               # (D, D), (D,)
    S += 1e-5 * S.trace() / D * torch.eye(D, dtype=S.dtype)
    q, k = (pairs(getattr(old, name).weight.double(), n) for name, n in (('q_proj', H), ('k_proj', G)))
    key, query, rest = rope_part(q, k, S.to(q.dtype), s, H // G)
    # A pair without position: the turn is replaced by its mean over the last 64 tokens. Slow pairs hardly change
    w = c.rope_theta ** (-torch.arange(d // 2, dtype=torch.float64) / (d // 2))             # (d/2,)
    rest = rest * torch.exp(-1j * w[:, None] * torch.arange(64)).mean(1)[:, None]
    q, k, v = rows(q), rows(rest), old.v_proj.weight.double().view(G, d, D)                 # (H, d, D), (G, d, D)
    by_q = torch.einsum('hid,de,hje->hij', q, S, q)                                         # (H, d, d)
    # x @ ones is 1 within a few percent, as RMSNorm's output has a large mean: the norm of the latent is held by it,
    # values have a bias from it, and keys, of which the softmax sees differences only, do not need it
    ones = torch.linalg.solve(S, mean)                                                      # (D,)
    centred = lambda w: w - (w @ mean)[..., None] * ones if s.anchor else w
    a = latent_part(k := centred(k), centred(v), old.o_proj.weight.double().view(D, G, -1, d), by_q, S, s)
    a = (torch.cat((a, s.anchor * ones[None])) if s.anchor else a).float()                  # (R, D)
    a = a / (x @ a.T).pow(2).mean(1).sqrt().mean()
    latent = F.rms_norm(x @ a.T, (len(a),), eps=1e-6)                                       # (N, R), as it will be
    q_nope, k_nope, v = head_part(q, k, v, by_q, x, latent, dn)
    q = torch.cat((q_nope, rows(query)), 1) * ((dn + s.qk_rope_head_dim) / d) ** 0.5
    return {'q_proj.weight': q.flatten(0, 1), 'kv_a_proj_with_mqa.weight': torch.cat((a, rows(key).float())),
            'kv_a_layernorm.weight': torch.ones(len(a)), 'kv_b_proj.weight': torch.cat((k_nope, v), 1).flatten(0, 1),
            'o_proj.weight': old.o_proj.weight}

def compressed_mla(model, s, idx):
    """Closed form: each layer from the dense model's own activations on idx (B, T)"""
    c, dr = model.config, s.qk_rope_head_dim
    theta = c.rope_theta ** (s.rope_stride * dr / c.head_dim)       # its dr/2 frequencies are d/2's first, by stride
    new = like(model, replace(c, attention='mla', kv_lora_rank=s.kv_lora_rank, qk_nope_head_dim=s.qk_nope_head_dim,
                              qk_rope_head_dim=dr, v_head_dim=c.head_dim, rope_theta=theta))
    h = model.model.embed_tokens(idx)                                                       # (B, T, D)
    for i, (old, block) in enumerate(zip(model.model.layers, new.model.layers)):
        found = compressed_layer(old.self_attn, old.input_layernorm(h).flatten(0, 1), c, s)
        block.self_attn.load_state_dict({name: t.float() for name, t in found.items()})
        h = parts(lambda x: old(x, model.rope[:, :idx.shape[1]])[0], h, s)
        show(f'layer {i + 1} of {c.num_hidden_layers}')
    return new

def fit(model, new, s, idx):
    """Layer by layer, a few steps of gradient descent on MLA, on the activations of the layers fitted before: the
    residual stream behind the attention is to be the dense model's. So a layer also makes up for those before it"""
    h = g = model.model.embed_tokens(idx)                    # the streams of the two models (B, T, D)
    ropes = [m.rope[:, :idx.shape[1]] for m in (model, new)]
    for i, (old, block) in enumerate(zip(model.model.layers, new.model.layers)):
        goal = h + parts(lambda x: old.self_attn(old.input_layernorm(x), ropes[0]), h, s)
        fit_layer(block.self_attn, block.input_layernorm(g), goal - g, goal.pow(2).mean(-1), ropes[1], s)
        h, g = (parts(lambda x: b(x, rope)[0], x, s) for b, x, rope in ((old, h, ropes[0]), (block, g, ropes[1])))
        show(f'fitting layer {i + 1} of {len(new.model.layers)}')

def fit_layer(mla, x, goal, size, rope, s):
    """Trains mla so that of x (B, T, D) it makes goal (B, T, D); errors are relative to size (B, T), and no token
    counts for more than 1: where the streams have parted (a massive activation too many) it would drown all others"""
    order = torch.Generator().manual_seed(s.seed)
    optimizer = torch.optim.AdamW(mla.parameters(), s.fit_lr, (0.9, 0.95), weight_decay=0, fused=True)
    for step in range(s.fit_steps):
        some = torch.randperm(len(x), generator=order)[:s.batch_size]
        with torch.enable_grad():
            with amp():
                y = mla(x[some], rope)
            error = (y.float() - goal[some]).pow(2).mean(-1) / size[some]                   # (B, T)
            (error / (error + 1)).mean().backward()
        optimizer.param_groups[0]['lr'] = s.fit_lr * (1 - 0.9 * step / s.fit_steps)
        optimizer.step()
        optimizer.zero_grad()

def parts(f, x, s):
    """f(x) in float32, batch_size sequences at a time"""
    with amp():
        return torch.cat([f(part).float() for part in x.split(s.batch_size)])

def amp():
    """bfloat16 where the CPU has it"""
    return torch.autocast('cpu', torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())

def show(line):
    if sys.stderr.isatty():
        print(f'\r{line} ', end='', file=sys.stderr, flush=True)

# ------------------------------------------------------------------------------------------------------------ report
def losses(model, s, held):
    """{name: next-token loss in nats} on the held-out texts"""
    found = {}
    for name, (x, y) in held.items():
        with amp():
            parts = [model(a, b)[1].item() * len(a) for a, b in zip(x.split(s.batch_size), y.split(s.batch_size))]
        found[name] = sum(parts) / len(x)
    return found

def probe(model):
    """-> logits (1, T, V) on tokens that are always the same, in float32"""
    idx = torch.randint(model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    return model(idx)[0]

def cache_bytes(c, dtype=2):
    """Of a token in all layers, in bfloat16; an MLA's is counted as the latent and the shared key"""
    values = c.kv_lora_rank + c.qk_rope_head_dim if c.attention == 'mla' else 2 * c.num_key_value_heads * c.head_dim
    return values * c.num_hidden_layers * dtype

class Report:
    """A row per stage, on the terminal as it comes and for convert.json"""
    def __init__(self, s, held):
        self.s, self.held, self.rows, self.last = s, held, [], None
        print(f'{"stage":38} {"parameters":>12} {"active":>12} {"cache B/token":>13} {"logits moved":>12} '
              + ' '.join(f'{name[:24]:>12}' for name in held))

    def add(self, stage, model, follows=True):
        """model after a stage. logits moved: the largest difference to those of the stage before"""
        table, logits, began = parameter_table(model), probe(model), time.perf_counter()
        moved = (logits - self.last).abs().max().item() if follows and self.last is not None else None
        self.last = logits if follows else self.last
        row = {'stage': stage, 'parameters': table['total'], 'active': table['active'],
               'cache_bytes_per_token': cache_bytes(model.config), 'logits_moved': moved,
               'loss': losses(model, self.s, self.held)}
        self.rows.append(row)
        show(' ' * 30 + '\r')
        print(f'{stage:38} {row["parameters"]:12,} {row["active"]:12,} {row["cache_bytes_per_token"]:13,} '
              f'{"" if moved is None else f"{moved:.2e}":>12} '
              + ' '.join(f'{loss:{max(12, len(name[:24]))}.4f}' for name, loss in row['loss'].items()), flush=True)

METHODS = {'frequencies all over (stride d/dr)': {'rope_stride': 'all'}, 'key heads in turn': {'rope_heads': 'cycle'},
           'the key head of the largest norm': {'rope_heads': 'norm'}, 'SVD of keys and values': {'svd': 'activations'},
           'SVD of weights': {'svd': 'weights'}, 'keys weigh as values do': {'key_weight': 1.0},
           'no constant in the latent': {'anchor': 0.0}}

def compare(model, s, idx, report):
    """Rows of the report for other methods at the same cache, in closed form: each differs in one setting"""
    report.add('- exact: no rank is lost, nothing saved', exact_mla(model, s), follows=False)
    for name, changes in METHODS.items():
        if changes.get('rope_stride') == 'all':
            changes = {'rope_stride': model.config.head_dim / s.qk_rope_head_dim}
        report.add(f'- {name}', compressed_mla(model, replace(s, **changes), idx), follows=False)

def write(model, s, source, report, began):
    """The Hugging Face folder: under its own name only when it is complete"""
    c, out = model.config, Path(s.out_dir)
    tmp = out.with_name(f'.{out.name}.tmp')
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        model.save_pretrained(tmp, dtype=getattr(torch, s.dtype))
        if s.attention == 'mla' and s.exact and report.heads > 1:
            d = json.loads((tmp / 'config.json').read_text())
            d['rope_parameters'] = longrope(c, report.heads)
            (tmp / 'config.json').write_text(json.dumps(d, indent=2) + '\n')
        folders.write_companions(tmp, load_tokenizer(source), c, folders.read_companions(source))
        found = {'settings': asdict(s), 'stages': report.rows, 'seconds': round(time.perf_counter() - began, 1),
                 'loads_in': 'transformers' if s.exact and report.heads > 1 else 'nanoseek, transformers'}
        (tmp / 'convert.json').write_text(json.dumps(found, indent=1) + '\n')
    except (OSError, RuntimeError, SafetensorError) as e:       # a full disk, as the three libraries put it
        shutil.rmtree(tmp, ignore_errors=True)
        raise OSError(f'{out} could not be written: {e}') from e
    if out.exists():
        shutil.rmtree(out)
    os.replace(tmp, out)

@torch.no_grad()
def main(s, source, idx, held):
    began = time.perf_counter()
    model = Transformer.from_pretrained(source).eval()
    torch.manual_seed(s.seed)
    report = Report(s, held)
    report.heads = model.config.num_key_value_heads
    if held:
        report.add('random weights', Transformer(model.config).eval(), follows=False)
    report.add('as it was', model)
    if s.attention == 'mla' and s.compare and not s.exact:
        compare(model, s, idx, report)
    if s.attention == 'mla':
        dense, model = model, exact_mla(model, s) if s.exact else compressed_mla(model, s, idx)
        report.add('MLA, exact' if s.exact else 'MLA, closed form', model)
        if s.fit_steps and not s.exact:
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
        write(model, s, source, report, began)
    print(f'written to {s.out_dir} in {time.perf_counter() - began:.0f} s; next: '
          + ('load it with transformers' if s.exact and report.heads > 1 else
             f'python train.py config/smol135_heal.py --init_from={s.out_dir}'))

if __name__ == '__main__':
    with config.user_errors():
        settings = Settings(**config.load(Settings, positional='model out_dir', usage=__doc__)[0])
        planned = plan(settings)
    main(settings, *planned)
