"""Run and load_run: what goes in comes out, in any order of trouble that the API allows."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import re
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import gradient_rows

from pytracker._json import decode, encode
from pytracker.errors import ClosedError, InvalidTypeError, InvalidValueError, RunNotFoundError, StoreError
from pytracker.history import FIELDS, ParameterInfo, summarize
from pytracker.store import Run, list_runs, load_run


def recorded(tmp_path, steps=20, **options):
    with Run(tmp_path, name="one", **options) as run:
        for step in range(steps):
            run.log(step, loss=1.0 / (step + 1), lr=0.1)
    return run.path


def test_every_value_comes_back_exactly(tmp_path):
    values = [0.1, math.nan, math.inf, -math.inf, 1e-320, 1e308, -1.5]
    with Run(tmp_path) as run:
        for step, value in enumerate(values):
            run.log(10 * step, loss=value, constant=3)
        run.log_many([100, 101], {"loss": np.array([1.5, math.nan]), "grad_norm": [2.0, 3.0]})
    history = load_run(run.path).history
    assert [repr(value) for value in history["loss"]] == [repr(value) for value in [*values, 1.5, math.nan]]
    assert history["loss"].steps.tolist() == [0, 10, 20, 30, 40, 50, 60, 100, 101]
    assert history["grad_norm"] == [2.0, 3.0]
    assert list(history) == ["loss", "constant", "grad_norm"]


@given(
    st.lists(
        st.dictionaries(st.sampled_from(["a", "b/c", "d e"]), st.floats(width=64, allow_nan=False), max_size=3),
        max_size=30,
    )
)
def test_the_file_holds_what_the_memory_holds(tmp_path_factory, calls):
    with Run(tmp_path_factory.mktemp("runs")) as run:
        for step, metrics in enumerate(calls):
            run.log(step, **metrics)
    stored = load_run(run.path)
    assert stored.history == run.history
    for name, series in run.history.items():
        summary = stored.summaries[name]
        values = list(series)
        assert (summary.count, summary.last, summary.last_step) == (len(values), values[-1], series.steps[-1])
        assert (summary.minimum, summary.maximum) == (min(values), max(values))
        assert summary.minimum_step == series.steps[values.index(min(values))]
        assert summary.maximum_step == series.steps[values.index(max(values))]


def test_parameters_come_back_exactly(tmp_path, infos):
    generator = np.random.default_rng(1)
    numel = np.array([info.numel for info in infos])
    with Run(tmp_path, every_step=True) as run:
        run.set_parameters(infos)
        for first in (0, 5, 10):
            steps = np.arange(first, first + 5)
            rows = gradient_rows(generator, 5, numel)
            if first == 5:
                rows[2, 1] = math.nan  # missing
                rows[3, 0] = [math.nan, math.nan, math.nan, 0, 7, 0]
            run.log_rows(steps, rows)
            run.log_interval(summarize(steps, rows, numel, weight_norm=[1.0, 2.0, 3.0] if first == 10 else None))
    stored = load_run(run.path).history.parameters
    assert stored.infos == infos
    assert stored.first_step.tolist() == [0, 5, 10]
    for name in FIELDS:
        np.testing.assert_array_equal(stored.field(name), run.history.parameters.field(name), err_msg=name)
    for ours, theirs in zip(stored.rows(), run.history.parameters.rows(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_rows_of_every_step_come_back_as_float32_without_being_asked_for(tmp_path, infos):
    generator = np.random.default_rng(1)
    numel = np.array([info.numel for info in infos])
    rows = np.concatenate([gradient_rows(generator, 5, numel) * scale for scale in (1.0, 1e-60, 1e60)])
    rows[3, 1] = math.nan  # missing
    rows[4, 0] = [math.nan, math.nan, math.nan, 0, 7, 0]
    rows[5, 2] = [math.inf, math.inf, math.inf, 0, 0, 1]
    with Run(tmp_path) as run:
        run.set_parameters(infos)
        for first in (0, 5, 10):
            run.log_rows(np.arange(first, first + 5), rows[first : first + 5])
    steps, norms = load_run(run.path).history.parameters.norms()
    assert steps.tolist() == list(range(15))
    np.testing.assert_allclose(norms, np.sqrt(rows[:, :, 1]), rtol=1e-7)
    np.testing.assert_array_equal(load_run(run.path).history.parameters.rows()[1][:, :, 4:], rows[:, :, 4:])


def test_the_rows_of_every_step_take_no_more_of_the_disk_than_they_may_and_the_oldest_go(tmp_path, infos):
    rows = np.random.default_rng(1).random((10, 3, 6))
    with Run(tmp_path, name="few", max_row_bytes=3000) as run:
        run.set_parameters(infos)
        for first in range(0, 200, 10):
            run.log_rows(np.arange(first, first + 10), rows)
    stored = load_run(run.path)
    steps, _ = stored.history.parameters.norms()
    assert 10 <= len(steps) < 100
    assert steps.tolist() == list(range(200 - len(steps), 200))
    assert stored.dropped_rows == 200 - len(steps)
    with Run(tmp_path, name="none", max_row_bytes=0) as run:
        run.set_parameters(infos)
        run.log_rows(np.arange(10), rows)
    assert len(load_run(run.path).history.parameters.norms()[0]) == 0


@dataclasses.dataclass
class Config:
    lr: float
    layers: tuple[int, ...]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"lr": 0.1, "clip": math.inf, "path": "x"}, {"lr": 0.1, "clip": math.inf, "path": "x"}),
        (Config(0.1, (1, 2)), {"lr": 0.1, "layers": [1, 2]}),
        (argparse.Namespace(lr=0.1, seed=None), {"lr": 0.1, "seed": None}),
        ({"size": np.int64(3), "kind": int}, {"size": 3, "kind": "<class 'int'>"}),
        (None, {}),
    ],
)
def test_a_config_is_kept_as_given(tmp_path, config, expected):
    with Run(tmp_path, config=config) as run:
        pass
    assert load_run(run.path).config == expected


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists))
def test_json_of_anything_is_strict_and_comes_back(value):
    if value in ("NaN", "Infinity", "-Infinity"):
        return  # these three strings stand for the numbers
    text = encode({"value": value})
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    if "Infinity" not in text and "NaN" not in text:
        assert decode(text) == {"value": value}


def test_metadata_and_facts_say_where_a_run_comes_from(tmp_path):
    with Run(tmp_path, config={"lr": 0.1}) as run:
        run.set_meta(optimizer="SGD", clip_threshold=1.0)
        run.set_meta(clip_threshold=2.0)
        run.log(0, loss=1.0)
    stored = load_run(run.path)
    assert stored.meta == {"optimizer": "SGD", "clip_threshold": 2.0}
    assert stored.history.meta == stored.meta
    assert stored.state == "finished"
    assert stored.created <= stored.ended <= time.time()
    assert {"command", "host", "python", "torch", "devices", "git_commit", "git_dirty"} <= set(stored.facts)
    assert stored.facts["python"] == ".".join(map(str, sys.version_info[:3]))


def test_a_torch_that_is_imported_after_the_run_began_is_noted_too(tmp_path):
    pytest.importorskip("torch", reason="the fact in question")
    script = (
        "import sys\nfrom pytracker.store import Run\nwith Run(sys.argv[1], name='one', flush_seconds=0.1) as run:\n"
        "    run.log(0, loss=1.0)\n    run.flush()\n    import torch\n    run.log(1, loss=1.0)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    assert load_run(tmp_path / "one").facts["torch"] == pytest.importorskip("torch").__version__


def test_git_facts_name_the_commit_and_whether_it_is_dirty(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "train.py").write_text("print(1)\n")
    git("add", "train.py")
    git("commit", "-qm", "first")
    monkeypatch.chdir(tmp_path)
    with Run("runs", name="clean"):
        pass
    (tmp_path / "train.py").write_text("print(2)\n")
    with Run("runs", name="dirty"):
        pass
    with Run("runs", name="kept", snapshot=True):
        pass
    for name, dirty in (("clean", False), ("dirty", True)):
        facts = load_run(f"runs/{name}").facts
        assert (facts["git_commit"], facts["git_dirty"]) == (git("rev-parse", "HEAD"), dirty)
        assert not {"git_diff", "packages"} & set(facts)
    kept = load_run("runs/kept").facts
    assert kept["git_diff"] == git("diff", "HEAD")
    assert kept["packages"]["numpy"] == np.__version__


def test_a_finding_replaces_its_earlier_self(tmp_path):
    finding = {"rule": "spike", "severity": "warning", "first_step": 3, "last_step": 3, "parameters": ("a",)}
    with Run(tmp_path) as run:
        run.log_finding({**finding, "numbers": {"ratio": math.inf}})
        run.log_finding({**finding, "last_step": 9})
        run.log_finding({**finding, "parameters": ("b",)})
        run.log_finding({"key": "own", "rule": "spike", "first_step": 3, "parameters": ("b",)})
    stored = load_run(run.path).findings
    assert [(each.get("last_step"), each["parameters"]) for each in stored] == [(9, ["a"]), (3, ["b"]), (None, ["b"])]
    assert len(run.history.findings) == 3


def test_a_run_that_leaves_by_an_exception_says_failed_and_why(tmp_path):
    def train():
        with Run(tmp_path, name="bad") as run:
            run.log(0, loss=1.0)
            run.log(1, loss=1 / 0)

    with pytest.raises(ZeroDivisionError):
        train()
    stored = load_run(tmp_path / "bad")
    assert (stored.state, stored.error) == ("failed", "ZeroDivisionError: division by zero")
    assert stored.history["loss"] == [1.0]


@pytest.mark.parametrize(
    ("ending", "state"),
    [("", "finished"), ("raise ValueError('no')", "failed"), ("import sys; sys.exit(0)", "finished")],
)
def test_a_script_that_forgets_to_finish_is_finished_at_its_exit(tmp_path, ending, state):
    script = (
        f"from pytracker.store import Run\nrun = Run({str(tmp_path)!r}, name='one')\nrun.log(0, loss=1.0)\n{ending}"
    )
    subprocess.run([sys.executable, "-c", script], stderr=subprocess.DEVNULL, check=False)
    stored = load_run(tmp_path / "one")
    assert stored.state == state
    assert stored.history["loss"] == [1.0]


def test_a_bad_value_or_step_is_named_and_nothing_of_the_call_is_recorded(tmp_path):
    with Run(tmp_path) as run:
        run.log(5, loss=1.0)
        with pytest.raises(InvalidTypeError, match="metric 'accuracy' is 'high', of type str"):
            run.log(6, loss=2.0, accuracy="high")
        with pytest.raises(InvalidValueError, match="'loss': step 4 comes before the last recorded step 5"):
            run.log(4, other=1.0, loss=2.0)
        with pytest.raises(InvalidTypeError, match=r"step is 1\.5, of type float; expected a whole number"):
            run.log(1.5, loss=2.0)
        with pytest.raises(InvalidValueError, match=r"step is -1; expected a whole number.*0 or more"):
            run.log(-1, loss=2.0)
        with pytest.raises(InvalidValueError, match="'lr': got 3 values and 2 steps"):
            run.log_many([6, 7], {"loss": [1.0, 2.0], "lr": [1.0, 2.0, 3.0]})
        run.log(6, loss=0.5)
    assert load_run(run.path).history.to_dict() == {"loss": [1.0, 0.5]}


def test_odd_values_in_findings_meta_and_names_never_stop_the_writer(tmp_path, infos):
    with Run(tmp_path, name="one") as run:
        run.log_finding({"rule": "odd", "first_step": np.int64(3), "numbers": {"x": np.float32(1.5)}})
        with pytest.raises(InvalidTypeError, match=r"the finding's rule is \['no', 'str'\], of type list"):
            run.log_finding({"rule": ["no", "str"]})
        run.set_meta(model=object, size=np.int64(3), nested={"inf": math.inf, 1: {2, 3}})
        with pytest.raises(InvalidValueError, match="printable name"):
            run.log(0, **{"bad \udc80 name": 1.0})
        run.set_parameters(infos)
        numel = [info.numel for info in infos]
        interval = summarize([0], np.ones((1, 3, 6)), numel)
        run.log_interval(dataclasses.replace(interval, first_step=np.int64(0), last_step=np.int64(0)))
        run.log(np.int64(1), loss=np.float32(0.5), right=True)
    stored = load_run(run.path)
    assert stored.state == "finished"
    assert stored.findings[0]["numbers"] == {"x": 1.5}
    assert stored.meta == {"model": "<class 'object'>", "size": 3, "nested": {"inf": math.inf, "1": [2, 3]}}
    assert stored.history.to_dict() == {"loss": [0.5], "right": [1.0]}
    assert len(stored.history.parameters) == 1


def test_use_after_finish_is_refused(tmp_path):
    run = Run(tmp_path, name="one")
    run.finish()
    run.finish()
    with pytest.raises(ClosedError, match="run 'one' is finished"):
        run.log(0, loss=1.0)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a\nb", "x" * 201])
def test_a_name_that_cannot_be_a_folder_is_refused(tmp_path, name):
    with pytest.raises(InvalidValueError, match="can't be a folder's name"):
        Run(tmp_path, name=name)


def test_default_names_never_collide(tmp_path, monkeypatch):
    names = iter(["twin", "twin", "other"])
    monkeypatch.setattr("pytracker.store.run.readable_name", lambda: next(names))
    with Run(tmp_path) as first, Run(tmp_path) as second:
        assert (first.name, second.name) == ("twin", "other")


def test_a_name_that_exists_is_refused_without_resume(tmp_path):
    recorded(tmp_path)
    with pytest.raises(
        StoreError, match=r"run 'one' exists in .*: resume=True goes on with it; or choose another name"
    ):
        Run(tmp_path, name="one")


def test_list_runs_shows_the_newest_first(tmp_path):
    for name in ("b", "a", "c"):
        with Run(tmp_path, name=name):
            pass
    assert [run.name for run in list_runs(tmp_path)] == ["c", "a", "b"]
    with pytest.raises(RunNotFoundError, match="there is no folder"):
        list_runs(tmp_path / "nowhere")


def test_load_run_takes_a_path_a_name_or_a_part_of_one(tmp_path, monkeypatch):
    path = recorded(tmp_path)
    with Run(tmp_path, name="two"):
        pass
    assert load_run(str(path)).name == "one"
    monkeypatch.chdir(tmp_path.parent)
    assert load_run("one", tmp_path.name).name == "one"
    tmp_path.rename("runs")
    assert load_run("one").name == "one"
    Path("runs").rename(tmp_path)
    assert load_run(str(path / "run.sqlite")).name == "one"
    assert load_run("tw", tmp_path).name == "two"
    with pytest.raises(RunNotFoundError, match="could be any of one, two"):
        load_run("o", tmp_path)
    with pytest.raises(RunNotFoundError, match=r"there is no run 'three'.*runs there: one, two"):
        load_run("three", tmp_path)


def test_the_clock_tells_when_a_step_was_logged(tmp_path):
    with Run(tmp_path) as run:
        for step in range(4):
            run.log(step, loss=1.0)
            time.sleep(0.15)
    steps, seconds = load_run(run.path).clock()
    assert steps.tolist() == [0, 1, 2, 3]
    assert (np.diff(seconds) >= 0.15).all()
    assert load_run(run.path).seconds == seconds[-1]


def test_a_run_is_as_long_as_until_its_last_value(tmp_path):
    with Run(tmp_path) as run:
        for step in range(100):
            run.log(step, loss=1.0)
    steps, _ = load_run(run.path).clock()
    assert (steps[0], steps[-1]) == (0, 99)


DOCUMENTATION = Path(__file__).resolve().parents[2] / "docs" / "runs.md"


def test_the_queries_of_the_documentation_run_on_a_file(tmp_path, infos, monkeypatch):
    with Run(tmp_path, name="one", config={"lr": 0.1}) as run:
        run.set_parameters(infos)
        for step in range(200):
            run.log(step, loss=1.0 / (step + 1), grad_norm=2.0)
        run.log_interval(summarize([0, 1], np.ones((2, 3, 6)), [info.numel for info in infos]))
    with Run(tmp_path, name="one", resume=True) as run:
        run.log(150, loss=0.0)
    text = DOCUMENTATION.read_text()
    queries = re.findall(r"```sql\n(.*?)```", text, re.DOTALL)
    with contextlib.closing(sqlite3.connect(run.path / "run.sqlite")) as connection:
        results = [connection.execute(query).fetchall() for query in queries]
    every_hundredth, series, origin, pairs, speed, archived = results
    assert every_hundredth == [(0, 1.0), (100, 1 / 101)]
    assert series[1][:4] == ("loss", 151, 0.0, 150)
    assert (origin[0][0], origin[0][2]) == (0.1, "finished")
    assert pairs[3] == (3, 0.25, 2.0)
    assert len(speed) == 1
    assert archived == [(1, 150, 100)]
    monkeypatch.chdir(run.path)
    scope: dict[str, object] = {}
    exec(re.findall(r"```python\n(import sqlite3.*?)```", text, re.DOTALL)[0], scope)
    scope["connection"].close()
    assert scope["norms"] == {info.name: 1.0 for info in infos}


def test_the_documentation_names_every_table_and_column(tmp_path):
    with Run(tmp_path) as run:
        pass
    text = DOCUMENTATION.read_text()
    with contextlib.closing(sqlite3.connect(run.path / "run.sqlite")) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type != 'index'")]
        columns = {row[1] for table in tables for row in connection.execute(f"PRAGMA table_info({table})")}
    missing = [name for name in [*tables, *columns] if f"`{name}`" not in text]
    assert missing == []


def test_a_resumed_model_with_other_parameters_is_refused(tmp_path, infos):
    with Run(tmp_path, name="one") as run:
        run.set_parameters(infos)
    with Run(tmp_path, name="one", resume=True) as run:
        run.set_parameters(infos)
        other = [*infos[:1], ParameterInfo("new", (3,), "float32", "", 3), *infos[2:]]
        with pytest.raises(
            InvalidValueError, match=r"recorded with parameter 'conv\.bias' of shape \[8\], and now 'new'"
        ):
            run.set_parameters(other)
        with pytest.raises(InvalidValueError, match="recorded with 3 parameters, and now there are 2"):
            run.set_parameters(infos[:2])


def test_the_store_imports_no_torch():
    code = "import sys, pytracker.store; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
