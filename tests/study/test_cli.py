import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner

from batchnorm import cli
from batchnorm.cli import main
from batchnorm.study.results import Comparison
from waiting import HANGS_AFTER, until

QUICK = ["compare", "--quick", "--seeds", "1", "--steps", "2"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=HANGS_AFTER, check=False
    )


def test_compare_writes_its_results_and_says_the_answer(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, ["compare", "--quick", "--steps", "2", "--out", str(tmp_path)], env={"COLUMNS": "120"}
    )
    assert result.exit_code == 0, result.output
    for text in ("no norm", "batch norm", "test accuracy", "Inconclusive: ", "a verdict needs at least 6 seeds."):
        assert text in result.output
    comparison = Comparison.from_json((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert comparison.settings.seeds == 2
    assert (tmp_path / "report.html").exists()


def test_the_command_runs_as_a_process(tmp_path: Path) -> None:
    result = run("-m", "batchnorm.cli", *QUICK, "--out", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert str(tmp_path / "out" / "report.html") in result.stdout


def test_a_path_that_cannot_be_written_is_one_line_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(main, ["compare", "--out", str(tmp_path / "file" / "out")])
    assert result.exit_code == 1
    assert re.fullmatch(r"Error: .*Not a directory: .*\n", result.output)


@pytest.mark.parametrize("wrong", [["--seeds", "0"], ["--steps", "-1"], ["--seeds", "x"]])
def test_wrong_numbers_are_usage_errors(wrong: list[str]) -> None:
    result = CliRunner().invoke(main, ["compare", *wrong])
    assert result.exit_code == 2
    assert "Invalid value" in result.output


@pytest.mark.parametrize("missing", ["click", "joblib"])
def test_without_the_tools_one_line_says_how_to_get_them(missing: str, tmp_path: Path) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; from batchnorm.cli import main; main()"
    result = run("-c", program, *QUICK, "--out", str(tmp_path / "out"))
    assert result.returncode == 2
    assert re.fullmatch(r"batchnorm: .* is missing; .*: pip install 'batchnorm\[tools\]'\n", result.stderr)
    assert not (tmp_path / "out").exists()


def test_help_needs_neither_torch_nor_the_tools_but_click() -> None:
    program = f"import runpy, sys; runpy.run_path({cli.__file__!r}); print(*sys.modules)"
    loaded = run("-c", program).stdout.split()
    assert "click" in loaded
    assert not {"torch", "numba", "rich", "matplotlib", "sklearn", "joblib", "jinja2"} & set(loaded)


def interrupted(*arguments: str) -> tuple[int, str]:
    """Send Ctrl-C to a command that has begun to work: its exit code, and what it said of errors.

    It has when it shows on its terminal that a first run is done: its workers, too, are past their start then.
    """
    ours, its = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "batchnorm.cli", *arguments],
        stdout=its, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    os.close(its)
    os.set_blocking(ours, False)
    shown = b""

    def works() -> bool:
        nonlocal shown
        assert process.poll() is None, "it ended by itself"
        with suppress(BlockingIOError):
            shown += os.read(ours, 65536)
        return re.search(rb"\b[1-9]\d*/\d", shown) is not None

    try:
        until(works, "it shows that a run is done")
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
        _, errors = process.communicate(timeout=HANGS_AFTER)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        os.close(ours)
    return process.returncode, errors


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C is sent as a POSIX signal")
def test_an_interruption_is_one_line_and_leaves_no_file(tmp_path: Path) -> None:
    code, errors = interrupted("compare", "--steps", "20", "--out", str(tmp_path / "out"))
    assert code == 130
    assert errors == "batchnorm: stopped\n"
    assert list((tmp_path / "out").iterdir()) == []
