"""The command-line contract that all control scripts share: bad input, run directories, resume, several processes."""

import json
import math
import random
import signal
import subprocess
import time
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from helpers import command, environment, run, scalars, weights

SHORT = {  # flags of a short CartPole run with several updates and checkpoints
    script: ("--total-timesteps", 6000, "--save-every", 1500, "--eval-episodes", 3)
    for script in ("reinforce", "a2c", "ppo")
}
SHORT["dqn"] = (*SHORT["ppo"], "--num-envs", 8, "--learning-starts", 500, "--buffer-size", 2000)
# flags of a run of one rollout on environments that step one by one, so that they start alike in any number of processes
SHARED = {
    "dqn": (
        "--num-envs",
        4,
        "--learning-starts",
        128,
        "--train-every",
        8,
        "--target-every",
        40,
        "--total-timesteps",
        400,
    ),
    "reinforce": ("--num-envs", 4, "--total-timesteps", 180),
    "a2c": ("--num-envs", 4, "--num-steps", 16, "--total-timesteps", 180),
    "ppo": ("--num-envs", 4, "--num-steps", 16, "--num-minibatches", 2, "--total-timesteps", 180),
}
scripts = pytest.mark.parametrize("script", SHORT)


@pytest.fixture(scope="module")
def finished(request, tmp_path_factory):
    """Run directory of an uninterrupted short run of each script."""
    runs = {}

    def get(script):
        if script not in runs:
            runs[script] = tmp_path_factory.mktemp(script) / "run"
            done = run(script, *SHORT[script], "--run-dir", runs[script])
            assert done.returncode == 0, done.stderr
            assert "evaluation: return" in done.stdout and "over 3 greedy episodes" in done.stdout
        return runs[script]

    return get


