"""Small environments with known answers; import path for --env-id: probe_envs:Name-v0."""

import signal
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, Graph, MultiBinary, MultiDiscrete, OneOf, Sequence, Text, Tuple
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space


class Probe(gym.Env):
    """Observation 1, reward 1, never ends by itself; the registration cuts it after some steps."""

    observation_space: gym.Space = Box(-1, 1, (1,), np.float32)
    action_space: gym.Space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.observe(), {}

    def step(self, action):
        self.time += 1
        reward = self.reward(action)  # of what the action was chosen for, before the next observation
        return self.observe(), reward, self.over(), False, {}

    def observe(self):
        return np.ones(self.observation_space.shape, self.observation_space.dtype)

    def reward(self, action):
        return 1.0

    def over(self):
        return False


class OneStep(Probe):
    """Every episode is one step; action 1 is worth 1, action 0 nothing."""

    def reward(self, action):
        return float(action)

    def over(self):
        return True


class Identity(OneStep):
    """Shows -1 or 1; the reward is 1 for the matching action (0 or 1)."""

    def observe(self):
        self.shown = int(self.np_random.integers(2))
        return np.array([2 * self.shown - 1], np.float32)

    def step(self, action):
        matched = float(action == self.shown)
        return self.observe(), matched, True, False, {}


class Target(OneStep):
    """Two-dimensional Box action in [-1, 1]²; the reward is minus the squared distance to (0.3, -0.2)."""

    action_space = Box(-1, 1, (2,), np.float32)

    def step(self, action):
        assert self.action_space.contains(action), action
        return super().step(action)

    def reward(self, action):
        return -float(((action - np.array([0.3, -0.2])) ** 2).sum())


class Clock(Probe):
    """Shows the number of steps since it was made, whatever the action; episodes last 3 steps, rewards are the time."""

    observation_space = Box(0, np.inf, (1,), np.float32)
    total = 0

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.total = 0
        return super().reset(seed=seed, options=options)

    def step(self, action):
        self.total += 1
        return super().step(action)

    def observe(self):
        return np.array([self.total], np.float32)

    def reward(self, action):
        return float(self.total)

    def over(self):
        return self.time == 3


class Scaled(Probe):
    """Random observations of mean 50 and deviation 10; the reward says how far the first one is from 50."""

    observation_space = Box(-np.inf, np.inf, (3,), np.float64)

    def observe(self):
        self.shown = self.np_random.normal(50, 10, 3)
        return self.shown

    def reward(self, action):
        return float(self.shown[0] - 50) * (2 * int(action) - 1)


class Pixels(Probe):
    """36 x 40 colour noise."""

    observation_space = Box(0, 255, (36, 40, 3), np.uint8)

    def observe(self):
        return self.np_random.integers(0, 256, (36, 40, 3), np.uint8)


class Explodes(Probe):
    """Rewards become infinite after 300 steps of one environment."""

    total = 0

    def reward(self, action):
        self.total += 1
        return 1.0 if self.total < 300 else np.inf


