"""Plants each fault of the table in a copy of the repository and runs the tests named for it.

    python benchmark/run.py faults                        # all, one after the other
    python benchmark/run.py faults 'dqn-*' --specs        # some, and run the specs named for them on the faulty script

What came of it is kept in results/faults.json.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from core import specs, verdict
from core.report import table
from world import ASSETS

REPO = specs.BENCHMARK.parent

# what planting has shown of the tests
GAPS = """For `rlhf-ratio-to-the-reference`, `learning-rate-not-set` and `language-gradient-not-clipped` the test was
written only after the mistake had been planted and nothing had noticed it."""


@dataclass(frozen=True)
class Fault:
    """A mistake and what should notice it; table.toml says what each field is."""

    name: str
    scripts: list[str]
    old: str
    new: str
    tests: list[str]
    spec: str = ""


def load_faults() -> list[Fault]:
    """The faults of table.toml, in its order."""
    rows = tomllib.loads(Path(__file__).with_name("table.toml").read_text())["fault"]
    return [Fault(**row) for row in rows]


FAULTS = load_faults()


def faulty(fault: Fault, script: str, repo: Path = REPO) -> str:
    """Source of a script with the fault in it."""
    source = (repo / "algos" / f"{script}.py").read_text()
    if source.count(fault.old) != 1:
        raise ValueError(f"{fault.name}: {script}.py has its text {source.count(fault.old)} times, not once")
    return source.replace(fault.old, fault.new)


@contextmanager
def planted(fault: Fault) -> Iterator[Path]:
    """A copy of the repository with the fault in it; assets and references are the original ones."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repo"
        left_out = shutil.ignore_patterns("runs", ".git", ".venv", "venv", "wandb", "assets", "reference", "*_cache*")
        shutil.copytree(REPO, copy, ignore=left_out)
        for shared in (ASSETS, specs.REFERENCE):
            (copy / shared.relative_to(REPO)).symlink_to(shared)
        for script in fault.scripts:
            (copy / "algos" / f"{script}.py").write_text(faulty(fault, script))
        yield copy


def effect(output: str) -> str:
    """What pytest says of the first failure, in one line: how far off it is, if it says so."""
    lines = [line.removeprefix("E").strip() for line in output.splitlines() if line.startswith("E  ")]
    lines = [line.removeprefix("AssertionError:").strip() for line in lines]
    numbers = ("Greatest absolute difference", "Absolute difference", "Max absolute difference", "Mismatched elements")
    far = [line for number in numbers for line in lines if line.startswith(number)]
    said = [line for line in lines if line and not line.startswith(("+", "-", "?"))]
    return re.sub(r"\s+", " ", (far or said or ["no message"])[0])[:150]


def run_tests(fault: Fault, repo: Path) -> dict[str, Any]:
    """Run the tests named for the fault in the copy: red, green, or what went wrong, and which test it was."""
    tests = [f"tests/{test}" for test in fault.tests]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider", *tests]
    start = time.time()
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True)
    failing = re.findall(r"(?m)^FAILED tests/(\S+?::\S+)", done.stdout)
    answer = {0: "green", 1: "red"}.get(done.returncode, f"pytest ended with status {done.returncode}")
    if answer == "red":
        said = effect(done.stdout)
    else:
        lines = done.stdout.strip().splitlines() or ["nothing"]
        said = lines[-1][:150]
    seconds = round(time.time() - start, 1)
    return {"answer": answer, "test": failing[0] if failing else "", "seconds": seconds, "effect": said}


def lowest(row: dict[str, Any]) -> float:
    """Upper end of the interval that lies lowest: of the area, or of the final level."""
    return min(row[name][2] for name in ("area", "final") if name in row)


