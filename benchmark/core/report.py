"""Writes benchmark/README.md and its pictures from what is recorded: references, false alarms, planted faults."""

import json
import math
from pathlib import Path
from typing import Any

import curves
import faults
import growth
import numpy as np
import specs
import speed
import verdict
from run import Reference, as_text, compare, error, finished, key, load_references, unit_of, values_of
from specs import HERE, Measure, Spec

ALARMS = HERE / "alarms.json"
POLICIES = HERE / "policies.json"  # written by evaluate_policy.py --json
FRONTIER = "pictures/frontier.png"  # and --picture
PICTURES = "pictures"
INTRO = """# The benchmark

Written by `python benchmark/run.py report` from `reference/` and the measurements in `*.json`: do not edit.

```bash
python benchmark/run.py list                 # what there is to run, how long it takes, what has been run
python benchmark/run.py run                  # quick tier: all nine scripts; starts what is missing, then answers
python benchmark/run.py run --tier full      # five seeds of everything
python benchmark/run.py check --tier full    # the answers again
```

The exit status is 1 when a spec regressed or a run failed. `run.py --help` names the other commands, `specs.py` holds
the table of specs. A finished run is not repeated while the script, its flags, assets and packages stay the same, and
one that was cut off goes on from its checkpoint.
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


def published_row(spec: Spec) -> dict[str, Any] | None:
    """The row of published.json that a spec names."""
    if not spec.published:
        return None
    collection, script = spec.published
    rows = json.loads((specs.REFERENCE / "published.json").read_text())[collection]["rows"]
    envs = (spec.task, f"{spec.task}NoFrameskip-v4")
    return next(row for row in rows if row["script"] == script and row["env"] in envs)


def published_name(spec: Spec) -> str:
    """Where that row is from."""
    return {"cleanrl": "CleanRL's docs", "rl_zoo": "RL Zoo"}[spec.published[0]]


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
        number, seconds, known = sum(spec.seeds[tier] for spec in chosen), 0.0, True
        for spec in chosen:
            path = specs.REFERENCE / "ours" / f"{spec.name}.json"
            known &= path.exists()
            if path.exists():
                runs = json.loads(path.read_text())["seeds"].values()
                seconds += spec.seeds[tier] * float(np.mean([run["seconds"] for run in runs if run["seconds"]]))
        time = f"{seconds / 120:.0f} min" if known else "not measured: no GPU" if tier == "gpu" else "not measured yet"
        rows.append([tier, ", ".join(f"{spec.name} ({spec.seeds[tier]})" for spec in chosen), str(number), time])
    return (
        "## Tiers\n\nThe time is that of the recorded runs, which ran two at a time on two cores, evaluation "
        "included (resumed runs: the mean of their spec's others).\n\n" + table(["tier", "specs (seeds)", "runs", "time"], rows) + "\nThe quick tier is not part of "
        "`.ci/run`, whose tests take up to 20 of the 25 minutes that CI should take, and notice every fault below without "
        "a learning curve. It is for whoever changes a script.\n"
    )


def results() -> str:
    """Final levels and areas of ours and of peers, beside published numbers and optima."""
    rows = []
    for spec in specs.SPECS:
        references = {reference.name: reference for reference in load_references(spec)}
        ours = references.pop("ours", None)
        published = published_row(spec)
        for number, measure in enumerate(spec.measures):
            cells = two_cells(measure, ours) if ours else ["not recorded yet", ""]
            cells += two_cells(measure, *references.values()) if references else ["", ""]
            said = ""
            if published and number == 0:
                said = f"{published['mean']:g} ± {published['std']:g} ({published_name(spec)})".replace("-", "−")
            best = shown(measure.optimum()) if measure.optimum else ""
            steps = f"{ours.steps:,}" if ours else ""
            seeds = str(len(ours.seeds)) if ours else ""
            label = [spec.name, steps, seeds] if number == 0 else ["", "", ""]
            rows.append([*label, measure.name, *cells, said, best])
    header = ["spec", "steps", "seeds", "measure", "ours: final", "ours: area", "peer: final", "peer: area"]
    header += ["published", "best possible"]
    return (
        "## Results\n\nMeans over seeds with 95 % intervals. Published numbers follow protocols of their own "
        "(`reference/published.json`).\n\n" + table(header, rows)
    )


def policies() -> str:
    """Policies of the small language world beside the exact optimum."""
    found = json.loads(POLICIES.read_text()) if POLICIES.exists() else []
    groups = {}
    for row in found:
        peer = "TRL 1.16 DPOTrainer" if "trl_dpo" in row["name"] else "TRL 1.10 PPOTrainer"
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
    picture = f"![frontier of reward and KL]({FRONTIER})\n\n" if (HERE / FRONTIER).exists() else ""
    header = ["trainer", "β", "seeds", "gold reward", "KL, nats", "share of J* − J_ref", "proxy", "faulty texts"]
    return (
        "## Preference optimisation beside the exact optimum\n\nOf samples of the final policies, mean ± standard "
        "deviation over seeds (`evaluate_policy.py`, which says what the columns are; – where J* is not known well "
        "enough). All start from `assets/sft`, with default flags but β and seed (rlhf_ppo.py at β = 0.01: 16,384 "
        "episodes). The line of the picture is what no policy can pass, its dots are the optima π* at these β.\n\n" + picture + table(header, rows)
    )


def against_peers() -> str:
    """Answers of the recorded runs against their peers."""
    rows = []
    for spec in specs.SPECS:
        references = load_references(spec)
        if len(references) < 2 or references[0].name != "ours":
            continue
        ours, *peers = references
        for peer in peers:
            for row in compare(spec, ours.seeds, peer):
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
    found = json.loads(ALARMS.read_text()) if ALARMS.exists() else {}
    rows = []
    for name, sizes in found.items():
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
        for reference in load_references(spec):
            if reference.name != "ours" or len(reference.seeds) < 2:
                continue
            for measure in spec.measures:
                row = [spec.name, measure.name, f"{measure.margin:.0%}"]
                for statistic in ("area", "final"):
                    values = values_of(measure, reference.seeds, statistic)
                    if values:
                        shares = [value / unit_of(measure, reference, statistic) for value in values]
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


def planted() -> str:
    """Which test or spec noticed each planted fault, and by how much."""
    found = json.loads(faults.RESULTS.read_text()) if faults.RESULTS.exists() else {}
    rows, red, curves_red = [], 0, []
    for fault in faults.FAULTS:
        result = found.get(fault.name)
        if result is None:
            rows.append([fault.name, fault.scripts.replace(" ", ", "), "not measured yet", "", ""])
            continue
        noticed = result["answer"] == "red"
        red += noticed
        test = result["test"] if noticed else f"**nothing** ({result['answer']})"
        spec = result.get("spec")
        curve = f"{fault.spec}: {spec['answer']} ({spec['effect']})" if spec else ""
        curves_red += [spec["answer"] == "regression" or spec["answer"] == "the run failed"] if spec else []
        rows.append([fault.name, fault.scripts.replace(" ", ", "), f"`{test}`" if noticed else test,
                     f"`{result['effect']}`" if noticed else "", curve])  # fmt: skip
    total = f"{len(faults.FAULTS)} mistakes, planted one by one by `run.py faults` in copies: tests noticed {red}"
    if curves_red:
        total += f"; of the {len(curves_red)} that were also run as a spec, its curves alone noticed {sum(curves_red)}"
    header = ["fault", "scripts", "first test to turn red", "by how much", "learning curve"]
    return f"## Planted faults\n\n{total}. {faults.GAPS}\n\n" + table(header, rows)


def speeds() -> str:
    """Ratios of our speeds and the peers'."""
    found = json.loads(speed.RESULTS.read_text()) if speed.RESULTS.exists() else {}
    rows = []
    for script, row in found.items():
        ours, peer = map(np.median, zip(*row["pairs"]))
        ratios = sorted(a / b for a, b in row["pairs"])
        rows.append([f"{script}.py", f"{row['peer']}", f"{ours:,.0f} {row['unit']}", f"{peer:,.0f} {row['unit']}",
                     f"**{np.median(ratios):.2f}**", f"{ratios[0]:.2f} to {ratios[-1]:.2f}", str(len(ratios))])  # fmt: skip
    if not rows:
        return ""
    header = ["script", "peer", "ours", "peer's", "median ratio", "lowest and highest", "pairs"]
    return (
        "## Speed beside the peers\n\nSame work, same settings, one thread, in turns on the same machine "
        "(`run.py speed SCRIPT --peer-python ...`); start-up is not counted. Medians; only ratios mean something "
        "elsewhere.\n\n" + table(header, rows)
    )


