"""What gates learn, and their handle: a planted head is found; tables, separation, state, what is refused."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from planted_model import KV_HEADS, LAYERS, PLANTED, PlantedModel
from torch import nn

from autotune import SparseAttention, dense
from autotune.learn import HeadGates, Learning, Regulariser, SparsityTarget, learn
from autotune.learn.branches import Branches
from spas_attn.selectors import Streaming

SIZES = dict(sink_size=64, window=64)
RULE = Streaming(64, 64, block_q=64, block_k=64)


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_gates_reach_the_target_and_multipliers_climb(kind: str) -> None:
    """Without any other loss: the penalty alone drives them, in one descending optimiser."""
    model = PlantedModel()
    learning, regulariser, target = learn(model, **SIZES), Regulariser(), SparsityTarget(0.0, 0.6, 0.5)
    rate = {"AdamW": 0.3, "SGD": 3.0}[kind]
    groups = [{"params": [g.log_alpha for g in learning.gates]}, {"params": list(regulariser.parameters())}]
    optimiser = getattr(torch.optim, kind)(groups, lr=rate, weight_decay=0.0)
    for step in range(200):
        excess = learning.sparsity().detach() - target.at(step, 200)
        before = [p.item() for p in regulariser.parameters()]
        optimiser.zero_grad()
        regulariser(learning.sparsity(), target.at(step, 200)).backward()
        if step == 0:
            assert regulariser.lambda_1.grad.item() == pytest.approx(-excess.item())  # negative: it will ascend
            assert regulariser.lambda_2.grad.item() == pytest.approx(-(excess.item() ** 2))
        optimiser.step()
        if kind == "SGD":
            assert regulariser.lambda_1.item() == pytest.approx(before[0] + rate * excess.item(), abs=1e-5)
    assert learning.sparsity().item() == pytest.approx(0.6, abs=0.03)
    assert regulariser.lambda_2.item() > 0 and regulariser.lambda_1.shape == (1,)


def trained(steps: int = 60) -> tuple[PlantedModel, Learning]:
    model, regulariser, target = PlantedModel(), Regulariser(), SparsityTarget(0.0, 7 / 8, 0.6)
    torch.manual_seed(0)
    learning = learn(model, **SIZES)
    groups = [g.log_alpha for g in learning.gates] + list(regulariser.parameters())
    optimiser = torch.optim.AdamW(groups, lr=0.5, weight_decay=0.0)
    for step in range(steps):
        optimiser.zero_grad()
        (model.loss(step) + regulariser(learning.sparsity(), target.at(step, steps))).backward()
        optimiser.step()
    return model, learning


def test_a_planted_retrieval_head_is_found() -> None:
    model, learning = trained()
    expected = torch.zeros(LAYERS, KV_HEADS)
    expected[PLANTED] = 1
    assert torch.equal(learning.table(7 / 8), expected)
    assert float(learning.table()[PLANTED]) > 0.9
    separation = learning.separation(7 / 8)
    assert separation.warning is None and separation.gap > 0.8, str(separation)
    model.eval()
    learning.freeze(expected)
    with torch.no_grad():
        assert model.loss(1000) < 0.1
        learning.freeze(1 - expected)
        assert model.loss(1000) > 3
        learning.freeze(expected)
        with dense(model):
            assert model.loss(1000) < 0.1 and not learning.active
        assert learning.active


def test_gates_that_do_not_separate_are_said_so() -> None:
    model = PlantedModel()
    learning = learn(model, **SIZES)
    assert "chosen nothing" in str(learning.separation().warning)
    assert "do not separate" in str(learning.separation(0.5).warning)
    # DuoAttention's published quantiles, as a table.
    learning.start_from(torch.tensor([[0.4, 0.57, 0.84, 0.9], [0.95, 0.97, 0.996, 1.0]]))
    with torch.no_grad():
        for gates, row in zip(learning.gates, [[-0.3, 0.1, 1.5, 2.0], [2.5, 3.0, 3.0, 3.0]], strict=True):
            gates.log_alpha.copy_(torch.tensor(row))
    report = learning.separation(0.25)
    assert report.gap < 0.65 and report.undecided == 0.25 and list(report.quantiles) == [0.1, 0.25, 0.5, 0.75, 0.9]
    assert "do not separate" in str(learning.separation(0.5)) and "quantiles 10%" in str(report)
    with torch.no_grad():
        for gates in learning.gates:
            gates.log_alpha.copy_(torch.tensor([-0.8, -0.7, 9.0, 9.0]))
    assert "mixture" in str(learning.separation(0.5).warning)


def test_tables_are_chosen_over_the_whole_model_and_ties_by_place() -> None:
    learning = learn(PlantedModel(), **SIZES)
    with torch.no_grad():
        learning.gates[0].log_alpha.copy_(torch.tensor([9.0, -9.0, 1.0, 8.0]))
        learning.gates[1].log_alpha.copy_(torch.tensor([1.0, 1.0, 1.0, -8.0]))
    assert learning.table(0.25).tolist() == [[1, 0, 1, 1], [1, 1, 1, 0]]
    assert learning.table(0.5).tolist() == [[1, 0, 1, 1], [1, 0, 0, 0]]
    assert learning.table(0).min() == 1 and learning.table(1).max() == 0
    soft = learning.table()
    # Clipped to 0 and 1, and still in order: a file with them can be rounded at any share.
    assert float(soft[0, 0]) > float(soft[0, 3]) > 0.999 and 0 < float(soft[0, 1]) < float(soft[1, 3]) < 1e-3
    for sparsity in (0.125, 0.25, 0.375, 0.5, 0.875):
        kept = soft.flatten().argsort(descending=True, stable=True)[: round(8 * (1 - sparsity))]
        assert torch.equal(torch.zeros(8).index_fill_(0, kept, 1.0).view(2, 4), learning.table(sparsity))
    learning.freeze(learning.table(0.25))
    assert torch.equal(learning.table(), learning.table(0.25))
    assert learning.sparsity().item() == pytest.approx(0.25, abs=1e-4)
    assert learning.sparsity(layerwise=True).tolist() == pytest.approx([0.25, 0.25], abs=1e-4)


def test_state_is_saved_loaded_and_copied() -> None:
    model, learning = trained(3)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert set(state) == {f"layers.{i}.gates.log_alpha" for i in range(LAYERS)}
    again = PlantedModel()
    other = learn(again, **SIZES, seed=7)
    assert not torch.equal(other.table(), learning.table())
    again.load_state_dict(state)
    assert torch.equal(other.table(), learning.table())
    other.freeze(torch.zeros(LAYERS, KV_HEADS))
    frozen = again.state_dict()
    for twin in (copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        handle = Learning(twin)
        assert handle.table().max() == 0 and handle.gates[0] is not other.gates[0]
        handle.freeze(torch.ones(LAYERS, KV_HEADS))
        assert other.table().max() == 0
        twin.load_state_dict(frozen)
        assert handle.gates[0].fixed == (False,) * KV_HEADS
        assert len({id(gates.branches) for gates in handle.gates}) == 1
    assert torch.equal(learn(PlantedModel(), **SIZES).table(), learn(PlantedModel(), **SIZES).table()), (
        "same on all ranks"
    )


def test_the_handle_installs_and_removes() -> None:
    model = PlantedModel()
    plain = list(model.state_dict())
    with torch.no_grad():
        expected = model.loss(0)
        with learn(model, **SIZES) as learning:
            assert [g.training for g in learning.gates] == [True, True] and learning.active
            with pytest.raises(ValueError, match=r"'layers.0' has gates already"):
                learn(model)
            learning.start_from(torch.zeros(LAYERS, KV_HEADS))
            assert model.loss(0) > 3
            learning.active = False
            assert torch.equal(model.loss(0), expected)
        assert torch.equal(model.loss(0), expected) and list(model.state_dict()) == plain
    with pytest.raises(ValueError, match="no gates"):
        Learning(model)
    local = learn(model, sink_size=64, window=64, toggle_type="local")
    assert local.gates[0].branches.rule == Streaming(0, 64, sink=False, block_q=64, block_k=64)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(toggle_type="both"), "toggle_type must be one of"),
        (dict(sink_size=-1), "sink_size must be a whole number of tokens, 0 or more, got -1"),
        (dict(window=0), "window must be a whole number of tokens, 1 or more, got 0"),
        (dict(window=64.0), "window must be"),
    ],
)
def test_bad_options(options: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        learn(PlantedModel(), **options)


def test_bad_models_and_tables() -> None:
    with pytest.raises(ValueError, match="patch it first"):
        learn(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="does not know its number of heads"):
        learn(nn.Sequential(SparseAttention()))
    learning = learn(PlantedModel(), **SIZES)
    for table, match in (
        (torch.ones(3, KV_HEADS), r"table must be a tensor \[2, 4\]"),
        (torch.full((LAYERS, KV_HEADS), 1.5), "from 0 to 1"),
        (torch.full((LAYERS, KV_HEADS), 0.5), "must hold 0 and 1"),
    ):
        with pytest.raises(ValueError, match=match):
            learning.freeze(table)
    with pytest.raises(ValueError, match="sparsity must be in"):
        learning.table(1.2)
    with pytest.raises(TypeError, match="active"):
        learning.active = 1
    with pytest.raises(ValueError, match="multiple of kv_heads"):
        HeadGates(3, 4, Branches(RULE))
    assert math.isnan(learning.separation(0.0).gap)
