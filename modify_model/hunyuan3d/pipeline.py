"""ShapePipeline: denoiser, sampler and volume decoder together, from weights that the user has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .condition import Denoiser
from .mesh import Mesh, mesh_of
from .samplers import SAMPLERS, Sampler, consistency_sigmas, flow_sigmas, sample
from .vae import ShapeVAE
from .variants import denoiser_options, published, split_modules, vae_options
from .volume import KeySelection, decode_volume

MODELS_SWITCH, MODELS_DEFAULT = "HY3DGEN_MODELS", "~/.cache/hy3dgen"
FILES = ("model.fp16.safetensors", "model.safetensors", "model.fp16.ckpt", "model.ckpt")


@dataclass
class ShapePipeline:
    """All that makes a shape of image tokens.

    Attributes:
        model: Hunyuan3DDiT or HunYuanDiTPlain; what ``patch(pipeline)`` patches.
        vae: the decoder.
        num_latents: latents of a shape.
        sampler: "flow", or "consistency" for the step-distilled models (turbo).
        conditioner: makes tokens of pictures, where the file has one (:mod:`.conditioner`).
    """

    model: Denoiser
    vae: ShapeVAE
    num_latents: int
    sampler: Sampler = "flow"
    conditioner: nn.Module | None = None

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.model.parameters()).device

    def sigmas(self, steps: int) -> list[float]:
        """Times of a run."""
        return flow_sigmas(steps) if self.sampler == "flow" else consistency_sigmas(steps)

    def latents(
        self, condition: Tensor, steps: int = 50, guidance_scale: float | None = 5.0, seed: int = 0, **options: Any
    ) -> Tensor:
        """Latents ``[B, num_latents, 64]`` of image tokens ``[B, Lc, context_dim]``; options of :func:`.sample`."""
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same noise on every device
        shape = len(condition), self.num_latents, self.vae.embed_dim
        noise = torch.randn(shape, generator=generator).to(self.device)
        return sample(self.model, condition.to(self.device), noise, self.sigmas(steps), guidance_scale, **options)

    def volume(self, latents: Tensor, resolution: int = 384, **options: Any) -> Tensor:
        """The field ``[B, n, n, n]``; options of :func:`.decode_volume`."""
        return decode_volume(self.vae, latents, resolution, **options)

    def mesh(self, condition: Tensor, resolution: int = 384, selection: KeySelection | None = None, **run: Any) -> Mesh:
        """The mesh of one shape, from image tokens ``[1, Lc, context_dim]``; ``run`` as of :meth:`latents`."""
        show = bool(run.get("progress"))
        return mesh_of(self.volume(self.latents(condition, **run), resolution, selection=selection, progress=show)[0])


def load(
    path: str | Path,
    *,
    vae_path: str | Path | None = None,
    sampler: Sampler | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    engine: str | None = None,
) -> ShapePipeline:
    """Load a shape model from weights that are on this machine; nothing is downloaded.

    Args:
        path: a file (safetensors, or a checkpoint read with ``weights_only``), a folder with ``model*.safetensors``,
            or ``<repository>/<subfolder>`` below the folder of ``HY3DGEN_MODELS`` (default ``~/.cache/hy3dgen``).
            Class and sizes are read off the names and shapes; key names of ComfyUI's files are known too.
        vae_path: the VAE's own file, where the first has none.
        sampler: "flow" or "consistency"; None takes what ``config.yaml`` beside the file says, else "consistency" where
            the path says "turbo".
        device, dtype: of the weights.
        engine: of the attention, see :class:`Hunyuan3DDiT`.

    Raises:
        ValueError: when there are no such weights, or they do not fit; the message says why.
        ImportError: for the engine "sage" without its package.
    """
    if sampler not in (None, *SAMPLERS):
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)} or None, got {sampler!r}")
    file = find_weights(path)
    parts = split_modules(read_weights(file))
    if "model" not in parts:
        raise ValueError(f"{str(file)!r} holds no denoiser")
    if "vae" not in parts:
        if vae_path is None:
            raise ValueError(f"{str(file)!r} holds no VAE: give its own file (vae_path)")
        parts["vae"] = split_modules(read_weights(find_weights(vae_path))).get("vae", {})
    kind, options = denoiser_options(parts["model"])
    facts = published(kind, options)
    model = kind(**options, engine=engine)
    _load(model, parts["model"], str(file), strict=True)
    vae = ShapeVAE(facts.num_latents, scale_factor=facts.scale_factor, engine=engine, **vae_options(parts["vae"]))
    _load(vae, parts["vae"], str(vae_path or file), strict=False)
    conditioner = None
    if "conditioner" in parts:
        from .conditioner import conditioner_of

        conditioner = conditioner_of(parts["conditioner"])
    for part in (model, vae, *([conditioner] if conditioner else [])):
        part.to(device=device, dtype=dtype).eval().requires_grad_(False)
    return ShapePipeline(model, vae, facts.num_latents, sampler or _sampler_beside(file), conditioner)


def find_weights(path: str | Path) -> Path:
    """The file of weights that a path means; a ValueError when there is none."""
    root = Path(os.environ.get(MODELS_SWITCH, MODELS_DEFAULT)).expanduser()
    places = [Path(path), root / path]
    for place in places:
        if place.is_file():
            return place
        for name in FILES:
            if (place / name).is_file():
                return place / name
    tried = " and ".join(repr(str(place)) for place in places)
    raise ValueError(f"no weights found at {tried}: neither a file nor a folder with {', '.join(FILES)}")


def read_weights(file: Path) -> Mapping[str, Any]:
    """The tensors of a file, as they lie in it; a ValueError when it cannot be read."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"cannot read the weights in {str(file)!r}: {error}") from error


def _load(module: nn.Module, state: Mapping[str, Tensor], where: str, strict: bool) -> None:
    """Load weights; the VAE's encoder may be there, what the decoder needs must be."""
    try:
        found = module.load_state_dict(state, strict=strict)
    except RuntimeError as error:
        raise ValueError(f"the weights in {where!r} do not fit {type(module).__name__}: {error}") from error
    unknown = [key for key in found.unexpected_keys if not key.startswith(("encoder.", "pre_kl."))]
    if found.missing_keys or unknown:
        some = ", ".join([*found.missing_keys[:3], *unknown[:3]])
        raise ValueError(
            f"the weights in {where!r} are not of this {type(module).__name__}: {len(found.missing_keys)} are missing "
            f"and {len(unknown)} unknown ({some})"
        )


def _sampler_beside(file: Path) -> Sampler:
    config = file.with_name("config.yaml")
    text = config.read_text("utf-8", errors="replace") if config.is_file() else ""
    if "FlowMatchEuler" in text:
        return "consistency" if "ConsistencyFlowMatchEuler" in text else "flow"
    return "consistency" if "turbo" in str(file).lower() else "flow"
