"""What all five scripts on language models share: what a run leaves, resume, processes, and models and data that are wrong.

Scripts run in this process, with the command line that a user would type, where nothing has to be killed.
"""

import gzip
import importlib
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import accelerate
import peft
import pytest
import tiny
import torch
import transformers
from accelerate.state import AcceleratorState
from forks import FORCED_FSDP2, WATCH_THE_END, fork, fork_two
from helpers import ALGOS, run as start, samples_logged, scalars, spy_on, text as logged_text
from safetensors.torch import load_file, save_file
from tensorboard.summary.writer import event_file_writer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

ROWS = {"sft": tiny.completions, "reward_model": tiny.preferences, "dpo": tiny.preferences}  # of a data set
SAMPLERS = ["rlhf_ppo", "grpo"]  # they train on their own texts
SCRIPTS = [*ROWS, *SAMPLERS]
ROW_FLAGS = {  # of a run of six updates, two epochs
    "device": "cpu",
    "batch_size": 8,
    "micro_batch_size": 4,
    "max_length": 32,
    "learning_rate": 1e-3,
    "save_every": 0,
    "max_steps": 6,
    "eval_every": 4,
}
SAMPLER_FLAGS = {  # of six updates as well
    "device": "cpu",
    "batch_size": 8,
    "micro_batch_size": 4,
    "max_length": 64,
    "learning_rate": 1e-3,
    "save_every": 0,
    "total_episodes": 48,
    "num_minibatches": 2,
    "response_length": 8,
}
FLAGS = {
    "sft": ROW_FLAGS,
    "reward_model": ROW_FLAGS,
    "dpo": ROW_FLAGS,
    "rlhf_ppo": {**SAMPLER_FLAGS, "num_ppo_epochs": 1},
    "grpo": {**SAMPLER_FLAGS, "num_epochs": 1, "group_size": 2},
}
COLUMNS = {
    "sft": ["prompt", "completion"],
    "reward_model": ["prompt", "chosen", "rejected"],
    "dpo": ["prompt", "chosen", "rejected"],
    "rlhf_ppo": ["prompt"],
    "grpo": ["prompt"],
}
RATES = {  # default for pretrained models
    "sft": "2e-05",
    "reward_model": "1e-05",
    "dpo": "1e-06",
    "rlhf_ppo": "3e-06",
    "grpo": "3e-06",
}
LOADERS = {
    "sft": AutoModelForCausalLM,
    "reward_model": AutoModelForSequenceClassification,
    "dpo": AutoModelForCausalLM,
    "rlhf_ppo": AutoModelForCausalLM,
    "grpo": AutoModelForCausalLM,
}
ADAPTER = Path("adapter", "adapter_model.safetensors")
LOSS = {
    "sft": "loss",
    "reward_model": "loss",
    "dpo": "loss",
    "rlhf_ppo": "loss/policy",
    "grpo": "loss/policy",
}
TAGS = {  # that are logged beside the loss
    "sft": ["eval/loss"],
    "reward_model": ["eval/loss", "margin", "eval/accuracy", "eval/margin"],
    "dpo": ["eval/loss", "rewards/chosen", "logps/chosen", "eval/rewards/margins"],
    "rlhf_ppo": ["loss/value", "objective/kl", "objective/scores", "val/ratio"],
    "grpo": ["loss/kl", "objective/kl", "objective/scores", "eval/scores"],
}
PASSES = {"sft": 1, "reward_model": 1, "dpo": 1, "rlhf_ppo": 2, "grpo": 1}  # of a micro-batch, with a gradient
scripts = pytest.mark.parametrize("script", SCRIPTS)
row_scripts = pytest.mark.parametrize("script", [*ROWS])
lora_scripts = pytest.mark.parametrize("script", ["dpo", *SAMPLERS])


def of_updates(script, number):
    """Flags of a run of so many updates."""
    if script in SAMPLERS:
        return ["--total-episodes", 8 * number]
    return ["--max-steps", number]


@pytest.fixture(autouse=True)
def fresh_state():
    """Signals as they were, after a run in this process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny model, a reward model of it and, for each script, 26 rows to train on and 7 held out."""
    folder = tmp_path_factory.mktemp("world")
    event_file_writer._global_uid = event_file_writer.AtomicCounter(1000)  # TensorBoard reads files in order of names
    tiny.make_model(folder / "model")
    reward_model = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
    torch.nn.init.normal_(reward_model.score.weight, std=0.5, generator=torch.Generator().manual_seed(1))
    reward_model.save_pretrained(folder / "reward")
    tiny.word_tokenizer().save_pretrained(folder / "reward")
    for script in SCRIPTS:
        rows = ROWS.get(script, tiny.preferences)  # each prompt is asked twice
        count = 13 if script == "grpo" else 26
        tiny.write_jsonl(folder / script / "train.jsonl", rows(count))
        tiny.write_jsonl(folder / script / "test.jsonl", rows(7))
    return folder


def flags_of(world, script, **changed):
    """Command line of a short run on the tiny world."""
    flags = {"model": world / "model", "dataset": world / script} | FLAGS[script]
    flags |= {"reward_model": world / "reward"} if script in SAMPLERS else {}
    flags |= changed
    names = {name: f"--{name.replace('_', '-')}" for name in flags}
    return [names[name] if value is True else f"{names[name]}={value}" for name, value in flags.items()]


