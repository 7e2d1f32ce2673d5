"""The contenders compute the same: layers with what follows them, baselines, whole networks."""

import dataclasses
import importlib.util

import pytest
import torch
from torch import nn

from batchnorm import layers
from batchnorm.benchmark import contenders, gate
from benchmarks import baselines, grid, memory, models, traffic, whole

RELU = grid.Cell((8, 16, 6, 6), fused="bn+relu")
ADDED = grid.Cell((8, 16, 6, 6), fused="bn+add+relu")


@pytest.mark.parametrize("cell", [RELU, ADDED])
def test_the_gate_lets_fused_layers_through(cell):
    found = gate.check(cell)
    assert found.problems == ()
    assert (found.training, found.evaluation) == ("numba", "aten")  # which evaluates what is small
    assert ("dresidual" in found.errors) == (cell is ADDED)
    assert found.saved[contenders.OURS].extra < cell.bytes / 8
    assert found.saved[contenders.TORCH].extra >= cell.bytes  # the activation's result


def test_a_forgotten_activation_or_residual_is_refused(monkeypatch):
    right = contenders.layer

    def forgets(source, given, cell):
        if source is nn:
            return right(source, given, cell)
        layer = layers.BatchNorm2d(given.x.shape[1])
        layer.load_state_dict(right(layers, given, cell).state_dict())
        return layer

    monkeypatch.setattr(gate, "layer", forgets)
    assert any(problem.startswith("y is off by") for problem in gate.check(RELU).problems)
    assert any(problem.startswith("dresidual is off by") for problem in gate.check(ADDED).problems)


@pytest.mark.parametrize("name", ["relu", "relu6", "hardswish"])
def test_an_activation_near_a_kink_may_take_either_side_but_not_elsewhere(name):
    cell = grid.Cell((8, 16, 6, 6), fused=f"bn+{name}")
    given = contenders.inputs(cell)
    part = slice(0, 16)
    assert torch.equal(gate.settled(given, cell).grad_y, given.grad_y)  # nothing is near a kink here
    arguments = gate._argument(given, part)[0]
    z = min((arguments - kink for kink in gate._KINKS[name]), key=lambda distance: distance.abs().min())
    channel = int(z.abs().flatten(2).amin(2).amin(0).argmin())
    nearest = int(z[:, channel].flatten().abs().argmin())
    assert z[:, channel].abs().min() < 0.1
    given.bias[channel] -= z[:, channel].flatten()[nearest]
    settled = gate.settled(given, cell)
    cleared = (settled.grad_y != given.grad_y)[:, channel].flatten().nonzero().flatten().tolist()
    assert cleared == [nearest]
    assert (settled.grad_y != given.grad_y).sum() == 1
    sides = []
    for side in (-1e-6, 1e-6):
        given.bias[channel] += side
        sides.append(gate.oracle(dataclasses.replace(settled, bias=given.bias.clone()), part, cell)["dbias"])
        given.bias[channel] -= side
    torch.testing.assert_close(*sides)


@pytest.mark.parametrize("cell", [RELU, ADDED])
def test_onnx_runtime_gives_the_same(cell):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    given = contenders.inputs(cell)
    with torch.no_grad():
        calls, skipped = baselines.build(cell, given, "evaluation", only=(baselines.ONNX,))
        (y,) = calls[baselines.ONNX]().get_outputs() if not skipped else (None,)
    assert skipped == {}
    expected = contenders.layer(nn, given, cell).eval()(*given.arguments)
    torch.testing.assert_close(torch.from_numpy(y.numpy()), expected.detach())


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")
@pytest.mark.parametrize("cell", [grid.Cell((8, 16, 6, 6)), RELU, ADDED])
def test_jax_gives_the_same(cell):
    given = contenders.inputs(cell)
    _, gradients, moved = baselines.build(cell, given, "forward+backward", only=(baselines.JAX,))[0][baselines.JAX]()
    built = contenders.layer(nn, given, cell)
    built(*given.arguments).backward(given.grad_y)
    expected = [*(t.grad for t in given.arguments), *(p.grad for p in built.parameters())]
    found = [torch.from_numpy(one.copy()) for one in map(__import__("numpy").asarray, (*gradients, *moved))]
    for one, right in zip(found, (*expected, built.running_mean, built.running_var), strict=True):
        torch.testing.assert_close(one, right, rtol=1e-4, atol=1e-4)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    calls, skipped = baselines.build(RELU, contenders.inputs(RELU), "evaluation", only=(baselines.JAX, baselines.ONNX))
    assert calls == {}
    assert skipped[baselines.JAX] == "not installed: jax"
    assert "onnxruntime" in skipped[baselines.ONNX]


