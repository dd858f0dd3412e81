"""What keeps the scripts short single files that agree with each other, with their flags and with requirements.txt."""

import ast
import difflib
import re
import subprocess
import sys
import tomllib
from itertools import combinations

import pytest
from helpers import ALGOS, REPO

LINES = {  # at most, header and docstring included
    "q_learning": 380,
    "reinforce": 520,
    "a2c": 555,
    "dqn": 580,
    "ppo": 590,
    "sft": 670,
    "reward_model": 700,
    "dpo": 780,
    "grpo": 900,
    "rlhf_ppo": 935,
}
NODES = {  # of syntax in all, at most; and below, per statement, which says one thing
    "q_learning": 1470,
    "reinforce": 2220,
    "a2c": 2420,
    "dqn": 2320,
    "ppo": 2550,
    "sft": 2700,
    "reward_model": 2775,
    "dpo": 3135,
    "grpo": 3750,
    "rlhf_ppo": 3915,
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

MAY_DIFFER = {  # same name, different code: in which scripts, and why
    "Args": (set(LINES), "each algorithm has its own flags"),
    "main": (set(LINES), "the algorithm's story"),
    "value_loss": ({"rlhf_ppo"}, "with text, the change of a value is clipped"),
    "Agent": ({"reinforce"}, "it has no critic"),
}

SOURCES = {path.stem: path.read_text() for path in sorted(ALGOS.glob("*.py"))}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
scripts = pytest.mark.parametrize("script", SOURCES)


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
    return tomllib.loads(
        "".join(line[2:] if line.startswith("# ") else line[1:] for line in block.splitlines(keepends=True))
    )


# --- length ---


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
        change = "\n".join(difflib.unified_diff(ours[name].splitlines(), theirs[name].splitlines(), a, b, lineterm=""))
        assert ours[name] == theirs[name], change


@scripts
def test_a_script_imports_nothing_from_this_repository(script):
    folders = ("algos", "tests", "benchmark")
    own = {path.stem for folder in folders for path in (REPO / folder).rglob("*.py")} | set(folders)
    for node in ast.walk(TREES[script]):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & own
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module.split(".")[0] not in own


@scripts
def test_header_requirements_and_imports_agree(script):
    pinned = {
        name: (extras, version)
        for name, extras, version in re.findall(
            r"(?m)^([\w-]+)(\[.*\])?==([\w.]+)$", (REPO / "requirements.txt").read_text()
        )
    }
    bounds = {}
    for requirement in header(script)["dependencies"]:
        name, extras, bound = re.fullmatch(r"([\w-]+)(\[.*\])?~=([\w.]+)", requirement).groups(default="")
        assert name in pinned, f"{name} is not in requirements.txt"
        kinds, pinned_kinds = (set(re.findall(r"[\w-]+", text)) for text in (extras, pinned[name][0]))
        assert kinds <= pinned_kinds, f"{name}{extras} in the header, {pinned[name][0]} in requirements.txt"
        number = lambda version: tuple(map(int, version.split(".")))
        assert number(bound) <= number(pinned[name][1])  # and ~= leaves out the next minor version, which nobody tried
        assert number(bound)[:2] == number(pinned[name][1])[:2]
        bounds[name] = bound
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in TREES[script].body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert imported - set(sys.stdlib_module_names) <= set(bounds)


# --- flags and functions ---


@scripts
def test_every_flag_is_read_and_has_its_meaning(script):
    read = {
        node.attr
        for node in ast.walk(TREES[script])
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("args", "self")
    }
    read |= {"resume"}  # parse_args reads it before there are args
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
    first, last = (source[:position].count("\n") + 1 for position in (start, end))
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


# --- the order of a script ---


@scripts
def test_sections_come_in_the_same_order(script):
    source, found = SOURCES[script], []
    language = script in LANGUAGE
    loop = script != "q_learning"
    for mark in (
        r"# /// script$",
        r'"""',
        r"import ",
        r"@dataclass\nclass Args:",
        r"    def __post_init__\(self\)",
        r"class \w+\(nn.Module\):" if loop and not language else "",
        r"# --- algorithm ---$" if loop else "",
        r"# --- model ---$" if language else "",
        r"# --- (environments|data) ---$" if loop else "",
        r"# --- run ---$" if language else "",
        r"def main\(args: Args",
        r" +# ===== evaluate =====$" if language else "",
        r" +# ===== collect =====$" if loop else "",
        r" +# ===== compute targets =====$" if script in ("reinforce", "a2c", "ppo", "dqn", "rlhf_ppo", "grpo") else "",
        r" +# ===== update =====$" if loop else "",
        r" +# ===== log.* =====$" if loop else "",
        r'if __name__ == "__main__":\n    main\(',
    ):
        if mark:
            match = re.search(f"(?m)^{mark}", source)
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
    assert re.findall(r"TODO|FIXME|XXX|RECIPE", SOURCES[script]) == []


@scripts
def test_importing_a_script_does_nothing(script, tmp_path):
    heavy = "{'ale_py', 'moviepy', 'mujoco', 'pygame', 'tensorflow', 'wandb'}"
    code = f"import sys; sys.path.insert(0, {str(ALGOS)!r}); import {script}; assert not {heavy} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (0, "", []), done.stderr


def test_the_readme_names_every_script():
    readme = (REPO / "README.md").read_text()
    assert [name for name in SOURCES if f"algos/{name}.py" not in readme] == []
