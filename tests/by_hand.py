"""What tests of reinforce.py, a2c.py and ppo.py share: a world of which every row is known, and updates by hand.

`Updates` goes through the observations and actions of a run with formulas written here, in double precision: it must
reach the weights that the script reaches.
"""

import inspect
import json
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from helpers import scalars, weights
from torch import Tensor
from torch.testing import assert_close

N = 3
LENGTHS = (3, 4, 9)  # of the episodes of each environment; the second one is cut, the others end by themselves
SEED = 5


# --- the world ---


def row(k: int, n: int) -> SimpleNamespace:
    """What environment n shows k rows after it was reset, and what happens there whatever the action is.

    The row after an episode's end is a reset, whose reward means nothing. Later episodes are worth more.
    """
    episode, time = divmod(k, LENGTHS[n] + 1)
    is_step = time < LENGTHS[n]
    done = time == LENGTHS[n] - 1
    here = SimpleNamespace(is_step=is_step, done=done)
    here.obs = [time / 4, n - 1.0, 0.5 * episode]
    here.reward = 0.1 * 3**episode * (1 + n + time) if is_step else 1000.0
    here.terminated = done and n != 1
    here.episode_began = k - time
    return here


class Known(VectorEnv):
    """The world of `row`; its shortest episodes are over while the longest go on."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(self, num_envs: int = N, box: bool = False, **_: object) -> None:
        self.num_envs = num_envs
        self.single_observation_space = Box(-10, 10, (3,), np.float32)
        self.single_action_space = Box(-1, 1, (2,), np.float32) if box else Discrete(3)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def rows(self) -> list[SimpleNamespace]:
        return [row(self.k, n) for n in range(self.num_envs)]

    def observations(self) -> np.ndarray:
        return np.array([here.obs for here in self.rows()], np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.k = 0
        return self.observations(), {}

    def step(self, actions: np.ndarray) -> tuple:
        rows = self.rows()
        rewards = np.array([here.reward for here in rows])
        terminated = np.array([here.terminated for here in rows])
        done = np.array([here.done for here in rows])
        self.k += 1
        return self.observations(), rewards, terminated, done & ~terminated, {}


gym.register("Known-v0", vector_entry_point=Known)


def rollout(first: int, T: int) -> SimpleNamespace:
    """Tensors (T, N) of rows first … first + T - 1; obs has one row more."""
    rows = []
    for k in range(first, first + T + 1):
        rows.append([row(k, n) for n in range(N)])

    def tensor(name: str) -> Tensor:
        values = [[getattr(here, name) for here in line] for line in rows]
        return torch.tensor(values, dtype=torch.float64)

    found = SimpleNamespace(obs=tensor("obs"))
    found.rewards = tensor("reward")[:T]
    found.terminated = tensor("terminated")[:T]
    found.done = tensor("done")[:T]
    found.is_step = tensor("is_step")[:T] > 0
    return found


def actions_of(acts: list[SimpleNamespace], first: int, T: int) -> Tensor:
    """Actions (T, N, …) that a run drew in rows first … first + T - 1, from its calls of `act`."""
    return torch.stack([call.result for call in acts[first : first + T]])


def discounted_return(k: int, n: int, gamma: float) -> float:
    """Sum of the rewards of row k and of those before it in its episode, discounted by their age."""
    total = 0.0
    for j in range(row(k, n).episode_began, k + 1):
        total += gamma ** (k - j) * row(j, n).reward
    return total


# --- runs ---


def train(script: ModuleType, run_dir: Path, env_id: str, **flags: object) -> Path:
    """Run main() of a script in this process, on small rollouts unless flags say otherwise."""
    defaults = {"run_dir": str(run_dir), "device": "cpu", "eval_episodes": 0, "num_envs": 4, "num_steps": 8}
    if hasattr(script.Args, "num_minibatches"):
        defaults["num_minibatches"] = 1
    script.main(script.Args(**{"env_id": env_id, **defaults, **flags}))
    return run_dir


def train_on_known(script: ModuleType, run_dir: Path, box: bool, **flags: object) -> Path:
    """A run on the world of `row`, with actions of a Box or of three kinds."""
    of_world = {"env_kwargs": json.dumps({"box": box}), "seed": SEED, "num_envs": N}
    return train(script, run_dir, "by_hand:Known-v0", **of_world, **flags)


def kept(value: object) -> object:
    """A tensor as it is now, since scripts overwrite their rollouts."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def spy_by_name(monkeypatch, owner: object, name: str) -> list[SimpleNamespace]:
    """Replace a function by itself and list its calls: `result`, `has_grad`, and each argument by its name."""
    original = getattr(owner, name)
    signature = inspect.signature(original)
    calls = []

    def spy(*arguments, **keywords):
        result = original(*arguments, **keywords)
        bound = signature.bind(*arguments, **keywords)
        call = SimpleNamespace(result=kept(result), has_grad=torch.is_grad_enabled())
        for argument, value in bound.arguments.items():
            setattr(call, argument, kept(value))
        calls.append(call)
        return result

    monkeypatch.setattr(owner, name, spy)
    return calls


# --- formulas ---


def gae_by_definition(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, done: Tensor, gamma: float, lam: float
) -> Tensor:
    """The sum of GAE Eq. 16, term by term, up to the first `done`."""
    advantages = torch.zeros_like(rewards)
    for t, n in np.ndindex(*rewards.shape):
        for later in range(t, len(rewards)):
            value_after = 0.0 if terminated[later, n] else next_values[later, n]
            delta = rewards[later, n] + gamma * value_after - values[later, n]
            advantages[t, n] += (gamma * lam) ** (later - t) * delta
            if done[later, n]:
                break
    return advantages


