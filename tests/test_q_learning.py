"""Q-learning: tables against numbers by hand, value iteration against a linear solve, Q against Q*."""

import collections
import inspect
import json
import shutil
import signal
import subprocess
import time
import typing

import gymnasium as gym
import numpy as np
import ppo
import probe_envs  # noqa: F401  (registers the environments)
import pytest
import q_learning
import torch
from gymnasium.spaces import Discrete
from gymnasium.wrappers import TransformReward
from helpers import ALGOS, command, run, scalars, weights
from torch import tensor

GAMMA = 0.5


class Tabular(gym.Env):
    """Does what its transition table P says, from state 0 on; publishes P unless told not to."""

    def __init__(self, P, publish=True):
        self.transitions = P
        if publish:
            self.P = P
        self.observation_space, self.action_space = Discrete(len(P)), Discrete(len(P[0]))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = 0
        return 0, {}

    def step(self, action):
        outcomes = self.transitions[self.state][action]
        chosen = self.np_random.choice(len(outcomes), p=[outcome[0] for outcome in outcomes])
        _, self.state, reward, terminated = outcomes[chosen]
        return self.state, self.reward(reward), terminated, False, {}

    def reward(self, reward):
        return reward


class Noisy(Tabular):
    """Adds noise to the rewards and notes them, in the order in which the environments step."""

    seen: typing.ClassVar[list[float]] = []

    def reward(self, reward):
        self.seen.append(reward + self.np_random.normal())
        return self.seen[-1]


def random_mdp(num_states, num_actions, seed):
    """Three outcomes a pair, with rewards in [-1, 1]; one in ten ends the episode."""
    rng = np.random.default_rng(seed)
    return {
        s: {
            a: [
                (float(p), int(rng.integers(num_states)), float(rng.uniform(-1, 1)), bool(rng.random() < 0.1))
                for p in rng.dirichlet(np.ones(3))
            ]
            for a in range(num_actions)
        }
        for s in range(num_states)
    }


class Lasts(gym.Env):
    """Episodes of 1 to 9 steps, each worth 1; keeps the seeds that it was given and the lengths of their episodes."""

    observation_space = action_space = Discrete(1)
    seeds: typing.ClassVar[list[int]] = []
    lengths: typing.ClassVar[list[int]] = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, 10))
        if seed is not None:
            self.seeds.append(seed)
            self.lengths.append(self.left)
        return 0, {}

    def step(self, action):
        self.left -= 1
        return 0, 1.0, self.left == 0, False, {}


class Strays(Tabular):
    """Shows state -1 after ten steps."""

    total = 0

    def step(self, action):
        self.total += 1
        _, *rest = super().step(action)
        return -1 if self.total > 10 else self.state, *rest


def claims(P):
    """The chain, with something else as its P."""
    env = Tabular(CHAIN, publish=False)
    env.P = P
    return env


# action 0 stays for nothing; action 1 goes 0 -> 1 for a reward of 1 and 1 -> 2, the end, for 2
CHAIN = {
    0: {0: [(1.0, 0, 0.0, False)], 1: [(1.0, 1, 1.0, False)]},
    1: {0: [(1.0, 1, 0.0, False)], 1: [(1.0, 2, 2.0, True)]},
    2: {0: [(1.0, 2, 100.0, False)], 1: [(1.0, 2, 100.0, False)]},  # never acted from
}
CHAIN_Q = [[1.0, 2.0], [1.0, 2.0]]  # at γ = 1/2: Q(1, 1) = 2, Q(1, 0) = 2/2, Q(0, 1) = 1 + 2/2, Q(0, 0) = 2/2
ONE_PAIR = {0: {0: [(1.0, 0, 1.0, False)]}}
FOUR_ARMS = {0: {a: [(1.0, 0, float(a == 0), False)] for a in range(4)}}
for name, cls, P, limit in (
    ("Chain", Tabular, CHAIN, 20),
    ("Random", Tabular, random_mdp(5, 3, seed=1), 50),
    ("OnePair", Tabular, ONE_PAIR, 10),
    ("Noisy", Noisy, ONE_PAIR, None),
    ("FourArms", Tabular, FOUR_ARMS, None),
    ("Infinite", Tabular, {0: {0: [(1.0, 0, np.inf, False)]}}, None),
):
    gym.register(f"Q{name}-v0", entry_point=cls, max_episode_steps=limit, kwargs={"P": P, "publish": cls is not Noisy})
