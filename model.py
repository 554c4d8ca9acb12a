"""The whole architecture of nanoseek: a DeepSeek-V3 style language model, and the Llama style one it grew out of.

References; an "eq. 12" in a comment is that of [1]
  [1] DeepSeek-V3 Technical Report, arXiv 2412.19437v2      [2] Auxiliary-Loss-Free Load Balancing, arXiv 2408.15664
  [3] RoFormer (RoPE), arXiv 2104.09864     [4] YaRN, arXiv 2309.00071     [5] Linear attention, arXiv 2006.16236
Dims, used in every shape comment
  B  sequences of a batch      T  new tokens of each        S  cached and new tokens     N  rows: B*T tokens
  D  hidden_size               H  query heads               G  key/value heads           V  vocab_size
  d  head_dim                  dn qk_nope_head_dim          dr qk_rope_head_dim          dv v_head_dim
  R  kv_lora_rank              E  routed experts            K  experts per token         I  width of an expert
Parameters carry Hugging Face's names (Llama, Glm4Moe, DeepseekV3); the experts are stacked, (E, out, in), until saved.
"""
import functools, json, math, sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------------------------- Config
KEYS = {'vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads', 'rms_norm_eps',
        'max_position_embeddings', 'rope_theta'}             # without which a config.json is refused
MLA_KEYS = {'q_lora_rank', 'kv_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim'}
MOE_KEYS = {'n_routed_experts', 'n_shared_experts', 'num_experts_per_tok', 'moe_intermediate_size',
            'first_k_dense_replace', 'n_group', 'topk_group', 'norm_topk_prob', 'routed_scaling_factor'}
