"""benchmark/world/grammar.py: scores by hand, probabilities by enumeration, exact figures against simulation."""

import importlib
import math
import random
import subprocess
import sys
from functools import cache
from itertools import product

import numpy as np
import pytest
from helpers import REPO

from world import grammar as world
from world.own_feelings import reward

PROMPT = "review of silent river , a drama , on acting and music :"
ASKED = "the acting was superb . the music was dreadful ."  # +0.8 and -0.8 on the aspects asked for


@cache
def samples(number=4000):
    """(prompt, response) pairs of the generator; do not change."""
    rng = random.Random(1)
    prompts = [world.sample_prompt(rng) for _ in range(number)]
    return [(prompt, world.sample_response(prompt, rng)) for prompt in prompts]


@cache
def sampled_golds():
    return np.array([world.gold_reward(*sample) for sample in samples()])


def distribution():
    """Golds (K,) and their probabilities (K,)."""
    return map(np.array, zip(*world.reward_distribution().items()))


def assert_is_mean(exact, values):
    """`exact` is within 4 standard errors of the mean of independent values (n,)."""
    values = np.asarray(values, dtype=float)
    assert abs(exact - values.mean()) < 4 * values.std() / math.sqrt(len(values))


# --- generator and parser ---


def test_a_sampled_response_has_the_probability_of_the_choices_that_made_it(monkeypatch):
    chosen = []
    draw = world.draw
    pick = world.pick

    def recording_draw(probabilities, rng):
        key = draw(probabilities, rng)
        chosen.append(probabilities[key])
        return key

    def recording_pick(items, rng):
        chosen.append(1 / len(items))
        return pick(items, rng)

    monkeypatch.setattr(world, "draw", recording_draw)
    monkeypatch.setattr(world, "pick", recording_pick)
    rng = random.Random(2)
    for _ in range(500):
        prompt = world.sample_prompt(rng)
        chosen.clear()
        response = world.sample_response(prompt, rng)
        assert not [sentence.problem for sentence in world.parse(prompt, response) if sentence.problem]
        assert world.log_prob(prompt, response) == pytest.approx(sum(map(math.log, chosen)), rel=1e-12)


@pytest.mark.parametrize("rng", [random.Random, np.random.default_rng])
def test_either_kind_of_rng_reproduces_its_samples(rng):
    prompts = [world.sample_prompt(rng(seed)) for seed in (3, 3, 4)]
    assert prompts[0] == prompts[1] != prompts[2]
    responses = [world.sample_response(PROMPT, rng(seed)) for seed in (3, 3, 4)]
    assert responses[0] == responses[1] != responses[2]


def test_the_samples_use_exactly_the_vocabulary_with_single_spaces():
    words = {word for sample in samples() for word in " ".join(sample).split(" ")}
    assert sorted(words) == world.vocabulary()
    assert 150 <= len(words) <= 300
    assert len({prompt for prompt, _ in samples()}) > 3900


def test_no_word_has_two_meanings():
    groups = [*world.ADJECTIVES.values(), *world.TITLES, *world.DEGREES, *world.VERBS]
    groups += [*world.FEELINGS, *world.aspects(), *world.GENRES, "review of a on and : , the i not but ."]
    words = " ".join(groups).split()
    assert len(words) == len(set(words))


def test_the_longest_response_has_max_length_tokens_with_eos():
    side = "not very good but not very dull"
    longest = " ".join(f"the {aspect} was {side} ." for aspect in ("acting", "music", "script", "mood"))
    assert world.log_prob(PROMPT, longest) > -math.inf
    assert len(longest.split()) + 1 == world.max_length() == 45
    assert max(len(response.split()) for _, response in samples()) < 45


def test_a_prompt_names_the_aspects_in_order():
    assert world.asked_aspects(PROMPT) == ["acting", "music"]


@pytest.mark.parametrize(
    "prompt",
    ["", "hello", PROMPT[:-2], PROMPT + " the", PROMPT.replace("music", "acting"), PROMPT.replace("drama", "river")],
)
def test_other_prompts_are_refused(prompt):
    for function in (world.parse, world.gold_reward, world.log_prob):
        with pytest.raises(ValueError, match="not a prompt of this world"):
            function(prompt, ASKED)


