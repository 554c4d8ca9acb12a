# nanoGPT's shakespeare_char.py with Muon, at the same size: 10,646,784 parameters.
# Made for `python prepare.py tinyshakespeare`. Needs 3 GB. The target is nanoGPT's 1.4697 nats.
from config.tinyshakespeare import *
out_dir = 'out/shakespeare_gpu'
hidden_size = 384
num_hidden_layers = 6
initializer_range = 0.05                # hidden_size ** -0.5
dropout = 0.2                           # a million characters, read more than ten times

batch_size = 64
block_size = 256
max_steps = 1000
learning_rate = 2.5e-3                  # half of tinyshakespeare.py's, for twice the width
warmup_steps = 50
eval_interval = 100
checkpoint_interval = 250               # the best one by validation loss stays
