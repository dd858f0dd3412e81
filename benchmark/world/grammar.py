"""The small language world: a grammar of short film reviews whose truth is known.

A prompt names a film, its genre and two aspects; a response reviews them in two to four sentences. All tokens are
separated by single spaces, so that a whitespace tokenizer reads them; a text is prompt + " " + response.

    review of silent river , a drama , on acting and music :
    the acting was not very awful . i loved the good music . the script felt rather brilliant .
    gold reward (0.5 + 0.6 + 0.6) / 3

The first sentence is on the first aspect asked for, the second on the second, a third on how the film was made (script,
camera, ...), a fourth on what it leaves behind (mood, message, ...). Every text has one derivation, so its probability is known, and with it the generator's entropy (the floor of the
SFT loss). The gold reward reads the sentiment from the parse. Preferences are Bradley-Terry draws on it, so the best
possible accuracy of a reward model is known, and so is the optimum of RL with a KL penalty.

    python benchmark/run.py world        # sampled reviews and all exact figures, in half a second

Units: entropies, KL and log-probabilities in nats, lengths in tokens. Sentiment is counted in points, 1000 points = 1:
every score of the grammar is a whole number of points, so sums are exact. `rng` is a random.Random or numpy Generator.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

# --- the grammar: words with their probabilities and points ---

TITLES = (  # one word of each
    "silent golden broken hidden distant crimson frozen burning lonely ancient wild secret falling painted electric "
    "midnight velvet hollow bitter scarlet drifting iron paper restless sleeping winding amber stolen sunken endless "
    "wooden savage gentle shattered forgotten rising empty northern borrowed crooked",
    "river garden mirror winter harbour station island mountain letter summer forest bridge window desert orchard "
    "lantern castle shadow meadow engine compass ocean village tower journey carnival thunder valley diary circus "
    "horizon sparrow cathedral ballroom lighthouse frontier staircase kingdom railway telegram",
)
GENRES = (
    "drama comedy thriller western musical fantasy documentary mystery adventure parody noir epic satire biopic heist"
).split()

POINTS = {"strong": 800, "mild": 400}  # of a positive adjective; a negative one has the opposite
STRENGTHS = {"strong": 0.7, "mild": 0.3}  # probability of each
ADJECTIVES = {
    ("strong", 1): "brilliant superb wonderful excellent",
    ("mild", 1): "good nice pleasant decent",
    ("mild", -1): "dull weak bland mediocre",
    ("strong", -1): "awful terrible dreadful horrible",
}
ASPECTS = (
    "acting plot music dialogue pacing ending humour photography lighting editing casting directing scenery opening "
    "romance suspense"
).split()  # that prompts ask for
FURTHER = (  # that a third sentence is on, and a fourth
    "script camera sound budget cast trailer poster finale".split(),
    "mood tone style message story theme atmosphere spirit".split(),
)

DEGREES = {"": (1.0, 0.5), "very": (1.25, 0.15), "really": (1.25, 0.1), "rather": (0.75, 0.15), "fairly": (0.75, 0.1)}
NOT = (-0.5, 0.15)  # "not dull" is mildly positive; like DEGREES: factor on the points, probability
VERBS = {"was": 0.6, "felt": 0.2, "seemed": 0.2}
FEELINGS = {"loved": (800, 0.6), "liked": (400, 0.4), "disliked": (-400, 0.4), "hated": (-800, 0.6)}
CONTRAST = (0.3, 0.7)  # weights of the two sides of "but"
FORMS = {"plain": 0.5, "feeling": 0.3, "contrast": 0.2}

START = {1: 0.4, -1: 0.6}  # polarity of the first sentence
STAY = 0.9  # probability that the next sentence keeps the polarity
MIN_SENTENCES, MAX_SENTENCES = 2, 4
STOP = {1: 0.0, 2: 0.3, 3: 0.5, 4: 1.0}  # probability that the text ends after so many sentences
BT_SCALE = 3.0  # gold reward to Bradley-Terry logits


def vocabulary() -> list[str]:
    """All words of prompts and responses, sorted, without special tokens."""
    texts = [*TITLES, *GENRES, *ADJECTIVES.values(), *aspects(), *DEGREES, *VERBS, *FEELINGS]
    texts.append("review of a on and : , the i not but .")
    words = " ".join(texts).split()
    return sorted(set(words))


@cache
def aspects() -> frozenset[str]:
    """All that a sentence can be on."""
    return frozenset([*ASPECTS, *FURTHER[0], *FURTHER[1]])


@cache
def adjectives() -> dict[str, tuple[int, float]]:
    """The adjectives: points, and probability given the polarity."""
    found = {}
    for (strength, polarity), words in ADJECTIVES.items():
        points = polarity * POINTS[strength]
        probability = STRENGTHS[strength] / len(words.split())
        for word in words.split():
            found[word] = (points, probability)
    return found


@cache
def phrases() -> dict[str, tuple[int, float]]:
    """All adjective phrases, [not] [degree] adjective: points, and probability given the polarity (their sign)."""
    found = {}
    for negation, negation_factor, negation_probability in (("", 1.0, 1 - NOT[1]), ("not", *NOT)):
        for degree, (degree_factor, degree_probability) in DEGREES.items():
            for adjective, (points, probability) in adjectives().items():
                phrase = " ".join(f"{negation} {degree} {adjective}".split())
                points = round(points * degree_factor * negation_factor)
                found[phrase] = (points, probability * degree_probability * negation_probability)
    return found


def contrast_points(first: int, second: int) -> int:
    """Points of "<first> but <second>"."""
    return round(CONTRAST[0] * first + CONTRAST[1] * second)


def feeling_points(feeling: int, adjective: int) -> int:
    """Points of "i <feeling> the <adjective> <aspect>": the mean."""
    return round((feeling + adjective) / 2)


def of_polarity(words: Mapping[str, tuple[int, float]], polarity: int) -> dict[str, float]:
    """Probabilities of those words or phrases whose points have the sign of `polarity`."""
    return {word: probability for word, (points, probability) in words.items() if points * polarity > 0}


@cache
def adjective_probabilities(polarity: int) -> dict[str, float]:
    """Probabilities of the adjectives of one polarity."""
    return of_polarity(adjectives(), polarity)


@cache
def phrase_probabilities(polarity: int) -> dict[str, float]:
    """Probabilities of the adjective phrases of one polarity."""
    return of_polarity(phrases(), polarity)


def next_polarity(polarity: int) -> dict[int, float]:
    """Probabilities of the next sentence's polarity: a Markov chain."""
    return {polarity: STAY, -polarity: 1 - STAY}


