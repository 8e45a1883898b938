"""Builds the native core `pytracker._C`, or records why it could not be built.

The package's metadata is in pyproject.toml. Three things need code:

* each CPU kernel file is compiled once for each instruction set, and the objects are linked into one library;
* the CUDA sources are added where torch is a CUDA build and a toolkit is found;
* a failed build leaves a package that installs and knows why it is slow: `pytracker/_build_info.json` says it.

Environment variables: PYTRACKER_REQUIRE_NATIVE=1 makes a failed build an error; PYTRACKER_SANITIZE=address,undefined
builds an instrumented library; TORCH_CUDA_ARCH_LIST, CUDA_HOME, CXX and MAX_JOBS mean what they mean to torch.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
SANITIZE = os.environ.get("PYTRACKER_SANITIZE", "")
CUDA_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

# What ATen itself is compiled with, so that at::vec takes the same code paths here.
ISA_FLAGS = {"default": ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"]}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2", "-mavx2", "-mfma", "-mf16c", "-mpopcnt"]
    ISA_FLAGS["avx512"] = ["-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512", "-mavx512f", "-mavx512bw"]
    ISA_FLAGS["avx512"] += ["-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mpopcnt"]


def output_of(*command: str) -> str:
    """Return what a command prints on both streams, whether it fails or not; nothing where it does not exist."""
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    except OSError:
        return ""


def find_cuda_home() -> str | None:
    """Return the root of the CUDA toolkit, or None.

    torch takes the folder above the `nvcc` it finds, which is wrong where that nvcc is a wrapper script. The compiler
    itself knows: it prints its TOP in a dry run.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            return os.environ[variable]
    with tempfile.NamedTemporaryFile(suffix=".cu") as empty:
        top = re.search(r"^#\$ TOP=(.+)$", output_of("nvcc", "--dryrun", empty.name), re.MULTILINE)
    return str(Path(top[1].strip()).resolve()) if top else None


CUDA_HOME = find_cuda_home()
if CUDA_HOME:
    os.environ["CUDA_HOME"] = CUDA_HOME  # torch.utils.cpp_extension makes its own guess when it is imported

try:
    import torch
    from torch.utils import cpp_extension

    BuildBase: type[build_ext] = cpp_extension.BuildExtension
    TORCH, TORCH_CUDA = str(torch.__version__), torch.version.cuda
    NO_TORCH = ""
except ImportError as error:
    BuildBase = build_ext
    TORCH, TORCH_CUDA = None, None
    NO_TORCH = f"torch cannot be imported in the build ({error}); install it first and pass --no-build-isolation to pip"


def sources(*patterns: str) -> list[str]:
    """Return the files under csrc/ that match, relative to the root, in a fixed order."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


def build_base() -> str:
    """Return the folder of this build: never shared by two versions of torch, or by an instrumented build."""
    return "build/" + "-".join(filter(None, ("torch", TORCH, SANITIZE.replace(",", "-"))))


def cuda_architectures() -> list[str]:
    """Return what the CUDA kernels are compiled for: the user's list, or those of ours that this toolkit knows."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"].replace(" ", ";").split(";")
    known = output_of(f"{CUDA_HOME}/bin/nvcc", "--list-gpu-arch").split()
    chosen = [arch for arch in CUDA_ARCHITECTURES if f"compute_{arch.replace('.', '')}" in known]
    return [*chosen[:-1], f"{chosen[-1]}+PTX"]


def why_no_cuda() -> str:
    """Return why the CUDA back end is not built, or nothing where it is."""
    if TORCH_CUDA is None:
        return f"torch {TORCH} is built without CUDA"
    if CUDA_HOME is None:
        return f"torch {TORCH} is built for CUDA {TORCH_CUDA}, but no CUDA toolkit (nvcc) was found"
    release = re.search(r"release (\d+)\.", output_of(f"{CUDA_HOME}/bin/nvcc", "--version"))
    if release is None or release[1] != TORCH_CUDA.partition(".")[0]:
        found = release[1] if release else "unknown"
        return f"torch {TORCH} is built for CUDA {TORCH_CUDA}, and the toolkit at {CUDA_HOME} is of version {found}"
    return ""


