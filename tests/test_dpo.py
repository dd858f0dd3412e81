"""dpo.py: its equations against hand numbers, float64 loops and an exact optimum, and what users get wrong."""

import hashlib
import importlib.util
import itertools
import json
import math
from types import SimpleNamespace

import dpo
import pytest
import torch
from helpers import scalars
from tiny import CONFIGS, as_messages, bpe_tokenizer, make_model, preferences, word_tokenizer, write_jsonl
from torch import nn
from transformers import AutoModelForCausalLM

LN2 = math.log(2)
ROWS = [  # prompt, chosen, rejected: unequal in all lengths; 1 is EOS
    [[3, 4, 5], [6, 7, 1], [8, 9, 10, 11, 1]],
    [[12], [13, 14, 15, 16, 1], [17, 1]],
    [[4, 5, 6, 7, 8, 9], [10, 1], [11, 11, 12, 1]],
    [[9, 8], [7, 1], [1]],
]
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is optional")
share = pytest.mark.parametrize("share_prompt", [False, True], ids=["two rows", "shared prompt"])


@pytest.fixture
def world(tmp_path):
    """Args of a run on a tiny model and 32 + 7 pairs, in float32 on the CPU."""
    make_model(tmp_path / "model")
    write_jsonl(tmp_path / "data" / "train.jsonl", preferences(32))
    write_jsonl(tmp_path / "data" / "test.jsonl", preferences(7))

    def args(run_dir="run", **changed) -> dpo.Args:
        folders = {name: str(tmp_path / name) for name in ("model",)}
        defaults = {"dataset": str(tmp_path / "data"), "run_dir": str(tmp_path / run_dir), "device": "cpu"}
        flags = {"max_length": 64, "batch_size": 8, "learning_rate": 1e-3, "max_steps": 6, "save_every": 0}
        return dpo.Args(**folders | defaults | flags | changed)

    return args


def run(args: dpo.Args) -> dict[str, torch.Tensor]:
    """Run the script in this process; the weights of the model that it saved."""
    dpo.main(args)
    return AutoModelForCausalLM.from_pretrained(f"{args.run_dir}/model").state_dict()


def metric(args: dpo.Args, tag: str) -> dict[int, float]:
    """A logged metric by step."""
    return dict(scalars(dpo.Path(args.run_dir), tag))


def loop(model, prompt, completion) -> float:
    """log π(completion | prompt) token by token, in float64."""
    total = 0.0
    for t, token in enumerate(completion):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion[:t]])).logits[0, -1]
        total += torch.log_softmax(logits.double(), 0)[token].item()
    return total


def first_gradient(args: dpo.Args) -> dict[int, torch.Tensor]:
    """The gradient of the first update, from Adam's first moment."""
    dpo.main(args)
    state = torch.load(f"{args.run_dir}/checkpoint.pt")["optimizer"]["state"]
    return {name: moments["exp_avg"] * 10 for name, moments in state.items()}


# --- log-probabilities ---


@share
@pytest.mark.parametrize("arch", CONFIGS)
def test_log_probabilities_equal_a_float64_loop(arch, share_prompt, tmp_path):
    model = make_model(tmp_path, arch)
    found = dpo.pair_logprobs(model, ROWS, share_prompt)
    double = model.double()
    expected = [[loop(double, row[0], row[i]) for row in ROWS] for i in (1, 2)]
    assert torch.allclose(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)


@share
def test_an_empty_prompt_leaves_the_first_token_unscored(share_prompt, tmp_path):
    model = make_model(tmp_path)
    found = dpo.pair_logprobs(model, [[[], [6, 7, 1], [8, 9, 10, 1]], ROWS[0]], share_prompt)
    expected = torch.tensor([loop(model, [6], [7, 1]), loop(model, [8], [9, 10, 1])])
    assert torch.allclose(found[:, 0], expected, rtol=1e-5)


@share
def test_only_logits_that_predict_completion_tokens_get_a_gradient_and_eos_does_when_it_is_the_pad(share_prompt,
                                                                                                   tmp_path):  # fmt: skip
    model = make_model(tmp_path, tokenizer=word_tokenizer(pad="<eos>"))
    kept = []
    model.register_forward_hook(lambda _, __, output: (output.logits.retain_grad(), kept.append(output.logits))[0])
    logprobs = dpo.pair_logprobs(model, ROWS, share_prompt)
    dpo.preference_loss(*logprobs, *torch.zeros(2, 4), 0.1, 0.0, "sigmoid").sum().backward()
    (logits,) = kept
    touched = logits.grad.abs().sum(-1) > 0  # (rows, R): column j predicts the token at position start + j
    start = min(len(prompt) for prompt, *_ in ROWS)
    for i, (prompt, chosen, rejected) in enumerate(ROWS):
        n, c, r = len(prompt), len(chosen), len(rejected)
        if share_prompt:
            expected = {*range(n, n + c), *range(n + c + 1, n + c + r)}
            assert {j + start for j in touched[i].nonzero().flatten().tolist()} == expected
        else:
            for row, length in ((i, c), (i + len(ROWS), r)):
                assert {j + start for j in touched[row].nonzero().flatten().tolist()} == set(range(n, n + length))


