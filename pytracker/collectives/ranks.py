"""The ranks that work together: what they agree on, and how they wait for each other."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ..errors import LayoutError, RankMismatchError
from .groups import HostGroup, part_of
from .levels import Levels
from .missing_ranks import PATIENCE, RollCall, in_few_words
from .rendezvous import rendezvous

RESCUE = 1.0  # seconds in which what ranks have sent arrives, although they will not go on
_PAUSE, _LONGEST_PAUSE = 0.0005, 0.01  # seconds between two looks at a collective, as long as it is waited for
_LOOK = 0.2  # seconds between two looks at whether a rank has left

MAKING, MEETING = "makes the tracker", "is in epoch, flush or close"
NOT_MADE = "not all ranks came to make the tracker"


def is_first_rank() -> bool:
    """Tell whether this process is rank 0, or the only one."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0


def has_others() -> bool:
    """Tell whether there are other ranks than this."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def group_named(name: str) -> Any:
    """Return one of torch's process groups: keeping the group itself would keep its threads to the interpreter's end.

    Raises:
        RuntimeError: there is none of that name (any more).
    """
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]  # torch's own way


def nothing() -> None:
    """Do nothing while others are waited for."""


def all_done(works: Sequence[Any]) -> bool:
    """Tell whether collectives are over. Never waits.

    Raises:
        RuntimeError: one has failed.
    """
    if not all(work.is_completed() for work in works):
        return False
    for work in works:
        work.wait()  # it is over: this raises where it failed
    return True


@dataclass
class _Wait:
    """How long something is waited for."""

    ends_at: float
    looks_at: float  # when the store is asked next whether a rank has left
    gives_up_at: float = math.inf  # a little after one has


class Ranks:
    """Some ranks that meet, agree and wait for each other. Making it is a meeting of its own, and waits.

    Args:
        members: global ranks, this one among them; all ranks by default.
        timeout: seconds until a rank that does not come is missing.

    Raises:
        LayoutError: torch.distributed is not initialized.
        RankMismatchError: a rank does not come within the timeout.
    """

    def __init__(self, members: Sequence[int] | None = None, *, timeout: float) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise LayoutError("torch.distributed is not initialized; call init_process_group before making the tracker")
        self.members = list(range(dist.get_world_size())) if members is None else sorted(members)
        self.rank = dist.get_rank()
        self.timeout = timeout
        self._meetings_held = 0
        self._closables: list[Levels | HostGroup] = []
        self._store, self._meetings = rendezvous(self.members, timeout, self._begin)
        self._roll = RollCall(part_of(self._store, "roll"), self.members)

    def _begin(self, store: Any) -> tuple[Any, Levels]:
        self._store = store
        return store, self.levels("meetings", self.members)

    def levels(self, purpose: str, members: Sequence[int]) -> Levels:
        """Return levels of some of the ranks, for one purpose. Each of these makes them; none waits."""
        store = part_of(self._store, purpose)
        self._closables.append(levels := Levels(store, members, self.timeout))
        return levels

    def group(self, purpose: str, members: Sequence[int]) -> HostGroup:
        """Return one group of some of the ranks, for one purpose. Each of these makes it; none waits."""
        store = part_of(self._store, purpose)
        self._closables.append(group := HostGroup(store, members, self.timeout))
        return group

    @property
    def is_first(self) -> bool:
        """Whether this process is the first of them, which alone writes and judges."""
        return self.rank == self.members[0]

    def tally(
        self,
        value: Any,
        failure: str = NOT_MADE,
        *,
        doing: str = MAKING,
        meanwhile: Callable[[], None] = nothing,
    ) -> dict[Any, list[int]]:
        """Return every different value that a rank gave, and the ranks that gave it. A meeting; waits.

        Args:
            value: hashable, and small where ranks differ in it.
            failure: what an error's message begins with.
            doing: what the ranks meet for; those at different meetings are told so.
            meanwhile: called as others are waited for.

        Raises:
            RankMismatchError: a rank does not come within the timeout, or does something else.
        """
        self._meetings_held += 1
        mine = {(doing, self._meetings_held, value): [(self.rank, self.rank)]}
        said = self._exchange(mine, _merge_tallies, failure, meanwhile)
        tallied = {key: _expanded(spans) for key, spans in said.items()}
        if len({key[:2] for key in tallied}) > 1:
            does = {f"{doing} (meeting {number})": ranks for (doing, number, _), ranks in tallied.items()}
            raise RankMismatchError(
                f"the ranks do different things: {by_value(does)}; every rank must make its trackers and call epoch, "
                "flush and close alike"
            )
        return {key[2]: ranks for key, ranks in sorted(tallied.items(), key=lambda item: item[1][0])}

    def exchange(self, value: Any) -> list[tuple[Any, list[int]]]:
        """Return every different value of any size, and the ranks that gave it. A meeting; waits.

        What all ranks give alike does not travel, and what many do travels once through each group: a thousand ranks
        that each describe ten thousand parameters would otherwise send gigabytes. Values are alike where their
        ``repr`` is.

        Raises:
            RankMismatchError: a rank does not come within the timeout.
        """
        digest = hashlib.sha256(repr(value).encode()).hexdigest()
        givers = self.tally(digest)
        if len(givers) == 1:
            return [(value, self.members)]
        values = self._exchange({digest: value}, _merge_values, NOT_MADE, nothing)
        return [(values[digest], ranks) for digest, ranks in givers.items()]

    def _exchange(
        self, value: Any, merge: Callable[[list[Any]], Any], failure: str, meanwhile: Callable[[], None]
    ) -> Any:
        def wait(works: list[Any]) -> None:
            self.wait(lambda: all_done(works), failure, meanwhile)

        try:
            return self._meetings.exchange(value, merge, wait)
        except RuntimeError as error:  # gloo's own, of a rank that was gone before a collective began
            if isinstance(error, RankMismatchError):
                raise
            raise self.missing(failure, error) from error

    def check_settings(self, **settings: Any) -> None:
        """Make sure that every rank was given the same. A meeting; waits.

        Raises:
            RankMismatchError: a rank does not come within the timeout, or was given something else.
        """
        tallied = self.tally(tuple(settings.values()))
        for index, name in enumerate(settings):
            given: dict[Any, list[int]] = {}
            for values, ranks in tallied.items():
                given.setdefault(values[index], []).extend(ranks)
            if len(given) > 1:
                differ = by_value(given)
                raise RankMismatchError(f"the ranks were given different `{name}`: {differ}; give all the same")

    def wait(self, is_done: Callable[[], bool], failure: str, meanwhile: Callable[[], None] = nothing) -> None:
        """Wait until something is done: as long as the timeout at most, or until a rank says that it left.

        Raises:
            RankMismatchError: it failed or did not end; the message begins with ``failure``, and names the missing.
        """
        begin = time.monotonic()
        wait = _Wait(ends_at=begin + self.timeout, looks_at=begin + _LOOK)
        try:
            while not is_done():
                meanwhile()
                now = time.monotonic()
                if now >= wait.looks_at and wait.gives_up_at == math.inf:
                    wait.looks_at = now + _LOOK
                    if self._roll.left() is not None:
                        wait.gives_up_at = now + RESCUE
                if now >= min(wait.ends_at, wait.gives_up_at):
                    raise TimeoutError(f"waited {self.timeout:g} s" if now >= wait.ends_at else "a rank has left")
                time.sleep(min(max(_PAUSE, (now - begin) / 8), _LONGEST_PAUSE))
        except (RuntimeError, TimeoutError) as error:
            if isinstance(error, RankMismatchError):
                raise
            raise self.missing(failure, error) from error

    def missing(self, failure: str, error: Exception) -> RankMismatchError:
        """Return an error that says who is missing. Waits some seconds for those that notice later."""
        who = self._roll.who(min(PATIENCE, self.timeout))
        left = self._roll.left()
        cause = f"rank {left[0]} has left the tracker ({left[1]})" if left else f"torch says: {error}"
        return RankMismatchError(
            f"{failure} (waited {self.timeout:.0f} s at most); of {len(self.members)} ranks: {who}. Each must call "
            f"step, epoch, flush and close alike. What was merged before is recorded. {cause}"
        )

    def leave(self, reason: str, *, at_once: bool = False) -> None:
        """Go away while the others may not know it yet, and say why to those that wait. Waits for nobody."""
        self.close()  # which those that are connected notice; the reason is there before they have looked around
        self._roll.leave(reason, at_once=at_once)

    def close(self) -> None:
        """Let go of the groups. Waits for nobody."""
        for each in self._closables:
            each.close()
        self._closables.clear()


def by_value(tallied: dict[Any, list[int]]) -> str:
    """Return in words which ranks gave which value.

    Example:
        >>> by_value({3: [0, 2], 4: [1]})
        '3 on ranks [0, 2], 4 on ranks [1]'
    """
    return ", ".join(f"{value} on {in_few_words(ranks)}" for value, ranks in tallied.items())


def _merge_tallies(tallies: list[dict[Any, list[tuple[int, int]]]]) -> dict[Any, list[tuple[int, int]]]:
    """Return whose values are whose, with ranks as spans of neighbours: ten thousand that agree are one."""
    merged: dict[Any, list[tuple[int, int]]] = {}
    for tally in tallies:
        for value, spans in tally.items():
            merged.setdefault(value, []).extend(spans)
    for value, spans in merged.items():
        joined: list[tuple[int, int]] = []
        for first, last in sorted(spans):
            if joined and joined[-1][1] == first - 1:
                joined[-1] = (joined[-1][0], last)
            else:
                joined.append((first, last))
        merged[value] = joined
    return merged


def _expanded(spans: list[tuple[int, int]]) -> list[int]:
    return [rank for first, last in spans for rank in range(first, last + 1)]


def _merge_values(values: list[dict[str, Any]]) -> dict[str, Any]:
    return {digest: value for each in values for digest, value in each.items()}
