"""Builds the native core `pytracker._C` and the CUDA back end `pytracker._C_cuda`; a C++ compiler is all they need.

The package's metadata is in pyproject.toml. What needs code:

* both libraries are compiled against the torch that they will run with, which is found where pip hides it, too;
* each CPU kernel file is compiled once for each instruction set, and the objects are linked into one library;
* the CUDA back end is a library of its own, so that what it lacks costs the core nothing. The kernels are no part of
  it: `make kernels` compiles them into pytracker/core/kernels/, and their sources go along for those it does not serve;
* `pytracker/_build_info.json` says what was built, and why something was not; a wheel's name says for which torch.

Environment variables: PYTRACKER_NATIVE=0 installs without a core, for reading runs or for plain torch;
PYTRACKER_SANITIZE=address,undefined builds an instrumented core; CXX and MAX_JOBS mean what they mean to torch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent.resolve()
FLOOR = (2, 10)  # the oldest torch that the sources are right for
OLDEST_PYTHON = (3, 10)

X86_64 = ("x86_64", "AMD64")
# What ATen itself is compiled with, so that at::vec takes the same code paths here.
ISA_FLAGS = {"default": ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"]}
if platform.machine() in X86_64:
    ISA_FLAGS["avx2"] = ["-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2", "-mavx2", "-mfma", "-mf16c", "-mpopcnt"]
    ISA_FLAGS["avx512"] = ["-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512", "-mavx512f", "-mavx512bw"]
    ISA_FLAGS["avx512"] += ["-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mpopcnt"]


def find_torch() -> ModuleType:
    """Return the torch to build for: the one installed, which an isolated build does not see by itself.

    pip runs an isolated build with the environment's interpreter and hides its packages. A core for any other torch
    than the one there would not load, so that one is looked for.
    """
    if sys.version_info < OLDEST_PYTHON:  # pip looks at requires-python after the build has been asked for
        raise SystemExit(f"this is Python {platform.python_version()}, and pytracker needs 3.10 or later")
    if importlib.util.find_spec("torch") is None:
        sys.path += [
            path for path in {sysconfig.get_path(name) for name in ("purelib", "platlib")} if path not in sys.path
        ]
    try:
        import torch
    except ImportError as error:
        raise SystemExit(
            f"pytracker is compiled for the torch that it will run with, and torch cannot be imported here ({error}). "
            "Install torch first, then type: pip install --no-build-isolation pytracker, or in a checkout: make wheel. "
            "To read runs on a machine without torch, type: PYTRACKER_NATIVE=0 pip install pytracker"
        ) from None
    release = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if release < FLOOR:
        raise SystemExit(
            f"torch {torch.__version__} is installed, and pytracker needs {'.'.join(map(str, FLOOR))} or newer. "
            "Nothing was changed: install a newer torch first"
        )
    return torch


def sources(*patterns: str) -> list[str]:
    """Return the files under csrc/ that match, relative to the root, in a fixed order."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


def sanitizers() -> str:
    """Return what an instrumented build is instrumented with."""
    return os.environ.get("PYTRACKER_SANITIZE", "")


def wants_native() -> bool:
    """Whether the core is to be built."""
    return os.environ.get("PYTRACKER_NATIVE") != "0"


def build_base() -> str:
    """Return the folder of this build: never shared by two versions of torch, or by an instrumented build."""
    if not wants_native():
        return "build/without-core"
    return "build/" + "-".join(filter(None, ("torch", str(find_torch().__version__), sanitizers().replace(",", "-"))))


def describe_core(torch: ModuleType) -> Extension:
    """Describe `pytracker._C` for this torch."""
    from torch.utils import cpp_extension

    files = [file for file in sources("*.cpp", "cpu/*.cpp") if not file.endswith("_kernel.cpp")]
    cxx = [*common_flags(), "-ffp-contract=off", "-fopenmp", *(f"-DPYTRACKER_HAVE_{isa.upper()}" for isa in ISA_FLAGS)]
    # at::parallel_for is inline code on top of OpenMP. It must call the copy that torch brought: another would have a
    # second pool of threads, which torch.set_num_threads does not know.
    bundled = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    link = [str(bundled[0]) if bundled else "-fopenmp", *cxx_runtime()]
    if sanitizers():
        instrumented = [f"-fsanitize={sanitizers()}", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]
        cxx += ["-O1", "-g1", "-fno-omit-frame-pointer", *instrumented]
        link += instrumented
    return Extension(
        "pytracker._C",
        sources=files,
        depends=sources("**/*.h", "cpu/*_kernel.cpp"),  # or a change of these alone would not be linked
        include_dirs=[str(ROOT / "csrc")],
        libraries=["c10", "torch", "torch_cpu", "torch_python"],
        library_dirs=cpp_extension.library_paths(),
        extra_compile_args=cxx + torch_headers(),
        extra_link_args=link,
        language="c++",
    )


