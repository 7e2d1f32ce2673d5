"""Moments: the laws of merging, and agreement with NumPy, on values that Hypothesis chooses."""

import doctest
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import hessian, jvp, vmap

from batchnorm import moments
from batchnorm.moments import Moments, merge, merge_all

fast = settings(deadline=None, max_examples=60)

CHANNELS = 3


@st.composite
def samples(draw, min_rows=0, max_rows=40):
    """Values of shape (rows, CHANNELS) whose mean is up to a million times their deviation."""
    rows = draw(st.integers(min_rows, max_rows))
    ratio = draw(st.sampled_from([0.0, 1.0, -1e4, 1e6]))
    scale = draw(st.sampled_from([1e-3, 1.0, 1e3]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return torch.from_numpy(scale * (rng.standard_normal((rows, CHANNELS)) + ratio))


def rows(x):
    return Moments.of(x, dim=0)


def assert_same(a, b, rtol=1e-9):
    """Equal, each measured by what its rounding is relative to: the mean by its own size, m2 by that of the spread."""
    torch.testing.assert_close(a.count, b.count, rtol=0, atol=0)
    # Means of opposite sign may cancel: what rounding costs is relative to the size of the values, not of their mean.
    size = (b.mean.square() + b.biased_variance).sqrt().max()
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-13, atol=1e-14 * float(1 + size))
    # A mean that is off by one part in 1e16 shifts m2 by count * (1e-16 * mean)^2.
    torch.testing.assert_close(a.m2, b.m2, rtol=rtol, atol=1e-28 * float((b.count * b.mean**2).max()))


def assert_identical(a, b):
    for name in ("count", "mean", "m2"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0, equal_nan=True)


# --- merging ---


@fast
@given(samples(), samples())
def test_merge_is_commutative(x, y):
    assert_same(merge(rows(x), rows(y)), merge(rows(y), rows(x)))


@fast
@given(samples(), samples(), samples())
def test_merge_is_associative(x, y, z):
    a, b, c = rows(x), rows(y), rows(z)
    assert_same(merge(merge(a, b), c), merge(a, merge(b, c)), rtol=1e-8)


@fast
@given(samples(), st.lists(st.integers(0, 40), max_size=6))
def test_any_split_merges_to_the_whole(x, cuts):
    edges = [0, *sorted(min(cut, len(x)) for cut in cuts), len(x)]
    parts = [rows(x[a:b]) for a, b in pairwise(edges)]

    assert_same(merge_all(parts), rows(x))
    one_by_one = Moments.empty((CHANNELS,))
    for part in parts:
        one_by_one = merge(one_by_one, part)
    assert_same(one_by_one, rows(x))


@fast
@given(samples())
def test_the_empty_set_is_the_identity_exactly(x):
    empty = Moments.empty((CHANNELS,))
    assert_identical(merge(rows(x), empty), rows(x))
    assert_identical(merge(empty, rows(x)), rows(x))


@pytest.mark.parametrize("mean", [math.inf, math.nan, 1e300])
def test_the_empty_set_is_the_identity_of_anything(mean):
    other = Moments(*(torch.tensor([value], dtype=torch.float64) for value in (4.0, mean, math.nan)))
    empty = Moments.empty((1,))
    assert_identical(merge(other, empty), other)
    assert_identical(merge(empty, other), other)


def test_two_empty_sets_merge_to_an_empty_set():
    empty = Moments.empty((2,))
    assert_identical(merge(empty, empty), empty)
    assert_identical(merge_all([empty, empty]), empty)
    assert_identical(rows(torch.zeros(0, 2)), empty)
    assert empty.biased_variance.tolist() == [0.0, 0.0]
    assert empty.unbiased_variance.isnan().all()


def test_empty_takes_dtype_and_device():
    empty = Moments.empty((2, 3), dtype=torch.float32, device="meta")
    assert (empty.mean.shape, empty.mean.dtype, empty.m2.device.type) == ((2, 3), torch.float32, "meta")


def test_merging_groups_gives_the_moments_of_the_batch():
    x = torch.randn(12, CHANNELS, 5) + 1e4
    ghosts = Moments.of(x.reshape(4, 3, CHANNELS, 5), dim=(1, 3))
    assert ghosts.mean.shape == (4, CHANNELS)
    assert_same(ghosts.merged(0), Moments.of(x, dim=(0, 2)))


def test_merging_an_exhausted_iterable_is_an_error():
    with pytest.raises(ValueError, match=r"no moments to merge.*Moments\.empty"):
        merge_all(iter(()))


def test_gradients_of_a_merge_with_the_empty_set_are_finite():
    x = torch.randn(5, CHANNELS, dtype=torch.float64, requires_grad=True)
    both = merge(Moments.empty((CHANNELS,)), rows(x))
    (gradient,) = torch.autograd.grad((both.mean + both.biased_variance).sum(), x)
    (expected,) = torch.autograd.grad((x.mean(0) + x.var(0, correction=0)).sum(), x)
    torch.testing.assert_close(gradient, expected)


# --- taking ---


@fast
@given(samples(min_rows=2))
def test_agrees_with_numpy(x):
    values = x.numpy()
    # NumPy of values near zero: the shift is exact in longdouble, so the oracle loses nothing to the mean.
    centred = values.astype(np.longdouble) - values[0]
    got = rows(x)

    assert got.count.tolist() == [len(values)] * CHANNELS
    right = np.asarray(values[0] + centred.mean(0), dtype=np.float64)
    rounding = 4 * np.finfo(np.float64).eps * np.abs(centred).max(0)  # of a mean close to 0, which has few digits
    assert (np.abs(got.mean.numpy() - right) <= 1e-13 * np.abs(right) + rounding).all()
    np.testing.assert_allclose(got.biased_variance, centred.var(0).astype(np.float64), rtol=1e-9)
    np.testing.assert_allclose(got.unbiased_variance, centred.var(0, ddof=1).astype(np.float64), rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [0, -1, (0, 2), (0, 1, 2, 3), (-1, 0)])
def test_any_dtype_over_any_dimensions(dtype, dim):
    x = torch.randn(4, 3, 2, 5).to(dtype)
    got = Moments.of(x, dim)
    torch.testing.assert_close(got.mean, x.double().mean(dim))
    torch.testing.assert_close(got.biased_variance, x.double().var(dim, correction=0))
    assert got.count.shape == got.mean.shape
    assert {got.count.dtype, got.mean.dtype, got.m2.dtype} == {torch.float64}


def test_float32_with_a_mean_ten_thousand_times_the_deviation_loses_no_digits():
    x = torch.randn(4096, CHANNELS) + 1e4
    torch.testing.assert_close(rows(x).biased_variance, x.double().var(0, correction=0), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("use", "poison"),
    # Not 1e300 of weight 0: it stays, for the gradient of its weight, and its square overflows.
    [(use, poison) for use in ("mask", "weights") for poison in (math.nan, math.inf, -math.inf)] + [("mask", 1e300)],
)
def test_what_does_not_count_pollutes_neither_moments_nor_gradients(use, poison):
    x = torch.randn(6, CHANNELS, dtype=torch.float64)
    x[::2] = poison
    valid = torch.arange(6).unsqueeze(1) % 2 == 1
    x.requires_grad_()
    got = Moments.of(x, 0, **{use: valid if use == "mask" else valid.double()})

    assert_same(got, rows(x.detach()[1::2]))
    (gradient,) = torch.autograd.grad((got.mean + got.m2).sum(), x)
    assert gradient.isfinite().all()
    assert (gradient[::2] == 0).all()


@fast
@given(samples(min_rows=1), st.data())
def test_a_mask_equals_selecting(x, data):
    chosen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(x), max_size=len(x))))
    assert_same(Moments.of(x, 0, mask=chosen.unsqueeze(1)), rows(x[chosen]))


