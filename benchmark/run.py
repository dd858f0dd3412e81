"""The regression benchmark: runs the scripts of algos/ and holds their learning curves against references.

    python benchmark/run.py list                       # what there is to run
    python benchmark/run.py run                        # the quick tier: all nine scripts, then the answers
    python benchmark/run.py run --tier full            # five seeds of everything, on two cores under two hours
    python benchmark/run.py run 'ppo-*' --seeds 10     # some specs, with more seeds
    python benchmark/run.py check --tier full          # the answers alone, from the runs that there are
    python benchmark/run.py record ppo-CartPole-v1     # make the runs the new reference
    python benchmark/run.py report                     # benchmark/README.md and its pictures
    python benchmark/run.py speed ppo --peer-python /tmp/sb3/bin/python
    python benchmark/run.py growth                     # time and memory as environments, batch, length, vocabulary double
    python benchmark/run.py faults                     # plant faults in copies of the repository: do tests turn red?

Answers: pass, regression, or inconclusive, which asks for more seeds (verdict.py says how). Exit status 1 when a spec
regressed or a run failed, 2 on bad input. What is run and compared is in specs.py.

A finished run is not repeated, one that was cut off goes on from its checkpoint. Runs are kept under
runs/benchmark/<spec>/<key>/<seed>; the key is of the script's code, its flags, the assets and the packages, so that
answers are never of other code than the present one. Comments and docstrings don't count.
"""

import argparse
import ast
import fcntl
import fnmatch
import hashlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import curves
import numpy as np
import specs
import verdict
from specs import HERE, TIERS, Measure, Spec

LANGUAGE = ("torch", "numpy", "transformers", "tokenizers", "accelerate")
PACKAGES = {False: ("torch", "numpy", "gymnasium"), True: LANGUAGE}
POLL = 0.2  # seconds
Figures = dict[str, dict[str, Any]]  # of a run, by tag: curve (BINS numbers, or none), final


def error(message: str) -> NoReturn:
    """Say in one line what is wrong and exit with status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# --- where runs are kept ---


def code_of(path: Path) -> str:
    """The code of a Python file without comments and docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            node.body = [x for x in node.body if not (isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant))]
    return ast.dump(tree)


def versions(spec: Spec) -> dict[str, str]:
    """Versions of what can change a curve."""
    found = {"python": platform.python_version()}
    for package in PACKAGES[spec.language]:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            error(f"the package {package} is not installed: pip install -r requirements.txt")
    return found


def assets_key() -> str:
    """Fingerprint of the small language world."""
    found = hashlib.sha256(code_of(HERE / "world.py").encode())
    for path in sorted(specs.ASSETS.rglob("*")):
        if path.is_file():
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:8]


def key(spec: Spec) -> str:
    """Fingerprint of all that a run depends on, bar its seed."""
    scripts = [specs.ALGOS / f"{spec.script}.py", *(HERE / name for name in spec.evaluation[:1])]
    parts = [*map(code_of, scripts), *spec.flags, *spec.evaluation, str(versions(spec))]
    if spec.language:
        parts.append(assets_key())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def folder(spec: Spec, runs: Path) -> Path:
    """Where the runs of the present code are."""
    return runs / spec.name / key(spec)


def finished(spec: Spec, runs: Path) -> dict[int, dict[str, Any]]:
    """What is noted of each finished run, by seed."""
    notes = {int(path.stem): json.loads(path.read_text()) for path in folder(spec, runs).glob("*.json")}
    return dict(sorted(notes.items()))


