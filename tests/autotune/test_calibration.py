"""The calibration loop: passes, checks, back-off, interruptions, and what is left behind when it fails."""

from __future__ import annotations

import copy
import json
import math
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_model import BOUNDS, GRID, HEADS, FakeModel, Prompt, activations, same, tuned_model
from torch import nn

from autotune import Calibration, calibrate, enable_tune_mode, load, observe, tune_mode
from autotune import calibration as calibration_module
from autotune.checkpoint import digest, identity
from autotune.module import BUFFERS
from autotune.observe import Watched
from spas_attn.selectors import MeanSimilarity

PROMPTS = [Prompt(seed, length) for seed, length in enumerate((512, 400, 450, 330, 512, 380))]
SETTINGS: dict[str, Any] = dict(grid=GRID, query_blocks=4, **BOUNDS)


def tune(model: FakeModel, prompts: list[Prompt] = PROMPTS, **changes: Any) -> Calibration:
    with calibrate(model, **(SETTINGS | changes)) as calibration:
        for prompt in calibration.prompts(prompts):
            model(prompt)
    return calibration


@pytest.fixture(scope="module")
def tuned() -> tuple[FakeModel, Calibration]:
    model = FakeModel()
    return model, tune(model)


def state_of(model: FakeModel) -> list[Any]:
    """Everything that a calibration may change, comparable."""
    names = ("mode", "observer", "l1", "pv_l1", "tail", "lengths", "expected_density")
    values = [[None if getattr(m, n) is None else getattr(m, n).tolist() for n in BUFFERS] for m in model.inner]
    return [[getattr(m, n) for n in names] for m in model.inner] + values


def equal_results(a: FakeModel, b: FakeModel) -> bool:
    return all(same(x.thresholds(), y.thresholds()) for x, y in zip(a.inner, b.inner, strict=True))


