"""Every example runs as its first lines say, and what it records is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pytracker

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SHARED = ("ddp.py", "fsdp2.py", "tensor_parallel.py")


def run(name: str, folder: Path, *launcher: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    result = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / name)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,  # a machine that does other things besides is slow to start three processes
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_every_example_is_tested_and_short() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"three_lines.py", "replace_the_loop.py", *SHARED}
    assert all(len(path.read_text(encoding="utf-8").splitlines()) <= 60 for path in EXAMPLES.glob("*.py"))


def test_three_lines_show_a_loss_that_falls(tmp_path: Path) -> None:
    first, last = map(float, re.search(r"loss (\S+) -> (\S+)", run("three_lines.py", tmp_path)).groups())
    assert last < 0.5 * first


def test_the_replaced_loop_shows_every_parameter(tmp_path: Path) -> None:
    printed = run("replace_the_loop.py", tmp_path)
    assert re.findall(r"^(\S+) +norm \d", printed, re.MULTILINE) == ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize("name", SHARED)
def test_two_ranks_write_one_run_of_the_whole_model(name: str, tmp_path: Path) -> None:
    printed = run(name, tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert "no findings" in printed
    (path,) = (tmp_path / "runs").iterdir()
    run_ = pytracker.load_run(path)
    assert run_.state == "finished"
    assert {info.name: tuple(info.shape) for info in run_.history.parameters.infos} == {
        "0.weight": (64, 64),
        "0.bias": (64,),
        "2.weight": (10, 64),
        "2.bias": (10,),
    }
    loss, norm = run_.history["loss"], run_.history["grad_norm"]
    assert len(loss) == len(norm) == loss.steps[-1] + 1
    assert sum(loss[-10:]) < 0.5 * sum(loss[:10])
    assert ("noise_scale" in run_.history) == (name == "ddp.py")
