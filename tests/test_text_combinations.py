"""The language scripts where two things meet: adapters and all that is tested without them, intervals that do not divide."""

import importlib
import json
import math
import shutil
import sys
from types import SimpleNamespace

import accelerate
import pytest
import reward_model
import tiny
import torch
import transformers
from helpers import samples_logged, scalars, spy_on
from safetensors.torch import load_file
from test_language import (
    ADAPTER,
    COLUMNS,
    LOSS,
    ROWS,
    SAMPLERS,
    call,
    finished,
    fresh_state,
    lora_scripts,
    of_updates,
    row_scripts,
    scripts,
    state,
    train,
    weights,
    world,
)
from transformers import AutoModelForSequenceClassification

__all__ = ["finished", "fresh_state", "train", "world"]  # fixtures
SPEED = {
    "sft": "rows_per_second",
    "reward_model": "pairs_per_second",
    "dpo": "pairs_per_second",
    "rlhf_ppo": "episodes_per_second",
    "grpo": "episodes_per_second",
}
RATES = {
    "sft": "0.003",
    "reward_model": "0.001",
    "dpo": "0.0001",
    "rlhf_ppo": "0.0005",
    "grpo": "0.0005",
}
samplers = pytest.mark.parametrize("script", SAMPLERS)


# --- adapters ---


@lora_scripts
def test_a_model_with_merged_adapters_keeps_its_generation_config_and_all_stops(train, script, tmp_path):
    tiny.make_model(tmp_path / "model")
    published = {"eos_token_id": [0, 7], "do_sample": True, "temperature": 0.6}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(published))
    run_dir = train(script, *of_updates(script, 1), model=tmp_path / "model", lora_rank=2)
    saved = json.loads((run_dir / "model" / "generation_config.json").read_text())
    assert set(saved["eos_token_id"]) == {0, 1, 7}
    assert saved["temperature"] == 0.6


@lora_scripts
def test_merged_weights_keep_the_dtype_in_which_they_came(train, script, tmp_path):
    tiny.make_model(tmp_path / "typed").to(torch.bfloat16).save_pretrained(tmp_path / "typed")
    run_dir = train(script, *of_updates(script, 1), model=tmp_path / "typed", lora_rank=2)
    assert {tensor.dtype for tensor in weights(run_dir).values()} == {torch.bfloat16}


@lora_scripts
def test_the_seed_draws_the_adapters(train, script):
    drawn = []
    for seed in (1, 2, 1):
        flags = {"lora_rank": 2, "learning_rate": 1e-12, "seed": seed, "run_dir": f"{seed}{len(drawn)}"}
        tensors = load_file(train(script, *of_updates(script, 1), **flags) / ADAPTER)
        drawn.append({name: tensor for name, tensor in tensors.items() if "lora_A" in name})
    first, other, again = drawn
    assert all(torch.allclose(first[name], again[name], atol=1e-6) for name in first)
    assert not any(torch.allclose(first[name], other[name], atol=1e-3) for name in first)


# --- lengths and intervals ---


@scripts
def test_the_speed_of_a_resumed_run_is_its_own(finished, script, tmp_path, monkeypatch):
    shutil.copytree(finished(script), tmp_path / "run")
    times = iter([0.0])
    clock = SimpleNamespace(perf_counter=lambda: next(times, 2.0))
    monkeypatch.setattr(importlib.import_module(script), "time", clock)
    call(script, "--resume", tmp_path / "run", *of_updates(script, 8))
    update, speed = scalars(tmp_path / "run", SPEED[script])[-1]
    assert update == 8
    assert speed == pytest.approx(2 * 8 / 2)  # two updates of 8 in 2 s


@scripts
def test_the_last_update_is_saved_and_logged_where_the_interval_does_not_divide(train, script):
    run_dir = train(script, save_every=4)
    assert state(run_dir)["step"] == 6
    assert scalars(run_dir, LOSS[script])[-1][0] == 6


@scripts
def test_a_run_that_is_resumed_for_fewer_updates_than_it_has_leaves_its_model(finished, script, tmp_path):
    shutil.copytree(finished(script), tmp_path / "run")
    shutil.rmtree(tmp_path / "run/model")
    call(script, "--resume", tmp_path / "run", *of_updates(script, 2))
    assert (tmp_path / "run/model/model.safetensors").exists()
    assert state(tmp_path / "run")["step"] == 6


@scripts
def test_a_run_goes_on_without_the_wandb_that_it_began_with(finished, script, tmp_path, monkeypatch):
    shutil.copytree(finished(script), tmp_path / "run")
    file = tmp_path / "run/checkpoint/state.json"
    saved = json.loads(file.read_text())
    saved["args"]["track"] = True
    file.write_text(json.dumps(saved))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match="^--track needs wandb: pip install wandb$"):
        call(script, "--resume", tmp_path / "run")
    call(script, "--resume", tmp_path / "run", "--no-track")


