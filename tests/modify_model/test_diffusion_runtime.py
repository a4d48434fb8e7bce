"""Patched diffusion models under what else lives there: compilers, dtypes, adapters, offloading, attention backends."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from diffusers import LayerSkipConfig
from diffusers.hooks import apply_layer_skip
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from families import CASES, run
from torch import nn
from torch._dynamo.testing import CompileCounter

import autotune
from autotune import SparseAttention
from modify_model import patch, processors, restore, verify

pytestmark = [
    pytest.mark.filterwarnings("ignore:spas_attn. running exact dense:RuntimeWarning"),
    pytest.mark.usefixtures("no_grad"),
]


def attentions(name, model):
    return [model.get_submodule(path) for path in CASES[name].layers]


def ran_sparse(inner):
    return [module.last_density is not None and float(module.last_density.mean()) < 1 for module in inner]


# -- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tuned"), [("Flux", False), ("CogVideoX", True), ("Flux", True), ("SD3.5", True), ("Wan", True)]
)
def test_compiled_whole_without_graph_breaks(name, tuned, set_sparse, fallbacks, assert_close):
    case = CASES[name]
    model, inputs = patch(case.model()), case.inputs(1)
    inner = set_sparse(model) if tuned else []
    expected = run(model, inputs)
    for module in inner:
        module.record_density = False
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(2):
        assert_close(run(compiled, inputs), expected, 1e-5)
    assert counter.frame_count == 1 and fallbacks() == {}
    assert not tuned or float((run(restore(model), inputs) - expected).norm()) > 1e-3


def test_compiled_with_arguments_by_position(set_sparse, assert_close):
    case = CASES["Flux"]
    model, inputs = patch(case.model()), case.inputs()
    for module in set_sparse(model):
        module.record_density = False
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    first = [inputs.pop(name) for name in names]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(*first, **inputs, return_dict=False)[0], model(*first, **inputs, return_dict=False)[0])


@pytest.mark.parametrize("name", ["Flux", "Wan"])
def test_compiled_before_any_other_sparse_call(name, set_sparse, monkeypatch, assert_close):
    """As in a fresh process: nothing has touched what tells the replaced attention its layer."""
    case = CASES[name]
    model, inputs = patch(case.model()), case.inputs(1)
    inner = set_sparse(model)
    for module in inner:
        module.record_density = False
    monkeypatch.setattr(processors, "_now", processors._Calling())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    got = [run(compiled, inputs) for _ in range(2)]
    torch._dynamo.reset()
    expected = run(model, inputs)
    for out in got:
        assert_close(out, expected)


@pytest.mark.parametrize("how", ["blocks", "outside", "inside"])
def test_dense_steps_make_two_graphs_and_no_more(how, set_sparse, assert_close):
    case = CASES["Wan"]
    counter = CompileCounter()
    model = case.model()
    torch._dynamo.reset()
    called = model
    if how == "blocks":
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
    elif how == "outside":
        called = torch.compile(model, fullgraph=True, backend=counter)
    patch(called, dense_steps=(0.3, 0.1))
    if how == "inside":  # the hook is part of what is compiled, and ends a graph
        called = torch.compile(model, backend=counter)
    inner = set_sparse(model)
    for module in inner:
        module.record_density = False
    for level in (1.0, 0.8, 0.6, 0.3, 0.05):
        inputs = case.inputs(1, level)
        got = run(called, inputs)
        with torch.compiler.set_stance("force_eager"):
            assert_close(got, run(model, inputs), 1e-5)
    assert counter.frame_count <= (3 if how == "inside" else 2)
    assert verify(restore(called)).replaced == 0


# -- dtypes, layers, devices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CogVideoX", "Flux", "HunyuanVideo", "SD3.5", "Wan"])
def test_bfloat16(name, set_sparse, fallbacks, assert_close):
    case = CASES[name]
    model = case.model().to(torch.bfloat16)
    inputs = {
        key: value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in case.inputs(1).items()
    }
    dense = run(model, inputs)
    inner = set_sparse(patch(model), cdf=1.0)
    assert_close(run(model, inputs), dense, 0.03)
    assert fallbacks() == {}
    set_sparse(model, cdf=0.43)
    model.to(torch.float32).to(torch.bfloat16)
    assert inner[0].cdfthreshd.dtype == torch.float32 and float(inner[0].cdfthreshd[0]) == pytest.approx(0.43, abs=1e-7)
    got = run(model, inputs)
    assert got.dtype == torch.bfloat16 and got.isfinite().all() and all(ran_sparse(inner)) and fallbacks() == {}


@pytest.mark.parametrize("name", ["CogVideoX", "Wan"])
def test_autocast(name, set_sparse, fallbacks, assert_close):
    case = CASES[name]
    model, inputs = case.model(), case.inputs(1)
    with torch.autocast("cpu", torch.bfloat16):
        dense = run(model, inputs)
        inner = set_sparse(patch(model), cdf=1.0)
        assert_close(run(model, inputs), dense, 0.03)
    assert all(module.last_density is not None for module in inner) and fallbacks() == {}


class LowRank(nn.Module):
    """A linear layer with a low-rank adapter, as PEFT puts them in."""

    def __init__(self, linear):
        super().__init__()
        self.base_layer = linear
        generator = torch.Generator().manual_seed(0)
        self.lora_A = nn.Parameter(torch.randn(4, linear.in_features, generator=generator) / 4)
        self.lora_B = nn.Parameter(torch.randn(linear.out_features, 4, generator=generator) / 4)

    def forward(self, x):
        return self.base_layer(x) + x @ self.lora_A.T @ self.lora_B.T


class Packed(nn.Module):
    """A linear layer with 8-bit weights, whose dtype says nothing about the activations'."""

    def __init__(self, linear):
        super().__init__()
        self.scale = float(linear.weight.abs().max() / 127)
        self.register_buffer("weight", (linear.weight / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@pytest.mark.parametrize(("name", "layer"), [("CogVideoX", LowRank), ("SD3.5", LowRank), ("Flux", Packed)])
def test_other_linear_layers(name, layer, set_sparse, fallbacks, assert_close):
    """Adapters and quantised weights, put in before and after the patch."""
    case = CASES[name]
    model, inputs = case.model(), case.inputs(1)
    plain = run(model, inputs)
    for attention in attentions(name, model):
        attention.to_q = layer(attention.to_q)
    patch(model)
    for attention in attentions(name, model):
        attention.to_k = layer(attention.to_k)
    inner = set_sparse(model, cdf=1.0)
    got = run(model, inputs)
    assert all(module.last_density is not None for module in inner) and fallbacks() == {}
    dense = run(restore(model), inputs)
    assert_close(got, dense)
    assert not torch.equal(dense, plain)
    assert all(isinstance(attention.to_k, layer) for attention in attentions(name, model))


@pytest.mark.parametrize("name", ["CogVideoX", "Flux", "HunyuanDiT", "SD3", "Wan"])
def test_fused_projections(name, set_sparse, fallbacks, assert_close):
    case = CASES[name]
    model, inputs = case.model(), case.inputs(1)
    model.fuse_qkv_projections()
    expected = run(model, inputs)
    inner = set_sparse(patch(model), cdf=1.0)
    assert_close(run(model, inputs), expected)
    assert all(module.last_density is not None for module in inner) and fallbacks() == {}
    assert torch.equal(run(restore(model), inputs), expected)


@pytest.mark.parametrize("patch_first", [True, False])
def test_offloaded_weights(patch_first, set_sparse, fallbacks):
    case = CASES["Wan"]
    model, inputs = case.model(), case.inputs(1)
    set_sparse(patch(model))
    expected = run(model, inputs)
    offloaded = case.model()
    for step in (
        (patch, lambda m: cpu_offload(m, torch.device("cpu")))
        if patch_first
        else (
            lambda m: cpu_offload(m, torch.device("cpu")),
            patch,
        )
    ):
        step(offloaded)
    inner = set_sparse(offloaded)
    assert next(offloaded.blocks[0].attn1.to_q.parameters()).device.type == "meta"
    assert torch.equal(run(offloaded, inputs), expected)
    assert all(ran_sparse(inner)) and fallbacks() == {}


def test_save_pretrained_writes_the_same_model(tmp_path, set_sparse):
    case = CASES["Flux"]
    model = case.model()
    model.save_pretrained(tmp_path / "before")
    set_sparse(patch(model))
    model.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "after" / file.name).read_bytes()
    again = type(model).from_pretrained(tmp_path / "after")
    assert torch.equal(run(again.eval(), case.inputs(1)), run(restore(model), case.inputs(1)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_runs_dense_with_exact_gradients(checkpointing, set_sparse, fallbacks):
    case = CASES["Wan"]
    model, inputs = case.model().train(), case.inputs(1)
    if checkpointing:
        model.enable_gradient_checkpointing()

    def gradient():
        model.zero_grad()
        with torch.enable_grad():
            run(model, inputs).square().mean().backward()
        return model.blocks[0].attn1.to_q.weight.grad.clone()

    expected = gradient()
    set_sparse(patch(model))
    torch.testing.assert_close(gradient(), expected, rtol=1e-4, atol=1e-7)
    assert ["gradients" in reason for reason in fallbacks()] == [True]


def test_threads_do_not_see_each_others_layers(set_sparse):
    """The replaced attention finds its layer by thread."""
    expected, jobs, results = {}, {}, {}
    for name in ("Wan", "CogVideoX", "Flux"):
        model, inputs = patch(CASES[name].model()), CASES[name].inputs(1)
        set_sparse(model)
        expected[name], jobs[name] = run(model, inputs), (model, inputs)

    def work(name):
        with torch.no_grad():
            results[name] = [run(*jobs[name]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(name,)) for name in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, outputs in results.items():
        assert len(outputs) == 5 and all(torch.equal(out, expected[name]) for out in outputs)


def test_an_exception_leaves_no_layer_behind(set_sparse):
    case = CASES["Wan"]
    model, inputs = patch(case.model()), case.inputs(1)
    set_sparse(model)
    expected = run(model, inputs)
    bad = inputs | {"timestep": torch.full((1,), 500), "hidden_states": inputs["hidden_states"].double()}
    with pytest.raises(RuntimeError, match=r"dtype|type"):
        run(model, bad)
    original = model.blocks[0].attn1.to_out[0]
    model.blocks[0].attn1.to_out[0] = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="shapes"):
        run(model, inputs)
    assert processors._now.inner is None
    model.blocks[0].attn1.to_out[0] = original
    assert torch.equal(run(model, inputs), expected)


# -- attention backends and parallelism of diffusers ------------------------------------------------------------------


def test_attention_backends_of_diffusers(set_sparse, monkeypatch):
    """What is chosen on a patched model reaches the original processors, and dense calls run on it."""
    # Choosing a backend on one model chooses it for the whole process, and reset_attention_backend leaves that so.
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    case = CASES["Flux"]
    model, inputs = patch(case.model()), case.inputs(1)
    model.set_attention_backend("_native_math")
    for attention in attentions("Flux", model):
        assert attention.processor.original._attention_backend == AttentionBackendName._NATIVE_MATH
        assert attention.processor._attention_backend == AttentionBackendName._NATIVE_MATH
    untuned = run(model, inputs)
    for module in set_sparse(model):
        module.mode = "tune"
    assert torch.equal(run(model, inputs), untuned)
    model.reset_attention_backend()
    restore(model)
    assert all(attention.processor._attention_backend is None for attention in attentions("Flux", model))
    assert not hasattr(patch(CASES["CogVideoX"].model()).transformer_blocks[0].attn1.processor, "_attention_backend")


def test_ring_attention_runs_dense_and_is_counted(set_sparse, fallbacks, monkeypatch):
    """Each device sees a part of the keys there; blocks of a part would not be those of the whole."""
    case = CASES["Wan"]
    model, inputs = patch(case.model()), case.inputs(1)
    expected = run(model, inputs)
    inner = set_sparse(model)
    parallel = SimpleNamespace(ring_degree=2, ulysses_degree=1)
    config = SimpleNamespace(context_parallel_config=parallel)  # of diffusers, made by enable_parallelism
    dispatched = processors.dispatch_attention_fn
    seen = []

    def dispatch(*args, parallel_config=None, **options):
        seen.append(parallel_config)
        return dispatched(*args, **options)

    monkeypatch.setattr(processors, "dispatch_attention_fn", dispatch)
    for attention in attentions("Wan", model):
        attention.processor._parallel_config = config
        assert attention.processor.original._parallel_config is config
    assert torch.equal(run(model, inputs), expected)
    assert seen == [config, config]
    assert [module.last_density for module in inner] == [None, None]
    assert ["ring attention" in reason for reason in fallbacks()] == [True]


# -- processors set by others -----------------------------------------------------------------------------------------


def test_a_processor_set_after_the_patch_is_reported_and_kept(set_sparse):
    model = CASES["Flux"].model()
    set_sparse(patch(model))
    own = FluxAttnProcessor()
    model.single_transformer_blocks[0].attn.set_processor(own)
    result = verify(model)
    assert not result.ok and [row.status for row in result.layers] == ["sparse", "MISSING"]
    restore(model)
    assert model.single_transformer_blocks[0].attn.processor is own
    set_sparse(patch(model))
    model.single_transformer_blocks[0].attn.set_processor(own)
    assert verify(patch(model)).ok  # patched again, with the thresholds that it had
    assert model.single_transformer_blocks[0].attn.inner_attention.mode == "sparse"
    assert restore(model).single_transformer_blocks[0].attn.processor is own


class Weighted(nn.Module):
    """A processor with weights, as image-prompt adapters are."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def __call__(self, *args, **kwargs):
        hidden = FluxAttnProcessor()(*args, **kwargs)
        return self.scale * hidden if isinstance(hidden, torch.Tensor) else tuple(self.scale * x for x in hidden)


def test_a_processor_set_after_the_patch_is_made_sparse_at_the_next_call_or_counted(set_sparse, fallbacks):
    case = CASES["Flux"]
    model, inputs = case.model(), case.inputs()
    inner = set_sparse(patch(model))
    expected = run(model, inputs)
    own = FluxAttnProcessor()
    for attention in attentions("Flux", model):
        attention.set_processor(own)
    assert torch.equal(run(model, inputs), expected) and verify(model).ok and fallbacks() == {}
    model.transformer_blocks[0].attn.set_processor(Weighted())
    inner[0].last_density = None
    run(model, inputs)
    assert inner[0].last_density is None and verify(model).replaced == 1
    (reason,) = fallbacks()
    assert "after the patch a layer was given another processor, and Weighted has weights of its own" in reason
    restore(model)
    assert isinstance(model.transformer_blocks[0].attn.processor, Weighted)
    assert model.single_transformer_blocks[0].attn.processor is own


@pytest.mark.parametrize("name", ["CogVideoX", "HunyuanDiT", "SD3"])
def test_fusing_after_the_patch(name, set_sparse, fallbacks, assert_close):
    """In any order with restore and unfusing; diffusers keeps our processors and brings them back."""
    case = CASES[name]
    model, inputs = case.model(), case.inputs()
    dense = run(model, inputs)
    inner = set_sparse(patch(model))
    sparse = run(model, inputs)
    model.fuse_qkv_projections()
    assert_close(run(model, inputs), sparse)
    assert all(ran_sparse(inner)) and verify(model).ok
    model.unfuse_qkv_projections()
    assert_close(run(model, inputs), sparse)
    model.fuse_qkv_projections()
    restore(model)
    model.unfuse_qkv_projections()  # brings our processors back, whose attention is gone
    assert_close(run(model, inputs), dense)
    assert fallbacks() == {}


def test_an_image_prompt_adapter_loaded_after_the_patch(set_sparse, fallbacks):
    case = CASES["Flux"]
    width, joint = 24, 32
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    prompt = {f"0.to_{name}_ip.{kind}": randn(*shape) for name in "kv" for kind, shape in
              (("weight", (128, joint)), ("bias", (128,)))}  # fmt: skip
    image = {"proj.weight": randn(joint * 4, width), "proj.bias": randn(joint * 4)}
    image |= {"norm.weight": torch.ones(joint), "norm.bias": torch.zeros(joint)}
    adapter = [{"ip_adapter": prompt, "image_proj": image}]
    inputs = case.inputs()
    inputs["joint_attention_kwargs"] = {"ip_adapter_image_embeds": [randn(1, 1, width)]}

    def output(model):  # the model empties the dictionary that it gets
        return run(model, inputs | {"joint_attention_kwargs": dict(inputs["joint_attention_kwargs"])})

    plain = case.model()
    plain._load_ip_adapter_weights(adapter)  # what FluxPipeline.load_ip_adapter calls
    expected = output(plain)
    model = patch(case.model())
    model._load_ip_adapter_weights(adapter)
    assert torch.equal(output(model), expected)
    inner = set_sparse(model)
    output(model)
    assert [module.last_density is not None for module in inner] == [False, True]
    assert ["has weights of its own" in reason for reason in fallbacks()] == [True]


# -- others that look at attention calls ------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["hook first", "patch first"])
def test_perturbed_attention_guidance_acts_and_is_counted(order, set_sparse, fallbacks, assert_close):
    case = CASES["QwenImage"]
    perturbed = LayerSkipConfig([1], "transformer_blocks", False, True, False)  # V in place of attention in one layer
    model, inputs = case.model(), case.inputs()
    apply_layer_skip(model, perturbed)
    expected = run(model, inputs)
    model = case.model()
    plain = run(model, inputs)
    steps = [lambda: apply_layer_skip(model, perturbed), lambda: patch(model)]
    for step in steps if order == "hook first" else steps[::-1]:
        step()
    assert torch.equal(run(model, inputs), expected) and not torch.equal(expected, plain)
    inner = set_sparse(model, cdf=1.0)
    assert_close(run(model, inputs), expected)
    assert [module.last_density is not None for module in inner] == [True, False]
    assert [("AttentionScoreSkipFunctionMode" in reason, count) for reason, count in fallbacks().items()] == [(True, 1)]


def test_a_function_put_in_place_of_torchs_attention_is_used_and_counted(set_sparse, fallbacks, monkeypatch):
    case = CASES["CogVideoX"]
    model, inputs = patch(case.model()), case.inputs()
    set_sparse(model)
    sparse, attention = run(model, inputs), nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", lambda q, k, v, *_, **__: attention(q, k, 2 * v))
    assert not torch.equal(run(model, inputs), sparse)
    assert [("was replaced by another function" in reason, n) for reason, n in fallbacks().items()] == [(True, 2)]
    monkeypatch.undo()
    with torch.device("cpu"):  # a function mode too, but one that leaves attention alone
        assert torch.equal(run(model, inputs), sparse)
    assert sum(fallbacks().values()) == 2


def test_thresholds_of_a_compiled_model_load_into_a_plain_one(set_sparse):
    model = patch(CASES["Wan"].model())
    set_sparse(model)
    compiled = torch.compile(model, backend="eager")  # nothing is compiled before the first call
    state = autotune.extract_sparse_attention_state_dict(compiled)
    assert state["_metadata"]["model_class"] == "WanTransformer3DModel"
    assert {key.split(".")[0] for key in state} == {"blocks", "_metadata"}
    fresh = autotune.load_sparse_attention_state_dict(patch(CASES["Wan"].model()), state)
    assert {module.mode for module in fresh.modules() if isinstance(module, SparseAttention)} == {"sparse"}
