"""dense_steps and dense_layers: decided by the timestep, whatever pipeline, number of steps, batch or guidance."""

from __future__ import annotations

import types

import pipelines
import pytest
import torch
from diffusion_models import CASES

import autotune
from autotune import SparseAttention
from autotune.observe import Grid
from modify_model import dense_steps_of, patch, restore, verify
from modify_model.schedule import DenseSteps, thousandths

pytestmark = pytest.mark.usefixtures("no_grad")


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, SparseAttention)]


def watch(model):
    """Records for every call of a transformer: its timestep, and which layers ran sparse."""
    calls = []

    def after(module, args, kwargs, output):
        inner = layers_of(model)
        ran = [layer.last_density is not None for layer in inner]
        calls.append((float(kwargs["timestep"].max()), tuple(kwargs["timestep"].shape), ran))
        for layer in inner:
            layer.last_density = None

    model.register_forward_hook(after, with_kwargs=True)
    return calls


@pytest.mark.parametrize(
    ("timestep", "dense"),
    [(1000, True), (901, True), (900, False), (500, False), (50, False), (49, True), (0, True), (899.9, False)],
)
def test_which_timesteps_are_dense(timestep, dense):
    layer = SparseAttention()
    hook = DenseSteps(0.1, 0.05, thousandths, [layer])
    for given in (timestep, torch.tensor([timestep]), torch.tensor([timestep] * 4, dtype=torch.float64)):
        hook(torch.nn.Identity(), (), {"timestep": given})
        assert layer.dense_now is dense
    # Tokens of a known first frame are at noise level 0 all the time.
    hook(torch.nn.Identity(), (), {"timestep": torch.tensor([[0] * 16 + [timestep] * 48] * 2)})
    assert layer.dense_now is dense


def test_nothing_is_dense_without_shares():
    hook = DenseSteps(0.0, 0.0, thousandths, [])
    assert not any(hook.is_dense(timestep) for timestep in (1000, 999, 500, 1, 0))


@pytest.mark.parametrize("name", CASES)
def test_timesteps_are_read_as_each_family_passes_them(name, set_sparse):
    case = CASES[name]
    model = patch(case.model(), dense_steps=(0.2, 0.1))
    set_sparse(model)
    calls = watch(model)
    for level in (1.0, 0.81, 0.79, 0.5, 0.11, 0.09, 0.0):
        model(**case.inputs(2) | {"timestep": torch.full((2,), level * case.full_noise)}, return_dict=False)
    assert [any(ran) for _, _, ran in calls] == [False, False, True, True, True, False, False]
    assert all(len(set(ran)) == 1 for _, _, ran in calls)


