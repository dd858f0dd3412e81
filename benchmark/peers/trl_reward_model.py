"""algos/reward_model.py beside TRL's RewardTrainer: the same numbers, held-out accuracy, pairs per second.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install -r benchmark/peers/trl_requirements.txt
    /tmp/trl/bin/python benchmark/peers/trl_reward_model.py equality   # rewards, loss and gradients of one and the same batch
    /tmp/trl/bin/python benchmark/peers/trl_reward_model.py train      # TRL as the script by default; prints one JSON line
    /tmp/trl/bin/python benchmark/peers/trl_reward_model.py speed      # both trained in turns; only the ratio means something

Both start from the same weights, head and padding token included. OMP_NUM_THREADS sets the threads of both. TRL reads a
whole batch at once, the script its own micro-batches.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import datasets
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase
from trl import RewardConfig, RewardTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "algos"))
import reward_model
from reward_model import Args

CPU = torch.device("cpu")


def save_start(args: Args, folder: Path) -> tuple[PreTrainedTokenizerBase, int]:
    """Write the model to start from, with a new head, to folder/model; returns its tokenizer and the id that pads."""
    torch.manual_seed(args.seed)
    loader = AutoModelForSequenceClassification
    model, tokenizer = reward_model.load_model(loader, args.model, args.max_length, num_labels=1)
    torch.nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
    pad = reward_model.set_pad_token(model, tokenizer, [tokenizer.eos_token_id])
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return tokenizer, pad


def trl_trainer(args: Args, folder: Path, tokenizer: PreTrainedTokenizerBase, split: str) -> RewardTrainer:
    """TRL's trainer with the script's hyperparameters; it neither saves nor evaluates."""
    config = RewardConfig(
        output_dir=str(folder / "trl"),
        seed=args.seed,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.warmup,
        per_device_train_batch_size=args.batch_size,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps or -1,
        max_grad_norm=1.0,
        weight_decay=0.0,
        max_length=args.max_length,
        center_rewards_coefficient=args.centering or None,
        dataloader_drop_last=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=torch.float32)
    rows = datasets.load_dataset(args.dataset, split=split)
    return RewardTrainer(model, config, train_dataset=rows, processing_class=tokenizer)


def equality(args: Args, folder: Path) -> None:
    """Rewards, loss and gradients of one batch with centring, side by side."""
    args.centering, split = 0.01, f"{args.train_split}[:{args.batch_size}]"
    tokenizer, pad = save_start(args, folder)
    rows = reward_model.load_rows(args.dataset, split, tokenizer, args.max_length)
    trainer = trl_trainer(args, folder, tokenizer, split)
    model = trainer.model.eval()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    seen = batch["attention_mask"].bool()
    read = [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], seen)]
    assert read == [row[0] + row[i] for i in (1, 2) for row in rows], "TRL reads other tokens"
    their_loss, output = trainer.compute_loss(model, batch, return_outputs=True)
    their_loss.backward()
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}

    model.zero_grad()
    scores = reward_model.pair_rewards(model, rows, pad, CPU)
    loss = reward_model.reward_loss(scores, args.centering)["loss"].mean()
    loss.backward()
    difference = lambda a, b: ((a - b).norm() / b.norm()).item()
    gradients = {name: difference(parameter.grad, theirs[name]) for name, parameter in model.named_parameters()}
    worst = max(gradients, key=gradients.get)
    apart = difference(scores.flatten(), output.logits[:, 0]), difference(loss, their_loss), gradients[worst]
    print(f"{len(rows)} pairs, {max(map(len, read))} tokens at most; relative differences: rewards {apart[0]:.1e}, loss "
          f"{apart[1]:.1e} ({loss.item():.7f}, TRL {their_loss.item():.7f}), gradients {apart[2]:.1e} (largest of "
          f"{len(gradients)} tensors: {worst})")  # fmt: skip
    if max(apart) > 1e-5:
        sys.exit("error: more than 1e-5 apart")


def held_out(args: Args, model: torch.nn.Module, rows: list, pad: int) -> dict[str, float]:
    """Means of the script's metrics over held-out pairs."""
    model.eval()
    with torch.no_grad():
        parts = []
        for indices in reward_model.micro_batches(rows, range(len(rows)), 100):
            parts.append(reward_model.pair_rewards(model, [rows[i] for i in indices], pad, CPU))
    found = reward_model.reward_loss(torch.cat(parts, 1), args.centering)
    return {name: values.mean().item() for name, values in found.items()}


def train(args: Args, folder: Path) -> None:
    """Train with TRL; held-out figures before and after by the script's own functions."""
    tokenizer, pad = save_start(args, folder)
    split = reward_model.choose_eval_split(args.dataset, args.dataset_config, args.eval_split)
    rows = reward_model.load_rows(args.dataset, split, tokenizer, args.max_length)
    trainer = trl_trainer(args, folder, tokenizer, args.train_split)
    before = held_out(args, trainer.model, rows, pad)
    speed = trainer.train().metrics["train_samples_per_second"]
    after = held_out(args, trainer.model, rows, pad)
    print(json.dumps({"before": before, "after": after, "pairs_per_second": round(speed)}))


def speed(args: Args, folder: Path, repeats: int) -> None:
    """Pairs per second of short runs in turns, loading not counted."""
    tokenizer, _ = save_start(args, folder)
    args.model, args.eval_split = str(folder / "model"), ""
    ratios = []
    for i in range(repeats):
        args.run_dir = str(folder / f"ours{i}")
        reward_model.main(args)
        ours = EventAccumulator(args.run_dir).Reload().Scalars("pairs_per_second")[-1].value
        trainer = trl_trainer(args, folder, tokenizer, args.train_split)
        theirs = trainer.train().metrics["train_samples_per_second"]
        ratios.append(ours / theirs)
        print(f"reward_model.py {ours:.2f} pairs/s, TRL {theirs:.2f} pairs/s, ratio {ratios[-1]:.2f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def main() -> None:
    """Parse the command and run it in a temporary folder."""
    parser = argparse.ArgumentParser(description="algos/reward_model.py beside TRL's RewardTrainer.")
    parser.add_argument("command", choices=["equality", "train", "speed"])
    parser.add_argument("--model", default=Args().model, help="model to start from")
    parser.add_argument("--dataset", default=Args().dataset, help="preference data, a hub id or folder")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1, help="seed of head and order of pairs (default 1)")
    parser.add_argument("--updates", type=int, default=0, help="updates of each run (default: all, 30 for speed)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side for speed (default 5)")
    given = parser.parse_args()
    updates = given.updates or (30 if given.command == "speed" else 0)
    args = Args(given.seed, "cpu", model=given.model, dataset=given.dataset, learning_rate=given.learning_rate,
                max_steps=updates)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        if given.command == "speed":
            speed(args, Path(folder), given.repeats)
        else:
            {"equality": equality, "train": train}[given.command](args, Path(folder))


if __name__ == "__main__":
    main()
