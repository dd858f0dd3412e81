"""The command-line contract of the control scripts: what a run leaves, resume, signals, bad input, environments.

Scripts run in this process, through their own command line, unless the process itself is what is tested.
"""

import contextlib
import importlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import cv2
import gymnasium
import numpy as np
import probe_envs
import pytest
import torch
from forks import fork
from helpers import ALGOS, environment, scalars, spy_on, text, weights
from tensorboard.summary.writer import event_file_writer
from tqdm import tqdm

DQN_SIZES = ["--learning-starts", 100, "--buffer-size", 800, "--batch-size", 16,
             "--train-every", 8, "--target-every", 50, "--max-grad-norm", 0,
             "--exploration-fraction", 0.5, "--epsilon-end", 0.05]  # fmt: skip
SHORT = {  # flags of a short run with several updates and checkpoints
    "reinforce": ["--num-envs", 4, "--normalize"],
    "a2c": ["--num-envs", 4, "--normalize"],
    "ppo": ["--num-envs", 4, "--num-steps", 16, "--normalize"],
    "dqn": ["--num-envs", 4, *DQN_SIZES],
}
HALF, WHOLE = 600, 1200  # steps of a checkpoint to resume, and of the whole run
COMMON = ["--device", "cpu", "--env-id", "probe_envs:Noise-v0", "--save-every", 250, "--eval-episodes", 2]
LEARNING_RATE = 0.01
LEFT = {"args.json", "checkpoint.pt", "checkpoint.tmp", "model.safetensors", "events"}
MAX_SECONDS = 200  # of a process, on a busy machine
TABLE = ["--num-envs", 4, "--env-id", "FrozenLake-v1", "--save-every", 250, "--eval-episodes", 2]  # of q_learning
scripts = pytest.mark.parametrize("script", SHORT)
all_five = pytest.mark.parametrize("script", [*SHORT, "q_learning"])
policy_gradients = pytest.mark.parametrize("script", ["reinforce", "a2c", "ppo"])
# the thread that writes the events of a run that died does so once its folder is gone
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(autouse=True)
def as_a_user(tmp_path, monkeypatch):
    """Run in an empty folder, and undo what a script does to the process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)


def invoke(script, *flags):
    """Run `algos/<script>.py flags` in this process."""
    module = importlib.import_module(script)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(ALGOS / f"{script}.py"), *map(str, flags)])
        module.main(*module.parse_args())


def train(script, run_dir, *flags, steps=WHOLE):
    """A short run of a script, where later flags win; returns its weights."""
    short = TABLE if script == "q_learning" else [*COMMON, *SHORT[script], "--learning-rate", LEARNING_RATE]
    invoke(script, *short, "--total-timesteps", steps, "--run-dir", run_dir, *flags)
    return weights(Path(run_dir))


def resume(script, half, copy, *flags):
    """Go on from a copy of a run directory; returns the weights."""
    shutil.copytree(half, copy)
    invoke(script, "--resume", copy, "--total-timesteps", WHOLE, *flags)
    return weights(Path(copy))


def load(run_dir):
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)


def args_of(run_dir):
    return json.loads((Path(run_dir) / "args.json").read_text())


def contents(run_dir):
    """Bytes of each file of a folder."""
    return {path.name: path.read_bytes() for path in Path(run_dir).rglob("*") if path.is_file()}


def same(a, b):
    """Whether two nested states hold the same numbers, bit for bit."""
    if isinstance(a, dict):
        if not isinstance(b, dict) or a.keys() != b.keys():
            return False
        return all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """once(script, steps): run directory of a short run of so many steps, made once; nobody may write into it."""
    event_file_writer._global_uid = event_file_writer.AtomicCounter(1000)  # TensorBoard reads files in order of names
    made = {}

    def get(script, steps):
        if (script, steps) not in made:
            made[script, steps] = tmp_path_factory.mktemp(script) / "run"
            train(script, made[script, steps], steps=steps)
        return made[script, steps]

    return get


# --- what a run leaves behind ---


@scripts
def test_a_run_leaves_arguments_events_a_checkpoint_and_a_model_with_the_users_permissions(script, capsys):
    before = os.umask(0o027)
    try:
        agent = train(script, "run")
    finally:
        os.umask(before)
    out = capsys.readouterr().out
    assert out.startswith("run directory: run\n")
    assert "over 2 greedy episodes" in out
    files = list(Path("run").iterdir())
    names = sorted(path.name.split(".tfevents")[0] for path in files)
    assert names == ["args.json", "checkpoint.pt", "events.out", "model.safetensors"]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}
    state = load("run")
    assert state["script"] == script
    assert WHOLE <= state["step"] < WHOLE + 100
    assert args_of("run") == state["args"]
    assert state["args"]["total_timesteps"] == WHOLE
    assert same(state["agent"], agent)
    for tag in (
        "charts/episodic_return",
        "charts/episodic_length",
        "charts/SPS",
        "eval/return_mean",
        "eval/return_std",
    ):
        points = scalars(Path("run"), tag)
        assert points, tag
        assert all(math.isfinite(value) for _, value in points), tag
    steps = [step for step, _ in scalars(Path("run"), "charts/SPS")]
    assert steps == sorted(set(steps))
    assert steps[-1] == state["step"]


@scripts
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(once, script):
    whole = weights(once(script, WHOLE))
    assert same(train(script, "again"), whole)
    assert not same(train(script, "other", "--seed", 2), whole)


@all_five
def test_three_runs_of_one_second_without_a_name_all_live_in_folders_of_plain_names(script, monkeypatch):
    """For an environment whose id has a colon and a slash, which some file systems refuse."""
    module = importlib.import_module(script)

    class Clock(module.datetime):
        ticks = itertools.count()

        @classmethod
        def now(cls, tz=None):
            return cls(2026, 11, 25, 12, 0, 0, 100 * next(cls.ticks))

    monkeypatch.setattr(module, "datetime", Clock)
    flags = SHORT.get(script, [])
    for _ in range(3):
        invoke(script, *flags, "--env-id", "probe_envs:mine/State-v0", "--total-timesteps", 200, "--eval-episodes", 0)
    names = [f"probe_envs_mine_State-v0__{script}__1__20261125-120000-000{hundreds}00" for hundreds in range(3)]
    assert sorted(path.name for path in Path("runs").iterdir()) == names
    assert all(Path("runs", name, "model.safetensors").exists() for name in names)


@all_five
def test_args_json_is_json_for_every_reader_and_says_what_the_checkpoint_says(once, script):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON (RFC 8259)")

    run_dir = once(script, HALF)
    written = json.loads((run_dir / "args.json").read_text(), parse_constant=refuse)
    assert written == load(run_dir)["args"]
    assert written["total_timesteps"] == HALF
    if script == "dqn":
        assert written["max_grad_norm"] == 0  # no clip


@all_five
def test_the_flags_stand_in_tensorboard_as_text(once, script):
    run_dir = once(script, HALF)
    block = text(run_dir, "flags")
    assert block.startswith("```\n")
    assert block.endswith("\n```")
    assert json.loads(block.strip("`")) == args_of(run_dir)


# --- saving and resuming ---


@scripts
@pytest.mark.parametrize("every", [0, 1, 90])
def test_the_weights_are_the_same_whatever_save_every_is(once, script, every):
    assert same(train(script, "run", "--save-every", every), weights(once(script, WHOLE)))


@all_five
def test_checkpoints_are_written_when_a_multiple_of_save_every_is_passed_and_at_both_ends(script, monkeypatch):
    calls = spy_on(monkeypatch, importlib.import_module(script), "save_checkpoint")
    train(script, "run", "--save-every", 250)
    first, *multiples, last = [call.step for call in calls]
    assert first == 0
    assert [step // 250 for step in multiples] == [1, 2, 3, 4]
    assert last >= WHOLE


@scripts
def test_logged_returns_are_right_whatever_save_every_is(script):
    """Episodes of 200 and 5 steps in turn, each step worth 1; the longer ones outlast several checkpoints."""
    means = []
    for every in (0, 40):
        train(script, f"run{every}", "--env-id", "probe_envs:Alternating-v0", "--save-every", every, steps=2460)
        run_dir = Path(f"run{every}")
        numbers = dict(scalars(run_dir, "charts/episodes"))
        sums = {step: value * numbers[step] for step, value in scalars(run_dir, "charts/episodic_return")}
        lengths = {step: value * numbers[step] for step, value in scalars(run_dir, "charts/episodic_length")}
        assert all(sums[step] == pytest.approx(lengths[step], rel=1e-5) for step in sums)
        means.append((sum(numbers.values()), sum(sums.values())))
    assert means[0] == pytest.approx(means[1], rel=1e-5)
    assert means[0][1] / means[0][0] == pytest.approx(102.5, rel=0.15)


@scripts
def test_two_resumptions_of_one_checkpoint_give_the_same_weights_from_the_folder_or_the_file(once, script):
    half = once(script, HALF)
    before = contents(half)
    resumed = resume(script, half, "folder")
    shutil.copytree(half, "file")
    invoke(script, "--resume=file/checkpoint.pt", "--total-timesteps", WHOLE)
    assert same(weights(Path("file")), resumed)
    assert not same(resumed, weights(half))  # it learnt, in its own folder
    assert contents(half) == before
    assert args_of("folder")["run_dir"] == "folder"
    assert load("folder")["step"] >= WHOLE


@scripts
def test_a_resumed_run_starts_from_all_that_the_checkpoint_holds(once, script):
    half = load(once(script, HALF))
    resumed = resume(script, once(script, HALF), "run", "--save-every", 0)
    assert half.keys() - {"args", "rng", "agent", "optimizer", "step", "script"} <= {"target_network", "buffer"}
    shutil.copy(once(script, HALF) / "checkpoint.pt", "copy.pt")  # which begins a run that is saved before a step
    invoke(script, "--resume", "copy.pt", "--run-dir", "still")
    new = {"args", "rng", "buffer"}  # where new episodes began: the seed of the environments, their first observations
    assert all(same(load("still")[key], half[key]) for key in half.keys() - new)
    if script != "dqn":
        assert half["agent"]["obs_norm.count"] >= HALF
        assert half["agent"]["obs_norm.mean"].min() > 40
    # and each part of it counts
    for key in half.keys() - {"args", "script"}:
        shutil.copytree(once(script, HALF), f"other_{key}")
        torch.save(half | {key: changed(half[key])}, f"other_{key}/checkpoint.pt")
        invoke(script, "--resume", f"other_{key}", "--total-timesteps", WHOLE)
        assert not same(weights(Path(f"other_{key}")), resumed), key


def changed(state):
    """A state with other numbers."""
    if isinstance(state, dict):
        return {key: changed(value) if key != "param_groups" else value for key, value in state.items()}
    if isinstance(state, torch.Tensor) and state.dtype == torch.uint8:  # of the random numbers
        return torch.Generator().manual_seed(1234).get_state()
    if isinstance(state, torch.Tensor):
        return state * 0.5 if state.is_floating_point() else state
    return state + 200 if isinstance(state, int) else state


def fill_the_disk(patch, script, moment):
    """From now on the disk is full when a checkpoint is opened, written, flushed or put in place."""

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    def tear(state, file):
        file.write(b"the first half")
        fail()

    def open_full(path, mode):
        path.touch()
        return open("/dev/full", mode)

    module = importlib.import_module(script)
    if moment == "opening":
        patch.setattr(module, "open", fail, raising=False)
    if moment == "writing":
        patch.setattr(torch, "save", tear)
    if moment == "flushing":
        patch.setattr(module, "open", open_full, raising=False)
    if moment == "replacing":
        patch.setattr(Path, "replace", fail)


@all_five
@pytest.mark.parametrize("moment", ["opening", "writing", "flushing", "replacing"])
def test_a_full_disk_ends_a_run_in_a_sentence_and_leaves_the_former_checkpoint_whole(once, script, moment, monkeypatch):
    shutil.copytree(once(script, HALF), "run")
    before = contents("run")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        fill_the_disk(patch, script, moment)
        invoke(script, "--resume", "run", "--total-timesteps", HALF + 100)
    sentence = str(stop.value)
    assert sentence.startswith("run cannot be saved: ")
    assert "No space left on device" in sentence
    after = contents("run")
    assert "checkpoint.tmp" not in after
    assert after["checkpoint.pt"] == before["checkpoint.pt"]
    assert after["args.json"] == before["args.json"]


@all_five
def test_a_run_whose_disk_was_full_goes_on_as_if_nothing_had_happened(once, script, monkeypatch):
    shutil.copytree(once(script, HALF), "run")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        fill_the_disk(patch, script, "writing")
        invoke(script, "--resume", "run", "--total-timesteps", WHOLE)
    invoke(script, "--resume", "run", "--total-timesteps", WHOLE)
    assert same(weights(Path("run")), resume(script, once(script, HALF), "other"))


def child(script, flags):
    """A run in another process, without its noise."""
    for number, stream in ((1, os.devnull), (2, "stderr")):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    invoke(script, *flags)


@scripts
def test_a_run_killed_at_any_moment_leaves_a_checkpoint_that_loads_and_resumes(script, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ALGOS), os.environ["PYTHONPATH"]]))
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["test_contract", *SHORT])
    short = [*COMMON, *SHORT[script], "--total-timesteps", WHOLE, "--save-every", 30]
    for moment in [0.01, random.uniform(0, 1)]:
        run_dir = Path(f"run{moment}")
        process = processes.Process(target=child, args=(script, [*short, "--run-dir", run_dir]))
        process.start()
        while not run_dir.exists() and process.is_alive():
            process.join(0.001)
        process.join(moment)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), Path("stderr").read_text()
        assert {name.split(".out")[0] for name in contents(run_dir)} <= LEFT
        if "checkpoint.pt" in contents(run_dir):
            invoke(script, "--resume", run_dir, "--save-every", 0)
        else:
            invoke(script, *short, "--save-every", 0, "--run-dir", run_dir)
        assert load(run_dir)["step"] >= WHOLE
        assert weights(run_dir)
        assert set(contents(run_dir)) >= {"args.json", "checkpoint.pt", "model.safetensors"}


def pretend_wandb(monkeypatch):
    """Put a module in the place of wandb; returns the arguments that its init is called with."""
    given = {}
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = ModuleSpec("wandb", None)
    wandb.init = given.update
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return given


# every flag of the scripts: another value, and what it does to the weights of a resumed run
GIVEN_ON_RESUME = {
    "seed": (7, "other weights"),
    "device": ("auto", "the same weights"),
    "run_dir": ("elsewhere", "the same weights"),
    "save_every": (1, "the same weights"),
    "track": (True, "the same weights"),
    "compile": (True, "the same weights"),
    "eval_episodes": (3, "the same weights"),
    "capture_video": (True, "the same weights"),
    "env_id": ("probe_envs:Against-v0", "other weights"),
    "env_kwargs": ('{"direction": -1}', "other weights"),
    "total_timesteps": (WHOLE + 200, "other weights"),
    "num_envs": (5, "other weights"),
    "normalize": (False, "refused"),
    "log_std_init": (-0.5, "the same weights"),  # those of the checkpoint
    "learning_rate": (0.02, "other weights"),
    "anneal_lr": (None, "other weights"),  # what it was not before
    "num_steps": (12, "other weights"),
    "num_minibatches": (3, "other weights"),
    "num_epochs": (2, "other weights"),
    "gamma": (0.5, "other weights"),
    "gae_lambda": (0.5, "other weights"),
    "clip_coef": (0.001, "other weights"),
    "target_kl": (1e-9, "other weights"),
    "ent_coef": (0.1, "other weights"),
    "vf_coef": (0.1, "other weights"),
    "loss": ("huber", "other weights"),
    "max_grad_norm": (0.1, "other weights"),
    "batch_size": (8, "other weights"),
    "train_every": (5, "other weights"),
    "learning_starts": (900, "other weights"),
    "buffer_size": (700, "refused"),
    "target_every": (30, "other weights"),
    "epsilon_end": (0.9, "other weights"),
    "exploration_fraction": (0.9, "other weights"),
}


@scripts
def test_every_flag_given_on_resume_counts_or_is_refused_and_args_json_says_what_ran(once, script, monkeypatch):
    module = importlib.import_module(script)
    half = once(script, HALF)
    pretend_wandb(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: f)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module.wrap, "RecordVideo", lambda envs, *_, **__: envs)
    resumed = resume(script, half, "plain")
    for name in module.Args.__dataclass_fields__.keys() - {"resume"}:
        old = args_of(half).get(name)
        value, effect = GIVEN_ON_RESUME[name]
        if script == "dqn" and name == "num_envs":
            effect = "refused"  # the replay buffer is made of them
        if name == "anneal_lr":
            value = not old
        assert value != old, name
        flag = "--" + name.replace("_", "-")
        given = [flag, value]
        if isinstance(value, bool):
            given = [flag] if value else [f"--no-{flag[2:]}"]
        folder = Path("elsewhere") if name == "run_dir" else Path(f"with_{name}")
        if effect == "refused":
            with pytest.raises(SystemExit, match=f"(^|: ){flag} (cannot change|and the spaces of .* must be the same)"):
                resume(script, half, folder, *given)
            assert args_of(folder) == args_of(half), name
            assert same(load(folder), load(half)), name
            continue
        resume(script, half, f"with_{name}", *given)
        assert args_of(folder)[name] == load(folder)["args"][name] == value, name
        expected = args_of("plain") | {name: value, "run_dir": str(folder), "resume": f"with_{name}"}
        assert args_of(folder) == expected, name
        assert same(weights(folder), resumed) == (effect == "the same weights"), f"{flag} must give {effect}"


@scripts
def test_a_learning_rate_given_on_resume_is_the_optimisers(once, script):
    resume(script, once(script, HALF), "run", "--learning-rate", 0.125, "--no-anneal-lr")
    assert load("run")["optimizer"]["param_groups"][0]["lr"] == 0.125


@scripts
def test_steps_per_second_of_a_resumed_run_are_its_own(once, script, monkeypatch):
    half = once(script, HALF)
    times = iter([0.0])
    clock = types.SimpleNamespace(perf_counter=lambda: next(times, 2.0))
    monkeypatch.setattr(importlib.import_module(script), "time", clock)
    resume(script, half, "run")
    last, speed = scalars(Path("run"), "charts/SPS")[-1]
    assert speed == pytest.approx((last - load(half)["step"]) / 2)


@scripts
def test_the_learning_rate_falls_over_the_steps_of_a_run_and_its_resumption_together(once, script):
    done = load(once(script, HALF))["step"]
    resume(script, once(script, HALF), "run", "--anneal-lr", "--total-timesteps", done + 1)
    assert load("run")["optimizer"]["param_groups"][0]["lr"] == pytest.approx(LEARNING_RATE / (done + 1))


@scripts
def test_a_finished_run_is_only_evaluated_and_trains_on_when_more_steps_are_asked_for(once, script, capsys):
    shutil.copytree(once(script, HALF), "run")
    before = load("run")
    invoke(script, "--resume", "run", "--eval-episodes", 5, "--learning-rate", 7)
    assert "over 5 greedy episodes" in capsys.readouterr().out
    after = load("run")
    assert args_of("run") == args_of(once(script, HALF))  # which made the weights
    assert all(same(after[key], before[key]) for key in ("agent", "optimizer", "step", "rng"))
    assert same(weights(Path("run")), weights(once(script, HALF)))
    assert len(scalars(Path("run"), "charts/SPS")) == len(scalars(once(script, HALF), "charts/SPS"))
    invoke(script, "--resume", "run", "--total-timesteps", WHOLE)
    assert load("run")["step"] >= WHOLE
    assert not same(weights(Path("run")), before["agent"])


@scripts
def test_events_past_the_checkpoint_are_purged_on_resume(once, script):
    shutil.copytree(once(script, HALF), "run")
    shutil.copy("run/checkpoint.pt", "older.pt")
    invoke(script, "--resume", "run", "--total-timesteps", WHOLE, "--save-every", 50)
    longer = [step for step, _ in scalars(Path("run"), "charts/SPS")]
    shutil.copy("older.pt", "run/checkpoint.pt")  # as if the run had died after its last points were logged
    invoke(script, "--resume", "run", "--total-timesteps", HALF + 200, "--save-every", 0)
    steps = [step for step, _ in scalars(Path("run"), "charts/SPS")]
    assert steps[-1] == load("run")["step"] < longer[-1]
    assert steps == sorted(set(steps))
    before = {step for step, _ in scalars(once(script, HALF), "charts/SPS")}
    purged = set(longer) - before - {steps[-1]}
    assert not set(steps) & purged


@pytest.mark.parametrize("script", ["dqn", "q_learning"])
def test_a_resumed_run_says_where_epsilon_goes_on(once, script, capsys):
    """Of HALF steps, the first half lowers ε; HALF + 4 steps of 4·HALF are half of the first half."""
    end = {"dqn": 0.05, "q_learning": 0.1}[script]
    shutil.copytree(once(script, HALF), "run")
    capsys.readouterr()
    for flags, epsilon in ([], end), (["--total-timesteps", 4 * HALF, "--save-every", 0], (1 + end) / 2):
        invoke(script, "--resume", "run", *flags)
        said = re.search(r"epsilon goes on at (\S+): --exploration-fraction is a share", capsys.readouterr().out)
        assert float(said[1]) == pytest.approx(epsilon, abs=0.01)


@all_five
def test_a_checkpoint_of_another_script_is_refused_in_a_sentence(once, script):
    torch.save(load(once(script, HALF)) | {"script": "sarsa"}, "foreign.pt")
    with pytest.raises(SystemExit, match=f"--resume foreign.pt: written by sarsa.py, not {script}.py"):
        invoke(script, "--resume", "foreign.pt")


@all_five
def test_what_is_no_checkpoint_is_said_to_be_damaged(once, script):
    whole = (once(script, HALF) / "checkpoint.pt").read_bytes()
    for folder, left in (("torn", whole[: len(whole) // 2]), ("blank", b""), ("text", b"hello")):
        Path(folder).mkdir()
        Path(folder, "checkpoint.pt").write_bytes(left)
        with pytest.raises(SystemExit) as refusal:
            invoke(script, "--resume", folder)
        sentence = str(refusal.value)
        assert sentence.startswith(f"--resume {folder}: {folder}/checkpoint.pt is damaged or not a checkpoint (")
        assert "\n" not in sentence
        assert contents(folder) == {"checkpoint.pt": left}


@all_five
def test_weights_alone_are_no_checkpoint(once, script):
    model = once(script, HALF) / "model.safetensors"
    torch.save(weights(once(script, HALF)), "weights.pt")
    for path in (model, "weights.pt"):
        with pytest.raises(SystemExit, match=rf"^--resume {path}: {path} is damaged or not a checkpoint \(\w+\)$"):
            invoke(script, "--resume", path)


@all_five
@pytest.mark.parametrize("path", ["empty", "nowhere", "nowhere/checkpoint.pt"])
def test_a_place_without_a_checkpoint_is_said_to_hold_no_run(script, path):
    Path("empty").mkdir()
    with pytest.raises(SystemExit, match=f"^--resume {path}: there is no run in {path}$"):
        invoke(script, "--resume", path)
    assert not Path("nowhere").exists()
    assert not contents("empty")


# --- run directories ---


@scripts
def test_a_copy_of_a_checkpoint_begins_a_run_of_its_own_beside_the_one_it_lies_in(once, script):
    shutil.copytree(once(script, HALF), "run")
    shutil.copy("run/checkpoint.pt", "run/older.pt")
    before = contents("run")
    invoke(script, "--resume", "run/older.pt", "--total-timesteps", WHOLE)
    assert contents("run") == before
    (own,) = Path("runs").iterdir()
    assert load(own)["step"] >= WHOLE


@scripts
def test_what_was_logged_at_the_checkpoints_own_step_stays_on_resume(once, script):
    shutil.copytree(once(script, HALF), "run")
    logged = scalars(Path("run"), "charts/SPS")
    invoke(script, "--resume", "run", "--total-timesteps", WHOLE)
    assert scalars(Path("run"), "charts/SPS")[: len(logged)] == logged


@scripts
def test_a_folder_that_holds_a_run_is_never_overwritten(once, script, monkeypatch):
    shutil.copytree(once(script, HALF), "run")
    before = contents("run")
    with pytest.raises(SystemExit, match="run holds a run: choose another --run-dir, or .*--resume run"):
        train(script, "run")
    with pytest.raises(SystemExit, match="run holds a run"):
        resume(script, once(script, HALF), "other", "--run-dir", "run")
    shutil.copy("run/checkpoint.pt", "copy.pt")  # of an earlier moment, say
    monkeypatch.chdir("run")
    with pytest.raises(SystemExit, match=". holds a run"):
        invoke(script, "--resume", "../copy.pt", "--run-dir", ".")
    assert contents(".") == before


@scripts
@pytest.mark.parametrize("name", ["copy/", "./copy", "copy/../copy", "absolute"])
def test_a_resumed_run_may_name_its_own_folder_in_any_way(once, script, name):
    run_dir = Path("copy").absolute() if name == "absolute" else name
    resume(script, once(script, HALF), "copy", "--run-dir", run_dir, "--total-timesteps", WHOLE)
    assert load("copy")["step"] >= WHOLE


@scripts
@pytest.mark.parametrize("fault", ["an environment that cannot be reset", "no event file", "a full disk"])
def test_a_crash_before_training_leaves_a_folder_that_can_be_used_or_resumed(script, fault, monkeypatch):
    flags = ["--env-id", "probe_envs:Trouble-v0"]
    with monkeypatch.context() as patch, pytest.raises((SystemExit, OSError)) as stop:
        if fault == "no event file":
            patch.setattr(importlib.import_module(script), "SummaryWriter", lambda *args, **kwargs: open("/nowhere/x"))
        if fault == "a full disk":
            fill_the_disk(patch, script, "flushing")
        kind = "reset" if fault == "an environment that cannot be reset" else ""
        train(script, "run", *flags, "--env-kwargs", json.dumps({"kind": kind}))
    assert re.search("does not start|/nowhere/x|No space left", str(stop.value))
    if Path("run/checkpoint.pt").exists():
        invoke(script, "--resume", "run", "--env-kwargs", "{}")
    else:
        train(script, "run", *flags)
    assert load("run")["step"] >= WHOLE
    assert weights(Path("run"))


@all_five
def test_tracking_without_wandb_is_refused_before_anything_begins(script, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match="^--track needs wandb: pip install wandb$"):
        train(script, "run", "--track")
    assert not list(Path.cwd().iterdir())


@all_five
def test_a_run_goes_on_without_the_gpu_and_the_wandb_that_it_began_with(script, monkeypatch):
    train(script, "run", steps=HALF)
    checkpoint = load("run")
    checkpoint["args"] |= {"track": True} | ({} if script == "q_learning" else {"device": "cuda"})
    torch.save(checkpoint, "run/checkpoint.pt")
    monkeypatch.setitem(sys.modules, "wandb", None)
    device = [] if script == "q_learning" else ["--device", "cpu"]
    invoke(script, "--resume", "run", "--no-track", *device, "--total-timesteps", WHOLE)
    assert load("run")["step"] >= WHOLE


@scripts
def test_a_video_that_cannot_be_drawn_is_refused_before_the_first_step(script, monkeypatch):
    step = spy_on(monkeypatch, probe_envs.NoPictures, "step")
    with pytest.raises(SystemExit) as refusal:
        train(script, "run", "--env-id", "probe_envs:NoPictures-v0", "--capture-video")
    sentence = str(refusal.value)
    assert sentence.startswith("--capture-video: probe_envs:NoPictures-v0 cannot be drawn as rgb_array: ")
    assert not step
    assert "\n" not in sentence
    assert train(script, "run", "--env-id", "probe_envs:NoPictures-v0", steps=200)  # the folder is free


@scripts
@pytest.mark.parametrize("shown", ["nothing", "flat", "text", "gray", "floats", "fault"])
def test_what_is_drawn_must_be_a_picture_before_the_first_step(script, shown, monkeypatch):
    step = spy_on(monkeypatch, probe_envs.BadPictures, "step")
    kwargs = json.dumps({"shown": shown})
    with pytest.raises(SystemExit, match="^--capture-video: probe_envs:BadPictures-v0 cannot be drawn as rgb_array: "):
        train(script, "run", "--env-id", "probe_envs:BadPictures-v0", "--env-kwargs", kwargs, "--capture-video")
    assert not step


@scripts
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_infos_may_hold_anything(script, mode):
    kwargs = json.dumps({"vectorization_mode": mode})
    train(script, "run", "--env-id", "probe_envs:MixedInfos-v0", "--env-kwargs", kwargs, steps=300)
    assert scalars(Path("run"), "charts/episodic_return")[-1][1] == 10


@scripts
def test_another_environment_than_that_of_the_run_is_refused_on_resume(once, script):
    flags = ["--env-id", "CartPole-v1", "--total-timesteps", WHOLE]
    named = {"dqn": "--buffer-size"}.get(script, "--normalize")
    sentence = f"^--resume: {named} and the spaces of CartPole-v1 must be the same as in the resumed run$"
    with pytest.raises(SystemExit, match=sentence):
        resume(script, once(script, HALF), "copy", *flags)


@scripts
def test_a_gpu_that_is_not_there_is_refused(script, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="^--device cuda: PyTorch finds no GPU$"):
        train(script, "run", "--device", "cuda")
    assert not Path("run").exists()


@all_five
def test_a_run_needs_no_progress_bar(script, monkeypatch):
    """As where TQDM_DISABLE is set."""

    class Off(tqdm):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords | {"disable": True})

    monkeypatch.setattr(importlib.import_module(script), "tqdm", Off)
    train(script, "run")
    assert all(speed > 0 for _, speed in scalars(Path("run"), "charts/SPS"))
    assert load("run")["step"] >= WHOLE


@scripts
def test_a_resumed_run_says_for_how_many_steps_its_learning_rate_falls(once, script, capsys):
    anneal = [] if script in ("ppo", "dqn") else ["--anneal-lr"]
    resume(script, once(script, HALF), "longer", *anneal, "--total-timesteps", WHOLE)
    said = f"the learning rate falls to 0 at step {WHOLE}"
    assert said in capsys.readouterr().out
    resume(script, once(script, HALF), "constant", "--no-anneal-lr", "--total-timesteps", WHOLE)
    assert "learning rate" not in capsys.readouterr().out


@scripts
def test_a_fault_inside_the_environment_shows_where_it_is_and_the_run_can_go_on(script):
    kwargs = json.dumps({"kind": "raise", "at": 150})
    with pytest.raises(OSError, match="the simulator died") as fault:
        train(script, "run", "--env-id", "probe_envs:Trouble-v0", "--env-kwargs", kwargs)
    assert Path(fault.traceback[-1].path).name == "probe_envs.py"
    assert 200 < load("run")["step"] < HALF
    invoke(script, "--resume", "run", "--env-kwargs", "{}")
    assert load("run")["step"] >= WHOLE


# --- signals, faults ---

OWN_MODULE = """
import pathlib, signal, gymnasium as gym, numpy as np