def call(script, *flags):
    """Run a script in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    module = importlib.import_module(script)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{ALGOS / script}.py", *map(str, flags)])
        module.main(*module.parse_args())


@pytest.fixture
def train(world, tmp_path):
    """Run a script in this process on the tiny world; returns the run directory."""

    def train(script, *flags, run_dir="run", **changed):
        call(script, *flags_of(world, script, run_dir=tmp_path / run_dir, **changed), *flags)
        return tmp_path / run_dir

    return train


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """Run directory of an uninterrupted run of a script, with no checkpoint before its end."""
    runs = {}

    def get(script):
        if script not in runs:
            runs[script] = tmp_path_factory.mktemp(script) / "run"
            call(script, *flags_of(world, script, run_dir=runs[script]))
        return runs[script]

    return get


def weights(run_dir):
    """Tensors of the final model."""
    return load_file(run_dir / "model" / "model.safetensors")


def same(a, b):
    """Whether two models have the same tensors bit for bit."""
    if a.keys() != b.keys():
        return False
    return all(torch.equal(a[name], b[name]) for name in a)


def all_moved(after, before):
    """Whether no matrix of a model, the head aside, is that of another model any more."""
    body = [name for name in after if name in before and before[name].dim() > 1]
    if len(body) < 9:
        return False
    return not any(torch.equal(after[name], before[name]) for name in body)


def logged(script, updates):
    """Updates whose loss a run of so many logs: rollouts log them all, the others the first, each tenth and the last."""
    if script in SAMPLERS:
        return [*range(1, updates + 1)]
    return sorted({1, *range(10, updates, 10), updates})


def state(run_dir):
    """What the checkpoint says of its run."""
    return json.loads((run_dir / "checkpoint" / "state.json").read_text())


# --- what a run leaves ---


@scripts
def test_a_run_leaves_arguments_events_a_checkpoint_and_a_model_that_transformers_opens(finished, script):
    run_dir = finished(script)
    assert {path.name.split(".")[0] for path in run_dir.iterdir()} == {"args", "checkpoint", "model", "events"}
    assert json.loads((run_dir / "args.json").read_text())["seed"] == 1
    assert state(run_dir)["script"] == script
    assert state(run_dir)["step"] == 6
    assert {path.name for path in (run_dir / "checkpoint").iterdir()} == {"6", "state.json"}
    model, info = LOADERS[script].from_pretrained(run_dir / "model", output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert len(AutoTokenizer.from_pretrained(run_dir / "model")) == model.config.vocab_size
    kept = load_file(run_dir / "checkpoint" / "6" / "model.safetensors")
    kept = {name.removeprefix("policy."): tensor for name, tensor in kept.items()}  # beside the critic in rlhf_ppo
    names = model.state_dict().keys() & kept.keys()
    assert len(names) > 10
    assert all(torch.equal(model.state_dict()[name], kept[name]) for name in names)
    assert [step for step, _ in scalars(run_dir, LOSS[script])] == logged(script, 6)
    if script in ROWS:
        assert [step for step, _ in scalars(run_dir, "eval/loss")] == [0, 4, 6]
    if script == "grpo":  # rlhf_ppo holds no data out
        assert [step for step, _ in scalars(run_dir, "eval/scores")] == [0, 6]


@scripts
def test_samples_are_logged_at_every_evaluation(train, script):
    with pytest.MonkeyPatch.context() as patch:
        samples = samples_logged(patch, accelerate.Accelerator)
        train(script, save_every=4)  # which is how often rollouts are evaluated
    assert list(samples) == [0, 4, 6]
    assert all("review of" in text for text in samples.values())


@scripts
def test_help_names_every_flag_with_its_meaning(script, capsys):
    with pytest.raises(SystemExit) as stop:
        call(script, "--help")
    text = capsys.readouterr().out
    module = importlib.import_module(script)
    assert stop.value.code == 0
    assert module.__doc__.splitlines()[0][:40] in text
    assert all(f"--{name.replace('_', '-')}" in text for name in vars(module.Args()))
    assert "Seed of the order of" in text
    assert "Arguments of the chat template, as a JSON object." in text


@scripts
def test_weights_keep_the_dtype_in_which_they_came(train, script, tmp_path):
    for dtype in (torch.bfloat16, torch.float32):
        tiny.make_model(tmp_path / "typed").to(dtype).save_pretrained(tmp_path / "typed")
        run_dir = train(script, *of_updates(script, 1), model=tmp_path / "typed", run_dir=str(dtype))
        assert {tensor.dtype for tensor in weights(run_dir).values()} == {dtype}
        kept = load_file(run_dir / "checkpoint" / "1" / "model.safetensors")
        assert {tensor.dtype for tensor in kept.values()} == {torch.float32}


@scripts
def test_off_the_small_world_the_default_learning_rate_is_one_for_pretrained_models(train, script, capsys):
    train(script, *of_updates(script, 1), learning_rate=0)
    assert f"learning rate: {RATES[script]}\n" in capsys.readouterr().out


@scripts
def test_default_run_directories_of_one_second_differ(world, script, tmp_path, monkeypatch):
    module = importlib.import_module(script)
    given = iter(range(9))

    class Clock(module.datetime):
        @classmethod
        def now(cls):
            return cls(2026, 11, 26, 12, 0, 0, next(given))

    monkeypatch.setattr(module, "datetime", Clock)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        call(script, *flags_of(world, script), *of_updates(script, 1))
    assert len(list((tmp_path / "runs").glob(f"{script}__{script}__1__20261126-120000*"))) == 2


# --- interruptions ---


def die_at(patch, owner, name, calls):
    """Let a function raise at its so-manieth call, as if the process had died there; saving leaves half a file."""
    original = getattr(owner, name)
    seen = []

    def dies(*arguments, **keywords):
        seen.append(name)
        if len(seen) < calls:
            return original(*arguments, **keywords)
        if name == "save_state":
            arguments[1].mkdir(parents=True)
            (arguments[1] / "model.safetensors").write_bytes(b"half")
        raise RuntimeError("died")

    patch.setattr(owner, name, dies)


@scripts
@pytest.mark.parametrize("where", [(accelerate.Accelerator, "save_state", 3), (Path, "replace", 3), (shutil, "rmtree", 2)],
                         ids=["tensors are written", "state.json changes", "older ones go"])  # fmt: skip
def test_a_run_that_dies_while_it_saves_resumes_bit_for_bit(finished, train, script, where, tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="died"):
        die_at(patch, *where)
        train(script, save_every=1)
    assert state(tmp_path / "run")["step"] == (3 if where[1] == "rmtree" else 2)
    call(script, "--resume", tmp_path / "run")
    assert same(weights(tmp_path / "run"), weights(finished(script)))
    expected = dict(scalars(finished(script), TAGS[script][0]))
    assert expected
    assert dict(scalars(tmp_path / "run", TAGS[script][0])) == expected
    assert {path.name for path in (tmp_path / "run" / "checkpoint").iterdir()} >= {"6", "state.json"}


@scripts
def test_a_run_killed_at_any_moment_resumes_to_the_same_weights_bit_for_bit(world, train, script, tmp_path):
    length = of_updates(script, 24)
    if script in ROWS:
        length += ["--eval-every", 8]
    flags = [*flags_of(world, script, run_dir=tmp_path / "run", save_every=1), *length]
    process = fork(tmp_path / "said", ALGOS / f"{script}.py", *flags)
    while not (tmp_path / "run" / "checkpoint" / "state.json").exists() and process.is_alive():
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.5))
    process.kill()
    process.join()
    time.sleep(1)  # names of event files begin with the second
    shutil.rmtree(tmp_path / "run" / "model", ignore_errors=True)  # if it was quicker than the kill
    assert 0 < state(tmp_path / "run")["step"]
    call(script, "--resume", tmp_path / "run", "--save-every", 0)
    whole = train(script, *length, run_dir="whole")
    assert same(weights(tmp_path / "run"), weights(whole))
    found = dict(scalars(tmp_path / "run", TAGS[script][0]))
    expected = dict(scalars(whole, TAGS[script][0]))
    assert found.items() <= expected.items()  # a kill may take the events of its last second
    assert 24 in found


def stopped(run_dir, said):
    """Hold what a stopped run says last to its checkpoint; returns the step and the flags to go on."""
    step = state(run_dir)["step"]
    assert step > 0
    start = f"stopped at update {step}; to go on: the same command with "
    assert said.startswith(start)
    flags = shlex.split(said.removeprefix(start))
    assert flags == ["--resume", str(run_dir)]
    return step, flags


@scripts
def test_ctrl_c_saves_first_and_the_printed_command_goes_on(world, script, tmp_path):
    run_dir = tmp_path / "my run"
    flags = [*flags_of(world, script, run_dir=run_dir, save_every=1), *of_updates(script, 100_000)]
    process = fork(tmp_path / "said", ALGOS / f"{script}.py", *flags)
    while not (run_dir / "checkpoint" / "state.json").exists() and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(100)
    assert process.exitcode == 1
    said = (tmp_path / "said").read_text()
    assert "Traceback" not in said
    step, flags = stopped(run_dir, said.strip().splitlines()[-1])
    call(script, *flags, *of_updates(script, step + 2))
    assert state(run_dir)["step"] == step + 2
    assert (run_dir / "model").exists()


@scripts
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_stopped_by_a_signal_in_an_epoch_goes_on_to_the_same_weights(finished, train, script, number, tmp_path):
    module = importlib.import_module(script)
    run_dir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        closed = spy_on(patch, accelerate.Accelerator, "end_training")  # of the processes' group
        batch_at = module.batch_at

        def signal_at_the_fourth(num_rows, step, batch_size, seed):
            if step == 3:
                signal.raise_signal(number)
            return batch_at(num_rows, step, batch_size, seed)

        patch.setattr(module, "batch_at", signal_at_the_fourth)
        with pytest.raises(SystemExit) as stop:
            train(script)
        step, flags = stopped(run_dir, stop.value.code)
        assert step == 4
        assert not (run_dir / "model").exists()
        assert len(closed) == 1
        call(script, *flags)
        assert len(closed) == 2
    assert same(weights(run_dir), weights(finished(script)))


# --- resume ---


@scripts
def test_run_folder_and_checkpoint_folder_resume_and_flags_given_then_count(finished, script, tmp_path, capsys):
    shutil.copytree(finished(script), tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        loads = spy_on(patch, torch, "load")
        call(script, "--resume", tmp_path / "run")  # a finished run: nothing to train
    assert loads
    assert all(load.weights_only for load in loads)  # no code of a checkpoint runs
    assert same(weights(tmp_path / "run"), weights(finished(script)))
    assert [step for step, _ in scalars(tmp_path / "run", LOSS[script])] == logged(script, 6)
    call(script, "--resume", tmp_path / "run" / "checkpoint", *of_updates(script, 8), "--learning-rate", 1e-2)
    assert "the learning rate falls to 0 at update 8" in capsys.readouterr().out
    ran = json.loads((tmp_path / "run" / "args.json").read_text())
    assert ran["learning_rate"] == 1e-2
    assert ran == state(tmp_path / "run")["args"]
    steps = [step for step, _ in scalars(tmp_path / "run", LOSS[script])]
    assert steps == sorted({*logged(script, 6), *logged(script, 8)})
    assert not same(weights(tmp_path / "run"), weights(finished(script)))


@scripts
def test_a_checkpoint_of_another_script_or_none_is_refused(finished, script, tmp_path):
    other = SCRIPTS[SCRIPTS.index(script) - 1]
    with pytest.raises(SystemExit, match=rf"--resume .*run: written by {other}\.py, not {script}\.py"):
        call(script, "--resume", finished(other))
    with pytest.raises(SystemExit, match="nowhere: there is no run in it"):
        call(script, "--resume", tmp_path / "nowhere")


@scripts
def test_a_directory_that_holds_a_run_is_refused_and_one_without_checkpoint_is_not(finished, train, script):
    def files():
        return sorted((path, path.stat().st_mtime_ns) for path in finished(script).rglob("*"))

    before = files()
    with pytest.raises(SystemExit, match="holds a run: choose another --run-dir, or continue it with --resume"):
        train(script, run_dir=finished(script))
    assert files() == before
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="died"):
        die_at(patch, accelerate.Accelerator, "save_state", 1)
        train(script)
    assert same(weights(train(script)), weights(finished(script)))


@lora_scripts
def test_a_run_with_adapters_that_dies_resumes_bit_for_bit_from_a_checkpoint_of_them_alone(train, script, tmp_path):
    whole = train(script, lora_rank=2, run_dir="whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="died"):
        die_at(patch, accelerate.Accelerator, "save_state", 3)
        train(script, lora_rank=2, save_every=1)
    names = []
    for file in (tmp_path / "run" / "checkpoint" / "2").glob("*.safetensors"):
        names += load_file(file)
    assert names
    assert all("lora_" in name or name == "model.score.weight" for name in names)
    call(script, "--resume", tmp_path / "run")
    resumed = load_file(tmp_path / "run" / ADAPTER)
    assert same(resumed, load_file(whole / ADAPTER))
    assert any(tensor.any() for name, tensor in resumed.items() if "lora_B" in name)
    assert same(weights(tmp_path / "run"), weights(whole))


@lora_scripts
def test_adapters_are_saved_as_peft_does_and_merged_into_a_plain_model(train, world, script):
    run_dir = train(script, lora_rank=2, learning_rate=1e-2)
    base = AutoModelForCausalLM.from_pretrained(world / "model")
    with_adapter = peft.PeftModel.from_pretrained(base, run_dir / "adapter").merge_and_unload()
    merged = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        logits = merged(ids).logits
        assert torch.allclose(logits, with_adapter(ids).logits, atol=1e-5)
        unchanged = AutoModelForCausalLM.from_pretrained(world / "model")
        assert not torch.allclose(logits, unchanged(ids).logits, atol=1e-3)
    assert weights(run_dir).keys() == load_file(world / "model" / "model.safetensors").keys()


@lora_scripts
def test_adapters_have_twice_their_rank_as_alpha_and_are_in_all_linear_layers(train, script):
    run_dir = train(script, *of_updates(script, 1), lora_rank=2)
    config = json.loads((run_dir / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 2
    assert config["lora_alpha"] == 4
    assert config["lora_dropout"] == 0.0
    layers = set()
    for name in load_file(run_dir / ADAPTER):
        layer, _, _ = name.partition(".lora_")
        layers.add(layer.rpartition(".")[2])
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@lora_scripts
def test_off_the_small_world_the_default_learning_rate_of_adapters_is_ten_times_as_high(train, script, capsys):
    train(script, *of_updates(script, 1), learning_rate=0, lora_rank=2)
    assert f"learning rate: {10 * float(RATES[script]):g}\n" in capsys.readouterr().out


# --- the same numbers, however they are computed ---


@scripts
def test_two_processes_compute_the_updates_of_one(finished, world, script, tmp_path):
    flags = flags_of(world, script, run_dir=tmp_path / "two")
    if script == "dpo":
        done = start(script, *flags, processes=2)  # once by torchrun itself
        assert done.returncode == 0, done.stderr
    else:
        fork_two(tmp_path / "said", WATCH_THE_END, ALGOS / f"{script}.py", *flags)
    for tag in (LOSS[script], "grad_norm", *TAGS[script]):
        one = dict(scalars(finished(script), tag))
        two = dict(scalars(tmp_path / "two", tag))
        assert one, tag
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5), tag
    one = weights(finished(script))
    two = weights(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


@scripts
def test_the_processes_wait_for_the_model_before_they_end(train, script, monkeypatch):
    """A process that exits while its last message is being freed is aborted by torch, and takes the others along."""
    events = []

    def note(owner, name):
        original = getattr(owner, name)

        def noted(*arguments, **keywords):
            events.append(name)
            return original(*arguments, **keywords)

        monkeypatch.setattr(owner, name, noted)

    note(transformers.PreTrainedModel, "save_pretrained")
    note(accelerate.Accelerator, "wait_for_everyone")
    note(accelerate.Accelerator, "end_training")
    train(script, *of_updates(script, 1))
    assert events[-3:] == ["save_pretrained", "wait_for_everyone", "end_training"]


def sharded(world, script, run_dir, **changed):
    """Run directory of a run on two processes that share the weights by FSDP2."""
    flags = flags_of(world, script, run_dir=run_dir, **changed)
    fork_two(run_dir.with_name("said"), FORCED_FSDP2, ALGOS / f"{script}.py", *flags)
    parts = next((run_dir / "checkpoint" / "6").glob("pytorch_model_fsdp_0"))
    assert len(list(parts.glob("*.distcp"))) == 2  # one of each process
    return run_dir


@scripts
def test_two_processes_that_share_the_weights_by_fsdp2_compute_the_updates_of_one(finished, world, script, tmp_path):
    one = finished(script)
    two = sharded(world, script, tmp_path / "two")
    for tag in (LOSS[script], "grad_norm", *TAGS[script]):
        expected = dict(scalars(one, tag))
        found = dict(scalars(two, tag))
        assert 6 in found, tag
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5), tag
    one = weights(one)
    two = weights(two)
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


@pytest.mark.parametrize(
    "script,tag,update",
    [("reward_model", "loss", 6), ("dpo", "loss", 6), ("rlhf_ppo", "objective/entropy", 1)],
)
def test_bfloat16_under_fsdp2_stays_near_float32(finished, world, script, tag, update, tmp_path):
    """In rlhf_ppo a rounded probability may draw another token, so that only the first rollout is comparable."""
    two = sharded(world, script, tmp_path / "two", bf16=True)
    expected = dict(scalars(finished(script), tag))[update]
    found = dict(scalars(two, tag))[update]
    assert found == pytest.approx(expected, rel=0.1, abs=0.1)
    assert found != pytest.approx(expected, rel=1e-6)
    assert {tensor.dtype for tensor in weights(two).values()} == {torch.float32}


@lora_scripts
def test_adapters_under_fsdp2_equal_those_of_one_process(world, train, script, tmp_path):
    one = train(script, lora_rank=2, gradient_checkpointing=True)
    two = sharded(world, script, tmp_path / "two", lora_rank=2, gradient_checkpointing=True)
    one = load_file(one / ADAPTER)
    two = load_file(two / ADAPTER)
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


@row_scripts
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_micro_batches_of_unequal_lengths_give_the_update_of_the_whole_batch(train, script, size):
    def moments(run_dir):
        return torch.load(run_dir / "checkpoint" / "1" / "optimizer.bin", weights_only=True)["state"]

    whole = train(script, *of_updates(script, 1), run_dir="whole", micro_batch_size=8)
    parts = train(script, *of_updates(script, 1), run_dir="parts", micro_batch_size=size)
    for name, of_whole in moments(whole).items():
        a = of_whole["exp_avg"]
        b = moments(parts)[name]["exp_avg"]
        assert (a - b).norm() <= 1e-4 * a.norm() + 1e-7, name
    for tag in ("loss", "grad_norm"):  # before clipping
        _, expected = scalars(whole, tag)[0]
        _, found = scalars(parts, tag)[0]
        assert found == pytest.approx(expected, rel=1e-4)


@scripts
def test_gradient_checkpointing_changes_nothing_and_bfloat16_little(finished, train, script, monkeypatch):
    def curve(run_dir):
        points = scalars(run_dir, LOSS[script]) + scalars(run_dir, "grad_norm")
        return [value for _, value in points]

    plain = curve(finished(script))
    passes = []
    module = importlib.import_module(script)
    if script in SAMPLERS:  # what the first run drew, since one other token makes another rollout
        sample = module.sample
        drawn = {}

        def as_first_drawn(model, prompts, uniform):
            responses = sample(model, prompts, uniform)
            return drawn.setdefault(str((prompts, uniform)), responses)

        monkeypatch.setattr(module, "sample", as_first_drawn)
    for flags in ([], ["--gradient-checkpointing"]):
        with pytest.MonkeyPatch.context() as patch:
            calls = spy_on(patch, transformers.models.llama.modeling_llama.LlamaAttention, "forward")
            assert curve(train(script, *flags, run_dir=f"run{flags}")) == pytest.approx(plain, rel=1e-5)
            passes.append(len(calls))
    assert passes[1] == passes[0] + 24 * PASSES[script]  # 6 updates, 2 micro-batches, 2 layers
    rounded = train(script, "--bf16", run_dir="rounded")
    assert curve(rounded) == pytest.approx(plain, rel=0.1, abs=0.05)
    assert curve(rounded) != pytest.approx(plain, rel=1e-5)
    assert {tensor.dtype for tensor in weights(rounded).values()} == {torch.float32}


@scripts
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(train, finished, script, tmp_path):
    shutil.copytree(finished(script), tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    with pytest.raises(SystemExit, match=r"became nan or inf before update \d+; .*run/checkpoint is older"):
        call(script, "--resume", tmp_path / "run", *of_updates(script, 12), "--learning-rate", 1e30)
    assert state(tmp_path / "run")["step"] == 6
    assert not (tmp_path / "run" / "model").exists()
    tensors = load_file(tmp_path / "run" / "checkpoint" / "6" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())


# --- models ---


def loads(script, folder, max_length=64):
    """A model as the script's main loads it."""
    head = {"num_labels": 1} if script == "reward_model" else {}
    return importlib.import_module(script).load_model(LOADERS[script], str(folder), max_length, **head)


