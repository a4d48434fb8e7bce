"""One budget for real models: sensitivities do not depend on how the loop calls a language model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import autotune
from modify_model import patch

pytestmark = [pytest.mark.usefixtures("no_grad")]


def calibrated(model: Any, items: list[torch.Tensor], call: Any) -> autotune.Calibration:
    with autotune.calibrate(model, objective="budget", sparsity=0.1, query_blocks=4) as calibration:
        for ids in calibration.prompts(items):
            call(model, ids)
    return calibration


@pytest.mark.parametrize(
    "call",
    [
        lambda model, ids: model(input_ids=ids, labels=ids),  # a loss needs all logits
        lambda model, ids: model(ids, attention_mask=torch.ones_like(ids), logits_to_keep=1, use_cache=False),
        lambda model, ids: model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0),  # with a cache
        lambda model, ids: model.generate(ids, max_new_tokens=2, cache_implementation="static", do_sample=False,
                                          pad_token_id=0),
    ],
)  # fmt: skip
def test_sensitivities_of_a_language_model(call, make_llama, tokens):
    items = [tokens(1, 320), tokens(1, 384)[:, 5:], tokens(1, 330)[:, 1:]]
    plain = calibrated(patch(make_llama()), items, lambda model, ids: model(input_ids=ids, use_cache=False)).tradeoff
    model = patch(make_llama())
    found = calibrated(model, items, call).tradeoff
    assert found is not None and plain is not None and found.measure == plain.measure == "KL"
    for a, b in zip(found.layers, plain.layers, strict=True):
        assert a.sensitivity == pytest.approx(b.sensitivity, rel=1e-3) and torch.equal(a.chosen, b.chosen)
    assert found.measured == pytest.approx(plain.measured, rel=1e-3) and found.measured > 0
    assert all(module.mode == "sparse" for module in autotune.module.sparse_modules(model).values())
