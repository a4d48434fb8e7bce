"""evaluate/benchmarks/hunyuan3d.py: the figures of a trial, and that it leaves the library as it was."""

from __future__ import annotations

import json
from pathlib import Path

import hunyuan3d
import pytest
import torch

from modify_model.hunyuan3d import attention, dit

pytestmark = pytest.mark.usefixtures("no_gpu")


def test_figures_of_a_trial(tmp_path: Path) -> None:
    before = attention._with_repeats, dit.attend
    assert hunyuan3d.main(["--tiny", "--models", "2mini", "--out", str(tmp_path / "new" / "a.1")]) == 0
    assert (attention._with_repeats, dit.attend) == before
    results = json.loads((tmp_path / "new" / "a.1.json").read_text())["results"]
    assert list(results) == ["2mini", "volume 512"]
    model, volume = results["2mini"], results["volume 512"]
    assert model["merged_error_to_plain"] < 1e-5 and model["run_difference"] < 1e-5
    assert model["error_sparse_0.25"] > 1e-5, "blocks were left out"
    saved, plain = (model[name]["eager"] for name in ("all_savings", "plain_step"))
    assert model["ratio_eager"] == pytest.approx(saved / plain, abs=1e-4) and model["ratio_device"] is None
    assert volume["points"] == 13**3 and 0 < volume["keys_256_of_512_error"] < 1


def test_bias_is_repeats() -> None:
    q, k, v = torch.randn(3, 1, 2, 21, 16, dtype=torch.float64).unbind(0)
    exact = torch.nn.functional.scaled_dot_product_attention(
        q, torch.cat([k[:, :, :1].expand(-1, -1, 8, -1), k], 2), torch.cat([v[:, :, :1].expand(-1, -1, 8, -1), v], 2)
    )
    assert torch.allclose(hunyuan3d.with_bias(q, k, v, 9), exact, atol=1e-12)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        hunyuan3d.main([])
    assert "--tiny" in capsys.readouterr().err
