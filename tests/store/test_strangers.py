"""Files made by strangers, and damaged ones: refused by name, at once, and the other runs are shown."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest
from click.testing import CliRunner

from pytracker.cli import main
from pytracker.errors import RunFormatError, StoreError
from pytracker.history import summarize
from pytracker.runfile.packing import checksum
from pytracker.store import Run, check_run, list_runs, load_run

DEEP = "[" * 5000 + "]" * 5000


def make(folder, infos, name="bad"):
    with Run(folder, name=name, config={"lr": 0.1}) as run:
        run.set_parameters(infos)
        for step in range(300):
            run.log(step, loss=1.0 / (step + 1), accuracy=0.5)
        rows = np.random.default_rng(0).random((5, 3, 6))
        run.log_rows(np.arange(5), rows)
        run.log_interval(summarize(np.arange(5), rows, [info.numel for info in infos]))
        run.log_finding({"rule": "spike", "severity": "warning", "first_step": 1, "parameters": ["a"], "numbers": {}})
        run.set_meta(optimizer="SGD")
    return run.path


REPLACED = """ALTER TABLE {table} RENAME TO old; CREATE VIEW {table} AS
WITH RECURSIVE endless(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM endless) SELECT old.* FROM old, endless"""

SPOILED = {
    "a name that is a number": "UPDATE run SET name = x'00ff'",
    "a time that is a text": "UPDATE run SET created = 'yesterday'",
    "a time beyond all calendars": "UPDATE run SET created = 1e300",
    "a time that is infinite": "UPDATE sessions SET started = 9e999",
    "a state with markup": "UPDATE sessions SET state = '<script>'",
    "facts that are a list": "UPDATE sessions SET facts = '[]'",
    "a deep config": f"UPDATE run SET config = '{DEEP}'",
    "deep facts": f"UPDATE sessions SET facts = '{DEEP}'",
    "deep meta": f"UPDATE meta SET value = '{DEEP}'",
    "a config that is a blob": "UPDATE run SET config = zeroblob(100)",
    "a config of more than a reader takes": "UPDATE run SET config = zeroblob(3000000)",
    "a finding that is a number": "UPDATE findings SET document = '3'",
    "a finding whose rule is a list": """UPDATE findings SET document = '{"rule": [], "first_step": 1}'""",
    "a finding whose step is a text": """UPDATE findings SET document = '{"rule": "x", "first_step": "<b>"}'""",
    "a finding whose numbers are texts": """UPDATE findings SET document = '{"rule": "x", "numbers": {"a": "b"}}'""",
    "a series whose name is a number": "UPDATE series SET name = x'01' WHERE id = 1",
    "a step that is a text": "UPDATE series SET last_step = 'seven'",
    "a step that is negative": "UPDATE series SET last_step = -7",
    "a count of dropped values that is a text": "UPDATE run SET dropped_points = 'many'",
    "an endless run": REPLACED.format(table="run"),
    "endless sessions": REPLACED.format(table="sessions"),
    "endless series": REPLACED.format(table="series"),
    "endless batches": REPLACED.format(table="batches"),
    "endless intervals": REPLACED.format(table="intervals"),
    "a computed column": "ALTER TABLE run ADD COLUMN more AS (hex(zeroblob(100000000)))",
}

LATER = {
    "points that are no JSON": "UPDATE batches SET points = 'no'",
    "points that are deep": f"UPDATE batches SET points = '{DEEP}'",
    "points that are texts": """UPDATE batches SET points = '{"a":"b"}'""",
    "points with negative steps": """UPDATE batches SET points = '{"-3":1.0}'""",
    "points with steps that descend": """UPDATE batches SET points = '{"3":1.0,"2":1.0}'""",
    "points of more than a reader takes": "UPDATE batches SET points = zeroblob(3000000)",
    "a shape that is no list": "UPDATE parameters SET shape = '3'",
    "a negative number of elements": "UPDATE parameters SET numel = -1",
    "a field of another length": "UPDATE intervals SET norm_mean = zeroblob(1000)",
    "a field that is a text": "UPDATE intervals SET norm_mean = 'text'",
    "a field of more than a reader takes": "UPDATE intervals SET norm_mean = zeroblob(3000000)",
    "intervals that overlap": "INSERT INTO intervals (first_step, last_step, checksum) VALUES (2, 9, 0)",
    "rows that unpack to more": "UPDATE exact_rows SET count = 4000000000, steps = '[0,1,2,3,4]'",
    "rows in another format": "UPDATE exact_rows SET format = 'float16'",
}


def with_true_checksums(connection):
    """A stranger who means harm writes true checksums."""
    columns = "series, first_step, last_step, count, points"
    for key, *row in connection.execute(f"SELECT id, {columns} FROM batches").fetchall():
        if len(row[-1]) < 2**20:
            connection.execute("UPDATE batches SET checksum = ? WHERE id = ?", (checksum(*row), key))
    for table in ("intervals", "exact_rows"):
        for row in connection.execute(f"SELECT * FROM {table}").fetchall():
            if all(len(cell) < 2**20 for cell in row if isinstance(cell, (str, bytes))):
                connection.execute(
                    f"UPDATE {table} SET checksum = ? WHERE first_step = ?", (checksum(*row[:-1]), row[0])
                )


@pytest.fixture(autouse=True)
def _small_rows(monkeypatch):
    """A reader that takes rows of a megabyte can be tested without filling a disk."""
    monkeypatch.setattr("pytracker.runfile.schema._LARGEST_ROW", 2**20)


def spoil(path, sql):
    with closing(sqlite3.connect(path / "run.sqlite", isolation_level=None)) as connection:
        connection.executescript(sql)
        if sql in LATER.values():
            with_true_checksums(connection)


@pytest.mark.parametrize("sql", SPOILED.values(), ids=SPOILED)
def test_a_bad_run_is_refused_and_the_others_are_listed(tmp_path, infos, sql):
    make(tmp_path, infos, "good")
    path = make(tmp_path, infos)
    spoil(path, sql)
    with pytest.raises(RunFormatError, match=r"run\.sqlite"):
        load_run(path).load_history(parameters=True)
    runs = {run.name: run for run in list_runs(tmp_path)}
    assert runs["good"].state == "finished"
    assert "run.sqlite" in runs["bad"].error or runs["bad"].state == "finished"


@pytest.mark.parametrize("sql", LATER.values(), ids=LATER)
def test_a_bad_part_of_a_run_is_refused_when_it_is_read(tmp_path, infos, sql):
    path = make(tmp_path, infos)
    spoil(path, sql)
    with pytest.raises(RunFormatError, match=r"run\.sqlite"):
        load_run(path).load_history(parameters=True)
    assert [run.name for run in list_runs(tmp_path)] == ["bad"]


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path, infos):
    make(tmp_path, infos, "good")
    kinds = {
        "pipe": lambda path: os.mkfifo(path),
        "folder": lambda path: path.mkdir(),
        "circle": lambda path: path.symlink_to(path),
        "device": lambda path: path.symlink_to("/dev/zero"),
    }
    for name, place in kinds.items():
        (tmp_path / name).mkdir()
        place(tmp_path / name / "run.sqlite")
        with pytest.raises(StoreError, match=name):
            load_run(tmp_path / name)
    states = {run.name: run.state for run in list_runs(tmp_path)}
    assert states == {"good": "finished", **dict.fromkeys(kinds, "unreadable")}


AS_NOBODY = """
import os, sys
from pytracker.store import list_runs
list_runs(sys.argv[1])  # what it imports late
os.setegid(65534); os.seteuid(65534)
print({run.name: run.state for run in list_runs(sys.argv[1])})
"""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="becoming another user needs root")
def test_another_users_run_is_shown_as_unreadable(tmp_path, infos):
    for name in ("closed folder", "closed file", "good"):
        make(tmp_path, infos, name)
    (tmp_path / "closed folder").chmod(0o700)
    (tmp_path / "closed file" / "run.sqlite").chmod(0o600)
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.stat().st_uid == os.getuid() and not folder.stat().st_mode & stat.S_IXOTH:
            folder.chmod(folder.stat().st_mode | 0o055)
    arguments = [sys.executable, "-c", AS_NOBODY, str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert eval(done.stdout) == {"closed folder": "unreadable", "closed file": "unreadable", "good": "finished"}


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x01
    path.write_bytes(data)


def test_a_flipped_bit_in_a_value_is_found_named_and_costs_its_batch_alone(tmp_path, infos):
    path = make(tmp_path, infos)
    with Run(tmp_path, name="bad", resume=True) as run:
        run.log(300, loss=7.25)
    assert check_run(path) == []
    file = path / "run.sqlite"
    flip(file, file.read_bytes().index(b'"300":7.25') + 8)
    with pytest.warns(RuntimeWarning, match="'loss' at steps 300 to 300 don't match their checksums and are left out"):
        history = load_run(path).history
    assert len(history["loss"]) == 300
    assert len(history["accuracy"]) == 300
    (damage,) = check_run("bad", tmp_path)
    assert damage.startswith("batches: the row of id 3")
    done = subprocess.run(
        [sys.executable, "-m", "pytracker", "check", "bad", "--dir", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (4, damage)


def test_each_flipped_bit_of_what_is_summed_is_found(tmp_path, infos):
    path = make(tmp_path, infos)
    file = path / "run.sqlite"
    whole = file.read_bytes()
    with closing(sqlite3.connect(file)) as connection:
        texts = [
            connection.execute(sql).fetchone()[0]
            for sql in (
                "SELECT points FROM batches",
                "SELECT norm_mean FROM intervals",
                "SELECT moments FROM exact_rows",
                "SELECT document FROM findings",
                "SELECT value FROM meta",
                "SELECT name FROM parameters",
            )
        ]
    for text in texts:
        data = text.encode() if isinstance(text, str) else text
        place = whole.index(data[:30])
        for offset in range(0, min(len(data), 30), 7):
            flip(file, place + offset)
            try:
                found = check_run(path)
            except StoreError as error:
                found = [str(error)]
            assert found, f"{data[:20]!r} + {offset}"
            file.write_bytes(whole)
    assert check_run(path) == []


ODD = [None, True, -1, 1e308, "x", [], [[1]], [None], {"a": 1}, {}]
KNOWN = "command working_directory host pid platform cpus python torch pytracker devices git_commit git_dirty"
FACTS = [*KNOWN.split(), "git_diff", "packages", "journal_mode", "unknown"]


@pytest.mark.parametrize("name", FACTS)
def test_facts_of_an_odd_type_are_left_out_and_the_run_is_shown(tmp_path, infos, name):
    path = make(tmp_path, infos)
    facts = load_run(path).facts
    for value in ODD:
        with closing(sqlite3.connect(path / "run.sqlite", isolation_level=None)) as connection:
            connection.execute("UPDATE sessions SET facts = ?", (json.dumps({**facts, name: value}),))
        found = load_run(path).facts
        assert found[name] in (value, None)
        assert {other: found[other] for other in facts if other != name} == {
            other: fact for other, fact in facts.items() if other != name
        }
        for verb in (["show"], ["compare"], ["list", "--columns", "run,lr"]):
            arguments = [*verb, *([] if verb[0] == "list" else [str(path)]), "--dir", str(tmp_path)]
            shown = CliRunner().invoke(main, arguments)
            assert shown.exit_code == 0, shown.exception
