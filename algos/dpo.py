# /// script
# requires-python = ">=3.11"
# dependencies = ["accelerate>=1.15", "datasets>=5.0", "peft>=0.21", "tensorboard>=2.21", "torch>=2.13", "tqdm>=4.70",
# "transformers>=5.20", "tyro>=1.0.17"]
# ///
"""Direct preference optimisation (DPO): learn from preferences between two completions, without a reward model.

RLHF's optimum π*(y|x) ∝ π_ref(y|x)·exp(r(x, y)/β) tells for which reward a policy is optimal: β·log π/π_ref plus a
function of x. Put into the Bradley-Terry likelihood of the pairs, that reward leaves a classification loss on π.
Papers: Rafailov et al. 2023, arXiv 2305.18290 (DPO); Azar et al. 2023, arXiv 2310.12036 (IPO); Mitchell 2023, "A note
on DPO with noisy preferences" (cDPO).

    python algos/dpo.py                           # the small language world: held-out loss 0.508 in about a minute
    accelerate launch algos/dpo.py --model Qwen/Qwen3-0.6B --dataset trl-lib/ultrafeedback_binarized --beta 0.1 \\
        --bf16 --micro-batch-size 4 --gradient-checkpointing

Data: columns `prompt`, `chosen`, `rejected`, or the last two alone, beginning with the prompt; texts or lists of
{"role", "content"} messages. Letters: B pairs, R tokens of completions, L of whole rows, V words.
Logged are means over the interval: rewards/* of the implicit reward β·log π/π_ref, accuracies of "chosen's is higher",
logps/* of log π(y|x). Both of these usually fall, since the loss asks for their difference only.

Differs from the paper:
 1. AdamW without weight decay instead of RMSprop, a cosine schedule, the gradient's norm clipped to 1, no dropout.
 2. With --loss ipo, log π(y|x) is the sum over tokens, as in IPO's Eq. 17; TRL takes their mean.
 3. A batch never mixes two epochs: the pairs that do not fill one are left out of that epoch.
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
    seed: int = 1  # of the order of pairs and of LoRA's first weights
    device: Literal["auto", "cpu"] = "auto"  # auto takes GPUs where there are some
    run_dir: str = ""  # where the run is written; by default runs/<task>__<script>__<seed>__<time>
    resume: str = ""  # run directory or checkpoint to continue, with its flags where none are given
    save_every: int = 200  # updates between checkpoints; 0: only at the end
    eval_every: int = 200  # updates between evaluations; 0: only before and after training
    track: bool = False  # mirror the logs to Weights & Biases
    model: str = str(ASSETS / "sft")  # hub id, folder or peft adapter of the model to start from, which is π_ref
    dataset: str = str(ASSETS / "preferences")  # hub id, folder or jsonl, json, csv or parquet file
    train_split: str = "train"  # split to train on; slices such as train[:95%] work
    eval_split: str = "test"  # held-out split; '' for none
    max_length: int = 512  # longest row in tokens: longer completions are cut, pairs whose prompt fills it left out
    learning_rate: float = 0  # at its peak; 0: 1e-4 on the small world's model, 1e-6 on others, 1e-5 there with LoRA
    warmup: float = 0.1  # share of the updates over which the learning rate rises, before a half cosine to 0
    batch_size: int = 32  # B: pairs of an update, over all processes
    micro_batch_size: int = 8  # b: pairs of a forward pass, over all processes: less memory, same gradient
    epochs: int = 1  # passes over the data
    max_steps: int = 0  # updates to train for, if not 0, instead of --epochs
    bf16: bool = False  # compute in bfloat16; weights and log-probabilities stay float32
    gradient_checkpointing: bool = False  # compute activations twice: less memory, about a third slower
    lora_rank: int = 0  # if not 0, train low-rank adapters of all linear layers, with α = 2·rank, and save these
    merge_lora: bool = False  # save the whole model, with the adapters merged
    beta: float = 0.5  # β: price of KL(π || π_ref) in the reward that the pairs are taken to come from (DPO Eq. 3)
    loss: Literal["sigmoid", "ipo"] = "sigmoid"  # sigmoid: DPO Eq. 7; ipo: IPO Eq. 17, with τ = β
    label_smoothing: float = 0  # ε: share of pairs whose label is taken to be wrong (cDPO)

    def __post_init__(self) -> None:
        if min(self.micro_batch_size, self.epochs, self.max_length - 1) < 1 or self.batch_size % self.micro_batch_size:
            raise ValueError("batch-size must be a multiple of micro-batch-size, epochs at least 1, max-length 2")
        if min(self.save_every, self.eval_every, self.max_steps, self.learning_rate, self.warmup, self.lora_rank) < 0:
            raise ValueError("save-every, eval-every, max-steps, learning-rate, warmup, lora-rank must be at least 0")
        if self.beta <= 0 or not 0 <= self.label_smoothing <= 0.5 or (self.label_smoothing and self.loss == "ipo"):
            raise ValueError("beta must be above 0, label-smoothing between 0 and 0.5, and 0 with --loss ipo")


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


def pair_logprobs(model: nn.Module, rows: list[Any], device: torch.device) -> Tensor:
    """log π(y|x) = Σ_t log π(y_t | x, y_<t) of both completions of rows [prompt, chosen, rejected, …]: (2, b)."""
    pairs = [[prompt, chosen] for prompt, chosen, *_ in rows] + [[prompt, rejected] for prompt, _, rejected, *_ in rows]
    return completion_logprobs(model, pairs, device)[0].sum(1).view(2, -1)


# --- algorithm ---


def preference_loss(logprobs: Tensor, ref_logprobs: Tensor, beta: float, eps: float, loss: str) -> dict[str, Tensor]:
    """Loss and metrics of each pair, (B,), from log π(y|x) and log π_ref(y|x) of chosen and rejected, (2, B) each.

    "sigmoid": -(1 - ε)·log σ(βh) - ε·log σ(-βh), DPO Eq. 7 at ε = 0 and cDPO above it, where ε of the labels are wrong,
    with βh the margin of the rewards; "ipo": (h - 1/(2β))², IPO Eq. 17 with τ = β.
    """
    chosen, rejected = beta * (logprobs - ref_logprobs)  # DPO Eq. 5, less β·log Z(x), which both share
    margins = chosen - rejected
    log_sigmoid = nn.functional.logsigmoid
    losses = -(1 - eps) * log_sigmoid(margins) - eps * log_sigmoid(-margins)  # DPO Eq. 7
    if loss == "ipo":
        losses = (margins / beta - 1 / (2 * beta)) ** 2  # IPO Eq. 17
    metrics = {"loss": losses, "rewards/accuracies": (margins.sign() + 1) / 2, "rewards/margins": margins}
    metrics |= {"rewards/chosen": chosen, "rewards/rejected": rejected}
    return metrics | {"logps/chosen": logprobs[0], "logps/rejected": logprobs[1]}


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


def load_pairs(name: str, split: str, tokenizer: Any, max_length: int) -> list[list[Any]]:
    """Rows [prompt ids, chosen ids, rejected ids] of a split; without a prompt column, it is what both begin with."""
    rows = load_rows(name, split, ("prompt", "chosen", "rejected"), ("chosen", "rejected"))
    rows = [encode(tokenizer, max_length, row.get("prompt"), row["chosen"], row["rejected"]) for row in rows]
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
    if not args.learning_rate:
        args.learning_rate = 1e-4 if args.model == Args.model else 1e-5 if args.lora_rank else 1e-6
    precision, parts = "bf16" if args.bf16 else "no", args.batch_size // args.micro_batch_size
    accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision=precision, gradient_accumulation_steps=parts)
    device, own = accelerator.device, slice(accelerator.process_index, None, accelerator.num_processes)
    torch.manual_seed(args.seed)
    model, tokenizer = load_model(transformers.AutoModelForCausalLM, args.model, args.max_length)
    train = load_pairs(args.dataset, args.train_split, tokenizer, args.max_length)
    held_out = load_pairs(args.dataset, args.eval_split, tokenizer, args.max_length) if args.eval_split else []
    if len(train) < args.batch_size or args.micro_batch_size % accelerator.num_processes:
        raise SystemExit(f"{len(train)} pairs don't fill a batch, or the processes cannot share a micro-batch evenly")
    generation, stops = model.generation_config, tokenizer.convert_tokens_to_ids(text_ends(tokenizer)[1:])
    generation.eos_token_id = list({*stops, *torch.tensor(generation.eos_token_id or []).flatten().long().tolist()})
    if model.num_parameters() < 10e6 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # small models only lose time to more
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if args.lora_rank:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear")
        model = get_peft_model(model, lora)
        hook = accelerator.register_save_state_pre_hook  # checkpoints hold the adapters only
        hook(lambda _, states, __: [w.pop(name) for w in states for name in [*w] if "lora_" not in name])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    step, total_steps = 0, args.max_steps or args.epochs * (len(train) // args.batch_size)
    warmup = math.ceil(args.warmup * total_steps)

    used = batch_at(train, 0, min(len(train), total_steps * args.batch_size), args.seed)
    parts = micro_batches([*used, *held_out], args.micro_batch_size)
    for part in tqdm(parts, "reference", leave=False, disable=not accelerator.is_main_process):
        ref_logprobs = torch.zeros(len(part), 2, device=device)
        with torch.no_grad():
            ref_logprobs[own] = pair_logprobs(model, part[own], device).T  # of the starting weights, also when resuming
        for row, values in zip(part, accelerator.reduce(ref_logprobs).tolist()):
            row.append(values)
    if saved:
        step = saved["step"]
        accelerator.load_state(saved["path"], strict=not args.lora_rank)

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

    def measure(part: list[Any]) -> dict[str, Tensor]:
        ref_logprobs = torch.tensor([row[3] for row in part], device=device).T
        logprobs = pair_logprobs(model, part, device)
        return preference_loss(logprobs, ref_logprobs, args.beta, args.label_smoothing, args.loss)

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
                    for name, values in measure(part[own]).items():
                        found[f"eval/{name}"].append(values)
            for prompt, completion, *_ in (held_out or train)[:4]:
                ids = torch.tensor([prompt or completion[:8]], device=device)
                ids = accelerator.unwrap_model(model).generate(ids, max_new_tokens=64, do_sample=False)
                texts += tokenizer.batch_decode(ids)
            found = means(accelerator, found)
            accelerator.log(found | {"samples": "\n\n".join(texts)}, step)
            accelerator.print(f"\nupdate {step}:", *(f"{name} {value:.4f}" for name, value in [*found.items()][:3]))
            model.train()
        if step >= total_steps:
            break

        # ===== collect =====
        begin = time.perf_counter()
        batch = micro_batches(batch_at(train, step, args.batch_size, args.seed), args.micro_batch_size)

        # ===== update =====
        progress = max(0, step - warmup) / max(1, total_steps - warmup)
        rate = min((step + 1) / max(1, warmup), (1 + math.cos(math.pi * progress)) / 2)
        optimizer.param_groups[0]["lr"] = args.learning_rate * rate
        for part in batch:
            with accelerator.accumulate(model):
                found = measure(part[own])
                accelerator.backward(found["loss"].mean())
                if accelerator.sync_gradients:
                    metrics["grad_norm"].append(accelerator.clip_grad_norm_(model.parameters(), 1.0).view(1))
                optimizer.step()
                optimizer.zero_grad()
            for name, values in found.items():
                metrics[name].append(values.detach())
        step += 1

        # ===== log and save =====
        stop = accelerator.reduce(torch.tensor(len(caught), device=device)) > 0  # of any process
        metrics["pairs_per_second"].append(
            torch.tensor([args.batch_size / (time.perf_counter() - begin)], device=device)
        )
        save_now = stop or step == total_steps or args.save_every and step % args.save_every == 0
        if save_now or step == 1 or step % LOG_EVERY == 0:
            found = means(accelerator, metrics)
            if not math.isfinite(found["loss"] + found["grad_norm"]):
                raise SystemExit(f"\nthe loss became nan or inf before update {step}; {run_dir}/checkpoint is older")
            found["learning_rate"] = optimizer.param_groups[0]["lr"]
            bar.set_postfix_str(f"loss {found['loss']:.3f}, margin {found['rewards/margins']:.3f}", refresh=False)
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
    model = (model.merge_and_unload() if args.merge_lora else model).to(model.config.dtype)
    state = accelerator.get_state_dict(model)
    model.save_pretrained(run_dir / "model", is_main_process=accelerator.is_main_process, state_dict=state)
    tokenizer.save_pretrained(run_dir / "model")


if __name__ == "__main__":
    main(*parse_args())
