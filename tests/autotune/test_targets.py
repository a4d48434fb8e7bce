"""Calibrating for one budget: sensitivities, targets met and predicted, other targets at load time, what is refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from chain_model import Chain, run
from fake_model import GRID, HEADS, PROMPTS, FakeModel, Prompt, activations, exact, same, tune

from autotune import Calibration, extract_sparse_attention_state_dict, load, machine, objective, save
from autotune import load_sparse_attention_state_dict as load_into
from autotune.budget import outcome
from autotune.files import is_verified
from autotune.machine import Times
from autotune.tradeoff import KL, RELATIVE
from spas_attn import cost_model
from spas_attn.call import Call
from spas_attn.metrics import relative_l1
from spas_attn.selectors import FlexPrefill

WEIGHTS = (1.0, 4.0, 0.2)
BUDGET: dict[str, Any] = dict(objective="budget", sparsity=0.35, grid=GRID, query_blocks=None)


def chain(**settings: Any) -> Chain:
    return Chain(WEIGHTS, **settings)


def equal(a: Chain, b: Chain) -> bool:
    return all(same(x.tuned, y.tuned) for x, y in zip(a.inner, b.inner, strict=True))


@pytest.fixture(scope="module")
def calibrated() -> tuple[Chain, Calibration]:
    """A model and its calibration for sparsity=0.35; not to be changed."""
    model = chain()
    return model, run(model, PROMPTS, **BUDGET)


@pytest.fixture(scope="module")
def file(calibrated: tuple[Chain, Calibration], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("budget") / "tuned.pt"
    calibrated[1].save(path, page=False)
    return path


# -- calibrating ------------------------------------------------------------------------------------------------------


def test_the_target_is_met_on_the_prompts_it_was_chosen_on(calibrated: tuple[Chain, Calibration]) -> None:
    model, calibration = calibrated
    tradeoff = calibration.tradeoff
    assert tradeoff is not None and tradeoff.target is not None and str(tradeoff.target) == "sparsity=0.35"
    step = 0.2 / (3 * HEADS)  # of one head
    assert 0.35 <= outcome(tradeoff).sparsity <= 0.35 + step
    kept = [torch.nn.functional.pad(layer.curves.density(), (0, 1), value=1.0).gather(1, layer.chosen[:, None])
            for layer in calibration.layers if layer.curves is not None]  # fmt: skip
    assert 1 - float(torch.stack(kept).mean()) == pytest.approx(outcome(tradeoff).sparsity, abs=1e-3)
    for layer, module in zip(tradeoff.layers, model.inner, strict=True):
        assert module.mode == "sparse" and module.tuned.checked and module.tuned.bounds == (None, None, None)
        assert (module.l1, module.pv_l1, module.tail) == (0.06, 0.07, 0.5), "no bounds were asked for"
        expected = torch.where(layer.chosen < 16, layer.threshold[layer.chosen.long().clamp(max=15)], 1.0)
        assert torch.equal(module.tuned.threshold, expected)
        assert (module.tuned.pv == 50).all(), "no PV skip without a bound on it"


def test_order_of_prompts(calibrated: tuple[Chain, Calibration]) -> None:
    seeds = [prompt.seed for prompt in calibrated[0].ran]
    # Four fitted; the first again for sensitivities, and then dense and with each layer alone sparse; those kept aside
    # once, because without bounds nothing can miss, and then dense and sparse.
    assert seeds == [0, 1, 2, 3, 0, *[0] * 4, 4, 4, 4, 5, 5, 5]
    assert calibrated[1].expected_passes == 7


def test_sensitivities_by_brute_force(calibrated: tuple[Chain, Calibration]) -> None:
    _, calibration = calibrated
    assert calibration.tradeoff is not None and calibration.tradeoff.measure == KL
    found = [layer.sensitivity for layer in calibration.tradeoff.layers]
    q_len = PROMPTS[0].length
    for i, layer in enumerate(calibration.layers):
        state = layer.probe(GRID)
        alone, dense = chain(), chain()
        for j, module in enumerate(alone.inner):
            module.mode = "sparse" if i == j else "dense"
            module.tuned = state if i == j else None
        logits = [m(PROMPTS[0]).logits.double().log_softmax(-1) for m in (dense, alone)]
        divergence = (logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean()
        call = Call.make(*activations(PROMPTS[0].seed * 10 + i, q_len, q_len), is_causal=True)
        outputs = [exact(call), exact(call.replace(mask=alone.inner[i].serving(call)[0].mask_of(call)))]
        errors = (outputs[1] - outputs[0]).abs().sum((0, 2, 3)) / outputs[0].abs().sum((0, 2, 3))
        assert (errors < 0.3).all(), "near a mean error of 0.1"
        share = calibration.tradeoff.layers[i].share
        assert found[i] == pytest.approx(float(divergence / (share * errors.square()).sum()), rel=1e-3)
    assert found[1] > 4 * found[0] > 16 * found[2] > 0, "as the layers' outputs are weighted"  # type: ignore[operator]


def test_shares_are_those_of_the_output(calibrated: tuple[Chain, Calibration]) -> None:
    _, calibration = calibrated
    assert calibration.tradeoff is not None
    for layer, known in zip(calibration.tradeoff.layers, calibration.layers, strict=True):
        assert known.curves is not None
        output = known.curves.total()[0].square()
        torch.testing.assert_close(layer.share.double(), output / output.sum(), rtol=1e-5, atol=1e-7)
    equal_shares = run(chain(), PROMPTS[:3], **BUDGET, share=False, sensitivity=0).tradeoff
    assert equal_shares is not None and equal_shares.measure is None
    assert all((layer.share == 0.25).all() and layer.sensitivity is None for layer in equal_shares.layers)


@pytest.mark.parametrize("logits", [True, False])
def test_predicted_and_measured_error(logits: bool) -> None:
    model = chain(logits=logits)
    calibration = run(model, PROMPTS, **BUDGET | dict(sparsity=0.25), sensitivity=2)
    tradeoff = calibration.tradeoff
    assert tradeoff is not None and tradeoff.measure == (KL if logits else RELATIVE)
    assert tradeoff.predicted == pytest.approx(outcome(tradeoff).error)
    errors = []
    for prompt in PROMPTS[4:]:
        dense, sparse = chain(logits=logits)(prompt), model(prompt)
        if logits:
            p, q = (x.logits.double().log_softmax(-1) for x in (dense, sparse))
            errors.append(float((p.exp() * (p - q)).sum(-1).mean()))
        else:
            errors.append(float((sparse - dense).norm() / dense.norm()))
    assert tradeoff.measured == pytest.approx(sum(errors) / 2, rel=1e-3)


def test_an_error_target(calibrated: tuple[Chain, Calibration]) -> None:
    assert calibrated[1].tradeoff is not None and calibrated[1].tradeoff.predicted is not None
    wanted = calibrated[1].tradeoff.predicted / 3
    tradeoff = run(chain(), PROMPTS, objective="budget", error=wanted, grid=GRID, query_blocks=None).tradeoff
    assert tradeoff is not None and tradeoff.predicted is not None
    assert 0.5 * wanted <= tradeoff.predicted <= wanted
    assert outcome(tradeoff).sparsity < 0.35


def test_guards_are_held_and_heads_that_miss_them_back_off() -> None:
    prompts = [Prompt(i, 400, 0.2) for i in range(6)] + [Prompt(10 + i, 400, 3.0) for i in range(2)]  # harder ones
    options = BUDGET | dict(sparsity=0.3, sensitivity=0)
    free = run(chain(), prompts, **options)
    guarded, model = None, chain()
    with pytest.warns(RuntimeWarning, match="out of reach"):  # backed off, the others cannot make up for it
        guarded = run(model, prompts, **options, l1=0.04, tail=1.0)
    assert [layer.bounds for layer in guarded.layers] == [(0.04, pytest.approx(0.04 * 7 / 6), 1.0)] * 3
    assert any((layer.tighter < 1).any() for layer in guarded.layers)
    errors = [max(head[name] for entry in found.statistics for head in entry["heads"])
              for found in (free, guarded) for name in ("l1_total", "tail_total")]  # fmt: skip
    assert errors[0] > 0.04 * 7 / 6 >= errors[2] and errors[3] <= 1.0
    assert guarded.tradeoff is not None
    for layer in guarded.tradeoff.layers:
        inside = layer.chosen < layer.candidates
        index = layer.chosen.long().clamp(max=layer.candidates - 1)[:, None]
        assert layer.allowed.gather(1, index)[:, 0][inside].all()


def test_without_a_loop_there_are_no_sensitivities() -> None:
    from autotune import calibrate

    model = chain()
    with calibrate(model, **BUDGET) as calibration:
        for prompt in PROMPTS[:3]:
            model(prompt)
    assert calibration.tradeoff is not None and calibration.tradeoff.measure is None
    assert outcome(calibration.tradeoff).sparsity >= 0.35
    with pytest.raises(ValueError, match="a loop over prompts"), calibrate(chain(), **_with(error=0.1)) as broken:
        broken.model(PROMPTS[0])


def test_a_model_that_is_not_called_itself_has_no_sensitivities() -> None:
    model = chain()
    forward = model.forward
    calibration = Calibration(model, **BUDGET)
    with pytest.warns(RuntimeWarning, match="no call of the model itself was seen"), calibration:  # noqa: PT031
        for prompt in calibration.prompts(PROMPTS[:3]):
            forward(prompt)
    assert calibration.tradeoff is not None and calibration.tradeoff.measure is None


def test_bounds_can_have_sensitivities_too() -> None:
    calibration = run(chain(), PROMPTS[:4], l1=0.1, pv_l1=0.2, tail=None, grid=GRID, query_blocks=4, sensitivity=1)
    tradeoff = calibration.tradeoff
    assert tradeoff is not None and tradeoff.target is None and tradeoff.measure == KL
    assert tradeoff.predicted is not None and tradeoff.measured is not None


def _with(**target: float) -> dict[str, Any]:
    return {name: value for name, value in BUDGET.items() if name != "sparsity"} | target


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (_with(), ValueError, "needs a target: sparsity=, speedup= or error="),
        (_with(sparsity=0.5, error=0.1), ValueError, "only one of"),
        (_with(sparsity=1.2), ValueError, "sparsity must be above 0 and below 1, got 1.2"),
        (_with(error="small"), TypeError, "error must be a number"),
        (
            _with(sparsity=0.5) | {"objective": "cheap"},
            ValueError,
            "objective must be 'bounds' or 'budget', got 'cheap'",
        ),
        ({"sparsity": 0.5}, ValueError, "sparsity=0.5 is a target of objective='budget', got objective='bounds'"),
        (BUDGET | {"sensitivity": -1}, ValueError, "sensitivity must be a number of prompts, 0 or more, got -1"),
        (BUDGET | {"sensitivity": True}, ValueError, "sensitivity must be a number of prompts"),
        (_with(error=0.1) | {"sensitivity": 0}, ValueError, "sensitivity must be 1 or more"),
        (BUDGET | {"share": 1}, TypeError, "share must be True or False"),
        (BUDGET | {"pv_l1": 0.1}, ValueError, "give both, or l1 alone"),
        (BUDGET | {"l1": 0.1, "pv_l1": 0.05}, ValueError, "it must exceed l1"),
        (BUDGET | {"tail": -1.0}, ValueError, "tail must be above 0"),
        (_with(speedup=1.5), ValueError, "no row for this machine"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(chain(), PROMPTS[:2], **options)


def test_a_sparsity_out_of_reach_warns_and_takes_the_sparsest() -> None:
    with pytest.warns(RuntimeWarning, match=r"sparsity=0\.9 is out of reach: .* taking these"):
        calibration = run(chain(), PROMPTS[:3], **_with(sparsity=0.9), sensitivity=0)
    assert all((layer.chosen < 16).all() for layer in calibration.layers)


# -- another target at load time --------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [{"sparsity": 0.2}, {"sparsity": 0.4}, {"error": 0.003}])
def test_a_target_at_load_equals_a_calibration_for_it(file: Path, target: dict[str, float]) -> None:
    loaded, anew = chain(), chain()
    load_into(loaded, file, **target)
    run(anew, PROMPTS, **_with(**target))
    assert equal(loaded, anew)
    for a, b in zip(loaded.inner, anew.inner, strict=True):
        assert not a.tuned.checked and b.tuned.checked
        assert str(a.tuned.tradeoff.target) == str(b.tuned.tradeoff.target)
        assert (
            a.tuned.tradeoff.predicted == pytest.approx(b.tuned.tradeoff.predicted)
            and a.tuned.tradeoff.measured is None
        )
        assert "not checked with the real kernel" in a.tuned.origin and "not checked" in repr(a)
        assert a.tuned.lengths == b.tuned.lengths


def test_the_target_it_was_calibrated_for_stays_checked(file: Path, calibrated: tuple[Chain, Calibration]) -> None:
    model = chain()
    load_into(model, file, sparsity=0.35)
    assert equal(model, calibrated[0])
    assert all(module.tuned.checked for module in model.inner)
    assert [m.tuned.expected_density for m in model.inner] == [m.tuned.expected_density for m in calibrated[0].inner]
    assert is_verified(extract_sparse_attention_state_dict(model))


def test_a_file_saved_after_loading_for_another_target_says_so(file: Path, tmp_path: Path) -> None:
    model, again = chain(), chain()
    load_into(model, file, sparsity=0.2)
    path = tmp_path / "again.pt"
    save(extract_sparse_attention_state_dict(model), path)
    state = load(path)
    assert is_verified(load(file)) and not is_verified(state)
    assert state["_metadata"]["checked"] is False and state["_metadata"]["tradeoff"]["target"] == ["sparsity", 0.2]
    load_into(again, path)
    assert equal(model, again) and not again.inner[0].tuned.checked
    load_into(again, path, sparsity=0.35)  # the whole trade-off is still there
    assert not equal(model, again)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert equal(model, copied) and copied.inner[0].tuned.tradeoff is copied.inner[1].tuned.tradeoff


def test_without_a_target_a_file_loads_as_it_is(file: Path, calibrated: tuple[Chain, Calibration]) -> None:
    model = chain()
    load_into(model, file)
    assert equal(model, calibrated[0]) and model.inner[0].tuned.checked
    assert load(file)["_metadata"]["format"] == 3
    assert "checked with the real kernel" in model.inner[0].tuned.origin


def test_files_that_no_target_can_be_chosen_from(tmp_path: Path, file: Path) -> None:
    bounds = tune(FakeModel(), PROMPTS[:3])
    bounds.save(tmp_path / "bounds.pt", page=False)
    state = load(tmp_path / "bounds.pt")
    assert state["_metadata"]["format"] == 2, "readers of format 2 lose nothing but the trade-off"
    model = FakeModel()
    load_into(model, state, sparsity=0.05)  # a calibration for bounds keeps it too
    tradeoff = model.inner[0].tuned.tradeoff
    for layer in tradeoff.layers:  # and its bounds hold
        assert layer.allowed.gather(1, layer.chosen.long().clamp(max=15)[:, None])[layer.chosen < 16].all()
    with pytest.raises(ValueError, match=r"sparsity=0\.95 is out of reach"):
        load_into(FakeModel(), state, sparsity=0.95)
    with pytest.raises(ValueError, match="measured sensitivities only"):
        load_into(FakeModel(), state, error=0.1)
    old = state | {"_metadata": {k: v for k, v in state["_metadata"].items() if k != "tradeoff"}}
    load_into(FakeModel(), old)
    untouched = FakeModel()
    with pytest.raises(ValueError, match=r"no trade-off that sparsity=0\.5 could be chosen from"):
        load_into(untouched, old, sparsity=0.5)
    assert untouched.inner[0].tuned is None
    with pytest.raises(ValueError, match=r"tuned\.pt': speedup=1\.5: .* no row for this machine"):
        load_into(chain(), file, speedup=1.5)
    with pytest.raises(ValueError, match="sparsity must be above 0"):
        load_into(chain(), file, sparsity=-1)
    state["_metadata"]["tradeoff"]["layers"] = state["_metadata"]["tradeoff"]["layers"][:1]
    with pytest.raises(ValueError, match="not that of its layers"):
        load_into(FakeModel(), state, sparsity=0.05)
    state["_metadata"]["tradeoff"]["layers"][0]["error"] = None
    with pytest.raises(ValueError, match="the trade-off is invalid: error of layer"):
        load_into(FakeModel(), state)


# -- time -------------------------------------------------------------------------------------------------------------


def test_a_speedup_by_the_cost_model(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def times(shape: Any, *_: Any) -> Times:
        assert shape in ((HEADS, 512, 512, 16, True), (1, 1024, 1024, 64, True)), "the second one asks for a row"
        return Times(dense=1.0, fixed=0.1, blocks=1.0)

    monkeypatch.setattr("autotune.retarget.times", times)
    monkeypatch.setattr(objective, "times", times)
    loaded, anew = chain(), chain()
    load_into(loaded, file, speedup=1.25)
    calibration = run(anew, PROMPTS, **_with(speedup=1.25))
    assert equal(loaded, anew)
    density = [module.tuned.expected_density for module in loaded.inner]
    served = sum(1.0 if module.tuned.all_dense else 0.1 + d for module, d in zip(loaded.inner, density, strict=True))
    assert 1.25 <= 3 / served <= 1.3
    reasons = {head["runs_dense_because"] for entry in calibration.statistics for head in entry["heads"]}
    assert reasons <= {None, "the budget is better spent on other heads",
                       "dense attention of the whole layer is expected to be faster on this machine"}  # fmt: skip


def test_a_machine_without_a_row_is_refused_before_anything_runs() -> None:
    model = chain()
    with pytest.raises(ValueError, match="no row for this machine"):
        Calibration(model, **_with(speedup=1.5))


def test_an_error_target_counts_time_where_dense_attention_may_run(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotune.retarget.times", lambda *_: Times(dense=1.0, fixed=1.0, blocks=1.0))
    automatic, named = chain(), chain(backend="cpu")
    load_into(automatic, file, error=0.01)
    load_into(named, file, error=0.01)
    assert all(module.tuned.all_dense for module in automatic.inner), "sparse attention gains nothing here"
    assert not any(module.tuned.all_dense for module in named.inner), "and is asked for by name here"


def test_expected_times_are_those_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    row = cost_model.Row(
        "A GPU", (9, 0), 64, True, {"sdpa": cost_model.Line(0.1, 0.0, 2.0), "flash": cost_model.Line(0.3, 0.0, 1.0)},
        cost_model.Line(0.2, 0.1, 0.01),
        {"triton/native": cost_model.Line(0.1, 0.2, 3.0), "triton/int8_bf16": cost_model.Line(0.2, 0.3, 1.5)},
    )  # fmt: skip
    monkeypatch.setattr(machine, "_row", lambda *_: row)
    shape, tokens, pairs = (8, 50_000, 50_000, 64, True), 0.8, 20.0
    slow = FlexPrefill()
    cuda, rest = torch.device("cuda"), slow.selection_ms
    native = machine.times(shape, cuda, "native", slow)
    assert native is not None
    assert native.dense == pytest.approx(0.3 + pairs)
    assert rest > 0
    assert native.sparse(0.25) == pytest.approx(0.2 + 0.1 * tokens + 0.01 * pairs + rest + 0.1 + 0.2 * tokens + 15.0)
    best = machine.times(shape, cuda, "auto", slow)
    assert best is not None and best.blocks == pytest.approx(1.5 * pairs)
    assert machine.times(shape, cuda, "int8_fp8", slow) is None
    monkeypatch.undo()
    assert machine.times(shape, torch.device("cpu"), "native", slow) is None


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """``blocks``: as many as memory holds in the curve and PV passes; ``check``: whether it holds the check."""
    from autotune import passes

    limits: dict[str, Any] = {"blocks": 99, "check": True, "seen": []}

    def curves(name: str) -> Any:
        original = getattr(passes, name)

        def limited(tally: Any, module: Any, call: Call, grid: Any, blocks: list[int]) -> None:
            limits["seen"].append(len(blocks))
            if len(blocks) > limits["blocks"]:
                tally.kept += 1000  # half done: nothing of it may stay
                raise torch.OutOfMemoryError("injected")
            original(tally, module, call, grid, blocks)

        return limited

    for name in ("add_curves", "add_pv_curves"):
        monkeypatch.setattr(passes, name, curves(name))
    check = passes.add_check

    def checked(tally: Any, module: Any, call: Call, *more: Any) -> str:
        if not limits["check"] and call.q_len == 512:
            raise torch.OutOfMemoryError("injected")
        return check(tally, module, call, *more)

    monkeypatch.setattr(passes, "add_check", checked)
    return limits


def test_without_memory_fewer_query_blocks_are_looked_at(little_memory: dict[str, Any]) -> None:
    little_memory["blocks"] = 2
    calibration = tune(FakeModel(), PROMPTS[:4])
    assert little_memory["seen"][:2] == [4, 2]
    assert [entry["calls_skipped_for_memory"] for entry in calibration.statistics] == [0, 0]
    curves = calibration.layers[0].curves
    assert curves is not None and len(curves.sums) == 3
    assert int(curves.queries[0]) == 3 * 2 * 64 - _missing(calibration)
    assert (curves.kept <= curves.possible[:, None]).all()


def _missing(calibration: Calibration) -> int:
    """Queries that ragged last blocks lack."""
    curves = calibration.layers[0].curves
    assert curves is not None
    return (-int(curves.queries[0])) % 64


def test_a_call_that_never_fits_is_skipped_and_counted(little_memory: dict[str, Any]) -> None:
    little_memory["check"] = False  # of prompt 4, whose calls have 512 queries
    with pytest.warns(RuntimeWarning, match="prompt 4 is left out: .*there was no memory to look at it; use shorter"):
        calibration = tune(FakeModel(), PROMPTS)
    assert all(entry["calls_skipped_for_memory"] >= 1 for entry in calibration.statistics)
    assert all(entry["prompts_checked"] == 1 for entry in calibration.statistics)
    little_memory["blocks"] = 0
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match="saw no prompt in the curves pass"):
        tune(FakeModel(), PROMPTS[:3])
    assert little_memory["seen"][-3:] == [4, 2, 1]


def test_relative_error_of_a_budget_is_that_of_the_kernel(calibrated: tuple[Chain, Calibration]) -> None:
    """The check measured what the model then runs."""
    model, calibration = calibrated
    dense = chain()
    for prompt in PROMPTS[4:]:
        assert float(relative_l1(model(prompt).logits, dense(prompt).logits)) > 0
    assert all(head["l1_total"] > 0 for entry in calibration.statistics for head in entry["heads"] if head["is_sparse"])
