"""The control scripts where two things meet: video and arguments, resumption and another seed, a log and its step."""

import importlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import by_hand
import dqn
import gymnasium as gym
import numpy as np
import probe_envs
import pytest
import q_learning
import reinforce
import torch
from helpers import environment, run, scalars, spy_on, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_contract import HALF, WHOLE, as_a_user, invoke, load, once, policy_gradients, same, scripts, train
from test_control import CPU, Still

__all__ = ["as_a_user", "once"]  # fixtures


def test_a_second_episode_of_an_environment_is_not_logged_while_others_go_on(tmp_path):
    steps = sum(by_hand.LENGTHS)
    run_dir = tmp_path / "run"
    by_hand.train(reinforce, run_dir, "by_hand:Known-v0", num_envs=3, num_steps=100, total_timesteps=steps)
    assert sum(number for _, number in scalars(run_dir, "charts/episodes")) == 3
    ((_, length),) = scalars(run_dir, "charts/episodic_length")
    assert length == pytest.approx(steps / 3)


@scripts
def test_a_run_resumed_with_another_seed_keeps_all_but_the_random_numbers(once, script):
    half = load(once(script, HALF))
    shutil.copy(once(script, HALF) / "checkpoint.pt", "copy.pt")
    invoke(script, "--resume", "copy.pt", "--run-dir", "still", "--seed", 9)
    new = {"args", "rng", "buffer"}
    assert all(same(load("still")[key], half[key]) for key in half.keys() - new)


@scripts
def test_the_video_is_of_the_environment_with_its_arguments(script, monkeypatch):
    calls = spy_on(monkeypatch, importlib.import_module(script), "make_video_envs")
    flags = ["--env-id", "CartPole-v1", "--env-kwargs", '{"max_episode_steps": 7}']
    train(script, "run", *flags, "--capture-video", "--eval-episodes", 0, steps=200)
    assert [call.env_kwargs for call in calls] == [{"max_episode_steps": 7}]


@scripts
def test_evaluation_asks_for_greedy_actions(script):
    module, asked = importlib.import_module(script), []

    class Asked(Still):
        def act(self, obs, greedy=False):
            asked.append(greedy)
            return super().act(obs, greedy)

    module.evaluate(Asked(), module.make_envs("probe_envs:StaggeredGrowing-v0", 4, {}), CPU)
    assert asked
    assert all(asked)


@scripts
def test_evaluation_plays_as_many_episodes_as_asked_and_is_logged_at_the_last_step(script, capsys):
    train(script, "run", "--env-id", "probe_envs:Staggered-v0", "--eval-episodes", 12, steps=331)
    for name in ("mean", "std"):
        assert [step for step, _ in scalars(Path("run"), f"eval/return_{name}")] == [load("run")["step"]]
    assert "over 12 greedy episodes" in capsys.readouterr().out


@scripts
def test_the_flags_of_a_resumed_run_stand_at_the_step_where_it_goes_on(once, script):
    shutil.copytree(once(script, HALF), "run")
    invoke(script, "--resume", "run", "--total-timesteps", WHOLE)
    events = EventAccumulator("run", size_guidance={"tensors": 0}).Reload()
    steps = [event.step for event in events.Tensors("flags/text_summary")]
    assert steps == [0, load(once(script, HALF))["step"]]


def test_steps_per_second_of_a_resumed_q_learning_are_its_own(monkeypatch):
    train("q_learning", "run", steps=HALF)
    half = load("run")["step"]
    times = iter([0.0])
    clock = SimpleNamespace(perf_counter=lambda: next(times, 2.0))
    monkeypatch.setattr(importlib.import_module("q_learning"), "time", clock)
    invoke("q_learning", "--resume", "run", "--total-timesteps", WHOLE)
    last, speed = scalars(Path("run"), "charts/SPS")[-1]
    assert speed == pytest.approx((last - half) / 2)


@policy_gradients
def test_a_user_may_ask_for_sticky_actions(script):
    envs = importlib.import_module(script).make_envs("ALE/Pong-v5", 1, {"repeat_action_probability": 0.25})
    assert envs.unwrapped.spec.kwargs["repeat_action_probability"] == 0.25
    envs.close()


# --- where a run or an episode ends in the middle ---


