"""REINFORCE: returns and loss by hand, the gradient against the analytic one, whole episodes only."""

import pytest
import reinforce
import torch
from gymnasium.spaces import Box, Discrete
from helpers import scalars, weights
from test_control import train
from torch import tensor


def test_discounted_returns_are_the_hand_computed_rewards_to_go():
    rewards = tensor([[1.0, 1.0], [2.0, 5.0], [4.0, 9.0]])
    mask = tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]])  # the second episode has two steps
    returns = reinforce.discounted_returns(rewards, mask, 0.5)
    assert returns.tolist() == [[1 + 0.5 * (2 + 0.5 * 4), 1 + 0.5 * 5], [2 + 0.5 * 4, 5.0], [4.0, 0.0]]


def test_the_loss_is_a_sum_over_steps_and_a_mean_over_episodes():
    agent = reinforce.Policy(Box(-1, 1, (2,)), Discrete(2))
    obs, actions, returns = torch.randn(5, 2), tensor([0, 1, 1, 0, 1]), tensor([3.0, 2.0, 1.0, 2.0, -1.0])
    loss, (logged, entropy) = reinforce.reinforce_loss(agent, obs, actions, returns, 2, tensor(5.0))
    probs = agent.actor(obs).softmax(-1)
    by_hand = -sum(float(returns[t]) * probs[t, actions[t]].log() for t in range(5)) / 2
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(logged, loss.detach())
    torch.testing.assert_close(entropy, -(probs * probs.log()).sum(-1).mean().detach())


def test_the_gradient_on_a_bandit_is_the_analytic_one():
    """One state, three arms: dJ/dlogit_a = π_a·(r_a - Σ_b π_b·r_b)."""
    torch.manual_seed(0)
    agent = reinforce.Policy(Box(-1, 1, (1,)), Discrete(3))
    rewards, n = tensor([1.0, -2.0, 5.0]), 200_000
    torch.nn.init.normal_(agent.actor[-1].bias)
    obs = torch.zeros(n, 1)
    actions = agent.act(obs, agent.noise(n))
    loss, _ = reinforce.reinforce_loss(agent, obs, actions, rewards[actions], n, tensor(float(n)))
    loss.backward()
    probs = agent.actor(obs[0]).softmax(-1).detach()
    analytic = probs * (rewards - (probs * rewards).sum())
    torch.testing.assert_close(-agent.actor[-1].bias.grad, analytic, atol=0.02, rtol=0)


def spy_on_losses(monkeypatch):
    """A list that main() fills with the tensors it gives to the loss function."""
    calls, loss_fn = [], reinforce.reinforce_loss

    def spy(agent, *tensors):
        calls.append(tensors)
        return loss_fn(agent, *tensors)

    monkeypatch.setattr(reinforce, "reinforce_loss", spy)
    return calls


def test_an_update_uses_one_whole_episode_of_each_environment(tmp_path, monkeypatch):
    calls = spy_on_losses(monkeypatch)
    train("reinforce", tmp_path, "Staggered-v0", total_timesteps=20, gamma=1.0, normalize_returns=False)
    ((obs, actions, returns, episodes, count),) = calls
    assert len(obs) == len(actions) == count == 4 + 4 + 6 + 6 and episodes == 4
    rewards_to_go = [4, 3, 2, 1] + [8, 6, 4, 2] + 2 * [6, 5, 4, 3, 2, 1]
    assert sorted(returns.tolist()) == sorted(rewards_to_go)


def test_standardised_returns_have_mean_0_and_deviation_1_over_the_steps_of_the_update(tmp_path, monkeypatch):
    calls = spy_on_losses(monkeypatch)
    train("reinforce", tmp_path, "Staggered-v0", total_timesteps=20)
    returns = calls[0][2]
    assert returns.mean() == pytest.approx(0, abs=1e-5) and returns.std(correction=0) == pytest.approx(1, abs=1e-4)


def test_one_step_episodes_of_equal_return_train_without_nan(tmp_path):
    run_dir = train("reinforce", tmp_path, "OneStep-v0", num_envs=1, total_timesteps=50)
    assert all(x.isfinite().all() for x in weights(run_dir).values())
    assert scalars(run_dir, "losses/policy_loss")[0][1] == 0  # one return, standardised to 0
