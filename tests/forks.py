"""Runs of a script in copies of the test process, which has imported torch and transformers already.

A new interpreter imports them for many seconds, and torchrun takes three interpreters for two processes.
"""

import atexit
import functools
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from multiprocessing.context import ForkProcess
from pathlib import Path

from accelerate.state import AcceleratorState

MAX_SECONDS = 300
FORCED_FSDP2 = Path(__file__).parent / "forced_fsdp2.py"
WATCH_THE_END = Path(__file__).parent / "watch_the_end.py"


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_as_main(file: Path, flags: list[str], environment: dict[str, str], said: Path) -> None:
    """What a copy does: run a file as `python file flags` would, and write all it prints to a file."""
    os.setsid()  # a process group of its own, as a terminal gives it
    multiprocessing.process._parent_process = None
    at_exit = []  # what a copy would leave out

    def register(function, *arguments, **keywords):
        at_exit.append(functools.partial(function, *arguments, **keywords))
        return function

    atexit.register = register
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    sys.argv = [str(file), *flags]
    os.environ.update(environment)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        runpy.run_path(str(file), run_name="__main__")
    finally:
        if "RANK" not in environment:  # environments in processes of their own are those of control
            for function in at_exit:
                function()


def fork(said: Path, file: Path, *flags: object, **environment: str) -> ForkProcess:
    """Start `python file flags` in a copy of this process."""
    arguments = (file, [str(flag) for flag in flags], environment, said)
    process = multiprocessing.get_context("fork").Process(target=run_as_main, args=arguments)
    process.start()
    return process


def fork_two(said: Path, file: Path, *flags: object) -> str:
    """Run `torchrun --nproc-per-node 2 file flags` to its end; returns what both processes printed."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = [fork(said, file, *flags, RANK=rank, LOCAL_RANK=rank, **group) for rank in "01"]
    deadline = time.monotonic() + MAX_SECONDS
    while any(process.is_alive() for process in processes):
        failed = any(process.exitcode for process in processes)
        if failed or time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.02)
    assert [process.exitcode for process in processes] == [0, 0], said.read_text()
    return said.read_text()
