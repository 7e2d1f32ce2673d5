"""The benchmark: no figure for a wrong result, right ratios, files that can be read back. No time is judged."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from batchnorm import kernels
from batchnorm.benchmark import contenders, gate, timing
from batchnorm.benchmark.gate import Check
from batchnorm.benchmark.memory import Saved
from batchnorm.benchmark.timing import Ratio
from batchnorm.kernels import cpu
from benchmarks import baselines, grid, plans, processes, report, run, summary
from benchmarks.results import Report, Timing
from benchmarks.targets import judged

TINY = grid.Cell((8, 16, 6, 6))
PLAIN = grid.Cell((32, 64, 56, 56))


FUSED = grid.Cell((8, 16, 6, 6), fused="bn+add+relu")


@pytest.fixture
def tiny(monkeypatch):
    cells = (TINY, grid.Cell((8, 16, 6, 6), "bfloat16", "channels_last"), FUSED)
    chain = grid.Job(grid.Cell((2, 8, 6, 6), kind="chain"), grid.threads(), "warm", grid.CHAIN_OPERATIONS)
    jobs = (*(grid.Job(cell, grid.threads(), "warm") for cell in cells), grid.Job(TINY, 1, "fresh"), chain)
    monkeypatch.setattr(plans, "quick", lambda: grid.Plan(jobs, (TINY,), seconds=0.005, quick=True, first_call=False))


def made(*timings: Timing, checks: tuple[Check, ...] = (), last_level: int = 2**25) -> Report:
    return Report("2026-01-01T00:00:00+00:00", False, 1.0, {"processor": "[a]"}, last_level, "0.0", {}, checks, timings)


def timed(cell: grid.Cell, ours: float, theirs: float, operation: str = "forward", regime: str = "warm") -> Timing:
    seconds = {contenders.OURS: ours, contenders.TORCH: theirs, contenders.COPY: ours / 1.5}
    ratios = {name: Ratio(value / ours, 0.99 * value / ours, 1.005 * value / ours) for name, value in seconds.items()}
    floor = 2 * cell.bytes
    return Timing(cell, 2, regime, operation, seconds, dict.fromkeys(seconds, 0.01), ratios, floor, 9)


# --- the whole -----------------------------------------------------------------------------------------------------


def test_a_run_writes_figures_for_every_cell_and_they_can_be_read_back(tiny, tmp_path, capsys):
    run.run(tmp_path / "new", quick=True)

    text = (tmp_path / "new" / "benchmark.json").read_text(encoding="utf-8")
    found = Report.from_json(text)
    assert [check.problems for check in found.checks] == [()] * 4
    assert [t.problem for t in found.timings] == [None] * 13
    assert {check.training for check in found.checks} <= {"numba", "aten"}
    for t in found.timings:
        expected = {contenders.OURS, contenders.TORCH} | ({contenders.COPY} if t.cell.kind == "layer" else set())
        assert set(t.seconds) == expected
        assert all(seconds > 0 for seconds in t.seconds.values())
        assert all(one.low <= one.median <= one.high for one in t.ratios.values())
    (peak,) = found.peaks
    assert min(peak.bytes.values()) > 2 * TINY.bytes
    assert report.to_json(found) + "\n" == text
    data = json.loads(text)
    assert (data["schema"], data["version"]) == ("batchnorm.benchmarks", 3)
    assert {"derived", "machine", "timings", "checks", "load_after"} < set(data)
    assert set(data["derived"]) == {"targets", "geometric_means"}
    assert "8×16×6×6" in (tmp_path / "new" / "benchmark.md").read_text(encoding="utf-8")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "benchmark.html",
        "benchmark.json",
        "benchmark.md",
    ]
    assert "quick run" in capsys.readouterr().out


def test_another_file_is_refused():
    with pytest.raises(ValueError, match="run the benchmark again"):
        Report.from_json('{"schema": "batchnorm.compare", "version": 1}')


# --- the gate ------------------------------------------------------------------------------------------------------


def test_what_the_gate_lets_through_has_small_errors_and_saves_two_vectors():
    found = gate.check(TINY)
    assert found.problems == ()
    assert found.saved[contenders.OURS] == Saved(
        input=8 * 16 * 36 * 4, layer=16 * 4, extra=2 * 16 * 8
    )  # the weight; the moments
    assert {"y", "dx", "dweight", "dbias", "running_mean", "running_var", "evaluation"} < set(found.errors)
    assert any("1e4" in name for name in found.errors)


def test_a_wrong_kernel_gets_no_figures(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gate, "layer", lambda source, given, cell: off(right_layer(source, given, cell), source))
    run.run(tmp_path, quick=True)
    found = Report.from_json((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    assert not found.timings
    assert all(any("y is off by" in problem for problem in check.problems) for check in found.checks)
    assert not any(target.passed for target in judged(found) if target.name == "lowest of all")
    assert "Without figures: 4" in capsys.readouterr().out


right_layer = contenders.layer  # before any test replaces it


def off(layer, source):
    """Ours, when asked for it, a hundredth too large."""
    if source is not torch.nn:
        layer.register_forward_hook(lambda module, inputs, y: y * 1.01)
    return layer


@pytest.mark.parametrize(
    ("result", "spoil"),
    [
        ("dx", lambda g: g._replace(x=g.x * 1.001)),
        ("dweight", lambda g: g._replace(weight=g.weight + 0.01)),
        ("dbias", lambda g: g._replace(bias=g.bias * torch.nan)),
    ],
)
def test_a_wrong_backward_is_named(monkeypatch, result, spoil):
    right = cpu.backward
    monkeypatch.setattr(cpu, "backward", lambda *arguments: spoil(right(*arguments)))
    assert any(problem.startswith(f"{result} is off by") for problem in gate.check(TINY).problems)


def test_results_that_depend_on_the_number_of_threads_are_refused(monkeypatch):
    right = cpu.forward

    def forward(*arguments):
        y, moments = right(*arguments)
        return (y if torch.get_num_threads() > 1 else torch.nextafter(y, y + 1)), moments

    monkeypatch.setattr(cpu, "forward", forward)
    assert "y differs between 1 and 2 threads" in gate.check(TINY).problems


def test_another_kernel_than_announced_is_refused(monkeypatch):
    monkeypatch.setattr(kernels, "which", lambda x, training, *others, **how: "reference")
    assert any("'reference' was announced for training" in problem for problem in gate.check(TINY).problems)


def test_an_exception_is_a_problem_and_leaves_the_threads_alone(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no such luck")

    before = torch.get_num_threads()
    monkeypatch.setattr(cpu, "forward", broken)
    assert gate.check(TINY).problems == ("RuntimeError: no such luck",)
    assert torch.get_num_threads() == before


def test_a_process_that_ends_early_leaves_failures_not_gaps(monkeypatch, capfd):
    monkeypatch.setattr(processes.sys, "executable", "/bin/false")
    found = processes.time_jobs(
        "warm", [grid.Job(TINY, 1, "warm")], {TINY: Check(TINY, "numba", "aten")}, 0.01, lambda *_: None
    )
    assert [t.operation for t in found] == list(grid.OPERATIONS)
    assert all("ended early" in (t.problem or "") for t in found)


# --- figures -------------------------------------------------------------------------------------------------------


def test_ratios_and_means():
    found = made(
        timed(PLAIN, 1.0, 2.0), timed(grid.Cell((8, 64, 56, 56)), 1.0, 8.0), timed(grid.Cell((32, 64)), 1.0, 0.5)
    )
    assert [t.ratio(contenders.TORCH) for t in found.timings] == [2.0, 8.0, 0.5]
    assert found.timings[0].ratio(baselines.JAX) is None
    (mean,) = summary.geometric_means(found)
    assert (mean.mean, mean.lowest, mean.cells) == (pytest.approx(4.0), 2.0, 2)  # the two-dimensional cell is not in it
    assert [t.cell.shape for t in summary.slower(found)] == [(32, 64)]


def test_slower_is_what_is_beyond_doubt_and_noise():
    def one(low, median, high):
        ratios = {contenders.TORCH: Ratio(median, low, high)}
        return Timing(PLAIN, 2, "warm", "forward", {contenders.OURS: 1.0, contenders.TORCH: median}, {}, ratios)

    assert not summary.slower(made(one(0.7, 0.9, 0.98)))
    assert summary.slower(made(one(0.7, 0.9, 0.96)))
    assert target("lowest of all", one(0.7, 0.9, 0.98)) == (0.9, True, 1)
    assert target("lowest of all", one(0.7, 0.9, 0.96)) == (0.9, False, 1)


def target(name, *timings, checks=(), last_level=2**25):
    (found,) = (b for b in judged(made(*timings, checks=checks, last_level=last_level)) if b.name == name)
    return found.value, found.passed, found.figures


def test_targets():
    forward = "float32 contiguous, forward"
    assert target(forward, timed(PLAIN, 1, 5.5)) == (pytest.approx(5.5), True, 1)
    assert target(forward, timed(PLAIN, 1, 4.5)) == (pytest.approx(4.5), False, 1)
    assert target(forward, timed(PLAIN, 1, 9.0, regime="fresh")) == (None, None, 0)
    refused = (Check(grid.Cell((8, 64, 56, 56)), problems=("wrong",)),)
    assert target(forward, timed(PLAIN, 1, 5.5), checks=refused) == (pytest.approx(5.5), False, 1)
    assert target(forward, timed(PLAIN, 1, 5.5), Timing(PLAIN, 2, "warm", "forward", problem="lost"))[1] is False
    assert target("lowest of all", timed(PLAIN, 1, 9), timed(grid.Cell((32, 64)), 1, 0.98)) == (0.98, True, 2)
    assert target("lowest of all", timed(PLAIN, 1, 9), timed(grid.Cell((32, 64)), 1, 0.96)) == (0.96, False, 2)
    copies = "… beyond the cache, most copies"
    assert target(copies, timed(PLAIN, 1, 9)) == (None, None, 0)
    assert target(copies, timed(PLAIN, 1, 9), last_level=2**20) == (pytest.approx(1.5), True, 1)


def test_contenders_take_turns_and_medians_are_of_single_calls(monkeypatch):
    order = []
    ticks = iter(range(10**6))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(ticks)))
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    found = timing.interleaved(calls, budget=100)
    rounds = len(found["a"])
    assert rounds >= 7
    assert all(timing.measured(one) == timing.Measured(1.0, 0.0) for one in found.values())  # a tick a sample
    turns = order[-3 * rounds :]
    assert ["".join(turns[i : i + 3]) for i in range(0, 9, 3)] == ["abc", "bca", "cab"]


def test_the_full_grid_is_the_specified_one():
    plan = plans.full()
    cells = {job.cell for job in plan.jobs if job.cell.kind == "layer"}
    assert len(cells) == 3 * 25 * 4 + 5 * 2 + 4
    timings = [(job.cell, job.threads, job.regime, o) for job in plan.jobs for o in job.operations]
    assert len(timings) == len(set(timings)) == plan.timings - len(plan.together)
    assert set(plans.BASELINES) <= cells
    compared = [job.cell for job in plan.jobs if "forward+backward" in job.baselines and job.cell.fused == "bn+relu"]
    contiguous = {c.shape for c in compared if c.dtype == "float32" and c.layout == "contiguous"}
    assert contiguous >= set(plans.COMPILED["contiguous"])
    assert {(job.threads, job.regime) for job in plan.jobs} >= {(grid.threads(), "warm"), (grid.threads(), "fresh")}
    assert any(job.cell.kind == "chain" for job in plan.jobs)


@pytest.mark.parametrize("cell", [TINY, grid.Cell((4, 8, 4, 4, 4), "bfloat16", "channels_last"), grid.Cell((4, 8, 5))])
def test_inputs_have_the_layout_and_dtype_of_their_cell_and_are_the_same_each_time(cell):
    first, second = contenders.inputs(cell), contenders.inputs(cell)
    assert torch.equal(first.x, second.x)
    assert first.x.dtype == first.grad_y.dtype == cell.torch_dtype
    wanted = (
        {4: torch.channels_last, 5: torch.channels_last_3d}[len(cell.shape)] if cell.layout != "contiguous" else None
    )
    assert first.x.is_contiguous(memory_format=wanted or torch.contiguous_format)


def test_a_baseline_that_cannot_be_built_is_skipped_and_named(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    calls, skipped = baselines.build(TINY, contenders.inputs(TINY), "forward")
    assert skipped[baselines.COMPILED] == "RuntimeError: no compiler"
    assert baselines.COMPILED not in calls
    found = made(replace(timed(PLAIN, 1.0, 2.0), skipped=skipped))
    assert ("32×64×56×56 float32 contiguous, forward, torch.compile", "RuntimeError: no compiler") in summary.failures(
        found
    )
    assert target("float32 contiguous, forward", *found.timings)[1] is False  # 2 is not 5
    report.show(found, Console(file=io.StringIO()))


def test_markup_in_an_error_is_shown_as_it_is():
    failed = Check(TINY, problems=("size [8, 16] does not [/fit]",))
    found = made(timed(PLAIN, 1.0, 0.5), checks=(failed,))
    out = io.StringIO()
    report.show(found, Console(file=out, width=200))
    assert "size [8, 16] does not [/fit]" in out.getvalue()
    assert "size [8, 16] does not [/fit]" in report.markdown(found)
