"""Train the demo Wan: a small text-to-video transformer, on clips of moving shapes that the program draws itself.

    python evaluate/training/train_video.py --out out/demo_wan --minutes 8                     # one GPU
    python evaluate/training/train_video.py --out out/second --minutes 8 --resume out/demo_wan # from its weights
    python evaluate/training/train_video.py --out /tmp/demo --tiny --device cpu                # a smoke test, seconds

Flow matching on freshly drawn clips, a share of them without their prompt for classifier-free guidance. `--out` gets
the pipeline (averaged weights, bf16), pictures of generated clips, and `training.json` with the share of generated
clips in which a simple recogniser sees what the prompt says.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _demos  # noqa: F401
import loop
import numpy as np
import torch
from clips import (
    CHANNELS,
    FRAMES,
    SHIFT,
    SIZE,
    draw_batch,
    generate,
    load_pipeline,
    make_pipeline,
    marks,
    to_frames,
    to_latents,
)
from diffusers import WanPipeline, WanTransformer3DModel
from PIL import Image
from prompts import PROMPTS, TEXT_DIM, embed, parse, random_prompts, random_things
from recognise import recognise
from torch import Tensor, nn

from modify_model.cli.pictures import save_animation

DROPPED = 0.12  # share of the prompts that training replaces by the empty one
AVERAGE = 0.998  # per step, of the weights that are saved
SETTINGS = ((12, 1.0), (12, 1.5), (12, 2.0), (12, 3.0), (12, 5.0), (24, 1.0))  # steps and guidance of the evaluation


def make_transformer(tiny: bool) -> WanTransformer3DModel:
    """The demo's architecture: 4,096 tokens for a clip, as 16 frames of 16 × 16 tokens of 4 × 4 pixels."""
    heads, layers = (1, 1) if tiny else (4, 6)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=heads, attention_head_dim=64, in_channels=CHANNELS,
        out_channels=CHANNELS, text_dim=TEXT_DIM, freq_dim=256, ffn_dim=256 * heads, num_layers=layers,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
    )  # fmt: skip
    nn.init.zeros_(transformer.proj_out.weight)
    return transformer


class Batches:
    """Training batches, drawn on the device."""

    def __init__(self, size: int, device: torch.device, seed: int) -> None:
        self.size, self.device = size, device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.mean = marks(device)

    def next(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents `[n, C, F, h, w]`, noise like them, noise levels `[n]` in 0..1, prompts `[n, tokens, dim]`."""
        things = random_things(self.size, self.generator)
        latents = to_latents(draw_batch(things, self.generator)).contiguous()
        dropped = torch.rand(self.size, generator=self.generator, device=self.device) < DROPPED
        embeds = embed(torch.where(dropped[:, None, None], -1, things))
        # As the sampler's steps lie: evenly, then shifted towards noise. One level from each of n equal parts (less
        # variance than n free draws).
        part = torch.rand(self.size, generator=self.generator, device=self.device)
        part = (part + torch.arange(self.size, device=self.device)) / self.size
        level = SHIFT * part / (1 + (SHIFT - 1) * part)
        noise = torch.randn(latents.shape, generator=self.generator, device=self.device) + self.mean
        return latents, noise, level, embeds


class DirectionProbe:
    """Tells whether a model in training uses the direction words, long before its clips can be recognised."""

    def __init__(self, count: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(99)
        things = random_things(count, generator, two=0.0)
        things[:, 0, 2] %= 4  # no bouncing
        opposite = things.clone()
        opposite[:, 0, 2] ^= 1
        self.latents = to_latents(draw_batch(things, generator)).contiguous()
        self.noise = torch.randn(self.latents.shape, generator=generator, device=device) + marks(device)
        self.level = torch.linspace(0.95, 1.0, count, device=device)  # where a clip's layout is decided
        self.embeds, self.opposite = embed(things), embed(opposite)

    @torch.no_grad()
    def gap(self, compute: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> float:
        """By what share the loss of the same noisy clips rises with the opposite words: 0 if they are all one to it."""
        right, wrong = (
            compute(self.latents, self.noise, self.level, words).item() for words in (self.embeds, self.opposite)
        )
        return wrong / right - 1


def flow_loss(transformer: nn.Module) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Mean squared error of the predicted velocity, noise − clip (flow matching, arXiv 2210.02747; 2403.03206)."""

    def loss(latents: Tensor, noise: Tensor, level: Tensor, embeds: Tensor) -> Tensor:
        mixed = torch.lerp(latents, noise, level[:, None, None, None, None])
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=latents.is_cuda):
            guess = transformer(mixed, level * 1000, embeds, return_dict=False)[0]
        return nn.functional.mse_loss(guess.float(), noise - latents)

    return loss


