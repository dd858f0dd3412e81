"""How near policies come to the optimum with more data: sampled answers for rlhf_ppo and grpo, pairs for dpo.

Each point is a run of its own from the SFT model, whose learning rate falls to 0 at its end, then `run.py evaluate`.
Runs are kept, so a call that was cut off goes on.
"""

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from world import ASSETS, build_assets

ROOT = Path(__file__).resolve().parents[2]
EPISODES = (1_024, 4_096, 16_384)
PAIRS = (4_000, 16_000, 64_000)
SEED = 1
TRUE_REWARD = ("--reward-model", str(ROOT / "benchmark" / "world" / "true_reward.py:reward"))
KL_IN_REWARD = ("--kl-in", "reward", "--scale-rewards", "batch", "--learning-rate", "2e-4")
SAMPLING = {
    "rlhf_ppo, true reward": ("rlhf_ppo", *TRUE_REWARD),
    "rlhf_ppo, learned reward": ("rlhf_ppo",),
    "grpo --kl-in reward, true reward": ("grpo", *KL_IN_REWARD, *TRUE_REWARD),
    "grpo --kl-in reward, learned reward": ("grpo", *KL_IN_REWARD),
}
STYLES = ("o-", "o--", "^-", "^--", "s:")
COLOURS = ("#0072B2", "#0072B2", "#009E73", "#009E73", "#D55E00")


def draw_pairs(folder: Path) -> None:
    """Write train.jsonl: two samples of the SFT model to each prompt, and which of them a Bradley-Terry draw prefers."""
    rng = random.Random(SEED)
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "sft").eval()
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "sft")
    prompts = list(itertools.islice(build_assets.fresh_prompts(rng), max(PAIRS)))
    twice = [prompt for prompt in prompts for _ in range(2)]
    responses = build_assets.sample(model, tokenizer, twice)
    build_assets.write_rows(folder / "train.jsonl", build_assets.preference_pairs(prompts, responses, rng))


def commands(runs: Path) -> Iterator[tuple[str, int, list[str]]]:
    """Of each point: its line, its amount of data, and the script with its flags."""
    for line, flags in SAMPLING.items():
        for episodes in EPISODES:
            yield line, episodes, [*flags, "--total-episodes", str(episodes)]
    for pairs in PAIRS:
        yield "dpo", pairs, ["dpo", "--dataset", str(runs / "pairs"), "--train-split", f"train[:{pairs}]"]


def start(command: list[str]) -> None:
    """Run a Python file to its end on one thread."""
    subprocess.run([sys.executable, *command], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def share(runs: Path, run: Path, script: str, flags: list[str]) -> float:
    """Train, unless that is done, and measure the share of J* - J_ref."""
    if not (run / "model" / "config.json").exists():
        start([f"{ROOT}/algos/{script}.py", "--device", "cpu", "--seed", str(SEED), "--run-dir", str(run), *flags])
    figures = run / "evaluation.json"
    if not figures.exists():
        size = ("--prompts", "1000", "--reference-samples", "30000")
        kept = ("--golds", f"{runs}/golds.json", "--json", str(figures))
        start([f"{ROOT}/benchmark/run.py", "evaluate", str(run), *size, *kept])
    return json.loads(figures.read_text())[0]["share"]


def measure(runs: Path, results: Path) -> None:
    """Write the share of every point, by line and amount of data, to a json file."""
    if not (runs / "pairs" / "train.jsonl").exists():
        draw_pairs(runs / "pairs")
    shares: dict[str, dict[int, float]] = {}
    for line, size, (script, *flags) in commands(runs):
        name = line.replace(",", "").replace(" ", "-")
        found = share(runs, runs / f"{name}-{size}", script, flags)
        shares.setdefault(line, {})[size] = round(found, 4)
        print(f"{line}: {found:.3f} with {size:,}", flush=True)
    results.write_text(json.dumps(shares, indent=1) + "\n")


def draw(shares: dict[str, dict[str, float]], path: Path) -> None:
    """The picture of all lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    picture, axes = plt.subplots(figsize=(8, 4.5), dpi=110)
    axes.axhline(1, color="black", label="the best possible")
    for (line, points), style, colour in zip(shares.items(), STYLES, COLOURS):
        name = f"{line}: answers sampled" if line != "dpo" else "dpo: pairs"
        axes.plot([int(size) for size in points], list(points.values()), style, color=colour, label=name)
    axes.set_xscale("log", base=2)
    sizes = [1_000 * 2**k for k in range(7)]
    axes.set_xticks(sizes, [f"{size // 1000}k" for size in sizes])
    axes.set(title="the small language world: how near the optimum", xlabel="data", ylabel="share of J* − J_ref")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    picture.tight_layout()
    picture.savefig(path)
    plt.close(picture)