class Own(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1, 1, (2,), np.float32), gym.spaces.Discrete(2)

    def __init__(self, at):
        self.at, self.total = at, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.time, self.total = self.time + 1, self.total + 1
        marker = pathlib.Path("interrupted")
        if self.total == self.at and not marker.exists():
            marker.touch()
            signal.raise_signal(signal.SIGINT)
        return np.zeros(2, np.float32), 1.0, self.time == 10, False, {}

gym.register("Own-v0", entry_point=Own)
"""


@scripts
def test_ctrl_c_saves_and_ends_with_the_command_that_goes_on(script):
    """With an environment of the user's own, from the working directory, and a folder with a space in its name."""
    Path("own_module.py").write_text(OWN_MODULE)
    flags = [
        *COMMON,
        *SHORT[script],
        "--env-id",
        "own_module:Own-v0",
        "--env-kwargs",
        '{"at": 130}',
        "--run-dir",
        "a run",
    ]
    flags += ["--save-every", 0, "--total-timesteps", 800]
    with group_of(script, *flags) as process:
        assert exit_status(process) == 1
    printed = Path("said").read_text()
    assert "Traceback" not in printed
    last = printed.strip().splitlines()[-1]
    said, words = re.fullmatch(r"stopped at step (\d+); to go on: (.*)", last).groups()
    assert load("a run")["step"] == int(said) >= 4 * 130
    assert not Path("a run/model.safetensors").exists()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    options = {"env": environment(PATH=path, PYTHONPATH=""), "capture_output": True, "text": True}
    resumed = subprocess.run(words, shell=True, timeout=MAX_SECONDS, **options)
    assert resumed.returncode == 0, resumed.stderr
    assert "over 2 greedy episodes" in resumed.stdout, resumed.stderr
    assert load("a run")["step"] >= 800
    assert weights(Path("a run"))


