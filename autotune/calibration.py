"""The calibration loop: watch dense inference, choose thresholds, check them, and survive interruptions.

    with calibrate(model, l1=0.06, pv_l1=0.07, tail=0.5) as calibration:
        for prompt in calibration.prompts(prompts):
            model(prompt)
    calibration.save("models_dict/my_model.pt")

Passes over the prompts: curves (all but the prompts kept aside); where it is asked for, the sensitivity of every layer
(on one or two of them); PV curves, then the check with the real kernel (both on those kept aside); heads that miss a
bound in the check get tighter bounds and are checked again.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from . import block_maps, report
from .accumulate import Grid
from .checkpoint import Checkpoint
from .conditions import eagerly, float32
from .files import extract_sparse_attention_state_dict, save
from .layer import Layer
from .module import SHORT, Mode, SparseAttention, sparse_modules
from .objective import bounds_of, layer_times, objective_of, precisions_of, prompts_for_sensitivity
from .passes import CheckPass, CurvePass, FreePass, LevelsPass
from .phases import Phases
from .sampling import Sampler, Steps
from .tradeoff import Target, Tradeoff
from .tuned import Bounds, Tuned
from .watching import Watcher
from .work import Work

Item = TypeVar("Item")
RESERVOIR_BYTES = 2 << 30  # for all layers together
QUERY_BLOCKS = 16  # looked at per call, of however many there are


class Calibration:
    """Calibrates a patched model; use as a context manager (see the module's docstring). Also called ``calibrate``.

    Args:
        model: a patched model, or a pipeline with patched transformers; it runs dense and uncompiled meanwhile.
        l1, pv_l1: bounds of the mean relative L1 error, per head; None takes the modules' own. With a budget they are
            guards beside it: None is no guard, and l1 alone brings its pv_l1 (7/6 of it). Without pv_l1 there is no PV
            skip.
        tail: bound of the 99.5th percentile of one query's relative error; None switches it off, "module" takes the
            modules' own, and with a budget none.
        objective: "bounds": every head drops what its bounds allow. "budget": one budget for the whole model, spent
            where it costs least (``autotune/budget.py``), for the one target that is named.
        sparsity, speedup, error: the targets: least mean sparsity; least speedup of all attention, by the cost model of
            this machine; largest predicted error of the model's output (``autotune/rerun.py`` says of which kind).
        sensitivity: prompts on which the model's sensitivity to each layer is measured, by one more forward per layer;
            0 = none, all layers count the same. Left out: 1 with a budget, else 0. It needs the loop over prompts.
        share: with a budget, weigh a head by its share of its layer's squared output, instead of all the same.
        precisions: what every layer chooses its precision from: the one of least time that holds its bounds (in all
            phases, if there are several), with errors measured in the check. Left out: the modules' own.
        phases: of diffusion models, thresholds for each of so many phases of denoising, with equally many steps each
            (which one more prompt finds out), or the noise levels at which phases meet, falling from 1. It needs the
            loop over prompts.
        grid: candidate thresholds.
        query_blocks: looked at per call, at random, for the curves; None = all. Errors are sums over queries, so that a
            sample estimates them without bias; the check looks at all.
        kept_aside: share of the prompts that is kept for the PV pass and the check.
        rounds: how often heads that miss a bound in the check are tightened; then they run dense.
        seed: of the sampling.
        every: every n-th step of a prompt is observed: of the timesteps of a diffusion model, else of a layer's calls.
        skip_not_finite: leave prompts out, with a warning, in which a layer gets NaN or infinity, instead of raising.
        checkpoint: where finished prompts are kept, until ``save()``, so that an interrupted calibration can go on.
        resume: go on from it.

    Attributes:
        statistics: after it has finished, one entry per layer (see ``autotune/report.py``).
        tradeoff: after it has finished, what every candidate of every head costs and errs, and what was chosen.

    Raises:
        ValueError: when the model is not patched, a layer cannot be sparse, a bound or option is invalid, or a target
            needs what is not known here.
        TypeError: for bounds and targets that are no numbers.
    """

    def __init__(
        self,
        model: Any,
        l1: float | None = None,
        pv_l1: float | None = None,
        tail: float | str | None = "module",
        *,
        objective: str = "bounds",
        sparsity: float | None = None,
        speedup: float | None = None,
        error: float | None = None,
        sensitivity: int | None = None,
        share: bool = True,
        precisions: Sequence[str] | None = None,
        phases: int | Sequence[float] = 1,
        grid: Grid | None = None,
        query_blocks: int | None = QUERY_BLOCKS,
        kept_aside: float = 0.25,
        rounds: int = 3,
        seed: int = 0,
        every: int = 1,
        skip_not_finite: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = False,
    ) -> None:
        if isinstance(tail, str) and tail != "module":
            raise ValueError(f"tail must be a number, None or 'module', got {tail!r}")
        if not 0 < kept_aside < 1:
            raise ValueError(f"kept_aside must lie in (0, 1), got {kept_aside}")
        for name, number in (("rounds", rounds), ("every", every), ("query_blocks", query_blocks or 1)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {number!r}")
        if query_blocks == 0:
            raise ValueError("query_blocks must be at least 1, or None for all, got 0")
        if resume and checkpoint is None:
            raise ValueError("resume=True needs checkpoint=<path>, got None")
        grid, modules = grid or Grid(), sparse_modules(model)
        plan = objective_of(objective, Target.of(sparsity=sparsity, speedup=speedup, error=error), share)
        measured = prompts_for_sensitivity(sensitivity, plan)
        layers: list[Layer] = []
        divided, offered = Phases.of(phases), precisions_of(precisions)
        for path, module in modules.items():
            bounds = bounds_of(module, l1, pv_l1, tail, plan)
            grid.check(module.selector)
            for phase in range(divided.count):
                layers.append(Layer(len(layers), path, module, bounds, phase))
        plan.check(model, layers)
        self.model, self.layers = model, layers
        self.statistics: list[dict[str, Any]] = []
        self.tradeoff: Tradeoff | None = None
        self.kept_aside = kept_aside
        self.checkpoint, self.resume = checkpoint, resume
        self._work = Work(layers, grid, rounds, plan, measured, offered, divided)
        free = FreePass(self._work, RESERVOIR_BYTES, seed)
        self._watcher = Watcher(model, self._work, free, Sampler(query_blocks, seed), Steps(every), skip_not_finite)
        self._expected = 0
        self._left_out: set[int] = set()
        self._files: Checkpoint | None = None
        self._before: list[tuple[SparseAttention, Tuned | None, Mode]] = []
        self._open = contextlib.ExitStack()

    _pass = property(lambda self: self._watcher.current)  # the pass in progress

    @property
    def phase(self) -> str:
        """The pass in progress: "free" (no loop over prompts), "levels" (with phases), "curves", "sensitivity", "pv",
        "check" or "finished".
        """
        return "finished" if self._pass is None else self._pass.name

    @property
    def bounds(self) -> list[Bounds]:
        """l1, pv_l1 and tail of every layer."""
        return [layer.bounds for layer in self.layers]

    @property
    def expected_passes(self) -> int:
        """Prompts that this process runs in all, when no head misses its bounds in the check to come."""
        return self._expected

    # -- context ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Calibration:
        for layer in self.layers:
            if layer.module.observer is not None:
                raise RuntimeError(f"layer {layer.path!r} is being calibrated already")
        self._open.enter_context(eagerly())
        self._before = [(m, m.tuned, m.mode) for m in dict.fromkeys(layer.module for layer in self.layers)]
        self._watcher.begin(self._open)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and isinstance(self._pass, FreePass):
                self._finish_from(self._pass)
            elif kind is None and self._pass is not None:
                raise RuntimeError(
                    f"the loop over calibration.prompts(...) ended early, in the {self.phase} pass: no thresholds "
                    "were set; let it run to its end (finished prompts are kept in the checkpoint, if one was named)"
                )
        finally:
            self._open.__exit__(kind, error, trace)
            for module, tuned, mode in self._before if self._pass is not None else []:
                module.tuned, module.mode = tuned, mode

    # -- the loop -----------------------------------------------------------------------------------------------------

    def prompts(self, prompts: Sequence[Item]) -> Iterator[Item]:
        """Yield prompts to run, first all but those kept aside, the first of them once more for sensitivities (if asked
        for), then those kept aside for PV pass and check. They are to be run the same way every time.

        Prompts are shared out over ranks by index. Finished ones of an interrupted run are skipped on resume. What
        the model saw before the loop does not count.
        """
        if isinstance(prompts, (str, bytes, Mapping)):  # one prompt, which would be taken apart
            raise TypeError(f"prompts must be a list of prompts, got {type(prompts).__name__}")
        items, work = list(prompts), self._work
        if not items:
            raise ValueError("calibration needs at least one prompt, got none")
        if not isinstance(self._pass, FreePass):
            raise RuntimeError(f"prompts() can be used once per calibration; this one is in the {self.phase} pass")
        aside = min(len(items) - 1, max(1, round(len(items) * self.kept_aside)))
        work.fitted = list(range(len(items) - aside))
        work.checked = list(range(len(items) - aside, len(items))) or work.fitted  # a single prompt serves for both
        for layer in self.layers:
            layer.lengths = None
        curves = CurvePass(work)
        self._watcher.current = LevelsPass(work, work.phases, curves) if work.phases.unknown else curves
        done = self._begin_checkpoint(curves, items)
        again = 2 if any(layer.bounds[1] is not None for layer in self.layers) else 1
        more = [*again * work.checked, *work.fitted[: work.sensitivity], *work.fitted[: int(work.phases.unknown)]]
        self._expected = len(self._mine(more)) + sum(i not in done for i in self._mine(work.fitted))
        while self._pass is not None:
            current = self._pass
            for i in self._mine(current.prompts):
                if current is curves and i in done:
                    continue
                self._watcher.begin_prompt(i)
                yield items[i]
                self._end()
                if current is curves and self._files is not None:
                    self._files.save(curves)
            self._conclude()
            if isinstance(current, CheckPass) and self._pass is not None:
                self._expected += len(self._mine(work.checked))  # once more

    def _begin_checkpoint(self, curves: CurvePass, items: Sequence[Any]) -> set[int]:
        if self.checkpoint is None:
            return set()
        phases = (self._work.phases.count, self._work.phases.given)
        watched = (self._watcher.sampler, self._watcher.steps.every)
        sampled = (self._work.grid, *watched, self._work.fitted, phases)
        self._files = Checkpoint(self.checkpoint, self.model, sampled, items)
        return self._files.begin(curves, self.resume)

    def _mine(self, prompts: list[int]) -> list[int]:
        return [i for i in prompts if i % self._work.world == self._work.rank and i not in self._left_out]

    def _end(self) -> None:
        """The prompt in progress is finished."""
        watcher = self._watcher
        assert watcher.current is not None
        blind = watcher.blind()
        if watcher.problem is None and blind:
            watcher.problem = watcher.cause(blind[0])
            # Too short, or of another kind than the prompts before: there may be good ones to come.
            if any(layer.lengths is None and layer.unseen.keys() != {SHORT} for layer in blind):
                raise RuntimeError(f"prompt {watcher.prompt}: {watcher.problem}")
        if watcher.problem is None:
            watcher.current.close(watcher.prompt)
            return
        warnings.warn(f"prompt {watcher.prompt} is left out: {watcher.problem}", RuntimeWarning, stacklevel=3)
        self._left_out.add(watcher.prompt)
        watcher.current.drop()

    def _conclude(self) -> None:
        """Use what a pass has seen, and go on to the next one."""
        assert self._pass is not None
        try:
            self._watcher.current = self._pass.conclude()
        except RuntimeError as error:
            problem = self._watcher.problem
            raise RuntimeError(f"{error}: {problem}" if problem else str(error)) from error
        if self._pass is None:
            self._finish()

    def _finish_from(self, free: FreePass) -> None:
        """Without a loop over prompts: PV pass and check on the calls that were kept."""
        if self._work.phases.count > 1:
            raise RuntimeError("phases need the loop over calibration.prompts(...)")
        for layer in self.layers:
            if free.sums[layer.index] is None:
                raise RuntimeError(self._watcher.cause(layer))
        self._conclude()
        while self._pass is not None:
            with float32():
                free.replay(self._pass)
            self._conclude()

    # -- results ------------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        work = self._work
        self.tradeoff = work.objective.tradeoff(self.layers, work.grid, work.measured)
        expected = layer_times(self.layers)
        skipped = [sum(counts) for counts in zip(*work.gather([x.skipped for x in self.layers]), strict=True)]
        for units in self._watcher.units:
            states = [layer.finish(tradeoff=self.tradeoff) for layer in units]
            edges = work.phases.edges_of(units[0])
            units[0].module.set_thresholds(Tuned.joined(states, edges) if edges else states[0])
        for layer in self.layers:
            assert layer.curves is not None and layer.check is not None
            times = None if expected is None else expected[layer.index]
            facts = {
                "query_blocks_per_call": self._watcher.sampler.limit,
                "prompts_fitted": len(layer.curves.sums),
                "prompts_checked": len(layer.check.sums),
                "checked_on_the_fitted_calls": work.fitted == work.checked,
                "calls_skipped_for_memory": skipped[layer.index],
                "precision": layer.module.precision,
                **work.phases.facts(layer),
            }
            self.statistics.append(report.layer_statistics(layer, work.grid, times, facts))
        maps = [block_maps.first(layer.check.maps) for layer in self.layers if layer.check is not None]
        for entry, found in zip(self.statistics, block_maps.extremes(maps), strict=True):
            entry["block_maps"] = found

    def save(self, path: str | os.PathLike[str], *, page: bool = True, about: Mapping[str, str] | None = None) -> Path:
        """Write the tuned file, the statistics beside it as ``<name>.json``, and the page that shows them as
        ``<name>.html`` (rank 0 only); drop the checkpoint.

        Args:
            page: write the page too; :func:`autotune.report.write_page` does it later.
            about: what else the page is to say, such as ``{"model": ..., "prompts": ...}``; kept in the file.

        Returns:
            The path of the statistics.
        """
        about = dict(about or {})
        if not all(isinstance(text, str) for pair in about.items() for text in pair):
            raise TypeError(f"about must map texts to texts, got {about!r}")
        if not self.statistics:
            raise RuntimeError("nothing to save: the calibration has not finished")
        statistics = report.statistics_path(path)
        if self._work.rank == 0:
            state = extract_sparse_attention_state_dict(self.model)
            first = self.statistics[0]
            aside = 0 if first["checked_on_the_fitted_calls"] else first["prompts_checked"]
            state["_metadata"] |= {"prompts": first["prompts_fitted"] + aside, "about": about} | report.machine_facts(
                self.layers
            )
            save(state, path)
            report.write_statistics(self.statistics, statistics)
            if page:
                report.write_page(path)
            if self._files is not None:  # no earlier: a save that fails must not cost the whole calibration
                self._files.remove()
                self._files = None
        return statistics


calibrate = Calibration  # as it reads in a with statement