def make_optimizers(transformer: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    matrices = [
        weight for name, weight in transformer.named_parameters() if name.startswith("blocks.") and weight.ndim == 2
    ]
    chosen = set(map(id, matrices))
    others = [weight for weight in transformer.parameters() if id(weight) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=4 * lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


class Trainer:
    """A model in training: its optimizers, the running average of its weights, and what was trained so far."""

    def __init__(self, transformer: WanTransformer3DModel, lr: float, stages: list[dict[str, Any]]) -> None:
        self.transformer, self.stages = transformer, stages
        self.weights = list(transformer.parameters())
        self.average = [weight.detach().clone() for weight in self.weights]
        self.optimizers = make_optimizers(transformer, lr)
        self.highest = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.steps = 0
        loss_of = flow_loss(transformer)
        self.compute = torch.compile(loss_of) if self.weights[0].is_cuda else loss_of

    def step(self, batch: tuple[Tensor, Tensor, Tensor, Tensor], share: float) -> Tensor:
        """One update at a `share` of the time: 2% warm-up, then constant, over the last 60% linearly to zero."""
        factor = min(1.0, share / 0.02 + 0.01, (1 - share) / 0.6)
        loss = self.compute(*batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        for optimizer, lr in zip(self.optimizers, self.highest, strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor
            optimizer.step()
        self.transformer.zero_grad()
        self.steps += 1
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.weights, 1 - min(AVERAGE, self.steps / (self.steps + 9)))
        return loss.detach()

    def save_state(self, path: Path) -> None:
        """Everything that training needs to go on as if it had not stopped, in full precision (about 100 MB)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        state = {"weights": self.transformer.state_dict(), "average": self.average, "optimizers": optimizers}
        torch.save(state | {"steps": self.steps, "stages": self.stages}, path)

    def load_state(self, path: Path) -> None:
        """Put back what `save_state` wrote."""
        state = torch.load(path, map_location=self.weights[0].device, weights_only=True)
        self.transformer.load_state_dict(state["weights"])
        torch._foreach_copy_(self.average, state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.steps, self.stages = state["steps"], state["stages"]

    @torch.no_grad()
    def finish(self) -> WanTransformer3DModel:
        """The model with its averaged weights; training cannot go on after it."""
        torch._foreach_copy_(self.weights, self.average)
        return self.transformer


def train(trainer: Trainer, args: Any, device: torch.device) -> dict[str, Any]:
    """One stage; returns steps, speed and a loss curve."""
    batches, probe = Batches(args.batch, device, args.seed), DirectionProbe(args.batch, device)
    trainer.compute(*batches.next()).backward()  # compiles, outside the time limit
    trainer.transformer.zero_grad()
    probe.gap(trainer.compute)  # compiles too

    def step(share: float) -> Tensor:
        return trainer.step(batches.next(), share)

    def note(loss: float) -> dict[str, float]:
        return {"loss": round(loss, 5), "gap": round(probe.gap(trainer.compute), 4)}

    return loop.train(step, note, args, unit="clips", per_step=args.batch)


def save(transformer: WanTransformer3DModel, out: Path) -> None:
    """The pipeline in bf16, with the modules that diffusers computes in float32 (norms, time embedder) in float32."""
    with tempfile.TemporaryDirectory() as folder:
        transformer.save_pretrained(folder)
        halved = WanTransformer3DModel.from_pretrained(folder, dtype=torch.bfloat16)
    make_pipeline(halved).save_pretrained(out, max_shard_size="15MB")


@torch.inference_mode()
def evaluate(pipe: WanPipeline, count: int, steps: int, guidance: float) -> dict[str, Any]:
    """Share of generated clips in which exactly the prompt's objects, colours, shapes and moves are recognised."""
    result: dict[str, Any] = {"steps": steps, "guidance": guidance}
    for name, objects in (("one", 1), ("two", 2)):
        prompts = random_prompts(count, objects, seed=1)
        clips = [
            to_frames(generate(pipe, prompts[at : at + 32], 1000 + at, steps, guidance)) for at in range(0, count, 32)
        ]
        pairs = [(set(parse(prompt)), recognise(clip)) for prompt, clip in zip(prompts, torch.cat(clips), strict=True)]
        result[name] = {"all": round(sum(want == seen for want, seen in pairs) / count, 3)}
        for place, part in enumerate(("colour", "shape", "move")):
            right = sum(
                {(t.colour, t[place]) for t in want} == {(t.colour, t[place]) for t in seen} for want, seen in pairs
            )
            result[name][part] = round(right / count, 3)
    return result


@torch.inference_mode()
def show(pipe: WanPipeline, out: Path, steps: int, guidance: float) -> None:
    """`samples.png`: a row of frames for each example prompt; `samples.gif`: the same clips, moving."""
    prompts = [*PROMPTS["calibration"], *PROMPTS["unseen"]]
    clips = to_frames(generate(pipe, prompts, 0, steps, guidance)).cpu()
    rows = torch.cat([torch.cat(list(clip[::3]), dim=1) for clip in clips])
    Image.fromarray((rows.numpy() * 255).round().astype(np.uint8)).save(out / "samples.png")
    half = len(clips) // 2
    sheet = torch.cat([torch.cat(list(some), dim=2) for some in (clips[:half], clips[half:])], dim=1)
    large = sheet.repeat_interleave(3, 1).repeat_interleave(3, 2)
    save_animation([Image.fromarray(frame) for frame in (large * 255).round().byte().numpy()], out / "samples.gif")
    for prompt, clip in zip(prompts, clips, strict=True):
        seen = recognise(clip)
        print(f"{'right' if seen == set(parse(prompt)) else 'WRONG'}  {prompt}  |  seen: {sorted(map(str, seen))}")


def main(arguments: list[str] | None = None) -> None:
    """Train, save, reload what was saved, evaluate it, and write `training.json`."""
    parser = loop.parser(__doc__, batch=(32, "clips per step"), lr=1e-3, tiny="3 steps of 2 clips")
    parser.add_argument("--resume", type=Path, help="go on from an --out folder (weights) or a --state file (all)")
    parser.add_argument("--state", type=Path, help="also write weights and optimizers in full precision to this file")
    args = parser.parse_args(arguments)
    if args.tiny:
        args.steps, args.batch = args.steps or 3, 2
    device = loop.begin(args)
    if args.resume is not None and args.resume.is_dir():
        transformer = load_pipeline(args.resume, device).transformer.train()
        trainer = Trainer(transformer, args.lr, loop.read_stages(args.resume))
    else:
        trainer = Trainer(make_transformer(args.tiny).to(device), args.lr, [])
        if args.resume is not None:
            trainer.load_state(args.resume)
    trainer.stages.append(train(trainer, args, device))
    if args.state is not None:
        trainer.save_state(args.state)
    save(trainer.finish(), args.out)

    pipe = load_pipeline(args.out, device, torch.bfloat16)
    count, settings = (2, ((2, 3.0),)) if args.tiny else (64, SETTINGS)
    results: dict[str, Any] = {"clip": {"frames": FRAMES, "size": SIZE}, "recognised": [], "stages": trainer.stages}
    for steps, guidance in settings:
        results["recognised"].append(evaluate(pipe, count, steps, guidance))
        print(json.dumps(results["recognised"][-1]), flush=True)
    loop.write(pipe.transformer, args, ("torch", "diffusers"), results)
    show(pipe, args.out, *settings[0])
    print(f"{trainer.stages[-1]['clips_per_second']} clips/s, {trainer.stages[-1]['steps']} steps")


if __name__ == "__main__":
    main()
