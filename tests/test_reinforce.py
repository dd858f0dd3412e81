"""REINFORCE: returns and update by hand, the gradient against the analytic one, whole episodes only."""

import pytest
import reinforce
import torch
from gymnasium.spaces import Box, Discrete
from helpers import scalars, spy_on, weights
from test_control import train
from torch import tensor


def test_discounted_returns_are_the_hand_computed_rewards_to_go():
    rewards = tensor([[1.0, 1.0], [2.0, 5.0], [4.0, 9.0]])
    done = tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # the second episode has two steps
    returns = reinforce.discounted_sum(rewards, 0.5 * (1 - done))
    assert returns.tolist() == [[1 + 0.5 * (2 + 0.5 * 4), 1 + 0.5 * 5], [2 + 0.5 * 4, 5.0], [4.0, 9.0]]


def test_the_gradient_on_a_bandit_is_the_analytic_one():
    """One state, three arms: dJ/dlogit_a = π_a·(r_a - Σ_b π_b·r_b)."""
    torch.manual_seed(0)
    agent = reinforce.Agent(Box(-1, 1, (1,)), Discrete(3), False)
    rewards, n = tensor([1.0, -2.0, 5.0]), 200_000
    torch.nn.init.normal_(agent.actor[-1].bias)
    obs = torch.zeros(n, 1)
    actions = agent.act(obs)
    logprobs, _ = agent(obs, actions)
    (-(logprobs * rewards[actions]).sum() / n).backward()
    probs = agent.actor(obs[0]).softmax(-1).detach()
    analytic = probs * (rewards - (probs * rewards).sum())
    torch.testing.assert_close(-agent.actor[-1].bias.grad, analytic, atol=0.02, rtol=0)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_an_update_is_a_step_up_the_gradient_of_one_whole_episode_of_each_environment(optimizer, tmp_path, monkeypatch):
    """Episodes of 4, 4, 6 and 6 steps, sums over steps and a mean over episodes; Adam adds eps outside the root."""
    if optimizer == "SGD":
        monkeypatch.setattr(torch.optim, "Adam", lambda parameters, lr, **_: torch.optim.SGD(parameters, lr))
    forward = spy_on(monkeypatch, reinforce.Agent, "forward")
    torch.manual_seed(1)
    start = reinforce.Agent(Box(-1, 1, (2,)), Discrete(2), False)
    run_dir = train("reinforce", tmp_path, "Staggered-v0", total_timesteps=20, gamma=0.5, learning_rate=0.1)
    ((_, obs, actions), _) = forward[-1]
    assert len(obs) == len(actions) == 4 + 4 + 6 + 6
    to_go = {(n, t): sum(0.5**k * (2 if n == 1 else 1) for k in range((4 if n < 2 else 6) - t))
             for t in range(6) for n in range(4) if t < (4 if n < 2 else 6)}  # fmt: skip  # rows come time first
    returns = tensor(list(to_go.values()))
    returns = (returns - returns.mean()) / returns.std(correction=0)
    logprobs = start.actor(obs).log_softmax(-1)[torch.arange(20), actions.long()]
    (-(logprobs * returns).sum() / 4).backward()
    for name, after in weights(run_dir).items():
        parameter = dict(start.named_parameters())[name]
        if parameter.grad is not None:
            step, atol = 0.1 * parameter.grad, 1e-6
            if optimizer == "Adam":
                step, atol = step / (parameter.grad.abs() + 1e-5), 1e-3  # its first one
            torch.testing.assert_close(after, parameter.detach() - step, rtol=1e-3, atol=atol)


def test_the_update_sees_the_statistics_that_the_actions_were_drawn_by(tmp_path, monkeypatch):
    forward = spy_on(monkeypatch, reinforce.Agent, "forward")
    torch.manual_seed(1)
    start = reinforce.Agent(Box(-1, 1, (2,)), Discrete(2), True)  # whose normaliser has seen nothing
    run_dir = train("reinforce", tmp_path, "Staggered-v0", total_timesteps=20, normalize=True)
    (_, obs, actions), (logprobs, _) = forward[-1]
    expected = start.actor(obs / (1 + 1e-8) ** 0.5).log_softmax(-1).gather(-1, actions.long()[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected)
    assert weights(run_dir)["obs_norm.count"] == 20


def test_one_step_episodes_of_equal_return_train_without_nan(tmp_path):
    run_dir = train("reinforce", tmp_path, "OneStep-v0", num_envs=1, total_timesteps=50)
    assert all(x.isfinite().all() for x in weights(run_dir).values())
    assert scalars(run_dir, "losses/policy_loss")[0][1] == 0  # one return, normalised to 0


@pytest.mark.parametrize("flags, cut", [({"num_steps": 50}, 50), ({"total_timesteps": 120}, 30)])
def test_endless_episodes_are_cut_and_said_to_be(tmp_path, capsys, flags, cut):
    flags = {"total_timesteps": 400, "num_steps": 10_000} | flags
    run_dir = train("reinforce", tmp_path, "Endless-v0", num_envs=4, **flags)
    assert f"4 of 4 training episodes were cut after {cut} steps" in capsys.readouterr().out
    ((last, _),) = scalars(run_dir, "charts/SPS")[-1:]
    assert last <= flags["total_timesteps"] + 4