@scripts
@pytest.mark.parametrize("moment", ["collecting", "logging", "saving"])
def test_sigterm_at_any_moment_saves_what_was_reached(script, moment, monkeypatch):
    module = importlib.import_module(script)
    flags = ["--num-envs", 1, "--env-id", "probe_envs:Trouble-v0", "--save-every", 0]
    if moment == "collecting":
        flags += ["--env-kwargs", json.dumps({"kind": "SIGTERM", "at": 150})]
    calls = itertools.count()

    def during(original):
        def spy(*args, **kwargs):
            result = original(*args, **kwargs)
            if next(calls) == (1 if moment == "saving" else 0):
                signal.raise_signal(signal.SIGTERM)
            return result

        return spy

    if moment == "logging":
        monkeypatch.setattr(module.SummaryWriter, "add_scalar", during(module.SummaryWriter.add_scalar))
    if moment == "saving":
        monkeypatch.setattr(torch, "save", during(torch.save))
        flags += ["--save-every", 120]
    with pytest.raises(SystemExit, match=r'stopped at step \d+; to go on: .*--resume "run"') as stop:
        train(script, "run", *flags)
    stopped = load("run")["step"]
    assert stopped == int(re.search(r"step (\d+)", str(stop.value))[1]) > 0
    invoke(script, "--resume", "run", "--env-kwargs", "{}", "--total-timesteps", stopped + 200)
    assert load("run")["step"] >= stopped + 200


