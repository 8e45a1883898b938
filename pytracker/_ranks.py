"""The ranks that work together: a gloo group of our own on the host, waits that end, errors that name the missing."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import time
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


_names: dict[tuple[tuple[int, ...], datetime.timedelta], str] = {}
"""The gloo group of some ranks with a timeout, by name: made once, since torch would give the same name, and its old
addresses, to a second one. It ends with ``torch.distributed``."""


def _group_of(members: tuple[int, ...], timeout: datetime.timedelta) -> Any:
    with contextlib.suppress(KeyError, RuntimeError):
        return group_named(_names[members, timeout])
    local = len(members) < dist.get_world_size()
    group = dist.new_group(list(members), timeout=timeout, backend="gloo", use_local_synchronization=local)
    _names[members, timeout] = group.group_name
    return group


class Ranks:
    """Some ranks, and a gloo group of them.

    The group lies on the host: its collectives neither mix with those of the training nor touch the device. Making the
    first one of some ranks is a collective of its own, and waits.

    Args:
        members: global ranks, this one among them; all ranks by default.
        timeout: seconds until a rank that does not come is missing.

    Raises:
        LayoutError: torch.distributed is not initialized.
    """

    def __init__(self, members: list[int] | None = None, *, timeout: float) -> None:
        """Make the group."""
        if not dist.is_available() or not dist.is_initialized():
            raise LayoutError("torch.distributed is not initialized; call init_process_group before making the tracker")
        self._limit = datetime.timedelta(seconds=timeout)
        self.members = list(range(dist.get_world_size())) if members is None else sorted(members)
        self.group: Any = _group_of(tuple(self.members), self._limit)

    @property
    def is_first(self) -> bool:
        """Whether this process is the first of them, which alone writes and judges."""
        return dist.get_rank() == self.members[0]

    def gather(self, value: Any) -> list[Any]:
        """Return what every rank gave, in the order of ``members``. A collective; waits.

        Raises:
            RankMismatchError: a rank does not come within the timeout.
        """
        values: list[Any] = [None] * len(self.members)
        try:
            dist.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            raise self._missing("not all ranks came to make the tracker, flush or close", error) from error
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
            dist.broadcast_object_list(values, source, group=self.group)
        except RuntimeError as error:
            raise self._missing("not all ranks came to make the tracker", error) from error
        return values[0]

    def check_steps(self, steps: int) -> None:
        """Make sure that every rank is here and has recorded as many steps. A collective; waits.

        Raises:
            RankMismatchError: a rank does not come within the timeout, or has recorded another number of steps.
        """
        counts = self.gather(steps)
        if len(set(counts)) > 1:
            by_rank = dict(zip(self.members, counts, strict=True))
            raise RankMismatchError(f"the ranks have recorded different numbers of steps, by rank: {by_rank}")

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
        try:
            store = dist.distributed_c10d._get_process_group_store(self.group)
            store.set(f"pytracker/here/{dist.get_rank()}", "")
            missing = [rank for rank in self.members if rank != dist.get_rank()]
            end = time.monotonic() + min(_PATIENCE, self._limit.total_seconds())
            while missing and time.monotonic() < end:
                time.sleep(0.05)
                missing = [rank for rank in missing if not store.check([f"pytracker/here/{rank}"])]
            who = f"no answer from ranks {missing}" if missing else "every rank is there and noticed it too"
        except Exception as gone:  # the store went with the process that held it
            who = f"their store does not answer either ({type(gone).__name__}), so the rank that held it is gone"
        return RankMismatchError(
            f"{failure} (waited {self._limit.total_seconds():.0f} s at most); of {len(self.members)} ranks: {who}. "
            "Each must call step, epoch, flush and close alike. What was merged before is recorded. "
            f"torch says: {error}"
        )

    def close(self) -> None:
        """Let go of the group, so that its threads can end with ``torch.distributed``."""
        self.group = None
