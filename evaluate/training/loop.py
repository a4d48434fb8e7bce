"""What both trainings share: the command line, the loop to a time limit, and training.json."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm


def parser(text: str | None, *, batch: tuple[int, str], lr: float, tiny: str) -> argparse.ArgumentParser:
    """The arguments of both trainings; the numbers are defaults."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--out", type=Path, required=True, help="folder for the model, samples and training.json")
    limits = made.add_mutually_exclusive_group()
    limits.add_argument("--minutes", type=float, default=8.0, help="training time; the learning rate ends with it")
    limits.add_argument("--steps", type=int, help="train this many steps instead")
    add("--batch", type=int, default=batch[0], help=batch[1])
    add("--lr", type=float, default=lr, help="highest learning rate")
    add("--seed", type=int, default=0, help="of the weights and the data")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--tiny", action="store_true", help=f"smoke test: a tiny model, {tiny}")
    return made


def begin(args: argparse.Namespace) -> torch.device:
    """Make the folder, seed the weights, and return the device."""
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    return torch.device(args.device)


def train(
    step: Callable[[float], Tensor],
    note: Callable[[float], dict[str, float]],
    args: argparse.Namespace,
    *,
    unit: str,
    per_step: int,
) -> dict[str, Any]:
    """Train to the time limit (or the number of steps).

    Args:
        step: makes one update at a share of the time, and returns the loss.
        note: what the loss curve says of a mean loss.
        args: of the command line.
        unit, per_step: what a step trains on, and how many of it.

    Returns:
        Steps, speed and the loss curve, for training.json.
    """
    limit = float(args.steps) if args.steps else 60.0 * args.minutes
    curve: list[dict[str, float]] = []
    losses: list[Tensor] = []
    steps, done = 0, 0.0
    began, layout = time.perf_counter(), "{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"
    with tqdm(total=limit, desc="training", bar_format=layout, mininterval=5) as bar:
        while done < limit:
            share = done / limit
            losses.append(step(share))
            steps += 1
            if steps % (1 if args.tiny else 10) == 0:
                mean = torch.stack(losses).mean().item()  # waits for the device: the clock is true
                losses = []
                if not curve or share - curve[-1]["done"] >= 0.025:
                    curve.append({"done": round(share, 3), "step": steps, **note(mean)})
                bar.set_postfix(curve[-1] | {"step": steps, "loss": round(mean, 5)}, refresh=False)
            done = min(limit, float(steps) if args.steps else time.perf_counter() - began)
            bar.update(done - bar.n)
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds, count = time.perf_counter() - began, steps * per_step
    return {
        "steps": steps, "seconds": round(seconds, 1), unit: count, f"{unit}_per_second": round(count / seconds, 1),
        "batch": args.batch, "learning_rate": args.lr, "seed": args.seed, "loss_curve": curve,
    }  # fmt: skip


def read_stages(folder: Path | None) -> list[dict[str, Any]]:
    """The stages of an earlier training, from its folder; none without one."""
    return [] if folder is None else json.loads((folder / "training.json").read_text("utf-8"))["stages"]


def write(model: nn.Module, args: argparse.Namespace, packages: Sequence[str], results: dict[str, Any]) -> None:
    """Write training.json: when, where, with what and how large, and the results."""
    facts = {
        "date": date.today().isoformat(),
        "hardware": torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.machine(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    (args.out / "training.json").write_text(json.dumps(facts | results, indent=2) + "\n", "utf-8")
