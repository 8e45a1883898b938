"""Which trainings there are, and on which half each falls."""

from __future__ import annotations

from itertools import product

from .training import Case
from .troubles import TROUBLES

SEEDS = (0, 1, 2)
OPTIMIZERS = ("SGD", "Adam", "AdamW")
BATCH_SIZES = (8, 16, 32, 64, 128, 256)
OF_THE_TABLE = ("lr_too_high", "lr_too_low", "never_steps", "overfit", "deep_sigmoid", "exploding")
HEALTHY_CONFIGURATIONS, TABLE_CONFIGURATIONS, OTHER_CONFIGURATIONS = 32, 6, 4


def all_cases() -> list[Case]:
    """Return every training. A configuration, with all of its seeds, falls on one half."""
    cases = []
    for trouble, planted in TROUBLES.items():
        wanted = OTHER_CONFIGURATIONS
        if trouble == "healthy":
            wanted = HEALTHY_CONFIGURATIONS
        elif trouble in OF_THE_TABLE:
            wanted = TABLE_CONFIGURATIONS
        pairs = [pair for pair in product(planted.models, planted.datasets) if pair != ("cnn", "wine")]
        for index in range(wanted):
            # Strides that are coprime to the lengths walk through models, data sets, optimizers and batch sizes together.
            model, dataset = pairs[(index * 7 + len(trouble)) % len(pairs)]
            optimizer = OPTIMIZERS[(index + len(trouble)) % len(OPTIMIZERS)]
            batch_size = BATCH_SIZES[(index * 5 + len(trouble)) % len(BATCH_SIZES)]
            half = "tune" if index % 2 == 0 else "test"
            cases += [Case(trouble, model, dataset, optimizer, batch_size, seed, half) for seed in SEEDS]
    unique = {case.name: case for case in cases}
    return list(unique.values())
