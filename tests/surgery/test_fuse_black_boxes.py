"""One module that cannot be traced, copied or rewritten is left with the reason; everything else goes on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import Tail, image, randomized
from torch import Tensor, fx, nn

import batchnorm
from batchnorm.kernels import using
from batchnorm.surgery.fusing import rewrite


def assert_same_outputs(fused: nn.Module, model: nn.Module) -> None:
    with using("aten"):
        for training in (True, False):
            fused.train(training)
            model.train(training)
            torch.testing.assert_close(fused(image()), model(image()))


# --- what a forward does with its arguments ---


class Unit(nn.Module):
    """Normalizes what it finds in a container, and leaves the result where a test says."""

    def __init__(self, write: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.bn, self.relu, self.write = nn.BatchNorm2d(2), nn.ReLU(), write

    def forward(self, given: Any) -> Any:
        return self.write(given, self.relu(self.bn(given["x"] if isinstance(given, dict) else given[0])))


class Writes(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any], write: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.relu, self.unit, self.make = nn.BatchNorm2d(2), nn.ReLU(), Unit(write), make

    def forward(self, x: Tensor) -> Tensor:
        given = self.make(self.relu(self.first(x)))
        self.unit(given)
        return sum(given.values() if isinstance(given, dict) else given)


def into_list(given: Any, y: Tensor) -> Any:
    given[0] = y
    return given


def into_dict(given: Any, y: Tensor) -> Any:
    given["y"] = y
    return given


WRITES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any, Tensor], Any]]] = {
    "x[0] = y": (lambda x: [x, x * 2], into_list),
    "x.append(y)": (lambda x: [x, x * 2], lambda given, y: given.append(y)),
    "x.pop(), x.insert(0, y)": (lambda x: [x, x * 2], lambda given, y: (given.pop(), given.insert(0, y))),
    "x.extend([y, y])": (lambda x: [x], lambda given, y: given.extend([y, y])),
    "d[k] = y": (lambda x: {"x": x}, into_dict),
    "d.update(k=y)": (lambda x: {"x": x}, lambda given, y: given.update(z=y)),
    "d.pop(k)": (lambda x: {"x": x, "y": x}, lambda given, y: (given.pop("x"), given.update(y=y))),
}


@pytest.mark.parametrize(("make", "write"), WRITES.values(), ids=WRITES.keys())
def test_a_forward_may_write_into_lists_and_dicts_that_it_is_given(
    make: Callable[[Tensor], Any], write: Callable[[Any, Tensor], Any]
) -> None:
    torch.manual_seed(0)
    model = randomized(Writes(make, write))
    result = batchnorm.fuse(model, image())
    assert result.fused == {"first": "relu", "unit.bn": "relu"}
    assert_same_outputs(result.model, model)


def test_a_list_that_a_black_box_writes_into_is_not_taken_for_what_it_was() -> None:
    class Box(Unit):
        def forward(self, given: list[Tensor]) -> None:
            if given[0].sum() < 1e9:
                given[0] = self.bn(given[0])

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.box, self.bn = Box(into_list), nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            given = [x]
            self.box(given)
            return torch.relu(self.bn(given[0]) + x)

    torch.manual_seed(0)
    model = randomized(Around())
    result = batchnorm.fuse(model, image())
    assert result.fused == {}
    assert result.skipped["bn"].startswith(
        "the model cannot be traced: box, which cannot be traced, writes into what it is given; observed: "
    )
    assert_same_outputs(result.model, model)


# --- what a forward raises ---


class OwnError(Exception):
    pass


class OwnBaseError(BaseException):
    pass


class Raises(nn.Module):
    """Takes tensors, and nothing in their place."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.block, self.error = Tail(lambda m, x, y: m.relu(y)), error
        self.bn = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise self.error
        return self.bn(self.block(x)).sigmoid()


ERRORS = (
    StopIteration(), KeyError("k"), ZeroDivisionError("0"), OwnError("one\ntwo"), OwnBaseError(), AssertionError(),
    RecursionError("deep"), GeneratorExit(),
)  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_a_forward_raises_is_a_reason_to_leave_it(error: BaseException) -> None:
    torch.manual_seed(0)
    model = randomized(nn.Sequential(Raises(error), nn.BatchNorm2d(2), nn.ReLU()))
    for inputs in (None, image()):
        result = batchnorm.fuse(model, inputs)
        assert result.fused == {"0.block.bn": "relu", "1": "relu"}
        first_line = (str(error).splitlines() or [""])[0]
        assert result.skipped["0.bn"].startswith(f"0 cannot be traced: {type(error).__name__}: {first_line}; ")
        assert_same_outputs(result.model, model)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=lambda error: type(error).__name__)
