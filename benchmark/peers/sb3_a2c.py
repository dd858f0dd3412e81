"""Record learning curves of Stable-Baselines3's A2C in the format of reference/peers, one thread.

    /tmp/sb3/bin/python benchmark/peers/sb3_a2c.py Acrobot-v1 200000 \\
        benchmark/reference/peers/sb3_a2c_Acrobot-v1_200k.json 1000 2000 3000 4000 5000

The arguments are the environment, the steps, the file (seeds that it already holds are kept) and the seeds. They are
1,000 apart, because a seed s serves environments s to s + 7. Install the peer from sb3_requirements.txt.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env


class Episodes(BaseCallback):
    """Notes time step and return of every episode that ends."""

    def __init__(self) -> None:
        super().__init__()
        self.curve = {"step": [], "return": []}

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                self.curve["step"].append(self.num_timesteps)
                self.curve["return"].append(info["episode"]["r"])
        return True


env_id, steps, path, *seeds = sys.argv[1:]
torch.set_num_threads(1)
done = json.loads(Path(path).read_text())["seeds"] if Path(path).exists() else {}
for seed in seeds:
    model = A2C("MlpPolicy", make_vec_env(env_id, 8, seed=int(seed)), device="cpu", seed=int(seed))
    episodes = Episodes()
    model.learn(int(steps), callback=episodes)
    done[seed] = episodes.curve
    record = {
        "library": f"Stable-Baselines3 {version('stable-baselines3')}",
        "script": "A2C('MlpPolicy', 8 environments, other defaults), benchmark/peers/sb3_a2c.py",
        "env": env_id,
        "total_steps": int(steps),
        "versions": {package: version(package) for package in ("gymnasium", "torch", "numpy")},
        "what": "every finished training episode: time step at its end, undiscounted return",
        "seeds": done,
    }
    Path(path).write_text(json.dumps(record, separators=(",", ":")) + "\n")
    print(f"seed {seed}: {len(episodes.curve['return'])} episodes", flush=True)
