# SmolLM2-135M fine-tuned on Shakespeare: 134,515,008 parameters. The architecture comes with the
# weights.
# The tokens must be those of its tokenizer:
#   python prepare.py shakespeare --tokenizer=HuggingFaceTB/SmolLM2-135M \
#       --out_dir=data/shakespeare-smollm2
# Both commands take a local folder in the place of the Hub id: --tokenizer=DIR, --init_from=DIR.
# Needs about 4 GB.
init_from = 'HuggingFaceTB/SmolLM2-135M'
out_dir = 'out/smol135-finetune'
dataset = 'shakespeare-smollm2'

batch_size = 4
block_size = 256
learning_rate = 1e-4                    # a thirtieth of what it was trained with
warmup_steps = 10
max_steps = 100
eval_interval = 50
log_interval = 5
checkpoint_interval = 100
sample_interval = 100
sample_prompt = 'ROMEO:\n'
