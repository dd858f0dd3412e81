"""What holds for the control scripts alike, through main() on environments with known answers."""

import importlib

import gymnasium as gym
import numpy as np
import ppo
import probe_envs  # noqa: F401  (registers the environments)
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from helpers import scalars, weights

DEFAULTS = {  # small flags of each script
    "a2c": {"num_steps": 8},
    "ppo": {"num_steps": 8, "num_minibatches": 1},
    "reinforce": {},
    "dqn": {"batch_size": 16, "learning_starts": 16, "train_every": 4, "target_every": 20, "buffer_size": 1_000},
}
policy_gradients = pytest.mark.parametrize("script", ["reinforce", "a2c", "ppo"])
actor_critics = pytest.mark.parametrize("script", ["a2c", "ppo"])


def train(script, tmp_path, env_id, **flags):
    """Run main() of a script in this process; returns the run directory."""
    module = importlib.import_module(script)
    run_dir = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    flags = {"num_envs": 4, "eval_episodes": 0, "device": "cpu"} | DEFAULTS[script] | flags
    module.main(module.Args(env_id=f"probe_envs:{env_id}", run_dir=str(run_dir), **flags))
    return run_dir


# --- resets and ends of episodes ---


@actor_critics
def test_constant_reward_under_truncation_is_worth_1_over_1_minus_gamma(script, tmp_path):
    run_dir = train(script, tmp_path, "Probe-v0", gamma=0.9, learning_rate=3e-3, total_timesteps=12_000, num_steps=16)
    module = importlib.import_module(script)
    agent = module.Agent(Box(-1, 1, (1,), np.float32), Discrete(2))
    agent.load_state_dict(weights(run_dir))
    value = agent(torch.ones(1, 1), torch.zeros(1))[2].item()
    assert value == pytest.approx(1 / (1 - 0.9), abs=0.3)  # the 10-step sum would be 6.5


@policy_gradients
def test_rows_that_must_not_count_leave_no_trace_in_the_weights(script, tmp_path):
    rollout = {} if script == "reinforce" else {"num_steps": 11}
    plain, trap = (
        weights(train(script, tmp_path, name, total_timesteps=500, **rollout))
        for name in ("Staggered-v0", "StaggeredTrap-v0")
    )
    assert all(torch.equal(plain[name], trap[name]) for name in plain)


@pytest.mark.parametrize("script", ["dqn", "reinforce", "a2c", "ppo"])
def test_two_episodes_that_end_at_once_are_both_counted(script, tmp_path):
    flags = {"reinforce": {}, "dqn": {"batch_size": 2, "learning_starts": 4, "train_every": 4}}.get(
        script, {"num_steps": 4}
    )
    run_dir = train(script, tmp_path, "Staggered-v0", num_envs=2, total_timesteps=8, **flags)
    assert sum(number for _, number in scalars(run_dir, "charts/episodes")) == 2  # returns 4 and 8
    assert [value for _, value in scalars(run_dir, "charts/episodic_return")] == [6.0]
    assert [value for _, value in scalars(run_dir, "charts/episodic_length")] == [4.0]


@policy_gradients
def test_reset_rows_are_not_counted_as_steps(script, tmp_path):
    if script == "reinforce":  # one episode of 4, 4, 6 and 6 steps
        run_dir, steps = train(script, tmp_path, "Staggered-v0", total_timesteps=20), 20
    else:  # rows 5 and 10 of both environments are resets
        run_dir, steps = train(script, tmp_path, "Staggered-v0", num_envs=2, num_steps=10, total_timesteps=16), 16
    assert [step for step, _ in scalars(run_dir, "charts/SPS")] == [steps]


# --- actions ---


@policy_gradients
def test_the_sampled_action_is_stored_and_the_clipped_one_executed(script, tmp_path, monkeypatch):
    module, seen = importlib.import_module(script), []
    network = module.Policy if script == "reinforce" else module.Agent
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda self, obs, actions: seen.append(actions) or forward(self, obs, actions))
    train(script, tmp_path, "Target-v0", total_timesteps=64)  # the environment asserts that actions are within ±1
    stored = torch.cat(seen)
    assert stored.shape[1] == 2 and (stored.abs() > 1).any()


# --- learning ---


