"""What every diffusers family promises, on small random-weight models; a family is a row in families.py."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from families import CASES, run
from torch import nn

import autotune
from autotune import Grid, SparseAttention
from modify_model import patch, restore, verify
from modify_model.processors import SparseProcessor

pytestmark = pytest.mark.usefixtures("no_grad")

FAMILIES = pytest.mark.parametrize("name", CASES)
GRID = Grid(cdf=(0.3, 0.6, 0.9), sim=(-1.0,), pv=(50.0,))


def processors(model):
    """Every attention processor by the path of its layer (not all models of diffusers list them)."""
    return {path: module.processor for path, module in model.named_modules() if hasattr(module, "processor")}


def densities(inner):
    """Mean density of every layer's last sparse call, None where there was none."""
    return [None if module.last_density is None else float(module.last_density.mean()) for module in inner]


def snapshot(model):
    """Everything that restore must bring back, by identity where there is one."""
    return {
        "modules": {path: id(module) for path, module in model.named_modules()},
        "keys": list(model.state_dict()),
        "processors": {path: id(processor) for path, processor in processors(model).items()},
        "attributes": {path: sorted(vars(module)) for path, module in model.named_modules()},
        "hooks": {path: len(module._forward_pre_hooks) for path, module in model.named_modules()},
    }


@FAMILIES
def test_untuned_and_restored_models_are_exact(name, set_sparse, fallbacks):
    case = CASES[name]
    model = case.model()
    before, inputs = snapshot(model), [case.inputs(1), case.inputs(2)]
    expected = [run(model, x) for x in inputs]
    assert patch(model, dense_steps=(0.1, 0.1)) is model
    assert list(model.state_dict()) == before["keys"]
    assert [torch.equal(run(model, x), out) for x, out in zip(inputs, expected, strict=True)] == [True, True]
    for module in set_sparse(model):
        module.mode = "tune"  # the model's processors with the replaced function, and its own attention inside
    assert [torch.equal(run(model, x), out) for x, out in zip(inputs, expected, strict=True)] == [True, True]
    set_sparse(model)
    assert not torch.equal(run(model, inputs[0]), expected[0])
    assert restore(model) is model
    assert snapshot(model) == before
    assert torch.equal(run(model, inputs[1]), expected[1])
    restore(model)
    assert snapshot(model) == before and fallbacks() == {}


@FAMILIES
def test_verify_lists_every_self_attention_layer_and_nothing_else(name, capsys):
    case = CASES[name]
    model = case.model()
    others = processors(model)
    assert verify(model).replaced == 0
    patch(model)
    result = verify(model)
    assert result.ok and tuple(row.path for row in result.layers) == case.layers
    assert f"{len(case.layers)}/{len(case.layers)} attention layers replaced" in capsys.readouterr().out
    for path, processor in processors(model).items():
        ours = path in case.layers
        assert isinstance(processor, SparseProcessor) is ours
        assert (processor.original if ours else processor) is others[path]
    model.get_submodule(case.layers[0]).processor = others[case.layers[0]]
    assert [row.status for row in verify(model).layers] == ["MISSING"] + ["dense"] * (len(case.layers) - 1)
    assert verify(patch(model)).ok


@FAMILIES
def test_keeping_every_block_equals_dense(name, set_sparse, fallbacks, assert_close):
    case = CASES[name]
    model, inputs = case.model(), case.inputs(2)
    expected = run(model, inputs)
    inner = set_sparse(patch(model), cdf=1.0)
    assert_close(run(model, inputs), expected)
    assert densities(inner) == [1.0] * len(case.layers)  # it did run, on every block that is not padding
    assert fallbacks() == {}


@FAMILIES
def test_dropping_blocks_changes_the_output_row_by_row(name, set_sparse, fallbacks, assert_close):
    """Batches and classifier-free guidance: each sample has its own selection, as if it were alone."""
    case = CASES[name]
    model, inputs = case.model(), case.inputs(2)
    expected = run(model, inputs)
    inner = set_sparse(patch(model), cdf=0.4)
    got = run(model, inputs)
    assert got.isfinite().all() and fallbacks() == {}
    assert all(0 < density < 0.9 for density in densities(inner))
    assert all(tuple(module.last_density.shape) == (1 if case.by_sample else 2, 2) for module in inner)
    error = float((got - expected).norm() / expected.norm())
    assert 1e-3 < error < 1
    for index in range(2):
        assert_close(run(model, case.row(inputs, index)), got[index : index + 1], 1e-4)


