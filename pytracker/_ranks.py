"""The ranks that work together: a gloo group of our own on the host, waits that end, errors that name the missing."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import time
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from .errors import LayoutError, RankMismatchError

_PATIENCE = 5.0  # seconds in which a rank that is still there also notices that a collective has failed


def is_first_rank() -> bool:
    """Tell whether this process is rank 0, or the only one."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0


def has_others() -> bool:
    """Tell whether there are other ranks than this."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def group_named(name: str) -> Any:
    """Return a process group by its name: who keeps the group itself alive keeps its threads to the interpreter's end.

    Raises:
        RuntimeError: there is none of that name (any more).
    """
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]  # torch's own way


_names: dict[tuple[tuple[int, ...], datetime.timedelta, str], str] = {}
"""The gloo group of some ranks with a timeout and a purpose, by name: made once, since torch would give the same name,
and its old addresses, to a second one. It ends with ``torch.distributed``."""


def _group_of(members: tuple[int, ...], timeout: datetime.timedelta, purpose: str) -> Any:
    with contextlib.suppress(KeyError, RuntimeError):
        return group_named(_names[members, timeout, purpose])
    local = len(members) < dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    place = f"pytracker/{purpose}/{timeout}/{hashlib.sha256(repr(members).encode()).hexdigest()}"
    try:
        store.set(f"{place}/{dist.get_rank()}", "")
        group = dist.new_group(
            list(members),
            timeout=timeout,
            backend="gloo",
            use_local_synchronization=local,
            group_desc=f"pytracker: {purpose}",
        )
    except RuntimeError as error:
        raise RankMismatchError(
            f"not all ranks came to make the tracker (waited {timeout.total_seconds():.0f} s at most); of "
            f"{len(members)} ranks: {_absent(store, place, members, 0.0)}. Every rank must make one, with the same "
            "arguments; where this one trains alone, give "
            "process_group=torch.distributed.new_group([rank], use_local_synchronization=True). "
            f"torch says: {error}"
        ) from error
    _names[members, timeout, purpose] = group.group_name
    return group


def _absent(store: Any, place: str, members: Iterable[int], patience: float) -> str:
    """Say which ranks have not left a sign of theirs in a store."""
    try:
        store.set(f"{place}/{dist.get_rank()}", "")
        missing = [rank for rank in members if rank != dist.get_rank()]
        end = time.monotonic() + patience
        while missing:
            missing = [rank for rank in missing if not store.check([f"{place}/{rank}"])]
            if time.monotonic() > end:
                break
            time.sleep(0.05)
    except Exception as gone:  # the store went with the process that held it
        return f"their store does not answer either ({type(gone).__name__}), so the rank that held it is gone"
    return f"no answer from ranks {missing}" if missing else "every rank is there and noticed it too"


class Ranks:
    """Some ranks, and two gloo groups of them: one for rows, and one to meet and to agree.

    The groups lie on the host: their collectives neither mix with those of the training nor touch the device. There are
    two because ranks that disagree would else answer one collective with another, of another size, for which gloo ends
    the process. Making the first ones of some ranks is a collective of its own, and waits.

    Args:
        members: global ranks, this one among them; all ranks by default.
        timeout: seconds until a rank that does not come is missing.
        meets: whether the ranks may disagree; False saves the second group.

    Raises:
        LayoutError: torch.distributed is not initialized.
        RankMismatchError: a rank does not come within the timeout.
    """

    def __init__(self, members: list[int] | None = None, *, timeout: float, meets: bool = True) -> None:
        """Make the groups."""
        if not dist.is_available() or not dist.is_initialized():
            raise LayoutError("torch.distributed is not initialized; call init_process_group before making the tracker")
        self._limit = datetime.timedelta(seconds=timeout)
        self.members = list(range(dist.get_world_size())) if members is None else sorted(members)
        self.group: Any = _group_of(tuple(self.members), self._limit, "rows")
        self._meeting: Any = _group_of(tuple(self.members), self._limit, "meetings") if meets else self.group

    @property
    def is_first(self) -> bool:
        """Whether this process is the first of them, which alone writes and judges."""
        return dist.get_rank() == self.members[0]

    def gather(self, value: Any, failure: str = "not all ranks came to make the tracker") -> list[Any]:
        """Return what every rank gave, in the order of ``members``. A collective; waits.

        The message of an error begins with ``failure``.

        Raises:
            RankMismatchError: a rank does not come within the timeout.
        """
        values: list[Any] = [None] * len(self.members)
        try:
            dist.all_gather_object(values, value, group=self._meeting)
        except RuntimeError as error:
            raise self._missing(failure, error) from error
        return values

    def exchange(self, value: Any) -> list[tuple[Any, list[int]]]:
        """Return every different value, and the ranks that gave it. A collective; waits.

        What many ranks say alike travels once, and what all say alike not at all: a thousand ranks that each describe
        ten thousand parameters would else send gigabytes. Values are alike where their ``repr`` is.

        Raises:
            RankMismatchError: a rank does not come within the timeout.
        """
        digests = self.gather(hashlib.sha256(repr(value).encode()).hexdigest())
        givers: dict[str, list[int]] = {}
        for rank, digest in zip(self.members, digests, strict=True):
            givers.setdefault(digest, []).append(rank)
        if len(givers) == 1:
            return [(value, self.members)]
        return [(self._broadcast(value, ranks[0]), ranks) for ranks in givers.values()]

    def _broadcast(self, value: Any, source: int) -> Any:
        values = [value]
        try:
            dist.broadcast_object_list(values, source, group=self._meeting)
        except RuntimeError as error:
            raise self._missing("not all ranks came to make the tracker", error) from error
        return values[0]

    def check_steps(self, steps: int) -> None:
        """Make sure that every rank is here and has recorded as many steps. A collective; waits.

        Raises:
            RankMismatchError: a rank does not come within the timeout, or has recorded another number of steps.
        """
        counts = self.gather(steps, f"not all ranks came to epoch, flush or close after {steps} steps")
        if len(set(counts)) > 1:
            by_rank = dict(zip(self.members, counts, strict=True))
            raise RankMismatchError(
                f"the ranks have recorded different numbers of steps, by rank: {by_rank}; every rank must "
                "call step, epoch, flush and close alike"
            )

    def check_settings(self, **settings: Any) -> None:
        """Make sure that every rank was given the same. A collective; waits.

        Raises:
            RankMismatchError: a rank does not come within the timeout, or was given something else.
        """
        by_rank = dict(zip(self.members, self.gather(settings), strict=True))
        for name in settings:
            given = {rank: theirs[name] for rank, theirs in by_rank.items()}
            if len(set(given.values())) > 1:
                raise RankMismatchError(f"the ranks were given different `{name}`, by rank: {given}; give all the same")

    def wait(self, works: list[Any], failure: str) -> None:
        """Wait for collectives that are under way, at most as long as the timeout for each.

        Raises:
            RankMismatchError: one failed or did not end; the message begins with ``failure``.
        """
        try:
            for work in works:
                work.wait(self._limit)
        except RuntimeError as error:
            raise self._missing(failure, error) from error

    def _missing(self, failure: str, error: Exception) -> RankMismatchError:
        """Say who is missing: those who do not notice the failure too, as the store of the group tells."""
        store = dist.distributed_c10d._get_process_group_store(self._meeting)
        who = _absent(store, "pytracker/here", self.members, min(_PATIENCE, self._limit.total_seconds()))
        return RankMismatchError(
            f"{failure} (waited {self._limit.total_seconds():.0f} s at most); of {len(self.members)} ranks: {who}. "
            "Each must call step, epoch, flush and close alike. What was merged before is recorded. "
            f"torch says: {error}"
        )

    def close(self) -> None:
        """Let go of the groups, so that their threads can end with ``torch.distributed``."""
        self.group = self._meeting = None
