"""What rlhf_ppo.py and grpo.py share: sampling, what gives the score, prompts, and what main does with its flags."""

import importlib
import json
import math
import os
import random
import re
import shutil
import sys
from pathlib import Path

import pytest
import replay
import rollouts
import tiny
import torch
from forks import FORCED_FSDP2, fork_two
from helpers import ALGOS, scalars
from rollouts import CPU, EOS, SCRIPTS, rows_of, same, train
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

scripts = pytest.mark.parametrize("script", SCRIPTS)
archs = pytest.mark.parametrize("arch", ["llama", "gpt2"])  # rotary and absolute positions
USER = {"role": "user", "content": "review of plot :"}


@pytest.fixture(autouse=True)
def fresh_state():
    """Each run in this process has an Accelerator of its own."""
    yield
    rollouts.reset_state()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder of models and prompts."""
    return rollouts.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each of the two scripts."""
    return request.param


@pytest.fixture
def module(script):
    """The script, imported."""
    return importlib.import_module(script)


def noise(*shape, seed=0):
    """Uniform numbers as rollouts draw them."""
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- sampling ---


def draw(module, model, prompts, uniform, stops):
    """Responses of a model that has nothing but `stops` in its generation config, as main leaves it; -1 is none."""
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=max(0, stops[0]))
    return module.sample(model, prompts, uniform)


@archs
def test_samples_have_the_probabilities_of_the_training_forward_pass(module, arch, tmp_path):
    model = tiny.make_model(tmp_path, arch)
    n = 4000
    short = [5, 6]  # padded on the left
    long = [4, 5, 6, 7, 8]
    uniform = noise(2 * n, 2)
    uniform[:, 0] = 0.5  # the same first token everywhere
    uniform[:n, 1] = uniform[n:, 1] = (torch.arange(n) + 0.5) / n  # numbers that fill [0, 1) evenly
    prompts = [short] * n + [long] * n
    drawn = torch.tensor(draw(module, model, prompts, uniform, [-1]))
    for prompt, responses in ((short, drawn[:n]), (long, drawn[n:])):
        first = responses[0, 0].item()
        assert (responses[:, 0] == first).all()
        share = responses[:, 1].bincount(minlength=model.config.vocab_size) / n
        rows = [[prompt, [first, token]] for token in range(len(share))]
        with torch.no_grad():
            logprobs = module.response_logprobs(model, rows, 2, CPU)
        torch.testing.assert_close(share, logprobs[:, 1].exp(), rtol=0, atol=2 / n)


@pytest.mark.parametrize("arch", tiny.CONFIGS)
def test_a_left_padded_batch_samples_like_single_sequences(module, arch, tmp_path):
    model = tiny.make_model(tmp_path, arch)
    prompts = [[5] * (1 + row % 3) + [4 + row] for row in range(16)]  # lengths 2 to 4, all different
    uniform = noise(16, 20)
    together = draw(module, model, prompts, uniform, [EOS, 7])
    assert len({len(response) for response in together}) > 4
    for prompt, numbers, response in zip(prompts, uniform, together):
        assert [response] == draw(module, model, [prompt], numbers[None], [EOS, 7])


class Constant(LlamaForCausalLM):
    """A model whose next token has the same distribution everywhere."""

    def __init__(self, logits):
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        super().__init__(LlamaConfig(vocab_size=len(logits), **sizes))
        self.next_logits = logits

    def forward(self, input_ids, **inputs):
        return CausalLMOutputWithPast(logits=self.next_logits.expand(*input_ids.shape, -1))


def test_a_draw_never_has_probability_0_and_follows_the_distribution(module):
    logits = torch.tensor([-math.inf, 0.0, -math.inf, math.log(3), -math.inf])
    numbers = [0, 0.2, 0.2499, 0.2501, 0.9, 1 - 2**-53]
    uniform = torch.tensor(numbers, dtype=torch.float64)[:, None]
    drawn = draw(module, Constant(logits), [[0]] * 6, uniform, [-1])
    assert drawn == [[1]] * 3 + [[3]] * 3


def test_a_response_ends_at_the_first_of_all_stop_tokens(module, tmp_path):
    model = tiny.make_model(tmp_path)
    uniform = noise(64, 20)
    free = draw(module, model, [[5]] * 64, uniform, [-1])
    both = 0
    for whole, response in zip(free, draw(module, model, [[5]] * 64, uniform, [7, 11])):
        ends = [t for t, token in enumerate(whole) if token in (7, 11)]
        both += {7, 11} <= {*whole}
        assert len(whole) == 20
        assert response == whole[: ends[0] + 1 if ends else 20]
    assert both > 5  # in these the second kind of stop would also end a response, later


@archs
def test_generation_of_ordinary_models_has_the_logits_of_a_whole_pass(module, arch, tmp_path):
    model = tiny.make_model(tmp_path, arch)
    model.generation_config = GenerationConfig(eos_token_id=[EOS], pad_token_id=0)
    assert module.samples_as_trained(model)


def test_a_model_that_takes_no_positions_is_refused_since_padding_would_change_its_samples(script, world, tmp_path):
    small = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
    torch.manual_seed(0)
    tokenizer = tiny.word_tokenizer()
    bart = AutoModelForCausalLM.from_config(BartConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **small))
    for parameter in bart.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    bart.save_pretrained(tmp_path / "bart")
    tokenizer.save_pretrained(tmp_path / "bart")
    assert "bart generates from other probabilities than a forward pass gives" in refusal(
        script, world, tmp_path, model=str(tmp_path / "bart")
    )


