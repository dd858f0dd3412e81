# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["accelerate~=1.15.0", "datasets~=5.2.0", "peft~=0.21.2", "tensorboard~=2.21.0", "torch~=2.13.0",
# "tqdm~=4.70.1", "transformers~=5.23.0", "tyro~=1.0.17"]
# ///
"""Supervised fine-tuning (SFT): make a language model likely to write what a data set contains.

The first of RLHF's three steps: maximum likelihood of the completions, token by token. The result is the policy π_ref.
RLHF and DPO start from π_ref and stay near it. Paper: Ouyang et al. 2022, arXiv 2203.02155 (InstructGPT), section 3.5.

    python algos/sft.py  # the small language world: held-out loss 1.124, where 1.117 is the best possible
    accelerate launch algos/sft.py --model Qwen/Qwen3-0.6B --dataset trl-lib/Capybara --bf16 --gradient-checkpointing

Data: columns `prompt` and `completion`, where only the completion is trained on; or a column `messages` or `text`,
where every token but the first is trained on. Columns hold texts or lists of {"role", "content"} messages.
Letters: B rows in an update, b in a micro-batch, L tokens in the longest row, K = L minus the length of the shortest
prompt, V words in the vocabulary.

Differs from the paper:
 1. The loss is the mean over all completion tokens of a batch, so a long completion counts for more than a short one.
 2. AdamW without weight decay, a cosine schedule, the gradient's norm clipped to 1, no dropout.
"""

import json
import logging
import math
import os
import re
import shutil
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.util import find_spec
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
LAYOUTS = [["prompt", "completion"], ["messages"], ["text"]]  # columns that a data set may have
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class Args:
    seed: int = 1  # Seed of the order of rows.
    device: Literal["auto", "cpu"] = "auto"  # Where the model runs; auto takes GPUs when there are some.
    run_dir: str = ""  # Directory of the run; by default runs/<task>__<script>__<seed>__<time>.
    resume: str = ""  # Run directory or checkpoint to continue, with its flags. Flags that you give replace them.
    save_every: int = 200  # Updates between checkpoints; 0 saves at the end only.
    eval_every: int = 200  # Updates between evaluations; 0 evaluates before and after training only.
    track: bool = False  # Send the logs to Weights & Biases too.
    model: str = str(ASSETS / "base")  # Model to start from: a hub id, folder or peft adapter.
    dataset: str = str(ASSETS / "reviews")  # Data set: a hub id, folder, or jsonl, json, csv or parquet file.
    dataset_config: str = ""  # Configuration of a hub data set, where it has several.
    train_split: str = "train"  # Split to train on; slices such as train[:95%] work.
    eval_split: str = "auto"  # Held-out split. auto: test or validation, if there is one; '': none.
    chat_template_kwargs: str = "{}"  # Arguments of the chat template, as a JSON object.
    max_length: int = 512  # Longest row, prompt and completion, in tokens. What is longer is cut.
    learning_rate: float = 0  # Peak learning rate; 0 means 3e-3 for the default model, 2e-5 for others.
    warmup: float = 0.1  # Share of the updates in which the learning rate rises, before it falls to 0 by a cosine.
    batch_size: int = 32  # Number B of rows in an update, over all processes.
    micro_batch_size: int = 8  # Number b of rows in a forward pass, over all processes. Fewer need less memory.
    epochs: int = 2  # Passes over the data.
    max_steps: int = 0  # Updates to train for; 0: as many as --epochs gives.
    bf16: bool = False  # Compute in bfloat16; weights and log-probabilities stay in float32.
    gradient_checkpointing: bool = False  # Compute activations twice: less memory, about a third slower.

    def __post_init__(self) -> None:
        if type(json.loads(self.chat_template_kwargs)) is not dict:
            raise ValueError("chat-template-kwargs must be a JSON object")
        if min(self.batch_size, self.micro_batch_size, self.epochs) < 1:
            raise ValueError("batch-size, micro-batch-size and epochs must be at least 1")
        if self.max_length < 2:
            raise ValueError("max-length must be at least 2")
        if min(self.save_every, self.eval_every, self.max_steps) < 0:
            raise ValueError("save-every, eval-every and max-steps must be at least 0")
        if self.learning_rate < 0:
            raise ValueError("learning-rate must be at least 0")
        if not 0 <= self.warmup <= 1:
            raise ValueError("warmup is a share of the updates, and must lie between 0 and 1")


# --- algorithm ---


