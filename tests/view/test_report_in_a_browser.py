"""The report of a real training, opened in a headless Chromium without a network."""

from __future__ import annotations

import pytest
from browser import MISSING, Browser

from pytracker.store import Run, load_run
from pytracker.view import build_charts, write_report

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
pytest.importorskip("plotly", reason="the report draws with plotly")

DRAWN = """
return [...document.querySelectorAll(".chart.line"), ...document.querySelectorAll(".chart.map")].map((element) => ({
  visible: element.getBoundingClientRect().width > 100 && element.querySelector(".main-svg") !== null,
  inside: element.getBoundingClientRect().right <= innerWidth + 1,
  paths: element.querySelectorAll(".scatterlayer .trace, .heatmaplayer .hm").length,
  points: element.calcdata.map((data) => data[0].z ? data[0].z.length * data[0].z[0].length : data.length),
}));
"""
VISIBLE = """
return [...document.querySelectorAll(".chart.line")].map((element) =>
  element.data.filter((trace) => trace.meta.run === {run}).every((trace) => trace.visible === {state}));
"""


def train(directory, name, lr, poisoned_step=None):
    """Train a small network on digits with a Tracker, as a user would."""
    torch = pytest.importorskip("torch", reason="trains a network")
    datasets = pytest.importorskip("sklearn.datasets", reason="brings the digits")
    from pytracker import Tracker

    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a network this small only waits for its own threads on a busy machine
    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, stride=2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(72, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    step = 0
    with (
        Run(directory, name=name, config={"lr": lr}) as run,
        Tracker(model, optimizer=optimizer, run=run, every=10) as tracker,
    ):
        run.set_meta(clip_threshold=1.0)
        for _ in range(5):
            for batch in torch.randperm(1400).view(28, 50):
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
                loss.backward()
                if step == poisoned_step:
                    model[3].bias.grad[0] = float("nan")
                tracker.step(loss=loss)
                model[3].bias.grad.nan_to_num_()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                step += 1
            with torch.no_grad():
                outputs = model(images[1400:])
            right = (outputs.argmax(1) == labels[1400:]).float().mean()
            tracker.epoch(val_loss=torch.nn.functional.cross_entropy(outputs, labels[1400:]), val_accuracy=right)
        run.log_finding(
            {"rule": "example", "severity": "warning", "first_step": 60, "last_step": 64, "evidence": "for the test"}
        )
    torch.set_num_threads(threads)
    return load_run(run.path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    return [train(directory, "slow", 0.05), train(directory, "fast", 0.5, poisoned_step=70)]


@pytest.fixture(scope="module")
def browser():
    window = Browser()
    yield window
    window.close()


@pytest.fixture
def page(runs, tmp_path, browser):
    browser.resize(1400, 900)
    browser.console()
    browser.open(write_report(runs, tmp_path / "report.html"))
    return browser


def expected_points(runs):
    """How many points each trace has been given; what is not finite is not drawn, but keeps its place."""
    charts = build_charts(runs)
    shown = charts["lines"] + [chart for chart in charts["maps"] if chart["run"] == 0]
    counts = []
    for chart in shown:
        sizes = []
        for trace in chart["data"]:
            if trace["type"] == "heatmap":
                rows, columns = map(int, trace["z"]["shape"].split(","))
                sizes.append(rows * columns)
            else:
                sizes.append(len(trace["x"]["bdata"]) * 3 // 4 // int(trace["x"]["dtype"][1:]))
        counts.append(sizes)
    return counts


@pytest.mark.parametrize("width", [1600, 390])
def test_every_chart_is_drawn_with_its_points_and_the_console_stays_empty(page, runs, tmp_path, width):
    page.resize(width, 900)
    page.open(tmp_path / "report.html")
    drawn = page.run(DRAWN)
    assert [chart["points"] for chart in drawn] == expected_points(runs)
    assert all(chart["visible"] and chart["inside"] for chart in drawn)
    assert all(chart["paths"] >= 1 for chart in drawn)
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    assert page.console() == []
    page.screenshot(tmp_path / f"report-{width}.png")
    assert (tmp_path / f"report-{width}.png").stat().st_size > 20_000


def test_the_legend_switches_a_run_in_every_chart(page):
    page.click(".chip[data-run='1']")
    assert all(page.run(VISIBLE.format(run=1, state="false")))
    assert all(page.run(VISIBLE.format(run=0, state="true")))
    page.click(".chip[data-run='1']")
    assert all(page.run(VISIBLE.format(run=1, state="true")))
    assert page.console() == []


def test_a_finding_leads_to_its_steps_in_every_chart(page):
    page.click("a[data-first='60']")
    ranges = page.run("return report.lines.map((chart) => document.getElementById(chart.id).layout.xaxis.range)")
    assert ranges == [[40, 84]] * len(ranges)
    assert page.console() == []


def test_zooming_one_chart_zooms_the_others(page):
    page.run("return Plotly.relayout('chart-0', {'xaxis.range': [10, 20]})")
    ranges = page.run("return report.lines.map((chart) => document.getElementById(chart.id).layout.xaxis.range)")
    assert ranges == [[10, 20]] * len(ranges)


def test_the_heat_maps_show_the_run_that_is_chosen_with_its_nan_marked(page):
    marked = "return document.getElementById('map-0').data.some((trace) => trace.name === 'not finite')"
    assert not page.run(marked)
    page.run(
        "const chooser = document.getElementById('map-run'); chooser.value = '1';"
        "chooser.dispatchEvent(new Event('change'));"
        "return new Promise((done) => setTimeout(done, 500))"
    )
    assert page.run(marked)
    labels = page.run("return document.getElementById('map-0').data[1].y")
    assert labels == ["3.bias"]
    assert page.console() == []


def test_the_scale_button_switches_between_linear_and_logarithmic(page):
    page.click("button.log[data-chart='chart-0']")
    assert page.run("return document.getElementById('chart-0').layout.yaxis.type") == "log"
    assert page.run("return document.querySelector('button.log').getAttribute('aria-pressed')") == "true"


def test_a_dark_system_gets_a_dark_page(page, runs, tmp_path):
    page.dark()
    page.open(tmp_path / "report.html")
    background = page.run("return getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(20, 23, 28)"
    assert page.console() == []
