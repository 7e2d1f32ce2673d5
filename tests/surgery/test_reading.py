"""Other packages' batch normalization is served by what it computes, and left with a reason where that is not known."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import norm_classes as classes
import pytest
import torch
import torch.nn.functional as F
from networks import randomized
from norm_classes import BatchNormAct2d, FrozenBatchNorm2d, FrozenBatchNormAct2d, SplitBatchNorm2d, SyncBatchNormAct
from torch import Tensor, nn

import batchnorm
from batchnorm import kernels
from batchnorm.surgery.inspect.elementwise import recognized
from batchnorm.surgery.inspect.find import is_batch_norm
from with_timm import timm

C = 6


@pytest.fixture(autouse=True)
def torchs_operators() -> Iterator[None]:
    """What a class is read as does not depend on the kernel; one test looks at the loops."""
    with kernels.using("aten"):
        yield


# What does what ours do, and the activation.
SERVED: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "timm": (lambda: BatchNormAct2d(C), "relu"),
    "timm silu": (lambda: BatchNormAct2d(C, act_layer="silu"), "silu"),
    "timm without": (lambda: BatchNormAct2d(C, apply_act=False, momentum=None), None),
    "timm not affine": (lambda: BatchNormAct2d(C, affine=False, act_layer=nn.Hardswish), "hardswish"),
    "timm untracked": (lambda: BatchNormAct2d(C, track_running_stats=False), "relu"),
    "renamed": (lambda: classes.Renamed(C), None),
    "function": (lambda: classes.NormRelu(C), "relu"),
    "our names": (lambda: classes.NormLeaky(C), "leaky_relu"),
    "silu by hand": (lambda: classes.NormSwish(C), "silu"),
    "hardswish by hand": (lambda: classes.ByHand(C), "hardswish"),
    "from scratch": (lambda: classes.FromScratch(C), None),
    "held in evaluation": (lambda: classes.HeldInEvaluation(C), None),
}
# What does not, and the reason.
LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "shifted": (lambda: classes.Shifted(C), "it computes add behind normalization"),
    "skip": (lambda: classes.WithSkip(C), "it computes with x behind normalization"),
    "absolute": (lambda: classes.Absolute(C), "computes something else than batch normalization"),
    "patient": (lambda: classes.Patient(C), "in training its forward cannot be traced"),
    "negligent": (lambda: classes.Negligent(C), "on trial its running_mean is not what ours gives"),
    "synchronized": (lambda: classes.Synchronized(C), "its forward may ask for other processes"),
    "remembering": (lambda: classes.Remembering(C), "its forward sets attributes"),
    "gated": (lambda: classes.Gated(C), "it has tensors of its own: gate"),
    "broken": (lambda: classes.Broken(C), "its forward cannot be traced: KeyError"),
    "conditional": (lambda: classes.Conditional(C), "it takes more than its input"),
    "mish": (lambda: BatchNormAct2d(C, act_layer=nn.Mish), "it applies Mish, which no layer of ours does"),
    "prelu": (lambda: BatchNormAct2d(C, act_layer=nn.PReLU), "it applies PReLU"),
    "dropout": (lambda: BatchNormAct2d(C, drop_layer=nn.Dropout), "it applies Dropout"),
    "split": (lambda: SplitBatchNorm2d(C), "in training its forward cannot be traced"),
    "synchronized timm": (lambda: SyncBatchNormAct(C), "its statistics are over all processes"),
    "frozen timm": (lambda: FrozenBatchNormAct2d(C), "is not torch.nn's batch normalization"),
    "frozen torchvision": (lambda: FrozenBatchNorm2d(C), "is not torch.nn's batch normalization"),
    "frozen detectron": (lambda: classes.DetectronFrozen(C), "is not torch.nn's batch normalization"),
}


def random_state(layer: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.copy_(torch.rand(tensor.shape) + 0.5 if "var" in name else torch.randn(tensor.shape))
    return layer


def image(layer: nn.Module) -> Tensor:
    space = {nn.BatchNorm1d: (), nn.BatchNorm3d: (2, 3, 2)}
    shape = next((s for kind, s in space.items() if isinstance(layer, kind)), (3, 4))
    return torch.randn(4, C, *shape, generator=torch.Generator().manual_seed(2))


def step(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers."""
    x = x.clone().requires_grad_()
    y = layer(x * 1)
    learning = dict(layer.named_parameters())
    loss = (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum()
    found = dict(zip(("x", *learning), torch.autograd.grad(loss, [x, *learning.values()]), strict=True))
    return {"y": y.detach(), **found, **{f"buffer {name}": b.clone() for name, b in layer.named_buffers()}}


@pytest.mark.parametrize(("make", "activation"), SERVED.values(), ids=SERVED.keys())
def test_a_class_that_computes_what_ours_do_becomes_ours_and_stays_what_it_is(
    make: Callable[[], nn.Module], activation: str | None
) -> None:
    layer: Any = random_state(make())
    kind, exact = type(layer), copy.deepcopy(layer).double()
    report = batchnorm.convert(nn.Sequential(layer))
    assert report.skipped == {}
    assert report.converted == {"0": kind.__name__ + (f", with {activation}" if activation else "")}
    assert isinstance(layer, kind)
    assert isinstance(layer, (batchnorm.BatchNorm1d, batchnorm.BatchNorm2d, batchnorm.BatchNorm3d))
    assert (layer.activation.name if layer.activation else None) == activation
    assert list(layer.state_dict()) == list(exact.state_dict())
    x = image(layer)
    for training in (True, True, False):
        found = step(layer.train(training), x)
        for name, right in step(exact.train(training), x.double()).items():
            torch.testing.assert_close(found[name].to(right), right, rtol=1e-4, atol=1e-4, msg=name)


def test_the_loops_apply_the_activation_that_the_class_applied() -> None:
    layer: Any = random_state(BatchNormAct2d(C))
    exact = copy.deepcopy(layer).double()
    batchnorm.convert(layer)
    with kernels.using("numba"):
        found = layer(image(layer))
    assert kernels.ran().forward == "numba"
    torch.testing.assert_close(found.double(), exact(image(layer).double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SERVED)
def test_the_way_back_is_lossless(name: str) -> None:
    layer = SERVED[name][0]().eval()
    kind, before, tensors = type(layer), dict(vars(layer)), list(layer.state_dict(keep_vars=True).values())
    layer.register_forward_hook(lambda *given: None)
    batchnorm.convert(layer, statistics=batchnorm.Ghost(2))
    assert batchnorm.revert(layer).converted == {"": kind.__name__}
    assert type(layer) is kind
    assert vars(layer) == before
    assert list(vars(layer)) == list(before) or set(vars(layer)) == set(before)
    assert all(a is b for a, b in zip(layer.state_dict(keep_vars=True).values(), tensors, strict=True))


@pytest.mark.parametrize(("make", "reason"), LEFT.values(), ids=LEFT.keys())
def test_what_computes_something_else_or_cannot_be_read_is_left_with_the_reason(
    make: Callable[[], nn.Module], reason: str
) -> None:
    layer = make()
    kind = type(layer)
    report = batchnorm.convert(nn.Sequential(nn.Identity(), layer))
    assert reason in report.skipped["1"]
    assert type(layer) is kind


@pytest.mark.parametrize("name", [*SERVED, *LEFT])
def test_every_layer_of_any_make_is_in_every_report(name: str) -> None:
    """Neither a class that nobody knows nor one with submodules is passed over in silence."""

    def model() -> nn.Module:
        made = (SERVED | LEFT)[name][0]()
        return nn.Sequential(nn.Conv2d(3, C, 1), made, nn.ReLU(), nn.BatchNorm2d(C), nn.ReLU())

    made = model()
    layers = {path for path, part in made.named_modules() if is_batch_norm(part)}
    assert {"1", "3"} <= layers
    converted, frozen, folded = batchnorm.convert(model()), batchnorm.freeze(model()), batchnorm.fold(model())
    replaced = [batchnorm.replace(model(), by) for by in ("group", batchnorm.Ghost(2), None)]
    assert converted.converted.keys() | converted.skipped.keys() == layers
    assert frozen.frozen.keys() | frozen.skipped.keys() == layers
    assert folded.folded.keys() | folded.skipped.keys() == layers
    assert all(each.replaced.keys() | each.skipped.keys() == layers for each in replaced)
    fused = batchnorm.fuse(made)
    assert fused.fused.keys() | fused.skipped.keys() == layers
    if not isinstance(made[1], (nn.BatchNorm1d, nn.BatchNorm3d)) and name not in ("broken", "split"):
        recalibrated = batchnorm.recalibrate(made, [torch.randn(4, 3, 2, 2)])
        assert recalibrated.layers.keys() | recalibrated.skipped.keys() == layers
    domains = batchnorm.split_domains(model(), ["a", "b"])
    assert domains.converted.keys() | domains.skipped.keys() == layers


def test_layers_of_one_class_are_read_each_by_itself() -> None:
    model = nn.Sequential(BatchNormAct2d(C), BatchNormAct2d(C, act_layer="silu"), BatchNormAct2d(C, act_layer=nn.Mish))
    report = batchnorm.convert(model)
    assert report.converted == {"0": "BatchNormAct2d, with relu", "1": "BatchNormAct2d, with silu"}
    assert list(report.skipped) == ["2"]


def test_reading_leaves_the_layer_its_hooks_and_the_random_numbers_alone() -> None:
    seen: list[Any] = []
    layer = random_state(BatchNormAct2d(C))
    layer.register_forward_hook(lambda *given: seen.append(given))
    layer.act.inplace = False  # not read before
    before, draws = {name: t.clone() for name, t in layer.state_dict().items()}, torch.get_rng_state()
    batchnorm.convert(layer)
    assert not seen
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    layer(image(layer))
    assert len(seen) == 1


def test_hooks_on_the_activation_are_not_lost() -> None:
    layer = BatchNormAct2d(C)
    layer.act.register_forward_hook(lambda *given: None)
    assert "a part of it has hooks" in batchnorm.convert(nn.Sequential(layer)).skipped["0"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_meta_layers_are_read(dtype: torch.dtype) -> None:
    layer: Any = random_state(BatchNormAct2d(C)).to(dtype)
    batchnorm.convert(layer)
    assert layer.running_mean.dtype == torch.float32
    assert layer(image(layer).to(dtype)).dtype == dtype
    batchnorm.revert(layer)
    assert layer.running_mean.dtype == dtype
    assert batchnorm.convert(BatchNormAct2d(C, device="meta")).skipped == {}
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert batchnorm.convert(BatchNormAct2d(C + 1, eps=1e-4)).skipped == {}


def test_copies_and_pickles_are_what_they_were() -> None:
    layer = random_state(BatchNormAct2d(C, act_layer="silu"))
    batchnorm.convert(layer)
    x = image(layer)
    batchnorm.freeze(frozen := copy.deepcopy(layer))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), pickle.loads(pickle.dumps(frozen))):
        torch.testing.assert_close(twin.eval()(x), layer.eval()(x))
        batchnorm.unfreeze(twin)
        assert type(twin) is type(layer)
        batchnorm.revert(twin)
        assert type(twin) is BatchNormAct2d
        torch.testing.assert_close(twin(x), layer(x))


def test_a_new_activation_is_taken_over_or_refused() -> None:
    layer: Any = BatchNormAct2d(C)
    batchnorm.convert(layer)
    x = image(layer)
    layer.act = nn.SiLU()
    torch.testing.assert_close(layer(x), F.silu(F.batch_norm(x, None, None, training=True)))
    layer.act = nn.Identity()
    torch.testing.assert_close(layer(x), F.batch_norm(x, None, None, training=True))
    with pytest.raises(TypeError, match=r"act of this BatchNormAct2d, .* call batchnorm\.revert before"):
        layer.act = nn.Mish()
    assert type(layer.act) is nn.Identity
    with pytest.raises(TypeError, match=r"call batchnorm\.revert before"):
        layer.drop = nn.Dropout()


def test_timms_tools_find_the_activation_of_a_converted_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, C, 1), random_state(BatchNormAct2d(C)))
    batchnorm.convert(model)
    x = torch.randn(2, 3, 4, 4)
    right = model.eval()(x)
    frozen = timm.layers.freeze_batch_norm_2d(copy.deepcopy(model))
    assert type(frozen[1]) is FrozenBatchNormAct2d
    torch.testing.assert_close(frozen.train()(x), right)