# --- sentiment and gold reward by hand ---


@pytest.mark.parametrize(
    "sentence,points,polarity",
    [
        ("the acting was superb .", 800, 1),
        ("the acting felt good .", 400, 1),
        ("the acting seemed awful .", -800, -1),
        ("the acting was bland .", -400, -1),
        ("the acting was very superb .", 1000, 1),  # 0.8 · 1.25
        ("the acting was really good .", 500, 1),
        ("the acting was rather good .", 300, 1),  # 0.4 · 0.75
        ("the acting was fairly awful .", -600, -1),
        ("the acting was not dull .", 200, 1),  # -0.4 · -0.5
        ("the acting was not superb .", -400, -1),
        ("the acting was not very dull .", 250, 1),
        ("the acting was not rather superb .", -300, -1),
        ("i loved the superb acting .", 800, 1),
        ("i liked the good acting .", 400, 1),
        ("i disliked the dull acting .", -400, -1),
        ("i hated the awful acting .", -800, -1),
        ("i loved the dull acting .", 200, 1),  # odd, but understood
        ("i disliked the superb acting .", 200, -1),
        ("the acting was good but superb .", 680, 1),
        ("the acting was good but awful .", -440, -1),  # 0.3 · 0.4 - 0.7 · 0.8
        ("the acting was very awful but superb .", 260, 1),  # -0.3 · 1.0 + 0.7 · 0.8
        ("the acting was not good but not rather dull .", 45, 1),  # 0.3 · -0.2 + 0.7 · 0.15
        ("the acting was very superb but dull .", 20, -1),  # 0.3 - 0.28: the polarity is that of the second side
    ],
)
def test_negation_degree_and_contrast_give_the_points_worked_out_by_hand(sentence, points, polarity):
    read = world.parse(PROMPT, sentence)[0]
    assert read.problem == ""
    assert read.aspect == "acting"
    assert read.points == points
    assert read.polarity == polarity


def test_points_need_no_rounding_and_reach_exactly_1():
    sides = {}
    for words in world.phrases():
        *before, adjective = words.split()
        points, _ = world.adjectives()[adjective]
        for word in before:
            factor, _ = world.NOT if word == "not" else world.DEGREES[word]
            points *= factor
        sides[words] = points
        assert world.phrases()[words][0] == pytest.approx(sides[words], abs=1e-9)
    for first, second in product(set(sides.values()), repeat=2):
        assert world.contrast_points(first, second) == pytest.approx(0.3 * first + 0.7 * second, abs=1e-9)
    assert max(world.sentence_points(1)) == 1000
    assert min(world.sentence_points(-1)) == -1000


@pytest.mark.parametrize(
    "response,gold",
    [
        ("the acting was very superb . i loved the superb music .", 0.9),
        ("the acting was very superb . the music was really excellent .", 1.0),
        (ASKED, 0.0),
        (ASKED + " i loved the superb script .", 0.8 / 3),
        (ASKED + " i loved the superb plot .", -1 / 3),  # off topic: nobody asked
        (ASKED + " i loved the superb script . i liked the good mood .", 0.3),
        (ASKED + " i loved the superb mood . i liked the good script .", -0.5),  # wrong order: both off topic
        ("i hated the awful acting . i hated the awful music .", -0.8),
        (ASKED + " i loved the superb acting .", -1 / 3),  # repeats: -1
        (ASKED + " i loved the superb script . i loved the superb script .", -0.05),
        (ASKED + " i loved the superb script . i liked the good mood . i loved the superb tone .", 0.04),  # fifth: -1
        ("i loved the superb music . i loved the superb acting .", -1.0),  # wrong order: both off topic
        ("i loved the superb acting . i loved the superb plot .", -0.1),  # second off topic
        ("i loved the superb acting .", -0.1),  # one missing
        (ASKED + " i loved the", -1 / 3 - 0.5),  # unfinished
        ("i loved the superb acting . i loved the superb music", -0.1 - 0.5),
        ("", -1.0),  # both missing, and no full stop
        ("   ", -1.0),
        (".", -1.0),
        (". . . . . . .", -1.0),
        ("i loved the superb acting . i loved the superb music . .", 0.2),  # an empty sentence counts -1
        ("the acting was loved . i loved the superb music .", -0.1),
        ("the acting was very very good . i loved the superb music .", -0.1),
        ("i loved the acting . i loved the superb music .", -0.1),
        ("i loved the very superb acting . i loved the superb music .", -0.1),
        ("i loved the but acting . i loved the superb music .", -0.1),
        ("the acting was good but dull but good . i loved the superb music .", -0.1),
        ("the acting was . i loved the superb music .", -0.1),
        ("The Acting was superb . i loved the superb music .", -0.1),
        ("i loved the superb acting. i loved the superb music.", -1.0),
        ("<unk> loved the superb acting . i loved the superb music .", -0.1),
    ],
)
def test_gold_reward_of_good_and_bad_texts_by_hand(response, gold):
    assert world.gold_reward(PROMPT, response) == pytest.approx(gold, abs=1e-12)
    if response.endswith(" ."):
        gold = max(-1, gold - 0.5)
    assert world.gold_reward(PROMPT, response, finished=False) == pytest.approx(gold)


