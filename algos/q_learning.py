# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["gymnasium~=1.4.0", "numpy~=2.4.6", "safetensors~=0.8.0", "tensorboard~=2.21.0", "torch~=2.13.0",
# "tqdm~=4.70.1", "tyro~=1.0.17"]
# ///
"""Tabular Q-learning (Watkins 1989; Sutton & Barto 2018, section 6.5), beside the exact optimum.

Q*(s, a) is the return of action a in state s followed by the best actions. Each step moves Q(s, a) by a share α towards
a sample of Bellman's optimality equation. Where the environment publishes its transitions (`P`, as toy text does), and
keeps to them, value iteration finds Q* first: charts/q_error is max |Q - Q*| over the charts/visited pairs (s, a).

    python algos/q_learning.py    # Taxi-v4: optimal, 13 s; --alpha-decay 0 --epsilon-end 0.5: q_error 0 (4 of 5 seeds)
    python algos/q_learning.py --env-id FrozenLake-v1 --total-timesteps 500000    # optimal, q_error falls to 0.06, 17 s
    python algos/q_learning.py --env-id CliffWalking-v1 --alpha-decay 0 --total-timesteps 100000  # -13, q_error 0, 6 s

Differs from the paper: N environments side by side, which update one after another with targets of the table before;
α = 1 / n^ω at a pair's n-th visit: ω > 1/2 averages chance out (Even-Dar & Mansour 2003); truncation bootstraps.
"""

import argparse
import json
import signal
import sys
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from safetensors.torch import save
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = Path(__file__).stem
LOG_EVERY = 1000  # environment steps
MAX_EVAL_STEPS = 27_000  # an evaluation episode is cut there


@dataclass
class Args:
    seed: int = 1  # of actions and environments
    run_dir: str = ""  # where the run is written; by default runs/<task>__<script>__<seed>__<time>
    resume: str = ""  # run directory or checkpoint to continue in new episodes, with its flags where none are given
    save_every: int = 100_000  # steps between checkpoints; 0: only at the end
    track: bool = False  # mirror the logs to Weights & Biases
    eval_episodes: int = 100  # episodes of the greedy policy after training; 0 skips them
    env_id: str = "Taxi-v4"  # gymnasium's name; module:Name-v0 imports module first, installed or in this directory
    env_kwargs: str = "{}"  # JSON object of keyword arguments for the environment
    total_timesteps: int = 300_000  # environment steps to train for
    num_envs: int = 16  # N: environments stepped side by side
    gamma: float = 0.99  # discount γ
    alpha_decay: float = 0.6  # ω of the step size α = 1 / n^ω; 0: α = 1, best where nothing is random
    epsilon_end: float = 0.1  # share ε of random actions in the end; it starts at 1
    exploration_fraction: float = 0.5  # share of total_timesteps over which ε falls linearly

    def __post_init__(self) -> None:
        in_range = 0 <= self.gamma < 1 and 0 <= self.epsilon_end <= 1 and self.alpha_decay >= 0
        if min(self.total_timesteps, self.num_envs) < 1 or not in_range:
            raise ValueError("total-timesteps, num-envs must be at least 1, alpha-decay 0, gamma < 1, epsilon-end <= 1")


def epsilon_at(step: int, end: float, duration: float) -> float:
    """Share ε of random actions: falls linearly from 1 at step 0 to `end` at step `duration`, and stays there."""
    return 1 + (end - 1) * min(1.0, step / max(1.0, duration))


def td_target(rewards: Tensor, next_q: Tensor, terminated: Tensor, gamma: float) -> Tensor:
    """y = r + γ·max_a' Q(s', a')·(1 - terminated), (B,), a sample of Bellman's equation; next_q = Q(s', ·), (B, A)."""
    return rewards + gamma * next_q.max(-1).values * (1 - terminated)