def test_synchronizing_a_converted_layer_is_for_its_own_package() -> None:
    x = torch.randn(2, C, 4, 4)
    model = nn.Sequential(random_state(BatchNormAct2d(C))).eval()
    right = model(x)
    batchnorm.convert(model)
    with pytest.raises(RuntimeError, match=r"without its activation relu: take timm\.layers\.norm_act's own function"):
        nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    for reverted in (False, True):
        if reverted:
            batchnorm.revert(model)
        synchronized = timm.layers.convert_sync_batchnorm(copy.deepcopy(model))
        assert type(synchronized[0]) is SyncBatchNormAct
        torch.testing.assert_close(synchronized(x), right)


def test_torchscript_gets_the_class_that_it_was() -> None:
    model = nn.Sequential(random_state(BatchNormAct2d(C)))
    batchnorm.convert(model)
    x = image(model[0])
    torch.testing.assert_close(torch.jit.script(model.eval())(x), model(x))


def test_fuse_counts_the_activation_that_a_class_applies() -> None:
    x = torch.randn(2, 3, 4, 4)
    model = nn.Sequential(
        nn.Conv2d(3, C, 1), BatchNormAct2d(C), nn.Conv2d(C, C, 1), BatchNormAct2d(C, apply_act=False), nn.ReLU()
    )
    result = batchnorm.fuse(randomized(model), x)
    assert result.fused == {"1": "relu", "3": "relu"}
    assert result.method == {"1": "its class's own", "3": "module replaced"}
    batchnorm.revert(result.model)
    assert [type(m) for m in result.model.modules()] == [type(m) for m in model.modules()]


