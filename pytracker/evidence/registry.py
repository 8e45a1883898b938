"""Rules: functions of a view, known by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np

from .._checks import items, kind_of, shown, wrong_type
from ..errors import InvalidTypeError, InvalidValueError
from ..history import History
from .findings import Finding
from .view import View

Function = Callable[..., Iterable[Finding]]


@dataclass(frozen=True)
class Rule:
    """A named function that reads a view and yields findings. Calling it judges a whole history at its last step."""

    name: str
    function: Function
    settings: Mapping[str, Any]

    def __call__(self, history: History, **settings: Any) -> list[Finding]:
        """Return the findings at the end of ``history``, with ``settings`` in place of the defaults."""
        return self.with_settings(settings).judge(View(history, rule=self.name))

    def judge(self, view: View) -> list[Finding]:
        """Return the findings of one view.

        Raises:
            InvalidTypeError: the function gives something that is no finding.
        """
        with np.errstate(all="ignore"):  # histories hold NaN, Inf and 1e308; what comes of them is no finding
            found = list(self.function(view, **self.settings) or ())
        for each in found:
            if not isinstance(each, Finding):
                raise InvalidTypeError(
                    f"rule {self.name!r}: expected findings, as view.finding(...) makes them, got "
                    f"{type(each).__name__}: {each!r:.80}"
                )
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        """Be pickled by name: the rule must be known where it is read.

        Raises:
            InvalidTypeError: it is not known by its name here.
        """
        known = RULES.get(self.name)
        if known is None or known.function is not self.function:
            raise InvalidTypeError(f"rule {self.name!r} cannot be pickled, as no rule is known by that name: use @rule")
        return _known, (self.name, dict(self.settings))

    def __deepcopy__(self, memo: Any) -> Rule:
        """Return the rule itself, which nothing changes."""
        return self

    @property
    def known_settings(self) -> list[str]:
        """The names of what can be set."""
        return list(inspect.signature(self.function).parameters)[1:]

    def with_settings(self, settings: Mapping[str, Any]) -> Rule:
        """Return the rule with some settings changed.

        Raises:
            InvalidValueError: the rule has no such setting.
        """
        known = self.known_settings
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise InvalidValueError(
                f"rule {self.name!r}: there is no setting {unknown[0]!r}; it has {', '.join(known) or 'none'}"
            )
        return replace(self, settings={**self.settings, **settings})


RULES: dict[str, Rule] = {}
"""Every rule by name, in the order in which they are evaluated."""


@overload
def rule(function: Function, /) -> Rule: ...
@overload
def rule(name: str, /) -> Callable[[Function], Rule]: ...
def rule(function: Function | str, /) -> Rule | Callable[[Function], Rule]:
    """Make a function a rule, under its own name or under the one given. A rule of the same name is replaced.

    The function takes a ``View`` (and settings with defaults, by keyword) and yields findings. New histories are judged
    by it from then on.

    >>> @rule
    ... def accuracy_low(view, below=0.5):
    ...     accuracy = view["accuracy"]
    ...     if len(accuracy) >= 100 and accuracy.values[-1] < below:
    ...         yield view.finding("warning", f"accuracy is {accuracy.values[-1]:.2f} after {len(accuracy)} steps")
    >>> [finding.evidence for finding in accuracy_low(History(accuracy=[0.1] * 100))]
    ['accuracy is 0.10 after 100 steps']
    >>> del RULES["accuracy_low"]
    """
    if isinstance(function, str):
        name = function
        return lambda inner: _register(name, inner)
    return _register(function.__name__, function)


def _register(name: str, function: Function) -> Rule:
    made = RULES[name] = Rule(name, function, {})
    return made


def select(
    rules: Iterable[str | Rule] | None = None, settings: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Rule]:
    """Return the rules asked for (all of them by default), with their settings.

    Raises:
        InvalidValueError: there is no rule of that name, or it has no such setting.
        InvalidTypeError: something that is neither a name nor a rule.
    """
    wanted = list(RULES.values()) if rules is None else items("rules", rules, "a list of names or rules")
    chosen = [_find("rules", given) for given in wanted]
    changed = {} if settings is None else kind_of("settings", settings, Mapping, 'settings by rule: {"rule": {...}}')
    for name, values in changed.items():
        _find("settings", name)
        kind_of(f"settings[{name!r}]", values, Mapping, "settings by name")
    return [each.with_settings(changed.get(each.name, {})) for each in chosen]


def _known(name: str, settings: Mapping[str, Any]) -> Rule:
    return _find("a pickled rule", name).with_settings(settings)


def _find(argument: str, given: str | Rule) -> Rule:
    if isinstance(given, Rule):
        return given
    if not isinstance(given, str):
        raise wrong_type(f"an element of {argument}", given, "the name of a rule, or a rule")
    if given not in RULES:
        raise InvalidValueError(f"{argument}: there is no rule {shown(given)}; there are {', '.join(RULES)}")
    return RULES[given]
