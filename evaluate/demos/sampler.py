"""The demo Wan as the command runs a pipeline: prompts of a small vocabulary, and latents that are pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import _model  # noqa: F401
import torch
from clips import FRAMES, GUIDANCE, SIZE, generate, load_pipeline, to_frames
from prompts import PROMPTS
from torch import Tensor

from modify_model.cli.arguments import as_dtype, one_line, unreadable, usable_device
from modify_model.cli.diffusion import Sampler, Size


class DemoSampler(Sampler):
    """Runs the demo Wan by prompt and seed.

    Attributes:
        guidance: of classifier-free guidance; 1 is none.
    """

    prompts = (*PROMPTS["calibration"], *PROMPTS["unseen"])

    def __init__(self, pipe: Any, steps: int, guidance: float = GUIDANCE) -> None:
        self.pipe, self.size, self.guidance = pipe, Size(SIZE, SIZE, FRAMES, steps), guidance

    def watch(self, prompt: str, seed: int, steps: int | None = None) -> Tensor:
        return generate(self.pipe, [prompt], seed, steps or self.size.steps, self.guidance)

    def frames(self, prompt: str, seed: int) -> Tensor:
        return self.clips([prompt], seed)[0]

    def clips(self, prompts: list[str], seed: int) -> Tensor:
        """Frames ``[n, F, H, W, 3]`` in 0..1 of prompts, generated together; prompt i from the noise of seed + i."""
        return to_frames(generate(self.pipe, prompts, seed, self.size.steps, self.guidance))


def is_demo(name: str | Path) -> bool:
    """Whether a folder holds a pipeline like the demo's, without a text encoder."""
    try:
        index = json.loads((Path(name) / "model_index.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(index, dict) and index.get("text_encoder") == [None, None]


def load(name: str | Path, *, steps: int = 12, device: str | None = None, dtype: str = "auto") -> DemoSampler:
    """Load the demo model, ready to run; a ValueError says why when it is not there."""
    where = usable_device(device)
    kind: Any = as_dtype(dtype, where, usual=torch.bfloat16)
    if not is_demo(name):
        raise ValueError(f"no demo model in {str(name)!r}: evaluate/training/train_video.py makes one on a GPU")
    try:
        pipe = load_pipeline(name, where, kind)
    except unreadable() as error:
        raise ValueError(f"cannot load the pipeline in folder {str(name)!r}: {one_line(error)}") from error
    if pipe.transformer.config.in_channels != 12:
        raise ValueError(f"the pipeline in {str(name)!r} is not the demo Wan")
    return DemoSampler(pipe, steps)
