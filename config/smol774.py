# SmolLM2-135M's backbone with 8 routed experts and a latent of 72 values. 774M parameters.
# Made for cosmopedia with SmolLM2's tokenizer; works with any vocabulary of at most 49,152 tokens.
# Needs 32 GB for 4 x 2048 tokens; `--max_steps=0` prints what fits. On a CPU try --block_size=32.
out_dir = 'out/smol774'
attention = 'mla'
vocab_size = 49152
hidden_size = 576
num_hidden_layers = 30
num_attention_heads = 9
kv_lora_rank = 72
qk_nope_head_dim = 64
qk_rope_head_dim = 32
v_head_dim = 64
n_shared_experts = 1
n_routed_experts = 8
num_experts_per_tok = 2
intermediate_size = 1536
moe_intermediate_size = 1536
max_position_embeddings = 8192
rope_theta = 100000.0
rms_norm_eps = 1e-5
initializer_range = 1 / 24              # hidden_size ** -0.5, as in SmolLM2

batch_size = 0                          # as many as fit
block_size = 2048
global_batch_size = 32
learning_rate = 3e-3
warmup_steps = 2000
weight_decay = 0.01
grad_clip = 1.0
max_steps = 10000
eval_interval = 500
eval_steps = 6
checkpoint_interval = 500
sample_interval = 500
sample_prompt = 'Before we proceed'
