"""DQN: each formula against a hand number, the replay buffer against what really happened, main() against known Q*."""

import math

import dqn
import gymnasium as gym
import numpy as np
import probe_envs  # noqa: F401  (registers the environments)
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from helpers import run, scalars
from torch import tensor

CHAIN_REWARD = np.array([[1.0, 0.0], [0.0, 2.0]])  # of state and action
CHAIN_NEXT = np.array([[0, 1], [0, -1]])  # -1: terminated


class Chain(gym.Env):
    """Two states and actions with the tables above; starts in a random state."""

    observation_space, action_space = Discrete(2), Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = int(self.np_random.integers(2))
        return self.state, {}

    def step(self, action):
        reward, following = CHAIN_REWARD[self.state, action], CHAIN_NEXT[self.state, action]
        self.state = max(0, int(following))
        return self.state, reward, following < 0, False, {}


gym.register("Chain-v0", entry_point=Chain, max_episode_steps=7)


def train(tmp_path, env_id, **flags):
    """Run main() in this process; returns the run directory and the checkpoint."""
    run_dir = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    small = {"num_envs": 4, "batch_size": 16, "train_every": 4, "learning_starts": 16, "buffer_size": 2000}
    flags = small | {"eval_episodes": 0, "device": "cpu"} | flags
    dqn.main(dqn.Args(env_id=env_id, run_dir=str(run_dir), **flags))
    return run_dir, torch.load(run_dir / "checkpoint.pt", weights_only=True)


def q_values(checkpoint, name, obs):
    """Q (B, A) of the network `name` of a checkpoint, for vectors (B, D) and two actions."""
    network = dqn.QNetwork(Box(-1, 1, obs.shape[1:]), Discrete(2))
    network.load_state_dict(checkpoint[name])
    with torch.no_grad():
        return network(obs)


# --- formulas ---


def test_a_terminal_target_is_the_reward_and_any_other_bootstraps_with_the_largest_q():
    next_q = tensor([[2.0, 3.0], [2.0, 3.0], [5.0, 4.0]])
    targets = dqn.td_target(tensor([1.0, 1.0, -2.0]), next_q, tensor([1.0, 0.0, 0.0]), 0.5)
    assert targets.tolist() == [1.0, 2.5, 0.5]


def test_the_loss_of_a_minibatch_equals_the_hand_computed_one():
    network = dqn.QNetwork(Box(-1, 1, (2,)), Discrete(2))
    network.trunk, network.head = torch.nn.Sequential(), torch.nn.Linear(2, 2, bias=False)
    network.head.weight.data = tensor([[1.0, 2.0], [3.0, 4.0]])
    # Q([1, 0]) = [1, 3], Q([0, 1]) = [2, 4]: chosen 3 and 2, errors 1 and 3
    loss, metrics = dqn.q_loss(network, torch.eye(2), tensor([1, 0]), tensor([4.0, 5.0]), 2)
    assert loss.item() == 5.0 and metrics.tolist() == [5.0, 2.5]
    loss.backward()  # d loss / d Q = -1 and -3
    assert network.head.weight.grad.tolist() == [[0.0, -3.0], [-1.0, 0.0]]


def test_shares_of_a_minibatch_add_up_to_its_loss_and_metrics():
    torch.manual_seed(0)
    network = dqn.QNetwork(Box(-1, 1, (3,)), Discrete(2))
    batch = torch.randn(6, 3), torch.randint(2, (6,)), torch.randn(6)
    whole = dqn.q_loss(network, *batch, 6)[1]
    halves = [dqn.q_loss(network, *(x[part] for x in batch), 6)[1] for part in (slice(3), slice(3, 6))]
    torch.testing.assert_close(sum(halves), whole)