def test_order_of_prompts(tuned: tuple[FakeModel, Calibration]) -> None:
    model, calibration = tuned
    seeds = [prompt.seed for prompt in model.ran]
    assert seeds[:6] == [0, 1, 2, 3, 4, 5]  # 4 fitted; then those kept aside: the PV pass
    assert seeds[6:8] == [4, 5]  # the check
    assert seeds[8:] == [4, 5] * (len(seeds[8:]) // 2)
    assert len(seeds) <= 4 + 2 + 3 * 2
    assert all(module.mode == "sparse" and module.observer is None for module in model.inner)
    assert all(entry["prompts_fitted"] == 4 and entry["prompts_checked"] == 2 for entry in calibration.statistics)


def test_statistics(tuned: tuple[FakeModel, Calibration], tmp_path: Path) -> None:
    model, calibration = tuned
    path = calibration.save(tmp_path / "tuned_0.06_0.07.pt")
    assert path == tmp_path / "tuned_0.06_0.07.json"
    statistics = json.loads(path.read_text())
    assert statistics == calibration.statistics
    assert [entry["layer_idx"] for entry in statistics] == [0, 1]
    some_sparse = 0
    for entry, module in zip(statistics, model.inner, strict=True):
        assert (entry["l1"], entry["pv_l1"], entry["tail"]) == (0.1, 0.15, 1.5)
        assert entry["lengths"] == [330, 512] == list(module.lengths)
        assert entry["query_blocks_per_call"] == 4
        assert entry["checked_on_the_fitted_calls"] is False
        assert entry["check_backend"] in ("cpu", "reference")
        heads = entry["heads"]
        assert [head["head"] for head in heads] == list(range(HEADS))
        assert entry["mean_sparsity"] == pytest.approx(sum(head["sparsity"] for head in heads) / HEADS, abs=1e-3)
        assert 1 - module.expected_density == pytest.approx(entry["mean_sparsity"], abs=1e-3)
        for h, head in enumerate(heads):
            assert head["is_sparse"] == bool(module.is_sparse[h])
            for name in BUFFERS[1:]:
                assert head[name] == pytest.approx(float(getattr(module, name)[h]), abs=1e-5)
            if head["is_sparse"]:
                some_sparse += 1
                assert head["sparsity"] > 0 and head["runs_dense_because"] is None
                assert head["l1_selection"] > 0 and head["l1_total"] <= 0.15
                assert head["tail_selection"] > 0 and head["tail_total"] <= 1.5
            else:
                assert head["sparsity"] == head["l1_total"] == head["tail_total"] == 0
                assert head["runs_dense_because"]
    assert some_sparse >= 2, "the model is too hard to test anything"
    state = load(tmp_path / "tuned_0.06_0.07.pt")
    assert state["_metadata"]["prompts"] == 6
    assert 1 - state["_metadata"]["mean_density"] == pytest.approx(
        sum(entry["mean_sparsity"] for entry in statistics) / 2, abs=1e-3
    )


def test_achieved_errors_are_those_of_the_prompts_kept_aside(tuned: tuple[FakeModel, Calibration]) -> None:
    model, calibration = tuned
    module, num, den = model.inner[0], torch.zeros(HEADS), torch.zeros(HEADS)
    for prompt in PROMPTS[4:]:
        q, k, v = activations(prompt.seed * 10, prompt.length, prompt.length, prompt.noise)
        call = Watched(q, k, v, is_causal=True, scale=0.25)
        selector, pv = module.tuned(q.device)
        mask = selector.select(q, k, is_causal=True)
        truth = calibration_module.observe.backends.get("reference").run(call)
        out = calibration_module.observe.backends.get("reference").run(call.replace(mask=mask, pv_threshold=pv))
        num += (out - truth).abs().sum((0, 2, 3))
        den += truth.abs().sum((0, 2, 3))
    for h, head in enumerate(calibration.statistics[0]["heads"]):
        if head["is_sparse"]:
            assert head["l1_total"] == pytest.approx(float(num[h] / den[h]), abs=1e-5)


def test_the_model_runs_dense_while_it_is_watched() -> None:
    model, plain = FakeModel(), FakeModel()
    with calibrate(model, **SETTINGS) as calibration:
        for prompt in calibration.prompts(PROMPTS[:3]):
            for got, expected in zip(model(prompt), plain(prompt), strict=True):
                assert torch.equal(got, expected)


def test_the_same_seed_gives_the_same_result(tuned: tuple[FakeModel, Calibration]) -> None:
    again, other = FakeModel(), FakeModel()
    assert tune(again).statistics == tuned[1].statistics
    assert equal_results(again, tuned[0])
    assert tune(other, seed=1, query_blocks=1).layers[0].curves.total().tolist() != (
        tune(again, seed=2, query_blocks=1).layers[0].curves.total().tolist()
    )


def test_inference_mode_autocast_and_calls_outside_the_loop_change_nothing(
    tuned: tuple[FakeModel, Calibration],
) -> None:
    model = FakeModel()
    with calibrate(model, **SETTINGS) as calibration:
        model(Prompt(77))  # a warm-up does not count
        for prompt in calibration.prompts(PROMPTS):
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                model(prompt)
        model(Prompt(78))  # nor does what comes afterwards
    assert calibration.statistics == tuned[1].statistics
    assert equal_results(model, tuned[0])


def test_a_single_prompt_serves_for_everything() -> None:
    model = FakeModel()
    calibration = tune(model, PROMPTS[:1])
    assert {prompt.seed for prompt in model.ran} == {0} and len(model.ran) >= 3
    entry = calibration.statistics[0]
    assert entry["checked_on_the_fitted_calls"] is True
    assert entry["prompts_fitted"] == entry["prompts_checked"] == 1


def test_own_bounds_of_the_modules() -> None:
    model = FakeModel(l1=0.2, pv_l1=0.3, tail=None)
    with calibrate(model, grid=GRID) as calibration:
        for prompt in calibration.prompts(PROMPTS[:3]):
            model(prompt)
    assert [(m.l1, m.pv_l1, m.tail) for m in model.inner] == [(0.2, 0.3, None)] * 2
    assert calibration.statistics[0]["tail"] is None


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [FakeModel, tuned_model])
@pytest.mark.parametrize("after", [1, 5, 7])  # in the curve pass, the PV pass, the check
def test_an_early_break_raises_and_leaves_everything_as_before(make: Any, after: int) -> None:
    model = make()
    before = state_of(model)
    calibration = calibrate(model, **SETTINGS)
    phase = {1: "curves", 5: "pv", 7: "check"}[after]
    with pytest.raises(RuntimeError, match=f"ended early, in the {phase} pass"), calibration:  # noqa: PT012
        for number, prompt in enumerate(calibration.prompts(PROMPTS), 1):
            model(prompt)
            if number == after:
                break
    assert state_of(model) == before
    with pytest.raises(RuntimeError, match="has not finished"):
        calibration.save("never.pt")


