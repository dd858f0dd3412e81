"""Write what TRL's trainers reached on the small language world into reference/peers, for run.py to compare with.

    for s in 1 2 3; do /tmp/trl/bin/python benchmark/trl_reward_model.py train --seed $s > runs/trl/reward_model_$s; done
    python benchmark/record_trl.py reward_model runs/trl/reward_model_*

    for s in 1 2 3; do /tmp/trl/bin/python benchmark/trl_dpo.py train --seed $s --out runs/trl_dpo_$s; done
    python benchmark/evaluate_policy.py runs/trl_dpo_* --beta 0.5 --golds runs/golds.json --json runs/trl_dpo.json
    python benchmark/record_trl.py dpo runs/trl_dpo.json

    for s in 1 2 3; do /tmp/trl_ppo/bin/python benchmark/trl_ppo.py --seed $s --out runs/trl_ppo_$s; done
    python benchmark/record_trl.py rlhf_ppo runs/trl_ppo_*/log.jsonl

    for s in 1 2 3; do /tmp/trl/bin/python benchmark/trl_grpo.py train --seed $s --out runs/trl_grpo_$s; done
    python benchmark/evaluate_policy.py runs/trl_grpo_* --beta 0.5 --prompts 1000 --reference-samples 30000 \\
        --golds runs/golds.json --json runs/trl_grpo.json
    python benchmark/record_trl.py grpo runs/trl_grpo.json  # and the log.jsonl in the folders that it names

Seeds are numbered in the order given. Run the trainers with OMP_NUM_THREADS=1 where several run side by side.
"""

import argparse
import json
import re
from datetime import date
from pathlib import Path

import numpy as np
import specs
from run import Figures, compact, error, figures_of, machine

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
    if script in ("dpo", "grpo"):
        rows = json.loads(path.read_text())
        names = ("share", "gold", "kl") if script == "dpo" else ("share", "gold")
        found = [{f"evaluation/{x}": {"final": row[x]} for x in names} for row in rows]
        return [scores_of(Path(row["name"])) | one for row, one in zip(rows, found)] if script == "grpo" else found
    if script == "reward_model":
        after = json.loads(lines[-1])["after"]
        return [{"eval/accuracy": {"final": after["accuracy"]}, "eval/loss": {"final": after["loss"]}}]
    rows = [row for row in map(json.loads, lines) if "objective/scores" in row]
    steps = np.arange(1, len(rows) + 1)
    return [{tag: figures_of(steps, np.array([row[tag] for row in rows]), np.ones(len(rows)), len(rows), 4) for tag in PPO_TAGS}]


def scores_of(folder: Path) -> Figures:
    """Score of each update that trl_grpo.py logged; less the penalty, as grpo.py logs it."""
    values = np.array([json.loads(line)["reward"] for line in (folder / "log.jsonl").open()])
    return {"objective/scores": figures_of(np.arange(1, len(values) + 1), values, np.ones(len(values)), len(values), 4)}


def main() -> None:
    """Write the file of one trainer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("script", choices=list(TRAINERS))
    parser.add_argument("files", nargs="+", type=Path, help="what the trainer's script or evaluate_policy.py wrote")
    args = parser.parse_args()
    for path in args.files:
        if not path.is_file():
            error(f"{path}: no such file")
    (spec,) = (spec for spec in specs.SPECS if spec.script == args.script)
    trainer, script, requirements = TRAINERS[args.script]
    versions = dict(re.findall(r"^(\S+)==(\S+)$", (specs.HERE / requirements).read_text(), re.MULTILINE))
    found = [one for path in args.files for one in figures(args.script, path)]
    record = {
        "library": f"TRL {versions['trl']}",
        "script": f"{trainer}, benchmark/{script} train",
        "date": str(date.today()),
        "versions": versions,
        "machine": f"{machine()}; one thread per run",
        "what": "of each measure the final level and, where there is one, the curve in equal bins of updates",
        "total_steps": json.loads((specs.REFERENCE / "ours" / f"{spec.name}.json").read_text())["steps"],
        "seeds": {str(seed): one for seed, one in enumerate(found, 1)},
    }
    path = specs.REFERENCE / "peers" / spec.peer
    path.write_text(compact(json.dumps(record, indent=1)) + "\n")
    print(f"wrote {path}: {len(found)} seeds")


if __name__ == "__main__":
    main()
