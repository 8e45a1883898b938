"""Whose steps the rows are of, and so under which names what they say is recorded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..columns import EXTRAS
from ..control import CLIP_SERIES
from ..core import Rows
from ..history import Interval, ParameterInfo, places_of, summarize
from ..moments import totals
from .players import Players
from .series import gradient_series

Series = dict[str, tuple[NDArray[np.intp], NDArray[np.float64]]]
"""By name the indices of the rows that have it, and the values."""


class WhoseSteps:
    """Sorts what rows say by the players whose steps they are of; of all together, each has its share.

    Args:
        players: who takes steps.
        infos: the parameters of the rows, of all ranks.
        extras: the further columns that are recorded.
    """

    def __init__(self, players: Players, infos: list[ParameterInfo], extras: tuple[str, ...] = ()) -> None:
        self._extras = extras
        self._of_steps: dict[int, str] = {}  # of those that have not arrived, where there are players
        self.parameters = len(infos)
        at = {info.name: place for place, info in enumerate(infos)}
        self._places: dict[str, NDArray[np.int64]] = {}
        for player in players.each:
            names = [players.all.parameters[place].name for place in player.places]  # also of what it shares
            own = [at[name] for name in names if name in at]
            self._places[player.name] = np.union1d(places_of(infos, player.name), own).astype(np.int64)

    def note(self, step: int, player: str) -> None:
        """Say whose step it is, "" for all; before its row can arrive."""
        if self._places:
            self._of_steps[step] = player

    def forget(self, step: int) -> None:
        """Forget the steps up to this one."""
        if self._of_steps:
            self._of_steps = {known: player for known, player in self._of_steps.items() if known > step}

    def sorted(self, rows: Rows) -> tuple[Rows, Series]:
        """Return rows with their scalars by the names that are recorded, and the series of their gradients."""
        if not self._places:
            everywhere = np.arange(len(rows.steps))
            found = gradient_series(rows, self._extras)
            return rows, {name: (everywhere, values) for name, values in found.items()}
        whose = self._whose(rows)
        series: Series = {}
        for player in ["", *self._places]:
            where = np.flatnonzero(np.isin(whose, ("", player)))
            if len(where):
                found = gradient_series(self._share(rows, where, whose, player), self._extras)
                series |= {_of(player, name): (where, values) for name, values in found.items()}
        return replace(rows, scalars=self._scalars(rows, whose)), series

    def interval(
        self, rows: Rows, weight_norms: NDArray[np.float64], update_norms: NDArray[np.float64] | None
    ) -> Interval:
        """Return what rows say of each parameter; it is missing only in steps of those who have it."""
        steps: Any = None
        if self._places:
            whose = self._whose(rows)
            steps = np.full(self.parameters, np.count_nonzero(whose == ""))
            for player, places in self._places.items():
                steps[places] += np.count_nonzero(whose == player)
        extras = rows.extras
        if extras is not None:
            extras = np.where([name in self._extras for name in EXTRAS], extras, np.nan)
        norms = weight_norms, update_norms
        return summarize(rows.steps, rows.tensors, rows.elements, *norms, of_steps=steps, extras=extras)

    def _whose(self, rows: Rows) -> NDArray[np.str_]:
        return np.array([self._of_steps.get(step, "") for step in rows.steps.tolist()], np.str_)

    def _share(self, rows: Rows, where: NDArray[np.intp], whose: NDArray[np.str_], player: str) -> Rows:
        """Return of some rows the part of a player: all that is in those of its own steps."""
        extras = None if rows.extras is None else rows.extras[where]
        part = Rows(rows.steps[where], rows.totals[where], rows.tensors[where], rows.elements[where], {}, extras)
        together = np.flatnonzero(whose[where] == "")
        if player == "" or not len(together) or not rows.has_gradients:
            return part
        others = np.delete(np.arange(part.tensors.shape[1]), self._places[player])
        part.tensors[np.ix_(together, others)] = np.nan  # fancy indexing has made a copy
        part.totals[together] = totals(part.tensors[together])
        return part

    def _scalars(self, rows: Rows, whose: NDArray[np.str_]) -> Series:
        sorted_by_name: Series = {}
        for name, (where, values) in rows.scalars.items():
            player, _, rest = name.partition("/")
            if name in CLIP_SERIES:
                for owner in dict.fromkeys(whose[where].tolist()):
                    own = whose[where] == owner
                    sorted_by_name[_of(owner, name)] = where[own], values[own]
            elif player in self._places and (rest == "lr" or rest.startswith("lr/")):  # read on each step
                own = np.isin(whose[where], ("", player))
                if own.any():
                    sorted_by_name[name] = where[own], values[own]
                    sorted_by_name.setdefault(f"{player}/lr", (where[own], values[own]))
            elif name != "lr":  # of the first group of all, which is a player's
                sorted_by_name[name] = where, values
        return sorted_by_name


def _of(player: str, name: str) -> str:
    return f"{player}/{name}" if player else name
