"""A pack: the kernels of one architecture, in one file. How one is made, written and read.

There are two images in it: one whose kernels take few pointers to gradients along, in parameters of at most 4 KB, and
one whose kernels take many. They share most of their code, so that the second costs hardly anything once compressed.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

MANY = "-DPYTRACKER_POINTERS=pytracker::cuda::kManyPointers"


def compile_both(compiler: Any, folder: Path, target: str) -> tuple[bytes, bytes]:
    """Return the images of an architecture, for few pointers and for many, by an `nvrtc.Compiler`."""
    return compiler.compile(folder, target), compiler.compile(folder, target, MANY)


def pack(few: bytes, many: bytes) -> bytes:
    """Return both images of an architecture in one file. They share most of their code, so it is hardly larger."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:xz", preset=9) as archive:
        for name, image in (("few", few), ("many", many)):
            entry = tarfile.TarInfo(name)  # its time is 0: the same images are the same bytes
            entry.size = len(image)
            archive.addfile(entry, io.BytesIO(image))
    return stream.getvalue()


def unpack(packed: bytes) -> tuple[bytes, bytes]:
    """Return the images of a pack, for few pointers and for many."""
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:xz") as archive:
        few, many = (archive.extractfile(archive.getmember(name)) for name in ("few", "many"))
        assert few is not None
        assert many is not None
        return few.read(), many.read()
