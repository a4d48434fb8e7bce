#!/usr/bin/env python
r"""Make a mesh with a Hunyuan3D shape model; tune its attention; compare fast ways of computing it with the plain one.

    python evaluate/hunyuan3d_example.py --compare --model_path tiny:2.0 --resolution 48 --steps 6   # random: seconds
    python evaluate/hunyuan3d_example.py --tune --compare --model_path tiny:2.0 --resolution 48 --steps 6
    python evaluate/hunyuan3d_example.py --model_path tencent/Hunyuan3D-2/hunyuan3d-dit-v2-0 --image cup.png
    python evaluate/hunyuan3d_example.py --compare --model_path hunyuan3d-dit-v2.safetensors --image cup.png

Weights are the user's own, on this machine (a file, a folder, or a place below HY3DGEN_MODELS); they stand under a
licence of their own, see docs/hunyuan3d.md. Exit code 2: an argument, a model or a file cannot be used.
"""

import sys

from modify_model.cli.shapes import main

if __name__ == "__main__":
    sys.exit(main(__file__, __doc__))
