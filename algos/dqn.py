# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "ale-py>=0.12.1",
#     "gymnasium[classic-control]>=1.4.0",
#     "moviepy>=2.2.1",
#     "numpy>=2.4",
#     "opencv-python-headless>=4.13",
#     "safetensors>=0.8",
#     "tensorboard>=2.21",
#     "torch>=2.13.0",
#     "tqdm>=4.70",
#     "tyro>=1.0.17",
# ]
# ///
"""Deep Q-Network (DQN): Q-learning with a network, from replayed steps and towards a network that lags.

Q(s, a) is the return of action a in state s followed by the best actions, so it is fitted to the reward plus the
largest Q of the next state. Steps replayed at random are not correlated as successive ones are; a frozen copy θ⁻ of the
network gives that largest Q, so that the target does not move with each update.

Paper: Mnih et al. 2013, "Playing Atari with Deep Reinforcement Learning", arXiv 1312.5602; the target network is of
Mnih et al. 2015, "Human-level control through deep reinforcement learning", Nature 518, Algorithm 1.

    python algos/dqn.py                                   # CartPole-v1: trains to 487 of 500 (5 seeds) in a minute
    python algos/dqn.py --env-id Acrobot-v1
    python algos/dqn.py --env-id ALE/Pong-v5 --total-timesteps 10000000 --learning-rate 1e-4 --batch-size 32 \\
        --num-envs 8 --train-every 4 --buffer-size 1000000 --learning-starts 80000 --target-every 1000 \\
        --epsilon-end 0.01 --exploration-fraction 0.1 --save-every 2000000      # 7 GB of memory, 14 of disk

Letters: N environments, B rows of a minibatch, K minibatches between two steps of the environments, A number of
actions, R rows of the replay buffer per environment.

Environments reset themselves one step late (gymnasium's NEXT_STEP). The observation that comes with `done` is the true
final one, so the next observation of a step is just the next row's; that next row ignores its action, is not a step,
and is never drawn as one.

Logged every 1,000 steps: charts/episodic_return and episodic_length, means over the charts/episodes episodes that ended
since the last time (raw scores, before clipping); charts/SPS, environment steps per second since the start;
charts/epsilon, the present ε; losses/*, means over all minibatches since the last time: td_loss, q_values (Q(s, a) of
the replayed steps). eval/* is the greedy policy on fresh environments.

Differs from the paper:
 1. Adam, and the plain squared error of Eq. 2: 2013 has RMSProp, 2015 also clips the error to ±1.
 2. N environments step side by side, since 20 steps then cost little more than one. Every interval counts environment
    steps over all of them, also the target network's (in 2015: updates). After each step of all environments, the
    minibatches due by then are drawn at once, with one θ⁻.
 3. Truncated episodes bootstrap with Q(final observation); only true terminations end the return.
 4. Vectors take an MLP with layers of 120 and 84, pixels the network of 2015 with orthogonal initialisation.
 5. Atari: no sticky actions, whole games (a lost life is no termination), training rewards clipped to their sign.
"""

import contextlib
import copy
import functools
import importlib.util
import io
import json
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import tyro
from gymnasium.spaces import Box, Discrete
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation, RecordVideo
from gymnasium.wrappers import vector as wrap
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # run
    seed: int = 1
    """seed of weights, actions, minibatches and environments"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU when there is one"""
    run_dir: str = ""
    """where the run is written; by default runs/<task>__<script>__<seed>__<timestamp>"""
    resume: str = ""
    """checkpoint.pt to continue; flags not given again are taken from it"""
    save_every: int = 100_000
    """steps between checkpoints, where environments are reset: many times num_envs x episode length; 0: at the end"""
    track: bool = False
    """mirror the logs to Weights & Biases"""
    compile: bool = False
    """torch.compile acting and loss (with CUDA graphs on a GPU)"""
    eval_episodes: int = 20
    """episodes of the greedy policy after training; 0 skips them"""
    capture_video: bool = False
    """write an mp4 of one greedy episode after training to <run-dir>/videos"""

    # task
    env_id: str = "CartPole-v1"
    """gymnasium environment with Box or Discrete observations and Discrete actions"""
    total_timesteps: int = 500_000
    """environment steps to train for (reset rows are not counted)"""
    num_envs: int = 20
    """N: environments stepped side by side, over all processes"""
    normalize = False  # no flag: replayed observations and rewards would have been scaled by outdated statistics

    # optimisation
    learning_rate: float = 2.5e-4
    """step size of Adam"""
    batch_size: int = 128
    """B: rows of a minibatch, over all processes"""
    train_every: int = 10
    """environment steps per minibatch"""
    learning_starts: int = 10_000
    """environment steps before the first minibatch is drawn"""

    # algorithm
    gamma: float = 0.99
    """discount γ"""
    buffer_size: int = 10_000
    """rows of the replay buffer, over all environments: one per step, one more per episode for its final observation"""
    target_every: int = 500
    """environment steps between copies of the network to the target network θ⁻ (Nature Algorithm 1)"""
    epsilon_start: float = 1.0
    """share ε of random actions at the start"""
    epsilon_end: float = 0.05
    """share ε of random actions in the end"""
    exploration_fraction: float = 0.5
    """share of total_timesteps over which ε goes linearly from start to end"""

    @property
    def exploration_steps(self) -> float:
        """Environment steps until ε reaches its end."""
        return self.exploration_fraction * self.total_timesteps

    @property
    def stack(self) -> int:
        """Frames that an observation stacks: known of Atari, other environments' observations are stored whole."""
        return 4 if self.env_id.startswith("ALE/") else 1


