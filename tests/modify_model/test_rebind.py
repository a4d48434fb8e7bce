"""Processors of the user's own: their parameters reach them, and their attention is found however they spell it."""

from __future__ import annotations

import functools
import inspect
import types

import pytest
import torch
import torch.nn.functional as F
import torch.nn.functional as other_name
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_dispatch import dispatch_attention_fn as my_dispatch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from families import CASES, run
from torch.nn.functional import scaled_dot_product_attention as my_attention

from modify_model import patch, restore, verify
from modify_model.rebind import rebound

pytestmark = pytest.mark.usefixtures("no_grad")


def qkv(attn, hidden_states, encoder_hidden_states, rotary=None):
    """What a CogVideoX processor does before attention; q, k, v ``[B, H, L, D]``."""
    joint = torch.cat([encoder_hidden_states, hidden_states], 1)
    q, k, v = (f(joint).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for f in (attn.to_q, attn.to_k, attn.to_v))
    return attn.norm_q(q), attn.norm_k(k), v


def project(attn, out, text):
    out = attn.to_out[0](out.transpose(1, 2).flatten(2))
    return out[:, text:], out[:, :text]


class Named:
    __slots__ = ()

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        q, k, v = qkv(attn, hidden_states, encoder_hidden_states)
        return project(attn, F.scaled_dot_product_attention(q, k, v), encoder_hidden_states.shape[1])


class Qualified:
    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        q, k, v = qkv(attn, hidden_states, encoder_hidden_states)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, None, 0.0, False)
        return project(attn, out, encoder_hidden_states.shape[1])


class Alias:
    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        q, k, v = qkv(attn, hidden_states, encoder_hidden_states)
        return project(attn, other_name.scaled_dot_product_attention(q, k, v), encoder_hidden_states.shape[1])


class Bare:
    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        return project(attn, my_attention(*qkv(attn, hidden_states, encoder_hidden_states)), 32)


class ByName:
    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        attend = getattr(F, "scaled_dot_product_attention")  # noqa: B009
        return project(attn, attend(*qkv(attn, hidden_states, encoder_hidden_states)), 32)


class Dispatched:
    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        q, k, v = (x.transpose(1, 2) for x in qkv(attn, hidden_states, encoder_hidden_states))
        return project(attn, my_dispatch(q, k, v).transpose(1, 2), encoder_hidden_states.shape[1])


class DispatchedByModule:
    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        q, k, v = (x.transpose(1, 2) for x in qkv(attn, hidden_states, encoder_hidden_states))
        out = attention_dispatch.dispatch_attention_fn(query=q, key=k, value=v)
        return project(attn, out.transpose(1, 2), encoder_hidden_states.shape[1])


class ImportsOthers:
    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        from diffusers.models.embeddings import apply_rotary_emb

        q, k, v = qkv(attn, hidden_states, encoder_hidden_states)
        q[:, :, 32:], k[:, :, 32:] = (apply_rotary_emb(x[:, :, 32:], image_rotary_emb) for x in (q, k))
        return project(attn, F.scaled_dot_product_attention(q, k, v), 32)


class Inner:
    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        def attend(*tensors):
            return F.scaled_dot_product_attention(*tensors)

        return project(attn, attend(*qkv(attn, hidden_states, encoder_hidden_states)), 32)


def helper(q, k, v, attend=F.scaled_dot_product_attention):
    return attend(q, k, v)


class Helped:
    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        return project(attn, helper(*qkv(attn, hidden_states, encoder_hidden_states)), 32)


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Decorated:
    @decorated
    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        return project(attn, F.scaled_dot_product_attention(*qkv(attn, hidden_states, encoder_hidden_states)), 32)


SPELLINGS = [
    Named, Qualified, Alias, Bare, ByName, Dispatched, DispatchedByModule, ImportsOthers, Inner, Helped, Decorated
]  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_attention_is_found_however_it_is_spelled(spelling, set_sparse, fallbacks, assert_close):
    case = CASES["CogVideoX"]
    model, inputs = case.model(), case.inputs()
    for block in model.transformer_blocks:
        block.attn1.processor = spelling()
    expected = run(model, inputs)
    patch(model)
    assert torch.equal(run(model, inputs), expected)
    inner = set_sparse(model, cdf=1.0)
    assert_close(run(model, inputs), expected)
    assert [float(module.last_density.mean()) for module in inner] == [1.0, 1.0]
    set_sparse(model, cdf=0.4)
    assert not torch.equal(run(model, inputs), expected) and fallbacks() == {}
    assert verify(model).ok
    assert torch.equal(run(restore(model), inputs), expected)


class Method(Named):
    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        return project(attn, self.attend(*qkv(attn, hidden_states, encoder_hidden_states)), 32)

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class Attribute:
    def __init__(self):
        self.attend = F.scaled_dot_product_attention

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        return project(attn, self.attend(*qkv(attn, hidden_states, encoder_hidden_states)), 32)


class Parent(Named):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class Importing:
    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        from torch.nn.functional import scaled_dot_product_attention

        return project(attn, scaled_dot_product_attention(*qkv(attn, hidden_states, encoder_hidden_states)), 32)


class ImportingModule:
    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        import torch.nn.functional as G

        return project(attn, G.scaled_dot_product_attention(*qkv(attn, hidden_states, encoder_hidden_states)), 32)


class ByHand:
    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        q, k, v = qkv(attn, hidden_states, encoder_hidden_states)
        return project(attn, (q @ k.mT).softmax(-1) @ v, 32)