CLASSES = {'llama': 'LlamaForCausalLM', 'glm4_moe': 'Glm4MoeForCausalLM', 'deepseek_v3': 'DeepseekV3ForCausalLM'}
OURS = 'nanoseek_'           # what model_type begins with for an attention that Hugging Face has no class for
FIXED = {'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False, 'attention_dropout': 0.0}
ONLY = {**FIXED, 'use_qk_norm': False, 'partial_rotary_factor': 1.0, 'scoring_func': 'sigmoid',
        'topk_method': 'noaux_tc', 'sliding_window': None, 'quantization_config': None, 'truncate': True}

@dataclass
class Config:
    """The architecture: the keys of Hugging Face's config.json, and at the end what only training uses"""
    vocab_size: int = 0                     # V; 0: the dataset's own
    hidden_size: int = 128                  # D, width of the residual stream
    intermediate_size: int = 0              # width of a dense layer's SwiGLU; 0: 8/3 of hidden_size
    num_hidden_layers: int = 4              # blocks, without the MTP ones
    num_attention_heads: int = 4            # H
    num_key_value_heads: int = 0            # G, for gqa; 0: as many as query heads
    head_dim: int = 0                       # d, for gqa and linear; 0: hidden_size / heads
    max_position_embeddings: int = 2048     # the longest context
    rope_theta: float = 10000.0             # RoPE's base
    rope_scaling: dict | None = None        # YaRN, as in config.json: {'rope_type': 'yarn', 'factor': 4.0, ...}
    rms_norm_eps: float = 1e-6              # RMSNorm's epsilon
    tie_word_embeddings: bool = True        # one matrix for the embedding and the head
    initializer_range: float = 0.02         # standard deviation of the initial weights
    bos_token_id: int | None = None         # begin-of-text token, for config.json
    eos_token_id: int | None = None         # end-of-text token, where generation stops
    attention: Literal['gqa', 'mla', 'linear'] = 'mla'  # kind of attention
    q_lora_rank: int | None = None          # MLA: rank of the query's bottleneck; none: a full-rank q_proj
    kv_lora_rank: int = 64                  # MLA: R, rank of the latent that is cached
    qk_nope_head_dim: int = 32              # MLA: dn, a head's dims without position
    qk_rope_head_dim: int = 16              # MLA: dr, a head's dims with position, the key's shared by all heads
    v_head_dim: int = 32                    # MLA: dv
    n_routed_experts: int = 0               # E; 0: a dense model
    n_shared_experts: int = 0               # experts that every token passes
    num_experts_per_tok: int = 2            # K
    moe_intermediate_size: int = 0          # I, width of one expert; 0: intermediate_size
    first_k_dense_replace: int = 0          # leading layers that stay dense
    n_group: int = 1                        # groups of experts, for group-limited routing
    topk_group: int = 1                     # groups that a token may choose from
    norm_topk_prob: bool = True             # a token's expert weights sum to routed_scaling_factor
    routed_scaling_factor: float = 1.0      # factor on the routed experts' weights
    num_nextn_predict_layers: int = 0       # multi-token prediction (MTP) depth
    bias_update_speed: float = 1e-3         # gamma of loss-free balancing, a step of the router's bias
    seq_aux_loss_weight: float = 1e-4       # alpha of the sequence-wise balance loss
    mtp_loss_weight: float = 0.3            # lambda of the MTP loss
    dropout: float = 0.0                    # on what attention and MLP add to the residual stream

    def __post_init__(self):
        for f in fields(self):
            if f.type is int and (value := getattr(self, f.name)) < (least := min(f.default, 1)):
                raise ValueError(f'impossible model: {f.name}={value}: must be at least {least}')
        D, H, E, groups = self.hidden_size, self.num_attention_heads, self.n_routed_experts, self.n_group
        mla, width, reach = self.attention == 'mla', self.head_dim or D / H, E // groups * self.topk_group
        self.head_dim, self.num_key_value_heads = int(width), self.num_key_value_heads or H
        self.intermediate_size = self.intermediate_size or -(-D // 24) * 64
        self.moe_intermediate_size = self.moe_intermediate_size or self.intermediate_size
        rope, yarn, K = 'qk_rope_head_dim' if mla else 'head_dim', self.rope_scaling or {}, self.num_experts_per_tok
        complete = yarn.get('rope_type') == 'yarn' and 'factor' in yarn and 'original_max_position_embeddings' in yarn
        for name, ok, limit in (
                ('num_attention_heads', mla or width % 1 == 0, f'must divide hidden_size={D}'),
                ('num_key_value_heads', mla or H % self.num_key_value_heads == 0, f'must divide {H} query heads'),
                (rope, getattr(self, rope) % 2 == 0, 'must be even, RoPE turns pairs'),
                ('n_group', not E or groups == 1 or E % groups == 0 < E // groups - 1, f'must divide {E} experts'),
                ('topk_group', self.topk_group <= groups, f'must be at most n_group={groups}'),
                ('num_experts_per_tok', not E or K <= reach, f'must be at most {reach}, the routed experts in reach'),
                ('q_lora_rank', (self.q_lora_rank or 1) > 0, 'must be at least 1, or none'),
                ('rope_scaling', not yarn or complete, 'must be yarn, with factor, original_max_position_embeddings')):
            if not ok:
                raise ValueError(f'impossible model: {name}={getattr(self, name)}: {limit}')

    def to_hf(self):
        """The dict of config.json, with the keys that transformers 4 and 5, vLLM and llama.cpp read"""
        mla, moe, d = self.attention == 'mla', self.n_routed_experts > 0, asdict(self)
        layers = self.num_hidden_layers + self.num_nextn_predict_layers
        kind = {'gqa': 'glm4_moe' if moe else 'llama', 'mla': 'deepseek_v3'}.get(self.attention, OURS + self.attention)
        for name in {'head_dim'} if mla else MLA_KEYS if moe else MLA_KEYS | MOE_KEYS:
            del d[name]
        if mla:                                              # a dense one has nothing but leading dense layers
            d |= {'num_key_value_heads': self.num_attention_heads, 'rope_interleave': True}
            d |= {} if moe else {'first_k_dense_replace': layers, 'n_routed_experts': 2}
        d |= {'scoring_func': 'sigmoid', 'topk_method': 'noaux_tc'} if mla or moe else {}       # for vLLM and llama.cpp
        rope = {'rope_type': 'default', **(self.rope_scaling or {}), 'rope_theta': self.rope_theta}
        if kind == 'glm4_moe':                               # whose default is a half
            rope['partial_rotary_factor'] = d['partial_rotary_factor'] = 1.0
        return {**d, **FIXED, 'model_type': kind, 'architectures': [CLASSES.get(kind, OURS)], 'rope_parameters': rope}

    @classmethod
    def from_hf(cls, d, **overrides):
        """config.json's dict -> Config. ValueError that names what is missing, or what this model cannot represent"""
        kind, rope = d.get('model_type'), d.get('rope_parameters') or d.get('rope_scaling') or {}
        if kind not in CLASSES and not str(kind).startswith(OURS):
            raise ValueError(f'config.json: model_type={kind!r}: must be one of {", ".join(CLASSES)}')
        d = {'partial_rotary_factor': 0.5 if kind == 'glm4_moe' else 1.0, 'tie_word_embeddings': False, **d, **rope}
        for name, value in ONLY.items():
            if d.get(name, value) != value:
                raise ValueError(f'config.json: {name}={d[name]!r}: this model can represent {value!r} only')
        needed = {'llama': KEYS, 'glm4_moe': KEYS | MOE_KEYS, 'deepseek_v3': KEYS | MOE_KEYS | MLA_KEYS}.get(kind, KEYS)
        if missing := [name for name in sorted(needed - {'q_lora_rank'}) if d.get(name) is None]:
            raise ValueError(f'config.json: {missing[0]} is missing')
        d['eos_token_id'] = eos[0] if isinstance(eos := d.get('eos_token_id'), list) else eos
        if d.get('first_k_dense_replace', 0) >= d['num_hidden_layers'] + d.get('num_nextn_predict_layers', 0):
            d['n_routed_experts'] = d['first_k_dense_replace'] = 0
        d['attention'] = {'deepseek_v3': 'mla', 'llama': 'gqa', 'glm4_moe': 'gqa'}.get(kind) or kind.removeprefix(OURS)
        kind = rope.get('rope_type') or rope.get('type') or 'default'
        rope = {k: v for k, v in rope.items() if k not in ('rope_theta', 'partial_rotary_factor', 'type')}
        d['rope_scaling'] = {**rope, 'rope_type': kind} if kind != 'default' else None
        return cls(**{f.name: d[f.name] for f in fields(cls) if d.get(f.name) is not None} | overrides)

# ------------------------------------------------------------------------------------------------- RMSNorm and RoPE
class Linear(nn.Linear):
    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)
    reset_parameters = lambda self: None                     # Transformer.init_weights does it

yarn_mscale = lambda factor, mscale: 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

def rope_table(config, dim):
    """-> cosines and sines (2, max_position_embeddings, dim/2) float32. [3]; YaRN [4] where rope_scaling asks for it"""
    freq = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2).float() / dim)
    scale, yarn = 1.0, config.rope_scaling or {}
    if yarn.get('rope_type') == 'yarn':
        factor, length = yarn['factor'], yarn['original_max_position_embeddings']
        turns = lambda n: dim * math.log(length / (n * 2 * math.pi)) / (2 * math.log(config.rope_theta))
        low = max(math.floor(turns(yarn.get('beta_fast') or 32)), 0)        # dims below turn often: kept as they are
        high = min(math.ceil(turns(yarn.get('beta_slow') or 1)), dim - 1)   # dims above hardly turn: stretched
        ramp = ((torch.arange(dim // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
        freq = freq / factor * ramp + freq * (1 - ramp)
        m_all = yarn.get('mscale') and yarn.get('mscale_all_dim') or 0      # both or none
        m = yarn['mscale'] if m_all else 1
        scale = yarn.get('attention_factor') or yarn_mscale(factor, m) / yarn_mscale(factor, m_all)
    angle = torch.outer(torch.arange(config.max_position_embeddings).float(), freq)
    return torch.stack((angle.cos(), angle.sin())) * scale

def rotate(x, rope, interleaved):
    """x (..., T, dr), rope (2, T, dr/2). DeepSeek turns the pairs (x0, x1), (x2, x3)..., Llama (x_i, x_{i+dr/2})"""
    (cos, sin), (a, b) = rope, (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)    # in whatever order, for q and k alike

# -------------------------------------------------------------------------------------------- Cache and attentions
class Cache:
    """What decoding keeps: buffers of a fixed size, per layer those that its attention names in cache_shapes"""
    def __init__(self, c, batch, size, dtype, device):
        self.length, shapes = 0, ATTENTION[c.attention].cache_shapes(c, size)
        self.layers = [[torch.zeros(batch, *shape, dtype=dtype, device=device) for shape in shapes]
                       for _ in range(c.num_hidden_layers)]
    def extend(self, layer, *new):                           # each (..., T, d) behind the cached ones -> (..., S, d)
        end = self.length + new[0].shape[-2]
        for buffer, x in zip(self.layers[layer], new):
            buffer[..., self.length:end, :] = x
        return [buffer[..., :end, :] for buffer in self.layers[layer]]

def attend(q, k, v, scale, mask=None):
    """Causal attention. q (B, H, T, d), k (B, G, S, d), v (B, G, S, dv) -> (B, H, T, dv); G divides H.
    The last query sees the last key, so query t sees keys up to S - T + t; mask: a document_mask to use instead"""
    (B, H, T, d), (G, S), dv = q.shape, k.shape[1:3], v.shape[-1]
    if callable(mask):
        return mask(q, k, v, scale=scale, enable_gqa=G != H)
    if T == 1 and d == dv:                                   # sees all; the heads that share a key are its queries
        return F.scaled_dot_product_attention(q.reshape(B, G, -1, d), k, v, scale=scale).view(B, H, 1, d)
    if T < S or q.device.type == 'cpu' and S <= 512:         # short: on a CPU matmuls beat the fused kernel
        mask = torch.full((T, S), -math.inf, dtype=q.dtype, device=q.device).triu(S - T + 1) if mask is None else mask
        C, out = 128 if T == S else T, []                    # queries at a time, with the keys that the last one sees
        for i, (q, m) in enumerate(zip((q * scale).split(C, 2), mask.split(C, -2))):
            end = S - T + (i + 1) * C
            scores = (q.reshape(B, G, -1, d) @ k[:, :, :end].mT).view(*q.shape[:3], -1) + m[..., :end]  # (B, H, C, end)
            weights = scores.softmax(-1, dtype=torch.float32 if T < S else None)   # in training it would cost much
            out.append((weights.view(B, G, -1, weights.shape[-1]).to(v.dtype) @ v[:, :, :end]).view(B, H, -1, dv))
        return torch.cat(out, 2)
    v, causal = F.pad(v, (0, max(d - dv, 0))), mask is None  # flash kernels want one head size for all three
    return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=G != H)[..., :dv]

class GQA(nn.Module):
    """Grouped-query attention, as Llama and SmolLM2 have it"""
    cache_shapes = staticmethod(lambda c, size: [(c.num_key_value_heads, size, c.head_dim)] * 2)
    def __init__(self, c):
        super().__init__()
        self.dims = H, G, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj, self.o_proj = Linear(c.hidden_size, H * d), Linear(H * d, c.hidden_size)
        self.k_proj, self.v_proj = Linear(c.hidden_size, G * d), Linear(c.hidden_size, G * d)

    def forward(self, x, rope, cache=None, layer=None, mask=None):
        q, k, v = (proj(x).unflatten(-1, (-1, self.dims[-1])).transpose(1, 2)               # (B, H, T, d), (B, G, T, d)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, rope, interleaved=False), rotate(k, rope, interleaved=False)
        return self.o_proj(self.mix(q, k, v, cache, layer, mask).transpose(1, 2).flatten(2))

    def mix(self, q, k, v, cache, layer, mask):
        k, v = cache.extend(layer, k, v) if cache is not None else (k, v)                   # (B, G, S, d)
        return attend(q, k, v, self.dims[-1] ** -0.5, mask)

class LinearAttention(GQA):
    """The feature map elu + 1 in the place of the softmax [5]: all that is kept of the past is a matrix per head"""
    cache_shapes = staticmethod(lambda c, size: [(c.num_attention_heads, c.head_dim, c.head_dim + 1)])
    def mix(self, q, k, v, cache, layer, mask, chunk=64):
        """y_t = sum_{s<=t} (q_t . k_s) v_s / sum_{s<=t} q_t . k_s, at a cost linear in T. [5] eq. 9-12"""
        (H, G, d), T, C = self.dims, q.shape[2], min(chunk, q.shape[2])
        q, k, v = F.elu(q.float()) + 1, F.elu(k.float()) + 1, F.pad(v.float(), (0, 1), value=1.0)    # v's 1: a sum
        k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)           # (B, H, T, d), (B, H, T, d+1)
        state = q.new_zeros(len(q), H, d, d + 1) if cache is None else cache.layers[layer][0].float()
        with torch.autocast(q.device.type, enabled=False):   # sums over the whole past: float32
            q, k, v = (F.pad(x, (0, 0, 0, -T % C)).unflatten(2, (-1, C)) for x in (q, k, v))    # (B, H, T/C, C, d)
            states = torch.cat((state[:, :, None], k.transpose(-1, -2) @ v), 2).cumsum(2)   # (B, H, T/C+1, d, d+1)
            y = (q @ states[:, :, :-1] + (q @ k.transpose(-1, -2)).tril() @ v).flatten(2, 3)[:, :, :T]  # earlier, this
        if cache is not None:
            cache.layers[layer][0] = states[:, :, -1]
        return (y[..., :-1] / y[..., -1:]).to(compute_dtype(self.o_proj.weight))  # without padding, which would be 0/0

class MLA(nn.Module):
    """Multi-head latent attention [1] 2.1.1: all that is cached is a latent of R dims and one rotated key"""
    cache_shapes = staticmethod(lambda c, size: [(size, c.kv_lora_rank + c.qk_rope_head_dim)])
    def __init__(self, c):
        super().__init__()
        H, dn, dr, dv, R = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank
        if c.q_lora_rank:                                    # every engine has this epsilon in the latents' norms
            self.q_a_proj, self.q_a_layernorm = Linear(c.hidden_size, c.q_lora_rank), nn.RMSNorm(c.q_lora_rank, 1e-6)
            self.q_b_proj = Linear(c.q_lora_rank, H * (dn + dr))
        else:
            self.q_proj = Linear(c.hidden_size, H * (dn + dr))
        self.kv_a_proj_with_mqa, self.kv_a_layernorm = Linear(c.hidden_size, R + dr), nn.RMSNorm(R, 1e-6)
        self.kv_b_proj, self.o_proj = Linear(R, H * (dn + dv)), Linear(H * dv, c.hidden_size)
        self.dims, yarn = (H, dn, dr, dv, R), c.rope_scaling or {}
        self.scale = (dn + dr) ** -0.5 * yarn_mscale(yarn.get('factor', 1), yarn.get('mscale_all_dim') or 0) ** 2  # [4]

    def forward(self, x, rope, cache=None, layer=None, mask=None):
        (B, T, _), (H, dn, dr, dv, R), own = x.shape, self.dims, self.kv_a_layernorm.weight.dtype  # a norm's own dtype
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x).to(own))) if hasattr(self, 'q_a_proj') else self.q_proj(x)
        q_nope, q_pe = (part.transpose(1, 2) for part in q.view(B, T, H, dn + dr).split((dn, dr), -1))    # (B, H, T, d)
        c, k_pe = self.kv_a_proj_with_mqa(x).split((R, dr), -1)                             # (B, T, R), (B, T, dr)
        c = self.kv_a_layernorm(c.to(own)).to(k_pe.dtype)                                   # eq. 1 (q: eq. 6, 7)
        q_pe, k_pe = rotate(q_pe, rope, interleaved=True), rotate(k_pe, rope, interleaved=True)             # eq. 8, 3
        if cache is not None:
            kv, = cache.extend(layer, torch.cat((c, k_pe), -1))                             # (B, S, R+dr)
            c, k_pe = kv.split((R, dr), -1)
        new = c.shape[1] == T                                                               # nothing is from before
        y = self.attend_expanded(q_nope, q_pe, c, k_pe, mask) if new else self.attend_absorbed(q_nope, q_pe, kv, mask)
        return self.o_proj(y.transpose(1, 2).flatten(2))                                    # eq. 11

    def attend_expanded(self, q_nope, q_pe, c, k_pe, mask=None):
        """Every head's keys and values are made from the latent: fewest FLOPs for as many queries as keys"""
        (H, dn, dr, dv, R), kv = self.dims, self.kv_b_proj(c).unflatten(-1, (self.dims[0], -1))
        k_nope, v = (part.transpose(1, 2) for part in kv.split((dn, dv), -1))  # eq. 2, 5; split first: saves a copy
        k = torch.cat((k_nope, k_pe[:, None].expand(-1, H, -1, -1)), -1)                    # eq. 4  (B, H, S, dn+dr)
        return attend(torch.cat((q_nope, q_pe), -1), k, v, self.scale, mask)                # eq. 9, 10  (B, H, T, dv)

    def attend_absorbed(self, q_nope, q_pe, kv, mask=None):
        """kv_b_proj moves to queries and result, the latent is the one key and value of all heads: fewest bytes"""
        (H, dn, dr, dv, R), kv = self.dims, kv[:, None]                                     # (B, 1, S, R+dr)
        w_k, w_v = self.kv_b_proj.weight.to(kv.dtype).view(H, dn + dv, R).split((dn, dv), 1)
        q = torch.cat((q_nope.to(kv.dtype) @ w_k, q_pe.to(kv.dtype)), -1)                   # (B, H, T, R+dr)
        return attend(q, kv, kv, self.scale, mask)[..., :R] @ w_v.transpose(1, 2)           # (B, H, T, dv)