def test_reinforce_counts_the_steps_of_earlier_updates_towards_the_total(tmp_path):
    flags = {"num_steps": 50, "total_timesteps": 300}  # 200 steps, and then 100
    run_dir = by_hand.train(reinforce, tmp_path / "run", "probe_envs:Endless-v0", **flags)
    assert scalars(run_dir, "charts/SPS")[-1][0] == 300


def test_reinforce_divides_by_the_environments_also_where_episodes_are_cut(tmp_path, monkeypatch):
    forward = by_hand.spy_by_name(monkeypatch, reinforce.Agent, "forward")
    flags = {"num_envs": 3, "num_steps": 4, "total_timesteps": 11, "gamma": 0.9, "seed": by_hand.SEED}
    run_dir = by_hand.train(reinforce, tmp_path / "run", "by_hand:Known-v0", **flags)  # the third is cut
    rows = by_hand.rollout(0, 4)
    to_go = torch.zeros(4, 3, dtype=torch.float64)
    for n, length in enumerate(by_hand.LENGTHS):
        end = min(4, length)
        for t in range(end):
            discounts = 0.9 ** torch.arange(end - t)
            to_go[t, n] = (discounts * rows.rewards[t:end, n]).sum()
    returns = to_go[rows.is_step]
    returns = (returns - returns.mean()) / returns.std(correction=0)
    loss = -(forward[-1].result[0].double() * returns).sum() / 3
    ((_, logged),) = scalars(run_dir, "losses/policy_loss")
    assert logged == pytest.approx(loss.item(), rel=1e-4)


TARGETS = {  # a function that is given the rewards, and what it calls them
    "reinforce": ("discounted_sum", "x"),
    "dqn": ("td_target", "rewards"),
    "a2c": ("compute_gae", "rewards"),
    "ppo": ("compute_gae", "rewards"),
}


