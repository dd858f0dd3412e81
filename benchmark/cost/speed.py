"""Time a script beside its peer, one after the other, several times, and print the ratio of their speeds.

    python -m venv /tmp/sb3 && /tmp/sb3/bin/pip install -r benchmark/peers/sb3_requirements.txt
    python benchmark/run.py speed ppo --peer-python /tmp/sb3/bin/python
    python -m venv /tmp/trl && /tmp/trl/bin/pip install -r benchmark/peers/trl_requirements.txt        # dpo, reward_model, grpo
    python benchmark/run.py speed dpo --peer-python /tmp/trl/bin/python
    python -m venv /tmp/trl_ppo && /tmp/trl_ppo/bin/pip install -r benchmark/peers/trl_ppo_requirements.txt  # rlhf_ppo
    python benchmark/run.py speed rlhf_ppo --peer-python /tmp/trl_ppo/bin/python

Both do the same work with the same settings, TensorBoard's curves included, one thread each; start-up is not counted. Only ratios within a run mean
something on a busy machine.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from core import curves, specs
from core.report import table

PEERS = specs.BENCHMARK / "peers"
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
# Of ppo, rlhf_ppo and dpo a whole default run; of the others a part.
STEPS = {"dqn": 60_000, "a2c": 60_000, "ppo": 500_000, "rlhf_ppo": 4096, "dpo": 499, "reward_model": 30, "grpo": 32}

SB3 = """
import json, sys, time
import torch
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.env_util import make_vec_env
torch.set_num_threads(1)
settings = json.loads(sys.argv[1])
env = make_vec_env("CartPole-v1", settings["num_envs"], seed=1)
kind = {"ppo": PPO, "a2c": A2C, "dqn": DQN}[settings["script"]]
model = kind("MlpPolicy", env, device="cpu", seed=1, tensorboard_log=settings["logs"], **settings["model"])
start = time.perf_counter()
model.learn(settings["steps"], log_interval=settings["log_interval"])
print(model.num_timesteps / (time.perf_counter() - start))
"""

# the peer's arguments that equal our defaults on CartPole-v1; both log about every 1,000 steps
SETTINGS = {
    "ppo": {
        "num_envs": 16,
        "log_interval": 2,  # rollouts of 512
        "model": {
            "n_steps": 32,
            "batch_size": 256,
            "n_epochs": 4,
            "learning_rate": 1e-3,
            "ent_coef": 0.01,
            "gamma": 0.98,
        },
    },
    "a2c": {"num_envs": 16, "log_interval": 12, "model": {"learning_rate": 1e-3}},
    "dqn": {
        "num_envs": 20,
        "log_interval": 20,  # episodes
        "model": {
            "learning_rate": 5e-4,
            "gamma": 0.995,
            "max_grad_norm": 1e9,  # which clips nothing
            "buffer_size": 20_000,
            "learning_starts": 1_000,
            "batch_size": 128,
            "train_freq": 1,  # of each environment: one minibatch per 5 steps
            "gradient_steps": 4,
            "target_update_interval": 500,
            "exploration_fraction": 0.02,
            "exploration_final_eps": 0.01,
            "policy_kwargs": {"net_arch": [120, 84]},
        },
    },
}


def rate(run_dir: Path, tag: str) -> float:
    """Speed between the first and the last entry of a run's log: without the samples and evaluation before training."""
    steps, speeds, _ = curves.load_run(run_dir, tag)
    seconds = steps / speeds  # since the start of training
    return float((steps[-1] - steps[0]) / (seconds[-1] - seconds[0]))