def completion_logprobs(model: nn.Module, rows: list[Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """log π(y_t | x, y_<t) of rows [prompt, completion] of token ids, and a mask of the completions: (b, K) each.

    Column 0 is where the earliest completion begins, column K - 1 where the longest row ends; 0 outside the mask.
    """
    ids = []
    labels = []
    for prompt, completion in rows:
        ids.append(torch.tensor(prompt + completion))
        labels.append(torch.tensor([-100] * len(prompt) + completion))
    # Padding, a token of the rows since others may be nan, stands to the right, where a causal model does not look.
    ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=int(ids[0][-1])).to(device)  # (b, L)
    labels = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100).to(device)
    first = max(1, min(len(prompt) for prompt, completion in rows))  # nothing stands before column 0 to predict it from
    labels = labels[:, first:]  # (b, K)
    # The logits at a token are those of the next one, so the last token of ids is only predicted.
    logits = model(ids[:, :-1], logits_to_keep=labels.shape[1], use_cache=False).logits.float()  # (b, K, V)
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return -losses.view_as(labels), labels != -100


def sft_loss(logprobs: Tensor, num_tokens: int) -> Tensor:
    """-Σ log π(y_t | x, y_<t) / num_tokens: what rows, (b, K), add to the mean over the num_tokens of a batch."""
    return -logprobs.sum() / num_tokens


def cosine_schedule(step: int, total_steps: int, warmup: float) -> float:
    """Share of the peak learning rate at update `step`: a linear rise, then half a cosine to 0."""
    warmup_steps = math.ceil(warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return (1 + math.cos(math.pi * progress)) / 2


# --- model ---


def load_model(loader: Any, name: str, max_length: int, **changes: Any) -> tuple[nn.Module, Any]:
    """Model in float32, without dropout, and tokenizer of a hub id, folder or peft adapter; num_labels=1 for a head."""
    if (Path(name) / "model/config.json").exists():
        raise SystemExit(f"{name} is a run directory: its model is {name}/model")
    base = name
    tokenizer_name = name
    adapter = None
    if transformers.utils.find_adapter_config_file(name):
        from peft import PeftConfig, PeftModel

        adapter = PeftConfig.from_pretrained(name)
        base = adapter.base_model_name_or_path
        if not transformers.utils.hub.has_file(name, "tokenizer_config.json"):
            tokenizer_name = base
        if adapter.task_type == "SEQ_CLS":
            if loader is transformers.AutoModelForCausalLM:
                raise SystemExit(f"{name} is the adapter of a reward model, not of a language model")
            changes["num_labels"] = 1  # the head lies in the adapter
        adapter.task_type = None  # the model's class says what it is for
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_name)
    config = transformers.AutoConfig.from_pretrained(base, **changes)
    text_config = config.get_text_config()
    for key, value in vars(text_config).items():
        if isinstance(value, float) and re.search("drop|jitter", key):
            setattr(text_config, key, 0.0)
    model, info = loader.from_pretrained(base, config=config, dtype="auto", output_loading_info=True)

    # Weights that a file lacks would be random numbers.
    missing = info["missing_keys"]
    has_head = "ForSequenceClassification" in str(config.architectures)
    if "num_labels" in changes and not has_head:
        missing.discard("score.weight")  # the head is new
    if missing:
        raise SystemExit(f"{base} lacks the weights {sorted(missing)} of {type(model).__name__}")
    if "score.weight" in info["unexpected_keys"]:
        raise SystemExit(f"{base} is a reward model, not a {type(model).__name__}")
    if adapter:
        model = PeftModel.from_pretrained(model, name, config=adapter).merge_and_unload().requires_grad_(True)

    num_embeddings = model.get_input_embeddings().num_embeddings
    max_positions = getattr(text_config, "max_position_embeddings", None) or math.inf
    if tokenizer.eos_token is None:
        raise SystemExit(f"{name} has a tokenizer without an EOS token, in which every text must end")
    if len(tokenizer) > num_embeddings:
        raise SystemExit(f"{name} has {num_embeddings} embeddings for the {len(tokenizer)} tokens of its tokenizer")
    if max_length > max_positions:
        raise SystemExit(f"{name} has {max_positions} positions: --max-length cannot be {max_length}")
    model = model.float().eval()
    if not is_causal(model):
        raise SystemExit(f"{name} is not causal: what it computes for a token depends on later tokens")
    return model, tokenizer