@pytest.mark.parametrize("script", TARGETS)
def test_atari_behind_the_name_of_its_module_trains_on_the_sign_of_rewards(script, tmp_path, monkeypatch):
    module = importlib.import_module(script)
    function, argument = TARGETS[script]
    calls = spy_on(monkeypatch, module, function)
    flags = {"num_envs": 2, "total_timesteps": 200, "eval_episodes": 0, "device": "cpu"}
    flags |= {"learning_starts": 100, "buffer_size": 400} if script == "dqn" else {"num_steps": 100}
    module.main(module.Args(env_id="ale_py:ALE/MsPacman-v5", run_dir=str(tmp_path / "run"), **flags))
    rewards = torch.cat([getattr(call, argument).flatten() for call in calls])
    assert set(rewards.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("shape", [(3, 36, 40), (40, 36, 3)])
def test_dqn_stores_whole_images_that_are_not_ataris(shape, tmp_path, monkeypatch):
    shown = []
    original = dqn.ReplayBuffer.add_observations

    def add(buffer, obs):
        shown.append(obs.copy())
        return original(buffer, obs)

    monkeypatch.setattr(dqn.ReplayBuffer, "add_observations", add)
    calls = by_hand.spy_by_name(monkeypatch, dqn.ReplayBuffer, "observations")
    gym.register("Whole-v0", entry_point=lambda: probe_envs.Image(shape), max_episode_steps=5)
    sizes = {"num_envs": 2, "learning_starts": 20, "train_every": 4, "buffer_size": 400, "batch_size": 8}
    run = {"run_dir": str(tmp_path / "run"), "device": "cpu", "eval_episodes": 0, "total_timesteps": 100}
    dqn.main(dqn.Args(env_id="Whole-v0", **run, **sizes))
    stored = np.concatenate(shown)  # row i of the ring
    drawn = [call for call in calls if len(call.rows)]
    assert drawn
    for call in drawn:
        np.testing.assert_array_equal(call.result, stored[call.rows])


def test_dqn_takes_a_run_with_time_for_one_minibatch():
    dqn.Args(total_timesteps=100, learning_starts=90, train_every=10)
    with pytest.raises(ValueError, match="no time to learn"):
        dqn.Args(total_timesteps=99, learning_starts=90, train_every=10)


def test_dqn_logs_nothing_between_the_first_thousand_steps_and_the_first_update(tmp_path):
    sizes = {"num_envs": 4, "learning_starts": 1500, "train_every": 4, "buffer_size": 2000, "batch_size": 16}
    run = {"run_dir": str(tmp_path / "run"), "device": "cpu", "eval_episodes": 0, "total_timesteps": 2000}
    dqn.main(dqn.Args(env_id="probe_envs:Endless-v0", **run, **sizes))
    assert [step for step, _ in scalars(tmp_path / "run", "charts/epsilon")] == [1000, 1504, 2000]


def test_environments_of_q_learning_explore_each_on_its_own():
    torch.manual_seed(0)
    table = q_learning.QTable(1, 1000)
    table.q[0, 0] = 1.0
    states = torch.zeros(100, dtype=torch.int64)
    greedy = [(table.act(states, 0.5) == 0).sum().item() for _ in range(20)]
    assert 30 < min(greedy)  # of 100 each
    assert max(greedy) < 70


def test_visited_counts_the_pairs_that_were_updated_once_or_more(tmp_path):
    run = {"run_dir": str(tmp_path / "run"), "eval_episodes": 0}
    q_learning.main(q_learning.Args(env_id="FrozenLake-v1", total_timesteps=24, epsilon_end=1.0, **run))
    visits = weights(tmp_path / "run")["visits"]
    assert (visits == 1).any()
    assert scalars(tmp_path / "run", "charts/visited")[-1][1] == (visits > 0).sum()


DEFAULTS = {  # what the recorded runs of CartPole-v1 and Taxi-v4 were made with
    "q_learning": {"gamma": 0.99, "alpha_decay": 0.6, "epsilon_end": 0.1, "exploration_fraction": 0.5},
    "dqn": {
        "gamma": 0.995,
        "learning_rate": 5e-4,
        "anneal_lr": True,
        "batch_size": 128,
        "train_every": 5,
        "target_every": 500,
        "learning_starts": 1_000,
        "buffer_size": 20_000,
        "epsilon_end": 0.01,
        "exploration_fraction": 0.02,
        "loss": "mse",
        "max_grad_norm": 0.0,
    },
    "reinforce": {"gamma": 0.99, "learning_rate": 2e-3, "anneal_lr": True, "num_envs": 8},
    "a2c": {
        "gamma": 0.99,
        "gae_lambda": 1.0,
        "learning_rate": 1e-3,
        "anneal_lr": False,
        "num_steps": 5,
        "num_envs": 16,
        "ent_coef": 0.0,
        "vf_coef": 1.0,
    },
    "ppo": {
        "gamma": 0.98,
        "gae_lambda": 0.95,
        "learning_rate": 1e-3,
        "anneal_lr": True,
        "num_steps": 32,
        "num_envs": 16,
        "num_minibatches": 2,
        "num_epochs": 4,
        "clip_coef": 0.2,
        "ent_coef": 0.01,
        "vf_coef": 0.5,
        "target_kl": 0.0,
    },
}


@pytest.mark.parametrize("script", DEFAULTS)
def test_the_defaults_are_those_of_the_recorded_runs(script):
    args = vars(importlib.import_module(script).Args())
    assert {name: args[name] for name in DEFAULTS[script]} == DEFAULTS[script]


@scripts
def test_the_progress_line_shows_the_mean_return_since_the_last_log(script, monkeypatch):
    lines = []

    def note(bar, text, refresh):
        lines.append(text)

    monkeypatch.setattr(importlib.import_module(script).tqdm, "set_postfix_str", note)
    train(script, "run", steps=WHOLE)
    logged = [value for _, value in scalars(Path("run"), "charts/episodic_return")]
    assert len(logged) > 1
    assert lines == [f"return {value:.1f}" for value in logged]


@policy_gradients
def test_the_normaliser_still_counts_after_more_rows_than_float32_can_count(script):
    norm = importlib.import_module(script).RunningNorm(1)
    norm.count.fill_(2**24)
    norm.update(torch.zeros(1, 1))
    assert norm.count.item() == 2**24 + 1


def test_q_learning_finds_an_environment_in_the_users_folder(tmp_path):
    lines = [
        "import gymnasium as gym",
        "from gymnasium.envs.toy_text import TaxiEnv",
        "gym.register('Mine-v0', entry_point=TaxiEnv, max_episode_steps=20)",
    ]
    (tmp_path / "my_taxi.py").write_text("\n".join(lines))
    flags = ["--env-id", "my_taxi:Mine-v0", "--total-timesteps", 1000, "--eval-episodes", 2, "--run-dir", "run"]
    done = run("q_learning", *flags, cwd=tmp_path, env=environment(PYTHONPATH=""))
    assert done.returncode == 0, done.stderr
