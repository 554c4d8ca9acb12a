# SmolLM2-135M made into config/smol135.py's architecture by convert.py, trained on beside the original: 2M tokens.
#   python prepare.py tinyshakespeare --tokenizer=HuggingFaceTB/SmolLM2-135M --out_dir=data/tinyshakespeare-smollm2
#   python convert.py HuggingFaceTB/SmolLM2-135M out/smol135-upcycled --attention=mla --kv_lora_rank=128 \
#       --n_routed_experts=3 --n_shared_experts=1 --calibration=data/tinyshakespeare-smollm2
#   python train.py config/smol135_heal.py
# The architecture comes with the weights. Local folders do in the place of the Hub id. Needs about 7 GB.
init_from = 'out/smol135-upcycled'
distill_from = 'HuggingFaceTB/SmolLM2-135M'     # what the latent has lost, the original's distributions tell best
out_dir = 'out/smol135-heal'
dataset = 'tinyshakespeare-smollm2'

batch_size = 4
block_size = 256
learning_rate = 2e-4                    # twice smol135_finetune's: there is more to learn
warmup_steps = 20
schedule = 'wsd'
decay_frac = 0.5
max_steps = 1950                        # of 1,024 tokens: 2.0M
weight_decay = 0.01
freeze = 'embed_tokens'                 # tied to the head: what few tokens would spoil first
eval_interval = 250
eval_steps = 16
log_interval = 10
checkpoint_interval = 500
