# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "datasets>=5.0",
#     "numpy>=2.4",
#     "tensorboard>=2.21",
#     "torch>=2.13.0",
#     "tqdm>=4.70",
#     "transformers>=5.20",
#     "tyro>=1.0.17",
# ]
# ///
"""RLHF by PPO: raise a reward model's score of a language model's own texts, and stay near the model it started from.

The last of RLHF's three steps. The policy π answers prompts; each response y earns r(x, y) - β·log π(y|x)/π_ref(y|x),
and PPO raises its expectation. The best policy is known in closed form, π* ∝ π_ref·exp(r/β): β says how far to trust
the score. Four models take part: the policy; the critic, which starts from the reward model; the reward model and the
reference π_ref, a copy of the policy at the start, which are frozen.

Papers: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", arXiv 1909.08593; Ouyang et al. 2022
(InstructGPT), arXiv 2203.02155. PPO is Schulman et al. 2017, arXiv 1707.06347; GAE 2015, arXiv 1506.02438.

    python algos/rlhf_ppo.py                      # the small language world: 0.88 of the possible gain in a minute
    python algos/rlhf_ppo.py --model my-sft-model --reward-model my-reward-model --dataset trl-lib/tldr \\
        --learning-rate 3e-6 --kl-coef 0.05 --total-episodes 100000 --batch-size 512 --micro-batch-size 16 \\
        --dtype bfloat16 --gradient-checkpointing

The data set has a column `prompt`, of texts or lists of {"role", "content"} messages (other columns don't matter), or
`messages`, whose last turn of the assistant is left out. --gold benchmark/world.py logs the true reward of that world.

Letters: B sequences of a rollout, b of a micro-batch, P tokens of a prompt, R of a response, L of a row (P + R), V
words of the vocabulary. A state is a prompt with the response so far, an action the next token; a response ends with a
stop token (EOS, or another of the generation config) or at --response-length. Tensors of a rollout with a number per
token are (B, L): the column is the token's place in its row, and `mask` is 1 on responses, stop token included.

Logged at every update, with TRL's names: objective/kl, objective/entropy and objective/non_score_reward, sums over a
response of log π/π_ref, -log π and -β·log π/π_ref; objective/scores, r(x, y) less the penalty for missing stops;
objective/rlhf_reward, the two rewards together, all means over the rollout; objective/gold, the gold reward if asked
for; val/num_eos_tokens, the share of responses that stopped; over all minibatches, loss/policy, loss/value,
policy/approxkl (E[(r - 1) - log r], how far the update went), policy/clipfrac (share of tokens outside the clip range),
val/ratio (mean π/π_old), grad_norm (before clipping); lr, kl_coef (β), episodes_per_second and tokens_per_second
(response tokens). samples holds completions with their scores, as text, before and after training.

Differs from the papers:
 1. Policy and critic are two models, as in InstructGPT (one with two heads in Ziegler's code), under one optimiser and
    one learning rate, which falls linearly to 0.
 2. Dropout is off, so that π_old is π before the first step.
 3. A response without a stop token is scored as it is, less a penalty; Ziegler gives a fixed reward of -1.
 4. A token is sampled by inverting the distribution function at a uniform number. These are drawn on the CPU for all
    processes, so that any number of processes samples alike.
 5. No pretraining gradients (InstructGPT Eq. 2 with γ = 0).
 6. With --lora-rank, policy and critic train adapters, and the reference is the policy with its adapters off.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import io
import json
import logging
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import transformers
import tyro
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

if TYPE_CHECKING:  # imported where they are used: --help need not wait for them
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ASSETS = Path(__file__).resolve().parent.parent / "benchmark" / "assets"  # the small language world


@dataclass
class Args:
    # run
    seed: int = 1
    """seed of the order of prompts, of sampling and of minibatches"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU when there is one"""
    run_dir: str = ""
    """where the run is written; by default runs/<task>__<script>__<seed>__<timestamp>"""
    resume: str = ""
    """checkpoint.pt to continue; flags not given again are taken from it"""
    save_every: int = 20
    """updates between checkpoints; 0: only at the end"""
    track: bool = False
    """mirror the logs to Weights & Biases"""
    compile: bool = False
    """torch.compile the models"""

    # task
    model: str = str(ASSETS / "sft")
    """hub id or folder of the policy to start from, with its tokenizer; it is also the reference π_ref"""
    reward_model: str = str(ASSETS / "reward")
    """hub id or folder of the reward model, one made by reward_model.py say; the critic starts from it"""
    dataset: str = str(ASSETS / "prompts")
    """hub id, folder or jsonl, json, csv or parquet file with prompt, or messages"""
    train_split: str = "train"
    """split to take prompts from; slices such as train[:95%] work"""
    gold: str = ""
    """Python file with gold_reward(prompt, response, finished), the true reward, to log beside the score"""
    total_episodes: int = 4096
    """responses to sample in all"""
    max_length: int = 512
    """longest row in tokens, prompt and response: longer prompts are left out"""

    # optimisation
    learning_rate: float = 5e-4
    """step size of AdamW at the start; it falls linearly to 0. About 3e-6 for pretrained models"""
    batch_size: int = 128
    """B: responses of a rollout, over all processes"""
    num_minibatches: int = 4
    """minibatches per epoch, one step each"""
    num_ppo_epochs: int = 4
    """passes over the rollout per update (PPO Algorithm 1's K)"""
    micro_batch_size: int = 16
    """rows of a forward pass, over all processes, of like length: less memory, same gradient; 0: the whole minibatch"""
    max_grad_norm: float = 1.0
    """largest global norm of the gradient; inf turns the clip off"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """precision of the forward pass (autocast); weights and log-probabilities stay float32"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third slower"""
    lora_rank: int = 0
    """rank of LoRA adapters (needs peft); 0 trains all weights"""

    # algorithm
    response_length: int = 48
    """longest response in tokens"""
    temperature: float = 1.0
    """of sampling; π and π_ref are these tempered distributions everywhere"""
    kl_coef: float = 0.5
    """β: weight of the KL penalty (Ziegler Eq. 2), in units of the score per nat; at the start, with --target-kl"""
    target_kl: float = 0.0
    """KL per response, in nats, towards which β is adapted (Ziegler 2.2); 0 leaves β alone"""
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation (GAE Eq. 16); γ is 1"""
    clip_coef: float = 0.2
    """clip range ε of the ratio (PPO Eq. 7) and of the value's change"""
    vf_coef: float = 0.1
    """value loss coefficient c1 (PPO Eq. 9)"""
    missing_eos_penalty: float = 1.0
    """taken off the score of a response without a stop token"""

    @property
    def minibatch_size(self) -> int:
        """Rows of a minibatch, over all processes."""
        return self.batch_size // self.num_minibatches

    @property
    def rows_per_pass(self) -> int:
        """b: rows of a forward pass, over all processes."""
        return self.micro_batch_size or self.minibatch_size


