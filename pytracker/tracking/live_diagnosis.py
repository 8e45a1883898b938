"""The diagnosis while a training runs: looks at what has arrived, and tells what it finds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from ..diagnostics import Diagnosis, Finding, severity_rank
from ..history import History

logger = logging.getLogger("pytracker")

_SHARE = 0.02
"""The rules take at most this share of the time, but for the looks that ``diagnose`` would take as well."""


class LiveDiagnosis:
    """Runs the rules over a history that grows; writes what is found to the run, and tells it.

    A history that begins with steps, or goes back to an earlier one, is judged anew, and what was told of it before is
    not told again.

    Args:
        diagnosis: the rules; None for none.
        run: where findings are kept.
        on_finding: called with each finding that is new or has grown; without it, new ones, and those that have become
            more severe, are logged as warnings. Where it raises, these are logged beside the error, and the training
            goes on.
        mirror: given each finding that is kept in the run.
    """

    def __init__(
        self,
        diagnosis: Diagnosis | None,
        run: Any,
        on_finding: Callable[[Finding], None] | None,
        mirror: Callable[[Finding], None] | None = None,
    ) -> None:
        self._diagnosis = None if diagnosis is None else diagnosis.for_training()
        self._run = run
        self._on_finding, self._mirror = on_finding, mirror or (lambda finding: None)
        self._others: dict[str, Finding] = {}  # found by other means than the rules
        self._told = {str(kept.get("key")): severity_rank(kept) for kept in run.history.findings}
        self._unheard: set[str] = set()  # told to an on_finding that raised
        self._truncations = -1  # of the history when it was looked at
        self._again = 0.0  # when the rules may look again although no look is due

    @property
    def findings(self) -> list[Finding]:
        """All findings so far, the most severe first."""
        found = [*self._others.values(), *(self._diagnosis.findings if self._diagnosis is not None else [])]
        return sorted(found, key=Finding.place)

    def look(self, history: History, now: bool = False, again: bool = False) -> None:
        """Ask the rules, unless that takes more than its share of the time: then a later call will, or one ``now``.

        They are asked at each of the first 50 drains, and whenever the training is 2 % longer, in any case: these are
        the looks that ``diagnose`` will take.

        ``again``: now, and where the end has been looked at, once more, for what has come since for the same steps.
        """
        begin = time.perf_counter()
        anew = self._truncations != history.truncations
        due = self._diagnosis is not None and history.last_step + 1 >= self._diagnosis.due
        if begin < self._again and not (due or now or again or anew):
            return
        if anew:
            self._truncations = history.truncations
            kept = {finding.get("key") for finding in history.findings}
            self._others = {key: finding for key, finding in self._others.items() if key in kept}
        if self._diagnosis is None:
            return
        changed = self._diagnosis.update(history, again=again)
        self._tell([each for each in changed if not (anew and self._told.get(each.key, -1) >= each.rank)], changed)
        if anew:  # what is gone would be news if it came back
            self._told = {each.key: self._told.get(each.key, -1) for each in self.findings}
        done = time.perf_counter()
        self._again = done + (done - begin) / _SHARE

    def add(self, finding: Finding) -> None:
        """Take a finding that no rule can make."""
        known = self._others.get(finding.key)
        merged = finding if known is None else known.merge(finding)
        self._others[finding.key] = merged
        self._tell([merged], [merged])

    def _tell(self, findings: list[Finding], changed: list[Finding]) -> None:
        """Keep what has ``changed``, all of it before anyone is told: who is told may close the tracker."""
        for finding in changed:
            self._run.log_finding(finding.to_dict())
            self._mirror(finding)
        for finding in findings:
            worse = finding.rank > self._told.get(finding.key, -1)
            self._told[finding.key] = max(finding.rank, self._told.get(finding.key, -1))
            if self._on_finding is None:
                if worse:
                    logger.warning("%s", finding)
                continue
            try:
                self._on_finding(finding)
            except Exception as error:  # an alarm that fails must not be the end of the training
                if worse or finding.key not in self._unheard:
                    kind, first = type(error).__name__, not self._unheard
                    message = "on_finding raised %s: %s; the training goes on. It was told %s"
                    logger.warning(message, kind, error, finding, exc_info=first)
                self._unheard.add(finding.key)
