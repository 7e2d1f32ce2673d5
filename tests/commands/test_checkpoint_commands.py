"""`batchnorm recalibrate` and `batchnorm fold`, on real files: what a user can do wrong is one line and no harm."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

import batchnorm
from batchnorm.cli import main
from waiting import HANGS_AFTER, until

SOURCE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.bn(self.conv(x)).relu().mean((2, 3)))


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def batches(channels=1, sizes=(8, 8, 5)):
    generator = torch.Generator().manual_seed(1)
    return [(3 * torch.randn(n, channels, 6, 6, generator=generator) + 1, torch.zeros(n)) for n in sizes]


def loader():
    yield from batches()


def two_channels():
    return batches(2)


def with_nan():
    found = batches()
    found[1][0][0] = float("nan")
    return found


def only_nan():
    return [(torch.full((4, 1, 6, 6), float("nan")),)]


def empty():
    return []


def nothing():
    return None


def fails():
    raise KeyError("no such data set")


def exits():
    raise SystemExit(0)


def without():
    return nn.Sequential(nn.Linear(2, 2))


def metric(model):
    return float(model(batches()[0][0]).mean())


def example():
    return batches()[0][0]


ready = batches()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with a user's module and his checkpoints in two formats."""
    (tmp_path / "users.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    state = users()["net"]().state_dict()
    torch.save({"state_dict": state, "epoch": 7, "optimizer": {"lr": torch.tensor(0.1)}}, "old.pt")
    safetensors.torch.save_file(state, "old.safetensors", {"made": "here"})
    yield tmp_path
    for name in ("users", "broken", "train"):
        sys.modules.pop(name, None)


def users() -> dict[str, Any]:
    """What the user's module defines."""
    names: dict[str, Any] = {"__name__": "users_here"}
    exec(SOURCE, names)
    return names


def command(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def recalibrate(*arguments: str, model: str = "users:net", data: str = "users:loader", old: str = "old.pt") -> Result:
    return command("recalibrate", model, "--checkpoint", old, "--data", data, *arguments)


def one_line(result: Result, *texts: str) -> None:
    """The command failed with one line that says all this, and wrote nothing."""
    assert result.exit_code == 1, result.output
    assert re.fullmatch(r"Error: [^\n]+\n", result.stderr), result.output
    assert result.stdout == ""
    for text in texts:
        assert text in result.stderr
    assert not list(Path.cwd().glob("new*"))
    assert not list(Path.cwd().glob(".*"))


def right() -> nn.Module:
    """The model with the statistics that it should get, by their definition."""
    names = users()
    model: nn.Module = names["net"]().double()
    with torch.no_grad():
        x = model.conv(torch.cat([x for x, _ in names["batches"]()]).double())
    model.bn.running_mean, model.bn.running_var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    return model


@pytest.mark.parametrize("old", ["old.pt", "old.safetensors"])
def test_a_checkpoint_gets_the_statistics_of_the_data_and_keeps_the_rest(here: Path, old: str) -> None:
    new = "new" + Path(old).suffix
    before = (here / old).read_bytes()
    result = recalibrate("--out", new, "--metric", "users:metric", "--json", "report.json", old=old)
    assert result.exit_code == 0, result.output
    assert "1 recalibrated, 0 skipped: 3 batches, 21 samples" in result.stdout
    assert f"{new}: 3 values changed" in result.stdout
    assert (here / old).read_bytes() == before
    report = json.loads((here / "report.json").read_text(encoding="utf-8"))
    assert report["metric_before"] != report["metric_after"]

    if old == "old.pt":
        was, found = (torch.load(file, weights_only=True) for file in (old, new))
        assert {k: v for k, v in found.items() if k != "state_dict"} == {"epoch": 7, "optimizer": {"lr": 0.1}}
        was, found = was["state_dict"], found["state_dict"]
        assert found._metadata == was._metadata
    else:
        was, found = (safetensors.torch.load_file(file) for file in (old, new))
        with safetensors.safe_open(new, "pt") as file:
            assert file.metadata() == {"made": "here"}
    assert list(found) == list(was)
    bn = right().bn
    for name, value in found.items():
        if name == "bn.num_batches_tracked":
            assert value == 3
        elif name.startswith("bn.running"):
            torch.testing.assert_close(value, getattr(bn, name[3:]).float())
        else:
            assert torch.equal(value, was[name])


def test_the_dtypes_of_the_file_stay(here: Path) -> None:
    state = {name: v.half() if v.is_floating_point() else v for name, v in users()["net"]().state_dict().items()}
    torch.save(state, "half.pt")
    assert recalibrate("--out", "new.pt", old="half.pt").exit_code == 0
    found = torch.load("new.pt", weights_only=True)
    assert {name: v.dtype for name, v in found.items()} == {name: v.dtype for name, v in state.items()}
    torch.testing.assert_close(found["bn.running_var"], right().bn.running_var.half(), rtol=1e-2, atol=1e-2)


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(here: Path) -> None:
    before = sorted(here.iterdir())
    result = recalibrate("--dry-run", "--out", "new.pt", "--json", "new.json")
    assert result.exit_code == 0, result.output
    assert "new.pt: would be written, 3 values changed" in result.stdout
    assert "would be written" in recalibrate("--dry-run").stdout
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize("data", ["users:batches", "users:ready", "users.py:ready", "sub/../users.py:loader"])
def test_data_may_be_batches_a_function_or_a_generator(here: Path, data: str) -> None:
    (here / "sub").mkdir()
    result = recalibrate("--out", "new.pt", "--batches", "2", data=data)
    assert result.exit_code == 0, result.output
    assert "2 batches, 16 samples" in result.stdout


def test_batches_that_are_not_finite_are_counted(here: Path) -> None:
    result = recalibrate("--out", "new.pt", data="users:with_nan")
    assert result.exit_code == 0, result.output
    assert "2 batches, 13 samples" in result.stdout
    assert "1 batches skipped: not finite" in result.stdout


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({"data": "users:empty"}, ["the data is empty"]),
        ({"data": "users:only_nan"}, ["not finite"]),
        ({"data": "users:nothing"}, ["users:nothing gives None"]),
        ({"data": "users:two_channels"}, ["users.py:14: RuntimeError: batch 1 of the data", "to have 1 channels"]),
        ({"data": "users:fails"}, ["users.py:55: KeyError: 'no such data set'"]),
        ({"data": "users:exits"}, ["users.py:59: SystemExit"]),
        ({"data": "users:missing"}, ["users has no 'missing'"]),
        ({"data": "nowhere:loader"}, ["there is no module 'nowhere'"]),
        ({"data": "nowhere.py:loader"}, ["there is no file nowhere.py"]),
        ({"data": "loader"}, ["'loader' names no object: write package.module:name"]),
        ({"model": "users:without"}, ["old.pt does not fit Sequential: 2 missing: 0.weight, 0.bias; 8 unexpected"]),
        ({"model": "users:metric"}, ["TypeError"]),
        ({"model": "users:example"}, ["users:example gives a Tensor, not a torch.nn.Module"]),
        ({"model": "broken:net"}, ["broken.py:2: ModuleNotFoundError: No module named 'nowhere'"]),
        ({"old": "none.pt"}, ["No such file or directory: 'none.pt'"]),
        ({"old": "garbage.pt"}, ["garbage.pt is not a file of torch.save"]),
        ({"old": "empty.pt"}, ["empty.pt is not a file of torch.save"]),
        ({"old": "cut.pt"}, ["cut.pt is not a file of torch.save, or is damaged"]),
        ({"old": "garbage.safetensors"}, ["not a safetensors file, or is damaged"]),
        ({"old": "other.pt"}, ["other.pt is not a file of torch.save, or is damaged"]),
        ({"old": "pickled.pt"}, ["pickled.pt holds objects (posix.system) that only running code", "is refused"]),
        ({"old": "whole.pt"}, ["whole.pt holds objects (torch.nn.modules.linear.Linear)", "is refused"]),
        ({"old": "text.pt"}, ["text.pt has the keys 'epoch', and no weights"]),
        ({"old": "twice.pt"}, ["twice.pt has weights under 'state_dict', 'model': say --key which"]),
        ({"old": "shape.pt"}, ["1 of another shape: head.weight ([5, 4]; in the model [3, 4])"]),
    ],
)
def test_what_a_user_can_do_wrong_is_one_line(here: Path, options: dict[str, str], texts: list[str]) -> None:
    names = users()
    state: dict[str, Tensor] = names["net"]().state_dict()
    (here / "broken.py").write_text("\nimport nowhere\n", encoding="utf-8")
    for name in ("garbage.pt", "garbage.safetensors"):
        (here / name).write_bytes(b"this is no checkpoint")
    (here / "empty.pt").write_bytes(b"")
    (here / "cut.pt").write_bytes((here / "old.pt").read_bytes()[:-400])
    torch.save(Harmful(), "pickled.pt")
    (here / "other.pt").write_bytes(pickle.dumps(Harmful()))
    torch.save(nn.Linear(2, 2), "whole.pt")
    torch.save({"epoch": 1}, "text.pt")
    torch.save({"state_dict": state, "model": state}, "twice.pt")
    torch.save({**state, "head.weight": torch.zeros(5, 4)}, "shape.pt")
    one_line(recalibrate("--out", "new" + Path(options.get("old", ".pt")).suffix, **options), *texts)
    assert not (here / "harm").exists()


