"""Compare the learning curves of runs, several settings and a peer: a table, and a picture on request.

    for seed in 1 2 3 4 5; do python algos/ppo.py --seed $seed --run-dir runs/ppo-CartPole-v1-$seed; done
    python benchmark/run.py curves runs/ppo-CartPole-v1-* --picture runs/ppo.png \\
        --peer benchmark/reference/peers/cleanrl_ppo_CartPole-v1.json
    python benchmark/run.py curves runs/dpo-* --tag eval/loss

Only runs of one script whose flags agree, bar the seed and where and when they are saved, are averaged. Others are
settings of their own, named by the flags in which they differ. Areas and final levels (curves.py) are given as mean ±
standard deviation over seeds.
"""

import argparse
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import mannwhitneyu

from core import specs
from core.curves import Logged, curve, episodes_of, final_level, load_run
from core.pictures import OURS, draw_panel, save

RETURN = "charts/episodic_return"
NOT_A_SETTING = {"seed", "run_dir", "resume", "save_every", "track"}


@dataclass
class Setting:
    """Runs with the same flags, one per seed."""

    runs: list[Logged]
    steps: int
    """of the whole training"""
    last: int
    """entries that make up the final level"""

    @property
    def curves(self) -> np.ndarray:
        """Of each seed (seeds, BINS)."""
        return np.stack([curve(*run, self.steps) for run in self.runs])

    @property
    def areas(self) -> np.ndarray:
        """Of each seed (seeds,)."""
        return self.curves.mean(1)

    @property
    def finals(self) -> np.ndarray:
        """Final level of each seed (seeds,)."""
        return np.array([final_level(values, numbers, self.last) for _, values, numbers in self.runs])


def script_of(flags: dict[str, Any]) -> str:
    """The script of algos/ whose flags are most like these."""
    shared = {}
    for path in specs.ALGOS.glob("*.py"):
        names = specs.flags_of_script(path.stem)
        shared[path.stem] = len(names & flags.keys()) / len(names | flags.keys())
    return max(shared, key=shared.get)


def label_settings(flags: list[dict[str, Any]]) -> list[str]:
    """A name for each run (n,): its script where there are several, and the flags in which those of a script differ."""
    scripts = [script_of(each) for each in flags]
    labels = []
    for script, own in zip(scripts, flags):
        alike = [other for other, other_script in zip(flags, scripts) if other_script == script]
        names = dict.fromkeys(name for other in alike for name in other if name not in NOT_A_SETTING)
        differing = [name for name in names if differ(alike, name)]
        words = [f"--{name.replace('_', '-')} {own.get(name, 'absent')}" for name in differing]
        labels.append(" ".join([script] * (len(set(scripts)) > 1) + words) or OURS)
    return labels


def differ(flags: list[dict[str, Any]], name: str) -> bool:
    """Whether runs were given several values of one flag."""
    first, *others = [each.get(name, "absent") for each in flags]
    return any(value != first for value in others)


def reached(run: Logged, level: float, last: int) -> float:
    """Steps after which the mean of the last entries (100 episodes, say) first gets to a level; inf if never."""
    steps, values, numbers = run
    way = 1 if level > values[0] else -1
    for k in np.flatnonzero(np.cumsum(numbers) >= last):
        recent = final_level(values[: k + 1], numbers[: k + 1], last)
        if way * recent >= way * level:
            return float(steps[k])
    return np.inf


def until(run: Logged, step: int) -> Logged:
    """What a run logged up to a step."""
    steps, values, numbers = run
    early = steps <= step
    return steps[early], values[early], numbers[early]


def chance(ours: np.ndarray, others: np.ndarray) -> str:
    """Medians of the areas (seeds,) of both, and how likely such a difference is by chance alone (two-sided p)."""
    p = mannwhitneyu(ours, others).pvalue
    return f"median area {np.median(ours):.4g} and {np.median(others):.4g}, p = {p:.2g}"


