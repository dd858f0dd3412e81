"""TRL's DPOTrainer beside algos/dpo.py: the same numbers on one batch, a run to compare with, and the speed of both.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install -r benchmark/peers/trl_requirements.txt
    /tmp/trl/bin/python benchmark/peers/trl_dpo.py equal                       # log-probabilities, losses, gradients
    /tmp/trl/bin/python benchmark/peers/trl_dpo.py train --out /tmp/trl_dpo_1  # then: run.py evaluate /tmp/trl_dpo_1
    /tmp/trl/bin/python benchmark/peers/trl_dpo.py speed                       # pairs per second, interleaved

`equal` compares on held-out pairs of the small world, with a policy whose weights were shaken so that it differs from
the reference. TRL's "ipo" takes the mean log-probability per token where dpo.py takes the sum: given means, dpo.py's
function must return TRL's loss. TRL's "sigmoid" knows no label smoothing.
`train` and `speed` give TRL dpo.py's defaults for data, start and hyperparameters; --lr, --epochs and so on change them.
TRL reads a whole batch at once, dpo.py its own micro-batches.
"""

import argparse
import logging
import statistics
import sys
import tempfile
from pathlib import Path

import datasets
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "algos"))
import dpo

DEFAULTS = dpo.Args()


def make_trainer(args: argparse.Namespace, model: object, out: str, **config: object) -> DPOTrainer:
    """A DPOTrainer with dpo.py's hyperparameters. It keeps the reference beside the policy, its default."""
    settings = {
        "beta": args.beta,
        "learning_rate": args.learning_rate,
        "num_train_epochs": args.epochs,
        "per_device_train_batch_size": args.batch_size,
        "lr_scheduler_type": "cosine",
        "warmup_steps": DEFAULTS.warmup,
        "max_grad_norm": 1.0,
        "max_length": DEFAULTS.max_length,
        "weight_decay": 0.0,
        "optim": "adamw_torch_fused",
        "seed": args.seed,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_drop_last": True,
        "logging_steps": 50,
    }
    data = datasets.load_dataset(args.dataset, split=args.split).select_columns(["prompt", "chosen", "rejected"])
    config = DPOConfig(output_dir=out, **settings | config)
    reference = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    return DPOTrainer(model, reference, config, train_dataset=data, processing_class=tokenizer)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """|ours - theirs| / |theirs|, as norms."""
    return ((ours - theirs).norm() / theirs.norm()).item()


def trl_pair_logprobs(model: torch.nn.Module, inputs: dict[str, object]) -> torch.Tensor:
    """log π(y|x) (2, B) of TRL's model: of the chosen, then of the rejected."""
    logprobs = model(**inputs, fused_lm_head=True).log_probs
    return logprobs.sum(1).view(2, -1)


