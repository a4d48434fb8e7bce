"""The decoder of shape models: against a second implementation, key selection, meshes; and loading of weights."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hunyuan3d_reference import gelu, interleaved, layer_norm, linear, softmax_attention
from torch import Tensor

from modify_model.hunyuan3d import pipeline as pipeline_module
from modify_model.hunyuan3d.dit import Hunyuan3DDiT
from modify_model.hunyuan3d.mesh import Mesh, mesh_of
from modify_model.hunyuan3d.pipeline import load
from modify_model.hunyuan3d.plain import HunYuanDiTPlain
from modify_model.hunyuan3d.tiny import NAMES, tiny
from modify_model.hunyuan3d.vae import ShapeVAE
from modify_model.hunyuan3d.variants import denoiser_options, split_modules
from modify_model.hunyuan3d.volume import KeySelection, decode_volume, similar_together

HEADS, LATENTS, FREQUENCIES = 2, 192, 3
KEYS = {  # of the published weights, decoder only
    "post_kl.weight", "transformer.resblocks.0.attn.c_qkv.weight", "transformer.resblocks.0.attn.c_proj.bias",
    "transformer.resblocks.0.attn.attention.q_norm.weight", "transformer.resblocks.0.attn.attention.k_norm.bias",
    "transformer.resblocks.0.ln_1.weight", "transformer.resblocks.0.ln_2.weight",
    "transformer.resblocks.0.mlp.c_fc.weight", "transformer.resblocks.0.mlp.c_proj.weight",
    "geo_decoder.query_proj.weight", "geo_decoder.cross_attn_decoder.attn.c_q.weight",
    "geo_decoder.cross_attn_decoder.attn.c_kv.weight", "geo_decoder.cross_attn_decoder.attn.c_proj.weight",
    "geo_decoder.cross_attn_decoder.ln_1.weight", "geo_decoder.cross_attn_decoder.ln_2.weight",
    "geo_decoder.cross_attn_decoder.ln_3.weight", "geo_decoder.cross_attn_decoder.mlp.c_fc.weight",
    "geo_decoder.ln_post.weight", "geo_decoder.output_proj.weight",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USE_SAGEATTN", "CA_USE_SAGEATTN"):
        monkeypatch.delenv(name, raising=False)


def decoder(**changes: Any) -> ShapeVAE:
    options: dict[str, Any] = dict(width=32, heads=HEADS, num_decoder_layers=2, num_freqs=FREQUENCIES, scale_factor=0.9)
    torch.manual_seed(0)
    vae = ShapeVAE(LATENTS, **(options | changes)).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if parameter.dim() == 1:
            parameter.copy_((1.0 if name.endswith("weight") else 0.0) + 0.2 * torch.randn_like(parameter))
    vae.geo_decoder.cross_attn_decoder.attn.attention.q_norm.weight.mul_(3)  # peaked, as trained attention is
    return vae


def latents(seed: int = 1) -> Tensor:
    return torch.randn(1, LATENTS, 64, generator=torch.Generator().manual_seed(seed))


def field_by_hand(vae: ShapeVAE, row: Tensor, points: Tensor) -> Tensor:
    """The field ``[N]`` at points ``[N, 3]`` from latents ``[L, 64]``, in float64."""
    s = {name: value.double() for name, value in vae.state_dict().items()}

    def attention(prefix: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        norms = f"{prefix}.attention"
        return softmax_attention(layer_norm(q, s, f"{norms}.q_norm"), layer_norm(k, s, f"{norms}.k_norm"), v)

    x = linear(s, "post_kl", row.double() / 0.9)
    for i in range(2):
        b = f"transformer.resblocks.{i}"
        parts = interleaved([linear(s, f"{b}.attn.c_qkv", layer_norm(x, s, f"{b}.ln_1"))], HEADS)
        outs = [attention(f"{b}.attn", *one.chunk(3, -1)) for (one,) in parts]
        x = x + linear(s, f"{b}.attn.c_proj", torch.cat(outs, -1))
        x = x + linear(s, f"{b}.mlp.c_proj", gelu(linear(s, f"{b}.mlp.c_fc", layer_norm(x, s, f"{b}.ln_2"))))
    b = "geo_decoder.cross_attn_decoder"
    waves = [math.pow(2, i) * points[:, axis] for axis in range(3) for i in range(FREQUENCIES)]
    embedded = torch.stack([*points.T, *(w.sin() for w in waves), *(w.cos() for w in waves)], -1).double()
    p = linear(s, "geo_decoder.query_proj", embedded)
    q = linear(s, f"{b}.attn.c_q", layer_norm(p, s, f"{b}.ln_1"))
    kv = interleaved([linear(s, f"{b}.attn.c_kv", layer_norm(x, s, f"{b}.ln_2"))], HEADS)
    outs = [
        attention(f"{b}.attn", one, *pair.chunk(2, -1)) for one, (pair,) in zip(q.chunk(HEADS, -1), kv, strict=True)
    ]
    p = p + linear(s, f"{b}.attn.c_proj", torch.cat(outs, -1))
    p = p + linear(s, f"{b}.mlp.c_proj", gelu(linear(s, f"{b}.mlp.c_fc", layer_norm(p, s, f"{b}.ln_3"))))
    last = layer_norm(p, s, "geo_decoder.ln_post", eps=1e-5)
    return linear(s, "geo_decoder.output_proj", last)[:, 0]


def test_names() -> None:
    assert decoder().state_dict().keys() >= KEYS


def test_volume_equals_the_reference() -> None:
    vae, row = decoder(), latents()
    volume = decode_volume(vae, row, 4, bounds=0.8, chunk=37)
    axis = torch.linspace(-0.8, 0.8, 5)
    points = torch.tensor([[x, y, z] for x in axis.tolist() for y in axis.tolist() for z in axis.tolist()])
    expected = field_by_hand(vae, row[0], points).reshape(5, 5, 5)
    torch.testing.assert_close(volume[0].double(), expected, rtol=1e-4, atol=1e-5)


def test_keys_of_the_latents_are_computed_once() -> None:
    vae, calls = decoder(), []
    vae.geo_decoder.cross_attn_decoder.attn.c_kv.register_forward_hook(lambda *_: calls.append(1))
    decode_volume(vae, latents(), 6, chunk=20)
    assert len(calls) == 1


@pytest.mark.parametrize("whole_blocks", [True, False])
def test_key_selection(whole_blocks: bool) -> None:
    """All keys: exact. Fewer: an error that falls with their number."""
    vae, row = decoder(), latents()
    dense = decode_volume(vae, row, 9)

    def error(keep: int | None) -> float:
        chosen = KeySelection(cells=3, every=4, keep=keep, whole_blocks=whole_blocks)
        return float((decode_volume(vae, row, 9, selection=chosen) - dense).norm() / (dense - dense.mean()).norm())

    assert error(LATENTS) < 1e-5
    assert 1e-5 < error(128) < error(64) < 1


def test_single_keys_are_those_with_the_largest_mean_score() -> None:
    """FlashVDM's rule, once by hand: one cell, every third point, per head."""
    vae, row, keep = decoder(), latents(), 50
    got = decode_volume(vae, row, 3, selection=KeySelection(1, every=3, keep=keep, whole_blocks=False))
    axis = torch.linspace(-1.01, 1.01, 4)
    points = torch.cartesian_prod(axis, axis, axis)[None]
    k, v = vae.geo_decoder.keys(vae(row))
    x, q = vae.geo_decoder.queries(points)
    outs = []
    for h in range(HEADS):
        scores = torch.stack([k[0, h] @ q[0, h, i] for i in range(0, 64, 3)]).mean(0)
        best = scores.argsort(descending=True)[:keep]
        outs.append(softmax_attention(q[0, h], k[0, h][best], v[0, h][best]))
    expected = vae.geo_decoder.field(x, torch.stack(outs)[None])
    torch.testing.assert_close(got.reshape(-1), expected[0], rtol=1e-4, atol=1e-5)


