"""Which way computes a Problem: what the call needs, the memory there is, and what to do when that was not enough."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

from torch import Tensor

from ..selectors import Selector
from . import memory
from .problem import Problem
from .ways import WAYS, Way, dense_bytes

log = logging.getLogger("spas_attn.efficient_attention")

SHARE = 0.9  # of the free memory that a computation may plan with
_SMALL = 64 << 20  # bytes; less than this is not compared with the free memory, whose query takes longer than it would
_FEW = 16  # queries; chunks of fewer waste the matrix products, and chunks of keys serve better


@dataclass(frozen=True)
class Report:
    """What ran (or would run), and why.

    Attributes:
        backend: the way of computing.
        reason: why this one.
        chunk: how many queries or keys it takes at once, None without chunks.
        estimate: bytes beyond its inputs that it was expected to need.
        dense: bytes of the whole score matrix, B·H·Lq·Lk·bytes.
        free: bytes that were free, None when nobody looked.
        declined: why the others do not run, by name.
        retries: how often memory ran out before it succeeded.
    """

    backend: str
    reason: str
    chunk: int | None
    estimate: int
    dense: int
    free: int | None = None
    declined: dict[str, str] = field(default_factory=dict)
    retries: int = 0

    def __str__(self) -> str:
        chunk = "" if self.chunk is None else f", {self.chunk} at once"
        free = "" if self.free is None else f" of {_mib(self.free)} free"
        first = f"backend {self.backend}{chunk}: {self.reason} (adds about {_mib(self.estimate)}{free}"
        first += f"; all scores would be {_mib(self.dense)})"
        if self.retries:
            first += f", after memory ran out {self.retries} times"
        return "\n".join([first, *(f"  not {name}: {why}" for name, why in self.declined.items())])


class Chooser:
    """Chooses and runs; remembers for each shape what memory was not enough for."""

    def __init__(self, backend: str, chunk_size: int, flash_first: bool, selector: Selector | None) -> None:
        self.backend, self.chunk_size, self.flash_first, self.selector = backend, chunk_size, flash_first, selector
        self.remembered: dict[tuple[object, ...], tuple[str, int]] = {}
        self._logged: set[object] = set()

    def choose(self, problem: Problem) -> Report:
        """How a problem is computed.

        Raises:
            ValueError: when a backend was asked for by name that cannot compute it.
        """
        known = self.remembered.get(_key(problem))
        if known is not None:
            reason = "more did not fit in memory at this shape before"
            return self._report(problem, WAYS[known[0]], reason, known[1], None, {})
        if self.backend != "auto":
            return self._by_name(problem, WAYS[self.backend])
        return self._automatic(problem)

    def run(self, problem: Problem) -> tuple[Tensor, Report]:
        """Compute a problem; where memory runs out, in smaller and smaller chunks."""
        report, retries = self.choose(problem), 0
        while True:
            failure = None
            try:
                out = WAYS[report.backend].run(problem, report.chunk or 0, self.selector)
            except (RuntimeError, MemoryError) as error:
                smaller = self._smaller(problem, report) if memory.ran_out_of_memory(error) else None
                if smaller is None:
                    raise
                failure = str(error).split("\n")[0]
            if failure is None:
                break
            # Outside of `except`: the error's traceback holds the tensors that did not fit.
            memory.release(problem.q.device)
            retries += 1
            assert smaller is not None
            report = replace(smaller, retries=retries)
        if retries:
            self._remember(problem, report)
        self._log_choice(report)
        return out, report

    def _by_name(self, problem: Problem, way: Way) -> Report:
        why = way.refuses(problem, self.selector)
        if why is not None:
            raise ValueError(f"backend={way.name!r} cannot compute this call: {why}; backend='auto' chooses another")
        chunk, free = self._chunk(problem, way)
        return self._report(problem, way, "asked for by name", chunk, free, {})

    def _automatic(self, problem: Problem) -> Report:
        declined: dict[str, str] = {}
        free: int | None = None
        for name in (*(["block_sparse"] if self.selector else []), *(["flash"] if self.flash_first else []), "sdpa"):
            way = WAYS[name]
            why = way.refuses(problem, self.selector)
            if why is None:
                need = way.adds(problem, 0)
                if need > _SMALL and free is None:
                    free = memory.free_memory(problem.q.device)
                if free is None or need <= SHARE * free:
                    reasons = {"block_sparse": "a selector is given", "flash": "use_flash_attention=True"}
                    reason = reasons.get(name, "the first exact way that serves the call and fits in memory")
                    return self._report(problem, way, reason, 0, free, declined)
                why = f"it would add {_mib(need)}, and {_mib(free)} are free"
            declined[name] = why
        queries, keys = WAYS["chunked_queries"], WAYS["chunked_keys"]
        chunk, free = self._chunk(problem, queries)
        if chunk >= min(_FEW, problem.sizes[2]) and self._fits(problem, queries, chunk, free):
            return self._report(problem, queries, "the largest chunk that fits in memory", chunk, free, declined)
        declined[queries.name] = f"even {min(_FEW, problem.sizes[2])} queries against all keys do not fit in memory"
        chunk, free = self._chunk(problem, keys)
        return self._report(problem, keys, "the largest chunk that fits in memory", chunk, free, declined)

    def _chunk(self, problem: Problem, way: Way) -> tuple[int, int | None]:
        """The largest chunk that fits in free memory, at most ``chunk_size``; and that memory, where it was asked."""
        if not way.chunked:
            return 0, None
        most = min(self.chunk_size, problem.sizes[way.chunked])
        if way.adds(problem, most) <= _SMALL:
            return most, None
        free = memory.free_memory(problem.q.device)
        return largest_chunk(problem, way, most, int(SHARE * free)), free

    def _fits(self, problem: Problem, way: Way, chunk: int, free: int | None) -> bool:
        return free is None or way.adds(problem, chunk) <= SHARE * free

    def _smaller(self, problem: Problem, failed: Report) -> Report | None:
        """What to try after memory ran out: always something that needs less; None when there is nothing."""
        way = WAYS[failed.backend]
        if way.chunked and failed.chunk is not None and failed.chunk > 1:
            return self._report(problem, way, failed.reason, failed.chunk // 2, failed.free, failed.declined)
        if self.backend != "auto" or way.name == "chunked_keys":
            return None
        declined = failed.declined | {way.name: "memory ran out"}
        if way.name == "chunked_queries":
            keys = WAYS["chunked_keys"]
            chunk = largest_chunk(problem, keys, self.chunk_size, failed.estimate // 2)
            if keys.adds(problem, chunk) >= failed.estimate:
                return None
            return self._report(problem, keys, "memory ran out for one query", chunk, failed.free, declined)
        queries = WAYS["chunked_queries"]
        # Never more than half of the score matrix, whatever the memory looks like now.
        most = min(self.chunk_size, -(-problem.sizes[2] // 2))
        chunk = largest_chunk(problem, queries, most, int(SHARE * memory.free_memory(problem.q.device)))
        return self._report(problem, queries, "in chunks, because memory ran out", chunk, failed.free, declined)

    def _report(
        self, problem: Problem, way: Way, reason: str, chunk: int, free: int | None, declined: dict[str, str]
    ) -> Report:
        estimate, dense = way.adds(problem, chunk), dense_bytes(problem)
        return Report(way.name, reason, chunk if way.chunked else None, estimate, dense, free, declined)

    def _remember(self, problem: Problem, report: Report) -> None:
        key = _key(problem)
        if key not in self.remembered:
            log.warning("memory ran out; %s", report)
        self.remembered[key] = (report.backend, report.chunk or 0)

    def _log_choice(self, report: Report) -> None:
        signature = (report.backend, *sorted(report.declined))
        if signature not in self._logged:
            self._logged.add(signature)
            log.info("%s", report)


def largest_chunk(problem: Problem, way: Way, most: int, budget: int) -> int:
    """The largest chunk (1 to ``most``) whose estimate is within the budget, 1 when none is; rounded down to 64s."""
    if way.adds(problem, most) <= budget:
        return most
    low, high = 1, most  # the estimate rises with the chunk
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if way.adds(problem, middle) <= budget else (low, middle - 1)
    return low // 64 * 64 if low > 64 else low


def _key(problem: Problem) -> tuple[object, ...]:
    shapes = tuple(tuple(x.shape) for x in (problem.q, problem.k, *problem.biases))
    masked = None if problem.mask is None else tuple(problem.mask.shape)
    return shapes, masked, problem.q.dtype, problem.q.device, problem.grad, problem.dropout > 0


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def is_name(backend: object) -> bool:
    """Whether a backend of EfficientAttention has this name."""
    return isinstance(backend, str) and (backend == "auto" or backend in WAYS)
