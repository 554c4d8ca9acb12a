# Past nanoGPT's GPU result (1.4697 nats) on two CPU cores: shakespeare.py without MLA and experts.
# 1.1M parameters. Made for `python prepare.py tinyshakespeare`. Expect 1.465 nats after 3.5 minutes
# with bfloat16, and two more to compile the first time; 1.43 after 14 to 18 minutes with
# `--num_hidden_layers=4 --learning_rate=5e-3 --dropout=0.1 --max_steps=7000`.
from config.shakespeare import *
out_dir = 'out/tinyshakespeare_best'
dataset = 'tinyshakespeare'
attention = 'gqa'
num_attention_heads = 2
n_routed_experts = 0
intermediate_size = 384
dropout = 0.03
learning_rate = 3.5e-3
max_steps = 2000
compile = True
eval_interval = 800
