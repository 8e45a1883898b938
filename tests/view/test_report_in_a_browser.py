"""The report of a real training, opened in a headless Chromium without a network."""

from __future__ import annotations

import json
import math
import sqlite3
from contextlib import closing

import numpy as np
import pytest
from browser import DRAWN, MISSING, Browser

from pytracker.history import summarize
from pytracker.store import Run, load_run
from pytracker.view import write_report

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
pytest.importorskip("plotly", reason="the report draws with plotly")

LINES = "[...cards.values()].filter((card) => card.kind === 'line' && !card.element.hidden)"
TALL = 9000  # pixels: so that all charts are in view


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
            {"rule": "loss_spike", "severity": "warning", "first_step": 60, "last_step": 64, "evidence": "for the test"}
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
    return opened(browser, runs, tmp_path)


def opened(browser, runs, tmp_path, width=1400):
    browser.resize(width, TALL)
    browser.scheme("light")
    browser.console()
    browser.open(write_report(runs, tmp_path / "report.html"))
    return browser


def traces(page, chart):
    """The traces of a chart: name, run, series, number of points, and its mode."""
    return page.run(
        f"return cards.get({chart!r}).chart.data.map((trace) => ({{ name: trace.name, count: trace.x.length, "
        "mode: trace.mode, color: trace.line?.color, dash: trace.line?.dash, ...trace.meta }))"
    )


