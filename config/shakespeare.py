# The default: MLA + MoE on characters, for two CPU cores or a GPU. 4.1M parameters, 1.0M active.
# Made for `python prepare.py shakespeare`. Needs 0.9 GB, and two to five minutes on two CPU cores.
# Expect 2.17 bits per byte on the validation split, and lines that read like the plays.
out_dir = 'out/shakespeare'
dataset = 'shakespeare'
attention = 'mla'
hidden_size = 192
num_hidden_layers = 3
num_attention_heads = 3
kv_lora_rank = 64
qk_nope_head_dim = 32
qk_rope_head_dim = 32
v_head_dim = 64                         # dn + dr = dv = 64
n_shared_experts = 1
n_routed_experts = 16
num_experts_per_tok = 2
moe_intermediate_size = 128
max_position_embeddings = 256
rope_theta = 500.0                      # Llama's 10000 is for longer contexts
tie_word_embeddings = False
bias_update_speed = 1e-2                # a short run must find its balance sooner

batch_size = 8
block_size = 256
max_steps = 1000
optimizer = 'muon'
learning_rate = 5e-3
embedding_lr = 3.0
schedule = 'wsd'
decay_frac = 1.0                        # linear to 0 after the warm-up
min_lr_frac = 0.0
warmup_steps = 50
eval_interval = 200
checkpoint_interval = 250
sample_interval = 250
sample_prompt = 'Before we proceed'
