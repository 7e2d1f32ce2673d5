"""Values that break careless arithmetic: large means, outliers, constants, the ends of the range, NaN and infinity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import batchnorm
from batchnorm import kernels
from batchnorm.functional import batch_norm
from expected import OURS, laid, values

# One for each way through the loops.
SHAPES = [
    ((5, 9, 12, 15), "contiguous"),
    ((3, 37, 9, 11), "contiguous"),
    ((3, 3, 123, 125), "contiguous"),
    ((9, 23, 5, 5), "contiguous"),
    ((35, 701), "contiguous"),
    ((601, 701), "contiguous"),
    ((3, 5, 9, 11), "channels_last"),
    ((5, 9, 70, 71), "channels_last"),
]
EVERY_WAY = pytest.mark.parametrize(
    ("shape", "layout"), SHAPES, ids=lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else v
)
BIT_PATTERNS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16}


def layer_for(x: Tensor, **options: Any) -> Any:
    return OURS[x.dim()](x.shape[1], **options)


def dims(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.dim()))


def naive_variance(x: Tensor) -> Tensor:
    """The formula of old textbooks, E[x²] − E[x]², in the dtype of x."""
    return x.square().mean(dims(x)) - x.mean(dims(x)).square()


def same_bits(found: Tensor, expected: Tensor) -> bool:
    bits = BIT_PATTERNS.get(found.dtype, found.dtype)
    return torch.equal(found.contiguous().view(bits), expected.contiguous().view(bits))


@EVERY_WAY
def test_a_mean_of_ten_thousand_deviations_costs_no_digits(shape: tuple[int, ...], layout: str) -> None:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    per_channel = torch.linspace(0.9e4, 1.1e4, shape[1], dtype=torch.float64).view(1, -1, *(1,) * (len(shape) - 2))
    x = laid(shape, 0, torch.float32, layout).copy_(noise + per_channel)
    layer = layer_for(x, momentum=1.0)
    y = layer(x)
    assert kernels.ran().forward == "numba"
    var, mean = torch.var_mean(x.double(), dims(x))
    right = F.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=2**-23, atol=0)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=2e-6, atol=0)
    torch.testing.assert_close(y.double(), right, rtol=2e-6, atol=2e-6)
    assert ((naive_variance(x).double() - var) / var).abs().max() > 1e-2


@EVERY_WAY
@pytest.mark.parametrize("outlier", [1e3, -1e5, 1e8])
def test_first_values_that_are_outliers(shape: tuple[int, ...], layout: str, outlier: float) -> None:
    """The loops' shift comes from a channel's first values."""
    x = laid(shape, 0, torch.float32, layout)
    x[(0, slice(None), *(0,) * (len(shape) - 2))] = outlier
    layer = layer_for(x, momentum=1.0)
    y = layer(x)
    var, mean = torch.var_mean(x.double(), dims(x))
    right = F.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-6 * abs(outlier))
    torch.testing.assert_close(layer.running_var.double(), var, rtol=2e-5, atol=0)
    torch.testing.assert_close(y.double(), right, rtol=2e-5, atol=2e-5)


@EVERY_WAY
@pytest.mark.parametrize("value", [0.0, 1.0, -3.3, 1e4, 1e-30])
def test_a_constant_channel_becomes_its_bias(shape: tuple[int, ...], layout: str, value: float) -> None:
    x = laid(shape, 0, torch.float32, layout).fill_(value)
    layer = layer_for(x, momentum=1.0)
    torch.nn.init.constant_(layer.bias, 0.75)
    y = layer(x)
    torch.testing.assert_close(y, torch.full_like(y, 0.75), rtol=0, atol=1e-6)
    torch.testing.assert_close(layer.running_mean, torch.full((shape[1],), value), rtol=1e-7, atol=0)
    assert (layer.running_var >= 0).all()
    assert layer.running_var.max() <= (1e-7 * value) ** 2


@EVERY_WAY
@pytest.mark.parametrize("how", ["numba", "reference", "masked", "ghost"])
@pytest.mark.parametrize("value", [0.1, -3.3, 1e8 + 0.1])
def test_in_float64_a_constant_channel_is_its_bias_to_the_last_bit(
    shape: tuple[int, ...], layout: str, how: str, value: float
) -> None:
    x = torch.full_like(laid(shape, 0, torch.float64, layout), value).requires_grad_()
    mask = torch.arange(shape[0] * x[0, 0].numel()).reshape(shape[0], *shape[2:]) % 3 > 0 if how == "masked" else None
    layer = layer_for(
        x, momentum=1.0, dtype=torch.float64, statistics=batchnorm.Ghost(shape[0] - 2) if how == "ghost" else None
    )
    kernel: kernels.Kernel = "reference" if how == "reference" else "numba"
    with kernels.using(kernel):
        y = layer(x, mask=mask)
    assert kernels.ran().forward == kernel
    y.backward(laid(shape, 1, torch.float64, layout))
    assert y.count_nonzero() == layer.weight.grad.count_nonzero() == 0
    assert (layer.running_var.abs() <= (2**-60 * value) ** 2).all()
    assert (layer.running_mean == value).all()


@EVERY_WAY
@pytest.mark.parametrize("kernel", ["numba", "reference"])
@pytest.mark.parametrize("ratio", [10**6, 10**9])
def test_in_float64_a_large_mean_costs_the_digits_of_its_own_rounding(
    shape: tuple[int, ...], layout: str, kernel: kernels.Kernel, ratio: int
) -> None:
    """A mean that is rounded to float64 moves y by half an ulp of the mean, in deviations; so does none better."""
    whole = torch.randint(-(2**20), 2**20, shape, generator=torch.Generator().manual_seed(3))
    x = laid(shape, 0, torch.float64, layout).copy_(whole.double() * 2**-20 + ratio)
    count = whole.numel() // shape[1]
    deviations = whole.double() * 2**-20 - (whole.sum(dims(x)).double() / count * 2**-20).view(
        -1, *(1,) * (len(shape) - 2)
    )
    var = deviations.square().mean(dims(x))
    right = deviations / (var.view(-1, *(1,) * (len(shape) - 2)) + 1e-5).sqrt()
    layer = layer_for(x, momentum=1.0, dtype=torch.float64)
    with kernels.using(kernel):
        y = layer(x)
    assert kernels.ran().forward == kernel
    torch.testing.assert_close(layer.running_var, var * count / (count - 1), rtol=1e-12, atol=0)
    torch.testing.assert_close(y, right, rtol=1e-13, atol=2.0 * ratio * 2**-53 / var.min().sqrt().item())


@EVERY_WAY
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [1e-14, 1e-20])
def test_gradients_where_the_variance_is_next_to_nothing(
    shape: tuple[int, ...], layout: str, masked: bool, scale: float
) -> None:
    x = laid(shape, 0, torch.float32, layout).copy_(values(shape, 0) * scale)
    dy = laid(shape, 1, torch.float32, layout)
    mask = torch.arange(shape[0] * x[0, 0].numel()).reshape(shape[0], *shape[2:]) % 3 > 0 if masked else None
    found = []
    for kernel, dtype in (("numba", torch.float32), ("reference", torch.float64)):
        leaf = x.detach().to(dtype, copy=True).requires_grad_()
        with kernels.using(kernel):
            y = batch_norm(leaf, None, None, training=True, eps=1e-40, mask=mask)
            y.backward(dy.to(dtype))
        assert kernels.ran().forward == kernel
        found.append((y.detach().double(), leaf.grad.double()))  # type: ignore[union-attr]
    for ours, right in zip(*found, strict=True):
        assert (ours - right).abs().max() <= 4e-6 * right.abs().max()


@EVERY_WAY
@pytest.mark.parametrize("scale", [1e30, 1e25, 1e18, 1e-18, 1e-30, 1e-41])
def test_huge_and_tiny_values(shape: tuple[int, ...], layout: str, scale: float) -> None:
    """Squares leave float32's range both ways. Where torch is right, ours is, else no worse, and finite."""
    x = laid(shape, 0, torch.float32, layout).copy_(values(shape, 0) * scale)
    grad = laid(shape, 1, torch.float32, layout)
    results = []
    for function, dtype in ((batch_norm, torch.float32), (F.batch_norm, torch.float32), (F.batch_norm, torch.float64)):
        leaf = x.detach().to(dtype, copy=True).requires_grad_()
        y = function(leaf, None, None, training=True)
        y.backward(grad.to(dtype))
        assert leaf.grad is not None
        results.append((y.detach().double(), leaf.grad.double()))
    for ours, torchs, right in zip(*results, strict=True):
        largest = right.abs().max().item()
        assert ours.isfinite().all()
        assert (ours - right).abs().max().item() <= max(1e-5 * largest, (torchs - right).abs().max().item())


