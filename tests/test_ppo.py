"""PPO: each formula against its definition or a hand number, and what its update does."""

import math

import ppo
import probe_envs  # noqa: F401  (registers the environments)
import pytest
import reinforce
import torch
from gymnasium.spaces import Box, Discrete
from torch import tensor


def train(tmp_path, env_id, **flags):
    """Run main() in this process; returns the run directory."""
    run_dir = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    flags = {"num_envs": 4, "num_steps": 8, "num_minibatches": 1, "eval_episodes": 0, "device": "cpu"} | flags
    ppo.main(ppo.Args(env_id=f"probe_envs:{env_id}", run_dir=str(run_dir), **flags))
    return run_dir


@pytest.fixture
def losses_seen(monkeypatch):
    """Collects the arguments of every call of ppo_loss while main() runs."""
    calls, original = [], ppo.ppo_loss

    def spy(agent, *tensors, **coefficients):
        loss, metrics = original(agent, *tensors, **coefficients)
        calls.append((tensors, metrics))
        return loss, metrics

    monkeypatch.setattr(ppo, "ppo_loss", spy)
    return calls


# --- advantages ---


def gae_by_definition(rewards, values, next_values, terminated, done, gamma, lam):
    """The sum of GAE Eq. 16, term by term, up to the first `done`."""
    T, N = rewards.shape
    advantages = torch.zeros(T, N, dtype=rewards.dtype)
    for n in range(N):
        for t in range(T):
            for later in range(t, T):
                value_after = 0.0 if terminated[later, n] else next_values[later, n]
                delta = rewards[later, n] + gamma * value_after - values[later, n]
                advantages[t, n] += (gamma * lam) ** (later - t) * delta
                if done[later, n]:
                    break
    return advantages


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_gae_equals_its_definition_with_terminations_and_truncations(lam):
    g = torch.Generator().manual_seed(0)
    rewards, values, next_values = torch.randn(3, 20, 5, generator=g, dtype=torch.float64)
    terminated = (torch.rand(20, 5, generator=g) < 0.15).double()
    done = torch.maximum(terminated, (torch.rand(20, 5, generator=g) < 0.15).double())
    assert ((done == 1) & (terminated == 0)).any() and terminated.any()
    ours = ppo.compute_gae(rewards, values, next_values, terminated, done, 0.9, lam)
    torch.testing.assert_close(ours, gae_by_definition(rewards, values, next_values, terminated, done, 0.9, lam))


def test_gae_with_lambda_0_is_the_td_error_and_with_lambda_1_the_return_minus_the_value():
    rewards, values, next_values = (
        tensor([[1.0], [2.0], [4.0]]),
        tensor([[0.5], [1.0], [2.0]]),
        tensor([[1.0], [2.0], [3.0]]),
    )
    zeros = torch.zeros(3, 1)
    td_errors = ppo.compute_gae(rewards, values, next_values, zeros, zeros, 0.5, 0.0)
    torch.testing.assert_close(td_errors, tensor([[1.0], [2.0], [3.5]]))  # r + 0.5·V' - V
    monte_carlo = ppo.compute_gae(rewards, values, next_values, zeros, zeros, 0.5, 1.0)
    returns = tensor([[1 + 0.5 * (2 + 0.5 * (4 + 0.5 * 3))], [2 + 0.5 * (4 + 0.5 * 3)], [4 + 0.5 * 3]])
    torch.testing.assert_close(monte_carlo, returns - values)


def test_a_truncation_between_two_rollouts_keeps_its_mask_and_advantages(tmp_path, losses_seen):
    def rows(num_steps):
        losses_seen.clear()
        train(
            tmp_path,
            "Clock-v0",
            num_envs=1,
            num_steps=num_steps,
            num_epochs=1,
            learning_rate=0.0,
            gae_lambda=0.0,
            normalize_advantages=False,
            total_timesteps=17,
            save_every=0,
        )
        seen = [call[0] for call in losses_seen]
        return torch.cat(
            [torch.stack([obs.flatten(), advantages, mask], 1) for obs, _, _, _, advantages, _, mask, _ in seen]
        )

    whole, halves = rows(22), rows(11)  # 22 rows are 17 steps and 5 resets; row 10 is the 3rd `done`, row 11 a reset
    assert halves.shape == whole.shape == (22, 3) and whole[:, 2].sum() == 17
    key = lambda x: x[(x[:, 0] * 10 + x[:, 2]).argsort()]  # noqa: E731  (rows come shuffled; the clock names them)
    torch.testing.assert_close(key(halves), key(whole))


