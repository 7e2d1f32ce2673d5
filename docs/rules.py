"""Write docs/rules.md from the rules themselves: python docs/rules.py."""

from __future__ import annotations

from pathlib import Path

from batchnorm.diagnosis.rules import RULES, Rule

HEAD = """# What `batchnorm diagnose` looks for

Written by `python docs/rules.py` from the rules themselves; `batchnorm rule BN102` prints one of them. An *error* is a
fact; what may be meant so is a *warning* at most; *advice* is shown with `--advice`.

| | | severity | needs |
|---|---|---|---|
"""
NEEDS = {"buffers": "weights", "structure": "the model", "data": "the model and data"}


def page() -> str:
    """The whole page."""
    rows = (f"| [{r.code}](#{r.code.lower()}) | {r.title} | {r.severity} | {NEEDS[r.needs]} |" for r in RULES.values())
    return HEAD + "\n".join(rows) + "\n" + "".join(map(section, RULES.values()))


def section(rule: Rule) -> str:
    """What is said of one rule."""
    parts = {"Why": rule.why, "Measured": rule.measured, "Remedy": rule.remedy, "False alarms": rule.false_alarms}
    said = "\n\n".join(f"**{name}.** {text}" for name, text in parts.items())
    return f"\n## {rule.code}\n\n`{rule.slug}` ({rule.severity}): {rule.title}.\n\n{said}\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page(), encoding="utf-8")
