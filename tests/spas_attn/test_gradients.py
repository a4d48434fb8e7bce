"""Gradients through given blocks, against autograd of this file's own float64 arithmetic."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spas_attn import BlockMask, Call, backends, block_sparse_attention, replay
from spas_attn.plan import plan
from spas_attn.selectors import Dense, Streaming

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = pytest.param("triton", marks=pytest.mark.skipif("backends.get('triton').missing() is not None"))
# Relative L1: results are rounded to the inputs' dtype, and on a GPU the factors of the products too.
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass
class Drawn:
    """A random call: leaves q, k, v in layout "HND", a mask, options, and gradients of output and log-sum-exp."""

    inputs: list[Tensor]
    mask: BlockMask
    options: dict[str, Any]
    grads: tuple[Tensor, Tensor]
    shown: str

    def run(self, backend: str) -> tuple[Tensor, ...]:
        """Output, log-sum-exp (0 where there is none), and the gradients of q, k and v."""
        device = DEVICE if backend == "triton" else "cpu"
        leaves = [x.detach().to(device).requires_grad_() for x in self.inputs]
        options = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in self.options.items()}
        given = [x.transpose(1, 2) for x in leaves] if options["layout"] == "NHD" else leaves
        mask = self.mask.to(device)
        out, lse = block_sparse_attention(*given, mask, backend=backend, return_lse=True, **options)
        out = out.transpose(1, 2) if options["layout"] == "NHD" else out
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
        results = out, lse, *torch.autograd.grad([out, lse], leaves, [x.to(device) for x in self.grads])
        return tuple(x.cpu() for x in results)


def draw(seed: int, longest: int = 260) -> Drawn:
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    is_causal, batch = chance.random() < 0.6, chance.choice([1, 2])
    k_heads, group, dim = chance.choice([1, 2]), chance.choice([1, 2, 3]), chance.choice([16, 24, 32, 40])
    k_len = chance.choice([1, 64, 65, 128, chance.randint(1, longest), chance.randint(1, longest)])
    q_len = chance.randint(1, k_len) if is_causal else chance.randint(1, longest)
    block_q, block_k = chance.choice([64, 128]), chance.choice([64, 128])
    padding = chance.choice([None, None, "left", "holes", "nothing left"])
    dtype = chance.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16])
    valid = torch.ones(batch, k_len, dtype=torch.bool)
    if padding == "left":
        valid[0, : k_len // 2] = False
    elif padding == "holes":
        valid = torch.rand(batch, k_len, generator=generator) < 0.5
    elif padding == "nothing left":
        valid[0] = False

    def tensor(heads: int, length: int) -> Tensor:
        return torch.randn(batch, heads, length, dim, generator=generator).to(dtype)

    heads = k_heads * group
    kept = torch.rand(batch, heads, -(-q_len // block_q), -(-k_len // block_k), generator=generator) < 0.6
    options = {
        "is_causal": is_causal,
        "window": chance.choice([None, chance.randint(1, 150)]) if is_causal else None,
        "scale": chance.choice([None, 0.02, 0.7]),
        "attn_mask": None if padding is None else valid,
        "layout": chance.choice(["HND", "NHD"]),
    }
    inputs = [tensor(heads, q_len), tensor(k_heads, k_len), tensor(k_heads, k_len)]
    grads = tensor(heads, q_len), torch.randn(batch, heads, q_len, generator=generator)
    mask = BlockMask.from_dense(kept, q_len, k_len, block_q, block_k)
    shown = f"seed {seed}: {q_len} x {k_len}, {heads}:{k_heads} x {dim}, {dtype}, {block_q} x {block_k}, {options}"
    return Drawn(inputs, mask, options, grads, shown)


def exact(drawn: Drawn) -> tuple[Tensor, ...]:
    """What :meth:`Drawn.run` gives, in float64 under a mask of tokens."""
    q, k, v = leaves = [x.double().requires_grad_() for x in drawn.inputs]
    group, (q_len, k_len) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    i, j = torch.arange(q_len)[:, None], torch.arange(k_len)
    seen = drawn.mask.to_dense()[:, :, i // drawn.mask.block_q, j // drawn.mask.block_k]
    if drawn.options["is_causal"]:
        seen = seen & (j <= i + k_len - q_len)
    if drawn.options["window"] is not None:
        seen = seen & (j > i + k_len - q_len - drawn.options["window"])
    if drawn.options["attn_mask"] is not None:
        seen = seen & drawn.options["attn_mask"][:, None, None]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    empty = ~seen.any(-1, keepdim=True)
    scores = q @ k.transpose(-1, -2) * (drawn.options["scale"] or q.shape[-1] ** -0.5)
    scores = scores.masked_fill(~(seen | empty), -torch.inf)
    out = (scores.softmax(-1) @ v).masked_fill(empty, 0.0)
    lse = scores.logsumexp(-1).masked_fill(empty[..., 0], 0.0)
    return out, lse, *torch.autograd.grad([out, lse], leaves, [x.double() for x in drawn.grads])


def assert_close(drawn: Drawn, backend: str) -> None:
    names = ("out", "lse", "dq", "dk", "dv")
    for name, mine, truth, like in zip(
        names, drawn.run(backend), exact(drawn), [None, None, *drawn.inputs], strict=True
    ):
        assert mine.dtype == (mine.dtype if like is None else like.dtype)
        # Where probabilities are near 1, gradients of scores are small differences of numbers of size 1.
        error = (mine.double() - truth).abs().mean() / (truth.abs().mean() + 0.02)
        assert error <= LIMITS[drawn.inputs[0].dtype], f"{backend}, {name} is off by {error:.1e}: {drawn.shown}"
        assert (mine[truth == 0].abs() <= 1e-6).all(), f"{backend}, {name} of what takes no part: {drawn.shown}"


@pytest.mark.parametrize("first", range(0, 28, 7))
def test_random_calls(first: int) -> None:
    for seed in range(first, first + 7):
        for backend in ("cpu", "sdpa", "reference"):
            assert_close(draw(seed), backend)


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize("seed", range(10))
def test_random_calls_of_the_kernels(seed: int, backend: str) -> None:
    assert_close(draw(seed, longest=150), backend)


def test_the_draws_cover_what_they_should() -> None:
    for seeds in (range(28), range(10)):
        all_drawn = [draw(seed) for seed in seeds]
        for name, chosen in {
            "causal": lambda d: d.options["is_causal"],
            "window": lambda d: d.options["window"] is not None,
            "padding": lambda d: d.options["attn_mask"] is not None,
            "grouped": lambda d: d.inputs[0].shape[1] > d.inputs[1].shape[1],
            "ragged": lambda d: d.inputs[1].shape[2] % d.mask.block_k > 0,
            "unequal blocks": lambda d: d.mask.block_q != d.mask.block_k,
            "16 bits": lambda d: d.inputs[0].dtype != torch.float32,
            "fp32": lambda d: d.inputs[0].dtype == torch.float32,
        }.items():
            assert sum(map(chosen, all_drawn)) >= 2, name


def mine(seed: int = 3, length: int = 150, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], BlockMask]:
    """Leaves q ``[1, 4, L, 16]``, k and v ``[1, 2, L, 16]``, and a mask of 64 x 64 that leaves some blocks out."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(1, heads, length, 16, generator=generator).to(dtype) for heads in (4, 2, 2)]
    blocks = -(-length // 64)
    kept = torch.eye(blocks, dtype=torch.bool).repeat(1, 4, 1, 1)
    kept[:, 1::2, :, 0] = True  # heads 0 and 2 keep their diagonal only
    return [x.requires_grad_() for x in inputs], BlockMask.from_dense(kept, length, length, 64, 64)


def grads_of(out: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad((out * out.detach().cos()).sum(), inputs)


@pytest.mark.parametrize("backend", ["cpu", TRITON])
def test_same_bits_twice(backend: str) -> None:
    first, second = (draw(8).run(backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif("backends.get('triton').missing() is not None")
def test_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both passes are recorded, and repeated with other inputs."""
    monkeypatch.setattr(replay, "DEVICES", {"cuda", "cpu"})
    drawn = [draw(3, longest=70), draw(3, longest=70)]
    drawn[1].inputs = [x.flip(2).contiguous() for x in drawn[0].inputs]
    for x in drawn:  # lists that all heads share are not copied
        lists = (x.mask.counts[:, :1].expand_as(x.mask.counts), x.mask.indices[:, :1].expand_as(x.mask.indices))
        x.mask = dataclasses.replace(x.mask, counts=lists[0], indices=lists[1], trusted=False)
    first = [x.run("triton") for x in drawn]
    assert replay.summary() == {"plan": 2}
    again = [x.run("triton") for x in drawn]
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(first[0][-1], first[1][-1])


@pytest.mark.parametrize("backend", ["cpu", TRITON])
def test_skipped_blocks_are_not_touched(backend: str) -> None:
    """Cost is by blocks: what lies in a block that nobody keeps is never read, be it NaN."""
    (q, k, v), _ = mine(length=192)
    kept = torch.zeros(1, 4, 3, 3, dtype=torch.bool)
    kept[..., 0, 0] = kept[..., 2, 0] = kept[..., 2, 2] = True  # query block 1 keeps nothing, nobody keeps key block 1
    mask = BlockMask.from_dense(kept, 192, 192, 64, 64).to(DEVICE if backend == "triton" else "cpu")
    clean = [x.detach().to(mask.counts.device) for x in (q, k, v)]
    spoilt = [x.clone() for x in clean]
    for x in spoilt[1:]:
        x[:, :, 64:128] = float("nan")
    spoilt[0][:, :, 64:128] = float("nan")
    results = []
    for inputs in (clean, spoilt):
        leaves = [x.requires_grad_() for x in inputs]
        out = block_sparse_attention(*leaves, mask, is_causal=True, backend=backend, strict=True)
        results.append((out, *torch.autograd.grad(out, leaves, torch.ones_like(out))))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert (a[:, :, 64:128] == 0).all()


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=[*TRITON.marks, pytest.mark.slow])])
def test_packed_sequences_are_one_call(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their gradients are those of the single sequences."""
    device, lengths = DEVICE if backend == "triton" else "cpu", (66, 70, 1)
    cu = torch.tensor([0, 66, 136, 137], dtype=torch.int32, device=device)
    (q, k, v), _ = mine(length=137)
    inputs = [x.detach().to(device).requires_grad_() for x in (q, k, v)]
    chosen = Streaming(64, 60, block_q=64, block_k=64)
    mask = chosen.select(*[x.detach() for x in inputs[:2]], is_causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu)
    calls = []
    found = backends.get(backend)
    counted = dataclasses.replace(found, run_with_lse=lambda call: calls.append(call) or found.run_with_lse(call))
    monkeypatch.setitem(backends.base._REGISTRY, backend, counted)
    out = block_sparse_attention(*inputs, mask, is_causal=True, backend=backend, strict=True)
    together = grads_of(out, inputs)
    assert len(calls) == 1
    start = 0
    for length, part in zip(lengths, mask.split(), strict=True):
        at = slice(start, start := start + length)
        alone = [x.detach()[:, :, at].requires_grad_() for x in inputs]
        expected = grads_of(block_sparse_attention(*alone, part, is_causal=True, backend=backend), alone)
        for a, b in zip(together, expected, strict=True):
            torch.testing.assert_close(a[:, :, at], b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", TRITON])
def test_sinks_carry_gradients(backend: str) -> None:
    inputs, mask = mine(length=70)
    device = DEVICE if backend == "triton" else "cpu"
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    results = []
    for name in (backend, "sdpa"):
        leaves = [x.detach().to(device).requires_grad_() for x in (*inputs, sinks)]
        out = block_sparse_attention(*leaves[:3], mask.to(device), is_causal=True, sinks=leaves[3], backend=name)
        results.append(grads_of(out, leaves))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", TRITON])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_compute_the_same(backend: str, reentrant: bool) -> None:
    device = DEVICE if backend == "triton" else "cpu"
    inputs, mask = mine(length=70)
    leaves, mask = [x.detach().to(device).requires_grad_() for x in inputs], mask.to(device)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attention(q.sin(), k, v, mask, is_causal=True, backend=backend)

    plain = grads_of(layer(*leaves), leaves)
    out = checkpoint(layer, *leaves, use_reentrant=reentrant)
    for x in leaves:
        x.grad = None
    (out * out.detach().cos()).sum().backward()
    for a, x in zip(plain, leaves, strict=True):
        assert torch.equal(a, x.grad)


def test_compiled() -> None:
    inputs, mask = mine()

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attention(q * 2, k, v.cos(), mask, is_causal=True).transpose(1, 2).flatten(2)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for a, b in zip(grads_of(compiled(*inputs), inputs), grads_of(layer(*inputs), inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_packed() -> None:
    inputs, _ = mine(length=137)
    cu = torch.tensor([0, 66, 136, 137], dtype=torch.int32)
    mask = Streaming(64, 60).select(*[x.detach() for x in inputs[:2]], is_causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attention(q * 2, k, v.cos(), mask, is_causal=True)

    compiled = torch.compile(layer, backend="aot_eager")
    for a, b in zip(grads_of(compiled(*inputs), inputs), grads_of(layer(*inputs), inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_no_second_derivatives() -> None:
    inputs, mask = mine(length=70)
    out = block_sparse_attention(*inputs, mask, is_causal=True)
    (first,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        torch.autograd.grad(first.square().sum(), inputs[0])


def test_what_has_no_backward_pass_declines() -> None:
    inputs, mask = mine(length=70)
    for backend, more in (("flex", {}), ("cpu", {"precision": "int8_bf16"})):
        with pytest.raises(RuntimeError, match="strict=True"):
            block_sparse_attention(*inputs, mask, is_causal=True, backend=backend, strict=True, **more)
    call = Call.make(*inputs, is_causal=True, mask=mask)
    assert "no backward pass" in str(
        dataclasses.replace(backends.get("cpu"), backward=None, differentiable=False).why_not(call)
    )
    assert "native precision" in str(
        dataclasses.replace(backends.get("cpu"), declines=lambda call: None).why_not(call.replace(precision="int8_fp8"))
    )
    assert plan(call.replace(precision="auto")).precision == "native"
    assert "all kept blocks" in str(plan(call.replace(pv_threshold=torch.ones(4))).pv_skip_left_out)


@pytest.mark.skipif("backends.get('triton').missing() is not None")
@pytest.mark.parametrize("shared", [pytest.param(False, marks=pytest.mark.slow), True])
def test_long_lists_are_shared_out(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of keys that many queries keep are cut into chunks; whatever is cut, the sums are the same."""
    from spas_attn.kernels import backward_launch, transpose
    from spas_attn.kernels.launch import block_lists

    length = 64 * 6
    (q, k, v), _ = mine(length=length)
    kept = torch.eye(6, dtype=torch.bool).repeat(1, 4, 1, 1)
    kept[..., 0] = True
    mask = BlockMask.from_dense(kept, length, length, 64, 64).to(DEVICE)
    if shared:
        mask = BlockMask(
            mask.counts[:, :1].expand(-1, 4, -1), mask.indices[:, :1].expand(-1, 4, -1, -1), 64, 64, length, length
        )
    lists = transpose.query_lists(mask, block_lists(mask, 1, 4), 2, True, None)
    assert lists.heads == (1 if shared else 2)
    assert lists.counts[0, 0].tolist() == [12] + 5 * [2]
    assert lists.partial[0, 0].tolist() == 6 * [2]
    assert [(e >> 20, e & 0xFFFFF) for e in lists.entries[0, -1, 0].tolist()] == [
        (0, 0), (1, 0), *((head, block) for head in (0, 1) for block in range(1, 6))
    ]  # fmt: skip
    if shared:
        return  # the rest would take seconds under the interpreter, and depends on the lists alone
    inputs = [x.detach().to(DEVICE) for x in (q, k, v)]
    forward = backends.get("triton").run_with_lse(Call.make(*inputs, is_causal=True, mask=mask))
    results, cut = [], []
    for short in (1000, 2):
        monkeypatch.setattr(transpose, "_SHORT", short)
        shares = transpose.chunks(lists, 2, 5)
        cut.append(shares.number.tolist())
        results.append(
            backward_launch.sparse_attention_bwd(*inputs, mask, *forward, forward[0].sin(), scale=0.25, is_causal=True)
        )
    assert cut == [12 * [1], [2, *5 * [1], 2, *5 * [1]]]
    assert shares.owner.tolist() == [0, 0, 6, 6, -1]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_full_size(dim: int, block: int, is_causal: bool, dtype: torch.dtype) -> None:
    """Against autograd of float32 scores; without a host synchronisation, and the same bits when it is replayed."""
    generator = torch.Generator("cuda").manual_seed(0)
    length, blocks = 2000, -(-2000 // block)
    sizes = [(1, heads, length, dim) for heads in (8, 2, 2, 8)]
    *inputs, grad = (torch.randn(size, generator=generator, device="cuda").to(dtype) for size in sizes)
    kept = torch.rand(1, 8, blocks, blocks, generator=generator, device="cuda") < 0.3
    kept[..., 0] = True  # long lists, which are cut
    mask = BlockMask.from_dense(kept, length, length, block, block)

    def run(inputs: list[Tensor], backend: str) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = block_sparse_attention(*leaves, mask, is_causal=is_causal, backend=backend, strict=True)
        return out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))

    expected, results = run([x.float() for x in inputs], "reference"), [run(inputs, "triton")]
    torch.cuda.set_sync_debug_mode("error")
    try:
        results += [run(inputs, "triton") for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))
    for mine, truth in zip(results[0], expected, strict=True):
        assert (mine.float() - truth).abs().mean() / truth.abs().mean() <= LIMITS[dtype]


@pytest.mark.gpu
def test_memory_and_time_are_by_tokens_and_blocks() -> None:
    """Scores of 32,768 tokens would take 8 GiB a head; few blocks take far less time than all of them."""
    length = 32768
    inputs = [torch.randn(1, heads, length, 128, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2)]
    leaves = [x.requires_grad_() for x in inputs]
    times = []
    for selector in (Streaming(128, 1024), Dense()):
        mask = selector.select(*inputs[:2], is_causal=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(4):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            out = block_sparse_attention(*leaves, mask, is_causal=True)
            torch.autograd.grad(out, leaves, torch.ones_like(out))
            end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
        assert torch.cuda.max_memory_allocated() - before < 1 << 30
    assert times[0] < times[1] / 4
