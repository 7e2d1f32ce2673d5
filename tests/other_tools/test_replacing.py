"""Tools that put layers of their own in the place of ours: the result is right, or there is an error that says why."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import lightning
import pytest
import torch
from subjects import (
    Network,
    assert_close,
    assert_right,
    by_hand,
    converted,
    frozen,
    frozen_and_fused,
    fused,
    image,
    network,
    right,
)
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse as fuse_by_fx
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils import mkldnn

import batchnorm
from batchnorm import kernels
from with_timm import timm

Tool = Callable[[nn.Module], nn.Module]


def by_isinstance(make: Callable[[nn.BatchNorm2d], nn.Module]) -> Tool:
    """What people write: for every child that is an ``nn.BatchNorm2d``, another module at its name."""

    def tool(model: nn.Module) -> nn.Module:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(parent, name, make(child))
        return model

    return tool


def plain(layer: nn.BatchNorm2d) -> nn.Module:
    made = nn.BatchNorm2d(layer.num_features, layer.eps, layer.momentum)
    made.load_state_dict(layer.state_dict())
    return made.train(layer.training)


class Affine(nn.Module):
    """A frozen layer as detectron2 and torchvision have it: four buffers, one multiplication."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(layer, name).detach().clone())
        self.eps = layer.eps

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale.view(-1, 1, 1) + (self.bias - self.running_mean * scale).view(-1, 1, 1)


def through_children(model: nn.Module) -> nn.Module:
    """As apex, horovod and others convert: a new module whose children are added one by one."""
    made = plain(model) if isinstance(model, nn.BatchNorm2d) else model
    for name, child in model.named_children():
        made.add_module(name, through_children(child))
    return made


def folded_by_torch(model: nn.Module) -> nn.Module:
    """As mmcv's ``fuse_conv_bn``: each convolution takes the layer registered behind it, which becomes an identity."""
    for parent in list(model.eval().modules()):
        before: Any = None
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d) and before is not None:
                parent._modules[before] = fuse_conv_bn_eval(parent._modules[before], child)
                parent._modules[name] = nn.Identity()
            before = name if isinstance(child, nn.Conv2d) else None
    return model


def classes_changed(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = nn.BatchNorm2d
    return model


def traced_and_synchronized(model: nn.Module) -> nn.Module:
    traced: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(fx.symbolic_trace(model))
    return traced


def synchronized_and_traced(model: nn.Module) -> nn.Module:
    return fx.symbolic_trace(nn.SyncBatchNorm.convert_sync_batchnorm(model))


SYNCHRONIZE: dict[str, Tool] = {
    "torch": nn.SyncBatchNorm.convert_sync_batchnorm,
    "timm": timm.layers.convert_sync_batchnorm,
    "lightning": lightning.pytorch.plugins.layer_sync.TorchSyncBatchNorm().apply,
}
# They train as before.
TRAINING: dict[str, Tool] = {
    **SYNCHRONIZE,
    "isinstance and setattr": by_isinstance(plain),
    "children": through_children,
    "class": classes_changed,
    "traced, then synchronized": traced_and_synchronized,
    "synchronized, then traced": synchronized_and_traced,
    "copied": lambda model: nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)),
    "pickled": lambda model: nn.SyncBatchNorm.convert_sync_batchnorm(pickle.loads(pickle.dumps(model))),
    "copied afterwards": lambda model: copy.deepcopy(nn.SyncBatchNorm.convert_sync_batchnorm(model)),
    "pickled afterwards": lambda model: pickle.loads(pickle.dumps(nn.SyncBatchNorm.convert_sync_batchnorm(model))),
}
EVALUATION: dict[str, Tool] = {
    "detectron2": by_isinstance(Affine),
    "timm's freeze_batch_norm_2d": timm.layers.freeze_batch_norm_2d,
    "mmcv's fuse_conv_bn": folded_by_torch,
    "fx.experimental.optimization.fuse": lambda model: fuse_by_fx(model.eval()),
    "traced, then detectron2": lambda model: by_isinstance(Affine)(fx.symbolic_trace(model)),
}


@pytest.mark.parametrize("make", [converted, fused])
@pytest.mark.parametrize("tool", [*TRAINING.values(), *EVALUATION.values()], ids=[*TRAINING, *EVALUATION])
def test_another_packages_layers_do_what_ours_did(tool: Tool, make: Callable[[], nn.Module]) -> None:
    model = tool(make())
    assert_right(model)
    assert_right(model.eval(), x=image(2))
    if tool in TRAINING.values():
        assert not any(type(m).__module__ == "batchnorm.layers" for m in model.modules())
        assert_right(model, training=True)


