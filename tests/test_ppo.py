"""PPO: each formula against its definition or a hand number, and what its update does."""

import importlib
import math

import a2c
import by_hand
import numpy as np
import ppo
import pytest
import reinforce
import torch
from by_hand import spy_by_name, train
from gymnasium.spaces import Box, Discrete
from helpers import scalars, weights
from torch import tensor
from torch.testing import assert_close

three_scripts = pytest.mark.parametrize("script", [reinforce, a2c, ppo])
actor_critics = pytest.mark.parametrize("script", [a2c, ppo])
OBS = Box(-1, 1, (3,))
BOX = Box(-1, 1, (2,))

# --- advantages ---


@pytest.mark.parametrize("name", ["a2c", "ppo", "rlhf_ppo"])
@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_gae_equals_its_definition_with_terminations_and_truncations(lam, name):
    script = importlib.import_module(name)
    g = torch.Generator().manual_seed(0)
    rewards, values, next_values = torch.randn(3, 20, 5, generator=g, dtype=torch.float64)
    terminated = (torch.rand(20, 5, generator=g) < 0.15).double()
    truncated = (torch.rand(20, 5, generator=g) < 0.15).double()
    assert terminated.any()
    assert (truncated > terminated).any()
    arguments = (rewards, values, next_values, terminated, torch.maximum(terminated, truncated), 0.9, lam)
    assert_close(script.compute_gae(*arguments), by_hand.gae_by_definition(*arguments))


def test_gae_with_lambda_0_is_the_td_error_and_with_lambda_1_the_return_minus_the_value():
    rewards = tensor([[1.0], [2.0], [4.0]])
    values = tensor([[0.5], [1.0], [2.0]])
    next_values = tensor([[1.0], [2.0], [3.0]])
    zeros = torch.zeros(3, 1)
    td_errors = ppo.compute_gae(rewards, values, next_values, zeros, zeros, 0.5, 0.0)
    assert_close(td_errors, tensor([[1.0], [2.0], [3.5]]))  # r + 0.5·V' - V
    monte_carlo = ppo.compute_gae(rewards, values, next_values, zeros, zeros, 0.5, 1.0)
    third = 4 + 0.5 * 3
    second = 2 + 0.5 * third
    returns = tensor([[1 + 0.5 * second], [second], [third]])
    assert_close(monte_carlo, returns - values)


@actor_critics
def test_a_truncation_between_two_rollouts_keeps_its_advantages(script, tmp_path, monkeypatch):
    """22 rows are 17 steps and 5 resets; row 10 is the third `done`, row 11 a reset."""
    flags = {"num_envs": 1, "total_timesteps": 17, "learning_rate": 0.0, "gae_lambda": 0.0, "save_every": 0}
    gae = spy_by_name(monkeypatch, script, "compute_gae")
    train(script, tmp_path / "whole", "probe_envs:Clock-v0", num_steps=22, **flags)
    train(script, tmp_path / "halves", "probe_envs:Clock-v0", num_steps=11, **flags)
    whole, first, second = [call.result for call in gae]
    assert_close(torch.cat([first, second]), whole)


def test_a_truncation_between_two_rollouts_keeps_its_mask(tmp_path, monkeypatch):
    flags = {"num_envs": 1, "total_timesteps": 17, "num_epochs": 1, "learning_rate": 0.0, "save_every": 0}
    forward = spy_by_name(monkeypatch, ppo.Agent, "forward")
    train(ppo, tmp_path / "halves", "probe_envs:Clock-v0", num_steps=11, **flags)
    learnt = [call.obs for call in forward if call.has_grad and len(call.obs) > 1]
    times = torch.cat(learnt).flatten().sort().values
    assert times.tolist() == list(range(17))  # the number of steps taken before each of them


# --- losses ---


@pytest.mark.parametrize("name", ["ppo", "rlhf_ppo", "grpo"])
def test_policy_loss_is_the_hand_computed_clipped_surrogate(name):
    script = importlib.import_module(name)
    ratio = tensor([0.5, 1.0, 1.1, 1.5, 0.5, 1.5])
    advantages = tensor([1.0, 2.0, 1.0, 1.0, -1.0, -1.0])
    loss = script.policy_loss(ratio.log(), advantages, clip_coef=0.2)
    # clipped only where moving on would look better: ratio 1.5 with A > 0 (to 1.2), ratio 0.5 with A < 0 (to 0.8)
    assert_close(-loss, tensor([0.5, 2.0, 1.1, 1.2, -0.8, -1.5]))