@FAMILIES
def test_text_blocks_are_kept_unless_switched_off(name, set_sparse, sparse_calls):
    case = CASES[name]
    model = case.model()
    for text_sink in (True, False):
        sparse_calls.clear()
        set_sparse(patch(model, text_sink=text_sink), cdf=0.2)
        run(model, case.inputs(1))
        for path, (call, stats) in zip(case.layers, sparse_calls, strict=True):
            text, mask = case.text_of(path), stats.mask
            length = case.tokens if text == case.text else case.text[0]  # without text the other tokens are left
            padded = 0 if not case.by_sample else length - call.k_len  # dropped by the processor
            assert (mask.q_len, mask.k_len) == (length - padded,) * 2
            assert len(call.text) == (0 if text is None else 1)
            if text is not None:
                start, stop = text[0], text[1] - padded
                assert call.text == ((start, stop),)
                kept, visible = mask.to_dense(), torch.ones_like(mask.to_dense())
                if call.attn_mask is not None:  # blocks of padding alone have nothing to keep
                    tokens = nn.functional.pad(call.attn_mask, (0, -length % 128)).unflatten(-1, (-1, 128))
                    visible &= tokens.any(-1)[:, None, None]
                blocks = slice(start // 128, -(-stop // 128))
                all_kept = kept[..., blocks].all() and torch.equal(kept[:, :, blocks], visible[:, :, blocks])
                assert bool(all_kept) is text_sink


@FAMILIES
def test_tune_save_load_into_a_fresh_model(name, tmp_path, fallbacks):
    case = CASES[name]
    model = patch(case.model(), l1=0.4, pv_l1=0.5, tail=None)
    inputs = [case.row(case.inputs(2), index) for index in (0, 1)]
    with autotune.calibrate(model, grid=GRID, query_blocks=2) as calibration:
        for prompt in calibration.prompts(inputs):
            run(model, prompt)
    calibration.save(tmp_path / "tuned.pt")
    expected = run(model, inputs[0])
    fresh = case.model()
    dense = run(fresh, inputs[0])
    autotune.load_sparse_attention_state_dict(patch(fresh), tmp_path / "tuned.pt")
    with autotune.record_density(fresh) as recorded:
        assert torch.equal(run(fresh, inputs[0]), expected)
    assert all(density < 1 for density in recorded.per_layer.values())
    assert not torch.equal(expected, dense)
    assert [row.status for row in verify(fresh).layers] == ["sparse"] * len(case.layers)
    state = autotune.load(tmp_path / "tuned.pt")
    assert {key.removesuffix(".inner_attention.is_sparse") for key in state if key.endswith("is_sparse")} == set(
        case.layers
    )
    assert state["_metadata"]["model_class"] == type(fresh).__name__
    assert fallbacks() == {}


def tuned_state(name, set_sparse, **changes):
    """A tuned file's content, with thresholds set by hand."""
    model = patch(CASES[name].model(**changes))
    set_sparse(model)
    return autotune.extract_sparse_attention_state_dict(model)


@FAMILIES
def test_files_of_other_models_are_refused(name, set_sparse):
    case = CASES[name]
    state = tuned_state(name, set_sparse)
    other = "Flux" if name != "Flux" else "Wan"  # of another class; what is compared is only its name
    targets = {"other": CASES[other].model()}
    targets |= {kind: case.model(**getattr(case, kind)) for kind in ("wider", "deeper", "finer")}
    messages = {
        "other": "the tuned file was made for",
        "wider": "has 2 values, the model has 4 heads",
        "deeper": "layers of the model are not in the file",
        "finer": f"made for head dim 64 .*, and {state['_metadata']['model_class']} has 32",
    }
    for kind, model in targets.items():
        with pytest.raises(ValueError, match=messages[kind]):
            autotune.load_sparse_attention_state_dict(patch(model), state)
        assert {row.status for row in verify(model).layers} == {"dense"}
    del state["_metadata"]["head_dim"]  # a file from before
    autotune.load_sparse_attention_state_dict(targets["finer"], state)
    shallow, deep = case.model(), tuned_state(name, set_sparse, **case.deeper)
    with pytest.raises(ValueError, match="layers of the file are not in the model"):
        autotune.load_sparse_attention_state_dict(patch(shallow), deep)


@FAMILIES
@pytest.mark.parametrize("copying", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_whole(name, copying, set_sparse):
    case = CASES[name]
    model, inputs = patch(case.model(), dense_steps=(0.3, 0.0)), case.inputs(1)
    set_sparse(model)
    twin = copying(model)
    expected = run(model, inputs)
    for layer in model.modules():
        if isinstance(layer, SparseAttention):
            layer.mode = "dense"  # shares nothing with its copy
    assert torch.equal(run(twin, inputs), expected)
    assert verify(twin).ok
    noise = case.inputs(1, level=1.0)
    dense = run(restore(model), noise)
    assert torch.equal(run(twin, noise), dense)  # its dense steps too
    restore(twin)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert not any(isinstance(processor, SparseProcessor) for processor in processors(twin).values())
    assert torch.equal(run(twin, noise), dense)


@FAMILIES
def test_noise_levels_are_read_as_each_family_passes_timesteps(name, set_sparse):
    case = CASES[name]
    model = patch(case.model(), dense_steps=(0.2, 0.1))
    inner = set_sparse(model)
    sparse = []
    for level in (1.0, 0.81, 0.79, 0.11, 0.09, 0.0):
        run(model, case.inputs(1, level))
        ran = {module.last_density is not None for module in inner}
        assert len(ran) == 1
        sparse += ran
    assert sparse == [False, False, True, True, False, False]
