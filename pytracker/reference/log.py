"""The log of steps in plain torch, as `csrc/step_log.h` has it: beside the plan of the reference."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..columns import row_width
from ..errors import InvalidTypeError, InvalidValueError
from .plan import RENEW, Plan, checked_divisor, checked_scalar, factor_of, norm_of, wide


class Clip:
    """What is asked of the total norm, and the tensors where the answer goes; ``csrc/clip.h`` says which."""

    def __init__(
        self,
        order: float,
        max_norm: Tensor | float,
        outcome: Tensor,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Remember them."""
        self.order, self.max_norm, self.outcome = order, max_norm, outcome
        self._grad_scale, self._found_inf = grad_scale, found_inf
        self.has_factor = isinstance(max_norm, Tensor) or not math.isinf(max_norm)
        self.names = ["clip_factor"] * self.has_factor + ["step_skipped"] * (found_inf is not None)

    def decide(self, norm: Tensor) -> list[Tensor]:
        """Decide by a norm; return the values of ``names``."""
        norm = norm.reshape(())
        limit = self.max_norm.reshape(()) if isinstance(self.max_norm, Tensor) else self.max_norm
        factor = factor_of(norm, limit)
        self.outcome.copy_(torch.stack([norm, factor]))
        skip = ~norm.isfinite()
        if self._grad_scale is not None:
            self._grad_scale.copy_(torch.where(skip, torch.ones_like(factor), 1 / factor))
        if self._found_inf is not None:
            self._found_inf.copy_(skip)
        values = {"clip_factor": factor, "step_skipped": skip.to(factor)}
        return [values[name] for name in self.names]


class StepLog:
    """The rows that the host has not read yet: a ring for each device."""

    def __init__(self, plan: Plan, capacity: int, slots: int, extras: bool = False) -> None:
        """Allocate ``capacity`` rows with ``slots`` scalars each, and where they are asked for the further columns."""
        self._extras = extras
        self.capacity = capacity
        self.slots = slots
        self.written = 0
        self.drained = 0
        self.scalar_names: list[str] = []
        self._plan = plan
        self._generation = plan.generation
        self.captures: list[int] = []  # of CUDA graphs: the reference can't be captured
        self.capturing = False
        self.cursor = self.announced = torch.empty(0, dtype=torch.int64, device="cpu")
        self._written_on: list[torch.cuda.Stream | None] = [None for _ in plan.devices]
        self._notes: deque[tuple[int, list[int], Any]] = deque()
        self.rows = [
            torch.empty((capacity, row_width(len(members), slots, extras=extras)), dtype=wide(device), device=device)
            for device, members in zip(plan.devices, plan.members, strict=True)
        ]

    def slot_of(self, name: str) -> int:
        """Return the slot of a scalar's name, new names included; -1 where all are taken."""
        if name not in self.scalar_names:
            if len(self.scalar_names) == self.slots:
                return -1
            self.scalar_names.append(name)
        return self.scalar_names.index(name)

    def append(self, reader: StepReader, step: int, scalars: dict[str, Any], clip: Clip | None = None) -> int:
        """Record one step; return the number of undrained rows, or RENEW where a new log is needed."""
        plan = self._plan
        scalars = dict(scalars)
        grad_scale = scalars.pop("grad_scale", None)
        if grad_scale is not None:
            grad_scale = checked_divisor(grad_scale, plan.devices)
        read = reader.read(self, scalars, plan.devices)
        if read is None or (clip is not None and min(map(self.slot_of, clip.names), default=0) < 0):
            return RENEW
        values, rates = read
        plan.gather()
        if plan.generation != self._generation:
            return RENEW
        index = self.written % self.capacity
        given = [0] * len(self.rows)
        for group, rows in enumerate(self.rows):
            row = plan.row(group, grad_scale)
            self._written_on[group] = torch.cuda.current_stream(rows.device) if rows.is_cuda else None
            rows[index, : len(row)] = row
            if self._extras:
                rows[index, len(row) + self.slots :] = plan.extra_row(group, grad_scale)
            for slot, value in values:
                if (value.device if value.device.type != "cpu" else plan.devices[0]) == plan.devices[group]:
                    rows[index, len(row) + slot] = value.detach().reshape(())
                    given[group] |= 1 << slot
        self._notes.append((step, given, (plan.elements, rates)))
        self.written += 1
        if clip is not None:
            self.decide(clip)
        return self.written - self.drained

    def latest(self) -> list[Tensor]:
        """Return a copy of the row that was appended last, on each device."""
        return [rows[(self.written - 1) % self.capacity].clone() for rows in self.rows]

    def decide(self, clip: Clip, norm: Tensor | None = None) -> bool:
        """Decide on a clip by the last row, or by the norm of all ranks; tell whether the row has the results."""
        row = self.rows[0][(self.written - 1) % self.capacity]
        values = clip.decide(norm_of(row, clip.order) if norm is None else norm)
        slots = [self.slot_of(name) for name in clip.names]
        if self.drained == self.written or min(slots, default=0) < 0:
            return False
        for slot, value in zip(slots, values, strict=True):
            row[row_width(len(self._plan.members[0]), 0) + slot] = value
            self._notes[-1][1][0] |= 1 << slot
        return True

    def replayed(self, reader: StepReader, step: int) -> None:
        """Note a row that a replayed CUDA graph has written; the reference can't be captured, so there is none."""
        raise InvalidValueError(f"step {step}: only the native core records CUDA graph replays")

    def await_rows(self, group: int) -> None:
        """Make the current stream of a device wait for its rows."""
        stream = self._written_on[group]
        if stream is not None:
            torch.cuda.current_stream(stream.device).wait_stream(stream)

    def notes(self, first: int, count: int) -> tuple[list[int], list[list[int]], list[Any], list[int]]:
        """Return what the host knows of the rows from ``first`` on.

        These are their steps, for each device a bit for each scalar in its row, and the contexts, (elements, [(name,
        learning rate or None, slot or -1)]), with the index of each row's.
        """
        begin = first - self.drained
        noted = list(self._notes)[begin : begin + count]
        steps = [step for step, _, _ in noted]
        return steps, [given for _, given, _ in noted], [context for _, _, context in noted], list(range(len(noted)))

    def release(self, end: int) -> None:
        """Make the places of the rows before ``end`` free."""
        while self.drained < min(end, self.written):
            self._notes.popleft()
            self.drained += 1


