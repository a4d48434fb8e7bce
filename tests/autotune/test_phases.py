"""Phases of denoising: where they meet, how calls are split, and how their thresholds are kept, served and saved."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_model import DIM, GRID, HEADS, FakeAttention, activations, exact, same, tuned
from torch import Tensor, nn

from autotune import Calibration, SparseAttention, Tuned, accumulate, calibrate, load
from autotune import load_sparse_attention_state_dict as load_into
from autotune.accumulate import PromptTally, add_curves
from autotune.phases import Phases
from autotune.sampling import Sampler
from spas_attn.call import Call
from spas_attn.selectors import MeanSimilarity

SELECTOR = MeanSimilarity(pool=16, block_q=64, block_k=64, local=0)
LEVELS = (1.0, 0.9, 0.8, 0.7, 0.5, 0.1)
OPTIONS: dict[str, Any] = dict(grid=GRID, query_blocks=4, l1=0.1, pv_l1=0.15, tail=1.5)


class Denoiser(nn.Module):
    """Two layers that are told a noise level; the noisier the call, the more attention is spread."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FakeAttention(selector=SELECTOR) for _ in range(2))

    @property
    def inner(self) -> list[SparseAttention]:
        return [layer.inner_attention for layer in self.layers]

    def inputs(self, seed: int, level: float, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return activations(round(100 * level) + 1000 * seed + index, 320, 320, 0.2 + level)

    def forward(self, timestep: Tensor, seed: int) -> Tensor:
        level, total = float(timestep), torch.zeros(())
        for index, inner in enumerate(self.inner):
            q, k, v = self.inputs(seed, level, index)
            call = Call.make(q, k, v, is_causal=True)
            options: dict[str, Any] = dict(is_causal=True, scale=DIM**-0.5, noise=level)
            total = total + inner(q, k, v, dense=lambda call=call: exact(call), **options)
        return total


def run(model: Denoiser, prompts: int = 4, **options: Any) -> Calibration:
    with calibrate(model, **(OPTIONS | options)) as calibration:
        for seed in calibration.prompts(range(prompts)):
            for level in LEVELS:
                model(torch.tensor(level), seed)
    return calibration


@pytest.fixture(scope="module")
def calibrated() -> tuple[Denoiser, Calibration]:
    model = Denoiser()
    return model, run(model, phases=3)


def test_phases_have_equally_many_steps(calibrated: tuple[Denoiser, Calibration]) -> None:
    model, calibration = calibrated
    for module in model.inner:
        assert module.tuned.edges == pytest.approx((0.85, 0.6)) and module.tuned.threshold.shape == (3, HEADS)
        assert len(module.tuned.densities) == 3
        assert module.tuned.expected_density == pytest.approx(sum(module.tuned.densities) / 3)
    found = [(entry["path"], entry["phase"], entry["noise"]) for entry in calibration.statistics[:3]]
    path = "layers.0.inner_attention"
    assert found == [(path, 0, [1.0, 0.85]), (path, 1, [0.85, 0.6]), (path, 2, [0.6, 0.0])]
    assert calibration.tradeoff is not None
    assert [(x.path, x.phase) for x in calibration.tradeoff.layers[:3]] == [(path, phase) for phase in range(3)]


def test_the_calls_of_a_phase_are_counted_for_it_alone(calibrated: tuple[Denoiser, Calibration]) -> None:
    model, calibration = calibrated
    expected, module = PromptTally(HEADS, 16), model.inner[1]
    for number, level in enumerate((0.8, 0.7)):  # phase 1
        call = Call.make(*model.inputs(0, float(torch.tensor(level)), 1), is_causal=True)
        unit = calibration.layers[4]
        blocks = Sampler(4, 0).blocks(call, 64, unit.index, 0, number)
        add_curves(expected, module, call, GRID, blocks)
    curves = calibration.layers[4].curves
    assert curves is not None
    torch.testing.assert_close(curves.sums[0], expected.sums, rtol=1e-12, atol=0)


def test_noisier_phases_keep_more(calibrated: tuple[Denoiser, Calibration]) -> None:
    for module in calibrated[0].inner:
        assert module.tuned.densities[0] > module.tuned.densities[2]


def test_each_phase_is_what_a_calibration_of_its_levels_gives(calibrated: tuple[Denoiser, Calibration]) -> None:
    alone, options = Denoiser(), OPTIONS | dict(query_blocks=None)
    whole = Denoiser()
    run(whole, phases=(0.85, 0.6), query_blocks=None)
    with calibrate(alone, **options) as calibration:
        for seed in calibration.prompts(range(4)):
            for level in LEVELS[4:]:
                alone(torch.tensor(level), seed)
    for one, other in zip(alone.inner, whole.inner, strict=True):
        assert same(one.tuned, other.tuned.at(2))
        assert one.tuned.expected_density == other.tuned.at(2).expected_density
    assert [module.tuned.edges for module in whole.inner] == [(0.85, 0.6)] * 2


def test_a_call_is_served_by_its_phase(calibrated: tuple[Denoiser, Calibration]) -> None:
    model = copy.deepcopy(calibrated[0])
    plain = copy.deepcopy(model)
    for level, phase in ((0.95, 0), (0.85, 0), (0.7, 1), (0.599, 2), (0.0, 2)):
        for a, b in zip(model.inner, plain.inner, strict=True):
            b.tuned = a.tuned.at(phase)
        assert torch.equal(model(torch.tensor(level), 7), plain(torch.tensor(level), 7))
    q, k, v = model.inputs(0, 0.5, 0)
    with pytest.raises(RuntimeError, match="its call came without a noise level"):
        model.inner[0](q, k, v, dense=lambda: q, is_causal=True, scale=1.0)


def test_a_file_keeps_the_phases(calibrated: tuple[Denoiser, Calibration], tmp_path: Path) -> None:
    model, calibration = calibrated
    calibration.save(tmp_path / "tuned.pt")
    state = load(tmp_path / "tuned.pt")
    assert state["layers.0.inner_attention.cdfthreshd"].shape == (3, HEADS)
    assert state["_metadata"]["format"] == 3
    other = Denoiser()
    load_into(other, state)
    for a, b in zip(model.inner, other.inner, strict=True):
        assert same(a.tuned, b.tuned)
        assert (a.tuned.edges, a.tuned.densities) == (b.tuned.edges, b.tuned.densities)
    load_into(other, state, sparsity=0.05)
    assert not same(model.inner[0].tuned, other.inner[0].tuned)
    assert other.inner[0].tuned.edges == model.inner[0].tuned.edges
    copied = pickle.loads(pickle.dumps(other))
    assert same(copied.inner[0].tuned, other.inner[0].tuned)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, m: m["phase_edges"].clear(), r"must be a tensor \[heads\], got .*\[3, 4\]"),
        (lambda s, m: m["phase_edges"].update({"layers.0.inner_attention": [0.5]}), r"has shape \[3, 4\], the file's"),
        (lambda s, m: m["phase_edges"].update({"layers.0.inner_attention": [0.2, 0.5]}), "falling noise levels"),
        (lambda s, m: m["phase_edges"].update({"layers.0.inner_attention": []}), "falling noise levels"),
        (lambda s, m: m.update(phase_density={"layers.0.inner_attention": [2.0]}), "lists of shares by layer"),
        (lambda s, m: s.update({"layers.0.inner_attention.is_sparse": torch.ones(4)}), r"a tensor \[phases, heads\]"),
    ],
)
def test_files_that_cannot_be_meant(
    calibrated: tuple[Denoiser, Calibration], tmp_path: Path, change: Any, message: str
) -> None:
    calibrated[1].save(tmp_path / "tuned.pt", page=False)
    state = load(tmp_path / "tuned.pt")
    change(state, state["_metadata"])
    with pytest.raises(ValueError, match=message):
        load_into(Denoiser(), state)


