"""``Diagnosis`` runs the rules on a growing history, ``diagnose`` on a finished one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from .._checks import flag, kind_of, whole_number, writable
from ..errors import in_words
from ..evidence import RULES, Finding, Layout, Rule, View, most_severe_first, select
from ..history import History
from .roots import with_roots

T = TypeVar("T")
RULE_FAILED = "rule_failed"
_DEFAULT_EVERY = 50
_FIRST_LOOKS = 50  # so many drains are all looked at
_GROWTH = 0.02  # later, a look is due when the training is this much longer


@dataclass
class _State:
    """What a diagnosis knows: the rules in use, what they found, the steps seen, and when the next look is due."""

    rules: list[Rule]
    findings: dict[str, Finding] = field(default_factory=dict)
    since: int = 0
    due: int = 0
    looks: int = 0  # that were due
    withdrawn: dict[str, Finding] = field(default_factory=dict)
    unjudged: dict[str, str] = field(default_factory=dict)

    def seen(self, stop: int) -> None:
        """Take note of a look at ``stop`` steps; one that wasn't due doesn't move the next one that is."""
        self.since = stop
        if stop >= self.due:
            self.looks += 1
            self.due = stop + (1 if self.looks < _FIRST_LOOKS else max(1, int(stop * _GROWTH)))

    def copy(self) -> _State:
        """Return what stays as it is when the rules go on."""
        return replace(
            self,
            rules=list(self.rules),
            findings=dict(self.findings),
            withdrawn=dict(self.withdrawn),
            unjudged=dict(self.unjudged),
        )

    def told(self) -> dict[str, Finding]:
        """Return by key all findings as they are told: with their roots, and those that were withdrawn."""
        return self.withdrawn | {each.key: each for each in with_roots(self.findings.values())}


class Diagnosis:
    """Judges a training as it grows: ``update`` after each drain.

    Each rule has at most one finding, which grows. A rule that raises is reported as ``rule_failed:NAME`` and not asked
    again. Nothing of the history is copied, and an update costs the same at step 100 as at step 1,000,000. Another
    history, or one that went back to an earlier step (``History.truncate``), is judged again: no finding stays that
    rests on what is no longer there.

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
        self._selected = select(rules, settings)
        np.percentile(np.zeros(2), 50)  # numpy loads a part of itself at the first one: now, and not at a drain
        self._begin(None)

    def _begin(self, history: History | None) -> None:
        self._history = history
        self._truncations = 0 if history is None else history.truncations
        self._layout: Layout | None = None
        self._state = _State(list(self._selected))
        self._before: _State | None = None  # the latest look

    def for_training(self) -> Diagnosis:
        """Return this diagnosis where it has judged nothing yet, or else another one with the same rules and settings.

        So one that is given to several trackers serves each of them, also at the same time.
        """
        return self if self._history is None else Diagnosis(self._selected)

    @property
    def findings(self) -> list[Finding]:
        """All findings that hold: the most severe first, then by first step, each with what follows from it."""
        return with_roots(self._state.findings.values())

    @property
    def withdrawn(self) -> list[Finding]:
        """The findings that the training has shown to be wrong, each with the reason."""
        return sorted(self._state.withdrawn.values(), key=Finding.place)

    @property
    def unjudged(self) -> dict[str, str]:
        """By rule, why it could not judge: what it would need is not recorded, or has no scale.

        >>> diagnosis = Diagnosis(["overfitting"])
        >>> diagnosis.update(History(loss=[0.9, 0.7]))
        []
        >>> diagnosis.unjudged
        {'overfitting': 'no validation loss; names there are loss'}
        """
        return dict(self._state.unjudged)

    @property
    def rules(self) -> list[str]:
        """The names of the rules still in use."""
        return [rule.name for rule in self._state.rules]

    @property
    def due(self) -> int:
        """How long the training must be for the next look that is taken in any case."""
        return self._state.due

    @property
    def changed(self) -> dict[str, Any]:
        """The rules chosen and the settings changed, for a run's ``meta["diagnosis"]``; empty where none are.

        >>> Diagnosis(["constant"], settings={"constant": {"steps": 80}}).changed
        {'rules': ['constant'], 'settings': {'constant': {'steps': 80}}}
        """
        names = [rule.name for rule in self._selected]
        settings = {rule.name: dict(rule.settings) for rule in self._selected if rule.settings}
        return ({"rules": names} if names != list(RULES) else {}) | ({"settings": settings} if settings else {})

    @classmethod
    def as_recorded(cls, changed: Any) -> Diagnosis:
        """Return the diagnosis that ``changed`` tells of, without those rules and settings that are not known here."""
        told = changed if isinstance(changed, Mapping) else {}
        names, settings = told.get("rules"), told.get("settings")
        given = settings if isinstance(settings, Mapping) else {}
        known = {
            name: {key: value for key, value in values.items() if key in RULES[name].known_settings}
            for name, values in given.items()
            if name in RULES and isinstance(values, Mapping)
        }
        return cls([name for name in names if name in RULES] if isinstance(names, list) else None, settings=known)

    def update(self, history: History, *, stop: int | None = None, again: bool = False) -> list[Finding]:
        """Evaluate what ``history`` has gained since the last call, and return the findings that are new or grew.

        New steps are evaluated as they came: at each end of an interval at which an evaluation is due, and at the end.
        So ``diagnose`` and a tracker evaluate at the same steps, whenever they begin.

        ``stop``: evaluate once, at the steps before it; all by default. ``again``: late values arrived for the last
        step, so that its evaluation is undone and repeated.
        """
        kind_of("history", history, History, "a History, as tracker.history or load_run(path).history")
        again = flag("again", again)
        stop = None if stop is None else whole_number("stop", stop)
        if self._history is not history or self._truncations != history.truncations:
            self._begin(history)
        if self._layout is None or self._layout.infos is not history.parameters.infos:
            self._layout = Layout(history.parameters.infos)
        end = history.last_step + 1 if stop is None else stop
        reported = self._state.told()
        if again and self._before is not None and end == self._state.since:
            self._state = self._before
        for step in _ends(history, self._state.since, end) if stop is None else [end]:
            if step > self._state.since and (step >= self._state.due or step == end):
                self._look(View(history, stop=step, since=self._state.since, layout=self._layout))
        return [each for key, each in self._state.told().items() if each != reported.get(key)]

    def _look(self, view: View) -> None:
        self._before = self._state.copy()
        state = self._state
        for rule in list(state.rules):
            found = self._judge(rule, view)
            if view.withdrawn and rule.name in state.findings and rule.name not in found:
                state.withdrawn[rule.name] = state.findings.pop(rule.name).withdraw(view.withdrawn)
            state.unjudged.pop(rule.name, None)
            if view.unjudged and rule.name not in state.findings:
                state.unjudged[rule.name] = view.unjudged
            for key, finding in found.items():
                state.withdrawn.pop(key, None)
                if finding != state.findings.get(key):
                    state.findings[key] = finding
        state.seen(view.stop)

    def _judge(self, rule: Rule, view: View) -> dict[str, Finding]:
        """Return by key what the rule finds, merged with what is known of it unless the rule has taken that back."""
        found: dict[str, Finding] = {}
        try:
            given = rule.judge(view.for_rule(rule.name, self._state.findings.get(rule.name)))
            for finding in map(Finding.plain, given):
                known = found.get(finding.key)
                if known is None and not view.withdrawn:
                    known = self._state.findings.get(finding.key)
                found[finding.key] = finding if known is None else known.merge(finding)
        except Exception as error:  # whatever a rule does wrong, the training and the other rules go on
            self._state.rules.remove(rule)
            view.withdrawn = view.unjudged = ""
            failure = _failure(rule, view, error)
            found = {failure.key: failure}
        return found