@pytest.mark.parametrize("name", ["ppo", "rlhf_ppo", "grpo"])
def test_policy_gradient_vanishes_where_the_clip_binds_and_only_there(name):
    script = importlib.import_module(name)
    log_ratio = tensor([1.5, 0.5, 1.5, 0.5]).log().requires_grad_()
    loss = script.policy_loss(log_ratio, tensor([1.0, -1.0, -1.0, 1.0]), 0.2)
    loss.sum().backward()
    assert_close(log_ratio.grad, tensor([0.0, 0.0, 1.5, -0.5]))  # d(-r·A)/d log π = -r·A


def test_value_loss_is_half_the_squared_error_of_each_sample():
    loss = ppo.value_loss(tensor([1.0, 1.0, 0.0]), tensor([4.0, -1.0, 0.0]))
    assert loss.tolist() == [4.5, 2.0, 0.0]


def test_the_value_loss_of_rlhf_ppo_takes_the_worse_of_clipped_and_plain():
    value_loss = importlib.import_module("rlhf_ppo").value_loss
    values = tensor([1.0, 1.0, 0.1, -1.0])
    returns = tensor([2.0, 0.0, 1.0, -2.0])
    loss = value_loss(values, torch.zeros(4), returns, clip_coef=0.2)
    assert_close(loss, tensor([1.8**2, 1.0, 0.9**2, 1.8**2]) / 2)  # clipped to ±0.2 in the first and the last
    unclipped = value_loss(values, torch.zeros(4), returns, clip_coef=2.0)
    assert_close(unclipped, (values - returns) ** 2 / 2)


# --- updates ---

T = 7  # rows of a rollout, in which some episodes end and others go on
EPOCHS, MINIBATCHES = 2, 3
GAMMA = 0.9
LAM = 0.8
CLIP = 0.05
VF_COEF = 0.02
ENT_COEF = 0.3
LOG_STD = -0.7
COEFFICIENTS = {
    "gamma": GAMMA,
    "gae_lambda": LAM,
    "clip_coef": CLIP,
    "vf_coef": VF_COEF,
    "ent_coef": ENT_COEF,
    "log_std_init": LOG_STD,
}


def plain_update(plain, rows, actions, orders, first, learning_rate):
    """PPO on one rollout: steps down Eq. 9, negated, over the rows of each minibatch in the orders of a run."""
    rewards = plain.scaled_rewards(rows.rewards, first, GAMMA)
    values = plain.values(rows.obs).detach()
    now = values[:-1]
    later = values[1:]
    all_advantages = by_hand.gae_by_definition(rewards, now, later, rows.terminated, rows.done, GAMMA, LAM)
    advantages = all_advantages[rows.is_step]
    returns = advantages + now[rows.is_step]
    obs = rows.obs[:-1][rows.is_step]
    actions = actions[rows.is_step]
    old_logprobs = plain.policy(obs, actions)[0].detach()
    explained = 1 - advantages.var(correction=0) / returns.var(correction=0)
    means = []
    for order in orders:
        assert sorted(order.tolist()) == list(range(len(obs)))
        for mb in np.array_split(order, MINIBATCHES):
            logprobs, entropy = plain.policy(obs[mb], actions[mb])
            ratio = logprobs.exp() / old_logprobs[mb].exp()
            kl = (ratio - 1 - ratio.log()).mean()
            standard = advantages[mb] - advantages[mb].mean()
            standard = standard / advantages[mb].std(correction=0)
            clipped_ratio = ratio.clamp(1 - CLIP, 1 + CLIP)
            surrogate = torch.min(ratio * standard, clipped_ratio * standard).mean()  # Eq. 7
            error = plain.values(obs[mb]) - returns[mb]
            value_loss = (error**2).mean() / 2
            objective = surrogate - VF_COEF * value_loss + ENT_COEF * entropy.mean()  # Eq. 9
            norm = plain.step_down(-objective, learning_rate, max_norm=0.5)
            losses = torch.stack([-surrogate, value_loss, entropy.mean(), kl, tensor(norm), explained])
            means.append(losses.detach())
    policy_loss, value_loss, entropy, kl, norm, explained = torch.stack(means).mean(0)
    plain.log(policy_loss=policy_loss, value_loss=value_loss, entropy=entropy, approx_kl=kl, grad_norm=norm)
    plain.logged[-1]["explained_variance"] = explained.item()
    plain.seen.append(obs)


