"""DDP on two ranks: one run, of the averaged gradients, from every trainer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("transformers", "accelerate", "lightning"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'pytracker[{package}]'")


def test_the_first_of_two_ranks_records_the_averaged_gradients_of_every_trainer(tmp_path: Path) -> None:
    here = Path(__file__).parent
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent.parent)]),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, str(here / "two_ranks.py"), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
