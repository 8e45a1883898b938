"""Steps and clips within torch.compile: each is an operator in the graph, so that nothing breaks it.

What torch traces is a call of an operator, whose inputs are the gradients as they are at that place of the graph, and
tensors among the scalars. When the graph runs, the operator calls the tracker as Python would have. A tensor of one
element that each call is said to change keeps the calls, and their order, from being optimized away.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import InvalidTypeError, InvalidValueError
from .players import Players

_CLIPS = "a number, or the name of a rule"
_BETWEEN = "\0"  # names, in the one text that an operator takes

# What torch calls with each frame of Python, within torch.compile; None outside.
_tracing: Callable[[], Any] = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: True)

_trackers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_handles = itertools.count()

Method = TypeVar("Method", bound=Callable[..., Any])


class InGraphs:
    """What the graphs that hold a tracker's calls know of it: its number, what its calls change, and its parameters.

    Args:
        tracker: the tracker; it is not kept alive.
        players: whose parameters they are.
        gradient: returns the gradient of a parameter; None: it is in ``.grad``.
        in_backward: each gradient is read as it comes.
    """

    def __init__(
        self, tracker: Any, players: Players, gradient: Callable[[Tensor], Tensor | None] | None, in_backward: bool
    ) -> None:
        self._gradient, self._in_backward = gradient, in_backward
        self.are_plain = not players.tracked.plan.has_pieces  # of others, as of DTensors, the calls break the graph
        self.handle = next(_handles)
        self.state = torch.zeros(1, dtype=torch.int64, device="cpu")
        self.parameters = {
            player.name: [each.parameter for each in player.parameters] for player in (players.all, *players.each)
        }
        self.places = {player.name: player.places for player in players.each}  # among the parameters of all
        _trackers[self.handle] = tracker

    def step(
        self,
        *unnamed: Any,
        only: str | None = None,
        n: float = 1,
        when: bool = True,
        gradients: Sequence[Tensor | None] | None = None,
        clip: float | str | None = None,
        **scalars: Any,
    ) -> None:
        """Put ``Tracker.step`` into the graph that is traced."""
        if unnamed:
            raise InvalidTypeError("tracker.step takes values by name, as tracker.step(loss=loss, n=len(x))")
        found, places = self._gradients(only, gradients)
        tensors = [(name, value) for name, value in scalars.items() if isinstance(value, Tensor)]
        numbers = [
            (name, value) for name, value in scalars.items() if value is not None and not isinstance(value, Tensor)
        ]
        names = _BETWEEN.join([name for name, _ in (*tensors, *numbers)])
        values = [value.detach() for _, value in tensors]
        how = (self.state, found, places, self.handle, only or "", names, values)
        given = gradients is not None or self._gradient is not None
        rest = ([float(value) for _, value in numbers], float(n), when, given)
        if clip is None:
            _step(*how, *rest)
        elif isinstance(clip, str):
            _clipped_step(*how, *rest, 0.0, clip)
        elif isinstance(clip, (int, float)):
            _clipped_step(*how, *rest, float(clip), "")
        else:
            raise InvalidTypeError(f"clip is of type {type(clip).__name__}; within torch.compile it is {_CLIPS}")

    def clip(
        self,
        max_norm: float | str,
        norm_type: float | str = 2.0,
        *,
        gradients: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Put ``Tracker.clip`` into the graph that is traced; whose the latest step is, is known when that runs."""
        found, places = self._gradients(None, gradients)
        limit, rule = (0.0, max_norm) if isinstance(max_norm, str) else (float(max_norm), "")
        norm: Tensor = _clip(self.state, found, places, self.handle, limit, rule, float(norm_type))
        return norm

    def _gradients(self, only: str | None, gradients: Sequence[Tensor | None] | None) -> tuple[list[Tensor], list[int]]:
        """Return the gradients that are there, and their places among the player's parameters."""
        if (only or "") not in self.parameters:
            raise InvalidValueError(f"only is {only!r}, and there is no such player")
        if gradients is not None:
            given = list(gradients)
        elif self._in_backward:
            given = []
        elif self._gradient is not None:
            given = [self._gradient(parameter) for parameter in self.parameters[only or ""]]
        else:
            given = [parameter.grad for parameter in self.parameters[only or ""]]
        places = [place for place, gradient in enumerate(given) if gradient is not None]
        return [gradient for gradient in given if gradient is not None], places


