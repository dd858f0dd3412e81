"""Compare the learning curves of finished runs with a peer's: a table, and a picture on request.

    for seed in 1 2 3 4 5; do python algos/ppo.py --seed $seed --run-dir runs/ppo-CartPole-v1-$seed; done
    python benchmark/curves.py runs/ppo-CartPole-v1-* --peer benchmark/reference/peers/cleanrl_ppo_CartPole-v1.json \\
        --picture benchmark/pictures/ppo_CartPole-v1.png

A curve is the mean return of the training episodes that ended in each of 50 equal bins of environment steps (an empty
bin repeats the one before). Its area is the mean over the bins. The final level is the mean of the last 100 training
episodes. Both are given as mean ± standard deviation over seeds.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

BINS = 50


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run directories of one script on one task, one per seed"""
    peer: Path | None = None
    """reference curves (json) to compare with"""
    level: float | None = None
    """also tell after how many episodes and steps the mean of the last 100 episodes first reached this"""
    below: float | None = None
    """also count the seeds whose area is below this"""
    picture: Path | None = None
    """png to draw"""
    title: str = ""
    """title of the picture"""


def error(message: str) -> NoReturn:
    """Say in one line what is wrong and exit with status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def load_run(run_dir: Path, tag: str = "charts/episodic_return") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps (K,), values (K,) and numbers (K,) logged by a run: mean returns of so many episodes, or single values.

    LookupError when there are none.
    """
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    if tag not in events.Tags()["scalars"]:
        what = "run with finished episodes" if tag == "charts/episodic_return" else f"values of {tag}"
        raise LookupError(f"{run_dir} holds no {what}")
    values = events.Scalars(tag)
    numbers = events.Scalars("charts/episodes") if tag.startswith("charts/episodic") else []
    return (
        np.array([event.step for event in values]),
        np.array([event.value for event in values]),
        np.array([event.value for event in numbers] or [1.0] * len(values)),
    )


def curve(steps: np.ndarray, returns: np.ndarray, numbers: np.ndarray, total_steps: int) -> np.ndarray:
    """Mean return (BINS,) of the episodes that ended in each bin of steps, weighted by their numbers (K,)."""
    bins = np.clip((steps - 1) * BINS // total_steps, 0, BINS - 1)  # what is logged before training is in the first
    sums = np.bincount(bins, weights=returns * numbers, minlength=BINS)
    counts = np.bincount(bins, weights=numbers, minlength=BINS)
    filled = np.maximum.accumulate(np.where(counts > 0, np.arange(BINS), 0))
    first = np.flatnonzero(counts)[0]
    filled[:first] = first
    return sums[filled] / counts[filled]


def final_level(returns: np.ndarray, numbers: np.ndarray, episodes: int = 100) -> float:
    """Mean return of the last `episodes` episodes, given means (K,) of numbers (K,) of them."""
    later = np.cumsum(numbers[::-1])[::-1] - numbers  # episodes after each entry
    weights = np.clip(episodes - later, 0, numbers)
    return float(np.average(returns, weights=weights))


def reached(steps: np.ndarray, returns: np.ndarray, numbers: np.ndarray, level: float) -> tuple[float, float]:
    """Episodes and steps after which the mean of the last 100 episodes is first at least `level`; inf if never."""
    episodes = np.cumsum(numbers)
    for k in np.flatnonzero(episodes >= 100):
        if final_level(returns[: k + 1], numbers[: k + 1]) >= level:
            return float(episodes[k]), float(steps[k])
    return np.inf, np.inf


def summary(runs: list[tuple[np.ndarray, np.ndarray, np.ndarray]], total_steps: int) -> dict[str, np.ndarray]:
    """Curves (seeds, BINS), areas (seeds,) and final levels (seeds,)."""
    curves = np.stack([curve(*run, total_steps) for run in runs])
    return {"curves": curves, "area": curves.mean(1), "final": np.array([final_level(*run[1:]) for run in runs])}


def chance(ours: np.ndarray, peers: np.ndarray, below: float | None) -> str:
    """Medians of the areas (seeds,) of both, and how likely such a difference is by chance alone (two-sided p)."""
    from scipy.stats import fisher_exact, mannwhitneyu

    text = f"median area {np.median(ours):.2f} and {np.median(peers):.2f}, p = {mannwhitneyu(ours, peers).pvalue:.2g}"
    if below is None:
        return text
    low = [[int((areas < below).sum()), int((areas >= below).sum())] for areas in (ours, peers)]
    return f"{text}; share below {below:g}: p = {fisher_exact(low).pvalue:.2g}"


OURS = "this repository"
STYLES = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."))  # told apart by colour-blind eyes and in print


def draw_panel(axes: Any, groups: dict[str, dict[str, np.ndarray]], total_steps: int, title: str, unit: str,
               levels: dict[str, float]) -> None:  # fmt: skip
    """Mean over seeds with the range between the lowest and highest seed, and horizontal lines at known levels."""
    steps = (np.arange(BINS) + 0.5) * total_steps / BINS
    styles = STYLES if OURS in groups else STYLES[1:]  # a peer looks the same with and without ours
    for (name, group), (colour, style) in zip(groups.items(), styles):
        curves = group["curves"]
        axes.plot(steps, curves.mean(0), style, color=colour, label=f"{name} ({len(curves)} seeds)")
        axes.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.15, linewidth=0)
    for (name, level), style in zip(levels.items(), (":", (0, (6, 3)))):
        axes.axhline(level, color="#444444", linestyle=style, linewidth=1.2, label=name)
    axes.set(xlabel=unit, title=title, xlim=(0, total_steps))
    axes.xaxis.set_major_formatter(
        lambda x, _: f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k" if x >= 1e4 else f"{x:g}"
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=8)


