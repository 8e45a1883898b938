"""The ranks that work together: a gloo group of our own on the host, waits that end, errors that name the missing."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import itertools
import math
import pickle
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from ..errors import LayoutError, RankMismatchError

_PAUSE = 0.0005  # seconds between two looks at a collective that is waited for
_PATIENCE = 5.0  # seconds in which a rank that is still there also notices that a collective has failed
_LOOK = 0.2  # seconds between two looks at whether a rank has left
RESCUE = 1.0  # seconds in which what ranks have sent arrives, although they will not go on

_CALLS = ("makes the tracker", "is in epoch, flush or close", "compares copies")
"""What ranks meet for. A meeting begins with a header of one size, so that ranks at different calls can say so."""

_abandoned: list[tuple[Any, list[Any]]] = []


def abandon(memory: Any, works: Iterable[Any]) -> None:
    """Keep what collectives read and write that nobody waits for any more, until torch's threads are done with it."""
    _abandoned[:] = [each for each in _abandoned if not all(work.is_completed() for work in each[1])]
    _abandoned.append((memory, list(works)))


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


_Key: TypeAlias = "tuple[tuple[int, ...], datetime.timedelta, str, int]"  # ranks, timeout, purpose, place

_names: dict[_Key, str] = {}
"""The gloo group of some ranks with a timeout and a purpose, by name: kept for the next tracker for as long as nothing
went wrong in it. It ends with ``torch.distributed``. Trackers at the same time have groups of their own: each has the
first place that is free."""
_taken: set[_Key] = set()
_attempts: Counter[_Key] = Counter()


def _group_of(key: _Key) -> Any:
    with contextlib.suppress(KeyError, RuntimeError):
        return group_named(_names[key])
    members, timeout, purpose, _ = key
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


