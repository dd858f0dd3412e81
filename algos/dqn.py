# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["gymnasium[box2d,classic-control,mujoco]~=1.4.0", "ale-py~=0.12.1", "moviepy~=2.2.1", "numpy~=2.4.6",
# "opencv-python-headless~=5.0", "safetensors~=0.8.0", "tensorboard~=2.21", "torch~=2.13.0", "tqdm~=4.70", "tyro~=1.0"]
# ///
"""Deep Q-Network (DQN): Q-learning with a network, from replayed steps and towards a network that lags.

Q(s, a), the return of action a in state s followed by the best actions, is fitted to the reward plus the largest Q of
the next state. Replay at random breaks the correlation of successive steps; a lagging copy θ⁻ keeps the target still.
Papers: Mnih et al. 2013, arXiv 1312.5602 (DQN); Mnih et al. 2015, Nature 518 (target network, clipped error, CNN).

    python algos/dqn.py                                           # CartPole-v1, whose settings the defaults are: 492
    python algos/dqn.py --env-id LunarLander-v3 --buffer-size 100000 --train-every 4 --target-every 1000 \\
        --learning-rate 6.3e-4 --loss huber --max-grad-norm 10  # 231
    python algos/dqn.py --env-id MountainCar-v0 --env-kwargs '{"max_episode_steps": 1000}' --num-envs 16 \\
        --train-every 4 --buffer-size 100000 --learning-rate 1e-3 --learning-starts 1000 --target-every 600  # -135
    python algos/dqn.py --env-id ALE/Pong-v5 --total-timesteps 10000000 --learning-rate 1e-4 --batch-size 32 \\
        --num-envs 8 --train-every 4 --buffer-size 1000000 --learning-starts 80000 --target-every 1000 \\
        --epsilon-end 0.01 --exploration-fraction 0.1 --save-every 2000000      # 7 GB of memory, 14 of disk

Environments reset themselves one step late (gymnasium's NEXT_STEP). The observation that comes with `done` is the true
final one, so the next observation of a step is always the next row's; that next row ignores its action, is not a step,
and is never drawn. Logged values are means over the interval, returns are raw scores, q_values are Q(s, a) replayed.

Differs from the paper:
 1. Adam, and the plain squared error; `--loss huber` has the gradient of 2015's clipped error.
 2. N environments step side by side; all intervals count their steps together, also the target network's.
 3. Truncated episodes bootstrap with Q(final observation); only a termination ends the return.
 4. Vectors: an MLP of 120 and 84 units. Atari: no sticky actions, whole games, rewards clipped to their sign.
"""

