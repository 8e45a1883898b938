"""The demo, without the minutes that it trains: `make demo` runs it whole."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


def test_make_demo_calls_a_verb_that_is_there() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
    command = re.search(r"^demo: build\n\t\$\(BIN\)/python (.+)$", makefile, re.MULTILINE)
    assert command
    shown = subprocess.run([sys.executable, *command[1].split(), "--help"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr


@pytest.mark.parametrize("package", ["sklearn", "plotly"])
def test_a_demo_that_lacks_a_package_says_so_before_it_begins_a_run(package: str, tmp_path: Path) -> None:
    without = f"import sys; sys.modules['{package}'] = None; from pytracker.cli import main; main()"
    asked = [sys.executable, "-c", without, "demo", "--dir", str(tmp_path / "runs")]
    done = subprocess.run(asked, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    assert "pip install 'pytracker[demo]'" in done.stderr
    assert not list(tmp_path.iterdir())
