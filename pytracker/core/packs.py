"""A pack: the kernels of one architecture, in one file. How one is made, written and read.

There is an image in it for each number of pointers to gradients that a launch takes along: few, in parameters of at
most 4 KB, some, and many. They share most of their code, so that the others cost hardly anything once compressed.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

SIZES = ("few", "some", "many")


def compile_all(compiler: Any, folder: Path, target: str) -> list[bytes]:
    """Return the images of an architecture in the order of SIZES, by an `nvrtc.Compiler`."""
    return [compiler.compile(folder, target, flag(size)) for size in SIZES]


def flag(size: str) -> str:
    """Return the compiler's option for an image of SIZES."""
    return f"-DPYTRACKER_POINTERS=pytracker::cuda::k{size.capitalize()}Pointers"


def pack(images: list[bytes]) -> bytes:
    """Return the images of an architecture in one file."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:xz", preset=9) as archive:
        for name, image in zip(SIZES, images, strict=True):
            entry = tarfile.TarInfo(name)  # its time is 0: the same images are the same bytes
            entry.size = len(image)
            archive.addfile(entry, io.BytesIO(image))
    return stream.getvalue()


def unpack(packed: bytes) -> list[bytes]:
    """Return the images of a pack in the order of SIZES."""
    images = []
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:xz") as archive:
        for size in SIZES:
            file = archive.extractfile(archive.getmember(size))
            assert file is not None
            images.append(file.read())
    return images
