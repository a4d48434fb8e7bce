"""Models wrapped by PEFT: adapters in the projections, sparse attention in the layers, in either order."""

from __future__ import annotations

import pytest
import tiny_transformers
import torch

from autotune import calibrate, extract_sparse_attention_state_dict, load_sparse_attention_state_dict
from autotune.files import is_verified
from autotune.module import sparse_modules
from modify_model import patch, restore, verify
from spas_attn.selectors import MeanSimilarity

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("no_grad")

SOME = MeanSimilarity(0.3, block_q=64, block_k=64, pool=8, local=0)
NAMES = ["Llama", "Qwen2"]  # the replaced module, and the attention interface
PATHS = [f"model.layers.{layer}.self_attn.inner_attention" for layer in (0, 1)]


def ids_of(length):
    return torch.randint(3, 100, (1, length), generator=torch.Generator().manual_seed(1))


def lora(model):
    """The model in a LoRA of random weights, the same every time, which change the outputs."""
    torch.manual_seed(2)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).eval()


def wrapped(name):
    return lora(tiny_transformers.make(name, "sdpa"))


@pytest.mark.parametrize("name", NAMES)
def test_untuned_to_the_bit_and_sparse(name, fallbacks):
    ids = ids_of(250)
    bare = tiny_transformers.make(name, "sdpa")(ids).logits
    model = wrapped(name)
    expected = model(ids).logits
    assert not torch.allclose(expected, bare), "the adapter does something"
    patch(model)
    assert verify(model).ok and list(sparse_modules(model)) == PATHS
    assert torch.equal(model(ids).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, bare)
    patch(model, selector=SOME, calibrated=False)
    inner = list(sparse_modules(model).values())
    for module in inner:
        module.record_density, module.last_density = True, None
    sparse = model(ids).logits
    assert torch.isfinite(sparse).all() and not torch.equal(sparse, expected)
    assert all(float(module.last_density.mean()) < 0.9 for module in inner) and fallbacks() == {}
    after = lora(patch(tiny_transformers.make(name, "sdpa"), selector=SOME, calibrated=False))  # the other way round
    assert torch.equal(after(ids).logits, sparse)
    prompt = dict(attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(ids, **prompt), after.generate(ids, **prompt))
    assert torch.equal(restore(model)(ids).logits, expected)


@pytest.mark.parametrize("name", NAMES)
def test_tuned_file(name, tmp_path, assert_close):
    """Tuned inside PEFT, the file fits the same model inside PEFT, merged, and reloaded from the adapter's folder."""
    ids, model = ids_of(250), patch(wrapped(name), l1=0.3, pv_l1=0.4, tail=None, selector=SOME)
    with calibrate(model, query_blocks=2) as calibration:
        for length in calibration.prompts([200, 220, 240]):
            model(ids_of(length), logits_to_keep=1)
    torch.save(extract_sparse_attention_state_dict(model), tmp_path / "tuned.pt")
    state = torch.load(tmp_path / "tuned.pt")
    assert is_verified(state) and {key.rpartition(".")[0] for key in state if key != "_metadata"} == set(PATHS)
    tuned = model(ids).logits
    assert not torch.equal(tuned, wrapped(name)(ids).logits)
    assert torch.equal(load_sparse_attention_state_dict(patch(wrapped(name)), state)(ids).logits, tuned)
    model.save_pretrained(tmp_path / "adapter")
    base = tiny_transformers.make(name, "sdpa")
    loaded = patch(peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval())
    assert torch.equal(load_sparse_attention_state_dict(loaded, state)(ids).logits, tuned)
    merged = load_sparse_attention_state_dict(loaded.merge_and_unload(), state)  # stays patched
    assert verify(merged).ok and not any("lora" in path for path, _ in merged.named_modules())
    assert_close(merged(ids).logits, tuned, ratio=1e-4)
