import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from batchnorm.reports import files
from batchnorm.study import report
from batchnorm.study.report import render
from batchnorm.study.results import Comparison
from waiting import HANGS_AFTER

BROWSER = shutil.which("chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]


def test_the_page_has_the_answer_the_plots_and_the_table(trained: Comparison) -> None:
    page = render(trained)
    assert "Inconclusive: " in page
    assert page.count("<svg role=") == 3
    for label in ("training loss (nats, log scale)", "validation accuracy (%)", "learning rate (log scale)"):
        assert f"{label}</text>" in page
    assert "no norm" in page
    assert "batch norm" in page
    for name, value in trained.environment.items():
        assert f"<th>{name}</th><td>{value}</td>" in page


def test_the_page_is_small_offline_and_fits_light_and_dark(trained: Comparison) -> None:
    page = render(trained)
    assert len(page.encode()) < 1_000_000
    references = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)|url\(([^)]*)\)""", page)
    assert all((a or b).startswith("#") for a, b in references)
    assert "<script" not in page
    assert "@import" not in page
    assert "prefers-color-scheme: dark" in page
    assert not re.search("#0[0-9]0[0-9]0[0-9]", page), "a stand-in colour was left"


def test_names_are_escaped(make_comparison) -> None:
    arms = ("<script>alert(1)</script>", 'a & "b" $x$')
    page = render(make_comparison([0.8] * 5, [0.9] * 5, arms=arms))
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "a &amp; " in page
    assert "$x$" in page


def test_the_same_results_give_the_same_page(trained: Comparison) -> None:
    assert render(trained) == render(Comparison.from_json(trained.to_json()))


def test_saving_writes_both_files_and_nothing_else(trained: Comparison, tmp_path: Path) -> None:
    paths = report.save(trained, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["results.json", "report.html"]
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["report.html", "results.json"]
    assert Comparison.from_json(paths[0].read_text(encoding="utf-8")) == trained
    assert paths[1].read_text(encoding="utf-8") == render(trained)


@pytest.mark.parametrize("interruption", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path, monkeypatch, interruption) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise interruption

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(type(interruption)):
        files.write_text(path, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]
    assert path.read_text() == "old"


def test_a_report_that_cannot_be_drawn_leaves_no_file(trained: Comparison, tmp_path: Path, monkeypatch) -> None:
    def fail(_: Comparison) -> str:
        raise RuntimeError

    monkeypatch.setattr(report, "render", fail)
    with pytest.raises(RuntimeError):
        report.save(trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(BROWSER is None, reason="chromium is not on PATH")
def test_a_browser_shows_the_plots(trained: Comparison, tmp_path: Path) -> None:
    _, page = report.save(trained, tmp_path)
    picture = tmp_path / "page.png"
    arguments = [str(BROWSER), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=900,2600"]
    subprocess.run(
        [*arguments, f"--screenshot={picture}", page.as_uri()], check=True, capture_output=True, timeout=HANGS_AFTER
    )
    pixels = 255 * matplotlib.image.imread(picture)[..., :3]
    for colour in ((0xB3, 0x47, 0x00), (0x00, 0x67, 0xA8)):
        shown = np.abs(pixels - colour).max(axis=-1) < 2
        assert shown.sum() > 500, f"no curve of colour {colour} in the picture"
