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


def wav2vec2(kind: str, **more: Any) -> nn.Module:
    """A model of speech: its input itself gets a gradient in training."""
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8),
        conv_kernel=(3, 3), conv_stride=(2, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, mask_time_prob=0.0, layerdrop=0.0, hidden_dropout=0.0, attention_dropout=0.0,
        activation_dropout=0.0, feat_proj_dropout=0.0, **more,
    )  # fmt: skip
    return getattr(transformers, f"{kind}Model")(config)


def segformer() -> nn.Module:
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[8, 16], num_attention_heads=[1, 2], sr_ratios=[2, 1],
        decoder_hidden_size=8, patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2], num_labels=3,
    )  # fmt: skip
    return transformers.SegformerForSemanticSegmentation(config)


def upernet() -> nn.Module:
    stages = [f"stage{i}" for i in (1, 2, 3, 4)]
    backbone = transformers.ConvNextConfig(hidden_sizes=[4, 8, 8, 8], depths=[1] * 4, num_stages=4, out_features=stages)
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=8, auxiliary_channels=4, auxiliary_in_channels=8, num_labels=3,
        pool_scales=[1, 2],
    )  # fmt: skip
    return transformers.UperNetForSemanticSegmentation(config)


def rt_detr() -> nn.Module:
    """With blocks of RepVGG's kind in its encoder."""
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8, 8, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.RTDetrConfig(
        backbone_config=backbone, encoder_hidden_dim=16, encoder_in_channels=[8, 8, 16], d_model=16,
        encoder_ffn_dim=16, encoder_attention_heads=2, decoder_in_channels=[16, 16, 16], decoder_ffn_dim=16,
        decoder_attention_heads=2, decoder_layers=1, num_queries=5, freeze_backbone_batch_norms=False,
        num_denoising=0, decoder_n_points=2,
    )  # fmt: skip
    return transformers.RTDetrModel(config)


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
