"""Conditional batch normalization: torch.nn's in float64, then each sample scaled and shifted by hand."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm
from batchnorm import ConditionalBatchNorm, kernels
from expected import TORCH, values

F64 = torch.float64
SHAPES = [(6, 3), (6, 3, 5), (6, 3, 4, 2), (6, 3, 2, 2, 3)]
LABELS = torch.tensor([1, 0, 3, 1, 1, 3])
KINDS: dict[str, dict[str, Any]] = {
    "classes": {"classes": 4},
    "vector": {"condition_features": 5},
    "given": {},
}


@pytest.fixture(autouse=True)
def torchs_operators() -> Iterator[None]:
    """The layer scales what a layer of ours normalized; that the loops do so, one test shows."""
    with kernels.using("aten"):
        yield


def made(kind: str, **options: Any) -> ConditionalBatchNorm:
    layer = ConditionalBatchNorm(3, dtype=F64, **KINDS[kind], **options)
    generator = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        parameter.data = torch.rand(parameter.shape, generator=generator, dtype=F64) + 0.5
    return layer


def condition(kind: str) -> dict[str, Tensor]:
    if kind == "classes":
        return {"condition": LABELS}
    if kind == "vector":
        return {"condition": values((6, 5), 4).clone()}
    return {"weight": values((6, 3), 5).clone(), "bias": values((6, 3), 6).clone()}


def affine(layer: Any, kind: str, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The weight and the bias of each sample, as the papers have them."""
    if kind == "classes":
        return layer.class_weight.weight[given["condition"]], layer.class_bias.weight[given["condition"]]
    if kind == "vector":
        c = given["condition"]
        return layer.weight + c @ layer.delta_weight.weight.T, layer.bias + c @ layer.delta_bias.weight.T
    return given["weight"], given["bias"]


def shaped(t: Tensor, like: Tensor) -> Tensor:
    return t.reshape(*t.shape, *(1,) * (like.dim() - 2))


def snapshot(layer: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in layer.state_dict().items()}


# --- values ---


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_has_its_own_scale_and_shift(kind: str, shape: tuple[int, ...]) -> None:
    layer, given = made(kind, momentum=0.3, eps=1e-3), condition(kind)
    right = TORCH[len(shape)](3, momentum=0.3, eps=1e-3, affine=False, dtype=F64)
    leaves = [*layer.parameters(), *(t.requires_grad_() for t in given.values() if t.is_floating_point())]
    for training in (True, True, False):
        layer.train(training)
        right.train(training)
        x, grad = values(shape, 0).clone().requires_grad_(), values(shape, 1)
        y = layer(x, **given)
        weight, bias = affine(layer, kind, given)
        expected = right(x) * shaped(weight, x) + shaped(bias, x)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        for found, oracle in zip(*(torch.autograd.grad(out, [x, *leaves], grad) for out in (y, expected)), strict=True):
            torch.testing.assert_close(found, oracle, rtol=1e-9, atol=1e-9)
    for name, buffer in right.named_buffers():
        torch.testing.assert_close(layer.norm.get_buffer(name), buffer, rtol=1e-12, atol=1e-12)
    assert layer.norm.num_batches_tracked == 2


@pytest.mark.parametrize("kind", ["classes", "vector"])
def test_it_starts_as_plain_batch_normalization(kind: str) -> None:
    layer, right = ConditionalBatchNorm(3, dtype=F64, **KINDS[kind]), nn.BatchNorm2d(3, dtype=F64)
    x = values(SHAPES[2], 0)
    torch.testing.assert_close(layer(x, **condition(kind)), right(x))
    torch.testing.assert_close(layer.eval()(x, **condition(kind)), right.eval()(x))
    trained = made(kind)
    trained(x, **condition(kind))
    trained.reset_parameters()
    fresh = ConditionalBatchNorm(3, dtype=F64, **KINDS[kind]).state_dict()
    assert all(torch.equal(value, fresh[key]) for key, value in trained.state_dict().items())


@pytest.mark.parametrize("weight", [None, (3,), (6, 3)], ids=str)
@pytest.mark.parametrize("bias", [None, (3,), (6, 3)], ids=str)
def test_weight_and_bias_of_the_call(weight: Any, bias: Any) -> None:
    if weight is None and bias is None:
        with pytest.raises(ValueError, match="nothing says what weight and bias are"):
            made("given")(values(SHAPES[1], 0))
        return
    x = values(SHAPES[1], 0)
    w, b = (None if size is None else torch.rand(size, dtype=F64) - 0.5 for size in (weight, bias))
    expected = nn.BatchNorm1d(3, affine=False, dtype=F64)(x)
    expected = expected if w is None else expected * (w[:, None] if w.dim() == 1 else w[:, :, None])
    expected = expected if b is None else expected + (b[:, None] if b.dim() == 1 else b[:, :, None])
    for kind in KINDS:  # instead of the layer's own, too
        torch.testing.assert_close(made(kind)(x, weight=w, bias=b), expected, rtol=1e-10, atol=1e-10)