@share
def test_padding_does_not_leak_even_when_its_embedding_is_nan(share_prompt, tmp_path):
    model = make_model(tmp_path, "qwen3", tie_word_embeddings=False)
    alone = torch.cat([dpo.pair_logprobs(model, [row], share_prompt) for row in ROWS], 1)
    with torch.no_grad():
        model.get_input_embeddings().weight[model.config.pad_token_id] = math.nan
    wide = [*ROWS, [[3], [4] * 40, [5] * 50]]
    assert torch.allclose(dpo.pair_logprobs(model, wide, share_prompt)[:, :4], alone, rtol=1e-5)


def test_sharing_the_prompt_gives_the_same_gradient(tmp_path):
    model, gradients = make_model(tmp_path), []
    for share_prompt in (False, True):
        model.zero_grad()
        logprobs = dpo.pair_logprobs(model, ROWS, share_prompt)
        dpo.preference_loss(*logprobs, *torch.zeros(2, 4), 0.1, 0.0, "sigmoid").sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


def test_sharing_the_prompt_is_refused_where_a_sliding_window_is_shorter_than_the_rows(tmp_path, capsys):
    dpo.check_share_prompt(dpo.pair_logprobs, make_model(tmp_path / "wide", "mistral", sliding_window=16), ROWS)
    with pytest.raises(SystemExit):
        dpo.check_share_prompt(dpo.pair_logprobs, make_model(tmp_path / "narrow", "mistral", sliding_window=4), ROWS)
    assert "--no-share-prompt" in capsys.readouterr().err


def test_a_shared_row_may_be_longer_than_the_positions_of_the_model(tmp_path):
    model = make_model(tmp_path, "gpt2")  # has 128 positions, a table that padding must not leave
    rows = [[[3] * 10, [4] * 118, [5] * 118], [[3], [4, 1], [5, 1]]]
    shared, apart = (dpo.pair_logprobs(model, rows, share_prompt) for share_prompt in (True, False))
    torch.testing.assert_close(shared, apart, rtol=1e-5, atol=1e-4)


# --- the loss ---


def test_preference_loss_equals_hand_numbers():
    x = [torch.tensor([value]) for value in (-3.0, -5.0, -4.0, -4.5)]  # h = (-3 + 4) - (-5 + 4.5) = 1.5
    assert dpo.preference_loss(*x, 0.2, 0.0, "sigmoid").item() == pytest.approx(math.log(1 + math.exp(-0.3)), rel=1e-6)
    smooth = 0.9 * math.log(1 + math.exp(-0.3)) + 0.1 * math.log(1 + math.exp(0.3))
    assert dpo.preference_loss(*x, 0.2, 0.1, "sigmoid").item() == pytest.approx(smooth, rel=1e-6)
    assert dpo.preference_loss(*x, 0.2, 0.0, "ipo").item() == pytest.approx((1.5 - 2.5) ** 2, rel=1e-6)


def test_swapping_chosen_and_rejected_negates_the_margin():
    logprobs, ref = torch.randn(2, 5), torch.randn(2, 5)
    chosen, rejected = dpo.implicit_rewards(logprobs, ref, 0.3)
    swapped = dpo.implicit_rewards(logprobs.flip(0), ref.flip(0), 0.3)
    assert torch.equal(chosen - rejected, -(swapped[0] - swapped[1]))