def validate(args: Args) -> None:
    """Check what a user can get wrong before any work: one line and exit status 2 for the first fault."""
    check_ranges(args, 1, math.inf, "total_episodes", "batch_size", "num_minibatches", "num_ppo_epochs")
    check_ranges(args, 1, math.inf, "response_length", "max_length")
    check_ranges(args, 0, math.inf, "save_every", "learning_rate", "micro_batch_size", "max_grad_norm", "lora_rank")
    check_ranges(args, 0, math.inf, "kl_coef", "target_kl", "clip_coef", "vf_coef", "missing_eos_penalty")
    check_ranges(args, 0, 1, "gae_lambda")
    if not 0 < args.temperature < math.inf:
        error(f"--temperature must be above 0, not {args.temperature}")
    if args.target_kl and not args.kl_coef:
        error("--target-kl scales --kl-coef, which must not be 0 then")
    if args.batch_size % args.num_minibatches:
        error(f"--num-minibatches {args.num_minibatches} does not divide --batch-size {args.batch_size}")
    if args.minibatch_size % args.rows_per_pass or args.rows_per_pass % WORLD_SIZE:
        error(f"minibatches of {args.minibatch_size} rows (--batch-size / --num-minibatches) must be a multiple of "
              f"--micro-batch-size {args.rows_per_pass}, and that of the {WORLD_SIZE} processes")
    if args.total_episodes < args.batch_size:
        error(f"--total-episodes {args.total_episodes} is less than one rollout of --batch-size {args.batch_size}")
    if args.max_length <= args.response_length:
        error(f"--max-length {args.max_length} leaves no room for a prompt before --response-length "
              f"{args.response_length}")
    if args.lora_rank:
        check_package("lora-rank", "peft")
    check_run(args, "model", "reward_model", "dataset", "train_split", "batch_size", "response_length", "lora_rank")
    check_assets("model", args.model, "reward_model", args.reward_model, "dataset", args.dataset)


# --- model ---


def response_logits(model: PreTrainedModel, ids: Tensor, start: int) -> Tensor:
    """Logits that predict the tokens from position `start` on: ids (b, L) to (b, L - start, V).

    They come from the positions one before; the vocabulary head is applied to these only. Rows are padded on the
    right, where causal attention needs no mask.
    """
    return model(ids[:, :-1], logits_to_keep=ids.shape[1] - start, use_cache=False).logits


def rewards(model: PreTrainedModel, ids: Tensor, last: Tensor) -> Tensor:
    """r(x, y) of each row: ids (b, L), last (b,) the position of its last token, to (b,), in float32.

    What follows the last token becomes padding, which is how transformers' own forward pass finds it.
    """
    after = torch.arange(ids.shape[1], device=ids.device) > last[:, None]
    ids = ids.masked_fill(after, model.config.get_text_config().pad_token_id)
    return model(ids, use_cache=False).logits[:, 0].float() - getattr(model.config, "reward_mean", 0.0)


