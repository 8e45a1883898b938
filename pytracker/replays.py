"""Matches rows to steps where replays of CUDA graphs write rows that the host does not see.

Every row is marked with its number and who asked for it: the number of an eager step's note, or the capture. And
``replayed()`` notes how many rows there were by then, the last of which is its own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

NUMBER, ASKED_BY = -2, -1  # the marks of a row, at its end

Note: TypeAlias = tuple[int, int | None]
"""What the host knows of a row: the number of the note; of a replay, how many rows there were when it was announced."""


def marked(rows: NDArray[np.float64], first: int) -> dict[int, NDArray[np.float64]]:
    """Return, by number, the rows that are what stands at their place from number ``first`` on, by their marks."""
    return {number: row for number, row in enumerate(rows, first) if row[NUMBER] == number}


def match(rows: Mapping[int, NDArray[np.float64]], notes: Sequence[Note]) -> list[int | None]:
    """Return the number of each note's row, or None where it has none.

    A replay's row is the last one, of those that were there when it was announced, that is not of a replay announced
    later: so of several announced together each gets its own. An announcement for which none is left has none.

    >>> rows = {number: np.array([float(number), who]) for number, who in enumerate([0, -1, -1, 2])}
    >>> match(rows, [(0, None), (1, 3), (2, None)])  # row 1 was not announced
    [0, 2, 3]
    >>> match(rows, [(0, None), (1, 3), (2, 3), (3, 3)])
    [0, 1, 2, None]
    """
    who = {number: int(row[ASKED_BY]) for number, row in rows.items()}
    of_steps = {note: number for number, note in who.items() if note >= 0}
    of_replays = sorted(number for number, note in who.items() if note < 0)
    found = [of_steps.get(note) if there is None else None for note, there in notes]
    served: list[tuple[int, int]] = []  # the announcements that get a row: their indices, and the rows there were
    for index, (_, there) in enumerate(notes):
        if there is not None and bisect_left(of_replays, there) > len(served):
            served.append((index, there))
    for index, there in reversed(served):
        del of_replays[bisect_left(of_replays, there) :]
        found[index] = of_replays.pop()
    return found


def are_in_order(rows: Mapping[int, NDArray[np.float64]], first: int, notes: Sequence[Note]) -> bool:
    """Whether the rows from number ``first`` on are those of the notes, one each, and no other is among them."""
    there = notes[-1][1]
    end = first + len(notes)
    return match(rows, notes) == list(range(first, end)) and there in (None, end)


def complaints(strangers: int, where: str, lost: Sequence[int]) -> list[str]:
    """Say how many rows are nobody's, and which steps have none."""
    said = []
    if strangers:
        replays = "replay of a captured step was" if strangers == 1 else "replays of a captured step were"
        said.append(
            f"{strangers} {replays} not announced, {where}, and what they wrote is left out. Call tracker.replayed() "
            "after each graph.replay()"
        )
    if lost:
        said.append(
            f"nothing is recorded of step {', '.join(map(str, lost))}: replayed() was called where no replay had "
            "written a row, or the row was written over by replays that were not announced in time"
        )
    return said
