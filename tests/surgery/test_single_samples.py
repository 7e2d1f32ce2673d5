"""Recalibrating with batches of one sample among others, and layers that nothing moves."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from networks import randomized
from torch import Tensor, nn

import batchnorm

MAKERS: dict[str, Callable[[int], nn.Module]] = {
    "torch": nn.BatchNorm1d,
    "ours": batchnorm.BatchNorm1d,
    "ghost": lambda c: batchnorm.BatchNorm1d(c, statistics=batchnorm.Ghost(4)),
    "sync": lambda c: nn.SyncBatchNorm(c),
}


def network(make: Callable[[int], nn.Module] = nn.BatchNorm1d) -> nn.Sequential:
    torch.manual_seed(0)
    model: nn.Sequential = randomized(nn.Sequential(nn.Linear(3, 5), make(5), nn.ReLU(), nn.Linear(5, 4), make(4)))
    return model


def samples(n: int) -> Tensor:
    return 2 * torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) + 1


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("sizes", [(16, 8, 1), (16, 1, 8, 1)])
def test_a_batch_of_one_sample_counts_as_one(kind: str, sizes: tuple[int, ...]) -> None:
    """It is normalized with what the batches before have given, since it has no variance of its own."""
    model = network(MAKERS[kind])
    right = copy.deepcopy(model).double()
    data = [samples(n) for n in sizes]
    report = batchnorm.recalibrate(model, data)
    assert (report.batches, report.samples) == (len(sizes), sum(sizes))
    seen: list[list[Tensor]] = [[], []]
    for x in data:
        h = x.double()
        for found, linear, norm in zip(seen, (right[0], right[3]), (right[1], right[4]), strict=True):
            h = linear(h)
            found.append(h)
            use = torch.cat(found[:-1]) if len(h) == 1 else h
            var = use.var(0, correction=1 if len(h) == 1 else 0)
            h = ((h - use.mean(0)) / (var + norm.eps).sqrt() * norm.weight + norm.bias).relu()
    for found, norm in zip(seen, (model[1], model[4]), strict=True):
        every = torch.cat(found)
        torch.testing.assert_close(norm.running_mean.double(), every.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var.double(), every.var(0), rtol=1e-5, atol=1e-6)
        assert norm.num_batches_tracked == len(sizes)
        assert norm.training


def test_batches_of_one_sample_alone_are_an_error_that_names_the_remedy() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    said = (
        "batch 1 of the data: Expected more than 1 value per channel when training, got input size (1, 5) in 1: begin "
        "with larger batches, or use method='layerwise', which takes any"
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        batchnorm.recalibrate(model, [samples(1), samples(8)])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert batchnorm.recalibrate(model, [samples(1), samples(8)], method="layerwise").samples == 9


def test_layers_that_no_training_moves_are_left() -> None:
    """Lightning's BaseFinetuning.freeze sets track_running_stats to False and keeps the buffers."""
    model = network()
    model[1].track_running_stats = False
    mean = model[1].running_mean.clone()
    for report in (
        batchnorm.recalibrate(model, [samples(16)]),
        batchnorm.adapt(model, samples(16)),
        batchnorm.recalibrate(model, [samples(16)], method="layerwise"),
    ):
        assert list(report.layers) == ["4"]
        assert "its track_running_stats is False" in report.skipped["1"]
    assert torch.equal(model[1].running_mean, mean)
    model[4].track_running_stats = False
    with pytest.raises(ValueError, match=r"nothing to recalibrate: .*\n.*track_running_stats is False"):
        batchnorm.recalibrate(model, [samples(16)])
    with pytest.raises(ValueError, match=r"nothing to adapt: .*\n.*track_running_stats is False"):
        batchnorm.adapt(model, samples(16))


def test_samples_of_objects_are_counted_by_the_first_layer() -> None:
    class Graph:
        def __init__(self, nodes: Tensor) -> None:
            self.nodes = nodes

    report = batchnorm.recalibrate(
        network(), [Graph(samples(16)), Graph(samples(8))], forward=lambda model, graph: model(graph.nodes)
    )
    assert (report.batches, report.samples) == (2, 24)
