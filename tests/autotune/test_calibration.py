"""The calibration loop: passes, checks, back-off, what it says and leaves behind when it fails, and tune mode."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_model import (
    BOUNDS,
    GRID,
    HEADS,
    PROMPTS,
    SETTINGS,
    FakeModel,
    Prompt,
    activations,
    equal_results,
    tune,
    tuned_model,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from autotune import Calibration, accumulate, calibrate, enable_tune_mode, load
from autotune import calibration as calibration_module
from autotune.tuned import FILE_KEYS
from spas_attn import backends, count_fallback
from spas_attn.call import Call


def state_of(model: FakeModel) -> list[Any]:
    """Everything that a calibration may change."""
    return [(m.mode, m.observer, m.l1, m.pv_l1, m.tail, m.tuned) for m in model.inner]


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
        assert entry["lengths"] == [330, 512] == list(module.tuned.lengths)
        assert entry["query_blocks_per_call"] == 4
        assert entry["checked_on_the_fitted_calls"] is False
        assert entry["check_backend"] in ("cpu", "reference")
        heads = entry["heads"]
        assert [head["head"] for head in heads] == list(range(HEADS))
        assert entry["mean_sparsity"] == pytest.approx(sum(head["sparsity"] for head in heads) / HEADS, abs=1e-3)
        assert 1 - module.tuned.expected_density == pytest.approx(entry["mean_sparsity"], abs=1e-3)
        for h, head in enumerate(heads):
            assert head["is_sparse"] == bool(module.is_sparse[h])
            for name in list(FILE_KEYS)[1:]:
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
        call = Call.make(q, k, v, is_causal=True)
        selector, pv = module.serving(call)
        reference = backends.get("reference").run
        truth, out = reference(call), reference(call.replace(mask=selector.mask_of(call), pv_threshold=pv))
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
    assert tune(other, PROMPTS[:4], seed=1, query_blocks=1).layers[0].curves.total().tolist() != (
        tune(again, PROMPTS[:4], seed=2, query_blocks=1).layers[0].curves.total().tolist()
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


@pytest.mark.parametrize(("make", "after"), [(FakeModel, 1), (tuned_model, 5), (tuned_model, 7)])
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
    for single in ("a text", {"input_ids": [[1, 2]]}):
        with pytest.raises(TypeError, match="prompts must be a list of prompts, got (str|dict)"):
            tune(FakeModel(), single)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="resume=True needs checkpoint"):
        calibrate(FakeModel(), resume=True)
    options = [("kept_aside", 0), ("kept_aside", 1.0), ("rounds", 0), ("query_blocks", 0), ("tail", "no"), ("every", 0)]
    for name, value in options:
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


def test_layers_that_cannot_be_sparse_are_refused_at_once() -> None:
    model = FakeModel()
    for dim in (8, 320):
        model.inner[1].head_dim = dim
        with pytest.raises(ValueError, match=rf"layers\.1\.inner_attention' has head dim {dim}; .* 16 to 256"):
            calibrate(model)
    with pytest.raises(ValueError, match=r"layers\.0\.projection\.weight' is float64"):
        calibrate(FakeModel().double())


def test_a_short_prompt_among_others_is_left_out() -> None:
    model, without = FakeModel(), FakeModel()
    with pytest.warns(
        RuntimeWarning, match=r"prompt 1 is left out: layer 'layers\.0.*fewer than 64 queries, one block"
    ):
        tune(model, [PROMPTS[0], Prompt(9, length=63), *PROMPTS[1:3]])
    with calibrate(without, **SETTINGS) as calibration:
        for prompt in calibration.prompts(PROMPTS[:3]):
            without(prompt)
    assert calibration.statistics[0]["prompts_fitted"] == 2
    assert [module.tuned.lengths for module in model.inner] == [module.tuned.lengths for module in without.inner]
    before = state_of(model)
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(RuntimeError, match="saw no prompt in the curves pass: .*63|fewer"),
    ):
        tune(model, [Prompt(9, length=63), Prompt(8, length=60)])
    assert state_of(model) == before


def unseen(prepare: Any, run: Any = None, **options: Any) -> str:
    """The error of a calibration in which a layer sees nothing."""
    model = FakeModel()
    prepare(model)
    with pytest.raises(RuntimeError) as caught, calibrate(model, **SETTINGS, **options) as calibration:  # noqa: PT012
        for prompt in calibration.prompts(PROMPTS[:2]):
            (run or model)(prompt)
    return str(caught.value)


def test_the_cause_is_named_when_a_layer_sees_nothing() -> None:
    def scheduled(model: FakeModel) -> None:
        model.inner[1].dense_now = True

    def not_ours(model: FakeModel) -> None:
        model.layers[1].forward = lambda q, k, v: q  # type: ignore[assignment,method-assign]

    def fallen_back(model: FakeModel) -> None:
        not_ours(model)
        model.layers[1].register_forward_hook(lambda *_: count_fallback("of a strange mask"))

    def masked(model: FakeModel) -> None:
        forward = model.inner[0].forward
        mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
        model.inner[0].forward = lambda *a, **k: forward(*a, **(k | {"attn_mask": mask}))  # type: ignore[method-assign]

    second = r"layer 'layers.1.inner_attention' saw nothing to calibrate on: "
    assert unseen(scheduled).startswith(f"prompt 0: {second}its calls were dense by schedule")
    assert f"{second}its attention was never called" in unseen(not_ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert f"{second}calls ran dense: of a strange mask" in unseen(fallen_back)
        assert "layers.0.inner_attention' saw nothing to calibrate on: the model passed a full 4-D" in unseen(masked)
    assert "every=3 left all of its calls out" in unseen(lambda model: None, every=3)
    assert "the model was not run" in unseen(lambda model: None, run=lambda prompt: None)
    model = FakeModel()
    model.fail_at = 1  # and the user goes on
    with pytest.warns(RuntimeWarning, match="prompt 1 is left out: .* its attention was never called"):
        calibration = tune(model, PROMPTS[:3], errors=MemoryError)
    assert calibration.statistics[0]["prompts_fitted"] == 1


def test_the_second_transformer_of_a_pipeline_that_no_step_reached() -> None:
    class Pipeline:
        transformer, transformer_2 = FakeModel(), FakeModel()

    message = "no step of this run reached the second transformer"
    with pytest.raises(RuntimeError, match=message), calibrate(Pipeline(), **SETTINGS) as calibration:  # noqa: PT012
        for prompt in calibration.prompts(PROMPTS[:2]):
            Pipeline.transformer(prompt)


def test_values_that_are_not_finite_name_prompt_layer_and_call() -> None:
    model, without = FakeModel(), FakeModel()

    def spoil(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if model.ran[-1].seed == 1:
            args[1][:, :, 77] = float("nan")

    model.layers[1].register_forward_pre_hook(spoil)
    where = r"call 0 of layer 'layers\.1\.inner_attention' in prompt 1: .*not finite"
    with pytest.raises(ValueError, match=where):
        tune(model, PROMPTS[:4])
    with pytest.warns(RuntimeWarning, match=f"prompt 1 is left out: {where}"):
        calibration = tune(model, PROMPTS[:4], skip_not_finite=True)
    assert calibration.statistics[0]["prompts_fitted"] == 2
    assert torch.equal(calibration.layers[0].curves.sums[0], tune(without, PROMPTS[:4]).layers[0].curves.sums[0])


# -- every n-th step --------------------------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """A model that is told a timestep and calls its layer once, with the timestep as seed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = FakeModel(layers=1).layers[0]

    def forward(self, timestep: Tensor) -> None:
        self.layer(*activations(int(timestep), 128, 128))


