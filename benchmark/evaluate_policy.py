"""How good policies of the small language world are: gold reward, KL from the reference, share of the optimum reached.

    python benchmark/evaluate_policy.py runs/a/model runs/b/model --beta 0.1
    python benchmark/evaluate_policy.py runs/a/model --beta 0.1 --golds /tmp/sft_golds.json   # keeps reference samples

Each policy answers the test prompts and fresh ones at temperature 1. Printed per policy, ± its standard error:

    gold           mean gold reward, in [-1, 1]
    KL             log π(y|x) - log π_ref(y|x) of its own samples, nats per sequence with its end-of-sequence token
    J              E[r] - β·KL with r = world.BT_SCALE · gold, what RLHF and DPO maximise
    share          (J - J_ref) / (J* - J_ref), with J_ref and J* from gold rewards of reference samples; its error is
                   that of J. No share is printed where too few reference samples carry J* (world.Optimum.reliable)
    ungrammatical  share of samples with a sentence that the grammar refuses, too few sentences, or no end

Importable: `evaluate` and `reference_golds` return what `main` prints.
"""

import argparse
import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import world
from build_assets import fresh_prompts, sample
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

ASSETS = Path(__file__).resolve().parent / "assets"
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
    ungrammatical: float
    samples: int


@torch.no_grad()
def sequence_logprobs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str],
                      responses: list[Response]) -> np.ndarray:  # fmt: skip
    """log π(y|x) of each response (n,), in nats; of a finished one with its end-of-sequence token."""
    found = np.empty(len(prompts))
    for start in range(0, len(prompts), 250):
        asked = tokenizer(prompts[start : start + 250]).input_ids
        texts = tokenizer([text for text, _ in responses[start : start + 250]]).input_ids
        for i, (prompt, ids, (_, finished)) in enumerate(zip(asked, texts, responses[start : start + 250])):
            texts[i] = prompt + ids + [tokenizer.eos_token_id] * finished
        length = max(map(len, texts))
        rows = torch.tensor([ids + [0] * (length - len(ids)) for ids in texts])  # causal: nothing reads the padding
        logprobs = model(rows[:, :-1], use_cache=False).logits.double().log_softmax(-1)
        logprobs = logprobs.gather(-1, rows[:, 1:, None])[..., 0]
        for i, (prompt, ids) in enumerate(zip(asked, texts)):
            found[start + i] = logprobs[i, len(prompt) - 1 : len(ids) - 1].sum()
    return found


def is_grammatical(prompt: str, response: Response) -> bool:
    """Whether the grammar could have written a response to the prompt."""
    return response[1] and np.isfinite(world.log_prob(prompt, response[0]))


def golds_of(prompts: list[str], responses: list[Response]) -> np.ndarray:
    """Gold rewards (n,)."""
    return np.array([world.gold_reward(prompt, *response) for prompt, response in zip(prompts, responses)])


def evaluate(policy: PreTrainedModel, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerFast,
             prompts: list[str], beta: float) -> Figures:  # fmt: skip
    """Figures of a policy over one sample per prompt; draws from torch's generator."""
    responses = sample(policy, tokenizer, prompts)
    golds = golds_of(prompts, responses)
    kl = sequence_logprobs(policy, tokenizer, prompts, responses)
    kl -= sequence_logprobs(reference, tokenizer, prompts, responses)
    j = world.BT_SCALE * golds - beta * kl
    means = [f(x) for x in (golds, kl, j) for f in (np.mean, lambda x: np.std(x, ddof=1) / len(x) ** 0.5)]
    wrong = np.mean([not is_grammatical(*pair) for pair in zip(prompts, responses)])
    return Figures(*map(float, means), float(wrong), len(prompts))


def reference_golds(reference: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> np.ndarray:
    """Gold rewards (n,) of one reference sample per prompt, for world.optimum_from_samples."""
    return golds_of(prompts, sample(reference, tokenizer, prompts))


def main() -> None:
    """Evaluate each model folder and print a line for it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="folders of policies")
    parser.add_argument("--reference", default=str(ASSETS / "sft"), help="folder of the reference policy")
    parser.add_argument("--beta", type=float, default=0.1, help="β of the KL penalty (default 0.1)")
    parser.add_argument("--prompts", type=int, default=3_000, help="prompts to answer (default 3000)")
    parser.add_argument("--reference-samples", type=int, default=60_000, help="for J_ref and J* (default 60000)")
    parser.add_argument("--golds", type=Path, help="json file that keeps the reference's gold rewards between calls")
    parser.add_argument("--seed", type=int, default=1, help="seed of fresh prompts and samples (default 1)")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.reference)
    reference = AutoModelForCausalLM.from_pretrained(args.reference).eval()
    fresh = fresh_prompts(random.Random(1_000_003 * args.seed))
    test = [json.loads(line)["prompt"] for line in (ASSETS / "prompts" / "test.jsonl").open()]
    prompts = list(itertools.islice(itertools.chain(test, fresh), args.prompts))

    torch.manual_seed(args.seed)
    if args.golds and args.golds.exists():
        golds = np.array(json.loads(args.golds.read_text()))
    else:
        golds = reference_golds(reference, tokenizer, list(itertools.islice(fresh, args.reference_samples)))
        if args.golds:
            args.golds.write_text(json.dumps(golds.round(4).tolist()))
    best = world.optimum_from_samples(golds, args.beta)
    print(
        f"reference: gold {golds.mean():+.4f}, J_ref {best.j_ref:+.4f}, J* {best.j_star:.4f} ± "
        f"{best.standard_error:.4f}, KL* {best.kl_star:.3f}, gold* {best.gold_star:+.4f} "
        f"({len(golds)} samples, {best.effective_samples:.0f} effective)"
    )
    for name in args.models:
        torch.manual_seed(args.seed)
        policy = AutoModelForCausalLM.from_pretrained(name).eval()
        found = evaluate(policy, reference, tokenizer, prompts, args.beta)
        gain = best.j_star - best.j_ref
        share = f"{(found.j - best.j_ref) / gain:.3f} ± {found.j_error / gain:.3f}" if best.reliable else "unreliable"
        print(f"{name}: gold {found.gold:+.4f} ± {found.gold_error:.4f}, KL {found.kl:.3f} ± {found.kl_error:.3f}, "
              f"J {found.j:+.4f} ± {found.j_error:.4f}, share {share}, ungrammatical {found.ungrammatical:.3f}",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
