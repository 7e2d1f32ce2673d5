"""Random calls, each compared with float64 mathematics: values, gradients, buffers, layouts, errors, memory.

More of them, of any seed: `python -m tests.random_calls --seed 7 --cases 10000`.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from random_calls import Case, draw, run
from random_calls.__main__ import outcomes
from random_calls.cases import BAD, BETWEEN, FLOATS, GRADS, HOOKS, MASKS, TRANSFORMS

DIES = """
import json, os, sys
first = int(sys.argv[sys.argv.index("--first") + 1])
for i in range(first, 5):
    print(json.dumps({"run": i}), flush=True)
    if i == 2:
        os.abort()
    print(json.dumps({"index": i, "faults": ["odd"] if i % 2 else []}), flush=True)
"""


def test_random_calls_are_right() -> None:
    done = list(outcomes(seed=2026, first=0, cases=300, few=True))
    wrong = [outcome for outcome in done if outcome.faults]
    told = "\n".join(f"{draw(2026, index, True).snippet()}\n    {faults}" for index, faults in wrong[:5])
    assert not wrong, f"{len(wrong)} of {len(done)} cases are wrong:\n{told}"
    assert len(done) == 300


SHAPES = ((5, 3, 7, 7), (5, 3, 2, 2), (9, 7))  # one for each view
PLAIN: dict[str, Any] = {}
ADDED = {"activation": ("relu", 0.0), "residual": "same"}


def check(*cases: Case) -> None:
    wrong = [f"{case.snippet()}\n    {faults}" for case in cases if (faults := run(case))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("form", [PLAIN, ADDED], ids=["plain", "added"])
@pytest.mark.parametrize("hooks", HOOKS)
def test_saved_tensors_that_come_back_in_another_form(hooks: str, form: dict[str, Any]) -> None:
    for layout, shape in product(("contiguous", "channels_last"), SHAPES):
        check(Case(1, shape, layout=layout, hooks=hooks, memory="bands", **form))


@pytest.mark.parametrize("form", [PLAIN, ADDED], ids=["plain", "added"])
@pytest.mark.parametrize("between", BETWEEN)
def test_what_changes_between_a_forward_and_its_backward(between: str, form: dict[str, Any]) -> None:
    for shape in SHAPES:
        check(Case(1, shape, call="layer", between=between, memory="bands", **form))


@pytest.mark.parametrize("transform", sorted(set(TRANSFORMS)))
def test_transforms(transform: str) -> None:
    for training, mask in ((True, ""), (True, "some"), (False, "")):
        buffers = "none" if training else "plain"
        check(Case(1, (5, 3), buffers=buffers, counted=False, training=training, mask=mask, transform=transform))


@pytest.mark.parametrize("bad", BAD)
def test_an_argument_that_does_not_fit_is_refused_as_torch_does(bad: str) -> None:
    check(*(Case(1, (2, 3, 4), dtype, training=t, bad=bad) for dtype, t in product(FLOATS, (True, False))))


@pytest.mark.parametrize("grad", GRADS)
def test_gradients_of_any_form(grad: str) -> None:
    check(*(Case(1, shape, grad=grad, memory="bands") for shape in SHAPES))


def test_negative_bits_and_gaps_in_any_argument() -> None:
    for training, kernel in ((True, ""), (False, "")):
        for how in ("neg", "strided"):
            check(*(Case(1, shape, training=training, kernel=kernel, weight=how, bias=how) for shape in SHAPES))
        check(*(Case(1, shape, training=training, neg=True) for shape in SHAPES))
        check(*(Case(1, shape, "float64", "channels_last", training=training, buffers="strided") for shape in SHAPES))
        check(*(Case(1, (5, 3, 7), dtype, training=training, buffers="double") for dtype in ("float16", "bfloat16")))
    check(*(Case(1, shape, activation=("relu", 0.0), residual="neg") for shape in SHAPES))


@pytest.mark.parametrize("mask", MASKS)
def test_masks_that_leave_little_or_nothing(mask: str) -> None:
    for shape, policy, dtype in product((*SHAPES, (2, 513)), ("", "Ghost(2)"), ("bool", "float32")):
        check(Case(1, shape, mask=mask, mask_dtype=dtype, policy=policy, memory="bands"))


@pytest.mark.slow
def test_many_random_calls_of_every_form_are_right() -> None:
    wrong = [draw(7, index).snippet() + str(faults) for index, faults in outcomes(7, 0, 10_000) if faults]
    assert not wrong, "\n".join(wrong[:20])


def test_a_case_that_ends_its_process_is_named_and_the_others_go_on() -> None:
    done = list(outcomes(seed=0, first=0, cases=5, child=("-c", DIES)))
    assert [outcome.index for outcome in done] == [0, 1, 2, 3, 4]
    assert [bool(outcome.faults) for outcome in done] == [False, True, True, True, False]
    assert "SIGABRT" in done[2].faults[0]


def test_a_case_can_be_printed_and_made_again() -> None:
    cases = [draw(3, index) for index in range(200)]
    assert [eval(str(case), {"Case": Case}) for case in cases] == cases


def test_what_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge against a library that is off: in a value, a gradient, a buffer, a layout."""
    from batchnorm import fast_path
    from batchnorm.kernels import operators

    case = Case(0, (5, 3, 7, 7))
    assert run(case) == []
    train = operators.normalize
    spoil = {
        "y at": lambda y: y * (1 + 1e-4),
        "y has strides": lambda y: y.transpose(2, 3).contiguous().transpose(2, 3),
    }
    for complaint, change in spoil.items():
        monkeypatch.setattr(operators, "normalize", lambda *a, change=change: change(train(*a)))
        assert any(complaint in fault for fault in run(case)), complaint
    monkeypatch.setattr(operators, "normalize", train)
    backward = operators.cpu.backward
    monkeypatch.setattr(operators.cpu, "backward", lambda *a: backward(*a)._replace(weight=backward(*a).weight * 1.001))
    assert any("weight's gradient" in fault for fault in run(case))
    monkeypatch.setattr(operators.cpu, "backward", backward)
    running = fast_path.Running
    monkeypatch.setattr(fast_path, "Running", lambda m, v, b, f: running(m, v, b, f + 0.01))
    assert any("running_mean" in fault for fault in run(case))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_many_gradients_at_once_of_what_plain_pytorch_computes(dtype: str) -> None:
    """They have no strides that could be asked for."""
    more: dict[str, Any] = {"transform": "batched", "layout": "channels_last", "memory": "bands"}
    check(Case(1, (2, 2, 2, 3), dtype, buffers="none", counted=False, policy="Ghost(2)", **more))


def test_many_gradients_at_once_of_half_precision_without_buffers() -> None:
    """torch can, as long as nobody asks it for moments in float32 beside the tensor."""
    more: dict[str, Any] = {"transform": "vmap_grads", "layout": "sliced_channels", "memory": "bands"}
    check(Case(1, (3, 2), "float16", weight="none", bias="none", buffers="none", counted=False, **more))
