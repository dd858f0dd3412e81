"""What holds for the control scripts alike, through main() on environments with known answers."""

import functools
import importlib
import itertools
import json
import sys
import types
import warnings

import gymnasium as gym
import numpy as np
import ppo
import probe_envs
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from helpers import ALGOS, scalars, spy_on, weights

DQN_SIZES = {"batch_size": 16, "learning_starts": 16, "train_every": 4, "target_every": 20, "buffer_size": 1_000}
DEFAULTS = {  # small flags of each script
    "a2c": {"num_steps": 8},
    "ppo": {"num_steps": 8, "num_minibatches": 1},
    "reinforce": {},
    "dqn": DQN_SIZES,
}
all_scripts = pytest.mark.parametrize("script", ["dqn", "reinforce", "a2c", "ppo"])
policy_gradients = pytest.mark.parametrize("script", ["reinforce", "a2c", "ppo"])
actor_critics = pytest.mark.parametrize("script", ["a2c", "ppo"])


CPU = torch.device("cpu")
LEARNS = {  # flags with which a script finds the best action of a simple task
    "ppo": {"num_steps": 64, "ent_coef": 0.0},
    "a2c": {"num_steps": 16},
    "reinforce": {"num_envs": 16},
    "dqn": {},
}


def agent_of(script, obs_space, action_space, normalize=False, **flags):
    """The network of a script, newly made."""
    module = importlib.import_module(script)
    if script == "dqn":
        return module.QNetwork(obs_space, action_space)
    return module.Agent(obs_space, action_space, normalize, **flags)


def trained_agent(script, run_dir, obs_space, action_space, normalize=False):
    """The network that a run has left."""
    agent = agent_of(script, obs_space, action_space, normalize)
    agent.load_state_dict(weights(run_dir))
    return agent


def same(a, b):
    """Whether two states have the same tensors, bit for bit."""
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


class Still(torch.nn.Linear):
    """A policy that takes action 0 in each state."""

    def __init__(self):
        super().__init__(1, 1)

    def act(self, obs, greedy):
        return torch.zeros(len(obs), dtype=torch.int64)


def train(script, tmp_path, env_id, module=None, **flags):
    """Run main() of a script, or of a changed one, in this process; returns the run directory."""
    module = module or importlib.import_module(script)
    run_dir = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    flags = {"num_envs": 4, "eval_episodes": 0, "device": "cpu"} | DEFAULTS[script] | flags
    module.main(module.Args(env_id=f"probe_envs:{env_id}", run_dir=str(run_dir), **flags))
    return run_dir


# --- resets and ends of episodes ---


@all_scripts
@pytest.mark.parametrize("kind", ["Integers", "Floats"])
def test_ends_of_episodes_may_be_numbers_instead_of_booleans(script, kind, tmp_path):
    flags = {"total_timesteps": 300, "eval_episodes": 3}
    plain, numbers = (train(script, tmp_path, f"Staggered{name}-v0", **flags) for name in ("", kind))
    assert same(weights(plain), weights(numbers))
    for tag in ("charts/episodic_return", "eval/return_mean"):
        assert scalars(plain, tag) == scalars(numbers, tag) != []


@all_scripts
def test_every_finished_episode_is_logged_once(script, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module(script), "LOG_EVERY", 50)
    logged = scalars(train(script, tmp_path, "Clock-v0", total_timesteps=300), "charts/episodes")
    steps_of_episodes = 3 * sum(episodes for _, episodes in logged)
    steps, _ = logged[-1]
    assert len(logged) >= 4
    assert steps - 4 * 2 <= steps_of_episodes <= steps  # up to 2 steps of each environment are unfinished


@all_scripts
def test_training_closes_its_environments_before_evaluation_and_an_info_may_have_any_keys(script, tmp_path):
    normalize = {} if script == "dqn" else {"normalize": True}
    run_dir = train(script, tmp_path, "Guarded-v0", num_envs=2, total_timesteps=200, eval_episodes=2, **normalize)
    assert scalars(run_dir, "eval/return_mean")[0][1] == 10
    assert probe_envs.Guarded.open == 0


@all_scripts
def test_evaluation_draws_its_environments_from_torchs_seed(script):
    module = importlib.import_module(script)
    agent = agent_of(script, Box(-1, 1, (3,)), Discrete(2))
    returns = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        envs = module.make_envs("probe_envs:Scaled-v0", 5, {})
        returns.append(module.evaluate(agent, envs, CPU))
    first, again, other = returns
    assert (first == again).all()
    assert (first != other).all()


@actor_critics
def test_constant_reward_under_truncation_is_worth_1_over_1_minus_gamma(script, tmp_path):
    run_dir = train(script, tmp_path, "Probe-v0", gamma=0.9, learning_rate=3e-3, total_timesteps=12_000, num_steps=16)
    agent = trained_agent(script, run_dir, Box(-1, 1, (1,)), Discrete(2))
    value = agent(torch.ones(1, 1), torch.zeros(1))[2].item()
    assert value == pytest.approx(1 / (1 - 0.9), abs=0.3)  # the 10-step sum would be 6.5


