"""Q-learning: tables against numbers by hand, value iteration against a linear solve, Q against Q*."""

import copy
import json
import os
import shutil
import signal
import time
import typing
from collections import Counter, defaultdict
from pathlib import Path

import gymnasium as gym
import numpy as np
import probe_envs  # noqa: F401  (registers the environments)
import pytest
import q_learning
import torch
from forks import fork
from gymnasium.spaces import Discrete
from gymnasium.wrappers import TransformReward
from helpers import ALGOS, run, scalars, spy_on, weights
from torch import tensor


class Tabular(gym.Env):
    """Does what its transition table P says, from state 0 on; publishes P unless told not to."""

    def __init__(self, P, publish=True):
        self.transitions = P
        if publish:
            self.P = P
        self.observation_space = Discrete(len(P))
        self.action_space = Discrete(len(P[0]))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.first_state()
        return self.state, {}

    def step(self, action):
        outcomes = self.transitions[self.state][action]
        chosen = self.np_random.choice(len(outcomes), p=[outcome[0] for outcome in outcomes])
        _, self.state, reward, terminated = outcomes[chosen]
        return self.state, self.reward(reward), terminated, False, {}

    def first_state(self):
        return 0

    def reward(self, reward):
        return reward


class Noisy(Tabular):
    """Adds noise to the rewards and notes them, in the order in which the environments step."""

    seen: typing.ClassVar[list[float]] = []

    def reward(self, reward):
        self.seen.append(reward + self.np_random.normal())
        return self.seen[-1]


class Talks(Tabular):
    """Has infos whose values differ in type."""

    def step(self, action):
        *rest, _ = super().step(action)
        return *rest, {"winner": self.np_random.choice([None, 1, "a"])}


class Fork(Tabular):
    """Starts in state 0 or 1, which it notes; says how often if `starts` are given."""

    seen: typing.ClassVar[list[int]] = []

    def __init__(self, starts=None):
        super().__init__(FORK)
        if starts is not None:
            self.initial_state_distrib = starts

    def first_state(self):
        self.seen.append(int(self.np_random.choice(4, p=FORK_STARTS)))
        return self.seen[-1]


class Lasts(gym.Env):
    """Episodes of 1 to 9 steps, each `worth` something; notes the seeds it was given and their episodes' lengths."""

    observation_space = action_space = Discrete(1)
    seeds: typing.ClassVar[list[int]] = []
    lengths: typing.ClassVar[list[int]] = []

    def __init__(self, worth=1.0, truncate=False):
        self.worth = worth
        self.truncate = truncate

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, 10))
        if seed is not None:
            self.seeds.append(seed)
            self.lengths.append(self.left)
        return 0, {}

    def step(self, action):
        self.left -= 1
        over = self.left == 0
        return 0, self.worth, over and not self.truncate, over and self.truncate, {}


class Counts(gym.Env):
    """Episodes of one step; the n-th is worth n."""

    observation_space = action_space = Discrete(1)
    number = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.number += 1
        return 0, {}

    def step(self, action):
        return 0, float(self.number), True, False, {}


class Spaces(Tabular):
    """Has other spaces than its table."""

    def __init__(self, states, actions):
        super().__init__(CHAIN, publish=False)
        self.observation_space = states
        self.action_space = actions


class Strays(Tabular):
    """Shows state -1 after ten steps."""

    total = 0

    def step(self, action):
        self.total += 1
        state, *rest = super().step(action)
        return -1 if self.total > 10 else state, *rest


def random_mdp(num_states, num_actions, seed):
    """Three outcomes a pair, with rewards in [-1, 1]; one in ten ends the episode."""
    rng = np.random.default_rng(seed)
    P = defaultdict(dict)
    for s in range(num_states):
        for a in range(num_actions):
            P[s][a] = []
            for p in rng.dirichlet(np.ones(3)).tolist():
                next_state = int(rng.integers(num_states))
                reward = float(rng.uniform(-1, 1))
                P[s][a].append((p, next_state, reward, bool(rng.random() < 0.1)))
    return dict(P)


def claims(P):
    """The chain, with something else as its P."""
    env = Tabular(CHAIN, publish=False)
    env.P = P
    return env


def doubled_chain():
    return TransformReward(Tabular(CHAIN), lambda reward: 2 * reward)


# action 0 stays for nothing; action 1 goes 0 -> 1 for a reward of 1 and 1 -> 2, the end, for 2
CHAIN = {
    0: {0: [(1.0, 0, 0.0, False)], 1: [(1.0, 1, 1.0, False)]},
    1: {0: [(1.0, 1, 0.0, False)], 1: [(1.0, 2, 2.0, True)]},
    2: {0: [(1.0, 2, 100.0, False)], 1: [(1.0, 2, 100.0, False)]},  # never acted from
}
CHAIN_Q = [[1.0, 2.0], [1.0, 2.0]]  # at γ = 1/2: Q(1, 1) = 2, Q(1, 0) = 2/2, Q(0, 1) = 1 + 2/2, Q(0, 0) = 2/2
ENDLESS_CHAIN = copy.deepcopy(CHAIN)
ENDLESS_CHAIN[1][1] = [(1.0, 2, 2.0, False)]  # its only end
FOUR_REWARDS = {0: {a: [(1.0, 0, 1.0 + a, False)] for a in range(4)}}
gym.register("QEndless-v0", entry_point=lambda: claims(ENDLESS_CHAIN))
gym.register("QFourRewards-v0", entry_point=lambda: Tabular(FOUR_REWARDS))

