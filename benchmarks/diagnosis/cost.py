"""What the rules cost: online for each drain over 10,000 parameters, and over a history of a million steps.

Run with ``python -m benchmarks.diagnosis.cost``. Both histories are checked first: each plants one trouble that must be
found, so that a rule that does nothing can't be fast.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from pytracker.diagnostics import Diagnosis, diagnose
from pytracker.history import History, ParameterInfo, summarize

PARAMETERS, DRAINS, EVERY, STEPS = 10_000, 60, 50, 1_000_000


def online_milliseconds() -> tuple[list[float], list[float]]:
    """Return the time of each update, and the thread's own, over 60 drains of 50 steps with every rule on.

    The thread's own time leaves out what the processor did for others meanwhile.
    """
    random = np.random.default_rng(0)
    history = History()
    history.parameters.infos = [
        ParameterInfo(f"layers.{index}.weight", (100, 100), "float32", "0", 10_000) for index in range(PARAMETERS)
    ]
    history.meta.update(optimizer="AdamW", scheduler=True, clip_threshold=1e6, every=EVERY)
    numel = history.parameters.numel
    diagnosis = Diagnosis()
    diagnosis.update(history)  # of nothing yet, as a Tracker does when it is made
    times, own = [], []
    for drain in range(DRAINS):
        steps = np.arange(drain * EVERY, (drain + 1) * EVERY)
        rows = np.zeros((2, PARAMETERS, 6))  # two steps stand for the interval; making 50 is not what is timed
        rows[:, :, 1] = random.lognormal(0.0, 0.3, (2, PARAMETERS))
        rows[:, 7, 1] = 0.0
        rows[:, :, 2] = np.sqrt(rows[:, :, 1])
        rows[:, 7, 3] = 10_000
        history.parameters.append(summarize(steps[[0, -1]], rows, numel, np.full(PARAMETERS, 10.0)))
        history["loss"].extend(1.0 + np.exp(-steps / 200.0) + 0.05 * random.standard_normal(EVERY), steps)
        history["grad_norm"].extend(random.lognormal(0.0, 0.3, EVERY), steps)
        history["lr"].extend(1e-3 * (1.0 - steps / (DRAINS * EVERY)), steps)
        history["val_loss"].append(1.5 + np.exp(-drain / 20.0), int(steps[-1]))
        start, own_start = time.perf_counter(), time.thread_time()
        diagnosis.update(history)
        own.append(1e3 * (time.thread_time() - own_start))
        times.append(1e3 * (time.perf_counter() - start))
    found = {finding.rule: finding for finding in diagnosis.findings}
    if list(found) != ["dead_parameter"] or found["dead_parameter"].parameters != ("layers.7.weight",):
        raise AssertionError(f"expected one dead parameter, got {diagnosis.findings}")
    return times, own


def offline_seconds() -> float:
    """Return the time of ``diagnose`` over a million steps with one spike in them."""
    random = np.random.default_rng(0)
    history = History()
    steps = np.arange(STEPS)
    loss = 2.0 + 8.0 / (1.0 + steps / 500.0) ** 0.5 + 0.05 * random.standard_normal(STEPS)
    loss[654_321] += 5.0
    history["loss"].extend(loss, steps)
    history["grad_norm"].extend(random.lognormal(0.0, 0.2, STEPS), steps)
    history["lr"].extend(1e-3 * (1.0 - steps / STEPS), steps)
    history["val_loss"].extend(2.0 + 8.0 / (1.0 + steps[::1000] / 500.0) ** 0.5, steps[::1000])
    start = time.perf_counter()
    findings = diagnose(history)
    seconds = time.perf_counter() - start
    if [(finding.rule, finding.first_step) for finding in findings] != [("loss_spike", 654_321)]:
        raise AssertionError(f"expected one spike at step 654321, got {findings}")
    return seconds


def main() -> None:
    for name, times in zip(("wall clock", "the thread's own time"), online_milliseconds(), strict=True):
        print(
            f"online, {PARAMETERS:,} parameters, all rules, {name}: median {statistics.median(times):.2f} ms for each "
            f"drain, largest {max(times):.2f} ms of {DRAINS} (target 5 ms)"
        )
    print(f"diagnose, {STEPS:,} steps: {offline_seconds():.2f} s (target 5 s)")


if __name__ == "__main__":
    main()
