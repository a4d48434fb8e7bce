"""What is special to one family: masks, text, two transformers, cross-attention, files of the original SpargeAttn."""

from __future__ import annotations

import inspect
import types

import pytest
import torch
from families import CASES, run
from pipelines import generate
from torch import nn

import autotune
from autotune import Grid, SparseAttention
from modify_model import families, patch, restore, verify
from modify_model.cli.tiny import TINY
from modify_model.hunyuan3d import Hunyuan3DDiT
from modify_model.modify_cogvideo import set_spas_sage_attn_cogvideox
from modify_model.modify_diffusers import diffusers_family
from modify_model.modify_flux import set_spas_sage_attn_flux
from modify_model.modify_hunyuan import set_spas_sage_attn_hunyuan
from modify_model.modify_wan import set_spas_sage_attn_wan

pytestmark = [
    pytest.mark.filterwarnings("ignore:spas_attn. running exact dense:RuntimeWarning"),
    pytest.mark.usefixtures("no_grad"),
]

LOOSE = dict(l1=0.4, pv_l1=0.5, tail=None)
GRID = Grid(cdf=(0.3, 0.6, 0.9), sim=(-1.0,), pv=(50.0,))


# -- HunyuanVideo -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cdf", "batch"), [(1.0, 2), (0.4, 1), (0.4, 2)])
def test_hunyuan_video_honours_its_mask_and_runs_sparse(cdf, batch, set_sparse, sparse_calls, fallbacks):
    case = CASES["HunyuanVideo"]
    model, inputs = case.model(), case.inputs(batch)
    dense = run(model, inputs)
    inner = set_sparse(patch(model), cdf=cdf)
    got = run(model, inputs)
    assert len(sparse_calls) == 2 and fallbacks() == {}
    for call, _ in sparse_calls:
        assert call.q_len == call.k_len == 576
        padding = call.key_mask
        assert padding.shape == (batch, 576) and int((~padding[0]).sum()) == 16
        assert batch == 1 or bool(padding[1].all())
    assert all(float(module.last_density.mean()) < (1.01 if cdf == 1 else 0.9) for module in inner)
    # What stands in the padded text moves nothing, not by a bit.
    changed = inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"].clone()}
    changed["encoder_hidden_states"][0, 48:] = 7.0
    assert torch.equal(run(model, changed), got)
    # And what stands in front of it does.
    changed["encoder_hidden_states"][0, 40:48] = 7.0
    assert not torch.equal(run(model, changed)[0], got[0])
    error = float((got - dense).norm() / dense.norm())
    assert error < 1e-5 if cdf == 1 else error > 1e-3


def test_token_refiners_stay_as_they_are():
    model = CASES["HunyuanVideo"].model()
    refiners = {path: id(p) for path, p in model.attn_processors.items() if "refiner" in path}
    assert refiners
    patch(model)
    assert refiners == {path: id(p) for path, p in model.attn_processors.items() if "refiner" in path}


# -- Mochi and SD3.5 --------------------------------------------------------------------------------------------------


def test_mochi_drops_the_padded_text_of_each_sample(set_sparse, sparse_calls, fallbacks):
    case = CASES["Mochi"]
    model, inputs = patch(case.model()), case.inputs(2)
    set_sparse(model)
    run(model, inputs)
    lengths = inputs["encoder_attention_mask"].sum(1).tolist()
    assert lengths == [24, 32] and fallbacks() == {}
    assert [(call.k_len, call.text) for call, _ in sparse_calls] == [
        (768 + length, ((768, 768 + length),)) for _ in case.layers for length in lengths
    ]


def test_sd35_dual_blocks_have_two_attentions(set_sparse, sparse_calls):
    case = CASES["SD3.5"]
    model = patch(case.model())
    set_sparse(model)
    run(model, case.inputs())
    assert [(call.k_len, call.text) for call, _ in sparse_calls] == [
        (608, ((576, 608),)),
        (576, ()),
        (608, ((576, 608),)),
    ]
    processors = [block.attn.processor for block in restore(model).transformer_blocks]
    assert processors[0] is model.transformer_blocks[0].attn2.processor  # diffusers gives both the same


