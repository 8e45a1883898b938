"""Groups of ranks on the host that ``torch.distributed`` does not know about.

A group is gloo's, made on a part of the store that the ranks share. Its collectives neither mix with those of the
training nor touch the device; no counter, name or limit of torch's own groups changes; and it outlives
``destroy_process_group``. Ranks connect when they first have something to say to each other, so making a group waits
for nobody. When it is let go its sockets close, which the others notice at once.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import datetime
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_c10d: Any = dist  # whose stubs lack most of what is used here

SUM, MAX = "SUM", "MAX"  # what a reduction does, by torch's names

_abandoned: list[HostGroup] = []


def part_of(store: Any, name: str) -> Any:
    """Return a part of a store, whose keys are its own."""
    return _c10d.PrefixStore(name, store)


def _make_devices() -> list[Any]:
    """Return what a group listens on: the interfaces of ``GLOO_SOCKET_IFNAME``, or that of the host's name.

    Groups whose ranks connect late must not share one: gloo would take the connection of one for that of another.
    """
    gloo = _c10d.ProcessGroupGloo
    names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    devices = [gloo.create_device(interface=name, lazy_init=True) for name in names]
    return devices or [gloo.create_default_device(lazy_init=True)]


class HostGroup:
    """Some ranks whose collectives run beside the training, each of them asynchronous.

    Args:
        store: for this group alone, on every rank the same.
        members: global ranks, in the same order on all of them.
        timeout: seconds after which a collective fails for want of a rank.
    """

    def __init__(self, store: Any, members: Sequence[int], timeout: float) -> None:
        self.members = tuple(members)
        self.place = self.members.index(dist.get_rank())
        options = _c10d.ProcessGroupGloo._Options()
        options._devices, options._threads = _make_devices(), 1  # one thread: collectives in their order
        options._timeout = datetime.timedelta(seconds=timeout)
        self._backend = _c10d.ProcessGroupGloo(store, self.place, len(self.members), options)
        self._under_way: list[tuple[Any, Any]] = []

    def reduce(self, tensor: Tensor, operation: str) -> Any:
        """Begin to reduce a tensor to the first rank, in place; elsewhere its values are lost."""
        options = _c10d.ReduceOptions()
        options.rootRank, options.reduceOp = 0, getattr(_c10d.ReduceOp, operation)
        return self._begin(self._backend.reduce([tensor], options), tensor)

    def gather(self, tensor: Tensor) -> tuple[list[Tensor], Any]:
        """Begin to gather every rank's tensor, all of one shape, in the first rank; return where they will be there."""
        options = _c10d.GatherOptions()
        options.rootRank = 0
        received = [torch.empty_like(tensor) for _ in self.members] if self.place == 0 else []
        work = self._backend.gather([received] if received else [], [tensor], options)
        return received, self._begin(work, (tensor, received))

    def all_reduce(self, tensor: Tensor, operation: str) -> Any:
        """Begin to reduce a tensor to all ranks, in place."""
        return self._begin(self._backend.allreduce(tensor, getattr(_c10d.ReduceOp, operation)), tensor)

    def all_gather(self, tensor: Tensor) -> tuple[list[Tensor], Any]:
        """Begin to gather every rank's tensor, all of one shape; return where they will be."""
        received = [torch.empty_like(tensor) for _ in self.members]
        work = self._backend.allgather([received], [tensor])
        return received, self._begin(work, (tensor, received))

    def broadcast(self, tensor: Tensor) -> Any:
        """Begin to bring the first rank's tensor to all."""
        options = _c10d.BroadcastOptions()
        options.rootRank = 0
        return self._begin(self._backend.broadcast([tensor], options), tensor)

    def _begin(self, work: Any, memory: Any) -> Any:
        self._under_way = [each for each in self._under_way if not _is_well_over(each[0])] + [(work, memory)]
        return work

    def close(self) -> None:
        """Close the sockets: at once, or when gloo's threads have ended what is under way. Waits for nobody."""
        if self not in _abandoned:
            _abandoned.append(self)
        for group in [each for each in _abandoned if each._end()]:
            _abandoned.remove(group)

    def _end(self) -> bool:
        """Close the sockets if gloo does: not while a collective uses its tensors, nor where one has failed."""
        # What peers send to a failed one makes gloo's thread turn for ever, and to end the group is to wait for that.
        self._under_way = [each for each in self._under_way if not _is_well_over(each[0])]
        if not self._under_way:
            self.__dict__.pop("_backend", None)
        return not self._under_way

    def __del__(self) -> None:
        """Never wait where garbage is collected."""
        if "_backend" in self.__dict__ and not self._end():
            _abandoned.append(self)


def _is_well_over(work: Any) -> bool:
    with contextlib.suppress(RuntimeError):  # of one that has failed
        return bool(work.is_completed() and work.wait())
    return False


@atexit.register
def _leave_to_the_system() -> None:
    """Keep what gloo does not let go of from being destroyed as the interpreter ends: that would wait."""
    for group in _abandoned:
        if not group._end():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group._backend))