@scripts
def test_checkpoints_are_written_at_multiples_of_save_every_and_at_the_end(train, script, monkeypatch):
    calls = spy_on(monkeypatch, importlib.import_module(script), "save_checkpoint")
    train(script, *of_updates(script, 5), save_every=2)
    assert [call.step for call in calls] == [2, 4, 5]


@row_scripts
def test_without_an_interval_rows_are_held_out_before_and_after_training_only(train, script):
    run_dir = train(script, *of_updates(script, 201), eval_every=0, batch_size=1, micro_batch_size=1)
    assert [step for step, _ in scalars(run_dir, "eval/loss")] == [0, 201]


@samplers
def test_responses_that_fill_no_batch_are_not_sampled(train, script):
    assert state(train(script, total_episodes=23))["step"] == 2  # two batches of 8


@row_scripts
def test_a_completion_that_is_cut_to_one_word_is_kept(script, tmp_path, capsys):
    row = {"prompt": "review :", "completion": " great film .", "chosen": " great film .", "rejected": " dull film ."}
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", [{column: row[column] for column in COLUMNS[script]}])
    kept = importlib.import_module(script).load_rows(str(path), "train", tiny.word_tokenizer(), 3)
    (row,) = kept
    answers = len(COLUMNS[script]) - 1
    assert [len(ids) for ids in row] == [2] + [1] * answers
    assert "left out" not in capsys.readouterr().out


# --- what stops a run, and what it starts with ---


@scripts
def test_a_gradient_that_is_not_finite_stops_the_run(train, script, monkeypatch, tmp_path):
    monkeypatch.setattr(accelerate.Accelerator, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    with pytest.raises(SystemExit, match="became nan or inf before update 1;"):
        train(script)
    assert not (tmp_path / "run" / "model").exists()


@scripts
def test_on_the_small_worlds_model_the_default_learning_rate_is_its_own(train, script, world, monkeypatch, capsys):
    monkeypatch.setattr(importlib.import_module(script).Args, "model", str(world / "model"))
    train(script, *of_updates(script, 1), learning_rate=0)
    assert f"learning rate: {RATES[script]}\n" in capsys.readouterr().out


def test_the_pad_is_set_where_a_nested_config_is_read():
    small = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    text = small | {
        "vocab_size": 23,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 1,
    }
    vision = small | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, num_labels=1)
    model = transformers.Gemma3ForSequenceClassification(config).eval()
    pad = reward_model.set_pad_token(model, tiny.word_tokenizer(pad="<eos>"), [1])
    rows = [[[4, 5], [6, 1]], [[4], [8, 9, 10, 11, 1]]]  # their last token is the stop
    with torch.no_grad():
        together = reward_model.text_rewards(model, rows, pad, torch.device("cpu"))
        alone = [model(torch.tensor([prompt + text])).logits[:, 0] for prompt, text in rows]
    assert model.config.get_text_config().pad_token_id == pad == 2
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


# --- samples and evaluation ---


@row_scripts
def test_samples_are_of_held_out_rows(train, script, tmp_path):
    rows = ROWS[script](12)
    for row in rows[8:]:
        row["prompt"] = "user : " + row["prompt"]
    tiny.write_jsonl(tmp_path / "data" / "train.jsonl", rows[:8])
    tiny.write_jsonl(tmp_path / "data" / "test.jsonl", rows[8:])
    with pytest.MonkeyPatch.context() as patch:
        samples = samples_logged(patch, accelerate.Accelerator)
        train(script, *of_updates(script, 1), dataset=tmp_path / "data")
    assert list(samples) == [0, 1]
    for texts in samples.values():
        assert all("user :" in text for text in texts.split("\n\n"))


@samplers
def test_every_evaluation_draws_the_same_numbers(train, script):
    with pytest.MonkeyPatch.context() as patch:
        calls = spy_on(patch, importlib.import_module(script), "sample")
        train(script, *of_updates(script, 2), save_every=1)
    evaluations = [call.uniform for call in calls if len(call.prompts) < 8]
    assert len(evaluations) == 3
    assert all(torch.equal(uniform, evaluations[0]) for uniform in evaluations)


@samplers
def test_samples_show_each_response_with_its_own_score(train, world, script):
    with pytest.MonkeyPatch.context() as patch:
        samples = samples_logged(patch, accelerate.Accelerator)
        calls = spy_on(patch, importlib.import_module(script), "sample")
        train(script, *of_updates(script, 1))
    model = AutoModelForSequenceClassification.from_pretrained(world / "reward")
    shown = samples[0].split("\n\n")
    assert len(shown) == 4
    assert len({*shown}) == 4
    for text, prompt, response in zip(shown, calls[0].prompts, calls[0].result):
        with torch.no_grad():
            score = model(torch.tensor([prompt + response])).logits[0, 0].item()
        words = tiny.word_tokenizer().decode(prompt + response)
        assert text.startswith(words)
        assert float(text[len(words) :].strip(" ()")) == pytest.approx(score, abs=0.006)
