"""SparseAttention: what it keeps through casts and copies, what each mode returns; dense runs and densities."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from fake_model import DIM, HEADS, FakeModel, Prompt, activations, exact, same, tuned, tuned_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from autotune import SparseAttention, Tuned, calibrate, dense, record_density
from autotune.module import sparse_modules
from autotune.paths import clean_path
from autotune.tuned import FILE_KEYS
from spas_attn import fallback_counts, sparse_attention
from spas_attn.call import Call
from spas_attn.selectors import MeanSimilarity, Tokens, TopK, Union


def run(module: SparseAttention, length: int = 400, q_len: int | None = None, **more: Any) -> tuple[Tensor, Tensor]:
    """The module's output, and the tensor that the original attention returned to it."""
    q, k, v = activations(1, q_len or length, length)
    out = exact(Call.make(q, k, v, is_causal=True))
    got = module(q, k, v, dense=lambda: out, **(dict(is_causal=True, scale=DIM**-0.5) | more))
    return got, out


CHANGES = {
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "bfloat16 and back": lambda m: m.bfloat16().float(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: _saved(m),
    "meta and back": lambda m: m.to("meta").to_empty(device="cpu"),
}


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("change", CHANGES)
def test_thresholds_survive(change: str) -> None:
    model, reference = tuned_model(), tuned_model()
    changed = CHANGES[change](model)
    for module, expected in zip(changed.inner, reference.inner, strict=True):
        assert same(module.tuned, expected.tuned)
        assert module.mode == "sparse" and module.tuned.lengths == (400, 700)
        assert module.tuned.expected_density == expected.tuned.expected_density
        assert torch.equal(run(module)[0], run(expected)[0])


def test_a_cast_still_reaches_the_weights_and_meta_moves_nothing_of_value() -> None:
    model = tuned_model().bfloat16()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert torch.equal(model.inner[0].cdfthreshd, tuned_model().inner[0].cdfthreshd)


def test_a_copy_is_not_the_original() -> None:
    model = tuned_model()
    other = copy.deepcopy(model)
    other.inner[0].set_thresholds(tuned(threshold=0.1))
    assert same(model.inner[0].tuned, tuned_model().inner[0].tuned)


def test_a_copy_made_while_calibrating_is_not_watched() -> None:
    model = FakeModel()
    with calibrate(model) as calibration:
        for prompt in calibration.prompts([Prompt(0, length=200)]):
            other = copy.deepcopy(model)
            assert all(module.observer is None for module in other.inner)
            other(Prompt(1, length=300))
            model(prompt)
    assert calibration.statistics[0]["lengths"] == [200, 200]


def test_state_dict_is_that_of_the_unpatched_model() -> None:
    model = tuned_model()
    keys = {f"layers.{i}.projection.{name}" for i in (0, 1) for name in ("weight", "bias")}
    assert set(model.state_dict()) == keys
    assert not list(model.inner[0].parameters())
    before = [module.tuned for module in model.inner]
    assert not any(model.load_state_dict(FakeModel().state_dict()))  # nothing missing, nothing unexpected
    assert all(a is module.tuned for a, module in zip(before, model.inner, strict=True))


@pytest.mark.parametrize("mode", ["dense", "tune"])
def test_untuned_modes_return_the_original_output_itself(mode: str) -> None:
    module = tuned_model().inner[0]
    module.mode = mode
    seen: list[Any] = []
    module.observer = seen.append
    got, out = run(module, text=((0, 10),))
    assert got is out
    assert len(seen) == (mode == "tune")
    for call in seen:
        assert (call.q.shape[1], call.k.shape[1], call.v.shape[1]) == (HEADS, 2, 2)
        assert (call.is_causal, call.scale, call.attn_mask, call.text) == (True, DIM**-0.5, None, ((0, 10),))


def test_sparse_mode_is_sparse_attention_with_the_thresholds() -> None:
    module = tuned_model().inner[1]
    module.record_density = True
    got, out = run(module)
    q, k, v = activations(1, 400, 400)
    selector = MeanSimilarity(module.cdfthreshd, module.simthreshd1, pool=16, block_q=64, block_k=64)
    expected, stats = sparse_attention(q, k, v, selector, is_causal=True, scale=DIM**-0.5, return_stats=True)
    assert torch.equal(got, expected)
    assert torch.equal(module.last_density, stats.density)
    assert stats.density.max() < 1
    assert (got - out).abs().max() > 1e-3, "dropping blocks must show"


def test_decode_dense_now_and_all_dense_return_the_original_output_itself() -> None:
    module = tuned_model().inner[0]
    for q_len in (1, 63):
        got, out = run(module, q_len=q_len)
        assert got is out
    got, out = run(module, q_len=64)
    assert got is not out
    module.dense_now = True
    assert (lambda pair: pair[0] is pair[1])(run(module))
    module.dense_now = False
    module.set_thresholds(dataclasses.replace(module.tuned, is_sparse=torch.zeros(HEADS, dtype=torch.bool)))
    assert (lambda pair: pair[0] is pair[1])(run(module))


def test_what_runs_dense_may_still_be_watched() -> None:
    module = tuned_model().inner[0]
    seen: list[Any] = []
    module.mode, module.observer = "tune", seen.append
    module.always_dense = True
    run(module)
    module.dense_now = True
    run(module)
    module.dense_now = False
    run(module, q_len=63)
    assert [type(x).__name__ for x in seen] == ["Call", "str", "str"], "those that are not, with a reason"


def test_text_is_served_by_a_union_with_tokens() -> None:
    module = tuned_model().inner[1]
    module.record_density = True
    without = run(module)[0]
    got, _ = run(module, text=((100, 130),))
    q, k, v = activations(1, 400, 400)
    selector = MeanSimilarity(module.cdfthreshd, module.simthreshd1, pool=16, block_q=64, block_k=64)
    text = Tokens(((100, 130),), block_q=64, block_k=64)
    expected, stats = sparse_attention(q, k, v, selector | text, is_causal=True, scale=DIM**-0.5, return_stats=True)
    assert torch.equal(got, expected) and not torch.equal(got, without)
    assert torch.equal(module.last_density, stats.density)
    module.text_sink = False
    assert torch.equal(run(module, text=((100, 130),))[0], without)


@pytest.mark.parametrize("mode", ["tune", "sparse"])
def test_autocast_reaches_selection_and_kernels_as_it_does_dense_attention(mode: str) -> None:
    module = tuned_model().inner[1]
    module.mode = mode
    seen: list[Any] = []
    module.observer = lambda call: seen.extend((call.q.dtype, call.k.dtype, call.v.dtype))
    q, k, v = activations(1, 400, 400)
    with torch.autocast("cpu", torch.bfloat16):
        # As behind a norm in float32; dense attention casts them too.
        got = module(q, k, v.bfloat16(), dense=lambda: v, is_causal=True, scale=DIM**-0.5)
    assert seen == ([torch.bfloat16] * 3 if mode == "tune" else [])
    if mode == "sparse":
        expected = module(*(x.bfloat16() for x in (q, k, v)), dense=lambda: v, is_causal=True, scale=DIM**-0.5)
        assert torch.equal(got, expected)


def test_dense_heads_are_exact_beside_sparse_ones() -> None:
    module = tuned_model().inner[0]
    on = torch.tensor([True, False, True, True])
    full = torch.ones(HEADS)
    # What a dense head carries must not matter.
    module.set_thresholds(Tuned(on, 0.3 * full, torch.where(on, -1.0, 0.9), torch.where(on, 50.0, 1.0)))
    module.record_density = True
    got, out = run(module)
    error = (got - out).abs().amax((0, 2, 3))
    assert error[1] < 1e-5
    assert (error[[0, 2, 3]] > 1e-2).all()
    assert module.last_density[0, 1] == 1


def test_a_full_mask_runs_dense_and_is_counted() -> None:
    module = tuned_model().inner[0]
    before = sum(count for reason, count in fallback_counts().items() if "4-D" in reason)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got, out = run(module, attn_mask=torch.ones(1, 1, 400, 400, dtype=torch.bool))
    assert got is out
    assert sum(count for reason, count in fallback_counts().items() if "4-D" in reason) == before + 1


def test_key_padding_is_honoured() -> None:
    module = tuned_model().inner[0]
    mask = torch.ones(1, 400, dtype=torch.bool)
    mask[:, :100] = False
    q, k, v = activations(1, 400, 400)
    got, _ = run(module, attn_mask=mask)
    k, v = k.clone(), v.clone()
    k[:, :, :100], v[:, :, :100] = 7, 1e6
    other = module(q, k, v, dense=lambda: q, is_causal=True, scale=DIM**-0.5, attn_mask=mask)
    torch.testing.assert_close(got[:, :, 100:], other[:, :, 100:])


def test_packed_sequences_and_sinks_are_served() -> None:
    module = tuned_model().inner[0]
    q, k, v = activations(1, 400, 400)
    cu, sinks = torch.tensor([0, 200, 201, 400]).int(), torch.tensor([-1.0, 0.0, 2.0, 4.0])
    options: Any = dict(is_causal=True, scale=DIM**-0.5, sinks=sinks)
    got = module(q, k, v, dense=lambda: pytest.fail("ran dense"), cu_seqlens=cu, **options)
    for a, b in ((0, 200), (200, 201), (201, 400)):
        part = Call.make(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], **options)
        expected = exact(part.replace(mask=module.serving(part)[0].mask_of(part)))
        torch.testing.assert_close(got[:, :, a:b], expected, atol=1e-5, rtol=1e-4)


