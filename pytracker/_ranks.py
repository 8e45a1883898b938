"""The ranks that work together: a gloo group of our own on the host, waits that end, errors that name the missing."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from .errors import LayoutError, RankMismatchError

_PAUSE = 0.0005  # seconds between two looks at a collective that is waited for
_PATIENCE = 5.0  # seconds in which a rank that is still there also notices that a collective has failed

_abandoned: list[Any] = []


def abandon(memory: Any) -> None:
    """Keep what collectives read and write that nobody waits for any more: torch's threads may yet use it."""
    _abandoned.append(memory)


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


_Key: TypeAlias = "tuple[tuple[int, ...], datetime.timedelta, str]"

_names: dict[_Key, str] = {}
"""The gloo group of some ranks with a timeout and a purpose, by name: kept for the next tracker for as long as nothing
went wrong in it. It ends with ``torch.distributed``."""
_attempts: Counter[_Key] = Counter()


def _group_of(key: _Key) -> Any:
    with contextlib.suppress(KeyError, RuntimeError):
        return group_named(_names[key])
    members, timeout, purpose = key
    local = len(members) < dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    _attempts[key] += 1
    digest = hashlib.sha256(repr((key, _attempts[key])).encode()).hexdigest()
    place = f"pytracker/{digest}"
    try:
        store.set(f"{place}/{dist.get_rank()}", "")
        if local:
            _count_alike(store, place, members, timeout)
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
    _names[key] = group.group_name
    return group


def _count_alike(store: Any, place: str, members: tuple[int, ...], timeout: datetime.timedelta) -> None:
    """Give every member as many groups as the others have.

    torch names a group of some ranks after them and the number of groups that the process has: where that differs, as
    between stages of a pipeline, members would wait for each other under different names.
    """
    rank, groups = dist.get_rank(), dist.distributed_c10d._world.pg_names
    keys = [f"{place}/groups/{member}" for member in members]
    store.set(f"{place}/groups/{rank}", str(len(groups)))
    store.wait(keys, timeout)
    counts = store.multi_get(keys) if store.has_extended_api() else [store.get(key) for key in keys]
    for _ in range(max(map(int, counts)) - len(groups)):
        dist.new_group([rank], backend="gloo", use_local_synchronization=True)


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
        ranks = tuple(self.members)
        self._rows: _Key = (ranks, self._limit, "rows" if meets else "copies")
        self._meetings: _Key = (ranks, self._limit, "meetings") if meets else self._rows
        self._meeting: Any = _group_of(self._meetings)
        if meets:
            self._agree_on_rows()
        self.group: Any = _group_of(self._rows)

    def _agree_on_rows(self) -> None:
        """Forget the group for rows unless all ranks kept it: collectives may be under way where one has left it."""
        mine, kept = _names.get(self._rows), [""]
        with contextlib.suppress(RankMismatchError):
            kept = self.gather(mine)
        if self._meetings not in _names:  # this rank had not noticed that the last tracker's ranks lost each other
            self._meeting = _group_of(self._meetings)
            kept = self.gather(mine)
        if None in kept or len(set(kept)) > 1:
            _names.pop(self._rows, None)

    def keep_agreed(self, groups: Iterable[tuple[int, ...]]) -> None:
        """Forget the groups of copies that not all of their members have kept. A collective of all ranks; waits."""
        keys: list[_Key] = [(group, self._limit, "copies") for group in groups]
        told = dict(zip(self.members, self.gather({key[0]: _names.get(key) for key in keys}), strict=True))
        for key in keys:
            if len({told[rank].get(key[0]) for rank in key[0]}) > 1:
                _names.pop(key, None)

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

    def gather_count(self, count: int, meanwhile: Callable[[], None], failure: str) -> list[int]:
        """Return every rank's count, in the order of ``members``. A collective; calls ``meanwhile`` as it waits.

        The message of an error begins with ``failure``.

        Raises:
            RankMismatchError: a rank does not come within the timeout.
        """
        mine = torch.tensor([count])
        counts = [torch.empty_like(mine) for _ in self.members]
        try:
            work = dist.all_gather(counts, mine, group=self._meeting, async_op=True)
        except RuntimeError as error:
            raise self._missing(failure, error) from error
        try:
            while not work.is_completed():
                meanwhile()
                time.sleep(_PAUSE)
        except BaseException:
            abandon((mine, counts, work))
            raise
        self.wait([work], failure)
        return [int(each) for each in counts]

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
        self.discard(meetings=True)
        store = dist.distributed_c10d._get_process_group_store(self._meeting)
        who = _absent(store, "pytracker/here", self.members, min(_PATIENCE, self._limit.total_seconds()))
        return RankMismatchError(
            f"{failure} (waited {self._limit.total_seconds():.0f} s at most); of {len(self.members)} ranks: {who}. "
            "Each must call step, epoch, flush and close alike. What was merged before is recorded. "
            f"torch says: {error}"
        )

    def discard(self, *, meetings: bool = False) -> None:
        """Keep the group for rows, or both, from the next tracker: ranks may be at different collectives in it."""
        _names.pop(self._rows, None)
        if meetings:
            _names.pop(self._meetings, None)

    def close(self) -> None:
        """Let go of the groups, so that their threads can end with ``torch.distributed``."""
        self.group = self._meeting = None