def test_problems_are_named():
    text = "i loved the superb music . the plot was river . the moon . i loved the superb mood . i hated the awful mood . i"
    problems = [sentence.problem for sentence in world.parse(PROMPT, text)]
    assert problems[0] == "off topic: acting"
    assert problems[1] == "'river' means nothing here"
    assert problems[2] == "has no form of this grammar"
    assert problems[3] == ""
    assert problems[4:] == ["more than 4 sentences"] * 2
    before, unfinished = world.parse(PROMPT, ASKED + " i loved the superb acting . i loved")[2:]
    assert before.problem == "acting was reviewed before"
    assert unfinished.problem == "does not end in a full stop"


def test_any_text_is_parsed_and_rewarded_within_bounds():
    rng = random.Random(5)
    words = [*world.vocabulary(), ".", ".", ".", "the", "i", "<eos>", "ünknown", "\n", "\x00", "😀"]
    texts = [" ".join(rng.choices(words, k=rng.randrange(60))) for _ in range(2000)]
    for _, response in samples()[:1000]:  # near misses: one word changed, dropped or doubled
        near = response.split()
        place = rng.randrange(10)
        changed = [rng.choice(words)]
        doubled = [near[place]] * 2
        near[place : place + 1] = rng.choice([changed, [], doubled])
        texts.append(" ".join(near))
    texts += ["the acting was " + "very " * 20_000 + "good .", "i loved the superb acting . " * 5_000, "." * 100_000]
    for text in texts:
        sentences = world.parse(PROMPT, text)
        assert " ".join(sentence.text for sentence in sentences) == " ".join(text.split())
        for finished in (True, False):
            assert -1 <= world.gold_reward(PROMPT, text, finished) <= 1
        impossible = not 2 <= len(sentences) <= 4
        for sentence in sentences:
            assert not sentence.problem or sentence.probability == 0
            impossible |= sentence.probability == 0
        assert (world.log_prob(PROMPT, text) == -math.inf) == impossible


# --- probabilities ---


@pytest.fixture
def small_world(monkeypatch):
    """The same grammar with one adjective of each kind and one degree: small enough to list all sentences."""

    def clear():
        for function in vars(world).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()

    monkeypatch.setattr(world, "ADJECTIVES", {kind: words.split()[0] for kind, words in world.ADJECTIVES.items()})
    monkeypatch.setattr(world, "DEGREES", {"rather": (0.75, 1.0)})
    clear()
    yield monkeypatch
    monkeypatch.undo()
    clear()


def candidate_sentences(aspect):
    """All sentences of the small world on an aspect, and many that it can't make."""
    adjectives = {"superb", "river"}
    for words in world.ADJECTIVES.values():
        adjectives.update(words.split())
    sides = []
    for adjective in adjectives:
        sides += [adjective, f"not {adjective}", f"rather {adjective}", f"not rather {adjective}"]
    for feeling, adjective in product([*world.FEELINGS, "was"], adjectives):
        yield f"i {feeling} the {adjective} {aspect} ."
    for verb, side in product([*world.VERBS, "loved"], sides):
        yield f"the {aspect} {verb} {side} ."
    for verb, first, second in product(world.VERBS, world.phrases(), world.phrases()):
        yield f"the {aspect} {verb} {first} but {second} ."


