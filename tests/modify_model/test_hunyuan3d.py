"""The denoisers of Hunyuan3D: names and shapes of the weights, equality with a second implementation, exact savings."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import hunyuan3d_reference as reference
import pytest
import torch
import torch.nn.functional as F
from hunyuan3d_reference import hunyuan3d_dit, hunyuan_dit_plain
from torch import Tensor

from modify_model.hunyuan3d import Hunyuan3DDiT, HunYuanDiTPlain
from modify_model.hunyuan3d import attention as attention_module
from modify_model.hunyuan3d.attention import attend, chosen_engine, merged_repeats
from modify_model.hunyuan3d.condition import Denoiser
from modify_model.hunyuan3d.samplers import consistency_sigmas, flow_sigmas, sample

HEADS, CONTEXT = 2, 24


@pytest.fixture(autouse=True)
def no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USE_SAGEATTN", "CA_USE_SAGEATTN"):
        monkeypatch.delenv(name, raising=False)


def randomised(model: Any) -> Any:
    """Float64 weights that leave nothing at its neutral value: norms and biases too."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.double().eval().requires_grad_(False).parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(noise / math.sqrt(parameter.shape[-1]) if parameter.dim() > 1 else 0.5 + 0.3 * noise)
    return model


def dit(**changes: Any) -> Any:
    options = dict(context_in_dim=CONTEXT, hidden_size=32, num_heads=HEADS, depth=2, depth_single_blocks=2)
    return randomised(Hunyuan3DDiT(**(options | changes)))


def plain(**changes: Any) -> Any:
    options = dict(hidden_size=32, context_dim=CONTEXT, depth=5, num_heads=HEADS, num_moe_layers=2, num_experts=4)
    return randomised(HunYuanDiTPlain(**(options | changes)))


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("kind", "options", "tensors", "parameters"),
    [
        (Hunyuan3DDiT, {}, 652, 1_113_274_432),
        (Hunyuan3DDiT, {"guidance_embed": True}, 656, 1_113_274_432 + 1_312_768),
        (Hunyuan3DDiT, {"depth": 8, "depth_single_blocks": 16}, 332, 559_196_224),
        (HunYuanDiTPlain, {}, 752, 3_050_758_720),
    ],
)
def test_published_sizes(kind: Any, options: dict[str, Any], tensors: int, parameters: int) -> None:
    with torch.device("meta"):
        model = kind(**options)
    assert len(model.state_dict()) == tensors
    assert sum(p.numel() for p in model.parameters()) == parameters


LINEARS = {  # of table A3.1, biases beside them
    "latent_in": (1024, 64), "time_in.in_layer": (1024, 256), "time_in.out_layer": (1024, 1024),
    "guidance_in.in_layer": (1024, 256), "cond_in": (1024, 1536), "double_blocks.15.img_mod.lin": (6144, 1024),
    "double_blocks.0.txt_mod.lin": (6144, 1024), "double_blocks.3.txt_attn.qkv": (3072, 1024),
    "double_blocks.3.img_attn.proj": (1024, 1024), "double_blocks.3.img_mlp.0": (4096, 1024),
    "double_blocks.3.txt_mlp.2": (1024, 4096), "single_blocks.31.linear1": (7168, 1024),
    "single_blocks.31.linear2": (1024, 5120), "single_blocks.0.modulation.lin": (3072, 1024),
    "final_layer.linear": (64, 1024), "final_layer.adaLN_modulation.1": (2048, 1024),
}  # fmt: skip
PLAIN = {  # of table A3.3
    "x_embedder.weight": (2048, 64), "t_embedder.mlp.0.weight": (8192, 2048), "t_embedder.mlp.2.weight": (2048, 8192),
    "blocks.20.norm3.bias": (2048,), "blocks.0.attn1.to_k.weight": (2048, 2048), "blocks.0.attn1.q_norm.weight": (128,),
    "blocks.0.attn2.to_v.weight": (2048, 1024), "blocks.0.attn2.out_proj.bias": (2048,),
    "blocks.14.mlp.fc1.weight": (8192, 2048), "blocks.15.moe.experts.7.net.0.proj.weight": (8192, 2048),
    "blocks.20.moe.experts.0.net.2.weight": (2048, 8192), "blocks.15.moe.gate.weight": (8, 2048),
    "blocks.15.moe.shared_experts.net.2.bias": (2048,), "blocks.11.skip_linear.weight": (2048, 4096),
    "blocks.20.skip_norm.weight": (2048,), "final_layer.norm_final.weight": (2048,), "final_layer.linear.bias": (64,),
}  # fmt: skip


