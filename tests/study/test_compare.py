import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from batchnorm.study.arms import ARMS, Arm, batch_normalized, build, plain
from batchnorm.study.compare import compare
from batchnorm.study.data import digits, order
from batchnorm.study.results import Comparison, Run, Settings, best_rate
from batchnorm.study.train import _Curves, accuracy, batch_accuracy, train


def without_times(comparison: Comparison) -> list[Run]:
    return [replace(run, seconds=0.0) for run in comparison.runs]


def weights(model: nn.Module) -> list[Tensor]:
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return [parameter for layer in layers for parameter in layer.parameters()]


def test_every_arm_rate_and_seed_is_run_and_then_each_arm_at_its_best_rate_on_fresh_seeds(trained: Comparison) -> None:
    for arm in trained.arms:
        for rate in trained.settings.rates:
            assert [run.seed for run in trained.sweep(arm, rate)] == [0, 1]
        assert [run.seed for run in trained.final(arm)] == [2, 3]
        best = best_rate([run for run in trained.runs if run.arm == arm and run.stage == "sweep"])
        assert {run.rate for run in trained.final(arm)} == {best}
    assert len(trained.runs) == 2 * 2 * (3 + 1)


def test_both_arms_start_from_the_same_weights() -> None:
    without, with_norm = (weights(build(arm, seed=3)) for arm in ARMS)
    assert len(without) == len(with_norm) == 14
    assert all(torch.equal(a, b) for a, b in zip(without, with_norm, strict=True))
    assert not torch.equal(without[0], weights(build(ARMS[0], seed=4))[0])


def test_the_arms_differ_in_nothing_but_the_normalization_layers() -> None:
    kinds = [type(module) for module in plain()]
    with_norm = [type(module) for module in batch_normalized() if not isinstance(module, nn.BatchNorm2d)]
    assert kinds == with_norm
    assert sum(isinstance(module, nn.BatchNorm2d) for module in batch_normalized()) == 6


def test_building_a_network_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    build(ARMS[1], seed=7)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_default_device_or_dtype_changes_nothing() -> None:
    settings = Settings(rates=(0.1,), sweep_seeds=1, seeds=1, steps=3)
    expected = without_times(compare(settings=settings, processes=1))
    torch.set_default_device("meta")
    try:
        assert without_times(compare(settings=settings, processes=1)) == expected
    finally:
        torch.set_default_device(None)
    torch.set_default_dtype(torch.float64)
    try:
        found = without_times(compare(settings=settings, processes=1))
    finally:
        torch.set_default_dtype(torch.float32)
    assert [run.outcome for run in found] == [run.outcome for run in expected]


def test_both_arms_see_the_same_images_in_the_same_order() -> None:
    seen: dict[str, list[Tensor]] = {"first": [], "second": []}

    class Spy(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name
            self.linear = nn.Linear(64, 10)

        def forward(self, images: Tensor) -> Tensor:
            if self.training:
                seen[self.name].append(images)
            return self.linear(images.flatten(1))

    arms = (Arm("first", lambda: Spy("first")), Arm("second", lambda: Spy("second")))
    for arm in arms:
        train(arm, digits(), rate=0.1, seed=5, stage="sweep", settings=Settings(steps=40))
    assert len(seen["first"]) == 40
    assert all(torch.equal(a, b) for a, b in zip(seen["first"], seen["second"], strict=True))


def test_an_epoch_shows_each_image_at_most_once_and_the_next_in_another_order() -> None:
    steps = [step.tolist() for step in order(count=10, batch=3, steps=5, seed=0)]
    assert [len(step) for step in steps] == [3] * 5
    first = [index for step in steps[:3] for index in step]
    assert len(set(first)) == 9
    assert first[:6] != [index for step in steps[3:] for index in step]


def test_the_parts_of_the_data_share_no_image() -> None:
    data = digits()
    sizes = [len(part) for part in (data.train, data.validation, data.test)]
    assert sizes == [1000, 397, 400]
    rows = torch.cat([part.images.flatten(1) for part in (data.train, data.validation, data.test)])
    assert len(rows.unique(dim=0)) == 1797


def test_results_repeat_and_do_not_depend_on_the_number_of_processes() -> None:
    settings = Settings(rates=(0.1,), sweep_seeds=1, seeds=1, steps=6)
    alone, beside = (compare(settings=settings, processes=processes) for processes in (1, 2))
    assert without_times(alone) == without_times(beside)


def test_arms_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="different names, both are 'no norm'"):
        compare(arms=(ARMS[0], ARMS[0]))


