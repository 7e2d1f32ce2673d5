"""Graphs are folded exactly, and what cannot be folded is left, with the reason."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import BasicBlock, DenseNet, InvertedResidual, ResNet, randomized
from torch import Tensor, fx, nn

import batchnorm
from batchnorm.surgery.folding.fold_graph import fold_graph

ALLOWED = {torch.float64: 1e-12, torch.float32: 1e-5}


class Kinds(nn.Module):
    """Every kind of layer that may come before, with and without bias, affine or not."""

    def __init__(self, source: Any = nn, **options: Any) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1, bias=False), source.BatchNorm2d(4, **options)
        self.up, self.bn_up = nn.ConvTranspose2d(4, 6, 2, 2, groups=2), source.BatchNorm2d(6, affine=False)
        self.grouped, self.bn_grouped = nn.Conv3d(6, 4, 1, groups=2), source.BatchNorm3d(4, eps=0.1)
        self.linear, self.bn_linear = nn.Linear(4, 5), source.BatchNorm1d(5)
        self.bare, self.bn_bare = nn.Linear(5, 5, bias=False), source.BatchNorm1d(5)
        self.line, self.bn_line = nn.Conv1d(5, 3, 1), source.BatchNorm1d(3)
        self.up_line, self.bn_up_line = nn.ConvTranspose1d(3, 3, 2, bias=False), source.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = self.bn_up(self.up(x))
        x = self.bn_grouped(self.grouped(x[..., None])).mean((2, 3, 4))
        x = self.bn_bare(self.bare(self.bn_linear(self.linear(x))))
        return self.bn_up_line(self.up_line(self.bn_line(self.line(x[..., None]))))


class Functions(nn.Module):
    """No modules at all."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(channels, 3, 3, 3))
        self.flat = nn.Parameter(torch.randn(2, channels))
        self.flat_shift = nn.Parameter(torch.randn(2))
        self.register_buffer("mean", torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)
        self.register_buffer("flat_mean", torch.randn(2))
        self.register_buffer("flat_var", torch.rand(2) + 0.5)
        self.scale, self.shift = nn.Parameter(torch.randn(channels)), nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel, padding=1)
        x = F.batch_norm(x, self.mean, self.running_var, self.scale, bias=self.shift, eps=0.01)
        x = F.linear(x.mean((2, 3)), self.flat, bias=self.flat_shift)
        return F.batch_norm(x, self.flat_mean, self.flat_var)


def made(kind: Any, *args: Any, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    return randomized(kind(*args, **options)).to(dtype).eval()


def image(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*(shape or (2, 3, 6, 6)), generator=torch.Generator().manual_seed(1), dtype=dtype)


def exported(model: nn.Module, x: Tensor, decomposed: bool = False) -> torch.export.ExportedProgram:
    program = torch.export.export(model, (x,))
    return program.run_decompositions() if decomposed else program


def assert_same(found: Tensor, right: Tensor) -> None:
    assert found.dtype == right.dtype
    assert float((found - right).detach().abs().max() / right.detach().abs().max()) <= ALLOWED[right.dtype]


def norms_left(module: fx.GraphModule) -> int:
    return sum("norm" in str(node.target).rpartition(".")[2] or "bn" in str(node.target) for node in module.graph.nodes)


def state(model: Any) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict.items()} if not callable(model.state_dict) else {
        name: t.clone() for name, t in model.state_dict().items()
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's own, when it decomposes
@pytest.mark.parametrize(
    ("source", "dtype"),
    [(nn, torch.float32), (nn, torch.float64), (batchnorm, torch.float64)],
    ids=["torch-float32", "torch-float64", "ours"],
)
@pytest.mark.parametrize("way", ["exported", "decomposed", "traced"])
def test_every_kind_of_layer(way: str, source: Any, dtype: torch.dtype) -> None:
    model, x = made(Kinds, source, dtype=dtype), image(dtype=dtype)
    graph: Any = fx.symbolic_trace(model) if way == "traced" else exported(model, x, way == "decomposed")
    before, tensors = str(graph.graph), state(graph)
    folded, done, left = fold_graph(graph)
    assert done == {
        "bn": "into conv", "bn_up": "into up", "bn_grouped": "into grouped", "bn_linear": "into linear",
        "bn_bare": "into bare", "bn_line": "into line", "bn_up_line": "into up_line",
    }  # fmt: skip
    assert left == {}
    assert norms_left(folded) == 0
    assert not [name for name in folded.state_dict() if name.startswith("bn")]
    assert_same(folded(x), model(x))
    assert str(graph.graph) == before
    assert all(torch.equal(t, tensors[name]) for name, t in state(graph).items())
    assert_same((graph if way == "traced" else graph.module())(x), model(x))


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("way", ["exported", "decomposed", "traced"])
def test_functions(way: str) -> None:
    model, x = made(Functions), image()
    graph: Any = fx.symbolic_trace(model) if way == "traced" else exported(model, x, way == "decomposed")
    folded, done, left = fold_graph(graph)
    assert sorted(done.values()) == ["into flat", "into kernel"]
    assert left == {}
    assert_same(folded(x), model(x))
    assert norms_left(folded) == 0
    learning = {name: p.shape for name, p in folded.named_parameters()}
    assert learning.keys() == {"kernel", "kernel_bias", "flat", "flat_shift"}


@pytest.mark.parametrize("source", [nn, batchnorm], ids=["torch", "ours"])
@pytest.mark.parametrize("traced", [False, True], ids=["exported", "traced"])
def test_activations_and_residuals_stay(source: Any, traced: bool) -> None:
    model, x = made(ResNet), image(2, 2, 6, 6)
    right = model(x)
    if source is batchnorm:
        model = batchnorm.fuse(model, x).model
        assert sum(m.activation is not None for m in model.modules() if hasattr(m, "activation")) > 3
    graph: Any = fx.symbolic_trace(model) if traced else exported(model, x)
    folded, done, left = fold_graph(graph)
    assert len(done) == 9
    assert not left
    assert done["bn1"] == "into conv1"
    assert_same(folded(x), right)


@pytest.mark.parametrize("traced", [False, True], ids=["exported", "traced"])
def test_layers_that_follow_each_other(traced: bool) -> None:
    model = made(lambda: nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3), nn.BatchNorm2d(3)))
    x = image(2, 2, 3, 3)
    folded, done, _ = fold_graph(fx.symbolic_trace(model) if traced else exported(model, x))
    assert done == {"1": "into 0", "2": "into 0"}
    assert_same(folded(x), model(x))


