"""The calibration loop: watch dense inference, choose thresholds, check them, and survive interruptions.

    with calibrate(model, l1=0.06, pv_l1=0.07, tail=0.5) as calibration:
        for prompt in calibration.prompts(prompts):
            model(prompt)
    calibration.save("models_dict/my_model.pt")

Passes over the prompts: curves (all but the prompts kept aside), PV curves, then the check with the real kernel
(both on those kept aside); heads that miss a bound in the check get tighter bounds and are checked again.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import observe, report
from .checkpoint import Checkpoint, digest, identity
from .curves import PromptTally
from .layer import Layer, merge_ranks
from .module import SparseAttention, check_bounds, sparse_modules
from .observe import Grid, Sampler, Watched
from .state_dict import extract_sparse_attention_state_dict, save

Item = TypeVar("Item")
RESERVOIR_BYTES = 2 << 30  # for all layers together
QUERY_BLOCKS = 16  # looked at per call, of however many there are


class Calibration:
    """A calibration in progress; made by :func:`calibrate`.

    Attributes:
        statistics: after it has finished, one entry per layer (see ``autotune/report.py``).
    """

    def __init__(
        self,
        model: Any,
        *,
        l1: float | None,
        pv_l1: float | None,
        tail: float | str | None,
        grid: Grid,
        query_blocks: int | None,
        kept_aside: float,
        rounds: int,
        seed: int,
        checkpoint: str | os.PathLike[str] | None,
        resume: bool,
    ) -> None:
        if resume and checkpoint is None:
            raise ValueError("resume=True needs checkpoint=<path>, got None")
        modules = sparse_modules(model)
        self.model = model
        self.bounds = [
            (
                module.l1 if l1 is None else l1,
                module.pv_l1 if pv_l1 is None else pv_l1,
                module.tail if isinstance(tail, str) else tail,
            )
            for module in modules.values()
        ]
        for bounds in self.bounds:
            check_bounds(*bounds)
        self.grid, self.sampler = grid, Sampler(query_blocks, seed)
        self.kept_aside, self.rounds = kept_aside, rounds
        self.checkpoint, self.resume = checkpoint, resume
        budget = RESERVOIR_BYTES // len(modules)
        self.layers = [Layer(i, path, module, budget, seed) for i, (path, module) in enumerate(modules.items())]
        self.statistics: list[dict[str, Any]] = []
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        self.world = dist.get_world_size() if self.distributed else 1
        self._phase = "free"  # "free": calls without prompts() around them; "curves", "pv", "check", "finished"
        self._passes = ("curves", "pv", *["check"] * rounds)
        self._round = self._prompt = 0
        self._same_calls = False
        self._expected = 0
        self._files: Checkpoint | None = None

    @property
    def phase(self) -> str:
        """The pass in progress: "free" (no loop over prompts), "curves", "pv", "check" or "finished"."""
        return self._phase

    @property
    def expected_passes(self) -> int:
        """Prompts that this process runs in all, when no head misses its bounds in the check to come."""
        return self._expected

    # -- context ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Calibration:
        for layer in self.layers:
            if layer.module.observer is not None:
                raise RuntimeError(f"layer {layer.path!r} is being calibrated already")
        for layer, bounds in zip(self.layers, self.bounds, strict=True):
            module = layer.module
            layer.remember_module()
            module.l1, module.pv_l1, module.tail = bounds
            module.mode, module.observer = "tune", functools.partial(self._observe, layer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._phase == "free":
                self._finish_from_reservoir()
            elif kind is None and self._phase != "finished":
                raise RuntimeError(
                    f"the loop over calibration.prompts(...) ended early, in the {self._phase} pass: no thresholds "
                    "were set; let it run to its end (finished prompts are kept in the checkpoint, if one was named)"
                )
        finally:
            for layer in self.layers:
                layer.module.observer = None
                if self._phase == "finished":
                    layer.module.mode = "sparse"
                else:
                    layer.restore_module()

    # -- the loop -----------------------------------------------------------------------------------------------------

    def prompts(self, prompts: Sequence[Item]) -> Iterator[Item]:
        """Yield prompts to run, first all but those kept aside, then those kept aside for PV pass and check.

        Prompts are shared out over ranks by index. Finished ones of an interrupted run are skipped on resume. What
        the model saw before the loop does not count.
        """
        items = list(prompts)
        if not items:
            raise ValueError("calibration needs at least one prompt, got none")
        if self._phase != "free":
            raise RuntimeError(f"prompts() can be used once per calibration; this one is in the {self._phase} pass")
        aside = min(len(items) - 1, max(1, round(len(items) * self.kept_aside)))
        fitted = list(range(len(items) - aside))
        checked = list(range(len(items) - aside, len(items))) or fitted  # a single prompt serves for both
        self._same_calls = checked == fitted
        for layer in self.layers:
            layer.forget()
        done = self._open_checkpoint(items, len(fitted))
        mine = [i for i in (*(i for i in fitted if i not in done), *checked, *checked) if i % self.world == self.rank]
        self._expected = len(mine)
        for phase in self._passes:
            self._phase = phase
            for i in fitted if phase == "curves" else checked:
                if i % self.world != self.rank or (phase == "curves" and i in done):
                    continue
                self._begin(i)
                yield items[i]
                self._end(i)
                if phase == "curves":
                    self._save_checkpoint()
            if self._conclude():
                return
            self._expected += (phase == "check") * sum(i % self.world == self.rank for i in checked)  # once more

    def _begin(self, prompt: int) -> None:
        self._prompt = prompt
        for layer in self.layers:
            layer.open, layer.calls = None, 0

    def _end(self, prompt: int) -> None:
        for layer in self.layers:
            if layer.open is None:
                raise RuntimeError(
                    f"layer {layer.path!r} saw no call of at least {layer.module.selector.block_q} queries in prompt "
                    f"{prompt}: run the model inside the loop, with prompts longer than a block"
                )
        for layer in self.layers:
            layer.close(self._phase, prompt)

    def _conclude(self) -> bool:
        """Use what a pass has seen; says whether the calibration is finished."""
        if self.distributed:
            merge_ranks(self.layers, self._phase, self.world)
        for layer in self.layers:
            if self._phase == "curves":
                layer.choose_first(self.grid)
            elif self._phase == "pv":
                layer.choose_pv(self.grid)
        if self._phase != "check" or self._back_off():
            return False
        self._finish()
        return True

    # -- watching -----------------------------------------------------------------------------------------------------

    def _observe(self, layer: Layer, module: SparseAttention, q: Tensor, k: Tensor, v: Tensor, **flags: Any) -> None:
        if self._phase == "finished":
            return
        with _float32(q.device.type):
            self._see(layer, Watched(q, k, v, precision=module.precision, **flags))

    def _see(self, layer: Layer, call: Watched) -> None:
        module, heads = layer.module, call.q.shape[1]
        if module.is_sparse is None:
            module.set_heads(heads)
        layer.saw(call.k.shape[2])
        count = observe.block_count(call, module.selector.block_q)
        blocks = self.sampler.blocks(count, layer.index, self._prompt, layer.calls)
        layer.calls += 1
        if self._phase == "free":  # every call is a sample of its own
            number = layer.reservoir.seen * self.world + self.rank
            tally = PromptTally(heads, len(self.grid), call.q.device)
            observe.add_curves(tally, module, call, self.grid, blocks)
            layer.add("curves", tally.close(number))
            layer.reservoir.offer(number, call, module.selector, blocks)
        else:
            self._watch(layer, call, blocks)

    def _watch(self, layer: Layer, call: Watched, blocks: list[int]) -> None:
        """Add a call to the prompt in progress."""
        if layer.open is None:
            candidates = {"curves": len(self.grid), "pv": len(self.grid.pv), "check": 2}[self._phase]
            layer.open = PromptTally(call.q.shape[1], candidates, call.q.device)
        if self._phase == "check":
            layer.check_backend = observe.add_check(layer.open, layer.module, call)
        else:
            add = observe.add_curves if self._phase == "curves" else observe.add_pv_curves
            add(layer.open, layer.module, call, self.grid, blocks)

    def _finish_from_reservoir(self) -> None:
        """Without a loop over prompts: PV pass and check on the calls held in the reservoir."""
        for layer in self.layers:
            if layer.curves is None:
                raise RuntimeError(
                    f"layer {layer.path!r} saw no call of at least {layer.module.selector.block_q} queries: run the "
                    "model in tune mode, with prompts longer than a block"
                )
        self._same_calls = True
        for phase in self._passes:
            self._phase = phase
            for layer in self.layers if phase != "curves" else []:
                for number, parts in layer.reservoir.calls:
                    for call, blocks in parts:
                        with _float32(call.q.device.type):
                            self._watch(layer, call, blocks)
                    layer.close(phase, number)
            if self._conclude():
                return

    # -- choosing -----------------------------------------------------------------------------------------------------

    def _back_off(self) -> bool:
        """Tighten the bounds of heads that missed one in the check; says whether to check again.

        In the last round such heads become dense instead.
        """
        self._round += 1
        last = self._round >= self.rounds
        missed = [layer.back_off(self.grid, self.rounds if last else None) for layer in self.layers]
        if last or not any(missed):
            return False
        for layer in self.layers:
            layer.check = None  # all are checked again: what they record belongs to the final thresholds
        return True

    def _finish(self) -> None:
        self._phase = "finished"
        self.statistics = []
        for layer in self.layers:
            layer.record_density()
            assert layer.curves is not None and layer.check is not None
            facts = {
                "query_blocks_per_call": self.sampler.limit,
                "prompts_fitted": len(layer.curves.sums),
                "prompts_checked": len(layer.check.sums),
                "checked_on_the_fitted_calls": self._same_calls,
            }
            self.statistics.append(report.layer_statistics(layer, facts))

    # -- results ------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the tuned file, and the statistics beside it as ``<name>.json`` (rank 0 only); drop the checkpoint.

        Returns:
            The path of the statistics.
        """
        if self._phase != "finished":
            raise RuntimeError("nothing to save: the calibration has not finished")
        statistics = report.statistics_path(path)
        if self.rank == 0:
            state = extract_sparse_attention_state_dict(self.model)
            first = self.statistics[0]
            seen = first["prompts_fitted"] + (0 if self._same_calls else first["prompts_checked"])
            state["_metadata"] |= {"prompts": seen}
            save(state, path)
            report.write_statistics(self.statistics, statistics)
            if self._files is not None:  # no earlier: a save that fails must not cost the whole calibration
                self._files.remove()
                self._files = None
        return statistics

    # -- interruptions ------------------------------------------------------------------------------------------------

    def _open_checkpoint(self, items: Sequence[Any], fitted: int) -> set[int]:
        """Take over the finished prompts of an interrupted run; returns their numbers."""
        if self.checkpoint is None:
            return set()
        modules = [(layer.path, layer.module) for layer in self.layers]
        selectors = [(path, repr(m.selector), m.text_sink, m.dense_steps) for path, m in modules]
        prompts = [digest(item) for item in items]
        facts = (identity(self.model), selectors, self.grid, self.sampler, fitted, prompts)
        self._files = Checkpoint(self.checkpoint, facts)
        done: set[int] = set()
        for saved in self._files.load() if self.resume else []:
            for layer, (tally, lengths) in zip(self.layers, saved, strict=True):
                if tally is not None:
                    done |= tally.sums.keys()
                    layer.resume(tally, lengths, counts=self.rank == 0)  # the sum over ranks has each prompt once
        if self.distributed:
            dist.barrier()  # all have read
        if self.rank == 0:
            if done:
                self._save_checkpoint()
            self._files.remove(but=self._files.file(0) if done else None)
        if self.distributed:
            dist.barrier()
        return done

    def _save_checkpoint(self) -> None:
        if self._files is not None:
            self._files.save(self.rank, [(layer.curves, layer.lengths) for layer in self.layers])


