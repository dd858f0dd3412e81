"""What plain second versions of rlhf_ppo.py and grpo.py share: a small world, and responses one by one in float64.

They go through the samples of a run and must reach the same weights and logs, without padding or micro-batches.
"""

from collections import Counter
from pathlib import Path

import tiny
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

R, ROOM = 8, 8  # tokens of a response at most, and of a prompt
STOPS = {1, 7, 12, 17}  # EOS, two of the model's generation config, and the dot, which ends the template's turns
UPDATES, EPOCHS, MINIBATCHES = 2, 2, 2
LEARNING_RATE = 3e-3
CLIP = 0.05
PENALTY = 0.7
BETA = 0.3
REWARD = """
def letters(prompts, completions):
    return [sum(len(word) for word in text.split() if "<" not in word) / 10 for text in completions]
"""


def score(response: list[int]) -> float:
    """What REWARD gives for the words before the stop token, less the penalty where there is none."""
    words = [tiny.WORDS[i - 4] for i in response if i not in STOPS and i >= 4]  # <pad> and the like come before
    return len("".join(words)) / 10 - PENALTY * (response[-1] not in STOPS)


def make_world(folder: Path, prompts: int, batch_size: int) -> tuple[dict, list[tuple[int, ...]]]:
    """Flags of a run over all of that many prompts, and the prompts; one more is a token too long."""
    folder.mkdir(exist_ok=True)
    tokenizer = tiny.word_tokenizer(extra_special_tokens=["."])
    tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", ".")
    model = tiny.make_model(folder / "model", tokenizer=tokenizer)
    model.generation_config = GenerationConfig(eos_token_id=[7, 12], do_sample=True, temperature=0.5)
    model.save_pretrained(folder / "model")
    file = folder / f"reward_of_{folder.name}.py"  # each test's module is another one
    file.write_text(REWARD)
    texts = []
    for i in range(prompts):
        texts.append(["very"] * (i % 6) + [tiny.WORDS[i], "film", ":"])
    assert max(map(len, texts)) == ROOM
    too_long = ["very"] * ROOM + [":"]
    rows = [{"prompt": " ".join(words)} for words in [*texts, too_long]]
    tiny.write_jsonl(folder / "data" / "train.jsonl", rows)
    tiny.write_jsonl(folder / "data" / "test.jsonl", rows[:5])
    flags = {"model": folder / "model", "reward_model": f"{file}:letters", "dataset": folder / "data"}
    flags = {name: str(value) for name, value in flags.items()}
    flags |= {"batch_size": batch_size, "num_minibatches": MINIBATCHES, "total_episodes": UPDATES * batch_size}
    flags |= {"micro_batch_size": batch_size // MINIBATCHES // 2, "response_length": R, "max_length": R + ROOM}
    flags |= {"learning_rate": LEARNING_RATE, "clip_coef": CLIP, "missing_eos_penalty": PENALTY, "kl_coef": BETA}
    return flags, [tuple(4 + tiny.WORDS.index(word) for word in words) for words in texts]


def rollouts(seen, batch_size: int, prompts: list[tuple[int, ...]]) -> list[tuple[list, list]]:
    """Rows of each update and its minibatches of all epochs, from the calls of sample and response_logprobs.

    A row is (prompt, response). Holds that a run asks each prompt as often, ends a response with its first stop token,
    and that an epoch is a new order of all rows.
    """
    sampled = []
    for call in seen.rollouts:
        sampled.append([(tuple(x), tuple(y)) for x, y in zip(call.prompts, call.result)])
    asked = Counter(prompt for rows in sampled for prompt, _ in rows)
    assert len(sampled) == UPDATES
    assert asked == dict.fromkeys(prompts, UPDATES * batch_size // len(prompts))
    responses = [response for rows in sampled for _, response in rows]
    assert all(response[-1] in STOPS or len(response) == R for response in responses)
    assert not any(STOPS & {*response[:-1]} for response in responses)
    assert 0 < sum(response[-1] in STOPS for response in responses) < len(responses)
    trained = []
    for call in seen.response_logprobs:
        if call.result.requires_grad:
            trained += [(tuple(prompt), tuple(response)) for prompt, response in call.rows]
    size = batch_size // MINIBATCHES
    per_update = batch_size * EPOCHS
    found = []
    assert len(trained) == UPDATES * per_update
    for update, rows in enumerate(sampled):
        own = trained[update * per_update : (update + 1) * per_update]
        epochs = [own[i : i + batch_size] for i in range(0, per_update, batch_size)]
        firsts = set()
        for epoch in epochs:
            assert sorted(epoch) == sorted(rows)
            firsts.add(tuple(sorted(epoch[:size])))
        assert len(firsts) == EPOCHS  # other rows come first
        minibatches = [own[i : i + size] for i in range(0, per_update, size)]
        found.append((rows, minibatches))
    return found


def logprobs(model: nn.Module, prompt: tuple[int, ...], response: tuple[int, ...]) -> Tensor:
    """log π of each token of a response."""
    logits = model(torch.tensor([prompt + response])).logits[0]
    following = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return following[range(len(response)), list(response)]


def clipped(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """PPO's objective of each token, where a step that goes too far gains nothing."""
    ratio = log_ratio.exp()
    near = ratio.clamp(1 - CLIP, 1 + CLIP)
    return torch.minimum(ratio * advantages, near * advantages)


def distance(found: dict[str, Tensor], model: nn.Module, start: nn.Module) -> float:
    """How far weights are from the model's, as a share of how far these are from the start."""
    now = dict(model.named_parameters())
    before = dict(start.named_parameters())

    def from_model(others: dict[str, Tensor]) -> float:
        gaps = [(now[name] - others[name]).detach().flatten() for name in now]
        return torch.cat(gaps).norm().item()

    return from_model(found) / from_model(before)
