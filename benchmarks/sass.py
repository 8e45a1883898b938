"""Counts the machine code of a tile, for each architecture, and what each card can do with it: `make sass`.

A tile is what a thread reads before it computes (csrc/cuda/elements.cuh); large gradients are read by nothing else. Its
loop is looked for in the disassembly of the kernels: the shortest cycle through its loads, which is the way of healthy
gradients, since what NaN, Inf and tiny values take is longer. Written to `<folder>/<date>-sass.md`, beside what another
revision of the sources compiles to. Nothing here is a time: a bound says what a card cannot exceed.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType

from benchmarks.machine_code import Code, Tile, registers
from benchmarks.table import markdown

ROOT = Path(__file__).resolve().parents[1]
NVDISASM = "nvidia-cuda-nvdisasm==13.2.78"
KERNEL = "gradients_kernel"
ELEMENTS = {"fp32": 4, "bf16": 8, "fp16": 8}  # in a load of 16 bytes
ISSUED = 128  # threads' instructions that a multiprocessor can issue in a clock: four warps


@dataclass(frozen=True)
class Card:
    """What a data sheet says of a card.

    Args:
        target: the architecture.
        name: the card.
        sms: multiprocessors.
        clock: the highest that it boosts to, in GHz.
        bandwidth: of its memory, in GB/s.
        fp64: additions of fp64 in a clock and multiprocessor, as the card's peak of fp64 has it.
    """

    target: str
    name: str
    sms: int
    clock: float
    bandwidth: int
    fp64: int

    def bound(self, dtype: str, tile: Tile) -> str:
        """Return how many times the memory's bandwidth the instructions of a tile could take, and which limit that."""
        read = 16 * tile.loads  # bytes, by a thread
        cycles = {"issue": len(tile.instructions) / ISSUED, "fp64": tile.fp64 / self.fp64}
        limit = max(cycles, key=lambda name: cycles[name])
        reached = self.sms * self.clock * read / cycles[limit] / self.bandwidth
        return f"{reached:.2g} {limit}"


CARDS = (
    Card("sm_75", "T4", 40, 1.59, 320, 2),
    Card("sm_80", "A100 80 GB SXM", 108, 1.41, 2039, 32),
    Card("sm_86", "RTX 3090", 82, 1.695, 936, 2),
    Card("sm_89", "RTX 4090", 128, 2.52, 1008, 2),
    Card("sm_90", "H100 SXM", 132, 1.98, 3350, 64),
    Card("sm_90", "H200 SXM", 132, 1.98, 4800, 64),
    Card("sm_100", "B200", 148, 1.965, 8000, 64),
    Card("sm_103", "B300", 148, 1.965, 8000, 2),
    Card("sm_120", "RTX 5090", 170, 2.407, 1792, 2),
)
TARGETS = tuple(dict.fromkeys(card.target for card in CARDS))


@dataclass(frozen=True)
class Compiled:
    """A revision's kernel on one architecture."""

    registers: int
    tiles: dict[str, Tile]


