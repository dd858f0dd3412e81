"""PPO: each formula against its definition or a hand number, and what its update does."""

import copy
import math

import a2c
import numpy as np
import ppo
import probe_envs  # noqa: F401  (registers the environments)
import pytest
import reinforce
import torch
from gymnasium.spaces import Box, Discrete
from helpers import scalars, spy_on, weights
from torch import tensor


def train(tmp_path, env_id, **flags):
    """Run main() in this process; returns the run directory."""
    run_dir = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    flags = {"num_envs": 4, "num_steps": 8, "num_minibatches": 1, "eval_episodes": 0, "device": "cpu"} | flags
    ppo.main(ppo.Args(env_id=f"probe_envs:{env_id}", run_dir=str(run_dir), **flags))
    return run_dir


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


def test_a_truncation_between_two_rollouts_keeps_its_mask_and_advantages(tmp_path, monkeypatch):
    def rows(num_steps):
        gae = spy_on(monkeypatch, ppo, "compute_gae")
        forward = spy_on(monkeypatch, ppo.Agent, "forward")
        flags = {"num_envs": 1, "num_epochs": 1, "learning_rate": 0.0, "gae_lambda": 0.0, "save_every": 0}
        train(tmp_path, "Clock-v0", num_steps=num_steps, total_timesteps=17, **flags)
        advantages = torch.cat([result.flatten() for _, result in gae])
        learnt = torch.cat([obs.flatten() for (_, obs, _), result in forward if result[0].requires_grad])
        return advantages, learnt.sort().values

    whole, halves = rows(22), rows(11)  # 22 rows are 17 steps and 5 resets; row 10 is the 3rd `done`, row 11 a reset
    torch.testing.assert_close(halves[0], whole[0])
    assert len(whole[0]) == 22 and len(whole[1]) == 1 + 17  # one row of zeros tells the lazy layers their sizes
    torch.testing.assert_close(halves[1], whole[1])


# --- losses ---


def test_policy_loss_is_the_hand_computed_clipped_surrogate():
    ratio = tensor([0.5, 1.0, 1.1, 1.5, 0.5, 1.5])
    advantage = tensor([1.0, 2.0, 1.0, 1.0, -1.0, -1.0])
    loss = ppo.policy_loss(ratio.log(), advantage, clip_coef=0.2)
    # clipped only where moving on would look better: ratio 1.5 with A > 0 (to 1.2), ratio 0.5 with A < 0 (to 0.8)
    torch.testing.assert_close(-loss, tensor([0.5, 2.0, 1.1, 1.2, -0.8, -1.5]))


def test_policy_gradient_vanishes_where_the_clip_binds_and_only_there():
    log_ratio = tensor([1.5, 0.5, 1.5, 0.5]).log().requires_grad_()
    ppo.policy_loss(log_ratio, tensor([1.0, -1.0, -1.0, 1.0]), 0.2).sum().backward()
    torch.testing.assert_close(log_ratio.grad, tensor([0.0, 0.0, 1.5, -0.5]))  # d(-r·A)/d log π = -r·A


def test_value_loss_takes_the_worse_of_clipped_and_plain():
    values, old, returns = tensor([1.0, 1.0, 0.1]), tensor([0.0, 0.0, 0.0]), tensor([2.0, 0.0, 1.0])
    loss = ppo.value_loss(values, old, returns, clip_coef=0.2)
    torch.testing.assert_close(loss, tensor([0.5 * 1.8**2, 0.5 * 1.0, 0.5 * 0.81]))
    torch.testing.assert_close(ppo.value_loss(values, old, returns, math.inf), 0.5 * (values - returns) ** 2)


