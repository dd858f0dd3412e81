"""Whether runs fall short of a reference: a 95 % interval of the difference of means, held against a margin.

Seeds are the samples, one number of each run: the area under its curve, or its final level. With five seeds or more on
both sides the interval is scipy's bootstrap percentile interval. That one is too narrow for few seeds: resampling loses
a factor sqrt((n - 1)/n) of the spread and knows nothing of Student's t. So it is taken at the level that makes up for
both (Hesterberg 2015, "What teachers should know about the bootstrap", expanded percentile interval). With fewer seeds
on a side, down to one, resampling says nothing of the spread: then both sides are taken to have the same, estimated
from all seeds together (Student's t with pooled variance; with one seed of ours, a prediction interval).

tests/test_benchmark.py simulates how often either is wrong.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import bootstrap, norm, t

from core import references, specs
from core.curves import Figures
from core.references import Reference
from core.runs import finished, key
from core.specs import Measure, Spec

LEVEL = 0.95
ENOUGH = 5  # seeds on each side from which the bootstrap is used
ANSWERS = ("pass", "inconclusive", "regression")  # from best to worst


def expanded(seeds: int, freedom: int) -> float:
    """Level at which a percentile interval of means covers as much as a t interval of level LEVEL would."""
    quantile = t.ppf((1 + LEVEL) / 2, freedom) * (seeds / (seeds - 1)) ** 0.5
    return float(1 - 2 * norm.sf(quantile))


def gap_of_means(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
    """Mean of one sample less mean of the other, of each resample."""
    return a.mean(axis) - b.mean(axis)


def resampled_ends(samples: tuple[np.ndarray, ...], statistic: Callable, level: float) -> tuple[float, float]:
    """Ends of the bootstrap's percentile interval of a statistic."""
    found = bootstrap(samples, statistic, method="percentile", n_resamples=20_000, rng=0, confidence_level=level)
    interval = found.confidence_interval
    return float(interval.low), float(interval.high)