def _absent(store: Any, place: str, members: Iterable[int], patience: float, left: Iterable[int] = ()) -> str:
    """Say which ranks have not left a sign of theirs in a store. Of those that have ``left`` none is waited for."""
    try:
        store.set(f"{place}/{dist.get_rank()}", "")
        missing = [rank for rank in members if rank != dist.get_rank()]
        end = time.monotonic() + patience
        while True:
            missing = [rank for rank in missing if not store.check([f"{place}/{rank}"])]
            if set(missing) <= set(left) or time.monotonic() > end:
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
        self._rows = self._free_key(tuple(self.members), "rows" if meets else "copies")
        self._meetings: _Key = (*self._rows[:2], "meetings", self._rows[3]) if meets else self._rows
        self._calls = 0
        _taken.add(self._rows)
        try:
            self._make_groups(meets)
        except BaseException:
            self.leave()
            raise

    def _free_key(self, ranks: tuple[int, ...], purpose: str) -> _Key:
        return next(key for place in itertools.count() if (key := (ranks, self._limit, purpose, place)) not in _taken)

    def _make_groups(self, meets: bool) -> None:
        self._meeting: Any = None
        self._meeting = _group_of(self._meetings)
        if meets:
            self._agree_on_rows()
        self.group: Any = _group_of(self._rows)

    def _agree_on_rows(self) -> None:
        """Forget the group for rows unless all ranks kept it: collectives may be under way where one has left it."""
        mine, kept = _names.get(self._rows), [""]
        with contextlib.suppress(RankMismatchError):
            kept = self.gather(mine)
        if self._meetings not in _names:  # this rank had not noticed that the last tracker's ranks lost each other
            self._meeting, self._calls = _group_of(self._meetings), 0
            kept = self.gather(mine)
        if None in kept or len(set(kept)) > 1:
            _names.pop(self._rows, None)

    def keep_agreed(self, groups: Iterable[tuple[int, ...]]) -> None:
        """Forget the groups of copies that not all of their members have kept. A collective of all ranks; waits."""
        keys = [self._free_key(group, "copies") for group in groups]
        told = dict(zip(self.members, self.gather({key[0]: _names.get(key) for key in keys}), strict=True))
        for key in keys:
            if len({told[rank].get(key[0]) for rank in key[0]}) > 1:
                _names.pop(key, None)

    @property
    def is_first(self) -> bool:
        """Whether this process is the first of them, which alone writes and judges."""
        return dist.get_rank() == self.members[0]

    def gather(self, value: Any, failure: str = "not all ranks came to make the tracker", call: int = 0) -> list[Any]:
        """Return what every rank gave, in the order of ``members``. A collective; waits.

        The message of an error begins with ``failure``. ``call``: the place in ``_CALLS`` of what they do.

        Raises:
            RankMismatchError: a rank does not come within the timeout, or does something else.
        """
        pickled = pickle.dumps(value)
        sizes = self._meet(call, len(pickled), failure)
        mine = torch.zeros(max(sizes), dtype=torch.uint8, device="cpu")
        mine[: len(pickled)] = torch.frombuffer(bytearray(pickled), dtype=torch.uint8)
        values = self._gather_tensors(mine, failure)
        return [pickle.loads(each[:size].numpy().tobytes()) for each, size in zip(values, sizes, strict=True)]

    def gather_count(self, count: int, meanwhile: Callable[[], None], failure: str) -> list[int]:
        """Return every rank's count, in the order of ``members``. A collective; calls ``meanwhile`` as it waits.

        The message of an error begins with ``failure``.

        Raises:
            RankMismatchError: a rank does not come within the timeout, or does something else.
        """
        return self._meet(1, count, failure, meanwhile)

    def _meet(self, call: int, value: int, failure: str, meanwhile: Callable[[], None] = lambda: None) -> list[int]:
        """Return every rank's value. Ranks that meet for different things are told so."""
        self._calls += 1
        mine = torch.tensor([call, self._calls, value], device="cpu")
        headers = [each.tolist() for each in self._gather_tensors(mine, failure, meanwhile)]
        calls = {(header[0], header[1]) for header in headers}
        if len(calls) > 1:
            self.discard()
            does = {
                rank: f"{_CALLS[call]} (meeting {number})"
                for rank, (call, number, _) in zip(self.members, headers, strict=True)
            }
            raise RankMismatchError(
                f"the ranks do different things, by rank: {does}; every rank must make its trackers and call epoch, "
                "flush and close alike"
            )
        return [int(header[2]) for header in headers]

    def _gather_tensors(
        self, mine: torch.Tensor, failure: str, meanwhile: Callable[[], None] = lambda: None
    ) -> list[torch.Tensor]:
        """Return the tensors of all ranks, of one size. Gives up where a rank has said that it left."""
        received = [torch.empty_like(mine) for _ in self.members]
        try:
            work = dist.all_gather(received, mine, group=self._meeting, async_op=True)
        except RuntimeError as error:
            raise self._missing(failure, error) from error
        try:
            self.wait([work], failure, meanwhile)
        except BaseException:
            abandon((mine, received), [work])
            self.discard()
            raise
        return received

    def _store(self) -> Any:
        return dist.distributed_c10d._get_process_group_store(self._meeting)

    def _left(self) -> list[int]:
        """Return a rank that has said that it left; none where none has."""
        try:
            store = self._store()
            return [int(store.get("pytracker/left"))] if store.check(["pytracker/left"]) else []
        except Exception:  # the store went with the process that held it
            return []

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

    def wait(self, works: list[Any], failure: str, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait for collectives that are under way, as long as the timeout at most, or until a rank says that it left.

        Raises:
            RankMismatchError: one failed or did not end; the message begins with ``failure``.
        """
        now = time.monotonic()
        end, look, given_up, left = now + self._limit.total_seconds(), now + _LOOK, math.inf, [-1]
        while now < end and not all(work.is_completed() for work in works):
            meanwhile()
            now = time.monotonic()
            if now >= look and given_up == math.inf:
                look, left = now + _LOOK, self._left()
                given_up = now + RESCUE if left else math.inf
            if now >= given_up:
                raise self._missing(failure, RuntimeError(f"rank {left[0]} has left the tracker"))
            time.sleep(_PAUSE)
        try:
            for work in works:  # torch's own error, where one isn't done
                work.wait(datetime.timedelta(seconds=max(0.001, end - time.monotonic())))
        except RuntimeError as error:
            raise self._missing(failure, error) from error

    def _missing(self, failure: str, error: Exception) -> RankMismatchError:
        """Say who is missing: those who do not notice the failure too, as the store of the group tells."""
        self.discard()
        patience = min(_PATIENCE, self._limit.total_seconds())
        who = _absent(self._store(), "pytracker/here", self.members, patience, self._left())
        return RankMismatchError(
            f"{failure} (waited {self._limit.total_seconds():.0f} s at most); of {len(self.members)} ranks: {who}. "
            "Each must call step, epoch, flush and close alike. What was merged before is recorded. "
            f"torch says: {error}"
        )

    def discard(self) -> None:
        """Keep the groups from the next tracker: ranks may be at different collectives in them."""
        _names.pop(self._rows, None)
        _names.pop(self._meetings, None)

    def leave(self) -> None:
        """Go away while the others may not know it yet; say so to those that wait. Waits for nobody."""
        self.discard()
        _taken.discard(self._rows)
        if self._meeting is None:
            return

        def say() -> None:
            with contextlib.suppress(Exception):  # the store went with the process that held it
                self._store().set("pytracker/left", str(dist.get_rank()))

        saying = threading.Thread(target=say, daemon=True)
        saying.start()
        saying.join(_LOOK)

    def close(self) -> None:
        """Let go of the groups: the next tracker can have them, and their threads end with ``torch.distributed``."""
        _taken.discard(self._rows)
        self.group = self._meeting = None
