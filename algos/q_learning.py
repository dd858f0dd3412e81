# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["gymnasium~=1.4.0", "numpy~=2.4.6", "safetensors~=0.8.0", "tensorboard~=2.21.0", "torch~=2.13.0",
# "tqdm~=4.70.1", "tyro~=1.0.17"]
# ///
"""Tabular Q-learning (Watkins 1989; Sutton & Barto 2018, section 6.5), beside the exact optimum.

Q*(s, a) is the return of action a in state s when the best actions follow. Each step moves Q(s, a) by a share α towards
its target, a sample of the right side of Bellman's optimality equation. Some environments publish their transitions
(`P` in gymnasium's toy text). For these, value iteration finds Q* first, and two exact errors are logged:

 - charts/q_error is the mean of |Q - Q*| over all pairs (s, a) that can be reached. Pairs never tried have Q = 0.
 - charts/regret is the mean of V*(s₀) - V^π(s₀) over start states s₀: how much less the greedy policy π gets than the
   best policy. Without the environment's `initial_state_distrib`, s₀ are the first observations of the run.

Regret usually reaches 0 before q_error does. At the end of training:

    python algos/q_learning.py    # Taxi-v4: regret 0, q_error 4.7; with --alpha-decay 0 --epsilon-end 0.5, q_error 0
    python algos/q_learning.py --env-id FrozenLake-v1 --total-timesteps 500000  # regret 0, q_error 0.013
    python algos/q_learning.py --env-id CliffWalking-v1 --alpha-decay 0 --total-timesteps 100000  # regret 0, q_error 0

Differs from the paper:
 1. N environments step together. Their N targets come from the same table; then N updates follow one by one.
 2. At a pair's n-th visit α = 1 / n^ω (--alpha-decay ω). With ω > 1/2 the noise of the samples averages out, and
    Q converges (Even-Dar & Mansour 2003).
 3. After a truncation, the largest Q of the last observation stands for the rest of the return.
 4. If --resume makes a run longer, ε falls over the new total of steps. The run prints the ε with which it goes on.
"""

import atexit
import json
import multiprocessing
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.spaces import Discrete
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = Path(__file__).stem
LOG_EVERY = 1000  # environment steps
MAX_EVAL_STEPS = 27_000  # an evaluation episode is cut there


@dataclass
class Args:
    seed: int = 1  # Seed of all random numbers, environments included.
    run_dir: str = ""  # Directory of the run; by default runs/<task>__<script>__<seed>__<time>.
    resume: str = ""  # Run directory or checkpoint to continue, with its flags. Flags that you give replace them.
    save_every: int = 100_000  # Steps between checkpoints; 0 saves at the start and the end only.
    track: bool = False  # Send the logs to Weights & Biases too.
    eval_episodes: int = 100  # Episodes of the greedy policy after training; 0 leaves them out.
    env_id: str = "Taxi-v4"  # Environment as gymnasium names it; my_module:Name-v0 imports my_module first.
    env_kwargs: str = "{}"  # Arguments for gymnasium.make_vec and the environment, as a JSON object.
    total_timesteps: int = 300_000  # Environment steps to train for.
    num_envs: int = 16  # Number N of environments that are stepped side by side.
    gamma: float = 0.99  # Discount factor γ.
    alpha_decay: float = 0.6  # Exponent ω of the step size α = 1 / n^ω; 0 is α = 1, best where nothing is random.
    epsilon_end: float = 0.1  # Share ε of random actions at the end; it starts at 1.
    exploration_fraction: float = 0.5  # Share of total_timesteps in which ε falls linearly.

    def __post_init__(self) -> None:
        if type(json.loads(self.env_kwargs)) is not dict:
            raise ValueError("env-kwargs must be a JSON object")
        if min(self.total_timesteps, self.num_envs) < 1:
            raise ValueError("total-timesteps and num-envs must be at least 1")
        if not (0 <= self.gamma < 1 and 0 <= self.epsilon_end <= 1):
            raise ValueError("gamma must be at least 0 and below 1, epsilon-end must lie between 0 and 1")
        if not (self.alpha_decay >= 0 and self.exploration_fraction >= 0):
            raise ValueError("alpha-decay and exploration-fraction must be at least 0")
        for name, value in vars(self).items():
            if isinstance(value, float) and not np.isfinite(value):  # which JSON cannot hold
                raise ValueError(f"{name.replace('_', '-')} must be a finite number")