@policy_gradients
@pytest.mark.parametrize("env_id,best", [("Identity-v0", 1.0), ("Target-v0", 0.0), ("OneStep-v0", 1.0)])
def test_the_best_action_is_learnt(script, tmp_path, env_id, best):
    flags = {"ppo": {"num_steps": 64, "ent_coef": 0.0}, "a2c": {"num_steps": 16}, "reinforce": {"num_envs": 16}}[script]
    run_dir = train(script, tmp_path, env_id, total_timesteps=12_000, learning_rate=5e-3, eval_episodes=30, **flags)
    assert scalars(run_dir, "eval/return_mean")[0][1] == pytest.approx(best, abs=0.02)


@policy_gradients
def test_pixels_and_discrete_observations_train(script, tmp_path):
    train(script, tmp_path, "Pixels-v0", total_timesteps=64)
    module = importlib.import_module(script)
    module.main(module.Args(env_id="FrozenLake-v1", run_dir=str(tmp_path / "lake"), total_timesteps=600))


# --- seeds, statistics, evaluation ---


@policy_gradients
def test_neighbouring_seeds_share_no_environment_seeds(script, tmp_path, monkeypatch):
    seeds, reset = [], gym.vector.SyncVectorEnv.reset

    def spy(self, *, seed=None, options=None):
        if seed is not None:
            seeds.append(set(range(seed, seed + self.num_envs)))
        return reset(self, seed=seed, options=options)

    monkeypatch.setattr(gym.vector.SyncVectorEnv, "reset", spy)
    for seed in (1, 2, 3):
        train(script, tmp_path, "Probe-v0", seed=seed, total_timesteps=32, eval_episodes=5)
    assert [len(each) for each in seeds] == [4, 5] * 3 and len(set.union(*seeds)) == 27  # training, evaluation


def test_evaluation_uses_the_running_statistics_and_leaves_them_alone(tmp_path):
    run_dir = train("ppo", tmp_path, "Scaled-v0", normalize=True, total_timesteps=4_000)
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    statistics = saved["statistics"]
    assert statistics["obs.mean"].numpy() == pytest.approx(50, abs=2) and statistics[
        "obs.var"
    ].numpy() == pytest.approx(100, rel=0.2)
    before = {name: x.clone() for name, x in statistics.items()}
    make = lambda: ppo.make_envs("probe_envs:Scaled-v0", 5, True, 0.99)  # noqa: E731
    envs, space = make(), Box(-10, 10, (3,), np.float32)
    agent = ppo.Agent(space, Discrete(2))
    agent.load_state_dict(saved["agent"])
    first, second = ppo.evaluate(agent, envs, statistics, seed=7), ppo.evaluate(agent, make(), statistics, seed=7)
    assert (first == second).all() and len(set(first)) == 5
    assert all(torch.equal(statistics[name], x) for name, x in before.items())
    assert all(torch.equal(x, before[name]) for name, x in ppo.get_statistics(envs).items())
    wrong = {name: x * 0 + 1 for name, x in statistics.items()}
    assert (ppo.evaluate(agent, make(), wrong, seed=7) != first).any()


