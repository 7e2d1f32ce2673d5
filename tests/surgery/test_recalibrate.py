"""Recalibrated statistics are those of all the data, and whatever goes wrong, the model is as it was."""

from __future__ import annotations

import copy
import json
import math
import random
import re
import runpy
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import levit, resnet
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import BasicBlock, randomized
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import batchnorm
from batchnorm import Accumulated, Ghost, Moments, Renorm, Sync
from batchnorm.surgery.measuring.clusters import Clusters
from batchnorm.surgery.measuring.recorder import moments_of
from waiting import HANGS_AFTER

DOCS = Path(__file__).parents[2] / "docs"
METHODS = ("batch", "layerwise")
UNEVEN = (64, 64, 3)
MAKERS: dict[str, Callable[[int], nn.Module]] = {
    "torch": nn.BatchNorm2d,
    "torch, cumulative": lambda c: nn.BatchNorm2d(c, momentum=None),
    "SyncBatchNorm": nn.SyncBatchNorm,
    "ours": batchnorm.BatchNorm2d,
    "fused": lambda c: batchnorm.BatchNorm2d(c, activation="relu"),
    "ghost": lambda c: batchnorm.BatchNorm2d(c, statistics=Ghost(8)),
    "renorm": lambda c: batchnorm.BatchNorm2d(c, statistics=Renorm(schedule=None)),
    "sync": lambda c: batchnorm.BatchNorm2d(c, statistics=Sync()),
    "accumulated": lambda c: batchnorm.BatchNorm2d(c, statistics=Accumulated(4)),
}


class Network(nn.Module):
    """With dropout as a module and as a function, in a model of two blocks."""

    def __init__(self, make: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(2, 3, 3), make(3)
        self.block, self.drop, self.head = BasicBlock(3, 4), nn.Dropout(0.5), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.bn(self.stem(x)), 0.5, self.training)
        y: Tensor = self.head(self.drop(self.block(x)).mean((2, 3)))
        return y


def network(make: Callable[[int], nn.Module] = nn.BatchNorm2d) -> Network:
    torch.manual_seed(0)
    return randomized(Network(make))


def batches(*sizes: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Batches that differ from each other, in mean and in scale."""
    made = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 2, 9, 8, generator=made, dtype=dtype) * (1 + i) + i) for i, n in enumerate(sizes or UNEVEN)]


def norms(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def everything(model: nn.Module) -> dict[str, Any]:
    """All that must be as it was."""
    found: dict[str, Any] = {
        "values": {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())},
        "places": {n: t.data_ptr() for n, t in (*model.named_parameters(), *model.named_buffers())},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "learning": {n: p.requires_grad for n, p in model.named_parameters()},
        "torch": torch.get_rng_state(),
        "others": (random.getstate(), str(np.random.get_state())),
    }
    for name, m in model.named_modules():
        attributes = {k for k in vars(m) if "hooks" not in k}
        found[f"module {name}"] = (type(m), m.training, attributes, getattr(m, "momentum", 0), str(m))
        found[f"hooks {name}"] = {k: list(v.values()) for k, v in vars(m).items() if k.endswith("_hooks")}
    return found


def assert_same(found: Any, right: Any, where: str = "") -> None:
    if isinstance(right, dict):
        assert list(found) == list(right), where
        for name in right:
            assert_same(found[name], right[name], f"{where}/{name}")
    elif isinstance(right, Tensor):
        assert found.dtype == right.dtype, where
        torch.testing.assert_close(found, right, rtol=0, atol=0, equal_nan=True, msg=where)
    else:
        assert found == right, where


def oracle(model: nn.Module, data: list[Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and unbiased variance of all that the layers get, in float64 from all inputs side by side."""
    twin = copy.deepcopy(model).double().eval()
    inputs: dict[str, list[Tensor]] = {}
    for name, layer in norms(twin).items():
        layer.train()
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0].detach()))
    for x in data:
        twin(x.double())
    values = {name: torch.cat([x.transpose(0, 1).flatten(1) for x in xs], 1) for name, xs in inputs.items()}
    return {name: (x.mean(1), x.var(1)) for name, x in values.items()}


