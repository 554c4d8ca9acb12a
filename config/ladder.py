# A rung of the ladder in docs/scaling.md, which compares dense GQA with MLA and experts at equal
# FLOPs: the model of the dial, on text that no run reads twice, evaluated often.
# Meant for `python prepare.py docs.jsonl --tokenizer=bpe:1024`; runs on any text long enough. At
# depth 2 and with characters it has 1.8M parameters, 0.4M active per token.
# Takes six minutes at `--depth=1 --tokens=20e6` on one CPU core with bfloat16, 13 at depth 2.
# Expect what docs/scaling.md shows.
out_dir = 'out/ladder'
dataset = 'docs'
depth = 2

eval_steps = 0                          # the whole validation split: forms differ by little
log_interval = 20
checkpoint_interval = 0
