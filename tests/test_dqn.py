"""DQN: each formula against a hand number, the replay buffer against what really happened, main() against known Q*."""

import copy
import math

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


def resume(run_dir, **flags):
    """Continue a run in this process, as parse_args does; returns its new checkpoint."""
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    dqn.main(dqn.Args(**saved["args"] | {"run_dir": str(run_dir)} | flags), saved)
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


@pytest.fixture
def losses_seen(monkeypatch):
    """Collects the (values, targets, kind) of every minibatch while main() runs."""
    calls, original = [], dqn.td_loss

    def spy(values, targets, kind):
        calls.append((values.detach(), targets, kind))
        return original(values, targets, kind)

    monkeypatch.setattr(dqn, "td_loss", spy)
    return calls


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


ERRORS = tensor([0.0, 0.5, -0.5, 1.0, 3.0, -4.0])  # Q - y


def test_mse_is_the_squared_error_and_its_gradient_grows_with_it():
    values = ERRORS.clone().requires_grad_()
    loss = dqn.td_loss(values, torch.zeros(6), "mse")
    assert loss.tolist() == [0.0, 0.25, 0.25, 1.0, 9.0, 16.0]
    loss.sum().backward()
    assert values.grad.tolist() == [0.0, 1.0, -1.0, 2.0, 6.0, -8.0]


def test_huber_is_half_the_square_up_to_1_and_its_gradient_is_the_clipped_error():
    values = ERRORS.clone().requires_grad_()
    loss = dqn.td_loss(values, torch.zeros(6), "huber")
    assert loss.tolist() == [0.0, 0.125, 0.125, 0.5, 2.5, 3.5]  # |error| - 1/2 beyond 1
    loss.sum().backward()
    assert values.grad.tolist() == [0.0, 0.5, -0.5, 1.0, 1.0, -1.0]


def test_columns_instead_of_vectors_are_caught_before_they_broadcast():
    vector, column, q = torch.zeros(3), torch.zeros(3, 1), torch.zeros(3, 2)
    for arguments in ((vector, column), (column, vector), (column, column)):
        with pytest.raises(AssertionError):
            dqn.td_loss(*arguments, "mse")
    for rewards, terminated in ((column, vector), (vector, column)):
        with pytest.raises(AssertionError):
            dqn.td_loss(vector, dqn.td_target(rewards, q, terminated, 0.9), "huber")


def test_epsilon_is_right_at_the_start_in_the_middle_at_the_end_and_after_it():
    at = [dqn.epsilon_at(step, 0.05, 1000) for step in (0, 500, 1000, 5000)]
    assert at == pytest.approx([1.0, 0.525, 0.05, 0.05])
    assert [dqn.epsilon_at(step, 0.1, 0) for step in (0, 1)] == pytest.approx([1.0, 0.1])


# --- network ---


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_actions_are_random_with_probability_epsilon_and_greedy_otherwise(epsilon):
    torch.manual_seed(0)
    network = dqn.QNetwork(Box(-1, 1, (2,)), Discrete(3))
    obs = torch.ones(1, 2).expand(30_000, 2)
    best = int(network.act(obs[:1], greedy=True))
    assert best == network(obs[:1]).argmax()
    shares = torch.bincount(network.act(obs, epsilon), minlength=3) / 30_000
    expected = torch.full((3,), epsilon / 3).index_add(0, tensor([best]), tensor([1 - epsilon]))
    torch.testing.assert_close(shares, expected, rtol=0, atol=0 if epsilon == 0 else 0.01)
    assert (network.act(obs, epsilon, greedy=True) == best).all()


def same_image(shape, channels):
    """A random image of one look in several layouts: of `shape`, and what it is with its channels first."""
    first = torch.randint(256, (2, channels, 40, 44), dtype=torch.uint8)
    return {(40, 44): first[:, 0], (40, 44, channels): first.movedim(1, -1), (channels, 40, 44): first}[shape]


@pytest.mark.parametrize("channels, shape", [(1, (40, 44)), (1, (40, 44, 1)), (3, (40, 44, 3)), (12, (40, 44, 12))])
def test_images_with_channels_last_or_none_get_the_q_of_channels_first(channels, shape):
    q = []
    for layout in (shape, (channels, 40, 44)):
        torch.manual_seed(0)
        network = dqn.QNetwork(Box(0, 255, layout, np.uint8), Discrete(3))
        assert isinstance(network.layers[0], torch.nn.Conv2d)
        q.append(network(same_image(layout, channels)))
    torch.testing.assert_close(*q)
    assert q[0].shape == (2, 3) and not torch.equal(q[0][0], q[0][1])


