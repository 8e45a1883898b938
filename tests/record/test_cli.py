"""The command line, called as a shell calls it."""

from __future__ import annotations

import csv
import json
import os
import pty
import select
import subprocess
import sys
import time

import numpy as np
import pytest
from synthetic import gradient_rows

from pytracker.parameters import summarize
from pytracker.store import Run

VERBS = ("list", "show", "compare", "report", "watch", "export", "diagnose", "doctor", "demo")


def call(*arguments, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, "-m", "pytracker.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        check=False,
    )


def record(directory, name, infos, losses, config):
    numel = np.array([info.numel for info in infos])
    generator = np.random.default_rng(0)
    with Run(directory, name=name, config=config) as run:
        run.set_parameters(infos)
        for step, loss in enumerate(losses):
            run.log(step, train_loss_with_a_long_name=loss, val_accuracy=1 - loss, lr=0.1)
        for first in range(0, len(losses) - 9, 10):
            rows = gradient_rows(generator, 10, numel)
            run.log_interval(summarize(np.arange(first, first + 10), rows, numel))
        run.log_finding(
            {"rule": "spike", "severity": "warning", "first_step": 3, "last_step": 5, "evidence": "loss 9 at step 4"}
        )
    return run.path


@pytest.fixture
def runs(tmp_path, infos):
    record(tmp_path, "brisk-otter", infos, np.linspace(1, 0.1, 50).tolist(), {"lr": 0.1, "depth": 2})
    record(tmp_path, "calm-heron", infos, [*np.linspace(1, 0.3, 49).tolist(), float("nan")], {"lr": 0.2, "depth": 2})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.sqlite").write_text("no database at all" * 100)
    return tmp_path


def test_list_shows_every_run_and_why_one_is_unreadable(runs):
    done = call("list", runs)
    assert done.returncode == 0
    for text in ("brisk-otter", "calm-heron", "finished", "broken", "unreadable", "damaged or not a run"):
        assert text in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help_with_an_example(verb):
    done = call(verb, "--help")
    assert done.returncode == 0
    assert f"Example: pytracker {verb}" in done.stdout
    assert verb in call("--help").stdout


def test_each_verb_that_prints_data_prints_it_as_json(runs):
    def load(*arguments):
        done = call(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    assert {run["name"]: run["state"] for run in load("list", runs)} == {
        "brisk-otter": "finished",
        "calm-heron": "finished",
        "broken": "unreadable",
    }
    shown = load("show", "otter", "--dir", runs)
    assert (shown["config"], shown["last_step"], len(shown["parameters"])) == ({"lr": 0.1, "depth": 2}, 49, 3)
    compared = load("compare", "otter", "heron", "--dir", runs, "--threshold", "val_accuracy=0.5")
    assert compared["config"] == {"lr": [0.1, 0.2]}
    assert compared["reach"][0]["steps"] == [28, 35]
    assert isinstance(load("diagnose", "otter", "--dir", runs), list)
    assert "versions" in load("doctor")


def test_tables_fit_80_columns_and_need_no_colour(runs):
    for arguments in (
        ("list", runs),
        ("show", "otter", "--dir", runs),
        ("compare", "otter", "heron", "--dir", runs),
        ("watch", "otter", "--dir", runs, "--once"),
    ):
        done = call(*arguments, COLUMNS="80", NO_COLOR="1")
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= 80, arguments
        assert "…" not in done.stdout
        assert "otter" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "nothing"), "there is no run 'nothing'"),
        (("list", "nowhere"), "there is no folder nowhere"),
        (("show", "r"), "could be any of"),
        (("show", "broken"), "damaged or not a run"),
        (("compare", "otter", "--threshold", "loss"), "expected METRIC=VALUE"),
        (("compare", "otter", "--threshold", "loss=1"), "no run has a metric 'loss'"),
        (("export", "otter", "-o", "x.xlsx"), "format: expected one of csv, json, parquet, got 'xlsx'"),
        (("report", "otter", "nothing"), "there is no run 'nothing'"),
    ],
)
def test_errors_go_to_stderr_with_a_status(runs, arguments, message):
    done = (
        call(*arguments, cwd=runs, PYTRACKER_RUNS=str(runs)) if arguments[0] != "list" else call(*arguments, cwd=runs)
    )
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_export_writes_csv_to_standard_output_and_files(runs):
    rows = list(csv.DictReader(call("export", "otter", "--dir", runs).stdout.splitlines()))
    assert len(rows) == 50
    assert float(rows[0]["val_accuracy"]) == 0.0
    done = call("export", "otter", "--dir", runs, "-o", runs / "out.json")
    assert (done.returncode, done.stdout) == (0, "")
    assert json.loads((runs / "out.json").read_text())["name"] == "brisk-otter"