class QTable(nn.Module):
    """Q(s, a) and the number of its updates, (S, A) each."""

    def __init__(self, num_states: int, num_actions: int) -> None:
        super().__init__()
        self.q = nn.Buffer(torch.zeros(num_states, num_actions, dtype=torch.float64))
        self.visits = nn.Buffer(torch.zeros(num_states, num_actions, dtype=torch.float64))

    def act(self, obs: Tensor, epsilon: float) -> Tensor:
        """Actions (N,) of the largest Q in states (N,), random ones with probability ε."""
        best = self.q.index_select(0, obs).argmax(-1)  # unlike q[obs], it refuses negative states
        explore = torch.rand(len(best)) < epsilon
        return torch.where(explore, torch.randint(self.q.shape[1], best.shape), best)


# --- algorithm ---


def epsilon_at(step: int, end: float, duration: float) -> float:
    """Share ε of random actions: falls linearly from 1 at step 0 to `end` at step `duration`, and stays there."""
    return 1 + (end - 1) * min(1.0, step / max(1.0, duration))


def td_target(rewards: Tensor, next_q: Tensor, terminated: Tensor, gamma: float) -> Tensor:
    """y = r + γ·max_a' Q(s', a')·(1 - terminated), (B,), a sample of Bellman's equation; next_q = Q(s', ·), (B, A)."""
    return rewards + gamma * next_q.max(-1).values * (1 - terminated)


def read_model(P: dict[int, dict[int, list]]) -> tuple[Tensor, Tensor]:
    """p(s'|s, a) of going on in s', (S, A, S), and mean rewards r(s, a), (S, A), of P[s][a] = [(p, s', r, end), …]."""
    num_states = len(P)
    num_actions = len(P[0])
    next_probs = torch.zeros(num_states, num_actions, num_states, dtype=torch.float64)
    rewards = torch.zeros(num_states, num_actions, dtype=torch.float64)
    for s, actions in P.items():
        for a, outcomes in actions.items():
            for prob, next_state, reward, terminated in outcomes:
                next_probs[s, a, next_state] += prob * (1 - terminated)
                rewards[s, a] += prob * reward
    return next_probs, rewards


def value_iteration(next_probs: Tensor, rewards: Tensor, gamma: float) -> Tensor:
    """Q* (S, A): Bellman's optimality equation Q(s, a) = r(s, a) + γ·Σ_s' p(s'|s, a)·max_a' Q(s', a'), repeated."""
    q = torch.zeros_like(rewards)
    change = torch.inf
    rounding = 1e-15 / (1 - gamma)  # share of Q that rounding may keep in motion for ever
    while change > rounding * (1 + q.abs().max()):
        next_values = next_probs @ q.max(-1).values  # (S, A)
        updated = rewards + gamma * next_values
        change = (updated - q).abs().max()
        q = updated
    return q


def policy_values(next_probs: Tensor, rewards: Tensor, policy: Tensor, gamma: float) -> Tensor:
    """V^π (S,) of a policy (S,) of actions, from Bellman's equation V = r_π + γ·P_π·V, which is linear in V."""
    states = torch.arange(len(policy))
    identity = torch.eye(len(policy))
    return torch.linalg.solve(identity - gamma * next_probs[states, policy], rewards[states, policy])


def reachable(next_probs: Tensor, start_probs: Tensor) -> Tensor:
    """Mask (S,) of the states in which some policy comes to act, from the start states on."""
    leads_to = (next_probs > 0).any(1)  # (S, S)
    reached = start_probs > 0
    num_reached = 0
    while num_reached < reached.sum():
        num_reached = reached.sum()
        reached = reached | leads_to[reached].any(0)
    return reached


