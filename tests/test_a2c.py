"""A2C: its loss and optimiser by hand, and its identity with a PPO whose extras are off."""

import math

import a2c
import ppo
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from helpers import weights
from torch import tensor


def test_policy_gradient_loss_is_minus_logprob_times_advantage():
    logprobs = tensor([0.5, 0.25]).log().requires_grad_()
    loss = a2c.policy_gradient_loss(logprobs, tensor([2.0, -3.0]))
    torch.testing.assert_close(loss, tensor([2 * math.log(2), -3 * math.log(4)]))
    loss.sum().backward()
    assert logprobs.grad.tolist() == [-2.0, 3.0]


def test_a2c_loss_sums_its_terms_over_the_mask():
    torch.manual_seed(0)
    agent = a2c.Agent(Box(-1, 1, (3,)), Discrete(4))
    obs, actions, mask = torch.randn(6, 3), torch.arange(6) % 4, tensor([1.0, 1, 0, 1, 1, 1])
    logprobs, entropy, values = agent(obs, actions)
    advantages, returns = torch.randn(2, 6)
    rollout = (x.view(3, 2) for x in (logprobs, entropy, values, advantages, returns, mask))
    loss, metrics = a2c.a2c_loss(*rollout, mask.sum(), vf_coef=0.7, ent_coef=0.3)
    kept = mask.bool()
    probs = agent.actor(obs).softmax(-1)[kept]
    policy_term = -(probs[torch.arange(5), actions[kept]].log() * advantages[kept]).mean()
    square = 0.5 * ((agent.critic(obs)[kept, 0] - returns[kept]) ** 2).mean()
    entropy = -(probs * probs.log()).sum(-1).mean()
    torch.testing.assert_close(loss, policy_term + 0.7 * square - 0.3 * entropy)
    torch.testing.assert_close(metrics, torch.stack([policy_term, square, entropy]).detach())


def test_the_optimiser_is_rmsprop_with_eps_outside_the_root(tmp_path, monkeypatch):
    seen, agents, loss_fn, agent_class = [], [], a2c.a2c_loss, a2c.Agent

    def spy(*tensors, **coefficients):
        loss, metrics = loss_fn(*tensors, **coefficients)
        before = {name: p.detach().clone() for name, p in agents[0].named_parameters()}
        grads = torch.autograd.grad(loss, list(agents[0].parameters()), retain_graph=True)
        seen.append((before, dict(zip(before, grads))))
        return loss, metrics

    monkeypatch.setattr(a2c, "a2c_loss", spy)
    monkeypatch.setattr(a2c, "Agent", lambda *spaces: agents.append(agent_class(*spaces)) or agents[0])
    a2c.main(a2c.Args(total_timesteps=40, num_envs=8, learning_rate=7e-4, eval_episodes=0, device="cpu",
                      run_dir=str(tmp_path / "run")))  # fmt: skip
    ((before, grads),) = seen
    norm = torch.cat([g.flatten() for g in grads.values()]).norm()
    for name, after in weights(tmp_path / "run").items():
        grad = grads[name] * min(1.0, 0.5 / (norm.item() + 1e-6))
        step = 7e-4 * grad / ((0.01 * grad**2).sqrt() + 1e-5)  # α = 0.99, first step, v = (1 - α)·g²
        torch.testing.assert_close(after, before[name] - step, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "probe_envs:Staggered-v0", "Pendulum-v1"])
def test_ppo_with_one_epoch_on_the_full_batch_and_its_extras_off_is_a2c(env_id, tmp_path, monkeypatch):
    """arXiv 2205.09123: at ratio 1 the clipped surrogate has A2C's gradient. 20 updates, equal to rounding."""
    rmsprop = torch.optim.RMSprop
    monkeypatch.setattr(torch.optim, "Adam", lambda p, lr, eps, fused: rmsprop(p, lr, alpha=0.99, eps=eps))
    monkeypatch.setattr(torch, "randperm", torch.arange)  # a full batch needs no order, A2C draws none
    common = {
        "env_id": env_id,
        "num_envs": 8,
        "num_steps": 5,
        "gae_lambda": 0.9,
        "learning_rate": 7e-4,
        "anneal_lr": False,
        "ent_coef": 0.01,
        "vf_coef": 0.5,
        "total_timesteps": 640,
        "eval_episodes": 0,
        "device": "cpu",
    }
    a2c.main(a2c.Args(**common, run_dir=str(tmp_path / "a2c")))
    ppo.main(
        ppo.Args(
            **common,
            num_minibatches=1,
            num_epochs=1,
            clip_value=False,
            normalize_advantages=False,
            run_dir=str(tmp_path / "ppo"),
        )
    )
    ours, theirs = weights(tmp_path / "a2c"), weights(tmp_path / "ppo")
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-4, atol=2e-6)
