"""A small training with a Tracker, to try it out: `python -m pytracker demo`.

Trains a convolutional network on the handwritten digits that scikit-learn brings along, and prints what was tracked and
what the tracking cost, beside the cost of the loop that it replaces. Both are measured in the run itself.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from typing import Any

import click
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from ..errors import MissingExtraError
from ..history import History
from ..store import Run
from ..tracker import Tracker
from ..view import console as terminal
from ..view import sparkline, write_report

BATCH = 32
LOOP_EVERY = 5  # steps between two runs of the original loop, for comparison


@dataclass
class Costs:
    """Seconds that were measured in the training, one entry for each measurement."""

    training: list[float] = field(default_factory=list)
    tracking: list[float] = field(default_factory=list)
    loop: list[float] = field(default_factory=list)
    loop_norms: dict[int, float] = field(default_factory=dict)  # by step, to compare with what was tracked


def digits(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images, their labels, test images and theirs: 1,797 digits of 8 x 8 pixels, split 4 to 1."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("the demo", "scikit-learn", "demo") from error
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32, device="cpu").unsqueeze(1) / 16
    labels = torch.tensor(data.target, device="cpu")
    order = torch.randperm(len(images), generator=generator)
    train, test = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    return images[train], labels[train], images[test], labels[test]


def network() -> nn.Sequential:
    """Return a network of two convolutions and two linear layers."""
    layers = {
        "conv1": nn.Conv2d(1, 16, 3, padding=1),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(16, 32, 3, padding=1, stride=2),
        "relu2": nn.ReLU(),
        "flatten": nn.Flatten(),
        "hidden": nn.Linear(32 * 4 * 4, 64),
        "relu3": nn.ReLU(),
        "output": nn.Linear(64, 10),
    }
    return nn.Sequential(OrderedDict(layers))


def original_loop(model: nn.Module) -> dict[str, float]:
    """Return the total and the largest norm as the usual loop computes them: a kernel and a wait for each parameter."""
    total_norm, max_norm = 0.0, 0.0
    for _name, parameter in model.named_parameters():
        if parameter.grad is not None:
            norm = parameter.grad.data.norm(2).item()
            total_norm += norm**2
            max_norm = max(max_norm, norm)
    return {"grad_norm": total_norm**0.5, "grad_max": max_norm}


def train(data: Any, epochs: int, run: Run, seed: int, console: Console) -> tuple[Tracker, Costs]:
    """Train on what ``digits`` returned, track every step, and measure what each part took."""
    torch.manual_seed(seed)
    images, labels, test_images, test_labels = data
    batches = len(images) // BATCH
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=epochs * batches)
    costs, clock = Costs(), time.perf_counter
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Tracker(model, optimizer=optimizer, run=run) as tracker,
        Progress(*columns, console=console) as progress,
    ):
        bar = progress.add_task("training", total=epochs * batches)
        for epoch in range(epochs):
            for chosen in torch.randperm(len(images))[: batches * BATCH].view(batches, BATCH):
                begin = clock()
                logits = model(images[chosen])
                loss = nn.functional.cross_entropy(logits, labels[chosen])
                correct = (logits.argmax(1) == labels[chosen]).float().mean()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                before = clock()
                tracker.step(loss=loss, accuracy=correct)
                after = clock()
                if len(costs.training) % LOOP_EVERY == 0:
                    costs.loop_norms[len(costs.training)] = original_loop(model)["grad_norm"]
                    costs.loop.append(clock() - after)
                resumed = clock()
                optimizer.step()
                scheduler.step()
                costs.tracking.append(after - before)
                costs.training.append((before - begin) + (clock() - resumed))
                progress.advance(bar)
            with torch.no_grad():
                hits = (model(test_images).argmax(1) == test_labels).float().mean().item()
            tracker.epoch(val_accuracy=hits)
            progress.update(bar, description=f"epoch {epoch + 1}/{epochs}, {hits:.1%} of the test digits right")
    return tracker, costs


def series_table(history: History) -> Table:
    """Show the series of the training."""
    table = Table("series", "values", "first", "last", "min", "max", title="What was tracked at every step", box=SIMPLE)
    for name in ("loss", "accuracy", "lr", "grad_norm", "grad_max", "val_accuracy"):
        values = history[name].values
        figures = (values[0], values[-1], values.min(), values.max())
        table.add_row(name, sparkline(values, width=12), *(f"{figure:.4g}" for figure in figures))
    return table


def layer_table(history: History) -> Table:
    """Show the gradient norm of each parameter."""
    parameters = history.parameters
    _steps, norms = parameters.norms()
    table = Table(
        "gradient of", "shape", "L2 norm", "first", "last", "max", title="Gradient norms of each layer", box=SIMPLE
    )
    for info, values in zip(parameters.infos, norms.T, strict=True):
        shape = " x ".join(map(str, info.shape))
        figures = (values[0], values[-1], values.max())
        table.add_row(info.name, shape, sparkline(values, width=12), *(f"{figure:.4g}" for figure in figures))
    return table


def cost_table(costs: Costs) -> Table:
    """Show what one step took, with tracking and with the original loop."""
    step = median(costs.training)
    table = Table(
        "each step", "median", "mean", "share", "result", title="What it cost, measured in this run", box=SIMPLE
    )
    table.caption = "share: of a training step, by medians. A mean holds the drains, too."
    for name, seconds, result in [
        ("training", costs.training, ""),
        ("Tracker.step", costs.tracking, "6 moments a parameter, 3 scalars"),
        ("original loop", costs.loop, "2 norms"),
    ]:
        figures = (f"{median(seconds) * 1e6:.1f} us", f"{mean(seconds) * 1e6:.1f} us", f"{median(seconds) / step:.1%}")
        table.add_row(name, *figures, result)
    return table


def agreement(history: History, costs: Costs) -> float:
    """Return the largest relative difference between the norms that were tracked and those of the original loop."""
    tracked = history["grad_norm"]
    return max(abs(tracked[step] - norm) / norm for step, norm in costs.loop_norms.items())


def save_picture(console: Console, path: str) -> None:
    """Write what the console has shown as an SVG picture that fetches no font from elsewhere."""
    picture = console.export_svg(title="make demo")
    Path(path).write_text(re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL), encoding="utf-8")


@click.command()
@click.option("--epochs", default=5, show_default=True, type=click.IntRange(min=1), help="How long to train.")
@click.option("--seed", default=0, show_default=True, help="Seed of the split, the weights and the order.")
@click.option("--dir", "directory", default="runs", show_default=True, help="The folder of the run.")
@click.option("--report", default="report.html", show_default=True, help="The HTML page to draw the run into.")
@click.option("--picture", type=click.Path(dir_okay=False), help="Also write what is shown into this SVG file.")
def main(epochs: int, seed: int, directory: str, report: str, picture: str | None) -> None:
    """Train a small network on digits and show what was tracked.

    Example: pytracker demo --epochs 3
    """
    console = Console(record=picture is not None, width=88 if picture else None)
    data = digits(torch.Generator().manual_seed(seed))  # what is missing is told before a run is begun
    if find_spec("plotly") is None:
        raise MissingExtraError("the demo", "plotly", "demo")
    with Run(directory, config={"epochs": epochs, "batch": BATCH, "seed": seed}) as run:
        tracker, costs = train(data, epochs, run, seed, console)
    history = tracker.history
    for table in (series_table(history), layer_table(history), cost_table(costs)):
        console.print(table)
    difference = agreement(history, costs)
    console.print(f"largest difference between the tracked norm and the original loop's: {difference:.1e} (relative)")
    console.print(terminal.findings(finding.to_dict() for finding in tracker.findings))
    console.print(f"the run: {run.path}")
    console.print(f"its report: {write_report([run.path], report)}")
    if picture is not None:
        save_picture(console, picture)


if __name__ == "__main__":
    main()