# --- what the statistics are ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_the_first_layer_has_the_statistics_of_all_data(make: Callable[[int], nn.Module], method: Any) -> None:
    model, data = network(make), batches()
    others = {name: t.clone() for name, t in model.state_dict().items() if "running" not in name and "num_" not in name}
    policy = getattr(model.bn, "statistics", None)
    with batchnorm.kernels.using("aten"):
        report = batchnorm.recalibrate(model, data, method=method)
    x = model.stem.double()(torch.cat(data).double()).detach()
    biased = isinstance(policy, Renorm)
    torch.testing.assert_close(model.bn.running_mean.double(), x.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    right = x.transpose(0, 1).flatten(1).var(1, correction=0 if biased else 1)
    torch.testing.assert_close(model.bn.running_var.double(), right, rtol=1e-6, atol=1e-6)
    assert model.bn.num_batches_tracked == 3
    assert getattr(model.bn, "statistics", None) == policy
    assert (report.batches, report.samples, report.skipped_batches) == (3, 131, 0)
    assert report.layers["bn"].count == 131 * 7 * 6
    assert list(report.layers) == ["bn", "block.bn1", "block.bn2", "block.downsample.1"]
    state = model.float().state_dict()
    for name, t in others.items():  # among them what policies remember
        assert torch.equal(state[name], t), name


@pytest.mark.parametrize("training", [True, False])
def test_deeper_layers_agree_with_a_direct_computation(training: bool) -> None:
    model, data = network().train(training), batches()
    right = oracle(model, data)
    modes = [m.training for m in model.modules()]
    batchnorm.recalibrate(model, data)
    for name, layer in norms(model).items():
        torch.testing.assert_close(layer.running_mean.double(), right[name][0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(layer.running_var.double(), right[name][1], rtol=1e-6, atol=1e-6)
    assert [m.training for m in model.modules()] == modes


def test_layer_by_layer_is_evaluation_on_what_came_before() -> None:
    model, data = network().double(), batches(7, 4, 2, dtype=torch.float64)
    right, x = copy.deepcopy(model).eval(), torch.cat(data)
    seen: dict[str, Tensor] = {}
    for name, layer in norms(right).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].detach()}))
    for name, layer in norms(right).items():  # they are registered in the order of calls here
        right(x)
        values = seen[name].transpose(0, 1).flatten(1)
        layer.running_mean.copy_(values.mean(1))
        layer.running_var.copy_(values.var(1))
    batchnorm.recalibrate(model, data, method="layerwise")
    for name, layer in norms(model).items():
        torch.testing.assert_close(layer.running_mean, norms(right)[name].running_mean, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(layer.running_var, norms(right)[name].running_var, rtol=1e-11, atol=1e-11)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=12))
