"""Backend `flash`: how block masks are split for it, what it is called with (a stand-in for the package), refusals."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from cases import BF16, CASES, F32, HALF, Case
from made_up_gpu import FakeGpu, on_gpu
from torch import Tensor

from spas_attn import BlockMask, Call, backends
from spas_attn.backends import flash, reference, sdpa
from spas_attn.backends.block_lists import split_blocks
from spas_attn.block_mask import cdiv, visible_blocks
from spas_attn.metrics import relative_l1

MASKED = [case for case in CASES if case.density is not None]


@pytest.mark.parametrize("case", MASKED, ids=str)
def test_split_tells_full_from_partial_blocks(case: Case) -> None:
    """Against the definition: a full block is one whose tokens all queries of the block see."""
    mask = case.call().mask
    assert mask is not None
    lists = split_blocks(mask, case.is_causal)
    everywhere = dataclasses.replace(case, window=None, padding=None, density=None, dtype=F32).call()
    seen = everywhere.token_mask(0, case.q_len)
    tokens = torch.ones(1, 1, case.q_len, case.k_len, dtype=torch.bool) if seen is None else seen
    kept = mask.to_dense()
    visible = visible_blocks(case.q_len, case.k_len, mask.block_q, mask.block_k, is_causal=case.is_causal)
    for i in range(kept.shape[2]):
        rows = tokens[0, 0, i * mask.block_q : (i + 1) * mask.block_q]
        full = [
            (j + 1) * mask.block_k <= case.k_len and bool(rows[:, j * mask.block_k : (j + 1) * mask.block_k].all())
            for j in range(kept.shape[3])
        ]
        for b in range(kept.shape[0]):
            for h in range(kept.shape[1]):
                wanted = (kept[b, h, i] & visible[i]).nonzero()[:, 0].tolist()
                counts = int(lists.full_counts[b, h, i]), int(lists.partial_counts[b, h, i])
                assert counts[1] <= lists.partial_indices.shape[-1]
                assert lists.full_indices[b, h, i, : counts[0]].tolist() == [j for j in wanted if full[j]]
                assert lists.partial_indices[b, h, i, : counts[1]].tolist() == [j for j in wanted if not full[j]]
    assert lists.partial_indices.max() < cdiv(case.k_len, mask.block_k), "filler has to be a block that exists"


def test_split_ignores_filler() -> None:
    """Behind its count a row holds anything, small numbers too."""
    indices = torch.tensor([[[[0, 0, 0], [1, 0, 0]]]], dtype=torch.int32)
    mask = BlockMask(torch.ones(1, 1, 2, dtype=torch.int32), indices, 64, 64, 128, 192)
    lists = split_blocks(mask, is_causal=True)
    assert lists.full_counts.tolist() == [[[1, 1]]]
    assert lists.partial_counts.tolist() == [[[0, 0]]]


@pytest.mark.parametrize("is_causal", [False, True])
def test_split_reads_nothing_on_the_host(is_causal: bool) -> None:
    mask = Case(300, 500, is_causal=is_causal).call().mask
    assert mask is not None
    lists = split_blocks(mask.to("meta"), is_causal)  # a tensor without content cannot be read
    assert all(getattr(lists, field.name).dtype == torch.int32 for field in dataclasses.fields(lists))


class BlockSparse(NamedTuple):
    """As in flash-attn-4 4.0.0b36."""

    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor | None = None
    full_block_idx: Tensor | None = None
    cu_total_m_blocks: Tensor | None = None
    cu_block_idx_offsets: Tensor | None = None
    block_size: tuple[int, int] | None = None


def listed(counts: Tensor, indices: Tensor, nk: int) -> Tensor:
    """bool ``[B, H, nq, nk]`` from one pair of lists."""
    kept = torch.zeros(*counts.shape, nk, dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
        kept[b, h, i, indices[b, h, i, : counts[b, h, i]].long()] = True
    return kept


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A module that computes as the package does on Blackwell: no causal mask in full blocks. Yields what it got."""
    seen: list[dict[str, Any]] = []

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        block_sparse_tensors: BlockSparse | None = None,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        seen.append({"causal": causal, "scale": softmax_scale, "lists": block_sparse_tensors, "shape": q.shape})
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        assert softmax_scale is not None
        call = Call(q, k, v, is_causal=causal, scale=softmax_scale)
        if block_sparse_tensors is None:
            return sdpa.run(call).transpose(1, 2).contiguous(), None
        lists, q_len, k_len = block_sparse_tensors, q.shape[2], k.shape[2]
        assert lists.block_size is not None
        assert lists.full_block_cnt is not None
        assert lists.full_block_idx is not None
        for x in lists[:4]:
            assert x is not None
            assert x.dtype == torch.int32
            assert x.is_contiguous()
        nq, nk = cdiv(q_len, lists.block_size[0]), cdiv(k_len, lists.block_size[1])
        assert lists.full_block_cnt.shape == lists.mask_block_cnt.shape == (q.shape[0], q.shape[1], nq)
        assert max(lists.full_block_idx.shape[-1], lists.mask_block_idx.shape[-1]) <= nk

        def tokens(kept: Tensor) -> Tensor:
            rows = kept.repeat_interleave(lists.block_size[0], 2)[:, :, :q_len]  # type: ignore[index]
            return rows.repeat_interleave(lists.block_size[1], 3)[..., :k_len]  # type: ignore[index]

        visible = tokens(listed(lists.mask_block_cnt, lists.mask_block_idx, nk))
        hidden = call.token_mask(0, q_len)
        visible = visible if hidden is None else visible & hidden
        visible = visible | tokens(listed(lists.full_block_cnt, lists.full_block_idx, nk))
        out, lse = reference.run_with_lse(call.replace(is_causal=False, attn_mask=visible))
        return out.transpose(1, 2).contiguous(), lse if return_lse else None

    module: Any = ModuleType("flash_attn.cute.interface")
    module.flash_attn_func = flash_attn_func
    module.BlockSparseTensorsTorch = BlockSparse
    monkeypatch.setattr(flash, "_module", lambda: module)
    return seen


