"""Time a control script beside Stable-Baselines3, interleaved, and print the ratio of their steps per second.

    python -m venv /tmp/sb3 && /tmp/sb3/bin/pip install torch==2.13.0 stable-baselines3==2.9.2
    python benchmark/speed.py ppo --peer-python /tmp/sb3/bin/python

Both train on the same environment for the same number of steps with the same rollout, batch and network, one thread each,
one after the other, several times; start-up is not counted. Only ratios within a run mean something on a busy machine.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import tyro

PEER = """
import json, sys, time
import torch
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.env_util import make_vec_env
torch.set_num_threads(1)
settings = json.loads(sys.argv[1])
env = make_vec_env("CartPole-v1", settings["num_envs"], seed=1)
model = {"ppo": PPO, "a2c": A2C, "dqn": DQN}[settings["script"]]("MlpPolicy", env, device="cpu", seed=1, **settings["model"])
start = time.perf_counter()
model.learn(settings["steps"])
print(model.num_timesteps / (time.perf_counter() - start))
"""

# the peer's arguments that equal our defaults on CartPole-v1
SETTINGS = {
    "ppo": {
        "num_envs": 16,
        "model": {
            "n_steps": 32,
            "batch_size": 128,
            "n_epochs": 4,
            "learning_rate": 5e-4,
            "ent_coef": 0.01,
            "clip_range_vf": 0.2,
        },
    },
    "a2c": {"num_envs": 8, "model": {}},
    "dqn": {
        "num_envs": 5,
        "model": {
            "learning_rate": 2.5e-4,
            "buffer_size": 10_000,
            "learning_starts": 10_000,
            "batch_size": 128,
            "train_freq": 2,  # of each environment: one minibatch per 10 steps
            "gradient_steps": 1,
            "target_update_interval": 500,
            "exploration_fraction": 0.5,
            "policy_kwargs": {"net_arch": [120, 84]},
        },
    },
}


@dataclass
class Args:
    script: tyro.conf.Positional[Literal["ppo", "a2c", "dqn"]]
    """script to time"""
    peer_python: Path
    """python of an environment with stable-baselines3"""
    steps: int = 60_000
    """environment steps of each run"""
    repeats: int = 5
    """pairs of runs"""


def ours(script: str, steps: int) -> float:
    """Steps per second that the script itself logs at its end."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            Path(__file__).parents[1] / "algos" / f"{script}.py",
            "--total-timesteps",
            str(steps),
            "--eval-episodes",
            "0",
            "--device",
            "cpu",
            "--run-dir",
            f"{folder}/run",
        ]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        events = EventAccumulator(f"{folder}/run")
        events.Reload()
        return events.Scalars("charts/SPS")[-1].value


def peers(peer_python: Path, script: str, steps: int) -> float:
    """Steps per second of Stable-Baselines3 over the same number of steps."""
    settings = json.dumps(SETTINGS[script] | {"script": script, "steps": steps})
    done = subprocess.run(
        [peer_python, "-c", PEER, settings],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return float(done.stdout)


def main(args: Args) -> None:
    if not args.peer_python.exists():
        print(f"error: --peer-python {args.peer_python}: no such file", file=sys.stderr)
        raise SystemExit(2)
    pairs = []
    for i in range(args.repeats):
        pairs.append((ours(args.script, args.steps), peers(args.peer_python, args.script, args.steps)))
        print(
            f"{args.script} {i + 1}/{args.repeats}: ours {pairs[-1][0]:,.0f} steps/s, Stable-Baselines3 {pairs[-1][1]:,.0f}, "
            f"ratio {pairs[-1][0] / pairs[-1][1]:.2f}"
        )
    ratios = [a / b for a, b in pairs]
    print(
        f"median ratio {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); medians: ours "
        f"{median(a for a, _ in pairs):,.0f}, Stable-Baselines3 {median(b for _, b in pairs):,.0f} steps/s"
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.splitlines()[0]))
