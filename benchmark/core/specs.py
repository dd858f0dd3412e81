"""What the benchmark runs and what it holds the results against: the table SPECS.

A spec is a script with flags, run with several seeds. It has measures: a logged metric, read as a curve (curves.py)
whose area and final level are compared with references. The margin of a comparison is a share of the way from the
start, a random or untrained policy's level, to the reference. References are recorded from this repository
(reference/ours), or are a peer's (reference/peers); published numbers and known optima are only shown.
"""

import fnmatch
import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from world import ASSETS, grammar

BENCHMARK = Path(__file__).resolve().parent.parent
ALGOS = BENCHMARK.parent / "algos"
REFERENCE = BENCHMARK / "reference"
RESULTS = BENCHMARK / "results"
REAL = BENCHMARK.parent / "runs" / "smollm2"  # a real model and its data, by run.py smollm2
TIERS = ("quick", "full", "mujoco", "real", "atari")  # results/tiers.md has their minutes; Atari is not measured


@dataclass(frozen=True)
class Measure:
    """One number per run, or one curve, that says how good the run was."""

    tag: str
    """TensorBoard tag, or evaluation/<figure> for a figure that `Spec.evaluation` writes"""
    name: str
    """in tables and pictures"""
    higher: bool = True
    """whether more is better"""
    margin: float = 0.1
    """share of |reference - start| by which a run may fall short"""
    start: float | None = None
    """level of a random or untrained policy; None: the beginning of the reference's curve"""
    last: int = 1
    """entries (episodes, evaluations, updates) at the end of a run that make up its final level"""
    optimum: Callable[[], float] | None = None
    """best possible level, where it is known"""


@dataclass(frozen=True)
class Spec:
    """A script on a task."""

    script: str
    task: str
    seeds: dict[str, int]
    """number of seeds in each tier that has the spec"""
    minutes: float
    """of one run on one core, for estimates until they are measured"""
    measures: tuple[Measure, ...]
    flags: tuple[str, ...] = ()
    peer: str = ""
    """file in reference/peers"""
    evaluation: tuple[str, ...] = ()
    """a sub-command of run.py, after the run, that writes figures to evaluation.json, a list of one; {run} is the run directory,
    {cache} a file that runs on the same assets share, other names are the script's flags"""

    @property
    def name(self) -> str:
        """As given on the command line."""
        return f"{self.script}-{self.task}"

    @property
    def environment(self) -> str:
        """The task without the number of steps that a shorter run has behind it, such as -200k."""
        return re.sub(r"-\d+k$", "", self.task)

    @property
    def language(self) -> bool:
        """Whether it is a script on text, which reads the assets."""
        return self.script in ("sft", "reward_model", "dpo", "rlhf_ppo", "grpo")

    @property
    def is_real(self) -> bool:
        """Whether it trains the real model on a task of real/tasks.py."""
        return "real" in self.seeds

    @property
    def recorded_seeds(self) -> int:
        """Seeds of a reference."""
        return max(self.seeds.values())

    def seed(self, index: int) -> int:
        """Environments take seeds s to s + N - 1, so those of control are 1,000 apart."""
        return (index + 1) * (1 if self.language else 1000)


def results(name: str) -> Any:
    """What a command measured for the report, from results/<name>.json; empty when it has not run."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def keep(name: str, content: object) -> None:
    """Write results/<name>.json."""
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def flags_of_script(script: str) -> set[str]:
    """Names of a script's flags, the fields of its Args."""
    source = (ALGOS / f"{script}.py").read_text().partition("class Args")[2].partition("\ndef ")[0]
    return set(re.findall(r"(?m)^    (\w+): .* = ", source))


# --- measures ---


def returns(start: float, margin: float = 0.1, optimum: float | None = None) -> tuple[Measure]:
    """Return of training episodes; `start` is that of uniformly random actions, measured."""
    best = (lambda: optimum) if optimum is not None else None
    return (Measure("charts/episodic_return", "return", start=start, margin=margin, last=100, optimum=best),)


@functools.cache
def held_out(data: str) -> list[dict]:
    """The held-out rows of a data set of the small world."""
    return [json.loads(line) for line in (ASSETS / data / "test.jsonl").open()]


