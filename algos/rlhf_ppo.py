# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["accelerate~=1.15.0", "datasets~=5.2.0", "peft~=0.21.2", "tensorboard~=2.21.0", "torch~=2.13.0",
# "tqdm~=4.70.1", "transformers~=5.23.0", "tyro~=1.0.17"]
# ///
"""RLHF by PPO: train a language model to write what a reward model scores highly, without going far from its start.

The last of RLHF's three steps. The policy π answers prompts. Each response y earns r(x, y) - β·log π(y|x)/π_ref(y|x),
and PPO raises the mean of this. The best policy is known: π* ∝ π_ref·exp(r/β). A smaller β trusts the score more.
Four models take part. Two are trained: the policy, and the critic, which starts as the reward model with a new head.
Two are frozen: the reward model, and the reference π_ref, a copy of the policy at the start.
Papers: Ziegler et al. 2019, arXiv 1909.08593; Ouyang et al. 2022, arXiv 2203.02155 (InstructGPT); Schulman et al. 2017,
arXiv 1707.06347 (PPO); Schulman et al. 2015, arXiv 1506.02438 (GAE).

    python algos/rlhf_ppo.py  # the small language world: 0.92 of the possible gain
    accelerate launch algos/rlhf_ppo.py --model my-sft-model --reward-model my-reward-model --dataset trl-lib/tldr \\
        --kl-coef 0.05 --total-episodes 100000 --batch-size 512 --micro-batch-size 16 --bf16 --gradient-checkpointing

Data: a column `prompt` of texts or lists of {"role", "content"} messages. A reward in Python is a function(prompts,
completions, **other columns) -> list of numbers, as in TRL. With such a reward, the critic starts from the policy.
A state is a prompt with the response so far, an action is the next token. Letters: B responses in a rollout, b in a
micro-batch, at most R tokens in a response, L tokens in the longest row, V words in the vocabulary, d width of a model.
Logged: objective/kl is the sum of log π/π_ref over a response, objective/entropy that of -log π. objective/scores is
r(x, y), minus the penalty where a response is unfinished.

Differs from the papers:
 1. Policy and critic are two models, as in InstructGPT, and both learning rates fall linearly to 0.
 2. No dropout, so that π and π_old are equal before the first step. β is constant; Ziegler's section 2.2 adapts it.
 3. A response without a stop token keeps its score, minus a penalty. Ziegler gives it a fixed reward of -1.
 4. Advantages are normalised over the rollout. The gradient's norm is clipped to 1. In the critic's loss a value
    moves by clip-coef at most.
 5. InstructGPT's "PPO-ptx" also adds gradients of a pretraining loss. This script does not.
"""

import copy
import importlib
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
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
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from tqdm import tqdm

