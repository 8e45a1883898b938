"""Who takes steps: one model; several, each with an optimizer; or one whose parameters several optimizers share.

A player is one of several. What its steps record goes by its name: ``D/loss``, ``D/grad_norm``, ``D/lr``; and so do its
parameters, ``D/0.weight``, or, where players are the optimizers of one model, their groups: ``D/0``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from .._checks import shown, text, wrong_type
from ..core import LocalParameter, TrackedParameters, make_plan, name_rates, parameters_of, track, watchable
from ..errors import InvalidTypeError, InvalidValueError
from ..history import ParameterInfo
from .arguments import warn_of_untrained
from .model_watch import ModelWatch
from .series import facts_of_optimizer, parameter_infos

_NO_NAMES = ("lr",)  # of series, before a slash


@dataclass(frozen=True)
class Player:
    """One of several, or with an empty name all together."""

    name: str
    model: Any
    parameters: list[LocalParameter]  # by the names that it gives them
    places: list[int]  # of these among the parameters of all
    optimizers: list[Any]

    @property
    def prefix(self) -> str:
        """What the names of all that is recorded of it begin with."""
        return f"{self.name}/" if self.name else ""

    @property
    def optimizer(self) -> Any:
        """What has the parameter groups of its optimizers; None for none."""
        return _Together(self.optimizers) if len(self.optimizers) > 1 else (self.optimizers or [None])[0]


class _Together:
    """Several optimizers, as one that has their groups."""

    def __init__(self, optimizers: list[Any]) -> None:
        self._optimizers = optimizers

    @property
    def param_groups(self) -> list[Any]:
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]


class Players:
    """Who takes steps, as ``Tracker`` was told, with the parameters and the plan of all together.

    Args:
        model: a target, or targets by player.
        optimizer: one or none; or by player, where players have models or share the parameters of one.

    Raises:
        InvalidTypeError, InvalidValueError: they do not go together, or a player cannot have its name.
        ParameterError, LayoutError: as of ``track``.
    """

    def __init__(self, model: Any, optimizer: Any) -> None:
        models, optimizers = _by_player("model", model), _by_player("optimizer", optimizer)
        given = {"": optimizer} if optimizers is None else optimizers
        for name, each in given.items():
            if each is not None and not hasattr(each, "param_groups"):
                raise wrong_type(f"optimizer[{name!r}]" if name else "optimizer", each, "one with param_groups")
        if models is None:
            target = watchable(model)
            self.tracked = track(target)
        else:
            _check_together(models, given)
            models = {name: watchable(each) for name, each in models.items()}
            target = _holder_of(models)
            owned = {name: _renamed(name, parameters_of(each)) for name, each in models.items()}
            self.tracked = _tracked([each for own in owned.values() for each in own])
        given = {name: each for name, each in given.items() if each is not None}
        self.all = Player("", target, self.tracked.parameters, [], [*given.values()])
        if models is None:
            owned = {name: self._of(each) for name, each in given.items() if name}
        self.each = [
            self._player(name, models[name] if models else target, own, [given[name]] if name in given else [])
            for name, own in owned.items()
        ]
        self._apart = self.each if models else [self.all]  # whose models and optimizers go together
        for player in self._apart:
            warn_of_untrained(player.parameters, player.optimizer)

    def _of(self, optimizer: Any) -> list[LocalParameter]:
        """Return the parameters that an optimizer has."""
        its = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return [each for each in self.all.parameters if id(each.parameter) in its]

    def _player(self, name: str, model: Any, parameters: list[LocalParameter], optimizers: list[Any]) -> Player:
        if not parameters:
            raise InvalidValueError(f"player {name!r} has no parameters, or its optimizer has none of the model's")
        known = {_identity(each): place for place, each in enumerate(self.tracked.parameters)}
        return Player(name, model, parameters, [known[_identity(each)] for each in parameters], optimizers)

    def __bool__(self) -> bool:
        """Whether there are several, or one that has a name."""
        return bool(self.each)

    def reserved(self, names: Iterable[str]) -> set[str]:
        """Return what no scalar may be called: these names, of all and of each player, and each one's learning rate."""
        known = {prefix + name for prefix in self.prefixes for name in names}
        return known | {f"{player.prefix}lr" for player in self.each if player.optimizers}

    @property
    def prefixes(self) -> list[str]:
        """What names begin with: nothing, and what is a player's with its own."""
        return [self.all.prefix, *(player.prefix for player in self.each)]

    def name_rates(self, groups: list[dict[str, Any]]) -> list[str]:
        """Return the series that records the learning rate of each group of all optimizers."""
        if not self.each:
            return name_rates(groups)
        return [
            player.prefix + name
            for player in self.each
            for optimizer in player.optimizers
            for name in name_rates(optimizer.param_groups)
        ]

    def infos(self) -> list[ParameterInfo]:
        """Return what each parameter is, in the group of its optimizer that it is in now."""
        return parameter_infos(self.all.parameters, {each.prefix: each.optimizer for each in self.each or [self.all]})

    def facts(self) -> dict[str, Any]:
        """Return what the rules know of the optimizers, and of each player's."""
        facts = [facts_of_optimizer(each) for each in self.all.optimizers] or [facts_of_optimizer(None)]
        alike = {name: value for name, value in facts[0].items() if all(each.get(name) == value for each in facts)}
        if not self.each:
            return alike
        of_each = {each.name: facts_of_optimizer(each.optimizer) for each in self.each}
        return {"optimizer": ", ".join(str(each["optimizer"]) for each in facts), **alike, "players": of_each}

    def watches(self, regrouped: Callable[[], None]) -> list[ModelWatch]:
        """Return what notices that a model or an optimizer has got other parameters."""
        rewritten = self.tracked.rewritten
        return [
            ModelWatch(None if rewritten else each.model, each.parameters, each.optimizer, regrouped, each.prefix)
            for each in self._apart
        ]


