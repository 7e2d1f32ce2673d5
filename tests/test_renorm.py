"""Renorm: against the paper's Algorithm 1, written out here in float64 and differentiated by autograd."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm import Renorm, Sync, Warmup, kernels
from batchnorm.functional import batch_norm
from batchnorm.kernels import plans
from expected import OURS, Result, assert_right, laid, step

AT_ONCE = Renorm(r_max=1.3, d_max=0.4, schedule=None)
VIEWS = {
    ((7, 9, 6, 7), "contiguous"): ("planes", True),
    ((2, 3, 150, 151), "contiguous"): ("planes", False),
    ((35, 70), "contiguous"): ("rows", True),
    ((5, 9, 70, 71), "channels_last"): ("rows", False),
    ((7, 9, 3, 3), "contiguous"): ("small", True),
    ((7, 1, 4, 9), "contiguous"): ("planes", True),
}
PLANES, SPLIT_PLANES, ROWS, SPLIT_ROWS, _, _ = VIEWS


class Paper:
    """Algorithm 1 with its letters: α is the momentum; μ and σ are the moving averages."""

    def __init__(self, layer: Any) -> None:
        self.eps, self.alpha = layer.eps, layer.momentum
        self.gamma, self.beta = (
            None if p is None else p.detach().double().requires_grad_() for p in (layer.weight, layer.bias)
        )
        self.mu = layer.running_mean.double().clone()
        self.sigma = (layer.running_var.double() + layer.eps).sqrt()
        self.clipped = 0.0

    def __call__(self, x: Tensor, r_max: float, d_max: float) -> Tensor:
        """y of a training step; μ and σ move."""
        shape = (1, -1, *(1,) * (x.dim() - 2))
        dims = (0, *range(2, x.dim()))
        mu_b = x.mean(dims)
        sigma_b = (self.eps + (x - mu_b.view(shape)).square().mean(dims)).sqrt()
        with torch.no_grad():
            ratio, shift = sigma_b / self.sigma, (mu_b - self.mu) / self.sigma
            r, d = ratio.clamp(1 / r_max, r_max), shift.clamp(-d_max, d_max)
            self.clipped = torch.cat(((r != ratio), (d != shift))).double().mean().item()
            self.mu = self.mu + self.alpha * (mu_b - self.mu)
            self.sigma = self.sigma + self.alpha * (sigma_b - self.sigma)
        x_hat = (x - mu_b.view(shape)) / sigma_b.view(shape) * r.view(shape) + d.view(shape)
        if self.gamma is not None:
            x_hat = self.gamma.view(shape) * x_hat
        return x_hat if self.beta is None else x_hat + self.beta.view(shape)

    def step(self, x: Tensor, grad: Tensor, limits: tuple[float, float], batches: int) -> Result:
        x = x.detach().double().clone().requires_grad_()
        leaves = [t for t in (x, self.gamma, self.beta) if t is not None]
        y = self(x, *limits)
        grads = [*torch.autograd.grad(y, leaves, grad.double()), None, None]
        running = self.mu, self.sigma.square() - self.eps, torch.tensor(batches)
        return Result(y.detach(), grads[0], grads[1], grads[2], *running)


def made(channels: int, dims: int, statistics: Renorm, **options: Any) -> Any:
    layer = OURS[dims](channels, statistics=statistics, **options)
    with torch.no_grad():
        layer.running_mean.copy_(torch.linspace(-1, 1, channels))
        layer.running_var.copy_(torch.linspace(0.3, 4, channels))
        if layer.weight is not None:
            layer.weight.copy_(torch.linspace(0.5, 1.8, channels))
            layer.bias.copy_(torch.linspace(-0.5, 0.8, channels))
    return layer


def compare(view: Any, dtype: torch.dtype, **options: Any) -> None:
    shape, layout = view
    layer = made(shape[1], len(shape), AT_ONCE, dtype=dtype, **options)
    paper = Paper(layer)
    x, grad = (laid(shape, seed, dtype, layout) for seed in range(2))
    plan = plans.laid_out_sets(x, shape[0], False)[1]
    assert (plan.kind, plan.fused) == VIEWS[view]
    right = paper.step(x, grad, (1.3, 0.4), 1)
    assert paper.clipped > 0
    found = step(layer, x, grad)
    assert kernels.ran() == ("numba", "numba")
    assert_right(found, right, dtype)


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_every_view(view: Any) -> None:
    compare(view, torch.float32)


@pytest.mark.parametrize(("view", "dtype"), [(PLANES, torch.float64), (SPLIT_ROWS, torch.bfloat16)], ids=str)
def test_other_dtypes(view: Any, dtype: torch.dtype) -> None:
    compare(view, dtype)


@pytest.mark.parametrize("options", [{"affine": False}, {"momentum": 0.0}, {"eps": 0.5}, {"momentum": 1.0}], ids=str)
def test_options(options: dict[str, Any]) -> None:
    compare(PLANES, torch.float64, **options)


@pytest.mark.parametrize("kernel", ["numba", "reference"])
def test_a_whole_warm_up(kernel: Any) -> None:
    """Plain for three batches; then r may go to 3 by the ninth, d to 2 by the fifth."""
    layer = made(9, 4, Renorm(3.0, 2.0, Warmup(plain=3, r_until=9, d_until=5)), dtype=torch.float64)
    paper, plain = Paper(layer), batchnorm.BatchNorm2d(9).double()
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "renorm_batches"})
    limits = [(1.0, 0.0)] * 4 + [(1 + i / 3, min(float(i), 2.0)) for i in range(1, 6)] + [(3.0, 2.0)] * 2
    for batch, (r_max, d_max) in enumerate(limits):
        x, grad = (laid((7, 9, 6, 7), 2 * batch + seed, torch.float64) for seed in range(2))
        assert layer.statistics.limits(batch) == pytest.approx((r_max, d_max))
        with kernels.using(kernel):
            found = step(layer, x, grad)
        assert_right(found, paper.step(x, grad, (r_max, d_max), batch + 1), torch.float64)
        assert layer.renorm_batches == batch + 1
        if batch < 3:
            torch.testing.assert_close(found.y, plain(x).detach())


def test_the_papers_schedule() -> None:
    renorm = Renorm()
    expected = {
        0: (1, 0), 5_000: (1, 0), 15_000: (1 + 2 * 10 / 35, 2.5), 25_000: (1 + 2 * 20 / 35, 5),
        32_500: (1 + 2 * 27.5 / 35, 5), 40_000: (3, 5), 10**6: (3, 5),
    }  # fmt: skip
    for batches, limits in expected.items():
        assert renorm.limits(batches) == pytest.approx(limits)
        assert [t.item() for t in renorm.limits(torch.tensor(float(batches)))] == pytest.approx(list(limits))
    assert Renorm(2.0, 1.0, schedule=None).limits(0) == (2.0, 1.0)
    assert Renorm(schedule=Warmup(3, 3, 3)).limits(2.0) == (1.0, 0.0)
    assert Renorm(schedule=Warmup(3, 3, 3)).limits(4.0) == (3.0, 5.0)


@pytest.mark.parametrize("kernel", ["numba", "reference"])
def test_within_the_limits_training_normalizes_as_evaluation_does(kernel: Any) -> None:
    layer = made(9, 4, Renorm(r_max=1e4, d_max=1e4, schedule=None), dtype=torch.float64)
    x = laid((7, 9, 6, 7), 0, torch.float64)
    evaluated = copy.deepcopy(layer).eval()(x)
    with kernels.using(kernel):
        torch.testing.assert_close(layer(x), evaluated, rtol=1e-12, atol=1e-12)
    assert not torch.equal(layer.eval()(x), evaluated)  # the statistics have moved only afterwards


def test_infinite_limits() -> None:
    layer = made(9, 4, Renorm(r_max=float("inf"), d_max=float("inf"), schedule=None))
    x = laid((7, 9, 6, 7), 0, torch.float32)
    evaluated = copy.deepcopy(layer).eval()(x)
    torch.testing.assert_close(layer(x), evaluated, rtol=1e-5, atol=1e-5)
    for limits in ({"r_max": float("inf")}, {"d_max": float("inf")}):
        with pytest.raises(ValueError, match="schedule=None"):
            Renorm(**limits)


def test_a_deviation_is_averaged() -> None:
    """Two batches of variances 1 and 9: the mean deviation is 2, not √5."""
    layer = batchnorm.BatchNorm1d(1, eps=1e-12, momentum=None, dtype=torch.float64, statistics=AT_ONCE)
    for deviation in (1.0, 3.0):
        layer(torch.tensor([[-deviation], [deviation]], dtype=torch.float64))
    torch.testing.assert_close(layer.running_var, torch.tensor([4.0], dtype=torch.float64))
    assert layer.num_batches_tracked == 2


@pytest.mark.parametrize("kernel", ["numba", "reference"])
def test_a_bad_batch_changes_nothing(kernel: Any) -> None:
    layer = made(9, 4, Renorm(schedule=Warmup(0, 10, 10)))
    before = copy.deepcopy(layer.state_dict())
    x = laid((7, 9, 6, 7), 0, torch.float32).clone()
    x[2, 3, 1, 1] = float("nan")
    with kernels.using(kernel):
        layer(x)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_an_activation_and_a_residual_follow() -> None:
    layer = made(9, 4, AT_ONCE, activation="silu")
    paper = Paper(layer)
    x, grad, residual = (laid((7, 9, 6, 7), seed, torch.float32).clone() for seed in range(3))
    leaves = [t.requires_grad_() for t in (x, residual)]
    right = nn.functional.silu(paper(x.double(), 1.3, 0.4) + residual.double())
    y = layer(x, residual)
    torch.testing.assert_close(y.double(), right, rtol=1e-5, atol=1e-5)
    assert paper.gamma is not None
    assert paper.beta is not None
    found = torch.autograd.grad(y, [*leaves, layer.weight, layer.bias], grad)
    expected = torch.autograd.grad(right, [*leaves, paper.gamma, paper.beta], grad.double())
    for ours, oracle in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), oracle.double(), rtol=1e-4, atol=1e-4)
    assert kernels.ran() == ("numba", "numba")


def test_derivatives_of_derivatives() -> None:
    """Where r and d are at their limits they are constants of x, so that finite differences agree."""
    x = laid((3, 2, 2, 2), 3, torch.float64).clone().requires_grad_()
    weight, bias = (torch.tensor(pair, dtype=torch.float64, requires_grad=True) for pair in ([0.5, 1.5], [0.1, 0.7]))
    policy = Renorm(r_max=1.01, d_max=0.01, schedule=None)

    def normalize(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean, var = torch.tensor([9.0, -9.0]).double(), torch.tensor([40.0, 90.0]).double()
        return batch_norm(x, mean, var, weight, bias, training=True, statistics=policy)

    assert torch.autograd.gradcheck(normalize, (x, weight, bias))
    assert kernels.ran().forward == "numba"
    assert torch.autograd.gradgradcheck(normalize, (x, weight, bias))


def test_a_recomputed_batch_counts_once() -> None:
    layer, twin = made(9, 4, AT_ONCE), made(9, 4, AT_ONCE)
    x = laid((7, 9, 6, 7), 0, torch.float32).requires_grad_()
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    twin(x.detach())
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), twin.buffers(), strict=True))


def test_checkpoints() -> None:
    layer = made(9, 4, Renorm())
    for seed in range(3):
        layer(laid((7, 9, 6, 7), seed, torch.float32))
    assert list(layer.state_dict())[-1] == "renorm_batches"
    restored = batchnorm.BatchNorm2d(9, statistics=Renorm())
    restored.load_state_dict(layer.state_dict())
    assert restored.renorm_batches == 3

    for package in (nn, batchnorm):  # a trained plain network goes on with renormalization
        plain = package.BatchNorm2d(9)
        plain(laid((7, 9, 6, 7), 4, torch.float32))
        restored.load_state_dict(plain.state_dict())
        assert restored.renorm_batches == 3
        assert torch.equal(restored.running_mean, plain.running_mean)
        restored_in_a_model = nn.Sequential(batchnorm.BatchNorm2d(9, statistics=Renorm()))
        restored_in_a_model.load_state_dict(nn.Sequential(plain).state_dict())
        assert torch.equal(restored_in_a_model[0].running_mean, plain.running_mean)

        with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "renorm_batches"'):
            package.BatchNorm2d(9).load_state_dict(layer.state_dict())
        other = package.BatchNorm2d(9)
        other.load_state_dict(layer.state_dict(), strict=False)
        assert torch.equal(other.running_var, layer.running_var)


def test_the_count_survives_conversions_and_is_forgotten_with_the_statistics() -> None:
    layer = made(9, 4, Renorm())
    layer(laid((7, 9, 6, 7), 0, torch.float32))
    for convert in (torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double):
        convert(layer)
        assert layer.renorm_batches.dtype == torch.int64
        assert layer.renorm_batches == 1
    layer.reset_running_stats()
    assert layer.renorm_batches == 0


@pytest.mark.parametrize(("arguments", "words"), [
    ({"r_max": 0.5}, "r_max must be at least 1"), ({"r_max": float("nan")}, "r_max must be at least 1"),
    ({"d_max": -1.0}, "d_max must be at least 0"), ({"over": batchnorm.Ghost(2)}, "Renorm cannot be over Ghost"),
    ({"over": batchnorm.Accumulated(2)}, r"Use Renorm\(\) or Renorm\(over=Sync\(\)\)"),
])  # fmt: skip
def test_policies_that_cannot_be(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Renorm(**arguments)
    assert Renorm(over=Sync()).over == Sync()


@pytest.mark.parametrize("times", [(-1, 2, 2), (3, 2, 4), (3, 4, 2)])
def test_a_warm_up_that_ends_before_it_begins(times: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="begins before it ends"):
        Warmup(*times)


def test_running_statistics_are_needed() -> None:
    layer = batchnorm.BatchNorm1d(3, track_running_stats=False, statistics=Renorm())
    with pytest.raises(ValueError, match=r"towards running statistics, and there are none.*track_running_stats=True"):
        layer(torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"state.*statistics.state\(3\)"):
        batch_norm(torch.randn(5, 3), torch.zeros(3), torch.ones(3), training=True, statistics=Renorm())