@all_five
@pytest.mark.parametrize("number, other", [(signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)])
def test_a_second_signal_of_a_kind_kills_and_the_other_kind_is_still_caught(script, number, other):
    caught = importlib.import_module(script).catch_signals()
    signal.raise_signal(number)
    assert caught == [number]
    assert signal.getsignal(number) == signal.SIG_DFL
    assert signal.getsignal(other) != signal.SIG_DFL
    signal.raise_signal(other)
    assert caught == [number, other]
    assert signal.getsignal(other) == signal.SIG_DFL


@all_five
def test_either_signal_kills_an_evaluation(script, monkeypatch):
    module = importlib.import_module(script)
    name = "play" if script == "q_learning" else "evaluate"
    evaluate, handlers = getattr(module, name), []

    def spy(*args, **kwargs):
        handlers.append((signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)))
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(module, name, spy)
    train(script, "run", steps=200)
    assert set(handlers) == {(signal.SIG_DFL, signal.SIG_DFL)}


# --- environments in processes of their own ---


def group_members(group):
    """Process ids of a process group that still run."""
    members = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group, *_ = status.read_text().rpartition(")")[2].split()
            if int(its_group) == group and state != "Z":
                members.append(int(status.parent.name))
    return members


@contextlib.contextmanager
def group_of(script, *flags):
    """A run in a process group of its own, as a terminal's, whose output goes to the file `said`."""
    process = fork(Path("said"), ALGOS / f"{script}.py", *flags)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def exit_status(process):
    """How a process ends, waited for."""
    process.join(MAX_SECONDS)
    return process.exitcode


