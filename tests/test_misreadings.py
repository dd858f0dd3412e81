"""Data, models and rewards as users have them: read as they are meant, or refused in a sentence."""

import importlib
import json
import shutil

import pytest
import tiny
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from test_language import (
    SAMPLERS,
    call,
    chat,
    finished,
    flags_of,
    fresh_state,
    learnt,
    load,
    lora_scripts,
    of_updates,
    row_scripts,
    scripts,
    state,
    train,
    weights,
    world,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

__all__ = ["finished", "fresh_state", "train", "world"]  # fixtures
LM_SCRIPTS = ["sft", "dpo", *SAMPLERS]
language_models = pytest.mark.parametrize("script", LM_SCRIPTS)
samplers = pytest.mark.parametrize("script", SAMPLERS)
SYSTEM = {"role": "system", "content": "answer as a pirate"}


def ask(script, folder, rows, tokenizer=None):
    """Texts of the prompts that a script of rollouts makes of rows of a data set."""
    path = tiny.write_jsonl(folder / "prompts.jsonl", rows)
    tokenizer = tokenizer or tiny.bpe_tokenizer(template=tiny.CHATML)
    prompts = importlib.import_module(script).load_prompts(str(path), "train", tokenizer, 64)
    return [tokenizer.decode(ids) for ids, row in prompts]


def read(script, folder, row, tokenizer):
    """Texts of the parts of a row that any script reads."""
    if script in SAMPLERS:
        return ask(script, folder, [row], tokenizer)
    (parts,) = load(script, folder, [row], tokenizer)
    return [tokenizer.decode(ids) for ids in parts]


def with_question(script, question):
    """A row of a script whose question is of these messages."""
    if script in SAMPLERS:
        return {"prompt": question}
    row = learnt(script, "great .")[1]
    row["prompt"] = question
    return row


# --- what a chat template leaves out ---


ROLES = "{% for m in messages %}{% if m.role in ROLES %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"


@scripts
@pytest.mark.parametrize("role, shown", [("system", "['user', 'assistant']"), ("human", "['user', 'assistant']")])
def test_a_template_that_leaves_out_a_turn_of_the_prompt_is_refused(script, role, shown, tmp_path):
    question = [{"role": role, "content": "answer as a pirate"}, *chat("review of plot :")]
    row = with_question(script, question)
    tokenizer = tiny.bpe_tokenizer(template=ROLES.replace("ROLES", shown))
    with pytest.raises(SystemExit, match=rf"leaves out a part of the turn 'answer as a pirate' \({role}\)"):
        read(script, tmp_path, row, tokenizer)
    tokenizer = tiny.bpe_tokenizer(template=ROLES.replace("ROLES", f"['user', 'assistant', '{role}']"))
    assert "pirate" in read(script, tmp_path, row, tokenizer)[0]


@scripts
def test_a_template_may_drop_the_thoughts_of_earlier_answers_and_rewrite_the_results_of_tools(script, tmp_path):
    thinks = {"role": "assistant", "content": "<think>so</think>good"}
    question = [*chat("review"), thinks, {"role": "tool", "content": "<42>"}, *chat("and of plot :")]
    template = "{% for m in messages %}{{ m.content.split('</think>')[-1] | replace('<', '(') }} {% endfor %}"
    parts = read(script, tmp_path, with_question(script, question), tiny.bpe_tokenizer(template=template))
    assert "(42>" in parts[0]
    assert "so" not in parts[0].replace("also", "")


@scripts
def test_a_template_that_drops_what_tools_said_or_which_were_called_is_refused(script, tmp_path):
    call = {"type": "function", "function": {"name": "look_up", "arguments": "{}"}}
    calls = {"role": "assistant", "content": "", "tool_calls": [call]}
    question = [*chat("how is it"), calls, {"role": "tool", "content": "21 degrees"}, *chat("and now")]
    no_tools = ROLES.replace("ROLES", "['user', 'assistant']")
    with pytest.raises(SystemExit, match=r"leaves out a part of the turn 'look_up' \(assistant\)"):
        read(script, tmp_path, with_question(script, question), tiny.bpe_tokenizer(template=no_tools))
    del question[1]
    with pytest.raises(SystemExit, match=r"leaves out a part of the turn '21' \(tool\)"):
        read(script, tmp_path, with_question(script, question), tiny.bpe_tokenizer(template=no_tools))


@row_scripts
@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_reasoning_under_a_key_of_its_own_is_rendered_or_refused(script, key, tmp_path):
    row = learnt(script, "great .")[1]
    answer = "completion" if script == "sft" else "chosen"
    row[answer][0][key] = "because"
    with pytest.raises(SystemExit, match=r"leaves out a part of the turn 'because' \(assistant\)"):
        load(script, tmp_path, [row], tiny.bpe_tokenizer(template=tiny.CHATML))
    template = tiny.CHATML.replace("{{ m.content }}", "{{ m.KEY }}{{ m.content }}").replace("KEY", key)
    (parts,) = load(script, tmp_path, [row], tiny.bpe_tokenizer(template=template))
    assert "because" in tiny.bpe_tokenizer(template=template).decode(parts[1])


@row_scripts
def test_calls_of_tools_are_rendered_or_refused(script, tmp_path):
    row = learnt(script, "great .")[1]
    answer = "completion" if script == "sft" else "chosen"
    row[answer][0]["tool_calls"] = [{"type": "function", "function": {"name": "look_up", "arguments": "{}"}}]
    with pytest.raises(SystemExit, match=r"leaves out a part of the turn 'look_up' \(assistant\)"):
        load(script, tmp_path, [row], tiny.bpe_tokenizer(template=tiny.CHATML))


CALLS = (  # as Llama 3.1's, a turn that has the key calls a tool
    "{% for m in messages %}<|im_start|>{{ m.content }}{% if 'tool_calls' in m %}{{ m.tool_calls[0].function.name }} "
    "{{ m.tool_calls[0].function.arguments }}{% endif %}<|im_end|>{% endfor %}"
)


@scripts
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_keys_that_are_null_are_not_read_and_a_turn_that_calls_a_tool_needs_no_content(script, form, tmp_path):
    rows = []
    for arguments in ({"city": "Paris"}, {"day": 1}):
        call = {"type": "function", "function": {"name": "look_up", "arguments": arguments}}
        calls = {"role": "assistant", "content": None, "tool_calls": [call]}
        rows.append(with_question(script, [*chat("how is it"), calls, {"role": "tool", "content": "21"}]))
    tokenizer = tiny.bpe_tokenizer(template=CALLS)
    module = importlib.import_module(script)
    path = tmp_path / f"rows.{form}"
    if form == "jsonl":
        tiny.write_jsonl(path, rows)
    else:
        Dataset.from_list(rows).to_parquet(path)  # which gives each message a key tool_calls, and each call a city
    if script in SAMPLERS:
        texts = [tokenizer.decode(ids) for ids, row in module.load_prompts(str(path), "train", tokenizer, 128)]
    else:
        texts = [tokenizer.decode(ids) for ids, *_ in module.load_rows(str(path), "train", tokenizer, 128)]
    assert "look_up {'city': 'Paris'}" in texts[0]
    assert "look_up {'day': 1}" in texts[1]
    for text in texts:
        assert "None" not in text

    silent = with_question(script, [*chat("how is it"), {"role": "assistant", "content": None}])
    with pytest.raises(SystemExit, match="is not a message with the texts role and content"):
        read(script, tmp_path, silent, tokenizer)


@scripts
def test_what_a_template_refuses_is_said_with_its_reason(script, tmp_path):
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    template += "{{ m.role }} {{ m.content }} {% endfor %}"
    row = with_question(script, [SYSTEM, *chat("review of plot :")])
    with pytest.raises(SystemExit, match=r"^--dataset: the chat template refuses .*pirate.*: no system role"):
        read(script, tmp_path, row, tiny.bpe_tokenizer(template=template))


# --- columns ---


@scripts
@pytest.mark.parametrize("column", ["system", "system_prompt", "tools", "context", "input"])
def test_a_column_that_belongs_to_the_prompt_and_is_not_read_is_refused(script, column, tmp_path):
    row = {"prompt": "review of plot :", "completion": " great", "chosen": " great", "rejected": " dull"}
    read(script, tmp_path, row | {column: ""}, tiny.word_tokenizer())
    with pytest.raises(SystemExit, match=rf": {column} is not read: .*put it into the prompt, or remove the column"):
        read(script, tmp_path, row | {column: "answer as a pirate"}, tiny.word_tokenizer())


@scripts
def test_a_system_text_that_the_messages_hold_already_may_have_a_column_too(script, tmp_path):
    row = with_question(script, [SYSTEM, *chat("review of plot :")]) | {"system": SYSTEM["content"], "tools": "[]"}
    assert "pirate" in read(script, tmp_path, row, tiny.bpe_tokenizer(template=tiny.CHATML))[0]


def test_an_input_beside_whole_chats_is_not_missed_but_a_prompt_that_they_lack_is(tmp_path):
    row = learnt("sft", "great .")[0] | {"input": "where this came from"}
    assert len(load("sft", tmp_path, [row])) == 1
    assert len(load("sft", tmp_path, [row | {"prompt": "review of plot :"}])) == 1
    with pytest.raises(SystemExit, match=": prompt is not read"):
        load("sft", tmp_path, [row | {"prompt": "answer as a pirate"}])


@row_scripts
@pytest.mark.parametrize("cell", ['[{"id": 1, "role": "user", "content": "a"}]', "[{'value': 'a', 'from': 'human'}]"])
def test_messages_written_as_text_are_refused_whatever_their_first_key(script, cell, tmp_path):
    row = {"prompt": cell, "completion": "great", "chosen": "great", "rejected": "dull"}
    with pytest.raises(SystemExit, match="is a list of messages written as text"):
        load(script, tmp_path, [row])


# --- prompts and chats ---


def numbered(turns, number):
    return [turn | {"id": f"{number}{i}"} for i, turn in enumerate(turns)]


@pytest.mark.parametrize("script", ["reward_model", "dpo"])
@pytest.mark.parametrize("has_prompt", [False, True])
def test_turns_are_the_same_whatever_else_they_hold_and_whatever_blanks_end_them(script, has_prompt, tmp_path):
    question = chat("review of plot :")
    spaced = [{"role": "user", "content": "review of plot : \n"}]
    good, bad = chat("great .", first="assistant"), chat("dull .", first="assistant")
    row = {"chosen": numbered(question + good, 1), "rejected": numbered(spaced + bad, 2)}
    if has_prompt:
        row = {"prompt": numbered(question, 3)} | row
    ((prompt, *answers),) = load(script, tmp_path, [row])
    tokenizer = tiny.word_tokenizer()
    assert tokenizer.decode(prompt) == "user : review of plot : assistant :"
    assert [tokenizer.decode(ids) for ids in answers] == ["great . <eos>", "dull . <eos>"]


@row_scripts
def test_a_chat_that_neither_holds_the_prompt_nor_goes_on_after_it_is_refused(script, tmp_path):
    row = learnt(script, "great .")[0]
    whole = {"completion": row["messages"]} if script == "sft" else row
    with pytest.raises(SystemExit, match="row 1: the chat neither repeats the prompt nor begins with its answer"):
        load(script, tmp_path, [{"prompt": chat("the film was bad ."), **whole}])
    context = [{"role": "system", "content": "the film :"}]
    tokenizer = tiny.bpe_tokenizer(template=tiny.CHATML)
    ((prompt, *_),) = load(script, tmp_path, [{"prompt": context, **whole}], tokenizer)
    assert "the film :" in tokenizer.decode(prompt)


# --- models ---


@language_models
@pytest.mark.parametrize(
    "published",
    [
        {"early_stopping": True},
        {"length_penalty": 0.8},
        {"output_scores": True},
        {"return_dict_in_generate": True},
        {"stop_strings": ["the end"]},
        {"pad_token_id": -1},
    ],
    ids=lambda published: next(iter(published)),
)
def test_a_generation_config_that_cannot_be_saved_keeps_its_stop_tokens_alone(train, script, published, tmp_path):
    tiny.make_model(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(published | {"eos_token_id": 7}))
    run_dir = train(script, *of_updates(script, 1), model=tmp_path / "model")
    assert {1, 7} <= set(GenerationConfig.from_pretrained(run_dir / "model").eos_token_id)


@scripts
def test_a_run_directory_in_place_of_its_model_is_named(train, script, tmp_path):
    tiny.make_model(tmp_path / "trained" / "model")
    with pytest.raises(SystemExit, match=r"trained is a run directory: its model is .*trained/model$"):
        train(script, model=tmp_path / "trained")


@scripts
def test_an_adapter_without_a_tokenizer_has_that_of_its_base(train, script, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = tiny.make_model(tmp_path / "base")
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "tokenizer_config.json").exists()
    assert state(train(script, *of_updates(script, 1), model=tmp_path / "adapter"))["step"] == 1


@pytest.fixture
def reward_adapter(world, tmp_path):
    """Folder of a reward model as peft saves it: an adapter with the head, and no tokenizer."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(world / "model", num_labels=1)
    config = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "reward")
    return tmp_path / "reward"


@samplers
def test_the_adapter_of_a_reward_model_gives_its_scores(train, script, reward_adapter, tmp_path):
    module = importlib.import_module(script)
    loader = AutoModelForSequenceClassification
    whole, _ = module.load_model(loader, str(reward_adapter), 64)
    adapter = load_file(reward_adapter / "adapter_model.safetensors")
    (head,) = [tensor for name, tensor in adapter.items() if "score" in name]
    assert torch.equal(whole.score.weight, head)
    assert state(train(script, *of_updates(script, 1), reward_model=reward_adapter))["step"] == 1


@language_models
def test_the_adapter_of_a_reward_model_is_no_language_model(train, script, reward_adapter):
    with pytest.raises(SystemExit, match="is the adapter of a reward model, not of a language model"):
        train(script, model=reward_adapter)


# --- reward functions ---


@samplers
def test_rewards_are_called_by_the_names_of_trl_in_any_order(script, world, tmp_path):
    (tmp_path / f"own_order_{script}.py").write_text(
        "def says_great(completions, **columns):\n"
        "    assert len(columns['prompts']) == len(completions)\n"
        "    assert all(prompt.endswith(':') for prompt in columns['prompts'])\n"
        "    assert not any(text.endswith(':') and 'review of' in text for text in completions)\n"
        "    return [float('great' in text) for text in completions]\n"
    )
    name = f"{tmp_path}/own_order_{script}.py:says_great"
    call(script, *flags_of(world, script, run_dir=tmp_path / "run", reward_model=name), *of_updates(script, 1))
    assert state(tmp_path / "run")["step"] == 1


@samplers
def test_a_reward_file_without_a_function_is_refused_with_what_to_write(train, script):
    with pytest.raises(SystemExit, match=r"^--reward-model my_rewards\.py names no function: write my_rewards\.py:"):
        train(script, reward_model="my_rewards.py")


# --- checkpoints ---


@scripts
@pytest.mark.parametrize("damage", ["cut state", "empty state", "cut weights", "no folder", "another model"])
def test_a_damaged_checkpoint_is_refused_in_one_sentence(finished, script, damage, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished(script), run_dir)
    flags = of_updates(script, 8)
    saved = run_dir / "checkpoint" / "state.json"
    folder = run_dir / "checkpoint" / "6"
    if damage == "cut state":
        saved.write_text(saved.read_text()[:40])
    if damage == "empty state":
        saved.write_text("{}")
    if damage == "cut weights":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:100])
    if damage == "no folder":
        shutil.rmtree(folder)
    if damage == "another model":
        save_file({"some": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(SystemExit, match="^--resume.* is damaged") as stop:
        call(script, "--resume", run_dir, *flags)
    assert "\n" not in str(stop.value)


@lora_scripts
def test_a_checkpoint_of_adapters_goes_on(train, script, tmp_path):
    run_dir = train(script, *of_updates(script, 1), lora_rank=2)
    call(script, "--resume", run_dir, *of_updates(script, 2))
    assert state(run_dir)["step"] == 2
    assert weights(run_dir)


@scripts
def test_saving_tied_weights_gives_no_warning(train, script, caplog):
    train(script, *of_updates(script, 1))
    assert "Removed shared tensor" not in caplog.text
