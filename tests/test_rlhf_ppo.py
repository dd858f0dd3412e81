"""rlhf_ppo.py: sampling, rewards, masks, the controller, whole runs on tiny models, and the exact optimum."""

import itertools
import math
import random
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
import rlhf_ppo
import tiny
import torch
from helpers import command, run, scalars
from safetensors.torch import load_file
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

ARCHS = ("llama", "gpt2")  # rotary and absolute positions
EOS = 1


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders of policies and reward models of two architectures, and a file of prompts of unequal lengths."""
    root = tmp_path_factory.mktemp("world")
    for arch in ARCHS:
        tiny.make_model(root / arch, arch)
        reward_model = AutoModelForSequenceClassification.from_pretrained(root / arch, num_labels=1)
        torch.nn.init.normal_(reward_model.score.weight, std=0.5, generator=torch.Generator().manual_seed(1))
        reward_model.config.reward_mean = 0.3
        reward_model.save_pretrained(root / f"{arch}-reward")
        tiny.word_tokenizer().save_pretrained(root / f"{arch}-reward")
    tiny.write_jsonl(root / "prompts.jsonl", [{"prompt": row["prompt"]} for row in tiny.preferences(16)])
    return root


def settings(world, run_dir, **changed):
    """Flags of a short run, as a dictionary."""
    return {
        "model": str(world / "llama"), "reward_model": str(world / "llama-reward"),
        "dataset": str(world / "prompts.jsonl"), "run_dir": str(run_dir), "device": "cpu", "batch_size": 8,
        "num_minibatches": 2, "micro_batch_size": 0, "num_ppo_epochs": 2, "total_episodes": 16, "response_length": 8, "max_length": 64,
        "learning_rate": 1e-2,
    } | changed  # fmt: skip


def flags(changed):
    """The command line that sets these."""
    return [part for name, value in changed.items() for part in (f"--{name.replace('_', '-')}", value)]


def train(monkeypatch, world, run_dir, **changed):
    """Run main in this process; returns what it passed to the functions of the algorithm, and its models."""
    seen = SimpleNamespace(rewards=[], gae=[], loss=[], models=[], scores=[])

    def spy(name, calls, keep):
        shipped = getattr(rlhf_ppo, name)

        def called(*args):
            result = shipped(*args)
            calls.append(keep(args, result))
            return result

        monkeypatch.setattr(rlhf_ppo, name, called)

    with monkeypatch.context() as monkeypatch:
        spy("kl_penalised_rewards", seen.rewards, lambda args, result: (args, result))
        spy("compute_gae", seen.gae, lambda args, result: (args, result))
        spy("rlhf_loss", seen.loss, lambda args, result: [x.detach() if hasattr(x, "detach") else x for x in args])
        spy("rewards", seen.scores, lambda args, result: (args[1], args[2], result))
        spy("place_model", seen.models, lambda args, result: args[1])
        rlhf_ppo.main(rlhf_ppo.Args(**settings(world, run_dir, **changed)))
    seen.policy, seen.critic, seen.reward_model, seen.reference = seen.models
    return seen


def final(run_dir):
    """Tensors of the final model of a run."""
    return load_file(run_dir / "model" / "model.safetensors")


def same(a, b):
    """Whether two models have the same tensors bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- sampling ---


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_have_the_probabilities_of_the_training_forward_pass(arch, temperature, tmp_path):
    model, n = tiny.make_model(tmp_path, arch), 4000
    short, long = [5, 6], [4, 5, 6, 7, 8]  # padded on the left
    grid = torch.rand(2 * n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grid[:, 0] = 0.5  # the same first token everywhere
    grid[:n, 1] = grid[n:, 1] = (torch.arange(n) + 0.5) / n  # numbers that fill [0, 1) evenly
    drawn = rlhf_ppo.sample(model, [short] * n + [long] * n, grid, temperature, [])
    for prompt, rows in ((short, drawn[:n]), (long, drawn[n:])):
        assert (rows[:, 0] == rows[0, 0]).all()
        share = rows[:, 1].bincount(minlength=model.config.vocab_size) / n
        ids = torch.tensor([prompt + [rows[0, 0].item(), token] for token in range(len(share))])
        with torch.no_grad():
            logprobs = rlhf_ppo.tempered_logprobs(model, ids, len(prompt), temperature)
        torch.testing.assert_close(share, logprobs[:, 1].exp(), rtol=0, atol=2 / n)


@pytest.mark.parametrize("arch", tiny.CONFIGS)
def test_a_left_padded_batch_samples_like_single_sequences(arch, tmp_path):
    model = tiny.make_model(tmp_path, arch)
    prompts = [[5], [6, 7, 8], [9, 5, 6, 7, 8, 4, 11], [8, 8]]
    uniform = torch.rand(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = rlhf_ppo.sample(model, prompts, uniform, 1.0, [EOS])
    alone = [rlhf_ppo.sample(model, [prompt], row[None], 1.0, [EOS])[0] for prompt, row in zip(prompts, uniform)]
    assert torch.equal(together, torch.stack(alone))


def test_a_draw_never_has_probability_0_and_follows_the_distribution():
    logits = torch.tensor([-math.inf, 0.0, -math.inf, math.log(3), -math.inf]).expand(6, 5)
    uniform = torch.tensor([0, 0.2, 0.2499, 0.2501, 0.9, 1 - 2**-53], dtype=torch.float64)
    assert rlhf_ppo.draw(logits, uniform).tolist() == [1, 1, 1, 3, 3, 3]


def test_a_response_ends_at_the_first_of_all_stop_tokens(tmp_path):
    model = tiny.make_model(tmp_path)
    uniform = torch.rand(64, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    free = rlhf_ppo.sample(model, [[5]] * 64, uniform, 1.0, [])
    stopped = rlhf_ppo.sample(model, [[5]] * 64, uniform, 1.0, [7, 11])
    assert (free >= 0).all()
    for whole, row in zip(free.tolist(), stopped.tolist()):
        ends = [t for t, token in enumerate(whole) if token in (7, 11)]
        length = ends[0] + 1 if ends else 20
        assert row == whole[:length] + [-1] * (20 - length)


@pytest.mark.parametrize("arch", tiny.CONFIGS)
def test_finished_responses_leave_the_batch_and_the_others_go_on_unchanged(monkeypatch, arch, tmp_path):
    model, widths = tiny.make_model(tmp_path, arch), []
    prompts = [[5] * (1 + row % 3) + [4 + row] for row in range(16)]  # lengths 2 to 4, all different
    uniform = torch.rand(16, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, **more: widths.append(len(ids)) or forward(ids, **more))
    together = rlhf_ppo.sample(model, prompts, uniform, 1.0, [EOS, 7])
    with_a_token = (together >= 0).sum(0).tolist()  # rows, at each place
    assert len(set(with_a_token)) > 4 and widths == [n for n in with_a_token if n]
    for prompt, numbers, row in zip(prompts, uniform, together):
        assert torch.equal(rlhf_ppo.sample(model, [prompt], numbers[None], 1.0, [EOS, 7])[0], row)


def test_stop_tokens_are_eos_of_the_tokenizer_and_all_of_the_generation_config(tmp_path):
    model, tokenizer = tiny.make_model(tmp_path), tiny.word_tokenizer()
    for configured, stops in ((None, [EOS]), (EOS, [EOS]), (7, [EOS, 7]), ([7, 11], [EOS, 7, 11])):
        model.generation_config.eos_token_id = configured
        assert rlhf_ppo.stop_tokens(model, tokenizer) == stops


# --- rewards, advantages, losses ---


def ragged(generator, rows=5, width=12):
    """mask (B, L) of responses with random starts and ends, and `last`, 1 on the last token of each."""
    mask, last = torch.zeros(rows, width), torch.zeros(rows, width)
    for row in range(rows):
        start, end = sorted((torch.randperm(width, generator=generator)[:2]).tolist())
        mask[row, start : end + 1] = last[row, end] = 1
    return mask, last


def test_with_lambda_1_the_first_return_is_the_score_less_beta_times_the_summed_log_ratio():
    generator = torch.Generator().manual_seed(0)
    mask, last = ragged(generator)
    logprobs, ref_logprobs, values = torch.randn(3, *mask.shape, generator=generator, dtype=torch.float64)
    scores = torch.randn(len(mask), generator=generator, dtype=torch.float64)
    rewards = rlhf_ppo.kl_penalised_rewards(scores, logprobs, ref_logprobs, mask, last, 0.3)
    expected = scores - 0.3 * ((logprobs - ref_logprobs) * mask).sum(1)
    torch.testing.assert_close(rewards.sum(1), expected)
    assert (rewards[mask == 0] == 0).all()
    next_values = pad(values[:, 1:], (0, 1))
    advantages = rlhf_ppo.compute_gae(rewards.T, values.T, next_values.T, last.T, last.T, 1.0, 1.0).T
    first = mask.argmax(1, keepdim=True)
    torch.testing.assert_close((advantages + values).gather(1, first)[:, 0], expected)


def test_the_mean_penalty_is_the_exact_kl_and_its_sign_that_of_the_kl():
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    uniform = torch.rand(200_000, generator=generator, dtype=torch.float64)
    token = rlhf_ppo.draw(policy.expand(len(uniform), 6), uniform)[:, None]
    one = torch.ones(len(uniform), 1)
    penalty = -rlhf_ppo.kl_penalised_rewards(torch.zeros(len(uniform)), policy[token], reference[token], one, one, 1.0)
    assert exact > 0.2 and abs(penalty.mean() - exact) < 4 * penalty.std() / len(uniform) ** 0.5


def test_approxkl_is_never_negative_and_near_the_exact_kl():
    generator = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    token = torch.multinomial(old.exp(), 100_000, replacement=True, generator=generator)[:, None]
    zeros, ones = torch.zeros(token.shape), torch.ones(token.shape)
    name = rlhf_ppo.METRICS.index("policy/approxkl")
    _, metrics = rlhf_ppo.rlhf_loss(
        new[token], zeros, old[token], zeros, zeros, zeros, ones, ones.sum(), clip_coef=0.2, vf_coef=0.1
    )
    assert abs(metrics[name] - (old.exp() * (old - new)).sum()) < 0.03
    for x in (-3.0, -1e-4, 0.0, 1e-4, 3.0):
        one = torch.ones(1, 1)
        _, metrics = rlhf_ppo.rlhf_loss(x * one, one, 0 * one, one, one, one, one, one.sum(), 0.2, 0.1)
        assert metrics[name] >= -1e-7


def test_the_controller_follows_a_hand_computed_course():
    kl_coef, course = 0.15, []
    for kl in (6.0, 6.6, 60.0, 3.0, 0.0, -1.0):  # errors 0, 0.1, then clipped: 0.2, -0.2, -0.2, -0.2
        kl_coef = rlhf_ppo.adapt_kl_coef(kl_coef, kl, 6.0)
        course.append(kl_coef)
    expected = [0.15, 0.1515, 0.15453, 0.1514394, 0.148410612, 0.14544239976]
    assert course == pytest.approx(expected, rel=1e-12)


def test_whitening_ignores_padding_and_is_defined_for_one_token():
    x, mask = torch.randn(3, 5), torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0, 0, 0, 1, 0]])
    white = rlhf_ppo.standardise(x, mask)
    wider = rlhf_ppo.standardise(pad(x, (4, 3), value=99.0), pad(mask, (4, 3)))
    torch.testing.assert_close(wider[:, 4:-3] * mask, white * mask)
    chosen = white[mask == 1]
    assert abs(chosen.mean()) < 1e-6 and abs(chosen.std(correction=0) - 1) < 1e-6
    assert rlhf_ppo.standardise(torch.tensor([[7.0]]), torch.ones(1, 1)).tolist() == [[0.0]]


