"""The watcher of a calibration: shows the calls of a model's layers to the pass in progress."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from spas_attn import fallback_counts
from spas_attn.call import Call

from .conditions import float32
from .layer import NO_MEMORY, SKIPPED_STEP, Layer
from .passes import FreePass, Pass
from .paths import transformers_of
from .rerun import Repeater
from .roll_call import RollCall
from .sampling import Sampler, Steps
from .work import Work

NOT_FINITE = "it got values that are not finite (NaN or infinity)"


class Watcher:
    """Shows calls to a pass, and knows of the prompt in progress why it cannot count.

    Args:
        model: whose layers are watched.
        work: what all passes share.
        current: the pass in progress, None when the calibration has finished.
        sampler, steps: which query blocks of a call, and which steps of a prompt, are looked at.
        skip_not_finite: leave prompts out in which a layer gets NaN or infinity, instead of raising.

    Attributes:
        units: the layers, with phases several in a row for one module, by module.
        prompt: number of the prompt in progress.
        problem: why it cannot count.
    """

    def __init__(
        self, model: Any, work: Work, current: Pass, sampler: Sampler, steps: Steps, skip_not_finite: bool
    ) -> None:
        self.model, self.work, self.sampler, self.steps = model, work, sampler, steps
        self.current: Pass | None = current
        self.skip_not_finite = skip_not_finite
        count, layers = work.phases.count, work.layers
        self.units = [layers[i : i + count] for i in range(0, len(layers), count)]
        self.prompt = 0
        self.problem: str | None = None
        self._fallbacks: Counter[str] = Counter()
        self._repeaters: list[Repeater] = []

    def begin(self, stack: contextlib.ExitStack) -> None:
        """Hook into the model until ``stack`` closes."""
        if self.work.world > 1:
            self.work.roll_call = RollCall(self.work.rank, self.work.world)
            stack.push(self._leave)
        parts = [part for _, part in transformers_of(self.model)]
        for part in parts if self.steps.every > 1 else []:
            stack.callback(part.register_forward_pre_hook(self.steps.begin, with_kwargs=True).remove)
        for part in parts if self.work.sensitivity else []:
            inside = set(part.modules())
            repeater = Repeater([layer for layer in self.work.layers if layer.module in inside], self._expect)
            self._repeaters.append(repeater)
            stack.callback(part.register_forward_pre_hook(repeater.before, with_kwargs=True).remove)
            stack.callback(part.register_forward_hook(repeater.after, with_kwargs=True).remove)
        for units in self.units:
            module = units[0].module
            stack.callback(setattr, module, "observer", None)
            module.mode, module.observer = "tune", functools.partial(self._observe, units)
        self._fallbacks = Counter(fallback_counts())

    def begin_prompt(self, prompt: int) -> None:
        """The calls to come are those of a prompt."""
        self.prompt, self.problem = prompt, None
        if self.work.roll_call is not None and self.current is not None:
            self.work.roll_call.at(f"prompt {prompt} of the {self.current.name} pass")
        self._fallbacks = Counter(fallback_counts())
        self.steps.restart()
        for repeater in self._repeaters:
            repeater.restart()
            repeater.compare = self.current.compare if self.current is not None and self.current.compares else None
        for layer in self.work.layers:
            layer.calls, layer.unseen = 0, Counter()

    def _leave(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        assert self.work.roll_call is not None
        early = None if self.current is None else RuntimeError("the loop over prompts ended early")
        self.work.roll_call.leave(error or early)
        self.work.roll_call = None

    def blind(self) -> list[Layer]:
        """A layer of every module of which nothing was looked at in the prompt in progress."""
        return [units[0] for units in self.units if sum(x.calls - x.unseen[NO_MEMORY] for x in units) <= 0]

    def cause(self, layer: Layer) -> str:
        """Why a layer saw nothing."""
        fallbacks = Counter(fallback_counts()) - self._fallbacks
        return f"layer {layer.path!r} saw nothing to calibrate on: {layer.why_unseen(self.steps.every, fallbacks)}"

    def _expect(self, expected: bool) -> None:
        if self.current is not None:
            self.current.expected = expected

    def _observe(self, units: Sequence[Layer], call: Call | str) -> None:
        if self.current is None:
            return
        if isinstance(call, str):
            units[0].unseen[call] += 1
        elif not self.steps.wanted(sum(layer.calls for layer in units) + units[0].unseen[SKIPPED_STEP]):
            units[0].unseen[SKIPPED_STEP] += 1
        elif self.problem is None:
            self._see(self.current, self.work.phases.choose(units), call)

    def _see(self, current: Pass, layer: Layer, call: Call) -> None:
        where = f"call {layer.calls} of layer {layer.path!r} in prompt {self.prompt}"
        if not bool(torch.stack([x.isfinite().all() for x in (call.q, call.k, call.v)]).all()):
            if not self.skip_not_finite:
                raise ValueError(
                    f"{where}: {NOT_FINITE}; leave the prompt out (skip_not_finite=True does), or find out where in "
                    "the model they begin"
                )
            if not isinstance(current, FreePass):  # there a call stands for itself
                self.problem = f"{where}: {NOT_FINITE}"
            return
        module = layer.module
        if module.heads is None:
            module.set_heads(call.q.shape[1])
        layer.note(call)
        blocks = self.sampler.blocks(call, module.selector.block_q, layer.index, self.prompt, layer.calls)
        layer.calls += 1
        with float32(call.q.device.type):
            current.observe(layer, call, blocks)
