"""What a report draws, before a browser sees it."""

from __future__ import annotations

import base64
import json
import math
import re
from importlib import resources

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from synthetic import gradient_rows

from pytracker.diagnostics import RULES
from pytracker.errors import InvalidValueError, MissingExtraError
from pytracker.history import ParameterHistory, ParameterInfo, summarize
from pytracker.store import Run, load_run
from pytracker.view import build_document, write_report
from pytracker.view.page.curves import concerned
from pytracker.view.page.parameters import parameter_maps
from pytracker.view.page.thinning import groups, means, thin

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


@given(
    arrays.arrays(np.float64, st.integers(1, 200), elements=st.floats(-1e6, 1e6) | st.just(math.nan)),
    st.integers(1, 50),
)
def test_means_are_those_of_the_finite_values_of_each_stretch(values, parts):
    steps, found = means(np.arange(len(values)) * 2, values, parts)
    starts = [*groups(len(values), parts).tolist(), len(values)]
    assert len(found) == min(parts, len(values))
    for start, stop, step, mean in zip(starts[:-1], starts[1:], steps, found, strict=True):
        finite = [value for value in values[start:stop].tolist() if math.isfinite(value)]
        assert 2 * start <= step < 2 * stop
        assert math.isnan(mean) if not finite else mean == pytest.approx(math.fsum(finite) / len(finite), abs=1e-6)


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
        run.log_finding(
            {"rule": "loss_spike", "severity": "warning", "first_step": 40, "last_step": 44, "evidence": "<b>"}
        )
    return load_run(run.path)


def test_lines_hold_the_recorded_values_and_mark_what_is_not_finite(run):
    series = build_document([run])["curves"][run.name]["series"]
    assert set(series) == {"loss", "lr", "grad_norm", "grad_max", "extra", "val_loss", "val_accuracy"}
    assert unpacked(series["loss"]["x"]).tolist() == list(range(100))
    np.testing.assert_array_equal(unpacked(series["loss"]["y"]), run.history["loss"].values)
    assert unpacked(series["loss"]["bad"]["x"]).tolist() == [42]
    assert (series["loss"]["low"], series["loss"]["high"], series["loss"]["count"]) == (0.01, 1.0, 100)


def test_a_finding_names_the_series_that_it_speaks_of(run):
    document = build_document([run])["curves"][run.name]
    assert [(each["rule"], each["series"]) for each in document["findings"]] == [("loss_spike", ["loss"])]
    names = ["loss", "val_loss", "lr", "grad_norm"]
    assert concerned({"rule": "mine", "series": ["val_loss"]}, names) == ["val_loss"]
    assert concerned({"rule": "replica_drift"}, names) == []
    for rule, series in (
        ("loss_spike", ["loss"]),
        ("overfitting", ["loss", "val_loss"]),
        ("learning_rate", ["lr"]),
        ("gradient_exploding", ["grad_norm"]),
        ("layer_imbalance", ["grad_norm"]),
    ):
        assert rule in RULES
        assert concerned({"rule": rule}, names) == series


def test_the_heat_maps_hold_the_largest_values_and_mark_what_is_not_finite(run):
    maps = build_document([run])["curves"][run.name]["parameters"]
    parameters = run.history.parameters
    norm = unpacked(maps["tables"]["norm"]).reshape(3, 10)
    np.testing.assert_allclose(norm, parameters.field("norm_max").T, rtol=1e-6)
    assert math.isnan(norm[1, 4])  # NaN elements
    assert math.isnan(norm[2, 7])  # no gradient
    assert unpacked(maps["edges"]).tolist() == [*range(0, 100, 10), 100]
    assert maps["labels"] == parameters.names
    assert maps["bad"] == [[1, 4]]
    for name in ("zero_fraction", "abs_max"):
        np.testing.assert_allclose(unpacked(maps["tables"][name]).reshape(3, 10), parameters.field(name).T, rtol=1e-6)
    assert "update_ratio" not in maps["tables"]  # nothing was measured
    median = unpacked(maps["bands"]["50"])
    np.testing.assert_allclose(median, np.nanmedian(parameters.field("norm_max"), axis=1), rtol=1e-6)


