# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate>=1.15", "datasets>=5.0", "peft>=0.21", "tensorboard>=2.21", "torch>=2.13.0", "tqdm>=4.70",
#     "transformers>=5.20", "tyro>=1.0.17",
# ]
# ///
"""Supervised fine-tuning (SFT): make a language model likely to write what a data set contains.

The first of RLHF's three steps, and plain maximum likelihood: raise log π(y_t | x, y_<t) of every token of the
completions. Its result is the reference policy π_ref that RLHF and DPO start from and are held to.
Paper: Ouyang et al. 2022, arXiv 2203.02155 (InstructGPT), step 1 in section 3.5.

    python algos/sft.py                           # the small language world from random weights: to a held-out loss
                                                  # of 1.13 nats per token in a minute; the grammar's own is 1.117
    accelerate launch algos/sft.py --model Qwen/Qwen3-0.6B --dataset trl-lib/Capybara --bf16 --micro-batch-size 4 \\
        --batch-size 16 --gradient-checkpointing

Data: columns `prompt` and `completion`, of which the completion gets a loss, or `messages` or `text`, of which every
token does; texts or lists of {"role", "content"} messages. Letters: B rows, R tokens of completions, L of whole rows,
V words. Logged are means over the interval; loss is in nats per token.

Differs from the paper:
 1. One loss per token, averaged over the tokens of the whole batch; no mixing of prompts by source.
 2. AdamW without weight decay, a cosine schedule, the gradient's norm clipped to 1, no dropout.
 3. A batch never mixes two epochs: the rows that do not fill one are left out of that epoch.
"""

import argparse
import functools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
import tyro
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from tqdm import tqdm

SCRIPT = Path(__file__).stem
ASSETS = Path(__file__).resolve().parent.parent / "benchmark" / "assets"  # the small language world
LOG_EVERY = 10  # updates


@dataclass
class Args:
    # run
    seed: int = 1  # of the order of rows, and of the weights with --from-scratch
    device: Literal["auto", "cpu"] = "auto"  # auto takes GPUs where there are some
    run_dir: str = ""  # where the run is written; by default runs/<task>__<script>__<seed>__<time>
    resume: str = ""  # run directory or checkpoint to continue, with its flags where none are given
    save_every: int = 200  # updates between checkpoints; 0: only at the end
    eval_every: int = 200  # updates between evaluations; 0: only before and after training
    track: bool = False  # mirror the logs to Weights & Biases
    # task
    model: str = str(ASSETS / "base")  # hub id, folder or peft adapter of the model to start from
    from_scratch: bool = False  # draw its weights anew
    dataset: str = str(ASSETS / "reviews")  # hub id, folder or jsonl, json, csv or parquet file
    train_split: str = "train"  # split to train on; slices such as train[:95%] work
    eval_split: str = "test"  # held-out split; '' for none
    max_length: int = 512  # longest row in tokens: longer completions are cut, rows whose prompt fills it left out
    # optimisation
    learning_rate: float = 0  # at its peak; 0: 3e-3 on the small world's model, 2e-5 on others
    warmup: float = 0.1  # share of the updates over which the learning rate rises, before a half cosine to 0
    batch_size: int = 32  # B: rows of an update, over all processes
    micro_batch_size: int = 8  # b: rows of a forward pass, over all processes: less memory, same gradient
    epochs: int = 2  # passes over the data
    max_steps: int = 0  # updates to train for, if not 0, instead of --epochs
    bf16: bool = False  # compute in bfloat16; weights and log-probabilities stay float32
    gradient_checkpointing: bool = False  # compute activations twice: less memory, about a third slower

    def __post_init__(self) -> None:
        if min(self.micro_batch_size, self.epochs, self.max_length - 1) < 1 or self.batch_size % self.micro_batch_size:
            raise ValueError("batch-size must be a multiple of micro-batch-size, epochs at least 1, max-length 2")
        if min(self.save_every, self.eval_every, self.max_steps, self.learning_rate, self.warmup) < 0:
            raise ValueError("save-every, eval-every, max-steps, learning-rate and warmup must be at least 0")


# --- model ---