@pytest.mark.parametrize("clip_value", [False, True])
def test_an_update_follows_the_gradient_of_equation_9_clipped_to_norm_a_half(clip_value, tmp_path, monkeypatch):
    """Two epochs of two minibatches, by SGD instead of Adam, and what is logged, against formulas written here."""
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, lr, **_: torch.optim.SGD(parameters, lr))
    forward = spy_on(monkeypatch, ppo.Agent, "forward")
    clipped = spy_on(monkeypatch, ppo, "policy_loss")
    squared = spy_on(monkeypatch, ppo, "value_loss")
    agents = spy_on(monkeypatch, ppo.Agent, "to")
    flags = {"num_epochs": 2, "num_minibatches": 2, "learning_rate": 0.5, "ent_coef": 0.3, "vf_coef": 0.7}
    flags |= {"anneal_lr": False, "clip_value": clip_value, "clip_coef": 0.05, "total_timesteps": 32}
    torch.manual_seed(1)
    start = copy.deepcopy(ppo.Agent(Box(-np.inf, np.inf, (3,), np.float64), Discrete(2), False))
    run_dir = train(tmp_path, "Scaled-v0", **flags, seed=1)
    assert len(agents) == 1 and len(clipped) == len(squared) == 4
    minibatches = [(obs, actions) for (_, obs, actions), result in forward if result[0].requires_grad and len(obs) > 1]
    old, logged = copy.deepcopy(start), []
    for (obs, actions), ((_, advantages, _), _), ((_, _, returns, _), _) in zip(minibatches, clipped, squared):
        assert advantages.mean().abs() < 1e-5 and (advantages.std(correction=0) - 1).abs() < 1e-3
        with torch.no_grad():
            old_logits, old_values = old.actor(obs), old.critic(obs)[:, 0]
        logits, values = start.actor(obs), start.critic(obs)[:, 0]
        rows = torch.arange(len(obs))
        probs, old_probs = logits.softmax(-1), old_logits.softmax(-1)
        ratio = probs[rows, actions.long()] / old_probs[rows, actions.long()]
        surrogate = torch.min(ratio * advantages, ratio.clamp(0.95, 1.05) * advantages).mean()  # Eq. 7
        error = (values - returns) ** 2
        if clip_value:
            error = torch.max(error, (old_values + (values - old_values).clamp(-0.05, 0.05) - returns) ** 2)
        entropy = -(probs * probs.log()).sum(-1).mean()
        start.zero_grad()
        (-(surrogate - 0.7 * 0.5 * error.mean() + 0.3 * entropy)).backward()  # Eq. 9
        norm = torch.cat([p.grad.flatten() for p in start.parameters() if p.grad is not None]).norm()
        logged.append(torch.stack([-surrogate, 0.5 * error.mean(), entropy, norm]).tolist())
        for parameter in start.parameters():
            if parameter.grad is not None:
                parameter.data -= 0.5 * parameter.grad * min(1.0, 0.5 / norm)
    for name, value in weights(run_dir).items():
        torch.testing.assert_close(value, start.state_dict()[name], rtol=1e-4, atol=1e-6)
    for name, by_hand in zip(("policy_loss", "value_loss", "entropy", "grad_norm"), np.mean(logged, 0)):
        assert scalars(run_dir, f"losses/{name}") == [(32, pytest.approx(by_hand, rel=1e-3, abs=1e-5))]


def test_each_epoch_parts_all_rows_into_other_minibatches_at_random(tmp_path, monkeypatch):
    forward = spy_on(monkeypatch, ppo.Agent, "forward")
    train(tmp_path, "Scaled-v0", total_timesteps=32, num_minibatches=2, num_epochs=3)
    rollout = next(obs[:32].tolist() for (_, obs, _), _ in forward if len(obs) == 9 * 4)
    halves = [{rollout.index(row) for row in obs.tolist()} for (_, obs, _), _ in forward if len(obs) == 16]
    assert len(halves) == 6 and all(a | b == set(range(32)) for a, b in zip(halves[::2], halves[1::2]))
    assert len({frozenset(half) for half in [*halves, range(16), range(0, 32, 2)]}) == 6 + 2


def test_approx_kl_is_the_mean_of_ratio_minus_1_minus_its_logarithm(tmp_path, monkeypatch):
    calls = spy_on(monkeypatch, ppo, "policy_loss")
    run_dir = train(tmp_path, "Scaled-v0", total_timesteps=32, learning_rate=0.01)
    by_hand = torch.stack([(log_ratio.exp() - 1 - log_ratio).mean() for (log_ratio, *_), _ in calls]).mean()
    assert scalars(run_dir, "losses/approx_kl")[0][1] == pytest.approx(by_hand.item(), rel=1e-4) and by_hand > 1e-5


def test_the_value_is_not_clipped_unless_asked(tmp_path, monkeypatch):
    for flags, clip in (({}, math.inf), ({"clip_value": True}, 0.2)):
        calls = spy_on(monkeypatch, ppo, "value_loss")
        train(tmp_path, "Probe-v0", total_timesteps=32, **flags)
        assert calls and all(arguments[3] == clip for arguments, _ in calls)


def test_the_learning_rate_falls_linearly_to_0(tmp_path):
    seen = scalars(train(tmp_path, "Scaled-v0", total_timesteps=2000, learning_rate=0.4), "charts/learning_rate")
    last_begin = seen[-1][0] - 32  # the rate is that at the beginning of the rollout; resets are not steps
    assert seen[0][1] == pytest.approx(0.4)
    assert seen[-1][1] == pytest.approx(0.4 * (1 - last_begin / 2000), abs=0.4 * 5 / 2000)
    constant = scalars(train(tmp_path, "Probe-v0", total_timesteps=500, anneal_lr=False), "charts/learning_rate")
    assert [rate for _, rate in constant] == pytest.approx([1e-3] * len(constant))


