"""SparseLlamaAttention: exact before tuning, sparse in prefill, dense in decoding, with every cache and mask."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from modify_model import patch, restore, verify
from modify_model.modify_llama import enable_tune_mode

pytestmark = [
    pytest.mark.filterwarnings("ignore:spas_attn. running exact dense:RuntimeWarning"),
    pytest.mark.usefixtures("no_grad"),
]

LENGTH = 400  # four blocks of 128
NEW = 6  # generated tokens


class OffloadedCache(DynamicCache):
    """transformers' offloaded cache needs CUDA streams; this one keeps its tensors elsewhere in the same way, so that
    what ``update`` returns is not what the cache holds.
    """

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys.clone(), values.clone()


# name: (settings of the config, arguments of generate)
CACHES = {
    "dynamic": ({}, {}),
    "static": ({}, {"cache_implementation": "static"}),
    "sliding": ({"sliding_window": 160}, {}),
    "static sliding": ({"sliding_window": 160}, {"cache_implementation": "static"}),
    "chunked": ({}, {"prefill_chunk_size": 150, "past_key_values": DynamicCache}),
    "offloaded": ({}, {"past_key_values": OffloadedCache}),
    "beams": ({}, {"num_beams": 2}),
}


def generate(model, ids, mask=None, **arguments):
    """Greedy tokens, and the logits they came from."""
    arguments = {name: value() if isinstance(value, type) else value for name, value in arguments.items()}
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **arguments,
    )
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", CACHES)
def test_untuned_model_generates_the_same_tokens(make_llama, tokens, attention, cache, left_padded):
    config, arguments = CACHES[cache]
    model = make_llama(attention, **config)
    for ids, mask in ((tokens(1, LENGTH), None), left_padded(tokens(2, LENGTH))):
        restore(model)
        expected, logits = generate(model, ids, mask, **arguments)
        patch(model)
        got, patched_logits = generate(model, ids, mask, **arguments)
        assert torch.equal(got, expected)
        assert torch.equal(patched_logits, logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", CACHES)
def test_keeping_every_block_equals_dense(
    make_llama, tokens, set_sparse, fallbacks, attention, cache, left_padded, assert_close
):
    config, arguments = CACHES[cache]
    model = make_llama(attention, **config)
    for ids, mask in ((tokens(1, LENGTH), None), left_padded(tokens(2, LENGTH))):
        restore(model)
        expected, logits = generate(model, ids, mask, **arguments)
        inner = set_sparse(patch(model), cdf=1.0)
        got, sparse_logits = generate(model, ids, mask, **arguments)
        assert all(module.last_density is not None for module in inner)  # it did run
        assert torch.equal(got, expected)
        assert_close(sparse_logits, logits)
    assert fallbacks() == {}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", ["static", "sliding", "offloaded"])
def test_prefill_is_sparse_whatever_the_cache(make_llama, tokens, set_sparse, attention, cache, assert_close):
    config, arguments = CACHES[cache]
    model, ids = make_llama(attention, **config), tokens(1, LENGTH)
    dense = model(ids).logits
    inner = set_sparse(patch(model))
    alone = model(ids, use_cache=False).logits[:, -1]
    assert all(float(module.last_density.max()) < 1 for module in inner)
    assert (alone - dense[:, -1]).abs().max() > 1e-3
    cached = generate(model, ids, **arguments)[1][0]
    assert_close(cached, alone)


def test_chunked_prefill_is_sparse(make_llama, tokens, set_sparse):
    model = patch(make_llama())
    inner = set_sparse(model)
    generate(model, tokens(1, 3 * 128 + 1), prefill_chunk_size=128, past_key_values=DynamicCache)
    assert all(tuple(module.last_density.shape) == (1, 4) for module in inner)
    assert all(float(module.last_density.max()) < 1 for module in inner)  # the last chunk: 1 x 3 blocks


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_later_chunk_of_a_sliding_cache(
    make_llama, tokens, set_sparse, fallbacks, attention, left_padded, assert_close
):
    model = make_llama(attention, sliding_window=160)
    ids, mask = left_padded(tokens(2, LENGTH))

    def last_chunk():
        cache = DynamicCache(config=model.config)
        model(ids[:, :250], attention_mask=mask[:, :250], past_key_values=cache)
        # Its first key is token 91, still padding in the second row.
        return model(ids[:, 250:], attention_mask=mask, past_key_values=cache).logits

    expected = last_chunk()
    inner = set_sparse(patch(model), cdf=1.0)
    assert_close(last_chunk(), expected)
    assert all(module.last_density is not None for module in inner)
    assert fallbacks() == {}


def test_left_padded_batch_is_sparse(make_llama, tokens, set_sparse, left_padded, assert_close):
    model = patch(make_llama())
    inner = set_sparse(model)
    ids, mask = left_padded(tokens(2, 512), padding=(0, 256))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    assert all(float(module.last_density.max()) < 1 for module in inner)
    # The padding is a whole number of blocks, so the padded row has the blocks, and the output, of the row alone.
    alone = model(ids[1:, 256:]).logits
    assert_close(logits[1:, 256:], alone)


@pytest.mark.parametrize("make_cache", [DynamicCache, None], ids=["dynamic", "static"])
def test_decoding_is_dense_and_exact(make_llama, tokens, set_sparse, fallbacks, make_cache):
    model, ids = make_llama(), tokens(1, LENGTH)
    inner = set_sparse(patch(model))
    cache = make_cache() if make_cache else StaticCache(config=model.config, max_cache_len=LENGTH + 8)
    prefill = dict(cache_position=torch.arange(LENGTH)) if make_cache is None else {}
    model(ids, past_key_values=cache, **prefill)
    assert all(float(module.last_density.max()) < 1 for module in inner)
    for module in inner:
        module.last_density = None
    step = dict(cache_position=torch.tensor([LENGTH])) if make_cache is None else {}
    twin, token = copy.deepcopy(cache), tokens(1, 1)
    got = model(token, past_key_values=cache, **step).logits
    assert all(module.last_density is None for module in inner)
    assert torch.equal(got, restore(model)(token, past_key_values=twin, **step).logits)
    assert fallbacks() == {}


def test_kv_heads_are_not_repeated_and_static_slots_are_cropped(make_llama, tokens, set_sparse, sparse_calls):
    model = patch(make_llama(num_key_value_heads=1))
    set_sparse(model)
    generate(model, tokens(1, LENGTH), cache_implementation="static")
    assert len(sparse_calls) == 2
    for call, _ in sparse_calls:
        assert call.q.shape == (1, 4, LENGTH, 32) and call.k.shape == (1, 1, LENGTH, 32)
        assert call.attn_mask is None


def own_mask(ids):
    """Arguments of a forward with a 4-D mask of the caller's own, in both dialects."""
    length = ids.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril() & (torch.arange(length) % 7 != 3)
    seen |= torch.eye(length, dtype=torch.bool)
    return dict(attention_mask=torch.where(seen, 0.0, -1e9)[None, None])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("arguments", "reason"), [(own_mask, "4-D attention mask")])