# --- run ---


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
        script, saved = specs.ALGOS / f"{self.spec.script}.py", ("checkpoint.pt", "checkpoint/state.json")
        self.continued = any((self.dir / name).exists() for name in saved)  # control, language
        self.evaluated, self.start = not self.spec.evaluation, time.time()
        if self.continued:
            return self.launch(script, "--resume", str(self.dir))
        shutil.rmtree(self.dir, ignore_errors=True)
        self.log.unlink(missing_ok=True)
        flags = [*self.spec.flags_in(HERE), "--seed", str(self.seed), "--run-dir", str(self.dir)]
        self.launch(script, *flags)

    def evaluate(self) -> None:
        """Start the second command of the spec."""
        settings = json.loads((self.dir / "args.json").read_text())
        names = settings | {"run": self.dir, "cache": self.runs / f"golds-{assets_key()}.json"}
        script, *flags = self.spec.evaluation
        self.evaluated = True
        self.launch(HERE / script, *(flag.format(**names) for flag in flags))

    def launch(self, script: Path, *flags: str) -> None:
        """Start a process on one thread; it adds to the log."""
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(script), *flags], stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def poll(self) -> str | None:
        """None while at it, '' when all is done and noted, else what went wrong."""
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
        note = {
            "seconds": None if self.continued else round(time.time() - self.start, 1),
            "date": str(date.today()),
            "versions": versions(self.spec),
            "steps": figures.pop("steps"),
            "measures": figures,
        }
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
        found[measure.tag] = figures_of(steps, values, numbers, found["steps"], measure.last)
    return found


def figures_of(steps: np.ndarray, values: np.ndarray, numbers: np.ndarray, total: int, last: int) -> dict[str, Any]:
    """Curve and final level of what a run logged."""
    bins = curves.curve(steps, values, numbers, total)
    return {"curve": [float(f"{x:.5g}") for x in bins], "final": round(curves.final_level(values, numbers, last), 5)}


def run_all(todo: list[Run], jobs: int, say: Callable[[str], None] = print) -> dict[str, str]:
    """Run all, `jobs` at a time; returns what went wrong, by run."""
    waiting = sorted(todo, key=lambda run: run.spec.minutes)  # the longest are started first
    active: list[Run] = []
    failed: dict[str, str] = {}
    pace, done = [], 0  # seconds taken per second expected

    def left() -> str:
        rate = float(np.median(pace)) if pace else 1.0
        seconds = sum(60 * run.spec.minutes * rate for run in waiting)
        seconds += sum(max(0.0, 60 * run.spec.minutes * rate - (time.time() - run.start)) for run in active)
        return f"about {seconds / min(jobs, max(1, len(todo))) / 60:.1f} min left"

    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                active.append(waiting.pop())
                active[-1].begin()
                say(f"started {active[-1]}{' from its checkpoint' * active[-1].continued}; {left()}")
            time.sleep(POLL)
            for run in list(active):
                fault = run.poll()
                if fault is None:
                    continue
                active.remove(run)
                done, seconds = done + 1, time.time() - run.start
                if fault:
                    failed[str(run)] = fault
                elif not run.continued:
                    pace.append(seconds / (60 * run.spec.minutes))
                how = f"FAILED {run}: {fault}" if fault else f"finished {run} in {seconds:.0f} s"
                say(f"[{done}/{len(todo)}] {how}; {left()}")
    finally:
        for run in active:  # only after an interrupt: they go on from their checkpoints the next time
            run.process.kill()
            run.process.wait()
    return failed


# --- check ---


@dataclass(frozen=True)
class Reference:
    """Figures of several seeds to be compared with."""

    name: str
    steps: int
    seeds: dict[str, Figures]


def load_references(spec: Spec) -> list[Reference]:
    """What is recorded of this repository, and of the peer."""
    found = []
    path = specs.REFERENCE / "ours" / f"{spec.name}.json"
    if path.exists():
        record = json.loads(path.read_text())
        found.append(Reference("ours", record["steps"], {s: x["measures"] for s, x in record["seeds"].items()}))
    if spec.peer:
        record = json.loads((specs.REFERENCE / "peers" / spec.peer).read_text())
        found.append(Reference(record["library"].split(",")[0], record["total_steps"], peer_figures(spec, record)))
    return found


def peer_figures(spec: Spec, record: dict[str, Any]) -> dict[str, Figures]:
    """Figures by seed of a peer's file, which holds every finished episode (control), or figures as ours does."""
    found = {}
    for seed, data in record["seeds"].items():
        if "return" in data:
            steps, values = np.array(data["step"]), np.array(data["return"])
            ones = np.ones(len(steps))
            data = {spec.measures[0].tag: figures_of(steps, values, ones, record["total_steps"], spec.measures[0].last)}
        found[seed] = data
    return found