def test_published_names_and_shapes() -> None:
    with torch.device("meta"):
        state = Hunyuan3DDiT(guidance_embed=True, axes_dim=[64], input_size=1, use_pe=False).state_dict()
        of_plain = HunYuanDiTPlain(text_len=1370, qk_norm=True, use_pos_emb=False).state_dict()
    expected = {f"{name}.weight": shape for name, shape in LINEARS.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in LINEARS.items()}
    for place in ("double_blocks.7.img_attn.norm", "single_blocks.9.norm"):
        expected |= {f"{place}.query_norm.scale": (64,), f"{place}.key_norm.scale": (64,)}
    assert {name: tuple(state[name].shape) for name in expected} == expected
    assert {name: tuple(of_plain[name].shape) for name in PLAIN} == PLAIN
    for absent in ("0.attn1.to_q.bias", "10.skip_linear.weight", "14.moe.gate.weight", "15.mlp.fc1.weight"):
        assert f"blocks.{absent}" not in of_plain


def test_options_of_configurations_are_tolerated_and_unknown_ones_told(caplog: pytest.LogCaptureFixture) -> None:
    with torch.device("meta"):
        Hunyuan3DDiT(depth=1, depth_single_blocks=1, force_norm_fp32=True, ckpt_path=None, use_pe=False)
        assert not caplog.records
        Hunyuan3DDiT(depth=1, depth_single_blocks=1, something_else=3)
    assert "something_else" in caplog.text


@pytest.mark.parametrize("guidance", [None, 5.0])
def test_dit_equals_the_reference(guidance: float | None) -> None:
    model = dit(guidance_embed=guidance is not None)
    x, cond, t = made(2, 11, 64), made(2, 7, CONTEXT, seed=1), torch.tensor([0.3, 0.85], dtype=torch.float64)
    scales = None if guidance is None else torch.full((2,), guidance, dtype=torch.float64)
    got = model(x, t, {"main": cond, "additional": None}, guidance=scales)
    for row in range(2):
        expected = hunyuan3d_dit(model.state_dict(), x[row], float(t[row]), cond[row], HEADS, guidance)
        assert error(got[row], expected) < 1e-12


def test_plain_equals_the_reference() -> None:
    model = plain()
    x, cond, t = made(2, 11, 64), made(2, 7, CONTEXT, seed=1), torch.tensor([0.3, 0.85], dtype=torch.float64)
    got = model(x, t, {"main": cond})
    for row in range(2):
        assert error(got[row], hunyuan_dit_plain(model.state_dict(), x[row], float(t[row]), cond[row], HEADS)) < 1e-12


