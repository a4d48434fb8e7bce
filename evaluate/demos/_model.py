"""Puts models_dict/demo_wan on the import path: the demo Wan's own code lies beside its weights."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "models_dict" / "demo_wan"))