def growing() -> str:
    """Time and memory as sizes double."""
    found = json.loads(growth.RESULTS.read_text()) if growth.RESULTS.exists() else {}
    rows = []
    for row in growth.ROWS:
        sizes = found.get(row.name, {})
        cells = [f"{size}: {x['speed']:,.0f} {growth.unit(row)}, {x['gigabytes']:.2f} GB" for size, x in sizes.items()]
        rows += [[f"{row.script}.py", f"{row.what} (`{row.flag}`)" if row.flag else row.what, *cells]] if cells else []
    if not rows:
        return ""
    header = ["script", "what doubles", "", "", "", ""]
    return (
        "## How cost grows\n\nSpeed at the end of short runs on one thread and peak resident memory, libraries "
        "included (`run.py growth`; what each row runs is in `growth.py`). The machine had other work: compare within a "
        "row.\n\n" + table(header, rows)
    )


def pictures(out: Path) -> str:
    """Draw the curves of each spec; returns Markdown that shows them two in a row."""
    cells = []
    for spec in specs.SPECS:
        references, name = load_references(spec), f"{PICTURES}/{spec.script}_{spec.task}.png"
        if references and references[0].name == "ours" and draw(spec, references, out / name):
            cells.append(f"![{spec.script} on {spec.task}]({name})")
    if not cells:
        return ""
    cells += [""] * (len(cells) % 2)
    rows = [cells[i : i + 2] for i in range(0, len(cells), 2)]
    note = "Lines are means over seeds, bands go from the lowest to the highest seed.\n\n"
    return "## Learning curves\n\n" + note + table(["", ""], rows)


