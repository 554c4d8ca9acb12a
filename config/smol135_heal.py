# SmolLM2-135M made into config/smol135.py's architecture by convert.py, trained on: 256,000
# tokens.
#   python prepare.py tinyshakespeare --tokenizer=HuggingFaceTB/SmolLM2-135M \
#       --out_dir=data/tinyshakespeare-smollm2
#   python convert.py HuggingFaceTB/SmolLM2-135M out/smol135-upcycled --attention=mla \
#       --kv_lora_rank=128 --n_routed_experts=3 --n_shared_experts=1 \
#       --calibration=data/tinyshakespeare-smollm2
#   python train.py config/smol135_heal.py
# The architecture comes with the weights. Local folders do in the place of the Hub id.
# Needs about 8 GB.
init_from = 'out/smol135-upcycled'
out_dir = 'out/smol135-heal'
dataset = 'tinyshakespeare-smollm2'

batch_size = 2
block_size = 256
# smol135_finetune's: with 2e-4 and 80 steps the loss was 1.4% higher
learning_rate = 1e-4
warmup_steps = 20
schedule = 'wsd'
decay_frac = 0.5
max_steps = 500
weight_decay = 0.01
eval_interval = 50
eval_steps = 16
log_interval = 5
checkpoint_interval = 250
sample_interval = 0