def load(path: Path) -> ModuleType:
    """Return a module by its file: csrc/ is no package, and pytracker's would import torch."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def disassembler() -> str:
    """Return the path of nvdisasm, installing it where it is missing."""
    folder = ROOT / "build" / "nvdisasm"
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), NVDISASM]
        subprocess.run(command, check=True)
    (program,) = folder.glob("nvidia/*/bin/nvdisasm")
    program.chmod(0o755)
    return str(program)


def compile_all(sources: Path) -> dict[str, Compiled]:
    """Return what the kernels of a csrc/ compile to, by target."""
    makers, packs = load(ROOT / "csrc/cuda/make_kernels.py"), load(ROOT / "pytracker/core/packs.py")
    program, nvrtc = disassembler(), makers.load("nvrtc")
    found = {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        for name, targets in makers.COMPILERS.items():
            compiler = nvrtc.Compiler(makers.install(name))
            for target in filter(TARGETS.__contains__, targets):
                image = compiler.compile(sources, target, packs.flag("few"))
                Path(file.name).write_bytes(image)
                text = subprocess.run([program, "-c", file.name], check=True, capture_output=True, text=True).stdout
                found[target] = Compiled(registers(image)[KERNEL], Code(text, KERNEL).tiles())
    return found


def sources_of(revision: str, folder: Path) -> Path:
    """Write the csrc/ of a revision to a folder, and return where it is."""
    archive = subprocess.run(["git", "archive", revision, "csrc"], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
        packed.extractall(folder, filter="data")
    return folder / "csrc"


def in_flight(compiled: Compiled, dtype: str) -> int:
    """Return the KB that the threads on a multiprocessor keep coming: blocks of 128, as many as its registers hold."""
    threads = 65536 // (compiled.registers + -compiled.registers % 8) // 128 * 128
    return threads * 16 * compiled.tiles[dtype].loads // 1024


def code_lines(before: dict[str, Compiled], now: dict[str, Compiled]) -> list[tuple[str, ...]]:
    """Return the table of tiles: each figure of the revision before, an arrow, and that of now."""
    lines = []
    for target in TARGETS:
        for dtype, elements in ELEMENTS.items():
            columns = []
            for compiled in (before[target], now[target]):
                tile = compiled.tiles[dtype]
                per_element = len(tile.instructions) / tile.loads / elements
                figures = (f"{per_element:.2f}", tile.fp64, in_flight(compiled, dtype), compiled.registers)
                columns.append(figures)
            lines.append((target, dtype, *(f"{old} -> {new}" for old, new in zip(*columns, strict=True))))
    return lines


def card_lines(before: dict[str, Compiled], now: dict[str, Compiled]) -> list[tuple[str, ...]]:
    """Return the table of cards: what of its bandwidth each can use."""
    lines = []
    for card in CARDS:
        described = (card.name, card.target, str(card.sms), f"{card.clock}", str(card.bandwidth), str(card.fp64))
        both = (before[card.target], now[card.target])
        bounds = [" -> ".join(card.bound(dtype, compiled.tiles[dtype]) for compiled in both) for dtype in ELEMENTS]
        lines.append((*described, *bounds))
    return lines


def main() -> None:
    """Compile, count, and write both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--before", default="HEAD", help="the revision to compare the sources with")
    given = parser.parse_args()
    now = compile_all(ROOT / "csrc")
    with tempfile.TemporaryDirectory() as scratch:
        before = compile_all(sources_of(given.before, Path(scratch)))
    text = [
        f"# Machine code of a tile, {datetime.now(timezone.utc):%Y-%m-%d}",
        f"Command: `make sass BEFORE={given.before}`. Each figure is that revision's, an arrow, and that of the "
        "sources as they are. Counted in the disassembly of `gradients_kernel`, as each architecture's compiler of "
        "`make kernels` makes it, on the way that finite gradients take which are not all tiny. Nothing here is a "
        "time: no GPU was there.",
        "## Code",
        "Instructions are those of a thread for each element, with the loop's own. FP64 counts those of a tile that "
        "run where fp64 does. In flight: KB that the threads on a multiprocessor load before they compute.",
        markdown(
            ("architecture", "dtype", "instructions", "FP64", "KB in flight", "registers"), code_lines(before, now)
        ),
        "## Bounds",
        "How many times the bandwidth of its memory the instructions of each card could read, and which set that "
        "bound: the 128 threads' that a multiprocessor issues in a clock, or the fp64 additions that it does. Above 1 "
        "the memory is the limit. Conversions count as additions, which flatters them. Multiprocessors, clock (GHz, "
        "the highest boost), bandwidth (GB/s) and fp64 (a clock and multiprocessor; it gives the peak of fp64) are "
        "those of NVIDIA's data sheets.",
        markdown(("card", "architecture", "SMs", "clock", "bandwidth", "fp64", *ELEMENTS), card_lines(before, now)),
    ]
    path = given.folder / f"{datetime.now(timezone.utc):%Y-%m-%d}-sass.md"
    path.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