# -- Flux -------------------------------------------------------------------------------------------------------------


def test_flux_dual_and_single_blocks_never_mix(set_sparse):
    model = patch(CASES["Flux"].model())
    for value, module in zip((0.25, 0.75), set_sparse(model), strict=True):
        module.tuned.threshold.fill_(value)
    state = autotune.extract_sparse_attention_state_dict(model)
    fresh = patch(CASES["Flux"].model())
    autotune.load_sparse_attention_state_dict(fresh, dict(reversed(state.items())))
    assert float(fresh.transformer_blocks[0].attn.inner_attention.cdfthreshd[0]) == 0.25
    assert float(fresh.single_transformer_blocks[0].attn.inner_attention.cdfthreshd[0]) == 0.75
    one_kind = {key: value for key, value in state.items() if not key.startswith("transformer_blocks.")}
    with pytest.raises(ValueError, match=r"not in the file, first 'transformer_blocks\.0\.attn"):
        autotune.load_sparse_attention_state_dict(fresh, one_kind)


def test_flux_single_blocks_know_the_text_of_every_call(set_sparse, sparse_calls):
    case = CASES["Flux"]
    model = set_spas_sage_attn_flux(case.model(), layer_range=(1, 2))  # only the single-stream block
    set_sparse(model)
    inputs = case.inputs(1)
    for length in (64, 32, 64):
        part = {"encoder_hidden_states": inputs["encoder_hidden_states"][:, :length], "txt_ids": torch.zeros(length, 3)}
        run(model, inputs | part)
    assert [call.text for call, _ in sparse_calls] == [((0, 64),), ((0, 32),), ((0, 64),)]
    assert [row.status for row in verify(model).layers] == ["left", "sparse"]


@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (2, 1), (2, 2)])  # one row of the mask serves the whole batch
@pytest.mark.parametrize("shape", ["[B, L]", "[B, 1, 1, L]"])
def test_a_padding_mask_of_the_user_is_honoured(shape, batch, rows, set_sparse, sparse_calls, fallbacks, assert_close):
    case = CASES["Flux"]
    model, inputs = case.model(), case.inputs(batch)
    mask = torch.ones(rows, case.tokens, dtype=torch.bool)
    mask[-1, 20:64] = False
    given = mask if shape == "[B, L]" else mask[:, None, None]
    inputs["joint_attention_kwargs"] = {"attention_mask": given}
    expected = run(model, inputs)
    set_sparse(patch(model), cdf=1.0)
    assert_close(run(model, inputs), expected)
    assert len(sparse_calls) == 2
    assert all(torch.equal(call.key_mask, mask.expand(batch, -1)) for call, _ in sparse_calls)
    assert fallbacks() == {}


@pytest.mark.parametrize(
    ("kind", "batch"),
    [("[1, 1, L, L]", 1), ("[L, L]", 1), ("[L, L]", 2), ("[1, L, L]", 2), ("[B, H, 1, L]", 2), ("additive", 1)],
)
def test_other_masks_run_dense_and_are_counted(kind, batch, set_sparse, sparse_calls, fallbacks):
    case = CASES["Flux"]
    model, inputs = case.model(), case.inputs(batch)
    seen = torch.rand(1, 1, case.tokens, case.tokens, generator=torch.Generator().manual_seed(0)) > 0.2
    mask = {
        "[1, 1, L, L]": seen,
        "[L, L]": seen[0, 0],
        "[1, L, L]": seen[0],
        "[B, H, 1, L]": seen[0, 0, : 2 * batch, None].unflatten(0, (batch, 2)),
        "additive": torch.where(seen, 0.0, -1e4),
    }[kind]
    inputs["joint_attention_kwargs"] = {"attention_mask": mask}
    expected = run(model, inputs)
    set_sparse(patch(model))
    assert torch.equal(run(model, inputs), expected)
    assert sparse_calls == []
    assert [("mask" in reason, count) for reason, count in fallbacks().items()] == [(True, 2)]


