"""Every example runs as its first lines say, and what it records is there."""

from __future__ import annotations

import csv
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import pytracker

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SHARED = ("ddp.py", "fsdp2.py", "tensor_parallel.py")
FALLING = ("three_lines.py", "mixed_precision.py", "lora.py", "language_model.py")
IN_TRAINERS = {"transformers_trainer.py": "transformers", "lightning_trainer.py": "lightning"}
IN_TRAINERS["accelerate_loop.py"] = "accelerate"
OTHERS = (
    "validation_and_a_run.py",
    "gan.py",
    "replace_the_loop.py",
    "from_the_original_loop.py",
    "from_wandb_watch.py",
    "torchtitan_like.py",
)
TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(name: str, folder: Path, *launcher: str) -> str:
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent), "WANDB_MODE": "offline"}
    result = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / name)],
        cwd=folder,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=300,  # a machine that does other things besides is slow to start three processes
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture
def run_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[str], str]:
    """Run an example in this process, which has imported torch, and return what it prints."""

    def run_it(name: str) -> str:
        monkeypatch.chdir(tmp_path)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        finally:
            torch.set_num_threads(threads)
        return capfd.readouterr().out

    return run_it


def falls(printed: str) -> bool:
    first, last = map(float, re.search(r"loss (\S+) -> ([\d.]+)", printed).groups())
    return last < 0.6 * first


def need(package: str) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'pytracker[{package}]'")


def test_every_example_is_tested_and_short() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*SHARED, *FALLING, *IN_TRAINERS, *OTHERS}
    assert all(len(path.read_text(encoding="utf-8").splitlines()) <= 60 for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", FALLING)
def test_an_example_shows_a_loss_that_falls(name: str, tmp_path: Path, run_here: Callable[[str], str]) -> None:
    assert falls(run_here(name))
    if name == "language_model.py":
        with (tmp_path / "language_model.csv").open(newline="") as file:
            names = {line["name"] for line in csv.DictReader(file)}
        assert {"grad_norm/letters", "grad_norm/blocks.0", "grad_norm/blocks.1", "grad_norm/head"} <= names


def test_the_run_of_the_plain_loop_has_its_validation(tmp_path: Path, run_here: Callable[[str], str]) -> None:
    printed = run_here("validation_and_a_run.py")
    assert "no findings" in printed
    (kept,) = pytracker.list_runs(tmp_path / "runs")
    assert kept.state == "finished"
    assert [len(kept.history[name]) for name in ("val_loss", "accuracy", "loss")] == [8, 8, 240]
    assert kept.history["accuracy"][-1] > 0.9


def test_the_players_of_the_gan_share_a_run(tmp_path: Path, run_here: Callable[[str], str]) -> None:
    assert re.findall(r"^(\w+) +400 steps", run_here("gan.py"), re.MULTILINE) == ["generator", "critic"]
    (kept,) = pytracker.list_runs(tmp_path / "runs")
    assert len(kept.history["generator/loss"]) == len(kept.history["critic/lr"]) == 400
    assert not [each for each in kept.history.findings if each["severity"] != "info"]


def test_the_replaced_loop_shows_every_parameter(run_here: Callable[[str], str]) -> None:
    printed = run_here("replace_the_loop.py")
    assert re.findall(r"^(\S+) +norm \d", printed, re.MULTILINE) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_the_original_loop_s_lists_are_there(run_here: Callable[[str], str]) -> None:
    printed = run_here("from_the_original_loop.py")
    assert printed.count("epoch") == 3
    assert "300 norms, 300 maxima" in printed


def test_what_wandb_watch_did_is_in_a_wandb_run(tmp_path: Path) -> None:
    need("wandb")
    assert "200 steps" in run("from_wandb_watch.py", tmp_path)
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 1


@pytest.mark.parametrize("name", IN_TRAINERS)
def test_an_example_with_a_trainer_keeps_a_run(name: str, tmp_path: Path, run_here: Callable[[str], str]) -> None:
    need(IN_TRAINERS[name])
    # Accelerate keeps one state for a process, which a test may have set otherwise.
    assert falls(run(name, tmp_path) if name == "accelerate_loop.py" else run_here(name))
    (kept,) = pytracker.list_runs(tmp_path / "runs")
    assert kept.state == "finished"
    assert len(kept.history["grad_norm"]) == len(kept.history["loss"]) > 20


@pytest.mark.parametrize("name", SHARED)
def test_two_ranks_write_one_run_of_the_whole_model(name: str, tmp_path: Path) -> None:
    printed = run(name, tmp_path, *TWO_RANKS)
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


def test_a_loop_as_torchtitan_s_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    assert falls(run("torchtitan_like.py", tmp_path, *TWO_RANKS))
    (kept,) = pytracker.list_runs(tmp_path / "runs")
    assert kept.history["grad_norm"].steps.tolist() == list(range(60))
    assert len(kept.history.parameters.infos) == 8
