"""Models of transformers beyond the matrix: names, packed rows, images, compilers, copies, files, refusals."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_transformers
import torch
import transformers

from autotune import calibrate, extract_sparse_attention_state_dict, load_sparse_attention_state_dict
from autotune.files import is_verified
from autotune.module import sparse_modules
from modify_model import patch, restore, verify
from modify_model.interface import name_for, original_implementation
from spas_attn.selectors import MeanSimilarity, Streaming, TopK

pytestmark = [
    pytest.mark.filterwarnings("ignore:spas_attn. running exact dense:RuntimeWarning"),
    pytest.mark.usefixtures("no_grad"),
]

ROOT = Path(__file__).parents[2]
ALL, SOME = (MeanSimilarity(x, block_q=64, block_k=64, pool=8, local=0) for x in (1.0, 0.3))
DOCUMENTS = [230, 150, 90]  # tokens of packed sequences


def ids_of(length, rows=1):
    return torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(1))


def sparse(model, selector=SOME):
    """The model's layers, patched to run sparse, which record their density."""
    inner = list(sparse_modules(patch(model, selector=selector, calibrated=False)).values())
    for module in inner:
        module.record_density, module.last_density = True, None
    return inner


@pytest.mark.parametrize("name", ["Qwen3", "Gemma 2", "GPT-OSS"])
def test_the_public_name(name, tmp_path):
    """Untuned, "spas_attn" is what the model runs by default (sdpa for the first, eager for the others), to the bit."""
    model, ids = tiny_transformers.make(name, None), ids_of(200)
    assert model.config._attn_implementation == ("sdpa" if name == "Qwen3" else "eager")
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="spas_attn")
    assert torch.equal(loaded(ids).logits, expected)
    model.set_attn_implementation("spas_attn")
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(patch(loaded)(ids).logits, expected) and verify(loaded).ok
    if name == "Gemma 2":
        return  # soft-capped scores: dense always
    assert all(float(module.last_density.mean()) < 1 for module in sparse(loaded) if loaded(ids) is not None)
    sparse_logits = loaded(ids).logits
    assert not torch.equal(sparse_logits, expected)
    sparse(model), model.set_attn_implementation("spas_attn")  # changes nothing in a patched model
    assert torch.equal(model(ids).logits, sparse_logits) and verify(model).ok
    assert torch.equal(restore(loaded)(ids).logits, expected)
    assert loaded.config._attn_implementation == "spas_attn"


ORDERS = {
    "before": "import modify_model; assert 'transformers' not in sys.modules; import transformers.modeling_utils",
    "after": "import transformers.modeling_utils; import modify_model",
    "by what needs it": "from modify_model import stream_heads; import transformers.modeling_utils",
}


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_the_name_is_registered_by_the_import(order):
    code = f"import sys; {ORDERS[order]}; print('spas_attn' in transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("original", ["sdpa", "eager", "flash_attention_2", "kernels-community/flash-attn2"])
def test_names_are_no_names_of_transformers(original):
    name = name_for(original)
    assert not any(word in name for word in ("flash", "sdpa", "flex_attention", "|", "/"))
    config = transformers.LlamaConfig()
    config._attn_implementation = name
    assert original_implementation(config) == original
    assert name_for("spas_attn") == "spas_attn"


def test_a_model_made_from_the_config_of_a_patched_one():
    model, ids = patch(tiny_transformers.make("Gemma 3", "sdpa")), ids_of(100)
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(ids).logits, model(ids).logits)


def packed(given):
    """Arguments of a forward with several sequences in one row."""
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
    ends = torch.tensor([0, *torch.tensor(DOCUMENTS).cumsum(0).tolist()], dtype=torch.int32)
    lengths = dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends.clone(), max_length_q=230, max_length_k=230)
    return {"position_ids": positions} | (lengths if given else {})


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma 2", "GPT-OSS", "Llama 4", "DeepSeek-V3"])
def test_packed_sequences(name, given, use_cache, assert_close):
    """Right also with a fresh cache, where transformers lets the sequences see each other (GPT-OSS: always)."""
    if name == "Llama 4" and use_cache and not given:
        pytest.skip("its layers get no position_ids: only cu_seq_lens show what a cache hides")
    model, ids = tiny_transformers.make(name, "eager"), ids_of(sum(DOCUMENTS))
    alone = torch.cat([model(part, use_cache=False).logits for part in ids.split(DOCUMENTS, 1)], 1)
    theirs = model(ids, **packed(given), use_cache=use_cache).logits
    assert torch.equal(patch(model)(ids, **packed(given), use_cache=use_cache).logits, theirs)
    inner = sparse(model, ALL)
    assert_close(model(ids, **packed(given), use_cache=use_cache).logits, alone)
    if name == "Gemma 2":
        return
    sparse(model)
    assert torch.isfinite(model(ids, **packed(given), use_cache=use_cache).logits).all()
    assert all(float(module.last_density.mean()) < 0.95 for module in inner)