@pytest.mark.parametrize("make", [converted, fused, frozen])
def test_mkldnn(make: Callable[[], nn.Module]) -> None:
    class Relu(Network):
        def __init__(self) -> None:
            super().__init__()
            self.block = self.sums = nn.Identity()
            self.act, self.stem[2] = nn.Identity(), nn.ReLU()  # oneDNN's tensors have no SiLU

    torch.manual_seed(0)
    model = Relu().eval()
    expected = copy.deepcopy(model).double()(image().double())
    batchnorm.convert(model)
    ours = batchnorm.fuse(model, image()).model if make is fused else model
    if make is frozen:
        batchnorm.freeze(ours)
    found = mkldnn.to_mkldnn(ours.eval())(image().to_mkldnn()).to_dense()
    assert_close(found, expected)


def test_a_converted_layer_that_a_tool_leaves_keeps_its_kernel() -> None:
    model = fuse_by_fx(fused().eval())
    model.train()(image())
    assert kernels.ran().forward == "numba"


# --- layers that would do less ---


@pytest.mark.parametrize("tool", SYNCHRONIZE.values(), ids=SYNCHRONIZE)
def test_an_activation_that_only_the_layer_knows_of_is_not_dropped(tool: Tool) -> None:
    with pytest.raises(RuntimeError, match=r"convert_sync_batchnorm .*BatchNorm2d, without its activation silu: set"):
        tool(by_hand())
    model: Any = by_hand()
    model.stem[1].activation, model.stem[2] = None, nn.SiLU()  # as the message says
    assert_right(tool(model), training=True)


@pytest.mark.parametrize("tool", SYNCHRONIZE.values(), ids=SYNCHRONIZE)
@pytest.mark.parametrize("make", [frozen, frozen_and_fused])
def test_a_frozen_layer_is_not_woken(tool: Tool, make: Callable[[], nn.Module]) -> None:
    with pytest.raises(RuntimeError, match=r"FrozenBatchNorm2d, which would not be frozen any more: call"):
        tool(make())
    model = make()
    batchnorm.unfreeze(model)
    model = tool(model)
    frozen_again = batchnorm.freeze(model).frozen
    assert len(frozen_again) == 4
    assert_close(model.train()(image()), right(image()))


@pytest.mark.parametrize("make", [frozen, frozen_and_fused])
@pytest.mark.parametrize("tool", EVALUATION.values(), ids=EVALUATION)
def test_what_computes_evaluation_may_take_a_frozen_layers_place(tool: Tool, make: Callable[[], nn.Module]) -> None:
    assert_right(tool(make().eval()))


@pytest.mark.parametrize("tool", [by_isinstance(plain), through_children], ids=["setattr", "children"])
def test_limit_whoever_makes_plain_layers_of_frozen_ones_wakes_them(tool: Tool) -> None:
    assert_right(tool(frozen()), training=True)


@pytest.mark.parametrize("tool", [by_isinstance(plain), folded_by_torch], ids=["setattr", "folded"])
def test_limit_an_activation_set_by_hand_is_lost_where_nobody_asks(tool: Tool) -> None:
    without: Any = network().double().eval()
    without.stem[2] = nn.Identity()
    assert_close(tool(by_hand().eval())(image()), without(image().double()))


def test_limit_parts_of_a_fused_model_in_another_one() -> None:
    """Assembled anew, a model is right; made another package's while the old one is in use, it is not."""
    model: Any = fused().eval()
    assembled = nn.Sequential(*model.stem.children()).eval()
    expected = network().double().eval().stem(image().double())  # type: ignore[union-attr,operator]
    assert_close(assembled(image()), expected)
    assert_close(copy.deepcopy(assembled)(image()), expected)
    first = nn.SyncBatchNorm.convert_sync_batchnorm(assembled)
    difference = (first(image()) - expected).abs().max()
    assert difference > 0.1
    del model
    gc.collect()  # nobody holds the fused layer any more
    assert_close(first(image()), expected)
    batchnorm.revert(parts := nn.Sequential(*fused().eval().stem.children()))  # type: ignore[union-attr,operator]
    assert_close(nn.SyncBatchNorm.convert_sync_batchnorm(parts)(image()), expected)


# --- another package's layers, made ours ---


@pytest.mark.parametrize("tool", [timm.layers.convert_sync_batchnorm, timm.layers.freeze_batch_norm_2d])
def test_timms_layers_with_an_activation_by_timms_own_tools(tool: Tool) -> None:
    torch.manual_seed(0)
    layer = timm.layers.BatchNormAct2d(4, act_layer=nn.SiLU)
    layer.running_mean.normal_()
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 1), layer).eval()
    expected = copy.deepcopy(model).double()(image().double())
    batchnorm.convert(model)
    assert isinstance(model[1], batchnorm.BatchNorm2d)
    with pytest.raises(RuntimeError, match=r"without its activation silu: take timm\.layers\.norm_act's own function"):
        nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    made = tool(model)
    assert not isinstance(made[1], batchnorm.BatchNorm2d)
    assert_close(made.eval()(image()), expected)
