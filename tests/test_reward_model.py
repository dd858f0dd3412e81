"""reward_model.py: the loss by hand numbers, where the reward is read, the head, how pairs are read and main's flags."""

import functools
import gzip
import json
import math
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import reward_model
import tiny
import torch
from accelerate.state import AcceleratorState
from forks import fork
from helpers import samples_logged, scalars, spy_on
from reward_model import pair_rewards, reward_loss, text_rewards
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BertConfig

CPU, LOADER = torch.device("cpu"), AutoModelForSequenceClassification
USER = {"role": "user", "content": "review of plot :"}
GOOD, POOR = ({"role": "assistant", "content": f"the plot was {word} ."} for word in ("great", "dull"))
PLAIN = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, texts = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForSequenceClassification.from_pretrained(folder)
for side in ("right", "left"):
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    batch = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        print(json.dumps(model(**batch, position_ids=positions).logits[:, 0].tolist()))
"""


@pytest.fixture(autouse=True)
def fresh_state():
    """Signals as they were, after a run in this process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture
def world(tmp_path):
    """Args of a short run on a tiny model and 24 + 10 pairs."""
    tiny.make_model(tmp_path / "base")
    tiny.write_jsonl(tmp_path / "data" / "train.jsonl", tiny.preferences(24))
    tiny.write_jsonl(tmp_path / "data" / "test.jsonl", tiny.preferences(10))

    def args(run_dir="run", **changed) -> reward_model.Args:
        folders = {
            "model": str(tmp_path / "base"),
            "dataset": str(tmp_path / "data"),
            "run_dir": str(tmp_path / run_dir),
        }
        flags = {"batch_size": 8, "micro_batch_size": 4, "max_length": 64, "max_steps": 3, "learning_rate": 1e-3}
        return reward_model.Args(**folders | flags | {"device": "cpu", "save_every": 0} | changed)

    return args


def run(args, saved=None):
    """Run the script in this process; the weights that it saved."""
    AcceleratorState._reset_state(reset_partial_state=True)
    reward_model.main(args, saved)
    return load_file(f"{args.run_dir}/model/model.safetensors")


def load(folder, max_length=64, seed=1):
    """Model, with its pad token set, and tokenizer, as main loads them; and the token that pads."""
    torch.manual_seed(seed)
    model, tokenizer = reward_model.load_model(LOADER, str(folder), max_length, num_labels=1)
    render = functools.partial(tokenizer.apply_chat_template, tokenize=False)
    stops = reward_model.stop_tokens(tokenizer, render)
    return model, tokenizer, reward_model.set_pad_token(model, tokenizer, stops)


