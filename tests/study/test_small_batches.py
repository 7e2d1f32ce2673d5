import io
import json
import random
import re
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import choosing
import numpy as np
import pytest
import torch
from choosing_study import (
    GHOST,
    LADDER,
    NORMS,
    SYNC,
    Budget,
    SmallRun,
    Study,
    _beyond,
    _first_rates,
    mnist1d,
    network,
    recalibrated,
    run,
    study,
)  # fmt: skip
from torch import nn

from batchnorm.layers import BatchNorm1d
from batchnorm.statistics import Ghost, Renorm
from batchnorm.study.arms import Arm, build
from batchnorm.study.data import digits
from batchnorm.study.results import Stage

DOCS = Path(__file__).parents[2] / "docs"
SMALL = Budget(batches=(16,), samples=32, sweep_seeds=1, seeds=1, processes=2)


QUICK = Budget(batches=(4, 16), samples=64, sweep_seeds=1, seeds=2)
GUIDE = "# A\n\n## Measured\n\nold\n\n## What these numbers say\n\nkept\n"


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A quick run of the script: its folder and what it printed."""
    out = tmp_path_factory.mktemp("choose")
    (out / "choosing.md").write_text(GUIDE)
    printed = io.StringIO()
    with redirect_stdout(printed):
        choosing.remake(out, QUICK, (digits(), mnist1d(500)), processes=1)
    return out, printed.getvalue()


@pytest.fixture
def made_up() -> Study:
    """Accuracies that are known: 0.5 + batch / 1000 + seed / 100, and batch norm's 0.1 lower."""

    def one(arm: str, batch: int, rate: float, seed: int, stage: Stage) -> SmallRun:
        shared = 0.5 + batch / 1000 + seed / 100 - 0.1 * (arm == "batch norm")
        final = stage == "final"
        accuracy = shared if final else 0.5 - abs(rate - 0.1)
        moments = final and arm in ("batch norm", "ghost", "renorm")
        return SmallRun(
            "digits", arm, batch, rate, seed, stage, accuracy, shared + 0.02 if moments else None,
            shared - 0.03 if moments else None,
        )  # fmt: skip

    budget = Budget(batches=(4, 16), sweep_seeds=1, seeds=2, processes=4)
    points = [(arm, batch) for arm in NORMS for batch in (4, 16) if arm != "ghost" or batch == 16]
    points += [("batch norm", 64)]
    runs = [one(*point, rate, 0, "sweep") for point in points for rate in (0.03, 0.1, 0.3)]
    runs += [one(*point, 0.1, seed, "final") for point in points for seed in (1, 2)]
    environment = {"torch": "2", "scikit-learn": "1", "mnist1d": "0"}
    return Study(budget, environment, tuple(runs))


def test_the_script_trains_everything_and_writes_its_results(quick: tuple[Path, str]) -> None:
    out, printed = quick
    found = Study.from_json((out / "choosing.json").read_text(encoding="utf-8"))
    budget = found.budget
    assert found.data == ["digits", "MNIST-1D"]
    for data in found.data:
        for arm in found.arms:
            for batch in budget.batches:
                cell = found.cell(data, arm, batch)
                assert (cell is None) == (arm == "ghost" and batch < 2 * GHOST)
                if cell is not None:
                    assert 0 <= cell.lowest <= cell.accuracy <= cell.highest <= 1
                    assert (cell.recalibrated is None) == (arm in ("no norm", "group norm", "layer norm"))
    assert "samples in a step" in printed
    assert sorted(path.name for path in out.iterdir()) == ["choosing.json", "choosing.md", "choosing.svg"]


def test_tables_and_plot_follow_from_the_results_alone(quick: tuple[Path, str]) -> None:
    out, _ = quick
    found = Study.from_json((out / "choosing.json").read_text(encoding="utf-8"))
    assert choosing.markdown(found) in (out / "choosing.md").read_text(encoding="utf-8")
    assert choosing.figure(found) == (out / "choosing.svg").read_text(encoding="utf-8")
    drawn = ElementTree.fromstring(choosing.figure(found))
    assert drawn.tag.endswith("svg")
    assert "var(--" not in choosing.figure(found)
    text = "".join(drawn.itertext())
    assert all(name in text for name in (*found.data, "ghost of 8", "sync over 4", "renorm"))


