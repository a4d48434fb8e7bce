"""The calibration loop: watch dense inference, choose thresholds, check them, and survive interruptions.

    with calibrate(model, l1=0.06, pv_l1=0.07, tail=0.5) as calibration:
        for prompt in calibration.prompts(prompts):
            model(prompt)
    calibration.save("models_dict/my_model.pt")

Passes over the prompts: curves (all but the prompts kept aside), PV curves, then the check with the real kernel
(both on those kept aside); heads that miss a bound in the check get tighter bounds and are checked again.
"""

from __future__ import annotations

import functools
import hashlib
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spas_attn.backends import Call

from . import observe, report
from .curves import PromptTally, Tally
from .module import PV_OFF, SparseAttention, Thresholds, check_bounds, sparse_modules
from .observe import Grid, Reservoir, Sampler
from .search import choose, mean_error, tail_error, within_bounds
from .state_dict import extract_sparse_attention_state_dict, load_checkpoint, save, write_atomically

Item = TypeVar("Item")
RESERVOIR_BYTES = 2 << 30  # for all layers together
QUERY_BLOCKS = 16  # looked at per call, of however many there are
MARGIN = 0.9  # a head that misses its bound aims this far below it the next time
_open: weakref.WeakKeyDictionary[nn.Module, Calibration] = weakref.WeakKeyDictionary()


class Layer:
    """What the calibration knows of one layer."""

    def __init__(self, index: int, path: str, module: SparseAttention, budget: int, seed: int) -> None:
        self.index, self.path, self.module = index, path, module
        self.curves: Tally | None = None
        self.pv: Tally | None = None
        self.check: Tally | None = None
        self.open: PromptTally | None = None  # of the prompt in progress
        self.calls = 0  # in the prompt in progress
        self.reservoir = Reservoir(budget, seed + index)
        self.lengths: tuple[int, int] | None = None
        self.check_backend = ""
        self.reasons: list[str] = []
        self.tighter: Tensor | None = None  # [H], factor on the bounds of heads that missed them

    def saw(self, k_len: int) -> None:
        """Remember the number of keys."""
        shortest, longest = self.lengths or (k_len, k_len)
        self.lengths = (min(shortest, k_len), max(longest, k_len))