def test_frozen_and_synchronised_layers() -> None:
    model, x = made(InvertedResidual, 2), image(2, 2, 6, 6)
    model.conv[3] = randomized(nn.SyncBatchNorm(2)).double().eval()
    right = model(x)
    batchnorm.freeze(model.train())
    folded, done, _ = fold_graph(fx.symbolic_trace(model))
    assert len(done) == 3
    assert_same(folded(x), right)
    assert len(fold_graph(exported(model, x))[1]) == 3


def test_what_does_not_follow_a_convolution_says_so() -> None:
    model, x = made(DenseNet), image(2, 2, 6, 6)
    for graph, other in ((fx.symbolic_trace(model), "cat"), (exported(model, x), "cat.default")):
        folded, done, left = fold_graph(graph)
        assert done == {}
        assert set(left) == {"norms.0", "norms.1", "norm"}
        assert left["norm"] == f"it follows {other}, not a convolution or linear layer"
        assert torch.equal(folded(x), model(x))


class Tokens(nn.Module):
    """As in LeViT: the features of all positions are normalized, which only views bring into dimension 1."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(6, channels, bias=False), nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x.flatten(1, 2))
        return self.bn(x.flatten(0, 1)).reshape_as(x)


class Mixed(Tokens):
    """Views that do not keep the features apart."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1, 2)
        turned = self.linear(x).transpose(1, 2).reshape(-1, 4)
        return self.bn(turned) + self.bn(self.linear(x).view(2, 24, 2).view(-1, 4))


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("decomposed", [False, True], ids=["exported", "decomposed"])
def test_views_between(decomposed: bool) -> None:
    model, x = made(Tokens), image(2, 2, 6, 6)
    folded, done, left = fold_graph(exported(model, x, decomposed))
    assert done == {"bn": "into linear"}
    assert left == {}
    assert_same(folded(x), model(x))
    model = made(Mixed)
    folded, done, left = fold_graph(exported(model, x, decomposed))
    assert done == {}
    assert len(left) == 2
    assert all("it follows" in why for why in left.values())
    assert_same(folded(x), model(x))


class Twice(nn.Module):
    """One convolution, used twice, with a layer for each use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.conv(self.first(self.conv(x))))


class Read(Twice):
    """Others read what the convolution gives."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.first(y) + y


class Same(Twice):
    """One layer, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.other(self.first(self.conv(x))))


class Tied(Same):
    """Two names of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.other(self.first(self.conv(x))))


class Viewed(Tied):
    """A weight that is part of another tensor's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.other.weight = nn.Parameter(self.conv.weight.detach().view(2, 2, 1, 1))


class Computed(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(F.conv2d(x, self.conv.weight * 2, self.conv.bias))


class Given(Twice):
    """Statistics that depend on the input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), x.mean((0, 2, 3)), self.first.running_var)


class Moved(Twice):
    """Statistics that the model itself changes."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(self.conv(x))
        self.first.running_mean.mul_(0.5)
        return y


class Batch(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), None, None, training=True)


class Rows(nn.Module):
    """(N, L, C) with L equal to C: the layer's channels are not the linear layer's features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.conv(x[:, 0]))


