# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["accelerate~=1.15.0", "datasets~=5.2.0", "peft~=0.21.2", "tensorboard~=2.21.0", "torch~=2.13.0",
# "tqdm~=4.70.1", "transformers~=5.23.0", "tyro~=1.0.17"]
# ///
"""Supervised fine-tuning (SFT): make a language model likely to write what a data set contains.

The first of RLHF's three steps: maximum likelihood of the completions, token by token. Its result is the policy π_ref
that RLHF and DPO start from and are held to. Paper: Ouyang et al. 2022, arXiv 2203.02155 (InstructGPT), section 3.5.

    python algos/sft.py  # the small language world: to 1.13 nats per held-out token, 1.117 of them the grammar's own
    accelerate launch algos/sft.py --model Qwen/Qwen3-0.6B --dataset trl-lib/Capybara --bf16 --gradient-checkpointing

Data: columns `prompt` and `completion`, whose tokens alone get a loss, or `messages` or `text`: texts or lists of
{"role", "content"} messages. Letters: B rows, R tokens of completions, L of rows, V words. Differs from the paper:
a mean over all tokens of a batch; AdamW, a cosine schedule, the gradient's norm clipped to 1, no dropout.
"""

import argparse
import functools
import json
import math
import os
import re
import shutil
import signal
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
import tyro
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from tqdm import tqdm

SCRIPT = Path(__file__).stem
ASSETS = Path(__file__).resolve().parent.parent / "benchmark/world/assets"  # the small language world
LAYOUTS = [["prompt", "completion"], ["messages"], ["text"]]  # columns of a data set


@dataclass
class Args:
    seed: int = 1  # of the order of rows
    device: Literal["auto", "cpu"] = "auto"  # auto takes GPUs where there are some
    run_dir: str = ""  # where the run is written; by default runs/<task>__<script>__<seed>__<time>
    resume: str = ""  # run directory or checkpoint to continue, with its flags where none are given
    save_every: int = 200  # updates between checkpoints; 0: only at the end
    eval_every: int = 200  # updates between evaluations; 0: only before and after training
    track: bool = False  # mirror the logs to Weights & Biases
    model: str = str(ASSETS / "base")  # hub id, folder or peft adapter of the model to start from
    dataset: str = str(ASSETS / "reviews")  # hub id, folder or jsonl, json, csv or parquet file
    train_split: str = "train"  # split to train on; slices such as train[:95%] work
    eval_split: str = "test"  # held-out split; '' for none
    max_length: int = 512  # longest row in tokens: longer completions are cut, rows whose prompt fills it left out
    learning_rate: float = 0  # at its peak; 0: 3e-3 on the small world's model, 2e-5 on others
    warmup: float = 0.1  # share of the updates over which the learning rate rises, before a half cosine to 0
    batch_size: int = 32  # B: rows of an update, over all processes
    micro_batch_size: int = 8  # b: rows of a forward pass, over all processes: less memory, same gradient
    epochs: int = 2  # passes over the data
    max_steps: int = 0  # updates to train for, if not 0, instead of --epochs
    bf16: bool = False  # compute in bfloat16; weights and log-probabilities stay float32
    gradient_checkpointing: bool = False  # compute activations twice: less memory, about a third slower

    def __post_init__(self) -> None:
        if min(self.batch_size, self.micro_batch_size, self.epochs, self.max_length - 1) < 1:
            raise ValueError("batch-size, micro-batch-size and epochs must be at least 1, max-length 2")
        if min(self.save_every, self.eval_every, self.max_steps, self.learning_rate, self.warmup) < 0:
            raise ValueError("save-every, eval-every, max-steps, learning-rate and warmup must be at least 0")


# --- model ---


