"""What patch, restore and verify promise, on LLaMA and on a toy family that swaps processors."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from autotune import (
    Grid,
    SparseAttention,
    calibrate,
    extract_sparse_attention_state_dict,
    load_sparse_attention_state_dict,
)
from modify_model import families, patch, restore, verify
from modify_model.families import Family, Layer
from modify_model.modify_llama import SparseLlamaAttention, set_spas_sage_attn_llama
from modify_model.patching import Verification
from spas_attn.selectors import FlashPrefill, MeanSimilarity, PeakMass, TopK

pytestmark = [
    pytest.mark.filterwarnings("ignore:spas_attn. running exact dense:RuntimeWarning"),
    pytest.mark.usefixtures("no_grad"),
]


ROOT = Path(__file__).parents[2]


def snapshot(model):
    """Everything that restore must bring back, by identity where there is one."""
    return {
        "modules": {path: id(module) for path, module in model.named_modules()},
        "keys": list(model.state_dict()),
        "parameters": {path: id(p) for path, p in model.named_parameters()},
        "attention": model.config._attn_implementation,
        "attributes": {path: sorted(vars(module)) for path, module in model.named_modules()},
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_restore_leaves_the_model_as_it_was(make_llama, tokens, set_sparse, attention):
    model, ids = make_llama(attention), tokens(1, 300)
    before, logits = snapshot(model), model(ids).logits
    patch(model)
    set_sparse(model)
    assert not torch.equal(model(ids).logits, logits)
    assert restore(model) is model
    assert snapshot(model) == before
    assert torch.equal(model(ids).logits, logits)
    restore(model)  # an unpatched model is left alone
    assert snapshot(model) == before


def test_patched_model_shares_projections_and_keeps_its_state_dict(make_llama):
    model = make_llama()
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    attention = model.model.layers[0].self_attn
    assert patch(model) is model
    new = model.model.layers[0].self_attn
    assert isinstance(new, SparseLlamaAttention) and isinstance(new.inner_attention, SparseAttention)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "config"):
        assert getattr(new, name) is getattr(attention, name)
    for name in ("layer_idx", "head_dim", "scaling", "num_key_value_groups", "attention_dropout", "is_causal"):
        assert getattr(new, name) == getattr(attention, name)
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == parameters
    assert not new.training and not new.inner_attention.training


def test_patching_twice_keeps_modules_and_takes_what_is_named(make_llama, set_sparse):
    model = patch(make_llama(), l1=0.05, tail=None)
    inner = model.model.layers[0].self_attn.inner_attention
    patch(model, selector=FlashPrefill())  # nothing is tuned yet, so nothing is lost
    assert model.model.layers[0].self_attn.inner_attention is inner and isinstance(inner.selector, FlashPrefill)
    set_sparse(model)
    tuned = inner.tuned
    patch(model)
    assert model.model.layers[0].self_attn.inner_attention is inner and inner.tuned is tuned
    assert (inner.l1, inner.pv_l1, inner.tail, inner.mode) == (0.05, 0.07, None, "sparse")
    patch(model, l1=0.1, pv_l1=0.2, tail=0.3, precision="bf16")
    assert (inner.l1, inner.pv_l1, inner.tail, inner.precision) == (0.1, 0.2, 0.3, "native")
    patch(model, l1=0.15)  # below the pv_l1 that the layer keeps
    assert inner.l1 == 0.15 and inner.tuned is tuned
    restore(model)
    assert type(model.model.layers[0].self_attn).__name__ == "LlamaAttention"


def test_graphs_are_an_option_of_every_layer(make_llama):
    model = patch(make_llama(), graphs=True)
    layers = [layer.self_attn.inner_attention for layer in model.model.layers]
    assert all(layer.graphs for layer in layers)
    patch(model, l1=0.05)
    assert all(layer.graphs for layer in layers), "what is not named stays"
    patch(model, graphs=False)
    assert not any(layer.graphs for layer in layers)
    with pytest.raises(TypeError, match="graphs must be True or False"):
        patch(model, graphs=1)


@pytest.mark.gpu
def test_graphs_change_no_bit_of_a_model(make_llama, tokens):
    """Layers whose inputs lie at the same addresses share a graph and its output."""
    ids = tokens(1, 700).cuda()
    plain = make_llama().to("cuda", torch.bfloat16)
    patch(plain, selector=TopK(0.5, pool=16, block_q=64, block_k=64), backend="triton", calibrated=False)
    replaying = patch(copy.deepcopy(plain), graphs=True)
    expected = plain(ids).logits
    for _ in range(5):  # as written, recorded, from a plan, captured, as a graph
        assert torch.equal(replaying(ids).logits, expected)


def tuned_llama(make_llama, tokens):
    """A tiny LLaMA that was calibrated, and its tuned file."""
    model = patch(make_llama(), l1=0.3, pv_l1=0.4, tail=None)
    with calibrate(model, grid=Grid(cdf=(0.5, 0.9), pv=(50.0,)), query_blocks=2) as calibration:
        for length in calibration.prompts([300, 301]):
            model(tokens(1, length), logits_to_keep=1)
    return model, extract_sparse_attention_state_dict(model)


def test_a_tuned_model_keeps_the_bounds_that_were_checked(make_llama, tokens):
    model, state = tuned_llama(make_llama, tokens)
    patch(model, l1=0.001, pv_l1=0.002)
    again = extract_sparse_attention_state_dict(model)
    for name in ("l1", "pv_l1", "tail", "selector"):
        assert again["_metadata"][name] == state["_metadata"][name]
    assert again["_metadata"]["l1"] == 0.3 and verify(model).ok


@pytest.mark.parametrize("selector", [PeakMass(), TopK(), MeanSimilarity(pool=16), MeanSimilarity(block_q=64, pool=8)])
def test_another_selector_drops_the_thresholds_of_a_tuned_model(make_llama, tokens, selector):
    model, _ = tuned_llama(make_llama, tokens)
    inner = model.model.layers[0].self_attn.inner_attention
    patch(model, selector=dataclasses.replace(inner.selector))  # an equal one changes nothing
    assert {row.status for row in verify(model).layers} == {"sparse"}
    with pytest.warns(RuntimeWarning, match="another selector: the layers lose their thresholds"):
        patch(model, selector=selector, l1=0.2, pv_l1=0.25)
    inner = model.model.layers[0].self_attn.inner_attention
    assert (inner.selector, inner.l1, inner.pv_l1, inner.tuned) == (selector, 0.2, 0.25, None)
    assert {row.status for row in verify(model).layers} == {"dense"}
    dense = make_llama()
    assert torch.equal(model(tokens(1, 300)).logits, dense(tokens(1, 300)).logits)


def test_layer_range(make_llama, tokens, set_sparse, capsys):
    model, ids = make_llama(num_hidden_layers=3), tokens(1, 300)
    logits = model(ids).logits
    originals = [layer.self_attn for layer in model.model.layers]
    set_spas_sage_attn_llama(model, layer_range=(1, 2), verbose=True)
    assert "1/3 attention layers" in capsys.readouterr().out
    assert [isinstance(layer.self_attn, SparseLlamaAttention) for layer in model.model.layers] == [False, True, False]
    assert torch.equal(model(ids).logits, logits)
    result = verify(model)
    assert result.ok and [layer.status for layer in result.layers] == ["left", "dense", "left"]
    inner = set_sparse(model)
    assert not torch.equal(model(ids).logits, logits)
    assert len(inner) == 1 and float(inner[0].last_density.min()) < 1
    set_spas_sage_attn_llama(model, layer_range=(0, 1))  # what this call says, no more
    assert [isinstance(layer.self_attn, SparseLlamaAttention) for layer in model.model.layers] == [True, False, False]
    assert model.model.layers[1].self_attn is originals[1]


@pytest.mark.parametrize("layer_range", [(0, 0), (1, 3), (-1, 1), (2, 1), 3, (0, 1, 2), (0.0, 1.0), "ab"])
def test_bad_layer_range(make_llama, layer_range):
    with pytest.raises(ValueError, match=rf"layer_range.*<= 2, .*got {re.escape(repr(layer_range))}"):
        patch(make_llama(), layer_range=layer_range)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"l1": "a"}, TypeError, "l1 must be a number .*, got 'a'"),
        ({"pv_l1": [0.1]}, TypeError, r"pv_l1 must be a number .*, got \[0\.1\]"),
        ({"tail": True}, TypeError, "tail must be a number .* or None, got True"),
        ({"selector": "x"}, TypeError, "selector must be a Selector or None, got 'x'"),
        ({"text_sink": "no"}, TypeError, "text_sink must be True or False, got 'no'"),
        ({"dense_layers": 1}, ValueError, "dense_layers must be a list of numbers from 0 to 1, got 1"),
        ({"dense_layers": "1"}, ValueError, "dense_layers must be a list of numbers from 0 to 1, got '1'"),
        ({"dense_layers": iter([1])}, ValueError, "dense_layers must be a list of numbers from 0 to 1, got <list_it"),
        ({"dense_layers": ["a"]}, ValueError, r"dense_layers must be numbers from 0 to 1, got \['a'\]"),
    ],
)
def test_settings_of_another_type_are_named(make_llama, settings, error, message):
    model = make_llama()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        patch(model, **settings)
    assert snapshot(model) == before
    inner = patch(model).model.layers[0].self_attn.inner_attention
    with pytest.raises(error, match=message):  # also where the layers are sparse already
        patch(model, **settings)
    assert (inner.l1, inner.pv_l1, inner.tail, inner.text_sink) == (0.06, 0.07, 0.5, True)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"head_dim": 8}, "its head dim is 8, and sparse attention serves 16 to 256"),
        ({"head_dim": 320}, "its head dim is 320, and sparse attention serves 16 to 256"),
        (
            {"dtype": torch.float64},
            "its weights are float64, and sparse attention serves float16, bfloat16 and float32",
        ),
    ],
)
def test_layers_that_no_backend_serves_are_refused_at_once(make_llama, config, reason):
    dtype = config.get("dtype", torch.float32)
    model = make_llama(**{name: value for name, value in config.items() if name != "dtype"}).to(dtype)
    with pytest.raises(ValueError, match=rf"layer 'model\.layers\.0\.self_attn' cannot be made sparse: {reason}"):
        patch(model)
    assert verify(model).replaced == 0


def test_refused_settings_change_nothing(make_llama):
    model = make_llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match="pv_l1"):
        patch(model, l1=0.2, pv_l1=0.1)
    with pytest.raises(TypeError):
        patch(model, no_such_option=1)
    assert snapshot(model) == before


def test_files_of_a_llama_with_another_head_dim(make_llama, set_sparse):
    model = patch(make_llama())
    set_sparse(model)
    state = extract_sparse_attention_state_dict(model)
    assert state["_metadata"]["head_dim"] == 32
    other = patch(make_llama(head_dim=64))
    with pytest.raises(ValueError, match="made for head dim 32 .*, and LlamaForCausalLM has 64"):
        load_sparse_attention_state_dict(other, state)
    assert {row.status for row in verify(other).layers} == {"dense"}
    del state["_metadata"]["head_dim"]  # a file from before
    load_sparse_attention_state_dict(other, state)


def test_the_shipped_file_loads(make_llama):
    sizes = dict(num_hidden_layers=6, num_attention_heads=8, head_dim=64)
    model = patch(make_llama(**sizes))
    load_sparse_attention_state_dict(model, ROOT / "models_dict" / "demo_llama_tuned.pt")
    assert {row.status for row in verify(model).layers} == {"sparse"}


def test_unknown_models_are_named():
    with pytest.raises(ValueError, match=r"Linear has no adapter; supported are .*LlamaModel"):
        patch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"pipeline with \.transformer.*, got str"):
        patch("llama")
    with pytest.raises(ValueError, match="LlamaAttention"):
        set_spas_sage_attn_llama(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="LlamaAttention layers, got SimpleNamespace"):
        set_spas_sage_attn_llama(types.SimpleNamespace(transformer=nn.Linear(2, 2)))
    assert not verify(nn.Linear(2, 2)).ok
    assert not verify("llama").ok


def test_verify_prints_a_table_and_finds_what_is_wrong(make_llama, capsys):
    model = make_llama()
    assert not verify(model).ok
    patch(model)
    capsys.readouterr()
    result = verify(model)
    printed = capsys.readouterr().out
    assert result.ok and result.replaced == 2
    assert "model.layers.1.self_attn" in printed and "2/2 attention layers replaced" in printed
    model.set_attn_implementation("eager")
    result = verify(model)
    assert not result.ok and "patch it again" in result.problems[0]
    assert verify(patch(model)).ok
    model.model.layers[1].self_attn = make_llama().model.layers[1].self_attn
    result = verify(model)
    assert not result.ok and [layer.status for layer in result.layers] == ["dense", "MISSING"]


@pytest.mark.parametrize("copying", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_whole(make_llama, tokens, set_sparse, copying):
    model, ids = patch(make_llama()), tokens(1, 300)
    set_sparse(model)
    twin = copying(model)
    assert torch.equal(twin(ids).logits, model(ids).logits)
    assert verify(twin).ok
    restore(model)
    attention = twin.model.layers[0].self_attn
    projection = attention.q_proj
    assert isinstance(attention, SparseLlamaAttention)
    restore(twin)
    assert twin.model.layers[0].self_attn.q_proj is projection
    assert list(twin.state_dict()) == list(model.state_dict())
    assert torch.equal(twin(ids).logits, model(ids).logits)


def test_save_pretrained_writes_the_same_model(make_llama, tmp_path):
    model = make_llama()
    model.save_pretrained(tmp_path / "before")
    patch(model).save_pretrained(tmp_path / "after")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("before", "after"))
    assert before == after
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("before", "after")]
    assert weights[0] == weights[1]
    again = type(model).from_pretrained(tmp_path / "after")
    assert again.config._attn_implementation == "sdpa"


def test_wrapped_and_derived_models(make_llama, tokens):
    class MyLlama(type(make_llama())):
        """A user's subclass."""

    model, ids = make_llama(), tokens(1, 300)
    logits = model(ids).logits
    model.__class__ = MyLlama
    wrapped = nn.Module()  # as PEFT nests a model
    wrapped.base_model = nn.Module()
    wrapped.base_model.model = torch.compile(model, backend="eager")
    patch(wrapped)
    result = verify(wrapped)
    assert result.ok
    assert [layer.path for layer in result.layers] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert torch.equal(model(ids).logits, logits)
    restore(wrapped)
    assert verify(wrapped).replaced == 0


