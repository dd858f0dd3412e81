"""The rooms of benchmark/: which imports which, and that every file and command that a text names is there."""

import ast
import re
from graphlib import TopologicalSorter

import pytest
from helpers import REPO

import run as benchmark

BENCHMARK = REPO / "benchmark"
BELOW = {  # what each room may import beside itself
    "world": set(),
    "real": set(),
    "core": {"world"},
    "cost": {"core", "world"},
    "peers": {"core", "world"},
    "faults": {"core", "world"},
    "run": {"core", "world", "real", "cost", "peers", "faults"},
}
FILES = {}  # by the name of the module
for path in BENCHMARK.rglob("*.py"):
    parts = path.relative_to(BENCHMARK).with_suffix("").parts
    FILES[".".join(parts).removesuffix(".__init__")] = path
TEXTS = []
for pattern in ("*.md", "*.toml", "*.txt", ".ci/*", ".github/**/*.yml", "algos/*.py"):
    TEXTS += REPO.glob(pattern)
for pattern in ("*.py", "*.md", "*.txt"):
    TEXTS += BENCHMARK.rglob(pattern)


def imported(path):
    """Names of the modules of benchmark/ that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
    return found & FILES.keys()


@pytest.mark.parametrize("module", FILES)
def test_a_room_imports_only_those_below_it(module):
    room = module.split(".")[0]
    rooms = {name.split(".")[0] for name in imported(FILES[module])}
    assert rooms - {room} <= BELOW[room]


def test_no_modules_import_each_other():
    imports = {module: imported(path) for module, path in FILES.items()}
    assert list(TopologicalSorter(imports).static_order())


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(REPO)))
def test_files_that_a_text_names_exist(path):
    named = re.findall(r"(?<![\w/.-])(?:algos|benchmark|tests)/[\w./*-]*[\w*]", path.read_text())
    linked = re.findall(r"\]\(((?!http)[^)#]+)\)", path.read_text()) if path.suffix == ".md" else []
    assert [name for name in named if not list(REPO.glob(name))] == []
    assert [name for name in linked if not (path.parent / name).exists()] == []


def test_commands_that_a_text_names_exist(capsys):
    benchmark.main([])
    commands = re.findall(r"(?m)^    ([a-z][a-z0-9-]*)", capsys.readouterr().out.partition("COMMAND\n")[2])
    assert "record-trl" in commands
    for path in TEXTS:
        named = re.findall(r"(?<!another )\brun\.py ([a-z][a-z0-9-]+)", path.read_text())
        assert set(named) <= set(commands), path
