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
"""Direct preference optimisation (DPO): learn from preferences between two completions, without a reward model.

RLHF's optimum π*(y|x) ∝ π_ref(y|x)·exp(r(x, y)/β) tells which reward a policy is optimal for: β·log π/π_ref plus a
function of x. Put into the Bradley-Terry likelihood of the preferences, that reward leaves a classification loss on π.

Paper: Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
arXiv 2305.18290. --loss ipo: Azar et al. 2023, arXiv 2310.12036. --label-smoothing: Mitchell 2023, "A note on DPO with
noisy preferences" (cDPO).

    python algos/dpo.py                           # the small language world: 0.81 of the possible gain in 65 s
    python algos/dpo.py --model Qwen/Qwen3-0.6B --dataset trl-lib/ultrafeedback_binarized --learning-rate 1e-6 \\
        --beta 0.1 --dtype bfloat16 --batch-size 32 --micro-batch-size 4 --gradient-checkpointing

The data set has the columns `prompt`, `chosen` and `rejected`, or only the last two, which then begin with the same
prompt. Texts and lists of {"role", "content"} messages both do; messages pass through the chat template.

Letters: B pairs of a batch, b of a micro-batch, P tokens of a prompt, R of a response, L of a row (P + R), V words of
the vocabulary.

Logged every 10 updates, as means since the last time: loss (ln 2 at first, 1/(4β²) with IPO); rewards/chosen and
rewards/rejected (the implicit reward β·log π/π_ref), rewards/margins (their difference), rewards/accuracies (share of
pairs with a margin above 0; a tie counts half); logps/chosen and logps/rejected (log π(y|x) in nats; both usually fall,
as the loss asks for their difference only); grad_norm (before clipping), learning_rate, pairs_per_second. eval/ holds
the same over the whole held-out split, samples greedy completions before and after training, as text.

Differs from the paper:
 1. AdamW without weight decay, where the paper takes RMSprop; warm-up and decay are shares of the run.
 2. Gradients are clipped; dropout is off, so that the first loss is ln 2.
 3. With --loss ipo, log π(y|x) is the sum over tokens, as in IPO's Eq. 17; TRL takes the mean per token there.
 4. A batch never mixes two epochs: the pairs that do not fill one are left out of that epoch.
"""

from __future__ import annotations

