"""What ``diagnose`` returns."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from batchnorm.diagnosis.rules import RULES, Finding
from batchnorm.diagnosis.rules.rule import SEVERITIES, Severity

__all__ = ["Diagnosis", "at_least"]


def at_least(severity: Severity) -> tuple[Severity, ...]:
    """Give the severities from the worst down to this one."""
    return SEVERITIES[: SEVERITIES.index(severity) + 1]


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with a model's batch normalization.

    Attributes:
        name: what was looked at.
        layers: the paths of its batch normalization layers.
        findings: errors first; one for each cause, however many layers it has.
        not_run: the codes of rules that need more than was looked at, and what they need.

    Example:
        >>> report = batchnorm.diagnose(model)
        >>> report.ok, [finding.rule.code for finding in report["layer1.0.bn1"]]
        (False, ['BN103'])
    """

    name: str
    layers: tuple[str, ...]
    findings: tuple[Finding, ...]
    not_run: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether there is neither an error nor a warning."""
        return not self.of(at_least("warning"))

    def of(self, severities: Iterable[Severity]) -> tuple[Finding, ...]:
        """Give the findings of some severities."""
        wanted = set(severities)
        return tuple(finding for finding in self.findings if finding.rule.severity in wanted)

    def __getitem__(self, layer: str) -> tuple[Finding, ...]:
        """Give the findings that concern a layer.

        Raises:
            KeyError: if there is no such layer.
        """
        if layer not in self.layers:
            raise KeyError(f"no batch normalization layer is called {layer!r}")
        return tuple(finding for finding in self.findings if layer in finding.found.layers)

    def raise_if(self, severity: Severity = "error") -> None:
        """Raise what was found, if any of it is as bad as that or worse.

        Raises:
            RuntimeError: with the findings as its message.
        """
        found = self.of(at_least(severity))
        if found:
            raise RuntimeError("\n".join(map(str, found)))

    def scalars(self) -> dict[str, float]:
        """Give numbers to log: how many findings of each severity, and how many layers each rule concerns."""
        counts = Counter(finding.rule.severity for finding in self.findings)
        found: dict[str, float] = {f"batchnorm/{severity}s": counts[severity] for severity in ("error", "warning")}
        for finding in self.findings:
            name = f"batchnorm/{finding.rule.code}"
            found[name] = found.get(name, 0) + max(1, len(finding.found.layers))
        return found

    def as_dict(self) -> dict[str, Any]:
        """Give all of it for JSON."""
        return {
            "schema": "batchnorm.diagnosis/1",
            "name": self.name,
            "ok": self.ok,
            "layers": list(self.layers),
            "findings": [
                {
                    "code": finding.rule.code,
                    "slug": finding.rule.slug,
                    "severity": finding.rule.severity,
                    "message": finding.found.message,
                    "value": finding.found.value,
                    "layers": list(finding.found.layers),
                    "remedy": finding.rule.remedy,
                    "fingerprint": finding.fingerprint,
                }
                for finding in self.findings
            ],
            "not_run": self.not_run,
        }

    def to_json(self) -> str:
        """Give all of it as JSON."""
        return json.dumps(self.as_dict(), indent=1)

    def __str__(self) -> str:
        return self.text()

    def text(self, advice: bool = False) -> str:
        """Give the first screen.

        Args:
            advice: show what is only advice, too.
        """
        if not self.layers:
            return f"{self.name}: nothing to check, no batch normalization layer"
        counts = Counter(finding.rule.severity for finding in self.findings)
        said = [f"{counts[s]} {s}{'s' if counts[s] != 1 else ''}" for s in ("error", "warning") if counts[s]]
        hidden = f"; advice: {counts['advice']}" if counts["advice"] and not advice else ""
        head = f"{self.name}   {len(self.layers)} batch-norm layers   {', '.join(said) or 'nothing wrong'}{hidden}"
        shown = self.of(at_least("advice" if advice else "warning"))
        lines = [head, *(f"\n{finding}" for finding in shown)]
        if self.not_run:
            needs = Counter(self.not_run.values())
            rest = (f"{n} rules need {need}" if n != 1 else f"1 rule needs {need}" for need, n in needs.items())
            lines.append(f"\nnot run: {'; '.join(rest)}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        codes = ", ".join(finding.rule.code for finding in self.findings)
        return f"Diagnosis({self.name!r}, {len(self.layers)} layers, findings: {codes or 'none'})"


def judged(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Sort findings: the worst first, then by code."""
    return tuple(sorted(findings, key=lambda f: (SEVERITIES.index(f.rule.severity), f.rule.code)))


def missing(sources: Iterable[str]) -> dict[str, str]:
    """The rules that need more than was looked at, and what they need."""
    needs = {"structure": "the model, not its weights alone", "data": "data"}
    return {code: needs[rule.needs] for code, rule in RULES.items() if rule.needs not in sources}