def validate(args: Args) -> None:
    """Check everything a user can get wrong before any work: one line and exit status 2 for the first fault."""
    check_ranges(args, 1, math.inf, "total_timesteps", "num_envs", "batch_size", "train_every", "target_every")
    check_ranges(args, 0, math.inf, "save_every", "eval_episodes", "learning_rate")
    check_ranges(args, 0, 1, "gamma", "epsilon_start", "epsilon_end", "exploration_fraction")
    check_ranges(args, args.batch_size, math.inf, "learning_starts")
    check_ranges(args, max(args.batch_size, 9 * args.num_envs), math.inf, "buffer_size")
    if args.learning_starts + args.train_every > args.total_timesteps:
        error(f"--learning-starts {args.learning_starts} and --train-every {args.train_every} leave no time to learn "
              f"within --total-timesteps {args.total_timesteps}")
    if args.num_envs % WORLD_SIZE or args.batch_size % WORLD_SIZE:
        error(f"--num-envs {args.num_envs} and --batch-size {args.batch_size} "
              f"must be multiples of the {WORLD_SIZE} processes")
    check_run(args, "env_id", "num_envs", "buffer_size")
    check_memory(args, obs_space=check_spaces(args, Discrete))


def check_memory(args: Args, obs_space: Box) -> None:
    """Refuse a replay buffer that this machine's memory cannot hold, once per process; 5 % is left to all else."""
    one_row = ReplayBuffer(1, 1, obs_space, args.stack)
    row_bytes = sum(x.nbytes for x in one_row.state_dict().values() if x.ndim)
    row_bytes *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    fitting = int(0.95 * available_memory() / row_bytes)
    if args.buffer_size > fitting:
        error(f"--buffer-size {args.buffer_size} needs {args.buffer_size * row_bytes / 1e9:.1f} GB, more memory than "
              f"is available: at most {fitting} rows fit")


def available_memory() -> int:
    """Bytes of memory that can be had without swapping; where the system does not tell, all it has."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        return int(meminfo.read_text().split("MemAvailable:")[1].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# --- model ---


def init_layer(layer: nn.Module, gain: float = math.sqrt(2)) -> nn.Module:
    """Orthogonal weights scaled by `gain`, zero bias; returns the layer."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def nature_cnn(channels: int, height: int, width: int) -> nn.Sequential:
    """Convolutions of Mnih et al. 2015: (B, channels, height, width) in [0, 1] to (B, 512) features."""
    convolutions = nn.Sequential(
        init_layer(nn.Conv2d(channels, 32, 8, stride=4)), nn.ReLU(),
        init_layer(nn.Conv2d(32, 64, 4, stride=2)), nn.ReLU(),
        init_layer(nn.Conv2d(64, 64, 3, stride=1)), nn.ReLU(),
        nn.Flatten(),
    )
    size = convolutions(torch.zeros(1, channels, height, width)).shape[1]
    return convolutions.append(init_layer(nn.Linear(size, 512))).append(nn.ReLU())


