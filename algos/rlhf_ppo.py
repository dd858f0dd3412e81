# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["accelerate~=1.15.0", "datasets~=5.2.0", "peft~=0.21.2", "tensorboard~=2.21.0", "torch~=2.13.0",
# "tqdm~=4.70.1", "transformers~=5.23.0", "tyro~=1.0.17"]
# ///
"""RLHF by PPO: raise a reward model's score of a language model's own texts, and stay near the model it started from.

The last of RLHF's three steps. The policy π answers prompts; each response y earns r(x, y) - β·log π(y|x)/π_ref(y|x),
and PPO raises its expectation. The best policy is known in closed form, π* ∝ π_ref·exp(r/β): β says how far to trust
the score. Four models take part: the policy; the critic, which starts from the reward model; the reward model and the
reference π_ref, a copy of the policy at the start, which are frozen.
Papers: Ziegler et al. 2019, arXiv 1909.08593; Ouyang et al. 2022, arXiv 2203.02155 (InstructGPT); Schulman et al. 2017,
arXiv 1707.06347 (PPO); Schulman et al. 2015, arXiv 1506.02438 (GAE).

    python algos/rlhf_ppo.py  # the small language world: 0.91 of the possible gain
    accelerate launch algos/rlhf_ppo.py --model my-sft-model --reward-model my-reward-model --dataset trl-lib/tldr \\
        --kl-coef 0.05 --total-episodes 100000 --batch-size 512 --micro-batch-size 16 --bf16 --gradient-checkpointing

Data: a column `prompt` of texts or lists of {"role", "content"} messages. A reward in Python is function(prompts,
completions, **other columns) -> list of numbers, as in TRL; the critic then starts from the policy. Letters: B
responses of a rollout, b of a micro-batch, R tokens of a response, L of a row (prompt and response), V words, n
response tokens of a micro-batch. A state is a prompt with the response so far, an action the next token.
Logged after each update: objective/kl and objective/entropy, sums over a response of log π/π_ref and -log π;
objective/scores, r(x, y) less the penalty; policy/approxkl, E[(r - 1) - log r], how far the update went.

Differs from the papers:
 1. Policy and critic are two models, as in InstructGPT; one optimiser, whose learning rate falls linearly to 0.
 2. No dropout, so that π_old is π before the first step. β is constant: no controller (Ziegler 2.2).
 3. A response without a stop token is scored as it is, less a penalty; Ziegler gives a fixed reward of -1.
 4. Advantages are normalised over the rollout, the gradient's norm is clipped to 1, values to ± clip-coef.
 5. No pretraining gradients (InstructGPT Eq. 2 with γ = 0).
"""

import argparse
import copy
import functools
import json
import math
import os
import re
import runpy
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
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object
from torch import Tensor, nn
from tqdm import tqdm

SCRIPT = Path(__file__).stem
ASSETS = Path(__file__).resolve().parent.parent / "benchmark/world/assets"  # the small language world
VF_COEF = 0.1  # c1: weight of the value loss (PPO Eq. 9)


