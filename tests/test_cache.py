"""Whatever is wrong with the compiled code on disk, a layer runs, and the next process finds the cache in order."""

from __future__ import annotations

import compileall
import ctypes
import errno
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import pytest
from numba.core import caching, config
from numba.core.ccallback import CFunc

from batchnorm.kernels import cache
from batchnorm.kernels.simd import pointer
from test_processes import PROGRAM, copied_package, give_up_writing_anywhere
from waiting import HANGS_AFTER

__all__ = ["copied_package"]  # a fixture


def answer(slots: Any) -> None:
    pointer(slots, numba.int64)[0] = 42


def compiled() -> CFunc:
    """A small function, as the kernels are compiled; it must work, wherever it came from."""
    function = CFunc(answer, ((numba.intp,), numba.void), locals={}, options={"error_model": "numpy"})
    cache.use_cache(function)
    function.compile()
    slots = (ctypes.c_int64 * 1)()
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function.address)(ctypes.addressof(slots))
    assert slots[0] == 42
    return function


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def files(folder: Path) -> dict[str, Path]:
    found = {path.suffix: path for path in folder.rglob("*.nb?")}
    assert set(found) == {".nbi", ".nbc"}
    return found


def middle(path: Path, length: int, change: Callable[[bytes], bytes]) -> None:
    data = path.read_bytes()
    start = (len(data) - length) // 2
    path.write_bytes(data[:start] + change(data[start : start + length]) + data[start + length :])


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "something").touch()


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "one byte": lambda path: path.write_bytes(path.read_bytes()[:1]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "without its last byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "zeros in the middle": lambda path: middle(path, path.stat().st_size // 3, lambda part: bytes(len(part))),
    "one bit": lambda path: middle(path, 1, lambda part: bytes([part[0] ^ 1])),
    "garbage": lambda path: path.write_bytes(bytes(i * i % 251 for i in range(path.stat().st_size))),
    "another pickle": lambda path: path.write_bytes(__import__("pickle").dumps(numba.__version__) * 2),
    "a folder": become_folder,
    "a dangling link": lambda path: (path.unlink(), path.symlink_to(path.parent / "nowhere")),
    "a loop of links": lambda path: (path.unlink(), path.symlink_to(path)),
}


