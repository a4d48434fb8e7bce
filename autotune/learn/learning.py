"""learn(): gates in the attention layers of a patched model, and the handle on them."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from spas_attn.checks import check_flag
from spas_attn.selectors import Streaming

from ..module import SparseAttention, sparse_modules
from .branches import Branches
from .gates import HeadGates
from .separation import Separation

TOGGLE_TYPES = ("streaming", "local")


def learn(
    model: Any, *, sink_size: int = 128, window: int = 1024, toggle_type: Literal["streaming", "local"] = "streaming",
    seed: int = 0,
) -> Learning:  # fmt: skip
    """Install a gate for every KV head of a patched language model: output = z · full + (1 − z) · streaming.

    The model's state_dict has the gates until they are removed. Freeze the weights (``model.requires_grad_(False)``)
    before, to learn gates alone.

    Args:
        model: a patched model (``modify_model.patch``).
        sink_size, window: tokens of the sink and of the local window of the streaming branch, which keeps the whole
            blocks that they touch, in the blocks of the layer's selector, as it is served.
        toggle_type: "streaming", or "local": a window without a sink.
        seed: of the start values, which are the same on every rank.

    Raises:
        ValueError: when the model is not patched or has gates already, and on sizes and types that are not allowed.
    """
    if toggle_type not in TOGGLE_TYPES:
        raise ValueError(f"toggle_type must be one of {TOGGLE_TYPES}, got {toggle_type!r}")
    for name, size, least in (("sink_size", sink_size, 0), ("window", window, 1)):
        if isinstance(size, bool) or not isinstance(size, int) or size < least:
            raise ValueError(f"{name} must be a whole number of tokens, {least} or more, got {size!r}")
    modules = sparse_modules(model)
    taken = [path for path, module in modules.items() if module.gates is not None]
    if taken:
        raise ValueError(f"layer {taken[0]!r} has gates already: Learning(model) is the handle on them")
    unknown = [path for path, module in modules.items() if module.heads is None]
    if unknown:
        raise ValueError(f"layer {unknown[0]!r} does not know its number of heads: call set_heads first")
    sink = toggle_type == "streaming"
    branches: dict[tuple[int, int], Branches] = {}
    generator = torch.Generator().manual_seed(seed)
    for module in modules.values():
        blocks = (module.selector.block_q, module.selector.block_k)
        if blocks not in branches:
            rule = Streaming(sink_size if sink else 0, window, sink=sink, block_q=blocks[0], block_k=blocks[1])
            branches[blocks] = Branches(rule)
        heads = module.heads or 0
        gates = HeadGates(module.kv_heads or heads, heads, branches[blocks], generator=generator, device=module.device)
        module.gates = gates.train(module.training)
    return Learning(model)


class Learning:
    """The gates of a model that :func:`learn` gave them; as a context manager it removes them at the end.

    Args:
        model: that has gates, also a copy of the one that ``learn`` was called with.

    Attributes:
        gates: of the layers, in the model's order.

    Raises:
        ValueError: when the model has none.
    """

    def __init__(self, model: Any) -> None:
        self._modules: list[SparseAttention] = [m for m in sparse_modules(model).values() if m.gates is not None]
        self.gates: list[HeadGates] = [m.gates for m in self._modules if isinstance(m.gates, HeadGates)]
        if not self.gates:
            raise ValueError(f"{type(model).__name__} has no gates: call autotune.learn.learn(model)")

    @property
    def active(self) -> bool:
        """Whether the gates act. Set to False, the model is its own dense self (the teacher of a distillation)."""
        return all(gates.active for gates in self.gates)

    @active.setter
    def active(self, active: bool) -> None:
        check_flag("active", active)
        for gates in self.gates:
            gates.active = active

    def sparsity(self, *, layerwise: bool = False) -> Tensor:
        """Expected share of heads that stream, 1 − mean P(z > 0), in closed form: a scalar, or ``[layers]``;
        differentiable.
        """
        device = self.gates[0].log_alpha.device
        kept = [gates.keep_probability().to(device) for gates in self.gates]
        return 1 - torch.stack([x.mean() for x in kept]) if layerwise else 1 - torch.cat(kept).mean()

    @torch.no_grad()
    def table(self, sparsity: float | None = None) -> Tensor:
        """The gates as a table, float32 ``[layers, KV heads]`` on the CPU, 1 = full, 0 = streaming.

        Args:
            sparsity: None for the gates themselves (:meth:`HeadGates.ranked`). Else that share of the whole model's KV
                heads, rounded to a whole number of them, is 0 and the rest 1: those of the lowest log α; of equal ones
                later layers, and in a layer later heads, first (as ``spas_attn.published.streaming_heads`` reads it).

        Raises:
            ValueError: on a sparsity outside [0, 1], and when layers have different numbers of KV heads.
        """
        if sparsity is None:
            return self._rows([gates.ranked() for gates in self.gates])
        if not 0 <= sparsity <= 1:
            raise ValueError(f"sparsity must be in [0, 1], got {sparsity!r}")
        values = self._rows([gates.values for gates in self.gates])
        full = values.numel() - int(sparsity * values.numel() + 0.5)
        kept = values.flatten().argsort(descending=True, stable=True)[:full]
        return torch.zeros(values.numel()).index_fill_(0, kept, 1.0).view_as(values)

    def separation(self, sparsity: float | None = None) -> Separation:
        """How clearly the gates say which heads stream; by default at the sparsity that they expect."""
        with torch.no_grad():
            at = float(self.sparsity()) if sparsity is None else sparsity
        return Separation.of(self.table(), self.table(at).bool(), at)

    def start_from(self, table: Tensor) -> None:
        """Set the gates to a table ``[layers, KV heads]`` of [0, 1], log α = (2x − 1) · 10, and learn on from there."""
        for gates, row in zip(self.gates, self._checked(table), strict=True):
            gates.fix(None)
            gates.set_table(row)

    def freeze(self, table: Tensor) -> None:
        """Run a table of 0 and 1, ``[layers, KV heads]``, as it is (sparse fine-tuning of the weights): each head pays
        for its own branch only, and the gates are not learnt.

        This is PruLong's ``sft.sh``; some copies of its scripts say it of ``prulong_masksonly.sh``, which freezes the
        weights and learns the gates.
        """
        table = self._checked(table)
        if not bool(((table == 0) | (table == 1)).all()):
            raise ValueError("table must hold 0 and 1 to be fixed: take Learning.table(sparsity)")
        for gates, row in zip(self.gates, table, strict=True):
            gates.fix(row == 1)

    def remove(self) -> None:
        """Take the gates out; the model is patched as before."""
        for module in self._modules:
            module.gates = None

    def _rows(self, rows: list[Tensor]) -> Tensor:
        if len({len(row) for row in rows}) > 1:
            raise ValueError(f"a table needs one number of KV heads in all layers, got {[len(row) for row in rows]}")
        return torch.stack([row.detach().float().cpu() for row in rows])

    def _checked(self, table: Tensor) -> Tensor:
        shape = [len(self.gates), len(self.gates[0].log_alpha)]
        if not isinstance(table, Tensor) or list(table.shape) != shape:
            got = list(table.shape) if isinstance(table, Tensor) else type(table).__name__
            raise ValueError(f"table must be a tensor {shape} (layers x KV heads), got {got}")
        if not bool(((table >= 0) & (table <= 1)).all()):
            raise ValueError("table must hold numbers from 0 to 1")
        return table.detach().float().cpu()

    def __enter__(self) -> Learning:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.remove()