FOLDED: dict[str, tuple[Callable[[], nn.Module], type[nn.Module]]] = {
    "timm": (lambda: BatchNormAct2d(C), nn.ReLU),
    "mish": (lambda: BatchNormAct2d(C, act_layer=nn.Mish), nn.Mish),
    "prelu": (lambda: BatchNormAct2d(C, act_layer=nn.PReLU), nn.PReLU),
    "dropout": (lambda: BatchNormAct2d(C, drop_layer=nn.Dropout), nn.ReLU),
    "synchronized timm": (lambda: SyncBatchNormAct(C), nn.Identity),
    "synchronized": (lambda: classes.Synchronized(C), nn.Identity),
    "patient": (lambda: classes.Patient(C), nn.Identity),
    "negligent": (lambda: classes.Negligent(C), nn.Identity),
    "hardswish by hand": (lambda: classes.ByHand(C), nn.Hardswish),
    "from scratch": (lambda: classes.FromScratch(C), nn.Identity),
    "frozen timm": (lambda: FrozenBatchNormAct2d(C, act_layer="silu"), nn.SiLU),
    "frozen torchvision": (lambda: FrozenBatchNorm2d(C), nn.Identity),
    "frozen detectron": (lambda: classes.DetectronFrozen(C), nn.Identity),
}


