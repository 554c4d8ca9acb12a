# GRPO for SmolLM2-135M-Instruct on a GPU: answers in few words. Untried but for a few steps.
task = 'tasks/brief.py'
init_from = 'HuggingFaceTB/SmolLM2-135M-Instruct'
out_dir = 'out/grpo-smol135'
group_size = 16
learning_rate = 1e-4
