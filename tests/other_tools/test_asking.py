"""Who stands behind a fused layer asks for the activation: copied, wrapped, compiled, exported, reverted."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from subjects import assert_close, assert_right, by_hand, fused, image, network, right
from torch import fx, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize

import batchnorm
from batchnorm.epilogue import WithEpilogue


def synchronized() -> nn.Module:
    model: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(fused())
    return model


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def without_annotations(traced: fx.GraphModule) -> fx.GraphModule:
    """Annotations that are mere text, as in these files, do not pickle in any graph."""
    for node in traced.graph.nodes:
        node.type = None
    traced.recompile()
    return traced


def wrapped(make: Callable[[nn.Module], Any]) -> Callable[[nn.Module], nn.Module]:
    """Put a wrapper around every layer, at its name."""

    def tool(model: nn.Module) -> nn.Module:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.BatchNorm2d):
                parent, _, key = name.rpartition(".")
                setattr(model.get_submodule(parent), key, make(layer))
        return model

    return tool


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def wrapped_containers(model: Any) -> nn.Module:
    model.sums, model.stem, model.block = Wrapper(model.sums), Wrapper(model.stem), Wrapper(model.block)
    return model  # type: ignore[no-any-return]


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1.0


def parametrized(model: Any) -> nn.Module:
    for layer in (model.stem[1], model.block.bn2, model.sums.bn):
        parametrize.register_parametrization(layer, "weight", Doubled())
    return model  # type: ignore[no-any-return]


SAME: dict[str, Callable[[nn.Module], nn.Module]] = {
    "copied": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "saved": saved,
    "copy pickled": lambda model: pickle.loads(pickle.dumps(copy.deepcopy(model))),
    "shallow copy": copy.copy,
    "Sequential": lambda model: nn.Sequential(model),
    "fused again": lambda model: batchnorm.fuse(model, image()).model,
    "traced": lambda model: fx.symbolic_trace(model),
    "traced twice": lambda model: fx.symbolic_trace(fx.symbolic_trace(model)),
    "transformed": lambda model: fx.Transformer(fx.symbolic_trace(model)).transform(),
    "traced and pickled": lambda model: pickle.loads(pickle.dumps(without_annotations(fx.symbolic_trace(model)))),
}
WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "checkpointed": wrapped(checkpoint_wrapper),
    "layers": wrapped(Wrapper),
    "compiled": wrapped(lambda layer: torch.compile(layer, backend="eager")),
    "containers": wrapped_containers,
    "parametrized": parametrized,
}


@pytest.mark.parametrize("make", [fused, synchronized])
@pytest.mark.parametrize("tool", SAME.values(), ids=SAME)
def test_copies_and_graphs_ask_as_well(tool: Callable[[nn.Module], nn.Module], make: Callable[[], nn.Module]) -> None:
    model = tool(make())
    assert_close(model.eval()(image()), right(image()))
    assert_close(model.train()(image()), right(image(), training=True))
    if not isinstance(model[0] if isinstance(model, nn.Sequential) else model, fx.GraphModule):
        assert_close(nn.SyncBatchNorm.convert_sync_batchnorm(model)(image()), right(image(), training=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
@pytest.mark.parametrize("tool", WRAPPED.values(), ids=WRAPPED)
def test_a_wrapped_layer_applies_its_activation_once(tool: Callable[[nn.Module], nn.Module]) -> None:
    model = tool(fused())
    for training in (False, True):
        assert_close(model.train(training)(image()), right(image(), training))


@pytest.mark.parametrize("make", [fused, synchronized])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiled_and_exported(make: Callable[[], nn.Module], training: bool) -> None:
    model = make().train(training)
    expected = right(image(), training)
    exported = [torch.export.export(model, (image(),), strict=strict).module() for strict in (True, False)]
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for made in (*exported, compiled):
        assert_close(made(image()), expected)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_layer_that_goes_while_its_model_is_compiled(training: bool) -> None:
    model = fused().train(training)
    layers = [m for m in model.modules() if isinstance(m, WithEpilogue)]
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    expected = right(image(), training)

    def backend(graph: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        layers.clear()
        gc.collect()
        return graph.forward

    assert_close(torch.compile(model, fullgraph=True, backend=backend)(image()), expected)
    assert layers == []


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torchscript_gets_the_activation_once() -> None:
    for make in (lambda: fused().stem, lambda: synchronized().stem):  # type: ignore[union-attr]
        stem: Any = make().eval()
        expected = network().double().eval().stem(image().double())  # type: ignore[union-attr,operator]
        assert_close(torch.jit.trace(stem, image())(image()), expected)
        if any(isinstance(m, nn.SyncBatchNorm) for m in stem):
            stem[1].__class__ = nn.BatchNorm2d  # TorchScript compiles no SyncBatchNorm
        assert_close(torch.jit.script(stem)(image()), expected)
        assert_close(stem(image()), expected)  # what it leaves in the model


def test_reverting_afterwards_gives_back_what_the_other_package_left() -> None:
    model = synchronized()
    report = batchnorm.revert(model)
    assert report.skipped == {}
    assert type(model.stem[2]) is nn.SiLU  # type: ignore[index]
    assert not any(type(m).__module__.startswith("batchnorm") for m in model.modules())
    assert_right(model, training=True)
    model = fused()
    model.stem[1] = nn.Identity()  # type: ignore[operator,index]
    assert batchnorm.revert(model).skipped == {}
    assert type(model.stem[2]) is nn.SiLU  # type: ignore[index]


def test_an_activation_taken_away_by_hand_is_applied_behind() -> None:
    model: Any = fused()
    model.stem[1].activation = model.block.bn1.activation = None
    assert_right(model, training=True)


def test_layers_let_go_of_what_they_were_given() -> None:
    model = fused()
    layers = [m for m in model.modules() if isinstance(m, WithEpilogue)]
    batchnorm.revert(model)
    assert all("activation" not in vars(layer) and "_watched" not in vars(layer) for layer in layers)


def test_a_part_that_is_copied_alone_serves_the_same_model() -> None:
    model: Any = fused().eval()
    model.act, model.stem[2] = copy.deepcopy(model.act), copy.deepcopy(model.stem[2])
    assert_right(model)
    assert_right(nn.SyncBatchNorm.convert_sync_batchnorm(model))


def test_a_placeholder_owns_nothing_of_its_model() -> None:
    model: Any = fused()
    gc.collect()
    act, parts = model.act, [weakref.ref(m) for m in (model, model.sums.bn)]
    assert list(act.state_dict()) == list(act.children()) == []
    assert act.is_spared()
    gc.disable()
    try:
        del model
        assert [part() for part in parts] == [None, None]
    finally:
        gc.enable()
    assert not act.is_spared()
    assert act.layer is None


@pytest.mark.parametrize("make", [fused, synchronized])
def test_folding_and_freezing_a_model_whose_layers_were_exchanged(make: Callable[[], nn.Module]) -> None:
    folded = batchnorm.fold(make().eval(), image())
    assert len(folded.folded) == 4
    assert_close(folded.model(image()), right(image()))
    model = make()
    assert len(batchnorm.freeze(model).frozen) == 4
    assert_close(model.train()(image()), right(image()))


def test_a_graph_of_a_layer_with_an_activation_keeps_it_when_layers_are_exchanged() -> None:
    traced: Any = fx.symbolic_trace(by_hand().eval())
    assert_close(traced(image()), right(image()))
    traced.stem._modules["1"] = nn.Identity()
    without: Any = network().double().eval()
    without.stem[1] = nn.Identity()
    assert_close(traced(image()), without(image().double()))
