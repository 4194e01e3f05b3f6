"""The aggregate of a benchmark -> means, intervals, paired differences and rankings. NumPy only.

An aggregate is strict JSON with these keys and no others::

    format_version  1
    protocol        what all runs have in common, as an object, of each suite `options` with the defaults of the
                    version that wrote it (what is off is left out); `aggregation.load_held` compares it
    runs            [{
        suite, method, seed, order, memory    names and numbers of the benchmark; no two runs agree in all five
        tasks, learned_at                     names in the order of learning, and the stage of each, 0 = base
        success, episodes                     [task][stage] rate in [0, 1] and number of rollouts, null where not
                                              evaluated; the first column is the base
        assets, renderer, step_cap            the same for all runs of a suite
        commit, versions                      of what made the run
        train_seconds, evaluate_seconds       of the stages after the base
        config                                in what the run differs from the protocol
        base                                  digest of the base's weights; may be missing or null: not known
        base_seed                             with which the base was trained; may be missing: 0
        analysis                              `cka` and `action_error`, [task][stage], of its analysis.json; may be
                                              missing or null: not analysed
        gradients                             what `log_gradients` logged, name -> [stage], the mean over a stage's
                                              entries; may be missing or null: not logged
        same_as                               name of the run whose numbers these are, because this one would repeat
                                              it bit for bit; may be missing or null: it was run itself
    }]

Intervals (see `intervals`) are over seeds, a seed being drawn with all its orders: it chooses the trajectories that
are stored, in one order as in another, and by these plain replay keeps a task or not (recipes/EXPLORED.md).
They say what another seed would do, on the same demonstrations and start states, and on the same bases.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .intervals import Estimate, bootstrap_mean, paired_difference
from .metrics import all_metrics, average_by_stage, forward_transfer
from .reading import Checker, read_json

FORMAT_VERSION = 1
ANALYSED = ("cka", "action_error")
"""The tables of analysis.json that an aggregate takes in."""


class ComparisonError(ValueError):
    """An aggregate that cannot be used; the message names the file and the place."""


class MetricColumn(NamedTuple):
    """How a metric stands in a table."""

    label: str
    higher_is_better: bool
    meaning: str


METRICS: Mapping[str, MetricColumn] = {
    "final_average": MetricColumn("FAA", True, "success on all tasks after the last stage"),
    "auc": MetricColumn("AUC", True, "success of a task from its own stage on"),
    "forward_transfer": MetricColumn("FWT", True, "success right after learning, base tasks included (diagonal)"),
    "negative_backward_transfer": MetricColumn("NBT", False, "what a task loses afterwards, mean over later stages"),
    "average_accuracy": MetricColumn("AA", True, "success on all tasks seen, mean over stages"),
    "adaptation": MetricColumn("new", True, "success on the tasks after the base, right after learning"),
    "retention": MetricColumn("old", True, "success on the tasks before the last stage, after it"),
    "forgetting": MetricColumn("F", False, "fall from the best earlier stage to the last"),
    "backward_transfer": MetricColumn("BWT", True, "change from a task's own stage to the last"),
}
"""The seven of `metrics.py`, and adaptation and retention apart from each other."""


@dataclass(frozen=True)
class ComparedRun:
    """One finished run; the attributes are the keys of the file (see the module)."""

    suite: str
    method: str
    seed: int
    order: str
    memory: int
    tasks: list[str]
    learned_at: list[int]
    success: list[list[float | None]]
    episodes: list[list[int | None]]
    assets: str
    renderer: str
    step_cap: int
    commit: str | None
    versions: dict[str, str]
    train_seconds: float
    evaluate_seconds: float
    config: dict[str, Any]
    base: str | None = None
    base_seed: int = 0
    analysis: dict[str, list[list[float | None]]] | None = None
    gradients: dict[str, list[float | None]] | None = None
    same_as: str | None = None

    @property
    def matrix(self) -> NDArray[np.float64]:
        """(tasks, stages) success rates in [0, 1], NaN where not evaluated."""
        return np.array([[math.nan if cell is None else cell for cell in row] for row in self.success], np.float64)

    def metrics(self) -> dict[str, float]:
        """Every metric of `METRICS`, NaN where undefined."""
        matrix, learned_at = self.matrix, np.array(self.learned_at)
        new = learned_at > 0
        return {
            **all_metrics(matrix, learned_at),
            "adaptation": forward_transfer(matrix[new], learned_at[new]),
            "retention": float(average_by_stage(matrix, learned_at, old_only=True)[-1]),
        }


@dataclass(frozen=True)
class Comparison:
    """All runs of an aggregate, or some.

    Attributes:
        methods: of the whole aggregate, by which each has its look in figures, whichever are drawn.
    """

    protocol: dict[str, Any]
    runs: list[ComparedRun]
    methods: tuple[str, ...] = ()

    def only(self, methods: Iterable[str] | None = None, seeds: Iterable[int] | None = None) -> Comparison:
        """The runs of these methods and seeds alone; None for all. A ValueError names what has no run."""
        runs = self.runs
        choices: dict[str, Iterable[Any] | None] = {"method": methods, "seed": seeds}
        for name, chosen in choices.items():
            if chosen is None:
                continue
            wanted, there = set(chosen), list(dict.fromkeys(getattr(run, name) for run in runs))
            there = sorted(there) if name == "seed" else there
            if strange := ", ".join(map(str, sorted(wanted - set(there)))):
                of = "" if name == "method" else "seed "
                raise ValueError(f"no run of {of}{strange}; there are runs of {of}{', '.join(map(str, there))}")
            runs = [run for run in runs if getattr(run, name) in wanted]
        if runs is self.runs:
            return self
        return Comparison(self.protocol, runs, self.methods or tuple(method_names(self.runs)))

    def groups(self) -> dict[tuple[str, int], list[ComparedRun]]:
        """(suite, memory size) -> its runs, in the order of the file: what may be compared with each other."""
        groups: dict[tuple[str, int], list[ComparedRun]] = {}
        for run in self.runs:
            groups.setdefault((run.suite, run.memory), []).append(run)
        return groups


# --- statistics --------------------------------------------------------------------------------------------------


def rank(means: Mapping[str, float], *, higher_is_better: bool = True) -> list[list[str]]:
    """Names from best to worst, those with equal means together; names without a mean (NaN) are left out.

    >>> rank({"er": 0.5, "infovla": 0.7, "ewc": 0.5, "lwf": float("nan")})
    [['infovla'], ['er', 'ewc']]
    """
    known = {name: round(mean, 12) for name, mean in means.items() if not math.isnan(mean)}
    levels = sorted(set(known.values()), reverse=higher_is_better)
    return [[name for name, mean in known.items() if mean == level] for level in levels]


class Ranking(NamedTuple):
    """Methods from best to worst, those with equal means together, and over which seeds."""

    levels: list[list[str]]
    seeds: list[int]


def rankings(runs: Sequence[ComparedRun], metric: str) -> dict[str, Ranking]:
    """Order of tasks -> ranking of the methods by their mean over the seeds that all of them have under it.

    With several orders only the methods that were run under all of them are ranked. A seed counts if all have it on
    one base (see `differences`): a ranking is then about one thing, and may differ from that of the means over all.
    """
    values: dict[str, dict[str, dict[Any, float]]] = {}
    for run in runs:
        values.setdefault(run.order, {}).setdefault(run.method, {})[_pair(run)] = run.metrics()[metric]
    shared = [method for method in method_names(runs) if all(method in found for found in values.values())]
    result = {}
    for order, found in sorted(values.items()):
        pairs = (
            [pair for pair in found[shared[0]] if all(pair in found[method] for method in shared)] if shared else []
        )
        means = {
            method: bootstrap_mean([found[method][pair] for pair in pairs], resamples=1).mean for method in shared
        }
        levels = rank(means, higher_is_better=METRICS[metric].higher_is_better)
        result[order] = Ranking(levels, sorted({pair[0] for pair in pairs}))
    return result


def same_ranking(by_order: Mapping[str, Ranking]) -> bool | None:
    """Whether all orders rank the same; None if there is nothing to compare (one order, or fewer than two methods).

    >>> same_ranking({"A": Ranking([["infovla"], ["er"]], [0]), "B": Ranking([["infovla", "er"]], [0])})
    False
    """
    found = [[sorted(level) for level in ranking.levels] for ranking in by_order.values()]
    if len(found) < 2 or min(sum(len(level) for level in ranking) for ranking in found) < 2:
        return None
    return all(ranking == found[0] for ranking in found)


def comparable(runs: Sequence[ComparedRun]) -> dict[str | None, list[ComparedRun]]:
    """The runs whose means may stand in one table: all of them (under None), or those of each order of tasks.

    Apart where not every method was run under all orders: a mean over both and a mean over one differ by the tasks.
    They may still be over different seeds, which `Comparison.only` makes the same, and which `differences` are not.
    """
    orders = [{run.order for run in own} for own in by_method(runs).values()]
    if all(one == orders[0] for one in orders):
        return {None: list(runs)}
    return {order: [run for run in runs if run.order == order] for order in sorted(set().union(*orders))}


def seeds_text(runs: Iterable[ComparedRun]) -> str:
    """Their seeds, three or more that follow each other as a span: "0–2, 6"."""
    seeds = sorted({run.seed for run in runs})
    spans: list[list[int]] = []
    for seed in seeds:
        if spans and seed == spans[-1][-1] + 1:
            spans[-1].append(seed)
        else:
            spans.append([seed])
    return ", ".join(f"{span[0]}–{span[-1]}" if len(span) > 2 else ", ".join(map(str, span)) for span in spans)


def bases_text(runs: Iterable[ComparedRun]) -> str:
    """The bases that they start from, by the beginning of their digests, "?" where it is not known."""
    return ", ".join(sorted({(run.base or "?")[:4] for run in runs}, key=lambda base: (base == "?", base)))


def method_names(runs: Iterable[ComparedRun]) -> list[str]:
    return list(dict.fromkeys(run.method for run in runs))


def by_method(runs: Iterable[ComparedRun]) -> dict[str, list[ComparedRun]]:
    """Method -> its runs, in the order of the file."""
    found: dict[str, list[ComparedRun]] = {}
    for run in runs:
        found.setdefault(run.method, []).append(run)
    return found


def estimates(runs: Iterable[ComparedRun]) -> dict[str, dict[str, Estimate]]:
    """Method -> metric -> mean over its runs. The runs must be of one suite and memory size."""
    result = {}
    for method, own in by_method(runs).items():
        values, seeds = [run.metrics() for run in own], [run.seed for run in own]
        result[method] = {name: bootstrap_mean([value[name] for value in values], groups=seeds) for name in METRICS}
    return result


def differences(
    runs: Sequence[ComparedRun], against: str, *, same_weights: bool = False
) -> dict[str, dict[str, Estimate]]:
    """Method -> metric -> paired difference to the method `against`, over their common seeds and orders.

    The runs must be of one suite and memory size. Empty if `against` was not run there. A pair starts from the same
    weights, by their digest, or from bases that do the same in the same rollouts: trained alike on processors that
    round differently, their weights differ a little. Such a pair has less in common, so that its difference varies
    more; and where the runs of one method start from one base and those of the other from another, the difference of
    the bases is in it, and in no interval over seeds.

    Args:
        same_weights: only pairs that are known to start from the same weights; a method without any is left out.
    """
    result = {}
    for method, paired in pairs(runs, against).items():
        found = [pair for pair in paired if have_same_weights(*pair)] if same_weights else paired
        if same_weights and not found:
            continue
        ours, theirs = ([pair[side].metrics() for pair in found] for side in (0, 1))
        seeds = {number: run.seed for number, (run, _) in enumerate(found)}
        result[method] = {
            name: paired_difference(
                {number: values[name] for number, values in enumerate(ours)},
                {number: values[name] for number, values in enumerate(theirs)},
                groups=seeds,
            )
            for name in METRICS
        }
    return result


def pairs(runs: Sequence[ComparedRun], against: str) -> dict[str, list[tuple[ComparedRun, ComparedRun]]]:
    """Method -> its runs, each with the run of `against` that it makes a pair with (see `differences`)."""
    keyed = {method: {(run.order, run.seed): run for run in own} for method, own in by_method(runs).items()}
    reference = keyed.pop(against, None)
    if reference is None:
        return {}
    return {
        method: [
            (run, reference[at]) for at, run in own.items() if at in reference and _may_share_base(run, reference[at])
        ]
        for method, own in keyed.items()
    }


def agreement_of_orders(runs: Sequence[ComparedRun]) -> dict[str, tuple[float, int]]:
    """Method -> how far the two orders of a seed keep the same of the base's tasks, and over how many task-seed pairs.

    Compared is the success on a task over the stages after the base, less its mean over the seeds, by Pearson's
    correlation: what a seed fixes in both orders is, above all, which trajectories are stored. Left out are methods
    with fewer than two seeds in both of the first two orders, with no base task in both, and without any spread.
    """
    found = {}
    for method, own in by_method(runs).items():
        kept = {(run.order, run.seed): _kept_of_base_tasks(run) for run in own}
        orders = sorted({order for order, _ in kept})[:2]
        seeds = sorted({seed for _, seed in kept if len(orders) == 2 and all((o, seed) in kept for o in orders)})
        if len(seeds) < 2:
            continue
        tasks = sorted(set.intersection(*(set(kept[order, seed]) for order in orders for seed in seeds)))
        if not tasks:
            continue
        first, second = (
            np.array([[kept[order, seed][task] for seed in seeds] for task in tasks]) for order in orders
        )  # (tasks, seeds)
        first, second = (each - each.mean(axis=1, keepdims=True) for each in (first, second))
        if first.any() and second.any():
            found[method] = (float(np.corrcoef(first.ravel(), second.ravel())[0, 1]), first.size)
    return found


def _kept_of_base_tasks(run: ComparedRun) -> dict[str, float]:
    """Name of each of the base's tasks -> mean success over the stages after the base."""
    rows = zip(run.tasks, run.learned_at, run.matrix, strict=True)
    return {task: float(np.nanmean(row[1:])) for task, learned, row in rows if learned == 0}