def describe_cuda() -> Extension:
    """Describe `pytracker._C_cuda`. It includes nothing of CUDA, and finds the runtime behind torch's own libraries."""
    from torch.utils import cpp_extension

    return Extension(
        "pytracker._C_cuda",
        sources=sources("cuda/*.cpp"),
        depends=sources("**/*.h"),
        include_dirs=[str(ROOT / "csrc")],
        libraries=["c10", "c10_cuda", "torch", "torch_cpu", "torch_cuda", "torch_python", "dl"],
        library_dirs=cpp_extension.library_paths(),
        extra_compile_args=common_flags() + torch_headers(),
        extra_link_args=["-Wl,--no-as-needed", *cxx_runtime()],  # its symbols are found where these libraries' own are
        language="c++",
    )


def cxx_runtime() -> list[str]:
    """Return the C++ runtime that torch has loaded, for a compiler that would link a static one of its own.

    Two runtimes in a process disagree about locales: the first number that is written into a message ends it.
    """
    maps = Path("/proc/self/maps")
    mapped = maps.read_text(encoding="utf-8").splitlines() if maps.exists() else []
    return sorted({line.split()[-1] for line in mapped if "/libstdc++.so" in line})[:1]


def common_flags() -> list[str]:
    """Return the flags of every file."""
    return ["-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"]


def torch_headers() -> list[str]:
    """Return where torch's headers are: system headers, so that the warnings are about our own code."""
    from torch.utils import cpp_extension

    return [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]


