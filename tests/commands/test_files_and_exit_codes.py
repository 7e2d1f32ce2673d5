"""What commands write: whole files or none, never in place of what is no file, and the exit code says which."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from torch import nn

from batchnorm.cli import main
from batchnorm.reports.files import replacing, write_texts
from batchnorm.study.results import Comparison

SOURCE = """
from collections import OrderedDict

import torch
from torch import nn


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def named():
    model = net()
    return nn.Sequential(OrderedDict(μ=model[0], σ=model[1]))


def data():
    return [torch.randn(8, 3)]


def example():
    return torch.randn(8, 3)


class Stop(BaseException):
    pass


def stops():
    raise Stop("enough")


def on_meta():
    with torch.device("meta"):
        return net()


def sparse():
    model = net()
    model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse())
    return model


def interrupts():
    raise KeyboardInterrupt


def interrupted_import():
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt as error:
        raise ImportError("numpy failed to import") from error
"""

posix = pytest.mark.skipif(os.name != "posix", reason="permissions, pipes and signals are those of POSIX")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "users.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    state = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).state_dict()
    torch.save(state, "old.pt")
    safetensors.torch.save_file(state, "old.safetensors")
    yield tmp_path
    sys.modules.pop("users", None)


class Ran(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def command(*arguments: str, **options: Any) -> Ran:
    """Run a command: here, or with options of ``subprocess.run`` in a process of its own."""
    if not options:
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
        return Ran(result.exit_code, result.stdout, result.stderr)
    options = {"stdout": subprocess.PIPE, **options}
    program = [sys.executable, "-m", "batchnorm.cli", *arguments]
    ran = subprocess.run(program, text=True, timeout=300, check=False, stderr=subprocess.PIPE, **options)
    return Ran(ran.returncode, ran.stdout, ran.stderr)


def recalibrate(*arguments: str, old: str = "old.pt", model: str = "users:net", **options: Any) -> Ran:
    return command("recalibrate", model, "--checkpoint", old, "--data", "users:data", *arguments, **options)


def fold(*arguments: str, old: str = "old.pt", **options: Any) -> Ran:
    return command("fold", "users:net", "--checkpoint", old, "--example", "users:example", *arguments, **options)


def assert_nothing_written(here: Path, code: int = 1) -> None:
    assert code in (1, 2, 130)
    assert not [f.name for f in here.iterdir() if f.name.startswith(("new", "."))]


# --- files ---


@posix
@pytest.mark.parametrize("kind", ["device", "link to a device", "pipe", "directory", "link in a circle"])
def test_what_is_no_file_is_never_replaced(here: Path, kind: str) -> None:
    path = here / "x.pt"
    if kind == "device":
        path = Path(os.devnull)
    elif kind == "link to a device":
        path.symlink_to(os.devnull)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("x.pt")
    before = os.lstat(path).st_ino, os.lstat(path).st_mode
    with pytest.raises(OSError, match=re.escape(str(path))), replacing(path) as partial:
        partial.write_text("new")
    assert (os.lstat(path).st_ino, os.lstat(path).st_mode) == before
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


@posix
def test_a_command_says_so_before_the_work(here: Path) -> None:
    for ran in (recalibrate("--out", os.devnull, "--force"), fold("--out", os.devnull, "--force")):
        assert ran.returncode == 1
        assert re.fullmatch(r"Error: /dev/null is no file, but a device, [^\n]*\n", ran.stderr), ran.stderr
    os.mkfifo(here / "pipe")
    ran = recalibrate("--out", "new.pt", "--json", "pipe", "--force")
    assert ran.returncode == 1
    assert "pipe is no file" in ran.stderr
    assert_nothing_written(here)
    (here / "out").mkdir()
    (here / "out" / "report.html").symlink_to(os.devnull)
    ran = command("compare", "--quick", "--out", "out")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "report.html is no file" in ran.stderr


@posix
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_permissions_stay_and_new_files_follow_the_umask(here: Path, suffix: str) -> None:
    own = here / f"new{suffix}"
    own.write_text("mine")
    own.chmod(0o600)
    assert recalibrate("--out", own.name, "--force", old=f"old{suffix}").returncode == 0
    assert stat.S_IMODE(own.stat().st_mode) == 0o600
    own.chmod(0o664)
    assert fold("--out", own.name, "--force").returncode == 0
    assert stat.S_IMODE(own.stat().st_mode) == 0o664
    own.unlink()
    before = os.umask(0o027)
    try:
        ran = recalibrate("--out", own.name, "--json", "new.json", old=f"old{suffix}")
    finally:
        os.umask(before)
    assert ran.returncode == 0, ran.stderr
    assert [stat.S_IMODE(f.stat().st_mode) for f in (own, here / "new.json")] == [0o640, 0o640]


@posix
def test_a_link_stays_and_its_file_is_written(here: Path) -> None:
    (here / "runs").mkdir()
    (here / "latest.pt").symlink_to("runs/3.pt")
    assert recalibrate("--out", "latest.pt").returncode == 0  # there was no such file
    assert (here / "latest.pt").is_symlink()
    torch.load("runs/3.pt", weights_only=True)
    ran = recalibrate("--out", "latest.pt")
    assert (ran.returncode, "latest.pt exists" in ran.stderr) == (1, True)
    (here / "link.pt").symlink_to("old.pt")
    assert "which is never written over" in recalibrate("--out", "link.pt", "--force").stderr


@pytest.mark.parametrize("how", ["itself", "path", "symlink", "absolute"])
def test_two_outputs_are_two_files(here: Path, how: str) -> None:
    other = {"itself": "new.pt", "path": "./new.pt", "symlink": "link.pt", "absolute": str(here / "new.pt")}[how]
    if how == "symlink":
        (here / other).symlink_to("new.pt")
    ran = recalibrate("--out", "new.pt", "--json", other)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert re.fullmatch(r"Error: \S+ and new.pt are one file, [^\n]*\n", ran.stderr)
    assert_nothing_written(here)


def test_of_several_files_none_takes_its_place_before_all_are_whole(here: Path) -> None:
    (here / "first").write_text("before")
    with pytest.raises(TypeError):
        write_texts({here / "first": "after", here / "second": 5})  # type: ignore[dict-item]
    assert (here / "first").read_text() == "before"
    assert not (here / "second").exists()
    assert_nothing_written(here)


# --- exit codes ---


def small_files() -> None:
    """Let no file be larger than this: what a full disk does, as an error of another number."""
    import resource  # which POSIX has

    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


@posix
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".pt2"])
def test_a_disk_that_is_full_is_said_and_leaves_nothing(here: Path, suffix: str) -> None:
    commands = [fold] if suffix == ".pt2" else [recalibrate, fold]
    whole = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # Python does not notice that a compiled module is cut off
    for run in commands:
        old = "old.pt" if suffix == ".pt2" else f"old{suffix}"
        ran = run("--out", f"new{suffix}", old=old, preexec_fn=small_files, env=whole)
        assert ran.returncode == 1, ran.stderr
        assert re.fullmatch(r"Error: [^\n]*File too large[^\n]*\n", ran.stderr), ran.stderr
        assert_nothing_written(here)


def test_a_report_that_cannot_be_written_takes_the_checkpoint_with_it(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Path, text: str, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fails)
    ran = recalibrate("--out", "new.pt", "--json", "report.json")
    assert ran.returncode == 1
    assert ran.stderr.endswith("[Errno 28] No space left on device: 'report.json'\n")
    assert_nothing_written(here)
    assert not (here / "report.json").exists()


def test_files_that_are_there_when_another_fails_are_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def second_fails(partial: Path, place: Path) -> None:
        if place.name == "new.json":
            raise OSError(5, "Input/output error")
        replace(partial, place)

    monkeypatch.setattr(os, "replace", second_fails)
    ran = recalibrate("--out", "new.pt", "--json", "new.json")
    assert (ran.returncode, ran.stdout) == (3, "")
    assert ran.stderr.endswith("[Errno 5] Input/output error: 'new.json'; but written: new.pt\n")
    assert sorted(f.name for f in here.glob("new*")) == ["new.pt"]
    torch.load("new.pt", weights_only=True)


@posix
@pytest.mark.parametrize(
    ("name", "reader"), [("recalibrate", "gone"), ("recalibrate", "full"), ("fold", "gone"), ("compare", "gone")]
)
def test_what_fails_after_the_files_are_there_has_an_exit_code_of_its_own(here: Path, name: str, reader: str) -> None:
    if reader == "full" and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    read, write = os.pipe()
    os.close(read)
    stdout = write if reader == "gone" else os.open("/dev/full", os.O_WRONLY)
    run = {
        "recalibrate": lambda: recalibrate("--out", "new.pt", stdout=stdout),
        "fold": lambda: fold("--out", "new.pt", stdout=stdout),
        "compare": lambda: command("compare", "--quick", "--seeds", "1", "--steps", "2", "--out", "out", stdout=stdout),
    }[name]
    ran = run()
    os.close(stdout)
    assert ran.returncode == 3, ran.stderr
    reason = "Broken pipe" if reader == "gone" else "No space left on device"
    files = r"out/results\.json, out/report\.html" if name == "compare" else r"new\.pt"
    assert re.fullmatch(rf"Error: [^\n]*{reason}[^\n]*; but written: {files}\n", ran.stderr), ran.stderr
    if name == "compare":
        Comparison.from_json((here / "out" / "results.json").read_text(encoding="utf-8"))
    else:
        torch.load("new.pt", weights_only=True)


@posix
def test_without_stdout_commands_work(here: Path) -> None:
    ran = recalibrate("--out", "new.pt", stdout=None, preexec_fn=lambda: os.close(1))
    assert (ran.returncode, ran.stderr) == (0, "")
    torch.load("new.pt", weights_only=True)


def test_names_that_the_terminal_has_no_letters_for(here: Path) -> None:
    names = {"μ": nn.Linear(3, 4), "σ": nn.BatchNorm1d(4)}
    torch.save({f"{n}.{k}": v for n, m in names.items() for k, v in m.state_dict().items()}, "old.pt")
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    ran = recalibrate("--out", "new.pt", model="users:named", env=environment)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert r"\u03c3: mean moved" in ran.stdout


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("stops", r"users\.py:\d+: Stop: enough"),
        ("on_meta", r"0\.weight of Sequential is on the meta device, and has no values: make it on the CPU"),
        ("sparse", r"0\.weight of Sequential is sparse \(torch\.sparse_coo\), .* with to_dense\(\)"),
    ],
)
def test_models_that_cannot_serve_are_one_line(here: Path, model: str, said: str) -> None:
    ran = recalibrate("--out", "new.pt", model=f"users:{model}")
    assert ran.returncode == 1
    assert re.fullmatch(rf"Error: {said}\n", ran.stderr), ran.stderr
    assert_nothing_written(here)


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_checkpoints_without_plain_values_are_one_line(here: Path, kind: str) -> None:
    state = torch.load("old.pt", weights_only=True)
    state["0.weight"] = state["0.weight"].to_sparse() if kind == "sparse" else state["0.weight"].to("meta")
    torch.save(state, "old.pt")
    for ran in (recalibrate("--out", "new.pt"), fold("--out", "new.pt")):
        assert ran.returncode == 1
        assert re.fullmatch(rf"Error: 0.weight of old.pt is [^\n]*{kind}[^\n]*\n", ran.stderr), ran.stderr
    assert_nothing_written(here)


@pytest.mark.parametrize("model", ["interrupts", "interrupted_import"])
def test_an_interruption_within_other_code_is_one(here: Path, model: str) -> None:
    ran = recalibrate("--out", "new.pt", model=f"users:{model}")
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "batchnorm: stopped\n")
    assert_nothing_written(here)


@posix
@pytest.mark.parametrize("command", [("compare", "--out"), ("benchmark", "--json")])
def test_ctrl_c_while_a_command_imports(here: Path, command: tuple[str, str]) -> None:
    """Its first seconds; sent while it imports a module that takes its time, in the place of torch."""
    (here / "torch.py").write_text("import time\nopen('begun', 'w').close()\ntime.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(here), os.environ.get("PYTHONPATH", "")))}
    running = subprocess.Popen(
        [sys.executable, "-m", "batchnorm.cli", *command, "out"], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment,
    )  # fmt: skip
    try:
        while not (here / "begun").exists() and running.poll() is None:
            time.sleep(0.02)
        os.killpg(running.pid, signal.SIGINT)
        output, errors = running.communicate(timeout=60)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
    assert (running.returncode, output, errors) == (130, "", "batchnorm: stopped\n")
    assert not (here / "out").exists()
