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
"""Supervised fine-tuning (SFT): make a language model likely to write what a data set contains.

The first of RLHF's three steps, and plain maximum likelihood: raise log π(y_t | x, y_<t) of every token of the
completions. Its result is the reference policy π_ref that RLHF and DPO start from and are held to.

Paper: Ouyang et al. 2022, "Training language models to follow instructions with human feedback", arXiv 2203.02155,
step 1 (section 3.5).

    python algos/sft.py                           # the small language world from random weights: to a held-out
                                                  # loss of 1.126 nats per token, the grammar's is 1.117; a minute
    python algos/sft.py --model Qwen/Qwen3-0.6B --dataset trl-lib/Capybara --learning-rate 1e-5 --dtype bfloat16 \\
        --batch-size 16 --micro-batch-size 4 --gradient-checkpointing

The data set has the columns `prompt` and `completion` (the loss covers the completion), `messages` or `text` (it covers
every token). Texts and lists of {"role", "content"} messages both do; messages pass through the chat template.

Letters: B sequences of a batch, b of a micro-batch, P tokens of a prompt, R of a response, L of a row (P + R), V words
of the vocabulary.

Logged every 10 updates, as means since the last time: loss (nats per token), grad_norm (before clipping),
learning_rate, tokens_per_second (tokens with a loss); eval/loss is the held-out loss per token, over all tokens of the
split, and eval/perplexity its exponential. samples holds greedy completions before and after training, as text.

Differs from the paper:
 1. One loss per token, averaged over the tokens of the whole batch; no mixing of prompts by source.
 2. AdamW without weight decay; dropout is off, as in the scripts that continue from this model.
 3. A batch never mixes two epochs: the rows that do not fill one are left out of that epoch.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Iterator
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
    """seed of the order of rows, and of the weights with --from-scratch"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU when there is one"""
    run_dir: str = ""
    """where the run is written; by default runs/<task>__<script>__<seed>__<timestamp>"""
    resume: str = ""
    """checkpoint.pt to continue; flags not given again are taken from it"""
    save_every: int = 200
    """updates between checkpoints; 0: only at the end"""
    eval_every: int = 200
    """updates between evaluations on --eval-split; 0: only before and after training"""
    track: bool = False
    """mirror the logs to Weights & Biases"""
    compile: bool = False
    """torch.compile the model"""
    fsdp: bool = False
    """shard weights, gradients and optimiser over the processes of torchrun (FSDP2)"""

    # task
    model: str = str(ASSETS / "base")
    """hub id or folder of the model to start from, with its tokenizer"""
    from_scratch: bool = False
    """train the configuration of --model from random weights"""
    dataset: str = str(ASSETS / "reviews")
    """hub id, folder or jsonl, json, csv or parquet file with text, messages, or prompt and completion"""
    train_split: str = "train"
    """split to train on; slices such as train[:95%] work"""
    eval_split: str = "test"
    """held-out split; '' for no evaluation"""
    max_length: int = 512
    """longest row in tokens: longer completions are cut, rows whose prompt fills it are left out"""

    # optimisation
    learning_rate: float = 3e-3
    """step size of AdamW after the warm-up; about 1e-5 for pretrained models"""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """how the learning rate falls to 0 after the warm-up"""
    warmup: float = 0.1
    """share of the updates over which the learning rate rises"""
    batch_size: int = 32
    """B: rows of an update, over all processes"""
    micro_batch_size: int = 0
    """rows of a forward pass, over all processes: less memory, same gradient; 0: the whole batch"""
    epochs: int = 2
    """passes over the data"""
    max_steps: int = 0
    """updates to train for, if not 0, instead of --epochs"""
    max_grad_norm: float = 1.0
    """largest global norm of the gradient; inf turns the clip off"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """precision of the forward pass (autocast); weights and log-probabilities stay float32"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third slower"""

    @property
    def rows_per_pass(self) -> int:
        """b: rows of a forward pass, over all processes."""
        return self.micro_batch_size or self.batch_size


