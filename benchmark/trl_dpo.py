"""TRL's DPOTrainer beside algos/dpo.py: the same numbers on one batch, a run to compare with, and the speed of both.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install -r benchmark/trl_requirements.txt
    /tmp/trl/bin/python benchmark/trl_dpo.py equal                       # log-probabilities, losses, gradients
    /tmp/trl/bin/python benchmark/trl_dpo.py train --out /tmp/trl_dpo_1  # then: evaluate_policy.py /tmp/trl_dpo_1
    /tmp/trl/bin/python benchmark/trl_dpo.py speed                       # pairs per second, interleaved

`equal` compares on held-out pairs of the small world, with a policy whose weights were shaken so that it differs from
the reference. TRL's "ipo" takes the mean log-probability per token where dpo.py takes the sum: given means, dpo.py's
function must return TRL's loss. TRL's "sigmoid" knows no label smoothing.
`train` and `speed` give TRL dpo.py's defaults for data, start and hyperparameters; --lr, --epochs and so on change them.
"""

import argparse
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

import datasets
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "algos"))
import dpo

DEFAULTS = dpo.Args()


def make_trainer(args: argparse.Namespace, model: object, out: str, **config: object) -> DPOTrainer:
    """A DPOTrainer with dpo.py's hyperparameters. It keeps the reference beside the policy, its default."""
    settings = {
        "beta": args.beta,
        "learning_rate": args.learning_rate,
        "num_train_epochs": args.epochs,
        "per_device_train_batch_size": DEFAULTS.batch_size,
        "lr_scheduler_type": DEFAULTS.schedule,
        "warmup_steps": DEFAULTS.warmup,
        "max_grad_norm": DEFAULTS.max_grad_norm,
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
    data = datasets.load_dataset(args.dataset, split=f"{args.split}[:{args.rows}]" if args.rows else args.split)
    data = data.select_columns(["prompt", "chosen", "rejected"])
    config = DPOConfig(output_dir=out, **settings | config)
    reference = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    return DPOTrainer(model, reference, config, train_dataset=data, processing_class=tokenizer)


def shaken(name: str) -> transformers.PreTrainedModel:
    """The model with all weights changed by about 5 %."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    return model


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """|ours - theirs| / |theirs|, as norms."""
    return ((ours - theirs).norm() / theirs.norm()).item()


def equal(args: argparse.Namespace) -> None:
    """Print the relative differences; exit 1 when one exceeds 1e-5."""
    args.split, args.rows, worst = "test", 32, 0.0
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    flags = dpo.Args(model=args.model, dataset=args.dataset)
    rows = dpo.truncate(dpo.load_pairs(flags, tokenizer, "test[:32]"), flags.max_length, "test")
    for loss_type in ("sigmoid", "ipo"):
        with tempfile.TemporaryDirectory() as out:
            trainer = make_trainer(args, shaken(args.model), out, loss_type=[loss_type])
        policy, reference = trainer.model.eval(), trainer.ref_model.eval()
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(32)])
        padded = dpo.pad([p + c for p, c, _ in rows] + [p + r for p, _, r in rows], torch.device("cpu"))
        seen = batch["attention_mask"].bool()
        assert torch.equal(batch["input_ids"][seen], padded[seen]), "TRL reads other tokens"
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")} | {"labels": labels, "use_cache": False}
        with torch.no_grad():
            trl_logprobs, trl_ref = (
                model(**inputs, fused_lm_head=True).log_probs.sum(1).view(2, -1) for model in (policy, reference)
            )
        policy.zero_grad()
        trl_loss = trainer._compute_loss(policy, batch, return_outputs=False)
        trl_loss.backward()
        trl_gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])

        for share_prompt in (False, True):
            policy.zero_grad()
            logprobs = dpo.pair_logprobs(policy, rows, share_prompt)
            with torch.no_grad():
                ref_logprobs = dpo.pair_logprobs(reference, rows, share_prompt)
            lengths = torch.ones(2, 32)
            if loss_type == "ipo":
                lengths = torch.tensor([[len(row[i]) for row in rows] for i in (1, 2)])
            loss = dpo.preference_loss(*logprobs / lengths, *ref_logprobs / lengths, args.beta, 0.0, loss_type).mean()
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
            print(f"{loss_type}, share_prompt {share_prompt}: loss {loss.item():.6f}, relative differences "
                  + ", ".join(f"{name} {value:.1e}" for name, value in found.items()))  # fmt: skip
    raise SystemExit(worst > 1e-5)


def train(args: argparse.Namespace) -> None:
    """Train TRL's policy and save it."""
    args.split, args.rows = "train", 0
    trainer = make_trainer(args, args.model, args.out)
    print(trainer.train().metrics)
    trainer.save_model(args.out)


def speed(args: argparse.Namespace) -> None:
    """Time short runs of both in turn: reference and updates, without loading, tokenising and saving."""
    args.split, args.rows, rates = "train", args.steps * DEFAULTS.batch_size, []
    rows = f"train[:{args.rows}]"
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as out:
            trainer = make_trainer(args, args.model, out, num_train_epochs=1)
            theirs = args.rows / trainer.train().metrics["train_runtime"]
        ours = args.rows / ours_seconds(dpo.Args(model=args.model, dataset=args.dataset, train_split=rows))
        rates.append((ours, theirs))
        print(f"dpo.py {ours:.1f} pairs/s, TRL {theirs:.1f} pairs/s, ratio {ours / theirs:.2f}", flush=True)
    ratios = [ours / theirs for ours, theirs in rates]
    print(f"median ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) over {len(ratios)}, "
          f"{torch.get_num_threads()} threads")  # fmt: skip


def ours_seconds(flags: dpo.Args) -> float:
    """Seconds that dpo.py takes for the reference and one epoch of updates."""
    store, spent, marks = dpo.store_reference, [], []

    def timed(*rest: object) -> None:
        start = time.perf_counter()
        store(*rest)
        spent.append(time.perf_counter() - start)

    perf_counter = time.perf_counter
    dpo.store_reference = timed
    dpo.save_checkpoint = lambda *_, **__: marks.append(perf_counter())  # after the last update
    dpo.time = type("Clock", (), {"perf_counter": lambda: marks.append(perf_counter()) or marks[-1],
                                  "strftime": time.strftime})  # fmt: skip
    flags.eval_split, flags.save_every, flags.device = "", 0, "cpu"
    with tempfile.TemporaryDirectory() as out:
        flags.run_dir = f"{out}/run"
        dpo.main(flags)
    dpo.store_reference = store
    return spent[0] + marks[-1] - marks[0]


def main() -> None:
    """Run one of the three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["equal", "train", "speed"])
    parser.add_argument("--model", default=DEFAULTS.model, help="model to start from")
    parser.add_argument("--dataset", default=DEFAULTS.dataset, help="preference data")
    parser.add_argument("--beta", type=float, default=DEFAULTS.beta)
    parser.add_argument("--learning-rate", "--lr", type=float, default=DEFAULTS.learning_rate)
    parser.add_argument("--epochs", type=int, default=DEFAULTS.epochs)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", help="train: folder for the model")
    parser.add_argument("--steps", type=int, default=20, help="speed: updates of each run")
    parser.add_argument("--repeats", type=int, default=5, help="speed: runs of each")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("trl").setLevel(logging.ERROR)
    {"equal": equal, "train": train, "speed": speed}[args.what](args)


if __name__ == "__main__":
    main()