@pytest.mark.parametrize(("every", "seen"), [(1, [9, 7, 5, 3, 1]), (2, [7, 3]), (3, [7, 1]), (5, [5])])
def test_every_nth_step_is_observed(every: int, seen: list[int]) -> None:
    model, found = Denoiser(), []
    with calibrate(model, every=every, **SETTINGS) as calibration:
        observer = model.layer.inner_attention.observer
        model.layer.inner_attention.observer = lambda call: found.append(calibration.layers[0].calls) or observer(call)
        for _ in calibration.prompts(range(2)):
            for step in (9, 7, 5, 3, 1):
                for _ in range(2):  # guidance
                    model(timestep=torch.tensor([step]))
    calls = 2 * len(seen)
    assert calibration.layers[0].calls == calls, "of the last prompt"
    assert not model._forward_pre_hooks
    expected, steps = accumulate.PromptTally(HEADS, 2), [step for step in seen for _ in range(2)]
    for step in steps:
        call = Call.make(*activations(step, 128, 128), is_causal=True)
        accumulate.add_check(expected, model.layer.inner_attention, call)
    check = calibration.layers[0].check
    assert torch.allclose(check.total()[0], expected.sums[0])


def test_every_nth_call_of_a_language_model_is_observed() -> None:
    model = FakeModel()
    with calibrate(model, every=2, **SETTINGS) as calibration:
        for prompt in calibration.prompts(PROMPTS[:2]):
            for length in (64, 128, 192, 256):  # 128 and 256 are observed
                model(Prompt(prompt.seed, length))
    assert [layer.calls for layer in calibration.layers] == [2, 2]
    assert calibration.statistics[0]["lengths"] == [128, 256]


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
    assert [module.tuned.expected_density for module in model.inner] == [1.0, 1.0]


