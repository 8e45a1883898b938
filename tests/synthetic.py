"""Made-up gradients for the tests of the record."""

from __future__ import annotations

import numpy as np


def gradient_rows(generator: np.random.Generator, steps: int, numel: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """Exact raw moments of random normal gradients, float64 [steps, T, 6]."""
    rows = np.zeros((steps, len(numel), 6))
    for step in range(steps):
        for index, count in enumerate(numel):
            gradient = generator.normal(scale=scale, size=count)
            gradient[generator.random(count) < 0.1] = 0.0
            rows[step, index] = [
                gradient.sum(), (gradient**2).sum(), np.abs(gradient).max(initial=0), (gradient == 0).sum(), 0, 0
            ]  # fmt: skip
    return rows
