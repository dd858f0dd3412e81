# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "ale-py>=0.12.1",
#     "gymnasium[classic-control,mujoco]>=1.4.0",
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
"""Advantage Actor-Critic (A2C): a policy gradient whose variance a learnt value function takes down.

REINFORCE weighs every action by the return that followed, most of which the action did not cause. A critic V(s) learns
what was to be expected: its TD errors say after a few steps how much better an action was, so updates come often.

Paper: Mnih et al. 2016, "Asynchronous Methods for Deep Reinforcement Learning" (A3C), arXiv 1602.01783, here with all
actors in step. n-step returns are GAE with λ = 1, Schulman et al. 2015, arXiv 1506.02438.

    python algos/a2c.py                           # CartPole-v1: trains to 500.0 ± 0.0 (5 seeds) in 17 s
    python algos/a2c.py --env-id Acrobot-v1
    python algos/a2c.py --env-id HalfCheetah-v5 --normalize --total-timesteps 1000000 --num-envs 8 --learning-rate 7e-4
    python algos/a2c.py --env-id ALE/Pong-v5 --total-timesteps 10000000 --learning-rate 7e-4 --ent-coef 0.01

Letters: T steps of a rollout, N environments, B = T·N rows, A size of the action (number of choices or of dimensions).

Environments reset themselves one step late (gymnasium's NEXT_STEP). The observation that comes with `done` is the true
final one, so V(final observation) is just the next row's value; that next row ignores its action, is not a step, and
is masked out of everything.

Logged every 1,000 steps: charts/episodic_return and episodic_length, means over the charts/episodes episodes that ended
since the last time (raw scores, before normalisation or clipping); charts/SPS, environment steps per second since the
start; losses/*, means over the updates since the last time: policy_loss, value_loss, entropy, grad_norm (before
clipping). eval/* is the greedy policy on fresh environments.

Differs from the paper:
 1. Synchronous: one process steps N environments and updates on all of them, where A3C's threads update on their own.
 2. Vectors: separate networks for actor and critic; pixels: one Nature CNN for both. Orthogonal initialisation.
 3. RMSprop is torch's, which adds eps outside the root, as Stable-Baselines3 does; the paper's has it inside.
 4. Truncated episodes bootstrap with V(final observation); only a termination ends the return.
 5. Box actions: Gaussian with one learnt standard deviation per dimension. The environment receives the action clipped
    to its bounds, the log-probability is that of the sampled one.
 6. Atari: no sticky actions, whole games (losing a life ends nothing), training rewards clipped to their sign.
"""

import contextlib
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
from torch.distributions import Normal
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
    """torch.compile acting and the network's pass over a rollout (with CUDA graphs on a GPU)"""
    eval_episodes: int = 20
    """episodes of the greedy policy after training; 0 skips them"""
    capture_video: bool = False
    """write an mp4 of one greedy episode after training to <run-dir>/videos"""

    # task
    env_id: str = "CartPole-v1"
    """gymnasium environment with Box or Discrete observations and Box or Discrete actions"""
    total_timesteps: int = 500_000
    """environment steps to train for (reset rows are not counted)"""
    num_envs: int = 16
    """N: environments stepped side by side, over all processes"""
    normalize: bool = False
    """standardise observations and scale rewards by running statistics (for MuJoCo)"""

    # optimisation
    learning_rate: float = 1e-3
    """step size of RMSprop at the start"""
    anneal_lr: bool = False
    """let the learning rate fall linearly to 0"""
    num_steps: int = 5
    """T: steps per environment between two updates (A3C's t_max)"""
    max_grad_norm: float = 0.5
    """largest global norm of the gradient; inf turns the clip off"""

    # algorithm
    gamma: float = 0.99
    """discount γ"""
    gae_lambda: float = 1.0
    """λ of generalised advantage estimation (GAE Eq. 16); 1 gives n-step returns"""
    ent_coef: float = 0.0
    """entropy coefficient (A3C's β)"""
    vf_coef: float = 1.0
    """value loss coefficient, on half the squared error"""


