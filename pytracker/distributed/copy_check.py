"""Checks by their moments that parameters of one name on several ranks are copies, as merging assumes.

Nothing in a plain tensor says whether that of the same name on another rank is a copy of it, another piece of the same
parameter, or another parameter. Nor do DTensors say it of several meshes that have a parameter of one name each. Copies
have the same sum and the same sum of squares; what is no copy has others. Two numbers a row for each such parameter
travel with the sums, in the same collective.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..columns import SUM, SUM_SQ, selection

_CLOSE = 0.05  # far above what rounding makes of copies (16 bits, atomics), far below what other gradients differ by


@dataclass(frozen=True)
class Copies:
    """The parameters that several ranks, or several sets of ranks, hold under one name.

    Of ranks that each have all of a parameter, squares are added up: less the square of the mean that is their spread.
    Of sets that each share one, no rank knows the whole; the sets add with weights whose sum is zero.
    """

    places: NDArray[np.intp]  # [C], of the parameters that are compared, in the merged rows
    sets: NDArray[np.float64]  # [C], how many sets of ranks share one; 0: plain, every rank has all of it
    local: NDArray[np.intp]  # [L], of those that this rank holds, in its own rows
    positions: NDArray[np.intp]  # [L], of the same among the C
    weights: NDArray[np.float64]  # [L], of this rank's set

    def __len__(self) -> int:
        """Return how many parameters are compared."""
        return len(self.places)

    def tell(self, told: NDArray[np.float64], tensors: NDArray[np.float64], present: NDArray[np.bool_]) -> None:
        """Write what this rank adds to the comparison, [n, C, 2] of zeros, of its moments [n, T, 6]."""
        local, positions = selection(self.local), selection(self.positions)
        values = tensors[:, local, SUM : SUM_SQ + 1]
        if not (there := present[:, local]).all():
            values = np.where(there[:, :, None], values, 0.0)
        plain = self.sets[self.positions] == 0
        with np.errstate(over="ignore"):
            told[:, positions] = values * (
                values if plain.all() else np.where(plain[:, None], values, self.weights[:, None])
            )

    def first_apart(
        self, told: NDArray[np.float64], merged: NDArray[np.float64], present: NDArray[np.float64]
    ) -> tuple[int, int] | None:
        """Return the row and the parameter, as merged, of the first that are no copies; None where all are.

        Args:
            told: what all ranks added, [n, C, 2].
            merged: the moments as if they were copies, [n, T, 6].
            present: how many pieces had a gradient, [n, T].
        """
        places = selection(self.places)
        count = present[:, places]
        sums, squares = merged[:, places, SUM], merged[:, places, SUM_SQ]
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            apart = self._differ(told[:, :, 0], sums, np.abs(sums) + np.sqrt(squares), count)
            apart |= self._differ(told[:, :, 1], squares, squares, count)
        if not apart.any():
            return None
        row, position = (int(index) for index in np.argwhere(apart)[0])
        return row, int(self.places[position])

    def _differ(
        self,
        told: NDArray[np.float64],
        mean: NDArray[np.float64],
        scale: NDArray[np.float64],
        count: NDArray[np.float64],
    ) -> NDArray[np.bool_]:
        """Return where one number, each [n, C], differs by more than its scale allows. Squares: a root is slow."""
        allowed = (_CLOSE * scale) ** 2
        differ: NDArray[np.bool_] = told / count - mean**2 > allowed
        if (several := self.sets > 0).any():
            differ = np.where(several, told**2 > allowed * self.sets, differ)
        return differ


def weight_of(index: int, sets: int) -> float:
    """Return the weight of one of several sets: none is zero, and their sum is."""
    return math.cos(2 * math.pi * index / sets + 0.5)


def copies_of(
    places: dict[str, int], names: list[str], plain: dict[str, int], sets: dict[str, tuple[list[int], int]]
) -> Copies:
    """Return what must be compared.

    Args:
        places: of every parameter in the merged rows.
        names: of the parameters of this rank.
        plain: for each plain parameter the number of ranks that have it.
        sets: for each spread parameter the first ranks of the sets that share one, in order, and of this rank's own.
    """
    several = {name: 0 for name, ranks in plain.items() if ranks > 1}
    several |= {name: len(firsts) for name, (firsts, _) in sets.items() if len(firsts) > 1}
    order = sorted(several, key=places.__getitem__)
    position = {name: index for index, name in enumerate(order)}
    local = [index for index, name in enumerate(names) if name in position]
    weights = []
    for name in (names[index] for index in local):
        firsts, own = sets.get(name, ([], -1))
        weights.append(weight_of(firsts.index(own), len(firsts)) if several[name] else 1.0)
    return Copies(
        places=np.array([places[name] for name in order], np.intp),
        sets=np.array([several[name] for name in order], np.float64),
        local=np.array(local, np.intp),
        positions=np.array([position[names[index]] for index in local], np.intp),
        weights=np.array(weights, np.float64),
    )
