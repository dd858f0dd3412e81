"""benchmark/world/convergence.py: which runs are made, that they are made once, and what is written and drawn."""

import json

import pytest

import run as benchmark
from core import specs
from world import build_assets, convergence, grammar


def share_of(run):
    """The share that the evaluation of a run finds here: its amount of data, made small."""
    return int(str(run).rpartition("-")[2]) / 100_000


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Commands that were started; runs write a model, evaluations a share."""
    found = []

    def start(command):
        found.append(command)
        if "evaluate" in command:
            path = command[command.index("--json") + 1]
            with open(path, "w") as file:
                json.dump([{"share": share_of(command[2])}], file)
        else:
            folder = tmp_path / "runs" / command[command.index("--run-dir") + 1] / "model"
            folder.mkdir(parents=True)
            (folder / "config.json").write_text("{}")

    monkeypatch.setattr(convergence, "start", start)
    monkeypatch.setattr(convergence, "PAIRS", (20, 40))
    monkeypatch.setattr(specs, "RESULTS", tmp_path)
    return found


def test_every_point_is_a_run_of_its_own_that_is_made_once(started, tmp_path):
    call = ["convergence", "--runs", str(tmp_path / "runs")]
    assert benchmark.main(call) == 0
    trained = [command for command in started if "evaluate" not in command]
    points = 4 * len(convergence.EPISODES) + 2
    assert len(trained) == points
    assert len(started) == 2 * points
    assert len({command[command.index("--run-dir") + 1] for command in trained}) == points
    lengths = {command[command.index("--total-episodes") + 1] for command in trained if "dpo.py" not in command[0]}
    assert lengths == set(map(str, convergence.EPISODES))
    assert sum("--kl-in" in command for command in trained) == 2 * len(convergence.EPISODES)
    assert sum("--reward-model" in command for command in trained) == 2 * len(convergence.EPISODES)
    for command in trained:
        name, _, size = command[command.index("--run-dir") + 1].rpartition("/")[2].rpartition("-")
        assert command[0].endswith(f"/algos/{name.partition('-')[0]}.py")
        assert ("--reward-model" in command) == ("true-reward" in name)
        assert ("--kl-in" in command) == ("kl-in" in name)
        assert command[-1] in (size, f"train[:{size}]")
        assert command[command.index("--seed") + 1] == str(convergence.SEED)
    for command in started:
        if "evaluate" in command:
            assert " ".join(command[3:7]) == "--prompts 1000 --reference-samples 30000"  # as the specs measure
    splits = [command[command.index("--train-split") + 1] for command in trained if "dpo.py" in command[0]]
    assert splits == ["train[:20]", "train[:40]"]
    shares = json.loads((tmp_path / "convergence.json").read_text())
    assert shares["dpo"] == {"20": 0.0002, "40": 0.0004}
    assert shares["rlhf_ppo, true reward"] == {"1024": 0.0102, "4096": 0.041, "16384": 0.1638}
    assert len(shares) == 5
    assert benchmark.main(call) == 0
    assert len(started) == 2 * points


def test_the_pairs_are_two_samples_of_which_the_better_is_mostly_preferred(tmp_path, monkeypatch):
    monkeypatch.setattr(convergence, "PAIRS", (300,))
    convergence.draw_pairs(tmp_path)
    convergence.draw_pairs(tmp_path / "again")
    assert (tmp_path / "again" / "train.jsonl").read_bytes() == (tmp_path / "train.jsonl").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").open()]
    assert 295 <= len(rows) <= 300
    assert len({row["prompt"] for row in rows}) == len(rows)
    for row in rows[:50]:
        gold = grammar.gold_reward(row["prompt"], row["chosen"].strip())
        assert row["gold_chosen"] == pytest.approx(gold, abs=1e-4) or row["gold_chosen"] < gold  # one without an end
    right = sum(row["gold_chosen"] >= row["gold_rejected"] for row in rows) / len(rows)
    assert 0.7 < right < 0.9  # Bayes accuracy is 0.79
    assert build_assets.SEED != convergence.SEED  # not the pairs of the assets again


def test_the_picture_has_a_line_for_each(tmp_path):
    shares = {"rlhf_ppo, true reward": {"1024": 0.5, "2048": 0.6}, "dpo": {"4000": 0.7}}
    convergence.draw(shares, tmp_path / "share.png")
    assert (tmp_path / "share.png").read_bytes().startswith(b"\x89PNG")
