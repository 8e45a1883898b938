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
LONGEST_FILE, LARGEST_WING = 500, 2500
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
WINGS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def ladder(title: str) -> list[list[str]]:
    """Return the floors of a ladder on the page, the highest first."""
    block = re.search(rf"<!-- ladder: {title}.*?-->\n\n((?:    .+\n)+)", PAGE)
    assert block, f"docs/architecture.md has no ladder {title!r}"
    return [line.split() for line in block[1].splitlines()]


TORCH_FREE = {room for floor in ladder("without torch") for room in floor}
FLOORS = [*reversed(ladder("without torch")), *reversed(ladder("with torch"))]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def room(module: str) -> str:
    """Return the room of `pytracker.sinks.csv`: `sinks`, unless the ladder names the module itself."""
    inside = module.partition(".")[2] or "__init__"
    return inside if inside in FLOOR else inside.partition(".")[0]


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


def imports_of_others(name: str) -> set[str]:
    """Return the modules of other wings that a module imports."""
    return {target for target in OWN_IMPORTS[name] if target.split(".")[1:2] != name.split(".")[1:2]}


def public_names(wing: str) -> set[str]:
    """Return the ``__all__`` of a wing, read and not imported."""
    for node in ast.parse((PACKAGE / wing / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def reachable(start: str) -> set[str]:
    seen, todo = set(), [start]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += OWN_IMPORTS[name]
    return seen


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_asks_to_be_split(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


@pytest.mark.parametrize("wing", WINGS)
def test_no_wing_asks_to_be_split(wing: str) -> None:
    files = (PACKAGE / wing).rglob("*.py")
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files) <= LARGEST_WING


def test_every_module_has_its_floor() -> None:
    assert {room(name) for name in MODULES} <= set(FLOOR)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_only_from_its_wing_and_the_floors_below(name: str) -> None:
    assert {target for target in imports_of_others(name) if FLOOR[room(target)] >= FLOOR[room(name)]} == set()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_wing_is_entered_by_its_face(name: str) -> None:
    faces = {f"pytracker.{wing}.{public}" for wing in WINGS for public in public_names(wing)}
    inside = {target for target in imports_of_others(name) if target.count(".") > 1}
    assert inside - faces == set()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_imports_itself_by_way_of_others(name: str) -> None:
    # A package may re-export its parts, which then import each other by the package's name.
    others = {target for target in OWN_IMPORTS[name] if not name.startswith(f"{target}.")}
    assert name not in set().union(*(reachable(target) for target in others))


@pytest.mark.parametrize("name", sorted(name for name in MODULES if room(name) in TORCH_FREE - {"__main__"}))
def test_what_opens_a_run_on_a_laptop_imports_no_torch(name: str) -> None:
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


SHARED = {"accumulator.h", "device_types.h", "request.h", "kernel.h"}


@pytest.mark.parametrize("path", NATIVE, ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_and_what_they_share_know_nothing_of_torch(path: Path) -> None:
    included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(encoding="utf-8"), re.MULTILINE)
    of_torch = {header for header in included if header.startswith(("torch/", "ATen/", "c10/", "pybind11/"))}
    if path.suffix in {".cu", ".cuh"} or (path.parent.name == "cuda" and path.suffix == ".h") or path.name in SHARED:
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