def load_model(loader: Any, name: str, max_length: int) -> tuple[nn.Module, Any]:
    """Model, float32 and without dropout, and tokenizer of a hub id, a folder or a peft adapter, which is merged."""
    if name[:1] in "/.~" and not Path(name).is_dir():
        raise SystemExit(f"--model {name}: no such folder")
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    adapter = transformers.utils.find_adapter_config_file(name)
    base = json.loads(Path(adapter).read_text())["base_model_name_or_path"] if adapter else name
    config = transformers.AutoConfig.from_pretrained(base)
    dropout = {key: 0.0 for key, value in vars(config).items() if "drop" in key and isinstance(value, float)}
    model, info = loader.from_pretrained(base, dtype="auto", output_loading_info=True, **dropout)
    if info["missing_keys"]:
        raise SystemExit(f"--model {base} lacks the weights {sorted(info['missing_keys'])}")
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, name).merge_and_unload()
    V, words, eos = model.get_input_embeddings().num_embeddings, len(tokenizer), tokenizer.eos_token
    L = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    if eos is None or words > V or max_length > L:
        has = f"its tokenizer has {words} tokens and EOS {eos}, and --max-length is {max_length}"
        raise SystemExit(f"--model {name} reads {V} tokens and {L} positions, but {has}")
    body, ids = model.float().eval().base_model, torch.arange(12)[None] % V
    with torch.no_grad():  # twelve tokens in one pass, and in two
        whole, begin = body(ids).last_hidden_state, body(ids[:, :6], use_cache=True)
        rest = body(ids[:, 6:], past_key_values=begin.get("past_key_values")).last_hidden_state
    if (whole - torch.cat([begin.last_hidden_state, rest], 1)).abs().max() > 1e-3 * whole.std():
        raise SystemExit(f"--model {name} is not causal, or keeps no cache that gives what a whole pass gives")
    return model, tokenizer


def completion_logprobs(model: nn.Module, rows: list[Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """log π(y_t | x, y_<t) of completions, in float32, and their mask, (b, R), from where the shortest prompt ends."""
    ids = [torch.tensor([*prompt, *completion]) for prompt, completion in rows]
    labels = [torch.tensor([-100] * len(prompt) + completion) for prompt, completion in rows]
    ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=rows[0][1][-1]).to(device)  # (b, L)
    labels = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100).to(device)
    start = max(1, min(len(prompt) for prompt, _ in rows))  # nothing comes before a row's first token to predict it
    logits = model(ids[:, :-1], logits_to_keep=ids.shape[1] - start, use_cache=False).logits.float().transpose(1, 2)
    logprobs = -nn.functional.cross_entropy(logits, labels[:, start:], reduction="none")  # (b, V, R) to (b, R)
    return logprobs, labels[:, start:] != -100


# --- algorithm ---


def sft_loss(logprobs: Tensor, count: int) -> Tensor:
    """-Σ log π(y_t | x, y_<t) / count, the part of these rows (b, R) in the mean over the tokens of a whole batch."""
    return -logprobs.sum() / count


# --- data ---


