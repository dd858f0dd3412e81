"""grpo.py: advantages within groups, the penalty in the loss or off the score, and whole runs on tiny models.

What it shares with rlhf_ppo.py is in test_rollouts.py.
"""

import copy
import itertools
import math
from collections import Counter
from statistics import fmean

import grpo
import pytest
import replay
import rollouts
import tiny
import torch
from helpers import scalars
from rollouts import final, rows_of, same
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

REWARD = """
def place(prompts, completions, place, **columns):
    return [100.0 * number + len(text.split()) for number, text in zip(place, completions)]

def same(prompts, completions, **columns):
    return [0.1] * len(prompts)
"""


@pytest.fixture(autouse=True)
def fresh_state():
    """Each run in this process has an Accelerator of its own."""
    yield
    rollouts.reset_state()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models, numbered prompts, and a file of reward functions."""
    folder = rollouts.make_world(tmp_path_factory.mktemp("world"))
    (folder / "rewards_by_place.py").write_text(REWARD)
    return folder


SPIED = (  # functions of the script
    "group_advantages",
    "policy_loss",
    "kl_penalty",
    "response_logprobs",
    "batch_at",
    "micro_batches",
    "load_prompts",
)


@pytest.fixture
def train(monkeypatch, world, tmp_path):
    """Run main in this process; the calls of its functions."""

    def train(run_dir=tmp_path, **changed):
        flags = rollouts.flags_of(world, "grpo", run_dir, **changed)
        return rollouts.train(monkeypatch, "grpo", flags, SPIED)

    return train


def function(world, name):
    """A flag that makes a function of REWARD the reward."""
    return f"{world / 'rewards_by_place.py'}:{name}"


# --- equations ---


def test_advantages_are_those_of_a_group_by_hand():
    scores = torch.tensor([[1.0, 2.0, 3.0, 6.0], [-1.0, -1.0, -1.0, -1.0]])
    std = math.sqrt((4 + 1 + 0 + 9) / 3)
    plain = grpo.group_advantages(scores, False, "none")
    assert plain.tolist() == [[-2, -1, 0, 3], [0, 0, 0, 0]]
    divided = grpo.group_advantages(scores, False, "group")
    expected = [x / (std + 1e-4) for x in (-2, -1, 0, 3)]
    assert divided[0].tolist() == pytest.approx(expected, rel=1e-6)
    assert divided[1].tolist() == [0, 0, 0, 0]
    std = math.sqrt(14 / 7)  # of all eight advantages, whose mean is 0
    divided = grpo.group_advantages(scores, False, "batch")
    expected = [x / (std + 1e-4) for x in (-2, -1, 0, 3)]
    assert divided[0].tolist() == pytest.approx(expected, rel=1e-6)
    assert divided[1].tolist() == [0, 0, 0, 0]
    others = grpo.group_advantages(scores, True, "none")[0].tolist()
    expected = [1 - 11 / 3, 2 - 10 / 3, 3 - 9 / 3, 6 - 6 / 3]  # each less the mean of the other three
    assert others == pytest.approx(expected, rel=1e-6)


def test_the_penalty_over_draws_of_the_old_policy_is_the_exact_kl_to_the_reference_and_so_is_its_gradient():
    generator = torch.Generator().manual_seed(0)
    logits, old, reference = 2 * torch.randn(3, 6, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    old, reference, policy = (x.log_softmax(-1) for x in (old, reference, logits))
    penalty = grpo.kl_penalty(policy, old, reference)
    exact = (policy.exp() * (policy - reference)).sum()
    other = (reference.exp() * (reference - policy)).sum()
    assert (penalty >= 0).all()
    assert abs(exact - other) > 0.02
    mean = (old.exp() * penalty).sum()
    found, expected = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (mean, exact))
    assert mean.item() == pytest.approx(exact.item(), rel=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("score", [0.1, 0.3, 1 / 3])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_scores_that_floats_round_give_advantages_of_exactly_0(score, scale):
    assert (grpo.group_advantages(torch.full((1, 8), score), False, scale) == 0).all()


RESPONSES = [(0,), *[(first, second) for first in (1, 2) for second in (0, 1, 2)]]  # 3 words, of which 0 stops; R = 2


def enumerable_logprobs(logits):
    """log π of the tokens of each response, (7, 2), by logits of the empty context and of the words 1 and 2."""
    table = logits.log_softmax(-1)
    rows = []
    for response in RESPONSES:
        first = table[0, response[0]]
        second = torch.zeros_like(first)
        if len(response) == 2:
            second = table[response]
        rows.append(torch.stack([first, second]))
    return torch.stack(rows)


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_with_the_kl_in_the_reward_the_expected_gradient_is_the_exact_one_of_the_reward_less_beta_kl(leave_one_out):
    """Over all groups of two responses, each with its probability. The group's own mean takes 1/G off."""
    generator = torch.Generator().manual_seed(0)
    logits, reference = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    reward = torch.randn(7, generator=generator, dtype=torch.float64)
    beta = 0.7
    logits.requires_grad_()
    logprobs = enumerable_logprobs(logits)
    ref_logprobs = enumerable_logprobs(reference)
    p = logprobs.sum(1).exp()
    assert p.sum().item() == pytest.approx(1)
    objective = (p * (reward - beta * (logprobs - ref_logprobs).sum(1))).sum()
    (exact,) = torch.autograd.grad(objective, logits, retain_graph=True)

    old = logprobs.detach()
    scores = reward - beta * (old - ref_logprobs).sum(1)
    mask = torch.tensor([[1.0, len(response) == 2] for response in RESPONSES])
    loss = 0
    for group in itertools.product(range(7), repeat=2):
        group = list(group)
        advantages = grpo.group_advantages(scores[group][None], leave_one_out, "none").view(2, 1)
        losses = grpo.policy_loss(logprobs[group] - old[group], advantages, 0.2) * mask[group] / 2  # R = 2
        loss = loss + p[group].prod().detach() * losses.sum() / 2
    (found,) = torch.autograd.grad(loss, logits)
    share = 1 if leave_one_out else 1 / 2
    torch.testing.assert_close(-2 * found, share * exact, rtol=1e-10, atol=1e-12)