def wait_until(happens):
    """Wait for something, but not for ever."""
    deadline = time.monotonic() + MAX_SECONDS
    while not happens() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert happens(), Path("said").read_text()


ASYNC = ["--eval-episodes", 0, "--run-dir", "run", "--total-timesteps", 1_000_000]
SLOW = {script: [*flags, "--device", "cpu", "--env-id", "probe_envs:Slow-v0"] for script, flags in SHORT.items()}
SLOW["q_learning"] = ["--num-envs", 4, "--env-id", "probe_envs:SlowStates-v0"]


@all_five
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_run_and_its_environments_saves_and_leaves_no_process(script, number):
    """As Ctrl-C in a terminal, which reaches all processes."""
    flags = [*SLOW[script], *ASYNC, "--env-kwargs", '{"vectorization_mode": "async"}']
    with group_of(script, *flags) as process:
        wait_until(Path("trains").exists)
        os.killpg(process.pid, number)
        assert exit_status(process) == 1
        assert group_members(process.pid) == []
    said = Path("said").read_text()
    assert "Error" not in said
    assert "Traceback" not in said
    (step,) = re.findall(r"stopped at step (\d+); to go on: ", said)
    assert load("run")["step"] == int(step) >= 100


PROGRAM_MODULE = """
import pathlib, subprocess, gymnasium as gym, numpy as np

class Program(gym.Env):
    action_space = gym.spaces.Discrete(2)

    def __init__(self, states):
        self.observation_space = gym.spaces.Discrete(2) if states else gym.spaces.Box(-1, 1, (2,), np.float32)
        self.program = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.observation_space.sample() * 0, {}

    def step(self, action):
        self.program.stdin.write("1\\n")
        reward = float(self.program.stdout.readline())
        self.time += 1
        if self.time == 20:
            pathlib.Path("trains").touch()
        return self.observation_space.sample() * 0, reward, self.time == 20, False, {}

    def close(self):
        self.program.kill()

gym.register("Program-v0", entry_point=Program)
"""