def test_resuming_needs_the_same_phases(tmp_path: Path) -> None:
    def interrupted(**options: Any) -> None:
        model = Denoiser()
        with calibrate(model, checkpoint=tmp_path / "c", **(OPTIONS | options)) as calibration:
            for number, seed in enumerate(calibration.prompts(range(4))):
                if number == 3:  # levels, and two of three curves
                    raise KeyboardInterrupt
                for level in LEVELS:
                    model(torch.tensor(level), seed)

    with pytest.raises(KeyboardInterrupt):
        interrupted(phases=3)
    with pytest.raises(ValueError, match="belongs to another calibration"):
        run(Denoiser(), phases=2, checkpoint=tmp_path / "c", resume=True)
    resumed, whole = Denoiser(), Denoiser()
    run(resumed, phases=3, checkpoint=tmp_path / "c", resume=True)
    run(whole, phases=3)
    assert all(same(a.tuned, b.tuned) for a, b in zip(resumed.inner, whole.inner, strict=True))


def test_refusals() -> None:
    for wrong in (0, True, 2.5, "3", (), (0.5, 0.7), (1.0, 0.5), (0.5, 0.0), (0.5, 0.5), (1,)):
        with pytest.raises(ValueError, match="phases must be a number from 1 on, or the noise levels"):
            calibrate(Denoiser(), phases=wrong)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"called at 6 noise levels, fewer than phases=7"):
        run(Denoiser(), phases=7)
    with pytest.raises(RuntimeError, match=r"layers\.0\.inner_attention', phase 1, saw no prompt"):
        run(Denoiser(), phases=(0.99, 0.95))
    model = Denoiser()
    with pytest.raises(RuntimeError, match="phases need the loop"), calibrate(model, phases=(0.6,), **OPTIONS):
        model(torch.tensor(0.5), 0)