# --- the generator ---


def draw(probabilities: Mapping[Any, float], rng) -> Any:
    """One key, drawn with its probability."""
    left = rng.random()
    for key, probability in probabilities.items():
        left -= probability
        if left < 0:
            break
    return key  # the last one where rounding leaves a rest


def pick(items: Sequence[str], rng) -> str:
    """One item, drawn uniformly."""
    return items[int(rng.random() * len(items))]


def sample_prompt(rng) -> str:
    """A prompt, uniform over titles, genres and ordered pairs of different aspects."""
    title = " ".join(pick(words.split(), rng) for words in TITLES)
    genre = pick(GENRES, rng)
    first = pick(ASPECTS, rng)
    second = pick([aspect for aspect in ASPECTS if aspect != first], rng)
    return f"review of {title} , a {genre} , on {first} and {second} :"


def asked_aspects(prompt: str) -> list[str]:
    """The two aspects that a prompt asks for. ValueError when it is no prompt of this world."""
    match prompt.split():
        case ["review", "of", *title, ",", "a", genre, ",", "on", first, "and", second, ":"] if (
            len(title) == len(TITLES)
            and all(word in known.split() for word, known in zip(title, TITLES))
            and genre in GENRES
            and first in ASPECTS
            and second in ASPECTS
            and first != second
        ):
            return [first, second]
    raise ValueError(f"not a prompt of this world: {prompt[:200]!r}")


def possible_aspects(asked: list[str]) -> list[list[str]]:
    """What each sentence may be on, given the two aspects asked for."""
    return [*([aspect] for aspect in asked), *FURTHER]


