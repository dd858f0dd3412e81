"""grpo.py: advantages within groups, the penalty in the loss, whole runs on tiny models, and rewards in Python."""

import copy
import math
import signal
from collections import Counter
from types import SimpleNamespace

import grpo
import pytest
import replay
import tiny
import torch
from accelerate.state import AcceleratorState
from helpers import scalars, spy_on
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

EOS, CPU = 1, torch.device("cpu")
REWARD = """
def place(prompts, completions, place, **columns):
    assert len(prompts) == len(completions) == len(place)
    return [100.0 * number + len(text.split()) for number, text in zip(place, completions)]

def same(prompts, completions, **columns):
    return [0.1] * len(prompts)

def nan(prompts, completions, **columns):
    return [float("nan")] * len(prompts)
"""


@pytest.fixture(autouse=True)
def fresh_state():
    """Each run in this process has an Accelerator of its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A policy, a reward model, prompts with a number each, and a file of reward functions."""
    root = tmp_path_factory.mktemp("world")
    tiny.make_model(root / "policy")
    reward_model = AutoModelForSequenceClassification.from_pretrained(root / "policy", num_labels=1)
    torch.nn.init.normal_(reward_model.score.weight, std=0.5, generator=torch.Generator().manual_seed(1))
    reward_model.save_pretrained(root / "reward")
    tiny.word_tokenizer().save_pretrained(root / "reward")
    rows = [{"prompt": row["prompt"], "place": i} for i, row in enumerate(tiny.preferences(16))]
    tiny.write_jsonl(root / "data" / "train.jsonl", rows)
    tiny.write_jsonl(root / "data" / "test.jsonl", rows[:5])
    (root / "rewards.py").write_text(REWARD)
    return root


def settings(world, run_dir, **changed):
    """Flags of a short run, as a dictionary."""
    folders = {"model": str(world / "policy"), "reward_model": str(world / "reward"), "dataset": str(world / "data")}
    sizes = {"batch_size": 8, "num_minibatches": 2, "micro_batch_size": 4, "num_epochs": 2, "total_episodes": 16}
    lengths = {"group_size": 4, "response_length": 8, "max_length": 64, "learning_rate": 1e-2}
    return folders | sizes | lengths | {"run_dir": str(run_dir), "device": "cpu"} | changed


def run(args, saved=None):
    """Run the script in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    grpo.main(args, saved)


def train(monkeypatch, world, run_dir, **changed):
    """Run main in this process; returns (arguments, result) of the calls of its functions, by name."""
    names = ("group_advantages", "policy_loss", "kl_penalty", "sample", "completion_logprobs", "batch_at")
    with monkeypatch.context() as patch:
        seen = SimpleNamespace(**{name: spy_on(patch, grpo, name) for name in names})
        run(grpo.Args(**settings(world, run_dir, **changed)))
    return seen


def final(run_dir):
    """Tensors of the final model of a run."""
    return load_file(run_dir / "model" / "model.safetensors")


def same(a, b):
    """Whether two models have the same tensors bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- equations ---


def test_advantages_are_those_of_a_group_by_hand():
    scores = torch.tensor([[1.0, 2.0, 3.0, 6.0], [-1.0, -1.0, -1.0, -1.0]])
    std = math.sqrt((4 + 1 + 0 + 9) / 3)
    plain = grpo.group_advantages(scores, False, False)
    assert plain.tolist() == [[-2, -1, 0, 3], [0, 0, 0, 0]]
    divided = grpo.group_advantages(scores, False, True)
    assert divided[0].tolist() == pytest.approx([x / (std + 1e-4) for x in (-2, -1, 0, 3)], rel=1e-6)
    assert divided[1].tolist() == [0, 0, 0, 0]
    others = grpo.group_advantages(scores, True, False)[0].tolist()  # each less the mean of the other three
    assert others == pytest.approx([1 - 11 / 3, 2 - 10 / 3, 3 - 9 / 3, 6 - 6 / 3], rel=1e-6)


