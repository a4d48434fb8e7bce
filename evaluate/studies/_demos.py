"""Puts ../demos on the import path, and the demo Wan's own code, which lies beside its weights."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "evaluate" / "demos"), str(ROOT / "models_dict" / "demo_wan")]
