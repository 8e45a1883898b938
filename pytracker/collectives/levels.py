"""Many ranks in levels: small groups, whose first ranks are the next level's groups, up to the first of all.

gloo joins every rank of a group with others of it, and passes a sum around in a ring, so that one group of ten thousand
ranks would have as many connections and steps. In levels a rank has at most eight partners in each, and the number of
levels grows with the logarithm.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .groups import SUM, HostGroup, part_of

WIDEST_SINGLE = 32  # ranks that are one group
_HOST, _WIDTH = 8, 8  # ranks of a host's group, and at most of those above it
_SMALL = 256  # bytes of a message, its length included, that travels at once
_GATHERED = 2**17  # bytes of a reduction that are sent as they are


def widths(count: int) -> list[int]:
    """Return how wide the groups of each level are, from the ranks up: by host, and then as evenly as can be.

    Example:
        >>> widths(16), widths(64), widths(2048), widths(10_000)
        ([16], [8, 8], [8, 7, 7, 7], [8, 6, 6, 6, 6])
    """
    if count <= WIDEST_SINGLE:
        return [count]
    hosts, levels = -(-count // _HOST), 1
    while _WIDTH**levels < hosts:
        levels += 1
    width = next(width for width in range(2, _WIDTH + 1) if width**levels >= hosts)
    return [_HOST, *[width] * levels]


def groups_of(members: Sequence[int], rank: int) -> list[list[int]]:
    """Return the groups that a rank is in, the lowest first; it is the first of all but the last.

    Example:
        >>> groups_of(range(64), 8), groups_of(range(64), 9)
        ([[8, 9, 10, 11, 12, 13, 14, 15], [0, 8, 16, 24, 32, 40, 48, 56]], [[8, 9, 10, 11, 12, 13, 14, 15]])
    """
    found, level = [], list(members)
    for width in widths(len(members)):
        if rank not in level:
            break
        begin = level.index(rank) // width * width
        found.append(level[begin : begin + width])
        level = level[::width]
    return found


class Levels:
    """The groups of this rank. Collectives of one kind only may be under way: their order is the same on all ranks."""

    def __init__(self, store: Any, members: Sequence[int], timeout: float) -> None:
        self.groups = [
            HostGroup(part_of(store, f"{level}/{group[0]}"), group, timeout)
            for level, group in enumerate(groups_of(members, dist.get_rank()))
        ]

    def reduce(self, tensors: Sequence[tuple[Tensor, str]]) -> Reduction:
        """Begin to reduce tensors, each by its operation, in place to the first rank of all."""
        return Reduction(self.groups, tensors)

    def announce(self, tensor: Tensor) -> Announcement:
        """Begin to bring the first rank's tensor to all, in place."""
        return Announcement(self.groups, tensor)

    def exchange(self, value: Any, merge: Callable[[list[Any]], Any], wait: Callable[[list[Any]], None]) -> Any:
        """Return what ``merge`` makes of every rank's value: of a group's, and then of what came of those. Waits.

        Every exchange is the same collectives, so that ranks which meet for different things still understand each
        other.
        """
        for group in self.groups:
            value = merge([pickle.loads(each) for each in _gathered(group, pickle.dumps(value), wait)])
        message = pickle.dumps(value)
        for group in reversed(self.groups):
            message = _broadcast(group, message, wait)
        return pickle.loads(message)

    def close(self) -> None:
        """Let go of the groups. Waits for nobody."""
        for group in self.groups:
            group.close()


class Reduction:
    """Tensors on their way to the first rank of all, level by level.

    gloo reduces in a ring, which is best for many bytes. Of few, the messages are what costs: all tensors, which are of
    one dtype, go to a group's first rank in one, and are reduced there.
    """

    def __init__(self, groups: Sequence[HostGroup], tensors: Sequence[tuple[Tensor, str]]) -> None:
        self._groups, self._tensors = list(groups), tensors
        self._are_few = sum(tensor.nbytes for tensor, _ in tensors) <= _GATHERED
        self._received: list[Tensor] = []  # on the first rank of a group
        self.works: list[Any] = []
        self._climb()

    def _climb(self) -> None:
        group = self._groups.pop(0)
        if self._are_few:
            self._received, work = group.gather(torch.cat([tensor.flatten() for tensor, _ in self._tensors]))
            self.works = [work]
        else:
            self.works = [group.reduce(tensor, operation) for tensor, operation in self._tensors]

    def _combine(self) -> None:
        """Reduce what was gathered, in the order of the ranks."""
        begin = 0
        for tensor, operation in self._tensors:
            end = begin + tensor.numel()
            parts = torch.stack([each[begin:end] for each in self._received])
            tensor.copy_((parts.sum(0) if operation == SUM else parts.amax(0)).view(tensor.shape))
            begin = end
        self._received = []

    def is_done(self) -> bool:
        """Tell whether this rank has no more to do, and begin the next level where one is over. Never waits.

        Raises:
            RuntimeError: a collective has failed.
        """
        while all(work.is_completed() for work in self.works):
            for work in self.works:
                work.wait()  # it is over: this raises where it failed
            if self._received:
                self._combine()
            if not self._groups:
                return True
            self._climb()
        return False


class Announcement:
    """A tensor of the first rank of all, on its way down the levels to every other."""

    def __init__(self, groups: Sequence[HostGroup], tensor: Tensor) -> None:
        self._tensor = tensor
        *self._below, top = groups
        self.work = top.broadcast(tensor)
        self._is_here = top.place == 0
        if self._is_here:
            self._pass_on()

    def _pass_on(self) -> None:
        for group in reversed(self._below):
            group.broadcast(self._tensor)

    def has_come(self) -> bool:
        """Tell whether the tensor is here, and pass it on where it has come. Never waits.

        Raises:
            RuntimeError: the rank that says it is gone.
        """
        if not self._is_here and self.work.is_completed():
            self.work.wait()  # it is over: this raises where it failed
            self._is_here = True
            self._pass_on()
        return self._is_here


def _padded(message: bytes, size: int) -> Tensor:
    framed = len(message).to_bytes(8, "little") + message
    return torch.frombuffer(bytearray(framed[:size].ljust(size, b"\0")), dtype=torch.uint8)


def _size(framed: Tensor) -> int:
    return 8 + int.from_bytes(framed[:8].numpy().tobytes(), "little")


def _gathered(group: HostGroup, message: bytes, wait: Callable[[list[Any]], None]) -> list[bytes]:
    """Return the messages of all ranks of a group, in its first rank; elsewhere too, where they are small."""
    received, work = group.all_gather(_padded(message, _SMALL))
    wait([work])
    sizes = [_size(each) for each in received]
    if max(sizes) > _SMALL:
        received, work = group.all_gather(_padded(message, max(sizes)))
        wait([work])
    return [each[8:size].numpy().tobytes() for each, size in zip(received, sizes, strict=True)]


def _broadcast(group: HostGroup, message: bytes, wait: Callable[[list[Any]], None]) -> bytes:
    """Return the message of a group's first rank."""
    framed = _padded(message, _SMALL)
    wait([group.broadcast(framed)])
    if (size := _size(framed)) > _SMALL:
        framed = _padded(message, size)
        wait([group.broadcast(framed)])
    return framed[8:size].numpy().tobytes()
