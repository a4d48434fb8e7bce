"""Puts ./training on the import path, where the parts of the scripts that learn masks lie."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "training"))
