#!/usr/bin/env bash
# Learns masks; the weights are frozen. (The original's comment says "weights with fixed masks", which is sft.sh.)
#
#   MODEL=meta-llama/Llama-3.1-8B-Instruct DATA=my_texts/ evaluate/prulong_masksonly.sh
#   MODEL=models_dict/demo_llama TOKENS=2048 STEPS=60 BATCH=1 evaluate/prulong_masksonly.sh --use_cpu --bf16 false
#
# Defaults are PruLong's, but for rows of 32,768 tokens (PruLong: 131,072, shared by two GPUs). SparseAttn's differ in
# START=0.1 and DISABLE_LINEAR=true. Other variables: training/wrapper.sh.
set -euo pipefail
: "${STEPS:=1000}" "${BATCH:=16}" "${LR:=1e-5}" "${LR_WARMUP:=0.1}" "${MIN_LR_RATIO:=0.01}"
: "${START:=0.0}" "${END:=0.7}" "${WARMUP_RATIO:=0.8}" "${WARMUP_TYPE:=linear}"
: "${MASK_LR:=1.0}" "${REG_LR:=1.0}" "${DISABLE_LINEAR:=false}" "${OUT:=out/prulong_masksonly}"
TRAINS="trains masks only: gates of KV heads; all weights frozen; share of streaming heads $START to $END"
source "$(dirname "${BASH_SOURCE[0]}")/training/wrapper.sh"
run learn_masks.py --start_head_sparsity "$START" --end_head_sparsity "$END" --sparsity_warmup_ratio "$WARMUP_RATIO" \
    --warmup_type "$WARMUP_TYPE" --mask_learning_rate "$MASK_LR" --reg_learning_rate "$REG_LR" \
    --disable_linear_regularization_term "$DISABLE_LINEAR" "$@"