def test_label_smoothing_is_that_of_cdpo_whose_gradient_vanishes_where_the_model_says_one_minus_epsilon():
    beta, epsilon = 0.5, 0.2
    h = torch.tensor([math.log((1 - epsilon) / epsilon) / beta], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    dpo.preference_loss(h, zero, zero, zero, beta, epsilon, "sigmoid").backward()
    assert abs(h.grad.item()) < 1e-12


def test_the_loss_stays_finite_and_exact_at_huge_margins():
    h = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
    losses = dpo.preference_loss(h, *torch.zeros(3, 3), 1.0, 0.0, "sigmoid")
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([0.0, 1e4, LN2]) and h.grad.tolist() == pytest.approx([0.0, -1.0, -0.5])


def test_the_margin_doubles_when_every_token_comes_twice():
    logprobs, mask = torch.randn(4, 6), torch.tensor([[1, 1, 1, 0, 0, 0]] * 4).float()
    once, twice = (dpo.sequence_logprobs(x, y).view(2, 2) for x, y in ((logprobs, mask),
                                                                       (logprobs.repeat(1, 2), mask.repeat(1, 2))))  # fmt: skip
    rewards = [dpo.implicit_rewards(x, torch.zeros(2, 2), 0.1) for x in (once, twice)]
    assert torch.allclose(2 * (rewards[0][0] - rewards[0][1]), rewards[1][0] - rewards[1][1])


def test_metrics_are_sums_over_pairs_and_a_tie_is_half_a_success():
    rewards = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 5.0]])
    found = dpo.preference_metrics(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([[-1.0] * 3, [-2.0] * 3]), rewards)
    expected = {"loss": 0.6, "rewards/chosen": 6, "rewards/rejected": 7, "rewards/accuracies": 1.5,
                "rewards/margins": -1, "logps/chosen": -3, "logps/rejected": -6}  # fmt: skip
    assert dict(zip(dpo.METRICS, found.tolist())) == pytest.approx(expected)


class Tabular(nn.Module):
    """A policy over 6 tokens with free logits for each prefix of up to 3 tokens after a prompt of one."""

    device = torch.device("cpu")

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.table = nn.Parameter(scale * torch.randn(1 + 6 + 36 + 216, 6, dtype=torch.float64))

    def forward(self, ids, logits_to_keep, use_cache):
        code, codes = torch.zeros(len(ids), dtype=torch.long), []
        for t in range(ids.shape[1]):
            code = code * 6 + ids[:, t] + 1 if t else code
            codes.append(code.clamp(max=len(self.table) - 1))
        return SimpleNamespace(logits=self.table[torch.stack(codes, 1)[:, -logits_to_keep:]])


def test_on_an_enumerable_world_all_bradley_terry_pairs_lead_to_the_exact_optimum(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)  # float64 throughout
    torch.manual_seed(0)
    ended = [[*words, 0] for n in range(4) for words in itertools.product(range(1, 6), repeat=n)]
    texts = ended + [list(words) for words in itertools.product(range(1, 6), repeat=4)]  # 781, of 1 to 4 tokens
    texts.append(texts[0])  # an even number, in rows of two
    rows = [[[3], a, b] for a, b in zip(texts[::2], texts[1::2])]
    beta, reward = 0.5, 2 * torch.rand(len(texts) - 1, dtype=torch.float64) - 1
    policy = Tabular(scale=0.5)

    def log_policy():
        return dpo.pair_logprobs(policy, rows, share_prompt=False).T.flatten()[:-1]

    log_ref = log_policy().detach()
    assert log_ref.exp().sum().item() == pytest.approx(1)
    log_optimum = torch.log_softmax(log_ref + reward / beta, 0)  # DPO Eq. 4
    wins = torch.sigmoid(reward[:, None] - reward)  # of the row over the column, DPO Eq. 1
    weights = wins * (log_ref[:, None] + log_ref).exp()  # pairs of independent samples of the reference
    optimizer = torch.optim.Adam(policy.parameters(), 0.1)
    start = (log_ref.exp() * (log_ref - log_optimum)).sum().item()
    for step in range(150):
        optimizer.param_groups[0]["lr"] = dpo.scheduled(0.1, step, 150, 0.0, "cosine")
        optimizer.zero_grad()
        x = log_policy()
        losses = dpo.preference_loss(x[:, None], x, log_ref[:, None], log_ref, beta, 0.0, "sigmoid")
        (weights * losses).sum().backward()
        optimizer.step()
    x = log_policy().detach()
    assert start > 0.3 and (x.exp() * (x - log_optimum)).sum().item() < 0.01


# --- the reference ---


@pytest.mark.parametrize(
    "flags",
    [{}, {"online_reference": True}, {"micro_batch_size": 1}, {"share_prompt": False},
     {"online_reference": True, "dtype": "bfloat16"}, pytest.param({"lora_rank": 2}, marks=needs_peft)],
    ids=str,
)  # fmt: skip
def test_the_first_loss_is_ln_2_for_the_weights_in_memory(world, monkeypatch, flags):
    load = dpo.load_pretrained

    def changed_in_memory(loader, *rest, **options):
        model = load(loader, *rest, **options)
        if loader is AutoModelForCausalLM:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.1)
        return model

    monkeypatch.setattr(dpo, "load_pretrained", changed_in_memory)
    args = world(max_steps=1, **flags)
    dpo.main(args)
    exact = 0.0 if args.online_reference else 1e-6
    assert metric(args, "loss")[1] == pytest.approx(LN2, abs=max(exact, 1e-7))  # as float32 is stored
    assert abs(metric(args, "rewards/margins")[1]) <= exact
    assert metric(args, "eval/loss")[0] == pytest.approx(LN2, abs=1e-6)
    if args.online_reference:
        assert metric(args, "eval/rewards/accuracies")[0] == 0.5


