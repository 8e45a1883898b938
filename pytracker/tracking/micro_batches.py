"""Gradient accumulation: the values of several micro-batches, averaged into those of the step that they make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._checks import number_of_samples, real_number


class MicroBatches:
    """Keeps the scalars of micro-batches until the step. Never waits: values on a device are averaged there."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin a step."""
        self._values: dict[str, list[tuple[float, Any]]] = {}
        self._weight = 0.0
        self.count = 0  # that were added to no step yet

    def add(self, scalars: Mapping[str, Any], n: float) -> None:
        """Keep what a micro-batch was given; ``grad_scale`` is the step's own.

        Raises:
            InvalidTypeError, InvalidValueError: a value is no number.
        """
        n = number_of_samples("n", n)
        given = {name: value for name, value in scalars.items() if value is not None and name != "grad_scale"}
        known = {name: _kept(name, value) for name, value in given.items()}
        for name, value in known.items():
            self._values.setdefault(name, []).append((n, value))
        self._weight += n
        self.count += 1

    def take(self, scalars: dict[str, Any], n: float) -> tuple[dict[str, Any], float]:
        """Return the step's scalars, each the mean weighted by ``n`` over the micro-batches that had it, and its n.

        Raises:
            InvalidTypeError, InvalidValueError: a value is no number; the step's micro-batches are forgotten.
        """
        if not self.count:
            return scalars, number_of_samples("n", n)
        try:
            self.add(scalars, n)
            means: dict[str, Any] = {name: _mean(values) for name, values in self._values.items()}
            if scalars.get("grad_scale") is not None:
                means["grad_scale"] = scalars["grad_scale"]
            return means, self._weight
        finally:
            self.forget()


def _kept(name: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return real_number(repr(name), value)
    return value.detach().clone()  # the next micro-batch may write over it


def _mean(values: list[tuple[float, Any]]) -> Any:
    weight = sum(n for n, _ in values)
    weights = [n / weight if weight else 1 / len(values) for n, _ in values]
    counted = [(each, value) for each, (_, value) in zip(weights, values, strict=True) if each]  # 0 * inf would be NaN
    return sum(each * _wide(value) for each, value in counted)


def _wide(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(torch.float32 if value.device.type == "mps" else torch.float64)
