#!/usr/bin/env bash
# Learns masks and weights together, from masks that prulong_masksonly.sh has learned.
#
#   MODEL=meta-llama/Llama-3.1-8B DATA=my_texts/ MASKS=out/prulong_masksonly/masks/masks_sp0.7.tsv \
#       evaluate/prulong_masksandweights.sh
#
# Defaults are PruLong's, but for rows of 32,768 tokens (PruLong: 131,072, shared by two GPUs). Other variables:
# training/wrapper.sh.
set -euo pipefail
: "${STEPS:=1000}" "${BATCH:=16}" "${LR:=1e-5}" "${LR_WARMUP:=0.1}" "${MIN_LR_RATIO:=0.1}"
: "${START:=0.7}" "${END:=0.7}" "${WARMUP_RATIO:=0.8}" "${WARMUP_TYPE:=linear}"
: "${MASK_LR:=1.0}" "${REG_LR:=1.0}" "${DISABLE_LINEAR:=false}" "${OUT:=out/prulong_masksandweights}"
: "${MASKS:=${MODEL:-}/masks_sp0.7.tsv}"
TRAINS="trains masks and all weights, from the masks in $MASKS; share of streaming heads $START to $END"
source "$(dirname "${BASH_SOURCE[0]}")/training/wrapper.sh"
run learn_masks_and_weights.py --load_masks_from "$MASKS" --start_head_sparsity "$START" --end_head_sparsity "$END" \
    --sparsity_warmup_ratio "$WARMUP_RATIO" --warmup_type "$WARMUP_TYPE" --mask_learning_rate "$MASK_LR" \
    --reg_learning_rate "$REG_LR" --disable_linear_regularization_term "$DISABLE_LINEAR" "$@"