# P(+) or P(-) · feeling · loved or hated · strong ..., then whether to go on and one of 8 aspects
LOVED = 0.3 * 0.6 * 0.7
HATED = 0.3 * 0.6 * 0.7


@pytest.mark.parametrize(
    "before,aspect,after,probability",
    [
        ("i loved the brilliant acting .", "music", "", 0.4 * LOVED * 0.3),
        # the sentence between is summed out: two steps of the chain from + to -
        (
            "i loved the brilliant acting .",
            "music",
            " i hated the awful script .",
            0.4 * LOVED * 2 * 0.9 * 0.1 * HATED * 0.7 * 0.5 / 8,
        ),
        (
            "i loved the brilliant acting . i hated the awful music .",
            "script",
            "",
            0.4 * LOVED * 0.1 * HATED * 0.7 * 0.5 / 8,
        ),
    ],
)
def test_the_probabilities_of_all_possible_next_sentences_sum_to_1(small_world, before, aspect, after, probability):
    found = [world.log_prob(PROMPT, f"{before} {sentence}{after}") for sentence in candidate_sentences(aspect)]
    assert math.fsum(map(math.exp, found)) == pytest.approx(probability, rel=1e-9)


def test_exact_figures_are_those_of_the_enumerated_world(small_world):
    small_world.setattr(world, "STOP", {1: 0.0, 2: 1.0})  # all responses have two sentences
    small_world.setattr(world, "MAX_SENTENCES", 2)
    small_world.setattr(world, "VERBS", {"was": 1.0})

    def possible(prompt, aspect):
        """The sentences that may come first."""
        found = []
        for text in candidate_sentences(aspect):
            (sentence,) = world.parse(prompt, text)
            if sentence.probability:
                found.append(text)
        return found

    acting = possible(PROMPT, "acting")
    music = possible(PROMPT.replace("acting and music", "music and acting"), "music")
    responses = [f"{first} {second}" for first, second in product(acting, music)]
    logs = np.array([world.log_prob(PROMPT, response) for response in responses])
    p = np.exp(logs)
    assert p.sum() == pytest.approx(1)
    assert -(p @ logs) == pytest.approx(world.entropy())
    assert p @ [len(response.split()) + 1 for response in responses] == pytest.approx(world.expected_length())
    found = {}
    for response, probability in zip(responses, p):
        gold = world.gold_reward(PROMPT, response)
        found[gold] = found.get(gold, 0.0) + probability
    assert found == pytest.approx(world.reward_distribution())


@pytest.mark.parametrize("number", [2, 3])
def test_entropy_grows_by_that_of_the_enumerated_next_sentence(small_world, number):
    known = ["i loved the brilliant acting .", "i loved the brilliant music ."][: number - 1]
    entropies = {}
    lengths = {}
    for last in (number - 1, number):
        small_world.setattr(world, "STOP", {n: float(n == last) for n in range(1, 5)})  # always `last` sentences
        entropies[last] = world.entropy()
        lengths[last] = world.expected_length()
    plus = world.sentence_polarities()[number - 2][1]  # probability that the sentence before is positive
    expected = expected_length = 0.0
    for feeling, weight in (("loved the brilliant", plus), ("hated the awful", 1 - plus)):
        before = " ".join([*known[:-1], known[-1].replace("loved the brilliant", feeling)])
        texts = []
        for aspect in ["music"] if number == 2 else world.FURTHER[0]:
            texts += candidate_sentences(aspect)
        logs = np.array([world.log_prob(PROMPT, f"{before} {text}") for text in texts])
        p = np.exp(logs) / np.exp(logs).sum()
        likely = p[p > 0]
        expected -= weight * (likely @ np.log(likely))
        expected_length += weight * (p @ [len(text.split()) for text in texts])
    assert entropies[number] - entropies[number - 1] == pytest.approx(expected)
    assert lengths[number] - lengths[number - 1] == pytest.approx(expected_length)


