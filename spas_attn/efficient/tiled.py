"""Attention in chunks of queries or keys: exact, with an online softmax and a backward pass that recomputes the scores.

The running maximum and sum follow Milakov and Gimelshein (arXiv 1805.02867); the backward pass is that of
FlashAttention (arXiv 2205.14135): of the forward pass only the output and the log-sum-exp are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .memory import ran_out_of_memory, release
from .problem import Problem, part


def tiled_attention(problem: Problem, rows: int, columns: int) -> Tensor:
    """Attention with at most ``rows`` queries against at most ``columns`` keys at a time; ``[B, H, Lq, D]``.

    Scores and sums are in float32 (float64 for float64). Differentiable once, in the biases too. Dropout draws one
    random stream for each tile, so that other tile sizes drop other weights.
    """
    seed = int(torch.randint(1 << 62, ())) if problem.dropout else 0
    return _Tiled.apply(
        problem.q, problem.k, problem.v, problem.mask, problem.scale, problem.dropout, seed, rows, columns,
        *problem.biases,
    )  # fmt: skip


class _Tiles:
    """The tiles of one problem: their bounds, scores and dropout."""

    def __init__(self, problem: Problem, rows: int, columns: int, seed: int) -> None:
        self.problem, self.rows, self.columns, self.seed = problem, rows, columns, seed
        self.batch, self.heads, self.q_len, self.k_len = problem.sizes
        self.bounds_q = _bounds(self.q_len, rows)
        self.bounds_k = _bounds(self.k_len, columns)

    def flat(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Rows of ``[B, H, L, D]`` as ``[B·H, rows, D]`` in the accumulator's dtype."""
        return x[:, :, start:stop].to(self.problem.accumulator).reshape(self.batch * self.heads, stop - start, -1)

    def scores(self, q: Tensor, k: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        """Scores of a tile with biases, -inf where hidden, ``[B·H, rows, columns]``; q is already scaled."""
        flat = torch.bmm(q, k.transpose(1, 2))
        scores = flat.view(self.batch, self.heads, *flat.shape[1:])
        for bias in self.problem.biases:
            scores += part(part(bias, 2, *rows), 3, *columns)
        if self.problem.mask is not None:
            scores.masked_fill_(~part(part(self.problem.mask, 2, *rows), 3, *columns), -torch.inf)
        return flat

    def keep(self, rows: tuple[int, int], columns: tuple[int, int], like: Tensor) -> Tensor | None:
        """Which weights of a tile dropout leaves, the same at every call; None without dropout."""
        if not self.problem.dropout:
            return None
        generator = torch.Generator(like.device)
        generator.manual_seed((self.seed + rows[0] * self.k_len + columns[0]) % (1 << 63))
        kept = torch.empty(like.shape, dtype=torch.bool, device=like.device)
        return kept.bernoulli_(1 - self.problem.dropout, generator=generator)

    def drop(self, x: Tensor, kept: Tensor | None) -> Tensor:
        """Dropout in place: x where kept, scaled up."""
        return x if kept is None else x.mul_(kept).div_(1 - self.problem.dropout)


def _forward_rows(tiles: _Tiles, rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Output ``[B·H, rows, D]`` and log-sum-exp ``[B·H, rows, 1]`` of some queries; 0 and +inf where none is seen."""
    problem = tiles.problem
    q = tiles.flat(problem.q, *rows) * problem.scale
    top = q.new_full((*q.shape[:2], 1), -torch.inf)
    total = torch.zeros_like(top)
    out: Tensor | None = None
    for columns in tiles.bounds_k:
        weights = tiles.scores(q, tiles.flat(problem.k, *columns), rows, columns)
        new_top = torch.maximum(top, weights.amax(-1, keepdim=True))
        shift = new_top.masked_fill(new_top == -torch.inf, 0.0)  # nothing seen so far: exp(-inf - 0) = 0
        weights.sub_(shift).exp_()
        shrink = (top - shift).exp_()
        total = total * shrink + weights.sum(-1, keepdim=True)
        tiles.drop(weights, tiles.keep(rows, columns, weights))
        values = tiles.flat(problem.v, *columns)
        out = torch.bmm(weights, values) if out is None else torch.baddbmm(out.mul_(shrink), weights, values)
        top = new_top
        del weights
    assert out is not None
    empty = total == 0
    out.div_(total.masked_fill(empty, 1.0))
    return out, (top + total.log()).masked_fill_(empty, torch.inf)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float, seed: int,
        rows: int, columns: int, *biases: Tensor,
    ) -> Tensor:  # fmt: skip
        problem = Problem(q, k, v, mask, biases, scale, dropout)
        tiles = _Tiles(problem, rows, columns, seed)
        # Made as the module takes it, [B, Lq, H, D], so that joining the heads copies nothing.
        out = q.new_empty(tiles.batch, tiles.q_len, tiles.heads, v.shape[-1]).transpose(1, 2)
        lse = q.new_empty((*q.shape[:3], 1), dtype=problem.accumulator)
        for bounds in tiles.bounds_q:
            result, sums = _forward_rows(tiles, bounds)
            out[:, :, slice(*bounds)] = result.view(tiles.batch, tiles.heads, *result.shape[1:])
            lse[:, :, slice(*bounds)] = sums.view(tiles.batch, tiles.heads, *sums.shape[1:])
            del result
        ctx.save_for_backward(q, k, v, out, lse, mask, *biases)
        ctx.settings = (scale, dropout, seed, rows, columns)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, mask, *biases = ctx.saved_tensors
        scale, dropout, seed, rows, columns = ctx.settings
        problem = Problem(q, k, v, mask, tuple(biases), scale, dropout)
        len_q, len_k = q.shape[2], k.shape[2]
        while True:
            try:
                grads = _gradients(_Tiles(problem, rows, columns, seed), ctx.needs_input_grad[9:], out, lse, grad)
                break
            except (RuntimeError, MemoryError) as error:
                # Tiles of another size would have another dropout than the forward pass had.
                if not ran_out_of_memory(error) or dropout or max(min(rows, len_q), min(columns, len_k)) == 1:
                    raise
            release(q.device)  # outside of `except`: the traceback holds the tensors that did not fit
            rows, columns = _halved(rows, columns, len_q, len_k)
        added = [None if g is None else g.to(bias.dtype) for g, bias in zip(grads.biases, biases, strict=True)]
        first = [g.to(q.dtype) for g in (grads.q, grads.k, grads.v)]
        return (*first, None, None, None, None, None, None, *added)


class _Gradients:
    """Sums of gradients in the accumulator's dtype, each in the shape of its input: a bias stays unexpanded."""

    def __init__(self, tiles: _Tiles, wanted: tuple[bool, ...]) -> None:
        problem, dtype = tiles.problem, tiles.problem.accumulator
        self.q, self.k, self.v = (
            torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (problem.q, problem.k, problem.v)
        )
        self.biases = [
            torch.zeros(bias.shape, dtype=dtype, device=bias.device) if want else None
            for bias, want in zip(problem.biases, wanted, strict=True)
        ]


def _gradients(tiles: _Tiles, wanted: tuple[bool, ...], out: Tensor, lse: Tensor, grad: Tensor) -> _Gradients:
    grads = _Gradients(tiles, wanted)
    for bounds in tiles.bounds_q:
        _backward_rows(tiles, grads, bounds, out, lse, grad)
    return grads


def _halved(rows: int, columns: int, q_len: int, k_len: int) -> tuple[int, int]:
    """Tiles of half the size: the side that is cut already is cut further, down to 1, then the other one."""
    rows, columns = min(rows, q_len), min(columns, k_len)
    cut_rows = rows > 1 and (rows < q_len or columns == k_len or columns == 1)
    return (rows // 2, columns) if cut_rows else (rows, columns // 2)


def _backward_rows(
    tiles: _Tiles, grads: _Gradients, rows: tuple[int, int], out: Tensor, lse: Tensor, grad: Tensor
) -> None:
    """Add what some queries contribute to all gradients."""
    problem, split = tiles.problem, (tiles.batch, tiles.heads)
    q = tiles.flat(problem.q, *rows) * problem.scale
    grad_out = tiles.flat(grad, *rows)
    delta = (grad_out * tiles.flat(out, *rows)).sum(-1, keepdim=True)
    sums = tiles.flat(lse, *rows)
    for columns in tiles.bounds_k:
        k, v = tiles.flat(problem.k, *columns), tiles.flat(problem.v, *columns)
        weights = tiles.scores(q, k, rows, columns).sub_(sums).exp_()
        kept = tiles.keep(rows, columns, weights)
        grad_weights = tiles.drop(torch.bmm(grad_out, v.transpose(1, 2)), kept)
        grad_scores = grad_weights.sub_(delta).mul_(weights)
        weights = tiles.drop(weights, kept)
        at = slice(*columns)
        grads.v[:, :, at] += torch.bmm(weights.transpose(1, 2), grad_out).unflatten(0, split)
        del weights
        grads.k[:, :, at] += torch.bmm(grad_scores.transpose(1, 2), q).unflatten(0, split)
        grads.q[:, :, slice(*rows)] += torch.bmm(grad_scores, k).unflatten(0, split).mul_(problem.scale)
        for total in grads.biases:
            if total is not None:
                at_bias = part(part(total, 2, *rows), 3, *columns)
                at_bias += grad_scores.unflatten(0, split).sum_to_size(at_bias.shape)
        del grad_scores, grad_weights


def _bounds(length: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, length)) for start in range(0, length, size)]