def tempered_logprobs(model: PreTrainedModel, ids: Tensor, start: int, temperature: float) -> Tensor:
    """log π(y_t | x, y_<t) of the tokens from position `start` on: ids (b, L) to (b, L - start), in float32.

    π is the distribution that `sample` draws from.
    """
    return response_logprobs(response_logits(model, ids, start) / temperature, ids[:, start:])


def add_lora(model: PreTrainedModel, rank: int) -> PreTrainedModel:
    """The model with frozen weights and trainable low-rank adapters, which are 0 at first, on its linear layers."""
    from peft import LoraConfig, get_peft_model
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def token_values(critic: PreTrainedModel, ids: Tensor, start: int) -> Tensor:
    """V of the state before each token from position `start` on: ids (b, L) to (b, L - start), in float32."""
    hidden = critic.base_model(ids[:, :-1], use_cache=False).last_hidden_state[:, start - 1 :]
    return critic.score(hidden).squeeze(-1).float()


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """A token per row from softmax(logits): where the distribution function passes `uniform`. (b, V), (b,) to (b,)."""
    distribution = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(distribution, uniform[:, None] * distribution[:, -1:], right=True).squeeze(1)


@torch.no_grad()
def sample(model: PreTrainedModel, prompts: list[list[int]], uniform: Tensor, temperature: float,
           stops: list[int]) -> Tensor:
    """Responses to prompts (token ids) at a temperature: (b, R) ids, -1 after the first of `stops`.

    uniform (b, R) holds the random numbers in [0, 1). Prompts are padded on the left, so that all end in one column;
    attention and positions leave the padding out. Calling forward leaves out --compile: the cache grows by the token.
    """
    width, (rows, length) = max(map(len, prompts)), uniform.shape
    tokens = torch.tensor([ids[:1] * (width - len(ids)) + ids for ids in prompts], device=uniform.device)
    lengths = torch.tensor([[len(ids)] for ids in prompts], device=uniform.device)
    visible = (torch.arange(width + length, device=uniform.device) >= width - lengths).long()  # (b, P + R)
    positions = (visible.cumsum(1) - 1).clamp(min=0)
    cache = transformers.DynamicCache(config=model.config)
    responses = torch.full((rows, length), -1, device=uniform.device)
    running = torch.arange(rows, device=uniform.device)  # rows that have not ended: the model runs on these alone
    ends, seen = torch.tensor(stops, device=uniform.device), 0
    for t in range(length):
        logits = model.forward(tokens, attention_mask=visible[running, : width + t], past_key_values=cache,
                               use_cache=True, position_ids=positions[running, seen : width + t],
                               logits_to_keep=1).logits[:, -1]
        token = draw(logits / temperature, uniform[running, t])
        responses[running, t] = token
        on = (~torch.isin(token, ends)).nonzero().squeeze(1)
        if not len(on):
            break
        if len(on) < len(token):
            cache.reorder_cache(on)  # drops the others, for every kind of layer
            running = running[on]
        tokens, seen = token[on, None], width + t
    return responses


# --- algorithm ---


def response_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """log π(y_t | x, y_<t) of each response token: logits (b, R, V) and ids (b, R) to (b, R), in float32."""
    return -F.cross_entropy(logits.float().transpose(1, 2), ids, reduction="none")


def kl_penalised_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, last: Tensor,
                         kl_coef: float) -> Tensor:
    """Reward of each token: -β·log π(y_t | x, y_<t)/π_ref(y_t | x, y_<t), and the score with the last one.

    Their sum is Ziegler's R(x, y) = r(x, y) - β·log π(y|x)/π_ref(y|x) (Eq. 2). scores are (B,), the rest and the
    result (B, L); mask is 1 on responses, last is 1 on the last token of each.
    """
    return scores[:, None] * last - kl_coef * (logprobs - ref_logprobs) * mask  # Eq. 2


def adapt_kl_coef(kl_coef: float, kl: float, target_kl: float) -> float:
    """Ziegler's controller (2.2), once per rollout: e = clip(KL/target - 1, -0.2, 0.2), β ← β·(1 + 0.1·e).

    kl and target_kl are nats per response.
    """
    fault = min(max(kl / target_kl - 1, -0.2), 0.2)
    return kl_coef * (1 + 0.1 * fault)


def discounted_sum(x: Tensor, discount: Tensor) -> Tensor:
    """S_t = x_t + discount_t·S_{t+1}, backwards in time; all tensors (T, N)."""
    sums = torch.empty_like(x)
    following = torch.zeros_like(x[0])
    for t in reversed(range(len(x))):
        following = x[t] + discount[t] * following
        sums[t] = following
    return sums


def compute_gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, done: Tensor, gamma: float, lam: float
) -> Tensor:
    """Generalised advantage estimation (GAE Eq. 16, PPO Eq. 11-12): A_t = Σ_l (γλ)^l·δ_{t+l}, to `done`; all (T, N)."""
    deltas = rewards + gamma * next_values * (1 - terminated) - values  # δ_t = r_t + γ·V(s_{t+1}) - V(s_t)
    return discounted_sum(deltas, gamma * lam * (1 - done))


