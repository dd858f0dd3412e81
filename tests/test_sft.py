"""sft.py: which tokens have a loss, how texts become tokens, and in which order rows come."""

import json
import random
import signal

import pytest
import sft
import tiny
import torch
from accelerate.state import AcceleratorState
from helpers import scalars
from safetensors.torch import load_file

SENTENCE, CPU = "the acting was very great .", torch.device("cpu")
PAIRS = [("review of plot :", f" {SENTENCE}"), ("the film :", " the plot was bad ."), ("review :", " " + SENTENCE * 2)]


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


def rows_of(tokenizer, pairs):
    """Rows [prompt ids, completion ids] of (prompt, completion) texts or messages."""
    return [sft.encode(tokenizer, 512, prompt, completion) for prompt, completion in pairs]


def loss_of(model, rows):
    """The script's loss of one batch."""
    logprobs, mask = sft.completion_logprobs(model, rows, CPU)
    return sft.sft_loss(logprobs, mask.sum())


# --- the loss ---


@pytest.mark.parametrize("arch", tiny.CONFIGS)
def test_the_loss_is_that_of_a_loop_over_completion_tokens_in_float64(tmp_path, arch):
    model = tiny.make_model(tmp_path, arch)
    rows = rows_of(tiny.word_tokenizer(), PAIRS)
    loss = loss_of(model, rows).item()
    model.double()
    total, count = 0.0, 0
    for prompt, completion in rows:
        for t, token in enumerate(completion):
            logits = model(torch.tensor([prompt + completion[:t]])).logits[0, -1]
            total, count = total - torch.log_softmax(logits, -1)[token].item(), count + 1
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_a_model_that_knows_nothing_has_a_loss_of_ln_v(tmp_path):
    model = tiny.make_model(tmp_path)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    expected = torch.tensor(float(len(tiny.word_tokenizer()))).log().item()
    assert loss_of(model, rows_of(tiny.word_tokenizer(), PAIRS)).item() == pytest.approx(expected)


def test_tokens_of_the_prompt_have_no_gradient_and_the_eos_has_one_even_where_it_pads(tmp_path):
    tokenizer = tiny.word_tokenizer(pad="<eos>")
    model, kept = tiny.make_model(tmp_path, tokenizer=tokenizer), []
    model.register_forward_hook(lambda _, __, output: (output.logits.retain_grad(), kept.append(output.logits))[0])
    rows = rows_of(tokenizer, PAIRS)
    loss_of(model, rows).backward()
    start = min(len(prompt) for prompt, _ in rows)
    for gradient, (prompt, completion) in zip(kept[0].grad, rows):
        touched = (gradient.abs().sum(-1) > 0).nonzero().flatten() + start
        assert touched.tolist() == list(range(len(prompt), len(prompt) + len(completion)))
        assert completion[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("arch", tiny.CONFIGS)
def test_a_batch_is_the_sum_of_its_rows(tmp_path, arch):
    model, rows = tiny.make_model(tmp_path, arch), rows_of(tiny.word_tokenizer(), PAIRS)
    alone = sum(loss_of(model, [row]).item() * len(row[1]) for row in rows)
    assert loss_of(model, rows).item() * sum(len(completion) for _, completion in rows) == pytest.approx(
        alone, rel=1e-5
    )


def test_text_without_a_prompt_has_a_loss_on_every_token_but_the_first(tmp_path):
    (row,) = rows_of(tiny.word_tokenizer(), [("", SENTENCE)])
    _, mask = sft.completion_logprobs(tiny.make_model(tmp_path), [row], CPU)
    assert row[0] == [] and mask.tolist() == [[True] * 6]


# --- from text to tokens ---


@pytest.mark.parametrize("name", tiny.TOKENIZERS)
def test_a_chat_completion_ends_once_in_the_token_at_which_generation_stops(name):
    make, stop = tiny.TOKENIZERS[name]
    tokenizer = make()
    row = tiny.as_messages({"prompt": "review of plot :", "completion": SENTENCE})
    ((prompt, completion),) = rows_of(tokenizer, [row.values()])
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
    ((prompt, completion),) = rows_of(tokenizer, [("review of plot :", f" {SENTENCE}")])
    assert completion.count(tokenizer.eos_token_id) == 1 and completion[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in prompt
    has_bos = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    assert prompt.count(tokenizer.bos_token_id) == int(has_bos) and (not has_bos or prompt[0] == tokenizer.bos_token_id)


def test_texts_that_were_rendered_beforehand_get_no_second_bos_or_stop():
    tokenizer = tiny.bpe_tokenizer(bos=True, template=tiny.LLAMA_STYLE)
    ((prompt, completion),) = rows_of(tokenizer, [("<s>[user] plot :", f" {SENTENCE}</s>\n")])
    assert prompt.count(0) == 1 and completion.count(tokenizer.eos_token_id) == 1
    assert completion[-1] == tokenizer.eos_token_id
    ((_, completion),) = rows_of(tiny.gemma_like(), [("<turn>user plot", f" {SENTENCE}<|im_end|>\n")])
    assert tiny.gemma_like().convert_ids_to_tokens(completion[-1]) == "<|im_end|>"  # its turn's end, not EOS after it


@pytest.mark.parametrize("bos", [False, True])
def test_prompt_ids_are_a_prefix_and_all_ids_spell_the_text_wherever_it_is_parted(bos):
    tokenizer, rng = tiny.bpe_tokenizer(bos), random.Random(1)
    texts = [SENTENCE, "Question: what? Answer: 42 is right.", "the acting was great . the  plot\nwas not dull ."]
    pairs = [(text[:i], text[i:]) for text in texts for i in range(1, len(text))]
    rng.shuffle(pairs)
    merged = 0
    for (prompt, completion), (prompt_ids, ids) in zip(pairs, rows_of(tokenizer, pairs)):
        alone = tokenizer(prompt).input_ids
        assert prompt_ids == alone[: len(prompt_ids)]
        assert tokenizer.decode(prompt_ids[bos:] + ids[:-1]) == prompt + completion
        assert ids[-1] == tokenizer.eos_token_id and len(ids) > 1
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
        sft.encode(tokenizer, 64, prompt, [{"role": "assistant", "content": "great"}])


def test_columns_of_each_layout_are_read_and_completions_may_repeat_their_prompt(tmp_path):
    tokenizer, rows = tiny.word_tokenizer(), tiny.completions(4)

    def load(name, rows):
        return sft.load_rows(str(tiny.write_jsonl(tmp_path / f"{name}.jsonl", rows)), "train", tokenizer, 64)

    expected = load("plain", rows)
    assert load("repeated", [row | {"completion": row["prompt"] + row["completion"]} for row in rows]) == expected
    assert load("text", [{"text": row["prompt"] + row["completion"]} for row in rows]) == [
        [[], p + c] for p, c in expected
    ]
    chat = [tiny.as_messages(row) for row in rows]
    messages = load("messages", [{"messages": row["prompt"] + row["completion"]} for row in chat])
    assert messages == [[[], p + c] for p, c in load("chat", chat)]


def test_completions_that_repeat_their_prompt_are_parted_from_it_though_one_row_does_not(tmp_path):
    tokenizer = tiny.word_tokenizer()

    def texts(rows):
        path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
        return [tokenizer.decode(row[1]) for row in sft.load_rows(str(path), "train", tokenizer, 64)]

    whole, alone = {"prompt": "the", "completion": "the film ."}, {"prompt": "the", "completion": " plot ."}
    assert texts([whole, whole, alone]) == ["film . <eos>"] * 2 + ["plot . <eos>"]
    assert texts([whole, alone, alone]) == ["<unk> film . <eos>"] + ["plot . <eos>"] * 2  # "thethe"
    user, answer = {"role": "user", "content": "plot"}, {"role": "assistant", "content": "great"}
    whole, alone = {"prompt": [user], "completion": [user, answer]}, {"prompt": [user], "completion": [answer]}
    for rows in (
        [whole, whole, alone],
        [whole, alone, alone],
        [whole | {"prompt": "plot"}, alone | {"prompt": "plot"}],
    ):
        assert {*texts(rows)} == {"great <eos>"}  # of messages there is no doubt
    with pytest.raises(SystemExit, match="no answer.*\n.*plot.*\n.*fine.*plot"):
        texts([whole | {"completion": [{"role": "system", "content": "fine"}, user, answer]}])


def test_json_is_text_unless_it_spells_messages(tmp_path):
    rows = [
        {"prompt": "the", "completion": json.dumps([{first: "film"}])} for first in ("company", "role_name", "code")
    ]
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    assert len(sft.load_rows(str(path), "train", tiny.word_tokenizer(), 64)) == 3


def test_messages_before_a_text_are_refused(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "plot"}], "completion": "great ."}]
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(SystemExit, match="row 1, column completion.*is not text or messages as in row 1"):
        sft.load_rows(str(path), "train", tiny.word_tokenizer(), 64)