def sample_sentence(aspect: str, polarity: int, rng) -> str:
    """A sentence of given polarity on an aspect."""
    form = draw(FORMS, rng)
    if form == "feeling":
        feeling = draw(of_polarity(FEELINGS, polarity), rng)
        return f"i {feeling} the {draw(adjective_probabilities(polarity), rng)} {aspect} ."
    phrase = draw(phrase_probabilities(polarity), rng)
    if form == "contrast":
        phrase = f"{draw(phrase_probabilities(-polarity), rng)} but {phrase}"
    return f"the {aspect} {draw(VERBS, rng)} {phrase} ."


def sample_response(prompt: str, rng) -> str:
    """A review that answers the prompt."""
    possible = possible_aspects(asked_aspects(prompt))
    polarity = draw(START, rng)
    sentences = [sample_sentence(pick(possible[0], rng), polarity, rng)]
    while not draw({True: STOP[len(sentences)], False: 1 - STOP[len(sentences)]}, rng):
        polarity = draw(next_polarity(polarity), rng)
        sentences.append(sample_sentence(pick(possible[len(sentences)], rng), polarity, rng))
    return " ".join(sentences)


# --- the parser, exact probabilities and the gold reward ---


@dataclass(frozen=True)
class Sentence:
    """One sentence of a response as the parser reads it."""

    text: str
    """its words"""
    problem: str = ""
    """why it is refused; empty when it is not, and only then the rest but `aspect` means anything"""
    aspect: str = ""
    """what it is on; empty when that can't be told"""
    points: int = 0
    """sentiment in thousandths, -1000 to 1000"""
    polarity: int = 0
    """+1 or -1; of a contrast that of its second side, of a feeling its own, whatever the sign of the points"""
    probability: float = 0.0
    """of the words, given aspect and polarity; 0 for sides that don't belong together, which are read all the same"""


def read_sentence(words: Sequence[str]) -> Sentence:
    """Parse one sentence by itself, without its context. Sides that don't belong together are understood."""
    text = " ".join(words)
    match words:
        case [*_, last] if last != ".":
            return Sentence(text, "does not end in a full stop")
        case ["i", feeling, "the", adjective, aspect, "."] if feeling in FEELINGS and aspect in aspects():
            if adjective not in adjectives():
                return Sentence(text, f"{adjective!r} is no adjective", aspect)
            (first, p), (second, q) = FEELINGS[feeling], adjectives()[adjective]
            probability = FORMS["feeling"] * p * q * (first * second > 0)
            return Sentence(text, "", aspect, feeling_points(first, second), 1 if first > 0 else -1, probability)
        case ["the", aspect, verb, *rest, "."] if aspect in aspects() and verb in VERBS:
            sides = " ".join(rest).split(" but ")
            unknown = [side for side in sides if side not in phrases()]
            if unknown or len(sides) > 2:
                return Sentence(text, f"{(unknown or sides)[-1]!r} means nothing here", aspect)
            *first, (points, p) = (phrases()[side] for side in sides)
            polarity = 1 if points > 0 else -1
            probability = VERBS[verb] * p
            if not first:
                return Sentence(text, "", aspect, points, polarity, FORMS["plain"] * probability)
            ((other, q),) = first
            probability *= FORMS["contrast"] * q * (other * points < 0)
            return Sentence(text, "", aspect, contrast_points(other, points), polarity, probability)
    return Sentence(text, "has no form of this grammar")


def parse(prompt: str, response: str) -> list[Sentence]:
    """The sentences of any text, in order, each with its aspect and sentiment or the problem with it.

    A problem is also an aspect that was not asked for or does not belong there, one reviewed before, or a fifth sentence.
    Whitespace of any kind separates words. Never fails on a response; ValueError when the prompt is not of this world.
    """
    possible = possible_aspects(asked_aspects(prompt))
    reviewed = set()
    sentences = []
    start = 0
    words = response.split()
    ends = [i + 1 for i, word in enumerate(words) if word == "."]
    if words and words[-1] != ".":
        ends.append(len(words))  # unfinished
    for number, end in enumerate(ends):
        sentence = read_sentence(words[start:end])
        if number >= MAX_SENTENCES:
            sentence = Sentence(sentence.text, f"more than {MAX_SENTENCES} sentences", sentence.aspect)
        elif not sentence.problem and sentence.aspect in reviewed:
            sentence = Sentence(sentence.text, f"{sentence.aspect} was reviewed before", sentence.aspect)
        elif not sentence.problem and sentence.aspect not in possible[number]:
            sentence = Sentence(sentence.text, f"off topic: {' or '.join(possible[number])}", sentence.aspect)
        if not sentence.problem:
            reviewed.add(sentence.aspect)
        sentences.append(sentence)
        start = end
    return sentences