@policy_gradients
@pytest.mark.parametrize("normalize", [False, True])
def test_rows_that_must_not_count_leave_no_trace_in_the_weights(script, normalize, tmp_path):
    """A huge reward in reset rows; without --normalize also huge final observations (they count, but not for V)."""
    flags = {"total_timesteps": 500, "normalize": normalize}
    if script != "reinforce":
        flags["num_steps"] = 11
    trap = "StaggeredRewardTrap-v0" if normalize else "StaggeredTrap-v0"
    plain = train(script, tmp_path, "Staggered-v0", **flags)
    trapped = train(script, tmp_path, trap, **flags)
    assert same(weights(plain), weights(trapped))


@all_scripts
def test_two_episodes_that_end_at_once_are_both_counted(script, tmp_path):
    flags = {"num_steps": 4} if script in ("a2c", "ppo") else {}
    if script == "dqn":
        flags = {"batch_size": 2, "learning_starts": 4, "train_every": 4}
    run_dir = train(script, tmp_path, "Staggered-v0", num_envs=2, total_timesteps=8, **flags)
    assert sum(number for _, number in scalars(run_dir, "charts/episodes")) == 2  # returns 4 and 8
    assert [value for _, value in scalars(run_dir, "charts/episodic_return")] == [6.0]
    assert [value for _, value in scalars(run_dir, "charts/episodic_length")] == [4.0]


@policy_gradients
def test_reset_rows_are_not_counted_as_steps(script, tmp_path):
    if script == "reinforce":  # one episode of 4, 4, 6 and 6 steps
        run_dir = train(script, tmp_path, "Staggered-v0", total_timesteps=20)
        steps = 20
    else:  # rows 5 and 10 of both environments are resets
        run_dir = train(script, tmp_path, "Staggered-v0", num_envs=2, num_steps=10, total_timesteps=16)
        steps = 16
    assert [step for step, _ in scalars(run_dir, "charts/SPS")] == [steps]


@all_scripts
def test_endless_episodes_of_the_greedy_policy_are_cut_and_said_to_be(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.import_module(script), "MAX_EVAL_STEPS", 30)
    run_dir = train(script, tmp_path, "Endless-v0", total_timesteps=100, eval_episodes=5)
    assert "5 of 5 episodes were cut after 30 steps" in capsys.readouterr().out
    assert scalars(run_dir, "eval/return_mean")[0][1] == 30


# --- actions ---


@policy_gradients
def test_the_sampled_action_is_stored_and_the_clipped_one_executed(script, tmp_path, monkeypatch):
    calls = spy_on(monkeypatch, importlib.import_module(script).Agent, "forward")
    train(script, tmp_path, "Target-v0", total_timesteps=64)  # the environment asserts that actions are within ±1
    stored = torch.cat([call.actions for call in calls])
    assert stored.shape[1] == 2
    assert (stored.abs() > 1).any()


@pytest.mark.parametrize("low, high", [(-2, 2), (-1000, 1000), (-0.01, 0.01), (100, 102)])
def test_finite_bounds_of_actions_become_plus_minus_1_and_sampled_actions_are_clipped(low, high):
    seen = []
    gym.register("Bounds-v0", entry_point=lambda: probe_envs.Bounds(low, high, seen))
    envs = ppo.make_envs("Bounds-v0", 1, {})
    envs.reset(seed=0)
    for action in (-1, 0, 1, -5, 7):
        envs.step(np.array([[action]], np.float32))
    middle = (low + high) / 2
    np.testing.assert_allclose(np.ravel(seen), [low, middle, high, low, high], rtol=1e-5)
    envs.close()


def test_actions_between_any_bounds_are_within_them_to_the_last_bit():
    rng = np.random.default_rng(0)
    low = rng.normal(size=3000) * 10 ** rng.uniform(-3, 6, 3000)
    width = 10 ** rng.uniform(-3, 6, 3000)
    width[::3] = 0  # no choice
    high = low + width
    low[:4] = [1, -1, 1, -3.3]
    high[:4] = [1, 1, 7, 1e4]
    low, high = np.float32([low, high])
    seen = []
    gym.register("Bounds-v0", entry_point=lambda: probe_envs.Bounds(low, high, seen))
    envs = ppo.make_envs("Bounds-v0", 1, {})
    envs.reset(seed=0)
    lowest, highest = np.float64([low, high])
    rounding = 4 * np.finfo(np.float32).eps * np.maximum(abs(lowest), abs(highest))
    for action, share in ((-1, 0), (0, 0.5), (1, 1), (-5, 0), (5, 1)):
        envs.step(np.full((1, 3000), action, np.float32))
        assert envs.single_action_space.contains(seen[-1]), action
        expected = lowest + share * (highest - lowest)
        assert (abs(seen[-1] - expected) <= rounding).all(), action
    envs.close()


LARGEST = np.finfo(np.float32).max  # stands for "unbounded" in many an environment


@pytest.mark.parametrize("script", ["reinforce", "a2c", "ppo"])
@pytest.mark.parametrize(
    "low, high, passed",
    [
        (-np.inf, np.inf, [-3, 0.5, 9]),
        (-LARGEST, LARGEST, [-3, 0.5, 9]),
        (0, np.inf, [0, 0.5, 9]),
        (10, np.inf, [10, 10.5, 19]),
        (-np.inf, -5, [-8, -5, -5]),
    ],
)
def test_unbounded_actions_are_passed_as_they_are_and_one_sided_bounds_clip(script, low, high, passed):
    """Where the bounds leave 0 out, actions are drawn around the bound next to it."""
    seen = []
    gym.register("Bounds-v0", entry_point=lambda: probe_envs.Bounds(low, high, seen))
    envs = importlib.import_module(script).make_envs("Bounds-v0", 1, {})
    envs.reset(seed=0)
    for action in (-3, 0.5, 9):
        envs.step(np.array([[action]], np.float32))
    np.testing.assert_allclose(np.ravel(seen), passed, rtol=1e-6)
    envs.close()


