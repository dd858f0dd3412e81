"""A reward that a program can check, for algos/grpo.py and rlhf_ppo.py on the small language world.

    python algos/grpo.py --reward-model benchmark/world/own_feelings.py:reward --kl-coef 0.05

A prompt asks for two aspects ("… , on directing and ending :"). A review earns its reward by telling of each, in a
sentence of its own, what the writer felt: "i loved the ending ."
"""


def reward(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """1 for a review with a sentence "i … aspect ." about every aspect that its prompt asks for, else 0."""
    asked = [set(prompt.rpartition(" on ")[2].rstrip(" :").split(" and ")) for prompt in prompts]
    reviews = [[sentence.split() for sentence in text.split(".")] for text in completions]
    felt = [{words[-1] for words in review if words[:1] == ["i"]} for review in reviews]
    return [float(wanted <= told) for wanted, told in zip(asked, felt)]
