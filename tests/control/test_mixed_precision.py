"""A GradScaler that the tracker knows, and steps that are made of micro-batches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pytracker import Tracker
from pytracker.errors import InvalidTypeError, InvalidValueError


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def batch(step: int) -> torch.Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(step))


def train(fused: bool, unscale: bool, clip: float | None, scaled: bool) -> tuple[Tracker, nn.Module, list[float]]:
    """Train with a scale of 2**8 or without, and at step 3 with an infinite gradient. Return the exact norms, too."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2, enabled=scaled)
    norms = []
    with Tracker(model, optimizer, grad_scaler=scaler, every=2, diagnosis=None) as tracker:
        for step in range(7):
            scaler.scale(model(batch(step)).square().mean()).backward()
            scale = scaler.get_scale()
            norms.append(math.sqrt(sum((p.grad.double() / scale).square().sum().item() for p in model.parameters())))
            if step == 3:
                model[0].bias.grad[0] = math.inf
            if unscale:
                scaler.unscale_(optimizer)
            tracker.step(clip=clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return tracker, model, norms


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_the_scale_is_found_and_a_skipped_step_is_known(fused: bool, unscale: bool, clip: float | None) -> None:
    tracker, _, norms = train(fused, unscale, clip, scaled=True)
    recorded = tracker.history["grad_norm"][:]
    assert recorded[:3] + recorded[4:] == pytest.approx(norms[:3] + norms[4:], rel=1e-6)
    assert recorded[3] == math.inf
    assert tracker.history["step_skipped"][:] == [0, 0, 0, 1, 0, 0, 0]
    assert ("clip_factor" in tracker.history) == (clip is not None)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_trainings_with_and_without_unscaling_end_alike(fused: bool, clip: float | None) -> None:
    models = [train(fused, unscale, clip, scaled=True)[1] for unscale in (False, True)]
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_a_scaler_that_is_off_changes_nothing() -> None:
    tracker, _, norms = train(fused=False, unscale=False, clip=None, scaled=False)
    assert tracker.history["grad_norm"][:3] == pytest.approx(norms[:3], rel=1e-6)
    assert "step_skipped" not in tracker.history


def test_what_is_no_scaler_is_refused() -> None:
    with pytest.raises(InvalidTypeError, match=r"grad_scaler is 256\.0.*; expected a torch\.amp\.GradScaler"):
        Tracker(network(), grad_scaler=256.0)


def test_a_step_has_the_means_of_its_micro_batches() -> None:
    model = network()
    with Tracker(model, every=1, diagnosis=None) as tracker:
        for step in range(3):
            for part, n in enumerate((4, 2, 2)):
                (model(batch(10 * step + part)[:n]).mean() * n / 8).backward()
                loss = torch.tensor(float(step + part))
                tracker.step(loss=loss, words=10.0 * part, late=part if part == 2 else None, n=n, when=part == 2)
                loss.fill_(math.nan)  # a graph writes over its loss
            norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
            assert tracker.history["grad_norm"][-1] == pytest.approx(norm)
            model.zero_grad()
        means = tracker.epoch()
    assert tracker.steps == 3
    assert tracker.history["loss"][:] == pytest.approx([step + (0 * 4 + 1 * 2 + 2 * 2) / 8 for step in range(3)])
    assert tracker.history["words"][:] == pytest.approx([7.5] * 3)
    assert tracker.history["late"][:] == [2.0] * 3
    assert means["loss"] == pytest.approx(1.75)


def test_a_micro_batch_without_samples_counts_for_nothing_unless_none_has_some() -> None:
    with Tracker([], diagnosis=None) as tracker:
        tracker.step(loss=math.inf, n=0, when=False)
        tracker.step(loss=2.0, n=3)
        tracker.step(loss=1.0, n=0, when=False)
        tracker.step(loss=2.0, n=0)
    assert tracker.history["loss"][:] == [2.0, 1.5]


def test_micro_batches_that_come_to_no_step_are_told_of_at_the_end(recwarn) -> None:
    with Tracker([], diagnosis=None) as tracker:
        tracker.step(loss=1.0)
        tracker.step(loss=2.0, when=False)
        tracker.step(loss=3.0, when=False)
    assert tracker.history["loss"][:] == [1.0]
    (warning,) = recwarn.list
    assert "the last 2 micro-batches, given with when=False, came to no step" in str(warning.message)


def test_a_checkpoint_goes_on_without_the_micro_batches_of_the_step_that_it_cut_off(recwarn) -> None:
    with Tracker([], diagnosis=None) as tracker:
        tracker.step(loss=1.0)
        state = tracker.state_dict()
        tracker.step(loss=90.0, when=False)
        tracker.load_state_dict(state)
        tracker.step(loss=2.0, when=False)
        tracker.step(loss=4.0)
    assert tracker.history["loss"][:] == [1.0, 3.0]
    assert not recwarn.list


def test_a_value_that_is_none_is_refused_at_its_micro_batch() -> None:
    with Tracker([], diagnosis=None) as tracker:
        tracker.step(loss=1.0, when=False)
        with pytest.raises(InvalidTypeError, match="'loss' is 'high'"):
            tracker.step(loss="high", when=False)
        with pytest.raises(InvalidTypeError, match="when is 1"):
            tracker.step(loss=1.0, when=1)
        tracker.step(loss=3.0)
        with pytest.raises(InvalidValueError, match="n is -1"):
            tracker.step(loss=1.0, n=-1, when=False)
    assert tracker.history["loss"][:] == [2.0]
