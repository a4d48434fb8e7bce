"""Clips of the demo Wan: drawn frames, latents, and generation by the real WanPipeline.

A clip shows one or two flat shapes that move or bounce over a textured ground in a changing light; the shape that is
named first passes in front. Everything is drawn in batches, so that a training batch takes milliseconds on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from prompts import PALETTE, embed, encode
from torch import Tensor
from torch.nn import functional

DEMO = Path(__file__).resolve().parent
FRAMES, SIZE = 16, 64  # frames of SIZE × SIZE pixels
UNSHUFFLE = 2  # latent = 2 × 2 pixels as channels; with the patch (1, 2, 2) a token is 4 × 4 pixels of one frame
CHANNELS = 3 * UNSHUFFLE**2
MEAN, SCALE = 0.42, 0.25  # latents = (frames − MEAN) / SCALE: about as wide as the noise
SHIFT = 8.0  # of the noise levels: a large flat shape shows through noise in which a detail would be lost
GUIDANCE = 1.0  # of generation: none. More is no better here (training.json), and twice the work


def draw(prompt: str, seed: int) -> Tensor:
    """One clip of a prompt: frames `[FRAMES, SIZE, SIZE, 3]` in 0..1, the same for the same seed."""
    return draw_batch(encode([prompt]), torch.Generator().manual_seed(seed))[0]


def draw_batch(things: Tensor, generator: torch.Generator) -> Tensor:
    """Clips `[n, FRAMES, SIZE, SIZE, 3]` in 0..1 of encoded prompts `[n, 2, 3]`, on the generator's device."""
    device = generator.device
    things = things.to(device)
    centre, radius = _place(things, generator)
    frames = (_ground(len(things), generator)[:, None] + _light(device)).clamp(0, 1)
    palette = torch.tensor(list(PALETTE.values()), device=device)
    at = torch.arange(SIZE, device=device) + 0.5
    for index in (1, 0):  # the first object is drawn last: it passes in front
        x = at - centre[:, index, :, None, None, 0]
        y = at[:, None] - centre[:, index, :, None, None, 1]
        cover = _cover(x, y, radius[:, index, None, None, None], things[:, index, 1, None, None, None])
        cover = torch.where(things[:, index, 0, None, None, None] >= 0, cover, 0.0)[..., None]
        colour = palette[things[:, index, 0].clamp_min(0)][:, None, None, None]
        frames = frames + cover * (colour - frames)
    return frames


def _cover(x: Tensor, y: Tensor, radius: Tensor, shape: Tensor) -> Tensor:
    """Share of each pixel that a shape covers, from the distance to its edge (one pixel of anti-aliasing)."""
    circle = (x**2 + y**2).sqrt() - radius
    square = torch.maximum(x.abs(), y.abs()) - 0.88 * radius
    top = y + 0.93 * radius  # an upright equilateral triangle, its bounding box around the centre
    triangle = torch.maximum(0.75**0.5 * x.abs() - 0.5 * top, y - 0.93 * radius)
    distance = torch.where(shape == 0, circle, torch.where(shape == 1, square, triangle))
    return (0.5 - distance).clamp(0, 1)


def _place(things: Tensor, generator: torch.Generator, tries: int = 8) -> tuple[Tensor, Tensor]:
    """Centres `[n, 2, FRAMES, 2]` (x, y) and radii `[n, 2]` in pixels.

    Of a few random placements the best is taken: one in which the two objects overlap in at most a quarter of the
    frames, so that both can be recognised, and for half of the clips in at least an eighth, so that they do occlude.
    """
    count, device = len(things), generator.device
    radius = 7.5 + 2.5 * torch.rand(count, 1, 2, generator=generator, device=device)
    chance = torch.rand(5, count, tries, 2, generator=generator, device=device)
    centre = _tracks(things[:, None, :, 2], radius, chance)
    apart = (centre[:, :, 0] - centre[:, :, 1]).norm(dim=-1)
    overlap = (apart < 0.9 * radius.sum(-1, keepdim=True)).float().mean(-1)
    least = torch.where(torch.rand(count, 1, generator=generator, device=device) < 0.5, 0.125, 0.0)
    wrong = (overlap - 0.25).clamp_min(0) + (least - overlap).clamp_min(0)
    best = (wrong + 1e-3 * torch.arange(tries, device=device)).argmin(1)  # of equals, the first
    return centre[torch.arange(count, device=device), best], radius[:, 0]


def _tracks(move: Tensor, radius: Tensor, chance: Tensor) -> Tensor:
    """Centres `[n, tries, 2, FRAMES, 2]` of moves `[n, 1, 2]`; `chance` `[5, n, tries, 2]` is uniform in 0..1."""
    near, far = radius + 1, SIZE - radius - 1
    time = torch.arange(FRAMES, device=move.device)
    # Along a straight line, at constant speed, from about the middle towards the edge.
    distance = 20 + 12 * chance[0]
    start = near + (far - near - distance) * (0.7 + 0.3 * chance[1])
    along = start[..., None] + distance[..., None] * time / (FRAMES - 1)
    along = torch.where((move % 2 == 1)[..., None], along, SIZE - along)  # left and up run backwards
    across = (near + (far - near) * chance[2])[..., None].expand_as(along)
    # In parabolas on an invisible floor.
    phase = (time / (7 + 3 * chance[3][..., None]) + chance[4][..., None]) % 1
    height = (16 + 12 * chance[0])[..., None] * 4 * phase * (1 - phase)
    floor = (far - 12 * chance[1])[..., None]
    sideways = (move < 2)[..., None]
    vertical = torch.where((move == 4)[..., None], floor - height, along)
    return torch.stack([torch.where(sideways, along, across), torch.where(sideways, across, vertical)], dim=-1)