def test_packed_sequences_are_watched_one_by_one() -> None:
    module = SparseAttention(selector=MeanSimilarity(pool=16, block_q=64, block_k=64))
    q, k, v = activations(1, 400, 400)
    out, seen = torch.zeros_like(q), []
    module.mode, module.observer = "tune", seen.append
    cu, sinks = torch.tensor([0, 200, 201, 400]).int(), torch.zeros(HEADS)
    got = module(q, k, v, dense=lambda: out, is_causal=True, scale=1.0, cu_seqlens=cu, sinks=sinks)
    assert got is out
    assert [call if isinstance(call, str) else call.q_len for call in seen] == [
        200,
        "it has fewer queries than a block",
        199,
    ]
    assert all(call.sinks is not None and call.cu_seqlens_q is None for call in seen if isinstance(call, Call))
    assert torch.equal(seen[2].k, k[:, :, 201:])


def test_lengths_far_from_the_calibrated_ones_warn_once_in_each_direction() -> None:
    module = SparseAttention(selector=MeanSimilarity(pool=16, block_q=64, block_k=64))

    def warned(length: int, **more: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(module, length, **more)
        return [str(w.message) for w in caught]

    for _ in range(2):  # anew after each load
        module.set_thresholds(tuned(lengths=(300, 400)))
        assert not any(warned(length) for length in (150, 400, 800))
        assert "calibrated with 300 to 400 keys and now gets 149" in warned(149)[0]
        assert warned(100) == []
        assert "now gets 801" in warned(801)[0], "a short prompt before does not use this up"
        assert warned(900) == []
    module.set_thresholds(tuned(lengths=(300, 400)))
    mask = torch.arange(1000)[None] < 700
    assert warned(1000, attn_mask=mask) == [], "padding is not counted"


NAN = float("nan")


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (dict(l1=0.0), "l1 must be above 0.*got 0"),
        (dict(l1=-0.1), "l1 must be above 0"),
        (dict(l1=NAN), "l1 must be above 0.*nan"),
        (dict(l1=0.07, pv_l1=0.07), "must exceed l1=0.07, got 0.07"),
        (dict(l1=0.2), "must exceed l1=0.2, got 0.07"),
        (dict(pv_l1=NAN), "pv_l1.*nan"),
        (dict(tail=0.0), "tail must be above 0.*None for off"),
        (dict(tail=NAN), "tail must be above 0"),
    ],
)
def test_bounds_are_checked(bounds: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseAttention(**bounds)
    model = FakeModel()
    with pytest.raises(ValueError, match=message):
        calibrate(model, **bounds)
    assert [(m.l1, m.pv_l1, m.tail) for m in model.inner] == [(0.06, 0.07, 0.5)] * 2, "nothing may change"


def test_backend_and_precision_are_checked() -> None:
    with pytest.raises(ValueError, match="backend must be 'auto' or one of .*got 'quick'"):
        SparseAttention(backend="quick")
    with pytest.raises(ValueError, match="precision must be one of .*got 'fp4'"):
        SparseAttention(precision="fp4")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FILE_KEYS.values())