gym.register("QLasts-v0", entry_point=Lasts)
gym.register("QStrays-v0", entry_point=Strays, kwargs={"P": CHAIN, "publish": False})
gym.register("QMatrix-v0", entry_point=claims, kwargs={"P": np.eye(3)})
gym.register("QNone-v0", entry_point=claims, kwargs={"P": None})
gym.register("QDouble-v0", entry_point=lambda: TransformReward(Tabular(CHAIN), lambda reward: 2 * reward))
FICKLE = {"fickle_passenger": True}
gym.register("QFickle-v0", entry_point="gymnasium.envs.toy_text.taxi:TaxiEnv", max_episode_steps=200, kwargs=FICKLE)


def train(tmp_path, env_id, **flags):
    """Run main() in this process; returns the run directory."""
    run_dir = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    flags = {"num_envs": 4, "eval_episodes": 0, "total_timesteps": 2000, "gamma": GAMMA, "epsilon_end": 0.5} | flags
    q_learning.main(q_learning.Args(env_id=env_id, run_dir=str(run_dir), **flags))
    return run_dir


# --- algorithm ---


def test_the_target_is_the_reward_at_the_end_and_else_adds_the_discounted_largest_next_q():
    next_q = tensor([[1.0, 3.0], [5.0, 4.0], [7.0, 9.0]])
    target = q_learning.td_target(tensor([1.0, 2.0, 3.0]), next_q, tensor([0.0, 0.0, 1.0]), 0.5)
    torch.testing.assert_close(target, tensor([1 + 0.5 * 3, 2 + 0.5 * 5, 3.0]))


def test_epsilon_is_right_at_the_start_in_the_middle_at_the_end_and_after_it():
    epsilons = [q_learning.epsilon_at(step, 0.1, 100) for step in (0, 50, 100, 1000)]
    assert epsilons == pytest.approx([1.0, 0.55, 0.1, 0.1])
    assert q_learning.epsilon_at(0, 0.1, 0) == 1.0 and q_learning.epsilon_at(1, 0.1, 0) == pytest.approx(0.1)


def test_actions_are_random_with_probability_epsilon_and_greedy_otherwise(tmp_path):
    def visits(epsilon):
        return weights(train(tmp_path, "QFourArms-v0", epsilon_end=epsilon, exploration_fraction=0.0))["visits"][0]

    greedy, random, mixed = visits(0.0), visits(1.0), visits(0.4)
    assert greedy[0] >= 2000 - 4 and greedy.sum() == 2000  # the first step of each is random: ε starts at 1
    assert (random - 500).abs().max() < 80  # four standard deviations
    assert (mixed[1:] - 200).abs().max() < 60 and abs(mixed[0] - 1400) < 90


@pytest.mark.parametrize("alpha_decay", [0.0, 0.6])
def test_environments_that_visit_a_pair_at_once_update_it_one_after_another(tmp_path, alpha_decay):
    Noisy.seen.clear()
    table = weights(train(tmp_path, "QNoisy-v0", gamma=0.0, total_timesteps=200, alpha_decay=alpha_decay))
    expected = 0.0
    for n, reward in enumerate(Noisy.seen, 1):
        expected += (reward - expected) / n**alpha_decay
    assert len(Noisy.seen) == table["visits"].item() == 200
    assert table["q"].item() == pytest.approx(expected, abs=1e-12)


def test_the_chain_is_learnt_to_the_numbers_by_hand(tmp_path):
    run_dir = train(tmp_path, "QChain-v0", alpha_decay=0.0)
    torch.testing.assert_close(weights(run_dir)["q"][:2], tensor(CHAIN_Q, dtype=torch.float64))
    assert scalars(run_dir, "charts/q_error")[-1] == (scalars(run_dir, "charts/SPS")[-1][0], pytest.approx(0, abs=1e-6))
    assert scalars(run_dir, "charts/visited")[-1][1] == 4


def test_reset_rows_and_final_states_are_neither_learnt_nor_counted(tmp_path):
    run_dir = train(tmp_path, "QChain-v0", epsilon_end=1.0)
    table = weights(run_dir)
    assert table["visits"][2].tolist() == table["q"][2].tolist() == [0, 0]
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert table["visits"].sum() == checkpoint["step"]


def test_constant_reward_under_truncation_is_worth_1_over_1_minus_gamma(tmp_path):
    run_dir = train(tmp_path, "QOnePair-v0", gamma=0.9, alpha_decay=0.0)
    assert weights(run_dir)["q"].item() == pytest.approx(10, rel=1e-6)
    assert scalars(run_dir, "charts/episodic_length")[-1][1] == scalars(run_dir, "charts/episodic_return")[-1][1] == 10