def values_of(measure: Measure, seeds: dict[Any, Figures], statistic: str) -> list[float]:
    """Area or final level of each seed that has the measure."""
    figures = [each[measure.tag] for each in seeds.values() if measure.tag in each]
    if statistic == "final":
        return [each["final"] for each in figures]
    return [float(np.mean(each["curve"])) for each in figures if "curve" in each]


def unit_of(measure: Measure, reference: Reference, statistic: str) -> float:
    """|reference - start|, what margins and differences are shares of."""
    start = measure.start
    if start is None:
        start = float(np.mean([each[measure.tag]["curve"][0] for each in reference.seeds.values()]))
    return max(abs(float(np.mean(values_of(measure, reference.seeds, statistic))) - start), 1e-9)


def compare(spec: Spec, ours: dict[int, Figures], reference: Reference) -> list[dict[str, Any]]:
    """One row per measure: for area and final level the difference as share of (reference - start), and the answer."""
    found = []
    for measure in spec.measures:
        row: dict[str, Any] = {"spec": spec.name, "measure": measure.name, "reference": reference.name, "answers": {}}
        for statistic in ("area", "final"):
            a, b = values_of(measure, ours, statistic), values_of(measure, reference.seeds, statistic)
            if not a or not b:
                continue
            unit = unit_of(measure, reference, statistic) * (1 if measure.higher else -1)
            gap, *ends = (x / unit + 0.0 for x in verdict.difference(a, b))  # + 0.0: no negative zeros
            row[statistic] = [gap, min(ends), max(ends)]  # above 0 is better than the reference
            row["answers"][statistic] = verdict.answer(min(ends), max(ends), measure.margin)
        if row["answers"]:
            row |= {"margin": measure.margin, "answer": verdict.worst(list(row["answers"].values())),
                    "seeds": [len(ours), len(reference.seeds)]}  # fmt: skip
            found.append(row)
    return found


def check(
    chosen: list[tuple[Spec, int]], runs: Path, failed: dict[str, str], say: Callable[[str], None] = print
) -> tuple[int, list[dict[str, Any]]]:
    """Print how the runs of each spec compare with its references; returns exit status and rows."""
    line = "{:25} {:22} {:24} {:7} {:24} {:24} {}"
    say("differences as shares of |reference - start| with 95 % intervals; above 0 is better than the reference")
    say(line.format("spec", "measure", "reference", "seeds", "area", "final level", "answer"))
    rows, faults, unreferenced = [], [f"{run}: {fault}" for run, fault in failed.items()], []
    for spec, number in chosen:
        wanted = {spec.seed(i) for i in range(number)}
        notes = {seed: note for seed, note in finished(spec, runs).items() if seed in wanted}
        references = load_references(spec)
        if not notes:
            faults.append(f"{spec.name}: no finished run")
        elif not references:
            unreferenced.append(spec.name)
        for reference in references if notes else ():
            steps = {note["steps"] for note in notes.values()}
            if steps != {reference.steps}:
                faults.append(f"{spec.name}: runs of {steps.pop()} steps, but of {reference.steps} in {reference.name}")
                continue
            for row in compare(spec, {seed: note["measures"] for seed, note in notes.items()}, reference):
                rows.append(row)
                shown = [as_text(row[name]) if name in row else "–" for name in ("area", "final")]
                seeds = "{} vs {}".format(*row["seeds"])
                answer = f"{row['answer']} (margin {row['margin']:.0%})"
                say(line.format(spec.name, row["measure"], row["reference"], seeds, *shown, answer))
    regressed = sorted({row["spec"] for row in rows if row["answer"] == "regression"})
    unsure = sorted({row["spec"] for row in rows if row["answer"] == "inconclusive"} - set(regressed))
    if unsure:
        say(f"inconclusive: {', '.join(unsure)}; give more --seeds")
    if unreferenced:
        say(f"without a reference, not judged: {', '.join(unreferenced)} (run.py record)")
    for fault in faults:
        say(f"FAILED: {fault}")
    if regressed:
        say(f"REGRESSION: {', '.join(regressed)}")
    return int(bool(regressed or faults)), rows


def as_text(interval: list[float]) -> str:
    """A share with its interval in per cent."""
    return "{:+.1f} [{:+.1f}, {:+.1f}] %".format(*(100 * x for x in interval))