def test_a_tuned_state_is_checked(name: str) -> None:
    values = {field: getattr(tuned(), field) for field in FILE_KEYS.values()}
    with pytest.raises(ValueError, match="must have shape"):
        Tuned(**(values | {name: values[name][None]}))
    if name != "is_sparse":
        bad = values[name].clone()
        bad[2] = NAN
        with pytest.raises(ValueError, match=f"{name} must be finite"):
            Tuned(**(values | {name: bad}))
    with pytest.raises(ValueError, match="this layer has 3 query heads, got 4"):
        FakeModel(heads=3).inner[0].set_thresholds(tuned())


def test_no_thresholds_yet() -> None:
    module = SparseAttention()
    assert module.heads is None and module.tuned is None and module.cdfthreshd is None
    with pytest.raises(RuntimeError, match="no thresholds yet"):
        module.serving(Call.make(*activations(1, 64, 64)))
    module.set_heads(3)
    assert module.heads == 3 and module.mode == "dense"
    assert "heads=3" in repr(module)


def test_paths() -> None:
    assert clean_path("_orig_mod.layers.0._orig_mod.attn") == "layers.0.attn"
    assert clean_path("_orig_mod.base_model.model.model.layers.0.attn") == "model.layers.0.attn"
    assert clean_path("module._orig_mod.layers.0.attn") == clean_path("base_model.model.module.layers.0.attn")
    assert clean_path("layers.module.attn") == "layers.module.attn"
    assert list(sparse_modules(tuned_model())) == ["layers.0.inner_attention", "layers.1.inner_attention"]
    with pytest.raises(ValueError, match=r"Linear has no SparseAttention layers: patch it first"):
        sparse_modules(nn.Linear(1, 1))