class Harmful:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch harm",)


def test_a_key_is_found_or_named(here: Path) -> None:
    state = users()["net"]().state_dict()
    torch.save({"state_dict": state, "ema": state, "model": state}, "many.pt")
    assert recalibrate("--key", "ema", "--out", "new.pt", old="many.pt").exit_code == 0
    found = torch.load("new.pt", weights_only=True)
    assert list(found) == ["state_dict", "ema", "model"]
    assert found["ema"]["bn.num_batches_tracked"] == 3
    assert found["model"]["bn.num_batches_tracked"] == 0
    one_line_of = recalibrate("--key", "other", "--out", "other.pt", old="many.pt")
    assert "no weights under 'other'" in one_line_of.stderr


@pytest.mark.parametrize("how", ["itself", "path", "symlink", "hardlink"])
def test_the_input_is_never_written_over(here: Path, how: str) -> None:
    before = (here / "old.pt").read_bytes()
    out = {"itself": "old.pt", "path": str(here / "." / "old.pt"), "symlink": "link.pt", "hardlink": "hard.pt"}[how]
    if how == "symlink":
        (here / out).symlink_to("old.pt")
    elif how == "hardlink":
        os.link("old.pt", out)
    one_line(recalibrate("--out", out, "--force"), "which is never written over")
    one_line(recalibrate("--out", "free.pt", "--json", out, "--force"), "which is never written over")
    assert (here / "old.pt").read_bytes() == before