def load_nvrtc() -> ModuleType:
    """Return pytracker/core/nvrtc.py, which knows what kernels are made of; the package itself would import torch."""
    spec = importlib.util.spec_from_file_location("nvrtc", ROOT / "pytracker" / "core" / "nvrtc.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildFolder(build):
    """The `build` command in a folder of its own for each torch."""

    def initialize_options(self) -> None:
        """Set the default folder."""
        super().initialize_options()
        self.build_base = build_base()


class BuildWheel(bdist_wheel):
    """The `bdist_wheel` command with torch's version as the build tag: pytracker-0.1.0-0torch2.13.0-cp311-....whl.

    It is no local version (0.1.0+torch2.13.0): pip refuses a wheel of another version than that of the source
    distribution it was built from.
    """

    def initialize_options(self) -> None:
        """Set the default tag."""
        super().initialize_options()
        tag = f"torch{find_torch().__version__}" if wants_native() else "without_core"
        self.build_number = "0" + tag.replace("+", ".")


class BuildPackage(build_py):
    """Adds the kernels' sources to the package, for devices that no shipped kernel serves."""

    def run(self) -> None:
        """Copy the modules, then the sources."""
        super().run()
        if getattr(self, "editable_mode", False):
            return  # the checkout has them
        for name, content in load_nvrtc().sources(ROOT / "csrc").items():
            target = Path(self.build_lib) / "pytracker" / "core" / "kernels" / "csrc" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


class SourceDistribution(sdist):
    """Refuses to leave out the kernels: whoever installs from it may have no compiler for them."""

    def run(self) -> None:
        """Check, then pack."""
        nvrtc = load_nvrtc()
        packs = ROOT / "pytracker" / "core" / "kernels" / "kernels.json"
        made_of = json.loads(packs.read_text(encoding="utf-8"))["sources"] if packs.exists() else "nothing"
        if made_of != nvrtc.digest_of(nvrtc.sources(ROOT / "csrc")):
            raise SystemExit("the kernels in pytracker/core/kernels are missing or of older sources: make kernels")
        super().run()


class BuildNative(build_ext):
    """Compiles the libraries with torch's own command, and records what came of it."""

    def finalize_options(self) -> None:
        """Keep the objects of an editable install, too: setuptools would put them into a temporary folder."""
        super().finalize_options()
        self.build_temp = str(ROOT / build_base() / "objects")

    def run(self) -> None:
        """Build, and write `_build_info.json`. No library of an earlier build stays behind."""
        package = (ROOT if self.inplace else Path(self.build_lib)) / "pytracker"
        info: dict[str, Any] = {"built": False, "reason": "it was installed with PYTRACKER_NATIVE=0", "torch": None}
        built: list[Extension] = []
        if wants_native():
            torch = find_torch()
            core = describe_core(torch)
            try:
                self.compile(core, "")
            except (Exception, SystemExit) as error:
                raise SystemExit(
                    f"pytracker's native core could not be built: {self.last_words(error)}. Mend that, or install "
                    "without it, many times slower, by PYTRACKER_NATIVE=0"
                ) from error
            reason = "" if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"
            built.append(core)
            if torch.version.cuda and not sanitizers():
                back_end = describe_cuda()
                try:
                    self.compile(back_end, "cuda")
                    built.append(back_end)
                except (Exception, SystemExit) as error:
                    reason = f"the CUDA back end could not be built: {self.last_words(error)}"
                    print(f"pytracker: {reason}", file=sys.stderr)
            info = {"built": True, "reason": "", "torch": str(torch.__version__), "compiler": self.compiler_version}
            info |= {"isa": list(ISA_FLAGS), "cuda": torch.version.cuda, "cuda_reason": reason}
        self.extensions = self.distribution.ext_modules = built
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        names = {extension.name.rpartition(".")[2] for extension in built}
        for library in package.glob("_C*.so"):
            if library.name.partition(".")[0] not in names:
                library.unlink()

    def compile(self, extension: Extension, folder: str) -> None:
        """Compile one library with torch's command, which knows torch's flags, and ninja where that is installed."""
        from torch.utils.cpp_extension import BuildExtension

        class Compile(BuildExtension):
            def build_extension(self, ext: Extension) -> None:
                ext.extra_objects = compile_kernels(self, ext) if ext.name == "pytracker._C" else []
                super().build_extension(ext)

        self.distribution.ext_modules = [extension]
        command = Compile(self.distribution, use_ninja=shutil.which("ninja") is not None)
        command.ensure_finalized()
        for name in ("build_lib", "inplace", "editable_mode", "force", "debug", "parallel"):
            setattr(command, name, getattr(self, name, None))
        command.build_temp = str(Path(self.build_temp) / folder)
        command.run()
        compiler = command.compiler.compiler_cxx[0]
        said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
        self.compiler_version = said.partition("\n")[0]

    def last_words(self, error: BaseException) -> str:
        """Return the error and the compiler's first complaint: ninja prints it, and leaves it out of its error."""
        said = [
            subprocess.run(["ninja", "-C", str(file.parent)], capture_output=True, text=True, check=False).stdout
            for file in Path(self.build_temp).glob("**/build.ninja")
            if shutil.which("ninja")  # else the files are of another build
        ]
        complaints = [line for text in said for line in text.splitlines() if "error:" in line]
        return "; ".join([f"{type(error).__name__}: {error}", *complaints[:1]])


def compile_kernels(command: build_ext, ext: Extension) -> list[str]:
    """Compile the CPU kernels for each instruction set; return the objects."""
    drop = ("-DPYTRACKER_HAVE_", "-fopenmp")  # what a kernel must not know, and must not link twice
    common = [flag for flag in ext.extra_compile_args if not flag.startswith(drop)]
    objects: list[str] = []
    for isa, flags in ISA_FLAGS.items():
        objects += command.compiler.compile(
            sources("cpu/*_kernel.cpp"),
            output_dir=str(Path(command.build_temp) / isa),
            include_dirs=ext.include_dirs,
            extra_postargs=common + flags,
        )
    return objects


if __name__ == "__main__":
    setup(
        # Described when they are built: that takes torch.
        ext_modules=[Extension("pytracker._C", []), Extension("pytracker._C_cuda", [])],
        cmdclass={
            "bdist_wheel": BuildWheel,
            "build": BuildFolder,
            "build_ext": BuildNative,
            "build_py": BuildPackage,
            "sdist": SourceDistribution,
        },
    )