@pytest.mark.parametrize("fail_at", [2, 4])
def test_an_exception_leaves_everything_as_before(fail_at: int) -> None:
    model = tuned_model()
    model.fail_at = fail_at
    before = state_of(model)
    with pytest.raises(MemoryError):
        tune(model)
    assert state_of(model) == before


def test_refusals() -> None:
    with pytest.raises(ValueError, match="patch it first"):
        calibrate(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="at least one prompt, got none"):
        tune(FakeModel(), [])
    with pytest.raises(RuntimeError, match=r"layers\.0\.inner_attention' saw no call of .* in prompt 0"):
        tune(FakeModel(), [Prompt(0, length=63), Prompt(1)])
    with pytest.raises(ValueError, match="resume=True needs checkpoint"):
        calibrate(FakeModel(), resume=True)
    for name, value in (("kept_aside", 0), ("kept_aside", 1.0), ("rounds", 0), ("query_blocks", 0), ("tail", "no")):
        with pytest.raises(ValueError, match=name):
            calibrate(FakeModel(), **{name: value})
    model = FakeModel()
    with calibrate(model, **SETTINGS) as calibration:
        for prompt in calibration.prompts(PROMPTS[:2]):
            model(prompt)
            with pytest.raises(RuntimeError, match="once per calibration"):
                next(calibration.prompts(PROMPTS))
            with pytest.raises(RuntimeError, match="is being calibrated already"), calibrate(model):
                pass
    assert all(module.mode == "sparse" for module in model.inner)


# -- check and back-off -----------------------------------------------------------------------------------------------

EASY, HARD = [Prompt(i, 400, 0.2) for i in range(6)], [Prompt(10 + i, 400, 3.0) for i in range(2)]


def test_heads_that_miss_in_the_check_are_backed_off() -> None:
    model, fitted_only = FakeModel(), FakeModel()
    calibration = tune(model, EASY + HARD, l1=0.04, pv_l1=0.06, tail=None, rounds=6)
    assert len(model.ran) > 6 + 2 + 2, "the check must have been repeated"
    factors = torch.stack([layer.tighter for layer in calibration.layers])
    assert (factors < 1).any()
    assert (factors[factors < 1] < 0.9).all(), "the aim is below the bound"
    easy = tune(fitted_only, EASY, l1=0.04, pv_l1=0.06, tail=None)
    for layer, entry, before in zip(calibration.layers, calibration.statistics, easy.statistics, strict=True):
        for h, head in enumerate(entry["heads"]):
            if head["is_sparse"]:
                assert head["l1_total"] <= 0.06
            if layer.tighter[h] < 1:
                assert head["sparsity"] < before["heads"][h]["sparsity"]


def test_heads_that_keep_missing_become_dense_and_say_why() -> None:
    model = FakeModel()
    calibration = tune(model, EASY + HARD, l1=0.04, pv_l1=0.06, tail=None, rounds=1)
    assert len(model.ran) == 6 + 2 + 2
    reasons = [head["runs_dense_because"] for entry in calibration.statistics for head in entry["heads"]]
    assert "missed a bound 1 times in the check with the real kernel" in reasons
    for module, entry in zip(model.inner, calibration.statistics, strict=True):
        for h, head in enumerate(entry["heads"]):
            if head["runs_dense_because"]:
                assert not module.is_sparse[h]
                assert (float(module.cdfthreshd[h]), float(module.pvthreshd[h])) == (1.0, 50.0)
            else:
                assert head["l1_total"] <= 0.06


def test_bounds_that_nothing_holds_give_dense_heads() -> None:
    model = FakeModel()
    calibration = tune(model, l1=1e-9, pv_l1=1e-8)
    assert not any(module.is_sparse.any() for module in model.inner)
    reasons = {head["runs_dense_because"] for entry in calibration.statistics for head in entry["heads"]}
    assert reasons == {"no candidate threshold holds the bounds"}
    assert [entry["mean_sparsity"] for entry in calibration.statistics] == [0.0, 0.0]
    assert [module.expected_density for module in model.inner] == [1.0, 1.0]


