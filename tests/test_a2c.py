"""A2C: its update and optimiser by hand, and its identity with a PPO whose extras are off."""

import sys
import types
from pathlib import Path

import a2c
import ppo
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from helpers import spy_on, weights


@pytest.mark.parametrize("optimizer", ["SGD", "RMSprop"])
def test_an_update_is_a_step_down_the_hand_computed_gradient(optimizer, tmp_path, monkeypatch):
    """-log π·A + c1·½(V - R)² - c2·H, clipped to norm 0.5; RMSprop adds eps outside the root."""
    if optimizer == "SGD":
        monkeypatch.setattr(torch.optim, "RMSprop", lambda parameters, lr, **_: torch.optim.SGD(parameters, lr))
    forward, gae = spy_on(monkeypatch, a2c.Agent, "forward"), spy_on(monkeypatch, a2c, "compute_gae")
    torch.manual_seed(1)
    start = a2c.Agent(Box(-1, 1, (3,)), Discrete(2), False)
    flags = {"env_id": "probe_envs:Scaled-v0", "num_envs": 4, "num_steps": 8, "total_timesteps": 32}
    flags |= {"learning_rate": 0.01, "vf_coef": 0.7, "ent_coef": 0.3, "gae_lambda": 0.9}
    a2c.main(a2c.Args(**flags, eval_episodes=0, device="cpu", run_dir=str(tmp_path / "run")))
    (_, obs, actions), _ = next(call for call in forward if len(call[0][1]) > 1)
    ((_, values, *_), advantages), *_ = gae
    advantages, returns = advantages.flatten(), (advantages + values).flatten()
    logits, values = start.actor(obs)[:-4], start.critic(obs)[:-4, 0]  # the last row of observations only bootstraps
    probs = logits.softmax(-1)
    logprobs = probs.log()[torch.arange(32), actions[:-4].long()]
    entropy = -(probs * probs.log()).sum(-1)
    (-(logprobs * advantages) + 0.7 * 0.5 * (values - returns) ** 2 - 0.3 * entropy).mean().backward()
    norm = torch.cat([p.grad.flatten() for p in start.parameters() if p.grad is not None]).norm()
    assert norm > 0.5
    after = weights(tmp_path / "run")
    for name, parameter in start.named_parameters():
        if parameter.grad is not None:
            step = 0.01 * parameter.grad * 0.5 / norm
            if optimizer == "RMSprop":
                step = step / ((0.01 * (parameter.grad * 0.5 / norm) ** 2).sqrt() + 1e-5)  # α = 0.99: v = (1 - α)·g²
            torch.testing.assert_close(after[name], parameter.detach() - step, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "probe_envs:Staggered-v0", "Pendulum-v1"])
def test_ppo_with_one_epoch_on_the_full_batch_and_its_extras_off_is_a2c(env_id, tmp_path, monkeypatch):
    """arXiv 2205.09123: at ratio 1 the clipped surrogate has A2C's gradient. 20 updates, equal to rounding."""
    source = Path(ppo.__file__).read_text()
    (line,) = [line for line in source.splitlines() if line.strip().startswith("mb_advantages = (mb_advantages - ")]
    plain = types.ModuleType("plain_ppo")  # ppo.py without the normalisation of advantages
    plain.__file__ = ppo.__file__
    monkeypatch.setitem(sys.modules, "plain_ppo", plain)
    exec(compile(source.replace(line, ""), ppo.__file__, "exec"), plain.__dict__)
    rmsprop = torch.optim.RMSprop
    monkeypatch.setattr(torch.optim, "Adam", lambda p, lr, eps, fused: rmsprop(p, lr, alpha=0.99, eps=eps))
    monkeypatch.setattr(torch, "randperm", torch.arange)  # a full batch needs no order, A2C draws none
    common = {"env_id": env_id, "num_envs": 8, "num_steps": 5, "gae_lambda": 0.9, "learning_rate": 7e-4}
    common |= {
        "gamma": 0.99,
        "anneal_lr": False,
        "ent_coef": 0.01,
        "vf_coef": 0.5,
        "total_timesteps": 640,
        "eval_episodes": 0,
    }
    a2c.main(a2c.Args(**common, device="cpu", run_dir=str(tmp_path / "a2c")))
    once = {"num_minibatches": 1, "num_epochs": 1}
    plain.main(plain.Args(**common, **once, device="cpu", run_dir=str(tmp_path / "ppo")))
    ours, theirs = weights(tmp_path / "a2c"), weights(tmp_path / "ppo")
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-4, atol=2e-6)