def test_an_eos_behind_a_prompt_is_not_read():
    tokenizer = tiny.word_tokenizer()
    plain, ended = rows_of(tokenizer, [("review of plot :", " great ."), ("review of plot :<eos>", " great .")])
    assert plain == ended


def test_pairs_that_are_equal_where_they_are_cut_are_left_out():
    tokenizer, encode = tiny.word_tokenizer(), lambda *texts: sft.encode(tokenizer, 8, "review :", *texts)
    assert encode(" the film was very great .", " the film was very great . dull") is None  # 6 tokens of each
    assert encode(" great", " great") is None and len(encode(" great", " dull")) == 3


# --- batches ---


def test_each_epoch_is_another_permutation_of_the_rows():
    rows = list(range(10))
    epochs = [
        [row for step in range(3 * e, 3 * e + 3) for row in sft.batch_at(rows, step, 3, seed=1)] for e in range(3)
    ]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert sft.batch_at(rows, 4, 3, seed=1) == epochs[1][3:6] and sft.batch_at(rows, 4, 3, seed=2) != epochs[1][3:6]


@pytest.mark.parametrize("rows,size", [(10, 4), (11, 2), (3, 64), (9, 4), (0, 4), (8, 4)])
def test_micro_batches_hold_each_row_once_and_rows_of_like_length_meet(rows, size):
    rows = [[[1] * (i % 3), [2] * (1 + i * i % 7)] for i in range(rows)]
    parts = sft.micro_batches(rows, size)
    lengths = [sum(map(len, row)) for part in parts for row in part]
    assert lengths == sorted(sum(map(len, row)) for row in rows) and all(0 < len(part) < 2 * size for part in parts)
    assert len(parts) == len(rows) // size or len(rows) < size


# --- runs ---


def test_the_loss_falls_and_the_held_out_loss_is_that_of_one_batch_of_all_rows(world):
    args = world(max_steps=40, learning_rate=1e-2, micro_batch_size=2)
    run(args)
    model, tokenizer = sft.load_model(sft.transformers.AutoModelForCausalLM, f"{args.run_dir}/model", 64)
    rows = sft.load_rows(args.dataset, "test", tokenizer, 64)
    assert metric(args, "eval/loss")[40] == pytest.approx(loss_of(model, rows).item(), rel=1e-5)
    assert metric(args, "eval/loss")[40] < 1 < metric(args, "loss")[1]
