"""Models of the transformers library, small and with random weights, whose authors did not think of fusing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import randomized
from torch import nn

import batchnorm
from batchnorm import kernels

transformers: Any = pytest.importorskip("transformers")


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    return transformers.ResNetModel(config)


def regnet() -> nn.Module:
    config = transformers.RegNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], groups_width=4)
    return transformers.RegNetModel(config)


def mobilenet() -> nn.Module:
    return transformers.MobileNetV1Model(transformers.MobileNetV1Config(depth_multiplier=0.1, min_depth=4))


def mobilevit() -> nn.Module:
    config = transformers.MobileViTConfig(
        image_size=32, hidden_sizes=[8, 8, 8], neck_hidden_sizes=[4, 4, 8, 8, 8, 8, 8], num_attention_heads=2
    )
    return transformers.MobileViTModel(config)


def levit() -> nn.Module:
    config = transformers.LevitConfig(
        image_size=32, hidden_sizes=[16, 16, 16], num_attention_heads=[1, 1, 1], depths=[1, 1, 1], key_dim=[8, 8, 8],
        down_ops=[["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 2, 4, 2, 2]],
    )  # fmt: skip
    return transformers.LevitModel(config)


# What is fused, how often; and how it was found.
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, int], set[str]]] = {
    "resnet": (resnet, {"relu": 3, "add + relu": 2}, {"module replaced", "forward rewritten"}),
    "regnet": (regnet, {"relu": 5, "add + relu": 2}, {"module replaced", "forward rewritten"}),
    "mobilenet": (mobilenet, {"relu6": 27}, {"observed"}),
    "mobilevit": (mobilevit, {"silu": 25, "add": 3}, {"module replaced", "forward rewritten"}),
    "levit": (levit, {"hardswish": 3}, {"observed"}),
}


@pytest.mark.parametrize(("make", "counts", "methods"), MODELS.values(), ids=MODELS.keys())
def test_transformers(make: Callable[[], nn.Module], counts: dict[str, int], methods: set[str]) -> None:
    torch.manual_seed(0)
    model = randomized(make())
    side = 64 if make is mobilenet else 32  # which halves it five times
    x = torch.randn(4, 3, side, side)
    result = batchnorm.fuse(model, {"pixel_values": x})
    assert Counter(result.fused.values()) == counts
    assert set(result.method.values()) == methods
    layers = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert len(result.fused) + len(result.skipped) == layers
    assert result.max_error < 1e-4
    assert result.max_gradient_error < 1e-4
    assert list(result.model.state_dict()) == list(model.state_dict())
    result.model.load_state_dict(model.state_dict())
    with torch.no_grad(), kernels.using("aten"):
        right = model.eval()(pixel_values=x).last_hidden_state
        found = result.model.eval()(pixel_values=x).last_hidden_state
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    assert batchnorm.revert(result.model).skipped == {}
    assert [type(m) for m in result.model.modules()] == [type(m) for m in model.modules()]
