#!/usr/bin/env python
r"""Tune Flux's sparse attention, save the thresholds, load them, generate, compare with dense.

    python evaluate/flux_example.py --tune --compare
    python evaluate/flux_example.py --compare --num_compare 4 --dense_layers 0 1 --out_path out/flux
    python evaluate/flux_example.py --tune --model_name black-forest-labs/FLUX.1-schnell --steps 4
    python evaluate/flux_example.py --tune --compare --model_name tiny:Flux                 # no download, seconds

Exit code 2: an argument, a model or a file cannot be used; 130: interrupted, --resume goes on.
"""

import sys

from _diffusion import main
from _diffusion_models import Example, Size

from modify_model.modify_flux import set_spas_sage_attn_flux

EXAMPLE = Example(
    patch=set_spas_sage_attn_flux,
    pipelines={"FluxPipeline": Size(1024, 1024, None, 28)},
    model_name="black-forest-labs/FLUX.1-dev",
    tiny=("Flux",),
)

if __name__ == "__main__":
    sys.exit(main(EXAMPLE, __file__, __doc__))