def test_given_lengths_are_not_read(monkeypatch):
    """Nor are positions, beside them; the packed call itself is the library's matter (tests/spas_attn)."""
    model, ids = tiny_transformers.make("Llama", "sdpa"), ids_of(sum(DOCUMENTS))
    sparse(model)
    monkeypatch.setattr("modify_model.masks._documents", lambda begins: pytest.fail("positions were read"))
    model(ids, **packed(True))


def test_images_are_left_alone(fallbacks):
    model = tiny_transformers.make("Qwen2.5-VL", "sdpa")
    image = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    ids = ids_of(200)
    ids[0, 10], ids[0, 11:23], ids[0, 23] = 122, 120, 123
    ids[0, 30], ids[0, 31:35], ids[0, 35] = 122, 120, 123
    inputs = dict(
        input_ids=ids, pixel_values=image, image_grid_thw=torch.tensor([[1, 8, 6], [1, 4, 4]]),
        mm_token_type_ids=(ids == 120).int(), attention_mask=torch.ones_like(ids),
    )  # fmt: skip
    expected = model(**inputs).logits
    patch(model)
    assert [row.path for row in verify(model).layers] == [f"model.language_model.layers.{i}.self_attn" for i in (0, 1)]
    assert model.model.visual.config._attn_implementation == "sdpa"
    assert torch.equal(model(**inputs).logits, expected)
    inner = sparse(model)
    assert not torch.equal(model(**inputs).logits, expected)
    assert all(float(module.last_density.mean()) < 1 for module in inner)
    model.set_attn_implementation("spas_attn")  # of the vision tower too, which runs what it ran
    assert all(float(module.last_density.mean()) < 1 for module in inner if model(**inputs) is not None)
    restore(model)
    assert torch.equal(model(**inputs).logits, expected) and fallbacks() == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen3", "Mistral", "GPT-OSS"])
def test_compiled_without_graph_breaks(name, assert_close, fallbacks):
    model, ids = tiny_transformers.make(name, None), ids_of(200)
    for module in sparse(model):
        module.backend, module.record_density = "sdpa", False  # the cpu backend looks at the mask on the host
    expected = model(ids, attention_mask=torch.ones_like(ids)).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(ids, attention_mask=torch.ones_like(ids)).logits, expected)
    assert fallbacks() == {}


