#!/usr/bin/env python
r"""Tune a LLaMA model's sparse attention, save the thresholds, load them, generate, compare with dense.

    python evaluate/llama_tune_example.py --tune
    python evaluate/llama_tune_example.py --generate
    python evaluate/llama_tune_example.py --parallel_tune --generate --model_name meta-llama/Llama-3.1-8B-Instruct \
        --model_out_path models_dict/llama_8b.pt --layer_range 2,32 --max_length 8192

Exit code 2: an argument, a model or a file cannot be used; 130: interrupted, --resume goes on.
"""

import sys

from modify_model.cli.language import DEMO, LanguageModel
from modify_model.cli.main import Script

DEFAULTS = {"model_name": str(DEMO), "model_out_path": "models_dict/demo_llama_tuned.pt"}
SCRIPT = Script(__file__, __doc__, LanguageModel, DEFAULTS)

if __name__ == "__main__":
    sys.exit(SCRIPT.main())