SCRIPT = Path(__file__).stem
ASSETS = Path(__file__).resolve().parent.parent / "benchmark/world/assets"  # the small language world
VF_COEF = 0.1  # weight c1 of the value loss (PPO Eq. 9)
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class Args:
    seed: int = 1  # Seed of the order of prompts, of sampling and of minibatches.
    device: Literal["auto", "cpu"] = "auto"  # Where the models run; auto takes GPUs when there are some.
    run_dir: str = ""  # Directory of the run; by default runs/<task>__<script>__<seed>__<time>.
    resume: str = ""  # Run directory or checkpoint to continue, with its flags. Flags that you give replace them.
    save_every: int = 20  # Updates between checkpoints, and between logged samples; 0 saves at the end only.
    track: bool = False  # Send the logs to Weights & Biases too.
    model: str = str(ASSETS / "sft")  # Policy to start from, which is π_ref: a hub id, folder or peft adapter.
    reward_model: str = str(ASSETS / "reward")  # Reward model, a hub id or folder; or a function, as file.py:function.
    dataset: str = str(ASSETS / "prompts")  # Data set: a hub id, folder, or jsonl, json, csv or parquet file.
    dataset_config: str = ""  # Configuration of a hub data set, where it has several.
    train_split: str = "train"  # Split to take prompts from; slices such as train[:95%] work.
    chat_template_kwargs: str = "{}"  # Arguments of the chat template, as a JSON object.
    total_episodes: int = 4096  # Responses to sample in all.
    max_length: int = 512  # Longest row in tokens. A prompt that leaves no room for a response is left out.
    learning_rate: float = 0  # Initial learning rate; 0: 5e-4 for the default model, 3e-6 for others (LoRA 3e-5).
    batch_size: int = 128  # Number B of responses in a rollout, over all processes.
    num_minibatches: int = 4  # Minibatches per epoch, one step of the optimiser each.
    num_ppo_epochs: int = 4  # Passes over the rollout in each update (PPO Algorithm 1's K).
    micro_batch_size: int = 16  # Rows b of a training pass over all processes. Sampling takes all B at once.
    bf16: bool = False  # Compute in bfloat16; weights and log-probabilities stay in float32.
    gradient_checkpointing: bool = False  # Compute activations twice: less memory, about a third slower.
    lora_rank: int = 0  # Train low-rank adapters of this rank in all linear layers, with α = 2·rank; 0: all weights.
    response_length: int = 48  # Longest response R in tokens.
    kl_coef: float = 0.5  # Weight β of the KL penalty (Ziegler Eq. 2), in units of the score per nat.
    gae_lambda: float = 0.95  # Factor λ of generalised advantage estimation (GAE Eq. 16); γ is 1.
    clip_coef: float = 0.2  # Clip range ε of the ratio (PPO Eq. 7), and of the value's change.
    missing_eos_penalty: float = 1.0  # Taken off the score of a response without a stop token.

    def __post_init__(self) -> None:
        if type(json.loads(self.chat_template_kwargs)) is not dict:
            raise ValueError("chat-template-kwargs must be a JSON object")
        if min(self.num_minibatches, self.num_ppo_epochs, self.response_length, self.micro_batch_size) < 1:
            raise ValueError("num-minibatches, num-ppo-epochs, response-length and micro-batch-size must be at least 1")
        if min(self.save_every, self.lora_rank) < 0:
            raise ValueError("save-every and lora-rank must be at least 0")
        if min(self.learning_rate, self.kl_coef, self.missing_eos_penalty) < 0:
            raise ValueError("learning-rate, kl-coef and missing-eos-penalty must be at least 0")
        if self.clip_coef <= 0:
            raise ValueError("clip-coef must be above 0")
        if not 0 <= self.gae_lambda <= 1:
            raise ValueError("gae-lambda must lie between 0 and 1")
        if self.max_length <= self.response_length:
            raise ValueError("max-length must be above response-length")
        if self.batch_size % self.num_minibatches:
            raise ValueError("batch-size must be a multiple of num-minibatches")
        if not 0 < self.batch_size <= self.total_episodes:
            raise ValueError("batch-size must be at least 1, and total-episodes at least batch-size")


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


def response_columns(values: Tensor, mask: Tensor, R: int) -> Tensor:
    """The values (b, K) of responses, which the mask marks, moved to the left: (b, R), 0 behind their ends."""
    is_response = torch.arange(R, device=values.device) < mask.sum(1, keepdim=True)  # (b, R)
    return values.new_zeros(is_response.shape).masked_scatter(is_response, values[mask])


def response_logprobs(model: nn.Module, rows: list[Any], R: int, device: torch.device) -> Tensor:
    """log π(y_t | x, y_<t) of rows [prompt, response], (b, R), from each response's first token; 0 behind its end."""
    logprobs, mask = completion_logprobs(model, rows, device)  # (b, K)
    return response_columns(logprobs, mask, R)


def kl_penalised_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, last: Tensor, kl_coef: float
) -> Tensor:
    """Reward of each token, (B, R): -β·log π(y_t | x, y_<t)/π_ref(y_t | x, y_<t), and the score (B,) with the last one.

    Their sum is Ziegler's R(x, y) = r(x, y) - β·log π(y|x)/π_ref(y|x) (Eq. 2). last is 1 on the last token, and
    log-probabilities are 0 after it.
    """
    return scores[:, None] * last - kl_coef * (logprobs - ref_logprobs)


def discounted_sum(x: Tensor, discount: Tensor) -> Tensor:
    """S_t = x_t + discount_t·S_{t+1}, backwards in time; all tensors (T, N)."""
    sums = torch.zeros_like(x)
    total = 0.0
    for t in reversed(range(len(x))):
        total = x[t] + discount[t] * total
        sums[t] = total
    return sums


def compute_gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, done: Tensor, gamma: float, lam: float
) -> Tensor:
    """Generalised advantages (GAE Eq. 16, PPO Eq. 11-12): A_t = Σ_l (γλ)^l·δ_{t+l} until `done`; all (T, N)."""
    deltas = rewards + gamma * next_values * (1 - terminated) - values  # δ_t = r_t + γ·V(s_{t+1}) - V(s_t)
    return discounted_sum(deltas, gamma * lam * (1 - done))


