"""The command-line contract that the scripts on language models share: what a run leaves, resume, processes, bad input.

Scripts are called in this process, with the command line that a user would type, where nothing has to be killed or
started several times: importing transformers takes longer than these runs.
"""

import importlib
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tiny
import torch
from helpers import ALGOS, command, run, scalars
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

DATA = {"sft": tiny.completions, "reward_model": tiny.preferences, "dpo": tiny.preferences}
LOADER = {"sft": AutoModelForCausalLM, "reward_model": AutoModelForSequenceClassification, "dpo": AutoModelForCausalLM}
scripts = pytest.mark.parametrize("script", [script for script in DATA if (ALGOS / f"{script}.py").exists()])
SHORT = ("--batch-size", 8, "--epochs", 2, "--save-every", 3, "--eval-every", 4, "--max-length", 64)  # 12 updates


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny model and the data of each script."""
    folder = tmp_path_factory.mktemp("world")
    tiny.make_model(folder / "model")
    for script, rows in DATA.items():
        tiny.write_jsonl(folder / script / "train.jsonl", rows(50))
        tiny.write_jsonl(folder / script / "test.jsonl", rows(11))
    return folder


@pytest.fixture
def call(world, tmp_path, monkeypatch, capsys):
    """Run a script in this process on the tiny world; returns exit status, stdout, stderr and the run directory."""

    def call(script, *flags, run_dir="run", short=True):
        module = importlib.import_module(script)
        given = list(map(str, flags))
        for flag, value in (
            ("--model", world / "model"),
            ("--dataset", world / script),
            ("--run-dir", tmp_path / run_dir),
        ):
            if "--resume" not in given and flag not in given:
                given += [flag, str(value)]
        if short and "--resume" not in given:
            given = [*map(str, SHORT), *given]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *given])
        capsys.readouterr()
        status = 0
        try:
            module.main(module.parse_args())
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr(), tmp_path / run_dir

    return call


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """Run directory of an uninterrupted short run of each script, through a process of its own."""
    runs = {}

    def get(script):
        if script not in runs:
            runs[script] = tmp_path_factory.mktemp(script) / "run"
            done = run(script, *SHORT, *where(world, script), "--run-dir", runs[script])
            assert done.returncode == 0, done.stderr
        return runs[script]

    return get


def where(world, script):
    """Flags that name the tiny model and data."""
    return ("--model", world / "model", "--dataset", world / script)


def weights(run_dir):
    """Tensors of the final model."""
    return load_file(run_dir / "model" / "model.safetensors")


def same(a, b):
    """Whether two models have the same tensors bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def furthest(a, b):
    """Largest difference between two models."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


# --- what a run leaves behind ---


@scripts
def test_a_run_leaves_arguments_events_a_checkpoint_and_a_model_that_transformers_opens(finished, script):
    run_dir = finished(script)
    assert {path.name.split(".")[0] for path in run_dir.iterdir()} == {"args", "checkpoint", "model", "events"}
    assert json.loads((run_dir / "args.json").read_text())["epochs"] == 2
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert state["script"] == script and state["step"] == 12
    model = LOADER[script].from_pretrained(run_dir / "model")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    assert len(tokenizer) == model.config.vocab_size
    stored = state["model"]
    assert all(
        torch.equal(parameter, stored[name]) for name, parameter in model.named_parameters() if "score" not in name
    )
    if script != "reward_model":
        (answer,) = pipeline("text-generation", str(run_dir / "model"))("review of plot :", max_new_tokens=3)
        assert answer["generated_text"].startswith("review of plot :")


@scripts
def test_the_first_and_every_tenth_update_and_evaluations_are_logged(finished, script):
    for tag in ("loss", "grad_norm", "learning_rate"):
        points = scalars(finished(script), tag)
        assert [step for step, _ in points] == [1, 3, 6, 9, 10, 12], tag  # and at checkpoints
        assert all(math.isfinite(value) for _, value in points)
    assert [step for step, _ in scalars(finished(script), "eval/loss")] == [0, 4, 8, 12]


@scripts
def test_the_learning_rate_is_the_scheduled_one(finished, script):
    scheduled = importlib.import_module(script).scheduled
    peak = importlib.import_module(script).Args().learning_rate
    for step, rate in scalars(finished(script), "learning_rate"):
        assert rate == pytest.approx(scheduled(peak, step - 1, 12, 0.1, "cosine"), rel=1e-5)


@scripts
def test_the_gradient_is_clipped_to_its_largest_norm(script, call):
    status, _, err, run_dir = call(script, "--max-steps", 1, "--max-grad-norm", 1e-3)
    assert status == 0, err
    moments = torch.load(run_dir / "checkpoint.pt", weights_only=True)["optimizer"]["state"].values()
    norm = torch.cat([each["exp_avg"].flatten() for each in moments]).norm() / 0.1  # Adam's β1 is 0.9
    assert norm.item() == pytest.approx(1e-3, rel=1e-2) and scalars(run_dir, "grad_norm")[0][1] > 1e-2


@scripts
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(finished, script, call):
    for seed, equal in ((1, True), (2, False)):
        status, _, err, run_dir = call(script, "--seed", seed, run_dir=str(seed))
        assert status == 0, err
        assert same(weights(run_dir), weights(finished(script))) == equal


# --- resume ---


@scripts
def test_a_run_killed_at_any_moment_resumes_to_the_same_weights_bit_for_bit(finished, script, world, tmp_path):
    run_dir = tmp_path / "run"
    flags = (*SHORT, *where(world, script), "--run-dir", run_dir)
    process = subprocess.Popen(command(script, *flags), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (run_dir / "checkpoint.pt").exists() and time.time() < deadline:
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.wait()
    shutil.rmtree(run_dir / "model", ignore_errors=True)  # if it was quicker than the kill
    resumed = run(script, "--resume", run_dir / "checkpoint.pt")
    assert resumed.returncode == 0, resumed.stderr
    assert same(weights(run_dir), weights(finished(script)))
    for tag in ("loss", "grad_norm"):
        assert scalars(run_dir, tag) == scalars(finished(script), tag)


@scripts
def test_a_finished_run_is_only_evaluated(finished, script, tmp_path, call):
    shutil.copytree(finished(script), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    status, out, err, run_dir = call(script, "--resume", tmp_path / "run" / "checkpoint.pt")
    assert status == 0, err
    assert "update 12: held-out" in out and same(weights(run_dir), weights(finished(script)))
    assert scalars(run_dir, "loss") == scalars(finished(script), "loss")


@scripts
def test_a_checkpoint_of_other_data_or_another_model_is_refused(finished, script, world, call):
    checkpoint = finished(script) / "checkpoint.pt"
    for flag, name in (("--dataset", "dataset"), ("--model", "model"), ("--batch-size", "batch_size")):
        value = world / "elsewhere" if flag != "--batch-size" else 4
        status, _, err, _ = call(script, "--resume", checkpoint, flag, value)
        assert status == 2 and err.startswith("error: --resume") and f"made with {name}" in err


# --- one gradient, however it is computed ---


@pytest.fixture
def curve(call, monkeypatch):
    """Loss and gradient norm of each of the first updates with given flags."""

    def get(script, *flags, run_dir="run"):
        monkeypatch.setattr(importlib.import_module(script), "LOG_EVERY", 1)
        status, _, err, run_dir = call(script, *flags, "--max-steps", 3, "--eval-every", 0, run_dir=run_dir)
        assert status == 0, err
        return [value for tag in ("loss", "grad_norm") for _, value in scalars(run_dir, tag)]

    return get


@scripts
def test_micro_batches_of_unequal_lengths_add_up_to_the_batch(script, curve):
    whole = curve(script, run_dir="8")
    for size in (1, 2, 4):
        assert curve(script, "--micro-batch-size", size, run_dir=str(size)) == pytest.approx(whole, rel=1e-4)


@scripts
def test_gradient_checkpointing_changes_nothing_and_bfloat16_little(script, curve):
    plain = curve(script, run_dir="plain")
    assert curve(script, "--gradient-checkpointing", run_dir="recomputed") == pytest.approx(plain, rel=1e-5)
    rounded = curve(script, "--dtype", "bfloat16", run_dir="rounded")
    assert rounded == pytest.approx(plain, rel=0.1, abs=0.02) and rounded != pytest.approx(plain, rel=1e-6)


@scripts
@pytest.mark.parametrize("flags", [(), ("--fsdp",)], ids=["replicated", "sharded"])
def test_two_processes_compute_the_update_of_one(finished, script, flags, world, tmp_path):
    done = run(script, *SHORT, *where(world, script), *flags, "--run-dir", tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr
    for tag in ("loss", "grad_norm", "eval/loss"):
        one = [value for _, value in scalars(finished(script), tag)]
        assert [value for _, value in scalars(tmp_path / "two", tag)] == pytest.approx(one, rel=2e-3), tag
    first = [scalars(run_dir, "grad_norm")[0][1] for run_dir in (finished(script), tmp_path / "two")]
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    assert LOADER[script].from_pretrained(tmp_path / "two" / "model") is not None


@scripts
def test_a_sharded_run_resumes_to_the_weights_of_the_uninterrupted_one(script, world, tmp_path):
    flags = (*SHORT, *where(world, script), "--fsdp", "--eval-split", "")
    whole = run(
        script, *flags, "--run-dir", tmp_path / "whole", "--max-steps", 4, "--schedule", "constant", processes=2
    )
    half = run(script, *flags, "--run-dir", tmp_path / "half", "--max-steps", 2, "--schedule", "constant", processes=2)
    assert whole.returncode == half.returncode == 0, whole.stderr + half.stderr
    rest = run(script, "--resume", tmp_path / "half" / "checkpoint.pt", "--max-steps", 4, processes=2)
    assert rest.returncode == 0, rest.stderr
    far = furthest(weights(tmp_path / "half"), weights(tmp_path / "whole"))
    assert far < 1e-5  # rounding; lost moments would move weights by the learning rate


@pytest.mark.parametrize("script", ["sft", "reward_model", "dpo", "rlhf_ppo"])
def test_help_waits_for_none_of_the_heavy_libraries(script):
    code = (
        "import runpy, sys\n"
        "try: runpy.run_path(sys.argv[1], run_name='__main__')\n"
        "except SystemExit: print(*sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, ALGOS / f"{script}.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
    heavy = {"datasets", "transformers.modeling_utils", "torch.distributed.checkpoint", "torch.distributed.fsdp"}
    assert not heavy & set(done.stdout.splitlines()[-1].split())


# --- models and data of all kinds ---


@scripts
@pytest.mark.parametrize("arch", tiny.CONFIGS)
def test_every_causal_architecture_trains(script, arch, call, tmp_path):
    tiny.make_model(tmp_path / arch, arch)
    status, _, err, run_dir = call(script, "--model", tmp_path / arch, "--max-steps", 2)
    assert status == 0, err
    before, after = load_file(tmp_path / arch / "model.safetensors"), weights(run_dir)
    assert any(not torch.equal(before[name], after[name]) for name in before.keys() & after.keys())


@scripts
def test_messages_files_and_slices_of_splits_do(script, call, world, tmp_path):
    rows = DATA[script](40)
    tiny.write_jsonl(tmp_path / "chat.jsonl", [tiny.as_messages(row) for row in rows])
    (tmp_path / "plain.json").write_text(json.dumps(rows))
    for name in ("chat.jsonl", "plain.json"):
        flags = ("--dataset", tmp_path / name, "--train-split", "train[:80%]", "--eval-split", "train[80%:]")
        status, _, err, run_dir = call(script, *flags, "--max-steps", 1, run_dir=name[:4])
        assert status == 0, err
        assert math.isfinite(scalars(run_dir, "eval/loss")[-1][1])


@scripts
def test_rows_that_are_cut_or_left_out_are_counted(script, call, tmp_path, world):
    rows = DATA[script](20)
    rows[3]["prompt"] = "review of the film " * 10 + ":"
    tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    flags = ("--dataset", tmp_path / "rows.jsonl", "--eval-split", "", "--max-length", 12, "--max-steps", 1)
    status, out, err, _ = call(script, *flags)
    assert status == 0, err
    assert "split train: of 20 rows" in out and "12 tokens and 1 left out" in out


@scripts
def test_a_loss_that_is_not_finite_stops_the_run_with_status_1(script, call):
    status, _, err, run_dir = call(script, "--learning-rate", 1e30, "--max-grad-norm", "inf", "--warmup", 0)
    assert status == 1 and "error: the loss became nan at step" in err
    assert not (run_dir / "model").exists()


# --- bad input ---


def broken_line(folder, rows):
    lines = [json.dumps(row) for row in rows]
    (folder / "train.jsonl").write_text("\n".join([*lines[:3], '{"prompt": "half a', *lines[3:]]) + "\n")


def with_change(number, **columns):
    def change(folder, rows):
        rows[number] = {name: value for name, value in (rows[number] | columns).items() if value is not ...}
        tiny.write_jsonl(folder / "train.jsonl", rows)

    return change


def with_columns(**names):
    def rename(folder, rows):
        rows = [{names.get(name, name): value for name, value in row.items()} for row in rows]
        tiny.write_jsonl(folder / "train.jsonl", rows)

    return rename


def broken_bytes(folder, rows):
    """A text that is not UTF-8."""
    (folder / "train.jsonl").write_bytes(json.dumps(rows[0]).encode() + b'\n{"prompt": "\xff"}\n')


BAD_DATA = {  # what is wrong with the data set: a function that writes it, and words of the message
    "a broken line": (broken_line, ["line 4 of train.jsonl"]),
    "bytes that are no text": (broken_bytes, ["UTF-8"]),
    "misnamed columns": (with_columns(prompt="question", chosen="good", completion="answer"), ["question", "needs"]),
    "a number": (with_change(2, prompt=5), ["row 3", "prompt", "5"]),
    "messages among texts": (with_change(4, prompt=[{"role": "user", "content": "x"}]), ["row 5", "mixed"]),
    "an empty completion": (with_change(1, completion="  ", rejected=" "), ["row 2", "empty"]),
    "a missing value": (with_change(6, completion=..., chosen=...), ["row 7", "None"]),
    "no rows": (lambda folder, rows: (folder / "train.jsonl").write_text(""), ["no rows"]),
}


def refused(outcome, *words):
    """Whether the outcome of `call` is one clear line with these words, exit status 2, and nothing written."""
    status, _, err, run_dir = outcome
    assert status == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert all(str(word) in err for word in words), err
    assert not run_dir.exists()


@scripts
@pytest.mark.parametrize("fault", BAD_DATA)
def test_bad_data_is_refused_by_row_or_line(script, fault, call, tmp_path):
    write, words = BAD_DATA[fault]
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", DATA[script](12))
    refused(call(script, "--dataset", tmp_path / "data", "--eval-split", ""), "--dataset", *words)


@scripts
def test_bad_flags_models_and_places_are_refused(script, call, tmp_path, world):
    for flags, words in {
        ("--batch-size", 0): ["--batch-size"],
        ("--batch-size", 6, "--micro-batch-size", 4): ["multiple of --micro-batch-size"],
        ("--batch-size", 64): ["--batch-size 64", "50 rows"],
        ("--warmup", 1.5): ["--warmup"],
        ("--learning-rate", -1): ["--learning-rate"],
        ("--max-length", 500): ["128", "--max-length"],
        ("--max-length", 2): ["--max-length 2", "no row"],
        ("--fsdp",): ["torchrun"],
        ("--train-split", "validation"): ["validation", "train"],
        ("--eval-split", "validation"): ["validation", "--eval-split ''"],
        ("--dataset", tmp_path / "nothing.jsonl"): ["nothing.jsonl", "no such"],
        ("--dataset", tmp_path / "nothing"): ["nothing", "no such"],
        ("--dataset", ALGOS / "ppo.py"): [".jsonl"],
        ("--model", tmp_path / "nothing"): ["--model", "no such folder"],
        ("--run-dir", "/proc/run"): ["--run-dir /proc/run"],
        ("--device", "cuda"): ["--device cuda"] if not torch.cuda.is_available() else None,
        ("--resume", tmp_path / "no.pt"): ["--resume", "no such file"],
    }.items():
        if words:
            refused(call(script, *flags), *words)


@scripts
def test_a_model_without_weights_tokenizer_eos_or_template_is_refused(script, call, tmp_path, world):
    whole = tmp_path / "whole"
    tiny.make_model(whole)
    bare = tmp_path / "bare"
    shutil.copytree(whole, bare)
    (bare / "model.safetensors").unlink()
    refused(call(script, "--model", bare), "--model", "no weights")
    lost = tmp_path / "lost"
    shutil.copytree(whole, lost, ignore=shutil.ignore_patterns("tokenizer*"))
    refused(call(script, "--model", lost), "--model", "tokenizer")
    endless = tmp_path / "endless"
    tiny.make_model(endless, tokenizer=tiny.word_tokenizer(eos=None))
    refused(call(script, "--model", endless), "--model", "EOS")
    small = tmp_path / "small"
    shutil.copytree(whole, small)
    larger = tiny.bpe_tokenizer()
    larger.pad_token = "<s>"
    larger.save_pretrained(small)
    refused(call(script, "--model", small), "--model", "tokens in the tokenizer")
    mute = tmp_path / "mute"
    tokenizer = tiny.word_tokenizer()
    tokenizer.chat_template = None
    tiny.make_model(mute, tokenizer=tokenizer)
    tiny.write_jsonl(tmp_path / "chat.jsonl", [tiny.as_messages(row) for row in DATA[script](12)])
    refused(call(script, "--model", mute, "--dataset", tmp_path / "chat.jsonl", "--eval-split", ""), "chat template")


@scripts
def test_code_that_comes_with_a_model_is_never_run(script, call, tmp_path):
    folder = tmp_path / "code"
    tiny.make_model(folder)
    config = json.loads((folder / "config.json").read_text())
    auto = {
        "AutoConfig": "evil.Config",
        "AutoModelForCausalLM": "evil.M",
        "AutoModelForSequenceClassification": "evil.M",
    }
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": auto}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    refused(call(script, "--model", folder), "--model", "never run")
    assert not (tmp_path / "ran").exists()


@scripts
def test_a_run_directory_that_is_taken_is_refused_and_kept(finished, script, call):
    before = sorted(path.stat().st_mtime_ns for path in finished(script).rglob("*"))
    status, _, err, _ = call(script, "--run-dir", finished(script))
    assert status == 2 and "already holds a run" in err
    assert sorted(path.stat().st_mtime_ns for path in finished(script).rglob("*")) == before


@scripts
def test_a_copied_script_names_the_flags_it_needs(script, tmp_path):
    shutil.copy(ALGOS / f"{script}.py", tmp_path / f"{script}.py")
    done = subprocess.run(
        [sys.executable, tmp_path / f"{script}.py"], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "--model" in done.stderr and "--dataset" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [f"{script}.py"]
