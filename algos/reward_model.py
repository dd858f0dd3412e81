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
"""Reward model: a scalar score of whole texts that agrees with people's preferences.

The second of RLHF's three steps. The fine-tuned language model loses its vocabulary head for one output r(x, y), and
learns from pairs of completions to one prompt that the preferred one, y_w, should score above the other, y_l. RLHF
then raises this score in place of asking people.

Paper: Ouyang et al. 2022, "Training language models to follow instructions with human feedback", arXiv 2203.02155,
step 2 (section 3.5, Eq. 1).

    python algos/reward_model.py                  # the small language world: accuracy 0.764, at best 0.791, in 45 s
    python algos/reward_model.py --model Qwen/Qwen3-0.6B --dataset trl-lib/ultrafeedback_binarized --dtype bfloat16 \\
        --learning-rate 1e-5 --batch-size 64 --micro-batch-size 8 --gradient-checkpointing

The data set has the columns `prompt`, `chosen` and `rejected`, or `chosen` and `rejected` that begin with their common
prompt, as texts or as lists of {"role", "content"} messages, which pass through the chat template. A column `margin`
of numbers, if there is one, says by how much the chosen text should win at least.

The result opens with AutoModelForSequenceClassification. Its one logit is the reward up to a constant: it has no bias
to hold the shift, so config.reward_mean does, and r = logit - reward_mean, as `rewards` below computes it.

Letters: B pairs of a batch, b of a micro-batch, L tokens of a row (a prompt and one completion, or both), d width
of the model.

Logged every 10 updates, as means since the last time: loss, accuracy (share of pairs with r(x, y_w) > r(x, y_l)),
margin (mean r(x, y_w) - r(x, y_l)), grad_norm (before clipping), learning_rate, pairs_per_second; eval/loss,
eval/accuracy and eval/margin are means over all pairs of the held-out split. The loss starts near ln 2 = 0.693; where
people disagree, no model can reach 0, nor an accuracy of 1. samples holds a few scored pairs before and after training.

Differs from the paper:
 1. Pairs are drawn one by one; the paper puts all comparisons of a prompt into one batch, against overfitting.
 2. The paper shifts the rewards so that demonstrations have mean 0, which changes no preference. --normalize gives
    those of held-out completions mean 0 and standard deviation 1; their differences are no longer log-odds then.
 3. A margin per pair (Llama 2, arXiv 2307.09288, Eq. 2) and a penalty on uncentred rewards (--centering, arXiv
    2312.09244), both off unless the data or the flag ask for them.
 4. AdamW without weight decay; dropout is off.
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
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
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
    """seed of the order of pairs, and of the head"""
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
    model: str = str(ASSETS / "sft")
    """hub id or folder of the model to start from, with its tokenizer"""
    pad_token: str = ""
    """token of the vocabulary that no text has, to pad with, where the tokenizer has none but its EOS"""
    dataset: str = str(ASSETS / "preferences")
    """hub id, folder or jsonl, json, csv or parquet file with chosen and rejected, and perhaps prompt and margin"""
    train_split: str = "train"
    """split to train on; slices such as train[:95%] work"""
    eval_split: str = "test"
    """held-out split; '' for no evaluation"""
    max_length: int = 512
    """longest row in tokens: longer completions are cut, rows whose prompt fills it are left out"""

    # optimisation
    learning_rate: float = 1e-3
    """step size of AdamW after the warm-up; about 1e-5 for pretrained models"""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """how the learning rate falls to 0 after the warm-up"""
    warmup: float = 0.1
    """share of the updates over which the learning rate rises"""
    batch_size: int = 32
    """B: pairs of an update, over all processes"""
    micro_batch_size: int = 16
    """pairs of a forward pass, over all processes: less memory, same gradient; 0: the whole batch"""
    epochs: int = 1
    """passes over the data"""
    max_steps: int = 0
    """updates to train for, if not 0, instead of --epochs"""
    max_grad_norm: float = 1.0
    """largest global norm of the gradient; inf turns the clip off"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """precision of the forward pass (autocast); weights stay float32"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third slower"""

    # algorithm
    centering: float = 0.0
    """coefficient of the penalty (r(x, y_w) + r(x, y_l))² that keeps rewards around 0"""
    normalize: bool = False
    """shift and scale the final model's rewards to mean 0 and standard deviation 1 over held-out completions; without
    it they are log-odds, on whose scale --kl-coef of rlhf_ppo.py and --beta of dpo.py mean the same β"""
    share_prompt: bool = True
    """one row [prompt, chosen, rejected] for a pair instead of two: slower where completions far outgrow prompts"""

    @property
    def rows_per_pass(self) -> int:
        """b: pairs of a forward pass, over all processes."""
        return min(self.micro_batch_size, self.batch_size) or self.batch_size