def test_who_ends_the_process_is_obeyed(error: BaseException) -> None:
    model = nn.Sequential(Raises(error))
    with pytest.raises(type(error)):
        batchnorm.fuse(model)
    assert type(model[0].bn) is nn.BatchNorm2d


class Unwatched(nn.Module):
    """Runs, unless somebody watches."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        if torch.overrides._is_torch_function_mode_enabled():
            raise LookupError("not while you look")
        return self.bn(x).relu() if x.sum() < 1e9 else x


def test_a_model_that_cannot_be_recorded_is_left() -> None:
    result = batchnorm.fuse(nn.Sequential(Unwatched(), nn.BatchNorm2d(2), nn.ReLU()), image())
    assert result.fused == {"1": "relu"}
    assert result.skipped["0.bn"].endswith("; observed: a run fails: LookupError: not while you look")


# --- what goes wrong later ---


@pytest.mark.parametrize("place", ["_fuse", "_plain", "rewritten"])
def test_a_module_that_cannot_be_rewritten_stays_what_it_was(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = randomized(nn.Sequential(Tail(lambda m, x, y: y + x), Tail(lambda m, x, y: m.relu(y))))

    def broken(*_: Any) -> Any:
        raise LookupError("no way")

    monkeypatch.setattr(rewrite, place, broken)
    result = batchnorm.fuse(model, image())
    assert result.fused == {"1.bn": "relu"}
    assert result.skipped["0.bn"].startswith("0 cannot be traced: LookupError: no way; observed: ")
    assert result.rewritten == ()
    assert type(result.model[0]) is Tail
    assert result.model[0].bn.activation is None
    assert_same_outputs(result.model, model)


def test_a_graph_that_does_not_run_on_the_example_leaves_its_module_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fx.Interpreter, "run_node", lambda self, n: 1 / 0)
    model = Tail(lambda m, x, y: m.relu(y + x), block=nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()))
    result = batchnorm.fuse(model, image())
    assert result.skipped["bn"].startswith("the model cannot be traced: ZeroDivisionError: division by zero")
    assert set(result.skipped) == {"bn", "block.0"}


# --- modules of other kinds ---


def test_scripted_parts_are_black_boxes() -> None:
    torch.manual_seed(0)
    scripted = torch.jit.script(randomized(nn.Sequential(nn.BatchNorm2d(2), nn.ReLU())))
    model = randomized(nn.Sequential(scripted, nn.BatchNorm2d(2), nn.ReLU()))
    for inputs in (None, image()):
        result = batchnorm.fuse(model, inputs)
        assert result.fused == {"1": "relu"}
        assert result.skipped == {"0.0": "it was scripted: fuse before torch.jit.script"}
        assert_same_outputs(result.model, model)
    with pytest.raises(TypeError, match="fuse the original, then script the result"):
        batchnorm.fuse(scripted)


class Silent(Tail):
    """As in ERFNet: its train() gives nothing back, so neither does eval()."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


def test_train_and_eval_may_give_nothing_back() -> None:
    torch.manual_seed(0)
    model = randomized(nn.Sequential(Silent(lambda m, x, y: m.relu(y)), nn.BatchNorm2d(2), nn.ReLU()))
    inner = randomized(Silent(lambda m, x, y: m.relu(y)))
    for each in (model, inner):
        assert len(batchnorm.fuse(each, image()).fused) == sum(isinstance(m, nn.ReLU) for m in each.modules())
        assert batchnorm.fuse(each).skipped == {}
        each.eval()
        folded = batchnorm.fold(each, image()).model
        with torch.no_grad():
            torch.testing.assert_close(folded(image()), each(image()), rtol=1e-4, atol=1e-4)


class Keeps(Tail):
    """Keeps a tensor of its last graph, which torch does not copy."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.last = {"outputs": [y]}
        return y


def test_a_model_may_keep_a_tensor_of_its_last_graph() -> None:
    torch.manual_seed(0)
    model = randomized(Keeps(lambda m, x, y: m.relu(y)))
    model(image())
    kept = model.last["outputs"][0]
    result = batchnorm.fuse(model, image())
    assert result.fused == {"bn": "relu"}
    assert model.last["outputs"][0] is kept
    assert kept.grad_fn is not None
    assert result.model.last["outputs"][0].grad_fn is None
    assert_same_outputs(result.model, model)


class Output(OrderedDict):
    """A dict whose values are attributes, too, as transformers' models return."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def test_a_rewritten_forward_returns_the_class_that_it_did() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Tail(lambda m, x, y: Output(y=torch.relu(y)))
            self.bn = nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.bn(self.inner(x).y))

    torch.manual_seed(0)
    model = randomized(Around())
    result = batchnorm.fuse(model, image())
    assert result.fused["bn"] == "relu"
    assert_same_outputs(result.model, model)
    assert type(result.model.inner(image())) is Output