def test_tokens_outside_the_mask_have_no_gradient_and_the_stop_token_has_one():
    rows = [[[4, 5], [6, 7, EOS]], [[4], [8, 9, 10, 11, 5, EOS]]]
    ids, mask, start = rlhf_ppo.collate(rows, torch.device("cpu"))
    logprobs = torch.full(mask.shape, -1.0, requires_grad=True)
    values = torch.zeros(mask.shape, requires_grad=True)
    constant = torch.full(mask.shape, 0.5)
    loss, _ = rlhf_ppo.rlhf_loss(
        logprobs, values, logprobs.detach(), values.detach(), constant, constant, mask, mask.sum(), 0.2, 0.1
    )
    loss.backward()
    assert mask.tolist() == [[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]] and start == 1 and ids[0, 4] == EOS
    assert torch.equal(logprobs.grad != 0, mask == 1) and torch.equal(values.grad != 0, mask == 1)


@pytest.mark.parametrize("arch", ARCHS)
def test_values_are_of_the_state_before_each_token(world, arch):
    critic = AutoModelForSequenceClassification.from_pretrained(world / f"{arch}-reward")
    ids = torch.tensor([[4, 5, 6, 7, 8]])
    with torch.no_grad():
        values = rlhf_ppo.token_values(critic, ids, 2)
        for t, value in enumerate(values[0], 2):  # a classifier's logit is its head on the last token
            torch.testing.assert_close(value, critic(ids[:, :t]).logits[0, 0])
        changed = rlhf_ppo.token_values(critic, torch.tensor([[4, 5, 6, 9, 9]]), 2)
    assert values.shape == (1, 3) and torch.equal(values[0, :2], changed[0, :2]) and values[0, 2] != changed[0, 2]


