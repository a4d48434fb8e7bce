"""The page of a calibration: what is in it, that it loads nothing, and how a browser shows it."""

from __future__ import annotations

import base64
import copy
import dataclasses
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chain_model import Chain, run
from fake_model import GRID, HEADS, PROMPTS, SETTINGS, FakeModel, activations
from PIL import Image

from autotune import (
    Calibration,
    Tuned,
    block_maps,
    extract_sparse_attention_state_dict,
    load_sparse_attention_state_dict,
    report,
    save,
    timing,
)
from autotune.budget import outcome
from autotune.choose import mean_error, tail_error
from autotune.page import Record, render, summary
from autotune.page.findings import findings
from autotune.page.svg import png, shade, ticks
from autotune.tradeoff import Target
from spas_attn.call import Call

BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)


class Page(HTMLParser):
    """What a page holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def file(tuned: tuple[FakeModel, Calibration], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "tuned.pt"
    tuned[1].save(path, about={"model": "a <fake> model", "prompts": "activations & noise"})
    return path


@pytest.fixture(scope="module")
def recorded(file: Path) -> Record:
    return report.read(file)


@pytest.fixture(scope="module")
def record(recorded: Record) -> Record:
    """With times that do not depend on the machine."""
    measured = {entry["path"]: [2.0, 1.0] for entry in recorded.layers}
    return dataclasses.replace(recorded, info={**recorded.info, "measured_ms": measured})


def changed(
    record: Record, info: dict[str, Any] | None = None, layer: dict[str, Any] | None = None, **head: Any
) -> Record:
    """A record with other facts: of the file, of its first layer, of that layer's first head."""
    layers = copy.deepcopy(list(record.layers))
    layers[0].update(layer or {})
    layers[0]["heads"][0].update(head)
    return dataclasses.replace(record, info={**record.info, **(info or {})}, layers=layers)


def words(record: Record) -> str:
    return "\n".join(f"{found.level}: {found.text}" for found in findings(record))


# -- what is in it ----------------------------------------------------------------------------------------------------


def test_the_page_is_written_beside_the_file(file: Path, recorded: Record) -> None:
    assert sorted(path.name for path in file.parent.iterdir()) == ["tuned.html", "tuned.json", "tuned.pt"]
    assert file.with_suffix(".html").read_text("utf-8") == render(recorded)


def test_save_without_a_page(tuned: tuple[FakeModel, Calibration], tmp_path: Path) -> None:
    tuned[1].save(tmp_path / "a.pt", page=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.pt"]
    assert report.write_page(tmp_path / "a.pt", tmp_path / "new" / "b.html").is_file()
    with pytest.raises(TypeError, match="about must map texts to texts"):
        tuned[1].save(tmp_path / "a.pt", about={"model": 3})  # type: ignore[dict-item]


def test_the_page_loads_nothing(record: Record) -> None:
    text = render(record)
    page = Page(text)
    urls = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert urls and all(url and url.startswith(("data:image/png;base64,", "#layer-")) for url in urls)
    assert not re.search(r"@import|url\(|https?://|<link|<iframe|fetch\(", text)
    (policy,) = (meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'; img-src data:;")
    assert len(text) < 100_000


def test_every_picture_decodes_and_has_a_text(record: Record) -> None:
    page = Page(render(record))
    pictures = [attributes["href"] for attributes in page.all("image")]
    assert len(pictures) == 2 + sum(len(entry["block_maps"]) for entry in record.layers) > 2
    for url in pictures:
        with Image.open(io.BytesIO(base64.b64decode((url or "").partition(",")[2]))) as picture:
            picture.load()
            assert picture.format == "PNG" and min(picture.size) >= 1
    charts = [svg for svg in page.all("svg") if "aria-hidden" not in svg]
    assert len(charts) >= 2 + 2 * len(record.layers)
    assert all(svg["role"] == "img" and len(svg["aria-label"] or "") > 20 for svg in charts)


def test_sections_and_layers(record: Record) -> None:
    text = render(record)
    page = Page(text)
    said = " ".join(page.words)
    for title in (
        "In plain words",
        "Sparsity by layer and head",
        "Achieved error and bound",
        "Time by layer",
        "Trade-off of the whole model",
        "Error against density",
        "Block maps",
        "What it was calibrated on",
    ):
        assert title in said
    names = [f"layer-{i}" for i in range(len(record.layers))]
    assert [option["value"] for option in page.all("option")] == names
    assert [div["id"] for div in page.all("div") if div.get("class") == "layer"] == names
    assert not any("hidden" in attributes for _, attributes in page.tags), "without the script all layers are shown"
    assert "a <fake> model" in said and "<fake>" not in text and "activations &amp; noise" in text
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))


