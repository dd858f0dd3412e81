"""rlhf_ppo.py: rewards, masks, values, the critic, whole runs on tiny models, and the exact optimum.

What it shares with grpo.py is in test_rollouts.py.
"""

import copy
import itertools
from collections import Counter
from statistics import fmean

import pytest
import replay
import rlhf_ppo
import rollouts
import torch
from helpers import scalars, spy_on
from rollouts import CPU, critic_of, final, rows_of, same
from safetensors.torch import load_file
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

archs = pytest.mark.parametrize("arch", ["llama", "gpt2"])  # rotary and absolute positions
TINY_STEP = 1e-30  # a learning rate that moves no weight


@pytest.fixture(autouse=True)
def fresh_state():
    """Each run in this process has an Accelerator of its own."""
    yield
    rollouts.reset_state()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder of models and prompts."""
    return rollouts.make_world(tmp_path_factory.mktemp("world"))


SPIED = (  # functions of the script
    "kl_penalised_rewards",
    "compute_gae",
    "policy_loss",
    "value_loss",
    "response_logprobs",
    "response_values",
)


@pytest.fixture
def train(monkeypatch, world, tmp_path):
    """Run main in this process; the calls of its functions."""

    def train(run_dir=tmp_path, **changed):
        flags = rollouts.flags_of(world, "rlhf_ppo", run_dir, **changed)
        return rollouts.train(monkeypatch, "rlhf_ppo", flags, SPIED)

    return train


# --- rewards, advantages, values ---


def ragged(generator, rows=5, width=12):
    """mask (B, R) of responses of random lengths, one of them R, and `last`, 1 on the last token of each."""
    lengths = torch.randint(1, width, (rows, 1), generator=generator)
    lengths[0] = width
    positions = torch.arange(width)
    return (positions < lengths).double(), (positions == lengths - 1).double()


def test_rewards_of_tokens_are_those_by_hand_where_one_response_reaches_r():
    scores = torch.tensor([2.0, -1.0])
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -4.0, 0.0]])
    ref_logprobs = torch.tensor([[-1.5, -1.0, -3.0], [-1.5, -2.0, 0.0]])
    last = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    rewards = rlhf_ppo.kl_penalised_rewards(scores, logprobs, ref_logprobs, last, 0.5)
    assert rewards.tolist() == [[-0.25, 0.5, 2.0], [-0.5, 0.0, 0.0]]  # the last but one: -1 + 0.5·2


def test_with_lambda_1_the_first_return_is_the_score_less_beta_times_the_summed_log_ratio():
    generator = torch.Generator().manual_seed(0)
    mask, last = ragged(generator)
    logprobs, ref_logprobs, values = torch.randn(3, *mask.shape, generator=generator, dtype=torch.float64) * mask
    scores = torch.randn(len(mask), generator=generator, dtype=torch.float64)
    rewards = rlhf_ppo.kl_penalised_rewards(scores, logprobs, ref_logprobs, last, 0.3)
    expected = scores - 0.3 * (logprobs - ref_logprobs).sum(1)
    torch.testing.assert_close(rewards.sum(1), expected)
    assert (rewards[mask == 0] == 0).all()
    next_values = pad(values[:, 1:], (0, 1))
    advantages = rlhf_ppo.compute_gae(rewards.T, values.T, next_values.T, last.T, last.T, 1.0, 1.0).T
    torch.testing.assert_close((advantages + values)[:, 0], expected)


def test_the_mean_penalty_is_the_exact_kl_and_its_sign_that_of_the_kl():
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    one = torch.ones(6, 1)
    rewards = rlhf_ppo.kl_penalised_rewards(torch.zeros(6), policy[:, None], reference[:, None], one, 1.0)
    penalty = -rewards[:, 0]
    exact = (policy.exp() * (policy - reference)).sum()
    other = (reference.exp() * (reference - policy)).sum()
    assert exact > 0.2
    assert abs(exact - other) > 0.02
    assert (policy.exp() * penalty).sum().item() == pytest.approx(exact.item())


@archs
@pytest.mark.parametrize("R", [6, 9])  # the second response reaches R, or has room behind it
def test_values_are_of_the_state_before_each_token_and_0_behind_a_responses_end(world, arch, R):
    reward_model = AutoModelForSequenceClassification.from_pretrained(world / f"{arch}-reward")
    critic = rlhf_ppo.TokenScores(reward_model)
    rows = [[[4, 5], [6, 7, 1]], [[4], [8, 9, 10, 11, 5, 1]]]
    with torch.no_grad():
        values = rlhf_ppo.response_values(critic, rows, R, CPU)
        changed = rlhf_ppo.response_values(critic, [[[4, 5], [6, 7, 9]], rows[1]], R, CPU)
    assert values.shape == (2, R)
    for row_values, (prompt, response) in zip(values, rows):
        for t in range(len(response)):
            with torch.no_grad():  # a classifier's logit is its head on the last token
                expected = reward_model(torch.tensor([prompt + response[:t]])).logits[0, 0]
            torch.testing.assert_close(row_values[t], expected, rtol=1e-4, atol=1e-5)
        assert (row_values[len(response) :] == 0).all()
    assert torch.equal(values, changed)  # the last token of a response is in no state


def test_ppo_reaches_the_optimum_of_a_world_that_can_be_enumerated():
    """Vocabulary 6, up to 4 tokens of which 0 stops: π* ∝ π_ref·exp(r/β) over all 781 responses."""
    generator = torch.Generator().manual_seed(0)
    V, R, beta = 6, 4, 0.5
    responses = []
    for length in range(1, R + 1):
        for row in itertools.product(range(V), repeat=length):
            if 0 not in row[:-1] and (row[-1] == 0 or length == R):
                responses.append(row)
    assert len(responses) == 781
    contexts = {}
    for length in range(R):
        for context in itertools.product(range(V), repeat=length):
            contexts[context] = len(contexts)
    of_token = torch.zeros(len(responses), R, dtype=torch.long)
    tokens = torch.zeros(len(responses), R, dtype=torch.long)
    masks = torch.zeros(len(responses), R)
    for i, row in enumerate(responses):
        tokens[i, : len(row)] = torch.tensor(row)
        masks[i, : len(row)] = 1.0
        for t in range(len(row)):
            of_token[i, t] = contexts[row[:t]]
    reward = torch.randn(len(responses), generator=generator)
    reference = torch.randn(len(contexts), V, generator=generator)
    logits = reference.clone().requires_grad_()
    values = torch.zeros(len(contexts), requires_grad=True)

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
            old = logprobs_of(logits, rows) * mask
            old_values = values[of_token[rows]] * mask
            ref = logprobs_of(reference, rows) * mask
            rewards = rlhf_ppo.kl_penalised_rewards(reward[rows], old, ref, last, beta)
            following = pad(old_values[:, 1:], (0, 1))
            advantages = rlhf_ppo.compute_gae(rewards.T, old_values.T, following.T, last.T, last.T, 1.0, 0.95).T
            returns = advantages + old_values
            n = mask > 0
            advantages = (advantages - advantages[n].mean()) / advantages[n].std(correction=0)
        for _ in range(4):
            log_ratio = (logprobs_of(logits, rows) - old)[n]
            v_loss = rlhf_ppo.value_loss(values[of_token[rows]][n], old_values[n], returns[n], 0.2)
            loss = (rlhf_ppo.policy_loss(log_ratio, advantages[n], 0.2) + 0.5 * v_loss).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    found = (logprobs_of(logits.detach(), everything) * masks).sum(1)
    kl = (found.exp() * (found - best)).sum()
    kl_at_start = (start.exp() * (start - best)).sum()
    assert kl_at_start > 0.5
    assert 0 <= kl < 0.01


# --- whole runs ---


def test_rewards_sit_on_the_last_tokens_of_responses_whether_or_not_they_reach_r(train):
    seen = train(gae_lambda=1.0, total_episodes=24, save_every=0, response_length=20)
    reached = 0
    for rollout, call, gae in zip(seen.rollouts, seen.kl_penalised_rewards, seen.compute_gae, strict=True):
        lengths = [len(response) for response in rollout.result]
        reached += lengths.count(20)
        assert call.last.shape == (8, 20)
        assert call.last.argmax(1).tolist() == [length - 1 for length in lengths]
        assert (call.last.sum(1) == 1).all()
        kl = (call.logprobs - call.ref_logprobs).sum(1)
        torch.testing.assert_close(call.result.sum(1), call.scores - call.kl_coef * kl)
        torch.testing.assert_close((gae.result + gae.values)[0], call.result.sum(1))
    assert 0 < reached < 24


def test_log_probabilities_belong_to_their_own_response(train, world):
    seen = train(num_minibatches=1, micro_batch_size=8, total_episodes=8)
    policy = AutoModelForCausalLM.from_pretrained(world / "llama")
    (call,) = seen.kl_penalised_rewards
    for logprobs, row in zip(call.logprobs, rows_of(seen.rollouts[0])):
        with torch.no_grad():
            expected = rlhf_ppo.response_logprobs(policy, [row], 8, CPU)[0]
        torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-5)


def test_advantages_are_whitened_over_the_response_tokens_of_the_rollout(train):
    seen = train(**rollouts.one_step("rlhf_ppo"), response_length=16)
    lengths = {str(row): len(row[1]) for row in rows_of(seen.rollouts[0])}
    trained = [call for call in seen.response_logprobs if call.result.requires_grad]
    whitened = []
    for call, loss in zip(trained, seen.policy_loss, strict=True):
        for row, advantages in zip(call.rows, loss.advantages):
            whitened.append(advantages[: lengths[str(row)]])
    whitened = torch.cat(whitened)
    (gae,) = seen.compute_gae
    assert len(whitened) == sum(lengths.values()) < gae.result.numel()
    assert abs(whitened.mean()) < 1e-5
    assert whitened.std(correction=0) == pytest.approx(1, abs=1e-4)
    assert gae.result.sum().abs() > 1e-2  # they were not before


def test_the_reward_model_stays_what_it_was_and_policy_and_critic_do_not(train, world, tmp_path):
    seen = train(save_every=0)
    reward = load_file(world / "llama-reward" / "model.safetensors")
    critic = critic_of(tmp_path, 2)
    assert critic.keys() == reward.keys()
    for name, tensor in critic.items():
        assert tensor.dim() == 1 or not torch.equal(tensor, reward[name]), name
    policy = load_file(world / "llama" / "model.safetensors")
    trained = final(tmp_path)
    for name, tensor in policy.items():
        assert tensor.dim() == 1 or not torch.equal(tensor, trained[name]), name
    model = AutoModelForSequenceClassification.from_pretrained(world / "llama-reward")
    last = seen.kl_penalised_rewards[-1]
    for score, (prompt, response) in zip(last.scores, rows_of(seen.rollouts[-1])):
        with torch.no_grad():
            alone = model(torch.tensor([prompt + response])).logits[0, 0]
        torch.testing.assert_close(score, alone - float(response[-1] != 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source", ["the reward model", "the policy where the reward is a function"])
def test_the_critic_starts_from(train, world, tmp_path, source):
    changed = {"learning_rate": TINY_STEP, "total_episodes": 8}
    origin = world / "llama-reward"
    if source != "the reward model":
        origin = world / "llama"
        (tmp_path / "ones_of_the_critic.py").write_text(
            "def reward(prompts, completions, **columns):\n    return [1.0] * len(prompts)\n"
        )
        changed["reward_model"] = f"{tmp_path / 'ones_of_the_critic.py'}:reward"
    seen = train(**changed)
    start = load_file(origin / "model.safetensors")
    critic = critic_of(tmp_path, 1)
    head = critic.pop("score.weight")
    start.pop("score.weight", None)
    assert same(critic, start)
    assert head.abs().max() < 1e-20
    assert (seen.compute_gae[0].values == 0).all()


def test_the_critic_has_adapters_in_all_linear_layers_and_its_whole_head_is_trained(train, tmp_path):
    train(lora_rank=2, save_every=0)
    critic = critic_of(tmp_path, 2)
    head = critic.pop("score.weight")
    assert head.abs().sum() > 0
    assert critic
    assert all(".lora_" in name for name in critic)
    layers = {name.split(".lora_")[0].split(".")[-1] for name in critic}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(tensor.any() for name, tensor in critic.items() if "lora_B" in name)  # adapters begin at 0
    (rank,) = {tensor.shape[0] for name, tensor in critic.items() if "lora_A" in name}
    assert rank == 2


def test_adapters_of_policy_and_critic_have_twice_their_rank_as_alpha(train, tmp_path, monkeypatch):
    added = spy_on(monkeypatch, rlhf_ppo, "add_adapters")
    train(lora_rank=3, total_episodes=8)
    assert len(added) == 2
    for call in added:
        (config,) = call.model.peft_config.values()
        assert config.r == 3
        assert config.lora_alpha == 6


def test_values_weigh_a_tenth_in_the_gradient_and_the_head_alone_has_one_at_first(train, tmp_path):
    """The head begins at 0, so no gradient reaches the critic's trunk before the first step."""
    seen = train(**rollouts.one_step("rlhf_ppo"), save_every=0)
    state = torch.load(tmp_path / "checkpoint" / "1" / "optimizer_1.bin", weights_only=True)["state"]
    gradients = [moments["exp_avg"].abs().sum().item() for moments in state.values()]
    assert [gradient > 0 for gradient in gradients] == [False] * (len(gradients) - 1) + [True]
    (gae,) = seen.compute_gae
    ((_, loss),) = scalars(tmp_path, "loss/value")
    tokens = sum(len(response) for response in seen.rollouts[0].result)
    assert loss == pytest.approx(0.5 * (gae.result**2).sum().item() / tokens, rel=1e-4)  # V is 0, A the return