class QNetwork(nn.Module):
    """Q(s, ·), a value for each action: an MLP on vectors, the Nature CNN on pixels.

    obs_space is a Box: (C, H, W) uint8 pixels or anything else, flattened; action_space is Discrete.
    """

    def __init__(self, obs_space: Box, action_space: Discrete) -> None:
        super().__init__()
        self.num_actions = int(action_space.n)  # A
        if is_pixels(obs_space):
            self.trunk = nature_cnn(*obs_space.shape)
            self.head = init_layer(nn.Linear(512, self.num_actions), 1.0)
        else:
            self.trunk = nn.Sequential(
                nn.Flatten(),
                nn.Linear(math.prod(obs_space.shape), 120), nn.ReLU(),
                nn.Linear(120, 84), nn.ReLU(),
            )
            self.head = nn.Linear(84, self.num_actions)

    def forward(self, obs: Tensor) -> Tensor:
        """Observations (B, *obs) to Q (B, A); uint8 pixels are scaled to [0, 1]."""
        x = obs / 255 if obs.dtype == torch.uint8 else obs
        for layer in (*self.trunk, self.head):
            x = layer.forward(x)  # as layer(x) without the bookkeeping of a module call, a fifth of the time here
        return x

    def noise(self, epsilon: float, *shape: int) -> Tensor:
        """Exploration for `act`, (*shape, A) on the CPU: with probability ε infinity at a random action, else 0."""
        explore = torch.rand(*shape, 1) < epsilon
        choice = torch.randint(self.num_actions, (*shape, 1))
        return torch.zeros(*shape, self.num_actions).scatter_(-1, choice, torch.where(explore, math.inf, 0.0))

    def act(self, obs: Tensor, noise: Tensor | float) -> Tensor:
        """ε-greedy actions (B,) given the exploration noise (B, A); noise 0 gives the greedy action."""
        return (self(obs) + noise).argmax(-1)


