"""patch, verify and restore on shape models: ours, and stand-ins for those of a user's own installation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import hunyuan3d_installed as theirs
import pytest
import torch
from torch import Tensor, nn

from autotune import SparseAttention
from modify_model import patch, restore, verify
from modify_model.hunyuan3d import Hunyuan3DDiT, HunYuanDiTPlain
from modify_model.hunyuan3d.inner import MERGED
from modify_model.modify_hunyuan3d import WHY_DENSE, set_spas_sage_attn_hunyuan3d

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore:the attention of a Hunyuan3D")]
SIZES: dict[str, Any] = dict(hidden_size=64, num_heads=2)
LATENTS, TOKENS, CONTEXT = 300, 40, 24


def ours() -> nn.Module:
    return Hunyuan3DDiT(context_in_dim=CONTEXT, depth=1, depth_single_blocks=2, **SIZES)


def ours_plain() -> nn.Module:
    return HunYuanDiTPlain(context_dim=CONTEXT, depth=3, num_moe_layers=1, num_experts=4, **SIZES)


MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # layers, and tokens that attend to each other
    "Hunyuan3DDiT": (ours, 3, LATENTS + TOKENS),
    "HunYuanDiTPlain": (ours_plain, 3, LATENTS + 1),
    "hy3dgen": (theirs.Hunyuan3DDiT, 3, LATENTS + TOKENS),
    "hy3dshape": (theirs.HunYuanDiTPlain, 2, LATENTS),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def call(model: Any, t: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, cond = (torch.randn(1, *shape, generator=generator) for shape in ((LATENTS, 64), (TOKENS, CONTEXT)))
    return model(x, torch.full((1,), t), contexts={"main": cond})


def test_stand_in_computes_what_ours_does() -> None:
    """So that their structure, as the tests have it, is the documented one: weights, orders, views."""
    model, other = make("Hunyuan3DDiT"), make("hy3dgen")
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(call(other), call(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_patch_changes_nothing_until_tuned_and_restore_leaves_nothing(name: str) -> None:
    pipeline = theirs.Pipeline(make(name))
    before, state = call(pipeline.model), list(pipeline.model.state_dict())
    classes = [type(module) for module in pipeline.model.modules()]
    with pytest.warns(UserWarning, match="stays dense until you calibrate it"):
        patch(pipeline)
    patch(pipeline)
    assert torch.equal(call(pipeline.model), before)
    assert list(pipeline.model.state_dict()) == state
    found = verify(pipeline)
    assert found.ok and [layer.status for layer in found.layers] == ["dense"] * MODELS[name][1]
    assert {layer.heads for layer in found.layers} == {2}
    restore(pipeline)
    assert [type(module) for module in pipeline.model.modules()] == classes
    assert torch.equal(call(pipeline.model), before)


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_watched_and_made_sparse(name: str, set_sparse: Any, sparse_calls: list[Any]) -> None:
    model = patch(make(name))
    exact, seen = call(model), []
    for module in model.modules():
        if isinstance(module, SparseAttention):
            module.mode, module.observer = "tune", seen.append
    assert torch.equal(call(model), exact)
    _, layers, tokens = MODELS[name]
    assert [tuple(made.q.shape) for made in seen] == [(1, 2, tokens, 32)] * layers
    set_sparse(model, cdf=1.0)
    torch.testing.assert_close(call(model), exact, rtol=1e-3, atol=1e-4)
    set_sparse(model, cdf=0.2)
    sparse = call(model)
    assert len(sparse_calls) == 2 * layers
    assert float((sparse - exact).norm() / exact.norm()) > 1e-5
    assert float(sparse_calls[-1][1].density.mean()) < 1


@pytest.mark.parametrize("name", ["Hunyuan3DDiT", "hy3dgen", "hy3dshape"])
def test_copies_and_pickles(name: str, set_sparse: Any) -> None:
    model = patch(make(name))
    set_sparse(model, cdf=0.2)
    expected = call(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(call(other), expected)
        restore(other)
        assert not any(isinstance(module, SparseAttention) for module in other.modules())
    assert torch.equal(call(model), expected)


@pytest.mark.filterwarnings("ignore:spas_attn")
def test_merged_condition_of_a_tuned_model_is_told(set_sparse: Any, fallbacks: Any) -> None:
    model: Any = patch(make("Hunyuan3DDiT"))
    exact = model(torch.zeros(1, LATENTS, 64), torch.zeros(1), {"main": torch.zeros(1, TOKENS, CONTEXT)})
    set_sparse(model, cdf=0.2)
    out = model(torch.zeros(1, LATENTS, 64), torch.zeros(1), {"main": torch.zeros(1, TOKENS, CONTEXT)})
    assert torch.equal(out, exact) and fallbacks() == {MERGED: 3}


@pytest.mark.parametrize("name", MODELS)
def test_dense_steps_by_time(name: str, set_sparse: Any, sparse_calls: list[Any]) -> None:
    """Time 0 is noise: the first fifth of the range runs dense."""
    model = patch(make(name), dense_steps=(0.2, 0.0))
    set_sparse(model, cdf=0.2)
    call(model, 0.1)
    assert not sparse_calls
    call(model, 0.3)
    assert len(sparse_calls) == MODELS[name][1]


def test_comfys_time_runs_the_other_way(monkeypatch: pytest.MonkeyPatch, set_sparse: Any, sparse_calls: Any) -> None:
    monkeypatch.setattr(theirs.Hunyuan3DDiT, "__module__", "comfy.ldm.hunyuan3d.model")
    model = patch(make("hy3dgen"), dense_steps=(0.2, 0.0))
    set_sparse(model, cdf=0.2)
    call(model, 0.9)
    assert not sparse_calls
    call(model, 0.3)
    assert sparse_calls


class Wrapped(nn.Module):
    """As ComfyUI's: the denoiser below another module, its class under ComfyUI's name."""

    def __init__(self) -> None:
        super().__init__()
        self.diffusion_model = type("Hunyuan3Dv2", (theirs.Hunyuan3DDiT,), {})()


def test_a_denoiser_inside_another_module() -> None:
    layers = verify(patch(theirs.Pipeline(Wrapped()))).layers
    assert [layer.path for layer in layers] == [
        f"diffusion_model.{path}" for path in ("double_blocks.0", "single_blocks.0", "single_blocks.1")
    ]


def test_unknown_structure_is_refused_and_nothing_changed() -> None:
    model: Any = make("hy3dgen")
    model.single_blocks[1] = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(
        ValueError, match=r"single_blocks.1.*Sequential \(with 0\) has none of the structures"
    ) as caught:
        patch(model)
    assert "linear1, linear2, norm.query_norm" in str(caught.value)
    assert not any(isinstance(module, SparseAttention) for module in model.modules())


def sageattn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, -1) @ v


def test_another_attention_inside_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theirs, "scaled_dot_product_attention", sageattn)
    with pytest.raises(ValueError, match="reaches no F.scaled_dot_product_attention.*USE_SAGEATTN=1"):
        patch(make("hy3dgen"))


def test_own_function_and_its_reason() -> None:
    model = make("Hunyuan3DDiT")
    assert set_spas_sage_attn_hunyuan3d(model) is model
    assert "unordered set" in WHY_DENSE
    with pytest.raises(ValueError, match=r"Linear has no adapter.*Hunyuan3DDiT, Hunyuan3Dv2"):
        set_spas_sage_attn_hunyuan3d(nn.Linear(2, 2))
