"""How a learning curve is read from a run, and what numbers stand for it.

A curve is the mean of what was logged (the return of finished training episodes, say) in each of 50 equal bins of steps
(an empty bin repeats the one before). Its area is the mean over the bins. The final level is the mean of the last
entries: 100 training episodes, or so many evaluations or updates.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

BINS = 50
Figures = dict[str, dict[str, Any]]  # of a run, by tag: curve (BINS numbers, or none), final
Logged = tuple[np.ndarray, np.ndarray, np.ndarray]  # steps (K,), values (K,), numbers of episodes (K,)


def load_run(run_dir: Path, tag: str = "charts/episodic_return") -> Logged:
    """Steps (K,), values (K,) and numbers (K,) logged by a run: mean returns of so many episodes, or single values.

    LookupError when there are none.
    """
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    if tag not in events.Tags()["scalars"]:
        what = "run with finished episodes" if tag == "charts/episodic_return" else f"values of {tag}"
        raise LookupError(f"{run_dir} holds no {what}")
    values = events.Scalars(tag)
    steps = np.array([event.step for event in values])
    means = np.array([event.value for event in values])
    counted = tag.startswith("charts/episodic") and "charts/episodes" in events.Tags()["scalars"]
    if not counted:
        return steps, means, np.ones(len(values))
    numbers = np.array([event.value for event in events.Scalars("charts/episodes")])
    return steps, means, numbers


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


def episodes_of(data: Mapping[str, list]) -> Logged:
    """Of a peer's file, which holds each finished episode of a seed."""
    steps = np.array(data["step"])
    return steps, np.array(data["return"]), np.ones(len(steps))


def figures_of(steps: np.ndarray, values: np.ndarray, numbers: np.ndarray, total: int, last: int) -> dict[str, Any]:
    """Curve and final level of what a run logged."""
    bins = curve(steps, values, numbers, total)
    return {"curve": [float(f"{x:.5g}") for x in bins], "final": round(final_level(values, numbers, last), 5)}
