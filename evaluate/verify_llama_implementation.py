"""Check in five steps that a LLaMA model can be patched, computes what it did before, and can be restored.

    python evaluate/verify_llama_implementation.py
    python evaluate/verify_llama_implementation.py --model_name meta-llama/Llama-3.1-8B --layer_range 16,32
    python evaluate/verify_llama_implementation.py --model_out_path models_dict/demo_llama_tuned.pt

Until thresholds are tuned or loaded, a patched model has to give the bits of the unpatched one: logits and generated
tokens. Then sparse attention is tried: keeping every block it has to agree with dense attention, with low thresholds it
has to leave blocks out; with --model_out_path, the tuned thresholds are compared with dense as well. Exit code 0 only
if all five steps pass; 2: an argument or a file cannot be used.
"""

import sys

from modify_model.cli.language import DEMO, LanguageModel
from modify_model.cli.main import Script

SCRIPT = Script(__file__, __doc__, LanguageModel, {"model_name": str(DEMO)}, command="verify")

if __name__ == "__main__":
    sys.exit(SCRIPT.main())