def load_rows(name: str, split: str, *layouts: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of a split, with the columns of the first layout that it has: texts or lists of messages."""
    import datasets

    kind = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}.get(Path(name).suffix)
    data = datasets.load_dataset(kind or name, data_files=name if kind else None, split=split)
    layout = next((layout for layout in layouts if set(layout) <= set(data.column_names)), None)
    if layout is None:
        raise SystemExit(f"--dataset {name} has the columns {data.column_names}: rename them to one of {layouts}")
    rows = data.select_columns(list(layout)).to_list()
    for number, row in enumerate(rows, 1):
        for column, value in row.items():
            messages = value if isinstance(value, list) else [{"role": "user", "content": value}]
            fits = messages and all(isinstance(m.get(key), str) for m in messages for key in ("role", "content"))
            if not fits or type(value) is not type(rows[0][column]) or value[:7] in ("[{'role", '[{"role'):
                found = f"--dataset {name}, split {split}, row {number}, column {column}: {value!r:.40}"
                raise SystemExit(f"{found} is not text or messages as in row 1; mend it, in jsonl if csv lost it")
    for column in layout[1:] if layout[0] == "prompt" else ():  # prompts of other kind, completions with their prompt
        if isinstance(rows[0]["prompt"], str) and isinstance(rows[0][column], list):
            rows = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
        if all(row[column][: len(row["prompt"])] == row["prompt"] for row in rows):
            rows = [row | {column: row[column][len(row["prompt"]) :]} for row in rows]
    return rows


@functools.cache
def text_ends(tokenizer: Any) -> tuple[list[int], str, str]:
    """Ids that the tokenizer puts before a text (BOS or nothing), EOS, and what ends a turn of its chat template."""
    start = [i for i in tokenizer("a").input_ids[:1] if i in (tokenizer.bos_token_id, tokenizer.cls_token_id)]
    if not tokenizer.chat_template:
        return start, tokenizer.eos_token, tokenizer.eos_token
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("answer")[2].strip()
    ends = [token.content for token in tokenizer.added_tokens_decoder.values() if after.startswith(token.content)]
    return start, tokenizer.eos_token, max(ends, key=len, default=tokenizer.eos_token)


def encode(tokenizer: Any, max_length: int, prompt: Any, *completions: Any) -> list[list[int]] | None:
    """Token ids [prompt, completion, …] of texts or messages; None without room in max_length or an empty completion.

    They are tokenized as one text, since tokens may merge where they meet, and parted where the ids leave those of the
    prompt alone, or each other where prompt is None. A prompt begins with the tokenizer's BOS, if any, once, and never
    ends in EOS. A completion ends in one stop token, where generation stops too: EOS, or the template's end of turn.
    """
    (start, eos, stop), implicit = text_ends(tokenizer), prompt is None
    texts = [completion if implicit else prompt + completion for completion in completions]
    ends = f"{re.escape(eos)}|{re.escape(stop)}"
    if isinstance(texts[0], list):
        render, start = functools.partial(tokenizer.apply_chat_template, tokenize=False), []
        prompt, texts = render(prompt, add_generation_prompt=True) if prompt else "", [render(text) for text in texts]
    else:
        prompt, stop = prompt or "", eos
    if not all(text.startswith(prompt) for text in texts):
        raise SystemExit(f"--dataset: the chat template changes a prompt once it is answered:\n{prompt}\n{texts[0]}")
    found = [re.search(rf"({ends})(\s|{ends})*$", text[len(prompt) :]) for text in texts]
    texts = [text[: len(prompt) + end.start()] if end else text for text, end in zip(texts, found)]
    ids = [start * (x[:1] != start) + x for x in tokenizer([prompt, *texts], add_special_tokens=False).input_ids]
    P = len(os.path.commonprefix(ids[1:] if implicit else ids))
    if P >= max_length or not all(text[len(prompt) :].strip() for text in texts):
        return None
    stops = [tokenizer.convert_tokens_to_ids(end[1] if end else stop) for end in found]
    return [ids[1][:P], *([*x[P:], end][: max_length - P] for x, end in zip(ids[1:], stops))]


def load_examples(name: str, split: str, tokenizer: Any, max_length: int) -> list[list[list[int]]]:
    """Rows [prompt ids, completion ids] of a split; of `messages` and `text`, everything is the completion."""
    rows = load_rows(name, split, ("prompt", "completion"), ("messages",), ("text",))
    pairs = [(row.get("prompt", [] if "messages" in row else ""), [*row.values()][-1]) for row in rows]
    rows = [encode(tokenizer, max_length, prompt, completion) for prompt, completion in pairs]
    if None in rows:
        print(f"split {split}: {rows.count(None)} of {len(rows)} rows left out: no room, or an empty completion")
    return [row for row in rows if row]


def batch_at(rows: list[Any], step: int, batch_size: int, seed: int) -> list[Any]:
    """Rows of update `step`, a function of the step, so that a resumed run needs no position in the data."""
    epoch, batch = divmod(step, len(rows) // batch_size)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1_000_003 * seed + epoch)).tolist()
    return [rows[i] for i in order[batch * batch_size : (batch + 1) * batch_size]]


def micro_batches(rows: list[Any], size: int) -> list[list[Any]]:
    """Rows in parts of `size` or a little more; rows of like length meet, to save padding."""
    rows = sorted(rows, key=lambda row: sum(map(len, row)))
    parts = min(len(rows), max(1, len(rows) // size))
    return [rows[i * len(rows) // parts : (i + 1) * len(rows) // parts] for i in range(parts)]


# --- runs ---


def parse_args() -> tuple[Args, dict[str, Any] | None]:
    """Flags of the command line; when resuming, on top of those of the checkpoint, which comes with them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path)
    path, default, saved = parser.parse_known_args()[0].resume, Args(), None
    if path:
        folders = path, path / "checkpoint", path / "checkpoint.old"  # the last if a crash came between two renames
        path = next((folder for folder in folders if (folder / "state.json").exists()), path)
        saved = json.loads((path / "state.json").read_text())
        if saved["script"] != SCRIPT:
            raise SystemExit(f"--resume {path}: written by {saved['script']}.py, not {SCRIPT}.py")
        saved["path"], saved["args"]["run_dir"] = str(path), str(path.parent)  # wherever it lies now
        default = Args(**saved["args"])
    return tyro.cli(Args, default=default, description=__doc__.splitlines()[0]), saved


