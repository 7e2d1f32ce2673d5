"""Layers of a model become ours and torch.nn's again without losing anything."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import batchnorm
from batchnorm import kernels
from waiting import HANGS_AFTER

KINDS = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]
BF16 = torch.bfloat16


def network(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, **options), nn.ReLU(), nn.BatchNorm2d(3))


def image() -> Tensor:
    return torch.randn(4, 2, 3, 5, generator=torch.Generator().manual_seed(1))


def test_a_converted_model_computes_the_same_with_our_kernels() -> None:
    model, plain = network(), network()
    report = batchnorm.convert(model)
    assert report.converted == {"1": "BatchNorm2d", "3": "BatchNorm2d"}
    assert report.skipped == {}
    assert str(report) == "2 converted, 0 skipped\n  1: BatchNorm2d\n  3: BatchNorm2d"
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(image()), plain.train(training)(image()))
        assert kernels.ran().forward == ("numba" if training else "aten")
    assert type(model[1]) is batchnorm.BatchNorm2d
    again = batchnorm.convert(model)
    assert again.converted == again.skipped == {}


@pytest.mark.parametrize("kind", [*KINDS, *(f"Lazy{kind}" for kind in KINDS)])
def test_there_and_back_is_lossless(kind: str) -> None:
    arguments = () if kind.startswith("Lazy") else (3,)
    layer = getattr(nn, kind)(*arguments, eps=1e-3, momentum=None).eval()
    if arguments:
        layer.num_batches_tracked += 7
    layer.own = ["anything"]
    seen = []
    layer.register_forward_hook(lambda module, given, y: seen.append(module))
    before, tensors = dict(vars(layer)), list(layer.state_dict(keep_vars=True).values())
    assert batchnorm.convert(layer).converted == {"": kind}  # the model is the layer
    assert type(layer) is getattr(batchnorm, kind)
    assert isinstance(layer, getattr(nn, kind))
    if arguments:
        layer(torch.randn(4, 3, *(2, 2, 2)[: int(kind[-2])]))
        assert seen == [layer]
    assert batchnorm.revert(layer).converted == {"": kind}
    assert type(layer) is getattr(nn, kind)
    assert vars(layer) == before
    assert all(a is b for a, b in zip(layer.state_dict(keep_vars=True).values(), tensors, strict=True))


def test_lazy_layers_become_ours_at_the_first_input() -> None:
    model = nn.Sequential(nn.LazyBatchNorm2d())
    batchnorm.convert(model)
    model(image())
    assert type(model[0]) is batchnorm.BatchNorm2d
    lazy = batchnorm.LazyBatchNorm2d(dtype=BF16)
    batchnorm.revert(lazy)
    assert lazy(image().to(BF16)).dtype == lazy.running_mean.dtype == BF16


def test_shared_layers_stay_shared_and_optimizers_keep_their_parameters() -> None:
    shared = nn.BatchNorm2d(2)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert batchnorm.convert(model).converted == {"a": "BatchNorm2d"}
    assert model["a"] is model["b"][0] is shared
    before = shared.weight.detach().clone()
    model["b"](image()).pow(3).sum().backward()
    optimizer.step()
    assert not torch.equal(shared.weight, before)


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_half_precision_statistics_become_float32_and_narrow_again(dtype: torch.dtype) -> None:
    model = network()
    model(image())
    model.to(dtype)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    batchnorm.convert(model)
    assert model[1].running_var.dtype == torch.float32
    assert all(torch.equal(t.to(before[name].dtype), before[name]) for name, t in model.state_dict().items())
    batchnorm.revert(model)
    after = model.state_dict()
    assert all(after[name].dtype == t.dtype and torch.equal(after[name], t) for name, t in before.items())
    assert model(image().to(dtype)).dtype == model.eval()(image().to(dtype)).dtype == dtype
    bare = nn.BatchNorm2d(2, affine=False).to(dtype)
    batchnorm.convert(bare)
    batchnorm.revert(bare)
    assert bare(image().to(dtype)).dtype == bare.eval()(image().to(dtype)).dtype == dtype


def test_state_dicts_load_both_ways() -> None:
    model, plain = network(), network()
    batchnorm.convert(model)
    model(image())
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(plain.eval()(image()), model.eval()(image()))


class Shifted(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class OwnShifted(batchnorm.BatchNorm2d):
    pass


class FrozenBatchNorm2d(nn.Module):
    pass


def patched() -> nn.Module:
    layer = nn.BatchNorm2d(3)
    layer.forward = lambda x: x
    return layer


LEFT = {
    "a subclass": (Shifted(3), "Shifted is a subclass"),
    "of ours": (OwnShifted(3), "OwnShifted is a subclass"),
    "synchronized": (nn.SyncBatchNorm(3), "over all processes, which convert(model, statistics=Sync()) keeps"),
    "another": (FrozenBatchNorm2d(), "FrozenBatchNorm2d is not torch.nn's"),
    "parametrized": (nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(3), dim=None), "is a subclass"),
    "patched": (patched(), "its forward has been replaced"),
    "momentum": (nn.BatchNorm2d(3, momentum=2.0), "momentum 2 is not between 0 and 1"),
    "eps": (nn.BatchNorm2d(3, eps=0.0), "eps 0 is not above 0"),
}


@pytest.mark.parametrize(("layer", "reason"), LEFT.values(), ids=LEFT.keys())
def test_what_might_compute_something_else_is_left(layer: nn.Module, reason: str) -> None:
    kind = type(layer)
    report = batchnorm.convert(nn.Sequential(nn.Identity(), layer))
    assert report.converted == {}
    assert list(report.skipped) == ["1"]
    assert reason in report.skipped["1"]
    assert type(layer) is kind
    assert "  1: skipped, " in str(report)
    back = batchnorm.revert(nn.Sequential(layer))
    assert back.converted == {}
    assert list(back.skipped) == (["0"] if kind is OwnShifted else [])


def test_other_normalizations_are_none_of_its_business() -> None:
    report = batchnorm.convert(nn.Sequential(nn.LayerNorm(3), nn.InstanceNorm2d(3), nn.GroupNorm(1, 3)))
    assert report.converted == report.skipped == {}


def test_revert_leaves_what_torch_nn_has_not() -> None:
    model = nn.Sequential(batchnorm.BatchNorm2d(3, activation="relu"), batchnorm.BatchNorm2d(3, inplace=True))
    report = batchnorm.revert(model)
    assert report.converted == {"1": "BatchNorm2d"}
    assert report.skipped["0"].startswith("it has the activation relu, which no layer of torch.nn has")
    model[0].activation = None
    assert batchnorm.revert(model).converted == {"0": "BatchNorm2d"}
    assert repr(model[0]) == repr(nn.BatchNorm2d(3))


WITHOUT_US = """
import pickle, sys
sys.modules["batchnorm"] = None  # an import of it fails
import torch
with open(sys.argv[1], "rb") as file:
    model, x, y = pickle.load(file)