ATTENTION = {'gqa': GQA, 'mla': MLA, 'linear': LinearAttention}

# -------------------------------------------------------------------------------------------- MLP, Router, Experts
class MLP(nn.Module):                                        # SwiGLU
    def __init__(self, dim, width):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = Linear(dim, width), Linear(dim, width), Linear(width, dim)
    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), None        # no stats, which MoE has

class Router(nn.Module):
    """Chooses K of E experts for every token; float32 throughout, also under autocast and in a bfloat16 model"""
    def __init__(self, c):
        super().__init__()
        self.config, self.weight = c, nn.Parameter(torch.empty(c.n_routed_experts, c.hidden_size))
        self.register_buffer('e_score_correction_bias', torch.zeros(c.n_routed_experts))

    def forward(self, x):
        """x (N, D) -> weights (N, K) float32, expert ids (N, K), affinities (N, E) float32. eq. 12-16"""
        c, E = self.config, self.config.n_routed_experts
        with torch.autocast(x.device.type, enabled=False):
            affinity = F.linear(x.float(), self.weight.float()).sigmoid()                   # eq. 15
        choice = affinity.detach() + self.e_score_correction_bias                       # eq. 16: the bias only chooses
        if c.n_group > 1:
            groups = choice.view(-1, c.n_group, E // c.n_group)                         # a group is worth its best two
            best = groups.topk(2, -1).values.sum(-1).topk(c.topk_group, -1).indices
            out = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(1, best, False)
            choice = groups.masked_fill(out[..., None], float('-inf')).flatten(1)
        ids = choice.topk(c.num_experts_per_tok, -1).indices
        weights = affinity.gather(1, ids)                                                   # eq. 14
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) if c.norm_topk_prob else weights    # eq. 13
        return weights * c.routed_scaling_factor, ids, affinity

