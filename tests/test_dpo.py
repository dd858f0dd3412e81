"""dpo.py: its equations against hand numbers, float64 loops and an exact optimum, and what users get wrong."""

import itertools
import json
import math
import signal
import sys
from types import SimpleNamespace

import dpo
import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import scalars, spy_on
from safetensors.torch import load_file
from tiny import CONFIGS, as_messages, bpe_tokenizer, make_model, preferences, word_tokenizer, write_jsonl
from torch import nn
from transformers import AutoModelForCausalLM

LN2 = math.log(2)
CPU = torch.device("cpu")
ROWS = [  # prompt, chosen, rejected: unequal in all lengths; 1 is EOS
    [[3, 4, 5], [6, 7, 1], [8, 9, 10, 11, 1]],
    [[12], [13, 14, 15, 16, 1], [17, 1]],
    [[4, 5, 6, 7, 8, 9], [10, 1], [11, 11, 12, 1]],
    [[9, 8], [7, 1], [1]],
]


@pytest.fixture(autouse=True)
def fresh_state():
    """Each run in this process has an Accelerator of its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture
def world(tmp_path):
    """Args of a run on a tiny model and 32 + 7 pairs, in float32 on the CPU."""
    make_model(tmp_path / "model")
    write_jsonl(tmp_path / "data" / "train.jsonl", preferences(32))
    write_jsonl(tmp_path / "data" / "test.jsonl", preferences(7))

    def args(run_dir="run", **changed) -> dpo.Args:
        defaults = {"model": str(tmp_path / "model"), "dataset": str(tmp_path / "data"), "device": "cpu"}
        flags = {"run_dir": str(tmp_path / run_dir), "max_length": 64, "batch_size": 8, "learning_rate": 1e-3}
        return dpo.Args(**defaults | flags | {"max_steps": 6, "save_every": 0} | changed)

    return args


def run(args: dpo.Args, saved=None) -> dict[str, torch.Tensor]:
    """Run the script in this process; the weights that it saved."""
    AcceleratorState._reset_state(reset_partial_state=True)
    dpo.main(args, saved)
    (file,) = dpo.Path(args.run_dir, "model").glob("*.safetensors")
    return load_file(file)


def resume(monkeypatch, path, *flags):
    """Run the script as `dpo.py --resume path flags` in this process; the weights that it saved."""
    monkeypatch.setattr(sys, "argv", ["dpo.py", "--resume", str(path), *map(str, flags)])
    return run(*dpo.parse_args())


def rewind(run_dir, step):
    """Make an older checkpoint of a run the one it resumes from."""
    path = run_dir / "checkpoint" / "state.json"
    state = json.loads(path.read_text())
    state["step"] = step
    path.write_text(json.dumps(state))


def metric(args: dpo.Args, tag: str) -> dict[int, float]:
    """A logged metric by step."""
    return dict(scalars(dpo.Path(args.run_dir), tag))


def same(a, b) -> bool:
    """Whether two models have the same tensors bit for bit."""
    if a.keys() != b.keys():
        return False
    return all(torch.equal(a[name], b[name]) for name in a)


def loop(model, prompt, completion) -> float:
    """log π(completion | prompt) token by token, in float64."""
    total = 0.0
    for t, token in enumerate(completion):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion[:t]])).logits[0, -1]
        total += torch.log_softmax(logits.double(), 0)[token].item()
    return total


def first_gradient(args: dpo.Args) -> dict[int, torch.Tensor]:
    """The gradient of the first update, clipped, from Adam's first moment."""
    run(args)
    state = torch.load(f"{args.run_dir}/checkpoint/1/optimizer.bin", weights_only=True)["state"]
    return {name: moments["exp_avg"] * 10 for name, moments in state.items()}


def losses(h, beta=1.0, eps=0.0, loss="sigmoid"):
    """Losses of pairs with h = log π/π_ref of chosen less rejected."""
    logprobs = torch.stack([h, torch.zeros_like(h)])
    return dpo.preference_loss(logprobs, torch.zeros_like(logprobs), beta, eps, loss)["loss"]


# --- log-probabilities ---


