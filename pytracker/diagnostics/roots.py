"""Finds the likely root: the finding that the others follow from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

from ..evidence import Finding, beneath_their_roots

_TORN: Final = frozenset(
    [
        "loss_oscillating",
        "loss_spike",
        "loss_not_decreasing",
        "gradient_exploding",
        "gradient_vanishing",
        "gradient_nonfinite",
        "update_ratio",
        "layer_imbalance",
        "dead_parameter",
        "always_clipped",
        "constant",
        "overfitting",
    ]
)
"""What a few steps that are far too long do to a network, and how they show."""

ROOTS: Final[tuple[tuple[str, frozenset[str]], ...]] = (
    ("not_in_optimizer", _TORN | {"loss_diverged", "gradients_add_up"}),
    ("gradients_add_up", _TORN | {"loss_diverged"}),
    ("learning_rate", _TORN | {"loss_diverged"}),
    ("gradient_nonfinite", frozenset({"loss_diverged", "constant", "dead_parameter", "loss_not_decreasing"})),
    ("loss_diverged", _TORN),
    (
        "loss_oscillating",
        frozenset({"update_ratio", "loss_spike", "layer_imbalance", "always_clipped", "overfitting"}),
    ),
    ("constant", frozenset({"loss_not_decreasing", "dead_parameter", "gradient_vanishing", "update_ratio"})),
    ("dead_parameter", frozenset({"loss_not_decreasing", "constant", "gradient_vanishing", "layer_imbalance"})),
    ("gradient_vanishing", frozenset({"loss_not_decreasing", "dead_parameter", "layer_imbalance", "update_ratio"})),
    (
        "gradient_exploding",
        frozenset({"gradient_nonfinite", "loss_spike", "update_ratio", "layer_imbalance", "always_clipped"}),
    ),
    ("loss_spike", frozenset({"gradient_exploding", "gradient_nonfinite"})),
    ("update_ratio", frozenset({"layer_imbalance", "loss_spike", "dead_parameter"})),
    ("always_clipped", frozenset({"loss_not_decreasing", "update_ratio"})),
)
"""From the root to what follows from it; of two that explain each other the first in this order is the root."""

_EVENTS: Final = ("learning_rate", "gradient_nonfinite", "loss_spike")
"""Only what comes later follows from these."""

_LAST_STRAWS: Final = ("gradient_nonfinite", "loss_spike")
"""What is torn already ends in these: then they are no roots."""


def _was_torn_before(told: Mapping[str, Finding], event: Finding) -> bool:
    known = (told.get(rule) for rule in ("loss_oscillating", "gradient_exploding", "loss_diverged"))
    return any(each is not None and each.rank and each.first_step < event.first_step for each in known)


def with_roots(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings the most severe first, each with what follows from it behind it.

    What follows from a finding is information: following the advice on the root is what helps. Only alarms are roots,
    and only the first root that explains a finding is named.

    >>> found = [Finding(rule, "warning", 0, 9, "x") for rule in ("update_ratio", "loss_diverged")]
    >>> [(each.rule, each.severity, each.follows_from) for each in with_roots(found)]
    [('loss_diverged', 'warning', ''), ('update_ratio', 'info', 'loss_diverged')]
    """
    told = {each.rule: each for each in findings}
    for root, consequences in ROOTS:
        above = told.get(root)
        if above is None or above.rank == 0 or (root in _LAST_STRAWS and _was_torn_before(told, above)):
            continue
        blown_up = root == "loss_oscillating" and above.severity == "critical"
        for rule in (_TORN if blown_up else consequences) & told.keys() - {root}:
            one = told[rule]
            later = root not in _EVENTS or one.first_step >= above.first_step
            if rule == "constant" and one.severity == "critical" and root == "gradients_add_up":
                continue  # no step has moved the loss, so none was too long
            if one.rank and later and (root != "dead_parameter" or above.severity == "critical"):
                told[rule] = replace(one, severity="info", follows_from=root)
    return beneath_their_roots(told.values(), Finding.place, lambda finding: finding.root)