def test_each_rate_lies_between_others_that_were_tried_and_final_seeds_are_fresh(quick: tuple[Path, str]) -> None:
    found = Study.from_json((quick[0] / "choosing.json").read_text(encoding="utf-8"))
    assert len({(r.data, r.arm, r.batch, r.rate, r.seed, r.stage) for r in found.runs}) == len(found.runs)
    for r in found.runs:
        if r.stage == "final":
            tried = {s.rate: s for s in found.runs if (s.data, s.arm, s.batch, s.stage) == (*point(r), "sweep")}
            assert r.seed not in {s.seed for s in tried.values()}
            assert tried[r.rate].accuracy == max(s.accuracy for s in tried.values())
            assert min(tried) < r.rate < max(tried) or r.rate in (LADDER[0], LADDER[-1])


def point(r: SmallRun) -> tuple[str, str, int]:
    return r.data, r.arm, r.batch


@pytest.mark.slow  # as in test_compare, which shares the code
def test_results_repeat_and_do_not_depend_on_the_number_of_processes() -> None:
    data = [digits()]
    alone, beside = (study(data, SMALL, processes=processes) for processes in (1, 2))
    assert alone == beside
    assert Study.from_json(alone.to_json()) == alone


def test_progress_ends_at_its_total() -> None:
    calls: list[tuple[int, int]] = []
    found = study([digits()], replace(SMALL, samples=64), 1, lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == list(range(1, len(found.runs) + 1))
    assert calls[-1] == (len(found.runs), len(found.runs))
    assert all(done <= total for done, total in calls)


def test_a_cell_says_mean_range_and_the_paired_difference_from_batch_norm(made_up: Study) -> None:
    cell = made_up.cell("digits", "renorm", 16)
    assert cell is not None
    assert (cell.rate, cell.at_edge) == (0.1, False)
    assert cell.accuracy == pytest.approx(0.531)
    assert (cell.lowest, cell.highest) == pytest.approx((0.526, 0.536))
    assert cell.recalibrated == pytest.approx(0.551)
    assert cell.batch_accuracy == pytest.approx(0.501)
    difference = cell.against_batch_norm
    assert (difference.estimate, difference.low, difference.high) == pytest.approx((0.1, 0.1, 0.1))


def test_sync_is_batch_norm_of_all_processes_samples(made_up: Study) -> None:
    synchronized, alone = made_up.cell("digits", SYNC, 4), made_up.cell("digits", "batch norm", 16)
    assert synchronized is not None
    assert alone is not None
    assert synchronized.accuracy == alone.accuracy
    assert synchronized.against_batch_norm.estimate == pytest.approx(0.012)  # than batch norm of 4
    assert alone.against_batch_norm.estimate == 0


def test_the_tables_hold_these_numbers(made_up: Study) -> None:
    text = choosing.markdown(made_up)
    assert re.search(r"\| renorm +\| +51.9 \(51 to 52\) \| +53.1 \(53 to 54\) \|", text)
    assert re.search(r"\| renorm +\| +\+10.0 \(\+10.0 to \+10.0\) \|", text)
    assert re.search(r"\| renorm +\| +−3.0 / \+2.0 \|", text)
    assert re.search(r"\| ghost of 8 +\| +– \| +53.1", text)
    assert re.search(r"\| sync over 4 +\| +43.1 ", text)
    assert "[choosing.json](choosing.json)" in text


def test_rates_start_around_one_that_grows_with_the_batch_and_go_on_beyond_the_best() -> None:
    assert _first_rates(2) == [0.003, 0.01, 0.03]
    assert _first_rates(64) == [0.1, 0.3, 1.0]
    assert _beyond([0.01, 0.03, 0.1], 0.03) is None
    assert _beyond([0.01, 0.03, 0.1], 0.1) == 0.3
    assert _beyond([0.01, 0.03, 0.1, 0.003], 0.003) == 0.001
    assert _beyond(LADDER, LADDER[0]) is None
    assert _beyond(LADDER, LADDER[-1]) is None


@pytest.mark.parametrize("data", ["digits", "MNIST-1D"])
def test_all_arms_start_from_the_same_weights_and_differ_in_their_norms_alone(data: str) -> None:
    def parts(norm: str) -> tuple[list[type[nn.Module]], list[torch.Tensor]]:
        model = build(Arm(norm, lambda: network(data, norm, steps=100)), seed=3)
        kept = [m for m in model.modules() if not isinstance(m, (nn.Sequential, BatchNorm1d, nn.GroupNorm))]
        return [type(m) for m in kept], [p for m in kept for p in m.parameters()]

    kinds, weights = parts("no norm")
    for norm in NORMS:
        other_kinds, other_weights = parts(norm)
        assert other_kinds == kinds
        assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))


