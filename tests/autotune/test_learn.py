"""Gates of KV heads: their distribution, and the attention under them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from planted_model import PlantedModel
from torch import nn

import autotune.learn.branches as branches_file
from autotune.learn import HeadGates, learn
from autotune.learn.branches import Branches, mix
from spas_attn import fallback_counts
from spas_attn.selectors import Streaming

SIZES = dict(sink_size=64, window=64)
HEADS, GROUP, LENGTH = 2, 2, 330
RULE = Streaming(64, 64, block_q=64, block_k=64)


@pytest.fixture(autouse=True)
def no_fallbacks():
    """Both branches carry gradients as they are."""
    before = fallback_counts()
    yield
    assert fallback_counts() == before


def tensors(length=LENGTH, heads=HEADS * GROUP):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, n, length, 16, generator=g).requires_grad_() for n in (heads, HEADS, HEADS)]


def reference(q, k, v, streaming, documents=(0,)):
    """Causal attention, per document; the streaming rule as bool over tokens."""
    length, block = q.shape[2], 64
    i, j = torch.arange(length)[:, None], torch.arange(length)
    seen = j <= i
    start = torch.zeros(length, dtype=torch.long)
    for first in documents:
        start[first:] = first
    seen = seen & (start[:, None] == start)
    if streaming:
        at, key = i - start[:, None], j - start[:, None]  # positions in the document of the query
        first = at // block * block
        near = key // block * block + block - 1 > first - 64
        seen = seen & (near | (key < 64))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


def gates_of(log_alpha, rule=RULE):
    gates = HeadGates(len(log_alpha), len(log_alpha) * GROUP, Branches(rule))
    with torch.no_grad():
        gates.log_alpha.copy_(torch.as_tensor(log_alpha))
    return gates


def run(gates, q, k, v, **more):
    options = dict(is_causal=True, scale=q.shape[-1] ** -0.5) | more
    return gates(q, k, v, dense=lambda: reference(q, k, v, False), **options)


def test_closed_form_is_the_average_of_samples() -> None:
    gates = gates_of(torch.linspace(-5, 5, 11))
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = torch.stack([gates.sample() for _ in range(20000)])
    assert torch.allclose((drawn > 0).float().mean(0), gates.keep_probability(), atol=0.012)
    assert ((drawn == 0).any() and (drawn == 1).any()) and bool(((drawn >= 0) & (drawn <= 1)).all())
    fresh = HeadGates(64, 64, Branches(RULE), generator=torch.Generator().manual_seed(0))
    drawn_mean, drawn_std = fresh.log_alpha.mean().item(), fresh.log_alpha.std().item()
    assert drawn_mean == pytest.approx(4, abs=0.01) and drawn_std == pytest.approx(0.01, rel=0.3)
    # From PruLong's facts: E z 0.977, P(z > 0) 0.996, P(z = 1) 0.92 at the start.
    assert gates_of([4.0]).keep_probability().item() == pytest.approx(0.996, abs=5e-4)
    with torch.no_grad():
        start = torch.stack([gates_of([4.0] * 4000).sample() for _ in range(5)])
    assert start.mean() == pytest.approx(0.977, abs=0.005) and (start == 1).float().mean() == pytest.approx(
        0.92, abs=0.01
    )


@pytest.mark.parametrize("training", [True, False], ids=["sampled", "deterministic"])
def test_gradients_of_gates_are_finite_differences(training: bool) -> None:
    gates, (q, k, v) = gates_of([-0.4, 0.3]).train(training), tensors()
    weights = torch.randn(1, HEADS * GROUP, LENGTH, 16, generator=torch.Generator().manual_seed(1))

    def loss():
        torch.manual_seed(2)
        return (run(gates, q, k, v) * weights).double().sum()

    loss().backward()
    for head in range(HEADS):
        step = torch.zeros(HEADS).index_fill_(0, torch.tensor(head), 0.02)
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                gates.log_alpha += sign * step
                values.append(float(loss()))
                gates.log_alpha -= sign * step
        assert gates.log_alpha.grad[head].item() == pytest.approx((values[0] - values[1]) / 0.04, rel=5e-3)
    assert abs(gates.log_alpha.grad).min() > 0.1


def test_mix_is_exact_and_differentiable() -> None:
    g = torch.Generator().manual_seed(0)
    full, streaming = (torch.randn(2, 3, 5, 4, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    z = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64).requires_grad_()
    out = mix(z, full, streaming)
    assert torch.equal(out[:, 0], streaming[:, 0]) and torch.equal(out[:, 2], full[:, 2])
    assert torch.autograd.gradcheck(mix, (z, full, streaming))


def test_output_is_a_mixture_of_both_attentions() -> None:
    gates, (q, k, v) = gates_of([-0.4, 10.0]).eval(), tensors()
    z = gates.deterministic().repeat_interleave(GROUP)[:, None, None]
    assert 0 < float(z[0]) < 1 and float(z[2]) == 1
    full, streaming = reference(q, k, v, False), reference(q, k, v, True)
    expected = z * full + (1 - z) * streaming
    out = run(gates, q, k, v)
    assert torch.allclose(out, expected, atol=1e-5) and torch.equal(out[:, 2:], full[:, 2:])
    assert not torch.allclose(full, streaming, atol=0.1)
    weights = torch.randn_like(out)
    got = torch.autograd.grad((out * weights).sum(), (q, k, v))
    for a, b in zip(got, torch.autograd.grad((expected * weights).sum(), (q, k, v)), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_documents_of_a_row_are_apart() -> None:
    """In both branches, and for the teacher, whatever the model's own attention would make of them."""
    ends = [0, 10, 290, LENGTH]
    gates, (q, k, v) = gates_of([-0.4, 0.5]).eval(), tensors()
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    full, streaming = (reference(q, k, v, kind, ends[:-1]) for kind in (False, True))
    z = gates.deterministic().repeat_interleave(GROUP)[:, None, None]
    expected = z * full + (1 - z) * streaming
    out = run(gates, q, k, v, cu_seqlens=cu_seqlens)
    assert torch.allclose(out, expected, atol=1e-5) and not torch.allclose(full, streaming, atol=0.1)
    weights = torch.randn_like(out)
    got = torch.autograd.grad((out * weights).sum(), (q, k, v))
    for a, b in zip(got, torch.autograd.grad((expected * weights).sum(), (q, k, v)), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    gates.active = False
    assert torch.allclose(run(gates, q, k, v, cu_seqlens=cu_seqlens), full, atol=1e-5)


def test_masks_are_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    branches = Branches(RULE)
    made: list[int] = []
    select = Streaming.select
    monkeypatch.setattr(Streaming, "select", lambda *a, **o: made.append(1) or select(*a, **o))
    q, k, v = (x.detach() for x in tensors())
    padding = torch.ones(1, LENGTH, dtype=torch.bool)
    calls = [{}, {}, {"window": 90}, {"attn_mask": padding}, {"attn_mask": padding}, {"attn_mask": padding.clone()}]
    for options in calls:
        branches.streaming(q, k, v, dict(is_causal=True, scale=1.0, **options))
    assert len(made) == 4
    calls[-1]["attn_mask"][:, 0] = False  # another padding in the same place
    branches.streaming(q, k, v, dict(is_causal=True, scale=1.0, **calls[-1]))
    assert len(made) == 5
    branches.streaming(q[:, :, 100:], k, v, dict(is_causal=True, scale=1.0))
    assert len(made) == 6


def test_masks_made_in_inference_mode_are_not_trained_with() -> None:
    gates, (q, k, v) = gates_of([-0.4, 0.5]), tensors()
    with torch.inference_mode():
        run(gates, q, k, v)
    run(gates, q, k, v).sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize("table", [[True, False], [True, True], [False, False]])
def test_heads_of_a_fixed_table_pay_for_their_own_branch(table: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    gates, (q, k, v) = gates_of([1.0, 1.0]), tensors()
    computed: list[torch.Tensor] = []

    def watched(q, k, v, mask, **options):
        computed.append(mask.density(True))
        return attend(q, k, v, mask, **options)

    attend = branches_file.block_sparse_attention
    monkeypatch.setattr(branches_file, "block_sparse_attention", watched)
    gates.fix(torch.tensor(table))
    heads = torch.tensor(table).repeat_interleave(GROUP)
    asked: list[int] = []
    out = gates(
        q, k, v, dense=lambda: asked.append(1) or reference(q, k, v, False), is_causal=True, scale=q.shape[-1] ** -0.5
    )
    expected = torch.where(heads[:, None, None], reference(q, k, v, False), reference(q, k, v, True))
    assert torch.allclose(out, expected, atol=1e-5)
    assert bool(asked) == all(table) and len(computed) == (not all(table))
    for density in computed:
        assert torch.equal(density[0] == 1, heads) and bool((density[0][~heads] < 0.9).all())
    assert not gates.log_alpha.requires_grad
    gates.fix(None)
    assert gates.log_alpha.requires_grad and gates.log_alpha.tolist() == [20.0 * x - 10 for x in table]


def test_a_rank_takes_the_gates_of_its_heads() -> None:
    """Also where there are more ranks than KV heads, which are then repeated."""
    gates, (q, k, v) = gates_of([-0.4, 0.5]).eval(), tensors()
    whole = run(gates, q, k, v)
    for size in (2, 4):
        part = HEADS * GROUP // size
        kv = (k, v) if size == 2 else (x.repeat_interleave(GROUP, 1) for x in (k, v))
        held = [[x.chunk(size, 1)[rank] for x in (q, *kv)] for kv in [list(kv)] for rank in range(size)]
        outs = [run(gates, *mine, share=(rank, size)) for rank, mine in enumerate(held)]
        assert outs[0].shape[1] == part and torch.allclose(torch.cat(outs, 1), whole, atol=1e-6)
    with pytest.raises(ValueError, match="gates for 4 query heads, and the call has 2 of 1 ranks"):
        run(gates, q[:, :2], k, v)
    with pytest.raises(ValueError, match="causal"):
        run(gates, q, k, v, is_causal=False)


def test_gates_stay_float32() -> None:
    model = PlantedModel()
    learning = learn(model, **SIZES)
    before = learning.gates[0].log_alpha.detach().clone()
    for cast in (nn.Module.bfloat16, nn.Module.half, lambda m: m.to(torch.bfloat16), nn.Module.float):
        cast(model)
        assert learning.gates[0].log_alpha.dtype == torch.float32
        assert torch.equal(learning.gates[0].log_alpha, before)
    assert model.to("meta").layers[0].gates.log_alpha.is_meta
    q, k, v = (x.detach().bfloat16() for x in tensors())
    gates = gates_of([-0.4, 0.5])
    out = run(gates, q, k, v)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16 and gates.log_alpha.grad.dtype == torch.float32