def test_other_files_are_written_over_by_force_alone(here: Path) -> None:
    (here / "other.pt").write_text("mine")
    one_line(recalibrate("--out", "other.pt"), "other.pt exists", "--force")
    assert (here / "other.pt").read_text() == "mine"
    assert recalibrate("--out", "other.pt", "--force").exit_code == 0
    assert torch.load("other.pt", weights_only=True)["epoch"] == 7


def test_an_output_that_cannot_be_written_is_found_before_the_work(here: Path) -> None:
    (here / "file").write_text("")
    for out in ("file/new.pt", "nowhere/new.pt"):
        one_line(recalibrate("--out", out, data="users:fails"), out.partition("/")[0])
    one_line(recalibrate("--out", ".", data="users:fails"), "is a directory")
    one_line(recalibrate("--out", "new.safetensors", data="users:fails"), "the new checkpoint keeps the old one's")


def test_an_error_while_writing_leaves_no_half_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(value: object, file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    (here / "other.pt").write_text("mine")
    monkeypatch.setattr(torch, "save", save)
    one_line(recalibrate("--out", "other.pt", "--force"), "No space left on device")
    assert (here / "other.pt").read_text() == "mine"


def test_debug_shows_the_traceback(here: Path) -> None:
    result = recalibrate("--out", "new.pt", "--debug", data="users:fails")
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("Error: users.py:55: KeyError: 'no such data set'\n")


def test_an_output_is_needed(here: Path) -> None:
    for result in (recalibrate(), command("fold", "users:net", "--checkpoint", "old.pt")):
        assert result.exit_code == 2
        assert "--out" in result.stderr


def test_tied_weights_of_safetensors_fit(here: Path) -> None:
    source = """
import users

def net():
    model = users.net()
    model.again = model.head
    return model
"""
    (here / "broken.py").write_text(source, encoding="utf-8")
    result = recalibrate("--out", "new.safetensors", model="broken:net", old="old.safetensors")
    assert result.exit_code == 0, result.output


def folded_right(x: Tensor) -> Tensor:
    """What the model of the checkpoints computes in evaluation."""
    y: Tensor = users()["net"]().eval()(x)
    return y


@pytest.mark.parametrize("out", ["new.pt", "new.safetensors"])
def test_a_folded_checkpoint_loads_into_the_folded_model(here: Path, out: str) -> None:
    result = command("fold", "users:net", "--checkpoint", "old.pt", "--example", "users:example", "--out", out)
    assert result.exit_code == 0, result.output
    assert "1 folded, 0 skipped" in result.stdout
    names = users()
    torch.manual_seed(5)
    x, other = names["example"](), names["Net"]()  # other weights
    model = batchnorm.fold(other, x).model
    model.load_state_dict(safetensors.torch.load_file(out) if "safe" in out else torch.load(out, weights_only=True))
    assert not any(name.startswith("bn.") for name in model.state_dict())
    torch.testing.assert_close(model(x), folded_right(x))


@pytest.mark.parametrize("given", ["--example=users:example", "--data=users:loader"])
def test_a_folded_program_needs_no_factory(here: Path, given: str) -> None:
    result = command("fold", "users:net", "--checkpoint", "old.safetensors", given, "--out", "new.pt2")
    assert result.exit_code == 0, result.output
    program = torch.export.load("new.pt2").module()
    x = torch.randn(13, 1, 6, 6)  # another size of batch
    torch.testing.assert_close(program(x), folded_right(x))
    targets = {str(node.target) for node in program.graph.nodes}
    assert "aten.conv2d.default" in targets
    assert not any("batch_norm" in target for target in targets)


def test_fold_says_what_is_wrong_in_one_line(here: Path) -> None:
    torch.save(users()["without"]().state_dict(), "without.pt")
    fold = ("fold", "users:without", "--checkpoint", "without.pt")
    one_line(command(*fold, "--out", "new.pt"), "no layer of users:without could be folded")
    one_line(command(*fold, "--out", "new.pt2"), "needs example inputs: say --example")
    one_line(command(*fold, "--out", "new.pt", "--data", "users:empty"), "users:empty gives no batch")
    one_line(command(*fold, "--out", "new.pt", "--example", "users:fails"), "KeyError: 'no such data set'")


def test_the_page_runs(here: Path) -> None:
    """docs/checkpoints.md: its two commands, and how what they write is loaded."""
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    (here / "train.py").write_text("from users import example, loader, net as model\n", encoding="utf-8")
    (here / "old.safetensors").rename("model.safetensors")
    commands = [line.split()[1:] for line in page.splitlines() if line.startswith("    batchnorm ")]
    assert [words[0] for words in commands] == ["recalibrate", "fold"]
    commands.append([word.replace("pt2", "safetensors") for word in commands[1]])
    for words in commands:
        result = command(*words)
        assert result.exit_code == 0, result.output
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "checkpoints.md", "exec"), names)
    x = users()["example"]()
    for model in (names["program"], names["model"]):
        torch.testing.assert_close(model(x), folded_right(x))