@pytest.mark.gpu
def test_a_layer_in_a_cuda_graph_on_a_stream_of_its_own() -> None:
    layer = SparseAttention(backend="triton", precision="int8_bf16").cuda()
    layer.set_thresholds(dataclasses.replace(tuned(2, 0.6), is_sparse=torch.tensor([True, False])))
    q, k, v = (torch.randn(1, 2, 1000, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def attend() -> torch.Tensor:
        return layer(q, k, v, dense=lambda: q, is_causal=False, scale=0.125, text=((0, 70),))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = attend()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = attend()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)
    assert layer.last_density is None


def test_what_serves_a_device_is_made_once_and_anew_when_it_changes() -> None:
    layer = SparseAttention()
    call = Call.make(*activations(1, 64, 64, heads=2))
    on, full = torch.tensor([True, False]), torch.ones(2)
    layer.set_thresholds(Tuned(on, torch.tensor([0.6, 0.7]), -full, 50 * full))
    first = layer.serving(call)[0]
    assert isinstance(first, MeanSimilarity)
    assert layer.serving(call)[0] is first
    assert torch.equal(first.cdf_threshold, torch.tensor([0.6, 1.0]))  # type: ignore[arg-type]
    assert first.sim_threshold == -1.0  # no similarity filter: not even measured
    layer.selector = TopK()
    assert isinstance(layer.serving(call)[0], TopK)
    layer.selector = MeanSimilarity()
    layer.set_thresholds(Tuned(on, 0.6 * full, 0.4 * full, 50 * full))
    changed = layer.serving(call)[0]
    assert isinstance(changed, MeanSimilarity)
    assert torch.equal(changed.sim_threshold, torch.tensor([0.4, -1.0]))  # type: ignore[arg-type]
    assert isinstance(layer.serving(call.replace(text=((0, 5),)))[0], Union)


def test_compiles_once_without_graph_breaks() -> None:
    model = tuned_model()
    expected = model(Prompt(1, 320))
    counter = CompileCounter()
    torch._dynamo.reset()
    layers = [torch.compile(layer, fullgraph=True, backend=counter) for layer in model.layers]
    for _ in range(3):
        for i, layer in enumerate(layers):
            assert torch.equal(layer(*activations(10 + i, 320, 320)), expected[i])
            model.inner[i].tuned._served.clear()  # what is kept for calls outside of a graph must not matter
    assert counter.frame_count == len(layers)
    model.inner[0].dense_now = True
    assert torch.equal(layers[0](*activations(10, 320, 320)), FakeModel().layers[0](*activations(10, 320, 320)))
    assert counter.frame_count == len(layers) + 1, "a switch to dense makes one graph more"


def test_running_dense_and_recording_densities() -> None:
    model, plain = tuned_model(), FakeModel()
    model.inner[1].always_dense = True
    prompts = [Prompt(1, 400), Prompt(2, 320)]
    with record_density(model) as densities:
        before = [model(prompt) for prompt in prompts]
        model(Prompt(3, 63))  # decode
        first = densities.per_layer
        with dense(model):
            for out, expected in zip(model(prompts[0]), plain(prompts[0]), strict=True):
                assert torch.equal(out, expected)
    assert list(first) == list(sparse_modules(model))
    sparse, kept_dense = first.values()
    assert kept_dense == 1.0 and 0 < sparse < 1
    assert list(densities.per_layer.values()) == [pytest.approx((2 * sparse + 1) / 3), 1.0]
    with record_density(model) as later:
        assert all(torch.equal(x, y) for x, y in zip(model(prompts[0]), before[0], strict=True))
        alone = later.per_layer["layers.0.inner_attention"]
        later.clear()
        assert later.per_layer == {} and later.mean != later.mean
        model(prompts[1])
        assert later.per_layer["layers.0.inner_attention"] == pytest.approx(2 * sparse - alone)
        assert later.mean == pytest.approx(1 + sparse - alone / 2 - 0.5)
    assert densities.mean == pytest.approx((2 * sparse + 1) / 6 + 0.5), "what another recording does is not in it"


@pytest.mark.parametrize("name", ["text_sink", "graphs"])
def test_flags(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be True or False"):
        SparseAttention(**{name: 1})
