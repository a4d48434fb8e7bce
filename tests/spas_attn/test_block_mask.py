"""BlockMask: its forms agree with each other, with brute force, and with FlexAttention."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spas_attn import BlockMask, Call, backends
from spas_attn.block_mask import cdiv, visible_blocks
from spas_attn.metrics import relative_l1
from spas_attn.selectors import MeanSimilarity, Streaming, Tokens, TopK

SIZES = st.sampled_from([64, 128])
LENGTHS = st.integers(1, 600)


def draw_grid(seed: int, q_len: int, k_len: int, block_q: int, block_k: int, batch: int = 2, heads: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(batch, heads, 1, 1, generator=generator)  # from nearly empty to nearly full
    return torch.rand(batch, heads, cdiv(q_len, block_q), cdiv(k_len, block_k), generator=generator) < share


def by_pairs(q_len: int, k_len: int, is_causal: bool, window: int | None) -> Tensor:
    """Visible (query, key) pairs, bool ``[Lq, Lk]``."""
    i, j = torch.arange(q_len)[:, None] + k_len - q_len, torch.arange(k_len)
    seen = torch.ones(q_len, k_len, dtype=torch.bool)
    if is_causal:
        seen = j <= i
        if window is not None:
            seen = seen & (j > i - window)
    return seen


def blocks_of(pairs: Tensor, block_q: int, block_k: int) -> Tensor:
    """Blocks with at least one True pair, block by block."""
    rows = [torch.stack([part.any() for part in strip.split(block_k, 1)]) for strip in pairs.split(block_q, 0)]
    return torch.stack(rows)


@given(LENGTHS, LENGTHS, SIZES, SIZES, st.integers(0, 1000))
def test_round_trip(q_len: int, k_len: int, block_q: int, block_k: int, seed: int) -> None:
    kept = draw_grid(seed, q_len, k_len, block_q, block_k)
    mask = BlockMask.from_dense(kept, q_len, k_len, block_q, block_k)
    assert torch.equal(mask.to_dense(), kept)
    assert mask.counts.dtype == mask.indices.dtype == torch.int32
    assert torch.equal(mask.counts, kept.sum(-1))
    for row, count, grid in zip(
        mask.indices.flatten(0, 2).tolist(), mask.counts.flatten().tolist(), kept.flatten(0, 2), strict=True
    ):
        assert row[:count] == grid.nonzero()[:, 0].tolist()  # kept blocks first, ascending
    again = BlockMask.from_dense(mask.to_dense(), q_len, k_len, block_q, block_k)
    assert torch.equal(again.indices, mask.indices)


@given(st.integers(0, 1000), st.integers(-5, 99))
def test_filler_is_never_read(seed: int, filler: int) -> None:
    """Kernels that build masks leave anything behind the counted indices."""
    kept = draw_grid(seed, 500, 600, 64, 128)
    mask = BlockMask.from_dense(kept, 500, 600, 64, 128)
    listed = torch.arange(mask.indices.shape[-1]) < mask.counts[..., None]
    mask = dataclasses.replace(mask, indices=mask.indices.masked_fill(~listed, filler))
    assert torch.equal(mask.to_dense(), kept)


@example(256, 256, 64, 64, True, 65)  # windows that begin where a block ends
@example(256, 256, 64, 64, True, 66)
@example(256, 320, 64, 64, True, 1)
@example(256, 320, 64, 64, True, 2)
@example(200, 300, 128, 64, True, 101)
@given(LENGTHS, LENGTHS, SIZES, SIZES, st.booleans(), st.none() | st.integers(1, 700))
def test_visible_blocks_by_brute_force(
    q_len: int, k_len: int, block_q: int, block_k: int, is_causal: bool, window: int | None
) -> None:
    q_len = min(q_len, k_len) if is_causal else q_len
    expected = blocks_of(by_pairs(q_len, k_len, is_causal, window), block_q, block_k)
    assert torch.equal(visible_blocks(q_len, k_len, block_q, block_k, is_causal=is_causal, window=window), expected)


@given(LENGTHS, LENGTHS, SIZES, SIZES, st.booleans(), st.none() | st.integers(1, 700), st.integers(0, 1000))
def test_density_by_brute_force(
    q_len: int, k_len: int, block_q: int, block_k: int, is_causal: bool, window: int | None, seed: int
) -> None:
    q_len = min(q_len, k_len) if is_causal else q_len
    window = window if is_causal else None
    kept = draw_grid(seed, q_len, k_len, block_q, block_k)
    possible = blocks_of(by_pairs(q_len, k_len, is_causal, window), block_q, block_k)
    density = BlockMask.from_dense(kept, q_len, k_len, block_q, block_k).density(is_causal, window)
    assert density.dtype == torch.float32
    for b in range(2):
        for h in range(3):
            expected = sum(bool(x) for x in (kept[b, h] & possible).flatten()) / int(possible.sum())
            assert float(density[b, h]) == pytest.approx(expected, abs=1e-6)
    full = BlockMask.from_dense(torch.ones_like(kept), q_len, k_len, block_q, block_k)
    assert (full.density(is_causal, window) == 1).all()


@given(LENGTHS, LENGTHS, SIZES, SIZES, st.integers(0, 1000), st.integers(0, 600), st.integers(0, 600))
def test_token_mask(q_len: int, k_len: int, block_q: int, block_k: int, seed: int, start: int, stop: int) -> None:
    kept = draw_grid(seed, q_len, k_len, block_q, block_k)
    mask = BlockMask.from_dense(kept, q_len, k_len, block_q, block_k)
    tokens = kept.repeat_interleave(block_q, 2)[:, :, :q_len].repeat_interleave(block_k, 3)[..., :k_len]
    assert torch.equal(mask.token_mask(), tokens)
    assert torch.equal(mask.token_mask(slice(start, stop)), tokens[:, :, start:stop])


SEQUENCES = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=4)


def pack(lengths: list[tuple[int, int]], block_q: int, block_k: int, seed: int) -> tuple[BlockMask, list[BlockMask]]:
    parts = [
        BlockMask.from_dense(draw_grid(seed + n, q, k, block_q, block_k, batch=1), q, k, block_q, block_k)
        for n, (q, k) in enumerate(lengths)
    ]
    cu_q, cu_k = (
        torch.tensor([0, *torch.tensor(column).cumsum(0).tolist()], dtype=torch.int32)
        for column in zip(*lengths, strict=True)
    )
    return BlockMask.pack(parts, cu_q, cu_k), parts


@given(SEQUENCES, SIZES, SIZES, st.integers(0, 1000))
def test_pack_and_split(lengths: list[tuple[int, int]], block_q: int, block_k: int, seed: int) -> None:
    packed, parts = pack(lengths, block_q, block_k, seed)
    assert (packed.q_len, packed.k_len) == tuple(sum(column) for column in zip(*lengths, strict=True))
    split = packed.split()
    assert len(split) == len(parts)
    for ours, part in zip(split, parts, strict=True):
        assert (ours.q_len, ours.k_len, ours.block_q, ours.block_k) == (part.q_len, part.k_len, block_q, block_k)
        assert torch.equal(ours.to_dense(), part.to_dense())
    # The density of the whole is that of all blocks taken together.
    kept = sum(part.to_dense().sum((-1, -2)) for part in parts)
    possible = sum(part.indices.shape[2] * part.indices.shape[3] for part in parts)
    assert torch.allclose(packed.density(), kept / possible)


def test_split_of_a_single_sequence_is_itself() -> None:
    mask = BlockMask.from_dense(draw_grid(0, 200, 200, 64, 64), 200, 200, 64, 64)
    assert mask.split() == [mask]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("block_q", "block_k"), [(128, 128), (64, 128)])
def test_flex_attention_computes_the_same(is_causal: bool, block_q: int, block_k: int) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    q_len, k_len = 200, 333
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, 3, n, 32, generator=generator) for n in (q_len, k_len, k_len))
    kept = draw_grid(1, q_len, k_len, block_q, block_k)
    kept[..., 0] = True
    mask = BlockMask.from_dense(kept, q_len, k_len, block_q, block_k)
    out = flex_attention(q, k, v, block_mask=mask.to_flex(is_causal))
    call = Call(q, k, v, is_causal=is_causal, scale=32**-0.5)
    expected = backends.get("reference").run(call.replace(mask=mask))
    dense = backends.get("reference").run(call)
    assert relative_l1(out, expected) < 1e-5
    assert relative_l1(dense, expected) > 0.05, "the mask makes no difference, so the comparison shows nothing"


def test_to_device_keeps_everything() -> None:
    packed, _ = pack([(100, 200), (70, 70)], 64, 64, 0)
    moved = packed.to("meta")
    for field in dataclasses.fields(BlockMask):
        ours, theirs = getattr(packed, field.name), getattr(moved, field.name)
        if isinstance(ours, Tensor):
            assert theirs.device.type == "meta"
            assert theirs.shape == ours.shape
        else:
            assert ours == theirs


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def own(counts: Tensor, indices: Tensor, **more: Any) -> BlockMask:
    """A mask of one's own over 200 x 300 tokens: two rows of three blocks."""
    sizes: dict[str, Any] = {"block_q": 128, "block_k": 128, "q_len": 200, "k_len": 300}
    return BlockMask(counts[None, None], indices[None, None], **sizes | more)


