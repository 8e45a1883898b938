"""A build that fails leaves a package that works, and that says why it is slow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools")
ROOT = Path(__file__).resolve().parent.parent

TRAIN_A_LITTLE = """
import sys, warnings

import torch

# An editable install of the checkout would lend its library to the package that has none.
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import pytracker

    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    for _ in range(2):
        assert pytracker.compute_gradient_stats(model) == {"grad_norm": 5.0, "grad_max": 5.0}
    with pytracker.Tracker(model, diagnosis=None) as tracker:
        tracker.step(loss=0.5)
    assert tracker.history["grad_norm"] == [5.0]
print("\\n".join(str(warning.message) for warning in caught if "pytracker" in str(warning.message)))
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of what a build needs, without what was built here."""
    copy = tmp_path_factory.mktemp("sources")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    built = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    for name in ("csrc", "pytracker"):
        shutil.copytree(ROOT / name, copy / name, ignore=built)
    return copy


def run(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTRACKER_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run("setup.py", "build", folder=folder, CC="/bin/false", CXX="/bin/false", **environment)


@pytest.fixture(scope="module")
def package(sources: Path) -> Path:
    """Return the folder of a package that was built with a compiler that fails."""
    done = build(sources)
    assert done.returncode == 0, done.stderr
    (built,) = sources.glob("build/torch-*/lib*")
    return built


def test_a_failed_build_records_the_reason(package: Path) -> None:
    info = json.loads((package / "pytracker" / "_build_info.json").read_text())
    assert not info["built"]
    assert "/bin/false" in info["reason"]
    assert not list(package.glob("pytracker/_C*.so"))


def test_without_a_core_the_package_works_and_says_why_it_is_slow_once(package: Path, tmp_path: Path) -> None:
    done = run("-c", TRAIN_A_LITTLE, folder=tmp_path, PYTHONPATH=str(package), PYTHONSAFEPATH="1")
    assert done.returncode == 0, done.stderr
    (said,) = done.stdout.strip().splitlines()
    assert "without its native core" in said
    assert "/bin/false" in said


def test_a_failed_build_is_an_error_where_the_core_is_required(sources: Path, package: Path) -> None:
    done = build(sources, PYTRACKER_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "/bin/false" in done.stderr
