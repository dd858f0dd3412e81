"""Pictures of learning curves."""

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

OURS = "this repository"
# told apart by colour-blind eyes and in print
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
LEVEL_LINES = (":", (0, (6, 3)), (0, (3, 1, 1, 1)), (0, (1, 4)))


def in_words(steps: float) -> str:
    """A number of steps on an axis."""
    if steps >= 1e6:
        return f"{steps / 1e6:g}M"
    return f"{steps / 1e3:g}k" if steps >= 1e4 else f"{steps:g}"


def new_bins(curves: np.ndarray) -> np.ndarray:
    """Indices of the bins in which something was logged, by curves (seeds, bins): others repeat the bin before."""
    changes = (curves[:, 1:] != curves[:, :-1]).any(0)
    return np.flatnonzero([True, *changes])


def draw_curve(axes: Any, curves: np.ndarray, total_steps: int, is_sparse: bool, **style: Any) -> None:
    """The mean of curves (seeds, bins) over so many steps with the range of the seeds."""
    steps = (np.arange(curves.shape[1]) + 0.5) * total_steps / curves.shape[1]
    if is_sparse:
        logged = new_bins(curves)
        steps = steps[logged]
        curves = curves[:, logged]
    if len(steps) < 20:
        style["marker"] = "o"
    axes.plot(steps, curves.mean(0), markersize=4, **style)
    axes.fill_between(steps, curves.min(0), curves.max(0), color=style["color"], alpha=0.15, linewidth=0)


def draw_panel(axes: Any, groups: Mapping[str, tuple[np.ndarray, int]], title: str, unit: str, name: str,
               levels: Mapping[str, float], is_sparse: bool = False) -> None:  # fmt: skip
    """Curves (seeds, bins) over so many steps, and horizontal lines at known levels.

    Where less is logged than there are bins, points are joined instead of repeated.
    """
    styles = zip(itertools.cycle(COLOURS), itertools.cycle(LINES))
    for (group, (curves, total_steps)), (colour, line) in zip(groups.items(), styles):
        seeds = f"{len(curves)} seeds" if len(curves) > 1 else "one seed"
        draw_curve(axes, curves, total_steps, is_sparse, color=colour, linestyle=line, label=f"{group} ({seeds})")
    for (level, value), line in zip(levels.items(), LEVEL_LINES):
        axes.axhline(value, color="#444444", linestyle=line, linewidth=1.2, label=level)
    longest = max(total_steps for _, total_steps in groups.values())
    axes.set(xlabel=unit, ylabel=name, title=title, xlim=(0, longest))
    axes.xaxis.set_major_formatter(lambda x, _: in_words(x))
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=8)


def save(path: Path, panels: list[Callable[[Any], None]], size: tuple[float, float]) -> None:
    """Draw panels of a size, two in a row, and write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    whole = size[0] * columns, size[1] * lines
    figure, axes = plt.subplots(lines, columns, figsize=whole, dpi=110, squeeze=False)
    for place in axes.flat[len(panels) :]:
        place.axis("off")
    for place, draw in zip(axes.flat, panels):
        draw(place)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