# --- losses ---


def test_policy_loss_is_the_hand_computed_clipped_surrogate():
    ratio = tensor([0.5, 1.0, 1.1, 1.5, 0.5, 1.5])
    advantage = tensor([1.0, 2.0, 1.0, 1.0, -1.0, -1.0])
    loss = ppo.policy_loss(ratio.log(), torch.zeros(6), advantage, clip_coef=0.2)
    # clipped only where moving on would look better: ratio 1.5 with A > 0 (to 1.2), ratio 0.5 with A < 0 (to 0.8)
    torch.testing.assert_close(-loss, tensor([0.5, 2.0, 1.1, 1.2, -0.8, -1.5]))


def test_policy_gradient_vanishes_where_the_clip_binds_and_only_there():
    logprobs = tensor([1.5, 0.5, 1.5, 0.5]).log().requires_grad_()
    ppo.policy_loss(logprobs, torch.zeros(4), tensor([1.0, -1.0, -1.0, 1.0]), 0.2).sum().backward()
    torch.testing.assert_close(logprobs.grad, tensor([0.0, 0.0, 1.5, -0.5]))  # d(-r·A)/d log π = -r·A


def test_value_loss_takes_the_worse_of_clipped_and_plain():
    values, old, returns = tensor([1.0, 1.0, 0.1]), tensor([0.0, 0.0, 0.0]), tensor([2.0, 0.0, 1.0])
    loss = ppo.value_loss(values, old, returns, clip_coef=0.2)
    torch.testing.assert_close(loss, tensor([0.5 * 1.8**2, 0.5 * 1.0, 0.5 * 0.81]))
    torch.testing.assert_close(ppo.value_loss(values, old, returns, math.inf), 0.5 * (values - returns) ** 2)


def test_ppo_loss_sums_its_terms_with_the_signs_of_equation_9():
    torch.manual_seed(0)
    agent = ppo.Agent(Box(-1, 1, (3,)), Discrete(4))
    obs, actions, mask = torch.randn(6, 3), torch.arange(6) % 4, tensor([1.0, 1, 0, 1, 1, 1])
    old_logprobs, old_values, advantages, returns = torch.randn(4, 6)
    loss, metrics = ppo.ppo_loss(
        agent,
        obs,
        actions,
        old_logprobs,
        old_values,
        advantages,
        returns,
        mask,
        mask.sum(),
        clip_coef=0.2,
        value_clip=math.inf,
        vf_coef=0.7,
        ent_coef=0.3,
    )
    logits, values = agent.actor(obs), agent.critic(obs)[:, 0]
    probs = logits.softmax(-1)
    logprobs = probs.log()[torch.arange(6), actions]
    kept = mask.bool()
    surrogate = ppo.policy_loss(logprobs, old_logprobs, advantages, 0.2)[kept].mean()
    entropy = -(probs * probs.log()).sum(-1)[kept].mean()
    square = 0.5 * ((values - returns) ** 2)[kept].mean()
    torch.testing.assert_close(loss, surrogate + 0.7 * square - 0.3 * entropy)
    ratio = (logprobs - old_logprobs).exp()[kept]
    expected = [surrogate, square, entropy, (ratio - 1 - ratio.log()).mean(), ((ratio - 1).abs() > 0.2).float().mean()]
    torch.testing.assert_close(metrics, torch.stack(expected).detach())


def test_masked_rows_have_no_gradient():
    torch.manual_seed(0)
    agent = ppo.Agent(Box(-1, 1, (3,)), Discrete(2))
    obs = torch.randn(4, 3, requires_grad=True)
    mask = tensor([1.0, 0.0, 1.0, 0.0])
    loss, _ = ppo.ppo_loss(
        agent,
        obs,
        tensor([0, 1, 0, 1]),
        *torch.randn(4, 4),
        mask,
        mask.sum(),
        clip_coef=0.2,
        value_clip=0.2,
        vf_coef=0.5,
        ent_coef=0.1,
    )
    loss.backward()
    assert (obs.grad[mask == 1].abs().sum(1) > 0).all() and (obs.grad[mask == 0] == 0).all()


def test_standardise_has_mean_0_and_deviation_1_over_the_mask_alone():
    x, mask = tensor([1.0, 2.0, 3.0, 1e6]), tensor([1.0, 1.0, 1.0, 0.0])
    kept = ppo.standardise(x, mask)[:3]
    torch.testing.assert_close(kept, tensor([-(1.5**0.5), 0.0, 1.5**0.5]))
    assert ppo.standardise(x, tensor([1.0, 0.0, 0.0, 0.0]))[0] == 0  # one valid row: no NaN