# -- cross-attention, two transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Wan", "Wan I2V", "HunyuanDiT", "LTX-Video"])
def test_cross_attention_is_never_touched(name, set_sparse, sparse_calls):
    case = CASES[name]
    model = case.model()
    processors = {path: id(p) for path, p in model.attn_processors.items() if ".attn2." in path}
    assert len(processors) == len(case.layers)
    set_sparse(patch(model))
    run(model, case.inputs(1))
    assert [(call.q_len, call.k_len) for call, _ in sparse_calls] == [(case.tokens, case.tokens)] * len(case.layers)
    assert processors == {path: id(p) for path, p in model.attn_processors.items() if ".attn2." in path}


def test_wan_2_2_with_two_transformers(tmp_path, capsys):
    pipe = TINY["Wan2.2"].make()
    dense = generate(pipe, "Wan2.2")
    assert patch(pipe, **LOOSE) is pipe
    paths = [row.path for row in verify(pipe).layers]
    assert paths == [f"{prefix}blocks.{i}.attn1" for prefix in ("", "transformer_2.") for i in (0, 1)]
    assert "4/4 attention layers replaced" in capsys.readouterr().out
    assert torch.equal(generate(pipe, "Wan2.2"), dense)
    with autotune.calibrate(pipe, grid=GRID, query_blocks=2) as calibration:
        for seed in calibration.prompts([0, 1]):
            generate(pipe, "Wan2.2", seed=seed)
    assert [entry["path"] for entry in calibration.statistics] == [f"{path}.inner_attention" for path in paths]
    calibration.save(tmp_path / "tuned.pt")
    expected = generate(pipe, "Wan2.2")
    fresh = TINY["Wan2.2"].make()
    assert autotune.load_sparse_attention_state_dict(patch(fresh), tmp_path / "tuned.pt") is fresh
    with autotune.record_density(fresh) as recorded:
        assert torch.equal(generate(fresh, "Wan2.2"), expected) and not torch.equal(expected, dense)
    assert list(recorded.per_layer) == [f"{path}.inner_attention" for path in paths]
    assert all(density < 1 for density in recorded.per_layer.values())
    with pytest.raises(ValueError, match=r"2 layers of the file are not in the model, first 'transformer_2\.blocks"):
        autotune.load_sparse_attention_state_dict(patch(TINY["Wan"].make()), tmp_path / "tuned.pt")
    restore(fresh)
    assert torch.equal(generate(fresh, "Wan2.2"), dense)


# -- CogVideoX --------------------------------------------------------------------------------------------------------


