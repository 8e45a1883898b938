"""Machine code of kernels: registers of an image, and the loops of a disassembly."""

from __future__ import annotations

import heapq
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass


def registers(cubin: bytes) -> dict[str, int]:
    """Return the registers of a thread of each kernel: machine code is an ELF file, and .nv.info says it by symbol."""
    table, size, count, names = struct.unpack_from("<Q10xHHH", cubin, 40)
    headers = [struct.unpack_from("<IIQQQQII", cubin, table + size * index) for index in range(count)]

    def text(section: int, offset: int) -> str:
        begin = headers[section][4] + offset
        return cubin[begin : cubin.index(0, begin)].decode()

    sections = {text(names, header[0]): header for header in headers}
    symbols, info = sections[".symtab"], sections[".nv.info"]
    found = {}
    at, end = info[4], info[4] + info[5]
    while at < end:
        kind, attribute, length = struct.unpack_from("<BBH", cubin, at)
        if attribute == 0x2F:  # EIATTR_REGCOUNT
            symbol, number = struct.unpack_from("<II", cubin, at + 4)
            (name,) = struct.unpack_from("<I", cubin, symbols[4] + 24 * symbol)
            found[text(symbols[6], name)] = number
        at += 4 + (length if kind == 4 else 0)
    return found


@dataclass(frozen=True)
class Instruction:
    """One line of the disassembly."""

    name: str
    operands: str
    conditional: bool

    @property
    def base(self) -> str:
        """The name without its modifiers."""
        return self.name.partition(".")[0]

    @property
    def is_fp64(self) -> bool:
        """Whether it runs where fp64 does: arithmetic and conversions."""
        return self.base in {"DADD", "DMUL", "DFMA", "DSETP", "DMNMX"} or (
            self.base in {"F2F", "I2F", "F2I"} and "F64" in self.name
        )


@dataclass(frozen=True)
class Tile:
    """The loop of a tile."""

    loads: int
    instructions: list[Instruction]

    @property
    def fp64(self) -> int:
        """How many of its instructions run where fp64 does."""
        return sum(instruction.is_fp64 for instruction in self.instructions)


class Code:
    """The machine code of one kernel.

    Args:
        disassembly: what nvdisasm prints of the image.
        kernel: its name.
    """

    def __init__(self, disassembly: str, kernel: str) -> None:
        self._labels: dict[str, int] = {}
        self.instructions: list[Instruction] = []
        within = False
        for line in disassembly.splitlines():
            if found := re.match(r"\s*\.section\s+(\S+?),", line):
                within = found[1] == f".text.{kernel}"
            elif within and (found := re.match(r"(\.L_\w+):", line)):
                self._labels[found[1]] = len(self.instructions)
            elif within and (found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\d+\s+)?([A-Z0-9_.]+)(.*);", line)):
                self.instructions.append(Instruction(found[2], found[3], found[1] is not None))
        self._next = [list(following) for following in self._successors()]

    def _successors(self) -> Iterator[list[int]]:
        """Yield the places that each instruction may be followed by."""
        meeting: dict[str, int] = {}  # of lanes that part: where they meet, by the register of the barrier
        for at, instruction in enumerate(self.instructions):
            onward = [at + 1] if at + 1 < len(self.instructions) else []
            target = re.search(r"(\.L_\w+)", instruction.operands)
            barrier = re.search(r"\bB\d+", instruction.operands)
            if instruction.base == "BSSY" and target and barrier:
                meeting[barrier[0]] = self._labels[target[1]]
                yield onward
            elif instruction.base == "BSYNC" and barrier:
                yield [meeting[barrier[0]], *(onward if instruction.conditional else [])]
            elif instruction.base == "BRA" and target:
                conditional = instruction.conditional or re.match(r"\s*!?U?P\d", instruction.operands)
                yield [self._labels[target[1]], *(onward if conditional else [])]
            elif instruction.base in {"EXIT", "RET", "BRX"}:
                yield onward if instruction.conditional else []
            else:
                yield onward

    def _cycle(self, start: int) -> list[Instruction] | None:
        """Return the shortest way from an instruction to itself that lanes go without meeting others."""
        waiting = [(1, following, start) for following in self._next[start]]
        before: dict[int, int] = {}
        while waiting:
            steps, at, came_from = heapq.heappop(waiting)
            if at in before or self.instructions[at].base in {"LDS", "STS", "BAR", "SHFL"}:
                continue
            before[at] = came_from
            if at == start:
                way = [came_from]
                while way[-1] != start:
                    way.append(before[way[-1]])
                return [self.instructions[place] for place in way]
            for following in self._next[at]:
                heapq.heappush(waiting, (steps + 1, following, at))
        return None

    def tiles(self) -> dict[str, Tile]:
        """Return the loop of a tile for each dtype that is summed in fp32."""
        found: dict[str, Tile] = {}
        for at, instruction in enumerate(self.instructions):
            if not instruction.name.startswith("LDG.E.128"):
                continue
            loop = self._cycle(at)
            loads = sum(each.name.startswith("LDG.E.128") for each in loop or [])
            dtype = dtype_of(loop or [])
            if loop is None or dtype is None or loads < 4:
                continue
            if dtype not in found or loads >= found[dtype].loads:
                found[dtype] = Tile(loads, loop)
        return found


def dtype_of(loop: list[Instruction]) -> str | None:
    """Tell by its instructions for which dtype a loop is, or None: for none that is counted here."""
    if sum(each.base == "DFMA" for each in loop) > 0:
        return None  # fp64, complex, or element by element
    magnitudes = sum(each.base == "FMNMX3" for each in loop) * 2 + sum(each.base == "FMNMX" for each in loop)
    if magnitudes >= 40:
        return "fp32"
    return "fp16" if any(each.name.startswith("HADD2.F32") for each in loop) else "bf16"
