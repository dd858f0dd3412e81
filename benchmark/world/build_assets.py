"""Rebuild benchmark/world/assets, which the language scripts run on, from nothing.

    python benchmark/run.py assets                  # writes benchmark/world/assets
    python benchmark/run.py assets --out /tmp/assets

Steps: an untrained model with its tokenizer (base), reviews from the grammar (reviews), algos/sft.py on them (sft),
pairs of samples of that model, labelled by a Bradley-Terry draw on their gold reward (preferences), and prompts alone
(prompts), algos/reward_model.py on the pairs (reward). Each split of a data set has prompts of its own.
"""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from world import grammar

ALGOS = Path(__file__).resolve().parents[2] / "algos"
SEED = 7
ROWS = {  # rows of each split
    "reviews": {"train": 20_000, "test": 1_000},
    "preferences": {"train": 16_000, "test": 1_000},
    "prompts": {"train": 8_000, "test": 500},
}
RESPONSE_LENGTH = 48  # tokens; the longest of the grammar has 45


def build_base(folder: Path) -> None:
    """An untrained Llama of 0.29 M parameters with a word-level tokenizer."""
    words = ["<pad>", "<eos>", "<unk>", *grammar.vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    layers = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    tokens = {"vocab_size": len(words), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = LlamaConfig(
        **layers,
        **tokens,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.08,  # about 1/sqrt(hidden_size); the usual 0.02 learns far slower at this size
    )
    torch.manual_seed(SEED)
    LlamaForCausalLM(config).save_pretrained(folder)


def fresh_prompts(rng: random.Random) -> Iterator[str]:
    """Prompts of the world without end, none twice."""
    seen: set[str] = set()
    while True:
        prompt = grammar.sample_prompt(rng)
        if prompt not in seen:
            seen.add(prompt)
            yield prompt


@torch.no_grad()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str], what: str = "samples"
) -> list[tuple[str, bool]]:
    """A response of the model to each prompt at temperature 1, and whether it ended before the length limit."""
    found = []
    bar = tqdm(total=len(prompts), desc=what, unit=" texts", leave=False)
    for start in range(0, len(prompts), 500):
        ids = tokenizer(prompts[start : start + 500], return_tensors="pt").input_ids  # all prompts have one length
        model.generation_config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=RESPONSE_LENGTH)
        for row in output[:, ids.shape[1] :]:
            words = tokenizer.decode(row).split()
            finished = "<eos>" in words
            found.append((" ".join(words[: words.index("<eos>")] if finished else words), finished))
        bar.update(len(ids))
    bar.close()
    return found


def preference_pairs(prompts: list[str], responses: list[tuple[str, bool]], rng: random.Random) -> Iterator[dict]:
    """Rows prompt, chosen, rejected from two responses to each prompt; the gold rewards are kept beside them.

    A pair with an empty response, a rare sample, is left out, as the scripts would leave it out.
    """
    for prompt, a, b in zip(prompts, responses[::2], responses[1::2], strict=True):
        if not (a[0] and b[0]):
            continue
        gold_a, gold_b = (grammar.gold_reward(prompt, text, finished) for text, finished in (a, b))
        if rng.random() > grammar.preference_probability(gold_a, gold_b):
            a, b, gold_a, gold_b = b, a, gold_b, gold_a
        yield {
            "prompt": prompt,
            "chosen": f" {a[0]}",
            "rejected": f" {b[0]}",
            "gold_chosen": round(gold_a, 4),
            "gold_rejected": round(gold_b, 4),
        }


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(script: str, run_dir: Path, model: Path, *flags: object) -> None:
    """Run a shipped script through its command line and keep its model."""
    command = [sys.executable, ALGOS / f"{script}.py", "--run-dir", run_dir, *flags]
    print("+", *command[1:], flush=True)
    subprocess.run(list(map(str, command)), check=True)
    shutil.copytree(run_dir / "model", model, dirs_exist_ok=True)
    shutil.rmtree(run_dir)


def build(out: Path) -> None:
    """Write all assets to a folder."""
    rng = random.Random(SEED)
    prompts = fresh_prompts(rng)
    build_base(out / "base")
    for split, rows in ROWS["reviews"].items():
        asked = zip(prompts, range(rows))
        reviews = [{"prompt": p, "completion": f" {grammar.sample_response(p, rng)}"} for p, _ in asked]
        write_rows(out / "reviews" / f"{split}.jsonl", reviews)
    floor = grammar.generator_loss(reviews)  # of the last split, test
    print(f"loss of the generator itself on reviews/test.jsonl: {floor:.4f} nats per token", flush=True)
    flags = ["--model", out / "base", "--dataset", out / "reviews", "--learning-rate", 3e-3]
    train("sft", out / "run", out / "sft", *flags)

    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "sft")
    sft = AutoModelForCausalLM.from_pretrained(out / "sft").eval()
    torch.manual_seed(SEED)
    for split, rows in ROWS["prompts"].items():
        asked = [{"prompt": p} for p, _ in zip(prompts, range(rows))]
        write_rows(out / "prompts" / f"{split}.jsonl", asked)
    for split, rows in ROWS["preferences"].items():
        asked = [p for p, _ in zip(prompts, range(rows))]
        responses = sample(sft, tokenizer, [p for p in asked for _ in range(2)])
        write_rows(out / "preferences" / f"{split}.jsonl", preference_pairs(asked, responses, rng))
    flags = ["--model", out / "sft", "--dataset", out / "preferences", "--learning-rate", 1e-3]
    train("reward_model", out / "run", out / "reward", *flags)
