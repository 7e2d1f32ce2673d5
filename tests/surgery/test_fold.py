"""A folded model computes in evaluation what the model computed, and says truly what it could not fold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from folded import fresh, image, is_left, same
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import DenseNet, Inception, ResNet, randomized
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import batchnorm
from batchnorm import recurrent
from batchnorm.surgery.inspect.affine import along_inputs, along_outputs, constant_through, scale_and_shift


class FrozenBatchNorm2d(nn.Module):
    """torchvision's, as it is there."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        scale = w * (self.running_var.reshape(1, -1, 1, 1) + self.eps).rsqrt()
        return x * scale + (b - self.running_mean.reshape(1, -1, 1, 1) * scale)


def norm(dimensions: int, channels: int, source: Any = nn, **options: Any) -> Any:
    return randomized(nn.Sequential(getattr(source, f"BatchNorm{max(dimensions, 1)}d")(channels, **options)))[0]


# --- before ---

KINDS = {
    "linear": (0, lambda g, bias: nn.Linear(4, 6, bias)),
    **{
        f"conv{d}d{'-transposed' if t else ''}": (
            d,
            lambda g, bias, d=d, t=t: getattr(nn, f"Conv{'Transpose' if t else ''}{d}d")(
                4, 6, 3, stride=2, padding=1, groups=g, bias=bias
            ),
        )
        for d in (1, 2, 3)
        for t in (False, True)
    },
}


@pytest.mark.parametrize(("dimensions", "make"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("bias", "affine"), [(True, True), (False, True), (True, False), (False, False)])
def test_into_what_is_before(dimensions: int, make: Any, groups: int, bias: bool, affine: bool) -> None:
    torch.manual_seed(0)
    layer = norm(dimensions, 6, affine=affine, eps=1e-3)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    model = nn.Sequential(make(groups, bias), layer, nn.ReLU()).double()
    before, state = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    result = batchnorm.fold(model, image(4, dimensions).double() if dimensions == 0 else None)  # (N, C), not (N, L, C)
    assert result.folded == {"1": "into 0"}
    assert result.skipped == {}
    assert is_left(result.model) == []
    assert not any(module.training for module in result.model.modules())
    x = image(4, dimensions).double().requires_grad_()
    right, found = before.eval()(x), result.model(x)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    weights = torch.linspace(-1, 1, right.numel(), dtype=torch.float64).view_as(right)
    gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (found, right)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    assert model.training  # and all else is as it was
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]