# --- record ---


def machine() -> str:
    """Processor and GPU in words."""
    names = []
    if Path("/proc/cpuinfo").exists():
        models = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
        names.append(f"{os.cpu_count()} x {models[0]}" if models else f"{os.cpu_count()} cores")
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names += subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().splitlines()
    return ", ".join([*names, platform.system()])


def commit() -> str:
    """The commit of the working tree, with a + when it was changed since."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+", "--abbrev=12"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def record(spec: Spec, number: int, runs: Path) -> Path:
    """Write reference/ours/<spec>.json from the finished runs of the present code."""
    notes = finished(spec, runs)
    wanted = [spec.seed(i) for i in range(number)]
    missing = [str(seed) for seed in wanted if seed not in notes]
    if missing:
        error(f"{spec.name}: no finished run of seed {', '.join(missing)}: run.py run {spec.name} --seeds {number}")
    first = notes[wanted[0]]
    flags = shlex.join(spec.flags_in("benchmark"))
    content = {
        "command": f"python algos/{spec.script}.py {flags} --seed S",
        "key": key(spec),
        "commit": commit(),
        "date": first["date"],
        "versions": first["versions"],
        "machine": f"{machine()}; one thread per run",
        "what": f"of each seed: seconds; of each measure a curve ({curves.BINS} equal bins of steps), final level",
        "steps": first["steps"],
        "seeds": {str(seed): {name: notes[seed][name] for name in ("seconds", "measures")} for seed in wanted},
    }
    path = specs.REFERENCE / "ours" / f"{spec.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1)
    path.write_text(compact(text) + "\n")
    return path


def compact(text: str) -> str:
    """JSON with lists of numbers on one line."""
    lines, inside = [], False
    for line in text.splitlines():
        if inside:
            lines[-1] += line.strip()
        else:
            lines.append(line)
        inside = line.endswith("[") or (inside and not line.strip().startswith("]"))
    return "\n".join(lines)


# --- command line ---


class Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        error(message)


def choose(args: argparse.Namespace) -> list[tuple[Spec, int]]:
    """The specs asked for and the number of seeds of each."""
    tier = args.tier or ("quick" if not args.specs else None)
    found = []
    for spec in specs.SPECS:
        named = any(fnmatch.fnmatchcase(spec.name, pattern) for pattern in args.specs)
        if (args.specs and not named) or (tier and tier not in spec.seeds):
            continue
        found.append((spec, args.seeds or (spec.seeds[tier] if tier else spec.recorded_seeds)))
    unknown = [x for x in args.specs if not any(fnmatch.fnmatchcase(spec.name, x) for spec in specs.SPECS)]
    if unknown:
        error(f"no spec is called {unknown[0]}: run.py list names all")
    if not found:
        error(f"none of these specs is in the tier {tier}")
    return found


def list_command(args: argparse.Namespace) -> None:
    """Name the specs, their tiers, seeds, expected time and finished runs."""
    print(f"{'spec':26} {'seeds per tier':24} {'min/run':>8} {'finished':>9}  measures")
    for spec in specs.SPECS:
        tiers = ", ".join(f"{tier} {number}" for tier, number in spec.seeds.items())
        names = ", ".join(measure.name for measure in spec.measures)
        print(f"{spec.name:26} {tiers:24} {spec.minutes:8g} {len(finished(spec, args.runs)):9}  {names}")
    for tier in TIERS:
        minutes = sum(spec.minutes * spec.seeds.get(tier, 0) for spec in specs.SPECS)
        print(f"{tier}: {minutes:.0f} min on one core")


def run_command(args: argparse.Namespace) -> int:
    """Start the missing runs, then check."""
    chosen = choose(args)
    args.runs.mkdir(parents=True, exist_ok=True)
    lock = (args.runs / "lock").open("w")  # until the end of this process
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        error(f"another run.py is making runs in {args.runs}")
    todo = []
    for spec, number in chosen:
        done = finished(spec, args.runs)
        todo += [Run(spec, spec.seed(i), args.runs) for i in range(number) if spec.seed(i) not in done]
    print(f"{sum(number for _, number in chosen)} runs, {len(todo)} still to do, {args.jobs} at a time", flush=True)
    failed = run_all(todo, args.jobs, lambda line: print(line, flush=True))
    return finish_check(args, chosen, failed)


def check_command(args: argparse.Namespace) -> int:
    """Compare the runs that there are."""
    return finish_check(args, choose(args), {})


def finish_check(args: argparse.Namespace, chosen: list[tuple[Spec, int]], failed: dict[str, str]) -> int:
    """Print the answers, and write them on request."""
    status, rows = check(chosen, args.runs, failed)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return status


def record_command(args: argparse.Namespace) -> None:
    """Make finished runs the reference."""
    if not args.specs and not args.tier:
        error("name the specs to record, or a --tier")
    for spec, number in choose(args):
        print(f"wrote {record(spec, number, args.runs)}")


def alarms_command(args: argparse.Namespace) -> None:
    """Judge the unchanged scripts again and again, by seeds that are not in the reference."""
    import report

    report.measure_alarms(choose(args), args.runs)


def report_command(args: argparse.Namespace) -> None:
    """Write benchmark/README.md and its pictures from the references and measurements that are recorded."""
    import report

    report.write(args.out)


def speed_command(args: argparse.Namespace) -> None:
    """Time a script beside its peer."""
    import speed

    speed.measure(args.script, args.peer_python, args.steps, args.repeats)


def growth_command(args: argparse.Namespace) -> None:
    """Time and memory of each script as environments, batch, sequence length and vocabulary double."""
    import growth

    growth.measure(args.rows)


def faults_command(args: argparse.Namespace) -> int:
    """Plant each fault and run the tests named for it."""
    import faults

    return faults.main(args.names, args.specs, args.jobs)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(function=lambda _: parser.print_help())
    commands = parser.add_subparsers(metavar="COMMAND")
    runs = argparse.ArgumentParser(add_help=False)
    runs.add_argument("--runs", type=Path, default=HERE.parent / "runs" / "benchmark", help="folder of the runs")
    some = argparse.ArgumentParser(add_help=False, parents=[runs])
    some.add_argument("specs", nargs="*", help="names of specs, * and ? match any; default: all of the tier")
    some.add_argument("--tier", choices=TIERS, help="default: quick, unless specs are named")
    some.add_argument("--seeds", type=int, help="number of seeds, instead of the tier's")
    answers = argparse.ArgumentParser(add_help=False)
    answers.add_argument("--json", type=Path, help="file to write the answers to")

    def add(name: str, function: Callable, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        text = function.__doc__
        command = commands.add_parser(name, parents=parents, help=text, description=text)
        command.set_defaults(function=function)
        return command

    add("list", list_command, runs)
    started = add("run", run_command, some, answers)
    started.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each (default 2)")
    add("check", check_command, some, answers)
    add("record", record_command, some)
    add("alarms", alarms_command, some)
    add("report", report_command).add_argument("--out", type=Path, default=HERE, help="folder (default: benchmark)")
    timed = add("speed", speed_command)
    timed.add_argument("script", choices=["dqn", "a2c", "ppo", "reward_model", "dpo", "rlhf_ppo", "grpo"])
    timed.add_argument("--peer-python", type=Path, required=True, help="python of an environment with the peer")
    timed.add_argument("--steps", type=int, default=0, help="of each run: environment steps, updates or episodes")
    timed.add_argument("--repeats", type=int, default=5, help="pairs of runs (default 5)")
    add("growth", growth_command).add_argument("rows", nargs="*", help="'dqn *', say; default: all")
    planted = add("faults", faults_command)
    planted.add_argument("names", nargs="*", help="faults, * and ? match any; default: all")
    planted.add_argument("--specs", action="store_true", help="also run the specs named for them on the faulty copy")
    planted.add_argument("--jobs", type=int, default=1, help="copies tested side by side (default 1)")
    args = parser.parse_args(argv)
    for name in ("seeds", "jobs", "repeats"):
        if getattr(args, name, None) is not None and getattr(args, name) < 1:
            error(f"--{name} must be at least 1, not {getattr(args, name)}")
    return args


def main(argv: list[str]) -> int:
    """Run a command; returns the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))  # so that the runs it started end with it
    args = parse(argv)
    try:
        return args.function(args) or 0
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