def policy_loss(log_ratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """Clipped surrogate per sample (PPO Eq. 7, negated): -min(r·A, clip(r, 1 - ε, 1 + ε)·A), r = π/π_old."""
    ratio = log_ratio.exp()  # PPO Eq. 6
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return -torch.min(ratio * advantages, clipped_ratio * advantages)  # PPO Eq. 7


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_coef: float) -> Tensor:
    """Half the squared error of V (PPO Eq. 9), or that of V clipped to V_old ± ε where it is larger."""
    clipped_values = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
    return 0.5 * torch.max((values - returns) ** 2, (clipped_values - returns) ** 2)


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


def add_adapters(model: nn.Module, rank: int) -> None:
    """Put LoRA adapters into all linear layers of a model, and train them alone."""
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model.add_adapter(config)


def save_trained_only(accelerator: Accelerator) -> None:
    """Keep the weights that are not trained out of checkpoints."""

    def drop_frozen(models: list[nn.Module], states: list[dict[str, Tensor]], folder: str) -> None:
        for model, state in zip(models, states):
            for name, parameter in model.named_parameters(remove_duplicate=False):
                if not parameter.requires_grad:
                    state.pop(name, None)

    accelerator.register_save_state_pre_hook(drop_frozen)


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


@torch.no_grad()
def sample(model: nn.Module, prompts: list[list[int]], uniform: Tensor) -> list[list[int]]:
    """Responses to prompts, drawn by numbers `uniform` (b, R) in [0, 1), each up to its first stop token."""
    # Padding, a token of the prompts, goes to the left, so that all prompts end in one column.
    rows = [torch.tensor(prompt, device=uniform.device) for prompt in prompts]
    visible = [torch.ones_like(row) for row in rows]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=prompts[0][0], padding_side="left")
    visible = nn.utils.rnn.pad_sequence(visible, batch_first=True, padding_side="left")  # (b, width)
    width = ids.shape[1]
    R = uniform.shape[1]

    def draw(ids: Tensor, logits: Tensor) -> Tensor:
        """Logits that allow one token: the first whose cumulative probability exceeds the uniform number."""
        cdf = logits.double().softmax(-1).cumsum(-1)
        target = uniform[:, ids.shape[1] - width, None] * cdf[:, -1:]
        token = torch.searchsorted(cdf, target, right=True)
        return torch.full_like(logits, -torch.inf).scatter(1, token, 0.0)

    is_parallel = torch.distributed.is_initialized()  # then all processes go on until the last has ended
    ids = model.generate(
        ids, attention_mask=visible, logits_processor=[draw], max_new_tokens=R, synced_gpus=is_parallel
    )
    responses = []
    for tokens in ids[:, width:].tolist():
        response = []
        for token in tokens:
            response.append(token)
            if token in model.generation_config.eos_token_id:
                break
        responses.append(response)
    return responses