def test_each_dimension_of_an_action_is_scaled_by_its_own_bounds():
    seen = []
    gym.register("Bounds-v0", entry_point=lambda: probe_envs.Bounds([0, -np.inf], [10, np.inf], seen))
    envs = ppo.make_envs("Bounds-v0", 1, {})
    envs.reset(seed=0)
    envs.step(np.array([[0.5, 3.0]], np.float32))
    np.testing.assert_allclose(np.ravel(seen), [7.5, 3.0], rtol=1e-6)
    envs.close()


@all_scripts
def test_an_interval_is_crossed_when_a_multiple_lies_in_it_also_where_steps_jump_over_it(script):
    crossed = importlib.import_module(script).crossed
    assert [crossed(10, before, 12) for before in (8, 9, 10, 11)] == [True, True, False, False]
    assert crossed(10, 9, 10)
    assert not crossed(0, 9, 12)


@policy_gradients
@pytest.mark.parametrize("bound", [0.01, 1000.0])
def test_the_best_action_is_learnt_whatever_its_bounds_are(script, bound, tmp_path):
    """The reward is best at 0.3 of the upper bound."""
    best = 0.3 * bound
    gym.register("Scale-v0", entry_point=lambda: probe_envs.Bounds(-bound, bound, [], best))
    flags = {"total_timesteps": 12_000, "learning_rate": 5e-3} | LEARNS[script]
    if script == "a2c":
        flags["anneal_lr"] = True
    run_dir = train(script, tmp_path, "Scale-v0", **flags)
    agent = trained_agent(script, run_dir, Box(-1, 1, (1,)), Box(-1, 1, (1,)))
    action = agent.act(torch.ones(1, 1), greedy=True)
    assert action.item() == pytest.approx(0.3, abs=0.05)


# --- learning ---


@policy_gradients
@pytest.mark.parametrize("env_id,best", [("Identity-v0", 1.0), ("Target-v0", 0.0), ("OneStep-v0", 1.0)])
def test_the_best_action_is_learnt(script, tmp_path, env_id, best):
    flags = {"total_timesteps": 12_000, "learning_rate": 5e-3, "eval_episodes": 30} | LEARNS[script]
    run_dir = train(script, tmp_path, env_id, **flags)
    assert scalars(run_dir, "eval/return_mean")[0][1] == pytest.approx(best, abs=0.02)


@all_scripts
@pytest.mark.parametrize("shape", [(36, 36), (36, 36, 1), (1, 36, 36), (40, 36, 12), (2, 36, 40)])
def test_any_uint8_image_is_scaled_and_goes_through_the_cnn(script, shape, tmp_path, monkeypatch):
    agent = agent_of(script, Box(0, 255, shape, np.uint8), Discrete(2))
    first = next(layer for layer in agent.modules() if isinstance(layer, torch.nn.Conv2d))
    calls = spy_on(monkeypatch, first, "forward")
    image = torch.randint(256, (3, *shape), dtype=torch.uint8)
    agent.act(image)
    expected = image if len(shape) == 3 else image[:, None]
    if shape in ((36, 36, 1), (40, 36, 12)):  # channels last
        expected = expected.permute(0, 3, 1, 2)
    torch.testing.assert_close(calls[0].input, expected / 255)
    gym.register("OneImage-v0", entry_point=lambda: probe_envs.Image(shape), max_episode_steps=15)
    assert train(script, tmp_path, "OneImage-v0", num_envs=2, eval_episodes=2, total_timesteps=40)


@policy_gradients
def test_actions_are_drawn_from_the_softmax_of_the_logits(script, monkeypatch):
    torch.manual_seed(0)
    agent = agent_of(script, Box(-1, 1, (2,), np.float32), Discrete(3))
    logits = torch.tensor([2.0, 0.0, -1.0])
    monkeypatch.setattr(agent.actor, "forward", lambda features: logits.expand(len(features), 3))
    drawn = agent.act(torch.zeros(30_000, 2))
    torch.testing.assert_close(torch.bincount(drawn, minlength=3) / 30_000, logits.softmax(0), rtol=0, atol=0.01)


@all_scripts
def test_an_image_of_zeros_and_ones_is_not_divided_and_goes_through_the_cnn(script, monkeypatch):
    agent = agent_of(script, Box(0, 1, (40, 40, 1), np.uint8), Discrete(2))
    first = next(layer for layer in agent.modules() if isinstance(layer, torch.nn.Conv2d))
    calls = spy_on(monkeypatch, first, "forward")
    image = torch.randint(2, (3, 40, 40, 1), dtype=torch.uint8)
    agent.act(image)
    torch.testing.assert_close(calls[0].input, image.permute(0, 3, 1, 2).float())


# --- observations ---

NOT_FLAT = ["graph", "text", "dict of text", "sequence", "one of two", "own"]
FLAT = [kind for kind in probe_envs.Shows.kinds if kind not in NOT_FLAT]


