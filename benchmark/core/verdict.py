"""Whether runs fall short of a reference: a 95 % interval of the difference of means, held against a margin.

Seeds are the samples, one number of each run: the area under its curve, or its final level. With five seeds or more on
both sides the interval is scipy's bootstrap percentile interval. That one is too narrow for few seeds: resampling loses
a factor sqrt((n - 1)/n) of the spread and knows nothing of Student's t. So it is taken at the level that makes up for
both (Hesterberg 2015, "What teachers should know about the bootstrap", expanded percentile interval). With fewer seeds
on a side, down to one, resampling says nothing of the spread: then both sides are taken to have the same, estimated
from all seeds together (Student's t with pooled variance; with one seed of ours, a prediction interval).

tests/test_benchmark.py simulates how often either is wrong.
"""

from collections.abc import Sequence

import numpy as np
from scipy.stats import bootstrap, norm, t

LEVEL = 0.95
ENOUGH = 5  # seeds on each side from which the bootstrap is used
ANSWERS = ("pass", "inconclusive", "regression")  # from best to worst


def expanded(seeds: int, freedom: int) -> float:
    """Level at which a percentile interval of means covers as much as a t interval of level LEVEL would."""
    quantile = t.ppf((1 + LEVEL) / 2, freedom) * (seeds / (seeds - 1)) ** 0.5
    return float(1 - 2 * norm.sf(quantile))


def difference(ours: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """Mean of ours (n,) less mean of the reference (m,), and the ends of its 95 % interval."""
    a, b = np.asarray(ours, float), np.asarray(reference, float)
    n, m = len(a), len(b)
    gap = float(a.mean() - b.mean())
    if min(n, m) >= ENOUGH:
        found = bootstrap(
            (a, b), lambda x, y, axis: x.mean(axis) - y.mean(axis), method="percentile", n_resamples=20_000, rng=0,
            confidence_level=expanded(min(n, m), n + m - 2),
        ).confidence_interval  # fmt: skip
        return gap, float(found.low), float(found.high)
    if n + m < 3:
        return gap, -np.inf, np.inf
    variance = (a.var() * n + b.var() * m) / (n + m - 2)
    half = float(t.ppf((1 + LEVEL) / 2, n + m - 2) * (variance * (1 / n + 1 / m)) ** 0.5)
    return gap, gap - half, gap + half


def detectable(reference: Sequence[float], seeds: int, margin: float) -> float:
    """How far the mean of so many seeds must lie below the reference's (m,) to be called a regression in 4 of 5 cases.

    By pooled variance, with the reference's spread on both sides.
    """
    m = len(reference)
    freedom = seeds + m - 2
    error = float(np.std(reference, ddof=1)) * (1 / seeds + 1 / m) ** 0.5
    return margin + float(t.ppf((1 + LEVEL) / 2, freedom) + t.ppf(0.8, freedom)) * error


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of one sample (n,) and the ends of its 95 % interval, by the same rules."""
    x = np.asarray(values, float)
    if len(x) >= ENOUGH and x.std() > 0:
        found = bootstrap(
            (x,), np.mean, method="percentile", n_resamples=20_000, rng=0,
            confidence_level=expanded(len(x), len(x) - 1),
        ).confidence_interval  # fmt: skip
        return float(x.mean()), float(found.low), float(found.high)
    half = t.ppf((1 + LEVEL) / 2, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5 if len(x) > 1 else np.inf
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


def answer(low: float, high: float, margin: float) -> str:
    """Regression when the whole interval lies below -margin, pass when it lies above, else inconclusive."""
    return "regression" if high < -margin else "pass" if low > -margin else "inconclusive"


def worst(answers: Sequence[str]) -> str:
    """The worst of several answers."""
    return max(answers, key=ANSWERS.index)