def test_the_arms_policies() -> None:
    def layers(norm: str) -> list[nn.Module]:
        model = network("MNIST-1D", norm, steps=1000)
        return [m for m in model if isinstance(m, (BatchNorm1d, nn.GroupNorm))]

    assert len(layers("batch norm")) == 3
    assert {m.statistics for m in layers("ghost")} == {Ghost(8)}
    (renorm,) = {m.statistics for m in layers("renorm")}
    assert isinstance(renorm, Renorm)
    assert renorm.limits(50) == (1, 0)
    assert renorm.limits(400) == (3, 5)  # the paper's limits, at the paper's share of the run
    assert {m.num_groups for m in layers("group norm")} == {8}
    assert {m.num_groups for m in layers("layer norm")} == {1}


def test_recalibrated_statistics_are_those_of_the_whole_training_part() -> None:
    data = digits()
    model = build(Arm("batch norm", lambda: network("digits", "batch norm", 10)), seed=0)
    oracle = build(Arm("batch norm", lambda: network("digits", "batch norm", 10)), seed=0).double()
    x = data.train.images.double()
    test = data.test.images.double()
    for module in oracle:  # layer by layer, each with the moments of what reaches it
        if isinstance(module, BatchNorm1d):
            mean, var = x.mean(0), x.var(0, correction=1)
            test = (test - mean) / (var + module.eps).sqrt()
            x = (x - mean) / (x.var(0, correction=0) + module.eps).sqrt()
        else:
            x, test = module(x), module(test)
    right = (test.argmax(1) == data.test.labels).float().mean().item()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert recalibrated(model, data.train, data.test) == pytest.approx(right, abs=0.003)  # one image at most
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert recalibrated(network("digits", "group norm", 10), data.train, data.test) is None


@pytest.mark.parametrize(("norm", "recalibrated"), [("no norm", None), ("batch norm", 0)])
def test_a_diverged_run_is_measured_as_knowing_nothing(norm: str, recalibrated: float | None) -> None:
    found = run(digits(), norm, 16, 160, 1e20, 0, "final")
    assert found.accuracy == 0
    assert found.recalibrated == recalibrated


def test_mnist1d_is_made_without_the_network_and_leaves_the_random_state_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("it reached for the network"))
    np.random.seed(5)
    random.seed(5)
    before = np.random.get_state()[1].copy(), random.getstate()
    data = mnist1d(500)
    assert np.array_equal(np.random.get_state()[1], before[0])
    assert random.getstate() == before[1]
    assert [len(part) for part in (data.train, data.validation, data.test)] == [300, 100, 100]
    assert data.train.images.shape == (300, 1, 40)
    assert data.train.images.mean().abs() < 1e-5
    assert data.train.images.std() == pytest.approx(1, abs=1e-5)
    assert set(data.train.labels.tolist()) == set(range(10))
    again = mnist1d(500)
    assert torch.equal(again.test.images, data.test.images)


def test_too_few_samples_for_a_step_are_refused() -> None:
    with pytest.raises(ValueError, match="samples must be enough for one step of 256, got 100"):
        Budget(samples=100)


def test_results_of_another_kind_are_refused(made_up: Study) -> None:
    values = json.loads(made_up.to_json())
    with pytest.raises(ValueError, match=r"expected batchnorm.choose version 1, got \('batchnorm.choose', 2\)"):
        Study.from_json(json.dumps({**values, "version": 2}))


def test_publishing_replaces_what_stands_between_the_headings(made_up: Study, tmp_path: Path) -> None:
    (tmp_path / "choosing.md").write_text(GUIDE)
    for _ in range(2):
        paths = choosing.publish(made_up, tmp_path)
        text = (tmp_path / "choosing.md").read_text(encoding="utf-8")
        assert text.startswith("# A\n\n## Measured\n\n![")
        assert text.endswith("|\n\n## What these numbers say\n\nkept\n")
        assert "old" not in text
        assert text.count("| renorm") == 4
    assert sorted(paths) == sorted(tmp_path.iterdir())
    assert Study.from_json((tmp_path / "choosing.json").read_text(encoding="utf-8")) == made_up


def test_the_guide_shows_what_its_results_say() -> None:
    found = Study.from_json((DOCS / "choosing.json").read_text(encoding="utf-8"))
    text = (DOCS / "choosing.md").read_text(encoding="utf-8")
    measured = text.partition("## Measured\n")[2].partition("## What these numbers say\n")[0]
    assert choosing.markdown(found) in measured
    assert found.budget == Budget()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory: .*choosing.md"),
        ("# A guide\n", "has no headings '## Measured' and '## What these numbers say'"),
    ],
)
def test_a_guide_without_a_place_is_refused_before_any_training(
    text: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "study", lambda *_, **__: pytest.fail("it was trained"))
    if text is not None:
        (tmp_path / "choosing.md").write_text(text)
    with pytest.raises(OSError, match=message):
        choosing.remake(tmp_path, QUICK, (digits(),))
