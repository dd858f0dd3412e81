# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["gymnasium[box2d,classic-control,mujoco]~=1.4.0", "ale-py~=0.12.1", "moviepy~=2.2.1", "numpy~=2.4.6",
# "opencv-python-headless~=5.0", "safetensors~=0.8.0", "tensorboard~=2.21", "torch~=2.13.0", "tqdm~=4.70", "tyro~=1.0"]
# ///
"""Proximal Policy Optimization (PPO): a policy gradient that may reuse its data.

A plain policy gradient is valid for one step only, since the data came from the policy before it. PPO takes several
epochs of steps on the same rollout and clips the ratio π/π_old, so that no sample gains by moving it further than ε.
Papers: Schulman et al. 2017, arXiv 1707.06347 (PPO); Schulman et al. 2015, arXiv 1506.02438 (GAE).

    python algos/ppo.py                                           # CartPole-v1, whose settings the defaults are: 500
    python algos/ppo.py --env-id LunarLander-v3 --normalize --total-timesteps 300000 --num-envs 8 --num-steps 256 \\
        --num-minibatches 16 --num-epochs 10 --learning-rate 3e-4 --ent-coef 0 --gamma 0.999 --gae-lambda 0.98  # 227
    python algos/ppo.py --env-id Pendulum-v1 --normalize --total-timesteps 200000 --num-envs 8 --num-steps 256 \\
        --num-minibatches 16 --num-epochs 10 --ent-coef 0 --gamma 0.9  # -172
    python algos/ppo.py --env-id HalfCheetah-v5 --normalize --total-timesteps 1000000 --num-envs 1 --num-steps 2048 \\
        --num-minibatches 32 --num-epochs 10 --learning-rate 3e-4 --ent-coef 0 --gamma 0.99  # 1718

Environments reset themselves one step late (gymnasium's NEXT_STEP). The observation that comes with `done` is the true
final one, so V(final observation) is the next row's value; that next row ignores its action, is not a step, and counts
nowhere. Logged values are means over the interval, returns are raw scores, approx_kl is E[(r - 1) - log r].

Differs from the paper:
 1. Vectors: separate networks for actor and critic; images: one CNN (Mnih et al. 2015) for both. Orthogonal weights.
 2. Advantages are normalised per minibatch, the gradient's norm is clipped to 0.5, the learning rate falls to 0.
 3. Truncated episodes bootstrap with V(final observation); only a termination ends the return.
 4. Box actions: Gaussian with one learnt standard deviation per dimension; ±1 stands for the environment's bounds.
 5. Atari: no sticky actions, whole games (losing a life ends nothing), training rewards clipped to their sign.
"""