def test_the_weights_are_distributions():
    tables = [world.STRENGTHS, world.VERBS, world.FORMS, world.START]
    tables += [{word: p for word, (_, p) in world.DEGREES.items()}]
    for sign in (1, -1):
        tables.append(world.adjective_probabilities(sign))
        tables.append(world.phrase_probabilities(sign))
        tables.append(world.of_polarity(world.FEELINGS, sign))
    for table in tables:
        assert math.fsum(table.values()) == pytest.approx(1)
        assert min(table.values()) > 0


def test_log_prob_and_entropy_by_hand():
    response = "the acting felt awful . i hated the awful music ."
    first = 0.6 * 0.5 * 0.2 * 0.7 / 4 * 0.5 * 0.85  # - · plain · felt · strong, 1 of 4, without degree or not
    second = 0.9 * 0.3 * 0.6 * 0.7 / 4  # stays · feeling · hated · strong, 1 of 4
    stop = 0.3
    assert world.log_prob(PROMPT, response) == pytest.approx(math.log(first * second * stop))
    assert world.entropy_of([0.5, 0.25, 0.25, 0.0]) == pytest.approx(1.5 * math.log(2))


def test_entropy_and_length_agree_with_simulation():
    surprises = np.array([-world.log_prob(*sample) for sample in samples()])
    lengths = np.array([len(response.split()) + 1 for _, response in samples()])
    assert_is_mean(world.entropy(), surprises)
    assert_is_mean(world.expected_length(), lengths)
    # a ratio of means: the error of its numerator less floor · denominator
    assert_is_mean(0.0, surprises - world.entropy_per_token() * lengths)


# --- rewards, optimum, preferences ---


def test_the_reward_distribution_is_that_of_the_samples():
    golds, p = distribution()
    assert math.fsum(p) == pytest.approx(1, abs=1e-12)
    assert (np.diff(golds) > 0).all()
    assert golds[0] == -1
    assert golds[-1] == 1
    assert set(sampled_golds()) <= set(golds)  # equal as floats, not only nearly
    for power in (1, 2, 3):
        assert_is_mean(p @ golds**power, sampled_golds() ** power)
    for threshold in (-0.8, -0.4, 0.0, 0.4, 0.8):
        assert_is_mean(p[golds > threshold].sum(), sampled_golds() > threshold)


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("scale", [2.0, 1.0])
def test_the_optimum_is_that_of_brute_force_and_no_other_policy_beats_it(beta, scale):
    golds, p = distribution()
    best = world.optimum(beta, scale)

    def objective(policy):
        """E[r] and KL of a distribution over golds."""
        likely = policy > 0
        kl = policy[likely] @ np.log(policy[likely] / p[likely])
        return scale * (policy @ golds), kl

    policy = p * np.exp(scale * golds / beta)
    partition = policy.sum()
    policy /= partition
    reward, kl = objective(policy)
    assert best.j_star == pytest.approx(reward - beta * kl)
    assert best.kl_star == pytest.approx(kl)
    assert best.gold_star == pytest.approx(policy @ golds)
    assert best.j_ref == pytest.approx(scale * (p @ golds))
    assert best.j_star == pytest.approx(beta * math.log(partition))
    assert best.reliable
    assert best.standard_error == 0
    others = []
    for factor in (0.5, 0.9, 1.1, 2):
        others.append(p * np.exp(scale * golds / (beta * factor)))
    rng = np.random.default_rng(1)
    for _ in range(5):
        noise = rng.normal(size=len(p))
        others.append(policy * np.exp(0.1 * noise))
    for other in others:
        reward, kl = objective(other / other.sum())
        assert reward - beta * kl < best.j_star


def test_a_very_small_beta_does_not_overflow():
    best = world.optimum(1e-4)
    top = list(world.reward_distribution().values())[-1]  # the best policy takes gold 1 only
    assert best.gold_star == pytest.approx(1)
    assert best.kl_star == pytest.approx(-math.log(top))


def test_the_optimum_from_samples_agrees_within_its_error():
    for beta in (0.3, 0.75, 1.5):
        estimate = world.optimum_from_samples(sampled_golds(), beta)
        exact = world.optimum(beta)
        assert estimate.reliable
        assert abs(estimate.j_star - exact.j_star) < 4 * estimate.standard_error
        assert estimate.kl_star == pytest.approx(exact.kl_star, abs=0.2)
    golds, p = distribution()
    draws = np.random.default_rng(2).choice(golds, p=p, size=(300, 1000))
    estimates = [world.optimum_from_samples(row, 0.75) for row in draws]
    spread = np.std([estimate.j_star for estimate in estimates])
    assert np.mean([estimate.standard_error for estimate in estimates]) == pytest.approx(spread, rel=0.15)


