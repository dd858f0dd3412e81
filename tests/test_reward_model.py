"""reward_model.py: the loss by hand numbers, at which token the reward is read, the head, and how pairs are measured."""

import json
import math
import signal
import subprocess
import sys

import pytest
import reward_model
import tiny
import torch
from accelerate.state import AcceleratorState
from helpers import scalars, spy_on
from reward_model import pair_rewards, reward_loss, rewards
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

CPU, LOADER = torch.device("cpu"), AutoModelForSequenceClassification
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


def load(folder, max_length=64):
    """Model, with its pad token set, and tokenizer, as main loads them; and the token that pads."""
    torch.manual_seed(1)
    model, tokenizer = reward_model.load_model(LOADER, str(folder), max_length, num_labels=1)
    return model, tokenizer, reward_model.set_pad_token(model, tokenizer)


def rows_of(tokenizer, pairs):
    """Rows [prompt ids, chosen ids, rejected ids] of pairs."""
    return [reward_model.encode(tokenizer, 64, *pair.values()) for pair in pairs]


def metric(args, tag):
    """A logged metric by step."""
    return dict(scalars(reward_model.Path(args.run_dir), tag))


def alone(model, ids):
    """The reward of one text without padding, read at its last token by hand."""
    return model.score(model.base_model(torch.tensor([ids])).last_hidden_state[0, -1])[0]


# --- the loss ---


def test_the_loss_is_minus_log_sigmoid_of_the_difference():
    found = reward_loss(torch.tensor([[2.0, 1.0, 1.0], [1.0, 2.0, 1.0]]), 0.0)
    assert found["loss"].tolist() == pytest.approx([0.31326169, 1.31326169, math.log(2)])  # ln(1 + e^-1), ln(1 + e)
    assert found["accuracy"].tolist() == [1, 0, 0.5] and found["margin"].tolist() == [1, -1, 0]


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
    assert losses.tolist() == [0.0, 2e4] and pair.grad.isfinite().all()


# --- where the reward is read ---


@pytest.mark.parametrize("arch", tiny.CONFIGS)
def test_the_reward_is_that_of_the_last_real_token_whatever_pads(arch, tmp_path):
    tiny.make_model(tmp_path, arch)
    model, tokenizer, pad = load(tmp_path)
    rows = [[row[0], row[i]] for row in rows_of(tokenizer, tiny.preferences(4)) for i in (1, 2)]
    with torch.no_grad():
        expected = torch.stack([alone(model, prompt + text) for prompt, text in rows])
        model.get_input_embeddings().weight[pad] = 100.0  # must not be seen
        found = rewards(model, rows, pad, CPU)
        longer = rewards(model, [*rows, [[5], [6] * 60]], pad, CPU)[:-1]
        changed = rewards(model, [[prompt, [*text[:-1], 9]] for prompt, text in rows], pad, CPU)  # where EOS was
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(longer, expected, atol=1e-5, rtol=1e-5)
    assert len({len(prompt + text) for prompt, text in rows}) > 2 and (changed - found).abs().min() > 1e-3


@pytest.mark.parametrize("name", tiny.TOKENIZERS)
@pytest.mark.parametrize("form", ["text", "chat"])
def test_plain_transformers_reads_the_rewards_of_training_on_a_padded_batch(name, form, tmp_path):
    tiny.make_model(tmp_path / "base", "qwen3", tokenizer=tiny.TOKENIZERS[name][0]())
    model, tokenizer, pad = load(tmp_path / "base")
    pairs = [row if form == "text" else tiny.as_messages(row) for row in tiny.preferences(4)]
    rows = [[row[0], row[i]] for row in rows_of(tokenizer, pairs) for i in (1, 2)]
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path / "saved"), LOADER.from_pretrained(tmp_path / "saved")
    batch = tokenizer.pad({"input_ids": [prompt + text for prompt, text in rows]}, return_tensors="pt")
    assert batch.attention_mask.min() == 0 and tokenizer.pad_token_id == model.config.pad_token_id == pad
    with torch.no_grad():
        expected = torch.stack([alone(model, prompt + text) for prompt, text in rows])
        torch.testing.assert_close(model(**batch).logits[:, 0], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rewards(model, rows, pad, CPU), expected, atol=1e-5, rtol=1e-5)


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
    command = [sys.executable, "-c", PLAIN, f"{args.run_dir}/model", json.dumps(texts)]
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-2:]:
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
    assert tokenizer.get_vocab() == before | {"<pad>": len(before)} and found == len(before)  # no word of a text
    assert model.config.pad_token_id == found and model.get_input_embeddings().num_embeddings == found + 1


# --- the head ---


def test_a_new_head_has_the_std_of_the_paper_and_an_old_one_is_kept(world, tmp_path):
    tiny.make_model(tmp_path / "wide", hidden_size=512)
    args = world("new", max_steps=1, learning_rate=1e-12, model=str(tmp_path / "wide"))
    first = run(args)["score.weight"]
    assert first.std().item() == pytest.approx(1 / math.sqrt(513), rel=0.1) and first.shape == (1, 512)
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
    assert not reward_model.Path(args.run_dir).exists()


# --- training and evaluation ---


def test_the_first_loss_logged_is_that_of_the_model_at_the_start_and_an_easy_set_is_learnt(world):
    args = world(max_steps=20, learning_rate=5e-3)
    run(args)
    model, tokenizer, pad = load(args.model)  # the head drawn next is that of main
    torch.nn.init.normal_(model.score.weight, std=33**-0.5)
    first = reward_model.batch_at(rows_of(tokenizer, tiny.preferences(24)), 0, 8, args.seed)
    with torch.no_grad():
        expected = reward_loss(pair_rewards(model, first, pad, CPU), 0.0)["loss"].mean().item()
    assert metric(args, "loss")[1] == pytest.approx(expected, rel=1e-5)
    assert metric(args, "accuracy")[20] == metric(args, "eval/accuracy")[20] == 1
    assert metric(args, "eval/margin")[20] > 2 and metric(args, "eval/loss")[20] < 0.1


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
        logs = spy_on(patch, reward_model.Accelerator, "log")
        run(args)
    samples = {step: values["samples"] for ((_, values, step), _) in logs if "samples" in values}
    assert list(samples) == [0, 2, 3] and len(set(samples.values())) == 3
    model, tokenizer, pad = load(f"{args.run_dir}/model")
    with torch.no_grad():
        scores = pair_rewards(model, rows_of(tokenizer, tiny.preferences(4)), pad, CPU).T.flatten().tolist()
    shown = [float(text.partition(":")[0]) for text in samples[3].split("\n\n")]
    assert shown == pytest.approx(scores, abs=0.006)
    row = tiny.preferences(1)[0]
    assert (row["prompt"] + row["rejected"]).split() == samples[3].split("\n\n")[1].partition(":")[2].split()[:-1]


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
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
