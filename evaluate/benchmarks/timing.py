"""Times: medians of calls on a GPU or CPU, and what the times belong to."""

from __future__ import annotations

import platform
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from registry import Runs

LONG = 50.0  # milliseconds
PACKAGES = ("triton", "flash-attn-4", "nvidia-cudnn-frontend", "sageattention", "spas_sage_attn")


class Clock:
    """Starts when it is made; on a GPU it measures on the GPU's own time line, and only :meth:`ms` waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * (device.type == "cuda"))]
        self.begin = self.end = time.perf_counter()
        if self.events:
            self.events[0].record()

    def stop(self) -> None:
        """End the time."""
        self.end = time.perf_counter()
        if self.events:
            self.events[1].record()

    def ms(self) -> float:
        """The milliseconds, after :meth:`stop`."""
        if not self.events:
            return 1e3 * (self.end - self.begin)
        self.events[1].synchronize()
        return self.events[0].elapsed_time(self.events[1])


def medians(runs: Sequence[Runs], device: torch.device, ms: float, turns: int) -> list[dict[str, float]]:
    """Median milliseconds of every part of every run, by column.

    Single calls on a GPU are repeated for about ``ms`` milliseconds each, with the second-level cache flushed before
    every call; parts of a call as CUDA graphs where they can be captured. Elsewhere the runs take turns, so that a
    disturbance hits them alike: at least ``turns`` turns, and as many as last ``ms`` milliseconds for each run on
    average.
    """
    if device.type == "cuda" and not any(run.within for run in runs):
        from triton.testing import do_bench

        def bench(run: Runs, column: str, call: Callable[[], object]) -> float:
            run.before()
            call()
            # A part runs without the plans of a whole call, and its launches would count for more than its kernels.
            graph = None if column == "ms_total" else _captured(call)
            call = call if graph is None else graph.replay
            clock = Clock(device)
            call()
            clock.stop()
            if clock.ms() > 5 * ms:  # do_bench would call it eight times
                return clock.ms()
            return float(do_bench(call, warmup=max(1, int(ms / 5)), rep=ms, return_mode="median"))

        return [{column: bench(run, column, call) for column, call in run.parts.items()} for run in runs]
    taken: list[dict[str, list[float]]] = [defaultdict(list) for _ in runs]
    turn, began = -1, time.perf_counter()
    while turn < turns or 1e3 * (time.perf_counter() - began) < ms * len(runs):
        for run, times in zip(runs, taken, strict=True):
            for column, call in run.parts.items():
                run.before()
                clock = Clock(device)
                call()
                clock.stop()
                times[column].append(clock.ms())
            for column, read in run.within.items():
                times[column].append(read())
        turn += 1
    # The first turn warms up.
    return [{column: statistics.median(values[1:]) for column, values in times.items()} for times in taken]


def call_facts(call: Callable[[], object], ms: float) -> dict[str, Any]:
    """What a time on the GPU does not tell of a call, by column: host time, launches, graph replay and memory.

    The host time is the median of calls that do not wait for the GPU. A call that cannot be captured has no graph. Of
    calls that take longer than ``LONG`` milliseconds, whose host time is nothing, there is the memory alone.
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    clock = Clock(torch.device("cuda"))
    call()
    clock.stop()
    facts: dict[str, Any] = {"peak_MiB": (torch.cuda.max_memory_allocated() - before) / 2**20}
    if clock.ms() > LONG:
        return facts
    facts["us_host"] = _host_us(call)
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    kinds = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    facts["launches"] = len([event for event in kinds if not event.name.startswith("Mem")])
    graph = _captured(call)
    if graph is not None:
        from triton.testing import do_bench

        facts["ms_graph"] = do_bench(graph.replay, warmup=max(1, int(ms / 5)), rep=ms, return_mode="median")
    return facts


def _host_us(call: Callable[[], object], calls: int = 8, turns: int = 9) -> float:
    """Median microseconds until a call returns, in short rows of calls that the launch queue holds."""
    times = []
    for _ in range(turns):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - began) / calls * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)


def _captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
    """The call as a CUDA graph; None where something in it cannot be captured."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    try:
        with torch.cuda.stream(side):
            call()
        side.synchronize()
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


def device_name(device: torch.device) -> str:
    """What the times belong to: the GPU, or the CPU with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> str:
    """Versions of what the times depend on, as one line."""
    found = [f"torch {torch.__version__}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return "; ".join(found)
