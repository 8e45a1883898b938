"""One small training, recorded: ``train(case)`` returns a ``Recorded`` with the history and what is true of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from pytracker import Tracker
from pytracker.history import History

from . import data as data_sets
from . import models
from .observed import Facts, Observed, facts
from .troubles import HEALTHY, TROUBLES, Trouble

EVERY = 20  # steps between drains
PROBE = 128  # training samples whose loss is watched

LEARNING_RATE = {
    ("mlp", "SGD"): 0.1,
    ("cnn", "SGD"): 0.1,
    ("rnn", "SGD"): 0.3,
    ("transformer", "SGD"): 0.1,
    ("mlp", "Adam"): 3e-3,
    ("cnn", "Adam"): 3e-3,
    ("rnn", "Adam"): 5e-3,
    ("transformer", "Adam"): 1e-3,
}
STEPS = {"digits": 500, "breast_cancer": 240, "diabetes": 240, "wine": 200}


@dataclass(frozen=True)
class Case:
    """What is trained: everything that the result depends on."""

    trouble: str
    model: str
    dataset: str
    optimizer: str
    batch_size: int
    seed: int
    half: str  # "tune" or "test": thresholds are set on the one, figures come from the other

    @property
    def name(self) -> str:
        return f"{self.trouble}-{self.model}-{self.dataset}-{self.optimizer}-b{self.batch_size}-s{self.seed}"


@dataclass
class Plan:
    """The settings of one training, for a trouble to spoil before anything is built."""

    model: str
    data: data_sets.Data
    optimizer: str
    batch_size: int
    seed: int
    lr: float
    steps: int
    weight_decay: float = 1e-2
    dropout: float = 0.0
    clip: float | None = None
    scheduler: str | None = None
    make_model: Callable[[int, int], nn.Module] | None = None


@dataclass
class Loop:
    """A training that runs, for a trouble to spoil from within."""

    plan: Plan
    model: nn.Module
    optimizer: torch.optim.Optimizer
    criterion: Callable[[Tensor, Tensor], Tensor]
    step: int = 0
    steps_optimizer: bool = True
    x: Tensor = field(default_factory=lambda: torch.empty(0))
    y: Tensor = field(default_factory=lambda: torch.empty(0))
    truth: dict[str, Any] = field(default_factory=dict)
    observed: Observed = field(default_factory=Observed)


@dataclass
class Recorded:
    """A finished training."""

    case: Case
    history: History
    truth: dict[str, Any]
    observed: Observed
    twin: Observed

    @property
    def facts(self) -> Facts:
        """What holds of it, whatever was planted."""
        return facts(self.observed, self.twin)


def plan_of(case: Case) -> Plan:
    data = data_sets.load(case.dataset)
    lr = LEARNING_RATE[case.model, "SGD" if case.optimizer == "SGD" else "Adam"]
    dropout = 0.1 if case.model == "transformer" else 0.2
    if data.regression and case.model != "rnn":
        lr *= 0.3
    return Plan(case.model, data, case.optimizer, case.batch_size, case.seed, lr, STEPS[case.dataset], dropout=dropout)


def train(case: Case) -> Recorded:
    """Train one case, and its twin."""
    trouble, plan = TROUBLES[case.trouble], plan_of(case)
    if trouble is HEALTHY:
        plan.scheduler = "cosine" if case.seed == 1 else None
        plan.clip = 5.0 if case.seed == 2 else None
    trouble.prepare(plan)
    meta = {"batch_size": plan.batch_size, "scheduler": plan.scheduler}
    if plan.clip is not None:
        meta["clip_threshold"] = plan.clip
    loop = _build(plan)
    trouble.build(loop)
    with Tracker(loop.model, optimizer=loop.optimizer, every=EVERY, diagnosis=None, meta=meta) as tracker:
        _run(loop, trouble, lambda loss, n: tracker.step(loss=loss, n=n))
    steps, losses = zip(*loop.observed.validation, strict=True)
    tracker.history["val_loss"].extend(losses, steps)
    twin = loop.observed if trouble is HEALTHY else _twin(replace(case, trouble="healthy"))
    return Recorded(case, tracker.history, loop.truth, loop.observed, twin)


@cache
def _twin(case: Case) -> Observed:
    loop = _build(plan_of(case))
    _run(loop, HEALTHY, lambda loss, n: None)
    return loop.observed


def _run(loop: Loop, trouble: Trouble, on_step: Callable[[Tensor, int], None]) -> None:
    """Train, and observe."""
    plan, seen = loop.plan, loop.observed
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(loop.optimizer, plan.steps)
    batches = torch.Generator().manual_seed(plan.seed)
    evaluate_every = max(5, plan.steps // 30)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(plan.steps):
        loop.step = step
        if len(order) < min(plan.batch_size, len(plan.data.x)):
            order = torch.randperm(len(plan.data.x), generator=batches)
        batch, order = order[: plan.batch_size], order[plan.batch_size :]
        loop.x, loop.y = plan.data.x[batch], plan.data.y[batch]
        seen.probe.append(_evaluate(loop, plan.data.x[:PROBE], plan.data.y[:PROBE]))
        corrupted = trouble.at(loop, step)
        loop.optimizer.zero_grad()
        loss = loop.criterion(loop.model(loop.x), loop.y)
        loss.backward()
        seen.losses.append(loss.item())
        if corrupted:
            seen.corrupted.append(step)
        norms = [float(weight.grad.double().norm()) for weight in loop.model.parameters() if weight.grad is not None]
        seen.norms.append(math.hypot(*norms))
        first = next(weight for weight in loop.model.parameters() if weight.ndim > 1)
        seen.first_norms.append(float(first.grad.double().norm()))
        on_step(loss, len(batch))
        if plan.clip is not None:
            nn.utils.clip_grad_norm_(loop.model.parameters(), plan.clip)
        if loop.steps_optimizer:
            loop.optimizer.step()
        if plan.scheduler == "cosine":
            scheduler.step()
        if (step + 1) % evaluate_every == 0:
            seen.validation.append((step, _evaluate(loop, plan.data.x_val, plan.data.y_val)))


def _build(plan: Plan) -> Loop:
    torch.manual_seed(1000 + plan.seed)
    features = plan.data.x.shape[1]
    if plan.make_model is not None:
        model = plan.make_model(features, plan.data.outputs)
    else:
        model = models.build(plan.model, features, plan.data.outputs, plan.dropout)
    if plan.optimizer == "SGD":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), plan.lr, weight_decay=plan.weight_decay)
    else:
        optimizer = getattr(torch.optim, plan.optimizer)(model.parameters(), plan.lr, weight_decay=plan.weight_decay)
    return Loop(plan, model, optimizer, _regression_loss if plan.data.regression else nn.functional.cross_entropy)


def _regression_loss(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(output.squeeze(1), target)


@torch.no_grad()
def _evaluate(loop: Loop, x: Tensor, y: Tensor) -> float:
    loop.model.eval()
    loss = loop.criterion(loop.model(x), y).item()
    loop.model.train()
    return loss
