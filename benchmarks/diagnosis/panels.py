"""What the pictures of docs/diagnosis.md show: one function for each kind of panel, all drawn from a history."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from numpy.typing import NDArray

from pytracker.columns import INFS, NANS, SUM_SQ
from pytracker.diagnostics import RULES, Finding, View
from pytracker.evidence import MAD_TO_SIGMA, log10, running_median, theil_sen, thin
from pytracker.history import History
from pytracker.rules import update_ratios

INK, SOFT, FAINT = "#24292f", "#57606a", "#d0d7de"
BLUE, PALE, GREEN, RED, ORANGE = "#0969da", "#9ec5f5", "#1a7f37", "#cf222e", "#bc4c00"
HEAT = LinearSegmentedColormap.from_list("heat", ["#eaf2fb", "#9ec5f5", "#0969da", "#0a3069"])
ZERO, BAD = "#f5c35b", RED


@dataclass(frozen=True)
class Shown:
    """One training as a panel sees it: its history, the rule, and what the rule found (None: nothing)."""

    rule: str
    history: History
    finding: Finding | None

    def setting(self, name: str) -> float:
        """Return the default of one of the rule's settings."""
        return float(inspect.signature(RULES[self.rule].function).parameters[name].default)

    def view(self, stop: int | None = None) -> View:
        return View(self.history, stop=stop, rule=self.rule)

    @property
    def looks(self) -> NDArray[np.int64]:
        """The steps up to which the rule looked, one for each drain."""
        return self.history.parameters.last_step + 1


Draw = Callable[[Axes, Shown], None]


def loss(axes: Axes, shown: Shown) -> None:
    """The loss of each step, and its running median over 15."""
    _loss(axes, shown)
    axes.set_ylabel("loss")
    _from_zero(axes, 1.1 * float(np.nanpercentile(shown.history["loss"].values, 99.5)))


def loss_on_log_scale(axes: Axes, shown: Shown) -> None:
    """The same, where single losses are far above the others."""
    _loss(axes, shown)
    _log(axes, "loss")


def _loss(axes: Axes, shown: Shown) -> None:
    series = shown.history["loss"]
    axes.plot(series.steps, series.values, color=PALE, linewidth=0.8, label="loss of each batch")
    finite = np.isfinite(series.values)
    median = running_median(series.values[finite], 15)
    axes.plot(series.steps[finite], median, color=BLUE, linewidth=1.4, label="running median, 15 steps")
    _mark(axes, shown)


def loss_and_slope(axes: Axes, shown: Shown) -> None:
    """The loss, and the robust line through its medians with the confidence interval of its slope."""
    loss(axes, shown)
    series = shown.history["loss"]
    centres, medians = thin(series.steps, series.values)
    slope = theil_sen(centres, medians)
    middle, level = np.median(centres), np.median(medians)
    line = level + slope.estimate * (centres - middle)
    label = f"Theil-Sen slope: {1e3 * slope.estimate:.2g} in 1000 steps"
    axes.plot(centres, line, color=ORANGE, linewidth=1.4, linestyle="--", label=label)


def robust_z(axes: Axes, shown: Shown) -> None:
    """The robust z-score of each loss against those before it."""
    series, window = shown.history["loss"], int(shown.setting("window"))
    values, scores = series.values, np.full(len(series), np.nan)
    for place in range(30, len(values)):
        before = values[max(0, place - window) : place]
        scores[place] = min(_score(before, values[place]), _score(np.log(before), np.log(values[place])))
    axes.plot(series.steps, scores, color=BLUE, linewidth=0.8, label=f"robust z, {window} losses before")
    axes.axhline(shown.setting("z"), color=RED, linestyle="--", linewidth=1, label=f"z = {shown.setting('z'):g}")
    axes.set_ylabel("robust z")
    axes.set_yscale("symlog", linthresh=5, linscale=1.5)
    axes.set_yticks([-5, 0, 5, 10, 20, 50], ["-5", "0", "5", "10", "20", "50"])
    axes.minorticks_off()
    axes.set_ylim(-5, 50)
    _mark(axes, shown)


