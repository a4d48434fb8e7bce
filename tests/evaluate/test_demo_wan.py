"""The demo Wan's prompts, clips and pipeline, the recogniser, and its training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import train_video
from clips import (
    CHANNELS,
    FRAMES,
    SIZE,
    draw,
    draw_batch,
    generate,
    load_pipeline,
    make_pipeline,
    marks,
    to_frames,
    to_latents,
)
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from prompts import (
    COLOURS,
    MOVES,
    NEGATIVE,
    PALETTE,
    PROMPTS,
    SHAPES,
    TEXT_DIM,
    TOKENS,
    Thing,
    embed,
    encode,
    parse,
    prompt_embeds,
    random_prompts,
    random_things,
)
from recognise import recognise
from torch import Tensor
from train_video import Batches, DirectionProbe, Trainer

EVERY_PROMPT = [*PROMPTS["calibration"], *PROMPTS["unseen"]]
TWO = "a red circle moves left and a blue square bounces"


def small_transformer(kind: type[WanTransformer3DModel] = WanTransformer3DModel) -> WanTransformer3DModel:
    """One layer with one head, for the demo's latents and prompts."""
    torch.manual_seed(0)
    return kind(
        patch_size=(1, 2, 2), num_attention_heads=1, attention_head_dim=64, in_channels=CHANNELS,
        out_channels=CHANNELS, text_dim=TEXT_DIM, freq_dim=256, ffn_dim=64, num_layers=1,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
    )  # fmt: skip


class Oracle(WanTransformer3DModel):
    """Knows the clip: its velocity leads from any noisy latents straight to `target`."""

    target: Tensor

    def forward(self, hidden_states: Tensor, timestep: Tensor, *args: object, **kwargs: object) -> tuple[Tensor]:
        return ((hidden_states - self.target) / (timestep.view(-1, 1, 1, 1, 1) / 1000),)


def test_parse_takes_the_grammar_and_nothing_else() -> None:
    assert parse(NEGATIVE) == []
    assert parse(TWO) == [Thing("red", "circle", "moves left"), Thing("blue", "square", "bounces")]
    assert [" and ".join(map(str, parse(prompt))) for prompt in EVERY_PROMPT] == EVERY_PROMPT
    wrong = ["a pink circle bounces", "a red cube bounces", "red circle bounces", "a red circle jumps", "a red circle"]
    for prompt in [*wrong, "a red circle moves", TWO + " and a green square bounces"]:
        with pytest.raises(ValueError, match="prompt: "):
            parse(prompt)
    with pytest.raises(ValueError, match="two colours"):
        parse("a red circle bounces and a red square bounces")


def test_calibration_and_unseen_prompts_differ_and_cover_the_vocabulary() -> None:
    assert not set(PROMPTS["calibration"]) & set(PROMPTS["unseen"])
    words = {word for prompt in PROMPTS["unseen"] for thing in parse(prompt) for word in thing}
    assert words == {*COLOURS, *SHAPES, *MOVES}


def test_embeddings_tell_apart_what_only_the_order_of_words_tells() -> None:
    assert prompt_embeds(TWO).shape == (TOKENS, TEXT_DIM)
    assert prompt_embeds(NEGATIVE).count_nonzero() == 0
    swapped = prompt_embeds("a blue circle moves left and a red square bounces")
    # The same words: as a set, which is how cross-attention sees them, they must differ.
    assert {tuple(row) for row in swapped.tolist()} != {tuple(row) for row in prompt_embeds(TWO).tolist()}
    prompts = random_prompts(75, 1, 0) + random_prompts(200, 2, 0)
    sums = embed(encode(prompts)).sum(1)  # even their sums
    assert len({tuple(row) for row in sums.tolist()}) == len(prompts)


def test_random_things_are_valid_prompts_of_both_kinds() -> None:
    things = random_things(400, torch.Generator().manual_seed(0))
    assert things.shape == (400, 2, 3) and things[:, 0].min() >= 0
    two = things[:, 1, 0] >= 0
    assert 0.55 < two.float().mean() < 0.75
    assert (things[~two, 1] == -1).all() and (things[two, 0, 0] != things[two, 1, 0]).all()
    assert (things.amax((0, 1)) + 1).tolist() == [len(COLOURS), len(SHAPES), len(MOVES)]


def test_drawing_is_deterministic_and_in_range() -> None:
    clip = draw(TWO, 7)
    assert clip.shape == (FRAMES, SIZE, SIZE, 3) and clip.min() >= 0 and clip.max() <= 1
    assert torch.equal(clip, draw(TWO, 7)) and not torch.equal(clip, draw(TWO, 8))