def shows(kind):
    """Flags of the environment that shows an observation of this kind."""
    return {"env_id": "Shows-v0", "env_kwargs": json.dumps({"kind": kind})}


@all_scripts
@pytest.mark.parametrize("kind", FLAT)
def test_a_network_gets_the_numbers_of_any_observation_and_bytes_as_shares_of_the_largest(
    script, kind, tmp_path, monkeypatch
):
    _, _, numbers = probe_envs.Shows.kinds[kind]
    layers = spy_on(monkeypatch, torch.nn.Linear, "forward")
    train(script, tmp_path, **shows(kind), total_timesteps=40, eval_episodes=1)
    seen = torch.cat([call.input for call in layers if call.self.in_features == len(numbers)])
    shown = seen[seen.any(-1)]  # lazy layers learn their sizes by zeros
    assert len(shown) >= 40
    torch.testing.assert_close(shown, torch.tensor(numbers).float().expand_as(shown))


@pytest.mark.parametrize("script", ["reinforce", "a2c", "ppo"])
@pytest.mark.parametrize("kind", ["bytes", "tiles"])
def test_bytes_are_normalised_on_the_scale_that_the_network_gets(script, kind, tmp_path):
    _, _, numbers = probe_envs.Shows.kinds[kind]
    run_dir = train(script, tmp_path, **shows(kind), total_timesteps=40, normalize=True)
    torch.testing.assert_close(weights(run_dir)["obs_norm.mean"].flatten(), torch.tensor(numbers).float())


@all_scripts
@pytest.mark.parametrize("kind", NOT_FLAT)
def test_an_observation_that_is_not_made_of_numbers_is_refused_with_the_wrappers_that_help(script, kind, tmp_path):
    with pytest.raises(SystemExit) as refusal:
        train(script, tmp_path, **shows(kind), total_timesteps=40)
    sentence = str(refusal.value)
    assert sentence.startswith("probe_envs:Shows-v0: observations of ")
    assert "are not made of numbers" in sentence
    assert "\n" not in sentence
    assert "gymnasium.wrappers.TransformObservation" in sentence
    assert "FilterObservation" in sentence
    assert not list(tmp_path.iterdir())


@all_scripts
@pytest.mark.parametrize(
    "shape, dtype, is_image",
    [
        ((36, 36), np.uint8, True),
        ((36, 36, 3), np.uint8, True),
        ((3, 36, 90), np.uint8, True),
        ((35, 90), np.uint8, False),
        ((90, 35, 3), np.uint8, False),
        ((3, 35, 36), np.uint8, False),
        ((36,), np.uint8, False),
        ((1, 36, 36, 3), np.uint8, False),
        ((36, 36), np.float32, False),
    ],
)
def test_bytes_of_at_least_36_by_36_are_images(script, shape, dtype, is_image):
    assert importlib.import_module(script).is_image(Box(0, 1, shape, dtype)) == is_image


@all_scripts
@pytest.mark.parametrize("kind", ["rounding", "bounds", "float64"])
def test_observations_a_little_outside_their_space_train_and_gymnasium_says_so_once(script, kind, tmp_path):
    with warnings.catch_warnings(record=True) as shown:
        kwargs = json.dumps({"kind": kind})
        run_dir = train(script, tmp_path, "Slip-v0", env_kwargs=kwargs, total_timesteps=200, eval_episodes=3)
    said = [str(warning.message) for warning in shown if "not within the observation space" in str(warning.message)]
    assert len(said) == len(set(said)) == 2  # one of the reset, one of the step
    assert all(x.isfinite().all() for x in weights(run_dir).values())


@policy_gradients
@pytest.mark.parametrize("space", [Box(-1, 1, (3,)), Box(0, 255, (36, 36), np.uint8)], ids=["vector", "image"])
def test_weights_begin_orthogonal_and_small_in_the_policys_last_layer(script, space):
    agent = agent_of(script, space, Discrete(2))
    gains = {last_layer(agent.actor): 0.01}
    if script != "reinforce":
        gains[last_layer(agent.critic)] = 1.0
    layers = [layer for layer in agent.modules() if hasattr(layer, "weight")]
    assert len(layers) >= 3
    for layer in layers:
        gain = gains.get(layer, 2**0.5)
        stretch = torch.linalg.svdvals(layer.weight.detach().flatten(1))  # in each direction
        torch.testing.assert_close(stretch, torch.full_like(stretch, gain))
        assert not layer.bias.any()


def last_layer(network):
    """The last layer of a list of layers, or the only one."""
    *_, last = network.modules()
    return last


@policy_gradients
def test_the_networks_on_vectors_have_two_hidden_layers_of_64_with_tanh(script):
    agent = agent_of(script, Box(-1, 1, (5,)), Discrete(3))
    networks = [(agent.actor, 3)] if script == "reinforce" else [(agent.actor, 3), (agent.critic, 1)]
    for network, outputs in networks:
        sizes = [tuple(layer.weight.shape) for layer in network if isinstance(layer, torch.nn.Linear)]
        assert sizes == [(64, 5), (64, 64), (outputs, 64)]
        assert [type(layer).__name__ for layer in network] == ["Linear", "Tanh", "Linear", "Tanh", "Linear"]


class Own(torch.nn.Module):
    """A network of a user, which is no list of layers."""

    def __init__(self, outputs):
        super().__init__()
        self.first = torch.nn.LazyLinear(8)
        self.last = torch.nn.Linear(8, outputs)

    def forward(self, x):
        return self.last(self.first(x).tanh())


