"""Which attention implementation is chosen, on made-up machines, and why not the others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import made_up_gpu
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spas_attn
from spas_attn import choose, cost_model
from spas_attn.candidates import PACKAGES, Machine
from spas_attn.choose import choose_attention, forget
from spas_attn.cost_model import Line
from spas_attn.features import Features

EVERY = frozenset(PACKAGES.values())
HOPPER = Machine("cuda", (9, 0), "NVIDIA H200", EVERY)
AMPERE = Machine("cuda", (8, 0), "NVIDIA A100", EVERY)
TURING = Machine("cuda", (7, 5), "Tesla T4", EVERY)
LONG = {"q_len": 65536, "kv_heads": 8}


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """No measurement but what a test writes; no decision of another test."""
    monkeypatch.setenv(cost_model.ENVIRONMENT, str(tmp_path / "cost_model.json"))
    empty = tmp_path / "none.json"
    cost_model.write((), empty)
    monkeypatch.setattr(cost_model, "PACKAGED", empty)
    forget()
    cost_model.forget()
    yield tmp_path / "cost_model.json"
    forget()
    cost_model.forget()


def without(*names: str, machine: Machine = HOPPER) -> Machine:
    return Machine(machine.type, machine.capability, machine.name, EVERY - {PACKAGES[name] for name in names})


@pytest.mark.parametrize(
    ("machine", "features", "expected"),
    [
        (HOPPER, LONG, "flash_attention_4"),
        (without("flash_attention_4"), LONG, "flash_attention_3"),
        (without("flash_attention_4", "flash_attention_3"), LONG, "sdpa/cudnn"),
        (AMPERE, LONG, "flash_attention_3"),
        (without("flash_attention_3", machine=AMPERE), LONG, "flash_attention_2"),
        (without("flash_attention_3", "flash_attention_2", machine=AMPERE), LONG, "sdpa/flash"),
        (TURING, LONG, "sdpa/efficient"),
        (Machine("cpu"), {}, "sdpa/flash"),
        (Machine("mps"), {}, "sdpa/math"),
        (Machine("cuda", (9, 4), "AMD", EVERY, rocm=True), LONG, "flash_attention_2"),
        (HOPPER, {"q_len": 256}, "sdpa/cudnn"),  # short: SDPA starts faster
        (HOPPER, {"q_len": 1, "k_len": 4096}, "sdpa/cudnn"),
        (HOPPER, LONG | {"dtype": torch.float32}, "sdpa/efficient"),
        (HOPPER, LONG | {"mask": "additive"}, "sdpa/efficient"),
        (HOPPER, LONG | {"output_attentions": True}, "eager"),
        (HOPPER, LONG | {"softcap": True}, "flash_attention_4"),
        (Machine("cpu"), {"softcap": True}, "eager"),
        (without("flash_attention_4"), LONG | {"sinks": True}, "flash_attention_3"),
        (without("flash_attention_4", "flash_attention_3"), LONG | {"sinks": True}, "eager"),
        (HOPPER, LONG | {"position_bias": True}, "sdpa/efficient"),
        (HOPPER, LONG | {"dropout": True}, "flash_attention_2"),
        (HOPPER, LONG | {"backward": True, "deterministic": True}, "flash_attention_2"),
        (HOPPER, LONG | {"compile": True}, "flash_attention_3"),
        (HOPPER, LONG | {"compile": True, "mask": "padding"}, "sdpa/efficient"),
        (HOPPER, LONG | {"qk_dim": 192, "v_dim": 128}, "flash_attention_4"),
        (HOPPER, LONG | {"qk_dim": 96, "v_dim": 64}, "sdpa/efficient"),
        (HOPPER, LONG | {"qk_dim": 512, "v_dim": 512}, "sdpa/efficient"),
        (HOPPER, {"q_len": 256, "k_len": 512}, "flash_attention_2"),  # a chunk: SDPA's is_causal aligns elsewhere
        (HOPPER, {"q_len": 256, "window": 100}, "flash_attention_2"),
        (HOPPER, {"q_len": 256, "varlen": True}, "flash_attention_2"),
    ],
)
def test_exact_choices(machine: Machine, features: dict[str, Any], expected: str) -> None:
    choice = choose_attention(None, machine, features)
    assert choice.name == expected and choice.exact, str(choice)
    assert set(choice.declined) == set(choose.CANDIDATES) - {expected}
    assert choice.attn_implementation == expected.split("/")[0]
    assert (choice.sdpa_backend is None) == (not expected.startswith("sdpa"))


@pytest.mark.parametrize(
    ("machine", "features", "name", "why"),
    [
        (AMPERE, {}, "flash_attention_4", "needs compute capability 9.0, this GPU has 8.0"),
        (without("flash_attention_2"), {}, "flash_attention_2", "package flash_attn is not installed"),
        (HOPPER, {"dtype": torch.float32}, "flash_attention_3", "not in torch.float32"),
        (HOPPER, {"softcap": True}, "sdpa/math", "does not cap logits"),
        (HOPPER, {"q_len": 9, "k_len": 20}, "sdpa/cudnn", "aligns to the upper left"),
        (HOPPER, {"mask": "padding"}, "sdpa/flash", "takes no mask of tokens, needed for a padding mask"),
        (Machine("cpu"), {}, "flash_attention_2", "needs a CUDA GPU, not cpu"),
        (HOPPER, {}, "spas_attn", "allow="),
    ],
)
def test_reasons(machine: Machine, features: dict[str, Any], name: str, why: str) -> None:
    choice = choose_attention(None, machine, features)
    assert why in choice.declined[name]
    assert f"  not {name}: {choice.declined[name]}" in str(choice).splitlines()
    assert str(choice).startswith(f"attention {choice.name} on ")


def test_sparse_where_it_is_allowed_and_faster(tables: Path) -> None:
    # Per thousand million pairs: SDPA 10, flash-attn-4 8, sparse 12 x density; selection costs nothing.
    row = made_up_gpu.row(
        device="NVIDIA H200", capability=(9, 0), is_causal=True, select=Line(0.0, 0.0, 0.0),
        dense={"sdpa": Line(0.0, 0.0, 10.0), "flash": Line(0.0, 0.0, 8.0)},
        sparse={"triton/native": Line(0.0, 0.0, 12.0), "triton/int8_fp8": Line(0.0, 0.0, 6.0)},
    )  # fmt: skip
    cost_model.write((row,), tables)
    long = {"q_len": 65536, "kv_heads": 8}
    dense = choose_attention(None, HOPPER, long)
    assert dense.name == "flash_attention_4" and "the fastest measured" in dense.reason
    sparse = choose_attention(None, HOPPER, long, allow=("sparse",))
    assert (sparse.name, sparse.precision, sparse.exact) == ("spas_attn", "native", False)
    kept = choose_attention(None, HOPPER, long | {"density": 0.9}, allow=("sparse",))
    assert kept.name == "flash_attention_4" and kept.declined["spas_attn"].startswith("it is not faster: ")
    quantised = choose_attention(None, HOPPER, long | {"density": 0.9}, allow=("quantised",))
    assert (quantised.name, quantised.precision) == ("spas_attn", "int8_fp8")
    both = choose_attention(None, HOPPER, long | {"softcap": True}, allow=("sparse", "quantised"))
    assert both.name == "flash_attention_4" and both.declined["spas_attn"] == "it does not cap logits"


def test_sparse_without_measurements() -> None:
    assert choose_attention(None, AMPERE, {"q_len": 32768}, allow=("sparse",)).name == "spas_attn"
    short = choose_attention(None, AMPERE, {"q_len": 8192}, allow=("sparse",))
    assert short.name != "spas_attn" and "no gain is expected" in short.declined["spas_attn"]
    quantised = choose_attention(None, AMPERE, {"q_len": 32768}, allow=("quantised",))
    assert "nothing is measured" in quantised.declined["spas_attn"]


def config(**changes: Any) -> SimpleNamespace:
    usual = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 1024, "dtype": torch.float16}
    return SimpleNamespace(**(usual | changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"heads": 8, "kv_heads": 2, "qk_dim": 128, "v_dim": 128, "dtype": torch.float16, "mask": "causal"}),
        ({"head_dim": 256, "attn_logit_softcapping": 50.0}, {"qk_dim": 256, "softcap": True}),
        ({"sliding_window": 4096}, {"window": 4096}),
        ({"sliding_window": 4096, "use_sliding_window": False}, {"window": None}),
        ({"model_type": "gpt_oss"}, {"sinks": True}),
        ({"attention_chunk_size": 8192}, {"mask": "full"}),
        ({"relative_attention_num_buckets": 32}, {"position_bias": True}),
        ({"qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}, {"qk_dim": 192, "v_dim": 128}),
        ({"text_config": config(num_attention_heads=4)}, {"heads": 4}),
    ],
)
def test_features_of_a_config(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    found = choose_attention(config(**changes), HOPPER).features
    assert {name: getattr(found, name) for name in expected} == expected


class Model(nn.Module):
    """Like a model of transformers."""

    _supports_sdpa, _supports_flash_attn, _supports_attention_backend = True, True, True
    _compatible_flash_implementations: list[str] | None = None

    def __init__(self, **vetoes: Any) -> None:
        super().__init__()
        self.config = config()
        self.sinks = nn.Parameter(torch.zeros(8, dtype=torch.bfloat16)) if vetoes.pop("with_sinks", False) else None
        self.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
        vars(self).update(vetoes)


def test_vetoes_of_a_model() -> None:
    assert choose_attention(Model(), HOPPER, LONG).name == "flash_attention_4"
    none = choose_attention(Model(_supports_flash_attn=False, _supports_sdpa=False), HOPPER, LONG)
    assert none.name == "eager" and "Model._supports_sdpa is False" in none.declined["sdpa/cudnn"]
    assert "Model._supports_flash_attn is False" in none.declined["flash_attention_4"]
    only = choose_attention(Model(_compatible_flash_implementations=["flash_attention_3"]), HOPPER, LONG)
    assert only.name == "flash_attention_3" and "flash_attention_3 only" in only.declined["flash_attention_4"]
    old = choose_attention(Model(_supports_attention_backend=False), HOPPER, LONG, allow=("sparse",))
    assert "AttentionInterface" in old.declined["spas_attn"]
    assert choose_attention(Model(with_sinks=True), HOPPER).features.sinks
    assert choose_attention(Model(), HOPPER).features.dtype == torch.bfloat16  # the weights', not the config's


def test_a_model_of_transformers() -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    small = GptOssConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    choice = choose_attention(GptOssForCausalLM(small), "cpu")
    assert choice.name == "eager" and choice.features.sinks
    assert "_supports_sdpa is False" in choice.declined["sdpa/math"]


def test_the_choice_is_tried_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once per signature; what fails, or gives NaN, is passed over, with its reason."""
    calls: list[torch.Size] = []
    attend = F.scaled_dot_product_attention

    def watched(q: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        calls.append(q.shape)
        out = attend(q, *args, **options)
        if len(calls) == 1:
            raise RuntimeError("no kernel\nhere")
        return out * torch.nan if len(calls) == 2 else out

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    features = {"q_len": 300, "heads": 4, "kv_heads": 2, "qk_dim": 32, "v_dim": 32, "dtype": torch.float32}
    choice = choose_attention(None, "cpu", features)
    assert choice.name == "eager" and calls == [(1, 2, 256, 32)] * 2
    assert choice.declined["sdpa/flash"] == "a small call on this device failed: no kernel here"
    assert "not finite" in choice.declined["sdpa/math"]
    assert choose_attention(None, "cpu", features) is choice and len(calls) == 2
    forget()
    assert choose_attention(None, "cpu", features).name == "sdpa/flash" and len(calls) == 3
    assert not choose_attention(None, "cpu", features, probe=False).probed and len(calls) == 3


@pytest.mark.parametrize("features", [{}, {"backward": True}, {"mask": "padding"}, {"q_len": 1, "k_len": 300}])
def test_real_calls_on_this_cpu(features: dict[str, Any]) -> None:
    choice = spas_attn.choose_attention(None, "cpu", features)
    assert choice.name == "sdpa/flash" and choice.probed and "a small call ran" in str(choice)
    sparse = choose_attention(None, "cpu", {"q_len": 20000, "kv_heads": 8}, allow=("sparse",))
    assert sparse.name == "spas_attn" and sparse.probed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": {"len": 3}}, r"fields of Features, got \['len'\]"),
        ({"features": {"mask": "triangle"}}, "mask must be one of"),
        ({"features": {"q_len": 0}}, "q_len must be a positive"),
        ({"features": {"heads": 8, "kv_heads": 3}}, "multiple of kv_heads"),
        ({"features": {"q_len": 8, "k_len": 4}}, "k_len must be at least"),
        ({"features": {"density": 0.0}}, "density must be in"),
        ({"allow": ("fast",)}, "allow must hold some of"),
        ({"allow": "sparse"}, "allow must hold some of"),
        ({"model_or_config": SimpleNamespace()}, "must tell num_attention_heads"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_attention(device=HOPPER, **arguments)


def test_features_given_whole() -> None:
    given = Features(q_len=65536)
    assert choose_attention(config(), HOPPER, given).features is given