@pytest.mark.parametrize("added", [{"int8_fp8": 0.3}, {"int8_fp8": 0.3, "int8_bf16": 0.3}, {}])
def test_a_precision_holds_its_bounds_in_every_phase(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, added: dict[str, float]
) -> None:
    """One precision for a layer: that of the phase (the last one here) in which quantisation costs most."""
    model = Denoiser()

    def quantised(call: Call, mask: Any, precision: str, backend: str) -> Tensor:
        whole, _ = accumulate.attend(call.replace(mask=mask, precision="native"), backend=backend)
        error = added.get(precision, 0.01) if model.inner[0].seen_noise < 0.6 else 0.01
        return whole * (1 + error * torch.where(torch.arange(whole.shape[-1]) % 2 == 0, 1.0, -1.0))

    monkeypatch.setattr(accumulate, "_in_precision", quantised)
    names = ("native", "int8_bf16", "int8_fp8")
    calibration = run(model, phases=3, precisions=names)
    expected = names[2 - len(added)]
    assert [module.precision for module in model.inner] == [expected, expected]
    for entry in calibration.statistics:
        assert entry["precision"] == expected
        assert all(head["l1_total"] <= OPTIONS["pv_l1"] for head in entry["heads"] if head["is_sparse"])
    calibration.save(tmp_path / "tuned.pt", page=False)
    other = Denoiser()
    load_into(other, tmp_path / "tuned.pt")
    assert [module.precision for module in other.inner] == [expected, expected]


def test_where_phases_meet() -> None:
    phases = Phases.of(2)
    phases.divide("a", [0.5, 1.0, 0.25, 0.75, 0.5, 1.0])  # guidance calls twice
    phases.divide("b", [0.2, 0.1])
    assert phases.edges == {"a": (0.625,), "b": (pytest.approx(0.15),)}


def test_tuned_states_of_phases() -> None:
    parts = [tuned(threshold=value, expected_density=value / 2) for value in (0.2, 0.6)]
    joined = Tuned.joined(parts, (0.5,))
    assert joined.heads == HEADS and joined.expected_density == pytest.approx(0.2)
    assert [joined.phase_of(noise) for noise in (1.0, 0.5, 0.499, 0.0)] == [0, 0, 1, 1]
    for phase, part in enumerate(parts):
        assert same(joined.at(phase), part) and joined.at(phase).expected_density == part.expected_density
        assert joined.at(phase) is joined.at(phase), "made once"
    assert joined.share(1, 2).threshold.shape == (2, 2)
    with pytest.raises(ValueError, match=r"must have shape \[3, 4\]"):
        dataclasses.replace(joined, edges=(0.5, 0.2))
    assert parts[0].at(0) is parts[0] and parts[0].phase_of(None) == 0
