"""Record learning curves of Stable-Baselines3 in the format of reference/peers, one thread.

    /tmp/sb3/bin/python benchmark/peers/sb3.py ppo LunarLander-v3 300000 /tmp/sb3_ppo.json 1000 2000 3000

Seeds that the file already holds are kept. A spec names the file as its peer once it lies in reference/peers. Seeds are
1,000 apart, because a seed s serves environments s to s + N - 1. Settings are those of RL Baselines3 Zoo
(rl_zoo.json), or 8 environments and the library's defaults. Install it from sb3_requirements.txt.
"""

import argparse
import json
import time
from collections import deque
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

DEFAULTS = {"num_envs": 8, "normalize": False, "model": {}}


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithm", choices=["ppo", "a2c", "dqn"])
    parser.add_argument("env_id")
    parser.add_argument("steps", type=int)
    parser.add_argument("file", type=Path)
    parser.add_argument("seeds", nargs="+")
    parser.add_argument("--until", type=float, help="stop once the mean of the last 100 episodes is so high")
    return parser.parse_args()


def linear(start: float) -> Callable[[float], float]:
    """A value that falls to 0."""
    return lambda progress_remaining: progress_remaining * start


def settings_of(algorithm: str, env_id: str) -> dict:
    """Settings of RL Zoo for a task, as Stable-Baselines3 takes them, or the defaults."""
    zoo = json.loads((Path(__file__).parent / "rl_zoo.json").read_text())
    settings = zoo.get(f"{algorithm}-{env_id}", DEFAULTS)
    model = settings["model"]
    for name, value in model.items():
        if isinstance(value, str) and value.startswith("lin_"):
            model[name] = linear(float(value.removeprefix("lin_")))
    if "activation_fn" in model.get("policy_kwargs", {}):
        model["policy_kwargs"]["activation_fn"] = torch.nn.ReLU
    return settings


class Episodes(BaseCallback):
    """Notes step, return and seconds of every episode that ends within the steps, which PPO fills to whole rollouts."""

    def __init__(self, steps: int, until: float | None) -> None:
        super().__init__()
        self.steps = steps
        self.until = until
        self.curve = {"step": [], "return": [], "seconds": []}
        self.recent = deque(maxlen=100)
        self.start = time.perf_counter()

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info and self.num_timesteps <= self.steps:
                self.curve["step"].append(self.num_timesteps)
                self.curve["return"].append(info["episode"]["r"])
                self.curve["seconds"].append(round(time.perf_counter() - self.start, 3))
                self.recent.append(info["episode"]["r"])
        is_reached = self.until is not None and len(self.recent) == 100 and np.mean(self.recent) >= self.until
        return not is_reached


args = parse_args()
torch.set_num_threads(1)
done = json.loads(args.file.read_text())["seeds"] if args.file.exists() else {}
for seed in args.seeds:
    settings = settings_of(args.algorithm, args.env_id)
    envs = make_vec_env(args.env_id, settings["num_envs"], seed=int(seed))
    if settings["normalize"]:
        envs = VecNormalize(envs, gamma=settings["model"]["gamma"])
    kind = {"ppo": PPO, "a2c": A2C, "dqn": DQN}[args.algorithm]
    model = kind("MlpPolicy", envs, device="cpu", seed=int(seed), **settings["model"])
    episodes = Episodes(args.steps, args.until)
    model.learn(args.steps, callback=episodes)
    done[seed] = episodes.curve
    origin = "RL Zoo settings" if settings["model"] else "defaults"
    record = {"library": f"Stable-Baselines3 {version('stable-baselines3')}"}
    record["script"] = f"{args.algorithm.upper()}, {origin}, benchmark/peers/sb3.py"
    record["env"] = args.env_id
    record["total_steps"] = args.steps
    if "steps" in settings:
        record["tuned_for_steps"] = settings["steps"]
    record["versions"] = {package: version(package) for package in ("gymnasium", "torch", "numpy")}
    record["what"] = "every finished training episode: time step at its end, undiscounted return, seconds of learning"
    record["seeds"] = done
    args.file.write_text(json.dumps(record, separators=(",", ":")) + "\n")
    print(f"seed {seed}: {len(episodes.curve['return'])} episodes", flush=True)