@pytest.mark.parametrize("width", [1600, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_chart_is_drawn_inside_the_window_and_the_console_stays_empty(runs, browser, tmp_path, width, scheme):
    page = opened(browser, runs, tmp_path, width)
    page.scheme(scheme)
    page.wait(DRAWN)
    drawn = page.run("""return [...cards.values()].filter((card) => !card.element.hidden).map((card) => ({
      id: card.id, width: card.chart.getBoundingClientRect().width, right: card.chart.getBoundingClientRect().right,
      paths: card.chart.querySelectorAll(".scatterlayer .trace, .heatmaplayer .hm").length }))""")
    titles = {chart["id"] for chart in drawn}
    assert {
        "chart-Metrics/loss",
        "chart-Metrics/accuracy",
        "chart-lr",
        "chart-grad_norm",
        "map-norm",
        "bands",
    } <= titles
    assert all(chart["width"] > 100 and chart["right"] <= width + 1 and chart["paths"] for chart in drawn)
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    assert (
        page.run("return getComputedStyle(document.body).backgroundColor")
        == {
            "light": "rgb(246, 247, 249)",
            "dark": "rgb(20, 23, 28)",
        }[scheme]
    )
    assert page.console() == []
    page.screenshot(tmp_path / f"report-{width}.png")
    assert (tmp_path / f"report-{width}.png").stat().st_size > 20_000


def test_the_lines_are_those_that_were_recorded(page, runs):
    drawn = page.run("""return cards.get("chart-Metrics/loss").chart.data
      .filter((trace) => trace.meta.run === "slow" && trace.meta.series === "loss")
      .filter((trace) => !trace.meta.smooth && !trace.meta.finding)
      .map((trace) => [Array.from(trace.x), Array.from(trace.y)])""")
    series = runs[0].history["loss"]
    assert drawn == [[series.steps.tolist(), series.values.tolist()]]


def test_a_chip_switches_its_run_in_every_chart(page):
    everywhere = f"return {LINES}.map((card) => [...new Set(card.chart.data.map((trace) => trace.meta.run))].sort())"
    before = page.run(everywhere)
    assert all(shown == ["fast", "slow"] for shown in before)
    page.click(".chip[data-run='fast']")
    page.wait(DRAWN)
    assert all(shown == ["slow"] for shown in page.run(everywhere))
    page.click(".chip[data-run='fast']")
    page.wait(DRAWN)
    assert page.run(everywhere) == before
    assert page.console() == []


def test_a_finding_leads_to_its_steps_in_every_chart(page):
    page.click("button[data-first='60']")
    ranges = page.run(f"return {LINES}.map((card) => card.chart.layout.xaxis.range)")
    assert ranges == [[40, 84]] * len(ranges)
    assert page.console() == []


def test_rules_that_could_not_judge_are_named_with_their_reason(browser, tmp_path):
    with Run(tmp_path, name="silent") as run:
        run.log_many(range(50), {"loss": np.linspace(1, 0.5, 50)})
        run.set_meta(unjudged={"overfitting": "no validation loss", "lr_plateau": "no validation loss", "dead": "<b>"})
    page = opened(browser, [load_run(run.path)], tmp_path)
    said = page.run("return [...document.querySelectorAll('.unjudged')].map((line) => line.textContent)")
    assert said == ["not judged: overfitting, lr_plateau: no validation loss", "not judged: dead: <b>"]


def test_zooming_one_chart_zooms_the_others(page):
    page.run("return Plotly.relayout(cards.get('chart-lr').chart, {'xaxis.range': [10, 20]})")
    page.wait(f"{LINES}.every((card) => card.chart.layout.xaxis.range[1] === 20)")


def test_the_heat_maps_show_the_run_that_is_chosen_and_a_row_opens_as_a_curve(page, runs):
    marks = (
        "cards.get('map-norm').chart.data.filter((trace) => trace.name === 'not finite').flatMap((trace) => trace.y)"
    )
    assert page.run(f"return {marks}") == []
    page.run("""const chooser = document.getElementById("map-run"); chooser.value = "fast";
      chooser.dispatchEvent(new Event("change"))""")
    page.wait(f"{marks}.length")
    assert page.run(f"return {marks}") == ["3.bias"]
    page.run("cards.get('map-norm').clicked({ points: [{ y: '3.weight' }] })")
    page.wait("cards.get('parameter').chart.data && !cards.get('parameter').element.hidden")
    assert page.run("return cards.get('parameter').element.querySelector('h3').textContent") == "3.weight"
    drawn = page.run("return cards.get('parameter').chart.data[0].y")
    parameters = runs[1].history.parameters
    expected = parameters.field("norm_max")[:, parameters.names.index("3.weight")]
    assert drawn == pytest.approx(expected.tolist(), rel=1e-6)
    assert page.console() == []


def test_a_chart_is_logarithmic_or_not_at_will(page):
    button = "cards.get('chart-Metrics/accuracy').element.querySelector('button.log')"
    page.run(f"{button}.click()")
    page.wait("cards.get('chart-Metrics/accuracy').chart.layout.yaxis.type === 'log'")
    assert page.run(f"return {button}.getAttribute('aria-pressed')") == "true"


def test_x_can_be_time_or_epochs(page, runs):
    for unit, text in (("time", "training time in hours"), ("epoch", "epoch")):
        page.run(f"""const unit = document.getElementById("unit"); unit.value = {unit!r};
          unit.dispatchEvent(new Event("change"))""")
        page.wait(f"cards.get('chart-lr').chart.layout.xaxis.title.text === {text!r}")
        last = page.run("""return cards.get("chart-lr").chart.data
          .find((trace) => trace.meta.run === "slow").x.slice(-1)[0]""")
        known = runs[0].clock()[1][-1] / 3600 if unit == "time" else runs[0].history["epoch"][-1]
        assert last == pytest.approx(known)
    assert page.console() == []


def test_the_theme_can_be_chosen_against_the_system(page):
    page.run("""const theme = document.getElementById("theme"); theme.value = "dark";
      theme.dispatchEvent(new Event("change"))""")
    assert page.run("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
    page.run("localStorage.clear()")


def test_what_is_drawn_can_be_had_as_csv(page, runs):
    lines = page.run("return tableOf(cards.get('chart-lr'))").splitlines()
    assert lines[0] == "run,series,step,y"
    assert len(lines) == 1 + sum(len(run.history["lr"]) for run in runs)
    assert lines[1] == "slow,lr,0,0.05"
    assert page.run("return ['=1+1', '+1', '-1', '@a', 'a,\"b'].map(cell)") == [
        "'=1+1", "'+1", "'-1", "'@a", '"a,""b"'
    ]  # fmt: skip


def test_a_chart_can_be_saved_as_a_picture(page):
    page.run("""window.saved = null;
      HTMLAnchorElement.prototype.click = function () { window.saved = [this.download, this.href.slice(0, 22)]; };
      savePicture(cards.get("chart-lr"))""")
    page.wait("window.saved")
    assert page.run("return window.saved") == ["Learning-rate.png", "data:image/png;base64,"]
    assert page.console() == []


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Record four runs: one diverges, one has a single validation, and all have one learning rate."""
    directory, paths = tmp_path_factory.mktemp("uneven"), []
    for index, name in enumerate(("calm", "steady", "wild", "short")):
        with Run(directory, name=name, config={"lr": 0.1 * index, "depth": 2}) as run:
            for step in range(100 if name == "short" else 400):
                loss = 2 * math.exp(-step / 100) + 0.1 if name != "wild" or step < 200 else 214.0
                run.log(step, loss=loss, lr=0.001)
            run.log(99, **{"eval/rouge_L": 0.4 + index / 10})
            if name == "wild":
                found = {"rule": "loss_spike", "severity": "critical", "first_step": 200, "last_step": 399}
                run.log_finding({**found, "evidence": "214"})
        paths.append(run.path)
    return [load_run(path) for path in paths]


def test_one_run_that_diverges_flattens_none_of_the_others(uneven, browser, tmp_path):
    page = opened(browser, uneven, tmp_path)
    low, high = page.run("return cards.get('chart-Metrics/loss').chart.layout.yaxis.range")
    assert low < 0.1
    assert 2.1 < high < 10
    marks = [trace for trace in traces(page, "chart-Metrics/loss") if trace["name"] == "above"]
    assert [(mark["run"], mark["above"]) for mark in marks] == [("wild", 200)]
    page.run("cards.get('chart-Metrics/loss').element.querySelector('button.all').click()")
    page.wait("cards.get('chart-Metrics/loss').chart.layout.yaxis.range[1] > 214")


def test_a_loss_that_falls_steeply_in_every_run_is_logarithmic_from_the_start(browser, tmp_path):
    for index in range(3):
        with Run(tmp_path, name=f"run-{index}") as run:
            for step in range(3000):
                run.log(step, loss=1 / (step + 1))
    page = opened(browser, sorted(tmp_path.glob("run-*")), tmp_path)
    assert page.run("return cards.get('chart-Metrics/loss').chart.layout.yaxis.type") == "log"


def test_learning_rates_far_apart_are_logarithmic_from_the_start_and_a_schedule_is_not(browser, tmp_path):
    for name, peak in (("small", 1e-3), ("large", 20.0)):
        with Run(tmp_path, name=name) as run:
            for step in range(50):
                run.log(step, loss=1 / (step + 1), lr=peak * (1 - step / 50))
    kind = "return cards.get('chart-lr').chart.layout.yaxis.type"
    both = opened(browser, [tmp_path / "small", tmp_path / "large"], tmp_path)
    assert both.run(kind) == "log"
    assert opened(browser, [tmp_path / "small"], tmp_path).run(kind) != "log"


def test_a_finding_marks_its_own_run_and_metric_alone(uneven, browser, tmp_path):
    page = opened(browser, uneven, tmp_path)
    marked = page.run("""return [...cards.values()].flatMap((card) => (card.chart.data || [])
      .filter((trace) => trace.meta?.finding)
      .map((trace) => [card.id, trace.meta.run, trace.meta.series, trace.x[0]]))""")
    assert marked == [["chart-Metrics/loss", "wild", "loss", 200]]
    assert page.run("return cards.get('chart-lr').chart.layout.shapes") == []


def test_a_constant_reads_as_its_value_and_a_single_point_is_a_point(uneven, browser, tmp_path):
    page = opened(browser, uneven, tmp_path)
    axis = page.run("return cards.get('chart-lr').chart.layout.yaxis")
    assert (axis["range"], axis["ticktext"]) == ([0, 0.002], ["0", "0.001", "0.002"])
    points = traces(page, "chart-Metrics/rouge_l")
    assert [(trace["count"], trace["mode"]) for trace in points] == [(1, "markers")] * 4
    assert page.run("return cards.get('chart-Metrics/rouge_l').element.querySelector('h3').textContent") == "rouge_L"
    ranges = page.run(f"return {LINES}.map((card) => card.chart.layout.xaxis.range)")
    assert ranges == [ranges[0]] * len(ranges)


def test_train_and_validation_differ_in_width_mark_or_colour(page, runs, browser, tmp_path):
    looks = page.run("""return cards.get("chart-Metrics/loss").chart.data
      .filter((trace) => trace.meta.run === "slow" && !trace.meta.smooth && !trace.meta.finding)
      .map((trace) => [trace.meta.series, trace.mode, trace.line.width])""")
    assert sorted(looks) == [["loss", "lines", 1], ["val_loss", "lines+markers", 2.4]]
    alone = opened(browser, runs[:1], tmp_path)
    colors = {trace["series"]: trace["color"] for trace in traces(alone, "chart-Metrics/loss") if trace.get("series")}
    assert colors["loss"] != colors["val_loss"]


@pytest.fixture(scope="module")
def sixty(tmp_path_factory):
    directory, paths = tmp_path_factory.mktemp("sixty"), []
    for index in range(60):
        config = {"lr": 0.1 * (1 + index % 3), "depth": index % 4, "seed": 7}
        with Run(directory, name=f"a-sweep-with-a-long-name-{index:02d}", config=config) as run:
            for step in range(20):
                run.log(step, loss=(60 - index) / (step + 1), lr=0.1)
        paths.append(run.path)
    return [load_run(path) for path in paths]


@pytest.mark.parametrize("width", [1400, 390])
def test_sixty_runs_are_one_table_with_looks_of_their_own(sixty, browser, tmp_path, width):
    page = opened(browser, sixty, tmp_path, width)
    assert page.run("return document.querySelectorAll('#summary table').length") == 1
    assert page.run("return document.querySelectorAll('#summary tbody tr').length") == 60
    looks = {(trace["color"], trace["dash"]) for trace in traces(page, "chart-Metrics/loss")}
    assert len(looks) == 60
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    heads = page.run("return [...document.querySelectorAll('th')].map((head) => head.dataset.key)")
    assert [head for head in heads if head.startswith("config:")] == ["config:lr", "config:depth"]
    assert page.console() == []


def test_the_table_is_sorted_and_searched_and_the_charts_follow(sixty, browser, tmp_path):
    page = opened(browser, sixty, tmp_path)
    names = "return [...document.querySelectorAll('#summary tbody tr')].map((row) => row.dataset.run)"
    page.click("th[data-key='best:loss'] button")
    assert page.run(names)[0] == "a-sweep-with-a-long-name-59"
    page.click("th[data-key='best:loss'] button")
    assert page.run(names)[0] == "a-sweep-with-a-long-name-00"
    page.run("""const search = document.getElementById("search"); search.value = "lr=0.2 depth=1";
      search.dispatchEvent(new Event("input"))""")
    expected = {run.name for run in sixty if run.config["lr"] == 0.2 and run.config["depth"] == 1}
    assert set(page.run(names)) == expected
    page.wait(DRAWN)
    assert {trace["run"] for trace in traces(page, "chart-Metrics/loss")} == expected
    assert page.run("return document.querySelectorAll('#chips .chip').length") == len(expected)


MARKUP = "</script><img src=x onerror='window.acted=1'><script>window.acted=1</script>{{7*7}}<!--<script>"


def with_markup(document):
    """Put markup into every text of a JSON document, and keep its numbers."""
    if isinstance(document, dict):
        return {f"{key}{'' if key in KEPT else MARKUP}": with_markup(value) for key, value in document.items()}
    if isinstance(document, list):
        return [*map(with_markup, document), MARKUP]
    return document + MARKUP if isinstance(document, str) else document


KEPT = {"rule", "severity", "evidence", "cause", "action", "parameters", "series", "first_step", "last_step"}


CHECKED = {"state", "points", "format", "steps"}  # a run that has anything else there is not read


def spoil(file):
    """Put markup into every text in every table of a run's file."""
    with closing(sqlite3.connect(file)) as connection, connection:
        tables = "SELECT name FROM sqlite_master WHERE type = 'table' AND sql NOT LIKE '%WITHOUT ROWID%'"
        for (table,) in connection.execute(tables).fetchall():
            for _, column, kind, *_ in connection.execute(f"PRAGMA table_info({table})").fetchall():
                if kind != "TEXT" or column in CHECKED:
                    continue
                for key, value in connection.execute(f"SELECT rowid, {column} FROM {table}").fetchall():
                    try:
                        document = json.loads(value)
                        spoiled = value if column == "shape" else json.dumps(with_markup(document))
                    except (TypeError, ValueError):
                        spoiled = f"{value}{MARKUP}"
                    connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (spoiled, key))
        connection.execute("INSERT INTO meta VALUES (?, ?, 0)", (MARKUP, json.dumps(MARKUP)))


def test_nothing_that_a_file_holds_can_act_in_the_page(tmp_path, browser, infos):
    paths = []
    for name in ("one", "two"):
        with Run(tmp_path, name=name, config={"model": {"name": "a", "sizes": ["b"]}}) as run:
            run.set_parameters(infos)
            for step in range(30):
                run.log(step, loss=1.0 / (step + 1), val_loss=2.0, lr=0.1, grad_norm=1.0, other=math.nan)
            run.log_interval(summarize([0], np.ones((1, 3, 6)), np.array([info.numel for info in infos])))
            found = {"rule": "loss_spike", "severity": "warning", "first_step": 2, "last_step": 3, "parameters": ["p"]}
            run.log_finding({**found, **{each: each for each in ("evidence", "cause", "action")}})
        spoil(run.path / "run.sqlite")
        paths.append(run.path.rename(run.path.with_name(f"{name}<img src=x onerror=acted()>")))
    page = opened(browser, paths, tmp_path)
    page.run("for (const button of document.querySelectorAll('td.name button')) button.click()")
    page.wait("document.querySelectorAll('tr.details').length === 1 || true")
    for which in ("time", "step"):
        page.run(f"""const unit = document.getElementById("unit"); unit.value = {which!r};
          unit.dispatchEvent(new Event("change"))""")
    page.wait(DRAWN)
    text = page.run("return document.body.innerText")
    assert text.count("window.acted=1") > 20
    assert page.run("return window.acted") is None
    assert (
        page.run("return document.querySelectorAll('img, iframe, object, body script:not([nonce]):not([id])').length")
        == 0
    )
    assert page.console() == []
