"""``Diagnosis`` runs the rules on a growing history, ``diagnose`` on a finished one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

from .._checks import flag, kind_of, whole_number
from ..evidence import RULES, Finding, Rule, beneath_their_roots, most_severe_first, select
from ..history import GRADIENT_NORM, History, PlayerHistory, have_steps_of_their_own, players_of
from .judge import Judge

T = TypeVar("T")


class Diagnosis:
    """Judges a training as it grows: ``update`` after each drain.

    Each rule has at most one finding, which grows; where players take steps of their own, one for each of them. A rule
    that raises is reported as ``rule_failed:NAME`` and not asked again. An update costs the same at step 100 as at step
    1,000,000. Another history, or one that went back to an earlier step (``History.truncate``), is judged again: no
    finding stays that rests on what is no longer there.

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
        self._judges: dict[str, Judge] = {}
        self._players: dict[str, PlayerHistory] = {}

    def for_training(self) -> Diagnosis:
        """Return this diagnosis where it has judged nothing yet, or else another one with the same rules and settings.

        So one that is given to several trackers serves each of them, also at the same time.
        """
        return self if self._history is None else Diagnosis(self._selected)

    @property
    def findings(self) -> list[Finding]:
        """All findings that hold: the most severe first, then by first step, each with what follows from it."""
        found = [finding for judge in self._judges.values() for finding in judge.findings]
        return beneath_their_roots(found, Finding.place, lambda finding: finding.root)

    @property
    def withdrawn(self) -> list[Finding]:
        """The findings that the training has shown to be wrong, each with the reason."""
        return sorted((each for judge in self._judges.values() for each in judge.withdrawn), key=Finding.place)

    @property
    def unjudged(self) -> dict[str, str]:
        """By rule, why it could not judge: what it would need is not recorded, or has no scale.

        >>> diagnosis = Diagnosis(["overfitting"])
        >>> diagnosis.update(History(loss=[0.9, 0.7]))
        []
        >>> diagnosis.unjudged
        {'overfitting': 'no validation loss; names there are loss'}
        """
        return {rule: why for judge in self._judges.values() for rule, why in judge.unjudged.items()}

    @property
    def rules(self) -> list[str]:
        """The names of the rules still in use."""
        in_use = [judge.state.rules for judge in self._judges.values()] or [self._selected]
        return [rule.name for rule in self._selected if any(rule in rules for rules in in_use)]

    @property
    def due(self) -> int:
        """How long the training must be for the next look that is taken in any case."""
        return min((judge.state.due for judge in self._judges.values()), default=0)

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
        judged = self._judged(history)
        for player in judged:
            if player and player not in self._players:
                self._players[player] = PlayerHistory(history, player)
            if player not in self._judges:
                self._judges[player] = Judge(self._players.get(player, history), self._selected, player)
        self._judges = {player: self._judges[player] for player in judged}
        changed: list[Finding] = []
        for player, judge in self._judges.items():
            if player:
                self._players[player].refresh()
            changed += judge.update(stop, again=again)
        return changed

    def _judged(self, history: History) -> list[str]:
        """Return which players are judged for themselves, those that step alone, and "" for what all do together."""
        alone = [player for player in players_of(history) if have_steps_of_their_own(history, player)]
        return alone if alone and GRADIENT_NORM not in history else ["", *alone]


class Findings(list[T]):
    """A list of findings that also says which rules could not judge, by name, and why."""

    unjudged: dict[str, str]

    def __init__(self, findings: Iterable[T] = (), unjudged: Mapping[str, str] | None = None) -> None:
        super().__init__(findings)
        self.unjudged = dict(unjudged or {})


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
