"""Compiles the kernels that are shipped, for each architecture, into pytracker/core/kernels/: `make kernels`.

Machine code of a CUDA 13 compiler does not load with a driver of CUDA 12, so each architecture gets the oldest compiler
that knows it. They are NVRTCs, installed by pip into build/nvrtc/. The same sources and compilers give the same bytes,
and a spilled register is an error. What is up to date is left as it is.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
COMPILERS = {
    "nvidia-cuda-nvrtc-cu12==12.1.105": ["sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "compute_90"],
    "nvidia-cuda-nvrtc-cu12==12.8.93": ["sm_100", "sm_120"],
    "nvidia-cuda-nvrtc-cu12==12.9.86": ["sm_103"],
    "nvidia-cuda-nvrtc==13.0.88": ["sm_110"],
}


def load(name: str) -> ModuleType:
    """Return a module of pytracker/core by itself: the package would import torch."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "pytracker" / "core" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install(compiler: str) -> str:
    """Return the path of a compiler's library, installing it where it is missing."""
    folder = ROOT / "build" / "nvrtc" / compiler.replace("==", "-")
    if not (folder / "nvidia").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), compiler]
        subprocess.run(pip, check=True)
    (library,) = (path for path in folder.glob("nvidia/*/lib/libnvrtc.so.*"))
    return str(library)


def main() -> None:
    """Make the packs, and the record of what they were made of."""
    nvrtc, packs = load("nvrtc"), load("packs")
    folder = ROOT / "pytracker" / "core" / "kernels"
    targets = [target for of_compiler in COMPILERS.values() for target in of_compiler]
    made = {"sources": nvrtc.digest_of(nvrtc.sources(ROOT / "csrc")), "targets": targets, "compilers": COMPILERS}
    record = folder / "kernels.json"
    if record.exists() and json.loads(record.read_text(encoding="utf-8")) == made:
        print("the kernels are up to date")
        return
    folder.mkdir(exist_ok=True)
    record.unlink(missing_ok=True)
    total = 0
    for name, of_compiler in COMPILERS.items():
        compiler = nvrtc.Compiler(install(name))
        for target in of_compiler:
            packed = packs.pack(packs.compile_all(compiler, ROOT / "csrc", target))
            (folder / f"{target}.tar.xz").write_bytes(packed)
            total += len(packed)
            print(f"{target}: {len(packed):,} bytes, by {name}")
    record.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    print(f"all: {total:,} bytes")


if __name__ == "__main__":
    main()
