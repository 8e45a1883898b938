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

from pytracker.core import cuda, native, packs

ROOT = Path(__file__).parents[2]


def reason_to_skip() -> str:
    """Return why the suite cannot run here, or nothing."""
    if not torch.cuda.is_available():
        return "there is no CUDA device (make cuda-test runs this suite under the simulator)"
    core, why = native.load()
    if core is None:
        return f"the native core is not there: {why}"
    return cuda.library()[1]


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


def cuda_headers() -> Path:
    """Return CUDA's headers, which the program needs and the back end does not: Triton's copy, else the toolkit's."""
    folders = [Path(torch.__file__).parents[1] / "triton/backends/nvidia/include"]
    folders += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    return next(folder for folder in folders if (folder / "crt/host_defines.h").exists())


def loaded(name: str) -> Path:
    """Return the path of a library of this process."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return next(Path(line.split()[-1]) for line in lines if name in line)


def compile_program() -> Path:
    """Compile program.cpp with the back end's launchers, unless that is done already, and return where it is."""
    own = [ROOT / "csrc/cuda" / f"{name}.cpp" for name in ("driver", "launch", "work_split")]
    sources = [ROOT / "tests/cuda/program.cpp", *own]
    headers = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "tests/cuda").glob("*.h")]
    program = ROOT / "build" / ("cuda-program-simulated" if SIMULATED else "cuda-program") / "program"
    if program.exists() and program.stat().st_mtime > max(path.stat().st_mtime for path in sources + headers):
        return program
    program.parent.mkdir(parents=True, exist_ok=True)
    library = loaded("libcudart.so")  # torch's, or the simulator's
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", f"-I{cuda_headers()}", f"-Wl,-rpath,{library.parent}"]
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    command = ["g++", *flags, *map(str, sources), str(library), "-ldl", "-o", str(program)]
    subprocess.run(command, check=True, env=environment)
    return program


def write_images(folder: Path) -> None:
    """Write the kernels that run here to where program.cpp looks for them."""
    assert cuda.reason_without_kernels(0) == ""
    candidates = cuda.candidates(torch.cuda.get_device_capability(0), [])
    found = {name.removesuffix(" and kept"): images for name, images in candidates}  # compiled here, and kept since
    for size, image in zip(packs.SIZES, found[cuda.used(0).removesuffix(" and kept")], strict=True):
        (folder / size).write_bytes(image)


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Return a function that runs a scenario of program.cpp and returns its hash of the rows."""
    path = compile_program()
    images = tmp_path_factory.mktemp("images")
    write_images(images)

    def run(scenario: str, *, seeds: int = 1, **environment: object) -> str:
        variables = os.environ | {"KERNELS": str(images)} | {key: str(value) for key, value in environment.items()}
        result = subprocess.run([str(path), scenario, str(seeds)], env=variables, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "RACECHECK" not in result.stderr, result.stderr
        assert "INITCHECK" not in result.stderr, result.stderr
        return result.stdout

    return run