REFUSED = {
    Twice: "conv.weight is used elsewhere, too",
    Read: "others read what conv gives, too",
    Tied: ".weight is used elsewhere, too",
    Viewed: ".weight is used elsewhere, too",
    Computed: "the weight or bias of conv2d is computed, or an input",
    Given: "its running_mean is computed, or an input",
    Moved: "uses its running_mean, too, and may change it",
    Batch: "it has no running statistics",
    Rows: "gives (2, 6, 6), whose channels are not in dimension 1",
}


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize(
    ("kind", "decomposed"), [*((kind, False) for kind in REFUSED), *((kind, True) for kind in (Twice, Moved, Rows))]
)
def test_refusals_in_programs(kind: Any, decomposed: bool) -> None:
    reason = REFUSED[kind]
    model, x = made(kind, dtype=torch.float32), image(2, 2, 6, 6, dtype=torch.float32)
    if decomposed:
        reason = "it follows" if kind is Rows else reason
    program = exported(model, x, decomposed)
    right = copy.deepcopy(model)(x)
    folded, done, left = fold_graph(program)
    assert done == {}
    assert left
    assert all(reason in why for why in left.values()), left
    assert_same(folded(x), right)


@pytest.mark.parametrize("kind", [Twice, Read, Tied, Computed, Given])
def test_refusals_in_traces(kind: Any) -> None:
    model, x = made(kind), image(2, 2, 6, 6)
    folded, done, left = fold_graph(fx.symbolic_trace(model))
    assert done == {}
    assert left
    assert torch.equal(folded(x), copy.deepcopy(model)(x))


def test_one_layer_called_twice() -> None:
    model, x = made(Same), image(2, 2, 6, 6)
    folded, done, left = fold_graph(exported(model, x))
    assert done == {"first": "into conv", "first (batch_norm_1)": "into other"}  # functions only read the statistics
    assert left == {}
    assert_same(folded(x), model(x))
    _, done, left = fold_graph(fx.symbolic_trace(model))
    assert done == {}
    assert set(left.values()) == {"it is called several times"}


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("decomposed", [False, True], ids=["exported", "decomposed"])
def test_training_graphs_are_left(decomposed: bool) -> None:
    model = made(BasicBlock, 2, 2).train()
    _, done, left = fold_graph(exported(model, image(2, 2, 6, 6), decomposed))
    assert done == {}
    assert left.keys() == {"bn1", "bn2"}
    assert all("export the model in evaluation mode" in why for why in left.values())
    _, done, left = fold_graph(fx.symbolic_trace(model))
    assert done == {}
    assert set(left.values()) == {"it is in training mode: call eval() before tracing"}


def test_hooks_masks_and_subclasses_are_left() -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return F.relu(super().forward(input))

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(2, 2, 1), batchnorm.BatchNorm2d(2)
            self.parts = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), Own(2))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.parts(self.bn(self.conv(x), mask=mask))

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return isinstance(m, Own) or super().is_leaf_module(m, name)

    model = made(Masked)
    graph = fx.GraphModule(model, Tracer().trace(model))
    graph.get_submodule("parts.0").register_forward_hook(lambda module, given, result: result + 1)
    folded, done, left = fold_graph(graph)
    x, mask = image(2, 2, 3, 3), torch.ones(2, 3, 3, dtype=torch.bool)
    assert done == {}
    assert left["bn"] == "it is called with a mask"
    assert left["parts.1"] == "the forward of parts.0 has been replaced, or it has hooks"
    assert left["parts.3"] == "Own may compute something else than batch normalization"
    assert torch.equal(folded(x, mask), graph(x, mask))


def test_parts_that_the_graph_does_not_look_into_are_named() -> None:
    class Block(nn.Sequential):
        pass

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
            self.block = Block(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = self.block(x)
            return self.bn(self.conv(y))

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return isinstance(m, Block) or super().is_leaf_module(m, name)

    model, x = made(Outer), image(2, 2, 3, 3)
    why = "it is in a part that the graph does not look into"
    folded, done, left = fold_graph(fx.GraphModule(model, Tracer().trace(model)))
    assert done == {"bn": "into conv"}
    assert left == {"block.1": why}
    assert_same(folded(x), model(x))
    program = exported(model, x)
    folded, done, left = fold_graph(program)
    assert done == {"bn": "into conv"}
    assert list(left.values()) == [why]
    assert_same(folded(x), model(x))


def test_a_graph_that_is_no_graph() -> None:
    with pytest.raises(TypeError, match="cannot fold a Linear as a graph"):
        fold_graph(nn.Linear(2, 2))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # exporter's
def test_onnx_runtime_computes_the_same(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model, x = made(Kinds, dtype=torch.float32), image(dtype=torch.float32)
    folded, _, _ = fold_graph(exported(model, x))
    path = str(tmp_path / "folded.onnx")
    torch.onnx.export(folded, (x,), path, dynamo=True, verbose=False)
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(path).graph.node}
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert_same(torch.from_numpy(found), model(x).detach())