@policy_gradients
def test_a_run_with_normalised_box_actions_resumes_bit_for_bit(script, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    module, env_id, flags = importlib.import_module(script), "Target-v0", {"total_timesteps": 400, "save_every": 150}
    whole = train(script, tmp_path, env_id, normalize=True, **flags)

    def save_and_stop(*args, **state):
        original(*args, **state)
        raise Stop

    original = module.save_checkpoint
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(module, "save_checkpoint", save_and_stop)
        train(script, tmp_path, env_id, normalize=True, **flags)
    cut = tmp_path / "run1"
    saved = torch.load(cut / "checkpoint.pt", weights_only=True)
    assert saved["step"] < 400
    module.main(module.Args(**saved["args"] | {"resume": str(cut / "checkpoint.pt"), "run_dir": str(cut)}))
    ours, theirs = weights(cut), weights(whole)
    assert any(name.startswith("normalizer") for name in ours) and "log_std" in ours
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_logged_evaluation_is_that_of_the_normalised_policy(tmp_path):
    run_dir = train(
        "ppo", tmp_path, "Scaled-v0", normalize=True, total_timesteps=8_000, learning_rate=5e-3, eval_episodes=200
    )
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    agent = ppo.Agent(Box(-10, 10, (3,), np.float32), Discrete(2))
    agent.load_state_dict(saved["agent"])
    envs = ppo.make_envs("probe_envs:Scaled-v0", 200, True, 0.99)
    expected = ppo.evaluate(agent, envs, saved["statistics"], seed=1)
    ((_, logged),) = scalars(run_dir, "eval/return_mean")
    assert logged == pytest.approx(expected.mean(), abs=5 * expected.std() / 10)
    blind = ppo.evaluate(agent, ppo.make_envs("probe_envs:Scaled-v0", 200, False, 0.99), {}, seed=1)
    assert abs(logged - blind.mean()) > 5 * expected.std() / 10  # unnormalised, the policy does something else


def test_normalised_observations_and_rewards_are_clipped_to_10():
    envs = ppo.make_envs("probe_envs:Spike-v0", 1, True, 0.99)
    envs.reset(seed=0)
    seen = [envs.step(np.zeros(1, int))[:2] for _ in range(401)]
    assert max(abs(obs).max() for obs, _ in seen) == max(abs(reward).max() for _, reward in seen) == 10
    envs.close()


@pytest.mark.parametrize("script", ["dqn", "reinforce", "a2c", "ppo"])
def test_compiled_and_eager_runs_agree(script, tmp_path):
    """ppo.py draws its noise outside the compiled code, so does every script: the same numbers, to rounding."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(1))
    except Exception as fault:
        pytest.skip(f"torch.compile does not work here: {type(fault).__name__}")
    plain = weights(train(script, tmp_path, "Scaled-v0", total_timesteps=200))
    compiled = weights(train(script, tmp_path, "Scaled-v0", total_timesteps=200, compile=True))
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], atol=1e-4, rtol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("script", ["dqn", "reinforce", "a2c", "ppo"])
def test_a_gpu_learns_what_the_cpu_learns(script, compile, tmp_path):
    flags = {
        "ppo": {"num_steps": 64, "ent_coef": 0.0},
        "a2c": {"num_steps": 16},
        "reinforce": {"num_envs": 16},
        "dqn": {},
    }
    flags = flags[script] | {"total_timesteps": 12_000, "learning_rate": 5e-3, "eval_episodes": 30}
    run_dir = train(script, tmp_path, "Identity-v0", device="cuda", compile=compile, **flags)
    assert scalars(run_dir, "eval/return_mean")[0][1] == pytest.approx(1.0, abs=0.02)


def test_wrappers_follow_the_usual_mujoco_order():
    names, envs = [], ppo.make_envs("HalfCheetah-v5", 2, True, 0.99)
    chain = envs
    while isinstance(chain, gym.vector.VectorWrapper):
        names.append(type(chain).__name__)
        chain = chain.env
    assert names[::-1] == [
        "RecordEpisodeStatistics",
        "ClipAction",
        "NormalizeObservation",
        "TransformObservation",
        "NormalizeReward",
        "TransformReward",
    ]
    envs.reset(seed=0)
    obs, reward = envs.step(np.full((2, 6), 100, np.float32))[:2]
    assert abs(obs).max() <= 10 and abs(reward).max() <= 10
    envs.close()


def test_atari_logs_raw_scores_and_trains_on_their_sign_without_sticky_actions():
    envs = ppo.make_envs("ALE/MsPacman-v5", 2, False, 0.99)
    assert envs.unwrapped.spec.kwargs["repeat_action_probability"] == 0
    obs, _ = envs.reset(seed=0)
    assert obs.shape == (2, 4, 84, 84) and obs.dtype == np.uint8
    rng, seen, info = np.random.default_rng(0), set(), {}
    while "episode" not in info:
        _, reward, _, _, info = envs.step(rng.integers(9, size=2))
        seen |= set(reward.tolist())
    assert seen == {0, 1} and info["episode"]["r"].max() >= 100
    envs.close()


def test_greedy_returns_are_those_of_the_first_episode_of_each_environment():
    class Still(torch.nn.Linear):
        def act(self, obs, noise):
            return torch.zeros(len(obs), dtype=torch.int64)

    returns = ppo.evaluate(Still(1, 1), ppo.make_envs("probe_envs:StaggeredGrowing-v0", 4, False, 0.99), {}, seed=0)
    assert returns.tolist() == [4, 8, 11, 11]  # by then the first two have played more, for more