def test_q_comes_close_to_the_optimum_of_a_random_mdp(tmp_path):
    run_dir = train(tmp_path, "QRandom-v0", gamma=0.8, total_timesteps=50_000, num_envs=8)
    errors = [error for _, error in scalars(run_dir, "charts/q_error")]
    optimum = q_learning.value_iteration(random_mdp(5, 3, seed=1), 0.8)
    assert errors[-1] == pytest.approx((weights(run_dir)["q"] - optimum).abs().max().item(), rel=1e-5)
    assert errors[0] > 1.5 and errors[-1] < 0.1 * optimum.abs().max()
    assert (weights(run_dir)["q"].argmax(-1) == optimum.argmax(-1)).all()


# --- the optimum ---


def q_of_policy(P, policy, gamma):
    """Q of a fixed policy by a linear solve of Bellman's equation V = r + γ·P·V."""
    S, A = len(P), len(P[0])
    rewards, moves = np.zeros((S, A)), np.zeros((S, A, S))
    for s in range(S):
        for a in range(A):
            for p, next_state, reward, terminated in P[s][a]:
                rewards[s, a] += p * reward
                moves[s, a, next_state] += p * (not terminated)
    rows = np.arange(S)
    values = np.linalg.solve(np.eye(S) - gamma * moves[rows, policy], rewards[rows, policy])
    return torch.from_numpy(rewards + gamma * moves @ values)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99])
def test_value_iteration_is_bellmans_linear_equation_of_its_own_policy_and_no_policy_is_better(gamma):
    P = random_mdp(6, 3, seed=0)
    optimum = q_learning.value_iteration(P, gamma)
    torch.testing.assert_close(optimum, q_of_policy(P, optimum.argmax(-1).numpy(), gamma), rtol=0, atol=1e-9)
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert (q_of_policy(P, rng.integers(3, size=6), gamma) <= optimum + 1e-9).all()


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
    counts = {}
    obs, _ = env.reset(seed=0)
    env.action_space.seed(0)
    for _ in range(20_000):
        action = env.action_space.sample()
        next_obs, reward, terminated, _, _ = env.step(action)
        pair = counts.setdefault((obs, int(action)), {})
        outcome = int(next_obs), float(reward), bool(terminated)
        pair[outcome] = pair.get(outcome, 0) + 1
        obs = env.reset()[0] if terminated else next_obs
    found, expected, variance = (collections.Counter() for _ in range(3))  # by probability
    for (s, a), seen in counts.items():
        probs, n = {}, sum(seen.values())
        for p, next_state, reward, terminated in env.P[s][a]:
            outcome = int(next_state), float(reward), bool(terminated)
            probs[outcome] = probs.get(outcome, 0) + p
        assert set(seen) <= set(probs)
        for outcome, p in probs.items():
            found[round(p, 2)] += seen.get(outcome, 0)
            expected[round(p, 2)] += n * p
            variance[round(p, 2)] += n * p * (1 - p)
    for p in found:
        assert abs(found[p] - expected[p]) <= 4 * variance[p] ** 0.5 + 1e-6, p


def test_the_greedy_policy_is_evaluated_beside_the_optimal_one_in_the_same_episodes(tmp_path, capfd):
    run_dir = train(tmp_path, "QChain-v0", eval_episodes=3)
    assert scalars(run_dir, "eval/return_mean")[0][1] == scalars(run_dir, "eval/optimal_return_mean")[0][1] == 3
    assert "evaluation: return 3.00 ± 0.00, 0 of 3 cut" in capfd.readouterr().out
    run_dir = train(tmp_path, "FrozenLake-v1", eval_episodes=20, gamma=0.99, total_timesteps=100)
    assert scalars(run_dir, "eval/return_mean")[0][1] < 0.5 < scalars(run_dir, "eval/optimal_return_mean")[0][1]


def test_where_no_transitions_are_published_only_returns_are_logged(tmp_path):
    run_dir = train(tmp_path, "QNoisy-v0", total_timesteps=100)
    assert scalars(run_dir, "charts/q_error") == [] and scalars(run_dir, "charts/visited")[-1][1] == 1


