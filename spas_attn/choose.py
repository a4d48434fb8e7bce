"""choose_attention: which attention implementation is best for a model here, why, and why not the others."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cost_model
from .attention import sparse_attention
from .candidates import CANDIDATES, PACKAGES, Candidate, Machine
from .features import Features, Vetoes, features_of, of_weights, vetoes_of
from .selectors import TopK

ALLOWED = ("sparse", "quantised")
# Where nothing was measured: sparse prefill is reported to gain from 16K to 32K tokens on, in every method's issues.
SPARSE_FROM = 16384
# Thousand million pairs of queries and keys below which SDPA beats flash-attn-4 by its shorter start (H200, torch 2.11,
# flash-attn-4 4.0.0b36, head dim 128, cost_model.json).
SHORT = 0.4
_PROBED_LENGTH = 256


@dataclass(frozen=True)
class Choice:
    """The implementation that was chosen; ``print`` shows why.

    Attributes:
        name: "flash_attention_4", "flash_attention_3", "flash_attention_2", "spas_attn", "sdpa/cudnn", "sdpa/flash",
            "sdpa/efficient", "sdpa/math" or "eager".
        reason: why.
        declined: why not the others, by name.
        machine, features: what it was chosen for.
        precision: of "spas_attn": what it computes in.
        probed: whether a small call was run here.
    """

    name: str
    reason: str
    machine: Machine
    features: Features
    declined: dict[str, str] = field(default_factory=dict)
    precision: str = "native"
    probed: bool = False

    @property
    def attn_implementation(self) -> str:
        """What transformers' ``set_attn_implementation`` takes."""
        return self.name.split("/")[0]

    @property
    def sdpa_backend(self) -> str | None:
        """The member of ``torch.nn.attention.SDPBackend`` for ``sdpa_kernel``, None for others than SDPA."""
        return CANDIDATES[self.name].sdpa_backend

    @property
    def exact(self) -> bool:
        """Whether nothing is dropped or quantised."""
        return self.name != "spas_attn"

    def __str__(self) -> str:
        tried = "a small call ran" if self.probed else "not tried here"
        lines = [f"attention {self.name} on {self.machine}: {self.reason} ({tried})"]
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in self.declined.items()])


def choose_attention(
    model_or_config: Any = None,
    device: torch.device | str | Machine | None = None,
    features: Features | Mapping[str, Any] | None = None,
    *,
    allow: Collection[str] = (),
    probe: bool = True,
) -> Choice:
    """Choose the fastest attention implementation that computes what a model's calls demand.

    Only exact ones are chosen unless others are allowed. The order follows the cost model where the GPU, or one like
    it, was measured, and what is known of architectures elsewhere. The first that serves the calls is tried with a
    small call on the device and passed over when that fails or is not finite. Decisions are kept per signature
    (:func:`forget`); nothing is changed in the model.

    Args:
        model_or_config: a model (its class's ``_supports_*`` and ``_compatible_flash_implementations`` are vetoes) or a
            config of transformers, or anything with such attributes; None where ``features`` says everything.
        device: a torch device, or a :class:`~spas_attn.candidates.Machine` that is not here; by default the model's
            device, else the GPU if there is one.
        features: what the calls demand, a :class:`~spas_attn.features.Features`, or some of its fields by name, which
            take the place of what the config tells.
        allow: "sparse" and "quantised" admit this library's kernels where they are faster.
        probe: try the choice with a small call, where the device is here.

    Raises:
        ValueError, TypeError: on bad arguments, naming them.
    """
    unknown = sorted(set(allow) - set(ALLOWED)) if not isinstance(allow, str) else [allow]
    if unknown:
        raise ValueError(f"allow must hold some of {ALLOWED}, got {unknown}")
    config = getattr(model_or_config, "config", model_or_config)
    if not isinstance(features, Features):
        told = {} if config is None else features_of(config)
        if isinstance(model_or_config, torch.nn.Module):
            told |= of_weights(model_or_config)
        given = dict(features or {})
        wrong = sorted(given.keys() - {f.name for f in dataclasses.fields(Features)})
        if wrong:
            raise ValueError(f"features must be fields of Features, got {wrong}")
        features = Features(**(told | given))
    if device is None:
        weights = next(model_or_config.parameters(), None) if isinstance(model_or_config, torch.nn.Module) else None
        device = weights.device if weights is not None else "cuda" if torch.cuda.is_available() else "cpu"
    machine = device if isinstance(device, Machine) else Machine.of(device)
    return _decide(machine, features, vetoes_of(model_or_config), frozenset(allow), probe)


