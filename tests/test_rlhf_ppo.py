"""rlhf_ppo.py: sampling, rewards, masks, whole runs on tiny models, and the exact optimum."""

import copy
import itertools
import json
import math
import signal
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import replay
import rlhf_ppo
import tiny
import torch
from accelerate.state import AcceleratorState
from helpers import scalars, spy_on
from safetensors.torch import load_file
from torch.nn.functional import pad
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

ARCHS = ("llama", "gpt2")  # rotary and absolute positions
EOS, CPU = 1, torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_state():
    """Each run in this process has an Accelerator of its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders of policies and reward models of two architectures, and a file of prompts of unequal lengths."""
    root = tmp_path_factory.mktemp("world")
    for arch in ARCHS:
        tiny.make_model(root / arch, arch)
        reward_model = AutoModelForSequenceClassification.from_pretrained(root / arch, num_labels=1)
        torch.nn.init.normal_(reward_model.score.weight, std=0.5, generator=torch.Generator().manual_seed(1))
        reward_model.save_pretrained(root / f"{arch}-reward")
        tiny.word_tokenizer().save_pretrained(root / f"{arch}-reward")
    tiny.write_jsonl(root / "prompts.jsonl", [{"prompt": row["prompt"]} for row in tiny.preferences(16)])
    return root


def settings(world, run_dir, **changed):
    """Flags of a short run, as a dictionary."""
    models = {"model": str(world / "llama"), "reward_model": str(world / "llama-reward")}
    sizes = {"batch_size": 8, "num_minibatches": 2, "micro_batch_size": 4, "num_ppo_epochs": 2, "total_episodes": 16}
    lengths = {"response_length": 8, "max_length": 64, "learning_rate": 1e-2}
    folders = {"dataset": str(world / "prompts.jsonl"), "run_dir": str(run_dir), "device": "cpu"}
    return models | sizes | lengths | folders | changed


def run(args, saved=None):
    """Run the script in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    rlhf_ppo.main(args, saved)


def train(monkeypatch, world, run_dir, **changed):
    """Run main in this process; returns (arguments, result) of the calls of its functions, by name."""
    names = "kl_penalised_rewards compute_gae policy_loss value_loss load_model sample completion_logprobs".split()
    with monkeypatch.context() as patch:
        seen = SimpleNamespace(**{name: spy_on(patch, rlhf_ppo, name) for name in names})
        seen.agents = spy_on(patch, rlhf_ppo, "Agent")
        run(rlhf_ppo.Args(**settings(world, run_dir, **changed)))
    seen.agent = seen.agents[0][1]
    seen.rollouts = [(args[1], responses) for args, responses in seen.sample if len(args[1]) == 8]
    return seen


def final(run_dir):
    """Tensors of the final model of a run."""
    return load_file(run_dir / "model" / "model.safetensors")


def same(a, b):
    """Whether two models have the same tensors bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- sampling ---


def draw(model, prompts, uniform, stops):
    """Responses of a model that has nothing but `stops` in its generation config, as main leaves it."""
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=0)
    return rlhf_ppo.sample(model, prompts, uniform)


