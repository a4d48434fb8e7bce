"""Samplers of the shape models: noise levels of a run, and the loop with guidance.

Time runs from σ = 0 (noise) to σ = 1 (data), and the model's input t is σ itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from .condition import Condition, Denoiser

Sampler = Literal["flow", "consistency"]
SAMPLERS = ("flow", "consistency")
_GRID = 1000  # training steps


def flow_sigmas(steps: int, shift: float = 1.0) -> list[float]:
    """Times of a flow-matching Euler run: ``steps`` from 0 to 1, and 1 once more, so that the last step is none.

    ``shift`` s makes s·σ / (1 + (s − 1)·σ) of each time; the published models have 1.
    """
    _check_steps(steps, _GRID)
    times = torch.linspace(0, 1, steps, dtype=torch.float64)
    return [*(shift * times / (1 + (shift - 1) * times)).tolist(), 1.0]


def consistency_sigmas(steps: int, pcm_timesteps: int = 100) -> list[float]:
    """Times of a run of the step-distilled models (turbo), ``steps`` and 1 as the last.

    Of the grid of 1000 times, the first and every (1000 / pcm_timesteps)th are phases; the steps are spread over them.
    """
    if _GRID % pcm_timesteps:
        raise ValueError(f"pcm_timesteps must divide {_GRID}, got {pcm_timesteps}")
    _check_steps(steps, pcm_timesteps)
    phases = [0, *(k * (_GRID // pcm_timesteps) - 1 for k in range(1, pcm_timesteps))]
    return [*(phases[i * pcm_timesteps // steps] / (_GRID - 1) for i in range(steps)), 1.0]


def _check_steps(steps: int, most: int) -> None:
    if not 1 <= steps <= most:
        raise ValueError(f"steps must be from 1 to {most}, got {steps}")


@torch.no_grad()
def sample(
    model: Denoiser,
    condition: Tensor,
    noise: Tensor,
    sigmas: list[float],
    guidance_scale: float | None = 5.0,
    *,
    skip_empty_steps: bool = True,
    reuse_condition: bool = True,
    progress: bool = False,
) -> Tensor:
    """Latents from noise, by Euler steps x ← x + (σ_next − σ)·v in float32.

    Classifier-free guidance takes v = v_u + s·(v_c − v_u), with zeros of the same shape as the unconditional tokens. A
    model that takes the scale as an input (``guidance_embed``) runs once per step, and so does one with scale 1, where
    v = v_c.

    Args:
        model: Hunyuan3DDiT or HunYuanDiTPlain.
        condition: image tokens ``[B, Lc, context_dim]``.
        noise: ``[B, L, 64]``, standard normal.
        sigmas: of :func:`flow_sigmas` or :func:`consistency_sigmas`.
        guidance_scale: s, or None for none.
        skip_empty_steps: leave steps out that go nowhere (from 1 to 1); exact.
        reuse_condition: compute once what depends on the condition alone; exact.
        progress: show a bar.

    Returns:
        ``[B, L, 64]`` in float32.
    """
    embedded = model.guidance_embed
    if embedded and guidance_scale is None:
        raise ValueError("guidance_scale must be a number: this model takes it as an input, got None")
    guided = not embedded and guidance_scale not in (None, 1)
    tokens = torch.cat([condition, torch.zeros_like(condition)]) if guided else condition
    given = {"main": tokens}
    contexts: Mapping[str, Tensor] | Condition = model.prepare(given) if reuse_condition else given
    scale = 1.0 if guidance_scale is None else guidance_scale
    dtype = next(model.parameters()).dtype
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    steps = [(a, b) for a, b in zip(sigmas[:-1], sigmas[1:], strict=True) if a != b or not skip_empty_steps]
    for sigma, following in _bar(steps, progress):
        inputs = torch.cat([x, x]) if guided else x
        t = torch.full((1,), sigma, dtype=x.dtype, device=x.device)
        options = {"guidance": torch.full_like(t, scale)} if embedded else {}
        v = model(inputs.to(dtype), t, contexts, **options).to(x.dtype)
        if guided:
            conditional, unconditional = v.chunk(2)
            v = unconditional + scale * (conditional - unconditional)
        x = x + (following - sigma) * v
    return x


def _bar(steps: list[tuple[float, float]], show: bool) -> Iterable[tuple[float, float]]:
    if not show:
        return steps
    from tqdm import tqdm

    return tqdm(steps, desc="denoising", unit="step")
