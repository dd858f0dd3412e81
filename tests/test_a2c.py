"""A2C: its updates and logs by hand, and its identity with a PPO whose extras are off."""

import sys
import types
from pathlib import Path

import a2c
import by_hand
import ppo
import pytest
import torch
from by_hand import spy_by_name, train
from helpers import weights
from torch.testing import assert_close

T = 7  # rows of a rollout, in which some episodes end and others go on
GAMMA = 0.9
LAM = 0.8
VF_COEF = 0.02
ENT_COEF = 0.3
LOG_STD = -0.7
COEFFICIENTS = {
    "gamma": GAMMA,
    "gae_lambda": LAM,
    "vf_coef": VF_COEF,
    "ent_coef": ENT_COEF,
    "log_std_init": LOG_STD,
}


def plain_updates(acts, rollouts, box, normalize, optimizer, learning_rate):
    """A2C from the actions of a run: a step down -log π·A + c1·½(V - R)² - c2·H in each rollout."""
    plain = by_hand.Updates(a2c, box, normalize, LOG_STD, optimizer)
    total = sum(rows.is_step.sum() for rows in rollouts)
    step = 0
    for i, rows in enumerate(rollouts):
        actions = by_hand.actions_of(acts, i * T, T)
        rewards = plain.scaled_rewards(rows.rewards, i * T, GAMMA)
        values = plain.values(rows.obs)
        now = values[:-1].detach()
        later = values[1:].detach()
        all_advantages = by_hand.gae_by_definition(rewards, now, later, rows.terminated, rows.done, GAMMA, LAM)
        advantages = all_advantages[rows.is_step]
        returns = advantages + now[rows.is_step]
        obs = rows.obs[:-1][rows.is_step]
        logprobs, entropy = plain.policy(obs, actions[rows.is_step])
        policy_loss = -(logprobs * advantages).mean()
        error = values[:-1][rows.is_step] - returns
        value_loss = (error**2).mean() / 2
        loss = policy_loss + VF_COEF * value_loss - ENT_COEF * entropy.mean()
        norm = plain.step_down(loss, learning_rate * (1 - step / total), max_norm=0.5)
        explained = 1 - advantages.var(correction=0) / returns.var(correction=0)
        plain.log(policy_loss=policy_loss, value_loss=value_loss, entropy=entropy, grad_norm=norm)
        plain.logged[-1]["explained_variance"] = explained.item()
        plain.seen.append(obs)
        step += len(obs)
    return plain


@pytest.mark.parametrize("optimizer, learning_rate", [("SGD", 0.3), ("RMSprop", 0.002)])
@pytest.mark.parametrize("box, normalize", [(False, False), (True, True)])
def test_three_updates_are_those_of_a_plain_second_version(
    box, normalize, optimizer, learning_rate, tmp_path, monkeypatch
):
    """Weights and logs, the gradient clipped to norm ½ where it is larger; eps of RMSprop lies outside the root."""
    if optimizer == "SGD":
        by_hand.use_sgd(monkeypatch, "RMSprop")
    rollouts = [by_hand.rollout(first, T) for first in (0, T, 2 * T)]
    sizes = [int(rows.is_step.sum()) for rows in rollouts]
    assert sizes == [19, 17, 16]
    acts = spy_by_name(monkeypatch, a2c.Agent, "act")
    given = {"num_steps": T, "total_timesteps": sum(sizes), "normalize": normalize, "learning_rate": learning_rate}
    run_dir = by_hand.train_on_known(a2c, tmp_path / "run", box, **given, **COEFFICIENTS, anneal_lr=True)
    plain = plain_updates(acts, rollouts, box, normalize, optimizer, learning_rate)
    assert max(plain.norms) > 0.6
    assert box or min(plain.norms) < 0.4
    plain.compare(run_dir, sizes)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "probe_envs:Staggered-v0", "Pendulum-v1"])
def test_ppo_with_one_epoch_on_the_full_batch_and_its_extras_off_is_a2c(env_id, tmp_path, monkeypatch):
    """arXiv 2205.09123: at ratio 1 the clipped surrogate has A2C's gradient. 20 updates, equal to rounding."""
    source = Path(ppo.__file__).read_text()
    start = source.index("mb_advantages =")
    end = source.index("log_ratio = logprobs -")
    source = source[:start] + "mb_advantages = b_advantages[mb]\n                " + source[end:]  # not normalised
    plain = types.ModuleType("plain_ppo")
    plain.__file__ = ppo.__file__
    monkeypatch.setitem(sys.modules, "plain_ppo", plain)
    exec(compile(source, ppo.__file__, "exec"), plain.__dict__)
    rmsprop = torch.optim.RMSprop
    monkeypatch.setattr(torch.optim, "Adam", lambda p, lr, eps, fused: rmsprop(p, lr, alpha=0.99, eps=eps))
    monkeypatch.setattr(torch, "randperm", torch.arange)  # a full batch needs no order, A2C draws none
    flags = {"num_envs": 8, "num_steps": 5, "total_timesteps": 640, "anneal_lr": False, "learning_rate": 7e-4}
    flags.update(gamma=0.99, gae_lambda=0.9, ent_coef=0.01, vf_coef=0.5)
    ours = weights(train(a2c, tmp_path / "a2c", env_id, **flags))
    theirs = weights(train(plain, tmp_path / "ppo", env_id, num_epochs=1, **flags))
    begun = weights(train(a2c, tmp_path / "begun", env_id, **{**flags, "learning_rate": 0.0}))
    for name, ours_now in ours.items():
        assert_close(theirs[name], ours_now, rtol=1e-4, atol=2e-6)
        assert (ours_now - begun[name]).abs().max() > 1e-3