def test_layer_by_layer_does_not_depend_on_how_the_data_are_cut(sizes: list[int]) -> None:
    x = batches(sum(sizes), dtype=torch.float64)
    whole, cut = network().double(), network().double()
    batchnorm.recalibrate(whole, x, method="layerwise")
    batchnorm.recalibrate(cut, x[0].split(sizes), method="layerwise")
    for name, layer in norms(cut).items():
        torch.testing.assert_close(layer.running_var, norms(whole)[name].running_var, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(layer.running_mean, norms(whole)[name].running_mean, rtol=1e-10, atol=1e-10)
        assert layer.num_batches_tracked == len(sizes)


class Twice(nn.Module):
    """One layer in two places, one in none, and one whose use depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.unused, self.sometimes = (
            nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.BatchNorm2d(2),
        )  # fmt: skip
        self.alias = self.bn

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 3:
            x = self.sometimes(self.bn(x))
        y: Tensor = self.alias(self.conv(self.bn(x)))
        return y


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_are_called_often_never_and_sometimes(method: Any) -> None:
    model = randomized(Twice().double())
    unused = {n: t.clone() for n, t in model.unused.state_dict().items()}
    data = batches(5, 3, 8, dtype=torch.float64)
    inputs: list[Tensor] = []
    twin = copy.deepcopy(model).train()
    twin.bn.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    if method == "layerwise":  # this layer comes first; the other one is then in training still
        twin.unused.eval()
    for x in data:
        twin(x)
    report = batchnorm.recalibrate(model, data, method=method)
    values = torch.cat([x.transpose(0, 1).flatten(1) for x in inputs], 1)
    torch.testing.assert_close(model.bn.running_mean, values.mean(1))
    torch.testing.assert_close(model.bn.running_var, values.var(1))
    assert len(inputs) == 7
    assert (model.bn.num_batches_tracked, model.sometimes.num_batches_tracked) == (3, 1)
    assert report.skipped == {"unused": "no forward called it"}
    assert_same(model.unused.state_dict(), unused)
    assert math.isinf(report.layers["sometimes"].mean_error)
    assert report.as_dict()["layers"]["sometimes"]["mean_error"] is None


class Padded(nn.Module):
    def __init__(self, positional: bool) -> None:
        super().__init__()
        self.bn, self.positional = batchnorm.BatchNorm1d(3, dtype=torch.float64), positional

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = self.bn(x, x, mask) if self.positional else self.bn(x, residual=x, mask=mask)
        return y


@pytest.mark.parametrize("positional", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_only_what_the_mask_counts_counts(weighted: bool, positional: bool) -> None:
    model = Padded(positional)
    x, lengths = torch.randn(6, 3, 5, dtype=torch.float64), torch.tensor([5, 1, 3, 0, 2, 4])
    mask = batchnorm.mask_from_lengths(lengths, 5)
    x[~mask.unsqueeze(1).expand_as(x)] = torch.nan
    weights = torch.randint(1, 4, mask.shape) * mask if weighted else mask.long()
    given = weights.double() if weighted else mask
    data = [{"x": x[part], "mask": given[part], "labels": 0} for part in (slice(0, 4), slice(4, 6))]
    with batchnorm.kernels.using("reference"):
        report = batchnorm.recalibrate(model, data)
    assert report.layers["bn"].count == weights.sum()
    values = x.transpose(1, 2)[mask].repeat_interleave(weights[mask], 0)
    torch.testing.assert_close(model.bn.running_mean, values.mean(0))
    torch.testing.assert_close(model.bn.running_var, values.var(0))


@pytest.mark.parametrize("kind", [batchnorm.recurrent.LSTM, batchnorm.recurrent.GRU])
def test_recurrent_layers_have_statistics_of_every_step(kind: Any) -> None:
    torch.manual_seed(0)
    model = kind(3, 4, num_layers=2, dropout=0.9, max_steps=3, dtype=torch.float64)
    data = [torch.randn(T, n, 3, dtype=torch.float64) + T for T, n in ((5, 7), (2, 4), (5, 7))]
    model.running_mean_ih_l1.fill_(7.0)
    with batchnorm.kernels.using("aten"):
        report = batchnorm.recalibrate(model, data)
    products = [F.linear(x, model.weight_ih_l0).detach() for x in data]
    for step in range(3):
        rows = [p[step].flatten(0, -2) if step < 2 else p[2:].flatten(0, 1) for p in products if len(p) > step]
        values = torch.cat(rows)
        torch.testing.assert_close(model.running_mean_ih_l0[step], values.mean(0))
        torch.testing.assert_close(model.running_var_ih_l0[step], values.var(0))
    assert model.num_batches_tracked_l1.tolist() == [3, 3, 2]
    assert report.layers["ih_l0"].count == 18 + 18 + 42
    assert {name.split("_")[0] for name in report.layers} == set(model._widths)
    # The plain average of batches, as the paper takes it, is the same where batches are of one size.
    even, right = [data[0], data[2]], copy.deepcopy(model)
    right.reset_running_stats()
    right.momentum, right.dropout = None, 0.0
    with batchnorm.kernels.using("aten"):
        batchnorm.recalibrate(model, even)
        for x in even:
            right(x)
    for name, t in right.named_buffers():
        if "mean" in name or "num" in name:
            torch.testing.assert_close(model.get_buffer(name), t)


def test_packed_sequences() -> None:
    model = batchnorm.recurrent.GRU(3, 4, max_steps=5, dtype=torch.float64)
    data = [[torch.randn(length, 3, dtype=torch.float64) for length in lengths] for lengths in ((5, 2, 3), (1, 4))]
    with batchnorm.kernels.using("aten"):
        report = batchnorm.recalibrate(model, [pack_sequence(x, enforce_sorted=False) for x in data])
    assert (report.batches, report.samples) == (2, 5)
    for step, reached in enumerate(([0, 1], [0], [0], [], [])):  # by two sequences of a batch or more
        rows = [x[step] for batch in reached for x in data[batch] if len(x) > step]
        assert model.num_batches_tracked_l0[step] == len(reached)
        if rows:
            values = F.linear(torch.stack(rows), model.weight_ih_l0).detach()
            torch.testing.assert_close(model.running_mean_ih_l0[step], values.mean(0))
            torch.testing.assert_close(model.running_var_ih_l0[step], values.var(0))


def test_domains_and_conditions() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.domains = batchnorm.DomainBatchNorm(2, ("a", "b", "c"), dtype=torch.float64)
            self.classes = batchnorm.ConditionalBatchNorm(2, classes=3, dtype=torch.float64)

        def forward(self, x: Tensor, where: Any, condition: Tensor) -> Tensor:
            y: Tensor = self.classes(self.domains(x, domain=where), condition)
            return y

    model, x = Both(), torch.randn(12, 2, 3, dtype=torch.float64)
    data = [("a", x[:4]), (["a", "b"] * 4, x[4:])]
    with batchnorm.kernels.using("reference"):
        report = batchnorm.recalibrate(
            model, data, forward=lambda m, b: m(b[1], b[0], torch.zeros(len(b[1]), dtype=torch.int64))
        )
    own = torch.cat([x[:4], x[4::2]]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model.domains.of("a").running_mean, own.mean(1))
    torch.testing.assert_close(model.domains.of("b").running_var, x[5::2].transpose(0, 1).flatten(1).var(1))
    assert list(report.layers) == ["domains.domain_a", "domains.domain_b", "classes.norm"]
    assert report.skipped == {"domains.domain_c": "no forward called it"}


class FrozenBatchNorm2d(nn.Module):
    """As in torchvision."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean.view(1, -1, 1, 1)) / self.running_var.view(1, -1, 1, 1)


def test_what_is_left_is_left_and_named() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(2), FrozenBatchNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False), nn.BatchNorm2d(2),
        nn.BatchNorm2d(2), nn.ModuleDict({"a": nn.BatchNorm2d(2)})["a"],
    )  # fmt: skip
    batchnorm.freeze(model[3])
    model[4].eval()
    before = everything(model)
    report = batchnorm.recalibrate(model, batches(), layers=["0", "1", "2", "3", "4"])
    assert list(report.layers) == ["0"]
    assert {name: reason.split(":")[0] for name, reason in report.skipped.items()} == {
        "1": "FrozenBatchNorm2d never moves its statistics",
        "2": "it has no running statistics",
        "3": "it is frozen",
        "4": "it is held in evaluation while the model trains",
        "5": "it is not among the layers that were named",
    }
    after = everything(model)
    for name in ("0.running_mean", "0.running_var", "0.num_batches_tracked"):
        before["values"][name] = after["values"][name]
    assert_same(after, before)
    assert "4: skipped, it is held" in str(report)


