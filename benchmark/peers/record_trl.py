"""Write what TRL's trainers reached on the small language world into reference/peers, to be compared with.

    for s in 1 2 3; do /tmp/trl/bin/python benchmark/peers/trl_reward_model.py train --seed $s > runs/trl_rm_$s; done
    python benchmark/run.py record-trl reward_model runs/trl_rm_*

    for s in 1 2 3; do /tmp/trl/bin/python benchmark/peers/trl_dpo.py train --seed $s --out runs/trl_dpo/$s; done
    for s in 1 2 3; do /tmp/trl/bin/python benchmark/peers/trl_grpo.py train --seed $s --out runs/trl_grpo/$s; done
    for s in 1 2 3; do /tmp/trl_ppo/bin/python benchmark/peers/trl_ppo.py --seed $s --out runs/trl_ppo/$s; done
    python benchmark/run.py evaluate runs/trl_dpo/* --beta 0.5 --prompts 1000 --reference-samples 30000 \\
        --golds runs/golds.json --json runs/trl_dpo.json        # prompts and samples are those of our specs
    python benchmark/run.py record-trl dpo runs/trl_dpo.json    # so grpo too, and rlhf_ppo of runs/trl_ppo/*/model

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
LOGGED = {  # tag of ours, and what the trainer calls it in the log.jsonl that its script writes
    "rlhf_ppo": {tag: tag for tag in ("objective/scores", "objective/kl", "objective/rlhf_reward")},
    "grpo": {"objective/scores": "reward"},
}


def figures(spec: specs.Spec, path: Path) -> list[Figures]:
    """Figures of each seed that a file holds, by the tags of the spec."""
    if spec.script == "reward_model":
        lines = [line for line in path.read_text().splitlines() if line.startswith("{")]
        after = json.loads(lines[-1])["after"]
        return [{"eval/accuracy": {"final": after["accuracy"]}, "eval/loss": {"final": after["loss"]}}]
    return [policy_figures(spec, row) for row in json.loads(path.read_text())]


def policy_figures(spec: specs.Spec, row: dict[str, Any]) -> Figures:
    """Figures of a policy by run.py evaluate, and curves of what the trainer logged of each update."""
    tags = [measure.tag for measure in spec.measures if measure.tag.startswith("evaluation/")]
    found = {tag: {"final": row[tag.removeprefix("evaluation/")]} for tag in tags}
    folder = Path(row["name"])
    for tag, name in LOGGED.get(spec.script, {}).items():
        log = (folder.parent if folder.name == "model" else folder) / "log.jsonl"
        lines = [json.loads(line) for line in log.open()]
        values = np.array([line[name] for line in lines if name in line])
        steps = np.arange(1, len(values) + 1)
        ones = np.ones(len(values))
        found[tag] = figures_of(steps, values, ones, len(values), 4)
    return found


def record(script: str, files: list[Path]) -> None:
    """Write the file of one trainer, from what its script or run.py evaluate wrote."""
    for path in files:
        if not path.is_file():
            raise SystemExit(f"error: {path}: no such file")
    (spec,) = (spec for spec in specs.SPECS if spec.script == script and spec.peer)
    trainer, peer, requirements = TRAINERS[script]
    pinned = (Path(__file__).parent / requirements).read_text()
    versions = dict(re.findall(r"^(\S+)==(\S+)$", pinned, re.MULTILINE))
    found = []
    for path in files:
        found += figures(spec, path)
    ours = json.loads((specs.REFERENCE / "ours" / f"{spec.name}.json").read_text())
    seeds = {str(seed): one for seed, one in enumerate(found, 1)}
    content = {
        "library": f"TRL {versions['trl']}",
        "script": f"{trainer}, benchmark/peers/{peer}",
        "date": str(date.today()),
        "versions": versions,
        "machine": f"{machine()}; one thread per run",
        "what": "of each measure the final level and, where there is one, the curve in equal bins of updates",
        "total_steps": ours["steps"],
        "seeds": seeds,
    }
    path = specs.REFERENCE / "peers" / spec.peer
    write(path, content)
    print(f"wrote {path}: {len(found)} seeds")
