"""A precision for every layer: the one of least time that holds the layer's bounds, measured in the check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_model import BOUNDS, PROMPTS, FakeModel, tune
from torch import Tensor

from autotune import accumulate, load, load_sparse_attention_state_dict
from autotune import layer as layer_module
from autotune.machine import Times
from spas_attn.call import Call

ALL = ("int8_fp8", "native", "int8_bf16")  # in any order


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """Relative error that each precision adds, by layer; 8 bits do not run on a CPU."""
    added = {"int8_bf16": [0.01, 0.01], "int8_fp8": [0.01, 0.01]}
    numbers: dict[tuple[float, ...], int] = {}

    def run(call: Call, mask: Any, precision: str, backend: str) -> Tensor:
        assert mask is not None
        whole, _ = accumulate.attend(call.replace(mask=mask, precision="native"), backend=backend)
        # Activations are seeded by prompt · 10 + layer; layers take turns.
        number = numbers.setdefault(
            tuple(call.k[0, 0, 0, :3].tolist()), len(numbers) % 2 if precision == "int8_bf16" else 0
        )
        sign = torch.where(torch.arange(whole.shape[-1]) % 2 == 0, 1.0, -1.0)
        return whole * (1 + sign * added[precision][number])

    monkeypatch.setattr(accumulate, "_in_precision", run)
    return added


def chosen(model: FakeModel, **options: Any) -> list[str]:
    tune(model, PROMPTS, precisions=ALL, **options)
    return [module.precision for module in model.inner]


@pytest.mark.usefixtures("errors")
def test_the_fewest_bits_that_hold_the_bounds_without_a_cost_model() -> None:
    assert chosen(FakeModel()) == ["int8_fp8", "int8_fp8"]


def test_a_layer_whose_bound_8_bits_miss_takes_more(errors: dict[str, list[float]], tmp_path: Path) -> None:
    errors["int8_fp8"], errors["int8_bf16"] = [0.5, 0.5], [0.01, 0.3]
    model = FakeModel()
    calibration = tune(model, PROMPTS, precisions=ALL)
    assert [module.precision for module in model.inner] == ["int8_bf16", "native"]
    assert [entry["precision"] for entry in calibration.statistics] == ["int8_bf16", "native"]
    first, second = ([head for head in entry["heads"] if head["is_sparse"]] for entry in calibration.statistics)
    assert all(head["l1_total"] != head["l1_selection"] and head["l1_total"] <= BOUNDS["pv_l1"] for head in first)
    assert all(head["l1_total"] < 0.3 for head in second)
    path = tmp_path / "tuned.pt"
    calibration.save(path, page=False)
    info = load(path)["_metadata"]
    assert info["format"] == 3, "a reader that passed over the layers' precisions would break their bounds"
    assert list(info["layer_precisions"].values()) == ["int8_bf16", "native"]
    other = FakeModel()
    load_sparse_attention_state_dict(other, path)
    assert [module.precision for module in other.inner] == ["int8_bf16", "native"]
    info["layer_precisions"] = {"layers.0.inner_attention": "int4"}
    with pytest.raises(ValueError, match="layer_precisions must be a dict of precisions by layer"):
        load_sparse_attention_state_dict(other, load(path) | {"_metadata": info})


@pytest.mark.usefixtures("errors")
def test_the_least_expected_time_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    took = {"native": 2.0, "int8_bf16": 1.0, "int8_fp8": 1.5}
    monkeypatch.setattr(layer_module, "times", lambda shape, device, precision, more: Times(9.0, 0.0, took[precision]))
    assert chosen(FakeModel()) == ["int8_bf16", "int8_bf16"]
    took["native"] = 0.5
    assert chosen(FakeModel()) == ["native", "native"]


def test_without_a_bound_quantisation_may_add_a_sixth(errors: dict[str, list[float]]) -> None:
    errors["int8_bf16"], errors["int8_fp8"] = [0.001, 0.001], [1.0, 1.0]
    budget: dict[str, Any] = dict(objective="budget", sparsity=0.2, l1=None, pv_l1=None, tail=None, sensitivity=0)
    assert chosen(FakeModel(), **budget) == ["int8_bf16", "int8_bf16"]
    errors["int8_bf16"] = [1.0, 1.0]
    assert chosen(FakeModel(), **budget) == ["native", "native"]


def test_a_precision_that_is_not_served_is_not_chosen() -> None:
    assert chosen(FakeModel()) == ["native", "native"]  # backend "cpu" has no 8 bits
    model = FakeModel()
    assert tune(model, PROMPTS[:3]).layers[0].precision is None and model.inner[0].precision == "native"


@pytest.mark.parametrize("value", ["native", [], ["auto"], ["native", "fp4"]])
def test_refusals(value: Any) -> None:
    with pytest.raises(ValueError, match="precisions must be a list of some of"):
        tune(FakeModel(), PROMPTS[:2], precisions=value)
