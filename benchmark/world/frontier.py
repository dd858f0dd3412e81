"""The picture of what policies of the small language world reach beside the best possible, at each KL."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.patheffects import withStroke

from world import grammar

LABEL = {"textcoords": "offset points", "fontsize": 8, "path_effects": [withStroke(linewidth=2.5, foreground="white")]}
LINES = {"rlhf_ppo": "o-", "dpo": "s--", "grpo --kl-in reward": "v-.", "grpo": "^:"}
COLOURS = {"rlhf_ppo": "#0072B2", "dpo": "#D55E00", "grpo --kl-in reward": "#CC79A7", "grpo": "#009E73"}
NOTES = {"grpo": ", whose β is on a scale of its own:\nit divides advantages by their spread"}
SIDES = {
    "rlhf_ppo": (1, 6),
    "dpo": (14, -10),
    "grpo --kl-in reward": (-14, -4),
    "grpo": (15, -9),
}  # where β stands beside a point
PANELS = (("gold", "true reward"), ("proxy", "reward model's score"))


def draw_optimum(axes: Any, golds: np.ndarray, betas: list[float]) -> None:
    """The best reward at each KL by gold rewards (n,) of reference samples, with dots at some β."""
    line = [grammar.optimum_from_samples(golds, beta) for beta in np.geomspace(0.05, 20, 60)]
    line = [best for best in line if best.reliable]
    name = "the best possible: π* ∝ π_ref·exp(r/β)"
    axes.plot([best.kl_star for best in line], [best.gold_star for best in line], color="black", label=name)
    for beta in betas:
        best = grammar.optimum_from_samples(golds, beta)
        if best.reliable:
            point = best.kl_star, best.gold_star
            axes.plot(*point, "k.")
            axes.annotate(f"{beta:g}", point, xytext=(-5, 4), ha="right", **LABEL)


def points(rows: list[dict], script: str, figure: str) -> list[tuple[float, float, float]]:
    """KL, a figure and β of a script's policies, means over seeds, the nearest to the SFT model first."""
    found = []
    for beta in {row["beta"] for row in rows if row["script"] == script}:
        own = [row for row in rows if row["script"] == script and row["beta"] == beta]
        kl = np.mean([row["kl"] for row in own])
        found.append((float(kl), float(np.mean([row[figure] for row in own])), beta))
    return sorted(found)


def file_of(script: str) -> str:
    """A script's file, with the flag that follows its name."""
    name, _, flag = script.partition(" ")
    return f"{name}.py {flag}".strip()


def draw(rows: list[dict], golds: np.ndarray, path: Path) -> None:
    """True reward and reward model's score against KL, one point per script and β: mean of the seeds in rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    picture, panels = plt.subplots(1, 2, figsize=(12, 5), dpi=110, sharex=True)
    draw_optimum(panels[0], golds, sorted({row["beta"] for row in rows}))
    for axes, (figure, name) in zip(panels, PANELS):
        axes.margins(y=0.1)
        for script, line in LINES.items():
            found = points(rows, script, figure)
            style = {"color": COLOURS[script], "label": f"{file_of(script)}{NOTES.get(script, '')}"}
            kls = [x for x, _, _ in found]
            values = [y for _, y, _ in found]
            axes.plot(kls, values, line, **style)
            for x, y, beta in found:
                place = {"xy": (x, y), "xytext": SIDES[script], "ha": "center"}
                axes.annotate(f"{beta:g}", **place, color=COLOURS[script], **LABEL)
        axes.set(title=f"{name} (numbers: β)", xlabel="distance from the SFT model: KL in nats", ylabel=name)
        axes.set_xscale("log")
        axes.set_xlim(0.45, 16)
        axes.set_xticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylim(bottom=0)
    panels[0].legend(loc="lower right", fontsize=9)
    picture.tight_layout()
    picture.savefig(path)
    plt.close(picture)
