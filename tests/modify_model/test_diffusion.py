"""What every diffusers family promises, on small random-weight models; a family is a case in diffusion_models.py."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from diffusion_models import CASES
from torch import nn

import autotune
import autotune.module
from autotune import SparseAttention, observe
from autotune.curves import Partials
from autotune.observe import Grid
from modify_model import patch, restore, verify
from modify_model.processors import SparseProcessor
from spas_attn.selectors import MeanSimilarity, Union

pytestmark = pytest.mark.usefixtures("no_grad")

FAMILIES = pytest.mark.parametrize("name", CASES)
GRID = Grid(cdf=(0.3, 0.5, 0.7, 0.9), sim=(-1.0,), pv=(50.0,))


def run(model, inputs):
    """The model's output tensor."""
    return model(**inputs, return_dict=False)[0]


def densities(inner):
    """Mean density of every layer's last sparse call, None where there was none."""
    return [None if module.last_density is None else float(module.last_density.mean()) for module in inner]


def snapshot(model):
    """Everything that restore must bring back, by identity where there is one."""
    return {
        "modules": {path: id(module) for path, module in model.named_modules()},
        "keys": list(model.state_dict()),
        "processors": {path: id(processor) for path, processor in model.attn_processors.items()},
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
    others = dict(model.attn_processors)
    assert verify(model).replaced == 0
    patch(model)
    result = verify(model)
    assert result.ok and tuple(row.path for row in result.layers) == case.layers
    assert f"{len(case.layers)}/{len(case.layers)} attention layers replaced" in capsys.readouterr().out
    for path, processor in model.attn_processors.items():
        ours = path.removesuffix(".processor") in case.layers
        assert isinstance(processor, SparseProcessor) is ours
        assert (processor.original if ours else processor) is others[path]
    model.get_submodule(case.layers[0]).processor = others[f"{case.layers[0]}.processor"]
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
    assert all(tuple(module.last_density.shape) == (2, 2) for module in inner)
    error = float((got - expected).norm() / expected.norm())
    assert 1e-3 < error < 1
    for index in range(2):
        assert_close(run(model, case.row(inputs, index)), got[index : index + 1], 1e-4)


@FAMILIES
def test_text_blocks_are_kept_unless_switched_off(name, set_sparse, monkeypatch):
    case = CASES[name]
    seen = []
    attend = autotune.module.sparse_attention

    def spy(q, k, v, selector, **arguments):
        out, stats = attend(q, k, v, selector, **arguments)
        seen.append((selector, stats.mask, arguments["attn_mask"]))
        return out, stats

    monkeypatch.setattr(autotune.module, "sparse_attention", spy)
    model = case.model()
    for text_sink in (True, False):
        set_sparse(patch(model, text_sink=text_sink), cdf=0.2)
        run(model, case.inputs(2))
    count = len(case.layers)
    assert len(seen) == 2 * count
    for number, (selector, mask, padding) in enumerate(seen):
        assert (mask.q_len, mask.k_len) == (case.tokens, case.tokens)
        with_text = number < count and case.text is not None
        assert isinstance(selector, Union if with_text else MeanSimilarity)
        if case.text is None:
            continue
        start, stop = case.text[0] // 128, -(-case.text[1] // 128)
        kept = mask.to_dense()
        visible = torch.ones_like(kept)
        if padding is not None:  # blocks of padding alone have nothing to keep
            blocks = nn.functional.pad(padding, (0, -case.tokens % 128)).unflatten(-1, (-1, 128)).any(-1)
            visible = visible & blocks[:, None, None]
        all_kept = kept[..., start:stop].all() and torch.equal(kept[:, :, start:stop], visible[:, :, start:stop])
        assert bool(all_kept) is with_text


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
    inner = [module for module in fresh.modules() if isinstance(module, SparseAttention)]
    for module in inner:
        module.record_density = True
    assert torch.equal(run(fresh, inputs[0]), expected)
    assert all(density < 1 for density in densities(inner))
    assert not torch.equal(expected, dense)
    assert [row.status for row in verify(fresh).layers] == ["sparse"] * len(case.layers)
    state = autotune.load(tmp_path / "tuned.pt")
    assert {key.removesuffix(".inner_attention.is_sparse") for key in state if key.endswith("is_sparse")} == set(
        case.layers
    )
    assert state["_metadata"]["model_class"] == type(fresh).__name__
    assert fallbacks() == {}


@pytest.mark.parametrize("text_sink", [True, False])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.text is not None])
def test_curves_never_drop_text_blocks(name, text_sink, monkeypatch):
    """What serving keeps always, the calibration must not judge by the error of leaving it out."""
    case, rows, judged = CASES[name], [], []
    blocks_of, errors_of = observe.query_blocks, Partials.errors

    def blocks(*arguments):
        for row in blocks_of(*arguments):
            rows.append(row[0])
            yield row

    def errors(partials, kept):
        judged.append((rows[-1], kept))
        return errors_of(partials, kept)

    monkeypatch.setattr(observe, "query_blocks", blocks)
    monkeypatch.setattr(Partials, "errors", errors)
    selector = MeanSimilarity(block_q=128, block_k=128, pool=16, local=0, sink=False)
    model = patch(case.model(), selector=selector, text_sink=text_sink, l1=0.4, pv_l1=0.5, tail=None)
    grid = Grid(cdf=(0.05, 0.2), sim=(-1.0,), pv=(50.0,))
    with contextlib.suppress(InterruptedError), autotune.calibrate(model, grid=grid, query_blocks=None) as calibration:
        for prompt in calibration.prompts([case.inputs(1)]):
            if calibration.phase != "curves":
                raise InterruptedError  # the curves are all that is looked at
            run(model, prompt)
    text = slice(case.text[0] // 128, -(-case.text[1] // 128))
    whole = [kept.all() for row, kept in judged if text.start <= row < text.stop]  # queries of the text
    others = [kept[..., text].all() for row, kept in judged if not text.start <= row < text.stop]
    assert len(whole) == len(case.layers) and len(whole) + len(others) == -(-case.tokens // 128) * len(case.layers)
    assert all(whole) is all(others) is text_sink
    assert not any(kept.all() for row, kept in judged if not text.start <= row < text.stop)


def tuned_state(name, set_sparse, **changes):
    """A tuned file's content, with thresholds set by hand."""
    model = patch(CASES[name].model(**changes))
    set_sparse(model)
    return autotune.extract_sparse_attention_state_dict(model)


@FAMILIES
def test_files_of_other_models_are_refused(name, set_sparse):
    case = CASES[name]
    state = tuned_state(name, set_sparse)
    targets = {
        other: CASES[other].model()
        for other in CASES
        if other.split()[0] != name.split()[0]  # a file of Wan fits Wan I2V of the same size
    }
    targets |= {kind: case.model(**getattr(case, kind)) for kind in ("wider", "deeper", "finer")}
    message = {
        "wider": "has 2 values, the model has 4 heads",
        "deeper": "layers of the model are not in the file",
        "finer": f"made for head dim 64 .*, and {state['_metadata']['model_class']} has 32",
    }
    for other, model in targets.items():
        with pytest.raises(ValueError, match=message.get(other, "the tuned file was made for")):
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
    noise = inputs | {"timestep": torch.full((1,), case.full_noise)}
    dense = run(restore(model), noise)
    assert torch.equal(run(twin, noise), dense)  # its dense steps too
    restore(twin)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert not any(isinstance(processor, SparseProcessor) for processor in twin.attn_processors.values())
    assert torch.equal(run(twin, noise), dense)