@pytest.mark.parametrize("optimizer, learning_rate", [("SGD", 0.5), ("Adam", 0.01)])
@pytest.mark.parametrize("box, normalize", [(False, False), (True, True)])
def test_three_updates_are_those_of_a_plain_second_version(
    box, normalize, optimizer, learning_rate, tmp_path, monkeypatch
):
    """Weights and logs, the gradient clipped to norm ½ where it is larger; eps of Adam lies outside the root."""
    if optimizer == "SGD":
        by_hand.use_sgd(monkeypatch, "Adam")
    rollouts = [by_hand.rollout(first, T) for first in (0, T, 2 * T)]
    sizes = [int(rows.is_step.sum()) for rows in rollouts]
    assert sizes == [19, 17, 16]
    acts = spy_by_name(monkeypatch, ppo.Agent, "act")
    randperm = torch.randperm
    orders = []

    def keep_order(number):
        orders.append(randperm(number))
        return orders[-1]

    monkeypatch.setattr(torch, "randperm", keep_order)
    given = {"num_steps": T, "total_timesteps": sum(sizes), "normalize": normalize, "learning_rate": learning_rate}
    given |= {"num_epochs": EPOCHS, "num_minibatches": MINIBATCHES}
    run_dir = by_hand.train_on_known(ppo, tmp_path / "run", box, **given, **COEFFICIENTS)
    plain = by_hand.Updates(ppo, box, normalize, LOG_STD, optimizer)
    step = 0
    for i, rows in enumerate(rollouts):
        actions = by_hand.actions_of(acts, i * T, T)
        rate = learning_rate * (1 - step / sum(sizes))
        plain_update(plain, rows, actions, orders[:EPOCHS], i * T, rate)
        del orders[:EPOCHS]
        step += sizes[i]
    assert max(plain.norms) > 0.55
    assert box or min(plain.norms) < 0.45
    assert not orders
    plain.compare(run_dir, sizes)


def test_each_epoch_parts_all_rows_into_other_minibatches_at_random(tmp_path, monkeypatch):
    forward = spy_by_name(monkeypatch, ppo.Agent, "forward")
    train(ppo, tmp_path / "run", "probe_envs:Scaled-v0", total_timesteps=32, num_minibatches=2, num_epochs=3)
    (rollout,) = [call.obs[:32].tolist() for call in forward if not call.has_grad]
    halves = [call.obs.tolist() for call in forward if call.has_grad and len(call.obs) > 1]
    parts = [frozenset(map(rollout.index, half)) for half in halves]
    assert [len(part) for part in parts] == [16] * 6
    for first, second in zip(parts[::2], parts[1::2]):
        assert first | second == set(range(32))
    in_order = [frozenset(range(16)), frozenset(range(0, 32, 2))]
    assert len({*parts, *in_order}) == 6 + 2


def test_every_update_takes_all_of_its_minibatches_whatever_the_number_of_rows(tmp_path, monkeypatch):
    calls = spy_by_name(monkeypatch, ppo, "policy_loss")
    flags = {"num_envs": 5, "num_steps": 3, "num_minibatches": 4, "num_epochs": 1, "total_timesteps": 15}
    train(ppo, tmp_path / "run", "probe_envs:Endless-v0", **flags)
    assert sorted(len(call.log_ratio) for call in calls) == [3, 4, 4, 4]


@pytest.mark.parametrize("minibatches", [1, 4])
def test_the_ratio_is_1_at_the_first_minibatch_of_every_update(minibatches, tmp_path, monkeypatch):
    """Also with --normalize, whose statistics move between updates only."""
    calls = spy_by_name(monkeypatch, ppo, "policy_loss")
    flags = {"total_timesteps": 90, "num_minibatches": minibatches, "normalize": True, "learning_rate": 0.01}
    train(ppo, tmp_path / "run", "probe_envs:Scaled-v0", **flags)
    first_calls = calls[:: 4 * minibatches]  # of 4 epochs
    assert len(first_calls) == 3
    for call in first_calls:
        assert call.log_ratio.abs().max() < 1e-5
    assert calls[-1].log_ratio.abs().max() > 1e-3