def test_heat_map_shows_every_head(record: Record) -> None:
    page = Page(render(changed(record, is_sparse=False, sparsity=0.0, runs_dense_because="a <reason>")))
    url = page.all("image")[0]["href"] or ""
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as picture:
        pixels = np.array(picture.convert("RGB"))
    assert pixels.shape == (len(record.layers), HEADS, 3)
    for i, entry in enumerate(record.layers):
        for j, head in enumerate(entry["heads"]):
            expected = (217, 221, 226) if (i, j) == (0, 0) else shade(round(100 * head["sparsity"]) / 100)
            assert tuple(pixels[i, j]) == expected
    assert "Grey: the head runs dense." in " ".join(page.words)
    assert "runs dense: a <reason>" in " ".join(page.words)


def test_curves_are_those_of_the_calibration(tuned: tuple[FakeModel, Calibration], record: Record) -> None:
    for entry, layer in zip(record.layers, tuned[1].layers, strict=True):
        assert layer.curves is not None
        curves = entry["curves"]
        wanted = {"density": layer.curves.density(), "mean": mean_error(layer.curves), "tail": tail_error(layer.curves)}
        for name, values in wanted.items():
            assert torch.allclose(torch.tensor(curves[name], dtype=torch.float64), values, rtol=1e-3)
        pairs = list(zip(curves["sim"], curves["threshold"], strict=True))
        assert pairs == SETTINGS["grid"].pairs(layer.module.selector)
    # A numbered point for every sparse head, in both charts.
    page = Page(render(record))
    assert len([mark for mark in page.all("text") if mark.get("class") == "in"]) == 2 * len(
        list(record.heads(sparse=True))
    )


def test_times_where_they_are_known(record: Record, recorded: Record) -> None:
    for entry in record.layers:
        dense, sparse = recorded.info["measured_ms"][entry["path"]]
        assert dense > 0 and sparse > 0 and entry["expected_ms"] is None, "there is no cost model of a CPU"
    unknown = changed(record, {"measured_ms": {}})
    assert "Not known: nothing was timed." in render(unknown) and "time  not measured" in summary(unknown)
    paths = [entry["path"] for entry in record.layers]
    timed = changed(record, {"measured_ms": {path: [4.0, 2.0] for path in paths}}, {"expected_ms": [4.5, 2.5]})
    said = " ".join(Page(render(timed)).words)
    assert "layer 1, dense: 4 ms measured" in said and "layer 0, sparse: 2.5 ms expected" in said
    assert "8 ms dense, 4 ms sparse, 2.00x (measured, a call of each layer)" in summary(timed)
    slow = changed(record, {"measured_ms": {paths[0]: [1.0, 1.5], paths[1]: [1.5, 1.0]}})
    assert "Sparse attention is not faster than dense in layer 0 on this machine" in words(slow)


def test_a_call_is_timed_dense_and_as_it_is_served(tuned: tuple[FakeModel, Calibration], monkeypatch: Any) -> None:
    module, ran = copy.deepcopy(tuned[0].inner[0]), []
    monkeypatch.setattr(timing, "attend_again", lambda q, k, v, selector, *_, **__: ran.append((q, selector)))
    call = Call.make(*activations(0, 256, 256), is_causal=False, scale=0.25)
    dense, sparse = timing.timed(module, call)
    assert 0 <= sparse < dense, "the sparse one does nothing here"
    assert len(ran) == timing.WARM + timing.REPEATS and all(torch.equal(q, call.q) for q, _ in ran)
    assert torch.equal(ran[0][1].threshold, module.serving(call)[0].threshold)
    module.tuned = Tuned.dense(HEADS)
    dense, sparse = timing.timed(module, call)
    assert dense == sparse > 0 and len(ran) == timing.WARM + timing.REPEATS


# -- the whole model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def budget(tmp_path_factory: pytest.TempPathFactory) -> tuple[Chain, Path]:
    model, path = Chain((1.0, 3.0)), tmp_path_factory.mktemp("budget") / "tuned.pt"
    run(model, PROMPTS[:4], objective="budget", sparsity=0.3, grid=GRID, query_blocks=4).save(path)
    return model, path


