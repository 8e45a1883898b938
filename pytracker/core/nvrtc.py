"""NVRTC, NVIDIA's run-time compiler, as a function: from the kernels' sources to machine code or PTX.

It needs neither a GPU nor a toolkit: the library is part of torch's CUDA wheels. ``make kernels`` compiles with it what
is shipped, and a device for which nothing was shipped gets its kernels from it when they are first needed.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

FLAGS = ("-std=c++17", "-default-device")


class CompileError(Exception):
    """The compiler refused the sources or the architecture; its log is the message."""


class Compiler:
    """One libnvrtc.

    Args:
        path: the library, by its path or by the name under which it is loaded already.

    Raises:
        OSError: there is no such library.
    """

    def __init__(self, path: str) -> None:
        for builtins in Path(path).parent.glob("libnvrtc-builtins.so.*"):  # it looks for them by name alone
            ctypes.CDLL(str(builtins))
        self._library = ctypes.CDLL(path)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = (major.value, minor.value)

    def architectures(self) -> list[int]:
        """Return the compute capabilities that it knows, as 90 for 9.0, in ascending order."""
        count = ctypes.c_int()
        self._check(self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        numbers = (ctypes.c_int * count.value)()
        self._check(self._library.nvrtcGetSupportedArchs(numbers))
        return sorted(numbers)

    def compile(self, folder: Path, target: str, *flags: str) -> bytes:
        """Compile ``cuda/kernels.cu`` of ``folder`` for "sm_90", to machine code, or for "compute_90", to PTX.

        Raises:
            CompileError: the compiler refuses, or a kernel would spill registers.
        """
        program = ctypes.c_void_p()
        source = b'#include "cuda/kernels.cu"\n'
        self._check(self._library.nvrtcCreateProgram(ctypes.byref(program), source, b"kernels", 0, None, None))
        try:
            options = [f"--gpu-architecture={target}", f"-I{folder}", f"-I{folder / 'cuda' / 'nvrtc'}", *FLAGS, *flags]
            if target.startswith("sm_"):
                options.append("--ptxas-options=--warn-on-spills")
            given = (ctypes.c_char_p * len(options))(*map(str.encode, options))
            status = self._library.nvrtcCompileProgram(program, len(options), given)
            log = self._output(program, "ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
            if status != 0:
                raise CompileError(
                    f"NVRTC {self.version[0]}.{self.version[1]} for {target}: {log or self._words(status)}"
                )
            if "spill" in log:
                raise CompileError(f"registers are spilled for {target}: {log}")
            return self._output(program, "CUBIN" if target.startswith("sm_") else "PTX")
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _output(self, program: ctypes.c_void_p, kind: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{kind}Size")(program, ctypes.byref(size)))
        text = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{kind}")(program, text))
        return text.raw

    def _check(self, status: int) -> None:
        if status != 0:
            raise CompileError(self._words(status))

    def _words(self, status: int) -> str:
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        words: bytes = self._library.nvrtcGetErrorString(status)
        return words.decode()


def sources(folder: Path) -> dict[str, bytes]:
    """Return the files of ``folder`` (csrc/) that the kernels are made of, by their path in it: what they include."""
    found: dict[str, bytes] = {}

    def visit(path: Path) -> None:
        name = path.relative_to(folder).as_posix()
        if name not in found:
            found[name] = path.read_bytes()
            for header in re.findall(r'^#include "(.+)"', found[name].decode(), re.MULTILINE):
                visit((path.parent / header).resolve())

    folder = folder.resolve()
    visit(folder / "cuda" / "kernels.cu")
    for path in (folder / "cuda" / "nvrtc").iterdir():
        visit(path)
    return dict(sorted(found.items()))


def digest_of(files: dict[str, bytes]) -> str:
    """Return a hash of the names and the contents of sources."""
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def libraries(near: Path) -> Iterator[str]:
    """Yield where a libnvrtc may be: in the packages beside torch's folder ``near``, then on the loader's path."""
    for pattern in ("nvidia/*/lib/libnvrtc.so.*", "torch/lib/libnvrtc*.so*"):
        yield from sorted(str(path) for path in near.parent.glob(pattern) if "builtins" not in path.name)
    yield from ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
