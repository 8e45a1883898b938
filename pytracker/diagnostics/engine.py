"""Diagnosis: the rules over a training that grows, and ``diagnose``: the same over one that is over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..history import History
from .findings import Finding
from .registry import Rule, select
from .view import Layout, View

RULE_FAILED = "rule_failed"
_DEFAULT_EVERY = 50
_GROWTH = 0.02  # diagnose() looks again when the training is this much longer


class Diagnosis:
    """Judges a training as it grows: ``update`` after each drain.

    Each rule has at most one finding, which grows. A rule that raises is reported as ``rule_failed`` and not asked
    again. Nothing of the history is copied, and an update costs the same at step 100 as at step 1,000,000.

    Args:
        rules: names or rules; all known ones by default.
        settings: by rule, what to change of its settings: ``{"loss_spike": {"z": 12.0}}``.

    Raises:
        InvalidValueError: there is no such rule or setting.
    """

    def __init__(
        self,
        rules: Iterable[str | Rule] | None = None,
        *,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Select the rules."""
        self._rules = select(rules, settings)
        self._findings: dict[str, Finding] = {}
        self._layout: Layout | None = None
        self._since = 0

    @property
    def findings(self) -> list[Finding]:
        """All findings so far: the most severe first, then by first step."""
        return sorted(self._findings.values(), key=lambda finding: (-finding.rank, finding.first_step, finding.rule))

    @property
    def rules(self) -> list[str]:
        """The names of the rules still in use."""
        return [rule.name for rule in self._rules]

    def update(self, history: History, *, stop: int | None = None) -> list[Finding]:
        """Look at what ``history`` has gained since the last call, and return the findings that are new or grew.

        ``stop``: look only at the steps before it; all by default.
        """
        if self._layout is None or self._layout.infos is not history.parameters.infos:
            self._layout = Layout(history.parameters.infos)
        view = View(history, stop=stop, since=self._since, layout=self._layout)
        if view.stop <= self._since:
            return []
        changed: dict[str, Finding] = {}
        for rule in list(self._rules):
            for finding in self._judge(rule, view):
                known = self._findings.get(finding.key)
                merged = finding if known is None else known.merge(finding)
                if merged != known:
                    self._findings[finding.key] = changed[finding.key] = merged
        self._since = view.stop
        return list(changed.values())

    def _judge(self, rule: Rule, view: View) -> list[Finding]:
        try:
            return rule.judge(view.for_rule(rule.name, self._findings.get(rule.name)))
        except Exception as error:  # whatever a rule does wrong, the training and the other rules go on
            self._rules.remove(rule)
            return [_failure(rule, view, error)]


def _failure(rule: Rule, view: View, error: Exception) -> Finding:
    return Finding(
        rule=f"{RULE_FAILED}:{rule.name}",
        severity="info",
        first_step=view.stop - 1,
        last_step=view.stop - 1,
        evidence=f"the rule {rule.name!r} raised {type(error).__name__}: {error}",
        cause="a bug in the rule, or a history of a kind that it was not written for",
        action="report it with the history; the rule is off for the rest of this training",
    )


def diagnose(
    history: History,
    *,
    rules: Iterable[str | Rule] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Finding]:
    """Return what is wrong with a training, from its history alone: the most severe first.

    The rules look at the history as they would have while it grew: after every ``history.meta["every"]`` steps (50
    where that is not known) at first, and later each time that it has grown by 2 %. So a million steps take about 500
    looks.

    >>> from pytracker.history import History
    >>> for finding in diagnose(History(loss=[0.7] * 100)):
    ...     print(finding.severity, finding.rule, finding.first_step, finding.last_step)
    critical constant 0 99
    """
    diagnosis = Diagnosis(rules, settings=settings)
    for stop in _looks(history):
        diagnosis.update(history, stop=stop)
    return diagnosis.findings


def _looks(history: History) -> Iterator[int]:
    end = history.last_step + 1
    every = max(1, int(history.meta.get("every") or _DEFAULT_EVERY))
    stop = every
    while stop < end:
        yield stop
        stop += max(every, int(stop * _GROWTH) // every * every)
    if end > 0:
        yield end