def describe() -> tuple[Extension, dict[str, Any]]:
    """Describe `pytracker._C` for this torch, with what `_build_info.json` will say of it."""
    no_cuda = why_no_cuda()
    info: dict[str, Any] = {"isa": list(ISA_FLAGS), "cuda": None, "archs": [], "cuda_reason": no_cuda}
    files = [file for file in sources("*.cpp", "cpu/*.cpp") if not file.endswith("_kernel.cpp")]
    libraries = ["c10", "torch", "torch_cpu", "torch_python"]
    cxx = ["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra", "-fopenmp"]
    cxx += [f"-DPYTRACKER_HAVE_{isa.upper()}" for isa in ISA_FLAGS]
    if "sve256" in ISA_FLAGS:
        cxx.append("-DHAVE_SVE_CPU_DEFINITION")  # torch's list of capabilities has SVE only with it
    nvcc = ["-O3", "-lineinfo", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden", "-DPYTRACKER_CUDA"]
    # torch takes these operators away from its own kernels, whose types are its own; ours are CUDA's.
    taken = ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS")
    nvcc += [f"-U__CUDA_NO_{macro}__" for macro in taken]
    link = []
    if SANITIZE:
        sanitizers = [f"-fsanitize={SANITIZE}", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]
        cxx += ["-O1", "-g1", "-fno-omit-frame-pointer", *sanitizers]
        link += sanitizers
    if not no_cuda:
        files += sources("cuda/*.cu", "cuda/*.cpp")
        libraries += ["c10_cuda", "torch_cuda", "cudart"]
        cxx.append("-DPYTRACKER_CUDA")
        info |= {"cuda": TORCH_CUDA, "archs": cuda_architectures()}
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(info["archs"])
    device = {} if no_cuda else {"device_type": "cuda"}
    # torch's headers are system headers, so that the warnings are about our own code.
    headers = [flag for path in cpp_extension.include_paths(**device) for flag in ("-isystem", path)]
    # at::parallel_for is inline code on top of OpenMP. It must call the copy that torch brought: another would have a
    # second pool of threads, which torch.set_num_threads does not know.
    bundled = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    link.append(str(bundled[0]) if bundled else "-fopenmp")
    extension = Extension(
        "pytracker._C",
        sources=files,
        include_dirs=[str(ROOT / "csrc")],
        libraries=libraries,
        library_dirs=cpp_extension.library_paths(**device),
        extra_compile_args={"cxx": cxx + headers, "nvcc": nvcc + headers},
        extra_link_args=link,
        language="c++",
    )
    return extension, info


class BuildFolder(build):
    """The `build` command in a folder of its own for each torch."""

    def initialize_options(self) -> None:
        """Set the default folder."""
        super().initialize_options()
        self.build_base = build_base()


class BuildNative(BuildBase):
    """Compiles each kernel once for each instruction set, and turns a failed build into a recorded reason."""

    def finalize_options(self) -> None:
        """Keep the objects of an editable install, too: setuptools would put them into a temporary folder."""
        super().finalize_options()
        self.build_temp = str(ROOT / build_base() / "objects")

    def run(self) -> None:
        """Build, and write `_build_info.json`; where the build fails, no older library stays behind."""
        reason = NO_TORCH
        package = (ROOT if self.inplace else Path(self.build_lib)) / "pytracker"
        if not reason:
            try:
                super().run()
            except (Exception, SystemExit) as error:
                reason = f"the build failed: {self.last_words(error)}"
        if reason and os.environ.get("PYTRACKER_REQUIRE_NATIVE") == "1":
            raise SystemExit(reason)
        compiler = None if reason else output_of(self.compiler.compiler_cxx[0], "--version").partition("\n")[0]
        info = {"built": not reason, "reason": reason, "torch": TORCH, "compiler": compiler, **INFO}
        if reason:
            info |= {"isa": [], "cuda": None, "archs": []}
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        for stale in package.glob("_C.*") if reason else ():
            stale.unlink()

    def build_extension(self, ext: Extension) -> None:
        """Compile the kernels for each instruction set, then the rest, and link all of it."""
        drop = ("-DPYTRACKER_HAVE_", "-fopenmp")  # what a kernel must not know, and must not link twice
        common = [flag for flag in ext.extra_compile_args["cxx"] if not flag.startswith(drop)]
        for isa, flags in ISA_FLAGS.items():
            ext.extra_objects += self.compiler.compile(
                sources("cpu/*_kernel.cpp"),
                output_dir=str(Path(self.build_temp) / isa),
                include_dirs=ext.include_dirs,
                extra_postargs={"cxx": common + flags, "nvcc": []},
            )
        super().build_extension(ext)

    def last_words(self, error: BaseException) -> str:
        """Return the error and the compiler's first complaint: ninja prints it, and leaves it out of its error."""
        said = [output_of("ninja", "-C", str(file.parent)) for file in Path(self.build_temp).glob("**/build.ninja")]
        complaints = [line for text in said for line in text.splitlines() if "error:" in line]
        return "; ".join([f"{type(error).__name__}: {error}", *complaints[:1]])


EXTENSION, INFO = (Extension("pytracker._C", []), {"isa": [], "cuda": None, "archs": []}) if NO_TORCH else describe()

setup(ext_modules=[EXTENSION], cmdclass={"build": BuildFolder, "build_ext": BuildNative})
