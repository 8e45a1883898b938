"""Players: the parts of a run that have a model or an optimizer of their own. No torch here.

What is a player's goes by its name: the series ``D/loss``, ``D/grad_norm`` and ``D/lr``, parameters called
``D/0.weight``, or, where several optimizers share a model, parameters in the group ``D/0``. A player's steps are those
that have a ``D/grad_norm``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidValueError
from .history import History
from .intervals import FIELDS, Int64Array, Interval, ParameterInfo
from .parameters import ParameterHistory

GRADIENT_NORM: Final = "grad_norm"


def players_of(history: History) -> list[str]:
    """Return the names of a run's players, none where one model has one optimizer."""
    known = history.meta.get("players")
    return [str(name) for name in known] if isinstance(known, dict) else []


def have_steps_of_their_own(history: History, player: str) -> bool:
    """Whether a player has taken steps that the others have not."""
    own, all_together = history.get(f"{player}/{GRADIENT_NORM}"), history.get(GRADIENT_NORM)
    return own is not None and len(own) > (0 if all_together is None else len(all_together))


def places_of(infos: Sequence[ParameterInfo], player: str) -> Int64Array:
    """Return which parameters are a player's, ascending."""
    prefix = f"{player}/"
    own = [i for i, each in enumerate(infos) if each.name.startswith(prefix) or each.group.startswith(prefix)]
    return np.array(own, np.int64)


def frozen_in(history: History) -> NDArray[np.bool_]:
    """Return which parameters require no gradient, bool [T], from the ranges of places in ``meta["frozen"]``.

    >>> run = History()
    >>> run.parameters = ParameterHistory([ParameterInfo(name, (1,), "float32", "", 1) for name in "abc"])
    >>> run.meta["frozen"] = [[1, 3], "what a stranger has written"]
    >>> frozen_in(run).tolist()
    [False, True, True]
    """
    frozen = np.zeros(len(history.parameters.infos), bool)
    ranges = history.meta.get("frozen")
    for each in ranges if isinstance(ranges, list) else ():
        if isinstance(each, (list, tuple)) and len(each) == 2 and all(isinstance(place, int) for place in each):
            frozen[each[0] : each[1]] = True
    return frozen


class PlayerHistory(History):
    """What one player has recorded, as if its training were alone: its series without the player's name.

    Series are the run's own, which grow; parameters keep their names. ``refresh`` takes what has come since.

    >>> run = History({"G/loss": [3.0, 2.0], "D/loss": [1.0]})
    >>> run.meta["players"] = {"G": {}, "D": {}}
    >>> PlayerHistory(run, "G")
    History(1 series up to step 1: loss)

    Raises:
        InvalidValueError: the run has no such player.
    """

    def __init__(self, run: History, player: str) -> None:
        if player not in players_of(run):
            known = ", ".join(players_of(run)) or "none"
            raise InvalidValueError(f"the run has no player {player!r}; there are {known}")
        super().__init__()
        self._run, self._player = run, player
        self._infos: list[ParameterInfo] | None = None  # of the run, when it was looked at
        self._places = np.empty(0, np.int64)
        self._next = 0  # the first step whose interval has not been looked at
        self.refresh()

    def refresh(self) -> None:
        """Take what the run has recorded since. Costs as much as there is of that."""
        run, prefix = self._run, f"{self._player}/"
        for name, series in list(run.items()):
            if name.startswith(prefix):
                self._series.setdefault(name.removeprefix(prefix), series)
        if self._infos is not run.parameters.infos or self.truncations != run.truncations:
            self._begin()
        facts = run.meta["players"][self._player]
        frozen = np.flatnonzero(frozen_in(run)[self._places]).tolist()
        self.meta = {**run.meta, **(facts if isinstance(facts, dict) else {}), "frozen": [[i, i + 1] for i in frozen]}
        self._take()

    def _begin(self) -> None:
        run, prefix = self._run, f"{self._player}/"
        self.truncations, self._infos, self._next = run.truncations, run.parameters.infos, 0
        self._places = places_of(self._infos, self._player)
        infos = [self._infos[place] for place in self._places]
        self.parameters = ParameterHistory([replace(each, group=each.group.removeprefix(prefix)) for each in infos])

    def _take(self) -> None:
        """Take the rows in which the player has taken a step, and intervals from its first to its last step in each."""
        base, norms = self._run.parameters, self.get(GRADIENT_NORM)
        steps = np.empty(0, np.int64) if norms is None else norms.steps
        places = range(int(np.searchsorted(base.first_step, self._next)), len(base))
        for place in places:
            first, last = int(base.first_step[place]), int(base.last_step[place])
            own = steps[slice(*np.searchsorted(steps, (max(first, self._next), last + 1)))]
            if len(own):
                fields = {name: base.field(name)[place, self._places] for name in FIELDS}
                self.parameters.append(Interval(int(own[0]), int(own[-1]), **fields))
            self._next = last + 1
        newest = self.parameters.newest_row
        for where, rows in base.blocks():
            if where[-1] > newest:
                mine = np.isin(where, steps) & (where > newest)
                self.parameters.put_rows(where[mine], rows[mine][:, self._places])
