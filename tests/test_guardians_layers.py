"""Imports go down the floors of ARCHITECTURE.md only, without cycles; files are named for ideas."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "motionmerge"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = {
    "errors": 0, "text": 0, "packages": 0, "lazy_torch": 0, "tensors": 0, "rng": 0, "config": 0,
    "schedule": 0, "conditions": 0, "version": 0, "named": 0, "expressions": 0, "knobs": 0,
    "noise_levels": 0, "parameter_groups": 0, "dynamicrafter_names": 0, "patterns": 0, "memory": 0,
    "io": 0,
    "merging": 1, "models": 1,
    "switching": 2, "exports": 2,
    "sampling": 3,
    "training": 4, "evaluation": 4,
    "studio": 5,
    "cli": 6,
    "motionmerge": 7,  # the package's own `__init__`, which offers names of all floors
}  # fmt: skip


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imported_modules(path: Path, tree: ast.AST) -> Iterator[str]:
    """Every module of the package that a file imports, at its top or inside a function."""
    module = module_of(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("motionmerge"))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], base]).rstrip(".")
            if base.split(".")[0] == "motionmerge":
                for alias in node.names:
                    inner = f"{base}.{alias.name}"
                    yield inner if inner in MODULES else base


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def part_of(module: str) -> str:
    """The part of the house a module belongs to; the package's own `__init__` is a part too."""
    return module.split(".")[1] if "." in module else module


def packages_run_by(module: str) -> Iterator[str]:
    """The packages below the top whose `__init__` Python runs before it imports a module.

    The top one is left out: every import runs it, so a test of its own keeps it light.
    """
    parts = module.split(".")
    yield from (".".join(parts[:length]) for length in range(2, len(parts)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only_and_never_to_a_neighbour(path):
    here = part_of(module_of(path))
    for module in imported_modules(path, parse(path)):
        there = part_of(module)
        if there == here:
            continue
        both_on_the_ground = FLOORS[there] == FLOORS[here] == 0
        assert FLOORS[there] < FLOORS[here] or both_on_the_ground, (
            f"{module_of(path)} (floor {FLOORS[here]}) imports {module} (floor {FLOORS[there]})"
        )


def test_every_part_of_the_house_has_a_floor():
    assert {part_of(module) for module in MODULES} == set(FLOORS)


def test_the_top_package_imports_the_version_alone_before_a_name_is_asked_for():
    top = WithoutTypeChecking().visit(parse(PACKAGE / "__init__.py"))
    top.body = [node for node in top.body if not isinstance(node, ast.FunctionDef)]
    assert set(imported_modules(PACKAGE / "__init__.py", top)) == {"motionmerge.version"}


class WithoutTypeChecking(ast.NodeTransformer):
    """Removes imports that only a type checker follows."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else node


def test_there_is_no_import_cycle():
    graph: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        imported = set(imported_modules(path, WithoutTypeChecking().visit(parse(path))))
        inits = {package for name in imported for package in packages_run_by(name)}
        running = {module, *packages_run_by(module)}  # Python has begun these already
        graph[module] = imported | (inits - running)
    finished: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in finished:
            for imported in graph.get(module, set()):
                visit(imported, (*trail, module))
            finished.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_is_named_for_its_idea_and_opens_with_a_sentence(path):
    assert path.stem not in {"utils", "util", "helpers", "common", "misc"}
    docstring = ast.get_docstring(parse(path))
    assert docstring
    assert docstring.split("\n\n")[0].rstrip().endswith((".", ":"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_below_the_command_line_prints(path):
    if part_of(module_of(path)) == "cli":
        return
    for node in ast.walk(parse(path)):
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        assert not (called and node.func.id == "print"), f"{path}:{node.lineno}"
