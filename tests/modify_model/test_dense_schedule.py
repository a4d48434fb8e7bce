"""dense_steps and dense_layers: decided by the timestep, whatever pipeline, number of steps, batch or guidance."""

from __future__ import annotations

import threading
import types

import diffusers
import pytest
import torch
from families import CASES, run
from pipelines import generate

import autotune
from autotune import Grid, SparseAttention
from modify_model import dense_steps_of, patch, restore, verify
from modify_model.cli.tiny import TINY
from modify_model.schedule import DenseSteps, now, rising, thousandths

pytestmark = pytest.mark.usefixtures("no_grad")

GRID = Grid(cdf=(0.3, 0.6), sim=(-1.0,), pv=(50.0,))
LOOSE = dict(l1=0.4, pv_l1=0.5, tail=None)


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, SparseAttention)]


def watch(model):
    """Records for every call of a transformer: the shape of its timestep, and which layers ran sparse."""
    calls = []

    def after(module, args, kwargs, output):
        inner = layers_of(model)
        calls.append((tuple(kwargs["timestep"].shape), [layer.last_density is not None for layer in inner]))
        for layer in inner:
            layer.last_density = None

    model.register_forward_hook(after, with_kwargs=True)
    return calls


@pytest.mark.parametrize(
    ("timestep", "dense"),
    [(1000, True), (901, True), (900, False), (500, False), (50, False), (49, True), (0, True), (899.9, False)],
)
def test_which_timesteps_are_dense(timestep, dense):
    hook = DenseSteps(0.1, 0.05, thousandths)
    for given in (timestep, torch.tensor([timestep]), torch.tensor([timestep] * 4, dtype=torch.float64)):
        hook(torch.nn.Identity(), (), {"timestep": given})
        assert now.dense is dense
    # Tokens of a known first frame are at noise level 0 all the time.
    hook(torch.nn.Identity(), (), {"timestep": torch.tensor([[0] * 16 + [timestep] * 48] * 2)})
    assert now.dense is dense
    DenseSteps(0.0, 0.0, thousandths)(torch.nn.Identity(), (), {"timestep": timestep})
    assert now.dense is False  # nothing of the last call is left


def test_nothing_is_dense_without_shares():
    hook = DenseSteps(0.0, 0.0, thousandths)
    assert not any(hook.is_dense(timestep) for timestep in (1000, 999, 500, 1, 0))