def test_published_numbers_of_keys() -> None:
    assert [KeySelection().kept(n) for n in (3072, 512, 4096, 2)] == [1024, 256, 1365, 1]
    assert KeySelection(keep=70).kept(64) == 64
    for name in ("cells", "every", "keep"):
        with pytest.raises(ValueError, match=f"{name} must be 1 or more, got 0"):
            KeySelection(**{name: 0})


def test_similar_keys_stand_together() -> None:
    centres = 4 * torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    which = torch.arange(512).remainder(8)
    x = centres[which] + 0.1 * torch.randn(512, 16, generator=torch.Generator().manual_seed(1))
    order = similar_together(x, 64)
    assert torch.equal(order.sort().values, torch.arange(512))
    assert all(len(block.unique()) == 1 for block in which[order].split(64))
    assert torch.equal(similar_together(x[:300], 64).sort().values, torch.arange(300)), "any length"


@pytest.mark.parametrize(
    ("options", "message"), [(dict(resolution=0), "resolution"), (dict(chunk=0), "chunk"), (dict(bounds=0), "bounds")]
)
def test_bad_volumes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_volume(decoder(), latents(), **options)
    with pytest.raises(ValueError, match=r"latents must be \[B, L, 64\]"):
        decode_volume(decoder(), torch.zeros(1, 5, 63))


