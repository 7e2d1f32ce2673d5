"""Whatever is tried on a model within `preserved`, and however it ends, the model is afterwards what it was."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from networks import DenseNet, ResNet, randomized
from snapshot import Snapshot
from torch import Tensor, nn

import batchnorm
from batchnorm.surgery.inspect.preserve import preserved
from batchnorm.surgery.inspect.restoring import completely


class StopError(Exception):
    pass


def network() -> nn.Module:
    torch.manual_seed(0)
    model = randomized(ResNet())
    batchnorm.convert(model.layer1)
    model.layer1[0].bn1.statistics = batchnorm.Accumulated(2)
    model.layer2.register_forward_hook(lambda *given: None)
    model(image()).square().sum().backward()  # gradients, and statistics that have moved
    model.bn1.eval()
    model.fc.bias.requires_grad_(False)
    return model


def image() -> Tensor:
    return torch.randn(4, 2, 5, 7, generator=torch.Generator().manual_seed(1))


def change_all(model: Any) -> None:
    """Change all that is promised to come back."""
    model.train(not model.training)
    for module in list(model.modules()):
        module.register_forward_hook(lambda *given: None)
        module.register_full_backward_hook(lambda *given: None)
        module.note = "new"
        for buffer in module.buffers(recurse=False):
            buffer.add_(1)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum, module.eps, module.track_running_stats = None, 0.5, False
            module.running_mean = torch.full_like(module.running_mean, torch.nan)
    model.layer1[0].bn1.forward = lambda x: x
    batchnorm.revert(model.layer1)
    model.layer2.add_module("more", nn.Linear(2, 2))
    del model.about["name"]
    model.fc.weight.requires_grad_(False)
    model.fc.bias.requires_grad_(True)
    model.fc = nn.Identity()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.rand(3)
    random.random()
    np.random.rand()


@pytest.mark.parametrize("ending", [None, StopError, KeyboardInterrupt, SystemExit])
def test_everything_comes_back(ending: type[BaseException] | None) -> None:
    model = network()
    before = Snapshot(model)

    def tried() -> None:
        with preserved(model):
            change_all(model)
            if ending is not None:
                raise ending

    if ending is None:
        tried()
    else:
        with pytest.raises(ending):
            tried()
    before.assert_unchanged()


def test_the_snapshot_of_these_tests_sees_what_is_changed() -> None:
    model = network()
    before = Snapshot(model)
    model.bn1.running_mean[0] += 1e-6
    with pytest.raises(AssertionError, match="bn1"):
        before.assert_unchanged()


LAYERS = [name for name, module in network().named_modules() if not module._modules and name]


@pytest.mark.parametrize("where", LAYERS)
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_an_exception_at_any_layer(where: str, when: str) -> None:
    model = network()
    before = Snapshot(model)

    def fail(*given: Any) -> None:
        raise StopError

    def tried() -> None:
        with preserved(model):
            layer = model.train().get_submodule(where)
            layer.register_forward_hook(
                fail if when == "forward" else lambda m, args, y: y.register_hook(fail) and None
            )
            model(image()).sum().backward()

    with pytest.raises(StopError):
        tried()
    before.assert_unchanged()


def test_hooks_are_removable_afterwards() -> None:
    model = nn.BatchNorm1d(2)
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *given: calls.append(1))
    with preserved(model):
        handle.remove()
        model.register_forward_hook(lambda *given: calls.append(2))
        model(torch.randn(3, 2))
    assert calls == [2]
    model(torch.randn(3, 2))
    assert calls == [2, 1]
    handle.remove()
    model(torch.randn(3, 2))
    assert calls == [2, 1]


def test_gradients_within_do_not_reach_those_before() -> None:
    model = nn.Linear(2, 1)
    model(torch.ones(1, 2)).backward()
    grad = model.weight.grad
    with preserved(model):
        assert model.weight.grad is None
        model(torch.ones(1, 2)).backward()
    assert model.weight.grad is grad
    assert grad.tolist() == [[1, 1]]


def test_named_tensors_come_back_and_their_dtype_too() -> None:
    model = randomized(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    before = Snapshot(model)
    with preserved(model, [model[1].weight]), torch.no_grad():
        model[1].weight.zero_()
    before.assert_unchanged()
    with preserved(model):
        model.half()
    before.assert_unchanged()


def test_buffers_that_changed_their_form() -> None:
    model = nn.BatchNorm1d(2)
    before = Snapshot(model)
    with preserved(model):
        model.running_mean.data = torch.zeros(5, dtype=torch.float64)
    before.assert_unchanged()


def test_untouched_buffers_keep_their_version() -> None:
    """A backward that needs them is still possible."""
    model = nn.BatchNorm1d(2).eval()
    model.running_mean[0] = torch.nan
    version = model.running_mean._version
    with preserved(model):
        model(torch.randn(3, 2))
    assert model.running_mean._version == version


def test_models_without_anything_and_lazy_ones() -> None:
    for model in (nn.ReLU(), nn.Sequential(), nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())):
        kinds = [type(m) for m in model.modules()]
        with preserved(model):
            model.train(False)
        assert model.training
        assert [type(m) for m in model.modules()] == kinds
    lazy = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    lazy(torch.randn(2, 2))


def test_shared_modules_and_buffers_without_values() -> None:
    norm = nn.BatchNorm1d(2, track_running_stats=False)
    model = nn.Sequential(norm, nn.Sequential(norm), nn.BatchNorm1d(2, device="meta"))
    with preserved(model):
        model.eval()
        norm.register_buffer("running_mean", torch.ones(2))
    assert norm.training
    assert norm.running_mean is None


def test_a_block_within_a_block() -> None:
    model = randomized(DenseNet())
    before = Snapshot(model)
    with preserved(model):
        model.eval()
        inner = Snapshot(model)
        with preserved(model):
            model.train()
            model(torch.randn(3, 2, 4, 4))
        inner.assert_unchanged()
    before.assert_unchanged()


posix = pytest.mark.skipif(os.name != "posix", reason="Ctrl-C is sent as a POSIX signal")


@posix
def test_signals_wait_for_the_end_and_all_are_heard() -> None:
    steps: list[int] = []
    heard: list[int] = []

    def step() -> None:
        for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGUSR1):
            os.kill(os.getpid(), number)
            steps.append(number)

    before = signal.getsignal(signal.SIGINT)
    users = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        with pytest.raises(KeyboardInterrupt):
            completely(step)
    finally:
        signal.signal(signal.SIGUSR1, users)
    assert steps == [signal.SIGUSR1, signal.SIGINT, signal.SIGUSR1]
    assert heard == [signal.SIGUSR1]
    assert signal.getsignal(signal.SIGINT) is before


@posix
def test_a_block_hears_signals_and_may_set_handlers() -> None:
    heard: list[str] = []
    before = signal.getsignal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, lambda number, frame: heard.append("before"))
    try:
        with preserved(nn.ReLU()):
            os.kill(os.getpid(), signal.SIGUSR1)
            assert heard == ["before"]
            signal.signal(signal.SIGUSR1, lambda number, frame: heard.append("new"))
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard == ["before", "new"]
    finally:
        signal.signal(signal.SIGUSR1, before)


@posix
def test_an_interruption_while_the_model_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    before = Snapshot(model)
    restore: Callable[[Any], None] = batchnorm.surgery.inspect.preserve._Kept.restore

    def interrupted(self: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        restore(self)

    monkeypatch.setattr(batchnorm.surgery.inspect.preserve._Kept, "restore", interrupted)

    def tried() -> None:
        with preserved(model):
            change_all(model)

    with pytest.raises(KeyboardInterrupt):
        tried()
    before.assert_unchanged()


def test_other_threads_can_do_it_too() -> None:
    model = network()
    before = Snapshot(model)

    def work() -> None:
        with preserved(model):
            change_all(model)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    before.assert_unchanged()