def with_names(change):
    """A function that writes a checkpoint whose tensors have other names, or are left out where they have none."""

    def write(folder):
        tiny.make_model(folder)
        tensors = {change(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
        tensors.pop("", None)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return write


def of_config(name, **changed):
    """A function that writes a language model of another family of transformers."""

    def write(folder):
        config = getattr(transformers, f"{name}Config")(vocab_size=23, hidden_size=32, num_hidden_layers=2, **changed)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tiny.word_tokenizer().save_pretrained(folder)

    return write


def without_layer_1(name):
    """The name of a tensor, or none."""
    return "" if "layers.1" in name else name


def without_eos(folder):
    """A model whose tokenizer has no EOS token."""
    tiny.make_model(folder, tokenizer=tiny.word_tokenizer(eos=None))


def with_32_positions(folder):
    """A model of short texts."""
    tiny.make_model(folder, max_position_embeddings=32)


def nothing(folder):
    """No model at all."""


def with_larger_tokenizer(folder):
    """A tokenizer with more tokens than the model has embeddings."""
    tiny.make_model(folder)
    tiny.bpe_tokenizer().save_pretrained(folder)


BAD_MODELS = {  # a function that writes the model, and what the message has to say
    "a layer missing": (with_names(without_layer_1), "lacks the weights .*layers.1.mlp"),
    "names behind module.": (with_names("module.{}".format), "lacks the weights .*layers.0"),
    "names behind _orig_mod.": (with_names("_orig_mod.{}".format), "lacks the weights .*layers.0"),
    "an encoder": (of_config("Bert", num_attention_heads=4, intermediate_size=64), "not causal|lacks the weights"),
    "no eos": (without_eos, "a tokenizer without an EOS token"),
    "too few embeddings": (with_larger_tokenizer, "23 embeddings for the 342 tokens"),
    "too few positions": (with_32_positions, "32 positions: --max-length cannot be 64"),
    "no such folder": (nothing, "Repo id .*nothing"),
}


@scripts
@pytest.mark.parametrize("fault", BAD_MODELS)
def test_models_that_would_be_silently_wrong_are_refused(script, fault, tmp_path):
    write, message = BAD_MODELS[fault]
    write(tmp_path / "nothing")
    with pytest.raises((SystemExit, ValueError, OSError), match=message):
        loads(script, tmp_path / "nothing")


@scripts
@pytest.mark.parametrize("tied", [False, True])
def test_a_reward_model_is_no_language_model_and_one_with_two_labels_no_reward_model(script, tied, tmp_path):
    tiny.make_model(tmp_path / "lm", "qwen3", tie_word_embeddings=tied)
    labels = {"num_labels": 2 if script == "reward_model" else 1}
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "lm", **labels).save_pretrained(tmp_path / "rm")
    tiny.word_tokenizer().save_pretrained(tmp_path / "rm")
    with pytest.raises(
        (SystemExit, RuntimeError),
        match="lacks the weights .*(lm_head|score).weight|is a reward model|ignore_mismatched",
    ):
        loads(script, tmp_path / "rm")


@scripts
def test_a_prompt_is_found_in_a_chat_whatever_blanks_are_around_it_and_beside_empty_calls(script):
    chat = [{"role": "user", "content": " What is it?"}, {"role": "assistant", "content": "A film."}]
    module = importlib.import_module(script)
    assert module.prompt_turns("What is it? ", chat) == chat[:1]
    chat[0]["tool_calls"] = []  # none
    assert module.prompt_turns("What is it? ", chat) == chat[:1]


@scripts
def test_noise_of_training_is_off_whatever_it_is_called(script, tmp_path):
    moe = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": 4}
    noise = {"input_jitter_noise": 0.1, "router_jitter_noise": 0.1, "attention_dropout": 0.1}
    of_config("Phimoe", **moe, **noise)(tmp_path / "moe")
    tiny.make_model(tmp_path / "gpt2", "gpt2", attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1)
    for folder in (tmp_path / "moe", tmp_path / "gpt2"):
        model = loads(script, folder)[0]
        ids = torch.arange(4, 20)[None]
        with torch.no_grad():
            assert torch.equal(model.eval()(ids).logits, model.train()(ids).logits)


@scripts
def test_noise_and_positions_are_read_in_a_config_within_the_models_own(script, tmp_path):
    small = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    text = {"vocab_size": 23, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 1}
    text |= {"attention_dropout": 0.5, "max_position_embeddings": 64}
    vision = small | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=small | text, vision_config=vision)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "nested")
    tiny.word_tokenizer().save_pretrained(tmp_path / "nested")
    model = loads(script, tmp_path / "nested")[0]
    assert model.config.get_text_config().attention_dropout == 0
    with pytest.raises(SystemExit, match="has 64 positions"):
        loads(script, tmp_path / "nested", max_length=65)


