"""Puts the folders on the import path that the evaluation on long prompts takes its parts from."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent / name) for name in ("long", "studies", "demos")]
