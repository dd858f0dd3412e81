"""Runs of specs: started, resumed, and noted when they are finished.

A finished run is not repeated, one that was cut off goes on from its checkpoint. Runs are kept under
runs/benchmark/<spec>/<key>/<seed>; the key is of the script's code, its flags, the assets and the packages, so that
answers are never of other code than the present one. Comments and docstrings don't count.
"""

import ast
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from core import curves, specs
from core.specs import BENCHMARK, Spec
from world import ASSETS

LANGUAGE = ("torch", "numpy", "transformers", "tokenizers", "accelerate")
PACKAGES = {False: ("torch", "numpy", "gymnasium"), True: LANGUAGE}
ENTRY = BENCHMARK / "run.py"
POLL = 0.2  # seconds


# --- where runs are kept ---


def is_text(node: ast.stmt) -> bool:
    """Whether a statement is a docstring."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def code_of(path: Path) -> str:
    """The code of a Python file without comments and docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            node.body = [statement for statement in node.body if not is_text(statement)]
    return ast.dump(tree)


def versions(spec: Spec) -> dict[str, str]:
    """Versions of what can change a curve."""
    return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES[spec.language]}


def assets_key() -> str:
    """Fingerprint of the small language world."""
    found = hashlib.sha256(code_of(BENCHMARK / "world" / "grammar.py").encode())
    for path in sorted(ASSETS.rglob("*")):
        if path.is_file():
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:8]


def key(spec: Spec) -> str:
    """Fingerprint of all that a run depends on, bar its seed."""
    scripts = [specs.ALGOS / f"{spec.script}.py"]
    if spec.is_real:
        scripts += sorted((BENCHMARK / "real").glob("*.py"))
    elif spec.evaluation:
        scripts.append(BENCHMARK / "world" / "evaluate_policy.py")
    flags = [flag.replace(f"{BENCHMARK.parent}/", "") for flag in spec.flags]  # wherever the repository lies
    parts = [*map(code_of, scripts), *flags, *spec.evaluation, str(versions(spec))]
    if spec.language:
        parts.append(assets_key())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def folder(spec: Spec, runs: Path) -> Path:
    """Where the runs of the present code are."""
    return runs / spec.name / key(spec)


def finished(spec: Spec, runs: Path) -> dict[int, dict[str, Any]]:
    """What is noted of each finished run, by seed."""
    notes = {}
    for path in folder(spec, runs).glob("*.json"):
        notes[int(path.stem)] = json.loads(path.read_text())
    return dict(sorted(notes.items()))


# --- run ---


