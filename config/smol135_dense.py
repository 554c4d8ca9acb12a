# SmolLM2-135M itself, a Llama: the baseline for smol135.py and smol774.py. 134,515,008 parameters.
# Made for cosmopedia with SmolLM2's tokenizer; works with any vocabulary of at most 49,152 tokens.
# Needs 11 GB for 4 x 2048 tokens at a time; `--max_steps=0` prints what fits on your machine.
out_dir = 'out/smol135-dense'
attention = 'gqa'
vocab_size = 49152
hidden_size = 576
intermediate_size = 1536
num_hidden_layers = 30
num_attention_heads = 9
num_key_value_heads = 3
max_position_embeddings = 8192
rope_theta = 100000.0
rms_norm_eps = 1e-5
initializer_range = 1 / 24              # hidden_size ** -0.5, as in SmolLM2

batch_size = 0                          # as many as fit
block_size = 2048
global_batch_size = 32                  # sequences per step, over all devices
learning_rate = 3e-3
schedule = 'wsd'                        # as SmolLM2 was trained
warmup_steps = 2000
max_steps = 20000
weight_decay = 0.01
eval_interval = 500
eval_steps = 6
checkpoint_interval = 1000
sample_interval = 1000
