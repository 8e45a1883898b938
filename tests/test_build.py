"""What an installation says at once, and what it leaves behind."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from pytracker.core import native, nvrtc, packs

pytest.importorskip("setuptools")
ROOT = Path(__file__).resolve().parent.parent

TRAIN_A_LITTLE = """
import sys, warnings

import torch

# An editable install of the checkout would lend its library to the package that has none.
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import pytracker

    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    for _ in range(2):
        assert pytracker.compute_gradient_stats(model) == {"grad_norm": 5.0, "grad_max": 5.0}
    with pytracker.Tracker(model, diagnosis=None) as tracker:
        tracker.step(loss=0.5)
    assert tracker.history["grad_norm"] == [5.0]
print("\\n".join(str(warning.message) for warning in caught if "pytracker" in str(warning.message)))
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of what a build needs, without what was built here."""
    copy = tmp_path_factory.mktemp("sources")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    built = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__", "kernels")
    for name in ("csrc", "pytracker"):
        shutil.copytree(ROOT / name, copy / name, ignore=built)
    return copy


def run(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTRACKER_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def package(sources: Path) -> Path:
    """Return the folder of a package that was installed without its core, as is said."""
    done = run("setup.py", "build", folder=sources, PYTRACKER_NATIVE="0")
    assert done.returncode == 0, done.stderr
    (built,) = sources.glob("build/without-core/lib*")
    return built


def test_a_build_that_fails_is_an_error_that_says_what_to_do(sources: Path) -> None:
    done = run("setup.py", "build", folder=sources, CC="/bin/false", CXX="/bin/false")
    assert done.returncode != 0
    assert "/bin/false" in done.stderr
    assert "PYTRACKER_NATIVE=0" in done.stderr


def test_without_a_core_the_package_works_and_says_why_it_is_slow_once(package: Path, tmp_path: Path) -> None:
    done = run("-c", TRAIN_A_LITTLE, folder=tmp_path, PYTHONPATH=str(package), PYTHONSAFEPATH="1")
    assert done.returncode == 0, done.stderr
    (said,) = done.stdout.strip().splitlines()
    assert "without its native core" in said
    assert "PYTRACKER_NATIVE=0" in said


def test_a_core_for_another_torch_is_not_loaded_and_both_are_named(package: Path, tmp_path: Path) -> None:
    other = shutil.copytree(package, tmp_path / "other")
    record = {"built": True, "reason": "", "torch": "2.9.1+cpu"}
    (other / "pytracker/_build_info.json").write_text(json.dumps(record))
    done = run("-c", TRAIN_A_LITTLE, folder=tmp_path, PYTHONPATH=str(other), PYTHONSAFEPATH="1")
    assert done.returncode == 0, done.stderr
    (said,) = done.stdout.strip().splitlines()
    assert "2.9.1+cpu" in said
    assert pytest.importorskip("torch").__version__ in said
    assert "--no-cache-dir --no-binary pytracker" in said  # pip keeps the wheel that it built for the other torch


def test_a_wheel_is_named_after_its_torch_and_has_the_version_of_its_sources() -> None:
    torch = pytest.importorskip("torch")
    code = """