def test_tradeoff(budget: tuple[Chain, Path]) -> None:
    record = report.read(budget[1])
    assert record.tradeoff is not None and not record.retargeted
    text = render(record)
    said = " ".join(Page(text).words)
    point = outcome(record.tradeoff)
    assert f"chosen: density {100 * (1 - point.sparsity):.1f}%, predicted {point.error:.3g}" in said
    assert "sparsity=0.3" in said and f"measured: {record.tradeoff.measured:.3g}" in said
    assert "no bound was set for heads" in said and "share of the bound" not in said, "a budget without guards"
    dense = changed(record, layer={"heads": [{**h, "is_sparse": False} for h in record.layers[0]["heads"]]})
    render(dataclasses.replace(dense, layers=dense.layers[:1]))
    line = next(line for line in summary(record).splitlines() if "trade-off" in line)
    assert f"one budget, sparsity=0.3; KL of the model predicted {record.tradeoff.predicted:.3g}, measured" in line
    missed = dataclasses.replace(record.tradeoff, target=Target("sparsity", 0.99), measured=2 * point.error)
    missed = dataclasses.replace(record, tradeoff=missed)
    assert "warning: The target sparsity=0.99 was not reached" in words(missed)
    assert "warning: The model's KL was 2.0 times the predicted one" in words(missed)


def test_tradeoff_of_bounds(record: Record) -> None:
    """Two lines: within the bounds, and without them; the chosen point is the sparse end of the first."""
    assert record.tradeoff is not None and record.tradeoff.target is None
    text = render(record)
    assert "candidates that hold the bounds of heads" in text and "all candidates" in text
    assert "bounds for every head" in summary(record)
    assert "The file holds none." in render(dataclasses.replace(record, tradeoff=None))
    assert "no trade-off" in words(dataclasses.replace(record, tradeoff=None))


def test_thresholds_chosen_afterwards(budget: tuple[Chain, Path], tmp_path: Path) -> None:
    """The statistics are those of the calibration; the page says that the file is not."""
    path = budget[1]
    loaded = Chain((1.0, 3.0))
    load_sparse_attention_state_dict(loaded, path, sparsity=0.1)
    save(extract_sparse_attention_state_dict(loaded), tmp_path / "other.pt")
    shutil.copy(path.with_suffix(".json"), tmp_path / "other.json")
    record = report.read(tmp_path / "other.pt")
    assert record.retargeted and "thresholds were chosen anew after the calibration" in words(record)


# -- in words ---------------------------------------------------------------------------------------------------------


def test_summary(record: Record) -> None:
    lines = summary(record).splitlines()
    assert len(lines) <= 10 and all(len(line) < 160 for line in lines)
    mean = sum(entry["mean_sparsity"] for entry in record.layers) / len(record.layers)
    assert f"{100 * mean:.1f}% of the blocks left out" in lines[2]
    worst = max(head["tail_total"] for _, head in record.heads())
    assert f"at most {worst:.3g}" in summary(record) and "bound 1.5" in summary(record)
    assert "on 6 prompts (2 kept aside for the check), 330 to 512 keys" in summary(record)


def test_nothing_to_warn_of(record: Record) -> None:
    assert words(record).startswith("good: No warnings") and "warning: " not in words(record)


@pytest.mark.parametrize(
    ("info", "layer", "head", "text"),
    [
        ({"calibrated": False}, {}, {}, "Nothing was measured for these thresholds"),
        ({}, {}, {"l1_total": 0.16}, "1 head exceeded a bound in the check (layer.head): 0.0."),
        ({}, {"prompts_fitted": 2, "prompts_checked": 2}, {}, "Only 4 prompts"),
        ({}, {"prompts_fitted": 8, "prompts_checked": 1}, {}, "One prompt was kept aside"),
        ({}, {"calls_skipped_for_memory": 3}, {}, "Memory did not suffice to look at 3 calls"),
        ({}, {"checked_on_the_fitted_calls": True}, {}, "There was a single prompt"),
        ({}, {"mean_sparsity": 0.04}, {}, "Less than 10% of the blocks are left out in layer 0"),
    ],
)  # fmt: skip
def test_warnings(record: Record, info: dict[str, Any], layer: dict[str, Any], head: dict[str, Any], text: str) -> None:
    found = words(changed(record, info, layer, **head))
    assert text in next(line for line in found.splitlines() if line.startswith("warning: "))
    assert text not in words(record) and "good: " not in found


