"""The tuned file: round trips, and every way in which a file can be wrong."""

from __future__ import annotations

import os
import pickle
import resource
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_model import HEADS, FakeModel, same, tuned, tuned_model
from torch import nn

from autotune import calibrate, extract_sparse_attention_state_dict, load, load_sparse_attention_state_dict, save
from autotune.files import is_verified
from autotune.module import SparseAttention
from autotune.tuned import FILE_KEYS
from spas_attn.selectors import PeakMass, TopK

FIRST, SECOND = "layers.0.inner_attention", "layers.1.inner_attention"


@pytest.fixture
def state() -> dict[str, Any]:
    return extract_sparse_attention_state_dict(tuned_model(l1=0.03, pv_l1=0.05, tail=None, precision="int8_bf16"))


def untouched(model: FakeModel) -> bool:
    return all(module.mode == "dense" and module.tuned is None for module in model.inner)


def refused(state: Any, message: str, model: nn.Module | None = None) -> None:
    """Loading fails with the message and leaves the model as it was."""
    model = model or FakeModel()
    with pytest.raises(ValueError, match=message):
        load_sparse_attention_state_dict(model, state)
    assert untouched(model)


def test_round_trip(state: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "tuned.pt"
    save(state, path)
    assert [p.name for p in path.parent.iterdir()] == ["tuned.pt"]
    model = FakeModel()
    assert load_sparse_attention_state_dict(model, path) is model
    for module, expected in zip(model.inner, tuned_model().inner, strict=True):
        assert same(module.tuned, expected.tuned)
        assert module.mode == "sparse"
        assert (module.l1, module.pv_l1, module.tail, module.precision) == (0.03, 0.05, None, "int8_bf16")
        assert module.tuned.lengths == (400, 700) and module.tuned.bounds == (0.03, 0.05, None)
        assert module.tuned.expected_density == expected.tuned.expected_density
        assert module.selector == expected.selector
    assert is_verified(load(path))
    again = extract_sparse_attention_state_dict(model)
    assert again["_metadata"] == state["_metadata"]
    assert all(torch.equal(again[key], state[key]) for key in state if key != "_metadata")


def test_contents(state: dict[str, Any]) -> None:
    assert set(state) == {"_metadata", *(f"{path}.{name}" for path in (FIRST, SECOND) for name in FILE_KEYS)}
    for path in (FIRST, SECOND):
        assert state[f"{path}.is_sparse"].dtype == torch.bool
        assert all(
            state[f"{path}.{name}"].dtype == torch.float32 for name in ("cdfthreshd", "simthreshd1", "pvthreshd")
        )
        assert all(state[f"{path}.{name}"].shape == (HEADS,) for name in FILE_KEYS)
    info = state["_metadata"]
    assert info["format"] == 2 and info["model_class"] == "FakeModel"
    selector = {"class": "MeanSimilarity", "block_q": 64, "block_k": 64, "pool": 16, "local": 128, "sink": True}
    assert info["selector"] == selector | {"dense_heads": None}
    assert info["lengths"] == [400, 700] and info["mean_density"] == pytest.approx((0.5 + 0.625) / 2)
    assert "torch" in info["versions"] and len(info["date"]) == 10


def test_bounds_in_the_file_are_those_that_were_checked() -> None:
    model = tuned_model(l1=0.03, pv_l1=0.05)
    for module in model.inner:
        module.l1, module.pv_l1 = 0.001, 0.002  # for a later calibration
    info = extract_sparse_attention_state_dict(model)["_metadata"]
    assert (info["l1"], info["pv_l1"]) == (0.03, 0.05)


@pytest.mark.parametrize("own", [dict(l1=0.01, pv_l1=0.02), dict(l1=0.06, pv_l1=0.07), dict(l1=0.03, pv_l1=0.05)])
def test_a_file_with_other_bounds_than_the_model_was_patched_with(state: dict[str, Any], own: dict[str, Any]) -> None:
    state["_metadata"]["tail"] = 0.5
    model = FakeModel(**own)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_sparse_attention_state_dict(model, state)
    said = [w.filename for w in caught if "patched with l1" in str(w.message)]
    assert said == [__file__] * (own["l1"] == 0.01), "defaults give way without a word"
    assert calibrate(model).layers[0].bounds == (0.03, 0.05, 0.5)


def test_files_of_format_1(state: dict[str, Any]) -> None:
    info = state["_metadata"]
    fields = dict(selector="PeakMass", pool=8, block_q=64, block_k=128, sink=False, local=64)
    state["_metadata"] = info | {"format": 1, "precision": "bf16"} | fields
    model = load_sparse_attention_state_dict(FakeModel(), state)
    expected = PeakMass(pool=8, block_q=64, block_k=128, sink=False, local=64)
    assert all(module.selector == expected and module.precision == "native" for module in model.inner)
    assert all(same(a.tuned, b.tuned) for a, b in zip(model.inner, tuned_model().inner, strict=True))
    state["_metadata"] |= {"selector": "Astrology"}
    refused(state, "Astrology")
    state["_metadata"] |= {"selector": "MeanSimilarity", "pool": 48}
    refused(state, "pool must be a divisor")


def test_a_selectors_own_fields_are_kept() -> None:
    selector = TopK(pool=8, local=192, sink=False, block_q=64, block_k=128) | PeakMass(0.9, block_q=64, block_k=128)
    model = FakeModel(selector=selector)
    for module in model.inner:
        module.set_thresholds(tuned(threshold=0.5))
    fresh = load_sparse_attention_state_dict(FakeModel(), extract_sparse_attention_state_dict(model))
    assert all(module.selector == selector for module in fresh.inner)


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


BAD_TENSORS: dict[str, tuple[str, Any, str]] = {
    "a number": ("pvthreshd", 0.5, "must be a tensor"),
    "a list": ("cdfthreshd", [0.5] * 4, "must be a tensor"),
    "None": ("is_sparse", None, "must be a tensor"),
    "two values": ("cdfthreshd", torch.ones(2), "has 2 values, the model has 4 heads"),
    "eight values": ("is_sparse", torch.ones(8), "has 8 values, the model has 4 heads"),
    "two dimensions": ("pvthreshd", torch.ones(1, 4), r"must be a tensor \[heads\]"),
    "complex": ("pvthreshd", torch.ones(4, dtype=torch.complex64), r"must be a tensor \[heads\]"),
    "sparse": ("pvthreshd", torch.ones(4).to_sparse(), r"must be a tensor \[heads\]"),
    "meta": ("pvthreshd", torch.ones(4, device="meta"), r"must be a tensor \[heads\], .* on meta"),
    "half a flag": ("is_sparse", torch.tensor([0.0, 1.0, 0.5, 1.0]), "is_sparse must be true or false"),
    "a flag of 2": ("is_sparse", torch.tensor([0, 1, 2, 1]), r"is_sparse must be finite, in \[0, 1\]"),
    "cdf above 1": ("cdfthreshd", torch.tensor([0.5, 1.01, 1.0, 0.9]), r"cdfthreshd must be finite, in \[0, 1\]"),
    "cdf below 0": ("cdfthreshd", torch.tensor([0.5, -0.1, 1.0, 0.9]), r"cdfthreshd must be finite, in \[0, 1\]"),
    "similarity above 1": ("simthreshd1", torch.full((4,), 1.5), r"simthreshd1 must be finite, in \[-1, 1\]"),
    "pv of 0": ("pvthreshd", torch.zeros(4), r"pvthreshd must be finite, in \(0, inf\]"),
    "pv below 0": ("pvthreshd", torch.full((4,), -1.0), r"pvthreshd must be finite, in \(0, inf\]"),
    **{
        f"{name} {value}": (name, torch.tensor([0.5, 0.5, 0.5, value]), "must be finite")
        for name, value in (("cdfthreshd", float("nan")), ("simthreshd1", float("inf")), ("pvthreshd", -float("inf")))
    },
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", BAD_TENSORS)
def test_tensors_that_cannot_be_meant(state: dict[str, Any], name: str, tmp_path: Path) -> None:
    """The last layer is the bad one: nothing of the first may be installed. Messages name file, layer and value."""
    key, value, message = BAD_TENSORS[name]
    state[f"{SECOND}.{key}"] = value
    refused(state, rf"layers\.1\.inner_attention'.*{message}")
    if name not in ("meta", "sparse", "quantised"):
        save(state, tmp_path / "bad.pt")
        refused(tmp_path / "bad.pt", rf"bad\.pt': layer 'layers\.1.*{message}")


def test_other_types_of_numbers_load(state: dict[str, Any]) -> None:
    state[f"{SECOND}.is_sparse"] = torch.tensor([0, 1, 1, 0])
    state[f"{SECOND}.pvthreshd"] = torch.full((4,), 8.0).to(torch.float8_e4m3fn)
    state[f"{FIRST}.cdfthreshd"] = torch.tensor(0.5, dtype=torch.float64)
    model = load_sparse_attention_state_dict(FakeModel(), state)
    assert model.inner[1].is_sparse.tolist() == [False, True, True, False]
    assert model.inner[1].pvthreshd.tolist() == [8.0] * 4
    assert model.inner[0].cdfthreshd.tolist() == [0.5] * 4


def test_thresholds_that_the_selector_rejects(state: dict[str, Any]) -> None:
    state["_metadata"]["selector"] = TopK(block_q=64, block_k=64).to_dict()
    load_sparse_attention_state_dict(FakeModel(), state)
    state[f"{SECOND}.cdfthreshd"] = torch.tensor([0.5, 0.0, 0.5, 0.5])
    refused(state, r"layers\.1\.inner_attention'.*keep must be in \(0, 1\]")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 4}, "has format 4, this version reads formats 1 to 3"),
        ({"format": None}, "has format None"),
        ({"l1": 0.5}, "invalid bounds.*pv_l1"),
        ({"tail": "high"}, "invalid bounds"),
        ({"lengths": [400]}, r"lengths must be two .*\[400\]"),
        ({"lengths": [700, 400]}, "lengths must be two"),
        ({"lengths": [True, 400]}, "lengths must be two"),
        ({"lengths": "all"}, "lengths must be two .*all"),
        ({"layer_density": {FIRST: 2.0}}, r"layer_density must be .*2\.0"),
        ({"layer_density": 0.5}, "layer_density must be"),
        ({"mean_density": -1}, "mean_density must be"),
        ({"head_dim": "64"}, "head_dim must be a number"),
        ({"family": 3}, "family must be text"),
        ({"model_class": 3}, "model_class must be text"),
        ({"precision": "fp4"}, "precision must be one of"),
        ({"precision": ["native"]}, "precision must be one of"),
        ({"text_sink": 1}, "text_sink must be True or False"),
        ({"dense_steps": "first"}, "dense_steps must be two shares"),
        ({"dense_steps": [0.6, 0.6]}, "dense_steps must be two shares"),
        ({"selector": None}, "selector None is invalid"),
        ({"selector": "MeanSimilarity"}, "selector 'MeanSimilarity' is invalid"),
        ({"selector": {"class": "Astrology"}}, "Astrology"),
        ({"selector": {"class": "TopK", "pool": 48}}, "pool must be a divisor"),
        ({"selector": {"class": "TopK", "keep": "half"}}, "keep must be a number"),
        ({"selector": {"class": "TopK", "stars": 5}}, "no fields.*stars"),
        ({"selector": {"class": "TopK", "block_k": 96}}, "block_k must be one of"),
    ],
    ids=str,
)
def test_metadata_that_cannot_be_meant(state: dict[str, Any], change: dict[str, Any], message: str) -> None:
    refused(state | {"_metadata": state["_metadata"] | change}, message)


