"""Which trainings there are, and on which half each falls."""

from __future__ import annotations

from itertools import product
from random import Random

from .training import Case
from .troubles import TROUBLES

BATCH_SIZES = (8, 16, 32, 64, 128, 256)
OF_THE_TABLE = ("lr_too_high", "lr_too_low", "never_steps", "overfit", "deep_sigmoid", "exploding")
SEEDS = {"tune": (0, 1, 2), "test": (3, 4, 5)}
HEALTHY, TABLE, OTHER = {"tune": 40, "test": 32}, {"tune": 8, "test": 7}, {"tune": 4, "test": 3}
"""Configurations on each half. A configuration, with all of its seeds, falls on one half.

The tuning half is large because it holds a former test half: once looked at, it can no longer say anything.
"""


def all_cases() -> list[Case]:
    """Return every training."""
    cases = []
    for trouble, planted in TROUBLES.items():
        counts = HEALTHY if trouble == "healthy" else TABLE if trouble in OF_THE_TABLE else OTHER
        every = list(product(planted.models, planted.datasets, planted.optimizers, BATCH_SIZES))
        chosen = {"tune": Random(trouble).sample(every, counts["tune"])}
        rest = [one for one in every if one not in chosen["tune"]]
        chosen["test"] = Random(f"{trouble}, second").sample(rest, counts["test"])
        for half, configurations in chosen.items():
            cases += [Case(trouble, *one, seed, half) for one in sorted(configurations) for seed in SEEDS[half]]
    return cases