def load_model(loader: Any, name: str, max_length: int, **changes: Any) -> tuple[nn.Module, Any]:
    """Model in float32, without dropout, and tokenizer of a hub id, folder or peft adapter; num_labels=1 for a head."""
    adapter = transformers.utils.find_adapter_config_file(name)
    base = json.loads(Path(adapter).read_text())["base_model_name_or_path"] if adapter else name
    config, tokenizer = transformers.AutoConfig.from_pretrained(base), transformers.AutoTokenizer.from_pretrained(name)
    changes |= {k: 0.0 for k, value in vars(config).items() if re.search("drop|jitter", k) and isinstance(value, float)}
    model, info = loader.from_pretrained(base, dtype="auto", output_loading_info=True, **changes)
    new = "num_labels" in changes and "ForSequenceClassification" not in str(config.architectures)  # the head
    if wrong := info["missing_keys"] - {"score.weight" * new} | info["unexpected_keys"] & {"score.weight"}:
        raise SystemExit(f"{base} lacks the weights {sorted(wrong)} of {type(model).__name__}, or should not have them")
    if adapter:
        from peft import PeftConfig, PeftModel

        config = replace(PeftConfig.from_pretrained(name), task_type=None)  # the model's class says what it is for
        model = PeftModel.from_pretrained(model, name, config=config).merge_and_unload().requires_grad_(True)
    V, eos = model.get_input_embeddings().num_embeddings, tokenizer.eos_token
    limit = "original_" * ("longrope" in str(model.config)) + "max_position_embeddings"  # a longer row changes all
    L = getattr(model.config.get_text_config(), limit, None) or math.inf
    if eos is None or len(tokenizer) > V or max_length > L:
        raise SystemExit(f"{name} has {V} embeddings for {len(tokenizer)} tokens, {L} positions, EOS {eos}: too few")
    body, ids = model.float().eval().base_model, torch.arange(12)[None] % V
    with torch.no_grad():  # twelve tokens in one pass, and in two
        whole, begin = body(ids).last_hidden_state, body(ids[:, :6], use_cache=True)
        rest = body(ids[:, 6:], past_key_values=begin.get("past_key_values")).last_hidden_state
    if (whole - torch.cat([begin.last_hidden_state, rest], 1)).abs().max() > 1e-3 * whole.std():
        raise SystemExit(f"{name} is not causal, or keeps no cache that gives what a whole pass gives")
    return model, tokenizer


def completion_logprobs(model: nn.Module, rows: list[Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """log π(y_t | x, y_<t) of rows [prompt, completion, …], float32, and a mask, (b, R): from the first answer on."""
    L = max(len(x) + len(y) for x, y, *_ in rows)
    ids = torch.tensor([x + y + y[-1:] * (L - len(x) - len(y)) for x, y, *_ in rows], device=device)  # (b, L)
    labels = torch.tensor([[-100] * len(x) + y + [-100] * (L - len(x) - len(y)) for x, y, *_ in rows], device=device)
    start = max(1, min(len(x) for x, *_ in rows))  # nothing comes before a row's first token to predict it
    logits = model(ids[:, :-1], logits_to_keep=ids.shape[1] - start, use_cache=False).logits.float()  # (b, R, V)
    logprobs = -nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, start:].flatten(), reduction="none")
    return logprobs.view(len(rows), -1), labels[:, start:] != -100


# --- algorithm ---


def sft_loss(logprobs: Tensor, count: int) -> Tensor:
    """-Σ log π(y_t | x, y_<t) / count, the part of these rows (b, R) in the mean over the tokens of a whole batch."""
    return -logprobs.sum() / count


# --- data ---


@functools.cache
def text_ends(tokenizer: Any) -> tuple[list[int], str, str]:
    """Ids that the tokenizer puts before a text (BOS or nothing), EOS, and what ends a turn of its chat template."""
    start = [i for i in tokenizer("a").input_ids[:1] if i in (tokenizer.bos_token_id, tokenizer.cls_token_id)]
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False) if tokenizer.chat_template else "answer"
    after = text.rpartition("answer")[2].strip()
    ends = [token.content for token in tokenizer.added_tokens_decoder.values() if after.startswith(token.content)]
    return start, tokenizer.eos_token, max(ends, key=len, default=tokenizer.eos_token)


