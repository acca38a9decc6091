"""The house: which part may import which (CONTRIBUTING.md), read off the sources, imports inside functions included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = "sparse_engine"
FOLDERS = {"sparse_engine": PACKAGE}
FOLDERS |= {name: f"{PACKAGE}.{name}" for name in ("export", "calibration", "pruning", "bench")}


def _modules() -> dict[str, Path]:
    """Dotted name -> file, of the whole package."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in (REPOSITORY / folder).rglob("*.py"):
            parts = path.relative_to(REPOSITORY / folder).with_suffix("").parts
            name = ".".join([package, *(part for part in parts if part != "__init__")])
            found[name] = path
    return found


MODULES = _modules()


def _imported(name: str, path: Path) -> Iterator[str]:
    """The modules of the package that one imports, by the most of their name that is one."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            origin = ".".join(filter(None, [base, node.module or ""]))
            wanted = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        for each in wanted:
            module = each if each in MODULES else each.rpartition(".")[0]
            if module in MODULES and module != name:
                yield module


IMPORTS = {name: set(_imported(name, path)) for name, path in MODULES.items()}


def _circles() -> list[list[str]]:
    """Strongly connected modules (Tarjan, SIAM J. Comput. 1(2), 1972)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for other in sorted(IMPORTS[name]):
            if other not in order:
                visit(other)
            if other in stack:
                lowest[name] = min(lowest[name], lowest[other])
        if lowest[name] == order[name]:
            circle = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(circle) > 1:
                found.append(sorted(circle))

    for name in sorted(MODULES):
        if name not in order:
            visit(name)
    return found


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert _circles() == []


# Part -> the parts that it may import beside the files at the top of sparse_engine/, which all may. Imports that run
# only when a command or a backend is used count as well.
ARROWS = {
    "": {"sampling", "backends", "kernels", "cli"},  # cli: __main__ alone
    "sampling": set(),
    "kernels": set(),
    "backends": {"sampling", "kernels", "export"},  # export: the torch backend rebuilds a network from its family
    "bulk": {"backends", "kernels", "sampling"},
    "serve": {"backends", "sampling"},
    "calibration": {"backends", "kernels", "sampling"},
    "export": {"backends", "calibration", "sampling"},
    "diffusers": {"backends", "calibration", "export", "sampling"},
    "pruning": {"backends", "calibration", "export", "sampling"},
    "cli": {"backends", "bulk", "calibration", "export", "pruning", "sampling", "serve"},
    "bench": {"backends", "bulk", "calibration", "diffusers", "export", "kernels", "pruning", "sampling", "serve"},
}


def _part(name: str) -> str:
    first = name.removeprefix(PACKAGE).lstrip(".").split(".")[0]
    return first if first in ARROWS else ""


def test_arrows_between_parts_go_one_way() -> None:
    for name, imported in IMPORTS.items():
        for other in imported:
            mine, theirs = _part(name), _part(other)
            assert theirs in ("", mine) or theirs in ARROWS[mine], f"{name} imports {other}"


def test_only_the_program_itself_imports_the_command_line() -> None:
    importing = {name for name, imported in IMPORTS.items() if any(_part(each) == "cli" for each in imported)}
    assert {name for name in importing if _part(name) != "cli"} == {f"{PACKAGE}.__main__"}


@pytest.mark.parametrize("part", sorted(set(ARROWS) - {""}))
def test_every_part_is_there(part: str) -> None:
    assert any(_part(name) == part for name in MODULES)


LONGEST = 60  # lines of a function, its docstring aside
LONGEST_FILE = 700
LONGER = {"sparse_engine.kernels.int8.MatMulInt8.__call__"}  # the check of each argument, and one call of the library


def _functions(tree: ast.AST, within: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Dotted name -> function, methods and functions within functions too."""
    for node in ast.iter_child_nodes(tree):
        name = (
            f"{within}.{node.name}" if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) else ""
        )
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield name, node
        yield from _functions(node, name or within)


def _length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines, from its name on."""
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    return function.end_lineno - function.lineno + 1 - documented * (first.end_lineno - first.lineno + 1)


@pytest.mark.parametrize("part", sorted(ARROWS))
def test_functions_and_files_are_short(part: str) -> None:
    for name, path in MODULES.items():
        if _part(name) == part:
            source = path.read_text()
            assert source.count("\n") <= LONGEST_FILE, path
            lengths = {each: _length(function) for each, function in _functions(ast.parse(source), name)}
            assert {each for each, length in lengths.items() if length > LONGEST} <= LONGER
