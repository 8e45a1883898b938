"""The kernels without torch: program.cpp under many schedules, memory models and checks.

Each scenario compares every row with an oracle in extended precision and, over its seeds, the bits of the rows.
"""

from __future__ import annotations

import pytest
import torch
from cuda_helpers import orders_of_atomics

from pytracker.core import cuda

SCENARIOS = [
    "clip",
    "comes_and_goes",
    "every_kind",
    "extras",
    "few_pointers",
    "graph",
    "large",
    "log",
    "long_ones",
    "many",
    "meters",
    "nothing",
    "scale",
    "spanning",
    "tickets",
    "with_gaps",
]
CROSSING = ["comes_and_goes", "extras", "log", "nothing", "spanning", "tickets"]  # where blocks read what others wrote


@pytest.mark.parametrize("scenario", [*SCENARIOS, "huge"])
def test_every_row_is_what_the_oracle_expects(program, scenario):
    assert program(scenario).startswith("OK")


@pytest.mark.simulated
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_bits_are_the_same_on_1_8_and_132_multiprocessors_and_for_20_schedules(program, scenario):
    hashes = {program(scenario, seeds=20, CUDASIM_SM_COUNT=sms, CUDASIM_SLICE=50) for sms in (1, 8, 132)}
    assert len(hashes) == 1


@pytest.mark.simulated
@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("scenario", CROSSING)
def test_no_fence_is_missing(program, scenario, level):
    program(scenario, seeds=50, CUDASIM_WEAK=level)


@pytest.mark.simulated
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_two_threads_race(program, scenario):
    program(scenario, seeds=3, CUDASIM_RACECHECK=2)


@pytest.mark.simulated
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_nothing_is_read_that_was_never_written(program, scenario):
    program(scenario, CUDASIM_INITCHECK=2)


@pytest.mark.simulated
def test_every_ticket_acquires_and_releases():
    """That they acquire shows in no run of the simulator, where no block has read before what others write."""
    images = {name: few for name, (few, *_) in cuda.candidates(torch.cuda.get_device_capability(0), [])}
    ptx = next(few for name, few in images.items() if name.startswith("compute_"))
    assert orders_of_atomics(ptx.decode()) == {"acq_rel"}
