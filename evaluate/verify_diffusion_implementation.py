"""Check in five steps that a diffusion pipeline can be patched, computes what it did before, and can be restored.

    python evaluate/verify_diffusion_implementation.py --model_name tiny:Wan              # no download, seconds
    python evaluate/verify_diffusion_implementation.py --model_name THUDM/CogVideoX-2b --frames 17
    python evaluate/verify_diffusion_implementation.py --model_name models_dict/demo_wan --model_out_path out/demo.pt

Until thresholds are tuned or loaded, a patched model has to give the bits of the unpatched one, in one call of the
transformer and in a whole generation. Then sparse attention is tried: keeping every block it has to agree with dense
attention, with low thresholds it has to leave blocks out; with --model_out_path, the tuned thresholds are compared with
dense as well. Exit code 0 only if all five steps pass; 2: an argument or a file cannot be used.
"""

import sys

from wan_example import demo

from modify_model.cli.main import Script

SCRIPT = Script(__file__, __doc__, special=demo, command="verify")

if __name__ == "__main__":
    sys.exit(SCRIPT.main())
