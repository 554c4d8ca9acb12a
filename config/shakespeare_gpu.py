# nanoGPT's shakespeare_char.py, on a GPU: 10,646,784 parameters, about as many, with as many
# tokens a step, but Muon.
# Meant for `python prepare.py tinyshakespeare`; aims at nanoGPT's 1.4697 nats per character on
# the validation split. The settings are tinyshakespeare.py's, scaled; they have not been measured
# on a GPU yet.
# Needs about 3 GB there.
out_dir = 'out/shakespeare_gpu'
dataset = 'tinyshakespeare'

attention = 'gqa'
hidden_size = 384
num_hidden_layers = 6
num_attention_heads = 6
max_position_embeddings = 256
initializer_range = 0.05                # hidden_size ** -0.5
dropout = 0.2                           # a million characters, seen ten times and more

batch_size = 64
block_size = 256
max_steps = 1000
optimizer = 'muon'
learning_rate = 2.5e-3                  # half of tinyshakespeare.py's, for twice the width
schedule = 'wsd'
decay_frac = 1.0                        # linear to 0 from the start
min_lr_frac = 0.0
warmup_steps = 50
eval_interval = 100
checkpoint_interval = 250               # the best by validation loss is kept