@torch.no_grad()
def is_causal(model: nn.Module) -> bool:
    """Whether the hidden states of four tokens stay the same when four others follow."""
    ids = torch.arange(8)[None]
    alone = model(ids[:, :4], output_hidden_states=True).hidden_states[-1]
    followed = model(ids, output_hidden_states=True).hidden_states[-1][:, :4]
    return (alone - followed).abs().max() < 1e-3 * alone.std()


def is_valid(config: transformers.GenerationConfig) -> bool:
    """Whether a generation config can be saved."""
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


def set_stop_tokens(model: nn.Module, stops: list[int]) -> None:
    """Let generation end at the tokens that end answers in training, besides those that the model's own file names."""
    config = model.generation_config
    own = config.eos_token_id
    if isinstance(own, int):
        own = [own]
    config.eos_token_id = sorted({*stops, *(own or [])})
    if not is_valid(config):
        config.do_sample = True  # some published models have a temperature without it
    if not is_valid(config):
        model.generation_config = transformers.GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id
        )


# --- data ---


def say(text: str) -> None:
    """Print on the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def locate_data(name: str) -> tuple[str, str | None]:
    """What datasets.load_dataset takes as its path and data_files: a hub id or folder, or the format of a file."""
    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix in FORMATS:
        return FORMATS[suffix], name
    return name, None


def choose_eval_split(name: str, config: str, split: str) -> str:
    """Name of the held-out split, '' for none; auto takes test or validation where there is one."""
    import datasets

    if split != "auto":
        return split
    path, files = locate_data(name)
    splits = datasets.get_dataset_split_names(path, config or None, data_files=files)
    for choice in ("test", "validation"):
        if choice in splits:
            return choice
    say(f"{name} has no split test or validation: nothing is held out")
    return ""


def refuse_unread(data: Any, name: str, columns: list[str]) -> None:
    """Stop the run if a column that belongs to the prompt holds text that none of the columns in use has."""
    unread = ["prompt", "system", "system_prompt", "tools"]
    if columns not in (["messages"], ["text"]):
        unread += ["question", "instruction", "problem", "query", "context", "input"]
    for extra in unread:
        if extra in columns or extra not in data.column_names:
            continue
        for row in data:
            # Blanks and line breaks, \n in JSON, do not count.
            shown = re.sub(r"\s|\\n", "", json.dumps([row[column] for column in columns]))
            text = re.sub(r"\s|\\n", "", json.dumps(row[extra] or "")).strip('"[]')
            if text not in shown:
                advice = "rename it to prompt, put it into the prompt, or remove the column"
                raise SystemExit(f"--dataset {name}: {extra} is not read: {advice}")


def choose_columns(data: Any, name: str) -> list[str]:
    """The first of LAYOUTS whose columns a data set has."""
    for columns in LAYOUTS:
        if set(columns) <= set(data.column_names):
            if columns == ["text"] and "role" in data.column_names:
                raise SystemExit(f"--dataset {name} has one message per row: put each chat into one row, `messages`")
            return columns
    raise SystemExit(f"--dataset {name} has the columns {data.column_names}: rename them to one of {LAYOUTS}")


def without_nulls(value: Any) -> Any:
    """A value without the keys that hold null: parquet gives each message all keys that any message has."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def read_value(value: Any, place: str) -> str | list[dict]:
    """A text, or a list of messages with role and content. Anything else stops the run."""
    if isinstance(value, str):
        has_keys = re.search(r"""['"](role|from)['"]""", value) and re.search(r"""['"](content|value)['"]""", value)
        if has_keys and re.match(r"\s*\[\s*{", value):
            raise SystemExit(f"{place}: {value!r:.40} is a list of messages written as text: use jsonl in place of csv")
        return value
    if not isinstance(value, list) or not value:
        raise SystemExit(f"{place}: {value!r:.40} is neither text nor a list of messages")
    turns = without_nulls(value)
    for turn in turns:
        if isinstance(turn, dict) and turn.get("tool_calls"):
            turn.setdefault("content", "")  # it may call tools and say nothing
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise SystemExit(f"{place}: {turn!r:.80} is not a message with the texts role and content")
    return turns


def said_by(turns: list[dict]) -> list[tuple[str, ...]]:
    """Role, content, thoughts and tool calls of messages; two messages are the same if these are."""
    said = []
    for turn in turns:
        unsaid = [turn.get(key) or "" for key in ("reasoning_content", "thinking", "tool_calls")]
        said.append((turn["role"], turn["content"].strip(), str(unsaid)))
    return said