def test_the_learning_rate_falls_linearly_to_0():
    assert [ppo.annealed(0.4, step, 100) for step in (0, 50, 100)] == pytest.approx([0.4, 0.2, 0])


# --- actions ---


@pytest.mark.parametrize("network", [ppo.Agent, reinforce.Policy])
def test_box_log_probability_is_summed_over_dimensions(network):
    agent = network(Box(-1, 1, (3,)), Box(-1, 1, (2,)))
    agent.log_std.data = tensor([0.3, -0.4])
    obs, actions = torch.randn(5, 3), torch.randn(5, 2)
    mean, std = agent.actor(obs), agent.log_std.exp()
    by_hand = -0.5 * ((actions - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
    logprobs, entropy = agent(obs, actions)[:2]
    torch.testing.assert_close(logprobs, by_hand.sum(1))
    torch.testing.assert_close(entropy, (0.5 + 0.5 * math.log(2 * math.pi) + std.log()).sum().expand(5))


@pytest.mark.parametrize("space", [Discrete(3), Box(-1, 1, (2,))], ids=["discrete", "box"])
def test_act_samples_from_the_policy_and_is_greedy_without_noise(space):
    torch.manual_seed(0)
    agent = ppo.Agent(Box(-1, 1, (3,)), space)
    agent.actor[-1].bias.data = torch.linspace(-0.7, 0.9, agent.action_size)
    obs = torch.randn(1, 3).expand(40_000, 3)
    actions, policy = agent.act(obs, agent.noise(40_000)), agent.actor(obs[0])
    greedy = agent.act(obs[:1], 0.0)[0]
    if agent.discrete:
        frequencies = torch.bincount(actions, minlength=3) / len(actions)
        torch.testing.assert_close(frequencies, policy.softmax(-1), atol=0.01, rtol=0)
        torch.testing.assert_close(frequencies, agent(obs[:3], torch.arange(3))[0].exp(), atol=0.01, rtol=0)
        assert greedy == policy.argmax()
    else:
        torch.testing.assert_close(actions.mean(0), policy, atol=0.02, rtol=0)
        torch.testing.assert_close(actions.std(0), agent.log_std.exp(), atol=0.02, rtol=0)
        torch.testing.assert_close(greedy, policy)


@pytest.mark.parametrize("minibatches", [1, 4])
def test_the_ratio_is_1_before_the_first_update(tmp_path, losses_seen, minibatches):
    train(tmp_path, "Scaled-v0", total_timesteps=32, num_minibatches=minibatches, normalize=True)
    approx_kl, clip_fraction = losses_seen[0][1][3:]
    assert approx_kl.abs() < 1e-6 and clip_fraction == 0


def test_target_kl_ends_the_update_after_the_epoch_that_exceeds_it(tmp_path, losses_seen):
    flags = {"total_timesteps": 28, "num_epochs": 6, "num_minibatches": 2, "learning_rate": 0.01, "anneal_lr": False}
    train(tmp_path, "Probe-v0", **flags, target_kl=1e-9)
    epochs = [tuple(call[1][3] for call in losses_seen[i : i + 2]) for i in range(0, len(losses_seen), 2)]
    assert len(epochs) < 6 and sum(epochs[-1]) / 2 > 1e-9 and all(sum(epoch) / 2 <= 1e-9 for epoch in epochs[:-1])
    losses_seen.clear()
    train(tmp_path, "Probe-v0", **flags, target_kl=0.0)
    assert len(losses_seen) == 12


def test_compiled_actions_differ_between_steps_and_have_the_policys_deviation():
    try:
        torch.compile(lambda x: x + 1)(torch.ones(1))
    except Exception as fault:
        pytest.skip(f"torch.compile does not work here: {type(fault).__name__}")
    torch.manual_seed(0)
    agent = ppo.Agent(Box(-1, 1, (1,)), Box(-1, 1, (2,)))
    act = torch.compile(agent.act)
    with torch.no_grad():
        steps = torch.stack([act(torch.ones(64, 1), agent.noise(64)) for _ in range(200)])  # (200, 64, 2)
    assert not torch.equal(steps[0], steps[1])
    torch.testing.assert_close(steps.std((0, 1)), agent.log_std.detach().exp(), atol=0.03, rtol=0)
