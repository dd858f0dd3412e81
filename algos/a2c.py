# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["gymnasium[box2d,classic-control,mujoco]~=1.4.0", "ale-py~=0.12.1", "moviepy~=2.2.1", "numpy~=2.4.6",
# "opencv-python-headless~=5.0", "safetensors~=0.8.0", "tensorboard~=2.21", "torch~=2.13.0", "tqdm~=4.70", "tyro~=1.0"]
# ///
"""Advantage actor-critic (A2C): a critic takes variance out of the policy gradient.

REINFORCE waits for the end of an episode, and credits an action with all later rewards, caused by it or not. A critic
V(s) learns what return to expect. Its TD errors show after a few steps whether an action was better than expected, so
updates can come often.
Papers: Mnih et al. 2016, arXiv 1602.01783 (A3C); Schulman et al. 2015, arXiv 1506.02438 (GAE; λ = 1: n-step returns).

The number at the end of a command's comment is the mean return of the last 100 training episodes:

    python algos/a2c.py                                           # CartPole-v1, which the defaults are made for: 500
    python algos/a2c.py --env-id LunarLander-v3 --normalize --total-timesteps 2000000 --learning-rate 5e-3 \\
        --anneal-lr --gamma 0.995 --gae-lambda 0.95 --ent-coef 0.002  # 245
    python algos/a2c.py --env-id HalfCheetah-v5 --normalize --total-timesteps 1000000 --num-steps 16 \\
        --learning-rate 2e-3 --anneal-lr --gae-lambda 0.95 --log-std-init -1  # 3726

gymnasium resets an environment in the step after an episode's end (NEXT_STEP). The script neither counts that step nor
trains on it. It keeps the episode's last observation, for difference 3 below.
Returns are sums of the environment's own rewards. Each logged number is a mean since the previous log.

Differs from the paper:
 1. Synchronous: one process steps N environments. In A3C, several threads update the networks independently.
 2. RMSprop as torch has it, with eps outside the root (the paper's is inside). The gradient's norm is clipped to 0.5.
 3. After a truncation, the value of the last observation stands for the rest of the return.
 4. Networks, Box actions and Atari are as in ppo.py.
"""

import atexit
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation, vector as wrap
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = Path(__file__).stem
LOG_EVERY = 1000  # environment steps
MAX_EVAL_STEPS = 27_000  # an evaluation episode is cut there, as Atari's are


@dataclass
class Args:
    seed: int = 1  # Seed of all random numbers, environments included.
    device: Literal["auto", "cpu", "cuda"] = "auto"  # Where the networks run; auto takes a GPU when there is one.
    run_dir: str = ""  # Directory of the run; by default runs/<task>__<script>__<seed>__<time>.
    resume: str = ""  # Run directory or checkpoint to continue, with its flags. Flags that you give replace them.
    save_every: int = 100_000  # Steps between checkpoints; 0 saves at the start and the end only.
    track: bool = False  # Send the logs to Weights & Biases too.
    compile: bool = False  # Compile the networks with torch.compile.
    eval_episodes: int = 20  # Episodes of the greedy policy after training; 0 leaves them out.
    capture_video: bool = False  # Write an mp4 of one greedy episode, of 2,000 steps at most, to <run-dir>/videos.
    env_id: str = "CartPole-v1"  # Environment as gymnasium names it; my_module:Name-v0 imports my_module first.
    env_kwargs: str = "{}"  # Arguments for gymnasium.make_vec and the environment, as a JSON object.
    total_timesteps: int = 500_000  # Environment steps to train for.
    num_envs: int = 16  # Number N of environments that are stepped side by side.
    normalize: bool = False  # Normalise vector observations by running statistics; a2c and ppo also normalise rewards.
    learning_rate: float = 1e-3  # Learning rate of RMSprop at the start.
    anneal_lr: bool = False  # Let the learning rate fall linearly to 0.
    num_steps: int = 5  # Number T of steps in each environment between two updates (A3C's t_max).
    gamma: float = 0.99  # Discount factor γ.
    gae_lambda: float = 1.0  # Factor λ of generalised advantage estimation (GAE Eq. 16); 1 gives n-step returns.
    ent_coef: float = 0.0  # Coefficient β of the entropy bonus (A3C section 4).
    vf_coef: float = 1.0  # Coefficient of the value loss.
    log_std_init: float = 0.0  # Logarithm of the standard deviation of Box actions at the start.

    def __post_init__(self) -> None:
        if type(json.loads(self.env_kwargs)) is not dict:
            raise ValueError("env-kwargs must be a JSON object")
        if min(self.total_timesteps, self.num_envs) < 1:
            raise ValueError("total-timesteps and num-envs must be at least 1")
        if self.num_steps < 2:
            raise ValueError("num-steps must be at least 2")
        if not (0 <= self.gamma <= 1 and 0 <= self.gae_lambda <= 1):
            raise ValueError("gamma and gae-lambda must lie between 0 and 1")
        for name, value in vars(self).items():
            if isinstance(value, float) and not np.isfinite(value):  # which JSON cannot hold
                raise ValueError(f"{name.replace('_', '-')} must be a finite number")


