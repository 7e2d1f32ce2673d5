"""The contenders compute the same: layers with what follows them, rivals, whole networks."""

import importlib.util

import pytest
import torch
from torch import nn

from batchnorm import layers
from batchnorm.benchmark import check, grid, memory, models, peers, rivals, traffic, whole

RELU = grid.Cell((8, 16, 6, 6), fused="bn+relu")
ADDED = grid.Cell((8, 16, 6, 6), fused="bn+add+relu")


@pytest.mark.parametrize("cell", [RELU, ADDED])
def test_the_gate_lets_fused_layers_through(cell):
    found = check.check(cell)
    assert found.problems == ()
    assert (found.training, found.evaluation) == ("numba", "aten")  # which evaluates what is small
    assert ("dresidual" in found.errors) == (cell is ADDED)
    assert found.saved[peers.OURS].extra < cell.bytes / 8
    assert found.saved[peers.TORCH].extra >= cell.bytes  # the activation's result


def test_a_forgotten_activation_or_residual_is_refused(monkeypatch):
    right = peers.layer

    def forgets(source, given, fused="bn"):
        if source is nn:
            return right(source, given, fused)
        layer = layers.BatchNorm2d(given.x.shape[1])
        layer.load_state_dict(right(layers, given).state_dict())
        return layer

    monkeypatch.setattr(check, "layer", forgets)
    assert any(problem.startswith("y is off by") for problem in check.check(RELU).problems)
    assert any(problem.startswith("dresidual is off by") for problem in check.check(ADDED).problems)


def test_a_relu_near_zero_may_take_either_side_but_not_elsewhere():
    given = peers.inputs(RELU)
    y = peers.layer(nn, given, "bn+relu")(given.x).detach()
    right = check.oracle(given, slice(0, 16), "bn+relu", y)
    z = right["y" + check._ARGUMENT]
    assert torch.equal(right["y"], z.relu())
    far = check.oracle(given, slice(0, 16), "bn+relu", torch.zeros_like(y))
    assert torch.equal(far["dx"], right["dx"])  # nothing is near zero here, so what y says does not count
    channel = int(z.abs().flatten(2).amin(2).amin(0).argmin())
    nearest = z[:, channel].abs().min()
    given.bias[channel] -= z[:, channel].flatten()[z[:, channel].abs().argmin()]
    assert nearest < 0.1
    sides = [check.oracle(given, slice(0, 16), "bn+relu", side)["dbias"] for side in (torch.zeros_like(y), y + 1)]
    assert (sides[0] != sides[1]).nonzero().flatten().tolist() == [channel]


@pytest.mark.parametrize("cell", [RELU, ADDED])
def test_onnx_runtime_gives_the_same(cell):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    given = peers.inputs(cell)
    with torch.no_grad():
        calls, left_out = rivals.rivals(cell, given, "evaluation", only=(rivals.ONNX,))
        (y,) = calls[rivals.ONNX]().get_outputs() if not left_out else (None,)
    assert left_out == {}
    expected = peers.layer(nn, given, cell.fused).eval()(*given.arguments)
    torch.testing.assert_close(torch.from_numpy(y.numpy()), expected.detach())


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")
@pytest.mark.parametrize("cell", [grid.Cell((8, 16, 6, 6)), RELU, ADDED])
def test_jax_gives_the_same(cell):
    given = peers.inputs(cell)
    _, gradients, moved = rivals.rivals(cell, given, "forward+backward", only=(rivals.JAX,))[0][rivals.JAX]()
    built = peers.layer(nn, given, cell.fused)
    built(*given.arguments).backward(given.grad_y)
    expected = [*(t.grad for t in given.arguments), *(p.grad for p in built.parameters())]
    found = [torch.from_numpy(one.copy()) for one in map(__import__("numpy").asarray, (*gradients, *moved))]
    for one, right in zip(found, (*expected, built.running_mean, built.running_var), strict=True):
        torch.testing.assert_close(one, right, rtol=1e-4, atol=1e-4)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: None)
    calls, left_out = rivals.rivals(RELU, peers.inputs(RELU), "evaluation", only=(rivals.JAX, rivals.ONNX))
    assert calls == {}
    assert left_out[rivals.JAX] == "not installed: jax"
    assert "onnxruntime" in left_out[rivals.ONNX]


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
    found = check.check(cell)
    assert found.problems == ()
    assert (found.training, found.evaluation) == ("numba", "aten")  # which evaluates what is small

    monkeypatch.setattr(layers.BatchNorm2d, "forward", lambda self, x, residual=None: nn.BatchNorm2d.forward(self, x))
    assert any(problem.startswith("y is off by") for problem in check.check(cell).problems)


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
    assert alone.bytes[peers.OURS] // tensor == 1
    assert alone.bytes[peers.TORCH] // tensor == 2
    assert chained.bytes[peers.OURS] // tensor == 2 * count  # each convolution keeps its input, whoever made it
    assert chained.bytes[peers.TORCH] // tensor == 2 * count + 1
    assert leaky.bytes[peers.OURS] // tensor == count + 1
    assert leaky.bytes[peers.TORCH] // tensor == 3 * count


def test_the_peak_is_what_is_held_at_once():
    def step():
        a = torch.empty(1000, 1000)
        b = torch.empty(1000, 1000)
        del a, b
        c = torch.empty(1000, 1000)
        del c

    assert 8e6 <= memory.peak(step) < 8.1e6
