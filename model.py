"""The whole architecture of nanoseek: a language model in the style of DeepSeek-V3, and the
Llama-style one it grew out of.

References; "eq. 12" in a comment is equation 12 of [1]
  [1] DeepSeek-V3 Technical Report, arXiv 2412.19437v2
  [2] Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, arXiv 2408.15664
  [3] RoFormer (RoPE), arXiv 2104.09864
  [4] YaRN, arXiv 2309.00071
  [5] Transformers are RNNs (linear attention), arXiv 2006.16236

Dims, used in every shape comment
  B  sequences of a batch      T  new tokens of each        S  cached and new tokens
  D  hidden_size               H  query heads               G  key/value heads
  d  head_dim                  dn qk_nope_head_dim          dr qk_rope_head_dim
  dv v_head_dim                R  kv_lora_rank              V  vocab_size
  E  routed experts            K  experts per token         I  width of an expert
  N  tokens as rows, B*T       M  rows sorted by expert

Parameters have Hugging Face's names. In nanoseek/, ops.py has operations whose fast form is longer
than their plain form, generate.py decoding, rope.py RoPE's scalings, hf.py the file format.
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nanoseek import generate, ops, settings
from nanoseek.rope import check_scaling, scaled, yarn_mscale


@dataclass
class Config:
    """The architecture, with the keys of Hugging Face's config.json"""
    vocab_size: int = 0                     # V; 0: the dataset's
    hidden_size: int = 128                  # D, width of the residual stream
    intermediate_size: int = 0              # width of a dense layer's SwiGLU; 0: 8/3 of hidden_size
    num_hidden_layers: int = 4              # blocks, not counting MTP layers
    num_attention_heads: int = 4            # H
    num_key_value_heads: int = 0            # G, for gqa; 0: as many as query heads
    head_dim: int = 0                       # d, for gqa and linear; 0: hidden_size / heads
    max_position_embeddings: int = 2048     # the longest context
    rope_theta: float = 10000.0             # RoPE's base
    rope_scaling: dict | None = None        # as in config.json: {'rope_type': 'yarn', ...}
    rms_norm_eps: float = 1e-6              # RMSNorm's epsilon
    tie_word_embeddings: bool = True        # one matrix for the embedding and the head
    initializer_range: float = 0.02         # standard deviation of the initial weights
    bos_token_id: int | None = None         # begin-of-text token, for config.json
    eos_token_id: int | list | None = None  # where generation stops; the first ends a document
    attention: Literal['gqa', 'mla', 'linear'] = 'mla'  # kind of attention
    q_lora_rank: int | None = None          # MLA: rank of the queries' latent; none: no latent
    kv_lora_rank: int = 64                  # MLA: R, rank of the cached latent
    qk_nope_head_dim: int = 32              # MLA: dn, dims of a head without position
    qk_rope_head_dim: int = 16              # MLA: dr, dims of a head with position
    v_head_dim: int = 32                    # MLA: dv
    n_routed_experts: int = 0               # E; 0: a dense model
    n_shared_experts: int = 0               # experts that every token passes through
    num_experts_per_tok: int = 2            # K
    moe_intermediate_size: int = 0          # I, width of one expert; 0: intermediate_size
    first_k_dense_replace: int = 0          # leading layers that stay dense
    n_group: int = 1                        # groups of experts, for group-limited routing
    topk_group: int = 1                     # groups that a token may choose from
    norm_topk_prob: bool = True             # a token's weights sum to routed_scaling_factor
    routed_scaling_factor: float = 1.0      # factor on the routed experts' weights
    num_nextn_predict_layers: int = 0       # depth of multi-token prediction (MTP)
    # in training only
    bias_update_speed: float = 1e-3         # gamma of loss-free balancing: how far a bias moves
    seq_aux_loss_weight: float = 1e-4       # alpha of the sequence-wise balance loss
    mtp_loss_weight: float = 0.3            # lambda of the MTP loss
    dropout: float = 0.0                    # on what attention and MLP add to the residual

    def __post_init__(self):
        """Derive what is 0, then refuse what cannot be built."""
        if not self.head_dim:
            heads = max(self.num_attention_heads, 1)
            self.head_dim = self.hidden_size // heads
            settings.require(self, 'num_attention_heads', self.hidden_size % heads == 0
                             or self.attention == 'mla', f'a divisor of {self.hidden_size}')
        if not self.num_key_value_heads:
            self.num_key_value_heads = self.num_attention_heads
        if not self.intermediate_size:
            self.intermediate_size = math.ceil(self.hidden_size / 24) * 64
        if not self.moe_intermediate_size:
            self.moe_intermediate_size = self.intermediate_size
        settings.check_model(self)
        check_scaling(self.rope_scaling)

    @property
    def stop_ids(self):
        """eos_token_id as a list: it is one id, several or None."""
        if self.eos_token_id is None:
            return []
        if isinstance(self.eos_token_id, int):
            return [self.eos_token_id]
        return list(self.eos_token_id)