def test_a_variance_beyond_float32_is_not_stored_and_one_within_is() -> None:
    for scale, moves in ((1e15, True), (1e25, False)):
        x = torch.randn(5, 9, 12, 15) * scale
        layer = layer_for(x)
        before = [b.clone() for b in layer.buffers()]
        layer(x)
        assert all(torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True)) is not moves


@EVERY_WAY
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kernel", ["numba", "aten", "reference"])
def test_a_bad_value_spoils_its_channel_and_no_buffer(
    kernel: Any, bad: float, shape: tuple[int, ...], layout: str
) -> None:
    clean = laid(shape, 0, torch.float32, layout)
    with kernels.using(kernel):
        layer, untouched = layer_for(clean), layer_for(clean)
        layer(clean)
        untouched(clean)
        before = [b.clone() for b in layer.buffers()]
        for place in (0, -1):
            x = clean.clone()
            x[(place, 1, *(place,) * (len(shape) - 2))] = bad
            leaf = x.requires_grad_()
            y = layer(leaf)
            y.sum().backward()
            assert all(same_bits(a, b) for a, b in zip(before, layer.buffers(), strict=True))
            spoilt = y.detach().isnan().any(dim=tuple(d for d in range(len(shape)) if d != 1))
            assert spoilt.nonzero().flatten().tolist() == [1]
            assert leaf.grad is not None
            others = torch.arange(shape[1]) != 1
            assert leaf.grad[:, others].isfinite().all()
            right = F.batch_norm(x.detach().double()[:, others], None, None, training=True)
            torch.testing.assert_close(y[:, others].double(), right, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer(clean), untouched(clean), rtol=0, atol=0)
        assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), untouched.buffers(), strict=True))
        assert layer.num_batches_tracked == 2