def test_residual_and_activation_come_last() -> None:
    x, skip = values(SHAPES[2], 0), values(SHAPES[2], 1)
    plain = made("classes")(x, LABELS)
    torch.testing.assert_close(made("classes", activation="gelu")(x, LABELS, skip), F.gelu(plain + skip))
    torch.testing.assert_close(made("classes", activation=nn.ReLU())(x, LABELS), F.relu(plain))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_derivatives_and_theirs(training: bool, kind: str) -> None:
    layer, given = made(kind, activation="silu").train(training), condition(kind)
    names = [name for name, t in given.items() if t.is_floating_point()]
    parameters = list(dict(layer.named_parameters()))

    def call(x: Tensor, *leaves: Tensor) -> Tensor:
        state = dict(zip(parameters, leaves, strict=False))
        arguments = {**given, **dict(zip(names, leaves[len(parameters) :], strict=True))}
        return torch.func.functional_call(layer, state, (x,), arguments)

    leaves = [p.detach().clone() for p in layer.parameters()] + [given[name].clone() for name in names]
    leaves = [t.requires_grad_() for t in (values((6, 3, 2), 0).clone(), *leaves)]
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_the_loops_normalize() -> None:
    layer, x = ConditionalBatchNorm(3, classes=4), values(SHAPES[2], 0).float()
    with kernels.using("numba"):
        y = layer(x, LABELS)
    assert kernels.ran().forward == "numba"
    torch.testing.assert_close(y, nn.BatchNorm2d(3)(x), rtol=1e-5, atol=1e-5)


# --- dtypes ---


def test_autocast_and_half_precision_keep_the_inputs_dtype() -> None:
    layer, x, c = ConditionalBatchNorm(3, condition_features=5), torch.randn(6, 3, 4), torch.randn(6, 5)
    nn.init.normal_(layer.delta_weight.weight)
    right = copy.deepcopy(layer)(x, c)
    with torch.autocast("cpu", torch.bfloat16):
        for given in (x, x.bfloat16()):
            y = layer(given, c)
            assert y.dtype == given.dtype
            torch.testing.assert_close(y.float(), right, rtol=0.03, atol=0.03)
    layer.bfloat16()
    assert layer.norm.running_mean.dtype == torch.float32
    assert layer.weight.dtype == torch.bfloat16
    y = layer(x.bfloat16(), c.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), right, rtol=0.03, atol=0.1)


# --- state, compilers, export ---


