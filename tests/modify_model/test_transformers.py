"""Any model of transformers: exact when every block is kept, sparse where its attention allows, whatever the cache."""

from __future__ import annotations

import functools

import pytest
import tiny_transformers
import torch
from tiny_transformers import MODELS
from transformers import DynamicCache

from autotune.module import sparse_modules
from modify_model import patch, restore
from spas_attn.selectors import MeanSimilarity

pytestmark = [
    pytest.mark.filterwarnings("ignore:spas_attn. running exact dense:RuntimeWarning"),
    pytest.mark.usefixtures("no_grad"),
]

LENGTH = 250  # four blocks of 64
NEW = 4  # generated tokens


class OffloadedCache(DynamicCache):
    """transformers' offloaded cache needs CUDA streams; what this one returns is not what it holds either."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys.clone(), values.clone()


# Arguments of generate; None: one forward without a cache.
CASES = {
    "prefill": None,
    "left padding": {},
    "decode": {},
    "static": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 90},
    "offloaded": {"past_key_values": OffloadedCache},
    "beams": {"num_beams": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}
MATRIX = [(name, case) for name in MODELS for case in CASES if case not in MODELS[name].without]

make = functools.cache(tiny_transformers.make)  # restored after each test


@functools.cache
def prompt(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their mask; a text that repeats itself, so that prompt lookup finds something."""
    rows = 2 if case == "left padding" else 1
    ids = torch.randint(3, 100, (rows, LENGTH // 2), generator=torch.Generator().manual_seed(1)).repeat(1, 2)
    mask = torch.ones_like(ids)
    mask[1:, :70] = 0
    return ids * mask, mask


def run(model, case):
    """New tokens, and the logits of all positions that are no padding (of the new tokens only, when generating)."""
    ids, mask = prompt(case)
    arguments = CASES[case]
    if arguments is None:
        logits = model(ids, use_cache=False).logits
        return logits[:, -1].argmax(-1), logits
    arguments = {name: value(config=model.config) if isinstance(value, type) else value
                 for name, value in arguments.items()}  # fmt: skip
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True,
        output_logits=True, **arguments,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


def patched(model, threshold):
    """The model with a selector of 64 x 64 blocks at this threshold, and its layers."""
    selector = MeanSimilarity(threshold, block_q=64, block_k=64, pool=8, local=0)
    inner = list(sparse_modules(patch(model, selector=selector, calibrated=False)).values())
    for module in inner:
        module.record_density, module.last_density = True, None
    return inner


@pytest.mark.parametrize(("name", "case"), MATRIX)
def test_every_model_and_cache(name, case, fallbacks, assert_close):
    row, model = MODELS[name], make(name)
    expected, logits = run(model, case)
    reason = row.dense or row.dense_when.get(case, "")
    try:
        inner = patched(model, 1.0)
        got, kept = run(model, case)
        assert torch.equal(got, expected)
        assert_close(kept, logits)
        inner = patched(model, 0.3)
        _, sparse = run(model, case)
    finally:
        restore(model)
    assert len(inner) == row.layers and torch.isfinite(sparse).all()
    dense = [module for module in inner if module.last_density is None]
    assert set(fallbacks()) == ({reason} if reason else set()), "what runs dense is counted, and nothing else"
    if case != "chunked prefill":  # where the first chunks of a prompt may run sparse, and later ones not
        assert len(dense) == (0 if not reason else len(inner) if row.dense else 1)
    for module in inner:
        assert module in dense or float(module.last_density.mean()) < 0.9
    assert row.dense or float((sparse[0] - logits[0]).norm() / logits[0].norm()) > 1e-3  # of the prompt
    assert torch.equal(run(model, case)[1], logits), "restored"
