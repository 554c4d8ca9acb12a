# Linear attention, one matrix per head at any length, with 4 experts. 10,095,744 parameters.
# Made for GPT-2-like tokenizers (at most 32,256 tokens). Needs 200 MB. Expect a slow start.
out_dir = 'out/linear10'
attention = 'linear'
vocab_size = 32256
hidden_size = 128
num_hidden_layers = 4
num_attention_heads = 4
n_routed_experts = 4
moe_intermediate_size = 256
max_position_embeddings = 512
tie_word_embeddings = False

batch_size = 8
block_size = 32
global_batch_size = 64                  # accumulates 8 micro-steps
learning_rate = 5e-5
max_steps = 5000
eval_interval = 100
eval_steps = 50
checkpoint_interval = 100