def test_ppo_reaches_the_optimum_of_a_world_that_can_be_enumerated():
    """Vocabulary 6, up to 4 tokens of which 0 stops: π* ∝ π_ref·exp(r/β) over all 781 responses."""
    generator = torch.Generator().manual_seed(0)
    V, R, beta = 6, 4, 0.5
    responses = [
        row for n in range(1, R + 1) for row in itertools.product(range(V), repeat=n)
        if 0 not in row[:-1] and (row[-1] == 0 or n == R)
    ]  # fmt: skip
    assert len(responses) == 781
    contexts = {row: i for i, row in enumerate(c for n in range(R) for c in itertools.product(range(V), repeat=n))}
    of_token = torch.tensor([[contexts[row[:t]] if t < len(row) else 0 for t in range(R)] for row in responses])
    tokens = torch.tensor([list(row) + [0] * (R - len(row)) for row in responses])
    masks = torch.tensor([[1.0] * len(row) + [0.0] * (R - len(row)) for row in responses])
    reward = torch.randn(len(responses), generator=generator)
    reference = torch.randn(len(contexts), V, generator=generator)
    logits, values = reference.clone().requires_grad_(), torch.zeros(len(contexts), requires_grad=True)

    def logprobs_of(logits, rows):
        return logits.log_softmax(-1)[of_token[rows], tokens[rows]]  # (b, R)

    everything = torch.arange(len(responses))
    start = (logprobs_of(reference, everything) * masks).sum(1)
    best = (start + reward / beta).log_softmax(0)
    optimizer = torch.optim.Adam([logits, values], eps=1e-5)
    updates = 150
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = rlhf_ppo.annealed(0.1, update, updates)
        with torch.no_grad():
            p = (logprobs_of(logits, everything) * masks).sum(1).exp()
            rows = torch.multinomial(p, 2048, replacement=True, generator=generator)
            mask = masks[rows]
            last = mask - pad(mask[:, 1:], (0, 1))
            old, old_values = logprobs_of(logits, rows), values[of_token[rows]] * mask
            rewards = rlhf_ppo.kl_penalised_rewards(reward[rows], old, logprobs_of(reference, rows), mask, last, beta)
            following = pad(old_values[:, 1:], (0, 1))
            advantages = rlhf_ppo.compute_gae(rewards.T, old_values.T, following.T, last.T, last.T, 1.0, 0.95).T
            returns, advantages = advantages + old_values, rlhf_ppo.standardise(advantages, mask)
        for _ in range(4):
            loss, _ = rlhf_ppo.rlhf_loss(
                logprobs_of(logits, rows), values[of_token[rows]], old, old_values, advantages, returns, mask,
                mask.sum(), clip_coef=0.2, vf_coef=0.5,
            )  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    found = (logprobs_of(logits.detach(), everything) * masks).sum(1)
    kl, kl_at_start = (found.exp() * (found - best)).sum(), (start.exp() * (start - best)).sum()
    assert kl_at_start > 0.5 and 0 <= kl < 0.01, (kl_at_start, kl)