def test_the_penalty_over_draws_of_the_old_policy_is_the_exact_kl_to_the_reference_and_so_is_its_gradient():
    generator = torch.Generator().manual_seed(0)
    logits, old, reference = 2 * torch.randn(3, 6, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    old, reference, policy = (x.log_softmax(-1) for x in (old, reference, logits))
    penalty = grpo.kl_penalty(policy, old, reference)
    exact, other = (policy.exp() * (policy - reference)).sum(), (reference.exp() * (reference - policy)).sum()
    assert (penalty >= 0).all() and abs(exact - other) > 0.02
    mean = (old.exp() * penalty).sum()
    found, expected = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (mean, exact))
    assert mean.item() == pytest.approx(exact.item(), rel=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("score", [0.1, 0.3, 1 / 3])
def test_equal_scores_that_floats_round_give_advantages_of_exactly_0(score):
    assert (grpo.group_advantages(torch.full((1, 8), score), False, True) == 0).all()


@pytest.mark.parametrize("by_std", [True, False])
def test_the_first_gradient_is_that_of_equation_3_written_as_a_loop_over_responses(
    monkeypatch, world, tmp_path, by_std
):
    """At the first step the ratio is 1 and the penalty's gradient 0, so the gradient is Σ share·A·∇log π."""
    changed = {
        "num_minibatches": 1,
        "num_epochs": 1,
        "total_episodes": 8,
        "normalize_by_std": by_std,
        "learning_rate": 1e-6,
    }
    changed["response_length"] = 32  # long enough that some end before
    seen = train(monkeypatch, world, tmp_path, **changed)
    model = AutoModelForCausalLM.from_pretrained(world / "policy").double()
    tokenizer = tiny.word_tokenizer()
    prompts = grpo.load_prompts(str(world / "data"), "train", tokenizer, 56)
    asked = [ids for ids, _ in grpo.batch_at(prompts, 0, 2, 1) for _ in range(4)]
    (answered, responses), = [(args[1], result) for args, result in seen.sample if len(args[1]) == 8]  # fmt: skip
    assert answered == asked
    scores, _, _ = seen.group_advantages[0][0]
    advantages = seen.group_advantages[0][1].flatten().double()
    loss = 0
    for prompt, response, advantage in zip(asked, responses, advantages):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total = logits[range(len(response)), response].sum()
        loss = loss - advantage * total / (len(response) if by_std else 32) / 8
    loss.backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm().item()
    assert scalars(tmp_path, "grad_norm")[0][1] == pytest.approx(norm, rel=1e-4) and scores.shape == (2, 4)


# --- whole runs ---


@pytest.mark.parametrize("micro_batch_size", [4, 1])
def test_before_the_first_step_ratio_and_kl_are_exactly_neutral(monkeypatch, world, tmp_path, micro_batch_size):
    seen = train(monkeypatch, world, tmp_path, micro_batch_size=micro_batch_size, total_episodes=8)
    for (log_ratio, *_), _ in seen.policy_loss[: 4 // micro_batch_size]:
        assert log_ratio.abs().max() <= 2e-6
    assert scalars(tmp_path, "objective/kl") == [(1, 0.0)]


def test_each_prompt_of_a_rollout_is_answered_by_a_group_and_scored_by_its_own_columns(monkeypatch, world, tmp_path):
    flags = {"reward_model": f"{world / 'rewards.py'}:place", "missing_eos_penalty": 0.0, "save_every": 0}
    flags |= {"num_minibatches": 1, "micro_batch_size": 8, "total_episodes": 40}  # both groups in one micro-batch
    seen = train(monkeypatch, world, tmp_path, **flags)
    for update, ((scores, *_), _) in enumerate(seen.group_advantages):
        asked = [row["place"] for _, row in seen.batch_at[update][1]]
        assert (scores // 100).tolist() == [[float(place)] * 4 for place in asked]


def test_advantages_go_with_the_tokens_of_their_own_response(monkeypatch, world, tmp_path):
    flags = {"num_minibatches": 1, "num_epochs": 1, "total_episodes": 8, "micro_batch_size": 1, "save_every": 0}
    flags["response_length"] = 32  # long enough that some end before
    seen = train(monkeypatch, world, tmp_path, **flags)
    found = {}
    for (_, advantages, _), _ in seen.policy_loss:  # one response each
        assert (advantages == advantages[0]).all()
        found[round(advantages[0].item(), 5)] = len(advantages)
    _, expected = seen.group_advantages[0]
    (_, responses), = [call for call in seen.sample if len(call[0][1]) == 8]  # fmt: skip
    lengths = [len(response) for response in responses]
    assert len({*lengths}) > 2
    assert found == {round(a, 5): n for a, n in zip(expected.flatten().tolist(), lengths)}


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_reference_is_the_starting_policy_in_every_rollout(monkeypatch, world, tmp_path, lora_rank):
    flags = {"num_minibatches": 1, "num_epochs": 1, "micro_batch_size": 1, "total_episodes": 24}
    seen = train(monkeypatch, world, tmp_path, lora_rank=lora_rank, **flags)
    model = AutoModelForCausalLM.from_pretrained(world / "policy")
    (_, rows, _), _ = [call for call in seen.completion_logprobs if call[1][0].requires_grad][-1]  # in training
    with torch.no_grad():
        expected = grpo.completion_logprobs(model, rows, CPU)[0][0]
    (logprobs, _, ref_logprobs), _ = seen.kl_penalty[-1]
    torch.testing.assert_close(ref_logprobs, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logprobs, ref_logprobs, atol=1e-3)


def test_groups_of_equal_scores_are_counted_and_teach_nothing(monkeypatch, world, tmp_path):
    flags = {"reward_model": f"{world / 'rewards.py'}:same", "missing_eos_penalty": 0.0, "kl_coef": 0.0}
    train(monkeypatch, world, tmp_path, **flags)
    assert [value for _, value in scalars(tmp_path, "frac_reward_zero_std")] == [1.0, 1.0]
    assert same(final(tmp_path), load_file(world / "policy" / "model.safetensors"))


def test_the_penalty_holds_the_policy_near_the_reference(monkeypatch, world, tmp_path):
    for beta in (0.0, 20.0):
        train(monkeypatch, world, tmp_path / str(beta), kl_coef=beta, total_episodes=80, learning_rate=3e-3)
    free, held = (scalars(tmp_path / name, "objective/kl")[-1][1] for name in ("0.0", "20.0"))
    assert held < 0.5 * free


def test_a_reward_that_is_not_a_number_ends_the_run(world, tmp_path):
    with pytest.raises(SystemExit, match="nan or inf; the first prompt is 'the film"):
        run(grpo.Args(**settings(world, tmp_path, reward_model=f"{world / 'rewards.py'}:nan")))


def test_held_out_prompts_are_scored_at_every_evaluation(monkeypatch, world, tmp_path):
    train(monkeypatch, world, tmp_path, save_every=1, reward_model=f"{world / 'rewards.py'}:place")
    values = dict(scalars(tmp_path, "eval/scores"))
    assert list(values) == [0, 1, 2] and all(200 <= value < 220 for value in values.values())  # places 0 to 4


def test_micro_batches_add_up_to_the_whole_batch(monkeypatch, world, tmp_path):
    changed = {"num_minibatches": 1, "num_epochs": 1, "total_episodes": 8}
    for size in (8, 1):
        train(monkeypatch, world, tmp_path / str(size), micro_batch_size=size, **changed)
    for tag in ("grad_norm", "loss/policy", "loss/kl"):
        one, eight = (scalars(tmp_path / size, tag)[0][1] for size in ("1", "8"))
        assert one == pytest.approx(eight, rel=1e-4, abs=1e-5), tag


def test_the_baseline_is_that_of_the_flag(monkeypatch, world, tmp_path):
    for baseline in ("group", "leave-one-out"):
        seen = train(monkeypatch, world, tmp_path / baseline, baseline=baseline, total_episodes=8)
        (scores, *flags), _ = seen.group_advantages[0]
        assert flags == [baseline == "leave-one-out", True] and scores.shape == (2, 4)


@pytest.mark.parametrize(
    "changed",
    [{"group_size": 1}, {"group_size": 3}, {"num_minibatches": 3}, {"kl_coef": -1.0}, {"max_length": 8}, {"total_episodes": 7}],
    ids=str,
)  # fmt: skip
def test_flags_that_cannot_work_are_refused(world, tmp_path, changed):
    with pytest.raises(ValueError, match="must be"):
        grpo.Args(**settings(world, tmp_path, **changed))


# --- the whole again, in short ---


def plain_grpo(policy, updates):
    """GRPO over the rows of each update and its minibatches, one response at a time; what each update logs."""
    reference, optimizer, logged = copy.deepcopy(policy), torch.optim.Adam(policy.parameters()), []
    for step, (rows, minibatches) in enumerate(updates):
        old, ref = ({row: replay.logprobs(model, *row).detach() for row in rows} for model in (policy, reference))
        scores = torch.tensor([replay.score(response) for _, response in rows])
        groups = scores.view(-1, 4)
        advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        advantages = dict(zip(rows, advantages.flatten().tolist()))
        log = {
            "objective/kl": sum((old[row] - ref[row]).sum().item() for row in rows) / len(rows),
            "objective/entropy": -sum(old[row].sum().item() for row in rows) / len(rows),
            "objective/scores": scores.mean().item(),
            "val/num_eos_tokens": sum(response[-1] in replay.STOPS for _, response in rows) / len(rows),
            "frac_reward_zero_std": sum(len({*group.tolist()}) == 1 for group in groups) / len(groups),
            "lr": replay.LEARNING_RATE * (1 - step / len(updates)),
        }
        optimizer.param_groups[0]["lr"] = log["lr"]
        sums = Counter()
        for minibatch in minibatches:
            loss, tokens = 0, sum(len(response) for _, response in minibatch)
            for row in minibatch:
                now = replay.logprobs(policy, *row)
                log_ratio, to_ref = now - old[row], ref[row] - now
                gain = replay.clipped(log_ratio, advantages[row])
                kl = log_ratio.exp() * (to_ref.exp() - to_ref - 1)
                loss = loss - (gain - replay.BETA * kl).mean() / len(minibatch)
                sums["loss/policy"] -= gain.sum().item() / tokens
                sums["loss/kl"] += kl.sum().item() / tokens
                sums["policy/approxkl"] += (log_ratio.exp() - 1 - log_ratio).sum().item() / tokens
            optimizer.zero_grad()
            loss.backward()
            sums["grad_norm"] += torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0).item()
            optimizer.step()
        logged.append(log | {name: value / len(minibatches) for name, value in sums.items()})
    return logged


def test_two_updates_are_those_of_a_plain_second_version(monkeypatch, tmp_path):
    flags, prompts = replay.make_world(tmp_path, prompts=8, batch_size=16)
    seen = train(monkeypatch, tmp_path, tmp_path / "run", **flags, num_epochs=replay.EPOCHS)
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "model").double()
    policy = copy.deepcopy(start)
    logged = plain_grpo(policy, replay.rollouts(seen, 16, prompts))
    for name in logged[0]:
        values = [value for _, value in scalars(tmp_path / "run", name)]
        assert values == pytest.approx([log[name] for log in logged], rel=1e-4, abs=1e-5), name
    assert replay.distance(final(tmp_path / "run"), policy, start) < 1e-3
    saved = GenerationConfig.from_pretrained(tmp_path / "run" / "model")
    assert {*saved.eos_token_id} == replay.STOPS and saved.temperature == 0.5  # the model's own, with all stops
