"""Calls that are replayed from a plan: the same bits, new inputs, new signatures, and what is never replayed."""

from __future__ import annotations

import ast
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import spas_attn
from spas_attn import BlockMask, attend, block_sparse_attention, fallback_counts, replay, sparse_attention
from spas_attn.kernels import plans
from spas_attn.kernels.recorded import Launch, Place, Recorder, Source, launch
from spas_attn.selectors import ExactKeys, FlexPrefill, MeanSimilarity, Selector, Tokens, TopK

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def replaying(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plans of this test alone; on a CPU its calls are recorded too, with selection by kernels."""
    monkeypatch.setattr(replay, "DEVICES", {"cpu", "cuda"})
    if DEVICE == "cpu":
        select = spas_attn.select
        monkeypatch.setattr(select, "fused_serves", lambda selector, call: select._serves(selector, call))
    replay.forget()
    yield
    replay.forget()


def qkv(seed: int, length: int = 100, heads: int = 2, dim: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, n, length, dim) for n in (heads, 1, 1)]
    return [torch.randn(shape, generator=generator).to(DEVICE, BF16) for shape in shapes]


def run(inputs: list[Tensor], selector: Selector, **options: Any) -> Tensor:
    out = sparse_attention(*inputs, selector, backend="triton", strict=True, **options)
    assert isinstance(out, Tensor)
    return out


def normally(call: Callable[[], Any]) -> Any:
    """The result without any plan."""
    known, replay.DEVICES = replay.DEVICES, set()
    try:
        return call()
    finally:
        replay.DEVICES = known


BLOCKS = {"block_q": 64, "block_k": 64}
CALLS: dict[str, tuple[Callable[[], Selector], dict[str, Any]]] = {
    "mean": (lambda: MeanSimilarity(0.5, pool=16, **BLOCKS), {}),
    "exact keys": (lambda: ExactKeys(0.5, **BLOCKS), {"is_causal": True}),
    "exact keys, a sample": (lambda: ExactKeys(0.5, queries="sample", **BLOCKS), {"precision": "int8_bf16"}),
    "causal": (lambda: TopK(0.4, **BLOCKS), {"is_causal": True, "window": 90}),
    "similarity": (lambda: MeanSimilarity(0.5, 0.1, **BLOCKS), {}),
    "8 bits": (lambda: MeanSimilarity(torch.tensor([0.3, 0.8], device=DEVICE), **BLOCKS), {"precision": "int8_fp8"}),
    "dense head": (lambda: TopK(0.3, **BLOCKS, dense_heads=torch.tensor([True, False], device=DEVICE)), {}),
    "text": (lambda: TopK(0.3, **BLOCKS) | Tokens(((0, 70),), **BLOCKS), {"precision": "int8_bf16"}),
}


@pytest.mark.parametrize(("selector", "options"), CALLS.values(), ids=CALLS)
def test_same_bits(selector: Callable[[], Selector], options: dict[str, Any]) -> None:
    """The third call and later ones run from the plan, with inputs of their own, each with an output of its own."""
    rule, inputs = selector(), [qkv(seed) for seed in (0, 1)]
    expected = [normally(lambda x=x: run(x, rule, **options)) for x in inputs]
    assert not torch.equal(*expected)
    got = [run(inputs[i], rule, **options) for i in (0, 1, 0, 1)]
    assert replay.summary() == {"plan": 1}
    for i, out in enumerate(got):
        assert torch.equal(out, expected[i % 2])


def test_thresholds_are_read_at_every_call() -> None:
    inputs, thresholds = qkv(0), torch.tensor([0.2, 0.2], device=DEVICE)
    rule = MeanSimilarity(thresholds, **BLOCKS, local=0, sink=False)
    low = [run(inputs, rule) for _ in range(3)][-1]
    thresholds.fill_(1.0)
    high = run(inputs, rule)
    rule.cdf_threshold = torch.tensor([0.2, 1.0], device=DEVICE)
    mixed = run(inputs, rule)
    assert replay.summary() == {"plan": 1}
    assert torch.equal(high, normally(lambda: run(inputs, rule.tuned_to(thresholds, thresholds > 0))))
    assert torch.equal(mixed[:, 0], low[:, 0]) and torch.equal(mixed[:, 1], high[:, 1])
    assert not torch.equal(low, high)


def shifted(x: Tensor) -> Tensor:
    """The same values at an address that is no multiple of 16."""
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x)


CHANGES: dict[str, Callable[[list[Tensor], dict[str, Any]], Any]] = {
    "strides": lambda x, o: x.__setitem__(0, x[0].transpose(1, 2).contiguous().transpose(1, 2)),
    "alignment": lambda x, o: x.__setitem__(1, shifted(x[1])),
    "length": lambda x, o: x.__setitem__(slice(None), [y[:, :, :80] for y in x]),
    "dtype": lambda x, o: x.__setitem__(slice(None), [y.half() for y in x]),
    "one tensor twice": lambda x, o: x.__setitem__(2, x[1]),
    "option": lambda x, o: o.update(is_causal=True),
    "True equals 1": lambda x, o: o.update(window=True),
    "field": lambda x, o: setattr(o["selector"], "keep", 0.6),
    "class": lambda x, o: o.update(selector=MeanSimilarity(0.3)),
    "threshold as a tensor": lambda x, o: setattr(o["selector"], "keep", torch.tensor([0.3], device=DEVICE)),
    "key padding": lambda x, o: o.update(attn_mask=torch.ones(1, 100, dtype=torch.bool, device=DEVICE)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_signature(change: Callable[[list[Tensor], dict[str, Any]], Any]) -> None:
    """What kernels were compiled for, which tensors are one, and every option."""
    inputs, options = qkv(0), {"selector": TopK(0.3), "window": 1, "is_causal": False, "attn_mask": None}
    assert [replay.request(inputs[0], *inputs, options) is None for _ in range(3)] == [True, False, False]
    other = [x.clone() for x in inputs]
    assert replay.request(other[0], *other, options) is not None
    change(inputs, options)
    assert replay.request(inputs[0], *inputs, options) is None
    assert replay.request(inputs[0], *inputs, options) is not None


def test_what_has_no_signature() -> None:
    """Gradients, modes and transforms that look on, subclasses, values that are not understood."""
    q = qkv(0)[0]
    asks: list[Callable[[], Any]] = [
        lambda: replay.request(q, q, object()),
        lambda: replay.request(q, q, q.clone().requires_grad_()),
        lambda: replay.request(q, q, q.to_sparse()),
    ]
    replay.request(q, q)
    assert replay.request(q, q) is not None
    for ask in asks:
        assert [ask() for _ in range(3)] == [None] * 3
    with torch.no_grad():
        assert [asks[1]() is None for _ in range(2)] == [True, False]
    with Recorder([]):
        assert replay.request(q, q) is None
    seen: list[Any] = []
    torch.func.vmap(lambda x: seen.append(replay.request(x, x)) or x)(q)
    assert seen == [None]


def test_wrong_arguments_are_refused_every_time() -> None:
    inputs = qkv(0)
    for _ in range(4):
        with pytest.raises(ValueError, match="window"):
            run(inputs, TopK(0.3), window=True, is_causal=True)
    assert "plan" not in replay.summary()


def test_checks_of_values_are_made_every_time() -> None:
    inputs, threshold = qkv(0), torch.tensor([3.0, 4.0], device=DEVICE)
    for _ in range(3):
        run(inputs, TopK(0.3), pv_threshold=threshold)
    threshold.fill_(-1.0)
    with pytest.raises(ValueError, match="pv_threshold"):
        run(inputs, TopK(0.3), pv_threshold=threshold)


def test_stats() -> None:
    """The mask of a replayed call is what was computed, and costs the workspace nothing."""
    rule = MeanSimilarity(0.5, **BLOCKS)
    for seed in (0, 1, 2):
        inputs = qkv(seed)
        _, stats = sparse_attention(*inputs, rule, backend="triton", is_causal=True, return_stats=True)
    expected = normally(lambda: sparse_attention(*inputs, rule, backend="triton", is_causal=True, return_stats=True)[1])
    assert replay.summary() == {"plan": 1}
    assert torch.equal(stats.mask.to_dense(), expected.mask.to_dense())
    assert torch.equal(stats.density, expected.density)
    assert (stats.plan, stats.call.precision) == (expected.plan, expected.call.precision)
    assert stats.mask.indices.untyped_storage().nbytes() == stats.mask.indices.numel() * 4


def test_given_mask_and_log_sum_exp() -> None:
    q, k, v = qkv(0)
    for seed in (0, 1, 2):
        kept = torch.rand(1, 2, 2, 2, generator=torch.Generator().manual_seed(seed)) < 0.5
        mask = BlockMask.from_dense(kept | torch.eye(2, dtype=torch.bool), 100, 100, 64, 64).to(DEVICE)

        def both(mask: BlockMask = mask) -> tuple[Tensor, Tensor, Tensor]:
            out = block_sparse_attention(q, k, v, mask, backend="triton")
            return out, *block_sparse_attention(q, k, v, mask, backend="triton", return_lse=True)

        for got, expected in zip(both(), normally(both), strict=True):
            assert torch.equal(got, expected)
    assert replay.summary() == {"plan": 2}


def test_what_needs_more_than_kernels_is_not_replayed() -> None:
    """FlexPrefill uses torch, and so does another backend."""
    inputs = qkv(0)
    for _ in range(3):
        run(inputs, FlexPrefill(), is_causal=True)
        sparse_attention(*inputs, TopK(0.3), backend="sdpa")
    assert set(replay.summary()) == {"it runs aten._to_copy.default", "backend 'sdpa' is not recorded"}


def test_a_recording_is_of_its_thread() -> None:
    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args: None

    with Recorder([]) as recorder:
        thread = threading.Thread(target=lambda: (launch(Kernel(), (1,), 1), torch.zeros(1)))
        thread.start()
        thread.join()
        launch(Kernel(), (2,), 2)
    assert [action.grid for action in recorder.recording.actions if isinstance(action, Launch)] == [(2,)]
    assert len(recorder.recording.sources) == 0


def test_signatures_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "LIMIT", 2)
    q = torch.zeros(1, device=DEVICE)
    for number in (1, 2, 1, 3, 1):  # 2 is unused for longest when 3 comes
        replay.request(q, q, number)
    assert replay.summary() == {"seen once": 2}
    assert replay.request(q, q, 1) is not None
    assert replay.request(q, q, 2) is None


def test_a_registration_ends_decisions() -> None:
    q = torch.zeros(1, device=DEVICE)
    assert [replay.request(q, q) is None for _ in range(2)] == [True, False]
    spas_attn.cost_model.forget()
    assert replay.request(q, q) is None


def test_workspaces_share_memory_when_they_may() -> None:
    """Two pieces in use at once lie apart, and one whose use is over gives its place away, also to a result."""
    with Recorder([torch.zeros(4)]) as recorder:
        kept = [torch.empty(n, dtype=torch.uint8) for n in (1000, 3000, 700, 900)]
    assert recorder.recording.places[id(kept[2])] == Place(3, 0)
    recording = recorder.recording
    places, size = plans._arrange(recording, [{0, 1}, {1, 2}, {2, 3}, {3, 4}], [])
    assert places == {1: (0, 3072), 2: (0, 0), 3: (0, 3072), 4: (0, 0)}
    assert size == 3072 + 1000
    places, size = plans._arrange(recording, [{0, 1}, {3}, {2, 4}], [2])  # the second piece is a result
    assert places == {1: (0, 0), 3: (0, 0), 4: (1, 0)}
    assert size == 900
    places, size = plans._arrange(recording, [{2, 3}, {1, 3}], [2])
    assert places == {1: (1, 0), 3: (1, 1024)}


def test_views_keep_their_place_and_other_operators_are_obstacles() -> None:
    x = torch.arange(12.0).view(3, 4)
    with Recorder([x]) as recorder:
        part = x.t()[1:].view(torch.int32)
        empty = torch.empty(5)[2:]
    recording = recorder.recording
    assert recording.places[id(part)] == Place(0, 4)
    assert recording.places[id(empty)] == Place(1, 8)
    assert recording.obstacle is None
    with Recorder([x]) as recorder:
        y = x + 1
    assert recorder.recording.obstacle == "aten.add.Tensor"
    assert id(y) not in recorder.recording.places
    assert plans.make(recorder.recording, [y], None) == "it runs aten.add.Tensor"
    with Recorder([x]) as recorder:
        z = torch.zeros(3, dtype=torch.int32)
    made = plans.make(recorder.recording, [z], "about")
    assert isinstance(made, plans.Plan)
    assert made.about == "about"
    assert made.actions == ((Place(1, 0), 12),)
    assert isinstance(recorder.recording.sources[0], Source)


@pytest.mark.parametrize("copies", [True, False])
@torch.inference_mode()  # there, and in an operator's own code, torch does not take composite operators apart
def test_what_counts_as_a_view_and_copies_is_an_obstacle(copies: bool) -> None:
    x = torch.zeros(4, 4, device=DEVICE)
    with Recorder([x]) as recorder:
        y = (x.t() if copies else x).contiguous()
    recording = recorder.recording
    if copies:
        assert recording.obstacle == "aten.contiguous.default" and id(y) not in recording.places
    else:
        assert recording.obstacle is None and recording.places[id(y)] == Place(0, 0)


def test_every_launch_can_be_noted() -> None:
    """A kernel that is launched by ``kernel[grid](...)`` would be missing from plans."""
    for path in sorted(Path(spas_attn.__file__).parent.rglob("*.py")):
        if path.name in ("recorded.py", "plans.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                assert "kernel" not in ast.unparse(node.func.value), f"{path}:{node.lineno}"


def test_a_dense_call_is_decided_twice_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be recorded keeps the decision how it runs; its fallbacks are counted every time."""
    decided: list[int] = []
    plan = attend.plan
    monkeypatch.setattr(attend, "plan", lambda *args: decided.append(1) or plan(*args))
    inputs = qkv(0)
    full = torch.ones(1, 1, 100, 100, dtype=torch.bool, device=DEVICE)
    before = sum(fallback_counts().values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outs = [sparse_attention(*inputs, TopK(0.3), backend="triton", attn_mask=full) for _ in range(4)]
    assert all(torch.equal(outs[0], out) for out in outs)
    assert len(decided) == 2
    assert sum(fallback_counts().values()) == before + 4


def test_a_recording_that_does_not_fit_is_given_up() -> None:
    q, tries = torch.zeros(1, device=DEVICE), []

    def compute() -> str:
        tries.append(1)
        if len(tries) == 1:
            raise torch.cuda.OutOfMemoryError
        return "done"

    replay.request(q, q)
    request = replay.request(q, q)
    assert request is not None and request.due
    assert request.watch(compute) == "done"
    request.keep([q])
    again = replay.request(q, q)
    assert again is not None and again.plan is None and not again.due
    assert "memory" in next(iter(replay.summary()))
