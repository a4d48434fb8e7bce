"""The command of shape models: make meshes, tune the denoiser, and compare ways of computing one shape."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import autotune
from autotune import report
from autotune.tuned import check_bounds
from modify_model import patch
from modify_model.hunyuan3d.attention import ENGINES
from modify_model.hunyuan3d.mesh import SUFFIXES, mesh_of
from modify_model.hunyuan3d.pipeline import find_weights, load
from modify_model.hunyuan3d.samplers import SAMPLERS
from modify_model.hunyuan3d.tiny import CONTEXT, NAMES, TOKENS, tiny
from modify_model.hunyuan3d.volume import KeySelection

from . import shape_pictures
from .arguments import DTYPES, Help, as_dtype, check_output, one_line, sparse_backend, tail_bound, usable_device, whole
from .driver import tune
from .main import Parser
from .parallel import guarded
from .tiny import PREFIX

NEEDS = ("tqdm", "safetensors", "skimage", "trimesh", "matplotlib", "PIL")
# How a shape is computed, for a comparison: savings, tuned thresholds, and the decoder's keys.
PLAIN, EXACT, SPARSE, KEYS = "plain", "exact savings", "tuned denoiser", "selected keys"


class ShapeRun:
    """A pipeline and what it is run on; what a calibration calls (see :func:`.driver.tune`)."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        device = usable_device(args.device)
        dtype: Any = as_dtype(args.dtype, device, usual=torch.bfloat16)
        if args.model_path.startswith(PREFIX):
            self.pipe = tiny(args.model_path.removeprefix(PREFIX), args.engine)
            for part in (self.pipe.model, self.pipe.vae):
                part.to(device=device, dtype=dtype)
        else:
            options = dict(vae_path=args.vae_path, sampler=args.sampler, engine=args.engine)
            self.pipe = load(args.model_path, device=device, dtype=dtype, **options)
        self.model = self.pipe.model
        self.steps = args.steps or (8 if self.pipe.sampler == "consistency" else 50)

    def conditions(self) -> list[Tensor]:
        """Image tokens ``[1, Lc, context_dim]`` of every input; random ones for a tiny model without a picture."""
        if self.args.image:
            if self.pipe.conditioner is None:
                raise ValueError("--image needs an image encoder, and the weights hold none (conditioner.*)")
            return [self.pipe.conditioner(_picture(path)) for path in self.args.image]
        if not self.args.model_path.startswith(PREFIX):
            raise ValueError("--image is needed: a picture of the thing on a plain or transparent ground")
        generator = torch.Generator().manual_seed(self.args.seed)
        count = self.args.num_tune_samples if self.args.tune else 1
        return [torch.randn(1, TOKENS, CONTEXT, generator=generator) for _ in range(count)]

    def observe(self, item: tuple[Tensor, int, int]) -> None:
        """One denoising run, for a calibration."""
        condition, seed, steps = item
        self.pipe.latents(condition, steps, self.args.guidance_scale, seed)

    def latents(self, condition: Tensor, *, plain: bool = False) -> Tensor:
        """Latents of a shape; ``plain`` without any saving."""
        model = self.model
        model.merge_constant = not plain
        off: dict[str, Any] = dict(skip_empty_steps=False, reuse_condition=False) if plain else {}
        options: dict[str, Any] = dict(steps=self.steps, guidance_scale=self.args.guidance_scale, seed=self.args.seed)
        return self.pipe.latents(condition, progress=True, **options, **off)

    def volume(self, latents: Tensor, selection: KeySelection | None = None) -> Tensor:
        """The field ``[n, n, n]`` of a shape."""
        return self.pipe.volume(latents, self.args.resolution, selection=selection, progress=True)[0]


