"""Finding: a judgement with its evidence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral
from typing import Any, Final

from ..errors import InvalidTypeError, InvalidValueError

SEVERITIES: Final = ("info", "warning", "critical")
"""From the least to the most severe. ``info`` is worth knowing and no alarm."""


@dataclass(frozen=True)
class Finding:
    """One trouble of a training. The same trouble seen again is the same finding, grown: see ``merge``.

    >>> Finding("loss_spike", "warning", 10, 12, "loss 9.1 at step 12").key
    'loss_spike'
    """

    rule: str
    severity: str  # one of SEVERITIES
    first_step: int  # where the trouble begins
    last_step: int  # where it was last seen
    evidence: str  # numbers in a sentence
    parameters: tuple[str, ...] = ()  # names of the parameters concerned, the most important first
    cause: str = ""  # what is likely behind it
    action: str = ""  # what to do
    numbers: Mapping[str, float] = field(default_factory=dict)  # the numbers of the evidence, for programs

    def __post_init__(self) -> None:
        """Refuse a severity that there is not, and steps that are no whole numbers."""
        if self.severity not in SEVERITIES:
            raise InvalidValueError(
                f"finding {self.rule!r}: severity {self.severity!r}: expected one of {', '.join(SEVERITIES)}"
            )
        steps: tuple[Any, ...] = (self.first_step, self.last_step)
        for step in steps:
            if not isinstance(step, Integral):
                raise InvalidTypeError(f"finding {self.rule!r}: expected a whole number for a step, got {step!r}")

    @property
    def key(self) -> str:
        """What makes two findings the same trouble: a training has one finding for each rule."""
        return self.rule

    @property
    def rank(self) -> int:
        """The place of the severity in ``SEVERITIES``: 0 for info, 2 for critical."""
        return SEVERITIES.index(self.severity)

    def place(self) -> tuple[int, int, str]:
        """Return what findings are sorted by: the most severe first, then by first step."""
        return -self.rank, self.first_step, self.rule

    def __str__(self) -> str:
        """Say it in a line or two, for a terminal.

        >>> print(Finding("constant", "critical", 0, 99, "the loss is 0.5", cause="a detached loss", action="check it"))
        critical: constant, steps 0 to 99: the loss is 0.5. Likely cause: a detached loss. To do: check it.
        """
        one = self.first_step == self.last_step
        span = f"step {self.last_step}" if one else f"steps {self.first_step} to {self.last_step}"
        told = [f"{self.severity}: {self.rule}, {span}: {self.evidence}."]
        if self.parameters:
            more = ", ..." if len(self.parameters) > 3 else ""
            told.append(f"In {', '.join(self.parameters[:3])}{more}.")
        told += [f"Likely cause: {self.cause}."] if self.cause else []
        told += [f"To do: {self.action}."] if self.action else []
        return " ".join(told)

    def merge(self, later: Finding) -> Finding:
        """Return this finding grown by ``later``: the span covers both and no parameter is forgotten.

        The more severe one keeps its words and numbers; the later one where both are as severe.
        """
        told = later if later.rank >= self.rank else self
        return replace(
            told,
            first_step=min(self.first_step, later.first_step),
            last_step=max(self.last_step, later.last_step),
            parameters=tuple(dict.fromkeys((*told.parameters, *self.parameters, *later.parameters))),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as JSON-able values, with its ``key``: a run keeps one finding of each."""
        return {**asdict(self), "parameters": list(self.parameters), "numbers": dict(self.numbers), "key": self.key}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Finding:
        """Return the finding that ``to_dict`` described; keys that a finding has not are ignored.

        >>> finding = Finding("constant", "critical", 0, 99, "loss is 0.5 for 100 steps", numbers={"steps": 100.0})
        >>> Finding.from_dict(finding.to_dict()) == finding
        True
        """
        known = {item.name for item in fields(cls)}
        given = {name: value for name, value in values.items() if name in known}
        given["parameters"] = tuple(given.get("parameters", ()))
        return cls(**given)


def severity_rank(finding: Mapping[str, Any]) -> int:
    """Return the place of a stored finding's severity in ``SEVERITIES``, -1 where it has none of them.

    >>> severity_rank({"rule": "constant", "severity": "critical"}), severity_rank({"rule": "mine"})
    (2, -1)
    """
    severity = finding.get("severity")
    return SEVERITIES.index(severity) if severity in SEVERITIES else -1


def most_severe_first(findings: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort stored findings as ``Diagnosis.findings`` are: the most severe first, then by first step.

    >>> stored = [{"rule": "a", "first_step": 9}, {"rule": "b", "severity": "warning"}, {"rule": "c"}]
    >>> [finding["rule"] for finding in most_severe_first(stored)]
    ['b', 'c', 'a']
    """

    def place(finding: dict[str, Any]) -> tuple[int, float, str]:
        first = finding.get("first_step")
        return (
            -severity_rank(finding),
            float(first) if isinstance(first, (int, float)) else 0.0,
            str(finding.get("rule")),
        )

    return sorted(findings, key=place)


def span_of(finding: Mapping[str, Any]) -> str:
    """Say at which steps a stored finding was seen.

    >>> span_of({"first_step": 3, "last_step": 9}), span_of({"first_step": 3, "last_step": 3}), span_of({})
    ('steps 3 to 9', 'step 3', 'step 0')
    """
    first = finding.get("first_step") or 0
    last = finding.get("last_step") or first
    return f"step {first}" if first == last else f"steps {first} to {last}"
