#!/usr/bin/env python
r"""Tune Wan's sparse attention (2.1, or both transformers of 2.2), save the thresholds, load them, generate, compare.

    python evaluate/wan_example.py --tune --compare
    python evaluate/wan_example.py --tune --compare --model_name models_dict/demo_wan       # no download, minutes
    python evaluate/wan_example.py --parallel_tune --model_name Wan-AI/Wan2.2-T2V-A14B-Diffusers --dense_steps 8 0
    python evaluate/wan_example.py --tune --compare --model_name tiny:Wan                   # no download, seconds

Exit code 2: an argument, a model or a file cannot be used; 130: interrupted, --resume goes on.
"""

import sys

from _diffusion import main
from _diffusion_models import Example, Size

from modify_model.modify_wan import set_spas_sage_attn_wan

EXAMPLE = Example(
    patch=set_spas_sage_attn_wan,
    pipelines={"WanPipeline": Size(480, 832, 81, 50)},
    model_name="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    tiny=("Wan", "Wan2.2"),
    float32=("vae",),  # as its makers run it
)

if __name__ == "__main__":
    sys.exit(main(EXAMPLE, __file__, __doc__))
