"""SparseLlamaAttention under what else lives in a model: quantised weights, dtypes, accelerate, compilers, training."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modify_model import patch, restore
from modify_model.masks import PreparedMask

pytestmark = [
    pytest.mark.filterwarnings("ignore:spas_attn. running exact dense:RuntimeWarning"),
    pytest.mark.usefixtures("no_grad"),
]

LENGTH = 400  # four blocks of 128


class Packed4Bit(nn.Module):
    """A linear layer that looks like a 4-bit one: its weight is uint8 and says nothing about dtypes."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.abs().amax() / 127
        quantised = (linear.weight / self.scale).round() + 128
        self.weight = nn.Parameter(quantised.to(torch.uint8), requires_grad=False)

    def forward(self, x):
        return x @ ((self.weight.to(x.dtype) - 128) * self.scale.to(x.dtype)).T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_projections(make_llama, tokens, set_sparse, dtype):
    model, ids = make_llama().to(dtype), tokens(1, LENGTH)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Packed4Bit(getattr(layer.self_attn, name)))
    expected = model(ids).logits
    assert torch.equal(patch(model)(ids).logits, expected)
    inner = set_sparse(model)
    assert model(ids).logits.dtype == dtype
    assert all(float(module.last_density.max()) < 1 for module in inner)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_thresholds(make_llama, tokens, set_sparse, dtype):
    model, ids = patch(make_llama()), tokens(1, LENGTH)
    inner = set_sparse(model, cdf=0.98765)
    model.to(dtype)
    assert all(module.cdfthreshd.dtype == torch.float32 for module in inner)
    assert float(inner[0].cdfthreshd[0]) == pytest.approx(0.98765, abs=1e-6)
    set_sparse(model, cdf=1.0)
    got = model(ids).logits
    expected = restore(model)(ids).logits
    assert got.dtype == dtype
    assert (got - expected).float().norm() < 0.02 * expected.float().norm()


