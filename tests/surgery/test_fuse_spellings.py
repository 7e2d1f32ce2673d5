"""Activations are known however a forward spells them, in forwards that can be traced and in those that cannot."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import randomized
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm import kernels
from batchnorm.surgery.fusing.ahead import Activated

Spelling = Callable[[Any, Tensor], Tensor]


SPELLINGS: dict[str, tuple[Spelling, str]] = {
    "F.relu": (lambda m, y: F.relu(y), "relu"),
    "F.relu in place": (lambda m, y: F.relu(y, inplace=True), "relu"),
    "F.relu in place, by position": (lambda m, y: F.relu(y, True), "relu"),
    "torch.relu": (lambda m, y: torch.relu(y), "relu"),
    "torch.relu_": (lambda m, y: torch.relu_(y), "relu"),
    "relu": (lambda m, y: y.relu(), "relu"),
    "relu_": (lambda m, y: y.relu_(), "relu"),
    "clamp": (lambda m, y: torch.clamp(y, min=0), "relu"),
    "clamp, by position": (lambda m, y: y.clamp(0), "relu"),
    "clamp_": (lambda m, y: y.clamp_(min=0.0), "relu"),
    "clamp_min": (lambda m, y: y.clamp_min(0), "relu"),
    "clip to 6": (lambda m, y: torch.clip(y, 0, 6), "relu6"),
    "clamp to 6": (lambda m, y: y.clamp(min=0, max=6), "relu6"),
    "hardtanh to 6": (lambda m, y: F.hardtanh(y, 0.0, 6.0), "relu6"),
    "F.relu6": (lambda m, y: F.relu6(y), "relu6"),
    "made on the way": (lambda m, y: nn.ReLU()(y), "relu"),
    "made on the way, in place": (lambda m, y: nn.LeakyReLU(0.2, inplace=True)(y), "leaky_relu"),
    "ReLU6 made on the way": (lambda m, y: nn.ReLU6()(y), "relu6"),
    "Hardtanh made on the way": (lambda m, y: nn.Hardtanh(0, 6)(y), "relu6"),
    "F.leaky_relu_": (lambda m, y: F.leaky_relu_(y, 0.2), "leaky_relu"),
    "F.elu": (lambda m, y: F.elu(y, alpha=0.5), "elu"),
    "F.gelu": (lambda m, y: F.gelu(y), "gelu"),
    "F.gelu, tanh": (lambda m, y: F.gelu(y, approximate="tanh"), "gelu_tanh"),
    "F.silu": (lambda m, y: F.silu(y), "silu"),
    "F.hardswish": (lambda m, y: F.hardswish(y), "hardswish"),
    "y * y.sigmoid()": (lambda m, y: y * y.sigmoid(), "silu"),
    "torch.sigmoid(y) * y": (lambda m, y: torch.sigmoid(y) * y, "silu"),
    "torch.mul(y, F.sigmoid(y))": (lambda m, y: torch.mul(y, F.sigmoid(y)), "silu"),
    "y * nn.Sigmoid()(y)": (lambda m, y: y * nn.Sigmoid()(y), "silu"),
    "y * F.hardsigmoid(y)": (lambda m, y: y * F.hardsigmoid(y), "hardswish"),
    "y * nn.Hardsigmoid()(y)": (lambda m, y: nn.Hardsigmoid()(y).mul(y), "hardswish"),
    "y * F.relu6(y + 3) / 6": (lambda m, y: y * F.relu6(y + 3) / 6, "hardswish"),
    "y * (F.relu6(y + 3.0, True) / 6.0)": (lambda m, y: y * (F.relu6(y + 3.0, True) / 6.0), "hardswish"),
    "(3 + y).clamp(0, 6) * (1 / 6) * y": (lambda m, y: (3 + y).clamp(0, 6) * (1 / 6) * y, "hardswish"),
    "y * nn.ReLU6()(y + 3) / 6": (lambda m, y: y * nn.ReLU6()(y + 3) / 6, "hardswish"),
    "torch.div(torch.mul(y, …), 6)": (
        lambda m, y: torch.div(torch.mul(F.hardtanh(torch.add(y, 3), 0, 6), y), 6), "hardswish",
    ),
    "of a shape": (lambda m, y: F.relu(y).reshape(y.shape), "relu"),
    "behind an identity": (lambda m, y: F.relu(m.identity(y)), "relu"),
}  # fmt: skip
OTHERS: dict[str, Spelling] = {
    "another bound": lambda m, y: y.clamp(min=0.1),
    "two bounds": lambda m, y: torch.clamp(y, -1, 1),
    "hardtanh": lambda m, y: F.hardtanh(y),
    "relu plus itself": lambda m, y: F.relu(y) + y,
    "the gate is read, too": lambda m, y: (lambda gate: y * gate + gate)(y.sigmoid()),
    "its square is gated": lambda m, y: y * y * y.sigmoid(),
    "another gate": lambda m, y: y * (y + 1).sigmoid(),
    "another slope": lambda m, y: y * F.relu6(y + 3) / 5,
    "six by it": lambda m, y: 6 / (y * F.relu6(y + 3) + 9),
    "two more": lambda m, y: y * F.relu6(y + 2) / 6,
    "written before": lambda m, y: (lambda z: y * F.relu6(z) / 6)(y.add_(3)),
    "only a gate": lambda m, y: y.sigmoid(),
    "in place, and read": lambda m, y: (lambda z: y * 2 + z)(F.relu(y.clone()) + 0 * y),
}


class Block(nn.Module):
    def __init__(self, spelling: Spelling, traceable: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.identity = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Identity()
        self.spelling, self.traceable = spelling, traceable

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable and x.sum() > 1e9:
            x = x - 1
        return self.spelling(self, self.bn(self.conv(x)))


def image() -> Tensor:
    return 3 * torch.randn(4, 2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, training: bool) -> dict[str, Tensor]:
    model, x = copy.deepcopy(model).train(training), image().requires_grad_()
    with kernels.using("aten"):
        y = model(x)
        assert type(y) is Tensor
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())
    return found | {"y": y.detach(), "x": x.grad}


def code_of(spelling: Spelling) -> str:
    return " ".join(spelling.__code__.co_names).lower()


def assert_computes_the_same(fused: nn.Module, model: nn.Module, tolerance: float = 1e-9) -> None:
    for training in (True, False):
        found, right = step(fused, training), step(model, training)
        for name, t in right.items():
            torch.testing.assert_close(
                found[name], t, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


def block(spelling: Spelling, traceable: bool) -> nn.Module:
    torch.manual_seed(0)
    return randomized(Block(spelling, traceable)).double()


@pytest.mark.parametrize("traceable", [True, False], ids=["traced", "observed"])
@pytest.mark.parametrize(("spelling", "name"), SPELLINGS.values(), ids=SPELLINGS.keys())
def test_spellings(spelling: Spelling, name: str, traceable: bool) -> None:
    model = block(spelling, traceable)
    result = batchnorm.fuse(model, image())
    assert result.fused == {"bn": name}
    assert result.method == {"bn": "forward rewritten" if traceable else "done ahead"}
    # torch's derivative of hardsigmoid has a sixth in single precision.
    assert_computes_the_same(result.model, model, 1e-6 if "hardsigmoid" in code_of(spelling) else 1e-9)
    assert batchnorm.revert(result.model).skipped == {}
    assert_computes_the_same(result.model, model)
    assert [vars(m).keys() for m in result.model.modules()] == [vars(m).keys() for m in model.modules()]


@pytest.mark.parametrize("traceable", [True, False], ids=["traced", "observed"])
@pytest.mark.parametrize("spelling", OTHERS.values(), ids=OTHERS.keys())
def test_what_only_looks_like_an_activation_is_left(spelling: Spelling, traceable: bool) -> None:
    model = block(spelling, traceable)
    result = batchnorm.fuse(model, image())
    assert result.fused == {}
    assert_computes_the_same(result.model, model)


@pytest.mark.parametrize("traceable", [True, False], ids=["traced", "observed"])
def test_a_clamp_is_no_activation_where_channels_start_from_zero(traceable: bool) -> None:
    """At exactly 0 a clamp hands gradients on and a relu does not, so that such a channel would never learn."""
    model = block(lambda m, y: y.clamp(min=0), traceable)
    with torch.no_grad():
        model.bn.weight[1] = model.bn.bias[1] = 0
    result = batchnorm.fuse(model, image())
    assert result.fused == {}
    assert "clamp" in result.skipped["bn"]
    assert step(result.model, True)["bn.bias"][1] != 0
    relu = block(lambda m, y: F.relu(y), traceable)
    relu.load_state_dict(model.state_dict())
    assert batchnorm.fuse(relu, image()).fused == {"bn": "relu"}


# --- done ahead ---


def shared(m: Any, y: Tensor) -> Tensor:
    return m.act(m.second(m.act(y)))


def test_a_shared_module_serves_several_layers_ahead() -> None:
    model = block(shared, False)
    model.act, model.second = nn.SiLU(), randomized(nn.BatchNorm2d(4)).double()
    result = batchnorm.fuse(model, image())
    assert result.fused == {"bn": "silu", "second": "silu"}
    assert set(result.method.values()) == {"done ahead"}
    assert type(result.model.act) is nn.SiLU
    assert_computes_the_same(result.model, model)


def test_what_a_forward_asks_about_the_output_is_answered() -> None:
    def curious(m: Any, y: Tensor) -> Tensor:
        n, c = y.size(0), y.shape[1]
        assert y.dim() == y.ndim == len(y.shape) == 4
        assert y.is_floating_point()
        assert torch.is_tensor(y)
        assert y.dtype == torch.float64
        assert y.requires_grad == torch.is_grad_enabled()
        assert len(y) == n
        return F.gelu(y).view(n, c, -1)

    model = block(curious, False)
    result = batchnorm.fuse(model, image())
    assert result.fused == {"bn": "gelu"}
    assert_computes_the_same(result.model, model)


def test_after_an_activation_in_place_the_tensor_itself_is_read() -> None:
    def written(m: Any, y: Tensor) -> Tensor:
        F.relu(y, inplace=True)
        return y * 2 + y

    model = block(written, False)
    result = batchnorm.fuse(model, image())
    assert result.fused == {"bn": "relu"}
    assert_computes_the_same(result.model, model)


def test_a_path_that_no_example_took_is_an_error_and_nothing_wrong() -> None:
    class Forks(Block):
        def forward(self, x: Tensor) -> Any:
            y = self.bn(self.conv(x))
            if x.mean() > 100:
                return y.tanh() if x.mean() < 1e4 else y
            return F.silu(y)

    torch.manual_seed(0)
    model = randomized(Forks(F.silu, False)).double()
    fused = batchnorm.fuse(model, image()).model.eval()
    assert fused.bn._ahead is not None
    with pytest.raises(
        RuntimeError, match=r"tanh reads the output of bn, .* silu has been applied .* batchnorm.revert"
    ):
        fused(image() + 1000)
    given_away = fused(image() + 1e5)
    assert type(given_away) is Activated
    with pytest.raises(RuntimeError, match="sum reads the output of bn"):
        given_away.sum()
    batchnorm.revert(fused)
    with kernels.using("aten"):
        torch.testing.assert_close(fused(image() + 1000), model.eval()(image() + 1000))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_that_is_switched_on_later_is_right_or_nan(reentrant: bool) -> None:
    """A reentrant one hands on another tensor object than it got, of which nobody knows that it is activated."""

    class Switched(Block):
        saving = False

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.conv(x))
            return (
                checkpoint(F.silu, y, use_reentrant=reentrant) if self.saving else F.silu(y[:] if x.sum() > 1e9 else y)
            )

    torch.manual_seed(0)
    model = randomized(Switched(F.silu, False)).double()
    result = batchnorm.fuse(model, image())
    assert result.method == {"bn": "done ahead"}
    model.saving = result.model.saving = True
    with kernels.using("aten"):
        found, right = result.model(image()), model(image())
    assert torch.allclose(found, right) or (reentrant and found.isnan().all())


def test_copies_pickles_and_frozen_layers_stay_right() -> None:
    model = block(lambda m, y: y * y.sigmoid(), False)
    model.spelling = gated
    fused = batchnorm.fuse(model, image()).model
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), batchnorm.fuse(fused, image()).model):
        assert twin.bn._ahead is not None
        assert_computes_the_same(twin, model)
    assert batchnorm.fuse(fused, image()).skipped == {"bn": "it has the activation silu already"}
    frozen = copy.deepcopy(fused)
    batchnorm.freeze(frozen)
    right = copy.deepcopy(model).eval()
    with kernels.using("aten"):
        torch.testing.assert_close(frozen.train()(image()), right(image()))


def gated(m: Any, y: Tensor) -> Tensor:
    return y * y.sigmoid()


def test_who_replaces_the_layer_leaves_the_activation_to_the_forward() -> None:
    model = block(gated, False)
    fused = batchnorm.fuse(model, image()).model.eval()
    right = model.eval()(image())
    for change in (nn.SyncBatchNorm.convert_sync_batchnorm, lambda m: batchnorm.fold(m, image()).model):
        with kernels.using("aten"):
            torch.testing.assert_close(change(copy.deepcopy(fused))(image()), right)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_compilers_and_recorders_see_the_forwards_own_activation() -> None:
    class Optional(Block):
        def forward(self, x: Tensor, raw: bool = False) -> Tensor:
            y = self.bn(self.conv(x))
            return y if raw else F.silu(y)

    torch.manual_seed(0)
    model = randomized(Optional(F.silu, False)).double()
    result = batchnorm.fuse(model, image())
    assert result.method == {"bn": "done ahead"}
    fused, right = result.model.eval(), model.eval()(image())
    close = torch.testing.assert_close
    close(torch.compile(fused, backend="eager", fullgraph=True)(image()), right)
    close(torch.export.export(fused, (image(),)).module()(image()), right)
    close(torch.fx.symbolic_trace(fused, concrete_args={"raw": False})(image()), right)
    close(torch.jit.trace(fused, (image(),))(image()), right)
    close(torch.jit.script(fused)(image()), right)
    close(torch.func.vmap(fused)(image()[None])[0], right)
    grad = torch.func.grad(lambda x: fused(x).square().sum())(image())
    close(grad, torch.func.grad(lambda x: model(x).square().sum())(image()))


def test_ahead_needs_no_hooks_to_see_the_output() -> None:
    model = nn.Sequential(block(gated, False))
    inner = nn.Sequential(model[0].conv, model[0].bn)
    model[0].conv, model[0].bn = nn.Identity(), inner
    inner.register_forward_hook(lambda *_: None)
    result = batchnorm.fuse(model, image())
    assert result.fused == {}
    assert result.skipped["0.bn.1"] == "0.bn has hooks, which would see the fused output"


def test_the_loops_compute_what_is_done_ahead() -> None:
    model = block(lambda m, y: F.relu(y), False).float()
    fused = batchnorm.fuse(model, image().float()).model
    x = image().float()
    y = fused(x)
    assert kernels.ran().forward == "numba"
    with kernels.using("aten"):
        torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)
