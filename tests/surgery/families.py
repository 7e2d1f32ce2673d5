"""Image models of the transformers library from small configurations, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

transformers: Any = pytest.importorskip("transformers", reason="transformers is in the group 'test'")


def resnet(kind: str = "basic") -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type=kind)
    return transformers.ResNetModel(config)


def regnet() -> nn.Module:
    config = transformers.RegNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], groups_width=4)
    return transformers.RegNetModel(config)


def mobilenet_v1() -> nn.Module:
    return transformers.MobileNetV1Model(transformers.MobileNetV1Config(depth_multiplier=0.1, min_depth=4))


def mobilenet_v2() -> nn.Module:
    config = transformers.MobileNetV2Config(image_size=32, depth_multiplier=0.1, min_depth=4, depth_divisible_by=4)
    return transformers.MobileNetV2Model(config)


def efficientnet() -> nn.Module:
    config = transformers.EfficientNetConfig(
        image_size=32, width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320, depth_divisor=4,
        dropout_rate=0.0, drop_connect_rate=0.0,
    )  # fmt: skip
    return transformers.EfficientNetModel(config)


def levit(kind: str = "LevitModel") -> nn.Module:
    config = transformers.LevitConfig(
        image_size=32, hidden_sizes=[16, 16, 16], num_attention_heads=[1, 1, 1], depths=[1, 1, 1], key_dim=[8, 8, 8],
        down_ops=[["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 2, 4, 2, 2]],
    )  # fmt: skip
    return getattr(transformers, kind)(config)


def mobilevit() -> nn.Module:
    config = transformers.MobileViTConfig(
        image_size=32, hidden_sizes=[8, 8, 8], neck_hidden_sizes=[4, 4, 8, 8, 8, 8, 8], num_attention_heads=2
    )
    return transformers.MobileViTModel(config)


def mobilevit_v2() -> nn.Module:
    return transformers.MobileViTV2Model(transformers.MobileViTV2Config(image_size=32, width_multiplier=0.25))


def swiftformer() -> nn.Module:
    config = transformers.SwiftFormerConfig(
        image_size=32, depths=[1, 1, 1, 1], embed_dims=[8, 8, 8, 8], mlp_ratio=2, drop_path_rate=0.0
    )
    return transformers.SwiftFormerModel(config)


def hgnet_v2() -> nn.Module:
    config = transformers.HGNetV2Config(
        embedding_size=8, depths=[1, 1], hidden_sizes=[8, 16], stem_channels=[3, 4, 8], stage_in_channels=[8, 8],
        stage_mid_channels=[4, 4], stage_out_channels=[8, 16], stage_num_blocks=[1, 1],
        stage_downsample=[False, True], stage_light_block=[False, True], stage_kernel_size=[3, 5],
        stage_numb_of_layers=[2, 2], out_features=["stage2"],
    )  # fmt: skip
    return transformers.HGNetV2Backbone(config)


def convnext() -> nn.Module:
    return transformers.ConvNextModel(transformers.ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "ResNet, basic": resnet,
    "ResNet, bottleneck": lambda: resnet("bottleneck"),
    "RegNet": regnet,
    "MobileNetV1": mobilenet_v1,
    "MobileNetV2": mobilenet_v2,
    "EfficientNet": efficientnet,
    "LeViT": lambda: levit("LevitForImageClassification"),
    "MobileViT": mobilevit,
    "MobileViTV2": mobilevit_v2,
    "SwiftFormer": swiftformer,
    "HGNetV2": hgnet_v2,
    "ConvNeXt": convnext,
}