@scripts
@pytest.mark.parametrize("arch", tiny.CONFIGS)
def test_every_causal_architecture_trains(train, script, arch, tmp_path):
    before = tiny.make_model(tmp_path / arch, arch).state_dict()
    after = weights(train(script, *of_updates(script, 2), model=tmp_path / arch))
    assert all_moved(after, before)


def make_adapter(folder, model, **lora):
    """Save an adapter of a language model that adds nothing yet."""
    model = AutoModelForCausalLM.from_pretrained(model)
    lora = peft.LoraConfig(target_modules="all-linear", **lora)
    peft.get_peft_model(model, lora).save_pretrained(folder)
    tiny.word_tokenizer().save_pretrained(folder)


@scripts
@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_an_adapter_as_model_trains(train, world, script, task, tmp_path):
    make_adapter(tmp_path / "adapter", world / "model", task_type=task)
    before = load_file(world / "model" / "model.safetensors")  # a new adapter adds nothing
    assert all_moved(weights(train(script, model=tmp_path / "adapter")), before)


@lora_scripts
def test_adapters_on_an_adapter_are_merged_with_it_and_not_saved_alone(train, world, script, tmp_path):
    make_adapter(tmp_path / "first", world / "model", init_lora_weights=False)
    first = AutoModelForCausalLM.from_pretrained(world / "model")
    first = peft.PeftModel.from_pretrained(first, tmp_path / "first").merge_and_unload().state_dict()
    run_dir = train(script, "--lora-rank=2", model=tmp_path / "first", learning_rate=1e-5)
    after = weights(run_dir)
    assert all(torch.allclose(after[name], first[name], atol=1e-3) for name in after)
    assert not same(after, {name: first[name] for name in after})
    assert not (run_dir / "adapter").exists()