def test_columns_instead_of_vectors_are_caught_before_they_broadcast():
    vector, column, q = torch.zeros(3), torch.zeros(3, 1), torch.zeros(3, 2)
    for arguments in ((vector, column), (column, vector), (column, column)):
        with pytest.raises(AssertionError):
            dqn.squared_error(*arguments)
    for rewards, next_q, terminated in ((column, q, vector), (vector, q, column), (vector, q[:1], vector)):
        with pytest.raises(AssertionError):
            dqn.td_target(rewards, next_q, terminated, 0.9)


def test_epsilon_is_right_at_the_start_in_the_middle_at_the_end_and_after_it():
    at = [dqn.epsilon_at(step, 1.0, 0.05, 1000) for step in (0, 500, 1000, 5000)]
    assert at == pytest.approx([1.0, 0.525, 0.05, 0.05])
    assert [dqn.epsilon_at(step, 1.0, 0.1, 0) for step in (0, 1)] == pytest.approx([1.0, 0.1])


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_actions_are_random_with_probability_epsilon_and_greedy_otherwise(epsilon):
    torch.manual_seed(0)
    network = dqn.QNetwork(Box(-1, 1, (2,)), Discrete(3))
    obs = torch.ones(1, 2).expand(30_000, 2)
    best = int(network.act(obs[:1], 0.0))
    shares = torch.bincount(network.act(obs, network.noise(epsilon, 30_000)), minlength=3) / 30_000
    expected = torch.full((3,), epsilon / 3).index_add(0, tensor([best]), tensor([1 - epsilon]))
    torch.testing.assert_close(shares, expected, rtol=0, atol=0 if epsilon == 0 else 0.01)


def test_minibatches_are_due_every_train_every_steps_after_learning_starts():
    assert [dqn.minibatches_due(step, 100, 10) for step in (0, 99, 100, 109, 110, 129, 130)] == [0, 0, 0, 0, 1, 2, 3]


# --- replay buffer ---


class Stacks:
    """Stands in for a vector environment: N stacks of random frames from zeros, episodes of a few steps, NEXT_STEP."""

    def __init__(self, num_envs, stack, frame_shape, dtype):
        self.num_envs, self.frame_shape, self.dtype = num_envs, frame_shape, dtype
        self.channels = frame_shape[0]
        self.single_observation_space = Box(0, 255, (stack * self.channels, *frame_shape[1:]), dtype)
        self.single_action_space = Discrete(3)
        self.rng = np.random.default_rng(0)

    def push(self, obs):
        frame = self.rng.integers(1, 256, self.frame_shape).astype(self.dtype)
        return np.concatenate([obs[self.channels :], frame])

    def reset(self, seed=None):
        self.obs = np.zeros((self.num_envs, *self.single_observation_space.shape), self.dtype)
        return self.step(None)[0], {}

    def step(self, actions):
        if actions is not None:
            self.obs[self.done] = 0
        self.obs = np.stack([self.push(obs) for obs in self.obs])
        over = (self.rng.random((2, self.num_envs)) < 0.1) & (actions is not None)
        if actions is not None:
            over &= ~self.done
        self.done = over.any(0)
        return self.obs.copy(), self.rng.random(self.num_envs), over[0], over[1] & ~over[0], {}


def check_buffer(envs, stack, rows, steps, check_every, cut_every=10**9):
    """Play at random into a ring of `rows` rows; now and then compare all that can be drawn with the truth."""
    N = envs.num_envs
    buffer = dqn.ReplayBuffer(rows * N, N, envs.single_observation_space, stack)
    rng, ends = np.random.default_rng(0), 0
    happened = {}  # (row number, environment) to the step taken there
    for step in range(steps):
        if step % cut_every == 0:
            obs, _ = envs.reset(seed=step)
            buffer.begin(obs, first=True)
            prev_done = np.zeros(N, bool)
        actions = rng.integers(envs.single_action_space.n, size=N)
        next_obs, rewards, terminated, truncated, _ = envs.step(actions)
        now = int(buffer.count) - 1
        buffer.add(np.stack([actions, rewards, terminated, ~prev_done], -1).astype(np.float32), next_obs)
        for n in np.flatnonzero(~prev_done):
            happened[now, n] = obs[n], actions[n], rewards[n], terminated[n], next_obs[n]
        obs, prev_done = next_obs.copy(), terminated | truncated
        ends += prev_done.sum()
        if (step + 1) % check_every == 0:
            oldest = now + 1 - rows + stack  # the first whose stack is still whole
            happened = {key: value for key, value in happened.items() if key[0] >= oldest}
            expected = {number % rows * N + n: value for (number, n), value in happened.items()}
            assert np.flatnonzero(buffer.is_step).tolist() == sorted(expected)
            for got, true in zip(buffer.get(tensor(sorted(expected))), zip(*(expected[i] for i in sorted(expected)))):
                np.testing.assert_array_equal(got.numpy(), np.stack(true).astype(got.numpy().dtype))
    return buffer, ends