class Staggered(VectorEnv):
    """Native vector environment: episodes last 4 steps in env 0 and 1 and 6 in the others; returns are 4, 8, 6, 6 …

    With `trap`, the rows that must not count carry nonsense: a huge reward in the reset row, and a huge final
    observation of terminated episodes. With `growth`, later episodes are worth more. `flags` is the type of the ends.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(
        self,
        num_envs=1,
        max_episode_steps=None,
        trap=False,
        longest=6,
        growth=0,
        autoreset_mode=AutoresetMode.NEXT_STEP,
        flags=bool,
    ):
        self.num_envs = num_envs
        self.trap = trap
        self.growth = growth
        self.flags = flags
        self.metadata = {"autoreset_mode": autoreset_mode}
        self.single_observation_space = Box(-np.inf, np.inf, (2,), np.float32)
        self.single_action_space = Discrete(2)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.length = np.where(np.arange(num_envs) < 2, 4, longest)
        self.gain = np.where(np.arange(num_envs) == 1, 2.0, 1.0)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = np.zeros(self.num_envs, int)
        self.over = np.zeros(self.num_envs, bool)
        self.episode = np.zeros(self.num_envs)
        self.state = self.np_random.normal(size=(self.num_envs, 2)).astype(np.float32)
        return self.state.copy(), {}

    def step(self, actions):
        fresh = self.over
        self.time = np.where(fresh, 0, self.time + 1)
        self.episode += fresh
        push = np.where(actions[:, None] == 1, 0.5, -0.5)
        noise = self.np_random.normal(size=(self.num_envs, 2))
        moved = 0.9 * self.state + (push + noise * 0.1)
        start = self.np_random.normal(size=(self.num_envs, 2))
        self.state = np.where(fresh[:, None], start, moved).astype(np.float32)
        self.over = self.time == self.length
        worth = self.gain + self.growth * self.episode
        reward = np.where(fresh, 1e6 if self.trap else 0.0, worth)
        shown = self.state.copy()
        if self.trap is True:
            shown[self.over] = 1e6
        terminated = self.over.astype(self.flags)
        truncated = np.zeros(self.num_envs, self.flags)
        return shown, reward, terminated, truncated, {}


class Spike(Probe):
    """Small random observations and rewards, and a huge one of each at step 400."""

    def step(self, action):
        obs, _, over, cut, info = super().step(action)
        size = 1e6 if self.time == 400 else 1.0
        obs = obs * self.np_random.normal() * size
        reward = self.np_random.normal() * size
        return obs.astype(np.float32), reward, over, cut, info


class NeedsFile(Probe):
    """Cannot be made: a file is missing."""

    def __init__(self, **kwargs):
        raise FileNotFoundError("no such model file")


class NoPictures(Probe):
    """Cannot be rendered."""


class BadPictures(Probe):
    """Can be asked for pictures, and shows what is none; `shown` is what it draws, or raises."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    pictures = {
        "nothing": None,
        "flat": np.zeros((8, 8), np.uint8),
        "text": "a picture",
        "gray": np.zeros((8, 8, 1), np.uint8),
        "floats": np.zeros((8, 8, 3), np.float32),
    }

    def __init__(self, shown="nothing", render_mode=None):
        self.shown = shown
        self.render_mode = render_mode

    def render(self):
        if self.shown == "fault":
            raise ImportError("no module named pygame")
        return self.pictures[self.shown]


class MixedInfos(Probe):
    """Infos whose values differ in type from step to step, as `winner` does in many a game."""

    values = (None, 1, "a", np.ones(2), np.ones(3), {"deep": 1}, [1], 0.5)

    def step(self, action):
        *rest, _ = super().step(action)
        kind = self.np_random.integers(len(self.values))
        return *rest, {"winner": self.values[kind], f"of {kind}": kind}


class ScalarAction(Probe):
    action_space = Box(-1, 1, (), np.float32)


class ManyActions(Probe):
    action_space = MultiDiscrete([2, 2])


class ActionsFromOne(Probe):
    action_space = Discrete(2, start=1)


def register(cls, limit=None):
    """Make an environment known by the name of its class."""
    gym.register(f"{cls.__name__}-v0", entry_point=cls, max_episode_steps=limit)


def register_staggered(name, **kwargs):
    """Make a variant of Staggered known."""
    gym.register(f"{name}-v0", vector_entry_point=Staggered, kwargs=kwargs)


for cls in (OneStep, Identity, Target, Clock, Spike):
    register(cls)
for cls in (Probe, Explodes, NeedsFile, NoPictures, BadPictures, MixedInfos, ScalarAction, ManyActions, ActionsFromOne):
    register(cls, limit=10)
register(Pixels, limit=15)
register(Scaled, limit=20)
register_staggered("Staggered")
register_staggered("StaggeredTrap", trap=True)
register_staggered("StaggeredRewardTrap", trap="reward")
register_staggered("StaggeredGrowing", longest=11, growth=1)
register_staggered("SameStep", autoreset_mode=AutoresetMode.SAME_STEP)
register_staggered("StaggeredIntegers", flags=np.int64)
register_staggered("StaggeredFloats", flags=np.float32)


class Bounds(Probe):
    """Box action within [low, high], numbers or vectors, each kept in `seen`. With `best`: one step, best at it."""

    def __init__(self, low, high, seen, best=None):
        self.action_space = Box(np.float32(low).reshape(-1), np.float32(high).reshape(-1))
        self.high = high
        self.seen = seen
        self.best = best

    def step(self, action):
        self.seen.append(np.array(action))
        if self.best is None:
            return self.observe(), 0.0, False, False, {}
        distance = ((action - self.best) / self.high) ** 2
        return self.observe(), -float(distance.sum()), True, False, {}


class Image(Probe):
    """Noise of any shape, uint8."""

    def __init__(self, shape):
        self.observation_space = Box(0, 255, shape, np.uint8)

    def observe(self):
        return self.np_random.integers(0, 256, self.observation_space.shape, np.uint8)


class Endless(Probe):
    """Never ends, and has no time limit."""