PLAIN = [case for case in MASKED if case.window is None and case.padding is None and case.dtype != F32]


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_equals_reference(case: Case, calls: list[dict[str, Any]]) -> None:
    call = case.call()
    out = flash.run(call)
    assert (out.shape, out.dtype) == (call.q.shape, call.q.dtype)
    assert relative_l1(out, reference.run(call)) < 0.003
    (got,) = calls
    assert (got["causal"], got["scale"]) == (case.is_causal, call.scale)
    assert got["lists"].block_size == (case.block_q, case.block_k)
    assert got["shape"] == (case.batch, case.q_len, case.heads, case.dim)


def test_tells_the_log_sum_exp(calls: list[dict[str, Any]]) -> None:
    call = Case(200, 300, dtype=BF16, heads=4, k_heads=2, is_causal=True).call()
    out, lse = backends.get("flash").compute_with_lse(call)
    assert torch.equal(out, flash.run(call))
    torch.testing.assert_close(lse, reference.run_with_lse(call)[1])


def test_dense_calls_carry_no_lists(calls: list[dict[str, Any]]) -> None:
    call = Case(200, 200, dtype=HALF, density=None, is_causal=True).call()
    assert relative_l1(flash.run(call), sdpa.run(call)) < 0.003
    assert calls[0]["lists"] is None


def test_without_causality_the_masks_own_lists_go_through(calls: list[dict[str, Any]]) -> None:
    call = Case(300, 500, dtype=BF16).call()
    assert call.mask is not None
    flash.run(call)
    lists = calls[0]["lists"]
    assert lists.full_block_cnt.data_ptr() == call.mask.counts.data_ptr()
    assert lists.full_block_idx.data_ptr() == call.mask.indices.data_ptr()
    assert not lists.mask_block_cnt.any()


@pytest.mark.parametrize("is_causal", [False, True])
def test_compiles_without_a_graph_break(is_causal: bool, calls: list[dict[str, Any]]) -> None:
    call = Case(200, 200, dtype=BF16, is_causal=is_causal).call()
    out = torch.compile(flash.run, fullgraph=True, backend="eager")(call)
    assert torch.equal(out, flash.run(call))


