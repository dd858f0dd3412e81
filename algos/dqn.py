# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["gymnasium[box2d,classic-control,mujoco]~=1.4.0", "ale-py~=0.12.1", "moviepy~=2.2.1", "numpy~=2.4.6",
# "opencv-python-headless~=5.0", "safetensors~=0.8.0", "tensorboard~=2.21", "torch~=2.13.0", "tqdm~=4.70", "tyro~=1.0"]
# ///
"""Deep Q-Network (DQN): Q-learning with a network, a replay buffer, and a target network that lags behind.

Q(s, a) is the expected return of action a in state s when the best actions follow. It is fitted to the reward plus γ
times the largest Q of the next state. Random replay breaks the correlation of successive steps. A lagging copy θ⁻ of
the network keeps the target from moving with every update.
Papers: Mnih et al. 2013, arXiv 1312.5602 (DQN); Mnih et al. 2015, Nature 518 (target network, clipped error, CNN).

The number at the end of a command's comment is the mean return of the last 100 training episodes:

    python algos/dqn.py                                           # CartPole-v1, which the defaults are made for: 500
    python algos/dqn.py --env-id LunarLander-v3 --buffer-size 100000 --train-every 4 --target-every 1000 \\
        --learning-rate 6.3e-4 --no-anneal-lr --loss huber --max-grad-norm 10 --gamma 0.99 --learning-starts 10000 \\
        --epsilon-end 0.05 --exploration-fraction 0.5  # 231
    python algos/dqn.py --env-id MountainCar-v0 --env-kwargs '{"max_episode_steps": 1000}' --num-envs 4 \\
        --train-every 2 --target-every 600 --buffer-size 500000 --batch-size 512 --gamma 0.98 \\
        --exploration-fraction 0.1  # -106
    python algos/dqn.py --env-id ALE/Pong-v5 --total-timesteps 2000000 --num-envs 8 --train-every 4 --batch-size 32 \\
        --learning-rate 2e-4 --no-anneal-lr --loss huber --max-grad-norm 10 --buffer-size 100000 --gamma 0.99 \\
        --learning-starts 5000 --target-every 1000 --exploration-fraction 0.0225  # -17 at 300,000 steps

gymnasium resets an environment in the step after an episode's end (NEXT_STEP). The script neither counts that step nor
trains on it. Returns are sums of the environment's own rewards. Each logged number is a mean since the previous log;
q_values is the mean of Q(s, a) over the replayed steps.

Differs from the paper:
 1. Adam, and the plain squared error. `--loss huber` has the same gradient as the clipped error of the 2015 paper.
 2. N environments are stepped side by side. `--train-every` and `--target-every` count the steps of all N together.
 3. After a truncation, the largest Q of the last observation stands for the rest of the return.
 4. Vector inputs: an MLP of 120 and 84 units. Atari: an episode is a whole game, not a life.
 5. If --resume makes a run longer, ε falls over the new total of steps. The run prints the ε with which it goes on.
"""

import atexit
import copy
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
    num_envs: int = 20  # Number N of environments that are stepped side by side.
    learning_rate: float = 5e-4  # Learning rate of Adam at the start.
    anneal_lr: bool = True  # Let the learning rate fall linearly to 0.
    max_grad_norm: float = 0.0  # Clip the norm of the gradient to this; 0 does not clip.
    batch_size: int = 128  # Number B of steps in a minibatch.
    train_every: int = 5  # Environment steps between two updates, each on one minibatch.
    learning_starts: int = 1_000  # Environment steps before the first minibatch.
    gamma: float = 0.995  # Discount factor γ.
    loss: Literal["mse", "huber"] = "mse"  # mse: squared error (DQN Eq. 2); huber: linear beyond ±1 (Nature).
    buffer_size: int = 20_000  # Rows of the replay buffer: one per step, and one more for each final observation.
    target_every: int = 500  # Environment steps between two copies of the network to θ⁻ (Nature Algorithm 1).
    epsilon_end: float = 0.01  # Share ε of random actions at the end; it starts at 1.
    exploration_fraction: float = 0.02  # Share of total_timesteps in which ε falls linearly.

    def __post_init__(self) -> None:
        if type(json.loads(self.env_kwargs)) is not dict:
            raise ValueError("env-kwargs must be a JSON object")
        if min(self.total_timesteps, self.num_envs, self.batch_size, self.train_every, self.target_every) < 1:
            raise ValueError("total-timesteps, num-envs, batch-size, train-every and target-every must be at least 1")
        if self.buffer_size < 8 * self.num_envs:
            raise ValueError("buffer-size must be at least 8 rows for each of the num-envs")
        if self.learning_starts < 0:
            raise ValueError("learning-starts must be at least 0")
        if self.learning_starts + self.train_every > self.total_timesteps:
            raise ValueError("learning-starts and train-every leave no time to learn within total-timesteps")
        if not (0 <= self.gamma <= 1 and 0 <= self.epsilon_end <= 1):
            raise ValueError("gamma and epsilon-end must lie between 0 and 1")
        if not (self.exploration_fraction >= 0 and self.max_grad_norm >= 0):
            raise ValueError("exploration-fraction and max-grad-norm must be at least 0")
        for name, value in vars(self).items():
            if isinstance(value, float) and not np.isfinite(value):  # which JSON cannot hold
                raise ValueError(f"{name.replace('_', '-')} must be a finite number")