@pytest.mark.parametrize("steps", [4, 10, 25])
@pytest.mark.parametrize("make", [pipelines.wan, pipelines.cogvideo, pipelines.flux], ids=lambda make: make.__name__)
def test_numbers_of_steps_of_a_real_scheduler(make, steps):
    pipe = make()
    model = pipe.transformer
    model.forward = types.MethodType(quick, model)  # only the schedule matters here
    patch(pipe)
    timesteps = watch(model)
    pipelines.generate(pipe, steps, batch=2)  # sets the timesteps as this pipeline does
    first, last = max(1, steps // 5), 1
    patch(pipe, dense_steps=dense_steps_of(pipe.scheduler, first, last))
    dense, repeats = [], len(timesteps) // steps
    model.register_forward_pre_hook(lambda *_: dense.append(layers_of(model)[0].dense_now))
    pipelines.generate(pipe, steps, batch=2)
    by_step = [dense[i * repeats : (i + 1) * repeats] for i in range(steps)]
    assert all(len(set(calls)) == 1 for calls in by_step)  # guided and unguided calls alike
    expected = [i < first or i >= steps - last for i in range(steps)]
    if make is pipelines.cogvideo:
        assert {shape for _, shape, _ in timesteps} == {(4,)}  # guidance in the batch
    assert [calls[0] for calls in by_step] == expected


def quick(self, hidden_states, timestep, **others):
    """A forward that costs nothing and returns something of the right shape."""
    return (hidden_states * 0.1,)


def test_sparse_and_dense_steps_in_a_pipeline(set_sparse):
    pipe = pipelines.cogvideo()
    dense = pipelines.generate(pipe, 4)
    set_sparse(patch(pipe).transformer)
    calls = watch(pipe.transformer)
    sparse = pipelines.generate(pipe, 4)
    calls.clear()
    patch(pipe, dense_steps=dense_steps_of(pipe.scheduler, 1, 1))
    mixed = pipelines.generate(pipe, 4)
    assert [any(ran) for _, _, ran in calls] == [False, True, True, False]
    assert not torch.equal(mixed, sparse) and not torch.equal(mixed, dense)
    patch(pipe)  # what this call says: no dense steps any more
    assert torch.equal(pipelines.generate(pipe, 4), sparse)
    restore(pipe)
    assert torch.equal(pipelines.generate(pipe, 4), dense)


def test_dense_layers_are_calibrated_and_run_dense(tmp_path):
    case = CASES["Wan"]
    model = patch(case.model(), l1=0.4, pv_l1=0.5, tail=None, dense_layers=[0])
    grid = Grid(cdf=(0.3, 0.6), sim=(-1.0,), pv=(50.0,))
    with autotune.calibrate(model, grid=grid, query_blocks=2) as calibration:
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
        assert calls[0][2] == expected


def test_calibration_does_not_watch_dense_steps(tmp_path):
    case = CASES["Flux"]
    model = patch(case.model(), l1=0.4, pv_l1=0.5, tail=None, dense_steps=(0.3, 0.0))
    grid = Grid(cdf=(0.3, 0.6), sim=(-1.0,), pv=(50.0,))
    with autotune.calibrate(model, grid=grid, query_blocks=2) as calibration:
        for levels in calibration.prompts([(1.0, 0.5), (0.9, 0.2, 0.1)]):
            for level in levels:
                model(**case.inputs(1) | {"timestep": torch.tensor([level])})
            assert [layer.calls for layer in calibration.layers] == [len(levels) - 1] * 2
    calibration.save(tmp_path / "tuned.pt")
    with pytest.warns(RuntimeWarning, match=r"calibrated with dense_steps=\(0\.3, 0\.0\)"):
        autotune.load_sparse_attention_state_dict(patch(case.model()), tmp_path / "tuned.pt")


def test_calibration_with_dense_steps_alone_is_an_error():
    case = CASES["Flux"]
    model = patch(case.model(), dense_steps=(0.3, 0.0))

    def tune():
        with autotune.calibrate(model) as calibration:
            for _ in calibration.prompts([1.0]):
                model(**case.inputs(1) | {"timestep": torch.tensor([1.0])})

    with pytest.raises(RuntimeError, match="saw no call"):
        tune()


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
    scheduler = types.SimpleNamespace(timesteps=torch.tensor([900.0, 500.0]))
    with pytest.raises(ValueError, match="leave one of 2 steps, got 1, 1"):
        dense_steps_of(scheduler, 1, 1)
    with pytest.raises(ValueError, match="this one's rise"):
        dense_steps_of(types.SimpleNamespace(timesteps=torch.tensor([0.0, 500.0])), 1)
    model = patch(CASES["Wan"].model(), dense_steps=(0.1, 0.0))
    with pytest.raises(TypeError, match="without timestep"):
        model(hidden_states=torch.zeros(1, 4, 3, 28, 28))


def test_timestep_by_position(set_sparse):
    case = CASES["Wan"]
    model = patch(case.model(), dense_steps=(0.3, 0.0))
    layer = set_sparse(model)[0]
    inputs = case.inputs(1)
    for timestep, dense in ((900, True), (500, False)):
        model(inputs["hidden_states"], torch.tensor([timestep]), inputs["encoder_hidden_states"])
        assert layer.dense_now is dense