import argparse
import json
import os
import signal
import sys
import warnings
from collections import defaultdict
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

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
    num_envs: int = 16  # N: environments stepped side by side
    normalize: bool = False  # normalise observations, with a critic rewards too, by statistics that the agent keeps
    learning_rate: float = 1e-3  # step size of Adam at the start
    anneal_lr: bool = True  # let the learning rate fall linearly to 0
    num_steps: int = 32  # T: steps per environment between two updates (PPO Algorithm 1)
    num_minibatches: int = 2  # minibatches per epoch
    num_epochs: int = 4  # K: passes over the rollout per update (PPO Algorithm 1)
    gamma: float = 0.98  # discount γ
    gae_lambda: float = 0.95  # λ of generalised advantage estimation (GAE Eq. 16)
    clip_coef: float = 0.2  # clip range ε of the ratio (PPO Eq. 7)
    clip_value: bool = False  # also clip the value's change, by ε in units of the return: a trap with large ones
    ent_coef: float = 0.01  # entropy coefficient c2 (PPO Eq. 9)
    vf_coef: float = 0.5  # value loss coefficient c1 (PPO Eq. 9)

    def __post_init__(self) -> None:
        if type(json.loads(self.env_kwargs)) is not dict:
            raise ValueError("env-kwargs must be a JSON object")
        if min(self.total_timesteps, self.num_envs, self.num_steps - 1, self.num_epochs, self.num_minibatches) < 1:
            raise ValueError("total-timesteps, num-envs, num-epochs, num-minibatches must be at least 1, num-steps 2")
        if self.num_envs * (self.num_steps // 2) < self.num_minibatches or not self.clip_coef > 0:  # half may be resets
            raise ValueError("num-minibatches must be at most num-envs · ⌊num-steps / 2⌋, and clip-coef above 0")
        if not (0 <= self.gamma <= 1 and 0 <= self.gae_lambda <= 1):
            raise ValueError("gamma and gae-lambda must lie between 0 and 1")


class RunningNorm(nn.Module):
    """(x - mean) / std of rows x (B, *shape), clipped to ±10, by pooled statistics of all rows that `update` saw."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.mean, self.var = nn.Buffer(torch.zeros(shape)), nn.Buffer(torch.ones(shape))
        self.count = nn.Buffer(torch.zeros((), dtype=torch.float64))

    def update(self, x: Tensor) -> None:
        self.count += len(x)
        share = (len(x) / self.count).float()  # of the new rows
        delta = x.mean(0) - self.mean
        self.mean += share * delta
        self.var += share * (x.var(0, correction=0) - self.var + (1 - share) * delta**2)

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / (self.var + 1e-8).sqrt()).clamp(-10, 10)


class Agent(nn.Module):
    """Actor and critic on raw observations: separate MLPs on vectors, two linear heads on one CNN on images."""

    def __init__(self, obs_space: Box, action_space: gym.Space, normalize: bool) -> None:
        super().__init__()
        self.discrete = isinstance(action_space, Discrete)
        self.is_image = obs_space.dtype == np.uint8 and len(obs_space.shape) in (2, 3)
        if self.is_image and sorted(obs_space.shape)[-2] < 36:
            raise SystemExit(f"images of shape {obs_space.shape} are too small for the CNN, which needs 36 x 36")
        A = int(action_space.n) if self.discrete else action_space.shape[0]
        self.obs_norm = RunningNorm(*obs_space.shape) if normalize else nn.Identity()
        self.return_norm = RunningNorm() if normalize else nn.Identity()
        if self.is_image:
            layers = [nn.LazyConv2d(32, 8, stride=4), nn.ReLU(), nn.Conv2d(32, 64, 4, stride=2), nn.ReLU()]
            layers += [nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(512), nn.ReLU()]
            self.cnn = nn.Sequential(*layers)
            self.actor, self.critic = nn.Sequential(nn.Linear(512, A)), nn.Sequential(nn.Linear(512, 1))
        else:
            self.actor = nn.Sequential(nn.LazyLinear(64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, A))
            self.critic = nn.Sequential(nn.LazyLinear(64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
        self.log_std = nn.Parameter(torch.zeros(0 if self.discrete else A))
        self(torch.zeros(1, *obs_space.shape), torch.zeros(1, *action_space.shape))  # lazy layers learn their sizes
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                nn.init.orthogonal_(layer.weight, 2**0.5)
                nn.init.zeros_(layer.bias)
        nn.init.orthogonal_(self.actor[-1].weight, 0.01)
        nn.init.orthogonal_(self.critic[-1].weight, 1.0)

    def features(self, obs: Tensor) -> Tensor:
        """Observations (B, *obs) of any dtype to (B, features); images may have channels first, last or none."""
        if self.is_image:
            planes = obs if obs.ndim == 4 else obs.unsqueeze(1)  # (B, C, H, W)
            return self.cnn((planes.movedim(-1, 1) if planes.shape[-1] < planes.shape[1] else planes) / 255)
        return self.obs_norm(obs.float()).flatten(1)

    def forward(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log π(a|s), entropy of π(·|s) and V(s), (B,) each, of observations (B, *obs) and actions (B,) or (B, A)."""
        features = self.features(obs)
        policy, values = self.actor(features), self.critic(features).squeeze(-1)  # (B, A), (B,)
        if self.discrete:
            logprobs = policy.log_softmax(-1)  # of all actions
            entropy = -(logprobs.exp() * logprobs).sum(-1)
            return logprobs.gather(-1, actions.long()[:, None]).squeeze(-1), entropy, values
        normal = torch.distributions.Normal(policy, self.log_std.exp(), validate_args=False)
        return normal.log_prob(actions).sum(-1), normal.entropy().sum(-1), values

    @torch.no_grad()
    def act(self, obs: Tensor, greedy: bool = False) -> Tensor:
        """Draw actions from π(·|s) (Gumbel-max), or take the likeliest: (B,) integers or (B, A) floats, on the CPU."""
        policy = self.actor(self.features(obs)).cpu()  # a checkpoint keeps the CPU's random numbers
        if self.discrete:
            return (policy if greedy else policy - torch.empty_like(policy).exponential_().log()).argmax(-1)
        return policy if greedy else policy + self.log_std.exp().cpu() * torch.randn_like(policy)


# --- algorithm ---


def discounted_sum(x: Tensor, discount: Tensor) -> Tensor:
    """S_t = x_t + discount_t·S_{t+1}, backwards in time; all tensors (T, N)."""
    sums = [torch.zeros_like(x[0])]
    for x_t, discount_t in zip(reversed(x.unbind()), reversed(discount.unbind())):
        sums.append(x_t + discount_t * sums[-1])
    return torch.stack(sums[:0:-1])


def compute_gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, done: Tensor, gamma: float, lam: float
) -> Tensor:
    """Generalised advantage estimation (GAE Eq. 16, PPO Eq. 11-12): A_t = Σ_l (γλ)^l·δ_{t+l}, to `done`; all (T, N)."""
    deltas = rewards + gamma * next_values * (1 - terminated) - values  # δ_t = r_t + γ·V(s_{t+1}) - V(s_t)
    return discounted_sum(deltas, gamma * lam * (1 - done))