def test_pixels_are_scaled_to_1():
    network = dqn.QNetwork(Box(0, 255, (40, 44), np.uint8), Discrete(3))
    white = torch.full((1, 40, 44), 255, dtype=torch.uint8)
    torch.testing.assert_close(network(white), network.layers(torch.ones(1, 1, 40, 44)))


def test_vectors_of_any_type_go_through_an_mlp_of_120_and_84():
    network = dqn.QNetwork(Box(-1, 1, (2, 3), np.float64), Discrete(4))
    assert [layer.out_features for layer in network.layers[::2]] == [120, 84, 4]
    assert network(torch.ones(5, 2, 3, dtype=torch.float64)).shape == (5, 4)


def test_small_images_and_box_actions_are_refused_in_a_sentence():
    with pytest.raises(SystemExit, match="36 x 36"):
        dqn.QNetwork(Box(0, 255, (20, 44, 3), np.uint8), Discrete(2))
    with pytest.raises(SystemExit, match="Discrete"):
        dqn.QNetwork(Box(-1, 1, (3,)), Box(-1, 1, (1,)))
    done = run("dqn", "--env-id", "Pendulum-v1")
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1


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
    """Play at random into a ring of `rows` rows; now and then compare all that can be drawn with the truth.

    A step is known by its reward, its serial number.
    """
    torch.manual_seed(0)
    N = envs.num_envs
    buffer = dqn.ReplayBuffer(rows * N + N - 1, N, envs.single_observation_space, stack)
    rng, ends, written = np.random.default_rng(0), 0, 0
    happened = {}  # serial number to row and step
    for step in range(steps):
        if step % cut_every == 0:
            obs, _ = envs.reset(seed=step)
            buffer.add(obs)
            is_step = np.ones(N, bool)
            written += 1
        actions = rng.integers(envs.single_action_space.n, size=N)
        next_obs, _, terminated, truncated, _ = envs.step(actions)
        serial = step * N + np.arange(N)
        buffer.add(next_obs, actions=actions, rewards=serial, terminated=terminated, is_step=is_step)
        for n in np.flatnonzero(is_step):
            happened[serial[n]] = written - 1, (obs[n], actions[n], terminated[n], next_obs[n])
        written += 1
        obs, is_step = next_obs.copy(), ~(terminated | truncated)
        ends += N - is_step.sum()
        if (step + 1) % check_every == 0:
            happened = {key: value for key, value in happened.items() if value[0] >= written - 1 - rows + stack}
            batches = zip(*[buffer.sample(rows * N) for _ in range(12)])
            obs_, actions_, numbers, terminated_, next_obs_ = (np.concatenate(x) for x in batches)
            numbers, index = np.unique(numbers.astype(int), return_index=True)
            assert numbers.tolist() == sorted(happened)
            for number, i in zip(numbers, index):
                for ours, true in zip((obs_[i], actions_[i], terminated_[i], next_obs_[i]), happened[number][1]):
                    np.testing.assert_array_equal(ours, true)
    assert int(buffer.count) == written * N
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
    _, ends = check_buffer(envs, stack, rows, steps=200, check_every=7, cut_every=30)
    assert ends > 50


def test_stacks_of_pong_are_rebuilt_exactly_through_wraps_and_the_end_of_a_game():
    envs = dqn.make_envs("ALE/Pong-v5", 2, {})
    buffer, ends = check_buffer(envs, 4, rows=100, steps=1100, check_every=220)
    envs.close()
    assert ends >= 2 and int(buffer.count) > 4 * 200
    assert buffer.frames.shape == (200, 1, 84, 84) and buffer.frames.dtype == np.uint8


def test_steps_are_drawn_uniformly_and_reset_rows_never():
    torch.manual_seed(0)
    buffer = dqn.ReplayBuffer(20, 2, Box(-1, 1, (1,)), 1)
    buffer.add(np.zeros((2, 1)))
    for t in range(7):
        rewards, is_step = np.array([t, 10 + t]), np.array([True, t % 2 == 1])
        buffer.add(np.zeros((2, 1)), actions=0, rewards=rewards, terminated=0, is_step=is_step)
    counts = torch.bincount(torch.as_tensor(buffer.sample(20_000)[2]).long(), minlength=17)
    steps = tensor([0, 1, 2, 3, 4, 5, 6, 11, 13, 15])
    assert counts[steps].sum() == 20_000
    torch.testing.assert_close(counts[steps] / 20_000, torch.full((10,), 0.1), rtol=0, atol=0.01)


