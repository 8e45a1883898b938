"""A cell of a notebook that runs again closes the run that it made before. The cells run in IPython itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pytracker import list_runs

SESSION = """
import json, os, sys, warnings
from IPython.core.interactiveshell import InteractiveShell

class Notebook(InteractiveShell):
    cell = ""
    def get_parent(self):
        return {"metadata": {"cellId": self.cell} if self.cell else {}}

warnings.simplefilter("always")
caught = []
warnings.showwarning = lambda message, *rest, **more: caught.append(f"{message}")
shell = Notebook.instance()

def run(cell, text):
    shell.cell = cell
    shell.run_cell(text, store_history=True).raise_error()

run("", "import threading, torch; from pytracker import Run, Tracker; weight = torch.nn.Parameter(torch.ones(2))")
results = {}
for name, cells in json.load(sys.stdin).items():
    os.mkdir(name)
    os.chdir(name)
    run("", "made = []")
    for cell, text in cells:
        run(cell, text)
    results[name] = [[each.closed for each in shell.user_ns["made"]], [each for each in caught if "this cell" in each]]
    caught.clear()
    os.chdir("..")
print(json.dumps(results))
"""
MAKE = """\
tracker = Tracker([weight], run="runs", diagnosis=None)
weight.grad = torch.ones(2)
tracker.step(loss=1.0)
made.append(tracker)"""
INDENTED = textwrap.indent(MAKE, "  ")
NAMED = MAKE.replace('"runs"', 'Run("runs", name="x")')
ON_A_THREAD = f"def make():\n{INDENTED}\nthread = threading.Thread(target=make); thread.start(); thread.join()"

Cells = list[tuple[str, str]]  # what the notebook calls it, and its text

AGAIN: dict[str, Cells] = {
    "its text": [("", MAKE), ("", MAKE)],
    "its name": [("a", MAKE), ("a", MAKE)],
    "its name, edited": [("a", MAKE), ("a", MAKE.replace("1.0", "2.0"))],
    "its name, another statement": [("a", f"for _ in range(1):\n{INDENTED}"), ("a", MAKE)],
}
NOT_AGAIN: dict[str, Cells] = {
    "another text": [("", MAKE), ("", MAKE + "\n# another")],
    "another name": [("a", MAKE), ("b", MAKE)],
    "another directory": [("a", MAKE), ("a", MAKE.replace('"runs"', '"others"'))],
    "two in one execution": [("a", MAKE + "\n" + MAKE)],
    "a loop": [("", f"for _ in range(2):\n{INDENTED}")],
    "a thread": [("a", ON_A_THREAD)] * 2,
}
REFUSED = [("a", NAMED), ("a", f"try:\n{textwrap.indent(NAMED, '  ')}\nexcept OSError as error:\n  print(error)")]


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> tuple[Path, dict[str, tuple[list[bool], list[str]]]]:
    """The folder in which all cells ran, and for each case which trackers are closed and what warned of it."""
    folder = tmp_path_factory.mktemp("notebook")
    done = subprocess.run(
        [sys.executable, "-c", SESSION],
        input=json.dumps({**AGAIN, **NOT_AGAIN, "refused": REFUSED}),
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "IPYTHONDIR": str(folder / "ipython")},
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", AGAIN)
def test_a_cell_that_runs_again_closes_what_it_made(case: str, session) -> None:
    folder, results = session
    closed, caught = results[case]
    assert closed == [True, False]
    (message,) = caught
    stale = [run for run in list_runs(folder / case / "runs") if f"run {run.name!r} was made by this cell" in message]
    assert [run.history["loss"][:] for run in stale] == [[1.0]]  # what was pending is there


@pytest.mark.parametrize("case", NOT_AGAIN)
def test_what_no_cell_made_again_stays_open(case: str, session) -> None:
    assert session[1][case] == [[False, False], []]


def test_a_run_is_closed_by_its_cell_before_its_name_is_refused(session) -> None:
    closed, caught = session[1]["refused"]
    assert closed == [True]
    assert "run 'x' was made by this cell when it ran before" in caught[0]