def output(command: list) -> str:
    """What a command prints; exit status 1 with the last line of its complaint when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise SystemExit(f"error: {command[0]} ended with status {done.returncode}: {last}")
    return done.stdout


def ours(script: str, steps: int) -> float:
    """Environment steps or episodes per second that the script itself logs at its end."""
    control = ["--total-timesteps", str(steps), "--eval-episodes", "0"]
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--total-episodes", str(steps)] if script == "rlhf_ppo" else control
        command = [sys.executable, specs.ALGOS / f"{script}.py", *flags, "--device", "cpu",
                   "--run-dir", f"{folder}/run"]  # fmt: skip
        output(command)
        if script == "rlhf_ppo":
            return rate(Path(folder) / "run", "episodes_per_second")
        return float(curves.load_run(Path(folder) / "run", "charts/SPS")[1][-1])


def peers(peer_python: Path, script: str, steps: int) -> float:
    """The same of Stable-Baselines3 or TRL's PPO."""
    with tempfile.TemporaryDirectory() as folder:
        if script != "rlhf_ppo":
            settings = SETTINGS[script] | {"script": script, "steps": steps, "logs": folder}
            return float(output([peer_python, "-c", SB3, json.dumps(settings)]))
        command = [peer_python, PEERS / "trl_ppo.py", "--out", f"{folder}/out", "--total-episodes", str(steps)]
        output(command)
        log = Path(folder) / "out" / "log.jsonl"
        ends = [json.loads(line)["seconds"] for line in log.read_text().splitlines()]
        return steps * (1 - 1 / len(ends)) / (ends[-1] - ends[0])


def pairs_of_runs(script: str, peer_python: Path, steps: int, repeats: int) -> Iterator[tuple[float, float]]:
    """Speeds of ours and of the peer, run in turns."""
    if script in ("dpo", "reward_model", "grpo"):  # one process of the peer's environment runs both
        length = "--steps" if script == "dpo" else "--updates"
        command = [peer_python, PEERS / f"trl_{script}.py", "speed", length, str(steps), "--repeats", str(repeats)]
        for found in re.finditer(r"\.py ([\d.]+) \w+/s, TRL ([\d.]+) \w+/s", output(command)):
            yield float(found[1]), float(found[2])
    else:
        for _ in range(repeats):
            yield ours(script, steps), peers(peer_python, script, steps)


def measure(script: str, peer_python: Path, steps: int, repeats: int) -> None:
    """Print the speeds of `repeats` pairs of runs and the median ratio with the lowest and highest; keep them for the report."""
    if not peer_python.exists():
        raise SystemExit(f"error: --peer-python {peer_python}: no such file")
    peer = "Stable-Baselines3" if script in SETTINGS else "TRL"
    unit = {"rlhf_ppo": "episodes/s", "dpo": "pairs/s", "reward_model": "pairs/s", "grpo": "episodes/s"}.get(
        script, "steps/s"
    )
    pairs = []
    for a, b in pairs_of_runs(script, peer_python, steps or STEPS[script], repeats):
        pairs.append((a, b))
        print(f"{script} {len(pairs)}/{repeats}: ours {a:,.0f} {unit}, {peer} {b:,.0f}, ratio {a / b:.2f}", flush=True)
    ratios = [a / b for a, b in pairs]
    a, b = (median(column) for column in zip(*pairs))
    print(f"median ratio {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); medians: ours {a:,.0f}, "
          f"{peer} {b:,.0f} {unit}")  # fmt: skip
    rounded = [[round(a, 1), round(b, 1)] for a, b in pairs]
    found = {"peer": peer, "unit": unit, "pairs": rounded}
    specs.keep("speed", dict(sorted((specs.results("speed") | {script: found}).items())))


def section() -> str:
    """Ratios of our speeds and the peers', for the report."""
    rows = []
    for script, row in specs.results("speed").items():
        ours, peer = map(median, zip(*row["pairs"]))
        ratios = sorted(a / b for a, b in row["pairs"])
        rows.append([f"{script}.py", row["peer"], f"{ours:,.0f} {row['unit']}", f"{peer:,.0f} {row['unit']}",
                     f"**{median(ratios):.2f}**", f"{ratios[0]:.2f} to {ratios[-1]:.2f}", str(len(ratios))])  # fmt: skip
    if not rows:
        return ""
    header = ["script", "peer", "ours", "peer's", "median ratio", "lowest and highest", "pairs"]
    return (
        "## Speed beside the peers\n\nSame work, same settings, one thread, in turns on the same machine "
        "(`run.py speed SCRIPT --peer-python ...`); start-up is not counted. Medians; only ratios mean something "
        "elsewhere.\n\n" + table(header, rows)
    )
