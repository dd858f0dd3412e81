"""How good policies of the small language world are: gold reward, KL from the reference, share of the optimum reached.

    python benchmark/run.py evaluate runs/a runs/b                     # runs of dpo, rlhf_ppo or grpo, with their β
    python benchmark/run.py evaluate /tmp/trl_dpo --beta 0.5           # a model folder, with a β
    python benchmark/run.py evaluate runs/* --golds /tmp/golds.json --json /tmp/figures.json   # keeps reference samples
    python benchmark/run.py evaluate runs/* --json /tmp/figures.json --picture frontier.png    # rewards against KL
    python benchmark/run.py evaluate --json benchmark/results/policies.json --picture frontier.png   # of known figures

Each policy answers the test prompts and fresh ones at temperature 1. Printed per policy, ± its standard error:

    gold    mean gold reward, in [-1, 1]
    KL      log π(y|x) - log π_ref(y|x) of its own samples, nats per sequence with its end-of-sequence token
    J       E[r] - β·KL with r = grammar.BT_SCALE · gold, what RLHF and DPO maximise
    share   (J - J_ref) / (J* - J_ref), with J_ref and J* from gold rewards of reference samples; its error is that of
            J. No share is printed where too few reference samples carry J* (grammar.Optimum.reliable)
    proxy   mean score of the reward model, less that of reference samples: what RLHF sees of r
    faulty  share of samples with a sentence that the gold reward refuses, too few sentences, or no end
"""

import argparse
import itertools
import json
import os
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from world import ASSETS, grammar
from world.build_assets import fresh_prompts, sample

Response = tuple[str, bool]  # text, and whether it ended before the length limit


@dataclass(frozen=True)
class Figures:
    """Means over a policy's samples, with their standard errors."""

    gold: float
    gold_error: float
    kl: float
    kl_error: float
    j: float
    j_error: float
    proxy: float
    faulty: float
    samples: int


def encoded(tokenizer: PreTrainedTokenizerFast, prompts: list[str], responses: list[Response]) -> tuple:
    """Rows of ids (n, L) filled up with padding, and the lengths of prompts (n,) and rows (n,).

    A finished response has its end-of-sequence token.
    """
    asked = tokenizer(prompts).input_ids
    texts = tokenizer([text for text, _ in responses]).input_ids
    rows = []
    for prompt, ids, (_, finished) in zip(asked, texts, responses):
        end = [tokenizer.eos_token_id] * finished
        rows.append(prompt + ids + end)
    length = max(map(len, rows))
    padded = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    return padded, torch.tensor(list(map(len, asked))), torch.tensor(list(map(len, rows)))


@torch.no_grad()
def sequence_logprobs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str],
                      responses: list[Response]) -> np.ndarray:  # fmt: skip
    """log π(y|x) of each response (n,), in nats; of a finished one with its end-of-sequence token."""
    found = []
    for start in range(0, len(prompts), 250):
        part = slice(start, start + 250)
        rows, begin, end = encoded(tokenizer, prompts[part], responses[part])
        logprobs = model(rows[:, :-1], use_cache=False).logits.double().log_softmax(-1)
        logprobs = logprobs.gather(-1, rows[:, 1:, None])[..., 0]
        position = torch.arange(1, rows.shape[1])  # causal: nothing reads the padding
        is_response = (begin[:, None] <= position) & (position < end[:, None])
        found.append((logprobs * is_response).sum(1))
    return torch.cat(found).numpy()


@torch.no_grad()
def proxy_scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str],
                 responses: list[Response]) -> np.ndarray:  # fmt: skip
    """Scores (n,) of a reward model, up to a constant."""
    found = []
    for start in range(0, len(prompts), 250):
        part = slice(start, start + 250)
        rows, _, _ = encoded(tokenizer, prompts[part], responses[part])
        found.append(model(rows).logits[:, 0])
    return torch.cat(found).double().numpy()


def is_faulty(prompt: str, response: Response) -> bool:
    """Whether the gold reward charges a response for anything but its sentiment."""
    sentences = grammar.parse(prompt, response[0])
    return not response[1] or len(sentences) < grammar.MIN_SENTENCES or any(sentence.problem for sentence in sentences)


def golds_of(prompts: list[str], responses: list[Response]) -> np.ndarray:
    """Gold rewards (n,)."""
    return np.array([grammar.gold_reward(prompt, *response) for prompt, response in zip(prompts, responses)])


def mean_and_error(x: np.ndarray) -> tuple[float, float]:
    """Mean of samples (n,) and its standard error."""
    return float(x.mean()), float(x.std(ddof=1) / len(x) ** 0.5)


def evaluate(policy: PreTrainedModel, reference: PreTrainedModel, scorer: PreTrainedModel,
             tokenizer: PreTrainedTokenizerFast, prompts: list[str], beta: float) -> Figures:  # fmt: skip
    """Figures of a policy over one sample per prompt; draws from torch's generator."""
    responses = sample(policy, tokenizer, prompts, "samples of the policy")
    golds = golds_of(prompts, responses)
    kl = sequence_logprobs(policy, tokenizer, prompts, responses)
    kl -= sequence_logprobs(reference, tokenizer, prompts, responses)
    j = grammar.BT_SCALE * golds - beta * kl
    proxy, _ = mean_and_error(proxy_scores(scorer, tokenizer, prompts, responses))
    faulty = float(np.mean([is_faulty(*pair) for pair in zip(prompts, responses)]))
    means = *mean_and_error(golds), *mean_and_error(kl), *mean_and_error(j)
    return Figures(*means, proxy, faulty, len(prompts))