def log_prob(prompt: str, response: str) -> float:
    """Exact log-probability (nats) of a response and its end under the generator; -inf where it can't be generated."""
    sentences = parse(prompt, response)
    if len(sentences) < MIN_SENTENCES or any(sentence.problem or not sentence.probability for sentence in sentences):
        return -math.inf
    total = 0.0
    polarities = START
    possible = possible_aspects(asked_aspects(prompt))
    for number, sentence in enumerate(sentences, start=1):
        stop = STOP[number] if number == len(sentences) else 1 - STOP[number]
        probability = polarities[sentence.polarity] * sentence.probability / len(possible[number - 1])
        total += math.log(probability * stop)
        polarities = next_polarity(sentence.polarity)
    return total


def gold_reward(prompt: str, response: str, finished: bool = True) -> float:
    """Gold reward in [-1, 1]: the mean sentiment of the sentences, where each with a problem counts -1.

    Each sentence missing to two counts -1 as well. A text that ends without a full stop or, `finished` false, without
    the end-of-sequence token loses another 0.5. The result is clipped to [-1, 1].
    """
    points = [-1000 if sentence.problem else sentence.points for sentence in parse(prompt, response)]
    points += [-1000] * (MIN_SENTENCES - len(points))
    gold = sum(points) / (1000 * len(points))
    if not finished or response.split()[-1:] != ["."]:
        gold -= 0.5
    return max(-1.0, min(1.0, gold))


# --- exact quantities ---


def entropy_of(probabilities: Iterable[float]) -> float:
    """Entropy -sum p log p of a distribution, in nats."""
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def sentence_entropy(polarity: int) -> float:
    """Entropy of a sentence's words given aspect and polarity, in nats."""
    phrase = entropy_of(phrase_probabilities(polarity).values())
    other = entropy_of(phrase_probabilities(-polarity).values())
    verb = entropy_of(VERBS.values())
    feeling = entropy_of(of_polarity(FEELINGS, polarity).values())
    feeling += entropy_of(adjective_probabilities(polarity).values())
    words = FORMS["plain"] * (verb + phrase)
    words += FORMS["feeling"] * feeling
    words += FORMS["contrast"] * (verb + other + phrase)
    return entropy_of(FORMS.values()) + words


def sentence_length(polarity: int) -> float:
    """Mean length of a sentence given its polarity, in tokens."""
    length = {1: 0.0, -1: 0.0}
    for sign in length:
        for phrase, p in phrase_probabilities(sign).items():
            length[sign] += p * len(phrase.split())
    plain = 4 + length[polarity]
    feeling = 6
    contrast = 5 + length[polarity] + length[-polarity]
    return FORMS["plain"] * plain + FORMS["feeling"] * feeling + FORMS["contrast"] * contrast


@cache
def sentence_points(polarity: int) -> dict[int, float]:
    """Distribution of a sentence's points given its polarity."""
    phrase: dict[int, dict[int, float]] = {1: {}, -1: {}}
    for points, p in phrases().values():
        sign = 1 if points > 0 else -1
        phrase[sign][points] = phrase[sign].get(points, 0.0) + p
    found = {points: FORMS["plain"] * p for points, p in phrase[polarity].items()}
    for first, p in FEELINGS.values():
        for second, q in adjectives().values():
            if first * polarity > 0 and second * polarity > 0:
                points = feeling_points(first, second)
                found[points] = found.get(points, 0.0) + FORMS["feeling"] * p * q
    for first, p in phrase[-polarity].items():
        for second, q in phrase[polarity].items():
            points = contrast_points(first, second)
            found[points] = found.get(points, 0.0) + FORMS["contrast"] * p * q
    return found


def sentence_polarities() -> list[dict[int, float]]:
    """For each sentence number: the probability that there is one and that it has this polarity."""
    found = [START]
    while STOP[len(found)] < 1:
        reached = dict.fromkeys(START, 0.0)
        for polarity, p in found[-1].items():
            for following, q in next_polarity(polarity).items():
                reached[following] += p * (1 - STOP[len(found)]) * q
        found.append(reached)
    return found


