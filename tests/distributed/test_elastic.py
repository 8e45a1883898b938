"""A job that loses a rank is begun again by torchrun, and goes on with fewer ranks: no row is lost or there twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import elastic
import pytest
import torch

import pytracker

torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def launched(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [*torchrun, *arguments],
        capture_output=True,
        text=True,
        # torch's gloo takes the addresses of the first life for those of the second where all share one store
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **environment},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_job_that_is_begun_again_on_other_ranks_has_each_row_once(tmp_path: Path) -> None:
    program = [elastic.__file__, str(tmp_path)]
    launched("--nproc-per-node=3", "--max-restarts=1", *program, "17")  # rank 1 is killed in step 13
    assert (tmp_path / "killed").exists()
    launched("--nproc-per-node=2", *program, "20", TORCH_DISTRIBUTED_DEBUG="DETAIL")  # from the checkpoint at 15
    (stored,) = pytracker.list_runs(tmp_path / "runs")
    history = stored.load_history(parameters=False)
    assert [session.state for session in stored.sessions][-2:] == ["finished", "finished"]
    assert len(stored.sessions) == 3
    assert history["world"].steps.tolist() == list(range(20))
    assert history["world"][:] == [3.0] * 15 + [2.0] * 5
    model = elastic.make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    for step in range(20):
        model(elastic.batch(step)).square().mean().backward()
        expected.append(sum(p.grad.square().sum().item() for p in model.parameters()) ** 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert history["grad_norm"].steps.tolist() == list(range(20))
    assert history["grad_norm"][:] == pytest.approx(expected, rel=1e-6)