def test_a_loaded_buffer_draws_what_the_saved_one_draws():
    envs = Stacks(3, 4, (1, 5, 6), np.uint8)
    buffer, _ = check_buffer(envs, 4, rows=13, steps=50, check_every=50)
    loaded = dqn.ReplayBuffer(39, 3, envs.single_observation_space, 4)
    loaded.load_state_dict(buffer.state_dict())
    batches = []
    for each in (buffer, loaded):
        torch.manual_seed(1)
        batches.append(each.sample(100))
    for ours, theirs in zip(*batches):
        np.testing.assert_array_equal(ours, theirs)


# --- main ---


@pytest.mark.parametrize(
    "flags, named",
    [
        ({"buffer_size": 100}, "buffer-size"),
        ({"buffer_size": 1000, "num_envs": 200}, "buffer-size"),
        ({"total_timesteps": 10_000}, "learning-starts"),
        ({"epsilon_end": -0.1}, "epsilon-end"),
        ({"train_every": 0}, "train-every"),
        ({"target_every": 0}, "target-every"),
        ({"batch_size": 0}, "batch-size"),
        ({"max_grad_norm": 0.0}, "max-grad-norm"),
        ({"gamma": math.nan}, "gamma"),
    ],
)
def test_bad_flags_are_refused_in_a_sentence(flags, named):
    with pytest.raises(ValueError, match=named):
        dqn.Args(**flags)


def test_a_checkpoint_is_not_resumed_with_another_buffer(tmp_path):
    run_dir, before = train(tmp_path, "CartPole-v1", total_timesteps=60)
    for flags in ({"buffer_size": 3000}, {"buffer_size": 2001}, {"num_envs": 8}):
        with pytest.raises(SystemExit, match="--buffer-size and --num-envs cannot change"):
            resume(run_dir, **flags)
    assert (run_dir / "args.json").read_text().count('"num_envs": 4') == 1
    after = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert after["args"] == before["args"] and after["step"] == before["step"]


@pytest.mark.parametrize("env_id", ["probe_envs:Staggered-v0", "CartPole-v1"])
def test_weights_are_the_same_whatever_save_every_is(env_id, tmp_path):
    runs = [train(tmp_path, env_id, total_timesteps=600, save_every=every)[0] for every in (0, 4, 130)]
    first, *others = map(weights, runs)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_a_resumed_run_restores_all_and_begins_new_episodes(tmp_path):
    run_dir, before = train(tmp_path, "CartPole-v1", total_timesteps=300, target_every=130)
    assert not torch.equal(before["agent"]["layers.0.weight"], before["target_network"]["layers.0.weight"])
    rows = int(before["buffer"]["count"])
    after = resume(run_dir, total_timesteps=400, learning_rate=0.0, target_every=10**6)
    for name in ("agent", "target_network"):  # nothing is learnt, so all is as it was
        assert all(torch.equal(after[name][key], before[name][key]) for key in before[name])
    assert after["optimizer"]["state"][0]["step"] == before["optimizer"]["state"][0]["step"] + 25
    assert after["optimizer"]["param_groups"][0]["lr"] == 0.0
    for name in ("frames", "rewards", "is_step"):
        assert torch.equal(after["buffer"][name][:rows], before["buffer"][name][:rows])
    assert not after["buffer"]["is_step"][rows - 4 : rows].any()  # the episodes were cut there
    assert after["buffer"]["frames"][rows : rows + 4].abs().max() <= 0.05  # where CartPole starts
    assert not torch.equal(after["buffer"]["frames"][rows : rows + 4], before["buffer"]["frames"][:4])  # new seeds
    assert after["buffer"]["is_step"][rows : rows + 4].all() and after["step"] >= 400


def test_two_resumptions_of_a_checkpoint_give_the_same_weights(tmp_path):
    run_dir, saved = train(tmp_path, "CartPole-v1", total_timesteps=300)
    first = resume(run_dir, total_timesteps=500)
    torch.save(saved, run_dir / "checkpoint.pt")
    second = resume(run_dir, total_timesteps=500)
    assert all(torch.equal(first["agent"][name], second["agent"][name]) for name in first["agent"])
    assert not torch.equal(first["agent"]["layers.0.weight"], saved["agent"]["layers.0.weight"])


