"""What a model would gain: found call by call, gated, and said in a sentence; the model stays as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.benchmark import gain as gains
from batchnorm.benchmark import grid
from batchnorm.benchmark.cells import Cell, cell_of, laid_out
from batchnorm.benchmark.contenders import OURS, TORCH
from batchnorm.benchmark.figures import Figures
from batchnorm.benchmark.gain import AS_IS, CONVERTED, EVALUATION, FUSED, TRAINING, Gain, gain
from batchnorm.benchmark.timing import Ratio
from batchnorm.kernels import cpu

BRIEFLY = 0.002


class Net(nn.Module):
    """A layer with its activation, one with an addition, one that is called twice, and one that cannot be ours."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.twice = nn.BatchNorm2d(8)
        self.other = Doubled(8)
        self.head = nn.Linear(8, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.first(x)).relu()
        x = (self.bn2(self.second(x)) + x).relu()
        x = self.other(self.twice(self.twice(x).sigmoid()))
        return self.head(self.drop(x.mean((2, 3))))


class Doubled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x) + x.mean()


@pytest.fixture(scope="module")
def found() -> Gain:
    torch.manual_seed(0)
    return gain(Net(), torch.randn(4, 3, 8, 8), BRIEFLY)


def test_every_call_is_found_with_what_fuse_lets_it_do(found: Gain) -> None:
    calls = {one.names: (one.cell, one.calls) for one in found.layers}
    shape = (4, 8, 8, 8)
    assert calls == {
        ("bn1",): (Cell(shape, fused="bn+relu"), 1),
        ("bn2",): (Cell(shape, fused="bn+add+relu"), 1),
        ("twice",): (Cell(shape), 2),
    }
    assert list(found.skipped) == ["other"]
    for one in found.layers:
        assert (one.kernel, one.problems) == ("numba", ())
        assert list(one.figures.seconds) == [OURS, TORCH]
        assert one.seconds(OURS) == one.calls * one.figures.seconds[OURS] > 0


def test_the_whole_model_is_timed_in_three_ways_and_what_it_keeps_is_counted(found: Gain) -> None:
    assert found.refused == {}
    assert list(found.whole) == [TRAINING, EVALUATION]
    for figures in found.whole.values():
        assert list(figures.seconds) == [AS_IS, CONVERTED, FUSED]
        assert list(figures.ratios) == [CONVERTED, FUSED]
        assert figures.rounds >= 6
    assert found.kept[CONVERTED] >= found.kept[AS_IS] > 0  # the moments in float64
    assert found.sentence.startswith("With batchnorm.fuse, a training step ")
    assert found.sentence in str(found)
    assert "| bn2 " in str(found)


def test_the_model_its_inputs_and_the_random_numbers_stay_as_they_were() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU()).train()
    model[2].eval()
    x, before = torch.randn(8, 6), {name: value.clone() for name, value in model.state_dict().items()}
    given, random = x.clone(), torch.get_rng_state()
    found = gain(model, x, BRIEFLY)
    assert torch.equal(x, given)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [type(part) for part in model] == [nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert [part.training for part in model] == [True, True, False, True]
    assert not any(part._forward_pre_hooks for part in model)
    assert [one.cell for one in found.layers] == [Cell((8, 5), fused="bn+relu")]


def test_wrong_results_get_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.backward

    def wrong(*arguments: Any) -> Any:
        gradients = right(*arguments)
        return gradients._replace(weight=gradients.weight * 1.1)

    monkeypatch.setattr(cpu, "backward", wrong)
    found = gain(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), torch.randn(8, 6), BRIEFLY)
    assert found.layers[0].problems[0].startswith("dweight is off by")
    assert all(why.startswith("gradients is off by") for why in found.refused.values())
    assert set(found.refused) == {CONVERTED, FUSED}
    assert found.sentence.startswith("Nothing can be said: converted: gradients is off by")
    assert "dweight is off by" in str(found)


def test_what_cannot_be_fused_is_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(gains, "fuse", fails)
    found = gain(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), torch.randn(8, 6), BRIEFLY)
    assert found.refused == {FUSED: "RuntimeError: no such luck"}
    assert list(found.whole[TRAINING].ratios) == [CONVERTED]
    assert found.sentence.startswith("With batchnorm.convert, a training step ")


class Frozen(nn.Sequential):
    """Its first layer stays in evaluation mode."""

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self[1].eval()
        return self