def peak_memory(process: subprocess.Popen) -> float:
    """GB that a process has held at most so far; 0 where the system does not say it, or when the process has ended."""
    status = Path(f"/proc/{process.pid}/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 1e6 if found else 0.0


@dataclass
class Run:
    """One seed of a spec, and the process that is at it."""

    spec: Spec
    seed: int
    runs: Path
    dir: Path = field(init=False)
    """run directory of the script"""
    process: subprocess.Popen | None = None
    start: float = 0.0
    gigabytes: float = 0.0
    """of memory, at most"""
    continued: bool = False
    evaluated: bool = False

    def __post_init__(self) -> None:
        self.dir = folder(self.spec, self.runs) / str(self.seed)

    def __str__(self) -> str:
        return f"{self.spec.name} seed {self.seed}"

    @property
    def log(self) -> Path:
        """What the processes print."""
        return self.dir.with_suffix(".log")

    def begin(self) -> None:
        """Start the script anew, or from the checkpoint of a run that was cut off."""
        self.dir.parent.mkdir(parents=True, exist_ok=True)
        script = specs.ALGOS / f"{self.spec.script}.py"
        saved = ("checkpoint.pt", "checkpoint/state.json")
        self.continued = any((self.dir / name).exists() for name in saved)  # control, language
        self.evaluated, self.start = not self.spec.evaluation, time.time()
        if self.continued:
            return self.launch(script, "--resume", str(self.dir))
        shutil.rmtree(self.dir, ignore_errors=True)
        self.log.unlink(missing_ok=True)
        flags = [*self.spec.flags, "--seed", str(self.seed), "--run-dir", str(self.dir)]
        self.launch(script, *flags)

    def evaluate(self) -> None:
        """Start the second command of the spec."""
        settings = json.loads((self.dir / "args.json").read_text())
        names = settings | {"run": self.dir, "cache": self.runs / f"golds-{assets_key()}.json"}
        self.evaluated = True
        self.launch(ENTRY, *(flag.format(**names) for flag in self.spec.evaluation))

    def launch(self, script: Path, *flags: str) -> None:
        """Start a process on one thread; it adds to the log."""
        command = [sys.executable, str(script), *flags]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, env=one_thread, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def poll(self) -> str | None:
        """None while at it, '' when all is done and noted, else what went wrong."""
        self.gigabytes = max(self.gigabytes, peak_memory(self.process))
        status = self.process.poll()
        if status is None:
            return None
        if status:
            how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            lines = self.log.read_text(errors="replace").replace("\r", "\n").strip().splitlines() or ["no output"]
            said = [line for line in lines if line.startswith("error: ")] or lines
            return f"{how} ({said[-1].strip()[:160]}; see {self.log})"
        if not self.evaluated:
            self.evaluate()
            return None
        if folder(self.spec, self.runs) != self.dir.parent:
            return "its script, flags or assets changed while it ran"
        try:
            figures = read_run(self.spec, self.dir)
        except LookupError as fault:
            return f"{fault}; see {self.log}"
        seconds = None if self.continued else round(time.time() - self.start, 1)
        note = {
            "seconds": seconds,
            "gigabytes": None if self.continued else round(self.gigabytes, 2),
            "date": str(date.today()),
            "versions": versions(self.spec),
            "steps": figures.pop("steps"),
            "measures": figures,
        }
        if self.spec.is_real:
            note["answers"] = json.loads((self.dir / "evaluation.json").read_text())[0]
        new = self.dir.with_suffix(".new")
        new.write_text(json.dumps(note) + "\n")
        os.replace(new, self.dir.with_suffix(".json"))
        return ""


def read_run(spec: Spec, run_dir: Path) -> dict[str, Any]:
    """Length of a finished run and its figures, by tag of the spec's measures. LookupError when it logged none."""
    settings = json.loads((run_dir / "args.json").read_text())
    found: dict[str, Any] = {"steps": settings.get("total_timesteps", 0)}
    evaluation = json.loads((run_dir / "evaluation.json").read_text())[0] if spec.evaluation else {}
    for measure in spec.measures:
        if measure.tag.startswith("evaluation/"):
            value = evaluation[measure.tag.removeprefix("evaluation/")]
            if value is not None:  # null where it cannot be told
                found[measure.tag] = {"final": round(value, 5)}
            continue
        steps, values, numbers = curves.load_run(run_dir, measure.tag)
        found["steps"] = found["steps"] or int(steps[-1])
        found[measure.tag] = curves.figures_of(steps, values, numbers, found["steps"], measure.last)
    return found


def run_all(todo: list[Run], jobs: int) -> dict[str, str]:
    """Run all, `jobs` at a time; returns what went wrong, by run."""
    waiting = sorted(todo, key=lambda run: run.spec.minutes)  # the longest are started first
    active: list[Run] = []
    failed: dict[str, str] = {}
    pace, done = [], 0  # seconds taken per second expected

    def left() -> str:
        rate = float(np.median(pace)) if pace else 1.0
        seconds = sum(60 * run.spec.minutes * rate for run in waiting)
        for run in active:
            expected = 60 * run.spec.minutes * rate
            spent = time.time() - run.start
            seconds += max(0.0, expected - spent)
        return f"about {seconds / min(jobs, max(1, len(todo))) / 60:.1f} min left"

    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                active.append(waiting.pop())
                active[-1].begin()
                print(f"started {active[-1]}{' from its checkpoint' * active[-1].continued}; {left()}", flush=True)
            time.sleep(POLL)
            for run in list(active):
                fault = run.poll()
                if fault is None:
                    continue
                active.remove(run)
                done = done + 1
                seconds = time.time() - run.start
                if fault:
                    failed[str(run)] = fault
                elif not run.continued:
                    pace.append(seconds / (60 * run.spec.minutes))
                how = f"FAILED {run}: {fault}" if fault else f"finished {run} in {seconds:.0f} s"
                print(f"[{done}/{len(todo)}] {how}; {left()}", flush=True)
    finally:
        for run in active:  # only after an interrupt: they go on from their checkpoints the next time
            run.process.kill()
            run.process.wait()
    return failed