def rows_of(tokenizer, rows, max_length=64, **more):
    """Token ids of rows of columns, as the script reads them from a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = tiny.write_jsonl(Path(folder) / "rows.jsonl", rows)
        return reward_model.load_rows(str(path), "train", tokenizer, max_length, **more)


def metric(args, tag):
    """A logged metric by step."""
    return dict(scalars(Path(args.run_dir), tag))


def alone(model, ids):
    """The reward of one text without padding, read at its last token by hand."""
    return model.score(model.base_model(torch.tensor([ids])).last_hidden_state[0, -1])[0]


# --- the loss ---


def test_the_loss_is_minus_log_sigmoid_of_the_difference():
    found = reward_loss(torch.tensor([[2.0, 1.0, 1.0], [1.0, 2.0, 1.0]]), 0.0)
    assert found["loss"].tolist() == pytest.approx([0.31326169, 1.31326169, math.log(2)])  # ln(1 + e^-1), ln(1 + e)
    assert found["accuracy"].tolist() == [1, 0, 0.5]
    assert found["margin"].tolist() == [1, -1, 0]


def test_centering_adds_the_squared_sum():
    pair = torch.tensor([[2.0], [1.0]])
    assert reward_loss(pair, 0.1)["loss"].item() == pytest.approx(0.31326169 + 0.1 * 9)


def test_the_gradient_is_the_probability_of_the_wrong_order():
    pair = torch.tensor([[0.3, -2.0], [0.1, 1.0]], requires_grad=True)
    reward_loss(pair, 0.0)["loss"].sum().backward()
    wrong = torch.sigmoid(pair[1] - pair[0]).detach()
    torch.testing.assert_close(pair.grad, torch.stack([-wrong, wrong]))


def test_extreme_rewards_stay_finite():
    pair = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    losses = reward_loss(pair, 0.0)["loss"]
    losses.sum().backward()
    assert losses.tolist() == [0.0, 2e4]
    assert pair.grad.isfinite().all()


# --- where the reward is read ---


@pytest.mark.parametrize("arch", tiny.CONFIGS)
def test_the_reward_is_that_of_the_last_real_token_whatever_pads(arch, tmp_path):
    tiny.make_model(tmp_path, arch)
    model, tokenizer, pad = load(tmp_path)
    rows = []
    for prompt, chosen, rejected in rows_of(tokenizer, tiny.preferences(4)):
        rows += [[prompt, chosen], [prompt, rejected]]
    without_eos = [[prompt, [*text[:-1], 9]] for prompt, text in rows]
    with torch.no_grad():
        expected = torch.stack([alone(model, prompt + text) for prompt, text in rows])
        model.get_input_embeddings().weight[pad] = 100.0  # must not be seen
        found = text_rewards(model, rows, pad, CPU)
        beside_a_long_one = text_rewards(model, [*rows, [[5], [6] * 60]], pad, CPU)[:-1]
        changed = text_rewards(model, without_eos, pad, CPU)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(beside_a_long_one, expected, atol=1e-5, rtol=1e-5)
    assert len({len(prompt + text) for prompt, text in rows}) > 2
    assert (changed - found).abs().min() > 1e-3


@pytest.mark.parametrize("name", tiny.TOKENIZERS)
@pytest.mark.parametrize("form", ["text", "chat"])
def test_plain_transformers_reads_the_rewards_of_training_on_a_padded_batch(name, form, tmp_path):
    tiny.make_model(tmp_path / "base", "qwen3", tokenizer=tiny.TOKENIZERS[name][0]())
    model, tokenizer, pad = load(tmp_path / "base")
    pairs = [row if form == "text" else tiny.as_messages(row) for row in tiny.preferences(4)]
    rows = [[row[0], row[i]] for row in rows_of(tokenizer, pairs) for i in (1, 2)]
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    model = LOADER.from_pretrained(tmp_path / "saved")
    batch = tokenizer.pad({"input_ids": [prompt + text for prompt, text in rows]}, return_tensors="pt")
    assert batch.attention_mask.min() == 0
    assert tokenizer.pad_token_id == model.config.pad_token_id == pad
    with torch.no_grad():
        expected = torch.stack([alone(model, prompt + text) for prompt, text in rows])
        torch.testing.assert_close(model(**batch).logits[:, 0], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(text_rewards(model, rows, pad, CPU), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pad", ["<pad>", "<eos>", None])
def test_a_new_process_reads_the_same_scores_of_texts(pad, world, tmp_path):
    tiny.make_model(tmp_path / "base", "gpt2", tokenizer=tiny.word_tokenizer(pad=pad))
    args = world(model=str(tmp_path / "base"))
    run(args)
    model, tokenizer, chosen = load(f"{args.run_dir}/model")
    pairs = tiny.preferences(4)
    with torch.no_grad():
        scores = pair_rewards(model, rows_of(tokenizer, pairs), chosen, CPU).flatten()
    texts = [row["prompt"] + row[side] + " <eos>" for side in ("chosen", "rejected") for row in pairs]
    (tmp_path / "plain.py").write_text(PLAIN)
    process = fork(tmp_path / "said", tmp_path / "plain.py", f"{args.run_dir}/model", json.dumps(texts))
    process.join()
    assert process.exitcode == 0
    right, left = (tmp_path / "said").read_text().splitlines()[-2:]
    for line in (right, left):
        torch.testing.assert_close(torch.tensor(json.loads(line)), scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pad", ["<pad>", "<eos>", None])
def test_the_pad_token_is_kept_unless_it_is_missing_or_ends_texts(pad, tmp_path):
    tiny.make_model(tmp_path / "words", tokenizer=tiny.word_tokenizer(pad=pad))
    model, tokenizer, found = load(tmp_path / "words")
    assert tokenizer.convert_ids_to_tokens(found) == tokenizer.pad_token == ("<pad>" if pad == "<pad>" else "<unk>")
    assert model.config.pad_token_id == found
    tiny.make_model(tmp_path / "bytes", tokenizer=tiny.gemma_like())  # no unknown token; the pad ends turns
    before = AutoTokenizer.from_pretrained(tmp_path / "bytes").get_vocab()
    model, tokenizer, found = load(tmp_path / "bytes")
    assert tokenizer.get_vocab() == before | {"<pad>": len(before)}  # no word of a text
    assert found == len(before)
    assert model.config.pad_token_id == found
    assert model.get_input_embeddings().num_embeddings == found + 1


def test_an_unknown_token_that_ends_texts_does_not_pad(tmp_path):
    tokenizer = tiny.word_tokenizer(pad="<eos>")
    tokenizer.unk_token = "<eos>"  # as in GPT-2
    tiny.make_model(tmp_path / "words", tokenizer=tokenizer)
    model, tokenizer, found = load(tmp_path / "words")
    assert tokenizer.pad_token == "<pad>"
    assert found == model.config.pad_token_id != tokenizer.eos_token_id


def test_a_chat_that_begins_like_another_keeps_its_last_answer():
    chosen = [{"role": "user", "content": "plot"}, {"role": "assistant", "content": "great"}]
    rejected = [*chosen, {"role": "user", "content": "acting"}, {"role": "assistant", "content": "bad"}]
    assert reward_model.shared_turns([chosen, rejected]) == chosen[:1]
    assert reward_model.shared_turns([chosen, chosen]) == chosen[:1]


# --- the head ---


def test_a_new_head_has_the_std_of_the_paper_and_an_old_one_is_kept(world, tmp_path):
    tiny.make_model(tmp_path / "wide", hidden_size=512)
    args = world("new", max_steps=1, learning_rate=1e-12, model=str(tmp_path / "wide"))
    first = run(args)["score.weight"]
    assert first.std().item() == pytest.approx(1 / math.sqrt(513), rel=0.1)
    assert first.shape == (1, 512)
    old = world("old", max_steps=1, learning_rate=1e-12, seed=2, model=f"{args.run_dir}/model")
    torch.testing.assert_close(run(old)["score.weight"], first, atol=1e-9, rtol=0)


def test_a_reward_model_whose_head_has_another_name_is_refused(world):
    args = world()
    LOADER.from_pretrained(args.model, num_labels=1).save_pretrained(args.model)
    tensors = load_file(f"{args.model}/model.safetensors")
    tensors["value_head.weight"] = tensors.pop("score.weight")
    save_file(tensors, f"{args.model}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="lacks the weights .*score.weight"):
        run(args)


def test_a_head_is_new_whatever_the_folder_of_the_adapters_base_is_called(tmp_path):
    from peft import LoraConfig, get_peft_model

    tiny.make_model(tmp_path / "SEQ_CLS")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "SEQ_CLS")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    tiny.word_tokenizer().save_pretrained(tmp_path / "adapter")
    model, _, _ = load(tmp_path / "adapter")
    head = model.score.weight.detach().clone()
    reward_model.draw_new_head(model, str(tmp_path / "adapter"))
    assert not torch.equal(model.score.weight, head)


def test_the_head_below_an_adapter_without_one_is_kept(tmp_path):
    from peft import LoraConfig

    tiny.make_model(tmp_path / "base")
    torch.manual_seed(0)
    base = LOADER.from_pretrained(tmp_path / "base", num_labels=1)
    base.save_pretrained(tmp_path / "base")
    base.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))  # whose file does not name the model's class
    base.save_pretrained(tmp_path / "adapter")
    tiny.word_tokenizer().save_pretrained(tmp_path / "adapter")
    model, _, _ = load(tmp_path / "adapter")
    head = model.score.weight.detach().clone()
    reward_model.draw_new_head(model, str(tmp_path / "adapter"))
    torch.testing.assert_close(model.score.weight.detach(), head, atol=0, rtol=0)


def test_the_head_of_an_adapter_is_kept(world, tmp_path):
    from peft import LoraConfig, get_peft_model

    args = world(max_steps=1, learning_rate=1e-12)
    model = get_peft_model(LOADER.from_pretrained(args.model, num_labels=1), LoraConfig(r=2, task_type="SEQ_CLS"))
    head = {name: tensor for name, tensor in model.state_dict().items() if "score.modules_to_save" in name}
    model.save_pretrained(tmp_path / "adapter")
    tiny.word_tokenizer().save_pretrained(tmp_path / "adapter")
    args.model = str(tmp_path / "adapter")
    torch.testing.assert_close(run(args)["score.weight"], *head.values(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("labels,error", [(2, RuntimeError), (1, SystemExit)], ids=["two labels", "an encoder's head"])
def test_models_that_score_otherwise_are_refused(world, labels, error):
    args = world()
    if labels == 2:
        LOADER.from_pretrained(args.model, num_labels=2).save_pretrained(args.model)
    else:
        small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        LOADER.from_config(BertConfig(vocab_size=64, num_labels=1, **small)).save_pretrained(args.model)
    with pytest.raises(error, match="ignore_mismatched_sizes|not causal"):
        run(args)
    assert not Path(args.run_dir).exists()


# --- from text to tokens ---


def test_the_ids_of_a_pair_are_those_of_its_words():
    tokenizer = tiny.word_tokenizer()

    def spelled(rows):
        return [[tokenizer.convert_ids_to_tokens(ids) for ids in row] for row in rows_of(tokenizer, rows)]

    row = {"prompt": "the film :", "chosen": " the plot was great .", "rejected": " the plot was bad ."}
    expected = [text.split() for text in ("the film :", "the plot was great . <eos>", "the plot was bad . <eos>")]
    assert spelled([row]) == [expected]  # the prompt does not grow by the words that both begin with
    whole = {column: row["prompt"] + row[column] for column in ("chosen", "rejected")}
    assert spelled([row | whole]) == [expected]
    shared = "the film : the plot was".split()  # without a prompt it is what both begin with
    assert spelled([whole]) == [[shared, ["great", ".", "<eos>"], ["bad", ".", "<eos>"]]]


@pytest.mark.parametrize("form", ["explicit", "implicit", "repeated", "a text"])
def test_chats_part_where_the_answers_begin_whatever_the_layout(form):
    both = {"chosen": [GOOD], "rejected": [POOR]}
    whole = {"chosen": [USER, GOOD], "rejected": [USER, POOR]}
    layouts = {
        "explicit": {"prompt": [USER], **both},
        "implicit": whole,
        "repeated": {"prompt": [USER], **whole},
        "a text": {"prompt": USER["content"], **whole},
    }
    tokenizer = tiny.word_tokenizer()
    (row,) = rows_of(tokenizer, [layouts[form]])
    answers = [f"{turn['content']} <eos>" for turn in (GOOD, POOR)]
    assert [tokenizer.decode(ids) for ids in row] == ["user : review of plot : assistant :", *answers]


def test_pairs_that_are_equal_where_they_are_cut_are_left_out(capsys):
    row = {"prompt": "review :", "chosen": " the film was very great .", "rejected": " the film was very great . dull"}
    assert rows_of(tiny.word_tokenizer(), [row], max_length=8) == []  # 6 tokens of each
    assert "1 of 1 rows are left out: an answer is empty, or both are the same" in capsys.readouterr().out
    assert len(rows_of(tiny.word_tokenizer(), [row], max_length=9)) == 1
    assert rows_of(tiny.word_tokenizer(), [row | {"rejected": row["chosen"]}]) == []


def test_two_texts_that_share_no_beginning_have_no_prompt_and_are_refused():
    row = {"asked": "review of plot :", "chosen": "the plot was great .", "rejected": "was dull ."}
    with pytest.raises(SystemExit, match=r"share no beginning.*rename .* to prompt: \['asked', 'chosen', 'rejected'\]"):
        rows_of(tiny.word_tokenizer(), [row])
    assert len(rows_of(tiny.word_tokenizer(), [row | {"prompt": ""}])) == 1


@pytest.mark.parametrize("layout", ["explicit", "implicit"])
def test_chats_that_end_in_a_users_turn_are_refused(layout):
    good = {"prompt": [USER], "chosen": [GOOD], "rejected": [POOR]}
    bad = {"prompt": [USER], "chosen": [GOOD], "rejected": [POOR, USER]}
    if layout == "implicit":
        good = {"chosen": [USER, GOOD], "rejected": [USER, POOR]}
        bad = {"chosen": [USER, GOOD], "rejected": [USER, POOR, USER]}
    with pytest.raises(SystemExit, match="row 2: the chat .* turn of the assistant"):
        rows_of(tiny.word_tokenizer(), [good, bad])


@pytest.mark.parametrize("layout", ["explicit", "implicit"])
def test_a_template_that_leaves_out_a_part_of_an_answer_is_refused(layout):
    template = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"

    def row(thoughts):
        poor = {"role": "assistant", "content": thoughts + "dull"}
        if layout == "implicit":
            return {"chosen": [USER, GOOD], "rejected": [USER, poor]}
        return {"prompt": [USER], "chosen": [GOOD], "rejected": [poor]}

    with pytest.raises(SystemExit, match="leaves out a part of the turn '<think>so</think>dull'"):
        rows_of(tiny.bpe_tokenizer(template=template), [row("<think>so</think>")])
    assert len(rows_of(tiny.bpe_tokenizer(template=template), [row("")])) == 1


def test_one_of_two_answers_that_repeats_the_prompt_is_refused():
    row = {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [POOR]}
    with pytest.raises(SystemExit, match="one of the two answers repeats the prompt"):
        rows_of(tiny.word_tokenizer(), [row])


# --- what is said, and files ---


def test_the_first_row_and_the_counts_of_pairs_are_printed_with_their_flags(world, tmp_path, capsys):
    row = {"prompt": "review :", "chosen": " the plot was great .", "rejected": " felt very dull ."}
    rows = [dict(row) for _ in range(20)]
    rows[1]["prompt"] = "review " * 9
    rows[2]["rejected"] = "  "
    rows[3]["rejected"] = row["chosen"]
    for long in rows[5:9]:
        long["chosen"] = " the plot was great . not dull"
    rows[10]["rejected"] = " felt xyzzy dull ."
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    run(world(dataset=str(path), eval_split="", max_length=8, max_steps=1))
    lines = capsys.readouterr().out.splitlines()
    assert "first row: review : | the plot was great . <eos> | felt very dull . <eos>" in lines
    assert {line for line in lines if line.startswith("split")} == {
        "split train: 1 of 20 rows are left out: the prompt alone fills --max-length",
        "split train: 2 of 20 rows are left out: an answer is empty, or both are the same",
        "split train: 4 of 20 rows are cut to --max-length, and so have no end",
        "split train: 1 of 20 rows hold words that --model does not know",
    }


@pytest.mark.parametrize("known", [1, 2])
def test_a_data_set_most_of_whose_pairs_hold_unknown_words_is_refused(known):
    rows = [{"prompt": "the", "chosen": " plot", "rejected": f" {word}"} for word in ["film"] * known + ["xyzzy"] * 2]
    if known == 2:
        assert len(rows_of(tiny.word_tokenizer(), rows)) == 4
    else:
        with pytest.raises(SystemExit, match="most rows hold <unk>, a word that --model does not know"):
            rows_of(tiny.word_tokenizer(), rows)


def test_gzipped_files_are_read_and_nothing_is_held_out_of_a_lone_file(world, tmp_path, capsys):
    rows = tiny.preferences(24)
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    assert reward_model.Args().eval_split == "auto"
    args = world(dataset=str(tmp_path / "rows.jsonl.gz"))
    plain = run(world("plain", eval_split=""))
    packed = run(args)
    assert f"{args.dataset} has no split test or validation: nothing is held out" in capsys.readouterr().out
    assert all(torch.equal(plain[name], packed[name]) for name in plain)  # the same 24 pairs
    assert metric(args, "eval/loss") == {}
    assert len(metric(args, "loss")) == 2


def test_main_reads_the_configuration_and_the_arguments_of_the_template_for_both_splits(world, tmp_path, monkeypatch):
    tokenizer = tiny.word_tokenizer()
    tokenizer.chat_template = "{% if dull %} not dull :{% endif %}" + tokenizer.chat_template
    tiny.make_model(tmp_path / "base", tokenizer=tokenizer)
    row = {"prompt": [USER], "chosen": [GOOD], "rejected": [POOR]}
    folder = tmp_path / f"set{time.time_ns()}"  # datasets caches such folders by their name alone
    for split in ("train", "test"):
        tiny.write_jsonl(folder / f"{split}.jsonl", [row] * 8)
    files = "[{split: train, path: train.jsonl}, {split: test, path: test.jsonl}]"
    configs = f"- config_name: main\n  data_files: {files}\n- config_name: b\n  data_files: train.jsonl\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    loads = spy_on(monkeypatch, reward_model, "load_rows")
    flags = {"dataset": str(folder), "dataset_config": "main", "chat_template_kwargs": '{"dull": true}'}
    run(world(max_steps=1, **flags))
    assert [call.split for call in loads] == ["train", "test"]
    for call in loads:
        assert len(call.result) == 8
        prompt, *_ = call.result[0]
        assert tokenizer.decode(prompt) == "not dull : user : review of plot : assistant :"
    with pytest.raises(ValueError, match="must be a JSON object"):
        world(chat_template_kwargs="[1]")


# --- training and evaluation ---


def test_the_first_loss_logged_is_that_of_the_model_at_the_start_and_an_easy_set_is_learnt(world):
    args = world(max_steps=20, learning_rate=5e-3)
    run(args)
    model, tokenizer, pad = load(args.model)  # the head drawn next is that of main
    torch.nn.init.normal_(model.score.weight, std=33**-0.5)
    rows = rows_of(tokenizer, tiny.preferences(24))
    first = [rows[i] for i in reward_model.batch_at(24, 0, 8, args.seed)]
    with torch.no_grad():
        expected = reward_loss(pair_rewards(model, first, pad, CPU), 0.0)["loss"].mean().item()
    assert metric(args, "loss")[1] == pytest.approx(expected, rel=1e-5)
    assert metric(args, "accuracy")[20] == metric(args, "eval/accuracy")[20] == 1
    assert metric(args, "eval/margin")[20] > 2
    assert metric(args, "eval/loss")[20] < 0.1


def first_batch(args):
    """Model before the run, and rows of the first update, drawn by hand from the seed."""
    model, tokenizer, _ = load(args.model, seed=args.seed)
    torch.nn.init.normal_(model.score.weight, std=33**-0.5)
    rows = reward_model.load_rows(args.dataset, "train", tokenizer, 64)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1_000_003 * args.seed))
    return model, [rows[i] for i in order[: args.batch_size]]


def loop_loss(model, rows, centering=0.0):
    """Mean loss of pairs, whose texts are read one by one."""
    losses = []
    for prompt, *texts in rows:
        chosen, rejected = (alone(model, prompt + text) for text in texts)
        losses.append(torch.log1p(torch.exp(rejected - chosen)) + centering * (chosen + rejected) ** 2)
    return torch.stack(losses).mean()


def test_the_seed_orders_the_pairs_and_draws_the_head(world, tmp_path):
    losses = []
    for seed in (1, 2):
        args = world(f"new{seed}", seed=seed, max_steps=1)
        run(args)
        losses.append(metric(args, "loss")[1])
        assert losses[-1] == pytest.approx(loop_loss(*first_batch(args)).item(), rel=1e-5)
    old = {"model": f"{tmp_path}/new1/model", "max_steps": 1}  # whose head is not drawn
    for seed in (1, 2):
        args = world(f"old{seed}", seed=seed, **old)
        run(args)
        losses.append(metric(args, "loss")[1])
    assert len({round(loss, 4) for loss in losses}) == 4


def test_the_first_gradient_is_that_of_the_mean_over_pairs_clipped_to_norm_one(world):
    args = world(max_steps=1, micro_batch_size=3, centering=1.0)
    run(args)
    model, rows = first_batch(args)
    loop_loss(model, rows, centering=1.0).backward()
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


def test_weights_that_have_no_gradient_do_not_decay(world):
    before = load_file(f"{world().model}/model.safetensors")["model.embed_tokens.weight"]
    after = run(world(learning_rate=0.1))["model.embed_tokens.weight"]
    words = tiny.word_tokenizer().convert_tokens_to_ids(["user", "assistant", "plot"])  # the last is in texts
    assert [torch.equal(after[i], before[i]) for i in words] == [True, True, False]


def test_epochs_are_passes_over_the_pairs_where_there_are_no_max_steps(world, monkeypatch):
    batches = spy_on(monkeypatch, reward_model, "batch_at")
    args = world(epochs=2, max_steps=0, batch_size=7)  # 3 of 24 pairs are left out of an epoch
    run(args)
    seen = [call.result for call in batches]
    assert len(seen) == 6
    assert list(metric(args, "loss")) == [1, 6]
    for epoch in (seen[:3], seen[3:]):
        assert len(set().union(*epoch)) == 21
    batches.clear()
    run(world("short", epochs=2, max_steps=2, batch_size=7))
    assert len(batches) == 2


def test_held_out_means_are_those_of_single_pairs_whatever_the_batch(world):
    args = world(centering=0.1, batch_size=9, micro_batch_size=3)  # 3 does not divide 10
    run(args)
    model, tokenizer, _ = load(f"{args.run_dir}/model")
    total = {"loss": 0.0, "accuracy": 0.0, "margin": 0.0}
    for prompt, *texts in rows_of(tokenizer, tiny.preferences(10)):
        with torch.no_grad():
            chosen, rejected = (alone(model, prompt + text).item() for text in texts)
        total["loss"] += math.log1p(math.exp(rejected - chosen)) + 0.1 * (chosen + rejected) ** 2
        total["accuracy"] += chosen > rejected
        total["margin"] += chosen - rejected
    for name, value in total.items():
        assert metric(args, f"eval/{name}")[3] == pytest.approx(value / 10, rel=1e-4, abs=1e-6), name


def test_swapping_chosen_and_rejected_negates_the_margin(tmp_path):
    tiny.make_model(tmp_path)
    model, tokenizer, pad = load(tmp_path)
    rows = rows_of(tokenizer, tiny.preferences(6))
    with torch.no_grad():
        found = reward_loss(pair_rewards(model, rows, pad, CPU), 0.0)
        swapped = reward_loss(pair_rewards(model, [[x, b, a] for x, a, b in rows], pad, CPU), 0.0)
    torch.testing.assert_close(found["margin"], -swapped["margin"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["accuracy"], 1 - swapped["accuracy"])
    torch.testing.assert_close(found["loss"] - swapped["loss"], -found["margin"], atol=1e-5, rtol=1e-4)


def test_samples_show_both_texts_of_a_pair_with_their_rewards(world):
    args = world(eval_every=2)
    with pytest.MonkeyPatch.context() as patch:
        samples = samples_logged(patch, reward_model.Accelerator)
        run(args)
    assert list(samples) == [0, 2, 3]
    assert len(set(samples.values())) == 3
    model, tokenizer, pad = load(f"{args.run_dir}/model")
    with torch.no_grad():
        scores = pair_rewards(model, rows_of(tokenizer, tiny.preferences(4)), pad, CPU).T.flatten().tolist()
    shown = samples[3].split("\n\n")
    assert [float(text.partition(":")[0]) for text in shown] == pytest.approx(scores, abs=0.006)
    (row,) = tiny.preferences(1)
    rejected = row["prompt"] + row["rejected"]
    _, _, second = shown[1].partition(":")
    assert second.split()[:-1] == rejected.split()  # and the stop token


def test_a_run_on_a_reward_model_resumes_bit_for_bit(world, monkeypatch, tmp_path):
    base = run(world("base_run"))
    model = str(tmp_path / "base_run" / "model")
    whole = run(world("whole", model=model))
    assert not torch.equal(whole["score.weight"], base["score.weight"])
    with monkeypatch.context() as patch:
        patch.setattr(reward_model.shutil, "rmtree", lambda *_, **__: None)  # older checkpoints stay
        run(world("parts", model=model, save_every=1))
    path = tmp_path / "parts" / "checkpoint" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 1}))
    monkeypatch.setattr(sys, "argv", ["reward_model.py", "--resume", str(tmp_path / "parts")])
    resumed = run(*reward_model.parse_args())
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