torch.testing.assert_close(model(x), y)
"""


def test_a_reverted_model_loads_where_this_package_is_not(tmp_path: Path) -> None:
    model = network()
    batchnorm.convert(model)
    model(image())
    fused = batchnorm.fuse(model).model
    for given in (model, fused):
        batchnorm.revert(given.eval())
        file = tmp_path / "model.pickle"
        file.write_bytes(pickle.dumps((given, image(), given(image()).detach())))
        subprocess.run([sys.executable, "-c", WITHOUT_US, str(file)], check=True, timeout=HANGS_AFTER)


def test_copies_of_a_converted_model_are_ours() -> None:
    model = network()
    batchnorm.convert(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin[1]) is batchnorm.BatchNorm2d
        torch.testing.assert_close(twin(image()), network()(image()))


def test_synchronized_layers_of_torch_nn_become_ours_with_sync_and_go_back() -> None:
    group: Any = object()
    layer = nn.SyncBatchNorm(3, momentum=None, process_group=group)
    model = nn.Sequential(layer)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    report = batchnorm.convert(model, statistics=batchnorm.Sync())
    assert model[0] is layer
    assert list(report.converted) == ["0"]
    assert layer.statistics.process_group is group
    assert batchnorm.convert(model, statistics=batchnorm.Renorm(over=batchnorm.Sync())).skipped == {}
    assert layer.statistics.over.process_group is group
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(layer.eval()(x), nn.BatchNorm1d(3).eval()(x))
    batchnorm.convert(model, statistics=batchnorm.Sync())
    assert list(batchnorm.revert(model).converted) == ["0"]
    assert type(layer) is nn.SyncBatchNorm
    assert layer.process_group is group
    assert layer.momentum is None
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("statistics", [None, batchnorm.Ghost(2), batchnorm.Accumulated(2)], ids=str)
@pytest.mark.parametrize("around", [FakeTensorMode, lambda: torch.device("meta")], ids=["fake", "meta"])
def test_models_without_memory_are_converted(around: Any, statistics: Any) -> None:
    with around():
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, dtype=torch.bfloat16), nn.BatchNorm2d(4))
        report = batchnorm.convert(model, statistics)
        assert list(report.converted) == ["1", "2"]
        assert model[1].running_var.dtype == torch.float32
        batchnorm.revert(model)
        assert model[1].running_var.dtype == torch.bfloat16