def test_light_tells_place_and_time_apart() -> None:
    """Brighter to the right, greener below, warmer later, in every clip: cues for direction words."""
    for seed in range(5):
        ground = draw(NEGATIVE, seed)
        still = ground - ground.mean(dim=(1, 2), keepdim=True)
        torch.testing.assert_close(still, still[:1].expand_as(still), rtol=0, atol=1e-5)  # only the light changes
        assert 0.02 < still.std(dim=(0, 1, 2)).mean() < 0.2
        red, green, blue = ground.unbind(-1)
        quarter = SIZE // 4
        for picture, axis, size in ((ground.mean(-1), 2, quarter), (green - (red + blue) / 2, 1, quarter)):
            first, last = picture.narrow(axis, 0, size), picture.narrow(axis, SIZE - size, size)
            assert last.mean() - first.mean() > 0.05
        warmth = (red - blue).mean((1, 2))
        assert (warmth.diff() > 0.005).all()
        assert (ground.amax(-1) - ground.amin(-1)).max() < 0.3  # or the recogniser would take it for a shape


def test_first_object_passes_in_front() -> None:
    """The first square is never hidden, the second one sometimes."""
    prompt = encode(["a red square moves left and a blue square bounces"]).expand(60, -1, -1)
    clips = draw_batch(prompt, torch.Generator().manual_seed(0))
    least = []
    for colour in ("red", "blue"):
        shown = ((clips - torch.tensor(PALETTE[colour])).abs().amax(-1) < 0.01).sum((2, 3))
        least.append(shown.amin(1) / shown.amax(1))
    assert (least[0] > 0.8).all()
    assert 0.05 < (least[1] < 0.7).float().mean() < 0.5


@pytest.mark.parametrize(("objects", "count", "share"), [(1, 30, 1.0), (2, 40, 0.95)])
def test_recogniser_sees_what_was_drawn(objects: int, count: int, share: float) -> None:
    prompts = random_prompts(count, objects, 3)
    clips = draw_batch(encode(prompts), torch.Generator().manual_seed(3))
    clips += 0.02 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(4))
    right = [recognise(clip) == set(parse(prompt)) for clip, prompt in zip(clips, prompts, strict=True)]
    assert sum(right) >= share * count


@pytest.mark.parametrize(
    "other",
    [
        "a red circle moves left",
        "a red circle moves left and a green square bounces",
        "a red circle moves left and a blue triangle bounces",
        "a red circle moves right and a blue square bounces",
        "a blue circle moves left and a red square bounces",
    ],
)
def test_recogniser_refuses_other_prompts(other: str) -> None:
    for seed in range(8):
        assert recognise(draw(other, seed)) != set(parse(TWO))


def test_recogniser_refuses_broken_clips() -> None:
    clip = draw("a red square moves left", 0)
    want = set(parse("a red square moves left"))
    assert recognise(clip) == want
    assert recognise(clip[torch.randperm(FRAMES, generator=torch.Generator().manual_seed(0))]) != want
    assert recognise(clip.flip(0)) == set(parse("a red square moves right"))
    assert recognise(clip[:1].expand_as(clip)) != want  # stands still
    assert recognise(torch.rand(clip.shape, generator=torch.Generator().manual_seed(0))) != want


def test_latents_are_an_exact_rearrangement() -> None:
    clips = torch.stack([draw(TWO, 0), draw(TWO, 1)])
    latents = to_latents(clips)
    assert latents.shape == (2, CHANNELS, FRAMES, SIZE // 2, SIZE // 2)
    torch.testing.assert_close(to_frames(latents), clips, rtol=0, atol=1e-6)
    assert 0.3 < latents.std() < 1.0 and abs(latents.mean()) < 0.3


def test_pipeline_integrates_velocity_to_the_clip() -> None:
    oracle = small_transformer(Oracle)
    assert isinstance(oracle, Oracle)
    oracle.target = to_latents(draw(TWO, 0)[None])
    latents = generate(make_pipeline(oracle), [TWO], seed=0, steps=4)
    # The scheduler cuts the timesteps that it passes to whole thousandths.
    torch.testing.assert_close(latents, oracle.target, rtol=0, atol=0.02)


@torch.inference_mode()
def test_pipeline_equals_an_euler_loop() -> None:
    """Classifier-free guidance, the order of noise and the embeddings, by hand."""
    pipe = make_pipeline(small_transformer().eval())
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    found = generate(pipe, [TWO, EVERY_PROMPT[1]], seed=5, steps=3, guidance=2.5)
    shape = (1, CHANNELS, FRAMES, SIZE // 2, SIZE // 2)
    latents = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)])
    latents = latents + marks(latents.device)
    pipe.scheduler.set_timesteps(3)
    for level, following in zip(pipe.scheduler.sigmas[:-1], pipe.scheduler.sigmas[1:], strict=True):
        timestep = (level * 1000).expand(2)
        given = pipe.transformer(latents, timestep, embed(encode([TWO, EVERY_PROMPT[1]])), return_dict=False)[0]
        empty = pipe.transformer(latents, timestep, torch.zeros(2, TOKENS, TEXT_DIM), return_dict=False)[0]
        latents = latents + (following - level) * (empty + 2.5 * (given - empty))
    torch.testing.assert_close(found, latents, rtol=1e-4, atol=1e-4)