# --- approx_kl ---


def kl_by_hand(call):
    """Mean of (r - 1) - log r over a minibatch, r = π/π_old."""
    ratio = call.log_ratio.double().exp()
    return (ratio - 1 - ratio.log()).mean().item()


def test_approx_kl_is_the_mean_of_ratio_minus_1_minus_its_logarithm(tmp_path, monkeypatch):
    calls = spy_by_name(monkeypatch, ppo, "policy_loss")
    run_dir = train(ppo, tmp_path / "run", "probe_envs:Scaled-v0", total_timesteps=32, learning_rate=0.02)
    by_calls = np.mean([kl_by_hand(call) for call in calls])
    ((_, logged),) = scalars(run_dir, "losses/approx_kl")
    assert logged == pytest.approx(by_calls, rel=1e-4)
    x = torch.stack([call.log_ratio for call in calls])
    for other in (x.abs(), -x, x**2 / 2, (-x).expm1() + x):
        assert abs(other.mean() / by_calls - 1) > 0.01  # so the numbers tell which estimator it is


def kls_of_updates(run_dir, target_kl):
    """approx_kl of the minibatches of each of two updates, by hand; 4 epochs of 3 minibatches if nothing ends them."""
    flags = {"num_minibatches": 3, "num_epochs": 4, "learning_rate": 0.01, "total_timesteps": 64, "seed": 3}
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls = spy_by_name(monkeypatch, ppo, "policy_loss")
        train(ppo, run_dir, "probe_envs:Endless-v0", target_kl=target_kl, **flags)
    updates = []
    for call in calls:
        if call.log_ratio.abs().max() < 1e-6:  # the policy is still the old one
            updates.append([])
        updates[-1].append(kl_by_hand(call))
    return updates


def test_target_kl_0_never_ends_the_epochs_of_an_update(tmp_path):
    first, second = kls_of_updates(tmp_path / "run", target_kl=0.0)
    assert len(first) == len(second) == 4 * 3
    assert min(first[2::3]) > 1e-4


def test_target_kl_ends_an_update_after_the_epoch_whose_last_minibatch_exceeds_it(tmp_path):
    free, _ = kls_of_updates(tmp_path / "free", target_kl=0.0)
    mean = np.mean(free[:3])
    last = free[2]
    assert last < 0.7 * mean  # so neither the mean nor another minibatch of the epoch counts
    assert free[1] > mean
    lower, _ = kls_of_updates(tmp_path / "lower", target_kl=0.8 * last)
    assert lower == pytest.approx(free[:3])
    between, second = kls_of_updates(tmp_path / "between", target_kl=0.5 * (last + mean))
    assert free[5] > mean
    assert between == pytest.approx(free[:6])
    assert len(second) > 3  # another update begins with all of its epochs ahead
    higher, _ = kls_of_updates(tmp_path / "higher", target_kl=1.01 * max(free[2::3]))
    assert higher == pytest.approx(free)


@pytest.mark.parametrize("flag, value", [("target_kl", -0.1), ("target_kl", math.nan), ("clip_coef", 0.0)])
def test_flags_out_of_their_range_are_refused(flag, value):
    with pytest.raises(ValueError, match="clip-coef must be above 0, and target-kl at least 0"):
        ppo.Args(**{flag: value})


# --- the three scripts of policy gradients ---


@three_scripts
def test_the_learning_rate_falls_linearly_to_0(script, tmp_path, monkeypatch):
    """Updates of 32 steps each; the rate is that at the beginning of the rollout."""
    monkeypatch.setattr(script, "LOG_EVERY", 1)
    flags = {"total_timesteps": 160, "learning_rate": 0.4}
    falling = train(script, tmp_path / "falling", "probe_envs:Endless-v0", anneal_lr=True, **flags)
    steps, rates = zip(*scalars(falling, "charts/learning_rate"))
    assert steps == (32, 64, 96, 128, 160)
    assert rates == pytest.approx([0.4, 0.32, 0.24, 0.16, 0.08])
    constant = train(script, tmp_path / "constant", "probe_envs:Endless-v0", anneal_lr=False, **flags)
    rates = [rate for _, rate in scalars(constant, "charts/learning_rate")]
    assert rates == pytest.approx([0.4] * 5)


