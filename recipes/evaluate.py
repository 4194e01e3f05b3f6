"""Roll a policy out in LIBERO and count successes: an adapter, a run, or a checkpoint without adapter.

    python recipes/evaluate.py runs/quickstart --suite libero_goal --tasks 0 1 2 --episodes 50 --output runs/evaluation

A short script to read and to change; `infovla evaluate` has more options (step cap, renderer, device, base ...).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from infovla_peft import load_policy
from infovla_peft.cli import run_command
from infovla_peft.evaluation import evaluate
from infovla_peft.files import write_json
from infovla_peft.metrics import wilson_interval
from infovla_peft.plan import worker_count
from infovla_peft.results import collect_versions
from infovla_peft.simulation import find_assets, find_task, suite_tasks
from infovla_peft.simulation.workers import EnvironmentPool


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description="Roll a policy out in LIBERO and count successes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("policy", help="folder or Hub id of an adapter, a run or a checkpoint")
    parser.add_argument("--stage", type=int, help="the policy after this stage of a run; 0 is the base")
    parser.add_argument("--suite", help="LIBERO suite; as trained if not given")
    parser.add_argument("--tasks", nargs="+", help="by number or name; those it has learned if not given")
    parser.add_argument("--episodes", type=int, default=20, help="rollouts per task, from the first of 50 states")
    parser.add_argument("--workers", type=int, default=0, help="simulation processes; 0 = one per core")
    parser.add_argument("--videos", type=int, default=2, help="MP4s per task, failures first")
    parser.add_argument("--output", type=Path, default=Path("runs/evaluation"), help="for evaluation.json and videos")
    return parser.parse_args(argv)


def main(options: argparse.Namespace) -> None:
    """Load, then roll out task after task; print and store each result as it comes."""
    policy = load_policy(options.policy, stage=options.stage)
    if policy.recipe.get("method") == "single_task":
        raise ValueError("each task has an adapter of its own here; `infovla evaluate` changes them, this script not")
    suite = options.suite or policy.recipe.get("suite", "libero_goal")
    learned = policy.tasks_after(options.stage) if suite == policy.recipe.get("suite") else []
    tasks = [find_task(suite, name) for name in options.tasks or learned or range(len(suite_tasks(suite)))]
    # Assets and pictures as they were in training: a stand-in looks different from LIBERO's own object.
    assets = find_assets(policy.recipe.get("assets", "auto"))
    look = {name: policy.recipe[name] for name in ("image_size", "renderer") if name in policy.recipe}

    # Worker processes simulate, one batched forward of the policy serves them all, and a frame is rendered only when
    # the policy looks. The episodes start from LIBERO's fixed initial states, on which nothing was trained.
    rows = []
    with EnvironmentPool(worker_count(options.workers), assets=assets, cameras=policy.cameras, **look) as pool:
        for result in evaluate(
            policy, tasks, pool, episodes=options.episodes, open_loop_steps=policy.recipe.get("open_loop_steps", 8),
            videos=options.videos, video_folder=options.output / "videos",
        ):  # fmt: skip
            low, high = wilson_interval(sum(result.successes), result.episodes)
            print(f"{result.rate:6.1%}  [{low:.0%}, {high:.0%}]  {result.task}", flush=True)
            rows.append(result.to_dict())
            write_json(
                options.output / "evaluation.json",
                {
                    "policy": options.policy,
                    "stage": options.stage,
                    "assets": assets.name,
                    "step_cap": tasks[0].max_steps,
                    "versions": collect_versions(),
                    "results": rows,
                },
            )


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(parse(sys.argv[1:]))))