def test_channels_elsewhere_than_in_dimension_1() -> None:
    class Transposed(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    model = nn.Sequential(nn.BatchNorm1d(7), Transposed(3))
    report = batchnorm.recalibrate(model, [torch.randn(4, 7, 3)])
    assert report.skipped == {"1": "it was called with (4, 7, 3), not with (N, 3, …)"}


def test_large_tensors_without_a_copy_in_float64() -> None:
    x = torch.randn(4, 16, 130, 130) + 1e4
    for seen in (x, x.transpose(2, 3)):
        found, right = moments_of(seen), Moments.of(seen, (0, 2, 3))
        torch.testing.assert_close(found.mean, right.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(found.m2, right.m2, rtol=1e-6, atol=0)
        assert torch.equal(found.count, right.count)
    with batchnorm.kernels.using("aten"):
        torch.testing.assert_close(moments_of(x).m2, Moments.of(x, (0, 2, 3)).m2, rtol=1e-12, atol=0)


def test_compiled_models_are_measured_too() -> None:
    model = network()
    compiled = torch.compile(model, backend="eager")
    compiled(batches()[0])
    report = batchnorm.recalibrate(compiled, batches())
    assert len(report.layers) == 4
    x = model.stem(torch.cat(batches())).detach()
    torch.testing.assert_close(model.bn.running_mean, x.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)


# --- standard errors ---


def direct_errors(parts: list[Tensor], eps: float) -> tuple[float, float]:
    """Standard errors from all batches side by side."""
    values = torch.cat(parts)
    N, B, mean, var = len(values), len(parts), values.mean(), values.var(correction=0)
    off = torch.stack([(p - mean).sum() for p in parts])
    wide = torch.stack([((p - mean).square() - var).sum() for p in parts])
    share = math.sqrt(B / (B - 1)) / N
    return float(off.norm() * share / (var + eps).sqrt()), float(wide.norm() * share / (var + eps))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=12), st.floats(-1e3, 1e3), st.integers(0, 12), st.integers(0, 99)
)
def test_standard_errors_are_those_of_clusters(sizes: list[int], offset: float, cut: int, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, generator=made, dtype=torch.float64) + offset for n in sizes]
    halves = []
    for some in (parts[:cut], parts[cut:]):
        halves.append(Clusters.empty((1,)))
        for p in some:
            halves[-1] = halves[-1].merged(Clusters.of(Moments.of(p.unsqueeze(1), 0)))
    whole = Clusters.unpacked(halves[0].merged(halves[1]).packed())
    assert whole.batches == len(parts)
    for found, right in zip(whole.errors(1e-5), direct_errors(parts, 1e-5), strict=True):
        # A root of what rounding leaves of squares: where the error is 0, it is known to half the digits.
        assert float(found) == pytest.approx(right, rel=1e-6, abs=1e-4)


