"""Running a transformer once more on the arguments of a call, with some layers sparse, to see what its output loses.

The model's error is, for models that return logits, the divergence of the next token's distribution, KL(dense ‖ sparse)
in nats, mean over positions; for all others the relative error of the output, ‖sparse - dense‖ / ‖dense‖.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spas_attn.plan import AUTOMATIC

from .layer import Layer
from .module import SparseAttention
from .tradeoff import KL, RELATIVE
from .tuned import Tuned

POSITIONS = 512  # of a text, evenly spread, whose next-token distributions are compared
CALLS = 3  # of a prompt, evenly spread over its denoising steps, that are run again
_ROWS = 64  # positions whose float32 distributions are formed at once


class Rerun:
    """One call of a transformer that can be repeated.

    Args:
        part: the transformer.
        args, kwargs: of the call; a cache among them is as it was before the call.
    """

    def __init__(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.part, self.args, self.kwargs = part, args, _fewer_logits(part, args, kwargs)
        self._modules = [m for m in part.modules() if isinstance(m, SparseAttention)]
        self._dense: list[Tensor] | None = None
        self.measure = ""

    def error(self, tuned: Mapping[SparseAttention, Tuned]) -> float:
        """The model's error when these layers run at these thresholds and all others dense."""
        if self._dense is None:
            found = self._run({})
            self.measure, self._dense = (KL if hasattr(found, "logits") else RELATIVE), _outputs(found)
        sparse = _outputs(self._run(tuned))
        if self.measure == KL:
            return _divergence(self._dense[0], sparse[0])
        return _relative(self._dense, sparse)

    def _run(self, tuned: Mapping[SparseAttention, Tuned]) -> Any:
        with _serving(self._modules, tuned):
            return self.part(*self.args, **{name: _fresh(name, value) for name, value in self.kwargs.items()})


@contextmanager
def _serving(modules: Sequence[SparseAttention], tuned: Mapping[SparseAttention, Tuned]) -> Iterator[None]:
    """Some layers sparse, on sparse kernels even where dense attention would be faster, and all others dense."""
    before = [(module.mode, module.tuned, module.backend, module.always_dense) for module in modules]
    try:
        for module in modules:
            module.mode = "sparse" if module in tuned else "dense"
            if module in tuned:
                module.tuned, module.always_dense = tuned[module], False
                if module.backend == "auto":
                    module.backend = AUTOMATIC.get(module.is_sparse.device.type, ("auto",))[0]
        yield
    finally:
        for module, (mode, state, backend, always_dense) in zip(modules, before, strict=True):
            module.mode, module.tuned, module.backend, module.always_dense = mode, state, backend, always_dense


def _fewer_logits(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments, with the logits of some positions asked for where the model can be asked for them; a loss,
    which needs all, is not computed.
    """
    names = list(inspect.signature(getattr(part, "_orig_mod", part).forward).parameters)
    given = dict(zip(names, args, strict=False)) | kwargs
    ids = next((given[name] for name in ("input_ids", "inputs_embeds") if isinstance(given.get(name), Tensor)), None)
    if ids is None or "logits_to_keep" not in names or "logits_to_keep" in names[: len(args)]:
        return kwargs
    count = min(POSITIONS, ids.shape[1])
    places = torch.linspace(0, ids.shape[1] - 1, count, device=ids.device).round().long()
    return {name: value for name, value in kwargs.items() if name != "labels"} | {"logits_to_keep": places}


def _fresh(name: str, value: Any) -> Any:
    return copy.deepcopy(value) if "cache" in name or name == "past_key_values" else value


def _outputs(found: Any) -> list[Tensor]:
    """The floating tensors of an output; of a language model its logits."""
    if isinstance(found, Tensor):
        return [found]
    if hasattr(found, "logits"):
        return [found.logits]
    values = found.values() if isinstance(found, Mapping) else found
    return [x for x in values if isinstance(x, Tensor) and x.is_floating_point()]


def _divergence(dense: Tensor, sparse: Tensor) -> float:
    dense, sparse = (x.flatten(0, -2) for x in (dense, sparse))
    if len(dense) > POSITIONS:
        places = torch.linspace(0, len(dense) - 1, POSITIONS, device=dense.device).round().long()
        dense, sparse = dense[places], sparse[places]
    total = 0.0
    for a, b in zip(dense.split(_ROWS), sparse.split(_ROWS), strict=True):
        p, q = (F.log_softmax(x.float(), -1) for x in (a, b))
        total += float((p.exp() * (p - q)).sum())
    return max(0.0, total / len(dense))


def _relative(dense: Sequence[Tensor], sparse: Sequence[Tensor]) -> float:
    lost = sum(float((a.float() - b.float()).square().sum()) for a, b in zip(dense, sparse, strict=True))
    return (lost / max(1e-30, sum(float(a.float().square().sum()) for a in dense))) ** 0.5


@dataclass
class Repeater:
    """Hooks of one transformer: hands calls that a calibration has looked at to ``compare``, ready to be repeated.

    Of a prompt with many calls (denoising steps) only some are handed over, evenly spread; how many there are is
    learned from the prompts before, so that of a first prompt it is the first call alone.

    Attributes:
        layers: those of the transformer.
        expect: is told, before a call, whether it will be handed over if it is looked at.
        compare: gets the layers and a Rerun; None where nobody wants to.
    """

    layers: list[Layer]
    expect: Callable[[bool], None]
    compare: Callable[[list[Layer], Rerun], None] | None = None
    _usual: int = 1  # calls of a prompt
    _count: int = 0
    _seen: int = 0  # calls of layers, before the transformer's call in progress
    _kwargs: dict[str, Any] = field(default_factory=dict)
    _busy: bool = False

    def restart(self) -> None:
        """The next call is the first of a prompt."""
        self._usual, self._count = max(self._usual, self._count), 0

    def before(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: keeps what the call will change."""
        if not self._busy:
            self._seen = self._looked_at()
            self.expect(self._is_wanted())
            self._kwargs = kwargs if self.compare is None else {k: _fresh(k, v) for k, v in _empty(kwargs).items()}

    def after(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook: hands over the call."""
        if self._busy or self._looked_at() == self._seen:
            return
        wanted = self._is_wanted()
        self._count += 1
        if not wanted or self.compare is None:
            return
        if self._kwargs.keys() != kwargs.keys():  # a cache held tokens
            return
        self._busy = True
        try:
            with torch.no_grad():
                self.compare(self.layers, Rerun(part, args, self._kwargs))
        finally:
            self._busy = False

    def _is_wanted(self) -> bool:
        kept = min(self._usual, CALLS)
        return self.compare is not None and self._count in [int((i + 0.5) * self._usual / kept) for i in range(kept)]

    def _looked_at(self) -> int:
        return sum(layer.calls for layer in self.layers)


def _empty(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments, none if there is a cache that already holds tokens."""
    cache = kwargs.get("past_key_values")
    return {} if cache is not None and cache.get_seq_length() else kwargs
