"""Histories made by hand, with known numbers, for the tests of the rules."""

from __future__ import annotations

import numpy as np

from pytracker.history import History, ParameterInfo, summarize

EVERY = 20


def healthy_loss(steps: int = 400, *, noise: float = 0.02, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (0.1 + 2.0 * np.exp(-np.arange(steps) / 80.0)) * (1.0 + noise * random.standard_normal(steps))


def stuck_loss(steps: int = 400, *, level: float = 2.3, seed: int = 0) -> np.ndarray:
    return level + 0.01 * np.random.default_rng(seed).standard_normal(steps)


def usual_norms(steps: int = 400, *, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(0.0, 0.2, steps)


def with_parameters(
    history: History,
    norms: np.ndarray,
    *,
    shapes: list[tuple[int, ...]] | None = None,
    weight_norm: float = 10.0,
    names: list[str] | None = None,
    update_norm: float | None = None,
) -> History:
    """Give ``history`` parameters whose gradient norms are ``norms`` [steps, T], drained every 20 steps.

    NaN norms are missing gradients; all elements of a gradient have the same size. Weights are measured at each drain.
    """
    count = norms.shape[1]
    shapes = shapes or [(10, 10)] * count
    names = names or [f"layers.{index}.weight" for index in range(count)]
    history.parameters.infos = [
        ParameterInfo(name, shape, "float32", "0", int(np.prod(shape)))
        for name, shape in zip(names, shapes, strict=True)
    ]
    numel = history.parameters.numel
    rows = np.zeros((*norms.shape, 6))
    rows[:, :, 1] = norms**2
    rows[:, :, 2] = norms / np.sqrt(numel)
    rows[:, :, 3] = np.where(norms == 0, numel, 0)
    rows[np.isnan(norms)] = np.nan
    for start in range(0, len(norms), EVERY):
        block = rows[start : start + EVERY]
        steps = np.arange(start, start + len(block))
        history.parameters.append_rows(steps, block)
        measured = np.full(count, weight_norm * (1.0 + 1e-6 * start))
        updates = None if update_norm is None else np.full(count, update_norm)
        history.parameters.append(summarize(steps, block, numel, measured, updates))
    return history
