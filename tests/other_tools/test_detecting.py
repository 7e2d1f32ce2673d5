"""How other people's code finds batch normalization, and what it then sets: as torch.nn's, or a row of limits."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from subjects import assert_close, assert_right, converted, frozen, fused, image, network, right
from torch import nn

import batchnorm
from with_timm import timm

LAYERS = ["stem.1", "block.bn1", "block.bn2", "sums.bn"]
Ask = Callable[[nn.Module], bool]
BY_KIND: dict[str, Ask] = {
    "isinstance of the layer": lambda m: isinstance(m, nn.BatchNorm2d),
    "isinstance of the base": lambda m: isinstance(m, nn.modules.batchnorm._BatchNorm),
    "issubclass": lambda m: issubclass(m.__class__, nn.modules.batchnorm._NormBase),
    "name contains": lambda m: "BatchNorm" in m.__class__.__name__,
    "name found": lambda m: m.__class__.__name__.find("BatchNorm2d") != -1,
    "text": lambda m: "BatchNorm2d(" in str(m) and not list(m.children()),
    "statistics": lambda m: hasattr(m, "running_mean"),
}
BY_EXACT_NAME: dict[str, Ask] = {
    "class name": lambda m: type(m).__name__ == "BatchNorm2d",
    "torch's name": lambda m: m._get_name() == "BatchNorm2d",
}
BY_EXACT_CLASS: dict[str, Ask] = {
    "type is": lambda m: type(m) is nn.BatchNorm2d,
    "type in a set": lambda m: m.__class__ in {nn.BatchNorm1d, nn.BatchNorm2d},
    "module of the class": lambda m: type(m).__module__ == "torch.nn.modules.batchnorm",
}


def found(model: nn.Module, ask: Ask) -> list[str]:
    return [name for name, module in model.named_modules() if ask(module)]


@pytest.mark.parametrize("make", [converted, fused, frozen])
@pytest.mark.parametrize("ask", BY_KIND.values(), ids=BY_KIND)
def test_found_by_kind(make: Callable[[], nn.Module], ask: Ask) -> None:
    assert found(make(), ask) == LAYERS


@pytest.mark.parametrize("ask", BY_EXACT_NAME.values(), ids=BY_EXACT_NAME)
def test_found_by_name_unless_frozen(ask: Ask) -> None:
    assert found(converted(), ask) == found(fused(), ask) == LAYERS
    assert found(frozen(), ask) == []


@pytest.mark.parametrize("ask", BY_EXACT_CLASS.values(), ids=BY_EXACT_CLASS)
def test_limit_not_found_by_exact_class(ask: Ask) -> None:
    assert found(network(), ask) == LAYERS
    assert found(converted(), ask) == found(fused(), ask) == []
    batchnorm.revert(model := fused())
    assert found(model, ask) == LAYERS


def test_weight_decay_is_kept_from_our_layers() -> None:
    model = fused()
    optim: Any = import_module(f"{timm.__name__}.optim")
    groups = optim.param_groups_weight_decay(model, 0.1)
    spared = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert all(id(p) in spared for name in LAYERS for p in model.get_submodule(name).parameters())


MAKE = pytest.mark.parametrize("make", [converted, fused])


@MAKE
def test_what_is_set_after_construction_counts(make: Callable[[], nn.Module]) -> None:
    """As YOLO's ``initialize_weights`` sets eps and momentum, and initializations the weights."""

    def set_all(model: nn.Module) -> nn.Module:
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eps, m.momentum = 1e-3, 0.03
                nn.init.constant_(m.weight, 0.5)
                m.bias.data.zero_()
        return model

    model, exact = set_all(make()), set_all(network()).double()
    assert_close(model(image()), exact(image().double()))
    for name, buffer in exact.named_buffers():
        assert_close(dict(model.named_buffers())[name], buffer, name)
    assert_close(model.eval()(image()), exact.eval()(image().double()))


