"""The suite of the CUDA back end: on a GPU, or under the simulator with ``make cuda-test``; skipped elsewhere.

Under the simulator torch's own kernels do not run, so inputs are made on the CPU and copied, and results are copied
back before anything is computed from them.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cuda_helpers import SIMULATED

from pytracker.core import native

ROOT = Path(__file__).parents[2]


def reason_to_skip() -> str:
    """Return why the suite cannot run here, or nothing."""
    if not torch.cuda.is_available():
        return "there is no CUDA device (make cuda-test runs this suite under the simulator)"
    core, why = native.load()
    if core is None:
        return f"the native core is not there: {why}"
    return "" if core.has_backend("cuda") else "the native core was built without CUDA"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "simulated: needs the simulator, which counts or provokes what a GPU would hide")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = reason_to_skip()
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
        elif item.get_closest_marker("simulated") and not SIMULATED:
            item.add_marker(pytest.mark.skip(reason="asks the simulator what the code did"))


def compile_program() -> Path:
    """Compile program.cpp with the kernels, unless that is done already, and return where it is."""
    kernels = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    sources = [*kernels, ROOT / "csrc/cuda/work_split.cpp", ROOT / "tests/cuda/program.cpp"]
    headers = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh"), *(ROOT / "tests/cuda").glob("*.h")]
    folder = ROOT / "build" / ("cuda-program-simulated" if SIMULATED else "cuda-program")
    program = folder / "program"
    if program.exists() and program.stat().st_mtime > max(path.stat().st_mtime for path in sources + headers):
        return program
    folder.mkdir(parents=True, exist_ok=True)
    target = ["-gencode", "arch=compute_90,code=compute_90"] if SIMULATED else ["-arch=native"]
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-cudart", "shared", *target]
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    subprocess.run(["nvcc", *flags, *map(str, sources), "-o", str(program)], check=True, env=environment)
    return program


@pytest.fixture(scope="session")
def program() -> Callable[..., str]:
    """Return a function that runs a scenario of program.cpp and returns its hash of the rows."""
    path = compile_program()

    def run(scenario: str, *, seeds: int = 1, **environment: object) -> str:
        variables = os.environ | {key: str(value) for key, value in environment.items()}
        result = subprocess.run([str(path), scenario, str(seeds)], env=variables, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "RACECHECK" not in result.stderr, result.stderr
        assert "INITCHECK" not in result.stderr, result.stderr
        return result.stdout

    return run