@pytest.mark.parametrize("name", list(models.MODELS))
def test_networks_have_the_same_tensors_in_both_builds(name):
    cell = grid.Cell((1, 3, 32, 32), kind="model", model=name)
    with torch.device("meta"):
        states = [models.MODELS[name](norm).state_dict() for norm in whole._KINDS.values()]
    assert states[0].keys() == states[1].keys()
    assert cell.name == f"{name}, 1×3×32×32 float32 contiguous"


def test_networks_have_the_published_number_of_parameters():
    with torch.device("meta"):
        found = {name: build(whole._plain, 1000) for name, build in models.MODELS.items()}
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in found.items()}
    assert counts == {  # torchvision's
        "ResNet-18": 11689512, "ResNet-50": 25557032, "DenseNet-121": 7978856, "MobileNetV2": 3504872,
    }  # fmt: skip


def test_a_network_is_checked_before_it_is_timed(monkeypatch):
    monkeypatch.setitem(models.MODELS, "small", lambda norm: nn.Sequential(
        models.ConvNorm(norm, 3, 16, 3), models._basic(norm, 16, 16, 1), *models._head(16, 100)
    ))  # fmt: skip
    cell = grid.Cell((8, 3, 8, 8), kind="model", model="small")
    found = whole.check(cell)
    assert found.problems == ()
    assert (found.training, found.evaluation) == ("numba", "aten")  # which evaluates what is small

    monkeypatch.setattr(layers.BatchNorm2d, "forward", lambda self, x, residual=None: nn.BatchNorm2d.forward(self, x))
    assert any(problem.startswith("y is off by") for problem in whole.check(cell).problems)


# --- bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "operation", "cache", "tensors"),
    [
        (grid.Cell((8, 16, 8, 8)), "forward", 8 * 64 * 4, 2),  # one channel fits
        (grid.Cell((8, 16, 8, 8)), "forward", 8 * 64 * 4 - 1, 3),
        (grid.Cell((8, 16, 8, 8)), "forward+backward", 2 * 8 * 64 * 4, 5),
        (grid.Cell((8, 16, 8, 8)), "forward+backward", 8 * 64 * 4, 7),  # x fits, its gradient besides does not
        (grid.Cell((8, 16, 8, 8)), "forward+backward", 0, 8),
        (grid.Cell((8, 16, 8, 8)), "evaluation", 0, 2),
        (grid.Cell((8, 32, 8, 8), layout="channels_last"), "forward", 8 * 64 * 64, 2),  # a cache line for each pixel
        (grid.Cell((8, 32, 8, 8), layout="channels_last"), "forward", 8 * 64 * 64 - 1, 3),
        (grid.Cell((64, 32), "bfloat16"), "forward", 64 * 64, 2),
        (grid.Cell((8, 16, 8, 8), fused="bn+relu"), "forward+backward", 2**20, 5),
        (grid.Cell((8, 16, 8, 8), fused="bn+add+relu"), "forward", 2**20, 3),
        (grid.Cell((8, 16, 8, 8), fused="bn+add+relu"), "evaluation", 2**20, 3),
        (grid.Cell((8, 16, 8, 8), fused="bn+add+relu"), "forward+backward", 2**20, 7 + 2 / 32),
        (grid.Cell((8, 16, 8, 8), fused="bn+add+relu"), "forward+backward", 0, 10 + 2 / 32),
    ],
)
def test_the_floor_counts_tensors(cell, operation, cache, tensors):
    assert traffic.floor(cell, operation, cache) == tensors * cell.bytes


def test_what_is_kept_counts_storages_once():
    alone, chained, leaky = memory.kept()
    tensor = memory._BATCH * memory._CHANNELS * memory._SIDE**2 * 4
    count = memory._BLOCKS
    assert alone.bytes[contenders.OURS] // tensor == 1
    assert alone.bytes[contenders.TORCH] // tensor == 2
    assert chained.bytes[contenders.OURS] // tensor == 2 * count  # each convolution keeps its input, whoever made it
    assert chained.bytes[contenders.TORCH] // tensor == 2 * count + 1
    assert leaky.bytes[contenders.OURS] // tensor == count + 1
    assert leaky.bytes[contenders.TORCH] // tensor == 3 * count


def test_the_peak_is_what_is_held_at_once():
    def step():
        a = torch.empty(1000, 1000)
        b = torch.empty(1000, 1000)
        del a, b
        c = torch.empty(1000, 1000)
        del c

    assert 8e6 <= memory.peak(step) < 8.1e6
