"""What takes batch normalization's place computes what it is called, with the same parameters."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import mobilenet_v1, resnet
from hypothesis import given
from hypothesis import strategies as st
from networks import BasicBlock, DenseNet, ResNet, Undecided, randomized
from torch import Tensor, nn

import batchnorm

SPACES = {1: (4,), 2: (4, 5), 3: (2, 3, 4)}


def image(channels: int = 2, *space: int) -> Tensor:
    return torch.randn(4, channels, *(space or (3, 5)), generator=torch.Generator().manual_seed(1))


def layer_of(source: Any, dimensions: int, channels: int, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomized(getattr(source, f"BatchNorm{dimensions}d")(channels, eps=1e-3, **options))


def by_hand(by: str, x: Tensor, layer: Any, groups: int) -> Tensor:
    """The definition, in float64."""
    wide = x.double()
    if by == "rms":
        y = wide / (wide.square().mean(1, keepdim=True) + layer.eps).sqrt()
    else:
        parts = wide.reshape(len(x), {"group": groups, "layer": 1, "instance": x.shape[1]}[by], -1)
        var, mean = torch.var_mean(parts, -1, correction=0, keepdim=True)
        y = ((parts - mean) / (var + layer.eps).sqrt()).view(x.shape)
    size = (-1, *(1,) * (x.dim() - 2))
    y = y if layer.weight is None else y * layer.weight.double().view(size)
    return y if layer.bias is None or by == "rms" else y + layer.bias.double().view(size)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("by", ["group", "layer", "instance", "rms"])
@pytest.mark.parametrize("source", [nn, batchnorm], ids=["torch", "ours"])
def test_each_computes_its_definition(source: Any, by: str, dimensions: int, affine: bool) -> None:
    channels, groups = 48, 12
    model = nn.Sequential(layer_of(source, dimensions, channels, affine=affine))
    before = copy.deepcopy(model[0])
    parameters = list(model.parameters())
    result = batchnorm.replace(model, by)
    assert list(result.replaced) == ["0"]
    assert result.skipped == {}
    assert result.model is model
    layer = model[0]
    assert not isinstance(layer, nn.modules.batchnorm._BatchNorm)
    kept = parameters[:1] if by == "rms" else parameters
    assert [id(p) for p in model.parameters()] == [id(p) for p in kept]
    assert list(layer.buffers()) == []
    assert layer.eps == 1e-3
    for shape in [(), SPACES[1]] if dimensions == 1 else [SPACES[dimensions]]:
        if by == "instance" and shape == ():
            continue
        x = torch.randn(3, channels, *shape).requires_grad_()
        right = by_hand(by, x, before, groups)
        torch.testing.assert_close(model(x).double(), right, rtol=1e-5, atol=1e-5)
        weights = torch.linspace(-1, 1, x.numel()).view_as(x)
        (found,) = torch.autograd.grad((model(x) * weights).sum(), x)
        (expected,) = torch.autograd.grad((right * weights).sum(), x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_classes_are_torch_s_where_nothing_more_is_asked_of_them() -> None:
    kinds = {"group": nn.GroupNorm, "layer": nn.GroupNorm, "instance": nn.InstanceNorm2d}
    for by, kind in kinds.items():
        model = nn.Sequential(nn.BatchNorm2d(8))
        batchnorm.replace(model, by)
        assert type(model[0]) is kind
        fresh = {
            "group": nn.GroupNorm(2, 8),
            "layer": nn.GroupNorm(1, 8),
            "instance": nn.InstanceNorm2d(8, affine=True),
        }
        assert repr(model[0]) == repr(fresh[by])
        assert vars(model[0]).keys() == vars(fresh[by]).keys()
        model.load_state_dict(nn.Sequential(fresh[by]).state_dict())
    model = nn.Sequential(nn.BatchNorm2d(8))
    batchnorm.replace(model, None)
    assert repr(model) == repr(nn.Sequential(nn.Identity()))
    assert list(model.state_dict()) == []


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(64, 32), (128, 32), (512, 32), (48, 12), (96, 32), (144, 36), (24, 6), (17, 1), (6, 1), (1, 1)],
)
def test_how_many_groups(channels: int, groups: int) -> None:
    model = nn.BatchNorm2d(channels)
    result = batchnorm.replace(model, "group")
    assert model.num_groups == groups
    assert result.replaced[""].startswith(f"GroupNorm({groups}, {channels}): ")
    assert f"{channels // groups} channels" in result.replaced[""]


@given(channels=st.integers(4, 4096))
def test_no_value_is_normalized_alone_or_in_a_pair(channels: int) -> None:
    layer = nn.BatchNorm1d(channels, device="meta")
    batchnorm.replace(layer, "group")
    groups = layer.num_groups
    assert channels % groups == 0
    assert channels // groups >= 4
    nearer = range(32 - abs(groups - 32) + 1, 32 + abs(groups - 32))
    assert not any(channels % g == 0 and channels // g >= 4 for g in nearer)


@pytest.mark.parametrize("by", ["group", "instance", "rms", None])
def test_compilers_and_tracers_read_what_was_put_in(by: str | None) -> None:
    model = nn.Sequential(nn.Conv2d(2, 8, 1), layer_of(batchnorm, 2, 8, activation="relu"))
    batchnorm.replace(model, by)
    right = model(image())
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(image()), right)
    torch.testing.assert_close(torch.export.export(model, (image(),)).module()(image()), right)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(image()), right)


def test_what_would_leave_nothing_is_left() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(1), nn.SyncBatchNorm(2))
    for by in ("group", "layer", "rms"):
        result = batchnorm.replace(model, by)
        assert list(result.skipped) == ["0", "1", "2"]
        assert result.skipped["0"] == "normalizing 3 values of a sample would leave little of them"
    assert "1: skipped, normalizing 1 value of a sample" in str(result)
    assert batchnorm.replace(model, "instance").skipped["2"].startswith("SyncBatchNorm takes input of any dimensions")
    with pytest.raises(ValueError, match=r"expected 3D input \(got 2D input\): instance normalization of \(N, C\)"):
        model[0](torch.randn(4, 3))


def test_synchronized_layers_count() -> None:
    model = nn.Sequential(nn.SyncBatchNorm(8))
    assert list(batchnorm.replace(model, "group").replaced) == ["0"]
    assert type(model[0]) is nn.GroupNorm
    assert not hasattr(model[0], "process_group")


def test_names_that_nobody_knows() -> None:
    model = nn.BatchNorm2d(4)
    with pytest.raises(ValueError, match="unknown normalization 'batch': choose from group, layer, instance, rms"):
        batchnorm.replace(model, "batch")
    for by in (16, nn.GroupNorm):
        with pytest.raises(TypeError, match="cannot replace batch normalization by"):
            batchnorm.replace(model, by)
    assert type(model) is nn.BatchNorm2d


class Shifted(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def test_what_is_left_has_its_reason() -> None:
    patched = nn.BatchNorm2d(4)
    patched.forward = lambda x: x
    frozen = nn.BatchNorm2d(4)
    batchnorm.freeze(frozen)
    model = nn.Sequential(nn.LazyBatchNorm2d(), Shifted(4), patched, frozen, nn.LayerNorm(4))
    reasons = ["it has seen no input", "Shifted is a subclass", "its forward has been replaced", "it is frozen"]
    kinds = [type(m) for m in model]
    for by in ("group", None):
        result = batchnorm.replace(model, by)
        assert result.replaced == {}
        for reason, start in zip(result.skipped.values(), reasons, strict=True):
            assert reason.startswith(start)
    assert [type(m) for m in model] == kinds


@pytest.mark.parametrize("by", ["group", "instance", "rms", None])
def test_our_layers_keep_their_activation_and_their_residual(by: str | None) -> None:
    layer = layer_of(batchnorm, 2, 8, activation=("leaky_relu", 0.2))
    plain = layer_of(nn, 2, 8)
    batchnorm.replace(layer, by)
    batchnorm.replace(plain, by)
    x, skip = image(8), image(8) + 1
    torch.testing.assert_close(layer(x), F.leaky_relu(plain(x), 0.2))
    torch.testing.assert_close(layer(x, skip), F.leaky_relu(plain(x) + skip, 0.2))
    assert "activation=leaky_relu(0.2)" in repr(layer)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert torch.equal(twin(x, skip), layer(x, skip))


def test_fused_models_are_reverted_first() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(BasicBlock(2, 8), nn.BatchNorm2d(8))
    fused = batchnorm.fuse(model, image()).model
    result = batchnorm.replace(fused, "group")
    assert list(result.replaced) == ["0.bn2", "1"]  # the first is somebody's residual
    assert set(result.skipped.values()) == {"it is fused: call batchnorm.revert(model) before"}
    fused(image()).sum().backward()
    batchnorm.revert(fused)
    assert len(batchnorm.replace(fused, "group").replaced) == 2
    assert [type(m) for m in fused[0].modules()] != [type(m) for m in model[0].modules()]
    assert type(fused[0]) is BasicBlock
    batchnorm.replace(model, "group")
    torch.testing.assert_close(fused(image()), model(image()))


def test_sharing_hooks_modes_attributes_and_optimizers_stay() -> None:
    shared = nn.BatchNorm2d(8).eval()
    shared.own = "anything"
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[nn.Module] = []
    handle = shared.register_forward_hook(lambda module, given, y: seen.append(module))
    assert list(batchnorm.replace(model, "group").replaced) == ["a"]
    assert model["a"] is model["b"][0] is shared
    assert not shared.training
    assert shared.own == "anything"
    before = shared.weight.detach().clone()
    shared(image(8)).pow(3).sum().backward()
    optimizer.step()
    assert not torch.equal(shared.weight, before)
    assert seen == [shared]
    handle.remove()
    shared(image(8))
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtypes_stay(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(2, 8, 1, bias=False), nn.BatchNorm2d(8)).to(dtype)
    for by in ("group", "rms", None):
        made = copy.deepcopy(model)
        batchnorm.replace(made, by)
        assert made(image().to(dtype)).dtype == dtype
        assert all(p.dtype == dtype for p in made.parameters())


def test_a_policy_makes_layers_ours() -> None:
    policy = batchnorm.Ghost(16)
    model = nn.Sequential(nn.BatchNorm2d(2), batchnorm.BatchNorm2d(2), nn.LazyBatchNorm2d(), nn.SyncBatchNorm(2))
    result = batchnorm.replace(model, policy)
    assert [type(m) for m in model[:3]] == [batchnorm.BatchNorm2d] * 2 + [batchnorm.LazyBatchNorm2d]
    assert all(m.statistics == policy for m in model[:3])
    assert result.replaced["0"] == "BatchNorm2d with Ghost(size=16)"
    assert result.skipped == {"3": "SyncBatchNorm: its statistics are over all processes"}


# --- none ---

BEFORE: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "linear": (lambda: nn.Linear(2, 6), 1),
    "convolution": (lambda: nn.Conv2d(2, 6, 3, bias=False), 2),
    "grouped": (lambda: nn.Conv1d(2, 6, 1, groups=2), 1),
    "transposed": (lambda: nn.ConvTranspose2d(2, 6, 2, bias=False), 2),
    "grouped, transposed": (lambda: nn.ConvTranspose3d(2, 6, 2, groups=2), 3),
}


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize(("make", "dimensions"), BEFORE.values(), ids=BEFORE.keys())
def test_the_layer_before_takes_over(make: Callable[[], nn.Module], dimensions: int, options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make(), layer_of(nn, dimensions, 6, **options)).double()
    x = torch.randn(3, 2, *(() if isinstance(model[0], nn.Linear) else SPACES[dimensions]), dtype=torch.float64)
    weight, bias = model[0].weight, model[0].bias
    size = (-1, *(1,) * (x.dim() - 2))
    if model[1].running_mean is None:  # nothing but scale and shift can be kept
        right = model[0](x) * model[1].weight.view(size) + model[1].bias.view(size)
    else:
        right = model.eval()(x)
    result = batchnorm.replace(model, None, x if dimensions == 1 and isinstance(model[0], nn.Linear) else None)
    torch.testing.assert_close(model.train()(x), right)
    assert model[0].weight is weight
    assert bias is None or model[0].bias is bias
    assert result.new_parameters == (("0.bias",) if bias is None else ())
    assert ("and has a bias now" in result.replaced["1"]) == (bias is None)
    assert ("new parameters, for the optimizer: 0.bias" in str(result)) == (bias is None)
    model(x).sum().backward()
    assert model[0].bias.grad is not None


def test_only_what_feeds_the_layer_alone_takes_over() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
            self.twice, self.again = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
            self.wide, self.called = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            y = y + self.norm(y)
            y = self.twice(self.again(self.twice(y)))
            return self.called(self.called(self.wide(y)))

    model = Net()
    before = {name: p.clone() for name, p in model.named_parameters()}
    result = batchnorm.replace(model, None)
    gone = "removed, and with it its scale, shift and statistics: "
    assert result.replaced == {
        "norm": gone + "conv feeds others, too",
        "again": gone + "twice feeds others, too",
        "called": gone + "it is called several times",
    }
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_shared_watched_and_tied_layers_do_not_take_over() -> None:
    conv = nn.Conv2d(2, 2, 1)
    shared = nn.Sequential(nn.Sequential(conv, nn.BatchNorm2d(2)), conv)
    hooked = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    hooked[0].register_forward_hook(lambda module, given, y: 2 * y)
    tied = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1))
    tied[2].weight = tied[0].weight
    for model, reason in ((shared, "0.0 feeds others, too"), (hooked, "has hooks"), (tied, "0 shares a parameter")):
        before = {name: p.clone() for name, p in model.named_parameters()}
        (said,) = batchnorm.replace(model, None).replaced.values()
        assert reason in said
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_networks_compute_the_same_without_normalization() -> None:
    torch.manual_seed(0)
    model = randomized(ResNet()).eval()
    x = image(2, 8, 8)
    right = model(x)
    result = batchnorm.replace(model, None)
    assert len(result.replaced) == 9
    torch.testing.assert_close(model.train()(x), right, rtol=1e-4, atol=1e-5)
    assert all(module.bias is not None for module in model.modules() if isinstance(module, nn.Conv2d))
    said = batchnorm.replace(DenseNet(), None).replaced["norm"]
    assert "it follows Conv2d and the model's input, not" in said


@pytest.mark.parametrize("observed", [False, True])
def test_what_cannot_be_traced_is_observed_or_guessed(observed: bool) -> None:
    torch.manual_seed(0)
    model = Undecided(nn.SiLU()).eval()
    model.conv = nn.Conv2d(2, 3, 1, bias=False)
    randomized(model)
    x, weight, shift = image(), model.conv.weight.detach().clone(), model.norm.bias.detach().clone()
    normalized = model.norm(model.conv(x))
    result = batchnorm.replace(model, None, x if observed else None)
    assert result.new_parameters == ("conv.bias",)
    if observed:
        assert result.replaced["norm"] == "removed; conv does now what it did in evaluation, and has a bias now"
        assert "it follows silu, not a plain convolution or linear layer" in result.replaced["second"]
        torch.testing.assert_close(model.conv(x), normalized)
    else:
        assert "conv, registered before it, has a bias now (example_inputs would show" in result.replaced["norm"]
        assert result.replaced["second"].endswith("no convolution or linear layer before it was found")
        assert torch.equal(model.conv.weight, weight)
        assert torch.equal(model.conv.bias, shift)


def test_the_model_may_be_the_layer() -> None:
    layer = nn.BatchNorm2d(8)
    result = batchnorm.replace(layer, None)
    assert result.model is layer
    assert type(layer) is nn.Identity
    assert str(result).startswith("1 replaced, 0 skipped\n  (the model): removed")


@pytest.mark.parametrize("make", [resnet, mobilenet_v1])
def test_transformers(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = randomized(make()).eval()
    inputs = {"pixel_values": torch.randn(2, 3, 64, 64)}
    count = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    right = model(**inputs).last_hidden_state
    for by in ("group", None):
        made = copy.deepcopy(model)
        result = batchnorm.replace(made, by, inputs)
        assert len(result.replaced) == count
        assert result.skipped == {}
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in made.modules())
        found = made.train()(**inputs).last_hidden_state
        found.sum().backward()
        if by is None:
            assert len(result.new_parameters) == count
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
        else:
            assert not torch.allclose(found, right, rtol=0.1)
