"""What ranks agree on before their rows are merged: which parameters there are, and who holds what of each."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..collectives import Ranks, by_value
from ..columns import selection
from ..core import LocalParameter
from ..errors import RankMismatchError
from ..history import ParameterInfo
from .copy_check import Copies, copies_of


@dataclass(frozen=True)
class Agreement:
    """What there is to merge, as this rank sees it. T parameters of all ranks, of which this one holds L."""

    infos: list[ParameterInfo]  # of all T
    places: Any  # of this rank's L among the T, [L] or a slice
    replicated: NDArray[np.bool_]  # [T]: plain, every rank that has the name has the whole gradient
    pieces: NDArray[np.bool_]  # [L]: this rank's piece is the first of its copies within its set of ranks
    counted: NDArray[np.bool_]  # [L]: and within all sets, so that it is added
    copies: Copies  # what is compared
    members: list[int]  # the ranks that add anything, and the first of all


@dataclass(frozen=True)
class _Set:
    """Ranks that share a parameter. Those of one parameter don't overlap, so that the first stands for the set."""

    first: int
    size: int
    is_member: bool  # the rank that claims it is one of them


@dataclass(frozen=True)
class ParameterClaim:
    """What a rank says of a parameter that it holds."""

    info: ParameterInfo
    replicated: bool
    holders: int  # which of the rank's sets shares it; -1: none

    def __str__(self) -> str:
        """Return what must be the same on all ranks."""
        return f"{self.info.dtype} {list(self.info.shape)}{'' if self.replicated else ', spread over ranks,'}"


_Described = list[tuple[list[ParameterClaim], list[int]]]


def agree(ranks: Ranks, parameters: list[LocalParameter], infos: list[ParameterInfo], *, watched: bool) -> Agreement:
    """Return what all ranks hold together. Some meetings; waits.

    A description that many ranks share, as those of one pipeline stage do, travels once, and one that all share not at
    all. What a rank keeps grows with the parameters, and not with the ranks.

    Args:
        ranks: those among which the parameters are spread.
        parameters: the parameters as this rank holds them.
        infos: what each is.
        watched: copies are compared elsewhere, so they are not here.

    Raises:
        RankMismatchError: a name stands for different parameters, or a rank lacks one that it shares with others.
    """
    sets = list(dict.fromkeys(each.shard.shard_ranks for each in parameters if each.shard.shard_ranks))
    claims = [
        ParameterClaim(
            info, each.shard.replicated, sets.index(each.shard.shard_ranks) if each.shard.shard_ranks else -1
        )
        for info, each in zip(infos, parameters, strict=True)
    ]
    described: _Described = ranks.exchange(claims)
    which = {rank: index for index, (_, givers) in enumerate(described) for rank in givers}[ranks.rank]
    own_sets = tuple(_Set(min(each), len(each), ranks.rank in each) for each in sets)
    sharing = {key: len(givers) for key, givers in ranks.tally((which, own_sets)).items()}
    known = _known_parameters(described)
    firsts = _firsts_of_sets([claims for claims, _ in described], sharing)
    plain = Counter[str]()
    for all_claims, givers in described:
        plain.update({claim.info.name: len(givers) for claim in all_claims if claim.replicated})
    place = {info.name: index for index, info in enumerate(known)}
    own_first = {each.name: min(each.shard.shard_ranks) for each in parameters if not each.shard.replicated}
    pieces = np.array([each.shard.is_counted for each in parameters], bool)
    # A parameter that several sets of ranks share is a copy in all but the first.
    counted = pieces & [each.shard.replicated or own_first[each.name] == firsts[each.name][0] for each in parameters]
    spread = {name: (all_firsts, own_first.get(name, -1)) for name, all_firsts in firsts.items()}
    copies = copies_of(place, [each.name for each in parameters], *(({}, {}) if watched else (plain, spread)))
    adding = ranks.tally(bool(counted.any()) or len(copies) > 0).get(True, [])
    return Agreement(
        infos=known,
        places=selection(np.array([place[info.name] for info in infos], np.intp)),
        replicated=np.array([info.name in plain for info in known], bool),
        pieces=pieces,
        counted=counted,
        copies=copies,
        members=sorted({ranks.members[0], *adding}),
    )


def _known_parameters(described: _Described) -> list[ParameterInfo]:
    """Return every parameter that some rank has, once.

    Raises:
        RankMismatchError: a name stands for different parameters.
    """
    known: dict[str, tuple[list[int], ParameterClaim]] = {}
    for claims, givers in described:
        for claim in claims:
            others, other = known.setdefault(claim.info.name, (givers, claim))
            if str(claim) != str(other):
                differ = by_value({other: others, claim: givers})
                raise RankMismatchError(
                    f"parameter {claim.info.name!r} is {differ}; the ranks must train one model. Different parameters "
                    "need different names"
                )
    return [claim.info for _, claim in known.values()]


def _firsts_of_sets(
    described: list[list[ParameterClaim]], sharing: dict[tuple[int, tuple[_Set, ...]], int]
) -> dict[str, list[int]]:
    """Return the first ranks of the sets that share each parameter, in order.

    Args:
        described: the claims that there are.
        sharing: by the index of its claims and its sets, the number of ranks.

    Raises:
        RankMismatchError: a rank does not have a parameter that it shares.
    """
    claimed: dict[str, Counter[tuple[int, int]]] = {}
    for (which, sets), count in sharing.items():
        for claim in described[which]:
            if claim.holders >= 0:
                shared = sets[claim.holders]
                counts = claimed.setdefault(claim.info.name, Counter())
                counts[shared.first, shared.size] += count if shared.is_member else 0
    for name, counts in claimed.items():
        for (first, size), count in counts.items():
            if count != size:
                raise RankMismatchError(
                    f"parameter {name!r} is spread over {size} ranks, rank {first} the first of them, and {count} of "
                    "these track it; every rank must make its tracker of the same parameters"
                )
    return {name: sorted(first for first, _ in counts) for name, counts in claimed.items()}