def _score(before: NDArray[np.float64], now: float) -> float:
    level = np.median(before)
    deviation = MAD_TO_SIGMA * np.median(np.abs(before - level))
    return float((now - level) / max(deviation, 1e-3 * abs(level), 1e-12))


def both_losses(axes: Axes, shown: Shown) -> None:
    """The training loss as it is smoothed, the validation loss, and its lowest point."""
    training, validation = shown.history["loss"], shown.history["val_loss"]
    axes.plot(
        training.steps, running_median(training.values, 15), color=BLUE, linewidth=1.2, label="training, smoothed"
    )
    axes.plot(validation.steps, validation.values, color=ORANGE, marker=".", linewidth=1.2, label="validation")
    smooth = running_median(validation.values, 3)
    best = int(np.argmin(smooth))
    low = (validation.steps[best], smooth[best])
    axes.plot(*low, color=GREEN, marker="*", markersize=11, linestyle="", label=f"lowest, step {low[0]}", zorder=3)
    axes.set_ylabel("loss")
    _from_zero(axes, 1.1 * float(max(training.values[:15].max(), validation.values.max())))
    _mark(axes, shown)


def norms(axes: Axes, shown: Shown) -> None:
    """The gradient norm of each step, against the first ones and against where clipping begins."""
    series = shown.history["grad_norm"]
    axes.plot(series.steps, series.values, color=BLUE, linewidth=0.9, label="gradient norm")
    clip = shown.history.meta.get("clip_threshold")
    if shown.rule == "always_clipped":
        axes.axhline(clip, color=RED, linestyle="--", linewidth=1, label=f"clipped at {clip:g}")
    else:
        usual = float(np.median(series.values[:20]))
        axes.axhline(usual, color=SOFT, linestyle=":", linewidth=1, label="median of the first 20")
        times = shown.setting("growth")
        axes.axhline(times * usual, color=RED, linestyle="--", linewidth=1, label=f"{times:g} times that")
    _log(axes, "gradient norm")
    _mark(axes, shown)


