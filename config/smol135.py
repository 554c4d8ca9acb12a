# DeepSeek-V3's parts on SmolLM2-135M's backbone. 372.9M parameters, 293.3M active per token.
# Made for cosmopedia with SmolLM2's tokenizer; works with any vocabulary of at most 49,152 tokens.
# Needs 8 GB, or 25 GB for 4 x 2048 tokens; `--max_steps=0` prints what fits. On a CPU try
# --block_size=64. Expect a cache of 160 values per token and layer; SmolLM2-135M keeps 384.
out_dir = 'out/smol135'
attention = 'mla'
vocab_size = 49152
hidden_size = 576
num_hidden_layers = 30
num_attention_heads = 9
kv_lora_rank = 128
qk_nope_head_dim = 32
qk_rope_head_dim = 32
v_head_dim = 64                         # dn + dr = dv: every fused attention kernel accepts that
n_shared_experts = 1
n_routed_experts = 3
num_experts_per_tok = 2
intermediate_size = 1536
moe_intermediate_size = 1536
max_position_embeddings = 8192
rms_norm_eps = 1e-5

batch_size = 0                          # as many as fit
block_size = 2048
global_batch_size = 32                  # sequences per step, over all devices
optimizer = 'muon'
learning_rate = 2e-3                    # nanoseek/dial.py gives 3.2e-3; a longer run needs less
embedding_lr = 3.0
schedule = 'wsd'
decay_frac = 1.0                        # linear to 0 after the warm-up
min_lr_frac = 0.0
warmup_steps = 1000
max_steps = 20000
eval_interval = 500
eval_steps = 6
checkpoint_interval = 1000
sample_interval = 1000
