"""No loop touches anything but its own buffers, at sizes around every boundary of blocks, groups, vectors and bytes."""

from __future__ import annotations

import ctypes
import itertools
import random
from typing import Any

import pytest
import torch

import batchnorm
from batchnorm.kernels import launch
from batchnorm.kernels.key import Key
from batchnorm.kernels.loops import table as at
from random_calls import Case, run
from random_calls.guards import OutsideError, guarded

BATCHES = (1, 2, 8, 9)
CHANNELS = (1, 7, 8, 9, 15, 16, 17, 33)
SPACES = ((), (1,), (7,), (31,), (32,), (33,), (7, 7), (2, 2), (3, 5), (2, 4, 4), (3, 3, 3))
WIDE = ((2, 511), (2, 512), (2, 513), (8, 513), (9, 511), (2, 171, 3), (3, 513, 1), (2, 64, 8))
LONG = (
    (1, 1, 16383),
    (1, 1, 16384),
    (1, 1, 16385),
    (2, 2, 16385),
    (3, 3, 104, 106),
    (130, 513),
    (257, 256),
    (5, 9, 70, 71),
)
MASKS = ("", "", "all", "some", "nothing", "sample", "first", "weights")
POLICIES = ("", "", "Ghost(3)", "Ghost(2)", "Renorm(schedule=None)", "Accumulated(2)", "Sync()")
FORMS: tuple[dict[str, Any], ...] = ({}, {}, {"activation": ("relu", 0.0), "residual": "same"})
MORE_FORMS: tuple[dict[str, Any], ...] = (
    {"activation": ("silu", 0.0), "residual": "contiguous"},
    {"inplace": True},
    {"inplace": True, "activation": ("leaky_relu", 0.25)},
    {"activation": ("relu6", 0.0)},
    {"training": False, "kernel": "numba"},
    {"training": False, "kernel": "numba", "activation": ("relu", 0.0), "wanted": "x"},
)
GRADS = ("same", "same", "contiguous", "channels_last", "scalar", "per_channel", "over_space", "reversed", "odd")
LAYOUTS = ("contiguous", "contiguous", "channels_last", "sliced_channels", "odd")


def cases(
    number: int, seed: int, forms: tuple[dict[str, Any], ...], dtypes: tuple[str, ...], every: bool = True
) -> list[Case]:
    """So many of all combinations; not `every` one, where compiling must not take long."""
    rng = random.Random(seed)
    shapes = [(n, c, *space) for n, c, space in itertools.product(BATCHES, CHANNELS, SPACES)]
    shapes = [s for s in shapes if s[0] > 1 or (len(s) > 2 and s[2:] != (1,))]
    made = []
    for i in range(number):
        shape = rng.choice(LONG if i % 29 == 0 else WIDE if i % 5 == 0 else shapes)
        form = rng.choice(forms)
        policy = rng.choice(POLICIES) if form.get("training", True) and not form.get("inplace") else ""
        if policy == "Sync()" and form and not every:
            policy = ""
        mask = rng.choice(MASKS) if every or not form else ""
        if policy.startswith("Ghost") and not mask and (shape[0] % int(policy[6]) == 1) and shape[2:] in ((), (1,)):
            policy = ""  # one value in the last set
        made.append(Case(
            i, shape, rng.choice(dtypes), rng.choice(LAYOUTS), mask=mask, policy=policy, grad=rng.choice(GRADS),
            mask_dtype=rng.choice(("bool", "float32")), wanted=rng.choice(("xwbr", "xwbr", "x", "wb", "r")),
            batches=2 if policy.startswith("Acc") else 1, threads=rng.choice((1, 2, 3)),
            division=rng.choice(("usual", "fine", "streamed")), memory="bands",
            **form,
        ))  # fmt: skip
    return made


