"""benchmark/core/gifs.py: what the gifs of finished runs show, and what is refused."""

import dataclasses

import dqn
import numpy as np
import ppo
import pytest
import torch
from PIL import Image

import run as benchmark
from core import gifs

SHORT = {"total_timesteps": 400, "eval_episodes": 0}


@pytest.mark.parametrize(
    ("module", "args"),
    [
        (ppo, ppo.Args(**SHORT, num_envs=2, num_steps=32)),
        (ppo, ppo.Args(**SHORT, env_id="Pendulum-v1", num_envs=2, num_steps=32, normalize=True)),
        (dqn, dqn.Args(**SHORT, num_envs=2, learning_starts=100, buffer_size=1000)),
    ],
    ids=["ppo", "ppo on Box actions", "dqn"],
)
def test_a_gif_shows_the_greedy_agent_of_a_run_in_motion(module, args, tmp_path, capsys):
    args.run_dir = str(tmp_path / "run")
    module.main(args)
    assert benchmark.main(["gif", args.run_dir, "--out", str(tmp_path), "--seconds", "2"]) == 0
    path = tmp_path / f"{module.__name__}_{args.env_id}.gif"
    assert f"wrote {path}" in capsys.readouterr().out
    assert path.stat().st_size < 300_000
    with Image.open(path) as gif:
        assert gif.n_frames > 5
        assert gif.width == 300
        assert gif.info["loop"] == 0


def test_a_gif_above_the_limit_is_made_smaller(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (5, 200, 300, 3), dtype=np.uint8)
    sizes = []
    for width in gifs.WIDTHS:
        gifs.write(tmp_path / "noise.gif", list(noise), width)
        sizes.append((tmp_path / "noise.gif").stat().st_size)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0] / 4


def test_runs_that_are_not_finished_or_not_of_networks_are_refused_in_one_line(tmp_path, capsys):
    assert benchmark.main(["gif", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} holds no finished run of dqn, reinforce, a2c, ppo\n"


@pytest.mark.parametrize("env_id,camera", [("HalfCheetah-v5", "track"), ("CartPole-v1", None)])
def test_the_camera_follows_a_robot_of_mujoco(env_id, camera, tmp_path, monkeypatch):
    asked = []

    def note(env_id, num_envs, env_kwargs):
        asked.append(env_kwargs)
        raise SystemExit

    monkeypatch.setattr(ppo, "make_envs", note)
    args = dataclasses.asdict(ppo.Args(env_id=env_id))
    torch.save({"script": "ppo", "args": args}, tmp_path / "checkpoint.pt")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(SystemExit):
        gifs.load(tmp_path)
    (kwargs,) = asked
    assert kwargs.get("camera_name") == camera
    assert kwargs["render_mode"] == "rgb_array"