@pytest.mark.parametrize("filler", [-7, 0, 99])
def test_masks_of_ones_own(filler: int) -> None:
    mask = own(int32(1, 2), int32([2, filler, 0], [0, 2, filler]))
    assert mask.to_dense()[0, 0].tolist() == [[False, False, True], [True, False, True]]
    assert own(int32(0, 3), int32([filler] * 3, [0, 1, 2])).counts.tolist() == [[[0, 3]]]
    packed = own(int32(1, 1), int32([0, filler, 1], [1, filler, 1]), cu_seqlens_q=int32(0, 100, 200),
                 cu_seqlens_k=int32(0, 100, 300))  # fmt: skip
    assert [part.to_dense().flatten().tolist() for part in packed.split()] == [[True], [False, True]]


PACKED = {"cu_seqlens_q": int32(0, 100, 200), "cu_seqlens_k": int32(0, 100, 300)}


@pytest.mark.parametrize(
    ("counts", "indices", "more", "message"),
    [
        (int32(1, 4), int32([0, 1, 2], [0, 1, 2]), {}, r"counts must be in \[0, 3\].*got 1 to 4"),
        (int32(-1, 1), int32([0, 1, 2], [0, 1, 2]), {}, r"counts must be in \[0, 3\].*got -1 to 1"),
        (int32(1, 2), int32([0, 1, 2], [0, 3, 2]), {}, r"indices of kept blocks must be in \[0, 2\], got 3"),
        (int32(1, 2), int32([-1, 1, 2], [0, 1, 2]), {}, r"indices of kept blocks must be in \[0, 2\], got -1"),
        (int32(1, 2), int32([0, 1, 2], [1, 1, 2]), {}, r"must rise in every row, without duplicates, got \[1, 1, 2\]"),
        (int32(3, 1), int32([0, 2, 1], [1, 1, 1]), {}, r"must rise in every row, without duplicates, got \[0, 2, 1\]"),
        (int32(1, 1), int32([1, 0, 0], [0, 0, 0]), PACKED, r"indices of kept blocks must be in \[0, 0\], got 1"),
        (int32(1, 1), int32([0, 0, 0], [0, 0, 0]), PACKED | {"cu_seqlens_q": int32(0, 50, 100, 200)},
         "must have one length"),
        (int32(1, 1), int32([0, 0, 0], [0, 0, 0]), PACKED | {"cu_seqlens_q": int32(0, 9, 100)},
         "cu_seqlens_q must rise from 0 to q_len 200"),
        (int32(1, 1), int32([0, 0, 0], [0, 0, 0]), PACKED | {"cu_seqlens_q": int32(0, 20, 200)},
         r"3 rows of up to 2 blocks, but indices have \(2, 3\)"),
    ],
)  # fmt: skip
def test_contents_of_ones_own_masks_are_checked(
    counts: Tensor, indices: Tensor, more: dict[str, Any], message: str
) -> None:
    """Backends read different things out of such masks, kernels outside of memory."""
    with pytest.raises(ValueError, match=message):
        own(counts, indices, **more)