def compute_dtype(x):           # what autocast would cast x to; for the operations that it doesn't know
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype

def grouped_linear(x, weight, ends):
    """x (M, in) sorted by expert, weight (E, out, in), ends (E,) int32: where each expert's rows end -> (M, out)"""
    aligned = x.device.type in ('cpu', 'cuda') and all(n * x.element_size() % 16 == 0 for n in weight.shape[1:])
    if aligned and (x.dtype == torch.bfloat16 or not torch.compiler.is_compiling()):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    return torch.cat([F.linear(rows, w) for rows, w in zip(x.tensor_split(ends[:-1].cpu().long()), weight)])

class Permute(torch.autograd.Function):
    """x[index], where inverse (len(x), copies) says where each row went: so the gradient is a gather as well.
    (Autograd's own adds into rows, which is slow on a CPU and in no fixed order on a GPU)"""
    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)
    @staticmethod
    def backward(ctx, grad):
        return sum(grad.index_select(0, copy) for copy in ctx.saved_tensors[0].unbind(1)), None, None

class Experts(nn.Module):
    """E SwiGLUs in stacked parameters. No token is dropped and no capacity is set"""
    def __init__(self, c):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(c.n_routed_experts, 2 * c.moe_intermediate_size, c.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(c.n_routed_experts, c.hidden_size, c.moe_intermediate_size))

    def forward(self, x, weights, ids):
        """x (N, D), weights and ids (N, K) -> the weighted sum of the chosen experts (N, D), load (E,)"""
        (N, K), E, dtype = ids.shape, len(self.down_proj), compute_dtype(x)
        compiled, few = torch.compiler.is_compiling(), N * K <= E and not self.training
        if few and (x.device.type == 'cpu' or compiled):     # no order pays, only to read no more than what they chose
            rows, e = x.repeat_interleave(K, 0).to(dtype), ids.flatten()
            chosen = lambda rows, w: ((w[e] @ rows[..., None])[..., 0] if compiled else     # where w[e] is no copy
                                      torch.cat([F.linear(row, w[i]) for row, i in zip(rows.split(1), e.tolist())]))
            gate, up = chosen(rows, self.gate_up_proj).chunk(2, -1)                         # (N*K, I)
            return chosen(F.silu(gate) * up * weights.to(dtype).view(-1, 1), self.down_proj).view(N, K, -1).sum(1), None
        expert, order = ids.flatten().sort(stable=True)                                 # rows in order of their expert
        ends = torch.searchsorted(expert, torch.arange(E, device=x.device), right=True)
        load = ends.diff(prepend=ends.new_zeros(1))
        pad = 64 * max(N * K // E // 512, 1) if x.device.type == 'cpu' and N * K > 64 * E else 1    # a CPU's matmul is
        M = (N * K + E * (pad - 1)) // pad * pad    # compiled for each new number of rows: gaps leave few
        gap_ends = (rows := (load + pad - 1) // pad * pad).cumsum(0)
        slot = torch.arange(N * K, device=x.device) + (gap_ends - rows - ends + load)[expert]
        gap_ends[-1] = M
        inverse = torch.empty_like(order).scatter_(0, order, slot)
        source = order.new_zeros(M).scatter_(0, slot, order)                         # a gap holds token 0, at weight 0
        weights = weights.new_zeros(M).scatter(0, slot, weights.flatten()[order])
        rows = Permute.apply(x.to(dtype), source // K, inverse.view(N, K))                  # (M, D)
        gate, up = grouped_linear(rows, self.gate_up_proj.to(dtype), gap_ends.int()).chunk(2, -1)  # (M, I) each
        rows = F.silu(gate) * up * weights.to(dtype)[:, None]                          # weighted while they are narrow
        rows = grouped_linear(rows, self.down_proj.to(dtype), gap_ends.int())               # (M, D)
        return sum(Permute.apply(rows, inverse, source[:, None]).view(N, K, -1).unbind(1)), load    # in order of tokens

class MoE(nn.Module):
    """Shared and routed experts. eq. 12"""
    def __init__(self, c):
        super().__init__()
        self.alpha, self.gate, self.experts = c.seq_aux_loss_weight, Router(c), Experts(c)
        self.shared_experts = MLP(c.hidden_size, c.moe_intermediate_size * c.n_shared_experts)   # of width 0 where none

    def forward(self, x):
        """x (B, T, D) -> (B, T, D), (load (E,), balance loss)"""
        B, (weights, ids, affinity) = len(x), self.gate(x.flatten(0, 1))
        y, load = self.experts(x.flatten(0, 1), weights, ids)
        return self.shared_experts(x)[0] + y.view_as(x), (load, self.training and self.balance_loss(affinity, ids, B))

    def balance_loss(self, affinity, ids, B):
        """affinity (N, E), ids (N, K) -> the sequence-wise balance loss, mean over the B sequences. eq. 17-20"""
        E, K, T = affinity.shape[1], ids.shape[1], len(ids) // B
        f = torch.zeros_like(affinity).scatter(1, ids, E / (K * T)).view(B, T, E).sum(1)    # eq. 18  (B, E)
        p = (affinity / affinity.sum(-1, keepdim=True)).view(B, T, E).mean(1)               # eq. 19, 20
        return self.alpha * (f * p).sum(-1).mean()                                          # eq. 17

# ---------------------------------------------------------------------------------------------------- Block and MTP
class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn, self.dropout = ATTENTION[c.attention](c), nn.Dropout(c.dropout)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        moe = c.n_routed_experts and layer >= c.first_k_dense_replace
        self.mlp = MoE(c) if moe else MLP(c.hidden_size, c.intermediate_size)

    def forward(self, x, rope, cache=None, layer=None, mask=None):
        """x (B, T, D) -> (B, T, D), stats: (load, balance loss) of an MoE layer, else none"""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rope, cache, layer, mask))
        y, stats = self.mlp(self.post_attention_layernorm(x))
        return x + self.dropout(y), stats

class MTP(Block):
    """A block that predicts one token further [1] 2.2; the embedding comes first in eh_proj, as in the weights of V3"""
    def __init__(self, c, layer):
        super().__init__(c, layer)
        self.enorm, self.hnorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps), nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.eh_proj = Linear(2 * c.hidden_size, c.hidden_size)
        self.shared_head = nn.ModuleDict({'norm': nn.RMSNorm(c.hidden_size, c.rms_norm_eps)})

    def forward(self, h, embedded, rope, mask=None):
        """h (B, T, D) of the depth before, after its norm, embedded (B, T, D) the tokens ahead -> (B, T, D), stats"""
        x = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(h)), -1)).to(embedded.dtype)  # eq. 21
        x, stats = super().forward(x, rope, mask=mask)                                      # eq. 22
        return self.shared_head['norm'](x), stats            # whose logits, by the shared head, are eq. 23