@pytest.mark.parametrize("env_id", ["QMatrix-v0", "QNone-v0"])
def test_a_p_that_is_no_table_is_ignored(env_id, tmp_path):
    run_dir = train(tmp_path, env_id, alpha_decay=0.0, eval_episodes=1)
    torch.testing.assert_close(weights(run_dir)["q"][:2], tensor(CHAIN_Q, dtype=torch.float64))
    assert scalars(run_dir, "charts/q_error") == scalars(run_dir, "eval/optimal_return_mean") == []


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
    flags = {"env_kwargs": json.dumps(kwargs), "eval_episodes": 1, "total_timesteps": 6000}
    run_dir = train(tmp_path, env_id, **flags)
    said = f"{env_id} does otherwise than its P says: the optimum is not known"
    assert capfd.readouterr().out.count(said) == otherwise
    step, _ = scalars(run_dir, "eval/return_mean")[-1]
    for tag in ("charts/q_error", "eval/optimal_return_mean"):
        assert (step in dict(scalars(run_dir, tag))) != otherwise
    if env_id == "QDouble-v0":
        assert weights(run_dir)["q"][0, 1].item() == pytest.approx(2 * CHAIN_Q[0][1], rel=1e-3)


def test_greedy_returns_are_those_of_the_first_episodes_which_differ_between_seeds(tmp_path, capfd):
    Lasts.seeds.clear()
    for seed in (-3, 1, 2):
        Lasts.lengths.clear()
        run_dir = train(tmp_path, "QLasts-v0", seed=seed, total_timesteps=100, eval_episodes=20)
        returns = np.array(Lasts.lengths[4:])  # after those of training
        assert scalars(run_dir, "eval/return_mean")[0][1] == pytest.approx(returns.mean())
        assert f"return {returns.mean():.2f} ± {returns.std():.2f}, 0 of 20 cut" in capfd.readouterr().out
    assert len(Lasts.seeds) == len(set(Lasts.seeds)) == 3 * (4 + 20)