class NothingIsRead(TorchDispatchMode):
    """Fails when a tensor's content decides something on the host, which on a GPU would wait for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        assert not any(read in name for read in ("_local_scalar_dense", "nonzero", "unique")), name
        return func(*args, **(kwargs or {}))


def test_masks_of_the_library_are_not_read_on_the_host() -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NothingIsRead():
        own(int32(1, 1), int32([0, 0, 0], [0, 0, 0]))
    q, k = torch.randn(1, 2, 200, 32), torch.randn(1, 2, 300, 32)
    selectors = [MeanSimilarity(torch.full((2,), 0.5), 0.3), TopK(0.5) | Tokens(((0, 5),)), Streaming()]
    with NothingIsRead():
        mask = BlockMask.from_dense(torch.ones(1, 2, 2, 3, dtype=torch.bool), 200, 300)
        packed = BlockMask.pack([mask, mask], int32(0, 200, 400), int32(0, 300, 600))
        assert len([mask.to("cpu"), *packed.split()]) == 3
        call = Call.make(q, k, k, mask=mask)
        assert call.blocks == (128, 128)
        for selector in selectors:
            assert selector.mask_of(call).counts.shape == (1, 2, 2)


GRID = torch.ones(1, 1, 2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: BlockMask.from_dense(GRID, 200, 300, 32, 128),
            ValueError,
            r"block_q must be one of .*64, 128.*got 32",
        ),
        (lambda: BlockMask.from_dense(GRID, 200, 300, 128, 100), ValueError, "block_k must be one of .*got 100"),
        (
            lambda: BlockMask.from_dense(GRID, 300, 300),
            ValueError,
            r"300 x 300 in blocks of 128 x 128.*\(3, 3\).*\(2, 3\)",
        ),
        (lambda: BlockMask.from_dense(GRID.float(), 200, 300), TypeError, "kept must be a boolean .*float32"),
        (lambda: BlockMask.from_dense(GRID[0], 200, 300), TypeError, r"kept must be .*\(1, 2, 3\)"),
        (
            lambda: BlockMask(torch.ones(1, 1, 2), torch.zeros(1, 1, 2, 3, dtype=torch.int32), 128, 128, 200, 300),
            TypeError,
            "must be int32, got torch.float32",
        ),
        (
            lambda: BlockMask(
                torch.ones(1, 1, 3, dtype=torch.int32), torch.zeros(1, 1, 2, 3, dtype=torch.int32), 128, 128, 200, 300
            ),
            ValueError,
            r"counts must be \[B, H, nq\].*\(1, 1, 3\) and \(1, 1, 2, 3\)",
        ),
        (
            lambda: dataclasses.replace(
                BlockMask.from_dense(GRID, 200, 300), cu_seqlens_q=torch.tensor([0, 200], dtype=torch.int32)
            ),
            ValueError,
            "go together",
        ),
        (lambda: pack([(100, 200), (70, 70)], 64, 64, 0)[0].token_mask(), ValueError, "split"),
        (lambda: pack([(100, 200), (70, 70)], 64, 64, 0)[0].to_flex(), ValueError, "split"),
    ],
)
def test_errors(make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()  # type: ignore[operator]