import contextlib
import copy
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
    """seed of the order of pairs, and of LoRA's first weights"""
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
    """hub id or folder of the model to start from, with its tokenizer: π_ref, typically an SFT model"""
    dataset: str = str(ASSETS / "preferences")
    """hub id, folder or jsonl, json, csv or parquet file with prompt, chosen and rejected, or the last two alone"""
    train_split: str = "train"
    """split to train on; slices such as train[:95%] work"""
    eval_split: str = "test"
    """held-out split; '' for no evaluation"""
    max_length: int = 512
    """longest row in tokens: longer completions are cut, rows whose prompt fills it are left out"""

    # optimisation
    learning_rate: float = 1e-4
    """step size of AdamW after the warm-up; about 1e-6 for pretrained models, 1e-5 with LoRA"""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """how the learning rate falls to 0 after the warm-up"""
    warmup: float = 0.1
    """share of the updates over which the learning rate rises"""
    batch_size: int = 32
    """B: pairs of an update, over all processes"""
    micro_batch_size: int = 8
    """pairs of a forward pass, over all processes: less memory, same gradient; 0: the whole batch"""
    epochs: int = 1
    """passes over the data"""
    max_steps: int = 0
    """updates to train for, if not 0, instead of --epochs"""
    max_grad_norm: float = 1.0
    """largest global norm of the gradient; inf turns the clip off"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """precision of the forward pass (autocast); weights and log-probabilities stay float32"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third slower"""

    # algorithm
    beta: float = 0.5
    """β: price of KL(π || π_ref) in the reward that the pairs are taken to come from (DPO Eq. 3); IPO's τ"""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid: DPO Eq. 7; ipo: IPO Eq. 17"""
    label_smoothing: float = 0.0
    """ε: share of pairs whose label is taken to be wrong (cDPO)"""
    lora_rank: int = 0
    """train low-rank adapters of this rank on all linear layers, with α = 2·rank (needs peft); 0: all weights"""
    online_reference: bool = False
    """run π_ref beside the policy instead of storing its log-probabilities before training"""
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
    check_ranges(args, 0, math.inf, "max_grad_norm", "beta", "lora_rank")
    check_ranges(args, 0, 1, "warmup")
    check_ranges(args, 0, 0.5, "label_smoothing")
    if args.beta == 0:
        error("--beta must be above 0: it divides the reward")
    if args.label_smoothing and args.loss != "sigmoid":
        error(f"--label-smoothing is for --loss sigmoid, not {args.loss}")
    if args.lora_rank:
        check_package("lora-rank", "peft")
    check_batches(args)
    check_run(args, "model", "dataset", "train_split", "batch_size", "lora_rank")
    check_assets("model", args.model, "dataset", args.dataset)


# --- model ---


def response_logits(model: PreTrainedModel, ids: Tensor, start: int) -> Tensor:
    """Logits that predict the tokens from position `start` on: ids (b, L) to (b, L - start, V).

    They come from the positions one before; the vocabulary head is applied to these only. Rows are padded on the
    right, where causal attention needs no mask.
    """
    return model(ids[:, :-1], logits_to_keep=ids.shape[1] - start, use_cache=False).logits


def pair_logprobs(model: PreTrainedModel, rows: list[list[Any]], share_prompt: bool) -> Tensor:
    """log π(y|x) of both completions of rows [prompt, chosen, rejected, …], by one forward pass: (2, b)."""
    if share_prompt:
        return shared_prompt_logprobs(model, rows)
    pairs = [[prompt, chosen] for prompt, chosen, *_ in rows] + [[prompt, rejected] for prompt, _, rejected, *_ in rows]
    ids, mask, start = collate(pairs, model.device)
    logprobs = response_logprobs(response_logits(model, ids, start), ids[:, start:])  # (2b, R)
    return sequence_logprobs(logprobs, mask).view(2, -1)


def shared_prompt_logprobs(model: PreTrainedModel, rows: list[list[Any]]) -> Tensor:
    """`pair_logprobs` from b rows prompt + chosen + rejected instead of 2b rows."""
    ids, inputs, (first, second, end) = share_prompts(rows, model.device)  # (b, L)
    start = max(1, int(first.min()))
    logits = model(ids, **inputs, logits_to_keep=ids.shape[1] - start + 1, use_cache=False).logits  # (b, R + 1, V)

    logprobs = response_logprobs(logits[:, :-1], ids[:, start:])
    position = torch.arange(start, ids.shape[1], device=ids.device)
    chosen = sequence_logprobs(logprobs, (first <= position) & (position < second))
    rejected = sequence_logprobs(logprobs, (second < position) & (position < end))
    after_prompt = logits.take_along_dim((first - start).clamp(min=0)[..., None], 1)  # (b, 1, V)
    bridge = response_logprobs(after_prompt, ids.gather(1, second))  # first token of the rejected completion
    return torch.stack([chosen, rejected + sequence_logprobs(bridge, first > 0)])


def add_lora(model: PreTrainedModel, rank: int) -> PreTrainedModel:
    """The model with frozen weights and trainable low-rank adapters, which are 0 at first, on its linear layers."""
    from peft import LoraConfig, get_peft_model
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


# --- algorithm ---


def response_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """log π(y_t | x, y_<t) of each response token: logits (b, R, V) and ids (b, R) to (b, R), in float32."""
    return -F.cross_entropy(logits.float().transpose(1, 2), ids, reduction="none")


def sequence_logprobs(logprobs: Tensor, mask: Tensor) -> Tensor:
    """log π(y|x) = Σ_t log π(y_t | x, y_<t) over tokens with mask 1: (b, R) and (b, R) to (b,)."""
    return (logprobs * mask).sum(1)


def preference_loss(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,
                    beta: float, label_smoothing: float, loss: str) -> Tensor:
    """Loss of each pair, given log π(y|x) of both completions under policy and reference, all (b,).

    With h = log π(y_w|x)/π_ref(y_w|x) - log π(y_l|x)/π_ref(y_l|x):
    "sigmoid": -(1 - ε)·log σ(βh) - ε·log σ(-βh), DPO Eq. 7 at ε = 0 and cDPO above it, where ε of the labels are wrong.
    "ipo": (h - 1/(2β))², IPO Eq. 17 with τ = β.
    """
    h = (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected)
    if loss == "ipo":
        return (h - 1 / (2 * beta)) ** 2  # IPO Eq. 17
    return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)  # DPO Eq. 7


def implicit_rewards(logprobs: Tensor, ref_logprobs: Tensor, beta: float) -> Tensor:
    """r(x, y) = β·log π(y|x)/π_ref(y|x), DPO Eq. 5 less β·log Z(x), which both completions share. Any shape."""
    return beta * (logprobs - ref_logprobs)  # DPO Eq. 5


METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
           "logps/rejected")


def preference_metrics(losses: Tensor, logprobs: Tensor, rewards: Tensor) -> Tensor:
    """Sums (7,) over pairs of METRICS: losses (b,), log-probabilities and rewards (2, b). A tie is half a success."""
    margins = rewards[0] - rewards[1]
    accuracies = (margins.sign() + 1) / 2
    return torch.stack([losses, *rewards, accuracies, margins, *logprobs]).detach().sum(1)


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


def reference_logprobs(args: Args, reference: PreTrainedModel, rows: list[list[Any]]) -> Tensor:
    """log π_ref(y|x) of both completions of each row, (2, b): as stored, or computed now with --online-reference."""
    if not args.online_reference:
        return torch.tensor([row[3] for row in rows], device=reference.device).T
    bare = reference.disable_adapter() if args.lora_rank else contextlib.nullcontext()
    with bare, torch.no_grad(), autocast(args, reference.device):
        return pair_logprobs(reference, rows, args.share_prompt)


def store_reference(args: Args, model: PreTrainedModel, rows: list[list[Any]]) -> None:
    """Append to each row [prompt, chosen, rejected] the two log-probabilities under the model as it is now."""
    place = {id(row): i for i, row in enumerate(rows)}
    found = torch.zeros(len(rows), 2)
    parts = len(rows) // args.rows_per_pass
    for part in tqdm(micro_batches(rows, args.rows_per_pass), "reference", parts, leave=False, disable=RANK > 0):
        with torch.no_grad(), autocast(args, model.device):
            found[[place[id(row)] for row in part]] = pair_logprobs(model, part, args.share_prompt).T.cpu()
    for row, logprobs in zip(rows, sum_over_processes(found).tolist()):
        row.append(logprobs)


def autocast(args: Args, device: torch.device) -> torch.autocast:
    """Context in which forward passes compute in --dtype."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")


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