def _ground(count: int, generator: torch.Generator) -> Tensor:
    """Grey, slightly tinted grounds `[count, SIZE, SIZE, 3]` with a random, still texture of two scales."""
    device = generator.device
    texture = torch.zeros(count, 1, SIZE, SIZE, device=device)
    for width, strength in ((1.5, 0.025), (4.0, 0.04)):
        reach = int(3 * width)
        kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=device) / width) ** 2)
        kernel = kernel / kernel.norm()  # keeps the variance of white noise
        noise = torch.randn(count, 1, SIZE, SIZE, generator=generator, device=device)
        padded = functional.pad(noise, (reach,) * 4, mode="circular")
        texture += strength * functional.conv2d(
            functional.conv2d(padded, kernel[None, None, None]), kernel[None, None, :, None]
        )
    level = 0.36 + 0.08 * torch.rand(count, 1, 1, 1, generator=generator, device=device)
    tint = 0.04 * (torch.rand(count, 3, 1, 1, generator=generator, device=device) - 0.5)
    return (level + tint + texture).permute(0, 2, 3, 1)


def _light(device: torch.device) -> Tensor:
    """What the light adds to the ground `[FRAMES, SIZE, SIZE, 3]`: brighter to the right, greener below, warmer later.

    It is the same in all clips. It makes the ground less plain, and places a little easier to tell apart.
    """
    time, place = (torch.linspace(-1, 1, size, device=device) for size in (FRAMES, SIZE))
    bright, green, warm = (
        torch.tensor(colour, device=device) for colour in ((0.10, 0.10, 0.10), (-0.04, 0.08, -0.04), (0.08, 0.0, -0.08))
    )
    return place[:, None] * bright + place[:, None, None] * green + time[:, None, None, None] * warm


def to_latents(frames: Tensor) -> Tensor:
    """Frames `[n, F, H, W, 3]` in 0..1 as latents `[n, CHANNELS, F, H / 2, W / 2]`, as Wan lays them out."""
    pixels = ((frames - MEAN) / SCALE).permute(0, 1, 4, 2, 3)
    return functional.pixel_unshuffle(pixels, UNSHUFFLE).transpose(1, 2)


def to_frames(latents: Tensor) -> Tensor:
    """Latents `[n, CHANNELS, F, h, w]` as float32 frames `[n, F, 2 h, 2 w, 3]`, cut to 0..1."""
    pixels = functional.pixel_shuffle(latents.float().transpose(1, 2), UNSHUFFLE).permute(0, 1, 3, 4, 2)
    return (pixels * SCALE + MEAN).clamp(0, 1)


def marks(device: torch.device) -> Tensor:
    """The mean of the noise `[CHANNELS, FRAMES, SIZE / 2, SIZE / 2]`: cosines over time, rows and columns.

    It tells the model where a token stands. Wan's rotary positions are relative, so that in pure noise all places are
    alike to it, while a prompt speaks of places: what moves left is late on the left.
    """
    shape = (FRAMES, SIZE // UNSHUFFLE, SIZE // UNSHUFFLE)
    orders = torch.arange(1, CHANNELS // 3 + 1, device=device)
    waves = []
    for axis, size in enumerate(shape):
        place = (torch.arange(size, device=device) + 0.5) / size
        view = [-1 if other == axis else 1 for other in range(3)]
        waves += [torch.cos(torch.pi * order * place).view(view).expand(shape) for order in orders]
    return torch.stack(waves)


def make_noise(seeds: Sequence[int], device: str | torch.device = "cpu") -> Tensor:
    """Where generation starts, `[n, *marks]`: normal noise around the marks, drawn on the CPU for each of n seeds."""
    mean = marks(torch.device("cpu"))
    drawn = [torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return (torch.stack(drawn) + mean).to(device)


def make_pipeline(transformer: WanTransformer3DModel) -> WanPipeline:
    """diffusers' own pipeline and Wan's scheduler around a transformer, without text encoder and VAE."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_pipeline(
    path: str | Path = DEMO, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> WanPipeline:
    """The `WanPipeline` saved at `path`; its weights are bf16 and computed in `dtype`."""
    pipe = WanPipeline.from_pretrained(path, tokenizer=None, text_encoder=None, vae=None, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def generate(
    pipe: WanPipeline, prompts: Sequence[str], seed: int, steps: int = 12, guidance: float = GUIDANCE
) -> Tensor:
    """Latents `[len(prompts), CHANNELS, FRAMES, SIZE / 2, SIZE / 2]` for prompts, each from its own noise.

    Prompt i starts from the noise of seed + i, drawn on the CPU, whatever the batch and the device.
    """
    embeds = embed(encode(prompts).to(pipe.device))
    side = SIZE // UNSHUFFLE * pipe.vae_scale_factor_spatial  # the pipeline divides by a VAE's factors
    return pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=torch.zeros_like(embeds),  # of NEGATIVE
        height=side,
        width=side,
        num_frames=(FRAMES - 1) * pipe.vae_scale_factor_temporal + 1,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=make_noise([seed + index for index in range(len(prompts))], pipe.device),
        output_type="latent",
    ).frames
