"""The rooms of the house and who may look into which: imports run downward only, without a circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A room may import from those above it in this list, never from itself upward (docs/ARCHITECTURE.md).
ROOMS = {
    "core": set(),
    "presets": set(),
    "automaton": set(),
    "diffusion": set(),
    "metrics": {"core"},
    "models": {"core", "automaton"},
    "dataset": {"core"},
    "generation": {"core", "presets", "automaton", "diffusion", "metrics", "models", "dataset"},
    "classification": {"core", "metrics", "dataset"},
    "evaluation": {"core", "metrics", "dataset", "classification"},
}
FILES = sorted(path for path in ROOT.rglob("*.py")
               if not {".venv", "tests", "scripts", "benchmarks"} & set(path.relative_to(ROOT).parts))


def imported(path):
    """Full names of the project's modules that a file imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import; write the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(name):
    return name.partition(".")[0]


def upward(files, rooms):
    """Imports of another room than the file's own that its room may not make: (file, imported)."""
    found = []
    for path in files:
        room = room_of(path.relative_to(ROOT).parts[0].removesuffix(".py"))
        allowed = rooms.get(room)
        if allowed is None:
            continue  # a script: the top of the house
        scripts = {p.stem for p in ROOT.glob("*.py")} - set(rooms) | {"scripts", "benchmarks", "tests"}
        found += [(str(path.relative_to(ROOT)), name) for name in imported(path)
                  if room_of(name) != room and room_of(name) in {*rooms, *scripts} - allowed]
    return found


def test_no_import_runs_upward():
    assert upward(FILES, ROOMS) == []


def test_rooms_are_in_order():
    """Each room imports only from rooms that stand before it, so that there can be no circle between rooms."""
    order = list(ROOMS)
    for room, allowed in ROOMS.items():
        assert allowed <= set(order[:order.index(room)]), room


def test_there_is_no_circle_within_a_room():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    edges = {name: {other for found in imported(path) for other in (found, found.rpartition(".")[0])
                    if other in modules and other != name} for name, path in modules.items()}
    while edges:
        free = [name for name, others in edges.items() if not others & edges.keys()]
        assert free, f"these import each other in a circle: {sorted(edges)}"
        for name in free:
            del edges[name]


def test_no_library_takes_parsed_flags():
    """`args` ends where the command line ends: what libraries take has names."""
    for path in FILES:
        if room_of(path.relative_to(ROOT).parts[0]) not in ROOMS or path.parent == ROOT / "core":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name not in ("main",):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                assert "args" not in names, f"{path}: {node.name} takes the parsed flags"


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=str)
def test_packages_do_nothing_when_imported(path):
    """An `__init__` may name what a room offers, and no more."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    assert all(isinstance(node, (ast.Expr, ast.ImportFrom, ast.Assign, ast.FunctionDef)) for node in body)