# --- whole runs ---


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_the_first_gradient_is_that_of_equation_3_written_as_a_loop_over_responses(train, world, tmp_path, scale):
    """At the first step the ratio is 1 and the penalty's gradient 0, so the gradient is Σ share·A·∇log π."""
    model = AutoModelForCausalLM.from_pretrained(world / "llama")
    model.generation_config.eos_token_id = [*range(4, 10)]  # so many that no response reaches R
    model.save_pretrained(tmp_path / "model")
    tiny.word_tokenizer().save_pretrained(tmp_path / "model")
    changed = rollouts.one_step("grpo") | {"scale_rewards": scale, "learning_rate": 1e-6, "response_length": 40}
    seen = train(tmp_path / "run", model=str(tmp_path / "model"), **changed)
    model = model.double()
    prompts = seen.load_prompts[0].result
    asked = []
    for i in grpo.batch_at(len(prompts), 0, 2, 1):
        prompt, _ = prompts[i]
        asked += [prompt] * 4
    (rollout,) = seen.rollouts
    assert rollout.prompts == asked
    (call,) = seen.group_advantages
    assert call.scores.shape == (2, 4)
    lengths = {len(response) for response in rollout.result}
    assert len(lengths) > 2
    assert max(lengths) < 40
    loss = 0
    for (prompt, response), advantage in zip(rows_of(rollout), call.result.flatten().double()):
        total = replay.logprobs(model, prompt, response).sum()
        divisor = len(response) if scale == "group" else 40  # |o_i|, or Dr. GRPO's constant R
        loss = loss - advantage * total / divisor / 8
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    ((_, logged),) = scalars(tmp_path / "run", "grad_norm")
    assert logged == pytest.approx(gradient.norm().item(), rel=1e-4)


