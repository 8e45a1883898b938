"""Finding: a judgement with its evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from math import isnan, nan
from numbers import Integral
from typing import Any, Final, TypeVar

from .._checks import kind_of, real_number, shown, writable, wrong_value
from ..errors import InvalidTypeError, InvalidValueError, PytrackerError
from ..history import html_table

SEVERITIES: Final = ("info", "warning", "critical")
"""From the least to the most severe. ``info`` is worth knowing and no alarm."""

Kind = TypeVar("Kind")
Place = tuple[float, float, str]


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
    follows_from: str = ""  # the rule whose finding is the likely root of this one; "" where there is none
    withdrawn: str = ""  # why it no longer holds; "" while it does
    player: str = ""  # whose steps it is about, of several players in a run; "" for all

    def __post_init__(self) -> None:
        """Make plain values of what is given: a run keeps them, whoever made the finding.

        Raises:
            InvalidTypeError: a text, step, parameter or number is none.
            InvalidValueError: there is no such severity, the steps are not in order, or a text cannot be written.
        """
        for name in ("rule", "severity", "evidence", "cause", "action", "follows_from", "withdrawn", "player"):
            self._check_text(name, getattr(self, name))
        if self.severity not in SEVERITIES:
            raise self._wrong("severity", self.severity, f"one of {', '.join(SEVERITIES)}", InvalidValueError)
        steps = {name: self._checked_step(name, getattr(self, name)) for name in ("first_step", "last_step")}
        if self.first_step > self.last_step:
            raise self._wrong("first_step", self.first_step, f"at most last_step, {self.last_step}", InvalidValueError)
        made = {**steps, "parameters": self._checked_parameters(), "numbers": self._checked_numbers()}
        for name, value in made.items():
            object.__setattr__(self, name, value)

    def _wrong(self, name: str, value: object, expected: str, kind: type[PytrackerError]) -> PytrackerError:
        return kind(f"finding {shown(self.rule)}: {name}: expected {expected}, got {shown(value)}")

    def _check_text(self, name: str, value: Any) -> None:
        if not isinstance(value, str):
            raise self._wrong(name, value, "a text", InvalidTypeError)
        if value != writable(value):
            raise self._wrong(name, value, "a text without lone surrogates", InvalidValueError)

    def _checked_step(self, name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise self._wrong(name, value, "a whole number", InvalidTypeError)
        step = int(value)
        if not 0 <= step < 2**63:
            raise self._wrong(name, step, "a step from 0 to 2**63 - 1", InvalidValueError)
        return step

    def _checked_parameters(self) -> tuple[str, ...]:
        given: Any = self.parameters
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise self._wrong("parameters", given, "names", InvalidTypeError)
        names = tuple(given)
        try:
            joined = "".join(names)
        except TypeError:
            raise self._wrong("parameters", names, "names", InvalidTypeError) from None
        return names if joined == writable(joined) else tuple(map(writable, names))

    def _checked_numbers(self) -> dict[str, float]:
        given: Any = self.numbers
        if not isinstance(given, Mapping):
            raise self._wrong("numbers", given, "a mapping of names to numbers", InvalidTypeError)
        made = {}
        for name, value in given.items():
            self._check_text("a name in numbers", name)
            known = real_number(f"finding {shown(self.rule)}: numbers[{shown(name)}]", value)
            made[name] = nan if isnan(known) else known  # one NaN for all: dicts that hold it are equal
        return made

    @property
    def key(self) -> str:
        """What makes two findings the same trouble: a training has one finding for each rule, of each player.

        >>> Finding("loss_spike", "warning", 10, 12, "loss 9.1 at step 12", player="D").key
        'D/loss_spike'
        """
        return f"{self.player}/{self.rule}" if self.player else self.rule

    @property
    def rank(self) -> int:
        """The place of the severity in ``SEVERITIES``: 0 for info, 2 for critical."""
        return SEVERITIES.index(self.severity)

    def place(self) -> tuple[int, int, str]:
        """Return what findings are sorted by: the most severe first, then by first step."""
        return -self.rank, self.first_step, self.key

    @property
    def root(self) -> str:
        """The key of the finding that this one follows from; "" where there is none."""
        return f"{self.player}/{self.follows_from}" if self.player and self.follows_from else self.follows_from

    def __str__(self) -> str:
        """Say it in a line or two, for a terminal.

        >>> print(Finding("constant", "critical", 0, 99, "the loss is 0.5", cause="a detached loss", action="check it"))
        critical: constant, steps 0 to 99: the loss is 0.5. Likely cause: a detached loss. To do: check it.
        """
        one = self.first_step == self.last_step
        span = f"step {self.last_step}" if one else f"steps {self.first_step} to {self.last_step}"
        told = [f"{self.severity}: {self.key}, {span}: {self.evidence}."]
        if self.parameters:
            more = ", ..." if len(self.parameters) > 3 else ""
            told.append(f"In {', '.join(self.parameters[:3])}{more}.")
        told += [f"Likely cause: {self.cause}."] if self.cause else []
        told += [f"To do: {self.action}."] if self.action else []
        told += [f"Follows from {self.follows_from}."] if self.follows_from else []
        told += [f"Withdrawn: {self.withdrawn}."] if self.withdrawn else []
        return " ".join(told)

    def _repr_html_(self) -> str:
        """Show it in a notebook."""
        facts = {"evidence": self.evidence, "parameters": ", ".join(self.parameters[:10])}
        facts |= {"cause": self.cause, "action": self.action}
        title = f"{self.severity}: {self.key}, {span_of(self.to_dict())}"
        return html_table(title, (), [pair for pair in facts.items() if pair[1]])

    def withdraw(self, why: str) -> Finding:
        """Return this finding as one that the training has shown to be wrong: information from now on.

        >>> print(Finding("constant", "critical", 0, 99, "the loss is 0.5").withdraw("it moves again"))
        info: constant, steps 0 to 99: the loss is 0.5. It was critical. Withdrawn: it moves again.
        """
        words = f"{self.evidence}. It was {self.severity}" if self.severity != "info" else self.evidence
        return replace(self, severity="info", evidence=words, withdrawn=why, follows_from="")

    def merge(self, later: Finding) -> Finding:
        """Return this finding grown by ``later``: the span covers both and no parameter is forgotten.

        The more severe one keeps its words and numbers; the later one where both are as severe.
        """
        kind_of("later", later, Finding, "a Finding")
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

        Raises:
            InvalidTypeError, InvalidValueError: they are no description of a finding.
        """
        known = {item.name for item in fields(cls)}
        found = kind_of("values", values, Mapping, "what Finding.to_dict() returned")
        given = {name: value for name, value in found.items() if name in known}
        try:
            return cls(**{**given, **_mended(given)})
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            if isinstance(error, PytrackerError):
                raise
            raise wrong_value("values", values, "what Finding.to_dict() returned") from error

    @classmethod
    def plain(cls, given: Any) -> Finding:
        """Return what a rule gave as a ``Finding`` and nothing more than that.

        Raises:
            InvalidTypeError: it is none.
        """
        if type(given) is cls:
            return given
        if not isinstance(given, cls):
            raise InvalidTypeError(f"expected a finding, got {shown(given)}")
        return cls(**{item.name: getattr(given, item.name) for item in fields(cls)})


