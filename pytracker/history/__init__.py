"""Named series over steps, and what is known of each parameter. No torch here."""

from __future__ import annotations

from .history import History
from .intervals import (
    FIELDS,
    Float64Array,
    Int64Array,
    Interval,
    ParameterInfo,
    checked_steps,
    says_nothing,
    summarize,
    to_float32,
    update_ratios,
)
from .notebook import Curve, html_table
from .parameters import DEFAULT_INTERVAL_BYTES, DEFAULT_ROW_BYTES, ParameterHistory
from .players import GRADIENT_NORM, PlayerHistory, frozen_in, have_steps_of_their_own, places_of, players_of
from .recorder import Document, Entry, ExactRows, Points, Recorder, Truncation, checked_finding, finding_key
from .series import Series

__all__ = [
    "DEFAULT_INTERVAL_BYTES",
    "DEFAULT_ROW_BYTES",
    "FIELDS",
    "GRADIENT_NORM",
    "Curve",
    "Document",
    "Entry",
    "ExactRows",
    "Float64Array",
    "History",
    "Int64Array",
    "Interval",
    "ParameterHistory",
    "ParameterInfo",
    "PlayerHistory",
    "Points",
    "Recorder",
    "Series",
    "Truncation",
    "checked_finding",
    "checked_steps",
    "finding_key",
    "frozen_in",
    "have_steps_of_their_own",
    "html_table",
    "places_of",
    "players_of",
    "says_nothing",
    "summarize",
    "to_float32",
    "update_ratios",
]
