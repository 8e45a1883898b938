"""What the columns of a log are: which one is the loss, the validation loss, the learning rate, the step."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

TRAINING: Final = frozenset(("train", "training", "tr", "trn"))
VALIDATION: Final = frozenset(("val", "valid", "validation", "eval", "evaluation", "dev", "holdout"))
TEST: Final = frozenset(("test", "testing"))

_LOSS: Final = frozenset(("loss", "losses", "cost", "objective"))
_CRITERION: Final = frozenset(("mse", "mae", "rmse", "nll", "bce", "ce", "xent", "crossentropy", "elbo"))
_PLAIN: Final = frozenset(
    [
        "total",
        "avg",
        "average",
        "mean",
        "overall",
        "epoch",
        "step",
        "batch",
        "iter",
        "running",
        "smoothed",
        "all",
        "sum",
        "per",
        "sample",
        "main",
        "minibatch",
        "full",
        "global",
        "final",
        "current",
        "metrics",
        "log",
        "scalar",
        "scalars",
        "value",
    ]
)
"""Words that don't make a loss another one."""

_OF_A_RATE: Final = frozenset(
    [
        "lr",
        "learning",
        "rate",
        "train",
        "group",
        "pg",
        "param",
        "params",
        "groups",
        "current",
        "optimizer",
        "opt",
        "scheduler",
        "base",
        "epoch",
        "step",
    ]
)
_OF_A_NORM: Final = frozenset(
    [
        "grad",
        "grads",
        "gradient",
        "gradients",
        "norm",
        "train",
        "total",
        "global",
        "l2",
        "2",
        "unclipped",
        "raw",
        "avg",
        "mean",
    ]
)
_OF_ACCURACY: Final = frozenset(["accuracy", "acc", "top1", "top", "1", "categorical", "binary", "sparse", "metrics"])
_GENERATOR: Final = frozenset(("g", "gen", "generator"))
_CRITIC: Final = frozenset(("d", "disc", "discriminator", "critic"))

STEPS: Final = (
    (
        "step",
        frozenset(["step", "steps", "iteration", "iterations", "iter", "iters", "itr", "update", "updates", "batches"]),
    ),
    ("timestep", frozenset(["timestep", "timesteps", "frame", "frames"])),
    ("epoch", frozenset(["epoch", "epochs"])),
    ("episode", frozenset(["episode", "episodes"])),
)
"""What counts, from the finest: the words that name it."""

_OF_A_STEP: Final = frozenset(["global", "num", "total", "trainer", "n", "current", "train", "env", "index"])


def words(name: str) -> tuple[str, ...]:
    """Return the words of a name in lower case.

    >>> words("train/lossPerToken"), words("Gen Loss"), words("val_loss")
    (('train', 'loss', 'per', 'token'), ('gen', 'loss'), ('val', 'loss'))
    """
    return tuple(word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name))


def split_of(name: str) -> str:
    """Return "train", "val", "test", or "" where the name doesn't say.

    >>> split_of("eval_loss"), split_of("Train Loss"), split_of("loss")
    ('val', 'train', '')
    """
    found = set(words(name))
    if found & VALIDATION:
        return "val"
    return "test" if found & TEST else "train" if found & TRAINING else ""


def subject(name: str) -> frozenset[str]:
    """Return the words that say what is measured, without those for the split."""
    return frozenset(words(name)) - TRAINING - VALIDATION - TEST - _PLAIN


def step_unit(name: str) -> str:
    """Return what a column of this name counts, "" where it isn't a count of steps.

    >>> step_unit("global_step"), step_unit("_step"), step_unit("Epoch"), step_unit("train_loss_step")
    ('step', 'step', 'epoch', '')
    """
    found = set(words(name))
    for unit, names in STEPS:
        if found & names and not found - names - _OF_A_STEP:
            return unit
    return ""


@dataclass
class Columns:
    """Which column was taken for what: ``by_role`` has the names of pytracker, and the columns that are summed."""

    by_role: dict[str, list[str]] = field(default_factory=dict)
    objective: str = ""  # "adversarial": the losses of players that work against each other


