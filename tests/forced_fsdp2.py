"""Run a script with FSDP2 on CPUs, where accelerate would take DDP: torchrun … forced_fsdp2.py algos/sft.py FLAGS.

The first process prints the class of each model whose weights are all sharded.
"""

import os
import runpy
import sys

import accelerate.accelerator
import torch.distributed
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, fsdp_utils
from torch.distributed.tensor import DTensor

original = AcceleratorState.__init__
prepare_model = fsdp_utils.fsdp2_prepare_model


def shard(self, *arguments, **keywords):
    """The state of a process, with what accelerate sets on GPUs."""
    original(self, *arguments, **keywords)
    if "fsdp_plugin" not in self.__dict__:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        layers = {"auto_wrap_policy": "transformer_based_wrap"}  # each layer is gathered on its own
        self.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **layers)
        if self._mixed_precision == "bf16":
            self.fsdp_plugin.set_mixed_precision("bf16")


def prepare_and_say(accelerator, model):
    """A sharded model, and a line that says so."""
    name = type(model).__name__
    model = prepare_model(accelerator, model)
    if all(isinstance(parameter, DTensor) for parameter in model.parameters()):
        accelerator.print("sharded", name)
    return model


AcceleratorState.__init__ = shard
fsdp_utils.fsdp2_prepare_model = accelerate.accelerator.fsdp2_prepare_model = prepare_and_say
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
assert not torch.distributed.is_initialized()
# FSDP2 keeps gloo's threads past the end of the group, and one that frees a message while Python shuts down aborts
# the process. That is of CPUs only, so leave without Python's shutdown.
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