# state 2 is reached from both starts, state 3 from none
FORK = {
    0: {0: [(1.0, 3, 1.0, True)], 1: [(1.0, 2, 0.0, False)]},
    1: {0: [(1.0, 3, 8.0, True)], 1: [(0.5, 2, 2.0, False), (0.5, 3, 4.0, True)]},
    2: {0: [(1.0, 3, 6.0, True)], 1: [(1.0, 3, 10.0, True)]},
    3: {0: [(1.0, 3, 100.0, False)], 1: [(1.0, 3, 100.0, False)]},
}
FORK_STARTS = np.array([0.25, 0.75, 0.0, 0.0])
# at γ = 1/2: Q(0, 1) = 10/2, Q(1, 1) = (2 + 10/2)/2 + 4/2, Q(3, ·) = 100/(1 - 1/2); V*(s₀) = 5/4 + 8·3/4 = 7.25
FORK_Q = [[1.0, 5.0], [8.0, 5.5], [6.0, 10.0], [200.0, 200.0]]

ONE_PAIR = {0: {0: [(1.0, 0, 1.0, False)]}}
FOUR_ARMS = {0: {a: [(1.0, 0, float(a == 0), False)] for a in range(4)}}
FICKLE = {"fickle_passenger": True}


def register(name, entry_point, max_episode_steps=None, **kwargs):
    gym.register(f"Q{name}-v0", entry_point=entry_point, max_episode_steps=max_episode_steps, kwargs=kwargs)


register("Chain", Tabular, max_episode_steps=20, P=CHAIN)
register("Random", Tabular, max_episode_steps=50, P=random_mdp(5, 3, seed=1))
register("OnePair", Tabular, max_episode_steps=10, P=ONE_PAIR)
register("Twos", Tabular, max_episode_steps=10, P={0: {0: [(1.0, 0, 2.0, False)]}})
register("Noisy", Noisy, P=ONE_PAIR, publish=False)
register("FourArms", Tabular, P=FOUR_ARMS)
register("Talks", Talks, max_episode_steps=10, P=FOUR_ARMS)
INFINITE = [(1.0, 0, np.inf, False)]
register("Infinite", Tabular, P={0: {0: INFINITE, 1: INFINITE}})
register("Fork", Fork, starts=FORK_STARTS)
register("ForkListed", Fork, starts=FORK_STARTS.tolist())
register("ForkUntold", Fork)
register("Lasts", Lasts)
register("Counts", Counts)
register("Strays", Strays, P=CHAIN, publish=False)
register("StatesFromOne", Spaces, states=Discrete(2, start=1), actions=Discrete(2))
register("ActionsFromOne", Spaces, states=Discrete(2), actions=Discrete(2, start=1))
register("Matrix", claims, P=np.eye(3))
register("None", claims, P=None)
MISFITS = {  # what an environment may call P besides a table of its states and actions
    "empty": {},
    "probabilities": {"up": 0.8, "down": 0.2},
    "pairs": {(s, a): CHAIN[s][a] for s in CHAIN for a in CHAIN[s]},
    "lists": {s: list(CHAIN[s].values()) for s in CHAIN},
    "triples": {s: {a: [outcome[:3] for outcome in CHAIN[s][a]] for a in CHAIN[s]} for s in CHAIN},
    "next states": {s: {a: {outcome[1]: outcome[0] for outcome in CHAIN[s][a]} for a in CHAIN[s]} for s in CHAIN},
    "one state less": {s: CHAIN[s] for s in (0, 1)},
    "one state more": CHAIN | {3: CHAIN[2]},
    "one action less": {s: {0: CHAIN[s][0]} for s in CHAIN},
}
for name, P in MISFITS.items():
    register(name.title().replace(" ", ""), claims, P=P, max_episode_steps=20)
register("Double", doubled_chain)
register("Fickle", "gymnasium.envs.toy_text.taxi:TaxiEnv", max_episode_steps=200, **FICKLE)


def train(run_dir, env_id, num_envs=4, total_timesteps=2000, gamma=0.5, epsilon_end=0.5, eval_episodes=0, **flags):
    """Run main() in this process; returns the run directory."""
    flags.update(num_envs=num_envs, total_timesteps=total_timesteps, gamma=gamma)
    flags.update(epsilon_end=epsilon_end, eval_episodes=eval_episodes)
    q_learning.main(q_learning.Args(env_id=env_id, run_dir=str(run_dir), **flags))
    return run_dir


