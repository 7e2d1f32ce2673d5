"""A rule, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from batchnorm.diagnosis.evidence import Evidence, Source

__all__ = ["SEVERITIES", "Finding", "Found", "Rule", "Severity"]

Severity = Literal["error", "warning", "advice"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "advice")  # worst first


@dataclass(frozen=True)
class Found:
    """One cause, however many layers show it.

    Attributes:
        layers: the paths of the layers, worst first; empty where it concerns the whole model.
        message: what is so, with the measured value.
        value: the worst layer's, in the rule's unit; None for what is no number.
    """

    layers: tuple[str, ...]
    message: str
    value: float | None = None


@dataclass(frozen=True)
class Rule:
    """Judges evidence. The report, ``batchnorm rule`` and docs/rules.md all print these texts.

    Attributes:
        code: never given to another rule, "BN1xx" of statistics, "BN2xx" of structure.
        slug: its name in words.
        severity: an error is a fact; what may be meant so is a warning at most.
        needs: what must have been looked at.
        title: the symptom, in a user's words.
        why: how it comes about.
        measured: what is compared with what, and the threshold with where it comes from.
        remedy: what to do, with the call or command.
        false_alarms: when it is right as it is.
        problems: whose numbers in the catalogue of problems it detects.
        look: gives what it finds in evidence, one for each cause.
    """

    code: str
    slug: str
    severity: Severity
    needs: Source
    title: str
    why: str
    measured: str
    remedy: str
    false_alarms: str
    problems: tuple[int, ...]
    look: Callable[[Evidence], Iterable[Found]]

    def findings(self, evidence: Evidence) -> list[Finding]:
        """Give what it finds, or nothing where its evidence was not looked at."""
        return [Finding(self, found) for found in self.look(evidence)] if self.needs in evidence.sources else []

    def __str__(self) -> str:
        parts = {"Why": self.why, "Measured": self.measured, "Remedy": self.remedy, "False alarms": self.false_alarms}
        lines = (f"{name}: {text}" for name, text in parts.items())
        return "\n\n".join((f"{self.code} {self.slug} ({self.severity}): {self.title}", *lines))


@dataclass(frozen=True)
class Finding:
    """What a rule has found."""

    rule: Rule
    found: Found

    @property
    def fingerprint(self) -> str:
        """What identifies it from one run to the next: the code and the layers, never the value."""
        return ":".join((self.rule.code, *sorted(self.found.layers)))

    def __str__(self) -> str:
        said, layers = self.found.message, self.found.layers
        where = f" ({layers[0]}{f' and {len(layers) - 1} more' if len(layers) > 1 else ''})" if layers else ""
        return f"{self.rule.severity.upper():8}{said}{where}  {self.rule.code}\n        {self.rule.remedy}"
