"""One budget for a model, on trade-offs whose best choices are known."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch

from autotune.budget import choose_for, curve, layer_error, outcome, sparsest
from autotune.machine import Times
from autotune.tradeoff import KL, RELATIVE, LayerTradeoff, Target, Tradeoff

CANDIDATES = 29


def layer(number: int, heads: int = 6, candidates: int = CANDIDATES, **changes: Any) -> LayerTradeoff:
    """Heads whose error falls with density, each at a pace of its own."""
    generator = torch.Generator().manual_seed(number)
    density = torch.linspace(0.08, 0.98, candidates).expand(heads, -1)
    size = 0.3 * torch.rand(heads, 1, generator=generator) + 0.02
    steep = 1 + 3 * torch.rand(heads, 1, generator=generator)
    share = torch.rand(heads, generator=generator) + 0.1
    values = dict(
        path=f"layers.{number}",
        threshold=torch.linspace(0.2, 0.999, candidates),
        sim=torch.full((candidates,), -1.0),
        density=density.half(),
        error=(size * (1 - density) ** steep).half(),
        allowed=torch.ones(heads, candidates, dtype=torch.bool),
        share=share / share.sum(),
        chosen=torch.full((heads,), candidates, dtype=torch.int16),
    )
    return LayerTradeoff(**(values | changes))  # type: ignore[arg-type]


def model(layers: int = 8, measure: str | None = None, **changes: Any) -> Tradeoff:
    return Tradeoff(tuple(layer(i, **changes) for i in range(layers)), measure)


def test_the_choice_for_a_strength_is_the_best_of_all() -> None:
    tradeoff = model(2, heads=2, candidates=4)
    options = list(itertools.product(range(5), repeat=4))
    found = {choice: outcome(tradeoff.with_choice([torch.tensor(choice[:2]), torch.tensor(choice[2:])]))
             for choice in options}  # fmt: skip
    points = curve(tradeoff, points=12)
    assert len({tuple(torch.cat(point.chosen).tolist()) for point in points}) > 3, "several choices must occur"
    for point in points[1:-1]:
        value = (1 - point.sparsity) + point.strength * point.error**2
        best = min((1 - other.sparsity) + point.strength * other.error**2 for other in found.values())
        assert value == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("sparsity", [0.1, 0.35, 0.5, 0.7, 0.85])
def test_a_sparsity_is_met_to_a_few_tenths_of_a_point(sparsity: float) -> None:
    found = choose_for(model(), Target("sparsity", sparsity))
    assert sparsity <= found.sparsity <= sparsity + 0.003


def test_heads_that_are_all_alike_change_one_by_one() -> None:
    one = layer(0, heads=1)
    alike = {
        name: getattr(one, name).expand(40, *getattr(one, name).shape[1:]) for name in ("density", "error", "allowed")
    }
    tradeoff = Tradeoff((layer(0, heads=40, **alike, share=torch.full((40,), 1 / 40)),))
    found = choose_for(tradeoff, Target("sparsity", 0.5))
    assert 0.5 <= found.sparsity <= 0.5 + 0.9 / 40


def test_more_sparsity_costs_more_and_takes_a_smaller_strength() -> None:
    found = [choose_for(model(), Target("sparsity", value)) for value in (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9)]
    for less, more in itertools.pairwise(found):
        assert less.strength > more.strength and less.error < more.error and less.sparsity < more.sparsity
    points = curve(model())
    for less, more in itertools.pairwise(reversed(points)):
        assert less.error <= more.error and less.sparsity <= more.sparsity
    assert points[0].sparsity == sparsest(model()).sparsity == pytest.approx(0.92, abs=1e-3)
    assert points[-1].sparsity == 0.0 < points[-2].sparsity < 0.1


@pytest.mark.parametrize("bound", [0.01, 0.03, 0.06])
def test_a_budget_beats_one_bound_for_every_head_at_equal_error(bound: float) -> None:
    tradeoff = model(measure=KL)
    uniform = [torch.where(x.error <= bound, x.density, 2.0).argmin(1) for x in tradeoff.layers]
    before = outcome(tradeoff.with_choice(uniform))
    after = choose_for(tradeoff, Target("error", before.error))
    assert after.error <= before.error
    assert after.sparsity > before.sparsity + 0.01


def test_what_matters_less_is_made_sparser() -> None:
    twice = [layer(0, sensitivity=sensitivity) for sensitivity in (0.2, 1.0, 5.0)]
    found = choose_for(Tradeoff(tuple(twice), KL), Target("sparsity", 0.5))
    errors = [layer_error(x, chosen) for x, chosen in zip(twice, found.chosen, strict=True)]
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2] > 0
    # At the best choice, importance · error · (slope of the error) is the same everywhere: shares act alike.
    shares = torch.tensor([0.05, 0.15, 0.8])
    same = {name: getattr(layer(0, heads=1), name).expand(3, -1) for name in ("density", "error", "allowed")}
    alike = layer(0, heads=3, share=shares, **same)
    chosen = choose_for(Tradeoff((alike,)), Target("sparsity", 0.5)).chosen[0].tolist()
    assert chosen[0] < chosen[1] < chosen[2]


def test_the_predicted_error_is_the_weighted_sum_of_squares() -> None:
    layers = (layer(0, sensitivity=2.0), layer(1, sensitivity=0.5))
    chosen = [torch.tensor([0, 3, 28, 29, 7, 7]), torch.tensor([5, 5, 5, 29, 29, 0])]
    expected = 0.0
    for x, index in zip(layers, chosen, strict=True):
        for head, candidate in enumerate(index.tolist()):
            error = 0.0 if candidate == CANDIDATES else float(x.error[head, candidate])
            expected += float(x.sensitivity or 0) * float(x.share[head]) * error**2
    for measure, value in ((KL, expected), (RELATIVE, math.sqrt(expected))):
        found = outcome(Tradeoff(layers, measure).with_choice(chosen))
        assert found.error == pytest.approx(value, rel=1e-6)
        density = [1.0 if c == CANDIDATES else float(x.density[h, c])
                   for x, index in zip(layers, chosen, strict=True) for h, c in enumerate(index.tolist())]  # fmt: skip
        assert found.sparsity == pytest.approx(1 - sum(density) / 12, rel=1e-6)


def test_only_what_the_bounds_allow_is_chosen() -> None:
    allowed = torch.arange(CANDIDATES).expand(6, -1) >= 15
    allowed = allowed & (torch.arange(6) != 2)[:, None]  # nothing holds the bounds of head 2
    tradeoff = model(allowed=allowed)
    for target in (Target("sparsity", 0.3), Target("sparsity", 0.05)):
        for chosen in choose_for(tradeoff, target).chosen:
            assert (chosen >= 15).all() and chosen[2] == CANDIDATES
    with pytest.raises(ValueError, match=r"sparsity=0\.5 is out of reach: .* give 0\.3"):
        choose_for(tradeoff, Target("sparsity", 0.5))


def test_a_candidate_that_keeps_everything_is_a_dense_head() -> None:
    density = torch.ones(6, CANDIDATES).half()
    found = sparsest(Tradeoff((layer(0, density=density), layer(1))))
    assert found.chosen[0].tolist() == [CANDIDATES] * 6


# -- time -------------------------------------------------------------------------------------------------------------

TIMES = [Times(dense=4.0, fixed=0.5, blocks=4.0)] * 7


@pytest.mark.parametrize("speedup", [1.2, 2.0, 4.0])
def test_a_speedup_is_reached_by_the_expected_times(speedup: float) -> None:
    found = choose_for(model(7), Target("speedup", speedup), TIMES)
    assert found.speedup is not None
    assert speedup <= found.speedup <= 1.01 * speedup
    served = [
        4.0 if (c == CANDIDATES).all() else 0.5 + 4.0 * float(x.densities().gather(1, c[:, None]).mean())
        for x, c in zip(model(7).layers, found.chosen, strict=True)
    ]
    assert found.speedup == pytest.approx(28 / sum(served), rel=1e-9)


def test_layers_that_do_not_gain_stay_dense_as_a_whole() -> None:
    slow = [*TIMES[:6], Times(dense=1.0, fixed=1.1, blocks=4.0)]
    found = choose_for(model(7), Target("speedup", 1.5), slow)
    assert found.chosen[6].tolist() == [CANDIDATES] * 6
    assert all((chosen < CANDIDATES).any() for chosen in found.chosen[:6])
    with pytest.raises(ValueError, match=r"speedup=9 is out of reach: .* give 4\."):
        choose_for(model(7), Target("speedup", 9.0), slow)
    # A sparsity is asked for whatever it takes, and its speedup is said.
    sparse = choose_for(model(7), Target("sparsity", 0.6), slow)
    assert sparse.sparsity >= 0.6 and (sparse.chosen[6] < CANDIDATES).any() and sparse.speedup is not None


def test_where_blocks_are_dear_more_of_them_are_left_out() -> None:
    # Two layers alike, one of which takes four times as long: its blocks are worth more.
    twins = Tradeoff((layer(0), layer(0)), KL)
    times = [Times(1.0, 0.0, 1.0), Times(4.0, 0.0, 4.0)]
    found = choose_for(twins, Target("error", 0.002), times)
    density = [
        float(x.densities().gather(1, c[:, None]).mean()) for x, c in zip(twins.layers, found.chosen, strict=True)
    ]
    assert density[1] < density[0] - 0.05
    assert found.error <= 0.002


def test_an_error_target_takes_all_it_may() -> None:
    tradeoff = model(measure=KL)
    for value in (1e-4, 1e-3, 1e-2):
        found = choose_for(tradeoff, Target("error", value))
        assert 0.93 * value <= found.error <= value
    loose = choose_for(tradeoff, Target("error", 100.0))
    assert loose.sparsity == sparsest(tradeoff).sparsity


def test_targets_that_need_what_is_not_known() -> None:
    with pytest.raises(ValueError, match=r"error=0\.1: .* measured sensitivities only, and there are none"):
        choose_for(model(), Target("error", 0.1))
    with pytest.raises(ValueError, match=r"speedup=1\.5: .* no row for this machine"):
        choose_for(model(), Target("speedup", 1.5))


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ({"sparsity": 0.0}, ValueError, r"sparsity must be above 0 and below 1, got 0\.0"),
        ({"sparsity": 1.0}, ValueError, "below 1, got"),
        ({"sparsity": 70}, ValueError, "below 1, got 70"),
        ({"sparsity": math.nan}, ValueError, "got nan"),
        ({"speedup": 1.0}, ValueError, "speedup must be above 1"),
        ({"error": 0.0}, ValueError, "error must be above 0"),
        ({"error": math.inf}, ValueError, "got inf"),
        ({"sparsity": "0.7"}, TypeError, "sparsity must be a number, got '0.7'"),
        ({"sparsity": True}, TypeError, "sparsity must be a number, got True"),
        ({"sparsity": 0.5, "error": 0.1}, ValueError, "only one of sparsity, error can be the target"),
    ],
)
def test_invalid_targets(targets: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Target.of(**targets)


def test_no_target_is_none() -> None:
    assert Target.of(sparsity=None, error=None) is None
    assert str(Target.of(sparsity=0.7)) == "sparsity=0.7"


# -- as a file holds it -----------------------------------------------------------------------------------------------


def test_a_tradeoff_is_read_as_it_was_written() -> None:
    before = dataclasses.replace(model(3, KL, shape=(12, 512, 512, 64, True), sensitivity=0.4),
                                 target=Target("error", 0.1), predicted=0.08, measured=0.09)  # fmt: skip
    after = Tradeoff.read(before.to_dict())
    assert (after.measure, after.target, after.predicted, after.measured) == (KL, Target("error", 0.1), 0.08, 0.09)
    for a, b in zip(after.layers, before.layers, strict=True):
        for field in dataclasses.fields(LayerTradeoff):
            x, y = getattr(a, field.name), getattr(b, field.name)
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("path", 7, "path must be text"),
        ("error", torch.zeros(6, 3).half(), r"error of layer 'layers.0' must be torch.float16 \[6, 29\]"),
        ("density", torch.zeros(6, CANDIDATES), "must be torch.float16"),
        ("density", torch.full((6, CANDIDATES), 1.5).half(), r"density of layer 'layers.0' must be in \[0, 1\]"),
        ("error", torch.full((6, CANDIDATES), float("nan")).half(), "must be finite"),
        ("allowed", None, "allowed of layer 'layers.0' must be torch.bool"),
        ("chosen", torch.full((6,), 30, dtype=torch.int16), r"must be in \[0, 29\]"),
        ("sensitivity", -1.0, "sensitivity must be a number, 0 or more"),
        ("shape", (1, 2), "shape of layer 'layers.0' must be"),
        ("phase", -1, "phase of layer 'layers.0' must be"),
    ],
)
def test_damaged_tradeoffs_are_refused(name: str, value: Any, message: str) -> None:
    content = model(1).to_dict()
    content["layers"][0][name] = value
    with pytest.raises(ValueError, match=message):
        Tradeoff.read(content)


@pytest.mark.parametrize("content", [[], {}, {"layers": [{}], "target": None}, {"layers": 3}])
def test_what_is_no_tradeoff_is_refused(content: Any) -> None:
    with pytest.raises(ValueError, match="the trade-off is invalid"):
        Tradeoff.read(content)
    whole = model(1).to_dict()
    with pytest.raises(ValueError, match="measure must be"):
        Tradeoff.read(whole | {"measure": "taste"})
    with pytest.raises(ValueError, match="the trade-off is invalid"):
        Tradeoff.read(whole | {"target": ["sparsity", 3.0]})
