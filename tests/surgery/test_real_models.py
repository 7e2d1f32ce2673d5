"""Models of the transformers library, small and with random weights, whose authors did not think of fusing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from families import levit, mobilenet_v1, mobilevit, regnet, resnet, rt_detr, segformer, upernet, wav2vec2
from networks import randomized
from torch import nn

import batchnorm
from batchnorm import kernels

# What is fused, how often; and how it was found.
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, int], set[str]]] = {
    "resnet": (resnet, {"relu": 3, "add + relu": 2}, {"module replaced", "forward rewritten"}),
    "regnet": (regnet, {"relu": 5, "add + relu": 2}, {"module replaced", "forward rewritten"}),
    "mobilenet": (mobilenet_v1, {"relu6": 27}, {"observed"}),
    "mobilevit": (mobilevit, {"silu": 25, "add": 3}, {"module replaced", "forward rewritten"}),
    "levit": (levit, {"hardswish": 3}, {"observed"}),
}


@pytest.mark.parametrize(("make", "counts", "methods"), MODELS.values(), ids=MODELS.keys())
def test_transformers(make: Callable[[], nn.Module], counts: dict[str, int], methods: set[str]) -> None:
    torch.manual_seed(0)
    model = randomized(make())
    side = 64 if make is mobilenet_v1 else 32  # which halves it five times
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


SPEECH, IMAGES = {"input_values": (2, 200)}, {"pixel_values": (2, 3, 64, 64)}
# The same for what is built on such models; and how many layers are left, whose outputs no activation reads.
BUILT: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, ...]], dict[str, int], int]] = {
    "Wav2Vec2-Conformer": (lambda: wav2vec2("Wav2Vec2Conformer"), SPEECH, {"gelu": 1}, 0),
    "Hubert": (lambda: wav2vec2("Hubert", conv_pos_batch_norm=True), SPEECH, {}, 1),
    "SegFormer": (segformer, IMAGES, {"relu": 1}, 0),
    "UperNet": (upernet, IMAGES, {"relu": 11}, 0),
    "RT-DETR": (rt_detr, IMAGES, {"relu": 7, "silu": 12, "add + relu": 4, "add + silu": 12}, 22),
}


@pytest.mark.parametrize(("make", "shapes", "counts", "left"), BUILT.values(), ids=BUILT.keys())
@kernels.using("aten")  # compiles nothing
def test_models_with_heads_and_encoders(
    make: Callable[[], nn.Module], shapes: dict[str, tuple[int, ...]], counts: dict[str, int], left: int
) -> None:
    torch.manual_seed(0)
    model = randomized(make())
    result = batchnorm.fuse(model, {name: torch.randn(shape) for name, shape in shapes.items()})
    assert Counter(result.fused.values()) == counts
    assert len(result.skipped) == left
    for why in result.skipped.values():
        assert "it is the residual of" in why or not any(name in why for name in ("relu", "gelu", "silu", "sigmoid"))
    assert max(result.max_error, result.max_gradient_error) < 1e-4
    assert batchnorm.revert(result.model).skipped == {}