@pytest.mark.parametrize("copying", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_whole(copying):
    model, ids = tiny_transformers.make("Qwen3", "sdpa"), ids_of(200)
    dense = model(ids).logits
    sparse(model)
    twin = copying(model)
    assert torch.equal(twin(ids).logits, model(ids).logits) and verify(twin).ok
    assert type(twin.model.layers[0].self_attn).__name__ == "SparseQwen3Attention"
    restore(model)
    assert torch.equal(restore(twin)(ids).logits, dense)
    assert type(twin.model.layers[0].self_attn).__name__ == "Qwen3Attention"


def test_gradient_checkpointing_runs_dense(fallbacks, assert_close):
    model, ids = tiny_transformers.make("Mistral", "sdpa").train(), ids_of(200)
    model.gradient_checkpointing_enable()

    def gradient():
        model.zero_grad()
        with torch.enable_grad():
            model(ids, labels=ids, use_cache=False).loss.backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    expected = gradient()
    sparse(model)
    assert_close(gradient(), expected)
    assert any("training mode" in reason for reason in fallbacks())


def test_calibration_of_any_model(tmp_path):
    """Sinks and windows are part of what a calibration measures; its file fits models of the same type only."""
    model = patch(tiny_transformers.make("GPT-OSS", "eager"), l1=0.3, pv_l1=0.4, tail=None, selector=SOME)
    with calibrate(model, query_blocks=2) as calibration:
        for length in calibration.prompts([200, 220, 240]):
            model(ids_of(length), logits_to_keep=1)
    state = extract_sparse_attention_state_dict(model)
    assert state["_metadata"]["family"] == "gpt_oss" and is_verified(state)
    twin = load_sparse_attention_state_dict(patch(tiny_transformers.make("GPT-OSS", "eager")), state)
    assert torch.equal(twin(ids_of(200)).logits, model(ids_of(200)).logits)
    with pytest.raises(ValueError, match="made for gpt_oss .*belongs to the family qwen2"):
        load_sparse_attention_state_dict(patch(tiny_transformers.make("Qwen2", "eager")), state)


def test_uncalibrated_selectors(make_llama, tokens, tmp_path):
    model, ids = make_llama(), tokens(1, 300)
    keep = torch.tensor([0.3, 0.5, 0.7, 1.0])
    patch(model, selector=TopK(keep, block_q=64, block_k=64), calibrated=False)
    assert {row.status for row in verify(model).layers} == {"sparse"}
    inner = sparse_modules(model)["model.layers.0.self_attn.inner_attention"]
    assert torch.equal(inner.cdfthreshd, keep) and not inner.tuned.calibrated
    state = extract_sparse_attention_state_dict(model)
    assert state["_metadata"]["calibrated"] is False and not is_verified(state)
    twin = load_sparse_attention_state_dict(patch(make_llama(), l1=0.2, pv_l1=0.3), state)
    assert torch.equal(twin(ids).logits, model(ids).logits)
    assert not sparse_modules(twin)["model.layers.0.self_attn.inner_attention"].tuned.calibrated
    with calibrate(model, l1=0.3, pv_l1=0.4, tail=None, query_blocks=2) as calibration:
        for length in calibration.prompts([300, 301]):
            model(tokens(1, length), logits_to_keep=1)
    assert is_verified(extract_sparse_attention_state_dict(model))
    with pytest.warns(RuntimeWarning, match="calibrated=False: the layers lose the thresholds"):
        patch(model, calibrated=False)


def test_uncalibrated_selectors_change_without_a_warning(make_llama, tokens, recwarn):
    """Nothing is lost that anybody measured."""
    model, ids = make_llama(), tokens(1, 300)
    dense = model(ids).logits
    patch(model, selector=SOME, calibrated=False)
    patch(model, selector=TopK(0.3, block_q=64, block_k=64), calibrated=False)
    assert {type(module.selector) for module in sparse_modules(model).values()} == {TopK}
    fresh = patch(make_llama(), selector=TopK(0.3, block_q=64, block_k=64), calibrated=False)
    assert torch.equal(model(ids).logits, fresh(ids).logits)
    patch(model, selector=SOME)  # calibrated=False was not asked for again
    assert {row.status for row in verify(model).layers} == {"dense"} and torch.equal(model(ids).logits, dense)
    assert not [str(one.message) for one in recwarn if "threshold" in str(one.message)]


def test_a_selector_for_each_layer(make_llama, tokens):
    table = [TopK(0.3, block_q=64, block_k=64), Streaming(1, 128, block_q=64, block_k=64)]
    model, ids = patch(make_llama(), selector=table, calibrated=False), tokens(1, 300)
    inner = list(sparse_modules(model).values())
    assert [type(module.selector) for module in inner] == [TopK, Streaming]
    state = extract_sparse_attention_state_dict(model)
    twin = load_sparse_attention_state_dict(patch(make_llama()), state)
    assert torch.equal(twin(ids).logits, model(ids).logits)
    assert [type(module.selector) for module in sparse_modules(twin).values()] == [TopK, Streaming]
    with pytest.raises(ValueError, match=r"each of the model's 2 attention layers, got 3"):
        patch(model, selector=[TopK()] * 3)
    with pytest.raises(TypeError, match="calibrated must be True or False"):
        patch(model, calibrated="no")


def test_what_cannot_be_served_is_refused():
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"BloomForCausalLM cannot be made sparse: .*AttentionInterface"):
        patch(bloom)
    bert = transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=32))
    with pytest.raises(ValueError, match=r"BertModel cannot be made sparse: .*causal attention layers"):
        patch(bert)
    assert not verify(bloom).ok
    model = patch(tiny_transformers.make("Qwen3", "sdpa"))
    with pytest.raises(ValueError, match=r"continuous batching \(generate_batch\) does not run with sparse attention"):
        model.generate_batch([[1, 2, 3]], progress_bar=False)
    with pytest.raises(ValueError, match=r"output_attentions.*restore"):
        model(ids_of(8), output_attentions=True)


def test_a_model_with_sparse_attention_of_its_own_is_refused():
    model = tiny_transformers.make("Qwen3", "sdpa")

    class Own(type(model.model.layers[1].self_attn)):
        def forward(self, hidden_states, position_embeddings, attention_mask, **kwargs):
            attention_mask = attention_mask.masked_fill(False, 0) if attention_mask is not None else None
            transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.get_interface("eager", None)
            return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)

    model.model.layers[1].self_attn.__class__ = Own
    with pytest.raises(ValueError, match="Own.forward works on the attention mask itself"):
        patch(model)
