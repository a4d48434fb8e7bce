#!/usr/bin/env python
r"""Tune Wan's sparse attention (2.1, or both transformers of 2.2), save the thresholds, load them, generate, compare.

    python evaluate/wan_example.py --tune --compare
    python evaluate/wan_example.py --tune --compare --model_name models_dict/demo_wan       # no download, minutes
    python evaluate/wan_example.py --parallel_tune --model_name Wan-AI/Wan2.2-T2V-A14B-Diffusers --dense_steps 8 0
    python evaluate/wan_example.py --tune --compare --model_name tiny:Wan                   # no download, seconds

Exit code 2: an argument, a model or a file cannot be used; 130: interrupted, --resume goes on.
"""

import sys
from pathlib import Path

from modify_model.cli.main import Script

sys.path.append(str(Path(__file__).parent / "demos"))
import sampler


def demo(args, device):
    """The demo Wan, which has no text encoder of its own; None for other pipelines."""
    if not sampler.is_demo(args.model_name):
        return None
    if (args.height, args.width, args.frames) != (None, None, None):
        raise ValueError("the demo has one size: leave out --height, --width and --frames")
    return sampler.load(args.model_name, steps=args.steps or 12, device=device, dtype=args.dtype)


NAME = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
SCRIPT = Script(__file__, __doc__, pipelines=("WanPipeline",), defaults={"model_name": NAME}, special=demo)

if __name__ == "__main__":
    sys.exit(SCRIPT.main())
