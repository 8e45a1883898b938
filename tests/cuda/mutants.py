"""Mutants of the kernels: `make mutants` takes away one fence, barrier or ticket reset at a time and sees who notices.

Every one in the sources is found, not listed here. A mutant is compiled as the shipped PTX is, and the tests of
test_cuda_program.py that concern it run under the simulator, the quickest first, until one fails. One that none notices
makes this fail: either the tests are too weak, or the barrier is not needed. Prints a table and writes it to
`<folder>/<date>-mutants.md`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType

from conftest import ROOT, compile_program
from cuda_helpers import orders_of_atomics

from pytracker.core import packs

TARGET = "compute_90"
CHANGES = [  # what is looked for, what takes its place, and what that is called
    (r"__syncthreads\(\);", ";", "without the barrier"),
    (r"__syncwarp\(\);", ";", "without the barrier of the warp"),
    (r"__syncthreads_or\((\w+)\)", r"(\1)", "without the barrier and its vote"),
    (r"acq_rel", "relaxed", "neither acquires nor releases"),
    (r"acq_rel", "acquire", "does not release"),
    (r"acq_rel", "release", "does not acquire"),
    (r"if \(last\) \*ticket = 0;", ";", "without the reset of the ticket"),
]
TESTS: list[tuple[str, str, int, dict[str, int]]] = [  # test, scenario, seeds, environment
    ("no_two_threads_race", "log", 3, {"CUDASIM_RACECHECK": 2}),
    ("no_two_threads_race", "tickets", 3, {"CUDASIM_RACECHECK": 2}),
    ("no_two_threads_race", "spanning", 3, {"CUDASIM_RACECHECK": 2}),
    ("every_row_is_what_the_oracle_expects", "log", 1, {}),
    ("no_two_threads_race", "long_ones", 3, {"CUDASIM_RACECHECK": 2}),
    ("no_fence_is_missing", "tickets", 50, {"CUDASIM_WEAK": 1}),
    ("no_fence_is_missing", "comes_and_goes", 50, {"CUDASIM_WEAK": 1}),
    ("no_fence_is_missing", "log", 50, {"CUDASIM_WEAK": 1}),
    ("no_fence_is_missing", "tickets", 50, {"CUDASIM_WEAK": 2}),
    ("no_fence_is_missing", "log", 50, {"CUDASIM_WEAK": 2}),
    ("no_fence_is_missing", "spanning", 50, {"CUDASIM_WEAK": 2}),
]


@dataclass(frozen=True)
class Mutant:
    """A file of csrc/cuda with one change."""

    file: str
    line: int
    code: str
    change: str
    text: str  # of the whole file


def mutants() -> Iterator[Mutant]:
    """Yield every mutant there is."""
    for path in sorted((ROOT / "csrc/cuda").glob("*.cuh")):
        text = path.read_text(encoding="utf-8")
        for pattern, replacement, change in CHANGES:
            for found in re.finditer(pattern, text):
                number = text.count("\n", 0, found.start()) + 1
                code = text.splitlines()[number - 1].strip()
                if not code.startswith("//"):
                    changed = text[: found.start()] + found.expand(replacement) + text[found.end() :]
                    yield Mutant(path.name, number, code.partition("  //")[0], change, changed)


def make_kernels() -> ModuleType:
    """Return csrc/cuda/make_kernels.py, which has the compilers."""
    spec = importlib.util.spec_from_file_location("make_kernels", ROOT / "csrc/cuda/make_kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Laboratory:
    """Compiles kernels and runs tests on them."""

    def __init__(self, folder: Path) -> None:
        """Compile the program, and the kernels of more pointers, which the tests load and hardly use."""
        makers = make_kernels()
        self._folder = folder
        name = next(name for name, targets in makers.COMPILERS.items() if TARGET in targets)
        self._compiler = makers.load("nvrtc").Compiler(makers.install(name))
        self._sources = folder / "csrc"
        shutil.copytree(ROOT / "csrc", self._sources)
        self._program = compile_program()
        for size, image in zip(packs.SIZES, packs.compile_all(self._compiler, self._sources, TARGET), strict=True):
            (folder / size).write_bytes(image)

    def compile(self, mutant: Mutant | None) -> None:
        """Compile the kernels of few pointers: a mutant's, or None, those as they are."""
        if mutant is not None:
            (self._sources / "cuda" / mutant.file).write_text(mutant.text, encoding="utf-8")
        try:
            self._ptx = self._compiler.compile(self._sources, TARGET, packs.flag("few"))
            (self._folder / "few").write_bytes(self._ptx)
        finally:
            if mutant is not None:
                shutil.copy(ROOT / "csrc/cuda" / mutant.file, self._sources / "cuda" / mutant.file)

    def first_failure(self) -> tuple[str, str]:
        """Return the first test that fails, and what it says; nothing where all pass."""
        for test, scenario, seeds, environment in TESTS:
            variables = (
                os.environ | {"KERNELS": str(self._folder)} | {key: str(value) for key, value in environment.items()}
            )
            command = [str(self._program), scenario, str(seeds)]
            result = subprocess.run(command, env=variables, capture_output=True, text=True)
            if result.returncode != 0 or "RACECHECK" in result.stderr:
                level = ", ".join(f"{key[8:]} {value}" for key, value in environment.items())
                said = next((line for line in (result.stdout + result.stderr).splitlines() if line.strip()), "")
                return f"test_{test}[{scenario}]{' ' + level if level else ''}", said.strip()
        wrong = orders_of_atomics(self._ptx.decode()) - {"acq_rel"}
        return ("test_every_ticket_acquires_and_releases", f"{wrong}") if wrong else ("", "")


def main() -> int:
    """Try every mutant; return the number of those that no test notices."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    lines: list[str] = []
    survivors = 0
    with tempfile.TemporaryDirectory() as temporary:
        laboratory = Laboratory(Path(temporary))
        laboratory.compile(None)
        failure = laboratory.first_failure()
        assert not failure[0], f"the kernels as they are fail {failure}"
        for mutant in mutants():
            laboratory.compile(mutant)
            test, said = laboratory.first_failure()
            survivors += not test
            line = f"| {mutant.file}:{mutant.line} | `{mutant.code}` | {mutant.change} | {test or 'NONE'} |"
            print(line, said, sep="  ", flush=True)
            lines.append(line)
    now = datetime.now(timezone.utc)
    text = [
        f"# Mutants of the kernels, {now:%Y-%m-%d %H:%M} UTC",
        "Command: `make mutants`. Each fence, barrier and ticket reset of csrc/cuda is taken away by itself; the last "
        "column is the first test of tests/cuda/test_cuda_program.py that fails for it, and the check of the simulator "
        "under which it does.",
        f"{len(lines)} mutants, of which {survivors} pass all tests.",
        "\n".join(["| where | code | mutant | noticed by |", "| --- | --- | --- | --- |", *lines]),
    ]
    (folder / f"{now:%Y-%m-%d}-mutants.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    print(f"{len(lines)} mutants, {survivors} unnoticed")
    return survivors


if __name__ == "__main__":
    sys.exit(min(main(), 1))
