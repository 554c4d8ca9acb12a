# SmolLM2-135M's backbone with 8 routed experts and a latent of 72 values. 774M parameters.
# Made for cosmopedia with SmolLM2's tokenizer; works with any vocabulary of at most 49,152 tokens.
# Needs 32 GB for 4 x 2048 tokens; `--max_steps=0` prints what fits. On a CPU try --block_size=32.
from config.smol135_dense import *
out_dir = 'out/smol774'
attention = 'mla'
kv_lora_rank = 72
qk_nope_head_dim = 64
qk_rope_head_dim = 32
v_head_dim = 64
n_shared_experts = 1
n_routed_experts = 8
num_experts_per_tok = 2
moe_intermediate_size = 1536

schedule = 'cosine'
max_steps = 10000
checkpoint_interval = 500
sample_interval = 500
sample_prompt = 'Before we proceed'
