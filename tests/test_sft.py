"""sft.py: which tokens have a loss, how texts become tokens, in which order rows come, and what main does with flags."""

import functools
import gzip
import itertools
import json
import math
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
import sft
import tiny
import torch
from accelerate.state import AcceleratorState
from helpers import scalars, spy_on
from safetensors.torch import load_file

SENTENCE, CPU = "the acting was very great .", torch.device("cpu")
PAIRS = [
    {"prompt": "review of plot :", "completion": f" {SENTENCE}"},
    {"prompt": "the film :", "completion": " the plot was bad ."},
    {"prompt": "review :", "completion": f" {SENTENCE} {SENTENCE}"},
]
USER = {"role": "user", "content": "review of plot :"}
ANSWER = {"role": "assistant", "content": "the plot was great ."}


@pytest.fixture(autouse=True)
def fresh_state():
    """Each run in this process has an Accelerator of its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture
def world(tmp_path):
    """Args of a run on a tiny model and 32 + 7 rows."""
    tiny.make_model(tmp_path / "model")
    tiny.write_jsonl(tmp_path / "data" / "train.jsonl", tiny.completions(32))
    tiny.write_jsonl(tmp_path / "data" / "test.jsonl", tiny.completions(7))

    def args(run_dir="run", **changed) -> sft.Args:
        defaults = {"model": str(tmp_path / "model"), "dataset": str(tmp_path / "data"), "device": "cpu"}
        flags = {"run_dir": str(tmp_path / run_dir), "max_length": 64, "batch_size": 8, "learning_rate": 1e-3}
        return sft.Args(**defaults | flags | {"max_steps": 6, "save_every": 0} | changed)

    return args


def run(args, saved=None):
    """Run the script in this process; the weights that it saved."""
    AcceleratorState._reset_state(reset_partial_state=True)
    sft.main(args, saved)
    return load_file(f"{args.run_dir}/model/model.safetensors")


def metric(args, tag):
    """A logged metric by step."""
    return dict(scalars(sft.Path(args.run_dir), tag))


def rows_of(tokenizer, rows, max_length=512, **more):
    """Token ids of rows of columns, as the script reads them from a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = tiny.write_jsonl(Path(folder) / "rows.jsonl", rows)
        return sft.load_rows(str(path), "train", tokenizer, max_length, **more)


def loss_of(model, rows):
    """The script's loss of one batch."""
    logprobs, mask = sft.completion_logprobs(model, rows, CPU)
    return sft.sft_loss(logprobs, mask.sum())


def loop_loss(model, rows):
    """Mean of -log p over the completion tokens of rows, token by token; a first token has none before it."""
    losses = []
    for prompt, completion in rows:
        for t, token in enumerate(completion):
            before = prompt + completion[:t]
            if before:
                logits = model(torch.tensor([before])).logits[0, -1]
                losses.append(-logits.log_softmax(-1)[token])
    return torch.stack(losses).mean()


# --- the loss ---


@pytest.mark.parametrize("arch", tiny.CONFIGS)
def test_the_loss_is_that_of_a_loop_over_completion_tokens_in_float64(tmp_path, arch):
    model = tiny.make_model(tmp_path, arch)
    rows = rows_of(tiny.word_tokenizer(), PAIRS)
    loss = loss_of(model, rows).item()
    assert loss == pytest.approx(loop_loss(model.double(), rows).item(), rel=1e-5)


def test_a_model_that_knows_nothing_has_a_loss_of_ln_v(tmp_path):
    model = tiny.make_model(tmp_path)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    expected = torch.tensor(float(len(tiny.word_tokenizer()))).log().item()
    assert loss_of(model, rows_of(tiny.word_tokenizer(), PAIRS)).item() == pytest.approx(expected)