def heads_side_by_side(rows: Tensor, heads: int, s: Any, norm: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """A mistake: q, k and v of one head side by side."""
    parts = rows.split(rows.shape[-1] // heads // 3, dim=-1)
    query, key = s[f"{norm}.query_norm.scale"], s[f"{norm}.key_norm.scale"]
    return [
        (reference.rms(q, query), reference.rms(k, key), v)
        for q, k, v in zip(parts[0::3], parts[1::3], parts[2::3], strict=True)
    ]


def split_by_head(parts: list[Tensor], heads: int) -> list[list[Tensor]]:
    """A mistake: every projection split into heads on its own."""
    return [list(one) for one in zip(*[part.split(part.shape[-1] // heads, -1) for part in parts], strict=True)]


def renormalised(row: Tensor, dim: int) -> Tensor:
    """A mistake: the two best experts' probabilities add up to 1."""
    p = torch.exp(row - row.max(dim, keepdim=True).values)
    p = p / p.sum(dim, keepdim=True)
    return p / p.topk(2).values.sum() if row.dim() == 1 else p


def period_10000(value: float) -> float:
    """A mistake: the usual longest period in place of 1000."""
    return math.log(10_000 if value == 1000 else value)


@pytest.mark.parametrize("wrong", ["max_period", "views", "plain views", "renormalised", "t times 1000"])
def test_each_known_mistake_would_be_seen(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparisons above fail on every one of the known mistakes: the reference, with one made, is far off."""
    model = dit() if wrong in ("max_period", "views") else plain()
    function = hunyuan3d_dit if wrong in ("max_period", "views") else hunyuan_dit_plain
    state, x, cond = model.state_dict(), made(9, 64), made(5, CONTEXT, seed=1)
    right = function(state, x, 0.3, cond, HEADS)
    mistakes: dict[str, tuple[str, Any]] = {
        "max_period": ("math", types.SimpleNamespace(**{**vars(math), "log": period_10000})),
        "views": ("qkv_heads", heads_side_by_side),
        "plain views": ("interleaved", split_by_head),
        "renormalised": ("torch", types.SimpleNamespace(**{**vars(torch), "softmax": renormalised})),
    }
    if wrong in mistakes:
        monkeypatch.setattr(reference, *mistakes[wrong])
    assert error(function(state, x, 300.0 if wrong == "t times 1000" else 0.3, cond, HEADS), right) > 1e-3


def test_latents_are_a_set() -> None:
    model, order = dit(), torch.randperm(11, generator=torch.Generator().manual_seed(3))
    x, cond, t = made(1, 11, 64), made(1, 7, CONTEXT, seed=1), torch.tensor([0.3], dtype=torch.float64)
    out = model(x, t, {"main": cond})
    assert error(model(x[:, order], t, {"main": cond.flip(1)}), out[:, order]) < 1e-12


def test_half_precision_stays_in_it() -> None:
    for model, name in ((dit(), "context_in_dim"), (plain(), "context_dim")):
        half = model.bfloat16()
        x, cond = made(1, 11, 64).bfloat16(), made(1, 7, CONTEXT, seed=1).bfloat16()
        assert half(x, torch.tensor([0.3]), {"main": cond}).dtype == torch.bfloat16, name


@pytest.mark.parametrize("make", [dit, plain])
def test_constant_condition_is_one_token(make: Any) -> None:
    """Zeros (the unconditional pass), any other constant, and a batch of both kinds; off: the plain computation."""
    model = make()
    x, t = made(3, 11, 64), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    cond = made(3, 23, CONTEXT, seed=1)
    cond[1], cond[2] = 0, made(1, CONTEXT, seed=2)
    condition = model.prepare({"main": cond})
    assert [group.repeats for group in condition.groups] == [1, 23]
    merged = model(x, t, condition)
    model.merge_constant = False
    assert [group.repeats for group in model.prepare({"main": cond}).groups] == [1]
    assert error(merged, model(x, t, {"main": cond})) < 1e-13
    assert error(merged[1:2], model(x[1:2], t[1:2], {"main": cond[1:2]})) < 1e-13


def test_zero_context_of_the_plain_model_is_the_bias() -> None:
    model = plain()
    (group,) = model.prepare({"main": torch.zeros(1, 9, CONTEXT, dtype=torch.float64)}).groups
    for block, prepared in zip(model.blocks, group.prepared, strict=True):
        assert torch.equal(prepared[0, 0], block.attn2.out_proj.bias)


@pytest.mark.parametrize("make", [dit, plain])
def test_condition_is_prepared_once(make: Any) -> None:
    model = make()
    x, cond = made(2, 11, 64), made(2, 7, CONTEXT, seed=1)
    ready = model.prepare({"main": cond})
    calls: list[str] = []
    watched = [model.cond_in] if make is dit else [block.attn2.to_k for block in model.blocks]
    for module in watched:
        module.register_forward_hook(lambda *_: calls.append("again"))
    for t in (0.2, 0.7):
        times = torch.full((2,), t, dtype=torch.float64)
        reused = model(x, times, ready)
        assert not calls
        assert torch.equal(reused, model(x, times, {"main": cond}))
        calls.clear()


def test_merged_repeats_equal_repeated_keys() -> None:
    q, k, v = made(2, 3, 5, 16), made(2, 3, 8, 16, seed=1), made(2, 3, 8, 16, seed=2)

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.mT / 4
        return scores.softmax(-1) @ v, scores.logsumexp(-1)

    many_k, many_v = (torch.cat([x[:, :, :1].expand(-1, -1, 6, -1), x], dim=2) for x in (k, v))
    expected = F.scaled_dot_product_attention(q, many_k, many_v)
    assert error(merged_repeats(q, k, v, 7, kernel), expected) < 1e-14
    assert error(attend(q, k, v, repeats=7), expected) < 1e-14


def test_schedules() -> None:
    assert flow_sigmas(5) == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert flow_sigmas(3, shift=3.0) == [0.0, 0.75, 1.0, 1.0]
    published = [0, 0.1191, 0.2492, 0.3694, 0.4995, 0.6196, 0.7497, 0.8699, 1]
    assert consistency_sigmas(8) == pytest.approx(published, abs=5e-5)
    for wrong in (0, 101):
        with pytest.raises(ValueError, match="steps must be from 1 to 100"):
            consistency_sigmas(wrong)


def by_hand(model: Any, cond: Tensor, x: Tensor, sigmas: list[float], scale: float) -> Tensor:
    """Guided Euler steps without any saving."""
    for a, b in zip(sigmas[:-1], sigmas[1:], strict=True):
        t = torch.full((len(x),), a, dtype=torch.float64)
        vc, vu = model(x, t, {"main": cond}), model(x, t, {"main": torch.zeros_like(cond)})
        x = x + (b - a) * (vu + scale * (vc - vu))
    return x


@pytest.mark.parametrize("make", [dit, plain])
@pytest.mark.parametrize("scale", [5.0, 1.0, 0.0])
def test_sampler_equals_plain_guidance(make: Any, scale: float) -> None:
    model, cond, noise = make(), made(2, 7, CONTEXT, seed=1), made(2, 11, 64)
    got = sample(model, cond, noise, flow_sigmas(4), scale)
    model.merge_constant = False
    off = dict(skip_empty_steps=False, reuse_condition=False)
    expected = by_hand(model, cond, noise, flow_sigmas(4), scale)
    assert error(got, expected) < 1e-12
    assert error(sample(model, cond, noise, flow_sigmas(4), scale, **off), expected) < 1e-12


def test_model_calls_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, float | None]] = []
    real = Denoiser.grouped

    def watched(self: Any, x: Tensor, t: Tensor, contexts: Any, guidance: Any, channels: int) -> Tensor:
        calls.append((len(x), None if guidance is None else float(guidance[0])))
        return real(self, x, t, contexts, guidance, channels)

    monkeypatch.setattr(Denoiser, "grouped", watched)
    cond, noise = made(1, 7, CONTEXT, seed=1), made(1, 11, 64)
    for options, expected in (
        (dict(guidance_scale=5.0), [(2, None)] * 3),
        (dict(guidance_scale=5.0, skip_empty_steps=False), [(2, None)] * 4),
        (dict(guidance_scale=1.0), [(1, None)] * 3),
        (dict(guidance_scale=None), [(1, None)] * 3),
    ):
        calls.clear()
        sample(dit(), cond, noise, flow_sigmas(4), **options)
        assert calls == expected
    calls.clear()
    sample(dit(guidance_embed=True), cond, noise, consistency_sigmas(5), 5.0)
    assert calls == [(1, 5.0)] * 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=made(1, 11, 63)), r"x must be \[B, L, 64\], got \[1, 11, 63\]"),
        (dict(t=torch.zeros(2)), r"t must be \[1\]"),
        (dict(contexts={"other": made(1, 7, CONTEXT)}), "'main'"),
        (dict(contexts={"main": made(1, 7, 9)}), rf"\[B, Lc, {CONTEXT}\]"),
        (dict(contexts={"main": made(2, 7, CONTEXT)}), "for the 1 samples of x, got 2"),
    ],
)
def test_bad_calls(arguments: dict[str, Any], message: str) -> None:
    good = dict(x=made(1, 11, 64), t=torch.zeros(1, dtype=torch.float64), contexts={"main": made(1, 7, CONTEXT)})
    for model in (dit(), plain()):
        with pytest.raises((ValueError, TypeError), match=message):
            model(**(good | arguments))


def test_bad_options() -> None:
    for options, message in (
        (dict(hidden_size=30, num_heads=4), "hidden_size"),
        (dict(hidden_size=32, num_heads=4, axes_dim=[4]), "axes_dim must add up to the head dim 8"),
        (dict(engine="fast"), "engine must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            Hunyuan3DDiT(**options)
    for options, message in (
        (dict(use_pos_emb=True), "use_pos_emb"),
        (dict(moe_top_k=9), "moe_top_k"),
        (dict(num_moe_layers=22), "num_moe_layers"),
    ):
        with pytest.raises(ValueError, match=message):
            HunYuanDiTPlain(**options)
    with pytest.raises(ValueError, match="guidance must be"):
        dit(guidance_embed=True)(made(1, 5, 64), torch.zeros(1), {"main": made(1, 7, CONTEXT)})


@pytest.fixture
def sage(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A sageattention package of our own: as exact attention, but what it returns can be spoilt."""
    module: Any = types.ModuleType("sageattention")
    state = types.SimpleNamespace(calls=0, spoilt=False)

    def sageattn(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str, is_causal: bool) -> Tensor:
        state.calls += 1
        assert tensor_layout == "HND" and not is_causal
        out = F.scaled_dot_product_attention(q, k, v)
        return out * torch.nan if state.spoilt else out

    module.sageattn = sageattn
    monkeypatch.setitem(sys.modules, "sageattention", module)
    return state


def test_sage_switch_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sageattention", None)
    monkeypatch.delitem(sys.modules, "sageattention")
    monkeypatch.setattr(attention_module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("USE_SAGEATTN", "0")
    assert chosen_engine(None) == "sdpa"
    monkeypatch.setenv("USE_SAGEATTN", "1")
    for make in (dit, plain):
        with pytest.raises(ImportError, match="pip install sageattention"):
            make()
    assert dit(engine="sdpa").engine == "sdpa", "a choice by name comes first"


def test_sage_switch(sage: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = dit()
    monkeypatch.setenv("USE_SAGEATTN", "1")
    model = dit()
    x, cond, t = made(2, 11, 64), made(2, 7, CONTEXT, seed=1), torch.full((2,), 0.5, dtype=torch.float64)
    expected = exact(x, t, {"main": cond})
    assert error(model(x, t, {"main": cond}), expected) < 1e-13
    assert sage.calls == 4, "every block"
    sage.spoilt = True
    with pytest.warns(RuntimeWarning, match="gave inf or NaN"):
        assert error(model(x, t, {"main": cond}), expected) < 1e-13
    sage.calls = 0
    assert error(model(x, t, {"main": cond}), expected) < 1e-13
    assert sage.calls == 0, "exact from then on"


@pytest.mark.parametrize("make", [dit, plain])
def test_one_time_for_all_samples(make: Any) -> None:
    """With ``t`` of one number, samples of both kinds, in any order, run side by side: the same results."""
    model = make()
    x, cond = made(4, 11, 64), made(4, 7, CONTEXT, seed=1)
    cond[0] = cond[2] = 0
    alone = [model(x[i : i + 1], torch.full((1,), 0.4), {"main": cond[i : i + 1]}) for i in range(4)]
    for times in (torch.full((1,), 0.4), torch.full((4,), 0.4)):
        assert error(model(x, times, {"main": cond}), torch.cat(alone)) < 1e-12
    with pytest.raises(ValueError, match=r"t must be \[4\]"):
        model(x, torch.zeros(2), {"main": cond})