@policy_gradients
def test_any_module_may_take_the_place_of_the_actor_and_the_critic(script, tmp_path, monkeypatch):
    source = (ALGOS / f"{script}.py").read_text()
    for network, own in ("mlp(actor_head)", "Own(num_actions)"), ("mlp(critic_head)", "Own(1)"):
        assert source.count(network) == (0 if (script, own) == ("reinforce", "Own(1)") else 1)
        source = source.replace(network, own)
    changed = types.ModuleType("changed")
    changed.__file__ = str(ALGOS / f"{script}.py")
    changed.Own = Own
    monkeypatch.setitem(sys.modules, "changed", changed)
    exec(compile(source, changed.__file__, "exec"), changed.__dict__)
    flags = {"learning_rate": 0.01, "total_timesteps": 2_500, "num_envs": 16}
    run_dir = train(script, tmp_path, "Identity-v0", changed, **flags)
    assert weights(run_dir)["actor.first.weight"].shape == (8, 1)
    assert scalars(run_dir, "charts/episodic_return")[-1][1] > 0.8


@policy_gradients
@pytest.mark.parametrize("log_std_init, deviation", [(-1.0, 0.368), (0.7, 2.014)])
def test_log_std_init_is_the_logarithm_of_the_deviation_that_actions_are_drawn_with(
    script, log_std_init, deviation, tmp_path
):
    flags = {"log_std_init": log_std_init, "learning_rate": 0.0, "total_timesteps": 64}
    run_dir = train(script, tmp_path, "Target-v0", **flags)
    agent = trained_agent(script, run_dir, Box(-1, 1, (1,)), Box(-1, 1, (2,)))
    assert agent.log_std.tolist() == pytest.approx([log_std_init, log_std_init])
    drawn = agent.act(torch.ones(20_000, 1))
    assert drawn.std(0).tolist() == pytest.approx([deviation, deviation], rel=0.03)


@policy_gradients
def test_an_agent_of_discrete_actions_has_no_deviation(script):
    agent = agent_of(script, Box(-1, 1, (3,)), Discrete(2), log_std_init=-1.0)
    assert not hasattr(agent, "log_std")


@policy_gradients
def test_discrete_observations_train(script, tmp_path):
    gym.register("Lake-v0", "gymnasium.envs.toy_text.frozen_lake:FrozenLakeEnv", max_episode_steps=100)
    assert train(script, tmp_path, "Lake-v0", total_timesteps=600)


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
    numbers = [len(each) for each in seeds]
    assert numbers == [4, 5, 4, 5, 4, 5]  # in training and evaluation
    assert len(set.union(*seeds)) == 27


def test_the_normaliser_has_the_mean_and_variance_of_all_rows_it_saw():
    torch.manual_seed(0)
    norm = ppo.RunningNorm(3)
    mean = torch.tensor([5.0, -50, 0])
    deviation = torch.tensor([1.0, 10.0, 0.1])
    rows = mean + deviation * torch.randn(1000, 3)
    for part in rows.split([1, 2, 97, 400, 500]):
        norm.update(part)
    torch.testing.assert_close(norm.mean, rows.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.var, rows.var(0, correction=0), rtol=1e-3, atol=1e-5)
    expected = (rows - rows.mean(0)) / rows.std(0, correction=0)
    torch.testing.assert_close(norm(rows), expected, rtol=1e-3, atol=1e-3)
    assert norm.count == 1000
    far = norm(torch.tensor([[1e6, -1e6, 0.0]]))
    assert far[0, :2].tolist() == [10, -10]


@actor_critics
def test_the_discounted_return_goes_on_from_one_rollout_to_the_next(script, tmp_path):
    flags = {"num_envs": 1, "normalize": True, "total_timesteps": 500, "gamma": 0.99}
    whole = weights(train(script, tmp_path, "Spike-v0", num_steps=500, **flags))["return_norm.var"]
    parts = weights(train(script, tmp_path, "Spike-v0", num_steps=50, **flags))["return_norm.var"]
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=0)


@actor_critics
def test_the_discounted_return_ends_with_the_episode(script, tmp_path, monkeypatch):
    module = importlib.import_module(script)
    updates = spy_on(monkeypatch, module.RunningNorm, "update")
    train(script, tmp_path, "OneStep-v0", normalize=True, total_timesteps=200)
    returns = torch.cat([call.x for call in updates if call.self.mean.shape == ()])
    assert len(returns) >= 200
    assert set(returns.tolist()) == {0.0, 1.0}


# An environment of episodes of 2 steps beside one of 4. In 6 rows an actor-critic sees, where (n) is a final observation
# and no step is taken from it: 0 1 (2) 0 1 (2) and 0 1 2 3 (4) 0. REINFORCE sees one episode of each: 0 1 and 0 1 2 3.
UNEVEN = {"num_envs": 2, "normalize": True, "gamma": 0.5}
IN_ROLLOUT = [0, 1, 0, 1, 0, 1, 2, 3, 0]
SEEN = {"reinforce": [0, 1, 0, 1, 2, 3], "a2c": IN_ROLLOUT, "ppo": IN_ROLLOUT}