def invoke(*flags):
    """Run the script in this process as `q_learning.py flags`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["q_learning.py", *map(str, flags)])
        q_learning.main(*q_learning.parse_args())


def load(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def args_of(run_dir):
    return json.loads((run_dir / "args.json").read_text())


def last(run_dir, tag):
    """The last value under a tag."""
    return scalars(run_dir, tag)[-1][1]


# --- algorithm ---


def test_the_target_is_the_reward_at_the_end_and_else_adds_the_discounted_largest_next_q():
    next_q = tensor([[1.0, 3.0], [5.0, 4.0], [7.0, 9.0]])
    target = q_learning.td_target(tensor([1.0, 2.0, 3.0]), next_q, tensor([0.0, 0.0, 1.0]), 0.5)
    torch.testing.assert_close(target, tensor([1 + 0.5 * 3, 2 + 0.5 * 5, 3.0]))


def test_epsilon_is_right_at_the_start_in_the_middle_at_the_end_and_after_it():
    epsilons = [q_learning.epsilon_at(step, 0.1, 100) for step in (0, 50, 100, 1000)]
    assert epsilons == pytest.approx([1.0, 0.55, 0.1, 0.1])
    assert q_learning.epsilon_at(0, 0.1, 0) == 1.0
    assert q_learning.epsilon_at(1, 0.1, 0) == pytest.approx(0.1)


@pytest.mark.parametrize("num_envs", [1, 4])
def test_epsilon_falls_in_a_run_over_its_share_of_the_steps(num_envs, tmp_path, monkeypatch):
    acts = spy_on(monkeypatch, q_learning.QTable, "act")
    monkeypatch.setattr(q_learning, "LOG_EVERY", 40)
    flags = {"num_envs": num_envs, "total_timesteps": 200, "epsilon_end": 0.2, "exploration_fraction": 0.4}
    run_dir = train(tmp_path / "run", "QFourArms-v0", **flags)
    for steps, epsilon in ((0, 1.0), (20, 0.8), (40, 0.6), (60, 0.4), (80, 0.2), (196, 0.2)):
        assert acts[steps // num_envs].epsilon == pytest.approx(epsilon)
    logged = dict(scalars(run_dir, "charts/epsilon"))
    assert logged[num_envs] == 1.0
    assert logged[40] == pytest.approx(0.6 + 0.01 * num_envs)  # that of the last actions before it
    assert logged[200] == pytest.approx(0.2)


def test_actions_are_random_with_probability_epsilon_and_greedy_otherwise(tmp_path):
    def visits(epsilon):
        run_dir = train(tmp_path / f"{epsilon}", "QFourArms-v0", epsilon_end=epsilon, exploration_fraction=0.0)
        return weights(run_dir)["visits"][0]

    greedy = visits(0.0)
    assert greedy.sum() == 2000
    assert greedy[0] >= 2000 - 4  # the first step of each is random: ε starts at 1
    assert (visits(1.0) - 500).abs().max() < 80  # four standard deviations
    mixed = visits(0.4)
    assert abs(mixed[0] - 1400) < 90
    assert (mixed[1:] - 200).abs().max() < 60


@pytest.mark.parametrize("alpha_decay", [0.0, 0.6])
def test_environments_that_visit_a_pair_at_once_update_it_one_after_another(tmp_path, alpha_decay):
    Noisy.seen.clear()
    run_dir = train(tmp_path / "run", "QNoisy-v0", gamma=0.0, total_timesteps=200, alpha_decay=alpha_decay)
    expected = 0.0
    for n, reward in enumerate(Noisy.seen, 1):
        expected += (reward - expected) / n**alpha_decay
    table = weights(run_dir)
    assert len(Noisy.seen) == table["visits"].item() == 200
    assert table["q"].item() == pytest.approx(expected, abs=1e-12)


def test_environments_that_share_one_array_are_learnt_alike(tmp_path):
    kwargs = json.dumps({"is_slippery": False, "vector_kwargs": {"copy": False}})
    run_dir = train(tmp_path / "run", "FrozenLake-v1", env_kwargs=kwargs, alpha_decay=0.0, total_timesteps=20_000)
    assert last(run_dir, "charts/regret") == pytest.approx(0, abs=1e-9)
    assert weights(run_dir)["q"][14, 2] == 1  # right into the goal


def test_another_way_to_reset_is_refused(tmp_path):
    kwargs = json.dumps({"vector_kwargs": {"autoreset_mode": "SameStep"}})
    with pytest.raises(SystemExit, match=r"^QChain-v0: its environments must reset by AutoresetMode\.NEXT_STEP$"):
        train(tmp_path / "run", "QChain-v0", env_kwargs=kwargs)


def test_infos_may_hold_anything(tmp_path):
    train(tmp_path / "run", "QTalks-v0", total_timesteps=200, eval_episodes=4)


def test_another_environment_than_that_of_the_run_is_refused_on_resume(tmp_path):
    train(tmp_path / "run", "QChain-v0", total_timesteps=100)
    with pytest.raises(SystemExit, match="^--resume: QFork-v0 has other spaces than the environment of the run$"):
        invoke("--resume", tmp_path / "run", "--env-id", "QFork-v0", "--total-timesteps", 200)


def test_the_chain_is_learnt_to_the_numbers_by_hand(tmp_path):
    run_dir = train(tmp_path / "run", "QChain-v0", alpha_decay=0.0)
    torch.testing.assert_close(weights(run_dir)["q"][:2], tensor(CHAIN_Q, dtype=torch.float64))
    assert last(run_dir, "charts/visited") == 4


def test_reset_rows_and_final_states_are_neither_learnt_nor_counted(tmp_path):
    run_dir = train(tmp_path / "run", "QChain-v0", epsilon_end=1.0)
    table = weights(run_dir)
    assert table["visits"][2].tolist() == [0, 0]
    assert table["q"][2].tolist() == [0, 0]
    assert table["visits"].sum() == load(run_dir)["step"]


def test_constant_reward_under_truncation_is_worth_1_over_1_minus_gamma(tmp_path):
    run_dir = train(tmp_path / "run", "QOnePair-v0", gamma=0.9, alpha_decay=0.0)
    assert weights(run_dir)["q"].item() == pytest.approx(10, rel=1e-6)


def test_q_comes_close_to_the_optimum_of_a_random_mdp(tmp_path):
    run_dir = train(tmp_path / "run", "QRandom-v0", gamma=0.8, total_timesteps=50_000, num_envs=8)
    q = weights(run_dir)["q"]
    optimum = optimal_q(random_mdp(5, 3, seed=1), 0.8)
    assert (q.argmax(-1) == optimum.argmax(-1)).all()
    assert (q - optimum).abs().max() < 0.1 * optimum.abs().max()


# --- the optimum ---


def matrices(P):
    """Mean rewards (S, A) and probabilities of going on (S, A, S)."""
    S = len(P)
    A = len(P[0])
    rewards = np.zeros((S, A))
    moves = np.zeros((S, A, S))
    for s, actions in P.items():
        for a, outcomes in actions.items():
            for p, next_state, reward, terminated in outcomes:
                rewards[s, a] += p * reward
                if not terminated:
                    moves[s, a, next_state] += p
    return rewards, moves


def values_of_policy(P, policy, gamma):
    """V (S,) of a policy by numpy's solve of Bellman's equation V = r + γ·P·V."""
    rewards, moves = matrices(P)
    states = np.arange(len(P))
    equations = np.eye(len(P)) - gamma * moves[states, policy]
    return np.linalg.solve(equations, rewards[states, policy])


def q_of_policy(P, policy, gamma):
    """Q (S, A) of a policy."""
    rewards, moves = matrices(P)
    return torch.from_numpy(rewards + gamma * moves @ values_of_policy(P, policy, gamma))


def optimal_q(P, gamma):
    """Q* (S, A) by policy iteration."""
    policy = np.zeros(len(P), int)
    for _ in range(20):
        policy = q_of_policy(P, policy, gamma).argmax(-1).numpy()
    return q_of_policy(P, policy, gamma)


def test_outcomes_of_one_next_state_add_up_and_those_that_end_lead_nowhere():
    outcomes = [(0.25, 1, 2.0, False), (0.125, 1, 8.0, False), (0.5, 1, 4.0, True), (0.125, 0, 16.0, False)]
    stays = [(1.0, 1, -3.0, False)]
    next_probs, rewards = q_learning.read_model({0: {0: outcomes, 1: stays}, 1: {0: stays, 1: stays}})
    assert next_probs.tolist() == [[[0.125, 0.375], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]]
    assert rewards.tolist() == [[0.5 + 1.0 + 2.0 + 2.0, -3.0], [-3.0, -3.0]]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99])
def test_value_iteration_is_bellmans_linear_equation_of_its_own_policy_and_no_policy_is_better(gamma):
    P = random_mdp(6, 3, seed=0)
    optimum = q_learning.value_iteration(*q_learning.read_model(P), gamma)
    own = q_of_policy(P, optimum.argmax(-1).numpy(), gamma)
    torch.testing.assert_close(optimum, own, rtol=0, atol=1e-9)
    rng = np.random.default_rng(0)
    for _ in range(50):
        other = q_of_policy(P, rng.integers(3, size=6), gamma)
        assert (other <= optimum + 1e-9).all()


@pytest.mark.parametrize("P, q", [(CHAIN, CHAIN_Q), (FORK, FORK_Q)])
def test_value_iteration_finds_the_numbers_by_hand(P, q):
    optimum = q_learning.value_iteration(*q_learning.read_model(P), 0.5)
    torch.testing.assert_close(optimum[: len(q)], tensor(q, dtype=torch.float64), rtol=0, atol=1e-9)


def test_value_iteration_ends_where_rounding_keeps_large_values_in_motion():
    """Rewards of r and -r in turn, of which the values at even and odd repetitions come from opposite sides."""
    r = 1e6 / 3
    P = {0: {0: [(1.0, 1, r, False)]}, 1: {0: [(1.0, 0, -r, False)]}}
    optimum = q_learning.value_iteration(*q_learning.read_model(P), 0.99)
    torch.testing.assert_close(optimum, tensor([[r / 1.99], [-r / 1.99]], dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99])
def test_the_values_of_a_policy_are_those_of_numpys_linear_solve(gamma):
    P = random_mdp(6, 3, seed=2)
    model = q_learning.read_model(P)
    rng = np.random.default_rng(0)
    for _ in range(10):
        policy = rng.integers(3, size=6)
        values = q_learning.policy_values(*model, torch.from_numpy(policy), gamma)
        np.testing.assert_allclose(values, values_of_policy(P, policy, gamma), rtol=0, atol=1e-9)


def test_a_state_is_reached_where_some_policy_acts_in_it():
    next_probs = q_learning.read_model(FORK)[0]
    from_one_start = q_learning.reachable(next_probs, tensor([0.0, 1.0, 0.0, 0.0]))
    assert from_one_start.tolist() == [False, True, True, False]  # nothing is done in 3, the end
    from_all_starts = q_learning.reachable(next_probs, torch.from_numpy(FORK_STARTS))
    assert from_all_starts.tolist() == [True, True, True, False]


def test_states_are_reached_over_any_number_of_steps_but_not_by_outcomes_of_probability_0():
    P = {}
    for state in range(7):
        goes_on = (1.0, state + 1, 0.0, False)
        never_happens = (0.0, 9, 0.0, False)
        P[state] = {0: [goes_on, never_happens]}
    for state in (7, 8, 9):
        P[state] = {0: [(1.0, state, 0.0, False)]}
    reached = q_learning.reachable(q_learning.read_model(P)[0], torch.eye(10)[1])
    assert reached.tolist() == [False] + [True] * 7 + [False] * 2


@pytest.mark.parametrize(
    ("env_id", "kwargs"),
    [
        ("FrozenLake-v1", {}),
        ("FrozenLake-v1", {"is_slippery": False}),
        ("CliffWalking-v1", {}),
        ("CliffWalking-v1", {"is_slippery": True}),
        ("Taxi-v4", {}),
        ("Taxi-v4", {"is_rainy": True}),
    ],
)
def test_the_published_transitions_are_what_the_environment_does(env_id, kwargs):
    env = gym.make(env_id, **kwargs).unwrapped
    env.action_space.seed(0)
    seen = defaultdict(Counter)  # outcomes of each pair
    state, _ = env.reset(seed=0)
    for _ in range(20_000):
        action = env.action_space.sample()
        next_state, reward, terminated, _, _ = env.step(action)
        seen[state, action][next_state, reward, terminated] += 1
        state = env.reset()[0] if terminated else next_state
    found = Counter()  # by probability
    expected = Counter()
    variance = Counter()
    for (s, a), counts in seen.items():
        probs = Counter()
        for p, *outcome in env.P[s][a]:
            probs[tuple(outcome)] += p
        assert counts.keys() <= probs.keys()
        for outcome, p in probs.items():
            found[round(p, 2)] += counts[outcome]
            expected[round(p, 2)] += counts.total() * p
            variance[round(p, 2)] += counts.total() * p * (1 - p)
    for p in found:
        assert abs(found[p] - expected[p]) <= 4 * variance[p] ** 0.5 + 1e-6, p


# --- what is logged of it ---


def log_of_table(run_dir, env_id, q, **flags):
    """One step from a table by hand, which later visits of its pairs change by 1e-18 of the error."""
    args = q_learning.Args(env_id=env_id, run_dir=str(run_dir), total_timesteps=1, gamma=0.5, alpha_decay=2.0, **flags)
    table = {"q": tensor(q, dtype=torch.float64), "visits": torch.full((4, 2), 1e9, dtype=torch.float64)}
    q_learning.main(args, {"args": vars(args), "step": 0, "agent": table, "rng": torch.get_rng_state()})
    return run_dir


# mean |Q - Q*| over the six pairs of states 0, 1 and 2; V^π of the greedy policy from 0 and 1
@pytest.mark.parametrize(
    "q, q_error, regret",
    [
        (FORK_Q, 0.0, 0.0),
        ([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], (1 + 5 + 8 + 5.5 + 6 + 10) / 6, 7.25 - (1 / 4 + 8 * 3 / 4)),
        ([[1.0, 5.0], [8.0, 5.5], [6.0, 10.0], [0.0, -7.0]], 0.0, 0.0),  # state 3 does not count
        ([[2.0, 5.0], [8.0, 9.5], [6.0, 8.0], [0.0, 0.0]], (1 + 4 + 2) / 6, 7.25 - (5 / 4 + 5.5 * 3 / 4)),
        ([[9.0, 0.0], [0.0, 9.0], [9.0, 0.0], [0.0, 0.0]], (8 + 5 + 8 + 3.5 + 3 + 10) / 6, 7.25 - (1 + 4.5 * 3) / 4),
    ],
)
def test_q_error_and_regret_are_the_numbers_by_hand(q, q_error, regret, tmp_path):
    run_dir = log_of_table(tmp_path / "run", "QFork-v0", q)
    assert last(run_dir, "charts/q_error") == pytest.approx(q_error, abs=1e-6)
    assert last(run_dir, "charts/regret") == pytest.approx(regret, abs=1e-6)


def test_the_start_states_are_those_seen_where_an_environment_does_not_say_them(tmp_path):
    Fork.seen.clear()
    run_dir = log_of_table(tmp_path / "run", "QForkUntold-v0", [[0.0, 0.0], [0.0, 9.0], [0.0, 0.0], [0.0, 0.0]])
    first = Fork.seen[:16]
    assert {0, 1} == set(first)
    share = sum(first) / 16  # of state 1
    loss = (1 - share) * (5 - 1) + share * (
        8 - 4.5
    )  # V* less V^π, which ends in 0 and then in 2 after (2 + 6/2)/2 + 4/2
    assert last(run_dir, "charts/regret") == pytest.approx(loss, abs=1e-6)


def test_the_probabilities_of_start_states_may_be_a_list(tmp_path):
    run_dir = log_of_table(tmp_path / "run", "QForkListed-v0", [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert last(run_dir, "charts/regret") == pytest.approx(1.0, abs=1e-6)


def test_a_pair_that_was_never_visited_counts_with_its_0(tmp_path):
    run_dir = train(tmp_path / "run", "QChain-v0", num_envs=1, total_timesteps=1)
    q = weights(run_dir)["q"]
    assert q[1].tolist() == [0, 0]
    error = (1 + (2 - q[0, 1]) + 1 + 2) / 4  # of Q* = 1, 2, 1 and 2; the first step left Q(0, 0) at 0
    assert last(run_dir, "charts/q_error") == pytest.approx(error.item())


def test_q_error_and_regret_fall_to_0(tmp_path):
    run_dir = train(tmp_path / "run", "QChain-v0", alpha_decay=0.0)
    errors = scalars(run_dir, "charts/q_error")
    regrets = scalars(run_dir, "charts/regret")
    steps = [step for step, _ in scalars(run_dir, "charts/SPS")]
    assert [step for step, _ in errors] == steps
    assert [step for step, _ in regrets] == steps
    assert errors[0][1] > 1
    assert regrets[0][1] >= 1  # of 2: nobody knows yet what state 1 is good for
    assert errors[-1][1] == pytest.approx(0, abs=1e-6)
    assert regrets[-1][1] == pytest.approx(0, abs=1e-12)


def test_where_no_transitions_are_published_only_returns_are_logged(tmp_path):
    run_dir = train(tmp_path / "run", "QNoisy-v0", total_timesteps=100)
    assert scalars(run_dir, "charts/q_error") == []
    assert scalars(run_dir, "charts/regret") == []
    assert last(run_dir, "charts/visited") == 1


MISFIT_IDS = [f"Q{name.title().replace(' ', '')}-v0" for name in MISFITS]


@pytest.mark.parametrize("env_id", ["QMatrix-v0", "QNone-v0", *MISFIT_IDS])
def test_a_p_that_is_no_table_is_ignored(env_id, tmp_path):
    run_dir = train(tmp_path / "run", env_id, alpha_decay=0.0, eval_episodes=1)
    torch.testing.assert_close(weights(run_dir)["q"][:2], tensor(CHAIN_Q, dtype=torch.float64))
    assert scalars(run_dir, "charts/q_error") == []


@pytest.mark.parametrize(
    "env_id, kwargs, otherwise",
    [
        ("QDouble-v0", {}, True),
        ("QFickle-v0", {}, True),
        ("Taxi-v4", FICKLE, True),
        ("Taxi-v4", {"is_rainy": True}, False),
        ("CliffWalking-v1", {"is_slippery": True}, False),
    ],
)
def test_the_optimum_is_dropped_as_soon_as_the_environment_does_otherwise_than_its_p(
    env_id, kwargs, otherwise, tmp_path, capfd
):
    run_dir = train(tmp_path / "run", env_id, env_kwargs=json.dumps(kwargs), eval_episodes=1, total_timesteps=6000)
    said = f"{env_id} made a transition that is not in its P: the optimum is not known"
    assert capfd.readouterr().out.count(said) == otherwise
    step, _ = scalars(run_dir, "eval/return_mean")[-1]
    for tag in ("charts/q_error", "charts/regret"):
        assert (step in dict(scalars(run_dir, tag))) != otherwise


def test_the_optimum_is_dropped_where_an_episode_ends_that_goes_on_by_p(tmp_path, capfd):
    train(tmp_path / "run", "QEndless-v0", total_timesteps=400)
    assert "QEndless-v0 made a transition that is not in its P" in capfd.readouterr().out


def test_the_step_size_counts_the_visits_of_the_pair_and_not_of_its_state(tmp_path):
    run_dir = train(tmp_path / "run", "QFourRewards-v0", gamma=0.0, alpha_decay=1.0, total_timesteps=200)
    assert weights(run_dir)["q"][0].tolist() == pytest.approx([1, 2, 3, 4])


def test_lengths_are_means_since_the_last_log(tmp_path, monkeypatch):
    """Each step is worth 1, so that length and return are equal."""
    monkeypatch.setattr(q_learning, "LOG_EVERY", 20)
    run_dir = train(tmp_path / "run", "QLasts-v0", total_timesteps=400)
    returns = scalars(run_dir, "charts/episodic_return")
    assert scalars(run_dir, "charts/episodic_length") == returns
    assert len(set(returns)) > 10


def test_what_an_environment_does_is_learnt_rather_than_what_its_p_says(tmp_path):
    run_dir = train(tmp_path / "run", "QDouble-v0", total_timesteps=6000)
    q = weights(run_dir)["q"][0].tolist()
    assert q[1] == pytest.approx(2 * CHAIN_Q[0][1], rel=1e-3)


def test_returns_and_lengths_are_logged_under_their_names(tmp_path):
    run_dir = train(tmp_path / "run", "QTwos-v0")
    assert last(run_dir, "charts/episodic_return") == 20
    assert last(run_dir, "charts/episodic_length") == 10


def test_returns_are_means_since_the_last_log(tmp_path, monkeypatch):
    monkeypatch.setattr(q_learning, "LOG_EVERY", 3)
    run_dir = train(tmp_path / "run", "QCounts-v0", num_envs=1, total_timesteps=8)
    returns = scalars(run_dir, "charts/episodic_return")
    assert returns == [(1, 1.0), (3, 2.5), (6, 5.0), (8, 7.5)]  # of 1, of 2 and 3, of 4, 5 and 6, of 7 and 8


def test_all_of_the_many_episodes_since_the_last_log_are_in_the_mean(tmp_path):
    run_dir = train(tmp_path / "run", "QCounts-v0", num_envs=1, total_timesteps=900)
    assert scalars(run_dir, "charts/episodic_return")[-1] == (900, pytest.approx((2 + 900) / 2))


# --- evaluation ---


def test_the_greedy_policy_is_evaluated(tmp_path, capfd):
    run_dir = train(tmp_path / "chain", "QChain-v0", eval_episodes=3)
    assert last(run_dir, "eval/return_mean") == 3
    assert last(run_dir, "eval/return_std") == 0
    assert "evaluation: return 3.00 ± 0.00 over 3 greedy episodes" in capfd.readouterr().out


@pytest.mark.parametrize("truncate", [False, True])
def test_greedy_returns_are_those_of_the_first_episodes_which_differ_between_seeds(
    truncate, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(q_learning, "MAX_EVAL_STEPS", 1000)
    Lasts.seeds.clear()
    for seed in (-3, 1, 2):
        Lasts.lengths.clear()
        kwargs = json.dumps({"worth": 3.0, "truncate": truncate})
        flags = {"seed": seed, "total_timesteps": 100, "eval_episodes": 20, "env_kwargs": kwargs}
        run_dir = train(tmp_path / f"{seed}", "QLasts-v0", **flags)
        returns = 3 * np.array(Lasts.lengths[4:])  # after those of training
        assert len(returns) == 20
        assert last(run_dir, "eval/return_mean") == pytest.approx(returns.mean())
        assert last(run_dir, "eval/return_std") == pytest.approx(returns.std())
        said = f"return {returns.mean():.2f} ± {returns.std():.2f} over 20 greedy episodes"
        assert said in capfd.readouterr().out
    assert len(Lasts.seeds) == len(set(Lasts.seeds)) == 3 * (4 + 20)


def test_evaluation_of_an_endless_episode_ends_and_says_so(tmp_path, monkeypatch, capfd):
    assert q_learning.MAX_EVAL_STEPS == 27_000
    monkeypatch.setattr(q_learning, "MAX_EVAL_STEPS", 50)
    run_dir = train(tmp_path / "run", "QFourArms-v0", eval_episodes=2)
    assert last(run_dir, "eval/return_mean") == 50
    assert "evaluation: 2 of 2 episodes were cut after 50 steps" in capfd.readouterr().out


def test_training_environments_are_closed_before_evaluation(tmp_path, monkeypatch):
    closed = spy_on(monkeypatch, gym.vector.SyncVectorEnv, "close")
    train(tmp_path / "run", "QChain-v0", total_timesteps=10, eval_episodes=2)
    assert closed[0].self.num_envs == 4


def test_ctrl_c_in_the_evaluation_ends_it_without_a_result(tmp_path):
    run_dir = tmp_path / "run"
    done = run("q_learning", "--env-id", "probe_envs:Interrupted-v0", "--total-timesteps", 100, "--run-dir", run_dir)
    assert done.returncode == -signal.SIGINT
    assert scalars(run_dir, "eval/return_mean") == []
    assert scalars(run_dir, "charts/SPS") != []
    assert weights(run_dir)["visits"].sum() >= 100


# --- the run ---


def test_a_table_is_that_of_its_seed_however_often_it_is_saved(tmp_path):
    often = weights(train(tmp_path / "often", "QRandom-v0", save_every=7))
    never = weights(train(tmp_path / "never", "QRandom-v0", save_every=0))
    other = weights(train(tmp_path / "other", "QRandom-v0", save_every=0, seed=2))
    for name in ("q", "visits"):
        assert torch.equal(often[name], never[name])
        assert not torch.equal(other[name], never[name])


def test_a_resumed_table_goes_on_as_if_it_had_never_stopped(tmp_path):
    Noisy.seen.clear()
    run_dir = train(tmp_path / "run", "QNoisy-v0", gamma=0.0, total_timesteps=100, alpha_decay=1.0)
    invoke("--resume", run_dir, "--total-timesteps", 140)
    table = weights(run_dir)
    assert table["visits"].item() == len(Noisy.seen) == 140
    assert table["q"].item() == pytest.approx(np.mean(Noisy.seen), abs=1e-12)  # at α = 1/n


def test_a_resumed_run_goes_on_with_its_random_numbers(tmp_path):
    run_dir = train(tmp_path / "run", "QLasts-v0", total_timesteps=100)
    torch.set_rng_state(load(run_dir)["rng"])
    expected = int(torch.randint(2**30, ()))
    first_seed = Lasts.seeds[-4]
    invoke("--resume", run_dir, "--total-timesteps", 110)
    assert Lasts.seeds[-4:] == [expected, expected + 1, expected + 2, expected + 3]
    assert Lasts.seeds[-4] != first_seed


def test_a_resumed_run_with_another_seed_has_that_seeds_random_numbers(tmp_path):
    run_dir = train(tmp_path / "run", "QLasts-v0", total_timesteps=100)
    torch.manual_seed(7)
    expected = int(torch.randint(2**30, ()))
    invoke("--resume", run_dir, "--total-timesteps", 110, "--seed", 7)
    assert Lasts.seeds[-4] == expected


def test_two_resumptions_of_a_run_are_equal(tmp_path):
    first = train(tmp_path / "first", "QRandom-v0")
    tables = []
    for again in (tmp_path / "a", tmp_path / "b"):
        shutil.copytree(first, again)
        invoke("--resume", again, "--total-timesteps", 3000)
        tables.append(weights(again))
    for name in ("q", "visits"):
        assert torch.equal(tables[0][name], tables[1][name])
    assert 3000 <= tables[0]["visits"].sum() < 3004


def test_flags_given_on_resume_are_recorded_and_work_and_the_others_stay(tmp_path):
    run_dir = train(tmp_path / "run", "QOnePair-v0", total_timesteps=100, alpha_decay=0.0, exploration_fraction=0.25)
    invoke("--resume", run_dir, "--total-timesteps", 2000, "--gamma", 0.9)
    args = args_of(run_dir)
    assert args == load(run_dir)["args"]
    assert (args["gamma"], args["total_timesteps"]) == (0.9, 2000)
    assert (args["alpha_decay"], args["exploration_fraction"], args["num_envs"]) == (0.0, 0.25, 4)
    assert args["env_id"] == "QOnePair-v0"
    assert weights(run_dir)["q"].item() == pytest.approx(10, rel=1e-6)  # 1/(1 - γ); it was 2


def test_what_was_logged_after_the_checkpoint_is_purged_on_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(q_learning, "LOG_EVERY", 100)
    run_dir = train(tmp_path / "run", "QFourArms-v0", total_timesteps=400)
    checkpoint = (run_dir / "checkpoint.pt").read_bytes()
    invoke("--resume", run_dir, "--total-timesteps", 900)
    (run_dir / "checkpoint.pt").write_bytes(checkpoint)  # as if the run had been killed before it saved again
    invoke("--resume", run_dir, "--total-timesteps", 600, "--seed", 2)
    steps = [step for step, _ in scalars(run_dir, "charts/SPS")]
    assert steps == [4, 100, 200, 300, 400, 500, 600]


def test_a_lengthened_run_says_that_it_explores_again_and_does_so(tmp_path, capsys, monkeypatch):
    run_dir = train(tmp_path / "run", "QFourArms-v0", total_timesteps=100, epsilon_end=0.1, exploration_fraction=0.5)
    acts = spy_on(monkeypatch, q_learning.QTable, "act")
    assert "epsilon" not in capsys.readouterr().out
    invoke("--resume", run_dir, "--total-timesteps", 400)
    said = "epsilon goes on at 0.550: --exploration-fraction is a share of --total-timesteps"
    assert capsys.readouterr().out.count(said) == 1
    assert acts[0].epsilon == pytest.approx(1 - 0.9 * 100 / 200)


def test_epsilon_after_a_resumption_is_that_of_the_new_flags(tmp_path, capsys):
    flags = {"epsilon_end": 0.1, "exploration_fraction": 2.0}
    run_dir = train(tmp_path / "run", "QFourArms-v0", total_timesteps=100, **flags)
    invoke("--resume", run_dir, "--total-timesteps", 400, "--epsilon-end", 0.2, "--exploration-fraction", 1.0)
    assert "epsilon goes on at 0.800" in capsys.readouterr().out  # 1 - 0.8 · 100/400


def test_the_old_checkpoint_stays_whole_while_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    run_dir = train(tmp_path / "run", "QChain-v0", total_timesteps=100)
    checkpoint = (run_dir / "checkpoint.pt").read_bytes()
    args = args_of(run_dir)

    def fail(path, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(SystemExit, match="run cannot be saved: .*No space left on device"):
        invoke("--resume", run_dir, "--total-timesteps", 200)
    assert (run_dir / "checkpoint.pt").read_bytes() == checkpoint
    assert args_of(run_dir) == args
    assert not (run_dir / "checkpoint.tmp").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_leaves_a_checkpoint_that_resumes(tmp_path, number):
    run_dir = tmp_path / "run"
    flags = ("--env-id", "CliffWalking-v1", "--save-every", 500, "--eval-episodes", 1, "--run-dir", run_dir)
    process = fork(tmp_path / "said", ALGOS / "q_learning.py", *flags)
    deadline = time.time() + 120
    while not (run_dir / "checkpoint.pt").exists() and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(process.pid, number)
    process.join()
    step = load(run_dir)["step"]
    if number == signal.SIGKILL:
        assert process.exitcode == -signal.SIGKILL
    else:
        assert process.exitcode == 1
        assert f"stopped at step {step}; to go on" in (tmp_path / "said").read_text()
        assert step > 0
    resumed = run("q_learning", "--resume", run_dir, "--total-timesteps", step + 1000, "--num-envs", 2)
    assert resumed.returncode == 0, resumed.stderr
    saved = load(run_dir)
    assert saved["step"] - step - 1000 in (0, 1)
    assert saved["agent"]["visits"].sum() == saved["step"]
    assert saved["args"]["num_envs"] == 2
    assert saved["args"]["env_id"] == "CliffWalking-v1"


def test_a_finished_run_is_only_evaluated_again_and_its_args_json_stays(tmp_path):
    run_dir = train(tmp_path / "run", "QChain-v0", total_timesteps=10)
    before = (run_dir / "args.json").read_text()
    invoke("--resume", run_dir, "--gamma", 0.9, "--eval-episodes", 2)
    assert (run_dir / "args.json").read_text() == before
    assert scalars(run_dir, "eval/return_mean")


# --- what is refused ---


def test_a_negative_state_is_an_error_instead_of_the_last_state(tmp_path):
    with pytest.raises(IndexError):
        train(tmp_path / "run", "QStrays-v0")
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("env_id", ["probe_envs:Probe-v0", "QStatesFromOne-v0", "QActionsFromOne-v0", "CartPole-v1"])
def test_other_spaces_than_discrete_ones_from_0_are_refused_in_one_sentence(tmp_path, env_id):
    with pytest.raises(SystemExit, match="observations and actions must be Discrete from 0, not") as refusal:
        train(tmp_path / "run", env_id)
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags",
    [
        {"gamma": 1.0},
        {"gamma": -0.1},
        {"num_envs": 0},
        {"total_timesteps": 0},
        {"alpha_decay": -1.0},
        {"exploration_fraction": -1.0},
        {"epsilon_end": 5.0},
        {"epsilon_end": -0.1},
    ],
)
def test_flags_that_cannot_work_are_refused(flags):
    (name,) = flags
    with pytest.raises(ValueError, match="must be at least|must lie between") as refusal:
        q_learning.Args(**flags)
    assert name.replace("_", "-") in str(refusal.value)


def test_a_directory_that_holds_a_run_is_refused(tmp_path):
    run_dir = train(tmp_path / "run", "QChain-v0", total_timesteps=10)
    with pytest.raises(SystemExit, match="holds a run"):
        train(run_dir, "QChain-v0")


def test_a_copy_of_a_checkpoint_does_not_overwrite_the_run_it_lies_beside(tmp_path, monkeypatch):
    run_dir = train(tmp_path / "run", "QChain-v0", total_timesteps=10)
    before = (run_dir / "checkpoint.pt").read_bytes()
    shutil.copy(run_dir / "checkpoint.pt", run_dir / "copy.pt")
    monkeypatch.chdir(run_dir)
    with pytest.raises(SystemExit, match="holds a run"):
        invoke("--resume", "copy.pt", "--run-dir", ".", "--total-timesteps", 20)
    assert (run_dir / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("num_envs", [1, 4])  # inf after one visit, nan after two of a pair
def test_a_table_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(num_envs, tmp_path):
    run_dir = tmp_path / "run"
    with pytest.raises(SystemExit, match=rf"nan or inf before step {num_envs}; {run_dir}/checkpoint.pt is older"):
        train(run_dir, "QInfinite-v0", num_envs=num_envs)
    saved = load(run_dir)
    assert saved["step"] == 0
    assert saved["agent"]["q"].tolist() == [[0, 0]]
