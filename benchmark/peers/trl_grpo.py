"""TRL's GRPOTrainer beside algos/grpo.py: the same numbers on one batch, a run to compare with, and the speed of both.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install -r benchmark/peers/trl_requirements.txt
    /tmp/trl/bin/python benchmark/peers/trl_grpo.py equal                        # advantages, log π, loss, gradient
    /tmp/trl/bin/python benchmark/peers/trl_grpo.py train --out /tmp/trl_grpo_1  # then: run.py evaluate /tmp/trl_grpo_1 --beta 0.5
    /tmp/trl/bin/python benchmark/peers/trl_grpo.py speed                        # episodes per second, interleaved

`equal` runs main of grpo.py for two updates of three steps each and gives its completions and its weights of the last
step to TRL's _generate_and_score_completions and _compute_loss: there the policy is neither that of the rollout nor the
reference. Matched, for GRPO and for Dr. GRPO (loss_type "dr_grpo", scale_rewards "none"; --scale-rewards none): beta,
epsilon on both sides, delta off, importance_sampling_level "token", mask_truncated_completions off, no dropout,
float32, old log-probabilities by a forward pass after sampling, and use_bias_correction_kl, TRL's default: the KL term
is multiplied by the ratio, which GRPO's Eq. 3 leaves out. Of themselves both divide by the group's std with Bessel's
correction plus 1e-4, and take the mean over responses of the means over their tokens.
`train` and `speed` also match: 128 responses a rollout, 8 of each prompt, 4 minibatches, num_iterations 4, temperature
1 without top-p and top-k, 48 tokens at most, AdamW without weight decay, a norm clipped to 1; the reward is a function
that scores by the reward model, less the penalty for no stop token. Not matched: TRL's learning rate falls at each
step, grpo.py's at each update; TRL has the same minibatches in all epochs of a rollout; it reads one at once, grpo.py
its own micro-batches; it takes the prompts in another order.
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import datasets
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "algos"))
import grpo
import reward_model

DEFAULTS = grpo.Args()
CPU = torch.device("cpu")
STEPS = DEFAULTS.num_minibatches * DEFAULTS.num_epochs  # of TRL, for one update of grpo.py
DR_GRPO = {"scale_rewards": "none"}, {"loss_type": "dr_grpo", "scale_rewards": "none"}  # our flags, TRL's settings


class Log(TrainerCallback):
    """Keeps each update's metrics and the seconds since the start of training."""

    def __init__(self) -> None:
        self.start, self.rows = 0.0, []

    def on_train_begin(self, *_: object, **__: object) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_log(self, args: object, state: object, control: object, logs: dict, **_: object) -> None:
        """Called every STEPS steps, and at the end with totals, which have no loss."""
        if "loss" in logs:
            seconds = time.perf_counter() - self.start
            self.rows.append({"update": state.global_step // STEPS, "seconds": seconds, **logs})


def our_args(args: argparse.Namespace, run_dir: str, **flags: object) -> grpo.Args:
    """Flags of grpo.py."""
    names = ("model", "reward_model", "dataset", "kl_coef", "seed", "learning_rate")
    same = {"device": "cpu", "run_dir": run_dir, "save_every": 0} | {name: getattr(args, name) for name in names}
    return grpo.Args(**same | flags)


def reward_function(args: argparse.Namespace) -> Callable[..., list[float]]:
    """The reward model as a function of tokens, as grpo.py's reads the stop token too, less the penalty for none."""
    scorer, words = grpo.load_model(AutoModelForSequenceClassification, args.reward_model, DEFAULTS.max_length)
    pad = reward_model.set_pad_token(scorer, words, [words.eos_token_id])

    def score(prompts: list[str], completion_ids: list[list[int]], **_: object) -> list[float]:
        rows = list(zip(words(prompts).input_ids, completion_ids))
        endless = torch.tensor([float(y[-1] != words.eos_token_id) for y in completion_ids])
        with torch.no_grad():
            scores = reward_model.text_rewards(scorer, rows, pad, CPU)
        return (scores - DEFAULTS.missing_eos_penalty * endless).tolist()

    return score


def make_trainer(args: argparse.Namespace, out: str, updates: int, log: Log, **config: object) -> GRPOTrainer:
    """A GRPOTrainer with grpo.py's hyperparameters."""
    settings = {
        "loss_type": "grpo",
        "scale_rewards": "group",
        "beta": args.kl_coef,
        "epsilon": DEFAULTS.clip_coef,
        "importance_sampling_level": "token",
        "use_bias_correction_kl": True,
        "mask_truncated_completions": False,
        "disable_dropout": True,
        "num_generations": DEFAULTS.group_size,
        "num_iterations": DEFAULTS.num_epochs,
        "per_device_train_batch_size": DEFAULTS.batch_size // DEFAULTS.num_minibatches,
        "steps_per_generation": DEFAULTS.num_minibatches,
        "gradient_accumulation_steps": 1,
        "max_steps": updates * STEPS,
        "max_completion_length": DEFAULTS.response_length,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": args.seed,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": STEPS,
    }
    config = GRPOConfig(output_dir=out, **settings | config)
    data = datasets.load_dataset(args.dataset, split="train").select_columns("prompt")
    trainer = GRPOTrainer(args.model, reward_function(args), config, train_dataset=data, callbacks=[log])
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def watch(args: grpo.Args) -> dict[str, list]:
    """Run main of grpo.py; returns what `sample`, with its prompts, and `group_advantages` gave, and its steps had."""
    seen = defaultdict(list)

    class Accelerator(grpo.Accelerator):
        def backward(self, loss: Tensor, **kwargs: object) -> None:
            seen["losses"].append(loss.item())  # of micro-batches
            super().backward(loss, **kwargs)

        def clip_grad_norm_(self, parameters: object, *norm: float) -> Tensor:
            parameters = list(parameters)
            weights = parameters_to_vector(parameters).detach()
            gradient = parameters_to_vector(p.grad for p in parameters).detach()
            loss = sum(seen.pop("losses"))
            seen["steps"].append((weights, loss, gradient))
            return super().clip_grad_norm_(parameters, *norm)

    def watched(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*given: object) -> Tensor:
            seen[name].append((given[1], function(*given)))
            return seen[name][-1][1]

        return call

    calls = {name: watched(name, getattr(grpo, name)) for name in ("sample", "group_advantages")}
    with mock.patch.multiple(grpo, Accelerator=Accelerator, **calls):
        grpo.main(args)
    return seen


def difference(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|, as norms."""
    return ((ours - theirs).norm() / theirs.norm()).item()


def unpadded(batch: dict[str, Tensor], part: str) -> list[list[int]]:
    """Tokens of each prompt or of each completion of TRL's batch."""
    mask = batch[f"{part}_mask"].bool()
    return [ids[there].tolist() for ids, there in zip(batch[f"{part}_ids"], mask)]


def differences(args: argparse.Namespace, flags: dict[str, object], config: dict[str, object]) -> dict[str, float]:
    """|ours - TRL's| / |TRL's|, as norms."""
    sizes = {"num_minibatches": 1, "num_epochs": 3, "total_episodes": 2 * DEFAULTS.batch_size, "learning_rate": 2e-3}
    with tempfile.TemporaryDirectory() as out:
        seen = watch(our_args(args, f"{out}/run", **flags, **sizes))
        trainer = make_trainer(args, out, 1, Log(), **config)
    *_, (prompts, responses), _ = seen["sample"]  # the last call answers held-out prompts
    *_, (rollout, *_), _, (weights, our_loss, our_gradient) = seen["steps"]
    policy = trainer.model.train()
    ours = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)

    @torch.no_grad()
    def logprobs(weights: Tensor | None = None) -> Tensor:
        if weights is not None:
            vector_to_parameters(weights, ours.parameters())
        found, mask = grpo.completion_logprobs(ours, list(zip(prompts, responses)), CPU)
        return found[mask]

    ref = logprobs()
    old = logprobs(rollout)
    new = logprobs(weights)
    trainer.current_gradient_accumulation_steps = 1  # which its loop sets
    trainer._generate_single_turn = lambda *_: (responses, None)
    vector_to_parameters(rollout, policy.parameters())
    batch = trainer._generate_and_score_completions([{"prompt": trainer._tokenizer.decode(x)} for x in prompts])
    mask = batch["completion_mask"].bool()
    assert unpadded(batch, "prompt") == prompts, "TRL reads other prompts"
    assert unpadded(batch, "completion") == responses, "TRL reads other responses"
    vector_to_parameters(weights, policy.parameters())
    loss = trainer._compute_loss(policy, batch)
    loss.backward()
    _, advantages = seen["group_advantages"][-1]
    gradient = parameters_to_vector(p.grad for p in policy.parameters())
    found = {
        "advantages": difference(advantages.flatten(), batch["advantages"]),
        "log π_old": difference(old, batch["old_per_token_logps"][mask]),
    }
    found["log π_ref"] = difference(ref, batch["ref_per_token_logps"][mask])
    found["loss"] = difference(torch.tensor(our_loss), loss.detach())
    found["gradient"] = difference(our_gradient, gradient)
    outside = ((new - old).expm1().abs() > DEFAULTS.clip_coef).float().mean()
    kl = (old - ref).sum() / len(prompts)
    print(f"{len(prompts)} responses, {len(old)} tokens, {outside:.1%} of the ratios outside the clip range, KL of the "
          f"rollout {kl:.2f}, loss {our_loss:.6f}")  # fmt: skip
    return found


def equal(args: argparse.Namespace) -> None:
    """Print the relative differences; exit 1 when one exceeds 1e-5."""
    worst = 0.0
    for name, variant in {"GRPO": ({}, {}), "Dr. GRPO": DR_GRPO}.items():
        found = differences(args, *variant)
        print(f"{name}: relative differences " + ", ".join(f"{name} {value:.1e}" for name, value in found.items()))
        worst = max(worst, *found.values())
    raise SystemExit(worst > 1e-5)


def train(args: argparse.Namespace) -> None:
    """Train TRL's policy; save it, and a log of one JSON line per update."""
    log = Log()
    trainer = make_trainer(args, args.out, args.total_episodes // DEFAULTS.batch_size, log)
    trainer.train()
    trainer.save_model(args.out)
    lines = [json.dumps(row) + "\n" for row in log.rows]
    Path(args.out, "log.jsonl").write_text("".join(lines))
    first = log.rows[0]
    last = log.rows[-1]
    print(f"reward {first['reward']:.3f} to {last['reward']:.3f}, {last['seconds']:.0f} s")


def speed(args: argparse.Namespace) -> None:
    """Time default runs of both in turn, from the end of the first update to the end of the last."""
    torch.set_num_threads(1)
    B, ratios = DEFAULTS.batch_size, []
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as out:
            grpo.main(our_args(args, f"{out}/run", total_episodes=args.updates * B))
            logged = EventAccumulator(f"{out}/run").Reload().Scalars("episodes_per_second")
            make_trainer(args, f"{out}/trl", args.updates, log := Log()).train()
        our_ends = [entry.step * B / entry.value for entry in logged]
        their_ends = [row["seconds"] for row in log.rows]
        episodes = (args.updates - 1) * B
        ours = episodes / (our_ends[-1] - our_ends[0])
        theirs = episodes / (their_ends[-1] - their_ends[0])
        ratios.append(ours / theirs)
        print(f"grpo.py {ours:.2f} episodes/s, TRL {theirs:.2f} episodes/s, ratio {ratios[-1]:.2f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) over {len(ratios)}, "
          f"{torch.get_num_threads()} threads")  # fmt: skip


def main() -> None:
    """Run one of the three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["equal", "train", "speed"])
    parser.add_argument("--model", default=DEFAULTS.model, help="model to start from")
    parser.add_argument("--reward-model", default=DEFAULTS.reward_model)
    parser.add_argument("--dataset", default=DEFAULTS.dataset, help="prompts")
    parser.add_argument("--kl-coef", type=float, default=DEFAULTS.kl_coef)
    parser.add_argument("--learning-rate", "--lr", type=float, default=5e-4)
    parser.add_argument("--total-episodes", type=int, default=DEFAULTS.total_episodes, help="train: responses in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", help="train: folder for the model and log.jsonl")
    parser.add_argument("--updates", type=int, default=32, help="speed: updates of each run, the first not counted")
    parser.add_argument("--repeats", type=int, default=5, help="speed: runs of each")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("trl").setLevel(logging.ERROR)
    {"equal": equal, "train": train, "speed": speed}[args.what](args)


if __name__ == "__main__":
    main()
