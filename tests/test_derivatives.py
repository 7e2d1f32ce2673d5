"""Derivatives of any order, forwards and backwards, and function transforms, as torch.nn's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import batchnorm
from batchnorm import kernels
from batchnorm.functional import batch_norm

Inputs = tuple[Tensor, Tensor, Tensor]
SHAPES = [(5, 3), (3, 2, 3), (2, 3, 2, 2), (2, 2, 3, 1, 2)]


def inputs(shape: tuple[int, ...], requires_grad: bool = True) -> Inputs:
    generator = torch.Generator().manual_seed(5)
    made = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, shape[1:2], shape[1:2]))
    x, weight, bias = (t.requires_grad_(requires_grad) for t in made)
    return x, weight, bias


def normalizing(function: Callable[..., Tensor], training: bool, channels: int = 3) -> Callable[..., Tensor]:
    mean, var = torch.linspace(-1, 1, channels).double(), torch.linspace(0.5, 2, channels).double()

    def normalize(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        if training:
            return function(x, None, None, weight, bias, training=True)
        return function(x, mean, var, weight, bias)

    return normalize


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", ["numba", "aten", "reference"])
def test_gradients_of_gradients(kernel: Any, shape: tuple[int, ...], training: bool) -> None:
    normalize = normalizing(batch_norm, training, shape[1])
    with kernels.using(kernel):
        assert gradcheck(normalize, inputs(shape))
        assert kernels.ran().forward == kernel
        assert gradgradcheck(normalize, inputs(shape))


def test_a_gradient_that_is_differentiated_leaves_the_loops_for_the_reference() -> None:
    x, weight, bias = inputs((2, 3, 2, 2))
    y = batch_norm(x, None, None, weight, bias, training=True)
    assert kernels.ran().forward == "numba"
    (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    assert kernels.ran().backward == "reference"
    second = torch.autograd.grad(first.pow(2).sum(), (x, weight, bias))
    wide = inputs((2, 3, 2, 2))
    (right,) = torch.autograd.grad(
        F.batch_norm(wide[0], None, None, *wide[1:], training=True).pow(3).sum(), wide[0], create_graph=True
    )
    for found, expected in zip(second, torch.autograd.grad(right.pow(2).sum(), wide), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_penalty_in_lower_precision(dtype: torch.dtype) -> None:
    results = []
    for function, kept in ((batch_norm, dtype), (F.batch_norm, torch.float64)):
        x, weight, bias = (t.detach().to(dtype).to(kept).requires_grad_() for t in inputs((5, 3, 2, 2)))
        (first,) = torch.autograd.grad(
            function(x, None, None, weight, bias, training=True).pow(2).sum(), x, create_graph=True
        )
        results.append(torch.autograd.grad(first.pow(2).sum() + first.sum(), (x, weight)))
        assert all(g.dtype == kept for g in results[-1])
    slack = 1e-4 if dtype == torch.float32 else 0.1
    for found, right in zip(*results, strict=True):
        assert (found.double() - right).abs().max() <= slack * max(1.0, right.abs().max().item())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_transforms_equal_torchs(training: bool) -> None:
    x, weight, bias = inputs((2, 3, 2, 2), requires_grad=False)
    tangents = inputs((2, 3, 2, 2), requires_grad=False)
    xs = torch.stack((x, 2 * x + 1, -x))
    ours, torchs = normalizing(batch_norm, training), normalizing(F.batch_norm, training)

    def forward_over_reverse(f: Callable[..., Tensor]) -> Any:
        return jvp(grad(lambda *a: f(*a).pow(3).sum()), (x, weight, bias), tangents)

    for transform in (
        lambda f: jvp(f, (x, weight, bias), tangents),
        lambda f: vmap(f)(xs),
        lambda f: vmap(f, in_dims=(None, 0, None))(x, torch.stack((weight, 2 * weight)), bias),
        lambda f: vmap(grad(lambda a: f(a).pow(3).sum()))(xs),
        lambda f: jacrev(f)(x),
        lambda f: jacfwd(f)(x),
        lambda f: hessian(lambda a: f(a, weight, bias).pow(3).sum())(x),
        forward_over_reverse,
    ):
        torch.testing.assert_close(transform(ours), transform(torchs))
        if training:
            transform(ours)
            assert kernels.ran().forward == "reference"


def test_forward_mode_derivatives() -> None:
    x, weight, bias = inputs((2, 3, 2, 2), requires_grad=False)
    results = []
    for function in (batch_norm, F.batch_norm):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, x.roll(1, 0))
            results.append(forward_ad.unpack_dual(function(dual, None, None, weight, bias, training=True)))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_layer_as_a_function_of_its_parameters(training: bool) -> None:
    x = inputs((5, 3, 2, 2))[0].detach()
    results = []
    for kind in (batchnorm.BatchNorm2d, torch.nn.BatchNorm2d):
        layer = kind(3, track_running_stats=training is False).double().train(training)
        own = dict(layer.named_parameters())
        new = {"weight": torch.tensor([1.0, 2, 3]).double(), "bias": torch.tensor([0.0, 1, 2]).double()}
        y = functional_call(layer, new, (x,))
        slope = grad(lambda p, layer=layer: functional_call(layer, p, (x,)).pow(3).sum())(new)
        assert all(layer.get_parameter(name) is p for name, p in own.items())
        results.append((y, slope))
    torch.testing.assert_close(results[0], results[1])


# A residual may be computed from x itself, as in a block whose shortcut begins at its normalization.


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("way", ["batched", "twice"])
def test_a_residual_that_depends_on_the_input(activation: str | None, training: bool, way: str) -> None:
    acts = {None: lambda z: z, "relu": torch.relu, "silu": F.silu}
    statistics = None if training else torch.zeros(3).double(), None if training else torch.ones(3).double()

    def found(ours: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        a, w = torch.randn(4, 3, 5, 5).double().requires_grad_(), torch.rand(3).double().requires_grad_()
        x = a * 1.5
        residual = (x * x).sin()
        if ours:
            y = batch_norm(x, *statistics, w, None, training, activation=activation, residual=residual)
        else:
            y = acts[activation](F.batch_norm(x, *statistics, w, None, training) + residual)
        directions = torch.randn(2, *y.shape).double()
        if way == "batched":
            return torch.autograd.grad(y, (a, w), directions, is_grads_batched=True)
        first = torch.autograd.grad(y, (a, w), directions[0], create_graph=True)
        return (*first, *torch.autograd.grad(sum(g.square().sum() for g in first), (a, w)))

    with kernels.using("numba"):
        ours = found(True)
    for one, right in zip(ours, found(False), strict=True):
        torch.testing.assert_close(one, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("negative", ["x", "weight", "bias", "mean"])
@pytest.mark.parametrize("call", ["train", "eval", "ghost", "mask", "conditional"])
def test_forward_mode_derivatives_of_tensors_with_a_negative_bit(call: str, negative: str) -> None:
    """torch makes no views of a dual tensor whose primal alone has it."""
    x, weight, bias = inputs((4, 3, 2, 2), False)
    mean, var = torch.linspace(-1, 1, 3).double(), torch.linspace(0.5, 2, 3).double()
    given = {"x": x, "mean": mean, "weight": weight, "bias": bias}
    tangents = tuple(torch.linspace(-1, 2, t.numel()).double().view(t.shape) for t in given.values())
    more: dict[str, Any] = {"ghost": {"statistics": batchnorm.Ghost(2)}, "mask": {"mask": x[:, 0] > -1}}.get(call, {})
    layer = batchnorm.ConditionalBatchNorm(3, dtype=torch.float64, track_running_stats=False)

    def normalize(x: Tensor, mean: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if call == "conditional":
            return layer(x, weight=weight, bias=bias)
        if call == "eval":
            return batch_norm(x, mean, var, weight, bias)
        return batch_norm(x, None, None, weight, bias, training=True, **more)

    right = jvp(normalize, tuple(given.values()), tangents)
    given[negative] = torch._neg_view(-given[negative])
    for found, expected in zip(jvp(normalize, tuple(given.values()), tangents), right, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