class StepReader:
    """Gives each keyword its slot, and reads the learning rate of each parameter group."""

    def __init__(
        self, optimizer: Any, name_groups: Callable[[list[dict[str, Any]]], list[str]], reserved: set[str]
    ) -> None:
        """Remember the optimizer, or None, and the names that a scalar may not have."""
        self._optimizer = optimizer
        self._reserved = reserved
        self._name_groups = name_groups
        self.rate_names: list[str] = []

    def read(
        self, log: StepLog, scalars: dict[str, Any], devices: Sequence[torch.device]
    ) -> tuple[list[tuple[int, Tensor]], list[tuple[str, float | None, int]]] | None:
        """Return (slot, value) of each scalar, and the learning rates; None where the log has too few slots."""
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        if not isinstance(groups, list):
            raise InvalidTypeError(f"the optimizer's param_groups is of type {type(groups).__name__}; expected a list")
        if len(groups) != len(self.rate_names):
            self.rate_names = self._name_groups(groups)
            self._reserved.update(self.rate_names)
        values: dict[int, Tensor] = {}
        rates: list[tuple[str, float | None, int]] = []
        for name, group in zip(self.rate_names, groups, strict=True):
            rate = group.get("lr")
            checked = None if rate is None else checked_scalar(name, rate, devices)
            if checked is None or checked.is_cpu:
                rates.append((name, None if checked is None else checked.item(), -1))
                continue
            slot = next((slot for slot, known in values.items() if known is checked), None)
            slot = log.slot_of(name) if slot is None else slot
            if slot < 0:
                return None
            values[slot] = checked
            rates.append((name, None, slot))
        for name, value in scalars.items():
            if value is None:
                continue
            if not name or not name.isprintable():
                raise InvalidValueError(f"a recorded value has a printable name, got {name!r}")
            if name in self._reserved:
                raise InvalidValueError(
                    f"{name!r} is recorded by pytracker itself, or by log() or epoch(); give this value another name"
                )
            slot = log.slot_of(name)
            if slot < 0:
                return None
            values[slot] = checked_scalar(name, value, devices)
        return list(values.items()), rates

    def reset(self) -> None:
        """Forget what belongs to a log that is gone."""
