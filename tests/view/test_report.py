"""What a report draws, before a browser sees it."""

from __future__ import annotations

import base64
import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from synthetic import gradient_rows

from pytracker.errors import InvalidValueError, MissingExtraError
from pytracker.history import ParameterInfo, summarize
from pytracker.store import Run, load_run
from pytracker.view import build_charts, write_report
from pytracker.view.report.thinning import groups, thin, trend

pytest.importorskip("plotly", reason="the report draws with plotly")


def unpacked(spec):
    array = np.frombuffer(base64.b64decode(spec["bdata"]), "<" + spec["dtype"])
    return array.reshape([int(size) for size in spec["shape"].split(",")]) if "shape" in spec else array


@settings(max_examples=200)
@given(
    arrays.arrays(np.float64, st.integers(1, 400), elements=st.floats(width=32) | st.just(math.nan)),
    st.integers(8, 100),
)
def test_thinning_keeps_every_extreme_and_the_ends(values, points):
    steps = np.arange(len(values)) * 3
    kept_steps, kept = thin(steps, values, points)
    assert len(kept) <= max(points, 8)
    assert (np.diff(kept_steps) > 0).all()
    assert np.array_equal(values[kept_steps // 3], kept, equal_nan=True)
    assert (kept_steps[0], kept_steps[-1]) == (0, steps[-1])
    finite, kept_finite = values[np.isfinite(values)], kept[np.isfinite(kept)]
    if len(finite):
        assert (kept_finite.min(), kept_finite.max()) == (finite.min(), finite.max())
    assert np.isfinite(values).all() == np.isfinite(kept).all()


def test_a_million_points_keep_a_single_spike():
    values = np.random.default_rng(0).normal(size=1_000_000)
    values[654_321] = 50.0
    values[123_456] = math.nan
    steps, kept = thin(np.arange(1_000_000), values, 2000)
    assert len(kept) <= 2000
    assert kept[steps == 654_321] == 50.0
    assert math.isnan(kept[steps == 123_456][0])


def test_a_trend_is_drawn_over_noise_and_not_over_a_smooth_curve():
    steps = np.arange(5000)
    curve = np.exp(-steps / 1000)
    noisy = curve + np.random.default_rng(0).normal(scale=0.1, size=5000)
    middles, medians = trend(steps, noisy, 50)
    assert np.abs(medians - np.exp(-middles / 1000)).max() < 0.06
    assert trend(steps, curve, 50) is None
    assert trend(steps[:100], noisy[:100], 50) is None


def test_groups_cover_everything_once():
    for count in (1, 7, 200, 1001):
        starts = groups(count, 200)
        assert starts[0] == 0
        assert len(starts) == min(count, 200)
        assert set(np.diff(np.append(starts, count))) <= {count // len(starts), -(-count // len(starts))}


@pytest.fixture
def run(tmp_path, infos):
    numel = np.array([info.numel for info in infos])
    generator = np.random.default_rng(0)
    with Run(tmp_path, name="one & <only>", config={"lr": "</script>"}) as run:
        run.set_parameters(infos)
        run.set_meta(clip_threshold=1.5)
        for step in range(100):
            run.log(
                step, loss=math.nan if step == 42 else 1 / (step + 1), lr=0.1, grad_norm=2.0, grad_max=1.0, extra=1.0
            )
            if step % 10 == 9:
                run.log(step, val_loss=0.5, val_accuracy=step / 100)
                rows = gradient_rows(generator, 10, numel)
                if step == 49:
                    rows[2, 1] = [math.nan, math.nan, math.nan, 0, 8, 0]
                if step == 79:
                    rows[:, 2] = math.nan  # no gradient
                run.log_interval(summarize(np.arange(step - 9, step + 1), rows, numel))
        run.log_finding({"rule": "spike", "severity": "warning", "first_step": 40, "last_step": 44, "evidence": "<b>"})
    return load_run(run.path)


def test_each_series_has_its_place(run):
    charts = {chart["title"]: chart for chart in build_charts([run])["lines"]}
    names = {title: [trace["name"] for trace in chart["data"]] for title, chart in charts.items()}
    assert names == {
        "Loss": ["loss", "val_loss", "loss is not finite"],
        "Accuracy": ["val_accuracy"],
        "Learning rate": ["lr"],
        "Gradient norm": ["grad_norm", "grad_max"],
        "extra": ["extra"],
    }
    assert charts["Gradient norm"]["layout"]["yaxis"]["type"] == "log"
    assert charts["Loss"]["layout"]["yaxis"]["type"] == "linear"
    clip = charts["Gradient norm"]["layout"]["shapes"][-1]
    assert (clip["y0"], clip["label"]["text"]) == (1.5, "clip 1.5")
    assert [(shape["x0"], shape["x1"]) for shape in charts["Loss"]["layout"]["shapes"]] == [(40, 44)]


def test_lines_hold_the_recorded_values_and_mark_what_is_not_finite(run):
    loss, _, marks = build_charts([run])["lines"][0]["data"]
    assert unpacked(loss["x"]).tolist() == list(range(100))
    np.testing.assert_array_equal(unpacked(loss["y"]), run.history["loss"].values)
    assert unpacked(marks["x"]).tolist() == [42]


def test_the_heat_map_holds_log_norms_and_marks_what_is_not_finite(run):
    norms, zeros, largest = build_charts([run])["maps"]
    parameters = run.history.parameters
    z = unpacked(norms["data"][0]["z"])
    expected = np.log10(parameters.field("norm_max")).T
    np.testing.assert_allclose(z, expected, rtol=1e-5)
    assert math.isnan(z[1, 4])  # NaN elements
    assert math.isnan(z[2, 7])  # no gradient
    assert unpacked(norms["data"][0]["x"]).tolist() == [*range(0, 100, 10), 100]
    assert norms["data"][0]["y"] == parameters.names
    crosses = norms["data"][1]
    assert (unpacked(crosses["x"]).tolist(), crosses["y"]) == ([45.0], ["conv.bias"])
    np.testing.assert_allclose(unpacked(zeros["data"][0]["z"]), parameters.field("zero_fraction").T, rtol=1e-6)
    np.testing.assert_allclose(unpacked(largest["data"][0]["z"]), np.log10(parameters.field("abs_max").T), rtol=1e-5)


def test_a_large_heat_map_is_thinned_and_keeps_its_peaks(tmp_path):
    infos = [ParameterInfo(f"layer.{index}", (4,), "float32", "", 4) for index in range(1000)]
    with Run(tmp_path) as run:
        run.set_parameters(infos)
        for interval in range(700):
            rows = np.ones((1, 1000, 6))
            rows[0, :, 4:] = 0
            if interval == 333:
                rows[0, 777, 1] = 1e8
            run.log_interval(summarize([interval], rows, np.full(1000, 4)))
    chart = build_charts([load_run(run.path)])["maps"][0]["data"][0]
    z = unpacked(chart["z"])
    assert z.shape == (200, 300)
    row, column = np.argwhere(z == 4.0)[0]
    assert chart["y"][row] == "layer.775 ... layer.779"
    edges = unpacked(chart["x"])
    assert edges[column] <= 333 < edges[column + 1]


def test_the_page_is_one_file_and_escapes_what_it_was_given(run, tmp_path):
    text = write_report([run], tmp_path / "report.html").read_text()
    assert re.findall(r'(?:src|href)="?(?:https?:)?//', text.partition("<body>")[2]) == []
    assert "one &amp; &lt;only&gt;" in text
    assert "&lt;b&gt;" in text
    data = json.loads(re.search(r"id=report>(.*?)</script>", text, re.DOTALL)[1])
    assert len(data["lines"]) == 5


@pytest.mark.parametrize("name", ["<!--<script>", "</script><script>alert(1)</script>", "a<b\u2028c\u2029d"])
def test_no_name_ends_or_prolongs_the_script_that_holds_the_data(tmp_path, name):
    with Run(tmp_path) as run:
        run.set_parameters([ParameterInfo(name, (4,), "float32", "", 4)])
        run.log(0, **{name if name.isprintable() else "loss": 1.0})
        run.log_interval(summarize([0], np.ones((1, 1, 6)), np.array([4])))
    page = write_report([run.path], tmp_path / "report.html").read_text(encoding="utf-8")
    data = page.partition('<script type="application/json" id=report>')[2].partition("</script>\n<script>")[0]
    assert not set(data) & set("<\u2028\u2029")
    assert json.loads(data) == json.loads(json.dumps(build_charts([load_run(run.path)])))
    assert json.loads(data)["maps"][0]["data"][0]["y"] == [name]


def test_findings_are_cards_the_most_severe_first_with_steps_parameters_cause_and_action(tmp_path):
    with Run(tmp_path, name="sick") as run:
        run.log(0, loss=1.0)
        run.log_finding({"rule": "mild", "severity": "info", "first_step": 1, "last_step": 1, "evidence": "early"})
        found = {"rule": "grave", "severity": "critical", "first_step": 7, "last_step": 9, "evidence": "norm 9 > 1"}
        run.log_finding({**found, "parameters": ["a.weight", "<b>"], "cause": "a step", "action": "clip at 1"})
    text = write_report([run.path], tmp_path / "report.html").read_text().partition("<body>")[2]
    assert text.index("finding critical") < text.index("finding info")
    assert ">steps 7 to 9</a>" in text
    assert ">step 1</a>" in text
    told = {"parameters": "a.weight, &lt;b&gt;", "cause": "a step", "action": "clip at 1"}
    assert all(f"<dt>{name}</dt><dd>{fact}</dd>" in text for name, fact in told.items())
    assert "<p>norm 9 &gt; 1</p>" in text


def test_runs_without_parameters_or_findings_or_anything_are_drawn_too(tmp_path):
    with Run(tmp_path, name="bare") as bare:
        bare.log(0, loss=1.0)
    with Run(tmp_path, name="empty") as empty:
        pass
    charts = build_charts([load_run(bare.path), load_run(empty.path)])
    assert len(charts["lines"]) == 1
    assert charts["maps"] == []
    write_report([bare.path, empty.path], tmp_path / "report.html")
    with pytest.raises(InvalidValueError, match="no runs were given"):
        write_report([], tmp_path / "report.html")


def test_a_missing_plotly_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pytracker\[report\]'"):
        write_report([run], tmp_path / "report.html")
