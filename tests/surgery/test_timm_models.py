"""timm's models as they are shipped: their batch normalization is converted, fused and folded."""

from __future__ import annotations

import copy

import pytest
import torch
from timm_families import MODELS, MORE, layers_of, measured, model_and_input
from torch import nn

import batchnorm
from with_timm import timm

QUICK = ("mobilenetv3_small_050", "tf_mobilenetv3_small_minimal_100", "regnetx_002", "resnet18d")
# Of these, fewer layers can be folded. Norms of DenseNet and DPN read features that other norms read, too, and an
# activation is between them and the next convolution; those of RepViT and FastViT read sums, or are added to others.
FOLDED_AT_LEAST = {"densenet121": 0.48, "dpn68": 0.62, "fastvit_t8": 0.8, "repvit_m0_9": 0.78}


@pytest.mark.parametrize("name", MODELS)
def test_all_layers_are_converted_and_compute_the_same(name: str) -> None:
    model, x = model_and_input(name)
    layers = layers_of(model)
    plain, names = copy.deepcopy(model), list(model.state_dict())
    report = batchnorm.convert(model)
    assert len(report.converted) == len(layers)
    assert report.skipped == {}
    assert list(model.state_dict()) == names
    assert all(isinstance(layer, type(before)) for layer, before in zip(layers, layers_of(plain), strict=True))
    assert all(isinstance(layer, (batchnorm.BatchNorm1d, batchnorm.BatchNorm2d)) for layer in layers)
    with torch.no_grad(), batchnorm.kernels.using("aten"):
        torch.testing.assert_close(model.eval()(x), plain.eval()(x))
    back = batchnorm.revert(model)
    assert len(back.converted) == len(layers)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in (*MODELS, *MORE) if name not in QUICK)]
)
def test_nearly_all_layers_are_fused_and_folded(name: str) -> None:
    found = measured(name)
    assert found.converted >= 0.95 * found.layers
    assert found.fused == found.fusable
    assert found.folded >= FOLDED_AT_LEAST.get(name, 0.9) * found.layers
    assert len(found.fuse.fused) + len(found.fuse.skipped) == found.layers
    assert len(found.fold.folded) + len(found.fold.skipped) == found.layers
    assert found.fuse.max_error < 1e-4
    assert found.fold.max_error_float64 is None or found.fold.max_error_float64 < 1e-9


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnet18d"])
def test_freezing_and_recalibrating_reach_every_layer(name: str) -> None:
    model, x = model_and_input(name)
    layers = layers_of(model)
    assert len(batchnorm.recalibrate(model, [x, x + 1]).layers) == len(layers)
    right = model.eval()(x)
    frozen = batchnorm.freeze(model)
    assert len(frozen.frozen) == len(layers)
    torch.testing.assert_close(model.train()(x), right)
    assert len(batchnorm.unfreeze(model)) == len(layers)


def test_what_timms_freezing_leaves_is_reported_and_folded() -> None:
    model, x = model_and_input("mobilenetv3_small_050")
    layers = len(layers_of(model))
    timm.layers.freeze_batch_norm_2d(model)
    assert not layers_of(model)
    assert len(batchnorm.convert(model).skipped) == layers
    assert len(batchnorm.fuse(model).skipped) == layers
    assert len(batchnorm.freeze(model).frozen) == layers
    batchnorm.unfreeze(model)
    result = batchnorm.fold(model, x)
    assert len(result.folded) == layers
    assert result.skipped == {}
    assert not any("BatchNorm" in type(m).__name__ for m in result.model.modules())
    assert isinstance(result.model.bn1, nn.Hardswish)