@all_five
def test_ctrl_c_saves_where_environments_talk_to_programs_that_it_reaches_too(script):
    Path("program_module.py").write_text(PROGRAM_MODULE)
    kwargs = json.dumps({"states": script == "q_learning"})
    flags = [*SLOW[script], "--env-id", "program_module:Program-v0", "--env-kwargs", kwargs, *ASYNC]
    with group_of(script, *flags) as process:
        wait_until(Path("trains").exists)
        os.killpg(process.pid, signal.SIGINT)
        assert exit_status(process) == 1
    said = Path("said").read_text()
    assert "Traceback" not in said
    (step,) = re.findall(r"stopped at step (\d+); to go on: ", said)
    assert load("run")["step"] == int(step) > 0


def test_q_learning_learns_the_same_in_one_process_and_in_several():
    flags = ["--num-envs", 2, "--total-timesteps", 2000, "--eval-episodes", 4]
    models = []
    for mode in ("sync", "async"):
        invoke("q_learning", *flags, "--run-dir", mode, "--env-kwargs", json.dumps({"vectorization_mode": mode}))
        models.append(Path(mode, "model.safetensors").read_bytes())
    assert models[0] == models[1]


@all_five
def test_an_environment_that_fails_in_its_process_ends_the_run(script):
    kwargs = json.dumps({"vectorization_mode": "async", "fails": True})
    with group_of(script, *SLOW[script], *ASYNC, "--env-kwargs", kwargs) as process:
        assert exit_status(process) == 1
        assert group_members(process.pid) == []
    assert "OSError: the simulator died" in Path("said").read_text()
    assert load("run")["step"] < 400


def test_ctrl_c_in_an_evaluation_leaves_no_process():
    flags = ["--env-id", "probe_envs:SlowEndless-v0", "--num-envs", 2, "--total-timesteps", 64]
    flags += ["--env-kwargs", '{"vectorization_mode": "async"}']
    with group_of("ppo", *SLOW["ppo"], *ASYNC, "--eval-episodes", 2, *flags) as process:
        wait_until(Path("trains").exists)  # an environment has taken more steps than training gave it
        os.killpg(process.pid, signal.SIGINT)
        assert exit_status(process) == -signal.SIGINT
        wait_until(lambda: not group_members(process.pid))
    assert load("run")["step"] >= 64


# --- numbers that are not finite ---


@scripts
@pytest.mark.parametrize("reward", ["nan", "inf"])
def test_a_reward_that_is_not_finite_stops_the_run_and_leaves_a_finite_checkpoint(script, reward):
    kwargs = json.dumps({"kind": reward, "at": 150})
    with pytest.raises(SystemExit, match=r"the agent became nan or inf .*run/checkpoint.pt") as stop:
        train(script, "run", "--env-id", "probe_envs:Trouble-v0", "--env-kwargs", kwargs, "--save-every", 1)
    assert isinstance(stop.value.code, str)  # so that Python prints it and exits with status 1
    state = load("run")
    assert 0 < state["step"] <= 4 * 160
    assert all(x.isfinite().all() for x in state["agent"].values())
    assert not Path("run/model.safetensors").exists()


def test_an_infinite_loss_ends_dqn_though_its_clipped_gradient_stays_finite():
    huber = ["--env-kwargs", '{"kind": "inf", "at": 150}', "--save-every", 1, "--loss", "huber", "--max-grad-norm", 10]
    with pytest.raises(SystemExit, match="became nan or inf"):
        train("dqn", "run", "--env-id", "probe_envs:Trouble-v0", *huber)
    assert 0 < load("run")["step"] <= 4 * 160
    assert not Path("run/model.safetensors").exists()


