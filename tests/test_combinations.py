"""The control scripts where two things meet: video and arguments, resumption and another seed, a log and its step."""

import importlib
import shutil
from pathlib import Path

import by_hand
import pytest
import reinforce
import torch
from helpers import scalars, spy_on
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@scripts
def test_a_gpu_that_is_not_there_is_no_cpu(script):
    with pytest.raises((RuntimeError, AssertionError), match="(?i)cuda|nvidia"):
        train(script, "run", "--device", "cuda", steps=200)
    assert not Path("run").exists()


@scripts
def test_the_video_is_of_the_environment_with_its_arguments(script, monkeypatch):
    calls = spy_on(monkeypatch, importlib.import_module(script), "make_video_envs")
    flags = ["--env-id", "CartPole-v1", "--env-kwargs", '{"max_episode_steps": 7}']
    train(script, "run", *flags, "--capture-video", "--eval-episodes", 0, steps=200)
    assert [arguments[1] for arguments, _ in calls] == [{"max_episode_steps": 7}] * 2


@scripts
def test_evaluation_asks_for_greedy_actions(script):
    module, asked = importlib.import_module(script), []

    class Asked(Still):
        def act(self, obs, greedy=False):
            asked.append(greedy)
            return super().act(obs, greedy)

    module.evaluate(Asked(), module.make_envs("probe_envs:StaggeredGrowing-v0", 4, {}), CPU)
    assert asked and all(asked)


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
    bar = importlib.import_module("q_learning").tqdm
    elapsed = {"elapsed": 2.0}
    monkeypatch.setattr(bar, "format_dict", property(lambda self, get=bar.format_dict.fget: get(self) | elapsed))
    train("q_learning", "run", steps=HALF)
    half = load("run")["step"]
    invoke("q_learning", "--resume", "run", "--total-timesteps", WHOLE)
    last, speed = scalars(Path("run"), "charts/SPS")[-1]
    assert speed == pytest.approx((last - half) / 2)


@policy_gradients
def test_a_user_may_ask_for_sticky_actions(script):
    envs = importlib.import_module(script).make_envs("ALE/Pong-v5", 1, {"repeat_action_probability": 0.25})
    assert envs.unwrapped.spec.kwargs["repeat_action_probability"] == 0.25
    envs.close()
