"""Puts ../demos, ../long, ../training and the folder of the demo Wan, whose own code lies there, on the import path."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("evaluate/demos", "evaluate/long", "evaluate/training", "models_dict/demo_wan")
sys.path[:0] = [str(ROOT / folder) for folder in FOLDERS]
