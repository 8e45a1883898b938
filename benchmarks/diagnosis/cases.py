"""Which trainings there are, and on which half each falls."""

from __future__ import annotations

from itertools import product
from random import Random

from .training import Case
from .troubles import TROUBLES

SEEDS = (0, 1, 2)
BATCH_SIZES = (8, 16, 32, 64, 128, 256)
OF_THE_TABLE = ("lr_too_high", "lr_too_low", "never_steps", "overfit", "deep_sigmoid", "exploding")
HEALTHY_CONFIGURATIONS, TABLE_CONFIGURATIONS, OTHER_CONFIGURATIONS = 40, 8, 4


def all_cases() -> list[Case]:
    """Return every training. A configuration, with all of its seeds, falls on one half."""
    cases = []
    for trouble, planted in TROUBLES.items():
        wanted = OTHER_CONFIGURATIONS
        if trouble == "healthy":
            wanted = HEALTHY_CONFIGURATIONS
        elif trouble in OF_THE_TABLE:
            wanted = TABLE_CONFIGURATIONS
        every = list(product(planted.models, planted.datasets, planted.optimizers, BATCH_SIZES))
        # Sorted, so that neighbours are alike and both halves see every architecture.
        for index, (model, dataset, optimizer, batch_size) in enumerate(sorted(Random(trouble).sample(every, wanted))):
            half = "tune" if index % 2 == 0 else "test"
            cases += [Case(trouble, model, dataset, optimizer, batch_size, seed, half) for seed in SEEDS]
    return cases
