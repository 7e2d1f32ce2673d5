"""Masks: what does not count influences nothing; what counts is normalized as torch.nn does it by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm import Ghost, Moments, Renorm, kernels, mask_from_lengths
from batchnorm.activations import applied
from batchnorm.functional import batch_norm
from batchnorm.kernels import plans
from expected import OURS, Result, assert_right, in_float64, laid, step

BF16 = torch.bfloat16
SLOW = pytest.mark.slow  # to compile
NAN, INF = float("nan"), float("inf")
VIEWS: dict[tuple[tuple[int, ...], str], tuple[str, bool]] = {
    ((7, 9, 6, 7), "contiguous"): ("planes", True),
    ((2, 3, 150, 151), "contiguous"): ("planes", False),
    ((35, 70), "contiguous"): ("rows", True),
    ((5, 9, 70, 71), "channels_last"): ("rows", False),
    ((7, 9, 3, 3), "contiguous"): ("planes", True),  # where columns serve without a mask
    ((7, 1, 4, 9), "contiguous"): ("planes", True),
    ((7, 4, 9), "contiguous"): ("planes", True),
    ((7, 9, 2, 3, 6), "contiguous"): ("planes", True),
    ((7, 9, 6, 7), "gaps"): ("planes", True),
}
PLANES, SPLIT_PLANES, ROWS, SPLIT_ROWS = list(VIEWS)[:4]


def some(shape: tuple[int, ...], seed: int = 0, share: float = 0.6) -> Tensor:
    """A mask for an input of that shape."""
    return torch.rand(shape[:1] + shape[2:], generator=torch.Generator().manual_seed(seed)) < share


def poisoned(t: Tensor, mask: Tensor, value: float = NAN) -> Tensor:
    """The same tensor, in the same layout, with something bad wherever the mask is 0."""
    hidden = torch.empty_like(t).copy_(t)
    hidden.masked_fill_((mask == 0).unsqueeze(1), value)
    return hidden


def made(channels: int, dims: int, **options: Any) -> Any:
    """A layer whose parameters and statistics are not the first ones."""
    layer = OURS[dims](channels, **options)
    with torch.no_grad():
        for tensor, low, high in (
            (layer.weight, 0.5, 1.8), (layer.bias, -0.5, 0.8), (layer.running_mean, -1, 1), (layer.running_var, 0.3, 4),
        ):  # fmt: skip
            if tensor is not None:
                tensor.copy_(torch.linspace(low, high, channels))
    return layer


def masked(layer: Any, mask: Tensor, residual: Tensor | None = None) -> Any:
    """The layer with its other arguments, to be called with x."""
    bound = copy.copy(layer)
    bound.forward = lambda x: type(layer).forward(layer, x, residual, mask)
    return bound


def gathered(layer: Any, mask: Tensor, size: int | None = None, residual: Tensor | None = None) -> Any:
    """torch.nn in float64, given nothing but the values that count: of each part in turn, as the rows of a matrix."""
    twin = in_float64(layer)
    rows = nn.BatchNorm1d(layer.num_features)
    rows.__dict__.update({**twin.__dict__, "forward": None})
    del rows.__dict__["forward"]

    def forward(x: Tensor) -> Tensor:
        outputs = []
        parts = [t.split(size or len(x)) for t in (x, mask, x if residual is None else residual)]
        for values, valid, skip in zip(*parts, strict=True):
            z = nn.BatchNorm1d.forward(rows, values.movedim(1, -1)[valid])
            z = z if residual is None else z + skip.movedim(1, -1)[valid]
            y = torch.zeros_like(values.movedim(1, -1))
            y[valid] = applied(layer.activation, z)
            outputs.append(y.movedim(-1, 1))
        return torch.cat(outputs)

    twin.forward = forward
    return twin


def compare(view: Any, dtype: torch.dtype = torch.float32, size: int | None = None, **options: Any) -> None:
    shape, layout = view
    layer = made(shape[1], len(shape), dtype=dtype, statistics=None if size is None else Ghost(size), **options)
    mask = some(shape)
    x, grad = (laid(shape, seed, dtype, layout) for seed in range(2))
    if view in VIEWS:
        plan = plans.laid_out_sets(x, size or shape[0], True)[1]
        assert (plan.kind, plan.fused) == VIEWS[view]
    right = step(gathered(layer, mask, size), x.double(), grad.double())
    found = step(masked(layer, mask), poisoned(x, mask), poisoned(grad, mask, INF))
    assert kernels.ran() == ("numba", "numba")
    assert_right(found, right, dtype)
    hidden = ~mask.unsqueeze(1).expand(shape)
    assert found.x_grad is not None
    assert not found.y[hidden].any()
    assert not found.x_grad[hidden].any()


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_every_view(view: Any) -> None:
    compare(view)


@pytest.mark.parametrize(("view", "dtype"), [(PLANES, torch.float64), pytest.param(ROWS, BF16, marks=SLOW)], ids=str)
def test_other_dtypes(view: Any, dtype: torch.dtype) -> None:
    compare(view, dtype)


@pytest.mark.parametrize("options", [
    {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"size": 2}, {"size": 7},
    {"size": 3, "momentum": None},
], ids=str)  # fmt: skip
def test_options(options: dict[str, Any]) -> None:
    compare(PLANES, **options)


@pytest.mark.parametrize("view", [SPLIT_PLANES, SPLIT_ROWS], ids=str)
def test_parts_of_large_batches(view: Any) -> None:
    compare(view, size=1 if view == SPLIT_PLANES else 2)


@pytest.mark.usefixtures("streaming")
def test_output_written_around_the_caches() -> None:
    compare(((5, 9, 8, 8), "contiguous"))
    compare(((5, 32, 5, 5), "channels_last"), size=2)


def test_a_mean_far_from_0_costs_no_digits() -> None:
    shape = (7, 9, 6, 7)
    for layout, offset in (("contiguous", 2e4), ("channels_last", -2e4)):
        layer, mask = made(9, 4), some(shape)
        x = laid(shape, 0, torch.float32, layout) + offset
        right = step(gathered(layer, mask), x.double(), torch.ones(shape).double()).y
        y = layer(poisoned(x, mask), mask=mask)
        torch.testing.assert_close(y.detach().double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kernel", "training"), [("numba", True), ("reference", True), ("aten", False)])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_activation_and_residual(activation: str | None, training: bool, kernel: Any) -> None:
    shape = (7, 9, 6, 7)
    layer, mask = made(9, 4, activation=activation).train(training), some(shape)
    x, residual, grad = (laid(shape, seed, torch.float32) for seed in range(3))
    wide = [t.double().requires_grad_() for t in (x, residual)]
    twin = gathered(layer, mask, residual=wide[1])
    y = twin(wide[0])
    right = [y.detach(), *torch.autograd.grad(y, [*wide, twin.weight, twin.bias], grad.double())]
    leaves = [poisoned(t, mask).requires_grad_() for t in (x, residual)]
    with kernels.using(kernel):
        y = layer(*leaves, mask=mask)
        found = [y.detach(), *torch.autograd.grad(y, [*leaves, layer.weight, layer.bias], poisoned(grad, mask))]
    assert kernels.ran().forward == kernel
    undecided = right[0].abs() < 1e-4  # where rounding decides on which side of 0 z lies; and padding
    assert (undecided & (right[0] != 0)).double().mean() < 1e-3
    for name, ours, oracle in zip(("y", "x", "residual", "weight", "bias"), found, right, strict=True):
        torch.testing.assert_close(ours.double(), oracle, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    for ours in found[:3]:
        assert not ours[~mask.unsqueeze(1).expand(shape)].any()
    for ours, oracle in zip(
        (layer.running_mean, layer.running_var), (twin.running_mean, twin.running_var), strict=True
    ):
        torch.testing.assert_close(ours.double(), oracle, rtol=1e-6, atol=1e-6)
    assert layer.num_batches_tracked == training


def test_in_place() -> None:
    shape = (7, 9, 6, 7)
    layer, mask = made(9, 4, inplace=True, activation=("leaky_relu", 0.5)), some(shape)
    x, grad = (laid(shape, seed, torch.float32) for seed in range(2))
    right = step(gathered(layer, mask), x.double(), grad.double())
    leaf = poisoned(x, mask).requires_grad_()
    fed = leaf * 1
    y = layer(fed, mask=mask)
    assert y.data_ptr() == fed.data_ptr()
    y.backward(poisoned(grad, mask))
    assert leaf.grad is not None
    torch.testing.assert_close(y.detach().double(), right.y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad.double(), right.x_grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("expand", [(1, 9, 6, 7), (7, 9, 1, 1), (7, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("shape", [(7, 9, 6, 7), (7, 9, 3, 3)], ids=str)
def test_an_expanded_gradient(shape: tuple[int, ...], expand: tuple[int, ...]) -> None:
    smaller = tuple(min(pair) for pair in zip(shape, expand, strict=True))
    grad = torch.randn(smaller, generator=torch.Generator().manual_seed(1)).expand(shape)
    layer, mask, x = made(9, 4), some(shape), laid(shape, 0, torch.float32)
    right = step(gathered(layer, mask), x.double(), grad.double())
    assert_right(step(masked(layer, mask), poisoned(x, mask), grad), right, torch.float32)


# --- weights ---


def weighed(x: Tensor, weights: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> tuple[Tensor, Moments]:
    """Normalized by weighted moments, in float64."""
    per_channel = (1, -1, *(1,) * (x.dim() - 2))
    moments = Moments.of(x, (0, *range(2, x.dim())), weights=weights.unsqueeze(1).expand_as(x))
    x_hat = (x - moments.mean.view(per_channel)) / (moments.biased_variance.view(per_channel) + eps).sqrt()
    y = x_hat * weight.view(per_channel) + bias.view(per_channel)
    return torch.where(weights.unsqueeze(1) > 0, y, 0.0), moments


@pytest.mark.parametrize("kernel", ["numba", "reference"])
@pytest.mark.parametrize("view", [PLANES, ROWS], ids=str)
def test_floating_weights(view: Any, kernel: Any) -> None:
    shape, layout = view
    layer = made(shape[1], len(shape))
    weights = torch.rand(shape[:1] + shape[2:], generator=torch.Generator().manual_seed(3)) * 4 * some(shape)
    x, grad = (laid(shape, seed, torch.float32, layout) for seed in range(2))
    leaves = [t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    y, moments = weighed(leaves[0], weights.double(), *leaves[1:])
    grads = torch.autograd.grad(y, leaves, grad.double())
    running = 0.9 * layer.running_mean + 0.1 * moments.mean.detach()
    running_var = 0.9 * layer.running_var + 0.1 * moments.unbiased_variance.detach()
    right = Result(y.detach(), *grads, running, running_var, torch.tensor(1))
    with kernels.using(kernel):
        found = step(masked(layer, weights), poisoned(x, weights, -INF), grad)
    assert kernels.ran().forward == kernel
    assert_right(found, right, torch.float32)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_weight_is_a_number_of_copies(data: st.DataObject) -> None:
    """A sample of weight 3 counts as if it were there three times, in moments, gradients and running statistics."""
    batch, space = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 3))
    copies = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=batch, max_size=batch)))
    x = laid((batch, 2, space), data.draw(st.integers(0, 99)), torch.float64).clone().requires_grad_()
    layer, twin = (made(2, 3, dtype=torch.float64) for _ in range(2))
    y = layer(x, mask=copies.double().unsqueeze(1))
    kept = (copies > 0).double().view(-1, 1, 1)
    repeated = x.repeat_interleave(copies, 0)
    if len(repeated) * space > 1:
        right = torch.zeros_like(x).index_add(0, torch.arange(batch).repeat_interleave(copies), twin(repeated))
        right = right / copies.clamp(min=1).view(-1, 1, 1)  # the copies are equal
        torch.testing.assert_close(y, right, rtol=1e-9, atol=1e-9)
        (found,), (expected,) = (torch.autograd.grad((t.pow(3) * kept).sum(), x) for t in (y, right))
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    for ours, plain in zip(layer.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mask", [
    torch.ones(7, 6, 7, dtype=torch.bool), torch.ones(7, 6, 7), torch.tensor(True), torch.full((1, 1, 1), 1.0).half(),
], ids=["bool", "float", "scalar", "half"])  # fmt: skip
def test_a_mask_of_everything_is_no_mask(mask: Tensor) -> None:
    layer, plain = made(9, 4), made(9, 4)
    x, grad = (laid((7, 9, 6, 7), seed, torch.float32) for seed in range(2))
    found, right = step(masked(layer, mask), x, grad), step(plain, x, grad)
    for ours, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("shape", [(7, 1, 1), (1, 6, 7), (6, 7), (6, 1), (7,), (7, 6, 1)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_mask_is_broadcast(shape: tuple[int, ...], training: bool) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.6
    assert mask.any()
    layer, twin = (made(9, 4).train(training) for _ in range(2))
    x, grad = (laid((7, 9, 6, 7), seed, torch.float32) for seed in range(2))
    found = step(masked(layer, mask), x, grad)
    right = step(masked(twin, mask.expand(7, 6, 7).contiguous()), x, grad)
    for ours, theirs in zip(found, right, strict=True):
        assert torch.equal(ours, theirs)


# --- few values ---


@pytest.mark.parametrize("kernel", ["numba", "reference"])
@pytest.mark.parametrize("policy", [None, Ghost(3), Renorm(schedule=None)], ids=str)
@pytest.mark.parametrize("values", [0, 1])
def test_too_few_values_teach_nothing(values: int, policy: Any, kernel: Any) -> None:
    layer = made(9, 4, statistics=policy)
    before = copy.deepcopy(layer.state_dict())
    mask = torch.zeros(7, 6, 7, dtype=torch.bool)
    mask[2, 3, 1] = values > 0
    x, grad = (laid((7, 9, 6, 7), seed, torch.float32) for seed in range(2))
    with kernels.using(kernel):
        found = step(masked(layer, mask), poisoned(x, mask), grad)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    for t in found[:4]:
        assert t is not None
        assert t.isfinite().all()
    hidden = ~mask.unsqueeze(1).expand_as(x)
    assert found.x_grad is not None
    assert not found.y[hidden].any()
    assert not found.x_grad[hidden].any()
    assert (found.x_grad.abs() < 1e-3).all()  # one value is its own mean, whatever it is: but for 1/√eps, rounded
    if values == 0:
        assert found.bias_grad is not None
        assert not found.bias_grad.any()
    elif policy is None or isinstance(policy, Ghost):
        torch.testing.assert_close(found.y[2, :, 3, 1], layer.bias.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["numba", "reference"])
def test_a_part_without_values_is_not_counted(kernel: Any) -> None:
    layer, mask = made(9, 4, statistics=Ghost(3)), some((7, 9, 6, 7))
    mask[3:6] = False
    x, grad = (laid((7, 9, 6, 7), seed, torch.float32) for seed in range(2))
    rest = [0, 1, 2, 6]
    twin = gathered(layer, mask[rest], 3)
    right = step(twin, x[rest].double(), grad[rest].double())
    with kernels.using(kernel):
        found = step(masked(layer, mask), poisoned(x, mask), grad)
    assert_right(found._replace(y=found.y[rest], x_grad=found.x_grad[rest]), right, torch.float32)  # type: ignore[index]
    assert layer.num_batches_tracked == 2


def test_an_empty_batch() -> None:
    layer = made(9, 4)
    x = torch.zeros(0, 9, 6, 7, requires_grad=True)
    y = layer(x, mask=torch.ones(0, 6, 7, dtype=torch.bool))
    y.sum().backward()
    assert y.shape == x.shape
    assert layer.num_batches_tracked == 1  # as torch counts it


def test_a_bad_value_that_counts_moves_nothing() -> None:
    layer, mask = made(9, 4), some((7, 9, 6, 7))
    before = copy.deepcopy(layer.state_dict())
    x = laid((7, 9, 6, 7), 0, torch.float32).clone()
    x[0, 3][mask[0]] = INF
    layer(x, mask=mask)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


# --- everything else that a layer does ---


def test_evaluation() -> None:
    for shape, layout, dtype in (((7, 9, 6, 7), "channels_last", torch.float32), ((35, 70), "contiguous", BF16)):
        layer, mask = made(shape[1], len(shape), dtype=dtype).eval(), some(shape)
        x, grad = (laid(shape, seed, dtype, layout) for seed in range(2))
        right = step(gathered(layer, mask), x.double(), grad.double())
        found = step(masked(layer, mask), poisoned(x, mask), poisoned(grad, mask))
        assert_right(found, right, dtype, slack=1 if dtype == torch.float32 else 8)
        assert layer.num_batches_tracked == 0
        assert found.y.stride() == x.stride()


def test_plain_pytorch_in_half_precision() -> None:
    layer, mask = made(9, 4, dtype=torch.float16), some((7, 9, 6, 7))
    x, grad = (laid((7, 9, 6, 7), seed, torch.float16) for seed in range(2))
    right = step(gathered(layer, mask), x.double(), grad.double())
    assert_right(step(masked(layer, mask), poisoned(x, mask), poisoned(grad, mask)), right, torch.float16)
    assert kernels.ran().forward == "reference"


@pytest.mark.parametrize("options", [
    {}, {"statistics": Ghost(2)}, {"training": False},
    pytest.param({"activation": "silu", "residual": True}, marks=SLOW),
], ids=str)  # fmt: skip
def test_derivatives_of_derivatives(options: dict[str, Any]) -> None:
    x = laid((5, 2, 2, 2), 3, torch.float64)
    mask = torch.rand(5, 2, 2, generator=torch.Generator().manual_seed(1)).double() * some((5, 2, 2, 2), 4, 0.8)
    weight, bias = (torch.tensor(pair, dtype=torch.float64) for pair in ([0.5, 1.5], [0.1, 0.7]))
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    if options.get("residual"):
        leaves.append(laid((5, 2, 2, 2), 4, torch.float64).clone().requires_grad_())
    rest = {"training": True} | {name: value for name, value in options.items() if name != "residual"}

    def normalize(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        hidden = torch.where(mask.unsqueeze(1) > 0, x, NAN)
        skip = None if residual is None else torch.where(mask.unsqueeze(1) > 0, residual, NAN)
        mean, var = torch.zeros(2).double(), torch.ones(2).double()
        return batch_norm(hidden, mean, var, weight, bias, mask=mask, residual=skip, **rest)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(normalize, leaves)
    assert kernels.ran().forward == ("numba" if rest["training"] else "aten")
    assert torch.autograd.gradgradcheck(normalize, leaves)


def test_function_transforms() -> None:
    x, mask = laid((3, 5, 2, 4), 0, torch.float64), some((5, 2, 4))
    right = torch.stack([batch_norm(each, None, None, training=True, mask=mask) for each in x])
    found = torch.func.vmap(lambda each: batch_norm(each, None, None, training=True, mask=mask))(x)
    torch.testing.assert_close(found, right)
    _, tangent = torch.func.jvp(
        lambda each: batch_norm(each, None, None, training=True, mask=mask), (x[0],), (torch.ones_like(x[0]),)
    )
    torch.testing.assert_close(tangent, torch.zeros_like(tangent), atol=1e-12, rtol=0)


def test_a_recomputed_batch_counts_once() -> None:
    layer, twin, mask = made(9, 4), made(9, 4), some((7, 9, 6, 7))
    x = laid((7, 9, 6, 7), 0, torch.float32).clone().requires_grad_()
    checkpoint(lambda x: layer(x, mask=mask), x, use_reentrant=False).sum().backward()
    twin(x.detach(), mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), twin.buffers(), strict=True))


def test_autocast() -> None:
    model = nn.Sequential(nn.Linear(8, 6), batchnorm.BatchNorm1d(6))
    mask, x = some((12, 6)), torch.randn(12, 8)
    with torch.autocast("cpu", dtype=BF16):
        hidden = model[0](poisoned(x, mask))
        y = model[1](hidden, mask=mask)
    assert hidden.dtype == y.dtype == BF16
    right = nn.functional.batch_norm(hidden[mask].double(), None, None, training=True)
    torch.testing.assert_close(y[mask].double(), right, rtol=2**-8, atol=1e-3)
    assert kernels.ran().forward == "numba"


@pytest.mark.parametrize("view", [PLANES, SPLIT_PLANES, ROWS, SPLIT_ROWS], ids=str)
def test_the_number_of_threads_changes_no_bit(view: Any, threads: Callable[[int], None]) -> None:
    shape, layout = view
    x, grad = (laid(shape, seed, torch.float32, layout) for seed in range(2))
    results = []
    for number in (1, 2):
        threads(number)
        layer = made(shape[1], len(shape), statistics=Ghost(3))
        results.append(step(masked(layer, some(shape)), x, grad))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


# --- wrong masks ---


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("mask", "error", "words"), [
    (torch.ones(5, 3, 4).bool(), RuntimeError, r"mask should have size \(5, 4\), the input's \(5, 3, 4\)"),
    (torch.ones(5, 5).bool(), RuntimeError, r"or broadcast to it, got \(5, 5\)"),
    (torch.ones(5).bool(), RuntimeError, r"got \(5,\)"),
    (torch.ones(2, 5, 4).bool(), RuntimeError, r"got \(2, 5, 4\)"),
    (torch.ones(5, 4).long(), TypeError, r"bool or floating weights, got torch.int64: use mask.bool\(\)"),
    (torch.ones(5, 4) * 1j, TypeError, "bool or floating weights"),
    (torch.full((5, 4), -1.0), ValueError, "negative, infinite or nan weights"),
    (torch.full((5, 4), NAN), ValueError, "negative, infinite or nan weights"),
    (torch.full((5, 4), INF), ValueError, "negative, infinite or nan weights"),
    (torch.ones(5, 4, requires_grad=True), ValueError, r"mask requires grad.*use mask.detach\(\)"),
    (torch.ones(5, 4, device="meta"), RuntimeError, "mask must be moved to the input's"),
], ids=["channels", "size", "samples", "more", "int", "complex", "negative", "nan", "inf", "grad", "meta"])  # fmt: skip
def test_a_wrong_mask_changes_nothing(mask: Tensor, error: Any, words: str, training: bool) -> None:
    layer = made(3, 3).train(training)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error, match=words):
        layer(torch.randn(5, 3, 4), mask=mask)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_on_the_meta_device() -> None:
    layer = batchnorm.BatchNorm2d(3, device="meta")
    x = torch.empty(5, 3, 4, 4, device="meta")
    for training in (True, False):
        for mask in (torch.ones(5, 4, 4, device="meta"), torch.ones(5, 1, 1, device="meta", dtype=torch.bool)):
            assert layer.train(training)(x, mask=mask).shape == x.shape


def test_a_kernel_without_masks_asked_for_by_name() -> None:
    with pytest.raises(RuntimeError, match="'aten' was asked for, but it has no masks"), kernels.using("aten"):
        batchnorm.BatchNorm1d(3)(torch.randn(5, 3), mask=torch.ones(5).bool())


# --- mask_from_lengths ---


def test_lengths() -> None:
    mask = mask_from_lengths(torch.tensor([2, 0, 3]), 4)
    assert mask.tolist() == [[True, True, False, False], [False] * 4, [True, True, True, False]]
    assert mask_from_lengths(torch.tensor([2, 1], dtype=torch.int16)).tolist() == [[True, True], [True, False]]
    assert mask_from_lengths(torch.tensor([], dtype=torch.int64)).shape == (0, 0)
    assert mask_from_lengths(torch.tensor([1]), 0 + 1).all()


@pytest.mark.parametrize(("lengths", "size", "error", "words"), [
    (torch.tensor([1.0]), None, TypeError, "whole numbers, got torch.float32"),
    (torch.tensor([True]), None, TypeError, "whole numbers, got torch.bool"),
    (torch.tensor(1), None, ValueError, r"shape \(N,\), got \(\)"),
    (torch.tensor([3, -1]), None, ValueError, "not be negative, got -1"),
    (torch.tensor([3, 5]), 4, ValueError, "length 5 does not fit into size 4"),
])  # fmt: skip
def test_wrong_lengths(lengths: Tensor, size: int | None, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        mask_from_lengths(lengths, size)