def test_files_of_the_original_map_onto_cogvideox(tmp_path, fallbacks):
    """The original's files for CogVideoX-2B: 30 layers of 30 heads, half precision, no metadata."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for layer in range(30):
        prefix = f"transformer_blocks.{layer}.attn1.inner_attention"
        state |= {
            f"{prefix}.is_sparse": torch.rand(30, generator=generator) > 0.1,
            f"{prefix}.cdfthreshd": (0.3 + 0.5 * torch.rand(30, generator=generator)).half(),
            f"{prefix}.simthreshd1": (0.2 * torch.rand(30, generator=generator) - 0.5).half(),
            f"{prefix}.simthreshd2": torch.zeros(30).half(),
            f"{prefix}.pvthreshd": torch.full((30,), 20.0).half(),
        }
    torch.save(state, tmp_path / "original.pt")
    small = dict(num_layers=30, num_attention_heads=30, attention_head_dim=16, use_rotary_positional_embeddings=False)
    model = set_spas_sage_attn_cogvideox(CASES["CogVideoX"].model(**small))
    autotune.load_sparse_attention_state_dict(model, tmp_path / "original.pt")
    inner = [block.attn1.inner_attention for block in model.transformer_blocks]
    for layer, module in enumerate(inner):
        entry = state[f"transformer_blocks.{layer}.attn1.inner_attention.cdfthreshd"]
        assert torch.equal(module.cdfthreshd, entry.float()) and module.heads == 30
        assert (module.selector.block_q, module.selector.block_k) == (128, 64)
        module.record_density = True
    inputs = CASES["CogVideoX"].inputs(1) | {"image_rotary_emb": None}
    inputs["hidden_states"] = inputs["hidden_states"][:, :2]
    assert run(model, inputs).isfinite().all() and fallbacks() == {}
    for layer, module in enumerate(inner):
        assert tuple(module.last_density.shape) == (1, 30)
        sparse = state[f"transformer_blocks.{layer}.attn1.inner_attention.is_sparse"]
        assert (module.last_density[0, ~sparse] == 1).all() and float(module.last_density[0, sparse].mean()) < 0.9
    with pytest.raises(ValueError, match="28 layers of the file are not in the model"):
        autotune.load_sparse_attention_state_dict(patch(CASES["CogVideoX"].model()), tmp_path / "original.pt")


# -- the functions of the families, and their registry ----------------------------------------------------------------

OWN = {
    "CogVideoX": set_spas_sage_attn_cogvideox,
    "Flux": set_spas_sage_attn_flux,
    "HunyuanVideo": set_spas_sage_attn_hunyuan,
    "HunyuanDiT": set_spas_sage_attn_hunyuan,
    "Wan": set_spas_sage_attn_wan,
}


@pytest.mark.parametrize("name", OWN)
def test_functions_of_the_families(name, capsys):
    function = OWN[name]
    assert list(inspect.signature(function).parameters) == ["transformer", "l1", "pv_l1", "layer_range", "verbose"]
    assert (
        function.__name__.startswith("set_spas_sage_attn_") and type(CASES[name].model()).__name__ in function.__doc__
    )
    model = CASES[name].model()
    assert function(model, 0.03, 0.04, layer_range=(1, 2), verbose=True) is model
    assert f"[2/{len(CASES[name].layers)}] {CASES[name].layers[1]}: sparse attention" in capsys.readouterr().out
    inner = [module for module in model.modules() if isinstance(module, SparseAttention)]
    assert [(module.l1, module.pv_l1, module.layer_idx) for module in inner] == [(0.03, 0.04, 1)]
    wrong = CASES["LTX-Video"].model()
    with pytest.raises(ValueError, match=r"model must be built on .*, got LTXVideoTransformer3DModel"):
        function(wrong)
    with pytest.raises(ValueError, match="has no adapter"):
        function(nn.Linear(2, 2))
    assert verify(wrong).replaced == 0
    pipe = types.SimpleNamespace(transformer=CASES[name].model())
    with pytest.raises(ValueError, match=r"transformer must be .*, got SimpleNamespace; .*patch\(pipeline\)"):
        function(pipe)
    assert verify(patch(pipe)).ok


def test_the_registry_names_every_model_class():
    families.find_family(Hunyuan3DDiT(hidden_size=32, num_heads=1, depth=1, depth_single_blocks=1))
    for case in CASES.values():
        families.find_family(case.model())
    known = {name for family in families._families.values() for name in family.model_classes}
    assert families.ADAPTERS.keys() - known == {"LlamaModel"} - known


class DerivedBlock(torch.nn.Module):
    """A block of a user's own model, with an attention of diffusers."""

    def __init__(self):
        from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0

        super().__init__()
        self.attention = Attention(32, heads=2, dim_head=16, processor=JointAttnProcessor2_0(), out_dim=32)
        self.other = None

    def forward(self, x):
        return x + self.attention(x)


class UsersTransformer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([DerivedBlock(), DerivedBlock()])

    def forward(self, hidden_states, timestep=None):
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


def test_a_row_of_the_users_own(set_sparse, monkeypatch):
    monkeypatch.setattr(families, "_families", dict(families._families))
    diffusers_family("Users", "UsersTransformer", {"DerivedBlock.attention": None, "DerivedBlock.other": "text last"})
    torch.manual_seed(0)
    model, x = UsersTransformer().eval(), torch.randn(1, 400, 32)
    expected = model(x)
    patch(model)
    assert [row.path for row in verify(model).layers] == ["blocks.0.attention", "blocks.1.attention"]
    assert torch.equal(model(x), expected)
    inner = set_sparse(model, cdf=0.1)
    assert not torch.equal(model(x), expected)
    assert all(float(module.last_density.mean()) < 1 for module in inner)
