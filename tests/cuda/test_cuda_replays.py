"""Which step a replay's row belongs to, whatever the user forgets, and where the replay runs."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from cuda_helpers import with_gradient

import pytracker


class Training:
    """One gradient whose norm tells the step, eager or from a graph, and what must be recorded of it."""

    def __init__(self, every: int = 4, **scalars: torch.Tensor) -> None:
        self.tensor = with_gradient(torch.zeros(3000))
        self.tracker = pytracker.Tracker([("w", self.tensor)], every=every, diagnosis=None)
        self.scalars = scalars
        self.steps: list[int] = []
        self.norms: list[float] = []
        self.graph = torch.cuda.CUDAGraph()
        self.count = 0

    def capture(self) -> None:
        with torch.cuda.graph(self.graph):
            self.tracker.step(**self.scalars)

    def fill(self) -> None:
        self.count += 1
        self.tensor.grad.copy_(torch.full((3000,), float(self.count)))

    def expect(self) -> None:
        """Expect the gradients as they are to be recorded at the step that comes."""
        self.steps.append(self.tracker.steps)
        self.norms.append(self.count * 3000**0.5)

    def eager(self) -> None:
        self.fill()
        self.expect()
        self.tracker.step()

    def replay(self, announced: bool = True) -> None:
        self.fill()
        self.graph.replay()
        if announced:
            self.expect()
            self.tracker.replayed()

    def check(self) -> None:
        self.tracker.close()
        series = self.tracker.history["grad_norm"]
        np.testing.assert_array_equal(series.steps, self.steps)
        np.testing.assert_allclose(series.values, self.norms, rtol=1e-7)


@contextmanager
def told(*words: str):
    """Check that just these faults are told, once each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == len(words), messages
    for message, word in zip(messages, words, strict=True):
        assert word in message


def test_every_replay_that_is_announced_is_a_step_among_the_eager_ones():
    training = Training()
    training.eager()
    training.capture()
    with told():
        for turn in range(20):
            training.replay() if turn % 3 else training.eager()
        training.check()
    assert training.tracker.waits == 0


@pytest.mark.parametrize("forgotten", range(9))
def test_a_replay_that_nobody_announced_is_named_and_shifts_no_other_row(forgotten):
    training = Training()
    training.capture()
    with told("1 replay of a captured step"):
        for turn in range(9):
            training.replay(announced=turn != forgotten)
        training.check()


def test_several_that_nobody_announced_before_between_and_after_eager_steps_are_named():
    training = Training(every=5)
    training.eager()
    training.capture()
    with told(
        "1 replay of a captured step was not announced, before step", "2 replays of a captured step", "3 replays"
    ):
        training.replay(announced=False)
        training.eager()
        for _ in range(6):
            training.replay()
            training.eager()
        training.replay(announced=False)
        training.replay(announced=False)
        for _ in range(6):
            training.eager()
        for _ in range(3):
            training.replay(announced=False)
        training.check()


def test_a_tracker_that_hears_of_no_replay_says_so_at_its_end():
    training = Training()
    training.capture()
    for _ in range(20):  # more than the log has places
        training.replay(announced=False)
    with told("20 replays of a captured step were not announced, after the last step"):
        training.check()


def test_rows_that_unannounced_replays_have_written_over_are_named():
    training = Training()
    training.capture()
    for _ in range(3):
        training.replay()
    for _ in range(20):
        training.replay(announced=False)
    training.steps, training.norms = [], []
    with told("nothing is recorded of step 1, 2, 3: ", "replays of a captured step were not announced, after"):
        training.tracker.close()
    assert not len(training.tracker.history["grad_norm"])


def test_replays_that_are_announced_together_are_each_a_step():
    training = Training(every=6)
    training.capture()
    with told():
        for group in (2, 1, 3, 6, 4, 2, 3):
            norms = []
            for _ in range(group):
                training.replay(announced=False)
                norms.append(training.count * 3000**0.5)
            for norm in norms:
                training.steps.append(training.tracker.steps)
                training.norms.append(norm)
                training.tracker.replayed()
        training.check()


def test_an_announcement_without_a_replay_is_named_and_takes_no_other_row():
    training = Training()
    training.capture()
    training.replay()
    training.replay()
    with told("nothing is recorded of step 3: replayed() was called where no replay had written a row"):
        training.tracker.replayed()
        for _ in range(6):
            training.eager()
        training.check()


def test_a_replay_on_another_stream_is_waited_for():
    training = Training(every=4)
    training.capture()
    stream = torch.cuda.Stream()
    pinned = [torch.full((3000,), float(n + 1)).pin_memory() for n in range(8)]
    with told():
        for values in pinned:
            with torch.cuda.stream(stream):
                training.tensor.grad.copy_(values, non_blocking=True)
                training.graph.replay()
            training.count += 1
            training.expect()
            training.tracker.replayed()  # on a stream that knows nothing of the other
        training.check()


def test_each_capture_knows_which_scalars_its_rows_have():
    loss, accuracy = torch.tensor(0.5).cuda(), torch.tensor(0.25).cuda()
    training = Training(loss=loss)
    training.capture()
    other = torch.cuda.CUDAGraph()
    with torch.cuda.graph(other):
        training.tracker.step(accuracy=accuracy)
    for graph in (training.graph, other, training.graph):
        graph.replay()
        training.tracker.replayed()
        training.tracker.step(epoch_loss=1.0)
    training.tracker.close()
    history = training.tracker.history
    assert list(history["loss"].steps) == [2, 6]
    assert list(history["accuracy"].steps) == [4]
    assert list(history["epoch_loss"].steps) == [3, 5, 7]


def test_a_capture_with_more_scalars_than_the_log_has_room_for_is_refused_with_a_sentence():
    tensor = with_gradient(torch.ones(10))
    scalars = {f"s{i}": torch.tensor(float(i)).cuda() for i in range(20)}
    with pytracker.Tracker([("w", tensor)], every=4, diagnosis=None) as tracker:
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.graph(graph),
            pytest.raises(pytracker.InvalidValueError, match=r"captured in a CUDA graph with 20 scalars.*room for 16"),
        ):
            tracker.step(**scalars)
        tracker.step(**scalars)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            tracker.step(**scalars)
        graph.replay()
        tracker.replayed()
    assert [len(tracker.history[name]) for name in scalars] == [2] * 20


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_capture_of_parameters_on_two_devices_is_refused():
    parameters = [("a", with_gradient(torch.ones(10))), ("b", with_gradient(torch.ones(10), "cuda:1"))]
    with pytracker.Tracker(parameters, diagnosis=None) as tracker:
        tracker.step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), pytest.raises(pytracker.InvalidValueError, match="parameters are on 2 devices"):
            tracker.step()


def test_a_replay_into_a_log_that_was_made_anew_is_refused():
    training = Training()
    training.capture()
    training.replay()
    training.tracker.every = 2
    with pytest.raises(pytracker.InvalidValueError, match="since the tracker's log was made"):
        training.replay()
    training.steps.pop()
    training.norms.pop()
    training.check()