def test_standard_errors_say_how_far_off_the_statistics_are() -> None:
    torch.manual_seed(0)
    seen = Clusters.empty((4000,))  # as many repetitions
    for n in (5, 9, 3, 14, 8, 6, 11, 2, 7, 10) * 2:
        x = torch.randn(n, 4000, dtype=torch.float64) + 0.5 * torch.randn(1, 4000, dtype=torch.float64)
        seen = seen.merged(Clusters.of(Moments.of(x, 0)))
    errors = torch.stack(seen.errors(0.0)) * torch.stack(
        (seen.total.biased_variance.sqrt(), seen.total.biased_variance)
    )
    spread = torch.stack((seen.total.mean, seen.total.biased_variance)).std(1)
    estimated = errors.square().mean(1).sqrt()
    torch.testing.assert_close(estimated, spread, rtol=0.1, atol=0)
    independent = 1 / math.sqrt(2 * 75)  # what the number of values alone would suggest
    assert spread[0] > 1.5 * independent


def test_it_stops_when_it_is_precise_enough() -> None:
    model, seen = nn.Sequential(nn.BatchNorm1d(3)), []

    def endless() -> Iterator[Tensor]:
        while True:
            yield torch.randn(50, 3)

    report = batchnorm.recalibrate(model, endless(), tolerance=0.05, progress=lambda *done: seen.append(done))
    layer = report.layers["0"]
    assert report.stopped == "tolerance"
    assert 5 <= report.batches < 200
    assert max(layer.mean_error, layer.variance_error) <= 0.05
    assert seen == [(n + 1, None) for n in range(report.batches)]
    assert "precise enough" in str(report)
    short = batchnorm.recalibrate(model, [torch.randn(50, 3)] * 4, tolerance=0.5)
    assert short.stopped == "data"  # four batches are too few to stop by


# --- data as it comes ---