@torch.no_grad()
def samples_as_trained(model: nn.Module) -> bool:
    """Whether generation, with its cache and a padded prompt, has the logits of one forward pass over all tokens."""
    ids = torch.tensor([[1, 1, 1, 1], [1, 2, 3, 4]])
    visible = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1]])
    output = model.generate(
        ids,
        attention_mask=visible,
        min_new_tokens=8,
        max_new_tokens=8,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack(output.logits)[:, 0]  # (8, V)
    expected = model(output.sequences[:1, 3:-1], use_cache=False).logits[0]
    return (logits - expected).abs().max() < 1e-3 * expected.std()


def load_reward_model(name: str, max_length: int, policy: nn.Module, tokenizer: Any) -> nn.Module:
    """Reward model of a hub id or folder, which has to read the policy's tokens."""
    if name.endswith(".py"):
        raise SystemExit(f"--reward-model {name} names no function: write {name}:my_function")
    loader = transformers.AutoModelForSequenceClassification
    reward_model, reward_tokenizer = load_model(loader, name, max_length)
    if reward_model.config.num_labels != 1:
        raise SystemExit(f"--reward-model {name} gives {reward_model.config.num_labels} scores and not one")
    if not tokenizer.get_vocab().items() <= reward_tokenizer.get_vocab().items():
        raise SystemExit(f"--reward-model {name} has other tokens than --model: train it from --model")
    if policy.get_input_embeddings().num_embeddings > reward_model.get_input_embeddings().num_embeddings:
        raise SystemExit(f"--reward-model {name} has fewer embeddings than --model: train it from --model")
    if reward_tokenizer.eos_token != tokenizer.eos_token:
        raise SystemExit(f"--reward-model {name} ends texts in {reward_tokenizer.eos_token}, not {tokenizer.eos_token}")
    if reward_tokenizer.chat_template not in (None, tokenizer.chat_template):
        raise SystemExit(f"--reward-model {name} has another chat template than --model: train it from --model")
    return reward_model


def precise_head(head: nn.Linear, hidden: Tensor) -> Tensor:
    """Output of a linear layer in float32, whatever the model computes in: bfloat16 would round a score to 8 bits."""
    with torch.autocast(hidden.device.type, enabled=False):
        return nn.functional.linear(hidden.float(), head.weight.float())


class TokenScores(nn.Module):
    """The head of a reward model on every token, for a forward pass that accelerate can wrap."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._no_split_modules = model._no_split_modules  # the layers that FSDP2 shards one by one

    def forward(self, ids: Tensor) -> Tensor:
        """Score of each prefix of token ids (b, L): (b, L), in float32."""
        hidden = self.model.base_model(ids, use_cache=False).last_hidden_state  # (b, L, d)
        return precise_head(self.model.score, hidden).squeeze(-1)


def rewards(model: nn.Module, rows: list[Any], device: torch.device) -> Tensor:
    """r(x, y) of rows [prompt, response], (b,), read at the last token."""
    ids = [torch.tensor(prompt + response) for prompt, response in rows]
    last = [len(row) - 1 for row in ids]
    ids = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)  # (b, L)
    return model(ids)[torch.arange(len(rows)), last]


def response_values(critic: nn.Module, rows: list[Any], R: int, device: torch.device) -> Tensor:
    """V(x, y_<t) of rows [prompt, response], (b, R), from each response's first token; 0 behind its end."""
    ids = [torch.tensor(prompt + response) for prompt, response in rows]
    ids = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)  # (b, L)
    mask = [torch.tensor([False] * len(prompt) + [True] * len(response)) for prompt, response in rows]
    mask = nn.utils.rnn.pad_sequence(mask, batch_first=True).to(device)
    return response_columns(critic(ids[:, :-1]), mask[:, 1:], R)  # the value before a token stands at the one before it