@given(
    groups=st.integers(1, 3),
    outputs=st.integers(1, 3),
    inputs=st.integers(1, 3),
    kernel=st.integers(1, 3),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_weights_take_lines_over(
    groups: int, outputs: int, inputs: int, kernel: int, transposed: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    inputs, outputs = groups * inputs, groups * outputs
    weight = random(inputs, outputs // groups, kernel) if transposed else random(outputs, inputs // groups, kernel)
    convolve: Callable[..., Tensor] = F.conv_transpose1d if transposed else F.conv1d
    x, out, into, shift = random(2, inputs, 5), random(outputs), random(inputs), random(inputs)
    found = convolve(x, along_outputs(weight, out, groups, transposed), groups=groups)
    torch.testing.assert_close(found, convolve(x, weight, groups=groups) * out[:, None])
    found = convolve(x, along_inputs(weight, into, groups, transposed), groups=groups)
    torch.testing.assert_close(found, convolve(x * into[:, None], weight, groups=groups))
    if not transposed:
        found = convolve(x, weight, constant_through(weight, shift, groups), groups=groups)
        torch.testing.assert_close(found, convolve(x + shift[:, None], weight, groups=groups))


def test_the_line_is_batch_norm_in_evaluation() -> None:
    torch.manual_seed(0)
    mean, weight, bias, x = torch.randn(4, 5, dtype=torch.float64)
    var = torch.rand(5, dtype=torch.float64)
    scale, shift = scale_and_shift(mean, var, weight, bias, 1e-3, 5)
    torch.testing.assert_close(scale * x + shift, F.batch_norm(x[None], mean, var, weight, bias, False, 0, 1e-3)[0])
    scale, shift = scale_and_shift(mean.half(), None, None, None, 1e-3, 5)
    assert scale.tolist() == [1] * 5
    assert torch.equal(shift, -mean.half().double())


# --- behind ---


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padding_mode", ["none", "reflect", "replicate", "circular"])
def test_into_what_is_behind(groups: int, bias: bool, padding_mode: str) -> None:
    padding = {"padding": 1, "padding_mode": padding_mode} if padding_mode != "none" else {}
    model = fresh(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=groups, bias=bias, **padding)).double()
    result = batchnorm.fold(model, image(4).double())
    assert result.folded == {"1": "into 2, which follows"}
    x = image(4).double()
    torch.testing.assert_close(result.model(x), model.eval()(x), rtol=1e-12, atol=1e-12)
    assert result.max_error < 1e-12


def test_into_a_linear_layer_behind() -> None:
    model = fresh(nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 3, bias=False))
    result = batchnorm.fold(model, image(4, 0))
    assert result.folded == {"1": "into 2, which follows"}
    assert result.model[2].bias is not None
    same(result, model, image(4, 0))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_padded_zeros_and_transposed_borders_only_without_a_shift(kind: Any) -> None:
    model = fresh(nn.ReLU(), nn.BatchNorm2d(4), kind(4, 6, 3, padding=1, bias=False))
    result = batchnorm.fold(model)
    assert result.folded == {}
    reason = "pads with zeros" if kind is nn.Conv2d else "transposed"
    assert reason in result.skipped["1"]
    with torch.no_grad():
        model[1].running_mean.zero_()
        model[1].bias.zero_()
    result = batchnorm.fold(model, image(4))
    assert result.folded == {"1": "into 2, which follows"}
    assert result.model[2].bias is None
    same(result, model, image(4))


def test_same_padding_is_padding() -> None:
    for kernel, folds in ((3, False), (1, True)):
        model = fresh(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, kernel, padding="same"))
        assert bool(batchnorm.fold(model, image(4)).folded) is folds


def test_what_is_before_comes_first_and_one_convolution_can_take_two() -> None:
    model = fresh(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.ReLU())
    assert batchnorm.fold(model).folded == {"1": "into 0"}
    model = fresh(nn.ReLU(), nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    result = batchnorm.fold(model, image(2))
    assert result.folded == {"1": "into 2, which follows", "3": "into 2"}
    same(result, model, image(2))
    model = fresh(nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3), nn.Dropout2d(), nn.BatchNorm2d(3))
    result = batchnorm.fold(model, image(2))
    assert result.folded == {"1": "into 0", "3": "into 0"}
    same(result, model, image(2))


# --- layers of all makes ---


def test_layers_with_more_to_do_leave_it_behind() -> None:
    model = fresh(nn.Conv2d(2, 3, 1), batchnorm.BatchNorm2d(3, activation=("leaky_relu", 0.2)))
    result = batchnorm.fold(model, image(2))
    assert result.folded == {"1": "into 0; LeakyReLU(negative_slope=0.2) remains"}
    assert type(result.model[1]) is nn.LeakyReLU  # which loads without this package
    same(result, model, image(2))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 1), batchnorm.BatchNorm2d(2, activation="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x), x)


class Masked(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x), mask=x[:, 0] > 0)


@pytest.mark.parametrize("inputs", [None, image(2)], ids=["traced", "observed"])
def test_residuals_remain_and_masks_stop(inputs: Any) -> None:
    model = randomized(Residual())
    result = batchnorm.fold(model, inputs)
    assert result.folded == {"norm": "into conv; Identity(activation=relu(0)) remains"}
    same(result, model, image(2))
    torch.export.export(result.model, (image(2),)).module()(image(2))
    assert "mask" in batchnorm.fold(randomized(Masked()), inputs).skipped["norm"]


