"""Models of the transformers library, whose authors did not think of folding: every layer goes, and nothing changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES
from networks import randomized
from torch import Tensor, nn

import batchnorm

# Layers; how many are folded without example inputs, where only graphs tell.
LAYERS = {
    "ResNet, basic": (6, 6),
    "ResNet, bottleneck": (8, 8),
    "RegNet": (9, 9),
    "MobileNetV1": (27, 0),  # the padding is computed from int(shape), beside each convolution
    "MobileNetV2": (52, 0),
    "EfficientNet": (22, 21),
    "LeViT": (27, 26),  # its head's normalization is before a linear layer, of an input of unknown dimensions
    "MobileViT": (32, 32),
    "MobileViTV2": (25, 25),
    "SwiftFormer": (13, 13),
    "HGNetV2": (16, 16),
    "ConvNeXt": (0, 0),
}


def built(family: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = randomized(FAMILIES[family]())
    side = 64 if family in ("MobileNetV1", "MobileNetV2", "MobileViTV2", "SwiftFormer") else 32
    return model, {"pixel_values": torch.randn(2, 3, side, side)}


def norms(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def first(outputs: Any) -> Tensor:
    """The last hidden state, the logits or the first feature map: whatever comes first."""
    found = outputs.to_tuple()[0]
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_folded(family: str) -> None:
    model, inputs = built(family)
    names = norms(model)
    result = batchnorm.fold(model, inputs)
    assert sorted(result.folded) == sorted(names)
    assert result.skipped == {}
    assert len(names) == LAYERS[family][0]
    assert norms(result.model) == []
    assert result.max_error <= 1e-5
    assert result.max_error_float64 <= 1e-12
    assert norms(model) == names
    with torch.no_grad():
        right, found = first(model.eval()(**inputs)), first(result.model(**inputs))
    assert (found - right).abs().max() <= 1e-5 * right.abs().max()


@pytest.mark.parametrize("family", ["MobileNetV1", "EfficientNet", "LeViT"])
def test_without_inputs_what_is_left_has_its_reason(family: str) -> None:
    model, _ = built(family)
    result = batchnorm.fold(model)
    assert (len(result.folded) + len(result.skipped), len(result.folded)) == LAYERS[family]
    assert all("example_inputs" in reason for reason in result.skipped.values())


class Plain(nn.Module):
    """A model with one tensor in and one out, as exporters like it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return first(self.model(pixel_values=x))


def nodes_and_outputs(exported: torch.export.ExportedProgram, x: Tensor) -> tuple[list[str], Tensor]:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is in the group 'test'")
    pytest.importorskip("onnxscript", reason="onnxscript is in the group 'test'")
    program = torch.onnx.export(exported, dynamo=True, verbose=False, optimize=False)
    assert program is not None
    session = runtime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return [node.op_type for node in program.model_proto.graph.node], torch.from_numpy(y)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("family", ["ResNet, basic", "LeViT", "RegNet"])
def test_exported_and_run_by_onnx_runtime(family: str) -> None:
    model, inputs = built(family)
    x = inputs["pixel_values"]
    plain = Plain(model).eval()
    with torch.no_grad():
        right = plain(x)
    result = batchnorm.fold(plain, x)
    assert len(result.folded) == LAYERS[family][0]
    exported = torch.export.export(result.model, (x,))
    assert not any("batch_norm" in str(node.target) for node in exported.graph.nodes)
    kinds, found = nodes_and_outputs(exported, x)
    assert "BatchNormalization" not in kinds
    assert (found - right).abs().max() <= 1e-5 * right.abs().max()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_unfolded_there_are_such_nodes() -> None:
    model, x = randomized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).eval(), torch.randn(2, 3, 4, 4)
    kinds, _ = nodes_and_outputs(torch.export.export(model, (x,)), x)
    assert kinds.count("BatchNormalization") == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("family", ["HGNetV2"])
def test_the_exported_program_folds_to_the_same(family: str) -> None:
    model, inputs = built(family)
    plain, x = Plain(model).eval(), inputs["pixel_values"]
    result = batchnorm.fold(torch.export.export(plain, (x,)), x)
    assert len(result.folded) == LAYERS[family][0]
    with torch.no_grad():
        right = batchnorm.fold(plain).model(x)
        torch.testing.assert_close(result.model(x), right, rtol=1e-5, atol=1e-5)
