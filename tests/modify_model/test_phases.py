"""Thresholds by phase of denoising: chosen by the noise level that a transformer is told, compiled or not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from families import CASES, run
from torch._dynamo.testing import CompileCounter

import autotune
from autotune import Tuned, load_sparse_attention_state_dict
from autotune.module import sparse_modules
from modify_model import patch
from modify_model.cli.diffusion import load as load_pipeline

pytestmark = [pytest.mark.usefixtures("no_grad")]
EDGES = (0.7, 0.2)
LEVELS = ((1.0, 0), (0.75, 0), (0.6, 1), (0.3, 1), (0.05, 2))


def set_phases(inner):
    """Thresholds that differ from phase to phase; returns those of the phases alone, by layer."""
    alone = []
    for module in inner:
        base = module.tuned
        phases = [dataclasses.replace(base, threshold=base.threshold * factor) for factor in (1.0, 0.5, 0.02)]
        module.set_thresholds(Tuned.joined(phases, EDGES))
        module.record_density = False
        alone.append(phases)
    return alone


@pytest.mark.parametrize("how", ["plain", "blocks", "outside", "inside"])
def test_the_phase_follows_the_noise_level_without_compiling_again(how, set_sparse, assert_close):
    case, counter = CASES["Wan"], CompileCounter()
    model = called = case.model()
    torch._dynamo.reset()
    if how == "blocks":
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
    elif how == "outside":
        called = torch.compile(model, fullgraph=True, backend=counter)
    patch(called)
    if how == "inside":  # the hook is part of what is compiled, and ends a graph
        called = torch.compile(model, backend=counter)
    inner = set_sparse(model)
    alone = set_phases(inner)
    whole = [module.tuned for module in inner]
    outputs = []
    for level, phase in LEVELS:
        inputs = case.inputs(1, level)
        outputs.append(run(called, inputs))
        for module, phases in zip(inner, alone, strict=True):
            module.tuned = phases[phase]
        with torch.compiler.set_stance("force_eager"):
            assert_close(outputs[-1], run(model, inputs), 1e-5)
        for module, state in zip(inner, whole, strict=True):
            module.tuned = state
    assert counter.frame_count <= {"plain": 0, "blocks": 1, "outside": 1, "inside": 2}[how]
    first = inner[0]
    first.tuned = alone[0][0]
    for module, phases in zip(inner, alone, strict=True):
        module.tuned = phases[2]
    with torch.compiler.set_stance("force_eager"):
        other = run(model, case.inputs(1, LEVELS[0][0]))
    assert float((other - outputs[0]).norm() / other.norm()) > 1e-4, "the phases must differ in what they compute"


def test_calibrated_in_a_pipeline_and_loaded_again(tmp_path):
    sampler = load_pipeline("tiny:Wan", steps=6)
    patch(sampler.pipe)
    options = dict(phases=3, objective="budget", sparsity=0.3, query_blocks=4)
    with autotune.calibrate(sampler.pipe, **options) as calibration:
        for prompt in calibration.prompts(["a fox", "a boat", "a tram"]):
            sampler.watch(prompt, 0)
    calibration.save(tmp_path / "tuned.pt")
    modules = sparse_modules(sampler.pipe)
    edges = {module.tuned.edges for module in modules.values()}
    assert len(edges) == 1 and len(edges.pop()) == 2
    assert len({tuple(phase.tolist()) for module in modules.values() for phase in module.tuned.threshold}) > 1
    assert [entry["phase"] for entry in calibration.statistics] == [0, 1, 2] * len(modules)
    other = load_pipeline("tiny:Wan", steps=6)
    patch(other.pipe)
    load_sparse_attention_state_dict(other.pipe, tmp_path / "tuned.pt")
    assert torch.equal(sampler.watch("a fox", 1), other.watch("a fox", 1))


def test_a_model_without_noise_levels_has_no_phases(make_llama, tokens):
    model = patch(make_llama())
    calibration = autotune.calibrate(model, phases=2)
    with pytest.raises(ValueError, match="phases need the noise level of every call"), calibration:
        model(next(calibration.prompts([tokens(1, 256), tokens(1, 300)])))