@pytest.mark.parametrize("arch", ARCHS)
def test_samples_have_the_probabilities_of_the_training_forward_pass(arch, tmp_path):
    model, n = tiny.make_model(tmp_path, arch), 4000
    short, long = [5, 6], [4, 5, 6, 7, 8]  # padded on the left
    grid = torch.rand(2 * n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grid[:, 0] = 0.5  # the same first token everywhere
    grid[:n, 1] = grid[n:, 1] = (torch.arange(n) + 0.5) / n  # numbers that fill [0, 1) evenly
    drawn = torch.tensor(draw(model, [short] * n + [long] * n, grid, [-1]))
    for prompt, rows in ((short, drawn[:n]), (long, drawn[n:])):
        assert (rows[:, 0] == rows[0, 0]).all()
        share = rows[:, 1].bincount(minlength=model.config.vocab_size) / n
        texts = [[prompt, [rows[0, 0].item(), token]] for token in range(len(share))]
        with torch.no_grad():
            logprobs, _ = rlhf_ppo.completion_logprobs(model, texts, CPU)
        torch.testing.assert_close(share, logprobs[:, 1].exp(), rtol=0, atol=2 / n)


@pytest.mark.parametrize("arch", tiny.CONFIGS)
def test_a_left_padded_batch_samples_like_single_sequences(arch, tmp_path):
    model = tiny.make_model(tmp_path, arch)
    prompts = [[5] * (1 + row % 3) + [4 + row] for row in range(16)]  # lengths 2 to 4, all different
    uniform = torch.rand(16, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = draw(model, prompts, uniform, [EOS, 7])
    assert len({len(response) for response in together}) > 4
    assert together == [draw(model, [prompt], row[None], [EOS, 7])[0] for prompt, row in zip(prompts, uniform)]


def test_a_model_that_takes_no_positions_is_refused_since_padding_would_change_its_samples(world, tmp_path):
    small = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
    torch.manual_seed(0)
    tokenizer = tiny.word_tokenizer()
    bart = AutoModelForCausalLM.from_config(BartConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **small))
    for parameter in bart.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else None
    bart.save_pretrained(tmp_path / "bart")
    tokenizer.save_pretrained(tmp_path / "bart")
    with pytest.raises(SystemExit, match="bart samples otherwise beside a longer prompt"):
        run(rlhf_ppo.Args(**settings(world, tmp_path / "run", model=str(tmp_path / "bart"))))


class Constant(LlamaForCausalLM):
    """A model whose next token has the same distribution everywhere."""

    def __init__(self, logits):
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        super().__init__(LlamaConfig(vocab_size=len(logits), **sizes))
        self.next_logits = logits

    def forward(self, input_ids, **inputs):
        return CausalLMOutputWithPast(logits=self.next_logits.expand(*input_ids.shape, -1))


def test_a_draw_never_has_probability_0_and_follows_the_distribution():
    model = Constant(torch.tensor([-math.inf, 0.0, -math.inf, math.log(3), -math.inf]))
    uniform = torch.tensor([[0], [0.2], [0.2499], [0.2501], [0.9], [1 - 2**-53]], dtype=torch.float64)
    assert draw(model, [[0]] * 6, uniform, [-1]) == [[1], [1], [1], [3], [3], [3]]


def test_a_response_ends_at_the_first_of_all_stop_tokens(tmp_path):
    model = tiny.make_model(tmp_path)
    uniform = torch.rand(64, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    free = draw(model, [[5]] * 64, uniform, [-1])
    for whole, row in zip(free, draw(model, [[5]] * 64, uniform, [7, 11])):
        ends = [t for t, token in enumerate(whole) if token in (7, 11)]
        assert len(whole) == 20 and row == whole[: ends[0] + 1 if ends else 20]


def test_a_temperature_or_a_penalty_of_the_generation_config_changes_no_sample_and_is_saved(
    monkeypatch, world, tmp_path
):
    model = AutoModelForCausalLM.from_pretrained(world / "llama")
    for name, value in (("do_sample", True), ("temperature", 0.1), ("top_k", 1), ("repetition_penalty", 9.0)):
        setattr(model.generation_config, name, value)
    model.save_pretrained(tmp_path / "model")
    tiny.word_tokenizer().save_pretrained(tmp_path / "model")
    plain = train(monkeypatch, world, tmp_path / "a", total_episodes=8).rollouts
    assert train(monkeypatch, world, tmp_path / "b", total_episodes=8, model=str(tmp_path / "model")).rollouts == plain
    assert json.loads((tmp_path / "b/model/generation_config.json").read_text())["repetition_penalty"] == 9.0


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
    logprobs, ref_logprobs = logprobs * mask, ref_logprobs * mask
    scores = torch.randn(len(mask), generator=generator, dtype=torch.float64)
    rewards = rlhf_ppo.kl_penalised_rewards(scores, logprobs, ref_logprobs, last, 0.3)
    expected = scores - 0.3 * (logprobs - ref_logprobs).sum(1)
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
    uniform = torch.rand(200_000, 1, generator=generator, dtype=torch.float64)
    token = torch.tensor(draw(Constant(policy), [[0]] * len(uniform), uniform, [-1]))
    one = torch.ones(len(uniform), 1)
    penalty = -rlhf_ppo.kl_penalised_rewards(torch.zeros(len(uniform)), policy[token], reference[token], one, 1.0)
    assert exact > 0.2 and abs(penalty.mean() - exact) < 4 * penalty.std() / len(uniform) ** 0.5


@pytest.mark.parametrize("arch", ARCHS)
def test_values_are_of_the_state_before_each_token(world, arch):
    critic = AutoModelForSequenceClassification.from_pretrained(world / f"{arch}-reward")
    agent = rlhf_ppo.Agent(AutoModelForCausalLM.from_pretrained(world / arch), critic)
    rows = [[[4, 5], [6, 7, EOS], [0]], [[4], [8, 9, 10, 11, 5, EOS], [1]]]
    with torch.no_grad():
        logprobs, values = agent(rows)
        expected = [  # a classifier's logit is its head on the last token
            critic(torch.tensor([prompt + response[:t]])).logits[0, 0]
            for prompt, response, _ in rows for t in range(len(response))
        ]  # fmt: skip
        _, changed = agent([[[4, 5], [6, 7, 9], [0]], rows[1]])
    torch.testing.assert_close(values, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert len(logprobs) == 9 and torch.equal(values, changed)  # the last token of a response is in no state


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
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - update / updates)
        with torch.no_grad():
            p = (logprobs_of(logits, everything) * masks).sum(1).exp()
            rows = torch.multinomial(p, 2048, replacement=True, generator=generator)
            mask = masks[rows]
            last = mask - pad(mask[:, 1:], (0, 1))
            old, old_values = logprobs_of(logits, rows) * mask, values[of_token[rows]] * mask
            ref = logprobs_of(reference, rows) * mask
            rewards = rlhf_ppo.kl_penalised_rewards(reward[rows], old, ref, last, beta)
            following = pad(old_values[:, 1:], (0, 1))
            advantages = rlhf_ppo.compute_gae(rewards.T, old_values.T, following.T, last.T, last.T, 1.0, 0.95).T
            returns, n = advantages + old_values, mask > 0
            advantages = (advantages - advantages[n].mean()) / advantages[n].std(correction=0)
        for _ in range(4):
            log_ratio = (logprobs_of(logits, rows) - old)[n]
            v_loss = rlhf_ppo.value_loss(values[of_token[rows]][n], old_values[n], returns[n], 0.2)
            loss = (rlhf_ppo.policy_loss(log_ratio, advantages[n], 0.2) + 0.5 * v_loss).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    found = (logprobs_of(logits.detach(), everything) * masks).sum(1)
    kl, kl_at_start = (found.exp() * (found - best)).sum(), (start.exp() * (start - best)).sum()
    assert kl_at_start > 0.5 and 0 <= kl < 0.01, (kl_at_start, kl)


# --- whole runs ---


@pytest.mark.parametrize("micro_batch_size", [4, 2, 1])
def test_before_the_first_step_ratio_and_kl_are_exactly_neutral(monkeypatch, world, tmp_path, micro_batch_size):
    seen = train(monkeypatch, world, tmp_path, micro_batch_size=micro_batch_size, total_episodes=8)
    for (log_ratio, *_), _ in seen.policy_loss[: 4 // micro_batch_size]:
        assert log_ratio.abs().max() <= 2e-6  # a few units in the last place of log-probabilities near 5
    ((_, logprobs, ref_logprobs, *_), _) = seen.kl_penalised_rewards[0]
    assert torch.equal(logprobs, ref_logprobs) and scalars(tmp_path, "objective/kl") == [(1, 0.0)]


def test_the_ratio_is_to_the_policy_that_sampled(monkeypatch, world, tmp_path):
    seen = train(monkeypatch, world, tmp_path, num_minibatches=1, num_ppo_epochs=1)
    (_, logprobs, ref_logprobs, *_), _ = seen.kl_penalised_rewards[1]
    assert not torch.equal(logprobs, ref_logprobs)
    for (log_ratio, *_), _ in seen.policy_loss:  # one step a rollout, from the policy that sampled
        assert log_ratio.abs().max() <= 2e-6


def test_scores_sit_on_the_last_tokens_and_missing_stops_cost_once(monkeypatch, world, tmp_path):
    changed = {"missing_eos_penalty": 2.5, "gae_lambda": 1.0, "total_episodes": 24, "save_every": 0}
    seen = train(monkeypatch, world, tmp_path, **changed)
    reward_model = AutoModelForSequenceClassification.from_pretrained(world / "llama-reward")
    stops = []
    for update, ((scores, logprobs, ref_logprobs, last, beta), token_rewards) in enumerate(seen.kl_penalised_rewards):
        stopped = [response[-1] == EOS for response in seen.rollouts[update][1]]
        for prompt, response, score in zip(*seen.rollouts[update], scores):  # one by one, without padding
            with torch.no_grad():
                alone = reward_model(torch.tensor([prompt + response])).logits[0, 0]
            torch.testing.assert_close(score, alone - 2.5 * (response[-1] != EOS), rtol=1e-4, atol=1e-5)
        stops.append(sum(stopped) / len(stopped))
        assert (last.sum(1) == 1).all() and torch.equal(last.argmax(1), (logprobs != 0).sum(1) - 1)
        torch.testing.assert_close(token_rewards.sum(1), scores - beta * (logprobs - ref_logprobs).sum(1))
        (_, values, *_), advantages = seen.compute_gae[update]
        torch.testing.assert_close((advantages + values)[0], token_rewards.sum(1))
    assert [value for _, value in scalars(tmp_path, "val/num_eos_tokens")] == pytest.approx(stops)
    assert 0 < sum(stops) < 3


def test_log_probabilities_belong_to_their_own_response(monkeypatch, world, tmp_path):
    seen = train(monkeypatch, world, tmp_path, num_minibatches=1, micro_batch_size=8, total_episodes=8)
    policy = AutoModelForCausalLM.from_pretrained(world / "llama")
    (_, logprobs, *_), _ = seen.kl_penalised_rewards[0]
    with torch.no_grad():
        rows = [list(row) for row in zip(*seen.rollouts[0])]
        expected = [rlhf_ppo.completion_logprobs(policy, [row], CPU)[0].sum().item() for row in rows]
    assert logprobs.sum(1).tolist() == pytest.approx(expected, abs=1e-4)


def test_advantages_are_whitened_over_the_response_tokens_of_the_rollout(monkeypatch, world, tmp_path):
    changed = {"num_minibatches": 1, "num_ppo_epochs": 1, "total_episodes": 8, "response_length": 16}
    seen = train(monkeypatch, world, tmp_path, **changed)
    advantages = torch.cat([args[1] for args, _ in seen.policy_loss])
    (_, _, _, last, *_), raw = seen.compute_gae[0]
    assert len(advantages) == sum(t + 1 for t in last.argmax(0)) < raw.numel()
    assert abs(advantages.mean()) < 1e-5 and advantages.std(correction=0) == pytest.approx(1, abs=1e-4)
    assert raw.sum().abs() > 1e-2  # they were not before


def test_reward_model_and_reference_stay_what_they_were_and_the_critic_starts_at_0(monkeypatch, world, tmp_path):
    seen = train(monkeypatch, world, tmp_path)
    policy = AutoModelForCausalLM.from_pretrained(world / "llama").state_dict()
    reward = AutoModelForSequenceClassification.from_pretrained(world / "llama-reward").state_dict()
    (_, (scorer, _)) = seen.load_model[1]
    assert same(scorer.state_dict(), reward) and not same(seen.agent.critic.state_dict(), reward)
    trained = seen.agent.policy.state_dict()
    assert not same(trained, policy) and same(
        final(tmp_path), {n: x for n, x in trained.items() if n != "lm_head.weight"}
    )
    (_, values, *_), _ = seen.compute_gae[0]
    assert (values == 0).all() and (seen.compute_gae[1][0][1] != 0).any()
    ids = torch.tensor([[4, 5, 6, 7, 8]])  # the reference of the second rollout is the policy of the first
    first, second = (call[0][2] for call in seen.kl_penalised_rewards)
    assert not torch.equal(first, second) and ids.numel() == 5
    for (_, logprobs, ref_logprobs, *_), _ in seen.kl_penalised_rewards[1:]:
        assert not torch.equal(logprobs, ref_logprobs)


def test_the_reference_is_the_starting_policy_in_every_rollout(monkeypatch, world, tmp_path):
    seen = train(monkeypatch, world, tmp_path, micro_batch_size=1, num_minibatches=2)
    start_model = AutoModelForCausalLM.from_pretrained(world / "llama")
    rows = [list(row) for row in zip(*seen.rollouts[1])]
    _, _, ref_logprobs, *_ = seen.kl_penalised_rewards[1][0]
    with torch.no_grad():
        expected = [rlhf_ppo.completion_logprobs(start_model, [row], CPU)[0].sum().item() for row in rows]
    assert ref_logprobs.sum(1).tolist() == pytest.approx(expected, rel=1e-4)


def test_micro_batches_add_up_to_the_whole_batch(monkeypatch, world, tmp_path):
    changed = {"num_minibatches": 1, "num_ppo_epochs": 1, "total_episodes": 8}
    for size in (8, 1):
        train(monkeypatch, world, tmp_path / str(size), micro_batch_size=size, **changed)
    a, b = final(tmp_path / "8"), final(tmp_path / "1")
    before = load_file(world / "llama" / "model.safetensors")
    for name in a:
        torch.testing.assert_close(b[name] - before[name], a[name] - before[name], rtol=1e-3, atol=2e-4)
    for tag in ("grad_norm", "loss/value", "val/ratio"):
        one, eight = (scalars(tmp_path / size, tag)[0][1] for size in ("1", "8"))
        assert one == pytest.approx(eight, rel=1e-5), tag


def test_absolute_positions_train_too(monkeypatch, world, tmp_path):
    models = {"model": str(world / "gpt2"), "reward_model": str(world / "gpt2-reward")}
    train(monkeypatch, world, tmp_path, **models)
    before = load_file(world / "gpt2" / "model.safetensors")
    assert not any(torch.equal(tensor, before[name]) for name, tensor in final(tmp_path).items() if tensor.dim() > 1)


def test_the_true_reward_is_logged_beside_the_score(monkeypatch, world, tmp_path):
    (tmp_path / "gold.py").write_text(
        "def gold_reward(prompt, response, finished):\n"
        "    assert prompt.endswith(':') and '<eos>' not in response\n"
        "    return 1.0 if finished else -1.0\n"
    )
    train(monkeypatch, world, tmp_path / "run", gold=str(tmp_path / "gold.py"))
    golds, stopped = (scalars(tmp_path / "run", tag) for tag in ("objective/gold", "val/num_eos_tokens"))
    assert [gold for _, gold in golds] == pytest.approx([2 * share - 1 for _, share in stopped]) and len(golds) == 2


def test_prompts_are_encoded_as_before_an_answer_and_those_without_room_left_out(tmp_path, capsys):
    tokenizer = tiny.word_tokenizer()
    user = {"role": "user", "content": "review"}
    for name, prompt, ids in (
        ("text", "review of plot :", tokenizer("review of plot :").input_ids),
        ("messages", [user], tokenizer("user : review assistant :").input_ids),
    ):
        path = tiny.write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": prompt, "chosen": "x", "extra": 1}] * 2)
        row = {"prompt": prompt, "chosen": "x", "extra": 1}
        assert rlhf_ppo.load_prompts(str(path), "train", tokenizer, 64) == [(ids, row)] * 2
    for name, changed, ids in (
        ("a prompt beside messages is the user's", {"prompt": "review", "chosen": [user]}, "user : review assistant :"),
        ("an answer begun goes on", {"prompt": [user, {"role": "assistant", "content": "the plot"}]},
         "user : review assistant : the plot"),
        ("an EOS behind a prompt is not read", {"prompt": "review of plot :<eos>"}, "review of plot :"),
    ):  # fmt: skip
        path = tiny.write_jsonl(tmp_path / "one.jsonl", [changed])
        assert rlhf_ppo.load_prompts(str(path), "train", tokenizer, 64)[0][0] == tokenizer(ids).input_ids, name
    rows = [{"prompt": "review :"}, {"prompt": " "}, {"prompt": "review " * 9}]
    path = tiny.write_jsonl(tmp_path / "some.jsonl", rows)
    assert len(rlhf_ppo.load_prompts(str(path), "train", tokenizer, 8)) == 1
    assert "2 of 3 prompts left out" in capsys.readouterr().out


REWARD = """
def words(prompts, completions, place, **columns):
    assert list(columns) == ["extra", "ids"] and len(place) == len(prompts) in (4, 8)  # a whole rollout, or the samples
    assert columns["ids"] == [[number] for number in place]
    assert not any(special in text for text in completions for special in ("<eos>", "<pad>", "<unk>"))
    return [len(text.split()) + 100 * number for text, number in zip(completions, place)]

def fails(prompts, completions, **columns):
    raise KeyError("answer")

def too_few(prompts, completions, **columns):
    return [1.0]

def not_a_number(prompts, completions, **columns):
    return [float("nan") if "film" in prompt else 1.0 for prompt in prompts]
"""


@pytest.fixture
def rewarded(world, tmp_path):
    """Flags of a run whose reward is a function of a Python file."""
    (tmp_path / "rewards.py").write_text(REWARD)
    rows = [
        {"prompt": row["prompt"], "place": i, "extra": "x", "ids": [i]} for i, row in enumerate(tiny.preferences(8))
    ]
    tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    return lambda name: {"reward_model": f"{tmp_path / 'rewards.py'}:{name}", "dataset": str(tmp_path / "rows.jsonl")}


def test_a_function_gives_the_reward_of_each_prompt_with_its_own_columns(monkeypatch, world, tmp_path, rewarded):
    seen = train(monkeypatch, world, tmp_path / "run", total_episodes=8, missing_eos_penalty=0.0, **rewarded("words"))
    (scores, logprobs, *_), _ = seen.kl_penalised_rewards[0]
    asked = rlhf_ppo.batch_at(
        rlhf_ppo.load_prompts(str(tmp_path / "rows.jsonl"), "train", tiny.word_tokenizer(), 64), 0, 8, 1
    )
    assert [int(score) // 100 for score in scores] == [row["place"] for _, row in asked]
    assert sum(int(score) % 100 for score in scores) <= (logprobs != 0).sum() > 0  # words, without stop tokens
    trunk = AutoModelForCausalLM.from_pretrained(world / "llama").model.state_dict()
    started = seen.load_model[1][0]
    assert started[1] == str(world / "llama") and trunk.keys() == seen.agent.critic.model.state_dict().keys()
    (_, values, *_), _ = seen.compute_gae[0]
    assert (values == 0).all()


def test_conversations_come_to_a_reward_function_as_messages():
    calls, user = [], [{"role": "user", "content": "review"}]
    function = lambda prompts, completions: calls.append((prompts, completions)) or [1]
    assert rlhf_ppo.function_rewards(function, [{"prompt": user}], ["great ."]) == [1.0]
    assert calls == [([user], [[{"role": "assistant", "content": "great ."}]])]


@pytest.mark.parametrize(
    "name,words", [("too_few", "1 values for 4 completions"), ("not_a_number", "nan or inf.*the film")]
)
def test_a_reward_function_that_gives_other_than_numbers_ends_the_run(world, tmp_path, rewarded, name, words):
    with pytest.raises(SystemExit, match=words):
        run(rlhf_ppo.Args(**settings(world, tmp_path / "run", **rewarded(name))))


def test_a_reward_function_that_raises_ends_the_run_with_its_own_traceback_and_the_prompt(world, tmp_path, rewarded):
    with pytest.raises(KeyError, match="answer") as fault:
        run(rlhf_ppo.Args(**settings(world, tmp_path / "run", **rewarded("fails"))))
    assert "raised by the reward function" in fault.value.__notes__[0] and "review" in fault.value.__notes__[0]


def test_a_response_stops_at_eos_the_turns_end_and_what_the_generation_config_names(monkeypatch, world, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(world / "llama")
    model.generation_config.eos_token_id = [7, 11]
    model.save_pretrained(tmp_path / "model")
    tiny.word_tokenizer().save_pretrained(tmp_path / "model")
    seen = train(monkeypatch, world, tmp_path / "run", model=str(tmp_path / "model"), total_episodes=8)
    assert {frozenset(args[0].generation_config.eos_token_id) for args, _ in seen.sample} == {frozenset([EOS, 7, 11])}
    (_, responses), = seen.rollouts  # fmt: skip
    assert {response[-1] for response in responses if len(response) < 8} == {7, 11}  # and by chance not EOS


def test_lora_trains_adapters_and_saves_them(monkeypatch, world, tmp_path):
    seen = train(monkeypatch, world, tmp_path / "adapter", lora_rank=2, save_every=1)
    policy, critic = seen.agent.policy, seen.agent.critic
    trained = {name for name, x in seen.agent.named_parameters() if x.requires_grad}
    assert trained and all("lora" in name or name == "critic.score.weight" for name in trained)
    updated = {name.split(".")[0] for name, x in seen.agent.named_parameters() if "lora_B" in name and x.any()}
    assert updated == {"policy", "critic"}  # adapters begin at 0
    (_, logprobs, ref_logprobs, *_), _ = seen.kl_penalised_rewards[0]
    assert torch.equal(logprobs, ref_logprobs)
    (_, logprobs, ref_logprobs, *_), _ = seen.kl_penalised_rewards[1]
    assert not torch.equal(logprobs, ref_logprobs) and critic.score.weight.abs().sum() > 0
    names = load_file(tmp_path / "adapter" / "checkpoint" / "2" / "model.safetensors")
    assert trained == set(names)
    merged, _ = rlhf_ppo.load_model(rlhf_ppo.transformers.AutoModelForCausalLM, str(tmp_path / "adapter" / "model"), 64)
    base, ids = AutoModelForCausalLM.from_pretrained(world / "llama"), torch.tensor([[4, 5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, policy(ids).logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(merged(ids).logits, base(ids).logits, atol=1e-3)
    train(monkeypatch, world, tmp_path / "merged", lora_rank=2, merge_lora=True)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "model")
    with torch.no_grad():
        torch.testing.assert_close(saved(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-5)


def test_kl_coef_given_on_resume_counts(monkeypatch, world, tmp_path):
    train(monkeypatch, world, tmp_path)
    flags = ["--resume", str(tmp_path), "--total-episodes", "24", "--kl-coef", "0.01"]
    monkeypatch.setattr(sys, "argv", ["rlhf_ppo.py", *flags])
    calls = spy_on(monkeypatch, rlhf_ppo, "kl_penalised_rewards")
    run(*rlhf_ppo.parse_args())
    assert [args[-1] for args, _ in calls] == [0.01]
    assert json.loads((tmp_path / "args.json").read_text())["kl_coef"] == 0.01


# --- the whole again, in short ---


def values_of(critic, prompt, response):
    """V of the state before each token of a response."""
    hidden = critic.base_model(torch.tensor([prompt + response])).last_hidden_state
    return critic.score(hidden)[0, len(prompt) - 1 : -1, 0]


def plain_ppo(policy, critic, updates, lam):
    """PPO over the rows of each update and its minibatches, one response at a time; what each update logs."""
    reference, logged, trained = copy.deepcopy(policy), [], [*policy.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(trained)
    for step, (rows, minibatches) in enumerate(updates):
        old, ref = ({row: replay.logprobs(model, *row).detach() for row in rows} for model in (policy, reference))
        old_values = {row: values_of(critic, *row).detach() for row in rows}
        scores = [replay.score(response) for _, response in rows]
        advantages, returns = {}, {}
        for row, score in zip(rows, scores):
            rewards, values = replay.BETA * (ref[row] - old[row]), old_values[row]
            rewards[-1] += score
            deltas = rewards + torch.cat([values[1:], torch.zeros(1)]) - values  # nothing follows the last token
            n = range(len(deltas))
            advantages[row] = torch.stack([sum(lam ** (s - t) * deltas[s] for s in n if s >= t) for t in n])
            returns[row] = advantages[row] + values
        every = torch.cat([advantages[row] for row in rows])
        kl = sum((old[row] - ref[row]).sum().item() for row in rows) / len(rows)
        log = {
            "objective/kl": kl,
            "objective/entropy": -sum(old[row].sum().item() for row in rows) / len(rows),
            "objective/scores": sum(scores) / len(rows),
            "objective/rlhf_reward": sum(scores) / len(rows) - replay.BETA * kl,
            "val/num_eos_tokens": sum(response[-1] in replay.STOPS for _, response in rows) / len(rows),
            "lr": replay.LEARNING_RATE * (1 - step / len(updates)),
        }
        optimizer.param_groups[0]["lr"] = log["lr"]
        sums = Counter()
        for minibatch in minibatches:
            loss, tokens = 0, sum(len(response) for _, response in minibatch)
            for row in minibatch:
                log_ratio, values = replay.logprobs(policy, *row) - old[row], values_of(critic, *row)
                gain = replay.clipped(log_ratio, (advantages[row] - every.mean()) / every.std(correction=0))
                near = old_values[row] + (values - old_values[row]).clamp(-replay.CLIP, replay.CLIP)
                errors = torch.maximum((values - returns[row]) ** 2, (near - returns[row]) ** 2) / 2
                loss = loss + (0.1 * errors - gain).sum() / tokens
                ratio = log_ratio.exp().detach()
                sums["loss/policy"] -= gain.sum().item() / tokens
                sums["loss/value"] += errors.sum().item() / tokens
                sums["policy/approxkl"] += (ratio - 1 - ratio.log()).sum().item() / tokens
                sums["policy/clipfrac"] += ((ratio - 1).abs() > replay.CLIP).sum().item() / tokens
                sums["val/ratio"] += ratio.sum().item() / tokens
            optimizer.zero_grad()
            loss.backward()
            sums["grad_norm"] += torch.nn.utils.clip_grad_norm_(trained, 1.0).item()
            optimizer.step()
        logged.append(log | {name: value / len(minibatches) for name, value in sums.items()})
    return logged


def test_two_updates_are_those_of_a_plain_second_version(monkeypatch, tmp_path):
    flags, prompts = replay.make_world(tmp_path, prompts=16, batch_size=8)
    seen = train(monkeypatch, tmp_path, tmp_path / "run", **flags, num_ppo_epochs=replay.EPOCHS, gae_lambda=0.6)
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "model").double()
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1).double()
    torch.nn.init.zeros_(critic.score.weight)
    policy, untrained = copy.deepcopy(start), copy.deepcopy(critic)
    logged = plain_ppo(policy, critic, replay.rollouts(seen, 8, prompts), 0.6)
    for name in logged[0]:
        values = [value for _, value in scalars(tmp_path / "run", name)]
        assert values == pytest.approx([log[name] for log in logged], rel=1e-4, abs=1e-5), name
    assert replay.distance(final(tmp_path / "run"), policy, start) < 1e-3
    assert replay.distance(seen.agent.critic.state_dict(), critic, untrained) < 1e-3


# --- bad input ---

REFUSED = {
    "minibatches that don't divide": {"num_minibatches": 3},
    "empty micro-batches": {"micro_batch_size": 0},
    "less than one rollout": {"total_episodes": 7},
    "negative beta": {"kl_coef": -0.1},
    "no room for prompts": {"max_length": 8},
    "lambda": {"gae_lambda": 1.1},
}


@pytest.mark.parametrize("changed", REFUSED.values(), ids=REFUSED)
def test_flags_that_cannot_work_are_refused(world, tmp_path, changed):
    with pytest.raises(ValueError, match="must be"):
        rlhf_ppo.Args(**settings(world, tmp_path, **changed))


def refusal(world, tmp_path, **changed):
    """The sentence in which main refuses its input; nothing is written."""
    with pytest.raises(SystemExit) as stop:
        run(rlhf_ppo.Args(**settings(world, tmp_path / "run", **changed)))
    assert not (tmp_path / "run").exists()
    return str(stop.value)


def test_a_reward_model_that_does_not_fit_is_refused(world, tmp_path):
    reward_model = AutoModelForSequenceClassification.from_pretrained(world / "llama-reward")
    reward_model.save_pretrained(tmp_path / "bpe")
    tiny.bpe_tokenizer().save_pretrained(tmp_path / "bpe")
    assert "23 embeddings for 342 tokens" in refusal(world, tmp_path, reward_model=str(tmp_path / "bpe"))
    two = AutoModelForSequenceClassification.from_pretrained(world / "llama", num_labels=2)
    torch.nn.init.normal_(two.score.weight)
    two.save_pretrained(tmp_path / "two")
    tiny.word_tokenizer().save_pretrained(tmp_path / "two")
    assert "gives several scores" in refusal(world, tmp_path, reward_model=str(tmp_path / "two"))
    assert "lacks the weights ['score.weight']" in refusal(world, tmp_path, reward_model=str(world / "llama"))
    for name, tokenizer in (("bos", tiny.word_tokenizer(bos_token="<bos>")), ("chat", tiny.word_tokenizer())):
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }} .{% endfor %}"  # of another turn's end
        reward_model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        assert "reads other texts" in refusal(world, tmp_path, reward_model=str(tmp_path / name))
    tiny.make_model(tmp_path / "padded", "llama", vocab_size=64)
    assert "(23 embeddings, not 64)" in refusal(world, tmp_path, model=str(tmp_path / "padded"))


def test_too_few_prompts_are_refused(world, tmp_path):
    path = tiny.write_jsonl(tmp_path / "one.jsonl", [{"prompt": "review :"}])
    assert "1 prompts fill no batch" in refusal(world, tmp_path, dataset=str(path))
    path = tiny.write_jsonl(tmp_path / "other.jsonl", [{"question": "review :"}])
    assert "rename one of them to prompt" in refusal(world, tmp_path, dataset=str(path))
    path = tiny.write_jsonl(tmp_path / "csv.jsonl", [{"prompt": '[{"role": "user", "content": "x"}]'}] * 8)
    assert "row 1: " in refusal(world, tmp_path, dataset=str(path))