@contextlib.contextmanager
def _float32(device: str) -> Iterator[None]:
    """For sums that are to be exact, and to outlive the inference mode that a model may run in."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        yield


def calibrate(
    model: Any,
    l1: float | None = None,
    pv_l1: float | None = None,
    tail: float | str | None = "module",
    *,
    grid: Grid | None = None,
    query_blocks: int | None = QUERY_BLOCKS,
    kept_aside: float = 0.25,
    rounds: int = 3,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> Calibration:
    """Calibrate a patched model; use as a context manager (see the module's docstring).

    Args:
        model: a patched model, or a pipeline with patched transformers; it runs dense and unchanged meanwhile.
        l1, pv_l1: bounds of the mean relative L1 error, per head; None takes the modules' own.
        tail: bound of the 99.5th percentile of one query's relative error; None switches it off, "module" takes the
            modules' own.
        grid: candidate thresholds.
        query_blocks: query blocks looked at per call, at random, for the curves; None = all. Errors are sums over
            queries, so a sample estimates them without bias; the check looks at all.
        kept_aside: share of the prompts that is kept for the PV pass and the check.
        rounds: how often heads that miss a bound in the check are tightened; then they run dense.
        seed: of the sampling of query blocks.
        checkpoint: where finished prompts are kept, until ``save()``, so that an interrupted calibration can go on.
        resume: go on from the checkpoint.

    Raises:
        ValueError: when the model is not patched, or a bound makes no sense.
    """
    if isinstance(tail, str) and tail != "module":
        raise ValueError(f"tail must be a number, None or 'module', got {tail!r}")
    if not 0 < kept_aside < 1:
        raise ValueError(f"kept_aside must lie in (0, 1), got {kept_aside}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if query_blocks is not None and query_blocks < 1:
        raise ValueError(f"query_blocks must be at least 1 or None, got {query_blocks}")
    return Calibration(
        model,
        l1=l1,
        pv_l1=pv_l1,
        tail=tail,
        grid=grid or Grid(),
        query_blocks=query_blocks,
        kept_aside=kept_aside,
        rounds=rounds,
        seed=seed,
        checkpoint=checkpoint,
        resume=resume,
    )
