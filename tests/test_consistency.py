"""What keeps the scripts single files that agree with each other, with their flags and with requirements.txt."""

import ast
import re
import subprocess
import sys
import tomllib
from itertools import combinations

import pytest
from helpers import ALGOS, REPO

SOURCES = {path.stem: path.read_text() for path in sorted(ALGOS.glob("*.py"))}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
scripts = pytest.mark.parametrize("script", SOURCES)

# same name, different code, and why
MAY_DIFFER = {
    "Args": "each algorithm has its own flags",
    "validate": "and its own rules for them",
    "main": "the algorithm's story",
}


def definitions(script):
    """Source of each function and class at the top of a script, by name."""
    found = [node for node in TREES[script].body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return {node.name: ast.get_source_segment(SOURCES[script], node) for node in found}


def fields(script):
    """(name, docstring) of each flag."""
    (args,) = [node for node in TREES[script].body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    for node, after in zip(args.body, [*args.body[1:], None]):
        if isinstance(node, ast.AnnAssign):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            yield node.target.id, after.value.value if documented else None


def header(script):
    """The PEP 723 block of a script, parsed."""
    (block,) = re.findall(r"(?m)^# /// script$\n((?:^#.*$\n)+?)^# ///$", SOURCES[script])
    return tomllib.loads(
        "".join(line[2:] if line.startswith("# ") else line[1:] for line in block.splitlines(keepends=True))
    )


@scripts
def test_a_script_imports_nothing_from_this_repository(script):
    folders = ("algos", "tests", "benchmark")
    own = {path.stem for folder in folders for path in (REPO / folder).glob("*.py")} | set(folders)
    for node in ast.walk(TREES[script]):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & own
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module.split(".")[0] not in own


@pytest.mark.parametrize("a,b", list(combinations(SOURCES, 2)))
def test_definitions_that_share_a_name_are_byte_identical(a, b):
    ours, theirs = definitions(a), definitions(b)
    assert [name for name in ours.keys() & theirs.keys() - MAY_DIFFER.keys() if ours[name] != theirs[name]] == []


@scripts
def test_every_definition_is_used_and_documented(script):
    for node in TREES[script].body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in ("Args", "main"):
            assert ast.get_docstring(node), node.name
            assert len(re.findall(rf"\b{node.name}\b", SOURCES[script])) > 1, f"{node.name} is never used"


@scripts
def test_every_flag_is_read_and_documented(script):
    read = {
        node.attr
        for node in ast.walk(TREES[script])
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("args", "self")
    }
    flags = dict(fields(script))
    assert len(flags) <= (31 if script == "rlhf_ppo" else 30)  # rlhf_ppo has the flags of PPO and of a language script
    assert [name for name in flags if name not in read] == []
    assert [name for name, meaning in flags.items() if not meaning] == []


@scripts
def test_functions_of_the_algorithm_know_neither_args_nor_globals(script):
    source = SOURCES[script]
    first, last = (source[: source.index(mark)].count("\n") + 1 for mark in ("# --- algorithm", "# --- plumbing"))
    functions = [
        node for node in TREES[script].body if isinstance(node, ast.FunctionDef) and first < node.lineno < last
    ]
    assert functions
    variables = {
        target.id
        for node in TREES[script].body
        if isinstance(node, ast.Assign)
        for target in ast.walk(node)
        if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store)
    }
    for function in functions:
        used = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
        assert not used & (variables | {"args"}), function.name


@scripts
def test_sections_come_in_the_same_order(script):
    marks = (
        "# /// script",
        '\n"""',
        "\nimport ",
        "class Args",
        "def validate",
        "# --- model ---",
        "# --- algorithm ---",
        "# --- plumbing (same in every script; skip on first read) ---",
        "def main(args: Args) -> None:",
        '\nif __name__ == "__main__":\n    main(parse_args())\n',
    )
    positions = [SOURCES[script].find(mark) for mark in marks]
    assert positions == sorted(positions) and positions[0] == 0
    assert "Differs from the paper" in ast.get_docstring(TREES[script]) and "arXiv" in ast.get_docstring(TREES[script])


@scripts
def test_header_requirements_and_imports_agree(script):
    pinned = dict(re.findall(r"(?m)^([\w-]+)(?:\[.*\])?==([\w.]+)$", (REPO / "requirements.txt").read_text()))
    bounds = {}
    for requirement in header(script)["dependencies"]:
        name, bound = re.fullmatch(r"([\w-]+)(?:\[.*\])?>=([\w.]+)", requirement).groups()
        assert name in pinned, f"{name} is not in requirements.txt"
        number = lambda version: tuple(map(int, version.split(".")))  # noqa: E731
        assert number(bound) <= number(pinned[name])
        bounds[name] = bound
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in TREES[script].body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert imported - set(sys.stdlib_module_names) <= set(bounds)


@scripts
def test_importing_a_script_does_nothing(script, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ALGOS)!r}); import {script}, torch; assert not torch.distributed.is_initialized()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (0, "", []), done.stderr


def test_no_line_is_longer_than_120_characters():
    for name, source in SOURCES.items():
        assert [i for i, line in enumerate(source.splitlines(), 1) if len(line) > 120] == [], name


def test_the_readme_names_every_script():
    readme = (REPO / "README.md").read_text()
    assert [name for name in SOURCES if f"algos/{name}.py" not in readme] == []