@pytest.mark.parametrize("rows", [8, 13, 40])
@pytest.mark.parametrize(
    "stack, frame_shape, dtype",
    [
        (4, (1, 5, 6), np.uint8),
        (1, (3, 5, 6), np.uint8),
        (2, (3, 5, 6), np.uint8),
        (1, (2,), np.float32),
    ],
)
def test_all_steps_in_the_ring_come_out_as_they_happened_across_ends_cuts_and_wraps(stack, frame_shape, dtype, rows):
    envs = Stacks(3, stack, frame_shape, dtype)
    _, ends = check_buffer(envs, stack, rows, steps=200, check_every=1, cut_every=30)
    assert ends > 50


def test_stacks_of_pong_are_rebuilt_exactly_through_wraps_and_the_end_of_a_game():
    envs = dqn.make_envs("ALE/Pong-v5", 2, False, 0.99)
    buffer, ends = check_buffer(envs, 4, rows=250, steps=1100, check_every=110)
    envs.close()
    assert ends >= 2 and int(buffer.count) > 4 * 250
    assert buffer.frames.shape == (250, 2, 1, 84, 84) and buffer.frames.dtype == np.uint8


def test_steps_are_drawn_uniformly_and_reset_rows_never():
    torch.manual_seed(0)
    buffer = dqn.ReplayBuffer(20, 2, Box(-1, 1, (1,)), 1)
    buffer.begin(np.zeros((2, 1)), first=True)
    for t in range(7):
        buffer.add(np.array([[0, 0, 0, 1], [0, 0, 0, t % 2]]), np.zeros((2, 1)))
    counts = torch.bincount(buffer.draw(20_000), minlength=20)
    steps = torch.from_numpy(buffer.is_step).flatten()
    assert steps.sum() == 10 and counts[~steps].sum() == 0
    torch.testing.assert_close(counts[steps] / 20_000, torch.full((10,), 0.1), rtol=0, atol=0.01)


# --- memory ---


def test_a_million_atari_frames_fit_in_about_seven_gigabytes(monkeypatch):
    monkeypatch.setattr(dqn, "available_memory", lambda: 7_500_000_000)
    dqn.check_memory(dqn.Args(env_id="ALE/Pong-v5", buffer_size=1_000_000), Box(0, 255, (4, 84, 84), np.uint8))


def test_the_refusal_of_a_large_buffer_names_the_size_that_fits(monkeypatch, capsys):
    monkeypatch.setattr(dqn, "available_memory", lambda: 10_000_000)
    space = Box(-1, 1, (4,), np.float32)
    with pytest.raises(SystemExit) as stop:
        dqn.check_memory(dqn.Args(buffer_size=1_000_000), space)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "--buffer-size 1000000" in message
    fitting = int(message.split("at most ")[1].split()[0])
    buffer = dqn.ReplayBuffer(fitting, 1, space, 1)
    assert 9_400_000 < sum(x.nbytes for x in buffer.state_dict().values()) <= 9_500_000  # 5 % is left to all else
    dqn.check_memory(dqn.Args(buffer_size=fitting), space)
    with pytest.raises(SystemExit):
        dqn.check_memory(dqn.Args(buffer_size=fitting + 1), space)


