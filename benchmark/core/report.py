"""Writes results/README.md and pictures/ from what is recorded: references, policies, false alarms, and what other rooms add."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from core import pictures, references, specs, verdict
from core.references import Reference
from core.specs import Measure, Spec
from core.verdict import as_text, compare, unit_of, values_of

INTRO = """# Results of the benchmark

Written by `python benchmark/run.py report` from `../reference` and the measurements in `*.json`: do not edit.
"""
METHOD = """## How an answer is found

A curve is the mean of what was logged (the return of finished training episodes, say) in each of 50 equal bins of
steps. Its area is the mean over the bins, its final level the mean of the last 100 episodes (control), the last
evaluation, or the last 4 updates (RLHF). Seeds are the samples: ours and the reference's give a 95 % interval of the
difference of means, in units of |reference - start|, where the start is the level of uniformly random actions or of the
untrained model. The margin, a share of the same unit, is stated in each spec:

- **regression**: the whole interval of the area or of the final level lies below -margin;
- **pass**: both lie above -margin;
- **inconclusive**: neither; more seeds are asked for (`--seeds`).

From five seeds on both sides the interval is scipy's bootstrap percentile interval, at a level raised for the few
samples (Hesterberg's expanded percentile interval). With fewer, as in the quick tier, the spread is estimated from all
seeds together (pooled variance; a single seed gets a prediction interval), since resampling one or two numbers says
nothing of it. `tests/test_benchmark.py` simulates both: an unchanged script with normally distributed results gets an
interval that misses 0 in about 5 % of all cases, for any number of seeds; a false regression also has to clear the
margin, so it is rarer.
"""

PONG = """## Pong

`ppo.py` on ALE/Pong-v5, one seed each, stopped while there was more to learn. Lines are means of bins of steps.

| | |
| --- | --- |
| ![Pong on a CPU](../pictures/pong_on_a_cpu.png) | ![Pong on a GPU](../pictures/pong_on_a_gpu.png) |

- Two cores, in pieces by `--resume`: 330 steps per second where nothing else ran, 159 minutes by the clock with much
  that did: `OMP_NUM_THREADS=2 python algos/ppo.py
  --env-id ALE/Pong-v5 --seed 1000 --total-timesteps 2000000 --num-envs 16 --num-steps 128 --num-minibatches 4
  --clip-coef 0.1 --learning-rate 3e-4 --gamma 0.99`. The mean of the last 50 episodes is above 0 after 1,498,000 steps.
- One H200 and five cores: `python algos/ppo.py --env-id ALE/Pong-v5 --seed 2 --num-envs 32 --num-steps 128
  --num-minibatches 4 --clip-coef 0.1 --learning-rate 2.5e-4 --gamma 0.99 --total-timesteps 10000000`. The mean score is
  above 0 after 1.4 M steps and 7.5 minutes, and 10 at 2.3 M.
"""


# --- numbers in words ---


def shown(value: float) -> str:
    """A number with three or four significant digits."""
    if not math.isfinite(value):
        return "–"
    digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{min(3, digits)}f}".replace("-", "−")


def with_interval(values: list[float]) -> str:
    """Mean of seeds with its 95 % interval."""
    if not values:
        return "–"
    return "{} [{}, {}]".format(*map(shown, verdict.mean_interval(values)))


def two_cells(measure: Measure, reference: Reference) -> list[str]:
    """Final level and area of a reference."""
    name = "" if reference.name == "ours" else f"{reference.name}: "
    return [name + with_interval(values_of(measure, reference.seeds, x)) for x in ("final", "area")]


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


# --- sections ---


def tiers() -> str:
    """Runs and time of each tier."""
    rows = []
    for tier in specs.TIERS:
        chosen = [spec for spec in specs.SPECS if tier in spec.seeds]
        number = sum(spec.seeds[tier] for spec in chosen)
        seconds = {spec.name: ours.seconds for spec in chosen if (ours := references.ours(spec))}
        missing = [spec.name for spec in chosen if not seconds.get(spec.name)]
        time = f"{sum(spec.seeds[tier] * seconds.get(spec.name, 0) for spec in chosen) / 120:.0f} min"
        if missing:
            time = f"{time} without {', '.join(missing)}"
        rows.append([tier, ", ".join(f"{spec.name} ({spec.seeds[tier]})" for spec in chosen), str(number), time])
    return (
        "## Tiers\n\nThe time is that of the recorded runs, which ran two at a time on two cores, evaluation "
        "included (resumed runs: the mean of their spec's others).\n\n"
        f"{table(['tier', 'specs (seeds)', 'runs', 'time'], rows)}\nThe quick tier is not part of `.ci/run`, whose tests "
        "take up to 20 of the 25 minutes that CI should take, and notice every fault below without a learning curve. It "
        "is for whoever changes a script.\n"
    )


def results() -> str:
    """Final levels and areas of ours and of peers, beside published numbers and optima."""
    rows = []
    for spec in specs.SPECS:
        ours, peer = references.ours(spec), references.peer(spec)
        for number, measure in enumerate(spec.measures):
            cells = two_cells(measure, ours) if ours else ["not recorded yet", ""]
            cells += two_cells(measure, peer) if peer else ["", ""]
            best = shown(measure.optimum()) if measure.optimum else ""
            steps = f"{ours.steps:,}" if ours else ""
            seeds = str(len(ours.seeds)) if ours else ""
            label = [spec.name, steps, seeds] if number == 0 else ["", "", ""]
            rows.append([*label, measure.name, *cells, best])
    header = ["spec", "steps", "seeds", "measure", "ours: final", "ours: area", "peer: final", "peer: area"]
    header += ["best possible"]
    return "## Results\n\nMeans over seeds with 95 % intervals.\n\n" + table(header, rows)


def level_at(ours: Reference, measure: Measure, steps: int | None) -> tuple[float, float, float]:
    """Mean and 95 % interval of our seeds after so many steps, at the end where these are all or not known."""
    if not steps or steps >= ours.steps:
        return verdict.mean_interval(values_of(measure, ours.seeds, "final"))
    found = [figures[measure.tag]["curve"] for figures in ours.seeds.values()]
    last = steps * len(found[0]) // ours.steps - 1  # the bin that ends there
    return verdict.mean_interval([curve[last] for curve in found])


def published() -> str:
    """Ours beside the numbers of others, and by how much we are below, where they are alike and where they are not."""
    rows, below, unlike_below = [], [], []
    for spec in specs.SPECS:
        ours, measure = references.ours(spec), spec.measures[0]
        for number in references.published(spec, ours.steps if ours else 0):
            theirs = f"{number.mean:g}{f' ± {number.std:g}' if number.std is not None else ''}".replace("-", "−")
            cells = ["not recorded yet", "", ""]
            if ours:
                mean, low, high = level_at(ours, measure, number.steps)
                share = (mean - number.mean) / abs(number.mean - measure.start)
                gap = f"{shown(mean - number.mean)} ({share:+.0%})".replace("-", "−")
                answer = "level" if low <= number.mean <= high else "above" if share > 0 else "**below**"
                answer = f"not alike: {number.unlike}" if number.unlike else answer
                cells = ["{} [{}, {}]".format(*map(shown, (mean, low, high))), gap, answer]
                if answer == "**below**":
                    below.append(f"{spec.name} {gap} against {number.source}")
                if number.unlike and high < number.mean:
                    unlike_below.append(f"{spec.name} {gap} against {number.source} ({number.unlike})")
            steps = f"{number.steps:,}" if number.steps else "not said"
            rows.append([spec.name, number.source, number.env, steps, theirs, *cells])
    protocols = "".join(f"- {x['name']}: {x['protocol']} ({x['source']}).\n" for x in references.collections())
    header = ["spec", "source", "environment", "steps", "published", "ours after as many", "ours less theirs", "answer"]
    return (
        "## Published numbers\n\nAlike are the same version of an environment and returns of training episodes after no "
        "more steps than ours. Ours is the level after as many steps (the bin of the curve that ends there; at the end "
        "the last 100 episodes), with its 95 % interval, the difference also a share of |theirs - random policy|; level: "
        f"theirs lies in our interval.\n\n{protocols}\n"
        f"Below numbers that are alike: {'; '.join(below) or 'none'}.\n\n"
        f"Below numbers that are not: {'; '.join(unlike_below) or 'none'}.\n\n" + table(header, rows)
    )


TRAINERS = {"trl_dpo": "TRL 1.16 DPOTrainer", "trl_ppo": "TRL 1.10 PPOTrainer", "trl_grpo": "TRL 1.16 GRPOTrainer"}


def policies() -> str:
    """Policies of the small language world beside the exact optimum."""
    groups: dict[tuple[str, float], list] = {}
    for row in specs.results("policies") or ():
        peer = next((TRAINERS[kind] for kind in TRAINERS if kind in row["name"]), row["name"])
        groups.setdefault((f"{row['script']}.py" if row["script"] else peer, row["beta"]), []).append(row)
    rows = []
    for (label, beta), runs in sorted(groups.items()):
        cells = []
        for name in ("gold", "kl", "share", "proxy", "faulty"):
            values = [run[name] for run in runs if run[name] is not None]
            spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}".replace("-", "−") if values else "–")
        rows.append([label, f"{beta:g}", str(len(runs)), *cells])
    if not rows:
        return ""
    frontier = specs.BENCHMARK / "pictures" / "frontier.png"  # by run.py evaluate --picture
    picture = "![frontier of reward and KL](../pictures/frontier.png)\n\n" if frontier.exists() else ""
    header = ["trainer", "β", "seeds", "gold reward", "KL, nats", "share of J* − J_ref", "proxy", "faulty texts"]
    return (
        "## Preference optimisation beside the exact optimum\n\nOf a final policy's samples for 3,000 prompts, mean ± "
        "standard deviation over seeds (`world/evaluate_policy.py` says what the columns are; – where J* is not known "
        "well enough). Specs take the first 1,000 of these prompts, where every trainer's share is 0.01 to 0.05 "
        "higher: compare within a table only. All start from `assets/sft`, with default flags but β and seed "
        "(rlhf_ppo.py at β = 0.01: 16,384 episodes). The line of the picture is what no policy can pass, its dots are "
        "the optima π* at these β.\n\n"
        f"{picture}{table(header, rows)}"
    )


def against_peers() -> str:
    """Answers of the recorded runs against their peers."""
    rows = []
    for spec in specs.SPECS:
        ours, peer = references.ours(spec), references.peer(spec)
        for row in compare(spec, ours.seeds, peer) if ours and peer else ():
            cells = [as_text(row[x]).replace("-", "−") if x in row else "" for x in ("area", "final")]
            rows.append([spec.name, peer.name, row["measure"], *cells, f"{row['margin']:.0%}", row["answer"]])
    if not rows:
        return ""
    header = ["spec", "peer", "measure", "area", "final level", "margin", "answer"]
    return (
        "## Recorded runs against their peers\n\nDifference as a share of (peer - random policy), with its 95 % "
        "interval; above 0 is better than the peer.\n\n" + table(header, rows)
    )


def alarms() -> str:
    """How often the unchanged scripts were judged what."""
    rows = []
    for name, sizes in specs.results("alarms").items():
        for size, counts in sizes.items():
            rows.append([name, size, str(sum(counts.values())), *(str(counts[x]) for x in verdict.ANSWERS)])
    text = (
        "## False alarms\n\nRuns of the unchanged scripts with seeds that are not in the reference, judged against "
        "it in disjoint groups (`run.py run SPEC --seeds 25`, then `run.py alarms SPEC --seeds 25`). Every regression "
        "here is a false alarm.\n\n"
    )
    if not rows:
        return text + "Not measured yet.\n"
    return text + table(["spec", "seeds per repeat", "repeats", *verdict.ANSWERS], rows)


def power() -> str:
    """The smallest drop that each spec can tell."""
    rows = []
    for spec in specs.SPECS:
        ours = references.ours(spec)
        for measure in spec.measures if ours and len(ours.seeds) > 1 else ():
            row = [spec.name, measure.name, f"{measure.margin:.0%}"]
            for statistic in ("area", "final"):
                values = values_of(measure, ours.seeds, statistic)
                if values:
                    shares = [value / unit_of(measure, ours, statistic) for value in values]
                    drops = [verdict.detectable(shares, n, measure.margin) for n in spec.seeds.values()]
                    row += [f"{np.std(shares, ddof=1):.1%}", ", ".join(f"{drop:.0%}" for drop in drops)]
                else:
                    row += ["", ""]
            rows.append([*row, ", ".join(f"{tier} ({n})" for tier, n in spec.seeds.items())])
    if not rows:
        return ""
    header = ["spec", "measure", "margin", "area: spread", "area: drop seen", "final: spread", "final: drop seen",
              "with the seeds of"]  # fmt: skip
    return (
        "## What a check can see\n\nAll as shares of |reference - start|: the standard deviation of the recorded "
        "seeds, and the drop of the mean that is called a regression in four of five cases, with as many seeds as a "
        "tier has.\n\n" + table(header, rows)
    )


def learning_curves(folder: Path) -> str:
    """Draw the curves of each spec; returns Markdown that shows them two in a row."""
    cells = []
    for spec in specs.SPECS:
        known, name = references.load(spec), f"{spec.script}_{spec.task}.png"
        tags = set()
        for figures in (figures for each in known for figures in each.seeds.values()):
            tags |= {
                tag for tag, found in figures.items() if len(set(found.get("curve", []))) > 1
            }  # not logged once only
        drawn = [measure for measure in spec.measures if measure.tag in tags]
        if drawn and known[0].name == "ours":
            panels = [partial(draw_measure, spec=spec, measure=measure, known=known) for measure in drawn]
            pictures.save(folder / name, panels, (5.6, 3.3))
            cells.append(f"![{spec.script} on {spec.task}](../pictures/{name})")
    if not cells:
        return ""
    cells += [""] * (len(cells) % 2)
    rows = [cells[i : i + 2] for i in range(0, len(cells), 2)]
    note = "Lines are means over seeds, bands go from the lowest to the highest seed.\n\n"
    return "## Learning curves\n\n" + note + table(["", ""], rows)


def draw_measure(axes: Any, spec: Spec, measure: Measure, known: list[Reference]) -> None:
    """Ours and the peer's curve, the published number and the optimum."""
    groups = {}
    for reference in known:
        found = [f[measure.tag]["curve"] for f in reference.seeds.values() if "curve" in f.get(measure.tag, {})]
        if found:
            name = pictures.OURS if reference.name == "ours" else reference.name
            groups[name] = np.array(found), known[0].steps
    levels = {}
    for number in references.published(spec, known[0].steps) if measure is spec.measures[0] else ():
        if not number.unlike:
            levels[f"{number.source}, final"] = number.mean
    if measure.optimum:
        levels["best possible"] = measure.optimum()
    unit = "updates" if spec.language else "environment steps"
    pictures.draw_panel(axes, groups, f"{spec.script}.py, {spec.task}", unit, measure.name, levels)
    if not measure.higher and measure.optimum:  # what is above the first tenth of a falling loss hides the rest
        tops = [curves[:, curves.shape[1] // 10 :].max() for curves, _ in groups.values()]
        axes.set_ylim(top=measure.optimum() + 1.1 * (max(tops) - measure.optimum()))


def write(out: Path, more: list[str]) -> None:
    """results/README.md and pictures/ in the folder `out`, with the sections of other rooms at the end."""
    parts = [INTRO, tiers(), results(), learning_curves(out / "pictures"), PONG]
    parts += [against_peers(), published(), policies(), METHOD, power(), alarms(), *more]
    path = out / "results" / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(part for part in parts if part))
    print(f"wrote {path}")