class ReplayBuffer:
    """The last R rows of each of N environments, in a ring; a row is an observation and the step taken from it.

    Each frame is stored once: an observation (C, …) is a stack of `stack` frames of C / stack channels, zero where they
    would precede the episode, and only the newest is kept. The next observation is that of the next row, so a final
    observation has a row too, without a step. NumPy arrays, quicker than tensors at reading and writing a few rows.
    """

    def __init__(self, size: int, num_envs: int, obs_space: Box, stack: int) -> None:
        ring = size // num_envs, num_envs  # R, N
        channels, *shape = obs_space.shape
        obs_dtype = np.uint8 if is_pixels(obs_space) else np.float32
        self.stack = stack
        self.frames = np.zeros((*ring, channels // stack, *shape), obs_dtype)  # the newest of each observation
        self.first = np.zeros(ring, bool)  # whether the observation is the first of an episode
        self.steps = np.zeros((*ring, 3), np.float32)  # action, reward, terminated
        self.is_step = np.zeros(ring, bool)  # whether the row can be drawn
        self.count = np.zeros((), np.int64)  # rows written so far; the last has no step yet

    def begin(self, obs: np.ndarray, first: np.ndarray | bool) -> None:
        """Write a row of observations (N, *obs), still without steps; `first` (N,) tells which begin an episode.

        It replaces the oldest row. The oldest that are left can't be drawn either: their stacks have lost a frame.
        """
        rows = (self.count + np.arange(self.stack)) % len(self.frames)
        self.is_step[rows] = False
        self.frames[rows[0]], self.first[rows[0]] = obs[:, -self.frames.shape[2] :], first
        self.count += 1

    def add(self, steps: np.ndarray, next_obs: np.ndarray) -> None:
        """Complete the last row with its steps (N, 4), none where the mask in the last column is 0; begin the next."""
        row, is_step = (self.count - 1) % len(self.frames), steps[:, 3] > 0
        self.begin(next_obs, first=~is_step)
        self.steps[row], self.is_step[row] = steps[:, :3], is_step

    def draw(self, count: int) -> Tensor:
        """Indices (count,) of steps, uniform with replacement; row r of environment n has index r·N + n."""
        is_step = self.is_step[: self.count].reshape(-1)
        indices = torch.randint(len(is_step), (count,)).numpy()
        while not (good := is_step[indices]).all():
            indices[~good] = torch.randint(len(is_step), (np.count_nonzero(~good),)).numpy()
        return torch.from_numpy(indices)

    def get(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Obs (B, *obs), actions, rewards, terminated (B,) and next obs (B, *obs) of the steps `indices` (B,)."""
        rows, num_envs = indices.numpy(), self.is_step.shape[1]
        actions, rewards, terminated = torch.from_numpy(self.steps.reshape(-1, 3)[rows]).unbind(-1)
        obs, next_obs = self.observations(np.stack([rows, rows + num_envs]) % self.is_step.size)
        return obs, actions.long(), rewards, terminated, next_obs

    def observations(self, indices: np.ndarray) -> Tensor:
        """Rebuild the observations (2, B, *obs) of the rows `indices` (2, B)."""
        all_frames = self.frames.reshape(-1, *self.frames.shape[2:])
        if self.stack == 1:
            return torch.from_numpy(all_frames[indices])  # nothing to rebuild
        back = np.arange(self.stack - 1, -1, -1) * self.is_step.shape[1]
        indices = (indices[..., None] - back) % self.is_step.size  # (2, B, stack), the newest frame comes last
        frames, first = all_frames[indices], self.first.reshape(-1)[indices]
        frames[first[..., ::-1].cumsum(-1)[..., ::-1] > first] = 0  # an episode began after this frame
        return torch.from_numpy(frames).flatten(2, 3)

    def state_dict(self) -> dict[str, Tensor]:
        """The contents, as tensors that share their memory."""
        return {name: torch.from_numpy(x) for name, x in vars(self).items() if isinstance(x, np.ndarray)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy the contents from another buffer's state_dict."""
        for name, x in self.state_dict().items():
            x.copy_(state[name])


# --- algorithm ---


def epsilon_at(step: int, start: float, end: float, duration: float) -> float:
    """Linear schedule of ε: `start` at step 0, `end` from step `duration` on."""
    return start + (end - start) * min(1.0, step / max(1.0, duration))


def minibatches_due(step: int, learning_starts: int, train_every: int) -> int:
    """Minibatches that should have been learnt from by `step`: one per train_every steps after learning_starts."""
    return max(0, step - learning_starts) // train_every


def td_target(rewards: Tensor, next_q: Tensor, terminated: Tensor, gamma: float) -> Tensor:
    """Target of Q(s, a) (y of DQN Eq. 2): r + γ·max_a' Q(s', a'; θ⁻)·(1 - terminated).

    rewards (B,), next_q = Q(s', ·; θ⁻) (B, A), terminated (B,) to (B,). A truncated step is not terminated.
    """
    assert rewards.shape == terminated.shape == next_q.shape[:1], (rewards.shape, terminated.shape, next_q.shape)
    return rewards + gamma * next_q.max(-1).values * (1 - terminated)  # DQN Eq. 2


def squared_error(values: Tensor, targets: Tensor) -> Tensor:
    """(y - Q(s, a))² per sample (DQN Eq. 2), all (B,)."""
    assert values.shape == targets.shape and values.ndim == 1, (values.shape, targets.shape)
    return nn.functional.mse_loss(values, targets, reduction="none")  # DQN Eq. 2, one operation instead of two


def q_loss(q_network: nn.Module, obs: Tensor, actions: Tensor, targets: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Loss of a minibatch (DQN Eq. 2; its gradient is Eq. 3 times -2) and its METRICS (2,).

    obs (B, *obs), actions (B,), targets (B,); count is the number of rows over all processes.
    """
    values = q_network(obs).gather(-1, actions[:, None]).squeeze(-1)  # (B,)
    loss = squared_error(values, targets).sum() / count
    return loss, torch.stack([loss.detach(), values.detach().sum() / count])


METRICS = ("td_loss", "q_values")


# --- plumbing (same in every script; skip on first read) ---

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
SCRIPT = Path(__file__).stem
LOG_EVERY = 1000  # environment steps


def error(message: str, status: int = 2) -> NoReturn:
    """Tell the user in one line what is wrong and exit."""
    if RANK == 0:
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)


def parse_args() -> Args:
    """Args from the command line, on top of those of the checkpoint when resuming."""

    def parse(defaults: Args) -> Args:
        box = io.StringIO()
        try:
            with contextlib.redirect_stderr(box):
                return tyro.cli(Args, default=defaults, description=__doc__.splitlines()[0])
        except SystemExit as stop:
            if stop.code:  # tyro draws a box of several lines
                lines = [line.strip("│╭╮╰╯ ") for line in box.getvalue().splitlines()]
                error(" ".join(";" if line.startswith("─") else line for line in lines[1:-1]))
            raise

    args = parse(Args())
    if args.resume:
        saved = load_checkpoint(args.resume)["args"]
        if set(saved) != {field.name for field in fields(Args)}:
            error(f"--resume {args.resume}: written by another version of {SCRIPT}.py")
        args = parse(Args(**saved | {"resume": args.resume, "run_dir": str(Path(args.resume).parent)}))
    return args


def check_ranges(args: Args, low: float, high: float, *names: str) -> None:
    """Refuse numbers outside [low, high], by flag name."""
    for name in names:
        if not low <= getattr(args, name) <= high:
            range_ = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            error(f"--{name.replace('_', '-')} must be {range_}, not {getattr(args, name)}")


def check_run(args: Args, *fixed: str) -> None:
    """Refuse a missing device or package, a run directory that is taken, a checkpoint that does not fit.

    `fixed` names flags that a resumed run cannot change.
    """
    check_ranges(args, 0, 2**31 - 1, "seed")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if args.device == "cuda" and not gpus:
        error("--device cuda: torch finds no CUDA device; use --device cpu or auto")
    if args.device != "cpu" and gpus and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > gpus:
        error(f"--device {args.device}: there are more processes than the {gpus} GPUs; use --device cpu or fewer")
    if args.compile:
        try:
            torch.compile(lambda x: x + 1)(torch.ones(2, device="cuda" if args.device != "cpu" and gpus else "cpu"))
        except Exception as fault:  # no C++ compiler, say
            error(f"--compile: torch.compile does not work here ({' '.join(str(fault).split())[:200]})")
    if args.track:
        check_package("track", "wandb")
    if args.resume:
        saved = load_checkpoint(args.resume)["args"]
        for name in fixed:
            if getattr(args, name) != saved[name]:
                error(f"--resume {args.resume}: made with {name} {saved[name]}, not {getattr(args, name)}")
    run_dir = Path(args.run_dir)
    if args.run_dir and (run_dir / "args.json").exists():
        if not args.resume or Path(args.resume).resolve().parent != run_dir.resolve():
            error(f"--run-dir {run_dir} already holds a run: choose another, or --resume {run_dir}/checkpoint.pt")


def check_package(flag: str, *packages: str) -> None:
    """Refuse a flag whose packages are not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            error(f"--{flag} needs the package {package}")


def check_spaces(args: Args, *action_types: type) -> Box:
    """Observation space of the environment; refuses one that can't be made or whose spaces are not handled."""
    if "ALE/" in args.env_id and not args.env_id.startswith("ALE/"):
        error(f"--env-id {args.env_id}: leave out what stands before ALE/")
    if args.capture_video:
        check_package("capture-video", "moviepy", *["cv2"] * args.env_id.startswith("ALE/"))
    try:
        envs = make_envs(args.env_id, 1, False, args.gamma)
        if args.capture_video:
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
                recorded = make_envs(args.env_id, 1, False, args.gamma, Path(folder))
                recorded.reset()  # renders a frame, which needs a display or OpenGL for some
                recorded.close()
    except Exception as fault:  # environments raise what they like
        reason = " ".join(str(fault).split()) or type(fault).__name__
        error(f"--env-id {args.env_id}{' with --capture-video' * args.capture_video}: {reason}")
    obs, action = envs.single_observation_space, envs.single_action_space
    envs.close()
    if not isinstance(obs, Box) or obs.shape == ():
        error(f"--env-id {args.env_id}: observations must be Box (not a single number) or Discrete, not {obs}")
    if is_pixels(obs) and (min(obs.shape[1:]) < 36 or args.normalize):
        error(f"--env-id {args.env_id}: pixels must be at least 36 x 36 and without --normalize, not {obs.shape}")
    flat = len(action.shape) == 1 if isinstance(action, Box) else getattr(action, "start", 0) == 0
    if not isinstance(action, action_types) or not flat:
        kinds = " or ".join({Discrete: "Discrete from 0", Box: "one-dimensional Box"}[kind] for kind in action_types)
        error(f"--env-id {args.env_id}: actions must be {kinds}, not {action}")
    return obs


def is_pixels(space: gym.Space) -> bool:
    """Whether observations are images: three dimensions of uint8."""
    return space.dtype == np.uint8 and len(space.shape) == 3


def make_envs(env_id: str, num_envs: int, normalize: bool, gamma: float,
              video: Path | None = None) -> gym.vector.VectorEnv:
    """Vector environment with NEXT_STEP autoreset, raw episode statistics in `info`, and Box observations.

    Discrete observations become one-hot, pixels (C, H, W); Box actions are clipped to their bounds. With `normalize`,
    observations are standardised and rewards scaled by running statistics, both clipped to ±10. The first episode of
    each environment is recorded in the folder `video`.
    """
    atari = env_id.startswith("ALE/")
    kwargs: dict[str, Any] = {"repeat_action_probability": 0.0} if atari else {}
    if video is not None:  # native vector environments cannot be recorded: step single ones
        wrappers = [lambda env: RecordVideo(env, str(video), episode_trigger=lambda episode: episode == 0)]
        if atari:
            kwargs["frameskip"] = 1  # AtariPreprocessing skips
            wrappers += [AtariPreprocessing, lambda env: FrameStackObservation(env, 4, padding_type="zero")]
        kwargs |= {"vectorization_mode": "sync", "render_mode": "rgb_array", "wrappers": wrappers}
    elif atari:
        kwargs["reward_clipping"] = False  # clipped below, after the statistics
    envs = gym.make_vec(f"ale_py:{env_id}" if atari else env_id, num_envs, **kwargs)
    if envs.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.NEXT_STEP:
        raise gym.error.Error("its vector environment does not reset at the next step (AutoresetMode.NEXT_STEP)")
    envs = wrap.RecordEpisodeStatistics(envs)
    obs = envs.single_observation_space
    if isinstance(obs, Discrete):
        envs = wrap.FlattenObservation(envs)
    elif is_pixels(obs) and obs.shape[-1] in (1, 3, 4):
        chw = Box(0, 255, (obs.shape[2], *obs.shape[:2]), np.uint8)
        envs = wrap.TransformObservation(envs, lambda x: x.transpose(0, 3, 1, 2), single_observation_space=chw)
    if isinstance(envs.single_action_space, Box):
        envs = wrap.ClipAction(envs)
    if normalize:
        envs = wrap.TransformObservation(wrap.NormalizeObservation(envs), lambda x: x.clip(-10, 10))
        envs = wrap.TransformReward(wrap.NormalizeReward(envs, gamma), lambda x: x.clip(-10, 10))
    return wrap.TransformReward(envs, np.sign) if atari else envs


def to_tensor(obs: np.ndarray, device: torch.device) -> Tensor:
    """Observations on the device: pixels stay uint8, anything else becomes float32."""
    return torch.as_tensor(obs if obs.dtype == np.uint8 and obs.ndim == 4 else obs.astype(np.float32), device=device)


def normalizers(envs: gym.vector.VectorEnv) -> Iterator[tuple[str, Any, Any]]:
    """Name, wrapper and running mean, variance and count of each normalising wrapper around `envs`."""
    while isinstance(envs, gym.vector.VectorWrapper):
        if isinstance(envs, wrap.NormalizeObservation):
            yield "obs", envs, envs.obs_rms
        if isinstance(envs, wrap.NormalizeReward):
            yield "reward", envs, envs.return_rms
        envs = envs.env


def set_statistics(envs: gym.vector.VectorEnv, state: dict[str, Tensor], frozen: bool = False) -> None:
    """Put the result of `get_statistics` into the normalisers; frozen ones no longer learn."""
    for name, wrapper, rms in normalizers(envs):
        rms.mean, rms.var = state[f"{name}.mean"].numpy(), state[f"{name}.var"].numpy()
        rms.count = state[f"{name}.count"].item() / WORLD_SIZE
        wrapper.update_running_mean = not frozen


def evaluate(agent: nn.Module, envs: gym.vector.VectorEnv, statistics: dict[str, Tensor], seed: int) -> np.ndarray:
    """Raw returns (N,) of the greedy policy over the first episode of each environment; closes them."""
    set_statistics(envs, statistics, frozen=True)
    device = next(agent.parameters()).device
    returns = np.full(envs.num_envs, np.nan)
    obs, _ = envs.reset(seed=seed)
    while np.isnan(returns).any():
        with torch.no_grad():
            action = agent.act(to_tensor(obs, device), 0.0)
        obs, _, terminated, truncated, info = envs.step(action.cpu().numpy())
        first = (terminated | truncated) & np.isnan(returns)
        if first.any():
            returns[first] = info["episode"]["r"][first]
    envs.close()
    return returns


def start_processes(device: str) -> torch.device:
    """Join the other processes of torchrun, if any; returns this process's device."""
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if WORLD_SIZE > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def sum_over_processes(x: Tensor) -> Tensor:
    """Add up a tensor over all processes, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(x)
    return x


def gather_rows(x: np.ndarray) -> np.ndarray:
    """(N of this process, …) to (N of all processes, …)."""
    if WORLD_SIZE == 1:
        return x
    parts = [torch.empty(x.shape, dtype=torch.from_numpy(x).dtype) for _ in range(WORLD_SIZE)]
    dist.all_gather(parts, torch.from_numpy(np.ascontiguousarray(x)))
    return torch.cat(parts).numpy()


def own(x: Tensor, dim: int = 0) -> Tensor:
    """This process's share of a tensor along one dimension."""
    return x.chunk(WORLD_SIZE, dim)[RANK]


def open_run(args: Args, task: str, step: int, finished: bool) -> tuple[Path, Any]:
    """Create the run directory with args.json; returns it and a TensorBoard writer that continues after `step`.

    Other processes than the first write nothing; a finished run, which is only evaluated, logs nothing.
    """
    name = f"{task.replace('/', '_')}__{SCRIPT}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(args.run_dir or f"runs/{name}")
    silent = SimpleNamespace(add_scalar=lambda *_: None, add_text=lambda *_: None, close=lambda: None)
    if RANK > 0:
        return run_dir, silent
    try:
        run_dir.mkdir(parents=True, exist_ok=bool(args.run_dir))
        if finished:
            return run_dir, silent
        (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
    except OSError as fault:
        error(f"--run-dir {run_dir}: cannot write there ({fault.strerror})")
    if args.track:
        import wandb
        wandb.init(project="algos", name=run_dir.name, config=asdict(args), dir=run_dir, sync_tensorboard=True)
    return run_dir, SummaryWriter(run_dir, purge_step=step + 1 if args.resume else None)


def log(writer: Any, group: str, metrics: dict[str, float], step: int) -> None:
    """Write metrics to TensorBoard as group/name, or as name when the group is empty."""
    for name, value in metrics.items():
        writer.add_scalar(f"{group}/{name}".lstrip("/"), value, step)


def log_episodes(writer: Any, bar: tqdm, episodes: np.ndarray, step: int) -> None:
    """Log mean return and length of the episodes of all processes, given (number, sum of returns, sum of lengths)."""
    number, returns, lengths = sum_over_processes(torch.from_numpy(episodes)).tolist()
    if number:
        means = {"episodic_return": returns / number, "episodic_length": lengths / number, "episodes": number}
        log(writer, "charts", means, step)
        bar.set_postfix_str(f"return {returns / number:.1f}", refresh=False)


def passes(every: int, before: int, after: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]; never for 0."""
    return every > 0 and after // every > before // every


def load_checkpoint(path: str) -> dict[str, Any]:
    """Read a checkpoint of this script on the CPU, without running code from it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        script = state["script"]
    except FileNotFoundError:
        error(f"--resume {path}: no such file")
    except Exception as fault:  # torch.load raises a dozen types on damaged files
        error(f"--resume {path}: not a readable checkpoint ({type(fault).__name__})")
    if script != SCRIPT:
        error(f"--resume {path}: written by {script}.py, not {SCRIPT}.py")
    return state


def save_checkpoint(run_dir: Path, args: Args, **state: Any) -> None:
    """Write all that a bit-exact continuation needs; a crash while writing leaves the former checkpoint whole."""
    state |= {"script": SCRIPT, "args": asdict(args), "rng": torch.get_rng_state()}
    if RANK == 0:
        torch.save(state, run_dir / "checkpoint.tmp")
        os.replace(run_dir / "checkpoint.tmp", run_dir / "checkpoint.pt")


def check_finite(loss: float, step: int, run_dir: Path, bar: tqdm) -> None:
    """Stop with exit status 1 when the loss is NaN or infinite: the weights are lost, the last checkpoint is not."""
    if not math.isfinite(loss):
        bar.close()
        saved = run_dir / "checkpoint.pt"
        last = f"the last good checkpoint is {saved}" if saved.exists() else "none was saved yet (--save-every)"
        error(f"the loss became {loss} at step {step}; {last}", status=1)


def finish(args: Args, agent: nn.Module, statistics: dict[str, Tensor], run_dir: Path, writer: Any, step: int) -> None:
    """Write model.safetensors (weights, and running statistics as normalizer.*), evaluate, record a video."""
    if RANK > 0:
        return
    tensors = agent.state_dict() | {f"normalizer.{name}": x for name, x in statistics.items()}
    save_file(tensors, run_dir / "model.safetensors", metadata={"env_id": args.env_id})
    if args.eval_episodes:
        envs = make_envs(args.env_id, args.eval_episodes, args.normalize, args.gamma)
        returns = evaluate(agent, envs, statistics, seed=int(torch.randint(2**30, ())))
        log(writer, "eval", {"return_mean": returns.mean(), "return_std": returns.std()}, step)
        print(f"evaluation: return {returns.mean():.2f} ± {returns.std():.2f} over {len(returns)} greedy episodes")
    if args.capture_video:
        envs = make_envs(args.env_id, 1, args.normalize, args.gamma, video=run_dir / "videos")
        evaluate(agent, envs, statistics, seed=int(torch.randint(2**30, ())))
    print(f"run directory: {run_dir}")


def main(args: Args) -> None:
    validate(args)
    device = start_processes(args.device)
    torch.manual_seed(args.seed)  # the same in every process: all draw the same numbers and use their share
    N, B = args.num_envs // WORLD_SIZE, args.batch_size  # here N counts the environments of this process
    envs = make_envs(args.env_id, N, args.normalize, args.gamma)
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    if device.type == "cpu" and not is_pixels(obs_space):
        torch.set_num_threads(1)  # small MLPs only lose time to more

    agent = QNetwork(obs_space, action_space).to(device)
    target_network = copy.deepcopy(agent).requires_grad_(False)  # θ⁻
    parameters = list(agent.parameters())
    optimizer = torch.optim.Adam(parameters, args.learning_rate, fused=True)
    buffer = ReplayBuffer(args.buffer_size, args.num_envs, obs_space, args.stack)  # of all processes, in each of them
    act, loss_fn = agent.act, q_loss
    if args.compile:
        mode = "reduce-overhead" if device.type == "cuda" else "default"  # reduce-overhead: CUDA graphs
        act, loss_fn = torch.compile(act, mode=mode), torch.compile(loss_fn, mode=mode)

    step = 0
    if args.resume:
        saved = load_checkpoint(args.resume)
        step = saved["step"]
        agent.load_state_dict(saved["agent"])
        target_network.load_state_dict(saved["target_network"])
        optimizer.load_state_dict(saved["optimizer"])
        optimizer.param_groups[0]["lr"] = args.learning_rate
        buffer.load_state_dict(saved["buffer"])
        torch.set_rng_state(saved["rng"])
    run_dir, writer = open_run(args, args.env_id, step, finished=step >= args.total_timesteps)

    steps = np.zeros((N, 4), dtype=np.float32)  # action, reward, terminated, mask
    history, episodes = [], np.zeros(3)  # METRICS per minibatch; number, returns, lengths of episodes
    start_step, start_time, restart = step, time.perf_counter(), True
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=RANK > 0)

    while step < args.total_timesteps:
        # ===== collect =====
        if restart:  # at the start and after each checkpoint, since environments cannot be saved
            obs, _ = envs.reset(seed=int(torch.randint(2**30, ())) + RANK * N)
            buffer.begin(gather_rows(obs), first=True)
            prev_done, restart = np.zeros(N, dtype=bool), False
        epsilon = epsilon_at(step, args.epsilon_start, args.epsilon_end, args.exploration_steps)
        noise = own(agent.noise(epsilon, args.num_envs)).to(device)  # (N, A)
        with torch.no_grad():
            action = act(to_tensor(obs, device), noise).cpu().numpy()  # (N,)
        obs, reward, terminated, truncated, info = envs.step(action)
        done = terminated | truncated
        steps.T[:] = action, reward, terminated, ~prev_done  # (N, 4); the row after `done` is no step
        all_steps = gather_rows(steps)  # of all processes
        buffer.add(all_steps, gather_rows(obs))
        if done.any():
            episodes += done.sum(), info["episode"]["r"][done].sum(), info["episode"]["l"][done].sum()
        prev_done = done
        step_before, step = step, step + int(all_steps[:, 3].sum())

        # ===== compute targets =====
        learnt, due = (minibatches_due(s, args.learning_starts, args.train_every) for s in (step_before, step))
        indices = own(buffer.draw((due - learnt) * B).view(-1, B), dim=1)  # (K, B): all minibatches that are due
        b_obs, b_actions, b_rewards, b_terminated, b_next_obs = (x.to(device) for x in buffer.get(indices.flatten()))
        with torch.no_grad():
            b_targets = td_target(b_rewards, target_network(b_next_obs), b_terminated, args.gamma)  # (K·B,)

        # ===== update =====
        for start in range(0, len(b_targets), B // WORLD_SIZE):
            mb = slice(start, start + B // WORLD_SIZE)
            loss, metrics = loss_fn(agent, b_obs[mb], b_actions[mb], b_targets[mb], B)
            for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters)):
                parameter.grad = sum_over_processes(grad)
            optimizer.step()
            history.append(sum_over_processes(metrics).clone())
        if passes(args.target_every, step_before, step):
            target_network.load_state_dict(agent.state_dict())

        # ===== log and save =====
        save = step >= args.total_timesteps or passes(args.save_every, step_before, step)
        if save or due > learnt == 0 or passes(LOG_EVERY, step_before, step):
            if history:
                losses = dict(zip(METRICS, torch.stack(history).mean(0).tolist()))
                check_finite(sum(losses.values()), step, run_dir, bar)
                log(writer, "losses", losses, step)
            log_episodes(writer, bar, episodes, step)
            speed = (step - start_step) / (time.perf_counter() - start_time)
            log(writer, "charts", {"SPS": speed, "epsilon": epsilon}, step)
            history, episodes = [], np.zeros(3)
        if save:
            save_checkpoint(run_dir, args, step=step, agent=agent.state_dict(), optimizer=optimizer.state_dict(),
                            target_network=target_network.state_dict(), buffer=buffer.state_dict())
            restart = True
        bar.update(step - step_before)

    bar.close()
    envs.close()
    finish(args, agent, {}, run_dir, writer, step)
    writer.close()


if __name__ == "__main__":
    main(parse_args())
    if WORLD_SIZE > 1:
        sys.stdout.flush()
        os._exit(0)  # an interpreter that ends in the usual way may meet gloo's threads, still at work, and abort
