#!/usr/bin/env python
r"""Tune Flux's sparse attention, save the thresholds, load them, generate, compare with dense.

    python evaluate/flux_example.py --tune --compare
    python evaluate/flux_example.py --compare --num_compare 4 --dense_layers 0 1 --out_path out/flux
    python evaluate/flux_example.py --tune --model_name black-forest-labs/FLUX.1-schnell --steps 4
    python evaluate/flux_example.py --tune --compare --model_name tiny:Flux                 # no download, seconds

Exit code 2: an argument, a model or a file cannot be used; 130: interrupted, --resume goes on.
"""

import sys

from modify_model.cli.main import Script

SCRIPT = Script(__file__, __doc__, pipelines=("FluxPipeline",), defaults={"model_name": "black-forest-labs/FLUX.1-dev"})

if __name__ == "__main__":
    sys.exit(SCRIPT.main())
