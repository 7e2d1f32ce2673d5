"""``batchnorm.functional.batch_norm`` where ``F.batch_norm`` may stand: in tracers, in scripts, in its very place."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import batchnorm.functional as ours
from batchnorm import Ghost, kernels
from batchnorm.functional import batch_norm


class Network(nn.Module):
    """Calls the function itself, with another layer's tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        bn = self.bn
        return ours.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, 0.2, eps=1e-3)


class Plain(Network):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        bn = self.bn
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, 0.2, eps=1e-3)


def pair(training: bool) -> tuple[Network, nn.Module, Tensor]:
    torch.manual_seed(0)
    network, oracle = Network().train(training), Plain().double().train(training)
    oracle.load_state_dict(network.state_dict())
    return network, oracle, torch.randn(4, 2, 5, 7)


def check(model: Any, oracle: nn.Module, x: Tensor) -> None:
    """Output, gradient and buffers are those of float64."""
    leaf, right = x.clone().requires_grad_(), x.double().requires_grad_()
    for given, run in ((leaf, model), (right, oracle)):
        run(given).pow(3).sum().backward()
    torch.testing.assert_close(model(x).double(), oracle(x.double()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(leaf.grad.double(), right.grad, rtol=1e-3, atol=1e-4)  # type: ignore[union-attr]
    buffers = dict(model.named_buffers())
    for name in ("bn.running_mean", "bn.running_var"):
        torch.testing.assert_close(buffers[name].double(), oracle.get_buffer(name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_symbolic_tracing_records_one_call_of_it(training: bool) -> None:
    network, oracle, x = pair(training)
    traced = torch.fx.symbolic_trace(network)
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [batch_norm]
    check(traced, oracle, x)
    traced(x)
    assert kernels.ran().forward == ("numba" if training else "aten")


def test_symbolic_tracing_keeps_what_only_ours_takes() -> None:
    def fused(x: Tensor, skip: Tensor) -> Tensor:
        return batch_norm(x, None, None, training=True, momentum=None, activation="relu", residual=skip)

    traced = torch.fx.symbolic_trace(fused)
    x, skip = torch.randn(4, 3, 5, 7), torch.randn(4, 3, 5, 7)
    right = (F.batch_norm(x.double(), None, None, training=True) + skip).relu()
    torch.testing.assert_close(traced(x, skip).double(), right, rtol=1e-5, atol=1e-5)
    assert kernels.ran().forward == "numba"


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_torchscript_compiles_it_as_torchs(training: bool) -> None:
    network, oracle, x = pair(training)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(network), file)
    file.seek(0)
    check(torch.jit.load(file), oracle, x)
    alone = torch.jit.script(batch_norm)
    right = F.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(alone(x, None, None, training=True).double(), right, rtol=1e-5, atol=1e-5)


def test_torchscript_says_what_it_does_not_know() -> None:
    def fused(x: Tensor) -> Tensor:
        return batch_norm(x, None, None, training=True, activation="relu")

    with pytest.raises(RuntimeError, match="Keyword argument activation unknown"):
        torch.jit.script(fused)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("kernel", [None, "aten", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_can_take_the_place_of_torchs(dtype: torch.dtype, kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that it calls is F.batch_norm, which then would be itself."""
    x = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer, oracle = nn.BatchNorm1d(3), nn.BatchNorm1d(3).double()
    if dtype == torch.float64:
        layer.double()
    right = [oracle(x.double()), oracle.eval()(x.double())]
    monkeypatch.setattr(F, "batch_norm", batch_norm)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 4e-2)
    for training, expected in zip((True, False), right, strict=True):
        with kernels.using(kernel) if kernel else torch.no_grad():
            y = layer.train(training)(x)
        assert kernels.ran().forward == (kernel or ("numba" if training and dtype != torch.float16 else "aten"))
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    assert layer.train()(x[:0]).shape == (0, 3, 5)
    if dtype.itemsize >= 4:  # torch's own has no batching rule for half precision beside float32
        torch.testing.assert_close(
            torch.func.vmap(layer.eval())(x[None]), layer(x)[None], rtol=tolerance, atol=tolerance
        )


class Noted(Tensor):
    pass


class Notes(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.called: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(func)
        return func(*args, **(kwargs or {}))


def test_subclasses_and_modes_see_one_function() -> None:
    x = torch.randn(6, 3, 5)
    y = batch_norm(x.as_subclass(Noted), None, None, training=True)
    assert type(y) is Noted
    with Notes() as notes:
        plain = batch_norm(x, None, None, training=True)
    assert notes.called == [batch_norm]
    torch.testing.assert_close(y.as_subclass(Tensor), plain)


def test_a_default_device_does_not_break_the_compiler() -> None:
    x, layer = torch.randn(6, 3, 5), batchnorm_layer()
    with torch.device("cpu"):
        y = torch.compile(layer, fullgraph=True, backend="eager")(x)
    right = F.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(y.detach().double(), right, rtol=1e-5, atol=1e-5)


def batchnorm_layer() -> nn.Module:
    from batchnorm import BatchNorm1d

    return BatchNorm1d(3)


@pytest.mark.parametrize(
    "more", [{}, {"statistics": Ghost(2)}, {"mask": torch.ones(4, 5) > 0}], ids=["", "ghost", "mask"]
)
def test_a_count_of_batches_of_another_dtype_is_not_for_the_numba_kernel(more: dict[str, Any]) -> None:
    x, mean, var = torch.randn(4, 3, 5), torch.zeros(3), torch.ones(3)
    batches = torch.tensor(0, dtype=torch.int32)
    batch_norm(x, mean, var, training=True, num_batches_tracked=batches, **more)
    assert kernels.ran().forward == ("reference" if more else "aten")
    assert batches == (2 if "statistics" in more else 1)
    with kernels.using("numba"), pytest.raises(RuntimeError, match=r"num_batches_tracked is torch.int32, not int64"):
        batch_norm(x, mean, var, training=True, num_batches_tracked=batches, **more)
