"""What the rules said of each training, against what was planted: precision, recall, F1, delays, confusions."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from pytracker.diagnostics import RULES, SEVERITIES, Diagnosis, Finding

from .observed import HURT, Facts
from .training import EVERY, Case, Recorded, train
from .troubles import TROUBLES

ALARM = "warning"  # findings from this severity on count; "info" is no alarm
WHERE_IT_HURTS = frozenset({"update_ratio", "always_clipped"})
"""Long steps, and clipping at every step, are alarms only where the training ends worse than without."""

TABLE = ("loss_not_decreasing", "loss_oscillating", "overfitting", "gradient_exploding", "gradient_vanishing")


@dataclass
class Judged:
    """One training as it was judged online, drain after drain."""

    case: Case
    findings: list[Finding]
    named_at: dict[str, int]  # by rule: the step of the drain at which it was first an alarm
    steps: int
    truth: dict[str, Any]
    facts: Facts

    @property
    def alarms(self) -> set[str]:
        """The rules that named a trouble as the training ran, by themselves or beneath a root, taken back or not."""
        return set(self.named_at)

    @property
    def at_the_end(self) -> set[str]:
        """Those of which it has not been taken back."""
        return {
            finding.rule for finding in self.findings if finding.rank >= SEVERITIES.index(ALARM) or finding.follows_from
        }

    @property
    def expected(self) -> set[str]:
        """The rules that must be named: what was planted, where it happened, and hurt where that is what counts."""
        return {rule for rule in TROUBLES[self.case.trouble].expected if self.happened(rule)}

    def happened(self, rule: str) -> bool | None:
        """Return whether what was planted for a rule did happen, None where it is unclear."""
        return self.facts.get(HURT if rule in WHERE_IT_HURTS else rule, True)

    @property
    def true(self) -> set[str]:
        """The rules that hold, planted or not."""
        return self.expected | {rule for rule, holds in self.facts.items() if holds and rule != HURT}

    @property
    def either(self) -> set[str]:
        """The rules that may be named or not."""
        unclear = {rule for rule, holds in self.facts.items() if holds is not False}
        planted = TROUBLES[self.case.trouble]
        harmless = planted.expected & WHERE_IT_HURTS
        return (unclear | harmless | (planted.consequences - self.facts.keys())) - self.expected


@dataclass
class Score:
    """Counts of one rule."""

    hits: list[str] = field(default_factory=list)
    misses: list[str] = field(default_factory=list)
    false: list[str] = field(default_factory=list)

    @property
    def precision(self) -> float:
        return len(self.hits) / max(1, len(self.hits) + len(self.false))

    @property
    def recall(self) -> float:
        return len(self.hits) / max(1, len(self.hits) + len(self.misses))

    @property
    def f1(self) -> float:
        return 2 * len(self.hits) / max(1, 2 * len(self.hits) + len(self.misses) + len(self.false))


def judge(recorded: Recorded, settings: Mapping[str, Mapping[str, Any]] | None = None) -> Judged:
    """Run the rules as a Tracker does: an update for each drain."""
    diagnosis = Diagnosis(settings=settings)
    named_at: dict[str, int] = {}
    end = recorded.history.last_step + 1
    for stop in [*range(EVERY, end, EVERY), end]:
        for finding in diagnosis.update(recorded.history, stop=stop):
            if finding.rank >= SEVERITIES.index(ALARM) or finding.follows_from:
                named_at.setdefault(finding.rule, stop - 1)
    return Judged(recorded.case, diagnosis.findings, named_at, end, recorded.truth, recorded.facts)


def train_and_judge(case: Case) -> Judged:
    """Do both, in a process of its own."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="no parameter had a gradient")
    return judge(train(case))


def score(
    judged: Iterable[Judged], *, unplanted: bool = False, strict: bool = False, at_the_end: bool = False
) -> dict[str, Score]:
    """Count hits, misses and false alarms.

    ``unplanted``: what happened without being planted must be found too. ``strict``: consequences and what isn't clear
    are false alarms as well. ``at_the_end``: what was taken back was not said.
    """
    scores = {rule: Score() for rule in RULES}
    for one in judged:
        alarms = one.at_the_end if at_the_end else one.alarms
        for rule in one.true if unplanted else one.expected:
            (scores[rule].hits if rule in alarms else scores[rule].misses).append(one.case.name)
        for rule in alarms - one.true - (set() if strict else one.either):
            scores.setdefault(rule, Score()).false.append(one.case.name)
    return scores


def overall(scores: Mapping[str, Score]) -> Score:
    total = Score()
    for each in scores.values():
        total.hits += each.hits
        total.misses += each.misses
        total.false += each.false
    return total


def delays(judged: Iterable[Judged]) -> dict[str, list[int]]:
    """Return, by trouble, the steps from its onset until an expected rule named it."""
    result: dict[str, list[int]] = defaultdict(list)
    for one in judged:
        for rule in one.expected & one.named_at.keys():
            onset = TROUBLES[one.case.trouble].onset * one.steps
            result[one.case.trouble].append(one.named_at[rule] - int(onset))
    return dict(result)


