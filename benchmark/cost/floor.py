"""What share of a script's time its matrix products and attention take: the part that faster code cannot save.

    python benchmark/run.py floor ppo --total-timesteps 20000
    python benchmark/run.py floor rlhf_ppo --total-episodes 128

Any flags of the script. It runs once as it is, in its own process, whose logged speed tells the time of the whole; and
once with every product and attention call recorded, forward and backward. These are then replayed on tensors of the same
shapes and strides, each kind by itself, and the best time of each kind is counted as often as it occurred. On one thread.
The recording is of all of a run, the time of the whole from when its bar appears (dpo.py reads its reference before), to
its last update (grpo.py answers prompts once more after it).
"""

import contextlib
import importlib
import io
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from core import curves
from core.specs import ALGOS
from cost.speed import ONE_THREAD

TAGS = {"sft": "rows_per_second", "reward_model": "pairs_per_second", "dpo": "pairs_per_second",
        "rlhf_ppo": "episodes_per_second", "grpo": "episodes_per_second"}  # fmt: skip
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
REPEATS = 20


def is_product(name: str) -> bool:
    """Whether an operation of torch is a matrix product or attention, by its name."""
    return name in PRODUCTS or "scaled_dot_product" in name


class Recorder(TorchDispatchMode):
    """Counts the products by operation and shapes, and keeps arguments like those of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.calls: dict[str, tuple] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if is_product(operation.overloadpacket.__name__):
            kind = repr((operation, tree_map(layout, (args, kwargs))))
            self.counts[kind] += 1
            if kind not in self.calls:
                self.calls[kind] = operation, tree_map(like, args), tree_map(like, kwargs)
        return operation(*args, **kwargs)


def layout(x: object) -> object:
    """Shape and strides of a tensor; anything else as it is."""
    return (tuple(x.shape), x.stride(), x.dtype) if isinstance(x, Tensor) else x


def like(x: object) -> object:
    """A copy of a tensor with the same strides; anything else as it is."""
    if not isinstance(x, Tensor):
        return x
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    return copy if 0 in x.stride() else copy.copy_(x.detach())  # an expanded one can't be written


def seconds(operation, args: tuple, kwargs: dict) -> float:
    """Best time of one call."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        operation(*args, **kwargs)
        times.append(time.perf_counter() - start)
    return min(times)


def flags_of(script: str, flags: list[str], run_dir: Path) -> list[str]:
    """Flags of a run on the CPU that neither evaluates nor saves before its end."""
    silent = [] if script == "rlhf_ppo" else ["--eval-split", ""] if script in TAGS else ["--eval-episodes", "0"]
    return [*silent, *flags, "--device", "cpu", "--save-every", "0", "--run-dir", str(run_dir)]


def measure(script: str, flags: list[str]) -> None:
    """Print the time of a script and the shares of products and attention."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ALGOS / f"{script}.py", *flags_of(script, flags, Path(folder) / "whole")]
        done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, check=False)
        if done.returncode:
            raise SystemExit(done.stderr.strip() or "no message")
        tag = TAGS.get(script, "charts/SPS")
        steps, speeds, _ = curves.load_run(Path(folder) / "whole", tag)
        settings = json.loads((Path(folder) / "whole" / "args.json").read_text())
        whole = steps[-1] * (settings["batch_size"] if script in TAGS else 1) / speeds[-1]
        torch.set_num_threads(1)
        sys.argv = [f"{script}.py", *flags_of(script, flags, Path(folder) / "recorded")]
        sys.path.insert(0, str(ALGOS))
        module = importlib.import_module(script)
        recorder = Recorder()
        with recorder, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            module.main(*module.parse_args())
    times = {kind: recorder.counts[kind] * seconds(*call) for kind, call in recorder.calls.items()}
    attention = sum(x for kind, x in times.items() if "scaled_dot_product" in kind)
    products = sum(times.values()) - attention
    print(f"{script}: {whole:.2f} s; matrix products {products:.2f} s ({products / whole:.0%}), attention {attention:.2f} s "
          f"({attention / whole:.0%}): {recorder.counts.total():,} calls of {len(times)} kinds")  # fmt: skip