class Findings(list[T]):
    """A list of findings that also says which rules could not judge, by name, and why."""

    unjudged: dict[str, str]

    def __init__(self, findings: Iterable[T] = (), unjudged: Mapping[str, str] | None = None) -> None:
        super().__init__(findings)
        self.unjudged = dict(unjudged or {})


def _failure(rule: Rule, view: View, error: Exception) -> Finding:
    return Finding(
        rule=writable(f"{RULE_FAILED}:{rule.name}"),
        severity="info",
        first_step=view.stop - 1,
        last_step=view.stop - 1,
        evidence=f"the rule {rule.name!r} raised {writable(in_words(error))}",
        cause="a bug in the rule, or a history of a kind that it was not written for",
        action="report it with the history; the rule is off for the rest of this training",
    )


def diagnose(
    history: History,
    *,
    rules: Iterable[str | Rule] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> Findings[Finding]:
    """Return what is wrong with a training, from its history alone: the most severe first.

    Its ``unjudged`` says which rules could not judge, and why.

    The rules look at the history as they would have while it grew: at each of its first 50 drains (the ends of its
    intervals; where it has none, every ``history.meta["every"]`` steps, or 50), and later each time that it has grown
    by 2 %. So a million steps take about 500 looks.

    >>> from pytracker.history import History
    >>> for finding in diagnose(History(loss=[0.7] * 100)):
    ...     print(finding.severity, finding.rule, finding.first_step, finding.last_step)
    critical constant 0 99
    """
    diagnosis = Diagnosis(rules, settings=settings)
    diagnosis.update(history)
    return Findings(diagnosis.findings, diagnosis.unjudged)


def diagnose_recorded(history: History, *, defaults: bool = False) -> Findings[dict[str, Any]]:
    """Return what ``diagnose`` finds, and what was found while the training ran by other means than the rules here.

    The rules and settings are those that the training was given (``history.meta["diagnosis"]``), or with ``defaults``
    all rules as they come. Rules that are not known here, and comparisons of ranks, have left their findings in
    ``history.findings``.

    >>> history = History(loss=[0.7] * 100)
    >>> history.findings = [{"rule": "replica_drift", "severity": "critical", "first_step": 50}, {"rule": "constant"}]
    >>> [finding["rule"] for finding in diagnose_recorded(history)]
    ['constant', 'replica_drift']
    """
    diagnosis = Diagnosis() if defaults else Diagnosis.as_recorded(history.meta.get("diagnosis"))
    diagnosis.update(history)
    found = [finding.to_dict() for finding in diagnosis.findings]
    known = RULES.keys() | {finding["rule"] for finding in found}
    others = [kept for kept in history.findings if kept.get("rule") not in known]
    return Findings(most_severe_first([*found, *others]), diagnosis.unjudged)


def _ends(history: History, since: int, end: int) -> list[int]:
    """Return where the training stood at its drains, after ``since`` steps and up to ``end``, which is one of them.

    These are the ends of the intervals; where steps are in none, the multiples of ``history.meta["every"]``.
    """
    last = history.parameters.last_step
    kept = slice(*np.searchsorted(last, (since, end)))
    ends = last[kept] + 1
    starts, stops = np.append(since, ends), np.append(history.parameters.first_step[kept], end)
    found = set(ends.tolist())
    for bare in np.flatnonzero(starts < stops):
        start, stop = int(starts[bare]), int(stops[bare])
        if any(np.diff(np.searchsorted(series.steps, (start, stop)))[0] for series in history.values()):
            every = _every(history)
            found.update(range(start // every * every + every, stop, every), [stop])
    return sorted(found | {end})


def _every(history: History) -> int:
    known = history.meta.get("every")
    return known if isinstance(known, int) and known > 0 else _DEFAULT_EVERY