def prepare_frozen(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """A model that is not trained, on the device, or sharded as FSDP2 shards the policy."""
    model.requires_grad_(False)
    if accelerator.is_fsdp2:
        return fsdp2_prepare_model(accelerator, model)
    return model.to(accelerator.device)


def load_reward_function(name: str) -> Callable:
    """The function that file.py:function names; the file is imported as a module of its folder."""
    file, _, function = name.rpartition(":")
    path = Path(file).resolve()
    if not path.exists():
        raise SystemExit(f"--reward-model {name}: there is no file {path}")
    sys.path.append(str(path.parent))
    module = importlib.import_module(path.stem)
    if Path(str(module.__spec__.origin)).resolve() != path:  # a module that is built into Python has no file
        raise SystemExit(f"--reward-model {name}: {path.stem} is the name of another module; rename the file")
    if not hasattr(module, function):
        raise SystemExit(f"--reward-model {name}: the file has no function {function}")
    return getattr(module, function)


def function_rewards(function: Callable, name: str, rows: list[dict[str, Any]], texts: list[str]) -> list[float]:
    """function(prompts=…, completions=…, **other columns), as in TRL; completions of chats are lists of messages."""
    rows = [copy.deepcopy(row) for row in rows]  # a function may change what it gets
    prompts = [row["prompt"] for row in rows]
    if isinstance(prompts[0], list):
        texts = [[{"role": "assistant", "content": text}] for text in texts]
    columns = {}
    for column in rows[0].keys() - {"prompt", "prompts", "completions"}:
        columns[column] = [row[column] for row in rows]
    try:
        values = [float(value) for value in function(prompts=prompts, completions=texts, **columns)]
    except Exception as error:
        error.add_note(f"raised by --reward-model {name} for {len(prompts)} prompts, the first of them {prompts[0]!r}")
        raise
    if len(values) != len(prompts):
        raise SystemExit(f"\n--reward-model {name} gave {len(values)} values for {len(prompts)} completions")
    for prompt, value in zip(prompts, values):
        if not math.isfinite(value):
            raise SystemExit(f"\n--reward-model {name} gave {value} for an answer to {prompt!r}")
    return values


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


def encode_prompt(row: dict[str, Any], tokenizer: Any, render: Callable, stops: list[int], place: str) -> list[int]:
    """Token ids of a row's `prompt`, up to the answer. A text becomes a chat if another column holds chats."""
    prompt = read_value(row["prompt"], f"{place}, column prompt")
    if isinstance(prompt, str) and not prompt.strip():
        return []
    for column in ("messages", "chosen", "completion"):
        chat = row.get(column)
        if isinstance(prompt, str) and isinstance(chat, list) and chat:
            prompt = prompt_turns(prompt, read_value(chat, f"{place}, column {column}"))
    if isinstance(prompt, list):
        is_begun = prompt[-1]["role"] == "assistant"  # an answer that has begun goes on
        text = render(prompt, add_generation_prompt=not is_begun, continue_final_message=is_begun)
        check_rendered(prompt, [], text)
        return tokenizer(text, add_special_tokens=False).input_ids
    has_bos = prompt.startswith(tokenizer.bos_token or "<no BOS>")
    ids = tokenizer(prompt, add_special_tokens=not has_bos).input_ids
    while ids and ids[-1] in stops:  # some tokenizers end every text with EOS
        ids.pop()
    return ids


def load_prompts(
    name: str, split: str, tokenizer: Any, max_length: int, config: str = "", template_kwargs: str = "{}"
) -> list[tuple[list[int], dict[str, Any]]]:
    """Token ids of the prompts of a split, each with its row of the data set.

    Says how many are left out and how many hold unknown tokens.
    """
    import datasets

    path, files = locate_data(name)
    data = datasets.load_dataset(path, config or None, data_files=files, split=split)
    if "prompt" not in data.column_names:
        raise SystemExit(f"--dataset {name} has the columns {data.column_names}: rename one of them to prompt")
    refuse_unread(data, name, ["prompt"])
    render = chat_renderer(tokenizer, template_kwargs)
    stops = stop_tokens(tokenizer, render)
    unknown = tokenizer.unk_token_id if tokenizer.unk_token_id not in stops else None
    kept = []
    counts = Counter()
    for number, row in enumerate(data.to_list(), 1):
        ids = encode_prompt(row, tokenizer, render, stops, f"--dataset {name}, split {split}, row {number}")
        if not tokenizer.decode(ids).strip():
            counts["are left out: they are empty"] += 1
        elif len(ids) > max_length:
            counts["are left out: with --response-length they are longer than --max-length"] += 1
        else:
            kept.append((ids, row))
            counts["hold words that --model does not know"] += unknown in ids
    for label, num_rows in counts.items():
        if num_rows:
            say(f"split {split}: {num_rows} of {len(data)} prompts {label}")
    if counts["hold words that --model does not know"] > len(kept) / 2:
        raise SystemExit(
            f"--dataset {name}: most prompts hold {tokenizer.unk_token}, a word that --model does not know"
        )
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


def check_rollout(args: Args, processes: int, num_prompts: int) -> None:
    """Stop the run unless there are prompts for a rollout, and rows of each micro-batch for each process."""
    if num_prompts < args.batch_size:
        raise SystemExit(f"--dataset has {num_prompts} prompts, too few for --batch-size {args.batch_size}")
    if min(args.batch_size // args.num_minibatches, args.micro_batch_size) < processes:
        raise SystemExit(
            f"minibatches and --micro-batch-size must have at least {processes} rows, one for each process"
        )


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


def save_model(model: nn.Module, tokenizer: Any, weights: dict[str, Tensor], args: Args, run_dir: Path) -> None:
    """Write the whole model to model/, and adapters also to adapter/, as peft does."""
    for name in model.all_tied_weights_keys:
        weights.pop(name, None)  # a model has them once; weights gathered from several processes have them twice
    if args.lora_rank:
        from peft import PeftModel

        dtype = model.config.dtype
        model.save_pretrained(run_dir / "adapter", state_dict=weights)
        tokenizer.save_pretrained(run_dir / "adapter")
        base, _ = load_model(transformers.AutoModelForCausalLM, args.model, args.max_length)
        merged = PeftModel.from_pretrained(base, run_dir / "adapter").merge_and_unload()
        merged.generation_config = model.generation_config
        merged.to(dtype).save_pretrained(run_dir / "model")
        if transformers.utils.find_adapter_config_file(args.model):
            shutil.rmtree(run_dir / "adapter")  # without --model's own adapter it is of no use
    else:
        model.save_pretrained(run_dir / "model", state_dict=weights)
    tokenizer.save_pretrained(run_dir / "model")


def main(args: Args, saved: dict[str, Any] | None = None) -> None:
    # Processes and random numbers. Each process takes its own rows of a micro-batch.
    accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision="bf16" if args.bf16 else "no")
    keep_float32(accelerator)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads take longer to start than a row takes
    device = accelerator.device
    processes = accelerator.num_processes
    accelerator.print(f"{processes} process(es) on {device.type}")
    own = slice(accelerator.process_index, None, processes)
    torch.manual_seed(args.seed)
    B = args.batch_size
    R = args.response_length

    # The policy. Sampling takes only the stop tokens of its generation config; other settings would change π.
    policy, tokenizer = load_model(transformers.AutoModelForCausalLM, args.model, args.max_length)
    if policy.num_parameters() < 10e6:
        torch.set_num_threads(1)  # more only lose time
    render = chat_renderer(tokenizer, args.chat_template_kwargs)
    set_stop_tokens(policy, stop_tokens(tokenizer, render))
    generation_config = policy.generation_config
    stops = generation_config.eos_token_id
    policy.generation_config = transformers.GenerationConfig(eos_token_id=stops, pad_token_id=stops[0])
    if not samples_as_trained(policy):
        raise SystemExit(f"--model {args.model} generates from other probabilities than a forward pass gives")

    # The score, a reward model or a function, and the critic, which starts from the one or from the policy.
    reward_model = None
    reward_function = None
    if ".py:" in args.reward_model:
        reward_function = load_reward_function(args.reward_model)
        loader = transformers.AutoModelForSequenceClassification
        value_model, _ = load_model(loader, args.model, args.max_length, num_labels=1)
    else:
        reward_model = load_reward_model(args.reward_model, args.max_length, policy, tokenizer)
        value_model = copy.deepcopy(reward_model)
        reward_model = prepare_frozen(accelerator, TokenScores(reward_model))
    nn.init.zeros_(value_model.score.weight)

    # The prompts.
    settings = (tokenizer, args.max_length - R, args.dataset_config, args.chat_template_kwargs)
    prompts = load_prompts(args.dataset, args.train_split, *settings)
    check_rollout(args, processes, len(prompts))
    accelerator.print("first prompt:", tokenizer.decode(prompts[0][0]))
    if reward_function:
        accelerator.print(f"--reward-model {args.reward_model} gets, of its row: {prompts[0][1]!r:.400}")

    # The reference, a copy of the policy; with LoRA it is the policy without its adapters.
    if args.gradient_checkpointing:
        policy.activation_checkpointing_enable()
        value_model.activation_checkpointing_enable()
    if saved and saved["args"]["lora_rank"] != args.lora_rank:
        raise SystemExit("--lora-rank cannot change when a run is resumed")
    reference = policy
    if args.lora_rank:
        add_adapters(policy, args.lora_rank)
        add_adapters(value_model.base_model, args.lora_rank)  # the head lies outside it, and is trained whole
        save_trained_only(accelerator)
    else:
        reference = prepare_frozen(accelerator, copy.deepcopy(policy))

    # The optimisers.
    if not args.learning_rate:
        pretrained_rate = 3e-5 if args.lora_rank else 3e-6
        args.learning_rate = 5e-4 if args.model == Args.model else pretrained_rate
    critic = TokenScores(value_model)
    policy_optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0, fused=True)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), weight_decay=0.0, fused=True)
    model, policy_optimizer = accelerator.prepare(policy, policy_optimizer)
    critic, critic_optimizer = accelerator.prepare(critic, critic_optimizer)
    parameters = [*model.parameters(), *critic.parameters()]
    step = saved["step"] if saved else 0
    total_steps = args.total_episodes // B

    @torch.no_grad()
    def roll_out(batch_prompts: list[Any], noise: torch.Generator) -> tuple[list[Any], Tensor, Tensor, Tensor, Tensor]:
        """Rows [prompt, response], log π, log π_ref and V of their tokens, (B, R) each, and their scores, (B,)."""
        # Each process answers its share of the prompts.
        prompt_ids = [ids for ids, row in batch_prompts]
        indices = list(range(len(batch_prompts)))
        uniform = torch.rand(len(batch_prompts), R, generator=noise, dtype=torch.float64)
        with accelerator.autocast():
            responses = sample(policy, prompt_ids[own], uniform[own].to(device))
        answered = sorted(gather_object(list(zip(indices[own], responses))))  # in the order of the prompts again
        rows = [[prompt_ids[i], response] for i, response in answered]

        # And computes the log-probabilities, values and scores of its share of the rows.
        logprobs = torch.zeros(len(rows), R, device=device)
        ref_logprobs = torch.zeros(len(rows), R, device=device)
        values = torch.zeros(len(rows), R, device=device)
        scores = torch.zeros(len(rows), device=device)
        for micro_batch in micro_batches(rows, indices, args.micro_batch_size, processes):
            mine = micro_batch[own]
            my_rows = [rows[i] for i in mine]
            with accelerator.autocast():
                logprobs[mine] = response_logprobs(model, my_rows, R, device)
                values[mine] = response_values(critic, my_rows, R, device)
                if args.lora_rank:
                    policy.disable_adapters()
                ref_logprobs[mine] = response_logprobs(reference, my_rows, R, device)
                if args.lora_rank:
                    policy.enable_adapters()
                if reward_model:
                    scores[mine] = rewards(reward_model, my_rows, device)
        if reward_function and accelerator.is_main_process:
            texts = []
            for prompt, response in rows:
                response = response[:-1] if response[-1] in stops else response
                texts.append(tokenizer.decode(response, skip_special_tokens=True))
            given = function_rewards(reward_function, args.reward_model, [row for ids, row in batch_prompts], texts)
            scores = torch.tensor(given, device=device)
        tensors = accelerator.reduce((logprobs, ref_logprobs, values, scores))  # 0 in the shares of other processes
        return rows, *tensors

    # The run directory, and what the loop keeps.
    if saved:
        restore(accelerator, saved["folder"], strict=not args.lora_rank)
        accelerator.print(f"the learning rate falls to 0 at update {total_steps}")
    run_dir = start_run(args, accelerator, saved, step)
    caught = catch_signals()
    stop = False
    first_step = step
    first_time = time.perf_counter()
    bar = tqdm(total=total_steps, initial=step, unit="update", disable=not accelerator.is_main_process)
    while True:
        # ===== evaluate =====
        model.eval()  # gradient checkpointing, which works in training only, would sample without a cache
        critic.eval()
        if step >= total_steps or step % (args.save_every or total_steps) == 0:
            batch_prompts = prompts[: max(4, processes)]
            rows, _, _, _, scores = roll_out(batch_prompts, torch.Generator().manual_seed(args.seed))
            texts = []
            for (prompt, response), score in zip(rows, scores):
                texts.append(f"{tokenizer.decode(prompt + response)} ({score:.2f})")
            accelerator.log({"samples": "\n\n".join(texts)}, step)
            accelerator.print(f"\nupdate {step}:", *texts[:2], sep="\n")
        if stop or step >= total_steps:
            break

        # ===== collect =====
        noise = torch.Generator().manual_seed(1_000_003 * args.seed + step)  # a resumed run needs no state of it
        batch_prompts = [prompts[i] for i in batch_at(len(prompts), step, B, args.seed)]
        rows, old_logprobs, ref_logprobs, old_values, scores = roll_out(batch_prompts, noise)

        # ===== compute targets =====
        lengths = torch.tensor([[len(response)] for prompt, response in rows], device=device)  # (B, 1)
        mask = torch.arange(R, device=device) < lengths  # (B, R): tokens of responses, stop token included
        last = (torch.arange(R, device=device) == lengths - 1).float()  # (B, R)
        finished = torch.tensor([response[-1] in stops for prompt, response in rows], device=device).float()
        scores = scores - args.missing_eos_penalty * (1 - finished)
        token_rewards = kl_penalised_rewards(scores, old_logprobs, ref_logprobs, last, args.kl_coef)
        next_values = nn.functional.pad(old_values[:, 1:], (0, 1))
        # Time goes first in GAE, and a response ends for good with its last token.
        advantages = compute_gae(
            token_rewards.T, old_values.T, next_values.T, terminated=last.T, done=last.T, gamma=1.0, lam=args.gae_lambda
        ).T
        returns = advantages + old_values
        mean = advantages[mask].mean()
        std = advantages[mask].std(correction=0)
        advantages = (advantages - mean) / (std + 1e-8)

        # ===== update =====
        model.train()
        critic.train()
        learning_rate = args.learning_rate * (1 - step / total_steps)
        policy_optimizer.param_groups[0]["lr"] = learning_rate
        critic_optimizer.param_groups[0]["lr"] = learning_rate
        metrics = defaultdict(list)
        for _ in range(args.num_ppo_epochs):
            for minibatch in torch.randperm(B, generator=noise).chunk(args.num_minibatches):
                num_tokens = mask[minibatch].sum() / processes  # accelerate takes the mean over processes
                policy_optimizer.zero_grad()
                critic_optimizer.zero_grad()
                for micro_batch in micro_batches(rows, minibatch.tolist(), args.micro_batch_size, processes):
                    mine = micro_batch[own]
                    my_rows = [rows[i] for i in mine]
                    log_ratio = response_logprobs(model, my_rows, R, device) - old_logprobs[mine]  # (b, R)
                    pg_losses = policy_loss(log_ratio, advantages[mine], args.clip_coef) * mask[mine]
                    v_losses = value_loss(
                        response_values(critic, my_rows, R, device), old_values[mine], returns[mine], args.clip_coef
                    )
                    v_losses = v_losses * mask[mine]
                    loss = (pg_losses + VF_COEF * v_losses).sum() / num_tokens  # PPO Eq. 9, negated
                    accelerator.backward(loss)
                    log_ratio = log_ratio.detach()
                    ratio = log_ratio.exp()
                    is_clipped = (ratio - 1).abs() > args.clip_coef
                    metrics["loss/policy"].append(pg_losses.detach().sum() / num_tokens)
                    metrics["loss/value"].append(v_losses.detach().sum() / num_tokens)
                    metrics["policy/approxkl"].append((ratio - 1 - log_ratio).sum() / num_tokens)
                    metrics["policy/clipfrac"].append(is_clipped.sum() / num_tokens)
                    metrics["val/ratio"].append((ratio * mask[mine]).sum() / num_tokens)
                norm = accelerator.clip_grad_norm_(parameters, 1.0)
                if accelerator.is_fsdp2:
                    norm = norm.full_tensor()
                metrics["grad_norm"].append(norm)
                policy_optimizer.step()
                critic_optimizer.step()
        step += 1

        # ===== log and save =====
        sums = accelerator.reduce({name: torch.stack(values).sum() for name, values in metrics.items()}, "mean")
        means = {name: total.item() / (args.num_ppo_epochs * args.num_minibatches) for name, total in sums.items()}
        if not math.isfinite(means["loss/policy"] + means["loss/value"] + means["grad_norm"]):
            raise SystemExit(f"\nthe loss became nan or inf before update {step}; {run_dir}/checkpoint is older")
        means["objective/kl"] = (old_logprobs - ref_logprobs).sum(1).mean().item()
        means["objective/scores"] = scores.mean().item()
        means["objective/rlhf_reward"] = means["objective/scores"] - args.kl_coef * means["objective/kl"]
        means["objective/entropy"] = -old_logprobs.sum(1).mean().item()
        means["val/num_eos_tokens"] = finished.mean().item()
        means["lr"] = learning_rate
        means["episodes_per_second"] = (step - first_step) * B / (time.perf_counter() - first_time)
        accelerator.log(means, step)
        unfinished = 1 - means["val/num_eos_tokens"]
        bar.set_postfix_str(
            f"score {means['objective/scores']:.2f}, KL {means['objective/kl']:.2f}, unfinished {unfinished:.0%}",
            refresh=False,
        )
        if step == 1 and unfinished > 0.9:
            accelerator.print(
                f"\n{unfinished:.0%} of the responses have no end: --response-length {R} may be too short"
            )
        if caught:
            accelerator.set_trigger()
        stop = accelerator.check_trigger()  # whether any process got a signal
        if stop or step == total_steps or (args.save_every and step % args.save_every == 0):
            save_checkpoint(accelerator, run_dir, args, step)
        bar.update(1)

    # The model, in the precision it came in.
    bar.close()
    policy.generation_config = generation_config
    if not args.lora_rank:
        policy.to(policy.config.dtype)
    weights = accelerator.get_state_dict(policy)
    if step >= total_steps and accelerator.is_main_process:
        save_model(policy, tokenizer, weights, args, run_dir)
    accelerator.wait_for_everyone()  # torch may abort a process that exits right after it sent or received weights
    model = critic = None  # wrapped models that outlive the group of processes can make torch wait for ever
    accelerator.free_memory()
    accelerator.end_training()
    if step < total_steps:
        raise SystemExit(f"stopped at update {step}; to go on: the same command with --resume {str(run_dir)!r}")


if __name__ == "__main__":
    main(*parse_args())