def test_tokens_of_the_prompt_have_no_gradient_and_the_eos_has_one_even_where_it_pads(tmp_path):
    tokenizer = tiny.word_tokenizer(pad="<eos>")
    model = tiny.make_model(tmp_path, tokenizer=tokenizer)
    kept = []

    def keep_gradient(module, inputs, output):
        output.logits.retain_grad()
        kept.append(output.logits)

    model.register_forward_hook(keep_gradient)
    rows = rows_of(tokenizer, PAIRS)
    loss_of(model, rows).backward()
    start = min(len(prompt) for prompt, _ in rows)
    for gradient, (prompt, completion) in zip(kept[0].grad, rows):
        touched = (gradient.abs().sum(-1) > 0).nonzero().flatten() + start
        assert touched.tolist() == list(range(len(prompt), len(prompt) + len(completion)))
        assert completion[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("arch", tiny.CONFIGS)
def test_a_batch_is_the_sum_of_its_rows(tmp_path, arch):
    model = tiny.make_model(tmp_path, arch)
    rows = rows_of(tiny.word_tokenizer(), PAIRS)
    sums = []
    tokens = 0
    for prompt, completion in rows:
        loss = loss_of(model, [[prompt, completion]]).item()
        sums.append(loss * len(completion))
        tokens += len(completion)
    assert loss_of(model, rows).item() * tokens == pytest.approx(sum(sums), rel=1e-5)


def test_text_without_a_prompt_has_a_loss_on_every_token_but_the_first(tmp_path):
    (row,) = rows_of(tiny.word_tokenizer(), [{"text": SENTENCE}])
    _, mask = sft.completion_logprobs(tiny.make_model(tmp_path), [row], CPU)
    assert row[0] == []
    assert mask.tolist() == [[True] * 6]


# --- from text to tokens ---


@pytest.mark.parametrize("name", tiny.TOKENIZERS)
def test_a_chat_completion_ends_once_in_the_token_at_which_generation_stops(name):
    make, stop = tiny.TOKENIZERS[name]
    tokenizer = make()
    row = tiny.as_messages({"prompt": "review of plot :", "completion": SENTENCE})
    ((prompt, completion),) = rows_of(tokenizer, [row])
    ends = tokenizer.convert_tokens_to_ids([stop, tokenizer.eos_token])
    assert [i for i in completion if i in ends] == completion[-1:] == ends[:1]
    assert prompt[-1] not in ends or name == "metaspace"  # whose template marks no assistant
    assert tokenizer.decode(completion[:-1]).split() == SENTENCE.split()
    if tokenizer.bos_token_id is not None and tokenizer.bos_token in tokenizer.chat_template.replace(
        "bos_token", "<s>"
    ):
        assert (prompt + completion).count(tokenizer.bos_token_id) <= 1


@pytest.mark.parametrize("name", tiny.TOKENIZERS)
def test_a_text_completion_ends_in_eos_and_its_prompt_does_not(name):
    tokenizer = tiny.TOKENIZERS[name][0]()
    ((prompt, completion),) = rows_of(tokenizer, PAIRS[:1])
    assert completion.count(tokenizer.eos_token_id) == 1
    assert completion[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in prompt
    has_bos = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    assert prompt.count(tokenizer.bos_token_id) == int(has_bos)
    assert not has_bos or prompt[0] == tokenizer.bos_token_id


def test_texts_that_were_rendered_beforehand_get_no_second_bos_or_stop():
    tokenizer = tiny.bpe_tokenizer(bos=True, template=tiny.LLAMA_STYLE)
    row = {"prompt": "<s>[user] plot :", "completion": f" {SENTENCE}</s>\n"}
    ((prompt, completion),) = rows_of(tokenizer, [row])
    assert prompt.count(0) == 1
    assert completion.count(tokenizer.eos_token_id) == 1
    assert completion[-1] == tokenizer.eos_token_id
    row = {"prompt": "<turn>user plot", "completion": f" {SENTENCE}<|im_end|>\n"}
    ((_, completion),) = rows_of(tiny.gemma_like(), [row])
    assert tiny.gemma_like().convert_ids_to_tokens(completion[-1]) == "<|im_end|>"  # its turn's end, not EOS after it


def test_an_ordinary_word_that_a_template_puts_behind_an_answer_does_not_end_answers():
    tokenizer = tiny.word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %} {{ m.role }} : {{ m.content }} . {% endfor %}"
    render = functools.partial(tokenizer.apply_chat_template, tokenize=False)
    assert sft.stop_tokens(tokenizer, render) == [tokenizer.eos_token_id]


def test_the_first_of_several_stop_tokens_ends_an_answer_and_one_within_it_does_not():
    tokenizer = tiny.gemma_like()
    ends = ["<|im_end|></s>", "</s><|im_end|>", "<|im_end|><|im_end|>\n", " </s>\n</s>"]
    rows = rows_of(tokenizer, [{"prompt": "plot", "completion": f" great {end}"} for end in ends])
    last = tokenizer.convert_ids_to_tokens([completion[-1] for _, completion in rows])
    assert last == ["<|im_end|>", "</s>", "<|im_end|>", "</s>"]
    texts = [tokenizer.decode(completion[:-1]).strip() for _, completion in rows]
    assert texts == ["great"] * 4
    ((_, completion),) = rows_of(tokenizer, [{"prompt": "plot", "completion": " great<|im_end|> dull"}])
    assert tokenizer.decode(completion) == " great<|im_end|> dull</s>"


@pytest.mark.parametrize("bos", [False, True])
def test_prompt_ids_are_a_prefix_and_all_ids_spell_the_text_wherever_it_is_parted(bos):
    tokenizer = tiny.bpe_tokenizer(bos)
    rng = random.Random(1)
    texts = [SENTENCE, "Question: what? Answer: 42 is right.", "the acting was great . the  plot\nwas not dull ."]
    pairs = []
    for text in texts:
        pairs += [(text[:i], text[i:]) for i in range(1, len(text))]
    rng.shuffle(pairs)
    rows = rows_of(tokenizer, [{"prompt": prompt, "completion": completion} for prompt, completion in pairs])
    merged = 0
    for (prompt, completion), (prompt_ids, ids) in zip(pairs, rows, strict=True):
        alone = tokenizer(prompt).input_ids
        assert prompt_ids == alone[: len(prompt_ids)]
        assert tokenizer.decode(prompt_ids[bos:] + ids[:-1]) == prompt + completion
        assert ids[-1] == tokenizer.eos_token_id
        assert len(ids) > 1
        merged += prompt_ids != alone
    assert 0 < merged < len(pairs)  # both cases came up


def test_a_template_that_changes_the_prompt_once_an_answer_follows_is_refused_with_both_texts():
    tokenizer = tiny.word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{% elif m.role == 'user' %} user :"
        "{% if loop.last %} {{ messages[0].content }}{% endif %} {{ m.content }}{% else %} {{ m.content }} <eos>{% endif %}{% endfor %}"
    )
    prompt = [{"role": "system", "content": "not dull"}, {"role": "user", "content": "plot"}]
    with pytest.raises(SystemExit, match="changes a prompt.*\n.*not dull plot\n.*plot great"):
        rows_of(tokenizer, [{"prompt": prompt, "completion": [{"role": "assistant", "content": "great"}]}])


