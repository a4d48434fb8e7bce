"""Puts ../demos and ../long on the import path, and the demo Wan's own code, which lies beside its weights."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("evaluate/demos", "evaluate/long", "models_dict/demo_wan")
sys.path[:0] = [str(ROOT / folder) for folder in FOLDERS]