# --- environments ---


def ignore_signals(env: gym.Env) -> gym.Env:
    """Let an environment in a process of its own ("async") ignore the signals that the run catches; the run ends it."""
    if multiprocessing.parent_process():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Ctrl-C is ignored already, as by the run that started it
    return env  # the environment itself stays as it is


def make_discrete_envs(env_id: str, num_envs: int, env_kwargs: dict) -> gym.vector.VectorEnv:
    """N environments whose states and actions are numbers from 0; anything else is refused."""
    sys.path.append("")  # where a user's own module may lie
    kwargs = {"vectorization_mode": "sync"} | env_kwargs
    envs = gym.make_vec(env_id, num_envs, wrappers=[ignore_signals], **kwargs)
    envs._add_info = lambda infos, *_: infos  # infos are not used, and gymnasium refuses those of several types
    atexit.register(envs.close)  # Python would wait for ever for processes that ignore SIGTERM
    if envs.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.NEXT_STEP:
        raise SystemExit(f"{env_id}: its environments must reset by AutoresetMode.NEXT_STEP")
    for space in (envs.single_observation_space, envs.single_action_space):
        if not isinstance(space, Discrete) or space.start != 0:
            raise SystemExit(f"{env_id}: observations and actions must be Discrete from 0, not {space}")
    return envs


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


def play(policy: Tensor, envs: gym.vector.VectorEnv) -> np.ndarray:
    """Raw returns (N,) of a policy (S,) of actions over the first episode of each environment."""
    returns = np.zeros(envs.num_envs)
    running = np.ones(envs.num_envs, dtype=bool)
    obs, _ = envs.reset(seed=int(torch.randint(2**30, ())))
    for _ in range(MAX_EVAL_STEPS):
        obs, reward, terminated, truncated, _ = envs.step(policy[obs].numpy())
        returns[running] += reward[running]
        running &= ~np.logical_or(terminated, truncated)
        if not running.any():
            break
    else:
        print(f"evaluation: {running.sum()} of {len(running)} episodes were cut after {MAX_EVAL_STEPS} steps")
    envs.close()
    return returns