@dataclass
class Args:
    seed: int = 1  # of the order of prompts, of sampling and of minibatches
    device: Literal["auto", "cpu"] = "auto"  # auto takes GPUs where there are some
    run_dir: str = ""  # where the run is written; by default runs/<task>__<script>__<seed>__<time>
    resume: str = ""  # run directory or checkpoint to continue, with its flags where none are given
    save_every: int = 20  # updates between checkpoints, and samples; 0: only at the end
    track: bool = False  # mirror the logs to Weights & Biases
    model: str = str(ASSETS / "sft")  # hub id, folder or peft adapter of the policy to start from, which is π_ref
    reward_model: str = str(ASSETS / "reward")  # hub id or folder of a reward model; or file.py:function
    dataset: str = str(ASSETS / "prompts")  # hub id, folder or jsonl, json, csv or parquet file
    train_split: str = "train"  # split to take prompts from; slices such as train[:95%] work
    gold: str = ""  # Python file with gold_reward(prompt, response, finished), the true reward, to log beside the score
    total_episodes: int = 4096  # responses to sample in all
    max_length: int = 512  # longest row in tokens, prompt and response: longer prompts are left out
    learning_rate: float = 0  # at the start; 0: 5e-4 on the small world's model, 3e-6 on others, 3e-5 there with LoRA
    batch_size: int = 128  # B: responses of a rollout, over all processes
    num_minibatches: int = 4  # minibatches per epoch, one step each
    num_ppo_epochs: int = 4  # passes over the rollout per update (PPO Algorithm 1's K)
    micro_batch_size: int = 16  # b: rows of a forward pass, over all processes: less memory, same gradient
    bf16: bool = False  # compute in bfloat16; weights and log-probabilities stay float32
    gradient_checkpointing: bool = False  # compute activations twice: less memory, about a third slower
    lora_rank: int = 0  # if not 0, train low-rank adapters of all linear layers, with α = 2·rank, and save these
    merge_lora: bool = False  # save the whole model, with the adapters merged
    response_length: int = 48  # R: longest response in tokens
    kl_coef: float = 0.5  # β: weight of the KL penalty (Ziegler Eq. 2), in units of the score per nat
    gae_lambda: float = 0.95  # λ of generalised advantage estimation (GAE Eq. 16); γ is 1
    clip_coef: float = 0.2  # ε: clip range of the ratio (PPO Eq. 7) and of the value's change
    missing_eos_penalty: float = 1.0  # taken off the score of a response without a stop token

    def __post_init__(self) -> None:
        if min(self.num_minibatches, self.num_ppo_epochs, self.response_length, self.micro_batch_size) < 1:
            raise ValueError("num-minibatches, num-ppo-epochs, response-length, micro-batch-size must be at least 1")
        if min(self.save_every, self.learning_rate, self.lora_rank, self.kl_coef, self.missing_eos_penalty) < 0:
            raise ValueError("save-every, learning-rate, lora-rank, kl-coef, missing-eos-penalty must be at least 0")
        if self.batch_size % self.num_minibatches or self.total_episodes < self.batch_size:
            raise ValueError("batch-size must be a multiple of num-minibatches, total-episodes more")
        if self.max_length <= self.response_length or not 0 <= self.gae_lambda <= 1 or self.clip_coef <= 0:
            raise ValueError("max-length must be above response-length, gae-lambda between 0 and 1, clip-coef above 0")


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


class Agent(nn.Module):
    """Policy and critic, for a forward pass that accelerate can wrap."""

    def __init__(self, policy: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.policy, self.critic = policy, critic

    def forward(self, rows: list[Any]) -> tuple[Tensor, Tensor]:
        """log π(y_t | x, y_<t) and V(x, y_<t) of the response tokens of rows [prompt, response, …], joined: (n,)."""
        device = self.critic.score.weight.device
        logprobs, mask = completion_logprobs(self.policy, rows, device)
        L = max(len(x) + len(y) for x, y, *_ in rows)
        ids = torch.tensor([x + y + y[-1:] * (L - len(x) - len(y)) for x, y, *_ in rows], device=device)  # (b, L)
        hidden = self.critic.base_model(ids[:, :-1], use_cache=False).last_hidden_state[:, -mask.shape[1] :]
        with torch.autocast(device.type, enabled=False):  # bfloat16 would round a value to 8 bits
            return logprobs[mask], self.critic.score(hidden[mask].float()).squeeze(-1)


@torch.inference_mode()
def sample(model: nn.Module, prompts: list[list[int]], uniform: Tensor) -> list[list[int]]:
    """Responses to prompts, drawn by uniform (b, R) in [0, 1); of the generation_config only stops and padding fit."""
    width, R = max(map(len, prompts)), uniform.shape[1]  # padding goes to the left, so that all end in one column
    ids = torch.tensor([ids[:1] * (width - len(ids)) + ids for ids in prompts], device=uniform.device)
    visible = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=uniform.device)

    def draw(ids: Tensor, logits: Tensor) -> Tensor:
        cdf = logits.double().softmax(-1).cumsum(-1)
        token = torch.searchsorted(cdf, uniform[:, ids.shape[1] - width, None] * cdf[:, -1:], right=True)
        return torch.full_like(logits, -torch.inf).scatter(1, token, 0.0)

    rows = model.generate(ids, attention_mask=visible, logits_processor=[draw], max_new_tokens=R)[:, width:].tolist()
    stops = model.generation_config.eos_token_id
    return [row[: next((t + 1 for t, token in enumerate(row) if token in stops), R)] for row in rows]


# --- algorithm ---


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
    sums = []
    total = torch.zeros_like(x[0])
    for x_t, discount_t in zip(reversed(x.unbind()), reversed(discount.unbind())):
        total = x_t + discount_t * total
        sums.append(total)
    return torch.stack(sums[::-1])


