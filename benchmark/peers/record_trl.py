"""Write what TRL's trainers reached on the small language world into reference/peers, to be compared with.

    for s in 1 2 3; do /tmp/trl/bin/python benchmark/peers/trl_reward_model.py train --seed $s > runs/trl_rm_$s; done
    python benchmark/run.py record-trl reward_model runs/trl_rm_*

    for s in 1 2 3; do /tmp/trl/bin/python benchmark/peers/trl_dpo.py train --seed $s --out runs/trl_dpo_$s; done
    python benchmark/run.py evaluate runs/trl_dpo_* --beta 0.5 --golds runs/golds.json --json runs/trl_dpo.json
    python benchmark/run.py record-trl dpo runs/trl_dpo.json

    for s in 1 2 3; do /tmp/trl_ppo/bin/python benchmark/peers/trl_ppo.py --seed $s --out runs/trl_ppo_$s; done
    python benchmark/run.py record-trl rlhf_ppo runs/trl_ppo_*/log.jsonl

    for s in 1 2 3; do /tmp/trl/bin/python benchmark/peers/trl_grpo.py train --seed $s --out runs/trl_grpo_$s; done
    python benchmark/run.py evaluate runs/trl_grpo_* --beta 0.5 --prompts 1000 --reference-samples 30000 \\
        --golds runs/golds.json --json runs/trl_grpo.json
    python benchmark/run.py record-trl grpo runs/trl_grpo.json  # and the log.jsonl in the folders that it names

Seeds are numbered in the order given. Run the trainers with OMP_NUM_THREADS=1 where several run side by side.
"""

import json
import re
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from core import specs
from core.curves import Figures, figures_of
from core.references import machine, write

TRAINERS = {  # with script and requirements
    "reward_model": ("RewardTrainer", "trl_reward_model.py", "trl_requirements.txt"),
    "dpo": ("DPOTrainer", "trl_dpo.py", "trl_requirements.txt"),
    "rlhf_ppo": ("PPOTrainer", "trl_ppo.py", "trl_ppo_requirements.txt"),
    "grpo": ("GRPOTrainer", "trl_grpo.py", "trl_requirements.txt"),
}
PPO_TAGS = ("objective/scores", "objective/kl", "objective/rlhf_reward")


def figures(script: str, path: Path) -> list[Figures]:
    """Figures of each seed that a file holds, by the tags of the script's spec."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("{")]
    if script == "dpo":
        return [
            {f"evaluation/{x}": {"final": row[x]} for x in ("share", "gold", "kl")}
            for row in json.loads(path.read_text())
        ]
    if script == "grpo":
        return [grpo_figures(row) for row in json.loads(path.read_text())]
    if script == "reward_model":
        after = json.loads(lines[-1])["after"]
        return [{"eval/accuracy": {"final": after["accuracy"]}, "eval/loss": {"final": after["loss"]}}]
    rows = [row for row in map(json.loads, lines) if "objective/scores" in row]
    steps, ones = np.arange(1, len(rows) + 1), np.ones(len(rows))
    values = {tag: np.array([row[tag] for row in rows]) for tag in PPO_TAGS}
    return [{tag: figures_of(steps, values[tag], ones, len(rows), 4) for tag in PPO_TAGS}]


def grpo_figures(row: dict[str, Any]) -> Figures:
    """Figures of a policy by run.py evaluate, and the score of each update that trl_grpo.py logged in its folder."""
    scores = np.array([json.loads(line)["reward"] for line in (Path(row["name"]) / "log.jsonl").open()])
    steps, ones = np.arange(1, len(scores) + 1), np.ones(len(scores))
    curve = {"objective/scores": figures_of(steps, scores, ones, len(scores), 4)}
    return curve | {f"evaluation/{name}": {"final": row[name]} for name in ("share", "gold")}


def record(script: str, files: list[Path]) -> None:
    """Write the file of one trainer, from what its script or run.py evaluate wrote."""
    for path in files:
        if not path.is_file():
            raise SystemExit(f"error: {path}: no such file")
    (spec,) = (spec for spec in specs.SPECS if spec.script == script)
    trainer, peer, requirements = TRAINERS[script]
    pinned = (Path(__file__).parent / requirements).read_text()
    versions = dict(re.findall(r"^(\S+)==(\S+)$", pinned, re.MULTILINE))
    found = [one for path in files for one in figures(script, path)]
    content = {
        "library": f"TRL {versions['trl']}",
        "script": f"{trainer}, benchmark/peers/{peer}",
        "date": str(date.today()),
        "versions": versions,
        "machine": f"{machine()}; one thread per run",
        "what": "of each measure the final level and, where there is one, the curve in equal bins of updates",
        "total_steps": json.loads((specs.REFERENCE / "ours" / f"{spec.name}.json").read_text())["steps"],
        "seeds": {str(seed): one for seed, one in enumerate(found, 1)},
    }
    path = specs.REFERENCE / "peers" / spec.peer
    write(path, content)
    print(f"wrote {path}: {len(found)} seeds")
