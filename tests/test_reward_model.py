"""reward_model.py: the loss by hand numbers, where the reward is read, what is saved, and the forms of data."""

import json
import math
import subprocess
import sys

import pytest
import reward_model
import tiny
import torch
from helpers import scalars
from reward_model import (
    Args,
    collate_pairs,
    held_out_rewards,
    main,
    margins_of,
    pair_rewards,
    reward_loss,
    rewards,
    split_prompt,
)
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

CPU = torch.device("cpu")
PLAIN = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, side, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
model = AutoModelForSequenceClassification.from_pretrained(folder)
batch = tokenizer([text + tokenizer.eos_token for text in texts], padding=True, return_tensors="pt")
positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
with torch.no_grad():
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions).logits[:, 0]
print(json.dumps((logits - model.config.reward_mean).tolist()))
"""


@pytest.fixture
def args(tmp_path):
    """Flags of a short run on a tiny Llama and 24 pairs, 10 of them held out."""
    tiny.make_model(tmp_path / "base")
    tiny.write_jsonl(tmp_path / "data" / "train.jsonl", tiny.preferences(24))
    tiny.write_jsonl(tmp_path / "data" / "test.jsonl", tiny.preferences(10))
    return Args(model=str(tmp_path / "base"), dataset=str(tmp_path / "data"), run_dir=str(tmp_path / "run"),
                batch_size=8, max_length=64, max_steps=3, learning_rate=1e-3, device="cpu")  # fmt: skip


def load(args):
    """Tokenizer, model and training rows as main makes them."""
    torch.manual_seed(args.seed)
    tokenizer = reward_model.load_tokenizer("model", args.model)
    reward_model.set_pad_token(args.model, args.pad_token, tokenizer)
    model = reward_model.load_reward_model(args.model, tokenizer).eval()
    return tokenizer, model, reward_model.load_scored_pairs(args, tokenizer, args.train_split)


def refused(capsys, function, *args):
    """The one line that a call ends with, exit status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function(*args)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and message.startswith("error: ")
    return message


def trained(args):
    """Run main; returns its model and tokenizer as plain transformers load them."""
    main(args)
    folder = f"{args.run_dir}/model"
    return AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def plain_scores(folder, texts, side="right"):
    """Rewards that a new process with nothing but transformers reads from a folder."""
    command = [sys.executable, "-c", PLAIN, str(folder), side, json.dumps(texts)]
    return torch.tensor(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


# --- the loss ---


def test_the_loss_is_minus_log_sigmoid_of_the_difference():
    losses = reward_loss(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 2.0]), torch.zeros(2), 0.0)
    assert losses.tolist() == pytest.approx([0.31326169, 1.31326169])  # ln(1 + e^-1), ln(1 + e)


def test_the_loss_of_equal_rewards_is_ln_2():
    assert reward_loss(torch.ones(1), torch.ones(1), torch.zeros(1), 0.0).item() == pytest.approx(math.log(2))


def test_a_margin_is_subtracted_inside_the_sigmoid_and_centring_adds_the_squared_sum():
    chosen, rejected, margins = torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([0.5])
    assert reward_loss(chosen, rejected, margins, 0.0).item() == pytest.approx(0.47407698)  # ln(1 + e^-0.5)
    assert reward_loss(chosen, rejected, margins, 0.1).item() == pytest.approx(0.47407698 + 0.1 * 9)


def test_the_gradient_is_the_probability_of_the_wrong_order():
    chosen, rejected = torch.tensor([0.3, -2.0], requires_grad=True), torch.tensor([0.1, 1.0], requires_grad=True)
    margins = torch.tensor([0.0, 0.5])
    reward_loss(chosen, rejected, margins, 0.0).sum().backward()
    wrong = torch.sigmoid(-(chosen - rejected - margins)).detach()
    torch.testing.assert_close(chosen.grad, -wrong)
    torch.testing.assert_close(rejected.grad, wrong)


def test_extreme_rewards_stay_finite():
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    losses = reward_loss(chosen, -chosen.detach(), torch.zeros(2), 0.0)
    losses.sum().backward()
    assert losses.tolist() == [0.0, 2e4] and chosen.grad.isfinite().all()


