"""benchmark/curves.py: the statistics by hand, and its errors."""

import json
import subprocess
import sys

import numpy as np
import pytest
from helpers import REPO

sys.path.insert(0, str(REPO / "benchmark"))
import curves  # noqa: E402


def test_a_curve_is_the_weighted_mean_of_each_bin_and_repeats_the_last_one_over_gaps():
    # bins of 20 steps: (1-20], the second and third entry share the bin (40, 60], the bin before it is empty
    steps, returns, numbers = (
        np.array([20, 45, 60, 1000]),
        np.array([1.0, 2.0, 8.0, 5.0]),
        np.array([1.0, 3.0, 1.0, 2.0]),
    )
    curve = curves.curve(steps, returns, numbers, total_steps=1000)
    assert curve[:3].tolist() == [1.0, 1.0, (2 * 3 + 8) / 4]
    assert (curve[2:49] == 3.5).all() and curve[49] == 5


def test_bins_before_the_first_episode_take_its_value():
    curve = curves.curve(np.array([500]), np.array([7.0]), np.array([1.0]), total_steps=1000)
    assert (curve == 7).all()


def test_the_final_level_is_the_mean_of_exactly_the_last_100_episodes():
    returns, numbers = np.array([1000.0, 3.0, 5.0]), np.array([50.0, 80.0, 40.0])
    assert curves.final_level(returns, numbers) == pytest.approx((60 * 3 + 40 * 5) / 100)
    assert curves.final_level(np.array([4.0]), np.array([7.0])) == 4


def test_a_level_is_reached_when_the_mean_of_the_last_100_episodes_is_at_least_it():
    steps, returns, numbers = np.array([10, 20, 30]), np.array([9.0, 1.0, 5.0]), np.array([50.0, 50.0, 80.0])
    assert curves.reached(steps, returns, numbers, 5.0) == (100, 20)
    assert curves.reached(steps, returns, numbers, 6.0) == (np.inf, np.inf)  # 9 came before there were 100 episodes
    assert curves.reached(steps, np.array([0.0, 1.0, 5.0]), numbers, 4.2) == (180, 30)  # (20·1 + 80·5) / 100


def test_areas_are_compared_by_rank_and_by_the_number_of_seeds_below_a_bound():
    ours, peers = np.array([1.0, 2.0, -50.0]), np.array([3.0, 4.0, 5.0])
    # of the 20 ways to share out six ranks, two are as extreme; of those to share out the one below, all are
    assert curves.chance(ours, peers, 0.0) == "median area 1.00 and 4.00, p = 0.1; share below 0: p = 1"
    assert curves.chance(ours, ours, None) == "median area 1.00 and 1.00, p = 1"


@pytest.mark.parametrize(
    "flags,expected",
    [
        (["{tmp}/nothing"], "is not a run directory"),
        (["{tmp}/empty"], "holds no run with finished episodes"),
        (["{tmp}/empty", "--peer", "{tmp}/none.json"], "holds no run"),
    ],
)
def test_bad_input_is_refused_in_one_line(flags, expected, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "args.json").write_text(json.dumps({"env_id": "CartPole-v1", "total_timesteps": 100}))
    command = [sys.executable, REPO / "benchmark" / "curves.py", *(flag.format(tmp=tmp_path) for flag in flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ") and expected in lines[0], (
        done.stderr
    )


def test_a_peer_curve_becomes_a_table_and_a_picture(tmp_path):
    peer = REPO / "benchmark" / "reference" / "peers" / "cleanrl_ppo_CartPole-v1.json"
    seeds = json.loads(peer.read_text())["seeds"].values()
    group = curves.summary(
        [(np.array(s["step"]), np.array(s["return"]), np.ones(len(s["step"]))) for s in seeds], 500_000
    )
    assert group["curves"].shape == (5, curves.BINS)
    assert group["final"].mean() == pytest.approx(490.04, abs=10)  # the published figure
    curves.draw({"peer": group}, 500_000, "title", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