def validate(args: Args) -> None:
    """Check everything a user can get wrong before any work: one line and exit status 2 for the first fault."""
    check_ranges(args, 1, math.inf, "total_timesteps", "num_envs", "num_steps")
    check_ranges(args, 0, math.inf, "save_every", "eval_episodes", "ent_coef", "vf_coef", "learning_rate")
    check_ranges(args, 0, math.inf, "max_grad_norm")
    check_ranges(args, 0, 1, "gamma", "gae_lambda")
    if args.num_envs % WORLD_SIZE:
        error(f"--num-envs {args.num_envs} must be a multiple of the {WORLD_SIZE} processes")
    check_run(args, "env_id", "normalize")
    check_spaces(args, Discrete, Box)


# --- model ---


def init_layer(layer: nn.Module, gain: float = math.sqrt(2)) -> nn.Module:
    """Orthogonal weights scaled by `gain`, zero bias; returns the layer."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(inputs: int, outputs: int, output_gain: float) -> nn.Sequential:
    """Two tanh layers of 64 and a linear head: (B, inputs) to (B, outputs)."""
    return nn.Sequential(
        init_layer(nn.Linear(inputs, 64)), nn.Tanh(),
        init_layer(nn.Linear(64, 64)), nn.Tanh(),
        init_layer(nn.Linear(64, outputs), output_gain),
    )


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


class Agent(nn.Module):
    """Actor and critic: separate MLPs on vectors, two linear heads on one CNN on pixels.

    obs_space is a Box: (C, H, W) uint8 pixels or anything else, flattened; action_space Discrete or 1-D Box.
    """

    def __init__(self, obs_space: Box, action_space: gym.Space) -> None:
        super().__init__()
        self.discrete = isinstance(action_space, Discrete)
        self.action_size = int(action_space.n if self.discrete else action_space.shape[0])  # A
        if is_pixels(obs_space):
            self.trunk = nature_cnn(*obs_space.shape)
            self.actor = init_layer(nn.Linear(512, self.action_size), 0.01)
            self.critic = init_layer(nn.Linear(512, 1), 1.0)
        else:
            self.trunk = nn.Flatten()
            self.actor = mlp(math.prod(obs_space.shape), self.action_size, 0.01)
            self.critic = mlp(math.prod(obs_space.shape), 1, 1.0)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.zeros(self.action_size))

    def features(self, obs: Tensor) -> Tensor:
        """(B, *obs) to (B, features); uint8 pixels are scaled to [0, 1]."""
        return self.trunk(obs / 255 if obs.dtype == torch.uint8 else obs)

    def forward(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log π(a|s), entropy of π(·|s) and V(s), (B,) each, of observations (B, *obs) and actions (B,) or (B, A)."""
        features = self.features(obs)
        policy, values = self.actor(features), self.critic(features).squeeze(-1)  # (B, A), (B,)
        if self.discrete:
            logprobs = policy.log_softmax(-1)  # of all actions
            entropy = -(logprobs.exp() * logprobs).sum(-1)
            return logprobs.gather(-1, actions.long()[:, None]).squeeze(-1), entropy, values
        normal = Normal(policy, self.log_std.exp(), validate_args=False)
        return normal.log_prob(actions).sum(-1), normal.entropy().sum(-1), values

    def noise(self, *shape: int) -> Tensor:
        """Random numbers for `act`, (*shape, A) on the CPU: Gumbel for Discrete, standard normal for Box actions."""
        noise = torch.empty(*shape, self.action_size)
        return noise.exponential_().log_().neg_() if self.discrete else noise.normal_()

    def act(self, obs: Tensor, noise: Tensor | float) -> Tensor:
        """Sample a ~ π(·|s) given its noise (B, A); noise 0 gives the greedy action. (B,) int or (B, A) float."""
        policy = self.actor(self.features(obs))
        if self.discrete:
            return (policy + noise).argmax(-1)  # argmax(logits + Gumbel noise) is a draw from softmax(logits)
        return policy + self.log_std.exp() * noise


# --- algorithm ---


