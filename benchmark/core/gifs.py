"""Gifs of trained agents: plays the models of finished runs, trains nothing.

    python benchmark/run.py gif runs/cartpole runs/lunar --out benchmark/pictures

Of each run one file, <script>_<task>.gif. It shows the greedy policy from the first episode on.
"""

import importlib
import json
import os
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import trange

from core.specs import ALGOS

SCRIPTS = ("dqn", "reinforce", "a2c", "ppo")
DELAY = 60  # milliseconds between two pictures
COLOURS = 32
WIDTHS = (300, 240, 180, 120)  # in pixels; the largest that fits the limit is taken


def load(run_dir: Path) -> tuple[nn.Module, gym.vector.VectorEnv, str, int]:
    """Network of a finished run, one environment that draws, the file's name, and the seed."""
    if not (run_dir / "model.safetensors").exists():
        raise SystemExit(f"error: {run_dir} holds no finished run of {', '.join(SCRIPTS)}")
    saved = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
    script = saved["script"]
    if script not in SCRIPTS:
        raise SystemExit(f"error: {run_dir} is a run of {script}, not of {', '.join(SCRIPTS)}")
    sys.path.insert(0, str(ALGOS))
    module = importlib.import_module(script)
    args = module.Args(**saved["args"])
    os.environ.setdefault("XDG_RUNTIME_DIR", "/tmp")  # SDL, which draws, misses it on servers
    kwargs = json.loads(args.env_kwargs) | {"render_mode": "rgb_array"}
    registered = gym.registry.get(args.env_id)
    if registered and "mujoco" in str(registered.entry_point):
        kwargs.setdefault("camera_name", "track")  # it follows the robot
    envs = module.make_envs(args.env_id, 1, kwargs)
    spaces = envs.single_observation_space, envs.single_action_space
    if script == "dqn":
        network = module.QNetwork(*spaces)
    else:
        network = module.Agent(*spaces, args.normalize, args.log_std_init)
    network.load_state_dict(saved["agent"])
    task = args.env_id.split(":")[-1].split("/")[-1]
    return network, envs, f"{script}_{task}.gif", args.seed


def play(network: nn.Module, envs: gym.vector.VectorEnv, seed: int, seconds: float) -> list[np.ndarray]:
    """Pictures (H, W, 3) of so many seconds of the greedy policy, DELAY apart."""
    rate = envs.metadata.get("render_fps", 30)  # environment steps per second
    every = max(1, round(rate * DELAY / 1000))
    pictures = []
    obs, _ = envs.reset(seed=seed)
    for step in trange(round(seconds * rate), desc="playing", unit="step", leave=False):
        if step % every == 0:
            pictures.append(envs.render()[0])
        action = network.act(torch.as_tensor(obs), greedy=True).numpy()
        obs, *_ = envs.step(action)
    envs.close()
    return pictures


def write(path: Path, pictures: list[np.ndarray], width: int) -> None:
    """An endless gif of pictures scaled to a width, in the few colours of all of them."""
    height = round(pictures[0].shape[0] * width / pictures[0].shape[1])
    small = [Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS) for picture in pictures]
    every = max(1, len(small) // 8)
    sample = np.concatenate([np.asarray(picture) for picture in small[::every]])
    palette = Image.fromarray(sample).quantize(COLOURS)
    first, *others = (picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in small)
    first.save(path, save_all=True, append_images=others, duration=DELAY, loop=0)


def make(run_dirs: list[Path], out: Path, seconds: float, kilobytes: int) -> None:
    """Write a gif of each run, as large as the limit allows."""
    out.mkdir(parents=True, exist_ok=True)
    for run_dir in run_dirs:
        network, envs, name, seed = load(run_dir)
        pictures = play(network, envs, seed, seconds)
        for width in WIDTHS:
            write(out / name, pictures, width)
            size = (out / name).stat().st_size / 1000
            if size <= kilobytes:
                break
        print(f"wrote {out / name}: {len(pictures)} pictures, {width} pixels wide, {size:.0f} kB")
