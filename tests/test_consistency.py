"""What keeps the scripts short single files that agree with each other, with their flags and with requirements.txt."""

import ast
import difflib
import functools
import re
import subprocess
import sys
import tomllib
from itertools import combinations

import pytest
from helpers import ALGOS, REPO

LINES = {  # at most, header and docstring included
    "q_learning": 415,
    "reinforce": 550,
    "a2c": 590,
    "dqn": 605,
    "ppo": 630,
    "sft": 800,
    "reward_model": 815,
    "dpo": 905,
    "grpo": 1035,
    "rlhf_ppo": 1050,
}
NODES = {  # of syntax in all, at most; and below, per statement, which says one thing
    "q_learning": 1480,
    "reinforce": 2235,
    "a2c": 2395,
    "dqn": 2390,
    "ppo": 2535,
    "sft": 3015,
    "reward_model": 3045,
    "dpo": 3455,
    "grpo": 3960,
    "rlhf_ppo": 4125,
}
MEAN_NODES, P90_NODES, MAX_NODES = 8.0, 15, 25
MAX_DENSE = 12  # comprehensions, lambdas, walruses and conditional expressions per 100 statements
MAX_WIDE = 0.15  # share of lines over 100 columns
LANGUAGE = {"sft", "reward_model", "dpo", "grpo", "rlhf_ppo"}
MAX_FLAGS = 28
MAX_DOCSTRING = 30
MAX_COLUMNS = 120
MAX_CHANGED = 130
NEIGHBOURS = [("reinforce", "a2c"), ("a2c", "ppo")]  # whose diff is the idea
MORE_FLAGS = {"grpo": 31}  # those of Dr. GRPO and RLOO on top
VAGUE_NAMES = {"scorer", "words", "asked", "found", "part", "parts", "whole", "count", "fault", "lost", "trunk"}

MAY_DIFFER = {  # same name, different code: in which scripts, and why
    "Args": (set(LINES), "each algorithm has its own flags"),
    "main": (set(LINES), "the algorithm's story"),
    "value_loss": ({"rlhf_ppo"}, "with text, the change of a value is clipped"),
    "Agent": ({"reinforce"}, "it has no critic"),
}

SOURCES = {name: (ALGOS / f"{name}.py").read_text() for name in sorted(LINES)}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
scripts = pytest.mark.parametrize("script", SOURCES)


@functools.cache
def definitions(script):
    """Source of each function and class at the top of a script, by name."""
    found = [node for node in TREES[script].body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return {node.name: ast.get_source_segment(SOURCES[script], node) for node in found}


def fields(script):
    """(name, meaning) of each flag: its trailing comment."""
    (args,) = [node for node in TREES[script].body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    lines = SOURCES[script].splitlines()
    for node in args.body:
        if isinstance(node, ast.AnnAssign):
            yield node.target.id, lines[node.end_lineno - 1][node.end_col_offset :].strip("# ")


def header(script):
    """The PEP 723 block of a script, parsed."""
    (block,) = re.findall(r"(?m)^# /// script$\n((?:^#.*$\n)+?)^# ///$", SOURCES[script])
    lines = [line.removeprefix("#").removeprefix(" ") for line in block.splitlines()]
    return tomllib.loads("\n".join(lines))


# --- length ---


def test_every_file_in_algos_has_its_budgets():
    files = {path.stem for path in ALGOS.glob("*.py")}
    advice = "give each file of algos/ a row in LINES and in NODES of this file, or move it elsewhere"
    assert files == LINES.keys() == NODES.keys(), advice


@scripts
def test_a_script_keeps_its_budget_of_lines(script):
    assert len(SOURCES[script].splitlines()) <= LINES[script]


@scripts
def test_no_line_is_longer_than_120_columns_or_does_two_things(script):
    lines = SOURCES[script].splitlines()
    assert [i for i, line in enumerate(lines, 1) if len(line) > MAX_COLUMNS] == []
    starts = [node.lineno for node in ast.walk(TREES[script]) if isinstance(node, ast.stmt)]
    assert sorted({line for line in starts if starts.count(line) > 1}) == []


@scripts
def test_the_docstring_has_at_most_30_lines(script):
    assert len(ast.get_docstring(TREES[script]).splitlines()) <= MAX_DOCSTRING


@pytest.mark.parametrize("a,b", NEIGHBOURS)
def test_neighbours_differ_in_their_idea_only(a, b):
    done = subprocess.run(["diff", ALGOS / f"{a}.py", ALGOS / f"{b}.py"], capture_output=True, text=True)
    changed = [line for line in done.stdout.splitlines() if line[:1] in ("<", ">")]
    assert done.returncode == 1
    assert 0 < len(changed) <= MAX_CHANGED


@scripts
def test_names_say_what_they_hold(script):
    names = {node.id for node in ast.walk(TREES[script]) if isinstance(node, ast.Name)}
    arguments = {node.arg for node in ast.walk(TREES[script]) if isinstance(node, ast.arg)}
    assert not VAGUE_NAMES & (names | arguments)


def size(node):
    """Syntax nodes of an expression: names, attributes, constants, calls, operators; a formatted string is one."""
    if isinstance(node, (ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop)):
        return 0
    if isinstance(node, ast.JoinedStr):
        return 1
    return 1 + sum(map(size, ast.iter_child_nodes(node)))


def statement_sizes(script):
    """Line and nodes of each statement, without the statements inside it; what only declares does not count."""
    declares = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Pass, ast.AnnAssign)
    inside = (ast.stmt, ast.ExceptHandler, ast.match_case)
    sizes = []
    for node in ast.walk(TREES[script]):
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.stmt) and not isinstance(node, declares) and not is_docstring:
            parts = [child for child in ast.iter_child_nodes(node) if not isinstance(child, inside)]
            sizes.append((node.lineno, sum(map(size, parts))))
    return sizes


