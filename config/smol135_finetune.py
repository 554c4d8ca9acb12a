# SmolLM2-135M fine-tuned on Shakespeare: 134,515,008 parameters, about 4 GB. The architecture comes
# with the weights, and the data must be in their tokens:
# `python prepare.py shakespeare --tokenizer=HuggingFaceTB/SmolLM2-135M --out_dir=data/NAME-smollm2`
init_from = 'HuggingFaceTB/SmolLM2-135M'
out_dir = 'out/smol135-finetune'
dataset = 'shakespeare-smollm2'

batch_size = 4
learning_rate = 1e-4                    # 1/30 of the rate it was trained with
warmup_steps = 10
max_steps = 100
eval_interval = 50
log_interval = 5
checkpoint_interval = 100
sample_interval = 100
sample_prompt = 'ROMEO:\n'
