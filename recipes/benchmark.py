"""Compare methods of continual learning: a queue of runs that continues where it was stopped, then tables and figures.

    python recipes/benchmark.py run recipes/configs/bench/bench_s.yaml [--workers N] [--only METHOD ...] [--dry-run]
    python recipes/benchmark.py status recipes/configs/bench/bench_s.yaml [--held AGGREGATE.json ...]
    python recipes/benchmark.py aggregate recipes/configs/bench/bench_s.yaml [--output recipes/results/bench_s.json]
    python recipes/benchmark.py tables recipes/results/bench_s.json [--methods METHOD ...] [--seeds SEED ...]
    python recipes/benchmark.py refresh recipes/results/bench_s.json recipes/README.md recipes/EXPLORED.md

The YAML says which methods, seeds, task orders and memory sizes (see `infovla_peft.benchmark`); the options of its
runs are those of `python recipes/continual.py --help`. Each run is `recipes/continual.py` in a process and a folder of
its own; runs with the same base tasks share their base and its rollouts. `tables` needs the aggregate alone. Several
machines share the work with `--held`, which names aggregates. One may be another benchmark's, with the same recipe:
the runs that both have are taken; with `--held-only METHOD ...`, some of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from infovla_peft.aggregation import aggregate, check_replacement, load_held
from infovla_peft.benchmark import Benchmark, Job, RunKey, learn_base, load_benchmark
from infovla_peft.cli import run_command
from infovla_peft.command_options import CommandParser, positive
from infovla_peft.comparison import ComparedRun, load_comparison
from infovla_peft.comparison_blocks import count_tables, refresh_tables
from infovla_peft.comparison_figures import draw_comparison
from infovla_peft.comparison_tables import write_tables
from infovla_peft.config import load_recipe
from infovla_peft.files import write_json, write_text
from infovla_peft.plan import worker_count
from infovla_peft.progress import quiet_libraries
from infovla_peft.recipe_files import recipes_folder
from infovla_peft.run_queue import RunQueue, describe_status

RECIPES = Path(__file__).resolve().parent
_CONFIG = "YAML of a benchmark; `python recipes/continual.py --help` has the options of its runs"
_HELD = "aggregates: what they hold is not run here, but taken in (the one that is written may be among them)"
_HELD_ONLY = (
    "of the held runs these alone, by method or name as for --only of `run`; default: all that are the benchmark's"
)
_ONLY = "the runs of these methods, or of these names (as `status` shows them; 'libero_object/*'), and their bases"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The commands and their options."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    shared = CommandParser(add_help=False)
    shared.add_argument("config", type=Path, help=_CONFIG)
    shared.add_argument("--held", nargs="+", metavar="JSON", type=Path, default=[], help=_HELD)
    shared.add_argument("--held-only", nargs="+", metavar="METHOD", help=_HELD_ONLY)
    run = commands.add_parser("run", parents=[shared], help="work the runs off; what is finished is not repeated")
    run.add_argument("--workers", type=positive, help="runs at once; default: the YAML's, else as many as cores allow")
    run.add_argument("--only", nargs="+", metavar="METHOD", help=_ONLY)
    run.add_argument("--dry-run", action="store_true", help="check every recipe and show what would be run, in order")
    run.set_defaults(handler=run_queue)

    does = "what is done, held, running, waiting, failed, and the times"
    status = commands.add_parser("status", parents=[shared], help=does)
    status.set_defaults(handler=show_status, only=None, workers=None)

    gather = commands.add_parser("aggregate", parents=[shared], help="all finished runs in one JSON file")
    gather.add_argument("--output", type=Path, help="default: recipes/results/<name of the YAML>.json")
    gather.set_defaults(handler=write_aggregate)

    tables = commands.add_parser("tables", help="Markdown, CSV, LaTeX and figures from an aggregate")
    tables.add_argument("aggregate", type=Path, help="JSON written by `aggregate`")
    tables.add_argument("--output", type=Path, help="folder; default: <name of the JSON>_tables beside it")
    tables.add_argument("--against", nargs="+", metavar="METHOD", help="differences to these; default: er")
    tables.add_argument("--methods", nargs="+", metavar="METHOD", help="of these alone; default: all")
    tables.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="of these alone; default: all")
    tables.set_defaults(handler=make_tables)

    refresh = commands.add_parser("refresh", help="write the tables in a Markdown file anew, `<!-- table ... -->`")
    refresh.add_argument("aggregate", type=Path, help="JSON written by `aggregate`")
    refresh.add_argument(
        "texts",
        type=Path,
        nargs="+",
        metavar="text",
        help="Markdown with blocks as in `infovla_peft.comparison_blocks`",
    )
    refresh.set_defaults(handler=refresh_text)

    base = commands.add_parser("base", help="what the queue runs first: demonstrations, base, its column of rollouts")
    base.add_argument("recipe", type=Path, help="YAML of a run")
    base.set_defaults(handler=run_base)
    options = parser.parse_args(argv)
    if getattr(options, "held_only", None) and not options.held:
        parser.error("--held-only chooses among what --held names; name an aggregate by --held too")
    return options


def run_queue(options: argparse.Namespace) -> int:
    """Work the queue off; 1 if a run failed."""
    benchmark = load_benchmark(options.config)
    jobs = benchmark.select(options.only, held=held_runs(benchmark, options))
    benchmark.check(jobs)  # every option of every run, before the first one starts
    at_once = options.workers or benchmark.workers or max(worker_count(0) // benchmark.cores_per_run, 1)
    if options.dry_run:
        print(describe_status(jobs, at_once))
        return 0

    queue = RunQueue(
        jobs,
        command,
        workers=at_once,
        cores_per_run=benchmark.cores_per_run,
        say=lambda line: print(line, flush=True),
    )
    outcome = queue.run()
    print(
        f"{len(outcome.done)} of {len(jobs)} finished, {len(outcome.failed)} failed, "
        f"{len(outcome.elsewhere)} left to another process"
    )
    if outcome.failed:
        print("failed; the same command tries again:", *(failure.job.name for failure in outcome.failed), sep="\n  ")
    return 1 if outcome.failed else 0


def held_runs(benchmark: Benchmark, options: argparse.Namespace) -> dict[RunKey, ComparedRun]:
    """What the aggregates after --held hold of the benchmark."""
    return load_held(benchmark, options.held, options.held_only, say=print)


def command(job: Job, recipe: Path) -> list[str]:
    """How a run is started. A base stops after its first column; the others go through the whole stream."""
    if job.is_base:
        return [sys.executable, str(RECIPES / "benchmark.py"), "base", str(recipe)]
    loop = RECIPES / "continual.py"  # yours, if this file was copied beside one
    return [sys.executable, str(loop if loop.is_file() else recipes_folder() / "continual.py"), str(recipe)]


def run_base(options: argparse.Namespace) -> None:
    """One shared base."""
    config, training = load_recipe(options.recipe)
    quiet_libraries(loading_bars=config.base_model != "tiny")
    learn_base(config, training)


def show_status(options: argparse.Namespace) -> None:
    """A table of all runs."""
    benchmark = load_benchmark(options.config)
    at_once = benchmark.workers or max(worker_count(0) // benchmark.cores_per_run, 1)
    print(describe_status(benchmark.jobs, at_once, held_runs(benchmark, options)))


def write_aggregate(options: argparse.Namespace) -> None:
    """All finished runs in one file, none of which is lost: it is checked first, and must hold what stood there."""
    benchmark = load_benchmark(options.config)
    content, missing = aggregate(benchmark, held_runs(benchmark, options))
    if not content["runs"]:
        raise ValueError(f"no run of {options.config} is finished yet; see `status`")
    output = options.output or RECIPES / "results" / f"{benchmark.name}.json"
    check_replacement(output, content)
    write_json(output, content)
    print(f"{output}: {len(content['runs'])} runs, {len(missing)} missing")
    for name in missing:
        print(f"  missing: {name}")


def make_tables(options: argparse.Namespace) -> None:
    """Tables and figures, from the aggregate alone."""
    comparison = load_comparison(options.aggregate).only(options.methods, options.seeds)
    output = options.output or options.aggregate.with_name(f"{options.aggregate.stem}_tables")
    against = options.against or [method for method in ("er",) if any(run.method == method for run in comparison.runs)]
    for path in [*write_tables(comparison, output, against), *draw_comparison(comparison, output)]:
        print(path)


def refresh_text(options: argparse.Namespace) -> None:
    """The tables inside texts, from the aggregate alone."""
    comparison = load_comparison(options.aggregate)
    for path in options.texts:
        if not path.is_file():
            raise FileNotFoundError(f"there is no text at {path}; name Markdown files with `<!-- table` blocks")
    before = {path: path.read_text(encoding="utf-8") for path in options.texts}
    counts = {path: count_tables(text, comparison) for path, text in before.items()}
    fresh = {path: refresh_tables(text, comparison) for path, text in before.items()}
    if not any(counts.values()):
        block = f"`<!-- table of={comparison.protocol.get('name')} show=means -->`, and a line `<!-- end -->`"
        raise ValueError(f"no table of {options.aggregate} in {', '.join(map(str, before))}; a block is {block}")
    for path, text in fresh.items():
        write_text(path, text)
        print(f"{path}: {counts[path]} table{'s' * (counts[path] != 1)} of {options.aggregate.name}")


if __name__ == "__main__":
    sys.exit(run_command(lambda: (options := parse(sys.argv[1:])).handler(options)))