def test_a_cache_that_forgets_is_refused_even_where_the_likeliest_tokens_would_end_the_check(module, tmp_path):
    model = tiny.make_model(tmp_path)
    stops = []
    for ids in ([1], [1, 2, 3, 4]):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        stops.append(logits.argmax().item())
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=0)
    whole_pass = model.forward

    def forward(input_ids, past_key_values=None, **inputs):
        if past_key_values is not None and input_ids.shape[1] == 1:
            input_ids = input_ids.clamp(max=5)
        return whole_pass(input_ids, past_key_values=past_key_values, **inputs)

    model.forward = forward
    assert not module.samples_as_trained(model)


def test_a_temperature_or_a_penalty_of_the_generation_config_changes_no_sample_and_is_saved(
    monkeypatch, script, world, tmp_path
):
    model = AutoModelForCausalLM.from_pretrained(world / "llama")
    changed = {"do_sample": True, "temperature": 0.1, "top_k": 1, "repetition_penalty": 9.0}
    for name, value in changed.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(tmp_path / "model")
    tiny.word_tokenizer().save_pretrained(tmp_path / "model")
    plain_flags = rollouts.flags_of(world, script, tmp_path / "a", total_episodes=8)
    cold_flags = rollouts.flags_of(world, script, tmp_path / "b", total_episodes=8, model=str(tmp_path / "model"))
    plain = train(monkeypatch, script, plain_flags)
    cold = train(monkeypatch, script, cold_flags)
    assert rows_of(cold.rollouts[0]) == rows_of(plain.rollouts[0])
    saved = json.loads((tmp_path / "b/model/generation_config.json").read_text())
    assert {name: saved[name] for name in changed} == changed


def test_a_response_stops_at_eos_the_turns_end_and_what_the_generation_config_names(
    monkeypatch, script, world, tmp_path, rewarded
):
    model = AutoModelForCausalLM.from_pretrained(world / "llama")
    model.generation_config.eos_token_id = [7, 11]
    model.save_pretrained(tmp_path / "model")
    tokenizer = tiny.word_tokenizer(extra_special_tokens=["."])
    tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", ".")
    tokenizer.save_pretrained(tmp_path / "model")
    changed = {"model": str(tmp_path / "model"), "total_episodes": 8} | rewarded("each")
    seen = train(monkeypatch, script, rollouts.flags_of(world, script, tmp_path / "run", **changed))
    stops = {EOS, 7, 11, tokenizer.convert_tokens_to_ids(".")}
    for call in seen.sample:
        assert set(call.model.generation_config.eos_token_id) == stops
    ends = {response[-1] for response in seen.rollouts[0].result if len(response) < 8}
    assert len(ends) > 1
    assert ends <= stops


# --- log-probabilities of responses ---

ROWS = [[[4, 5], [6, 7, EOS]], [[4], [8, 9, 10, 11, 5, 12]], [[9, 8, 7], [EOS]]]


@archs
@pytest.mark.parametrize("R", [6, 9])  # the second response reaches R, or has room behind it
def test_log_probabilities_are_those_of_single_rows_and_0_behind_a_responses_end(module, world, arch, R):
    model = AutoModelForCausalLM.from_pretrained(world / arch)
    with torch.no_grad():
        logprobs = module.response_logprobs(model, ROWS, R, CPU)
    assert logprobs.shape == (3, R)
    for row_logprobs, (prompt, response) in zip(logprobs, ROWS):
        with torch.no_grad():
            expected = replay.logprobs(model, prompt, response)
        torch.testing.assert_close(row_logprobs[: len(response)], expected, rtol=1e-4, atol=1e-5)
        assert (row_logprobs[len(response) :] == 0).all()


@archs
def test_rewards_are_those_of_the_reward_model_at_the_last_token_of_each_row(module, world, arch):
    reward_model = AutoModelForSequenceClassification.from_pretrained(world / f"{arch}-reward")
    with torch.no_grad():
        scores = module.rewards(module.TokenScores(reward_model), ROWS, CPU)
    for score, (prompt, response) in zip(scores, ROWS, strict=True):
        with torch.no_grad():
            expected = reward_model(torch.tensor([prompt + response])).logits[0, 0]
        torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-5)


# --- reward models ---


def refusal(script, world, tmp_path, **changed):
    """The sentence in which main refuses its input; nothing is written."""
    module = importlib.import_module(script)
    rollouts.reset_state()
    with pytest.raises(SystemExit) as stop:
        module.main(module.Args(**rollouts.flags_of(world, script, tmp_path / "run", **changed)))
    assert not (tmp_path / "run").exists()
    return str(stop.value)


def reward_model_with(tokenizer, world, folder):
    """Save the reward model with another tokenizer; its folder as a flag."""
    AutoModelForSequenceClassification.from_pretrained(world / "llama-reward").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_reward_model_of_several_scores_is_refused(script, world, tmp_path):
    rollouts.make_reward_model(tmp_path / "two", num_labels=2)
    assert "gives 2 scores and not one" in refusal(script, world, tmp_path, reward_model=str(tmp_path / "two"))


def test_a_language_model_as_reward_model_is_refused(script, world, tmp_path):
    sentence = refusal(script, world, tmp_path, reward_model=str(world / "llama"))
    assert "lacks the weights ['score.weight']" in sentence


def test_a_reward_model_of_other_tokens_is_refused(script, world, tmp_path):
    tokenizer = tiny.word_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = backend["model"]["vocab"]
    vocabulary["great"], vocabulary["dull"] = vocabulary["dull"], vocabulary["great"]
    swapped = tiny.word_tokenizer()
    swapped.save_pretrained(tmp_path / "swapped")
    (tmp_path / "swapped" / "tokenizer.json").write_text(json.dumps(backend))
    other = type(tokenizer).from_pretrained(tmp_path / "swapped")
    folder = reward_model_with(other, world, tmp_path / "other")
    assert "has other tokens than --model" in refusal(script, world, tmp_path, reward_model=folder)