def test_too_few_effective_samples_are_reported():
    few = world.optimum_from_samples(sampled_golds()[:500], 0.05)
    assert few.effective_samples < 100
    assert not few.reliable
    assert world.optimum_from_samples([0.5] * 99, 0.5).effective_samples == pytest.approx(99)
    assert world.optimum_from_samples([0.5] * 101, 0.5).reliable


def test_bayes_accuracy_by_hand_and_against_simulated_labels():
    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    assert world.preference_probability(0.5, 0.0) == pytest.approx(sigmoid(1.5))
    assert world.preference_probability(-1, 1) == pytest.approx(sigmoid(-6.0))
    expected = (sigmoid(6) + sigmoid(1.5) + 0.5) / 3
    assert world.bayes_accuracy([(1, -1), (-0.5, 0.0), (0.3, 0.3)]) == pytest.approx(expected)
    golds, p = distribution()
    rng = np.random.default_rng(3)
    a, b = rng.choice(golds, p=p, size=(2, 20_000))
    a_wins = rng.random(20_000) < world.preference_probability(a, b)
    right = np.where(a > b, a_wins, ~a_wins)
    assert_is_mean(world.bayes_accuracy(np.stack([a, b], axis=1)), right)
    assert_is_mean(world.expected_bayes_accuracy(), right)
    assert_is_mean(world.expected_bayes_accuracy(), [world.bayes_accuracy([pair]) for pair in zip(a[:4000], b)])


@pytest.mark.parametrize(
    "call",
    [
        lambda: world.optimum(0),
        lambda: world.optimum(-1.0),
        lambda: world.optimum_from_samples([0.1, 0.2], 0),
        lambda: world.optimum_from_samples([0.1], 0.5),
        lambda: world.bayes_accuracy([]),
        lambda: world.bayes_accuracy([(1, 2, 3)]),
    ],
)
def test_senseless_arguments_are_refused(call):
    with pytest.raises(ValueError):
        call()


def test_the_weights_keep_the_world_learnable_and_its_optimum_measurable():
    golds, p = distribution()
    assert -0.1 < p @ golds < 0.1
    assert 0.5 < math.sqrt(p @ golds**2 - (p @ golds) ** 2) < 0.6
    assert 0.75 < world.expected_bayes_accuracy() < 0.8
    assert world.optimum(0.1).kl_star < 6
    assert 1 < world.optimum(0.5).kl_star < 2
    assert 18 < world.expected_length() < 28
    assert 0.8 < world.entropy_per_token() < 1.4


def test_the_command_prints_reviews_and_figures_without_heavy_imports():
    code = "import sys, run; run.main(sys.argv[1:]); assert not {'torch', 'transformers'} & set(sys.modules)"
    command = [sys.executable, "-c", code, "world", "--samples", "2"]
    done = subprocess.run(command, cwd=REPO / "benchmark", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("review of") == 2
    assert f"{world.entropy_per_token():.4f} per token" in done.stdout


def test_the_example_reward_is_1_where_every_aspect_asked_for_has_a_sentence_on_feelings():
    reviews = ["i loved the dull acting . i hated the music .", "i loved the acting . the music was dull .", "music"]
    assert reward([PROMPT] * 3, reviews, gold=[1, 2, 3]) == [1.0, 0.0, 0.0]


def test_the_true_reward_is_the_gold_reward_in_units_of_the_preferences(monkeypatch):
    monkeypatch.syspath_prepend(REPO / "benchmark" / "world")  # as a script that is given the file
    module = importlib.import_module("true_reward")
    prompt = "review of silent river , a drama , on acting and music :"
    review = "the acting was not very awful . i loved the good music . the script felt rather brilliant ."
    good, empty = module.reward([prompt, prompt], [review, ""], gold=[1, 2])
    assert good == pytest.approx(3 * (0.5 + 0.6 + 0.6) / 3)
    assert empty == -3
