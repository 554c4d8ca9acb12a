# GRPO for SmolLM2-135M-Instruct on a GPU: a form of answers that any chat model can learn. Untried.
task = 'tasks/brackets.py'
init_from = 'HuggingFaceTB/SmolLM2-135M-Instruct'
out_dir = 'out/grpo-smol135'
group_size = 16
learning_rate = 1e-4
