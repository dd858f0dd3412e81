"""Record learning curves of Stable-Baselines3 in the format of reference/peers, one thread.

    /tmp/sb3/bin/python benchmark/peers/sb3.py ppo LunarLander-v3 300000 /tmp/sb3_ppo.json 1000 2000 3000

The arguments are the algorithm, the environment, the steps, the file (seeds that it already holds are kept), which
reference/peers takes and a spec names as its peer, and the seeds. They are 1,000 apart, because a seed s serves
environments s to s + N - 1. Settings are those of RL Baselines3 Zoo (rl_zoo.json), or 8 environments and the library's
defaults. Install it from sb3_requirements.txt.
"""

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

DEFAULTS = {"num_envs": 8, "normalize": False, "model": {}}


def linear(start: float) -> Callable[[float], float]:
    """A learning rate that falls to 0."""
    return lambda progress_remaining: progress_remaining * start


class Episodes(BaseCallback):
    """Notes time step and return of every episode that ends within the steps, which PPO fills up to whole rollouts."""

    def __init__(self) -> None:
        super().__init__()
        self.curve = {"step": [], "return": []}

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info and self.num_timesteps <= int(steps):
                self.curve["step"].append(self.num_timesteps)
                self.curve["return"].append(info["episode"]["r"])
        return True


algorithm, env_id, steps, path, *seeds = sys.argv[1:]
torch.set_num_threads(1)
zoo = json.loads((Path(__file__).parent / "rl_zoo.json").read_text())
found = zoo.get(f"{algorithm}-{env_id}", DEFAULTS)
settings = found["model"]
if isinstance(settings.get("learning_rate"), str):
    settings["learning_rate"] = linear(float(settings["learning_rate"].removeprefix("lin_")))
done = json.loads(Path(path).read_text())["seeds"] if Path(path).exists() else {}
for seed in seeds:
    envs = make_vec_env(env_id, found["num_envs"], seed=int(seed))
    if found["normalize"]:
        envs = VecNormalize(envs, gamma=settings["gamma"])
    kind = {"ppo": PPO, "a2c": A2C, "dqn": DQN}[algorithm]
    model = kind("MlpPolicy", envs, device="cpu", seed=int(seed), **settings)
    episodes = Episodes()
    model.learn(int(steps), callback=episodes)
    done[seed] = episodes.curve
    record = {"library": f"Stable-Baselines3 {version('stable-baselines3')}"}
    record["script"] = f"{algorithm.upper()}, {'RL Zoo settings' if settings else 'defaults'}, benchmark/peers/sb3.py"
    record["env"] = env_id
    record["total_steps"] = int(steps)
    if "steps" in found:
        record["tuned_for_steps"] = found["steps"]
    record["versions"] = {package: version(package) for package in ("gymnasium", "torch", "numpy")}
    record["what"] = "every finished training episode: time step at its end, undiscounted return"
    record["seeds"] = done
    Path(path).write_text(json.dumps(record, separators=(",", ":")) + "\n")
    print(f"seed {seed}: {len(episodes.curve['return'])} episodes", flush=True)
