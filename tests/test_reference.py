"""The reference kernel against torch.nn.functional.batch_norm, against autograd, and against least squares."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, vmap

from batchnorm.kernels import reference

EPS = 1e-5
SHAPES = [(5, 3), (4, 3, 6), (2, 3, 4, 2), (2, 3, 2, 2, 3)]
AFFINE = [(True, True), (True, False), (False, True), (False, False)]


@st.composite
def cases(draw):
    """An input of any rank, size, mean and spread, and weight and bias that may be missing, all float64."""
    channels = draw(st.integers(1, 4))
    space = draw(st.lists(st.integers(1, 4), max_size=3))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(draw(st.integers(2, 6)), channels, *space, dtype=torch.float64)
    x = draw(st.sampled_from([1e-2, 1.0, 1e2])) * (x + draw(st.sampled_from([0.0, -3.0, 1e3])))
    weight, bias = (
        torch.randn(channels, dtype=torch.float64) if draw(st.booleans()) else None for _ in ("weight", "bias")
    )
    return x, weight, bias


def make(shape, affine=(True, True), dtype=torch.float64, requires_grad=False):
    torch.manual_seed(0)
    x = (2 * torch.randn(shape) + 1).to(dtype)
    weight, bias = (torch.randn(shape[1]).to(dtype) if wanted else None for wanted in affine)
    if requires_grad:
        for tensor in (x, weight, bias):
            _ = tensor is None or tensor.requires_grad_()
    return x, weight, bias


def ours(x, weight, bias):
    return reference.train_forward(x, weight, bias, EPS)[0]


def torchs(x, weight, bias):
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)


# --- values ---


@settings(deadline=None, max_examples=100)
@given(cases())
def test_training_and_inference_agree_with_torch(case):
    x, weight, bias = case
    y, mean, var = reference.train_forward(x, weight, bias, EPS)
    # The rounding of x itself, which a mean far from zero makes large beside the deviation.
    tolerance = {"rtol": 1e-9, "atol": 1e-8}
    torch.testing.assert_close(y, torchs(x, weight, bias), **tolerance)
    dims = (0, *range(2, x.dim()))
    torch.testing.assert_close(mean, x.mean(dims))
    torch.testing.assert_close(var, x.var(dims, correction=0))

    y = reference.inference(x, mean, var, weight, bias, EPS)
    torch.testing.assert_close(y, F.batch_norm(x, mean, var, weight, bias, eps=EPS), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_dtypes_are_computed_wide_and_rounded_once(dtype):
    x, weight, bias = make((8, 3, 5, 5), dtype=dtype)
    y, mean, var = reference.train_forward(x, weight, bias, EPS)
    wide, wide_mean, wide_var = reference.train_forward(x.double(), weight.double(), bias.double(), EPS)
    assert (y.dtype, mean.dtype, var.dtype) == (dtype, torch.float64, torch.float64)
    assert torch.equal(y, wide.to(dtype))
    assert torch.equal(mean, wide_mean)
    assert torch.equal(var, wide_var)

    running_mean, running_var = torch.randn(3), torch.rand(3)
    y = reference.inference(x, running_mean, running_var, weight.float(), bias.float(), EPS)
    wide = reference.inference(x.double(), running_mean, running_var, weight.float(), bias.float(), EPS)
    assert torch.equal(y, wide.to(dtype))


def test_float32_with_a_mean_ten_thousand_times_the_deviation_loses_no_digits():
    x = torch.randn(64, 3, 8, 8) + 1e4
    torch.testing.assert_close(ours(x, None, None), torchs(x.double(), None, None).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0), (2, 0, 4)])
def test_empty_input_gives_empty_output(shape):
    x, weight, bias = make(shape, requires_grad=True)
    y, mean, var = reference.train_forward(x, weight, bias, EPS)
    assert y.shape == shape
    assert (mean == 0).all()
    assert (var == 0).all()
    y.sum().backward()
    assert (weight.grad == 0).all()
    assert x.grad.shape == shape


def test_inputs_are_not_changed():
    tensors = [*make((4, 3, 5)), torch.randn(3), torch.rand(3)]
    before = [tensor.clone() for tensor in tensors]
    x, weight, bias, mean, var = tensors
    reference.train_forward(x, weight, bias, EPS)
    reference.inference(x, mean, var, weight, bias, EPS)
    reference.train_backward(torch.ones_like(x), x, weight, mean, var, EPS)
    reference.running_update(mean, var, mean + 1, var + 1, 20, 0.1)
    assert all(map(torch.equal, tensors, before))


def test_no_step_looks_at_values():
    """On the meta device there are none to look at, so nothing can make a program wait for its GPU."""
    x, weight, bias = (tensor.to("meta") for tensor in make((4, 3, 5), dtype=torch.bfloat16))
    y, mean, var = reference.train_forward(x, weight, bias, EPS)
    grad_x, _, _ = reference.train_backward(y, x, weight, mean, var, EPS)
    updated, _ = reference.running_update(mean, var, mean, var, torch.ones(3, device="meta"), 0.1)
    assert (y.dtype, grad_x.shape, updated.shape) == (torch.bfloat16, x.shape, (3,))


# --- derivatives ---


@settings(deadline=None, max_examples=60)
@given(cases())
def test_the_closed_form_of_the_backward_agrees_with_autograd_and_torch(case):
    x, weight, bias = case
    channels = x.shape[1]
    weight, bias = (torch.ones(channels, dtype=x.dtype) if t is None else t for t in (weight, bias))
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    grad_y = torch.randn_like(x)
    y, mean, var = reference.train_forward(*inputs, EPS)

    # The gradient cancels down from terms of this size.
    atol = 1e-8 * float((1 + (weight.abs() / (var + EPS).sqrt()).max()).detach())
    closed = reference.train_backward(grad_y, x, weight, mean, var, EPS)
    for other in (y, torchs(*inputs)):
        for a, b in zip(closed, torch.autograd.grad(other, inputs, grad_y), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=atol)


@settings(deadline=None, max_examples=60)
@given(cases())
def test_the_backward_is_the_residual_of_a_regression(case):
    """Normalizing removes from the gradient just what a least-squares fit on (1, x_hat) explains."""
    x, weight, _ = case
    assume(x.numel() // x.shape[1] > 2)  # or nothing is left of the gradient
    x = x / x.std()
    grad_y = torch.randn_like(x)
    y, mean, var = reference.train_forward(x, None, None, 0.0)
    grad_x, _, _ = reference.train_backward(grad_y, x, weight, mean, var, 0.0)

    for c in range(x.shape[1]):
        grad_x_hat = grad_y[:, c].flatten() * (1.0 if weight is None else weight[c])
        design = torch.stack([torch.ones_like(grad_x_hat), y[:, c].flatten()], dim=1)
        residual = grad_x_hat - design @ torch.linalg.lstsq(design, grad_x_hat).solution
        torch.testing.assert_close(var[c].sqrt() * grad_x[:, c].flatten(), residual, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_gradient_of_a_narrow_dtype_is_rounded_once(dtype):
    x, weight, _ = make((8, 3, 5), dtype=dtype)
    grad_y = torch.randn_like(x)
    _, mean, var = reference.train_forward(x, weight, None, EPS)
    narrow = reference.train_backward(grad_y, x, weight, mean, var, EPS)
    wide = reference.train_backward(grad_y.double(), x.double(), weight.double(), mean, var, EPS)
    assert narrow[0].dtype == dtype
    assert torch.equal(narrow[0], wide[0].to(dtype))
    assert torch.equal(narrow[1], wide[1])
    assert torch.equal(narrow[2], wide[2])


@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_gradients_of_first_and_second_order_and_forward(shape, affine):
    x, weight, bias = make(shape, affine, requires_grad=True)
    inputs = (x, weight, bias)
    assert gradcheck(ours, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(ours, inputs, check_batched_grad=True)


def test_gradients_at_inference():
    x, weight, bias = make((4, 3, 2), requires_grad=True)
    mean, var = torch.randn(3).double().requires_grad_(), (0.5 + torch.rand(3)).double().requires_grad_()

    def run(*inputs):
        return reference.inference(*inputs, EPS)

    assert gradcheck(run, (x, mean, var, weight, bias), check_forward_ad=True)
    assert gradgradcheck(run, (x, mean, var, weight, bias))


def test_the_closed_form_can_be_differentiated_itself():
    x, weight, bias = make((4, 2, 3), requires_grad=True)
    grad_y = torch.randn_like(x, requires_grad=True)

    def closed(grad_y, x, weight):
        _, mean, var = reference.train_forward(x, weight, bias, EPS)
        return reference.train_backward(grad_y, x, weight, mean, var, EPS)

    def by_torch(grad_y, x, weight):
        return torch.autograd.grad(torchs(x, weight, bias), (x, weight, bias), grad_y, create_graph=True)

    assert gradcheck(closed, (grad_y, x, weight), check_forward_ad=True)
    seeds = [torch.randn_like(g) for g in closed(grad_y, x, weight)]
    for a, b in zip(
        torch.autograd.grad(closed(grad_y, x, weight), (grad_y, x, weight), seeds),
        torch.autograd.grad(by_torch(grad_y, x, weight), (grad_y, x, weight), seeds),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_forward_mode_and_hessian_agree_with_torch():
    x, weight, bias = make((4, 2, 3))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.randn_like(x))
        tangents = [forward_ad.unpack_dual(f(dual, weight, bias)).tangent for f in (ours, torchs)]
    torch.testing.assert_close(*tangents)
    torch.testing.assert_close(*(jacfwd(f)(x, weight, bias) for f in (ours, torchs)))
    torch.testing.assert_close(*(hessian(lambda x, f=f: f(x, weight, bias).exp().sum())(x) for f in (ours, torchs)))


# --- vmap ---


def test_vmap_over_inputs_weights_and_gradients():
    x = torch.randn(6, 4, 3, 5, dtype=torch.float64)
    weight, bias = torch.randn(6, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)

    def loss(x, weight):
        return (ours(x, weight, bias) ** 3).sum()

    def all_of_it(x, weight):
        y, mean, var = reference.train_forward(x, weight, bias, EPS)
        return y, mean, var, grad(loss, argnums=(0, 1))(x, weight), reference.inference(x, mean, var, weight, bias, EPS)

    mapped = vmap(all_of_it)(x, weight)
    for i in range(6):
        single = all_of_it(x[i], weight[i])
        torch.testing.assert_close(torch.utils._pytree.tree_map(lambda t, i=i: t[i], mapped), single)


def test_vmap_of_the_closed_form_and_of_the_running_update():
    x, grad_y = torch.randn(2, 6, 4, 3, dtype=torch.float64)
    _, mean, var = vmap(lambda x: reference.train_forward(x, None, None, EPS))(x)
    mapped = vmap(lambda g, x, m, v: reference.train_backward(g, x, None, m, v, EPS))(grad_y, x, mean, var)
    mean[2, 0] = math.nan
    count, factor = torch.arange(6), torch.rand(6)
    buffers = torch.zeros(3), torch.ones(3)
    updated = vmap(lambda m, v, n, f: reference.running_update(*buffers, m, v, n, f))(mean, var, count, factor)
    for i in (0, 1, 2, 5):
        single = reference.running_update(*buffers, mean[i], var[i], count[i], factor[i])
        torch.testing.assert_close((updated[0][i], updated[1][i]), single)
        if i != 2:
            single = reference.train_backward(grad_y[i], x[i], None, mean[i], var[i], EPS)
            torch.testing.assert_close(tuple(part[i] for part in mapped), single)


# --- running statistics ---


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_running_update_agrees_with_torch(shape, momentum):
    x, _, _ = make(shape)
    x = x.float()
    buffers = torch.randn(3), torch.rand(3)
    expected = [buffer.clone() for buffer in buffers]
    F.batch_norm(x, *expected, training=True, momentum=momentum)

    _, mean, var = reference.train_forward(x, None, None, EPS)
    count = x.numel() // 3
    for number in (int, float, torch.tensor):
        updated = reference.running_update(*buffers, mean, var, number(count), momentum)
        torch.testing.assert_close(list(updated), expected)
        assert updated[0].dtype == updated[1].dtype == torch.float32
    updated = reference.running_update(*buffers, mean, var, count, torch.tensor(momentum, dtype=torch.float64))
    torch.testing.assert_close(list(updated), expected)


@pytest.mark.parametrize(
    ("mean", "var"),
    [(math.nan, 1.0), (math.inf, math.nan), (0.0, math.nan), (0.0, math.inf), (1e39, 1.0), (0.0, 1e39)],
)
def test_a_channel_that_cannot_be_stored_leaves_all_running_statistics_alone(mean, var):
    buffers = torch.randn(2), torch.rand(2)
    batch = torch.tensor([1.0, mean], dtype=torch.float64), torch.tensor([1.0, var], dtype=torch.float64)
    assert all(map(torch.equal, reference.running_update(*buffers, *batch, 10, 0.1), buffers))


@pytest.mark.parametrize("count", [0, 1, torch.tensor(0.0), torch.tensor([1, 0])])
def test_a_channel_of_one_value_or_none_leaves_its_running_statistics_alone(count):
    buffers = torch.randn(2), torch.rand(2)
    updated = reference.running_update(*buffers, torch.zeros(2), torch.zeros(2), count, 0.5)
    assert all(map(torch.equal, updated, buffers))


def test_a_channel_with_values_is_updated_beside_one_without():
    buffers = torch.zeros(2), torch.zeros(2)
    mean, var = reference.running_update(*buffers, torch.ones(2), torch.ones(2), torch.tensor([2, 0]), 0.5)
    assert mean.tolist() == [0.5, 0.0]
    assert var.tolist() == [1.0, 0.0]
