"""Lets tests import the scripts (`import ppo`) and the probe environments, here and in the processes they start."""

import gc
import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
for folder in (TESTS, TESTS.parent / "algos", TESTS.parent / "benchmark"):
    sys.path.insert(0, str(folder))
os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side
os.environ["HF_HUB_OFFLINE"] = "1"  # without it datasets counts its uses on the hub, and waits seconds for no answer


def pytest_collection_finish() -> None:
    """Keep what is imported out of garbage collections: each language run ends with one."""
    gc.collect()
    gc.freeze()


def shorter(greedy_sample):
    """Samples of four new tokens at most: few tests look at them."""

    def sample(model, tokenizer, row, max_length):
        prompt = row[0] or row[1][:8]
        return greedy_sample(model, tokenizer, row, min(max_length, len(prompt) + 4))

    return sample


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    """Let the scripts that write samples beside their evaluations write short ones."""
    for script in ("sft", "dpo"):
        if script in sys.modules:
            module = sys.modules[script]
            monkeypatch.setattr(module, "greedy_sample", shorter(module.greedy_sample))