@pytest.mark.parametrize("arch", CONFIGS)
def test_log_probabilities_equal_a_float64_loop(arch, tmp_path):
    model = make_model(tmp_path, arch)
    found = dpo.pair_logprobs(model, ROWS, CPU)
    double = model.double()
    expected = [[loop(double, row[0], row[i]) for row in ROWS] for i in (1, 2)]
    assert torch.allclose(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_an_empty_prompt_leaves_the_first_token_unscored(tmp_path):
    model = make_model(tmp_path)
    without_prompt = [[], [6, 7, 1], [8, 9, 10, 1]]
    found = dpo.pair_logprobs(model, [without_prompt, ROWS[0]], CPU)
    chosen = loop(model, [6], [7, 1])
    rejected = loop(model, [8], [9, 10, 1])
    assert torch.allclose(found[:, 0], torch.tensor([chosen, rejected]), rtol=1e-5)


def test_only_logits_that_predict_completion_tokens_get_a_gradient_and_eos_does_when_it_is_the_pad(tmp_path):
    model = make_model(tmp_path, tokenizer=word_tokenizer(pad="<eos>"))
    kept = []

    def keep_gradient(module, inputs, output):
        output.logits.retain_grad()
        kept.append(output.logits)

    model.register_forward_hook(keep_gradient)
    pairs = [[prompt, chosen] for prompt, chosen, _ in ROWS]
    pairs += [[prompt, rejected] for prompt, _, rejected in ROWS]
    logprobs, _ = dpo.completion_logprobs(model, pairs, CPU)
    logprobs = logprobs.sum(1).view(2, -1)
    dpo.preference_loss(logprobs, torch.zeros(2, 4), 0.1, 0.0, "sigmoid")["loss"].sum().backward()
    (logits,) = kept
    touched = logits.grad.abs().sum(-1) > 0  # (rows, R): column j predicts the token at position start + j
    start = min(len(prompt) for prompt, _ in pairs)
    for (prompt, text), is_touched in zip(pairs, touched, strict=True):
        places = start + is_touched.nonzero().flatten()
        assert places.tolist() == [*range(len(prompt), len(prompt) + len(text))]


def test_padding_does_not_leak_even_when_its_embedding_is_nan(tmp_path):
    model = make_model(tmp_path, "qwen3", tie_word_embeddings=False)
    alone = torch.cat([dpo.pair_logprobs(model, [row], CPU) for row in ROWS], 1)
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = math.nan
    wide = [*ROWS, [[3], [4] * 40, [5] * 50]]
    assert torch.allclose(dpo.pair_logprobs(model, wide, CPU)[:, :4], alone, rtol=1e-5)


# --- the loss ---


def test_preference_loss_equals_hand_numbers():
    logprobs = torch.tensor([[-3.0], [-5.0]])  # h = (-3 + 4) - (-5 + 4.5) = 1.5
    ref = torch.tensor([[-4.0], [-4.5]])
    found = dpo.preference_loss(logprobs, ref, 0.2, 0.0, "sigmoid")
    right = math.log(1 + math.exp(-0.3))
    wrong = math.log(1 + math.exp(0.3))
    assert found["loss"].item() == pytest.approx(right, rel=1e-6)
    rewards = {"rewards/chosen": 0.2, "rewards/rejected": -0.1, "rewards/margins": 0.3, "rewards/accuracies": 1.0}
    assert {name: found[name].item() for name in rewards} == pytest.approx(rewards)
    assert found["logps/chosen"].item() == -3
    assert found["logps/rejected"].item() == -5
    smooth = dpo.preference_loss(logprobs, ref, 0.2, 0.1, "sigmoid")
    assert smooth["loss"].item() == pytest.approx(0.9 * right + 0.1 * wrong, rel=1e-6)
    for h, expected in ((1.5, 1.0), (4.0, 2.25), (-0.5, 9.0)):  # (h - 2.5)²
        assert losses(torch.tensor([h]), 0.2, loss="ipo").item() == pytest.approx(expected, rel=1e-6)


def test_swapping_chosen_and_rejected_negates_the_margin_and_a_tie_is_half_a_success():
    logprobs = torch.randn(2, 5)
    ref = torch.randn(2, 5)
    found = dpo.preference_loss(logprobs, ref, 0.3, 0.0, "sigmoid")
    swapped = dpo.preference_loss(logprobs.flip(0), ref.flip(0), 0.3, 0.0, "sigmoid")
    tie = dpo.preference_loss(ref, ref, 0.3, 0.0, "sigmoid")
    assert torch.equal(found["rewards/margins"], -swapped["rewards/margins"])
    assert tie["rewards/accuracies"].tolist() == [0.5] * 5


def test_label_smoothing_is_that_of_cdpo_whose_gradient_vanishes_where_the_model_says_one_minus_epsilon():
    h = torch.tensor([math.log(0.8 / 0.2) / 0.5], dtype=torch.float64, requires_grad=True)
    losses(h, 0.5, 0.2).backward()
    assert abs(h.grad.item()) < 1e-12


def test_the_loss_stays_finite_and_exact_at_huge_margins():
    h = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
    found = losses(h)
    found.sum().backward()
    assert found.tolist() == pytest.approx([0.0, 1e4, LN2])
    assert h.grad.tolist() == pytest.approx([0.0, -1.0, -0.5])


class Tabular(nn.Module):
    """A policy over 6 tokens with free logits for each prefix of up to 3 tokens after a prompt of one."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        logits = torch.randn(1 + 6 + 36 + 216, 6, dtype=torch.float64)
        self.table = nn.Parameter(scale * logits)

    def forward(self, ids, logits_to_keep, use_cache):
        code = torch.zeros(len(ids), dtype=torch.long)
        codes = []
        for t in range(ids.shape[1]):
            code = code * 6 + ids[:, t] + 1 if t else code
            codes.append(code.clamp(max=len(self.table) - 1))
        codes = torch.stack(codes[-logits_to_keep:], 1)
        return SimpleNamespace(logits=self.table[codes])


def test_on_an_enumerable_world_all_bradley_terry_pairs_lead_to_the_exact_optimum(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)  # float64 throughout
    torch.manual_seed(0)
    texts = []  # 781, of 1 to 4 tokens
    for n in range(4):
        texts += [[*words, 0] for words in itertools.product(range(1, 6), repeat=n)]
    texts += [list(words) for words in itertools.product(range(1, 6), repeat=4)]
    texts.append(texts[0])  # an even number, in rows of two
    prompt = [3]
    rows = [[prompt, a, b] for a, b in zip(texts[::2], texts[1::2])]
    beta = 0.5
    reward = 2 * torch.rand(len(texts) - 1, dtype=torch.float64) - 1
    policy = Tabular(scale=0.5)

    def log_policy():
        return dpo.pair_logprobs(policy, rows, CPU).T.flatten()[:-1]

    log_ref = log_policy().detach()
    assert log_ref.exp().sum().item() == pytest.approx(1)
    log_optimum = torch.log_softmax(log_ref + reward / beta, 0)  # DPO Eq. 4
    wins = torch.sigmoid(reward[:, None] - reward)  # of the row over the column, DPO Eq. 1
    weights = wins * (log_ref[:, None] + log_ref).exp()  # pairs of independent samples of the reference
    optimizer = torch.optim.Adam(policy.parameters(), 0.1)
    start = (log_ref.exp() * (log_ref - log_optimum)).sum().item()
    for step in range(150):
        share = (1 + math.cos(math.pi * step / 150)) / 2
        optimizer.param_groups[0]["lr"] = 0.1 * share
        optimizer.zero_grad()
        h = log_policy() - log_ref
        (weights * losses(h[:, None] - h, beta)).sum().backward()
        optimizer.step()
    x = log_policy().detach()
    assert start > 0.3
    assert (x.exp() * (x - log_optimum)).sum().item() < 0.01


# --- runs ---


@pytest.mark.parametrize(
    "flags",
    [{}, {"micro_batch_size": 1}, {"batch_size": 7, "micro_batch_size": 3}, {"lora_rank": 2}, {"bf16": True}],
    ids=str,
)
def test_the_first_loss_is_ln_2_for_the_weights_in_memory(world, monkeypatch, flags):
    load = dpo.load_model

    def changed_in_memory(*given):
        model, tokenizer = load(*given)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        return model, tokenizer

    monkeypatch.setattr(dpo, "load_model", changed_in_memory)
    args = world(max_steps=1, **flags)
    run(args)
    assert metric(args, "loss")[1] == pytest.approx(LN2, abs=1e-6)
    assert metric(args, "eval/loss")[0] == pytest.approx(LN2, abs=1e-6)
    assert metric(args, "rewards/margins")[1] == 0
    assert metric(args, "rewards/accuracies")[1] == 0.5 == metric(args, "eval/rewards/accuracies")[0]


def test_dropout_is_off_so_that_policy_and_reference_agree_at_first(world, tmp_path):
    make_model(tmp_path / "model", "gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    args = world(max_steps=1)
    run(args)
    assert metric(args, "loss")[1] == pytest.approx(LN2, abs=1e-5)


def test_training_raises_the_margin_and_logs_the_first_update_and_every_tenth(world):
    args = world(max_steps=12, eval_every=4, micro_batch_size=4)
    run(args)
    assert list(metric(args, "loss")) == [1, 10, 12]
    assert list(metric(args, "eval/loss")) == [0, 4, 8, 12]
    assert metric(args, "eval/rewards/margins")[12] > 0.1
    assert json.loads((dpo.Path(args.run_dir) / "args.json").read_text())["max_steps"] == 12
    first, tenth, last = metric(args, "learning_rate").values()  # after a warm-up of 2 updates, a cosine over 10
    assert first == pytest.approx(1e-3 / 2, rel=1e-5)
    assert tenth == pytest.approx(1e-3 * (1 + math.cos(math.pi * 7 / 10)) / 2, rel=1e-5)
    assert last == pytest.approx(1e-3 * (1 + math.cos(math.pi * 9 / 10)) / 2, rel=1e-5)


def test_logged_losses_are_means_over_the_interval(world):
    each = world("each", max_steps=4, save_every=1)  # what is saved is logged
    run(each)
    together = world("together", max_steps=4)
    run(together)
    one = metric(each, "loss")
    mean = (one[2] + one[3] + one[4]) / 3
    assert metric(together, "loss")[4] == pytest.approx(mean, rel=1e-5)


def test_the_gradient_is_clipped_to_norm_one(world):
    args = world(max_steps=1, beta=20.0)
    gradient = torch.cat([tensor.flatten() for tensor in first_gradient(args).values()])
    assert gradient.norm().item() == pytest.approx(1, rel=1e-3)
    assert metric(args, "grad_norm")[1] > 2


@pytest.mark.parametrize("flags", [{}, {"micro_batch_size": 4}], ids=str)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(world, monkeypatch, tmp_path, flags):
    whole = run(world("whole", **flags))
    with monkeypatch.context() as patch:
        patch.setattr(dpo.shutil, "rmtree", lambda *_, **__: None)  # older checkpoints stay
        assert same(run(world("parts", save_every=3, **flags)), whole)
    rewind(tmp_path / "parts", 3)
    assert same(resume(monkeypatch, tmp_path / "parts"), whole)
    assert list(scalars(tmp_path / "parts", "loss"))[-1][0] == 6


@pytest.mark.parametrize(
    "flags", [{"beta": 0.25}, {"loss": "ipo"}, {"label_smoothing": 0.1}, {"beta": 2.0, "loss": "ipo"}], ids=str
)
def test_the_loss_of_a_run_is_the_one_that_the_flags_name(world, monkeypatch, flags):
    calls = spy_on(monkeypatch, dpo, "preference_loss")
    args = world(max_steps=2, save_every=1, **flags)
    run(args)
    assert {(call.beta, call.eps, call.loss) for call in calls} == {(args.beta, args.label_smoothing, args.loss)}
    last = calls[-1]
    chosen, rejected = last.logprobs - last.ref_logprobs
    expected = losses(chosen - rejected, args.beta, args.label_smoothing, args.loss)
    assert torch.allclose(last.result["loss"], expected)
    assert last.result["loss"].shape == chosen.shape


def test_every_pair_has_the_log_probabilities_of_the_reference_also_in_later_epochs(world, monkeypatch, tmp_path):
    calls = spy_on(monkeypatch, dpo, "preference_loss")
    pairs = spy_on(monkeypatch, dpo, "pair_logprobs")
    run(world(batch_size=7, micro_batch_size=3, max_steps=12, eval_split=""))  # an epoch of 32 leaves out 4
    start, _ = dpo.load_model(AutoModelForCausalLM, str(tmp_path / "model"), 64)
    trained = [pair.rows for pair in pairs if pair.result.requires_grad]
    assert len(trained) == len(calls) == 36  # three parts of each batch
    for rows, call in zip(trained, calls):
        assert torch.allclose(call.ref_logprobs, dpo.pair_logprobs(start, rows, CPU), atol=1e-4)


# --- models ---


def test_a_saved_adapter_as_model_is_the_merged_model(world, tmp_path):
    merged = run(world(lora_rank=2, learning_rate=0.01))
    model, _ = dpo.load_model(AutoModelForCausalLM, str(tmp_path / "run" / "adapter"), 64)
    found = model.state_dict()
    for name, value in merged.items():
        assert torch.allclose(found[name], value, atol=1e-6), name


# --- data ---


def test_pairs_whose_longer_texts_are_alike_go_together():
    pairs = [[[1], [2] * 9, [3]], [[1], [2] * 5, [3] * 6], [[1], [2] * 2, [3] * 8]]
    assert dpo.micro_batches(pairs, [0, 1, 2], 1, 1) == [[1], [2], [0]]


@pytest.mark.parametrize("tokenizer", [word_tokenizer(), bpe_tokenizer()], ids=["words", "bytes"])
@pytest.mark.parametrize("change", [lambda row: row, as_messages], ids=["texts", "messages"])
def test_an_implicit_prompt_gives_the_token_ids_of_an_explicit_one(tokenizer, change, tmp_path):
    def load(name, rows):
        return dpo.load_rows(str(write_jsonl(tmp_path / f"{name}.jsonl", rows)), "train", tokenizer, 64)

    explicit = [change(row) for row in preferences(6)]
    implicit = [{column: row["prompt"] + row[column] for column in ("chosen", "rejected")} for row in explicit]
    repeated = [row | wholes for row, wholes in zip(explicit, implicit)]  # completions that repeat their prompt
    expected = load("explicit", explicit)
    assert load("repeated", repeated) == expected
    for (prompt, *texts), (explicit_prompt, *explicit_texts) in zip(load("implicit", implicit), expected):
        assert [prompt + ids for ids in texts] == [explicit_prompt + ids for ids in explicit_texts]
        assert prompt[: len(explicit_prompt)] == explicit_prompt
        assert texts[0][0] != texts[1][0] or prompt == explicit_prompt  # texts part where they differ, chats at a turn
    assert expected[0][1][-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in expected[0][1][:-1]


def test_a_text_prompt_before_conversations_is_the_users_turn_as_in_ultrafeedback_binarized(tmp_path):
    user = {"role": "user", "content": "review of plot :"}
    says = lambda text: {"role": "assistant", "content": text}
    tokenizer = word_tokenizer()
    plain = {"prompt": [user], "chosen": [says("great .")], "rejected": [says("dull .")]}
    h4 = {
        "prompt": "review of plot :",
        "chosen": [user, says("great .")],
        "rejected": [user, says("dull .")],
        "score": 8,
    }
    expected = dpo.load_rows(str(write_jsonl(tmp_path / "plain.jsonl", [plain])), "train", tokenizer, 64)
    assert dpo.load_rows(str(write_jsonl(tmp_path / "h4.jsonl", [h4])), "train", tokenizer, 64) == expected


@pytest.mark.parametrize(
    "flags",
    [{"beta": 0.0}, {"label_smoothing": 0.6}, {"label_smoothing": 0.1, "loss": "ipo"}, {"lora_rank": -1}],
    ids=str,
)  # fmt: skip
def test_flags_that_cannot_work_are_refused(world, flags):
    with pytest.raises(ValueError, match="must (be|lie)"):
        world(**flags)
