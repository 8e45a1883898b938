"""The steps of one player, or of all together: what is kept for them from one to the next."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .._checks import shown
from ..control import GradientSource, LossScale, ReadInBackward, Steering
from ..core import DeviceLog
from ..errors import InvalidValueError
from .closures import Closures
from .micro_batches import MicroBatches
from .players import Player, Players


class Lane:
    """Where the steps of a player go along: its micro-batches, its clip, and the names of what it records."""

    def __init__(self, player: Player, steering: Steering | ReadInBackward, closures: Closures) -> None:
        self.player = player.name
        self.closures = closures
        self._prefix = player.prefix
        self.steering = steering
        self.micro_batches = MicroBatches()
        self._names: dict[str, str] = {"grad_scale": "grad_scale"}

    def ask(self, clip: Any, norm_type: Any = 2.0, name: str = "clip") -> Any:
        """Return what is asked of the step's row for a clip; see ``Steering.ask``."""
        self.closures.check_clip()
        return self.steering.ask(clip, norm_type, name)

    def close(self) -> None:
        """Leave the optimizers alone."""
        self.closures.close()
        self.steering.close()

    def named(self, scalars: dict[str, Any]) -> dict[str, Any]:
        """Return scalars by the names that they are recorded under; the same strings on each step."""
        if not self._prefix:
            return scalars
        for name in scalars.keys() - self._names.keys():
            self._names[name] = sys.intern(self._prefix + name)
        return {self._names[name]: value for name, value in scalars.items()}


class Lanes:
    """The lane of each player, and that of all together.

    Args:
        players: who takes steps.
        log: has their rows.
        gradient: returns the gradient of a parameter; None: it is in ``.grad``.
        scaler: a GradScaler, or None.
        process_group: the ranks over which plain parameters are spread.
        each_closure: record every closure of a step as one of its own.
        in_backward: read each gradient as it comes.
    """

    def __init__(
        self,
        players: Players,
        log: DeviceLog,
        gradient: Callable[[Any], Any] | None,
        scaler: Any,
        process_group: Any,
        each_closure: bool,
        in_backward: bool,
    ) -> None:
        tracked = players.tracked
        if players and in_backward:
            raise InvalidValueError("in_backward is of one model and one optimizer, and there are players")

        def lane(player: Player) -> Lane:
            scale = LossScale(scaler, player.optimizers)
            source = GradientSource(tracked.plan, gradient, player.places if players else None)
            optimizer = player.optimizer if len(player.optimizers) == 1 else None
            steering: Steering | ReadInBackward
            if in_backward:
                steering = ReadInBackward(log, tracked.plan, tracked.parameters, scale, source)
            else:
                steering = Steering(log, tracked.plan, tracked.parameters, optimizer, process_group, scale, source)
            return Lane(player, steering, Closures(player.optimizers, each_closure))

        self.all = lane(players.all)
        self._of_players = {player.name: lane(player) for player in players.each}

    def of(self, only: str | None) -> Lane:
        """Return the lane of a player, or that of all.

        Raises:
            InvalidValueError: there is no such player.
        """
        if only is None:
            return self.all
        known = self._of_players.get(only) if isinstance(only, str) else None
        if known is None:
            raise InvalidValueError(
                f"only is {shown(only)}, and the players are {', '.join(map(repr, self._of_players))}"
                if self._of_players
                else f"only is {shown(only)}, and the tracker has no players; give it models by name, "
                "Tracker({'G': generator, 'D': discriminator}), or optimizers by name"
            )
        return known

    def __iter__(self) -> Iterator[Lane]:
        """Iterate over all lanes."""
        yield self.all
        yield from self._of_players.values()

    def state_dict(self) -> dict[str, Any]:
        """Return what the rules of clipping remember. Waits for the device."""
        states = {lane.player: state for lane in self if (state := lane.steering.state_dict())}
        clip = states.pop("", None)
        return ({"clip": clip} if clip else {}) | ({"clip_of_players": states} if states else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give it to the rules, and forget the micro-batches of the step that was cut off."""
        of_players = state.get("clip_of_players", {})
        for lane in self:
            lane.micro_batches.forget()
            lane.steering.load_state_dict(of_players.get(lane.player, {}) if lane.player else state.get("clip", {}))
