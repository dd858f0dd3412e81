"""How long ppo.py takes to learn a task, beside Stable-Baselines3's PPO at RL Zoo's settings, in turns.

    python -m venv /tmp/sb3 && /tmp/sb3/bin/pip install -r benchmark/peers/sb3_requirements.txt
    python benchmark/run.py levels --peer-python /tmp/sb3/bin/python

What counts is the time of training, without start-up, on one thread until the mean return of the last 100 training
episodes gets to a level. Ours has the flags of the task's spec. Each run has the steps that its settings are made for.
"""

import json
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np

from core import compare, curves, specs
from core.report import table
from cost.speed import PEERS, output

LEVELS = {"CartPole-v1": 475, "Acrobot-v1": -100, "LunarLander-v3": 200, "Pendulum-v1": -200, "HalfCheetah-v5": 4000}
SEEDS = (1000, 2000, 3000)
NEVER = [None, None]  # steps and seconds of a run that does not get there


def ours(task: str, seed: int) -> list[float | None]:
    """Steps and seconds after which ppo.py gets to the level of a task."""
    (spec,) = [spec for spec in specs.SPECS if (spec.script, spec.task) == ("ppo", task)]
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        output([sys.executable, specs.ALGOS / "ppo.py", *spec.flags, "--seed", str(seed), "--run-dir", run_dir])
        steps = compare.reached(curves.load_run(run_dir), LEVELS[task], 100)
        logged, speeds, _ = curves.load_run(run_dir, "charts/SPS")
    if not np.isfinite(steps):
        return NEVER
    return [steps, float(np.interp(steps, logged, logged / speeds))]


def peers(peer_python: Path, task: str, seed: int) -> list[float | None]:
    """The same of Stable-Baselines3."""
    zoo = json.loads((PEERS / "rl_zoo.json").read_text())
    steps = zoo[f"ppo-{task}"]["steps"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "curve.json"
        until = ["--until", str(LEVELS[task])]
        output([peer_python, PEERS / "sb3.py", "ppo", task, str(steps), file, str(seed), *until])
        curve = json.loads(file.read_text())["seeds"][str(seed)]
    last = curve["return"][-100:]
    if len(last) < 100 or np.mean(last) < LEVELS[task]:
        return NEVER
    return [curve["step"][-1], curve["seconds"][-1]]


def measure(peer_python: Path, tasks: list[str]) -> None:
    """Train both on each task with three seeds, in turns, and keep what was found for the report."""
    if not peer_python.exists():
        raise SystemExit(f"error: --peer-python {peer_python}: no such file")
    unknown = set(tasks) - set(LEVELS)
    if unknown:
        raise SystemExit(f"error: there is no level for {unknown.pop()}: choose from {', '.join(LEVELS)}")
    for task in tasks or LEVELS:
        pairs = []
        for seed in SEEDS:
            found = [ours(task, seed), peers(peer_python, task, seed)]
            print(f"{task}, seed {seed}: steps and seconds of ours {found[0]}, of the peer {found[1]}", flush=True)
            pairs.append(found)
        known = specs.results("levels") | {task: pairs}
        specs.keep("levels", {name: known[name] for name in LEVELS if name in known})


def in_words(runs: list[list[float | None]]) -> tuple[str, str]:
    """Median seconds and steps of runs, where never is longest, and how many never got there."""
    failed = sum(run == NEVER for run in runs)
    steps, seconds = (median(np.inf if value is None else value for value in column) for column in zip(*runs))
    if not np.isfinite(seconds):
        return "never", "–"
    share = f" (never by {failed} of {len(runs)} seeds)" if failed else ""
    return f"{seconds:,.0f} s{share}", f"{steps:,.0f}"


def section() -> str:
    """Times until a level, for the report."""
    zoo = json.loads((PEERS / "rl_zoo.json").read_text())
    rows = []
    for task, pairs in specs.results("levels").items():
        first, second = zip(*pairs)
        budget = f"{zoo[f'ppo-{task}']['steps']:,}"
        level = f"{LEVELS[task]:,}".replace("-", "−")
        rows.append([task, level, *in_words(first), *in_words(second), budget])
    if not rows:
        return ""
    header = ["task", "level", "ours: time", "ours: steps", "Stable-Baselines3: time", "steps", "its budget in steps"]
    return (
        "## Time to a level\n\nTime of training on one thread until the mean return of the last 100 training episodes "
        "gets to a level: ppo.py by the flags of its recipes, beside Stable-Baselines3's PPO by those of RL Zoo, in "
        f"turns, the median of {len(SEEDS)} seeds (`run.py levels --peer-python ...`). Never: not within "
        "the steps that its settings are made for.\n\n" + table(header, rows)
    )