def test_masks_that_have_no_sparse_form_run_dense(
    make_llama, tokens, set_sparse, fallbacks, attention, arguments, reason
):
    model, ids = make_llama(attention), tokens(1, LENGTH)
    expected = model(ids, **arguments(ids)).logits
    assert torch.equal(patch(model)(ids, **arguments(ids)).logits, expected)
    assert fallbacks() == {}  # nothing was asked of an untuned model
    inner = set_sparse(model)
    assert torch.equal(model(ids, **arguments(ids)).logits, expected)
    assert all(module.last_density is None for module in inner)
    assert [(reason in text, count) for text, count in fallbacks().items()] == [(True, 2)]  # two layers


def test_changed_attention_implementation_is_counted(make_llama, tokens, set_sparse, fallbacks):
    model, ids = make_llama(), tokens(1, LENGTH)
    set_sparse(patch(model))
    model.config._attn_implementation = "eager"
    logits = model(ids).logits
    assert any("patch it again" in text for text in fallbacks())
    assert not verify(model).ok
    assert torch.equal(restore(model)(ids).logits, logits)


def test_layer_called_without_its_model(make_llama, set_sparse, fallbacks):
    model = make_llama()
    x = torch.randn(1, LENGTH, 128)
    rope = model.model.rotary_emb(x, torch.arange(LENGTH)[None])
    expected = model.model.layers[0].self_attn(x, position_embeddings=rope, attention_mask=None)[0]
    set_sparse(patch(model))
    got = model.model.layers[0].self_attn(x, position_embeddings=rope, attention_mask=None)
    assert len(got) == 2 and torch.equal(got[0], expected)
    assert any("without the mask" in text for text in fallbacks())


def test_output_attentions_is_refused(make_llama, tokens):
    model = patch(make_llama("eager"))
    with pytest.raises(ValueError, match=r"output_attentions.*restore"):
        model(tokens(1, 8), output_attentions=True)
    model(tokens(1, 8), output_hidden_states=True)


def test_tune_mode_returns_the_dense_output(make_llama, tokens, set_sparse):
    model, ids = make_llama(), tokens(1, LENGTH)
    expected = model(ids).logits
    patch(model)
    enable_tune_mode(model, True)
    assert [row.status for row in verify(model).layers] == ["tune", "tune"]
    assert torch.equal(model(ids).logits, expected)
    enable_tune_mode(model, False)
    assert [row.status for row in verify(model).layers] == ["sparse", "sparse"]