def have_same_weights(one: ComparedRun, other: ComparedRun) -> bool:
    """Whether both are known to start from the same weights."""
    return one.base is not None and one.base == other.base


def _may_share_base(one: ComparedRun, other: ComparedRun) -> bool:
    return have_same_weights(one, other) or _pair(one) == _pair(other)


def _pair(run: ComparedRun) -> tuple[Any, ...]:
    """What two runs of an order that are a pair share: their seed, and their base by seed and column of rollouts."""
    return run.seed, run.base_seed, tuple(row[0] for row in run.success)


# --- reading -----------------------------------------------------------------------------------------------------


def load_comparison(path: str | os.PathLike[str]) -> Comparison:
    """Read and validate an aggregate.

    Raises:
        FileNotFoundError: there is none.
        ComparisonError: it is damaged, edited, or of another format version.
    """
    try:
        content = read_json(Path(path), error=ComparisonError, cure=_AGAIN)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist: `recipes/benchmark.py aggregate` writes it") from error
    return read_comparison(content, source=str(path))


def read_comparison(content: Any, *, source: str = "aggregate") -> Comparison:
    """Validate the content of an aggregate; `source` names it in errors."""
    return _Reader(source, ComparisonError, _AGAIN).comparison(content)


_AGAIN = "aggregate the benchmark again"


