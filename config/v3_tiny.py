# DeepSeek-V3's shape for one small GPU, to test changes to its recipe. 0.14B parameters.
# Made for a tokenizer trained on the corpus (--tokenizer=bpe:32000), or any smaller vocabulary.
# Needs 8 GB for 8 x 1024 tokens; `--max_steps=0` prints what fits. On a CPU try --block_size=64.
from config.v3_mini import *
out_dir = 'out/v3-tiny'
vocab_size = 32000
hidden_size = 768
intermediate_size = 2048
num_hidden_layers = 12
num_attention_heads = 12
q_lora_rank = 384
kv_lora_rank = 128
qk_nope_head_dim = 32
n_routed_experts = 8
num_experts_per_tok = 2
moe_intermediate_size = 256
num_nextn_predict_layers = 1
initializer_range = 0.02

block_size = 1024
gradient_checkpointing = False
optimizer = 'muon'
learning_rate = 2e-3                    # nanoseek/dial.py gives 2.6e-3; a longer run needs less
embedding_lr = 3.0
schedule = 'wsd'
decay_frac = 1.0                        # linear to 0 after the warm-up
min_lr_frac = 0.0
warmup_steps = 500
max_steps = 10000
eval_interval = 500
eval_steps = 6
sample_interval = 1000