def confusion(judged: Iterable[Judged]) -> dict[str, Counter[str]]:
    """Return, by trouble, how many of its trainings each rule named; "none" counts those that none did."""
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for one in judged:
        table[one.case.trouble].update(one.alarms or {"none"})
        table[one.case.trouble]["trainings"] += 1
    return dict(table)


def located(judged: Iterable[Judged]) -> tuple[int, int, list[str]]:
    """Return how many planted NaN and Inf were found at the exact step and parameter, of how many, which weren't."""
    right, total, wrong = 0, 0, []
    for one in judged:
        if "parameter" not in one.truth:
            continue
        total += 1
        found = [finding for finding in one.findings if finding.rule == "gradient_nonfinite"]
        kind = "Inf" if one.truth["value"] == float("inf") else "NaN"
        if (
            found
            and found[0].first_step == one.truth["step"]
            and found[0].parameters[0] == one.truth["parameter"]
            and kind in found[0].evidence
        ):
            right += 1
        else:
            wrong.append(one.case.name)
    return right, total, wrong


def critical_on_healthy(judged: Iterable[Judged]) -> list[str]:
    return [
        f"{one.case.name}: {finding.rule}"
        for one in judged
        if one.case.trouble == "healthy"
        for finding in one.findings
        if finding.severity == "critical"
    ]


def text_report(judged: list[Judged]) -> str:
    """Return everything as Markdown."""
    scores, wider = score(judged), score(judged, unplanted=True)
    scores, wider = ({**each, "**overall**": overall(each)} for each in (scores, wider))
    lines = [
        "| rule | expected | found | false alarms | precision | recall | F1 | all that happened | found | F1 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for rule, each in scores.items():
        expected, happened = (len(some.hits) + len(some.misses) for some in (each, wider[rule]))
        figures = f"{each.precision:.3f} | {each.recall:.3f} | {each.f1:.3f}" if expected else "- | - | -"
        lines.append(
            f"| {rule} | {expected} | {len(each.hits)} | {len(each.false)} | {figures} | "
            f"{happened} | {len(wider[rule].hits)} | {f'{wider[rule].f1:.3f}' if happened else '-'} |"
        )
    strict = overall(score(judged, unplanted=True, strict=True))
    end = overall(score(judged, at_the_end=True))
    lines += [
        "",
        "Found and false alarms are what was said at any drain of the training. Of that, some was taken back later: at "
        f"the end {len(end.hits)} are found and {len(end.false)} are false, precision {end.precision:.3f}.",
        "",
        f"Strictly, where every consequence and unclear case is a false alarm too: {len(strict.false)} false alarms, "
        f"precision {strict.precision:.3f}, F1 {strict.f1:.3f}.",
        "",
        "Expected is what was planted and did happen (observed.py says how that is measured). All that happened: what "
        "did without being planted as well, as far as it is measured.",
        "",
        "| trouble | trainings | happened | did not | unclear |",
        "|---|---|---|---|---|",
    ]
    for trouble, planted in TROUBLES.items():
        seen = [one.happened(rule) for one in judged if one.case.trouble == trouble for rule in planted.expected]
        if seen:
            lines.append(f"| {trouble} | {len(seen)} | {seen.count(True)} | {seen.count(False)} | {seen.count(None)} |")
    lines += ["", "Steps from the onset of a trouble until it was named (a drain every 20 steps):", ""]
    lines += ["| trouble | named | median | largest |", "|---|---|---|---|"]
    for trouble, steps in delays(judged).items():
        lines.append(f"| {trouble} | {len(steps)} | {median(steps):.0f} | {max(steps)} |")
    lines += ["", "Confusion: of the trainings of each trouble, how many each rule named.", ""]
    table = confusion(judged)
    columns = [rule for rule in RULES if any(row[rule] for row in table.values())]
    lines += ["| trouble | trainings | none | " + " | ".join(columns) + " |", "|---" * (len(columns) + 3) + "|"]
    for trouble, row in table.items():
        cells = [str(row[column] or "") for column in ("none", *columns)]
        lines.append(f"| {trouble} | {row['trainings']} | " + " | ".join(cells) + " |")
    right, total, wrong = located(judged)
    lines += ["", f"NaN and Inf located to the exact step, parameter and kind: {right} of {total}."]
    lines += [f"- not: {name}" for name in wrong]
    critical = critical_on_healthy(judged)
    lines += ["", f"Critical findings on healthy trainings: {len(critical)}.", *[f"- {name}" for name in critical]]
    lines += ["", "Cases that fail:", ""]
    for rule in RULES:
        lines += [f"- {rule} missed {name}" for name in scores[rule].misses]
        lines += [
            f"- {rule} missed {name}, not planted" for name in wider[rule].misses if name not in scores[rule].misses
        ]
        lines += [f"- {rule} falsely on {name}" for name in scores[rule].false]
    return "\n".join(lines) + "\n"
