#!/usr/bin/env python
r"""Learn masks and weights together: the weights get used to the heads that see sink and window only.

    python evaluate/learn_masks_and_weights.py --output_dir out/both --load_masks_from out/masks \
        --load_masks_sparsity 0.7 --start_head_sparsity 0.7 --data my_texts/

This may undo what post-training taught an instruct model. Writes the model to OUTPUT_DIR and its masks to
OUTPUT_DIR/masks. An interrupted run goes on with --resume_from_checkpoint last.
"""

import sys

import _learning  # noqa: F401
import learning

DEFAULTS = {"freeze_non_mask_parameters": False, "freeze_mask_parameters": False}

if __name__ == "__main__":
    sys.exit(learning.main(__doc__, DEFAULTS))