def same(a, b):
    """Whether two models have the same tensors bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- what a run leaves behind ---


@scripts
def test_a_run_leaves_arguments_events_a_checkpoint_and_a_model(finished, script):
    run_dir = finished(script)
    assert json.loads((run_dir / "args.json").read_text())["total_timesteps"] == SHORT[script][1]
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert state["script"] == script and state["step"] >= SHORT[script][1]
    names = {path.name.split(".")[0] for path in run_dir.iterdir()}
    assert names == {"args", "checkpoint", "model", "events"}
    for tag in (
        "charts/episodic_return",
        "charts/episodic_length",
        "charts/SPS",
        "eval/return_mean",
        "eval/return_std",
    ):
        points = scalars(run_dir, tag)
        assert points and all(math.isfinite(value) for _, value in points), tag
    steps = [step for step, _ in scalars(run_dir, "charts/SPS")]
    assert steps == sorted(set(steps))


@scripts
def test_the_model_file_holds_the_weights_of_the_checkpoint(finished, script):
    agent = torch.load(finished(script) / "checkpoint.pt", weights_only=True)["agent"]
    assert same(weights(finished(script)), agent)


@scripts
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(finished, script, tmp_path):
    for seed, equal in ((1, True), (2, False)):
        assert run(script, *SHORT[script], "--seed", seed, "--run-dir", tmp_path / str(seed)).returncode == 0
        assert same(weights(tmp_path / str(seed)), weights(finished(script))) == equal


# --- resume ---


@scripts
def test_a_run_killed_at_any_moment_resumes_to_the_same_weights_bit_for_bit(finished, script, tmp_path):
    run_dir = tmp_path / "run"
    process = subprocess.Popen(command(script, *SHORT[script], "--run-dir", run_dir), stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (run_dir / "checkpoint.pt").exists() and time.time() < deadline:
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    process.wait()
    if (run_dir / "model.safetensors").exists():
        (run_dir / "model.safetensors").unlink()  # it was quicker than the kill
    resumed = run(script, "--resume", run_dir / "checkpoint.pt")
    assert resumed.returncode == 0, resumed.stderr
    assert same(weights(run_dir), weights(finished(script)))
    for tag in ("charts/SPS", "charts/episodic_return"):
        assert [step for step, _ in scalars(run_dir, tag)] == [step for step, _ in scalars(finished(script), tag)]
    assert scalars(run_dir, "charts/episodic_return") == scalars(finished(script), "charts/episodic_return")


@scripts
def test_a_resumed_run_goes_on_with_the_flags_of_the_checkpoint_unless_told_otherwise(finished, script, tmp_path):
    longer = SHORT[script][1] + 3000
    done = run(
        script,
        "--resume",
        finished(script) / "checkpoint.pt",
        "--total-timesteps",
        longer,
        "--run-dir",
        tmp_path / "on",
    )
    assert done.returncode == 0, done.stderr
    args = json.loads((tmp_path / "on" / "args.json").read_text())
    assert args["total_timesteps"] == longer and args["eval_episodes"] == 3
    assert scalars(tmp_path / "on", "charts/SPS")[0][0] > SHORT[script][1]


@scripts
def test_a_finished_checkpoint_is_only_evaluated(finished, script):
    run_dir = finished(script)
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    done = run(script, "--resume", run_dir / "checkpoint.pt", "--eval-episodes", 5)
    assert done.returncode == 0 and "over 5 greedy episodes" in done.stdout
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before
    elsewhere = run(script, "--resume", run_dir / "checkpoint.pt", "--run-dir", run_dir.parent / "elsewhere")
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert same(weights(run_dir.parent / "elsewhere"), weights(run_dir))


# --- several processes ---


@pytest.mark.parametrize("script,normalize", [(s, n) for s in SHORT for n in (False, True) if not (s == "dqn" and n)])
def test_two_processes_give_the_same_weights_and_statistics_as_one_to_rounding(script, normalize, tmp_path):
    flags = [*SHARED[script], "--env-id", "probe_envs:Scaled-v0", "--eval-episodes", 0]
    if normalize:
        flags += [
            "--normalize",
            "--total-timesteps",
            60,
        ]  # statistics are pooled after a rollout: compare those of the first
    one = run(script, *flags, "--run-dir", tmp_path / "one")
    two = run(script, *flags, "--run-dir", tmp_path / "two", processes=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in a if not normalize else [name for name in a if name.startswith("normalizer")]:
        torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=1e-5)
    assert scalars(tmp_path / "one", "charts/episodes") == scalars(tmp_path / "two", "charts/episodes")


# --- bad input ---


def refused(script, *flags, **kwargs):
    """Run a script that must refuse its input; returns its one line on stderr."""
    done = run(script, *flags, **kwargs)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert done.stdout == ""
    return lines[0]


BAD_INPUT = {
    "unknown env id": (["--env-id", "CartPoll-v1"], ["--env-id CartPoll-v1"]),
    "unknown module": (["--env-id", "no_such_module:CartPole-v1"], ["--env-id", "no_such_module"]),
    "dict observations": (["--env-id", "probe_envs:DictObservation-v0"], ["--env-id", "observations", "Dict"]),
    "multi-discrete actions": (["--env-id", "probe_envs:ManyActions-v0"], ["--env-id", "actions", "MultiDiscrete"]),
    "actions that start at 1": (["--env-id", "probe_envs:ActionsFromOne-v0"], ["--env-id", "actions", "Discrete"]),
    "environment that cannot be made": (["--env-id", "probe_envs:NeedsFile-v0"], ["--env-id", "no such model file"]),
    "Atari with a module": (["--env-id", "ale_py:ALE/Pong-v5"], ["--env-id ale_py:ALE/Pong-v5", "leave out"]),
    "video of what cannot be rendered": (
        ["--env-id", "probe_envs:NoPictures-v0", "--capture-video"],
        ["--env-id probe_envs:NoPictures-v0 with --capture-video"],
    ),
    "huge seed": (["--seed", "99999999999999999999"], ["--seed must be between 0 and"]),
    "tiny pixels": (["--env-id", "probe_envs:TinyPixels-v0"], ["--env-id", "36 x 36"]),
    "same-step autoreset": (["--env-id", "probe_envs:SameStep-v0"], ["--env-id", "NEXT_STEP"]),
    "negative count": (["--num-envs", "-1"], ["--num-envs must be at least 1, not -1"]),
    "zero steps": (["--total-timesteps", "0"], ["--total-timesteps must be at least 1"]),
    "negative save interval": (["--save-every", "-5"], ["--save-every must be at least 0"]),
    "gamma above 1": (["--gamma", "1.5"], ["--gamma must be between 0 and 1"]),
    "learning rate nan": (["--learning-rate", "nan"], ["--learning-rate must be at least 0"]),
    "not a number": (["--num-envs", "many"], ["--num-envs", "many"]),
    "unknown flag": (["--numb-envs", "4"], ["--numb-envs"]),
    "missing checkpoint": (["--resume", "nowhere/checkpoint.pt"], ["--resume nowhere/checkpoint.pt: no such file"]),
    "unwritable run dir": (["--run-dir", "/dev/null/run"], ["--run-dir /dev/null/run", "cannot write"]),
    "unknown device": (["--device", "tpu"], ["--device", "tpu"]),
}
OWN_BAD_INPUT = {
    "dqn": {
        "continuous actions": (["--env-id", "Pendulum-v1"], ["--env-id Pendulum-v1", "actions must be Discrete"]),
        "no time to learn": (["--total-timesteps", "5000"], ["--learning-starts 10000", "--total-timesteps 5000"]),
        "learning from too few rows": (["--learning-starts", "50"], ["--learning-starts must be at least 128"]),
    },
    "reinforce": {},
    "a2c": {"lambda above 1": (["--gae-lambda", "1.1"], ["--gae-lambda must be between 0 and 1"])},
    "ppo": {
        "minibatches that do not divide": (
            ["--num-minibatches", "7"],
            ["--num-minibatches 7 does not divide the 512 rows"],
        ),
        "minibatches of one row": (["--num-envs", "1", "--num-steps", "2"], ["--num-minibatches", "one row"]),
        "normalised pixels": (["--env-id", "probe_envs:Pixels-v0", "--normalize"], ["--normalize"]),
    },
}


@pytest.mark.parametrize("script,case", [(s, c) for s in SHORT for c in (BAD_INPUT | OWN_BAD_INPUT[s])])
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(script, case, tmp_path):
    flags, expected = (BAD_INPUT | OWN_BAD_INPUT[script])[case]
    line = refused(script, *flags, cwd=tmp_path)
    assert all(part in line for part in expected), line
    assert not list(tmp_path.iterdir())


@scripts
def test_cuda_is_refused_where_there_is_none(script, tmp_path):
    hidden = environment(CUDA_VISIBLE_DEVICES="")
    assert "--device cuda: torch finds no CUDA device" in refused(script, "--device", "cuda", cwd=tmp_path, env=hidden)


@scripts
def test_tracking_without_wandb_is_refused(script, tmp_path):
    blocker = tmp_path / "path" / "sitecustomize.py"  # hides wandb if it happens to be installed
    blocker.parent.mkdir()
    blocker.write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'wandb' else find(name, *rest)\n"
    )
    path = environment(PYTHONPATH=str(blocker.parent))
    assert "--track" in refused(script, "--track", cwd=tmp_path, env=path)


@scripts
def test_tracking_hands_the_arguments_to_wandb(script, tmp_path):
    (tmp_path / "wandb.py").write_text(
        "def init(**kwargs):\n    print(kwargs['config']['seed'], kwargs['sync_tensorboard'])\n"
    )
    done = run(
        script,
        *SHORT[script],
        "--total-timesteps",
        600,
        "--track",
        "--seed",
        77,
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(tmp_path)),
    )
    assert done.returncode == 0 and done.stdout.startswith("77 True"), done.stderr


@scripts
def test_a_run_dir_that_holds_a_run_is_refused_and_left_alone(finished, script, tmp_path):
    run_dir = finished(script)
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    assert "already holds a run" in refused(script, "--run-dir", run_dir, cwd=tmp_path)
    other = tmp_path / "copy.pt"
    other.write_bytes((run_dir / "checkpoint.pt").read_bytes())
    assert "already holds a run" in refused(script, "--resume", other, "--run-dir", run_dir, cwd=tmp_path)
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before


@scripts
def test_checkpoints_that_do_not_fit_are_refused(finished, script, tmp_path):
    checkpoint = finished(script) / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    (tmp_path / "torn.pt").write_bytes(whole[: len(whole) // 2])
    assert "not a readable checkpoint" in refused(script, "--resume", tmp_path / "torn.pt")
    (tmp_path / "text.pt").write_text("hello")
    assert "not a readable checkpoint" in refused(script, "--resume", tmp_path / "text.pt")
    assert "env_id CartPole-v1, not Acrobot-v1" in refused(script, "--resume", checkpoint, "--env-id", "Acrobot-v1")
    state = torch.load(checkpoint, weights_only=True)
    torch.save(state | {"script": "sarsa"}, tmp_path / "foreign.pt")
    assert f"written by sarsa.py, not {script}.py" in refused(script, "--resume", tmp_path / "foreign.pt")
    torch.save(state | {"args": {"seed": 1}}, tmp_path / "old.pt")
    assert "another version" in refused(script, "--resume", tmp_path / "old.pt")


@scripts
def test_a_loss_that_explodes_stops_the_run_and_names_the_last_checkpoint(script, tmp_path):
    flags = list(SHORT[script]) + [
        "--env-id",
        "probe_envs:Explodes-v0",
        "--save-every",
        1000,
        "--run-dir",
        tmp_path / "run",
    ]
    done = run(script, *flags)
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and line.startswith("error: the loss became") and "checkpoint.pt" in line, done.stderr
    agent = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["agent"]
    assert all(x.isfinite().all() for x in agent.values())


# --- help and video ---


@scripts
def test_help_names_every_flag_with_its_meaning_and_default(script, monkeypatch):
    done = run(script, "--help", env=environment(COLUMNS="200"))
    module = __import__(script)
    assert done.returncode == 0 and module.__doc__.splitlines()[0] in done.stdout
    for name in module.Args.__dataclass_fields__:
        flag = [line for line in done.stdout.splitlines() if f"--{name.replace('_', '-')}" in line and "│" in line]
        assert flag, name
    assert done.stdout.count("(default:") == len(module.Args.__dataclass_fields__)


@scripts
def test_a_video_of_the_trained_agent_is_written(script, tmp_path):
    flags = [*SHORT[script], "--capture-video", "--total-timesteps", 600, "--run-dir", tmp_path / "run"]
    done = run(script, *flags, env=environment(SDL_VIDEODRIVER="dummy"))
    assert done.returncode == 0, done.stderr
    (video,) = (tmp_path / "run" / "videos").glob("*.mp4")
    assert video.stat().st_size > 1000


def test_the_video_environment_of_atari_shows_the_policy_what_training_showed_it(tmp_path):
    import ppo

    video = ppo.make_envs("ALE/Pong-v5", 1, False, 0.99, video=Path(tmp_path))
    native = ppo.make_envs("ALE/Pong-v5", 1, False, 0.99)
    assert video.single_observation_space.shape == native.single_observation_space.shape == (4, 84, 84)
    assert video.single_action_space == native.single_action_space and isinstance(
        native.single_action_space, gym.spaces.Discrete
    )
    video.close()
    native.close()