# --- the whole again, in short ---


def values_of(critic, prompt, response):
    """V of the state before each token of a response."""
    hidden = critic.base_model(torch.tensor([prompt + response])).last_hidden_state
    return critic.score(hidden)[0, len(prompt) - 1 : -1, 0]


def plain_ppo(policy, critic, updates, lam):
    """PPO over the rows of each update and its minibatches, one response at a time; what each update logs."""
    reference = copy.deepcopy(policy)
    logged = []
    trained = [*policy.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(trained)
    for step, (rows, minibatches) in enumerate(updates):
        old = {row: replay.logprobs(policy, *row).detach() for row in rows}
        ref = {row: replay.logprobs(reference, *row).detach() for row in rows}
        old_values = {row: values_of(critic, *row).detach() for row in rows}
        scores = [replay.score(response) for _, response in rows]
        advantages = {}
        returns = {}
        for row, score in zip(rows, scores):
            rewards = replay.BETA * (ref[row] - old[row])
            values = old_values[row]
            rewards[-1] += score
            deltas = rewards + torch.cat([values[1:], torch.zeros(1)]) - values  # nothing follows the last token
            advantages[row] = torch.zeros_like(deltas)
            for t in range(len(deltas)):
                for later in range(t, len(deltas)):
                    advantages[row][t] += lam ** (later - t) * deltas[later]
            returns[row] = advantages[row] + values
        every = torch.cat([advantages[row] for row in rows])
        kl = fmean((old[row] - ref[row]).sum().item() for row in rows)
        log = {"objective/kl": kl, "objective/scores": fmean(scores)}
        log["objective/entropy"] = fmean(-old[row].sum().item() for row in rows)
        log["objective/rlhf_reward"] = fmean(scores) - replay.BETA * kl
        log["val/num_eos_tokens"] = fmean(response[-1] in replay.STOPS for _, response in rows)
        log["lr"] = replay.LEARNING_RATE * (1 - step / len(updates))
        optimizer.param_groups[0]["lr"] = log["lr"]
        sums = Counter()
        for minibatch in minibatches:
            loss = 0
            tokens = sum(len(response) for _, response in minibatch)
            for row in minibatch:
                log_ratio = replay.logprobs(policy, *row) - old[row]
                values = values_of(critic, *row)
                whitened = (advantages[row] - every.mean()) / every.std(correction=0)
                gain = replay.clipped(log_ratio, whitened)
                near = old_values[row] + (values - old_values[row]).clamp(-replay.CLIP, replay.CLIP)
                error = (values - returns[row]) ** 2
                clipped_error = (near - returns[row]) ** 2
                errors = torch.maximum(error, clipped_error) / 2
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


@pytest.mark.parametrize("lam", [0.6, 1.0])
def test_two_updates_are_those_of_a_plain_second_version(train, tmp_path, lam):
    flags, prompts = replay.make_world(tmp_path, prompts=16, batch_size=8)
    seen = train(tmp_path / "run", **flags, gae_lambda=lam)
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "model").double()
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1).double()
    torch.nn.init.zeros_(critic.score.weight)
    policy = copy.deepcopy(start)
    untrained = copy.deepcopy(critic)
    logged = plain_ppo(policy, critic, replay.rollouts(seen, 8, prompts), lam)
    for name in logged[0]:
        values = [value for _, value in scalars(tmp_path / "run", name)]
        assert values == pytest.approx([log[name] for log in logged], rel=1e-4, abs=1e-5), name
    assert replay.distance(final(tmp_path / "run"), policy, start) < 1e-3
    assert replay.distance(critic_of(tmp_path / "run", 2), critic, untrained) < 1e-3


# --- bad input ---

REFUSED = {
    "minibatches that don't divide": {"num_minibatches": 3},
    "empty micro-batches": {"micro_batch_size": 0},
    "no epochs": {"num_ppo_epochs": 0},
    "no tokens": {"response_length": 0},
    "less than one rollout": {"total_episodes": 7},
    "negative beta": {"kl_coef": -0.1},
    "no clip range": {"clip_coef": 0.0},
    "no room for prompts": {"max_length": 8},
    "lambda": {"gae_lambda": 1.1},
}


@pytest.mark.parametrize("changed", REFUSED.values(), ids=REFUSED)
def test_flags_that_cannot_work_are_refused(world, tmp_path, changed):
    with pytest.raises(ValueError, match="must"):
        rlhf_ppo.Args(**rollouts.flags_of(world, "rlhf_ppo", tmp_path, **changed))
