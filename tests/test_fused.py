"""Activation, residual and in-place work: values, every gradient and buffers against torch.nn in float64."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm
from batchnorm import kernels
from batchnorm.activations import Activation, activation_of, applied, module_of
from batchnorm.functional import batch_norm
from batchnorm.kernels import cpu, plans
from expected import laid

NAMES = ["relu", "leaky_relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh", "elu"]
PLANES = ((5, 9, 12, 9), "contiguous")  # a run of pairs, one vector and scalars
SMALL = ((9, 23, 5, 5), "contiguous")  # blocks of 500 columns, which are not whole bytes of bits
LONG = ((2, 3, 150, 151), "contiguous")
ROWS = ((35, 701), "contiguous")
SPLIT_ROWS = ((5, 9, 70, 71), "channels_last")
VIEWS = {PLANES: ("planes", True), SMALL: ("small", True), LONG: ("planes", False), ROWS: ("rows", True)}
VIEWS[SPLIT_ROWS] = ("rows", False)

# Relative to the largest value: what rounding costs once; elu in place is undone by a logarithm.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 1.2e-2}


class Outcome(NamedTuple):
    """Of one step."""

    y: Tensor
    x_grad: Tensor
    weight_grad: Tensor
    bias_grad: Tensor
    residual_grad: Tensor | None
    running_mean: Tensor
    running_var: Tensor


class Given(NamedTuple):
    """The tensors of one step."""

    x: Tensor
    grad: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def double(self) -> Given:
        return Given(*(None if t is None else t.double() for t in self))


def given(shape: tuple[int, ...], layout: str, dtype: torch.dtype, residual: bool) -> Given:
    channels, wide = shape[1], torch.float64 if dtype == torch.float64 else torch.float32
    x, grad, skip = (laid(shape, seed, dtype, layout) for seed in range(3))
    weight, bias = torch.linspace(0.5, 1.8, channels, dtype=wide), torch.linspace(-0.5, 0.8, channels, dtype=wide)
    mean, var = torch.linspace(-1, 1, channels, dtype=wide), torch.linspace(0.3, 4, channels, dtype=wide)
    return Given(x, grad, skip if residual else None, weight, bias, mean, var)


def ours(t: Given, training: bool, activation: Activation | None, inplace: bool = False) -> Outcome:
    x, weight, bias = (v.clone().requires_grad_() for v in (t.x, t.weight, t.bias))
    residual = None if t.residual is None else t.residual.clone().requires_grad_()
    mean, var = t.running_mean.clone(), t.running_var.clone()
    fed = x * 1 if inplace else x
    with kernels.using("numba"):
        y = batch_norm(
            fed, mean, var, weight, bias, training, activation=activation, residual=residual, inplace=inplace
        )
    if inplace:
        assert y.data_ptr() == fed.data_ptr()
    leaves = [v for v in (x, weight, bias, residual) if v is not None]
    grads = [*torch.autograd.grad(y, leaves, t.grad), None]
    return Outcome(y.detach(), grads[0], grads[1], grads[2], grads[3], mean, var)


def oracle(t: Given, training: bool, activation: Activation | None) -> tuple[Outcome, Tensor]:
    """In float64 by torch.nn; and z."""
    t = t.double()
    x, weight, bias = (v.clone().requires_grad_() for v in (t.x, t.weight, t.bias))
    residual = None if t.residual is None else t.residual.clone().requires_grad_()
    mean, var = t.running_mean.clone(), t.running_var.clone()
    z = F.batch_norm(x, mean, var, weight, bias, training, 0.1)
    z = z if residual is None else z + residual
    y = applied(activation, z)
    leaves = [v for v in (x, weight, bias, residual) if v is not None]
    grads = [*torch.autograd.grad(y, leaves, t.grad), None]
    return Outcome(y.detach(), grads[0], grads[1], grads[2], grads[3], mean, var), z.detach()


def kinks(z: Tensor, activation: Activation | None) -> Tensor:
    """Where rounding decides on which side of a bend z lies."""
    at = {"relu": (0.0,), "leaky_relu": (0.0,), "elu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0)}
    bends = at.get(activation.name, ()) if activation is not None else ()
    return torch.stack([(z - bend).abs() < 1e-4 for bend in bends]).any(0) if bends else torch.zeros_like(z).bool()


def compare(
    view: tuple[tuple[int, ...], str],
    dtype: torch.dtype,
    training: bool,
    name: Any,
    residual: bool,
    inplace: bool = False,
) -> None:
    shape, layout = view
    t, activation = given(shape, layout, dtype, residual), activation_of(name)
    planned = plans.laid_out(t.x)[1]
    assert (planned.kind, planned.fused) == VIEWS[view]
    found = ours(t, training, activation, inplace)
    assert kernels.ran() == ("numba", "numba")
    right, z = oracle(t, training, activation)
    undecided = kinks(z, activation)
    assert undecided.double().mean() < 1e-3
    for field, a, b in zip(Outcome._fields, found, right, strict=True):
        if b is None:
            assert a is None, field
            continue
        assert a.dtype == (dtype if field in ("y", "x_grad", "residual_grad") else t.weight.dtype), field
        if field in ("x_grad", "residual_grad"):
            a, b = a.double().masked_fill(undecided, 0.0), b.masked_fill(undecided, 0.0)
        scale = b.abs().max()
        if field in ("weight_grad", "bias_grad"):  # a sum of as many terms of either sign, each rounded
            scale = scale * math.sqrt(right.y.numel() / b.numel()) if dtype != torch.bfloat16 else scale
            scale = scale + undecided.sum()
        assert (a.double() - b).abs().max() <= TOLERANCE[dtype] * scale, field


RELU = [
    *((view, torch.float32, True, True) for view in VIEWS),
    (PLANES, torch.float32, True, False),
    (PLANES, torch.float32, False, False),
    (PLANES, torch.bfloat16, True, True),
]
# The same in more forms, each of which compiles for five to ten seconds.
MORE = [
    *((view, torch.float32, True, False) for view in VIEWS if view is not PLANES),
    (PLANES, torch.float32, False, True),
    (SPLIT_ROWS, torch.float32, False, False),
    (SPLIT_ROWS, torch.float32, False, True),
    (PLANES, torch.bfloat16, True, False),
    (SPLIT_ROWS, torch.bfloat16, True, True),
    (SMALL, torch.float64, True, True),
    (SMALL, torch.bfloat16, False, True),  # which evaluation sees as planes
]


@pytest.mark.parametrize(
    ("view", "dtype", "training", "residual"), [*RELU, *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE)]
)
def test_relu(view: Any, dtype: torch.dtype, training: bool, residual: bool) -> None:
    compare(view, dtype, training, "relu", residual)


@pytest.mark.parametrize(
    ("name", "residual"), [*((name, False) for name in NAMES[1:]), ("leaky_relu", True), ("silu", True)]
)
def test_other_activations(name: str, residual: bool) -> None:
    compare(PLANES, torch.float32, True, name, residual)


@pytest.mark.slow  # to compile
def test_a_smooth_activation_in_other_views_and_dtypes() -> None:
    compare(SPLIT_ROWS, torch.bfloat16, True, "silu", True)
    compare(PLANES, torch.float64, True, "gelu", False)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_residual_alone(training: bool) -> None:
    compare(PLANES, torch.float32, training, None, True)


@pytest.mark.parametrize(
    ("name", "training"), [(None, True), ("leaky_relu", True), ("elu", True), ("leaky_relu", False)]
)
def test_in_place(name: str | None, training: bool) -> None:
    compare(PLANES, torch.float32, training, name, False, inplace=True)


@pytest.mark.slow  # to compile
def test_in_place_in_other_views() -> None:
    compare(SPLIT_ROWS, torch.float32, True, "leaky_relu", False, inplace=True)
    compare(SMALL, torch.bfloat16, True, None, False, inplace=True)


@pytest.mark.parametrize(
    "name", [name if name in ("silu", "gelu", "elu") else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_the_loops_functions_are_as_right_as_float32_allows(name: str) -> None:
    """Through a channel of evaluation that passes its input on; as close as torch's own operators, or an ulp or two."""
    z = torch.cat((torch.linspace(-30, 30, 60001), torch.linspace(-1e-3, 1e-3, 2001))).reshape(1, 1, -1)
    activation = activation_of(name)
    one, zero = torch.ones(1), torch.zeros(1)

    def through(t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.clone().requires_grad_()
        with kernels.using("numba"):
            y = batch_norm(t, zero, one, eps=0.0, activation=activation)
        return y.detach(), torch.autograd.grad(y, t, torch.ones_like(y))[0]

    found = through(z)
    assert kernels.ran() == ("numba", "numba")
    narrow, wide = z.clone().requires_grad_(), z.double().requires_grad_()
    theirs, right = ((v, torch.autograd.grad(v.sum(), t)[0]) for t in (narrow, wide) for v in (applied(activation, t),))
    off = kinks(z.double(), activation)
    for a, b, c in zip(found, theirs, right, strict=True):
        errors = [((v.double() - c).abs() / c.abs().clamp(min=0.1)).masked_fill(off, 0.0).max() for v in (a, b)]
        assert errors[0] <= max(2 * errors[1], 5e-7)


def test_not_a_number_and_infinity_pass_as_their_limits() -> None:
    """The limits themselves: what torch's kernels give depends on the processor, such as nan for gelu of infinity."""
    z = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0] * 7).reshape(1, 1, -1)
    one, zero = torch.ones(1), torch.zeros(1)
    for name in NAMES:
        with kernels.using("numba"):
            y = batch_norm(z, zero, one, eps=0.0, activation=name).flatten()
        below = {"leaky_relu": -math.inf, "elu": -activation_of(name).parameter}.get(name, 0.0)
        assert y[0].isnan(), name
        assert y[1] == (6.0 if name == "relu6" else math.inf), name
        if name in ("silu", "gelu", "gelu_tanh", "hardswish"):  # -inf times what is 0, or nearly: no two kernels agree
            assert y[2] == 0 or not y[2].isfinite(), name
        else:
            assert y[2] == below, name
        assert (y[3:5] == 0).all(), name
        assert torch.equal(y.reshape(7, 5).nan_to_num(nan=5.0), y[:5].nan_to_num(nan=5.0).expand(7, 5)), name