def difference(ours: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """Mean of ours (n,) less mean of the reference (m,), and the ends of its 95 % interval."""
    a = np.asarray(ours, float)
    b = np.asarray(reference, float)
    n = len(a)
    m = len(b)
    gap = float(a.mean() - b.mean())
    freedom = n + m - 2
    if min(n, m) >= ENOUGH:
        level = expanded(min(n, m), freedom)
        return gap, *resampled_ends((a, b), gap_of_means, level)
    if freedom < 1:
        return gap, -np.inf, np.inf
    variance = (a.var() * n + b.var() * m) / freedom
    error = (variance * (1 / n + 1 / m)) ** 0.5
    half = float(t.ppf((1 + LEVEL) / 2, freedom) * error)
    return gap, gap - half, gap + half


def detectable(reference: Sequence[float], seeds: int, margin: float) -> float:
    """How far the mean of so many seeds must lie below the reference's (m,) to be called a regression in 4 of 5 cases.

    By pooled variance, with the reference's spread on both sides.
    """
    m = len(reference)
    freedom = seeds + m - 2
    error = float(np.std(reference, ddof=1)) * (1 / seeds + 1 / m) ** 0.5
    errors = t.ppf((1 + LEVEL) / 2, freedom) + t.ppf(0.8, freedom)
    return margin + float(errors) * error


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of one sample (n,) and the ends of its 95 % interval, by the same rules."""
    x = np.asarray(values, float)
    n = len(x)
    mean = float(x.mean())
    if n >= ENOUGH and x.std() > 0:
        level = expanded(n, n - 1)
        return mean, *resampled_ends((x,), np.mean, level)
    if n < 2:
        return mean, -np.inf, np.inf
    quantile = t.ppf((1 + LEVEL) / 2, n - 1)
    half = float(quantile * x.std(ddof=1) / n**0.5)
    return mean, mean - half, mean + half


def answer(low: float, high: float, margin: float) -> str:
    """Regression when the whole interval lies below -margin, pass when it lies above, else inconclusive."""
    return "regression" if high < -margin else "pass" if low > -margin else "inconclusive"


def worst(answers: Sequence[str]) -> str:
    """The worst of several answers."""
    return max(answers, key=ANSWERS.index)


# --- runs against references ---


def values_of(measure: Measure, seeds: dict[Any, Figures], statistic: str) -> list[float]:
    """Area or final level of each seed that has the measure."""
    figures = [each[measure.tag] for each in seeds.values() if measure.tag in each]
    if statistic == "final":
        return [each["final"] for each in figures]
    return [float(np.mean(each["curve"])) for each in figures if "curve" in each]


def unit_of(measure: Measure, reference: Reference, statistic: str) -> float:
    """|reference - start|, what margins and differences are shares of."""
    start = measure.start
    if start is None:
        first = [each[measure.tag]["curve"][0] for each in reference.seeds.values()]
        start = float(np.mean(first))
    level = float(np.mean(values_of(measure, reference.seeds, statistic)))
    return max(abs(level - start), 1e-9)


def compare(spec: Spec, ours: dict[int, Figures], reference: Reference) -> list[dict[str, Any]]:
    """One row per measure: for area and final level the difference as share of (reference - start), and the answer."""
    found = []
    for measure in spec.measures:
        row: dict[str, Any] = {"spec": spec.name, "measure": measure.name, "reference": reference.name, "answers": {}}
        for statistic in ("area", "final"):
            a = values_of(measure, ours, statistic)
            b = values_of(measure, reference.seeds, statistic)
            if not a or not b:
                continue
            unit = unit_of(measure, reference, statistic) * (1 if measure.higher else -1)
            gap, *ends = (x / unit + 0.0 for x in difference(a, b))  # + 0.0: no negative zeros
            row[statistic] = [gap, min(ends), max(ends)]  # above 0 is better than the reference
            row["answers"][statistic] = answer(min(ends), max(ends), measure.margin)
        if row["answers"]:
            row["margin"] = measure.margin
            row["answer"] = worst(list(row["answers"].values()))
            row["seeds"] = [len(ours), len(reference.seeds)]
            found.append(row)
    return found


def check(chosen: list[tuple[Spec, int]], runs: Path, failed: dict[str, str]) -> tuple[int, list[dict[str, Any]]]:
    """Print how the runs of each spec compare with its references; returns exit status and rows."""
    line = "{:25} {:22} {:24} {:7} {:24} {:24} {}"
    print("differences as shares of |reference - start| with 95 % intervals; above 0 is better than the reference")
    print(line.format("spec", "measure", "reference", "seeds", "area", "final level", "answer"))
    rows = []
    faults = [f"{run}: {fault}" for run, fault in failed.items()]
    unreferenced = []
    for spec, number in chosen:
        wanted = {spec.seed(i) for i in range(number)}
        notes = {seed: note for seed, note in finished(spec, runs).items() if seed in wanted}
        compared = references.load(spec)
        if not notes:
            faults.append(f"{spec.name}: no finished run")
        elif not compared:
            unreferenced.append(spec.name)
        for reference in compared if notes else ():
            steps = {note["steps"] for note in notes.values()}
            if steps != {reference.steps}:
                faults.append(f"{spec.name}: runs of {steps.pop()} steps, but of {reference.steps} in {reference.name}")
                continue
            for row in compare(spec, {seed: note["measures"] for seed, note in notes.items()}, reference):
                rows.append(row)
                shown = [as_text(row[name]) if name in row else "–" for name in ("area", "final")]
                seeds = "{} vs {}".format(*row["seeds"])
                said = f"{row['answer']} (margin {row['margin']:.0%})"
                print(line.format(spec.name, row["measure"], row["reference"], seeds, *shown, said))
    regressed = sorted({row["spec"] for row in rows if row["answer"] == "regression"})
    unsure = sorted({row["spec"] for row in rows if row["answer"] == "inconclusive"} - set(regressed))
    if unsure:
        print(f"inconclusive: {', '.join(unsure)}; give more --seeds")
    if unreferenced:
        print(f"without a reference, not judged: {', '.join(unreferenced)} (run.py record)")
    for fault in faults:
        print(f"FAILED: {fault}")
    if regressed:
        print(f"REGRESSION: {', '.join(regressed)}")
    return int(bool(regressed or faults)), rows


def as_text(interval: list[float]) -> str:
    """A share with its interval in per cent."""
    return "{:+.1f} [{:+.1f}, {:+.1f}] %".format(*(100 * x for x in interval))


# --- false alarms ---


def measure_alarms(chosen: list[tuple[Spec, int]], runs: Path) -> None:
    """Judge groups of finished runs that are not in the reference, and keep the counts for the report."""
    kept = specs.results("alarms")
    for spec, number in chosen:
        reference = references.ours(spec)
        if not reference or reference.key != key(spec):
            raise SystemExit(f"error: {spec.name}: no reference of the present code: run.py record {spec.name}")
        wanted = {spec.seed(i) for i in range(number)}
        wanted -= set(map(int, reference.seeds))
        notes = {seed: note["measures"] for seed, note in finished(spec, runs).items() if seed in wanted}
        if not notes:
            raise SystemExit(f"error: {spec.name}: all finished runs are in the reference: more by run.py run --seeds")
        seeds, kept[spec.name] = list(notes), {}
        for size in (1, 2, 5):
            starts = range(0, len(seeds) - size + 1, size)
            groups = [seeds[start : start + size] for start in starts]
            answers = []
            for group in groups:
                ours = {seed: notes[seed] for seed in group}
                rows = compare(spec, ours, reference)
                answers.append(worst([row["answer"] for row in rows]))
            kept[spec.name][str(size)] = {answer: answers.count(answer) for answer in ANSWERS}
            counts = ", ".join(f"{answers.count(answer)} {answer}" for answer in ANSWERS)
            print(f"{spec.name}, {len(groups)} repeats of {size} seeds: {counts}")
        specs.keep("alarms", kept)
