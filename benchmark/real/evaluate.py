"""What a run on one of the four tasks has changed: the same held-out rows, answered before and after training."""

import argparse
import json
from pathlib import Path
from statistics import mean

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from real import tasks
from real.tasks import Row

LENGTHS = {"sums": 6, "comparisons": 6, "extraction": 60, "films": 24}  # tokens
BATCH = 50
SHOWN = 3


@torch.inference_mode()
def answers(folder: Path, task: str, rows: list[Row]) -> list[str]:
    """A model's answers: the likeliest tokens, but samples where it is to go on with a review."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    torch.manual_seed(1)
    texts = []
    for start in range(0, len(rows), BATCH):
        questions = [tasks.question_of(row) for row in rows[start : start + BATCH]]
        if isinstance(questions[0], list):
            template = {"tokenize": False, "add_generation_prompt": True}
            questions = [tokenizer.apply_chat_template(question, **template) for question in questions]
        batch = tokenizer(questions, return_tensors="pt", padding=True, add_special_tokens=False)
        sampling = {"do_sample": task == "films", "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        ids = model.generate(**batch, **sampling, max_new_tokens=LENGTHS[task], pad_token_id=tokenizer.pad_token_id)
        texts += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def evaluate(args: argparse.Namespace) -> None:
    """Write the mean of the judge before and after, the words of an answer, and some answers."""
    settings = json.loads((args.folder / "args.json").read_text())
    data = Path(settings["dataset"])
    rows = [json.loads(line) for line in (data / "test.jsonl").open()]
    before = answers(Path(settings["model"]), data.name, rows)
    after = answers(args.folder / "model", data.name, rows)
    figures = {}
    for name, texts in (("before", before), ("after", after)):
        figures[name] = mean(tasks.judge(data.name, row, text) for row, text in zip(rows, texts))
        figures[f"words_{name}"] = mean(len(text.split()) for text in texts)
    figures["samples"] = []
    for row, old, new in zip(rows[:SHOWN], before, after):
        question = tasks.question_of(row)
        asked = question if isinstance(question, str) else question[0]["content"]
        figures["samples"].append({"asked": asked, "before": old, "after": new})
    args.json.write_text(json.dumps([figures], indent=1, ensure_ascii=False) + "\n")
    print(f"{data.name}: {figures['before']:.3f} before, {figures['after']:.3f} after")
