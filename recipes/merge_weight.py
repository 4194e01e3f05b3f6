"""Choose the weight of merged adapters: roll Σ w·ΔW out with several w, from initial states that the tests leave out.

    python recipes/merge_weight.py runs/single --weights 0.2 0.3 0.5 1 --first_state 30 --episodes 10

The run is one of `single_task`, whose adapters are those of `merge`: nothing is trained again. Of any other run, whose
adapters build on each other, `--last N` takes the last N: with a weight of 1/N, their mean.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infovla_peft import load_policy
from infovla_peft.adapters import load_adapter, merge_adapters, switch
from infovla_peft.cli import run_command
from infovla_peft.config import BENCHMARK_STATES
from infovla_peft.evaluation import check_initial_states, evaluate
from infovla_peft.files import write_json
from infovla_peft.hub import describe_policy
from infovla_peft.library import find_adapters
from infovla_peft.plan import worker_count
from infovla_peft.simulation import find_assets, find_task
from infovla_peft.simulation.workers import EnvironmentPool


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description="Choose the weight of merged adapters on validation states.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="folder of a finished run of `single_task`, with --last of any")
    parser.add_argument("--last", type=int, metavar="N", help="the last N adapters (default: all, of `single_task`)")
    parser.add_argument("--weights", nargs="+", type=float, default=[0.2, 0.3, 0.5, 1.0])
    parser.add_argument(
        "--first_state", type=int, default=30, help="of the 50; to choose, none that the run was tested from"
    )
    parser.add_argument("--episodes", type=int, default=10, help="rollouts per task and weight")
    parser.add_argument("--workers", type=int, default=0, help="simulation processes; 0 = one per core")
    parser.add_argument("--device", help="of the policy: cpu, cuda, ... (default: the CPU)")
    parser.add_argument("--output", type=Path, help="a JSON file for the numbers")
    return parser.parse_args(argv)


def main(options: argparse.Namespace) -> None:
    """Load all adapters onto one base; then merge, roll out and drop, weight after weight."""
    check_initial_states(options.episodes, options.first_state)
    if len(options.weights) > 1:
        _check_untested(describe_policy(options.run).recipe, options.first_state, options.episodes)
    stored = find_adapters(options.run)
    if not stored:
        raise FileNotFoundError(f"{options.run} holds no adapters; run a recipe with --method single_task first")
    if options.last is None:
        learned = [name for adapter in stored for name in adapter.learned]
        policy = load_policy(options.run, task=learned, device=options.device)
        if policy.recipe["method"] != "single_task":
            raise ValueError(
                f"{options.run} is a run of {policy.recipe['method']}; its adapters build on each other: set --last"
            )
    else:
        if not 1 <= options.last <= len(stored):
            raise ValueError(f"--last {options.last}: {options.run} holds {len(stored)} adapters")
        stored = stored[-options.last :]
        policy = load_policy(options.run, device=options.device)
        for adapter in stored[:-1]:
            load_adapter(policy.model, adapter.folder, adapter.name)
    recipe, adapters = policy.recipe, [adapter.name for adapter in stored]
    tasks = [find_task(recipe["suite"], name) for name in policy.tasks_after()]
    look = {name: recipe[name] for name in ("image_size", "renderer")}
    rows = []
    with EnvironmentPool(
        worker_count(options.workers), assets=find_assets(recipe["assets"]), cameras=policy.cameras, **look
    ) as pool:
        for weight in options.weights:
            merge_adapters(policy.model, adapters, "merged", weight=weight)
            found = evaluate(
                policy, tasks, pool, episodes=options.episodes, first_state=options.first_state,
                open_loop_steps=recipe["open_loop_steps"], max_steps=recipe["rollout_max_steps"] or None,
            )  # fmt: skip
            counts = {result.task: sum(result.successes) for result in found}
            switch(policy.model, adapters[0])
            policy.model.delete_adapter("merged")
            rows.append({"weight": weight, "successes": counts, "episodes": options.episodes})
            rate = sum(counts.values()) / (options.episodes * len(counts))
            print(f"w = {weight:<5} {rate:6.1%}  {' '.join(map(str, counts.values()))}", flush=True)
            if options.output:
                of = {"run": str(options.run), "adapters": adapters, "first_state": options.first_state}
                write_json(options.output, {**of, "rows": rows})


def _check_untested(recipe: Mapping[str, Any], first_state: int, episodes: int) -> None:
    """Refuse initial states that the run was tested from: what is chosen on them is no longer tested by them.

    A run whose rollouts do not begin with state 0 is one for choosing, and reports nothing.
    """
    first = recipe.get("eval_first_state", 0)
    if first or "eval_episodes" not in recipe:
        return
    tested = range(first, first + max(recipe["eval_episodes"], recipe.get("final_eval_episodes") or 0))
    if set(tested) & set(range(first_state, first_state + episodes)):
        raise ValueError(
            f"the run was tested from initial states {tested[0]} to {tested[-1]}, and a weight that is chosen on them "
            f"is no longer tested by them: take others with --first_state and --episodes (of {BENCHMARK_STATES}), or "
            "train with fewer eval_episodes"
        )


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(parse(sys.argv[1:]))))
