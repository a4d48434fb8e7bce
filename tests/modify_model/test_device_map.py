"""Models that accelerate spreads by device_map="auto" calibrate, and serve, as they do on one device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import autotune
from autotune.running import record_density
from modify_model import patch


@pytest.mark.usefixtures("no_grad")
def test_offloaded_layers_calibrate(make_llama, tokens, assert_close, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    plain = make_llama()
    plain.save_pretrained(tmp_path / "model")
    memory = 4 * sum(p.numel() for p in plain.parameters()) * 3 // 4
    spread = LlamaForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": memory, "disk": 1 << 30},
        offload_folder=tmp_path / "offload",
    ).eval()  # fmt: skip
    assert set(spread.hf_device_map.values()) == {"cpu", "disk"}
    assert {p.device.type for p in spread.parameters()} == {"cpu", "meta"}
    prompts = [tokens(1, length) for length in (300, 350, 400)]
    outputs = []
    for model in (plain, spread):
        patch(model)
        with autotune.calibrate(model, l1=0.2, pv_l1=0.3, tail=None) as calibration:
            for ids in calibration.prompts(prompts):
                model(ids)
        with record_density(model) as densities:
            outputs.append(model(prompts[-1]).logits)
        assert densities.mean < 0.95
    assert_close(outputs[1], outputs[0])
    one, other = (autotune.extract_sparse_attention_state_dict(model) for model in (plain, spread))
    assert all(torch.equal(one[key], other[key]) for key in one if key != "_metadata")
    autotune.save(other, tmp_path / "tuned.pt")
    autotune.load_sparse_attention_state_dict(spread, autotune.load(tmp_path / "tuned.pt"))
    assert torch.equal(spread(prompts[-1]).logits, outputs[1])