def test_a_kernel_that_gives_nonsense_makes_its_heads_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    run = observe.sparse_attention

    def broken(*args: Any, **more: Any) -> Any:
        out, stats = run(*args, **more)
        out[:, 0, 5] = float("nan")
        return out, stats

    monkeypatch.setattr(observe, "sparse_attention", broken)
    model = FakeModel()
    tune(model, EASY)
    assert not model.inner[0].is_sparse[0] and not model.inner[1].is_sparse[0]
    assert model.inner[0].is_sparse.any()


def test_pv_skip_is_chosen_where_it_is_safe() -> None:
    model = FakeModel()
    calibration = tune(model, EASY, l1=0.1, pv_l1=0.3, tail=None)
    found = [head for entry in calibration.statistics for head in entry["heads"] if head["pvthreshd"] < 50]
    assert found, "no head skips anything"
    for head in found:
        assert head["is_sparse"]
        assert head["l1_selection"] <= head["l1_total"] <= 0.3
    assert any(head["l1_total"] > head["l1_selection"] for head in found)
    tight = FakeModel()
    tune(tight, EASY, l1=0.1, pv_l1=0.1 + 1e-9, tail=1e-3)
    assert all((module.pvthreshd == 50).all() for module in tight.inner)


# -- without the loop -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_module, "Grid", lambda: GRID)


@pytest.mark.usefixtures("small_grid")
def test_tune_mode_without_a_loop() -> None:
    model = FakeModel(**BOUNDS)
    with pytest.raises(RuntimeError, match="not on for this model"):
        enable_tune_mode(model, False)
    begun = enable_tune_mode(model, True)
    with pytest.raises(RuntimeError, match="already on"):
        enable_tune_mode(model, True)
    for prompt in PROMPTS:
        model(prompt)
    assert all(module.mode == "tune" for module in model.inner)
    lines: list[str] = []
    calibration = enable_tune_mode(model, False, verbose=True, printer=lines.append)
    assert calibration is begun and model not in tune_mode._open
    assert all(module.mode == "sparse" and module.observer is None for module in model.inner)
    assert "sparse heads" in lines[0]
    for entry in calibration.statistics:
        assert entry["prompts_fitted"] == entry["prompts_checked"] == 6
        assert entry["checked_on_the_fitted_calls"] is True
        for head in entry["heads"]:
            assert head["l1_total"] <= 0.15 and head["tail_total"] <= 1.5
    assert any(module.is_sparse.any() for module in model.inner)


@pytest.mark.usefixtures("small_grid")
def test_tune_mode_that_saw_nothing() -> None:
    model = tuned_model()
    before = state_of(model)
    enable_tune_mode(model, True)
    model(Prompt(0, length=63))
    with pytest.raises(RuntimeError, match="saw no call of at least 64 queries"):
        enable_tune_mode(model, False)
    assert state_of(model) == before
    enable_tune_mode(model, True)  # it can be switched on again
    with pytest.raises(RuntimeError):
        enable_tune_mode(model, False)


@pytest.mark.usefixtures("small_grid")
def test_the_reservoir_respects_its_budget_in_a_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = 2 * 300_000
    monkeypatch.setattr(calibration_module, "RESERVOIR_BYTES", budget)
    model = FakeModel(**BOUNDS)
    calibration = enable_tune_mode(model, True)
    for i in range(8):
        model(Prompt(i, length=(256, 512)[i % 2]))
    for layer in calibration.layers:
        held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for _, parts in layer.reservoir.calls
                for call, _ in parts for x in (call.q, call.k, call.v)}  # fmt: skip
        assert sum(held.values()) == sum(layer.reservoir.used) <= budget // 2
        assert layer.reservoir.seen == 8 > len(layer.reservoir.calls) >= 1
        assert len(layer.curves.sums) == 8, "every call counts in the curves"
    enable_tune_mode(model, False)
    assert calibration.statistics[0]["prompts_checked"] < calibration.statistics[0]["prompts_fitted"] == 8


