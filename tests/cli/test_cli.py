"""The command line, called as a shell calls it."""

from __future__ import annotations

import csv
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from synthetic import gradient_rows

from pytracker.diagnostics import RULES, Diagnosis, rule
from pytracker.history import ParameterInfo, summarize
from pytracker.store import Run, load_run

VERBS = (
    "list",
    "show",
    "compare",
    "report",
    "serve",
    "watch",
    "export",
    "diagnose",
    "tag",
    "note",
    "rename",
    "rm",
    "doctor",
    "demo",
)


def call(*arguments, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, "-m", "pytracker", *map(str, arguments)],
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


def test_list_filters_sorts_and_shows_the_columns_that_are_asked_for(runs):
    shutil.rmtree(runs / "broken")
    done = call("list", "--dir", runs, "--where", "lr>0.1", "--columns", "run,lr,val_accuracy,last:val_accuracy")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["run", "lr", "val_accuracy", "last:val_accuracy"]
    assert [line.split()[:2] for line in lines[2:]] == [["calm-heron", "0.2"], ["1", "of"]]
    assert call("list", "--dir", runs, "--sort", "nothing").stderr.startswith("Error: sort: no run has 'nothing'")
    assert "calm-heron" not in call("list", runs, "--sort", "-depth", "--limit", "0").stdout


def test_without_a_name_the_run_that_was_written_last_is_meant(runs):
    shutil.rmtree(runs / "broken")
    os.utime(runs / "brisk-otter" / "run.sqlite", (2e9, 2e9))
    page = str(runs.parent / "page.html")
    for arguments in (("show",), ("diagnose",), ("watch", "--once"), ("export",), ("check",), ("report", "-o", page)):
        done = call(*arguments, "--dir", runs)
        assert (done.returncode, done.stderr) == (0, ""), arguments
    assert call("show", "--dir", runs).stdout.startswith("brisk-otter")
    assert "brisk-otter: nothing is damaged" in call("check", "--dir", runs).stdout
    for verb in ("show", "check", "report"):
        assert "there is no run in nowhere" in call(verb, "--dir", "nowhere").stderr


def test_runs_are_tagged_noted_renamed_and_deleted(runs):
    shutil.rmtree(runs / "broken")
    here = ("--dir", runs)
    assert call("tag", "otter", "paper", "best", *here).stdout == "paper, best\n"
    assert call("tag", "otter", "best", "--remove", *here).stdout == "paper\n"
    assert call("note", "otter", "figure 3", *here).returncode == 0
    assert "figure 3" in call("show", "otter", *here).stdout
    assert call("note", "otter", "ablation", "--group", *here).returncode == 0
    assert "ablation" in call("list", *here, "--columns", "run,group").stdout
    assert call("list", *here, "--where", "group=ablation", "--columns", "run").stdout.split()[2] == "brisk-otter"
    assert call("list", *here, "--where", "tags=paper", "--columns", "run").stdout.split()[2] == "brisk-otter"
    assert call("rename", "otter", "baseline", *here).stdout.strip() == str(runs / "baseline")
    asked = call("rm", "heron", *here)
    assert (asked.returncode, "delete calm-heron for good?" in asked.stderr) == (1, True)
    assert (runs / "calm-heron").exists()
    assert call("rm", "heron", "baseline", "--yes", *here).returncode == 0
    assert list(runs.iterdir()) == []
    assert "Traceback" not in call("rename", "nobody", "x", *here).stderr


def test_compare_has_one_row_a_run_and_details_on_demand(runs):
    short = call("compare", "otter", "heron", "--dir", runs, COLUMNS="200").stdout
    assert short.count("brisk-otter") == 1
    assert "lr" in short.splitlines()[0]
    assert "First reached" not in short
    full = call("compare", "otter", "heron", "--dir", runs, "--details", COLUMNS="200").stdout
    assert full.startswith(short.rstrip())
    assert "First reached" in full


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


@pytest.fixture
def sick(tmp_path):
    """Record a training that stands still, meets a NaN, and of which a tracker knew what no rule can see."""
    with Run(tmp_path, name="sick") as run:
        for step in range(200):
            run.log(step, loss=0.7, grad_norm=0.5 + step % 7 if step != 150 else float("nan"))
        run.log_finding(
            {
                "rule": "replica_drift",
                "severity": "warning",
                "first_step": 120,
                "last_step": 120,
                "evidence": "rank 1 has another gradient",
                "parameters": ["head.weight", "head.bias"],
            }
        )
        run.log_finding({"rule": "constant", "severity": "info", "first_step": 0, "evidence": "stale"})
    return tmp_path