def load_settings(run_dirs: list[Path], tag: str | None) -> tuple[dict[str, Setting], str, str]:
    """Settings by name, the tag that was read, and the task."""
    for run_dir in run_dirs:
        if not (run_dir / "args.json").exists():
            raise SystemExit(f"error: {run_dir} is not a run directory (it has no args.json)")
    flags = [json.loads((run_dir / "args.json").read_text()) for run_dir in run_dirs]
    tasks = {each.get("env_id", each.get("dataset", "")) for each in flags}
    if len(tasks) > 1:
        raise SystemExit(f"error: the runs are of several tasks: {', '.join(sorted(tasks))}")
    script = script_of(flags[0])
    measures = {m.tag: m for spec in specs.SPECS if spec.script == script for m in spec.measures}
    tag = tag or (RETURN if "env_id" in flags[0] else next(iter(measures)))
    last = 100 if tag == RETURN else measures[tag].last if tag in measures else 1
    settings: dict[str, Setting] = {}
    for run_dir, own, label in zip(run_dirs, flags, label_settings(flags)):
        try:
            run = load_run(run_dir, tag)
        except LookupError as fault:
            raise SystemExit(f"error: {fault}") from None
        steps = int(run[0][-1])
        if "total_timesteps" in own:
            steps = min(own["total_timesteps"], int(load_run(run_dir, "charts/SPS")[0][-1]))
            if steps < own["total_timesteps"]:
                print(f"{run_dir} is unfinished: its setting is shown up to step {steps:,}")
        setting = settings.setdefault(label, Setting([], steps, last))
        setting.runs.append(run)
        setting.steps = min(setting.steps, steps)
    for setting in settings.values():
        setting.runs = [until(run, setting.steps) for run in setting.runs]
    return settings, tag, tasks.pop()


def load_peer(path: Path, tag: str, task: str, steps: set[int]) -> tuple[str, Setting]:
    """Name and curves of a peer's file, which has to be about the same task and length."""
    if not path.is_file():
        raise SystemExit(f"error: --peer {path}: no such file")
    peer = json.loads(path.read_text())
    about = peer.get("env"), {peer["total_steps"]}, RETURN
    if about != (task, steps, tag):
        raise SystemExit(f"error: --peer {path}: is about {about[0]} over {peer['total_steps']:,} steps, not {tag} of {task} "
                         f"over {' and '.join(f'{x:,}' for x in sorted(steps))}")  # fmt: skip
    runs = [episodes_of(data) for data in peer["seeds"].values()]
    return peer["library"].split(",")[0], Setting(runs, peer["total_steps"], 100)


def compare(args: argparse.Namespace) -> None:
    """Print a table of the settings, and draw them on request."""
    settings, tag, task = load_settings(args.runs, args.tag)
    base = next(iter(settings))  # that the others are compared with
    if args.peer:
        base, peer = load_peer(args.peer, tag, task, {setting.steps for setting in settings.values()})
        settings[base] = peer
    print(f"{tag} of {task}")
    for name, setting in settings.items():
        final, area = (f"{x.mean():.4g} ± {x.std():.2g}" for x in (setting.finals, setting.areas))
        print(f"{name}: {len(setting.runs)} seeds, {setting.steps:,} steps, final level {final}, area {area}")
        if args.level is not None:
            first = sorted(reached(run, args.level, setting.last) for run in setting.runs)
            print(f"    {args.level:g} reached after {', '.join(f'{steps:,.0f}' for steps in first)} steps")
    for name, setting in settings.items():
        if name != base:
            print(f"{name} against {base}: {chance(setting.areas, settings[base].areas)}")
    if args.picture:
        unit = "environment steps" if tag.startswith("charts/") else "steps"
        groups = {name: (setting.curves, setting.steps) for name, setting in settings.items()}
        title = args.title or task
        panel = partial(draw_panel, groups=groups, title=title, unit=unit, name=tag, levels={})
        save(args.picture, [panel], (7, 3.6))
        print(f"wrote {args.picture}")