def sft_floor() -> float:
    """Loss of the grammar itself on the held-out reviews, in nats per token."""
    return grammar.generator_loss(held_out("reviews"))


def held_out_golds() -> np.ndarray:
    """Gold rewards (n, 2) of the chosen and the rejected text of the held-out pairs."""
    return np.array([(row["gold_chosen"], row["gold_rejected"]) for row in held_out("preferences")])


def bayes_accuracy() -> float:
    """Accuracy on the held-out pairs of someone who knows the gold rewards."""
    return grammar.bayes_accuracy(held_out_golds())


def bayes_loss() -> float:
    """Expected loss -log P(label) on the held-out pairs of someone who knows the gold rewards."""
    p = grammar.preference_probability(*held_out_golds().T)
    losses = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    return float(losses.mean())


def is_named(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name matches one of the patterns, in which * and ? match any."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


LN2 = 0.6931
TAXI = 7.93  # mean return of the optimal policy over Taxi-v4's start states, by a linear solve (test_benchmark.py)
SFT = (Measure("eval/loss", "held-out loss", higher=False, margin=0.01, optimum=sft_floor),)
ACCURACY = {"name": "held-out accuracy", "margin": 0.25, "start": 0.5, "optimum": bayes_accuracy}
PAIR_LOSS = Measure("eval/loss", "held-out loss", higher=False, margin=0.5, start=LN2, optimum=bayes_loss)
REWARD = (Measure("eval/accuracy", **ACCURACY), PAIR_LOSS)
PAIR_ACCURACY = Measure("eval/rewards/accuracies", **ACCURACY)
RLHF_REWARD = Measure("objective/rlhf_reward", "score - β·KL", margin=0.25, last=4)
SCORE = Measure("objective/scores", "score", margin=0.25, last=4)
HELD_OUT_SCORE = Measure("eval/scores", "held-out score", margin=0.25)
KL = Measure("objective/kl", "KL from the reference", higher=False, margin=0.4, last=4, start=0.0)
SHARE = Measure("evaluation/share", "share of J* − J_ref", margin=0.25, start=0.0, optimum=lambda: 1.0)
GOLD = Measure("evaluation/gold", "gold reward", margin=0.25, start=-0.2)  # it starts about where SFT is
FINAL_KL = Measure("evaluation/kl", "KL from the reference", higher=False, margin=0.25, start=0.0)
DPO = (PAIR_ACCURACY, PAIR_LOSS, SHARE, GOLD, FINAL_KL)
RLHF = (RLHF_REWARD, SCORE, KL, SHARE, GOLD)
TRUE_REWARD = (RLHF_REWARD, SHARE, GOLD, KL)
GRPO = (SCORE, HELD_OUT_SCORE, KL, SHARE, GOLD)
CPU = ("--device", "cpu")
EVALUATE = ("evaluate", "{run}", "--prompts", "1000", "--reference-samples", "30000",
            "--golds", "{cache}", "--json", "{run}/evaluation.json")  # fmt: skip
CONTROL = (*CPU, "--eval-episodes", "0")


def mujoco(env_id: str) -> tuple[str, ...]:
    """Flags of a million steps on a MuJoCo task."""
    return (*CONTROL, "--env-id", env_id, "--normalize", "--total-timesteps", "1000000")


def real(data: str, *flags: str) -> dict[str, Any]:
    """A task of the tier real, on the model and data that run.py smollm2 writes."""
    model = (*CPU, "--bf16", "--model", f"{REAL}/model", "--dataset", f"{REAL}/{data}")
    evaluation = ("evaluate-real", "{run}", "--json", "{run}/evaluation.json")
    return {"task": data, "seeds": {"real": 1}, "flags": (*model, *flags), "evaluation": evaluation}


def judged(name: str, start: float, best: float | None = None) -> Measure:
    """What the judge of a task says of the held-out answers after training; `start` is what it says before."""
    optimum = (lambda: best) if best is not None else None
    return Measure("evaluation/after", name, margin=0.25, start=start, optimum=optimum)


PPO_MUJOCO = ("--num-minibatches", "32", "--num-epochs", "10", "--learning-rate", "3e-4", "--ent-coef", "0",
              "--gamma", "0.99")  # fmt: skip
KL_IN_REWARD = ("--kl-in", "reward", "--scale-rewards", "batch", "--learning-rate", "2e-4")
CARTPOLE = {"task": "CartPole-v1", "flags": CONTROL, "measures": returns(22, optimum=500.0)}
DQN_EXPLORES = ("--gamma", "0.99", "--learning-starts", "10000", "--epsilon-end", "0.05",
                "--exploration-fraction", "0.5")  # fmt: skip
ACROBOT = {"task": "Acrobot-v1", "flags": (*CONTROL, "--env-id", "Acrobot-v1"), "measures": returns(-495)}

SPECS = (
    Spec("dqn", seeds={"quick": 2, "full": 5}, minutes=1, peer="cleanrl_dqn_CartPole-v1.json", **CARTPOLE),
    Spec("dqn", "CartPole-v1-100k", {"full": 5}, 1.2, returns(22, optimum=500.0),
         (*CONTROL, "--total-timesteps", "100000", "--num-envs", "8", "--train-every", "2", "--target-every", "100",
          "--batch-size", "512", "--learning-rate", "4e-4", "--exploration-fraction", "0.1")),
    Spec("reinforce", seeds={"quick": 2, "full": 5}, minutes=0.3, **CARTPOLE),
    Spec("a2c", seeds={"quick": 2, "full": 5}, minutes=0.4, peer="sb3_a2c_CartPole-v1.json", **CARTPOLE),
    Spec("ppo", seeds={"quick": 2, "full": 5}, minutes=0.4, peer="cleanrl_ppo_CartPole-v1.json", **CARTPOLE),
    Spec("dqn", seeds={"full": 5}, minutes=1.5, peer="cleanrl_dqn_Acrobot-v1.json",
         **ACROBOT | {"flags": (*ACROBOT["flags"], "--learning-rate", "2.5e-4", "--no-anneal-lr", "--train-every", "10",
                                "--buffer-size", "10000", *DQN_EXPLORES)}),
    Spec("reinforce", seeds={"full": 5}, minutes=0.9,
         **ACROBOT | {"flags": (*ACROBOT["flags"], "--learning-rate", "5e-3", "--gamma", "0.95")}),
    Spec("a2c", seeds={"full": 5}, minutes=0.6, peer="sb3_a2c_Acrobot-v1.json",
         **ACROBOT | {"flags": (*ACROBOT["flags"], "--ent-coef", "0.01")}),
    Spec("ppo", seeds={"full": 5}, minutes=0.7, peer="cleanrl_ppo_Acrobot-v1.json", **ACROBOT),
    Spec("reinforce", "HalfCheetah-v5", {"mujoco": 5}, 3.5, returns(-270, margin=0.3),
         (*mujoco("HalfCheetah-v5"), "--num-envs", "4", "--learning-rate", "3e-3", "--gamma", "0.97",
          "--log-std-init", "-1.5")),
    Spec("a2c", "HalfCheetah-v5", {"mujoco": 5}, 2, returns(-270, margin=0.3),
         (*mujoco("HalfCheetah-v5"), "--num-envs", "16", "--num-steps", "16", "--learning-rate", "2e-3", "--anneal-lr",
          "--gae-lambda", "0.95", "--log-std-init", "-1")),
    Spec("ppo", "HalfCheetah-v5", {"mujoco": 3}, 10, returns(-270, margin=0.3),
         (*mujoco("HalfCheetah-v5"), "--num-envs", "64", "--num-steps", "32", *PPO_MUJOCO, "--log-std-init", "-1"),
         peer="sb3_ppo_HalfCheetah-v5.json"),
    Spec("ppo", "Hopper-v5", {"mujoco": 3}, 20, returns(18, margin=0.3),
         (*mujoco("Hopper-v5"), "--num-envs", "1", "--num-steps", "2048", *PPO_MUJOCO), peer="sb3_ppo_Hopper-v5.json"),
    Spec("ppo", "Walker2d-v5", {"mujoco": 3}, 20, returns(2, margin=0.3),
         (*mujoco("Walker2d-v5"), "--num-envs", "1", "--num-steps", "2048", *PPO_MUJOCO),
         peer="sb3_ppo_Walker2d-v5.json"),
    Spec("ppo", "Ant-v5", {"mujoco": 3}, 9, returns(-59, margin=0.3),
         (*mujoco("Ant-v5"), "--env-kwargs", '{"include_cfrc_ext_in_observation": false}', "--num-envs", "64",
          "--num-steps", "32", *PPO_MUJOCO, "--log-std-init", "-1")),
    Spec("ppo", "LunarLander-v3", {"full": 5}, 0.9, returns(-185),
         (*CONTROL, "--env-id", "LunarLander-v3", "--normalize", "--total-timesteps", "300000", "--num-envs", "8",
          "--num-steps", "256", "--num-minibatches", "16", "--num-epochs", "10", "--learning-rate", "3e-4",
          "--ent-coef", "0", "--gamma", "0.999", "--gae-lambda", "0.98"), peer="sb3_ppo_LunarLander-v3.json"),
    Spec("ppo", "Pendulum-v1", {"full": 5}, 0.5, returns(-1256),
         (*CONTROL, "--env-id", "Pendulum-v1", "--normalize", "--total-timesteps", "200000", "--num-envs", "8",
          "--num-steps", "256", "--num-minibatches", "16", "--num-epochs", "10", "--ent-coef", "0", "--gamma", "0.9"),
         peer="sb3_ppo_Pendulum-v1.json"),
    Spec("a2c", "LunarLander-v3", {"full": 5}, 2, returns(-185),
         (*CONTROL, "--env-id", "LunarLander-v3", "--normalize", "--total-timesteps", "2000000", "--learning-rate", "5e-3",
          "--anneal-lr", "--gamma", "0.995", "--gae-lambda", "0.95", "--ent-coef", "0.002"),
         peer="sb3_a2c_LunarLander-v3.json"),
    Spec("a2c", "Pendulum-v1", {"full": 5}, 2, returns(-1256),
         (*CONTROL, "--env-id", "Pendulum-v1", "--normalize", "--total-timesteps", "2000000", "--num-envs", "8",
          "--num-steps", "16", "--learning-rate", "1.5e-3", "--anneal-lr", "--gamma", "0.9", "--gae-lambda", "0.9"),
         peer="sb3_a2c_Pendulum-v1.json"),
    Spec("dqn", "LunarLander-v3", {"full": 5}, 2.5, returns(-185),
         (*CONTROL, "--env-id", "LunarLander-v3", "--buffer-size", "100000", "--train-every", "4",
          "--target-every", "1000", "--learning-rate", "6.3e-4", "--no-anneal-lr", "--loss", "huber",
          "--max-grad-norm", "10", *DQN_EXPLORES),
         peer="sb3_dqn_LunarLander-v3.json"),
    Spec("dqn", "LunarLander-v3-200k", {"full": 5}, 3, returns(-185),
         (*CONTROL, "--env-id", "LunarLander-v3", "--total-timesteps", "200000", "--num-envs", "4", "--train-every", "1",
          "--target-every", "250", "--learning-rate", "6.3e-4", "--loss", "huber", "--max-grad-norm", "10",
          "--gamma", "0.99", "--buffer-size", "50000", "--epsilon-end", "0.05", "--exploration-fraction", "0.2")),
    Spec("dqn", "MountainCar-v0", {"full": 5}, 6.5, returns(-1000),
         (*CONTROL, "--env-id", "MountainCar-v0", "--env-kwargs", '{"max_episode_steps": 1000}', "--num-envs", "4",
          "--train-every", "2", "--target-every", "600", "--buffer-size", "500000", "--batch-size", "512",
          "--gamma", "0.98", "--exploration-fraction", "0.1")),
    Spec("q_learning", "Taxi-v4", {"quick": 2, "full": 5}, 0.3,
         (Measure("eval/return_mean", "greedy return", start=-776, margin=0.02, optimum=lambda: TAXI),
          Measure("charts/q_error", "mean of |Q − Q*|", higher=False, margin=1.5, optimum=lambda: 0.0),
          Measure("charts/regret", "regret of the greedy policy", higher=False, optimum=lambda: 0.0))),
    Spec("sft", "reviews", {"quick": 1, "full": 5}, 3, SFT, (*CPU, "--eval-every", "125")),
    Spec("reward_model", "preferences", {"quick": 1, "full": 5}, 1.3, REWARD, (*CPU, "--eval-every", "75"),
         peer="trl_reward_model_preferences.json"),
    Spec("dpo", "preferences", {"quick": 1, "full": 5}, 3, DPO, (*CPU, "--eval-every", "25"),
         peer="trl_dpo_preferences.json",
         evaluation=EVALUATE),
    Spec("rlhf_ppo", "prompts", {"quick": 1, "full": 5}, 4, RLHF, CPU, peer="trl_rlhf_ppo_prompts.json",
         evaluation=EVALUATE),
    Spec("rlhf_ppo", "true-reward", {"full": 3}, 10, TRUE_REWARD,
         (*CPU, "--reward-model", f"{BENCHMARK}/world/true_reward.py:reward", "--total-episodes", "16384"), evaluation=EVALUATE),
    Spec("grpo", "prompts", {"quick": 1, "full": 5}, 1.1, GRPO, (*CPU, "--save-every", "8"), peer="trl_grpo_prompts.json",
         evaluation=EVALUATE),
    Spec("grpo", "kl-in-reward", {"full": 5}, 1.8, GRPO,
         (*CPU, "--save-every", "8", *KL_IN_REWARD), evaluation=EVALUATE),
    Spec("grpo", "true-reward", {"full": 3}, 5, GRPO,
         (*CPU, "--save-every", "32", *KL_IN_REWARD, "--total-episodes", "16384",
          "--reward-model", f"{BENCHMARK}/world/true_reward.py:reward"), evaluation=EVALUATE),
    Spec("sft", minutes=20, measures=(Measure("eval/loss", "held-out loss", higher=False), judged("right JSON", 0.0, 1.0)),
         **real("extraction", "--max-length", "256", "--batch-size", "16", "--epochs", "1", "--learning-rate", "5e-5",
                "--eval-every", "25")),
    Spec("dpo", minutes=5, measures=(replace(PAIR_ACCURACY, optimum=None), judged("right comparisons", 0.5, 1.0)),
         **real("comparisons", "--max-length", "64", "--batch-size", "16", "--epochs", "1", "--learning-rate", "1e-5",
                "--beta", "1", "--eval-every", "20")),
    Spec("grpo", minutes=18, measures=(HELD_OUT_SCORE, KL, judged("right sums", 0.3, 1.0)),
         **real("sums", "--reward-model", f"{BENCHMARK}/real/rewards.py:right_sum", "--response-length", "6",
                "--max-length", "64", "--total-episodes", "4096", "--batch-size", "64", "--num-minibatches", "1",
                "--num-epochs", "1", "--learning-rate", "1e-5", "--kl-coef", "0.02", "--missing-eos-penalty", "0",
                "--save-every", "16")),
    Spec("rlhf_ppo", minutes=20, measures=(KL, judged("VADER's sentiment", 0.2)),
         **real("films", "--reward-model", f"{BENCHMARK}/real/rewards.py:sentiment", "--response-length", "24",
                "--max-length", "64", "--total-episodes", "1024", "--batch-size", "64", "--num-minibatches", "2",
                "--num-ppo-epochs", "2", "--learning-rate", "2e-5", "--kl-coef", "0.05", "--missing-eos-penalty", "0",
                "--save-every", "16")),
    Spec("ppo", "Pong", {"atari": 1}, 150, returns(-20.7, optimum=21.0),
         (*CONTROL, "--env-id", "ALE/Pong-v5", "--total-timesteps", "2000000", "--num-envs", "16", "--num-steps", "128",
          "--num-minibatches", "4", "--clip-coef", "0.1", "--learning-rate", "3e-4", "--gamma", "0.99")),
)  # fmt: skip