# --- where the reward is read ---


@pytest.mark.parametrize("arch", tiny.CONFIGS)
def test_the_reward_is_that_of_the_last_real_token_whatever_follows(arch, tmp_path, args):
    args.model = str(tmp_path / arch)
    tiny.make_model(args.model, arch)
    _, model, rows = load(args)
    with torch.no_grad():
        model.get_input_embeddings().weight[model.config.pad_token_id] = 100.0  # must not be seen
        ids, last = collate_pairs(rows[:5], CPU)
        scores = rewards(model, ids, last)
        hidden = [model.base_model(row[None, : end + 1]).last_hidden_state[0, -1] for row, end in zip(ids, last)]
        alone = torch.stack([model.score(state)[0] for state in hidden])  # batches of one, head at the last position
        torch.testing.assert_close(scores, alone, atol=1e-6, rtol=1e-5)

        after = torch.arange(ids.shape[1]) > last[:, None]
        assert after.any()
        torch.testing.assert_close(rewards(model, ids.masked_fill(after, 7), last), scores, atol=0, rtol=0)
        longer = torch.cat([ids, torch.full((len(ids), 9), 1)], dim=1)  # EOS as padding
        torch.testing.assert_close(rewards(model, longer, last), scores, atol=1e-6, rtol=1e-5)

        changed = ids.scatter(1, last[:, None], 9)  # another token where EOS was
        assert (rewards(model, changed, last) - scores).abs().min() > 1e-3


@pytest.mark.parametrize("arch", tiny.CONFIGS)
def test_rewards_of_a_shared_prompt_are_those_of_the_texts_alone_and_so_is_their_gradient(arch, tmp_path, args):
    args.model = str(tmp_path / arch)
    tiny.make_model(args.model, arch)
    _, model, _ = load(args)
    model.config.reward_mean = 0.25
    rows = [  # of unequal lengths either way, and one without a prompt
        [[5, 6, 7], [8, 9, 10, 1], [11, 1], [0.0]],
        [[5], [12, 1], [13, 14, 15, 16, 17, 1], [0.0]],
        [[], [7, 8, 1], [9, 1], [0.0]],
    ]
    found, gradients = {}, {}
    for share_prompt in (False, True):
        model.zero_grad()
        chosen, rejected = found[share_prompt] = pair_rewards(model, rows, share_prompt)
        reward_loss(chosen, rejected, torch.zeros(3), 0.1).sum().backward()
        gradients[share_prompt] = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    ends = [torch.tensor([prompt + text]) for side in (1, 2) for prompt, text in ((row[0], row[side]) for row in rows)]
    with torch.no_grad():  # batches of one, head at the last position
        alone = torch.stack([model.score(model.base_model(ids).last_hidden_state[0, -1])[0] for ids in ends]) - 0.25
    for scores in found.values():
        torch.testing.assert_close(scores, alone.view(2, 3), atol=1e-5, rtol=1e-5)
    assert (gradients[True] - gradients[False]).norm() < 1e-5 * gradients[False].norm()


def test_a_shared_row_may_be_longer_than_the_positions_of_the_model(args, tmp_path):
    args.model = str(tmp_path / "gpt2")
    tiny.make_model(args.model, "gpt2")  # has 128 positions, a table that padding must not leave
    rows = [[[3] * 10, [4] * 118, [5] * 118, [0.0]], [[3], [4, 1], [5, 1], [0.0]]]
    shared, apart = (pair_rewards(load(args)[1], rows, share_prompt) for share_prompt in (True, False))
    torch.testing.assert_close(shared, apart, atol=1e-5, rtol=1e-5)


def test_sharing_the_prompt_is_refused_where_a_sliding_window_is_shorter_than_the_rows(args, tmp_path, capsys):
    args.model = str(tmp_path / "narrow")
    tiny.make_model(args.model, "mistral", sliding_window=4)
    assert "--no-share-prompt" in refused(capsys, main, args)
    assert not (tmp_path / "run").exists()
    args.share_prompt = False
    main(args)