def process(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "batchnorm.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_without_the_tools_one_line_says_how_to_get_them(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("batchnorm.commands.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.MonkeyPatch.context() as patch, open("errors", "w+", encoding="utf-8") as errors:
        patch.setattr(sys, "stderr", errors)
        with pytest.raises(SystemExit, match="2"):
            main(["fold", "users:net", "--checkpoint", "old.pt", "--out", "new.pt"])
    assert (here / "errors").read_text(encoding="utf-8") == (
        "batchnorm: safetensors is missing; the command needs the tools: pip install 'batchnorm[tools]'\n"
    )


def test_the_command_runs_as_a_process(here: Path) -> None:
    arguments = ("users:net", "--checkpoint", "old.pt", "--data", "users:loader", "--out", "new.pt")
    running = process("recalibrate", *arguments)
    output, errors = running.communicate(timeout=HANGS_AFTER)
    assert (running.returncode, errors) == (0, "")
    assert "new.pt: 3 values changed" in output


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C is sent as a POSIX signal")
def test_an_interruption_is_one_line_and_leaves_no_file(here: Path) -> None:
    slow = """
import pathlib, time
import users

def loader():
    for batch in users.batches():
        yield batch
        pathlib.Path("begun").touch()
        time.sleep(3600)
"""
    (here / "slow.py").write_text(slow, encoding="utf-8")
    running = process("recalibrate", "users:net", "--checkpoint", "old.pt", "--data", "slow:loader", "--out", "new.pt")
    try:
        until((here / "begun").exists, "the data are read")
        os.killpg(running.pid, signal.SIGINT)
        output, errors = running.communicate(timeout=HANGS_AFTER)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
    assert (running.returncode, output, errors) == (130, "", "batchnorm: stopped\n")
    assert not [f.name for f in here.iterdir() if f.name.startswith(("new", "."))]