@lora_scripts
@pytest.mark.parametrize("before,after", [(0, 2), (2, 0), (2, 4)])
def test_the_rank_of_adapters_cannot_change_when_resuming(train, script, before, after):
    run_dir = train(script, f"--lora-rank={before}", *of_updates(script, 1))
    with pytest.raises(SystemExit, match="--lora-rank cannot change when a run is resumed"):
        call(script, "--resume", run_dir, f"--lora-rank={after}", *of_updates(script, 2))


@pytest.mark.parametrize("script", ["sft", "dpo", *SAMPLERS])
def test_stop_tokens_of_the_generation_config_are_kept_even_number_0(train, script, tmp_path):
    tiny.make_model(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": 0}')
    run_dir = train(script, *of_updates(script, 1), model=tmp_path / "model")
    assert {0, 1} <= set(json.loads((run_dir / "model" / "generation_config.json").read_text())["eos_token_id"])


@pytest.mark.parametrize("script", ["sft", "dpo", *SAMPLERS])
def test_a_published_generation_config_with_a_temperature_alone_is_kept(train, script, tmp_path):
    tiny.make_model(tmp_path / "model")
    published = {"eos_token_id": 1, "temperature": 0.6, "top_p": 0.9}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(published))
    run_dir = train(script, *of_updates(script, 1), model=tmp_path / "model")
    saved = json.loads((run_dir / "model" / "generation_config.json").read_text())
    assert (saved["temperature"], saved["top_p"], saved["do_sample"]) == (0.6, 0.9, True)


JAMBA = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}
BAMBA = {
    "attn_layer_indices": [1],
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
HYBRIDS = {"Jamba": JAMBA, "Bamba": BAMBA}  # of attention and other layers, whose cache takes one token at a time


@pytest.mark.parametrize("script", ["sft", "dpo", *SAMPLERS])
@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrid_models_train(train, script, name, tmp_path):
    shared = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
    }
    of_config(name, **shared, **HYBRIDS[name])(tmp_path / "hybrid")
    before = load_file(tmp_path / "hybrid" / "model.safetensors")
    assert all_moved_some(weights(train(script, *of_updates(script, 1), model=tmp_path / "hybrid")), before)


def all_moved_some(after, before):
    """Whether most matrices of a model have changed; of experts some may have had no token."""
    matrices = [name for name in after if before[name].dim() > 1]
    moved = [name for name in matrices if not torch.equal(after[name], before[name])]
    return len(moved) > 0.6 * len(matrices)


@pytest.mark.parametrize("script", ["sft", "dpo"])
def test_models_that_keep_no_cache_train_where_nothing_is_sampled_from_them(train, script, tmp_path):
    of_config("Mamba", state_size=8)(tmp_path / "mamba")
    before = load_file(tmp_path / "mamba" / "model.safetensors")
    assert all_moved_some(weights(train(script, *of_updates(script, 1), model=tmp_path / "mamba")), before)


@pytest.mark.parametrize("script", SAMPLERS)
def test_models_that_sample_from_other_probabilities_than_a_whole_pass_are_refused(train, script, tmp_path):
    of_config("Rwkv", attention_hidden_size=32)(tmp_path / "rwkv")  # left padding changes its states
    with pytest.raises(SystemExit, match="generates from other probabilities than a forward pass gives"):
        train(script, model=tmp_path / "rwkv")


@pytest.mark.parametrize("script,place", [("reward_model", "reward_loss"), ("rlhf_ppo", "kl_penalised_rewards"),
                                          ("grpo", "group_advantages")])  # fmt: skip
def test_bfloat16_rounds_no_score(train, script, place, monkeypatch):
    module = importlib.import_module(script)
    calls = spy_on(monkeypatch, module, place)
    if script == "rlhf_ppo":
        values = spy_on(monkeypatch, module, "value_loss")
    if script in SAMPLERS:
        train(script, "--bf16", *of_updates(script, 2), missing_eos_penalty=0)
        scores = [call.scores for call in calls]
    else:
        train(script, "--bf16")
        scores = [call.rewards for call in calls]
    if script == "rlhf_ppo":
        scores += [call.values for call in values[4:]]  # a critic begins at 0
    for numbers in scores[1:]:
        assert numbers.dtype == torch.float32
        assert not torch.equal(numbers, numbers.bfloat16().float())


@pytest.mark.parametrize("script", ["sft", "dpo"])
def test_samples_stay_within_the_positions_of_the_model(train, script, tmp_path):
    tiny.make_model(tmp_path / "gpt2", "gpt2")  # 128 positions
    rows = [row | {"prompt": "the film " * 50} for row in ROWS[script](8)]
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    assert train(script, *of_updates(script, 1), model=tmp_path / "gpt2", max_length=128, dataset=path, eval_split="")


# --- from text to tokens ---


@row_scripts
@pytest.mark.parametrize("name", tiny.TOKENIZERS)
@pytest.mark.parametrize("form", ["text", "chat"])
def test_rows_of_a_run_begin_once_and_end_once_whatever_the_tokenizer(train, script, name, form, tmp_path):
    make, turn_end = tiny.TOKENIZERS[name]
    tokenizer = make()
    module = importlib.import_module(script)
    tiny.make_model(tmp_path / "model", tokenizer=tokenizer)
    rows = ROWS[script](8)
    if form == "chat":
        rows = [tiny.as_messages(row) for row in rows]
    tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        loads = spy_on(patch, module, "load_rows")
        flags = {"model": tmp_path / "model", "dataset": tmp_path / "rows.jsonl", "eval_split": "", "eval_every": 0}
        flags["max_length"] = 64  # the tokens of some are bytes
        run_dir = train(script, *of_updates(script, 1), **flags)
    eos = tokenizer.eos_token_id
    stop = eos if form == "text" else tokenizer.convert_tokens_to_ids(turn_end)
    begin = [i for i in (tokenizer.bos_token_id, tokenizer.cls_token_id) if i is not None]
    for prompt, *texts in loads[0].result:
        assert prompt
        if form == "text":
            assert eos not in prompt
        elif turn_end != "[SEP]":
            assert prompt[-1] != eos
        assert sum(map(prompt.count, begin)) <= 1
        for text in texts:
            assert text[-1] == stop
            assert text.count(stop) == 1
            assert eos not in text[:-1]
            assert not set(begin) & set(text)
    if script == "reward_model":
        assert AutoTokenizer.from_pretrained(run_dir / "model").pad_token_id not in (stop, eos, None)
    else:  # generation stops where training ended the texts
        stops = json.loads((run_dir / "model" / "generation_config.json").read_text())["eos_token_id"]
        assert {stop, eos} <= set(stops)


# --- data ---


CHAT = [{"role": "assistant", "content": "a"}]
HALF = '\n{"prompt": "half a\n'


def cells(*values):
    """Text of a csv file whose last column has these values, for the columns of a script."""

    def text(columns):
        before = "a," * (len(columns) - 1)
        rows = [before + value for value in values]
        return "\n".join([",".join(columns), *rows])

    return text


def lines(*values):
    """Text of a jsonl file whose last column has these values, for the columns of a script; others have row 1's kind."""
    first = CHAT if isinstance(values[0], list) else "a"

    def text(columns):
        rows = []
        for value in values:
            row = dict.fromkeys(columns, first)
            row[columns[0]] = "a"
            row[columns[-1]] = value
            rows.append(json.dumps(row))
        return "\n".join(rows)

    return text


def exactly(text):
    """A file of one text, whatever the columns of a script."""
    return lambda columns: text


def a_broken_line(columns):
    """A row and the beginning of another."""
    return lines("a")(columns) + HALF


def a_key_twice(columns):
    """A row that names its first column at its end again."""
    row = lines("a")(columns).removesuffix("}")
    return row + f', "{columns[0]}": ""}}'