def test_the_reservoir_is_a_uniform_sample_within_its_budget() -> None:
    selector = MeanSimilarity(pool=16, block_q=64, block_k=64)
    counts = torch.zeros(12)
    for seed in range(150):
        reservoir = observe.Reservoir(4 * (3 * 64 * 16 * 4), seed)
        for number in range(12):
            reservoir.offer(number, Watched(*(torch.zeros(1, 1, 64, 16) for _ in range(3))), selector, [0])
            assert sum(reservoir.used) <= reservoir.budget
        assert len(reservoir.calls) == 4 and len({n for n, _ in reservoir.calls}) == 4
        for number, _ in reservoir.calls:
            counts[number] += 1
    expected = 150 * 4 / 12
    assert (counts - expected).abs().max() < 4.5 * math.sqrt(expected * 2 / 3)
    long = Watched(*(torch.zeros(1, 1, 640, 16) for _ in range(3)))
    one = observe.Reservoir(1000, 0)
    one.offer(0, long, selector, [0, 3])
    assert len(one.calls) == 1, "a single call is always held"


@pytest.mark.parametrize(
    "sizes",
    [dict(q_len=512, k_len=512), dict(q_len=333, k_len=333), dict(q_len=256, k_len=384), dict(q_len=200, k_len=460)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["causal", "not causal", "causal, left padding", "not causal, padding"])
@pytest.mark.parametrize(("block_q", "block_k"), [(64, 64), (128, 64), (64, 128)])
def test_parts_of_a_call_are_treated_as_the_whole(sizes: dict[str, int], kind: str, block_q: int, block_k: int) -> None:
    q, k, v = activations(3, **sizes)
    mask = None
    if "padding" in kind:
        mask = torch.ones(1, k.shape[2], dtype=torch.bool)
        mask[:, :70] = False
    call = Watched(q, k, v, is_causal=kind.startswith("causal"), scale=0.25, attn_mask=mask)
    module = tuned_model().inner[0]
    module.simthreshd1.fill_(0.3)
    module.selector = MeanSimilarity(pool=16, block_q=block_q, block_k=block_k)
    blocks = [0, 1, -(-q.shape[2] // block_q) - 1]
    whole, split = (observe.PromptTally(HEADS, len(GRID.pv)) for _ in range(2))
    observe.add_pv_curves(whole, module, call, GRID, blocks)
    for part, inside in observe.parts(call, module.selector, blocks):
        observe.add_pv_curves(split, module, part, GRID, inside)
    assert torch.equal(whole.kept, split.kept) and torch.equal(whole.possible, split.possible)
    torch.testing.assert_close(whole.sums, split.sums, rtol=1e-5, atol=1e-5)
    assert torch.equal(whole.histogram.sum(-1), split.histogram.sum(-1))


# -- interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fail_at", [1, 3, 4])
def test_resume_runs_only_what_is_unfinished(
    tuned: tuple[FakeModel, Calibration], tmp_path: Path, fail_at: int
) -> None:
    path = tmp_path / "some[1].partial.pt"  # brackets mean something to glob
    model = FakeModel()
    model.fail_at = fail_at
    with pytest.raises(MemoryError):
        tune(model, checkpoint=path)
    assert path.with_name(path.name + ".rank0").exists()
    resumed = FakeModel()
    calibration = tune(resumed, checkpoint=path, resume=True)
    assert [prompt.seed for prompt in resumed.ran[: 6 - fail_at]] == list(range(fail_at, 6))[: 6 - fail_at]
    assert len(resumed.ran) == len(tuned[0].ran) - min(fail_at, 4)
    assert equal_results(resumed, tuned[0])
    assert calibration.statistics == tuned[1].statistics
    calibration.save(tmp_path / "tuned.pt")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tuned.json", "tuned.pt"], (
        "saved: no checkpoint is left"
    )


def test_a_failed_save_costs_nothing(tuned: tuple[FakeModel, Calibration], tmp_path: Path) -> None:
    file, taken = tmp_path / "c.rank0", tmp_path / "tuned.pt"
    calibration = tune(FakeModel(), checkpoint=tmp_path / "c")
    taken.mkdir()
    with pytest.raises(IsADirectoryError):
        calibration.save(taken)
    assert file.exists()
    resumed = FakeModel()
    again = tune(resumed, checkpoint=tmp_path / "c", resume=True)
    assert {prompt.seed for prompt in resumed.ran} == {4, 5}, "only those kept aside are run again"
    assert equal_results(resumed, tuned[0])
    assert again.statistics == tuned[1].statistics
    taken.rmdir()
    again.save(taken)
    assert taken.is_file() and not file.exists()
    file.touch()  # of a later calibration
    again.save(taken)
    assert file.exists()


def interrupted(path: Path, fail_at: int = 2, **changes: Any) -> Path:
    model = FakeModel()
    model.fail_at = fail_at
    with pytest.raises(MemoryError):
        tune(model, checkpoint=path, **changes)
    return path.with_name(path.name + ".rank0")


OTHERS: dict[str, dict[str, Any]] = {
    "prompts": dict(prompts=[*PROMPTS[:5], Prompt(99)]),
    "another order": dict(prompts=PROMPTS[::-1]),
    "fewer prompts": dict(prompts=PROMPTS[:5]),
    "seed": dict(seed=1),
    "sample": dict(query_blocks=5),
    "grid": dict(grid=observe.Grid(cdf=(0.5,))),
    "share kept aside": dict(kept_aside=0.5),
}


def test_models_of_one_class_are_told_apart() -> None:
    models = [nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)) for _ in range(2)]
    assert identity(models[0]) == identity(copy.deepcopy(models[0])) != identity(models[1])
    tuned = copy.deepcopy(models[0])
    with torch.no_grad():
        tuned[1].bias += 1  # type: ignore[operator]
    assert identity(tuned) != identity(models[0])
    assert identity(models[0].half()) != identity(tuned) and identity(models[0].to("meta")) == identity(nn.Sequential())


