# GRPO after arithmetic.py: from half of the held-out products to nearly all of them.
init_from = 'out/arithmetic'
out_dir = 'out/grpo-arithmetic'
max_new_tokens = 48
max_steps = 60