def one_update_on_uneven_episodes(script, tmp_path):
    """Run directory of a single update."""
    lengths = itertools.cycle([2, 4])
    gym.register("Uneven-v0", entry_point=lambda: probe_envs.Counts(next(lengths)))
    rollout = {} if script == "reinforce" else {"num_steps": 6}
    return train(script, tmp_path, "Uneven-v0", total_timesteps=len(SEEN[script]), **UNEVEN, **rollout)


@policy_gradients
def test_observation_statistics_are_those_of_the_steps_alone(script, tmp_path):
    saved = weights(one_update_on_uneven_episodes(script, tmp_path))
    assert saved["obs_norm.count"] == len(SEEN[script])
    mean, var = (7 / 6, 41 / 36) if script == "reinforce" else (8 / 9, 80 / 81)
    assert saved["obs_norm.mean"].item() == pytest.approx(mean, rel=1e-5)
    assert saved["obs_norm.var"].item() == pytest.approx(var, rel=1e-5)


@policy_gradients
def test_observation_statistics_change_after_the_update_and_those_of_returns_before(script, tmp_path, monkeypatch):
    order = []
    module = importlib.import_module(script)
    update = module.RunningNorm.update
    clip = torch.nn.utils.clip_grad_norm_

    def updates_statistics(norm, x):
        order.append("observations" if norm.mean.ndim else "returns")
        update(norm, x)

    def takes_a_gradient(*arguments):
        order.append("gradient")
        return clip(*arguments)

    monkeypatch.setattr(module.RunningNorm, "update", updates_statistics)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", takes_a_gradient)
    one_update_on_uneven_episodes(script, tmp_path)
    gradients = {"reinforce": 1, "a2c": 1, "ppo": 4}[script]
    returns = [] if script == "reinforce" else ["returns"]
    assert order == [*returns, *["gradient"] * gradients, "observations"]


@actor_critics
def test_return_statistics_are_those_of_discounted_sums_within_each_episode(script, tmp_path):
    saved = weights(one_update_on_uneven_episodes(script, tmp_path))
    sums = [1, 1.5, 1, 1.5] + [1, 1.5, 1.75, 1.875, 1]  # of rewards of 1 at γ = 0.5
    assert saved["return_norm.count"] == 9
    assert saved["return_norm.mean"].item() == pytest.approx(np.mean(sums), rel=1e-5)
    assert saved["return_norm.var"].item() == pytest.approx(np.var(sums), rel=1e-5)


@actor_critics
@pytest.mark.parametrize(
    "steps, reward, scaled",
    [
        (50, 3.0, 50 / 49**0.5),  # one of 50 returns is not 0: the deviation is 3·√49 / 50
        (50, -3.0, -50 / 49**0.5),
        (200, 3.0, 10),  # instead of 14.2
        (200, -3.0, -10),
    ],
)
def test_rewards_are_divided_by_the_deviation_of_returns_and_clipped_to_10(
    script, steps, reward, scaled, tmp_path, monkeypatch
):
    gae = spy_on(monkeypatch, importlib.import_module(script), "compute_gae")
    flags = {"env_kwargs": json.dumps({"reward": reward, "at": 20}), "gamma": 0.0, "normalize": True}
    train(script, tmp_path, "Rare-v0", num_envs=1, num_steps=steps, total_timesteps=steps, **flags)
    expected = torch.zeros(steps, 1)
    expected[19] = scaled
    torch.testing.assert_close(gae[0].rewards, expected, rtol=1e-4, atol=0)


@all_scripts
def test_the_last_learning_rate_is_that_of_the_last_update(script, tmp_path):
    flags = {"total_timesteps": 400, "learning_rate": 0.1, "anneal_lr": True}
    saved = torch.load(train(script, tmp_path, "Probe-v0", **flags) / "checkpoint.pt", weights_only=True)
    assert 0 < saved["optimizer"]["param_groups"][0]["lr"] < 0.1 * 45 / 400  # an update takes at most 40 steps


def test_rewards_are_scaled_by_the_deviation_of_discounted_returns_and_clipped(tmp_path, monkeypatch):
    gae = spy_on(monkeypatch, ppo, "compute_gae")
    flags = {"num_envs": 1, "num_steps": 500, "normalize": True, "total_timesteps": 500, "gamma": 0.99}
    run_dir = train("ppo", tmp_path, "Spike-v0", **flags)
    scaled = gae[0].rewards
    raw = []
    discounted = []
    running = 0.0
    env = gym.make("probe_envs:Spike-v0")
    torch.manual_seed(1)
    ppo.Agent(env.observation_space, env.action_space, True)
    env.reset(seed=int(torch.randint(2**30, ())))
    for _ in range(500):
        _, reward, *_ = env.step(0)
        running = reward + 0.99 * running
        raw.append(reward)
        discounted.append(running)
    expected = np.array(raw) / np.std(discounted)
    expected = expected.clip(-10, 10)
    np.testing.assert_allclose(scaled.flatten().numpy(), expected, rtol=1e-3, atol=1e-5)
    var = weights(run_dir)["return_norm.var"]
    assert var.item() == pytest.approx(np.var(discounted), rel=1e-3)


