"""Whatever is wrong with the compiled code on disk, a layer runs, and the next process finds the cache in order."""

from __future__ import annotations

import compileall
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llvmlite.binding
import pytest

from batchnorm.kernels import cache
from batchnorm.kernels.key import Form, Key
from test_processes import ALONE, PROGRAM, copied_package, give_up_writing_anywhere
from waiting import HANGS_AFTER

__all__ = ["copied_package"]  # a fixture

KEY = Key("planes_forward", "float32", Form("relu", residual=True))
CODE = bytes(i * 7 % 256 for i in range(10_000))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    return tmp_path


def kept(folder: Path) -> Path:
    (path,) = folder.rglob("*.o")
    return path


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
    "another file": lambda path: path.write_bytes(Path(__file__).read_bytes()),
    "a folder": become_folder,
    "a dangling link": lambda path: (path.unlink(), path.symlink_to(path.parent / "nowhere")),
    "a loop of links": lambda path: (path.unlink(), path.symlink_to(path)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_replaced(folder: Path, damage: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cache.find(KEY) is None
    cache.store(KEY, CODE)
    assert cache.find(KEY) == CODE
    assert cache.find(KEY._replace(dtype="float64")) is None
    DAMAGES[damage](kept(folder))
    assert cache.find(KEY) is None
    cache.store(KEY, CODE)
    # A folder is somebody's, who may want it.
    assert cache.find(KEY) == (None if damage == "a folder" else CODE)
    assert not list(folder.rglob("*.tmp*"))
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if not mounted or mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip() if mounted else 'no mount'}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    cache.store(KEY, CODE)
    assert cache.find(KEY) is None
    assert not list(small_disk.iterdir())
    cache.store(KEY, CODE[:1000])
    assert cache.find(KEY) == CODE[:1000]


def test_a_folder_that_takes_nothing_is_followed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked, open_one = tmp_path / "blocked", tmp_path / "open"
    blocked.touch()  # no folder at all
    monkeypatch.setattr(cache, "_folders", lambda: iter((blocked, open_one)))
    cache.store(KEY, CODE)
    assert cache.path_in(open_one, KEY).exists()
    assert cache.find(KEY) == CODE
    monkeypatch.setattr(cache, "_folders", lambda: iter((blocked, blocked / "below")))
    cache.store(KEY, CODE)
    assert cache.find(KEY) is None


@pytest.mark.parametrize("what", ["folder", "files"])
def test_files_that_may_not_be_read(tmp_path: Path, what: str) -> None:
    program = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(cache.__file__).parents[2])]!r}
from pathlib import Path
from test_cache import CODE, KEY, cache
cache.store(KEY, CODE)
found = [cache.find(KEY) == CODE]
folder = Path({str(tmp_path)!r})
for path in [folder] if {what!r} == "folder" else folder.iterdir():
    path.chmod(0)
found.append(cache.find(KEY))
cache.store(KEY, CODE)
found.append(cache.find(KEY) == CODE)
folder.chmod(0o700)
print(found)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=HANGS_AFTER,
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}, preexec_fn=give_up_writing_anywhere,
    )  # fmt: skip
    assert done.stderr == ""
    assert eval(done.stdout) == [True, None, what == "files"]


def test_code_for_another_processor_or_by_other_options_has_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """One home directory may serve many kinds of computers."""
    names = [cache.build.__wrapped__()]
    monkeypatch.setattr(llvmlite.binding, "get_host_cpu_name", lambda: "i486")
    names.append(cache.build.__wrapped__())
    monkeypatch.setenv("NUMBA_BOUNDSCHECK", "1")
    names.append(cache.build.__wrapped__())
    monkeypatch.setattr(cache, "version", lambda name: "99")
    names.append(cache.build.__wrapped__())
    monkeypatch.setattr(cache, "source", lambda: "")
    names.append(cache.build.__wrapped__())
    assert len(set(names)) == 5
    assert None not in names

    def unreadable(name: str) -> bytes:
        raise OSError(f"no source of {name}")

    monkeypatch.undo()
    monkeypatch.setattr(cache, "_stored", unreadable)
    cache.source.cache_clear()
    assert cache.build.__wrapped__() is None


def test_what_machine_code_is_made_of_is_all_part_of_its_name() -> None:
    """That is, whatever compiling loads of this package."""
    kernels = Path(cache.__file__).parent
    program = f"""
import sys, types
for name, folder in (("batchnorm", {str(kernels.parent)!r}), ("batchnorm.kernels", {str(kernels)!r})):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from batchnorm.kernels import compile
from batchnorm.kernels.loops import activations, columns, planes
print(*(name for name in sys.modules if name.startswith("batchnorm.kernels.")))
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=900)
    used = {name.removeprefix("batchnorm.kernels.") for name in done.stdout.split()} - {"loops"}
    assert used == {*cache._MODULES, *(f"loops.{name}" for name in cache._LOOPS)}


# --- the real kernels ---

HITS = """
from batchnorm.kernels import launch
hits, object_code = [], launch._object_code
def counted(key):
    from batchnorm.kernels import cache
    hits.append(cache.find(key) is not None)
    return object_code(key)
launch._object_code = counted
"""


def hits(where: Path, home: Path) -> list[int]:
    """Run a layer in a process of its own; for each of its kernels, whether it was found compiled."""
    environment = ALONE | {"PYTHONPATH": str(where), "HOME": str(home), "OMP_NUM_THREADS": "2"}
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
        env=ALONE | {"PYTHONPATH": str(copied_package), "HOME": str(tmp_path)},
    ) for _ in range(2)]  # fmt: skip
    for process in both:
        _, complaints = process.communicate(timeout=HANGS_AFTER)
        assert (process.returncode, complaints) == (0, "")
    assert hits(copied_package, tmp_path) == [1]
    (path,) = copied_package.rglob("*forward*.o")
    path.write_bytes(bytes(path.stat().st_size))
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
