"""All rules, by their codes."""

from batchnorm.diagnosis.rules import gap, statistics, structure
from batchnorm.diagnosis.rules.rule import Finding, Found, Rule, Severity

__all__ = ["RULES", "Finding", "Found", "Rule", "Severity"]

RULES: dict[str, Rule] = {rule.code: rule for rule in (*gap.RULES, *statistics.RULES, *structure.RULES)}
