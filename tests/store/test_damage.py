"""`pytracker check`: whatever changes in a run file is found, or changes nothing that the file says."""

from __future__ import annotations

import contextlib
import math
import random
import shutil
import sqlite3
import tracemalloc
import zlib
from contextlib import closing

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytracker.errors import RunFormatError, StoreError
from pytracker.history import ParameterInfo, summarize
from pytracker.runfile import checksum, open_for_writing, schema
from pytracker.store import Run, check_run

ROWS = np.random.default_rng(0).random((5, 3, 6))
AT_THREE = """first_step = 3, last_step = 3, count = 1, points = '{"3":1}'"""
TABLES = sorted(schema.TABLES)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that has rows in every table: it was resumed, and some of it archived."""
    folder = tmp_path_factory.mktemp("runs")
    infos = [ParameterInfo(name, (3, 2), "float32", "0", 6) for name in ("a", "b", "c")]
    with Run(folder, name="one", config={"lr": 0.1}) as run:
        run.set_parameters(infos)
        run.set_meta(optimizer="SGD")
        for step in range(40):
            run.log(step, loss=1.0 / (step + 1), other=float("nan") if step < 3 else -float(step))
        for start in (0, 20):
            run.log_rows(np.arange(start, start + 5), ROWS)
            run.log_interval(summarize(np.arange(start, start + 5), ROWS, [6, 6, 6]))
            run.log_finding({"rule": "spike", "severity": "warning", "first_step": start, "last_step": start})
    with Run(folder, name="one", resume=True) as run:
        run.log(20, loss=0.5)
        run.log(21, loss=0.25, other=3.0)
    return run.path / "run.sqlite"


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """What a run leaves that is killed: a file, and a log of what is not in it yet."""
    folder = tmp_path_factory.mktemp("killed")
    with Run(folder, name="one") as run:
        for step in range(5):
            run.log(step, loss=1.0)
            run.flush()
        shutil.copytree(run.path, folder / "copy")
    return folder / "copy"


@pytest.fixture
def file(whole, tmp_path):
    """A copy of it."""
    (tmp_path / "one").mkdir()
    file = tmp_path / "one" / "run.sqlite"
    file.write_bytes(whole.read_bytes())
    return file


def contents(file):
    """All that a file says, read without pytracker."""
    with closing(sqlite3.connect(file)) as connection:
        connection.text_factory = bytes
        return {table: connection.execute(f"SELECT * FROM {table}").fetchall() for table in TABLES}


def found(file):
    try:
        return check_run(file)
    except StoreError as error:
        return [str(error)]


def change(file, sql):
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.executescript(sql)


def test_a_whole_file_has_rows_in_every_table_and_nothing_damaged(file):
    assert check_run(file) == []
    assert all(contents(file).values())


def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(file):
    before, data = contents(file), file.read_bytes()
    places = [*range(100), *sorted(random.Random(0).sample(range(100, len(data)), 900))]
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        file.write_bytes(flipped)
        assert found(file) or contents(file) == before, place


def columns(file, table):
    with closing(sqlite3.connect(file)) as connection:
        return [name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})")]


@pytest.mark.parametrize("table", TABLES)
def test_each_cell_that_another_program_changes_is_found(file, table):
    data = file.read_bytes()
    key, *others = columns(file, table)
    for column in (key, *others):
        for value in ("7", "0.125", "'x'", "x'00ff'", "NULL"):
            before = contents(file)
            with contextlib.suppress(sqlite3.IntegrityError):  # NULL where none may be, or a step that is a text
                change(file, f"UPDATE {table} SET {column} = {value} WHERE {key} = (SELECT max({key}) FROM {table})")
            assert found(file) or contents(file) == before, (column, value)
            file.write_bytes(data)


@pytest.mark.parametrize("table", TABLES)
def test_a_row_that_is_deleted_or_doubled_is_found_in_every_table(file, table):
    data = file.read_bytes()
    key, *others = columns(file, table)
    change(file, f"DELETE FROM {table} WHERE {key} = (SELECT max({key}) FROM {table})")
    assert found(file)
    file.write_bytes(data)
    new = {"id": "max(id) + 1", "step": "max(step) + 1", "first_step": "max(first_step) + 1"}.get(
        key, f"max({key}) || 1"
    )
    copied = [
        f"{each} || 1" if (table, each) in {("series", "name"), ("parameters", "name")} else each for each in others
    ]
    change(file, f"INSERT INTO {table} SELECT {', '.join([new, *copied])} FROM {table}")
    assert found(file)


def test_a_flipped_bit_in_the_log_of_a_killed_run_is_found_or_changes_nothing(killed, tmp_path):
    log = (killed / "run.sqlite-wal").read_bytes()
    assert check_run(killed) == []
    whole = contents(shutil.copytree(killed, tmp_path / "whole") / "run.sqlite")
    assert len(whole["batches"]) == 5
    for place in sorted(random.Random(1).sample(range(len(log)), 200)):
        flipped = bytearray(log)
        flipped[place] ^= 1 << place % 8
        copy = shutil.copytree(killed, tmp_path / str(place))
        (copy / "run.sqlite-wal").write_bytes(flipped)
        assert found(copy) or contents(copy / "run.sqlite") == whole, place


def test_a_log_that_is_cut_within_a_frame_as_by_a_kill_is_no_damage(killed, tmp_path):
    copy = shutil.copytree(killed, tmp_path / "one")
    log = copy / "run.sqlite-wal"
    log.write_bytes(log.read_bytes()[:-1000])
    assert check_run(copy) == []


@pytest.mark.parametrize(
    "sql",
    [
        "ALTER TABLE clock RENAME TO clocks",
        "ALTER TABLE batches RENAME COLUMN count TO counts",
        "DROP VIEW metrics",
        "CREATE TABLE photos (id)",
        "CREATE TRIGGER more AFTER INSERT ON batches BEGIN DELETE FROM clock; END",
        "DROP TABLE totals",
        "PRAGMA user_version = 2",
    ],
)
def test_another_schema_is_found(file, sql):
    change(file, sql)
    assert found(file)


def with_totals(file, sql):
    """What somebody who knows the format writes: the checksums and totals are right, and what they sum up is wrong."""
    connection, _ = open_for_writing(file.parent)
    with closing(connection):
        for statement in sql.split(";"):
            connection.execute(statement)
        for table in ("batches", "intervals", "exact_rows"):
            first = int(table == "batches")
            for row in connection.execute(f"SELECT rowid, * FROM {table}").fetchall():
                true = checksum(*row[1 + first : -1])
                connection.execute(f"UPDATE {table} SET checksum = ? WHERE rowid = ?", (true, row[0]))
        connection.execute("PRAGMA journal_mode = DELETE")


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        ("UPDATE series SET minimum = -7 WHERE id = 1", "series: 'loss' is said to be"),
        ("UPDATE series SET count = count + 1 WHERE id = 2", "series: 'other' is said to be"),
        ("DELETE FROM batches WHERE id = 1", "series: 'loss' is said to be"),
        ("DELETE FROM series WHERE id = 1", "values of a series 1, and there is no such series"),
        ("UPDATE batches SET last_step = 99 WHERE id = 1", "it has 20 points, from step 0 to 19"),
        ("UPDATE batches SET points = '[]' WHERE id = 1", "batches: the row of id 1"),
        (
            "UPDATE batches SET first_step = 3, last_step = 3, count = 1, points = '{\"3\":1}' WHERE id = 3",
            "begins at step 3",
        ),
        ("UPDATE intervals SET last_step = 0, norm_mean = x'00'", "expected a blob for 3 parameters"),
        ("INSERT INTO intervals (first_step, last_step, checksum) VALUES (2, 9, 0)", "others reach to 4"),
        ("UPDATE exact_rows SET count = 4000000000", "steps where 4000000000 are expected"),
        ("UPDATE exact_rows SET moments = x'789c'", "exact_rows: the row of first_step 0"),
        ("UPDATE parameters SET numel = -1 WHERE id = 0", "parameters has -1"),
        ("UPDATE clock SET seconds = 'soon'", "clock has 'soon'"),
        ("UPDATE sessions SET state = 'odd'", "has the state 'odd'"),
        ("UPDATE run SET config = '{'", "the run: Expecting property name"),
    ],
)
def test_what_checksums_cannot_tell_is_found_by_decoding_all_of_it(file, sql, reason):
    with_totals(file, sql)
    assert any(reason in line for line in found(file)), found(file)


def test_rows_that_claim_to_unpack_to_more_than_memory_are_found_unpacked_no_further_than_allowed(file):
    bomb = zlib.compress(bytes(50 * 2**20), 9)
    with_totals(file, f"UPDATE exact_rows SET moments = x'{bomb.hex()}'")
    tracemalloc.start()
    assert any("exact_rows" in line for line in found(file))
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    tracemalloc.stop()


def test_a_row_of_more_than_a_reader_takes_is_refused_without_a_look_at_its_pages(file, monkeypatch):
    monkeypatch.setattr("pytracker.runfile.schema._LARGEST_ROW", 2**20)
    monkeypatch.setattr("pytracker.runfile.checking._Check.pages", lambda self: pytest.fail("it looked"))
    change(file, "UPDATE intervals SET norm_mean = zeroblob(3000000)")
    with pytest.raises(RunFormatError, match=r"run\.sqlite"):
        check_run(file)


def test_a_resume_heals_nothing(file):
    change(file, "DELETE FROM clock WHERE step = 20")
    assert check_run(file) == ["clock: it should have 3 rows, and has 2"]
    with Run(file.parent.parent, name="one", resume=True) as run:
        run.log(30, loss=1.0)
    assert check_run(file) == ["clock: it should have 4 rows, and has 3"]


def test_a_file_of_a_version_that_kept_no_totals_gets_them_when_it_is_resumed(file):
    change(file, "DROP TABLE totals")
    assert check_run(file) == ["the schema: it has no totals"]
    with Run(file.parent.parent, name="one", resume=True) as run:
        run.log(30, loss=1.0)
    assert check_run(file) == []


VALUES = st.lists(st.sampled_from([0.5, -1.0, 1e300, math.nan, math.inf, -math.inf]), min_size=1, max_size=5)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("abc"), VALUES), min_size=1, max_size=9), st.integers(0, 12))
def test_what_a_run_writes_and_truncates_is_whole(tmp_path_factory, logged, cut):
    folder = tmp_path_factory.mktemp("runs")
    with Run(folder, name="one", flush_seconds=0.01) as run:
        for step, (name, values) in enumerate(logged):
            run.log_many([step] * len(values), {name: values})
            if step % 3 == 2:
                run.flush()
        run.truncate(cut)
    assert check_run(run.path) == []
