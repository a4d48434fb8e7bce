"""StreamingCache: decoding sees what prefill sees at the same position, and streaming heads hold no more than that."""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar

import pytest
import tiny_transformers
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaForCausalLM

from autotune import enable_tune_mode
from autotune.module import sparse_modules
from modify_model import StreamingCache, patch, restore, stream_heads
from modify_model.cli import tiny
from modify_model.streaming_layer import StreamingLayer
from spas_attn.selectors import ByHead, ExactKeys, MeanSimilarity, Streaming, TopK

pytestmark = pytest.mark.usefixtures("no_grad")

TABLE = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 1]])  # of layers with 4 KV heads, each of 2 query heads
LENGTH = 420


def make(sizes: tuple[int, int] = (64, 100), table: Tensor = TABLE, attention: str = "sdpa", **changes: Any) -> Any:
    """A model with streaming heads, whose full heads run dense."""
    model = tiny.llama(attention, num_hidden_layers=len(table), num_attention_heads=8, num_key_value_heads=4)
    patch(model, **changes)
    return stream_heads(model, table, sink_tokens=sizes[0], local_tokens=sizes[1])


def ids(length: int = LENGTH, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


def whole(model: Any, tokens: Tensor, **arguments: Any) -> Tensor:
    """Logits of one forward over everything, without a cache: ByHead's blocks at every position."""
    out: Tensor = model(tokens, use_cache=False, **arguments).logits
    return out


def fed(model: Any, tokens: Tensor, parts: list[int], cache: Any = None, mask: Tensor | None = None) -> Tensor:
    """Logits of parts one after the other, with a cache."""
    cache, out, end = cache or StreamingCache(model), [], 0
    for length in parts:
        end += length
        part = tokens[:, end - length : end]
        more = {} if mask is None else {"attention_mask": mask[:, :end]}
        out.append(model(part, past_key_values=cache, **more).logits)
    return torch.cat(out, 1)


def after(prompt: int, length: int = LENGTH, step: int = 1) -> list[int]:
    """A prompt, and then steps to the end."""
    rest = length - prompt
    return [prompt, *[step] * (rest // step), *([rest % step] if rest % step else [])]


SIZES: list[tuple[tuple[int, int], dict[str, Any]]] = [
    ((64, 100), {}),  # of tokens of sink and window, in the default blocks of 64
    ((20, 0), {"selector": MeanSimilarity(block_q=64, block_k=128, pool=16)}),
    ((0, 130), {"selector": TopK(0.5, block_q=128, block_k=64, sink=False)}),
    ((60, 64), {"selector": ExactKeys(block_q=128, block_k=128)}),
    ((0, 1), {}),
]


@pytest.mark.parametrize(("sizes", "changes"), SIZES)
def test_decoding_is_prefill(sizes: tuple[int, int], changes: dict[str, Any], assert_close: Any) -> None:
    model = make(sizes, **changes)
    expected = whole(model, ids())
    assert_close(fed(model, ids(), after(300)), expected)
    dense = tiny.llama(num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4)
    assert float((whole(dense, ids()) - expected).norm() / expected.norm()) > 0.01, "the window matters here"


@pytest.mark.parametrize("parts", [[64] * 6 + [36], after(128, step=128), after(90, step=90), after(5, step=37),
                                   [1, 63, 1, 130, 70, 2, 100, 53]], ids=str)  # fmt: skip
@pytest.mark.parametrize("sizes", [(64, 100), (130, 20)], ids=str)
def test_chunks_are_the_whole_prompt(parts: list[int], sizes: tuple[int, int], assert_close: Any) -> None:
    """From the first chunk on, whatever their lengths."""
    model = make(sizes, selector=ExactKeys(block_q=128, block_k=64))
    assert_close(fed(model, ids(), parts), whole(model, ids()))


@pytest.mark.parametrize("padding", [(0, 90), (0, 300), (10, 0), (130, 140), (0, 399)], ids=str)
@pytest.mark.parametrize(
    "parts", [after(400), [64, 200, 100, 30, 1, 1, 1, 20, 3], after(60, step=60)], ids=["", "x", "60"]
)
def test_left_padding(padding: tuple[int, int], parts: list[int], assert_close: Any) -> None:
    """The sink of a row begins at its own first token; rows of no token yet included."""
    model = make((64, 100))
    tokens, mask = ids(rows=2), torch.ones(2, LENGTH, dtype=torch.long)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    expected, got = whole(model, tokens, attention_mask=mask), fed(model, tokens, parts, mask=mask)
    for row, count in enumerate(padding):
        assert_close(got[row, count:], expected[row, count:])


def test_rows_of_a_padded_batch_hold_a_window_each() -> None:
    model = make((64, 100), table=torch.zeros(1, 4))
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :200] = 0
    cache = StreamingCache(model)
    fed(model, ids(rows=2), [LENGTH], cache, mask)
    assert layers(cache)[0].tail.length <= 128 + 100 + 64 + 64, "a sink that begins inside a block has two"


def layers(cache: StreamingCache) -> list[StreamingLayer]:
    return [layer for layer in cache.layers if isinstance(layer, StreamingLayer)]


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_memory_falls_by_the_share_of_streaming_heads(share: float) -> None:
    table = torch.ones(2, 4)
    table[:, : int(4 * share)] = 0
    model, length = make((64, 100), table=table), 3000
    cache, dense = StreamingCache(model), DynamicCache(config=model.config)
    for part in ids(length).split(1000, 1):
        model(part, past_key_values=cache)
    restore(model)
    model(ids(length), past_key_values=dense)
    full = sum(layer.keys.nbytes + layer.values.nbytes for layer in dense.layers)
    room, held = 256 / length, (64 + 100 + 64 + 64) / length
    assert full * (1 - share) <= cache.nbytes <= full * ((1 - share) * (1 + room) + share * (held + room))
    for layer in layers(cache):
        assert (layer.full.length, layer.get_seq_length()) == (length, length)
        assert layer.tail.length == 64 + length - (length // 64 * 64 - 100 + 1) // 64 * 64
    assert cache.get_seq_length() == length
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0


GENERATE: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": dict(num_beams=3),
    "return several": dict(num_beams=2, num_return_sequences=2),
    "chunks": dict(prefill_chunk_size=100),
    "left padding": dict(attention_mask=torch.cat([torch.zeros(2, 70), torch.ones(2, 110)], 1).long()),
    "prompt lookup": dict(prompt_lookup_num_tokens=5),
}


@pytest.mark.parametrize("case", GENERATE)
def test_generate(case: str) -> None:
    """The tokens that generate finds without any cache, over more than one border between query blocks."""
    model, arguments = make(), dict(GENERATE[case], do_sample=False, max_new_tokens=30)
    prompt = ids(90, rows=2 if "padding" in case else 1).repeat(1, 2)  # prompt lookup finds something
    cache = StreamingCache(model)
    got = model.generate(prompt, past_key_values=cache, **arguments)
    without = {
        name: x for name, x in arguments.items() if name not in ("prefill_chunk_size", "prompt_lookup_num_tokens")
    }
    assert torch.equal(got, model.generate(prompt, use_cache=False, **without))
    assert cache.get_seq_length() in (209, 210)


def test_a_conversation_goes_on(assert_close: Any) -> None:
    model = make()
    cache = StreamingCache(model)
    model.generate(ids(150), past_key_values=cache, max_new_tokens=30, do_sample=False)
    seen = cache.get_seq_length()
    first = model.generate(ids(150), use_cache=False, max_new_tokens=30, do_sample=False)[:, :seen]
    more = ids(90, seed=1)
    got = model(more, past_key_values=cache).logits
    assert_close(got, whole(model, torch.cat([first, more], 1))[:, seen:])


def test_a_prompt_that_requests_share(assert_close: Any) -> None:
    """A copy of a cache has keys of its own; the model is the same."""
    model = make()
    cache = StreamingCache(model)
    fed(model, ids(), [300], cache)
    for seed in (1, 2):
        tokens = torch.cat([ids()[:, :300], ids(90, seed=seed)], 1)
        got = model(tokens[:, 300:], past_key_values=copy.deepcopy(cache)).logits
        assert_close(got, whole(model, tokens)[:, 300:])
    assert cache.get_seq_length() == 300


@pytest.mark.parametrize("name", ["Qwen3", "Qwen3-MoE", "Granite", "SmolLM3", "GLM-4", "Qwen2.5-VL"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_other_models(name: str, attention: str, assert_close: Any) -> None:
    model = patch(tiny_transformers.make(name, attention if name != "Qwen2.5-VL" else None))
    stream_heads(model, [[1.0, 0.0], [0.0, 1.0]], sink_tokens=64, local_tokens=64)
    tokens = ids(250) % 100 + 3
    mask = torch.ones_like(tokens)
    assert_close(fed(model, tokens, after(180, 250, 10), mask=mask), whole(model, tokens, attention_mask=mask))


def test_tuned_full_heads_are_sparse_in_chunks_too(assert_close: Any) -> None:
    selector = MeanSimilarity(0.5, block_q=64, block_k=64, pool=16)
    model = make(selector=selector, calibrated=False)
    parts = [64] * 6 + [36]
    got, expected = fed(model, ids(), parts), whole(model, ids())
    assert_close(got[:, :384], expected[:, :384])  # the last 36 are fewer than a block, which runs dense
    dense = make()
    assert float((whole(dense, ids()) - expected).norm() / expected.norm()) > 0.01
    inner = [module for module in sparse_modules(model).values() if isinstance(module.selector, ByHead)]
    assert all(isinstance(module.selector.rest, MeanSimilarity) for module in inner)  # type: ignore[attr-defined]


def test_few_operations_for_a_token() -> None:
    """Beside the layer's own: two products instead of one, heads taken apart and put together."""

    class Counted(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    model = make(table=TABLE[:1])
    cache = StreamingCache(model)
    fed(model, ids(), [418, 1], cache)
    with Counted() as counted:
        model(ids(1), past_key_values=cache)
    views = {"view", "slice", "alias", "transpose", "unsqueeze", "expand", "_unsafe_view", "t", "select", "detach"}
    ours = [name for name in counted.names if name not in views]
    restore(model)
    counted.names.clear()
    plain = DynamicCache(config=model.config)
    fed(model, ids(), [418, 1], plain)
    with Counted() as counted:
        counted.names.clear()
        model(ids(1), past_key_values=plain)
    assert len(ours) - len([name for name in counted.names if name not in views]) <= 6


def test_crop(assert_close: Any) -> None:
    model = make()
    expected = whole(model, ids())
    cache = StreamingCache(model)
    fed(model, ids(), [300], cache)
    cache.activate_past_recording()
    fed(model, ids(10, seed=1), [4, 6], cache)
    cache.crop(-10)
    assert_close(model(ids()[:, 300:340], past_key_values=cache).logits, expected[:, 300:340])
    cache.crop(-20)  # the window of the query block before is there as well
    assert cache.get_seq_length() == 320
    assert_close(model(ids()[:, 320:], past_key_values=cache).logits, expected[:, 320:])
    cache = StreamingCache(model)
    fed(model, ids(), [330], cache)
    cache.crop(-8)
    cache.crop(320)  # all but the first 320, as up to transformers 5.0
    assert_close(model(ids()[:, 320:], past_key_values=cache).logits, expected[:, 320:])
    with pytest.raises(ValueError, match=r"crop to 200 tokens goes back before .*activate_past_recording"):
        cache.crop(-220)


def test_rows_are_reordered_and_repeated(assert_close: Any) -> None:
    model, tokens = make(), ids(rows=2)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :70] = 0
    expected = whole(model, tokens, attention_mask=mask)[:, 400:]
    for change, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    ):
        cache = StreamingCache(model)
        fed(model, tokens, [400], cache, mask)
        change(cache)
        got = model(tokens[rows, 400:], past_key_values=cache, attention_mask=mask[rows]).logits
        assert_close(got, expected[rows])


@pytest.mark.filterwarnings("ignore:spas_attn. running exact dense:RuntimeWarning")
def test_an_attention_that_knows_no_streaming_heads_is_refused() -> None:
    """Instead of wrong results."""
    model = make()
    wrong = "a StreamingCache serves the model it was made for, patched and running sparse attention"
    for attention in ("sdpa", "eager"):
        cache = StreamingCache(model)
        other = tiny.llama(attention, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4)
        with pytest.raises(ValueError, match=wrong):
            other(ids(100), past_key_values=cache)
    cache = StreamingCache(model)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=wrong):
        model(ids(100), past_key_values=cache)
    with pytest.raises(ValueError, match="made for another model"):
        make()(ids(100), past_key_values=StreamingCache(make()))


@pytest.mark.filterwarnings("ignore:another selector")
def test_calls_that_it_cannot_serve() -> None:
    model = make()

    def refused(message: str, cache: StreamingCache | None = None, tokens: int = 100, **arguments: Any) -> None:
        with pytest.raises(ValueError, match=message):
            model(ids(tokens), past_key_values=cache or StreamingCache(model), **arguments)

    refused("4-D attention mask of its own", attention_mask=torch.ones(1, 1, 100, 100).tril().bool())
    refused("sequences are packed", position_ids=torch.arange(100)[None] % 60)
    model.train()
    refused("training mode")
    model.eval()
    with torch.enable_grad():
        refused("carries no gradients")
    for change in (
        lambda: stream_heads(model, TABLE, sink_tokens=64, local_tokens=64),
        lambda: patch(model, selector=MeanSimilarity()),
        lambda: enable_tune_mode(model, True),
    ):
        cache = StreamingCache(model)
        change()
        refused("heads or thresholds of the model were changed", cache)
        patch(restore(model))
        stream_heads(model, TABLE, sink_tokens=64, local_tokens=100)
    with pytest.raises(ValueError, match="offloading is not supported"):
        StreamingCache(model).offload(0)


def test_models_without_streaming_heads_are_refused() -> None:
    model = patch(tiny.llama())
    for prepared in (model, stream_heads(model, torch.ones(2, 2), sink_tokens=64, local_tokens=64)):
        with pytest.raises(ValueError, match="none of the 2 layers of LlamaForCausalLM has streaming heads"):
            StreamingCache(prepared)
    with pytest.raises(ValueError, match="patch it first"):
        StreamingCache(tiny.llama())
    flags = (True, False, True, False)
    mixed = patch(tiny.llama(), selector=ByHead(flags, Streaming(), TopK()), calibrated=False)
    with pytest.raises(ValueError, match="query heads of one KV head"):
        StreamingCache(mixed)
    sizes = Streaming(torch.tensor([64.0, 64, 128, 128]))
    mixed = patch(tiny.llama(), selector=ByHead((True, True, False, False), sizes, TopK()), calibrated=False)
    with pytest.raises(ValueError, match="sink_tokens must be one number for all heads"):
        StreamingCache(mixed)


def test_layers_with_a_sliding_window_keep_their_own_cache(assert_close: Any) -> None:
    model = patch(tiny_transformers.make("OLMo 3", "sdpa"))
    tokens = ids(250) % 100 + 3
    stream_heads(model, [[1.0, 1.0], [0.0, 1.0]], sink_tokens=64, local_tokens=64)
    # In prefill transformers' window is that of tokens, and so it is in decoding.
    assert_close(fed(model, tokens, after(180, 250, 10)), whole(model, tokens))
    stream_heads(model, [[0.0, 1.0], [0.0, 1.0]], sink_tokens=64, local_tokens=64)
    with pytest.raises(ValueError, match="layer 'model.layers.0.self_attn' .*DynamicSlidingWindowLayer"):
        StreamingCache(model)


def test_the_rule_in_tokens() -> None:
    """sink_end and window_start are what levels() keeps."""
    for sink, local, sizes in ((64, 100, (64, 64)), (1, 0, (128, 64)), (0, 129, (64, 128)), (200, 63, (128, 128))):
        rule = Streaming(sink, local, block_q=sizes[0], block_k=sizes[1], sink=sink == 1)
        kept = rule.select(torch.zeros(1, 1, 1000, 16), torch.zeros(1, 1, 1000, 16), is_causal=True).to_dense()[0, 0]
        for i, row in enumerate(kept):
            end = min(1000, (i + 1) * sizes[0])
            blocks = {
                j for j in range(math.ceil(end / sizes[1]))
                if j * sizes[1] < rule.sink_end() or j * sizes[1] >= rule.window_start(i * sizes[0])
            }  # fmt: skip
            assert set(row.nonzero()[:, 0].tolist()) == blocks


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str)
def test_on_a_gpu(dtype: torch.dtype, ratio: float, assert_close: Any) -> None:
    model, tokens = make().to("cuda", dtype), ids(rows=2).cuda()
    mask = torch.ones(2, LENGTH, dtype=torch.long, device="cuda")
    mask[1, :90] = 0
    expected = whole(model, tokens)
    assert_close(fed(model, tokens, after(380)), expected, ratio)
    assert_close(fed(model, tokens, after(90, step=90)), expected, ratio)
    got, expected = fed(model, tokens, after(400), mask=mask), whole(model, tokens, attention_mask=mask)
    for row, count in enumerate((0, 90)):
        assert_close(got[row, count:], expected[row, count:], ratio)


def test_a_pickled_or_copied_model_needs_a_new_cache() -> None:
    model = make()
    other: LlamaForCausalLM = copy.deepcopy(model)
    assert torch.equal(whole(other, ids(200)), whole(model, ids(200)))
    with pytest.raises(ValueError, match="made for another model"):
        other(ids(100), past_key_values=StreamingCache(model))
