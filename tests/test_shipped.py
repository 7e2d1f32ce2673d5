"""Kernels that a released package brings: used where they fit, never where they do not."""

from __future__ import annotations

from pathlib import Path
from zipfile import ZipFile

import llvmlite.binding
import pytest
import torch

import batchnorm
from batchnorm.kernels import cache, launch, plans
from batchnorm.kernels.compile import object_code
from batchnorm.kernels.key import Key

KEY = Key("planes_forward", "float32")
CODE = b"object file"


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_level", lambda: "x86-64-v3")
    monkeypatch.setattr(cache, "archive_of", lambda level: tmp_path / f"{level}.zip")
    write(tmp_path / "x86-64-v3.zip", cache.source())
    return tmp_path / "x86-64-v3.zip"


def write(path: Path, source: str) -> None:
    with ZipFile(path, "w") as made:
        made.comment = source.encode()
        made.writestr(KEY.symbol, CODE)


def test_what_was_compiled_here_comes_before_what_was_shipped(archive: Path) -> None:
    assert cache.find(KEY) == CODE
    assert cache.find(KEY._replace(dtype="float64")) is None  # there is none of it
    cache.store(KEY, b"of this machine")
    assert cache.find(KEY) == b"of this machine"


def test_what_does_not_fit_or_is_damaged_is_not_used(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = archive.read_bytes()
    at = whole.index(CODE)
    archive.write_bytes(whole[:at] + b"O" + whole[at + 1 :])
    assert cache.find(KEY) is None
    archive.write_bytes(whole[:-5])
    assert cache.find(KEY) is None
    archive.unlink()
    assert cache.find(KEY) is None
    write(archive, "of other sources")
    assert cache.find(KEY) is None
    write(archive, cache.source())
    assert cache.find(KEY) == CODE
    monkeypatch.setenv("NUMBA_OPT", "0")  # other code was asked for
    assert cache.find(KEY) is None
    monkeypatch.delenv("NUMBA_OPT")
    monkeypatch.setattr(cache, "_level", lambda: None)
    assert cache.find(KEY) is None


def test_the_level_is_the_best_that_the_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.sys, "platform", "linux")
    monkeypatch.setattr(cache.platform, "machine", lambda: "x86_64")
    v4 = dict.fromkeys(cache.LEVELS["x86-64-v4"], True)
    for features, level in (
        (v4, "x86-64-v4"),
        (v4 | {"avx512vl": False}, "x86-64-v3"),
        (v4 | {"fma": False}, None),
        ({}, None),
    ):
        monkeypatch.setattr(llvmlite.binding, "get_host_cpu_features", lambda features=features: features)
        assert cache._level.__wrapped__() == level
    monkeypatch.setattr(llvmlite.binding, "get_host_cpu_features", lambda: v4)
    monkeypatch.setattr(cache.platform, "machine", lambda: "aarch64")
    assert cache._level.__wrapped__() is None
    monkeypatch.setattr(cache.sys, "platform", "darwin")
    assert cache._level.__wrapped__() is None


@pytest.mark.parametrize("level", cache.LEVELS)
@pytest.mark.parametrize("shape", [(5, 9, 12, 15), (9, 23, 5, 5)])
def test_code_for_a_level_gives_the_bits_that_code_for_this_processor_gives(
    level: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = cache._level()
    if mine is None or list(cache.LEVELS).index(level) < list(cache.LEVELS).index(mine):
        pytest.skip(f"this processor's level is {mine}, not {level}")
    x = torch.randn(shape)
    right = batchnorm.BatchNorm2d(shape[1])(x)
    monkeypatch.setattr(launch, "_object_code", lambda key: object_code(key, level))
    launch.kernel.cache_clear()
    plans.plan.cache_clear()
    plans.planned.cache_clear()
    try:
        assert torch.equal(batchnorm.BatchNorm2d(shape[1])(x), right)
        assert batchnorm.kernels.ran().forward == "numba"
    finally:
        launch.kernel.cache_clear()
        plans.plan.cache_clear()
        plans.planned.cache_clear()
