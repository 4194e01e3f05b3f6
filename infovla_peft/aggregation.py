"""The finished runs of a benchmark as one file of numbers, from one machine or from several.

The format is that of `comparison`. An aggregate is also how machines share the work: the runs that it holds need not
be run on another machine, whose own aggregate takes them in.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .analysis_results import FILE as ANALYSIS
from .analysis_results import Analysis
from .benchmark import BOOKKEEPING, Benchmark, Job, RunKey, progress, resolved_recipe, unimportant
from .comparison import ANALYSED, FORMAT_VERSION, ComparedRun, ComparisonError, load_comparison, read_comparison
from .library import find_adapters
from .report import read_loss_curves
from .results import Results
from .run_folder import HARMLESS, RunFolder, changed_keys

Held = Mapping[RunKey, ComparedRun]
"""Finished runs of other machines."""

_PLACE = frozenset({"output_dir", "seed", "tasks", "memory_trajectories", "base_model"})
_PATHS = frozenset({"demonstrations_folder", "assets_folder"})


def aggregate(benchmark: Benchmark, held: Held | None = None) -> tuple[dict[str, Any], list[str]]:
    """All finished runs as one JSON-compatible object (see `comparison`), and the names of those that are missing.

    Args:
        held: runs of other machines, from `load_held`; one that this machine has finished too counts as this one's.

    Raises:
        ValueError: a run was made with another configuration than the benchmark's, or is damaged, or is held with
            other numbers.
    """
    runs, missing = [], []
    for job in benchmark.jobs:
        if job.key is None:
            continue
        made, found = job.same_as or job, progress(job)
        if found.problem:
            raise ValueError(found.problem)
        if found.done and made.key:
            run = _aggregate_run(made.key, Results.load(RunFolder(made.folder).results), benchmark)
            base = {"base": _base_of(made), "base_seed": made.base_seed}
            run |= {**base, "analysis": _analysis_of(made), "gradients": _gradients_of(made), "same_as": None}
            other = (held or {}).get(made.key)
            if other is not None and _contradict(asdict(other), run):
                raise ValueError(
                    f"{made.folder} has other numbers than the run that is held of {made.name}: move the folder away, "
                    "or leave the run out of the file that holds it"
                )
        elif theirs := (held or {}).get(job.key) or (held or {}).get(made.key or job.key):
            run = asdict(theirs)
        else:
            missing.append(job.name)
            continue
        if job.same_as:
            run |= {**job.key._asdict(), "config": {"method": job.key.method}, "same_as": made.name}
        runs.append(run)
    return {"format_version": FORMAT_VERSION, "protocol": _protocol(benchmark), "runs": runs}, missing


def load_held(
    benchmark: Benchmark,
    aggregates: Iterable[str | os.PathLike[str]],
    only: Iterable[str] | None = None,
    *,
    say: Callable[[str], object] | None = None,
) -> dict[RunKey, ComparedRun]:
    """The benchmark's runs that are finished elsewhere, from the aggregates that hold them; one may be in several.

    An aggregate may be another benchmark's, with the same recipe for what both have: its other runs are left out.

    Args:
        only: of these methods or names alone, as for `Benchmark.select`; None for all.
        say: is given a line per aggregate of which runs are left out.

    Raises:
        FileNotFoundError: no such aggregate.
        ValueError: it is damaged, or none of its runs is wanted, or one that is was run otherwise, or has other
            numbers in another of the files; or no run of the benchmark is meant by one of `only`.
    """
    ours = _protocol(benchmark)["suites"]
    wanted_keys = None if only is None else benchmark.meant_by(only)
    jobs = {job.key: job for job in benchmark.jobs if job.key and (wanted_keys is None or job.key in wanted_keys)}
    held: dict[RunKey, ComparedRun] = {}
    for path in aggregates:
        comparison = load_comparison(path)
        theirs = comparison.protocol.get("suites")
        taken = [run for run in comparison.runs if _key(run) in jobs]
        if not taken:
            chosen = "" if only is None else ", of those that were chosen"
            raise ValueError(
                f"{path} holds no run of {benchmark.name}{chosen}, but {len(comparison.runs)} others, such as "
                f"{_key(comparison.runs[0])}; leave the file out"
            )
        if say and len(taken) < len(comparison.runs):
            say(f"{path}: {len(taken)} of {len(comparison.runs)} runs taken for {benchmark.name}")
        for run in taken:
            key = _key(run)
            job = jobs[key]
            suite = theirs.get(run.suite) if isinstance(theirs, dict) else None
            if not isinstance(suite, dict) or not _said_alike(suite, ours[run.suite], run.order):
                raise ValueError(f"{path}: {run.suite} is not run there as in {benchmark.name}; leave the file out")
            if not isinstance(suite.get("options"), dict):
                raise ValueError(
                    f"{path} does not say the defaults of the version that wrote it (protocol.suites.{run.suite}."
                    "options), which may have been others; leave the file out, or aggregate it anew"
                )
            if run.base_seed != job.base_seed:
                raise ValueError(
                    f"{path}: {job.name} was run with base_seed {run.base_seed}, here it is {job.base_seed}; leave "
                    "the file out, or undo the change"
                )
            wanted = resolved_recipe(job.recipe)
            differing = changed_keys(
                _switched_on({**suite["options"], **run.config}),
                _switched_on(wanted),
                ignore=_PLACE | unimportant(job.recipe),
            )
            if differing:
                raise ValueError(
                    f"{path}: {job.name} was run with another {', '.join(differing)} than {benchmark.name}'s; leave "
                    "the file out, or undo the change"
                )
            # In what it differs from these defaults, not from those of the version that wrote the file.
            mine = replace(run, config=_own_options(key, wanted, benchmark))
            first = held.setdefault(key, mine)
            if first.base is None:
                held[key] = mine
            if _contradict(asdict(first), asdict(mine)):
                raise ValueError(f"{path}: {job.name} has other numbers in another of these files; leave one out")
    return held


def check_replacement(path: Path, content: Mapping[str, Any]) -> None:
    """Raise a ValueError if `content` is no aggregate, or lacks or changes a run of the aggregate at `path`."""
    new = read_comparison(content, source=f"{path} (not written)")
    if not path.exists():
        return
    try:
        old = load_comparison(path)
    except ComparisonError as error:
        raise ValueError(f"{path} would be replaced, and cannot be read: move it away first ({error})") from error
    kept = {_key(run): run for run in new.runs}
    lost = [run for run in old.runs if _key(run) not in kept]
    if lost:
        raise ValueError(
            f"{path} holds {len(lost)} {'run that is' if len(lost) == 1 else 'runs that are'} not here, such as "
            f"{_key(lost[0])}; `--held {path}` keeps those of this benchmark, another --output leaves the file alone"
        )
    for run in old.runs:
        if _contradict(asdict(run), asdict(kept[_key(run)])):
            raise ValueError(
                f"{path} holds {_key(run)} with other numbers; move the file away if these shall count, or write to "
                "another --output"
            )


def _contradict(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two files say different things of a run; older ones do not say its base."""
    names = ["success", "episodes", "base_seed", *(["base"] if None not in (one["base"], other["base"]) else [])]
    return any(one[name] != other[name] for name in names)


