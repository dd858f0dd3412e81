"""Writes results/*.md and pictures/ from what is recorded: references, policies, false alarms, what other rooms add."""

import json
import math
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from core import pictures, references, specs, verdict
from core.references import Published, Reference
from core.specs import Measure, Spec
from core.verdict import ANSWERS, as_text, compare, unit_of, values_of

INTRO = """# Results of the benchmark

The main runs of every script have several seeds; a real model and Pong have one. Curves stand beside those of
CleanRL, Stable-Baselines3 or TRL where they have the algorithm, beside published numbers, and beside the best possible where
that is known. `python benchmark/run.py report` writes these pages from what is recorded in `../reference` and
`*.json`: do not edit the pages.
"""
MORE = {  # a file beside README.md: its title, and what it holds
    "published": ("Published numbers", "ours beside what others published"),
    "growth": ("Time and memory", "time until a task is learnt, speed beside the peers, and cost as sizes double"),
    "faults": ("Planted faults", "mistakes that were planted in the scripts, and the test that noticed each"),
    "method": ("Method", "how an answer is found, what a check can see, and how often it is a false alarm"),
    "tiers": ("Tiers", "what each tier runs and how long it takes"),
}
METHOD = """## How an answer is found

A curve is the mean of what was logged (the return of finished training episodes, say) in each of 50 equal bins of
steps. Its area is the mean over the bins. Its final level is the mean of the last 100 episodes (control), the last
evaluation, or the last 4 updates (RLHF). Each seed is a sample. From ours and the reference's comes a 95 % interval of
the difference of means. Its unit is |reference - start|, where the start is the level of uniformly random actions or of
the untrained model. The margin, a share of the same unit, is stated in each spec:

- **regression**: the whole interval of the area or of the final level lies below -margin;
- **pass**: both lie above -margin;
- **inconclusive**: neither; more seeds are asked for (`--seeds`).

With five or more seeds on each side the interval is scipy's bootstrap percentile interval, at a level raised for the few
samples (Hesterberg's expanded percentile interval). With fewer, as in the quick tier, resampling says nothing of the
spread. Then it is estimated from all seeds together (pooled variance; a single seed gets a prediction interval).
`tests/test_benchmark.py` simulates both. An unchanged script with normally distributed results gets an interval that
misses 0 in about 5 % of all cases, for any number of seeds. A false regression also has to clear the margin, so it is
rarer.
"""

