"""What a rule reads and what it makes: views of a history, robust statistics, findings; and how rules are known."""

from __future__ import annotations

from .findings import (
    SEVERITIES,
    Finding,
    beneath_their_roots,
    most_severe_first,
    severity_rank,
    span_of,
    title_of,
)
from .registry import RULES, Rule, rule, select
from .statistics import (
    MAD_TO_SIGMA,
    Course,
    Float64Array,
    Slope,
    blocks_of,
    course_of,
    finite_median,
    finite_only,
    log10,
    median,
    medians,
    running_median,
    spread,
    theil_sen,
    thin,
)
from .view import Int64Array, Layout, Points, View

__all__ = [
    "MAD_TO_SIGMA",
    "RULES",
    "SEVERITIES",
    "Course",
    "Finding",
    "Float64Array",
    "Int64Array",
    "Layout",
    "Points",
    "Rule",
    "Slope",
    "View",
    "beneath_their_roots",
    "blocks_of",
    "course_of",
    "finite_median",
    "finite_only",
    "log10",
    "median",
    "medians",
    "most_severe_first",
    "rule",
    "running_median",
    "select",
    "severity_rank",
    "span_of",
    "spread",
    "theil_sen",
    "thin",
    "title_of",
]