# --- whole runs ---


@pytest.mark.parametrize("micro_batch_size", [0, 2, 1])
def test_before_the_first_step_ratio_and_kl_are_exactly_neutral(monkeypatch, world, tmp_path, micro_batch_size):
    seen = train(monkeypatch, world, tmp_path, micro_batch_size=micro_batch_size, temperature=0.7, total_episodes=8)
    for logprobs, _, old_logprobs, *_, mask, _, _, _ in seen.loss[: 4 // (micro_batch_size or 4)]:
        assert (
            ((logprobs - old_logprobs).exp() - 1) * mask
        ).abs().max() <= 2e-6  # a few units in the last place of log-probabilities near 5
    (_, logprobs, ref_logprobs, *_), _ = seen.rewards[0]
    assert torch.equal(logprobs, ref_logprobs)
    assert scalars(tmp_path, "objective/kl") == [(1, 0.0)]


def test_the_ratio_is_to_the_policy_that_sampled(monkeypatch, world, tmp_path):
    seen = train(monkeypatch, world, tmp_path, num_minibatches=1, num_ppo_epochs=1)
    for (_, logprobs, ref_logprobs, mask, *_), _ in seen.rewards[1:]:
        assert not torch.equal(logprobs, ref_logprobs)
    for ((_, logprobs, _, mask, *_), _), (_, _, old_logprobs, *_, part_mask, _, _, _) in zip(seen.rewards, seen.loss):
        torch.testing.assert_close(
            (old_logprobs * part_mask).sum(1).sort().values, (logprobs * mask).sum(1).sort().values
        )


def test_scores_sit_on_the_last_tokens_and_missing_stops_cost_once(monkeypatch, world, tmp_path):
    changed = {"missing_eos_penalty": 2.5, "gae_lambda": 1.0, "total_episodes": 24, "batch_size": 8}
    seen = train(monkeypatch, world, tmp_path, **changed)
    reward_model = AutoModelForSequenceClassification.from_pretrained(world / "llama-reward")
    stops = []
    for update, ((scores, logprobs, ref_logprobs, mask, last, beta), token_rewards) in enumerate(seen.rewards):
        ids, lengths, raw = (torch.cat(part) for part in zip(*(
            (pad(ids, (0, 64 - ids.shape[1])), last + 1, raw) for ids, last, raw in seen.scores[1:][2 * update :][:2]
        )))  # fmt: skip
        for row, length, score in zip(ids, lengths, raw):  # rows one by one, without padding
            with torch.no_grad():
                alone = reward_model(row[None, :length]).logits[0, 0] - 0.3
            torch.testing.assert_close(score, alone, rtol=1e-4, atol=1e-5)
        stopped = ids.gather(1, lengths[:, None] - 1)[:, 0] == EOS
        assert torch.equal((raw - 2.5 * ~stopped).sort().values, scores.sort().values)
        stops.append(stopped.float().mean().item())
        assert torch.equal(last.argmax(1), mask.shape[1] - 1 - mask.flip(1).argmax(1)) and (last.sum(1) == 1).all()
        torch.testing.assert_close(token_rewards.sum(1), scores - beta * ((logprobs - ref_logprobs) * mask).sum(1))
        (_, values, *_), advantages = seen.gae[update]
        first = mask.argmax(1, keepdim=True)
        torch.testing.assert_close((advantages + values).T.gather(1, first)[:, 0], token_rewards.sum(1))
    assert [value for _, value in scalars(tmp_path, "val/num_eos_tokens")] == pytest.approx(stops)
    assert 0 < sum(stops) < 3


def test_advantages_are_whitened_over_the_response_tokens_of_the_rollout(monkeypatch, world, tmp_path):
    seen = train(monkeypatch, world, tmp_path, num_minibatches=1, total_episodes=8)
    _, _, _, _, advantages, _, mask, *_ = seen.loss[0]
    (_, values, *_), raw = seen.gae[0]
    chosen = advantages[mask == 1]
    assert (mask == 0).any() and abs(chosen.mean()) < 1e-5 and chosen.std(correction=0) == pytest.approx(1, abs=1e-4)
    assert raw.T[seen.rewards[0][0][3] == 1].mean().abs() > 1e-3  # they were not before


def test_reward_model_and_reference_stay_what_they_were_and_the_critic_starts_at_0(monkeypatch, world, tmp_path):
    seen = train(monkeypatch, world, tmp_path)
    policy = AutoModelForCausalLM.from_pretrained(world / "llama").state_dict()
    reward = AutoModelForSequenceClassification.from_pretrained(world / "llama-reward").state_dict()
    assert same(seen.reference.state_dict(), policy) and same(seen.reward_model.state_dict(), reward)
    assert not same(seen.policy.state_dict(), policy) and not same(seen.critic.state_dict(), reward)
    assert same({name: x for name, x in final(tmp_path).items()} | {"lm_head.weight": policy["lm_head.weight"]},
                seen.policy.state_dict() | {"lm_head.weight": policy["lm_head.weight"]})  # fmt: skip
    (_, values, *_), _ = seen.gae[0]
    assert (values == 0).all() and (seen.gae[1][0][1] != 0).any()


def test_micro_batches_add_up_to_the_whole_batch(monkeypatch, world, tmp_path):
    changed = {"num_minibatches": 1, "num_ppo_epochs": 1, "total_episodes": 8}
    for size in (8, 1):
        train(monkeypatch, world, tmp_path / str(size), micro_batch_size=size, **changed)
    a, b = final(tmp_path / "8"), final(tmp_path / "1")
    start = load_file(world / "llama" / "model.safetensors")
    for name in a:
        torch.testing.assert_close(b[name] - start[name], a[name] - start[name], rtol=1e-3, atol=2e-4)
    one, eight = (scalars(tmp_path / size, "grad_norm")[0][1] for size in ("1", "8"))
    assert one == pytest.approx(eight, rel=1e-5)


@pytest.mark.parametrize("changed", [{"gradient_checkpointing": True}, {"dtype": "bfloat16"}, {"arch": "gpt2"}])
def test_it_runs_with(monkeypatch, world, tmp_path, changed):
    arch = changed.pop("arch", "llama")
    models = {"model": str(world / arch), "reward_model": str(world / f"{arch}-reward")}
    seen = train(monkeypatch, world, tmp_path / "run", **models, **changed)
    assert all(math.isfinite(value) for _, value in scalars(tmp_path / "run", "loss/policy"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    if changed.get("gradient_checkpointing"):
        plain = train(monkeypatch, world, tmp_path / "plain")
        for a, b in zip(seen.policy.parameters(), plain.policy.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_controller_changes_beta_and_gold_is_logged(monkeypatch, world, tmp_path):
    (tmp_path / "gold.py").write_text(
        "def gold_reward(prompt, response, finished):\n"
        "    assert prompt.endswith(':') and '<eos>' not in response\n"
        "    return 1.0 if finished else -1.0\n"
    )
    train(monkeypatch, world, tmp_path / "run", target_kl=5.0, gold=str(tmp_path / "gold.py"))
    assert [value for _, value in scalars(tmp_path / "run", "kl_coef")] == pytest.approx([0.5, 0.49])
    for (_, gold), (_, stopped) in zip(
        scalars(tmp_path / "run", "objective/gold"), scalars(tmp_path / "run", "val/num_eos_tokens")
    ):
        assert gold == pytest.approx(2 * stopped - 1)


def test_conversations_and_preference_data_serve_as_prompts(world, tmp_path):
    tokenizer = tiny.word_tokenizer()
    user, assistant = {"role": "user", "content": "review"}, {"role": "assistant", "content": "great ."}
    asked = tokenizer("user : review assistant :").input_ids
    for name, row, ids in (
        ("text", tiny.preferences(1)[0], tokenizer(tiny.preferences(1)[0]["prompt"]).input_ids),
        ("conversation", {"prompt": [user], "chosen": [assistant], "rejected": [assistant]}, asked),
        ("messages", {"messages": [user, assistant]}, asked),
        ("no answer", {"messages": [user]}, asked),
    ):
        path = tiny.write_jsonl(tmp_path / f"{name}.jsonl", [row] * 8)
        args = rlhf_ppo.Args(**settings(world, tmp_path, dataset=str(path)))
        assert rlhf_ppo.load_prompts(args, tokenizer) == [ids] * 8


def test_prompts_that_leave_no_room_are_left_out_with_a_count(world, tmp_path, capsys):
    args = rlhf_ppo.Args(**settings(world, tmp_path, max_length=12))
    kept = rlhf_ppo.load_prompts(args, tiny.word_tokenizer())
    assert len(kept) == 8 and max(map(len, kept)) == 4
    assert "8 of 16 prompts left out" in capsys.readouterr().out


def test_lora_trains_adapters_and_saves_a_plain_model(monkeypatch, world, tmp_path):
    pytest.importorskip("peft")
    seen = train(monkeypatch, world, tmp_path, lora_rank=2)
    assert seen.policy is seen.reference
    start = AutoModelForCausalLM.from_pretrained(world / "llama")
    trained = {name for name, x in seen.policy.named_parameters() if x.requires_grad}
    assert trained and all("lora" in name for name in trained)
    ids = torch.tensor([[4, 5, 6, 7, 8]])
    with torch.no_grad(), seen.policy.disable_adapter():
        torch.testing.assert_close(seen.policy(ids).logits, start(ids).logits)
    (_, logprobs, ref_logprobs, *_), _ = seen.rewards[0]
    assert torch.equal(logprobs, ref_logprobs)
    (_, logprobs, ref_logprobs, *_), _ = seen.rewards[1]
    assert not torch.equal(logprobs, ref_logprobs)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        torch.testing.assert_close(saved(ids).logits, seen.policy(ids).logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(saved(ids).logits, start(ids).logits, atol=1e-3)


def test_a_run_killed_at_any_moment_resumes_to_the_same_weights_bit_for_bit(monkeypatch, world, tmp_path):
    changed = {"total_episodes": 80, "save_every": 2, "target_kl": 1.0}
    train(monkeypatch, world, tmp_path / "whole", **changed)
    run_dir = tmp_path / "killed"
    process = subprocess.Popen(
        list(map(str, command("rlhf_ppo", *flags(settings(world, run_dir, **changed))))), stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 120
    while not (run_dir / "checkpoint.pt").exists() and time.time() < deadline:
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = run("rlhf_ppo", "--resume", run_dir / "checkpoint.pt")
    assert resumed.returncode == 0, resumed.stderr
    assert same(final(run_dir), final(tmp_path / "whole"))
    for tag in ("objective/kl", "kl_coef", "loss/value"):
        assert scalars(run_dir, tag) == scalars(tmp_path / "whole", tag) and len(scalars(run_dir, tag)) == 10


def test_two_processes_train_like_one(monkeypatch, world, tmp_path):
    changed = {"total_episodes": 8, "num_ppo_epochs": 1}
    train(monkeypatch, world, tmp_path / "one", **changed)
    two = run("rlhf_ppo", *flags(settings(world, tmp_path / "two", **changed)), processes=2)
    assert two.returncode == 0, two.stderr
    for tag in ("objective/scores", "objective/entropy", "loss/policy", "loss/value", "grad_norm"):
        (_, a), (_, b) = scalars(tmp_path / "one", tag)[0], scalars(tmp_path / "two", tag)[0]
        assert b == pytest.approx(a, rel=1e-4, abs=1e-6), tag
    a, b = final(tmp_path / "one"), final(tmp_path / "two")
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=1e-3)


# --- bad input ---

BAD_INPUT = {
    "minibatches that don't divide": ({"num_minibatches": 3}, ["--num-minibatches 3", "--batch-size 8"]),
    "micro-batches that don't divide": ({"micro_batch_size": 3}, ["--micro-batch-size 3", "4 rows"]),
    "less than one rollout": ({"total_episodes": 7}, ["--total-episodes 7", "--batch-size 8"]),
    "no temperature": ({"temperature": 0.0}, ["--temperature"]),
    "negative beta": ({"kl_coef": -0.1}, ["--kl-coef must be at least 0"]),
    "controller of nothing": ({"kl_coef": 0.0, "target_kl": 1.0}, ["--target-kl", "--kl-coef"]),
    "no room for prompts": ({"max_length": 8}, ["--max-length 8", "--response-length 8"]),
    "prompts too long": ({"max_length": 9}, ["--batch-size 8", "0 prompts"]),
    "more than the model reads": ({"max_length": 500}, ["--model", "128", "500"]),
    "no such reward model": ({"reward_model": "./nowhere"}, ["--reward-model ./nowhere", "no such folder"]),
    "no such gold": ({"gold": "./nowhere.py"}, ["--gold ./nowhere.py"]),
    "gold without the function": ({"gold": tiny.__file__}, ["--gold", "gold_reward"]),
    "adapters without peft": ({"lora_rank": 2}, ["--lora-rank", "peft"]),
}


def refused(capsys, args):
    """Run main, which must refuse its input; returns its one line on stderr."""
    with pytest.raises(SystemExit) as stop:
        rlhf_ppo.main(args)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("changed,words", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_refused_in_one_line_before_anything_is_written(
    world, tmp_path, capsys, monkeypatch, changed, words
):
    if "lora_rank" in changed:
        monkeypatch.setattr(rlhf_ppo.importlib.util, "find_spec", lambda name: None)
    message = refused(capsys, rlhf_ppo.Args(**settings(world, tmp_path / "run", **changed)))
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()


def test_a_reward_model_that_does_not_fit_is_refused(world, tmp_path, capsys):
    def message(folder):
        return refused(capsys, rlhf_ppo.Args(**settings(world, tmp_path / "run", reward_model=str(folder))))

    reward_model = AutoModelForSequenceClassification.from_pretrained(world / "llama-reward")
    reward_model.save_pretrained(tmp_path / "bpe")
    tiny.bpe_tokenizer().save_pretrained(tmp_path / "bpe")
    assert "its vocabulary (342 tokens) is not that of --model (23 tokens)" in message(tmp_path / "bpe")
    two = AutoModelForSequenceClassification.from_pretrained(world / "llama", num_labels=2)
    two.save_pretrained(tmp_path / "two")
    tiny.word_tokenizer().save_pretrained(tmp_path / "two")
    assert "needs one label" in message(tmp_path / "two")
    reward_model.config.pad_token_id = None
    reward_model.save_pretrained(tmp_path / "unpadded")
    tiny.word_tokenizer().save_pretrained(tmp_path / "unpadded")
    assert "no pad_token_id" in message(tmp_path / "unpadded")


def test_bad_prompts_are_refused(world, tmp_path, capsys):
    for number, (rows, words) in enumerate([
        ([{"prompt": "review :"}, {"prompt": " "}], ["row 2", "empty"]),
        ([{"question": "review :"}], ["question", "needs prompt, or messages"]),
        ([{"messages": [{"role": "assistant", "content": "great"}]}], ["row 1", "empty"]),
        ([{"prompt": "review :"}], ["--batch-size 8", "1 prompts"]),
    ]):  # fmt: skip
        path = tiny.write_jsonl(tmp_path / f"{number}.jsonl", rows)
        message = refused(capsys, rlhf_ppo.Args(**settings(world, tmp_path / "run", dataset=str(path))))
        assert all(word in message for word in words), message