def encode(tokenizer: Any, max_length: int, prompt: Any, *completions: Any) -> list[list[int]] | None:
    """Token ids [prompt, completion, …] of texts or messages; None without room, if one is empty or if two are equal.

    They are tokenized as one text, since tokens may merge where they meet, and parted where the ids leave those of the
    prompt alone, or each other if several have no prompt. BOS comes at most once; a completion ends in one stop token.
    """
    start, *stops = text_ends(tokenizer)
    question = prompt.removesuffix(stops[0]) if isinstance(prompt, str) else prompt or ""
    texts = [question + completion if question else completion for completion in completions]
    if isinstance([prompt, *completions][-1], list):
        render, start = functools.partial(tokenizer.apply_chat_template, tokenize=False), []
        question, texts = render(prompt, add_generation_prompt=True) if prompt else "", [render(text) for text in texts]
    if not all(text.startswith(question) for text in texts):
        raise SystemExit(f"--dataset: no answer, or a template that changes a prompt with it:\n{question}\n{texts[0]}")
    stop = "|".join(map(re.escape, stops))
    ends = [re.search(rf"({stop})(\s|{stop})*$", text[len(question) :]) for text in texts]
    texts = [text[: len(question) + end.start()] if end else text for text, end in zip(texts, ends)]
    ids = [start * (x[:1] != start) + x for x in tokenizer([question, *texts], add_special_tokens=False).input_ids]
    P = len(os.path.commonprefix(ids[1:] if prompt is None and len(texts) > 1 else ids))
    last = tokenizer.convert_tokens_to_ids([end[1] if end else stops[0] for end in ends])
    parts = [[*x[P:], end][: max_length - P] for x, end in zip(ids[1:], last)]
    lost = P >= max_length or not ids[-1] or not all(text[len(question) :].strip() for text in texts)
    return None if lost or len({*map(str, parts)}) < len(parts) else [ids[-1][:P], *parts]


def load_rows(name: str, split: str, tokenizer: Any, max_length: int) -> list[list[list[int]]]:
    """Token ids, by `encode`, of the columns of the first of LAYOUTS that a split has: texts or lists of messages."""
    import datasets

    kind = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}.get(Path(name).suffix)
    try:
        data = datasets.load_dataset(kind or name, data_files=name if kind else None, split=split)
    except Exception as fault:  # of the file, as a rule, of which the cause tells more than the exception
        raise SystemExit(f"--dataset {name}, split {split}: {fault.__cause__ or repr(fault)}") from fault
    columns = next((layout for layout in LAYOUTS if set(layout) <= set(data.column_names)), None)
    if not columns:
        raise SystemExit(f"--dataset {name} has the columns {data.column_names}: rename them to one of {LAYOUTS}")
    rows, lost = data.select_columns(columns).to_list(), r"""\s*\[\s*{\s*['"](role|content|from|value)['"]"""
    for number, row in enumerate(rows, 1):
        if isinstance(row.get("prompt"), str) and isinstance(rows[0][columns[-1]], list):
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        asked = row.get("prompt") or []
        for column, value in row.items():
            if isinstance(value, list) and column != "prompt" and value[: len(asked)] == asked:  # it repeats the prompt
                row[column] = value = value[len(asked) :]
            turns = value if isinstance(value, list) else [{"role": "user", "content": value}]
            ok = turns and all(isinstance(turn.get(key), str) for turn in turns for key in ("role", "content"))
            kinds = {type(value), type(rows[0][column]), type(asked or value)}
            if not ok or len(kinds) > 1 or re.match(lost, turns[0]["content"]):
                found = f"--dataset {name}, split {split}, row {number}, column {column}: {value!r:.40}"
                raise SystemExit(f"{found} is not text or messages as in row 1; mend it, in jsonl if csv lost it")
    for column in columns[1:] if isinstance(rows[0].get("prompt"), str) else ():  # texts that repeat their prompt
        if sum(row[column].startswith(row["prompt"]) for row in rows) > len(rows) / 2:
            rows = [row | {column: row[column].removeprefix(row["prompt"])} for row in rows]
    rows = [encode(tokenizer, max_length, row.pop("prompt", None), *row.values()) for row in rows]
    if None in rows:
        print(f"split {split}: {rows.count(None)} of {len(rows)} rows left out: no room, empty or equal completions")
    return [row for row in rows if row]


