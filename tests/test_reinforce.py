"""REINFORCE: returns, updates and logs by hand, the gradient against the analytic one, whole episodes only."""

import by_hand
import pytest
import reinforce
import torch
from by_hand import spy_by_name, train
from gymnasium.spaces import Box, Discrete
from helpers import scalars, weights
from torch import tensor
from torch.testing import assert_close

GAMMA = 0.9
LOG_STD = -0.7
COEFFICIENTS = {"gamma": GAMMA, "log_std_init": LOG_STD}
LONGEST = max(by_hand.LENGTHS)


def test_discounted_returns_are_the_hand_computed_rewards_to_go():
    rewards = tensor([[1.0, 1.0], [2.0, 5.0], [4.0, 9.0]])
    done = tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # the second episode has two steps
    returns = reinforce.discounted_sum(rewards, 0.5 * (1 - done))
    first, second = returns.T.tolist()
    assert first == [1 + 0.5 * (2 + 0.5 * 4), 2 + 0.5 * 4, 4.0]
    assert second == [1 + 0.5 * 5, 5.0, 9.0]


def test_the_gradient_on_a_bandit_is_the_analytic_one():
    """One state, three arms: dJ/dlogit_a = π_a·(r_a - Σ_b π_b·r_b)."""
    torch.manual_seed(0)
    agent = reinforce.Agent(Box(-1, 1, (1,)), Discrete(3), False)
    rewards = tensor([1.0, -2.0, 5.0])
    torch.nn.init.normal_(agent.actor[-1].bias)
    obs = torch.zeros(200_000, 1)
    actions = agent.act(obs)
    logprobs, _ = agent(obs, actions)
    objective = (logprobs * rewards[actions]).mean()
    objective.backward()
    probs = agent.actor(obs[0]).softmax(-1).detach()
    analytic = probs * (rewards - probs @ rewards)
    assert_close(agent.actor[-1].bias.grad, analytic, atol=0.02, rtol=0)


def episodes_by_hand(actions):
    """Observations, actions and returns of the first episode of each environment, from actions (t, N)."""
    rows = by_hand.rollout(0, LONGEST)
    steps, returns = [], []
    for n, length in enumerate(by_hand.LENGTHS):
        for t in range(length):
            to_go = 0.0
            for later in range(t, length):
                to_go += GAMMA ** (later - t) * rows.rewards[later, n]
            steps.append((t, n))
            returns.append(to_go)
    times, envs = zip(*steps)
    return rows.obs[times, envs], actions[times, envs], torch.stack(returns)


def plain_updates(acts, box, normalize, optimizer, learning_rate):
    """REINFORCE from the actions of a run: a step down -1/N·Σ_i Σ_t log π(a_t|s_t)·G_t for each round of episodes."""
    plain = by_hand.Updates(reinforce, box, normalize, LOG_STD, optimizer)
    for i, share_left in enumerate((1, 2 / 3, 1 / 3)):
        obs, actions, returns = episodes_by_hand(by_hand.actions_of(acts, i * LONGEST, LONGEST))
        returns = (returns - returns.mean()) / returns.std(correction=0)
        logprobs, entropy = plain.policy(obs, actions)
        loss = -(logprobs * returns).sum() / by_hand.N
        norm = plain.step_down(loss, learning_rate * share_left, max_norm=float("inf"))
        plain.log(policy_loss=loss, entropy=entropy, grad_norm=norm)
        plain.seen.append(obs)
    return plain


@pytest.mark.parametrize("optimizer, learning_rate", [("SGD", 0.1), ("Adam", 0.01)])
@pytest.mark.parametrize("box, normalize", [(False, False), (True, True)])
def test_three_updates_are_those_of_a_plain_second_version(
    box, normalize, optimizer, learning_rate, tmp_path, monkeypatch
):
    """Weights and logs, of a gradient that is not clipped; eps of Adam lies outside the root."""
    if optimizer == "SGD":
        by_hand.use_sgd(monkeypatch, "Adam")
    acts = spy_by_name(monkeypatch, reinforce.Agent, "act")
    steps = sum(by_hand.LENGTHS)
    given = {"num_steps": 100, "total_timesteps": 3 * steps, "normalize": normalize, "learning_rate": learning_rate}
    run_dir = by_hand.train_on_known(reinforce, tmp_path / "run", box, **given, **COEFFICIENTS)
    plain = plain_updates(acts, box, normalize, optimizer, learning_rate)
    assert min(plain.norms) > 1.2  # a clip would show
    plain.compare(run_dir, [steps] * 3)


def test_a_second_episode_of_an_environment_is_not_learnt_from_while_others_go_on(tmp_path, monkeypatch):
    """The first environment could finish two episodes of 3 steps while the third is in its only one of 9."""
    forward = spy_by_name(monkeypatch, reinforce.Agent, "forward")
    steps = sum(by_hand.LENGTHS)
    train(reinforce, tmp_path / "run", "by_hand:Known-v0", num_envs=3, num_steps=100, total_timesteps=steps)
    learnt = forward[-1].obs
    assert len(learnt) == steps == 3 + 4 + 9
    shown = learnt[:, 1].tolist()
    assert [shown.count(n - 1) for n in range(3)] == [3, 4, 9]
    assert not learnt[:, 2].any()  # the number of the episode


def test_the_update_sees_the_statistics_that_the_actions_were_drawn_by(tmp_path, monkeypatch):
    forward = spy_by_name(monkeypatch, reinforce.Agent, "forward")
    torch.manual_seed(1)
    start = reinforce.Agent(Box(-1, 1, (2,)), Discrete(2), True)  # whose normaliser has seen nothing
    run_dir = train(reinforce, tmp_path / "run", "probe_envs:Staggered-v0", total_timesteps=20, normalize=True)
    call = forward[-1]
    probs = start.actor(call.obs / (1 + 1e-8) ** 0.5).softmax(-1)
    chosen = probs[torch.arange(20), call.actions.long()]
    assert_close(call.result[0], chosen.log())
    assert weights(run_dir)["obs_norm.count"] == 20


def test_one_step_episodes_of_equal_return_train_without_nan(tmp_path):
    run_dir = train(reinforce, tmp_path / "run", "probe_envs:OneStep-v0", num_envs=1, total_timesteps=50)
    for parameter in weights(run_dir).values():
        assert parameter.isfinite().all()
    (_, loss), *_ = scalars(run_dir, "losses/policy_loss")
    assert loss == 0  # one return, normalised to 0


@pytest.mark.parametrize("num_steps, total_timesteps, cut", [(50, 400, 50), (10_000, 120, 30)])
def test_endless_episodes_are_cut_and_said_to_be(num_steps, total_timesteps, cut, tmp_path, capsys):
    flags = {"num_steps": num_steps, "total_timesteps": total_timesteps}
    run_dir = train(reinforce, tmp_path / "run", "probe_envs:Endless-v0", **flags)
    assert f"4 of 4 training episodes were cut after {cut} steps" in capsys.readouterr().out
    last, _ = scalars(run_dir, "charts/SPS")[-1]
    assert last == total_timesteps


def test_each_update_plays_episodes_from_new_starts(tmp_path, monkeypatch):
    forward = spy_by_name(monkeypatch, reinforce.Agent, "forward")
    train(reinforce, tmp_path / "run", "probe_envs:Scaled-v0", num_steps=20, total_timesteps=240)
    starts = {tuple(call.obs[0].tolist()) for call in forward if len(call.obs) > 1}
    assert len(starts) == 3  # of 20 steps in 4 environments each