def entropy() -> float:
    """Entropy of a response given its prompt, in nats: the sum over all choices made, by the chain rule."""
    total = entropy_of(START.values())
    for number, polarities in enumerate(sentence_polarities(), start=1):
        go = 1 - STOP[number]
        next_aspect = math.log(len(FURTHER[number - 2])) if 2 <= number < MAX_SENTENCES else 0.0  # two are given
        for polarity, p in polarities.items():
            going_on = entropy_of(next_polarity(polarity).values()) + next_aspect
            total += p * (sentence_entropy(polarity) + entropy_of([STOP[number], go]) + go * going_on)
    return total


def expected_length() -> float:
    """Mean length of a response in tokens, the end-of-sequence token included."""
    words = 0.0
    for polarities in sentence_polarities():
        for polarity, p in polarities.items():
            words += p * sentence_length(polarity)
    return 1 + words


def max_length() -> int:
    """Length of the longest response in tokens, the end-of-sequence token included."""
    sides = 2 * max(len(phrase.split()) for phrase in phrases())
    return MAX_SENTENCES * (5 + sides) + 1


def generator_loss(rows: Sequence[Mapping[str, str]]) -> float:
    """Negative log-likelihood per token, in nats, of reviews under the grammar they come from: the floor of SFT."""
    nats = -sum(log_prob(row["prompt"], row["completion"]) for row in rows)
    return nats / sum(len(row["completion"].split()) + 1 for row in rows)


def entropy_per_token() -> float:
    """Nats per token: the lowest SFT loss that any model can reach, when averaged over all tokens of a large corpus."""
    return entropy() / expected_length()


@cache
def reward_distribution() -> dict[float, float]:
    """Probability of each gold reward of the generator's responses (any prompt), in rising order."""
    found: dict[float, float] = {}
    sums = {polarity: {0: p} for polarity, p in START.items()}  # next polarity -> points so far -> probability
    for number in range(1, MAX_SENTENCES + 1):
        following: dict[int, dict[int, float]] = {1: {}, -1: {}}
        for polarity, before in sums.items():
            after: dict[int, float] = {}
            for total, p in before.items():
                for points, q in sentence_points(polarity).items():
                    after[total + points] = after.get(total + points, 0.0) + p * q
            for total, p in after.items():
                gold = total / (1000 * number)
                found[gold] = found.get(gold, 0.0) + p * STOP[number]
                for sign, q in next_polarity(polarity).items():
                    reached = following[sign].get(total, 0.0)
                    following[sign][total] = reached + p * (1 - STOP[number]) * q
        sums = following
    return {gold: p for gold, p in sorted(found.items()) if p > 0}


# --- the optimum of RL with a KL penalty, and preferences ---


@dataclass(frozen=True)
class Optimum:
    """Of J(policy) = E_policy[r] - beta KL(policy || reference), r = scale * gold: what the best policy reaches."""

    j_star: float
    """J* = beta log E_ref[exp(r / beta)]"""
    j_ref: float
    """J of the reference itself, E_ref[r]"""
    kl_star: float
    """KL(best policy || reference) in nats"""
    gold_star: float
    """mean gold reward of the best policy"""
    standard_error: float = 0.0
    """of j_star; 0 when exact"""
    effective_samples: float = math.inf
    """(sum w)^2 / sum w^2 of w = exp(r / beta); inf when exact"""

    @property
    def reliable(self) -> bool:
        """Whether at least 100 samples carry the estimate; print no share of J* - J_ref where they do not."""
        return self.effective_samples >= 100


def tilt(golds: np.ndarray, p: np.ndarray, beta: float, scale: float) -> tuple[Optimum, np.ndarray]:
    """The optimum for golds (K,) that the reference has with probability p (K,), and weights (K,) exp(r / beta) / c."""
    if not beta > 0:
        raise ValueError(f"beta must be positive, not {beta}")
    exponents = scale * golds / beta
    weights = np.exp(exponents - exponents.max())  # the largest is 1: never overflows
    log_mean = float(np.log(p @ weights) + exponents.max())
    gold_star = float(p @ (weights * golds) / (p @ weights))
    kl_star = scale * gold_star / beta - log_mean  # E*[log w] - log E_ref[w]
    return Optimum(beta * log_mean, scale * float(p @ golds), kl_star, gold_star), weights


