"""What several test files need: running a script as a user would, and reading what it wrote."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

REPO = Path(__file__).parent.parent
ALGOS = REPO / "algos"


def command(script: str, *flags: object, processes: int = 1) -> list[str]:
    """Command line of algos/<script>.py, under torchrun for several processes."""
    torchrun = []
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *torchrun, str(ALGOS / f"{script}.py"), *map(str, flags)]


def run(script: str, *flags: object, processes: int = 1, **kwargs) -> subprocess.CompletedProcess:
    """Run a script to its end, on the CPU also where there are GPUs; its output is in .stdout and .stderr."""
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    options = {"env": hidden, "capture_output": True, "text": True, "timeout": 300} | kwargs
    return subprocess.run(command(script, *flags, processes=processes), **options)


def weights(run_dir: Path) -> dict[str, Tensor]:
    """Tensors of the final model of a run."""
    return load_file(run_dir / "model.safetensors")


def scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) of a TensorBoard tag, as TensorBoard shows it (purged points are gone)."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    if tag not in events.Tags()["scalars"]:
        return []
    return [(event.step, event.value) for event in events.Scalars(tag)]


def text(run_dir: Path, tag: str) -> str:
    """The last text under a TensorBoard tag."""
    events = EventAccumulator(str(run_dir))
    events.Reload()
    return events.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode()


def samples_logged(monkeypatch, accelerator: type) -> dict[int, str]:
    """A dict that receives the samples which runs log from now on, by update."""
    original = accelerator.log
    samples = {}

    def log(self, values, step):
        if "samples" in values:
            samples[step] = values["samples"]
        return original(self, values, step)

    monkeypatch.setattr(accelerator, "log", log)
    return samples


def environment(**variables: str) -> dict[str, str]:
    """This process's environment variables with some changed."""
    return os.environ | variables


def spy_on(monkeypatch, owner: object, name: str) -> list[SimpleNamespace]:
    """Replace a function by itself; the list returned receives of each call its arguments, by name, and its `result`."""
    original = getattr(owner, name)
    signature = inspect.signature(original)
    calls = []

    def spy(*arguments, **keywords):
        result = original(*arguments, **keywords)
        named = signature.bind(*arguments, **keywords)
        named.apply_defaults()
        calls.append(SimpleNamespace(**named.arguments, result=result))
        return result

    monkeypatch.setattr(owner, name, spy)
    return calls
