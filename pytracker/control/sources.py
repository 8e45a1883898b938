"""Where the gradients come from: .grad, another attribute of the parameters, or the call of step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from .._checks import items, shown, wrong_value
from ..contract import Plan
from ..errors import InvalidTypeError, PytrackerError, in_words


class GradientSource:
    """Lets a plan read other tensors than ``.grad``, while a block lasts.

    Args:
        plan: reads and scales the gradients.
        gradient: returns a parameter's gradient, or None where it has none; without it that is ``.grad``.
        places: of the parameters whose gradients are read, the others are missing; none: of all. None: of all, and no
            other source of the plan reads only some.
    """

    def __init__(
        self, plan: Plan, gradient: Callable[[Tensor], Tensor | None] | None, places: Sequence[int] | None = None
    ) -> None:
        self._plan, self._places = plan, places
        self._now: list[Tensor | None] | None = None
        self._gradient = gradient
        self.is_grad = gradient is None and places is None  # nothing but what is given is read in the place of `.grad`

    @contextlib.contextmanager
    def given(self, gradients: Any = None) -> Iterator[bool]:
        """Read what is given, one for each parameter in their order; tell whether that is not ``.grad``.

        Raises:
            InvalidTypeError: they are no tensors.
            InvalidValueError: there is not one for each parameter.
        """
        if self._places is not None:
            self._plan.select(self._places)
        found = self._found(gradients)
        if found is None:
            yield False
            return
        self._plan.give(self._among_all(found))
        self._now = found
        try:
            yield True
        finally:
            self._plan.give([])
            self._now = None

    def present(self) -> list[Tensor]:
        """Return the gradients that there are now."""
        now = [parameter.grad for parameter in self.parameters] if self._now is None else self._now
        return [gradient for gradient in now if gradient is not None]

    @property
    def parameters(self) -> list[Tensor]:
        """Those whose gradients are read."""
        parameters = self._plan.parameters
        return [parameters[place] for place in self._places] if self._places else parameters

    def _among_all(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        if not self._places:
            return gradients
        everywhere: list[Tensor | None] = [None] * len(self._plan.names)
        for place, gradient in zip(self._places, gradients, strict=True):
            everywhere[place] = gradient
        return everywhere

    def _found(self, gradients: Any) -> list[Tensor | None] | None:
        if gradients is None and self._gradient is None:
            return None
        parameters = self.parameters
        if gradients is None:
            return self._asked_for(parameters) if parameters else None
        expected = "one tensor for each parameter, in their order, or None where it has none"
        given = _tensors(items("gradients", gradients, expected))
        if len(given) != len(parameters):
            raise wrong_value("gradients", f"{len(given)} of them", f"{expected}: {len(parameters)}")
        return given

    def _asked_for(self, parameters: list[Tensor]) -> list[Tensor | None]:
        assert self._gradient is not None
        try:
            return _tensors([self._gradient(parameter) for parameter in parameters])
        except PytrackerError:
            raise
        except Exception as error:
            raise InvalidTypeError(f"gradient raised, for a parameter: {in_words(error)}") from error


def _tensors(given: Any) -> list[Tensor | None]:
    known = list(given)
    for index, each in enumerate(known):
        if each is not None and not isinstance(each, Tensor):
            raise InvalidTypeError(
                f"gradients: that of parameter {index} is {shown(each)}, of type {type(each).__name__}; "
                "expected a tensor"
            )
    return known
