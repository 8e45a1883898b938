"""The pictures of docs/diagnosis.md: for each rule a real training that shows the trouble, beside one that does not.

``python -m benchmarks.diagnosis.pictures`` trains them as the benchmark does, recorded by a Tracker and judged drain by
drain, and writes docs/pictures/RULE.svg. It fails where a rule finds nothing on the left, or anything on the right.
"""

from __future__ import annotations

import argparse
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from pytracker.diagnostics import RULES, SEVERITIES, Finding

from . import models, panels
from .panels import Draw, Shown
from .score import ALARM, judge
from .training import Case, Loop, Plan, Recorded, train
from .troubles import TROUBLES, Trouble, rules

FOLDER = Path("docs/pictures")
STYLE = {
    "svg.hashsalt": "pytracker",
    "svg.fonttype": "none",  # text stays text, small and sharp
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": 9,
    "text.color": panels.INK,
    "axes.edgecolor": panels.SOFT,
    "axes.labelcolor": panels.INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": panels.FAINT,
    "grid.linewidth": 0.5,
    "xtick.color": panels.SOFT,
    "ytick.color": panels.SOFT,
    "legend.fontsize": 7.5,
    "legend.framealpha": 0.85,
    "legend.edgecolor": panels.FAINT,
}


@dataclass(frozen=True)
class Panel:
    """A training, and what sets it apart."""

    title: str
    case: Case


@dataclass(frozen=True)
class Picture:
    """Two trainings, and what is drawn of each, from top to bottom."""

    rule: str
    trouble: Panel
    healthy: Panel
    rows: tuple[Draw, ...]
    around: int | None = None  # only so many steps before and after the first step of the finding


def _deep(depth: int, activation: type[nn.Module], gain: float) -> Callable[[Plan], None]:
    """Return a plan's change: the networks of "deep_sigmoid" and "exploding", as they should be initialised."""

    def make(features: int, outputs: int) -> nn.Module:
        net = models.mlp(features, outputs, depth=depth, activation=activation)
        for layer in net[:-1]:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=gain / layer.in_features**0.5)
        return net

    def prepare(plan: Plan) -> None:
        plan.make_model = make

    return prepare


def _diverge(loop: Loop, step: int) -> bool:
    if step == loop.plan.steps // 2:
        for group in loop.optimizer.param_groups:
            group["lr"] *= 60.0
    return False


MORE = {
    "deep_relu": Trouble(rules(), prepare=_deep(20, nn.ReLU, 2.0**0.5)),
    "deep_tanh": Trouble(rules(), prepare=_deep(16, nn.Tanh, 1.0)),
    "diverges": Trouble(rules("loss_diverged"), at=_diverge),
    "five_layers": Trouble(rules(), prepare=_deep(5, nn.ReLU, 2.0**0.5)),
}
"""The benchmark has no use for these; nothing is wrong with most of them."""


def _case(trouble: str, model: str, dataset: str, optimizer: str, batch_size: int = 64, seed: int = 0) -> Case:
    return Case(trouble, model, dataset, optimizer, batch_size, seed, "tune")


MLP_SGD, MLP_ADAM = ("mlp", "digits", "SGD"), ("mlp", "digits", "Adam")

PICTURES = (
    Picture(
        "loss_not_decreasing",
        Panel("learning rate 100 times too low", _case("lr_too_low", *MLP_SGD)),
        Panel("the usual learning rate", _case("healthy", *MLP_SGD)),
        (panels.loss_and_slope,),
    ),
    Picture(
        "loss_diverged",
        Panel("60 times the learning rate from the middle on", _case("diverges", *MLP_SGD)),
        Panel("the usual learning rate", _case("healthy", *MLP_SGD)),
        (panels.loss,),
    ),
    Picture(
        "not_in_optimizer",
        Panel("the optimizer of a copy", _case("copied", *MLP_SGD)),
        Panel("the model's own optimizer", _case("healthy", *MLP_SGD)),
        (panels.loss,),
    ),
    Picture(
        "loss_oscillating",
        Panel("learning rate 20 times too high", _case("steps_too_long", *MLP_ADAM)),
        Panel("the usual learning rate", _case("healthy", *MLP_ADAM)),
        (panels.loss,),
    ),
    Picture(
        "loss_spike",
        Panel("three corrupted batches", _case("corrupted_batches", "cnn", "digits", "Adam")),
        Panel("the same data, intact", _case("healthy", "cnn", "digits", "Adam")),
        (panels.loss_on_log_scale, panels.robust_z),
    ),
    Picture(
        "overfitting",
        Panel("40 samples, no regularisation", _case("overfit", "mlp", "diabetes", "Adam", 16)),
        Panel("all samples, dropout and weight decay", _case("healthy", "mlp", "diabetes", "Adam", 16)),
        (panels.both_losses,),
    ),
    Picture(
        "gradient_exploding",
        Panel("16 tanh layers, initialised 4 times too large", _case("exploding", *MLP_ADAM)),
        Panel("the same network, well initialised", _case("deep_tanh", *MLP_ADAM)),
        (panels.norms, panels.profile),
    ),
    Picture(
        "gradients_add_up",
        Panel("zero_grad() is forgotten", _case("never_zeroed", *MLP_SGD)),
        Panel("the same loop with it", _case("healthy", *MLP_SGD)),
        (panels.norms,),
    ),
    Picture(
        "gradient_vanishing",
        Panel("20 sigmoid layers, initialised too small", _case("deep_sigmoid", *MLP_ADAM)),
        Panel("20 ReLU layers with He's initialisation", _case("deep_relu", *MLP_ADAM)),
        (panels.profile,),
    ),
    Picture(
        "gradient_nonfinite",
        Panel("one NaN put into one gradient at step 250", _case("nan", *MLP_SGD)),
        Panel("the same training without it", _case("healthy", *MLP_SGD)),
        (panels.heat,),
        around=12,
    ),
    Picture(
        "dead_parameter",
        Panel("second layer's ReLUs pushed far below zero", _case("dead_relu", *MLP_ADAM)),
        Panel("the same network as it is", _case("healthy", *MLP_ADAM)),
        (panels.heat,),
    ),
    Picture(
        "layer_imbalance",
        Panel("one layer's gradient multiplied by 1e-4", _case("imbalanced", *MLP_SGD)),
        Panel("the same network as it is", _case("five_layers", *MLP_SGD)),
        (panels.layers,),
    ),
    Picture(
        "update_ratio",
        Panel("Adam with 100 times the learning rate", _case("lr_too_high", *MLP_ADAM)),
        Panel("the usual learning rate", _case("healthy", *MLP_ADAM)),
        (panels.ratios,),
    ),
    Picture(
        "always_clipped",
        Panel("clipped at 0.001", _case("clipped", *MLP_SGD)),
        Panel("clipped at 5", _case("healthy", *MLP_SGD, seed=2)),
        (panels.norms,),
    ),
    Picture(
        "constant",
        Panel("a loss that is cut off from the model", _case("constant_loss", *MLP_SGD)),
        Panel("the same loop with the loss it should have", _case("healthy", *MLP_SGD)),
        (panels.loss,),
    ),
    Picture(
        "learning_rate",
        Panel("30 times the learning rate from the middle on", _case("lr_jump", *MLP_SGD)),
        Panel("a cosine schedule", _case("healthy", *MLP_SGD, seed=1)),
        (panels.learning_rate,),
    ),
)