@fast
@given(samples(min_rows=1), st.data())
def test_weights_equal_repeating(x, data):
    times = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=len(x), max_size=len(x))))
    assert_same(Moments.of(x, 0, weights=times.unsqueeze(1).float()), rows(x.repeat_interleave(times, 0)))


def test_a_mask_and_weights_join():
    x = torch.randn(8, CHANNELS, 5)
    mask = torch.rand(8, 1, 5) > 0.5
    weights = torch.rand(8, 1, 1)
    assert_same(Moments.of(x, (0, 2), mask, weights), Moments.of(x, (0, 2), weights=weights * mask))


def test_a_channel_without_valid_values_is_empty():
    mask = torch.tensor([True, False, True]).expand(4, CHANNELS)
    got = Moments.of(torch.randn(4, CHANNELS), 0, mask=mask)
    assert (got.count[1], got.mean[1], got.m2[1]) == (0, 0, 0)


def test_gradients_of_weights_hold_at_weight_zero():
    x = torch.randn(5, 2, dtype=torch.float64)

    def variance(weights):
        return Moments.of(x, 0, weights=weights).biased_variance

    weights = torch.tensor([[1.0], [0.0], [2.0], [0.5], [1.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(variance, weights)


# --- transforms ---


def test_differentiable_any_number_of_times():
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True], [True, False], [True, True], [False, True], [True, True]])

    def variance_and_mean(x):
        got = Moments.of(x, 0, mask=mask)
        return got.biased_variance * got.mean

    assert torch.autograd.gradcheck(variance_and_mean, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(variance_and_mean, x)
    assert hessian(lambda x: variance_and_mean(x).sum())(x.detach()).shape == (5, 2, 5, 2)


def test_vmap_and_jvp_see_moments_as_a_tree_of_tensors():
    x = torch.randn(4, 6, CHANNELS)
    mask = torch.rand(4, 6, 1) > 0.3
    mapped = vmap(lambda x, mask: merge(Moments.of(x, 0, mask), rows(x)))(x, mask)
    for i in range(4):
        one = Moments(mapped.count[i], mapped.mean[i], mapped.m2[i])
        assert_same(one, merge(Moments.of(x[i], 0, mask[i]), rows(x[i])))
    _, tangent = jvp(rows, (x[0],), (torch.ones_like(x[0]),))
    torch.testing.assert_close(tangent.mean, torch.ones(CHANNELS, dtype=torch.float64))


def test_compiles_without_a_break():
    x = torch.randn(6, CHANNELS)
    compiled = torch.compile(lambda x, mask: merge(Moments.of(x, 0, mask), rows(x)), fullgraph=True, backend="eager")
    assert_same(compiled(x, x > 0), merge(Moments.of(x, 0, x > 0), rows(x)))


def test_no_step_looks_at_values():
    """On the meta device there are none to look at, so nothing can make a program wait for its GPU."""
    x = torch.empty(6, CHANNELS, device="meta")
    got = merge_all([merge(Moments.of(x, 0, x > 0, x.abs()), rows(x)), rows(x)])
    assert got.unbiased_variance.shape == got.biased_variance.shape == (CHANNELS,)


# --- errors ---


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: Moments.of(x.long(), 0), TypeError, r"int64.*x\.float\(\)"),
        (lambda x: Moments.of(x.to(torch.complex64), 0), TypeError, "complex64"),
        (lambda x: Moments.of(x, ()), ValueError, r"dim is empty.*\(4, 3\)"),
        (lambda x: Moments.of(x, 0, mask=torch.ones(4, 1)), TypeError, r"mask must be bool.*float32.*mask\.bool\(\)"),
        (lambda x: Moments.of(x, 0, weights=torch.ones(4, 1).long()), TypeError, r"weights.*int64"),
        (lambda x: Moments.of(x, 0, mask=torch.ones(4).bool()), ValueError, r"mask of shape \(4,\).*\(4, 3\)"),
        (lambda x: Moments.of(x, 0, weights=torch.ones(2, 4, 3)), ValueError, r"weights of shape \(2, 4, 3\)"),
        (lambda x: Moments.of(x, 2), IndexError, "out of range"),
    ],
)
def test_errors_name_what_is_wrong_and_what_to_do(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(4, 3))


def test_the_examples_in_the_docstrings_run():
    result = doctest.testmod(moments)
    assert result.attempted > 0
    assert result.failed == 0
