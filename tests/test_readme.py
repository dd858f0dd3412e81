"""README.md: short, plain, and true. Its commands and snippets run as they are written, in a directory of their own."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import tyro
from forks import fork
from helpers import ALGOS, REPO, scalars
from peft import AutoPeftModelForCausalLM

sys.path.append(str(REPO / "benchmark"))
from core import references, specs
from cost import levels

README = (REPO / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
SHORTER = {  # flags that make a run of a second of a command
    "control": "--total-timesteps 2000 --eval-episodes 1",
    "text": "--max-steps 1 --batch-size 4 --micro-batch-size 4 --eval-every 0",
    "rollout": "--total-episodes 4 --batch-size 4 --num-minibatches 1 --response-length 4 --max-length 64",
}


def snippet(start):
    """The code block that begins with a line."""
    (code,) = [code for _, code in BLOCKS if code.startswith(start)]
    return code


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A directory as a reader has it: the scripts and the benchmark, and this interpreter as python."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "algos").symlink_to(ALGOS)
    (folder / "benchmark").symlink_to(REPO / "benchmark")
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(sys.executable)
    return folder


def shell(clone, command):
    """What a command of the README prints, once it has ended well."""
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg"}
    options = {"cwd": clone, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(["bash", "-ec", command], **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def language(clone, command):
    """What `python file flags` prints, once it has ended well in a copy of this process, which knows transformers."""
    file, *flags = shlex.split(command.removeprefix("python "))
    said = clone / "said.txt"
    said.unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(clone)
        process = fork(said, Path(file), *flags, CUDA_VISIBLE_DEVICES="")
        process.join()
    assert process.exitcode == 0, said.read_text()
    return said.read_text()


# --- how it is written ---


def test_it_is_short():
    lines = README.splitlines()
    assert len(lines) <= 170
    assert [line for line in lines if len(line) > 120] == []


def test_its_sentences_have_twenty_words_on_average_at_most():
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    prose = " ".join(line for line in prose.splitlines() if line[:1] not in ("|", "#", "!"))
    sentences = [sentence.split() for sentence in re.split(r"(?<=[.:])\s+", prose)]
    assert len(sentences) > 40
    assert np.mean([len(words) for words in sentences]) <= 20


# --- what it says ---


def test_the_loss_that_it_shows_is_that_of_the_scripts():
    loss = snippet("def policy_loss")
    assert all(loss in (ALGOS / f"{script}.py").read_text() for script in ("ppo", "rlhf_ppo", "grpo"))


def test_its_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert len(links) > 12
    assert [link for link in links if not (REPO / link).exists()] == []


def rows(first):
    """Cells of a table by the first words of its head."""
    table = README[README.index(f"| {first}") :].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in table if not line.startswith("|---")]


def number(text):
    return float(text.replace("−", "-"))


def test_its_recipes_reach_what_is_recorded():
    (_, *scripts), *tasks = rows("task")
    shown = set()
    for task, *cells in tasks:
        for script, cell in zip(scripts, cells, strict=True):
            found = [spec for spec in specs.SPECS if spec.script == script and spec.task == task.partition(",")[0]]
            found = [spec for spec in found if references.ours(spec)]
            assert bool(found) == (cell != "–"), (task, script)
            if found:
                (figures,) = zip(*(each.values() for each in references.ours(found[0]).seeds.values()))
                finals = [figure["final"] for figure in figures]
                mean, _, spread = cell.partition(" ± ")
                assert number(mean) == round(np.mean(finals)), (task, script)
                assert number(spread) == round(np.std(finals, ddof=1)), (task, script)
                shown.add(found[0].name)
    recorded = {s.name for s in specs.SPECS if s.script in scripts and references.ours(s) and "Pong" not in s.name}
    assert recorded - shown == {"dqn-CartPole-v1-100k", "dqn-LunarLander-v3-200k"}  # which a sentence has


@pytest.mark.parametrize(("task", "thousands"), [("CartPole-v1", 100), ("LunarLander-v3", 200)])
def test_the_second_recipes_of_dqn_reach_what_is_recorded(task, thousands):
    (said,) = re.findall(rf"(\d+) ± (\d+) on {task} after {thousands},000 steps", " ".join(README.split()))
    (spec,) = [spec for spec in specs.SPECS if spec.name == f"dqn-{task}-{thousands}k"]
    reference = references.ours(spec)
    finals = [figures["charts/episodic_return"]["final"] for figures in reference.seeds.values()]
    assert list(map(int, said)) == [round(np.mean(finals)), round(np.std(finals, ddof=1))]
    assert reference.steps == 1000 * thousands


LANGUAGE = {"sft": "eval/loss", "reward_model": "eval/accuracy"}
LANGUAGE |= dict.fromkeys(("dpo", "rlhf_ppo", "grpo"), "evaluation/share")


@pytest.mark.parametrize("script", LANGUAGE)
def test_its_figures_of_the_language_scripts_are_those_recorded(script):
    (row,) = [row for row in rows("script | measure, 5 seeds")[1:] if row[0].partition(",")[0] == script]
    (spec,) = [spec for spec in specs.SPECS if spec.script == script and "quick" in spec.seeds]
    exact = []
    for reference in references.load(spec):
        finals = [figures[LANGUAGE[script]]["final"] for figures in reference.seeds.values()]
        exact += [np.mean(finals), np.std(finals, ddof=1)]
    said = re.findall(r"[\d.]+(?= ±)|(?<=± )[\d.]+", " ".join(row))
    assert [float(text) for text in said] == pytest.approx(exact, abs=0.00051)


def test_what_grpo_reaches_with_the_kl_in_the_score_is_recorded():
    (said,) = re.findall(r"its share is ([\d.]+)\. ", " ".join(README.split()))
    (spec,) = [spec for spec in specs.SPECS if spec.name == "grpo-kl-in-reward"]
    finals = [figures["evaluation/share"]["final"] for figures in references.ours(spec).seeds.values()]
    assert float(said) == round(np.mean(finals), 3)


def test_what_it_says_of_a_real_model_is_recorded():
    (said,) = re.findall(r"grpo takes SmolLM2-135M-Instruct [^|]*", " ".join(README.split()))
    shares = dict(zip(("grpo-sums", "sft-extraction"), re.findall(r"from (\d+) to (\d+) %", said), strict=True))
    for name, (before, after) in shares.items():
        (spec,) = [spec for spec in specs.SPECS if spec.name == name]
        answers = references.record_of(spec)["seeds"]["1"]["answers"]
        assert int(before) == round(100 * answers["before"])
        assert int(after) == round(100 * answers["after"])


def test_its_speeds_are_those_measured():
    (sentence,) = re.findall(r"At equal settings .* as fast as Stable-Baselines3, .*", README)
    said = dict(re.findall(r"(\w+) (?:is )?([\d.]+) times", sentence))
    head, *texts = rows("script | measure, 5 seeds")
    assert head[-1] == "speed, TRL is 1"
    said |= {row[0].partition(",")[0]: row[-1] for row in texts}
    measured = {script: np.median([a / b for a, b in row["pairs"]]) for script, row in specs.results("speed").items()}
    assert set(measured) == {script for script, ratio in said.items() if ratio != "–"}
    for script, ratio in measured.items():
        assert float(said[script]) == pytest.approx(ratio, abs=0.0051), script


@pytest.mark.parametrize("line", [0, 1], ids=["ours", "Stable-Baselines3"])
def test_its_times_to_a_level_are_the_medians_of_those_measured(line):
    (_, *tasks), *lines = rows("PPO")
    measured = specs.results("levels")
    assert [task.partition(",")[0] for task in tasks] == list(measured)
    for task, said in zip(tasks, lines[line][1:], strict=True):
        name, level = task.split(", ")
        assert number(level) == levels.LEVELS[name]
        seconds, _ = levels.in_words([pair[line] for pair in measured[name]])
        assert said == seconds.replace(" s", "", 1), name


BYTES = {"grpo": 24, "rlhf_ppo": 40}


@pytest.mark.parametrize("script", BYTES)
def test_its_memory_is_bytes_per_parameter_over_gpus(script):
    (row,) = [row for row in rows("| 1.5 B")[1:] if re.match(rf"{script}[ ,(]", row[0]) and "LoRA" not in row[0]]
    for billions, cell in zip((1.5, 7, 32), row[1:], strict=True):
        expected = [billions * BYTES[script] / gpus for gpus in (1, 4, 8)]
        assert [number(part.replace(",", "")) for part in cell.split(" / ")] == pytest.approx(expected, abs=0.51)


# --- what it runs ---


def test_the_cpu_build_that_it_installs_is_of_the_version_required():
    (required,) = re.findall(r"(?m)^(torch==[\d.]+)$", (REPO / "requirements.txt").read_text())
    assert re.findall(r"torch==[\d.]+\d", README) == [required, required]


def commands(start):
    """Commands of the README that begin with a word, from its blocks and its sentences, on one line each."""
    code = [block for kind, block in BLOCKS if kind == "bash"]
    code += re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
    joined = "\n".join(code).replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip().startswith(start)]


def test_every_command_names_flags_that_there_are(monkeypatch):
    found = commands("python algos/") + [line[line.index("algos/") :] for line in commands("accelerate launch")]
    assert len(found) >= 8
    for command in found:
        script, *flags = shlex.split(command.removeprefix("python ").replace("$seed", "1"))
        module = importlib.import_module(script.removeprefix("algos/").removesuffix(".py"))
        tyro.cli(module.Args, args=flags)


def test_the_second_command_is_what_ci_runs():
    ci = (REPO / ".ci" / "run").read_text()
    (pattern,) = re.findall(r"sed -n '(s/.*/p)'", ci)
    printed = subprocess.run(["sed", "-n", pattern, REPO / "README.md"], capture_output=True, text=True).stdout
    assert printed.startswith("python -m pytest -n 2 tests")
    assert len(printed.splitlines()) == 1


def test_its_environment_trains(clone):
    (clone / "my_envs.py").write_text(snippet("# my_envs.py"))
    plain, parallel = commands("python algos/ppo.py --env-id my_envs")
    assert "evaluation: return 100.00 ± 0.00" in shell(clone, plain)
    assert "evaluation: return" in shell(clone, f"{parallel} {SHORTER['control']}")


@pytest.mark.parametrize("kind", ["texts", "chats"])
def test_its_reward_scores_texts_and_chats(clone, kind):
    (clone / "my_rewards.py").write_text(snippet("# my_rewards.py"))
    tiny.make_model(clone / "lm")
    text = "review of plot :"
    prompt = text if kind == "texts" else [{"role": "user", "content": text}]
    tiny.write_jsonl(clone / f"{kind}.jsonl", [{"prompt": prompt, "answer": "great"}] * 4)
    flags = f"--model lm --dataset {kind}.jsonl --reward-model my_rewards.py:exact_answer --group-size 2"
    language(clone, f"python algos/grpo.py {flags} {SHORTER['rollout']} --run-dir runs/{kind}")
    ((_, score),) = scalars(clone / "runs" / kind, "objective/scores")
    assert -1 <= score <= 1
    sys.path.insert(0, str(clone))
    rewards = importlib.import_module("my_rewards").exact_answer
    assert rewards([], ["was great", "great .", ""], ["great"] * 3) == [1.0, 0.0, 0.0]
    assert rewards([], [[{"role": "assistant", "content": "was great"}]], ["great"]) == [1.0]


def test_its_data_trains_a_model_in_two_steps(clone):
    tiny.make_model(clone / "lm")
    tiny.write_jsonl(clone / "my.jsonl", tiny.completions(8))
    tiny.write_jsonl(clone / "pairs.jsonl", tiny.preferences(8))
    tiny.write_jsonl(clone / "problems.jsonl", [{"prompt": row["prompt"]} for row in tiny.preferences(8)])
    sft, dpo, reward, rlhf, _ = next(block for _, block in BLOCKS if "--dataset my.jsonl" in block).splitlines()
    sft = sft.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "lm")  # there is no hub here
    dpo = dpo.replace("trl-lib/ultrafeedback_binarized", "pairs.jsonl")
    length = "--max-length 64"
    language(clone, f"{sft} {SHORTER['text']} {length} --run-dir runs/my-sft")
    language(clone, f"{dpo} {SHORTER['text']} {length} --run-dir runs/my-dpo")
    assert (clone / "runs" / "my-dpo" / "model" / "config.json").exists()
    language(clone, f"{reward.replace('trl-lib/ultrafeedback_binarized', 'pairs.jsonl')} {SHORTER['text']} {length}")
    language(clone, f"{rlhf} {SHORTER['rollout']} --run-dir runs/my-rlhf")
    assert (clone / "runs" / "my-rlhf" / "model" / "config.json").exists()


def test_its_runs_are_compared_and_the_last_one_is_watched(clone):
    (block,) = [block for kind, block in BLOCKS if "run.py curves" in block]
    shorter = block.replace("-$seed;", f"-$seed {SHORTER['control']};").replace("1 2 3;", "1 2;")
    said = shell(clone, shorter)
    assert (clone / "compare.png").stat().st_size > 10_000
    assert "a2c" in said
    assert "ppo" in said
    (watch,) = commands("python algos/ppo.py --resume")
    shell(clone, watch)
    assert list((clone / "runs" / "ppo-1" / "videos").glob("*.mp4"))


def test_its_model_talks(clone):
    (train,) = commands("python algos/sft.py --run-dir runs/sft")
    language(clone, f"{train} {SHORTER['text']} --train-split 'train[:64]'")
    (clone / "talk.py").write_text(snippet("from transformers import pipeline"))
    assert "\nreview of silent river" in "\n" + language(clone, "python talk.py")


def test_its_adapter_opens_with_peft(clone):
    flags = f"--lora-rank 8 {SHORTER['text']} --train-split 'train[:64]' --run-dir runs/lora"
    assert "`--lora-rank 8` (dpo" in README
    language(clone, f"python algos/dpo.py {flags}")
    model = AutoPeftModelForCausalLM.from_pretrained(clone / "runs" / "lora" / "adapter")
    assert model.num_parameters() > 290_000
    assert json.loads((clone / "runs" / "lora" / "adapter" / "adapter_config.json").read_text())["r"] == 8