class RunningNorm(nn.Module):
    """(x - mean) / std of rows x (B, *shape), clipped to ±10, by statistics of all rows that `update` has seen."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(shape))
        self.var = nn.Buffer(torch.ones(shape))
        self.count = nn.Buffer(torch.zeros((), dtype=torch.float64))

    def update(self, x: Tensor) -> None:
        self.count += len(x)
        share = (len(x) / self.count).float()  # of the new rows
        delta = x.mean(0) - self.mean
        self.mean += share * delta
        between = (1 - share) * delta**2  # share · this: the variance between old and new rows
        self.var += share * (x.var(0, correction=0) - self.var + between)

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / (self.var + 1e-8).sqrt()).clamp(-10, 10)


def mlp(head: nn.Linear) -> nn.Sequential:
    """Two hidden layers of 64 units before a head. The first finds the number of its inputs when it is called."""
    return nn.Sequential(nn.LazyLinear(64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), head)


class Agent(nn.Module):
    """Actor and critic on raw observations: separate MLPs on vectors, two linear heads on one CNN on images."""

    def __init__(self, obs_space: Box, action_space: gym.Space, normalize: bool, log_std_init: float = 0.0) -> None:
        super().__init__()
        self.discrete = isinstance(action_space, Discrete)
        self.is_image = is_image(obs_space)
        self.obs_scale = float(obs_space.high.max()) if obs_space.dtype == np.uint8 else 1.0  # 255 for images
        self.obs_norm = RunningNorm(*obs_space.shape) if normalize else nn.Identity()
        if normalize:
            self.return_norm = RunningNorm()
        hidden = 512 if self.is_image else 64
        num_actions = gym.spaces.flatdim(action_space)  # actions, or dimensions of a Box
        actor_head = nn.Linear(hidden, num_actions)
        critic_head = nn.Linear(hidden, 1)
        if self.is_image:
            layers = [nn.LazyConv2d(32, 8, stride=4), nn.ReLU(), nn.Conv2d(32, 64, 4, stride=2), nn.ReLU()]
            layers += [nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(512), nn.ReLU()]
            self.cnn = nn.Sequential(*layers)
            self.actor = actor_head
            self.critic = critic_head
        else:
            self.actor = mlp(actor_head)
            self.critic = mlp(critic_head)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.full((num_actions,), log_std_init))
        self(torch.zeros(1, *obs_space.shape), torch.zeros(1, *action_space.shape))  # lazy layers learn their sizes
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                nn.init.orthogonal_(layer.weight, 2**0.5)
                nn.init.zeros_(layer.bias)
        nn.init.orthogonal_(actor_head.weight, 0.01)  # so the first policy is nearly uniform, or a Gaussian around 0
        nn.init.orthogonal_(critic_head.weight, 1.0)

    def features(self, obs: Tensor) -> Tensor:
        """Observations (B, *obs) of any dtype to (B, features); images may have channels first, last or none."""
        obs = obs.float()
        if self.obs_scale != 1:  # a division by 1 takes time too
            obs = obs / self.obs_scale
        if not self.is_image:
            return self.obs_norm(obs)
        if obs.ndim == 3:
            obs = obs.unsqueeze(1)
        if obs.shape[-1] < obs.shape[1]:
            obs = obs.movedim(-1, 1)
        return self.cnn(obs)  # obs: (B, C, H, W)

    def forward(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log π(a|s), entropy of π(·|s) and V(s), (B,) each, of observations (B, *obs) and actions (B,) or (B, A)."""
        features = self.features(obs)
        policy = self.actor(features)  # (B, A), logits of the actions or means of a Gaussian
        values = self.critic(features).squeeze(-1)  # (B,)
        if self.discrete:
            all_logprobs = policy.log_softmax(-1)  # (B, A)
            entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
            logprobs = all_logprobs.gather(-1, actions.long()[:, None]).squeeze(-1)
        else:
            gaussian = torch.distributions.Normal(policy, self.log_std.exp(), validate_args=False)
            logprobs = gaussian.log_prob(actions).sum(-1)
            entropy = gaussian.entropy().sum(-1)
        return logprobs, entropy, values

    @torch.no_grad()
    def act(self, obs: Tensor, greedy: bool = False) -> Tensor:
        """Actions drawn from π(·|s), or the likeliest ones: (B,) integers or (B, A) floats, on the CPU."""
        policy = self.actor(self.features(obs)).cpu()  # draws use the CPU's random state, which a checkpoint keeps
        if self.discrete and greedy:
            return policy.argmax(-1)
        if self.discrete:
            gumbel_noise = -torch.empty_like(policy).exponential_().log()
            return (policy + gumbel_noise).argmax(-1)  # a draw from the softmax of the logits
        if greedy:
            return policy
        return policy + self.log_std.exp().cpu() * torch.randn_like(policy)