def prompt_turns(prompt: str | list[dict], chat: list[dict]) -> list[dict]:
    """The turns of a prompt; if the chat holds them, all of the chat up to their end."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if chat[0]["role"] == "assistant":
        return prompt  # the chat is an answer alone
    prompt_said = said_by(prompt)
    chat_said = said_by(chat)
    for end in range(len(prompt_said), len(chat_said) + 1):
        if chat_said[end - len(prompt_said) : end] == prompt_said:
            return chat[:end]
    return prompt


def shared_turns(chats: list[list[dict]]) -> list[dict]:
    """The turns with which two chats begin, their last turns left out. One chat alone has none."""
    if len(chats) == 1:
        return []
    shared = os.path.commonprefix([said_by(chat[:-1]) for chat in chats])  # which takes any lists
    return chats[0][: len(shared)]


def split_chats(prompt: Any, completions: list[Any], place: str) -> tuple[list[dict], list[list[dict]]]:
    """Turns of a prompt and of its answers. A prompt that the answers repeat is cut off them."""
    chats = []
    for completion in completions:
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        if completion[-1]["role"] != "assistant":
            raise SystemExit(
                f"{place}: the chat does not end in a turn of the assistant, so there is no answer to learn"
            )
        chats.append(completion)
    turns = prompt_turns(prompt, chats[0]) if prompt else shared_turns(chats)
    repeats = [said_by(chat[: len(turns)]) == said_by(turns) for chat in chats]
    if all(repeats):
        return turns, [chat[len(turns) :] for chat in chats]
    if any(repeats):
        raise SystemExit(f"{place}: one of the two answers repeats the prompt, and the other does not")
    if turns[-1]["role"] == "user" and chats[0][0]["role"] != "assistant":
        raise SystemExit(f"{place}: the chat neither repeats the prompt nor begins with its answer")
    return turns, chats


def render_chats(render: Callable, prompt: list[dict], answers: list[list[dict]]) -> tuple[str, list[str]]:
    """The chat template's text of a prompt, and of the prompt with each answer."""
    question = render(prompt, add_generation_prompt=True) if prompt else ""
    texts = [render(prompt + answer) for answer in answers]
    if not all(text.startswith(question) for text in texts):
        question = render(prompt)  # a template may begin a new answer with <think>, and a given one without
    for text, answer in zip(texts, answers):
        if not text.startswith(question):
            raise SystemExit(f"--dataset: the chat template changes a prompt once it is answered:\n{question}\n{text}")
        check_rendered(prompt, answer, text)
    return question, texts


def chat_renderer(tokenizer: Any, template_kwargs: str) -> Callable:
    """A function that gives the chat template's text of messages."""
    settings = json.loads(template_kwargs)

    def render(turns: list[dict], **options: Any) -> str:
        try:
            return tokenizer.apply_chat_template(turns, tokenize=False, **settings, **options)
        except Exception as error:
            raise SystemExit(f"--dataset: the chat template refuses {turns!r:.200}: {error}") from error

    return render


def check_rendered(prompt: list[dict], answer: list[dict], text: str) -> None:
    """Stop the run where the chat template leaves out what a turn says; thoughts of earlier answers may go."""
    shown = "".join(text.split())
    for number, turn in enumerate(prompt + answer):
        contents = [turn.get(key, "") for key in ("content", "reasoning_content", "thinking")]
        if turn["role"] == "assistant" and number < len(prompt):
            contents = []  # of an earlier answer
        if turn["role"] in ("tool", "ipython"):
            contents = re.findall("[A-Za-z0-9]+", turn["content"])[:1]  # a template may write the rest in its own way
        for call in turn.get("tool_calls", []):
            contents.append(call.get("function", call)["name"])
        for content in contents:
            if "".join(content.split()) not in shown:
                raise SystemExit(
                    f"--dataset: the chat template leaves out a part of the turn {content!r} ({turn['role']})"
                )