@pytest.mark.parametrize(
    ("fail_on", "status"),
    [((), 0), (("--fail-on", "critical"), 3), (("--fail-on", "warning"), 3), (("--fail-on", "info"), 3)],
)
def test_diagnose_ends_with_status_3_on_request_and_0_otherwise(sick, fail_on, status):
    done = call("diagnose", "sick", "--dir", sick, *fail_on)
    assert (done.returncode, done.stderr) == (status, "")
    assert "critical constant, steps 0 to 199" in done.stdout
    assert done.stdout.index("critical constant") < done.stdout.index("warning replica_drift")


def test_diagnose_tells_errors_from_findings_by_its_status(sick):
    assert call("diagnose", "nobody", "--dir", sick, "--fail-on", "info").returncode == 1
    assert call("diagnose", "sick", "--dir", sick, "--fail-on", "severe").returncode == 2


def test_diagnose_is_calm_about_a_calm_training(tmp_path):
    with Run(tmp_path, name="calm") as run:
        for step in range(40):
            run.log(step, loss=1 / (step + 1))
    done = call("diagnose", "calm", "--dir", tmp_path, "--fail-on", "info")
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "no findings")
    assert "not judged: overfitting: no validation loss; names there are loss\n" in done.stdout


def test_diagnose_says_what_the_rules_find_and_what_only_the_tracker_could(sick):
    found = json.loads(call("diagnose", "sick", "--dir", sick, "--json").stdout)
    assert [(each["severity"], each["rule"]) for each in found] == [
        ("critical", "constant"),
        ("info", "loss_not_decreasing"),
        ("warning", "replica_drift"),
        ("info", "gradient_nonfinite"),  # gradients after it are finite, so the step was skipped
    ]
    assert found[1]["follows_from"] == "constant"
    assert found[3]["first_step"] == 150
    assert found[0]["evidence"] == "the loss is exactly 0.7 at every step from 0 to 199"
    asked = {"rule", "severity", "first_step", "last_step", "evidence", "parameters", "cause", "action"}
    assert all(asked <= each.keys() for each in found if each["rule"] != "replica_drift")


def test_diagnose_judges_by_the_settings_that_the_training_was_given(tmp_path):
    torch = pytest.importorskip("torch")
    from pytracker import Tracker

    def train(name, diagnosis, **resume):
        torch.manual_seed(0)
        layer = torch.nn.Linear(2, 1)
        with Tracker(layer, run=Run(tmp_path, name=name, **resume), diagnosis=diagnosis, every=20) as tracker:
            for step in range(100):
                layer.zero_grad()
                layer(torch.randn(4, 2)).sum().backward()
                tracker.step(loss=0.7 if step < 75 else 1 / (step + 1))
        return [finding.rule for finding in tracker.findings]

    def judged(name, *options):
        found = json.loads(call("diagnose", name, "--dir", tmp_path, "--json", *options).stdout)
        return [finding["rule"] for finding in found]

    @rule
    def only_known_there(view, at=5):
        if view.stop > at:
            yield view.finding("info", "known to the training alone")

    try:
        patient = train("patient", Diagnosis(["constant", "only_known_there"], settings={"constant": {"steps": 80}}))
    finally:
        del RULES["only_known_there"]
    assert patient == judged("patient") == ["only_known_there"]
    assert "constant" in judged("patient", "--defaults")

    assert "constant" in train("usual", "default")
    assert "diagnosis" not in load_run(tmp_path / "usual").history.meta
    assert "constant" in judged("usual")

    assert "constant" in train("patient", "default", resume=True)
    assert "constant" in judged("patient"), "the latest session says by what a run is judged"


def test_findings_name_their_parameters_and_a_single_step_in_the_terminal(sick):
    for verb in (("show",), ("diagnose",), ("watch", "--once")):
        shown = call(verb[0], "sick", "--dir", sick, *verb[1:]).stdout
        assert "warning replica_drift, step 120\n" in shown
        assert "head.weight, head.bias" in shown


SERIES = "loss[/x]b[red]:bug:"
HOSTILE = f"{SERIES}\x1b[31m\x07\x9b\t\u202e\u2066d"
SHOWN = rf"{SERIES}\x1b[31m\x07\x9b\t\u202e\u2066d"