class Calibration:
    """A calibration in progress; made by :func:`calibrate`.

    Attributes:
        statistics: after it has finished, one entry per layer (see ``autotune/report.py``).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        l1: float | None,
        pv_l1: float | None,
        tail: float | None | str,
        grid: Grid,
        query_blocks: int | None,
        kept_aside: float,
        rounds: int,
        seed: int,
        checkpoint: str | os.PathLike[str] | None,
        resume: bool,
    ) -> None:
        self.model, self.modules = model, sparse_modules(model)
        for module in self.modules.values():
            module.l1 = module.l1 if l1 is None else l1
            module.pv_l1 = module.pv_l1 if pv_l1 is None else pv_l1
            module.tail = module.tail if isinstance(tail, str) else tail
            check_bounds(module.l1, module.pv_l1, module.tail)
        self.grid, self.sampler = grid, Sampler(query_blocks, seed)
        self.kept_aside, self.rounds, self.seed = kept_aside, rounds, seed
        self.checkpoint, self.resume = None if checkpoint is None else Path(checkpoint), resume
        budget = RESERVOIR_BYTES // len(self.modules)
        self.layers = [Layer(i, p, m, budget, seed) for i, (p, m) in enumerate(self.modules.items())]
        self.statistics: list[dict[str, Any]] = []
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        self.world = dist.get_world_size() if self.distributed else 1
        self._phase = "free"  # "free": calls without prompts() around them; "curves", "pv", "check", "finished"
        self._prompt = 0
        self._fitted = self._checked = 0
        self._same_calls = False

    # -- context ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Calibration:
        self._modes = [layer.module.mode for layer in self.layers]
        for layer in self.layers:
            layer.module.mode, layer.module.observer = "tune", functools.partial(self._observe, layer)
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
            for layer, mode in zip(self.layers, self._modes, strict=True):
                layer.module.observer = None
                layer.module.mode = "sparse" if self._phase == "finished" else mode

    # -- the loop ---------------------------------------------------------------------------------------------------

    def prompts(self, prompts: Sequence[Item]) -> Iterator[Item]:
        """Yield prompts to run, first all but those kept aside, then those kept aside for PV pass and check.

        Prompts are shared out over ranks by index. Finished ones of an interrupted run are skipped on resume.
        """
        items = list(prompts)
        if not items:
            raise ValueError("calibration needs at least one prompt, got none")
        if self._phase != "free":
            raise RuntimeError(f"prompts() can be used once per calibration; this one is in the {self._phase} pass")
        aside = min(len(items) - 1, max(1, round(len(items) * self.kept_aside)))
        fitted = list(range(len(items) - aside))
        checked = list(range(len(items) - aside, len(items))) or fitted  # a single prompt serves for both
        self._same_calls, self._fitted, self._checked = checked == fitted, len(fitted), len(checked)
        done = self._load_checkpoint(items)
        self._phase = "curves"
        for i in fitted:
            if i not in done and i % self.world == self.rank:
                self._begin(i)
                yield items[i]
                self._end(i, "curves")
                self._save_checkpoint(items)
        self._merge("curves")
        self._choose()
        for phase in ("pv", *["check"] * self.rounds):
            self._phase = phase
            for i in checked:
                if i % self.world == self.rank:
                    self._begin(i)
                    yield items[i]
                    self._end(i, phase)
            self._merge(phase)
            if phase == "pv":
                self._choose_pv()
            elif not self._back_off():
                break
        self._finish()

    def _begin(self, prompt: int) -> None:
        self._prompt = prompt
        for layer in self.layers:
            layer.open, layer.calls = None, 0

    def _end(self, prompt: int, phase: str) -> None:
        for layer in self.layers:
            if layer.open is None:
                raise RuntimeError(
                    f"layer {layer.path!r} saw no call of at least {layer.module.selector.block_q} queries in prompt "
                    f"{prompt}: run the model inside the loop, with prompts longer than a block"
                )
            self._add(layer, phase, layer.open.close(prompt))
            layer.open = None

    @staticmethod
    def _add(layer: Layer, phase: str, tally: Tally) -> None:
        known = getattr(layer, phase)
        if known is None:
            setattr(layer, phase, tally)
        else:
            known.merge(tally)

    # -- watching -----------------------------------------------------------------------------------------------------

    def _observe(self, layer: Layer, module: SparseAttention, q: Tensor, k: Tensor, v: Tensor, **flags: Any) -> None:
        call = Call(q, k, v, precision=module.precision, **flags)
        if module.is_sparse is None:
            module.set_heads(q.shape[1])
        layer.saw(k.shape[2])
        blocks = self.sampler.blocks(
            observe.block_count(call, module.selector.block_q), layer.index, self._prompt, layer.calls
        )
        layer.calls += 1
        if self._phase == "free":  # every call is a sample of its own
            number = layer.reservoir.seen * self.world + self.rank
            tally = PromptTally(q.shape[1], len(self.grid), q.device)
            observe.add_curves(tally, module, call, self.grid, blocks)
            self._add(layer, "curves", tally.close(number))
            layer.reservoir.offer(number, call, module.selector.block_q, blocks)
        else:
            self._watch(layer, self._phase, [call], blocks)

    def _watch(self, layer: Layer, phase: str, calls: list[Call], blocks: list[int] | None) -> None:
        """Add calls to the prompt in progress, for one phase."""
        heads, device = calls[0].q.shape[1], calls[0].q.device
        sizes = {"curves": len(self.grid), "pv": len(self.grid.pv), "check": 2}
        if layer.open is None:
            layer.open = PromptTally(heads, sizes[phase], device)
        for call in calls:
            if phase == "check":
                layer.check_backend = observe.add_check(layer.open, layer.module, call)
            else:
                add = observe.add_curves if phase == "curves" else observe.add_pv_curves
                add(layer.open, layer.module, call, self.grid, [0] if blocks is None else blocks)

    def _finish_from_reservoir(self) -> None:
        """Without a loop over prompts: PV pass and check on the calls held in the reservoir."""
        if any(layer.curves is None for layer in self.layers):
            empty = next(layer.path for layer in self.layers if layer.curves is None)
            raise RuntimeError(f"layer {empty!r} saw no call long enough to calibrate on: run the model in tune mode")
        self._fitted = max(layer.reservoir.seen for layer in self.layers)
        self._checked = min(len(layer.reservoir.calls) for layer in self.layers)
        self._same_calls = True
        self._merge("curves")
        self._choose()
        for phase in ("pv", *["check"] * self.rounds):
            for layer in self.layers:
                for number, calls in layer.reservoir.calls:
                    self._watch(layer, phase, calls, None)
                    assert layer.open is not None
                    self._add(layer, phase, layer.open.close(number))
                    layer.open = None
            self._merge(phase)
            if phase == "pv":
                self._choose_pv()
            elif not self._back_off():
                break
        self._finish()

    # -- several processes ----------------------------------------------------------------------------------------------

    def _merge(self, phase: str) -> None:
        """Add up what all ranks saw; every rank holds the sum afterwards."""
        if not self.distributed:
            return
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, [(getattr(layer, phase), layer.lengths) for layer in self.layers])
        for layer, parts in zip(self.layers, zip(*gathered, strict=True), strict=True):
            setattr(layer, phase, None)
            for tally, lengths in parts:
                if tally is not None:
                    self._add(layer, phase, tally)
                for length in lengths or ():
                    layer.saw(length)
            tally = getattr(layer, phase)
            if tally is None:
                raise RuntimeError(f"layer {layer.path!r} saw no prompt in the {phase} pass")
            if layer.module.is_sparse is None:
                layer.module.set_heads(tally.heads)

    # -- choosing ---------------------------------------------------------------------------------------------------------

    def _choose(self) -> None:
        for layer in self.layers:
            assert layer.curves is not None
            layer.tighter = torch.ones(layer.curves.heads, dtype=torch.float64)
            layer.reasons = [""] * layer.curves.heads
            self._choose_layer(layer, torch.full((layer.curves.heads,), PV_OFF))

    def _choose_layer(self, layer: Layer, pv: Tensor) -> None:
        """Thresholds of least density within the (possibly tightened) bounds."""
        curves, module = layer.curves, layer.module
        assert curves is not None and layer.tighter is not None
        tail = None if module.tail is None else module.tail * layer.tighter
        choice = choose(curves, module.l1 * layer.tighter, tail)
        pairs = torch.tensor([self.grid.pair(int(i)) for i in choice.index], dtype=torch.float64)
        sparse = choice.found & (layer.tighter > 0)
        for head in (~sparse).nonzero()[:, 0].tolist():
            layer.reasons[head] = layer.reasons[head] or "no candidate threshold holds the bounds"
        density = torch.where(sparse, curves.density().gather(1, choice.index[:, None])[:, 0], 1.0)
        values = Thresholds(
            sparse,
            torch.where(sparse, pairs[:, 1], 1.0).float(),
            torch.where(sparse, pairs[:, 0], -1.0).float(),
            torch.where(sparse, pv.double(), PV_OFF).float(),
        )
        module.set_thresholds(values, expected_density=float(density.mean()), lengths=layer.lengths)
        module.mode = "tune"

    def _choose_pv(self) -> None:
        """The PV threshold that skips most within ``pv_l1`` and ``tail``."""
        for layer in self.layers:
            module, tally = layer.module, layer.pv
            assert tally is not None
            mean = torch.full((tally.heads,), module.pv_l1, dtype=torch.float64)
            tail = None if module.tail is None else torch.full_like(mean, module.tail)
            good = within_bounds(tally, mean, tail)
            order = torch.tensor(self.grid.pv)
            lowest = torch.where(good, order, PV_OFF).amin(1)
            self._choose_layer(layer, lowest)

    def _back_off(self) -> bool:
        """Tighten the bounds of sparse heads that missed one in the check; says whether there were any.

        In the last round such heads become dense instead.
        """
        self._round = getattr(self, "_round", 0) + 1
        missed = False
        for layer in self.layers:
            module, tally = layer.module, layer.check
            assert tally is not None and layer.tighter is not None
            values = module.thresholds()
            excess = mean_error(tally)[:, 1] / module.pv_l1
            if module.tail is not None:
                excess = torch.maximum(excess, tail_error(tally)[:, 1] / module.tail)
            wrong = (excess > 1) & values.is_sparse.cpu()
            if not bool(wrong.any()):
                continue
            missed = True
            last = self._round >= self.rounds
            factor = torch.zeros_like(excess) if last else MARGIN / excess
            layer.tighter = torch.where(wrong, layer.tighter * factor, layer.tighter)
            if last:
                for head in wrong.nonzero()[:, 0].tolist():
                    layer.reasons[head] = f"missed a bound {self.rounds} times in the check with the real kernel"
            self._choose_layer(layer, torch.where(wrong, PV_OFF, values.pvthreshd.cpu()))
            if not last:
                layer.check = None
        if missed and self._round < self.rounds:
            for layer in self.layers:
                layer.check = None  # all are checked again: what they record belongs to the final thresholds
        return missed and self._round < self.rounds

    def _finish(self) -> None:
        self._phase = "finished"
        for layer in self.layers:
            self._record_density(layer)
        facts = {
            "query_blocks_per_call": self.sampler.limit,
            "prompts_fitted": self._fitted,
            "prompts_checked": self._checked,
            "checked_on_the_fitted_calls": self._same_calls,
        }
        self.statistics = [report.layer_statistics(layer, facts) for layer in self.layers]
        if self.checkpoint is not None and self.rank == 0:
            for path in self.checkpoint.parent.glob(self.checkpoint.name + ".rank*"):
                path.unlink(missing_ok=True)

    @staticmethod
    def _record_density(layer: Layer) -> None:
        assert layer.check is not None
        sparse = layer.module.thresholds().is_sparse.cpu()
        density = torch.where(sparse, layer.check.density()[:, 1], 1.0)
        layer.module.expected_density = float(density.mean())

    # -- results --------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the tuned file, and the statistics beside it as ``<name>.json`` (rank 0 only).

        Returns:
            The path of the statistics.
        """
        if self._phase != "finished":
            raise RuntimeError("nothing to save: the calibration has not finished")
        statistics = Path(path).with_suffix(".json")
        if self.rank == 0:
            state = extract_sparse_attention_state_dict(self.model)
            state["_metadata"] |= {"prompts": self._fitted + (0 if self._same_calls else self._checked)}
            save(state, path)
            report.write_statistics(self.statistics, statistics)
        return statistics

    # -- interruptions ----------------------------------------------------------------------------------------------------

    def _fingerprint(self, items: Sequence[Any]) -> str:
        """Of everything the curves depend on: a checkpoint of another calibration must not be resumed."""
        selectors = [(layer.path, repr(layer.module.selector)) for layer in self.layers]
        facts = (selectors, self.grid, self.sampler, len(items), [_digest(item) for item in items])
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def _save_checkpoint(self, items: Sequence[Any]) -> None:
        if self.checkpoint is None:
            return
        content = {
            "fingerprint": self._fingerprint(items),
            "layers": [(_plain(layer.curves), layer.lengths) for layer in self.layers],
        }
        write_atomically(content, self.checkpoint.with_name(f"{self.checkpoint.name}.rank{self.rank}"))

    def _load_checkpoint(self, items: Sequence[Any]) -> set[int]:
        """Take over the finished prompts of an interrupted run; returns their numbers."""
        if not self.resume:
            return set()
        if self.checkpoint is None:
            raise ValueError("resume=True needs checkpoint=<path>, got None")
        done: set[int] = set()
        for path in sorted(self.checkpoint.parent.glob(self.checkpoint.name + ".rank*")):
            content = load_checkpoint(path)
            if content["fingerprint"] != self._fingerprint(items):
                raise ValueError(
                    f"checkpoint {str(path)!r} belongs to another calibration (other prompts, selector, grid or "
                    "seed): delete it or run without resume"
                )
            for layer, (plain, lengths) in zip(self.layers, content["layers"], strict=True):
                if plain is None:
                    continue
                done |= set(plain["sums"])
                for length in lengths or ():
                    layer.saw(length)
                if layer.module.is_sparse is None:
                    layer.module.set_heads(plain["heads"])
                if self.rank == 0:  # the sum over ranks must count them once
                    self._add(layer, "curves", _tally(plain))
        if self.distributed:
            dist.barrier()
        return done