def test_marks_tell_every_place_apart() -> None:
    mean = marks(torch.device("cpu"))
    assert mean.shape == (CHANNELS, FRAMES, SIZE // 2, SIZE // 2)
    torch.testing.assert_close(mean.mean((1, 2, 3)), torch.zeros(CHANNELS), rtol=0, atol=1e-6)
    places = mean.flatten(1).T
    nearest = torch.cdist(places[::37], places).topk(2, largest=False).values[:, 1]
    assert nearest.min() > 0.1


def test_direction_probe_measures_the_use_of_direction_words() -> None:
    probe = DirectionProbe(6, torch.device("cpu"))
    assert recognise(to_frames(probe.latents)[0]) and (probe.embeds != probe.opposite).any(dim=-1).sum(-1).eq(1).all()

    def blind(latents: Tensor, noise: Tensor, level: Tensor, embeds: Tensor) -> Tensor:
        return (latents - noise).square().mean()

    def knowing(latents: Tensor, noise: Tensor, level: Tensor, embeds: Tensor) -> Tensor:
        return torch.tensor(1.0 if torch.equal(embeds, probe.embeds) else 1.5)

    assert probe.gap(blind) == 0.0 and probe.gap(knowing) == 0.5


def test_training_lowers_the_loss_and_state_resumes(tmp_path: Path) -> None:
    batches = Batches(2, torch.device("cpu"), 0)
    batch = batches.next()
    trainer = Trainer(small_transformer(), 1e-3, [])
    losses = [trainer.step(batch, 0.1).item() for _ in range(6)]
    assert losses[-1] < 0.9 * losses[0]
    trainer.save_state(tmp_path / "state.pt")
    other = Trainer(small_transformer(), 1e-3, [])
    other.load_state(tmp_path / "state.pt")
    assert torch.equal(trainer.step(batch, 0.1), other.step(batch, 0.1))
    assert torch.equal(trainer.step(batch, 0.1), other.step(batch, 0.1))
    train_video.save(trainer.finish(), tmp_path / "saved")
    pipe = load_pipeline(tmp_path / "saved", dtype=torch.bfloat16)
    kinds = {name.split(".")[-2]: weight.dtype for name, weight in pipe.transformer.named_parameters() if "." in name}
    assert kinds["to_q"] == torch.bfloat16 and kinds["norm2"] == torch.float32
    for ours, saved in zip(trainer.average, load_pipeline(tmp_path / "saved").transformer.parameters(), strict=True):
        torch.testing.assert_close(ours, saved, rtol=1e-2, atol=1e-6)


@pytest.mark.slow
def test_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_video.main(["--tiny", "--device", "cpu", "--out", str(tmp_path)])
    assert "training 100%" in capsys.readouterr().err
    training = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert training["stages"][0]["steps"] == 3 and training["recognised"][0]["two"]["all"] == 0.0
    assert (tmp_path / "samples.png").is_file() and (tmp_path / "samples.gif").is_file()
    assert generate(load_pipeline(tmp_path), [TWO], 0, steps=1).isfinite().all()
    train_video.main(["--tiny", "--steps", "1", "--device", "cpu", "--out", str(tmp_path), "--resume", str(tmp_path)])
    stages = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))["stages"]
    assert [stage["steps"] for stage in stages] == [3, 1]


@pytest.mark.slow
def test_the_shipped_model_draws_its_prompt() -> None:
    prompt = "a yellow square bounces and a red triangle moves right"
    clip = to_frames(generate(load_pipeline(), [prompt], seed=1))[0]
    assert recognise(clip) == set(parse(prompt))