class Built:
    __call__ = functools.partialmethod(print)


REFUSALS = {
    Method: r"Method reaches attention through Method\.attend, which cannot be replaced",
    Attribute: r"Attribute reaches attention through self\.attend, which cannot be replaced",
    Parent: r"Parent reaches attention through Named\.__call__, which cannot be replaced",
    Importing: "Importing reaches attention through an import statement inside __call__, which cannot be replaced",
    ImportingModule: "ImportingModule reaches attention through an import statement inside __call__",
    ByHand: r"ByHand calls neither dispatch_attention_fn nor F\.scaled_dot_product_attention",
    Built: "Built has no __call__ written in Python",
    lambda: FluxIPAdapterAttnProcessor(128, 32): "FluxIPAdapterAttnProcessor has weights of its own",
}


@pytest.mark.parametrize(("make", "message"), REFUSALS.items())
def test_what_cannot_be_rebound_is_refused_with_the_reason(make, message):
    model = CASES["CogVideoX"].model()
    processor = model.transformer_blocks[1].attn1.processor = make()
    with pytest.raises(ValueError, match=rf"layer 'transformer_blocks\.1\.attn1' cannot be made sparse: {message}"):
        patch(model)
    assert model.transformer_blocks[1].attn1.processor is processor and verify(model).replaced == 0
    assert verify(patch(model, layer_range=(0, 1))).ok


class KeyScale(FluxAttnProcessor):
    """A user's processor with a parameter of its own, between those that diffusers passes by position."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None,
                 key_scale=1.0, **others):  # fmt: skip
        q, k, v = (f(hidden_states).unflatten(-1, (attn.heads, -1)) for f in (attn.to_q, attn.to_k, attn.to_v))
        out = dispatch_attention_fn(attn.norm_q(q), key_scale * attn.norm_k(k), v).flatten(2, 3)
        if encoder_hidden_states is None:
            return out
        return attn.to_out[0](out), encoder_hidden_states


class Reordered:
    """A processor of CogVideoX whose parameters stand in another order; all of them come by name."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, image_rotary_emb=None, attention_mask=None):
        assert isinstance(image_rotary_emb, tuple) and attention_mask is None
        return Named()(attn, hidden_states + image_rotary_emb[0].mean(), encoder_hidden_states)


def test_parameters_of_a_users_processor_reach_it(set_sparse, fallbacks):
    case = CASES["Flux"]
    model = case.model()
    for block in (model.transformer_blocks[0], model.single_transformer_blocks[0]):
        block.attn.set_processor(KeyScale())
    plain = case.inputs()
    scaled = plain | {"joint_attention_kwargs": {"key_scale": 0.2}}
    expected = [run(model, plain), run(model, scaled)]
    assert not torch.equal(*expected)
    processor = patch(model).transformer_blocks[0].attn.processor
    assert inspect.signature(processor.__call__) == inspect.signature(KeyScale().__call__)
    assert [torch.equal(run(model, x), out) for x, out in zip((plain, scaled), expected, strict=True)] == [True, True]
    for module in set_sparse(model):
        module.mode = "tune"
    assert torch.equal(run(model, scaled), expected[1])
    set_sparse(model)
    assert not torch.equal(run(model, scaled), run(model, plain)) and fallbacks() == {}


def test_parameters_in_another_order():
    case = CASES["CogVideoX"]
    model, inputs = case.model(), case.inputs()

    class Mixed(Reordered):
        def __call__(self, attn, hidden_states, encoder_hidden_states, image_rotary_emb=None, attention_mask=None):
            hidden_states = hidden_states + image_rotary_emb[0].mean()
            q, k, v = qkv(attn, hidden_states, encoder_hidden_states)
            return project(attn, F.scaled_dot_product_attention(q, k, v, attention_mask), 32)

    for block in model.transformer_blocks:
        block.attn1.processor = Mixed()
    expected = run(model, inputs)
    assert torch.equal(run(patch(model), inputs), expected)


SCALE = 1.0


class Scaled:
    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        q, k, v = qkv(attn, hidden_states, encoder_hidden_states)
        return project(attn, F.scaled_dot_product_attention(q, k, SCALE * v), 32)


def test_globals_of_a_users_processor_stay_alive(set_sparse, monkeypatch):
    case = CASES["CogVideoX"]
    model, inputs = case.model(), case.inputs()
    for block in model.transformer_blocks:
        block.attn1.processor = Scaled()
    set_sparse(patch(model))
    before = run(model, inputs)
    monkeypatch.setitem(Scaled.__call__.__globals__, "SCALE", 2.0)
    assert not torch.equal(run(model, inputs), before)


def test_rebinding_leaves_what_does_not_need_it():
    table = ((F.scaled_dot_product_attention, lambda *tensors: "replaced"),)
    assert rebound(qkv, table) is qkv
    other = rebound(helper, table)
    assert other(1, 2, 3) == "replaced" and helper.__defaults__ == (F.scaled_dot_product_attention,)

    attend = my_attention

    def closed_over(*, keyword=helper):
        return attend(), keyword(1, 2, 3)

    assert rebound(closed_over, table)() == ("replaced", "replaced")
    scope = types.ModuleType("scope")
    scope.attend, scope.torch = helper, torch

    def through_a_module():
        return scope.attend(1, 2, 3)

    assert rebound(through_a_module, table)() == "replaced" and scope.attend is helper
