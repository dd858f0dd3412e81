"""How time and memory of each script grow when environments, batch, sequence length or vocabulary double.

    python benchmark/run.py growth             # everything, about 15 minutes on one core
    python benchmark/run.py growth 'dqn *'     # some rows

Each row is a short run of its own on one thread of the CPU: the speed by what the script logs, start-up not counted,
and the largest resident memory of the process, of which about 0.4 GB (control) or 0.6 GB (language) are the libraries.
Lengths: reviews strung together to L tokens; vocabularies: the shipped models with rows for more tokens.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from core import curves, specs
from core.report import table
from core.specs import ALGOS
from cost.speed import ONE_THREAD, rate
from world import ASSETS

UPDATES = 12  # of a language script's run
SAMPLERS = ("rlhf_ppo", "grpo")  # they train on their own texts
UNITS = {"sft": "rows", "reward_model": "pairs", "dpo": "pairs"}  # of speeds; control: steps
UNITS |= dict.fromkeys(SAMPLERS, "episodes")


@dataclass(frozen=True)
class Row:
    """A script, what is doubled in it, and the sizes."""

    script: str
    what: str
    flag: str
    """of the size; empty: the size is that of the data or the models"""
    sizes: tuple[int, ...]

    @property
    def name(self) -> str:
        """As given on the command line."""
        return f"{self.script} {self.what}"


ROWS = [Row(script, "environments", "--num-envs", (8, 16, 32, 64)) for script in ("dqn", "reinforce", "a2c", "ppo")]
ROWS.append(Row("dqn", "batch", "--batch-size", (128, 256, 512, 1024)))
ROWS.append(Row("a2c", "batch", "--num-steps", (5, 10, 20, 40)))
ROWS.append(Row("ppo", "batch", "--num-steps", (32, 64, 128, 256)))
for script in ("sft", "reward_model", "dpo", *SAMPLERS):
    batches = (64, 128, 256, 512) if script in SAMPLERS else (32, 64, 128, 256)
    ROWS.append(Row(script, "batch", "--batch-size", batches))
    ROWS.append(Row(script, "sequence length", "", (32, 64, 128, 256)))
    ROWS.append(Row(script, "vocabulary", "", (1024, 2048, 4096, 8192)))


# --- inputs of other sizes ---


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """A jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def strung(words: Iterator[str], tokens: int) -> str:
    """The next `tokens` words: a token of the small world is a word or a full stop."""
    return " ".join(itertools.islice(words, tokens))


def long_data(script: str, tokens: int, folder: Path) -> Path:
    """Data of the script's kind whose rows have about `tokens` tokens."""
    reviews = [json.loads(line)["completion"] for line in (ASSETS / "reviews" / "test.jsonl").open()]
    words = itertools.cycle(" ".join(reviews).split())
    number = 64 * UPDATES
    if script == "sft":
        return write_rows(folder / "data.jsonl", [{"text": strung(words, tokens)} for _ in range(number)])
    prompt = "the plot was dull ."
    pairs = [(strung(words, tokens - 5), strung(words, tokens - 5)) for _ in range(number)]
    rows = [{"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"} for chosen, rejected in pairs]
    return write_rows(folder / "data.jsonl", rows)


def wide_model(source: Path, tokens: int, folder: Path) -> Path:
    """A shipped model and tokenizer with rows for `tokens` tokens."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, logging

    logging.disable_progress_bar()
    kind = AutoModelForSequenceClassification if source.name == "reward" else AutoModelForCausalLM
    model = kind.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens([f"word{i}" for i in range(tokens - len(tokenizer))])
    model.resize_token_embeddings(tokens, mean_resizing=False)
    model.save_pretrained(folder / source.name)
    tokenizer.save_pretrained(folder / source.name)
    return folder / source.name


def flags_of(row: Row, size: int, folder: Path) -> list[str]:
    """Command line of one run."""
    sized = [row.flag, str(size)] if row.flag else []
    if row.script == "dqn":
        return [*sized, "--total-timesteps", "40000", "--eval-episodes", "0"]
    if row.script in ("reinforce", "a2c", "ppo"):
        return [*sized, "--total-timesteps", str(max(60_000, 300 * size)), "--eval-episodes", "0"]
    if row.script in SAMPLERS:
        if row.what == "sequence length":  # random weights seldom stop
            sized = ["--response-length", str(size), "--model", str(ASSETS / "base")]
        if row.what == "vocabulary":
            policy = wide_model(ASSETS / "sft", size, folder)
            scorer = wide_model(ASSETS / "reward", size, folder)
            sized = ["--model", str(policy), "--reward-model", str(scorer)]
        return [*sized, "--total-episodes", str(2 * size if row.what == "batch" else 256)]
    steps = ["--max-steps", str(UPDATES), "--eval-split", ""]
    if row.what == "sequence length":
        sized = ["--dataset", str(long_data(row.script, size, folder)), "--max-length", str(size)]
    if row.what == "vocabulary":
        sized = ["--model", str(wide_model(ASSETS / "sft", size, folder))]
    return [*sized, *steps]


# --- runs ---


def run(row: Row, size: int) -> dict[str, float]:
    """Speed and peak memory in GB of one run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, ALGOS / f"{row.script}.py", *flags_of(row, size, folder), "--device", "cpu",
                   "--run-dir", folder / "run"]  # fmt: skip
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(command, env=ONE_THREAD, stdout=log, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            last = (folder / "log").read_text().strip().splitlines()[-1]
            raise SystemExit(f"error: {row.name} {size}: {last}")
        if row.script in UNITS:
            speed = rate(folder / "run", f"{UNITS[row.script]}_per_second")
        else:
            speed = float(curves.load_run(folder / "run", "charts/SPS")[1][-1])
    return {"speed": round(speed, 1), "gigabytes": round(usage.ru_maxrss / 2**20, 2)}


def measure(patterns: list[str]) -> None:
    """Run the rows that match, print and keep what they need."""
    chosen = [row for row in ROWS if not patterns or specs.is_named(row.name, patterns)]
    if not chosen:
        raise SystemExit(f"error: no row is called {patterns[0]}: {', '.join(row.name for row in ROWS)}")
    for row in chosen:
        found = {}
        for size in row.sizes:
            found[str(size)] = cost = run(row, size)
            print(f"{row.name} {size}: {cost['speed']:,.0f} {unit(row)}, {cost['gigabytes']} GB", flush=True)
        specs.keep("growth", specs.results("growth") | {row.name: found})


def unit(row: Row) -> str:
    """Of its speeds."""
    return f"{UNITS.get(row.script, 'steps')}/s"


def section() -> str:
    """Time and memory as sizes double, for the report."""
    found, rows = specs.results("growth"), []
    for row in ROWS:
        sizes = found.get(row.name, {})
        cells = [f"{size}: {x['speed']:,.0f} {unit(row)}, {x['gigabytes']:.2f} GB" for size, x in sizes.items()]
        rows += [[f"{row.script}.py", f"{row.what} (`{row.flag}`)" if row.flag else row.what, *cells]] if cells else []
    if not rows:
        return ""
    header = ["script", "what doubles", "", "", "", ""]
    return (
        "## How cost grows\n\nSpeed at the end of short runs on one thread and peak resident memory, libraries "
        "included (`run.py growth`; what each row runs is in `cost/growth.py`). The machine had other work: compare "
        "within a row.\n\n" + table(header, rows)
    )