@three_scripts
def test_log_std_init_is_where_the_deviation_of_box_actions_begins(script, tmp_path):
    flags = {"log_std_init": -1.5, "learning_rate": 0.0, "total_timesteps": 32}
    box = weights(train(script, tmp_path / "box", "probe_envs:Target-v0", **flags))
    assert box["log_std"].tolist() == [-1.5, -1.5]
    discrete = weights(train(script, tmp_path / "discrete", "probe_envs:Probe-v0", **flags))
    assert "log_std" not in discrete
    assert script.Args().log_std_init == 0


@three_scripts
def test_box_log_probability_and_entropy_are_sums_over_dimensions(script):
    agent = script.Agent(OBS, BOX, False)
    agent.log_std.data = tensor([0.3, -0.4])
    obs = torch.randn(5, 3)
    actions = torch.randn(5, 2)
    logprobs, entropy, *_ = agent(obs, actions)
    expected_logprobs, expected_entropy = by_hand.gaussian(actions, agent.actor(obs), agent.log_std)
    assert_close(logprobs, expected_logprobs)
    assert_close(entropy, expected_entropy)


@three_scripts
def test_discrete_log_probability_and_entropy_are_those_of_the_softmax(script):
    agent = script.Agent(OBS, Discrete(2), False)
    agent.actor[-1].bias.data = tensor([math.log(3.0), 0.0])
    agent.actor[-1].weight.data.zero_()
    logprobs, entropy, *_ = agent(torch.randn(2, 3), tensor([0.0, 1.0]))
    assert_close(logprobs, tensor([0.75, 0.25]).log())
    expected = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert_close(entropy, tensor([expected, expected]))


@three_scripts
def test_act_samples_discrete_actions_from_the_policy_or_takes_the_likeliest_one(script):
    torch.manual_seed(0)
    agent = script.Agent(OBS, Discrete(3), False)
    agent.actor[-1].bias.data = tensor([-0.7, 0.9, 0.1])
    obs = torch.randn(1, 3).expand(40_000, 3)
    frequencies = torch.bincount(agent.act(obs), minlength=3) / len(obs)
    assert_close(frequencies, agent.actor(obs[0]).softmax(-1), atol=0.01, rtol=0)
    assert agent.act(obs[:9], greedy=True).tolist() == [1] * 9


@three_scripts
def test_act_samples_box_actions_from_the_gaussian_or_takes_its_mean(script):
    torch.manual_seed(0)
    agent = script.Agent(OBS, BOX, False)
    agent.actor[-1].bias.data = tensor([-0.7, 0.9])
    agent.log_std.data = tensor([0.4, -0.9])
    obs = torch.randn(1, 3).expand(40_000, 3)
    actions = agent.act(obs)
    mean = agent.actor(obs[0])
    assert_close(actions.mean(0), mean, atol=0.03, rtol=0)
    deviation = tensor([math.exp(0.4), math.exp(-0.9)])
    assert_close(actions.std(0), deviation, atol=0.02, rtol=0)
    assert actions.T.corrcoef()[0, 1].abs() < 0.02  # each dimension has noise of its own
    assert_close(agent.act(obs[:1], greedy=True)[0], mean)


def test_compiled_actions_differ_between_steps_and_have_the_policys_deviation():
    try:
        torch.compile(lambda x: x + 1)(torch.ones(1))
    except Exception as fault:
        pytest.skip(f"torch.compile does not work here: {type(fault).__name__}")
    torch.manual_seed(0)
    agent = ppo.Agent(OBS, BOX, False, log_std_init=-0.7)
    act = torch.compile(agent.act, dynamic=True)
    obs = torch.ones(64, 3)
    steps = torch.stack([act(obs) for _ in range(200)])  # (200, 64, 2)
    assert not torch.equal(steps[0], steps[1])
    deviation = steps.std((0, 1))
    assert_close(deviation, torch.full((2,), math.exp(-0.7)), atol=0.02, rtol=0)
