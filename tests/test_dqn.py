"""DQN: each formula against a hand number, the replay buffer against what really happened, main() against known Q*."""

import copy
import json
import math
import typing
from pathlib import Path
from types import SimpleNamespace

import dqn
import gymnasium as gym
import numpy as np
import probe_envs  # noqa: F401  (registers the environments)
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from helpers import run, scalars, spy_on, weights
from torch import tensor

CHAIN_REWARD = np.array([[1.0, 0.0], [0.0, 2.0]])  # of state and action
CHAIN_NEXT = np.array([[0, 1], [0, -1]])  # -1: terminated


class Chain(gym.Env):
    """Two states and actions with the tables above; starts in a random state."""

    observation_space = Discrete(2)
    action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = int(self.np_random.integers(2))
        return self.state, {}

    def step(self, action):
        reward = CHAIN_REWARD[self.state, action]
        following = CHAIN_NEXT[self.state, action]
        self.state = max(0, int(following))
        return self.state, reward, following < 0, False, {}


class Ends(gym.Env):
    """Random numbers all over; an episode terminates, is truncated or both. Notes what each step led to."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Discrete(2)
    steps: typing.ClassVar[list[SimpleNamespace]] = []

    def observe(self):
        return self.np_random.normal(size=2).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe(), {}

    def step(self, action):
        obs = self.observe()
        reward = self.np_random.normal()
        terminated, truncated = (self.np_random.random(2) < 0.2).tolist()
        self.steps.append(SimpleNamespace(obs=obs, reward=reward, terminated=terminated, truncated=truncated))
        return obs, reward, terminated, truncated, {}


gym.register("Chain-v0", entry_point=Chain, max_episode_steps=7)
gym.register("Ends-v0", entry_point=Ends)


def train(run_dir, env_id, num_envs=4, batch_size=16, train_every=4, learning_starts=16, buffer_size=2000, **flags):
    """Run main() in this process, without evaluation; returns the run directory."""
    flags.update(num_envs=num_envs, batch_size=batch_size, train_every=train_every)
    flags.update(learning_starts=learning_starts, buffer_size=buffer_size)
    dqn.main(dqn.Args(env_id=env_id, run_dir=str(run_dir), eval_episodes=0, device="cpu", **flags))
    return run_dir


def invoke(*flags):
    """Run the script in this process as `dqn.py flags`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["dqn.py", *map(str, flags)])
        dqn.main(*dqn.parse_args())