class QNetwork(nn.Module):
    """Q(s, ·), a value for each action, from raw observations: an MLP on vectors, a CNN on images."""

    def __init__(self, obs_space: Box, action_space: gym.Space) -> None:
        super().__init__()
        if not isinstance(action_space, Discrete):
            raise SystemExit(f"DQN compares the Q of all actions: they must be Discrete, not {action_space}")
        self.is_image = is_image(obs_space)
        self.obs_scale = float(obs_space.high.max()) if obs_space.dtype == np.uint8 else 1.0  # 255 for images
        if self.is_image:
            layers = [nn.LazyConv2d(32, 8, stride=4), nn.ReLU(), nn.Conv2d(32, 64, 4, stride=2), nn.ReLU()]
            layers += [nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(512), nn.ReLU()]
        else:
            layers = [nn.LazyLinear(120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.LazyLinear(int(action_space.n)))
        self(torch.zeros(1, *obs_space.shape))  # lazy layers learn their sizes
        if self.is_image:  # PyTorch's own first weights would nearly lose the difference between two images
            for layer in self.layers:
                if isinstance(layer, (nn.Linear, nn.Conv2d)):
                    nn.init.orthogonal_(layer.weight, 2**0.5)
                    nn.init.zeros_(layer.bias)
            nn.init.orthogonal_(self.layers[-1].weight, 0.01)  # so the first Q are nearly 0

    def forward(self, obs: Tensor) -> Tensor:
        """Q (B, A) of observations (B, *obs) of any dtype; images may have channels first, last or none."""
        obs = obs.float()
        if self.obs_scale != 1:  # a division by 1 takes time too
            obs = obs / self.obs_scale
        if not self.is_image:
            return self.layers(obs)
        if obs.ndim == 3:
            obs = obs.unsqueeze(1)
        if obs.shape[-1] < obs.shape[1]:
            obs = obs.movedim(-1, 1)
        return self.layers(obs)  # obs: (B, C, H, W)

    @torch.no_grad()
    def act(self, obs: Tensor, epsilon: float = 0.0, greedy: bool = False) -> Tensor:
        """Actions (B,) of the largest Q, random ones with probability ε unless greedy, on the CPU."""
        q = self(obs).cpu()  # draws use the CPU's random state, which a checkpoint keeps
        explore = torch.rand(len(q)) < (0.0 if greedy else epsilon)
        random_actions = torch.randint(q.shape[1], (len(q),))
        return torch.where(explore, random_actions, q.argmax(-1))


class ReplayBuffer:
    """The last observations of N environments and the steps taken from them, in a ring of rows.

    Row i + N holds the next observation of row i's environment. An episode's final observation has a row too, in which
    is_step is false, and the environment's row after that begins a new episode. Of stacked frames only the newest is
    stored.
    """

    ARRAYS = ("frames", "actions", "rewards", "terminated", "is_step", "count")

    def __init__(self, size: int, num_envs: int, obs_space: Box, stack: int) -> None:
        self.size = size // num_envs * num_envs
        self.N = num_envs
        self.stack = stack
        self.channels = obs_space.shape[0] // stack
        self.frames = np.zeros((self.size, self.channels, *obs_space.shape[1:]), obs_space.dtype)
        self.actions = np.zeros(self.size, np.int64)
        self.rewards = np.zeros(self.size, np.float32)
        self.terminated = np.zeros(self.size, np.float32)
        self.is_step = np.zeros(self.size, bool)
        self.count = np.zeros((), np.int64)  # rows written so far

    def add_observations(self, obs: np.ndarray) -> None:
        """Write the next observations (N, *obs), from which no step has been taken yet."""
        rows = (self.count + np.arange(self.N)) % self.size
        self.frames[rows] = obs[:, -self.channels :]
        self.is_step[rows] = False
        self.count += self.N

    def add_steps(self, actions: np.ndarray, rewards: np.ndarray, terminated: np.ndarray, is_step: np.ndarray) -> None:
        """Write the steps (N,) that were taken from the newest observations."""
        rows = (self.count - self.N + np.arange(self.N)) % self.size
        self.actions[rows] = actions
        self.rewards[rows] = rewards
        self.terminated[rows] = terminated
        self.is_step[rows] = is_step

    def sample(self, number: int) -> np.ndarray:
        """Rows (number,) that are steps, drawn uniformly with replacement."""
        end = int(self.count) - self.N  # rows from here on have no step yet
        oldest = max(0, end - self.size + self.stack * self.N)  # rows before it have lost frames
        rows = np.zeros(number, np.int64)
        rejected = np.ones(number, bool)
        while rejected.any():
            candidates = torch.randint(oldest, end, (np.count_nonzero(rejected),)).numpy()
            rows[rejected] = candidates % self.size
            rejected = ~self.is_step[rows]
        return rows

    def observations(self, rows: np.ndarray) -> np.ndarray:
        """Rebuild the observations (B, *obs) of rows (B,); frames from before the episode are 0."""
        ages = np.arange(1 - self.stack, 1)  # the newest frame comes last
        stacks = (rows[:, None] + self.N * ages) % self.size  # (B, stack)
        frames = self.frames[stacks]
        for i in range(1, self.stack):
            began = ~self.is_step[stacks[:, i - 1]]  # frame i is an episode's first, those before it are another's
            frames[began, :i] = 0
        return frames.reshape(-1, self.stack * self.channels, *frames.shape[3:])

    def state_dict(self) -> dict[str, Tensor]:
        """The arrays, as tensors that share their memory."""
        return {name: torch.from_numpy(vars(self)[name]) for name in self.ARRAYS}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy the arrays of another buffer's state_dict."""
        for name, array in self.state_dict().items():
            array.copy_(state[name])


# --- algorithm ---


def epsilon_at(step: int, end: float, duration: float) -> float:
    """Share ε of random actions: falls linearly from 1 at step 0 to `end` at step `duration`, and stays there."""
    return 1 + (end - 1) * min(1.0, step / max(1.0, duration))


def updates_due(step: int, learning_starts: int, train_every: int) -> int:
    """Number of minibatches by this step: one for every `train_every` steps after `learning_starts`."""
    return max(0, step - learning_starts) // train_every


def td_target(rewards: Tensor, next_q: Tensor, terminated: Tensor, gamma: float) -> Tensor:
    """y = r + γ·max_a' Q(s', a')·(1 - terminated), (B,), a sample of Bellman's equation; next_q = Q(s', ·), (B, A)."""
    return rewards + gamma * next_q.max(-1).values * (1 - terminated)


def td_loss(values: Tensor, targets: Tensor, kind: str) -> Tensor:
    """Mean of (y - Q(s, a))² (DQN Eq. 2); huber: half of that within errors of ±1, linear beyond (Nature, Methods)."""
    assert values.shape == targets.shape and values.ndim == 1, (values.shape, targets.shape)
    loss = nn.functional.huber_loss if kind == "huber" else nn.functional.mse_loss
    return loss(values, targets)


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

    # Environments, networks, optimiser and replay buffer, restored when a run is resumed.
    env_kwargs = json.loads(args.env_kwargs)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what environments start inherits this, and Ctrl-C spares it
    envs = make_envs(args.env_id, args.num_envs, env_kwargs)
    obs_space = envs.single_observation_space
    agent = QNetwork(obs_space, envs.single_action_space).to(device)
    if not agent.is_image:
        torch.set_num_threads(1)
    target_network = copy.deepcopy(agent)
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, fused=True)
    is_stack = "ALE/" in args.env_id and agent.is_image
    stack = obs_space.shape[0] if is_stack else 1  # frames in an observation
    buffer = ReplayBuffer(args.buffer_size, args.num_envs, obs_space, stack)
    components = {"agent": agent, "target_network": target_network, "optimizer": optimizer, "buffer": buffer}
    exploration_steps = args.exploration_fraction * args.total_timesteps
    step = 0
    if saved:
        step = saved["step"]
        if args.num_envs != saved["args"]["num_envs"]:
            raise SystemExit("--num-envs cannot change when a run is resumed: the replay buffer is made for it")
        try:
            for name, component in components.items():
                component.load_state_dict(saved[name])
        except RuntimeError as error:
            message = f"--resume: --buffer-size and the spaces of {args.env_id} must be the same as in the resumed run"
            raise SystemExit(message) from error
        if args.anneal_lr:
            print(f"the learning rate falls to 0 at step {args.total_timesteps}")
        epsilon = epsilon_at(step, args.epsilon_end, exploration_steps)
        print(f"epsilon goes on at {epsilon:.3f}: --exploration-fraction is a share of --total-timesteps")
        if args.seed == saved["args"]["seed"]:
            torch.set_rng_state(saved["rng"])
    if args.compile:
        agent.forward = torch.compile(agent.forward, dynamic=True)
        agent.act = torch.compile(agent.act, dynamic=True)
    obs, _ = envs.reset(seed=int(torch.randint(2**30, ())))
    buffer.add_observations(obs)
    is_step = np.ones(args.num_envs, bool)

    # The run directory, with a first checkpoint if it is new, and the logs.
    caught = catch_signals()
    run_dir = start_run(args, saved)
    if args.capture_video:
        video_envs = make_video_envs(args.env_id, env_kwargs, run_dir / "videos")  # fails now, not after training
    if not (run_dir / "checkpoint.pt").exists():
        save_checkpoint(run_dir, args, step, **components)
    writer = SummaryWriter(run_dir, purge_step=step + 1)
    writer.add_text("flags", f"```\n{json.dumps(asdict(args), indent=2)}\n```", step)
    metrics = defaultdict(list)
    first_step = step
    first_time = time.perf_counter()
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step")

    is_last = step >= args.total_timesteps
    while not is_last:
        # ===== collect =====
        epsilon = epsilon_at(step, args.epsilon_end, exploration_steps)
        action = agent.act(tensor(obs), epsilon).numpy()  # (N,)
        obs, reward, terminated, truncated, info = envs.step(action)
        if "ALE/" in args.env_id:
            reward = np.sign(reward)
        buffer.add_steps(action, reward, terminated, is_step)
        buffer.add_observations(obs)
        step_before = step
        step += int(is_step.sum())
        done = np.logical_or(terminated, truncated)
        is_step = ~done  # the row after `done` is the reset, not a step
        if done.any():
            metrics["charts/episodic_return"].extend(info["episode_statistics"]["r"][done])
            metrics["charts/episodic_length"].extend(info["episode_statistics"]["l"][done])

        # ===== compute targets =====
        updates_before = updates_due(step_before, args.learning_starts, args.train_every)
        updates = updates_due(step, args.learning_starts, args.train_every)
        num_minibatches = updates - updates_before  # K, all drawn at once
        rows = buffer.sample(num_minibatches * args.batch_size)  # (K·B,)
        b_obs = tensor(buffer.observations(rows))  # (K·B, *obs)
        b_next_obs = tensor(buffer.observations(rows + args.num_envs))
        b_actions = tensor(buffer.actions[rows]).unsqueeze(-1)  # (K·B, 1)
        b_rewards = tensor(buffer.rewards[rows])  # (K·B,)
        b_terminated = tensor(buffer.terminated[rows])
        with torch.no_grad():
            b_targets = td_target(b_rewards, target_network(b_next_obs), b_terminated, args.gamma)  # (K·B,)

        # ===== update =====
        learning_rate = args.learning_rate
        if args.anneal_lr:
            learning_rate *= 1 - step_before / args.total_timesteps
        optimizer.param_groups[0]["lr"] = learning_rate
        for start in range(0, len(b_targets), args.batch_size):
            mb = slice(start, start + args.batch_size)
            values = agent(b_obs[mb]).gather(-1, b_actions[mb]).squeeze(-1)  # (B,)
            loss = td_loss(values, b_targets[mb], args.loss)
            optimizer.zero_grad()
            loss.backward()
            if args.max_grad_norm > 0:
                grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                metrics["losses/grad_norm"].append(grad_norm)
            optimizer.step()
            metrics["losses/td_loss"].append(loss.detach())
            metrics["losses/q_values"].append(values.detach().mean())
        if crossed(args.target_every, step_before, step):
            target_network.load_state_dict(agent.state_dict())

        # ===== log and save =====
        is_last = step >= args.total_timesteps or bool(caught)
        save_now = is_last or crossed(args.save_every, step_before, step)
        is_first_update = updates_before == 0 and updates > 0
        if save_now or is_first_update or crossed(LOG_EVERY, step_before, step):
            td_losses = metrics.get("losses/td_loss", [])  # a Huber loss may be inf while weights stay finite
            if not all(x.isfinite().all() for x in [*agent.state_dict().values(), *td_losses]):
                raise SystemExit(f"\nthe agent became nan or inf before step {step}; {run_dir}/checkpoint.pt is older")
            episode_returns = metrics.get("charts/episodic_return")
            if episode_returns:
                metrics["charts/episodes"] = [len(episode_returns)]
                bar.set_postfix_str(f"return {np.mean(episode_returns):.1f}", refresh=False)
            metrics["charts/SPS"] = [(step - first_step) / (time.perf_counter() - first_time)]
            metrics["charts/epsilon"] = [epsilon]
            metrics["charts/learning_rate"] = [learning_rate]
            for name, entries in metrics.items():
                writer.add_scalar(name, sum(map(float, entries)) / len(entries), step)
            metrics.clear()
        if save_now:
            save_checkpoint(run_dir, args, step, **components)
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
