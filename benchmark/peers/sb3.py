"""Record learning curves of Stable-Baselines3 in the format of reference/peers, one thread.

    /tmp/sb3/bin/python benchmark/peers/sb3.py ppo LunarLander-v3 300000 /tmp/sb3_ppo.json 1000 2000 3000

The arguments are the algorithm, the environment, the steps, the file (seeds that it already holds are kept), which
reference/peers takes and a spec names as its peer, and the seeds. They are 1,000 apart, because a seed s serves
environments s to s + N - 1. Settings are those of RL Baselines3 Zoo (hyperparams/a2c.yml at commit c6c209e, ppo.yml at
208b6fd, dqn.yml at ce95481; of LunarLander-v2, since its discrete version has no newer ones); without a row in ZOO, 8
environments and the library's defaults. Install it from sb3_requirements.txt.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize


def linear(start: float) -> object:
    """A learning rate that falls to 0, the zoo's lin_<start>."""
    return lambda progress_remaining: progress_remaining * start


ZOO = {  # environments, whether they are normalised, the model's arguments
    ("ppo", "LunarLander-v3"): (  # 1,000,000 steps there
        16,
        False,
        {"n_steps": 1024, "batch_size": 64, "gae_lambda": 0.98, "gamma": 0.999, "n_epochs": 4, "ent_coef": 0.01},
    ),
    ("a2c", "LunarLander-v3"): (  # 200,000 steps there
        8,
        False,
        {"gamma": 0.995, "n_steps": 5, "learning_rate": linear(0.00083), "ent_coef": 0.00001},
    ),
    ("dqn", "LunarLander-v3"): (  # 100,000 steps there
        1,
        False,
        {"learning_rate": 6.3e-4, "batch_size": 128, "buffer_size": 50_000, "learning_starts": 0, "gamma": 0.99}
        | {"target_update_interval": 250, "train_freq": 4, "gradient_steps": -1, "exploration_fraction": 0.12}
        | {"exploration_final_eps": 0.1, "policy_kwargs": {"net_arch": [256, 256]}},
    ),
    ("ppo", "Pendulum-v1"): (  # 100,000 steps there
        4,
        False,
        {"n_steps": 1024, "gae_lambda": 0.95, "gamma": 0.9, "n_epochs": 10, "ent_coef": 0.0, "learning_rate": 1e-3}
        | {"clip_range": 0.2, "use_sde": True, "sde_sample_freq": 4},
    ),
    ("a2c", "Pendulum-v1"): (  # 1,000,000 steps there
        8,
        True,
        {"ent_coef": 0.0, "max_grad_norm": 0.5, "n_steps": 8, "gae_lambda": 0.9, "vf_coef": 0.4, "gamma": 0.9}
        | {"use_rms_prop": True, "normalize_advantage": False, "learning_rate": linear(7e-4), "use_sde": True}
        | {"policy_kwargs": {"log_std_init": -2, "ortho_init": False}},
    ),
}


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
num_envs, normalize, settings = ZOO.get((algorithm, env_id), (8, False, {}))
done = json.loads(Path(path).read_text())["seeds"] if Path(path).exists() else {}
for seed in seeds:
    envs = make_vec_env(env_id, num_envs, seed=int(seed))
    envs = VecNormalize(envs, gamma=settings["gamma"]) if normalize else envs
    model = {"ppo": PPO, "a2c": A2C, "dqn": DQN}[algorithm]("MlpPolicy", envs, device="cpu", seed=int(seed), **settings)
    episodes = Episodes()
    model.learn(int(steps), callback=episodes)
    done[seed] = episodes.curve
    record = {
        "library": f"Stable-Baselines3 {version('stable-baselines3')}",
        "script": f"{algorithm.upper()}, {'RL Zoo settings' if settings else 'defaults'}, benchmark/peers/sb3.py",
        "env": env_id,
        "total_steps": int(steps),
        "versions": {package: version(package) for package in ("gymnasium", "torch", "numpy")},
        "what": "every finished training episode: time step at its end, undiscounted return",
        "seeds": done,
    }
    Path(path).write_text(json.dumps(record, separators=(",", ":")) + "\n")
    print(f"seed {seed}: {len(episodes.curve['return'])} episodes", flush=True)
