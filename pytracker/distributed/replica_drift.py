"""Compares ranks that should hold the same gradient or weight, and names one that has drifted.

At each drain the ranks that hold copies of a piece take the largest and the smallest ``sum_sq`` of every row in one
asynchronous all-reduce. What it says is looked at when the next drain begins, so nothing waits. Only where it shows a
drift do those ranks gather the values of a few parameters, to tell who left the others.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..collectives import MAX, HostGroup, Ranks, all_done, in_few_words
from ..columns import SUM_SQ
from ..core import LocalParameter
from ..diagnostics import Finding
from ..errors import RankMismatchError

RULE = "replica_drift"
_NAN = -1.0  # stands for a sum of squares that is NaN: all NaN are alike
_SHOWN = 8  # parameters whose values are gathered when there is a drift
_MESSAGE = 2048  # bytes in which a rank tells the others of a drift


@dataclass
class _Compared:
    """One interval, or one look at the weights, that is being compared."""

    what: str
    steps: NDArray[np.int64]
    mine: NDArray[np.float64]  # [rows, 1 + K]: the step, and sum_sq of each parameter
    extremes: Tensor  # [2, rows, 1 + K]: largest, and largest of the negatives
    works: list[Any]


class _Copies:
    """This rank and those that hold copies of the same pieces."""

    def __init__(
        self, ranks: Ranks, group: HostGroup, places: list[int], names: list[str], every: int, tolerance: float
    ) -> None:
        self._ranks = ranks
        self._group = group
        self._places = places
        self._names = names
        self._every = every
        self._tolerance = tolerance
        self.under_way: list[_Compared] = []
        self._told: set[str] = set()

    def start(self, what: str, steps: NDArray[np.int64], sum_sq: NDArray[np.float64]) -> None:
        """Begin to compare sum_sq, [n, T] with NaN where it is not a number and -inf where there is no gradient."""
        length = max(self._every, len(steps)) if what == "gradient" else 1
        mine = np.full((length, 1 + len(self._places)), -math.inf)
        mine[: len(steps), 0] = steps
        mine[: len(steps), 1:] = np.nan_to_num(sum_sq[:, self._places], nan=_NAN, posinf=np.inf, neginf=-np.inf)
        negative = np.where(mine == -math.inf, -math.inf, -mine)  # what is missing takes no part in either
        extremes = torch.from_numpy(np.stack([mine, negative]))
        self.under_way.append(_Compared(what, steps, mine, extremes, [self._group.all_reduce(extremes, MAX)]))

    def settle(self) -> dict[str, Any] | None:
        """End the comparisons under way; return the first drift that they show, and has not been told."""
        first = None
        for compared in self.under_way:
            failure = f"the {compared.what}s of replicas were not compared"
            self._ranks.wait(partial(all_done, compared.works), failure)
            first = first or self._judge(compared)
        self.under_way.clear()
        return first

    def _judge(self, compared: _Compared) -> dict[str, Any] | None:
        most, least = compared.extremes[0].numpy(), -compared.extremes[1].numpy()
        with np.errstate(invalid="ignore"):
            close = np.isfinite(most) & (most - least <= self._tolerance * most)
            apart = (most != least) & ~close & (most > -math.inf)
        if apart[:, 0].any():
            raise RankMismatchError(
                f"{in_few_words(self._group.members)}, which hold copies, have recorded different steps: "
                f"{least[apart[:, 0], 0]} and {most[apart[:, 0], 0]}; every rank must call step, epoch, flush and "
                "close alike"
            )
        if compared.what in self._told or not apart.any():
            return None
        self._told.add(compared.what)  # on every rank of these alike
        row = int(apart.any(axis=1).argmax())
        columns = np.flatnonzero(apart[row])
        received, work = self._group.all_gather(torch.from_numpy(compared.mine[row, columns[:_SHOWN]].copy()))
        self._ranks.wait(partial(all_done, [work]), "the values of replicas that differ were not told")
        values = np.stack([each.numpy() for each in received])  # [ranks, shown]
        alike = _alike(values[:, 0], self._tolerance)
        most_shared = int(alike.sum(axis=1).argmax())
        usual, sharing = float(values[most_shared, 0]), int(alike[most_shared].sum())
        away = [rank for rank, close in zip(self._group.members, alike[most_shared], strict=True) if not close]
        return {
            "what": compared.what,
            "step": int(compared.steps[row]),
            "parameters": [self._names[self._places[column - 1]] for column in columns[:_SHOWN]],
            "count": len(columns),
            "ranks": away,
            "majority": 2 * sharing > len(values),
            "usual": usual,
            "value": float(values[self._group.members.index(away[0]), 0]),
        }


def _alike(values: NDArray[np.float64], tolerance: float) -> NDArray[np.bool_]:
    """Return which of [n] values are close to which, [n, n]; the infinite ones are so to themselves."""
    with np.errstate(invalid="ignore"):
        apart = np.abs(values[:, None] - values)
        close = apart <= tolerance * np.maximum(np.abs(values[:, None]), np.abs(values))
    alike: NDArray[np.bool_] = close & np.isfinite(apart) | (values[:, None] == values)
    return alike


class ReplicaWatch:
    """Compares the ranks that hold copies of the same pieces, and reports the first drift of each kind.

    Making one is a collective of its own, and waits.

    Args:
        ranks: all ranks of the training.
        parameters: the parameters as this rank holds them.
        every: rows of an interval.
        tolerance: the relative difference of ``sum_sq`` that is no drift. Copies that were reduced alike have the same
            bits; those that each rank computes for itself may differ in the last.
    """

    def __init__(self, ranks: Ranks, parameters: list[LocalParameter], *, every: int, tolerance: float = 1e-6) -> None:
        """Find out who holds copies of what."""
        self._all = ranks
        names = [each.name for each in parameters]
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (each, plain) in enumerate(zip(parameters, self._holders(parameters), strict=True)):
            alike[plain if each.shard.replicated else each.shard.replica_ranks].append(index)
        self._copies = [
            _Copies(ranks, ranks.group(f"copies/{_digest(members)}", members), places, names, every, tolerance)
            for members, places in sorted(alike.items())
            if len(members) > 1
        ]
        first_sees_all = all(ranks.members[0] in members for members in alike)
        everywhere = len(self._all.tally(first_sees_all)) == 1 and first_sees_all
        self._all_ranks: HostGroup | None = None if everywhere else ranks.group("drift", ranks.members)
        self._messages: tuple[list[Tensor], Any] | None = None

    def _holders(self, parameters: list[LocalParameter]) -> list[tuple[int, ...]]:
        """Return the ranks that have each plain parameter, by its name: one tuple for all that have the same."""
        described = self._all.exchange([each.name for each in parameters if each.shard.replicated])
        having: dict[str, list[int]] = defaultdict(list)
        for index, (names, _) in enumerate(described):
            for name in names:
                having[name].append(index)

        @functools.cache
        def ranks_of(indices: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(sorted(rank for index in indices for rank in described[index][1]))

        return [ranks_of(tuple(having[each.name])) for each in parameters]

    def start(self, what: str, steps: NDArray[np.int64], tensors: NDArray[np.float64]) -> list[Finding]:
        """Begin to compare moments [n, T, 6], and return what earlier ones have shown."""
        findings = self._settle()
        missing = np.isnan(tensors).all(axis=2)
        for copies in self._copies:
            copies.start(what, steps, np.where(missing, -math.inf, tensors[:, :, SUM_SQ]))
        return findings

    def flush(self) -> list[Finding]:
        """Return everything that the comparisons under way show. Waits for the other ranks."""
        return [*self._settle(), *self._settle()]

    def abandon(self) -> None:
        """Give up what has not been compared, without waiting."""
        for copies in self._copies:
            copies.under_way.clear()
        self._messages = None

    def _settle(self) -> list[Finding]:
        drifts = [drift for drift in (copies.settle() for copies in self._copies) if drift is not None]
        if self._all_ranks is None:  # the first rank takes part in every comparison
            return [_finding(drift) for drift in drifts]
        findings = self._receive()
        message = _encoded(drifts[0]) if drifts else b""
        mine = torch.zeros(_MESSAGE, dtype=torch.uint8, device="cpu")
        mine[: len(message)] = torch.tensor(list(message), dtype=torch.uint8, device="cpu")
        self._messages = self._all_ranks.all_gather(mine)
        return findings

    def _receive(self) -> list[Finding]:
        """Return what the ranks told each other last time."""
        if self._messages is None:
            return []
        received, work = self._messages
        self._all.wait(partial(all_done, [work]), "what replicas show was not told")
        texts = {bytes(message.tolist()).rstrip(b"\0") for message in received} - {b""}
        return [_finding(json.loads(text)) for text in sorted(texts)]


def _digest(members: tuple[int, ...]) -> str:
    return hashlib.sha256(repr(members).encode()).hexdigest()[:16]


def _encoded(drift: dict[str, Any]) -> bytes:
    """Return a drift in few enough bytes: with fewer names where they are long, and the first 100 ranks."""
    names = [name[:100] for name in drift["parameters"]]
    drift = {**drift, "ranks": drift["ranks"][:100]}
    while len(message := json.dumps({**drift, "parameters": names}).encode()) > _MESSAGE and len(names) > 1:
        names.pop()
    return message


def _finding(drift: dict[str, Any]) -> Finding:
    ranks, name, what = drift["ranks"], drift["parameters"][0], drift["what"]
    who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    more = f", and {drift['count'] - 1} more parameters" if drift["count"] > 1 else ""
    doubt = "" if drift["majority"] else " (or the others: no value has a majority)"
    subject = f"the gradient of {name}" if what == "gradient" else f"the parameter {name}"
    return Finding(
        rule=RULE,
        severity="critical",
        first_step=drift["step"],
        last_step=drift["step"],
        evidence=(
            f"{subject} has norm {_norm(drift['value'])} on {who} and {_norm(drift['usual'])} on the other ranks that "
            f"hold a copy{more}"
        ),
        parameters=tuple(drift["parameters"]),
        cause=f"{who}{doubt} does not take part in the reduction, started from other weights, or computes wrongly",
        action=(
            "check that every backward goes through the wrapper and not its inner module, that no_sync() ends before "
            "the step, that all ranks load the same weights; if they do, test the hardware of that rank"
        ),
        numbers={"rank": float(ranks[0]), "norm": _norm(drift["value"]), "usual_norm": _norm(drift["usual"])},
    )


def _norm(sum_sq: float) -> float:
    if sum_sq == _NAN:
        return math.nan
    return float(f"{math.sqrt(sum_sq):.6g}") if sum_sq >= 0 else 0.0
