"""The tuned file: round trips, and every way in which a file can be wrong."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_model import HEADS, FakeModel, same, tuned_model
from torch import nn

from autotune import extract_sparse_attention_state_dict, load, load_sparse_attention_state_dict, save, state_dict
from autotune.module import BUFFERS, SparseAttention
from autotune.state_dict import is_verified

FIRST, SECOND = "layers.0.inner_attention", "layers.1.inner_attention"


@pytest.fixture
def state() -> dict[str, Any]:
    return extract_sparse_attention_state_dict(tuned_model(l1=0.03, pv_l1=0.05, tail=None, precision="int8_bf16"))


def untouched(model: FakeModel) -> bool:
    return all(module.mode == "dense" and module.is_sparse is None for module in model.inner)


def refused(state: Any, message: str, model: nn.Module | None = None) -> None:
    """Loading fails with the message and leaves the model as it was."""
    model = model or FakeModel()
    with pytest.raises(ValueError, match=message):
        load_sparse_attention_state_dict(model, state)
    assert untouched(model)


def with_heads(heads: int) -> FakeModel:
    model = FakeModel()
    for module in model.inner:
        module.set_heads(heads)
    return model


def test_round_trip(state: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "tuned.pt"
    save(state, path)
    assert [p.name for p in path.parent.iterdir()] == ["tuned.pt"]
    model = FakeModel()
    model.inner[0].selector.pool = 8
    assert load_sparse_attention_state_dict(model, path) is model
    for module, expected in zip(model.inner, tuned_model().inner, strict=True):
        assert same(module.thresholds(), expected.thresholds())
        assert module.mode == "sparse"
        assert (module.l1, module.pv_l1, module.tail, module.precision) == (0.03, 0.05, None, "int8_bf16")
        assert module.lengths == (400, 700)
        assert module.expected_density == expected.expected_density
        assert repr(module.selector) == repr(expected.selector)
    assert is_verified(load(path))
    again = extract_sparse_attention_state_dict(model)
    assert again["_metadata"] == state["_metadata"]
    assert all(torch.equal(again[key], state[key]) for key in state if key != "_metadata")


def test_contents(state: dict[str, Any]) -> None:
    assert set(state) == {"_metadata", *(f"{path}.{name}" for path in (FIRST, SECOND) for name in BUFFERS)}
    for path in (FIRST, SECOND):
        assert state[f"{path}.is_sparse"].dtype == torch.bool
        assert all(state[f"{path}.{name}"].dtype == torch.float32 for name in BUFFERS[1:])
        assert all(state[f"{path}.{name}"].shape == (HEADS,) for name in BUFFERS)
    info = state["_metadata"]
    assert info["format"] == 1 and info["model_class"] == "FakeModel" and info["selector"] == "MeanSimilarity"
    assert (info["block_q"], info["block_k"], info["pool"]) == (64, 64, 16)
    assert info["lengths"] == [400, 700] and info["mean_density"] == pytest.approx((0.5 + 0.625) / 2)
    assert "torch" in info["versions"] and len(info["date"]) == 10


def test_an_untuned_or_unpatched_model_has_nothing_to_extract() -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.inner_attention.*not tuned yet"):
        extract_sparse_attention_state_dict(FakeModel())
    with pytest.raises(ValueError, match="patch it first"):
        extract_sparse_attention_state_dict(nn.Linear(1, 1))


def test_missing_and_extra_layers(state: dict[str, Any]) -> None:
    refused(state, r"1 layers of the model are not in the file, first 'layers\.2\.inner", FakeModel(layers=3))
    refused(
        state, r"FakeModel.*1 layers of the file are not in the model, first 'layers\.1\.inner", FakeModel(layers=1)
    )
    renamed = {key.replace("layers.1", "layers.7"): value for key, value in state.items()}
    refused(renamed, r"layers\.1\.inner_attention.*layers\.7\.inner_attention")


def test_wrong_number_of_heads(state: dict[str, Any]) -> None:
    for heads in (2, 8):
        model = with_heads(heads)
        with pytest.raises(ValueError, match=rf"layers\.0\.inner_attention'.* 4 values, the model has {heads} heads"):
            load_sparse_attention_state_dict(model, state)
        assert all(module.mode == "dense" and not module.is_sparse.any() for module in model.inner)
    one = {key: value if key == "_metadata" else value[:1] for key, value in state.items()}
    with pytest.raises(ValueError, match="1 values, the model has 4 heads"):
        load_sparse_attention_state_dict(with_heads(4), one)
    refused(state | {f"{SECOND}.pvthreshd": torch.ones(3)}, r"layers\.1.*\[3, 4\] values")
    refused(state | {f"{SECOND}.pvthreshd": torch.ones(1, 4)}, r"layers\.1.*pvthreshd must be a tensor \[heads\]")


def test_values_that_cannot_be_meant(state: dict[str, Any]) -> None:
    refused(
        state | {f"{SECOND}.is_sparse": torch.tensor([0.0, 1.0, 0.5, 1.0])}, r"layers\.1.*is_sparse must be true or"
    )
    refused(state | {f"{SECOND}.is_sparse": torch.tensor([0, 1, 2, 1])}, r"layers\.1.*is_sparse must be true or false")
    refused(state | {f"{FIRST}.cdfthreshd": torch.tensor([0.5, 1.01, 1.0, 0.9])}, r"layers\.0.*cdfthreshd must be in")
    refused(state | {f"{FIRST}.cdfthreshd": torch.tensor([0.5, -0.1, 1.0, 0.9])}, r"layers\.0.*cdfthreshd must be in")
    refused(state | {f"{FIRST}.cdfthreshd": torch.ones(4, dtype=torch.complex64)}, r"layers\.0.*cdfthreshd must be a")
    model = with_heads(4)
    flags = torch.tensor([0.0, 1.0, 1.0, 0.0])
    load_sparse_attention_state_dict(model, state | {f"{SECOND}.is_sparse": flags})
    assert torch.equal(model.inner[1].is_sparse, flags.bool())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"l1": 0.5}, "bounds that make no sense.*pv_l1"),
        ({"tail": "high"}, "bounds that make no sense"),
        ({"lengths": [400]}, r"lengths must be two .*\[400\]"),
        ({"lengths": "all"}, "lengths must be two .*all"),
        ({"layer_density": {FIRST: 2.0}}, r"layer_density of 'layers\.0.*2\.0"),
        ({"layer_density": 0.5}, r"layer_density of"),
    ],
)
def test_metadata_that_cannot_be_meant(state: dict[str, Any], change: dict[str, Any], message: str) -> None:
    refused(state | {"_metadata": state["_metadata"] | change}, message)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", BUFFERS[1:])
def test_values_that_are_not_finite(state: dict[str, Any], name: str, value: float) -> None:
    state[f"{SECOND}.{name}"][3] = value
    refused(state, rf"layers\.1\.inner_attention': {name} holds values that are not finite")


@pytest.mark.parametrize("name", BUFFERS)
def test_a_missing_buffer_and_a_wrong_type(state: dict[str, Any], name: str) -> None:
    refused(state | {f"{SECOND}.{name}": 0.5}, rf"layers\.1.*{name} must be a tensor")
    del state[f"{SECOND}.{name}"]
    refused(state, rf"layers\.1\.inner_attention'.*lacks \['{name}'\]")


@pytest.mark.parametrize(
    "key", ["layers.0.inner_attention.l1", "layers.0.attention.is_sparse", "is_sparse", "layers.0.weight", 3]
)
def test_unknown_entries(state: dict[str, Any], key: Any) -> None:
    refused(state | {key: torch.ones(4)}, f"unknown entry {key!r}")


def test_empty() -> None:
    refused({}, r"2 layers of the model are not in the file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2, this version reads format 1"),
        ({"format": None}, "has format None"),
        ({"selector": "Astrology"}, "selector 'Astrology'"),
        ({"pool": 48}, "pool must be a divisor"),
        ({"block_k": 96}, "block_k must be one of"),
    ],
)
def test_metadata_of_another_kind(state: dict[str, Any], change: dict[str, Any], message: str) -> None:
    refused(state | {"_metadata": state["_metadata"] | change}, message)


def test_files_of_another_family(state: dict[str, Any]) -> None:
    """Layers of two families may have the same paths and as many heads."""
    assert state["_metadata"]["family"] is None  # not installed by an adapter
    state["_metadata"]["family"] = "Flux"
    model = FakeModel()
    load_sparse_attention_state_dict(model, state)
    for module in model.inner:
        module.family = "Flux"
    assert extract_sparse_attention_state_dict(load_sparse_attention_state_dict(model, state))["_metadata"]["family"]
    other = FakeModel()
    for module in other.inner:
        module.family = "Wan"
    refused(state, r"was made for Flux \(FakeModel\), and FakeModel belongs to the family Wan", other)


def test_files_of_another_head_dim(state: dict[str, Any]) -> None:
    """Models of two sizes may have as many layers and heads."""
    assert state["_metadata"]["head_dim"] is None  # not installed by an adapter
    model = FakeModel()
    for dims, recorded in (((64, 128), None), ((64, 64), 64)):
        for module, dim in zip(model.inner, dims, strict=True):
            module.head_dim = dim
        load_sparse_attention_state_dict(model, state)  # one file and one model that do not say
        assert extract_sparse_attention_state_dict(model)["_metadata"]["head_dim"] == recorded
    state = extract_sparse_attention_state_dict(model)
    load_sparse_attention_state_dict(FakeModel(), state)
    other = FakeModel()
    for module in other.inner:
        module.head_dim = 128
    refused(state, r"made for head dim 64 \(FakeModel\), and FakeModel has 128", other)
    refused(state | {"_metadata": state["_metadata"] | {"head_dim": "64"}}, "head_dim must be a number or None")
    del state["_metadata"]["head_dim"]  # a file from before
    load_sparse_attention_state_dict(other, state)


def test_text_sink_belongs_to_the_file(state: dict[str, Any]) -> None:
    model = FakeModel()
    for text_sink in (False, True):
        state["_metadata"]["text_sink"] = text_sink
        load_sparse_attention_state_dict(model, state)
        assert [module.text_sink for module in model.inner] == [text_sink, text_sink]
    del state["_metadata"]["text_sink"]  # a file from before
    load_sparse_attention_state_dict(model, state)
    assert model.inner[0].text_sink


def test_dense_steps_of_a_file(state: dict[str, Any]) -> None:
    state["_metadata"]["dense_steps"] = [0.2, 0.1]
    for have, warns in ((None, True), ((0.2, 0.0), True), ((0.1, 0.3), True), ((0.2, 0.1), False), ((0.5, 0.2), False)):
        model = FakeModel()
        for module in model.inner:
            module.dense_steps = have
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load_sparse_attention_state_dict(model, state)
        assert [r"calibrated with dense_steps=(0.2, 0.1)" in str(w.message) for w in caught] == [True] * warns
    refused(state | {"_metadata": state["_metadata"] | {"dense_steps": "first"}}, "dense_steps must be two shares")


class Pipeline:
    """An object with transformers, as pipelines of diffusers are."""

    def __init__(self, **parts: nn.Module) -> None:
        vars(self).update(parts)


def test_pipelines(state: dict[str, Any], tmp_path: Path) -> None:
    pipe = Pipeline(transformer=tuned_model(), transformer_2=tuned_model())
    pipe.transformer_2.inner[0].cdfthreshd.fill_(0.123)  # type: ignore[attr-defined]
    both = extract_sparse_attention_state_dict(pipe)
    assert {key.rpartition(".")[0] for key in both if key != "_metadata"} == {
        FIRST, SECOND, f"transformer_2.{FIRST}", f"transformer_2.{SECOND}"
    }  # fmt: skip
    assert both["_metadata"]["model_class"] == "FakeModel"
    save(both, tmp_path / "tuned.pt")
    fresh = Pipeline(transformer=FakeModel(), transformer_2=FakeModel(), vae=nn.Linear(1, 1))
    assert load_sparse_attention_state_dict(fresh, tmp_path / "tuned.pt") is fresh
    parts = zip((fresh.transformer, fresh.transformer_2), (pipe.transformer, pipe.transformer_2), strict=True)  # type: ignore[attr-defined]
    for part, expected in parts:
        for module, other in zip(part.inner, expected.inner, strict=True):
            assert same(module.thresholds(), other.thresholds())
    refused(both, rf"2 layers of the file are not in the model, first 'transformer_2\.{FIRST}'")
    one = Pipeline(transformer=FakeModel())
    load_sparse_attention_state_dict(one, state)
    assert all(module.mode == "sparse" for module in one.transformer.inner)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"a pipeline with \.transformer, got Pipeline"):
        extract_sparse_attention_state_dict(Pipeline())


def test_damaged_metadata(state: dict[str, Any]) -> None:
    refused(state | {"_metadata": "by hand"}, "_metadata of the tuned file must be a dict, got str")
    refused(state | {"_metadata": {"format": 1, "selector": "MeanSimilarity"}}, r"lacks \['model_class', 'block_q'")


def test_block_sizes_of_our_files_cannot_be_overridden(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="records its own block sizes"):
        load_sparse_attention_state_dict(FakeModel(), state, block_k=64)


def test_truncated_files_at_any_length(state: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "tuned.pt"
    save(state, path)
    whole = path.read_bytes()
    for length in [0, 1, 2, 3, 10, 100, *range(200, len(whole), len(whole) // 20), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"tuned\.pt' is (truncated or )?not a tuned file"):
            load(path)
    refused(path, "truncated or not a tuned file")


FOREIGN = {
    "text": b"l1 = 0.06\n" * 30,
    "zeros": bytes(500),
    "every byte": bytes(range(256)) * 4,
    "json": b'{"a": 1}',
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(range(100)),
    "pickle with an odd stack": b"\x80\x02t.",
    "pickle that ends at once": b"\x80\x02.",
    "pickle of a number": pickle.dumps(3),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / "tuned.pt"
    path.write_bytes(FOREIGN[name])
    with pytest.raises(ValueError, match="not a tuned file"):
        load(path)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["EVIL_FOLDER"],)


@pytest.mark.parametrize("how", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_a_file_runs_no_code(how: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVIL_FOLDER", str(tmp_path / "evil"))
    path = tmp_path / "tuned.pt"
    how({f"{FIRST}.is_sparse": Evil()}, path)
    with pytest.raises(ValueError, match="not a tuned file"):
        load(path)
    assert not (tmp_path / "evil").exists()


def test_other_torch_files_and_no_file(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    for content in ({}, {"weight": torch.ones(3)}, [1, 2], torch.ones(3), {3: torch.ones(3)}):
        torch.save(content, path)
        with pytest.raises(ValueError, match="holds no '<layer>.is_sparse' entries"):
            load(path)
    with pytest.raises(FileNotFoundError, match="no tuned file at"):
        load(tmp_path / "absent.pt")
    with pytest.raises(FileNotFoundError):
        load(tmp_path)


def test_a_failed_save_leaves_the_old_file(
    state: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tuned.pt"
    save(state, path)
    before = path.read_bytes()

    def fail(content: Any, file: Path) -> None:
        Path(file).write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(state_dict.torch, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        save(state | {"more": torch.ones(3)}, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["tuned.pt"]


# -- names ------------------------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """Puts a model below a path."""

    def __init__(self, model: nn.Module, *path: str) -> None:
        super().__init__()
        self.add_module(path[0], Wrapper(model, *path[1:]) if path[1:] else model)

    @property
    def inner(self) -> list[SparseAttention]:
        return [module for module in self.modules() if isinstance(module, SparseAttention)]


@pytest.mark.parametrize(
    "prefix", ["_orig_mod", "base_model.model", "_orig_mod.base_model.model", "base_model.model._orig_mod"]
)
def test_prefixes_of_compile_and_peft(state: dict[str, Any], prefix: str) -> None:
    wrapped = Wrapper(FakeModel(), *prefix.split("."))
    load_sparse_attention_state_dict(wrapped, state)
    assert same(wrapped.inner[1].thresholds(), tuned_model().inner[1].thresholds())
    assert set(extract_sparse_attention_state_dict(wrapped)) == set(state)
    # and in a file
    renamed = {key if key == "_metadata" else f"{prefix}.{key}": value for key, value in state.items()}
    model = FakeModel()
    load_sparse_attention_state_dict(model, renamed)
    assert same(model.inner[1].thresholds(), tuned_model().inner[1].thresholds())
    refused(state | renamed, "twice")


def test_a_compiled_model(state: dict[str, Any]) -> None:
    compiled = torch.compile(tuned_model())  # nothing is compiled before the first call
    assert set(extract_sparse_attention_state_dict(compiled)) == set(state)
    assert extract_sparse_attention_state_dict(compiled)["_metadata"]["model_class"] == "FakeModel"


class Twins(nn.Module):
    """Paths of which one ends like the other, as Flux has them."""

    def __init__(self, tuned: bool) -> None:
        super().__init__()
        make = tuned_model if tuned else FakeModel
        single, double = make(), make()
        self.transformer_blocks, self.single_transformer_blocks = double.layers, single.layers
        self.inner = double.inner + single.inner


def test_similar_paths_never_mix() -> None:
    tuned = Twins(tuned=True)
    for i, module in enumerate(tuned.inner):
        module.cdfthreshd.fill_(0.1 + i / 8)
    state = extract_sparse_attention_state_dict(tuned)
    fresh = Twins(tuned=False)
    load_sparse_attention_state_dict(fresh, dict(reversed(state.items())))
    assert [float(module.cdfthreshd[0]) for module in fresh.inner] == [0.1, 0.225, 0.35, 0.475] or torch.allclose(
        torch.stack([module.cdfthreshd[0] for module in fresh.inner]), torch.tensor([0.1, 0.225, 0.35, 0.475])
    )
    gone = {key: value for key, value in state.items() if not key.startswith("transformer_blocks.0.")}
    fresh = Twins(tuned=False)
    with pytest.raises(ValueError, match=r"not in the file, first 'transformer_blocks\.0\.inner_attention'"):
        load_sparse_attention_state_dict(fresh, gone)
    assert all(module.mode == "dense" for module in fresh.inner)


# -- files of the original SpargeAttn ---------------------------------------------------------------------------------


@pytest.fixture
def original(state: dict[str, Any], tmp_path: Path) -> Path:
    del state["_metadata"]
    for path in (FIRST, SECOND):
        state[f"{path}.simthreshd2"] = torch.zeros(HEADS)
    torch.save(state, tmp_path / "original.pt")
    return tmp_path / "original.pt"


def test_original_files_load_as_128_by_64(original: Path) -> None:
    assert not is_verified(load(original))
    model = load_sparse_attention_state_dict(FakeModel(), original)
    for module, expected in zip(model.inner, tuned_model().inner, strict=True):
        assert same(module.thresholds(), expected.thresholds())
        assert (module.selector.block_q, module.selector.block_k, module.selector.pool) == (128, 64, 64)
        assert module.mode == "sparse" and module.lengths is None
        assert (module.l1, module.pv_l1, module.tail) == (0.06, 0.07, 0.5)


@pytest.mark.parametrize(("block_q", "block_k", "pool"), [(64, 128, 64), (128, 128, 128), (64, None, 64)])
def test_block_sizes_of_original_files_can_be_given(
    original: Path, block_q: int, block_k: int | None, pool: int
) -> None:
    model = load_sparse_attention_state_dict(FakeModel(), original, block_q=block_q, block_k=block_k)
    selector = model.inner[0].selector
    assert (selector.block_q, selector.block_k, selector.pool) == (block_q, block_k or 64, pool)


def test_original_files_are_checked_as_strictly(original: Path) -> None:
    refused(original, "1 layers of the file are not in the model", FakeModel(layers=1))
    refused({key: value for key, value in load(original).items() if "0.inner_attention.pv" not in key}, "lacks")
