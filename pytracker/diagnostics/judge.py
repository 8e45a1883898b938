"""Judges one history as it grows, a training's or one player's: which rules look when, and what they have found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from .._checks import writable
from ..errors import in_words
from ..evidence import Finding, Layout, Rule, View
from ..history import History
from .roots import with_roots

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


class Judge:
    """Runs rules over one history, and keeps what they find. Nothing of the history is copied.

    Args:
        history: grows, and does not go back to an earlier step.
        rules: each has at most one finding.
        player: whose history it is; "" where it is all of a run's.
    """

    def __init__(self, history: History, rules: Iterable[Rule], player: str = "") -> None:
        self._history, self._player = history, player
        self._layout: Layout | None = None
        self.state = _State(list(rules))
        self._before: _State | None = None  # the latest look

    @property
    def findings(self) -> list[Finding]:
        """All that hold, the most severe first, each with what follows from it."""
        return self._named(with_roots(self.state.findings.values()))

    @property
    def withdrawn(self) -> list[Finding]:
        """Those that the training has shown to be wrong."""
        return self._named(self.state.withdrawn.values())

    @property
    def unjudged(self) -> dict[str, str]:
        """By rule, and before that the player, why it could not judge."""
        prefix = f"{self._player}/" if self._player else ""
        return {prefix + rule: why for rule, why in self.state.unjudged.items()}

    def _named(self, findings: Iterable[Finding]) -> list[Finding]:
        return [replace(each, player=self._player) for each in findings] if self._player else list(findings)

    def update(self, stop: int | None, *, again: bool) -> list[Finding]:
        """Evaluate what the history has gained since the last call; as ``Diagnosis.update``."""
        history = self._history
        if self._layout is None or self._layout.infos is not history.parameters.infos:
            self._layout = Layout(history.parameters.infos)
        end = history.last_step + 1 if stop is None else stop
        reported = self.state.told()
        if again and self._before is not None and end == self.state.since:
            self.state = self._before
        for step in _ends(history, self.state.since, end) if stop is None else [end]:
            if step > self.state.since and (step >= self.state.due or step == end):
                self._look(View(history, stop=step, since=self.state.since, layout=self._layout))
        return self._named(each for key, each in self.state.told().items() if each != reported.get(key))

    def _look(self, view: View) -> None:
        self._before = self.state.copy()
        state = self.state
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
            given = rule.judge(view.for_rule(rule.name, self.state.findings.get(rule.name)))
            for finding in map(Finding.plain, given):
                known = found.get(finding.key)
                if known is None and not view.withdrawn:
                    known = self.state.findings.get(finding.key)
                found[finding.key] = finding if known is None else known.merge(finding)
        except Exception as error:  # whatever a rule does wrong, the training and the other rules go on
            self.state.rules.remove(rule)
            view.withdrawn = view.unjudged = ""
            failure = _failure(rule, view, error)
            found = {failure.key: failure}
        return found


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
