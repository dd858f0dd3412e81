"""Run a script with FSDP2 on CPUs, where accelerate would take DDP: torchrun … forced_fsdp2.py algos/sft.py FLAGS."""

import runpy
import sys

import torch.distributed
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

original = AcceleratorState.__init__


def shard(self, *arguments, **keywords):
    """The state of a process, with what accelerate sets on GPUs."""
    original(self, *arguments, **keywords)
    if "fsdp_plugin" not in self.__dict__:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        layers = {"auto_wrap_policy": "transformer_based_wrap"}  # each layer is gathered on its own
        self.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **layers)


AcceleratorState.__init__ = shard
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
assert not torch.distributed.is_initialized()  # its threads may abort a process that leaves it open
