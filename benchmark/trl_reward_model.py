"""algos/reward_model.py beside TRL's RewardTrainer: the same numbers, held-out accuracy, pairs per second.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install -r benchmark/trl_requirements.txt
    /tmp/trl/bin/python benchmark/trl_reward_model.py equality   # rewards, loss and gradients of one and the same batch
    /tmp/trl/bin/python benchmark/trl_reward_model.py train      # TRL on the script's data, start and hyperparameters; one JSON line
    /tmp/trl/bin/python benchmark/trl_reward_model.py speed      # both trained in turns; only the ratio means something

Both start from the same weights, head included. OMP_NUM_THREADS sets the threads of both. --model and --dataset name
others than those of the small world, the latter a folder with train.jsonl; a model whose tokenizer pads with EOS needs
--pad-token.
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
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from trl import RewardConfig, RewardTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "algos"))
import reward_model
from reward_model import Args

CPU = torch.device("cpu")


def save_start(args: Args, folder: Path) -> PreTrainedTokenizerBase:
    """Write the model that the script starts from, with its new head, to folder/model; returns its tokenizer."""
    reward_model.quiet()
    torch.manual_seed(args.seed)
    tokenizer = reward_model.load_tokenizer("model", args.model)
    reward_model.set_pad_token(args.model, args.pad_token, tokenizer)
    model = reward_model.load_reward_model(args.model, tokenizer)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return tokenizer


def load_start(folder: Path) -> PreTrainedModel:
    """What `save_start` wrote."""
    return AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=torch.float32)


def trl_trainer(args: Args, folder: Path, tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset) -> RewardTrainer:
    """TRL's trainer with the script's hyperparameters; it neither saves nor evaluates."""
    config = RewardConfig(
        output_dir=str(folder / "trl"),
        seed=args.seed,
        learning_rate=args.learning_rate,
        lr_scheduler_type=args.schedule,
        warmup_steps=args.warmup,
        per_device_train_batch_size=args.batch_size,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps or -1,
        max_grad_norm=args.max_grad_norm,
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
    return RewardTrainer(load_start(folder), config, train_dataset=rows, processing_class=tokenizer)


def equality(args: Args, folder: Path) -> None:
    """Rewards, loss and gradients of one batch with margins and centring, side by side."""
    given, args.dataset, args.centering = args.dataset, str(folder / "pairs.jsonl"), 0.01
    lines = (Path(given) / "train.jsonl").read_text().splitlines()[: args.batch_size]
    rows = [json.loads(line) | {"margin": 0.1 * (i % 7)} for i, line in enumerate(lines)]
    Path(args.dataset).write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = save_start(args, folder)
    trainer = trl_trainer(args, folder, tokenizer, datasets.Dataset.from_list(rows))
    model = reward_model.load_reward_model(str(folder / "model"), tokenizer).eval()
    theirs, pairs = trainer.model.eval(), reward_model.load_scored_pairs(args, tokenizer, "train")

    ids, last = reward_model.collate_pairs(pairs, CPU)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    assert torch.equal(batch["attention_mask"].sum(1) - 1, last), "the rows differ in length"
    assert torch.equal(batch["input_ids"], ids.where(batch["attention_mask"] == 1, tokenizer.pad_token_id)), "in tokens"
    their_loss, output = trainer.compute_loss(theirs, batch, return_outputs=True)
    their_loss.backward()

    difference = lambda a, b: ((a - b).norm() / b.norm()).item()  # noqa: E731
    print(f"{len(rows)} pairs, {ids.shape[1]} tokens at most; relative differences:")
    furthest = 0.0
    for share_prompt in (False, True):
        model.zero_grad()
        scores = reward_model.pair_rewards(model, pairs, share_prompt)
        loss = reward_model.reward_loss(*scores, reward_model.margins_of(pairs, CPU), args.centering).mean()
        loss.backward()
        gradients = {name: difference(parameter.grad, dict(theirs.named_parameters())[name].grad)
                     for name, parameter in model.named_parameters()}  # fmt: skip
        worst = max(gradients, key=gradients.get)
        apart = difference(scores.flatten(), output.logits[:, 0]), difference(loss, their_loss), gradients[worst]
        furthest = max(furthest, *apart)
        print(f"share_prompt {share_prompt}: rewards {apart[0]:.1e}, loss {apart[1]:.1e} ({loss.item():.7f}, TRL "
              f"{their_loss.item():.7f}), gradients {apart[2]:.1e} (largest of {len(gradients)} tensors: {worst})")
    if furthest > 1e-5:
        sys.exit("error: more than 1e-5 apart")


def train(args: Args, folder: Path) -> None:
    """Train with TRL; held-out figures before and after by the script's own function."""
    args.share_prompt = False  # a model as transformers loads it reads one reward of a row
    tokenizer = save_start(args, folder)
    held_out = reward_model.load_scored_pairs(args, tokenizer, args.eval_split)
    rows = datasets.load_dataset(args.dataset, split=args.train_split)
    trainer = trl_trainer(args, folder, tokenizer, rows)
    before = reward_model.held_out_rewards(args, trainer.model.eval(), held_out)[0]
    speed = trainer.train().metrics["train_samples_per_second"]
    after = reward_model.held_out_rewards(args, trainer.model.eval(), held_out)[0]
    print(json.dumps({"before": before, "after": after, "pairs_per_second": round(speed)}))


def speed(args: Args, folder: Path, repeats: int) -> None:
    """Pairs per second of short runs in turns, loading not counted."""
    tokenizer = save_start(args, folder)
    rows = datasets.load_dataset(args.dataset, split=args.train_split)
    args.model, args.eval_split = str(folder / "model"), ""
    ratios = []
    for i in range(repeats):
        args.run_dir = str(folder / f"ours{i}")
        reward_model.main(args)
        events = EventAccumulator(args.run_dir)
        events.Reload()
        ours = events.Scalars("pairs_per_second")[-1].value
        theirs = trl_trainer(args, folder, tokenizer, rows).train().metrics["train_samples_per_second"]
        ratios.append(ours / theirs)
        print(f"reward_model.py {ours:.2f} pairs/s, TRL {theirs:.2f} pairs/s, ratio {ratios[-1]:.2f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def main() -> None:
    """Parse the command and run it in a temporary folder."""
    parser = argparse.ArgumentParser(description="algos/reward_model.py beside TRL's RewardTrainer.")
    parser.add_argument("command", choices=["equality", "train", "speed"])
    parser.add_argument("--model", default=Args().model, help="model to start from")
    parser.add_argument("--dataset", default=Args().dataset, help="preference data, a folder")
    parser.add_argument("--pad-token", default="", help="as for reward_model.py")
    parser.add_argument("--seed", type=int, default=1, help="seed of head and order of pairs (default 1)")
    parser.add_argument("--updates", type=int, default=0, help="updates of each run (default: all, 30 for speed)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side for speed (default 5)")
    given = parser.parse_args()
    updates = given.updates or (30 if given.command == "speed" else 0)
    args = Args(given.seed, model=given.model, dataset=given.dataset, pad_token=given.pad_token, max_steps=updates,
                device="cpu")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        if given.command == "speed":
            speed(args, Path(folder), given.repeats)
        else:
            {"equality": equality, "train": train}[given.command](args, Path(folder))


if __name__ == "__main__":
    main()