def test_a_buffer_larger_than_memory_is_refused_in_one_line_before_any_work(tmp_path):
    done = run("dqn", "--buffer-size", 10**12, "--run-dir", tmp_path / "run")
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "run").exists()
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: --buffer-size 1000000000000 needs")


# --- main ---


@pytest.mark.parametrize(
    "flags, named",
    [
        ({"learning_starts": 100}, "--learning-starts"),
        ({"buffer_size": 100}, "--buffer-size"),
        ({"buffer_size": 1000, "num_envs": 200}, "--buffer-size"),
        ({"total_timesteps": 10_000}, "--learning-starts"),
        ({"epsilon_end": -0.1}, "--epsilon-end"),
        ({"exploration_fraction": 1.5}, "--exploration-fraction"),
        ({"train_every": 0}, "--train-every"),
        ({"target_every": 0}, "--target-every"),
        ({"gamma": math.nan}, "--gamma"),
        ({"env_id": "Pendulum-v1"}, "--env-id"),
    ],
)
def test_bad_flags_are_refused_in_one_line(flags, named, capsys):
    with pytest.raises(SystemExit) as stop:
        dqn.validate(dqn.Args(**flags))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith(f"error: {named}") and message.count("\n") == 1


def test_a_checkpoint_is_not_resumed_with_another_buffer(tmp_path, capsys):
    run_dir, _ = train(tmp_path, "CartPole-v1", total_timesteps=60)
    for name, value in (("buffer_size", 3000), ("num_envs", 8)):
        flags = {"buffer_size": 2000, "num_envs": 4} | {name: value}
        with pytest.raises(SystemExit) as stop:
            dqn.validate(dqn.Args(resume=str(run_dir / "checkpoint.pt"), run_dir=str(run_dir), **flags))
        assert stop.value.code == 2 and f"made with {name}" in capsys.readouterr().err