def masked_mean(x: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    """Sum of x where mask is 1, over count. With count from the whole minibatch, shares of it add up to its mean."""
    return (x * mask).sum() / count


def standardise(x: Tensor, mask: Tensor) -> Tensor:
    """(x - mean) / (std + 1e-8), with mean and population std over the entries where mask is 1. Same shape as x."""
    count = mask.sum().clamp(min=1)
    centred = x - masked_mean(x, mask, count)
    return centred / (masked_mean(centred**2, mask, count).sqrt() + 1e-8)


def policy_loss(log_ratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """Clipped surrogate per sample (PPO Eq. 7, negated): -min(r·A, clip(r, 1 - ε, 1 + ε)·A), r = π/π_old."""
    ratio = log_ratio.exp()  # PPO Eq. 6
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages)  # PPO Eq. 7


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_coef: float) -> Tensor:
    """Half squared error per sample (PPO Eq. 9's L^VF), the worse of V and V clipped to V_old ± ε; ε = inf: no clip."""
    clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


def rlhf_loss(logprobs: Tensor, values: Tensor, old_logprobs: Tensor, old_values: Tensor, advantages: Tensor,
              returns: Tensor, mask: Tensor, count: Tensor, clip_coef: float, vf_coef: float) -> tuple[Tensor, Tensor]:
    """Loss of a micro-batch (PPO Eq. 9, negated, without entropy bonus) and its METRICS (5,).

    Tensors are (b, R). Tokens with mask 0 don't count; count () is the number of those that do in the minibatch, over
    all processes.
    """
    policy_term = masked_mean(policy_loss(logprobs - old_logprobs, advantages, clip_coef), mask, count)
    value_term = masked_mean(value_loss(values, old_values, returns, clip_coef), mask, count)
    loss = policy_term + vf_coef * value_term  # PPO Eq. 9
    log_ratio = (logprobs - old_logprobs).detach()
    ratio = log_ratio.exp()
    approx_kl = masked_mean(ratio - 1 - log_ratio, mask, count)  # E_old[(r - 1) - log r] = KL(π_old || π)
    clip_fraction = masked_mean(((ratio - 1).abs() > clip_coef).float(), mask, count)
    metrics = [policy_term, value_term, approx_kl, clip_fraction, masked_mean(ratio, mask, count)]
    return loss, torch.stack(metrics).detach()


METRICS = ("loss/policy", "loss/value", "policy/approxkl", "policy/clipfrac", "val/ratio")


def annealed(initial: float, step: int, total_steps: int) -> float:
    """Linear schedule: `initial` at step 0, 0 at total_steps."""
    return initial * (1 - step / total_steps)


# --- plumbing (same in every script; skip on first read) ---

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
SCRIPT = Path(__file__).stem


def error(message: str, status: int = 2) -> NoReturn:
    """Tell the user in one line what is wrong and exit."""
    if RANK == 0:
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)


def say(message: str) -> None:
    """Print a line above the progress bar, once for all processes."""
    if RANK == 0:
        tqdm.write(message)


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


def check_assets(*names_and_values: str) -> None:
    """Refuse defaults that lie in the shipped assets when the script was copied away from them."""
    flags = [f"--{name.replace('_', '-')}" for name in names_and_values[::2]]
    if any(value.startswith(str(ASSETS)) and not Path(value).exists() for value in names_and_values[1::2]):
        error(f"the small language world is not beside this copy of {SCRIPT}.py: give {' and '.join(flags)}")


def quiet() -> None:
    """Leave the terminal to the script: no progress bars, retries and advice of the libraries."""
    import datasets

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # it logs what it raises as an error, too
    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch|transformers")


def load_pretrained(loader: Any, flag: str, name: str, **options: Any) -> Any:
    """What `loader.from_pretrained` makes of a hub id or folder, without ever running code that comes with it."""
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        error(f"--{flag} {name}: no such folder")
    try:
        return loader.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as fault:  # a dozen types, from the network, the files and their contents
        reason = " ".join(str(fault).split())[:200]
        if "trust_remote_code" in str(fault):
            reason = "it needs Python code from its repository, which is never run here"
        elif "no file named" in reason:
            reason = "the folder holds no weights"
        error(f"--{flag} {name}: {reason}")


def load_tokenizer(flag: str, name: str) -> PreTrainedTokenizerBase:
    """Tokenizer of a model; it must have an end-of-sequence token."""
    tokenizer = load_pretrained(transformers.AutoTokenizer, flag, name)
    if tokenizer.eos_token_id is None:
        error(f"--{flag} {name}: its tokenizer has no EOS token, so completions could not end; set eos_token in it")
    return tokenizer


