"""The diagnosis while a training runs: evaluates what has arrived, and reports what it finds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from ..diagnostics import Diagnosis, Finding, severity_rank
from ..history import History

logger = logging.getLogger("pytracker")

_SHARE = 0.02
"""The rules take at most this share of the time, except for the evaluations that ``diagnose`` would make as well."""


class LiveDiagnosis:
    """Runs the rules over a history that grows; writes what is found to the run, and reports it.

    A history that begins with steps, or goes back to an earlier one, is judged again, and what was reported of it
    before is not reported a second time.

    Args:
        diagnosis: the rules; None for none.
        run: where findings are kept.
        on_finding: called with each finding that is new, has grown or is withdrawn; without it, new ones, those that
            have become more severe, and withdrawn ones are logged as warnings. Where it raises, these are logged beside
            the error, and the training goes on.
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
        self._reported = {str(kept.get("key")): severity_rank(kept) for kept in run.history.findings}
        self._unheard: set[str] = set()  # given to an on_finding that raised
        self._truncations = -1  # of the history when it was evaluated
        self._unjudged: dict[str, str] = {}
        self._next = 0.0  # when the rules may run although no evaluation is due

    @property
    def findings(self) -> list[Finding]:
        """All findings so far, the most severe first."""
        found = [*self._others.values(), *(self._diagnosis.findings if self._diagnosis is not None else [])]
        return sorted(found, key=Finding.place) if self._others else found

    def evaluate(self, history: History) -> None:
        """Run the rules, unless they have used up their 2 % time budget.

        At each of the first 50 drains, and whenever the training is 2 % longer, they run anyway: ``diagnose`` will
        evaluate there too.
        """
        due = self._diagnosis is not None and history.last_step + 1 >= self._diagnosis.due
        if due or time.perf_counter() >= self._next or self._truncations != history.truncations:
            self._evaluate(history)

    def evaluate_now(self, history: History) -> None:
        """Run the rules, whatever time they take."""
        self._evaluate(history)

    def evaluate_again(self, history: History) -> None:
        """Late values have arrived for the last step: undo the evaluation there, if there was one, and repeat it."""
        self._evaluate(history, again=True)

    def _evaluate(self, history: History, again: bool = False) -> None:
        begin = time.perf_counter()
        went_back = self._truncations != history.truncations
        if went_back:
            self._truncations = history.truncations
            kept = {finding.get("key") for finding in history.findings}
            self._others = {key: finding for key, finding in self._others.items() if key in kept}
        if self._diagnosis is None:
            return
        changed = self._diagnosis.update(history, again=again)
        known = self._reported if went_back else {}
        if self._diagnosis.unjudged != self._unjudged:
            self._unjudged = self._diagnosis.unjudged
            self._run.set_meta(unjudged=self._unjudged)
        self._report([each for each in changed if known.get(each.key, -1) < each.rank], changed)
        if went_back:  # what is gone would be news if it came back
            self._reported = {each.key: self._reported.get(each.key, -1) for each in self.findings}
        done = time.perf_counter()
        self._next = done + (done - begin) / _SHARE

    def add(self, finding: Finding) -> None:
        """Take a finding that no rule can make."""
        known = self._others.get(finding.key)
        merged = finding if known is None else known.merge(finding)
        self._others[finding.key] = merged
        self._report([merged], [merged])

    def _report(self, findings: list[Finding], changed: list[Finding]) -> None:
        """Keep what has ``changed``, all of it before ``findings`` are reported: who hears of them may close."""
        for finding in changed:
            self._run.log_finding(finding.to_dict())
            self._mirror(finding)
        for finding in findings:
            before = self._reported.get(finding.key, -1)
            news = finding.rank > before or bool(finding.withdrawn and before > 0)
            self._reported[finding.key] = -1 if finding.withdrawn else max(finding.rank, before)
            if self._on_finding is None:
                if news:
                    logger.warning("%s", finding)
                continue
            try:
                self._on_finding(finding)
            except Exception as error:  # an alarm that fails must not be the end of the training
                if news or finding.key not in self._unheard:
                    kind, first = type(error).__name__, not self._unheard
                    message = "on_finding raised %s: %s; the training goes on. It was given %s"
                    logger.warning(message, kind, error, finding, exc_info=first)
                self._unheard.add(finding.key)