def test_each_prompt_of_a_rollout_is_answered_by_a_group_and_scored_by_its_own_columns(train, world):
    flags = {"reward_model": function(world, "place"), "missing_eos_penalty": 0.0, "save_every": 0}
    flags |= {"num_minibatches": 1, "micro_batch_size": 8, "total_episodes": 40}  # both groups in one micro-batch
    seen = train(**flags)
    prompts = seen.load_prompts[0].result
    assert len(seen.group_advantages) == 5
    for update, call in enumerate(seen.group_advantages):
        places = [prompts[i][1]["place"] for i in seen.batch_at[update].result]
        assert (call.scores // 100).tolist() == [[float(place)] * 4 for place in places]


def test_advantages_go_with_their_own_response_and_losses_end_with_it(train):
    flags = rollouts.one_step("grpo") | {"micro_batch_size": 1, "save_every": 0}
    flags["response_length"] = 32  # long enough that some end before
    seen = train(**flags)
    (rollout,) = seen.rollouts
    rows = rows_of(rollout)
    advantages = seen.group_advantages[0].result.flatten().tolist()
    trained = [call for call in seen.response_logprobs if call.result.requires_grad]
    assert len(trained) == len(seen.policy_loss) == 8
    for call, loss in zip(trained, seen.policy_loss):
        (row,) = call.rows
        assert loss.advantages.tolist() == [[advantages[rows.index(row)]]]
        assert loss.log_ratio.shape == (1, 32)
        assert (loss.log_ratio[0, len(row[1]) :] == 0).all()


def test_groups_of_equal_scores_are_counted_and_teach_nothing(train, world, tmp_path):
    train(reward_model=function(world, "same"), missing_eos_penalty=0.0, kl_coef=0.0)
    assert [value for _, value in scalars(tmp_path, "frac_reward_zero_std")] == [1.0, 1.0]
    assert same(final(tmp_path), load_file(world / "llama" / "model.safetensors"))


def test_with_the_kl_in_the_reward_each_score_loses_beta_times_its_own_log_ratio(train, world, monkeypatch):
    """Here the reference gives each token e^(-1/4) of the policy's probability, and every response has the score 0.1."""
    response_logprobs = grpo.response_logprobs
    calls = []

    def with_a_known_ratio(model, rows, R, device):
        logprobs = response_logprobs(model, rows, R, device)
        calls.append(rows)
        is_reference = not logprobs.requires_grad and calls[-2:] == [rows, rows]
        return logprobs - 0.25 * (logprobs != 0) if is_reference else logprobs

    monkeypatch.setattr(grpo, "response_logprobs", with_a_known_ratio)
    flags = {"reward_model": function(world, "same"), "missing_eos_penalty": 0.0, "kl_coef": 0.8, "kl_in": "reward"}
    seen = train(**flags, **rollouts.one_step("grpo"), response_length=20, save_every=0)
    lengths = [len(response) for response in seen.rollouts[0].result]
    assert len({*lengths}) > 1
    (call,) = seen.group_advantages
    expected = [0.1 - 0.8 * 0.25 * length for length in lengths]
    assert call.scores.flatten().tolist() == pytest.approx(expected, rel=1e-5)


def test_the_penalty_holds_the_policy_near_the_reference(train, tmp_path):
    kls = []
    for beta in (0.0, 20.0):
        run_dir = tmp_path / str(beta)
        train(run_dir, kl_coef=beta, total_episodes=160, learning_rate=2e-3)
        kls.append(scalars(run_dir, "objective/kl")[-1][1])
    free, held = kls
    assert held < 0.5 * free


def test_held_out_prompts_are_scored_at_every_evaluation(train, world, tmp_path):
    train(save_every=1, reward_model=function(world, "place"))
    values = dict(scalars(tmp_path, "eval/scores"))
    assert list(values) == [0, 1, 2]
    assert all(200 <= value < 220 for value in values.values())  # places 0 to 4


def test_the_split_named_or_the_one_of_training_is_evaluated(train, world, tmp_path):
    for split, low in (("train[15:16]", 1500), ("", 350)):  # place 15, and the mean of places 0 to 7
        run_dir = tmp_path / f"split {split}"
        train(run_dir, eval_split=split, reward_model=function(world, "place"), total_episodes=8)
        ((_, first), _) = scalars(run_dir, "eval/scores")
        assert low <= first < low + 20


def test_the_baseline_and_the_std_are_those_of_the_flags(train, tmp_path):
    for baseline, scale in (("group", "group"), ("leave-one-out", "batch")):
        seen = train(tmp_path / baseline, baseline=baseline, scale_rewards=scale, total_episodes=8)
        (call,) = seen.group_advantages
        assert (call.leave_one_out, call.scale) == (baseline == "leave-one-out", scale)
        assert call.scores.shape == (2, 4)


@pytest.mark.parametrize(
    "changed",
    [
        {"group_size": 1},
        {"group_size": 3},
        {"num_minibatches": 3},
        {"num_epochs": 0},
        {"micro_batch_size": 0},
        {"response_length": 0},
        {"kl_coef": -1.0},
        {"clip_coef": 0.0},
        {"max_length": 8},
        {"total_episodes": 7},
    ],
    ids=str,
)
def test_flags_that_cannot_work_are_refused(world, tmp_path, changed):
    with pytest.raises(ValueError, match="must be"):
        grpo.Args(**rollouts.flags_of(world, "grpo", tmp_path, **changed))


# --- the whole again, in short ---


def plain_advantages(scores, leave_one_out, scale):
    """The advantage of each response of groups of 4, one group after the other."""
    advantages = []
    for start in range(0, len(scores), 4):
        group = scores[start : start + 4]
        std = torch.tensor(group, dtype=torch.float64).std().item()
        for i, score in enumerate(group):
            others = group[:i] + group[i + 1 :]
            baseline = sum(others) / 3 if leave_one_out else sum(group) / 4
            advantages.append((score - baseline) / (std + 1e-4 if scale == "group" else 1))
    if scale == "batch":
        std = torch.tensor(advantages, dtype=torch.float64).std().item()
        advantages = [advantage / (std + 1e-4) for advantage in advantages]
    return advantages


def plain_grpo(policy, updates, leave_one_out, scale, kl_in):
    """GRPO over the rows of each update and its minibatches, one response at a time; what each update logs."""
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.Adam(policy.parameters())
    logged = []
    for step, (rows, minibatches) in enumerate(updates):
        old = {row: replay.logprobs(policy, *row).detach() for row in rows}
        ref = {row: replay.logprobs(reference, *row).detach() for row in rows}
        kl_of = {row: (old[row] - ref[row]).sum().item() for row in rows}
        scores = [replay.score(response) for _, response in rows]
        gains = scores
        if kl_in == "reward":
            gains = [score - replay.BETA * kl_of[row] for score, row in zip(scores, rows)]
        advantages = dict(zip(rows, plain_advantages(gains, leave_one_out, scale)))
        groups = [scores[start : start + 4] for start in range(0, len(scores), 4)]
        kl = fmean(kl_of[row] for row in rows)  # a row may be there twice
        log = {"objective/kl": kl, "objective/scores": fmean(scores)}
        log["objective/entropy"] = fmean(-old[row].sum().item() for row in rows)
        log["val/num_eos_tokens"] = fmean(response[-1] in replay.STOPS for _, response in rows)
        log["frac_reward_zero_std"] = fmean(len({*group}) == 1 for group in groups)
        log["lr"] = replay.LEARNING_RATE * (1 - step / len(updates))
        optimizer.param_groups[0]["lr"] = log["lr"]
        sums = Counter()
        for minibatch in minibatches:
            loss = 0
            tokens = sum(len(response) for _, response in minibatch)
            for row in minibatch:
                now = replay.logprobs(policy, *row)
                log_ratio = now - old[row]
                to_ref = ref[row] - now
                gain = replay.clipped(log_ratio, advantages[row])
                kl = log_ratio.exp() * (to_ref.exp() - to_ref - 1)
                beta = replay.BETA if kl_in == "loss" else 0
                divisor = len(row[1]) if scale == "group" else replay.R
                loss = loss - (gain - beta * kl).sum() / divisor / len(minibatch)
                sums["loss/policy"] -= gain.sum().item() / tokens
                sums["loss/kl"] += kl.sum().item() / tokens
                sums["policy/approxkl"] += (log_ratio.exp() - 1 - log_ratio).sum().item() / tokens
            optimizer.zero_grad()
            loss.backward()
            sums["grad_norm"] += torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0).item()
            optimizer.step()
        logged.append(log | {name: value / len(minibatches) for name, value in sums.items()})
    return logged


