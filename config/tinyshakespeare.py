# The quickest to learn on two CPU cores: dense GQA (a Llama), characters, Muon. 1.3M parameters.
# Meant for `python prepare.py tinyshakespeare`; in the time that nanoGPT's CPU recipe takes to
# 1.886 nats per character on the validation split, it comes to 1.58. To 1.886 comes
# `--num_hidden_layers=2 --block_size=64 --max_steps=250`.
# No experts, no MLA: a step of so small a model takes the time of its many operations, not of its
# FLOPs.
out_dir = 'out/tinyshakespeare'
dataset = 'tinyshakespeare'

attention = 'gqa'
hidden_size = 192
num_hidden_layers = 3
num_attention_heads = 6
max_position_embeddings = 256
initializer_range = 0.06                # as in shakespeare.py, also for its width

batch_size = 16
# 256 learns as much from a token, but attention takes longer
block_size = 128
max_steps = 600
# 1.907 where AdamW with 4e-3 has 1.965, after 11 s with 4 layers of 128
optimizer = 'muon'
learning_rate = 5e-3
embedding_lr = 3.0
schedule = 'wsd'
decay_frac = 1.0                        # linear to 0 from the start
min_lr_frac = 0.0
warmup_steps = 10
eval_interval = 200
checkpoint_interval = 600
