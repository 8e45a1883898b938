"""How long one call takes, on the device and on the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median

import torch

REPEATS = 50
SECONDS = 0.5  # at most, for the calls of one contender


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: on the device (median, mean and best), and until it returned to the host (median)."""

    median: float
    mean: float
    best: float
    host: float


def flusher() -> Callable[[], object]:
    """Return a call that writes over the whole L2 cache."""
    size = torch.cuda.get_device_properties(0).L2_cache_size
    memory = torch.empty(4 * max(size, 1 << 25), dtype=torch.uint8, device="cuda")
    return memory.zero_


def measure(call: Callable[[], object], flush: Callable[[], object], repeats: int = REPEATS) -> Timing:
    """Time a call that has been made before."""
    host: list[float] = []
    while len(host) < repeats and sum(host) < SECONDS / 2:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        host.append(time.perf_counter() - begin)
    device = []
    for _ in range(len(host)):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        flush()
        start.record()
        call()
        end.record()
        end.synchronize()
        device.append(start.elapsed_time(end) / 1e3)
    return Timing(median(device), fmean(device), min(device), median(host))