def test_dropout_is_off_so_that_policy_and_reference_agree_at_first(world, tmp_path):
    make_model(tmp_path / "model", "gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    args = world(max_steps=1, online_reference=True)
    dpo.main(args)
    assert metric(args, "loss")[1] == pytest.approx(LN2, abs=1e-7) and metric(args, "rewards/margins")[1] == 0


@pytest.mark.parametrize("lora_rank", [0, pytest.param(2, marks=needs_peft)])
def test_stored_and_online_reference_give_the_same_model(world, lora_rank):
    stored = run(world("stored", lora_rank=lora_rank))
    online = run(world("online", lora_rank=lora_rank, online_reference=True))
    for name, value in stored.items():
        assert torch.allclose(value, online[name], atol=2e-5), name
    start = AutoModelForCausalLM.from_pretrained(world().model).state_dict()
    assert any(not torch.allclose(value, start[name], atol=1e-3) for name, value in stored.items())


def test_the_online_reference_ends_as_it_began(world, monkeypatch):
    prepare, seen = dpo.prepare_model, []

    def digest(model):
        return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()

    monkeypatch.setattr(dpo, "prepare_model", lambda *a: seen.append(prepare(*a)) or seen[-1])
    args = world(online_reference=True)
    dpo.main(args)
    policy, reference = seen
    start = AutoModelForCausalLM.from_pretrained(args.model)
    assert digest(reference) == digest(start) != digest(policy)


def test_the_stored_reference_is_that_of_the_model_given(world):
    args = world()
    model = AutoModelForCausalLM.from_pretrained(args.model)
    rows = [list(map(list, row)) for row in ROWS]
    dpo.store_reference(args, model, rows)
    assert torch.allclose(dpo.reference_logprobs(args, model, rows), dpo.pair_logprobs(model, rows, False), rtol=1e-5)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.5)
    again = [list(map(list, row)) for row in ROWS]
    dpo.store_reference(args, model, again)
    assert not torch.allclose(dpo.reference_logprobs(args, model, again), dpo.reference_logprobs(args, model, rows))


@pytest.mark.parametrize(
    "flags", [{}, {"online_reference": True}, pytest.param({"lora_rank": 2}, marks=needs_peft)], ids=str
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(world, flags):
    whole = run(world("whole", **flags))
    saved = {}
    write = dpo.save_checkpoint

    def keep(run_dir, args, **state):
        write(run_dir, args, **state)
        (run_dir / f"{state['step']}.pt").write_bytes((run_dir / "checkpoint.pt").read_bytes())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo, "save_checkpoint", keep)
        dpo.main(world("parts", save_every=3, **flags))
    resumed = world("parts", resume=str(dpo.Path(world("parts").run_dir) / "3.pt"), **flags)
    saved = run(resumed)
    assert all(torch.equal(value, saved[name]) for name, value in whole.items())
    assert metric(resumed, "rewards/margins")[6] != 0


# --- LoRA ---


@needs_peft
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_lora_trains_adapters_only_and_saves_a_plain_model_that_has_them_merged(arch, tmp_path, world, monkeypatch):
    make_model(tmp_path / "model", arch)
    kept = []
    prepare = dpo.prepare_model
    monkeypatch.setattr(dpo, "prepare_model", lambda *a: kept.append(prepare(*a)) or kept[-1])
    args = world(lora_rank=2, learning_rate=0.01)
    dpo.main(args)
    (policy,) = kept
    assert {name.split(".")[-3] for name, p in policy.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    start = AutoModelForCausalLM.from_pretrained(args.model)
    merged = AutoModelForCausalLM.from_pretrained(f"{args.run_dir}/model")
    assert type(merged) is type(start) and merged.state_dict().keys() == start.state_dict().keys()
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, policy(ids).logits, atol=1e-4)
        assert not torch.allclose(merged(ids).logits, start(ids).logits, atol=1e-2)
        with policy.disable_adapter():  # the reference
            assert torch.equal(policy(ids).logits, start(ids).logits)


