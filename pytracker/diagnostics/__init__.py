"""Diagnosis: what is wrong with a training, where, and what to do. No torch here.

``diagnose(history)`` judges a training that is over; a ``Diagnosis`` judges one that grows. docs/diagnosis.md explains
each rule.
"""

from __future__ import annotations

# The order in which the families are imported is the order in which rules are evaluated and listed.
from .rules import loss as loss  # isort: skip
from .rules import gradients as gradients  # isort: skip
from .rules import layers as layers  # isort: skip
from .rules import settings as settings  # isort: skip
from .engine import RULE_FAILED, Diagnosis, diagnose, diagnose_recorded
from .findings import SEVERITIES, Finding, most_severe_first, severity_rank, span_of
from .registry import RULES, Rule, rule
from .view import Points, View

__all__ = [
    "RULES",
    "RULE_FAILED",
    "SEVERITIES",
    "Diagnosis",
    "Finding",
    "Points",
    "Rule",
    "View",
    "diagnose",
    "diagnose_recorded",
    "most_severe_first",
    "rule",
    "severity_rank",
    "span_of",
]