@pytest.mark.parametrize("kind", KINDS)
def test_state_and_copies(kind: str) -> None:
    layer, x = made(kind), values(SHAPES[1], 0)
    layer(x, **condition(kind))
    state = layer.state_dict()
    own = {
        "classes": ["class_weight.weight", "class_bias.weight"],
        "vector": ["weight", "bias", "delta_weight.weight", "delta_bias.weight"],
        "given": [],
    }
    assert set(state) == {*own[kind], "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    fresh = ConditionalBatchNorm(3, dtype=F64, **KINDS[kind])
    fresh.load_state_dict(state)
    for other in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
        y = other.eval()(x, **condition(kind))
        torch.testing.assert_close(y, copy.deepcopy(layer).eval()(x, **condition(kind)))
    with pytest.raises(RuntimeError, match=r"size mismatch for norm\.running_mean"):
        ConditionalBatchNorm(4, **KINDS[kind]).load_state_dict(state)


@pytest.mark.parametrize("kind", ["classes", "vector"])
def test_compiled_in_one_graph(kind: str) -> None:
    layer = made(kind, activation="relu")
    owner = copy.deepcopy(layer)
    compiled = torch.compile(owner, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        layer.train(training)
        owner.train(training)
        results = []
        for call, module in ((compiled, owner), (layer, layer)):
            x = values(SHAPES[1], 0).clone().requires_grad_()
            module.zero_grad()
            y = call(x, **condition(kind))
            y.square().sum().backward()
            results.append([y.detach(), x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
        for found, right in zip(*results, strict=True):
            torch.testing.assert_close(found, right)


@pytest.mark.parametrize("kind", ["classes", "vector"])
def test_exported(kind: str) -> None:
    layer, x = made(kind).eval(), values(SHAPES[2], 0)
    program = torch.export.export(layer, (x, condition(kind)["condition"]))
    assert not any("batchnorm." in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x, condition(kind)["condition"]), layer(x, **condition(kind)))


def test_mapped_over_conditions() -> None:
    """As a style transfer network asks for every style of one image."""
    layer, x = made("classes").eval(), values((2, 3, 4), 0)
    labels = torch.tensor([[0, 0], [1, 3], [2, 1]])
    with kernels.using("reference"):
        found = torch.vmap(lambda c: layer(x, c))(labels)
    torch.testing.assert_close(found, torch.stack([layer(x, c) for c in labels]))


def test_torch_fx_records_a_call_of_the_whole_layer() -> None:
    class Generator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = made("classes")

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            y: Tensor = self.bn(x * 2, c)
            return y

    model, x = Generator().eval(), values(SHAPES[1], 0)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["bn"]
    torch.testing.assert_close(traced(x, LABELS), model(x, LABELS))


def test_conversions_of_whole_models_leave_it() -> None:
    model = nn.Sequential(made("classes"), nn.ReLU())
    before = repr(model)
    assert list(batchnorm.convert(model).skipped) == ["0.norm"]
    assert list(batchnorm.split_domains(model, ("a", "b")).skipped) == ["0.norm"]
    assert repr(model) == before


def test_it_says_what_it_is() -> None:
    assert "3, classes=4, activation=relu" in repr(made("classes", activation="relu"))
    assert "3, condition_features=5" in repr(made("vector"))


# --- errors ---


@pytest.mark.parametrize(
    ("kind", "call", "error", "message"),
    [
        ("classes", {"condition": LABELS + 1}, IndexError, "classes 1 to 4 were asked for, and the layer has 0 to 3"),
        ("classes", {"condition": LABELS - 1}, IndexError, "classes -1 to 2"),
        ("classes", {"condition": LABELS.double()}, RuntimeError, r"int64.*got size \(6,\) and torch.float64"),
        ("classes", {"condition": LABELS[:5]}, RuntimeError, r"got size \(5,\).*input of size \(6, 3, 5\)"),
        ("classes", {"condition": LABELS[:, None]}, RuntimeError, r"got size \(6, 1\)"),
        ("vector", {"condition": values((6, 4), 0)}, RuntimeError, r"size \(N, 5\), floating, got size \(6, 4\)"),
        ("vector", {"condition": values((1, 5), 0)}, RuntimeError, r"got size \(1, 5\)"),
        ("vector", {"condition": torch.ones(6, 5).long()}, RuntimeError, "floating, got size .* torch.int64"),
        ("given", {"condition": LABELS}, ValueError, "no classes= and no condition_features="),
        ("given", {}, ValueError, "nothing says what weight and bias are"),
        ("classes", {}, ValueError, r"nothing says .* give a condition of size \(N,\), int64"),
        ("vector", {"condition": values((6, 5), 0), "bias": torch.ones(3)}, ValueError,
         "two things say"),
        ("given", {"weight": torch.ones(6)}, RuntimeError, r"weight should have size \(6, 3\) or \(3,\) .*got \(6,\)"),
        ("given", {"bias": torch.ones(1, 3)}, RuntimeError, r"bias should have size .*got \(1, 3\)"),
        ("classes", {"condition": LABELS, "residual": torch.ones(6, 3, 1, dtype=F64)}, RuntimeError, "not broadcast"),
    ],
)  # fmt: skip
def test_errors_leave_everything_as_it_was(kind: str, call: Any, error: Any, message: str) -> None:
    layer = made(kind)
    before = snapshot(layer)
    with pytest.raises(error, match=message):
        layer(values(SHAPES[1], 0), **call)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_input_of_a_wrong_size() -> None:
    with pytest.raises(RuntimeError, match=r"expected 3 channels, got input size \(6, 1, 5\)"):
        made("classes", track_running_stats=False)(torch.ones(6, 1, 5, dtype=F64), LABELS)
    with pytest.raises(ValueError, match=r"expected 2D to 5D input \(got 1D input of size \(6,\)\)"):
        made("classes")(torch.ones(6, dtype=F64), LABELS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 3, "condition_features": 2}, "a class or a vector"),
        ({"classes": 0}, "classes must be at least 1, got 0"),
        ({"condition_features": -1}, "condition_features must be at least 1, got -1"),
        ({"activation": "softmax"}, "unknown activation"),
        ({"momentum": 2.0}, "momentum must be between 0 and 1"),
    ],
)
def test_what_cannot_be_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConditionalBatchNorm(3, **options)


@pytest.mark.parametrize("train", [True, False])
def test_masked_positions_count_nowhere_and_come_out_as_0(train: bool) -> None:
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(4)) < 0.6
    layer = made("classes", activation=F.silu).train(train)
    padded = values((6, 3, 5), 0).masked_fill(~mask.unsqueeze(1), float("nan")).requires_grad_()
    plain = copy.deepcopy(layer.norm)
    with kernels.using("reference"):
        y = layer(padded, LABELS, mask=mask)
        y.sum().backward()
        normalized = plain(padded.detach(), mask=mask)
    weight, bias = layer.class_weight(LABELS), layer.class_bias(LABELS)
    expected = F.silu(normalized * weight.unsqueeze(-1) + bias.unsqueeze(-1)) * mask.unsqueeze(1)
    torch.testing.assert_close(y, expected)
    assert padded.grad is not None
    assert padded.grad.isfinite().all()
    assert not padded.grad.masked_select(~mask.unsqueeze(1)).any()
    assert torch.equal(layer.norm.running_mean, plain.running_mean)  # type: ignore[arg-type]