def test_lora_without_peft_is_refused(world, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    with pytest.raises(SystemExit):
        dpo.main(world(lora_rank=2))
    assert capsys.readouterr().err == "error: --lora-rank needs the package peft\n"


# --- batches ---


@share
def test_micro_batches_of_one_give_the_gradient_of_the_whole_batch(world, share_prompt):
    flags = {"max_steps": 1, "max_grad_norm": math.inf, "share_prompt": share_prompt}
    whole = first_gradient(world("whole", micro_batch_size=8, **flags))
    ones = first_gradient(world("ones", micro_batch_size=1, **flags))
    for name, gradient in whole.items():
        assert (gradient - ones[name]).norm() <= 1e-5 * gradient.norm(), name


def test_evaluate_pairs_do_not_depend_on_the_size_of_the_last_batch(world):
    args = world()
    model = AutoModelForCausalLM.from_pretrained(args.model)
    rows = [list(map(list, row)) for row in [*ROWS, *ROWS[:3]]]
    for row in rows:
        row.append([-20.0, -21.0])
    found = [dpo.evaluate_pairs(world(micro_batch_size=size), model, model, rows) for size in (7, 3, 1)]
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[0] == pytest.approx(found[2], rel=1e-5)


def test_truncation_keeps_a_token_of_each_completion_or_drops_the_pair_with_a_count(capsys):
    rows = dpo.truncate([[[3] * 4, [5] * 6, [6]], [[3] * 9, [5, 1], [6, 1]], [[3], [4], [5]]], 8, "train")
    assert rows == [[[3] * 4, [5] * 4, [6]], [[3], [4], [5]]]
    assert "of 3 rows, 1 were cut to --max-length 8 tokens and 1 left out" in capsys.readouterr().out


# --- data ---


@pytest.mark.parametrize("tokenizer", [word_tokenizer(), bpe_tokenizer()], ids=["words", "bytes"])
def test_implicit_prompts_and_messages_give_the_rows_of_explicit_text(tokenizer, tmp_path):
    def load(name, rows):
        path = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        return dpo.load_pairs(dpo.Args(dataset=str(path)), tokenizer, "train")

    explicit = preferences(6)
    implicit = [{column: row["prompt"] + row[column] for column in ("chosen", "rejected")} for row in explicit]
    found, expected = load("implicit", implicit), load("explicit", explicit)
    for (prompt, *texts), (explicit_prompt, *explicit_texts) in zip(found, expected):
        assert [prompt + ids for ids in texts] == [explicit_prompt + ids for ids in explicit_texts]
        assert prompt[: len(explicit_prompt)] == explicit_prompt  # with the words that both completions begin with

    messages = [as_messages(row) for row in explicit]
    whole = [{column: row["prompt"] + row[column] for column in ("chosen", "rejected")} for row in messages]
    assert load("messages", messages) == load("whole", whole)
    prompt, chosen, _ = load("messages", messages)[0]
    assert tokenizer.decode(chosen).split()[:4] == explicit[0]["chosen"].split()[:4]
    assert chosen[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in chosen[:-1]


@pytest.mark.parametrize(
    "flags,message",
    [
        ({"beta": 0.0}, "--beta must be above 0"),
        ({"beta": -1.0}, "--beta must be at least 0"),
        ({"label_smoothing": 0.6}, "--label-smoothing must be between 0 and 0.5"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "--label-smoothing is for --loss sigmoid"),
        ({"lora_rank": -1}, "--lora-rank must be at least 0"),
        ({"batch_size": 9}, "--batch-size 9 must be a multiple"),
        ({"batch_size": 64}, "--batch-size 64 is more than the 32 rows"),
    ],
    ids=str,
)
def test_bad_flags_are_one_line_and_nothing_is_written(world, capsys, flags, message):
    args = world(**flags)
    with pytest.raises(SystemExit) as stop:
        dpo.main(args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not dpo.Path(args.run_dir).exists()


@pytest.mark.parametrize(
    "row,message",
    [
        ({"prompt": "review", "chosen": "great"}, "dpo.py needs prompt and chosen and rejected, or chosen and rejected"),
        ({"prompt": "review", "chosen": "great", "rejected": " "}, "row 1, column rejected: empty"),
        ({"prompt": "review", "chosen": "great", "rejected": 3}, "column rejected: neither text nor a list"),
        ({"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
          "rejected": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}, "row 1"),
    ],
    ids=["missing column", "empty completion", "a number", "no common prompt"],
)  # fmt: skip
def test_bad_pairs_are_named(tmp_path, capsys, row, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit):
        dpo.load_pairs(dpo.Args(dataset=str(path)), word_tokenizer(), "train")
    assert message in capsys.readouterr().err