def policy_loss(log_ratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """Clipped surrogate per sample (PPO Eq. 7, negated): -min(r·A, clip(r, 1 - ε, 1 + ε)·A), r = π/π_old."""
    ratio = log_ratio.exp()  # PPO Eq. 6
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages)  # PPO Eq. 7


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_coef: float) -> Tensor:
    """Half squared error per sample (PPO Eq. 9's L^VF), the worse of V and V clipped to V_old ± ε; ε = inf: no clip."""
    losses = (values - returns) ** 2
    if clip_coef < torch.inf:
        clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
        losses = torch.max(losses, (clipped - returns) ** 2)
    return 0.5 * losses


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
    env_kwargs, T, N = json.loads(args.env_kwargs), args.num_steps, args.num_envs
    envs = make_envs(args.env_id, N, env_kwargs)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args.normalize).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5, fused=True)
    forward, act = (torch.compile(f, dynamic=True) if args.compile else f for f in (agent.forward, agent.act))
    torch.set_num_threads(torch.get_num_threads() if agent.is_image else 1)  # small MLPs only lose time to more
    step = saved["step"] if saved else 0
    if saved:
        agent.load_state_dict(saved["agent"])
        optimizer.load_state_dict(saved["optimizer"])
        if args.seed == saved["args"]["seed"]:
            torch.set_rng_state(saved["rng"])
    value_clip = args.clip_coef if args.clip_value else np.inf
    obs = np.zeros((T + 1, N, *envs.single_observation_space.shape), np.uint8 if agent.is_image else np.float32)
    actions = np.zeros((T + 1, N, *envs.single_action_space.shape), np.float32)  # the last row stays 0
    rewards, terminated, done, mask, discounted = rollout = np.zeros((5, T, N), np.float32)
    metrics = defaultdict(list)
    obs[T], _ = envs.reset(seed=int(torch.randint(2**30, ())))
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
            state |= {"agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, run_dir / "checkpoint.tmp")
            (run_dir / "checkpoint.tmp").replace(run_dir / "checkpoint.pt")
            (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
        if stop:
            break

        # ===== collect =====
        obs[0] = obs[T]
        for t in range(T):  # for t = 0, row t - 1 is the last of the rollout before
            action = act(torch.as_tensor(obs[t], device=device)).numpy()  # (N,) or (N, A)
            obs[t + 1], rewards[t], terminated[t], truncated, info = envs.step(action)
            if "ALE/" in args.env_id:
                rewards[t] = np.sign(rewards[t])
            actions[t], done[t] = action, np.maximum(terminated[t], truncated)
            mask[t] = 1 - done[t - 1]  # the row after `done` is the reset, not a step
            if args.normalize:
                discounted[t] = mask[t] * (rewards[t] + args.gamma * discounted[t - 1])
            if done[t].any():
                metrics["charts/episodic_return"].extend(info["episode_statistics"]["r"][done[t] > 0])
                metrics["charts/episodic_length"].extend(info["episode_statistics"]["l"][done[t] > 0])

        # ===== compute targets =====
        b_obs, b_actions = torch.as_tensor(obs, device=device), torch.as_tensor(actions, device=device)  # (T + 1, N, …)
        b_rewards, b_terminated, b_done, b_mask, b_discounted = torch.tensor(rollout, device=device)  # (T, N)
        steps = b_mask.flatten().nonzero().squeeze(-1)  # the rows of (T·N,) that count
        step_before, step = step, step + len(steps)
        if args.normalize:
            agent.return_norm.update(b_discounted.flatten()[steps])
            b_rewards = (b_rewards / (agent.return_norm.var + 1e-8).sqrt()).clamp(-10, 10)
        with torch.no_grad():
            logprobs, _, values = (x.view(T + 1, N) for x in forward(b_obs.flatten(0, 1), b_actions.flatten(0, 1)))
        advantages = compute_gae(b_rewards, values[:-1], values[1:], b_terminated, b_done, args.gamma, args.gae_lambda)
        returns = advantages + values[:-1]
        batch = [x[:T].flatten(0, 1)[steps] for x in (b_obs, b_actions, logprobs, values, advantages, returns)]
        metrics["losses/explained_variance"].append(1 - batch[4].var() / (batch[5].var() + 1e-8))

        # ===== update =====
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - args.anneal_lr * step_before / args.total_timesteps)
        for _ in range(args.num_epochs):
            for rows in torch.randperm(len(steps)).to(device).tensor_split(args.num_minibatches):  # (M,)
                mb_obs, mb_actions, mb_logprobs, mb_values, mb_advantages, mb_returns = (x[rows] for x in batch)
                new_logprobs, entropy, new_values = forward(mb_obs, mb_actions)
                mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std(correction=0) + 1e-8)
                log_ratio = new_logprobs - mb_logprobs
                pg_loss = policy_loss(log_ratio, mb_advantages, args.clip_coef)
                v_loss = value_loss(new_values, mb_values, mb_returns, value_clip)
                loss = (pg_loss + args.vf_coef * v_loss - args.ent_coef * entropy).mean()  # PPO Eq. 9, negated
                optimizer.zero_grad()
                loss.backward()
                grad_norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.5)
                optimizer.step()
                metrics["losses/policy_loss"].append(pg_loss.detach().mean())
                metrics["losses/value_loss"].append(v_loss.detach().mean())
                metrics["losses/entropy"].append(entropy.detach().mean())
                metrics["losses/approx_kl"].append((log_ratio.detach().expm1() - log_ratio.detach()).mean())
                metrics["losses/grad_norm"].append(grad_norm)
        if args.normalize and not agent.is_image:
            agent.obs_norm.update(batch[0])  # after the update, which must see what `act` saw

        # ===== log =====
        stop = bool(caught) or step >= args.total_timesteps
        save_now = stop or args.save_every and step // args.save_every > step_before // args.save_every
        if save_now or step_before == 0 or step // LOG_EVERY > step_before // LOG_EVERY:
            means = {name: sum(map(float, values)) / len(values) for name, values in metrics.items()}
            if not sum(x.sum() for x in agent.state_dict().values()).isfinite():
                raise SystemExit(f"\nthe agent became nan or inf before step {step}; {run_dir}/checkpoint.pt is older")
            if "charts/episodic_return" in means:
                means["charts/episodes"] = len(metrics["charts/episodic_return"])
                bar.set_postfix_str(f"return {means['charts/episodic_return']:.1f}", refresh=False)
            means["charts/SPS"] = (step - bar.initial) / bar.format_dict["elapsed"]
            means["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
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
