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


def draw_panel(axes: Any, groups: Mapping[str, tuple[np.ndarray, int]], title: str, unit: str, name: str,
               levels: Mapping[str, float]) -> None:  # fmt: skip
    """Curves (seeds, bins) over so many steps: means with the range of the seeds, and horizontal lines at known levels."""
    for (group, (curves, total_steps)), colour, line in zip(
        groups.items(), itertools.cycle(COLOURS), itertools.cycle(LINES)
    ):
        steps = (np.arange(curves.shape[1]) + 0.5) * total_steps / curves.shape[1]
        axes.plot(steps, curves.mean(0), line, color=colour, label=f"{group} ({len(curves)} seeds)")
        axes.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.15, linewidth=0)
    for (level, value), line in zip(levels.items(), (":", (0, (6, 3)), (0, (3, 1, 1, 1)), (0, (1, 4)))):
        axes.axhline(value, color="#444444", linestyle=line, linewidth=1.2, label=level)
    longest = max(total_steps for _, total_steps in groups.values())
    axes.set(xlabel=unit, ylabel=name, title=title, xlim=(0, longest))
    axes.xaxis.set_major_formatter(
        lambda x, _: f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k" if x >= 1e4 else f"{x:g}"
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=8)


def save(path: Path, panels: list[Callable[[Any], None]], size: tuple[float, float]) -> None:
    """Draw panels of a size, two in a row, and write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(size[0] * columns, size[1] * lines), dpi=110, squeeze=False)
    for place in axes.flat[len(panels) :]:
        place.axis("off")
    for place, draw in zip(axes.flat, panels):
        draw(place)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