def test_a_bad_batch_is_not_counted_by_the_plain_average() -> None:
    layer = OURS[4](3, momentum=None)
    good = [torch.randn(2, 3, 5, 5) for _ in range(3)]
    layer(good[0])
    layer(good[1] * float("nan"))
    layer(good[2])
    right = torch.stack([g.mean((0, 2, 3)) for g in (good[0], good[2])]).mean(0)
    torch.testing.assert_close(layer.running_mean, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [3, 67, 20011], ids=["tail", "vectors", "parts"])
def test_bfloat16_is_rounded_to_nearest_even(length: int) -> None:
    """Evaluation with mean 0 and weight that undoes the deviation is the identity on float32 in between; so any
    bias rounds as adding it in float32 does.
    """
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = every[: 65536 // length * length].view(-1, 1, length) if length < 65536 else every
    mean, var = torch.zeros(1), torch.ones(1)
    for weight, bias in ((1.0, 0.0), (1.0, 2.0**-9), (1.5, 0.0), (1.0, 1.0)):
        with kernels.using("numba"):
            y = batch_norm(x, mean, var, torch.tensor([weight]), torch.tensor([bias]), eps=0.0)
        right = torch.addcmul(
            torch.tensor(bias, dtype=torch.float64), x.double(), torch.tensor(weight, dtype=torch.float64)
        )
        rounded = right.to(torch.float32).to(torch.bfloat16)
        assert torch.equal(y.isnan(), x.isnan() | rounded.isnan())
        clean = ~y.isnan()
        assert torch.equal(y[clean], rounded[clean])


def test_bfloat16_statistics_do_not_stall() -> None:
    """In bfloat16 the mean would stop at about a half: 0.001 of the difference is then less than half a unit."""
    layer = OURS[4](3, momentum=1e-3).bfloat16()
    x = torch.ones(2, 3, 3, 3, dtype=torch.bfloat16)
    for _ in range(3000):
        layer(x)
    torch.testing.assert_close(layer.running_mean, torch.full((3,), 1 - 0.999**3000), rtol=1e-4, atol=0)