class Linear(nn.Linear):
    """No bias, and no initial values: Transformer.init_weights sets them."""
    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def reset_parameters(self):
        pass


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, in the weight's dtype also under autocast."""
    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


def rope_table(config, dim):
    """Return the cosines and sines of RoPE's angles [3], (2, max_position_embeddings, dim/2)."""
    freq = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2).float() / dim)        # (dim/2,)
    freq, scale = scaled(freq, config)
    angle = torch.outer(torch.arange(config.max_position_embeddings).float(), freq)
    return torch.stack((angle.cos(), angle.sin())) * scale


def rotate_halves(x, rope):
    """x (..., T, d), rope (2, T, d/2): Llama turns the pairs (x_i, x_{i+d/2})."""
    a, b = x.chunk(2, -1)
    return turn(a, b, rope).to(x.dtype)


def rotate_pairs(x, rope):
    """x (..., T, dr), rope (2, T, dr/2): DeepSeek turns (x0, x1), (x2, x3) ... In the result all
    first elements come before all second ones, in queries and keys alike: no dot product changes.
    """
    return turn(x[..., 0::2], x[..., 1::2], rope).to(x.dtype)


def turn(a, b, rope):
    cos, sin = rope
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class GQA(nn.Module):
    """Grouped-query attention, as in Llama and SmolLM2"""
    @staticmethod
    def cache_shapes(config, size):
        shape = (config.num_key_value_heads, size, config.head_dim)
        return [shape, shape]                                                 # keys and values

    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        D = config.hidden_size
        # the order of the initial random numbers and of the optimizer's state
        self.q_proj = Linear(D, self.heads * self.head_dim)
        self.o_proj = Linear(self.heads * self.head_dim, D)
        self.k_proj = Linear(D, self.kv_heads * self.head_dim)
        self.v_proj = Linear(D, self.kv_heads * self.head_dim)

    def forward(self, x, rope, cache=None, layer=None, mask=None):
        """x (B, T, D), rope (2, T, d/2) -> (B, T, D)"""
        B, T, D = x.shape
        q = self.q_proj(x).view(B, T, self.heads, -1).transpose(1, 2)            # (B, H, T, d)
        k = self.k_proj(x).view(B, T, self.kv_heads, -1).transpose(1, 2)         # (B, G, T, d)
        v = self.v_proj(x).view(B, T, self.kv_heads, -1).transpose(1, 2)         # (B, G, T, d)
        q = rotate_halves(q, rope)
        k = rotate_halves(k, rope)
        y = self.mix(q, k, v, cache, layer, mask)                                # (B, H, T, d)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def mix(self, q, k, v, cache, layer, mask):
        if cache is not None:
            k, v = cache.extend(layer, k, v)                                     # (B, G, S, d)
        return ops.attention(q, k, v, self.head_dim ** -0.5, mask)