def _by_player(argument: str, given: Any) -> dict[str, Any] | None:
    """Return what is given by player; None where it is for all.

    Raises:
        InvalidTypeError, InvalidValueError: there is no player, or a name is none.
    """
    if not isinstance(given, Mapping):
        return None
    if not given:
        raise InvalidValueError(f"{argument} is an empty dictionary; it has one for each player")
    for name in given:
        if not text(f"a name in {argument}", name).isprintable() or not name or "/" in name or name in _NO_NAMES:
            raise InvalidValueError(
                f"a player is called {shown(name)} in {argument}; its name is before the slash in those of its series, "
                "as in D/loss: give it printable characters, no slash, and not the name lr"
            )
    return dict(given)


def _check_together(models: Mapping[str, Any], optimizers: Mapping[str, Any]) -> None:
    if optimizers.get("") is not None:
        raise InvalidTypeError(
            f"optimizer is one {type(optimizers['']).__name__} for the players {', '.join(map(repr, models))}; give a "
            "dictionary with the optimizer of each, or the models as a list where they share one"
        )
    strangers = [name for name in optimizers if name and name not in models]
    if strangers:
        raise InvalidValueError(
            f"optimizer has {', '.join(map(repr, strangers))}, and the players are {', '.join(map(repr, models))}"
        )


def _tracked(parameters: list[LocalParameter]) -> TrackedParameters:
    """Plan for the parameters of several players; what more than one has goes by the name that it has in the first."""
    whole: dict[Any, LocalParameter] = {}
    for each in parameters:
        whole.setdefault(_identity(each), each)
    return TrackedParameters([*whole.values()], make_plan([*whole.values()]))


def _renamed(player: str, parameters: list[LocalParameter]) -> list[LocalParameter]:
    return [replace(each, name=f"{player}/{each.name}") for each in parameters]


def _identity(each: LocalParameter) -> tuple[int, tuple[int, int]]:
    return id(each.parameter), each.window


def _holder_of(models: Mapping[str, Any]) -> Any:
    """Return a module that has the models, by the players' names; the list of them where not all are modules."""
    if not all(isinstance(each, torch.nn.Module) for each in models.values()):
        return list(models.values())
    holder = torch.nn.Module()
    holder._modules.update(models)  # add_module takes no name with a dot, nor one of a method
    return holder
