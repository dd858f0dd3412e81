"""Train with TRL 1.10's PPOTrainer, the last release that has it, on what algos/rlhf_ppo.py trains on, for comparison.

    python3 -m venv .trl && .trl/bin/pip install -r benchmark/peers/trl_ppo_requirements.txt
    .trl/bin/python benchmark/peers/trl_ppo.py --out /tmp/trl_ppo        # the defaults of rlhf_ppo.py

The flags have the names, meanings and defaults of rlhf_ppo.py; what the trainer does not have (gradient clipping) is left
out. The critic starts from the reward model with a head of zeros, as there. One JSON line per update is printed and kept
in <out>/log.jsonl; the policy is saved in <out>/model. OMP_NUM_THREADS sets the threads.
"""

import argparse
import json
import time
from pathlib import Path

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

ASSETS = Path(__file__).resolve().parents[1] / "world" / "assets"


class Log(TrainerCallback):
    """Writes each update's metrics, with the seconds since the start of training, to a file and the screen."""

    def __init__(self, path: Path) -> None:
        self.path, self.start = path, 0.0

    def on_train_begin(self, *_, **__) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_log(self, args, state, control, logs: dict, **__) -> None:
        """One line."""
        line = json.dumps(logs | {"step": state.global_step, "seconds": time.perf_counter() - self.start})
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--model", default=str(ASSETS / "sft"))
    parser.add_argument("--reward-model", default=str(ASSETS / "reward"))
    parser.add_argument("--dataset", default=str(ASSETS / "prompts"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--total-episodes", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--num-minibatches", type=int, default=4)
    parser.add_argument("--num-ppo-epochs", type=int, default=4)
    parser.add_argument("--response-length", type=int, default=48)
    parser.add_argument("--kl-coef", type=float, default=0.5)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    prompts = datasets.load_dataset(args.dataset, split="train")
    prompts = prompts.map(lambda row: {"input_ids": tokenizer(row["prompt"]).input_ids}, remove_columns=["prompt"])
    scorer, critic = (
        AutoModelForSequenceClassification.from_pretrained(args.reward_model, dtype=torch.float32) for _ in range(2)
    )
    torch.nn.init.zeros_(critic.score.weight)
    config = PPOConfig(
        output_dir=str(args.out),
        seed=args.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        num_sample_generations=0,
        total_episodes=args.total_episodes,
        per_device_train_batch_size=args.batch_size,  # parted into minibatches without accumulating over them
        gradient_accumulation_steps=1,
        num_mini_batches=args.num_minibatches,
        local_rollout_forward_batch_size=args.batch_size,
        num_ppo_epochs=args.num_ppo_epochs,
        learning_rate=args.learning_rate,
        response_length=args.response_length,
        stop_token="eos",
        temperature=1.0,
        missing_eos_penalty=1.0,
        kl_coef=args.kl_coef,
        gamma=1.0,
        lam=0.95,
        cliprange=0.2,
        cliprange_value=0.2,
        vf_coef=0.1,
        gradient_checkpointing=False,
    )
    policy = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    few = prompts.select(range(8))
    log = Log(args.out / "log.jsonl")
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=scorer,
        value_model=critic,
        train_dataset=prompts,
        eval_dataset=few,
        callbacks=[log],
    )
    trainer.train()
    trainer.policy_model.save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")


if __name__ == "__main__":
    main()