def value_iteration(P: dict[int, dict[int, list]], gamma: float) -> Tensor:
    """Q* (S, A) by Bellman's optimality equation Q(s, a) = Σ p·(r + γ·max_a' Q(s', a')·(1 - terminated)), repeated."""
    outcomes = [(s, a, *outcome) for s in range(len(P)) for a in range(len(P[s])) for outcome in P[s][a]]
    states, actions, probs, next_states, rewards, terminated = torch.tensor(outcomes, dtype=torch.float64).T
    q = torch.zeros(len(P), len(P[0]), dtype=torch.float64)
    for _ in range(int(30 / (1 - gamma))):  # each shrinks the error by γ, together to 1e-13
        targets = td_target(rewards, q[next_states.long()], terminated, gamma)
        q = torch.zeros_like(q).index_put((states.long(), actions.long()), probs * targets, accumulate=True)
    return q


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
    sys.path.append("")  # a user's own module may lie there
    envs = gym.make_vec(args.env_id, args.num_envs, "sync", None, **json.loads(args.env_kwargs))
    spaces = envs.single_observation_space, envs.single_action_space
    if any(not isinstance(space, gym.spaces.Discrete) or space.start != 0 for space in spaces):
        raise SystemExit(f"{args.env_id}: observations and actions must be Discrete from 0, not {spaces}")
    q, visits = np.zeros((2, *(space.n for space in spaces)))  # Q(s, a) and the number of its updates, (S, A)
    agent = {"q": torch.from_numpy(q), "visits": torch.from_numpy(visits)}  # shares their memory
    tables = {"return": agent["q"]}  # of the greedy policy and, where P is known, of π*
    if isinstance(P := getattr(envs.envs[0].unwrapped, "P", None), dict):
        tables["optimal_return"] = optimal_q = value_iteration(P, args.gamma)
        known = {(s, a, *outcome) for s in P for a in P[s] for _, *outcome in P[s][a]}
    envs = gym.wrappers.vector.RecordEpisodeStatistics(envs, LOG_EVERY, stats_key="episode_statistics")
    step = saved["step"] if saved else 0
    if saved:
        q[:], visits[:] = saved["agent"]["q"], saved["agent"]["visits"]
        if args.seed == saved["args"]["seed"]:
            torch.set_rng_state(saved["rng"])
    run_dir = Path(args.run_dir or f"runs/{args.env_id}__{SCRIPT}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}")
    if (run_dir / "checkpoint.pt").exists() and not (saved and run_dir.samefile(saved["args"]["run_dir"] or "/")):
        raise SystemExit(f"{run_dir} holds a run: choose another --run-dir, or continue it with --resume {run_dir}")
    run_dir.mkdir(parents=True, exist_ok=True)
    print(f"run directory: {run_dir}")
    if args.track:
        import wandb

        wandb.init(project="algos", name=run_dir.name, config=asdict(args), dir=run_dir, sync_tensorboard=True)
    writer = SummaryWriter(run_dir, purge_step=step + 1)
    obs, _ = envs.reset(seed=int(torch.randint(2**30, ())))
    caught, signals = [], (signal.SIGINT, signal.SIGTERM)  # after one the run is saved; a second one kills
    for number in signals:
        signal.signal(number, lambda *_: caught.extend(signal.signal(number, signal.SIG_DFL) for number in signals))
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step")
    while step < args.total_timesteps:
        # ===== collect =====
        is_step = ~envs.prev_dones  # an environment that was done resets now, whatever the action
        epsilon = epsilon_at(step, args.epsilon_end, args.exploration_fraction * args.total_timesteps)
        best = agent["q"].index_select(0, torch.from_numpy(obs)).argmax(-1)  # (N,); refuses negative states
        action = torch.where(torch.rand(len(best)) < epsilon, torch.randint(q.shape[1], best.shape), best).numpy()
        next_obs, reward, terminated, _, _ = envs.step(action)
        seen = zip(*(x[is_step].tolist() for x in (obs, action, next_obs, reward, terminated)))
        if "optimal_return" in tables and not known.issuperset(seen):
            del tables["optimal_return"]
            tqdm.write(f"{args.env_id} does otherwise than its P says: the optimum is not known")

        # ===== compute targets =====
        targets = td_target(torch.tensor(reward), agent["q"][next_obs], torch.tensor(terminated).double(), args.gamma)

        # ===== update =====
        for s, a, y in zip(obs[is_step], action[is_step], targets.numpy()[is_step]):
            visits[s, a] += 1
            q[s, a] += (y - q[s, a]) / visits[s, a] ** args.alpha_decay
        step_before, step = step, step + int(is_step.sum())
        obs = next_obs

        # ===== log and save =====
        last = caught or step >= args.total_timesteps
        save_now = last or args.save_every and step // args.save_every > (step_before or -1) // args.save_every
        if save_now or step_before == 0 or step // LOG_EVERY > step_before // LOG_EVERY:
            assert np.isfinite(q).all(), f"Q became nan or inf before step {step}; any checkpoint in {run_dir} is older"
            writer.add_scalar("charts/SPS", (step - bar.initial) / bar.format_dict["elapsed"], step)
            writer.add_scalar("charts/visited", (visits > 0).sum(), step)
            if "optimal_return" in tables:
                writer.add_scalar("charts/q_error", (agent["q"] - optimal_q).abs()[visits > 0].max(), step)
            for name, queue in {"episodic_return": envs.return_queue, "episodic_length": envs.length_queue}.items():
                if queue:
                    writer.add_scalar(f"charts/{name}", np.mean(queue), step)
                    queue.clear()
        if save_now:  # to another file first, so that a crash leaves the former checkpoint whole
            state = {"script": SCRIPT, "args": asdict(args), "step": step, "rng": torch.get_rng_state()}
            torch.save(state | {"agent": agent}, run_dir / "checkpoint.tmp")
            (run_dir / "checkpoint.tmp").replace(run_dir / "checkpoint.pt")
            (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
        bar.update(step - step_before)
        if caught and last:
            raise SystemExit(f"\nstopped at step {step}; to go on: python {sys.argv[0]} --resume {str(run_dir)!r}")

    # ===== evaluate =====
    for number in signals:
        signal.signal(number, signal.SIG_DFL)
    (run_dir / "model.safetensors").write_bytes(save(agent))
    for name, table in tables.items() if args.eval_episodes > 0 else ():
        envs.close()
        envs = gym.make_vec(args.env_id, args.eval_episodes, "sync", None, **json.loads(args.env_kwargs))
        obs, _ = envs.reset(seed=1000 * abs(args.seed))  # episode i has this seed + i, for both tables
        returns, running = np.zeros(len(obs)), np.ones(len(obs), dtype=bool)
        for _ in range(MAX_EVAL_STEPS):
            obs, reward, terminated, truncated, _ = envs.step(table[obs].argmax(-1).numpy())
            returns += np.where(running, reward, 0)
            running &= ~np.logical_or(terminated, truncated)
            if not running.any():
                break
        writer.add_scalar(f"eval/{name}_mean", returns.mean(), step)
        tqdm.write(f"evaluation: {name} {returns.mean():.2f} ± {returns.std():.2f}, {running.sum()} of {len(obs)} cut")
    writer.close()


if __name__ == "__main__":
    main(*parse_args())
