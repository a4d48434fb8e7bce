"""What learning gates minimises: targets over the steps and layers, the penalty, the loss of a distillation."""

from __future__ import annotations

import math

import pytest
import torch

from autotune.learn import Regulariser, SparsityTarget, distillation_loss, layerwise_targets


def test_targets_over_the_steps() -> None:
    linear = SparsityTarget(0.1, 0.7, 0.8)
    assert [round(linear.at(step, 1000), 6) for step in (0, 400, 800, 999)] == [0.1, 0.4, 0.7, 0.7]
    assert SparsityTarget(0.1, 0.7, 0.25).at(1, 10) == pytest.approx(0.3), "warm-up of ceil(2.5) steps"
    log = SparsityTarget(0.0, 0.75, 1.0, "logarithmic")
    assert [log.at(step, 10) for step in (0, 5, 10)] == pytest.approx([0.0, 0.5, 0.75])
    assert math.log(1 - log.at(3, 10)) == pytest.approx(0.3 * math.log(0.25))
    assert SparsityTarget(0.2, 0.7, 0.0).at(0, 10) == 0.7
    assert SparsityTarget(0.7, 0.7, 0.8).at(3, 10) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(start_head_sparsity=-0.1), "start_head_sparsity must be in"),
        (dict(end_head_sparsity=1.1), "end_head_sparsity must be in"),
        (dict(sparsity_warmup_ratio=2), "sparsity_warmup_ratio must be in"),
        (dict(warmup_type="cosine"), "warmup_type must be one of"),
        (dict(end_head_sparsity=1.0, warmup_type="logarithmic"), "below 1"),
    ],
)
def test_bad_targets(options: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SparsityTarget(**options)


@pytest.mark.parametrize("target", [0.0, 0.3, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("layers", [1, 2, 5, 32])
def test_targets_of_layers_have_the_whole_as_mean(target: float, layers: int) -> None:
    for power in (0.5, 1.0, 3.0):
        found = layerwise_targets(target, layers, power=power)
        assert found.shape == (layers,) and found.mean().item() == pytest.approx(target, abs=1e-5)
        assert bool(((found >= 0) & (found <= 1)).all()) and torch.allclose(found, found.flip(0), atol=1e-6)
        assert bool((found[: (layers + 1) // 2].diff() <= 1e-6).all()), "high, low, high"
    if target == 0.3 and layers == 5:
        assert (found[2] / found[0]).item() == pytest.approx(0.5, abs=1e-4)


def test_bad_layerwise_targets() -> None:
    for options, match in (
        (dict(schedule="low-high"), "schedule must be one of"),
        (dict(min_ratio=0.0), "0 < min_ratio"),
        (dict(min_ratio=2.0), "0 < min_ratio"),
        (dict(power=0), "power"),
    ):
        with pytest.raises(ValueError, match=match):
            layerwise_targets(0.5, 4, **options)


def test_penalty() -> None:
    regulariser = Regulariser()
    sparsity = torch.tensor(0.2, requires_grad=True)
    with torch.no_grad():
        regulariser.lambda_1.fill_(2.0), regulariser.lambda_2.fill_(3.0)
    loss = regulariser(sparsity, 0.7)
    assert loss.item() == pytest.approx(2 * -0.5 + 3 * 0.25)
    loss.backward()
    assert sparsity.grad.item() == pytest.approx(2 + 2 * 3 * -0.5)
    assert regulariser.lambda_1.grad.tolist() == pytest.approx([0.5])  # flipped: (s − t) is −0.5
    assert regulariser.lambda_2.grad.tolist() == pytest.approx([-0.25])
    layers = torch.tensor([0.2, 0.6], requires_grad=True)
    loss = regulariser(layers, torch.tensor([0.7, 0.7]))
    assert loss.item() == pytest.approx((2 * -0.5 + 3 * 0.25 + 2 * -0.1 + 3 * 0.01) / 2)
    alone = Regulariser(disable_linear_regularization_term=True)
    assert [name for name, _ in alone.named_parameters()] == ["lambda_2"] and alone.lambda_1 is None
    with torch.no_grad():
        alone.lambda_2.fill_(3.0)
    assert alone(sparsity, 0.7).item() == pytest.approx(0.75)


def test_distillation() -> None:
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 8, generator=g, requires_grad=True) for _ in range(2))
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 2:4], mask[1, 4] = True, True
    loss = distillation_loss(student, teacher, mask)
    chosen = [(0, 2), (0, 3), (1, 4)]
    assert loss.item() == pytest.approx(
        sum(float(((student - teacher)[at] ** 2).mean()) for at in chosen) / 3, rel=1e-5
    )
    assert distillation_loss(student, teacher, mask, count=12).item() == pytest.approx(loss.item() / 4, rel=1e-5)
    assert distillation_loss(student, teacher, mask & False).item() == 0
    loss.backward()
    assert teacher.grad is None and torch.equal(student.grad.abs().sum(-1) > 0, mask)
    half = distillation_loss(student.bfloat16(), teacher.bfloat16(), mask)
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match=r"labels_mask \[B, L\], got"):
        distillation_loss(student, teacher, mask[:1])