def test_budgets_and_progress() -> None:
    model, told = network(), []
    report = batchnorm.recalibrate(model, batches(), batches=2, progress=lambda *done: told.append(done))
    assert (report.stopped, report.batches, told) == ("batches", 2, [(1, 2), (2, 2)])
    report = batchnorm.recalibrate(model, iter(batches()), batches=100)
    assert (report.stopped, report.batches) == ("data", 3)
    assert "the data ended before the 100 that were allowed" in str(report)
    told.clear()

    class Endless(torch.utils.data.IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(batches()[0])

    loader = torch.utils.data.DataLoader(Endless(), batch_size=16)  # whose len() raises
    batchnorm.recalibrate(model, loader, progress=lambda *done: told.append(done))
    assert told == [(n, None) for n in (1, 2, 3, 4)]
    told.clear()
    batchnorm.recalibrate(model, batches(), batches=2, method="layerwise", progress=lambda *done: told.append(done))
    assert told[0] == (1, 10)
    assert told[-1] == (10, 10)


def test_batches_that_are_not_finite_are_left_out() -> None:
    model, right, data = network(), network(), batches(8, 6, 7, 5)
    data[1][0, 0, 0, 0], data[3][2, 1, 3, 3] = torch.nan, torch.inf
    report = batchnorm.recalibrate(model, data)
    batchnorm.recalibrate(right, [data[0], data[2]])
    assert (report.batches, report.samples, report.skipped_batches) == (2, 15, 2)
    assert "2 batches skipped: not finite" in str(report)
    assert_same(model.state_dict(), right.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_statistics_that_were_poisoned_are_healed(method: Any) -> None:
    model = network()
    model.bn.running_mean.fill_(torch.nan)
    report = batchnorm.recalibrate(model, batches(), method=method)
    assert all(t.isfinite().all() for t in model.buffers())
    assert report.layers["bn"].mean_change == (math.inf, math.inf)
    json.dumps(report.as_dict(), allow_nan=False)


def test_half_precision() -> None:
    model, data = nn.Sequential(nn.BatchNorm2d(2)).bfloat16(), [x.bfloat16() for x in batches()]
    batchnorm.recalibrate(model, data)
    x = torch.cat(data).double()
    assert model[0].running_mean.dtype == torch.bfloat16
    assert torch.equal(model[0].running_mean, x.mean((0, 2, 3)).bfloat16())
    before = everything(model.half())  # whose running statistics torch.nn lets become half precision
    with pytest.raises(ValueError, match=r"none of the batches \(1\) could be used: in the layer '0' the moments"):
        batchnorm.recalibrate(model, [torch.tensor([6e4, -6e4]).half().view(2, 1, 1, 1).expand(2, 2, 1, 1)])
    assert_same(everything(model), before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (ValueError, "the data is empty", lambda: {"data": []}),
        (ValueError, "batches must be at least 1", lambda: {"batches": 0}),
        (ValueError, "tolerance must be above 0", lambda: {"tolerance": 0.0}),
        (ValueError, "'stem.bn' or lies under it", lambda: {"layers": "stem.bn"}),
        (TypeError, "data must be an iterable of batches", lambda: {"data": torch.randn(4, 2, 9, 8)}),
        (TypeError, "data must be an iterable of batches", lambda: {"data": 3}),
        (
            ValueError,
            r"none of the batches .* in the layer .bn. the",
            lambda: {"data": [b * torch.nan for b in batches(3, 4)]},
        ),
        (RuntimeError, r"batch 2 of the data: .*3 channels", lambda: {"data": [*batches(4), torch.randn(4, 3, 9, 8)]}),
        (ValueError, "an empty tuple", lambda: {"data": [()]}),
    ],
)
def test_bad_input(error: type[Exception], message: str, make: Callable[[], Any], method: Any) -> None:
    model = network()
    given = {"data": batches(), "method": method} | make()
    before = everything(model)
    with pytest.raises(error, match=message):
        batchnorm.recalibrate(model, **given)
    assert_same(everything(model), before)


def test_a_layer_that_makes_infinities_is_named() -> None:
    model = network()
    before = everything(model)
    model.block.conv2.weight.data[0, 0, 0, 0] = before["values"]["block.conv2.weight"][0, 0, 0, 0] = math.inf
    for method in METHODS:
        with pytest.raises(ValueError, match=r"none of the batches \(3\) could be used: in the layer 'block\.bn2'"):
            batchnorm.recalibrate(model, batches(), method=method)
        assert_same(everything(model), before)


def test_bad_models_and_methods() -> None:
    with pytest.raises(ValueError, match="nothing to recalibrate: the model has no batch normalization layer"):
        batchnorm.recalibrate(nn.Sequential(nn.Linear(2, 2)), [torch.randn(2, 2)])
    with pytest.raises(ValueError, match="0: it has no running statistics"):
        batchnorm.recalibrate(nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)), [torch.randn(2, 2)])
    with pytest.raises(ValueError, match="has seen no input"):
        batchnorm.recalibrate(nn.Sequential(nn.LazyLinear(2), nn.BatchNorm1d(2)), [torch.randn(2, 2)])
    with pytest.raises(ValueError, match="method must be one of 'batch', 'layerwise', got 'both'"):
        batchnorm.recalibrate(network(), batches(), method="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="data is a generator, which ends after one pass"):
        batchnorm.recalibrate(network(), (x for x in batches()), method="layerwise")
    with pytest.raises(ValueError, match=r"batch 1 of the data: Expected more than 1 value per channel"):
        batchnorm.recalibrate(nn.Sequential(nn.BatchNorm1d(2)), [torch.randn(1, 2)])


# --- whatever goes wrong ---


class TroubleError(RuntimeError):
    pass


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error", [TroubleError, KeyboardInterrupt], ids=lambda e: e.__name__)
@pytest.mark.parametrize("where", ["stem", "bn", "block", "block.bn2", "block.relu", "drop", "head"])
def test_an_error_at_any_layer_leaves_no_trace(where: str, error: type[BaseException], method: Any) -> None:
    model = network(MAKERS["accumulated"])
    model(batches()[0]).sum().backward()
    model.head.weight.grad = None
    model.bn.register_forward_hook(lambda *given: None)
    calls = 0

    def fail(*given: Any) -> None:
        nonlocal calls
        calls += 1
        torch.rand(1), random.random(), np.random.rand()
        if calls == (4 if method == "layerwise" and where != "drop" and where != "head" else 2):
            raise error("on purpose")

    model.get_submodule(where).register_forward_pre_hook(fail)
    before = everything(model)
    with pytest.raises(error, match="on purpose") as caught:
        batchnorm.recalibrate(model, batches(), method=method)
    assert_same(everything(model), before)
    assert ("batch " in str(caught.value)) == (error is TroubleError)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ["data", "metric before", "metric after", "progress", "forward"])