THINKS = (  # what stands before </think> is not repeated, and a new answer begins with <think>, as DeepSeek-R1's
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>{{ m.content.split('</think>')[-1] }}<|im_end|>"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}"
)


@pytest.mark.parametrize("columns", ["messages", "prompt and completion", "text and completion"])
def test_a_template_that_leaves_out_a_part_of_an_answer_is_refused_in_every_layout(columns):
    def row(text):
        answer = [{"role": "assistant", "content": text}]
        if columns == "messages":
            return {"messages": [USER, *answer]}
        return {"prompt": [USER] if columns == "prompt and completion" else USER["content"], "completion": answer}

    tokenizer = tiny.bpe_tokenizer(template=THINKS)
    with pytest.raises(SystemExit, match="leaves out a part of the turn '<think>was it"):
        rows_of(tokenizer, [row("<think>was it dull</think>great")])
    ((prompt, completion),) = rows_of(tokenizer, [row(" great")])  # without thoughts nothing is left out
    assert tokenizer.decode(prompt + completion) == "review of plot :<|im_start|> great<|im_end|>"


def test_columns_of_each_layout_are_read_and_completions_may_repeat_their_prompt():
    tokenizer = tiny.word_tokenizer()
    rows = tiny.completions(4)
    expected = rows_of(tokenizer, rows)
    assert rows_of(tokenizer, [row | {"completion": row["prompt"] + row["completion"]} for row in rows]) == expected
    texts = rows_of(tokenizer, [{"text": row["prompt"] + row["completion"]} for row in rows])
    assert texts == [[[], prompt + completion] for prompt, completion in expected]
    chats = [tiny.as_messages(row) for row in rows]
    messages = rows_of(tokenizer, [{"messages": row["prompt"] + row["completion"]} for row in chats])
    assert messages == [[[], prompt + completion] for prompt, completion in rows_of(tokenizer, chats)]