def check(some: list[Case]) -> None:
    wrong = [(case, faults) for case in some if (faults := run(case))]
    told = "\n".join(f"{case.snippet()}\n    {faults}" for case, faults in wrong[:5])
    assert not wrong, f"{len(wrong)} of {len(some)} cases are wrong:\n{told}"


def test_nothing_outside_is_read_or_written() -> None:
    check(cases(600, 0, FORMS, ("float32",), every=False))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_nothing_outside_is_read_or_written_in_any_form(dtype: str) -> None:
    check(cases(4000, 1, (*FORMS, *MORE_FORMS), (dtype,)))


# --- the guards themselves ---


def poke(address: int) -> None:
    ctypes.c_uint8.from_address(address).value ^= 1


@pytest.mark.parametrize(
    ("slot", "distance", "complaint"),
    [
        ("OUT", 2 * 3 * 5 * 4, "OUT of 120 bytes was left"),
        ("OUT", -1, "OUT of 120 bytes was left"),
        ("OUT", 2 * 3 * 5 * 4 + 1000, "OUT of 120 bytes was left"),
        ("MOMENTS", 2 * 3 * 8, "MOMENTS of 48 bytes was left"),
        ("X", 7, "X is only read"),
        ("WEIGHT", 0, "WEIGHT is only read"),
    ],
)
def test_a_write_that_does_not_belong_there_is_found(slot: str, distance: int, complaint: str) -> None:
    kernel = launch.Kernel(Key("planes_forward", "float32"))
    slots = {name: torch.zeros(2, 3, 5) for name in ("X", "OUT")}
    slots.update(WEIGHT=torch.zeros(3), MOMENTS=torch.zeros(2, 3, dtype=torch.float64))
    a = [0] * 31
    for name, t in slots.items():
        a[getattr(at, name)] = t.data_ptr()
    a[at.BATCH], a[at.CHANNELS], a[at.SPACE] = 2, 3, 5
    kernel._address = 1
    moved: list[int] = []

    def call(block: bytes) -> None:
        moved.append(int.from_bytes(block[8 * getattr(at, slot) :][:8], "little"))
        poke(moved[-1] + distance)

    kernel._call = call
    with guarded("bands") as guard:
        for t in slots.values():
            guard.know(t)
        with pytest.raises(OutsideError, match=complaint):
            kernel(launch.pack(*a[:27], *map(float, a[27:])), 1, 1)
    assert moved[0] != slots[slot].data_ptr()
    assert not any(t.any() for t in slots.values())  # what went wrong went wrong elsewhere


def test_memory_that_is_too_small_is_found() -> None:
    kernel = launch.Kernel(Key("planes_forward", "float32"))
    kernel._address, kernel._call = 1, lambda block: None
    x, out = torch.zeros(2, 3, 5), torch.zeros(29)
    a: list[Any] = [0] * 27
    a[at.X], a[at.OUT], a[at.BATCH], a[at.CHANNELS], a[at.SPACE] = x.data_ptr(), out.data_ptr(), 2, 3, 5
    with guarded("bands") as guard:
        guard.know(out)
        with pytest.raises(OutsideError, match="OUT needs 120 bytes and has 116"):
            kernel(launch.pack(*a, 0.0, 0.0, 0.0, 0.0), 1, 1)


def test_a_layer_is_watched_in_every_launch_and_computes_the_same() -> None:
    x = torch.randn(2, 3, 104, 106)  # in two passes, with memory between them
    results = []
    for kind in (None, "bands", "fence_after", "fence_before"):
        layer, leaf = batchnorm.BatchNorm2d(3), x.clone().requires_grad_()
        if kind is None:
            layer(leaf).square().sum().backward()
        else:
            with guarded(kind) as guard:
                layer(leaf).square().sum().backward()
            assert guard.launches == 2
            assert {"X", "DY", "OUT", "MOMENTS", "PARTIALS", "COEFFICIENTS", "RUNNING_VAR", "COUNTER"} <= guard.seen
        results.append((leaf.grad, layer.running_mean, layer.weight.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