@pytest.mark.parametrize(("elements", "kernel"), [(2**19 - 1, "aten"), (2**19, "numba")])
def test_small_evaluations_are_torchs(elements: int, kernel: str) -> None:
    x = torch.randn(1, 1, elements)
    layer = batchnorm.BatchNorm1d(1, activation="relu").eval()
    assert kernels.which(x, False, fused=True) == kernel
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.relu(nn.BatchNorm1d(1).eval()(x)))
    assert kernels.ran().forward == kernel


# --- memory and work ---


def saved_storages(run: Any, *known: Tensor) -> int:
    """Bytes that a forward keeps for its backward, besides those of known tensors; each storage counted once."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    for t in known:
        kept.pop(t.untyped_storage().data_ptr(), None)
    assert result.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(
    ("name", "residual", "more"),
    [("relu", False, 0), ("relu", True, 1 / 32), ("silu", False, 0), ("silu", True, 0), (None, True, 0)],
)
def test_what_is_saved(name: str | None, residual: bool, more: float) -> None:
    """x and, for a residual before relu, a bit an element; the moments are kept beside, 16 bytes a channel."""
    x, skip = torch.randn(4, 16, 8, 8), torch.randn(4, 16, 8, 8)
    layer = batchnorm.BatchNorm2d(16, activation=name)
    saved = saved_storages(lambda: layer(x, skip if residual else None), x, skip, layer.weight, layer.bias)
    assert saved == more * x.untyped_storage().nbytes()


def test_frozen_layers_save_no_input_where_only_its_gradient_is_needed() -> None:
    x = torch.randn(4, 16, 8, 8, requires_grad=True)
    for name, bits in ((None, 0), ("relu", 1 / 32)):
        layer = batchnorm.BatchNorm2d(16, activation=name).eval().requires_grad_(False)
        with kernels.using("numba"):
            saved = saved_storages(lambda layer=layer: layer(x), layer.weight, layer.bias)
            y = layer(x)
        assert saved == bits * x.untyped_storage().nbytes()
        assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
        assert kernels.ran() == ("numba", "numba")


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual"])
def test_gradients_that_nobody_needs_are_not_made(wanted: str, residual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if wanted == "residual" and not residual:
        return
    made: list[cpu.Gradients] = []
    backward = cpu.backward
    monkeypatch.setattr(cpu, "backward", lambda *args: made.append(backward(*args)) or made[-1])
    for training in (True, False):
        t = given(*PLANES, torch.float32, residual)
        leaves = {name: v.clone() for name, v in t._asdict().items() if v is not None}
        leaves[wanted].requires_grad_()
        x, mean, var, weight, bias = (leaves[k] for k in ("x", "running_mean", "running_var", "weight", "bias"))
        with kernels.using("numba"):
            y = batch_norm(x, mean, var, weight, bias, training, activation="relu", residual=leaves.get("residual"))
        (found,) = torch.autograd.grad(y, leaves[wanted], t.grad)
        right, z = oracle(t, training, Activation("relu"))
        expected = getattr(right, f"{wanted}_grad")
        allowed = 1e-5 * expected.abs().max() + kinks(z, Activation("relu")).sum()
        assert (found.double() - expected).abs().max() <= allowed
        assert [name for name, v in made.pop()._asdict().items() if v is not None] == [wanted]


def test_expanded_gradients_are_read_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[Any] = []
    readable = cpu._readable
    monkeypatch.setattr(cpu, "_readable", lambda dy, x, plan: copies.append(dy) or readable(dy, x, plan))
    for view, residual in ((PLANES, True), (SPLIT_ROWS, True), (SMALL, True)):
        t = given(*view, torch.float32, residual)
        for grad in (t.grad.mean().expand(t.x.shape), t.grad.mean(dim=(2, 3), keepdim=True).expand(t.x.shape)):
            expanded = t._replace(grad=grad)
            found, (right, z) = ours(expanded, True, Activation("relu")), oracle(expanded, True, Activation("relu"))
            away = ~kinks(z, Activation("relu"))
            assert ((found.x_grad - right.x_grad) * away).abs().max() <= 1e-5 * right.x_grad.abs().max()
    assert copies


# --- derivatives of derivatives, compilers, export, and the layers ---


@pytest.mark.parametrize(
    ("name", "residual", "training"),
    [
        ("silu", True, True),
        pytest.param("relu", True, True, marks=pytest.mark.slow),  # to compile
        pytest.param("silu", False, False, marks=pytest.mark.slow),
    ],
)
def test_second_derivatives(name: str | None, residual: bool, training: bool) -> None:
    t = given((4, 3, 2, 5), "contiguous", torch.float64, residual)
    leaves = [v.clone().requires_grad_() for v in (t.x, t.weight, t.bias, *((t.residual,) if residual else ()))]

    def call(x: Tensor, weight: Tensor, bias: Tensor, skip: Tensor | None = None) -> Tensor:
        with kernels.using("numba"):
            return batch_norm(
                x, t.running_mean.clone(), t.running_var.clone(), weight, bias, training, activation=name, residual=skip
            )

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_in_place_says_that_it_cannot_be_differentiated_twice() -> None:
    x = torch.randn(6, 3, requires_grad=True)
    y = batch_norm(x * 1, None, None, training=True, inplace=True)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*inplace=False"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


class Block(nn.Module):
    """Convolution, normalization, sum and activation."""

    def __init__(self, name: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn = batchnorm.BatchNorm2d(4, activation=name)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x), x)
        return y


@pytest.mark.parametrize("name", ["relu"])
def test_compiled_in_one_graph(name: str) -> None:
    torch.manual_seed(0)
    block, x = Block(name), torch.randn(3, 4, 6, 5, requires_grad=True)
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True)
    for training in (True, False):
        block.train(training)
        compiled.train(training)
        y, again = block(x), compiled(x)
        torch.testing.assert_close(again, y)
        grads = [
            torch.autograd.grad(out.square().sum(), [x, *m.parameters()]) for out, m in ((y, block), (again, compiled))
        ]
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(compiled.bn.running_var, block.bn.running_var)


def test_exported_as_plain_operators() -> None:
    block, x = Block("relu").eval(), torch.randn(3, 4, 6, 5)
    program = torch.export.export(block, (x,))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("batchnorm::" in name or "batchnorm." in name for name in called)
    assert {"aten.relu.default", "aten.add.Tensor"} <= called
    torch.testing.assert_close(program.module()(x), block(x))


def test_under_function_transforms() -> None:
    layer = batchnorm.BatchNorm1d(3, activation="gelu", affine=False).eval()
    x = torch.randn(5, 2, 3)
    y = torch.func.vmap(layer)(x)
    torch.testing.assert_close(y, torch.stack([layer(row) for row in x]))


def test_layers_say_keep_and_script_their_activation() -> None:
    layer = batchnorm.BatchNorm1d(3, activation=("leaky_relu", 0.2))
    assert "activation=leaky_relu(0.2)" in repr(layer)
    assert list(layer.state_dict()) == list(nn.BatchNorm1d(3).state_dict())
    assert copy.deepcopy(layer).activation == layer.activation
    assert "inplace=True" in repr(batchnorm.BatchNorm2d(3, inplace=True))
    x = torch.randn(5, 3)
    scripted = torch.jit.script(layer.eval())
    torch.testing.assert_close(scripted(x), layer(x))
    lazy = batchnorm.LazyBatchNorm1d(activation=nn.SiLU())
    torch.testing.assert_close(lazy(x), F.silu(nn.BatchNorm1d(3)(x)))
    assert type(lazy) is batchnorm.BatchNorm1d


def test_fx_records_the_layer_with_its_residual() -> None:
    block = Block("relu").eval()
    traced = torch.fx.symbolic_trace(block)
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(traced(x), block(x))
    found, calls = ([n for n in traced.graph.nodes if n.op == op] for op in ("get_attr", "call_function"))
    assert [node.target for node in found] == ["bn"]
    assert [node.args[0] for node in calls] == found
    assert calls[0].kwargs["residual"].op == "placeholder"


def test_other_layouts_of_the_residual_are_added_all_the_same() -> None:
    x, skip = torch.randn(3, 4, 6, 5), torch.randn(3, 4, 6, 5).contiguous(memory_format=torch.channels_last)
    skip.requires_grad_()
    y = batch_norm(x, None, None, training=True, residual=skip, activation="relu")
    right = F.relu(F.batch_norm(x, None, None, training=True) + skip)
    torch.testing.assert_close(y, right)
    grads = [torch.autograd.grad(out.sum(), skip)[0] for out in (y, right)]
    torch.testing.assert_close(grads[0], grads[1])


def test_half_precision_and_six_dimensions_fall_back() -> None:
    for x in (torch.randn(3, 4, 5).half(), torch.randn(2, 3, 2, 2, 2, 2)):
        skip = torch.randn_like(x)
        y = batch_norm(x, None, None, training=True, residual=skip, activation="silu")
        assert kernels.ran().forward == "aten"
        right = F.silu(F.batch_norm(x.double(), None, None, training=True) + skip)
        torch.testing.assert_close(y.double(), right, rtol=1e-2, atol=1e-2 if x.dtype == torch.half else 1e-5)


# --- names ---


def test_activations_by_name_function_and_module() -> None:
    assert activation_of(None) is None
    assert activation_of("relu") == activation_of(F.relu) == activation_of(torch.relu) == activation_of(nn.ReLU(True))
    assert activation_of(nn.ReLU) == Activation("relu")
    assert activation_of(nn.GELU("tanh")).name == "gelu_tanh"
    assert activation_of(("elu", 2)) == activation_of(nn.ELU(2.0)) == Activation("elu", 2.0)
    assert activation_of("leaky_relu") == activation_of(nn.LeakyReLU())
    for name in NAMES:
        activation = activation_of(name)
        assert activation_of(module_of(activation)) == activation
        z = torch.randn(50)
        torch.testing.assert_close(module_of(activation)(z), applied(activation, z))


@pytest.mark.parametrize("wrong", ["rely", ("relu6x", 1.0)])
def test_unknown_names(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown activation.*choose from relu"):
        batchnorm.BatchNorm1d(3, activation=wrong)


@pytest.mark.parametrize("wrong", [3, [], nn.PReLU(), nn.Linear, torch.add, object()])
def test_what_cannot_be_an_activation(wrong: Any) -> None:
    with pytest.raises(TypeError):
        batch_norm(torch.randn(4, 3), None, None, training=True, activation=wrong)


# --- bad input: nothing is overwritten before the check ---


@pytest.mark.parametrize(
    ("residual", "error"),
    [
        (torch.zeros(4, 3, 1), "size.*not broadcast.*expand_as"),
        (torch.zeros(4, 3, 5, dtype=torch.float64), "mixed dtype: residual is torch.float64"),
        (torch.zeros(4, 3, 5, device="meta"), "residual must be moved"),
        (torch.zeros(4, 3, 5).to_sparse(), "to_dense"),
    ],
    ids=["shape", "dtype", "device", "layout"],
)
@pytest.mark.parametrize("training", [True, False])
def test_wrong_residuals(residual: Tensor, error: str, training: bool) -> None:
    layer = batchnorm.BatchNorm1d(3, activation="relu").train(training)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=error):
        layer(torch.randn(4, 3, 5), residual)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "kind", "error"),
    [
        ({"activation": "relu"}, ValueError, "can be undone"),
        ({"activation": ("leaky_relu", 0.0)}, ValueError, "above 0"),
        ({"activation": ("elu", -1.0)}, ValueError, "above 0"),
        ({"residual": torch.zeros(4, 3)}, ValueError, "keeps no residual"),
        ({"weight": torch.tensor([1.0, 0.0, 1.0])}, RuntimeError, "weight of 0 in channel 1 .1 of 3"),
        ({"weight": torch.tensor([1.0, 1.0, math.nan])}, RuntimeError, "weight of nan in channel 2"),
        ({"weight": torch.tensor([1.0, 1.0, 0.01]), "bias": torch.full((3,), -20.0)}, RuntimeError, "in channel 2"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_refused_in_place(options: dict[str, Any], kind: type[Exception], error: str, training: bool) -> None:
    x, mean, var = torch.randn(4, 3), torch.zeros(3), torch.ones(3)
    before = x.clone()
    with pytest.raises(kind, match=error):
        batch_norm(x, mean, var, training=training, inplace=True, **options)
    assert torch.equal(x, before)
    assert mean.eq(0).all()


def test_inputs_that_must_not_be_overwritten() -> None:
    leaf = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"leaf Variable that requires grad.*inplace=False"):
        batch_norm(leaf, None, None, training=True, inplace=True)
    with pytest.raises(RuntimeError, match=r"single memory location.*clone"):
        batch_norm(torch.randn(1, 3).expand(4, 3), None, None, training=True, inplace=True)
    with pytest.raises(ValueError, match="flat below -6"):
        batch_norm(leaf.detach().bfloat16(), None, None, training=True, inplace=True, activation="elu")


def test_autograd_notices_that_the_input_is_gone() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    hidden = x.exp()  # whose backward needs its result
    y = batch_norm(hidden, None, None, training=True, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_strided_input_in_place() -> None:
    """A layout that the loops copy: the caller's tensor may keep its values, the result must be right."""
    wide = torch.randn(4, 3, 10)
    x = wide[..., ::2]
    right = F.batch_norm(x.clone(), None, None, training=True)
    torch.testing.assert_close(batch_norm(x, None, None, training=True, inplace=True), right)


@pytest.mark.parametrize("name", [None, "leaky_relu", "elu"])
def test_fifty_layers_in_place(name: str | None) -> None:
    """What the README of the kernels says of the growth of errors."""
    torch.manual_seed(0)
    channels, x = 8, torch.randn(16, 8, 6, 6)
    weights = [torch.randn(channels, channels, 1, 1) / channels**0.5 for _ in range(50)]

    def gradient(dtype: torch.dtype, inplace: bool) -> Tensor:
        leaf = x.to(dtype).requires_grad_()
        h = leaf
        for weight in weights:
            h = F.conv2d(h, weight.to(dtype))
            h = batch_norm(h, None, None, training=True, activation=name, inplace=inplace)
        return torch.autograd.grad(h.square().mean() + h[:, 0].sum(), leaf)[0].double()

    with kernels.using("aten"):  # compiles nothing
        right = gradient(torch.float64, False)
    kept, undone = ((gradient(torch.float32, i) - right).norm() / right.norm() for i in (False, True))
    assert undone < max(5 * kept, 1e-4)
