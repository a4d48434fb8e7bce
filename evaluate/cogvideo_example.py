#!/usr/bin/env python
r"""Tune CogVideoX's sparse attention, save the thresholds, load them, generate, compare with dense.

    python evaluate/cogvideo_example.py --tune --compare
    python evaluate/cogvideo_example.py --compare --num_compare 3 --out_path out/cogvideo
    python evaluate/cogvideo_example.py --parallel_tune --model_name THUDM/CogVideoX-5b --dense_steps 4 0 --offload
    python evaluate/cogvideo_example.py --tune --compare --model_name tiny:CogVideoX        # no download, seconds

Exit code 2: an argument, a model or a file cannot be used; 130: interrupted, --resume goes on.
"""

import sys

from modify_model.cli.main import Script

SCRIPT = Script(__file__, __doc__, pipelines=("CogVideoXPipeline",), defaults={"model_name": "THUDM/CogVideoX-2b"})

if __name__ == "__main__":
    sys.exit(SCRIPT.main())
