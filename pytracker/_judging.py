"""The diagnosis while a training runs: looks at what has arrived, and tells what it finds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from .diagnostics import Diagnosis, Finding
from .history import History

logger = logging.getLogger("pytracker")

_SHARE = 0.02
"""The rules take at most this share of the time: where drains come fast, they look at several at once."""


class Judge:
    """Runs the rules over a history that grows; writes what is found to the run, and tells it.

    Args:
        diagnosis: the rules; None for none.
        run: where findings are kept.
        on_finding: called with each finding that is new or has grown; without it, new ones are logged as warnings.
    """

    def __init__(self, diagnosis: Diagnosis | None, run: Any, on_finding: Callable[[Finding], None] | None) -> None:
        self._diagnosis = diagnosis
        self._run = run
        self._on_finding = on_finding
        self._others: dict[str, Finding] = {}  # found by other means than the rules
        self._known: set[str] = set()
        self._again = 0.0

    @property
    def findings(self) -> list[Finding]:
        """All findings so far, the most severe first."""
        found = [*self._others.values(), *(self._diagnosis.findings if self._diagnosis is not None else [])]
        return sorted(found, key=lambda finding: (-finding.rank, finding.first_step, finding.rule))

    def look(self, history: History, now: bool = False) -> None:
        """Ask the rules, unless that takes more than its share of the time: then a later call will, or one ``now``."""
        begin = time.perf_counter()
        if self._diagnosis is None or (begin < self._again and not now):
            return
        for finding in self._diagnosis.update(history):
            self._tell(finding)
        done = time.perf_counter()
        self._again = done + (done - begin) / _SHARE

    def add(self, finding: Finding) -> None:
        """Take a finding that no rule can make."""
        known = self._others.get(finding.key)
        merged = finding if known is None else known.merge(finding)
        self._others[finding.key] = merged
        self._tell(merged)

    def _tell(self, finding: Finding) -> None:
        self._run.log_finding(finding.to_dict())
        if self._on_finding is not None:
            self._on_finding(finding)
        elif finding.key not in self._known:
            logger.warning("%s", finding)
        self._known.add(finding.key)
