"""What tests of rlhf_ppo.py and grpo.py share: a tiny world, short runs in this process, and calls by argument name."""

import importlib
import signal
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import tiny
import torch
from accelerate.state import AcceleratorState
from helpers import spy_on
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

SCRIPTS = ["rlhf_ppo", "grpo"]
EOS, CPU = 1, torch.device("cpu")
EPOCHS = {"rlhf_ppo": "num_ppo_epochs", "grpo": "num_epochs"}
PROMPTS = 16
SIZES = {
    "device": "cpu",
    "batch_size": 8,
    "num_minibatches": 2,
    "micro_batch_size": 4,
    "total_episodes": 16,
    "response_length": 8,
    "max_length": 64,
    "learning_rate": 1e-2,
}


def reset_state() -> None:
    """Let the next run in this process have an Accelerator of its own, and signals their usual meaning."""
    AcceleratorState._reset_state(reset_partial_state=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def make_reward_model(folder: Path, arch: str = "llama", **labels: int) -> None:
    """Save a reward model whose trunk is no policy's here, with a head that spreads scores."""
    tiny.make_model(folder, arch, seed=7)
    reward_model = AutoModelForSequenceClassification.from_pretrained(folder, **{"num_labels": 1} | labels)
    torch.nn.init.normal_(reward_model.score.weight, std=0.5, generator=torch.Generator().manual_seed(1))
    reward_model.save_pretrained(folder)


def make_world(folder: Path) -> Path:
    """A policy and a reward model of two architectures, and numbered prompts of unequal lengths with some held out."""
    for arch in ("llama", "gpt2"):  # rotary and absolute positions
        tiny.make_model(folder / arch, arch)
        make_reward_model(folder / f"{arch}-reward", arch)
    rows = [{"prompt": row["prompt"], "place": i} for i, row in enumerate(tiny.preferences(PROMPTS))]
    tiny.write_jsonl(folder / "data" / "train.jsonl", rows)
    tiny.write_jsonl(folder / "data" / "test.jsonl", rows[:5])
    return folder


def flags_of(world: Path, script: str, run_dir: Path, **changed: object) -> dict[str, object]:
    """Flags of a run of two updates: 8 responses each, four steps of the optimiser."""
    flags = {
        "model": str(world / "llama"),
        "reward_model": str(world / "llama-reward"),
        "dataset": str(world / "data"),
        "run_dir": str(run_dir),
        **SIZES,
    }
    flags[EPOCHS[script]] = 2
    if script == "grpo":
        flags["group_size"] = 4
    return flags | changed


ONE_STEP = {"num_minibatches": 1, "total_episodes": 8}


def one_step(script: str) -> dict[str, int]:
    """Flags of a run with a single step of the optimiser."""
    return ONE_STEP | {EPOCHS[script]: 1}


def train(monkeypatch, script: str, flags: dict, names: tuple = (), saved: dict | None = None) -> SimpleNamespace:
    """Run main in this process; the calls of its functions `names`, and of sample as `rollouts`, evaluations left out."""
    module = importlib.import_module(script)
    reset_state()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])  # which a reward function's folder joins
        calls = {name: spy_on(patch, module, name) for name in [*names, "sample"]}
        module.main(module.Args(**flags), saved)
    seen = SimpleNamespace(**calls)
    seen.rollouts = [call for call in seen.sample if len(call.prompts) == flags["batch_size"]]
    return seen


def rows_of(rollout: SimpleNamespace) -> list[list[list[int]]]:
    """Rows [prompt, response] of a call of sample."""
    return [[prompt, response] for prompt, response in zip(rollout.prompts, rollout.result)]


def final(run_dir: Path) -> dict[str, Tensor]:
    """Tensors of the final model of a run."""
    return load_file(run_dir / "model" / "model.safetensors")


def critic_of(run_dir: Path, step: int) -> dict[str, Tensor]:
    """Tensors of the critic in a checkpoint of rlhf_ppo.py, named as in a reward model's file."""
    tensors = load_file(run_dir / "checkpoint" / str(step) / "model_1.safetensors")
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two models have the same tensors bit for bit."""
    if a.keys() != b.keys():
        return False
    return all(torch.equal(a[name], b[name]) for name in a)


def first_gradient(run_dir: Path, step: int = 1) -> Tensor:
    """All numbers of the gradient of a run's only step, as Adam's first moments keep it."""
    gradients = []
    for file in sorted((run_dir / "checkpoint" / str(step)).glob("optimizer*.bin")):
        state = torch.load(file, weights_only=True)["state"]
        gradients += [10 * moments["exp_avg"].flatten() for moments in state.values()]
    return torch.cat(gradients)


def load_prompts(module: ModuleType, folder: Path, rows: list[dict], tokenizer, max_length: int = 64, **more) -> list:
    """What load_prompts of a script makes of rows of columns."""
    path = tiny.write_jsonl(folder / "rows.jsonl", rows)
    return module.load_prompts(str(path), "train", tokenizer, max_length, **more)