def parser(file: str, text: str | None) -> Parser:
    """The options of the script."""
    made = Parser(prog=Path(file).name, description=text, formatter_class=Help)
    add: Any = made.add_argument
    n: dict[str, Any] = dict(metavar="N")
    add("--tune", action="store_true", help="calibrate sparse attention of the denoiser, and save the thresholds")
    add("--compare", action="store_true", help="plain beside fast: times, errors, meshes and a picture")
    tinies = ", ".join(PREFIX + name for name in NAMES)
    add("--model_path", required=True, help=f"weights on this machine, or one of {tinies} (random)", metavar="PATH")
    add("--vae_path", help="the VAE's own file, where the model's has none", metavar="PATH")
    add("--image", nargs="+", help="pictures, each of one thing", metavar="FILE", default=[])
    add("--model_out_path", help="the tuned file (left out: out/hunyuan3d/tuned.pt)", metavar="FILE")
    add("--out_path", default="out/hunyuan3d", help="folder for meshes and pictures", metavar="FOLDER")
    add("--format", choices=[suffix[1:] for suffix in SUFFIXES], default="glb", help="of meshes")
    add("--steps", type=whole(1, 1000), help="of denoising (left out: 50, for turbo 8)", **n)
    add("--guidance_scale", type=float, default=5.0, help="of classifier-free or embedded guidance", metavar="S")
    add("--sampler", choices=SAMPLERS, help="left out: as config.yaml says, or turbo in the path")
    add("--resolution", type=whole(4, 1024), default=256, help="of the volume, cells along an axis", **n)
    add("--cells", type=whole(1, 64), default=4, help="cells of key selection along an axis", **n)
    add("--keep", type=whole(1), help="keys of a cell to keep (left out: as published, a third or so)", **n)
    add("--engine", choices=ENGINES, help="of exact attention; sage and int8 are 8 bits (left out: USE_SAGEATTN)")
    add("--l1", type=float, default=0.06, help="bound of the mean error of selection, per head")
    add("--pv_l1", type=float, default=0.07, help="bound of the mean error of everything, per head")
    add("--tail", type=tail_bound, default=0.5, help="bound of a query's error at the 99.5th percentile, or 'none'")
    add("--num_tune_samples", type=whole(2, 1000), default=3, help="runs to tune on, for a tiny model", **n)
    add("--seed", type=whole(0), default=0, help="of noise", **n)
    add("--device", help="cuda, cpu, … (left out: the GPU if there is one)")
    add("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16, and float32 on a CPU")
    return made