def batch_at(rows: list[Any], step: int, batch_size: int, seed: int) -> list[Any]:
    """Rows of update `step`, a function of it, for resumed runs; what does not fill a batch is left out of an epoch."""
    epoch, batch = divmod(step, len(rows) // batch_size)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1_000_003 * seed + epoch)).tolist()
    return [rows[i] for i in order[batch * batch_size : (batch + 1) * batch_size]]


def micro_batches(rows: list[Any], size: int) -> list[list[Any]]:
    """Rows in parts of `size` or a little more; rows of like length meet, to save padding."""
    rows = sorted(rows, key=lambda row: sum(map(len, row)))
    parts = min(len(rows), max(1, len(rows) // size))
    return [rows[i * len(rows) // parts : (i + 1) * len(rows) // parts] for i in range(parts)]


def parse_args() -> tuple[Args, dict[str, Any] | None]:
    """Flags of the command line; when resuming, on top of those of the checkpoint, which comes with them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path)
    path, default, saved = parser.parse_known_args()[0].resume, Args(), None
    if path:
        path = path / "checkpoint" if (path / "checkpoint").is_dir() else path
        saved = json.loads((path / "state.json").read_text())
        if saved["script"] != SCRIPT:
            raise SystemExit(f"--resume {path}: written by {saved['script']}.py, not {SCRIPT}.py")
        saved["folder"], saved["args"]["run_dir"] = path / str(saved["step"]), str(path.parent)
        default = Args(**saved["args"])
    return tyro.cli(Args, default=default, description=__doc__.splitlines()[0]), saved


def main(args: Args, saved: dict[str, Any] | None = None) -> None:
    args.learning_rate = args.learning_rate or (3e-3 if args.model == Args.model else 2e-5)
    accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision="bf16" if args.bf16 else "no")
    device, processes = accelerator.device, accelerator.num_processes
    own = slice(accelerator.process_index, None, processes)  # of the rows of a micro-batch
    policy, tokenizer = load_model(transformers.AutoModelForCausalLM, args.model, args.max_length)
    train = load_rows(args.dataset, args.train_split, tokenizer, args.max_length)
    held_out = load_rows(args.dataset, args.eval_split, tokenizer, args.max_length) if args.eval_split else []
    if min(args.micro_batch_size, args.batch_size, len(held_out or train)) < processes or len(train) < args.batch_size:
        raise SystemExit(f"{len(train)} rows don't fill a batch, or micro-batches lack rows for {processes} processes")
    eos, stops = policy.generation_config.eos_token_id, tokenizer.convert_tokens_to_ids(text_ends(tokenizer)[1:])
    policy.generation_config.eos_token_id = list({*stops, *([eos] if isinstance(eos, int) else eos or [])})
    policy.generation_config.validate(strict=True)  # as saving does
    torch.set_num_threads(1 if policy.num_parameters() < 10e6 else torch.get_num_threads())  # small ones lose by more
    if args.gradient_checkpointing:
        policy.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0, fused=True)
    model, optimizer = accelerator.prepare(policy, optimizer)
    step, total_steps = saved["step"] if saved else 0, args.max_steps or args.epochs * (len(train) // args.batch_size)
    warmup = math.ceil(args.warmup * total_steps)
    if saved:
        accelerator.load_state(saved["folder"])
    name = f"runs/{Path(args.dataset).stem}__{SCRIPT}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir = Path(*broadcast_object_list([args.run_dir or name]))
    if (run_dir / "checkpoint/state.json").exists() and not (saved and run_dir.samefile(saved["args"]["run_dir"])):
        raise SystemExit(f"{run_dir} holds a run: choose another --run-dir, or continue it with --resume {run_dir}")
    if accelerator.is_main_process:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
        print(f"run directory: {run_dir}, learning rate: {args.learning_rate:g}")
    logs = TensorBoardTracker(run_dir.name, run_dir.parent, purge_step=step + 1, flush_secs=1)
    accelerator.log_with = [logs, *["wandb"] * args.track]
    accelerator.init_trackers("algos", init_kwargs={"wandb": {"name": run_dir.name, "config": asdict(args)}})
    metrics, caught, stop = defaultdict(list), [], False
    for number in (signal.SIGINT, signal.SIGTERM):  # after which the run is saved; a second one kills
        signal.signal(number, lambda number, _: caught.append(signal.signal(number, signal.SIG_DFL)))
    quiet = None if accelerator.is_main_process else Path(os.devnull).open("w")
    bar = tqdm(total=total_steps, initial=step, unit="update", file=quiet)
    while True:
        # ===== evaluate =====
        if step % (args.eval_every or total_steps) == 0 or step >= total_steps:
            model.eval()
            found, texts = defaultdict(list), []
            for rows in micro_batches(held_out, args.micro_batch_size):
                with torch.no_grad():
                    logprobs, mask = completion_logprobs(model, rows[own], device)
                found["eval/loss"].extend((-logprobs[mask]).tolist())
            for prompt, completion in (held_out or train)[:4]:
                ids = torch.tensor([prompt or completion[:8]], device=device)
                room = max(1, min(64, args.max_length - ids.shape[1]))
                texts += tokenizer.batch_decode(policy.generate(ids, max_new_tokens=room, do_sample=False))
            means = {name: torch.tensor(gather_object(values)).mean().item() for name, values in found.items()}
            accelerator.log(means | {"samples": "\n\n".join(texts)}, step)
            accelerator.print(f"\nupdate {step}:", *(f"{name} {value:.4f}" for name, value in means.items()))
            model.train()
        if stop or step >= total_steps:
            break

        # ===== collect =====
        batch = micro_batches(batch_at(train, step, args.batch_size, args.seed), args.micro_batch_size)
        count = sum(len(completion) - (not prompt) for rows in batch for prompt, completion in rows)

        # ===== update =====
        cosine = (1 + math.cos(math.pi * max(0, step - warmup) / max(1, total_steps - warmup))) / 2
        optimizer.param_groups[0]["lr"] = args.learning_rate * min((step + 1) / max(1, warmup), cosine)
        optimizer.zero_grad()
        for rows in batch:
            logprobs, mask = completion_logprobs(model, rows[own], device)
            accelerator.backward(sft_loss(logprobs, count) * processes)  # DDP takes the mean over these
            metrics["loss"].append(-logprobs[mask].detach())
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        metrics["grad_norm"].append(getattr(norm, "full_tensor", norm.clone)().view(1))  # FSDP2's norm is in parts
        optimizer.step()
        step += 1

        # ===== log and save =====
        stop = accelerator.reduce(torch.tensor(len(caught), device=device)) > 0  # of any process
        save_now = stop or step == total_steps or args.save_every and step % args.save_every == 0
        if save_now or step == 1 or step % 10 == 0:
            means = {k: torch.tensor(gather_object(torch.cat(x).tolist())).mean().item() for k, x in metrics.items()}
            if not math.isfinite(means["loss"] + means["grad_norm"]):
                raise SystemExit(f"\nthe loss became nan or inf before update {step}; {run_dir}/checkpoint is older")
            means["learning_rate"] = optimizer.param_groups[0]["lr"]
            means["rows_per_second"] = (step - bar.initial) * args.batch_size / bar.format_dict["elapsed"]
            bar.set_postfix_str(f"loss {means['loss']:.3f}", refresh=False)
            accelerator.log(means, step)
            metrics.clear()
        if save_now:
            folder = run_dir / "checkpoint"  # state.json names the folder of its tensors, and changes in one piece
            accelerator.save_state(folder / str(step))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                (folder / "state.tmp").write_text(json.dumps({"script": SCRIPT, "args": asdict(args), "step": step}))
                (folder / "state.tmp").replace(folder / "state.json")
                for older in set(folder.glob("[0-9]*")) - {folder / str(step)}:
                    shutil.rmtree(older)
        bar.update(1)
    bar.close()
    weights = accelerator.get_state_dict(policy.to(policy.config.dtype))
    accelerator.end_training()  # processes that leave their group open may die of it
    if step < total_steps:
        launch = "python" if processes == 1 else f"torchrun --nproc-per-node {processes}"
        raise SystemExit(f"stopped at update {step}; to go on: {launch} {__file__!r} --resume {str(run_dir)!r}")
    if accelerator.is_main_process:
        policy.save_pretrained(run_dir / "model", state_dict=weights)
        tokenizer.save_pretrained(run_dir / "model")


if __name__ == "__main__":
    main(*parse_args())