BAD_DATA = {  # name of the file, its text, and what the message has to say; LAST is the last column
    "numbers in csv": ("x.csv", cells("1", "2"), "x.csv, (split )?train, row 1, column LAST: 1 is neither text"),
    "NA in csv": ("x.csv", cells("great", "NA"), "row 2, column LAST: None is neither text"),
    "an empty cell": ("x.csv", cells("great", "fine", ""), "row 3, column LAST: None is neither text"),
    "messages in csv": (
        "x.csv",
        cells('"[{""role"": ""user"", ""content"": ""a""}]"'),
        "row 1, column LAST.*use jsonl",
    ),
    "as Python has them": ("x.csv", cells("\"[{'role': 'user', 'content': 'a'}]\""), "row 1, column LAST.*use jsonl"),
    "null": ("x.jsonl", lines("a", "b", None), "row 3, column LAST: None is neither text"),
    "a number": ("x.jsonl", lines(5), "row 1, column LAST: 5 is neither text"),
    "no messages": ("x.jsonl", lines(CHAT, []), r"row 2, column LAST: \[\] is neither"),
    "no content": ("x.jsonl", lines(CHAT, [{"role": "assistant", "content": None}]), "row 2, column LAST"),
    "other messages": ("x.jsonl", lines([{"from": "gpt", "value": "a"}]), "row 1, column LAST.*'from'"),
    "a broken line": ("x.jsonl", a_broken_line, "in row 1"),
    "half a surrogate pair": ("x.jsonl", lines("a \ud83d"), "surrogate.*in row 0"),
    "a key twice": ("x.jsonl", a_key_twice, "specified twice"),
    "misnamed columns": ("x.jsonl", exactly('{"q": "a", "a": "b"}'), r"x.jsonl has the columns \['q', 'a'\]: rename"),
    "no rows": ("x.jsonl", exactly(""), ""),
    "no such file": ("x.jsonl", None, "Unable to find .*x.jsonl"),
    "no such folder": ("x", None, "Couldn't find .*x"),
    "another kind of file": ("x.txt", exactly("a"), "Couldn't find .*x.txt"),
}


NO_FAULTS = {"an empty cell"}  # of prompts: a blank line of csv


def place(script, message):
    """A message as a script words it: prompts are one column."""
    return message.replace("LAST", COLUMNS[script][-1])


@pytest.mark.parametrize("script,fault", [(script, fault) for script in SCRIPTS for fault in BAD_DATA
                                          if not (script in SAMPLERS and fault in NO_FAULTS)])  # fmt: skip
def test_bad_data_ends_the_run_and_names_the_place(train, script, fault, tmp_path):
    name, text, message = BAD_DATA[fault]
    if text:
        (tmp_path / name).write_text(text(COLUMNS[script]))
    with pytest.raises((SystemExit, Exception)) as stop:
        train(script, dataset=tmp_path / name)
    said = f"{stop.value} {stop.value.__cause__}"
    assert re.search(place(script, message), said), said
    assert not (tmp_path / "run").exists()


@scripts
@pytest.mark.parametrize("cell", ["[{'content': 'a', 'role': 'user'}]", "[ {'role': 'user', 'content': 'a'}]",
                                  "[{'from': 'human', 'value': 'a'}]",
                                  "[\n  {'role': 'user', 'content': 'a'}]"], ids=repr)  # fmt: skip
def test_messages_that_csv_lost_are_refused_however_they_are_written(train, script, cell, tmp_path):
    (tmp_path / "x.csv").write_text(cells(f'"{cell}"')(COLUMNS[script]))
    with pytest.raises(SystemExit, match=place(script, "row 1, column LAST.*use jsonl")):
        train(script, dataset=tmp_path / "x.csv")


@row_scripts
def test_a_row_without_room_or_text_is_left_out_with_a_count_and_a_long_completion_cut(script, tmp_path, capsys):
    rows = ROWS[script](5)
    module = importlib.import_module(script)
    rows[1]["prompt"] = "review " * 10
    rows[2][COLUMNS[script][-1]] = "  "
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    kept = module.load_rows(str(path), "train", tiny.word_tokenizer(), 10)
    said = capsys.readouterr().out
    assert "train: 1 of 5 rows are left out: the prompt alone fills --max-length" in said
    assert "train: 1 of 5 rows are left out: an answer is empty" in said
    cut = 0
    for prompt, *texts in kept:
        cut += any(text[-1] != 1 for text in texts)
        for text in texts:
            assert 0 < len(text) <= 10 - len(prompt)
    assert f"train: {cut} of 5 rows are cut to --max-length, and so have no end" in said
    assert cut > 0
    assert len(kept) == 3


@row_scripts
def test_files_and_slices_of_splits_give_the_rows_of_a_folder(world, script, tmp_path):
    module = importlib.import_module(script)
    rows = ROWS[script](26)
    tokenizer = tiny.word_tokenizer()
    expected = module.load_rows(str(world / script), "train", tokenizer, 64)
    (tmp_path / "rows.json").write_text(json.dumps([row | {"score": 3} for row in rows]))
    with (tmp_path / "rows.csv").open("w") as file:
        for cells_of_line in (rows[0].keys(), *(row.values() for row in rows)):
            file.write(",".join(cells_of_line) + "\n")
    for name in ("rows.json", "rows.csv"):
        begin = module.load_rows(str(tmp_path / name), "train[:60%]", tokenizer, 64)
        end = module.load_rows(str(tmp_path / name), "train[60%:]", tokenizer, 64)
        assert begin + end == expected
        assert 0 < len(begin) < 26


@row_scripts
@pytest.mark.parametrize("flags", [{"batch_size": 0}, {"micro_batch_size": 0}, {"max_length": 1}, {"epochs": 0},
                                   {"learning_rate": -1}, {"warmup": -0.5}, {"warmup": 100}, {"save_every": -1},
                                   {"chat_template_kwargs": "[]"}], ids=str)  # fmt: skip