# --- algorithm ---


def discounted_sum(x: Tensor, discount: Tensor) -> Tensor:
    """S_t = x_t + discount_t·S_{t+1}, backwards in time; all tensors (T, N)."""
    sums = torch.zeros_like(x)
    total = 0.0
    for t in reversed(range(len(x))):
        total = x[t] + discount[t] * total
        sums[t] = total
    return sums


def compute_gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, done: Tensor, gamma: float, lam: float
) -> Tensor:
    """Generalised advantages (GAE Eq. 16, PPO Eq. 11-12): A_t = Σ_l (γλ)^l·δ_{t+l} until `done`; all (T, N)."""
    deltas = rewards + gamma * next_values * (1 - terminated) - values  # δ_t = r_t + γ·V(s_{t+1}) - V(s_t)
    return discounted_sum(deltas, gamma * lam * (1 - done))


# --- environments ---


def is_image(space: gym.Space) -> bool:
    """Whether the CNN takes these observations: uint8 images of at least 36 x 36, channels first, last or none."""
    return space.dtype == np.uint8 and len(space.shape) in (2, 3) and sorted(space.shape)[-2] >= 36


def is_flattenable(space: gym.Space) -> bool:
    """Whether a space is made of numbers: no Text, Graph, Sequence or OneOf is in it."""
    if isinstance(space, Dict):
        return all(map(is_flattenable, space.values()))
    if isinstance(space, Tuple):
        return all(map(is_flattenable, space))
    return isinstance(space, (Box, Discrete, MultiBinary, MultiDiscrete))


def ignore_signals(env: gym.Env) -> gym.Env:
    """Let an environment in a process of its own ("async") ignore the signals that the run catches; the run ends it."""
    if multiprocessing.parent_process():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Ctrl-C is ignored already, as by the run that started it
    return env  # the environment itself stays as it is