def test_the_ids_of_a_row_are_those_of_its_words():
    tokenizer = tiny.word_tokenizer()
    row = {"prompt": "the film :", "completion": " the plot was bad ."}  # both begin with one word
    words = ["the film :".split(), [*"the plot was bad .".split(), "<eos>"]]
    assert rows_of(tokenizer, [row]) == [[tokenizer.convert_tokens_to_ids(part) for part in words]]
    words = [*"user : review of plot : assistant : the plot was great .".split(), "<eos>"]
    assert rows_of(tokenizer, [{"messages": [USER, ANSWER]}]) == [[[], tokenizer.convert_tokens_to_ids(words)]]


def test_a_prompt_that_is_the_users_turn_behind_a_system_text_is_not_used_twice():
    tokenizer = tiny.bpe_tokenizer()
    turns = [{"role": "system", "content": "be kind"}, USER, ANSWER]
    (expected,) = rows_of(tokenizer, [{"prompt": turns[:2], "completion": turns[2:]}])
    assert tokenizer.decode(expected[0]).count("review of plot") == 1
    assert rows_of(tokenizer, [{"prompt": USER["content"], "completion": turns}]) == [expected]


def test_a_text_behind_a_prompt_of_messages_is_the_assistants_turn():
    rows = [{"prompt": [USER], "completion": answer} for answer in (ANSWER["content"], [ANSWER])]
    (first,), (second,) = (rows_of(tiny.word_tokenizer(), [row]) for row in rows)
    assert first == second


def test_json_is_text_unless_it_spells_messages():
    rows = [
        {"prompt": "the", "completion": json.dumps([{first: "film"}])} for first in ("company", "role_name", "code")
    ]
    assert len(rows_of(tiny.bpe_tokenizer(), rows)) == 3


# --- what is refused, and what is said ---


def test_chats_that_end_in_a_users_turn_are_refused():
    for row in ({"messages": [USER, ANSWER, USER]}, {"messages": [USER]}, {"prompt": [USER], "completion": [USER]}):
        with pytest.raises(SystemExit, match="row 2: the chat .* turn of the assistant"):
            rows_of(tiny.word_tokenizer(), [{column: [ANSWER] for column in row}, row])


def test_single_messages_are_refused_and_texts_are_not():
    rows = [{"text": USER["content"], "role": "prompter"}, {"text": ANSWER["content"], "role": "assistant"}]
    with pytest.raises(SystemExit, match="has one message per row.*`messages`"):
        rows_of(tiny.word_tokenizer(), rows)
    assert len(rows_of(tiny.word_tokenizer(), [{"text": row["text"], "lang": "en"} for row in rows])) == 2