def load(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def same(ours, theirs):
    """Whether two dicts hold the same tensors, bit for bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def losses(monkeypatch):
    """The values, targets and kind of every minibatch."""
    return spy_on(monkeypatch, dqn, "td_loss")


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


ERRORS = [0.0, 0.5, -0.5, 1.0, 3.0, -4.0]  # Q - y


def test_mse_is_the_squared_error_and_its_gradient_grows_with_it():
    values = tensor(ERRORS, requires_grad=True)
    loss = dqn.td_loss(values, torch.zeros(6), "mse")
    assert loss.item() == pytest.approx((0.0 + 0.25 + 0.25 + 1.0 + 9.0 + 16.0) / 6)
    loss.backward()
    assert (6 * values.grad).tolist() == pytest.approx([0.0, 1.0, -1.0, 2.0, 6.0, -8.0])


def test_huber_is_half_the_square_up_to_1_and_its_gradient_is_the_clipped_error():
    values = tensor(ERRORS, requires_grad=True)
    loss = dqn.td_loss(values, torch.zeros(6), "huber")
    assert loss.item() == pytest.approx((0.0 + 0.125 + 0.125 + 0.5 + 2.5 + 3.5) / 6)  # |error| - 1/2 beyond 1
    loss.backward()
    assert (6 * values.grad).tolist() == pytest.approx([0.0, 0.5, -0.5, 1.0, 1.0, -1.0])


VECTOR = torch.zeros(3)
COLUMN = torch.zeros(3, 1)


@pytest.mark.parametrize("values, targets", [(VECTOR, COLUMN), (COLUMN, VECTOR), (COLUMN, COLUMN)])
def test_columns_instead_of_vectors_are_caught_before_they_broadcast(values, targets):
    with pytest.raises(AssertionError, match="Size"):
        dqn.td_loss(values, targets, "mse")


@pytest.mark.parametrize("rewards, terminated", [(COLUMN, VECTOR), (VECTOR, COLUMN)])
def test_targets_of_columns_are_caught_in_the_loss(rewards, terminated):
    targets = dqn.td_target(rewards, torch.zeros(3, 2), terminated, 0.9)
    with pytest.raises(AssertionError, match="Size"):
        dqn.td_loss(VECTOR, targets, "huber")


def test_epsilon_is_right_at_the_start_in_the_middle_at_the_end_and_after_it():
    at = [dqn.epsilon_at(step, 0.05, 1000) for step in (0, 500, 1000, 5000)]
    assert at == pytest.approx([1.0, 0.525, 0.05, 0.05])
    assert [dqn.epsilon_at(step, 0.1, 0) for step in (0, 1)] == pytest.approx([1.0, 0.1])


def test_one_update_is_due_for_every_train_every_steps_after_learning_starts():
    due = [dqn.updates_due(step, 105, 10) for step in (0, 104, 105, 114, 115, 124, 125, 210)]
    assert due == [0, 0, 0, 0, 1, 1, 2, 10]
    assert dqn.updates_due(7, 0, 2) == 3


# --- network ---


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_actions_are_random_with_probability_epsilon_and_greedy_otherwise(epsilon):
    torch.manual_seed(0)
    network = dqn.QNetwork(Box(-1, 1, (2,)), Discrete(3))
    obs = torch.ones(1, 2).expand(30_000, 2)
    best = network(obs[:1]).argmax().item()
    assert network.act(obs[:1], greedy=True).item() == best
    shares = torch.bincount(network.act(obs, epsilon), minlength=3) / 30_000
    expected = torch.full((3,), epsilon / 3)
    expected[best] += 1 - epsilon
    torch.testing.assert_close(shares, expected, rtol=0, atol=0 if epsilon == 0 else 0.01)
    assert (network.act(obs, epsilon, greedy=True) == best).all()


def test_a_cnn_begins_orthogonal_and_with_q_near_0_so_that_it_tells_images_apart():
    network = dqn.QNetwork(Box(0, 255, (4, 84, 84), np.uint8), Discrete(6))
    layers = [layer for layer in network.layers if hasattr(layer, "weight")]
    assert len(layers) == 5
    for layer in layers:
        gain = 0.01 if layer is layers[-1] else 2**0.5
        stretch = torch.linalg.svdvals(layer.weight.detach().flatten(1))  # in each direction
        torch.testing.assert_close(stretch, torch.full_like(stretch, gain))
        assert not layer.bias.any()


@pytest.mark.parametrize("channels, shape", [(1, (40, 44)), (1, (40, 44, 1)), (3, (40, 44, 3)), (12, (40, 44, 12))])
def test_images_with_channels_last_or_none_get_the_q_of_channels_first(channels, shape):
    torch.manual_seed(0)
    first = dqn.QNetwork(Box(0, 255, (channels, 40, 44), np.uint8), Discrete(3))
    other = dqn.QNetwork(Box(0, 255, shape, np.uint8), Discrete(3))
    other.load_state_dict(first.state_dict())
    assert isinstance(other.layers[0], torch.nn.Conv2d)
    images = torch.randint(256, (2, channels, 40, 44), dtype=torch.uint8)
    q = first(images)
    torch.testing.assert_close(other(images.movedim(1, -1).reshape(2, *shape)), q)
    assert q.shape == (2, 3)
    assert not torch.equal(q[0], q[1])


def test_pixels_are_scaled_to_1():
    network = dqn.QNetwork(Box(0, 255, (40, 44), np.uint8), Discrete(3))
    white = torch.full((1, 40, 44), 255, dtype=torch.uint8)
    torch.testing.assert_close(network(white), network.layers(torch.ones(1, 1, 40, 44)))


def test_bytes_of_a_vector_are_scaled_by_the_largest_of_their_space():
    network = dqn.QNetwork(Box(0, 10, (3,), np.uint8), Discrete(2))
    scaled = network.layers(tensor([[0.0, 0.5, 1.0]]))
    torch.testing.assert_close(network(tensor([[0, 5, 10]], dtype=torch.uint8)), scaled)


def test_vectors_of_any_type_go_unscaled_through_an_mlp_of_120_and_84():
    network = dqn.QNetwork(Box(-9, 9, (6,), np.float64), Discrete(4))
    assert [layer.out_features for layer in network.layers[::2]] == [120, 84, 4]
    obs = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(network(obs), network.layers(obs.float()))


def test_box_actions_are_refused_in_a_sentence():
    with pytest.raises(SystemExit, match=r"they must be Discrete, not Box\(-1.0, 1.0, \(1,\), float32\)"):
        dqn.QNetwork(Box(-1, 1, (3,)), Box(-1, 1, (1,)))
    done = run("dqn", "--env-id", "Pendulum-v1")
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "they must be Discrete, not Box(-2.0, 2.0, (1,), float32)" in line


# --- replay buffer ---


class Stacks:
    """Stands in for a vector environment: N stacks of random frames from zeros, episodes of a few steps, NEXT_STEP."""

    def __init__(self, num_envs, stack, frame_shape, dtype):
        self.num_envs = num_envs
        self.frames_shape = (num_envs, *frame_shape)
        self.channels = frame_shape[0]
        self.single_observation_space = Box(0, 255, (stack * self.channels, *frame_shape[1:]), dtype)
        self.single_action_space = Discrete(3)
        self.rng = np.random.default_rng(0)

    def show(self):
        frames = self.rng.integers(1, 256, self.frames_shape).astype(self.obs.dtype)
        self.obs = np.concatenate([self.obs[:, self.channels :], frames], axis=1)
        return self.obs.copy()

    def reset(self, seed=None):
        space = self.single_observation_space
        self.obs = np.zeros((self.num_envs, *space.shape), space.dtype)
        self.done = np.zeros(self.num_envs, bool)
        return self.show(), {}

    def step(self, actions):
        is_step = ~self.done
        self.obs[self.done] = 0
        terminated = is_step & (self.rng.random(self.num_envs) < 0.1)
        truncated = is_step & ~terminated & (self.rng.random(self.num_envs) < 0.1)
        self.done = terminated | truncated
        return self.show(), self.rng.random(self.num_envs), terminated, truncated, {}


class History:
    """A replay buffer of so many rows of N, and all that happened; a step is known by its reward, a serial number."""

    def __init__(self, envs, stack, rows):
        self.envs = envs
        self.N = envs.num_envs
        self.rows = rows
        self.stack = stack
        self.buffer = dqn.ReplayBuffer(rows * self.N + self.N - 1, self.N, envs.single_observation_space, stack)
        self.rng = np.random.default_rng(0)
        self.steps = {}  # by serial number
        self.written = 0  # rows of N
        self.ends = 0

    def begin(self, seed):
        self.obs, _ = self.envs.reset(seed=seed)
        self.buffer.add_observations(self.obs)
        self.is_step = np.ones(self.N, bool)
        self.written += 1

    def step(self):
        actions = self.rng.integers(self.envs.single_action_space.n, size=self.N)
        next_obs, _, terminated, truncated, _ = self.envs.step(actions)
        serials = self.written * self.N + np.arange(self.N)
        self.buffer.add_steps(actions, serials, terminated, self.is_step)
        self.buffer.add_observations(next_obs)
        for n in np.flatnonzero(self.is_step):
            step = SimpleNamespace(row=self.written - 1, obs=self.obs[n], action=actions[n])
            step.terminated = terminated[n]
            step.next_obs = next_obs[n].copy()
            self.steps[int(serials[n])] = step
        self.written += 1
        self.obs = next_obs.copy()
        self.is_step = ~(terminated | truncated)
        self.ends += self.N - self.is_step.sum()

    def check(self):
        """Holds that just the steps whose frames are all in the ring are drawn, and that each is as it happened."""
        buffer = self.buffer
        rows = buffer.sample(12 * self.rows * self.N)
        serials, first = np.unique(buffer.rewards[rows].astype(int), return_index=True)
        oldest = self.written - self.rows + self.stack - 1  # row whose oldest frame is in the ring
        assert serials.tolist() == [serial for serial, step in self.steps.items() if step.row >= oldest]
        rows = rows[first]
        happened = [self.steps[serial] for serial in serials]
        np.testing.assert_array_equal(buffer.observations(rows), [step.obs for step in happened])
        np.testing.assert_array_equal(buffer.observations(rows + self.N), [step.next_obs for step in happened])
        assert buffer.actions[rows].tolist() == [step.action for step in happened]
        assert buffer.terminated[rows].tolist() == [step.terminated for step in happened]


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
    torch.manual_seed(0)
    history = History(Stacks(3, stack, frame_shape, dtype), stack, rows)
    for i in range(200):
        if i % 30 == 0:
            history.begin(seed=i)
        history.step()
        if i % 7 == 6:
            history.check()
    assert history.ends > 50
    assert history.buffer.count == 3 * (200 + 7)


def test_stacks_of_pong_are_rebuilt_exactly_through_wraps_and_the_end_of_a_game():
    torch.manual_seed(0)
    envs = dqn.make_envs("ALE/Pong-v5", 2, {})
    history = History(envs, stack=4, rows=100)
    history.begin(seed=0)
    for i in range(1100):
        history.step()
        if i % 220 == 219:
            history.check()
    envs.close()
    assert history.ends >= 2
    assert history.buffer.count > 4 * 200
    assert history.buffer.frames.shape == (200, 1, 84, 84)
    assert history.buffer.frames.dtype == np.uint8


def frame_buffer(number):
    """A ring of six rows of one environment that stacks three frames, in which frames 1, 2, … were written.

    The third frame ends an episode.
    """
    buffer = dqn.ReplayBuffer(6, 1, Box(0, 255, (3, 1, 1), np.uint8), 3)
    for frame in range(1, number + 1):
        if frame > 1:
            is_step = np.array([frame - 1 != 3])
            buffer.add_steps(np.zeros(1), np.zeros(1), np.zeros(1), is_step)
        buffer.add_observations(np.full((1, 3, 1, 1), frame))
    return buffer


def test_stacks_begin_with_zeros_in_the_first_rows_of_an_episode():
    stacks = frame_buffer(6).observations(np.arange(6)).reshape(6, 3)
    assert stacks[:3].tolist() == [[0, 0, 1], [0, 1, 2], [1, 2, 3]]
    assert stacks[3:].tolist() == [[0, 0, 4], [0, 4, 5], [4, 5, 6]]


def test_stacks_go_on_from_the_end_of_the_ring_to_its_start():
    buffer = frame_buffer(8)  # frames 7 and 8 lie in rows 0 and 1
    stacks = buffer.observations(np.array([4, 5, 0, 1])).reshape(4, 3)
    assert stacks.tolist() == [[0, 4, 5], [4, 5, 6], [5, 6, 7], [6, 7, 8]]
    next_stack = buffer.observations(np.array([5 + 1]))
    assert next_stack.ravel().tolist() == [5, 6, 7]  # of row 0


def test_rows_that_lost_a_frame_of_their_stack_and_the_newest_are_not_drawn():
    assert set(frame_buffer(8).sample(500)) == {4, 5, 0}  # row 2 is a final observation; 3 lost its oldest frame
    assert set(frame_buffer(4).sample(500)) == {0, 1}


def test_steps_are_drawn_uniformly_and_reset_rows_never():
    torch.manual_seed(0)
    buffer = dqn.ReplayBuffer(20, 2, Box(-1, 1, (1,)), 1)
    buffer.add_observations(np.zeros((2, 1)))
    for t in range(7):
        rewards = np.array([t, 10 + t])
        is_step = np.array([True, t % 2 == 1])
        buffer.add_steps(np.zeros(2), rewards, np.zeros(2), is_step)
        buffer.add_observations(np.zeros((2, 1)))
    drawn = buffer.rewards[buffer.sample(20_000)]
    steps = [0, 1, 2, 3, 4, 5, 6, 11, 13, 15]
    counts = np.bincount(drawn.astype(int), minlength=17)[steps]
    assert counts.sum() == 20_000
    np.testing.assert_allclose(counts / 20_000, 0.1, rtol=0, atol=0.01)


def test_a_loaded_buffer_draws_what_the_saved_one_draws():
    history = History(Stacks(3, 4, (1, 5, 6), np.uint8), stack=4, rows=13)
    history.begin(seed=0)
    for _ in range(50):
        history.step()
    loaded = dqn.ReplayBuffer(39, 3, history.envs.single_observation_space, 4)
    loaded.load_state_dict(history.buffer.state_dict())
    torch.manual_seed(1)
    ours = history.buffer.sample(100)
    torch.manual_seed(1)
    theirs = loaded.sample(100)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(history.buffer.observations(ours), loaded.observations(theirs))
    for name in ("actions", "rewards", "terminated"):
        np.testing.assert_array_equal(vars(history.buffer)[name][ours], vars(loaded)[name][theirs])


# --- flags ---


@pytest.mark.parametrize(
    "flags, named",
    [
        ({"buffer_size": 63}, "buffer-size"),
        ({"buffer_size": 1000, "num_envs": 200}, "buffer-size"),
        ({"total_timesteps": 1_000}, "learning-starts"),
        ({"epsilon_end": -0.1}, "epsilon-end"),
        ({"exploration_fraction": -0.1}, "exploration-fraction"),
        ({"train_every": 0}, "train-every"),
        ({"target_every": 0}, "target-every"),
        ({"batch_size": 0}, "batch-size"),
        ({"max_grad_norm": -1.0}, "max-grad-norm"),
        ({"gamma": math.nan}, "gamma"),
    ],
)
def test_bad_flags_are_refused_in_a_sentence(flags, named):
    with pytest.raises(ValueError, match=named):
        dqn.Args(**flags)


@pytest.mark.parametrize("flag, value", [("--buffer-size", 3000), ("--num-envs", 8)])
def test_a_checkpoint_is_not_resumed_with_another_buffer(flag, value, tmp_path):
    run_dir = train(tmp_path / "run", "CartPole-v1", total_timesteps=60)
    before = (run_dir / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit, match=f"{flag} (cannot change|and the spaces of CartPole-v1 must be the same)"):
        invoke("--resume", run_dir, "--total-timesteps", 100, flag, value)
    assert (run_dir / "checkpoint.pt").read_bytes() == before
    assert json.loads((run_dir / "args.json").read_text())["num_envs"] == 4


# --- the run ---


@pytest.mark.parametrize("env_id", ["probe_envs:Staggered-v0", "CartPole-v1"])
def test_weights_are_the_same_whatever_save_every_is(env_id, tmp_path):
    never = weights(train(tmp_path / "0", env_id, total_timesteps=600, save_every=0))
    for every in (4, 130):
        assert same(never, weights(train(tmp_path / f"{every}", env_id, total_timesteps=600, save_every=every)))


def test_a_resumed_run_restores_networks_optimiser_and_buffer_and_begins_new_episodes(tmp_path, monkeypatch):
    run_dir = train(tmp_path / "run", "CartPole-v1", total_timesteps=300, target_every=130)
    before = load(run_dir)
    assert not same(before["agent"], before["target_network"])
    monkeypatch.setattr(dqn, "updates_due", lambda *_: 0)
    invoke("--resume", run_dir, "--total-timesteps", 400, "--target-every", 10**6)
    after = load(run_dir)
    assert same(after["agent"], before["agent"])
    assert same(after["target_network"], before["target_network"])
    moments = after["optimizer"]["state"]
    assert moments.keys() == before["optimizer"]["state"].keys()
    for number, of_parameter in before["optimizer"]["state"].items():
        assert same(moments[number], of_parameter)
    rows = int(before["buffer"]["count"])
    assert after["step"] >= 400
    for name in ("frames", "actions", "rewards", "terminated", "is_step"):
        assert torch.equal(after["buffer"][name][:rows], before["buffer"][name][:rows])
    assert not after["buffer"]["is_step"][rows - 4 : rows].any()  # the episodes were cut there
    start = after["buffer"]["frames"][rows : rows + 4]
    assert after["buffer"]["is_step"][rows : rows + 4].all()
    assert start.abs().max() <= 0.05  # where CartPole starts
    assert not torch.equal(start, before["buffer"]["frames"][:4])  # new seeds


def test_the_learning_rate_given_on_resume_counts(tmp_path):
    run_dir = train(tmp_path / "run", "CartPole-v1", total_timesteps=300)
    before = load(run_dir)
    invoke("--resume", run_dir, "--total-timesteps", 400, "--learning-rate", 0.0)
    after = load(run_dir)
    updates_before = before["optimizer"]["state"][0]["step"]
    updates_after = after["optimizer"]["state"][0]["step"]
    assert updates_after > updates_before + 20
    assert after["optimizer"]["param_groups"][0]["lr"] == 0.0
    assert same(after["agent"], before["agent"])  # nothing was learnt
    assert json.loads((run_dir / "args.json").read_text())["learning_rate"] == 0.0


@pytest.fixture
def seeds(monkeypatch):
    """The seeds that environments are reset with."""
    resets = spy_on(monkeypatch, gym.vector.SyncVectorEnv, "reset")
    return lambda: [call.seed for call in resets if call.seed is not None]


def test_a_resumed_run_goes_on_with_its_random_numbers(tmp_path, seeds):
    run_dir = train(tmp_path / "run", "probe_envs:Endless-v0", total_timesteps=100)
    torch.set_rng_state(load(run_dir)["rng"])
    expected = int(torch.randint(2**30, ()))
    invoke("--resume", run_dir, "--total-timesteps", 120)
    first, second = seeds()
    assert second == expected
    assert second != first


def test_a_resumed_run_with_another_seed_has_that_seeds_random_numbers(tmp_path, seeds):
    run_dir = train(tmp_path / "run", "probe_envs:Endless-v0", total_timesteps=100)
    torch.manual_seed(7)
    dqn.QNetwork(Box(-1, 1, (1,)), Discrete(2))  # draws its weights first
    expected = int(torch.randint(2**30, ()))
    invoke("--resume", run_dir, "--total-timesteps", 120, "--seed", 7)
    assert seeds()[1] == expected


def test_two_resumptions_of_a_checkpoint_give_the_same_weights(tmp_path):
    run_dir = train(tmp_path / "run", "CartPole-v1", total_timesteps=300)
    saved = load(run_dir)
    invoke("--resume", run_dir, "--total-timesteps", 500)
    first = load(run_dir)
    torch.save(saved, run_dir / "checkpoint.pt")
    invoke("--resume", run_dir, "--total-timesteps", 500)
    assert same(first["agent"], load(run_dir)["agent"])
    assert not same(first["agent"], saved["agent"])


def test_the_old_checkpoint_stays_whole_while_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    run_dir = train(tmp_path / "run", "CartPole-v1", total_timesteps=60)
    checkpoint = (run_dir / "checkpoint.pt").read_bytes()
    args = (run_dir / "args.json").read_text()

    def fail(path, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(SystemExit, match="run cannot be saved: .*No space left on device"):
        invoke("--resume", run_dir, "--total-timesteps", 100)
    assert (run_dir / "checkpoint.pt").read_bytes() == checkpoint
    assert (run_dir / "args.json").read_text() == args
    assert not (run_dir / "checkpoint.tmp").exists()


def test_an_infinite_huber_loss_stops_the_run_though_its_gradient_is_finite(tmp_path):
    run_dir = tmp_path / "run"
    with pytest.raises(SystemExit, match="nan or inf before step"):
        train(run_dir, "probe_envs:Explodes-v0", total_timesteps=3000, loss="huber")
    saved = load(run_dir)
    assert saved["step"] == 0
    assert all(x.isfinite().all() for x in saved["agent"].values())


def test_reset_rows_are_neither_stored_as_steps_nor_counted(tmp_path):
    checkpoint = load(train(tmp_path / "run", "probe_envs:StaggeredTrap-v0", total_timesteps=500, save_every=0))
    buffer = checkpoint["buffer"]
    assert buffer["rewards"][buffer["is_step"]].max() == 2  # reset rows have 1e6
    assert buffer["frames"][buffer["is_step"]].abs().max() < 100  # as do final observations
    rows = int(buffer["count"]) // 4 - 1
    steps = sum(rows - rows // (length + 1) for length in (4, 4, 6, 6))  # every length + 1st row is a reset
    assert checkpoint["step"] == buffer["is_step"].sum() == steps


# --- updates ---


@pytest.mark.parametrize("num_envs, train_every", [(1, 10), (4, 10), (8, 3), (2, 7), (16, 2)])
def test_one_minibatch_is_learnt_per_train_every_counted_steps(num_envs, train_every, tmp_path, losses):
    flags = {"num_envs": num_envs, "train_every": train_every, "total_timesteps": 400, "learning_starts": 100}
    run_dir = train(tmp_path / "run", "probe_envs:Staggered-v0", **flags)
    sizes = [len(loss.values) for loss in losses]
    assert sizes == [16] * ((load(run_dir)["step"] - 100) // train_every)


@pytest.mark.parametrize("num_envs, together", [(4, 1), (8, 2), (12, 3)])
def test_minibatches_drawn_together_keep_the_targets_of_their_own_rows(num_envs, together, tmp_path, losses):
    flags = {"total_timesteps": 3000, "gamma": 0.0, "learning_rate": 0.01, "epsilon_end": 1.0, "max_grad_norm": 0.0}
    run_dir = train(tmp_path / "run", "Chain-v0", num_envs=num_envs, train_every=4, **flags)
    assert len(losses) == (load(run_dir)["step"] - 16) // 4 >= 10 * together
    late = losses[-300:]
    for loss in late:  # γ = 0: the target is the reward of the row's own state and action
        torch.testing.assert_close(loss.values, loss.targets, atol=0.05, rtol=0)
    drawn = {tuple(loss.targets.tolist()) for loss in late}
    assert len(drawn) > 290  # each draws its own


def test_targets_end_with_terminated_episodes_and_bootstrap_from_the_last_observation_of_truncated_ones(
    tmp_path, losses
):
    Ends.steps.clear()
    train(tmp_path / "run", "Ends-v0", total_timesteps=400, learning_rate=0.0, gamma=0.9)
    torch.manual_seed(1)
    network = dqn.QNetwork(Box(-1, 1, (2,)), Discrete(2))  # which stays as it was, at a learning rate of 0
    seen = torch.cat([loss.targets for loss in losses]).unique()
    expected = []
    found = {(False, False): 0, (True, False): 0, (False, True): 0, (True, True): 0}  # by terminated and truncated
    for step in Ends.steps:
        target = step.reward
        if not step.terminated:
            target += 0.9 * network(tensor(step.obs)[None]).max().item()
        expected.append(target)
        found[step.terminated, step.truncated] += (seen - target).abs().min() < 1e-5
    assert min(found.values()) >= 5
    distances = (seen[:, None] - tensor(expected)).abs().min(1).values
    assert distances.max() < 1e-5


@pytest.mark.parametrize("kind", ["mse", "huber"])
def test_the_loss_is_the_one_asked_for(kind, tmp_path, losses):
    train(tmp_path / "run", "Chain-v0", total_timesteps=60, loss=kind)
    assert {loss.kind for loss in losses} == {kind}


def loss_by_hand(errors, kind):
    if kind == "mse":
        return (errors**2).sum() / 16
    size = errors.abs()
    return torch.where(size > 1, size - 0.5, errors**2 / 2).sum() / 16


class ByHand:
    """Updates by stochastic gradient descent in formulas written here, towards a network that lags behind."""

    def __init__(self, kind, max_grad_norm, learning_rate):
        torch.manual_seed(1)
        self.network = dqn.QNetwork(Box(-1, 1, (3,)), Discrete(2))
        self.lagging = copy.deepcopy(self.network)
        self.kind = kind
        self.max_grad_norm = max_grad_norm
        self.learning_rate = learning_rate
        self.logged = {"td_loss": [], "q_values": [], "grad_norm": []}
        self.apart = 0.0  # how far the two networks' Q have been from each other

    def update(self, buffer, rows):
        """A minibatch of 16 rows of the buffer of a run of 4 environments, at γ = 0.9."""
        next_obs = buffer["frames"][rows + 4].float()
        best = self.lagging.layers(next_obs).amax(1).detach()
        targets = buffer["rewards"][rows] + 0.9 * best * (1 - buffer["terminated"][rows])
        q = self.network.layers(buffer["frames"][rows].float())
        values = q[torch.arange(16), buffer["actions"][rows]]
        loss = self.loss(values - targets)
        gradients = torch.autograd.grad(loss, list(self.network.parameters()))
        norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients))
        share = 1.0
        if 0 < self.max_grad_norm < norm:
            share = self.max_grad_norm / norm
        for parameter, gradient in zip(self.network.parameters(), gradients):
            parameter.data -= self.learning_rate * share * gradient
        self.logged["td_loss"].append(loss.item())
        self.logged["q_values"].append(values.mean().item())
        self.logged["grad_norm"].append(norm)
        difference = self.network.layers(next_obs) - self.lagging.layers(next_obs)
        self.apart = max(self.apart, difference.abs().max().item())

    def loss(self, errors):
        if self.kind == "mse":
            return (errors**2).sum() / 16
        size = errors.abs()
        return torch.where(size > 1, size - 0.5, errors**2 / 2).sum() / 16


@pytest.mark.parametrize(
    "kind, max_grad_norm, learning_rate",
    [("mse", 0.0, 3e-5), ("mse", 5.0, 3e-3), ("huber", 0.0, 1e-3), ("huber", 9.0, 3e-3)],
)
def test_eight_updates_and_their_logs_are_those_by_hand(kind, max_grad_norm, learning_rate, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, lr, **_: torch.optim.SGD(parameters, lr))
    draws = spy_on(monkeypatch, dqn.ReplayBuffer, "sample")
    flags = {"total_timesteps": 16 + 8 * 4, "target_every": 10**6, "epsilon_end": 1.0, "gamma": 0.9}
    flags.update(loss=kind, max_grad_norm=max_grad_norm, learning_rate=learning_rate, anneal_lr=False)
    run_dir = train(tmp_path / "run", "probe_envs:Scaled-v0", **flags)
    buffer = load(run_dir)["buffer"]
    by_hand = ByHand(kind, max_grad_norm, learning_rate)
    for draw in draws:
        if len(draw.result) > 0:
            by_hand.update(buffer, draw.result)
    assert by_hand.apart > 0.1
    for name, after in weights(run_dir).items():
        torch.testing.assert_close(after, by_hand.network.state_dict()[name], rtol=1e-3, atol=1e-5)
    norms = by_hand.logged["grad_norm"]
    assert len(norms) == 8
    if max_grad_norm == 0:
        assert scalars(run_dir, "losses/grad_norm") == []
        del by_hand.logged["grad_norm"]
    else:
        assert max(norms) > max_grad_norm  # it was clipped, and is logged as it was before
    for name, numbers in by_hand.logged.items():
        (_, first), (_, mean) = scalars(run_dir, f"losses/{name}")  # the first is logged alone
        assert first == pytest.approx(numbers[0], rel=1e-3)
        assert mean == pytest.approx(sum(numbers[1:]) / 7, rel=1e-3)


def test_the_first_update_is_logged_at_once_and_others_every_thousand_steps(tmp_path):
    flags = {"total_timesteps": 2000, "learning_starts": 50, "train_every": 10}
    run_dir = train(tmp_path / "run", "probe_envs:Endless-v0", **flags)
    for name in ("td_loss", "q_values"):
        assert [step for step, _ in scalars(run_dir, f"losses/{name}")] == [60, 1000, 2000]


def test_rewards_are_learnt_as_they_are_however_large(tmp_path, losses):
    train(tmp_path / "run", "CliffWalking-v1", total_timesteps=300, gamma=0.0, epsilon_end=1.0)
    targets = torch.cat([loss.targets for loss in losses])
    assert set(targets.tolist()) == {-1.0, -100.0}


# --- the network that lags ---


def test_the_target_network_lags_until_it_is_copied(tmp_path):
    def checkpoint(target_every):
        run_dir = tmp_path / f"{target_every}"
        return load(train(run_dir, "Chain-v0", total_timesteps=390, learning_rate=0.01, target_every=target_every))

    never = checkpoint(10**6)
    always = checkpoint(1)
    late = checkpoint(200)
    torch.manual_seed(1)
    initial = dqn.QNetwork(Box(-1, 1, (2,)), Discrete(2))
    assert same(never["target_network"], initial.state_dict())
    assert same(always["target_network"], always["agent"])
    for other in (never, late):
        assert not same(other["target_network"], other["agent"])
    assert not same(late["target_network"], initial.state_dict())
    assert not same(never["agent"], always["agent"])
    assert not same(late["agent"], always["agent"])


def test_the_target_network_is_copied_after_the_updates_of_its_step(tmp_path):
    run_dir = train(
        tmp_path / "run", "Chain-v0", total_timesteps=390, learning_rate=0.01, target_every=1, train_every=1
    )
    checkpoint = load(run_dir)
    assert same(checkpoint["target_network"], checkpoint["agent"])


@pytest.mark.parametrize("train_every", [4, 13])
def test_the_target_network_is_copied_at_each_multiple_whenever_minibatches_are_due(train_every, tmp_path, monkeypatch):
    acts = spy_on(monkeypatch, dqn.QNetwork, "act")
    original = dqn.QNetwork.load_state_dict
    steps = []

    def spy(network, state):
        steps.append(2 * len(acts))
        return original(network, state)

    monkeypatch.setattr(dqn.QNetwork, "load_state_dict", spy)
    flags = {"num_envs": 2, "total_timesteps": 44, "target_every": 7, "train_every": train_every}
    train(tmp_path / "run", "probe_envs:Endless-v0", **flags)
    assert steps == [8, 14, 22, 28, 36, 42]  # of 7, 14, 21, 28, 35 and 42


# --- exploration ---


@pytest.mark.parametrize("num_envs", [1, 4])
def test_epsilon_falls_in_a_run_over_its_share_of_the_steps(num_envs, tmp_path, monkeypatch):
    acts = spy_on(monkeypatch, dqn.QNetwork, "act")
    monkeypatch.setattr(dqn, "LOG_EVERY", 40)
    flags = {"num_envs": num_envs, "total_timesteps": 200, "epsilon_end": 0.2, "exploration_fraction": 0.4}
    run_dir = train(tmp_path / "run", "probe_envs:Endless-v0", **flags)
    for steps, epsilon in ((0, 1.0), (20, 0.8), (40, 0.6), (60, 0.4), (80, 0.2), (196, 0.2)):
        assert acts[steps // num_envs].epsilon == pytest.approx(epsilon)
    logged = dict(scalars(run_dir, "charts/epsilon"))
    assert logged[40] == pytest.approx(0.6 + 0.01 * num_envs)  # that of the last actions before it
    assert logged[200] == pytest.approx(0.2)


def test_a_lengthened_run_says_that_it_explores_again_and_does_so(tmp_path, capsys, monkeypatch):
    flags = {"epsilon_end": 0.1, "exploration_fraction": 0.5}
    run_dir = train(tmp_path / "run", "probe_envs:Endless-v0", total_timesteps=100, **flags)
    acts = spy_on(monkeypatch, dqn.QNetwork, "act")
    assert "epsilon" not in capsys.readouterr().out
    invoke("--resume", run_dir, "--total-timesteps", 400)
    said = "epsilon goes on at 0.550: --exploration-fraction is a share of --total-timesteps"
    assert capsys.readouterr().out.count(said) == 1
    assert acts[0].epsilon == pytest.approx(1 - 0.9 * 100 / 200)


def test_epsilon_after_a_resumption_is_that_of_the_new_flags(tmp_path, capsys):
    flags = {"epsilon_end": 0.1, "exploration_fraction": 2.0}
    run_dir = train(tmp_path / "run", "probe_envs:Endless-v0", total_timesteps=100, **flags)
    invoke("--resume", run_dir, "--total-timesteps", 400, "--epsilon-end", 0.2, "--exploration-fraction", 1.0)
    assert "epsilon goes on at 0.800" in capsys.readouterr().out  # 1 - 0.8 · 100/400


# --- known answers ---


def test_atari_learns_from_the_sign_of_the_reward_and_logs_the_score(tmp_path):
    flags = {"total_timesteps": 2400, "learning_starts": 2000, "train_every": 100, "buffer_size": 4000}
    run_dir = train(tmp_path / "run", "ALE/MsPacman-v5", **flags)
    buffer = load(run_dir)["buffer"]
    assert buffer["frames"].shape == (4000, 1, 84, 84)
    assert set(buffer["rewards"].unique().tolist()) == {0.0, 1.0}
    assert max(value for _, value in scalars(run_dir, "charts/episodic_return")) >= 60


def test_q_of_a_two_state_chain_reaches_value_iteration(tmp_path):
    optimum = np.zeros((2, 2))
    for _ in range(200):
        following = np.where(CHAIN_NEXT < 0, 0, optimum.max(1)[CHAIN_NEXT])
        optimum = CHAIN_REWARD + 0.8 * following
    flags = {"gamma": 0.8, "learning_rate": 2e-3, "target_every": 100, "epsilon_end": 1.0}
    checkpoint = load(train(tmp_path / "run", "Chain-v0", total_timesteps=12_000, **flags))
    np.testing.assert_allclose(q_values(checkpoint, "agent", torch.eye(2)), optimum, atol=1e-2)


def test_truncated_episodes_bootstrap_so_that_q_is_the_endless_sum(tmp_path):
    flags = {"gamma": 0.9, "learning_rate": 2e-3, "target_every": 100}
    checkpoint = load(train(tmp_path / "run", "probe_envs:Probe-v0", total_timesteps=12_000, **flags))
    q = q_values(checkpoint, "agent", torch.ones(1, 1))
    assert q.tolist()[0] == pytest.approx([10, 10], abs=0.1)  # 1/(1 - 0.9); (1 - 0.9¹⁰)/(1 - 0.9) would be 6.5
