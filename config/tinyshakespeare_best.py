# Past nanoGPT's GPU result on two CPU cores: shakespeare.py with 8 experts and dropout. 3.1M
# parameters, 1.3M active. Made for `python prepare.py tinyshakespeare`. Expect 1.454 nats.
from config.shakespeare import *
out_dir = 'out/tinyshakespeare_best'
dataset = 'tinyshakespeare'
n_routed_experts = 8                    # 16 learn more per step, which takes 1.25 times as long
dropout = 0.03
max_steps = 1700
eval_interval = 850