def test_the_first_row_and_the_counts_of_rows_are_printed_with_their_flags(world, tmp_path, capsys):
    rows = [{"prompt": "review :", "completion": " the plot was great ."} for _ in range(20)]
    rows[1]["prompt"] = "review " * 9
    rows[2]["completion"] = rows[3]["completion"] = "  "
    for row in rows[5:9]:
        row["completion"] = " the plot was great . not dull"
    rows[10]["prompt"] = rows[10]["prompt"].replace("review", "xyzzy")
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    run(world(dataset=str(path), eval_split="", max_length=8, max_steps=1))
    lines = capsys.readouterr().out.splitlines()
    assert "first row: review : | the plot was great . <eos>" in lines
    assert {line for line in lines if line.startswith("split")} == {
        "split train: 1 of 20 rows are left out: the prompt alone fills --max-length",
        "split train: 2 of 20 rows are left out: an answer is empty, or both are the same",
        "split train: 4 of 20 rows are cut to --max-length, and so have no end",
        "split train: 1 of 20 rows hold words that --model does not know",
    }


def test_rows_that_are_cut_end_in_their_last_words_and_none_is_longer_than_max_length():
    tokenizer = tiny.word_tokenizer()
    (row,) = rows_of(tokenizer, PAIRS[:1], max_length=8)
    assert [tokenizer.decode(ids) for ids in row] == ["review of plot :", "the acting was very"]
    (row,) = rows_of(tokenizer, PAIRS[:1], max_length=11)
    assert tokenizer.decode(row[1]) == f"{SENTENCE} <eos>"


@pytest.mark.parametrize("known", [1, 2])
def test_a_data_set_most_of_whose_rows_hold_unknown_words_is_refused(known):
    rows = [{"text": "the plot"}] * known + [{"text": "the xyzzy"}, {"text": "plugh the"}]
    if known == 2:
        assert len(rows_of(tiny.word_tokenizer(), rows)) == 4
    else:
        with pytest.raises(SystemExit, match="most rows hold <unk>, a word that --model does not know"):
            rows_of(tiny.word_tokenizer(), rows)


# --- files ---


def test_gzipped_files_and_configurations_of_a_folder_are_read(tmp_path):
    tokenizer = tiny.word_tokenizer()
    rows = tiny.completions(6)
    expected = rows_of(tokenizer, rows)
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    assert sft.load_rows(str(tmp_path / "rows.jsonl.gz"), "train", tokenizer, 64) == expected
    folder = tmp_path / f"set{time.time_ns()}"  # datasets caches such folders by their name alone
    tiny.write_jsonl(folder / "a.jsonl", rows[:2])
    tiny.write_jsonl(folder / "b.jsonl", rows)
    text = "".join(f"- config_name: {name}\n  data_files: {file}.jsonl\n" for name, file in (("main", "a"), ("b", "b")))
    (folder / "README.md").write_text(f"---\nconfigs:\n{text}---\n")
    assert sft.load_rows(str(folder), "train", tokenizer, 64, "main") == expected[:2]
    assert sft.load_rows(str(folder), "train", tokenizer, 64, "b") == expected


def test_main_reads_the_configuration_and_the_arguments_of_the_template_for_both_splits(world, tmp_path, monkeypatch):
    tokenizer = tiny.word_tokenizer()
    tokenizer.chat_template = "{% if dull %} not dull :{% endif %}" + tokenizer.chat_template
    tiny.make_model(tmp_path / "model", tokenizer=tokenizer)
    folder = tmp_path / f"set{time.time_ns()}"  # datasets caches such folders by their name alone
    for split in ("train", "test"):
        tiny.write_jsonl(folder / f"{split}.jsonl", [{"messages": [USER, ANSWER]}] * 8)
    files = "[{split: train, path: train.jsonl}, {split: test, path: test.jsonl}]"
    configs = f"- config_name: main\n  data_files: {files}\n- config_name: b\n  data_files: train.jsonl\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    loads = spy_on(monkeypatch, sft, "load_rows")
    flags = {"dataset": str(folder), "dataset_config": "main", "chat_template_kwargs": '{"dull": true}'}
    run(world(max_steps=1, **flags))
    assert [call.split for call in loads] == ["train", "test"]
    for call in loads:
        assert len(call.result) == 8
        _, text = call.result[0]
        assert tokenizer.decode(text).startswith("not dull : user : review")
    with pytest.raises(ValueError, match="must be a JSON object"):
        world(chat_template_kwargs="[1]")