def check(args: argparse.Namespace) -> None:
    """Reject, before a model is loaded, what is known to be wrong; a ValueError says why."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"packages that this needs are not installed ({', '.join(missing)}): pip install 'spas-attn[shapes]'"
        )
    if args.model_path.startswith(PREFIX):
        if args.model_path.removeprefix(PREFIX) not in NAMES:
            raise ValueError(f"--model_path: a tiny model is one of {', '.join(NAMES)}, got {args.model_path!r}")
        if args.image or args.vae_path:
            raise ValueError("a tiny model takes no --image and no --vae_path")
    else:
        find_weights(args.model_path)
    usable_device(args.device)
    check_output("out_path", args.out_path, folder=True)
    args.tuned = Path(args.model_out_path or "out/hunyuan3d/tuned.pt")
    if args.tune:
        check_bounds(args.l1, args.pv_l1, args.tail)
        check_output("model_out_path", str(args.tuned))
    elif args.model_out_path and not args.tuned.is_file():
        raise ValueError(f"there is no tuned file {args.model_out_path!r}: run with --tune first")


def run(args: argparse.Namespace) -> int:
    """Run a checked command line; returns the exit code."""
    subject = ShapeRun(args)
    conditions = subject.conditions()
    if args.tune:
        _tune(subject, conditions)
    if args.compare:
        for index, condition in enumerate(conditions[:1] if not args.image else conditions):
            _compare(subject, condition, Path(args.out_path), str(index))
    elif not args.tune:
        for index, condition in enumerate(conditions):
            mesh = mesh_of(subject.volume(subject.latents(condition)))
            print("written:", mesh.save(Path(args.out_path) / f"shape_{index}.{args.format}"))
    return 0


def _tune(subject: ShapeRun, conditions: Sequence[Tensor]) -> None:
    args = subject.args
    if len(conditions) < 2:
        raise ValueError("--tune needs two or more --image: one of them is kept aside for the check")
    patch(subject.pipe, l1=args.l1, pv_l1=args.pv_l1, tail=args.tail, backend=sparse_backend(subject.pipe.device))
    items = [(condition, args.seed + index, subject.steps) for index, condition in enumerate(conditions)]
    options = dict(every=max(1, subject.steps // 10), seed=args.seed)
    calibration = tune(subject, items, hint="see --steps", **options)
    args.tuned.parent.mkdir(parents=True, exist_ok=True)
    statistics = calibration.save(str(args.tuned))
    print(report.table(calibration.statistics))
    print(f"thresholds: {args.tuned}\nstatistics: {statistics}\npage: {report.page_path(args.tuned)}")


def _ways(subject: ShapeRun) -> dict[str, Callable[[Tensor], tuple[Tensor, KeySelection | None]]]:
    """The ways of a comparison, by name: from image tokens to latents, and how these are decoded."""
    args = subject.args
    selection = KeySelection(args.cells, keep=args.keep)
    ways: dict[str, Any] = {
        PLAIN: lambda condition: (subject.latents(condition, plain=True), None),
        EXACT: lambda condition: (subject.latents(condition), None),
        KEYS: lambda condition: (subject.latents(condition), selection),
    }
    if args.tuned.is_file() and (args.tune or args.model_out_path):
        if not args.tune:
            patch(subject.pipe, backend=sparse_backend(subject.pipe.device))
            autotune.load_sparse_attention_state_dict(subject.model, autotune.load(str(args.tuned)))

        def sparse(condition: Tensor) -> tuple[Tensor, None]:
            return subject.latents(condition), None

        ways[SPARSE] = sparse
    return ways


def _compare(subject: ShapeRun, condition: Tensor, folder: Path, name: str) -> None:
    """Compute one shape in several ways; print a table, write meshes, a picture and the numbers."""
    volumes: dict[str, Tensor] = {}
    latents: dict[str, Tensor] = {}
    rows: dict[str, dict[str, Any]] = {}
    for way, make in _ways(subject).items():
        begin = time.perf_counter()
        with _dense_unless(subject, way == SPARSE):
            latents[way], selection = make(condition)
        latents[way] = latents[way].cpu()
        middle = time.perf_counter()
        volumes[way] = subject.volume(latents[way].to(subject.pipe.device), selection).cpu()
        rows[way] = {
            "denoising s": round(middle - begin, 3),
            "decoding s": round(time.perf_counter() - middle, 3),
            "latents error": _error(latents[way], latents[PLAIN]),
            "field error": _error(volumes[way], volumes[PLAIN]),
            "other side": float(((volumes[way] > 0) != (volumes[PLAIN] > 0)).float().mean()),
        }
        rows[way]["mesh"] = _save(volumes[way], folder / f"{name}_{way.replace(' ', '_')}.{subject.args.format}")
    print(table(rows))
    picture = shape_pictures.write(volumes, folder / f"{name}_compare.png")
    numbers = folder / f"{name}_compare.json"
    facts = {"model": subject.args.model_path, "steps": subject.steps, "resolution": subject.args.resolution}
    numbers.write_text(json.dumps({**facts, "ways": rows}, indent=1) + "\n", "utf-8")
    print("written:", picture, numbers, *(row["mesh"] for row in rows.values() if row["mesh"]))


def _save(volume: Tensor, path: Path) -> str | None:
    try:
        return str(mesh_of(volume).save(path))
    except ValueError as error:
        print(f"note: no mesh {path.name}: {one_line(error)}", file=sys.stderr)
        return None


def _dense_unless(subject: ShapeRun, sparse: bool) -> Any:
    patched = any(isinstance(module, autotune.SparseAttention) for module in subject.model.modules())
    return autotune.dense(subject.model) if patched and not sparse else contextlib.nullcontext()


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Times and errors of the ways, a line each; errors are against the plain computation."""
    columns = [name for name in next(iter(rows.values())) if name != "mesh"]
    lines = [f"{'':16}" + "".join(f"{name:>16}" for name in columns)]
    for way, row in rows.items():
        cells = [f"{row[name]:.3f}" if name.endswith(" s") else f"{row[name]:.2e}" for name in columns]
        lines.append(f"{way:16}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def _picture(path: str) -> Tensor:
    """``[1, 4, h, w]`` in 0..1 of a file."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGBA"))).permute(2, 0, 1)[None].float() / 255
    except OSError as error:
        raise ValueError(f"cannot read the picture {path!r}: {one_line(error)}") from error


def main(file: str, text: str | None, arguments: Sequence[str] | None = None) -> int:
    """Run the command line of a script; returns the exit code."""
    made = parser(file, text)
    args = made.parse_args(list(sys.argv[1:] if arguments is None else arguments))

    def work() -> int:
        check(args)
        return run(args)

    return guarded(made.prog, work)
