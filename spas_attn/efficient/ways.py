"""The ways of computing a Problem: what each refuses, what memory it adds, how it runs."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..attention import attend
from ..call import Call
from ..checks import DTYPES, HEAD_DIMS
from ..plan import plan
from ..selectors import Selector
from .problem import Problem, to_dtype
from .tiled import tiled_attention

_STAGED = 384 << 20  # bytes; what PyTorch's sum over broadcast dimensions held at most beside the sum (measured, H100)
_ALIGNED = 8  # elements; masks with other strides are copied by the memory-efficient kernel's caller
_MATH = 0  # torch.nn.attention.SDPBackend.MATH, without importing that module


@dataclass(frozen=True)
class Way:
    """One way of computing attention.

    Attributes:
        name: the name users give.
        refuses: (problem, selector) -> why it cannot compute this, or None.
        adds: (problem, chunk) -> bytes beyond its inputs at the peak, output and a backward pass included.
        run: (problem, chunk, selector) -> ``[B, H, Lq, D]``.
        chunked: 2 when chunks are of queries, 3 of keys (the dimension of the scores), 0 when there are none.
    """

    name: str
    refuses: Callable[[Problem, Selector | None], str | None]
    adds: Callable[[Problem, int], int]
    run: Callable[[Problem, int, Selector | None], Tensor]
    chunked: int = 0


def dense_bytes(problem: Problem) -> int:
    """The score matrix in the accumulator's dtype: B·H·Lq·Lk·bytes."""
    batch, heads, q_len, k_len = problem.sizes
    return batch * heads * q_len * k_len * problem.accumulator.itemsize


def _output(problem: Problem) -> int:
    """Output and log-sum-exp; with a backward pass also the gradients of q, k, v and of the output."""
    q, item = problem.q, problem.q.dtype.itemsize
    grads = (2 * q.numel() + problem.k.numel() + problem.v.numel()) * item if problem.grad else 0
    return q.numel() * item + q.numel() // q.shape[-1] * 4 + grads


def _learned(problem: Problem) -> int:
    """The gradients of the biases."""
    return sum(b.numel() * b.dtype.itemsize for b in problem.biases if b.requires_grad) if problem.grad else 0


def _restricted(problem: Problem) -> bool:
    """Whether a mask or a bias is given."""
    return problem.mask is not None or bool(problem.biases)


def _never(problem: Problem, selector: Selector | None) -> str | None:
    return None


# --- SDPA -------------------------------------------------------------------------------------------------------------


def _merged(problem: Problem) -> tuple[Tensor | None, Tensor | None]:
    """Mask and biases as SDPA takes them, one tensor, and the rows that see nothing, bool ``[..., Lq or 1, 1]``.

    Those rows are let see everything and set to 0 afterwards: what SDPA gives for them differs from kernel to kernel,
    and some kernels give them NaN as gradients. One of the two alone keeps its broadcast dimensions; on a GPU not that
    of the keys, because the memory-efficient kernel refuses a stride of 0 there.
    """
    if not problem.biases:
        if problem.mask is None:
            return None, None
        empty = ~problem.mask.any(-1, keepdim=True)
        return problem.mask | empty, empty
    total = problem.biases[0]
    if len(problem.biases) > 1:
        total = to_dtype(sum(b.to(problem.accumulator) for b in problem.biases), problem.q.dtype)  # type: ignore[arg-type]
    if problem.mask is not None:
        total = torch.where(problem.mask, total, -torch.inf)
    empty = (total.detach() == -torch.inf).all(-1, keepdim=True)
    total = torch.where(empty, 0.0, total)
    keys = _merged_shape(problem)[-1]
    if total.shape[-1] != keys:
        total = total.expand(*total.shape[:3], keys).contiguous()
    return total, empty


def _run_sdpa(problem: Problem, chunk: int, selector: Selector | None) -> Tensor:
    merged, empty = _merged(problem)
    out = F.scaled_dot_product_attention(
        problem.q, problem.k, problem.v, attn_mask=merged, dropout_p=problem.dropout, scale=problem.scale
    )
    return out if empty is None else out.masked_fill(empty, 0.0)


def _merged_shape(problem: Problem) -> torch.Size:
    """The shape of the merged mask; of no elements when nothing is given."""
    given = [x.shape for x in (problem.mask, *problem.biases) if x is not None]
    if not given:
        return torch.Size((0,))
    shape = torch.broadcast_shapes(*given)
    return shape if problem.q.device.type == "cpu" else torch.Size((*shape[:3], problem.sizes[3]))


def _merging(problem: Problem) -> int:
    """What :func:`_merged` holds at its peak."""
    item, numel = problem.q.dtype.itemsize, _merged_shape(problem).numel()
    if not problem.biases:
        return numel * (1 + item)  # SDPA makes it additive
    if len(problem.biases) > 1:
        wide = problem.accumulator.itemsize
        return 2 * numel * wide + max(b.numel() for b in problem.biases) * wide
    return numel * (item + 1 if problem.mask is None else 2 * item)


