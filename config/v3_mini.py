# DeepSeek-V3's shape for 80 GB or more. 5.69B parameters, 1.35B active per token.
# Made for fineweb-edu with DeepSeek-V3's tokenizer; works with any smaller vocabulary.
# Needs 91 GB for weights, gradients and AdamW alone. It has been counted, not trained.
out_dir = 'out/v3-mini'
attention = 'mla'
vocab_size = 129280
hidden_size = 2048
intermediate_size = 6144
num_hidden_layers = 24
num_attention_heads = 32
q_lora_rank = 1536
kv_lora_rank = 512
qk_nope_head_dim = 96
qk_rope_head_dim = 32
v_head_dim = 64
n_shared_experts = 1
n_routed_experts = 64
num_experts_per_tok = 4
moe_intermediate_size = 512
first_k_dense_replace = 1
tie_word_embeddings = False
initializer_range = 0.006
max_position_embeddings = 4096

batch_size = 0                          # as many as fit
block_size = 2048
global_batch_size = 64
gradient_checkpointing = True
learning_rate = 4e-4
warmup_steps = 2000
max_steps = 50000
eval_interval = 1000
eval_steps = 1
checkpoint_interval = 1000