def gaussian(actions: Tensor, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """log-probabilities (B,) of actions (B, A) under independent Gaussians, and their entropy."""
    std = log_std.exp()
    distance = (actions - mean) / std
    densities = (-(distance**2) / 2).exp() / (std * math.sqrt(2 * math.pi))
    entropies = 0.5 * (2 * math.pi * math.e * std**2).log()
    return densities.log().sum(1), entropies.sum().expand(len(actions))


class Updates:
    """Agent, statistics and optimiser of a run; `logged` keeps what each update reports."""

    def __init__(self, script: ModuleType, box: bool, normalize: bool, log_std_init: float, optimizer: str) -> None:
        spaces = Known(box=box)
        torch.manual_seed(SEED)  # so it starts at the weights of the run
        agent = script.Agent(spaces.single_observation_space, spaces.single_action_space, normalize, log_std_init)
        self.agent = agent.double()
        self.box = box
        self.normalize = normalize
        self.optimizer = optimizer
        self.seen = []  # observations (S, 3) of the steps of each update so far
        self.count = 0  # of steps down
        self.moments = {name: (0.0, 0.0) for name, _ in agent.named_parameters()}
        self.norms = []
        self.logged = []

    def standard(self, obs: Tensor) -> Tensor:
        if not (self.normalize and self.seen):
            return obs
        seen = torch.cat(self.seen)
        deviation = seen.std(0, correction=0).clamp(min=1e-4)
        return ((obs - seen.mean(0)) / deviation).clamp(-10, 10)

    def policy(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """log π(a|s) and entropy, (B,) each."""
        outputs = self.agent.actor(self.standard(obs))
        if self.box:
            return gaussian(actions, outputs, self.agent.log_std)
        probs = outputs.softmax(-1)
        entropy = -(probs * probs.log()).sum(1)
        return probs[torch.arange(len(obs)), actions.long()].log(), entropy

    def values(self, obs: Tensor) -> Tensor:
        """V (T, N) of observations (T, N, 3), or (B,) of (B, 3)."""
        return self.agent.critic(self.standard(obs))[..., 0]

    def scaled_rewards(self, rewards: Tensor, first: int, gamma: float) -> Tensor:
        """Rewards over the deviation of the discounted returns of all steps up to the end of this rollout."""
        if not self.normalize:
            return rewards
        rows = np.ndindex(first + len(rewards), N)
        sums = [discounted_return(k, n, gamma) for k, n in rows if row(k, n).is_step]
        return (rewards / np.std(sums)).clamp(-10, 10)

    def step_down(self, loss: Tensor, learning_rate: float, max_norm: float) -> float:
        """One step of the optimiser; returns the norm of the gradient before it was clipped."""
        self.agent.zero_grad()
        loss.backward()
        grads = {name: p.grad for name, p in self.agent.named_parameters()}
        norm = math.sqrt(sum(grad.square().sum() for grad in grads.values()))
        self.norms.append(norm)
        self.count += 1
        for name, parameter in self.agent.named_parameters():
            grad = grads[name] * min(1.0, max_norm / norm)
            parameter.data -= learning_rate * self.direction(name, grad)
        return norm

    def direction(self, name: str, grad: Tensor) -> Tensor:
        """Where Adam or RMSprop goes, both with eps outside the root, or plain SGD."""
        mean, square = self.moments[name]
        if self.optimizer == "RMSprop":
            square = 0.99 * square + 0.01 * grad**2
            self.moments[name] = (mean, square)
            return grad / (square.sqrt() + 1e-5)
        if self.optimizer == "Adam":
            mean = 0.9 * mean + 0.1 * grad
            square = 0.999 * square + 0.001 * grad**2
            self.moments[name] = (mean, square)
            root = (square / (1 - 0.999**self.count)).sqrt()
            return mean / (1 - 0.9**self.count) / (root + 1e-5)
        return grad

    def log(self, **values: object) -> None:
        """Keep what an update reports: a number each, or the mean of several."""
        means = {}
        for name, value in values.items():
            means[name] = float(torch.as_tensor(value).detach().mean())
        self.logged.append(means)

    def compare(self, run_dir: Path, sizes: list[int]) -> None:
        """The run has these weights; it logs the first update, and at its end the mean over all others."""
        after = weights(run_dir)
        for name, parameter in self.agent.named_parameters():
            assert_close(after[name].double(), parameter.data, rtol=1e-4, atol=1e-5)
        for name in self.logged[0]:
            numbers = [values[name] for values in self.logged]
            (first, first_mean), (last, last_mean) = scalars(run_dir, f"losses/{name}")
            assert (first, last) == (sizes[0], sum(sizes))
            assert first_mean == pytest.approx(numbers[0], rel=1e-4, abs=1e-5), name
            assert last_mean == pytest.approx(np.mean(numbers[1:]), rel=1e-4, abs=1e-5), name


def use_sgd(monkeypatch, owner: str) -> None:
    """Let a script step by plain SGD, which shows the size of its gradient."""

    def plain_sgd(parameters, lr, **_):
        return torch.optim.SGD(parameters, lr)

    monkeypatch.setattr(torch.optim, owner, plain_sgd)