def test_a_missing_buffer(state: dict[str, Any]) -> None:
    del state[f"{SECOND}.pvthreshd"]
    refused(state, r"layers\.1\.inner_attention'.*lacks \['pvthreshd'\]")


def test_no_file_is_loaded_into_a_model_that_is_being_calibrated(state: dict[str, Any]) -> None:
    model = FakeModel()
    with pytest.raises(RuntimeError, match="is being calibrated"), calibrate(model):
        load_sparse_attention_state_dict(model, state)
    assert untouched(model)


@pytest.mark.parametrize(
    "key", ["layers.0.inner_attention.l1", "layers.0.attention.is_sparse", "is_sparse", "layers.0.weight", 3]
)
def test_unknown_entries(state: dict[str, Any], key: Any) -> None:
    refused(state | {key: torch.ones(4)}, f"unknown entry {key!r}")


def test_empty() -> None:
    refused({}, r"2 layers of the model are not in the file")


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


class Pipeline:
    """An object with transformers, as pipelines of diffusers are."""

    def __init__(self, **parts: nn.Module) -> None:
        vars(self).update(parts)


def test_pipelines(state: dict[str, Any], tmp_path: Path) -> None:
    pipe = Pipeline(transformer=tuned_model(), transformer_2=tuned_model())
    pipe.transformer_2.inner[0].set_thresholds(tuned(threshold=0.123))  # type: ignore[attr-defined]
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
            assert same(module.tuned, other.tuned)
    refused(both, rf"2 layers of the file are not in the model, first 'transformer_2\.{FIRST}'")
    one = Pipeline(transformer=FakeModel())
    load_sparse_attention_state_dict(one, state)
    assert all(module.mode == "sparse" for module in one.transformer.inner)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"a pipeline with \.transformer, got Pipeline"):
        extract_sparse_attention_state_dict(Pipeline())