def make_envs(env_id: str, num_envs: int, env_kwargs: dict) -> gym.vector.VectorEnv:
    """N environments that show images or vectors. In a Box, actions -1 and 1 mean its bounds where they are finite."""
    sys.path.append("")  # where a user's own module may lie
    kwargs = dict(env_kwargs)
    is_atari = "ALE/" in env_id
    if is_atari:
        env_id = "ale_py:" + env_id.split(":")[-1]
        kwargs.setdefault("repeat_action_probability", 0.0)
        if "render_mode" in kwargs or "vectorization_mode" in kwargs:
            preprocess = partial(AtariPreprocessing, frame_skip=kwargs.get("frameskip", 4))
            stack = partial(FrameStackObservation, stack_size=4, padding_type="zero")
            kwargs.setdefault("vectorization_mode", "sync")
            kwargs |= {"frameskip": 1, "wrappers": [ignore_signals, preprocess, stack]}
        else:  # ale_py's own vector environment, which is one process and cannot be rendered
            kwargs.setdefault("use_fire_reset", False)
            kwargs["reward_clipping"] = False  # main takes the sign
    elif kwargs.get("vectorization_mode") == "async":
        kwargs["wrappers"] = [ignore_signals]
    envs = gym.make_vec(env_id, num_envs, **kwargs)
    envs._add_info = lambda infos, *_: infos  # infos are not used, and gymnasium refuses those of several types
    atexit.register(envs.close)  # Python would wait for ever for processes that ignore SIGTERM
    obs = envs.single_observation_space
    action = envs.single_action_space
    if envs.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.NEXT_STEP:
        raise SystemExit(f"{env_id}: its vector environment must have AutoresetMode.NEXT_STEP in its metadata")
    if "ale_py" in str(envs.spec.entry_point) and not is_atari:
        raise SystemExit(f"{env_id} shows raw frames: use ALE/<Game>-v5, whose frames are preprocessed")
    if not is_flattenable(obs):
        advice = "convert them with gymnasium.wrappers.TransformObservation, or drop a key with FilterObservation"
        raise SystemExit(f"{env_id}: observations of {obs} are not made of numbers: {advice}")
    envs = wrap.RecordEpisodeStatistics(envs, stats_key="episode_statistics")
    is_vector = isinstance(obs, Box) and len(obs.shape) == 1
    if not is_vector and not is_image(obs):
        envs = wrap.FlattenObservation(envs)
    if isinstance(action, Box) and len(action.shape) == 1 and action.dtype.kind == "f":
        finite = (action.low > -1e30) & (action.high < 1e30)
        nearest = np.zeros_like(action.low).clip(action.low, action.high)  # to 0: the centre, where a bound is infinite
        low = np.where(finite, action.low, nearest - 1)
        high = np.where(finite, action.high, nearest + 1)

        def scale(actions: np.ndarray) -> np.ndarray:
            return ((low + high + (high - low) * actions) / 2).clip(action.low, action.high)

        return wrap.TransformAction(envs, scale)
    if not isinstance(action, Discrete) or action.start != 0:
        raise SystemExit(f"{env_id}: actions must be Discrete from 0 or a one-dimensional Box of floats, not {action}")
    return envs


def make_video_envs(env_id: str, env_kwargs: dict, folder: Path) -> gym.vector.VectorEnv:
    """One environment that writes an mp4 of its first 2,000 steps to a folder."""
    os.environ.setdefault("XDG_RUNTIME_DIR", "/tmp")  # SDL, which draws, misses it on servers
    try:
        envs = make_envs(env_id, 1, env_kwargs | {"render_mode": "rgb_array"})
        envs.reset()
        frame = np.asarray(envs.render()[0])
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
            raise ValueError(f"frames are {frame.dtype} of shape {frame.shape}, not uint8 of (height, width, 3)")
        return wrap.RecordVideo(envs, folder, video_length=2000)
    except Exception as error:
        raise SystemExit(f"--capture-video: {env_id} cannot be drawn as rgb_array: {error}") from error


def evaluate(agent: nn.Module, envs: gym.vector.VectorEnv, device: str) -> np.ndarray:
    """Raw returns (N,) of the greedy policy over the first episode of each environment."""
    returns = np.zeros(envs.num_envs)
    running = np.ones(envs.num_envs, dtype=bool)
    obs, _ = envs.reset(seed=int(torch.randint(2**30, ())))
    for _ in tqdm(range(MAX_EVAL_STEPS), "evaluation", unit="step", leave=False):
        action = agent.act(torch.as_tensor(obs, device=device), greedy=True).numpy()
        obs, reward, terminated, truncated, _ = envs.step(action)
        returns[running] += reward[running]
        running &= ~np.logical_or(terminated, truncated)
        if not running.any():
            break
    else:
        print(f"evaluation: {running.sum()} of {len(running)} episodes were cut after {MAX_EVAL_STEPS} steps")
    envs.close()
    return returns