@pytest.mark.parametrize("steps", [4, 10, 25])
@pytest.mark.parametrize("name", ["Wan", "CogVideoX", "Flux", "Mochi"])
def test_numbers_of_steps_of_a_real_scheduler(name, steps):
    pipe = TINY[name].make()
    model = pipe.transformer
    model.forward = types.MethodType(quick, model)  # only the schedule matters here
    patch(pipe)
    shapes, dense = [], []
    model.register_forward_hook(
        lambda m, a, kwargs, out: shapes.append(tuple(kwargs["timestep"].shape)), with_kwargs=True
    )
    generate(pipe, name, steps, batch=2)  # sets the timesteps as this pipeline does
    first, last = max(1, steps // 5), 1
    patch(pipe, dense_steps=dense_steps_of(pipe.scheduler, first, last))
    repeats = len(shapes) // steps
    model.register_forward_hook(lambda *_: dense.append(now.dense))
    generate(pipe, name, steps, batch=2)
    by_step = [dense[i * repeats : (i + 1) * repeats] for i in range(steps)]
    assert all(len(set(calls)) == 1 for calls in by_step)  # guided and unguided calls alike
    if name == "CogVideoX":
        assert set(shapes) == {(4,)}  # guidance in the batch
    assert [calls[0] for calls in by_step] == [i < first or i >= steps - last for i in range(steps)]


def quick(self, hidden_states, timestep, **others):
    """A forward that costs nothing and returns something of the right shape."""
    return (hidden_states * 0.1,)


FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
SCHEDULERS = {
    "UniPCMultistepScheduler": FLOW,
    "DPMSolverMultistepScheduler": FLOW,
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0},
    "FlowMatchHeunDiscreteScheduler": {"shift": 3.0},  # repeats its timesteps
    "FlowMatchLCMScheduler": {"shift": 3.0},
    "CogVideoXDPMScheduler": {"timestep_spacing": "trailing"},
    "EulerDiscreteScheduler": {},
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(("first", "last"), [(3, 0), (0, 2), (1, 1)])
def test_borders_lie_between_distinct_timesteps(name, first, last):
    scheduler = getattr(diffusers, name)(**SCHEDULERS[name])
    with pytest.raises(ValueError, match="scheduler has no timesteps yet: call dense_steps_of after"):
        dense_steps_of(scheduler, first, last)
    scheduler.set_timesteps(10)
    hook = DenseSteps(*dense_steps_of(scheduler, first, last), thousandths)
    steps = scheduler.timesteps.unique_consecutive().tolist()
    assert [hook.is_dense(t) for t in steps] == [i < first or i >= len(steps) - last for i in range(len(steps))]


def test_rising_timesteps():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    hook = DenseSteps(*dense_steps_of(scheduler, 1, 1), rising)
    assert [hook.is_dense(t) for t in scheduler.timesteps] == [True, False, False, True]


def test_sparse_and_dense_steps_in_a_pipeline(set_sparse):
    pipe = TINY["CogVideoX"].make()
    dense = generate(pipe, "CogVideoX")
    set_sparse(patch(pipe).transformer)
    calls = watch(pipe.transformer)
    sparse = generate(pipe, "CogVideoX")
    calls.clear()
    patch(pipe, dense_steps=(1, 1))
    assert layers_of(pipe.transformer)[0].dense_steps == dense_steps_of(pipe.scheduler, 1, 1)
    mixed = generate(pipe, "CogVideoX")
    assert [any(ran) for _, ran in calls] == [False, True, True, False]
    assert not torch.equal(mixed, sparse) and not torch.equal(mixed, dense)
    patch(pipe)  # what this call says: no dense steps any more
    assert torch.equal(generate(pipe, "CogVideoX"), sparse)
    restore(pipe)
    assert torch.equal(generate(pipe, "CogVideoX"), dense)


def test_threads_on_one_model_keep_their_own_schedule_and_text(set_sparse):
    """Eight threads, at noise levels that run dense and sparse, with texts of different lengths."""
    case = CASES["Flux"]
    model = patch(case.model(), dense_steps=(0.3, 0.1))
    set_sparse(model, cdf=0.3)
    jobs = []
    for index in range(8):
        inputs, length = case.inputs(1, level=(1.0, 0.5)[index % 2]), (64, 16, 48, 32)[index // 2]
        text = {"encoder_hidden_states": inputs["encoder_hidden_states"][:, :length], "txt_ids": torch.zeros(length, 3)}
        jobs.append(inputs | text)
    expected = [run(model, inputs) for inputs in jobs]
    wrong, barrier = [], threading.Barrier(len(jobs))

    def work(index):
        with torch.no_grad():
            barrier.wait()
            wrong.extend(index for _ in range(6) if not torch.equal(run(model, jobs[index]), expected[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_dense_layers_are_calibrated_and_run_dense(tmp_path):
    case = CASES["Wan"]
    model = patch(case.model(), **LOOSE, dense_layers=[0])
    with autotune.calibrate(model, grid=GRID, query_blocks=2) as calibration:
        for prompt in calibration.prompts([case.inputs(1)]):
            model(**prompt)
    calibration.save(tmp_path / "tuned.pt")
    assert [row.status for row in verify(model).layers] == ["kept dense", "sparse"]
    for layers, expected in (([0], [False, True]), ([], [True, True]), ([0, 1], [False, False])):
        fresh = autotune.load_sparse_attention_state_dict(
            patch(case.model(), dense_layers=layers), tmp_path / "tuned.pt"
        )
        for layer in layers_of(fresh):
            layer.record_density = True
        calls = watch(fresh)
        fresh(**case.inputs(1))
        assert calls[0][1] == expected


def test_calibration_does_not_watch_dense_steps(tmp_path):
    case = CASES["Flux"]
    model = patch(case.model(), **LOOSE, dense_steps=(0.3, 0.0))
    seen = []
    with autotune.calibrate(model, grid=GRID, query_blocks=2) as calibration:
        for levels in calibration.prompts([(1.0, 0.5), (0.9, 0.2, 0.1)]):
            for level in levels:
                model(**case.inputs(1, level))
            seen.append([entry.calls for entry in calibration.layers])
    assert seen[0] == [1, 1]
    calibration.save(tmp_path / "tuned.pt")
    with pytest.warns(RuntimeWarning, match=r"calibrated with dense_steps=\(0\.3, 0\.0\)"):
        autotune.load_sparse_attention_state_dict(patch(case.model()), tmp_path / "tuned.pt")


def test_calibration_with_dense_steps_alone_is_an_error():
    case = CASES["Flux"]
    model = patch(case.model(), dense_steps=(0.3, 0.0))

    def tune():
        with autotune.calibrate(model) as calibration:
            for _ in calibration.prompts([1.0]):
                model(**case.inputs(1, level=1.0))

    with pytest.raises(RuntimeError, match="dense by schedule; use fewer dense_steps"):
        tune()


def test_scheduled_calls_count_as_dense(set_sparse):
    case = CASES["Flux"]
    model = patch(case.model(), dense_steps=(0.3, 0.0))
    set_sparse(model)
    with autotune.record_density(model) as recorded:
        model(**case.inputs(1, level=1.0))
        assert recorded.mean == 1
        recorded.clear()
        model(**case.inputs(1, level=0.5))
        assert recorded.mean < 1


@pytest.mark.parametrize("wrong", [(0.5, 0.5), (-0.1, 0), (1.0, 0), 0.3, (0.1,), ("a", 0), (float("nan"), 0)])
def test_shares_that_make_no_sense(wrong):
    model = CASES["Wan"].model()
    with pytest.raises(ValueError, match=r"dense_steps must be \(first, last\), shares of the noise range"):
        patch(model, dense_steps=wrong)
    assert verify(model).replaced == 0


def test_schedules_that_a_model_cannot_have(make_llama):
    with pytest.raises(ValueError, match=r"dense_layers must be numbers from 0 to 1, got \[2\]"):
        patch(CASES["Wan"].model(), dense_layers=[0, 2])
    with pytest.raises(ValueError, match="has no timesteps"):
        patch(make_llama(), dense_steps=(0.1, 0.0))
    with pytest.raises(ValueError, match=r"whole numbers of steps of a pipeline's scheduler, got \(3, 1\)"):
        patch(CASES["Wan"].model(), dense_steps=(3, 1))
    with pytest.raises(ValueError, match="scheduler has no timesteps yet"):
        patch(TINY["Flux"].make(), dense_steps=(3, 1))
    scheduler = types.SimpleNamespace(timesteps=torch.tensor([900.0, 500.0]))
    with pytest.raises(ValueError, match="leave one of 2 steps, got 1, 1"):
        dense_steps_of(scheduler, 1, 1)
    with pytest.raises(ValueError, match="this one's rise"):
        dense_steps_of(types.SimpleNamespace(timesteps=torch.tensor([0.0, 500.0])), 1)
    model = patch(CASES["Wan"].model(), dense_steps=(0.1, 0.0))
    with pytest.raises(TypeError, match="without timestep"):
        model(hidden_states=torch.zeros(1, 16, 3, 28, 28))


def test_arguments_by_position(set_sparse):
    case = CASES["Wan"]
    model = patch(case.model(), dense_steps=(0.3, 0.0))
    set_sparse(model)
    inputs, calls = case.inputs(1), []
    model.register_forward_hook(lambda *_: calls.append((now.dense, now.text_length)))
    for timestep in (900, 500):
        model(inputs["hidden_states"], torch.tensor([timestep]), inputs["encoder_hidden_states"])
    assert calls == [(True, 32), (False, 32)]