PONG = """## Pong

`ppo.py` on ALE/Pong-v5, one seed each. The first run is recorded as the spec ppo-Pong; its curve is among those above.
The picture is of the second, which was stopped while there was more to learn.

![Pong on a GPU](../pictures/pong_on_a_gpu.png)

- Two cores, 2 M steps in 151 minutes, in two pieces by `--resume` and partly beside other jobs (275 to 330 steps per
  second alone, with `OMP_NUM_THREADS=2`): `python benchmark/run.py run ppo-Pong`. The mean score of the last 100 games
  is 12.99.
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


def two_cells(measure: Measure, reference: Reference | None) -> list[str]:
    """Final level and area of a reference."""
    if reference is None:
        return ["", ""]
    return [with_interval(values_of(measure, reference.seeds, x)) for x in ("final", "area")]


def name_of_peer(spec: Spec, peer: Reference) -> str:
    """Its library, and the budget that its settings were made for where that is another than ours."""
    record = json.loads((specs.REFERENCE / "peers" / spec.peer).read_text())
    budget = record.get("tuned_for_steps", peer.steps)
    if budget == peer.steps:
        return peer.name
    return f"{peer.name}, RL Zoo's settings for {pictures.in_words(budget)} steps"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


# --- sections ---


def minutes_of(tier: str) -> tuple[float, list[str]]:
    """Minutes of a tier on two cores by the recorded runs, and its specs without a record."""
    seconds, missing = 0.0, []
    for spec in specs.SPECS:
        if tier in spec.seeds:
            ours = references.ours(spec)
            if ours and ours.seconds:
                seconds += spec.seeds[tier] * ours.seconds
            else:
                missing.append(spec.name)
    return seconds / 120, missing


def tiers() -> str:
    """Runs and time of each tier."""
    rows = []
    for tier in specs.TIERS:
        chosen = [spec for spec in specs.SPECS if tier in spec.seeds]
        number = sum(spec.seeds[tier] for spec in chosen)
        minutes, missing = minutes_of(tier)
        time = f"{minutes:.0f} min" if minutes else "not measured"
        if minutes and missing:
            time += f" without {', '.join(missing)}"
        rows.append([tier, ", ".join(f"{spec.name} ({spec.seeds[tier]})" for spec in chosen), str(number), time])
    return (
        "The time is that of the recorded runs, which ran two at a time on two cores, evaluation included. Runs that "
        "were resumed count as the mean of their spec's others.\n\n"
        f"{table(['tier', 'specs (seeds)', 'runs', 'time'], rows)}\n"
        "The quick tier is for whoever changes a script. It is not part of `.ci/run`, whose tests find the "
        "[planted faults](faults.md) without learning curves.\n"
    )


def results() -> str:
    """Final levels and areas of ours and of peers, beside optima."""
    rows = []
    for spec in specs.SPECS:
        ours = references.ours(spec)
        peer = references.peer(spec)
        for measure in spec.measures:
            first = [spec.name, f"{ours.steps:,}", str(len(ours.seeds))] if ours else [spec.name, "", ""]
            cells = two_cells(measure, ours) if ours else ["not recorded yet", ""]
            name = name_of_peer(spec, peer) if peer and values_of(measure, peer.seeds, "final") else ""
            best = shown(measure.optimum()) if measure.optimum else ""
            label = first if measure is spec.measures[0] else ["", "", ""]
            rows.append([*label, measure.name, *cells, best, name, *two_cells(measure, peer if name else None)])
    header = ["spec", "steps", "seeds", "measure", "ours: final", "ours: area", "best possible"]
    header += ["peer, in as many steps", "peer: final", "peer: area"]
    return (
        "## Results\n\nMeans over seeds with 95 % intervals. Steps are environment steps, or updates of a language model. The best possible return is an expectation. So a greedy "
        "return, a mean of 100 episodes, may lie a little above it by chance. Gold reward is the true reward of a language model's samples, from -1 to 1 (see "
        "below); J is 3 · gold reward - β · KL.\n\n" + table(header, rows)
    )


def level_at(ours: Reference, measure: Measure, steps: int | None) -> tuple[float, float, float]:
    """Mean and 95 % interval of our seeds after so many steps, at the end where these are all or not known."""
    if not steps or steps >= ours.steps:
        return verdict.mean_interval(values_of(measure, ours.seeds, "final"))
    found = [figures[measure.tag]["curve"] for figures in ours.seeds.values()]
    last = steps * len(found[0]) // ours.steps - 1  # the bin that ends there
    return verdict.mean_interval([curve[last] for curve in found])


def in_short(number: Published) -> list[str]:
    """Steps and result of a published number."""
    spread = f" ± {number.std:g}" if number.std is not None else ""
    steps = f"{number.steps:,}" if number.steps else "not said"
    return [steps, f"{number.mean:g}{spread}".replace("-", "−")]


def highest_points() -> list[str]:
    """What Tianshou publishes, the highest point of a mean curve, of ours; theirs in brackets."""
    found = []
    for spec in specs.SPECS:
        ours = references.ours(spec)
        for number in references.published(spec, ours.steps) if ours else ():
            if number.source == "Tianshou" and number.steps == ours.steps:
                mean_curve = np.mean(curves_of(spec.measures[0], ours), axis=0)
                found.append(f"{spec.name} {mean_curve.max():,.0f} ({number.mean:,.0f})")
    return found


def published() -> str:
    """Ours beside the numbers of others: how far apart where they can be compared, and why not where they cannot."""
    rows, others, lower = [], [], []
    for spec in specs.SPECS:
        ours = references.ours(spec)
        measure = spec.measures[0]
        for number in references.published(spec, ours.steps) if ours else ():
            ours_then, low, high = level_at(ours, measure, number.steps)
            level = "{} [{}, {}]".format(*map(shown, (ours_then, low, high)))
            cells = [spec.name, number.source, number.env, *in_short(number), level]
            if number.unlike:
                others.append([*cells, number.unlike])
                continue
            share = (ours_then - number.mean) / abs(number.mean - measure.start)
            gap = f"{shown(ours_then - number.mean)} ({share:+.0%})".replace("-", "−")
            answer = "level" if low <= number.mean <= high else "above" if share > 0 else "**below**"
            rows.append([*cells, gap, answer])
            if answer == "**below**":
                lower.append(f"{spec.name}, {gap.replace('−', '')} under {number.source}")
    protocols = "".join(f"- {x['name']}: {x['protocol']} ({x['source']}).\n" for x in references.collections())
    header = ["spec", "source", "environment", "steps", "published", "ours after as many"]
    return (
        f"{protocols}\n## Numbers that can be compared\n\nThey are of the same version of an environment, and "
        "returns of training episodes, after no more steps than ours where the steps are said. Ours is the level after as many steps with "
        "its 95 % interval. The difference is also given as a share of |theirs - random policy|. Level: theirs "
        "lies in our "
        "interval.\n\n"
        f"Ours is below in {len(lower)} of {len(rows)} rows{': ' * bool(lower)}{'; '.join(lower)}.\n\n"
        + table([*header, "ours less theirs", "answer"], rows)
        + "\n## Numbers that cannot be compared\n\nThese are of another version, another protocol or a longer "
        "training. They only show what is possible.\n\n"
        + table([*header, "what differs"], others)
        + "\nTianshou's figures are the highest point of a mean curve of evaluations. The highest points of ours, over "
        f"training episodes and as many steps, with theirs in brackets: {'; '.join(highest_points())}.\n"
    )


TRAINERS = {"trl_dpo": "TRL 1.16 DPOTrainer", "trl_ppo": "TRL 1.10 PPOTrainer", "trl_grpo": "TRL 1.16 GRPOTrainer"}


def policies() -> str:
    """Policies of the small language world beside the exact optimum."""
    from world.frontier import file_of  # matplotlib is slow to import

    groups: dict[tuple[str, float], list] = {}
    for row in specs.results("policies") or ():
        peer = next((TRAINERS[kind] for kind in TRAINERS if kind in row["name"]), row["name"])
        label = file_of(row["script"]) if row["script"] else peer
        groups.setdefault((label, row["beta"]), []).append(row)
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
    picture = "![rewards against KL](../pictures/frontier.png)\n\n" if frontier.exists() else ""
    header = ["trainer", "β", "seeds", "gold reward", "KL, nats", "share of J* − J_ref", "proxy", "faulty texts"]
    return (
        "## The small language world: policies beside the exact optimum\n\nAll start from the SFT model "
        "(`benchmark/world/assets/sft`). Flags are the defaults except β and seed, with TRL's set to match. Exceptions: "
        "rlhf_ppo.py at β = 0.01 (16,384 episodes) and grpo.py --kl-in reward (--scale-rewards batch --learning-rate 2e-4). No policy can "
        "pass the black line of the picture; its dots are the best policies π* at some β. grpo.py divides the "
        "reward, but not the KL, by the spread of a group, so its β is not on the scale of the others.\n\n"
        f"{picture}The figures are of a final policy's samples for 3,000 prompts, mean ± standard deviation over "
        "seeds. Gold is the true reward. Proxy is the reward model's score, less that of the SFT model. Faulty texts are "
        "those with a sentence that no review has, with too few sentences, or without an end. A share of 0 is the SFT model, 1 the "
        'best policy there is at this β; "–" means that J* is not known well enough. The tables above are of the first 1,000 '
        "of these prompts, where every trainer's share is 0.01 to 0.05 higher: compare within a table "
        "only.\n\n"
        f"{table(header, rows)}"
    )


def against_peers() -> str:
    """Answers of the recorded runs against their peers."""
    rows = []
    for spec in specs.SPECS:
        ours = references.ours(spec)
        peer = references.peer(spec)
        for row in compare(spec, ours.seeds, peer) if ours and peer else ():
            cells = []
            for statistic in ("area", "final"):
                shown = as_text(row[statistic]) if statistic in row else ""
                cells.append(shown.replace("-", "−"))
            rows.append(
                [spec.name, name_of_peer(spec, peer), row["measure"], *cells, f"{row['margin']:.0%}", row["answer"]]
            )
    if not rows:
        return ""
    answers = [row[-1] for row in rows]
    counts = ", ".join(f"{answer} {answers.count(answer)}" for answer in ANSWERS)
    header = ["spec", "peer, in as many steps", "measure", "area", "final level", "margin", "answer"]
    return (
        f"## Does each script learn as well as its peer?\n\n{len(rows)} comparisons: {counts}. Each cell is (ours − peer) / "
        "|peer − start|, with a 95 % interval. The start is a random policy, or the model before training. Where "
        "less is better, as with a loss or KL, the sign is turned, so that above 0 ours is always better. The area is the "
        "mean over the whole training, the final level the mean at its end. Pass: all intervals shown lie above -margin. "
        "Inconclusive: these seeds cannot tell ([how this is found](method.md)). Every peer trains for as many steps as "
        "ours. Where a peer's settings were made for another number of steps, the table says for which. With "
        "that number the peer may do better.\n\n" + table(header, rows)
    )


def convergence(folder: Path) -> str:
    """Draw how near policies come to the optimum with more data; returns Markdown that shows it."""
    shares = specs.results("convergence")
    if not shares:
        return ""
    from world import convergence as room

    room.draw(shares, folder / "convergence.png")
    sizes = sorted({int(size) for points in shares.values() for size in points})
    rows = [
        [line, *(shown(points[str(size)]) if str(size) in points else "" for size in sizes)]
        for line, points in shares.items()
    ]
    return (
        "## The small language world: more data\n\nThe share of J* − J_ref against the answers sampled in training "
        "(rlhf_ppo.py, grpo.py) or the pairs (dpo.py), by `python benchmark/run.py convergence`: each point a run of "
        "its own, seed 1, 1,000 prompts. The gap between true and learned reward is what a reward model costs.\n\n"
        f"![share against data](../pictures/convergence.png)\n\n{table(['', *(f'{size:,}' for size in sizes)], rows)}"
    )


def quoted(text: str) -> str:
    """An answer of a model as one cell of a table."""
    return f"`{text.strip().replace(chr(10), ' ⏎ ').replace('`', chr(39))}`" if text.strip() else "(nothing)"


def real_model() -> str:
    """Answers of a real model before and after training on four tasks."""
    rows, samples = [], []
    for spec in specs.SPECS:
        ours = spec.is_real and references.record_of(spec)
        if not ours:
            continue
        (seed,) = ours["seeds"].values()
        answers = seed["answers"]
        measures = [f"{measure.name} {shown(seed['measures'][measure.tag]['final'])}" for measure in spec.measures[:-1]]
        rows.append([
            f"{spec.script}.py", spec.task, spec.measures[-1].name, shown(answers["before"]), shown(answers["after"]),
            f"{answers['words_before']:.0f} to {answers['words_after']:.0f}", "; ".join(measures),
            f"{seed['seconds'] / 60:.0f} min" if seed["seconds"] else "–", f"{seed['gigabytes']:.1f} GB" if seed["gigabytes"] else "–",
        ])  # fmt: skip
        samples += [
            [spec.task, *(quoted(each[name]) for name in ("asked", "before", "after"))] for each in answers["samples"]
        ]
    if not rows:
        return ""
    header = [
        "script",
        "task",
        "figure, held-out rows",
        "before",
        "after",
        "words of an answer",
        "also logged",
        "time",
        "memory",
    ]
    return (
        "## A real model\n\nSmolLM2-135M-Instruct, one run per task on one thread, in bfloat16. `../real/tasks.py` "
        "makes the data and judges the answers. Once `python benchmark/run.py smollm2` has written the model, "
        "`python benchmark/run.py run --tier real` trains and measures all four, and `python benchmark/run.py record --tier "
        "real` keeps the result. Before and after are the same held-out questions, answered by the likeliest tokens "
        "(films: by samples).\n\n"
        f"{table(header, rows)}\nThe first held-out questions and their answers (⏎ is a new line):\n\n"
        f"{table(['task', 'asked', 'before', 'after'], samples)}"
    )


def alarms() -> str:
    """How often the unchanged scripts were judged what."""
    rows = []
    for name, sizes in specs.results("alarms").items():
        for size, counts in sizes.items():
            repeats = sum(counts.values())
            cells = [str(counts[answer]) for answer in verdict.ANSWERS]
            rows.append([name, size, str(repeats), *cells])
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
        "## What a check can see\n\nAll are shares of |reference - start|. Spread is the standard deviation of the "
        "recorded seeds. Drop seen is a fall of the mean that is called a regression in four of five cases, one for each "
        "tier's number of seeds.\n\n" + table(header, rows)
    )


def learning_curves(folder: Path) -> str:
    """Draw the curves of each spec; returns Markdown that shows them two in a row."""
    cells = []
    for spec in specs.SPECS:
        known, name = references.load(spec), f"{spec.script}_{spec.task}.png"
        if not known or known[0].name != "ours":
            continue
        drawn = [measure for measure in spec.measures if has_curve(measure, known)]
        if drawn:
            panels = [partial(draw_measure, spec=spec, measure=measure, known=known) for measure in drawn]
            pictures.save(folder / name, panels, (5.6, 3.3))
            cells.append(f"![{spec.script} on {spec.task}](../pictures/{name})")
    if not cells:
        return ""
    cells += [""] * (len(cells) % 2)
    rows = [cells[i : i + 2] for i in range(0, len(cells), 2)]
    note = "Lines are means over seeds, bands go from the lowest to the highest seed.\n\n"
    return "## Learning curves\n\n" + note + table(["", ""], rows)


def curves_of(measure: Measure, reference: Reference) -> list[list[float]]:
    """The measure's curve of each seed that has one."""
    figures = [each[measure.tag] for each in reference.seeds.values() if measure.tag in each]
    return [each["curve"] for each in figures if "curve" in each]


