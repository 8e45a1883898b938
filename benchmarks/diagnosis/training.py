"""One small training, recorded: ``train(case)`` returns a ``Recorded`` with the history and what is true of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pytracker.history import History
from pytracker.parameters import ParameterInfo, summarize

from . import data as data_sets
from . import models
from .troubles import TROUBLES

EVERY = 20  # steps between drains

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


@dataclass
class Recorded:
    """A finished training."""

    case: Case
    history: History
    truth: dict[str, Any]


def plan_of(case: Case) -> Plan:
    data = data_sets.load(case.dataset)
    lr = LEARNING_RATE[case.model, "SGD" if case.optimizer == "SGD" else "Adam"]
    dropout = 0.1 if case.model == "transformer" else 0.2
    if data.regression and case.model != "rnn":
        lr *= 0.3
    plan = Plan(case.model, data, case.optimizer, case.batch_size, case.seed, lr, STEPS[case.dataset], dropout=dropout)
    if case.trouble == "healthy" and case.seed == 1:
        plan.scheduler = "cosine"
    if case.trouble == "healthy" and case.seed == 2:
        plan.clip = 5.0
    TROUBLES[case.trouble].prepare(plan)
    return plan


def train(case: Case) -> Recorded:
    torch.manual_seed(1000 + case.seed)
    trouble = TROUBLES[case.trouble]
    plan = plan_of(case)
    loop = _build(plan)
    trouble.build(loop)
    recorder = Recorder(loop)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(loop.optimizer, plan.steps)
    batches = torch.Generator().manual_seed(case.seed)
    evaluate_every = max(5, plan.steps // 30)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(plan.steps):
        loop.step = step
        if len(order) < min(plan.batch_size, len(plan.data.x)):
            order = torch.randperm(len(plan.data.x), generator=batches)
        batch, order = order[: plan.batch_size], order[plan.batch_size :]
        loop.x, loop.y = plan.data.x[batch], plan.data.y[batch]
        trouble.at(loop, step)
        loop.optimizer.zero_grad()
        loss = loop.criterion(loop.model(loop.x), loop.y)
        loss.backward()
        recorder.step(loss)
        if plan.clip is not None:
            nn.utils.clip_grad_norm_(loop.model.parameters(), plan.clip)
        if loop.steps_optimizer:
            loop.optimizer.step()
        if plan.scheduler == "cosine":
            scheduler.step()
        if (step + 1) % evaluate_every == 0:
            recorder.epoch(_validate(loop))
        recorder.drain_if_due()
    recorder.drain()
    return Recorded(case, recorder.history, loop.truth)


def _build(plan: Plan) -> Loop:
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
def _validate(loop: Loop) -> float:
    loop.model.eval()
    loss = loop.criterion(loop.model(loop.plan.data.x_val), loop.plan.data.y_val).item()
    loop.model.train()
    return loss


class Recorder:
    """Fills a history from a plain training loop."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.history = History()
        named = list(loop.model.named_parameters())
        self.parameters = [parameter for _, parameter in named]
        self.numel = np.array([parameter.numel() for parameter in self.parameters])
        self.starts = np.concatenate([[0], np.cumsum(self.numel)[:-1]])
        self.history.parameters.infos = [
            ParameterInfo(name, tuple(parameter.shape), "float32", "", parameter.numel()) for name, parameter in named
        ]
        plan = loop.plan
        self.history.meta.update(
            optimizer=plan.optimizer, batch_size=plan.batch_size, scheduler=plan.scheduler is not None, every=EVERY
        )
        if plan.clip is not None:
            self.history.meta["clip_threshold"] = plan.clip
        self.rows: list[np.ndarray] = []

    def step(self, loss: Tensor) -> None:
        missing = np.array([parameter.grad is None for parameter in self.parameters])
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).detach().flatten() for p in self.parameters]
        )
        values = flat.double().numpy()
        columns = [
            np.add.reduceat(values, self.starts),
            np.add.reduceat(values * values, self.starts),
            np.maximum.reduceat(np.abs(values), self.starts),
            np.add.reduceat((values == 0).astype(np.float64), self.starts),
            np.add.reduceat(np.isnan(values).astype(np.float64), self.starts),
            np.add.reduceat(np.isinf(values).astype(np.float64), self.starts),
        ]
        row = np.stack(columns, axis=1)
        row[missing] = np.nan
        self.rows.append(row)
        present = row[~missing]
        step = self.loop.step
        self.history["loss"].append(loss.item(), step)
        self.history["lr"].append(self.loop.optimizer.param_groups[0]["lr"], step)
        self.history["grad_norm"].append(float(np.sqrt(present[:, 1].sum())), step)
        self.history["grad_max"].append(float(np.sqrt(present[:, 1].max())), step)

    def epoch(self, val_loss: float) -> None:
        self.history["val_loss"].append(val_loss, self.loop.step)

    def drain_if_due(self) -> None:
        if len(self.rows) == EVERY:
            self.drain()

    def drain(self) -> None:
        if not self.rows:
            return
        last = self.loop.step
        steps = np.arange(last - len(self.rows) + 1, last + 1)
        rows = np.stack(self.rows)
        norms = [float(parameter.detach().double().norm()) for parameter in self.parameters]
        self.history.parameters.append_rows(steps, rows)
        self.history.parameters.append(summarize(steps, rows, self.numel, np.array(norms)))
        self.rows = []