def optimum(beta: float, scale: float = BT_SCALE) -> Optimum:
    """The exact optimum with the generator as reference. ValueError unless beta is positive."""
    distribution = reward_distribution()
    return tilt(np.array(list(distribution)), np.array(list(distribution.values())), beta, scale)[0]


def optimum_from_samples(golds: Sequence[float], beta: float, scale: float = BT_SCALE) -> Optimum:
    """The optimum estimated from the gold rewards (n,) of reference samples, with its error (delta method).

    Ask `reliable` before use: far from the reference only a few samples carry the estimate, which is then biased down.
    ValueError with fewer than two samples or unless beta is positive.
    """
    values = np.asarray(golds, dtype=float)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError("at least two gold rewards are needed, in one dimension")
    found, weights = tilt(values, np.full(len(values), 1 / len(values)), beta, scale)
    standard_error = beta * weights.std(ddof=1) / (weights.mean() * math.sqrt(len(values)))
    effective_samples = weights.sum() ** 2 / (weights**2).sum()
    return Optimum(
        found.j_star, found.j_ref, found.kl_star, found.gold_star, float(standard_error), float(effective_samples)
    )


def preference_probability(gold_a, gold_b, scale: float = BT_SCALE):
    """P(a is preferred to b) = sigmoid(scale (gold_a - gold_b)), Bradley-Terry; numbers or arrays of one shape."""
    return 1 / (1 + np.exp(-scale * (np.asarray(gold_a) - np.asarray(gold_b))))


def bayes_accuracy(pairs: Sequence[tuple[float, float]], scale: float = BT_SCALE) -> float:
    """Accuracy on these pairs of golds (n, 2) that no reward model can beat on average over the preference draws."""
    golds = np.asarray(pairs, dtype=float)
    if golds.ndim != 2 or golds.shape[1] != 2 or not len(golds):
        raise ValueError("pairs of gold rewards are needed, one row each")
    p = preference_probability(golds[:, 0], golds[:, 1], scale)
    return float(np.maximum(p, 1 - p).mean())


def expected_bayes_accuracy(scale: float = BT_SCALE) -> float:
    """The exact mean of `bayes_accuracy` over pairs of independent responses of the generator."""
    golds, probabilities = map(np.array, zip(*reward_distribution().items()))
    total = 0.0
    for gold, p in zip(golds, probabilities):
        total += p * (probabilities @ preference_probability(np.maximum(gold, golds), np.minimum(gold, golds), scale))
    return float(total)


def show(samples: int, seed: int) -> None:
    """Print sampled reviews and the exact figures."""
    rng = random.Random(seed)
    for _ in range(samples):
        prompt = sample_prompt(rng)
        response = sample_response(prompt, rng)
        print(f"{prompt}\n  {response}\n  gold {gold_reward(prompt, response):+.3f}, ", end="")
        print(f"log-probability {log_prob(prompt, response):.2f} nats, {len(response.split()) + 1} tokens with EOS")
    golds, p = map(np.array, zip(*reward_distribution().items()))
    titles = math.prod(len(words.split()) for words in TITLES)
    prompts = titles * len(GENRES) * len(ASPECTS) * (len(ASPECTS) - 1)
    print(f"\nvocabulary            {len(vocabulary())} words, {prompts:,} prompts")
    print(f"response length       {expected_length():.3f} tokens with EOS, at most {max_length()}")
    print(f"entropy               {entropy():.3f} nats per response, {entropy_per_token():.4f} per token")
    print(f"gold reward           mean {p @ golds:+.4f}, std {math.sqrt(p @ golds**2 - (p @ golds) ** 2):.4f}")
    print(f"Bayes accuracy        {expected_bayes_accuracy():.4f} on independent pairs at scale {BT_SCALE}")
    print("beta    J*      J_ref    KL* (nats)  gold")
    for beta in (0.05, 0.1, 0.2, 0.5, 1.0):
        best = optimum(beta)
        print(f"{beta:<6}  {best.j_star:.4f}  {best.j_ref:+.4f}  {best.kl_star:10.4f}  {best.gold_star:+.4f}")
