"""Attention implementations to choose from: what each needs of the machine, and which calls it does not serve.

Facts about transformers are those of release 5.23; what SDPA takes is torch 2.13's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .checks import DTYPES, HEAD_DIMS
from .features import Features, Vetoes

PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface",
            "flash_attention_4": "flash_attn.cute", "spas_attn": "triton"}  # fmt: skip
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Machine:
    """Where attention runs. One that is not here can be described, and is then not probed.

    Attributes:
        type: of torch's device: "cuda", "cpu", "mps", "xpu" and so on.
        capability: compute capability of a CUDA device.
        name: of the GPU.
        packages: importable ones among the values of ``PACKAGES``.
        rocm: whether torch is built for AMD.
        device: the device when it is here, None for one that is described.
    """

    type: str
    capability: tuple[int, int] | None = None
    name: str = ""
    packages: frozenset[str] = frozenset()
    rocm: bool = False
    device: torch.device | None = None

    @classmethod
    def of(cls, device: torch.device | str) -> Machine:
        """The machine of a torch device."""
        device = torch.device(device)
        found = frozenset(name for name in PACKAGES.values() if _importable(name))
        if device.type != "cuda":
            return cls(device.type, packages=found, device=device)
        capability = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        return cls("cuda", capability, name, found, torch.version.hip is not None, device)

    def __str__(self) -> str:
        known = f" ({self.capability[0]}.{self.capability[1]})" if self.capability else ""
        return f"{self.name or self.type}{known}"


@dataclass(frozen=True)
class Candidate:
    """One implementation.

    Attributes:
        name: "flash_attention_4", "sdpa/cudnn" and so on; before the slash what transformers calls it.
        declines: why it does not serve such calls on such a machine, or None.
    """

    name: str
    declines: Callable[[Machine, Features], str | None]
    sdpa_backend: str | None = field(default=None)

    def refuses(self, machine: Machine, features: Features, vetoes: Vetoes) -> str | None:
        """Why it cannot be chosen, or None."""
        return _vetoed(self.name, vetoes) or _unserved(self.name, features) or self.declines(machine, features)


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _vetoed(name: str, vetoes: Vetoes) -> str | None:
    if name.startswith("sdpa") and not vetoes.sdpa:
        return f"the model does not allow it: {vetoes.owner}._supports_sdpa is False"
    if name.startswith("flash"):
        if vetoes.compatible is not None and name in vetoes.compatible:
            return None  # the model vouches for it
        if not vetoes.flash:
            return f"the model does not allow it: {vetoes.owner}._supports_flash_attn is False"
        if vetoes.compatible is not None:
            return f"the model allows {', '.join(vetoes.compatible)} only (_compatible_flash_implementations)"
    if name == "spas_attn" and not vetoes.interface:
        return f"{vetoes.owner} does not go through AttentionInterface (_supports_attention_backend is False)"
    return None


def _unserved(name: str, features: Features) -> str | None:
    """Features that an implementation does not compute, on any machine."""
    served = {
        "output_attentions": ("eager",),
        "softcap": ("eager", "flash_attention_2", "flash_attention_3", "flash_attention_4"),
        "sinks": ("eager", "flash_attention_3", "flash_attention_4", "spas_attn"),
        "position_bias": ("eager", "sdpa/efficient", "sdpa/math"),
        "dropout": ("eager", "flash_attention_2", "sdpa/flash", "sdpa/efficient", "sdpa/math"),
    }
    said = {
        "output_attentions": "it does not return the probabilities",
        "softcap": "it does not cap logits",
        "sinks": "it knows no learned sinks",
        "position_bias": "it takes no position bias",
        "dropout": "it has no dropout",
    }
    return next((said[key] for key, names in served.items() if getattr(features, key) and name not in names), None)


def _flash(name: str, least: tuple[int, int]) -> Callable[[Machine, Features], str | None]:
    """What the packages of flash attention decline, from a compute capability on."""

    def declines(machine: Machine, features: Features) -> str | None:
        if machine.type != "cuda":
            return f"it needs a CUDA GPU, not {machine.type}"
        if machine.rocm and name != "flash_attention_2":
            return "it is not made for AMD GPUs"
        if not machine.rocm and machine.capability is not None and machine.capability < least:
            return f"it needs compute capability {least[0]}.{least[1]}, this GPU has {'%d.%d' % machine.capability}"  # noqa: UP031
        if PACKAGES[name] not in machine.packages:
            return f"the package {PACKAGES[name]} is not installed"
        if features.dtype not in _HALF:
            return f"it computes in fp16 and bf16, not in {features.dtype}"
        if features.mask in ("full", "additive"):
            return f"it takes no {features.mask} mask"
        if features.compile and name == "flash_attention_4":
            return "torch.compile cannot trace its launcher"
        if features.compile and features.mask == "padding":
            return "leaving padding out depends on data, which breaks the graph of torch.compile"
        if features.deterministic and features.backward and name != "flash_attention_2":
            return "its gradients are not deterministic"
        return _flash_dims(name, machine, features)

    return declines


def _flash_dims(name: str, machine: Machine, features: Features) -> str | None:
    dims = features.qk_dim, features.v_dim
    if max(dims) > 256 or any(dim % 8 for dim in dims):
        return f"head dims must be multiples of 8 up to 256, not {dims[0]} and {dims[1]}"
    if dims[0] != dims[1] and not (name != "flash_attention_2" and dims == (192, 128)):
        return f"it takes no head dims of {dims[0]} for q and k with {dims[1]} for v"
    blackwell = machine.capability is not None and machine.capability[0] == 10
    if name == "flash_attention_4" and blackwell and 128 < dims[1] != 256:
        return f"on Blackwell it serves head dims up to 128, and 256, not {dims[1]}"
    return None


def _sdpa_flash(machine: Machine, features: Features) -> str | None:
    if machine.type == "cpu":
        return None if features.qk_dim == features.v_dim else "q, k and v must have one head dim"
    return _sdpa_half(machine, features, "its flash kernel", 256)


def _sdpa_cudnn(machine: Machine, features: Features) -> str | None:
    if machine.type != "cuda" or machine.rocm:
        return "it needs an NVIDIA GPU"
    if features.deterministic and features.backward:
        return "its gradients are not deterministic"
    largest = 256 if machine.capability is not None and machine.capability >= (9, 0) else 128
    return _sdpa_half(machine, features, "cuDNN", largest)


def _sdpa_half(machine: Machine, features: Features, kernel: str, largest: int) -> str | None:
    if machine.type != "cuda":
        return f"it needs a CUDA GPU, not {machine.type}"
    if machine.capability is not None and machine.capability < (8, 0) and not machine.rocm:
        return "it needs compute capability 8.0"
    if features.dtype not in _HALF:
        return f"it computes in fp16 and bf16, not in {features.dtype}"
    if features.needs_mask is not None:
        return f"{kernel} takes no mask of tokens, needed for {features.needs_mask}"
    dims = features.qk_dim, features.v_dim
    if dims[0] != dims[1] or dims[0] > largest or dims[0] % 8:
        return f"q, k and v must have one head dim, a multiple of 8 up to {largest}, not {dims[0]} and {dims[1]}"
    return None


def _sdpa_efficient(machine: Machine, features: Features) -> str | None:
    if machine.type != "cuda":
        return f"it needs a CUDA GPU, not {machine.type}"
    if features.deterministic and features.backward:
        return "its gradients are not deterministic"
    return None if features.dtype in DTYPES else f"it does not compute in {features.dtype}"


def _spas_attn(machine: Machine, features: Features) -> str | None:
    if machine.type not in ("cpu", "cuda"):
        return f"its sparse kernels run on CUDA GPUs and CPUs, not on {machine.type}"
    if machine.type == "cuda" and PACKAGES["spas_attn"] not in machine.packages:
        return "the package triton is not installed"
    if machine.type == "cuda" and machine.capability is not None and machine.capability < (8, 0):
        return "it needs compute capability 8.0"
    if features.q_len < 128:
        return "fewer queries than a block run dense"
    for name, what in (("backward", "gradients are computed dense"), ("paged", "it takes no paged cache")):
        if getattr(features, name):
            return what
    if features.mask in ("full", "additive"):
        return f"a {features.mask} mask runs dense"
    if features.qk_dim != features.v_dim or not HEAD_DIMS[0] <= features.qk_dim <= HEAD_DIMS[1]:
        return f"it needs one head dim of {HEAD_DIMS[0]} to {HEAD_DIMS[1]}, not {features.qk_dim} and {features.v_dim}"
    return None if features.dtype in DTYPES else f"it does not compute in {features.dtype}"


def _serves(machine: Machine, features: Features) -> str | None:
    return None


CANDIDATES = {
    candidate.name: candidate
    for candidate in (
        Candidate("flash_attention_4", _flash("flash_attention_4", (9, 0))),
        Candidate("flash_attention_3", _flash("flash_attention_3", (8, 0))),
        Candidate("flash_attention_2", _flash("flash_attention_2", (8, 0))),
        Candidate("spas_attn", _spas_attn),
        Candidate("sdpa/cudnn", _sdpa_cudnn, "CUDNN_ATTENTION"),
        Candidate("sdpa/flash", _sdpa_flash, "FLASH_ATTENTION"),
        Candidate("sdpa/efficient", _sdpa_efficient, "EFFICIENT_ATTENTION"),
        Candidate("sdpa/math", _serves, "MATH"),
        Candidate("eager", _serves),
    )
}
