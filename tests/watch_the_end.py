"""Run a script, and fail unless its wrapped models are gone when its processes part: watch_the_end.py algos/sft.py FLAGS.

A wrapped model that goes later takes torch's group of processes along, and may wait for ever: Python's lock is held
while torch joins a thread that needs it to free its last message.
"""

import gc
import runpy
import sys

from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

end_training = Accelerator.end_training


def check_and_end(self):
    """Accelerator.end_training, once no wrapped model is left."""
    assert not [each for each in gc.get_objects() if type(each) is DistributedDataParallel]
    end_training(self)


Accelerator.end_training = check_and_end
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
