# Train SmolLM2-135M on 256,000 tokens after convert.py has given it smol135.py's architecture.
# The README's "Start from SmolLM2" has the commands; a local folder works in place of the Hub id.
# 372.9M parameters, 293.3M active; needs 8 GB.
init_from = 'out/smol135-upcycled'
out_dir = 'out/smol135-heal'
dataset = 'tinyshakespeare-smollm2'

batch_size = 2
learning_rate = 1e-4                    # with 2e-4 and 80 steps the loss was 1.4% higher
warmup_steps = 20
schedule = 'wsd'
decay_frac = 0.5
max_steps = 500
weight_decay = 0.01
eval_interval = 50
eval_steps = 16
log_interval = 5
checkpoint_interval = 250