def test_reset_rows_are_neither_stored_as_steps_nor_counted(tmp_path):
    _, checkpoint = train(tmp_path, "probe_envs:StaggeredTrap-v0", total_timesteps=500, save_every=0)
    buffer, rows = checkpoint["buffer"], int(checkpoint["buffer"]["count"]) - 1
    assert buffer["steps"][buffer["is_step"]][:, 1].max() == 2  # reset rows have 1e6
    assert buffer["frames"][buffer["is_step"]].abs().max() < 100  # as do final observations
    steps = sum(rows - rows // (length + 1) for length in (4, 4, 6, 6))  # every length + 1st row is a reset
    assert checkpoint["step"] == int(buffer["is_step"].sum()) == steps


def test_each_checkpoint_begins_episodes_and_leaves_the_observation_before_without_a_step(tmp_path):
    _, checkpoint = train(tmp_path, "probe_envs:Probe-v0", total_timesteps=40, save_every=1)  # cut after every step
    for name in ("first", "is_step"):
        flags = checkpoint["buffer"][name][: int(checkpoint["buffer"]["count"])]
        assert flags.shape == (20, 4) and flags[0::2].all() and not flags[1::2].any()


@pytest.mark.parametrize("num_envs, train_every", [(1, 10), (4, 10), (8, 3), (2, 7)])
def test_one_minibatch_is_learnt_per_train_every_counted_steps(num_envs, train_every, tmp_path, monkeypatch):
    rows, original = [], dqn.q_loss

    def spy(q_network, obs, *rest):
        rows.append(len(obs))
        return original(q_network, obs, *rest)

    monkeypatch.setattr(dqn, "q_loss", spy)
    flags = {"num_envs": num_envs, "train_every": train_every, "total_timesteps": 400, "learning_starts": 100}
    _, checkpoint = train(tmp_path, "probe_envs:Staggered-v0", **flags)
    assert rows == [16] * ((checkpoint["step"] - 100) // train_every)


@pytest.mark.parametrize("num_envs, together", [(4, 1), (8, 2), (12, 3)])
def test_minibatches_drawn_together_keep_the_targets_of_their_own_rows(num_envs, together, tmp_path, monkeypatch):
    batches, original = [], dqn.q_loss

    def spy(q_network, obs, actions, targets, count):
        batches.append((obs, actions, targets))
        return original(q_network, obs, actions, targets, count)

    monkeypatch.setattr(dqn, "q_loss", spy)
    train(tmp_path, "Chain-v0", num_envs=num_envs, train_every=4, total_timesteps=300, gamma=0.0)
    assert len(batches) >= (300 - 16) // 4 >= 10 * together
    for obs, actions, targets in batches:  # γ = 0: the target is the reward
        np.testing.assert_array_equal(targets, CHAIN_REWARD[obs.argmax(1), actions])
    assert len({tuple(targets.tolist()) for *_, targets in batches}) > 0.9 * len(batches)  # each draws its own


def test_the_target_network_lags_until_it_is_copied(tmp_path):
    obs, flags = torch.eye(2), {"total_timesteps": 390, "learning_rate": 0.01}
    never, always, late = (train(tmp_path, "Chain-v0", target_every=every, **flags)[1] for every in (10**6, 1, 200))
    torch.manual_seed(1)
    initial = dqn.QNetwork(Box(-1, 1, (2,)), Discrete(2))
    assert torch.equal(q_values(never, "target_network", obs), initial(obs))
    assert torch.equal(q_values(always, "target_network", obs), q_values(always, "agent", obs))
    assert len({tuple(q_values(run, "agent", obs).flatten().tolist()) for run in (never, always, late)}) == 3
    for other in (never, late):
        assert not torch.equal(q_values(other, "target_network", obs), q_values(other, "agent", obs))


def test_epsilon_is_logged_from_its_start_to_its_end_over_the_chosen_share_of_the_run(tmp_path):
    flags = {"epsilon_start": 0.9, "epsilon_end": 0.1, "exploration_fraction": 0.5}
    run_dir, _ = train(tmp_path, "probe_envs:Probe-v0", total_timesteps=8000, train_every=100, **flags)
    points = {round(step, -3): value for step, value in scalars(run_dir, "charts/epsilon")}
    assert [points[step] for step in (2000, 4000, 5000, 8000)] == pytest.approx([0.5, 0.1, 0.1, 0.1], abs=0.02)
    first = scalars(run_dir, "losses/td_loss")[0][0]
    assert first <= 16 + 100 + 4 * 25 * 2  # the first update is logged


def test_q_of_a_two_state_chain_reaches_value_iteration(tmp_path):
    gamma, optimum = 0.8, np.zeros((2, 2))
    for _ in range(200):
        optimum = CHAIN_REWARD + gamma * np.where(CHAIN_NEXT < 0, 0, optimum.max(1)[CHAIN_NEXT])
    _, checkpoint = train(
        tmp_path,
        "Chain-v0",
        total_timesteps=12_000,
        gamma=gamma,
        learning_rate=2e-3,
        target_every=100,
        epsilon_end=1.0,
        save_every=0,
    )
    np.testing.assert_allclose(q_values(checkpoint, "agent", torch.eye(2)), optimum, atol=1e-2)


def test_truncated_episodes_bootstrap_so_that_q_is_the_endless_sum(tmp_path):
    flags = {"total_timesteps": 12_000, "gamma": 0.9, "learning_rate": 2e-3, "target_every": 100, "save_every": 0}
    _, checkpoint = train(tmp_path, "probe_envs:Probe-v0", **flags)
    endless, ten_steps = 1 / (1 - 0.9), (1 - 0.9**10) / (1 - 0.9)  # 10 and 6.5
    assert q_values(checkpoint, "agent", torch.ones(1, 1)).tolist()[0] == pytest.approx([endless, endless], abs=0.1)
    assert endless - ten_steps > 3
