"""One denoising step of a diffusion transformer: dense or sparse, with the time that its attention takes."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from registry import Declined, Runs, Setup
from timing import Clock
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from autotune import Tuned, record_density
from autotune.module import sparse_modules
from autotune.tuned import PV_OFF
from modify_model import patch
from spas_attn import fallback_counts
from spas_attn.selectors import TopK


def compile_blocks(transformer: nn.Module) -> None:
    """Compile the blocks of a transformer one by one, as diffusers recommends: all of a kind share their code."""
    torch._dynamo.config.recompile_limit = 64  # each share of blocks, block size and precision needs code of its own
    for blocks in transformer.children():
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                block.compile(fullgraph=True)


class StepModel:
    """A patched transformer with the arguments of one call.

    Random weights are not sparse, so densities are forced: every layer is tuned to keep a fixed share of the blocks.

    Attributes:
        calls: the clock of every self-attention call of the last step, and the shape of its q; of a compiled model
            those of one step before it was compiled, since a clock would break its graph.
    """

    def __init__(
        self, transformer: nn.Module, inputs: dict[str, Any], device: torch.device, *, compiled: bool = False
    ) -> None:
        self.transformer, self.inputs, self.device = patch(transformer), inputs, device
        self.layers, self.compiled = list(sparse_modules(self.transformer).values()), compiled
        self._kernel: SDPBackend | None = None
        self.calls: list[tuple[Clock, torch.Size]] = []
        self._within = contextlib.ExitStack()
        hooks = [layer.register_forward_pre_hook(self._begin) for layer in self.layers]
        hooks += [layer.register_forward_hook(self._end) for layer in self.layers]
        if compiled:
            self.run_dense(None)
            self.step()
            for hook in hooks:
                hook.remove()
            compile_blocks(self.transformer)

    def _begin(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self.calls.append((Clock(self.device), args[0].shape))
        if self._kernel is not None:
            self._within.enter_context(sdpa_kernel(self._kernel))

    def _end(self, *_: object) -> None:
        self._within.close()
        self.calls[-1][0].stop()

    @torch.inference_mode()
    def step(self) -> Tensor:
        """The output of one step."""
        if self.compiled and self.calls:
            with contextlib.nullcontext() if self._kernel is None else sdpa_kernel(self._kernel):
                return self.transformer(**self.inputs, return_dict=False)[0]
        self.calls = []
        with self._within:  # a layer that raises leaves its kernel chosen
            out = self.transformer(**self.inputs, return_dict=False)[0]
        if len(self.calls) != len(self.layers):
            raise RuntimeError(f"{len(self.layers)} layers made {len(self.calls)} calls in one step")
        return out

    def attention_ms(self) -> float:
        """Milliseconds of the self-attention calls of the last step."""
        return sum(clock.ms() for clock, _ in self.calls)

    def run_sparse(self, selector: TopK, tuned: Tuned, backend: str, precision: str) -> None:
        """Keep the selector's share of the blocks in every layer."""
        self._kernel = None
        for layer in self.layers:
            layer.selector, layer.backend, layer.precision, layer.dense_now = selector, backend, precision, False
            layer.set_thresholds(tuned)

    def run_dense(self, kernel: SDPBackend | None) -> None:
        """Call the model's own attention, with a kernel, or with the one that PyTorch picks."""
        self._kernel = kernel
        for layer in self.layers:
            layer.mode, layer.dense_now = "sparse", True


class StepSetup(Setup):
    """A step at one density."""

    def __init__(self, model: StepModel, layers: str, dtype: torch.dtype, selector: TopK) -> None:
        self.model, self.layers, self.dtype, self.selector = model, layers, dtype, selector
        self.density, self.block_q, self.block_k = float(selector.keep), selector.block_q, selector.block_k
        self.kept = 1.0

    def facts(self) -> dict[str, Any]:
        _, heads, tokens, head_dim = self.model.calls[0][1]
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.model.device.type == "cuda" else None
        return {"tokens": tokens, "heads": heads, "head_dim": head_dim, "layers": self.layers, "peak_GiB": peak}

    def error(self, out: Tensor, dense: bool) -> float | None:
        """NaN for an output that is not finite; random weights give nothing to compare with."""
        return None if bool(out.isfinite().all()) else float("nan")

    def ours(self, backend: str, precision: str) -> Runs:
        """Sparse attention with a fixed share of the blocks; the text is kept as in serving."""
        model, one = self.model, torch.ones(self.model.layers[0].heads or 0)
        tuned = Tuned(one.bool(), self.density * one, -one, PV_OFF * one, expected_density=self.density)
        before = functools.partial(model.run_sparse, self.selector, tuned.to(model.device), backend, precision)

        def output() -> Tensor:
            before()
            counts = fallback_counts()
            with record_density(model.transformer) as densities:
                out = model.step()
            declined = [reason for reason, count in fallback_counts().items() if count > counts.get(reason, 0)]
            if declined:
                raise Declined(declined[0])
            self.kept = densities.mean
            return out

        return Runs(output, {"ms_total": model.step}, self._within(), before)

    def _within(self) -> dict[str, Any]:
        return {} if self.model.compiled else {"ms_attention": self.model.attention_ms}

    def sdpa(self, kernel: SDPBackend | None) -> Runs:
        """The model's own attention."""
        model, before = self.model, functools.partial(self.model.run_dense, kernel)

        def output() -> Tensor:
            before()
            try:
                return model.step()
            except RuntimeError as error:  # a kernel that takes no masks, or not this head dim, or too much memory
                raise Declined(f"SDPA refuses: {str(error).splitlines()[0]}") from error

        return Runs(output, {"ms_total": model.step}, self._within(), before)
