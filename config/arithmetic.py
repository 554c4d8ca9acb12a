# Learns to multiply from a teacher who forgets to carry; grpo_arithmetic.py goes on from there.
# MLA + MoE, 1.2M parameters, 0.5M active. Made for these two commands:
# `python tasks/arithmetic.py 30000 > workings.jsonl`
# `python prepare.py workings.jsonl --tokenizer=char --pack=256`
from config.shakespeare import *
out_dir = 'out/arithmetic'
dataset = 'workings'
hidden_size = 128
num_attention_heads = 4
qk_nope_head_dim = 16
qk_rope_head_dim = 16
v_head_dim = 32
rope_theta = 10000.0
tie_word_embeddings = True
n_routed_experts = 8
moe_intermediate_size = 96
batch_size = 16
max_steps = 800
warmup_steps = 20
eval_interval = 200
checkpoint_interval = 400
sample_interval = 0
