#!/usr/bin/env python
r"""Tune HunyuanVideo's or HunyuanDiT's sparse attention, save the thresholds, load them, generate, compare with dense.

    python evaluate/hunyuan_example.py --tune --compare --offload
    python evaluate/hunyuan_example.py --tune --compare --height 544 --width 960 --frames 61
    python evaluate/hunyuan_example.py --tune --compare --model_name Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers
    python evaluate/hunyuan_example.py --tune --compare --model_name tiny:HunyuanVideo      # no download, seconds

Exit code 2: an argument, a model or a file cannot be used; 130: interrupted, --resume goes on.
"""

import sys

from modify_model.cli.main import Script

SCRIPT = Script(
    __file__,
    __doc__,
    pipelines=("HunyuanVideoPipeline", "HunyuanDiTPipeline"),
    defaults={"model_name": "hunyuanvideo-community/HunyuanVideo"},
)

if __name__ == "__main__":
    sys.exit(SCRIPT.main())