def evaluate_pairs(args: Args, model: PreTrainedModel, reference: PreTrainedModel,
                   rows: list[list[Any]]) -> dict[str, float]:
    """METRICS over all rows."""
    sums = torch.zeros(len(METRICS), dtype=torch.float64, device=model.device)
    for part in micro_batches(rows, args.rows_per_pass):
        ref_logprobs = reference_logprobs(args, reference, part)
        with torch.no_grad(), autocast(args, model.device):
            logprobs = pair_logprobs(model, part, args.share_prompt)
        losses = preference_loss(*logprobs, *ref_logprobs, args.beta, args.label_smoothing, args.loss)
        sums += preference_metrics(losses, logprobs, implicit_rewards(logprobs, ref_logprobs, args.beta))
    return dict(zip(METRICS, (sum_over_processes(sums) / len(rows)).tolist()))


def merged(args: Args, model: PreTrainedModel, weights: dict[str, Tensor]) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Model and weights to save: LoRA's adapters are added to the weights that they adapt."""
    if not args.lora_rank or RANK > 0:
        return model, weights
    whole = transformers.AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    whole.generation_config = model.generation_config
    whole = add_lora(whole, args.lora_rank)
    whole.load_state_dict(weights)
    whole = whole.merge_and_unload()
    return whole, whole.state_dict()