def forget() -> None:
    """Decide anew at the next call: packages were installed, or the cost model changed."""
    _decide.cache_clear()


@functools.cache
def _decide(machine: Machine, features: Features, vetoes: Vetoes, allow: frozenset[str], probe: bool) -> Choice:
    order, why, precision = _order(machine, features, allow)
    declined: dict[str, str] = {}
    chosen: Candidate | None = None
    for name in order:
        candidate = CANDIDATES[name]
        refusal = candidate.refuses(machine, features, vetoes) or _not_allowed(name, machine, features, allow, why)
        if refusal is None and chosen is None and probe and machine.device is not None:
            refusal = _try(candidate, machine.device, features)
        if refusal is not None:
            declined[name] = refusal
        elif chosen is None:
            chosen = candidate
        else:
            declined[name] = f"it would serve; {chosen.name} comes before it here"
    assert chosen is not None  # eager declines nothing
    reason = (
        "probabilities are asked for" if features.output_attentions else why.get(chosen.name, _REASONS[chosen.name])
    )
    probed = probe and machine.device is not None and chosen.name != "eager"
    return Choice(chosen.name, reason, machine, features, declined, precision, probed)


_REASONS = {
    "flash_attention_4": "the fastest exact kernel of Hopper and Blackwell",
    "flash_attention_3": "the fastest exact kernel of Hopper after flash-attn-4",
    "flash_attention_2": "an exact fused kernel that serves these calls",
    "spas_attn": "it drops blocks, which is allowed",
    "sdpa/cudnn": "an exact fused kernel within torch",
    "sdpa/flash": "an exact fused kernel within torch",
    "sdpa/efficient": "a fused kernel that takes masks",
    "sdpa/math": "nothing fused serves these calls",
    "eager": "nothing else serves these calls",
}


def _order(machine: Machine, features: Features, allow: frozenset[str]) -> tuple[list[str], dict[str, str], str]:
    """Names, the preferred first; reasons that are special to this machine; the precision of "spas_attn"."""
    hopper = machine.capability is not None and machine.capability >= (9, 0) and not machine.rocm
    packages = ["flash_attention_4", "flash_attention_3"]
    fused = ["sdpa/cudnn", "flash_attention_2", "sdpa/flash"] if hopper else ["sdpa/flash", "sdpa/cudnn"]
    packages += [] if hopper else ["flash_attention_2"]
    work = cost_model.Work.of(features.batch * features.heads, features.q_len, features.keys)
    why: dict[str, str] = {}
    dense, sparse, source = _measured(machine, features, allow)
    if dense.get("sdpa", 0.0) > dense.get("flash", float("inf")):
        numbers = f"{dense['flash']:.2f} ms, SDPA {dense['sdpa']:.2f} ms"
        why["flash_attention_4"] = f"the fastest measured: {numbers}; {source}"
        order = packages + fused
    elif machine.type == "cuda" and (dense or work.pairs < SHORT):
        short = "the calls are short, and it starts faster than the packages of flash attention"
        why |= dict.fromkeys(("sdpa/cudnn", "sdpa/flash"), f"{short}; {source}" if source else short)
        order = fused + packages
    else:
        order = packages + fused
    order += ["sdpa/efficient", "sdpa/math"]
    precision = "native"
    if sparse:
        precision = min(sparse, key=lambda name: sparse[name])
        best = min(dense.values())
        said = f"{sparse[precision]:.2f} ms expected, dense {best:.2f} ms; {source}"
        why["spas_attn"] = f"it is faster: {said}" if sparse[precision] < best else f"it is not faster: {said}"
        first = sparse[precision] < best
    else:
        first = bool(allow) and "sparse" in allow and features.keys >= SPARSE_FROM
    return (["spas_attn"] if first else []) + order + ([] if first else ["spas_attn"]) + ["eager"], why, precision


