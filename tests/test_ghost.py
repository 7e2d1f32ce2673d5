"""Ghost: what a layer gives is what torch.nn's gives when it is called on each part of the batch in turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from batchnorm import Accumulated, Ghost, kernels
from batchnorm.functional import batch_norm
from batchnorm.kernels import plans
from expected import OURS, Result, assert_right, in_float64, laid, step

BF16 = torch.bfloat16
# (shape, layout, size): of the last part, too; and the loops that are to serve it.
VIEWS: dict[tuple[tuple[int, ...], str, int], tuple[str, bool]] = {
    ((7, 9, 6, 7), "contiguous", 3): ("planes", True),
    ((5, 3, 150, 151), "contiguous", 2): ("planes", False),
    ((35, 70), "contiguous", 8): ("rows", True),
    ((5, 9, 70, 71), "channels_last", 4): ("rows", False),
    ((7, 9, 3, 3), "contiguous", 3): ("small", True),
    ((7, 1, 4, 9), "contiguous", 3): ("planes", True),
    ((7, 4, 9), "contiguous", 2): ("small", True),
    ((7, 9, 2, 3, 6), "contiguous", 4): ("planes", True),
}
PLANES, SPLIT_PLANES, ROWS, SPLIT_ROWS, SMALL = list(VIEWS)[:5]


def made(channels: int, dims: int, size: int | None, **options: Any) -> Any:
    """A layer whose parameters and statistics are not the first ones."""
    layer = OURS[dims](channels, statistics=None if size is None else Ghost(size), **options)
    with torch.no_grad():
        for tensor, low, high in (
            (layer.weight, 0.5, 1.8), (layer.bias, -0.5, 0.8), (layer.running_mean, -1, 1), (layer.running_var, 0.3, 4),
        ):  # fmt: skip
            if tensor is not None:
                tensor.copy_(torch.linspace(low, high, channels))
    return layer


def in_parts(layer: Any, x: Tensor, grad: Tensor, size: int) -> Result:
    """By torch.nn in float64, one part after the other."""
    twin = in_float64(layer)
    twin.forward = lambda x: torch.cat([type(twin).forward(twin, part) for part in x.split(size)])  # type: ignore[method-assign]
    return step(twin, x.double(), grad.double())


def compare(view: Any, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    shape, layout, size = view
    layer = made(shape[1], len(shape), size, dtype=dtype, **options)
    x, grad = (laid(shape, seed, dtype, layout) for seed in range(2))
    plan = plans.laid_out_sets(x, size, False)[1]
    assert view not in VIEWS or (plan.kind, plan.fused) == VIEWS[view]
    right = in_parts(layer, x, grad, size)
    found = step(layer, x, grad)
    assert kernels.ran() == ("numba", "numba")
    assert_right(found, right, dtype)
    if layer.track_running_stats:
        assert layer.num_batches_tracked == -(-shape[0] // size)


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_every_view(view: Any) -> None:
    compare(view)


@pytest.mark.parametrize(("view", "dtype"), [(PLANES, torch.float64), (PLANES, BF16), (SPLIT_ROWS, BF16)], ids=str)
def test_other_dtypes(view: Any, dtype: torch.dtype) -> None:
    compare(view, dtype)


@pytest.mark.parametrize("options", [
    {"momentum": None}, {"momentum": 0.0}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1},
    {"affine": False, "track_running_stats": False},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("view", [PLANES, SPLIT_ROWS], ids=str)
def test_options(view: Any, options: dict[str, Any]) -> None:
    compare(view, **options)


@pytest.mark.parametrize(("shape", "size"), [
    ((7, 9, 6, 7), 7), ((7, 9, 6, 7), 100), ((7, 9, 6, 7), 1), ((1, 9, 6, 7), 3), ((7, 9, 3, 3), 1), ((35, 70), 35),
], ids=str)  # fmt: skip
def test_sizes(shape: tuple[int, ...], size: int) -> None:
    """The whole batch, more than that, and single samples: instance normalization."""
    compare((shape, "contiguous", size))


@pytest.mark.parametrize("layout", ["gaps", "batch_last", "channels_last"])
def test_layouts(layout: str) -> None:
    compare(((7, 9, 6, 7), layout, 3))


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("view", [((5, 9, 8, 8), "contiguous", 2), ((5, 32, 5, 5), "channels_last", 2)], ids=str)
def test_output_written_around_the_caches(view: Any) -> None:
    assert plans.laid_out_sets(laid(view[0], 0, torch.float32, view[1]), 2, False)[1].streams
    compare(view)


@pytest.mark.parametrize("expand", [(1, 9, 6, 7), (7, 9, 1, 1), (7, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("shape", [(7, 9, 6, 7), (7, 9, 3, 3)], ids=str)
def test_an_expanded_gradient(shape: tuple[int, ...], expand: tuple[int, ...]) -> None:
    """As mean() and sum() give it: one value for many places."""
    smaller = tuple(min(pair) for pair in zip(shape, expand, strict=True))
    grad = torch.randn(smaller, generator=torch.Generator().manual_seed(1)).expand(shape)
    layer, x = made(9, 4, 3), laid(shape, 0, torch.float32)
    right = in_parts(layer, x, grad, 3)
    assert_right(step(layer, x, grad), right, torch.float32)


def fused_step(layer: Any, x: Tensor, residual: Tensor, grad: Tensor, call: Callable[..., Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
    y = call(*leaves)
    return [y.detach(), *torch.autograd.grad(y, [*leaves, layer.weight, layer.bias], grad)]


@pytest.mark.parametrize(
    ("view", "activation"),
    [(PLANES, "relu"), (SMALL, "relu"), (ROWS, "relu"), (SPLIT_ROWS, "relu"), (PLANES, "silu")],
    ids=str,
)
def test_activation_and_residual(view: Any, activation: str) -> None:
    shape, layout, size = view
    layer = made(shape[1], len(shape), size, activation=activation)
    x, grad, residual = (laid(shape, seed, torch.float32, layout) for seed in range(3))
    twin = in_float64(layer)

    def by_torch(x: Tensor, residual: Tensor) -> Tensor:
        z = torch.cat([twin(part) for part in x.split(size)]) + residual
        undecided.append(z.detach().abs() < 1e-4)
        return torch.relu(z) if activation == "relu" else nn.functional.silu(z)

    undecided: list[Tensor] = []  # where rounding decides on which side of 0 z lies
    right = fused_step(twin, x.double(), residual.double(), grad.double(), by_torch)
    found = fused_step(layer, x, residual, grad, layer)
    assert kernels.ran() == ("numba", "numba")
    assert undecided[0].double().mean() < 1e-3
    for i, (ours, oracle) in enumerate(zip(found, right, strict=True)):
        if i < 3:
            ours, oracle = (t.double().masked_fill(undecided[0], 0.0) for t in (ours, oracle))
        slack = 0 if i < 3 else undecided[0].sum() + 1e-6 * x.numel() ** 0.5 * oracle.abs().max()
        assert (ours.double() - oracle).abs().max() <= 4e-6 * oracle.abs().max() + slack, i
    assert_right_buffers(layer, twin)


def assert_right_buffers(layer: Any, twin: Any) -> None:
    assert layer.num_batches_tracked == twin.num_batches_tracked
    torch.testing.assert_close(layer.running_mean.double(), twin.running_mean, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(layer.running_var.double(), twin.running_var, rtol=2e-6, atol=2e-6)


def test_in_place() -> None:
    shape = (7, 9, 6, 7)
    layer = made(9, 4, 3, inplace=True, activation=("leaky_relu", 0.5))
    x, grad = (laid(shape, seed, torch.float32) for seed in range(2))
    twin = in_float64(layer)
    wide = x.double().requires_grad_()
    right = nn.functional.leaky_relu(torch.cat([twin(part) for part in wide.split(3)]), 0.5)
    right.backward(grad.double())
    leaf = x.clone().requires_grad_()
    fed = leaf * 1
    y = layer(fed)
    assert y.data_ptr() == fed.data_ptr()
    y.backward(grad)
    assert wide.grad is not None
    assert leaf.grad is not None
    torch.testing.assert_close(y.detach().double(), right.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-4, atol=1e-4)
    assert_right_buffers(layer, twin)


@pytest.mark.parametrize("kernel", ["numba", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_part_alone_is_not_counted(kernel: Any, bad: float) -> None:
    layer, size = made(9, 4, 3), 3
    x, grad = (laid((7, 9, 6, 7), seed, torch.float32) for seed in range(2))
    good = [slice(0, 3), slice(6, 7)]
    poisoned = x.clone()
    poisoned[4, 2, 3, 3] = bad
    twin = in_float64(layer)
    right = step(twin, x[good[0]].double(), grad[good[0]].double()), step(twin, x[good[1]].double(), grad[6:].double())
    with kernels.using(kernel):
        found = step(layer, poisoned, grad)
    assert kernels.ran().forward == kernel
    assert layer.num_batches_tracked == 2
    assert_right_buffers(layer, twin)
    assert not found.y[3:6, 2].isfinite().any()
    for part, expected in zip(good, right, strict=True):
        assert found.x_grad is not None
        assert expected.x_grad is not None
        torch.testing.assert_close(found.y[part].double(), expected.y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.x_grad[part].double(), expected.x_grad, rtol=1e-5, atol=1e-5)
    assert size == layer.statistics.size


@pytest.mark.parametrize("view", [PLANES, SPLIT_PLANES, ROWS, SPLIT_ROWS, SMALL], ids=str)
def test_the_number_of_threads_changes_no_bit(view: Any, threads: Callable[[int], None]) -> None:
    shape, layout, size = view
    shape = (shape[0], 40 * shape[1], *shape[2:]) if len(shape) == 4 and shape[2] < 10 else shape  # else one suffices
    x, grad = (laid(shape, seed, torch.float32, layout) for seed in range(2))
    assert plans.laid_out_sets(x, size, False)[1].worth_threads > 1 or len(shape) == 2
    results = []
    for number in (1, 2):
        threads(number)
        results.append(step(made(shape[1], len(shape), size), x, grad))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_plain_pytorch_does_the_same(dtype: torch.dtype) -> None:
    layer = made(9, 4, 3, dtype=dtype)
    x, grad = (laid((7, 9, 6, 7), seed, dtype) for seed in range(2))
    right = in_parts(layer, x, grad, 3)
    with kernels.using("reference"):
        assert_right(step(layer, x, grad), right, dtype)
    assert kernels.ran().forward == "reference"


def test_derivatives_of_derivatives() -> None:
    x, weight, bias = (laid(shape, 3, torch.float64).reshape(shape[:4]) for shape in ((5, 2, 2, 1), (2, 1), (2, 1)))
    inputs = [t.clone().requires_grad_() for t in (x, weight.flatten(), bias.flatten())]

    def normalize(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return batch_norm(x, None, None, weight, bias, training=True, statistics=Ghost(2))

    assert torch.autograd.gradcheck(normalize, inputs)
    assert kernels.ran().forward == "numba"
    assert torch.autograd.gradgradcheck(normalize, inputs)


def test_a_recomputed_batch_counts_once() -> None:
    layer, twin = made(9, 4, 3), made(9, 4, 3)
    x = laid((7, 9, 6, 7), 0, torch.float32).requires_grad_()
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    twin(x.detach())
    assert layer.num_batches_tracked == twin.num_batches_tracked == 3
    assert torch.equal(layer.running_var, twin.running_var)


def test_an_empty_batch_has_no_parts() -> None:
    layer = made(9, 4, 3)
    before = layer.running_mean.clone()
    x = torch.zeros(0, 9, 6, 7, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(layer.running_mean, before)
    assert layer.num_batches_tracked == 1  # as torch counts it


def test_evaluation_knows_no_parts() -> None:
    layer, plain = made(9, 4, 3).eval(), made(9, 4, None).eval()
    x = laid((7, 9, 6, 7), 0, torch.float32)
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer(x[:1, :, :1, :1]), plain(x[:1, :, :1, :1]))


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_below_1(size: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1, got {size}"):
        Ghost(size)


@pytest.mark.parametrize("size", [True, 2.0, "2", None])
def test_a_size_that_is_no_number_of_samples(size: Any) -> None:
    with pytest.raises(TypeError, match="must be an int, got"):
        Ghost(size)


@pytest.mark.parametrize(("shape", "size", "words"), [
    ((5, 3), 2, "leaves 1 sample for the last part"), ((5, 3, 1), 4, "leaves 1 sample for the last part"),
    ((5, 3), 1, "leaves 1 sample for each part"), ((4, 3, 1, 1), 1, "leaves 1 sample for each part"),
])  # fmt: skip
@pytest.mark.parametrize("accumulated", [False, True], ids=["", "accumulated"])
def test_a_part_of_one_value(shape: tuple[int, ...], size: int, words: str, accumulated: bool) -> None:
    layer = made(3, len(shape), size)
    layer.statistics = Accumulated(2, over=Ghost(size)) if accumulated else layer.statistics
    before = [buffer.clone() for buffer in layer.buffers()]
    with pytest.raises(ValueError, match=rf"more than 1 value per channel.*Ghost\(size={size}\) {words}.*eval\(\)"):
        layer(torch.randn(shape))
    assert all(torch.equal(old, new) for old, new in zip(before, layer.buffers(), strict=True))
