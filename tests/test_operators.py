"""torch.compile and export: the operators keep torch's rules, the graph is whole, and results equal eager's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from expected import OURS, channels_last, every_other

# Warnings of torch's own compiler and exporter about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Sample(NamedTuple):
    """What the operators are called with."""

    x: Tensor
    weight: bool = True
    bias: bool = True
    residual: bool = False
    activation: str | None = None


SAMPLES = {
    "matrix": Sample(torch.randn(5, 3)),
    "signal": Sample(torch.randn(5, 3, 67)),
    "image": Sample(torch.randn(2, 3, 7, 5).double()),
    "bfloat16": Sample(torch.randn(2, 3, 7, 5).bfloat16()),
    "channels_last": Sample(channels_last(torch.randn(2, 3, 7, 5))),
    "gaps": Sample(every_other(torch.randn(2, 3, 7, 5))),
    "no_bias": Sample(torch.randn(2, 3, 7, 5), bias=False),
    "plain": Sample(torch.randn(2, 3, 7, 5), weight=False, bias=False),
    "relu": Sample(torch.randn(2, 3, 7, 5), activation="relu"),
    "sum": Sample(torch.randn(2, 3, 7, 5), residual=True),
    "residual": Sample(torch.randn(2, 3, 7, 5), residual=True, activation="relu"),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_operators_keep_torchs_rules(name: str) -> None:
    x, has_weight, has_bias, has_residual, activation = SAMPLES[name]
    weight = torch.rand(3, dtype=x.dtype) + 0.5 if has_weight else None
    bias = torch.rand(3, dtype=x.dtype) if has_bias else None
    residual = torch.randn_like(x) if has_residual else None
    rest = (1e-5, activation, 0.0)
    leaf = x.detach().clone(memory_format=torch.preserve_format)
    torch.library.opcheck(torch.ops.batchnorm.train, (leaf, weight, bias, residual, *rest))
    wanting = [
        None if t is None else t.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for t in (x, weight, bias, residual)
    ]
    torch.library.opcheck(torch.ops.batchnorm.train, (*wanting, *rest))
    _, moments = torch.ops.batchnorm.train(leaf, weight, bias, residual, *rest)
    for wanted in (
        [True, has_weight, has_bias, has_residual],
        [False, has_weight, False, False],
        [True, False, False, False],
    ):
        torch.library.opcheck(
            torch.ops.batchnorm.train_backward,
            (torch.randn_like(leaf), leaf, weight, bias, residual, *rest, moments, wanted),
        )


class Counting:
    """A backend that counts graphs."""

    def __init__(self) -> None:
        self.graphs: list[Any] = []

    def __call__(self, graph: Any, example: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward


def model(kind: int, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(OURS[kind](3, **options), nn.ReLU())


def assert_equal_steps(eager: nn.Module, compiled: Any, owner: nn.Module, inputs: list[Tensor]) -> None:
    for x in inputs:
        results = []
        for call, module in ((eager, eager), (compiled, owner)):
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            module.zero_grad()
            y = call(leaf)
            y.square().sum().backward()
            results.append(
                [y.detach(), leaf.grad, *(p.grad for p in module.parameters()), *(b.clone() for b in module.buffers())]
            )
        for found, right in zip(results[1], results[0], strict=True):
            slack = 2e-2 if right.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(found, right, rtol=slack, atol=slack)


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiled_whole_equals_eager(momentum: float | None, training: bool, backend: str) -> None:
    eager = model(4, momentum=momentum).train(training)
    owner = copy.deepcopy(eager)
    compiled = torch.compile(owner, fullgraph=True, backend=backend)
    assert_equal_steps(eager, compiled, owner, [torch.randn(2, 3, 7, 5) for _ in range(3)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [2, 3, 4, 5])
def test_dimensions_layouts_and_dtypes_compile(kind: int, dtype: torch.dtype) -> None:
    for layout in (torch.Tensor.contiguous, channels_last):
        torch._dynamo.reset()
        eager = model(kind, dtype=dtype)
        owner = copy.deepcopy(eager)
        compiled = torch.compile(owner, fullgraph=True, backend="aot_eager")
        assert_equal_steps(
            eager, compiled, owner, [layout(torch.randn(5, 3, 7, 3, 2)[(..., *(0,) * (5 - kind))].to(dtype))]
        )


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}], ids=str)
def test_plain_layers_compile(options: dict[str, bool]) -> None:
    eager = model(4, **options)
    owner = copy.deepcopy(eager)
    assert_equal_steps(
        eager, torch.compile(owner, fullgraph=True, backend="aot_eager"), owner, [torch.randn(2, 3, 7, 5)]
    )


def test_the_compiler_sees_one_operator_and_compiles_once() -> None:
    backend = Counting()
    owner = model(4)
    compiled = torch.compile(owner, fullgraph=True, backend=backend)
    for _ in range(4):
        compiled(torch.randn(2, 3, 7, 5))
    assert len(backend.graphs) == 1
    assert "batchnorm.train" in backend.graphs[0].code
    owner.eval()
    for _ in range(2):
        compiled(torch.randn(2, 3, 7, 5))
    assert len(backend.graphs) == 2


def test_sizes_may_change_after_one_recompilation() -> None:
    backend = Counting()
    eager = model(4)
    owner = copy.deepcopy(eager)
    compiled = torch.compile(owner, fullgraph=True, backend=backend)
    assert_equal_steps(eager, compiled, owner, [torch.randn(n, 3, 7 + n, 5) for n in (2, 3, 5, 6)])
    assert len(backend.graphs) == 2
    torch._dynamo.reset()
    owner = copy.deepcopy(eager)
    compiled = torch.compile(owner, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_equal_steps(eager, compiled, owner, [torch.randn(n, 3, 7 + n, 5) for n in (2, 3, 5)])


def test_errors_arrive_through_the_compiler() -> None:
    with pytest.raises(Exception, match="running_mean should contain 4 elements not 3"):
        torch.compile(model(4), fullgraph=True, backend="eager")(torch.randn(2, 4, 3, 3))


def test_a_bad_batch_moves_no_statistics_when_compiled() -> None:
    owner = model(4)
    compiled = torch.compile(owner, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(2, 3, 7, 5))
    before = [b.clone() for b in owner.buffers()]
    compiled(torch.full((2, 3, 7, 5), float("nan")))
    assert all(torch.equal(a, b) for a, b in zip(before, owner.buffers(), strict=True))


# --- export -------------------------------------------------------------------------------------------------


def trained(kind: int) -> nn.Module:
    made = nn.Sequential(model(kind), model(kind))
    for _ in range(3):
        made(torch.randn(5, 3, 7, 3, 2)[(..., *(0,) * (5 - kind))] * 3 + 1)
    return made.eval()


def sample(kind: int) -> Tensor:
    return torch.randn(5, 3, 7, 3, 2)[(..., *(0,) * (5 - kind))].contiguous()


@pytest.mark.parametrize("kind", [2, 3, 4, 5])
def test_exported_for_inference_it_is_torchs_own_operator(kind: int) -> None:
    made, x = trained(kind), sample(kind)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(made, (x,), dynamic_shapes=({0: batch},))
    called = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
    assert sum("batch_norm" in name for name in called) == 2
    assert not any("batchnorm." in name for name in called)
    torch.testing.assert_close(exported.module()(x[:4]), made(x[:4]))


@pytest.mark.parametrize("kind", [2, 3, 4, 5])
def test_onnx_holds_plain_batch_normalization_nodes(kind: int, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is in the group 'test'")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is in the group 'test'")
    made, x = trained(kind), sample(kind)
    path = tmp_path / "model.onnx"
    torch.onnx.export(made, (x,), path, dynamo=True, verbose=False)
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    assert nodes.count("BatchNormalization") == 2
    assert set(nodes) <= {"BatchNormalization", "Relu", "Unsqueeze", "Squeeze", "Reshape"}
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), made(x).detach(), rtol=1e-5, atol=1e-5)
