"""Rewards of the real model: `--reward-model benchmark/real/rewards.py:right_sum`, or `:sentiment`."""

import functools
from typing import Any


def right_sum(prompts: list[str], completions: list[str], answer: list[str], **columns: object) -> list[float]:
    """1 for a completion whose first line is the sum, else 0."""
    first_lines = [text.strip().partition("\n")[0] for text in completions]
    return [float(line == right) for line, right in zip(first_lines, answer)]


@functools.cache
def analyzer() -> Any:
    """VADER, a list of words with their sentiment and rules for negation and emphasis."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def sentiment(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """VADER's compound score of each completion, from -1 (bad) to 1 (good)."""
    return [analyzer().polarity_scores(text)["compound"] for text in completions]