def test_rows_are_held_out_where_there_is_a_split_test_or_validation(world, tmp_path, capsys):
    for split, choice in [("train", ""), ("validation", "validation"), ("test", "test")]:  # one after the other
        tiny.write_jsonl(tmp_path / "set" / f"{split}.jsonl", PAIRS)
        shutil.copytree(tmp_path / "set", tmp_path / f"with_{split}")  # datasets keeps what a folder held
        assert sft.choose_eval_split(str(tmp_path / f"with_{split}"), "", "auto") == choice
    assert sft.choose_eval_split("nowhere", "", "train[:5%]") == "train[:5%]"
    assert sft.choose_eval_split("nowhere", "", "") == ""
    capsys.readouterr()
    path = tiny.write_jsonl(tmp_path / "lone.jsonl", tiny.completions(8))
    args = world(dataset=str(path), max_steps=1)
    assert sft.Args().eval_split == "auto"
    run(args)
    assert f"{path} has no split test or validation: nothing is held out" in capsys.readouterr().out
    assert metric(args, "eval/loss") == {}
    assert len(metric(args, "loss")) == 1


# --- batches ---


def test_each_epoch_is_another_permutation_of_the_rows():
    epochs = [[], [], []]
    for step in range(9):
        epochs[step // 3] += sft.batch_at(10, step, 3, seed=1)
    for epoch in epochs:
        assert len(set(epoch)) == 9
        assert set(epoch) <= set(range(10))
    assert epochs[0] != epochs[1] != epochs[2]
    assert sft.batch_at(10, 4, 3, seed=1) == epochs[1][3:6]
    assert sft.batch_at(10, 4, 3, seed=2) != epochs[1][3:6]


@pytest.mark.parametrize(
    "count,size,processes,expected",
    [(10, 4, 1, 3), (11, 2, 1, 6), (3, 64, 1, 1), (32, 17, 1, 2), (0, 4, 1, 0), (8, 4, 1, 2), (5, 4, 4, 1)],
)
def test_micro_batches_hold_each_row_once_and_rows_of_like_length_meet(count, size, processes, expected):
    rows = []
    for i in range(count + 5):
        prompt = [1] * (i % 3)
        completion = [2] * (1 + i * i % 7)
        rows.append([prompt, completion])
    indices = random.Random(1).sample(range(count + 5), count)
    parts = sft.micro_batches(rows, indices, size, processes)
    together = list(itertools.chain(*parts))
    lengths = [len(rows[i][0] + rows[i][1]) for i in together]
    assert sorted(together) == sorted(indices)
    assert lengths == sorted(lengths)
    assert all(processes <= len(part) <= max(size, count) for part in parts)
    assert len(parts) == expected
    assert all(len(part) <= size for part in parts) or processes > 1


# --- runs ---


def test_the_loss_falls_and_the_held_out_loss_is_that_of_one_batch_of_all_rows(world):
    args = world(max_steps=40, learning_rate=1e-2, micro_batch_size=2)
    run(args)
    model, tokenizer = sft.load_model(sft.transformers.AutoModelForCausalLM, f"{args.run_dir}/model", 64)
    rows = sft.load_rows(args.dataset, "test", tokenizer, 64)
    assert metric(args, "eval/loss")[40] == pytest.approx(loop_loss(model, rows).item(), rel=1e-5)
    assert metric(args, "eval/loss")[40] < 1 < metric(args, "loss")[1]


def first_batch(args):
    """Model before the run, and rows of the first update, drawn by hand from the seed."""
    model, tokenizer = sft.load_model(sft.transformers.AutoModelForCausalLM, args.model, 64)
    rows = sft.load_rows(args.dataset, "train", tokenizer, 64)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1_000_003 * args.seed))
    return model, [rows[i] for i in order[: args.batch_size]]