def save_checkpoint(accelerator: Accelerator, run_dir: Path, args: Args, step: int) -> None:
    """Write all that a run needs to go on; a crash while writing leaves the former checkpoint whole."""
    folder, new, old = (run_dir / f"checkpoint{suffix}" for suffix in ("", ".new", ".old"))
    accelerator.save_state(new)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (new / "state.json").write_text(json.dumps({"script": SCRIPT, "args": asdict(args), "step": step}))
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def means(accelerator: Accelerator, metrics: dict[str, list[Tensor]]) -> dict[str, float]:
    """Mean of each metric, which came in pieces (n,), over all pieces of all processes."""
    pieces = {name: torch.cat(values).float() for name, values in metrics.items()}
    sums = accelerator.reduce({name: torch.stack([x.sum(), torch.ones_like(x).sum()]) for name, x in pieces.items()})
    return {name: (total / count).item() for name, (total, count) in sums.items()}


def main(args: Args, saved: dict[str, Any] | None = None) -> None:
    args.learning_rate = args.learning_rate or (3e-3 if args.model == Args.model else 2e-5)
    precision, parts = "bf16" if args.bf16 else "no", args.batch_size // args.micro_batch_size
    accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision=precision, gradient_accumulation_steps=parts)
    device, own = accelerator.device, slice(accelerator.process_index, None, accelerator.num_processes)
    torch.manual_seed(args.seed)
    model, tokenizer = load_model(transformers.AutoModelForCausalLM, args.model, args.max_length)
    if args.from_scratch:
        model = transformers.AutoModelForCausalLM.from_config(model.config).float()
    train = load_examples(args.dataset, args.train_split, tokenizer, args.max_length)
    held_out = load_examples(args.dataset, args.eval_split, tokenizer, args.max_length) if args.eval_split else []
    if len(train) < args.batch_size or args.micro_batch_size % accelerator.num_processes:
        raise SystemExit(f"{len(train)} rows don't fill a batch, or the processes cannot share a micro-batch evenly")
    generation, stops = model.generation_config, tokenizer.convert_tokens_to_ids(text_ends(tokenizer)[1:])
    generation.eos_token_id = list({*stops, *torch.tensor(generation.eos_token_id or []).flatten().long().tolist()})
    if model.num_parameters() < 10e6 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # small models only lose time to more
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    step, total_steps = 0, args.max_steps or args.epochs * (len(train) // args.batch_size)
    warmup = math.ceil(args.warmup * total_steps)
    if saved:
        step = saved["step"]
        accelerator.load_state(saved["path"])

    name = f"{Path(args.dataset).stem}__{SCRIPT}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir = Path(*broadcast_object_list([args.run_dir or f"runs/{name}"]))
    if accelerator.is_main_process:
        if (run_dir / "args.json").exists() and not (saved and run_dir.samefile(saved["args"]["run_dir"])):
            raise SystemExit(f"{run_dir} holds a run: choose another --run-dir, or continue it with --resume {run_dir}")
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
        print(f"run directory: {run_dir}, learning rate: {args.learning_rate:g}")
    logs = TensorBoardTracker(run_dir.name, run_dir.parent, purge_step=step + 1)
    accelerator.log_with = [logs, *["wandb"] * args.track]
    accelerator.init_trackers("algos", init_kwargs={"wandb": {"name": run_dir.name, "config": asdict(args)}})

    metrics = defaultdict(list)
    caught = []  # Ctrl-C and SIGTERM, after which the run is saved; a second one kills
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: caught.append(signal.signal(number, signal.SIG_DFL)))
    bar = tqdm(total=total_steps, initial=step, unit="update", disable=not accelerator.is_main_process)

    while True:
        # ===== evaluate =====
        if step % (args.eval_every or total_steps) == 0 or step >= total_steps:
            model.eval()
            found, texts = defaultdict(list), []
            for part in micro_batches(held_out, args.micro_batch_size):
                with torch.no_grad():
                    logprobs, mask = completion_logprobs(model, part[own], device)
                found["eval/loss"].append(-logprobs[mask])
            for prompt, completion, *_ in (held_out or train)[:4]:
                ids = torch.tensor([prompt or completion[:8]], device=device)
                ids = accelerator.unwrap_model(model).generate(ids, max_new_tokens=64, do_sample=False)
                texts += tokenizer.batch_decode(ids)
            found = means(accelerator, found)
            if held_out:
                found["eval/perplexity"] = torch.tensor(found["eval/loss"]).exp().item()
            accelerator.log(found | {"samples": "\n\n".join(texts)}, step)
            accelerator.print(f"\nupdate {step}:", *(f"{name} {value:.4f}" for name, value in [*found.items()][:3]))
            model.train()
        if step >= total_steps:
            break

        # ===== collect =====
        begin = time.perf_counter()
        batch = micro_batches(batch_at(train, step, args.batch_size, args.seed), args.micro_batch_size)
        count = sum(len(completion) - (not prompt) for part in batch for prompt, completion in part)

        # ===== update =====
        progress = max(0, step - warmup) / max(1, total_steps - warmup)
        rate = min((step + 1) / max(1, warmup), (1 + math.cos(math.pi * progress)) / 2)
        optimizer.param_groups[0]["lr"] = args.learning_rate * rate
        for part in batch:
            with accelerator.accumulate(model):
                logprobs, mask = completion_logprobs(model, part[own], device)
                # accelerate divides by the micro-batches and takes the mean over processes: undone here
                accelerator.backward(sft_loss(logprobs, count) * len(batch) * accelerator.num_processes)
                if accelerator.sync_gradients:
                    metrics["grad_norm"].append(accelerator.clip_grad_norm_(model.parameters(), 1.0).view(1))
                optimizer.step()
                optimizer.zero_grad()
            metrics["loss"].append(-logprobs[mask].detach())
        step += 1

        # ===== log and save =====
        stop = accelerator.reduce(torch.tensor(len(caught), device=device)) > 0  # of any process
        metrics["tokens_per_second"].append(torch.tensor([count / (time.perf_counter() - begin)], device=device))
        save_now = stop or step == total_steps or args.save_every and step % args.save_every == 0
        if save_now or step == 1 or step % LOG_EVERY == 0:
            found = means(accelerator, metrics)
            if not math.isfinite(found["loss"] + found["grad_norm"]):
                raise SystemExit(f"\nthe loss became nan or inf before update {step}; {run_dir}/checkpoint is older")
            found["learning_rate"] = optimizer.param_groups[0]["lr"]
            bar.set_postfix_str(f"loss {found['loss']:.3f}", refresh=False)
            accelerator.log(found, step)
            metrics.clear()
        if save_now:
            save_checkpoint(accelerator, run_dir, args, step)
        bar.update(1)
        if stop:
            bar.close()
            raise SystemExit(f"stopped at update {step}; to go on: python {sys.argv[0]} --resume {run_dir}")

    bar.close()
    model = accelerator.unwrap_model(model)
    model = model.to(model.config.dtype)
    state = accelerator.get_state_dict(model)
    model.save_pretrained(run_dir / "model", is_main_process=accelerator.is_main_process, state_dict=state)
    tokenizer.save_pretrained(run_dir / "model")


if __name__ == "__main__":
    main(*parse_args())