@policy_gradients
def test_a_loaded_agent_acts_on_raw_observations_and_evaluation_changes_no_statistics(script, tmp_path):
    run_dir = train(script, tmp_path, "Scaled-v0", normalize=True, total_timesteps=4_000, eval_episodes=5)
    module = importlib.import_module(script)
    saved = weights(run_dir)
    assert saved["obs_norm.mean"].numpy() == pytest.approx(50, abs=2)
    assert saved["obs_norm.var"].numpy() == pytest.approx(100, rel=0.2)
    space = Box(-np.inf, np.inf, (3,), np.float64)
    agent = trained_agent(script, run_dir, space, Discrete(2), normalize=True)
    raw = 50 + 10 * torch.randn(50, 3, dtype=torch.float64)
    standard = (raw - saved["obs_norm.mean"]) / saved["obs_norm.var"].sqrt()
    features = agent.eval().features(raw)
    torch.testing.assert_close(features, standard.float(), rtol=1e-4, atol=1e-4)
    scores = []
    for _ in range(2):
        torch.manual_seed(7)
        envs = module.make_envs("probe_envs:Scaled-v0", 5, {})
        scores.append(module.evaluate(agent, envs, CPU))
    first, second = scores
    assert (first == second).all()
    assert len(set(first)) == 5
    assert same(agent.state_dict(), saved)


@actor_critics
def test_each_step_counts_once_in_the_statistics_and_reset_rows_do_not(script, tmp_path):
    run_dir = train(script, tmp_path, "Clock-v0", num_envs=1, num_steps=11, normalize=True, total_timesteps=8)
    assert weights(run_dir)["obs_norm.count"] == weights(run_dir)["return_norm.count"] == 9  # rows 4 and 8 are resets