import argparse
import copy
import json
import os
import signal
import sys
import warnings
from collections import defaultdict
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.spaces import Box, Discrete
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
    seed: int = 1  # of all that is random, environments included
    device: str = "auto"  # cpu or cuda; auto takes a GPU when there is one
    run_dir: str = ""  # where the run is written; by default runs/<task>__<script>__<seed>__<time>
    resume: str = ""  # run directory or checkpoint to continue in new episodes, with its flags where none are given
    save_every: int = 100_000  # steps between checkpoints; 0: only at the two ends
    track: bool = False  # mirror the logs to Weights & Biases
    compile: bool = False  # torch.compile the networks
    eval_episodes: int = 20  # episodes of the greedy policy after training; 0 skips them
    capture_video: bool = False  # write an mp4 of a greedy episode (2,000 steps at most) to <run-dir>/videos
    env_id: str = "CartPole-v1"  # gymnasium's name; module:Name-v0 imports module first, installed or in this directory
    env_kwargs: str = "{}"  # JSON object of keyword arguments for the environment
    total_timesteps: int = 500_000  # environment steps to train for
    num_envs: int = 20  # N: environments stepped side by side
    learning_rate: float = 2.5e-4  # step size of Adam
    max_grad_norm: float = np.inf  # clip the gradient's norm to this; inf: no clip
    batch_size: int = 128  # B: steps in a minibatch
    train_every: int = 10  # environment steps per minibatch
    learning_starts: int = 10_000  # environment steps before the first minibatch
    gamma: float = 0.99  # discount γ
    loss: Literal["mse", "huber"] = "mse"  # of the error: its square (Eq. 2), or linear beyond ±1 (Nature)
    buffer_size: int = 10_000  # rows of the replay buffer: one per step, one more per episode for its final observation
    target_every: int = 500  # environment steps between copies of the network to θ⁻ (Nature Algorithm 1)
    epsilon_end: float = 0.05  # share ε of random actions in the end; it starts at 1
    exploration_fraction: float = 0.5  # share of total_timesteps over which ε falls linearly

    def __post_init__(self) -> None:
        if type(json.loads(self.env_kwargs)) is not dict:
            raise ValueError("env-kwargs must be a JSON object")
        if min(self.total_timesteps, self.num_envs, self.batch_size, self.train_every, self.target_every) < 1:
            raise ValueError("total-timesteps, num-envs, batch-size, train-every and target-every must be at least 1")
        if self.buffer_size < 8 * self.num_envs:
            raise ValueError("buffer-size must be at least 8 rows for each of the num-envs")
        if self.learning_starts + self.train_every > self.total_timesteps:
            raise ValueError("learning-starts and train-every leave no time to learn within total-timesteps")
        if not (0 <= self.gamma <= 1 and 0 <= self.epsilon_end <= 1 and self.exploration_fraction >= 0):
            raise ValueError("gamma and epsilon-end must lie between 0 and 1, exploration-fraction be at least 0")
        if not self.max_grad_norm > 0:
            raise ValueError("max-grad-norm must be above 0")