# ------------------------------------------------------------------------------------------------------ Transformer
class LinearCrossEntropy(torch.autograd.Function):
    """h (N, D), weight (V, D), targets (N,), below 0 ignored -> sum in nats. Gradients come with it, chunk by chunk"""
    @staticmethod
    def forward(ctx, h, weight, targets, train):
        loss, dh, dw, w = 0.0, [], None, weight.to(dtype := compute_dtype(h))
        for x, t in zip(*(a.split(max(2**26 // len(w), 256)) for a in (h.to(dtype), targets[:, None]))):
            logs, seen, t = F.linear(x, w).float().log_softmax(-1), t >= 0, t.clamp(min=0)    # (rows, V), (rows, 1)
            loss = loss - (logs.gather(1, t) * seen).sum()
            if train:
                g = (logs.exp() - F.one_hot(t[:, 0], len(w)) if torch.compiler.is_compiling() else      # what fuses, or
                     logs.exp_().scatter_add_(1, t, -seen.float())).to(dtype)       # in place: softmax less one-hot
                dw, dh = dw.add_(g.mT @ (x * seen)) if dh else (g.mT @ (x * seen)).float(), [*dh, g @ w * seen]
            logs = g = None                                  # or they would be in memory beside the next ones
        ctx.save_for_backward(*(torch.cat(dh), dw) if train else ())
        return loss
    @staticmethod
    def backward(ctx, grad):
        return *(d.mul_(grad) for d in ctx.saved_tensors), None, None

def cross_entropy(h, weight, targets):                       # a mean
    return LinearCrossEntropy.apply(h, weight, targets, torch.is_grad_enabled()) / (targets >= 0).sum().clamp(min=1)

def read_folder(directory, **overrides):
    """-> Config, {tensor's name: (file, shape)} of the safetensors files, whether RoPE's rows are in Llama's order"""
    where, file = {}, directory / 'config.json'
    try:
        d = json.loads(file.read_text(encoding='utf-8'))
        config = Config.from_hf(d, **overrides)
        for file in sorted(directory.glob('model.safetensors')) or sorted(directory.glob('model-*-of-*.safetensors')):
            with safe_open(file, 'pt') as f:                 # raises if a byte is missing
                where |= {name: (file, tuple(f.get_slice(name).get_shape())) for name in f.keys()}
    except (ValueError, TypeError, AttributeError, SafetensorError) as e:
        raise ValueError(f'{file} is damaged, or of no model that this is: {e}') from e
    if not where:
        raise ValueError(f'{directory} has no model*.safetensors, and pickles are not read')
    return config, where, config.attention == 'mla' and not d.get('rope_interleave', True)

class Transformer(nn.Module):
    head = property(lambda self: (self.lm_head or self.model.embed_tokens).weight)          # (V, D)
    def __init__(self, config):
        """config: a Config with vocab_size set. Parameters are initialised from torch's global random numbers"""
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError('impossible model: vocab_size=0: must be at least 1')
        self.config, self.dropout, self.losses = config, nn.Dropout(config.dropout), {}
        self.gradient_checkpointing = self.doc_attention_mask = False                       # set from outside
        L, M, D = config.num_hidden_layers, config.num_nextn_predict_layers, config.hidden_size
        self.model = nn.ModuleDict({
            'embed_tokens': nn.Embedding.from_pretrained(torch.empty(config.vocab_size, D), freeze=False),
            'layers': nn.ModuleList((Block if i < L else MTP)(config, i) for i in range(L + M)),
            'norm': nn.RMSNorm(D, config.rms_norm_eps)})
        self.lm_head = None if config.tie_word_embeddings else Linear(D, config.vocab_size)
        self.moe_layers = [layer.mlp for layer in self.model.layers if isinstance(layer.mlp, MoE)]
        with torch.device('cpu' if self.head.is_meta else self.head.device):    # _apply keeps them: see from_pretrained
            rope = rope_table(config, config.qk_rope_head_dim if config.attention == 'mla' else config.head_dim)
            self.register_buffer('rope', rope, persistent=False)
            load = torch.zeros(len(self.moe_layers), config.n_routed_experts, dtype=torch.int64)
            self.register_buffer('expert_load', load, persistent=False)     # (layers, E), since the biases' last update
        self.init_weights()

    def init_weights(self):
        """Normal with initializer_range; less what adds to the residual stream, by the number of additions (GPT-2)"""
        std, residual_std = (self.config.initializer_range / n for n in (1, (2 * self.config.num_hidden_layers) ** 0.5))
        for name, p in self.named_parameters():
            if 'norm' not in name and not p.is_meta:
                nn.init.normal_(p, std=residual_std if 'o_proj' in name or 'down_proj' in name else std)

    def _apply(self, fn, recurse=True):
        """.to(bfloat16) is for the parameters: rounded, the routers' biases and RoPE's angles would be other ones"""
        kept = [(m, name, b) for m in self.modules() for name, b in m._buffers.items()]
        super()._apply(fn, recurse)
        for m, name, b in kept:
            m._buffers[name] = m._buffers[name].to(b.dtype) if b.is_meta else b.to(m._buffers[name].device)
        return self

    def hidden(self, idx, cache=None):
        """idx (B, T) -> states after the final norm (B, T, D), stats of the layers"""
        c, past, T = self.config, cache.length if cache is not None else 0, idx.shape[1]
        if past + T > c.max_position_embeddings:
            raise ValueError(f'{past + T} tokens: the context is max_position_embeddings={c.max_position_embeddings}')
        x, rope, stats = self.dropout(self.model.embed_tokens(idx)), self.rope[:, past:past + T], []
        mask = self.document_mask(idx) if cache is None else None
        for i, layer in enumerate(self.model.layers[:c.num_hidden_layers]):
            x, s = self.run(layer, x, rope, cache, i, mask)                                 # (B, T, D)
            stats.append(s)
        if cache is not None:
            cache.length += T
        return self.model.norm(x), stats

    def document_mask(self, idx, flex=False):
        """idx (B, T) -> attend's mask: a token sees the past of its own document, which eos_token_id ends. Additive
        (B, 1, T, T), on a GPU FlexAttention; None where doc_attention_mask is off, ValueError where it cannot be on"""
        c, (B, T), eos = self.config, idx.shape, self.config.eos_token_id
        if not self.doc_attention_mask:
            return None
        if c.attention == 'linear' or eos is None:
            raise ValueError(f'doc_attention_mask=True: impossible with attention={c.attention}, eos_token_id={eos}')
        doc = ((idx == eos).cumsum(1) - (idx == eos).int())[:, None]                        # (B, 1, T), numbers them
        if flex or idx.is_cuda:                              # slow until compiled, by itself if nothing else is
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention
            seen = lambda b, h, t, s: (s <= t) & (doc[b, 0, s] == doc[b, 0, t])
            attention = flex_attention if flex or torch.compiler.is_compiling() else torch.compile(flex_attention)
            return functools.partial(attention, block_mask=create_block_mask(seen, B, None, T, T, idx.device))
        return torch.where((doc[..., None] == doc[..., None, :]).tril(), 0.0, -math.inf).to(compute_dtype(self.head))

    def forward(self, idx, targets=None):
        """idx (B, T) -> logits (B, T, V) float32, None. With targets (B, T), -100 ignored -> None, the next-token loss
        in nats, a mean: in training with MTP's and the balance loss added (self.losses has the parts), else alone"""
        h, stats = self.hidden(idx)
        if targets is None:
            return F.linear(h, self.head).float(), None
        loss = cross_entropy(h.flatten(0, 1), self.head, targets.flatten())
        if not self.training:
            return None, loss
        parts, weights = {'main': loss}, {'main': 1.0, 'mtp': self.config.mtp_loss_weight, 'balance': 1.0}
        if self.config.num_nextn_predict_layers:
            parts['mtp'] = self.mtp_loss(h, idx, targets, stats)
        if self.moe_layers:
            loads, balances = map(torch.stack, zip(*(s for s in stats if s is not None)))   # (layers, E), (layers,)
            self.expert_load += loads        # here, not in the layer: a recomputed layer would count twice
            parts['balance'] = balances.sum()
        self.losses = {k: v.detach() for k, v in parts.items()}
        return None, sum(weights[k] * v for k, v in parts.items())

    def run(self, layer, *args):
        save = not self.gradient_checkpointing or not self.training
        return layer(*args) if save else checkpoint(layer, *args, use_reentrant=False)

    def mtp_loss(self, h, idx, targets, stats):
        """Depth k sees the states h_i and the tokens t_{i+k} and predicts t_{i+k+1}; targets_i is t_{i+1}. eq. 21-25"""
        layers, losses = self.model.layers[self.config.num_hidden_layers:], []
        for k, layer in enumerate(layers, 1):
            T = targets.shape[1] - k
            assert T > 0, 'a sequence must be longer than num_nextn_predict_layers'
            embedded = self.model.embed_tokens(targets[:, k - 1:-1].clamp(min=0))           # (B, T, D)
            h, s = self.run(layer, h[:, :T], embedded, self.rope[:, :T], self.document_mask(idx[:, :T]))
            stats.append(s)
            losses.append(cross_entropy(h.flatten(0, 1), self.head, targets[:, k:].flatten()))  # eq. 24
        return sum(losses) / len(layers)                                                    # eq. 25

    def update_router_bias(self, load):
        """Loss-free balancing [2], once an optimizer step; load (MoE layers, E): expert_load, summed over ranks"""
        step = self.config.bias_update_speed * torch.sign(load.float().mean(1, keepdim=True) - load)
        for mlp, s in zip(self.moe_layers, step - step.mean(1, keepdim=True)):  # a mean moves no choice, but drifts
            mlp.gate.e_score_correction_bias += s

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=0.0, top_k=None, top_p=None):
        """idx (B, T) -> yields tokens (B, 1), max_new_tokens times. A full context goes on from its last half"""
        room, cache, new = min(idx.shape[1] + max_new_tokens, self.config.max_position_embeddings), None, idx
        for _ in range(max_new_tokens):
            if cache is None or cache.length == room:
                new = idx if cache is None else idx[:, -(room + 1) // 2:]
                cache = Cache(self.config, len(idx), room + 1, compute_dtype(self.head), idx.device)    # never full
            with torch.backends.mkldnn.flags(None if new.numel() > 1 else False, None, None, None):   # one row
                logits = F.linear(self.hidden(new, cache)[0][:, -1], self.head).float()             # (B, V)
            new = sample(logits, temperature, top_k, top_p)
            idx = torch.cat((idx, new), 1)
            yield new

    def generate(self, idx, max_new_tokens, temperature=0.0, top_k=None, top_p=None, stop=None):
        """idx (B, T) -> (B, T + new): max_new_tokens, or until every row has reached the id stop, which it repeats"""
        out, done, stop = [idx], torch.zeros_like(idx[:, :1], dtype=torch.bool), -1 if stop is None else stop
        for new in self.stream(idx, max_new_tokens, temperature, top_k, top_p):
            out.append(new.masked_fill(done, stop))
            done |= out[-1] == stop
            if done.all():
                break
        return torch.cat(out, 1)

    def named_views(self, state=None):
        """(name on disk, view of a tensor of state, by default ours): what is saved, and what from_pretrained fills"""
        for name, t in (state or self.state_dict()).items():
            stem, _, kind = name.rpartition('.')
            if stem.endswith('mlp.experts'):
                for e, w in enumerate(t):
                    parts = zip(('gate_proj', 'up_proj'), w.chunk(2)) if kind == 'gate_up_proj' else [(kind, w)]
                    yield from ((f'{stem}.{e}.{part}.weight', view) for part, view in parts)
            else:
                yield name, t

    def snapshot(self, dtype=None, state=None):
        """A checkpoint's tensors, copied to the CPU. dtype: theirs by default; the routers' biases stay float32"""
        views, dtype = dict(self.named_views(state)), dtype or self.head.dtype
        head = views.get('lm_head.weight', emb := views['model.embed_tokens.weight'])
        for i in range(self.config.num_hidden_layers, len(self.model.layers)):      # published MTP layers bring these
            views |= {f'model.layers.{i}.embed_tokens.weight': emb, f'model.layers.{i}.shared_head.head.weight': head}
        views |= {'lm_head.weight': head} if self.config.attention == 'mla' else {}  # for engines that tie nothing
        return {n: t.to('cpu', t.dtype if n.endswith('bias') else dtype, copy=True) for n, t in views.items()}

    def save_pretrained(self, directory, dtype=None, shard_bytes=5e9, state=None):
        """A Hugging Face folder, sharded above shard_bytes. state: an earlier snapshot, which is written instead"""
        from huggingface_hub import save_torch_state_dict
        directory, state = Path(directory), state or self.snapshot(dtype)
        directory.mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(state, directory, max_shard_size=int(shard_bytes))
        dtypes = dict.fromkeys(('dtype', 'torch_dtype'), str(state['model.norm.weight'].dtype).removeprefix('torch.'))
        (directory / 'config.json').write_text(json.dumps(self.config.to_hf() | dtypes, indent=2) + '\n')

    @classmethod
    def from_pretrained(cls, directory, dtype=torch.float32, **overrides):
        """A Llama, Glm4Moe or DeepseekV3 folder, or one of ours; overrides: fields of Config. One copy in memory"""
        config, where, halves = read_folder(directory := Path(directory), **overrides)
        mtp = f'model.layers.{config.num_hidden_layers}.eh_proj.weight'
        if config.num_nextn_predict_layers and mtp not in where and 'num_nextn_predict_layers' not in overrides:
            print(f'{directory}: config.json promises MTP layers that no file has: loaded without', file=sys.stderr)
            config = replace(config, num_nextn_predict_layers=0)
        with torch.device('meta'):
            model = cls(config)
        model.to(dtype)._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))
        for name, view in model.named_views():
            file, shape = where.get(name, (None, 'in no model*.safetensors'))
            if shape != tuple(view.shape):
                raise ValueError(f'{directory}: {name} is {shape}, the model wants {tuple(view.shape)}')
            for i in range(0, len(view), rows := max(2**22 * len(view) // max(view.numel(), 1), 1)):
                with safe_open(file, 'pt') as f:             # what it has mapped counts as memory until it is closed
                    view[i:i + rows].copy_(f.get_slice(name)[i:i + rows])
            if halves and name.split('.')[-2].startswith(('q_proj', 'q_b_', 'kv_a_p')):
                heads = view.unflatten(0, (1 if 'kv_a' in name else config.num_attention_heads, -1))
                rows = heads[:, -config.qk_rope_head_dim:]   # what RoPE turns, in Llama's order: now in pairs
                rows.copy_(rows.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2))
        return model

def sample(logits, temperature, top_k=None, top_p=None):
    """logits (B, V) -> tokens (B, 1): the likeliest at temperature 0, else of the top_k and those that make up top_p"""
    if not temperature:
        return logits.argmax(-1, keepdim=True)
    logits, ids = (logits / temperature).sort(-1, descending=True)
    logits[:, top_k or logits.shape[1]:] = float('-inf')
    if top_p is not None:
        p = logits.softmax(-1)
        logits[p.cumsum(-1) - p >= max(top_p, 1e-9)] = float('-inf')    # what comes before already makes up top_p
    return ids.gather(1, logits.softmax(-1).multinomial(1))