def test_frozen_fused_synchronized_and_torchvisions() -> None:
    def frozen(model: nn.Module) -> nn.Module:
        batchnorm.freeze(model)
        return model

    def vision(model: Any) -> nn.Module:
        layer = FrozenBatchNorm2d(3)
        layer.load_state_dict({k: v for k, v in model[1].state_dict().items() if k != "num_batches_tracked"})
        model[1] = layer
        return model

    makes: list[Callable[[Any], nn.Module]] = [
        frozen,
        vision,
        nn.SyncBatchNorm.convert_sync_batchnorm,
        lambda model: batchnorm.fuse(model, image(2)).model,
        lambda model: frozen(batchnorm.fuse(model, image(2)).model),
    ]
    for make in makes:
        plain = fresh(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1))
        right = batchnorm.fold(plain).model(image(2))
        result = batchnorm.fold(make(copy.deepcopy(plain)), image(2))
        assert list(result.folded) == ["1"], make
        torch.testing.assert_close(result.model(image(2)), right, rtol=1e-5, atol=1e-5)
        assert result.max_error_float64 < 1e-12
        assert is_left(result.model) == []


def test_a_rewritten_forward_is_undone_first() -> None:
    model = randomized(ResNet())
    fused = batchnorm.fuse(model, image(2)).model
    result = batchnorm.fold(fused, image(2))
    assert len(result.folded) == 9
    same(result, model, image(2))


