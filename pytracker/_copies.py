"""Whether what goes by one name on several ranks are copies, as merging takes them to be: told from their moments.

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

from .columns import SUM, SUM_SQ

_COMPARED = [SUM, SUM_SQ]
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

    def told(self, tensors: NDArray[np.float64], present: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return what this rank adds to the comparison, [n, C, 2], of its moments [n, T, 6]."""
        told = np.zeros((len(tensors), len(self), len(_COMPARED)))
        values = np.where(present[:, self.local, None], tensors[:, self.local][:, :, _COMPARED], 0.0)
        plain = self.sets[self.positions] == 0
        with np.errstate(over="ignore"):
            told[:, self.positions] = np.where(plain[:, None], values**2, self.weights[:, None] * values)
        return told

    def first_apart(
        self, told: NDArray[np.float64], merged: NDArray[np.float64], present: NDArray[np.float64]
    ) -> tuple[int, int] | None:
        """Return the row and the parameter, as merged, of the first that are no copies; None where all are.

        Args:
            told: what all ranks added, [n, C, 2].
            merged: the moments as if they were copies, [n, T, 6].
            present: how many pieces had a gradient, [n, T].
        """
        means, count = merged[:, self.places][:, :, _COMPARED], present[:, self.places, None]
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            spread = np.sqrt(np.maximum(told / count - means**2, 0.0))
            between = np.abs(told) / np.sqrt(np.maximum(self.sets, 1.0))[:, None]
            scale = means.copy()
            scale[:, :, 0] = np.abs(means[:, :, 0]) + np.sqrt(means[:, :, 1])
            apart = (np.where((self.sets == 0)[:, None], spread, between) > _CLOSE * scale).any(axis=2)
        if not apart.any():
            return None
        row, position = (int(index) for index in np.argwhere(apart)[0])
        return row, int(self.places[position])


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