@cache
def _trained(case: Case) -> tuple[Recorded, list[Finding]]:
    recorded = train(case)
    return recorded, judge(recorded).findings


def _shown(rule: str, panel: Panel, expected: bool) -> Shown:
    """Train one side, and make sure that the rule says of it what the picture is there to show."""
    recorded, findings = _trained(panel.case)
    finding = next((each for each in findings if each.rule == rule), None)
    found = finding is not None and (finding.rank >= SEVERITIES.index(ALARM) or bool(finding.follows_from))
    if expected and not found:
        raise AssertionError(f"{rule}: not found in {panel.case.name}; findings: {[str(each) for each in findings]}")
    if not expected and finding is not None:
        raise AssertionError(f"{rule}: found in {panel.case.name}, which should be free of it: {finding}")
    return Shown(rule, recorded.history, finding)


def draw(picture: Picture) -> Figure:
    """Train both sides and draw them."""
    trouble, healthy = picture.trouble, picture.healthy
    sides = [_shown(picture.rule, trouble, True), _shown(picture.rule, healthy, False)]
    rows, caption = len(picture.rows), 0.6  # inches for what the finding says
    height = 1.0 + 2.1 * rows + caption
    figure = Figure(figsize=(10, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(rect=(0, caption / height, 1, 1 - caption / height), wspace=0.04)
    grid = figure.subplots(rows, 2, squeeze=False, sharey="row")
    for row, draw_panel in enumerate(picture.rows):
        for axes, side in zip(grid[row], sides, strict=True):
            draw_panel(axes, side)
            if axes.get_legend() is None:
                axes.legend(loc="best")
            if picture.around:
                axes.set_xlim(*(sides[0].finding.first_step + sign * picture.around for sign in (-1, 1)))
            axes.tick_params(labelleft=True)
        if draw_panel is panels.heat:
            panels.colors_of_heat(figure, list(grid[row]))
    for column, (side, panel) in enumerate(zip(sides, (trouble, healthy), strict=True)):
        _explain(grid[0, column], grid[-1, column], side, panel)
    return figure


def _explain(top: Axes, bottom: Axes, side: Shown, panel: Panel) -> None:
    """Write what was trained above a column of panels, and what the rule says below it."""
    case, upper = panel.case, panel.case.model in ("mlp", "cnn", "rnn")
    about = (
        f"{case.model.upper() if upper else case.model}, {case.dataset}, {case.optimizer}, batches of {case.batch_size}"
    )
    top.set_title(f"{panel.title}\n", loc="left", fontsize=10, fontweight="bold")
    top.text(0, 1.03, about, transform=top.transAxes, fontsize=8, color=panels.SOFT)
    told = f"nothing found by {side.rule}"
    if side.finding is not None:
        root = f", follows from {side.finding.follows_from}" if side.finding.follows_from else ""
        told = f"{side.finding.severity}{root}: {side.finding.evidence}"
    note = bottom.annotate(
        "\n".join(textwrap.wrap(told, 76)),
        (0, 0),
        xycoords="axes fraction",
        xytext=(0, -34),
        textcoords="offset points",
        va="top",
        fontsize=8,
        color=panels.RED if side.finding else panels.GREEN,
    )
    note.set_in_layout(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rules", nargs="*", help="only the pictures of these rules")
    parser.add_argument("--png", type=Path, help="write PNG files into this folder instead")
    arguments = parser.parse_args()
    missing = RULES.keys() - {picture.rule for picture in PICTURES}
    if missing:
        raise AssertionError(f"rules without a picture: {', '.join(sorted(missing))}")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="no parameter had a gradient")
    TROUBLES.update(MORE)
    mpl.use("svg")
    folder = arguments.png or FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for picture in PICTURES:
        if arguments.rules and picture.rule not in arguments.rules:
            continue
        path = folder / f"{picture.rule}.{'png' if arguments.png else 'svg'}"
        with mpl.rc_context(STYLE):
            figure = draw(picture)
            figure.savefig(path, dpi=110, metadata=None if arguments.png else {"Date": None, "Creator": None})
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