def check_model(flag: str, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
    """Refuse a model that can't read the tokenizer's ids or rows of `length` tokens."""
    config = model.config.get_text_config()
    if len(tokenizer) > config.vocab_size:
        error(f"--{flag} {name}: {len(tokenizer)} tokens in the tokenizer, but {config.vocab_size} in the model")
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    if length > positions:
        error(f"--{flag} {name}: reads {positions} tokens at most, less than the {length} asked for (--max-length)")


def load_split(name: str, split: str) -> datasets.Dataset:
    """A split of a data set, not empty; name is a hub id, a folder or a file."""
    import datasets

    where = f"--dataset {name}"
    path, kinds = Path(name), {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    if not path.exists() and (name.startswith(("/", ".", "~")) or path.suffix in kinds):
        error(f"{where}: no such file or folder")
    if path.is_file() and path.suffix not in kinds:
        error(f"{where}: files must end in {', '.join(kinds)}")
    try:
        files = {"path": kinds[path.suffix], "data_files": name} if path.is_file() else {"path": name}
        data = datasets.load_dataset(**files, split=split)
    except StopIteration:
        error(f"{where} has no rows")
    except Exception as fault:  # a dozen types, from the network, the files and their contents
        for file in [path] if path.is_file() else sorted(path.rglob("*.jsonl")):
            for number, line in enumerate(file.open("rb") if file.suffix == ".jsonl" else [], 1):
                try:
                    json.loads(line)
                except ValueError:
                    error(f"{where}: line {number} of {file.name} is not valid JSON")
        advice = " (--eval-split '' for none)" if "split" in str(fault) else ""
        error(f"{where}: {' '.join(str(fault).split())[:200]}{advice}")
    if not len(data):
        error(f"{where}, split {split} has no rows")
    return data


def load_rows(name: str, split: str, *layouts: tuple[str, ...]) -> dict[str, list[Any]]:
    """Columns of the first layout that a split of a data set has, each a list of texts or of lists of messages.

    Exits with the row at fault when one is empty or of another kind.
    """
    data, where = load_split(name, split), f"--dataset {name}, split {split}"
    layout = next((layout for layout in layouts if set(layout) <= set(data.column_names)), None)
    if layout is None:
        wanted = ", or ".join(" and ".join(layout) for layout in layouts)
        error(f"{where} has the columns {', '.join(data.column_names)}; {SCRIPT}.py needs {wanted}")
    try:
        columns = {column: list(data[column]) for column in layout}
    except UnicodeDecodeError:
        error(f"{where}: texts must be UTF-8")
    first = columns[layout[-1]][0]
    for column, values in columns.items():
        for number, value in enumerate(values, 1):
            here = f"{where}, row {number}, column {column}"
            if not is_messages(value) and not isinstance(value, str):
                error(f"{here}: neither text nor a list of messages with role and content, but {str(value)[:50]!r}")
            if is_messages(value) != is_messages(first):
                error(f"{here}: texts and lists of messages are mixed in this data set")
            last = value[-1]["content"] if is_messages(value) else value
            if column != "prompt" and not last.strip():
                error(f"{here}: empty")
    return columns


def is_messages(value: Any) -> bool:
    """Whether a value is a conversation: a list, not empty, of {"role": str, "content": str, …}."""
    return isinstance(value, list) and len(value) > 0 and all(
        isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in value
    )


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[Any], generation_prompt: bool = False) -> list[list[int]]:
    """Token ids of texts, or of conversations in the tokenizer's chat template (which has its own BOS and EOS)."""
    if isinstance(texts[0], str):
        return tokenizer(texts).input_ids
    if not tokenizer.chat_template:
        error("--dataset has messages, but the tokenizer of --model has no chat template")
    try:
        return tokenizer.apply_chat_template(texts, add_generation_prompt=generation_prompt, return_dict=False)
    except Exception as fault:  # templates raise what they like
        error(f"--dataset: the chat template of --model refuses a conversation ({' '.join(str(fault).split())[:150]})")


@functools.lru_cache(maxsize=1)
def permutation(size: int, seed: int) -> list[int]:
    """Numbers from 0 to size - 1 in random order, the same for the same seed."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()


def batch_at(rows: list[Any], step: int, batch_size: int, seed: int) -> list[Any]:
    """Rows of update `step`, a function of the step, so that a resumed run needs no position in the data."""
    epoch, batch = divmod(step, len(rows) // batch_size)
    order = permutation(len(rows), 1_000_003 * seed + epoch)
    return [rows[i] for i in order[batch * batch_size : (batch + 1) * batch_size]]


def micro_batches(rows: list[Any], size: int) -> Iterator[list[Any]]:
    """This process's share of micro-batches of about `size` rows; rows of like length meet, to save padding."""
    rows = sorted(rows, key=lambda row: sum(map(len, row)))
    parts = max(1, len(rows) // size)
    for i in range(parts):
        yield rows[i * len(rows) // parts : (i + 1) * len(rows) // parts][RANK::WORLD_SIZE]


def pad(sequences: list[list[int]], device: torch.device) -> Tensor:
    """Token ids (b, L), filled up on the right with each row's last token: nothing reads it, so any token does."""
    length = max(map(len, sequences))
    return torch.tensor([ids + ids[-1:] * (length - len(ids)) for ids in sequences], device=device)


def collate(rows: list[list[list[int]]], device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Rows [prompt, completion] to ids (b, L), `start` where the shortest prompt ends, and a mask (b, L - start).

    The mask is 1 on completion tokens. start is at least 1: nothing comes before a row's first token to predict it.
    """
    ids = pad([prompt + completion for prompt, completion in rows], device)
    begin = torch.tensor([[len(prompt)] for prompt, _ in rows])
    end = torch.tensor([[len(prompt) + len(completion)] for prompt, completion in rows])
    start = max(1, int(begin.min()))
    position = torch.arange(start, ids.shape[1])
    return ids, ((begin <= position) & (position < end)).float().to(device), start


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


def get_state(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and optimiser state, gathered from all processes, on the CPU of the first."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optimizer": moments}


def set_state(model: PreTrainedModel, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Put back what `get_state` returned."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"],
                   options=StateDictOptions(full_state_dict=True))


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weights: dict[str, Tensor],
               run_dir: Path) -> None:
    """Write model and tokenizer to run_dir/model, a folder that transformers' from_pretrained opens."""
    if RANK == 0:
        shutil.rmtree(run_dir / "model.tmp", ignore_errors=True)
        model.save_pretrained(run_dir / "model.tmp", state_dict=weights)
        tokenizer.save_pretrained(run_dir / "model.tmp")
        shutil.rmtree(run_dir / "model", ignore_errors=True)
        os.replace(run_dir / "model.tmp", run_dir / "model")
        say(f"run directory: {run_dir} (the model is in {run_dir / 'model'})")


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


def autocast(args: Args, device: torch.device) -> torch.autocast:
    """Context in which forward passes compute in --dtype."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")


def merged(args: Args, model: PreTrainedModel, weights: dict[str, Tensor]) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Model and weights to save: LoRA's adapters are added to the weights that they adapt."""
    if not args.lora_rank or RANK > 0:
        return model, weights
    whole = transformers.AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    whole.generation_config = model.generation_config
    whole = add_lora(whole, args.lora_rank)
    whole.load_state_dict(weights)
    whole = whole.merge_and_unload()
    return whole, whole.state_dict()


def load_scorer(name: str, policy_tokenizer: PreTrainedTokenizerBase, max_length: int) -> PreTrainedModel:
    """The reward model, which must score single tokens' states and read the policy's tokens."""
    model = load_pretrained(transformers.AutoModelForSequenceClassification, "reward-model", name, dtype=torch.float32)
    tokenizer = load_tokenizer("reward-model", name)
    if tokenizer.get_vocab() != policy_tokenizer.get_vocab():
        error(f"--reward-model {name}: its vocabulary ({len(tokenizer)} tokens) is not that of --model "
              f"({len(policy_tokenizer)} tokens); both must come from one tokenizer")
    check_model("reward-model", name, model, tokenizer, max_length)
    if model.config.num_labels != 1 or not hasattr(model, "score"):
        error(f"--reward-model {name}: needs one label and a head named score (train one with reward_model.py)")
    if model.config.get_text_config().pad_token_id is None:
        error(f"--reward-model {name}: its config has no pad_token_id, by which it finds a text's last token")
    return model


def load_gold(path: str) -> Callable[[str, str, bool], float]:
    """The function gold_reward(prompt, response, finished) of a Python file."""
    try:
        spec = importlib.util.spec_from_file_location("gold", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules["gold"] = module  # where dataclasses look their module up
        spec.loader.exec_module(module)
        return module.gold_reward
    except Exception as fault:  # whatever the file raises
        error(f"--gold {path}: cannot load gold_reward from it ({type(fault).__name__}: {fault})")


def load_prompts(args: Args, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the prompts that leave room for a response."""
    ((column, texts),) = load_rows(args.dataset, args.train_split, ("prompt",), ("messages",)).items()
    if column == "messages":
        texts = [turns[:-1] if turns[-1]["role"] == "assistant" else turns for turns in texts]
    for number, text in enumerate(texts, 1):
        if not text or isinstance(text, str) and not text.strip():
            error(f"--dataset {args.dataset}, split {args.train_split}, row {number}: the prompt is empty")
    rows = tokenize(tokenizer, texts, generation_prompt=True)
    kept = [ids for ids in rows if len(ids) <= args.max_length - args.response_length]
    if len(kept) < len(rows):
        say(f"split {args.train_split}: {len(rows) - len(kept)} of {len(rows)} prompts left out, longer than "
            f"--max-length {args.max_length} less --response-length {args.response_length}")
    if len(kept) < args.batch_size:
        error(f"--batch-size {args.batch_size} is more than the {len(kept)} prompts of --train-split "
              f"{args.train_split} that fit")
    return kept


def place_model(args: Args, model: PreTrainedModel, device: torch.device) -> None:
    """Put the model on the device in evaluation mode, which is without dropout."""
    model.to(device).eval()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()  # and off, until `recompute`


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a response: EOS of the tokenizer and those of the generation config."""
    stops = model.generation_config.eos_token_id or []
    return sorted({tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])})


def recompute(model: nn.Module, on: bool) -> None:
    """Turn enabled gradient checkpointing on for the update, off for sampling, which needs the cache."""
    for layer in model.modules():
        if isinstance(layer, transformers.modeling_layers.GradientCheckpointingLayer):
            layer.training = on  # not its parts: dropout stays off


def main(args: Args) -> None:
    validate(args)
    quiet()
    device = start_processes(args.device)
    torch.manual_seed(args.seed)  # the same in every process: all draw the same numbers and use their share
    tokenizer = load_tokenizer("model", args.model)
    policy = load_pretrained(transformers.AutoModelForCausalLM, "model", args.model, dtype=torch.float32)
    check_model("model", args.model, policy, tokenizer, args.max_length)
    reward_model = load_scorer(args.reward_model, tokenizer, args.max_length).requires_grad_(False)
    gold_reward = load_gold(args.gold) if args.gold else None
    prompts = load_prompts(args, tokenizer)
    stops = stop_tokens(policy, tokenizer)

    critic = copy.deepcopy(reward_model).requires_grad_(True)
    nn.init.zeros_(critic.score.weight)
    if args.lora_rank:
        policy = reference = add_lora(policy, args.lora_rank)
        setattr(critic, critic.base_model_prefix, add_lora(critic.base_model, args.lora_rank))
        bare = policy.disable_adapter
    else:
        reference, bare = copy.deepcopy(policy).requires_grad_(False), contextlib.nullcontext
    for model in (policy, critic, reward_model, reference):
        place_model(args, model, device)
    if args.compile:
        for model in (policy, critic.base_model, reward_model, reference):
            model.compile(dynamic=True)
    trained = nn.ModuleDict({"policy": policy, "critic": critic})
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, weight_decay=0.0, fused=True)

    total_steps = args.total_episodes // args.batch_size
    step, kl_coef = 0, args.kl_coef
    if args.resume:
        saved = load_checkpoint(args.resume)
        step, kl_coef = saved["step"], saved["kl_coef"]
        set_state(trained, optimizer, saved)
        torch.set_rng_state(saved["rng"])
    run_dir, writer = open_run(args, Path(args.dataset).stem, step, finished=step >= total_steps)

    def respond(model: PreTrainedModel, asked: list[list[int]], uniform: Tensor) -> list[list[int]]:
        """Sampled responses to prompts; each process samples its share and all get all."""
        ids = torch.zeros(uniform.shape, dtype=torch.long, device=device)
        share = slice(RANK, None, WORLD_SIZE)
        with autocast(args, device):
            ids[share] = sample(model, asked[share], uniform[share].to(device), args.temperature, stops)
        return [[token for token in row if token >= 0] for row in sum_over_processes(ids).tolist()]

    def score_rows(ids: Tensor, lengths: list[int]) -> Tensor:
        """r(x, y) of rows of these lengths, (b,)."""
        return rewards(reward_model, ids, torch.tensor(lengths, device=device) - 1)

    def texts_of(prompt: list[int], response: list[int]) -> tuple[str, str, bool]:
        """Prompt, response without its stop token, and whether it had one."""
        finished = response[-1] in stops
        return tokenizer.decode(prompt), tokenizer.decode(response[: len(response) - finished]), finished

    @torch.no_grad()
    def show_samples(when: str, model: PreTrainedModel) -> None:
        """Log and print scored completions of a few prompts, always with the same random numbers."""
        asked = prompts[: max(4, WORLD_SIZE)]
        uniform = torch.rand(len(asked), args.response_length, generator=torch.Generator().manual_seed(args.seed))
        rows = [prompt + response for prompt, response in zip(asked, respond(model, asked, uniform.double()))]
        with autocast(args, device):
            scores = score_rows(pad(rows, device), list(map(len, rows))).tolist()
        texts = []
        for prompt, row, score in zip(asked, rows, scores):
            question, answer, finished = texts_of(prompt, row[len(prompt) :])
            texts.append(f"{question} → {answer}{'' if finished else ' …'} (score {score:.2f})")
        writer.add_text("samples", "\n\n".join(texts), step)
        if when:
            say("\n".join([when, *texts]))

    episodes, tokens = 0, 0  # since the start, for speed
    bar = tqdm(total=total_steps, initial=step, unit="update", disable=RANK > 0)
    if step == 0:
        show_samples("", policy)
    start_time = time.perf_counter()

    while step < total_steps:
        # ===== collect =====
        asked = batch_at(prompts, step, args.batch_size, args.seed)
        uniform = torch.rand(args.batch_size, args.response_length, dtype=torch.float64)
        recompute(trained, False)
        responses = respond(policy, asked, uniform)
        rows = [[prompt, response, [i]] for i, (prompt, response) in enumerate(zip(asked, responses))]

        # ===== compute targets =====
        _, mask, start = collate([row[:2] for row in rows], device)
        mask = F.pad(mask, (start, 0))  # (B, L)
        last = (mask - F.pad(mask[:, 1:], (0, 1))).clamp(min=0)  # 1 where the mask ends
        per_token = torch.zeros(3, *mask.shape, device=device)
        scores = torch.zeros(args.batch_size, device=device)
        for part in micro_batches(rows, args.rows_per_pass):
            numbers = [number for *_, (number,) in part]
            ids, part_mask, start = collate([row[:2] for row in part], device)
            with torch.no_grad(), autocast(args, device):
                logprobs = tempered_logprobs(policy, ids, start, args.temperature)
                values = token_values(critic, ids, start)
                with bare():
                    ref_logprobs = tempered_logprobs(reference, ids, start, args.temperature)
                scores[numbers] = score_rows(ids, [len(prompt + response) for prompt, response, _ in part])
            per_token[:, numbers, start : ids.shape[1]] = torch.stack([logprobs, ref_logprobs, values]) * part_mask
        old_logprobs, ref_logprobs, old_values = sum_over_processes(per_token)  # zeros but for each one's share
        stopped = torch.tensor([response[-1] in stops for response in responses], device=device).float()
        scores = sum_over_processes(scores) - args.missing_eos_penalty * (1 - stopped)
        token_rewards = kl_penalised_rewards(scores, old_logprobs, ref_logprobs, mask, last, kl_coef)
        next_values = F.pad(old_values[:, 1:], (0, 1))
        advantages = compute_gae(token_rewards.T, old_values.T, next_values.T, last.T, last.T, 1.0, args.gae_lambda).T
        returns = advantages + old_values
        advantages = standardise(advantages, mask)

        # ===== update =====
        learning_rate = annealed(args.learning_rate, step, total_steps)
        optimizer.param_groups[0]["lr"] = learning_rate
        recompute(trained, args.gradient_checkpointing)
        history = []  # METRICS and gradient norm of each minibatch
        for _ in range(args.num_ppo_epochs):
            for order in torch.randperm(args.batch_size).split(args.minibatch_size):
                count = mask[order].sum()
                metrics = torch.zeros(len(METRICS), device=device)
                optimizer.zero_grad()
                for part in micro_batches([rows[i] for i in order], args.rows_per_pass):
                    ids, part_mask, start = collate([row[:2] for row in part], device)
                    where = [number for *_, (number,) in part], slice(start, ids.shape[1])
                    with autocast(args, device):
                        logprobs = tempered_logprobs(policy, ids, start, args.temperature)
                        values = token_values(critic, ids, start)
                    loss, part_metrics = rlhf_loss(
                        logprobs, values, old_logprobs[where], old_values[where], advantages[where], returns[where],
                        part_mask, count, args.clip_coef, args.vf_coef,
                    )
                    loss.backward()
                    metrics += part_metrics
                for parameter in parameters:
                    sum_over_processes(parameter.grad)
                grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                history.append(torch.cat([sum_over_processes(metrics), grad_norm.view(1)]))

        # ===== log and save =====
        step += 1
        episodes, tokens = episodes + args.batch_size, tokens + mask.sum().item()
        losses = dict(zip((*METRICS, "grad_norm"), torch.stack(history).mean(0).tolist()))
        check_finite(sum(losses.values()), step, run_dir, bar)
        kl = ((old_logprobs - ref_logprobs) * mask).sum(1).mean().item()
        score = scores.mean().item()
        seconds = time.perf_counter() - start_time
        log(writer, "", losses | {
            "objective/kl": kl, "objective/entropy": -(old_logprobs * mask).sum(1).mean().item(),
            "objective/non_score_reward": -kl_coef * kl, "objective/scores": score,
            "objective/rlhf_reward": score - kl_coef * kl, "val/num_eos_tokens": stopped.mean().item(),
            "lr": learning_rate, "kl_coef": kl_coef,
            "episodes_per_second": episodes / seconds, "tokens_per_second": tokens / seconds,
        }, step)
        if gold_reward:
            golds = [gold_reward(*texts_of(prompt, response)) for prompt, response, _ in rows]
            log(writer, "objective", {"gold": sum(golds) / len(golds)}, step)
        if args.target_kl:
            kl_coef = adapt_kl_coef(kl_coef, kl, args.target_kl)
        bar.set_postfix_str(f"score {score:.2f}, KL {kl:.2f}, {episodes / seconds:.0f} episodes/s", refresh=False)
        bar.update(1)
        if step == total_steps or passes(args.save_every, step - 1, step):
            save_checkpoint(run_dir, args, step=step, kl_coef=kl_coef, **get_state(trained, optimizer))

    bar.close()
    recompute(trained, False)
    with bare():
        show_samples("before:", reference)
    show_samples("after:", policy)
    weights = get_state(trained, optimizer)["model"]
    weights = {name.removeprefix("policy."): x for name, x in weights.items() if name.startswith("policy.")}
    model, weights = merged(args, policy, weights)
    save_model(model, tokenizer, weights, run_dir)
    writer.close()


if __name__ == "__main__":
    main(parse_args())
    if WORLD_SIZE > 1:
        sys.stdout.flush()
        os._exit(0)  # an interpreter that ends in the usual way may meet gloo's threads, still at work, and abort
