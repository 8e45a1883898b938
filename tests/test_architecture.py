"""The rules that the source keeps: who imports whom, what is free of torch, how long a file may be."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pytracker"
NATIVE = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})
SOURCES = [
    *NATIVE,
    *(ROOT / "tests/cuda").glob("*.h"),
    *(ROOT / "tests/cuda").glob("*.cpp"),
    *(path for room in ("pytracker", "tests", "benchmarks", "examples") for path in (ROOT / room).rglob("*.py")),
]
LONGEST_FILE = 400

# The rooms from the ground up. A module may import from its own floor (without a circle) and from the floors below.
FLOORS = [
    {"errors", "_growing"},
    {"columns", "parameters", "_dtensor", "_ending"},
    {"_ops", "_reference", "history"},
    {"_targets", "_pieces", "_ranks", "_copies"},
    {"gradients"},
    {"meters", "device_log", "distributed", "replicas", "noise_scale", "store", "diagnostics", "sinks"},
    {"_arguments", "_recording", "_judging", "_team", "_model_watch"},
    {"tracker", "comparison", "export", "_metrics", "report", "_console", "watch"},
    {"integrations", "_doctor", "demo"},
    {"cli"},
]
TORCH_FREE = {"errors", "_growing", "columns", "history", "parameters", "store", "diagnostics"}
TORCH_FREE |= {"comparison", "export", "_metrics", "report", "_console", "watch", "cli"}


def room(module: str) -> str:
    """Return the room of `pytracker.sinks.csv`: `sinks`; of the facade itself: nothing."""
    return module.partition(".")[2].partition(".")[0]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_for_types_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(path: Path) -> set[str]:
    """Return the modules that a file imports anywhere, in its functions too, but for what only a type checker reads."""
    found: set[str] = set()
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            source = ".".join(filter(None, (base if node.level else "", node.module or "")))
            named = {f"{source}.{alias.name}" for alias in node.names} & set(MODULES)
            found.update(named or {source})
        for child in ast.iter_child_nodes(node):
            if not (isinstance(child, ast.stmt) and is_for_types_only(child)):
                visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
IMPORTS = {name: imports(path) for name, path in MODULES.items()}
OWN_IMPORTS = {
    name: {target for target in targets if target in MODULES and target != name} for name, targets in IMPORTS.items()
}


def reachable(start: str) -> set[str]:
    seen, todo = set(), [start]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += OWN_IMPORTS[name]
    return seen


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_longer_than_400_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


def test_every_module_has_its_floor() -> None:
    assert {room(name) for name in MODULES if room(name)} <= set().union(*FLOORS)


@pytest.mark.parametrize("name", sorted(name for name in MODULES if room(name)))
def test_a_module_imports_only_from_its_floor_and_below(name: str) -> None:
    floor = {member: level for level, members in enumerate(FLOORS) for member in members}
    above = {target for target in OWN_IMPORTS[name] if room(target) and floor[room(target)] > floor[room(name)]}
    assert not above


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_imports_itself_by_way_of_others(name: str) -> None:
    # A package may re-export its parts, which then import each other by the package's name.
    others = {target for target in OWN_IMPORTS[name] if not name.startswith(f"{target}.")}
    assert name not in set().union(*(reachable(target) for target in others))


@pytest.mark.parametrize("name", sorted(name for name in MODULES if room(name) in TORCH_FREE or not room(name)))
def test_what_opens_a_run_on_a_laptop_imports_no_torch(name: str) -> None:
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("path", NATIVE, ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_and_what_they_share_know_nothing_of_torch(path: Path) -> None:
    included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(encoding="utf-8"), re.MULTILINE)
    of_torch = {header for header in included if header.startswith(("torch/", "ATen/", "c10/", "pybind11/"))}
    if path.suffix in {".cu", ".cuh"} or path.name in {"accumulator.h", "plan.h", "kernel.h"}:
        assert not of_torch
    elif path.name.endswith("_kernel.cpp"):
        assert all(header.startswith("ATen/cpu/vec/") for header in of_torch)


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) lists the symbols")
def test_no_code_for_a_newer_processor_can_be_linked_into_the_rest() -> None:
    """A weak symbol of an AVX-512 object could be the copy that the linker keeps for all."""
    record = PACKAGE / "_build_info.json"
    torch_version = json.loads(record.read_text())["torch"] if record.exists() else None
    objects = [*ROOT.glob(f"build/torch-{torch_version}/objects/avx*/csrc/cpu/*.o")]
    if not objects:
        pytest.skip("the library was not built here, or not for this processor")
    for file in objects:
        symbols = subprocess.run(["nm", "--demangle", str(file)], capture_output=True, text=True, check=True).stdout
        weak = [line for line in symbols.splitlines() if line[17:18] in "WVu"]
        assert weak == [], f"{file.name} of {file.parts[-4]}"