def test_updates_that_were_measured_are_shown_relative_to_their_parameters(infos):
    rows = np.ones((3, 6))
    updates = [[0.1, 0.2, np.nan], [np.nan] * 3, [0.3, 0.4, np.nan]]
    parameters = ParameterHistory(infos)
    for step, update in enumerate(updates):
        parameters.append(summarize([step], rows[None], parameters.numel, [10.0, 0.0, 1.0], update))
    maps = parameter_maps(parameters, lambda array: array)
    expected = [[0.01, np.nan, 0.03], [np.nan] * 3, [np.nan] * 3]  # of a parameter that is zero there is no ratio
    np.testing.assert_allclose(maps["tables"]["update_ratio"], expected, rtol=1e-6)


def test_what_is_subnormal_has_a_map_for_each_format_where_it_was_counted(infos):
    parameters = ParameterHistory(infos)
    counts = np.zeros((1, 3, 7))
    counts[0, :, 1:4] = [[0, 1, 2], [0, 0, 1], [0, 2, 3]]
    parameters.append(summarize([0], np.ones((1, 3, 6)), [4, 4, 4], extras=counts))
    tables = parameter_maps(parameters, lambda array: array)["tables"]
    shown = [tables[f"subnormal_{name}_fraction"][:, 0].tolist() for name in ("bf16", "fp16", "e4m3")]
    assert shown == [[0, 0, 0], [0.25, 0, 0.5], [0.5, 0.25, 0.75]]
    page = (resources.files("pytracker.view.page") / "parameters.js").read_text(encoding="utf-8")
    assert all(f'"{name}"' in page for name in tables)


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
    (curves,) = build_document([load_run(run.path)])["curves"].values()
    table = unpacked(curves["parameters"]["tables"]["norm"]).reshape(200, 300)
    row, column = np.argwhere(table == 1e4)[0]
    assert curves["parameters"]["labels"][row] == "layer.775 ... layer.779"
    edges = unpacked(curves["parameters"]["edges"])
    assert edges[column] <= 333 < edges[column + 1]


def test_sixty_runs_have_fewer_points_each_and_all_their_extremes(tmp_path):
    paths = []
    for index in range(60):
        with Run(tmp_path, name=f"run-{index}") as run:
            for step in range(1000):
                run.log(step, loss=100.0 if step == 500 + index else 1.0)
        paths.append(run.path)
    for curves in build_document([load_run(path) for path in paths])["curves"].values():
        values = unpacked(curves["series"]["loss"]["y"])
        assert len(values) <= 400
        assert values.max() == 100.0


def test_the_page_is_one_file_whose_data_cannot_end_its_script(run, tmp_path):
    text = write_report([run], tmp_path / "report.html").read_text()
    assert re.findall(r'(?:src|href)="?(?:https?:)?//', text.partition("<body>")[2].partition("<script")[0]) == []
    assert "<h1>one &amp; &lt;only&gt;</h1>" in text
    data = re.search(r'id="frozen">(.*?)</script>', text, re.DOTALL)[1]
    assert not set(data) & set("<>&'\u2028\u2029")
    assert json.loads(data) == json.loads(json.dumps(build_document([run])))


def test_only_scripts_that_carry_the_nonce_of_this_page_may_run(run, tmp_path):
    pages = [write_report([run], tmp_path / "report.html").read_text() for _ in range(2)]
    nonces = [re.search(r"script-src &#39;nonce-([\w-]{16,})&#39;", page)[1] for page in pages]
    assert nonces[0] != nonces[1]
    assert all("default-src &#39;none&#39;" in page and "connect-src &#39;none&#39;" in page for page in pages)


def test_runs_without_parameters_or_findings_or_anything_are_drawn_too(tmp_path):
    with Run(tmp_path, name="bare") as bare:
        bare.log(0, loss=1.0)
    with Run(tmp_path, name="empty") as empty:
        pass
    document = build_document([load_run(bare.path), load_run(empty.path)])
    assert [each["id"] for each in document["runs"]] == ["bare", "empty"]
    assert document["curves"]["bare"]["parameters"] is None
    assert document["curves"]["empty"]["series"] == {}
    write_report([bare.path, empty.path], tmp_path / "report.html")
    with pytest.raises(InvalidValueError, match="no runs were given"):
        write_report([], tmp_path / "report.html")


def test_a_missing_plotly_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pytracker\[report\]'"):
        write_report([run], tmp_path / "report.html")
