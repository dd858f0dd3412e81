"""benchmark/core/curves.py by hand, and compare.py: what is averaged, what is told apart, its errors."""

import json
from dataclasses import asdict

import dpo
import numpy as np
import ppo
import pytest
import reinforce
from helpers import REPO
from torch.utils.tensorboard import SummaryWriter

import run as benchmark
from core import compare, curves

PEER = REPO / "benchmark" / "reference" / "peers" / "cleanrl_ppo_CartPole-v1.json"


def write_run(folder, args, tag="charts/episodic_return", level=100.0, steps=1000):
    """A run directory that logged ten values, rising evenly to a level."""
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps(asdict(args) | {"run_dir": str(folder)}))
    with SummaryWriter(str(folder)) as writer:
        for i in range(1, 11):
            writer.add_scalar(tag, level * i / 10, steps * i // 10)
            writer.add_scalar("charts/episodes", 20, steps * i // 10)
            writer.add_scalar("charts/SPS", 1000, steps * i // 10)
    return str(folder)


def test_a_curve_is_the_weighted_mean_of_each_bin_and_repeats_the_last_one_over_gaps():
    # bins of 20 steps: (1-20], the second and third entry share the bin (40, 60], the bin before it is empty
    steps = np.array([20, 45, 60, 1000])
    returns = np.array([1.0, 2.0, 8.0, 5.0])
    numbers = np.array([1.0, 3.0, 1.0, 2.0])
    curve = curves.curve(steps, returns, numbers, total_steps=1000)
    assert curve[:3].tolist() == [1.0, 1.0, (2 * 3 + 8) / 4]
    assert (curve[2:49] == 3.5).all()
    assert curve[49] == 5


def test_bins_before_the_first_episode_take_its_value():
    steps = np.array([500])
    returns = np.array([7.0])
    curve = curves.curve(steps, returns, np.ones(1), total_steps=1000)
    assert (curve == 7).all()


def test_the_final_level_is_the_mean_of_exactly_the_last_100_episodes():
    returns = np.array([1000.0, 3.0, 5.0])
    numbers = np.array([50.0, 80.0, 40.0])
    assert curves.final_level(returns, numbers) == pytest.approx((60 * 3 + 40 * 5) / 100)
    assert curves.final_level(np.array([4.0]), np.array([7.0])) == 4


def test_a_level_is_reached_when_the_mean_of_the_last_100_episodes_gets_to_it():
    steps = np.array([10, 20, 30])
    numbers = np.array([50.0, 50.0, 80.0])
    highest_second = steps, np.array([0.0, 10.0, 5.0]), numbers
    highest_first = steps, np.array([9.0, 1.0, 5.0]), numbers
    rising = steps, np.array([0.0, 1.0, 5.0]), numbers
    assert compare.reached(highest_second, 5.0, 100) == 20
    assert compare.reached(highest_first, 10.0, 100) == np.inf
    assert compare.reached(rising, 4.2, 100) == 30  # (20·1 + 80·5) / 100
    loss = steps, np.array([3.0, 2.0, 1.0]), np.ones(3)
    assert compare.reached(loss, 2.0, 1) == 20  # from above
    assert compare.reached(loss, 0.5, 1) == np.inf


def test_areas_are_compared_by_rank():
    ours = np.array([1.0, 2.0, -50.0])
    peers = np.array([3.0, 4.0, 5.0])
    # of the 20 ways to share out six ranks, two are as extreme
    assert compare.chance(ours, peers) == "median area 1 and 4, p = 0.1"
    assert compare.chance(ours, ours) == "median area 1 and 1, p = 1"


def test_seeds_are_averaged_and_runs_with_other_flags_are_settings_of_their_own(tmp_path, capsys):
    runs = []
    for level, steps in ((100, 32), (50, 64)):
        for seed in (1, 3):
            args = ppo.Args(seed=seed, num_steps=steps, total_timesteps=1000)
            runs.append(write_run(tmp_path / f"{level}{seed}", args, level=level + seed))
    assert benchmark.main(["curves", *runs, "--picture", str(tmp_path / "picture.png"), "--level", "60"]) == 0
    said = capsys.readouterr().out
    # levels 101 and 103, of which the last 100 of 200 episodes have 0.8, and 50 bins (9·0.1 + 5·(0.2 + … + 0.9) + 1)/50
    assert "--num-steps 32: 2 seeds, 1,000 steps, final level 81.6 ± 0.8, area 48.76" in said
    assert "--num-steps 64: 2 seeds, 1,000 steps, final level 41.6 ± 0.8" in said
    assert "    60 reached after 800, 800 steps" in said
    assert "reached after inf, inf steps" in said
    assert "--num-steps 64 against --num-steps 32: median area" in said
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_an_unfinished_run_is_not_drawn_beyond_its_last_step(tmp_path, capsys):
    whole = write_run(tmp_path / "whole", ppo.Args(seed=1, total_timesteps=1000))
    part = write_run(tmp_path / "part", ppo.Args(seed=2, total_timesteps=1000), level=50, steps=500)
    assert benchmark.main(["curves", whole, part]) == 0
    said = capsys.readouterr().out
    assert f"{part} is unfinished: its setting is shown up to step 500" in said
    assert whole + " is" not in said
    assert "2 seeds, 500 steps, final level 35 ± 5, area" in said  # 10 to 50, and 30 to 50, by 20 episodes each


def test_runs_of_several_scripts_are_named_by_them_and_their_own_flags(tmp_path):
    flags = []
    for args in (ppo.Args(), ppo.Args(), ppo.Args(gamma=0.9), reinforce.Args()):
        of_its_own = {"run_dir": str(len(flags)), "seed": len(flags)}
        flags.append(asdict(args) | of_its_own)
    default = "ppo --gamma 0.98"
    assert compare.label_settings(flags) == [default, default, "ppo --gamma 0.9", "reinforce"]
    assert compare.label_settings(flags[:2]) == ["this repository"] * 2
    without = {name: value for name, value in flags[1].items() if name != "vf_coef"}  # of an older version
    assert compare.label_settings([flags[0], without]) == ["--vf-coef 0.5", "--vf-coef absent"]


def test_language_runs_are_compared_by_a_measure_of_their_script_or_a_tag(tmp_path, capsys):
    low = write_run(tmp_path / "low", dpo.Args(beta=0.1), "eval/loss", 0.6, 400)
    high = write_run(tmp_path / "high", dpo.Args(beta=0.5), "eval/loss", 0.5, 400)
    runs = [low, high]
    assert benchmark.main(["curves", *runs, "--tag", "eval/loss"]) == 0
    said = capsys.readouterr().out
    assert "--beta 0.1: 1 seeds, 400 steps, final level 0.6 " in said
    assert "--beta 0.5: 1 seeds" in said
    assert benchmark.main(["curves", *runs]) == 2
    assert "holds no values of eval/rewards/accuracies" in capsys.readouterr().err  # the first measure of dpo's spec


def test_a_peer_is_compared_with_each_setting(tmp_path, capsys):
    low = write_run(tmp_path / "low", ppo.Args(gamma=0.9), steps=500_000)
    high = write_run(tmp_path / "high", ppo.Args(gamma=0.99), steps=500_000)
    assert benchmark.main(["curves", low, high, "--peer", str(PEER)]) == 0
    said = capsys.readouterr().out
    assert "CleanRL: 5 seeds, 500,000 steps, final level 487.9" in said
    assert "--gamma 0.9 against CleanRL: " in said
    assert "--gamma 0.99 against CleanRL: " in said


@pytest.mark.parametrize(
    "flags,expected",
    [
        (["{tmp}/nothing"], "is not a run directory"),
        (["{tmp}/run", "{tmp}/other"], "of several tasks: Acrobot-v1, CartPole-v1"),
        (["{tmp}/run", "--tag", "eval/loss"], "holds no values of eval/loss"),
        (["{tmp}/run", "--peer", "{tmp}/none.json"], "no such file"),
        (
            ["{tmp}/run", "--peer", str(PEER)],
            "is about CartPole-v1 over 500,000 steps, not charts/episodic_return of CartPole-v1 over 1,000",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(flags, expected, tmp_path, capsys):
    write_run(tmp_path / "run", ppo.Args(total_timesteps=1000))
    write_run(tmp_path / "other", ppo.Args(total_timesteps=1000, env_id="Acrobot-v1"))
    assert benchmark.main(["curves", *(flag.format(tmp=tmp_path) for flag in flags)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert expected in lines[0]