class Guarded(Probe):
    """Booleans of which at most two environments may be open at once; its info has keys of its own."""

    observation_space = Box(0, 1, (3,), bool)
    open = 0

    def __init__(self):
        Guarded.open += 1
        assert Guarded.open <= 2

    def step(self, action):
        obs, reward, over, cut, _ = super().step(action)
        return obs, reward, over, cut, {"raw": 1, "episode": 2}

    def close(self):
        Guarded.open -= 1


gym.register("Endless-v0", entry_point=Endless)
gym.register("Guarded-v0", entry_point=Guarded, max_episode_steps=10)


# --- for the contract of the command line ---


class Noise(Scaled):
    """Scaled, whose reward points the other way with direction=-1."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, direction=1, render_mode=None):
        self.direction, self.render_mode = direction, render_mode

    def reward(self, action):
        return self.direction * super().reward(action)

    def render(self):
        return np.zeros((8, 8, 3), np.uint8)


class Alternating(Probe):
    """Episodes of `long` steps and of 5 in turn, each step worth 1."""

    episode = 0

    def __init__(self, long=200):
        self.long = long

    def reset(self, *, seed=None, options=None):
        self.episode += 1
        return super().reset(seed=seed, options=options)

    def over(self):
        return self.time == (self.long if self.episode % 2 else 5)


class Trouble(Noise):
    """Noise that after `at` steps gives the reward `kind` (nan, inf), fails (raise) or sends itself a signal."""

    total = 0

    def __init__(self, kind="", at=0):
        super().__init__()
        self.kind, self.at = kind, at

    def reset(self, *, seed=None, options=None):
        if self.kind == "reset":
            raise OSError("the simulator does not start")
        return super().reset(seed=seed, options=options)

    def reward(self, action):
        self.total += 1
        if self.total < self.at or self.kind in ("", "reset"):
            return super().reward(action)
        if self.kind == "raise":
            raise OSError("the simulator died")
        if self.kind.startswith("SIG"):
            if self.total == self.at:
                signal.raise_signal(signal.Signals[self.kind])
            return super().reward(action)
        return float(self.kind)


class Infinite(Noise):
    """Noise that shows nothing but infinity from step `at` on, or nothing but another `value`."""

    total = 0

    def __init__(self, at, value="inf"):
        super().__init__()
        self.at, self.value = at, float(value)

    def step(self, action):
        self.total += 1
        return super().step(action)

    def observe(self):
        obs = super().observe()
        return obs if self.total < self.at else np.full(3, self.value)


class Film(Probe):
    """Has pictures and no end."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
    render_mode = "rgb_array"

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def render(self):
        return np.zeros((16, 16, 3), np.uint8)


class Interrupted(Probe):
    """One state and action; the first environment to take 20 steps is interrupted: none of 16 that train for 100."""

    observation_space = action_space = Discrete(1)
    interrupted = False

    def observe(self):
        return 0

    def over(self):
        if self.time == 20 and not Interrupted.interrupted:
            Interrupted.interrupted = True
            signal.raise_signal(signal.SIGINT)
        return self.time == 30


class IntBox(Probe):
    action_space = Box(0, 10, (2,), np.int64)


class RewardArray(Probe):
    def reward(self, action):
        return np.array([1.0])


class WrongShape(Probe):
    observation_space = Box(-1, 1, (2,), np.float32)

    def observe(self):
        return np.zeros(3, np.float32)


class OldReset(Probe):
    """reset without a seed, which returns the observation alone."""

    def reset(self):
        return super().reset()[0]


class OldStep(Probe):
    """step with one `done` instead of terminated and truncated."""

    def step(self, action):
        obs, reward, over, _, info = super().step(action)
        return obs, reward, over, info


class Slip(Probe):
    """Observations that are a little other than the space says."""

    above_one = np.nextafter(np.float32(1), np.float32(2))
    slips = {
        "rounding": np.array([above_one], np.float32),
        "bounds": np.array([3], np.float32),
        "float64": np.ones(1),
    }

    def __init__(self, kind):
        self.kind = kind

    def observe(self):
        return self.slips[self.kind]


class Own(gym.Space):
    """A space that gymnasium does not know."""

    def __init__(self):
        super().__init__((1,), np.float32)

    def sample(self, mask=None, probability=None):
        return np.zeros(1, np.float32)

    def contains(self, x):
        return True


