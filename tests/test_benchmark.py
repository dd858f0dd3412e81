"""The regression benchmark: its answers on known data, its runs with scripts that fail or are killed, its faults."""

import ast
import fcntl
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import tyro
from helpers import REPO
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

import run as benchmark
from core import pictures, references, report, runs, specs, verdict
from cost import floor, growth, levels, speed
from faults import plant
from peers import record_trl
from world import ASSETS

STUB = '''
"""A script that logs a curve of returns up to the number in $LEVEL; how it ends is in its flags."""
import argparse, json, os, pathlib, signal, sys, time
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

parser = argparse.ArgumentParser()
for flag in ("--seed", "--run-dir", "--end", "--resume"):
    parser.add_argument(flag, default="")
args = parser.parse_args()
run_dir = pathlib.Path(args.run_dir or args.resume)
run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
(run_dir / "args.json").write_text(json.dumps({"total_timesteps": 1000}))
end = "well" if args.resume else args.end
if end == "killed" and args.seed == "2000":
    os.kill(os.getpid(), signal.SIGKILL)
if end == "badly" and args.seed == "2000":
    print("progress\\rerror: no luck", file=sys.stderr)
    sys.exit(3)
if end == "never":
    (run_dir / "checkpoint.pt").write_text("half")
    time.sleep(60)
writer = EventFileWriter(str(run_dir))
for step in range(10, 1001, 10):
    value = float(os.environ["LEVEL"]) * step / 1000 + int(args.seed or 0) / 1000
    for tag, x in (("charts/episodic_return", value), ("charts/episodes", 5.0)):
        if end != "silently":
            writer.add_event(Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=x)])))
writer.close()
'''


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Call run.py with stub scripts and specs of them; returns exit status, rows of answers and the lines printed."""
    (tmp_path / "algos").mkdir()
    for script in ("stub", "other"):
        (tmp_path / "algos" / f"{script}.py").write_text(STUB)
    measures = specs.returns(start=0, optimum=100.0)
    spec = specs.Spec("stub", "Task-v0", {"quick": 2, "full": 5}, 0.1, measures)
    monkeypatch.setattr(specs, "SPECS", (spec, replace(spec, script="other")))
    monkeypatch.setattr(specs, "ALGOS", tmp_path / "algos")
    monkeypatch.setattr(specs, "REFERENCE", tmp_path / "reference")
    monkeypatch.setattr(specs, "RESULTS", tmp_path)
    monkeypatch.setenv("LEVEL", "100")
    monkeypatch.setattr(runs, "POLL", 0.02)

    def call(command, *flags, end="well", judged=True):
        ending = tuple(replace(spec, flags=("--end", end)) for spec in specs.SPECS)
        monkeypatch.setattr(specs, "SPECS", ending)
        given = [command, *map(str, flags), "--runs", str(tmp_path / "runs")]
        if command not in ("run", "check") or not judged:
            return benchmark.main(given), None
        answers = tmp_path / "rows.json"
        status = benchmark.main([*given, "--json", str(answers)])
        return status, json.loads(answers.read_text())

    call.root = tmp_path
    return call


# --- the statistics ---


@pytest.mark.parametrize("ours,reference", [(1, 5), (2, 5), (3, 5), (5, 5), (5, 10), (20, 5)])
def test_an_unchanged_script_is_called_worse_in_few_percent_of_all_cases_even_without_a_margin(ours, reference):
    rng = np.random.default_rng(0)
    calls = 250
    low = high = 0
    for _ in range(calls):
        _, lower, upper = verdict.difference(rng.normal(size=ours), rng.normal(size=reference))
        low = low + (upper < 0)
        high = high + (lower > 0)
    found = (low + high) / calls
    error = (0.05 * 0.95 / calls) ** 0.5
    assert found < 0.05 + 3 * error  # nominal, within three standard errors
    assert found > 0.01  # and not for want of power


def test_answers_of_known_intervals():
    assert verdict.answer(-0.09, 0.2, 0.1) == "pass"
    assert verdict.answer(-0.3, -0.11, 0.1) == "regression"
    assert verdict.answer(-0.11, 0.3, 0.1) == "inconclusive"
    assert verdict.worst(["pass", "regression", "inconclusive"]) == "regression"


def test_seeds_that_all_agree_give_a_point_and_single_seeds_nothing():
    assert verdict.difference([500.0] * 5, [490.0] * 5) == (10, 10, 10)
    assert verdict.difference([500.0] * 2, [500.0] * 5) == (0, 0, 0)
    assert verdict.difference([1.0], [2.0]) == (-1, -np.inf, np.inf)


def test_one_seed_is_judged_by_the_spread_of_the_reference():
    # five reference seeds with variance 2.5: t(4 degrees, 97.5 %) = 2.776, prediction interval over 1 + 1/5
    gap, low, high = verdict.difference([10.0], [1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764451 * (2.5 * 1.2) ** 0.5
    assert (gap, low, high) == pytest.approx((7, 7 - half, 7 + half))


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_a_drop_of_the_detectable_size_is_called_a_regression_in_about_four_of_five_cases(seeds):
    rng = np.random.default_rng(0)
    calls = 250
    found = 0
    drop = verdict.detectable(np.arange(5) / 2.5**0.5, seeds, 0.5)  # these have a standard deviation of 1
    for _ in range(calls):
        ours = rng.normal(-drop, 1, seeds)
        _, low, high = verdict.difference(ours, rng.normal(size=5))
        found += verdict.answer(low, high, 0.5) == "regression"
    assert 0.7 < found / calls < 0.9


def test_one_bad_seed_of_a_peer_does_not_make_ours_look_worse():
    gap, low, _ = verdict.difference([500.0] * 5, [500.0, 499.0, 500.0, 240.0, 500.0])
    assert gap > 50  # resampled means of the peer never exceed 500; pooled variance would say -60
    assert low == 0


# --- pass, regression, inconclusive ---


@pytest.mark.parametrize(
    "change,expected",
    [
        (lambda curve: curve, "pass"),
        (lambda curve: curve + 0.5 * (100 - curve), "pass"),
        (lambda curve: 0.7 * curve, "regression"),
        (lambda curve: np.r_[np.zeros(20), curve[:-20]], "regression"),  # learns later, ends as high
        (lambda curve: np.where(np.arange(50) < 45, curve, 50.0), "regression"),  # falls in the end
        (lambda curve: 0.9 * curve, "inconclusive"),  # as far off as the margin
    ],
    ids=["same", "better", "lower", "later", "forgets", "at the margin"],
)
def test_synthetic_curves_get_the_answer_they_deserve(change, expected, bench):
    rng = np.random.default_rng(1)
    spec = specs.SPECS[0]
    tag = spec.measures[0].tag

    def seeds(change):
        found = {}
        for seed in range(5):
            rising = 1 - np.exp(-np.arange(50) / 10)
            curve = change(100 * rising * rng.normal(1, 0.03))
            final = float(curve[-5:].mean())
            found[seed] = {tag: {"curve": curve.tolist(), "final": final}}
        return found

    reference = references.Reference("ours", 1000, seeds(lambda curve: curve))
    (row,) = verdict.compare(spec, seeds(change), reference)
    assert row["answer"] == expected, row


def test_for_a_loss_less_is_better_and_the_start_is_that_of_the_reference():
    loss = specs.Measure("eval/loss", "loss", higher=False, margin=0.1)
    spec = replace(specs.SPECS[0], measures=(loss,))

    def seeds(level):
        found = {}
        for seed in range(5):
            curve = [3.0] + [level + 0.001 * seed] * 49
            found[seed] = {"eval/loss": {"curve": curve, "final": level}}
        return found

    reference = references.Reference("ours", 1000, seeds(1.0))
    for level, answer, gap in ((1.0, "pass", 0.0), (0.5, "pass", 0.25), (1.5, "regression", -0.25)):
        (row,) = verdict.compare(spec, seeds(level), reference)
        assert row["answer"] == answer
        assert row["final"][0] == pytest.approx(gap)


# --- runs ---


def test_runs_are_made_once_recorded_and_judged(bench, capsys, monkeypatch):
    status, rows = bench("run")
    assert status == 0
    assert rows == []
    assert "without a reference, not judged" in capsys.readouterr().out
    assert len(list(bench.root.glob("runs/*/*/*.json"))) == 4
    status, _ = bench("run", "--tier", "full", "--jobs", 4)
    assert status == 0
    assert "10 runs, 6 still to do" in capsys.readouterr().out
    assert bench("record", "*")[0] == 0
    kept = json.loads((bench.root / "reference" / "ours" / "stub-Task-v0.json").read_text())
    assert kept["command"] == "python algos/stub.py --end well --seed S"
    assert list(kept["seeds"]) == [str(1000 * i) for i in range(1, 6)]
    figures = kept["seeds"]["2000"]["measures"]["charts/episodic_return"]
    assert len(figures["curve"]) == 50  # 2 + mean of 81, 82 … 100
    assert figures["final"] == pytest.approx(92.5)
    capsys.readouterr()
    status, rows = bench("run", "--tier", "full")
    assert status == 0
    assert "10 runs, 0 still to do" in capsys.readouterr().out
    assert [row["answer"] for row in rows] == ["pass", "pass"]

    script = bench.root / "algos" / "stub.py"
    script.write_text(script.read_text() + "# a comment changes nothing\n")
    assert bench("check", "--tier", "full")[0] == 0
    script.write_text(script.read_text() + "pass\n")  # but code does: its runs are no longer those of the script
    capsys.readouterr()
    assert bench("check", "--tier", "full")[0] == 1
    assert "FAILED: stub-Task-v0: no finished run" in capsys.readouterr().out
    monkeypatch.setenv("LEVEL", "70")
    status, rows = bench("run", "stub-*", "--seeds", 2)
    assert status == 1
    assert rows[0]["answer"] == "regression"
    assert "REGRESSION: stub-Task-v0" in capsys.readouterr().out

    kept_file = bench.root / "reference" / "ours" / "stub-Task-v0.json"
    kept_file.write_text(json.dumps(kept | {"steps": 2000}))  # as when the script's defaults changed since
    assert bench("check", "stub-*")[0] == 1
    assert "FAILED: stub-Task-v0: runs of 1000 steps, but of 2000 in ours" in capsys.readouterr().out


@pytest.mark.parametrize(
    "end,said",
    [
        ("killed", "killed by SIGKILL"),
        ("badly", "exit status 3 (error: no luck"),
    ],
)
def test_a_run_that_fails_or_is_killed_is_named_and_the_others_go_on(end, said, bench, capsys):
    status, _ = bench("run", "--jobs", 3, end=end)
    lines = capsys.readouterr().out
    assert status == 1
    for script in ("stub", "other"):
        assert f"FAILED: {script}-Task-v0 seed 2000: {said}" in lines
        assert f"finished {script}-Task-v0 seed 1000" in lines
    assert len(list(bench.root.glob("runs/*/*/1000.json"))) == 2
    assert not list(bench.root.glob("runs/*/*/2000.json"))
    assert "min left" in lines


def test_two_benchmarks_do_not_make_the_same_runs(bench, capsys):
    (bench.root / "runs").mkdir()
    with (bench.root / "runs" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert bench("run", judged=False)[0] == 2
    assert "another run.py is making runs" in capsys.readouterr().err


def test_a_run_that_logs_nothing_is_a_failure(bench, capsys):
    assert bench("run", "stub-*", "--seeds", 1, end="silently")[0] == 1
    assert "FAILED: stub-Task-v0 seed 1000" in capsys.readouterr().out


@pytest.mark.parametrize("saved", ["checkpoint.pt", "checkpoint/state.json"], ids=["control", "language"])
def test_an_interrupted_benchmark_goes_on_from_checkpoints_and_starts_others_anew(saved, bench, capsys):
    endless = replace(specs.SPECS[0], flags=("--end", "never"))
    stub = runs.Run(endless, 1000, bench.root / "runs")
    stub.begin()
    deadline = time.time() + 60
    while not (stub.dir / "checkpoint.pt").exists() and time.time() < deadline:
        time.sleep(0.02)
    stub.process.kill()
    (stub.dir / saved).parent.mkdir(exist_ok=True)
    (stub.dir / "checkpoint.pt").rename(stub.dir / saved)
    other = stub.dir.with_name("2000")
    other.mkdir()  # begun, without a checkpoint
    (other / "args.json").write_text("{}")
    status, _ = bench("run", "stub-*", "--seeds", 1, end="never")
    assert status == 0
    assert "from its checkpoint" in capsys.readouterr().out
    note = json.loads(stub.dir.with_suffix(".json").read_text())
    assert note["seconds"] is None  # it took longer than this
    ending = replace(stub.spec, flags=("--end", "well"))
    again = runs.Run(ending, 2000, bench.root / "runs")
    again.begin()
    assert again.process.wait() == 0
    assert not again.continued


def test_a_second_command_evaluates_the_run_with_its_flags(bench, monkeypatch):
    evaluate = bench.root / "evaluate.py"
    monkeypatch.setattr(runs, "ENTRY", evaluate)
    evaluate.write_text(
        "import json, pathlib, sys\nrun, steps = sys.argv[1:]\n"
        "figures = {'gold': float(steps) / 10, 'share': None}\n"
        "pathlib.Path(run, 'evaluation.json').write_text(json.dumps([figures]))\n"
    )
    gold = specs.Measure("evaluation/gold", "gold", start=0.0)
    share = specs.Measure("evaluation/share", "share")
    evaluation = ("{run}", "{total_timesteps}")
    spec = replace(specs.SPECS[0], evaluation=evaluation, measures=(gold, share), seeds={"full": 1})
    monkeypatch.setattr(specs, "SPECS", (spec,))
    assert bench("run", "--tier", "full")[0] == bench("record", "*")[0] == 0
    _, (row,) = bench("check", "--tier", "full")
    assert row["measure"] == "gold"  # one seed against one
    assert row["answer"] == "inconclusive"
    kept = json.loads((bench.root / "reference" / "ours" / "stub-Task-v0.json").read_text())
    assert kept["seeds"]["1000"]["measures"] == {"evaluation/gold": {"final": 100.0}}


def test_a_run_of_a_script_that_changed_meanwhile_does_not_count(bench):
    spec = replace(specs.SPECS[0], flags=("--end", "well"))
    run = runs.Run(spec, 1000, bench.root / "runs")
    run.begin()
    run.process.wait()
    script = bench.root / "algos" / "stub.py"
    script.write_text(script.read_text() + "pass\n")
    assert "changed while it ran" in run.poll()


def test_a_terminated_benchmark_ends_the_runs_that_it_started(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import run, pathlib; from core import specs\n"
        "root = pathlib.Path(sys.argv[2])\n"
        "specs.ALGOS = root\n"
        "spec = specs.Spec('stub', 'Task-v0', {'quick': 1}, 1, specs.returns(0), ('--end', 'never'))\n"
        "specs.SPECS = (spec,)\n"
        "sys.exit(run.main(['run', '--runs', str(root / 'runs')]))\n"
    )
    (tmp_path / "stub.py").write_text(STUB + "\n")
    command = [sys.executable, "-c", code, REPO / "benchmark", tmp_path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not list(tmp_path.glob("runs/*/*/*/checkpoint.pt")) and time.time() < deadline:
        time.sleep(0.05)
    children = open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130
    assert children
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(int(child), 0)


# --- the report ---


def test_the_report_is_a_readme_with_tables_and_pictures_of_what_is_recorded(bench, capsys, monkeypatch):
    assert bench("alarms", "stub-*")[0] == 2  # nothing to judge against
    assert "no reference of the present code" in capsys.readouterr().err
    assert bench("run", "stub-*", "--seeds", 7)[0] == bench("record", "stub-*")[0] == 0
    capsys.readouterr()
    assert bench("alarms", "stub-*", "--seeds", 7)[0] == 0
    assert "2 repeats of 1 seeds: 2 pass, 0 inconclusive, 0 regression" in capsys.readouterr().out
    fault = plant.FAULTS[0]
    result = {"answer": "red", "test": fault.tests[0], "effect": "assert 1 == 2", "seconds": 1.0}
    specs.keep("faults", {fault.name: result})
    specs.keep("growth", {"dqn batch": {"128": {"speed": 7000.4, "gigabytes": 0.5}}})
    pairs = [[30, 10], [10, 5], [8, 8]]
    specs.keep("speed", {"ppo": {"peer": "P", "unit": "steps/s", "pairs": pairs}})
    policy = {
        "name": "runs/a",
        "script": "dpo",
        "beta": 0.5,
        "gold": 0.5,
        "kl": 1.5,
        "share": None,
        "proxy": 2.0,
        "faulty": 0.0,
    }
    better = policy | {"gold": 0.7}
    of_trl = policy | {"name": "runs/trl_ppo_1", "script": "", "share": 0.8}
    specs.keep("policies", [policy, better, of_trl])
    benchmark.main(["report", "--out", str(bench.root / "out")])
    written = (bench.root / "out" / "results").glob("*.md")
    pages = {path.stem: path.read_text() for path in written}
    text = pages["README"]
    assert set(re.findall(r"\]\((\w+)\.md\)", text)) == pages.keys() - {"README"}
    assert "| stub-Task-v0 | 1,000 | 5 | return | 93.50 [9" in text
    assert "| other-Task-v0 |" in text
    assert "not recorded yet" in text
    assert "| stub-Task-v0 | 1 | 2 | 2 | 0 | 0 |" in pages["method"]
    assert f"| {fault.name} | {', '.join(fault.scripts)} |" in pages["faults"]
    assert "`assert 1 == 2`" in pages["faults"]
    assert "Tests found 1 of them" in pages["faults"]
    assert "| dqn.py | batch (`--batch-size`) | 128: 7,000 steps/s, 0.50 GB |" in pages["growth"]
    assert "| ppo.py | P | 10 steps/s | 8 steps/s | **2.00** | 1.00 to 3.00 | 3 |" in pages["growth"]
    assert "| dpo.py | 0.5 | 2 | 0.600 ± 0.141 | 1.500 ± 0.000 | – |" in text
    assert "| TRL 1.10 PPOTrainer | 0.5 | 1 | 0.500 | 1.500 | 0.800 |" in text
    assert "Numbers that cannot be compared" in pages["published"]
    assert "| quick | stub-Task-v0 (2)" in pages["tiers"]
    (picture,) = re.findall(r"\(\.\./(pictures/stub\S+\.png)\)", text)
    assert picture == "pictures/stub_Task-v0.png"
    assert (bench.root / "out" / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ppo-LunarLander-v3", "Stable-Baselines3 2.9.2, RL Zoo's settings for 1M steps"),
        ("dqn-LunarLander-v3", "Stable-Baselines3 2.9.2, RL Zoo's settings for 100k steps"),
        ("ppo-CartPole-v1", "CleanRL"),
    ],
)
def test_a_peer_whose_settings_were_made_for_other_budgets_says_so(name, said):
    (spec,) = (spec for spec in specs.SPECS if spec.name == name)
    assert report.name_of_peer(spec, references.peer(spec)) == said


def test_the_minutes_of_the_quick_tier_are_one_number_everywhere():
    minutes, missing = report.minutes_of("quick")
    texts = [REPO / "README.md", REPO / "benchmark" / "README.md", REPO / "benchmark" / "run.py"]
    said = [re.findall(r"all ten scripts in (?:about )?(\d+)\s+minutes", path.read_text()) for path in texts]
    assert not missing
    assert said == [["10"]] * 3
    assert minutes == pytest.approx(10, abs=1.5)


def test_curves_that_are_logged_seldom_have_a_point_where_something_was_logged():
    curves = np.array([[1.0, 1, 1, 2, 2, 3], [1.0, 1, 1, 1, 1, 4]])
    assert pictures.new_bins(curves).tolist() == [0, 3, 5]


def test_the_highest_point_of_a_mean_curve_stands_beside_tianshous():
    (said,) = [line for line in report.highest_points() if "Hopper" in line]
    (spec,) = [spec for spec in specs.SPECS if spec.name == "ppo-Hopper-v5"]
    curves_by_seed = [seed["charts/episodic_return"]["curve"] for seed in references.ours(spec).seeds.values()]
    highest = max(sum(values) / len(values) for values in zip(*curves_by_seed, strict=True))
    assert said == f"ppo-Hopper-v5 {highest:,.0f} (2,609)"
    assert not any("reinforce" in line for line in report.highest_points())  # theirs are of 3 and 10 million steps


def test_published_numbers_are_compared_with_like_ones_only_at_as_many_steps():
    unlike = {}
    for spec in specs.SPECS:
        numbers = references.published(spec, 500_000)
        unlike[spec.name] = {(number.source, number.env): number.unlike for number in numbers}
    assert unlike["ppo-CartPole-v1"] == {
        ("CleanRL's docs", "CartPole-v1"): "",
        ("RL Zoo", "CartPole-v1"): "evaluation of one tuned agent",
        ("SLM-Lab", "CartPole-v1"): "",
    }
    assert unlike["ppo-HalfCheetah-v5"]["SLM-Lab", "HalfCheetah-v5"] == "longer training"
    assert unlike["ppo-HalfCheetah-v5"]["CleanRL's docs", "HalfCheetah-v4"] == "another version"
    assert set(unlike["dqn-MountainCar-v0"].values()) == {"another time limit"}
    assert unlike["ppo-Pong"]["SLM-Lab", "ALE/Pong-v5 (sticky 0.25)"] == "another version"
    assert unlike["dqn-LunarLander-v3-200k"] == unlike["dqn-LunarLander-v3"] != {}
    assert unlike["sft-reviews"] == {}

    (measure,) = specs.returns(0)
    figures = {"curve": [float(i) for i in range(50)], "final": 60.0}
    ours = references.Reference("ours", 1000, {seed: {measure.tag: figures} for seed in range(2)})
    for steps, level in ((200, 9), (20, 0), (1000, 60), (None, 60)):
        mean, *_ = report.level_at(ours, measure, steps)
        assert mean == level


# --- the command line ---


@pytest.mark.parametrize(
    "flags,said",
    [
        (["check", "nothing"], "no spec is called nothing"),
        (["run", "--seeds", "0"], "--seeds must be at least 1"),
        (["run", "--tier", "slow"], "--tier"),
        (["check", "ppo-Pong", "--tier", "quick"], "none of these specs is in the tier quick"),
        (["record"], "name the specs to record"),
        (["record", "ppo-Pong", "--runs", "/nowhere"], "no finished run of seed 1000"),
        (["destroy"], "destroy"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_input_is_one_line_and_exit_status_2(flags, said, capsys):
    assert benchmark.main(flags) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert said in message


def test_the_entry_point_lists_specs_and_without_a_command_shows_help(capsys):
    command = [sys.executable, REPO / "benchmark" / "run.py", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ppo-CartPole-v1" in done.stdout, done.stderr
    assert benchmark.main([]) == 0
    assert "Answers: pass, regression, or inconclusive" in capsys.readouterr().out


# --- speed and growth ---


def test_speeds_are_taken_in_turns_and_kept(monkeypatch, capsys, tmp_path):
    calls = []
    numbers = iter([300.0, 100.0, 100.0, 100.0, 200.0, 100.0])
    monkeypatch.setattr(specs, "RESULTS", tmp_path)

    def ours(script, steps):
        calls.append("ours")
        return next(numbers)

    def peers(peer_python, script, steps):
        calls.append("peers")
        return next(numbers)

    monkeypatch.setattr(speed, "ours", ours)
    monkeypatch.setattr(speed, "peers", peers)
    benchmark.main(["speed", "ppo", "--peer-python", sys.executable, "--repeats", "3"])
    assert calls == ["ours", "peers"] * 3
    assert "median ratio 2.00 (1.00 to 3.00)" in capsys.readouterr().out
    assert specs.results("speed")["ppo"]["pairs"] == [[300, 100], [100, 100], [200, 100]]
    lines = (
        "dpo.py 300.0 pairs/s, TRL 100.0 pairs/s, ratio 3.00\nreward_model.py 50 pairs/s, TRL 100 pairs/s, ratio 0.50"
    )
    monkeypatch.setattr(speed, "output", lambda command: lines)
    assert list(speed.pairs_of_runs("dpo", "python", 5, 2)) == [(300, 100), (50, 100)]
    assert benchmark.main(["speed", "ppo", "--peer-python", "/nowhere/python"]) == 2
    assert capsys.readouterr().err == "error: --peer-python /nowhere/python: no such file\n"


def test_the_time_until_a_level_is_read_from_the_logs_of_both(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(specs, "RESULTS", tmp_path)
    commands = []

    def output(command):
        commands.append([str(part) for part in command])
        if "--run-dir" not in command:  # the peer's: 120 episodes, one per 10 steps and second
            episodes = range(1, 121)
            curve = {"step": [10 * k for k in episodes], "return": [500] * 120, "seconds": list(episodes)}
            if "Acrobot-v1" in command:
                curve["return"] = [-500] * 120
            command[5].write_text(json.dumps({"seeds": {command[6]: curve}}))
            return
        with SummaryWriter(command[-1]) as writer:  # ours: 50 episodes per 1,000 steps and two seconds
            for step, reward in ((1000, -400), (2000, 0), (3000, 500), (4000, 500)):
                writer.add_scalar("charts/episodic_return", reward, step)
                writer.add_scalar("charts/episodes", 50, step)
                writer.add_scalar("charts/SPS", 500, step)

    monkeypatch.setattr(levels, "output", output)
    assert benchmark.main(["levels", "CartPole-v1", "Acrobot-v1", "--peer-python", sys.executable]) == 0
    found = specs.results("levels")
    assert found["CartPole-v1"] == [[[4000, 8], [1200, 120]]] * 3  # ours needs 100 episodes of 500
    assert found["Acrobot-v1"] == [[[3000, 6], [None, None]]] * 3  # the mean of 0 and 500 is above -100
    seeds = [command[command.index("--seed") + 1] for command in commands if "--seed" in command]
    assert seeds == ["1000", "2000", "3000"] * 2
    assert [command[-2:] for command in commands[1::2]] == [["--until", "475"]] * 3 + [["--until", "-100"]] * 3
    assert commands[1][2:5] == ["ppo", "CartPole-v1", "100000"]
    text = levels.section()
    assert "| CartPole-v1 | 475 | 8 s | 4,000 | 120 s | 1,200 | 100,000 |" in text
    assert "| Acrobot-v1 | −100 | 6 s | 3,000 | never | – | 1,000,000 |" in text
    assert levels.in_words([[10, 1], [30, 3], [None, None]]) == ("3 s (never by 1 of 3 seeds)", "30")
    short = {"step": [10], "return": [500], "seconds": [1]}
    monkeypatch.setattr(levels, "output", lambda command: command[5].write_text(json.dumps({"seeds": {"1": short}})))
    assert levels.peers("python", "CartPole-v1", 1) == [None, None]  # one episode is not 100
    capsys.readouterr()
    assert benchmark.main(["levels", "Pong", "--peer-python", sys.executable]) == 2
    assert "there is no level for Pong: choose from CartPole-v1" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["sft", "dpo"])
@pytest.mark.parametrize("what", ["sequence length", "vocabulary"])
def test_growth_makes_inputs_of_the_size_it_says(script, what, tmp_path):
    (row,) = (row for row in growth.ROWS if row.name == f"{script} {what}")
    flags = growth.flags_of(row, 512, tmp_path)
    flags = dict(zip(flags[::2], flags[1::2]))
    tokenizer = AutoTokenizer.from_pretrained(flags.get("--model", str(ASSETS / "sft")))
    if what == "vocabulary":
        embeddings = AutoModelForCausalLM.from_pretrained(flags["--model"]).get_input_embeddings()
        assert len(tokenizer) == len(embeddings.weight) == 512
    else:
        rows = [json.loads(line) for line in open(flags["--dataset"])]
        assert len(rows) >= growth.UPDATES * 32
        for row in rows[:5]:
            if script == "sft":
                texts = [row["text"]]
            else:
                texts = [row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]]
            for text in texts:
                assert len(tokenizer(text).input_ids) == 512


def test_growth_runs_a_row_and_keeps_its_figures(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(specs, "RESULTS", tmp_path)
    monkeypatch.setattr(growth, "ROWS", (growth.Row("dpo", "sequence length", "", (16, 32)),))
    monkeypatch.setattr(growth, "UPDATES", 2)
    benchmark.main(["growth", "dpo *"])
    kept = specs.results("growth")["dpo sequence length"]
    assert list(kept) == ["16", "32"]
    for found in kept.values():
        assert 0.2 < found["gigabytes"] < 5
        assert found["speed"] > 0
    assert "dpo sequence length 32: " in capsys.readouterr().out
    assert benchmark.main(["growth", "nothing"]) == 2
    assert capsys.readouterr().err == "error: no row is called nothing: dpo sequence length\n"


def test_what_trl_wrote_becomes_a_peer_by_the_tags_of_the_spec(monkeypatch, capsys, tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "peers").mkdir()
    shutil.copy(specs.REFERENCE / "ours" / "rlhf_ppo-prompts.json", tmp_path / "ours")
    monkeypatch.setattr(specs, "REFERENCE", tmp_path)
    with (tmp_path / "log.jsonl").open("w") as log:
        for i in range(8):
            names = ("objective/scores", "objective/kl", "objective/rlhf_reward")
            log.write(json.dumps(dict.fromkeys(names, float(i))) + "\n")
        log.write(json.dumps({"train_runtime": 1}) + "\n")
    evaluated = tmp_path / "trl_ppo.json"  # of the same run, from either of the folders that the trainers write
    one = {"name": str(tmp_path), "share": 0.8, "gold": 0.4}
    other = {"name": str(tmp_path / "model"), "share": 0.9, "gold": 0.45}
    evaluated.write_text(json.dumps([one, other]))
    record_trl.record("rlhf_ppo", [evaluated])
    (spec,) = (spec for spec in specs.SPECS if spec.name == "rlhf_ppo-prompts")
    ours, peer = references.load(spec)
    assert peer.name == "TRL 1.10.0"
    assert list(peer.seeds) == ["1", "2"]
    assert peer.steps == ours.steps
    assert peer.seeds["2"]["objective/kl"]["final"] == 5.5  # mean of the last four
    assert [figures["evaluation/share"]["final"] for figures in peer.seeds.values()] == [0.8, 0.9]
    assert [figures["evaluation/gold"]["final"] for figures in peer.seeds.values()] == [0.4, 0.45]
    assert benchmark.main(["record-trl", "dpo", "/nowhere.json"]) == 2
    assert "error: /nowhere.json: no such file\n" in capsys.readouterr().err


def test_a_rate_leaves_out_what_came_before_the_first_entry(tmp_path):
    with SummaryWriter(tmp_path) as writer:  # 5 s of samples, then updates of 32 rows, 2 s each
        for step in (1, 10, 12):
            writer.add_scalar("rows_per_second", 32 * step / (5 + 2 * step), step)
    assert speed.rate(tmp_path, "rows_per_second") == pytest.approx(16)


def test_floor_counts_the_products_of_forward_and_backward_and_can_replay_them():
    recorder = floor.Recorder()
    layer = torch.nn.Linear(4, 3)
    x = torch.randn(8, 4, requires_grad=True)
    with recorder:
        layer(x.tanh()).square().sum().backward()
        torch.nn.functional.scaled_dot_product_attention(*torch.randn(3, 1, 2, 5, 4))
    names = {}
    for kind, (operation, args, kwargs) in recorder.calls.items():
        name = operation.overloadpacket.__name__
        names[name] = names.get(name, 0) + recorder.counts[kind]
        assert floor.seconds(operation, args, kwargs) > 0
    assert names.pop("addmm") == 1  # forward; gradients of weight and input
    assert names.pop("mm") == 2
    assert len(names) == 1
    assert "scaled_dot_product" in names.popitem()[0]


def test_floor_tells_the_share_of_a_script_and_refuses_others(capsys):
    command = [sys.executable, str(REPO / "benchmark" / "run.py"), "floor", "a2c", "--total-timesteps", "400"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = r"a2c: [\d.]+ s; matrix products [\d.]+ s \(\d+%\), attention 0.00 s \(0%\): .* kinds\n"
    assert re.fullmatch(said, done.stdout)
    assert benchmark.main(["floor", "sac"]) == 2
    assert capsys.readouterr().err.startswith("error: argument script: invalid choice: 'sac'")
    assert benchmark.main(["floor", "ppo", "--gamma", "3"]) == 2
    assert "gamma and gae-lambda must lie" in capsys.readouterr().err


# --- planted faults ---


def test_there_are_faults_of_every_script():
    planted = set()
    for fault in plant.FAULTS:
        planted.update(fault.scripts)
    assert planted == {path.stem for path in specs.ALGOS.glob("*.py")}
    assert len(plant.FAULTS) >= 30
    assert len({fault.name for fault in plant.FAULTS}) == len(plant.FAULTS)


@pytest.mark.parametrize("fault", plant.FAULTS, ids=lambda fault: fault.name)
def test_a_fault_still_applies_and_its_tests_and_spec_exist(fault):
    versions = [plant.faulty(fault, script) for script in fault.scripts]  # each has the text once
    ast.parse(versions[0])
    for test in fault.tests:
        file, name = test.split("::")
        assert f"def {name.partition('[')[0]}(" in (REPO / "tests" / file).read_text(), test
    quick = {spec.name for spec in specs.SPECS if "quick" in spec.seeds}
    assert not fault.spec or fault.spec in quick


def test_a_planted_fault_turns_its_test_red_in_a_copy_and_leaves_the_repository_alone(monkeypatch, capsys, tmp_path):
    before = {path.name: path.read_text() for path in specs.ALGOS.glob("*.py")}
    fault = plant.Fault("one", ["ppo"], "gamma: float = 0.98", "gamma: float = 0.5", ["test_tiny.py::test_gamma"])
    answers = []
    for text in (fault.old, fault.new):
        with plant.planted(fault) as repo:
            test = f"def test_gamma():\n    assert {text!r} in open('algos/ppo.py').read()\n"
            (repo / "tests" / "test_tiny.py").write_text(test)
            answers.append(plant.run_tests(fault, repo))
    assert [answer["answer"] for answer in answers] == ["red", "green"]
    assert answers[0]["test"] == "test_tiny.py::test_gamma"
    assert "gamma: float = 0.98" in answers[0]["effect"]
    assert {path.name: path.read_text() for path in specs.ALGOS.glob("*.py")} == before

    monkeypatch.setattr(plant, "FAULTS", (fault,))
    monkeypatch.setattr(specs, "RESULTS", tmp_path)
    monkeypatch.setattr(plant, "run_tests", lambda *_: answers[1])
    assert plant.plant_all(["o*"], False, 1) == 1
    assert "NOT NOTICED: one" in capsys.readouterr().out
    assert specs.results("faults")["one"]["answer"] == "green"
    assert benchmark.main(["faults", "nothing"]) == 2
    assert capsys.readouterr().err == "error: no fault is called nothing\n"


# --- the table of specs ---


def test_every_script_is_in_the_quick_tier_and_every_spec_in_one():
    scripts = {path.stem for path in specs.ALGOS.glob("*.py")}
    assert {spec.script for spec in specs.SPECS if "quick" in spec.seeds} == scripts
    assert len({spec.name for spec in specs.SPECS}) == len(specs.SPECS)
    for spec in specs.SPECS:
        assert spec.seeds
        assert set(spec.seeds) <= set(specs.TIERS)
        assert "quick" not in spec.seeds or spec.seeds["full"] >= 5


def test_quick_fits_in_12_and_full_and_mujoco_in_120_minutes_on_two_cores():
    def minutes(tier):
        """On two cores."""
        of_specs = [spec.minutes * spec.seeds.get(tier, 0) for spec in specs.SPECS]
        return sum(of_specs) / 2

    assert minutes("quick") <= 12
    assert minutes("full") <= 120
    assert minutes("mujoco") <= 120


@pytest.mark.parametrize("spec", specs.SPECS, ids=lambda spec: spec.name)
def test_the_flags_of_a_spec_are_those_of_its_script(spec):
    names = specs.flags_of_script(spec.script)
    flags = [flag for flag in spec.flags if flag.startswith("--")]
    given = {flag.removeprefix("--").removeprefix("no-").replace("-", "_") for flag in flags}
    assert given - names == set()


def test_references_fit_their_specs():
    for spec in specs.SPECS:
        for reference in references.load(spec):
            assert len(reference.seeds) >= min(3, spec.recorded_seeds), (spec.name, reference.name)
            if "--env-id" in spec.flags and "HalfCheetah-v5" in spec.flags:
                assert reference.steps == 1_000_000
            for figures in reference.seeds.values():
                assert set(figures) <= {measure.tag for measure in spec.measures}


def mean_return(reference):
    """Mean over seeds of the final return."""
    finals = []
    for measures in reference.seeds.values():
        (figures,) = measures.values()
        finals.append(figures["final"])
    return np.mean(finals)


def assert_rounded(said, exact):
    """A number in a text is the one that was measured, to the last digit shown."""
    unit = 10.0 ** -len(said.partition(".")[2])
    assert float(said) == pytest.approx(exact, abs=0.51 * unit)


RECORDED = [spec for spec in specs.SPECS if references.ours(spec)]
RETURNS = [spec for spec in RECORDED if spec.measures[0].tag == "charts/episodic_return"]


@pytest.mark.parametrize("task, flags", [("prompts", ""), ("kl-in-reward", " " + " ".join(specs.KL_IN_REWARD))])
def test_the_share_that_grpos_docstring_says_is_that_recorded(task, flags):
    (spec,) = [spec for spec in RECORDED if spec.name == f"grpo-{task}"]
    finals = [figures["evaluation/share"]["final"] for figures in references.ours(spec).seeds.values()]
    text = importlib.import_module("grpo").__doc__
    (said,) = re.findall(rf"python algos/grpo\.py{flags}  # the .*?([\d.]+)(?: of the possible gain)?\n", text)
    assert_rounded(said, np.mean(finals))


@pytest.mark.parametrize("script", ["reinforce", "a2c", "dqn", "ppo"])
def test_the_commands_of_a_docstring_end_where_it_says(script):
    module = importlib.import_module(script)
    command = r"(?m)^ *python algos/\w+\.py([^#\n]*)#.*?(-?\d+)$"
    said = re.findall(command, module.__doc__.replace("\\\n", ""))
    assert len(said) >= 3
    for flags, figure in said:
        args = tyro.cli(module.Args, args=[*specs.CONTROL, *shlex.split(flags)])
        of_script = [spec for spec in RETURNS if spec.script == script]
        (spec,) = (spec for spec in of_script if tyro.cli(module.Args, args=spec.flags) == args)
        assert_rounded(figure, mean_return(references.ours(spec)))


def test_a_peer_compared_with_itself_passes():
    for spec in specs.SPECS:
        for reference in references.load(spec):
            (row, *_) = verdict.compare(spec, reference.seeds, reference)
            assert "final" in row
            assert row["answer"] != "regression"
            assert row["final"][0] == 0
            assert "area" not in row or row["area"][0] == 0


def test_the_known_optimum_of_taxi_is_the_mean_return_of_the_optimal_policy_over_its_starts():
    import gymnasium as gym
    import q_learning

    env = gym.make("Taxi-v4").unwrapped
    policy = q_learning.value_iteration(*q_learning.read_model(env.P), 0.99).argmax(1).tolist()
    equations = np.eye(len(policy))
    rewards = np.zeros(len(policy))
    for state, action in enumerate(policy):
        for probability, following, reward, terminated in env.P[state][action]:
            rewards[state] += probability * reward
            equations[state, following] -= 0 if terminated else probability
    returns = np.linalg.lstsq(equations, rewards, rcond=None)[0]  # undiscounted
    assert env.initial_state_distrib @ returns == pytest.approx(specs.TAXI, abs=1e-6)


def test_the_key_of_a_run_does_not_depend_on_where_the_repository_lies():
    spec = specs.SPECS[0]
    here = replace(spec, flags=("--file", f"{specs.BENCHMARK}/world/one.py"))
    anywhere = replace(spec, flags=("--file", "benchmark/world/one.py"))
    other = replace(spec, flags=("--file", "benchmark/world/other.py"))
    assert runs.key(here) == runs.key(anywhere)
    assert runs.key(here) != runs.key(other)