@pytest.mark.parametrize(
    ("losses", "outcome"),
    [
        ([2.4, 1.0, 0.1], "learned"),
        ([9.9, 5.0, 2.2], "learned"),
        ([2.4, 2.35, 2.31], "stuck"),
        ([2.4, 2.35, 2.29], "stuck"),
        ([900.0, 3.0, 2.31], "diverged"),
        ([2.4, 2.4, 70.0], "diverged"),
        ([2.4, math.nan], "diverged"),
        ([math.inf], "diverged"),
    ],
)
def test_an_outcome_follows_from_the_losses(losses: list[float], outcome: str) -> None:
    curves = _Curves(target=0.9)
    for step, loss in enumerate(losses):
        curves.record(step, [loss], seconds=0.0, validation=0.1)
    assert curves.outcome(guessing=math.log(10)) == outcome


def test_progress_is_reported_after_each_run() -> None:
    calls: list[tuple[int, int]] = []
    settings = Settings(rates=(0.1,), sweep_seeds=1, seeds=1, steps=1)
    compare(settings=settings, processes=1, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 4) for done in (1, 2, 3, 4)]


def test_the_number_of_threads_is_put_back() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train(ARMS[0], digits(), rate=0.1, seed=0, stage="sweep", settings=Settings(steps=1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_a_run_that_diverges_is_recorded_and_never_chosen(trained: Comparison) -> None:
    diverged = trained.sweep("no norm", 1e20)
    assert {run.outcome for run in diverged} == {"diverged"}
    assert all(run.loss[-1] is None and run.steps[-1] < 30 for run in diverged)
    assert all(len(run.loss) == len(run.steps) == len(run.validation) for run in diverged)
    assert all(0 <= run.accuracy <= 1 for run in diverged)
    assert trained.summary("no norm").rate != 1e20
    assert trained.summary("no norm").failed >= 2


def test_json_holds_everything_and_no_nan(trained: Comparison) -> None:
    text = trained.to_json()
    json.loads(text, parse_constant=lambda literal: pytest.fail(f"{literal} in the JSON"))
    assert Comparison.from_json(text) == trained
    assert json.loads(text)["schema"] == "batchnorm.compare"


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema": "batchnorm.compare", "version": 99}'])
def test_json_of_another_schema_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected batchnorm\.compare version 2"):
        Comparison.from_json(text)


def test_batch_statistics_are_measured_without_a_trace() -> None:
    model = build(ARMS[1], seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    share = batch_accuracy(model, digits().validation, batch=32)
    assert share is not None
    assert 0 <= share <= 1
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert batch_accuracy(build(ARMS[0], seed=0), digits().validation, batch=32) is None


def test_answers_that_are_not_finite_are_wrong_answers() -> None:
    model = build(ARMS[0], seed=0)
    nn.init.constant_(list(model.parameters())[-1], math.nan)
    assert accuracy(model, digits().validation) == 0


def test_the_train_and_inference_check_is_of_the_second_arm_alone(trained: Comparison) -> None:
    without, with_norm = (trained.final(arm) for arm in trained.arms)
    assert all(run.batch_accuracy is None and run.validation_batch == () for run in without)
    assert all(run.batch_accuracy is not None for run in with_norm)
    assert all(len(run.validation_batch) == len(run.steps) for run in with_norm)


def test_a_tie_goes_to_the_smaller_rate(trained: Comparison) -> None:
    runs = [replace(trained.runs[0], rate=rate, accuracy=0.5) for rate in (1.0, 0.1, 10.0)]
    assert best_rate(runs) == 0.1


@pytest.mark.parametrize(
    "wrong",
    [
        {"rates": ()},
        {"rates": (0.1, 0.01)},
        {"rates": (-1.0, 1.0)},
        {"seeds": 0},
        {"sweep_seeds": 0},
        {"steps": 0},
        {"batch": 0},
    ],
)
def test_settings_that_cannot_be_run_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        replace(Settings(), **wrong)


def test_a_comparison_shows_its_answer(trained: Comparison) -> None:
    assert "'batch norm' with 'no norm' on digits, 16 runs. Inconclusive: " in repr(trained)