class Shows(Probe):
    """Always the same observation, of one of many spaces; `numbers` is what a network should get of it."""

    kinds = {  # space, observation, numbers
        "dict": (
            Dict({"place": Discrete(3), "speed": Box(-1, 1, (2,))}),
            {"place": 1, "speed": np.array([0.5, -1], np.float32)},
            [0, 1, 0, 0.5, -1],
        ),
        "tuple": (
            Tuple((Discrete(2), Dict({"on": MultiBinary(1)}), Box(-1, 1, (1,)))),
            (1, {"on": np.ones(1, np.int8)}, np.array([0.25], np.float32)),
            [0, 1, 1, 0.25],
        ),
        "state": (Discrete(4), 2, [0, 0, 1, 0]),
        "bits": (MultiBinary(3), np.array([1, 0, 1], np.int8), [1, 0, 1]),
        "grid of bits": (MultiBinary((2, 2)), np.array([[1, 0], [1, 1]], np.int8), [1, 0, 1, 1]),
        "choices": (MultiDiscrete([2, 3]), np.array([1, 0]), [0, 1, 1, 0, 0]),
        "number": (Box(-1, 1, ()), np.array(0.5, np.float32), [0.5]),
        "matrix": (Box(-9, 9, (2, 3)), np.arange(6, dtype=np.float32).reshape(2, 3), [0, 1, 2, 3, 4, 5]),
        "block": (Box(-9, 9, (1, 2, 1, 2)), np.arange(4, dtype=np.float32).reshape(1, 2, 1, 2), [0, 1, 2, 3]),
        "image": (
            Box(0, 255, (2, 1, 3), np.uint8),
            np.uint8([[[255, 51, 0]], [[0, 102, 204]]]),
            [1, 0.2, 0, 0, 0.4, 0.8],
        ),
        "tiles": (Box(0, 10, (2, 2), np.uint8), np.uint8([[0, 5], [10, 1]]), [0, 0.5, 1, 0.1]),
        "bytes": (Box(0, 255, (4,), np.uint8), np.uint8([0, 51, 255, 102]), [0, 0.2, 1, 0.4]),
        "graph": (Graph(Box(-1, 1, (1,)), None), None, None),
        "text": (Text(5), "left", None),
        "dict of text": (Dict({"mission": Text(5), "speed": Box(-1, 1, (1,))}), {}, None),
        "sequence": (Tuple((Discrete(2), Sequence(Discrete(2)))), (), None),
        "one of two": (OneOf((Discrete(2), Discrete(3))), (), None),
        "own": (Own(), np.zeros(1, np.float32), None),
    }

    def __init__(self, kind):
        self.observation_space, self.shown, self.numbers = self.kinds[kind]

    def observe(self):
        return self.shown


class Counts(Probe):
    """Shows the steps of its episode, which lasts `length` steps, each worth 1."""

    observation_space = Box(0, np.inf, (1,), np.float32)

    def __init__(self, length):
        self.length = length

    def observe(self):
        return np.array([self.time], np.float32)

    def over(self):
        return self.time == self.length


class Rare(Probe):
    """Rewards `reward` at its step number `at`, and 0 at all others."""

    def __init__(self, reward, at):
        self.at, self.worth = at, reward

    def reward(self, action):
        return self.worth if self.time == self.at else 0.0


class Slow(Noise):
    """A simulator for a process of its own; leaves a file after 100 steps, where the first of several may fail."""

    total = 0

    def __init__(self, fails=False):
        super().__init__()
        self.fails = fails

    def step(self, action):
        self.total += 1
        time.sleep(0.001 * (1 + self.np_random.random()))  # so that one is the first
        if self.total == 100:
            is_first = not Path("trains").exists()
            Path("trains").touch()
            if self.fails and is_first:
                raise OSError("the simulator died")
        return super().step(action)


class SlowStates(Slow):
    """The same for a table: states 0 and 1."""

    observation_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return 0, {}

    def step(self, action):
        _, *rest = super().step(action)
        return self.total % 2, *rest


for cls in (Alternating, Film, Interrupted, Rare):
    register(cls)
for cls in (IntBox, RewardArray, WrongShape, OldReset, OldStep, Slip, Shows):
    register(cls, limit=10)
for cls in (Noise, Trouble, Infinite, Slow, SlowStates):
    register(cls, limit=20)
gym.register("SlowEndless-v0", entry_point=Slow)
gym.register("mine/State-v0", entry_point=lambda: Shows("state"), max_episode_steps=10)
gym.register("Against-v0", entry_point=Noise, max_episode_steps=20, kwargs={"direction": -1})
gym.register("Image-v0", entry_point=lambda shape: Image(tuple(shape)), max_episode_steps=10)
gym.register("Recorded-v0", entry_point=lambda: gym.wrappers.RecordEpisodeStatistics(OneStep()))
