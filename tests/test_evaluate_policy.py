"""benchmark/world/evaluate_policy.py: KL by hand, the reference judged by itself, the command line."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import run as benchmark
from world import ASSETS, evaluate_policy, frontier

SFT = ASSETS / "sft"
REWARD = ASSETS / "reward"
PROMPT = "review of silent river , a drama , on acting and music :"
RESPONSES = [("the acting was good . i loved the superb music .", True), ("the acting was", False)]


def evaluate(*args):
    """Call run.py evaluate, which must succeed."""
    assert benchmark.main(["evaluate", *map(str, args)]) == 0


def test_log_probabilities_are_those_of_each_response_alone_with_its_end_if_it_has_one():
    tokenizer = AutoTokenizer.from_pretrained(SFT)
    model = AutoModelForCausalLM.from_pretrained(SFT).eval()
    by_hand = []
    for text, finished in RESPONSES:
        prompt = tokenizer(PROMPT).input_ids
        ids = prompt + tokenizer(text).input_ids + [tokenizer.eos_token_id] * finished
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total = 0.0
        for i in range(len(prompt), len(ids)):
            total += logprobs[i - 1, ids[i]].item()
        by_hand.append(total)
    found = evaluate_policy.sequence_logprobs(model, tokenizer, [PROMPT] * 2, RESPONSES)
    assert found == pytest.approx(by_hand, rel=1e-5)


def test_proxy_scores_are_those_of_each_text_alone():
    tokenizer = AutoTokenizer.from_pretrained(REWARD)
    scorer = AutoModelForSequenceClassification.from_pretrained(REWARD).eval()
    responses = [*RESPONSES, ("the acting was awful . i hated the dreadful music .", True)]
    all_three = evaluate_policy.proxy_scores(scorer, tokenizer, [PROMPT] * 3, responses)
    alone = [evaluate_policy.proxy_scores(scorer, tokenizer, [PROMPT], [response])[0] for response in responses]
    assert all_three == pytest.approx(alone, abs=1e-5)
    assert all_three[0] > all_three[2] + 1


@pytest.mark.parametrize(
    "response,faulty",
    [
        (RESPONSES[0], False),
        (("the acting was good . i loved the dull music .", True), False),  # odd, but understood
        ((RESPONSES[0][0], False), True),  # no end
        (("the acting was good .", True), True),  # too short
        (("the music was good . the acting was good .", True), True),  # off topic
    ],
)
def test_faulty_is_what_the_gold_reward_charges_beside_sentiment(response, faulty):
    assert evaluate_policy.is_faulty(PROMPT, response) == faulty


def test_the_reference_reaches_no_share_at_no_kl(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "args.json").write_text(json.dumps({"kl_coef": 0.5}))
    (run / "model").symlink_to(SFT)
    flags = ["--prompts", 300, "--reference-samples", 1000, "--golds", tmp_path / "golds.json"]
    evaluate(run, *flags, "--json", tmp_path / "figures.json", "--picture", tmp_path / "picture.png")
    (row,) = json.loads((tmp_path / "figures.json").read_text())
    assert (row["script"], row["beta"]) == ("rlhf_ppo", 0.5)
    assert row["kl"] == 0
    assert row["share"] == pytest.approx(0, abs=0.25)
    assert row["proxy"] == pytest.approx(0, abs=0.3)
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    capsys.readouterr()
    evaluate(SFT, *flags, "--beta", 0.5)  # a model folder, with stored reference samples
    said = capsys.readouterr()
    assert said.out.count("share") == 1
    assert "samples of the policy" in said.err  # a bar
    known = ["--golds", tmp_path / "golds.json", "--json", tmp_path / "figures.json"]
    evaluate(*known, "--picture", tmp_path / "again.png")  # nothing is evaluated
    assert capsys.readouterr().out == f"wrote {tmp_path / 'again.png'}\n"
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "picture.png").read_bytes()


@pytest.mark.parametrize(
    "flags, script",
    [
        ({"beta": 0.5}, "dpo"),
        ({"kl_coef": 0.5}, "rlhf_ppo"),
        ({"kl_coef": 0.5, "group_size": 8, "kl_in": "loss"}, "grpo"),
        ({"kl_coef": 0.5, "group_size": 8, "kl_in": "reward"}, "grpo --kl-in reward"),
    ],
)
def test_the_script_of_a_run_is_known_by_its_flags(flags, script, tmp_path):
    (tmp_path / "args.json").write_text(json.dumps(flags))
    assert evaluate_policy.setting_of(tmp_path, None) == (script, 0.5)


def test_the_flag_of_a_line_stands_behind_the_name_of_its_file():
    assert frontier.file_of("dpo") == "dpo.py"
    assert frontier.file_of("grpo --kl-in reward") == "grpo.py --kl-in reward"


def test_a_model_without_beta_is_refused_in_one_line(capsys):
    assert benchmark.main(["evaluate", str(SFT)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "give --beta" in message


def test_without_policies_or_figures_there_is_nothing_to_do(capsys):
    assert benchmark.main(["evaluate"]) == 2
    assert capsys.readouterr().err.startswith("error: name policies to evaluate")