def _measured(
    machine: Machine, features: Features, allow: frozenset[str]
) -> tuple[dict[str, float], dict[str, float], str]:
    """Expected milliseconds of dense kernels by name, of allowed sparse ones by precision, and where they are from."""
    half = features.dtype in (torch.float16, torch.bfloat16)
    if machine.capability is None or not half:
        return {}, {}, ""
    near = cost_model.nearest(cost_model.rows(), machine.name, machine.capability, features.qk_dim, features.causal)
    if near is None:
        return {}, {}, ""
    row, note = near
    work = cost_model.Work.of(features.batch * features.heads, features.q_len, features.keys)
    dense = {name: line(work) for name, line in row.dense.items()}
    density = features.density if "sparse" in allow else 1.0
    select = row.select(work) if "sparse" in allow else 0.0
    sparse = {}
    for name, line in row.sparse.items():
        precision = name.split("/")[1]
        if name.startswith("triton") and ("quantised" in allow if precision != "native" else "sparse" in allow):
            sparse[precision] = select + line(work, density)
    return dense, sparse, f"{row}{note}"


def _not_allowed(
    name: str, machine: Machine, features: Features, allow: frozenset[str], why: Mapping[str, str]
) -> str | None:
    """Why this library's kernels are not chosen although they would serve."""
    if name != "spas_attn":
        return None
    if not allow:
        return "it drops blocks or quantises: allow=('sparse',) or ('quantised',) admits it"
    if name in why:
        return why[name] if why[name].startswith("it is not faster") else None
    if "sparse" not in allow:
        return "nothing is measured of its quantised kernels on a machine like this (python -m spas_attn.measure)"
    if features.keys < SPARSE_FROM:
        return f"nothing is measured here, and below {SPARSE_FROM} keys no gain is expected"
    return None


def _try(candidate: Candidate, device: torch.device, features: Features) -> str | None:
    """Run a small call; why it cannot be used, or None. What a kernel cannot do shows in exceptions of many kinds."""
    if candidate.name == "eager":
        return None
    length = min(features.q_len, _PROBED_LENGTH)
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, dim: int) -> Tensor:
        x = torch.randn(1, heads, length, dim, generator=generator)
        return x.to(device, features.dtype).requires_grad_(features.backward)

    group = features.heads // features.kv_heads
    q, k, v = draw(group, features.qk_dim), draw(1, features.qk_dim), draw(1, features.v_dim)
    try:
        with torch.autocast(device.type, enabled=False):
            out = _call(candidate, q, k, v, features)
            if features.backward:
                out.float().sum().backward()
        return None if bool(out.isfinite().all()) else "a small call on this device gave values that are not finite"
    except (RuntimeError, ImportError, ValueError, TypeError, AttributeError, AssertionError, OSError) as error:
        return f"a small call on this device failed: {' '.join(str(error).split())[:200] or type(error).__name__}"


def _call(candidate: Candidate, q: Tensor, k: Tensor, v: Tensor, features: Features) -> Tensor:
    causal = features.causal and q.shape[2] > 1
    if candidate.sdpa_backend is not None:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        mask = None
        if features.needs_mask is not None:
            mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
        k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
        with sdpa_kernel([getattr(SDPBackend, candidate.sdpa_backend)]):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None)
    if candidate.name == "spas_attn":
        return sparse_attention(q, k, v, TopK(0.5), is_causal=causal, strict=True)
    function = importlib.import_module(PACKAGES[candidate.name]).flash_attn_func
    out = function(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)
