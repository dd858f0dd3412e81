"""Four tasks whose data a program makes and whose answers a program judges, one for each way to train a chat model.

| folder | trained by | asked | what is measured on held-out rows |
| --- | --- | --- | --- |
| sums | grpo | "59 + 63 =", after one example | share of right answers |
| comparisons | dpo | "The larger of 850 and 819 is", after one example; the right number is preferred | share of right answers |
| extraction | sft | a sentence about a person, as JSON | share of answers that are that JSON |
| films | rlhf_ppo | to go on with a review; the reward is VADER's | mean of VADER's compound score, -1 to 1 |
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from real import rewards

Row = dict[str, Any]
NUMBERS = {
    "sums": (4000, 400),
    "comparisons": (1000, 200),
    "extraction": (2000, 200),
    "films": (2000, 200),
}  # rows to train on, and held-out rows

NAMES = "Ada Ben Carla David Elena Farid Grace Hugo Ines Jonas Kavya Liam Mira Noah Olga Pablo Quinn Rosa Sven Tara"
CITIES = "Athens Berlin Cairo Dublin Edinburgh Florence Geneva Hanoi Istanbul Jakarta Kyoto Lima Madrid Nairobi Oslo"
JOBS = "baker nurse teacher pilot painter lawyer farmer chemist plumber singer dentist writer"
SENTENCES = (
    "{name} is {age} years old, lives in {city} and works as a {job}.",
    "In {city} we met {name}, a {job} of {age}.",
    "{name}, a {job} who is {age}, has moved to {city}.",
    "At {age}, {name} became a {job} in {city}.",
)
FIRST = "Silent Broken Golden Hidden Last Burning Distant Crooked Winter Paper Hollow Electric"
SECOND = "River Garden Road House Letter Mountain Summer Mirror Orchestra Harbour Station Island"
KINDS = "comedy drama thriller western musical documentary"
BEGINNINGS = (
    'I watched the {kind} "{title}" last night. I thought it was',
    'My review of the {kind} "{title}": the acting is',
    'The new {kind} "{title}" is in cinemas now, and the story is',
)


def sum_row(rng: random.Random) -> Row:
    """One solved sum, and then a sum of two numbers below 100."""
    first, second = rng.randint(10, 99), rng.randint(10, 99)
    return {"prompt": f"12 + 25 = 37\n{first} + {second} =", "answer": str(first + second)}


def comparison_row(rng: random.Random) -> Row:
    """A pair: of two numbers the larger is preferred, after one example."""
    first, second = rng.sample(range(100, 1000), 2)
    larger, smaller = max(first, second), min(first, second)
    prompt = f"The larger of 237 and 682 is 682\nThe larger of {first} and {second} is"
    return {"prompt": prompt, "chosen": f" {larger}", "rejected": f" {smaller}"}


def extraction_row(rng: random.Random) -> Row:
    """A chat: a sentence about a person, and what it says as JSON."""
    person = {
        "name": rng.choice(NAMES.split()),
        "age": rng.randint(18, 80),
        "city": rng.choice(CITIES.split()),
        "job": rng.choice(JOBS.split()),
    }
    sentence = rng.choice(SENTENCES).format(**person)
    question = {"role": "user", "content": f"Write what this says as JSON. {sentence}"}
    return {"messages": [question, {"role": "assistant", "content": json.dumps(person)}]}


def film_row(rng: random.Random) -> Row:
    """The beginning of a film review."""
    title = f"{rng.choice(FIRST.split())} {rng.choice(SECOND.split())}"
    return {"prompt": rng.choice(BEGINNINGS).format(kind=rng.choice(KINDS.split()), title=title)}


ROWS: dict[str, Callable[[random.Random], Row]] = {
    "sums": sum_row,
    "comparisons": comparison_row,
    "extraction": extraction_row,
    "films": film_row,
}


def question_of(row: Row) -> Any:
    """What the model is asked: a text, or messages."""
    return row["prompt"] if "prompt" in row else row["messages"][:1]


def right_answer(task: str, row: Row) -> str:
    """The answer that is right, where there is one."""
    if task == "sums":
        return row["answer"]
    return row["chosen"].strip() if task == "comparisons" else row["messages"][1]["content"]


def judge(task: str, row: Row, answer: str) -> float:
    """1 for a right answer and 0 for any other; for films, the sentiment."""
    if task == "films":
        return rewards.sentiment([row["prompt"]], [answer])[0]
    right = right_answer(task, row)
    if task == "extraction":
        return float(answer.strip() == right)
    return rewards.right_sum([row["prompt"]], [answer], [right])[0]  # the first line counts


def make(task: str) -> tuple[list[Row], list[Row]]:
    """Rows to train on and held-out rows; no two rows ask the same."""
    rng = random.Random(1)
    training, held_out = NUMBERS[task]
    rows: dict[str, Row] = {}
    while len(rows) < training + held_out:
        row = ROWS[task](rng)
        rows[str(question_of(row))] = row
    found = list(rows.values())
    return found[:training], found[training:]


def write(folder: Path) -> None:
    """Write train.jsonl and test.jsonl of each task to a folder of its name."""
    for task in ROWS:
        (folder / task).mkdir(parents=True, exist_ok=True)
        for split, rows in zip(("train", "test"), make(task)):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (folder / task / f"{split}.jsonl").write_text("".join(lines))