import runpy
from setuptools import Distribution
command = runpy.run_path("setup.py")["BuildWheel"](Distribution({"name": "pytracker", "version": "0.1.0"}))
command.ensure_finalized()
print(command.build_number, command.wheel_dist_name)
"""
    done = run("-c", code, folder=ROOT)
    assert done.stdout.split() == [
        f"0torch{torch.__version__.replace('+', '.')}",
        "pytracker-0.1.0-" + done.stdout.split()[0],
    ]
    assert run("-c", code, folder=ROOT, PYTRACKER_NATIVE="0").stdout.split()[0] == "0without_core"


def test_what_is_installed_holds_every_module_its_data_and_the_kernels_sources(sources: Path, tmp_path: Path) -> None:
    done = run("setup.py", "--quiet", "build", "--build-lib", str(tmp_path), folder=sources, PYTRACKER_NATIVE="0")
    assert done.returncode == 0, done.stderr
    files = (path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    held = {str(path) for path in files if "__pycache__" not in path.parts}
    package = (path.relative_to(sources) for path in (sources / "pytracker").rglob("*") if path.is_file())
    needed = {str(path) for path in package if path.suffix in {".py", ".css", ".html", ".js", ".typed"}}
    assert needed <= held
    assert {f"pytracker/core/kernels/csrc/{name}" for name in nvrtc.sources(sources / "csrc")} <= held
    assert not any(name.endswith((".cpp", ".so")) or name.startswith("tests") for name in held)


# A stand-in for torch in the build: what is there is found, by its version.
PRETEND = (
    "import sys, types; m = types.ModuleType('torch'); m.__version__ = '2.4.0'; m.__spec__ = types.SimpleNamespace(); "
)
BUILD = "import runpy; sys.argv = ['setup.py', 'build']; runpy.run_path('setup.py', run_name='__main__')"


def test_a_torch_below_the_floor_is_refused_by_its_version(sources: Path) -> None:
    done = run("-c", f"{PRETEND} sys.modules['torch'] = m; {BUILD}", folder=sources)
    assert done.returncode != 0
    assert "torch 2.4.0 is installed, and pytracker needs 2.10 or newer" in done.stderr


def test_a_python_that_is_too_old_is_refused_before_its_torch_is_looked_for(sources: Path) -> None:
    code = (
        "import runpy, sys; sys.modules['torch'] = None; find = runpy.run_path('setup.py')['find_torch']; "
        "find.__globals__['OLDEST_PYTHON'] = (99, 0); find()"
    )
    done = run("-c", code, folder=sources)
    assert done.returncode != 0
    assert "pytracker needs 3.10 or later" in done.stderr


def test_what_ninja_once_built_hides_no_error_where_ninja_is_gone(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources, tmp_path / "copy", ignore=shutil.ignore_patterns("build"))
    (tmp_path / "copy/build/torch/objects").mkdir(parents=True)
    (tmp_path / "copy/build/torch/objects/build.ninja").touch()
    code = (
        "import runpy, shutil; from setuptools import Distribution; shutil.which = lambda name: None; "
        "command = runpy.run_path('setup.py')['BuildNative'](Distribution()); command.build_temp = 'build'; "
        "print(command.last_words(OSError('no compiler')))"
    )
    done = run("-c", code, folder=tmp_path / "copy")
    assert done.stdout == "OSError: no compiler\n", done.stderr


def test_without_torch_a_build_says_what_to_type(sources: Path) -> None:
    hide = "import sys; sys.modules['torch'] = None; "
    done = run("-c", hide + BUILD, folder=sources)
    assert done.returncode != 0
    assert "pip install --no-build-isolation pytracker" in done.stderr
    assert "PYTRACKER_NATIVE=0 pip install pytracker" in done.stderr


@pytest.mark.skipif(native.load()[0] is None, reason="describes a build, which takes a compiler")
def test_what_is_included_and_what_is_compiled_apart_makes_a_library_old() -> None:
    setup = runpy.run_path(str(ROOT / "setup.py"))
    csrc = ROOT / "csrc"
    headers = {path.relative_to(ROOT).as_posix() for path in csrc.rglob("*.h")}
    core = setup["describe_core"](setup["find_torch"]())
    assert headers | {"csrc/cpu/moments_kernel.cpp"} <= set(core.depends)
    compiled = {path.relative_to(ROOT).as_posix() for path in [*csrc.glob("*.cpp"), *csrc.glob("cpu/*.cpp")]}
    assert compiled <= {*core.sources, *core.depends}
    assert headers <= set(setup["describe_cuda"]().depends)


def test_importing_setup_py_does_nothing_but_define(sources: Path) -> None:
    code = "import sys, runpy; runpy.run_path('setup.py'); sys.exit('torch' in sys.modules)"
    assert run("-c", code, folder=sources).returncode == 0


def test_a_compiler_that_links_its_own_cxx_runtime_is_given_the_one_of_torch(tmp_path: Path) -> None:
    source = tmp_path / "message.cpp"
    code = '#include <sstream>\nextern "C" int length(unsigned long n) { std::ostringstream s; s << n;'
    source.write_text(code + " return s.str().size(); }\n", encoding="utf-8")
    runtime = runpy.run_path(str(ROOT / "setup.py"))["cxx_runtime"]()

    def works(*flags: str) -> bool:
        library = tmp_path / "message.so"
        command = [os.environ.get("CXX", "g++"), "-shared", "-fPIC", str(source), *flags, "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"there is no static C++ runtime here: {done.stderr}")
        call = f"import ctypes, torch; assert ctypes.CDLL({str(library)!r}).length(1234) == 4"
        return run("-c", call, folder=tmp_path).returncode == 0

    assert not works("-static-libstdc++")  # or this test shows nothing
    assert works("-static-libstdc++", *runtime)


def test_the_package_brings_the_sources_of_its_kernels(package: Path) -> None:
    shipped = package / "pytracker/core/kernels/csrc"
    assert nvrtc.sources(shipped) == nvrtc.sources(ROOT / "csrc")
    assert "cuda/gradient_moments.cuh" in nvrtc.sources(shipped)


def test_a_source_distribution_without_fresh_kernels_is_refused(sources: Path) -> None:
    done = run("setup.py", "--quiet", "sdist", folder=sources, PYTRACKER_NATIVE="0")
    assert done.returncode != 0
    assert "make kernels" in done.stderr


def test_a_source_distribution_holds_all_that_a_build_needs(sources: Path, tmp_path: Path) -> None:
    whole = shutil.copytree(sources, tmp_path / "whole")
    kernels = whole / "pytracker/core/kernels"
    kernels.mkdir()
    record = {"sources": nvrtc.digest_of(nvrtc.sources(whole / "csrc")), "targets": ["sm_90"]}
    (kernels / "kernels.json").write_text(json.dumps(record))
    (kernels / "sm_90.tar.xz").write_bytes(packs.pack([b"few", b"some", b"many"]))
    done = run("setup.py", "--quiet", "sdist", folder=whole, PYTRACKER_NATIVE="0")
    assert done.returncode == 0, done.stderr
    (archive,) = whole.glob("dist/*.tar.gz")
    with tarfile.open(archive) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
    needed = {str(p.relative_to(whole)) for f in ("csrc", "pytracker") for p in (whole / f).rglob("*") if p.is_file()}
    assert {name for name in needed if not name.endswith(".pyc") and "egg-info" not in name} <= held
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= held