def test_a_kernel_that_gives_nonsense_makes_its_heads_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    run = accumulate.attend

    def broken(*args: Any, **more: Any) -> Any:
        out, stats = run(*args, **more)
        out[:, 0, 5] = float("nan")
        return out, stats

    monkeypatch.setattr(accumulate, "attend", broken)
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
    assert calibration is begun
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
    with pytest.raises(RuntimeError, match="saw nothing to calibrate on: .* fewer than 64 queries"):
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
    free: Any = calibration._pass
    for reservoir, curves in zip(free.reservoirs, free.sums, strict=True):
        held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for _, parts in reservoir.calls
                for call, _ in parts for x in (call.q, call.k, call.v)}  # fmt: skip
        assert sum(held.values()) == sum(reservoir.used) <= budget // 2
        assert reservoir.seen == 8 > len(reservoir.calls) >= 1
        assert len(curves.sums) == 8, "every call counts in the curves"
    enable_tune_mode(model, False)
    assert calibration.statistics[0]["prompts_checked"] < calibration.statistics[0]["prompts_fitted"] == 8


def test_compiled_models_are_calibrated_outside_of_the_graph(tuned: tuple[FakeModel, Calibration]) -> None:
    model, counter = FakeModel(), CompileCounter()
    for layer in model.layers:
        layer.compile(fullgraph=True, backend=counter)
    model(PROMPTS[3])
    frames = counter.frame_count
    assert frames >= 1
    assert tune(model).statistics == tuned[1].statistics
    assert counter.frame_count == frames, "nothing is compiled meanwhile"
    model(PROMPTS[3])
    assert counter.frame_count > frames, "in mode sparse it is again"


def test_only_layers_whose_thresholds_changed_are_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from autotune import passes

    checked: list[int] = []
    check = passes.add_check

    def counted(tally: Any, module: Any, *more: Any) -> str:
        checked.append(next(i for i, inner in enumerate(model.inner) if inner is module))
        return check(tally, module, *more)

    monkeypatch.setattr(passes, "add_check", counted)
    model = FakeModel()
    forward = model.layers[0].forward
    easy = [activations(i, 400, 400, 0.2) for i in range(9)]
    model.layers[0].forward = lambda *_: forward(*easy[len(model.ran) % 9])  # type: ignore[assignment,method-assign]
    calibration = tune(model, EASY + HARD, l1=0.04, pv_l1=0.06, tail=None, rounds=6)
    rounds = checked.count(1) // 2
    assert rounds > 1 and checked.count(0) == 2, "layer 0 misses nothing"
    assert all(layer.check is not None and len(layer.check.sums) == 2 for layer in calibration.layers)
    assert all(head["l1_total"] <= 0.06 for entry in calibration.statistics for head in entry["heads"])
