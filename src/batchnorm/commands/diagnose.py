"""`batchnorm diagnose`: what is wrong with a checkpoint's or a model's batch normalization."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from batchnorm.commands import checkpoints, named
from batchnorm.diagnosis.diagnose import diagnose, judge
from batchnorm.diagnosis.evidence import of_state
from batchnorm.diagnosis.report import Diagnosis, at_least
from batchnorm.diagnosis.rules import RULES, Rule
from batchnorm.diagnosis.rules.rule import Severity

__all__ = ["in_format", "rule", "run"]


def run(
    target: str, checkpoint: Path | None, key: str | None, data: str | None, metric: str | None, batches: int | None,
    select: str, ignore: str,
) -> Diagnosis:  # fmt: skip
    """Diagnose what is named.

    Args:
        target: a checkpoint file, or the name of a factory, package.module:factory or path/file.py:factory.
        checkpoint: whose weights the model is given, if it is one.
        key: under which the checkpoint has the weights.
        data, metric: names of a loader and of a function of the model, if it is one.
        batches: how many to take at most.
        select, ignore: codes or beginnings of codes, with commas between.

    Raises:
        ValueError: for what is neither, or a beginning that no rule has.
    """
    is_model = ":" in target and not Path(target).exists()
    if is_model:
        model = named.model(target)
        if checkpoint is not None:
            checkpoints.fit(model, checkpoints.read(checkpoint, key))
        batch = None if data is None else named.data(data)
        measure = None if metric is None else named.function(metric)
        report = diagnose(model, batch, measure, batches=batches, name=target)
    elif checkpoint is not None or data is not None or metric is not None:
        raise ValueError(
            "--checkpoint, --data and --metric go with a model that can be run: package.module:factory or "
            "path/file.py:factory"
        )
    else:
        report = judge(of_state(target, checkpoints.read(Path(target), key).state))
    wanted, unwanted = _prefixes(select) or ("",), _prefixes(ignore)
    chosen = {code for code in RULES if code.startswith(wanted) and not code.startswith(unwanted)}
    kept = tuple(finding for finding in report.findings if finding.rule.code in chosen)
    not_run = {code: need for code, need in report.not_run.items() if code in chosen}
    return dataclasses.replace(report, findings=kept, not_run=not_run)


def _prefixes(text: str) -> tuple[str, ...]:
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    for prefix in found:
        if not any(code.startswith(prefix) for code in RULES):
            raise ValueError(f"no rule's code begins with {prefix!r}: {', '.join(RULES)}")
    return found


def in_format(report: Diagnosis, kind: str, advice: bool) -> str:
    """Give a report as text, as JSON, or as GitHub's annotations."""
    if kind == "json":
        return report.to_json()
    if kind == "text":
        return report.text(advice)
    names: dict[Severity, str] = {"error": "error", "warning": "warning", "advice": "notice"}
    shown = report.of(at_least("advice" if advice else "warning"))
    texts = [f"{f.found.message}. {f.rule.remedy}".replace("%", "%25").replace("\n", "%0A") for f in shown]
    heads = [f"::{names[f.rule.severity]} title={f.rule.code} {f.rule.slug}::" for f in shown]
    return "\n".join(map("".join, zip(heads, texts, strict=True)))


def rule(code: str) -> Rule:
    """Find a rule by its code or its name in words.

    Raises:
        ValueError: if there is none.
    """
    for known in RULES.values():
        if code in (known.code, known.slug):
            return known
    raise ValueError(f"there is no rule {code!r}: {', '.join(f'{r.code} {r.slug}' for r in RULES.values())}")