# --- run ---


def load_checkpoint(resume: Path | None = None) -> dict | None:
    """The checkpoint of a run directory or a file. A file that cannot be used stops the run, with the reason."""
    if resume is None:
        return None
    file = resume / "checkpoint.pt" if resume.is_dir() else resume
    if not file.exists():
        raise SystemExit(f"--resume {resume}: there is no run in {resume}")
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if saved["script"] != SCRIPT:
            raise SystemExit(f"--resume {resume}: written by {saved['script']}.py, not {SCRIPT}.py")
    except Exception as error:
        raise SystemExit(
            f"--resume {resume}: {file} is damaged or not a checkpoint ({type(error).__name__})"
        ) from error
    saved["args"]["run_dir"] = str(file.parent) if file.name == "checkpoint.pt" else ""  # another name: a new run
    return saved


def parse_args() -> tuple[Args, dict | None]:
    """Flags of the command line, and the checkpoint of --resume, whose flags are then the defaults."""
    # load_checkpoint reads --resume, and leaves the other flags for Args.
    saved, _ = tyro.cli(load_checkpoint, add_help=False, return_unknown_args=True)
    default = Args(**saved["args"]) if saved else Args()
    args = tyro.cli(Args, default=default, description=__doc__.splitlines()[0])
    if args.track and not find_spec("wandb"):
        raise SystemExit("--track needs wandb: pip install wandb")
    return args, saved


def start_run(args: Args, saved: dict | None) -> Path:
    """Make the run directory, and let wandb follow it; a directory that holds another run is refused."""
    name = f"{args.env_id}__{SCRIPT}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    name = re.sub(r"[^\w.-]", "_", name)  # some file systems refuse a colon
    run_dir = Path(args.run_dir or f"runs/{name}")
    earlier = saved["args"]["run_dir"] if saved else ""
    is_resumed = earlier and run_dir.resolve() == Path(earlier).resolve()
    if (run_dir / "checkpoint.pt").exists() and not is_resumed:
        raise SystemExit(f"{run_dir} holds a run: choose another --run-dir, or continue it with --resume {run_dir}")
    run_dir.mkdir(parents=True, exist_ok=True)
    print(f"run directory: {run_dir}")
    if args.track:
        import wandb

        wandb.init(project="algos", name=run_dir.name, config=asdict(args), dir=run_dir, sync_tensorboard=True)
    return run_dir


def catch_signals() -> list[int]:
    """A list that Ctrl-C and SIGTERM are added to, so that the run saves and stops; a second one kills it."""
    caught = []

    def catch(number: int, frame: object) -> None:
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, catch)
    signal.signal(signal.SIGTERM, catch)
    return caught