@pytest.mark.parametrize(
    "baseline,scale,kl_in",
    [
        ("group", "group", "loss"),
        ("leave-one-out", "none", "reward"),
        ("group", "none", "loss"),
        ("group", "batch", "reward"),
        ("leave-one-out", "batch", "loss"),
    ],
)
def test_two_updates_are_those_of_a_plain_second_version(train, tmp_path, baseline, scale, kl_in):
    flags, prompts = replay.make_world(tmp_path, prompts=8, batch_size=16)
    flags |= {"baseline": baseline, "scale_rewards": scale, "kl_in": kl_in}
    seen = train(tmp_path / "run", **flags)
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "model").double()
    policy = copy.deepcopy(start)
    updates = replay.rollouts(seen, 16, prompts)
    logged = plain_grpo(policy, updates, baseline == "leave-one-out", scale, kl_in)
    assert logged[1]["objective/kl"] != 0
    for name in logged[0]:
        values = [value for _, value in scalars(tmp_path / "run", name)]
        assert values == pytest.approx([log[name] for log in logged], rel=1e-4, abs=1e-5), name
    assert replay.distance(final(tmp_path / "run"), policy, start) < 1e-3
    saved = GenerationConfig.from_pretrained(tmp_path / "run" / "model")
    assert {*saved.eos_token_id} == replay.STOPS  # the model's own, with all stops
    assert saved.temperature == 0.5