def test_reset_rows_are_neither_stored_as_steps_nor_counted(tmp_path):
    _, checkpoint = train(tmp_path, "probe_envs:StaggeredTrap-v0", total_timesteps=500, save_every=0)
    buffer, rows = checkpoint["buffer"], int(checkpoint["buffer"]["count"]) // 4 - 1
    assert buffer["rewards"][buffer["is_step"]].max() == 2  # reset rows have 1e6
    assert buffer["frames"][buffer["is_step"]].abs().max() < 100  # as do final observations
    steps = sum(rows - rows // (length + 1) for length in (4, 4, 6, 6))  # every length + 1st row is a reset
    assert checkpoint["step"] == int(buffer["is_step"].sum()) == steps


@pytest.mark.parametrize("num_envs, train_every", [(1, 10), (4, 10), (8, 3), (2, 7)])
def test_one_minibatch_is_learnt_per_train_every_counted_steps(num_envs, train_every, tmp_path, losses_seen):
    flags = {"num_envs": num_envs, "train_every": train_every, "total_timesteps": 400, "learning_starts": 100}
    _, checkpoint = train(tmp_path, "probe_envs:Staggered-v0", **flags)
    rows = [len(values) for values, *_ in losses_seen]
    assert rows == [16] * ((checkpoint["step"] - 100) // train_every)


@pytest.mark.parametrize("num_envs, together", [(4, 1), (8, 2), (12, 3)])
def test_minibatches_drawn_together_keep_the_targets_of_their_own_rows(num_envs, together, tmp_path, losses_seen):
    flags = {"total_timesteps": 3000, "gamma": 0.0, "learning_rate": 0.01, "epsilon_end": 1.0}
    _, checkpoint = train(tmp_path, "Chain-v0", num_envs=num_envs, train_every=4, **flags)
    assert len(losses_seen) == (checkpoint["step"] - 16) // 4 >= 10 * together
    late = losses_seen[-300:]
    for values, targets, _ in late:  # γ = 0: the target is the reward of the row's own state and action
        torch.testing.assert_close(values, targets, atol=0.05, rtol=0)
    assert len({tuple(targets.tolist()) for _, targets, _ in late}) > 290  # each draws its own


@pytest.mark.parametrize("kind", ["mse", "huber"])
def test_the_loss_is_the_one_asked_for(kind, tmp_path, losses_seen):
    train(tmp_path, "Chain-v0", total_timesteps=60, loss=kind)
    assert {call[2] for call in losses_seen} == {kind}


def test_the_gradient_is_clipped_only_when_asked_and_its_norm_is_logged(tmp_path, monkeypatch):
    norms, step = [], torch.optim.Adam.step

    def spy(self, *args):
        grads = [parameter.grad for parameter in self.param_groups[0]["params"]]
        norms.append(float(torch.nn.utils.get_total_norm(grads)))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    run_dir, _ = train(tmp_path, "Chain-v0", total_timesteps=200)
    assert max(norms) > 0.1 and scalars(run_dir, "losses/grad_norm") == []
    norms.clear()
    run_dir, _ = train(tmp_path, "Chain-v0", total_timesteps=200, max_grad_norm=0.1)
    assert max(norms) == pytest.approx(0.1, rel=1e-3)
    assert scalars(run_dir, "losses/grad_norm")[0][1] > 0.1  # before the clip


def test_updates_follow_the_hand_computed_gradient_of_the_mean_error_to_the_lagging_network(tmp_path, monkeypatch):
    """Eight steps by SGD instead of Adam, and what is logged of them, against formulas written here."""
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, lr, **_: torch.optim.SGD(parameters, lr))
    sample = spy_on(monkeypatch, dqn.ReplayBuffer, "sample")
    flags = {"total_timesteps": 16 + 8 * 4, "learning_rate": 3e-5, "gamma": 0.9}
    run_dir, _ = train(tmp_path, "probe_envs:Scaled-v0", **flags, target_every=10**6)
    torch.manual_seed(1)
    ours = dqn.QNetwork(Box(-1, 1, (3,)), Discrete(2))
    lagging, logged, apart = copy.deepcopy(ours), [], []
    for obs, actions, rewards, terminated, next_obs in (map(torch.as_tensor, x) for (_, n), x in sample if n):
        obs, next_obs = obs.float(), next_obs.float()
        with torch.no_grad():
            best = lagging.layers(next_obs).amax(1)
            apart.append(ours.layers(next_obs) - lagging.layers(next_obs))
        values = ours.layers(obs)[torch.arange(16), actions]
        loss = ((rewards + 0.9 * best * (1 - terminated) - values) ** 2).sum() / 16
        logged.append(torch.stack([loss, values.mean()]).tolist())
        for parameter, gradient in zip(ours.parameters(), torch.autograd.grad(loss, list(ours.parameters()))):
            parameter.data -= 3e-5 * gradient
    assert len(logged) == 8 and max(x.max() for x in apart) > 0.1 and min(x.min() for x in apart) < -0.1
    for name, after in weights(run_dir).items():
        torch.testing.assert_close(after, ours.state_dict()[name], rtol=1e-3, atol=1e-5)
    points = [scalars(run_dir, f"losses/{name}") for name in ("td_loss", "q_values")]
    for column, ((_, first), (_, rest)) in zip(zip(*logged), points):  # the first is logged alone
        assert (first, rest) == (pytest.approx(column[0], rel=1e-3), pytest.approx(np.mean(column[1:]), rel=1e-3))


def test_rewards_are_learnt_as_they_are_however_large(tmp_path, losses_seen):
    train(tmp_path, "CliffWalking-v1", total_timesteps=300, gamma=0.0, epsilon_end=1.0)
    assert set(torch.cat([targets for _, targets, _ in losses_seen]).tolist()) == {-1.0, -100.0}


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


def test_the_target_network_is_copied_at_each_multiple_whenever_minibatches_are_due(tmp_path, monkeypatch):
    copies = spy_on(monkeypatch, dqn.QNetwork, "load_state_dict")
    train(tmp_path, "Chain-v0", num_envs=2, total_timesteps=200, target_every=10, train_every=7)
    assert len(copies) == 20


def test_actions_are_drawn_at_the_epsilon_of_the_steps_taken(tmp_path, monkeypatch):
    acts = spy_on(monkeypatch, dqn.QNetwork, "act")
    train(tmp_path, "Chain-v0", num_envs=1, total_timesteps=100, epsilon_end=0.0, exploration_fraction=1.0)
    assert acts[0][0][2] == 1.0 and acts[1][0][2] == 0.99


def test_epsilon_is_logged_from_1_to_its_end_over_the_chosen_share_of_the_run(tmp_path):
    flags = {"epsilon_end": 0.2, "exploration_fraction": 0.5}
    flags |= {"train_every": 100, "learning_starts": 1500}
    run_dir, _ = train(tmp_path, "probe_envs:Probe-v0", total_timesteps=8000, **flags)
    points = {round(step, -3): value for step, value in scalars(run_dir, "charts/epsilon")}
    assert [points[step] for step in (2000, 4000, 5000, 8000)] == pytest.approx([0.6, 0.2, 0.2, 0.2], abs=0.02)
    assert len(scalars(run_dir, "losses/td_loss")) == len(scalars(run_dir, "losses/q_values")) == 8  # and the first


def test_atari_learns_from_the_sign_of_the_reward_and_logs_the_score(tmp_path):
    flags = {"total_timesteps": 2400, "learning_starts": 2000, "train_every": 100, "buffer_size": 4000}
    run_dir, checkpoint = train(tmp_path, "ALE/MsPacman-v5", **flags)
    assert checkpoint["buffer"]["frames"].shape == (4000, 1, 84, 84)
    assert set(checkpoint["buffer"]["rewards"].unique().tolist()) == {0.0, 1.0}
    assert max(value for _, value in scalars(run_dir, "charts/episodic_return")) >= 60


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
    )
    np.testing.assert_allclose(q_values(checkpoint, "agent", torch.eye(2)), optimum, atol=1e-2)


def test_truncated_episodes_bootstrap_so_that_q_is_the_endless_sum(tmp_path):
    flags = {"total_timesteps": 12_000, "gamma": 0.9, "learning_rate": 2e-3, "target_every": 100}
    _, checkpoint = train(tmp_path, "probe_envs:Probe-v0", **flags)
    endless, ten_steps = 1 / (1 - 0.9), (1 - 0.9**10) / (1 - 0.9)  # 10 and 6.5
    assert q_values(checkpoint, "agent", torch.ones(1, 1)).tolist()[0] == pytest.approx([endless, endless], abs=0.1)
    assert endless - ten_steps > 3