class Subclass(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Own(nn.Conv2d):
    """As in EfficientNet: nothing differs but the constructor."""


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def replaced_forward() -> Any:
    layer = nn.BatchNorm2d(3)
    layer.forward = lambda x: x
    return layer


def hooked(module: nn.Module) -> Any:
    module.register_forward_hook(lambda *_: None)
    return module


def negative() -> Any:
    layer = nn.BatchNorm2d(3)
    layer.running_var[1] = -1
    return layer


CONV = nn.Conv2d(2, 3, 1)
REFUSED: dict[str, tuple[Callable[[], list[nn.Module]], str]] = {
    "no statistics": (lambda: [CONV, nn.BatchNorm2d(3, track_running_stats=False)], "depends on the batch"),
    "subclass": (lambda: [CONV, Subclass(3)], "Subclass is a subclass"),
    "forward": (lambda: [CONV, replaced_forward()], "its forward has been replaced"),
    "hook": (lambda: [CONV, hooked(nn.BatchNorm2d(3))], "hooks"),
    "hook before": (lambda: [hooked(nn.Conv2d(2, 3, 1)), nn.BatchNorm2d(3)], "hooks"),
    "hook between": (lambda: [CONV, hooked(nn.Identity()), nn.BatchNorm2d(3)], "it follows Identity"),
    "hook around": (lambda: [hooked(nn.Sequential(nn.Conv2d(2, 3, 1))), nn.BatchNorm2d(3)], "Sequential"),
    "weight norm": (lambda: [parametrizations.weight_norm(nn.Conv2d(2, 3, 1)), nn.BatchNorm2d(3)], "Parametrized"),
    "spectral norm": (lambda: [parametrizations.spectral_norm(nn.Conv2d(2, 3, 1)), nn.BatchNorm2d(3)], "Parametrized"),
    "standardized": (lambda: [Standardized(2, 3, 1), norm(2, 3)], "does more with its weight"),
    "pool": (lambda: [CONV, nn.AvgPool2d(1), nn.BatchNorm2d(3)], "it follows AvgPool2d"),
    "variance": (lambda: [CONV, negative()], "not finite"),
    "last dimension": (lambda: [nn.Linear(6, 2), nn.BatchNorm2d(2)], "dimension 1"),
    "domains": (lambda: [CONV, batchnorm.DomainBatchNorm(3, ("a", "b"))], "domain"),
    "recurrent": (lambda: [CONV, recurrent.LSTM(4, 3)], "within its steps"),
    "condition": (lambda: [CONV, batchnorm.ConditionalBatchNorm(3, classes=4)], "conditioned"),
    "meta": (lambda: [nn.Conv2d(2, 3, 1, device="meta"), nn.BatchNorm2d(3, device="meta")], "meta device"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused(make: Callable[[], list[nn.Module]], reason: str) -> None:
    model = nn.Sequential(*copy.deepcopy(make()), nn.ReLU())
    result = batchnorm.fold(model)
    assert result.folded == {}
    assert reason in " ".join(result.skipped.values())
    assert set(result.skipped) >= {
        n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    }
    assert repr(result.model) == repr(model)


def test_subclasses_that_change_nothing_are_what_they_extend() -> None:
    model = fresh(Own(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    result = batchnorm.fold(model, image(2))
    assert result.folded == {"1": "into 0"}
    assert type(result.model[0]) is Own


def test_the_whole_model_and_no_layer() -> None:
    assert "whole model" in batchnorm.fold(nn.BatchNorm2d(3)).skipped[""]
    result = batchnorm.fold(nn.Linear(2, 2), torch.randn(3, 2))
    assert (result.folded, result.skipped, result.max_error) == ({}, {}, 0)


# --- forms of weights, inputs, outputs ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_rounded_once(dtype: torch.dtype) -> None:
    wide = fresh(nn.ReLU(), nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    model = copy.deepcopy(wide).to(dtype)
    found = batchnorm.fold(model, image(2).to(dtype))
    right = batchnorm.fold(copy.deepcopy(model).double())
    assert len(found.folded) == 2
    assert torch.equal(found.model[2].weight, right.model[2].weight.to(dtype))
    assert torch.equal(found.model[2].bias, right.model[2].bias.to(dtype))
    assert found.max_error_float64 < 1e-12 < found.max_error < 0.1


def test_strides_and_what_learns_stay() -> None:
    model: Any = fresh(nn.Conv2d(4, 3, 3, bias=False), nn.BatchNorm2d(3)).to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    folded = batchnorm.fold(model, image(4)).model[0]
    assert folded.weight.is_contiguous(memory_format=torch.channels_last)
    assert folded.weight.stride() == model[0].weight.stride()
    assert not folded.weight.requires_grad
    assert not folded.bias.requires_grad


class Words(nn.Module):
    """Takes numbers of words, gives a dict; writes a dtype into its forward if asked to."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.words, self.linear, self.norm, self.dtype = nn.Embedding(9, 4), nn.Linear(4, 3), nn.BatchNorm1d(3), dtype

    def forward(self, ids: Tensor, scale: Tensor | None = None) -> dict[str, Any]:
        x = self.words(ids).mean(1)
        x = x if self.dtype is None else x.to(self.dtype)
        y = self.norm(self.linear(x))
        return {"y": y if scale is None else y * scale, "more": (ids, None)}


def test_inputs_and_outputs_of_any_form() -> None:
    ids = torch.randint(9, (5, 3), generator=torch.Generator().manual_seed(0))
    for inputs in ({"ids": ids, "scale": torch.ones(1)}, (ids,), ids):
        result = batchnorm.fold(randomized(Words()), inputs)
        assert result.folded == {"norm": "into linear"}
        assert result.max_error_float64 < 1e-12
    result = batchnorm.fold(randomized(Words(torch.float32)), ids)
    assert result.max_error < 1e-5
    assert result.max_error_float64 is None
    assert "does not run in float64" in str(result)


# --- whole models ---


PARTS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2),
    "reflecting": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", bias=False),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 3, padding=1, groups=4, bias=False),
    "norm": lambda: nn.BatchNorm2d(4),
    "ours": lambda: batchnorm.BatchNorm2d(4, activation="silu"),
    "frozen": lambda: FrozenBatchNorm2d(4),
    "relu": nn.ReLU,
    "dropout": nn.Dropout,
    "identity": nn.Identity,
}


@settings(max_examples=30, deadline=None)
@given(parts=st.lists(st.sampled_from(sorted(PARTS)), min_size=1, max_size=7), observed=st.booleans())
def test_any_chain(parts: list[str], observed: bool) -> None:
    torch.manual_seed(0)
    model = randomized(nn.Sequential(*(PARTS[part]() for part in parts))).double()
    x = image(4).double()
    result = batchnorm.fold(model, x if observed else None)
    layers = [str(i) for i, part in enumerate(parts) if part in ("norm", "ours", "frozen")]
    assert sorted([*result.folded, *result.skipped]) == layers
    assert sorted(is_left(result.model)) == sorted(result.skipped)
    torch.testing.assert_close(result.model(x), model.eval()(x), rtol=1e-11, atol=1e-11)
    for name in result.skipped:  # no neighbour that could have taken it
        before = [part for part in parts[: int(name)] if part not in ("dropout", "identity")]
        assert not before or before[-1] not in ("conv", "reflecting", "transposed")


def test_architectures() -> None:
    torch.manual_seed(0)
    for make, folded, left in ((ResNet, 9, 0), (Inception, 9, 0), (DenseNet, 0, 3)):
        model = randomized(make())
        state = copy.deepcopy(model.state_dict())
        for inputs in (None, image(2)):
            result = batchnorm.fold(model, inputs)
            assert (len(result.folded), len(result.skipped)) == (folded, left)
            assert len(is_left(result.model)) == left
            same(result, model, image(2))
        assert result.max_error < 1e-5
        assert result.max_error_float64 < 1e-12
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        again = batchnorm.fold(result.model, image(2))
        assert again.folded == {}
        assert all(torch.equal(result.model.state_dict()[k], v) for k, v in again.model.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_graphs_are_folded_as_graphs() -> None:
    model = randomized(ResNet()).eval()
    for graph in (torch.export.export(model, (image(2),)), torch.fx.symbolic_trace(model)):
        result = batchnorm.fold(graph, image(2))
        assert len(result.folded) == 9
        assert isinstance(result.model, torch.fx.GraphModule)
        assert result.max_error_float64 < 1e-12
        same(result, model, image(2))


def test_reports() -> None:
    model = fresh(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))
    said = str(batchnorm.fold(model)).splitlines()
    assert said == [
        "1 folded, 1 skipped",
        "  1: into 0",
        "  3: skipped, it follows ReLU, not a plain convolution or linear layer; followed by the model's output",
        "not verified: give example_inputs",
    ]
    assert "verified: outputs within" in str(batchnorm.fold(model, image(2)))
    assert batchnorm.fold(model).as_dict() == {
        "folded": {"1": "into 0"},
        "skipped": {"3": "it follows ReLU, not a plain convolution or linear layer; followed by the model's output"},
        "max_error": None,
        "max_error_float64": None,
    }


def test_what_cannot_be_folded_at_all() -> None:
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.Module"):
        batchnorm.fold(lambda x: x)
    with pytest.raises(ValueError, match=r"1 \(LazyBatchNorm2d\) has seen no input"):
        batchnorm.fold(nn.Sequential(nn.Conv2d(2, 3, 1), nn.LazyBatchNorm2d()))
    with pytest.raises(ValueError, match="no floating-point tensor"):
        batchnorm.fold(fresh(nn.Linear(2, 2), nn.BatchNorm1d(2), _Sign()), torch.randn(3, 2))


class _Sign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x > 0


def test_a_compiled_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    with pytest.raises(TypeError, match=r"the model was compiled.*fold the original"):
        batchnorm.fold(torch.compile(model), torch.randn(2, 2))
    with pytest.raises(TypeError, match=r"0 was compiled"):
        batchnorm.fold(nn.Sequential(torch.compile(model)))
