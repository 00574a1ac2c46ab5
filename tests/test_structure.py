"""The arrows between modules: none goes in a circle, and rooms import only what lies below them."""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BELOW = {
    "gigapath_contract": set(),
    "training": {"gigapath_contract"},
    "export": {"gigapath_contract", "training"},
    "client": {"gigapath_contract"},
    "server": {"gigapath_contract"},
    "benchmarks": {"gigapath_contract", "training", "export", "client", "server"},
    "demo": {"gigapath_contract", "training", "export", "client", "server", "benchmarks"},
}
# Runs inside Triton's own interpreter, where its folder is the import path.
APART = ROOT / "server" / "backends"


@cache
def modules() -> dict[str, Path]:
    """Every module of the product by its dotted name."""
    found = {}
    for room in BELOW:
        for path in sorted((ROOT / room).rglob("*.py")):
            if not path.is_relative_to(APART):
                parts = path.relative_to(ROOT).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str, *, when_imported: bool) -> Iterator[str]:
    """The dotted names that a module imports; `when_imported`: only those executed by importing it."""
    path = modules()[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield name if name in modules() else base
        elif when_imported and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        elif when_imported and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
        else:
            pending.extend(ast.iter_child_nodes(node))


def room_of(name: str) -> str:
    return name.partition(".")[0]


def arrows(place_of: Callable[[str], str]) -> dict[str, set[str]]:
    """What each place imports, late and for types alone included; `place_of` a module is its place."""
    graph: dict[str, set[str]] = {place_of(module): set() for module in modules()}
    for module in modules():
        found = {place_of(name) for name in imports(module, when_imported=False) if name in modules()}
        graph[place_of(module)] |= found - {place_of(module)}
    return graph


def folder_of(module: str) -> str:
    """A module's folder, but the module itself where it lies directly in its room."""
    folder = modules()[module].parent.relative_to(ROOT)
    return module if len(folder.parts) == 1 else str(folder)


def test_no_import_between_modules_goes_in_a_circle() -> None:
    graphlib.TopologicalSorter(arrows(lambda module: module)).prepare()  # a CycleError names the circle


def test_no_import_between_folders_goes_in_a_circle() -> None:
    graphlib.TopologicalSorter(arrows(folder_of)).prepare()


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_only_rooms_below_it(room: str) -> None:
    upward = [
        f"{module} imports {name}"
        for module in modules()
        if room_of(module) == room
        for name in imports(module, when_imported=False)
        if room_of(name) in BELOW.keys() - BELOW[room] - {room}
    ]
    assert not upward


def test_the_ground_floor_needs_numpy_alone() -> None:
    allowed = sys.stdlib_module_names | {"numpy", "gigapath_contract"}
    foreign = [
        f"{module} imports {name}"
        for module in modules()
        if room_of(module) == "gigapath_contract"
        for name in imports(module, when_imported=False)
        if room_of(name) not in allowed
    ]
    assert not foreign


def test_the_client_imports_no_torch_but_to_write_pt_files() -> None:
    client = [module for module in modules() if room_of(module) == "client"]
    at_import = [m for m in client if "torch" in map(room_of, imports(m, when_imported=True))]
    ever = [m for m in client if "torch" in map(room_of, imports(m, when_imported=False))]
    assert (at_import, ever) == ([], ["client.outputs.formats"])


def test_the_product_patches_nothing() -> None:
    patched = [m for m in modules() if "unittest" in map(room_of, imports(m, when_imported=False))]
    assert not patched
