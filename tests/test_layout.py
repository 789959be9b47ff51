"""The layout: imports point one way, modules stay small, and each part of the tree keeps to its rules.

Every import counts: at the top of a module, inside a function, under TYPE_CHECKING, and by `import_module("…")`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import skipstep

ROOT = Path(__file__).parents[1]
FOLDERS = {"engine": "skipstep", "kernels": "skipstep.kernels", "export": "skipstep.export", "bench": "skipstep.bench"}
MOST_LINES = 350

# Each line imports from itself and from the lines above it.
ROOMS = (
    "errors",
    "reporting",
    "arrays",
    "version",
    "storage",
    "kernels",
    "plans",
    "networks",
    "calls",
    "cuda",
    "backends",
    "loops",
    "edge",
    "latency",
    "editing",
    "fitting",
    "bundles",
    "export",
    "pipelines",
    "engine",
    "serving",
    "robotics",
    "demo",
    "bench",
    "commands",
)
ENGINE_MODULES = (
    *(
        "engine",
        "delegates",
        "building",
        "model_source",
        "opening",
        "saving",
        "loading",
        "bundle_source",
        "edge_loading",
        "quantizing",
        "accelerating",
        "loras",
    ),
)


def module_name(file: Path) -> str:
    folder, *rest = file.relative_to(ROOT).with_suffix("").parts
    return ".".join((FOLDERS[folder], *rest)).removesuffix(".__init__")


@cache
def sources() -> dict[str, Path]:
    """The file of each module. Tests that ship with bench/ are no modules of the package."""
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    return {module_name(file): file for file in files if not file.name.startswith(("test_", "conftest"))}


def room(module: str) -> str:
    """The room of a module; those of the engine's top level are rooms of their own."""
    part = module.split(".")[1]
    return {"__main__": "commands", **dict.fromkeys(ENGINE_MODULES, "engine")}.get(part, part)


def imported_modules(module: str) -> Iterator[str]:
    """The modules of skipstep that `module` imports. Names of the root come from the modules that define them."""
    for node in ast.walk(ast.parse(sources()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                home = skipstep._HOME.get(alias.name) if node.module == "skipstep" else None
                yield home or (inner if inner in sources() else str(node.module))
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


@cache
def import_graph() -> dict[str, frozenset[str]]:
    """The modules that each module imports, without the root: it holds the version and a table of lazy names."""
    modules = sources().keys() - {"skipstep"}
    return {module: frozenset(imported_modules(module)) & modules - {module} for module in sorted(modules)}


def refuse_imports(reason: str, wrong: Callable[[str, str], bool]) -> None:
    """Fail with every import of which `wrong(importer, imported)`."""
    edges = [(importer, imported) for importer, targets in import_graph().items() for imported in sorted(targets)]
    found = [f"{importer} -> {imported}" for importer, imported in edges if wrong(importer, imported)]
    assert not found, f"{len(found)} {reason}:\n" + "\n".join(found)


def test_every_module_is_in_a_known_room():
    assert {room(module) for module in import_graph()} <= set(ROOMS)


def test_imports_point_from_later_rooms_to_earlier_ones():
    rank = {name: index for index, name in enumerate(ROOMS)}
    refuse_imports(
        "imports point up",
        # The measurements may import everything.
        lambda importer, imported: rank[room(importer)] < rank[room(imported)] and room(importer) != "bench",
    )


def test_no_modules_import_each_other():
    try:
        TopologicalSorter(import_graph()).prepare()
    except CycleError as error:
        pytest.fail("modules import each other: " + " -> ".join(reversed(error.args[1])))


@pytest.mark.parametrize(
    ("target", "doors"),
    [
        ("commands", {"bench"}),  # The pytest plugin takes the options of the command.
        ("bench", {"commands"}),
        (
            "export",
            {
                "bench",
                "commands",
                "skipstep.demo.browser",
                "skipstep.model_source",
                "skipstep.pipelines.exporting",
                "skipstep.quantizing",
                "skipstep.robotics.encoder",
            },
        ),
    ],
)
def test_a_room_is_imported_through_its_doors_only(target, doors):
    refuse_imports(
        f"imports of {target} by others",
        lambda importer, imported: room(imported) == target and not {importer, room(importer)} & {target, *doors},
    )


def test_modules_are_small():
    lines = {module: len(file.read_text(encoding="utf-8").splitlines()) for module, file in sources().items()}
    large = {module: count for module, count in lines.items() if count > MOST_LINES}
    assert not large


def test_every_package_says_what_it_holds():
    for module, file in sources().items():
        if file.name == "__init__.py":
            assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), module
