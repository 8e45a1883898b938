"""Whether the model and the optimizer still have the parameters that are tracked."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from .._warn import warn_user
from ..core import LocalParameter, native, parameters_of
from ..errors import ParameterError


class ModelWatch:
    """Notices, once, that a module or an optimizer has got other parameters.

    Args:
        model: what the user gave; only a module can be watched.
        parameters: those that are tracked.
        optimizer: where the parameters are grouped; None for none.
        prefix: what the parameters' names have before those in the model.
        regrouped: called where tracked parameters are in other groups than before.
    """

    def __init__(
        self,
        model: object,
        parameters: list[LocalParameter],
        optimizer: Any,
        regrouped: Callable[[], None],
        prefix: str = "",
    ) -> None:
        self._model = model if isinstance(model, torch.nn.Module) else None
        self._prefix = prefix
        self._before = {each.name: id(each.parameter) for each in parameters}
        self._modules = None if self._model is None else native.watch_module(self._model)
        self._optimizer, self._regrouped = optimizer, regrouped
        self._grouped = _grouped(optimizer)

    def check(self, *, closed: bool) -> None:
        """Make sure that nothing has changed.

        Raises:
            ParameterError: it has. Where the tracker is ``closed`` that is a warning.
        """
        message = self._change_of_model() or self._change_of_optimizer()
        if not message:
            return
        self._model = self._optimizer = None
        message = f"{message}; everything recorded is kept: close this tracker and make a new one for the changed model"
        if not closed:
            raise ParameterError(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)

    def _change_of_model(self) -> str:
        if self._model is None or self._modules is None or self._modules.unchanged(self._model):
            return ""
        now = {self._prefix + each.name: id(each.parameter) for each in parameters_of(self._model)}
        if now == self._before:  # another activation, say
            self._modules = native.watch_module(self._model)
            return ""
        changes = [f"new: {name!r}" for name in now if name not in self._before]
        changes += [f"gone: {name!r}" for name in self._before if name not in now]
        named = "; ".join(changes[:5]) or "replaced"
        return f"the model's parameters have changed since the tracker was made ({named})"

    def _change_of_optimizer(self) -> str:
        if self._optimizer is None:
            return ""
        before, now = self._grouped, _grouped(self._optimizer)
        if now == before:
            return ""
        self._grouped = now
        tracked = {place: name for name, place in self._before.items()}
        gone = [name for place, name in tracked.items() if place in before and place not in now]
        strangers = [place for place in now if place not in before and place not in tracked]
        if gone and strangers:
            return (
                f"the optimizer has other parameters than when the tracker was made ({len(strangers)} in the place of "
                f"{', '.join(map(repr, gone[:5]))})"
            )
        if strangers:
            warn_user(f"the optimizer has {len(strangers)} parameters more than before, and they are not tracked")
        self._regrouped()
        return ""


def _grouped(optimizer: Any) -> dict[int, int]:
    """Return the group of each parameter, by its identity."""
    groups = [] if optimizer is None else optimizer.param_groups
    return {id(parameter): index for index, group in enumerate(groups) for parameter in group["params"]}
