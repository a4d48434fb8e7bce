"""Every selector is calibrated in a model, saved and loaded; the table is tests/spas_attn/every_selector.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from every_selector import every
from torch import Tensor

from autotune import calibrate, load_sparse_attention_state_dict
from autotune.module import sparse_modules
from modify_model import patch
from modify_model.cli import tiny
from spas_attn.selectors import Dense, Selector


def ids(seed: int, length: int = 400) -> Tensor:
    return torch.randint(3, 250, (1, length), generator=torch.Generator().manual_seed(seed))


def fields(selector: Selector) -> dict[str, Any]:
    """Everything but the thresholds, which the layers of a model have."""
    return {name: x for name, x in selector.to_dict().items() if name not in (selector.tuned, "sim_threshold")}


@every
@torch.no_grad()
def test_is_calibrated_saved_and_loaded_in_a_model(selector: Selector, tmp_path: Path) -> None:
    model = patch(tiny.llama(), l1=0.9, pv_l1=0.95, tail=None, selector=selector)
    with calibrate(model, query_blocks=3, rounds=1) as calibration:
        for seed in calibration.prompts(range(3)):
            model(ids(seed), use_cache=False)
    modules = list(sparse_modules(model).values())
    on = torch.cat([module.is_sparse for module in modules])
    assert bool(on.any()) is not isinstance(selector, Dense)
    tried = {round(1.0, 6), *(round(value, 6) for value in selector.candidates)}
    assert {round(float(x), 6) for module in modules for x in module.cdfthreshd} <= tried
    statistics = calibration.save(tmp_path / "tuned.pt")
    assert statistics.is_file()
    out = model(ids(9), use_cache=False).logits
    if selector.tuned and bool(on.any()):
        assert not torch.equal(out, tiny.llama()(ids(9), use_cache=False).logits)

    fresh = patch(tiny.llama())  # with another selector
    load_sparse_attention_state_dict(fresh, tmp_path / "tuned.pt")
    assert torch.equal(fresh(ids(9), use_cache=False).logits, out)
    loaded = next(iter(sparse_modules(fresh).values())).selector
    assert fields(loaded) == fields(selector)