def test_report_writes_a_page(runs):
    pytest.importorskip("plotly", reason="the report draws with plotly")
    done = call("report", "otter", "heron", "--dir", runs, "-o", runs / "page.html")
    assert done.returncode == 0, done.stderr
    assert str(runs / "page.html") in done.stdout
    assert "brisk-otter" in (runs / "page.html").read_text()


def test_diagnose_fails_on_request(tmp_path):
    with Run(tmp_path, name="sick") as run:
        for step in range(200):
            run.log(step, loss=0.7 if step < 100 else float("nan"))
    assert call("diagnose", "sick", "--dir", tmp_path).returncode == 0
    done = call("diagnose", "sick", "--dir", tmp_path, "--fail-on", "critical")
    assert done.returncode == 1
    assert "critical" in done.stdout


def test_the_command_line_starts_without_torch_numpy_and_plotly():
    code = "import sys, pytracker.cli; sys.exit(bool({'torch', 'numpy', 'plotly', 'rich.table'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_shell_completes_names_of_runs(runs):
    words = {"COMP_WORDS": f"pytracker show --dir {runs} br", "COMP_CWORD": "4", "_CLI_COMPLETE": "bash_complete"}
    code = "from pytracker.cli import main; main(prog_name='cli')"
    environment = {**os.environ, **words}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.split() == ["plain,brisk-otter", "plain,broken"]


TRAINING = """
import sys, time
from pytracker.store import Run
with Run(sys.argv[1], name="live", flush_seconds=0.1) as run:
    for step in range(150):
        run.log(step, loss=1.0 / (step + 1), grad_norm=2.0)
        time.sleep(0.02)
"""


def read_terminal(descriptor, until, seconds=30):
    text, deadline = "", time.monotonic() + seconds
    while until not in text:
        assert time.monotonic() < deadline, text
        if select.select([descriptor], [], [], 0.1)[0]:
            try:
                text += os.read(descriptor, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                break
    return text


def test_watch_follows_a_training_in_another_process_until_it_ends(tmp_path):
    training = subprocess.Popen([sys.executable, "-c", TRAINING, str(tmp_path)])
    while not (tmp_path / "live" / "run.sqlite-wal").exists():
        time.sleep(0.02)
    time.sleep(0.5)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "pytracker.cli", "watch", str(tmp_path / "live"), "--every", "0.2"]
    watching = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "COLUMNS": "100"}
    )
    os.close(theirs)
    text = read_terminal(ours, "finished")
    assert watching.wait(20) == 0
    assert training.wait(20) == 0
    os.close(ours)
    assert text.count("running") > 3
    assert "loss" in text
    assert "steps/s" in text
    assert "▁" in text


def test_watch_reads_only_what_is_new_and_begins_again_after_a_resume(tmp_path):
    from pytracker.store import Tail

    with Run(tmp_path, name="one") as run:
        for step in range(10):
            run.log(step, loss=float(step))
        run.flush()
        tail = Tail(run.path)
        tail.read()
        assert tail.history["loss"] == list(range(10))
        assert tail.run.state == "running"
        run.log(10, loss=10.0)
        run.flush()
        tail.read()
        assert tail.history["loss"] == list(range(11))
    with Run(tmp_path, name="one", resume=True) as run:
        run.log(5, loss=-5.0)
        run.flush()
        tail.read()
        assert tail.history["loss"] == [0, 1, 2, 3, 4, -5]
    tail.read()
    assert tail.run.state == "finished"
