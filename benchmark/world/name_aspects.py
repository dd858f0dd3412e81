"""A reward that a program can check, for algos/grpo.py and rlhf_ppo.py on the small language world.

    python algos/grpo.py --reward-model benchmark/world/name_aspects.py:reward

A prompt asks for two aspects; a review earns its reward by naming both, whatever it says of them.
"""


def reward(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """1 for a review that names every aspect that its prompt asks for ("… , on directing and ending :"), else 0."""
    aspects = [prompt.rpartition(" on ")[2].rstrip(" :").split(" and ") for prompt in prompts]
    return [float(set(wanted) <= set(text.split())) for wanted, text in zip(aspects, completions)]
