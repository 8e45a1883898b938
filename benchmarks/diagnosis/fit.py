"""One training loop for all kinds of trainings, recorded by a Tracker; and what advice changes in it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pytracker import Tracker
from pytracker.diagnostics import Finding
from pytracker.history import History

EVERY = 20  # steps between drains


@dataclass(frozen=True)
class Change:
    """What is changed when a training is repeated: what the advice of a finding says."""

    lr: float = 1.0  # times the learning rate
    clip: float | None = None  # clip here
    clip_times: float = 1.0  # or times the threshold that there is
    decay: float = 0.0  # weight decay that is added
    stop: int | None = None  # after so many steps


@dataclass
class Trained:
    """A finished training: its history, the final figure of merit (low is good), and whether its loss fell."""

    history: History
    merit: float
    fell: bool


def advised(finding: Finding) -> list[Change]:
    """Return every change that follows the advice of a finding; none where the advice changes no setting."""
    action, made = finding.action, []
    if "lower the learning rate" in action:
        made += [Change(lr=1 / 3), Change(lr=1 / 10)]
    if "raise the learning rate" in action:
        made += [Change(lr=3.0), *([Change(lr=10.0)] if "10-fold" in action else [])]
    if "raise the threshold" in action:
        made += [Change(clip_times=3.0), Change(clip_times=10.0)]
    clip = re.search(r"clip at ([\d.e+-]*\d)", action)
    if clip:
        made.append(Change(clip=float(clip[1])))
    stop = re.search(r"stop at step (\d+)", action)
    if stop:
        made += [Change(stop=int(stop[1]) + 1), Change(decay=1e-2)]
    return made


def fit(
    model: nn.Module,
    make_optimizer: Callable[[float], torch.optim.Optimizer],
    batch_loss: Callable[[int], Tensor],
    steps: int,
    change: Change,
    *,
    lr: float,
    clip: float | None = None,
    schedule: Callable[[float], float] | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    merit: Callable[[], float] | None = None,
    after_step: Callable[[int], None] | None = None,
    extra: Callable[[], dict[str, float]] | None = None,
    zero_grad: bool = True,
    accumulate: int = 1,
) -> Trained:
    """Train, and return what was recorded.

    ``schedule`` maps the share of the training that is done to a factor of the learning rate; ``evaluate`` is called
    ten times, ``extra`` on each step; ``merit`` at the end (the mean of the last tenth of the losses by default).
    """
    optimizer = make_optimizer(lr * change.lr)
    for group in optimizer.param_groups:
        group["weight_decay"] = group.get("weight_decay", 0.0) + change.decay
    threshold = change.clip if change.clip is not None else clip * change.clip_times if clip else None
    meta: dict[str, object] = {"clip_threshold": threshold} if threshold else {}
    if schedule is not None:
        meta["scheduler"] = "LambdaLR"
    losses: list[float] = []
    with Tracker(model, optimizer=optimizer, every=EVERY, diagnosis=None, meta=meta) as tracker:
        for step in range(min(steps, change.stop or steps)):
            if schedule is not None:
                for group in optimizer.param_groups:
                    group["lr"] = lr * change.lr * schedule(step / steps)
            if zero_grad:
                optimizer.zero_grad()
            total = 0.0
            for part in range(accumulate):
                loss = batch_loss(step * accumulate + part) / accumulate
                loss.backward()
                total += loss.item()
            losses.append(total)
            tracker.step(loss=total, **(extra() if extra else {}))
            if threshold:
                nn.utils.clip_grad_norm_(model.parameters(), threshold)
            optimizer.step()
            if after_step is not None:
                after_step(step)
            if evaluate is not None and (step + 1) % (steps // 10) == 0:
                model.eval()
                with torch.no_grad():
                    tracker.epoch(**evaluate())
                model.train()
    with torch.no_grad():
        model.eval()
        last = merit() if merit else _mean(losses[-max(1, len(losses) // 10) :])
    return Trained(tracker.history, last if math.isfinite(last) else math.inf, _fell(losses))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _fell(losses: list[float]) -> bool:
    tenth = max(1, len(losses) // 10)
    return _mean(losses[-tenth:]) < _mean(losses[:tenth]) - 0.05 * abs(_mean(losses[:tenth]))


def no_worse(before: Trained, after: Trained, tolerance: float = 0.1) -> bool:
    """Tell whether a repeated training is no worse: by a tenth of the figure of merit at most."""
    return after.merit <= before.merit + tolerance * abs(before.merit) + 1e-3