@pytest.mark.parametrize("other", OTHERS)
def test_the_checkpoint_of_another_calibration_is_refused(tmp_path: Path, other: str) -> None:
    interrupted(tmp_path / "c")
    model = FakeModel()
    before = state_of(model)
    with pytest.raises(ValueError, match="belongs to another calibration"):
        tune(model, checkpoint=tmp_path / "c", resume=True, **OTHERS[other])
    assert state_of(model) == before and not model.ran


def test_other_bounds_may_use_a_checkpoint(tmp_path: Path) -> None:
    interrupted(tmp_path / "c")
    model = FakeModel()
    tune(model, checkpoint=tmp_path / "c", resume=True, l1=0.05)
    assert model.ran[0].seed == 2


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    file = interrupted(tmp_path / "c")
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"nonsense"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint .*c\.rank0' is damaged: delete it or run without resume"):
            tune(FakeModel(), checkpoint=tmp_path / "c", resume=True)
    torch.save({"fingerprint": "x"}, file)
    with pytest.raises(ValueError, match="is not a checkpoint"):
        tune(FakeModel(), checkpoint=tmp_path / "c", resume=True)


def test_without_resume_old_checkpoints_are_dropped(tmp_path: Path) -> None:
    file = interrupted(tmp_path / "c", fail_at=3)
    file.with_name("c.rank1").write_bytes(file.read_bytes())  # of a run with more processes
    interrupted(tmp_path / "c", fail_at=1)
    model = FakeModel()
    tune(model, checkpoint=tmp_path / "c", resume=True)
    assert model.ran[0].seed == 1


def test_checkpoints_of_several_ranks_count_each_prompt_once(
    tuned: tuple[FakeModel, Calibration], tmp_path: Path
) -> None:
    # Rank 0 had taken over the file of rank 1, and was killed before it removed it.
    file = interrupted(tmp_path / "c", fail_at=1)
    old = file.read_bytes()
    file.write_bytes(interrupted(tmp_path / "c", fail_at=3).read_bytes())
    file.with_name("c.rank1").write_bytes(old)
    model = FakeModel()
    tune(model, checkpoint=tmp_path / "c", resume=True)
    assert model.ran[0].seed == 3
    assert equal_results(model, tuned[0])


def test_resume_without_a_checkpoint_starts_at_the_beginning(tmp_path: Path) -> None:
    model = FakeModel()
    tune(model, checkpoint=tmp_path / "c", resume=True)
    assert model.ran[0].seed == 0


def test_digests_tell_prompts_apart() -> None:
    ids = torch.arange(6)
    items: list[Any] = [
        "a text", "another", 3, 3.5, None, b"3", ids, ids + 1, ids.view(2, 3), ids.float(), ids.bfloat16(), ids > 2,
        {"ids": ids}, {"ids": ids + 1}, UserDict(ids=ids + 2), UserDict(ids=ids + 3), [ids], (ids, ids),
        ids.numpy(), ids.numpy() + 1, Prompt(1), Prompt(2),
    ]  # fmt: skip
    digests = [digest(item) for item in items]
    assert len(set(digests)) == len(items)
    assert digests == [digest(item) for item in items]
