# A rung of the ladder in docs/scaling.md, which compares dense GQA with MLA and experts at equal
# FLOPs: the model of the dial, on text that no run reads twice, evaluated often.
# Meant for `python prepare.py docs.jsonl --tokenizer=bpe:1024`; runs on any text long enough. At
# depth 2 and with characters it has 1.0M parameters, 0.4M active per token.
# Takes two minutes at `--depth=1 --tokens=2.3e6` on one CPU core, ten at `--depth=2 --tokens=5e6`.
# Expect what docs/scaling.md shows for its four forms.
out_dir = 'out/ladder'
dataset = 'docs'
depth = 2

eval_steps = 24
log_interval = 20
checkpoint_interval = 0