def _plain(tally: Tally | None) -> dict[str, Any] | None:
    """A tally as plain values, for ``torch.load(weights_only=True)``."""
    return None if tally is None else dict(vars(tally))


def _tally(plain: dict[str, Any]) -> Tally:
    tally = Tally(plain["heads"], plain["candidates"])
    for name, value in plain.items():
        setattr(tally, name, value)
    return tally


def _digest(item: Any) -> str:
    """A short name for a prompt's content."""
    if isinstance(item, Tensor):
        data = item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(data).hexdigest()
    if isinstance(item, dict):
        return repr([(key, _digest(value)) for key, value in item.items()])
    if isinstance(item, (list, tuple)):
        return repr([_digest(value) for value in item])
    return repr(item) if isinstance(item, (str, bytes, int, float, type(None))) else type(item).__name__


def calibrate(
    model: nn.Module,
    l1: float | None = None,
    pv_l1: float | None = None,
    tail: float | None | str = "module",
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
        model: a patched model; it runs dense and unchanged while it is watched.
        l1, pv_l1: bounds of the mean relative L1 error, per head; None takes the modules' own.
        tail: bound of the 99.5th percentile of one query's relative error; None switches it off, "module" takes the
            modules' own.
        grid: candidate thresholds.
        query_blocks: query blocks looked at per call, at random, for the curves; None = all. Errors are sums over
            queries, so a sample estimates them without bias; the check looks at all.
        kept_aside: share of the prompts that is kept for the PV pass and the check.
        rounds: how often heads that miss a bound in the check are tightened; then they run dense.
        seed: of the sampling of query blocks.
        checkpoint: where finished prompts are kept, so that an interrupted calibration can go on.
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


def enable_tune_mode(
    model: nn.Module, enabled: bool = True, *, verbose: bool = False, printer: Callable[[str], None] = print
) -> Calibration:
    """Tune without a loop over prompts: switch on, run the model as usual, switch off.

    Switching off chooses and checks the thresholds, on a bounded sample of the calls seen (2 GiB of host memory).

    Returns:
        The calibration; after switching off it has its statistics and can be saved.
    """
    if enabled:
        if model in _open:
            raise RuntimeError("tune mode is already on for this model")
        _open[model] = calibrate(model).__enter__()
        return _open[model]
    if model not in _open:
        raise RuntimeError("tune mode is not on for this model: enable_tune_mode(model, True) first")
    calibration = _open.pop(model)
    calibration.__exit__(None, None, None)
    if verbose:
        printer(report.table(calibration.statistics))
    return calibration