class _Reader(Checker[ComparisonError]):
    def comparison(self, content: Any) -> Comparison:
        if isinstance(content, dict) and "runs" not in content and {"method", "successes", "timings"} <= set(content):
            raise self.error(
                f"{self.source} holds the results of one run, and is no aggregate: `python recipes/benchmark.py "
                "aggregate BENCHMARK.yaml` makes one of all finished runs of a benchmark"
            )
        self.version(content, FORMAT_VERSION)
        self.record(content, ("format_version", "protocol", "runs"), "the content")
        if not isinstance(content["protocol"], dict):
            self.fail("protocol", "an object", content["protocol"])
        if not isinstance(content["runs"], list) or not content["runs"]:
            self.fail("runs", "a list of at least one run", content["runs"])
        runs = [self.run(item, f"runs[{index}]") for index, item in enumerate(content["runs"])]
        seen: dict[Any, str] = {}
        shown: dict[Any, Any] = {}
        for index, run in enumerate(runs):
            where = f"runs[{index}]"
            key = (run.suite, run.method, run.seed, run.order, run.memory)
            if key in seen:
                self.fail(where, f"another run than {seen[key]}: no two may share suite, method, ...", key)
            seen[key] = where
            look = (run.assets, run.renderer, run.step_cap)
            if shown.setdefault(run.suite, look) != look:
                expected = (
                    f"those of {run.suite}'s other runs, {shown[run.suite]} (`assets: auto` takes what it finds)"
                )
                self.fail(f"{where}: assets, renderer and step_cap", expected, look)
            if shown.setdefault((run.suite, "order", run.order), run.tasks) != run.tasks:
                self.fail(f"{where}.tasks", f"the tasks of order {run.order}, as in the other runs", run.tasks)
        return Comparison(content["protocol"], runs)

    def run(self, value: Any, where: str) -> ComparedRun:
        if isinstance(value, dict):
            value = {"base": None, "base_seed": 0, "analysis": None, "gradients": None, "same_as": None, **value}
        record = self.record(value, [item.name for item in fields(ComparedRun)], where)
        for name, kind, expected in _KINDS:
            if not isinstance(record[name], kind) or isinstance(record[name], bool):
                self.fail(f"{where}.{name}", expected, record[name])
        if not all(isinstance(task, str) for task in record["tasks"]) or not record["tasks"]:
            self.fail(f"{where}.tasks", "a list of names, at least one", record["tasks"])
        tasks = len(record["tasks"])
        stages = [stage for stage in record["learned_at"] if type(stage) is int and stage >= 0]
        if len(stages) != tasks or stages != sorted(stages) or len(record["learned_at"]) != tasks:
            self.fail(f"{where}.learned_at", f"{tasks} stages >= 0, ascending", record["learned_at"])
        if len(record["success"]) != tasks or len(record["episodes"]) != tasks:
            self.fail(f"{where}: success and episodes", f"tables of {tasks} rows", len(record["success"]))
        for i, (rates, counts) in enumerate(zip(record["success"], record["episodes"], strict=True)):
            width = stages[-1] + 1
            if not all(isinstance(row, list) and len(row) == width for row in (rates, counts)):
                self.fail(f"{where}: success and episodes, row {i}", f"lists of {width} stages", rates)
            for j, (rate, count) in enumerate(zip(rates, counts, strict=True)):
                if not _is_cell(rate, count):
                    self.fail(f"{where}: task {i}, stage {j}", "a rate in [0, 1] of so many rollouts", (rate, count))
        if record["analysis"] is not None:
            tables = self.record(record["analysis"], ANALYSED, f"{where}.analysis")
            for name in ANALYSED:
                self.table(tables[name], f"{where}.analysis.{name}", tasks, stages[-1] + 1)
        if record["gradients"] is not None:
            place = f"{where}.gradients"
            if not isinstance(record["gradients"], dict):
                self.fail(place, "an object, or null", record["gradients"])
            for name, row in record["gradients"].items():
                self.row(row, f"{place}.{name}", stages[-1] + 1)
        return ComparedRun(**record)

    def table(self, value: Any, where: str, tasks: int, stages: int) -> None:
        for place, row in self.items(value, where, tasks):
            self.row(row, place, stages)

    def row(self, value: Any, where: str, stages: int) -> None:
        for place, cell in self.items(value, where, stages):
            if cell is not None:
                self.number(cell, place)


def _is_cell(rate: Any, count: Any) -> bool:
    if rate is None or count is None:
        return rate is None and count is None
    if type(rate) not in (int, float) or type(count) is not int or count < 1 or not 0 <= rate <= 1:
        return False
    return bool(abs(rate * count - round(rate * count)) < 1e-6)  # a number of successes


_KINDS: tuple[tuple[str, Any, str], ...] = (
    *((name, str, "a string") for name in ("suite", "method", "order", "assets", "renderer")),
    *((name, int, "an integer") for name in ("seed", "memory", "step_cap", "base_seed")),
    *((name, list, "a list") for name in ("tasks", "learned_at", "success", "episodes")),
    *((name, (int, float), "a number of seconds") for name in ("train_seconds", "evaluate_seconds")),
    *((name, dict, "an object") for name in ("versions", "config")),
    *((name, (str, type(None)), "a string or null") for name in ("commit", "base", "same_as")),
)
