"""SQLite's write-ahead log, which a killed process leaves: https://sqlite.org/fileformat2.html#the_write_ahead_log.

SQLite takes the first frame whose checksum is wrong for the end of the log, and says nothing of those behind it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

_HEADER: Final = struct.Struct(">8I")  # magic, version, page size, sequence, salt, salt, checksum, checksum
_FRAME: Final = struct.Struct(">6I")  # page, size after a commit, salt, salt, checksum, checksum
_MAGIC: Final = {0x377F0682: "<u4", 0x377F0683: ">u4"}


def damage_of_log(log: Path) -> Iterator[str]:
    """Say where a log is damaged, so that what was written behind it is lost. A frame that is cut off is no damage."""
    try:
        file = log.open("rb")
    except FileNotFoundError:
        return
    with file:
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size:
            return
        magic, _, page, _, *salts, first, second = _HEADER.unpack(head)
        sums = (first, second)
        if magic not in _MAGIC or _checksum(head[:-8], (0, 0), _MAGIC[magic]) != sums:
            yield "the write-ahead log: its header is damaged, so what it holds is lost"
            return
        own = [list(_FRAME.unpack_from(frame)[2:4]) == salts for frame in _frames(file, page)]
        last = max((number for number, is_own in enumerate(own) if is_own), default=-1)  # older ones are behind it
        for number, frame in enumerate(islice(_frames(file, page), last + 1)):
            sums = _checksum(frame[:8] + frame[_FRAME.size :], sums, _MAGIC[magic])
            if not own[number] or sums != _FRAME.unpack_from(frame)[4:]:
                yield f"the write-ahead log: frame {number + 1} of {last + 1} is damaged, and those behind it are lost"
                return


def _frames(file: BinaryIO, page: int) -> Iterator[bytes]:
    """Read the whole frames that are there."""
    file.seek(_HEADER.size)
    size = _FRAME.size + page
    while len(frame := file.read(size)) == size:
        yield frame


def _checksum(data: bytes, sums: tuple[int, int], dtype: str) -> tuple[int, int]:
    first, second = sums
    words = np.frombuffer(data, dtype).tolist()
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return first, second