@pytest.mark.parametrize("script", [a2c, ppo])
def test_explained_variance_is_that_of_the_returns_by_the_values(script, tmp_path, monkeypatch):
    calls = spy_on(monkeypatch, script, "compute_gae")
    flags = {"num_envs": 4, "num_steps": 8, "eval_episodes": 0, "total_timesteps": 32, "device": "cpu"}
    script.main(script.Args(env_id="probe_envs:Scaled-v0", run_dir=str(tmp_path / "run"), **flags))
    ((_, values, *_), advantages), *_ = calls
    returns = advantages + values
    by_hand = 1 - ((returns - values) - (returns - values).mean()).square().mean() / returns.var(correction=0)
    ((_, logged),) = scalars(tmp_path / "run", "losses/explained_variance")
    assert logged == pytest.approx(by_hand.item(), rel=1e-4)


# --- actions ---


@pytest.mark.parametrize("script", [ppo, reinforce])
def test_box_log_probability_is_summed_over_dimensions(script):
    agent = script.Agent(Box(-1, 1, (3,)), Box(-1, 1, (2,)), False)
    agent.log_std.data = tensor([0.3, -0.4])
    obs, actions = torch.randn(5, 3), torch.randn(5, 2)
    mean, std = agent.actor(obs), agent.log_std.exp()
    by_hand = -0.5 * ((actions - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
    logprobs, entropy = agent(obs, actions)[:2]
    torch.testing.assert_close(logprobs, by_hand.sum(1))
    torch.testing.assert_close(entropy, (0.5 + 0.5 * math.log(2 * math.pi) + std.log()).sum().expand(5))


@pytest.mark.parametrize("space", [Discrete(3), Box(-1, 1, (2,))], ids=["discrete", "box"])
def test_act_samples_from_the_policy_or_takes_the_likeliest_action(space):
    torch.manual_seed(0)
    agent = ppo.Agent(Box(-1, 1, (3,)), space, False)
    agent.actor[-1].bias.data = torch.linspace(-0.7, 0.9, agent.actor[-1].out_features)
    obs = torch.randn(1, 3).expand(40_000, 3)
    actions, policy = agent.act(obs), agent.actor(obs[0])
    greedy = agent.act(obs[:1], greedy=True)[0]
    if agent.discrete:
        frequencies = torch.bincount(actions, minlength=3) / len(actions)
        torch.testing.assert_close(frequencies, policy.softmax(-1), atol=0.01, rtol=0)
        torch.testing.assert_close(frequencies, agent(obs[:3], torch.arange(3))[0].exp(), atol=0.01, rtol=0)
        assert greedy == policy.argmax()
    else:
        torch.testing.assert_close(actions.mean(0), policy, atol=0.02, rtol=0)
        torch.testing.assert_close(actions.std(0), agent.log_std.exp().detach(), atol=0.02, rtol=0)
        torch.testing.assert_close(greedy, policy)


@pytest.mark.parametrize("minibatches", [1, 4])
def test_the_ratio_is_1_at_the_first_minibatch_of_every_update(tmp_path, monkeypatch, minibatches):
    """Also with --normalize, whose statistics move between updates only."""
    calls = spy_on(monkeypatch, ppo, "policy_loss")
    train(tmp_path, "Scaled-v0", total_timesteps=90, num_minibatches=minibatches, normalize=True, learning_rate=0.01)
    first = [arguments[0] for arguments, _ in calls[:: 4 * minibatches]]
    assert len(first) == 3 and all(log_ratio.abs().max() < 1e-5 for log_ratio in first)
    assert calls[-1][0][0].abs().max() > 1e-3


def test_compiled_actions_differ_between_steps_and_have_the_policys_deviation():
    try:
        torch.compile(lambda x: x + 1)(torch.ones(1))
    except Exception as fault:
        pytest.skip(f"torch.compile does not work here: {type(fault).__name__}")
    torch.manual_seed(0)
    agent = ppo.Agent(Box(-1, 1, (1,)), Box(-1, 1, (2,)), False)
    act = torch.compile(agent.act, dynamic=True)
    steps = torch.stack([act(torch.ones(64, 1)) for _ in range(200)])  # (200, 64, 2)
    assert not torch.equal(steps[0], steps[1])
    torch.testing.assert_close(steps.std((0, 1)), agent.log_std.detach().exp(), atol=0.03, rtol=0)


def test_every_update_takes_all_of_its_minibatches_whatever_the_number_of_rows(tmp_path, monkeypatch):
    calls = spy_on(monkeypatch, ppo, "policy_loss")
    train(tmp_path, "Endless-v0", total_timesteps=15, num_envs=5, num_steps=3, num_minibatches=4, num_epochs=1)
    assert sorted(len(log_ratio) for (log_ratio, *_), _ in calls) == [3, 4, 4, 4]
