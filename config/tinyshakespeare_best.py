# Past nanoGPT's GPU result on two CPU cores: shakespeare.py without MLA and experts, but as wide as
# what a token passes there. 1.5M parameters. Made for `python prepare.py tinyshakespeare`. Expect
# 1.44 nats after eight to nine minutes with bfloat16.
from config.shakespeare import *
out_dir = 'out/tinyshakespeare_best'
dataset = 'tinyshakespeare'
attention = 'gqa'
n_routed_experts = 0
intermediate_size = 384
dropout = 0.03
max_steps = 2400
eval_interval = 800