@MAKE
def test_frozen_by_hand(make: Callable[[], nn.Module]) -> None:
    """mmdetection's ``norm_eval``, ``module.train = …``, and Lightning's ``track_running_stats``."""
    model = make().train()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.eval()
    assert_close(model(image()), right(image()))
    model = make()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
            m.train = lambda mode=True: None
    assert_close(model.train()(image()), right(image()))
    model = make()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.track_running_stats = False
    before = [b.clone() for b in model.buffers()]
    assert_close(model(image()), right(image(), training=True))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))


@MAKE
def test_reparametrized_in_place(make: Callable[[], nn.Module]) -> None:
    """The convolution takes the layer over, which is left with neutral numbers; as in norm-based measures."""
    model: Any = make().eval()
    with torch.no_grad():
        bn, conv = model.block.bn1, model.block.conv1
        scale = bn.weight / (bn.running_var + bn.eps).sqrt()
        conv.weight.mul_(scale.view(-1, 1, 1, 1))
        bn.bias.sub_(scale * bn.running_mean)
        bn.weight.fill_(1)
        bn.running_mean.zero_()
        bn.running_var.fill_(1 - bn.eps)
    assert_close(model(image()), right(image()))


@MAKE
def test_slimmed_and_pruned(make: Callable[[], nn.Module]) -> None:
    """Network slimming: a penalty on the weights' gradients, then channels are cut out of layer and convolutions."""

    def slim(model: Any) -> Any:
        y = model(image().to(model.head.weight.dtype))
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.grad.data.add_(0.1 * torch.sign(m.weight.data))
                m.weight.data.sub_(0.01 * m.weight.grad)
        block, keep = model.block, torch.tensor([0, 2, 3])
        block.conv1.weight = nn.Parameter(block.conv1.weight[keep].detach())
        block.bn1.weight, block.bn1.bias = (nn.Parameter(t[keep].detach()) for t in (block.bn1.weight, block.bn1.bias))
        block.bn1.running_mean, block.bn1.running_var = block.bn1.running_mean[keep], block.bn1.running_var[keep]
        block.bn1.num_features = 3
        block.conv2.weight = nn.Parameter(block.conv2.weight[:, keep].detach())
        return model

    model, exact = slim(make()), slim(network().double())
    assert_close(model(image(2)), exact(image(2).double()))
    assert_close(model.eval()(image(2)), exact.eval()(image(2).double()))


@MAKE
def test_whoever_looks_at_every_attribute_finds_them_readable(make: Callable[[], nn.Module]) -> None:
    model = make()
    batchnorm.freeze(model.block)  # type: ignore[arg-type]
    for layer in (model.get_submodule(name) for name in LAYERS):
        assert all(hasattr(layer, name) for name in dir(layer) if name != "__abstractmethods__")
        assert not hasattr(layer, "qconfig")
        layer.qconfig = None  # which quantization sets
        assert layer.qconfig is None
        assert "qconfig" in dir(layer)
        del layer.qconfig


class Convolution(nn.Module):
    """As in YOLO: once the layer is folded it is deleted, and another method becomes the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.conv(x))


def folded_as_yolo_does(model: Any) -> nn.Module:
    for m in model.modules():
        if isinstance(m, Convolution) and hasattr(m, "bn"):
            m.conv = nn.utils.fusion.fuse_conv_bn_eval(m.conv, m.bn)
            delattr(m, "bn")
            m.forward = m.forward_fuse
    return model  # type: ignore[no-any-return]


def test_a_layer_deleted_after_folding_leaves_its_activation() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Convolution(), nn.Conv2d(4, 3, 1), Convolution()).eval()
    expected = model.double()(image().double())
    model = batchnorm.fuse(model.float(), image()).model.eval()
    assert sum(getattr(m, "activation", None) is not None for m in model.modules()) >= 2
    assert_close(folded_as_yolo_does(model)(image()), expected)


def test_a_layer_that_was_reset_starts_anew() -> None:
    model = converted()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.reset_parameters()
    exact = network()
    for m in exact.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.reset_parameters()
    assert_close(model.eval()(image()), exact.double().eval()(image().double()))
    assert_right(converted(), training=True)