@pytest.mark.parametrize(("make", "left"), FOLDED.values(), ids=FOLDED.keys())
def test_what_evaluates_as_batch_normalization_is_folded_and_leaves_what_is_behind(
    make: Callable[[], nn.Module], left: type[nn.Module]
) -> None:
    model = nn.Sequential(nn.Conv2d(3, C, 3), random_state(make()), nn.Conv2d(C, 2, 1)).eval()
    x = torch.randn(2, 3, 5, 5)
    result = batchnorm.fold(model, x)
    assert result.skipped == {}
    assert type(result.model[1]) is left
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("by", ["group", "layer", "instance", "rms", batchnorm.Ghost(2), None], ids=str)
def test_replacing_keeps_the_activation_that_the_class_applied(by: Any) -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, C, 1), BatchNormAct2d(C, act_layer="silu"))
    plain: Any = nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C))
    plain.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, 4, 4)
    assert batchnorm.replace(model, by, x).skipped == batchnorm.replace(plain, by, x).skipped == {}
    with kernels.using("reference") if by == batchnorm.Ghost(2) else nullcontext():
        torch.testing.assert_close(model(x), F.silu(plain(x)))
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_domains_keep_the_activation_that_the_class_applied() -> None:
    model = nn.Sequential(BatchNormAct2d(C))
    assert batchnorm.split_domains(model, ["a", "b"]).skipped == {}
    x = image(model[0])
    with batchnorm.domain("b"):
        torch.testing.assert_close(model(x), F.relu(F.batch_norm(x, None, None, training=True)))


