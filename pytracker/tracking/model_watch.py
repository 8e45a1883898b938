"""Whether a model still has the parameters that are tracked."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ..core import LocalParameter, native, parameters_of
from ..errors import ParameterError


class ModelWatch:
    """Notices, once, that a module has got other parameters. ``model`` may be something that cannot be watched."""

    def __init__(self, model: object, parameters: list[LocalParameter]) -> None:
        self._model = model if isinstance(model, torch.nn.Module) else None
        self._before = {each.name: id(each.parameter) for each in parameters}
        self._modules: Any = None if self._model is None else native.watch_module(self._model)

    def check(self, *, closed: bool) -> None:
        """Make sure that nothing has changed.

        Raises:
            ParameterError: it has. Where the tracker is ``closed`` that is a warning.
        """
        if self._model is None or self._modules.unchanged(self._model):
            return
        now = {each.name: id(each.parameter) for each in parameters_of(self._model)}
        if now == self._before:  # another activation, say
            self._modules = native.watch_module(self._model)
            return
        self._model = None
        message = (
            f"the model's parameters have changed since the tracker was made ({self._changes(now)}); everything "
            "recorded is kept: close this tracker and make a new one for the changed model"
        )
        if not closed:
            raise ParameterError(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)

    def _changes(self, now: dict[str, int]) -> str:
        changes = [f"new: {name!r}" for name in now if name not in self._before]
        changes += [f"gone: {name!r}" for name in self._before if name not in now]
        return "; ".join(changes[:5]) or "replaced"