class LinearAttention(GQA):
    """The feature map elu + 1 replaces the softmax [5]. Decoding keeps one matrix per head."""
    CHUNK = 64

    @staticmethod
    def cache_shapes(config, size):
        return [(config.num_attention_heads, config.head_dim, config.head_dim + 1)]

    def mix(self, q, k, v, cache, layer, mask):
        """y_t = sum_{s<=t} (q_t . k_s) v_s / sum_{s<=t} q_t . k_s, [5] eq. 9-12. The cost is linear
        in T: matmuls within a chunk, and a state that sums up everything before it."""
        B, H, T, d = q.shape
        chunk = min(self.CHUNK, T)
        q = F.elu(q.float()) + 1
        k = F.elu(k.float()) + 1
        v = F.pad(v.float(), (0, 1), value=1.0)         # a column of ones sums q_t . k_s
        k = k.repeat_interleave(H // self.kv_heads, 1)                           # (B, H, T, d)
        v = v.repeat_interleave(H // self.kv_heads, 1)                         # (B, H, T, d+1)
        q, k, v = (self.split(x, chunk) for x in (q, k, v))                # (B, H, T/C, C, ..)
        state = q.new_zeros(B, H, d, d + 1)
        if cache is not None:
            state = cache.layers[layer][0].float()
        with ops.without_autocast(q):                   # sums over the whole past need float32
            added = k.transpose(-1, -2) @ v                             # (B, H, T/C, d, d+1)
            states = torch.cat((state[:, :, None], added), 2).cumsum(2)
            from_past = q @ states[:, :, :-1]                           # (B, H, T/C, C, d+1)
            within_chunk = (q @ k.transpose(-1, -2)).tril() @ v
            y = (from_past + within_chunk).flatten(2, 3)[:, :, :T]             # (B, H, T, d+1)
        if cache is not None:
            cache.layers[layer][0] = states[:, :, -1]
        numerator = y[..., :-1]
        normalizer = y[..., -1:]
        return (numerator / normalizer).to(ops.compute_dtype(self.o_proj.weight))

    @staticmethod
    def split(x, chunk):
        """x (B, H, T, d) -> (B, H, T/C, C, d), zero-padded at the end"""
        return F.pad(x, (0, 0, 0, -x.shape[2] % chunk)).unflatten(2, (-1, chunk))


class MLA(nn.Module):
    """Multi-head latent attention, [1] 2.1.1. The cache holds of each token a latent of R dims and
    one rotated key that all heads share."""
    @staticmethod
    def cache_shapes(config, size):
        return [(size, config.kv_lora_rank + config.qk_rope_head_dim)]

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        H = config.num_attention_heads
        dn = config.qk_nope_head_dim
        dr = config.qk_rope_head_dim
        dv = config.v_head_dim
        R = config.kv_lora_rank
        self.dims = H, dn, dr, dv, R
        self.q_lora_rank = config.q_lora_rank
        if self.q_lora_rank:
            self.q_a_proj = Linear(D, self.q_lora_rank)
            self.q_a_layernorm = RMSNorm(self.q_lora_rank, 1e-6)  # every engine's epsilon here
            self.q_b_proj = Linear(self.q_lora_rank, H * (dn + dr))
        else:
            self.q_proj = Linear(D, H * (dn + dr))
        self.kv_a_proj_with_mqa = Linear(D, R + dr)
        self.kv_a_layernorm = RMSNorm(R, 1e-6)
        self.kv_b_proj = Linear(R, H * (dn + dv))
        self.o_proj = Linear(H * dv, D)
        self.scale = (dn + dr) ** -0.5
        if config.rope_scaling:
            mscale = config.rope_scaling.get('mscale_all_dim') or 0
            self.scale *= yarn_mscale(config.rope_scaling['factor'], mscale) ** 2         # [4]

    def forward(self, x, rope, cache=None, layer=None, mask=None):
        """x (B, T, D), rope (2, T, dr/2) -> (B, T, D)"""
        T = x.shape[1]
        H, dn, dr, dv, R = self.dims
        latent, k_pe = self.kv_a_proj_with_mqa(x).split((R, dr), -1)    # (B, T, R), (B, T, dr)
        latent = self.kv_a_layernorm(latent).to(k_pe.dtype)                             # eq. 1
        k_pe = rotate_pairs(k_pe, rope)                                                 # eq. 3
        q_nope, q_pe = self.queries(x)                            # (B, H, T, dn), (B, H, T, dr)
        q_pe = rotate_pairs(q_pe, rope)                                                 # eq. 8
        if cache is not None:
            cached, = cache.extend(layer, torch.cat((latent, k_pe), -1))         # (B, S, R+dr)
            latent, k_pe = cached.split((R, dr), -1)
        if latent.shape[1] == T:                                      # there is no past
            y = self.attend_expanded(q_nope, q_pe, latent, k_pe, mask)
        else:
            y = self.attend_absorbed(q_nope, q_pe, cached)
        return self.o_proj(y.transpose(1, 2).flatten(2))                               # eq. 11

    def queries(self, x):
        """x (B, T, D) -> (B, H, T, dn), and (B, H, T, dr) before its rotation"""
        H, dn, dr, _, _ = self.dims
        if self.q_lora_rank:
            latent = self.q_a_layernorm(self.q_a_proj(x))                               # eq. 6
            q = self.q_b_proj(latent)                                                   # eq. 7
        else:
            q = self.q_proj(x)
        q_nope, q_pe = q.unflatten(-1, (H, dn + dr)).split((dn, dr), -1)
        return q_nope.transpose(1, 2), q_pe.transpose(1, 2)

    def attend_expanded(self, q_nope, q_pe, latent, k_pe, mask=None):
        """Compute every head's keys and values from the latents: the fewest FLOPs if there are as
        many queries as keys. latent (B, S, R), k_pe (B, S, dr) -> (B, H, T, dv)"""
        H, dn, dr, dv, R = self.dims
        kv = self.kv_b_proj(latent).unflatten(-1, (H, dn + dv))               # (B, S, H, dn+dv)
        k_nope, v = kv.split((dn, dv), -1)                                           # eq. 2, 5
        k_nope = k_nope.transpose(1, 2)                                        # (B, H, S, dn)
        v = v.transpose(1, 2)                                                  # (B, H, S, dv)
        k_pe = k_pe[:, None].expand(-1, H, -1, -1)                             # (B, H, S, dr)
        k = torch.cat((k_nope, k_pe), -1)                                               # eq. 4
        q = torch.cat((q_nope, q_pe), -1)                                               # eq. 9
        return ops.attention(q, k, v, self.scale, mask)                                # eq. 10

    def attend_absorbed(self, q_nope, q_pe, cached):
        """The same with kv_b_proj applied to queries and result: q . (W_k c) = (W_k^T q) . c. The
        cached latent is then the one key and value of all heads, and the past is only read: the
        fewest bytes if there are few queries. cached (B, S, R+dr) -> (B, H, T, dv)"""
        H, dn, dr, dv, R = self.dims
        kv = cached[:, None]                                                 # (B, 1, S, R+dr)
        weight = self.kv_b_proj.weight.to(kv.dtype).view(H, dn + dv, R)
        w_k, w_v = weight.split((dn, dv), 1)                          # (H, dn, R), (H, dv, R)
        q = torch.cat((q_nope.to(kv.dtype) @ w_k, q_pe.to(kv.dtype)), -1)    # (B, H, T, R+dr)
        y = ops.attention(q, kv, kv, self.scale)[..., :R]                       # (B, H, T, R)
        return y @ w_v.transpose(1, 2)


ATTENTION = {'gqa': GQA, 'mla': MLA, 'linear': LinearAttention}


class MLP(nn.Module):
    """SwiGLU"""
    def __init__(self, dim, width):
        super().__init__()
        self.gate_proj = Linear(dim, width)
        self.up_proj = Linear(dim, width)
        self.down_proj = Linear(width, dim)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Chooses K of E experts for every token, always in float32."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias = torch.zeros(config.n_routed_experts)
        self.register_buffer('e_score_correction_bias', bias)       # see update_router_bias

    def _apply(self, fn, recurse=True):
        """Keep the bias exact in .to(bfloat16): rounded, it would choose other experts."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        self.e_score_correction_bias = bias.to(self.weight.device)
        return self

    def forward(self, x):
        """x (N, D) -> weights (N, K) float32, expert ids (N, K), affinities (N, E) float32"""
        config = self.config
        with ops.without_autocast(x):
            affinity = F.linear(x.float(), self.weight.float()).sigmoid()              # eq. 15
        choice = affinity.detach() + self.e_score_correction_bias    # eq. 16: only to choose
        if config.n_group > 1:
            choice = self.within_best_groups(choice)
        ids = choice.topk(config.num_experts_per_tok, -1).indices                      # eq. 14
        weights = affinity.gather(1, ids)                                              # (N, K)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)                # eq. 13
        return weights * config.routed_scaling_factor, ids, affinity

    def within_best_groups(self, choice):
        """Set choice (N, E) to -inf outside the topk_group best groups. A group's score is the sum
        of its two best experts."""
        groups = choice.unflatten(1, (self.config.n_group, -1))         # (N, n_group, E/n_group)
        score = groups.topk(2, -1).values.sum(-1)                                # (N, n_group)
        best = score.topk(self.config.topk_group, -1).indices                 # (N, topk_group)
        out = torch.ones_like(score, dtype=torch.bool).scatter(1, best, False)
        return groups.masked_fill(out[..., None], -math.inf).flatten(1)


class Experts(nn.Module):
    """E SwiGLUs with stacked parameters. No expert has a capacity, no token is dropped."""
    def __init__(self, config):
        super().__init__()
        E = config.n_routed_experts
        D = config.hidden_size
        width = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, width))

    def forward(self, x, weights, ids):
        """x (N, D), weights and ids (N, K) -> the weighted sum of the chosen experts (N, D), and
        how many tokens chose each expert (E,)"""
        E = len(self.down_proj)
        if not self.training and ops.few_choices(ids, E):
            y = ops.experts_one_by_one(x, weights, ids, self.gate_up_proj, self.down_proj)
            return y, None
        dtype = ops.compute_dtype(x)
        by_expert = ops.sort_by_expert(ids, E)
        rows = by_expert.gather(x.to(dtype))                                           # (M, D)
        hidden = ops.grouped_linear(rows, self.gate_up_proj.to(dtype), by_expert.ends)
        gate, up = hidden.chunk(2, -1)                                            # (M, I) each
        weights = by_expert.gather_weights(weights).to(dtype)                          # (M, 1)
        gate = gate.contiguous()            # on a CPU, silu of half rows takes three times as long
        rows = F.silu(gate) * (up * weights)                    # weighted while rows are narrow
        rows = ops.grouped_linear(rows, self.down_proj.to(dtype), by_expert.ends)      # (M, D)
        return by_expert.combine(rows), by_expert.load


class MoE(nn.Module):
    """Shared and routed experts, eq. 12"""
    def __init__(self, config):
        super().__init__()
        self.alpha = config.seq_aux_loss_weight
        self.gate = Router(config)
        self.experts = Experts(config)
        shared = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = MLP(config.hidden_size, shared)       # width 0 if there are none

    def forward(self, x):
        """x (B, T, D) -> (B, T, D), and (load (E,), the balance loss if training)"""
        weights, ids, affinity = self.gate(x.flatten(0, 1))
        y, load = self.experts(x.flatten(0, 1), weights, ids)                          # (N, D)
        balance = None
        if self.training:
            balance = self.balance_loss(affinity, ids, len(x))
        return self.shared_experts(x) + y.view_as(x), (load, balance)

    def balance_loss(self, affinity, ids, B):
        """affinity (N, E), ids (N, K) -> the sequence-wise loss, averaged over B sequences"""
        E = affinity.shape[1]
        K = ids.shape[1]
        T = len(ids) // B
        chosen = torch.zeros_like(affinity).scatter(1, ids, E / (K * T))               # (N, E)
        f = chosen.view(B, T, E).sum(1)                                        # eq. 18, (B, E)
        s = affinity / affinity.sum(-1, keepdim=True)                                  # eq. 19
        p = s.view(B, T, E).mean(1)                                            # eq. 20, (B, E)
        return self.alpha * (f * p).sum(-1).mean()                                     # eq. 17


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = ATTENTION[config.attention](config)
        self.dropout = config.dropout
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_moe = config.n_routed_experts > 0 and layer >= config.first_k_dense_replace
        if self.is_moe:
            self.mlp = MoE(config)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x, rope, cache=None, layer=None, mask=None):
        """x (B, T, D) -> (B, T, D), and (load, balance loss) of an MoE layer, else None"""
        y = self.self_attn(self.input_layernorm(x), rope, cache, layer, mask)
        x = x + ops.dropout(y, self.dropout, self.training)
        y = self.mlp(self.post_attention_layernorm(x))
        stats = None
        if self.is_moe:
            y, stats = y
        return x + ops.dropout(y, self.dropout, self.training), stats


class MTP(Block):
    """A block that predicts one token further ahead, [1] 2.2"""
    def __init__(self, config, layer):
        super().__init__(config, layer)
        D = config.hidden_size
        self.enorm = RMSNorm(D, config.rms_norm_eps)
        self.hnorm = RMSNorm(D, config.rms_norm_eps)
        self.eh_proj = Linear(2 * D, D)
        self.shared_head = nn.ModuleDict({'norm': RMSNorm(D, config.rms_norm_eps)})

    def forward(self, h, embedded, rope, cache=None, mask=None):
        """h (B, T, D): normed states of the depth before; embedded (B, T, D): the tokens ahead
        -> (B, T, D), from which the shared head makes eq. 23, and Block's stats"""
        both = torch.cat((self.enorm(embedded), self.hnorm(h)), -1)     # the order in V3's weights
        x = self.eh_proj(both).to(embedded.dtype)                                      # eq. 21
        x, stats = super().forward(x, rope, cache, 0, mask)                            # eq. 22
        return self.shared_head['norm'](x), stats


class Transformer(nn.Module):
    def __init__(self, config):
        """Create a model with random weights; torch.manual_seed decides which."""
        super().__init__()
        assert config.vocab_size > 0, 'a model needs a vocab_size'
        self.config = config
        self.gradient_checkpointing = False             # these two are set by train.py
        self.doc_attention_mask = False
        self.compiled = {}                              # by generate.compile_decoding, for passes
        self.compiled_tokens = 0                        # of so many tokens
        self.losses = {}                                # the parts of the last training loss
        layers = []
        for i in range(config.num_hidden_layers):
            layers.append(Block(config, i))
        for i in range(config.num_nextn_predict_layers):
            layers.append(MTP(config, config.num_hidden_layers + i))
        embedding = torch.empty(config.vocab_size, config.hidden_size)
        self.model = nn.ModuleDict({
            'embed_tokens': nn.Embedding.from_pretrained(embedding, freeze=False),
            'layers': nn.ModuleList(layers),
            'norm': RMSNorm(config.hidden_size, config.rms_norm_eps)})
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.moe_layers = [layer.mlp for layer in layers if layer.is_moe]
        dim = config.head_dim
        if config.attention == 'mla':
            dim = config.qk_rope_head_dim
        with torch.device('cpu'):                       # values, even if the weights are meta
            self.rope = rope_table(config, dim)         # float32 in every model, so not a buffer
            load = torch.zeros(len(self.moe_layers), config.n_routed_experts, dtype=torch.int64)
        self.register_buffer('expert_load', load, persistent=False)     # tokens of each expert
        self.init_weights()

    @property
    def head(self):
        """The matrix (V, D) that turns states into logits"""
        if self.lm_head is None:
            return self.model.embed_tokens.weight
        return self.lm_head.weight

    @property
    def can_draft(self):
        """Whether MTP layers can draft: linear attention could not take back a rejected token."""
        return self.config.num_nextn_predict_layers > 0 and self.config.attention != 'linear'

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.rope = self.rope.to(self.head.device)
        return self

    def init_weights(self):
        """Normal with initializer_range. As in GPT-2, projections into the residual stream are
        smaller, by the square root of their number."""
        std = self.config.initializer_range
        residual_std = std / (2 * self.config.num_hidden_layers) ** 0.5
        for name, p in self.named_parameters():
            if 'norm' in name or p.is_meta:             # meta tensors have no values
                continue
            if 'o_proj' in name or 'down_proj' in name:
                nn.init.normal_(p, std=residual_std)
            else:
                nn.init.normal_(p, std=std)

    def hidden(self, idx, cache=None):
        """idx (B, T) -> states after the final norm (B, T, D), and each layer's stats"""
        config = self.config
        past = 0
        mask = None
        if cache is None:
            mask = self.document_mask(idx)
        else:
            past = cache.length
        end = past + idx.shape[1]
        if end > config.max_position_embeddings:
            raise ValueError(f'{end} tokens do not fit: the context is '
                             f'max_position_embeddings={config.max_position_embeddings}')
        rope = self.rope[:, past:end]
        x = self.model.embed_tokens(idx)                                            # (B, T, D)
        x = ops.dropout(x, config.dropout, self.training)
        stats = []
        for i, layer in enumerate(self.model.layers[:config.num_hidden_layers]):
            x, layer_stats = self.run(layer, x, rope, cache, i, mask)
            stats.append(layer_stats)
        if cache is not None:
            cache.length = end
        return self.model.norm(x), stats

    def run(self, layer, *args):
        if self.gradient_checkpointing and self.training:
            return checkpoint(layer, *args, use_reentrant=False)
        return layer(*args)

    def document_mask(self, idx):
        """The mask that hides other documents from each token of idx (B, T), or None if it is off.
        A document ends with the first stop id."""
        if not self.doc_attention_mask:
            return None
        ends = idx == self.config.stop_ids[0]
        documents = ends.cumsum(1) - ends.int()                     # (B, T), numbers them
        return ops.document_mask(documents, ops.compute_dtype(self.head))

    def forward(self, idx, targets=None, counts=None):
        """idx (B, T) -> logits (B, T, V) float32, None.

        With targets (B, T), of which -100 is ignored -> None, the mean next-token loss in nats. In
        training the MTP and balance losses are added; self.losses has the parts. counts (1 + MTP
        layers,): what each depth's sum is divided by, see target_counts; None: what idx has"""
        h, stats = self.hidden(idx)
        if targets is None:
            return F.linear(h, self.head).float(), None
        if counts is None:
            counts = self.target_counts(targets)
        loss = ops.linear_cross_entropy(h.flatten(0, 1), self.head, targets.flatten(), counts[0])
        if not self.training:
            return None, loss
        self.losses = {'loss': loss.detach()}
        if self.config.num_nextn_predict_layers:
            mtp = self.mtp_loss(h, idx, targets, stats, counts)
            self.losses['mtp_loss'] = mtp.detach()
            loss = loss + self.config.mtp_loss_weight * mtp
        if self.moe_layers:
            loads, balances = zip(*(pair for pair in stats if pair is not None))
            balance = torch.stack(balances).sum()
            self.losses['balance_loss'] = balance.detach()
            loss = loss + balance
            self.expert_load += torch.stack(loads)      # here, outside of layers that run twice
        return None, loss

    def target_counts(self, targets):
        """targets (B, T) -> how many count at depth 0 (the next token) and each MTP layer's"""
        depths = range(1 + self.config.num_nextn_predict_layers)
        return torch.stack([(targets[:, k:] >= 0).sum() for k in depths])

    def mtp(self, k, h, tokens, cache=None, mask=None):
        """Depth k = 1, 2, ...: h (B, T, D) of the depth before, tokens (B, T) k ahead of each state
        -> states (B, T, D) that predict the tokens after those, and stats"""
        past = 0
        if cache is not None:
            past = cache.length
        rope = self.rope[:, past:past + tokens.shape[1]]
        layer = self.model.layers[self.config.num_hidden_layers + k - 1]
        return self.run(layer, h, self.model.embed_tokens(tokens), rope, cache, mask)

    def mtp_loss(self, h, idx, targets, stats, counts):
        """Return the mean loss of all depths, and append their stats. Depth k takes state h_i and
        token t_{i+k}, and predicts t_{i+k+1}; idx_i is t_i, targets_i t_{i+1}."""
        losses = []
        for k in range(1, self.config.num_nextn_predict_layers + 1):
            T = targets.shape[1] - k
            assert T > 0, 'a sequence must be longer than num_nextn_predict_layers'
            h, layer_stats = self.mtp(k, h[:, :T], idx[:, k:], mask=self.document_mask(idx[:, :T]))
            stats.append(layer_stats)
            losses.append(ops.linear_cross_entropy(
                h.flatten(0, 1), self.head, targets[:, k:].flatten(), counts[k]))      # eq. 24
        return sum(losses) / len(losses)                                               # eq. 25

    def update_router_bias(self, load):
        """Loss-free balancing [2], once per optimizer step: an expert with too many tokens becomes
        less likely to be chosen. load (MoE layers, E): expert_load summed over ranks"""
        load = load.float()
        step = torch.sign(load.mean(1, keepdim=True) - load)
        step = self.config.bias_update_speed * step
        step = step - step.mean(1, keepdim=True)        # changes no choice, prevents a drift
        for moe, layer_step in zip(self.moe_layers, step):
            moe.gate.e_score_correction_bias += layer_step

    def generate(self, idx, max_new_tokens, temperature=0.0, top_k=None, top_p=None, stop=None,
                 drafts=None):
        """idx (B, T) -> (B, T + new), see generate.generate. temperature 0: the likeliest tokens"""
        sampling = generate.Sampling(temperature, top_k, top_p)
        return generate.generate(self, idx, max_new_tokens, sampling, stop, drafts)

    def save_pretrained(self, folder, dtype=None, shard_bytes=5e9, state=None):
        """Write a folder that transformers reads. state: a state_dict to write in place of the
        model's, which may be sharded"""
        from nanoseek import hf
        hf.save_pretrained(self, folder, dtype, shard_bytes, state)

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, **overrides):
        """Load a folder with a Llama, Glm4Moe or DeepseekV3. overrides: fields of Config"""
        from nanoseek import hf
        return hf.from_pretrained(folder, dtype, **overrides)