def stop_tokens(tokenizer: Any, render: Callable) -> list[int]:
    """Ids at which an answer may end: EOS, and what ends a turn of the chat template."""
    stops = [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        after = render(turns).rpartition("answer")[2].strip()
        ids = tokenizer(after, add_special_tokens=False).input_ids
        if ids and ids[0] in tokenizer.added_tokens_decoder:
            stops.append(ids[0])
    return stops


def end_once(tokenizer: Any, ids: list[int], stops: list[int]) -> list[int]:
    """A completion cut behind the first stop token after its text; one without a stop token there gets EOS."""
    end = len(ids)  # of the text; behind it stand stop tokens and blanks
    while end > 0 and (ids[end - 1] in stops or not tokenizer.decode(ids[end - 1]).strip()):
        end -= 1
    for i in range(end, len(ids)):
        if ids[i] in stops:
            return ids[: i + 1]
    return ids + [tokenizer.eos_token_id]


def encode(tokenizer: Any, question: str, texts: list[str], is_chat: bool) -> list[list[int]]:
    """Token ids [prompt, completion, …] of texts that begin with a question, which is the prompt.

    Question and answer are tokenized as one text, since tokens may merge where they meet.
    """
    has_bos = is_chat or texts[0].startswith(tokenizer.bos_token or "<no BOS>")
    question_ids, *text_ids = tokenizer([question, *texts], add_special_tokens=not has_bos).input_ids
    prompt_ids = os.path.commonprefix([question_ids, *text_ids])  # which takes any lists
    return [prompt_ids] + [ids[len(prompt_ids) :] for ids in text_ids]


def repeats_prompt(row: dict[str, Any]) -> bool:
    """Whether the prompt of a row is a text with which its other texts begin."""
    prompt = row.get("prompt")
    texts = [value for column, value in row.items() if column != "prompt"]
    return isinstance(prompt, str) and all(isinstance(text, str) and text.startswith(prompt) for text in texts)


def read_row(row: dict[str, Any], render: Callable, place: str, is_repeated: bool) -> tuple[str, list[str], bool]:
    """Text of a prompt, texts of the prompt with each completion, and whether they are chats."""
    prompt = row.get("prompt", "")
    completions = [value for column, value in row.items() if column != "prompt"]
    is_chat = any(isinstance(value, list) for value in row.values())
    if is_chat:
        prompt, answers = split_chats(prompt, completions, place)
        question, texts = render_chats(render, prompt, answers)
        return question, texts, is_chat
    if is_repeated and repeats_prompt(row):
        return prompt, completions, is_chat
    if not prompt and len(completions) == 2:
        return os.path.commonprefix(completions), completions, is_chat  # the prompt is what both begin with
    return prompt, [prompt + completion for completion in completions], is_chat


def load_rows(
    name: str, split: str, tokenizer: Any, max_length: int, config: str = "", template_kwargs: str = "{}"
) -> list[list[list[int]]]:
    """Rows [prompt, completion, …] of token ids of a split; each completion ends in one stop token, or is cut.

    Says how many rows are left out, how many are cut and how many hold unknown tokens.
    """
    import datasets

    # The rows: texts or lists of messages by column.
    path, files = locate_data(name)
    data = datasets.load_dataset(path, config or None, data_files=files, split=split)
    columns = choose_columns(data, name)
    refuse_unread(data, name, columns)
    render = chat_renderer(tokenizer, template_kwargs)
    stops = stop_tokens(tokenizer, render)
    unknown = tokenizer.unk_token_id if tokenizer.unk_token_id not in stops else None

    kept = []
    counts = Counter()
    rows = data.select_columns(columns).to_list()
    is_repeated = sum(repeats_prompt(row) for row in rows) > len(rows) / 2  # a few answers may begin so by chance
    for number, row in enumerate(rows, 1):
        place = f"--dataset {name}, split {split}, row {number}"
        for column, value in row.items():
            row[column] = read_value(value, f"{place}, column {column}")
        question, texts, is_chat = read_row(row, render, place, is_repeated)
        prompt, *completions = encode(tokenizer, question, texts, is_chat)
        if not question.strip() and columns == ["chosen", "rejected"]:
            raise SystemExit(f"{place}: chosen and rejected share no beginning, so they hold no prompt; "
                             f"rename the column that holds it to prompt: {data.column_names}")  # fmt: skip
        uncut = [end_once(tokenizer, ids, stops) for ids in completions]
        completions = [ids[: max_length - len(prompt)] for ids in uncut]
        has_text = all(tokenizer.decode(ids[:-1]).strip() for ids in uncut)
        if len(prompt) >= max_length:
            counts["are left out: the prompt alone fills --max-length"] += 1
        elif not has_text or completions.count(completions[0]) > 1:
            counts["are left out: an answer is empty, or both are the same"] += 1
        else:
            kept.append([prompt, *completions])
            counts["are cut to --max-length, and so have no end"] += completions != uncut
            counts["hold words that --model does not know"] += any(unknown in ids for ids in kept[-1])
    for label, num_rows in counts.items():
        if num_rows:
            say(f"split {split}: {num_rows} of {len(data)} rows {label}")
    if counts["hold words that --model does not know"] > len(kept) / 2:
        raise SystemExit(f"--dataset {name}: most rows hold {tokenizer.unk_token}, a word that --model does not know")
    return kept


def batch_at(num_rows: int, step: int, batch_size: int, seed: int) -> list[int]:
    """Indices of the rows of update `step`, by it and the seed alone. Rows left over at an epoch's end are skipped."""
    epoch, batch = divmod(step, num_rows // batch_size)
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    order = torch.randperm(num_rows, generator=generator).tolist()
    return order[batch * batch_size : (batch + 1) * batch_size]


def micro_batches(rows: list[Any], indices: list[int], size: int, processes: int) -> list[list[int]]:
    """Indices of rows in parts of `size` or fewer. Rows of similar length go together, which saves padding.

    Each part has a row for each process. For that, there may be fewer parts, a little larger than `size`.
    """
    lengths = {}
    for i in indices:
        prompt, *texts = rows[i]
        lengths[i] = len(prompt) + max(map(len, texts))
    indices = sorted(indices, key=lengths.get)
    num_chunks = min(math.ceil(len(indices) / size), len(indices) // processes)
    chunks = torch.tensor(indices).tensor_split(max(1, num_chunks))
    return [chunk.tolist() for chunk in chunks if len(chunk)]


def check_batches(args: Args, processes: int, num_rows: int, num_eval_rows: int) -> None:
    """Stop the run unless each process has rows of each micro-batch."""
    if num_rows < args.batch_size:
        raise SystemExit(f"--batch-size {args.batch_size} is more than the {num_rows} rows of --dataset in use")
    if min(args.batch_size, args.micro_batch_size) < processes:
        raise SystemExit(f"--batch-size and --micro-batch-size must be at least {processes}, the number of processes")
    if 0 < num_eval_rows < processes:
        raise SystemExit(f"--eval-split has {num_eval_rows} rows, too few for {processes} processes")


# --- run ---


def load_state(resume: Path | None = None) -> dict[str, Any] | None:
    """What the checkpoint of a run directory says: script, args and step; and the folder of its tensors."""
    if resume is None:
        return None
    folder = resume / "checkpoint" if (resume / "checkpoint").is_dir() else resume
    if not (folder / "state.json").exists():
        raise SystemExit(f"--resume {resume}: there is no run in it")
    try:
        saved = json.loads((folder / "state.json").read_text())
        if saved["script"] != SCRIPT:
            raise SystemExit(f"--resume {resume}: written by {saved['script']}.py, not {SCRIPT}.py")
    except (ValueError, KeyError) as error:
        raise SystemExit(f"--resume {resume}: {folder / 'state.json'} is damaged") from error
    saved["folder"] = folder / str(saved["step"])
    saved["args"]["run_dir"] = str(folder.parent)
    return saved


def restore(accelerator: Accelerator, folder: Path, strict: bool = True) -> None:
    """Give models, optimisers and random numbers the state of a checkpoint."""
    try:
        accelerator.load_state(folder, strict=strict)
    except Exception as error:
        raise SystemExit(f"--resume: {folder} is damaged, or of another --model ({type(error).__name__})") from error


def parse_args() -> tuple[Args, dict[str, Any] | None]:
    """Flags of the command line, and the checkpoint of --resume, whose flags are then the defaults."""
    # load_state reads --resume, and leaves the other flags for Args.
    saved, _ = tyro.cli(load_state, add_help=False, return_unknown_args=True)
    default = Args(**saved["args"]) if saved else Args()
    args = tyro.cli(Args, default=default, description=__doc__.splitlines()[0])
    if args.track and not find_spec("wandb"):
        raise SystemExit("--track needs wandb: pip install wandb")
    for name, value in vars(args).items():
        if str(value).startswith(str(ASSETS)) and not ASSETS.exists():
            raise SystemExit(f"--{name.replace('_', '-')} is needed: its default is not beside this copy of the script")
    return args, saved


def start_run(args: Args, accelerator: Accelerator, saved: dict[str, Any] | None, step: int) -> Path:
    """Make the run directory and the logs; a directory that holds another run is refused."""
    name = f"{Path(args.dataset).stem}__{SCRIPT}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    name = re.sub(r"[^\w.-]", "_", name)  # some file systems refuse a colon
    run_dir = Path(broadcast_object_list([args.run_dir or f"runs/{name}"])[0])  # the first process's clock counts
    holds_run = (run_dir / "checkpoint/state.json").exists()
    if holds_run and not (saved and run_dir.samefile(saved["args"]["run_dir"])):
        raise SystemExit(f"{run_dir} holds a run: choose another --run-dir, or continue it with --resume {run_dir}")
    flags = json.dumps(asdict(args), indent=2)
    if accelerator.is_main_process:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "args.json").write_text(flags + "\n")
    accelerator.print(f"run directory: {run_dir}, learning rate: {args.learning_rate:g}")

    trackers = [TensorBoardTracker(run_dir.name, run_dir.parent, purge_step=step + 1, flush_secs=1)]
    if args.track:
        trackers.append("wandb")
    accelerator.log_with = trackers
    accelerator.init_trackers("algos", init_kwargs={"wandb": {"name": run_dir.name, "config": asdict(args)}})
    accelerator.log({"flags": f"```\n{flags}\n```"}, step)
    return run_dir


def catch_signals() -> list[int]:
    """A list that Ctrl-C and SIGTERM are added to, so that the run saves and stops; a second one kills it."""
    caught = []

    def catch(number: int, frame: object) -> None:
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, catch)
    signal.signal(signal.SIGTERM, catch)
    return caught


def keep_float32(accelerator: Accelerator) -> None:
    """Let FSDP2 add gradients up and leave results in float32 where it computes in bfloat16."""
    if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy


def mean_over_processes(values: list[Tensor]) -> float:
    """Mean of all numbers in the tensors of all processes."""
    numbers = gather_object(torch.cat(values).tolist())
    return torch.tensor(numbers).mean().item()


def save_checkpoint(accelerator: Accelerator, run_dir: Path, args: Args, step: int) -> None:
    """Write the tensors to checkpoint/<step>, then replace state.json, which names that folder, in one step."""
    folder = run_dir / "checkpoint"
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)  # it warns of weights that are tied, as usual
    accelerator.save_state(folder / str(step))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        state = {"script": SCRIPT, "args": asdict(args), "step": step}
        (folder / "state.tmp").write_text(json.dumps(state))
        (folder / "state.tmp").replace(folder / "state.json")
        for older in folder.glob("[0-9]*"):
            if older.name != str(step):
                shutil.rmtree(older)