def compute_gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, done: Tensor, gamma: float, lam: float
) -> Tensor:
    """Generalised advantage estimation (GAE Eq. 16, PPO Eq. 11-12): A_t = Σ_l (γλ)^l·δ_{t+l}, to `done`; all (T, N)."""
    deltas = rewards + gamma * next_values * (1 - terminated) - values  # δ_t = r_t + γ·V(s_{t+1}) - V(s_t)
    return discounted_sum(deltas, gamma * lam * (1 - done))


def policy_loss(log_ratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """Clipped surrogate per sample (PPO Eq. 7, negated): -min(r·A, clip(r, 1 - ε, 1 + ε)·A), r = π/π_old."""
    ratio = log_ratio.exp()  # PPO Eq. 6
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return -torch.min(ratio * advantages, clipped_ratio * advantages)  # PPO Eq. 7


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_coef: float) -> Tensor:
    """Half squared error per sample (PPO Eq. 9's L^VF), the worse of V and V clipped to V_old ± ε; ε = inf: no clip."""
    losses = (values - returns) ** 2
    if clip_coef < torch.inf:
        clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
        losses = torch.max(losses, (clipped - returns) ** 2)
    return 0.5 * losses


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


def load_prompts(name: str, split: str, tokenizer: Any, max_length: int) -> list[tuple[list[int], dict[str, Any]]]:
    """Rows of a split, each behind the token ids of its `prompt`, text or messages, to where an answer begins."""
    import datasets

    kind = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}.get(Path(name).suffix)
    try:
        data = datasets.load_dataset(kind or name, data_files=name if kind else None, split=split)
    except Exception as fault:  # of the file, as a rule, of which the cause tells more than the exception
        raise SystemExit(f"--dataset {name}, split {split}: {fault.__cause__ or repr(fault)}") from fault
    if "prompt" not in data.column_names:
        raise SystemExit(f"--dataset {name} has the columns {data.column_names}: rename one of them to prompt")
    rows, (start, eos, _) = [], text_ends(tokenizer)
    for number, row in enumerate(data.to_list(), 1):
        text = row["prompt"].removesuffix(eos) if isinstance(row["prompt"], str) else row["prompt"]
        if isinstance(text, str) and list in map(type, map(row.get, ("completion", "chosen"))):  # as dpo.py reads it
            text = [{"role": "user", "content": text}]
        is_chat = text and type(text) is list and all(type(x.get(k)) is str for x in text for k in ("role", "content"))
        if is_chat:  # an answer that has begun goes on
            go = "continue_final_message" if text[-1]["role"] == "assistant" else "add_generation_prompt"
            text = tokenizer.apply_chat_template(text, tokenize=False, **{go: True})
        if type(text) is not str or re.match(r"""\s*\[\s*{\s*['"](role|content|from|value)['"]""", text):
            raise SystemExit(f"--dataset {name}, {split}, row {number}: prompt {text!r:.40} is not text or messages")
        ids = tokenizer(text, add_special_tokens=False).input_ids if text.strip() else []
        rows.append((ids if is_chat or ids[:1] == start else start + ids, row))
    kept = [(ids, row) for ids, row in rows if len(start) < len(ids) <= max_length]
    if len(kept) < len(rows):
        print(f"split {split}: {len(rows) - len(kept)} of {len(rows)} prompts left out: empty, or no room to answer")
    return kept