def test_the_seed_orders_the_rows(world):
    losses = []
    for seed in (1, 2):
        args = world(f"run{seed}", seed=seed, max_steps=1)
        run(args)
        losses.append(metric(args, "loss")[1])
        assert losses[-1] == pytest.approx(loop_loss(*first_batch(args)).item(), rel=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize("layout", ["prompt and completion", "text"])
def test_the_first_gradient_is_that_of_the_mean_over_all_tokens_clipped_to_norm_one(world, tmp_path, layout):
    if layout == "text":
        rows = [{"text": row["prompt"] + row["completion"]} for row in tiny.completions(32)]
        tiny.write_jsonl(tmp_path / "data" / "train.jsonl", rows)
        (tmp_path / "data" / "test.jsonl").unlink()
    args = world(max_steps=1, micro_batch_size=3, eval_split="")
    run(args)
    model, rows = first_batch(args)
    loop_loss(model, rows).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    norm = torch.cat([gradient.flatten() for gradient in expected]).norm().item()
    assert norm > 1.1
    assert metric(args, "grad_norm")[1] == pytest.approx(norm, rel=1e-4)
    state = torch.load(f"{args.run_dir}/checkpoint/1/optimizer.bin", weights_only=True)["state"]
    for gradient, moments in zip(expected, state.values(), strict=True):
        torch.testing.assert_close(moments["exp_avg"] * 10, gradient / norm, rtol=1e-4, atol=1e-6)


def test_the_learning_rate_of_each_update_rises_in_a_line_and_falls_by_a_cosine(world, monkeypatch):
    used = []
    step = torch.optim.AdamW.step

    def spy(self, *arguments, **keywords):
        used.append(self.param_groups[0]["lr"])
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    args = world(max_steps=8, warmup=0.25, save_every=1)
    run(args)
    high = 1e-3 * (1 + math.cos(math.pi / 6)) / 2
    low = 1e-3 * (1 - math.cos(math.pi / 6)) / 2
    expected = [5e-4, 1e-3, 1e-3, high, 7.5e-4, 5e-4, 2.5e-4, low]
    assert used == pytest.approx(expected)
    assert list(metric(args, "learning_rate").values()) == pytest.approx(expected)
    used.clear()
    run(world("without", max_steps=2, warmup=0.0))
    assert used == pytest.approx([1e-3, 5e-4])


def test_weights_that_have_no_gradient_do_not_decay(world, tmp_path):
    before = tiny.make_model(tmp_path / "model", "qwen3").get_input_embeddings().weight  # untied
    words = tiny.word_tokenizer().convert_tokens_to_ids(["user", "assistant", "music", "plot"])  # the last is in texts
    after = run(world(learning_rate=0.1))["model.embed_tokens.weight"]
    assert [torch.equal(after[i], before[i]) for i in words] == [True, True, False, False]


def test_epochs_are_passes_over_the_rows_where_there_are_no_max_steps(world, monkeypatch):
    batches = spy_on(monkeypatch, sft, "batch_at")
    args = world(epochs=3, max_steps=0, batch_size=12)  # 8 of 32 rows are left out of each epoch
    run(args)
    seen = [call.result for call in batches]
    assert len(seen) == 6
    assert list(metric(args, "loss")) == [1, 6]
    for epoch in (seen[:2], seen[2:4], seen[4:]):
        assert len(set().union(*epoch)) == 24
    batches.clear()
    run(world("short", epochs=3, max_steps=2, batch_size=12))
    assert len(batches) == 2


def test_a_published_generation_config_with_a_temperature_alone_is_kept(world, tmp_path):
    published = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 7, "pad_token_id": 0}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(published))
    run(world(max_steps=1))
    saved = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert saved["temperature"] == 0.9
    assert saved["top_p"] == 0.6
    assert saved["do_sample"]
    assert saved["eos_token_id"] == [1, 7]  # <eos>, at which rows end, and the model's own