@pytest.fixture
def hostile(tmp_path):
    """Record two runs whose every word a terminal, or what writes to it, could mistake for an order."""
    for name in ("[b]one", "[red]two"):
        info = ParameterInfo(f"p{HOSTILE}", (2,), "float32", "0", 2)
        with Run(tmp_path, name=name, config={f"c{HOSTILE}": f"{name}{HOSTILE}"}) as run:
            run.set_parameters([info])
            run.set_meta(**{f"m{HOSTILE}": f"v{HOSTILE}"})
            for step in range(4):
                run.log(step, **{SERIES: 1.0 + step})
            run.log_interval(summarize([3], gradient_rows(np.random.default_rng(0), 1, np.array([2])), np.array([2])))
            for letter in "rstu":
                told = {each: f"{each}{HOSTILE}" for each in ("evidence", "cause", "action")}
                place = {"first_step": 1, "parameters": [info.name]}
                run.log_finding({"rule": f"{letter}{HOSTILE}", "severity": f"s{HOSTILE}", **place, **told})
    damaged = tmp_path / "[i]three\x1b[2J"
    damaged.mkdir()
    (damaged / "run.sqlite").write_text("no database at all" * 100)
    return tmp_path


@pytest.mark.parametrize(
    ("verb", "told"),
    [
        (("list", "."), ("[b]one", "[red]two", r"[i]three\x1b[2J", f"{SERIES} 1")),
        (("show", "one"), ("[b]one", f"{SERIES}  ", *(f"{each}{SHOWN}" for each in ("c", "[b]one", "m", "v", "p")))),
        (("show", "one"), tuple(f"{each}{SHOWN}" for each in ("s", "r", "evidence", "cause", "action"))),
        (("compare", "one", "two", "--details"), ("[red]two", f"c{SHOWN}", f"[red]two{SHOWN}", f"{SERIES} <= ")),
        (("diagnose", "one"), tuple(f"{each}{SHOWN}" for each in ("s", "r", "evidence", "cause", "action", "p"))),
        (("watch", "one", "--once"), tuple(f"{each}{SHOWN}" for each in ("s", "r", "evidence", "p"))),
        (("watch", "one", "--once"), ("[b]one", f"{SERIES}  ", "all: pytracker show [b]one")),
        (("compare", "one", "--threshold", "x=1"), (f"there are {SERIES}",)),
        (("show", "three"), (r"[i]three\x1b[2J",)),
    ],
)
def test_what_a_run_says_is_shown_as_it_stands_and_never_obeyed(hostile, verb, told):
    done = call(*verb, cwd=hostile, PYTRACKER_RUNS=".", COLUMNS="300")
    shown = done.stdout + done.stderr
    assert "Traceback" not in shown
    assert [text for text in told if text not in shown] == []
    assert set(re.findall(r"[\x00-\x1f\x7f-\x9f\u202e\u2066]", shown)) == {"\n"}


def test_exports_never_bring_orders_into_a_terminal_unless_asked_to(hostile):
    done = call("export", "one", "--parameters", cwd=hostile, PYTRACKER_RUNS=".")
    assert set(re.findall(r"[\x00-\x1f\x7f-\x9f\u202e\u2066]", done.stdout)) == {"\n"}
    raw = call("export", "one", "--parameters", "--no-guard", cwd=hostile, PYTRACKER_RUNS=".")
    assert f"p{HOSTILE}" in raw.stdout


def test_watch_shows_the_most_severe_findings_and_how_many_there_are(tmp_path):
    with Run(tmp_path, name="many") as run:
        run.log(0, loss=1.0)
        for step, severity in enumerate(["critical", "info", "warning", "info", "info"]):
            run.log_finding({"rule": f"rule_{step}", "severity": severity, "first_step": step, "evidence": "x"})
    shown = call("watch", "many", "--dir", tmp_path, "--once").stdout
    assert [line.split(",")[0] for line in shown.splitlines() if " rule_" in line] == [
        "critical rule_0",
        "warning rule_2",
        "info rule_1",
    ]
    assert "and 2 less severe; all: pytracker show many" in shown


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
    command = [sys.executable, "-m", "pytracker", "watch", str(tmp_path / "live"), "--every", "0.2"]
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


def test_watch_waits_for_a_run_that_has_not_begun(tmp_path):
    command = [sys.executable, "-m", "pytracker", "watch", "late", "--dir", str(tmp_path), "--every", "0.1"]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "there is no run 'late'" in watching.stderr.readline()
    with Run(tmp_path, name="late", config={"max_steps": 8}) as run:
        for step in range(4):
            run.log(step, loss=1.0)
    shown, errors = watching.communicate(timeout=120)
    assert (watching.returncode, errors) == (0, "")
    assert "finished" in shown
    assert "step 3   of 8 (50%)" in call("watch", "late", "--dir", tmp_path, "--once", COLUMNS="200").stdout
    assert call("watch", "never", "--dir", tmp_path, "--once").returncode == 1


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