@pytest.mark.parametrize("damaged", [(".nbi",), (".nbc",), (".nbi", ".nbc")], ids="".join)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_replaced(
    folder: Path, damage: str, damaged: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    assert compiled().cache_hits == 0
    assert compiled().cache_hits == 1
    kept = files(folder)
    for suffix in damaged:
        DAMAGES[damage](kept[suffix])
    assert compiled().cache_hits == 0
    replaced = damage != "a folder"  # somebody's, who may want it
    assert compiled().cache_hits == replaced
    assert not list(folder.rglob("*.tmp*"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
def test_a_full_disk(folder: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index comes first; the disk is full then, or when the code follows."""

    def full(path: Any, *more: Any, **options: Any) -> Any:
        if f"{suffix}.tmp" not in str(path):
            return open(path, *more, **options)
        file = open("/dev/full" if os.path.exists("/dev/full") else os.devnull, *more, **options)  # noqa: SIM115
        if not os.path.exists("/dev/full"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return file

    monkeypatch.setattr(caching, "open", full, raising=False)
    assert compiled().cache_hits == 0
    assert compiled().cache_hits == 0
    assert not list(folder.rglob("*.tmp*"))
    monkeypatch.undo()
    monkeypatch.setattr(config, "CACHE_DIR", str(folder))
    assert compiled().cache_hits == 0
    assert compiled().cache_hits == 1


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if not mounted or mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip() if mounted else 'no mount'}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_small_disk(small_disk: Path) -> None:
    assert compiled().cache_hits == 0
    assert compiled().cache_hits == 0
    assert not list(small_disk.rglob("*.nbc*"))


@pytest.fixture
def nothing_beside_the_tests() -> Iterator[None]:
    """Numba's second choice is the folder of the function's own file, where an earlier run may have left something."""

    def clean() -> None:
        for path in (Path(__file__).parent / "__pycache__").glob("test_cache.*.nb?"):
            path.unlink()

    clean()
    yield
    clean()


@pytest.mark.usefixtures("nothing_beside_the_tests")
@pytest.mark.parametrize("what", ["folder", "files"])
def test_files_that_may_not_be_read(tmp_path: Path, what: str) -> None:
    program = f"""
import os, sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(cache.__file__).parents[2])]!r}
from pathlib import Path
from numba.core import config
config.CACHE_DIR = {str(tmp_path)!r}
from test_cache import compiled, files
hits = [compiled().cache_hits]
folder = files(Path({str(tmp_path)!r}))[".nbi"].parent
for path in [folder] if {what!r} == "folder" else folder.iterdir():
    path.chmod(0)
hits += [compiled().cache_hits, compiled().cache_hits]
folder.chmod(0o700)
print(hits)
"""
    environment = {**os.environ, "HOME": "/dev/null/home"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=HANGS_AFTER,
        env=environment, preexec_fn=give_up_writing_anywhere,
    )  # fmt: skip
    assert done.stderr == ""
    assert eval(done.stdout) in ([[0, 0, 1], [0, 0, 0]] if what == "files" else [[0, 0, 0], [0, 0, 1]])


def test_code_for_another_processor_or_by_other_options_has_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """One home directory may serve many kinds of computers."""
    names = [cache.build.__wrapped__()]
    codegen = type(cache.cpu_target.target_context.codegen())
    monkeypatch.setattr(codegen, "magic_tuple", lambda self: ("x86_64-unknown-linux-gnu", "i486", "-avx"))
    names.append(cache.build.__wrapped__())
    monkeypatch.setattr(config, "BOUNDSCHECK", 1)
    names.append(cache.build.__wrapped__())
    monkeypatch.setattr(cache, "_stored", lambda name: b"")
    names.append(cache.build.__wrapped__())
    assert len(set(names)) == 4
    assert None not in names

    def unreadable(name: str) -> bytes:
        raise OSError(f"no source of {name}")

    monkeypatch.setattr(cache, "_stored", unreadable)
    assert cache.build.__wrapped__() is None


# --- the real kernels ---

HITS = """
from numba.core.ccallback import CFunc
hits, compile = [], CFunc.compile
def counted(self):
    compile(self)
    hits.append(self.cache_hits)
CFunc.compile = counted
"""


def hits(where: Path, home: Path) -> list[int]:
    """Run a layer in a process of its own; for each of its kernels, whether it was found compiled."""
    environment = {"PYTHONPATH": str(where), "PATH": os.environ["PATH"], "HOME": str(home), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", HITS + PROGRAM + "print(hits)"], capture_output=True, text=True, check=False,
        timeout=HANGS_AFTER, env=environment, cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    at, found = done.stdout.splitlines()
    assert at.startswith(str(where))
    return eval(found)  # type: ignore[no-any-return]


def test_damage_to_a_kernel_between_two_processes(copied_package: Path, tmp_path: Path) -> None:
    both = [subprocess.Popen(  # at once, into one folder
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/",
        env={"PYTHONPATH": str(copied_package), "PATH": os.environ["PATH"], "HOME": str(tmp_path)},
    ) for _ in range(2)]  # fmt: skip
    for process in both:
        _, complaints = process.communicate(timeout=HANGS_AFTER)
        assert (process.returncode, complaints) == (0, "")
    assert hits(copied_package, tmp_path) == [1]
    kept = files(copied_package)
    kept[".nbi"].write_bytes(b"")
    kept[".nbc"].write_bytes(bytes(kept[".nbc"].stat().st_size))
    assert hits(copied_package, tmp_path) == [0]
    assert hits(copied_package, tmp_path) == [1]


def test_a_package_in_an_archive(copied_package: Path, tmp_path: Path) -> None:
    archive = tmp_path / "library.zip"
    with zipfile.ZipFile(archive, "w") as made:
        for path in sorted(copied_package.rglob("*")):
            made.write(path, path.relative_to(copied_package))
    assert hits(archive, tmp_path) == [0]


def test_a_package_without_sources(copied_package: Path, tmp_path: Path) -> None:
    compileall.compile_dir(copied_package, quiet=1, legacy=True)
    for path in copied_package.rglob("*.py"):
        path.unlink()
    assert hits(copied_package, tmp_path) == [0]
    assert hits(copied_package, tmp_path) == [1]
