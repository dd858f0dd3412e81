"""The reward that the preferences of the small language world are drawn with, where no reward model stands between.

python algos/rlhf_ppo.py --reward-model benchmark/world/true_reward.py:reward --total-episodes 16384
"""

from grammar import BT_SCALE, gold_reward


def reward(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """BT_SCALE times the gold reward of each review. A missing end is what --missing-eos-penalty is for."""
    return [BT_SCALE * gold_reward(prompt, text) for prompt, text in zip(prompts, completions)]
