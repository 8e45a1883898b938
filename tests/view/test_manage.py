"""Tags, notes, other names, and runs that are taken away."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytracker.errors import InvalidTypeError, InvalidValueError, RunLockedError, RunNotFoundError
from pytracker.store import Run, list_runs, load_run
from pytracker.view import annotate_run, delete_run, read_notes, rename_run


@pytest.fixture
def run(tmp_path):
    with Run(tmp_path, name="one") as run:
        run.log(0, loss=1.0)
    return run.path


def test_notes_are_read_with_the_run_and_change_nothing_in_its_file(run):
    before = (run / "run.sqlite").read_bytes()
    annotate_run(run, add=["b", "a", "b"], note="first", group="sweep")
    annotate_run(run, add=["c"], remove=["b", "never there"])
    assert read_notes(run) == {"tags": ["a", "c"], "note": "first", "group": "sweep"}
    annotate_run(run, note="", group="")
    assert read_notes(run) == {"tags": ["a", "c"]}
    assert (run / "run.sqlite").read_bytes() == before


def test_a_run_that_is_being_written_can_be_tagged_and_not_renamed_or_deleted(tmp_path):
    with Run(tmp_path, name="live") as run:
        run.log(0, loss=1.0)
        run.flush()
        assert annotate_run(run.path, add=["now"]) == {"tags": ["now"]}
        with pytest.raises(RunLockedError, match="'live' is being written"):
            rename_run(run.path, "other")
        with pytest.raises(RunLockedError, match="'live' is being written"):
            delete_run(run.path)
        run.log(1, loss=0.5)
    assert load_run(run.path).history["loss"] == [1.0, 0.5]
    assert read_notes(run.path) == {"tags": ["now"]}


@given(st.text() | st.binary() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_notes_that_make_no_sense_are_none(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "notes"
    with Run(folder, name="one", resume=True):
        pass
    path = folder / "one" / "notes.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    notes = read_notes(folder / "one")
    assert all(isinstance(notes.get(name, ""), str) for name in ("note", "group"))
    assert all(isinstance(tag, str) for tag in notes.get("tags", []))


def test_a_renamed_run_is_found_by_its_new_name_alone(run, tmp_path):
    assert rename_run(run, "two") == tmp_path / "two"
    assert [each.name for each in list_runs(tmp_path)] == ["two"]
    assert load_run(tmp_path / "two").history["loss"] == [1.0]
    with Run(tmp_path, name="one") as fresh:
        fresh.log(0, loss=2.0)
    with pytest.raises(InvalidValueError, match="name: 'two' is taken"):
        rename_run(tmp_path / "one", "two")
    for name in ("../up", "", ".hidden", "a/b"):
        with pytest.raises(InvalidValueError, match="can't be a folder's name"):
            rename_run(tmp_path / "one", name)


def test_a_deleted_run_is_gone_and_what_is_not_a_runs_stays(run, tmp_path):
    (run / "weights.pt").write_bytes(b"precious")
    annotate_run(run, add=["x"])
    assert delete_run(run) == ["weights.pt"]
    assert sorted(path.name for path in run.iterdir()) == ["weights.pt"]
    assert list_runs(tmp_path) == []
    with Run(tmp_path, name="two"):
        pass
    assert delete_run(tmp_path / "two") == []
    assert not (tmp_path / "two").exists()


def test_what_is_no_run_and_no_tag_is_named(run, tmp_path):
    for act in (lambda path: rename_run(path, "x"), delete_run, annotate_run):
        with pytest.raises(RunNotFoundError, match="there is no run at"):
            act(tmp_path)
    with pytest.raises(InvalidValueError, match=r"tag: expected a text without commas .* got 'a,b'"):
        annotate_run(run, add=["a,b"])
    with pytest.raises(InvalidTypeError, match="note: expected a str, got int 3"):
        annotate_run(run, note=3)
