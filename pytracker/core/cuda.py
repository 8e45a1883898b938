"""Loads the kernels of each CUDA device: shipped machine code, PTX, or compiled here and cached; or says why not.

The CUDA back end is a library of its own, ``pytracker._C_cuda``, and holds no kernels. They lie beside this file, a
pack for each architecture, and the driver loads them when a device is first used. What fits is tried in this order:

1. machine code for the device's architecture, or for an older one of the same generation;
2. PTX, which the driver translates: for what is newer than this release;
3. the same sources, compiled by the NVRTC that came with torch, once: the result is kept in the user's cache.

Where none loads, the device is served by the reference in plain torch, and a warning gives the reason.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import nvrtc, packs

REINSTALL = (
    "Install pytracker again, beside this torch: pip install --force-reinstall --no-deps --no-cache-dir "
    "--no-binary pytracker pytracker"
)
PACKS = Path(__file__).parent / "kernels"
LARGE_PARAMETERS = 12010  # the first driver (R530, CUDA 12.1) that takes more than 4 KB of them

_used: dict[int, str] = {}


@functools.cache
def library() -> tuple[ModuleType | None, str]:
    """Return the CUDA back end's library and "", or None and the reason why it is not there."""
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is built without CUDA"
    try:
        return importlib.import_module("pytracker._C_cuda"), ""
    except ImportError as error:
        return None, f"{build_info().get('cuda_reason') or error}"


@functools.cache
def reason_without_kernels(device: int) -> str:
    """Load kernels for a device; return "" where that worked, else why not and what to do."""
    core, reason = library()
    if core is None:
        return f"{reason}. {REINSTALL}"
    failures: list[str] = []
    try:
        large = core.driver_version() >= LARGE_PARAMETERS
        for name, images in candidates(torch.cuda.get_device_capability(device), failures):
            failure = _load(core, device, images if large else images[:1])
            if not failure:
                _used[device] = name
                return ""
            failures.append(f"{name}: {failure}")
    except RuntimeError as error:  # the driver, or torch on its behalf
        failures.append(str(error))
    return f"no kernels load ({'; '.join(failures)}). A newer driver, or a torch made for this device, may bring them"


def _load(core: ModuleType, device: int, images: list[bytes]) -> str:
    """Load images into a device; return the driver's words where it refuses."""
    try:
        core.load_kernels(device, images)
    except RuntimeError as error:
        return str(error)
    return ""


def used(device: int) -> str:
    """Return which kernels a device uses: "" before they are loaded, or where none are."""
    return _used.get(device, "")


def candidates(capability: tuple[int, int], failures: list[str]) -> Iterator[tuple[str, list[bytes]]]:
    """Yield name and images (see packs.py) of what may run on a device, best first.

    Why one could not be had is appended to ``failures``.
    """
    folder = source_folder()
    digest = nvrtc.digest_of(nvrtc.sources(folder))
    shipped = manifest()
    if shipped.get("sources") == digest:
        for target in fitting(capability, shipped["targets"]):
            yield f"{target}, as shipped", packs.unpack((PACKS / f"{target}.tar.xz").read_bytes())
    elif shipped:
        failures.append("the shipped kernels are of other sources")
    else:
        failures.append("none are shipped")
    yield from compiled(capability, folder, digest, failures)


def fitting(capability: tuple[int, int], targets: list[str]) -> list[str]:
    """Return what of the targets a device can run, best first: machine code of its generation, then PTX.

    >>> fitting((8, 7), ["sm_80", "sm_86", "sm_89", "sm_90", "compute_90"])
    ['sm_86', 'sm_80']
    >>> fitting((13, 0), ["sm_120", "compute_90"])
    ['compute_90']
    """
    major, minor = capability

    def number(target: str) -> int:
        return int(target.rpartition("_")[2])

    code = [t for t in targets if t.startswith("sm_") and number(t) // 10 == major and number(t) % 10 <= minor]
    ptx = [t for t in targets if t.startswith("compute_") and number(t) <= 10 * major + minor]
    return [*sorted(code, key=number, reverse=True), *sorted(ptx, key=number, reverse=True)]


def compiled(
    capability: tuple[int, int], folder: Path, digest: str, failures: list[str]
) -> Iterator[tuple[str, list[bytes]]]:
    """Yield what NVRTC makes for a device, from the cache where it has been made before."""
    compiler = None
    for path in nvrtc.libraries(Path(torch.__file__).parent):
        try:
            compiler = nvrtc.Compiler(path)
            break
        except (OSError, AttributeError, nvrtc.CompileError):
            continue
    if compiler is None:
        failures.append("there is no NVRTC to compile them")
        return
    wanted = 10 * capability[0] + capability[1]
    known = compiler.architectures()
    targets = [f"sm_{wanted}"] if wanted in known else []
    targets += [f"compute_{max(number for number in known if number <= wanted)}"] if known[0] <= wanted else []
    version = ".".join(map(str, compiler.version))
    for target in targets:
        kept = cache_folder() / f"{target}-nvrtc{version}-{digest[:16]}.tar.xz"
        try:
            yield f"{target}, compiled by NVRTC {version} and kept", packs.unpack(kept.read_bytes())
            continue
        except (OSError, tarfile.TarError, KeyError):
            pass  # not there, or damaged: it is made again
        try:
            images = packs.compile_all(compiler, folder, target)
        except nvrtc.CompileError as error:
            failures.append(str(error))
            continue
        keep(kept, packs.pack(images))
        yield f"{target}, compiled by NVRTC {version}", images


def keep(path: Path, content: bytes) -> None:
    """Write a file at once or not at all. A cache that cannot be written costs only its use."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError:
        pass


def cache_folder() -> Path:
    """Return where compiled kernels are kept: PYTRACKER_CACHE, or pytracker/ in the user's cache."""
    chosen = os.environ.get("PYTRACKER_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pytracker"


def source_folder() -> Path:
    """Return the kernels' sources: the package's copy, or those of the checkout that it is used from."""
    copy = PACKS / "csrc"
    return copy if copy.exists() else Path(__file__).parents[2] / "csrc"


def manifest() -> dict[str, Any]:
    """Return what `make kernels` says of the packs that it made; nothing where there are none."""
    return _read_json(PACKS / "kernels.json")


def build_info() -> dict[str, Any]:
    """Return what the build says of itself; nothing where there was none."""
    return _read_json(Path(__file__).parents[1] / "_build_info.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