@pytest.mark.parametrize("order", ["patch first", "dispatch first"])
@pytest.mark.parametrize("offload", [False, True])
def test_accelerate_hooks(make_llama, tokens, set_sparse, order, offload, left_padded, assert_close):
    accelerate = pytest.importorskip("accelerate")
    model, ids = make_llama(), tokens(2, LENGTH)
    ids, mask = left_padded(ids)
    expected = model(ids, attention_mask=mask).logits

    def dispatch():
        if offload:
            return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        names = ["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]
        return accelerate.dispatch_model(model, dict.fromkeys(names, "cpu"), main_device="cpu", force_hooks=True)

    def hooked():
        return {path for path, module in model.named_modules() if hasattr(module, "_hf_hook")}

    if order == "patch first":
        patch(model)
        dispatch()
    else:
        dispatch()
        before = hooked()
        patch(model)
        assert hooked() == before
    before = hooked() - {path for path in hooked() if path.endswith("inner_attention")}
    assert before
    valid = mask.bool()
    assert_close(model(ids, attention_mask=mask).logits[valid], expected[valid])
    inner = set_sparse(model)
    model(ids, attention_mask=mask)
    assert all(float(module.last_density.max()) < 1 for module in inner)
    restore(model)
    assert hooked() == before
    assert_close(model(ids, attention_mask=mask).logits[valid], expected[valid])
    accelerate.hooks.remove_hook_from_submodules(model)
    assert_close(model(ids, attention_mask=mask).logits[valid], expected[valid])


def test_mask_travels_through_accelerate():
    operations = pytest.importorskip("accelerate.utils.operations")
    padding = torch.ones(1, 4, dtype=torch.bool)
    mask = PreparedMask(lambda padding: padding[:, None, None], {"padding": padding}, [], padding, 4, 4, None, None)
    moved = operations.send_to_device(mask, "meta")
    assert isinstance(moved, PreparedMask)
    assert moved.original.device.type == moved.key_mask.device.type == "meta"
    assert (moved.k_len, moved.window, moved.dense_reason) == (4, None, None)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cdf", [0.4, None], ids=["sparse", "untuned"])
def test_compiled_without_graph_breaks(make_llama, tokens, set_sparse, padded, cdf, left_padded, assert_close):
    model = patch(make_llama())
    inner = set_sparse(model, cdf=cdf) if cdf else []
    for module in inner:
        module.backend = "sdpa"  # the cpu backend looks at the mask on the host, which ends the graph
    ids, mask = left_padded(tokens(2, LENGTH)) if padded else (tokens(1, LENGTH), None)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for length in (LENGTH, LENGTH):
        got = compiled(ids[:, :length], attention_mask=mask).logits
    valid = slice(None) if mask is None else mask.bool()
    expected = model(ids, attention_mask=mask).logits
    assert_close(got[valid], expected[valid])


@pytest.mark.slow
def test_patched_after_it_was_compiled(make_llama, tokens, set_sparse, assert_close):
    model, ids = make_llama(), tokens(1, LENGTH)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    dense = compiled(ids).logits
    for module in set_sparse(patch(compiled)):
        module.record_density = False
    sparse = model(ids).logits
    assert_close(compiled(ids).logits, sparse)
    assert float((sparse - dense).norm() / dense.norm()) > 1e-2
    restore(compiled)
    assert_close(compiled(ids).logits, dense)


@pytest.mark.slow
def test_compiled_without_cache_or_mask_is_counted(make_llama, tokens, set_sparse, fallbacks, assert_close):
    model, ids = patch(make_llama()), tokens(1, LENGTH)
    inner = set_sparse(model)
    expected = model(ids, use_cache=False).logits
    assert all(float(module.last_density.max()) < 1 for module in inner) and fallbacks() == {}
    for module in inner:
        module.backend = "sdpa"  # see test_compiled_without_graph_breaks
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits, expected)
    assert fallbacks() == {}
    compiled(ids, use_cache=False)
    assert any("torch.compile hides" in text for text in fallbacks())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_runs_dense_with_exact_gradients(
    make_llama, tokens, set_sparse, fallbacks, checkpointing, left_padded, assert_close
):
    model, ids = make_llama().train(), tokens(2, LENGTH)
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids, mask = left_padded(ids)
    labels = torch.where(mask.bool(), ids, -100)

    def gradient():
        model.zero_grad()
        with torch.enable_grad():
            model(ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    expected = gradient()
    set_sparse(patch(model))
    assert_close(gradient(), expected)
    assert any("training mode" in text for text in fallbacks())


def test_other_implementations_see_their_own_name(make_llama, tokens, set_sparse, left_padded):
    seen = []

    def fake_flash(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.config._attn_implementation, module.layer_idx, len(list(module.modules())) > 4))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("fake_flash", fake_flash)
    AttentionMaskInterface.register("fake_flash", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    ids, mask = left_padded(tokens(2, LENGTH))
    model = make_llama()
    expected = model(ids, attention_mask=mask).logits
    model.config._attn_implementation = "fake_flash"
    patch(model, layer_range=(1, 2))
    assert torch.equal(model(ids, attention_mask=mask).logits, expected)
    assert seen == [("fake_flash", 0, True), ("fake_flash", 1, True)]
    inner = set_sparse(model)
    model(ids, attention_mask=mask)
    assert float(inner[0].last_density.max()) < 1
    assert restore(model).config._attn_implementation == "fake_flash"


def test_implementation_without_a_mask_function_still_pads(make_llama, tokens, set_sparse, left_padded, assert_close):
    AttentionInterface.register("no_masks", ALL_ATTENTION_FUNCTIONS["sdpa"])
    ids, mask = left_padded(tokens(2, LENGTH))
    model = make_llama()
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    model.config._attn_implementation = "no_masks"
    set_sparse(patch(model), cdf=1.0)
    assert_close(model(ids, attention_mask=mask).logits[mask.bool()], expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_are_made_when_a_dense_call_asks(make_llama, tokens, set_sparse, left_padded, attention, monkeypatch):
    """Once for all layers; a sparse prefill of 128K padded tokens would pay 16 GiB a row for what it never reads."""
    made = []
    make_mask = ALL_MASK_ATTENTION_FUNCTIONS[attention]

    def make(**arguments):
        made.append(make_mask(**arguments))
        return made[-1]

    ids, mask = left_padded(tokens(2, LENGTH))
    model = make_llama(attention)
    expected = model(ids, attention_mask=mask).logits
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, attention, make)
    assert torch.equal(patch(model)(ids, attention_mask=mask).logits, expected) and len(made) == 1
    set_sparse(model)
    model(ids, attention_mask=mask)
    assert len(made) == 1
    patch(model, dense_layers=[1])
    model(ids, attention_mask=mask)
    assert len(made) == 2 and made[0].shape == made[1].shape == (2, 1, LENGTH, LENGTH)


def test_continuous_batching_is_refused(make_llama):
    model = patch(make_llama())
    with pytest.raises(ValueError, match=r"continuous batching \(generate_batch\) does not run with sparse attention"):
        model.generate_batch([[1, 2, 3]], progress_bar=False)
    restore(model)
    assert "init_continuous_batching" not in vars(model)
