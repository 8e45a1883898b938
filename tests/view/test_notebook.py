"""What a notebook shows: read back as HTML by the standard library's parser, and as data by pandas."""

from __future__ import annotations

import math
from html.parser import HTMLParser

import numpy as np
import pytest
from synthetic import gradient_rows

import pytracker
from pytracker.diagnostics import Finding
from pytracker.errors import InvalidValueError
from pytracker.history import FIELDS, Curve, History, ParameterInfo, summarize
from pytracker.store import Run, load_run

MARKUP = "<img src=x onerror=alert(1)>{{7*7}}"


class Page(HTMLParser):
    """The tags, the texts of the cells, and the curves of a piece of HTML."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.curves = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "polyline":
            self.curves.append(dict(attributes)["points"])

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data.strip())


@pytest.fixture
def run(tmp_path, infos):
    infos = [*infos, ParameterInfo(MARKUP, (2,), "float32", "", 2)]
    numel = np.array([info.numel for info in infos])
    with Run(tmp_path, name="one", config={"lr": 0.1}) as run:
        run.set_parameters(infos)
        for step in range(20):
            run.log(step, **{"loss": 1.0 / (step + 1), MARKUP: float(step)})
        for first in (0, 10):
            rows = gradient_rows(np.random.default_rng(first), 10, numel)
            run.log_interval(summarize(np.arange(first, first + 10), rows, numel))
    return load_run(run.path)


def test_runs_histories_and_comparisons_are_tables_and_nothing_in_them_is_markup(run):
    finding = Finding(MARKUP, "warning", 3, 9, MARKUP, (MARKUP,), MARKUP, MARKUP)
    comparison = pytracker.compare([run, run])
    for thing in (run, run.history, run.history.parameters, comparison, finding):
        page = Page(thing._repr_html_())
        assert set(page.tags) <= {"div", "b", "table", "tr", "th", "td", "svg", "polyline", "small"}
        assert any(MARKUP in text for text in page.texts), type(thing)


def test_a_history_a_series_and_a_run_that_is_written_show_courses_and_ends(tmp_path):
    losses = [4.0, 2.0, math.nan, 1.0]
    history = History(loss=losses, empty=[])
    with pytracker.Run(tmp_path) as run:
        run.log_many(range(4), {"loss": losses})
        for thing in (history, history["loss"], run):
            page = Page(thing._repr_html_())
            for text in ("loss", "1", "4"):
                assert text in page.texts
            assert page.curves[0] == "0.0,0.0 60.0,16.0 120.0,24.0"


def test_a_long_curve_keeps_its_spike():
    values = np.zeros(100_000)
    values[54_321] = 9.0
    points = [tuple(map(float, point.split(","))) for point in Curve(values).points.split()]
    assert len(points) <= 120
    assert min(y for _, y in points) == 0.0
    assert Curve(np.full(5, math.nan)).points == ""


def test_a_table_of_many_rows_counts_those_that_it_leaves_out():
    history = History({f"series-{index}": [1.0] for index in range(200)})
    page = Page(history._repr_html_())
    assert "and 140 more" in page.texts
    assert page.tags.count("tr") == 61


def test_keys_are_completed_and_a_parameter_is_had_by_its_name(run):
    history = run.history
    assert history._ipython_key_completions_() == ["loss", MARKUP]
    assert (
        history.parameters._ipython_key_completions_() == list(history.parameters) == [p.name for p in run.parameters]
    )
    known = history.parameters["conv.bias"]
    assert known["first_step"].tolist() == [0, 10]
    for name in FIELDS:
        np.testing.assert_array_equal(known[name], history.parameters.field(name)[:, 1])
    with pytest.raises(InvalidValueError, match=r"parameters\['nothing'\]: there is no such parameter; there are conv"):
        history.parameters["nothing"]


def test_pandas_gets_runs_comparisons_and_parameters(run):
    pandas = pytest.importorskip("pandas", reason="makes the frames")
    pandas.testing.assert_frame_equal(run.to_pandas(), run.history.to_pandas())
    frame = run.history.parameters.to_pandas()
    assert frame.index.names == ["first_step", "parameter"]
    norms = frame["norm_mean"].unstack()[run.history.parameters.names]
    np.testing.assert_array_equal(norms.to_numpy(), run.history.parameters.field("norm_mean"))
    table = pytracker.compare([run, run], thresholds={}).to_pandas()
    assert table.loc[str(run.path), "best loss"] == 0.05
    assert table.loc[str(run.path), "steps"] == 20


def test_a_report_is_shown_in_a_frame_that_reaches_nothing_around_it(run, tmp_path):
    pytest.importorskip("plotly", reason="the report draws with plotly")
    report = pytracker.report(run)
    page = Page(report._repr_html_())
    assert page.tags == ["iframe"]
    assert 'sandbox="allow-scripts allow-downloads"' in report._repr_html_()
    assert report.save(tmp_path / "r.html").read_text() == report.page
    assert "<h1>one</h1>" in report.page