def _mended(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a stored finding holds that is made otherwise today: older versions checked little of it."""
    names = ("rule", "evidence", "cause", "action", "follows_from", "withdrawn", "player")
    texts = {name: str(given[name]) for name in names if name in given}
    first, last = sorted(max(0, int(given[name])) for name in ("first_step", "last_step"))
    numbers = given.get("numbers")
    kept = {
        str(name): value
        for name, value in (numbers.items() if isinstance(numbers, Mapping) else ())
        if isinstance(value, (int, float))
    }
    parameters = tuple(map(str, given.get("parameters") or ()))
    return {**texts, "first_step": first, "last_step": last, "parameters": parameters, "numbers": kept}


def severity_rank(finding: Mapping[str, Any]) -> int:
    """Return the place of a stored finding's severity in ``SEVERITIES``, -1 where it has none of them.

    >>> severity_rank({"rule": "constant", "severity": "critical"}), severity_rank({"rule": "mine"})
    (2, -1)
    """
    severity = finding.get("severity")
    return SEVERITIES.index(severity) if severity in SEVERITIES else -1


def most_severe_first(findings: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort stored findings as ``Diagnosis.findings`` are: the most severe first, then by first step, then what follows.

    >>> stored = [{"rule": "a", "first_step": 9}, {"rule": "b", "severity": "warning"}, {"rule": "c"}]
    >>> [finding["rule"] for finding in most_severe_first(stored)]
    ['b', 'c', 'a']
    """

    def place(finding: dict[str, Any]) -> Place:
        first = finding.get("first_step")
        return (
            -severity_rank(finding),
            float(first) if isinstance(first, (int, float)) else 0.0,
            title_of(finding),
        )

    def root(finding: dict[str, Any]) -> str:
        follows_from = finding.get("follows_from")
        return title_of({**finding, "rule": follows_from}) if follows_from else ""

    return beneath_their_roots(findings, place, root)


def title_of(finding: Mapping[str, Any]) -> str:
    """Return what a stored finding is called: its rule, and before that the player it is about.

    >>> title_of({"rule": "loss_spike", "player": "D"}), title_of({"rule": "loss_spike"})
    ('D/loss_spike', 'loss_spike')
    """
    player, rule = finding.get("player"), str(finding.get("rule"))
    return f"{player}/{rule}" if player else rule


def beneath_their_roots(
    findings: Iterable[Kind], place: Callable[[Kind], Place], root: Callable[[Kind], str]
) -> list[Kind]:
    """Sort findings by their places, those that follow from another one directly behind it."""
    listed = list(findings)
    places = {place(each)[2]: place(each) for each in listed}

    def nested(finding: Kind) -> tuple[Place, bool, Place]:
        own = place(finding)
        above = places.get(root(finding))
        return (own, False, own) if above is None else (above, True, own)

    return sorted(listed, key=nested)


def span_of(finding: Mapping[str, Any]) -> str:
    """Say at which steps a stored finding was seen.

    >>> span_of({"first_step": 3, "last_step": 9}), span_of({"first_step": 3, "last_step": 3}), span_of({})
    ('steps 3 to 9', 'step 3', 'step 0')
    """
    first = finding.get("first_step") or 0
    last = finding.get("last_step") or first
    return f"step {first}" if first == last else f"steps {first} to {last}"
