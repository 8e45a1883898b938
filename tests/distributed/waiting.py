"""Steps that the cases take until something between the ranks shows."""

from __future__ import annotations

import time

from hooks import until_merged

import pytracker


def train_two_more_steps(tracker: pytracker.Tracker) -> None:
    """Take a step that drains and one after its collectives; either may say what they have found."""
    tracker.step()
    until_merged(tracker)
    tracker.step()


def train_until_told(tracker: pytracker.Tracker) -> None:
    """Take steps until they say what is wrong between the ranks: who is missing is found out beside the training."""
    for _ in range(3000):
        tracker.step()
        time.sleep(0.01)
