# SmolLM2-135M learns to chat, 134,515,008 parameters. Made for
# `python prepare.py smol-smoltalk --tokenizer=HuggingFaceTB/SmolLM2-135M`, for one GPU. Not yet run
# to its end.
init_from = 'HuggingFaceTB/SmolLM2-135M'
out_dir = 'out/smol135-chat'
dataset = 'smol-smoltalk'

batch_size = 0                          # as many as fit
block_size = 2048                       # prepare.py's --pack
global_batch_size = 64
learning_rate = 1e-3
max_steps = 3000
eval_interval = 500
eval_steps = 8