@pytest.mark.parametrize("script", NODES)
def test_a_statement_says_one_thing(script):
    sizes = statement_sizes(script)
    ordered = sorted(nodes for _, nodes in sizes)
    assert [line for line, nodes in sizes if nodes > MAX_NODES] == []
    assert sum(ordered) / len(ordered) <= MEAN_NODES
    assert ordered[int(0.9 * len(ordered))] <= P90_NODES
    assert sum(ordered) <= NODES[script]


@pytest.mark.parametrize("script", NODES)
def test_few_statements_are_dense_and_few_lines_wide(script):
    kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda, ast.NamedExpr, ast.IfExp)
    dense = [node for node in ast.walk(TREES[script]) if isinstance(node, kinds)]
    assert 100 * len(dense) <= MAX_DENSE * len(statement_sizes(script))
    lines = SOURCES[script].splitlines()
    wide = [line for line in lines if len(line) > 100]
    assert len(wide) <= MAX_WIDE * len(lines)


# --- drift ---


@pytest.mark.parametrize("a,b", list(combinations(SOURCES, 2)))
def test_definitions_that_share_a_name_are_byte_identical(a, b):
    ours = definitions(a)
    theirs = definitions(b)
    allowed = {name for name, (where, _) in MAY_DIFFER.items() if {a, b} & where}
    if (a in LANGUAGE) != (b in LANGUAGE):  # a checkpoint is a file in control, a folder of several processes in text
        allowed |= {"parse_args", "start_run", "save_checkpoint"}
    for name in sorted(ours.keys() & theirs.keys() - allowed):
        changes = difflib.unified_diff(ours[name].splitlines(), theirs[name].splitlines(), a, b, lineterm="")
        assert ours[name] == theirs[name], "\n".join(changes)


@scripts
def test_a_script_imports_nothing_from_this_repository(script):
    own = {"algos", "tests", "benchmark"}
    for folder in sorted(own):
        own.update(path.stem for path in (REPO / folder).rglob("*.py"))
    for node in ast.walk(TREES[script]):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & own
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module.split(".")[0] not in own


@scripts
def test_header_requirements_and_imports_agree(script):
    pinned = {}
    requirements = (REPO / "requirements.txt").read_text()
    for name, extras, version in re.findall(r"(?m)^([\w-]+)(\[.*\])?==([\w.]+)$", requirements):
        pinned[name] = (extras, version)
    bounded = set()
    for requirement in header(script)["dependencies"]:
        name, extras, bound = re.fullmatch(r"([\w-]+)(\[.*\])?~=([\w.]+)", requirement).groups(default="")
        assert name in pinned, f"{name} is not in requirements.txt"
        pinned_extras, version = pinned[name]
        kinds = set(re.findall(r"[\w-]+", extras))
        assert kinds <= set(re.findall(r"[\w-]+", pinned_extras)), (
            f"{name}{extras} in the header, {pinned_extras} pinned"
        )
        lowest = [int(number) for number in bound.split(".")]
        tried = [int(number) for number in version.split(".")]
        assert lowest <= tried
        assert lowest[:2] == tried[:2]  # ~= leaves out the next minor version, which nobody tried
        bounded.add(name)
    imported = set()
    for node in TREES[script].body:
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    packages = {name.split(".")[0] for name in imported}
    assert packages - set(sys.stdlib_module_names) <= bounded


