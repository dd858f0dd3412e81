"""What runs are compared with: curves recorded of this repository and of peers, and numbers that others published."""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import curves, specs
from core.curves import Figures
from core.runs import finished, key
from core.specs import REFERENCE, Spec


@dataclass(frozen=True)
class Reference:
    """Figures of several seeds to be compared with."""

    name: str
    steps: int
    seeds: dict[str, Figures]
    key: str = ""
    """of the code that was recorded, if it is ours"""
    seconds: float | None = None
    """of a run, where it was measured"""


def record_of(spec: Spec) -> dict[str, Any] | None:
    """The whole record of this repository's runs."""
    path = specs.REFERENCE / "ours" / f"{spec.name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def ours(spec: Spec) -> Reference | None:
    """What is recorded of this repository."""
    record = record_of(spec)
    if record is None:
        return None
    seeds = {seed: noted["measures"] for seed, noted in record["seeds"].items()}
    seconds = [noted["seconds"] for noted in record["seeds"].values() if noted["seconds"]]
    return Reference("ours", record["steps"], seeds, record["key"], sum(seconds) / len(seconds) if seconds else None)


def peer(spec: Spec) -> Reference | None:
    """What is recorded of the peer: every finished episode (control), or figures as ours are."""
    path = specs.REFERENCE / "peers" / spec.peer
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    seeds = {}
    for seed, data in record["seeds"].items():
        if "return" in data:
            episodes = curves.episodes_of(data)
            data = {spec.measures[0].tag: curves.figures_of(*episodes, record["total_steps"], spec.measures[0].last)}
        seeds[seed] = data
    return Reference(record["library"].split(",")[0], record["total_steps"], seeds)


def load(spec: Spec) -> list[Reference]:
    """All that is recorded: ours first."""
    return [reference for reference in (ours(spec), peer(spec)) if reference]


@dataclass(frozen=True)
class Published:
    """One number of others."""

    source: str
    env: str
    mean: float
    std: float | None
    steps: int | None
    """environment steps of training, where they are said"""
    unlike: str
    """why it can't be compared with the final level of the spec; empty when it can"""


def collections() -> list[dict[str, Any]]:
    """The tables of published.json that say how their numbers were measured."""
    content = json.loads((REFERENCE / "published.json").read_text())
    return [each for each in content.values() if isinstance(each, dict) and "training" in each]


def published(spec: Spec, trained: int) -> list[Published]:
    """What others published of the spec's algorithm on its task, in any version of it; ours trained for so many steps."""
    found = []
    for collection in collections():
        for row in collection["rows"]:
            if row["script"].split("_")[0] != spec.script:
                continue
            if family(row["env"]) != family(spec.environment):
                continue
            steps = row.get("steps")
            unlike = "" if row["env"] in (spec.environment, f"{spec.environment}NoFrameskip-v4") else "another version"
            unlike = unlike or "another time limit" * ("--env-kwargs" in spec.flags)
            unlike = unlike or "evaluation of one tuned agent" * (not collection["training"])
            unlike = unlike or "longer training" * ((steps or 0) > trained)
            found.append(Published(collection["name"], row["env"], row["mean"], row.get("std"), steps, unlike))
    return found


def family(env: str) -> str:
    """An environment without its version."""
    return re.sub(r"^ALE/|NoFrameskip|-v\d+$|-v\d+ .*", "", env)


def machine() -> str:
    """Processor and GPU in words."""
    names = []
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.split(":")[1].strip() for line in lines if "model name" in line]
        names.append(f"{os.cpu_count()} x {models[0]}" if models else f"{os.cpu_count()} cores")
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names += subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().splitlines()
    return ", ".join([*names, platform.system()])


def commit() -> str:
    """The commit of the working tree, with a + when it was changed since."""
    git = ["git", "-C", str(specs.BENCHMARK), "describe", "--always", "--dirty=+", "--abbrev=12"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def record(spec: Spec, number: int, runs: Path) -> Path:
    """Write reference/ours/<spec>.json from the finished runs of the present code."""
    notes = finished(spec, runs)
    wanted = [spec.seed(i) for i in range(number)]
    missing = [str(seed) for seed in wanted if seed not in notes]
    if missing:
        fault = f"{spec.name}: no finished run of seed {', '.join(missing)}: run.py run {spec.name} --seeds {number}"
        raise SystemExit(f"error: {fault}")
    first = notes[wanted[0]]
    flags = shlex.join(flag.replace(f"{specs.BENCHMARK.parent}/", "") for flag in spec.flags)
    seeds = {}
    for seed in wanted:
        note = notes[seed]
        kept = ("seconds", "gigabytes", "measures", "answers")  # answers of a real model only
        seeds[str(seed)] = {name: note[name] for name in kept if name in note}
    content = {
        "command": f"python algos/{spec.script}.py {flags} --seed S",
        "key": key(spec),
        "commit": commit(),
        "date": first["date"],
        "versions": first["versions"],
        "machine": f"{machine()}; one thread per run",
        "what": f"of each seed: seconds; of each measure a curve ({curves.BINS} equal bins of steps), final level",
        "steps": first["steps"],
        "seeds": seeds,
    }
    path = specs.REFERENCE / "ours" / f"{spec.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, content)
    return path


def write(path: Path, content: dict[str, Any]) -> None:
    """A JSON file with lists of numbers on one line."""
    lines, inside = [], False
    for line in json.dumps(content, indent=1).splitlines():
        if inside:
            lines[-1] += line.strip()
        else:
            lines.append(line)
        inside = line.endswith("[") or (inside and not line.strip().startswith("]"))
    path.write_text("\n".join(lines) + "\n")