def draw(groups: dict[str, dict[str, np.ndarray]], total_steps: int, title: str, path: Path) -> None:
    """One picture of the returns of training episodes."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), dpi=130)
    draw_panel(axes, groups, total_steps, title, "environment steps", {})
    axes.set_ylabel("return of training episodes")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main(args: Args) -> None:
    if not args.runs:
        error("name at least one run directory")
    for run_dir in args.runs:
        if not (run_dir / "args.json").exists():
            error(f"{run_dir} is not a run directory (it has no args.json)")
    settings = [json.loads((run_dir / "args.json").read_text()) for run_dir in args.runs]
    tasks = {(each["env_id"], each["total_timesteps"]) for each in settings}
    if len(tasks) > 1:
        error(f"the runs are of several tasks: {sorted(tasks)}")
    ((env_id, total_steps),) = tasks
    try:
        data = {OURS: [load_run(run_dir) for run_dir in args.runs]}
    except LookupError as fault:
        error(str(fault))
    if args.peer:
        if not args.peer.is_file():
            error(f"--peer {args.peer}: no such file")
        peer = json.loads(args.peer.read_text())
        if (peer["env"], peer["total_steps"]) != (env_id, total_steps):
            error(
                f"--peer {args.peer}: is about {peer['env']} over {peer['total_steps']} steps, "
                f"not {env_id} over {total_steps}"
            )
        runs = [(np.array(s["step"]), np.array(s["return"]), np.ones(len(s["step"]))) for s in peer["seeds"].values()]
        data[peer["library"].split(",")[0]] = runs
    groups = {name: summary(runs, total_steps) for name, runs in data.items()}
    print(f"{env_id}, {total_steps} steps")
    for name, group in groups.items():
        final, area = (f"{group[key].mean():8.2f} ± {group[key].std():6.2f}" for key in ("final", "area"))
        print(f"{name:>24}: last 100 episodes {final}   area {area}   ({len(group['area'])} seeds)")
        if args.level is not None:
            first = sorted(reached(*run, args.level) for run in data[name])
            print(
                f"{'':>24}  {args.level:g} reached after "
                + ", ".join(f"{e:.0f} ({s:.0f} steps)" for e, s in first)
                + " episodes"
            )
        if args.below is not None:
            print(f"{'':>24}  area below {args.below:g}: {(group['area'] < args.below).sum()} seeds")
    if args.peer:
        print(chance(*(group["area"] for group in groups.values()), args.below))
    if args.picture:
        draw(groups, total_steps, args.title or env_id, args.picture)
        print(f"wrote {args.picture}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.splitlines()[0]))
