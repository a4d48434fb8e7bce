#!/usr/bin/env python
r"""Learn masks: which KV heads need the whole context and which do with sink and window; the weights are frozen.

    python evaluate/learn_masks.py --output_dir out/masks --max_steps 40 --reg_learning_rate 0.1 --window 128 \
        --passkeys --num_passkeys 4 --passkey_words 3 --context_length_min 512 --context_length_max 1024
    torchrun --nproc_per_node 8 evaluate/learn_masks.py --output_dir out/masks --bf16 --gradient_checkpointing \
        --model_name meta-llama/Llama-3.1-8B-Instruct --data my_texts/ --max_tokens_per_device 32768
    python evaluate/learn_masks.py --output_dir out/masks --objective distill --passkeys --data my_texts/

The first line learns those of the demo model, in half a minute on two CPU cores: its gates end at 0 and at 1.
Writes OUTPUT_DIR/masks (full_attention_heads.tsv and config.json), and logs that TensorBoard reads. An interrupted run
goes on with --resume_from_checkpoint last. Exit code 2: an argument, a model or a file cannot be used.
"""

import sys

import _learning  # noqa: F401
import learning

DEFAULTS = {"freeze_non_mask_parameters": True, "freeze_mask_parameters": False}

if __name__ == "__main__":
    sys.exit(learning.main(__doc__, DEFAULTS))