def graphed(name: str) -> Callable[[Method], Method]:
    """Return what makes a tracker's method the one of this name of ``InGraphs`` where torch traces its call."""

    def decorate(method: Method) -> Method:
        in_python = torch._disable_dynamo(method)  # type: ignore[attr-defined]

        @functools.wraps(method)
        def call(self: Any, *given: Any, **keywords: Any) -> Any:
            if torch.compiler.is_compiling() and self._in_graphs.are_plain:
                return getattr(self._in_graphs, name)(*given, **keywords)
            if torch.compiler.is_compiling() or _tracing() is not None:
                return in_python(self, *given, **keywords)
            return method(self, *given, **keywords)  # 2 us sooner, and without torch._dynamo, which is slow to import

        return call  # type: ignore[return-value]

    return decorate


def _tracker(handle: int) -> Any:
    tracker = _trackers.get(handle)
    if tracker is None:
        raise InvalidValueError("the tracker of a compiled step is gone; keep it for as long as the step is called")
    return tracker


def _all(tracker: Any, only: str, gradients: list[Tensor], places: list[int]) -> list[Tensor | None]:
    """Return the gradients of all of a player's parameters, in their order."""
    found: list[Tensor | None] = [None] * len(tracker._in_graphs.parameters[only])
    for place, gradient in zip(places, gradients, strict=True):
        found[place] = gradient
    return found


def _are_where_they_belong(parameters: list[Tensor], gradients: list[Tensor | None]) -> bool:
    """Whether these are what the parameters have in ``.grad``, and no copies that the graph has made."""
    return all(
        (gradient is None) == (parameter.grad is None)
        and (gradient is None or parameter.grad.data_ptr() == gradient.data_ptr())  # type: ignore[union-attr]
        for parameter, gradient in zip(parameters, gradients, strict=True)
    )


def _scalars(names: str, values: list[Tensor], numbers: Sequence[float]) -> dict[str, Any]:
    given = [*values, *numbers]
    return dict(zip(names.split(_BETWEEN), given, strict=True)) if given else {}


@torch.library.custom_op("pytracker::tracker_step", mutates_args=("state",))
def _step(
    state: Tensor,
    gradients: list[Tensor],
    places: list[int],
    handle: int,
    only: str,
    names: str,
    values: list[Tensor],
    numbers: list[float],
    n: float,
    when: bool,
    given: bool,
) -> None:
    tracker = _tracker(handle)
    found: Any = _all(tracker, only, gradients, places)
    if not (given or gradients) or (not given and _are_where_they_belong(tracker._in_graphs.parameters[only], found)):
        found = None
    tracker.step(only=only or None, n=n, when=when, gradients=found, **_scalars(names, values, numbers))
    state += 1


@torch.library.custom_op("pytracker::tracker_clipped_step", mutates_args=("state", "gradients"))
def _clipped_step(
    state: Tensor,
    gradients: list[Tensor],
    places: list[int],
    handle: int,
    only: str,
    names: str,
    values: list[Tensor],
    numbers: list[float],
    n: float,
    when: bool,
    given: bool,
    max_norm: float,
    rule: str,
) -> None:
    tracker = _tracker(handle)
    found = _all(tracker, only, gradients, places)
    scalars = _scalars(names, values, numbers)
    tracker.step(only=only or None, n=n, when=when, gradients=found, clip=rule or max_norm, **scalars)
    state += 1


@torch.library.custom_op("pytracker::tracker_clip", mutates_args=("state", "gradients"))
def _clip(
    state: Tensor,
    gradients: list[Tensor],
    places: list[int],
    handle: int,
    max_norm: float,
    rule: str,
    norm_type: float,
) -> Tensor:
    tracker = _tracker(handle)
    found = _all(tracker, "", gradients, places)
    of_player = tracker._in_graphs.places.get(tracker._lane.player)
    found = found if of_player is None else [found[place] for place in of_player]
    norm: Tensor = tracker.clip(rule or max_norm, norm_type, gradients=found)
    state += 1
    return norm.clone()


@_step.register_fake
def _(*_: Any) -> None:
    return None


@_clipped_step.register_fake
def _(*_: Any) -> None:
    return None


@_clip.register_fake
def _(state: Tensor, gradients: list[Tensor], *_: Any) -> Tensor:
    wide = any(gradient.dtype in (torch.float64, torch.complex128) for gradient in gradients)
    like = gradients[0] if gradients else state
    return like.new_empty((), dtype=torch.float64 if wide else torch.float32)
