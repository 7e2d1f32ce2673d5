"""A frozen layer that the convolution before it computes: the same outputs and gradients, less kept, and undone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import DenseNet, ResNet, Undecided, randomized
from torch import Tensor, nn

import batchnorm


def image(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def pair(source: nn.Module, norm: nn.Module, affine: bool = False) -> nn.Sequential:
    """Two frozen copies of the same pair, the second one folded."""
    torch.manual_seed(0)
    plain = randomized(nn.Sequential(source, norm)).double()
    batchnorm.freeze(plain, affine=affine)
    return plain


PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(2, 3, 2, bias=False), lambda: nn.BatchNorm1d(3), (2, 2, 4)),
    "2d": (lambda: nn.Conv2d(2, 4, 2, groups=2), lambda: batchnorm.BatchNorm2d(4), (2, 2, 3, 2)),
    "reflected": (
        lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), lambda: nn.SyncBatchNorm(2), (1, 2, 3, 2)
    ),
    "3d": (lambda: nn.Conv3d(1, 2, 1), lambda: nn.BatchNorm3d(2, affine=False), (2, 1, 2, 1, 2)),
    "activated": (
        lambda: nn.Conv2d(1, 2, 2), lambda: batchnorm.BatchNorm2d(2, activation="silu"), (2, 1, 3, 2)
    ),
    "linear": (lambda: nn.Linear(3, 2), lambda: nn.BatchNorm1d(2), (3, 3)),
}  # fmt: skip


@pytest.mark.parametrize(("source", "norm", "shape"), PAIRS.values(), ids=PAIRS.keys())
def test_derivatives_are_those_of_the_layers_apart(source: Any, norm: Any, shape: tuple[int, ...]) -> None:
    plain = pair(source(), norm())
    folded = copy.deepcopy(plain)
    assert batchnorm.fold_frozen(folded).folded == {"1": "into 0"}
    x = image(*shape).requires_grad_()
    parameters = [p for p in folded.parameters() if p.requires_grad]
    assert len(parameters) == len(list(plain.parameters()))

    def outputs(x: Tensor, *_: Tensor) -> Tensor:
        return folded(x)

    assert torch.autograd.gradcheck(outputs, (x, *parameters))
    right, found = plain(x), folded(x)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    weights = image(*right.shape)
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), [x, *parameters]),
        torch.autograd.grad((right * weights).sum(), [x, *plain.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def steps(model: nn.Module, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses of three steps of gradient descent, and the state afterwards."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05, momentum=0.9)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model.train()(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("ours", [False, True], ids=["torch", "fused"])
@pytest.mark.parametrize("affine", [True, False], ids=["fixed", "learning"])
def test_a_network_trains_alike_and_comes_back(ours: bool, affine: bool) -> None:
    torch.manual_seed(0)
    model, x = randomized(ResNet()).double(), image(2, 2, 5, 5)
    if ours:
        model = batchnorm.fuse(model, x).model
    batchnorm.freeze(model, affine=affine)
    plain, kinds, keys = copy.deepcopy(model), [type(m) for m in model.modules()], list(model.state_dict())
    modules, parameters = list(model.modules()), list(model.parameters())
    report = batchnorm.fold_frozen(model)
    assert str(report).startswith("9 folded, 0 left\n  bn1: into conv1\n")
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    right, found = steps(plain, x), steps(model, x)
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-11)
    y = model(x)
    with pytest.raises(RuntimeError, match="fold_frozen"):
        batchnorm.unfreeze(model)
    assert batchnorm.fold_frozen(model).folded == dict.fromkeys(report.folded, "folded already")
    assert batchnorm.unfold_frozen(model) == tuple(report.folded)
    assert [type(m) for m in model.modules()] == kinds
    assert not any("_layer" in vars(m) for m in model.modules())
    torch.testing.assert_close(model(x), y)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-9, atol=1e-11)
    assert batchnorm.unfold_frozen(model) == ()
    assert len(batchnorm.unfreeze(model)) == 9


def test_copies_and_pickles_are_folded_by_themselves() -> None:
    model = pair(nn.Conv2d(2, 3, 1), batchnorm.BatchNorm2d(3, activation="relu"))
    batchnorm.fold_frozen(model)
    x = image(2, 2, 3, 3)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        assert twin[0]._layer[0] is twin[1]
        with torch.no_grad():
            twin[1].weight.zero_()
        assert not torch.equal(twin(x), model(x))
        assert batchnorm.unfold_frozen(twin) == ("1",)
        assert type(twin[0]) is nn.Conv2d
        assert batchnorm.unfreeze(twin) == ("1",)


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes kept for the backward that are neither the input nor parameters or buffers."""
    known = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = model(x)
    assert y.requires_grad
    return sum(found.values())


def test_the_convolutions_result_is_not_kept() -> None:
    x = image(2, 2, 16, 16, dtype=torch.float32)
    activation = 2 * 4 * 16 * 16 * 4
    for affine, before in ((False, activation), (True, 0)):
        model = pair(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), affine).float()
        apart = kept(model, x)
        batchnorm.fold_frozen(model)
        together = kept(model, x)
        assert before <= apart < before + 1000
        assert together < 1000


def test_export_and_compile_see_a_convolution() -> None:
    model = pair(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    x = image(2, 2, 3, 3)
    right = model(x)
    batchnorm.fold_frozen(model)
    program = torch.export.export(model, (x,))
    assert "batch_norm" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), right)
    with pytest.raises(RuntimeError, match="unfold_frozen"):
        torch.jit.script(model)


def test_what_is_left_and_why() -> None:
    model = nn.Sequential(DenseNet(), nn.Sequential(nn.Linear(8, 3), nn.BatchNorm1d(3)))
    model.append(nn.Sequential(nn.ConvTranspose1d(3, 3, 1), nn.BatchNorm1d(3)))
    with pytest.raises(ValueError, match=r"call batchnorm\.freeze"):
        batchnorm.fold_frozen(model)
    batchnorm.freeze(model)
    report = batchnorm.fold_frozen(model)
    assert report.folded == {"1.1": "into 1.0"}
    assert report.skipped.keys() == {"0.norms.0", "0.norms.1", "0.norm", "2.1"}
    assert report.skipped["2.1"] == "2.0 is a ConvTranspose1d"
    assert report.skipped["0.norm"] == "it follows cat, not a convolution or linear layer"


def test_what_cannot_be_traced_needs_inputs() -> None:
    model = randomized(Undecided(nn.ReLU()))
    x = image(2, 2, 3, 3, dtype=torch.float32)
    batchnorm.freeze(model)
    right = model(x)
    assert batchnorm.fold_frozen(model).skipped["norm"] == "example_inputs would show whether it can be folded"
    assert batchnorm.fold_frozen(model, x).folded == {"norm": "into conv"}
    torch.testing.assert_close(model(x), right, rtol=1e-5, atol=1e-5)


def test_channels_must_be_where_the_convolution_puts_them() -> None:
    model = pair(nn.Linear(4, 4), nn.BatchNorm1d(4))
    batchnorm.fold_frozen(model)
    with pytest.raises(RuntimeError, match=r"expected 2D input \(got 3D input\): this Linear does"):
        model(image(2, 4, 4))
    ours = pair(nn.Conv1d(1, 1, 1), batchnorm.BatchNorm1d(1))
    batchnorm.fold_frozen(ours)
    with pytest.raises(RuntimeError, match="takes no mask"):
        ours[1](image(1, 1, 2), mask=torch.ones(1, 2))