def recognise(counts: Mapping[str, int], sums: Mapping[str, list[str]], names: Mapping[str, str]) -> Columns:
    """Return which columns are what, by their names and by how many values each has.

    Args:
        counts: the number of values of each column.
        sums: by role, the columns that the format says are the parts of a sum.
        names: by role, the column that the user says it is.
    """
    found = Columns()
    left = [name for name in counts if name not in names.values() and not step_unit(name)]
    for role, name in names.items():
        found.by_role[role] = [name]

    def take(role: str, chosen: list[str]) -> None:
        if chosen and role not in found.by_role:
            found.by_role[role] = chosen

    def best(fits: Callable[[str], bool]) -> list[str]:
        fitting = [name for name in left if fits(name)]
        order = sorted(fitting, key=lambda name: (-counts[name], "epoch" in words(name), len(name)))
        return order[:1]

    take("loss", best(lambda name: _is_whole_loss(name) and split_of(name) in ("", "train")))
    take("val_loss", best(lambda name: _is_whole_loss(name) and split_of(name) == "val"))
    for role, parts in sums.items():
        take(role, parts)
    if "loss" not in found.by_role:
        generator = _adversarial(left)
        found.objective = "adversarial" if generator else ""
        take("loss", generator or _only(left, counts, "train"))
    take("val_loss", [] if found.objective else _same_subject(left, found.by_role.get("loss", []), counts))
    take("val_loss", best(lambda name: _is_whole_loss(name) and split_of(name) == "test"))
    if not found.objective and len(_adversarial(left)) > 0:
        found.objective = "adversarial"
    _take_rates(found, [name for name in left if _is_rate(name)])
    take("grad_norm", best(_is_norm))
    take("val_accuracy", best(lambda name: _is_accuracy(name) and split_of(name) in ("val", "test")))
    take("accuracy", best(lambda name: _is_accuracy(name) and split_of(name) in ("", "train")))
    return found


def _is_whole_loss(name: str) -> bool:
    found = set(words(name))
    return bool(found & _LOSS) and not found - _LOSS - _PLAIN - TRAINING - VALIDATION - TEST


def _is_loss(name: str) -> bool:
    return bool(set(words(name)) & (_LOSS | _CRITERION))


def _is_rate(name: str) -> bool:
    found = words(name)
    return "lr" in found or any(pair == ("learning", "rate") for pair in pairwise(found))


def _is_norm(name: str) -> bool:
    found = set(words(name))
    return "norm" in found and any(word.startswith("grad") for word in found) and not found - _OF_A_NORM


def _is_accuracy(name: str) -> bool:
    found = set(words(name)) - TRAINING - VALIDATION - TEST - _PLAIN
    return bool(found & {"accuracy", "acc"}) and not found - _OF_ACCURACY


def _adversarial(names: Iterable[str]) -> list[str]:
    """Return the generator's loss where another column is the loss of what it plays against."""
    listed = [name for name in names if split_of(name) in ("", "train")]

    def of(players: frozenset[str]) -> list[str]:
        return [
            name
            for name in listed
            if set(words(name)) & players and (_is_loss(name) or re.match(r"^[gd]_[a-z0-9]$", name.lower()))
        ]

    return of(_GENERATOR)[:1] if of(_GENERATOR) and of(_CRITIC) else []


def _only(names: list[str], counts: Mapping[str, int], split: str) -> list[str]:
    """Return the only column that is a loss of any kind, of the split or of none."""
    fitting = [name for name in names if _is_loss(name) and split_of(name) in ("", split)]
    most = [name for name in fitting if len({subject(other) for other in fitting}) == 1]
    return sorted(most, key=lambda name: -counts[name])[:1]


def _same_subject(names: list[str], loss: list[str], counts: Mapping[str, int]) -> list[str]:
    """Return the validation column that measures what the training loss does; the only one where none is alike."""
    held_out = [name for name in names if _is_loss(name) and split_of(name) == "val"]
    alike = [name for name in held_out if loss and subject(name) == subject(loss[0])]
    chosen = alike or (held_out if len(held_out) == 1 else [])
    return sorted(chosen, key=lambda name: -counts[name])[:1]


def _take_rates(found: Columns, rates: list[str]) -> None:
    if any(role == "lr" or role.startswith("lr/") for role in found.by_role):
        return
    if len(rates) == 1:
        found.by_role["lr"] = rates
        return
    for index, name in enumerate(rates):
        group = "-".join(word for word in words(name) if word not in _OF_A_RATE) or str(index)
        role = f"lr/{group}"
        found.by_role[role if role not in found.by_role else f"lr/{index}"] = [name]
