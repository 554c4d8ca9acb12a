# DeepSeek-V3's shape for one small GPU: MLA with q LoRA, one dense layer and then eleven with
# eight routed experts (2 active) and a shared one, loss-free balancing, one MTP layer. 0.14B
# parameters.
# Meant for a tokenizer of 32,000 tokens trained on the corpus (--tokenizer=bpe:32000); runs on
# any smaller vocabulary.
# Needs about 8 GB for 8 x 1024 tokens at a time; `--max_steps=0` prints what fits here. On a CPU
# try --block_size=64.
# Expect the place to try a change to DeepSeek's recipe before paying for it at scale.
out_dir = 'out/v3-tiny'
dataset = 'shakespeare'

attention = 'mla'
vocab_size = 32000
hidden_size = 768
intermediate_size = 2048
num_hidden_layers = 12
num_attention_heads = 12
q_lora_rank = 384
kv_lora_rank = 128
qk_nope_head_dim = 32
qk_rope_head_dim = 32
v_head_dim = 64
n_shared_experts = 1
n_routed_experts = 8
num_experts_per_tok = 2
moe_intermediate_size = 256
first_k_dense_replace = 1
num_nextn_predict_layers = 1
tie_word_embeddings = False
initializer_range = 0.02
max_position_embeddings = 4096

batch_size = 0                          # as many as fit
block_size = 1024
global_batch_size = 64
# nanoseek/dial.py's recipe, measured at widths of up to 192 only. Its formula says 2.6e-3 for this
# width; a longer run wants less
optimizer = 'muon'
learning_rate = 2e-3
embedding_lr = 3.0
schedule = 'wsd'
decay_frac = 1.0                        # linear to 0 from the warm-up on
min_lr_frac = 0.0
warmup_steps = 500
max_steps = 10000
eval_interval = 500
eval_steps = 6
checkpoint_interval = 1000
sample_interval = 1000