def main(args: Args, saved: dict | None = None) -> None:
    # Environments and table, restored when a run is resumed.
    torch.manual_seed(args.seed)
    env_kwargs = json.loads(args.env_kwargs)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what environments start inherits this, and Ctrl-C spares it
    envs = make_discrete_envs(args.env_id, args.num_envs, env_kwargs)
    num_states = envs.single_observation_space.n
    num_actions = envs.single_action_space.n
    agent = QTable(num_states, num_actions)
    q = agent.q.numpy()  # which shares the table's memory
    visits = agent.visits.numpy()
    exploration_steps = args.exploration_fraction * args.total_timesteps
    step = 0
    if saved:
        step = saved["step"]
        try:
            agent.load_state_dict(saved["agent"])
        except RuntimeError as error:
            raise SystemExit(f"--resume: {args.env_id} has other spaces than the environment of the run") from error
        epsilon = epsilon_at(step, args.epsilon_end, exploration_steps)
        print(f"epsilon goes on at {epsilon:.3f}: --exploration-fraction is a share of --total-timesteps")
        if args.seed == saved["args"]["seed"]:
            torch.set_rng_state(saved["rng"])
    env = envs.env_fns[0]().unwrapped  # one more, in this process, to read its P
    # Between two logs lie LOG_EVERY steps, and so no more episodes than that.
    envs = gym.wrappers.vector.RecordEpisodeStatistics(envs, LOG_EVERY, stats_key="episode_statistics")
    obs, _ = envs.reset(seed=int(torch.randint(2**30, ())))
    is_step = np.ones(args.num_envs, bool)
    caught = catch_signals()

    # The optimum, where the environment publishes its transitions.
    try:
        P = env.P
        next_probs, mean_rewards = read_model(P)
        is_known = mean_rewards.shape == agent.q.shape
    except (AttributeError, LookupError, TypeError, ValueError):  # there is no P, or it has another form
        is_known = False
    if is_known:
        starts = getattr(env, "initial_state_distrib", np.bincount(obs, minlength=len(P)) / len(obs))
        start_probs = torch.as_tensor(starts, dtype=torch.float64)
        optimal_q = value_iteration(next_probs, mean_rewards, args.gamma)
        optimal_return = start_probs @ optimal_q.max(-1).values
        reached = reachable(next_probs, start_probs)
        known = {(s, a, *outcome[1:]) for s in P for a in P[s] for outcome in P[s][a]}  # each (s, a, s', r, end)

    # The run directory, with a first checkpoint if it is new, and the logs.
    run_dir = start_run(args, saved)
    if not (run_dir / "checkpoint.pt").exists():
        save_checkpoint(run_dir, args, step, agent=agent)
    writer = SummaryWriter(run_dir, purge_step=step + 1)
    writer.add_text("flags", f"```\n{json.dumps(asdict(args), indent=2)}\n```", step)
    first_step = step
    first_time = time.perf_counter()
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step")

    is_last = step >= args.total_timesteps
    while not is_last:
        # ===== collect =====
        obs = obs.copy()  # the environments may reuse their array
        epsilon = epsilon_at(step, args.epsilon_end, exploration_steps)
        action = agent.act(torch.from_numpy(obs), epsilon).numpy()
        next_obs, reward, terminated, truncated, _ = envs.step(action)
        if is_known:
            seen = zip(obs[is_step], action[is_step], next_obs[is_step], reward[is_step], terminated[is_step])
            is_known = known.issuperset(seen)
            if not is_known:
                tqdm.write(f"{args.env_id} made a transition that is not in its P: the optimum is not known")

        # ===== compute targets =====
        next_q = agent.q[next_obs]
        targets = td_target(torch.tensor(reward), next_q, torch.tensor(terminated).double(), args.gamma).numpy()

        # ===== update =====
        for s, a, y in zip(obs[is_step], action[is_step], targets[is_step]):
            visits[s, a] += 1
            q[s, a] += (y - q[s, a]) / visits[s, a] ** args.alpha_decay
        step_before = step
        step += int(is_step.sum())
        is_step = ~np.logical_or(terminated, truncated)  # the row after an episode's end is the reset, not a step
        obs = next_obs

        # ===== log and save =====
        is_last = step >= args.total_timesteps or bool(caught)
        save_now = is_last or crossed(args.save_every, step_before, step)
        if save_now or step_before == 0 or crossed(LOG_EVERY, step_before, step):
            if not np.isfinite(q).all():
                raise SystemExit(f"\nthe table became nan or inf before step {step}; {run_dir}/checkpoint.pt is older")
            steps_per_second = (step - first_step) / (time.perf_counter() - first_time)
            metrics = {"SPS": steps_per_second, "epsilon": epsilon, "visited": (visits > 0).sum()}
            if is_known:
                metrics["q_error"] = (agent.q - optimal_q)[reached].abs().mean()
                values = policy_values(next_probs, mean_rewards, agent.q.argmax(-1), args.gamma)
                metrics["regret"] = optimal_return - start_probs @ values
            if envs.return_queue:
                metrics["episodic_return"] = np.mean(envs.return_queue)
                metrics["episodic_length"] = np.mean(envs.length_queue)
                envs.return_queue.clear()
                envs.length_queue.clear()
            for name, value in metrics.items():
                writer.add_scalar(f"charts/{name}", value, step)
        if save_now:
            save_checkpoint(run_dir, args, step, agent=agent)
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
        eval_envs = make_discrete_envs(args.env_id, args.eval_episodes, env_kwargs | {"vectorization_mode": "sync"})
        returns = play(agent.q.argmax(-1), eval_envs)
        writer.add_scalar("eval/return_mean", returns.mean(), step)
        writer.add_scalar("eval/return_std", returns.std(), step)
        print(f"evaluation: return {returns.mean():.2f} ± {returns.std():.2f} over {len(returns)} greedy episodes")
    writer.close()


if __name__ == "__main__":
    main(*parse_args())