@pytest.mark.parametrize(
    ("kind", "policy", "reason"),
    [(nn.Sequential, batchnorm.Ghost(4), "a policy of statistics"), (Frozen, None, "in evaluation mode")],
)
def test_layers_that_are_not_timed_say_why(kind: Any, policy: Any, reason: str) -> None:
    model = kind(nn.Linear(6, 5), batchnorm.BatchNorm1d(5, statistics=policy), nn.Linear(5, 5), nn.BatchNorm1d(5))
    found = gain(model, torch.randn(8, 6), BRIEFLY)
    assert reason in found.skipped["1"]
    assert [one.names for one in found.layers] == [("3",)]


def test_layers_that_are_ours_already_are_measured_with_the_activation_that_they_have() -> None:
    found = gain(
        nn.Sequential(nn.Linear(6, 5), batchnorm.BatchNorm1d(5, activation="relu6")), torch.randn(8, 6), BRIEFLY
    )
    assert [one.cell for one in found.layers] == [Cell((8, 5), fused="bn+relu6")]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(6, 5), "Linear has no batch normalization layer"),
        (nn.Sequential(nn.Linear(6, 5), Doubled(5)), "no batch normalization of the model can be converted: "),
        (nn.BatchNorm1d(6, device="meta"), "the model is on meta: the benchmark measures CPUs"),
        (nn.BatchNorm1d(6, affine=False), "nothing in it learns"),
        (nn.LazyBatchNorm1d(), "the model has lazy layers, which have no shapes yet: call it once before"),
    ],
)
def test_models_without_an_answer_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gain(model, torch.randn(8, 6), BRIEFLY)


def test_dicts_of_arguments_and_results_of_any_kind() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU())

        def forward(self, *, x: Tensor, scale: float) -> dict[str, Any]:
            return {"y": scale * self.body(x), "scale": scale}

    found = gain(Head(), {"x": torch.randn(8, 6), "scale": 2.0}, BRIEFLY)
    assert [one.cell for one in found.layers] == [Cell((8, 5), fused="bn+relu")]
    assert list(found.whole[TRAINING].seconds) == [AS_IS, CONVERTED, FUSED]
    assert found.kept[FUSED] < found.kept[AS_IS]  # which keeps the activation's result, too


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        (Ratio(1.25, 1.2, 1.3), "is 1.25 times as fast (80.00 ms instead of 100.00 ms, 1.25 × (1.20–1.30))"),
        (Ratio(1.01, 0.9, 1.1), "takes as long as before (80.00 ms instead of 100.00 ms, 1.01 × (0.90–1.10))"),
        (Ratio(0.8, 0.7, 0.9), "takes 1.25 times as long (80.00 ms instead of 100.00 ms, 0.80 × (0.70–0.90))"),
    ],
)
def test_the_sentence_says_no_more_than_the_interval(found: Gain, ratio: Ratio, said: str) -> None:
    figures = Figures({AS_IS: 0.1, FUSED: 0.08}, {}, {FUSED: ratio}, 9)
    made_up = replace(found, whole={TRAINING: figures, EVALUATION: figures})
    assert made_up.sentence == f"With batchnorm.fuse, a training step {said}, and an evaluation {said}."


@pytest.mark.parametrize(
    ("x", "layout"),
    [
        (torch.empty(2, 3, 4, 5), "contiguous"),
        (torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last), "channels_last"),
        (torch.empty(2, 5, 3).transpose(1, 2), "channels_last"),
        (torch.empty(3, 2, 4, 5).transpose(0, 1), "1,0,2,3"),
    ],
)
def test_a_cell_lies_in_memory_as_the_tensor_does(x: Tensor, layout: str) -> None:
    cell = cell_of(x, "bn")
    assert cell == Cell(tuple(x.shape), "float32", layout)
    assert laid_out(torch.randn(x.shape), cell).stride() == x.stride()


def test_a_few_layers_are_measured_in_every_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "_SMALL", (Cell((8, 16, 6, 6)), Cell((8, 16, 6, 6), fused="bn+silu")))
    rows = grid.measure(quick=True, seconds=BRIEFLY, advance=lambda *_: None)
    assert [row.check.problems for row in rows] == [(), ()]
    assert [list(row.figures) for row in rows] == [list(grid.OPERATIONS)] * 2
    (table,) = grid.tables(rows).values()
    assert [row[:3] for row in table.rows[3:5]] == [
        ("BN+SiLU, 8×16×6×6 float32 contiguous", "numba", "forward"),
        ("BN+SiLU, 8×16×6×6 float32 contiguous", "numba", "forward+backward"),
    ]