def main(args: Args) -> None:
    validate(args)
    quiet()
    device = start_processes(args.device)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer("model", args.model)
    model = load_pretrained(transformers.AutoModelForCausalLM, "model", args.model, dtype=torch.float32)
    check_model("model", args.model, model, tokenizer, args.max_length)
    train = truncate(load_pairs(args, tokenizer, args.train_split), args.max_length, args.train_split)
    held_out = []
    if args.eval_split:
        held_out = truncate(load_pairs(args, tokenizer, args.eval_split), args.max_length, args.eval_split)
    check_rows(args, train, held_out)

    copied = args.online_reference and not args.lora_rank
    reference = copy.deepcopy(model).requires_grad_(False) if copied else None
    model = prepare_model(args, add_lora(model, args.lora_rank) if args.lora_rank else model, device)
    reference = prepare_model(args, reference, device) if copied else model
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, weight_decay=0.0, fused=True)
    if args.share_prompt:
        check_share_prompt(pair_logprobs, model, train)
    total_steps = args.max_steps or args.epochs * (len(train) // args.batch_size)
    saved = load_checkpoint(args.resume) if args.resume else {"step": 0}
    step = saved["step"]
    run_dir, writer = open_run(args, Path(args.dataset).stem, step, finished=step >= total_steps)
    if not args.online_reference:  # of the starting weights, also when resuming
        rows_needed = min(len(train), total_steps * args.batch_size) if step < total_steps else 0
        for rows in (held_out, batch_at(train, 0, rows_needed, args.seed) if rows_needed else []):
            if rows:
                store_reference(args, model, rows)
    if args.resume:
        if args.fsdp:
            model.reshard()  # the reference's forward passes have left its outermost part whole
        set_state(model, optimizer, saved)

    def evaluate() -> None:
        if held_out:
            found = evaluate_pairs(args, model, reference, held_out)
            log(writer, "eval", found, step)
            say(f"update {step}: held-out loss {found['loss']:.4f}, accuracy {found['rewards/accuracies']:.4f}, "
                f"margin {found['rewards/margins']:.4f}")

    def show_samples() -> None:
        prompts = [prompt or chosen[:8] for prompt, chosen, *_ in (held_out or train)[:4]]
        texts = [f"{tokenizer.decode(prompt)} → {text}"
                 for prompt, text in zip(prompts, greedy_samples(model, tokenizer, prompts))]
        writer.add_text("samples", "\n\n".join(texts), step)

    history = []  # METRICS and gradient norm of each update
    bar = tqdm(total=total_steps, initial=step, unit="update", disable=RANK > 0)
    if step == 0:
        evaluate()
        show_samples()
    start_step, start_time = step, time.perf_counter()

    while step < total_steps:
        # ===== collect =====
        batch = batch_at(train, step, args.batch_size, args.seed)

        # ===== compute targets =====
        parts = [(part, reference_logprobs(args, reference, part)) for part in micro_batches(batch, args.rows_per_pass)]

        # ===== update =====
        optimizer.param_groups[0]["lr"] = scheduled(args.learning_rate, step, total_steps, args.warmup, args.schedule)
        optimizer.zero_grad()
        sums = torch.zeros(len(METRICS), device=device)
        for part, ref_logprobs in parts:
            with autocast(args, device):
                logprobs = pair_logprobs(model, part, args.share_prompt)
            losses = preference_loss(*logprobs, *ref_logprobs, args.beta, args.label_smoothing, args.loss)
            (losses.sum() / args.batch_size).backward()
            sums += preference_metrics(losses, logprobs, implicit_rewards(logprobs, ref_logprobs, args.beta))
        sum_gradients(args, parameters)
        grad_norm = full_tensor(nn.utils.clip_grad_norm_(parameters, args.max_grad_norm))
        optimizer.step()
        history.append(torch.cat([sum_over_processes(sums) / args.batch_size, grad_norm.view(1)]))
        step += 1

        # ===== log and save =====
        bar.update(1)
        save = step == total_steps or passes(args.save_every, step - 1, step)
        if save or step == 1 or passes(LOG_EVERY, step - 1, step):
            means = dict(zip((*METRICS, "grad_norm"), torch.stack(history).mean(0).tolist()))
            check_finite(means["loss"] + means["grad_norm"], step, run_dir, bar)
            speed = (step - start_step) * args.batch_size / (time.perf_counter() - start_time)
            log(writer, "", means | {"learning_rate": optimizer.param_groups[0]["lr"], "pairs_per_second": speed}, step)
            bar.set_postfix_str(f"loss {means['loss']:.3f}, margin {means['rewards/margins']:.3f}, {speed:.0f} pairs/s",
                                refresh=False)
            history = []
        if save:
            save_checkpoint(run_dir, args, step=step, **get_state(model, optimizer))
        if step < total_steps and passes(args.eval_every, step - 1, step):
            evaluate()

    bar.close()
    evaluate()
    show_samples()
    whole, weights = merged(args, model, get_state(model, optimizer)["model"])
    save_model(whole, tokenizer, weights, run_dir)
    writer.close()


if __name__ == "__main__":
    main(parse_args())
    if WORLD_SIZE > 1:
        sys.stdout.flush()
        os._exit(0)  # an interpreter that ends in the usual way may meet gloo's threads, still at work, and abort