@pytest.mark.parametrize("error", [TroubleError, KeyboardInterrupt], ids=lambda e: e.__name__)
def test_an_error_elsewhere_leaves_no_trace(where: str, error: type[BaseException], method: Any) -> None:
    model = network()
    before, measured = everything(model), []

    class Data:
        def __iter__(self) -> Iterator[Tensor]:
            yield from batches()
            if where == "data":
                raise error("on purpose")

    def metric(m: nn.Module) -> float:
        measured.append(m.bn.running_mean.clone())
        torch.rand(1)
        if where == ("metric after" if len(measured) == 2 else "metric before"):
            raise error("on purpose")
        return 0.0

    def fail(*given: Any) -> None:
        if where in ("progress", "forward"):
            raise error("on purpose")

    with pytest.raises(error, match="on purpose"):
        batchnorm.recalibrate(
            model, Data(), metric=metric, method=method, forward=lambda m, b: (m(b), fail()),
            progress=lambda *done: fail(),
        )  # fmt: skip
    assert_same(everything(model), before)
    assert torch.equal(measured[0], before["values"]["bn.running_mean"])
    assert len(measured) == (2 if where == "metric after" else 1)


def test_the_metric_is_taken_in_evaluation_before_and_after() -> None:
    model, calls = network(), []

    def metric(m: nn.Module) -> float:
        assert not any(part.training for part in m.modules())
        assert not torch.is_grad_enabled()
        calls.append(float(m(batches()[0]).square().mean()))
        return calls[-1]

    state = torch.get_rng_state()
    report = batchnorm.recalibrate(model, batches(), metric=metric)
    assert [report.metric_before, report.metric_after] == calls
    assert calls[0] != calls[1]
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        assert calls[1] == float(model.eval()(batches()[0]).square().mean())
    assert f"metric: {calls[0]:.6g} before, {calls[1]:.6g} after" in str(report)