def profile(axes: Axes, shown: Shown) -> None:
    """The rms gradient of each weight matrix, from the input to the loss; the bold one when the rule was sure."""
    last = None
    for stop in shown.looks[2:]:
        level = shown.view(int(stop)).weight_levels
        axes.plot(np.arange(1, len(level) + 1), 10.0**level, color=PALE, linewidth=0.6)
        last = level if last is None else last
    axes.plot(np.arange(1, len(last) + 1), 10.0**last, color=BLUE, marker="o", markersize=3.5, linewidth=1.5)
    axes.set_xlabel("weight matrix, from the input (1) to the loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _log(axes, "rms gradient element")
    handles = [
        Line2D([], [], color=BLUE, marker="o", markersize=3.5, label=f"by step {shown.looks[2] - 1}"),
        Line2D([], [], color=PALE, label="each later drain"),
    ]
    axes.legend(handles=handles)


def heat(axes: Axes, shown: Shown) -> None:
    """The rms gradient of each parameter at each step; exact zeros and values that aren't finite stand out."""
    steps, rows = shown.history.parameters.rows(since=0)
    infos = shown.history.parameters.infos
    numel = np.array([info.numel for info in infos], np.float64)
    level = log10(np.sqrt(rows[:, :, SUM_SQ] / numel)).T
    placed = {"aspect": "auto", "interpolation": "none", "extent": (steps[0] - 0.5, steps[-1] + 0.5, len(infos), 0.0)}
    axes.imshow(level, cmap=HEAT, vmin=-4, vmax=0, **placed)
    for hit, color in (((rows[:, :, SUM_SQ] == 0).T, ZERO), ((rows[:, :, NANS] + rows[:, :, INFS] > 0).T, BAD)):
        over = np.ma.masked_where(~hit, np.ones(hit.shape))
        flat = LinearSegmentedColormap.from_list("flat", [color, color])
        axes.imshow(over, cmap=flat, **placed)
    axes.set_yticks(np.arange(len(infos)) + 0.5, [info.name for info in infos])
    axes.grid(visible=False)
    _mark(axes, shown)
    handles = [Patch(color=ZERO, label="exactly zero"), Patch(color=BAD, label="NaN or Inf")]
    wanted = handles[:1] if shown.rule == "dead_parameter" else handles[1:]
    axes.legend(handles=[*wanted, *axes.get_legend_handles_labels()[0]], loc="upper right")


def colors_of_heat(figure: Figure, axes: list[Axes]) -> None:
    """Put the scale of ``heat`` beside a row of panels."""
    scale = FuncFormatter(lambda value, _: f"1e{value:.0f}")
    figure.colorbar(
        axes[0].images[0], ax=axes, pad=0.02, ticks=range(-4, 1), format=scale, label="rms gradient element"
    )


def layers(axes: Axes, shown: Shown) -> None:
    """The rms gradient of each weight matrix over time, and how far from the median one it may be."""
    levels = np.array([shown.view(int(stop)).weight_levels for stop in shown.looks])
    median, far = np.nanmedian(levels, axis=1), shown.setting("decades")
    named = set(shown.finding.parameters) if shown.finding else set()
    weights = shown.view().layout.weights
    at = shown.looks - 1
    for place, level in zip(weights, levels.T, strict=True):
        name = shown.history.parameters.infos[place].name
        out = name in named
        axes.plot(
            at, 10.0**level, color=RED if out else BLUE, linewidth=1.6 if out else 0.9, label=name if out else None
        )
    axes.plot(at, 10.0**median, color=INK, linewidth=1.4, linestyle=":", label="median of the layers")
    band = (10.0 ** (median - far), 10.0 ** (median + far))
    axes.fill_between(at, *band, color=FAINT, alpha=0.5, linewidth=0, label=f"within {10**far:g} times")
    _log(axes, "rms gradient element")
    _mark(axes, shown)


def ratios(axes: Axes, shown: Shown) -> None:
    """By how much a step changes each weight matrix, and what is usual."""
    values = np.array([update_ratios(shown.view(int(stop))) for stop in shown.looks])
    at = shown.looks - 1
    lines = axes.plot(at, values, color=PALE, linewidth=1.2)
    lines[0].set_label("each weight matrix")
    axes.plot(at, np.nanmedian(values, axis=1), color=BLUE, linewidth=1.6, label="median weight matrix")
    axes.axhline(1e-3, color=GREEN, linestyle=":", linewidth=1.2, label="usual: 1e-3")
    high = shown.setting("high")
    axes.axhline(high, color=RED, linestyle="--", linewidth=1, label=f"too high: {high:g}")
    axes.set_ylim(bottom=3e-4)
    _log(axes, "update / weight")
    _mark(axes, shown)


def learning_rate(axes: Axes, shown: Shown) -> None:
    """The learning rate of each step."""
    rates = shown.history["lr"]
    axes.plot(rates.steps, rates.values, color=BLUE, linewidth=1.4, label="learning rate")
    _log(axes, "learning rate")
    axes.set_ylim(bottom=1e-4)
    _mark(axes, shown)


def _mark(axes: Axes, shown: Shown) -> None:
    """Say where the trouble begins, and shade where it was seen."""
    axes.set_xlabel("step")
    axes.set_xlim(-0.02 * shown.history.last_step, 1.02 * shown.history.last_step)
    if shown.finding is None:
        return
    first, last = shown.finding.first_step, shown.finding.last_step
    if axes.images:  # there the colours say how long
        axes.axvline(first - 0.5, color=INK, linestyle="--", linewidth=1.3, label=f"first_step {first}")
    else:
        axes.axvspan(first, last, color=RED, alpha=0.07, linewidth=0)
        axes.axvline(first, color=RED, linewidth=1.3, label=f"first_step {first}")


def _from_zero(axes: Axes, top: float) -> None:
    """Let the axis go from zero to ``top``, or higher where the panel beside it needs that."""
    axes.set_ylim(0.0, top if axes.get_autoscaley_on() else max(top, axes.get_ylim()[1]))


def _log(axes: Axes, label: str) -> None:
    axes.set_yscale("log")
    axes.set_ylabel(label)
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"1e{np.log10(value):.0f}"))