def test_a_reward_model_that_lacks_a_token_is_refused(script, world, tmp_path):
    tokenizer = tiny.word_tokenizer(extra_special_tokens=["<new>"])
    tiny.make_model(tmp_path / "longer", tokenizer=tokenizer)
    assert "has other tokens than --model" in refusal(script, world, tmp_path, model=str(tmp_path / "longer"))


def test_a_reward_model_of_fewer_embeddings_is_refused(script, world, tmp_path):
    tiny.make_model(tmp_path / "padded", vocab_size=64)
    assert "has fewer embeddings than --model" in refusal(script, world, tmp_path, model=str(tmp_path / "padded"))


def test_a_reward_model_of_another_eos_is_refused(script, world, tmp_path):
    folder = reward_model_with(tiny.word_tokenizer(eos="."), world, tmp_path / "eos")
    assert "ends texts in ., not <eos>" in refusal(script, world, tmp_path, reward_model=folder)


def test_a_reward_model_of_another_template_is_refused_and_one_without_is_not(script, world, tmp_path):
    tokenizer = tiny.word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} <eos>{% endfor %}"
    folder = reward_model_with(tokenizer, world, tmp_path / "chat")
    assert "has another chat template than --model" in refusal(script, world, tmp_path, reward_model=folder)
    module = importlib.import_module(script)
    tokenizer.chat_template = None
    folder = reward_model_with(tokenizer, world, tmp_path / "none")
    policy = AutoModelForCausalLM.from_pretrained(world / "llama")
    assert module.load_reward_model(folder, 64, policy, tiny.word_tokenizer()).config.num_labels == 1


def test_a_reward_model_may_have_tokens_and_embeddings_beyond_the_policys(module, world, tmp_path):
    tokenizer = tiny.word_tokenizer(extra_special_tokens=["<new>"])
    tiny.make_model(tmp_path / "more", tokenizer=tokenizer)
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "more", num_labels=1).save_pretrained(
        tmp_path / "more"
    )
    policy = AutoModelForCausalLM.from_pretrained(world / "llama")
    found = module.load_reward_model(str(tmp_path / "more"), 64, policy, tiny.word_tokenizer())
    assert found.get_input_embeddings().num_embeddings == len(tokenizer)


def test_scores_are_of_each_response_alone_less_the_penalty_of_one_without_a_stop(monkeypatch, script, world, tmp_path):
    changed = {"missing_eos_penalty": 2.5, "total_episodes": 24, "save_every": 0, "response_length": 20}
    where = {"rlhf_ppo": "kl_penalised_rewards", "grpo": "group_advantages"}[script]
    seen = train(monkeypatch, script, rollouts.flags_of(world, script, tmp_path, **changed), (where,))
    reward_model = AutoModelForSequenceClassification.from_pretrained(world / "llama-reward")
    means = []
    shares = []
    for rollout, call in zip(seen.rollouts, vars(seen)[where], strict=True):
        scores = []
        finished = []
        for prompt, response in rows_of(rollout):
            with torch.no_grad():
                score = reward_model(torch.tensor([prompt + response])).logits[0, 0].item()
            finished.append(response[-1] == EOS)
            scores.append(score - 2.5 * (not finished[-1]))
        assert call.scores.flatten().tolist() == pytest.approx(scores, rel=1e-4, abs=1e-5)
        means.append(sum(scores) / 8)
        shares.append(sum(finished) / 8)
    assert 0 < sum(shares) < 3
    assert [value for _, value in scalars(tmp_path, "objective/scores")] == pytest.approx(means, rel=1e-4, abs=1e-5)
    assert [value for _, value in scalars(tmp_path, "val/num_eos_tokens")] == pytest.approx(shares)


# --- rewards in Python ---

REWARD = """
from multiprocessing import Pool

from neighbour import words


def each(prompts, completions, place, **columns):
    assert len(prompts) == len(completions) == len(place)
    return [words(text) + 100 * number for text, number in zip(completions, place)]


def in_processes(prompts, completions, **columns):
    with Pool(2) as pool:
        return pool.map(words, completions)


def keeps(prompts, completions, **columns):
    kept.append((prompts, completions, columns))
    return [0.0] * len(prompts)


def fails(prompts, completions, **columns):
    raise KeyError("answer")


def too_few(prompts, completions, **columns):
    return [1.0]


def not_a_number(prompts, completions, **columns):
    return [float("nan") if "film" in prompt else 1.0 for prompt in prompts]


kept = []
"""