@pytest.mark.parametrize(
    ("layer", "head", "text"),
    [
        ({"tail": None}, {}, "No bound was set on the error of single queries"),
        ({}, {"is_sparse": False, "runs_dense_because": "it pleases"}, "1 head runs dense: it pleases."),
        ({}, {"cdfthreshd": 0.3}, "at the sparsest threshold that was tried"),
    ],
)  # fmt: skip
def test_notes(record: Record, layer: dict[str, Any], head: dict[str, Any], text: str) -> None:
    assert f"note: {text}" in words(changed(record, layer=layer, **head)) or text in words(
        changed(record, layer=layer, **head)
    )
    render(changed(record, layer=layer, **head))


def test_a_file_of_an_earlier_version() -> None:
    """It has statistics, but no curves, maps or times; the page says so."""
    record = report.read(Path(__file__).parents[2] / "models_dict" / "demo_llama_tuned.pt")
    names = ("curves", "block_maps", "expected_ms")
    layers = [{k: v for k, v in entry.items() if k not in names} for entry in record.layers]
    old = Record(record.name, {k: v for k, v in record.info.items() if k not in ("measured_ms", "tradeoff")}, layers)
    assert "The file holds no trade-off and no error curves and no block maps and no times" in words(old)
    text = render(old)
    assert "No curves were recorded" in text and "No block maps were recorded" in text


def test_what_cannot_be_read(file: Path, tmp_path: Path) -> None:
    alone = shutil.copy(file, tmp_path / "alone.pt")
    with pytest.raises(FileNotFoundError, match=r"no statistics beside '.*alone.pt'"):
        report.write_page(alone)
    statistics = json.loads(file.with_suffix(".json").read_text())
    for content, message in (
        ("no json", "cannot read the statistics"),
        ("[]", "hold no layer"),
        ('{"a": 1}', "no statistics of a calibration"),
        (json.dumps(statistics[:1]), "does not belong to"),
    ):
        (tmp_path / "alone.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            report.write_page(alone)
    statistics[0]["block_maps"] = [{"head": 0, "density": 0.5, "blocks": [8, 8], "size": [8, 8], "zlib": "AAAA"}]
    (tmp_path / "alone.json").write_text(json.dumps(statistics))
    with pytest.raises(ValueError, match="block map of the statistics is damaged"):
        report.write_page(alone)


def test_phases(record: Record) -> None:
    """A row for each phase of each layer, named by letters."""
    layers = [dict(entry, phase=phase, noise=[1 - phase / 2, 0.5 - phase / 2], precision=name)
              for entry in record.layers for phase, name in ((0, "native"), (1, "int8_bf16"))]  # fmt: skip
    measured = {key: [3.0, 1.0] for path in record.info["measured_ms"] for key in (path, f"{path}#1")}
    phased = dataclasses.replace(record, layers=layers, info={**record.info, "measured_ms": measured})
    said = " ".join(Page(render(phased)).words)
    assert "layer 0a" in said and "layer 1b" in said and "native in 2 layers, int8_bf16 in 2 layers" in said
    assert "12 ms dense, 4 ms sparse" in summary(phased) and "2 layers in 2 phases" in summary(phased)
    assert "the letters stand for noise levels: a from 1 to 0.5, b from 0.5 to 0." in words(phased)


# -- its parts --------------------------------------------------------------------------------------------------------


def test_block_maps_are_what_the_kernel_kept(tuned: tuple[FakeModel, Calibration]) -> None:
    """Of the first prompt kept aside: recomputed here from its activations."""
    model, calibration = copy.deepcopy(tuned[0]), tuned[1]
    prompt = model.ran[6]
    found = [(i, entry) for i, layer in enumerate(calibration.statistics) for entry in layer["block_maps"]]
    assert found
    for i, entry in found:
        seen = []
        module = model.inner[i]
        before, module.mode, module.observer = module.mode, "tune", seen.append
        model(prompt)
        module.mode, module.observer = before, None
        (call,) = (call for call in seen if isinstance(call, Call))
        selector, _ = module.serving(call)
        kept, visible = selector.kept(call)[0, entry["head"]], selector.visible(call)[0, 0]
        values = block_maps.unpack(entry)
        assert list(kept.shape) == entry["blocks"] == entry["size"]
        assert torch.equal(values == block_maps.HIDDEN, ~visible)
        assert torch.equal(values == 100, kept & visible)
        assert entry["density"] == pytest.approx(float(kept.sum() / visible.sum()), abs=1e-4)


def test_large_maps_become_shares() -> None:
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(3, 300, 257, generator=generator) < torch.tensor([0.1, 0.7, 0.4])[:, None, None]
    visible = torch.ones(300, 257, dtype=torch.bool).tril()
    maps = block_maps.record(kept & visible, visible.expand(3, -1, -1), torch.tensor([True, False, True]))
    assert [entry["head"] for entry in maps] == [0, 2], "sparsest first, of the sparse heads"
    values = block_maps.unpack(maps[0])
    assert values.shape == (100, 86) and maps[0]["blocks"] == [300, 257]
    for row, column in ((0, 0), (50, 20), (99, 85), (10, 10)):
        block = (slice(3 * row, 3 * row + 3), slice(3 * column, 3 * column + 3))
        share = float((kept[0] & visible)[block].sum() / visible[block].sum())
        assert int(values[row, column]) == pytest.approx(100 * share, abs=0.51)
    assert int(values[0, 50]) == block_maps.HIDDEN
    assert block_maps.record(kept, visible.expand(3, -1, -1), torch.zeros(3, dtype=torch.bool)) == []


def test_extremes() -> None:
    by_layer = [[{"head": h, "density": (7 * (2 * i + h) % 31) / 31} for h in (0, 1)] for i in range(12)]
    found = [entry["density"] for maps in block_maps.extremes(by_layer) for entry in maps]
    everything = sorted(entry["density"] for maps in by_layer for entry in maps)
    assert sorted(found) == everything[:4] + everything[-4:]
    assert block_maps.extremes([[], by_layer[0]]) == [[], by_layer[0]]


def test_pictures() -> None:
    values = torch.arange(12).reshape(3, 4) % 5
    palette = [(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 8, 7)]
    with Image.open(io.BytesIO(base64.b64decode(png(values, palette).partition(",")[2]))) as picture:
        assert np.array_equal(np.array(picture.convert("RGB")), np.array(palette)[values.numpy()])
    assert shade(0.0) == (255, 255, 217) and shade(1.0) == (8, 29, 88)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 0.25), (0, 100), (0.0, 3.7e-4), (0, 7)])