def test_flags_that_cannot_work_are_refused(train, script, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        train(script, **flags)
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert "must" in said.out + said.err


@row_scripts
def test_more_rows_in_a_batch_than_in_the_data_are_refused(train, script):
    with pytest.raises(SystemExit, match="--batch-size 64 is more than the 26 rows of --dataset in use"):
        train(script, batch_size=64)


# --- what is trained on is shown ---


def chat(*contents, first="user"):
    """Messages of the user and the assistant in turns."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def load(script, folder, rows, tokenizer=None, **settings):
    """Rows of token ids that a script makes of rows of a data set."""
    path = tiny.write_jsonl(folder / "rows.jsonl", rows)
    return importlib.import_module(script).load_rows(
        str(path), "train", tokenizer or tiny.word_tokenizer(), 64, **settings
    )


@scripts
def test_the_first_row_is_shown_as_it_is_trained_on_and_the_processes_are_counted(train, script, capsys):
    train(script, *of_updates(script, 1))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "1 process(es) on cpu"
    (shown,) = [line for line in said if line.startswith(("first row: ", "first prompt: "))]
    parts = shown.partition(": ")[2].split(" | ")
    assert parts[0] == ROWS.get(script, tiny.preferences)(1)[0]["prompt"]
    assert len(parts) == (1 if script in SAMPLERS else len(COLUMNS[script]))
    assert all(part.endswith("<eos>") for part in parts[1:])


@scripts
def test_words_that_the_model_does_not_know_are_counted_and_refused_in_most_rows(
    train, world, script, tmp_path, capsys
):
    rows = ROWS.get(script, tiny.preferences)(26)
    for unknown, ends in ((3, False), (20, True)):
        changed = [row | {"prompt": "zebra " + row["prompt"]} for row in rows[:unknown]]
        path = tiny.write_jsonl(tmp_path / f"{unknown}.jsonl", changed + rows[unknown:])
        if ends:
            with pytest.raises(SystemExit, match="most (rows|prompts) hold <unk>"):
                train(script, dataset=path)
        else:
            train(script, *of_updates(script, 1), dataset=path)
            assert re.search("3 of 26 (rows|prompts) hold words that --model does not know", capsys.readouterr().out)


@scripts
def test_the_flags_are_logged_as_text(finished, script):
    assert '"micro_batch_size": 4' in logged_text(finished(script), "flags")


@scripts
def test_default_run_directories_hold_letters_that_every_file_system_takes(world, train, script, tmp_path, monkeypatch):
    (tmp_path / "a:b data").mkdir()
    shutil.copytree(world / script, tmp_path / "a:b data" / "c:d e")
    monkeypatch.chdir(tmp_path)
    flags = flags_of(world, script, dataset=tmp_path / "a:b data" / "c:d e")
    call(script, *flags, *of_updates(script, 1))
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"[\w.-]+", run_dir.name)


@scripts
def test_a_script_copied_away_says_which_flags_it_needs(script, tmp_path):
    copy = shutil.copy(ALGOS / f"{script}.py", tmp_path)
    for flags, needed in ([], "--model"), (["--dataset", "x"], "--model"), (["--model", "x"], "--dataset"):
        if script in SAMPLERS and "--model" in flags:
            needed = "--reward-model"
        said = tmp_path / f"said {len(flags)} {needed}"
        process = fork(said, Path(copy), *flags)
        process.join()
        assert process.exitcode == 1
        assert said.read_text().strip() == f"{needed} is needed: its default is not beside this copy of the script"


# --- files as users have them ---


@row_scripts
def test_a_file_alone_is_enough_and_the_run_says_that_nothing_is_held_out(train, script, tmp_path, capsys):
    path = tiny.write_jsonl(tmp_path / "mine.jsonl", ROWS[script](16))
    run_dir = train(script, *of_updates(script, 1), dataset=path)
    assert "mine.jsonl has no split test or validation: nothing is held out" in capsys.readouterr().out
    assert not scalars(run_dir, "eval/loss")


@pytest.mark.parametrize("script", [*ROWS, "grpo"])
@pytest.mark.parametrize("names,expected", [(["test", "validation"], "test"), (["validation"], "validation")])
def test_test_or_validation_is_held_out_where_there_is_one(train, world, script, names, expected, tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copy(world / script / "train.jsonl", tmp_path / "data")
    for name in names:
        shutil.copy(world / script / "test.jsonl", tmp_path / "data" / f"{name}.jsonl")
    loader = "load_rows" if script in ROWS else "load_prompts"
    with pytest.MonkeyPatch.context() as patch:
        loads = spy_on(patch, importlib.import_module(script), loader)
        train(script, *of_updates(script, 1), dataset=tmp_path / "data")
    assert [call.split for call in loads] == ["train", expected]


@scripts
def test_compressed_files_and_configurations_of_data_sets_are_read(train, world, script, tmp_path):
    rows = (world / script / "train.jsonl").read_bytes()
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(rows))
    folder = tmp_path / script  # datasets 5.2 keeps what it has read of a folder of this name, whatever changes in it
    folder.mkdir()
    (folder / "one.jsonl").write_bytes(rows)
    (folder / "two.jsonl").write_text('{"other": 1}')
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("one", "two"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    expected = weights(train(script, *of_updates(script, 1), dataset=world / script, run_dir="folder"))
    packed = train(script, *of_updates(script, 1), dataset=tmp_path / "rows.jsonl.gz", run_dir="packed")
    configured = train(script, *of_updates(script, 1), dataset=folder, dataset_config="one", run_dir="configured")
    assert same(weights(packed), expected)
    assert same(weights(configured), expected)


@scripts
def test_arguments_of_the_chat_template_reach_it(train, world, script, tmp_path, capsys):
    tokenizer = tiny.word_tokenizer()
    tokenizer.chat_template = "{% if loud %}great {% endif %}" + tokenizer.chat_template
    tiny.make_model(tmp_path / "model", tokenizer=tokenizer)
    rows = [tiny.as_messages(row) for row in ROWS.get(script, tiny.preferences)(26)]
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    flags = {"model": tmp_path / "model", "dataset": path, "chat_template_kwargs": '{"loud": true}'}
    if script in SAMPLERS:
        shutil.copytree(world / "reward", tmp_path / "reward")
        tokenizer.save_pretrained(tmp_path / "reward")
        flags["reward_model"] = tmp_path / "reward"
    train(script, *of_updates(script, 1), **flags)
    assert re.search("first (row|prompt): great ", capsys.readouterr().out)


# --- nothing misread ---


PAIRS = ["reward_model", "dpo"]
pair_scripts = pytest.mark.parametrize("script", PAIRS)


@pair_scripts
@pytest.mark.parametrize(
    "change", [lambda text: text, lambda text: chat(text, first="assistant")], ids=["texts", "chats"]
)
def test_answers_that_share_no_beginning_hold_no_prompt(script, change, tmp_path):
    rows = [{"asked": "review of plot :", "chosen": change("the plot was great ."), "rejected": change("was dull .")}]
    with pytest.raises(SystemExit, match=r"share no beginning.*rename the column that holds it to prompt: \['asked'"):
        load(script, tmp_path, rows)


@pair_scripts
@pytest.mark.parametrize("column", ["question", "instruction", "problem", "query", "context", "input"])
def test_a_question_is_not_dropped_though_the_answers_share_a_beginning(script, column, tmp_path):
    row = {column: "review of plot :", "chosen": "the plot was great .", "rejected": "the plot was dull ."}
    with pytest.raises(SystemExit, match=f": {column} is not read: rename it to prompt, put it into the prompt, or"):
        load(script, tmp_path, [row])
    texts = {key: f"{row[column]} {row[key]}" for key in ("chosen", "rejected")}
    ((prompt, *_),) = load(script, tmp_path, [row | texts | {column: "review of plot :\n"}])
    assert prompt == tiny.word_tokenizer()("review of plot : the plot was").input_ids


CALLS = (  # what is said, and which functions are called with what
    "{% for m in messages %}<|im_start|>{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function.name }}"
    "{{ call.function.arguments }}{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


@pair_scripts
def test_chats_that_differ_in_a_call_of_a_tool_do_not_share_it(script, tmp_path):
    row = {}
    for column, city, verdict in (("chosen", "Paris", "good"), ("rejected", "Rome", "bad")):
        function = {"name": "weather", "arguments": {"city": city}}
        calls = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
        row[column] = [*chat("how is it"), calls, {"role": "tool", "content": "ok"}, *chat(verdict, first="assistant")]
    tokenizer = tiny.bpe_tokenizer(template=CALLS)
    ((prompt, *answers),) = load(script, tmp_path, [row], tokenizer)
    assert "weather" not in tokenizer.decode(prompt)
    for answer, city in zip(answers, ("Paris", "Rome")):
        assert city in tokenizer.decode(answer)


@pair_scripts
def test_a_template_may_open_thoughts_that_the_rejected_answer_alone_lacks(script, tmp_path):
    tokenizer = tiny.bpe_tokenizer(
        template="{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    )
    question = chat("review of plot :")
    thinks = chat("<think>so</think>great", first="assistant")
    plain = chat("dull", first="assistant")
    for chosen, rejected in ((thinks, plain), (plain, thinks)):
        row = {"prompt": question, "chosen": chosen, "rejected": rejected}
        ((prompt, *answers),) = load(script, tmp_path, [row], tokenizer)
        texts = [tokenizer.decode(prompt + answer) for answer in answers]
        assert ["<think>so</think>great" in text for text in texts] == [chosen is thinks, rejected is thinks]


@pair_scripts
def test_a_text_prompt_is_the_last_turn_of_the_user_that_the_chats_share(script, tmp_path):
    before = chat("review of film :", "great .")
    turn = {"role": "user", "content": "review of plot :"}
    good = chat("was great .", first="assistant")
    bad = chat("was dull .", first="assistant")
    explicit = [{"prompt": [*before, turn], "chosen": good, "rejected": bad}]
    wholes = {"chosen": [*before, turn, *good], "rejected": [*before, turn, *bad]}
    expected = load(script, tmp_path, explicit)
    assert load(script, tmp_path, [{"prompt": turn["content"], **wholes}]) == expected
    assert load(script, tmp_path, [wholes]) == expected


@pair_scripts
def test_a_prompt_that_one_answer_alone_repeats_is_refused(script, tmp_path):
    turn = {"role": "user", "content": "review of plot :"}
    other = {"role": "system", "content": "great"}
    repeats = [turn, *chat("great .", first="assistant")]
    begins_otherwise = [other, turn, *chat("dull .", first="assistant")]
    row = {"prompt": turn["content"], "chosen": repeats, "rejected": begins_otherwise}
    with pytest.raises(SystemExit, match="row 1: one of the two answers repeats the prompt"):
        load(script, tmp_path, [row])


def learnt(script, answer):
    """A row of chats in each layout of a script that ends in an answer."""
    question = chat("review of plot :")
    reply = chat(answer, first="assistant")
    other = chat("was dull .", first="assistant")
    if script == "sft":
        return [{"messages": question + reply}, {"prompt": question, "completion": reply}]
    wholes = {"chosen": question + reply, "rejected": question + other}
    return [wholes, {"prompt": question, "chosen": reply, "rejected": other}]


DROPS = (  # as DeepSeek-R1's: what stands before </think> is not repeated, and a new answer begins with <think>
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] }}<eos>"
    "{% else %}{{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}<think> {% endif %}"
)


@row_scripts
@pytest.mark.parametrize("layout", [0, 1])
def test_a_template_that_leaves_out_a_part_of_an_answer_is_refused_and_one_that_opens_thoughts_is_not(
    script, layout, tmp_path
):
    tokenizer = tiny.bpe_tokenizer(template=DROPS)
    with pytest.raises(SystemExit, match="leaves out a part of the turn '<think>dull</think>great'"):
        load(script, tmp_path, [learnt(script, "<think>dull</think>great")[layout]], tokenizer)
    ((prompt, answer, *_),) = load(script, tmp_path, [learnt(script, "great")[layout]], tokenizer)
    assert "great" in tokenizer.decode(answer)
    assert "think" not in tokenizer.decode(prompt + answer)


@row_scripts
@pytest.mark.parametrize("layout", [0, 1])
def test_chats_that_end_in_a_turn_of_the_user_are_refused(script, layout, tmp_path):
    row = learnt(script, "great .")[layout]
    last = list(row)[-1]
    row[last] = [*row[last], {"role": "user", "content": "review of film :"}]
    with pytest.raises(SystemExit, match="row 1: the chat does not end in a turn of the assistant"):
        load(script, tmp_path, [row])


def test_single_messages_are_no_texts(tmp_path):
    rows = [{"text": "review of plot :", "role": "prompter", "parent_id": "a"}]
    with pytest.raises(SystemExit, match="has one message per row"):
        load("sft", tmp_path, rows)


@row_scripts
def test_a_completion_of_text_answers_a_prompt_of_messages(script, tmp_path):
    asked = {"prompt": chat("review of plot :")}
    texts = {column: f"was {word} ." for column, word in zip(COLUMNS[script][1:], ("great", "dull"))}
    chats = {column: chat(value, first="assistant") for column, value in texts.items()}
    assert load(script, tmp_path, [asked | texts]) == load(script, tmp_path, [asked | chats])


@row_scripts
def test_the_prompt_is_cut_off_answers_that_repeat_it_unless_few_do(script, tmp_path):
    prompts = ["the plot", "the film", "the acting", "the music"]
    ends = {column: f" was {word} ." for column, word in zip(COLUMNS[script][1:], ("great", "dull"))}
    rows = []
    whole = []
    for prompt in prompts:
        repeating = {column: prompt + end for column, end in ends.items()}
        rows.append({"prompt": prompt} | ends)
        whole.append({"prompt": prompt} | repeating)
    expected = load(script, tmp_path, rows)
    assert load(script, tmp_path, whole) == expected
    assert load(script, tmp_path, [*whole[:3], rows[3]]) == expected
    tokenizer = tiny.bpe_tokenizer()
    loaded = load(script, tmp_path, [*rows[:3], whole[3]], tokenizer)
    prompt, answer, *_ = loaded[-1]
    assert tokenizer.decode(prompt + answer).startswith("the musicthe music was great .")


@row_scripts
def test_a_prompt_of_messages_behind_a_system_text_is_used_once(script, tmp_path):
    asked = chat("review of plot :")
    system = {"role": "system", "content": "great"}
    answers = {}
    for column, word in zip(COLUMNS[script][1:], ("great", "dull")):
        answers[column] = chat(f"was {word} .", first="assistant")
    wholes = {column: [system, *asked, *answer] for column, answer in answers.items()}
    tokenizer = tiny.bpe_tokenizer(template=tiny.CHATML)
    explicit = load(script, tmp_path, [{"prompt": [system, *asked]} | answers], tokenizer)
    assert load(script, tmp_path, [{"prompt": asked} | wholes], tokenizer) == explicit
    assert load(script, tmp_path, [{"prompt": "review of plot :"} | wholes], tokenizer) == explicit


@row_scripts
def test_an_answer_that_asks_the_prompt_again_keeps_all_its_turns(script, tmp_path):
    asked = chat("review of plot :")
    again = [*chat("was great .", first="assistant"), *asked, *chat("was dull .", first="assistant")]
    other = chat("was not great .", first="assistant")
    row = {"prompt": asked} | dict(zip(COLUMNS[script][1:], (again, other)))
    ((prompt, answer, *_),) = load(script, tmp_path, [row])
    text = tiny.word_tokenizer().decode(prompt + answer)
    assert text.count("review of plot :") == 2
    assert "was great ." in text
    assert "was dull ." in text


@pytest.mark.parametrize("script", SAMPLERS)
@pytest.mark.parametrize("column", ["messages", "chosen", "completion"])
def test_a_data_set_that_the_others_read_as_chats_is_asked_as_one(script, column, tmp_path):
    module = importlib.import_module(script)
    tokenizer = tiny.word_tokenizer()
    first = {"role": "user", "content": "great"}
    turns = [first, *chat("review of plot :", "the plot was great .")]
    rows = [{"prompt": "review of plot :", column: turns}, {"prompt": "review of film :", column: turns}]
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    found = [tokenizer.decode(ids) for ids, _ in module.load_prompts(str(path), "train", tokenizer, 64)]
    asked = [turns[:2], chat("review of film :")]
    expected = [tokenizer.apply_chat_template(x, tokenize=False, add_generation_prompt=True).split() for x in asked]
    assert [text.split() for text in found] == expected


# --- what main does with its flags ---


@scripts
def test_the_seed_orders_the_rows(train, script):
    orders = []
    for seed in (1, 2, 1):
        with pytest.MonkeyPatch.context() as patch:
            batches = spy_on(patch, importlib.import_module(script), "batch_at")
            train(script, *of_updates(script, 1), seed=seed, run_dir=f"{seed}{len(orders)}")
        orders.append([call.result for call in batches])
    assert orders[0] == orders[2] != orders[1]


@pytest.mark.parametrize("script", SAMPLERS)
def test_the_seed_draws_the_responses(train, script):
    drawn = []
    for seed in (1, 2, 1):
        with pytest.MonkeyPatch.context() as patch:
            calls = spy_on(patch, importlib.import_module(script), "sample")
            train(script, *of_updates(script, 1), seed=seed, run_dir=f"{seed}{len(drawn)}")
        drawn.append([call.uniform.sum().item() for call in calls])
    assert drawn[0] == drawn[2]
    assert not set(drawn[0]) & set(drawn[1])


@scripts
def test_the_learning_rate_follows_its_schedule(train, script):
    if script in ROWS:
        run_dir = train(script, *of_updates(script, 12), warmup=0.2)
        expected = {1: 1e-3 / 3}  # after three updates, a cosine over nine
        for update in (10, 12):
            share = (1 + math.cos(math.pi * (update - 4) / 9)) / 2
            expected[update] = 1e-3 * share
    else:
        run_dir = train(script, *of_updates(script, 4))
        expected = {1: 1e-3, 2: 0.75e-3, 3: 0.5e-3, 4: 0.25e-3}
    found = dict(scalars(run_dir, "learning_rate" if script in ROWS else "lr"))
    assert found == pytest.approx(expected, rel=1e-5)


@scripts
def test_the_gradients_norm_is_clipped_to_one_and_no_weight_decays(train, script, monkeypatch):
    backward = accelerate.Accelerator.backward
    monkeypatch.setattr(accelerate.Accelerator, "backward", lambda self, loss: backward(self, 1000 * loss))
    one_step = {"num_minibatches": 1} if script in SAMPLERS else {}
    run_dir = train(script, *of_updates(script, 1), **one_step)
    files = sorted((run_dir / "checkpoint" / "1").glob("optimizer*.bin"))
    states = [torch.load(file, weights_only=True) for file in files]
    decays = []
    moments = []
    for state_of_optimizer in states:
        decays += [group["weight_decay"] for group in state_of_optimizer["param_groups"]]
        moments += [moment["exp_avg"].flatten() for moment in state_of_optimizer["state"].values()]
    assert set(decays) == {0.0}
    assert 10 * torch.cat(moments).norm().item() == pytest.approx(1, rel=1e-3)  # Adam's first moment is a tenth of it
    assert scalars(run_dir, "grad_norm")[0][1] > 10


@row_scripts
def test_epochs_count_without_max_steps(train, script):
    run_dir = train(script, max_steps=0, epochs=4)
    assert state(run_dir)["step"] == 12  # 26 rows make three batches of 8, and two are left out of each epoch