def compute_gae(rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, done: Tensor,
                gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation (GAE Eq. 16; PPO Eq. 11-12), all arguments and result (T, N).

    A_t = δ_t + γλ·(1 - done_t)·A_{t+1} with δ_t = r_t + γ·V(s_{t+1})·(1 - terminated_t) - V(s_t).
    `terminated` ends the return; `done` (terminated or truncated) only cuts the sum over later δ.
    """
    deltas = rewards + gamma * next_values * (1 - terminated) - values  # PPO Eq. 12
    carry = gamma * lam * (1 - done)
    advantages = torch.empty_like(deltas)
    advantage = torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        advantage = deltas[t] + carry[t] * advantage  # PPO Eq. 11
        advantages[t] = advantage
    return advantages


def policy_gradient_loss(logprobs: Tensor, weights: Tensor) -> Tensor:
    """Loss per sample, -log π(a|s)·weight. With returns or advantages as weights its gradient is that of -J."""
    return -logprobs * weights


def a2c_loss(logprobs: Tensor, entropy: Tensor, values: Tensor, advantages: Tensor, returns: Tensor, mask: Tensor,
             count: Tensor, *, vf_coef: float, ent_coef: float) -> tuple[Tensor, Tensor]:
    """Loss of a rollout (A3C §4) and its METRICS (3,).

    Tensors are (T, N). Rows with mask 0 don't count; count () is the number of rows that do, over all processes.
    """
    samples = torch.stack([policy_gradient_loss(logprobs, advantages), 0.5 * (values - returns) ** 2, entropy])
    metrics = (samples * mask).sum((1, 2)) / count  # means over the rows that count
    policy_term, value_term, entropy_term = metrics
    loss = policy_term + vf_coef * value_term - ent_coef * entropy_term
    return loss, metrics.detach()


METRICS = ("policy_loss", "value_loss", "entropy")


def annealed(initial: float, step: int, total_steps: int) -> float:
    """Linear schedule: `initial` at step 0, 0 at total_steps."""
    return initial * (1 - step / total_steps)


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


def get_statistics(envs: gym.vector.VectorEnv) -> dict[str, Tensor]:
    """Running statistics of the normalisers, pooled over processes first."""
    state = {}
    for name, _, rms in normalizers(envs):
        if WORLD_SIZE > 1:
            mean = np.asarray(rms.mean, dtype=np.float64)
            sums = rms.count * np.stack([np.ones_like(mean), mean, rms.var + mean**2])
            counts, *sums = sum_over_processes(torch.tensor(sums)).numpy()
            mean, square = (x / counts for x in sums)
            rms.mean, rms.var, rms.count = mean, square - mean**2, counts.max() / WORLD_SIZE
        state |= {f"{name}.mean": torch.as_tensor(rms.mean), f"{name}.var": torch.as_tensor(rms.var),
                  f"{name}.count": torch.tensor(rms.count * WORLD_SIZE, dtype=torch.float64)}
    return state


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
    T, N = args.num_steps, args.num_envs // WORLD_SIZE  # here N counts the environments of this process
    envs = make_envs(args.env_id, N, args.normalize, args.gamma)
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    if device.type == "cpu" and not is_pixels(obs_space):
        torch.set_num_threads(1)  # small MLPs only lose time to more

    agent = Agent(obs_space, action_space).to(device)
    parameters = list(agent.parameters())
    optimizer = torch.optim.RMSprop(parameters, args.learning_rate, alpha=0.99, eps=1e-5, foreach=True)
    act, policy_and_value = agent.act, agent
    if args.compile:
        mode = "reduce-overhead" if device.type == "cuda" else "default"  # reduce-overhead: CUDA graphs
        act, policy_and_value = torch.compile(act, mode=mode), torch.compile(agent, mode=mode)

    step = 0
    if args.resume:
        saved = load_checkpoint(args.resume)
        step = saved["step"]
        agent.load_state_dict(saved["agent"])
        optimizer.load_state_dict(saved["optimizer"])
        set_statistics(envs, saved["statistics"])
        torch.set_rng_state(saved["rng"])
    statistics = get_statistics(envs)
    run_dir, writer = open_run(args, args.env_id, step, finished=step >= args.total_timesteps)

    obs_dtype = np.uint8 if is_pixels(obs_space) else np.float32
    obs = np.zeros((T + 1, N, *obs_space.shape), dtype=obs_dtype)
    actions = np.zeros((T + 1, N, *action_space.shape), dtype=np.float32)  # the last row stays 0
    flags = np.zeros((4, T, N), dtype=np.float32)  # reward, terminated, done, mask
    history, episodes = [], np.zeros(3)  # METRICS and gradient norm per update; number, returns, lengths of episodes
    start_step, start_time, restart = step, time.perf_counter(), True
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=RANK > 0)

    while step < args.total_timesteps:
        # ===== collect =====
        if restart:  # at the start and after each checkpoint, since environments cannot be saved
            obs[T], _ = envs.reset(seed=int(torch.randint(2**30, ())) + RANK * N)
            prev_done, restart = np.zeros(N, dtype=bool), False
        obs[0] = obs[T]
        noise = own(agent.noise(T, args.num_envs), dim=1).to(device)  # (T, N, A)
        for t in range(T):
            with torch.no_grad():
                action = act(torch.as_tensor(obs[t], device=device), noise[t]).cpu().numpy()  # (N,) or (N, A)
            obs[t + 1], reward, terminated, truncated, info = envs.step(action)
            actions[t], done = action, terminated | truncated
            flags[:, t] = reward, terminated, done, ~prev_done  # the row after `done` is the reset, not a step
            if done.any():
                episodes += done.sum(), info["episode"]["r"][done].sum(), info["episode"]["l"][done].sum()
            prev_done = done

        # ===== compute targets =====
        rewards, terminated, done, mask = torch.tensor(flags, device=device)  # (T, N) each
        b_obs, b_actions = (torch.as_tensor(x, device=device).flatten(0, 1) for x in (obs, actions))
        logprobs, entropy, values = (x.view(T + 1, N) for x in policy_and_value(b_obs, b_actions))
        v = values.detach()  # no gradient goes through the targets
        advantages = compute_gae(rewards, v[:-1], v[1:], terminated, done, args.gamma, args.gae_lambda)
        returns = advantages + v[:-1]
        count = sum_over_processes(mask.sum())
        step_before, step = step, step + int(count)

        # ===== update =====
        learning_rate = args.learning_rate
        if args.anneal_lr:
            learning_rate = annealed(learning_rate, step_before, args.total_timesteps)
        optimizer.param_groups[0]["lr"] = learning_rate
        loss, metrics = a2c_loss(logprobs[:-1], entropy[:-1], values[:-1], advantages, returns, mask,
                                 count.clamp(min=1), vf_coef=args.vf_coef, ent_coef=args.ent_coef)
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters)):
            parameter.grad = sum_over_processes(grad)
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        history.append(torch.cat([sum_over_processes(metrics), grad_norm.view(1)]))

        # ===== log and save =====
        statistics = get_statistics(envs)
        save = step >= args.total_timesteps or passes(args.save_every, step_before, step)
        if save or step_before == 0 or passes(LOG_EVERY, step_before, step):
            losses = dict(zip((*METRICS, "grad_norm"), torch.stack(history).mean(0).tolist()))
            check_finite(sum(losses.values()), step, run_dir, bar)
            log(writer, "losses", losses, step)
            log_episodes(writer, bar, episodes, step)
            speed = (step - start_step) / (time.perf_counter() - start_time)
            log(writer, "charts", {"SPS": speed, "learning_rate": learning_rate}, step)
            history, episodes = [], np.zeros(3)
        if save:
            save_checkpoint(run_dir, args, step=step, statistics=statistics, agent=agent.state_dict(),
                            optimizer=optimizer.state_dict())
            restart = True
        bar.update(step - step_before)

    bar.close()
    envs.close()
    finish(args, agent, statistics, run_dir, writer, step)
    writer.close()


if __name__ == "__main__":
    main(parse_args())
    if WORLD_SIZE > 1:
        sys.stdout.flush()
        os._exit(0)  # an interpreter that ends in the usual way may meet gloo's threads, still at work, and abort