def test_ctrl_c_in_a_real_process(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent("""
        import sys, torch, batchnorm
        from torch import nn
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout())
        before = {name: t.clone() for name, t in model.state_dict().items()}
        state = torch.get_rng_state()

        def endless():
            while True:
                yield torch.randn(8, 1, 9, 9)

        try:
            batchnorm.recalibrate(model, endless(), progress=lambda done, _: done == 3 and print("ready", flush=True))
        except KeyboardInterrupt:
            same = all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
            print("same" if same and model.training and torch.equal(torch.get_rng_state(), state) else "other")
        """)
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            printed, _ = process.communicate(timeout=HANGS_AFTER)
        finally:
            process.kill()
    assert (printed, process.returncode) == ("same\n", 0)


# --- what it is for ---


def test_stale_statistics_give_their_accuracy_back() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn has the digits")
    from batchnorm.study.arms import ARMS, build
    from batchnorm.study.data import digits, order
    from batchnorm.study.train import accuracy

    data, model = digits(), build(ARMS[1], seed=0)
    batchnorm.revert(model)  # torch.nn's layers, which need not be compiled
    for layer in norms(model).values():
        layer.momentum = 0.001
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for indices in order(len(data.train), 100, 50, seed=0):
        optimizer.zero_grad()
        F.cross_entropy(model(data.train.images[indices]), data.train.labels[indices]).backward()
        optimizer.step()
    precise, stale = copy.deepcopy(model), accuracy(model, data.test)
    loader = data.train.images.split(100)
    with torch.no_grad():
        for name, (mean, var) in oracle(model, list(loader)).items():
            norms(precise)[name].running_mean.copy_(mean)
            norms(precise)[name].running_var.copy_(var)
    lost = accuracy(precise, data.test) - stale
    assert lost > 0.2
    for method in METHODS:
        twin = copy.deepcopy(model)
        report = batchnorm.recalibrate(twin, loader, method=method, metric=lambda m: accuracy(m, data.test))
        assert report.metric_before == stale
        assert report.metric_after - stale >= 0.9 * lost


def test_uneven_batches_beside_update_bn() -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(128, 2, 4, 4), 5 + torch.randn(3, 2, 4, 4)])
    right = x.double().mean((0, 2, 3)), x.double().transpose(0, 1).flatten(1).var(1)
    ours, theirs = nn.Sequential(nn.BatchNorm2d(2)), nn.Sequential(nn.BatchNorm2d(2))
    batchnorm.recalibrate(ours, x.split(64))
    torch.optim.swa_utils.update_bn(x.split(64), theirs)
    torch.testing.assert_close(ours[0].running_mean.double(), right[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours[0].running_var.double(), right[1], rtol=1e-6, atol=1e-6)
    assert (theirs[0].running_mean - right[0]).abs().min() > 1  # three samples weigh as much as 64
    assert (theirs[0].running_var / right[1]).max() < 0.8  # and batches have no spread between them
    assert ours[0].num_batches_tracked == theirs[0].num_batches_tracked == 3


@pytest.mark.parametrize("make", [resnet, levit], ids=["resnet", "levit"])
def test_models_of_transformers(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = randomized(make()).double()
    data = [
        {"pixel_values": torch.randn(n, 3, 32, 32, dtype=torch.float64) + n, "labels": torch.zeros(n)} for n in (4, 3)
    ]
    seen: dict[str, list[Tensor]] = {}
    twin = copy.deepcopy(model).eval()
    for name, layer in norms(twin).items():
        layer.train()
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0].detach()))
    for batch in data:
        twin(batch["pixel_values"])
    report = batchnorm.recalibrate(model, data)
    assert set(report.layers) == set(seen)
    assert set(norms(model)) == set(report.layers) | set(report.skipped)
    for name in report.layers:
        values = torch.cat([x.transpose(0, 1).flatten(1) for x in seen[name]], 1)
        torch.testing.assert_close(norms(model)[name].running_mean, values.mean(1), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(norms(model)[name].running_var, values.var(1), rtol=1e-9, atol=1e-9)


def test_the_page_compares_what_it_says() -> None:
    pytest.importorskip("sklearn", reason="docs/recalibrating.py needs scikit-learn's digits")
    page: Any = runpy.run_path(str(DOCS / "recalibrating.py"))
    model, loader = nn.Sequential(network().stem, nn.BatchNorm2d(3), nn.ReLU(), BasicBlock(3, 4)), batches()
    ours, swa, fvcore = (copy.deepcopy(model) for _ in range(3))
    batchnorm.recalibrate(ours, loader)
    torch.optim.swa_utils.update_bn(loader, swa)
    page["fvcore"](fvcore.train(), loader)
    assert max(page["distance"](ours, loader)) < 1e-6
    assert min(page["distance"](swa, loader)) > 0.05
    assert 1e-6 < page["distance"](fvcore, loader)[0] < 1e-2  # right but for the correction of the variance
    n = 131 * 7 * 6
    torch.testing.assert_close(fvcore[1].running_var * (n / (n - 1)), ours[1].running_var, rtol=1e-4, atol=1e-4)
    assert [m.momentum for m in page["norms"](fvcore)] == [0.1] * 4


@pytest.mark.parametrize(
    "code", re.findall(r"```python\n(.*?)```", (DOCS / "recalibrating.md").read_text(encoding="utf-8"), re.DOTALL)
)
def test_example(code: str) -> None:
    names: dict[str, Any] = {}
    exec(compile(code, "recalibrating.md", "exec"), names)
    assert names["report"].skipped == {}
