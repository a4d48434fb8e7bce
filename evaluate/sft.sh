#!/usr/bin/env bash
# Trains the weights under fixed masks (supervised fine-tuning on chats); the masks stay as they are loaded.
#
#   MODEL=meta-llama/Llama-3.1-8B-Instruct DATA=chats.jsonl MASKS=out/prulong_masksonly/masks/masks_sp0.7.tsv \
#       evaluate/sft.sh
#
# Defaults are PruLong's, but for rows of 32,768 tokens (PruLong: 131,072, shared by two GPUs). Other variables:
# training/wrapper.sh.
set -euo pipefail
: "${STEPS:=250}" "${BATCH:=64}" "${LR:=2e-5}" "${LR_WARMUP:=0.05}" "${MIN_LR_RATIO:=0.1}" "${OUT:=out/sft}"
: "${MASKS:=${MODEL:-}/masks_sp0.7.tsv}"
TRAINS="trains all weights under fixed masks, those in $MASKS; no mask is learned"
source "$(dirname "${BASH_SOURCE[0]}")/training/wrapper.sh"
run finetune_with_masks.py --load_masks_from "$MASKS" "$@"
