"""Each rule finds its fault, and is silent where something only looks like it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.diagnosis.report import Diagnosis
from batchnorm.diagnosis.rules import RULES
from diagnosis.subjects import batches, network, trained

Change = Callable[[nn.Sequential], Any]


def codes(report: Diagnosis) -> list[str]:
    return [finding.rule.code for finding in report.findings]


def each(change: Callable[[Any], Any]) -> Change:
    return lambda model: [change(layer) for layer in model if isinstance(layer, nn.BatchNorm2d)]


def fixed(layer: nn.BatchNorm2d) -> None:
    layer.requires_grad_(False)


# --- of a checkpoint: what its running statistics show ---

BUFFERS: dict[str, tuple[Change, str]] = {
    "nan in a mean": (lambda m: m[1].running_mean[2].fill_(torch.nan), "BN102"),
    "infinity in a variance": (lambda m: m[4].running_var[0].fill_(torch.inf), "BN102"),
    "a layer that was reset": (lambda m: m[4].reset_running_stats(), "BN103"),
    "statistics that were reset, but not the counter": (
        lambda m: (m[4].running_mean.zero_(), m[4].running_var.fill_(1)), "BN103"),
    "all statistics reset, but not the counters": (
        each(lambda layer: (layer.running_mean.zero_(), layer.running_var.fill_(1))), "BN103"),
    "six batches": (each(lambda layer: layer.num_batches_tracked.fill_(6)), "BN104"),
    "float16": (each(lambda layer: setattr(layer, "running_mean", layer.running_mean.half())), "BN105"),
    "bfloat16": (lambda m: m.bfloat16(), "BN105"),
    "a variance below 0": (lambda m: m[8].running_var[3].fill_(-1e-3), "BN106"),
    "a constant channel": (lambda m: m[1].running_var[3].fill_(0), "BN107"),
    "a mean of 10⁵ deviations": (lambda m: m[1].running_mean[3].fill_(1e5), "BN108"),
    "a layer that is called twice a step": (lambda m: m[4].num_batches_tracked.mul_(2), "BN109"),
    "a layer that saw a dummy input": (lambda m: m[4].num_batches_tracked.add_(3), "BN109"),
}  # fmt: skip

SILENT: dict[str, Change] = {
    "as training leaves it": lambda m: None,
    "never trained": lambda m: [layer.reset_running_stats() for layer in m if isinstance(layer, nn.BatchNorm2d)],
    "trained for 50 batches": each(lambda layer: layer.num_batches_tracked.fill_(50)),
    "without counters": each(lambda layer: setattr(layer, "num_batches_tracked", None)),
    "a residual branch that begins with γ = 0": lambda m: m[8].weight.data.zero_(),
    "a mean of 100 deviations": lambda m: m[1].running_mean.copy_(100 * m[1].running_var.sqrt()),
    "one layer without weight and bias": lambda m: m.__setitem__(8, _without_affine(m[8])),
}


def _without_affine(layer: nn.BatchNorm2d) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(8, affine=False)
    made.load_state_dict({name: b for name, b in layer.state_dict().items() if "running" in name or "num" in name})
    return made


@pytest.mark.parametrize("fault", BUFFERS)
def test_faults_in_statistics_are_found_in_a_model_and_in_its_weights_alone(fault: str) -> None:
    change, code = BUFFERS[fault]
    model = trained()
    with torch.no_grad():
        change(model)
    for subject in (model, model.state_dict()):
        assert code in codes(batchnorm.diagnose(subject))
        assert set(codes(batchnorm.diagnose(subject))) - {code} <= {"BN107", "BN108"} - {code}  # a large value has both


@pytest.mark.parametrize("subject", SILENT)
def test_what_only_looks_like_a_fault_is_none(subject: str) -> None:
    model = trained()
    with torch.no_grad():
        SILENT[subject](model)
    for seen in (model, model.state_dict()):
        report = batchnorm.diagnose(seen)
        assert report.ok, report
        assert codes(report) == []


# --- of a model: settings and modes ---

STRUCTURE: dict[str, tuple[Change, bool, str]] = {
    "no running statistics": (lambda m: m.__setitem__(4, nn.BatchNorm2d(8, track_running_stats=False)), True, "BN201"),
    "TensorFlow's momentum": (each(lambda layer: setattr(layer, "momentum", 0.99)), True, "BN202"),
    "a momentum of 0": (each(lambda layer: setattr(layer, "momentum", 0.0)), True, "BN203"),
    "another eps in one layer": (lambda m: setattr(m[8], "eps", 1e-3), True, "BN204"),
    "train() of a part": (lambda m: m[4].train(), False, "BN205"),
    "requires_grad alone": (each(fixed), True, "BN206"),
    "eval() of the layers alone": (each(lambda layer: layer.eval()), True, "BN207"),
    "SyncBatchNorm on the CPU": (lambda m: m.__setitem__(4, nn.SyncBatchNorm(8)), True, "BN208"),
}

DELIBERATE: dict[str, tuple[Change, bool]] = {
    "frozen by freeze": (batchnorm.freeze, True),
    "in evaluation": (lambda m: None, False),
    "converted": (batchnorm.convert, True),
    "ghost batches": (lambda m: batchnorm.convert(m, statistics=batchnorm.Ghost(4)), True),
    "the cumulative average": (each(lambda layer: setattr(layer, "momentum", None)), True),
    "eps of 1e-3 everywhere": (each(lambda layer: setattr(layer, "eps", 1e-3)), True),
    "fixed and in evaluation": (lambda m: (each(fixed)(m), m.eval()), False),
}


@pytest.mark.parametrize("fault", STRUCTURE)
def test_faults_of_settings_and_modes_are_found(fault: str) -> None:
    change, training, code = STRUCTURE[fault]
    model = trained().train(training)
    change(model)
    found = codes(batchnorm.diagnose(model))
    assert code in found
    assert set(found) - {code} <= {"BN103"}  # a layer that was put in is new


@pytest.mark.parametrize("subject", DELIBERATE)
def test_what_is_deliberate_is_no_fault(subject: str) -> None:
    change, training = DELIBERATE[subject]
    model = trained().train(training)
    change(model)
    assert codes(batchnorm.diagnose(model)) == []


def test_every_rule_has_a_fault_here_and_says_all_there_is_to_say() -> None:
    assert {code for _, code in BUFFERS.values()} | {c for *_, c in STRUCTURE.values()} | {
        "BN101",
        "BN110",
        "BN111",
    } == set(RULES)  # test_gap.py has those
    assert len({rule.slug for rule in RULES.values()}) == len(RULES)
    for code, rule in RULES.items():
        assert rule.code == code
        text = str(rule)
        for part in (rule.title, rule.why, rule.measured, rule.remedy, rule.false_alarms):
            assert part
            assert part in text


# --- the report ---


def test_one_cause_is_one_finding_with_all_its_layers() -> None:
    model = trained()
    with torch.no_grad():
        for at in (1, 8):
            model[at].running_var[:at].fill_(torch.nan)
    report = batchnorm.diagnose(model, name="mine")
    (finding,) = report.findings
    assert finding.found.layers == ("8", "1")  # the worst first
    assert report["1"] == (finding,)
    assert report["4"] == ()
    with pytest.raises(KeyError, match="no batch normalization layer is called '3'"):
        report["3"]
    assert not report.ok
    with pytest.raises(RuntimeError, match="running statistics are nan or infinite in 8 channels of 2 layers"):
        report.raise_if("error")
    assert report.scalars() == {"batchnorm/errors": 1, "batchnorm/warnings": 0, "batchnorm/BN102": 2}
    assert str(report).startswith("mine   3 batch-norm layers   1 error\n\nERROR   running statistics are nan")
    assert "not run: 3 rules need data" in str(report)
    assert repr(report) == "Diagnosis('mine', 3 layers, findings: BN102)"
    assert finding.fingerprint == "BN102:1:8"


def test_advice_is_counted_and_shown_when_asked_for() -> None:
    model = trained()
    model[8].eps = 1e-3
    report = batchnorm.diagnose(model)
    assert report.ok
    assert "nothing wrong; advice: 1" in str(report)
    assert "BN204" not in str(report)
    assert "BN204" in report.text(advice=True)
    report.raise_if("warning")
    with pytest.raises(RuntimeError, match="BN204"):
        report.raise_if("advice")


def test_a_model_without_batch_normalization_and_what_is_no_model() -> None:
    report = batchnorm.diagnose(nn.Linear(2, 2))
    assert report.ok
    assert str(report) == "Linear: nothing to check, no batch normalization layer"
    assert batchnorm.diagnose({}).ok
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module or a state_dict, got int"):
        batchnorm.diagnose(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="need a model that can be run"):
        batchnorm.diagnose(trained().state_dict(), batches())
    with pytest.raises(TypeError, match="metric needs data"):
        batchnorm.diagnose(trained(), metric=lambda model: 0.0)


def test_odd_weights_are_passed_over() -> None:
    state: dict[str, Any] = dict(network().state_dict())
    state |= {
        "sparse.running_mean": torch.ones(3).to_sparse(), "sparse.running_var": torch.ones(3),
        "meta.running_mean": torch.ones(3, device="meta"), "meta.running_var": torch.ones(3, device="meta"),
        "other.running_mean": torch.ones(3), "other.running_var": torch.ones(4),
        "matrix.running_mean": torch.ones(3, 2), "matrix.running_var": torch.ones(3, 2),
        "text.running_mean": "mean", "text.running_var": "var", "lonely.running_mean": torch.ones(3),
        "not_running_mean": torch.ones(3), "not_running_var": torch.ones(3),
        "whole.running_mean": torch.ones(3), "whole.running_var": torch.ones(3), "whole.num_batches_tracked": "7",
    }  # fmt: skip
    assert batchnorm.diagnose(state).layers == ("1", "4", "8", "whole")


def test_the_page_of_rules_is_what_the_rules_say() -> None:
    import rules  # docs/rules.py

    assert Path(rules.__file__).with_suffix(".md").read_text(encoding="utf-8") == rules.page()
