"""The registry of the benchmarks: what a case, a setup and a provider are, and every one of them by name."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

LABELS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Largest relative L1 against float32 on random normal inputs: those of the library's tests; in 8 bits as measured in
# docs/benchmarks.
LIMITS = {"fp32": 1e-5, "bf16": 0.003, "fp16": 0.003, "int8_bf16": 0.015, "int8_fp8": 0.042}


class Declined(Exception):
    """A provider does not serve a setup; the text says why."""


@dataclass(frozen=True)
class Runs:
    """What to check and to time for one provider and setup.

    Attributes:
        output: computes the result, which is checked before anything is timed.
        parts: calls to time, by the column of :class:`results.Row` that their milliseconds go to.
        within: by column, the milliseconds that something inside the last call took.
        before: called, untimed, before a part is.
        dense: the result is that of dense attention, though its provider is not a dense one.
    """

    output: Callable[[], Tensor]
    parts: dict[str, Callable[[], object]]
    within: dict[str, Callable[[], float]] = field(default_factory=dict)
    before: Callable[[], None] = lambda: None
    dense: bool = False


class Setup:
    """One case with inputs, at one density.

    Attributes:
        density, kept: shares of the blocks, asked for and computed; ``kept`` is known once an output was computed.
        block_q, block_k: sizes of the mask blocks.
        dtype: of the inputs.
    """

    density: float
    kept: float
    block_q: int
    block_k: int
    dtype: torch.dtype

    ours: Callable[[str, str], Runs]  # this library, by backend and precision
    sdpa: Callable[[SDPBackend | None], Runs]  # dense attention by PyTorch, with a kernel or the one that it picks
    error: Callable[[Tensor, bool], float | None]  # of an output (dense or not), NaN: not finite, None: not compared
    facts: Callable[[], dict[str, Any]]  # columns that say what ran, once it did: tokens, heads, head_dim, layers

    def tflops(self, ms: float) -> float | None:
        """Effective TFLOP/s, if they are known."""
        return None


class Case:
    """What is computed: one attention call, or one denoising step of a model."""

    name: str
    tiny: Callable[[], Case]  # the same for a trial of the program on a CPU
    setups: Callable[[torch.device, torch.dtype, Namespace], Iterator[Setup]]  # for every block size and density asked

    @property
    def title(self) -> str:
        """As the table shows it."""
        return self.name


@dataclass(frozen=True)
class Provider:
    """One way of computing attention.

    Attributes:
        name: as the table shows it.
        device: "cuda" or "cpu".
        make: what to run for a setup; it raises :class:`Declined`.
        precision: as the table shows it; "native" is the dtype of the inputs.
        missing: None when it can run on this machine, else what is missing.
        dense: it computes all blocks, whatever the density; such a provider runs once for every case and dtype.
        last_resort: it runs only where no dense provider before it does.
        limit: largest relative L1 against float32; None for that of the precision.
    """

    name: str
    device: str
    make: Callable[[Setup], Runs]
    precision: str = "native"
    missing: Callable[[], str | None] = lambda: None
    dense: bool = False
    last_resort: bool = False
    limit: float | None = None

    def precision_of(self, setup: Setup) -> str:
        """The precision on the setup's inputs."""
        return LABELS[setup.dtype] if self.precision == "native" else self.precision

    def holds(self, error: float | None, setup: Setup) -> bool:
        """Whether an output with this error may be timed; never with NaN."""
        return error is None or error <= (self.limit or LIMITS[self.precision_of(setup)])


CASES: dict[str, dict[str, Case]] = {"attention": {}, "steps": {}}
PROVIDERS: dict[str, Provider] = {}