def has_curve(measure: Measure, known: list[Reference]) -> bool:
    """Whether a reference logged the measure more than once."""
    for reference in known:
        for curve in curves_of(measure, reference):
            if len(set(curve)) > 1:
                return True
    return False


def pong(folder: Path) -> str:
    """Draw the run of Pong on a GPU; returns Markdown that shows it."""
    run = specs.results("pong")
    if not run:
        return ""
    groups = {pictures.OURS: (np.array([run["score"]]), run["steps"])}
    title = f"ppo.py, ALE/Pong-v5 on {run['machine']}: mean score, one seed"
    panel = partial(pictures.draw_panel, groups=groups, title=title, unit="environment steps", name="mean score",
                    levels={})  # fmt: skip
    pictures.save(folder / "pong_on_a_gpu.png", [panel], (7, 3.6))
    return PONG


def draw_measure(axes: Any, spec: Spec, measure: Measure, known: list[Reference]) -> None:
    """Ours and the peer's curve, the published number and the optimum."""
    groups = {}
    for reference in known:
        found = curves_of(measure, reference)
        if found:
            is_ours = reference.name == "ours"
            name = pictures.OURS if is_ours else name_of_peer(spec, reference).replace(", ", ",\n")
            groups[name] = np.array(found), known[0].steps
    levels = {}
    for number in references.published(spec, known[0].steps) if measure is spec.measures[0] else ():
        if not number.unlike:
            levels[f"{number.source}, final"] = number.mean
    for reference in known[1:]:
        if not has_curve(measure, [reference]) and values_of(measure, reference.seeds, "final"):
            levels[f"{reference.name}, final"] = mean(values_of(measure, reference.seeds, "final"))
    if measure.optimum:
        levels["best possible"] = measure.optimum()
    unit = "updates" if spec.language else "environment steps"
    title = f"{spec.script}.py, {spec.task}"
    pictures.draw_panel(axes, groups, title, unit, measure.name, levels, is_sparse=spec.language)
    if not measure.higher and measure.optimum:  # what is above the first tenth of a falling loss hides the rest
        highest = []
        for curves, _ in groups.values():
            tenth = curves.shape[1] // 10
            highest.append(curves[:, tenth:].max())
        span = max(highest) - measure.optimum()
        axes.set_ylim(measure.optimum() - 0.1 * span, measure.optimum() + 1.1 * span)


def write(out: Path, more: dict[str, str]) -> None:
    """results/*.md and pictures/ in the folder `out`; `more` are pages of other rooms."""
    folder = out / "results"
    folder.mkdir(parents=True, exist_ok=True)
    more |= {"published": published(), "tiers": tiers(), "method": f"{METHOD}\n{power()}\n{alarms()}"}
    links = []
    for name, (title, what) in MORE.items():
        (folder / f"{name}.md").write_text(f"# {title}\n\nPart of [the results](README.md).\n\n{more[name]}")
        links.append(f"- [{title}]({name}.md): {what}.\n")
    parts = [INTRO, against_peers(), results(), learning_curves(out / "pictures"), pong(out / "pictures"), policies()]
    parts += [convergence(out / "pictures"), real_model()]
    parts.append(f"## More\n\n{''.join(links)}")
    (folder / "README.md").write_text("\n".join(part for part in parts if part))
    print(f"wrote {folder}/README.md, {', '.join(f'{name}.md' for name in MORE)} and the pictures")
