"""Diagnosis: what is wrong with a training, where, and what to do. No torch here.

``diagnose(history)`` judges a training that is over; a ``Diagnosis`` judges one that grows. docs/diagnosis.md explains
each rule.
"""

from __future__ import annotations

from .. import rules as _rules  # registers them
from ..evidence import (
    RULES,
    SEVERITIES,
    Finding,
    Points,
    Rule,
    View,
    most_severe_first,
    rule,
    severity_rank,
    span_of,
    title_of,
)
from .engine import Diagnosis, Findings, diagnose, diagnose_recorded
from .judge import RULE_FAILED

__all__ = [
    "RULES",
    "RULE_FAILED",
    "SEVERITIES",
    "Diagnosis",
    "Finding",
    "Findings",
    "Points",
    "Rule",
    "View",
    "diagnose",
    "diagnose_recorded",
    "most_severe_first",
    "rule",
    "severity_rank",
    "span_of",
    "title_of",
]

del _rules