def test_evaluation_of_an_endless_episode_ends_and_says_so(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(q_learning, "MAX_EVAL_STEPS", 50)
    run_dir = train(tmp_path, "QFourArms-v0", eval_episodes=2)
    assert scalars(run_dir, "eval/return_mean")[0][1] == 50
    assert "2 of 2 cut" in capfd.readouterr().out


# --- the run ---


def test_saving_does_not_change_the_table(tmp_path):
    often, never = (weights(train(tmp_path, "QRandom-v0", save_every=every)) for every in (7, 0))
    assert torch.equal(often["q"], never["q"]) and torch.equal(often["visits"], never["visits"])


def test_two_resumptions_of_a_run_are_equal_and_go_on_from_its_table(tmp_path):
    first = train(tmp_path, "QRandom-v0")
    before = torch.load(first / "checkpoint.pt", weights_only=True)
    tables = []
    for copy in ("a", "b"):
        shutil.copytree(first, tmp_path / copy)
        saved = torch.load(tmp_path / copy / "checkpoint.pt", weights_only=True)
        flags = saved["args"] | {"run_dir": str(tmp_path / copy), "total_timesteps": 3000}
        saved["args"]["run_dir"] = flags["run_dir"]
        q_learning.main(q_learning.Args(**flags), saved)
        tables.append(weights(tmp_path / copy))
    assert torch.equal(tables[0]["q"], tables[1]["q"]) and torch.equal(tables[0]["visits"], tables[1]["visits"])
    assert (tables[0]["visits"] >= before["agent"]["visits"]).all() and 3000 <= tables[0]["visits"].sum() < 3004
    steps = [step for step, _ in scalars(tmp_path / "a", "charts/SPS")]
    assert steps == sorted(set(steps)) and steps[-1] >= 3000


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_leaves_a_checkpoint_that_resumes(tmp_path, number):
    run_dir = tmp_path / "run"
    flags = ("--env-id", "CliffWalking-v1", "--save-every", 500, "--eval-episodes", 1, "--run-dir", run_dir)
    process = subprocess.Popen(command("q_learning", *flags), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (run_dir / "checkpoint.pt").exists() and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(1)
    process.send_signal(number)
    error = process.communicate()[1].decode()
    step = torch.load(run_dir / "checkpoint.pt", weights_only=True)["step"]
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 1 and f"stopped at step {step}; to go on" in error
    resumed = run("q_learning", "--resume", run_dir, "--total-timesteps", step + 1000, "--num-envs", 2)
    assert resumed.returncode == 0, resumed.stderr
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert saved["step"] - step - 1000 in (0, 1) and saved["agent"]["visits"].sum() == saved["step"]
    assert saved["args"]["num_envs"] == 2 and saved["args"]["env_id"] == "CliffWalking-v1"


def test_ctrl_c_in_the_evaluation_ends_it_without_a_result(tmp_path):
    flags = ("--env-id", "probe_envs:Interrupted-v0", "--total-timesteps", 100, "--run-dir", tmp_path / "run")
    assert run("q_learning", *flags).returncode == -signal.SIGINT
    assert scalars(tmp_path / "run", "eval/return_mean") == [] != scalars(tmp_path / "run", "charts/SPS")
    assert weights(tmp_path / "run")["visits"].sum() >= 100


def test_a_negative_state_is_an_error_instead_of_the_last_state(tmp_path):
    with pytest.raises(IndexError):
        train(tmp_path, "QStrays-v0")
    assert not (tmp_path / "run0" / "model.safetensors").exists()


@pytest.mark.parametrize("env_id", ["probe_envs:Probe-v0", "probe_envs:ActionsFromOne-v0", "CartPole-v1"])
def test_other_spaces_than_discrete_ones_from_0_are_refused_in_one_sentence(tmp_path, env_id):
    with pytest.raises(SystemExit, match="observations and actions must be Discrete from 0, not") as refusal:
        train(tmp_path, env_id)
    assert "\n" not in str(refusal.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags", [{"gamma": 1.0}, {"num_envs": 0}, {"total_timesteps": 0}, {"alpha_decay": -1.0}, {"epsilon_end": 5.0}]
)
def test_flags_that_cannot_work_are_refused(flags):
    with pytest.raises(ValueError, match="must be at least"):
        q_learning.Args(**flags)


def test_a_directory_that_holds_a_run_is_refused(tmp_path):
    run_dir = train(tmp_path, "QChain-v0", total_timesteps=10)
    with pytest.raises(SystemExit, match="holds a run"):
        q_learning.main(q_learning.Args(env_id="QChain-v0", run_dir=str(run_dir)))


def test_a_copy_of_a_checkpoint_does_not_overwrite_the_run_it_lies_beside(tmp_path, monkeypatch):
    run_dir = train(tmp_path, "QChain-v0", total_timesteps=10)
    before = (run_dir / "checkpoint.pt").read_bytes()
    shutil.copy(run_dir / "checkpoint.pt", run_dir / "copy.pt")
    monkeypatch.chdir(run_dir)
    monkeypatch.setattr(
        "sys.argv", ["q_learning.py", "--resume", "copy.pt", "--run-dir", ".", "--total-timesteps", "20"]
    )
    with pytest.raises(SystemExit, match="holds a run"):
        q_learning.main(*q_learning.parse_args())
    assert (run_dir / "checkpoint.pt").read_bytes() == before


def test_a_finished_run_is_only_evaluated_again_and_its_args_json_stays(tmp_path, monkeypatch):
    run_dir = train(tmp_path, "QChain-v0", total_timesteps=10)
    before = (run_dir / "args.json").read_text()
    monkeypatch.setattr(
        "sys.argv", ["q_learning.py", "--resume", str(run_dir), "--gamma", "0.9", "--eval-episodes", "2"]
    )
    q_learning.main(*q_learning.parse_args())
    assert (run_dir / "args.json").read_text() == before and scalars(run_dir, "eval/return_mean")


def test_training_environments_are_closed_before_evaluation(tmp_path, monkeypatch):
    closed, close = [], gym.vector.SyncVectorEnv.close
    monkeypatch.setattr(
        gym.vector.SyncVectorEnv, "close", lambda envs, **kw: closed.append(envs.num_envs) or close(envs, **kw)
    )
    train(tmp_path, "QChain-v0", total_timesteps=10, eval_episodes=2)
    assert closed[0] == 4


def test_a_table_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(AssertionError, match="nan or inf"):
        train(tmp_path, "QInfinite-v0", eval_episodes=0)
    assert not (tmp_path / "run0" / "checkpoint.pt").exists()  # which the first step would have made


def test_the_script_is_short_and_what_it_shares_with_ppo_is_identical():
    assert len((ALGOS / "q_learning.py").read_text().splitlines()) <= 200
    for name in ("parse_args",):
        assert inspect.getsource(getattr(q_learning, name)) == inspect.getsource(getattr(ppo, name))


def test_returns_and_lengths_are_logged_under_their_names(tmp_path):
    run_dir = train(tmp_path, "CliffWalking-v1", total_timesteps=20_000, alpha_decay=0.0)
    assert (
        scalars(run_dir, "charts/episodic_return")[-1][1]
        <= -13
        < 13
        <= scalars(run_dir, "charts/episodic_length")[-1][1]
    )
