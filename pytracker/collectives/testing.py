"""What tests and benchmarks ask of a tracker's ranks: which collectives run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from .groups import HostGroup


@contextmanager
def collectives() -> Iterator[list[int]]:
    """Note the bytes of the tensors that this rank hands to each collective of ours."""
    noted: list[int] = []
    begin = HostGroup._begin

    def noting(group: HostGroup, work: Any, memory: Any) -> Any:
        noted.append((memory if isinstance(memory, Tensor) else memory[0]).nbytes)
        return begin(group, work, memory)

    with mock.patch.object(HostGroup, "_begin", noting):
        yield noted
