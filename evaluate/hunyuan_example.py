#!/usr/bin/env python
r"""Tune HunyuanVideo's or HunyuanDiT's sparse attention, save the thresholds, load them, generate, compare with dense.

    python evaluate/hunyuan_example.py --tune --compare --offload
    python evaluate/hunyuan_example.py --tune --compare --height 544 --width 960 --frames 61
    python evaluate/hunyuan_example.py --tune --compare --model_name Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers
    python evaluate/hunyuan_example.py --tune --compare --model_name tiny:HunyuanVideo      # no download, seconds

Exit code 2: an argument, a model or a file cannot be used; 130: interrupted, --resume goes on.
"""

import sys

from _diffusion import main
from _diffusion_models import Example, Size

from modify_model.modify_hunyuan import set_spas_sage_attn_hunyuan

EXAMPLE = Example(
    patch=set_spas_sage_attn_hunyuan,
    pipelines={"HunyuanVideoPipeline": Size(720, 1280, 129, 30), "HunyuanDiTPipeline": Size(1024, 1024, None, 50)},
    model_name="hunyuanvideo-community/HunyuanVideo",
    tiny=("HunyuanVideo", "HunyuanDiT"),
)

if __name__ == "__main__":
    sys.exit(main(EXAMPLE, __file__, __doc__))