def _sdpa_is_fused(problem: Problem) -> bool:
    """Whether SDPA takes a kernel that never holds all scores; PyTorch says which one it would take."""
    stand_in = None  # of the merged mask's shape, without its memory; PyTorch asks for neighbours in the last dimension
    if _restricted(problem):
        shape, learned = _merged_shape(problem), any(b.requires_grad for b in problem.biases)
        dtype = problem.q.dtype if problem.biases else torch.bool
        row = problem.q.new_empty(shape[-1], dtype=dtype, requires_grad=learned and torch.is_grad_enabled())
        stand_in = row.expand(shape)
    choice = torch._fused_sdp_choice(
        problem.q, problem.k, problem.v, attn_mask=stand_in, dropout_p=problem.dropout, scale=problem.scale
    )
    return choice != _MATH


def _sdpa_adds(problem: Problem, chunk: int) -> int:
    item, total = problem.q.dtype.itemsize, _output(problem)
    restricted, merging = _restricted(problem), _merging(problem)
    if restricted:  # setting rows without keys to 0 copies the output, and its gradient
        total += problem.q.numel() * item * (2 if problem.grad else 1)
    if not _sdpa_is_fused(problem):
        scores = 4 if problem.grad else 3 if restricted else 2
        return total + max(scores * dense_bytes(problem), merging + _learned(problem))
    if problem.grad:
        total += problem.q.numel() * 4  # its float32 sums
    merged, learned = _merged_shape(problem).numel(), _learned(problem)
    if problem.q.device.type != "cpu" and problem.sizes[3] % _ALIGNED:
        merging += merged * item * (2 if learned else 1)
    if learned:  # the kernel writes the gradient of the bias for all heads and queries, whatever was broadcast
        whole = dense_bytes(problem) // problem.accumulator.itemsize
        staged = min(whole * item // 4, _STAGED) if merged < whole else 0
        total += learned + whole * item + staged
    return total + merging


# --- flash ------------------------------------------------------------------------------------------------------------


@functools.cache
def _flash_attn_2() -> Callable[..., Tensor] | None:
    """``flash_attn_func`` of the package flash-attn 2, or None."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    try:
        return importlib.import_module("flash_attn").flash_attn_func
    except (ImportError, AttributeError):  # only version 4, or built for another PyTorch
        return None


def _library_flash(problem: Problem) -> tuple[str | None, str | None]:
    """(this library's backend that computes the problem densely, None), or (None, why none does)."""
    if problem.grad:
        return None, "this library's kernels have no backward pass without a block mask"
    if problem.dropout:
        return None, "this library's kernels have no dropout"
    if problem.q.dtype not in DTYPES or not HEAD_DIMS[0] <= problem.q.shape[-1] <= HEAD_DIMS[1]:
        return None, f"this library's kernels take head dims 16 to 256 of fp16, bf16 and fp32, not {problem.q.dtype}"
    call, whys = _call(problem), []
    for name in ("flash", "triton"):
        backend = backends.get(name)
        why = backend.missing() or backend.declines(call)
        if why is None:
            return name, None
        whys.append(f"{name}: {why}")
    return None, "; ".join(whys)


def _package_refuses(problem: Problem) -> str | None:
    if problem.mask is not None:
        return "flash-attn takes no mask"
    if problem.q.device.type != "cuda" or problem.q.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn computes fp16 and bf16 on CUDA, not {problem.q.dtype} on {problem.q.device.type}"
    if problem.q.shape[-1] > 256 or problem.q.shape[-1] % 8:
        return f"flash-attn takes head dims up to 256, multiples of 8, not {problem.q.shape[-1]}"
    return None if _flash_attn_2() is not None else "flash-attn 2 is not installed (pip install flash-attn)"


def _flash_refuses(problem: Problem, selector: Selector | None) -> str | None:
    if problem.biases:
        return "flash kernels take no bias and no floating mask"
    if problem.mask is not None and problem.key_mask is None:
        return "flash kernels take key padding only, no mask of single queries or heads"
    package = _package_refuses(problem)
    name, why = _library_flash(problem)
    return None if package is None or name is not None else f"{package}; {why}"


def _run_flash(problem: Problem, chunk: int, selector: Selector | None) -> Tensor:
    function = _flash_attn_2()
    if _package_refuses(problem) is None and function is not None:
        q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))
        return function(q, k, v, dropout_p=problem.dropout, softmax_scale=problem.scale).transpose(1, 2)
    name, why = _library_flash(problem)
    assert name is not None, why
    return backends.get(name).run(_call(problem))


def _call(problem: Problem) -> Call:
    return Call.make(problem.q, problem.k, problem.v, scale=problem.scale, attn_mask=problem.key_mask)


def _flash_adds(problem: Problem, chunk: int) -> int:
    sums = 2 * problem.q.numel() * 4 if problem.grad else 0
    return _output(problem) + sums


