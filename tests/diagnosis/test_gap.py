"""Training against evaluation on the same data: the root, what only follows, the cause; nothing is left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from diagnosis.subjects import batches, network, trained


def finding(model: nn.Module, data: Any = None, **options: Any) -> Any:
    found = [f for f in batchnorm.diagnose(model, data or batches(), **options).findings if f.rule.code == "BN101"]
    return found[0].found if found else None


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("training", [False, True])
def test_right_statistics_have_no_gap(training: bool) -> None:
    assert finding(trained().train(training)) is None


def test_a_layer_whose_statistics_are_wrong_is_the_root_and_later_ones_follow() -> None:
    model = trained().eval()
    with torch.no_grad():
        model[4].running_mean.add_(3 * model[4].running_var.sqrt())
    found = finding(model)
    assert found.layers == ("4",)
    assert "starts at 4 (3 deviations off, threshold 0.5); 1 only follow" in found.message
    assert found.value == pytest.approx(3, rel=0.05)


@torch.no_grad()
def weights_changed(model: nn.Sequential) -> None:
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            layer.weight.mul_(3)


CAUSES: dict[str, tuple[Callable[[nn.Sequential], Any], dict[str, Any], str]] = {
    "averaged weights": (weights_changed, {}, "weights that have changed since"),
    "another scale": (lambda m: None, {"data": batches(scale=255.0)}, "the input is not what it was in training"),
    "reset": (
        lambda m: [x.reset_running_stats() for x in m if isinstance(x, nn.BatchNorm2d)],
        {}, "statistics that were never loaded"),
    "poisoned": (lambda m: m[4].running_var.fill_(torch.nan), {}, "a batch that was not finite"),
    "a momentum of 0": (
        lambda m: [(setattr(x, "momentum", 0.0), x.running_mean.add_(2)) for x in m if isinstance(x, nn.BatchNorm2d)],
        {}, "a momentum of 0"),
}  # fmt: skip


@pytest.mark.parametrize("fault", CAUSES)
def test_the_cause_is_named(fault: str) -> None:
    change, options, cause = CAUSES[fault]
    model = trained().eval()
    change(model)
    found = finding(model, **options)
    assert f"likely cause: {cause}" in found.message


def test_few_batches_are_the_cause() -> None:
    model = network()
    for x in batches(3):
        model(x + 2)
    found = finding(model.eval(), [x + 2 for x in batches()])
    assert "too few batches (3) for the momentum" in found.message


def test_a_cumulative_average_has_forgotten_its_initial_values_however_few_batches() -> None:
    model = trained().eval()
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
            layer.num_batches_tracked.fill_(3)
    weights_changed(model)
    assert "likely cause: weights that have changed since" in finding(model).message


def test_the_metric_in_three_arms_and_what_recalibration_closes() -> None:
    model = trained().eval()
    with torch.no_grad():
        right = torch.cat([trained().eval()(x) for x in batches()])
        model[4].running_mean.add_(3 * model[4].running_var.sqrt())

    def agreement(model: nn.Module) -> float:
        outputs = torch.cat([model(x) for x in batches()])
        return float((outputs.argmax(1) == right.argmax(1)).float().mean())

    report = batchnorm.diagnose(model, batches(), agreement)
    message = report.findings[0].found.message
    assert "metric: running" in message
    assert "(128 samples): recalibration closes" in message
    closed = float(message.split("closes ")[1].split("%")[0])
    assert closed > 90


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.left = trained(), 3

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("no more")
        y: Tensor = self.inner(x)
        return y


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_bit_identical_afterwards_also_after_an_error(training: bool) -> None:
    for model, breaks in ((trained().train(training), False), (Breaks().train(training), True)):
        before, modes = snapshot(model), [m.training for m in model.modules()]
        state = copy.copy(torch.get_rng_state())
        if breaks:
            with pytest.raises(RuntimeError, match="batch 4 of the data: no more"):
                batchnorm.diagnose(model, batches())
        else:
            batchnorm.diagnose(model, batches(), lambda m: float(m(batches()[0]).sum()))
        assert torch.equal(state, torch.get_rng_state())
        assert modes == [m.training for m in model.modules()]
        assert not any(m._forward_pre_hooks for m in model.modules())
        after = model.state_dict()
        assert all(torch.equal(t, after[name]) for name, t in before.items())


def test_data_that_cannot_be_used() -> None:
    with pytest.raises(ValueError, match="ends after one pass"):
        batchnorm.diagnose(trained(), iter(batches()))
    with pytest.raises(ValueError, match="no batch of the data could be used"):
        batchnorm.diagnose(trained(), [])
    assert batchnorm.diagnose(nn.Linear(2, 2), batches()).ok


def test_recalibrated_statistics_are_right_though_the_counter_is_low() -> None:
    model = trained().eval()
    weights_changed(model)
    batchnorm.recalibrate(model, batches())
    assert batchnorm.diagnose(model, batches()).findings == ()
    assert batchnorm.diagnose(model).ok  # it cannot know, and says so as advice only


@pytest.mark.parametrize(("size", "found"), [(4, True), (8, False)])
def test_few_values_a_channel(size: int, found: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 5), nn.BatchNorm1d(5))
    data = [torch.randn(size, 6) for _ in range(200)]
    for x in 2 * data:
        model(x)
    batchnorm.recalibrate(model, data)
    report = batchnorm.diagnose(model, data)
    assert [f.rule.code for f in report.findings] == (["BN110"] if found else [])
    if found:
        assert report.findings[0].found.layers == ("1", "4")
        assert "a channel has 4 values in a batch" in report.findings[0].found.message


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.stem(x)) + self.head(self.stem(x.flip(0)))
        return y


def test_a_layer_that_is_called_several_times_for_a_batch() -> None:
    model = Siamese()
    batchnorm.recalibrate(model, batches())
    (finding,) = batchnorm.diagnose(model, batches()).findings
    assert finding.rule.code == "BN111"
    assert set(finding.found.layers) == {"stem", "head"}
    assert "called 2 times for one batch" in finding.found.message