# --- flags and functions ---


@scripts
def test_every_flag_is_read_and_has_its_meaning(script):
    read = {"resume"}  # parse_args reads it before there are args
    for node in ast.walk(TREES[script]):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner, _, name = ast.unparse(node).rpartition(".")
            if owner in ("args", "self"):
                read.add(name)
    flags = dict(fields(script))
    assert len(flags) <= MORE_FLAGS.get(script, MAX_FLAGS)
    assert [name for name in flags if name not in read] == []
    assert [name for name, meaning in flags.items() if not meaning] == []


@scripts
def test_the_flags_that_all_scripts_share_are_there(script):
    assert {"seed", "run_dir", "resume", "save_every", "track"} <= dict(fields(script)).keys()


@scripts
def test_every_definition_is_used_and_documented(script):
    for node in TREES[script].body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in ("Args", "main"):
            assert ast.get_docstring(node), node.name
            assert len(re.findall(rf"\b{node.name}\b", SOURCES[script])) > 1, f"{node.name} is never used"


@scripts
def test_functions_of_the_algorithm_know_neither_args_nor_globals(script):
    source = SOURCES[script]
    if "# --- algorithm ---" not in source and script == "q_learning":
        pytest.skip("its main is the algorithm")
    start = source.index("# --- algorithm ---")
    end = re.compile("^(# ---|def main)", re.MULTILINE).search(source, start + 1).start()
    first = source[:start].count("\n") + 1
    last = source[:end].count("\n") + 1
    functions = [node for node in TREES[script].body if isinstance(node, ast.FunctionDef)]
    functions = [function for function in functions if first < function.lineno < last]
    assert functions
    forbidden = {"args"}
    for node in TREES[script].body:
        if isinstance(node, ast.Assign):
            names = [name for name in ast.walk(node) if isinstance(name, ast.Name)]
            forbidden.update(name.id for name in names if isinstance(name.ctx, ast.Store))
    for function in functions:
        used = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
        assert not used & forbidden, function.name


# --- the order of a script ---


ALL = set(LINES)
DEEP = ALL - {"q_learning"}
COLLECTS = DEEP - {"sft", "reward_model", "dpo"}
MARKS = [  # in this order, each in these scripts
    (r"# /// script$", ALL),
    (r'"""', ALL),
    (r"import ", ALL),
    (r"@dataclass\nclass Args:", ALL),
    (r"    def __post_init__\(self\)", ALL),
    (r"class \w+\(nn.Module\):", DEEP - LANGUAGE),
    (r"# --- algorithm ---$", DEEP),
    (r"# --- model ---$", LANGUAGE),
    (r"# --- (environments|data) ---$", DEEP),
    (r"# --- run ---$", LANGUAGE),
    (r"def main\(args: Args", ALL),
    (r" +# ===== evaluate =====$", LANGUAGE),
    (r" +# ===== collect =====$", DEEP),
    (r" +# ===== compute targets =====$", COLLECTS),
    (r" +# ===== update =====$", DEEP),
    (r" +# ===== log.* =====$", DEEP),
    (r'if __name__ == "__main__":\n    main\(', ALL),
]


@scripts
def test_sections_come_in_the_same_order(script):
    found = []
    for mark, where in MARKS:
        if script in where:
            match = re.search(f"(?m)^{mark}", SOURCES[script])
            assert match, mark
            found.append(match.start())
    assert found == sorted(found)
    assert found[0] == 0
    docstring = ast.get_docstring(TREES[script])
    assert re.search("Differs from the papers?:", docstring)
    assert f"python algos/{script}.py" in docstring
    assert script in ("reinforce", "q_learning") or "arXiv" in docstring  # older than arXiv


@scripts
def test_nothing_is_left_to_do(script):
    assert re.findall(r"TODO|FIXME|XXX", SOURCES[script]) == []


def test_importing_the_scripts_does_nothing(tmp_path):
    heavy = "{'ale_py', 'moviepy', 'mujoco', 'pygame', 'tensorflow', 'wandb'}"
    code = f"import sys; sys.path.insert(0, {str(ALGOS)!r}); import {', '.join(SOURCES)}"
    code += f"; assert not {heavy} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_the_readme_names_every_script():
    readme = (REPO / "README.md").read_text()
    assert [name for name in SOURCES if f"algos/{name}.py" not in readme] == []
