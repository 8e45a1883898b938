"""Named series over steps, and what is known of each parameter. No torch here."""

from __future__ import annotations

from .history import History, Series
from .notebook import Curve, html_table
from .parameters import (
    COLUMNS,
    DEFAULT_INTERVAL_BYTES,
    DEFAULT_ROW_BYTES,
    FIELDS,
    INFS,
    NANS,
    SUM_SQ,
    Float64Array,
    Int64Array,
    Interval,
    ParameterHistory,
    ParameterInfo,
    says_nothing,
    summarize,
)

__all__ = [
    "COLUMNS",
    "DEFAULT_INTERVAL_BYTES",
    "DEFAULT_ROW_BYTES",
    "FIELDS",
    "INFS",
    "NANS",
    "SUM_SQ",
    "Curve",
    "Float64Array",
    "History",
    "Int64Array",
    "Interval",
    "ParameterHistory",
    "ParameterInfo",
    "Series",
    "html_table",
    "says_nothing",
    "summarize",
]