def reference_samples(reference: PreTrainedModel, scorer: PreTrainedModel, tokenizer: PreTrainedTokenizerFast,
                      prompts: list[str]) -> dict[str, list[float]]:  # fmt: skip
    """Gold rewards and proxy scores (n,) of one reference sample per prompt, for grammar.optimum_from_samples."""
    responses = sample(reference, tokenizer, prompts, "samples of the reference")
    proxies = proxy_scores(scorer, tokenizer, prompts, responses)
    return {"gold": golds_of(prompts, responses).round(4).tolist(), "proxy": proxies.round(4).tolist()}


def describe(name: str, found: Figures, beta: float, best: grammar.Optimum) -> str:
    """The line that is printed for a policy."""
    gain = best.j_star - best.j_ref
    share = f"{(found.j - best.j_ref) / gain:.3f} ± {found.j_error / gain:.3f}" if best.reliable else "unreliable"
    return (
        f"{name}: β {beta:g}, gold {found.gold:+.4f} ± {found.gold_error:.4f}, "
        f"KL {found.kl:.3f} ± {found.kl_error:.3f}, J {found.j:+.4f} ± {found.j_error:.4f} of J* "
        f"{best.j_star:.4f} ± {best.standard_error:.4f}, share {share}, "
        f"proxy {found.proxy:+.3f}, faulty {found.faulty:.3f}"
    )


def setting_of(path: Path, beta: float | None) -> tuple[str, float]:
    """The script of a run, with its flag where the KL is in the score, and β, or that given; "" for a model folder."""
    flags = {}
    if (path / "args.json").exists():
        flags = json.loads((path / "args.json").read_text())
    beta = beta or flags.get("beta", flags.get("kl_coef"))
    if not beta:
        raise SystemExit(f"error: {path}: no run of dpo.py, rlhf_ppo.py or grpo.py, whose β is known; give --beta")
    if flags.get("kl_in") == "reward":
        return "grpo --kl-in reward", beta
    for flag, script in (("group_size", "grpo"), ("kl_coef", "rlhf_ppo"), ("beta", "dpo")):  # a flag that only it has
        if flag in flags:
            return script, beta
    return "", beta


def reference_rewards(path: Path | None, sampled: Callable[[], dict[str, list[float]]]) -> dict[str, list[float]]:
    """Gold rewards and proxy scores of reference samples: those of a file, or new ones that are kept in it."""
    if path and path.exists():
        return json.loads(path.read_text())
    known = sampled()
    if path:
        new = path.with_suffix(f".{os.getpid()}")  # whole or not there, for calls side by side
        new.write_text(json.dumps(known))
        new.replace(path)
    return known


def merged(path: Path, rows: list[dict]) -> list[dict]:
    """The figures that a file holds with new ones in their place, by name; it is written when there are new ones."""
    before = json.loads(path.read_text()) if path.exists() else []
    if not rows:
        return before
    names = {row["name"] for row in rows}
    rows = rows + [row for row in before if row["name"] not in names]
    rows.sort(key=lambda row: row["name"])
    path.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def evaluate_all(args: argparse.Namespace) -> None:
    """Evaluate each policy and print a line for it."""
    settings = {path: setting_of(path, args.beta) for path in args.models}
    if not settings and not (args.json and args.json.exists() and args.picture):
        raise SystemExit("error: name policies to evaluate, or --json with figures and the --picture to draw of them")
    tokenizer = AutoTokenizer.from_pretrained(args.reference)
    reference = AutoModelForCausalLM.from_pretrained(args.reference).eval()
    scorer = AutoModelForSequenceClassification.from_pretrained(args.reward_model).eval()
    fresh = fresh_prompts(random.Random(1_000_003 * args.seed))
    test = [json.loads(line)["prompt"] for line in (ASSETS / "prompts" / "test.jsonl").open()]
    prompts = list(itertools.islice(itertools.chain(test, fresh), args.prompts))

    def sampled() -> dict[str, list[float]]:
        asked = list(itertools.islice(fresh, args.reference_samples))
        return reference_samples(reference, scorer, tokenizer, asked)

    torch.manual_seed(args.seed)
    known = reference_rewards(args.golds, sampled)
    golds = np.array(known["gold"])
    for beta in sorted({beta for _, beta in settings.values()}):
        best = grammar.optimum_from_samples(golds, beta)
        print(
            f"reference: β {beta:g}, gold {golds.mean():+.4f}, J_ref {best.j_ref:+.4f}, J* {best.j_star:.4f} ± "
            f"{best.standard_error:.4f}, KL* {best.kl_star:.3f}, gold* {best.gold_star:+.4f} "
            f"({len(golds)} samples, {best.effective_samples:.0f} effective)"
        )
    rows = []
    for path, (script, beta) in settings.items():
        torch.manual_seed(args.seed)
        policy = AutoModelForCausalLM.from_pretrained(path / "model" if script else path).eval()
        found = evaluate(policy, reference, scorer, tokenizer, prompts, beta)
        found = replace(found, proxy=found.proxy - float(np.mean(known["proxy"])))
        best = grammar.optimum_from_samples(golds, beta)
        row = asdict(found) | {"name": str(path), "script": script, "beta": beta}
        row |= {"j_star": best.j_star, "j_ref": best.j_ref, "share": None}
        if best.reliable:
            row["share"] = (found.j - best.j_ref) / (best.j_star - best.j_ref)
        rows.append(row)
        print(describe(str(path), found, beta, best), flush=True)
    if args.json:
        rows = merged(args.json, rows)
    if args.picture:
        from world import frontier  # matplotlib is slow to import

        frontier.draw(rows, golds, args.picture)
        print(f"wrote {args.picture}")