def validate(args: Args) -> None:
    """Check what a user can get wrong before any work: one line and exit status 2 for the first fault."""
    check_ranges(args, 1, math.inf, "max_length", "batch_size", "epochs")
    check_ranges(args, 0, math.inf, "save_every", "eval_every", "learning_rate", "micro_batch_size", "max_steps")
    check_ranges(args, 0, math.inf, "max_grad_norm")
    check_ranges(args, 0, 1, "warmup")
    check_batches(args)
    check_run(args, "model", "dataset", "train_split", "batch_size")
    check_assets("model", args.model, "dataset", args.dataset)


# --- model ---


def response_logits(model: PreTrainedModel, ids: Tensor, start: int) -> Tensor:
    """Logits that predict the tokens from position `start` on: ids (b, L) to (b, L - start, V).

    They come from the positions one before; the vocabulary head is applied to these only. Rows are padded on the
    right, where causal attention needs no mask.
    """
    return model(ids[:, :-1], logits_to_keep=ids.shape[1] - start, use_cache=False).logits


# --- algorithm ---


def response_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """log π(y_t | x, y_<t) of each response token: logits (b, R, V) and ids (b, R) to (b, R), in float32."""
    return -F.cross_entropy(logits.float().transpose(1, 2), ids, reduction="none")


def masked_mean(x: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    """Sum of x where mask is 1, over count. With count from the whole minibatch, shares of it add up to its mean."""
    return (x * mask).sum() / count


def sft_loss(logprobs: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    """Negative log-likelihood per token, -1/count · Σ log π(y_t | x, y_<t) over tokens with mask 1, in nats.

    logprobs and mask are (b, R); count () is the number of such tokens in the whole batch, over all processes.
    """
    return -masked_mean(logprobs, mask, count)


def scheduled(peak: float, step: int, total_steps: int, warmup: float, schedule: str) -> float:
    """Learning rate of update `step`: a line up to `peak` over the share `warmup` of all updates, then down to 0."""
    rising = math.ceil(warmup * total_steps)
    if step < rising:
        return peak * (step + 1) / rising
    progress = (step - rising) / (total_steps - rising)
    return peak * {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}[schedule]


# --- plumbing (same in every script; skip on first read) ---

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
SCRIPT = Path(__file__).stem
LOG_EVERY = 10  # updates


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


def check_batches(args: Args) -> None:
    """Refuse batches that don't divide into micro-batches and over the processes, or --fsdp without processes."""
    if args.batch_size % args.rows_per_pass or args.rows_per_pass % WORLD_SIZE:
        error(f"--batch-size {args.batch_size} must be a multiple of --micro-batch-size {args.rows_per_pass}, "
              f"and that of the {WORLD_SIZE} processes")
    if args.fsdp and WORLD_SIZE == 1:
        error("--fsdp shards over several processes: start the script with torchrun --nproc-per-node N")


def check_rows(args: Args, train: list[Any], held_out: list[Any]) -> None:
    """Refuse splits that don't fill a batch or don't give each process a row."""
    if len(train) < args.batch_size:
        error(f"--batch-size {args.batch_size} is more than the {len(train)} rows of --train-split {args.train_split}")
    if args.eval_split and len(held_out) < WORLD_SIZE:
        error(f"--eval-split {args.eval_split} has {len(held_out)} rows for {WORLD_SIZE} processes")


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


def prepare_model(args: Args, model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Put the model on the device in evaluation mode, which is without dropout; checkpoint, compile, shard it."""
    model.to(device).eval()
    block = transformers.modeling_layers.GradientCheckpointingLayer
    layers = [layer for layer in model.modules() if isinstance(layer, block)]
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        for layer in layers:
            layer.training = True  # not its parts: this turns on checkpointing and no dropout
    if args.compile:
        model.compile(dynamic=True)
    if args.fsdp:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = dist.device_mesh.init_device_mesh(device.type, (WORLD_SIZE,))
        policy = MixedPrecisionPolicy(*(torch.bfloat16, torch.float32) if args.dtype == "bfloat16" else ())
        for module in (*layers, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
            module.set_gradient_divide_factor(1.0)  # sums over processes, as without it
            module.set_force_sum_reduction_for_comms(True)
    return model


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


def end_with_eos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Token ids with one EOS at the end: cut after the one that only blanks and EOS follow, else appended."""
    tail = len(ids)
    while tail and (ids[tail - 1] == tokenizer.eos_token_id or tokenizer.decode(ids[tail - 1]).isspace()):
        tail -= 1
    if tokenizer.eos_token_id in ids[tail:]:
        return ids[: ids.index(tokenizer.eos_token_id, tail) + 1]
    return [*ids, tokenizer.eos_token_id]


def encode(tokenizer: PreTrainedTokenizerBase, prompts: list[Any], *completions: list[Any]) -> list[list[list[int]]]:
    """Token ids [prompt, completion, …] of each row; completions end with EOS.

    Prompt and completion are tokenized as one text, since tokens may merge where they meet, and parted where the ids
    leave those of the prompt alone.
    """
    alone = tokenize(tokenizer, prompts, generation_prompt=True)
    whole = [tokenize(tokenizer, [x + y for x, y in zip(prompts, column)]) for column in completions]
    rows = []
    for prompt, *texts in zip(alone, *whole):
        parted = len(os.path.commonprefix([prompt, *texts]))
        rows.append([prompt[:parted], *(end_with_eos(tokenizer, ids[parted:]) for ids in texts)])
    return rows


def truncate(rows: list[list[list[int]]], max_length: int, split: str) -> list[list[list[int]]]:
    """Cut completions so that each row fits in max_length tokens; leave out rows whose prompt leaves no room."""
    kept = [[prompt, *(ids[: max_length - len(prompt)] for ids in texts)]
            for prompt, *texts in rows if len(prompt) < max_length]
    cut = sum(max(map(len, texts)) > max_length - len(prompt) for prompt, *texts in rows if len(prompt) < max_length)
    if not kept:
        error(f"--max-length {max_length}: no row of split {split} has a prompt shorter than that")
    if cut or len(kept) < len(rows):
        say(f"split {split}: of {len(rows)} rows, {cut} were cut to --max-length {max_length} tokens "
            f"and {len(rows) - len(kept)} left out, as their prompt fills it")
    return kept


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


def greedy_samples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]) -> list[str]:
    """Greedy completions of prompts (token ids), 64 tokens at most."""
    stops = model.generation_config.eos_token_id or []
    stops = {tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])}
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        ids = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False,
                             eos_token_id=list(stops), pad_token_id=tokenizer.eos_token_id,
                             use_cache=not model.is_gradient_checkpointing)
        texts.append(tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True))
    return texts


