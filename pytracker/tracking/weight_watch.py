"""The parameters themselves: how large they are, and how far single steps move them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._warn import warn_user
from ..columns import COLUMNS
from ..control import unwrapped
from ..core import LocalParameter, make_plan, native
from ..errors import in_words
from .players import Player, Players


class WeightWatch:
    """Measures the parameters' moments when asked, and on each ``every``-th step those of what it adds to them.

    At such a step the parameters that are trained are copied; when ``optimizer.step`` is over (by a hook on the
    optimizer; where there is none or several, at the next step) the copy becomes the difference, two launches read that
    and the parameters, and it is freed. Differences are rounded to the parameters' dtype: they are exact where an
    element does not more than double or halve (Sterbenz, Floating-Point Computation, 1974). Nothing waits.

    Args:
        players: whose steps are measured; each one's are counted by themselves.
        every: steps from one to the next that is measured, the first included; None: none is.
        in_backward: the optimizer's step comes before the tracker's, so it is the next one that is measured.
    """

    def __init__(self, players: Players, every: int | None, in_backward: bool) -> None:
        self.every = every
        self._parameters = players.all.parameters
        self._plan = make_plan(self._parameters, "value")
        self._counts: dict[str, int] = {}
        self._places = {player.name: player.places for player in players.each}
        self._late = int(in_backward)
        self._under_way: _Copy | None = None
        self._measured: deque[_Measurement] = deque()
        watched = [] if every is None or in_backward else [players.all, *players.each]
        self._hooks = [hook for player in watched if (hook := self._hook_on(player)) is not None]

    def _hook_on(self, player: Player) -> Any:
        register = getattr(unwrapped(player.optimizer), "register_step_post_hook", None)
        name = player.name

        def end(*_: Any) -> None:
            if self._under_way is not None and self._under_way.player == name:
                self.end()

        end = torch._disable_dynamo(end)  # type: ignore[attr-defined]  # torch breaks the graph at an optimizer anyway
        return register(end) if register is not None else None

    def begin(self, step: int, player: str) -> None:
        """Copy what the step may change, where it is one to measure. Never waits, nor raises."""
        if self.every is None:
            return
        count = self._counts.get(player, 0)
        self._counts[player] = count + 1
        if count % self.every or _is_captured():
            return
        try:
            places = self._places.get(player, range(len(self._parameters)))
            self._under_way = _Copy(step + self._late, player, self._parameters, places)
        except Exception as error:
            self._give_up(error)

    def end(self) -> None:
        """Measure the step that is under way, if one is. Never waits, nor raises."""
        copy, self._under_way = self._under_way, None
        if copy is None or _is_captured():
            return
        try:
            with torch.no_grad(), native.outside_of_transforms():
                copy.subtract()
                self._plan.give(copy.tensors)
                try:
                    updates = self._plan.reduce()
                finally:
                    self._plan.give([])
                self._measured.append(_Measurement(copy.step, self._plan.members, [updates, self._plan.reduce()]))
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.every = None
        warn_user(
            f"what a step adds to the parameters is not measured any more, since that failed: {in_words(error)}. It "
            "takes the memory of a copy of what is trained, from the tracker's step to the end of the optimizer's"
        )

    def until(self, step: int) -> NDArray[np.float64] | None:
        """Return the moments of what was added and of the parameters, [2, T, 6], by the latest step before this one.

        None where no step was measured since the last call. The row of ``step`` is on the host, and so is what was
        measured before it.
        """
        found = None
        while self._measured and self._measured[0].step < step:
            found = self._measured.popleft()
        return None if found is None else found.moments(len(self._parameters))

    def moments(self) -> NDArray[np.float64]:
        """Return the moments of the parameters now, [T, 6], NaN where one cannot be read. Waits for the device."""
        with native.outside_of_transforms():
            (moments,) = _Measurement(0, self._plan.members, [self._plan.reduce()]).moments(len(self._parameters))
            return np.asarray(moments)

    def restart(self) -> None:
        """Forget what was measured of steps that are taken out of the run."""
        self._under_way = None
        self._measured.clear()

    def close(self) -> None:
        """Leave the optimizers alone."""
        for hook in self._hooks:
            hook.remove()
        self._under_way = None


class _Copy:
    """What this rank has of some parameters, as it is before a step."""

    def __init__(self, step: int, player: str, parameters: list[LocalParameter], places: Iterable[int]) -> None:
        self.step, self.player = step, player
        self.tensors: list[Tensor | None] = [None] * len(parameters)  # of each parameter; flat ones have theirs often
        self._pairs: dict[int, tuple[Tensor, Tensor]] = {}  # of each tensor that has some: it, and its copy
        with torch.no_grad():
            for place in places:
                parameter = parameters[place].parameter
                piece = _piece_of(parameter)
                if piece is None:
                    continue
                _, copy = self._pairs.setdefault(id(parameter), (parameter, torch.empty_like(piece)))
                self.tensors[place] = copy
            for copies, pieces in self._grouped():
                torch._foreach_copy_(copies, pieces)

    def subtract(self) -> None:
        """Take what the parameters are now from it."""
        for copies, pieces in self._grouped():
            torch._foreach_sub_(copies, pieces)

    def _grouped(self) -> Iterable[tuple[list[Tensor], list[Tensor]]]:
        """Return the copies and the parameters of each device and dtype, which torch takes in few launches."""
        groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        for parameter, copy in self._pairs.values():
            piece = _piece_of(parameter)
            if piece is None or piece.shape != copy.shape or piece.device != copy.device:
                raise RuntimeError(f"a parameter of shape {list(copy.shape)} has become another in its step")
            copies, pieces = groups.setdefault((copy.device, copy.dtype), ([], []))
            copies.append(copy)
            pieces.append(piece)
        return groups.values()


class _Measurement:
    """Rows of moments on their way to the host."""

    def __init__(self, step: int, members: list[list[int]], rows: list[list[Tensor]]) -> None:
        self.step = step
        self._members = members
        self._events: list[torch.cuda.Event] = []
        self._rows = [[self._sent(row) for row in of_devices] for of_devices in rows]

    def _sent(self, row: Tensor) -> Tensor:
        if not row.is_cuda:
            return row
        there = torch.empty(row.shape, dtype=row.dtype, device="cpu", pin_memory=True)
        with torch.cuda.device(row.device):
            there.copy_(row, non_blocking=True)
            self._events.append(torch.cuda.Event())  # type: ignore[no-untyped-call]
            self._events[-1].record()
        return there

    def moments(self, parameters: int) -> NDArray[np.float64]:
        """Return them, [rows, parameters, 6]. Waits for the device where it has not come so far."""
        for event in self._events:
            event.synchronize()
        found = np.full((len(self._rows), parameters, len(COLUMNS)), np.nan)
        for moments, of_devices in zip(found, self._rows, strict=True):
            for places, row in zip(self._members, of_devices, strict=True):
                moments[places] = native.tensor_moments(row)
        return found


def _piece_of(parameter: Tensor) -> Tensor | None:
    """Return what this rank has of a parameter that is trained; None where that is nothing that can be subtracted."""
    piece = getattr(parameter, "_local_tensor", parameter)
    is_memory = piece.layout == torch.strided and not piece.is_meta and not piece.is_nested
    return piece.detach() if is_memory and parameter.requires_grad else None


def _is_captured() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
