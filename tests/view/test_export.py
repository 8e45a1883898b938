"""Exports, read back by other libraries."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from synthetic import gradient_rows

from pytracker.errors import InvalidValueError
from pytracker.history import FIELDS, ParameterInfo, summarize
from pytracker.store import Run, load_run
from pytracker.view import export_run


@pytest.fixture
def run(tmp_path, infos):
    numel = np.array([info.numel for info in infos])
    with Run(tmp_path, name="one", config={"lr": 0.1}) as run:
        run.set_parameters(infos)
        for step in range(10):
            run.log(step, loss=math.nan if step == 3 else 1.0 / (step + 1))
        run.log(4, val_loss=0.5)
        run.log(9, val_loss=math.inf)
        for first in (0, 5):
            rows = gradient_rows(np.random.default_rng(first), 5, numel)
            run.log_interval(summarize(np.arange(first, first + 5), rows, numel))
    return load_run(run.path)


def test_csv_has_a_row_a_step_and_gaps_where_a_series_has_none(run, tmp_path):
    export_run(run, tmp_path / "out.csv")
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(10))
    assert [float(row["loss"]) for row in rows][4:] == run.history["loss"][4:]
    assert rows[3]["loss"] == "nan"
    assert [row["val_loss"] for row in rows] == ["", "", "", "", "0.5", "", "", "", "", "inf"]


def test_json_is_strict_and_holds_config_and_series(run):
    text = io.StringIO()
    export_run(run, text, format="json")
    document = json.loads(text.getvalue(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert document["config"] == {"lr": 0.1}
    assert document["series"]["val_loss"] == {"steps": [4, 9], "values": [0.5, None]}
    assert document["series"]["loss"]["values"][4:] == run.history["loss"][4:]


def test_parquet_is_read_by_pandas_with_the_same_values(run, tmp_path):
    pandas = pytest.importorskip("pandas", reason="reads the file back")
    pytest.importorskip("pyarrow", reason="writes Parquet")
    export_run(run, tmp_path / "out.parquet")
    frame = pandas.read_parquet(tmp_path / "out.parquet").set_index("step")
    pandas.testing.assert_frame_equal(frame, run.history.to_pandas())


STARTS = ["=", "+", "-", "@", "\t", "\r"]
HIDDEN = [" =", "  +", "\u00a0-", "\n@", "\t =", "\r=", '"=', "' =", "\ufeff=", "\u200b+", "\uff1d", "\x00="]


@pytest.mark.parametrize("start", [*STARTS, *HIDDEN])
def test_no_name_in_a_csv_is_a_formula_and_no_number_is_changed(tmp_path, start):
    name = f"{start}HYPERLINK(1)"
    with Run(tmp_path) as run:
        run.set_parameters([ParameterInfo(name, (2,), "float32", "", 2)])
        run.log(0, **({name: -1.5} if name.isprintable() else {"loss": -1.5}))
        run.log_interval(summarize([0], np.ones((1, 1, 6)), np.array([2])))

    def cells(**options):
        text = io.StringIO()
        export_run(load_run(run.path), text, format="csv", **options)
        return list(csv.reader(io.StringIO(text.getvalue(), newline="")))

    assert cells()[1][1] == "-1.5"
    for table in (cells(), cells(parameters=True)):
        texts = [cell for row in table for cell in row if not cell.lstrip("-")[:1].isdigit()]
        assert [text for text in texts if text.startswith(tuple(STARTS))] == []
        assert [text for text in texts if "HYPERLINK" in text and not text.startswith("'")] == []
    if not set(start) & {"\r", "\n", "\x00"}:  # Python's own writer does not quote it before 3.13
        assert cells(parameters=True, guard=False)[1][2] == name


def test_the_parameters_of_a_long_run_are_exported_within_a_bounded_memory(tmp_path):
    infos = [ParameterInfo(f"layer.{index}", (2,), "float32", "", 2) for index in range(300)]
    interval = summarize([0], np.ones((1, 300, 6)), np.full(300, 2))
    with Run(tmp_path) as run:
        run.set_parameters(infos)
        for step in range(1000):
            run.log_interval(replace(interval, first_step=step, last_step=step))
    stored = load_run(run.path)
    tracemalloc.start()
    try:
        with open(os.devnull, "w") as nowhere:
            export_run(stored, nowhere, format="csv", parameters=True)
        assert tracemalloc.get_traced_memory()[1] < 25 * 2**20  # all cells at once take 300 MB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("format", ["csv", "json", "parquet"])
def test_parameters_are_a_long_table(run, tmp_path, format):
    pandas = pytest.importorskip("pandas", reason="reads the file back")
    path = tmp_path / f"out.{format}"
    export_run(run, path, parameters=True)
    if format == "json":
        frame = pandas.DataFrame(json.loads(path.read_text())["intervals"])
    else:
        frame = {"csv": pandas.read_csv, "parquet": pandas.read_parquet}[format](path)
    assert frame["parameter"].tolist() == [info.name for info in run.parameters] * 2
    assert frame["first_step"].tolist() == [0] * 3 + [5] * 3
    for name in FIELDS:
        expected = run.history.parameters.field(name).reshape(-1)
        np.testing.assert_allclose(frame[name].to_numpy(dtype=float), expected, rtol=1e-6, err_msg=name)


def test_an_empty_run_exports_its_header(tmp_path):
    with Run(tmp_path) as run:
        pass
    export_run(load_run(run.path), tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == "step\n"


def test_an_unknown_format_is_named(run, tmp_path):
    with pytest.raises(InvalidValueError, match="format: expected one of csv, json, parquet, got 'xlsx'"):
        export_run(run, tmp_path / "out.xlsx")
    with pytest.raises(InvalidValueError, match="Parquet needs a path"):
        export_run(run, io.StringIO(), format="parquet")