class QNetwork(nn.Module):
    """Q(s, ·), a value for each action, from raw observations: an MLP on vectors, a CNN on images."""

    def __init__(self, obs_space: Box, action_space: gym.Space) -> None:
        super().__init__()
        if not isinstance(action_space, Discrete):
            raise SystemExit(f"DQN compares the Q of all actions: they must be Discrete, not {action_space}")
        self.is_image = obs_space.dtype == np.uint8 and len(obs_space.shape) in (2, 3)
        if self.is_image and sorted(obs_space.shape)[-2] < 36:
            raise SystemExit(f"images of shape {obs_space.shape} are too small for the CNN, which needs 36 x 36")
        if self.is_image:
            layers = [nn.LazyConv2d(32, 8, stride=4), nn.ReLU(), nn.Conv2d(32, 64, 4, stride=2), nn.ReLU()]
            layers += [nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(512), nn.ReLU()]
        else:
            layers = [nn.LazyLinear(120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.LazyLinear(int(action_space.n)))
        self(torch.zeros(1, *obs_space.shape))  # lazy layers learn their sizes

    def forward(self, obs: Tensor) -> Tensor:
        """Q (B, A) of observations (B, *obs) of any dtype; images may have channels first, last or none."""
        if self.is_image:
            planes = obs if obs.ndim == 4 else obs.unsqueeze(1)  # (B, C, H, W)
            return self.layers((planes.movedim(-1, 1) if planes.shape[-1] < planes.shape[1] else planes) / 255)
        return self.layers(obs.flatten(1).float())

    @torch.no_grad()
    def act(self, obs: Tensor, epsilon: float = 0.0, greedy: bool = False) -> Tensor:
        """Actions (B,) of the largest Q, random ones with probability ε unless greedy, on the CPU."""
        q = self(obs).cpu()  # whose random numbers a checkpoint keeps
        explore = torch.rand(len(q)) < (0.0 if greedy else epsilon)
        return torch.where(explore, torch.randint(q.shape[1], (len(q),)), q.argmax(-1))


class ReplayBuffer:
    """The last observations of N environments and the steps taken from them, in a ring of rows.

    Row i + N is the next of the same environment, so a final observation has a row too, without a step, and the row
    after one without a step begins an episode. Of an observation that stacks frames only the newest is stored.
    """

    def __init__(self, size: int, num_envs: int, obs_space: Box, stack: int) -> None:
        self.size, self.N, self.stack = size // num_envs * num_envs, num_envs, stack
        self.frames = np.zeros((self.size, obs_space.shape[0] // stack, *obs_space.shape[1:]), obs_space.dtype)
        self.actions = np.zeros(self.size, np.int64)
        self.rewards = np.zeros(self.size, np.float32)
        self.terminated = np.zeros(self.size, np.float32)
        self.is_step = np.zeros(self.size, bool)
        self.count = np.zeros((), np.int64)  # rows written so far

    def add(self, obs: np.ndarray, **step: np.ndarray) -> None:
        """Fill the arrays (N,) that `step` names for the newest rows, then write the next observations (N, *obs)."""
        rows = (self.count + np.arange(self.N)) % self.size
        for name, values in step.items():
            getattr(self, name)[rows - self.N] = values
        self.frames[rows] = obs[:, -self.frames.shape[1] :]
        self.is_step[rows] = False  # not yet
        self.count += self.N

    def sample(self, count: int) -> tuple[np.ndarray, ...]:
        """Obs (B, *obs), actions, rewards, terminated (B,), next obs (B, *obs) of steps, uniform with replacement."""
        newest = int(self.count) - self.N
        oldest = max(0, newest - self.size + self.stack * self.N)  # before it, stacks have lost frames
        rows, wrong = np.zeros(count, np.int64), np.ones(count, bool)
        while wrong.any():
            rows[wrong] = torch.randint(oldest, newest, (np.count_nonzero(wrong),)).numpy() % self.size
            wrong = ~self.is_step[rows]
        obs, next_obs = self.observations(rows), self.observations(rows + self.N)
        return obs, self.actions[rows], self.rewards[rows], self.terminated[rows], next_obs

    def observations(self, rows: np.ndarray) -> np.ndarray:
        """Rebuild the observations (B, *obs) of rows (B,); frames from before the episode are 0."""
        stacks = (rows[:, None] + self.N * np.arange(1 - self.stack, 1)) % self.size  # (B, stack), the newest is last
        frames = self.frames[stacks]
        for i in range(1, self.stack):
            frames[~self.is_step[stacks[:, i - 1]], :i] = 0  # an episode began with frame i
        return frames.reshape(-1, self.stack * frames.shape[2], *frames.shape[3:])

    def state_dict(self) -> dict[str, Tensor]:
        """The arrays, as tensors that share their memory."""
        return {name: torch.from_numpy(x) for name, x in vars(self).items() if isinstance(x, np.ndarray)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy the arrays of another buffer's state_dict."""
        for name, x in self.state_dict().items():
            x.copy_(state[name])


# --- algorithm ---


def epsilon_at(step: int, end: float, duration: float) -> float:
    """Share ε of random actions: falls linearly from 1 at step 0 to `end` at step `duration`, and stays there."""
    return 1 + (end - 1) * min(1.0, step / max(1.0, duration))


def td_target(rewards: Tensor, next_q: Tensor, terminated: Tensor, gamma: float) -> Tensor:
    """y = r + γ·max_a' Q(s', a')·(1 - terminated), (B,), a sample of Bellman's equation; next_q = Q(s', ·), (B, A)."""
    return rewards + gamma * next_q.max(-1).values * (1 - terminated)


def td_loss(values: Tensor, targets: Tensor, kind: str) -> Tensor:
    """(y - Q(s, a))² (DQN Eq. 2), or huber: half of it up to an error of 1, linear beyond (Nature, Methods); (B,)."""
    assert values.shape == targets.shape and values.ndim == 1, (values.shape, targets.shape)
    loss = nn.functional.huber_loss if kind == "huber" else nn.functional.mse_loss
    return loss(values, targets, reduction="none")


# --- environments ---


def make_envs(env_id: str, num_envs: int, env_kwargs: dict) -> gym.vector.VectorEnv:
    """N environments; Discrete observations become one-hot, the finite bounds of Box actions ±1, others are clipped."""
    warnings.filterwarnings("error", ".*(not within the observation space|reward returned)")  # of what it lets pass
    sys.path.append("")  # where a user's own module may lie
    kwargs, atari = dict(env_kwargs), "ALE/" in env_id
    if atari:
        env_id, kwargs = "ale_py:" + env_id.split(":")[-1], {"repeat_action_probability": 0.0} | kwargs
    if atari and "render_mode" not in kwargs:
        kwargs = {"use_fire_reset": False} | kwargs | {"reward_clipping": False}  # main takes the sign
    elif atari:  # the native vector environment cannot be rendered
        wrappers = [AtariPreprocessing, lambda env: FrameStackObservation(env, 4, padding_type="zero")]
        kwargs |= {"vectorization_mode": "sync", "frameskip": 1, "wrappers": wrappers}
    envs = gym.make_vec(env_id, num_envs, **kwargs)
    obs, action = envs.single_observation_space, envs.single_action_space
    if envs.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.NEXT_STEP:
        raise SystemExit(f"{env_id}: its vector version does not declare AutoresetMode.NEXT_STEP in its metadata")
    if "ale_py" in str(envs.spec.entry_point) and not atari:
        raise SystemExit(f"{env_id} shows raw frames: use ALE/<Game>-v5, whose frames are preprocessed")
    if not isinstance(obs, Discrete) and not (isinstance(obs, Box) and 1 <= len(obs.shape) <= 3):
        raise SystemExit(f"{env_id}: observations must be Discrete or a Box of one to three dimensions, not {obs}")
    envs = wrap.RecordEpisodeStatistics(envs, stats_key="episode_statistics")
    if isinstance(obs, Discrete):
        envs = wrap.FlattenObservation(envs)
    if isinstance(action, Box) and len(action.shape) == 1 and action.dtype.kind == "f":
        finite = (action.low > -1e30) & (action.high < 1e30)
        low, high = np.where(finite, action.low, -1), np.where(finite, action.high, 1)
        return wrap.TransformAction(envs, lambda x: ((low + high + (high - low) * x) / 2).clip(action.low, action.high))
    if not isinstance(action, Discrete) or action.start != 0:
        raise SystemExit(f"{env_id}: actions must be Discrete from 0 or a one-dimensional Box of floats, not {action}")
    return envs


def evaluate(agent: nn.Module, envs: gym.vector.VectorEnv, device: torch.device) -> np.ndarray:
    """Raw returns (N,) of the greedy policy over the first episode of each environment."""
    returns, running = np.zeros(envs.num_envs), np.ones(envs.num_envs, dtype=bool)
    obs, _ = envs.reset(seed=int(torch.randint(2**30, ())))
    for _ in tqdm(range(MAX_EVAL_STEPS), "evaluation", unit="step", leave=False):
        action = agent.act(torch.as_tensor(obs, device=device), greedy=True).numpy()
        obs, reward, terminated, truncated, _ = envs.step(action)
        returns += np.where(running, reward, 0)
        running &= ~np.logical_or(terminated, truncated)
        if not running.any():
            break
    else:
        print(f"evaluation: {running.sum()} of {len(running)} episodes were cut after {MAX_EVAL_STEPS} steps")
    envs.close()
    return returns


def parse_args() -> tuple[Args, dict | None]:
    """Flags of the command line; when resuming, on top of those of the checkpoint, which comes with them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path)
    path, default, saved = parser.parse_known_args()[0].resume, Args(), None
    if path:
        path = path / "checkpoint.pt" if path.is_dir() else path
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if saved.get("script") != SCRIPT:
            raise SystemExit(f"--resume {path}: written by {saved.get('script')}.py, not {SCRIPT}.py")
        saved["args"]["run_dir"] = str(path.parent) if path.name == "checkpoint.pt" else ""  # a copy begins a new run
        default = Args(**saved["args"])
    return tyro.cli(Args, default=default, description=__doc__.splitlines()[0]), saved


def main(args: Args, saved: dict | None = None) -> None:
    torch.manual_seed(args.seed)
    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    env_kwargs = json.loads(args.env_kwargs)
    envs = make_envs(args.env_id, args.num_envs, env_kwargs)
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    agent = QNetwork(obs_space, action_space).to(device)
    target_network = copy.deepcopy(agent)  # θ⁻
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, fused=True)
    stack = obs_space.shape[0] if "ALE/" in args.env_id else 1  # frames in an observation
    buffer = ReplayBuffer(args.buffer_size, args.num_envs, obs_space, stack)
    torch.set_num_threads(torch.get_num_threads() if agent.is_image else 1)  # small MLPs only lose time to more
    step = saved["step"] if saved else 0
    if saved:
        if any(getattr(args, name) != saved["args"][name] for name in ("buffer_size", "num_envs")):
            raise SystemExit("--buffer-size and --num-envs cannot change on resume: the replay buffer is made of them")
        agent.load_state_dict(saved["agent"])
        target_network.load_state_dict(saved["target_network"])
        optimizer.load_state_dict(saved["optimizer"])
        optimizer.param_groups[0]["lr"] = args.learning_rate
        buffer.load_state_dict(saved["buffer"])
        if args.seed == saved["args"]["seed"]:
            torch.set_rng_state(saved["rng"])
    forward, act = (torch.compile(f, dynamic=True) if args.compile else f for f in (agent.forward, agent.act))
    modules = {"agent": agent, "target_network": target_network, "optimizer": optimizer, "buffer": buffer}
    metrics = defaultdict(list)
    obs, _ = envs.reset(seed=int(torch.randint(2**30, ())))
    buffer.add(obs)
    is_step = np.ones(args.num_envs, bool)
    name = f"runs/{args.env_id.replace('/', '_')}__{SCRIPT}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir = Path(args.run_dir or name)
    if (run_dir / "checkpoint.pt").exists() and not (saved and run_dir.samefile(saved["args"]["run_dir"] or "/")):
        raise SystemExit(f"{run_dir} holds a run: choose another --run-dir, or continue it with --resume {run_dir}")
    run_dir.mkdir(parents=True, exist_ok=True)
    print(f"run directory: {run_dir}")
    if args.track:
        import wandb

        wandb.init(project="algos", name=run_dir.name, config=asdict(args), dir=run_dir, sync_tensorboard=True)
    writer = SummaryWriter(run_dir, purge_step=step + 1)
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step")
    caught, signals = [], (signal.SIGINT, signal.SIGTERM)  # after one the run is saved; a second one kills
    for number in signals:
        signal.signal(number, lambda *_: caught.extend(signal.signal(number, signal.SIG_DFL) for number in signals))
    save_now, stop = not (run_dir / "checkpoint.pt").exists(), step >= args.total_timesteps  # saved from the start
    while True:
        # ===== save =====
        if save_now:  # to another file first, so that a crash leaves the former checkpoint whole
            state = {"script": SCRIPT, "args": asdict(args), "step": step, "rng": torch.get_rng_state()}
            state |= {name: module.state_dict() for name, module in modules.items()}
            torch.save(state, run_dir / "checkpoint.tmp")
            (run_dir / "checkpoint.tmp").replace(run_dir / "checkpoint.pt")
            (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
        if stop:
            break

        # ===== collect =====
        epsilon = epsilon_at(step, args.epsilon_end, args.exploration_fraction * args.total_timesteps)
        action = act(torch.as_tensor(obs, device=device), epsilon).numpy()  # (N,)
        obs, reward, terminated, truncated, info = envs.step(action)
        if "ALE/" in args.env_id:
            reward = np.sign(reward)
        buffer.add(obs, actions=action, rewards=reward, terminated=terminated, is_step=is_step)
        step_before, step = step, step + int(is_step.sum())
        done = np.logical_or(terminated, truncated)
        is_step = ~done  # the row after `done` is the reset, not a step
        if done.any():
            metrics["charts/episodic_return"].extend(info["episode_statistics"]["r"][done])
            metrics["charts/episodic_length"].extend(info["episode_statistics"]["l"][done])

        # ===== compute targets =====
        learnt, due = (max(0, s - args.learning_starts) // args.train_every for s in (step_before, step))
        batch = buffer.sample((due - learnt) * args.batch_size)  # the K minibatches that are due, (K·B, …)
        b_obs, b_actions, b_rewards, b_terminated, b_next_obs = (torch.as_tensor(x, device=device) for x in batch)
        with torch.no_grad():
            b_targets = td_target(b_rewards, target_network(b_next_obs), b_terminated, args.gamma)  # (K·B,)

        # ===== update =====
        for start in range(0, len(b_targets), args.batch_size):
            mb = slice(start, start + args.batch_size)
            values = forward(b_obs[mb]).gather(-1, b_actions[mb, None]).squeeze(-1)  # (B,)
            loss = td_loss(values, b_targets[mb], args.loss).mean()
            optimizer.zero_grad()
            loss.backward()
            if args.max_grad_norm < np.inf:
                grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                metrics["losses/grad_norm"].append(grad_norm)
            optimizer.step()
            metrics["losses/td_loss"].append(loss.detach())
            metrics["losses/q_values"].append(values.detach().mean())
        if step // args.target_every > step_before // args.target_every:
            target_network.load_state_dict(agent.state_dict())

        # ===== log =====
        stop = bool(caught) or step >= args.total_timesteps
        save_now = stop or args.save_every and step // args.save_every > step_before // args.save_every
        if save_now or learnt == 0 < due or step // LOG_EVERY > step_before // LOG_EVERY:
            means = {name: sum(map(float, values)) / len(values) for name, values in metrics.items()}
            if not (sum(x.sum() for x in agent.state_dict().values()) + means.get("losses/td_loss", 0)).isfinite():
                raise SystemExit(f"\nthe agent became nan or inf before step {step}; {run_dir}/checkpoint.pt is older")
            if "charts/episodic_return" in means:
                means["charts/episodes"] = len(metrics["charts/episodic_return"])
                bar.set_postfix_str(f"return {means['charts/episodic_return']:.1f}", refresh=False)
            means["charts/SPS"] = (step - bar.initial) / bar.format_dict["elapsed"]
            means["charts/epsilon"] = epsilon
            for name, value in means.items():
                writer.add_scalar(name, value, step)
            metrics.clear()
        bar.update(step - step_before)

    # ===== evaluate =====
    bar.close()
    envs.close()
    if caught:
        raise SystemExit(f"stopped at step {step}; to go on: python {sys.argv[0]} --resume {str(run_dir)!r}")
    for number in signals:
        signal.signal(number, signal.SIG_DFL)
    (run_dir / "model.safetensors").write_bytes(save(agent.state_dict()))
    if args.eval_episodes > 0:
        returns = evaluate(agent, make_envs(args.env_id, args.eval_episodes, env_kwargs), device)
        writer.add_scalar("eval/return_mean", returns.mean(), step)
        writer.add_scalar("eval/return_std", returns.std(), step)
        print(f"evaluation: return {returns.mean():.2f} ± {returns.std():.2f} over {len(returns)} greedy episodes")
    if args.capture_video:
        os.environ.setdefault("XDG_RUNTIME_DIR", "/tmp")  # which SDL, that draws, misses on servers
        envs = make_envs(args.env_id, 1, env_kwargs | {"render_mode": "rgb_array"})
        evaluate(agent, wrap.RecordVideo(envs, f"{run_dir}/videos", video_length=2000), device)
    writer.close()


if __name__ == "__main__":
    main(*parse_args())