def _said_alike(one: Mapping[str, Any], other: Mapping[str, Any], order: str) -> bool:
    """Whether two YAMLs, as `_protocol` has them, say the same of a suite's runs in one order of tasks."""
    tasks = [found.get(order) if isinstance(found := each.get("orders"), dict) else None for each in (one, other)]
    return tasks[0] is not None and tasks[0] == tasks[1] and one.get("recipe") == other.get("recipe")


def _key(run: ComparedRun) -> RunKey:
    return RunKey(run.suite, run.method, run.seed, run.order, run.memory)


def _base_of(job: Job) -> str | None:
    """Digest of the weights that the run's adapters were trained on."""
    adapters = find_adapters(job.folder)
    return adapters[0].info.base_fingerprint["weights"] if adapters else None


def _analysis_of(job: Job) -> dict[str, Any] | None:
    """What `comparison` takes of the run's analysis; None for a run that was not analysed, or only half way."""
    if not (job.folder / ANALYSIS).exists():
        return None
    found = Analysis.load(job.folder)
    if found.stages < progress(job).planned:
        return None
    return {
        name: [[None if cell is None else round(cell, 6) for cell in row] for row in getattr(found, name)]
        for name in ANALYSED
    }


def _gradients_of(job: Job) -> dict[str, list[float | None]] | None:
    """Means over each stage of what `log_gradients` logged in it; None for a run that did not."""
    curves = [curve for curve in read_loss_curves(job.folder)[0] if curve.term.startswith("grad_")]
    found: dict[str, list[float | None]] = {curve.term: [None] * progress(job).planned for curve in curves}
    for curve in curves:
        found[curve.term][curve.stage] = round(float(curve.values.mean()), 6)
    return found or None


def _aggregate_run(key: RunKey, results: Results, benchmark: Benchmark) -> dict[str, Any]:
    timings = results.timings[1:]  # the base is shared
    return {
        **key._asdict(),
        "tasks": [task.name for task in results.tasks],
        "learned_at": [task.learned_at for task in results.tasks],
        "success": [[None if math.isnan(rate) else rate for rate in row] for row in results.success.tolist()],
        "episodes": results.episodes,
        "assets": results.assets,
        "renderer": results.renderer,
        "step_cap": results.step_cap,
        "commit": results.commit,
        "versions": results.versions,
        "train_seconds": round(sum(stage.get("train", 0.0) for stage in timings), 1),
        "evaluate_seconds": round(sum(stage.get("evaluate", 0.0) for stage in timings), 1),
        "config": _own_options(key, results.config, benchmark),
    }


def _own_options(key: RunKey, config: Mapping[str, Any], benchmark: Benchmark) -> dict[str, Any]:
    """In what a run with this configuration differs from the protocol, of what its method reads."""
    common, method = benchmark.common[key.suite], {"method": config["method"]}
    ignored = unimportant({**common, **method}) | _PLACE | {"method"}
    differing = changed_keys(resolved_recipe(common), config, ignore=ignored)
    return {**method, **{name: new for name, (_, new) in differing.items() if name in config}}


def _switched_on(options: Mapping[str, Any], leave_out: frozenset[str] = frozenset()) -> dict[str, Any]:
    """All but what is off, as JSON has it: an option that only one version knows, and that is off, changes nothing."""
    found: dict[str, Any] = json.loads(json.dumps(dict(options)))
    return {name: value for name, value in found.items() if value and name not in leave_out}


def _protocol(benchmark: Benchmark) -> dict[str, Any]:
    return {
        "name": benchmark.name,
        "seconds": "of the stages after the base, which all runs share",
        "suites": {
            suite: {
                "orders": {order: list(tasks) for order, tasks in benchmark.orders[suite].items()},
                "recipe": {name: value for name, value in common.items() if name not in _PATHS | HARMLESS},
                "options": _switched_on(resolved_recipe(common), leave_out=BOOKKEEPING | _PLACE | {"method"}),
            }
            for suite, common in benchmark.common.items()
        },
    }
