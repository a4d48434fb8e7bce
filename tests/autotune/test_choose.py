"""Choosing: limits against brute force, and the promise that chosen thresholds hold on new prompts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from autotune.accumulate import BINS, PromptTally, Tally
from autotune.choose import choose, mean_error, mean_limit, tail_error, tail_share_limit, within_bounds

STEP = 10 ** (5 / BINS)  # ratio of the edges of a bin


def tally_of(errors: list[Tensor], norms: list[Tensor] | None = None, kept: Tensor | None = None) -> Tally:
    """From relative errors ``[H, candidates, queries]`` of each prompt; ``kept`` are blocks out of 100."""
    total: Tally | None = None
    for prompt, relative in enumerate(errors):
        heads, candidates, queries = relative.shape
        norm = torch.ones(heads, queries) if norms is None else norms[prompt]
        open_tally = PromptTally(heads, candidates)
        valid = torch.ones(1, heads, queries, dtype=torch.bool)
        open_tally.add_errors(slice(None), (relative * norm[:, None])[None], norm[None], valid)
        blocks = torch.arange(candidates).expand(heads, -1) if kept is None else kept.expand(heads, -1)
        open_tally.add_blocks(slice(None), blocks, torch.full((heads,), 100))
        tally = open_tally.close(prompt)
        if total is None:
            total = tally
        else:
            total.merge(tally)
    assert total is not None
    return total


def sample(prompts: int, heads: int = 2, candidates: int = 3, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Log-normal errors with an effect of the prompt; prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    errors, norms = [], []
    for prompt in range(prompts):
        queries = 300 + 40 * prompt
        effect = torch.randn(heads, candidates, 1, generator=generator) * 0.4
        errors.append(0.05 * (torch.randn(heads, candidates, queries, generator=generator) * 0.8 + effect).exp())
        norms.append(torch.rand(heads, queries, generator=generator) + 0.5)
    return errors, norms


def test_mean_limit_by_brute_force() -> None:
    errors, norms = sample(6)
    tally = tally_of(errors, norms)
    limit, mean = mean_limit(tally), mean_error(tally)
    for h in range(2):
        for c in range(3):
            num = np.array([(e[h, c] * n[h]).double().sum() for e, n in zip(errors, norms, strict=True)])
            den = np.array([n[h].double().sum() for n in norms])
            ratio = num.sum() / den.sum()
            # Variance of a ratio of sums over prompts, by the formula of sampling textbooks.
            variance = 6 / 5 * ((num - ratio * den) ** 2).sum() / den.sum() ** 2
            assert float(mean[h, c]) == pytest.approx(ratio, rel=1e-6)
            assert float(limit[h, c]) == pytest.approx(ratio + stats.t.ppf(0.95, 5) * math.sqrt(variance), rel=1e-6)
            assert limit[h, c] > mean[h, c]


def test_tail_share_limit_by_brute_force() -> None:
    errors, norms = sample(6)
    tally = tally_of(errors, norms)
    edges = torch.tensor([10 ** (40 * 5 / BINS - 4), 10 ** (36 * 5 / BINS - 4)])  # at bin edges it is exact
    limit = tail_share_limit(tally, edges.double())
    for h in range(2):
        for c in range(3):
            above = np.array([int((e[h, c] >= edges[h]).sum()) for e in errors], dtype=float)
            queries = np.array([e.shape[-1] for e in errors], dtype=float)
            share = above.sum() / queries.sum()
            variance = 6 / 5 * ((above - share * queries) ** 2).sum() / queries.sum() ** 2
            share += 1 / queries.sum()
            expected = share * math.exp(stats.t.ppf(0.95, 5) * math.sqrt(variance) / share)
            assert float(limit[h, c]) == pytest.approx(min(1.0, expected), rel=1e-3)
            assert 0.005 < expected < 1  # neither nothing nor everything


def test_tail_share_limit_falls_between_its_edges() -> None:
    errors, _ = sample(6)
    tally = tally_of(errors)
    position = torch.linspace(30.0, 44.0, 57, dtype=torch.float64)
    limits = torch.stack([tail_share_limit(tally, (10 ** (p * 5 / BINS - 4)).expand(2)) for p in position])
    assert (limits.diff(dim=0) <= 1e-4).all()
    for i in range(1, 56):
        if i % 4:
            assert (limits[i] <= limits[i - i % 4] + 1e-6).all() and (limits[i] >= limits[i - i % 4 + 4] - 1e-6).all()


@pytest.mark.parametrize("quantile", [0.9, 0.995])
def test_tail_error_is_within_a_bin_of_the_quantile(quantile: float) -> None:
    errors, _ = sample(5)
    got = tail_error(tally_of(errors), quantile)
    true = np.quantile(torch.cat(errors, -1).numpy(), quantile, axis=-1)
    ratio = got.numpy() / true
    assert (ratio < STEP).all()
    assert (ratio > 1 / STEP).all()


def test_tail_error_at_the_ends_of_the_range() -> None:
    zero, huge = torch.zeros(1, 1, 400), torch.full((1, 1, 400), 50.0)
    assert float(tail_error(tally_of([zero]))) < 1e-4 * STEP
    assert float(tail_error(tally_of([huge]))) == pytest.approx(10, rel=0.01)


def test_single_prompt_uses_the_estimates() -> None:
    errors, _ = sample(1)
    tally = tally_of(errors)
    assert torch.equal(mean_limit(tally), mean_error(tally))
    share = tail_share_limit(tally, torch.full((2,), 10 ** (40 * 5 / BINS - 4), dtype=torch.float64))
    direct = (errors[0] >= 10 ** (40 * 5 / BINS - 4)).double().mean(-1)
    torch.testing.assert_close(share, direct, rtol=1e-3, atol=1e-3)


def test_choose_takes_the_least_density_within_the_bounds() -> None:
    errors, norms = sample(6, heads=40, candidates=9, seed=3)
    scale = 1.35 ** -torch.arange(9)[None, :, None]
    kept = torch.tensor([50, 10, 40, 30, 20, 60, 70, 80, 90])
    tally = tally_of([e * scale for e in errors], norms, kept)
    mean_bound = torch.linspace(0.004, 0.12, 40, dtype=torch.float64)
    tail = torch.linspace(0.03, 0.6, 40, dtype=torch.float64)
    index, found = choose(tally, mean_bound, tail)
    mean, share = mean_limit(tally), tail_share_limit(tally, tail)
    for h in range(40):
        allowed = [c for c in range(9) if mean[h, c] <= mean_bound[h] and share[h, c] <= 0.005 + 1e-12]
        assert bool(found[h]) == bool(allowed)
        if allowed:
            assert int(index[h]) == min(allowed, key=lambda c: int(kept[c]))
    assert 0 < found.sum() < 40, "both outcomes must occur"


def test_ties_go_to_the_smaller_error_and_nothing_dropped_is_nothing_found() -> None:
    errors = [torch.tensor([0.05, 0.01, 0.03])[None, :, None].expand(1, 3, 200) for _ in range(3)]
    bound = torch.tensor([0.1], dtype=torch.float64)
    assert choose(tally_of(errors, kept=torch.tensor([50, 50, 50])), bound, None)[0].tolist() == [1]
    assert choose(tally_of(errors, kept=torch.tensor([100, 100, 100])), bound, None)[1].tolist() == [False]


def test_the_tail_can_fail_where_the_mean_passes() -> None:
    few = torch.full((1, 1, 1000), 0.01)
    few[..., :8] = 2.0  # 0.8% of the queries lose what they look for
    fewer = few.clone()
    fewer[..., 4:8] = 0.01  # 0.4%
    tally = tally_of([torch.cat([few, fewer], 1)] * 4, kept=torch.tensor([10, 20]))
    bound = torch.tensor([0.05], dtype=torch.float64)
    assert within_bounds(tally, bound, None).tolist() == [[True, True]]
    assert within_bounds(tally, bound, torch.tensor([0.5], dtype=torch.float64)).tolist() == [[False, True]]
    assert choose(tally, bound, None)[0].tolist() == [0]
    assert choose(tally, bound, torch.tensor([0.5], dtype=torch.float64))[0].tolist() == [1]
    assert float(tail_error(tally)[0, 0]) > 1.5 and float(tail_error(tally)[0, 1]) < 0.02


def test_not_a_number_is_never_within_bounds() -> None:
    errors = [torch.full((1, 2, 100), 0.01) for _ in range(3)]
    errors[1][0, 0, 5] = float("nan")
    tally = tally_of(errors)
    assert within_bounds(tally, torch.tensor([0.1], dtype=torch.float64), None).tolist() == [[False, True]]


@pytest.mark.parametrize("bound", ["mean", "tail"])
def test_chosen_heads_hold_the_bounds_on_new_prompts(bound: str) -> None:
    # 60 heads, 12 candidates 12% apart, 10 prompts that differ by 30%, 400 queries of each looked at.
    heads, candidates, prompts = 60, 12, 10
    generator = torch.Generator().manual_seed(5)
    size = 0.02 * 1.12 ** torch.arange(candidates)[None, :, None]

    def draw(queries: int) -> Tensor:
        effect = (0.3 * torch.randn(heads, 1, 1, generator=generator)).exp()
        return size * effect * torch.randn(heads, 1, queries, generator=generator).mul(0.6).exp()

    tally = tally_of([draw(400) for _ in range(prompts)], kept=90 - torch.arange(candidates))
    mean_bound = torch.full((heads,), 0.05 if bound == "mean" else 1.0, dtype=torch.float64)
    tail = torch.full((heads,), 0.2, dtype=torch.float64) if bound == "tail" else None
    index, found = choose(tally, mean_bound, tail)
    if bound == "mean":
        good = mean_error(tally) <= mean_bound[:, None]
    else:
        good = tail_error(tally) <= 0.2
    point = torch.where(good, torch.arange(candidates), -1).amax(1)  # at the edge of the estimates
    new = torch.cat([draw(50) for _ in range(100)], -1)
    new_mean = new.double().mean(-1)
    new_tail = new.sort(-1).values[..., int(0.995 * new.shape[-1])]

    def held(index: Tensor, among: Tensor) -> float:
        value = (new_mean if bound == "mean" else new_tail).gather(1, index.clamp(min=0)[:, None])[:, 0]
        return float((value <= (0.05 if bound == "mean" else 0.2))[among].double().mean())

    assert found.double().mean() > 0.9, "too few heads to say anything"
    assert held(index, found) >= 0.9
    assert held(point, point >= 0) < 0.8