def function_rewards(function: Any, rows: list[dict[str, Any]], texts: list[str]) -> list[float]:
    """function(prompts, completions, **other columns), as in TRL; stops the run unless it gives a number for each."""
    prompts = [row["prompt"] for row in rows]
    if isinstance(prompts[0], list):
        texts = [[{"role": "assistant", "content": text}] for text in texts]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    try:
        values = [float(value) for value in function(prompts, texts, **columns)]
    except Exception as fault:
        fault.add_note(f"raised by the reward function for {len(prompts)} prompts, the first of them {prompts[0]!r}")
        raise
    wrong = [prompt for prompt, value in zip(prompts, values) if not math.isfinite(value)]
    if wrong or len(values) != len(prompts):
        found = f"{len(values)} values for {len(prompts)} completions, {len(wrong)} of them nan or inf"
        raise SystemExit(f"\nthe reward function gave {found}; the first prompt is {(wrong or prompts)[0]!r}")
    return values


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
    args.learning_rate = args.learning_rate or (5e-4 if args.model == Args.model else 3e-5 if args.lora_rank else 3e-6)
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # parameters that get no gradient
    precision = "bf16" if args.bf16 else "no"
    accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision=precision, kwargs_handlers=[unused])
    device, processes = accelerator.device, accelerator.num_processes
    own = slice(accelerator.process_index, None, processes)  # of the rows of a micro-batch
    torch.manual_seed(args.seed)
    adapter = args.lora_rank and not args.merge_lora and transformers.utils.find_adapter_config_file(args.model)
    if adapter or saved and saved["args"]["lora_rank"] != args.lora_rank:
        raise SystemExit("--lora-rank cannot change when resuming, and on top of an adapter it needs --merge-lora")
    if accelerator.distributed_type in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise SystemExit("sampling needs whole models on each process: launch without FSDP, DeepSpeed or Megatron")
    B, R = args.batch_size, args.response_length
    policy, tokenizer = load_model(transformers.AutoModelForCausalLM, args.model, args.max_length)
    file, is_file, function = args.reward_model.partition(".py:")
    function = runpy.run_path(file + ".py")[function] if is_file else None
    trunk = args.model if function else args.reward_model  # of the critic
    head = {"num_labels": 1} if function else {}
    scorer, words = load_model(transformers.AutoModelForSequenceClassification, trunk, args.max_length, **head)
    sizes = [model.get_input_embeddings().num_embeddings for model in (policy, scorer)]
    same = words.chat_template in (None, tokenizer.chat_template) and text_ends(tokenizer) == text_ends(words)
    same = same and tokenizer.get_vocab().items() <= words.get_vocab().items()
    if not same or sizes[0] > sizes[1] or scorer.config.num_labels != 1:
        found = f"reads other texts than --model ({sizes[1]} embeddings, not {sizes[0]}) or gives several scores"
        raise SystemExit(f"--reward-model {args.reward_model} {found}: train one from --model with reward_model.py")
    prompts = load_prompts(args.dataset, args.train_split, tokenizer, args.max_length - R)
    if len(prompts) < B or min(B // args.num_minibatches, args.micro_batch_size) < processes:
        raise SystemExit(f"{len(prompts)} prompts fill no batch, or micro-batches lack rows for {processes} processes")
    gold_reward = runpy.run_path(args.gold)["gold_reward"] if args.gold else None
    generation, stops = policy.generation_config, tokenizer.convert_tokens_to_ids(text_ends(tokenizer)[1:])
    generation.validate(strict=True)  # as saving does
    policy.generation_config = transformers.GenerationConfig(eos_token_id=[1 << 30], pad_token_id=stops[0])
    uniform = torch.rand(2, 16, dtype=torch.float64)
    if sample(policy, [[1], [1, 2, 3, 4]], uniform)[0] != sample(policy, [[1]], uniform[:1])[0]:
        raise SystemExit(f"--model {args.model} samples otherwise beside a longer prompt: it takes no positions")
    eos = [generation.eos_token_id] if isinstance(generation.eos_token_id, int) else generation.eos_token_id or []
    generation.eos_token_id = policy.generation_config.eos_token_id = stops = list({*stops, *eos})
    torch.set_num_threads(1 if policy.num_parameters() < 10e6 else torch.get_num_threads())  # small ones lose by more
    critic, scorer = (scorer, None) if function else (copy.deepcopy(scorer), scorer.requires_grad_(False).to(device))
    nn.init.zeros_(critic.score.weight)
    if args.gradient_checkpointing:
        policy.activation_checkpointing_enable()
        critic.activation_checkpointing_enable()
    if args.lora_rank:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear")
        policy = get_peft_model(policy, copy.copy(lora))  # it writes down there which layers it found
        setattr(critic, critic.base_model_prefix, get_peft_model(critic.base_model, lora))
        hook = accelerator.register_save_state_pre_hook  # checkpoints hold what is trained only
        hook(lambda _, states, __: [w.pop(n) for w in states for n in [*w] if "lora_" not in n and ".score." not in n])
    reference = policy if args.lora_rank else copy.deepcopy(policy).requires_grad_(False).to(device)
    at_reference = policy.disable_adapter if args.lora_rank else torch.no_grad
    agent = Agent(policy, critic)
    trained = [parameter for parameter in agent.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0, fused=True)
    agent, optimizer = accelerator.prepare(agent, optimizer)
    step, total_steps = saved["step"] if saved else 0, args.total_episodes // B
    if saved:
        accelerator.load_state(saved["folder"], strict=not args.lora_rank)
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

    @torch.inference_mode()
    def roll_out(asked: list[Any], noise: torch.Generator) -> tuple[list[Any], Tensor, Tensor]:
        """Rows [prompt, response, [number]], log π, log π_ref and V of their tokens, (3, B, R), and scores, (B,)."""
        uniform = torch.rand(len(asked), R, generator=noise, dtype=torch.float64)[own].to(device)
        with accelerator.autocast():
            responses = sample(policy, [ids for ids, _ in asked[own]], uniform)
        responses = sorted(gather_object([*zip(range(len(asked))[own], responses)]))
        rows = [[ids, response, [i]] for (ids, _), (i, response) in zip(asked, responses)]
        tokens, scores = torch.zeros(3, len(rows), R, device=device), torch.zeros(len(rows), device=device)
        for part in micro_batches(rows, args.micro_batch_size):
            numbers = [i for *_, (i,) in part[own]]
            with accelerator.autocast():
                logprobs, values = agent(part[own])
                with at_reference():
                    ref, mask = completion_logprobs(reference, part[own], device)
            sizes = [len(response) for _, response, _ in part[own]]
            for i, *all_three in zip(numbers, *(x.split(sizes) for x in (logprobs, ref[mask], values))):
                tokens[:, i, : len(all_three[0])] = torch.stack(all_three)
            if not function:  # a score is read where its response ends; bfloat16 would round it to 8 bits
                ids = [torch.tensor(prompt + response, device=device) for prompt, response, _ in part[own]]
                with accelerator.autocast():
                    hidden = scorer.base_model(nn.utils.rnn.pad_sequence(ids, batch_first=True), use_cache=False)[0]
                scores[numbers] = scorer.score(hidden.float())[range(len(ids)), [len(row) - 1 for row in ids], 0]
        if function and accelerator.is_main_process:
            texts = [tokenizer.decode(y[: len(y) - (y[-1] in stops)], skip_special_tokens=True) for _, y, _ in rows]
            scores = torch.tensor(function_rewards(function, [row for _, row in asked], texts), device=device)
        return rows, *accelerator.reduce((tokens, scores))  # zeros but for each process's share

    caught, stop = [], False
    for number in (signal.SIGINT, signal.SIGTERM):  # after which the run is saved; a second one kills
        signal.signal(number, lambda number, _: caught.append(signal.signal(number, signal.SIG_DFL)))
    quiet = None if accelerator.is_main_process else Path(os.devnull).open("w")
    bar = tqdm(total=total_steps, initial=step, unit="update", file=quiet)
    while True:
        # ===== evaluate =====
        agent.eval()  # without gradient checkpointing, which samples without a cache
        if step % (args.save_every or total_steps) == 0 or step >= total_steps:
            asked = prompts[: max(4, processes)]
            rows, _, scores = roll_out(asked, torch.Generator().manual_seed(args.seed))
            texts = [f"{tokenizer.decode(x + y)} ({r:.2f})" for (x, y, _), r in zip(rows, scores)]
            accelerator.log({"samples": "\n\n".join(texts)}, step)
            accelerator.print(f"\nupdate {step}:", *texts[:2], sep="\n")
        if stop or step >= total_steps:
            break

        # ===== collect =====
        noise = torch.Generator().manual_seed(1_000_003 * args.seed + step)  # a resumed run needs no state of it
        asked = batch_at(prompts, step, B, args.seed)
        rows, (old_logprobs, ref_logprobs, old_values), scores = roll_out(asked, noise)

        # ===== compute targets =====
        lengths = torch.tensor([[len(response)] for _, response, _ in rows], device=device)
        mask = torch.arange(R, device=device) < lengths  # (B, R): tokens of responses, stop token included
        last = (torch.arange(R, device=device) == lengths - 1).float()
        stopped = torch.tensor([response[-1] in stops for _, response, _ in rows], device=device).float()
        scores = scores - args.missing_eos_penalty * (1 - stopped)
        token_rewards = kl_penalised_rewards(scores, old_logprobs, ref_logprobs, last, args.kl_coef)
        next_values = nn.functional.pad(old_values[:, 1:], (0, 1))
        inputs = (x.T for x in (token_rewards, old_values, next_values, last, last))  # time first
        advantages = compute_gae(*inputs, 1.0, args.gae_lambda).T
        returns = advantages + old_values
        advantages = (advantages - advantages[mask].mean()) / (advantages[mask].std(correction=0) + 1e-8)

        # ===== update =====
        agent.train()
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - step / total_steps)
        metrics = defaultdict(list)
        for _ in range(args.num_ppo_epochs):
            for order in torch.randperm(B, generator=noise).chunk(args.num_minibatches):
                count = mask[order].sum() / processes  # DDP takes the mean over these
                optimizer.zero_grad()
                for part in micro_batches([rows[i] for i in order], args.micro_batch_size):
                    numbers = [i for *_, (i,) in part[own]]
                    batch = (x[numbers][mask[numbers]] for x in (old_logprobs, old_values, advantages, returns))
                    mb_logprobs, mb_values, mb_advantages, mb_returns = batch  # (n,)
                    logprobs, values = agent(part[own])
                    log_ratio = logprobs - mb_logprobs
                    pg_loss = policy_loss(log_ratio, mb_advantages, args.clip_coef)
                    v_loss = value_loss(values, mb_values, mb_returns, args.clip_coef)
                    accelerator.backward((pg_loss + VF_COEF * v_loss).sum() / count)  # PPO Eq. 9, negated
                    log_ratio = log_ratio.detach()
                    ratio = log_ratio.exp()
                    metrics["loss/policy"].append(pg_loss.detach().sum() / count)
                    metrics["loss/value"].append(v_loss.detach().sum() / count)
                    metrics["policy/approxkl"].append((ratio - 1 - log_ratio).sum() / count)
                    metrics["policy/clipfrac"].append(((ratio - 1).abs() > args.clip_coef).sum() / count)
                    metrics["val/ratio"].append(ratio.sum() / count)
                metrics["grad_norm"].append(accelerator.clip_grad_norm_(trained, 1.0))
                optimizer.step()
        step += 1

        # ===== log and save =====
        minibatches = args.num_ppo_epochs * args.num_minibatches
        sums = accelerator.reduce({name: torch.stack(values).sum() for name, values in metrics.items()}, "mean")
        means = {name: value.item() / minibatches for name, value in sums.items()}
        if not math.isfinite(means["loss/policy"] + means["loss/value"] + means["grad_norm"]):
            raise SystemExit(f"\nthe loss became nan or inf before update {step}; {run_dir}/checkpoint is older")
        kl, reward = (old_logprobs - ref_logprobs).sum(1).mean().item(), scores.mean().item()
        means |= {"objective/kl": kl, "objective/scores": reward, "objective/rlhf_reward": reward - args.kl_coef * kl}
        means["objective/entropy"] = -old_logprobs.sum(1).mean().item()
        means["val/num_eos_tokens"] = stopped.mean().item()
        means["lr"] = optimizer.param_groups[0]["lr"]
        means["episodes_per_second"] = (step - bar.initial) * B / bar.format_dict["elapsed"]
        if gold_reward:
            golds = []
            for prompt, response, _ in rows:
                finished = response[-1] in stops
                text = tokenizer.decode(response[: len(response) - finished])
                golds.append(gold_reward(tokenizer.decode(prompt), text, finished))
            means["objective/gold"] = sum(golds) / B
        accelerator.log(means, step)
        bar.set_postfix_str(f"score {reward:.2f}, KL {kl:.2f}", refresh=False)
        stop = accelerator.reduce(torch.tensor(len(caught), device=device)) > 0  # of any process
        if stop or step == total_steps or args.save_every and step % args.save_every == 0:
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
    model = policy.merge_and_unload() if args.lora_rank and args.merge_lora else policy
    model.generation_config = generation
    weights = accelerator.get_state_dict(model.to(model.config.dtype))
    accelerator.end_training()  # processes that leave their group open may die of it
    if step < total_steps:
        launch = "python" if processes == 1 else f"torchrun --nproc-per-node {processes}"
        raise SystemExit(f"stopped at update {step}; to go on: {launch} {__file__!r} --resume {str(run_dir)!r}")
    if accelerator.is_main_process:
        shutil.rmtree(run_dir / "model", ignore_errors=True)  # a merged model beside an old adapter opens as both
        model.save_pretrained(run_dir / "model", state_dict=weights)
        tokenizer.save_pretrained(run_dir / "model")


if __name__ == "__main__":
    main(*parse_args())