# --- chunks, standard, sparse -----------------------------------------------------------------------------------------


def _tile_bytes(problem: Problem, rows: int, columns: int) -> int:
    """What :func:`tiled_attention` adds: its tiles, the pieces of q, k and v in them, its output and gradients."""
    batch, heads, q_len, k_len = problem.sizes
    dim, item = problem.q.shape[-1], problem.accumulator.itemsize
    rows, columns = min(rows, q_len), min(columns, k_len)
    tile = batch * heads * rows * columns
    pieces = batch * heads * dim * item
    # Forward: weights; the piece of q, its output and a product; pieces of k and v, and a copy to turn them.
    total = tile * item + pieces * (4 * rows + 2 * columns)
    hidden = 0 if problem.mask is None else tile // (batch * heads) * problem.mask.shape[0] * problem.mask.shape[1]
    dropped = 2 * tile if problem.dropout else 0
    if problem.grad:  # weights and their gradients; sums in the accumulator's dtype
        total = 2 * tile * item + pieces * (5 * rows + 4 * columns)
        total += (problem.q.numel() + problem.k.numel() + problem.v.numel()) * item
        total += _learned(problem) + sum(b.numel() * item for b in problem.biases if b.requires_grad)
        if any(b.requires_grad and b.numel() < dense_bytes(problem) // item for b in problem.biases):
            total += tile * item // 2
    return total + hidden + dropped + _output(problem)


def _standard_adds(problem: Problem, chunk: int) -> int:
    # Gradients of biases are those of scores, or sums of them.
    scores = 4 if problem.grad else 3 if _restricted(problem) else 2
    return _output(problem) + dense_bytes(problem) * scores + _widened(problem)


def _widened(problem: Problem) -> int:
    if problem.q.dtype == problem.accumulator:
        return 0
    return (problem.q.numel() * 2 + problem.k.numel() + problem.v.numel()) * problem.accumulator.itemsize


def _run_standard(problem: Problem, chunk: int, selector: Selector | None) -> Tensor:
    q, k, v = (x.to(problem.accumulator) for x in (problem.q, problem.k, problem.v))
    scores = (q * problem.scale) @ k.transpose(-1, -2)
    for bias in problem.biases:
        scores = scores + bias
    if problem.mask is not None:
        scores = scores.masked_fill(~problem.mask, -torch.inf)
    if problem.mask is None and not problem.biases:
        weights = scores.softmax(-1)
    else:
        empty = (scores.detach() == -torch.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    weights = F.dropout(weights, problem.dropout)
    return (weights @ v).to(problem.q.dtype)


def _sparse_refuses(problem: Problem, selector: Selector | None) -> str | None:
    if selector is None:
        return "no selector is given, and without one blocks are not chosen"
    if problem.biases:
        return "block-sparse kernels take no bias and no floating mask"
    if problem.mask is not None and problem.key_mask is None:
        return "block-sparse kernels take key padding only, no mask of single queries or heads"
    if problem.dropout:
        return "block-sparse kernels have no dropout of attention weights"
    if problem.grad:
        return "there is no backward pass through a selection of blocks"
    if problem.q.dtype not in DTYPES or not HEAD_DIMS[0] <= problem.q.shape[-1] <= HEAD_DIMS[1]:
        return f"block-sparse kernels take head dims 16 to 256 of fp16, bf16 and fp32, not {problem.q.dtype}"
    return plan(_call(problem), selector).fallback


def _sparse_adds(problem: Problem, chunk: int) -> int:
    batch, heads, q_len, k_len = problem.sizes
    size, copies = 128, 0
    if problem.q.device.type == "cpu":
        size, copies = 64, 2 * (problem.q.numel() + problem.k.numel() + problem.v.numel())  # in float32, as measured
    grid = batch * heads * -(-q_len // size) * -(-k_len // size)
    return _output(problem) + 16 * grid + 4 * copies


def _run_sparse(problem: Problem, chunk: int, selector: Selector | None) -> Tensor:
    return attend(_call(problem), selector, strict=True)[0]


WAYS = {
    way.name: way
    for way in (
        Way("block_sparse", _sparse_refuses, _sparse_adds, _run_sparse),
        Way("flash", _flash_refuses, _flash_adds, _run_flash),
        Way("sdpa", _never, _sdpa_adds, _run_sdpa),
        Way(
            "chunked_queries",
            _never,
            lambda problem, chunk: _tile_bytes(problem, chunk, problem.sizes[3]),
            lambda problem, chunk, selector: tiled_attention(problem, chunk, problem.sizes[3]),
            chunked=2,
        ),
        Way(
            "chunked_keys",
            _never,
            lambda problem, chunk: _tile_bytes(problem, problem.sizes[2], chunk),
            lambda problem, chunk, selector: tiled_attention(problem, problem.sizes[2], chunk),
            chunked=3,
        ),
        Way("standard", _never, _standard_adds, _run_standard),
    )
}