def test_frozen_layers_of_other_packages_evaluate_and_become_what_they_were() -> None:
    layer = random_state(BatchNormAct2d(C))
    x, right = image(layer), copy.deepcopy(layer).eval()
    batchnorm.freeze(layer)
    torch.testing.assert_close(layer.train()(x), right(x))
    assert batchnorm.unfreeze(layer) == ("",)
    assert type(layer) is BatchNormAct2d


def test_recalibration_serves_what_moves_its_statistics_and_leaves_what_never_does() -> None:
    held = {
        "1": FrozenBatchNormAct2d(C),
        "2": FrozenBatchNorm2d(C),
        "3": classes.DetectronFrozen(C),
        "4": classes.Held(C),
    }
    served = {"5": BatchNormAct2d(C), "6": SyncBatchNormAct(C), "7": SplitBatchNorm2d(C), "8": classes.Patient(C)}
    served["6"].act = nn.ReLU()  # as timm's conversion does
    model = nn.Sequential(nn.Conv2d(3, C, 1), *map(random_state, (held | served).values()))
    report = batchnorm.recalibrate(model, [torch.randn(8, 3, 4, 4), torch.randn(8, 3, 4, 4)])
    assert report.skipped.keys() == held.keys()
    assert all("never moves its statistics" in reason for reason in report.skipped.values())
    assert report.layers.keys() == served.keys() | {"7.aux_bn.0"}  # which the split layer calls


class Straight(torch.autograd.Function):
    """The sign's values with another derivative."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return F.relu(z)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Any]] = {
    "relu": (torch.relu_, ("relu", 0.0)),
    "clamp": (lambda z: z.clamp(min=0), ("relu", 0.0)),
    "maximum": (lambda z: torch.maximum(z, 0.3 * z), ("leaky_relu", 0.3)),
    "silu": (lambda z: z * z.sigmoid(), ("silu", 0.0)),
    "hardswish": (lambda z: z * F.hardtanh(z + 3, 0.0, 6.0) / 6.0, ("hardswish", 0.0)),
    "relu6": (lambda z: z.clamp(0, 6), ("relu6", 0.0)),
    "elu": (lambda z: F.elu(z, 0.7), ("elu", 0.7)),
    "gelu": (lambda z: z * 0.5 * (1 + torch.erf(z / 2**0.5)), ("gelu", 0.0)),
    "tanh's gelu": (lambda z: F.gelu(z, approximate="tanh"), ("gelu_tanh", 0.0)),
    "mish": (F.mish, None),
    "softplus": (F.softplus, None),
    "straight through": (Straight.apply, None),
    "softmax": (lambda z: z.softmax(1), None),
    "another silu": (lambda z: z * torch.sigmoid(1.702 * z), None),
}


@pytest.mark.parametrize(("function", "known"), FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_activations_are_known_by_their_values_and_derivatives(function: Any, known: Any) -> None:
    assert recognized(function) == known