def save_checkpoint(run_dir: Path, args: Args, step: int, **components: Any) -> None:
    """Write the state to another file first, so that a crash leaves the former checkpoint whole."""
    state = {"script": SCRIPT, "args": asdict(args), "step": step, "rng": torch.get_rng_state()}
    for name, component in components.items():
        state[name] = component.state_dict()
    temporary = run_dir / "checkpoint.tmp"
    try:
        with open(temporary, "wb") as file:  # given a path, torch does not say that the disk is full
            torch.save(state, file)
        temporary.replace(run_dir / "checkpoint.pt")
        (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__ or error  # torch may hide the disk's error
        raise SystemExit(f"{run_dir} cannot be saved: {cause}") from error


def crossed(every: int, before: int, now: int) -> bool:
    """Whether a multiple of `every` lies in (before, now]; none does when it is 0."""
    return every > 0 and now // every > before // every


def main(args: Args, saved: dict | None = None) -> None:
    # Random numbers and device. Networks on vectors are so small that more than one thread only loses time.
    torch.manual_seed(args.seed)
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: PyTorch finds no GPU")
    tensor = partial(torch.as_tensor, device=device)

    # Environments, agent and optimiser, restored when a run is resumed.
    env_kwargs = json.loads(args.env_kwargs)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what environments start inherits this, and Ctrl-C spares it
    envs = make_envs(args.env_id, args.num_envs, env_kwargs)
    obs_space = envs.single_observation_space
    agent = Agent(obs_space, envs.single_action_space, args.normalize, args.log_std_init).to(device)
    if not agent.is_image:
        torch.set_num_threads(1)
    parameters = list(agent.parameters())
    optimizer = torch.optim.RMSprop(parameters, args.learning_rate, eps=1e-5, foreach=True)
    step = 0
    if saved:
        step = saved["step"]
        try:
            agent.load_state_dict(saved["agent"])
        except RuntimeError as error:
            message = f"--resume: --normalize and the spaces of {args.env_id} must be the same as in the resumed run"
            raise SystemExit(message) from error
        optimizer.load_state_dict(saved["optimizer"])
        if args.anneal_lr:
            print(f"the learning rate falls to 0 at step {args.total_timesteps}")
        if args.seed == saved["args"]["seed"]:
            torch.set_rng_state(saved["rng"])
    if args.compile:
        agent.forward = torch.compile(agent.forward, dynamic=True)
        agent.act = torch.compile(agent.act, dynamic=True)

    # The rollout: T rows of N steps, and one more observation.
    T = args.num_steps
    N = args.num_envs
    obs = np.zeros((T + 1, N, *obs_space.shape), np.uint8 if agent.is_image else np.float32)
    actions = np.zeros((T + 1, N, *envs.single_action_space.shape), np.float32)  # 0 in row T, which has no action yet
    rewards = np.zeros((T, N), np.float32)
    terminated = np.zeros_like(rewards)
    done = np.zeros_like(rewards)
    mask = np.zeros((T, N), bool)  # false in rows that are not steps, after `done`
    discounted = np.zeros_like(rewards)  # r_t + γ·r_{t-1} + γ²·r_{t-2} + … in the episode
    prev_done = np.zeros(N, np.float32)
    prev_discounted = np.zeros_like(prev_done)
    obs[T], _ = envs.reset(seed=int(torch.randint(2**30, ())))

    # The run directory, with a first checkpoint if it is new, and the logs.
    caught = catch_signals()
    run_dir = start_run(args, saved)
    if args.capture_video:
        video_envs = make_video_envs(args.env_id, env_kwargs, run_dir / "videos")  # fails now, not after training
    if not (run_dir / "checkpoint.pt").exists():
        save_checkpoint(run_dir, args, step, agent=agent, optimizer=optimizer)
    writer = SummaryWriter(run_dir, purge_step=step + 1)
    writer.add_text("flags", f"```\n{json.dumps(asdict(args), indent=2)}\n```", step)
    metrics = defaultdict(list)
    first_step = step
    first_time = time.perf_counter()
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step")

    is_last = step >= args.total_timesteps
    while not is_last:
        # ===== collect =====
        obs[0] = obs[T]
        for t in range(T):
            action = agent.act(tensor(obs[t])).numpy()  # (N,) or (N, A)
            obs[t + 1], rewards[t], terminated[t], truncated, info = envs.step(action)
            if "ALE/" in args.env_id:
                rewards[t] = np.sign(rewards[t])
            actions[t] = action
            done[t] = np.maximum(terminated[t], truncated)
            mask[t] = prev_done == 0
            prev_done = done[t]
            if args.normalize:
                discounted[t] = mask[t] * (rewards[t] + args.gamma * prev_discounted)  # 0 in the row after `done`
                prev_discounted = discounted[t]
            if done[t].any():
                metrics["charts/episodic_return"].extend(info["episode_statistics"]["r"][done[t] > 0])
                metrics["charts/episodic_length"].extend(info["episode_statistics"]["l"][done[t] > 0])

        # ===== compute targets =====
        b_obs = tensor(obs).flatten(0, 1)  # ((T + 1)·N, *obs)
        b_actions = tensor(actions).flatten(0, 1)  # ((T + 1)·N, *action)
        steps = tensor(np.flatnonzero(mask))  # (S,): indices into (T·N,) of the steps
        step_before = step
        step += len(steps)
        b_rewards = tensor(rewards)  # (T, N)
        b_terminated = tensor(terminated)  # (T, N)
        b_done = tensor(done)  # (T, N)
        if args.normalize:
            agent.return_norm.update(tensor(discounted).flatten()[steps])
            std = (agent.return_norm.var + 1e-8).sqrt()
            b_rewards = (b_rewards / std).clamp(-10, 10)
        logprobs, entropy, values = agent(b_obs, b_actions)  # ((T + 1)·N,)
        all_values = values.detach().view(T + 1, N)  # no gradient goes through the targets
        old_values = all_values[:-1]
        next_values = all_values[1:]
        advantages = compute_gae(b_rewards, old_values, next_values, b_terminated, b_done, args.gamma, args.gae_lambda)
        returns = advantages + old_values
        b_returns = returns.flatten()[steps]  # (S,): from here on steps alone
        b_advantages = advantages.flatten()[steps]
        b_obs = b_obs[steps]
        b_logprobs = logprobs[steps]
        b_values = values[steps]
        # The advantage, return - value, is the part of the return that the value does not explain.
        unexplained = b_advantages.var(correction=0) / (b_returns.var(correction=0) + 1e-8)
        metrics["losses/explained_variance"].append(1 - unexplained)

        # ===== update =====
        learning_rate = args.learning_rate
        if args.anneal_lr:
            learning_rate *= 1 - step_before / args.total_timesteps
        optimizer.param_groups[0]["lr"] = learning_rate
        pg_loss = -(b_logprobs * b_advantages).mean()  # its gradient estimates that of minus the expected return
        v_loss = 0.5 * ((b_values - b_returns) ** 2).mean()
        entropy = entropy[steps].mean()
        loss = pg_loss + args.vf_coef * v_loss - args.ent_coef * entropy
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        losses = {"policy_loss": pg_loss, "value_loss": v_loss, "entropy": entropy, "grad_norm": grad_norm}
        for name, value in losses.items():
            metrics[f"losses/{name}"].append(value.detach())
        if args.normalize and not agent.is_image:
            agent.obs_norm.update(b_obs / agent.obs_scale)  # after the update, which must normalise as `act` did

        # ===== log and save =====
        is_last = step >= args.total_timesteps or bool(caught)
        save_now = is_last or crossed(args.save_every, step_before, step)
        if save_now or step_before == 0 or crossed(LOG_EVERY, step_before, step):
            if not all(x.isfinite().all() for x in agent.state_dict().values()):
                raise SystemExit(f"\nthe agent became nan or inf before step {step}; {run_dir}/checkpoint.pt is older")
            episode_returns = metrics.get("charts/episodic_return")
            if episode_returns:
                metrics["charts/episodes"] = [len(episode_returns)]
                bar.set_postfix_str(f"return {np.mean(episode_returns):.1f}", refresh=False)
            metrics["charts/SPS"] = [(step - first_step) / (time.perf_counter() - first_time)]
            metrics["charts/learning_rate"] = [learning_rate]
            for name, entries in metrics.items():
                writer.add_scalar(name, sum(map(float, entries)) / len(entries), step)
            metrics.clear()
        if save_now:
            save_checkpoint(run_dir, args, step, agent=agent, optimizer=optimizer)
        bar.update(step - step_before)

    # ===== evaluate =====
    bar.close()
    envs.close()
    if caught:
        raise SystemExit(f'stopped at step {step}; to go on: python "{sys.argv[0]}" --resume "{run_dir}"')
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    (run_dir / "model.safetensors").write_bytes(save(agent.state_dict()))
    if args.eval_episodes > 0:
        returns = evaluate(agent, make_envs(args.env_id, args.eval_episodes, env_kwargs), device)
        writer.add_scalar("eval/return_mean", returns.mean(), step)
        writer.add_scalar("eval/return_std", returns.std(), step)
        print(f"evaluation: return {returns.mean():.2f} ± {returns.std():.2f} over {len(returns)} greedy episodes")
    if args.capture_video:
        evaluate(agent, video_envs, device)
    writer.close()


if __name__ == "__main__":
    main(*parse_args())