@pytest.fixture
def rewarded(tmp_path, monkeypatch):
    """Flags of a run whose reward is a function of a Python file, which imports a file beside it."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    stem = f"rewards_{os.getpid()}_{tmp_path.name}"  # each test's module is another one
    (tmp_path / f"{stem}.py").write_text(REWARD.replace("neighbour", f"neighbour_of_{stem}"))
    (tmp_path / f"neighbour_of_{stem}.py").write_text("def words(text):\n    return len(text.split())\n")
    return lambda name: {"reward_model": f"{tmp_path / stem}.py:{name}"}


def test_a_function_scores_each_response_with_the_columns_of_its_prompt(monkeypatch, script, world, tmp_path, rewarded):
    changed = {"missing_eos_penalty": 0.0, "num_minibatches": 1, "micro_batch_size": 8, "save_every": 0}
    flags = rollouts.flags_of(world, script, tmp_path / "run", total_episodes=32, **changed, **rewarded("each"))
    where = {"rlhf_ppo": "kl_penalised_rewards", "grpo": "group_advantages"}[script]
    seen = train(monkeypatch, script, flags, (where, "load_prompts", "batch_at"))
    tokenizer = tiny.word_tokenizer()
    prompts = seen.load_prompts[0].result
    for rollout, batch, call in zip(seen.rollouts, seen.batch_at, vars(seen)[where], strict=True):
        expected = []
        for number, response in enumerate(rollout.result):
            _, row = prompts[batch.result[number * len(batch.result) // 8]]  # grpo.py asks each four times
            text = response[:-1] if response[-1] == EOS else response
            expected.append(100 * row["place"] + len(tokenizer.decode(text, skip_special_tokens=True).split()))
        assert call.scores.flatten().tolist() == expected
    assert len(seen.rollouts) == 4


def test_texts_of_rewards_hold_no_special_token_and_no_stop_but_all_other_words(
    monkeypatch, script, world, tmp_path, rewarded
):
    model = AutoModelForCausalLM.from_pretrained(world / "llama")
    model.generation_config.eos_token_id = [7]  # an ordinary word
    model.save_pretrained(tmp_path / "model")
    tiny.word_tokenizer().save_pretrained(tmp_path / "model")
    flags = rewarded("keeps") | {"model": str(tmp_path / "model"), "response_length": 12, "total_episodes": 24}
    seen = train(monkeypatch, script, rollouts.flags_of(world, script, tmp_path / "run", **flags))
    kept = sys.modules[Path(flags["reward_model"]).stem].kept
    asked = [(prompts, texts) for prompts, texts, _ in kept if len(prompts) == 8]
    assert len(asked) == len(seen.rollouts) == 3
    specials = 0
    for (prompts, texts), rollout in zip(asked, seen.rollouts):
        for text, response in zip(texts, rollout.result):
            words = ["<bos>", *tiny.WORDS]  # without a place as BOS it is a word
            expected = [words[i - 3] for i in response if i >= 3]
            if response[-1] == 7:
                expected.pop()
            assert text.split() == expected
            specials += response.count(0) + response.count(2)
    assert specials > 3  # <pad> and <unk> were drawn, too
    assert all(set(columns) == {"place"} for _, _, columns in kept)


def test_conversations_come_to_a_reward_function_as_messages(module):
    calls = []

    def function(prompts, completions):
        calls.append((prompts, completions))
        return [1]

    assert module.function_rewards(function, "f", [{"prompt": [USER]}], ["great ."]) == [1.0]
    assert calls == [([[USER]], [[{"role": "assistant", "content": "great ."}]])]


def test_a_function_that_changes_its_prompts_changes_neither_the_others_nor_the_data(module):
    row = {"prompt": [dict(USER)], "answer": [1]}
    lengths = []

    def function(prompts, completions, answer):
        for prompt, completion, right in zip(prompts, completions, answer):
            lengths.append(len(prompt))
            prompt.extend(completion)
            right.clear()
        return [0.0] * len(prompts)

    module.function_rewards(function, "f", [row] * 3, ["x", "y", "z"])
    assert lengths == [1, 1, 1]
    assert row == {"prompt": [USER], "answer": [1]}


def test_a_library_comes_before_the_neighbours_of_a_reward_file(module, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "datasets.py").write_text("")
    (tmp_path / f"own_{tmp_path.name}.py").write_text("def reward(prompts, completions):\n    return [0]\n")
    module.load_reward_function(f"{tmp_path}/own_{tmp_path.name}.py:reward")
    found = importlib.machinery.PathFinder.find_spec("datasets")
    assert Path(found.origin).parent != tmp_path


def test_columns_named_prompts_or_completions_do_not_collide_with_the_arguments(module):
    row = {"prompt": "a", "prompts": "b", "completions": "c", "completion": "d", "answer": 3}
    calls = []

    def function(prompts, completions, **columns):
        calls.append((prompts, completions, columns))
        return [0.5, 1]

    assert module.function_rewards(function, "f", [row, row | {"answer": 4}], ["x", "y"]) == [0.5, 1.0]
    assert calls == [(["a", "a"], ["x", "y"], {"completion": ["d", "d"], "answer": [3, 4]})]


@pytest.mark.parametrize(
    "name,words",
    [
        ("too_few", r"rewards_\S+.py:too_few gave 1 values for \d completions"),
        ("not_a_number", r"rewards_\S+.py:not_a_number gave nan for an answer to 'the film : review"),
    ],
)
def test_a_reward_function_that_gives_other_than_numbers_ends_the_run(script, world, tmp_path, rewarded, name, words):
    module = importlib.import_module(script)
    with pytest.raises(SystemExit, match=words):
        module.main(module.Args(**rollouts.flags_of(world, script, tmp_path / "run", **rewarded(name))))


def test_an_infinite_reward_is_refused(module):
    def second_is_infinite(prompts, completions):
        return [1, math.inf]

    rows = [{"prompt": "a"}, {"prompt": "b"}]
    with pytest.raises(SystemExit, match="--reward-model f gave inf for an answer to 'b'"):
        module.function_rewards(second_is_infinite, "f", rows, ["", ""])


def test_a_reward_function_that_raises_ends_the_run_with_its_own_traceback_and_the_place(
    script, world, tmp_path, rewarded
):
    module = importlib.import_module(script)
    with pytest.raises(KeyError, match="answer") as fault:
        module.main(module.Args(**rollouts.flags_of(world, script, tmp_path / "run", **rewarded("fails"))))
    (note,) = fault.value.__notes__
    assert re.search(r"rewards_\S+.py:fails for \d prompts, the first of them '.*review", note)
    assert fault.traceback[-1].name == "fails"


def test_a_reward_function_may_start_processes_of_its_own(module, rewarded):
    name = rewarded("in_processes")["reward_model"]
    function = module.load_reward_function(name)
    assert module.function_rewards(function, name, [{"prompt": "a"}] * 2, ["one two", "three"]) == [2.0, 1.0]


def test_a_reward_file_that_is_missing_is_named(script, world, tmp_path):
    sentence = refusal(script, world, tmp_path, reward_model=f"{tmp_path}/nowhere.py:reward")
    assert sentence == f"--reward-model {tmp_path}/nowhere.py:reward: there is no file {tmp_path}/nowhere.py"


def test_a_reward_function_that_is_missing_is_named(script, world, tmp_path, rewarded):
    sentence = refusal(script, world, tmp_path, **rewarded("absent"))
    assert sentence.endswith(".py:absent: the file has no function absent")


@pytest.mark.parametrize("name", ["json", "math", "time", "torch"])  # of Python, in C, built in, and installed
def test_a_reward_file_with_the_name_of_another_module_is_refused(script, world, tmp_path, monkeypatch, name):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / f"{name}.py").write_text("def reward(prompts, completions):\n    return [0] * len(prompts)\n")
    sentence = refusal(script, world, tmp_path, reward_model=f"{tmp_path / name}.py:reward")
    assert sentence.endswith(f"{name} is the name of another module; rename the file")


def test_a_reward_file_relative_to_the_working_directory_is_found(module, tmp_path, monkeypatch, rewarded):
    file, _, function = rewarded("each")["reward_model"].rpartition(":")
    monkeypatch.chdir(tmp_path)
    assert module.load_reward_function(f"{os.path.basename(file)}:{function}").__name__ == "each"


# --- prompts ---


@pytest.mark.parametrize(
    "prompt,asked",
    [
        ("review of plot :", "review of plot :"),
        ([USER], "user : review of plot : assistant :"),
        ([USER, {"role": "assistant", "content": "the plot"}], "user : review of plot : assistant : the plot"),
        ("review of plot :<eos>", "review of plot :"),
    ],
    ids=["a text", "messages", "an answer begun goes on", "an EOS behind a prompt is not read"],
)
def test_prompts_are_encoded_as_before_an_answer_and_keep_their_columns(module, tmp_path, prompt, asked):
    tokenizer = tiny.word_tokenizer()
    row = {"prompt": prompt, "chosen": "x", "extra": 1}
    assert rollouts.load_prompts(module, tmp_path, [row] * 2, tokenizer) == [(tokenizer(asked).input_ids, row)] * 2


@pytest.mark.parametrize("column", ["messages", "chosen", "completion"])
def test_a_text_beside_a_column_of_chats_is_asked_as_a_chat(module, tmp_path, column):
    tokenizer = tiny.word_tokenizer()
    row = {"prompt": "review of plot :", column: [{"role": "assistant", "content": "the plot was great ."}]}
    ((ids, kept),) = rollouts.load_prompts(module, tmp_path, [row], tokenizer)
    assert ids == tokenizer("user : review of plot : assistant :").input_ids
    assert kept == row


def test_a_column_of_other_than_messages_beside_a_text_is_refused(module, tmp_path):
    row = {"prompt": "review of plot :", "messages": [{"from": "human", "value": "review of plot :"}]}
    with pytest.raises(SystemExit, match="row 1, column messages: .*'human'.* is not a message"):
        rollouts.load_prompts(module, tmp_path, [row], tiny.word_tokenizer())


@pytest.mark.parametrize("column", ["messages", "chosen"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_text_that_is_a_users_turn_of_the_chat_beside_it_is_asked_with_the_turns_before(
    module, tmp_path, column, number
):
    tokenizer = tiny.word_tokenizer()
    chat = []
    for asked, answered in (("the film :", "fine ."), (USER["content"], "great ."), ("music :", "bad .")):
        chat.append({"role": "user", "content": asked})
        chat.append({"role": "assistant", "content": answered})
    prompt = ["review of plot : ", " music :"][number]  # blanks around it do not count
    turns = chat[: [3, 5][number]]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    for shown in (chat, turns):  # also where the chat ends with the question
        ((ids, _),) = rollouts.load_prompts(module, tmp_path, [{"prompt": prompt, column: shown}], tokenizer)
        assert ids == tokenizer(text).input_ids


@pytest.mark.parametrize(
    "row", [{"prompt": ""}, {"prompt": " \n"}, {"prompt": "<eos>"}, {"prompt": "", "messages": [USER]}], ids=str
)
def test_an_empty_prompt_is_left_out_with_a_count(module, tmp_path, capsys, row):
    rows = [row | {"prompt": "review :"}, row]
    assert len(rollouts.load_prompts(module, tmp_path, rows, tiny.word_tokenizer())) == 1
    assert "1 of 2 prompts are left out: they are empty" in capsys.readouterr().out


def test_prompts_without_room_for_a_response_are_left_out_with_a_count_and_the_flag(module, tmp_path, capsys):
    rows = [{"prompt": "review " * 8}, {"prompt": "review " * 9}]
    ((ids, _),) = rollouts.load_prompts(module, tmp_path, rows, tiny.word_tokenizer(), 8)
    assert len(ids) == 8
    said = capsys.readouterr().out
    assert "1 of 2 prompts are left out: with --response-length they are longer than --max-length" in said


def test_unknown_words_are_counted_and_a_set_that_mostly_holds_them_is_refused(module, tmp_path, capsys):
    known = {"prompt": "review of plot :"}
    unknown = {"prompt": "revue of plot :"}
    assert len(rollouts.load_prompts(module, tmp_path, [known, unknown], tiny.word_tokenizer())) == 2
    assert "1 of 2 prompts hold words that --model does not know" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="most prompts hold <unk>, a word that --model does not know"):
        rollouts.load_prompts(module, tmp_path, [known, unknown, unknown], tiny.word_tokenizer())


def test_a_chat_whose_template_writes_bos_has_it_once_and_so_has_a_text(module, tmp_path):
    tokenizer = tiny.bpe_tokenizer(bos=True, template=tiny.LLAMA_STYLE)
    rendered = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert rendered.startswith("<s>")
    for prompt in ([USER], rendered, "review of plot :"):
        ((ids, _),) = rollouts.load_prompts(module, tmp_path, [{"prompt": prompt}], tokenizer)
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("name", tiny.TOKENIZERS)
def test_prompts_of_any_tokenizer_begin_once_and_end_in_no_stop_token(module, tmp_path, name):
    make, _ = tiny.TOKENIZERS[name]
    tokenizer = make()
    ((ids, _),) = rollouts.load_prompts(module, tmp_path, [{"prompt": "review of plot :"}], tokenizer)
    starts = [i for i in (tokenizer.bos_token_id, tokenizer.cls_token_id) if i is not None]
    assert ids[-1] != tokenizer.eos_token_id
    assert sum(ids.count(start) for start in starts) <= 1
    assert "plot" in tokenizer.decode(ids)


def test_template_arguments_and_the_configuration_reach_training_and_held_out_prompts(
    monkeypatch, script, world, tmp_path
):
    tokenizer = tiny.word_tokenizer()
    tokenizer.chat_template = "{% if quiet %} not {% endif %}" + tokenizer.chat_template
    for name in ("llama", "llama-reward"):
        loader = AutoModelForCausalLM if name == "llama" else AutoModelForSequenceClassification
        loader.from_pretrained(world / name).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    configs = []
    for folder, count in (("one", 3), ("two", 9)):
        files = []
        for split in ("train", "test"):
            tiny.write_jsonl(tmp_path / "data" / folder / f"{split}.jsonl", [{"prompt": [USER]}] * count)
            files.append({"split": split, "path": f"{folder}/{split}.jsonl"})
        configs.append({"config_name": folder, "data_files": files})
    (tmp_path / "data" / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    changed = {
        "model": str(tmp_path / "llama"),
        "reward_model": str(tmp_path / "llama-reward"),
        "dataset": str(tmp_path / "data"),
        "dataset_config": "two",
        "chat_template_kwargs": '{"quiet": true}',
    }
    flags = rollouts.flags_of(world, script, tmp_path / "run", **changed, total_episodes=8)
    seen = train(monkeypatch, script, flags, ("load_prompts",))
    expected = tokenizer("not user : review of plot : assistant :").input_ids
    assert len(seen.load_prompts) == (2 if script == "grpo" else 1)
    for call in seen.load_prompts:
        assert [ids for ids, _ in call.result] == [expected] * 9


@pytest.mark.parametrize("kwargs", ["[]", "3", '"quiet"'])
def test_template_arguments_that_are_no_object_are_refused(script, world, tmp_path, kwargs):
    module = importlib.import_module(script)
    with pytest.raises(ValueError, match="chat-template-kwargs must be a JSON object"):
        module.Args(**rollouts.flags_of(world, script, tmp_path, chat_template_kwargs=kwargs))


def test_prompts_that_cannot_be_read_are_refused(script, world, tmp_path):
    path = tiny.write_jsonl(tmp_path / "other.jsonl", [{"question": "review :"}])
    assert "rename one of them to prompt" in refusal(script, world, tmp_path, dataset=str(path))
    path = tiny.write_jsonl(tmp_path / "csv.jsonl", [{"prompt": '[{"role": "user", "content": "x"}]'}] * 8)
    sentence = refusal(script, world, tmp_path, dataset=str(path))
    assert "row 1, column prompt: " in sentence
    assert "is a list of messages written as text" in sentence
    path = tiny.write_jsonl(tmp_path / "words.jsonl", [{"prompt": ["a", "b"]}] * 8)
    assert "row 1, column prompt: 'a' is not a message" in refusal(script, world, tmp_path, dataset=str(path))


def test_too_few_prompts_for_a_rollout_are_refused(script, world, tmp_path):
    path = tiny.write_jsonl(tmp_path / "one.jsonl", [{"prompt": "review :"}])
    assert "--dataset has 1 prompts, too few for --batch-size 8" in refusal(script, world, tmp_path, dataset=str(path))


# --- what main does with its flags ---


def test_the_seed_orders_prompts_samples_and_minibatches(monkeypatch, script, world, tmp_path):
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        flags = rollouts.flags_of(world, script, tmp_path / name, seed=seed, total_episodes=32)
        runs.append(train(monkeypatch, script, flags, ("micro_batches",)))
    first, again, other = runs
    prompts = [call.prompts for call in first.rollouts]
    assert prompts == [call.prompts for call in again.rollouts]
    assert prompts != [call.prompts for call in other.rollouts]
    assert len({str(asked) for asked in prompts}) > 1
    assert [call.result for call in first.rollouts] == [call.result for call in again.rollouts]
    for ours, theirs in zip(first.rollouts, other.rollouts):
        assert not torch.equal(ours.uniform, theirs.uniform)
    assert len({call.uniform.sum().item() for call in first.rollouts}) == 4  # each update has numbers of its own
    minibatches = [[sorted(call.indices) for call in seen.micro_batches] for seen in runs]
    assert minibatches[0] == minibatches[1]
    assert minibatches[0] != minibatches[2]
    assert same(rollouts.final(tmp_path / "a"), rollouts.final(tmp_path / "b"))
    assert not same(rollouts.final(tmp_path / "a"), rollouts.final(tmp_path / "c"))


def test_all_prompts_are_asked_in_an_epoch_and_each_epoch_has_another_order(module):
    epochs = []
    for epoch in range(2):
        batches = [module.batch_at(20, 3 * epoch + batch, 6, 1) for batch in range(3)]
        indices = [i for batch in batches for i in batch]
        assert len(set(indices)) == 18  # a part batch is left out
        assert set(indices) <= set(range(20))
        epochs.append(indices)
    assert epochs[0] != epochs[1]
    assert module.batch_at(20, 0, 6, 2) != module.batch_at(20, 0, 6, 1)


@pytest.mark.parametrize(
    "count,size,processes,expected",
    [(8, 3, 1, 3), (7, 3, 1, 3), (8, 8, 1, 1), (3, 8, 1, 1), (32, 17, 1, 2), (1, 1, 1, 1), (5, 4, 4, 1), (9, 4, 2, 3)],
)
def test_micro_batches_hold_each_index_once_and_rows_of_like_length_meet(module, count, size, processes, expected):
    lengths = random.Random(0).sample(range(1, 99), count)
    rows = [[[5] * (length // 2), [6] * (length - length // 2)] for length in lengths]
    indices = random.Random(1).sample(range(count), count)
    parts = module.micro_batches(rows, indices, size, processes)
    assert sorted(i for part in parts for i in part) == list(range(count))
    assert [lengths[i] for part in parts for i in part] == sorted(lengths)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert len(parts) == expected
    assert min(map(len, parts)) >= processes
    assert max(map(len, parts)) <= size or count // processes < -(-count // size)


def test_the_gradient_of_both_models_together_is_clipped_to_norm_1_and_logged_before(
    monkeypatch, script, world, tmp_path
):
    flags = rollouts.flags_of(world, script, tmp_path, **rollouts.one_step(script), kl_coef=0.0)
    if script == "grpo":
        flags["scale_rewards"] = "none"
        (tmp_path / "large.py").write_text(
            "def reward(prompts, completions, **columns):\n    return [1000.0 * len(text) for text in completions]\n"
        )
        flags["reward_model"] = f"{tmp_path / 'large.py'}:reward"
    train(monkeypatch, script, flags)
    ((_, norm),) = scalars(tmp_path, "grad_norm")
    gradient = rollouts.first_gradient(tmp_path)
    assert norm > 1.05
    assert gradient.norm().item() == pytest.approx(1.0, rel=1e-4)


def test_the_learning_rate_falls_in_a_line_to_0_over_the_run(monkeypatch, script, world, tmp_path):
    flags = rollouts.flags_of(world, script, tmp_path, total_episodes=32, learning_rate=1e-3)
    rates = []
    step = torch.optim.AdamW.step

    def recorder(optimizer, *arguments, **keywords):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return step(optimizer, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorder)
    train(monkeypatch, script, flags)
    models = 2 if script == "rlhf_ppo" else 1
    expected = [[rate] for rate in (1e-3, 0.75e-3, 0.5e-3, 0.25e-3) for _ in range(4 * models)]
    assert [rate for (rate,) in rates] == pytest.approx([rate for (rate,) in expected])
    assert [rate for _, rate in scalars(tmp_path, "lr")] == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_weights_that_have_no_gradient_do_not_decay(monkeypatch, script, world, tmp_path):
    models = {"model": str(world / "gpt2"), "reward_model": str(world / "gpt2-reward")}
    train(monkeypatch, script, rollouts.flags_of(world, script, tmp_path, **models))
    after = rollouts.final(tmp_path)
    before = load_file(world / "gpt2" / "model.safetensors")
    (name,) = [name for name in before if name.endswith("wpe.weight")]
    assert torch.equal(after[name][64:], before[name][64:])  # positions beyond --max-length
    assert not torch.equal(after[name][:8], before[name][:8])
    matrices = [name for name in before if before[name].dim() > 1]
    assert not any(torch.equal(after[name], before[name]) for name in matrices)


@pytest.mark.parametrize("size", [3, 1])
def test_micro_batches_that_do_not_divide_give_the_update_of_whole_minibatches(
    monkeypatch, script, world, tmp_path, size
):
    gradients = []
    metrics = []
    names = {"rlhf_ppo": ["loss/policy", "loss/value", "policy/approxkl", "policy/clipfrac", "val/ratio"]}
    names["grpo"] = ["loss/policy", "loss/kl", "policy/approxkl", "frac_reward_zero_std"]
    for micro_batch_size in (7, size):  # minibatches of 7 rows, in one part or in parts of 3 and 2
        run_dir = tmp_path / str(micro_batch_size)
        flags = rollouts.flags_of(world, script, run_dir, batch_size=14, total_episodes=14, learning_rate=1e-3)
        flags["micro_batch_size"] = micro_batch_size
        if script == "grpo":
            flags["group_size"] = 2
        seen = train(monkeypatch, script, flags, ("micro_batches",))
        parts = {len(part) for call in seen.micro_batches if len(call.indices) == 7 for part in call.result}
        assert parts == ({7} if micro_batch_size == 7 else {3, 2} if size == 3 else {1})
        gradients.append(rollouts.first_gradient(run_dir))
        tags = [*names[script], "grad_norm", "objective/kl", "objective/scores", "objective/entropy"]
        metrics.append({tag: scalars(run_dir, tag)[0][1] for tag in tags})
    whole, parts = gradients
    assert (whole - parts).norm() < 1e-3 * whole.norm()
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("micro_batch_size", [4, 3, 1])
def test_before_the_first_step_ratio_and_kl_are_exactly_neutral(monkeypatch, script, world, tmp_path, micro_batch_size):
    flags = rollouts.flags_of(world, script, tmp_path, micro_batch_size=micro_batch_size, total_episodes=8)
    seen = train(monkeypatch, script, flags, ("policy_loss",))
    for call in seen.policy_loss[: max(1, 4 // micro_batch_size)]:
        assert call.log_ratio.abs().max() <= 2e-6  # a few units in the last place of log-probabilities near 5
    assert scalars(tmp_path, "objective/kl") == [(1, 0.0)]


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_first_kl_is_exactly_0_in_bfloat16_too_and_the_next_is_not(monkeypatch, script, world, tmp_path, lora_rank):
    train(monkeypatch, script, rollouts.flags_of(world, script, tmp_path, bf16=True, lora_rank=lora_rank))
    (_, first), (_, second) = scalars(tmp_path, "objective/kl")
    assert first == 0.0
    assert second != 0.0


def test_the_ratio_is_to_the_policy_that_sampled(monkeypatch, script, world, tmp_path):
    changed = {"num_minibatches": 1, rollouts.EPOCHS[script]: 1}  # one step a rollout
    seen = train(monkeypatch, script, rollouts.flags_of(world, script, tmp_path, **changed), ("policy_loss",))
    assert scalars(tmp_path, "objective/kl")[1][1] != 0
    assert len(seen.policy_loss) == 4
    for call in seen.policy_loss:
        assert call.log_ratio.abs().max() <= 2e-6


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_reference_is_the_starting_policy_in_every_rollout_and_kl_is_logged_with_its_sign(
    monkeypatch, script, world, tmp_path, lora_rank
):
    """Of steps this small the mean over 8 responses is as often below 0 as above."""
    changed = {"lora_rank": lora_rank, "total_episodes": 48, "learning_rate": 3e-4 if lora_rank else 1e-4}
    flags = rollouts.flags_of(world, script, tmp_path, save_every=0, kl_coef=0.0, **changed)
    seen = train(monkeypatch, script, flags, ("response_logprobs",))
    start_model = AutoModelForCausalLM.from_pretrained(world / "llama")
    by_rows = {}
    for call in seen.response_logprobs:
        if not call.result.requires_grad:  # in rollouts: of the policy, and then of the reference
            by_rows.setdefault(str(call.rows), []).append(call.result)
    module = importlib.import_module(script)
    kls = []
    for rollout in seen.rollouts:
        total = 0.0
        rows = rows_of(rollout)
        for key, results in by_rows.items():
            micro_batch = json.loads(key)
            if len(results) == 2 and all(row in rows for row in micro_batch):
                policy, reference = results
                total += (policy - reference).sum().item()
                with torch.no_grad():
                    expected = module.response_logprobs(start_model, micro_batch, 8, CPU)
                torch.testing.assert_close(reference, expected, rtol=1e-4, atol=1e-5)
        kls.append(total / 8)
    assert min(kls) < 0 < max(kls)
    assert [value for _, value in scalars(tmp_path, "objective/kl")] == pytest.approx(kls, rel=1e-3, abs=1e-7)


def test_kl_coef_given_on_resume_counts(monkeypatch, script, world, tmp_path):
    module = importlib.import_module(script)
    train(monkeypatch, script, rollouts.flags_of(world, script, tmp_path / "begun", total_episodes=8))
    weights = []
    for beta in ("0.01", "5"):
        run_dir = tmp_path / beta
        shutil.copytree(tmp_path / "begun", run_dir)
        flags = ["--resume", str(run_dir), "--total-episodes", "24", "--kl-coef", beta]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
        rollouts.reset_state()
        module.main(*module.parse_args())
        assert json.loads((run_dir / "args.json").read_text())["kl_coef"] == float(beta)
        weights.append(rollouts.final(run_dir))
    assert not same(*weights)


def test_the_progress_line_shows_the_share_of_unfinished_responses(monkeypatch, script, world, tmp_path):
    module = importlib.import_module(script)
    lines = []

    def keep(bar, text, **keywords):
        lines.append(text)

    monkeypatch.setattr(module.tqdm, "set_postfix_str", keep)
    train(monkeypatch, script, rollouts.flags_of(world, script, tmp_path))
    finished = [value for _, value in scalars(tmp_path, "val/num_eos_tokens")]
    for line, share in zip(lines, finished, strict=True):
        assert f"unfinished {1 - share:.0%}" in line
        assert ("groups of equal scores" in line) == (script == "grpo")


@pytest.mark.parametrize("response_length,warned", [(1, True), (63, False)])
def test_a_first_rollout_of_unfinished_responses_names_the_flag(
    monkeypatch, script, world, tmp_path, capsys, response_length, warned
):
    changed = {"response_length": response_length, "max_length": 100, "total_episodes": 16}
    train(monkeypatch, script, rollouts.flags_of(world, script, tmp_path, **changed))
    sentence = f"of the responses have no end: --response-length {response_length} may be too short"
    assert capsys.readouterr().out.count(sentence) == warned


# --- several processes ---


@pytest.mark.parametrize("script,lora_rank", [("rlhf_ppo", 0), ("rlhf_ppo", 2), ("grpo", 0)])
def test_fsdp2_shards_policy_critic_reward_model_and_reference(script, world, tmp_path, lora_rank):
    flags = rollouts.flags_of(world, script, tmp_path / "run", lora_rank=lora_rank, save_every=0)
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    said = fork_two(tmp_path / "said", FORCED_FSDP2, ALGOS / f"{script}.py", *arguments)
    sharded = sorted(line.split()[1] for line in said.splitlines() if line.startswith("sharded "))
    expected = ["LlamaForCausalLM", "TokenScores"]  # policy and reward model
    if not lora_rank:
        expected.append("LlamaForCausalLM")  # the reference, which with LoRA is the policy without adapters
    if script == "rlhf_ppo":
        expected.append("TokenScores")  # the critic
    assert sharded == sorted(expected)
    assert rollouts.final(tmp_path / "run").keys() == load_file(world / "llama" / "model.safetensors").keys()