@torch.no_grad()
def greedy_sample(model: nn.Module, tokenizer: Any, row: list[list[int]], max_length: int) -> str:
    """Text of a row's prompt with the likeliest next tokens behind it, 64 at most."""
    prompt, completion = row[:2]
    ids = torch.tensor([prompt or completion[:8]], device=model.device)
    room = max(1, min(64, max_length - ids.shape[1]))
    own_config = model.generation_config
    stops = own_config.eos_token_id
    model.generation_config = transformers.GenerationConfig(eos_token_id=stops, pad_token_id=stops[0])
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, do_sample=False)
    model.generation_config = own_config
    return tokenizer.decode(generated[0])


def main(args: Args, saved: dict[str, Any] | None = None) -> None:
    # Processes. Each takes its own rows of a micro-batch.
    accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision="bf16" if args.bf16 else "no")
    keep_float32(accelerator)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads take longer to start than a row takes
    device = accelerator.device
    processes = accelerator.num_processes
    accelerator.print(f"{processes} process(es) on {device.type}")
    own = slice(accelerator.process_index, None, processes)

    # The policy.
    policy, tokenizer = load_model(transformers.AutoModelForCausalLM, args.model, args.max_length)
    if policy.num_parameters() < 10e6:
        torch.set_num_threads(1)  # more only lose time
    render = chat_renderer(tokenizer, args.chat_template_kwargs)
    set_stop_tokens(policy, stop_tokens(tokenizer, render))
    if args.gradient_checkpointing:
        policy.activation_checkpointing_enable()
    if not args.learning_rate:
        args.learning_rate = 3e-3 if args.model == Args.model else 2e-5

    # The rows.
    held_out = []
    eval_split = choose_eval_split(args.dataset, args.dataset_config, args.eval_split)
    settings = (tokenizer, args.max_length, args.dataset_config, args.chat_template_kwargs)
    train = load_rows(args.dataset, args.train_split, *settings)
    if eval_split:
        held_out = load_rows(args.dataset, eval_split, *settings)
    check_batches(args, processes, len(train), len(held_out))
    accelerator.print("first row:", " | ".join(tokenizer.decode(ids) for ids in train[0]))

    # The optimiser.
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0, fused=True)
    model, optimizer = accelerator.prepare(policy, optimizer)
    step = saved["step"] if saved else 0
    total_steps = args.max_steps or args.epochs * (len(train) // args.batch_size)

    # The run directory, and what the loop keeps.
    if saved:
        restore(accelerator, saved["folder"])
        accelerator.print(f"the learning rate falls to 0 at update {total_steps}")
    run_dir = start_run(args, accelerator, saved, step)
    caught = catch_signals()
    stop = False
    metrics = defaultdict(list)
    first_step = step
    first_time = time.perf_counter()
    bar = tqdm(total=total_steps, initial=step, unit="update", disable=not accelerator.is_main_process)
    while True:
        # ===== evaluate =====
        if step >= total_steps or step % (args.eval_every or total_steps) == 0:
            model.eval()
            losses = []
            for micro_batch in micro_batches(held_out, range(len(held_out)), args.micro_batch_size, processes):
                with torch.no_grad():
                    logprobs, mask = completion_logprobs(model, [held_out[i] for i in micro_batch[own]], device)
                losses.append(-logprobs[mask])
            texts = [greedy_sample(policy, tokenizer, row, args.max_length) for row in (held_out or train)[:4]]
            eval_metrics = {"samples": "\n\n".join(texts)}
            if held_out:
                eval_metrics["eval/loss"] = mean_over_processes(losses)
                accelerator.print(f"\nupdate {step}: held-out loss {eval_metrics['eval/loss']:.4f}")
            accelerator.log(eval_metrics, step)
            model.train()
        if stop or step >= total_steps:
            break

        # ===== collect =====
        batch = batch_at(len(train), step, args.batch_size, args.seed)
        num_tokens = 0
        for prompt, completion in [train[i] for i in batch]:
            num_tokens += len(completion)
            if not prompt:
                num_tokens -= 1  # nothing comes before a row's first token to predict it

        # ===== update =====
        learning_rate = args.learning_rate * cosine_schedule(step, total_steps, args.warmup)
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.zero_grad()
        for micro_batch in micro_batches(train, batch, args.micro_batch_size, processes):
            logprobs, mask = completion_logprobs(model, [train[i] for i in micro_batch[own]], device)
            loss = sft_loss(logprobs, num_tokens)
            accelerator.backward(loss * processes)  # accelerate takes the mean over processes, not the sum
            metrics["loss"].append(-logprobs[mask].detach())
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        if accelerator.is_fsdp2:
            norm = norm.full_tensor()
        metrics["grad_norm"].append(norm.view(1))
        optimizer.step()
        step += 1

        # ===== log and save =====
        if caught:
            accelerator.set_trigger()
        stop = accelerator.check_trigger()  # whether any process got a signal
        save_now = stop or step == total_steps or (args.save_every and step % args.save_every == 0)
        if save_now or step == 1 or step % 10 == 0:
            means = {name: mean_over_processes(values) for name, values in metrics.items()}
            if not math.isfinite(means["loss"] + means["grad_norm"]):
                raise SystemExit(f"\nthe loss became nan or inf before update {step}; {run_dir}/checkpoint is older")
            means["learning_rate"] = learning_rate
            means["rows_per_second"] = (step - first_step) * args.batch_size / (time.perf_counter() - first_time)
            accelerator.log(means, step)
            bar.set_postfix_str(f"loss {means['loss']:.3f}", refresh=False)
            metrics.clear()
        if save_now:
            save_checkpoint(accelerator, run_dir, args, step)
        bar.update(1)

    # The model, in the precision it came in.
    bar.close()
    policy.to(policy.config.dtype)
    weights = accelerator.get_state_dict(policy)
    if step >= total_steps and accelerator.is_main_process:
        for name in policy.all_tied_weights_keys:
            weights.pop(name, None)  # a model has them once; weights gathered from several processes have them twice
        policy.save_pretrained(run_dir / "model", state_dict=weights)
        tokenizer.save_pretrained(run_dir / "model")
    accelerator.wait_for_everyone()  # torch may abort a process that exits right after it sent or received weights
    model = None  # wrapped models that outlive the group of processes can make torch wait for ever
    accelerator.free_memory()
    accelerator.end_training()
    if step < total_steps:
        raise SystemExit(f"stopped at update {step}; to go on: the same command with --resume {str(run_dir)!r}")


if __name__ == "__main__":
    main(*parse_args())