def test_damaged_metadata(state: dict[str, Any]) -> None:
    refused(state | {"_metadata": "by hand"}, "_metadata of the tuned file must be a dict, got str")
    refused(state | {"_metadata": {"format": 2, "selector": {}}}, r"lacks \['model_class', 'l1'")


def test_block_sizes_of_our_files_cannot_be_overridden(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="records its own block sizes"):
        load_sparse_attention_state_dict(FakeModel(), state, block_k=64)


def test_truncated_files_at_any_length(state: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "tuned.pt"
    save(state, path)
    whole = path.read_bytes()
    for length in [0, 1, 2, 3, 10, 100, *range(200, len(whole), len(whole) // 20), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"tuned\.pt' is (damaged or )?not a tuned file"):
            load(path)
    refused(path, "damaged or not a tuned file")


def test_a_flipped_bit_is_noticed(state: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "tuned.pt"
    save(state, path)
    whole, unnoticed = path.read_bytes(), 0
    for position in range(0, len(whole), 37):
        changed = bytearray(whole)
        changed[position] ^= 16
        path.write_bytes(changed)
        try:
            found = load(path)
        except ValueError:
            continue
        unnoticed += 1  # between the entries of the archive
        assert found["_metadata"] == load_whole(whole, tmp_path)["_metadata"]
        assert all(torch.equal(found[key], state[key]) for key in state if key != "_metadata")
    assert unnoticed < len(whole) // 37 // 2


def load_whole(content: bytes, folder: Path) -> dict[str, Any]:
    (folder / "whole.pt").write_bytes(content)
    return load(folder / "whole.pt")


def test_tensors_changed_behind_our_back_are_noticed(state: dict[str, Any], tmp_path: Path) -> None:
    save(state, tmp_path / "tuned.pt")
    changed = torch.load(tmp_path / "tuned.pt", weights_only=True)
    changed[f"{FIRST}.cdfthreshd"][1] = 0.25
    torch.save(changed, tmp_path / "tuned.pt")  # with checksums of its own
    with pytest.raises(ValueError, match=r"tuned\.pt' is damaged.*written with autotune\.save"):
        load(tmp_path / "tuned.pt")
    save(changed, tmp_path / "tuned.pt")
    assert float(load(tmp_path / "tuned.pt")[f"{FIRST}.cdfthreshd"][1]) == 0.25


def test_an_archive_that_unpacks_to_more_than_it_holds(state: dict[str, Any], tmp_path: Path) -> None:
    path, bomb = tmp_path / "tuned.pt", tmp_path / "bomb.pt"
    save(state | {f"{FIRST}.pvthreshd": torch.ones(1_000_000)}, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert bomb.stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"bomb\.pt' is damaged or not a tuned file: its directory promises 4"):
        load(bomb)


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


def test_a_failed_save_names_path_and_reason_and_leaves_the_old_file(state: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "tuned.pt"
    save(state, path)
    before = path.read_bytes()
    before_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before_limit[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write: File too large: '.*tuned\.pt'"):
            save(state | {"more": torch.ones(3)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before_limit)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["tuned.pt"]
    with pytest.raises(OSError, match=r"cannot write: .*tuned\.pt/below\.pt"):
        save(state, path / "below.pt")


def test_what_a_killed_process_left_is_cleared(state: dict[str, Any], tmp_path: Path) -> None:
    old, young = tmp_path / ".tuned.pt.123.tmp", tmp_path / ".tuned.pt.124.tmp"
    for left in (old, young):
        left.write_bytes(b"half of it")
    os.utime(old, (0, 0))
    save(state, tmp_path / "tuned.pt")
    assert sorted(p.name for p in tmp_path.iterdir()) == [young.name, "tuned.pt"], "the young may be being written"


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
    "prefix", ["_orig_mod", "base_model.model", "_orig_mod.base_model.model", "base_model.model._orig_mod", "module"]
)
def test_prefixes_of_wrappers(state: dict[str, Any], prefix: str) -> None:
    wrapped = Wrapper(FakeModel(), *prefix.split("."))
    load_sparse_attention_state_dict(wrapped, state)
    assert same(wrapped.inner[1].tuned, tuned_model().inner[1].tuned)
    assert set(extract_sparse_attention_state_dict(wrapped)) == set(state)
    # and in a file
    renamed = {key if key == "_metadata" else f"{prefix}.{key}": value for key, value in state.items()}
    model = FakeModel()
    load_sparse_attention_state_dict(model, renamed)
    assert same(model.inner[1].tuned, tuned_model().inner[1].tuned)
    refused(state | renamed, "twice")


def test_compiled_and_parallel_models(state: dict[str, Any]) -> None:
    compiled = torch.compile(tuned_model())  # nothing is compiled before the first call
    assert set(extract_sparse_attention_state_dict(compiled)) == set(state)
    assert extract_sparse_attention_state_dict(compiled)["_metadata"]["model_class"] == "FakeModel"
    parallel = nn.DataParallel(tuned_model())
    assert extract_sparse_attention_state_dict(parallel)["_metadata"]["model_class"] == "FakeModel"


class Twins(nn.Module):
    """Paths of which one ends like the other, as Flux has them."""

    def __init__(self, tuned: bool) -> None:
        super().__init__()
        make = tuned_model if tuned else FakeModel
        single, double = make(), make()
        self.transformer_blocks, self.single_transformer_blocks = double.layers, single.layers
        self.inner = double.inner + single.inner


def test_similar_paths_never_mix() -> None:
    twins = Twins(tuned=True)
    for i, module in enumerate(twins.inner):
        module.set_thresholds(tuned(threshold=0.1 + i / 8))
    state = extract_sparse_attention_state_dict(twins)
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
        assert same(module.tuned, expected.tuned)
        assert (module.selector.block_q, module.selector.block_k, module.selector.pool) == (128, 64, 64)
        assert module.mode == "sparse" and module.tuned.lengths is None and module.tuned.bounds is None
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