HOPPER, BLACKWELL = (9, 0), (10, 0)
REFUSED = [
    # compute capability, case, changes, words of the reason (None: served)
    (HOPPER, Case(300, 300, dtype=BF16, dim=128), {}, None),
    (HOPPER, Case(300, 300, dtype=HALF, dim=96, heads=4, k_heads=1, is_causal=True, block_q=64), {}, None),
    (HOPPER, Case(300, 300, dtype=HALF, dim=256, block_k=64), {}, None),
    (HOPPER, Case(300, 300, dtype=HALF, dim=256, density=None), {}, None),
    (HOPPER, Case(300, 300, dtype=HALF, dim=256), {}, "key blocks of 64"),
    (HOPPER, Case(300, 300, dtype=HALF, dim=100), {}, "multiple of 8, not 100"),
    (HOPPER, Case(300, 300, dtype=F32), {}, "float32"),
    (HOPPER, Case(300, 300, dtype=HALF, padding="left"), {}, "attention mask"),
    (HOPPER, Case(300, 300, dtype=HALF, is_causal=True, window=100), {}, "window"),
    (HOPPER, Case(300, 300, dtype=HALF), {"precision": "int8_bf16"}, "int8_bf16"),
    (BLACKWELL, Case(300, 300, dtype=HALF, dim=128), {}, "query blocks of 256, not 128"),
    (BLACKWELL, Case(100, 300, dtype=HALF, dim=128), {}, None),
    (BLACKWELL, Case(300, 300, dtype=HALF, dim=256), {}, None),
    (BLACKWELL, Case(300, 300, dtype=HALF, dim=192, density=None), {}, "up to 128, and 256, not 192"),
    (BLACKWELL, Case(300, 300, dtype=HALF, dim=128, density=None), {}, None),
    ((8, 9), Case(300, 300, dtype=HALF), {}, "not on capability 8.9"),
    ((12, 0), Case(300, 300, dtype=HALF), {}, "not on capability 12.0"),
]


@pytest.mark.parametrize(("capability", "case", "changes", "reason"), REFUSED, ids=str)
def test_refusals(
    capability: tuple[int, int], case: Case, changes: dict[str, object], reason: str | None, gpu_like: FakeGpu
) -> None:
    gpu_like.capability = capability
    declined = backends.get("flash").declines(on_gpu(case.call(**changes)))
    assert declined is None if reason is None else reason in str(declined)


def test_refuses_a_cpu() -> None:
    assert "cpu" in str(backends.get("flash").declines(Case(300, 300, dtype=HALF).call()))


def test_missing(gpu_like: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def problem() -> str | None:
        flash._import_problem.cache_clear()  # type: ignore[attr-defined]
        return backends.get("flash").missing()

    assert problem() == "no CUDA GPU"
    gpu_like.is_there = True
    monkeypatch.setattr(flash.importlib.util, "find_spec", lambda name: None)
    assert "pip install --pre flash-attn-4" in str(problem())
    monkeypatch.setattr(flash.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # version 2 alone, or a part of version 4 is absent
    flash._module.cache_clear()
    assert "cannot be imported" in str(problem())
    flash._import_problem.cache_clear()  # type: ignore[attr-defined]


def test_registered() -> None:
    assert backends.get("flash").run is flash.run
    assert not backends.get("flash").skips_pv


@pytest.mark.gpu
@pytest.mark.skipif("backends.get('flash').missing() is not None", reason="flash-attn-4 is not installed")
@pytest.mark.parametrize(
    "case",
    [
        *PLAIN,
        Case(2000, 2000, dim=128, dtype=BF16, density=None, is_causal=True),
        Case(4096, 4096, dim=128, dtype=BF16, heads=8, density=0.2),
        Case(4096, 4096, dim=128, dtype=BF16, heads=8, k_heads=2, density=0.2, is_causal=True),
        Case(2000, 4001, dim=64, dtype=BF16, heads=4, density=0.3, is_causal=True, batch=2, layout="NHD"),
        Case(2000, 2000, dim=96, dtype=BF16, density=0.3, block_q=64, block_k=64),
        Case(2000, 2000, dim=128, dtype=BF16, density=0.3, block_q=128, block_k=64, is_causal=True),
    ],
    ids=str,
)
def test_the_package_itself(case: Case) -> None:
    call = case.call(device="cuda")
    if (why := backends.get("flash").declines(call)) is not None:
        pytest.skip(f"declined: {why}")
    first, second = flash.run(call), flash.run(call)
    assert relative_l1(first, reference.run(call)) < 0.003
    assert torch.equal(first, second)
    torch.testing.assert_close(flash.run_with_lse(call)[1], reference.run_with_lse(call)[1], rtol=1e-3, atol=1e-3)