def test_each_text_ends_with_eos_and_is_read_there(args):
    tokenizer, _, rows = load(args)
    ids, last = collate_pairs(rows[:6], CPU)
    assert ids[torch.arange(12), last].tolist() == [tokenizer.eos_token_id] * 12
    assert all((row[: end + 1] == tokenizer.eos_token_id).sum() == 1 for row, end in zip(ids, last))
    texts = [tokenizer.decode(row[:end]) for row, end in zip(ids, last)]
    pairs = tiny.preferences(6)
    assert texts == [row["prompt"] + row[side] for side in ("chosen", "rejected") for row in pairs]


def test_a_tokenizer_needs_a_pad_token_other_than_eos(args, tmp_path, capsys):
    for name, pad in (("none", None), ("same", "<eos>")):
        args.model = str(tmp_path / name)
        tiny.make_model(args.model, tokenizer=tiny.word_tokenizer(pad=pad))
        assert "--pad-token" in refused(capsys, main, args)
        assert not (tmp_path / "run").exists()
    args.pad_token = "no such token"
    assert "not in the vocabulary" in refused(capsys, main, args)
    args.pad_token = "<eos>"
    assert "as both pad and EOS token" in refused(capsys, main, args)


def test_a_named_pad_token_is_saved_with_the_model(args, tmp_path):
    args.model, args.pad_token = str(tmp_path / "gpt2"), "<s>"
    tiny.make_model(args.model, "gpt2", tiny.bpe_tokenizer())
    model, tokenizer = trained(args)
    assert tokenizer.pad_token == "<s>" != tokenizer.eos_token
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_a_model_without_a_head_over_its_last_token_is_refused(args, tmp_path, capsys):
    args.model = str(tmp_path / "bert")
    settings = {
        "num_labels": 1,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    BertForSequenceClassification(BertConfig(vocab_size=64, **settings)).save_pretrained(args.model)
    tiny.word_tokenizer().save_pretrained(args.model)
    assert "causal language model" in refused(capsys, main, args)


# --- the head, saved and loaded ---


def test_a_new_head_has_the_std_of_the_paper_and_an_old_one_is_kept(args, tmp_path):
    tiny.make_model(args.model, num_attention_heads=4, hidden_size=512)
    tokenizer, model, _ = load(args)
    assert model.score.weight.std().item() == pytest.approx(1 / math.sqrt(513), rel=0.1)
    reward_model.save_model(model, tokenizer, model.state_dict(), tmp_path)
    args.model, args.seed = str(tmp_path / "model"), 2
    assert torch.equal(load(args)[1].score.weight, model.score.weight)


def test_a_new_process_reads_the_same_scores_bit_for_bit(args, tmp_path):
    tokenizer, model, rows = load(args)
    model.config.reward_mean = 0.25
    reward_model.save_model(model, tokenizer, model.state_dict(), tmp_path)
    texts = [row["prompt"] + row[side] for side in ("chosen", "rejected") for row in tiny.preferences(5)]
    ids, last = collate_pairs(rows[:5], CPU)
    with torch.no_grad():
        scores = rewards(model, ids, last)
        masked = torch.arange(ids.shape[1]) <= last[:, None]
        plain = model(ids.where(masked, tokenizer.pad_token_id), attention_mask=masked.long()).logits[:, 0] - 0.25
    assert torch.equal(plain_scores(tmp_path / "model", texts), plain)
    torch.testing.assert_close(plain, scores, atol=1e-6, rtol=1e-5)  # attention kernels with and without a mask
    torch.testing.assert_close(plain_scores(tmp_path / "model", texts, "left"), scores, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("eval_split", ["test", ""])
def test_normalised_rewards_have_mean_0_and_std_1(eval_split, args):
    args.eval_split, args.normalize = eval_split, True
    model, tokenizer = trained(args)
    rows = reward_model.load_scored_pairs(args, tokenizer, eval_split or "train")
    ids, last = collate_pairs(rows, CPU)
    with torch.no_grad():
        scores = rewards(model, ids, last)
    assert scores.mean().item() == pytest.approx(0, abs=1e-5)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_without_normalize_the_weights_are_those_of_the_checkpoint(args):
    model, _ = trained(args)
    saved = torch.load(f"{args.run_dir}/checkpoint.pt", weights_only=True)["model"]
    assert torch.equal(model.score.weight, saved["score.weight"]) and model.config.reward_mean == 0


# --- training and evaluation ---


def test_the_first_loss_logged_is_that_of_the_model_at_the_start_and_an_easy_set_is_learnt(args):
    args.max_steps, args.learning_rate = 20, 5e-3
    main(args)
    run_dir = args.run_dir
    _, model, rows = load(args)
    first = reward_model.batch_at(rows, 0, args.batch_size, args.seed)
    assert scalars(run_dir, "loss")[0] == (1, pytest.approx(held_out_rewards(args, model, first)[0]["loss"], rel=1e-5))
    assert scalars(run_dir, "accuracy")[-1][1] == scalars(run_dir, "eval/accuracy")[-1][1] == 1
    assert scalars(run_dir, "eval/margin")[-1][1] > 2
    assert scalars(run_dir, "eval/loss")[-1][1] < 0.1


def test_micro_batches_give_the_loss_gradient_and_weights_of_the_whole_batch(args, tmp_path):
    args.centering = 0.1
    whole, _ = trained(args)
    args.micro_batch_size, args.run_dir = 2, str(tmp_path / "micro")
    parts, _ = trained(args)
    for tag in ("loss", "accuracy", "margin", "grad_norm"):  # Adam itself forgives a constant factor
        found, expected = ([value for _, value in scalars(tmp_path / run, tag)] for run in ("micro", "run"))
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5), tag
    for a, b in zip(whole.state_dict().values(), parts.state_dict().values()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_with_and_without_a_shared_prompt_a_run_is_the_same(args, tmp_path):
    main(args)
    args.share_prompt, args.run_dir = False, str(tmp_path / "apart")
    main(args)
    for tag in ("loss", "accuracy", "margin", "grad_norm", "eval/loss", "eval/accuracy", "eval/margin"):
        found, expected = ([value for _, value in scalars(tmp_path / run, tag)] for run in ("run", "apart"))
        assert found and found == pytest.approx(expected, rel=1e-4, abs=1e-5), tag


def test_held_out_means_are_those_of_single_pairs_whatever_the_batch(args):
    args.centering, args.batch_size = 0.1, 4
    _, model, rows = load(args)
    rows = [[*row[:3], [0.1 * i]] for i, row in enumerate(rows[:11])]  # 4 does not divide 11
    metrics, mean, std = held_out_rewards(args, model, rows)
    scores, total = [], {"loss": 0.0, "accuracy": 0.0, "margin": 0.0}
    for prompt, chosen, rejected, (margin,) in rows:
        with torch.no_grad():
            both = [rewards(model, torch.tensor([prompt + text]), torch.tensor([len(prompt + text) - 1])).item()
                    for text in (chosen, rejected)]  # fmt: skip
        gap = both[0] - both[1]
        total["loss"] += math.log1p(math.exp(-(gap - margin))) + 0.1 * sum(both) ** 2
        total["accuracy"] += gap > 0
        total["margin"] += gap
        scores += both
    assert metrics == pytest.approx({name: value / 11 for name, value in total.items()}, rel=1e-5, abs=1e-6)
    assert mean == pytest.approx(sum(scores) / 22, rel=1e-5, abs=1e-6)
    assert std == pytest.approx(torch.tensor(scores).std(correction=0).item(), rel=1e-5)


def test_swapping_chosen_and_rejected_negates_the_margin(args):
    _, model, rows = load(args)
    metrics, *_ = held_out_rewards(args, model, rows)
    swapped, *_ = held_out_rewards(args, model, [[prompt, y, x, margin] for prompt, x, y, margin in rows])
    assert metrics["margin"] == pytest.approx(-swapped["margin"], rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(1 - swapped["accuracy"])
    assert metrics["loss"] - swapped["loss"] == pytest.approx(-metrics["margin"], rel=1e-4)  # logσ(h) - logσ(-h) = h


# --- data ---


def test_the_prompt_of_texts_is_all_common_words():
    cases = [  # chosen, rejected: prompt, completions
        ("\n\nHuman: hi\n\nAssistant: I am", "\n\nHuman: hi\n\nAssistant: It is",
         "\n\nHuman: hi\n\nAssistant:", " I am", " It is"),
        ("the good", "the good film", "the", " good", " good film"),
        ("so good", "so goofy", "so", " good", " goofy"),
        ("the good ", "the good film", "the", " good ", " good film"),
        ("Q:\nyes", "Q:\nno", "Q:", "\nyes", "\nno"),
        ("the same", "the same", "the", " same", " same"),
        ("yes", "no", "", "yes", "no"),
    ]  # fmt: skip
    for chosen, rejected, *expected in cases:
        assert [column[0] for column in split_prompt([chosen], [rejected])] == expected


def test_the_prompt_of_messages_is_all_common_ones_but_the_last():
    user, good, bad = ({"role": role, "content": text} for role, text in (("user", "?"), ("assistant", "yes"),
                                                                          ("assistant", "no")))  # fmt: skip
    assert split_prompt([[user, good]], [[user, bad]]) == ([[user]], [[good]], [[bad]])
    assert split_prompt([[user, good, user, bad]], [[user, good]]) == ([[user]], [[good, user, bad]], [[good]])
    assert split_prompt([[user, good, user, bad]], [[user, bad, user, bad]])[0] == [[user]]  # not the equal tail


@pytest.mark.parametrize("make_tokenizer", [tiny.word_tokenizer, tiny.bpe_tokenizer])
def test_implicit_prompts_and_conversations_give_the_rows_of_explicit_ones(make_tokenizer, args, tmp_path):
    tokenizer = make_tokenizer()
    explicit = [
        {"prompt": "the film :", "chosen": " was great .", "rejected": " felt dull ."},
        {"prompt": "review of plot :", "chosen": " not bad . very fine .", "rejected": " the acting ."},
    ]
    for rows in (explicit, [tiny.as_messages(row) for row in explicit]):
        found = []
        for form in ("explicit", "implicit"):
            args.dataset = str(tmp_path / f"{form}.jsonl")
            if form == "implicit":
                rows = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
            tiny.write_jsonl(tmp_path / f"{form}.jsonl", rows)
            found.append(reward_model.load_scored_pairs(args, tokenizer, "train"))
        assert found[0] == found[1]
        for row, texts in zip(found[0], rows):
            if isinstance(texts["chosen"], str):
                assert tokenizer.decode(row[0] + row[1]) == texts["chosen"] + tokenizer.eos_token.replace(
                    "<eos>", " <eos>"
                )


def test_messages_without_a_common_beginning_are_refused_by_row(args, tmp_path, capsys):
    talk = lambda text: [{"role": "user", "content": text}, {"role": "assistant", "content": "."}]  # noqa: E731
    rows = [{"chosen": talk("the"), "rejected": talk("the")}, {"chosen": talk("the"), "rejected": talk("film")}]
    args.dataset = str(tiny.write_jsonl(tmp_path / "talk.jsonl", rows))
    assert "row 2" in refused(capsys, main, args)


def test_margins_stay_with_their_pairs(args, tmp_path, capsys):
    tokenizer, _, rows = load(args)
    assert [row[3] for row in rows] == [[0.0]] * 24  # no such column
    pairs = [row | {"margin": i / 2} for i, row in enumerate(tiny.preferences(6))]
    pairs[2]["prompt"] = "the " * 80  # left out: it fills --max-length
    args.dataset = str(tiny.write_jsonl(tmp_path / "margins.jsonl", pairs))
    rows = reward_model.load_scored_pairs(args, tokenizer, "train")
    assert [row[3] for row in rows] == [[0.0], [0.5], [1.5], [2.0], [2.5]]
    assert margins_of(rows, CPU).tolist() == [0.0, 0.5, 1.5, 2.0, 2.5]

    pairs[3]["margin"] = None
    args.dataset = str(tiny.write_jsonl(tmp_path / "broken.jsonl", pairs))
    message = refused(capsys, reward_model.load_scored_pairs, args, tokenizer, "train")
    assert "row 4, column margin" in message
