"""Brings a tracker's ranks together, in a round of their own in the shared store.

Nothing is counted on a rank, so that ranks of which one failed earlier, gave up, or started over still come to the same
round: the first that is neither over nor given up. A round costs a rank the same few requests, however many there are.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from ..errors import RankMismatchError
from .groups import part_of
from .missing_ranks import absent, in_few_words

T = TypeVar("T")

_SLICE = 1.0  # seconds of waiting in torch, between which ^C is heard
_DONE, _VOID = "done", "void"


def rendezvous(members: Sequence[int], timeout: float, make: Callable[[Any], T]) -> T:
    """Return what ``make`` made of this round's own part of the store, when all members have made theirs. Waits.

    Raises:
        RankMismatchError: a rank does not come within the timeout.
    """
    rank, digest = dist.get_rank(), hashlib.sha256(repr(tuple(members)).encode()).hexdigest()[:16]
    base = part_of(dist.distributed_c10d._get_default_store(), f"pytracker/{digest}")
    number = int(base.get("open")) if base.check(["open"]) else 0
    while True:
        store = part_of(base, str(number))
        if _is_open(store, rank):
            made = make(store)
            if store.add("count", 1) == len(members):
                store.compare_set("state", "", _DONE)
                base.set("open", str(number + 1))
            if _ends_well(store, timeout):
                return made
            raise RankMismatchError(
                f"not all ranks came to make the tracker (waited {timeout:.0f} s at most); of {len(members)} ranks: no "
                f"answer from {in_few_words(absent(store, 'came', members))}. Every rank must make one, with the same "
                "arguments; where this one trains alone, give "
                "process_group=torch.distributed.new_group([rank], use_local_synchronization=True)"
            )
        number += 1


def _is_open(store: Any, rank: int) -> bool:
    """Tell whether this rank can come to a round, and note that it has."""
    if store.check(["state"]):
        return False
    if store.add(f"came/{rank}", 1) == 1:
        return True
    store.compare_set("state", "", _VOID)  # an earlier process of this rank came, and ended before the others did
    return False


def _ends_well(store: Any, timeout: float) -> bool:
    """Wait for the other ranks; tell whether all came."""
    end = time.monotonic() + timeout
    while (left := end - time.monotonic()) > 0 and not store.check(["state"]):
        with contextlib.suppress(RuntimeError):  # not yet
            store.wait(["state"], datetime.timedelta(seconds=min(_SLICE, left)))
    return bool(store.compare_set("state", "", _VOID) == _DONE.encode())