def run_spec(fault: Fault, repo: Path) -> dict[str, Any]:
    """Run the quick seeds of the spec named for the fault in the copy: its answer and how far off the curve is."""
    answers = repo / "answers.json"
    command = [sys.executable, repo / "benchmark" / "run.py", "run", fault.spec, "--tier", "quick", "--jobs", "1",
               "--json", answers]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    rows = json.loads(answers.read_text()) if answers.exists() else []
    rows = [row for row in rows if row["reference"] == "ours"]
    if not rows:
        failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        return {"answer": "the run failed" if failed else "no reference", "effect": failed[0][:150] if failed else ""}
    worst = min(rows, key=lowest)
    shown = ", ".join(f"{name} {worst[name][0]:+.0%}" for name in ("area", "final") if name in worst)
    return {"answer": verdict.worst([row["answer"] for row in rows]), "effect": f"{worst['measure']}: {shown}"}


def plant_all(names: list[str], with_specs: bool, jobs: int) -> int:
    """Plant faults and keep what comes of it; exit status 1 when one stays unnoticed."""
    chosen = [fault for fault in FAULTS if not names or specs.is_named(fault.name, names)]
    if not chosen:
        raise SystemExit(f"error: no fault is called {' or '.join(names)}")

    def work(fault: Fault) -> tuple[Fault, dict[str, Any]]:
        with planted(fault) as repo:
            found = {"date": str(date.today())} | run_tests(fault, repo)
            if with_specs and fault.spec:
                found["spec"] = run_spec(fault, repo)
        return fault, found

    unnoticed = []
    with ThreadPoolExecutor(jobs) as pool:
        for number, (fault, found) in enumerate(pool.map(work, chosen), 1):
            results = specs.results("faults")
            results = {x.name: results[x.name] for x in FAULTS if x.name in results}  # faults that are gone drop out
            kept = results.get(fault.name, {}).get("spec")
            results[fault.name] = ({"spec": kept} if kept else {}) | found
            specs.keep("faults", dict(sorted(results.items())))
            line = f"{found['answer']}: {found['test'] or fault.tests[0]} ({found['effect']}), {found['seconds']:.0f} s"
            if "spec" in found:
                line += f"; {fault.spec}: {found['spec']['answer']} ({found['spec']['effect']})"
            print(f"[{number}/{len(chosen)}] {fault.name}: {line}", flush=True)
            if found["answer"] != "red":
                unnoticed.append(fault.name)
    if unnoticed:
        print(f"NOT NOTICED: {', '.join(unnoticed)}")
    return int(bool(unnoticed))


def section() -> str:
    """Which test or spec noticed each planted fault, and by how much, for the report."""
    found = specs.results("faults")
    rows = []
    red = 0
    curves_red = []
    for fault in FAULTS:
        result = found.get(fault.name)
        if result is None:
            rows.append([fault.name, ", ".join(fault.scripts), "not measured yet", "", ""])
            continue
        noticed = result["answer"] == "red"
        red += noticed
        test = result["test"] if noticed else f"**nothing** ({result['answer']})"
        spec = result.get("spec")
        curve = f"{fault.spec}: {spec['answer']} ({spec['effect']})" if spec else ""
        curves_red += [spec["answer"] == "regression" or spec["answer"] == "the run failed"] if spec else []
        rows.append([fault.name, ", ".join(fault.scripts), f"`{test}`" if noticed else test,
                     f"`{result['effect']}`" if noticed else "", curve])  # fmt: skip
    measured = sum(fault.name in found for fault in FAULTS)
    total = f"`run.py faults` planted {measured} of {len(FAULTS)} mistakes in copies, one at a time. Tests found {red} of them"
    if measured < len(FAULTS):
        total += f"; the other {len(FAULTS) - measured} are not measured yet"
    if curves_red:
        total += f"; of the {len(curves_red)} that were also run as a spec, its curves alone noticed {sum(curves_red)}"
    header = ["fault", "scripts", "first test to turn red", "by how much", "learning curve"]
    if not curves_red:  # the last column is empty
        header = header[:-1]
        rows = [row[:-1] for row in rows]
    return f"{total}. {GAPS}\n\n" + table(header, rows)
