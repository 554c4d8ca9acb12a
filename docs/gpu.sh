#!/usr/bin/env bash
# What a GPU has to show, in about 15 minutes on one NVIDIA card without a network:
#     TEXT=tinyshakespeare.txt bash docs/gpu.sh 2>&1 | tee docs/gpu-NAME.md
# Targets: all tests pass; smol135_dense trains at half of a matmul's rate; smol135 trains three times as
# fast as transformers, and in 1.3 times the time of the dense model; the race ends at 1.4697 nats per
# character, where nanoGPT's shakespeare_char.py does, within 20 s after its first step.
set -u
cd "$(dirname "$0")/.."
show() { printf '\n    %s\n\n```\n' "$*"; "$@"; printf '```\n'; }
bench() { show python bench.py "config/$1.py" --batch_sizes=1,8,64 --contexts=128,2048 "${@:2}"; }
train() { show python train.py "config/$1.py" --dataset=out/gpu/text --resume=never "${@:2}"; }

show nvidia-smi
python prepare.py "${TEXT:-data/shakespeare/input.txt}" --tokenizer=char --out_dir=out/gpu/text
show python -m pytest -q --device=cuda -m 'slow or not slow'
bench smol135_dense --batch_size=16
bench smol135 --batch_size=8 --vs=transformers
bench v3_tiny --batch_size=16
train shakespeare_gpu --eval_interval=50 --out_dir=out/gpu/race
for fp8 in '' tensorwise rowwise; do
    train smol135_dense --batch_size=8 --global_batch_size=8 --block_size=1024 --max_steps=200 \
        --eval_interval=0 --fp8=$fp8 --out_dir=out/gpu/fp8$fp8
done
for parallel in ddp fsdp; do
    show torchrun --standalone --nproc_per_node=1 train_ddp.py config/smol135.py --max_steps=20 \
        --dataset=out/gpu/text --eval_interval=0 --parallel=$parallel --out_dir=out/gpu/$parallel
done