def sum_gradients(args: Args, parameters: list[nn.Parameter]) -> None:
    """Add up the gradients of all processes; FSDP has done so."""
    if not args.fsdp:
        for parameter in parameters:
            if parameter.grad is not None:
                sum_over_processes(parameter.grad)


def full_tensor(x: Tensor) -> Tensor:
    """A tensor that FSDP may have sharded, whole."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


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


def load_examples(args: Args, tokenizer: PreTrainedTokenizerBase, split: str) -> list[list[list[int]]]:
    """Rows [prompt ids, completion ids] of a split; with `text` and `messages` the prompt is empty."""
    columns = load_rows(args.dataset, split, ("prompt", "completion"), ("messages",), ("text",))
    if "completion" in columns:
        rows = encode(tokenizer, columns["prompt"], columns["completion"])
    else:
        (texts,) = columns.values()
        rows = [[[], end_with_eos(tokenizer, ids)] for ids in tokenize(tokenizer, texts)]
    return truncate(rows, args.max_length, split)


def held_out_loss(args: Args, model: PreTrainedModel, rows: list[list[list[int]]]) -> float:
    """Loss per completion token over all rows, in nats."""
    device = model.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # -log-likelihood, tokens
    for part in micro_batches(rows, args.rows_per_pass):
        ids, mask, start = collate(part, device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            logprobs = response_logprobs(response_logits(model, ids, start), ids[:, start:])
        sums += torch.stack([-(logprobs * mask).sum(), mask.sum()])
    nats, tokens = sum_over_processes(sums).tolist()
    return nats / tokens


def main(args: Args) -> None:
    validate(args)
    quiet()
    device = start_processes(args.device)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer("model", args.model)
    if args.from_scratch:
        config = load_pretrained(transformers.AutoConfig, "model", args.model)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        model = load_pretrained(transformers.AutoModelForCausalLM, "model", args.model, dtype=torch.float32)
    check_model("model", args.model, model, tokenizer, args.max_length)
    train = load_examples(args, tokenizer, args.train_split)
    held_out = load_examples(args, tokenizer, args.eval_split) if args.eval_split else []
    check_rows(args, train, held_out)

    model = prepare_model(args, model, device)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, weight_decay=0.0, fused=True)
    total_steps = args.max_steps or args.epochs * (len(train) // args.batch_size)
    step = 0
    if args.resume:
        saved = load_checkpoint(args.resume)
        step = saved["step"]
        set_state(model, optimizer, saved)
    run_dir, writer = open_run(args, Path(args.dataset).stem, step, finished=step >= total_steps)

    def evaluate() -> None:
        if held_out:
            loss = held_out_loss(args, model, held_out)
            log(writer, "eval", {"loss": loss, "perplexity": math.exp(loss)}, step)
            say(f"update {step}: held-out loss {loss:.4f} nats per token")

    def show_samples() -> None:
        prompts = [prompt or completion[:8] for prompt, completion in (held_out or train)[:4]]
        texts = [f"{tokenizer.decode(prompt)} → {text}"
                 for prompt, text in zip(prompts, greedy_samples(model, tokenizer, prompts))]
        writer.add_text("samples", "\n\n".join(texts), step)

    history, tokens = [], torch.zeros((), device=device)  # loss and gradient norm per update; completion tokens
    bar = tqdm(total=total_steps, initial=step, unit="update", disable=RANK > 0)
    if step == 0:
        evaluate()
        show_samples()
    start_time = time.perf_counter()

    while step < total_steps:
        # ===== collect =====
        batch = batch_at(train, step, args.batch_size, args.seed)

        # ===== compute targets =====
        parts = [collate(part, device) for part in micro_batches(batch, args.rows_per_pass)]
        count = sum_over_processes(sum(mask.sum() for _, mask, _ in parts))

        # ===== update =====
        optimizer.param_groups[0]["lr"] = scheduled(args.learning_rate, step, total_steps, args.warmup, args.schedule)
        optimizer.zero_grad()
        total_loss = torch.zeros((), device=device)
        for ids, mask, start in parts:
            with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                logprobs = response_logprobs(response_logits(model, ids, start), ids[:, start:])
            loss = sft_loss(logprobs, mask, count)
            loss.backward()
            total_loss += loss.detach()
        sum_gradients(args, parameters)
        grad_norm = full_tensor(nn.utils.clip_grad_norm_(parameters, args.max_grad_norm))
        optimizer.step()
        history.append(torch.stack([sum_over_processes(total_loss), grad_norm]))
        step, tokens = step + 1, tokens + count

        # ===== log and save =====
        bar.update(1)
        save = step == total_steps or passes(args.save_every, step - 1, step)
        if save or step == 1 or passes(LOG_EVERY, step - 1, step):
            loss, norm = torch.stack(history).mean(0).tolist()
            check_finite(loss + norm, step, run_dir, bar)
            speed = tokens.item() / (time.perf_counter() - start_time)
            log(writer, "", {"loss": loss, "grad_norm": norm, "learning_rate": optimizer.param_groups[0]["lr"],
                             "tokens_per_second": speed}, step)
            bar.set_postfix_str(f"loss {loss:.3f}, {speed:.0f} tokens/s", refresh=False)
            history = []
        if save:
            save_checkpoint(run_dir, args, step=step, **get_state(model, optimizer))
        if step < total_steps and passes(args.eval_every, step - 1, step):
            evaluate()

    bar.close()
    evaluate()
    show_samples()
    save_model(model, tokenizer, get_state(model, optimizer)["model"], run_dir)
    writer.close()


if __name__ == "__main__":
    main(parse_args())
    if WORLD_SIZE > 1:
        sys.stdout.flush()
        os._exit(0)  # an interpreter that ends in the usual way may meet gloo's threads, still at work, and abort