def test_a_layer_with_a_forward_of_its_own_is_refused(make_llama):
    model = make_llama()

    class Own(type(model.model.layers[1].self_attn)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model.model.layers[1].self_attn.__class__ = Own
    with pytest.raises(ValueError, match=r"layer 'model\.layers\.1\.self_attn' .*: Own has a forward of its own"):
        patch(model)
    assert verify(patch(model, layer_range=(0, 1))).ok


def test_changes_of_a_patched_model_survive_restore(make_llama):
    model = make_llama()
    attention = model.model.layers[0].self_attn
    calls = []
    attention.register_forward_hook(lambda module, args, output: calls.append(type(module).__name__))
    patch(model)
    model(torch.ones(1, 4, dtype=torch.long))
    assert calls == ["SparseLlamaAttention"]  # a user's hooks stay on the layer
    adapter = nn.Linear(128, 128)
    model.model.layers[0].self_attn.q_proj = adapter  # as PEFT does
    restore(model.train())
    assert model.model.layers[0].self_attn is attention
    assert attention.q_proj is adapter and attention.training


def test_models_that_share_a_config(make_llama, tokens, fallbacks, set_sparse):
    first, ids = make_llama(), tokens(1, 300)
    second = type(first)(first.config).eval()
    logits = second(ids).logits
    patch(first)
    assert torch.equal(second(ids).logits, logits)  # unpatched, under the name of the patched one
    patch(second)
    set_sparse(second)
    restore(first)  # takes the name away from both: said, not silent
    assert torch.equal(second(ids).logits, logits)
    assert any("patch it again" in reason for reason in fallbacks())
    restore(second)
    assert second.config._attn_implementation == "sdpa"


class ToyAttention(nn.Module):
    """An attention with a processor, as in diffusers."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(16, 16)
        self.processor = ToyProcessor()

    def forward(self, x):
        return self.processor(self, x)


class ToyProcessor:
    def __call__(self, attention, x):
        return attention.to_q(x)


class SparseToyProcessor(ToyProcessor):
    def __call__(self, attention, x):
        q = attention.to_q(x).view(1, -1, 1, 16).transpose(1, 2)
        out = attention.inner_attention(q, q, q, dense=lambda: q, is_causal=False, scale=1.0)
        return out.transpose(1, 2).reshape(x.shape)


class ToyTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([ToyAttention(), ToyAttention()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@dataclasses.dataclass(frozen=True)
class ToyFamily(Family):
    def layers(self, model):
        return [Layer(path, attention) for path, attention in families.find_modules(model, "ToyAttention")]

    def heads(self, attention):
        return 1, 16

    def install(self, layer, inner):
        layer.attention.original, layer.attention.processor = layer.attention.processor, SparseToyProcessor()
        layer.attention.inner_attention = inner

    def remove(self, attention):
        attention.processor = attention.original
        del attention.inner_attention, attention.original


def test_processor_swap_and_pipelines(monkeypatch):
    monkeypatch.setattr(families, "_families", dict(families._families))
    toy = families.register(ToyFamily("toy", ("ToyTransformer",)))
    pipeline = types.SimpleNamespace(transformer=ToyTransformer(), transformer_2=ToyTransformer(), vae=nn.Linear(2, 2))
    x = torch.randn(1, 5, 16)
    parts = (pipeline.transformer, pipeline.transformer_2)
    before = [(part(x), sorted(part.state_dict()), [sorted(vars(m)) for m in part.modules()]) for part in parts]
    processor = pipeline.transformer.blocks[0].processor
    assert patch(pipeline, l1=0.01) is pipeline
    for part, (out, keys, _) in zip(parts, before, strict=True):
        assert torch.equal(part(x), out) and sorted(part.state_dict()) == keys
    result = verify(pipeline)
    assert result.ok
    assert [row.path for row in result.layers] == [
        "blocks.0",
        "blocks.1",
        "transformer_2.blocks.0",
        "transformer_2.blocks.1",
    ]
    assert pipeline.transformer.blocks[0].inner_attention.l1 == 0.01
    restore(pipeline)
    assert pipeline.transformer.blocks[0].processor is processor
    assert [sorted(vars(m)) for m in pipeline.transformer.modules()] == before[0][2]
    assert not any(isinstance(module, SparseAttention) for part in parts for module in part.modules())
    with pytest.raises(dataclasses.FrozenInstanceError):
        toy.name = "other"
    assert not Verification().ok