@all_scripts
def test_compiled_and_eager_runs_agree(script, tmp_path, monkeypatch):
    """Random numbers are drawn on the CPU in either: the same, so that only rounding differs."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(1))
    except Exception as fault:
        pytest.skip(f"torch.compile does not work here: {type(fault).__name__}")
    if script != "ppo":  # one script makes machine code, which takes ten seconds; the others are traced alone
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    plain = train(script, tmp_path, "Identity-v0", total_timesteps=3_000, learning_rate=5e-3)
    compiled = train(script, tmp_path, "Identity-v0", total_timesteps=3_000, learning_rate=5e-3, compile=True)
    _, eager_return = scalars(plain, "charts/episodic_return")[-1]
    _, compiled_return = scalars(compiled, "charts/episodic_return")[-1]
    assert compiled_return == pytest.approx(eager_return, abs=0.15)
    assert min(eager_return, compiled_return) > 0.6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [False, True])
@all_scripts
def test_a_gpu_learns_what_the_cpu_learns(script, compile, tmp_path):
    flags = {"total_timesteps": 12_000, "learning_rate": 5e-3, "eval_episodes": 30} | LEARNS[script]
    run_dir = train(script, tmp_path, "Identity-v0", device="cuda", compile=compile, **flags)
    assert scalars(run_dir, "eval/return_mean")[0][1] == pytest.approx(1.0, abs=0.02)


# --- Atari ---


@pytest.mark.parametrize("env_id", ["ALE/MsPacman-v5", "ale_py:ALE/MsPacman-v5"])
def test_atari_environments_give_raw_scores_without_sticky_actions(env_id):
    envs = ppo.make_envs(env_id, 2, {})
    assert envs.unwrapped.spec.kwargs["repeat_action_probability"] == 0
    obs, _ = envs.reset(seed=0)
    assert obs.shape == (2, 4, 84, 84)
    assert obs.dtype == np.uint8
    rng = np.random.default_rng(0)
    seen = set()
    info = {}
    while "episode_statistics" not in info:
        actions = rng.integers(9, size=2)
        _, reward, _, _, info = envs.step(actions)
        seen.update(reward.tolist())
    assert max(seen) >= 10
    assert info["episode_statistics"]["r"].max() >= 100
    envs.close()


@policy_gradients
def test_atari_trains_on_the_sign_of_rewards(script, tmp_path, monkeypatch):
    module = importlib.import_module(script)
    if script == "reinforce":
        calls = spy_on(monkeypatch, module, "discounted_sum")
    else:
        calls = spy_on(monkeypatch, module, "compute_gae")
    flags = {"num_envs": 2, "total_timesteps": 200, "eval_episodes": 0, "device": "cpu"} | DEFAULTS[script]
    flags["num_steps"] = 100
    module.main(module.Args(env_id="ALE/MsPacman-v5", run_dir=str(tmp_path / "run"), **flags))
    given = [call.x if script == "reinforce" else call.rewards for call in calls]
    rewards = torch.cat([numbers.flatten() for numbers in given])
    assert set(rewards.tolist()) == {0.0, 1.0}


@actor_critics
def test_atari_scales_the_sign_of_rewards_by_the_deviation_of_its_own_returns(script, tmp_path, monkeypatch):
    module = importlib.import_module(script)
    gae = spy_on(monkeypatch, module, "compute_gae")
    flags = {"num_envs": 2, "total_timesteps": 200, "eval_episodes": 0, "device": "cpu"} | DEFAULTS[script]
    flags |= {"num_steps": 100, "normalize": True, "gamma": 0.9}
    module.main(module.Args(env_id="ALE/MsPacman-v5", run_dir=str(tmp_path / "run"), **flags))
    scaled = gae[0].rewards
    signs = (scaled > 0).float()
    returns = module.discounted_sum(signs.flip(0), torch.full_like(signs, 0.9))
    assert signs.any()
    expected = signs / returns.std(correction=0)
    torch.testing.assert_close(scaled, expected.clamp(-10, 10), rtol=1e-4, atol=1e-6)


def test_no_environment_of_atari_presses_fire_for_the_policy():
    for kwargs in ({}, {"render_mode": "rgb_array"}):
        envs = ppo.make_envs("ALE/Breakout-v5", 1, kwargs)
        del envs.unwrapped._add_info  # the infos that the scripts leave out say how many balls are left
        envs.reset(seed=3)
        infos = [envs.step(np.zeros(1, int))[-1] for _ in range(300)]
        assert {int(info["lives"][0]) for info in infos} == {5}  # no ball was lost, since none was served
        envs.close()


def test_the_rendered_environment_of_atari_shows_the_policy_what_training_showed_it():
    rendered, native = (ppo.make_envs("ALE/Pong-v5", 1, kwargs) for kwargs in ({"render_mode": "rgb_array"}, {}))
    assert rendered.single_observation_space.shape == native.single_observation_space.shape == (4, 84, 84)
    assert rendered.single_action_space == native.single_action_space
    assert (rendered.reset(seed=0)[0] > 0).any()
    rendered.close()
    native.close()


@all_scripts
@pytest.mark.parametrize("flags, frames", [({}, 4), ({"frameskip": 2}, 2)])
def test_a_step_of_atari_is_as_many_frames_in_the_rendered_environment_as_in_the_native_one(script, flags, frames):
    for kwargs in (flags, flags | {"render_mode": "rgb_array"}):
        envs = importlib.import_module(script).make_envs("ALE/Pong-v5", 1, kwargs)
        del envs.unwrapped._add_info  # the infos that the scripts leave out count the frames
        envs.reset(seed=0)
        before, after = (envs.step(np.zeros(1, int))[-1]["episode_frame_number"][0] for _ in range(2))
        assert after - before == frames
        envs.close()


@all_scripts
def test_greedy_returns_are_those_of_the_first_episode_of_each_environment(script):
    module = importlib.import_module(script)
    envs = module.make_envs("probe_envs:StaggeredGrowing-v0", 4, {})
    returns = module.evaluate(Still(), envs, CPU)
    assert returns.tolist() == [4, 8, 11, 11]  # by then the first two have played more, for more


class Bursts(gym.vector.VectorEnv):
    """One environment ends after a step worth 1 and then rewards infinitely, one after 3 steps worth 2 each."""

    num_envs, time = 2, 0

    def reset(self, seed):
        return np.zeros(2, int), {}

    def step(self, action):
        self.time += 1
        reward = [1.0, 2.0] if self.time == 1 else [np.inf, 2.0]
        over = [self.time == 1, self.time == 3]
        return np.zeros(2, int), np.array(reward), np.array(over), np.zeros(2, bool), {}


@all_scripts
def test_an_infinite_reward_after_its_episode_changes_no_greedy_return(script):
    returns = importlib.import_module(script).evaluate(Still(), Bursts(), CPU)
    assert returns.tolist() == [1, 6]


def test_an_infinite_reward_after_its_episode_changes_no_return_of_q_learnings_policy():
    returns = importlib.import_module("q_learning").play(torch.zeros(1, dtype=int), Bursts())
    assert returns.tolist() == [1, 6]


@actor_critics
def test_the_explained_variance_of_constant_returns_is_a_number(script, tmp_path):
    run_dir = train(script, tmp_path, "Endless-v0", total_timesteps=200, gamma=0.0, gae_lambda=1.0)  # 1, at each step
    logged = scalars(run_dir, "losses/explained_variance")
    assert logged
    assert np.isfinite(logged).all()


@actor_critics
def test_a_rollout_in_which_one_step_counts_logs_no_nan_and_torch_does_not_warn(script, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*degrees of freedom")
        run_dir = train(script, tmp_path, "OneStep-v0", num_envs=1, num_steps=2, total_timesteps=20)
    tags = ["explained_variance", "policy_loss", "value_loss", "entropy", "grad_norm"]
    logged = [value for tag in tags for _, value in scalars(run_dir, f"losses/{tag}")]
    assert len(logged) >= 5
    assert np.isfinite(logged).all()
    assert all(x.isfinite().all() for x in weights(run_dir).values())


@pytest.mark.parametrize("script", ["q_learning", "dqn", "reinforce", "a2c", "ppo"])
def test_evaluation_episodes_are_cut_where_those_of_atari_are(script):
    assert importlib.import_module(script).MAX_EVAL_STEPS == 27_000


@all_scripts
def test_the_mean_and_deviation_of_greedy_returns_are_logged_and_said(script, tmp_path, capsys):
    run_dir = train(script, tmp_path, "Staggered-v0", total_timesteps=20, eval_episodes=4)
    for name, expected in (("mean", 6), ("std", 2**0.5)):  # of 4, 8, 6 and 6
        assert scalars(run_dir, f"eval/return_{name}")[0][1] == pytest.approx(expected)
    assert "evaluation: return 6.00 ± 1.41 over 4 greedy episodes" in capsys.readouterr().out


@all_scripts
def test_a_truncated_episode_of_the_greedy_policy_is_over(script, tmp_path):
    run_dir = train(script, tmp_path, "Probe-v0", total_timesteps=100, eval_episodes=3)
    assert scalars(run_dir, "eval/return_mean")[0][1] == 10
