"""What a run leaves behind: intervals, targets, tables, a page that needs nothing, a README that shows the last run."""

import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from batchnorm.benchmark import contenders, timing
from batchnorm.benchmark.gate import Check
from batchnorm.benchmark.timing import Ratio
from benchmarks import baselines, grid, memory, page, publish, report, run, tables, whole
from benchmarks.results import Memory, Report, Timing
from benchmarks.targets import judged

BIG = (32, 256, 56, 56)  # beyond a cache of 32 MiB


def timed(cell: grid.Cell, operation: str, floor: int = 0, **ratios: float) -> Timing:
    names = {
        "torch": contenders.TORCH,
        "copy": contenders.COPY,
        "compiled": baselines.COMPILED,
        "ours_compiled": whole.OURS_COMPILED,
    }
    found = {names[name]: Ratio(ratio, 0.9 * ratio, 1.1 * ratio) for name, ratio in ratios.items()}
    seconds = {contenders.OURS: 1.0} | {name: one.median for name, one in found.items()}
    return Timing(cell, 2, "warm", operation, seconds, dict.fromkeys(seconds, 0.0), found, floor, 9)


def made(*timings: Timing, kept: tuple[Memory, ...] = (), checks: tuple[Check, ...] = ()) -> Report:
    machine = {"processor": "<b>[fast]</b>"}
    return Report("2026-01-01T00:00:00+00:00", False, 1.0, machine, 2**25, "0.0", {}, checks, timings, kept)


@pytest.fixture
def found() -> Report:
    model = grid.Cell((16, 3, 64, 64), kind="model", model="ResNet-18")
    return made(
        timed(grid.Cell(BIG), "forward", 2 * grid.Cell(BIG).bytes, torch=5.0, copy=0.8),
        timed(grid.Cell(BIG, fused="bn+relu"), "forward+backward", 5 * grid.Cell(BIG).bytes, torch=5.0, compiled=2.5),
        timed(model, "forward+backward", torch=1.2, compiled=1.1, ours_compiled=0.9),
        timed(grid.Cell((8, 64, 56, 56), kind="chain"), "forward+backward", torch=1.1),
        kept=(Memory(memory.ALONE, {contenders.TORCH: 200, contenders.OURS: 100}),),
        checks=(Check(grid.Cell((8, 64, 7, 7)), problems=("<script>alert(1)</script>",)),),
    )


# --- statistics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "rank"), [(6, 1), (8, 1), (9, 2), (12, 3), (20, 6), (100, 40)])
def test_the_interval_is_the_one_of_the_tables(count, rank):
    assert timing.interval([float(i) for i in range(1, count + 1)]) == (rank, count + 1 - rank)


def test_five_rounds_have_no_interval():
    with pytest.raises(ValueError, match="six"):
        timing.interval([1.0] * 5)


def test_the_interval_holds_the_median_as_often_as_it_says():
    draws = np.random.default_rng(0).exponential(size=(4000, 15))
    bounds = [timing.interval(sorted(row)) for row in draws.tolist()]
    covered = statistics.mean(float(low <= np.log(2) <= high) for low, high in bounds)
    assert 0.95 <= covered <= 0.98


def test_ratios_are_of_the_same_round():
    ours, theirs = [1.0, 1.0, 10.0, 1.0, 1.0, 1.0], [2.0, 2.0, 20.0, 2.0, 2.0, 2.0]
    assert timing.ratio(theirs, ours) == Ratio(2.0, 2.0, 2.0)


# --- targets -------------------------------------------------------------------------------------------------------


def test_the_targets_of_fused_layers_networks_and_bytes(found):
    reached = {one.name: (one.value, one.passed) for one in judged(found)}
    assert reached["BN+ReLU float32 contiguous"] == (pytest.approx(5.0), True)
    assert reached["BN+ReLU float32 contiguous, torch.compile"] == (pytest.approx(2.5), True)
    assert reached["BN beyond the cache, forward, most × floor"] == (pytest.approx(1.25), True)
    assert reached["ResNet-18, training step"] == (pytest.approx(1.2), True)
    assert reached["DenseNet-121, training step"] == (None, None)
    assert reached[f"saved by {memory.ALONE}, share"] == (0.5, True)
    assert reached["lowest of all"][0] == 1.1


def test_times_the_floor_is_at_the_speed_of_the_copy():
    cell = grid.Cell(BIG)
    assert timed(cell, "forward", 2 * cell.bytes, copy=0.5).times_floor() == 2.0
    assert timed(cell, "forward", 4 * cell.bytes, copy=0.5).times_floor() == 1.0
    assert timed(cell, "forward", 4 * cell.bytes).times_floor() is None


def test_what_a_report_knows_survives_json(found):
    assert Report.from_json(report.to_json(found)) == found


# --- tables, page, README --------------------------------------------------------------------------------------------


def test_tables_show_every_contender_and_interval(found):
    assert tables.baselines(found).rows[0][3:6] == ("1000.00 ms", "5.00 ×", "2.50 ×")
    assert tables.networks(found).rows[0][2:] == ("1000.00 ms", "1.20 × (1.08–1.32)", "1.10 ×", "900.00 ms")
    every = dict(tables.every_cell(found))
    assert "1.25 of 205.5 MB" in every["BN, warm memory, 2 threads"].rows[0]
    text = report.markdown(found)
    assert "1.10 × (0.99–1.21)" in text
    assert "<script>" in text  # Markdown is text; the page below is what escapes


def test_the_page_needs_nothing_and_escapes_everything(found):
    text = page.render(found)
    assert text.count("<svg role=") == 3
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "<b>[fast]</b>" not in text
    assert "@import" not in text
    assert "url(http" not in text
    assert "<link" not in text
    assert 'src="' not in text
    assert page.render(made()).count("<svg role=") == 2  # nothing measured, and no networks to draw


def test_a_run_takes_the_place_of_the_last_one(found, tmp_path):
    readme = "# Benchmark\n\n## Latest results\n\nold\n\n## How to read it\n\nslowly\n"
    (tmp_path / "README.md").write_text(readme, encoding="utf-8")
    publish.check(tmp_path, publish.RESULTS, quick=False)
    publish.publish(found, tmp_path)
    first = (tmp_path / "README.md").read_text(encoding="utf-8")
    publish.publish(found, tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == first
    assert first.startswith("# Benchmark\n\n## Latest results\n\n### Machine\n")
    assert first.endswith("\n\n## How to read it\n\nslowly\n")
    assert "old" not in first
    assert "ResNet-18, 16×3×64×64" in first
    assert "BN+ReLU, warm memory" in (tmp_path / "cells.md").read_text(encoding="utf-8")


def test_what_cannot_be_published_is_refused_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "measure", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(OSError, match="quick"):
        run.run(tmp_path, quick=True, publish_to=tmp_path)
    (tmp_path / "README.md").write_text("nothing", encoding="utf-8")
    with pytest.raises(OSError, match="headings"):
        run.run(tmp_path, quick=False, publish_to=tmp_path)


def test_the_readme_of_the_benchmark_has_a_place_for_results():
    for place in (publish.RESULTS, publish.FOLDING):
        publish.check(Path(__file__).parents[2] / "benchmarks", place, quick=False)


def test_a_refused_cell_fails_the_targets_it_belongs_to(found):
    refused = replace(found, checks=(Check(grid.Cell((8, 64, 7, 7), fused="bn+relu"), problems=("wrong",)),))
    reached = {one.name: one.passed for one in judged(refused)}
    assert reached["BN+ReLU float32 contiguous"] is False
    assert reached["ResNet-18, training step"] is True