def validate(args: Args) -> None:
    """Check what a user can get wrong before any work: one line and exit status 2 for the first fault."""
    check_ranges(args, 1, math.inf, "max_length", "batch_size", "epochs")
    check_ranges(args, 0, math.inf, "save_every", "eval_every", "learning_rate", "micro_batch_size", "max_steps")
    check_ranges(args, 0, math.inf, "max_grad_norm", "centering")
    check_ranges(args, 0, 1, "warmup")
    check_batches(args)
    check_run(args, "model", "dataset", "train_split", "batch_size")
    check_assets("model", args.model, "dataset", args.dataset)


# --- model ---


def load_reward_model(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A language model with one output in place of its vocabulary head, or a reward model with the head it has.

    A new head's weights are drawn from N(0, 1 / (d + 1)) (Stiennon et al. 2020, arXiv 2009.01325): the loss starts
    near ln 2.
    """
    model, loading = load_pretrained(transformers.AutoModelForSequenceClassification, "model", name, num_labels=1,
                                     dtype=torch.float32, output_loading_info=True)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        error(f"--model {name}: {type(model).__name__} has no linear head over its last token; start from a "
              "causal language model")
    if "score.weight" in loading["missing_keys"]:
        nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1))
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.config.reward_mean = 0.0
    model.forward = functools.partial(forward, model, model.forward)
    return model


def forward(model: PreTrainedModel, plain: Callable[..., Any], ids: Tensor, last: Tensor | None = None,
            **inputs: Any) -> Any:
    """The `plain` forward pass of transformers, which reads the head at one position of a row, or at `last` (b, n).

    It takes the plain one's place, so that --fsdp and --compile know both.
    """
    if last is None:
        return plain(ids, **inputs)
    hidden = model.base_model(ids, use_cache=False, **inputs).last_hidden_state  # (b, L, d)
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    return model.score(hidden[rows, last])[..., 0]  # not take_along_dim: compiled, it is for one L only


def rewards(model: PreTrainedModel, ids: Tensor, last: Tensor) -> Tensor:
    """r(x, y) of each row: ids (b, L), last (b,) the position of its last token, to (b,), in float32.

    What follows the last token becomes padding, which is how transformers' own forward pass finds it.
    """
    after = torch.arange(ids.shape[1], device=ids.device) > last[:, None]
    ids = ids.masked_fill(after, model.config.get_text_config().pad_token_id)
    return model(ids, use_cache=False).logits[:, 0].float() - getattr(model.config, "reward_mean", 0.0)


def pair_rewards(model: PreTrainedModel, rows: list[list[Any]], share_prompt: bool) -> Tensor:
    """r(x, y) of both completions of rows [prompt, chosen, rejected, …], by one forward pass: (2, b)."""
    if share_prompt:
        ids, inputs, (_, second, end) = share_prompts(rows, model.device)
        last = torch.cat([second, end], 1) - 1  # where each completion ends
        return model(ids, last=last, **inputs).T.float() - model.config.reward_mean
    return rewards(model, *collate_pairs(rows, model.device)).view(2, -1)


# --- algorithm ---


def reward_loss(chosen: Tensor, rejected: Tensor, margins: Tensor, centering: float) -> Tensor:
    """-log σ(r(x, y_w) - r(x, y_l) - m) + c · (r(x, y_w) + r(x, y_l))² of each pair; all (b,).

    InstructGPT Eq. 1 for margins m = 0 and centering c = 0; m as in Llama 2 (2307.09288) Eq. 2, c as in 2312.09244.
    """
    losses = -F.logsigmoid(chosen - rejected - margins)  # Eq. 1
    return losses + centering * (chosen + rejected) ** 2


def normalized(head: Tensor, mean: float, std: float) -> tuple[Tensor, float]:
    """Head's weights (1, d) and shift s that turn a reward r = head · h into (r - mean) / std = head' · h - s."""
    return head / std, mean / std


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
NORMALIZE_ROWS = 1000  # pairs of the training split, for want of a held-out one


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


def set_pad_token(name: str, token: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a pad token, if named; it needs one that is not EOS, or padding would hide where texts end."""
    if token and token not in tokenizer.get_vocab():
        error(f"--pad-token {token}: not in the vocabulary of --model {name}")
    if token:
        tokenizer.pad_token = token
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        has = "no pad token" if tokenizer.pad_token is None else f"{tokenizer.pad_token} as both pad and EOS token"
        error(f"--model {name}: its tokenizer has {has}, so padding would hide where a text ends; name a token of its "
              "vocabulary that no text has with --pad-token")
    tokenizer.padding_side = "right"


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


def collate_pairs(rows: list[list[Any]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows [prompt, chosen, rejected, …] to ids (2b, L) and last (2b,).

    The first b rows of ids are the chosen texts, the others the rejected ones; last is where each one's last token is.
    """
    texts = [row[0] + row[side] for side in (1, 2) for row in rows]
    last = torch.tensor([len(text) - 1 for text in texts], device=device)
    return pad(texts, device), last


def share_prompts(rows: list[list[Any]], device: torch.device) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Rows [prompt, chosen, rejected, …] as rows of one text each: ids (b, L), mask and positions, bounds (3, b, 1).

    The rejected completion does not see the chosen one, and its positions go on from the prompt. The bounds say where
    chosen and rejected begin, and where the row ends.
    """
    ids = pad([prompt + chosen + rejected for prompt, chosen, rejected, *_ in rows], device)
    lengths = torch.tensor([list(map(len, row[:3])) for row in rows], device=device)
    first, second, end = bounds = lengths.cumsum(1).T[..., None]
    position = torch.arange(ids.shape[1], device=device)
    in_chosen, in_rejected = (first <= position) & (position < second), position >= second  # (b, L)
    sees = (position <= position[:, None]) & ~(in_rejected[:, :, None] & in_chosen[:, None])  # (b, L, L)
    positions = (position - in_rejected * (second - first)).where(position < end, 0)  # padding has none of its own
    return ids, {"attention_mask": sees[:, None], "position_ids": positions}, bounds


def margins_of(rows: list[list[Any]], device: torch.device) -> Tensor:
    """m of rows [prompt, chosen, rejected, [margin]]: (b,)."""
    return torch.tensor([margin for *_, (margin,) in rows], device=device)


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


def split_prompt(chosen: list[Any], rejected: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Prompts, chosen and rejected completions of texts, or lists of messages, that hold their prompt themselves.

    The prompt is the common beginning: of messages all that are equal, of texts all words that are; the blanks after
    it belong to the completions. One message or word is always left to each completion.
    """
    prompts = []
    for number, (x, y) in enumerate(zip(chosen, rejected), 1):
        if isinstance(x, str):
            common = os.path.commonprefix([x.rstrip(), y.rstrip()])
            unfinished = re.split(r"\s", common)[-1]
            prompts.append(common.removesuffix(unfinished).rstrip())
            continue
        shared = [a == b for a, b in zip(x[:-1], y[:-1])]
        if not any(shared[:1]):
            error(f"--dataset: row {number}: chosen and rejected begin with different messages, so they have no prompt")
        prompts.append(x[: [*shared, False].index(False)])
    parted = [[text[len(prompt) :] for prompt, text in zip(prompts, texts)] for texts in (chosen, rejected)]
    return prompts, *parted


def load_pairs(args: Args, tokenizer: PreTrainedTokenizerBase, split: str) -> list[list[list[int]]]:
    """Rows [prompt ids, chosen ids, rejected ids] of a split, not truncated yet."""
    columns = load_rows(args.dataset, split, ("prompt", "chosen", "rejected"), ("chosen", "rejected"))
    if "prompt" in columns:
        return encode(tokenizer, *columns.values())
    return encode(tokenizer, *split_prompt(**columns))


def load_margins(args: Args, split: str) -> list[float]:
    """The column `margin` of a split, zeros where there is none."""
    data = load_split(args.dataset, split)
    if "margin" not in data.column_names:
        return [0.0] * len(data)
    for number, margin in enumerate(data["margin"], 1):
        if not isinstance(margin, (int, float)) or not math.isfinite(margin):
            error(f"--dataset {args.dataset}, split {split}, row {number}, column margin: {str(margin)[:50]!r} "
                  "is not a number")
    return [float(margin) for margin in data["margin"]]


def load_scored_pairs(args: Args, tokenizer: PreTrainedTokenizerBase, split: str) -> list[list[Any]]:
    """Rows [prompt ids, chosen ids, rejected ids, [margin]] of a split."""
    pairs = zip(load_pairs(args, tokenizer, split), load_margins(args, split))
    return truncate([[*pair, [margin]] for pair, margin in pairs], args.max_length, split)


def check_share_prompt(read: Callable[..., Tensor], model: PreTrainedModel, rows: list[list[Any]]) -> None:
    """Refuse --share-prompt where it changes what `read` finds in the longest row, as for sliding windows."""
    longest = [max(rows, key=lambda row: sum(map(len, row)))]
    try:
        with torch.no_grad():
            shared, apart = (read(model, longest, share_prompt) for share_prompt in (True, False))
        exact = torch.allclose(shared, apart, rtol=1e-4, atol=1e-4)
    except Exception:  # a model that takes no such mask or positions
        exact = False
    if not exact:
        error("--share-prompt: the attention of --model does not allow it; use --no-share-prompt")


def held_out_rewards(args: Args, model: PreTrainedModel,
                     rows: list[list[Any]]) -> tuple[dict[str, float], float, float]:
    """Means of loss, accuracy and margin over all pairs, then mean and standard deviation of their 2·pairs rewards."""
    sums = torch.zeros(5, dtype=torch.float64, device=model.device)
    for part in micro_batches(rows, args.rows_per_pass):
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            chosen, rejected = scores = pair_rewards(model, part, args.share_prompt).double()
        losses = reward_loss(chosen, rejected, margins_of(part, model.device), args.centering)
        sums += torch.stack([losses.sum(), (chosen > rejected).sum(), (chosen - rejected).sum(),
                             scores.sum() / 2, scores.square().sum() / 2])
    loss, accuracy, margin, mean, square = (sum_over_processes(sums) / len(rows)).tolist()
    return {"loss": loss, "accuracy": accuracy, "margin": margin}, mean, math.sqrt(max(0.0, square - mean**2))


def main(args: Args) -> None:
    validate(args)
    quiet()
    device = start_processes(args.device)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer("model", args.model)
    set_pad_token(args.model, args.pad_token, tokenizer)
    model = load_reward_model(args.model, tokenizer)
    check_model("model", args.model, model, tokenizer, args.max_length)
    train = load_scored_pairs(args, tokenizer, args.train_split)
    held_out = load_scored_pairs(args, tokenizer, args.eval_split) if args.eval_split else []
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
    if args.share_prompt:
        check_share_prompt(pair_rewards, model, train)
    run_dir, writer = open_run(args, Path(args.dataset).stem, step, finished=step >= total_steps)

    def evaluate() -> None:
        if held_out:
            metrics, _, _ = held_out_rewards(args, model, held_out)
            log(writer, "eval", metrics, step)
            say(f"update {step}: held-out accuracy {metrics['accuracy']:.4f}, loss {metrics['loss']:.4f}")

    def show_samples() -> None:
        rows = (held_out or train)[:4]
        with torch.no_grad():
            scores = pair_rewards(model, rows, args.share_prompt).T.tolist()
        texts = [f"{side} {score:.2f}: {tokenizer.decode(prompt + text)}"
                 for (prompt, *pair, _), both in zip(rows, scores)
                 for side, text, score in zip(("chosen", "rejected"), pair, both)]
        writer.add_text("samples", "\n\n".join(texts), step)

    history, pairs = [], 0  # loss, accuracy, margin and gradient norm per update; pairs since the start
    bar = tqdm(total=total_steps, initial=step, unit="update", disable=RANK > 0)
    if step == 0:
        evaluate()
        show_samples()
    start_time = time.perf_counter()

    while step < total_steps:
        # ===== collect =====
        batch = batch_at(train, step, args.batch_size, args.seed)

        # ===== compute targets =====
        parts = [(part, margins_of(part, device)) for part in micro_batches(batch, args.rows_per_pass)]

        # ===== update =====
        optimizer.param_groups[0]["lr"] = scheduled(args.learning_rate, step, total_steps, args.warmup, args.schedule)
        optimizer.zero_grad()
        sums = torch.zeros(3, device=device)
        for part, margins in parts:
            with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                chosen, rejected = pair_rewards(model, part, args.share_prompt)
            loss = reward_loss(chosen, rejected, margins, args.centering).sum() / args.batch_size
            loss.backward()
            wins, gaps = (chosen > rejected).sum(), (chosen - rejected).detach().sum()
            sums += torch.stack([loss.detach(), wins / args.batch_size, gaps / args.batch_size])
        sum_gradients(args, parameters)
        grad_norm = full_tensor(nn.utils.clip_grad_norm_(parameters, args.max_grad_norm))
        optimizer.step()
        history.append(torch.stack([*sum_over_processes(sums), grad_norm]))
        step, pairs = step + 1, pairs + args.batch_size

        # ===== log and save =====
        bar.update(1)
        save = step == total_steps or passes(args.save_every, step - 1, step)
        if save or step == 1 or passes(LOG_EVERY, step - 1, step):
            loss, accuracy, margin, norm = torch.stack(history).mean(0).tolist()
            check_finite(loss + norm, step, run_dir, bar)
            speed = pairs / (time.perf_counter() - start_time)
            log(writer, "", {"loss": loss, "accuracy": accuracy, "margin": margin, "grad_norm": norm,
                             "learning_rate": optimizer.param_groups[0]["lr"], "pairs_per_second": speed}, step)
            bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.3f}, {speed:.0f} pairs/s", refresh=False)
            history = []
        if save:
            save_checkpoint(run_dir, args, step=step, **get_state(model, optimizer))
        if step < total_steps and passes(args.eval_every, step - 1, step):
            evaluate()

    bar.close()
    evaluate()
    show_samples()
    weights = get_state(model, optimizer)["model"]
    if args.normalize:
        _, mean, std = held_out_rewards(args, model, held_out or train[:NORMALIZE_ROWS])
        say(f"rewards had mean {mean:.3f} and standard deviation {std:.3f}, now 0 and 1")
        if RANK == 0:
            weights["score.weight"], model.config.reward_mean = normalized(weights["score.weight"], mean, std)
    save_model(model, tokenizer, weights, run_dir)
    writer.close()


if __name__ == "__main__":
    main(parse_args())
    if WORLD_SIZE > 1:
        sys.stdout.flush()
        os._exit(0)  # an interpreter that ends in the usual way may meet gloo's threads, still at work, and abort