def equal(args: argparse.Namespace) -> None:
    """Print the relative differences; exit 1 when one exceeds 1e-5."""
    args.split, device, worst = "test[:32]", torch.device("cpu"), 0.0
    for loss_type in ("sigmoid", "ipo"):
        torch.manual_seed(0)
        policy, tokenizer = dpo.load_model(AutoModelForCausalLM, args.model, DEFAULTS.max_length)
        rows = dpo.load_rows(args.dataset, args.split, tokenizer, DEFAULTS.max_length)
        for parameter in policy.parameters():  # by about 5 %
            parameter.data.mul_(1 + 0.05 * torch.randn_like(parameter))
        with tempfile.TemporaryDirectory() as out:
            trainer = make_trainer(args, policy, out, loss_type=[loss_type])
        policy = trainer.model.eval()
        reference = trainer.ref_model.eval()
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
        seen = batch["attention_mask"].bool()
        read = [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], seen)]
        assert read == [row[0] + row[i] for i in (1, 2) for row in rows], "TRL reads other tokens"
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")} | {"labels": labels, "use_cache": False}
        with torch.no_grad():
            trl_logprobs = trl_pair_logprobs(policy, inputs)
            trl_ref = trl_pair_logprobs(reference, inputs)
            ref_logprobs = dpo.pair_logprobs(reference, rows, device)
        policy.zero_grad()
        trl_loss = trainer._compute_loss(policy, batch, return_outputs=False)
        trl_loss.backward()
        trl_gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])

        policy.zero_grad()
        logprobs = dpo.pair_logprobs(policy, rows, device)
        lengths = torch.ones(2, len(rows))
        if loss_type == "ipo":
            lengths = torch.tensor([[len(row[i]) for row in rows] for i in (1, 2)])
        loss = dpo.preference_loss(logprobs / lengths, ref_logprobs / lengths, args.beta, 0, loss_type)["loss"].mean()
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
        pairs = {
            "log π": (logprobs.detach(), trl_logprobs),
            "log π_ref": (ref_logprobs, trl_ref),
            "loss": (loss.detach(), trl_loss.detach()),
            "gradient": (gradient, trl_gradient),
        }
        found = {name: difference(*pair) for name, pair in pairs.items()}
        worst = max(worst, *found.values())
        print(f"{loss_type}: loss {loss.item():.6f}, relative differences "
              + ", ".join(f"{name} {value:.1e}" for name, value in found.items()))  # fmt: skip
    raise SystemExit(worst > 1e-5)


def train(args: argparse.Namespace) -> None:
    """Train TRL's policy and save it."""
    args.split = "train"
    trainer = make_trainer(args, args.model, args.out)
    print(trainer.train().metrics)
    trainer.save_model(args.out)


def speed(args: argparse.Namespace) -> None:
    """Time default runs of both in turn: reference and updates, without loading, tokenising, samples and saving."""
    number = args.steps * args.batch_size
    ratios = []
    args.split = f"train[:{number}]"
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as out:
            theirs = number / make_trainer(args, args.model, out, num_train_epochs=1).train().metrics["train_runtime"]
        ours = number / ours_seconds(args, number)
        ratios.append(ours / theirs)
        print(f"dpo.py {ours:.2f} pairs/s, TRL {theirs:.2f} pairs/s, ratio {ratios[-1]:.2f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) over {len(ratios)}, "
          f"{torch.get_num_threads()} threads")  # fmt: skip


def ours_seconds(args: argparse.Namespace, number: int) -> float:
    """Seconds that dpo.py takes for the reference, by its bar, and for one epoch of updates, by the speed it logs."""
    spent = []

    class Bar(tqdm):
        def __iter__(self):
            yield from super().__iter__()
            spent.append(self.format_dict["elapsed"])

    dpo.tqdm, transformers.GenerationMixin.generate = Bar, lambda self, ids, **_: ids
    with tempfile.TemporaryDirectory() as out:
        flags = {"model": args.model, "dataset": args.dataset, "train_split": args.split, "eval_split": ""}
        flags |= {"batch_size": args.batch_size, "learning_rate": args.learning_rate}
        dpo.main(dpo.Args(**flags, run_dir=f"{out}/run", device="cpu"))
        rates = EventAccumulator(f"{out}/run").Reload().Scalars("pairs_per_second")
    return spent[0] + number / rates[-1].value


def main() -> None:
    """Run one of the three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["equal", "train", "speed"])
    parser.add_argument("--model", default=DEFAULTS.model, help="model to start from")
    parser.add_argument("--dataset", default=DEFAULTS.dataset, help="preference data")
    parser.add_argument("--beta", type=float, default=DEFAULTS.beta)
    parser.add_argument("--learning-rate", "--lr", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=DEFAULTS.batch_size)
    parser.add_argument("--epochs", type=int, default=DEFAULTS.epochs)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", help="train: folder for the model")
    parser.add_argument("--steps", type=int, default=499, help="speed: updates of each run")
    parser.add_argument("--repeats", type=int, default=5, help="speed: runs of each")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("trl").setLevel(logging.ERROR)
    {"equal": equal, "train": train, "speed": speed}[args.what](args)


if __name__ == "__main__":
    main()
