# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["accelerate~=1.15.0", "datasets~=5.2.0", "peft~=0.21.2", "tensorboard~=2.21.0", "torch~=2.13.0",
# "tqdm~=4.70.1", "transformers~=5.23.0", "tyro~=1.0.17"]
# ///
"""Group relative policy optimisation (GRPO): RLHF without a critic, by the mean of a group of answers as the baseline.

The policy π answers each prompt G times; how much better an answer scores than its group is the advantage of all its
tokens. The KL penalty to the policy at the start, π_ref, joins the loss. A reward model scores, or a Python function.
Papers: Shao et al. 2024, arXiv 2402.03300 (GRPO); Liu et al. 2025, arXiv 2503.20783 (Dr. GRPO); Ahmadian et al. 2024,
arXiv 2402.14740 (RLOO); Schulman et al. 2017, arXiv 1707.06347 (PPO).

    python algos/grpo.py  # the small language world: 0.81 of the possible gain
    python algos/grpo.py --kl-coef 0.05 --reward-model benchmark/world/own_feelings.py:reward  # 0.06 to 0.99 of answers
    accelerate launch algos/grpo.py --model Qwen/Qwen3-0.6B --reward-model my_rewards.py:correct --dataset my.jsonl \\
        --eval-split '' --kl-coef 0.05 --total-episodes 100000 --batch-size 512 --bf16 --gradient-checkpointing

Data: a column `prompt` of texts or lists of {"role", "content"} messages. A reward in Python is function(prompts,
completions, **other columns) -> list of numbers, as in TRL. Letters: B responses of a rollout, G of a group, b of a
micro-batch, R tokens of a response, L of a row, V words, n response tokens of a micro-batch. Logged: objective/kl and
/entropy, sums over a response of log π/π_ref and -log π; frac_reward_zero_std, the share of groups of equal scores.
Differs from the paper:
 1. The reference is the policy at the start throughout; no new reward model is trained (Algorithm 1's outer loop).
 2. The KL term is weighed by the ratio (DeepSeek-V3.2, 2512.02556): only so is its gradient that of KL(π || π_ref).
 3. AdamW without weight decay, a learning rate that falls linearly to 0, the gradient's norm clipped to 1, no dropout.
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
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from tqdm import tqdm

SCRIPT = Path(__file__).stem
ASSETS = Path(__file__).resolve().parent.parent / "benchmark/world/assets"  # the small language world


@dataclass
class Args:
    seed: int = 1  # of the order of prompts, of sampling and of minibatches
    device: Literal["auto", "cpu"] = "auto"  # auto takes GPUs where there are some
    run_dir: str = ""  # where the run is written; by default runs/<task>__<script>__<seed>__<time>
    resume: str = ""  # run directory or checkpoint to continue, with its flags where none are given
    save_every: int = 20  # updates between checkpoints, and evaluations; 0: only at the end
    track: bool = False  # mirror the logs to Weights & Biases
    model: str = str(ASSETS / "sft")  # hub id, folder or peft adapter of the policy to start from, which is π_ref
    reward_model: str = str(ASSETS / "reward")  # hub id or folder of a reward model; or file.py:function
    dataset: str = str(ASSETS / "prompts")  # hub id, folder or jsonl, json, csv or parquet file
    train_split: str = "train"  # split to take prompts from; slices such as train[:95%] work
    eval_split: str = "test"  # held-out split, of which --batch-size prompts are answered; '': of the training prompts
    total_episodes: int = 4096  # responses to sample in all
    max_length: int = 512  # longest row in tokens, prompt and response: longer prompts are left out
    learning_rate: float = 0  # at the start; 0: 5e-4 on the small world's model, 3e-6 on others, 3e-5 there with LoRA
    batch_size: int = 128  # B: responses of a rollout, over all processes
    num_minibatches: int = 4  # minibatches per epoch, one step each
    num_epochs: int = 4  # passes over the rollout per update (GRPO Algorithm 1's μ)
    micro_batch_size: int = 16  # b: rows of a forward pass, over all processes: less memory, same gradient
    bf16: bool = False  # compute in bfloat16; weights and log-probabilities stay float32
    gradient_checkpointing: bool = False  # compute activations twice: less memory, about a third slower
    lora_rank: int = 0  # if not 0, train low-rank adapters of all linear layers, with α = 2·rank, and save these
    merge_lora: bool = False  # save the whole model, with the adapters merged
    response_length: int = 48  # R: longest response in tokens
    kl_coef: float = 0.5  # β: weight of the KL penalty in the loss (GRPO Eq. 3)
    group_size: int = 8  # G: responses to each prompt of a rollout
    baseline: Literal["group", "leave-one-out"] = "group"  # mean of all of a group, or of the others (RLOO)
    normalize_by_std: bool = True  # by the group's std, and a response's length; off: by --response-length (Dr. GRPO)
    clip_coef: float = 0.2  # ε: clip range of the ratio (PPO Eq. 7)
    missing_eos_penalty: float = 1.0  # taken off the score of a response without a stop token

    def __post_init__(self) -> None:
        counts = self.num_minibatches, self.num_epochs, self.response_length, self.micro_batch_size
        if min(*counts, self.clip_coef, self.group_size - 1, self.max_length - self.response_length) <= 0:
            raise ValueError("counts, clip-coef must be above 0, group-size above 1, max-length above response-length")
        if min(self.save_every, self.learning_rate, self.lora_rank, self.kl_coef, self.missing_eos_penalty) < 0:
            raise ValueError("save-every, learning-rate, lora-rank, kl-coef, missing-eos-penalty must be at least 0")
        if self.batch_size % math.lcm(self.num_minibatches, self.group_size) or self.total_episodes < self.batch_size:
            raise ValueError("batch-size must be a multiple of num-minibatches and group-size, total-episodes not less")


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


def group_advantages(scores: Tensor, leave_one_out: bool, by_std: bool) -> Tensor:
    """A = (r - mean of the group) / std of the group (GRPO 4.1.2), of scores (B/G, G); RLOO: less the others' mean."""
    scores = scores - scores[:, :1]  # equal ones are exactly 0
    advantages = scores - scores.mean(1, keepdim=True)
    if leave_one_out:
        advantages = advantages * scores.shape[1] / (scores.shape[1] - 1)  # = r - mean of the others
    return advantages / (scores.std(1, keepdim=True) + 1e-4) if by_std else advantages