@policy_gradients
@pytest.mark.parametrize("at", [150, WHOLE // 4 - 1], ids=["in the middle", "in the last rollout"])
def test_an_infinite_observation_ends_a_run_that_normalises_and_leaves_a_finite_checkpoint(script, at):
    flags = ["--env-id", "probe_envs:Infinite-v0", "--env-kwargs", json.dumps({"at": at}), "--save-every", 20]
    with pytest.raises(SystemExit, match=r"the agent became nan or inf .*run/checkpoint.pt"):
        train(script, "run", *flags)
    state = load("run")
    assert 0 < state["step"] <= 4 * at
    assert all(x.isfinite().all() for x in state["agent"].values())
    assert not Path("run/model.safetensors").exists()


@scripts
@pytest.mark.parametrize("normalize", [False, True])
def test_an_observation_that_is_nan_ends_a_run_and_leaves_a_finite_checkpoint(script, normalize):
    flags = ["--env-id", "probe_envs:Infinite-v0", "--env-kwargs", '{"at": 150, "value": "nan"}', "--save-every", 20]
    if script != "dqn" and not normalize:
        flags += ["--no-normalize"]
    with pytest.raises(
        SystemExit, match=r"^\nthe agent became nan or inf before step \d+; run/checkpoint.pt is older$"
    ):
        train(script, "run", *flags)
    state = load("run")
    assert 0 < state["step"] < WHOLE  # dqn may draw it from the buffer later
    assert all(x.isfinite().all() for x in state["agent"].values())
    assert not Path("run/model.safetensors").exists()


# --- episodes without end ---


@scripts
@pytest.mark.parametrize("env_id", ["CliffWalking-v1", "probe_envs:Endless-v0"])
def test_evaluation_ends_and_says_so_when_episodes_do_not(script, env_id, monkeypatch, capsys):
    monkeypatch.setattr(importlib.import_module(script), "MAX_EVAL_STEPS", 30)
    train(script, "run", "--env-id", env_id, "--eval-episodes", 3, steps=300)
    out = capsys.readouterr().out
    cut = int(re.search(r"evaluation: (\d) of 3 episodes were cut after 30 steps\n", out)[1])
    assert cut == 3
    assert "over 3 greedy episodes" in out
    if env_id.startswith("probe"):
        assert "evaluation: return 30.00 ± 0.00" in out


def test_reinforce_cuts_training_episodes_and_stops_at_the_steps_asked_for(capsys):
    endless = ["--env-id", "probe_envs:Endless-v0", "--eval-episodes", 0, "--num-envs", 4]
    invoke("reinforce", *endless, "--total-timesteps", 1000, "--num-steps", 50, "--run-dir", "short")
    assert "4 of 4 training episodes were cut after 50 steps" in "".join(capsys.readouterr())
    assert load("short")["step"] == 1000
    invoke("reinforce", *endless, "--total-timesteps", 998, "--run-dir", "whole")
    assert "4 of 4 training episodes were cut after 250 steps" in "".join(capsys.readouterr())
    assert load("whole")["step"] == 1000


def test_reinforce_is_stopped_within_an_episode_that_does_not_end(monkeypatch):
    agent = importlib.import_module("reinforce").Agent
    act = agent.act
    calls = itertools.count(1)

    def interrupted(*args):
        if next(calls) == 50:
            signal.raise_signal(signal.SIGTERM)
        return act(*args)

    monkeypatch.setattr(agent, "act", interrupted)
    with pytest.raises(SystemExit, match="stopped at step 200;"):
        train("reinforce", "run", "--env-id", "probe_envs:Endless-v0", steps=100_000)
    assert load("run")["step"] == 200


# --- bad flags ---

BAD_FLAGS = {
    "--num-envs 0": "num-envs|numbers of things",
    "--total-timesteps 0": "total-timesteps",
    "--gamma 1.5": "gamma",
    "--env-kwargs {length:4}": "property name enclosed in double quotes",
    "--env-kwargs []": "JSON object",
    "--num-envs many": "num-envs",
    "--numb-envs 4": "--numb-envs",
    "--device tpu": "'auto', *'cpu',",
}
OWN_BAD_FLAGS = {
    "reinforce": {"--num-steps 0": "num-steps"},
    "a2c": {"--gae-lambda 1.1": "gae-lambda", "--num-steps 1": "num-steps"},
    "ppo": {
        "--gae-lambda -1": "gae-lambda",
        "--num-steps 1": "num-steps",
        "--num-minibatches 257": "num-minibatches",
        "--num-steps 3 --num-envs 2 --num-minibatches 3": "num-minibatches",
        "--num-minibatches 0": "num-minibatches",
        "--clip-coef -0.1": "clip-coef",
        "--clip-coef nan": "clip-coef",
    },
    "dqn": {
        "--learning-starts 500000": "learning-starts",
        "--learning-starts=-1": "learning-starts",
        "--buffer-size 10": "buffer-size",
        "--loss l1": "loss",
        "--epsilon-end 2": "epsilon-end",
        "--exploration-fraction nan": "exploration-fraction",
    },
}


@scripts
def test_bad_flags_are_refused_with_status_2_and_what_is_wrong(script, capsys, monkeypatch):
    monkeypatch.setattr(importlib.import_module(script), "main", lambda *_: None)  # what is not refused must not train
    for flags, word in (BAD_FLAGS | OWN_BAD_FLAGS[script]).items():
        with pytest.raises(SystemExit) as stop:
            invoke(script, *flags.split())
        err = capsys.readouterr().err
        assert stop.value.code == 2, flags
        assert re.search(word, err), flags
        assert "Traceback" not in err, flags
    assert not list(Path.cwd().iterdir())


def numbers_of(script):
    """Flags of a script that are real numbers."""
    fields = importlib.import_module(script).Args.__dataclass_fields__.values()
    return [f"--{field.name.replace('_', '-')}" for field in fields if field.type in (float, "float")]


@all_five
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_flag_may_be_nan_or_infinite(script, value, capsys, monkeypatch):
    monkeypatch.setattr(importlib.import_module(script), "main", lambda args, saved: None)
    assert len(numbers_of(script)) >= 2
    for flag in numbers_of(script):
        with pytest.raises(SystemExit) as stop:
            invoke(script, f"{flag}={value}")
        err = capsys.readouterr().err
        assert stop.value.code == 2, flag
        assert "Traceback" not in err, flag
        assert flag[2:] in re.sub(r"[\s│]+", " ", err), flag
    assert not list(Path.cwd().iterdir())


@scripts
def test_bad_flags_are_refused_on_resume_too(once, script, capsys):
    before = contents(once(script, HALF))
    with pytest.raises(SystemExit) as stop:
        invoke(script, "--resume", once(script, HALF), "--gamma", 1.5)
    assert stop.value.code == 2
    assert "gamma" in capsys.readouterr().err
    assert contents(once(script, HALF)) == before


# --- environments ---

ACTIONS = "actions must be Discrete from 0 or a one-dimensional Box of floats, not "
REFUSED = {  # and the error, with words of it
    "CartPoll-v1": (gymnasium.error.NameNotFound, "Environment `CartPoll` doesn't exist"),
    "no_such_module:CartPole-v1": (ModuleNotFoundError, "No module named 'no_such_module'"),
    "probe_envs:SameStep-v0": (SystemExit, "SameStep-v0: its vector environment must have AutoresetMode.NEXT_STEP"),
    "probe_envs:ManyActions-v0": (SystemExit, f"ManyActions-v0: {ACTIONS}MultiDiscrete"),
    "probe_envs:ActionsFromOne-v0": (SystemExit, f"ActionsFromOne-v0: {ACTIONS}Discrete\\(2, start=1"),
    "probe_envs:ScalarAction-v0": (SystemExit, f"ScalarAction-v0: {ACTIONS}Box\\(-1.0, 1.0, \\(\\)"),
    "probe_envs:IntBox-v0": (SystemExit, f"IntBox-v0: {ACTIONS}Box\\(0, 10, .*int64"),
    "probe_envs:NeedsFile-v0": (FileNotFoundError, "no such model file"),
    "probe_envs:RewardArray-v0": (ValueError, "setting an array element with a sequence"),
    "probe_envs:WrongShape-v0": (ValueError, "wrong shape"),
    "probe_envs:OldReset-v0": (TypeError, "unexpected keyword argument 'seed'"),
    "probe_envs:OldStep-v0": (ValueError, "not enough values to unpack"),
}
IMAGES = [(36, 36), (36, 36, 1), (1, 36, 36), (40, 36, 12), (40, 36, 2), (3, 40, 36)]


@scripts
@pytest.mark.parametrize("env_id", REFUSED)
def test_environments_that_cannot_work_end_in_an_error_that_says_why(script, env_id):
    error, words = REFUSED[env_id]
    with pytest.raises(error, match=words):
        raw = [] if script == "dqn" else ["--no-normalize"]
        train(script, "run", "--env-id", env_id, *raw, steps=500)


@scripts
def test_an_observation_of_another_shape_is_named_by_gymnasiums_warning(script):
    with pytest.warns(UserWarning, match="not within the observation space"), pytest.raises(ValueError):
        train(script, "run", "--env-id", "probe_envs:WrongShape-v0", steps=500)


@scripts
def test_raw_frames_of_atari_are_refused_with_the_environment_to_use(script):
    make_envs = importlib.import_module(script).make_envs
    with pytest.raises(SystemExit, match="PongNoFrameskip-v4 shows raw frames: use ALE/<Game>-v5"):
        make_envs("ale_py:PongNoFrameskip-v4", 1, {})


@scripts
@pytest.mark.parametrize("env_id", ["probe_envs:Recorded-v0", "FrozenLake-v1"])
def test_environments_that_are_a_little_unusual_train(script, env_id):
    assert train(script, "run", "--env-id", env_id, steps=200)


@scripts
@pytest.mark.parametrize("shape", IMAGES)
def test_images_of_any_layout_and_number_of_channels_train_the_cnn(script, shape):
    flags = ["--env-id", "probe_envs:Image-v0", "--env-kwargs", json.dumps({"shape": shape}), "--eval-episodes", 1]
    agent = train(script, "run", *flags, steps=120)
    channels = min(shape) if len(shape) == 3 else 1
    assert channels in [x.shape[1] for x in agent.values() if x.ndim == 4]


@scripts
def test_the_environments_arguments_reach_training_and_evaluation(script, capsys):
    train(script, "run", "--env-id", "probe_envs:Alternating-v0", "--env-kwargs", '{"long": 5}', steps=200)
    assert {value for _, value in scalars(Path("run"), "charts/episodic_return")} == {5.0}
    assert "evaluation: return 5.00 ± 0.00" in capsys.readouterr().out


# --- help, tracking, video ---


def meanings(script):
    """The trailing comment of each flag."""
    source = (ALGOS / f"{script}.py").read_text().split("class Args")[1].split("def __post_init__")[0]
    return dict(re.findall(r"(?m)^    (\w+): .*?  # (.*)$", source))


@scripts
def test_help_names_every_flag_with_its_meaning_and_default_and_starts_nothing(script, capsys, monkeypatch):
    module = importlib.import_module(script)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(module, "make_envs", None)
    monkeypatch.setattr(module, "SummaryWriter", None)
    with pytest.raises(SystemExit) as stop:
        invoke(script, "--help")
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0
    assert module.__doc__.splitlines()[0] in lines
    shown = re.sub(r"\s+", " ", " ".join(line.strip("│ ") for line in lines))
    assert meanings(script).keys() == module.Args.__dataclass_fields__.keys()
    for name, field in module.Args.__dataclass_fields__.items():
        default = re.escape(repr(field.default) if name in ("run_dir", "resume", "env_kwargs") else str(field.default))
        said = rf"--{name.replace('_', '-')}\b.*?{re.escape(meanings(script)[name])} \(default: {default}\)"
        assert re.search(said, shown), name
    assert re.search(r"--device \{auto,cpu,cuda\}", shown)
    assert not list(Path.cwd().iterdir())


@all_five
def test_tracking_hands_the_arguments_to_wandb(script, monkeypatch):
    given = pretend_wandb(monkeypatch)
    train(script, "run", "--track", "--seed", 77, steps=200)
    assert given["config"] == args_of("run")
    assert given["config"]["seed"] == 77
    assert given["sync_tensorboard"]
    assert given["name"] == "run"
    assert str(given["dir"]) == "run"


@scripts
def test_a_video_of_the_trained_agent_is_written_without_complaints_of_sdl(script, monkeypatch, capfd):
    for name in ("XDG_RUNTIME_DIR", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    train(script, "run", "--env-id", "CartPole-v1", "--capture-video", steps=200)
    (video,) = Path("run/videos").glob("*.mp4")
    assert video.stat().st_size > 1000
    assert "XDG" not in capfd.readouterr().err


@scripts
def test_the_video_of_an_endless_episode_is_cut(script, monkeypatch):
    monkeypatch.setattr(importlib.import_module(script), "MAX_EVAL_STEPS", 2200)
    train(script, "run", "--env-id", "probe_envs:Film-v0", "--capture-video", "--eval-episodes", 0, steps=200)
    (video,) = Path("run/videos").glob("*.mp4")
    assert cv2.VideoCapture(video).get(cv2.CAP_PROP_FRAME_COUNT) == pytest.approx(2000, abs=1)


def test_the_video_environment_of_atari_shows_the_policy_what_training_showed_it():
    ppo = importlib.import_module("ppo")
    video = ppo.make_envs("ALE/Pong-v5", 1, {"render_mode": "rgb_array"})
    native = ppo.make_envs("ALE/Pong-v5", 1, {})
    assert video.single_observation_space.shape == native.single_observation_space.shape == (4, 84, 84)
    assert video.single_action_space == native.single_action_space
    for envs in (video, native):
        obs, _ = envs.reset(seed=0)
        assert obs.dtype == np.uint8
        assert obs.shape == (1, 4, 84, 84)
        envs.close()