def draw(spec: Spec, references: list[Reference], path: Path) -> bool:
    """A panel for each measure that has a curve; whether there is any."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = [m for m in spec.measures if any("curve" in f.get(m.tag, {}) for r in references for f in r.seeds.values())]
    if not drawn:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = min(2, len(drawn))
    lines = math.ceil(len(drawn) / columns)
    figure, panels = plt.subplots(lines, columns, figsize=(5.6 * columns, 3.3 * lines), dpi=110, squeeze=False)
    for axes in panels.flat[len(drawn) :]:
        axes.axis("off")
    for axes, measure in zip(panels.flat, drawn):
        draw_measure(axes, spec, measure, references)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return True


def draw_measure(axes: Any, spec: Spec, measure: Measure, references: list[Reference]) -> None:
    """Ours and the peer's curve, the published number and the optimum."""
    groups = {}
    for reference in references:
        found = [f[measure.tag]["curve"] for f in reference.seeds.values() if "curve" in f.get(measure.tag, {})]
        if found:
            groups[curves.OURS if reference.name == "ours" else reference.name] = {"curves": np.array(found)}
    levels = {}
    if measure is spec.measures[0] and (published := published_row(spec)):
        levels[f"{published_name(spec)}, final"] = published["mean"]
    if measure.optimum:
        levels["best possible"] = measure.optimum()
    unit = "updates" if spec.language else "environment steps"
    curves.draw_panel(axes, groups, references[0].steps, f"{spec.script}.py, {spec.task}", unit, levels)
    axes.set_ylabel(measure.name)
    if not measure.higher and measure.optimum:  # what is above the first tenth of a falling loss hides the rest
        tops = [group["curves"][:, curves.BINS // 10 :].max() for group in groups.values()]
        axes.set_ylim(top=measure.optimum() + 1.1 * (max(tops) - measure.optimum()))


def write(out: Path) -> None:
    """README.md and pictures in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    parts = [INTRO, tiers(), results(), pictures(out), against_peers(), policies(), METHOD, power(), alarms(), planted(), speeds(),
             growing()]
    (out / "README.md").write_text("\n".join(part for part in parts if part))
    print(f"wrote {out / 'README.md'}")


# --- false alarms ---


def measure_alarms(chosen: list[tuple[Spec, int]], runs: Path) -> None:
    """Judge groups of finished runs that are not in the reference, and keep the counts for the report."""
    kept = json.loads(ALARMS.read_text()) if ALARMS.exists() else {}
    for spec, number in chosen:
        path = specs.REFERENCE / "ours" / f"{spec.name}.json"
        if not path.exists() or json.loads(path.read_text())["key"] != key(spec):
            error(f"{spec.name}: no reference of the present code: run.py record {spec.name}")
        (reference,) = [each for each in load_references(spec) if each.name == "ours"]
        wanted = {spec.seed(i) for i in range(number)}
        wanted -= set(map(int, reference.seeds))
        notes = {seed: note["measures"] for seed, note in finished(spec, runs).items() if seed in wanted}
        if not notes:
            error(f"{spec.name}: all finished runs are in the reference: make more with run.py run --seeds")
        seeds, kept[spec.name] = list(notes), {}
        for size in (1, 2, 5):
            groups = [seeds[i : i + size] for i in range(0, len(seeds) - size + 1, size)]
            answers = [
                verdict.worst([row["answer"] for row in compare(spec, {s: notes[s] for s in group}, reference)])
                for group in groups
            ]
            kept[spec.name][str(size)] = {answer: answers.count(answer) for answer in verdict.ANSWERS}
            counts = ", ".join(f"{answers.count(answer)} {answer}" for answer in verdict.ANSWERS)
            print(f"{spec.name}, {len(groups)} repeats of {size} seeds: {counts}")
        ALARMS.write_text(json.dumps(kept, indent=1) + "\n")