def policy_loss(log_ratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """Clipped surrogate per sample (PPO Eq. 7, negated): -min(r·A, clip(r, 1 - ε, 1 + ε)·A), r = π/π_old."""
    ratio = log_ratio.exp()  # PPO Eq. 6
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return -torch.min(ratio * advantages, clipped_ratio * advantages)  # PPO Eq. 7


def kl_penalty(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """π/π_old·(π_ref/π - log π_ref/π - 1), never negative; its mean over π_old is KL(π || π_ref) (GRPO Eq. 4)."""
    log_ratio = ref_logprobs - logprobs
    return (logprobs - old_logprobs).exp() * (log_ratio.exp() - log_ratio - 1)


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
    accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision="bf16" if args.bf16 else "no")
    device, processes = accelerator.device, accelerator.num_processes
    own = slice(accelerator.process_index, None, processes)  # of the rows of a micro-batch
    torch.manual_seed(args.seed)
    adapter = args.lora_rank and not args.merge_lora and transformers.utils.find_adapter_config_file(args.model)
    if adapter or saved and saved["args"]["lora_rank"] != args.lora_rank:
        raise SystemExit("--lora-rank cannot change when resuming, and on top of an adapter it needs --merge-lora")
    if accelerator.distributed_type in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise SystemExit("sampling needs whole models on each process: launch without FSDP, DeepSpeed or Megatron")
    B, R, G = args.batch_size, args.response_length, args.group_size
    policy, tokenizer = load_model(transformers.AutoModelForCausalLM, args.model, args.max_length)
    file, is_file, function = args.reward_model.partition(".py:")
    function = runpy.run_path(file + ".py")[function] if is_file else None
    if not function:
        scorer, words = load_model(transformers.AutoModelForSequenceClassification, args.reward_model, args.max_length)
        sizes = [model.get_input_embeddings().num_embeddings for model in (policy, scorer)]
        same = words.chat_template in (None, tokenizer.chat_template) and text_ends(tokenizer) == text_ends(words)
        same = same and tokenizer.get_vocab().items() <= words.get_vocab().items()
        if not same or sizes[0] > sizes[1] or scorer.config.num_labels != 1:
            raise SystemExit(f"--reward-model: other tokens or template ({sizes} embeddings), or several scores")
        scorer.requires_grad_(False).to(device)
    prompts = load_prompts(args.dataset, args.train_split, tokenizer, args.max_length - R)
    held_out = load_prompts(args.dataset, args.eval_split or args.train_split, tokenizer, args.max_length - R)[:B]
    if len(prompts) < B // G or min(len(held_out), B // args.num_minibatches, args.micro_batch_size) < processes:
        raise SystemExit(f"{len(prompts)} prompts fill no batch, or micro-batches lack rows for {processes} processes")
    generation, stops = policy.generation_config, tokenizer.convert_tokens_to_ids(text_ends(tokenizer)[1:])
    generation.validate(strict=True)  # as saving does
    policy.generation_config = transformers.GenerationConfig(eos_token_id=[1 << 30], pad_token_id=stops[0])
    uniform = torch.rand(2, 16, dtype=torch.float64)
    if sample(policy, [[1], [1, 2, 3, 4]], uniform)[0] != sample(policy, [[1]], uniform[:1])[0]:
        raise SystemExit(f"--model {args.model} samples otherwise beside a longer prompt: it takes no positions")
    eos = [generation.eos_token_id] if isinstance(generation.eos_token_id, int) else generation.eos_token_id or []
    generation.eos_token_id = policy.generation_config.eos_token_id = stops = list({*stops, *eos})
    torch.set_num_threads(1 if policy.num_parameters() < 10e6 else torch.get_num_threads())  # small ones lose by more
    if args.gradient_checkpointing:
        policy.activation_checkpointing_enable()
    if args.lora_rank:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear")
        policy = get_peft_model(policy, lora)
        hook = accelerator.register_save_state_pre_hook  # checkpoints hold the adapters only
        hook(lambda _, states, __: [w.pop(name) for w in states for name in [*w] if "lora_" not in name])
    reference = policy if args.lora_rank else copy.deepcopy(policy).requires_grad_(False).to(device)
    at_reference = policy.disable_adapter if args.lora_rank else torch.no_grad
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0, fused=True)
    model, optimizer = accelerator.prepare(policy, optimizer)
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
        """Rows [prompt, response, [number]], log π and log π_ref of their tokens, (2, B, R), and scores, (B,)."""
        uniform = torch.rand(len(asked), R, generator=noise, dtype=torch.float64)[own].to(device)
        with accelerator.autocast():
            responses = sample(policy, [ids for ids, _ in asked[own]], uniform)
        responses = sorted(gather_object([*zip(range(len(asked))[own], responses)]))
        rows = [[ids, response, [i]] for (ids, _), (i, response) in zip(asked, responses)]
        tokens, scores = torch.zeros(2, len(rows), R, device=device), torch.zeros(len(rows), device=device)
        for part in micro_batches(rows, args.micro_batch_size):
            numbers = [i for *_, (i,) in part[own]]
            with accelerator.autocast():
                logprobs, mask = completion_logprobs(model, part[own], device)
                with at_reference():
                    ref, _ = completion_logprobs(reference, part[own], device)
            for i, *both, kept in zip(numbers, logprobs, ref, mask):
                tokens[:, i, : kept.sum()] = torch.stack(both)[:, kept]
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
        model.eval()  # without gradient checkpointing, which samples without a cache
        if step % (args.save_every or total_steps) == 0 or step >= total_steps:
            rows, _, scores = roll_out(held_out, torch.Generator().manual_seed(args.seed))
            texts = [f"{tokenizer.decode(x + y)} ({r:.2f})" for (x, y, _), r in zip(rows, scores)][:4]
            accelerator.log({"eval/scores": scores.mean().item(), "samples": "\n\n".join(texts)}, step)
            accelerator.print(f"\nupdate {step}: eval/scores {scores.mean():.4f}", *texts[:2], sep="\n")
        if stop or step >= total_steps:
            break

        # ===== collect =====
        noise = torch.Generator().manual_seed(1_000_003 * args.seed + step)  # a resumed run needs no state of it
        asked = [prompt for prompt in batch_at(prompts, step, B // G, args.seed) for _ in range(G)]
        rows, (old_logprobs, ref_logprobs), scores = roll_out(asked, noise)

        # ===== compute targets =====
        lengths = torch.tensor([[len(response)] for _, response, _ in rows], device=device)
        mask = torch.arange(R, device=device) < lengths  # (B, R): tokens of responses, stop token included
        stopped = torch.tensor([response[-1] in stops for _, response, _ in rows], device=device).float()
        scores = scores - args.missing_eos_penalty * (1 - stopped)
        groups = scores.view(-1, G)  # of one prompt each
        advantages = group_advantages(groups, args.baseline == "leave-one-out", args.normalize_by_std)
        sizes = lengths if args.normalize_by_std else torch.full_like(lengths, R)  # |o_i| of Eq. 3; R in Dr. GRPO
        advantages, shares = advantages.view(B, 1).expand(B, R), (1 / sizes).expand(B, R)

        # ===== update =====
        model.train()
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - step / total_steps)
        metrics = defaultdict(list)
        for _ in range(args.num_epochs):
            for order in torch.randperm(B, generator=noise).chunk(args.num_minibatches):
                count = mask[order].sum() / processes  # DDP takes the mean over these
                optimizer.zero_grad()
                for part in micro_batches([rows[i] for i in order], args.micro_batch_size):
                    numbers = [i for *_, (i,) in part[own]]
                    batch = (x[numbers][mask[numbers]] for x in (old_logprobs, ref_logprobs, advantages, shares))
                    mb_logprobs, mb_ref_logprobs, mb_advantages, mb_shares = batch  # (n,)
                    logprobs, part_mask = completion_logprobs(model, part[own], device)
                    logprobs = logprobs[part_mask]
                    log_ratio = logprobs - mb_logprobs
                    pg_loss = policy_loss(log_ratio, mb_advantages, args.clip_coef)
                    kl = kl_penalty(logprobs, mb_logprobs, mb_ref_logprobs)
                    loss = ((pg_loss + args.kl_coef * kl) * mb_shares).sum() / len(order)  # GRPO Eq. 3, negated
                    accelerator.backward(loss * processes)
                    metrics["loss/policy"].append(pg_loss.detach().sum() / count)
                    metrics["loss/kl"].append(kl.detach().sum() / count)
                    metrics["policy/approxkl"].append((log_ratio.detach().expm1() - log_ratio.detach()).sum() / count)
                metrics["grad_norm"].append(accelerator.clip_grad_norm_(policy.parameters(), 1.0))
                optimizer.step()
        step += 1

        # ===== log and save =====
        sums = accelerator.reduce({name: torch.stack(values).sum() for name, values in metrics.items()}, "mean")
        means = {name: value.item() / args.num_epochs / args.num_minibatches for name, value in sums.items()}
        if not math.isfinite(means["loss/policy"] + means["loss/kl"] + means["grad_norm"]):
            raise SystemExit(f"\nthe loss became nan or inf before update {step}; {run_dir}/checkpoint is older")
        kl, reward = (old_logprobs - ref_logprobs).sum(1).mean().item(), scores.mean().item()
        means |= {"objective/kl": kl, "objective/scores": reward, "val/num_eos_tokens": stopped.mean().item()}
        means["frac_reward_zero_std"] = (groups == groups[:, :1]).all(1).float().mean().item()
        means |= {"objective/entropy": -old_logprobs.sum(1).mean().item(), "lr": optimizer.param_groups[0]["lr"]}
        means["episodes_per_second"] = (step - bar.initial) * B / bar.format_dict["elapsed"]
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