def test_ticks(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 3 <= len(found) <= 9 and found[0] == low and found[-1] <= high * (1 + 1e-9)
    assert np.allclose(np.diff(found), found[1] - found[0])


# -- in a browser -----------------------------------------------------------------------------------------------------

# Added to a copy of the page: what it looks like from inside, as the page's title.
PROBE = """<script>
addEventListener("load", () => {
  const shown = [...document.querySelectorAll(".layer")].filter(part => !part.hidden).map(part => part.id);
  const sizes = [...document.querySelectorAll("section svg text")].filter(t => !t.closest("[hidden]")).map(t => {
    const m = t.getScreenCTM();
    return parseFloat(getComputedStyle(t).fontSize) * Math.sqrt(Math.abs(m.a * m.d - m.b * m.c));
  });
  const choice = document.getElementById("layer");
  choice.value = "layer-0"; choice.dispatchEvent(new Event("change"));
  const then = [...document.querySelectorAll(".layer")].filter(part => !part.hidden).map(part => part.id);
  document.title = JSON.stringify({wide: document.documentElement.scrollWidth, inner: innerWidth, shown, then,
    smallest: Math.min(...sizes), texts: sizes.length});
});
</script></body>"""


def browse(*arguments: str) -> str:
    command = [str(BROWSER), "--headless", "--no-sandbox", "--hide-scrollbars", "--disable-gpu", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here; on Debian: apt-get install chromium-headless-shell")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_chromium(record: Record, tmp_path: Path, width: int) -> None:
    """Everything fits, texts can be read, one layer is shown, and it can be chosen by address and by hand."""
    path, size = tmp_path / "page.html", f"--window-size={width},1400"
    path.write_text(render(record).replace("</body>", PROBE), "utf-8")
    dom = browse(size, "--dump-dom", f"file://{path}#layer-1")
    found = json.loads(re.search(r"<title>(.*?)</title>", dom)[1])  # type: ignore[index]
    assert found["inner"] == width and found["wide"] <= width, "nothing sticks out"
    assert found["shown"] == ["layer-1"] and found["then"] == ["layer-0"]
    assert found["texts"] > 50 and found["smallest"] >= 7, "pixels of the smallest text"
    path.write_text(render(record), "utf-8")
    browse(size, f"--screenshot={tmp_path / 'page.png'}", f"file://{path}")
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size == (width, 1400)
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24) or ()}
    assert (255, 255, 255) in colours and len(colours) > 100
    # The heat map is there: the exact colour of its cells, which the PNG alone brings.
    assert all(shade(round(100 * head["sparsity"]) / 100) in colours for _, head in record.heads())
