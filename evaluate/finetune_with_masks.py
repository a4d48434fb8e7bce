#!/usr/bin/env python
r"""Fine-tune the weights under fixed masks (SFT on a model whose streaming heads see sink and window only).

    python evaluate/finetune_with_masks.py --output_dir out/sft --load_masks_from out/masks/masks \
        --load_masks_sparsity 0.7 --data chats.jsonl --max_steps 250 --learning_rate 2e-5

Of chats, the assistant's words alone are learned. Writes the model to OUTPUT_DIR and its masks to OUTPUT_DIR/masks. An
interrupted run goes on with --resume_from_checkpoint last.
"""

import sys

import _learning  # noqa: F401
import learning

DEFAULTS = {"freeze_non_mask_parameters": False, "freeze_mask_parameters": True}

if __name__ == "__main__":
    sys.exit(learning.main(__doc__, DEFAULTS))