def test_cross_attention_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """CA_USE_SAGEATTN chooses it for the points alone; NaN is repeated exactly, once and for all."""
    module: Any = types.ModuleType("sageattention")
    calls: list[int] = []

    def sageattn(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        calls.append(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v) * torch.nan

    module.sageattn = sageattn
    monkeypatch.setitem(sys.modules, "sageattention", module)
    exact = decode_volume(decoder(), latents(), 4)
    monkeypatch.setenv("CA_USE_SAGEATTN", "1")
    vae = decoder()
    assert (vae.engine, vae.cross_engine) == ("sdpa", "sage")
    with pytest.warns(RuntimeWarning, match="volume decoder.*inf or NaN"):
        torch.testing.assert_close(decode_volume(vae, latents(), 4, chunk=25), exact)
    assert calls == [25], "one chunk; exact from then on"
    torch.testing.assert_close(decode_volume(vae, latents(), 4), exact)


def sphere(n: int = 21) -> Tensor:
    axis = torch.linspace(-1, 1, n)
    x, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    return 0.5 - (x**2 + y**2 + (z / 1.5) ** 2).sqrt()


def test_mesh_of_an_ellipsoid() -> None:
    mesh = mesh_of(sphere(), bounds=1.0)
    assert np.abs(mesh.vertices).max(0) == pytest.approx([0.5, 0.5, 0.75], abs=0.01)
    corners = mesh.vertices[mesh.faces].astype(np.float64)
    volume = (np.cross(corners[:, 0], corners[:, 1]) * corners[:, 2]).sum() / 6
    assert volume == pytest.approx(4 / 3 * math.pi * 0.5 * 0.5 * 0.75, rel=0.03), "positive: faces look outwards"


@pytest.mark.parametrize("suffix", [".glb", ".obj"])
def test_mesh_files(suffix: str, tmp_path: Path) -> None:
    trimesh = pytest.importorskip("trimesh")
    mesh = mesh_of(sphere())
    read = trimesh.load(mesh.save(tmp_path / "new" / f"shape{suffix}"), force="mesh")
    assert len(read.faces) == pytest.approx(len(mesh.faces), rel=0.02)
    assert read.bounds == pytest.approx(np.array([mesh.vertices.min(0), mesh.vertices.max(0)]), abs=1e-4)


def test_volumes_without_a_mesh(tmp_path: Path) -> None:
    for volume, message in (
        (torch.ones(5, 5, 5), "there is no surface: the field goes from 1 to 1"),
        (torch.full((5, 5, 5), torch.nan), "inf or NaN: decode it again with exact attention"),
        (torch.ones(5, 5), r"\[n, n, n\]"),
    ):
        with pytest.raises(ValueError, match=message):
            mesh_of(volume)
    with pytest.raises(ValueError, match="written as .glb, .obj"):
        Mesh(np.zeros((3, 3)), np.zeros((1, 3), int)).save(tmp_path / "shape.txt")


def state_of(name: str) -> dict[str, Tensor]:
    made = tiny(name)
    parts = {"model": made.model, "vae": made.vae}
    return {f"{part}.{key}": value for part, module in parts.items() for key, value in module.state_dict().items()}


def nested(state: dict[str, Tensor]) -> dict[str, Any]:
    """As checkpoints hold it: a dictionary for each module."""
    parts: dict[str, Any] = {"model": {}, "vae": {}}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        parts[part][rest] = value
    return parts


def comfys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With ComfyUI's prefix of the denoiser."""
    return {f"model.diffusion_{key}" if key.startswith("model.") else key: value for key, value in state.items()}


PREFIXED: dict[str, Any] = {
    "as published": lambda state: state,
    "ComfyUI": comfys,
    "training": lambda state: {"state_dict": {f"_forward_module.{key}": value for key, value in state.items()}},
    "nested": nested,
    "with an encoder": lambda state: (
        state | {"vae.encoder.x.weight": torch.zeros(1), "vae.pre_kl.bias": torch.zeros(1)}
    ),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", PREFIXED)
def test_weights_are_recognised(name: str, form: str, tmp_path: Path) -> None:
    torch.save(PREFIXED[form](state_of(name)), tmp_path / "model.ckpt")
    loaded, made = load(tmp_path), tiny(name)
    assert type(loaded.model) is (HunYuanDiTPlain if name == "2.1" else Hunyuan3DDiT)
    assert loaded.model.guidance_embed is (name == "turbo")
    x, t = torch.randn(1, 5, 64), torch.full((1,), 0.4)
    contexts = {"main": torch.randn(1, 3, loaded.model.context_dim)}
    options = {"guidance": t} if name == "turbo" else {}
    assert torch.equal(loaded.model(x, t, contexts, **options), made.model(x, t, contexts, **options))
    loaded.vae.scale_factor = 1.0
    assert torch.equal(loaded.vae(x), made.vae(x))


def test_published_facts(tmp_path: Path) -> None:
    for name, latents_of, factor in (("2.0", 3072, 0.9990943042622529), ("2.1", 4096, 1.0039506158752403)):
        torch.save(state_of(name), tmp_path / "model.ckpt")
        loaded = load(tmp_path)
        assert (loaded.num_latents, loaded.vae.scale_factor, loaded.sampler) == (latents_of, factor, "flow")
    kind, options = denoiser_options(dict(Hunyuan3DDiT(hidden_size=64, num_heads=1, depth=8).state_dict()))
    assert pipeline_module.published(kind, options).num_latents == 512
    for config, sampler in (
        ("ConsistencyFlowMatchEulerDiscreteScheduler", "consistency"),
        ("FlowMatchEulerDiscrete", "flow"),
    ):
        (tmp_path / "config.yaml").write_text(f"scheduler:\n  target: hy3dgen.{config}\n")
        assert load(tmp_path).sampler == sampler
    assert load(tmp_path, sampler="consistency").sampler == "consistency"


def test_places_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tencent" / "Hunyuan3D-2" / "hunyuan3d-dit-v2-0-turbo"
    folder.mkdir(parents=True)
    from safetensors.torch import save_file

    save_file(state_of("turbo"), folder / "model.fp16.safetensors")
    monkeypatch.setenv("HY3DGEN_MODELS", str(tmp_path))
    assert load("tencent/Hunyuan3D-2/hunyuan3d-dit-v2-0-turbo").sampler == "consistency"


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    state = state_of("2.0")
    for changed, message in (
        ({"a.b": torch.zeros(2)}, "of no known shape model.*1 tensors, a.b"),
        ({k: v for k, v in state.items() if not k.startswith("vae.")}, "holds no VAE"),
        ({k: v for k, v in state.items() if "linear2.bias" not in k}, "do not fit Hunyuan3DDiT.*Missing"),
        (state | {"model.more": torch.zeros(1)}, "do not fit Hunyuan3DDiT.*Unexpected"),
        (state | {"vae.more.weight": torch.zeros(1)}, "0 are missing and 1 unknown"),
        ({k: v for k, v in state.items() if "img_mlp.0" not in k}, "lack double_blocks.0.img_mlp.0.weight"),
    ):
        torch.save(changed, tmp_path / "model.ckpt")
        with pytest.raises(ValueError, match=f"(?s){message}"):
            load(tmp_path)
    (tmp_path / "model.ckpt").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot read the weights"):
        load(tmp_path)
    with pytest.raises(ValueError, match="no weights found"):
        load(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="sampler must be one of"):
        load(tmp_path, sampler="other")  # type: ignore[arg-type]


def test_vae_files_are_told_apart() -> None:
    assert set(split_modules(dict(decoder().state_dict()))) == {"vae"}


def test_conditioner() -> None:
    transformers = pytest.importorskip("transformers")
    from modify_model.hunyuan3d.conditioner import conditioner_of

    options = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14)
    encoder = transformers.Dinov2Model(transformers.Dinov2Config(**options)).eval()
    weights = {f"main_image_encoder.model.{name}": value for name, value in encoder.state_dict().items()}
    made = conditioner_of(weights).eval()
    picture = torch.rand(1, 3, 28, 28)
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = encoder((picture - mean) / std).last_hidden_state
    torch.testing.assert_close(made(picture), expected)
    clear = torch.cat([picture, torch.zeros(1, 1, 28, 28)], dim=1)
    torch.testing.assert_close(
        made(clear), made(torch.ones(1, 3, 10, 14)), msg="transparent is white, and so is what is added"
    )
    with pytest.raises(ValueError, match="no DINOv2 encoder"):
        conditioner_of({"main_image_encoder.other": picture})
